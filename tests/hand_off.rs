//! How the decoder receives thoughts, against a Mistral in plain loops.

mod common;

use std::ops::Range;

use candle_core::Tensor;
use hybrid_attention::model::{Batch, KvCache, Pass, Sight, Transformer};
use hybrid_attention::refine::Interpolate;
use hybrid_attention::thought::{EncodedBatch, Entry, HandOff, ThoughtModel, Thoughts, Trace};
use hybrid_attention::{Config, Error, GenerationConfig, Prompt, Thinking};
use proptest::prelude::*;

use common::reference::{ByDefinition, Reference, Stream};
use common::tiny::{self, holds};
use common::{Result, assert_close, assert_identical};

const HAND_OFFS: [HandOff; 3] =
    [HandOff::Refined, HandOff::KeyValue, HandOff::Mixed { weight: 0.4 }];

fn thinking(span: Range<usize>, hand_off: HandOff) -> Thinking {
    Thinking::new(2).span(span).refine(Interpolate::new(0.4)).hand_off(hand_off)
}

/// Encodes, thinks and hands off into new caches: what left the last layer, what went in, and a cache for
/// each sequence.
fn think(
    model: &ThoughtModel,
    thinking: &Thinking,
    text: &EncodedBatch,
    room: usize,
) -> Result<(Tensor, Thoughts, Vec<KvCache>)> {
    let mind = thinking.on(model)?;
    let new_cache = |length| model.decoder().new_cache(length + room);
    let lengths = text.batch().lengths().into_iter();
    let mut caches = lengths.map(new_cache).collect::<std::result::Result<Vec<_>, _>>()?;
    let z = mind.encode(text, remembered(text.batch(), &mut caches))?;
    let thoughts = mind.think(text, z, |_, _| ())?;
    let h = mind.hand_off(text, &thoughts, remembered(text.batch(), &mut caches))?;
    Ok((h, thoughts, caches))
}

/// The causal pass of a batch over a cache for each sequence.
fn remembered<'a>(batch: &'a Batch, caches: &'a mut [KvCache]) -> Pass<'a> {
    Pass::Remembered { batch, sight: Sight::Causal, caches: caches.iter_mut().collect() }
}

/// The logits of one more token of each sequence.
fn next(model: &Transformer, caches: &mut [KvCache], ids: &[u32]) -> Result<Tensor> {
    let batch = Batch::dense(ids.len(), 1)?;
    tiny::logits(model, &model.embed_ids(ids)?, remembered(&batch, caches))
}

fn thought_model(config: &Config, seed: u64) -> Result<ThoughtModel> {
    Ok(tiny::transformer(config, seed)?.into())
}

fn rows(xs: &Tensor) -> Result<Stream> {
    Ok(xs.to_dtype(candle_core::DType::F64)?.to_vec2()?)
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
    let model = thought_model(config, seed)?;
    let reference = Reference::new(config, &tiny::weights(config, seed)?)?;
    let (ids, answer) = (tiny::tokens(config, seed, 10), tiny::tokens(config, seed + 1, 3));
    let batch = Batch::one(10)?.with_context(0, &SEGMENTS)?;
    let text = EncodedBatch::new(model.decoder(), &ids, batch)?;
    let (h, thoughts, mut cache) = think(&model, &thinking(span.clone(), hand_off), &text, 3)?;

    let definition = ByDefinition { decoder: &reference, thinker: &reference, segments: &SEGMENTS };
    let streams = (&rows(&thoughts.z)?, &rows(&thoughts.first)?);
    let layers = config.num_hidden_layers;
    let expected = definition.logits(layers, span, weight, (&ids, &answer), streams);

    let mut got = vec![model.decoder().logits(&h.narrow(0, 9, 1)?)?];
    for &id in &answer {
        got.push(next(model.decoder(), &mut cache, &[id])?);
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
        let model = thought_model(&config, 7)?;
        let ids = tiny::tokens(&config, 7, length);
        let batch = Batch::one(length)?.with_context(0, &[0..3, 5..length - 1])?;
        let text = EncodedBatch::new(model.decoder(), &ids, batch)?;
        let logits = |hand_off| -> Result<Tensor> {
            let (h, _, mut cache) = think(&model, &thinking(1..3, hand_off), &text, 1)?;
            let next = next(model.decoder(), &mut cache, &[3])?;
            Ok(Tensor::cat(&[&model.decoder().logits(&h)?, &next], 0)?)
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
        let model = thought_model(&config, 8)?;
        let ids = tiny::tokens(&config, 8, 10);
        for (hand_off, span) in HAND_OFFS.iter().flat_map(|h| [(*h, 0..3), (*h, 1..2)]) {
            let thinking = thinking(span.clone(), hand_off);
            let logits = |ids: &[u32]| -> Result<Vec<Vec<f32>>> {
                let batch = Batch::one(10)?.with_context(0, &segments)?;
                let text = EncodedBatch::new(model.decoder(), ids, batch)?;
                let (h, _, _) = think(&model, &thinking, &text, 0)?;
                Ok(model.decoder().logits(&h)?.to_vec2()?)
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
fn a_batch_is_its_sequences_one_by_one() -> Result {
    for sliding_window in [None, Some(3)] {
        let config = Config { sliding_window, ..tiny::config() };
        let model = thought_model(&config, 9)?;
        let decoder = model.decoder();
        let lengths = [7usize, 4, 6];
        let contexts = [vec![0..3, 4..6], vec![1..2, 2..3], vec![0..1, 1..5]];
        let mut batch = Batch::ragged(&lengths)?;
        for (sequence, context) in contexts.iter().enumerate() {
            batch = batch.with_context(sequence, context)?;
        }
        let all: Vec<Vec<u32>> = lengths
            .iter()
            .zip(9..)
            .map(|(&length, seed)| tiny::tokens(&config, seed, length))
            .collect();
        for hand_off in HAND_OFFS {
            let thinking = thinking(1..3, hand_off);
            let text = EncodedBatch::new(decoder, &all.concat(), batch.clone())?;
            let (together, thoughts, mut caches) = think(&model, &thinking, &text, 1)?;
            let of_batch = next(decoder, &mut caches, &[1, 2, 3])?;
            let mind = thinking.on(&model)?;
            let uncached = mind.hand_off(&text, &thoughts, Pass::Causal(&batch))?;
            for (sequence, ids) in all.iter().enumerate() {
                let one = Batch::one(ids.len())?.with_context(0, &contexts[sequence])?;
                let text = EncodedBatch::new(decoder, ids, one)?;
                let (h, _, mut cache) = think(&model, &thinking, &text, 1)?;
                let rows = batch.rows(sequence);
                let of = |xs: &Tensor| xs.narrow(0, rows.start, rows.len());
                let name = format!("{hand_off:?} sequence {sequence}");
                assert_close(&name, &of(&together)?, &h, 1e-5)?;
                assert_close(&format!("{name}, uncached"), &of(&uncached)?, &h, 1e-5)?;
                let alone = next(decoder, &mut cache, &[sequence as u32 + 1])?;
                assert_close("next", &of_batch.narrow(0, sequence, 1)?, &alone, 1e-5)?;
            }
        }
    }
    Ok(())
}

/// Without a cache the same stream comes out; seen causally, thoughts are handed over causally.
#[test]
fn handing_over_needs_no_cache_and_may_be_causal() -> Result {
    let model = thought_model(&tiny::config(), 10)?;
    let batch = Batch::one(8)?.with_context(0, &[0..2, 2..5])?;
    let text = tiny::text(model.decoder(), &batch, 10)?;
    for hand_off in HAND_OFFS {
        let thinking = thinking(0..2, hand_off);
        let (h, thoughts, _) = think(&model, &thinking, &text, 0)?;
        let uncached = thinking.on(&model)?.hand_off(&text, &thoughts, Pass::Causal(&batch))?;
        assert_close(&format!("{hand_off:?}"), &uncached, &h, 1e-5)?;
    }
    let (first, z) = (text.embeddings().clone(), tiny::noise(10, &[8, 16], 1.0)?);
    let thoughts = Thoughts { z, first, trace: Trace::default(), origin: None };
    let thinking = thinking(0..3, HandOff::Mixed { weight: 1.0 }).sight(Sight::Causal);
    let expected = model.decoder().forward(&thoughts.z, 0..3, Pass::Causal(&batch))?;
    let mind = thinking.on(&model)?;
    let Entry { xs, layers } = mind.enter(&text, &thoughts, None)?;
    assert_eq!(layers, 3..3);
    assert_identical("causal", &xs, &expected)?;
    let mut cache = model.decoder().new_cache(8)?;
    let Entry { xs, .. } = mind.enter(&text, &thoughts, Some(&mut [&mut cache]))?;
    assert_close("causal, into a cache", &xs, &expected, 1e-5)
}

/// A cache that holds something in the layers of the span is refused and stays as it is; one that has no
/// room is empty there afterwards, and full before.
#[test]
fn what_is_handed_over_begins_the_cache() -> Result {
    let model = thought_model(&tiny::config(), 13)?;
    let text = tiny::text(model.decoder(), &tiny::prompt(6)?, 13)?;
    for hand_off in [HandOff::KeyValue, HandOff::Mixed { weight: 0.4 }] {
        let thinking = thinking(1..3, hand_off);
        let mind = thinking.on(&model)?;
        let (_, thoughts, mut caches) = think(&model, &thinking, &text, 6)?;
        let refused = mind.hand_off(&text, &thoughts, remembered(text.batch(), &mut caches));
        assert!(matches!(refused, Err(Error::Parameter { name: "cache", .. })), "{refused:?}");
        assert_eq!(caches[0].len(), 6);

        // A short one, which has taken up four tokens before the span.
        let mut cache = model.decoder().new_cache(5)?;
        let some = text.embeddings().narrow(0, 0, 4)?;
        model.decoder().forward(&some, 0..1, Pass::Cached(&mut cache))?;
        let full = mind.enter(&text, &thoughts, Some(&mut [&mut cache]));
        assert!(matches!(full, Err(Error::ContextFull { capacity: 5, .. })), "{full:?}");
        let bytes = cache.bytes();
        assert!(bytes > 0);
        cache.truncate_layers(1..3, 0)?;
        assert_eq!(cache.bytes(), bytes, "{hand_off:?}");
        cache.truncate_layers(0..1, 0)?;
        assert_eq!(cache.bytes(), 0);
    }
    Ok(())
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
