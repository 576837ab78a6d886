//! How the decoder receives thoughts, against a Mistral in plain loops.

mod common;

use std::ops::Range;

use candle_core::Tensor;
use hybrid_attention::model::{Batch, HandOver, KvCache, Pass, Sight, Transformer};
use hybrid_attention::refine::Interpolate;
use hybrid_attention::thought::{EncodedBatch, HandOff, Thoughts};
use hybrid_attention::{Config, GenerationConfig, Prompt, Thinking};
use proptest::prelude::*;

use common::reference::{ByDefinition, Reference, Stream};
use common::tiny::{self, holds};
use common::{Result, assert_close, assert_identical};

const HAND_OFFS: [HandOff; 3] =
    [HandOff::Refined, HandOff::KeyValue, HandOff::Mixed { weight: 0.4 }];

fn thinking(span: Range<usize>, hand_off: HandOff) -> Thinking {
    Thinking::passes(2).span(span).refine(Interpolate::new(0.4)).hand_off(hand_off)
}

/// Encodes, thinks and hands off into a new cache: what left the last layer, and what went in.
fn think(
    model: &Transformer,
    thinking: &Thinking,
    text: &EncodedBatch,
    room: usize,
) -> Result<(Tensor, Thoughts, KvCache)> {
    let mind = thinking.on(model)?;
    let mut cache = model.new_cache(text.batch().seq() + room)?;
    let z = mind.encode(text, Pass::Cached(&mut cache))?;
    let thoughts = mind.think(text, z, |_, _| ())?;
    let h = mind.hand_off(text, &thoughts, Pass::Cached(&mut cache))?;
    Ok((h, thoughts, cache))
}

fn rows(xs: &Tensor) -> Result<Stream> {
    Ok(xs.to_dtype(candle_core::DType::F64)?.squeeze(0)?.to_vec2()?)
}

/// Two context segments around a plain one, and a plain end.
const SEGMENTS: [Range<usize>; 2] = [1..4, 6..9];

fn agrees_with_its_definition(
    config: &Config,
    span: Range<usize>,
    hand_off: HandOff,
    seed: u64,
) -> Result {
    let weight = match hand_off {
        HandOff::Mixed { weight } => weight,
        _ => 1.0,
    };
    let model = tiny::transformer(config, seed)?;
    let reference = Reference::new(config, &tiny::weights(config, seed)?)?;
    let (ids, answer) = (tiny::tokens(config, seed, 10), tiny::tokens(config, seed + 1, 3));
    let layout = Batch::one(10)?.with_context(0, &SEGMENTS)?;
    let text = EncodedBatch::new(&model, &ids, layout)?;
    let (h, thoughts, mut cache) = think(&model, &thinking(span.clone(), hand_off), &text, 3)?;

    let definition = ByDefinition { decoder: &reference, thinker: &reference, segments: &SEGMENTS };
    let streams = (&rows(&thoughts.z)?, &rows(&thoughts.first)?);
    let layers = config.num_hidden_layers;
    let expected = definition.logits(layers, span, weight, (&ids, &answer), streams);

    let mut got = vec![model.logits(&h.narrow(1, 9, 1)?)?];
    for &id in &answer {
        got.push(tiny::logits(&model, &tiny::embed(&model, &[id])?, Pass::Cached(&mut cache))?);
    }
    for (at, (got, expected)) in got.iter().zip(expected).enumerate() {
        let expected: Vec<f32> = expected.iter().map(|&value| value as f32).collect();
        let expected = Tensor::new(expected, &candle_core::Device::Cpu)?;
        let name = format!("{hand_off:?}, logits {at}");
        assert_close(&name, &got.flatten_all()?, &expected, 1e-4)?;
    }
    Ok(())
}

fn spans() -> impl Strategy<Value = Range<usize>> {
    (0usize..3).prop_flat_map(|a| (a + 1..=3).prop_map(move |b| a..b))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn key_value_and_mixed_are_their_definitions(
        span in spans(), weight in 0.0..=1.0, window in prop::option::of(1usize..6), seed in 0u64..1000,
    ) {
        let config = Config { sliding_window: window, ..tiny::config() };
        for hand_off in [HandOff::KeyValue, HandOff::Mixed { weight }] {
            holds(agrees_with_its_definition(&config, span.clone(), hand_off, seed))?;
        }
    }
}

/// Prompts longer than a window's cache, and shorter than one chunk.
fn cases() -> [(Option<usize>, usize); 4] {
    [(None, 9), (Some(4), 9), (None, 600), (Some(4), 600)]
}

#[test]
fn mixed_at_0_is_the_plain_model_bit_for_bit() -> Result {
    for (sliding_window, length) in cases() {
        let config = Config { sliding_window, ..tiny::config() };
        let model = tiny::hybrid(&config, 6)?;
        let prompt = tiny::tokens(&config, 6, length);
        let how = GenerationConfig::default().max_tokens(6).top_logprobs(3).prompt_logprobs(true);
        let plain = model.generate(prompt.as_slice(), &how)?;
        for span in [0..3, 1..2, 1..3, 0..1] {
            let mixed = thinking(span, HandOff::Mixed { weight: 0.0 });
            let answer = model.generate(prompt.as_slice(), &how.clone().thinking(mixed))?;
            assert_eq!(answer.ids, plain.ids);
            assert_eq!(answer.top_logprobs, plain.top_logprobs);
            assert_eq!(answer.prompt_logprobs, plain.prompt_logprobs);
        }
    }
    Ok(())
}

#[test]
fn mixed_at_1_is_key_value_and_comes_near_it_before() -> Result {
    for (sliding_window, length) in cases() {
        let config = Config { sliding_window, ..tiny::config() };
        let model = tiny::transformer(&config, 7)?;
        let ids = tiny::tokens(&config, 7, length);
        let layout = Batch::one(length)?.with_context(0, &[0..3, 5..length - 1])?;
        let text = EncodedBatch::new(&model, &ids, layout)?;
        let logits = |hand_off| -> Result<Tensor> {
            let (h, _, mut cache) = think(&model, &thinking(1..3, hand_off), &text, 1)?;
            let next = tiny::logits(&model, &tiny::embed(&model, &[3])?, Pass::Cached(&mut cache))?;
            Ok(Tensor::cat(&[&model.logits(&h)?, &next], 1)?)
        };
        let key_value = logits(HandOff::KeyValue)?;
        assert_identical("at 1", &logits(HandOff::Mixed { weight: 1.0 })?, &key_value)?;
        let nearly = HandOff::Mixed { weight: 1.0 - 1e-7 };
        assert_close("near 1", &logits(nearly)?, &key_value, 1e-4)?;
        let plain = logits(HandOff::Mixed { weight: 0.0 })?;
        assert_close("near 0", &logits(HandOff::Mixed { weight: 1e-7 })?, &plain, 1e-4)?;
        let apart = (&plain - &key_value)?.abs()?.max_all()?.to_scalar::<f32>()?;
        assert!(apart > 0.1, "plain and thought agree");
    }
    Ok(())
}

/// No logit of a plain token depends on a later token, whatever the hand-off.
#[test]
fn nothing_leaks_into_a_plain_segment() -> Result {
    let segments = [0..3, 5..8];
    let plain = [3, 4, 8, 9];
    for window in [None, Some(3)] {
        let config = Config { sliding_window: window, ..tiny::config() };
        let model = tiny::transformer(&config, 8)?;
        let ids = tiny::tokens(&config, 8, 10);
        for (hand_off, span) in HAND_OFFS.iter().flat_map(|h| [(*h, 0..3), (*h, 1..2)]) {
            let thinking = thinking(span.clone(), hand_off);
            let logits = |ids: &[u32]| -> Result<Vec<Vec<f32>>> {
                let layout = Batch::one(10)?.with_context(0, &segments)?;
                let text = EncodedBatch::new(&model, ids, layout)?;
                let (h, _, _) = think(&model, &thinking, &text, 0)?;
                Ok(model.logits(&h)?.squeeze(0)?.to_vec2()?)
            };
            let before = logits(&ids)?;
            for changed in 0..10 {
                let mut ids = ids.clone();
                ids[changed] = (ids[changed] + 1) % config.vocab_size as u32;
                let after = logits(&ids)?;
                for &at in plain.iter().filter(|&&at| at < changed) {
                    assert_eq!(
                        before[at], after[at],
                        "{hand_off:?} {span:?}: {changed} moves {at}"
                    );
                }
                // But inside a context segment it is seen from before.
                let Some(run) = segments.iter().find(|run| run.contains(&changed)) else {
                    continue;
                };
                for at in run.start..changed {
                    assert_ne!(before[at], after[at], "{hand_off:?} {span:?}: {changed}, {at}");
                }
            }
        }
    }
    Ok(())
}

#[test]
fn a_batch_is_its_rows_one_by_one() -> Result {
    let config = tiny::config();
    let model = tiny::transformer(&config, 9)?;
    let lengths = [7usize, 4, 6];
    let contexts = [vec![0..3, 4..6], vec![1..2, 2..3], vec![0..1, 1..5]];
    let mut layout = Batch::ragged(&lengths)?;
    for (row, context) in contexts.iter().enumerate() {
        layout = layout.with_context(row, context)?;
    }
    let all: Vec<Vec<u32>> = lengths
        .iter()
        .zip(9..)
        .map(|(&length, seed)| tiny::tokens(&config, seed, length))
        .collect();
    let padded: Vec<u32> =
        all.iter().flat_map(|ids| [vec![0; 7 - ids.len()], ids.clone()].concat()).collect();
    for hand_off in HAND_OFFS {
        let thinking = thinking(1..3, hand_off);
        let text = EncodedBatch::new(&model, &padded, layout.clone())?;
        let (batch, _, mut cache) = think(&model, &thinking, &text, 1)?;
        let next = Tensor::new(&[[1u32], [2], [3]], model.device())?;
        let next = tiny::logits(&model, &model.embed(&next)?, Pass::Cached(&mut cache))?;
        for (row, ids) in all.iter().enumerate() {
            let one = Batch::one(ids.len())?.with_context(0, &contexts[row])?;
            let text = EncodedBatch::new(&model, ids, one)?;
            let (h, _, mut cache) = think(&model, &thinking, &text, 1)?;
            let of_batch = batch.narrow(0, row, 1)?.narrow(1, 7 - ids.len(), ids.len())?;
            assert_close(&format!("{hand_off:?} row {row}"), &of_batch, &h, 1e-5)?;
            let token = tiny::embed(&model, &[row as u32 + 1])?;
            let alone = tiny::logits(&model, &token, Pass::Cached(&mut cache))?;
            assert_close("next", &next.narrow(0, row, 1)?, &alone, 1e-5)?;
        }
    }
    Ok(())
}

/// Without a cache the same stream comes out; seen causally, thoughts are handed over causally.
#[test]
fn handing_over_needs_no_cache_and_may_be_causal() -> Result {
    let model = tiny::transformer(&tiny::config(), 10)?;
    let layout = Batch::one(8)?.with_context(0, &[0..2, 2..5])?;
    let text = tiny::text(&model, &layout, 10)?;
    for hand_off in HAND_OFFS {
        let thinking = thinking(0..2, hand_off);
        let (h, thoughts, _) = think(&model, &thinking, &text, 0)?;
        let uncached = thinking.on(&model)?.hand_off(&text, &thoughts, Pass::Causal(&layout))?;
        assert_close(&format!("{hand_off:?}"), &uncached, &h, 1e-5)?;
    }
    let (plain, z) = (text.embeddings(), tiny::noise(10, &[1, 8, 16], 1.0)?);
    let what = HandOver { plain, z: &z, weight: 1.0, sight: Sight::Causal };
    let h = model.hand_over(&what, 0..3, &layout, None)?;
    assert_identical("causal", &h, &model.forward(&z, 0..3, Pass::Causal(&layout))?)
}

// ---- thinking again ----

/// Answers in pieces of `every` tokens, each from scratch over all that came before.
fn from_scratch(
    model: &hybrid_attention::HybridModel,
    prompt: impl Fn(&[u32]) -> Prompt,
    how: &GenerationConfig,
    every: usize,
    count: usize,
) -> Result<(Vec<u32>, Vec<f32>)> {
    let (mut ids, mut logprobs) = (Vec::new(), Vec::new());
    while ids.len() < count {
        let wanted = every.min(count - ids.len());
        let answer = model.generate(prompt(&ids), &how.clone().max_tokens(wanted))?;
        ids.extend(answer.ids);
        logprobs.extend(answer.logprobs);
    }
    Ok((ids, logprobs))
}

#[test]
fn thinking_again_is_thinking_from_scratch() -> Result {
    for (sliding_window, length) in [(None, 6), (Some(4), 6), (Some(4), 530)] {
        let config = Config { sliding_window, ..tiny::config() };
        let model = tiny::hybrid(&config, 11)?;
        let ids = tiny::tokens(&config, 11, length);
        for (hand_off, span) in HAND_OFFS.iter().flat_map(|h| [(*h, 0..3), (*h, 1..2), (*h, 1..3)])
        {
            let thinking = thinking(span.clone(), hand_off);
            for every in [1, 3, 20] {
                let name = format!("{hand_off:?} {span:?}, every {every}, {length} tokens");
                let how = GenerationConfig::default().thinking(thinking.clone());
                let again =
                    how.clone().thinking(thinking.clone().rethink_every(every)).max_tokens(8);

                // One piece: the answer becomes more of it.
                let answer = model.generate(ids.as_slice(), &again)?;
                let whole = |answer: &[u32]| Prompt::from([&ids, answer].concat());
                let (expected, logprobs) = from_scratch(&model, whole, &how, every, 8)?;
                assert_eq!(answer.ids, expected, "{name}");
                let tensor = |values: &[f32]| Tensor::new(values, &candle_core::Device::Cpu);
                assert_close(&name, &tensor(&answer.logprobs)?, &tensor(&logprobs)?, 1e-4)?;
                assert_eq!(answer.traces.len(), 1 + 7 / every, "{name}");

                // Parts that end plainly: the answer is a part of its own.
                let parts = || {
                    let (first, rest) = ids.split_at(2);
                    Prompt::default().context_ids(first).plain_ids(rest)
                };
                let answer = model.generate(parts(), &again)?;
                let whole = |answer: &[u32]| match answer {
                    [] => parts(),
                    answer => parts().context_ids(answer),
                };
                let (expected, _) = from_scratch(&model, whole, &how, every, 8)?;
                assert_eq!(answer.ids, expected, "{name}, in parts");
            }
        }
    }
    Ok(())
}

#[test]
fn never_thinking_again_is_the_default() -> Result {
    let model = tiny::hybrid(&tiny::config(), 12)?;
    let ids = tiny::tokens(model.config(), 12, 9);
    let how = |every| {
        let thinking = thinking(1..3, HandOff::Refined).rethink_every(every);
        GenerationConfig::default().thinking(thinking).max_tokens(6)
    };
    let once = model.generate(ids.as_slice(), &how(0))?;
    assert_eq!(model.generate(ids.as_slice(), &how(1_000_000_000))?.ids, once.ids);
    let again = model.generate(ids.as_slice(), &how(2))?;
    assert_ne!(again.logprobs, once.logprobs);
    assert_eq!((once.traces.len(), again.traces.len()), (1, 3));
    let tokens: Vec<usize> = again.traces.iter().map(|trace| trace.tokens).collect();
    assert_eq!(tokens, [9, 11, 13]);
    assert!(again.seconds.think > 0.0);
    Ok(())
}
