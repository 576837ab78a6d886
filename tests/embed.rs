//! Pooling against sums by hand, and embeddings of many texts against those of each.

mod common;

use candle_core::{Device, IndexOp, Tensor};
use hybrid_attention::model::{Batch, Pass, Sight};
use hybrid_attention::refine::Interpolate;
use hybrid_attention::{
    Cancel, Config, EmbedConfig, Error, HybridModel, Pooling, Thinking, Tokenizer,
};

use common::tiny;
use common::{Result, TEXTS, assert_close, fixture};

const KINDS: [Pooling; 3] = [Pooling::Mean, Pooling::WeightedMean, Pooling::LastToken];

/// The vector that `pooling` makes of one text's token vectors, summed by hand.
fn pool(pooling: Pooling, tokens: &[Vec<f32>]) -> Vec<f32> {
    let weight = |position: usize| match pooling {
        Pooling::Mean => 1.0,
        Pooling::WeightedMean => (position + 1) as f64,
        _ => f64::from(u8::from(position + 1 == tokens.len())),
    };
    let sum: f64 = (0..tokens.len()).map(weight).sum();
    let column = |index: usize| {
        let products =
            tokens.iter().enumerate().map(|(at, token)| weight(at) * f64::from(token[index]));
        (products.sum::<f64>() / sum) as f32
    };
    (0..tokens[0].len()).map(column).collect()
}

#[test]
fn pooling_is_a_weighted_sum_of_a_texts_tokens() -> Result {
    let batch = Batch::ragged(&[5, 1, 3])?;
    let hidden = tiny::noise(1, &[9, 4], 1.0)?;
    for pooling in KINDS {
        let got = pooling.pool(&hidden, &batch)?;
        assert_eq!(got.dims(), [3, 4]);
        for (text, rows) in batch.all_rows().enumerate() {
            let expected = pool(pooling, &hidden.i(rows)?.to_vec2()?);
            let expected = Tensor::new(expected, &Device::Cpu)?;
            assert_close(&format!("{pooling:?}, text {text}"), &got.i(text)?, &expected, 1e-6)?;
        }
    }
    Ok(())
}

#[test]
fn a_batch_of_more_or_fewer_tokens_is_refused() -> Result {
    let hidden = tiny::noise(1, &[3, 5, 4], 1.0)?;
    for batch in [Batch::one(5)?, Batch::dense(2, 5)?, Batch::dense(3, 4)?, Batch::dense(4, 4)?] {
        for pooling in KINDS {
            let refused = pooling.pool(&hidden, &batch);
            assert!(refused.is_err(), "{pooling:?} over {batch:?}");
        }
    }
    Ok(())
}

fn model(tokenizer: &str, sliding_window: Option<usize>) -> Result<HybridModel> {
    let tokenizer = Tokenizer::from_folder(&fixture("tokenizer").join(tokenizer))?;
    let config = Config { vocab_size: 512, sliding_window, ..tiny::config() };
    Ok(HybridModel::new(tiny::transformer(&config, 1)?, tokenizer)?)
}

/// Every pooling, both sights, thinking or not.
fn embed_configs() -> Vec<EmbedConfig> {
    let mut configs = Vec::new();
    for pooling in KINDS {
        for sight in [Sight::Causal, Sight::Bidirectional] {
            let plain = EmbedConfig::default().pooling(pooling).sight(sight);
            let thinking = Thinking::new(2).span(1..3).refine(Interpolate::new(0.3));
            configs.extend([plain.clone(), plain.thinking(thinking)]);
        }
    }
    configs
}

#[test]
fn a_batch_of_texts_is_each_by_itself() -> Result {
    for window in [None, Some(3)] {
        let model = model("llama", window)?;
        for config in embed_configs() {
            let together = model.embed(&TEXTS, &config)?;
            assert_eq!(together.dims(), [TEXTS.len(), model.config().hidden_size]);
            for batch_tokens in [1, 20, 10_000] {
                let some = model.embed(&TEXTS, &config.clone().batch_tokens(batch_tokens))?;
                assert_close("batches", &some, &together, 1e-5)?;
            }
            for (row, text) in TEXTS.iter().enumerate() {
                let alone = model.embed(&[text], &config)?;
                assert_close(text, &together.i(row..row + 1)?, &alone, 1e-5)?;
            }
        }
    }
    Ok(())
}

/// Without thinking: one pass over the text, the final norm, pooling.
#[test]
fn an_embedding_is_the_pooled_last_hidden_state() -> Result {
    let model = model("llama", None)?;
    let transformer = model.transformer();
    let tokenizer = model.tokenizer().ok_or("no tokenizer")?;
    for text in TEXTS {
        let ids = tokenizer.encode(text, true)?;
        let batch = Batch::one(ids.len())?;
        for (sight, pass) in [
            (Sight::Causal, Pass::Causal(&batch)),
            (Sight::Bidirectional, Pass::Bidirectional(&batch)),
        ] {
            let xs = transformer.embed_ids(&ids)?;
            let h = transformer.norm(&transformer.forward(&xs, 0..3, pass)?)?;
            for pooling in KINDS {
                let config = EmbedConfig::default().pooling(pooling).sight(sight).normalize(false);
                let expected = pool(pooling, &h.to_vec2()?);
                let expected = Tensor::new(expected, &Device::Cpu)?.unsqueeze(0)?;
                assert_close(text, &model.embed(&[text], &config)?, &expected, 1e-5)?;
            }
        }
    }
    Ok(())
}

#[test]
fn embeddings_have_length_1_unless_told_otherwise() -> Result {
    let model = model("llama", None)?;
    for config in embed_configs() {
        let raw = model.embed(&TEXTS, &config.clone().normalize(false))?;
        let lengths = raw.sqr()?.sum_keepdim(1)?.sqrt()?;
        let unit = model.embed(&TEXTS, &config)?;
        assert_close("scaled", &unit, &raw.broadcast_div(&lengths)?, 1e-6)?;
        let ones = unit.sqr()?.sum(1)?;
        assert_close("lengths", &ones, &ones.ones_like()?, 1e-5)?;
        assert!(lengths.flatten_all()?.to_vec1::<f32>()?.iter().all(|length| *length != 1.0));
    }
    Ok(())
}

/// Different kinds give different vectors: none is another in disguise.
#[test]
fn no_setting_is_ignored() -> Result {
    let model = model("llama", None)?;
    let vectors =
        embed_configs().into_iter().map(|config| Ok(model.embed(&TEXTS, &config)?.to_vec2()?));
    let vectors = vectors.collect::<Result<Vec<Vec<Vec<f32>>>>>()?;
    for (index, one) in vectors.iter().enumerate() {
        assert!(vectors[..index].iter().all(|other| other != one), "setting {index}");
    }
    Ok(())
}

#[test]
fn nothing_to_embed_is_an_error() -> Result {
    // This tokenizer begins every text with a token of its own; the other does not.
    let (llama, bytes) = (model("llama", None)?, model("byte_level", None)?);
    let config = EmbedConfig::default();
    let none: [&str; 0] = [];
    assert!(matches!(llama.embed(&none, &config), Err(Error::EmptyPrompt)));
    assert_eq!(llama.embed(&[""], &config)?.dims(), [1, 16]);
    let refused = |texts: &[&str]| match bytes.embed(texts, &config) {
        Err(Error::InText { text, source }) => Ok((text, *source)),
        other => Err(format!("{other:?}")),
    };
    assert!(matches!(refused(&["a", ""])?, (1, Error::EmptyPrompt)));

    let zero = bytes.embed(&["a"], &config.clone().batch_tokens(0)).map_err(|e| e.to_string());
    assert_eq!(zero.err().as_deref(), Some("parameter batch_tokens: expected at least 1, got 0"));
    let long = "a ".repeat(3000);
    assert!(matches!(refused(&["a", &long, ""])?, (1, Error::ContextFull { .. })));
    let refused = tiny::hybrid(&tiny::config(), 1)?.embed(&["a"], &config);
    assert!(matches!(refused, Err(Error::NoTokenizer { .. })));
    Ok(())
}

/// What is left out of the pooling is seen all the same.
#[test]
fn an_instruction_is_seen_and_not_pooled() -> Result {
    let model = model("llama", None)?;
    let (transformer, tokenizer) = (model.transformer(), model.tokenizer().ok_or("no tokenizer")?);
    for (instruction, text) in [("the dog ", "sat on the mat"), ("", "the cat"), ("a\n", "b c d")] {
        let ids = tokenizer.encode(&format!("{instruction}{text}"), true)?;
        // BOS and the instruction, but for its last space, which is of a token that reaches into the text.
        let left_out = tokenizer.encode(instruction.trim_end_matches(' '), true)?.len();
        let batch = Batch::one(ids.len())?;
        for (sight, pass) in [
            (Sight::Causal, Pass::Causal(&batch)),
            (Sight::Bidirectional, Pass::Bidirectional(&batch)),
        ] {
            let h = transformer.forward(&transformer.embed_ids(&ids)?, 0..3, pass)?;
            let h: Vec<Vec<f32>> = transformer.norm(&h)?.to_vec2()?;
            for pooling in KINDS {
                let config = EmbedConfig::default().pooling(pooling).sight(sight).normalize(false);
                let got = model.embed(&[text], &config.clone().instruction(instruction))?;
                let weight = |at: usize| match pooling {
                    Pooling::Mean => 1.0,
                    Pooling::WeightedMean => (at + 1) as f32, // as sentence-transformers counts
                    _ => f32::from(u8::from(at + 1 == h.len())),
                };
                let sum: f32 = (left_out..h.len()).map(weight).sum();
                let column = |column: usize| -> f32 {
                    (left_out..h.len()).map(|at| weight(at) / sum * h[at][column]).sum()
                };
                let expected: Vec<f32> = (0..h[0].len()).map(column).collect();
                let expected = Tensor::new(vec![expected], &Device::Cpu)?;
                assert_close(&format!("{instruction:?} {pooling:?}"), &got, &expected, 1e-5)?;
            }
        }
    }
    let nothing = model.embed(&["a", ""], &EmbedConfig::default().instruction("b "));
    assert!(
        matches!(nothing, Err(Error::InText { text: 1, source }) if matches!(*source, Error::EmptyPrompt))
    );
    Ok(())
}

#[test]
fn unless_told_otherwise_texts_are_read_causally() -> Result {
    let model = model("llama", None)?;
    let config = EmbedConfig::default;
    let vectors = |config: EmbedConfig| -> Result<Vec<Vec<f32>>> {
        Ok(model.embed(&TEXTS, &config)?.to_vec2()?)
    };
    let causal = config().sight(Sight::Causal).pooling(Pooling::WeightedMean);
    assert_eq!(vectors(config())?, vectors(causal)?);
    let both_ways = config().sight(Sight::Bidirectional);
    assert_eq!(vectors(both_ways.clone())?, vectors(both_ways.pooling(Pooling::Mean))?);
    Ok(())
}

#[test]
fn texts_are_cut_when_asked() -> Result {
    let model = model("llama", None)?;
    let tokenizer = model.tokenizer().ok_or("no tokenizer")?;
    let (long, config) = ("the cat sat on the mat ".repeat(20), EmbedConfig::default());
    let cut = model.embed(&[long.as_str()], &config.clone().max_tokens(9))?;
    let ids = tokenizer.encode(&long, true)?;
    let same = tokenizer.decode(&ids[..9], true);
    assert_eq!(tokenizer.encode(&same, true)?, &ids[..9]);
    let alone = model.embed(&[same.as_str()], &config)?;
    assert_eq!(cut.to_vec2::<f32>()?, alone.to_vec2::<f32>()?);
    let refused = model.embed(&["a"], &config.max_tokens(0)).map_err(|error| error.to_string());
    assert_eq!(refused.err().as_deref(), Some("parameter max_tokens: expected at least 1, got 0"));
    Ok(())
}

/// Each text once, and each with the vector that it has alone, however they are packed.
#[test]
fn many_texts_come_each_with_its_vector() -> Result {
    let model = model("llama", None)?;
    let words = ["the ", "cat ", "sat on ", "a mat ", "and thought about it, "];
    let texts: Vec<String> = (0..60usize)
        .map(|text| (0..=text * 7 % 23).map(|word| words[(text + word * word) % 5]).collect())
        .collect();
    let config = EmbedConfig::default();
    for batch_tokens in [1, 40, 300, EmbedConfig::BATCH_TOKENS] {
        let mut seen = vec![false; texts.len()];
        let mut vectors = model.embed_many(&texts, &config.clone().batch_tokens(batch_tokens))?;
        for left in (0..texts.len()).rev() {
            let (index, vector) = vectors.next().ok_or("too few")??;
            assert!(!std::mem::replace(&mut seen[index], true), "{index} twice");
            assert_eq!(vectors.len(), left);
            let alone = model.embed(&texts[index..=index], &config)?;
            let vector = Tensor::new(vec![vector], &Device::Cpu)?;
            assert_close(&texts[index], &vector, &alone, 1e-5)?;
        }
        assert!(vectors.next().is_none());
    }
    let none: [&str; 0] = [];
    assert_eq!(model.embed_many(&none, &config)?.len(), 0);
    Ok(())
}

#[test]
fn many_vectors_can_be_cancelled() -> Result {
    let (model, cancel) = (model("llama", None)?, Cancel::default());
    let vectors = model.embed_many(&TEXTS, &EmbedConfig::default().batch_tokens(1))?;
    let mut vectors = vectors.cancel(cancel.clone());
    assert!(matches!(vectors.next(), Some(Ok(_))));
    cancel.cancel();
    assert!(matches!(vectors.next(), Some(Err(Error::Cancelled))));
    assert!(vectors.next().is_none());
    Ok(())
}
