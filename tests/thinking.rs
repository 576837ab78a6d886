//! The thought loop against the same steps done by hand.

mod common;

use std::sync::{Arc, Mutex};

use candle_core::{DType, Device, Tensor};
use hybrid_attention::model::{Batch, Pass, Sight};
use hybrid_attention::refine::{Interpolate, OutputNudge, Refine, Step, seq};
use hybrid_attention::thought::{EncodedBatch, HandOff, ThoughtModel, Thoughts};
use hybrid_attention::{Config, GenerationConfig, HybridModel, Prompt, Thinking};
use proptest::prelude::*;

use common::tiny::{self, holds};
use common::{Result, assert_close, assert_identical};

/// Two passes of layers 1 and 2 of 3.
fn thinking(weight: f64) -> Thinking {
    Thinking::new(2).span(1..3).refine(Interpolate::new(weight))
}

fn think(model: &ThoughtModel, thinking: &Thinking, z: &Tensor, batch: &Batch) -> Result<Thoughts> {
    let text = tiny::text(model.decoder(), batch, 0)?;
    Ok(thinking.on(model)?.think(&text, z.clone(), |_, _| ())?)
}

/// Sequences of unequal length, segments, plain tokens.
fn batch() -> Result<Batch> {
    Ok(Batch::ragged(&[7, 4])?.with_context(0, &[1..3, 4..6])?.with_context(1, &[0..1, 2..4])?)
}

fn thoughts(config: &Config, batch: &Batch, seed: u64) -> Result<Tensor> {
    tiny::noise(seed, &[batch.tokens(), config.hidden_size], 1.0)
}

/// `‖after - before‖ / ‖before‖` of each token, mean over all of them.
fn drift(before: &Tensor, after: &Tensor) -> Result<f64> {
    let (before, after) = (before.to_vec2::<f32>()?, after.to_vec2::<f32>()?);
    let norm = |xs: &[f64]| xs.iter().map(|x| x * x).sum::<f64>().sqrt();
    let mut ratios = Vec::new();
    for (old, new) in before.iter().zip(&after) {
        let old: Vec<f64> = old.iter().map(|&x| f64::from(x)).collect();
        let change: Vec<f64> =
            old.iter().zip(new).map(|(old, &new)| f64::from(new) - old).collect();
        ratios.push(norm(&change) / norm(&old));
    }
    Ok(ratios.iter().sum::<f64>() / ratios.len() as f64)
}

#[test]
fn a_thought_pass_is_a_bidirectional_run_of_the_span() -> Result {
    let thinker = tiny::thought_model(&tiny::config(), 1)?;
    let (model, batch) = (thinker.decoder(), batch()?);
    let text = tiny::text(model, &batch, 1)?;
    let xs = text.embeddings();
    let (thinking, whole) = (thinking(0.3), Thinking::new(1));
    let (mind, whole) = (thinking.on(&thinker)?, whole.on(&thinker)?);
    let z = mind.encode(&text, Pass::Causal(&batch))?;
    assert_identical("encode", &z, &model.forward(xs, 0..1, Pass::Causal(&batch))?)?;
    let h = mind.think_once(&z, &batch)?;
    assert_identical("think_once", &h, &model.forward(&z, 1..3, Pass::Bidirectional(&batch))?)?;
    let thoughts = mind.think(&text, z, |_, _| ())?;
    let ys = mind.hand_off(&text, &thoughts, Pass::Causal(&batch))?;
    let expected = model.forward(&thoughts.z, 1..3, Pass::Causal(&batch))?;
    assert_identical("hand_off", &ys, &expected)?;

    assert_identical("encode", &whole.encode(&text, Pass::Causal(&batch))?, xs)?;
    let h = model.forward(xs, 0..3, Pass::Bidirectional(&batch))?;
    assert_identical("think_once", &whole.think_once(xs, &batch)?, &h)
}

#[test]
fn interpolation_is_its_formula() -> Result {
    let (z, h) = (tiny::noise(1, &[2, 3, 4], 1.0)?, tiny::noise(2, &[2, 3, 4], 1.0)?);
    for (refine, weight, passes) in [
        (Interpolate::new(0.0), 0.0, 1),
        (Interpolate::new(0.3), 0.3, 5),
        (Interpolate::new(1.0), 1.0, 2),
        (Interpolate::damped(), 1.0, 1),
        (Interpolate::damped(), 0.25, 4),
    ] {
        let expected = ((&h * weight)? + (&z * (1.0 - weight))?)?;
        let batch = Batch::dense(2, 3)?;
        for index in 0..passes {
            let step = Step { index, passes, ..Step::new(&z, &h, &batch) };
            let refined = refine.refine(&h, &step)?;
            assert_close(&format!("{refine:?}"), &refined, &expected, 1e-6)?;
        }
    }
    Ok(())
}

/// Each pass by hand: think once, refine, put plain tokens back, measure.
fn loop_by_hand(
    config: &Config,
    batch: &Batch,
    passes: usize,
    weight: f64,
    seed: u64,
) -> Result<(Tensor, Tensor)> {
    let model = tiny::thought_model(config, seed)?;
    let refine = Interpolate::new(weight);
    let span = 0..config.num_hidden_layers;
    let thinking = Thinking::new(passes).span(span).refine(refine.clone());
    let mind = thinking.on(&model)?;
    let text = tiny::text(model.decoder(), batch, seed)?;
    let first = thoughts(config, batch, seed)?;
    let mut told = Vec::new();
    let got = mind.think(&text, first.clone(), |done, all| told.push((done, all)))?;
    let from = usize::from(passes == 0); // without passes nothing is told
    assert_eq!(told, (from..=passes).map(|done| (done, passes)).collect::<Vec<_>>());
    assert_eq!(got.trace.passes.len(), passes);

    let mut z = first;
    for (index, got) in got.trace.drift().into_iter().enumerate() {
        let h = mind.think_once(&z, batch)?;
        let step = Step { index, passes, ..Step::new(&z, &h, batch) };
        let refined = refine.refine(&h, &step)?;
        let (mut rows, new) = (z.to_vec2::<f32>()?, refined.to_vec2::<f32>()?);
        for (sequence, all) in batch.all_rows().enumerate() {
            for token in batch.context(sequence).iter().cloned().flatten() {
                rows[all.start + token].clone_from(&new[all.start + token]);
            }
        }
        let next = Tensor::new(rows, &Device::Cpu)?;
        let drift = drift(&z, &next)?;
        assert!((got - drift).abs() <= 1e-5 * drift.max(1e-3), "drift {got}, by hand {drift}");
        z = next;
    }
    Ok((got.z, z))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn thinking_is_think_once_and_refine(
        config in tiny::configs(), passes in 0usize..5, weight in 0.0..=1.0, seed: u64,
    ) {
        holds((|| {
            let (got, by_hand) = loop_by_hand(&config, &batch()?, passes, weight, seed)?;
            assert_identical("thoughts", &got, &by_hand)
        })())?;
    }

    /// Plain tokens behind all context are left out of the passes of the loop, but not out of those
    /// by hand. More or fewer tokens take kernels that round differently.
    #[test]
    fn a_plain_tail_changes_no_thought(
        config in tiny::configs(), lengths in prop::collection::vec(1usize..30, 1..4),
        ends in prop::collection::vec(0.0..1.0, 3), passes in 1usize..4, seed: u64,
    ) {
        holds((|| {
            let mut batch = Batch::ragged(&lengths)?;
            for (sequence, (&length, share)) in lengths.iter().zip(ends).enumerate() {
                let end = (length as f64 * share) as usize; // 0 for one without context
                batch = batch.with_context(sequence, &[0..end / 2, end / 2..end])?;
            }
            let (got, by_hand) = loop_by_hand(&config, &batch, passes, 0.5, seed)?;
            assert_close("thoughts", &got, &by_hand, 1e-5)
        })())?;
    }
}

/// What an op is told is of the whole text, also where its end has been left out of the pass.
#[test]
fn ops_see_the_whole_text() -> Result {
    let model = tiny::thought_model(&tiny::config(), 6)?;
    let batch = Batch::one(9)?.with_context(0, &[1..2, 2..4])?;
    let seen = Arc::new(Mutex::new(Vec::new()));
    let told = Arc::clone(&seen);
    let refine = seq().add_fn(move |xs, step| {
        let (h, z) = (step.h.narrow(0, 4, 5)?, step.z.narrow(0, 4, 5)?);
        let tail = (h - z)?.abs()?.sum_all()?.to_scalar::<f32>()?;
        let Ok(mut told) = told.lock() else { return Ok(xs.clone()) };
        told.push((step.h.dims2()?, step.z.dims2()?, step.batch.clone(), tail));
        Ok(xs.clone())
    });
    let text = tiny::text(model.decoder(), &batch, 6)?;
    let thinking = Thinking::new(2).refine(refine);
    thinking.on(&model)?.think(&text, text.embeddings().clone(), |_, _| ())?;
    let whole = (9, model.decoder().config().hidden_size);
    let seen = seen.lock().map_err(|error| error.to_string())?.clone();
    assert_eq!(seen, vec![(whole, whole, text.batch().clone(), 0.0); 2]);
    Ok(())
}

#[test]
fn nothing_drifts_at_weight_0_and_something_does_above() -> Result {
    let model = tiny::thought_model(&tiny::config(), 2)?;
    let batch = batch()?;
    let z = thoughts(model.decoder().config(), &batch, 2)?;
    let still = think(&model, &thinking(0.0), &z, &batch)?;
    assert_eq!(still.trace.drift(), [0.0, 0.0]);
    assert_identical("thoughts", &still.z, &z)?;
    let moved = think(&model, &thinking(0.1), &z, &batch)?;
    let drift = moved.trace.drift();
    assert!(drift.iter().all(|&drift| drift > 1e-3), "{drift:?}");
    Ok(())
}

#[test]
fn plain_tokens_keep_their_thoughts() -> Result {
    let model = tiny::thought_model(&tiny::config(), 3)?;
    let batch = batch()?;
    let z = thoughts(model.decoder().config(), &batch, 3)?;
    let refined = think(&model, &thinking(1.0), &z, &batch)?.z;
    let (before, after) = (z.to_vec2::<f32>()?, refined.to_vec2::<f32>()?);
    for (row, thinks) in batch.thinks().into_iter().enumerate() {
        assert_eq!(before[row] != after[row], thinks == 1, "row {row}");
    }
    Ok(())
}

/// `HybridModel::think` is encode and think over the prompt's own segments.
#[test]
fn the_models_thoughts_are_the_loops() -> Result {
    let model = tiny::hybrid(&tiny::config(), 4)?;
    let ids = tiny::tokens(model.config(), 4, 9);
    let config = GenerationConfig::default().thinking(thinking(0.3));
    let got = model.think(ids.as_slice(), &config)?;

    // A plain string is context up to its last token.
    let (transformer, batch) = (model.transformer(), tiny::prompt(9)?);
    let xs = transformer.embed_ids(&ids)?;
    let z = transformer.forward(&xs, 0..1, Pass::Causal(&batch))?;
    let expected = think(model.thought_model(), &thinking(0.3), &z, &batch)?;
    assert_close("thoughts", &got.z, &expected.z, 1e-6)?;
    assert_eq!(got.trace.drift(), expected.trace.drift());

    let none = model.think(ids.as_slice(), &GenerationConfig::default())?;
    assert_identical("embeddings", &none.z, &xs)?;
    assert!(none.trace.passes.is_empty());
    Ok(())
}

/// Encode, think and hand off by hand, then the likeliest token again and again, always running
/// every layer over everything.
fn answer_by_hand(
    model: &HybridModel,
    thinking: &Thinking,
    span: std::ops::Range<usize>,
    prompt: &[u32],
    count: usize,
) -> Result<(Vec<u32>, Vec<f32>)> {
    let transformer = model.transformer();
    let layers = transformer.all_layers();
    let batch = tiny::prompt(prompt.len())?;
    let xs = transformer.embed_ids(prompt)?;
    let z = transformer.forward(&xs, 0..span.start, Pass::Causal(&batch))?;
    let mut entering = think(model.thought_model(), thinking, &z, &batch)?.z;
    let (mut ids, mut logprobs) = (prompt.to_vec(), Vec::new());
    for _ in 0..count {
        // The thoughts of the prompt, then what answer tokens bring to the span causally. Layers
        // before the span have read the prompt as it was.
        let batch = Batch::one(ids.len())?;
        let plain = transformer.embed_ids(&ids)?;
        let plain = transformer.forward(&plain, 0..span.start, Pass::Causal(&batch))?;
        let answer = plain.narrow(0, prompt.len(), ids.len() - prompt.len())?;
        entering = Tensor::cat(&[&entering.narrow(0, 0, prompt.len())?, &answer], 0)?;
        let h = transformer.forward(&entering, span.start..layers.end, Pass::Causal(&batch))?;
        let logits = transformer.logits(&h.narrow(0, ids.len() - 1, 1)?)?.flatten_all()?;
        let id = logits.argmax(0)?.to_scalar::<u32>()?;
        let logits = logits.to_dtype(DType::F64)?.to_vec1::<f64>()?;
        let sum = logits.iter().map(|logit| logit.exp()).sum::<f64>().ln();
        logprobs.push((logits[id as usize] - sum) as f32);
        ids.push(id);
    }
    Ok((ids.split_off(prompt.len()), logprobs))
}

#[test]
fn generating_is_encode_think_hand_off_and_decode() -> Result {
    // 600 tokens are more than a cache takes up at a time.
    for (sliding_window, length) in [(None, 9), (Some(4), 9), (Some(4), 600)] {
        for span in [0..3, 1..2, 1..3, 2..3] {
            let config = Config { sliding_window, ..tiny::config() };
            let model = tiny::hybrid(&config, 5)?;
            let prompt = tiny::tokens(&config, 5, length);
            let refine = Interpolate::new(0.4);
            let thinking = Thinking::new(3).span(span.clone()).refine(refine);
            let how = GenerationConfig::default().max_tokens(12);
            let plain = model.generate(prompt.as_slice(), &how)?;
            let answer = model.generate(prompt.as_slice(), &how.thinking(thinking.clone()))?;
            let (ids, logprobs) = answer_by_hand(&model, &thinking, span.clone(), &prompt, 12)?;
            assert_eq!(answer.ids, ids, "span {span:?}");
            let logprobs = Tensor::new(logprobs, &Device::Cpu)?;
            let got = Tensor::new(answer.logprobs.as_slice(), &Device::Cpu)?;
            assert_close("logprobs", &got, &logprobs, 1e-5)?;
            assert_eq!(answer.drift().len(), 3);
            assert_ne!(answer.logprobs, plain.logprobs, "thinking changed nothing");
        }
    }
    Ok(())
}

/// Read, fit, then the likeliest token of what the head says of nudged states, again and again.
#[test]
fn an_output_nudge_serves_every_token_of_the_answer() -> Result {
    let config = tiny::config();
    let model = tiny::hybrid(&config, 6)?;
    let transformer = model.transformer();
    let prompt = tiny::tokens(&config, 6, 90); // more than are scored at a time
    let nudge = OutputNudge::new(4).learning_rate(0.3);
    let how = GenerationConfig::default().max_tokens(5);
    for thinking in [Thinking::none(), thinking(0.4), thinking(0.4).hand_off(HandOff::KeyValue)] {
        let nudged = thinking.clone().output_nudge(nudge);
        let answer = model.generate(prompt.as_slice(), &how.clone().thinking(nudged))?;

        let batch = tiny::prompt(prompt.len())?;
        let text = EncodedBatch::new(transformer, &prompt, batch)?;
        let mind = thinking.on(model.thought_model())?;
        let mut cache = transformer.new_cache(prompt.len() + 5)?;
        let z = mind.encode(&text, Pass::Cached(&mut cache))?;
        let thoughts = mind.think(&text, z, |_, _| ())?;
        let mut h = mind.hand_off(&text, &thoughts, Pass::Cached(&mut cache))?;
        let normed = transformer.norm(&h)?;
        let delta = nudge.fit(&normed, &prompt, &|xs| transformer.head(xs))?;
        let mut ids = Vec::new();
        for _ in 0..5 {
            let last = transformer.norm(&h.narrow(0, h.dim(0)? - 1, 1)?)?;
            let logits = transformer.head(&last.broadcast_add(&delta)?)?.flatten_all()?;
            ids.push(logits.argmax(0)?.to_scalar::<u32>()?);
            let xs = transformer.embed_ids(&ids[ids.len() - 1..])?;
            h = transformer.forward(&xs, transformer.all_layers(), Pass::Cached(&mut cache))?;
        }
        assert_eq!(answer.ids, ids);
        let plain = model.generate(prompt.as_slice(), &how.clone().thinking(thinking))?;
        assert_ne!(answer.logprobs, plain.logprobs, "the nudge changed nothing");
    }
    Ok(())
}

/// Thinking again, the output nudge is fitted again, to all of the text.
#[test]
fn an_output_nudge_is_fitted_anew_after_thinking_again() -> Result {
    let model = tiny::hybrid(&tiny::config(), 7)?;
    let ids = tiny::tokens(model.config(), 7, 9);
    let nudged = thinking(0.4).output_nudge(OutputNudge::new(3).learning_rate(0.3));
    let how = |thinking: &Thinking| GenerationConfig::default().thinking(thinking.clone());
    let prompt = || Prompt::default().context_ids(&ids[..4]).plain_ids(&ids[4..]);
    let again = how(&nudged.clone().rethink_every(3)).max_tokens(6);
    let answer = model.generate(prompt(), &again)?;
    let first = model.generate(prompt(), &how(&nudged).max_tokens(3))?;
    let rest = prompt().context_ids(&first.ids);
    let rest = model.generate(rest, &how(&nudged).max_tokens(3))?;
    assert_eq!(answer.ids, [first.ids, rest.ids].concat());
    let logprobs = Tensor::new([first.logprobs, rest.logprobs].concat(), &Device::Cpu)?;
    let got = Tensor::new(answer.logprobs, &Device::Cpu)?;
    assert_close("logprobs", &got, &logprobs, 1e-5)
}

#[test]
fn a_causal_loop_is_a_control_of_equal_cost() -> Result {
    let thinker = tiny::thought_model(&tiny::config(), 8)?;
    let (model, batch) = (thinker.decoder(), batch()?);
    let causal = thinking(0.3).sight(Sight::Causal);
    let text = tiny::text(model, &batch, 8)?;
    let mind = causal.on(&thinker)?;
    let h = mind.think_once(text.embeddings(), &batch)?;
    let expected = model.forward(text.embeddings(), 1..3, Pass::Causal(&batch))?;
    assert_identical("think_once", &h, &expected)?;
    // Handed over causally, keys and values are those of re-reading the thoughts.
    let thoughts = mind.think(&text, text.embeddings().clone(), |_, _| ())?;
    let refined = mind.hand_off(&text, &thoughts, Pass::Causal(&batch))?;
    let key_value = causal.clone().hand_off(HandOff::KeyValue);
    let handed = key_value.on(&thinker)?.hand_off(&text, &thoughts, Pass::Causal(&batch))?;
    assert_identical("hand_off", &handed, &refined)
}
