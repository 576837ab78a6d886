//! Caches that keep keys and values narrower than they are computed: what is read is what was
//! rounded, however a text comes in, and nothing else changes.

mod common;

use std::collections::HashMap;
use std::ops::Range;

use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Tensor, Var};
use hybrid_attention::model::{Batch, KvCache, KvPool, Pass, Transformer};
use hybrid_attention::refine::Interpolate;
use hybrid_attention::thought::{EncodedBatch, HandOff, ThoughtModel, Thoughts, Trace};
use hybrid_attention::{Config, Error, GenerationConfig, HybridModel, Thinking};

use common::reference::{ByDefinition, Reference, Stream};
use common::tiny::{self, rows_of, through};
use common::{FIXTURES, Result, assert_close, assert_identical, fixture_config, fixture_weights};

/// Each with the most that rounding to it moves a number, as a share of it.
const NARROW: [(DType, f32); 2] = [(DType::BF16, 1.0 / 256.0), (DType::F16, 1.0 / 2048.0)];

/// What sums in another order may do where keys and values are rounded after them: one that lies midway
/// between two numbers of the type goes to the other. Few do, so this is well below what rounding all
/// of them does, which is half a `unit` to one in these models.
fn flips(unit: f32) -> f32 {
    unit / 8.0
}

/// A cache of a pool of its own.
fn cache_as(model: &Transformer, dtype: DType, capacity: usize) -> Result<KvCache> {
    Ok(model.new_pool(dtype, usize::MAX)?.new_cache(capacity)?)
}

/// Hands `z` over in all layers, `weight` of it; what leaves the last layer.
fn hand_over(
    model: &ThoughtModel,
    (first, z): (&Tensor, &Tensor),
    weight: f64,
    batch: &Batch,
    cache: Option<&mut KvCache>,
) -> Result<Tensor> {
    let text = tiny::text(model.decoder(), batch, 1)?;
    let thoughts =
        Thoughts { z: z.clone(), first: first.clone(), trace: Trace::default(), origin: None };
    let mind = Thinking::new(1).hand_off(HandOff::Mixed { weight }).on(model)?;
    let entry = match cache {
        Some(cache) => mind.enter(&text, &thoughts, Some(&mut [cache]))?,
        None => mind.enter(&text, &thoughts, None)?,
    };
    assert!(entry.layers.is_empty());
    Ok(entry.xs)
}

fn tensor(values: &[f64]) -> Result<Tensor> {
    let values: Vec<f32> = values.iter().map(|&value| value as f32).collect();
    Ok(Tensor::new(values, &Device::Cpu)?)
}

/// Whether two tensors differ by more than this share of the largest value.
fn apart(a: &Tensor, b: &Tensor, share: f32) -> Result<bool> {
    let largest = |xs: &Tensor| xs.abs()?.max_all()?.to_scalar::<f32>();
    Ok(largest(&(a - b)?)? > share * largest(b)?)
}

// ---- what it is ----

#[test]
fn a_cache_says_what_it_keeps_and_in_how_many_bytes() -> Result {
    // The last 348 of 700 tokens are a chunk, and see positions from 345 on: of 8 blocks 3 are gone.
    for (sliding_window, of_three, of_all) in [(None, 1, 8), (Some(8), 1, 5)] {
        let config = Config { sliding_window, ..tiny::config() }; // 3 layers, 2 heads of 6
        let model = tiny::transformer(&config, 1)?;
        let block = 3 * 2 * 2 * KvPool::BLOCK * 6; // layers, keys and values, heads, positions, channels
        assert_eq!(model.new_cache(700)?.dtype(), DType::F32);
        for (dtype, bytes) in [(DType::F32, 4), (DType::BF16, 2), (DType::F16, 2)] {
            let mut cache = cache_as(&model, dtype, 700)?;
            assert_eq!((cache.dtype(), cache.bytes(), cache.capacity()), (dtype, 0, 700));
            let xs = model.embed_ids(&tiny::tokens(&config, 1, 700))?;
            for (tokens, blocks) in [(3, of_three), (697, of_all)] {
                let xs = xs.narrow(0, cache.len(), tokens)?;
                model.forward(&xs, 0..3, Pass::Cached(&mut cache))?;
                assert_eq!(cache.bytes(), bytes * blocks * block, "{dtype:?}");
                assert_eq!(cache.pool().used_bytes(), cache.bytes());
            }
            assert_eq!((cache.len(), cache.dtype()), (700, dtype));
            cache.reset();
            assert_eq!((cache.bytes(), cache.pool().used_bytes()), (0, 0));
        }
    }

    let model = tiny::hybrid(&tiny::config(), 1)?;
    let cache = |model: &HybridModel| -> Result<(DType, usize)> {
        let mut conversation = model.conversation(40)?;
        assert_eq!(conversation.cache().bytes(), 0);
        let how = GenerationConfig::default().max_tokens(2);
        model.stream_in(&mut conversation, [1, 2, 3], &how)?.collect_answer()?;
        Ok((conversation.cache().dtype(), conversation.cache().bytes()))
    };
    let (dtype, bytes) = cache(&model)?;
    assert_eq!((dtype, bytes), (DType::F32, 4 * 3 * 2 * 2 * KvPool::BLOCK * 6));
    let model = model.with_cache_dtype(DType::F16)?;
    assert_eq!(cache(&model)?, (DType::F16, bytes / 2));
    let model = model.with_cache_dtype(DType::F32)?;
    assert_eq!(cache(&model)?, (DType::F32, bytes));
    Ok(())
}

#[test]
fn other_types_are_refused() -> Result {
    for (dtype, name) in [
        (DType::U8, "U8"),
        (DType::U32, "U32"),
        (DType::I64, "I64"),
        (DType::F64, "F64"),
        (DType::F8E4M3, "F8E4M3"),
    ] {
        let model = tiny::hybrid(&tiny::config(), 1)?;
        let by_hand = model.transformer().new_pool(dtype, usize::MAX).map(|_| ());
        for refused in [by_hand, model.with_cache_dtype(dtype).map(|_| ())] {
            let Err(Error::Parameter { name: parameter, expected, got }) = refused else {
                return Err(format!("{dtype:?}: {refused:?}").into());
            };
            assert_eq!(parameter, "cache dtype");
            assert_eq!((expected.as_str(), got.as_str()), ("F32, BF16 or F16", name));
        }
    }
    let model = tiny::hybrid(&tiny::config(), 1)?.with_cache_dtype(DType::BF16)?;
    for refused in [
        model.transformer().new_pool(DType::BF16, usize::MAX)?.new_cache(0).map(|_| ()),
        model.conversation(0).map(|_| ()),
    ] {
        assert!(matches!(refused, Err(Error::Parameter { name: "capacity", .. })), "{refused:?}");
    }
    let refused = model.transformer().new_pool(DType::F16, usize::MAX)?.new_cache(2049);
    assert!(matches!(refused, Err(Error::ContextFull { capacity: 2048, requested: 2049, .. })));
    Ok(())
}

/// `f16` ends at 65504: what is larger is an error at the end, not a token.
#[test]
fn values_beyond_the_type_are_an_error() -> Result {
    let mut weights = tiny::weights(&tiny::config(), 1)?;
    let name = "model.layers.1.self_attn.v_proj.weight";
    weights.insert(name.into(), (&weights[name] * 1e6)?);
    let model = HybridModel::new(Transformer::new(&tiny::config(), &mut weights)?, None)?;
    let config = GenerationConfig::default().max_tokens(2);
    model.generate([1, 2, 3], &config)?;
    let model = model.with_cache_dtype(DType::BF16)?; // reaches as far as f32
    model.generate([1, 2, 3], &config)?;
    let refused = model.with_cache_dtype(DType::F16)?.generate([1, 2, 3], &config).map(|_| ());
    assert!(matches!(refused, Err(Error::NotFinite { what: "logits", .. })), "{refused:?}");
    Ok(())
}

// ---- one result, many ways ----

/// A prompt at once and an answer token by token, against all tokens at once in plain loops that round
/// keys and values. That is another result than without rounding. Scores of the fixtures are several
/// times as large as those of other models here, and so is what a flip does to them.
#[test]
fn decoding_is_the_full_recomputation_with_rounded_keys_and_values() -> Result {
    let windowed = Config { sliding_window: Some(4), ..tiny::config() };
    let mut models = Vec::new();
    for config in [tiny::config(), windowed] {
        models.push((config.clone(), tiny::weights(&config, 21)?, 1.0));
    }
    // A score that is off may send a token of a mixture elsewhere: what is said of sizes holds of the others.
    for name in FIXTURES.into_iter().filter(|name| !name.starts_with("mixtral")) {
        models.push((fixture_config(name)?, fixture_weights(name)?.into_iter().collect(), 4.0));
    }
    for ((config, weights, larger), (dtype, unit)) in
        models.iter().flat_map(|model| NARROW.map(|dtype| (model, dtype)))
    {
        let (model, window) =
            (Transformer::new(config, &mut weights.clone())?, config.sliding_window);
        let reference = Reference::new(config, weights)?.keeping(dtype);
        let ids = tiny::tokens(config, 33, 14);
        let xs = model.embed_ids(&ids)?;
        let mut cache = cache_as(&model, dtype, 14)?;
        let prompt = through(&model, &mut cache, &xs.narrow(0, 0, 8)?, 8)?;
        let answer = through(&model, &mut cache, &xs.narrow(0, 8, 6)?, 1)?;
        let got = model.logits(&Tensor::cat(&[prompt, answer], 0)?)?;

        let sees = |i: usize, j: usize| j <= i && window.is_none_or(|w| i < j + w);
        let layer =
            |xs: Stream, layer| reference.layer(&format!("model.layers.{layer}"), &xs, sees);
        let expected = (0..config.num_hidden_layers).fold(reference.embed(&ids), layer);
        let expected: Vec<f64> = expected.iter().flat_map(|x| reference.logits(x)).collect();
        let expected = tensor(&expected)?.reshape((14, ()))?;
        let name = format!("{dtype:?} {window:?}");
        let flips = larger * flips(unit);
        assert_close(&name, &got, &expected, flips)?;

        let wide = tiny::logits(&model, &xs, Pass::Causal(&Batch::one(14)?))?;
        assert!(apart(&got, &wide, 2.0 * flips)?, "{name}: nothing was rounded");
    }
    Ok(())
}

/// More tokens than the blocks take at a time: at once, in two pieces that are cut elsewhere, and the
/// last of them one by one; beside another sequence, and alone.
#[test]
fn chunks_of_a_prompt_are_the_whole() -> Result {
    let model = tiny::transformer(&tiny::config(), 22)?;
    let batch = Batch::ragged(&[1100, 700])?;
    let xs = tiny::text(&model, &batch, 22)?.embeddings().clone();
    for (dtype, unit) in NARROW {
        let run = |steps: &[Range<usize>]| -> Result<Tensor> {
            let mut caches = [cache_as(&model, dtype, 1100)?, cache_as(&model, dtype, 700)?];
            tiny::side_by_side(&model, &mut caches, (&xs, &batch), steps)
        };
        let whole = run(&[0..1100])?;
        for (name, steps) in [
            ("two pieces", vec![0..300, 300..1100]),
            ("small pieces", tiny::steps(0..1100, 70)),
            ("one by one", [vec![0..1060], tiny::steps(1060..1100, 1)].concat()),
        ] {
            let ys = run(&steps)?;
            for sequence in 0..2 {
                let of = |xs: &Tensor| rows_of(xs, &batch, sequence);
                let name = format!("{dtype:?}, {name}, sequence {sequence}");
                assert_close(&name, &of(&ys)?, &of(&whole)?, flips(unit))?;
            }
        }
        for sequence in 0..2 {
            let of = |xs: &Tensor| rows_of(xs, &batch, sequence);
            let mut cache = cache_as(&model, dtype, 1100)?;
            let alone = through(&model, &mut cache, &of(&xs)?, 1100)?;
            assert_close("alone", &alone, &of(&whole)?, flips(unit))?;
        }
        let wide = model.forward(&xs, 0..3, Pass::Causal(&batch))?;
        let of = |xs: &Tensor| rows_of(xs, &batch, 0);
        assert_close("wide", &of(&whole)?, &of(&wide)?, 2.0 * unit)?;
    }
    Ok(())
}

/// A window that lets go of the first tokens, at other places in other chunks.
#[test]
fn a_rolling_cache_is_the_uncached_window() -> Result {
    let config = Config { sliding_window: Some(30), ..tiny::config() };
    let model = tiny::transformer(&config, 23)?;
    let batch = Batch::one(1200)?;
    let xs = tiny::text(&model, &batch, 23)?.embeddings().clone();
    let wide = model.forward(&xs, 0..3, Pass::Causal(&batch))?;
    for (dtype, unit) in NARROW {
        let run = |chunk: usize| -> Result<Tensor> {
            let mut cache = cache_as(&model, dtype, 1200)?;
            let ys = through(&model, &mut cache, &xs, chunk)?;
            assert_eq!((cache.len(), cache.dtype()), (1200, dtype));
            // What the last chunk saw is there: it began at most 512 tokens before the end.
            assert!(cache.oldest() > 1200 - 512 - 30 - KvPool::BLOCK, "{}", cache.oldest());
            Ok(ys)
        };
        let ys = run(1200)?;
        assert_close(&format!("{dtype:?}"), &ys, &wide, 2.0 * unit)?;
        for chunk in [333, 50] {
            assert_close(&format!("{dtype:?}, {chunk}"), &run(chunk)?, &ys, flips(unit))?;
        }
    }
    Ok(())
}

/// What a truncated cache goes on with is what a fresh one does.
#[test]
fn a_truncated_cache_is_a_fresh_one() -> Result {
    let model = tiny::transformer(&tiny::config(), 24)?;
    let (old, new) = (tiny::tokens(model.config(), 24, 20), tiny::tokens(model.config(), 25, 5));
    for (dtype, unit) in NARROW {
        let mut cache = cache_as(&model, dtype, 30)?;
        through(&model, &mut cache, &model.embed_ids(&old)?, 20)?;
        cache.truncate(11)?;
        let ys = through(&model, &mut cache, &model.embed_ids(&new)?, 5)?;
        let mut fresh = cache_as(&model, dtype, 30)?;
        let all = model.embed_ids(&[&old[..11], new.as_slice()].concat())?;
        let expected = through(&model, &mut fresh, &all, 16)?;
        assert_close("truncated", &ys, &expected.narrow(0, 11, 5)?, flips(unit))?;
        cache.reset();
        let ys = through(&model, &mut cache, &all, 16)?;
        assert_identical("reset", &ys, &expected)?;
    }
    Ok(())
}

// ---- handing over ----

/// The keys and values of thoughts, rounded as they are handed over, in plain loops.
#[test]
fn key_value_is_its_definition_with_rounded_keys_and_values() -> Result {
    const SEGMENTS: [Range<usize>; 2] = [1..4, 6..9];
    for ((dtype, unit), sliding_window) in
        NARROW.iter().flat_map(|it| [(*it, None), (*it, Some(4))])
    {
        let config = Config { sliding_window, ..tiny::config() };
        let model = ThoughtModel::from(tiny::transformer(&config, 31)?);
        let decoder = model.decoder();
        let reference = Reference::new(&config, &tiny::weights(&config, 31)?)?.keeping(dtype);
        let (ids, answer) = (tiny::tokens(&config, 31, 10), tiny::tokens(&config, 32, 3));
        let text = EncodedBatch::new(decoder, &ids, Batch::one(10)?.with_context(0, &SEGMENTS)?)?;
        for span in [0..3, 1..2] {
            let thinking = Thinking::new(2).span(span.clone()).refine(Interpolate::new(0.4));
            let thinking = thinking.hand_off(HandOff::KeyValue);
            let mind = thinking.on(&model)?;
            let mut cache = cache_as(decoder, dtype, 13)?;
            let z = mind.encode(&text, Pass::Cached(&mut cache))?;
            let thoughts = mind.think(&text, z, |_, _| ())?;
            let h = mind.hand_off(&text, &thoughts, Pass::Cached(&mut cache))?;
            let mut got = vec![decoder.logits(&h.narrow(0, 9, 1)?)?];
            for &id in &answer {
                let xs = decoder.embed_ids(&[id])?;
                got.push(tiny::logits(decoder, &xs, Pass::Cached(&mut cache))?);
            }

            let definition =
                ByDefinition { decoder: &reference, thinker: &reference, segments: &SEGMENTS };
            let rows = |xs: &Tensor| -> Result<Stream> { Ok(xs.to_dtype(DType::F64)?.to_vec2()?) };
            let streams = (&rows(&thoughts.z)?, &rows(&thoughts.first)?);
            let expected = definition.logits(3, span.clone(), 1.0, (&ids, &answer), streams);
            for (at, (got, expected)) in got.iter().zip(expected).enumerate() {
                let name = format!("{dtype:?} {sliding_window:?} {span:?}, logits {at}");
                assert_close(&name, &got.flatten_all()?, &tensor(&expected)?, flips(unit))?;
            }
        }
    }
    Ok(())
}

/// A plain token reads what was handed over as it is remembered: it makes no difference whether it
/// comes with the hand-over or after it.
#[test]
fn plain_tokens_read_what_is_remembered() -> Result {
    for ((dtype, unit), sliding_window) in
        NARROW.iter().flat_map(|it| [(*it, None), (*it, Some(4))])
    {
        let config = Config { sliding_window, ..tiny::config() };
        let model = ThoughtModel::from(tiny::transformer(&config, 33)?);
        let (plain, z) = (tiny::noise(33, &[9, 16], 1.0)?, tiny::noise(34, &[9, 16], 1.0)?);
        // Plain tokens enter with what they were, as they do after thinking.
        let z = Tensor::cat(&[&z.narrow(0, 0, 7)?, &plain.narrow(0, 7, 2)?], 0)?;
        let batch = |length| Batch::one(length)?.with_context(0, &[0..3, 3..7]);
        let handed = |length: usize, weight: f64| -> Result<(Tensor, KvCache)> {
            let streams = (&plain.narrow(0, 0, length)?, &z.narrow(0, 0, length)?);
            let mut cache = cache_as(model.decoder(), dtype, 9)?;
            let h = hand_over(&model, streams, weight, &batch(length)?, Some(&mut cache))?;
            assert_eq!((cache.len(), cache.dtype()), (length, dtype));
            Ok((h, cache))
        };
        for weight in [0.0, 0.3, 1.0] {
            let (h, _) = handed(9, weight)?;
            let (_, mut cache) = handed(7, weight)?;
            let after = through(model.decoder(), &mut cache, &plain.narrow(0, 7, 2)?, 1)?;
            let name = format!("{dtype:?} {sliding_window:?} {weight}");
            assert_close(&name, &after, &h.narrow(0, 7, 2)?, flips(unit))?;

            let wide = hand_over(&model, (&plain, &z), weight, &batch(9)?, None)?;
            assert!(apart(&h, &wide, flips(unit))?, "{name}: nothing was rounded");
        }
    }
    Ok(())
}

const HAND_OFFS: [HandOff; 3] =
    [HandOff::Refined, HandOff::KeyValue, HandOff::Mixed { weight: 0.4 }];

fn thinking(hand_off: HandOff) -> Thinking {
    Thinking::new(2).span(1..3).refine(Interpolate::new(0.4)).hand_off(hand_off)
}

/// An answer is what the same steps give by hand over a cache of the same type, thinking or not, also
/// in a conversation; and thinking again is thinking from scratch.
#[test]
fn answers_read_narrow_caches() -> Result {
    let config = Config { sliding_window: Some(6), ..tiny::config() };
    let ids = tiny::tokens(&config, 41, 9);
    let wide = tiny::hybrid(&config, 41)?;
    for (dtype, unit) in NARROW {
        let model = tiny::hybrid(&config, 41)?.with_cache_dtype(dtype)?;
        let transformer = model.transformer();
        let ways = HAND_OFFS.iter().map(|it| thinking(*it)).chain([Thinking::none()]);
        for thinking in ways {
            let how = GenerationConfig::default().max_tokens(8).thinking(thinking.clone());
            let answer = model.generate(ids.as_slice(), &how)?;

            let text = EncodedBatch::new(transformer, &ids, tiny::prompt(9)?)?;
            let mind = thinking.on(model.thought_model())?;
            let mut cache = cache_as(transformer, dtype, 17)?;
            let z = mind.encode(&text, Pass::Cached(&mut cache))?;
            let thoughts = mind.think(&text, z, |_, _| ())?;
            let h = mind.hand_off(&text, &thoughts, Pass::Cached(&mut cache))?;
            let mut logits = transformer.logits(&h.narrow(0, 8, 1)?)?.flatten_all()?;
            for (at, (id, logprob)) in answer.ids.iter().zip(&answer.logprobs).enumerate() {
                let logprobs = candle_nn::ops::log_softmax(&logits, 0)?;
                let expected = logprobs.get(*id as usize)?.to_scalar::<f32>()?;
                assert!((logprob - expected).abs() < 1e-4, "{dtype:?} {thinking:?}, token {at}");
                let xs = transformer.embed_ids(&[*id])?;
                logits = tiny::logits(transformer, &xs, Pass::Cached(&mut cache))?.flatten_all()?;
            }

            let mut conversation = model.conversation(40)?;
            let held = model.stream_in(&mut conversation, ids.as_slice(), &how)?;
            assert_eq!(held.collect_answer()?.logprobs, answer.logprobs);

            // It is another answer than over a wide cache, and near it while they say the same.
            let expected = wide.generate(ids.as_slice(), &how)?;
            assert_ne!(answer.logprobs, expected.logprobs, "{dtype:?} {thinking:?}");
            assert!((answer.logprobs[0] - expected.logprobs[0]).abs() < 4.0 * unit);

            if thinking.is_none() {
                continue;
            }
            let again = thinking.clone().rethink_every(3);
            let answer = model.generate(ids.as_slice(), &how.clone().thinking(again))?;
            let mut scratch = ids.clone();
            for (at, piece) in answer.ids.chunks(3).enumerate() {
                let from_scratch = model.generate(scratch.as_slice(), &how)?;
                assert_eq!(from_scratch.ids.get(..piece.len()), Some(piece), "{dtype:?}, {at}");
                scratch.extend(piece);
            }
        }
    }
    Ok(())
}

/// What is in the conversation's cache is not read again, narrow or not.
#[test]
fn a_narrow_conversation_goes_on() -> Result {
    for (dtype, _) in NARROW {
        let model = HybridModel::tiny(&Device::Cpu)?.with_cache_dtype(dtype)?;
        let how = GenerationConfig::default().max_tokens(4).thinking(Thinking::none());
        let mut conversation = model.conversation(64)?;
        let first = model.stream_in(&mut conversation, [1, 2, 3, 4], &how)?.collect_answer()?;
        let longer = [&[1, 2, 3, 4], first.ids.as_slice(), &[5, 6]].concat();
        let mut stream = model.stream_in(&mut conversation, longer.as_slice(), &how)?;
        stream.read_prompt()?;
        assert_eq!(stream.kept(), 7);
        let (on, fresh) = (stream.collect_answer()?, model.generate(longer.as_slice(), &how)?);
        assert_eq!(on.ids, fresh.ids, "{dtype:?}");
        let tensor = |values: &[f32]| Tensor::new(values, &Device::Cpu);
        assert_close("logprobs", &tensor(&on.logprobs)?, &tensor(&fresh.logprobs)?, 1e-3)?;
    }
    Ok(())
}

// ---- gradients ----

/// The gradients of a narrow cache are those of a wide one, up to what rounding moves the numbers that
/// they are computed from: of every weight, over several chunks, with what was there before.
#[test]
fn gradients_are_not_cut_where_keys_and_values_are_rounded() -> Result {
    for ((dtype, unit), window) in NARROW.iter().flat_map(|it| [(*it, None), (*it, Some(40))]) {
        let config = Config { sliding_window: window, num_hidden_layers: 2, ..tiny::config() };
        let plain = tiny::weights(&config, 51)?;
        let mut vars = Vec::new();
        for (name, weight) in &plain {
            vars.push((name, Var::from_tensor(weight)?));
        }
        let mut tracked: HashMap<_, _> =
            vars.iter().map(|(name, var)| ((*name).clone(), var.as_tensor().clone())).collect();
        let model = Transformer::new(&config, &mut tracked)?;
        let untracked = Transformer::new(&config, &mut plain.clone())?;
        let ids = tiny::tokens(&config, 51, 620);
        let run = |model: &Transformer, dtype: DType| -> Result<Tensor> {
            let xs = model.embed_ids(&ids)?;
            let mut cache = cache_as(model, dtype, 620)?;
            model.forward(&xs.narrow(0, 0, 20)?, 0..2, Pass::Cached(&mut cache))?;
            let h = model.forward(&xs.narrow(0, 20, 600)?, 0..2, Pass::Cached(&mut cache))?;
            Ok(model.logits(&h.narrow(0, 530, 70)?)?) // in the last chunk
        };
        let got = run(&model, dtype)?;
        let name = format!("{dtype:?} {window:?}");
        assert_close(&name, &got.detach(), &run(&untracked, dtype)?, flips(unit))?;

        let gradients = |logits: &Tensor, scale: f64| -> Result<GradStore> {
            Ok((logits.sqr()?.mean_all()? * scale)?.backward()?)
        };
        let (of_narrow, of_wide) =
            (gradients(&got, 1.0)?, gradients(&run(&model, DType::F32)?, 1.0)?);
        // So small that f16 would have nothing left of them.
        let small = gradients(&got, 1e-9)?;
        for (weight, var) in &vars {
            let of = |store: &GradStore| -> Result<Tensor> {
                Ok(store
                    .get(var)
                    .ok_or_else(|| format!("{name}: no gradient of {weight}"))?
                    .clone())
            };
            assert_close(
                &format!("{name} {weight}"),
                &of(&of_narrow)?,
                &of(&of_wide)?,
                2.0 * unit,
            )?;
            assert_close(weight, &(of(&small)? * 1e9)?, &of(&of_narrow)?, 1e-5)?;
        }
    }
    Ok(())
}

/// Through a hand-over as well, and with the same numbers as without a gradient.
#[test]
fn gradients_come_through_a_hand_over_to_a_narrow_cache() -> Result {
    let model = ThoughtModel::from(tiny::transformer(&tiny::config(), 52)?);
    let batch = Batch::one(9)?.with_context(0, &[0..3, 3..7])?;
    let (plain, z) = (tiny::noise(52, &[9, 16], 1.0)?, tiny::noise(53, &[9, 16], 1.0)?);
    for ((dtype, unit), weight) in NARROW.iter().flat_map(|it| [(*it, 0.3), (*it, 1.0)]) {
        let run = |z: &Tensor, dtype: DType| -> Result<Tensor> {
            let mut cache = cache_as(model.decoder(), dtype, 9)?;
            hand_over(&model, (&plain, z), weight, &batch, Some(&mut cache))
        };
        let var = Var::from_tensor(&z)?;
        let gradient = |h: &Tensor| -> Result<Tensor> {
            let gradients = h.narrow(0, 8, 1)?.sqr()?.sum_all()?.backward()?;
            Ok(gradients.get(&var).ok_or("no gradient")?.clone())
        };
        let got = run(var.as_tensor(), dtype)?;
        let name = format!("{dtype:?} {weight}");
        assert_close(&name, &got.detach(), &run(&z, dtype)?, flips(unit))?;
        let wide = run(var.as_tensor(), DType::F32)?;
        let (got, expected) = (gradient(&got)?, gradient(&wide)?);
        // It reaches the context by its keys and values alone.
        assert!(expected.narrow(0, 0, 7)?.abs()?.max_all()?.to_scalar::<f32>()? > 1e-3);
        assert_close(&name, &got, &expected, 2.0 * unit)?;
    }
    Ok(())
}
