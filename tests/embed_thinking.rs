//! Vectors of texts that were thought about first, in every hand-off.

mod common;

use candle_core::{IndexOp, Tensor};
use hybrid_attention::model::{Batch, Pass, Sight};
use hybrid_attention::refine::Interpolate;
use hybrid_attention::thought::{Halt, HandOff};
use hybrid_attention::{Config, EmbedConfig, HybridModel, Pooling, Thinking, Tokenizer};

use common::tiny;
use common::{Result, TEXTS, assert_close, fixture};

const HAND_OFFS: [HandOff; 4] = [
    HandOff::Refined,
    HandOff::KeyValue,
    HandOff::Mixed { weight: 0.3 },
    HandOff::Mixed { weight: 0.0 },
];

const SIGHTS: [Sight; 2] = [Sight::Causal, Sight::Bidirectional];

fn model(sliding_window: Option<usize>) -> Result<HybridModel> {
    let tokenizer = Tokenizer::from_folder(&fixture("tokenizer").join("llama"))?;
    let config = Config { vocab_size: 512, sliding_window, ..tiny::config() };
    Ok(HybridModel::new(tiny::transformer(&config, 1)?, tokenizer)?)
}

fn thinking(weight: f64) -> Thinking {
    Thinking::new(2).refine(Interpolate::new(weight))
}

/// The plain mean, whatever is seen.
fn averaged(sight: Sight) -> EmbedConfig {
    EmbedConfig::default().sight(sight).pooling(Pooling::Mean)
}

#[test]
fn a_batch_is_its_texts_one_by_one_in_every_hand_off() -> Result {
    for window in [None, Some(3)] {
        let model = model(window)?;
        for hand_off in HAND_OFFS {
            for (sight, span) in SIGHTS.into_iter().flat_map(|it| [(it, 0..3), (it, 1..2)]) {
                let thinking = thinking(0.3).span(span.clone()).hand_off(hand_off);
                let how = EmbedConfig::default().sight(sight).thinking(thinking);
                let name = format!("{hand_off:?}, {sight:?}, {span:?}");
                for pooling in [Pooling::Mean, Pooling::LastToken] {
                    let how = how.clone().pooling(pooling);
                    let together = model.embed(&TEXTS, &how)?;
                    let values = together.flatten_all()?.to_vec1::<f32>()?;
                    assert!(values.iter().all(|value| value.is_finite()), "{name}");
                    for (row, text) in TEXTS.iter().enumerate() {
                        let alone = model.embed(&[text], &how)?;
                        assert_close(&name, &together.i(row..row + 1)?, &alone, 1e-5)?;
                    }
                }
            }
        }
    }
    Ok(())
}

/// Encode, think, hand off, norm and mean, written out for one text.
#[test]
fn an_embedding_is_what_the_decoder_makes_of_the_thoughts() -> Result {
    let model = model(None)?;
    let transformer = model.transformer();
    let tokenizer = model.tokenizer().ok_or("no tokenizer")?;
    for text in TEXTS {
        let ids = tokenizer.encode(text, true)?;
        let batch = Batch::one(ids.len())?;
        let xs = transformer.embed_ids(&ids)?;
        let forward = |xs: &Tensor, layers, sight| {
            transformer.forward(xs, layers, Pass::uncached(&batch, sight))
        };
        let first = forward(&xs, 0..1, Sight::Causal)?;
        let mut z = first.clone();
        for _ in 0..2 {
            let h = forward(&z, 1..2, Sight::Bidirectional)?;
            z = ((&z * 0.7)? + (h * 0.3)?)?;
        }
        let thought = forward(&z, 1..2, Sight::Bidirectional)?;
        for sight in SIGHTS {
            let plain = forward(&first, 1..2, Sight::Causal)?;
            for (hand_off, last) in [
                (HandOff::Refined, forward(&forward(&z, 1..2, sight)?, 2..3, sight)?),
                (HandOff::KeyValue, forward(&thought, 2..3, sight)?),
                (
                    HandOff::Mixed { weight: 0.3 },
                    forward(&((&plain * 0.7)? + (&thought * 0.3)?)?, 2..3, sight)?,
                ),
            ] {
                let thinking = thinking(0.3).span(1..2).hand_off(hand_off);
                let how = averaged(sight).normalize(false).thinking(thinking);
                let expected = transformer.norm(&last)?.mean_keepdim(0)?;
                let name = format!("{text}: {hand_off:?}, {sight:?}");
                assert_close(&name, &model.embed(&[text], &how)?, &expected, 1e-5)?;
            }
        }
    }
    Ok(())
}

/// Thoughts that stay where they were leave a plain reading, in one sight or the other.
#[test]
fn thoughts_that_do_not_move_are_read_plainly() -> Result {
    for window in [None, Some(3)] {
        let model = model(window)?;
        let plain = |sight| model.embed(&TEXTS, &averaged(sight));
        for sight in SIGHTS {
            for (hand_off, expected) in [
                (HandOff::Refined, plain(sight)?),
                (HandOff::KeyValue, plain(Sight::Bidirectional)?),
                (HandOff::Mixed { weight: 1.0 }, plain(Sight::Bidirectional)?),
                (HandOff::Mixed { weight: 0.0 }, plain(Sight::Causal)?),
            ] {
                let still = averaged(sight).thinking(thinking(0.0).hand_off(hand_off));
                let name = format!("{hand_off:?}, {sight:?}");
                assert_close(&name, &model.embed(&TEXTS, &still)?, &expected, 1e-5)?;
            }
        }
    }
    Ok(())
}

/// Texts of a batch halt one by one.
#[test]
fn texts_of_a_batch_halt_one_by_one() -> Result {
    let model = model(None)?;
    for halt in [Halt::Drift(0.2), Halt::Cosine(0.02), Halt::Kl(0.01)] {
        for hand_off in HAND_OFFS {
            let thinking = Thinking::new(8).refine(Interpolate::new(0.3)).hand_off(hand_off);
            let always = EmbedConfig::default().thinking(thinking.clone());
            let how = EmbedConfig::default().thinking(thinking.halt(halt));
            let together = model.embed(&TEXTS, &how)?;
            for (row, text) in TEXTS.iter().enumerate() {
                let name = format!("{halt:?}, {hand_off:?}");
                let alone = model.embed(&[text], &how)?;
                assert_close(&name, &together.i(row..row + 1)?, &alone, 1e-5)?;
            }
            if hand_off == HandOff::Refined {
                let on = model.embed(&TEXTS, &always)?;
                assert!(apart(&on, &together)?, "{halt:?} stopped nothing");
            }
        }
    }
    Ok(())
}

fn apart(a: &Tensor, b: &Tensor) -> Result<bool> {
    Ok((a - b)?.abs()?.max_all()?.to_scalar::<f32>()? > 1e-4)
}
