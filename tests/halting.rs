//! Thinking stops where a rule says so, judged by quantities that the tests work out themselves.

mod common;

use std::ops::Range;
use std::sync::{Arc, Mutex};

use candle_core::Tensor;
use hybrid_attention::generate::Progress;
use hybrid_attention::model::{Batch, Pass};
use hybrid_attention::refine::Interpolate;
use hybrid_attention::thought::{Detail, EncodedBatch, Halt, Halted, ThoughtModel, Thoughts};
use hybrid_attention::{Config, Error, GenerationConfig, Thinking};

use common::reference::{self, Reference, Stream, ThoughtLoop};
use common::tiny;
use common::{Result, assert_close, assert_identical};

const CAP: usize = 7;
const WEIGHT: f64 = 0.3;

type Rule = fn(f64) -> Halt;

const RULES: [(Rule, Halted); 3] =
    [(Halt::Drift, Halted::Drift), (Halt::Cosine, Halted::Cosine), (Halt::Kl, Halted::Kl)];

/// A constant weight, so that a pass does not depend on how many there are.
fn thinking(passes: usize, span: Range<usize>) -> Thinking {
    Thinking::new(passes).span(span).refine(Interpolate::new(WEIGHT))
}

fn think(model: &ThoughtModel, thinking: &Thinking, text: &EncodedBatch) -> Result<Thoughts> {
    let mind = thinking.on(model)?;
    let z = mind.encode(text, Pass::Causal(text.batch()))?;
    Ok(mind.think(text, z, |_, _| ())?)
}

fn text(model: &ThoughtModel, ids: &[u32], segments: &[Range<usize>]) -> Result<EncodedBatch> {
    let batch = Batch::one(ids.len())?.with_context(0, segments)?;
    Ok(EncodedBatch::new(model.decoder(), ids, batch)?)
}

/// What each rule looks at, after each of `CAP` passes over one sequence: drift, cosine distance, KL.
fn quantities(
    config: &Config,
    seed: u64,
    span: Range<usize>,
    ids: &[u32],
    segments: &[Range<usize>],
) -> Result<[Vec<f64>; 3]> {
    let reference = Reference::new(config, &tiny::weights(config, seed)?)?;
    let by_loops = ThoughtLoop {
        reference: &reference,
        span,
        segments,
        both_ways: true,
        thought_layers: 0,
        share: vec![WEIGHT; config.hidden_size],
    };
    let of_tokens = |a: &Stream, b: &Stream, number: fn(&[f64], &[f64]) -> f64| {
        let each: Vec<f64> = a.iter().zip(b).map(|(a, b)| number(a, b)).collect();
        reference::mean(&each)
    };
    let mut quantities = [const { Vec::new() }; 3];
    let mut z = by_loops.encode(ids);
    for _ in 0..CAP {
        let (next, _) = by_loops.pass(&z);
        let says = |z: &Stream| by_loops.logits(z).pop().unwrap_or_default();
        quantities[0].push(of_tokens(&z, &next, reference::drift));
        quantities[1].push(1.0 - of_tokens(&z, &next, reference::cosine));
        quantities[2].push(reference::kl(&says(&z), &says(&next)));
        z = next;
    }
    Ok(quantities)
}

/// Tolerances, and after which pass a quantity first falls below each: just above a pass that is
/// lower than all before it, and between it and the lowest of those.
fn tolerances(quantity: &[f64]) -> Vec<(f64, usize)> {
    let mut lowest = 2.0 * quantity[0];
    let mut found = Vec::new();
    for (pass, &value) in (1..).zip(quantity) {
        if value < 0.99 * lowest {
            found.extend([(1.005 * value, pass), ((value * lowest).sqrt(), pass)]);
        }
        lowest = lowest.min(value);
    }
    found
}

#[test]
fn each_rule_stops_where_its_quantity_first_falls_below_the_tolerance() -> Result {
    let mut stops = [[0; CAP + 1]; 3];
    for (seed, window, span, length) in
        [(1, None, 0..3, 9), (2, Some(3), 1..3, 9), (3, None, 1..2, 70), (4, None, 2..3, 5)]
    {
        let config = Config { sliding_window: window, ..tiny::config() };
        let model = tiny::thought_model(&config, seed)?;
        let ids = tiny::tokens(&config, seed, length);
        let segments = tiny::segments(seed, length);
        let text = text(&model, &ids, &segments)?;
        let quantities = quantities(&config, seed, span.clone(), &ids, &segments)?;
        for (rule, ((halt, reason), quantity)) in RULES.iter().zip(quantities).enumerate() {
            for (tolerance, pass) in tolerances(&quantity) {
                let name = format!("{reason:?} below {tolerance} in {quantity:?}");
                let halting = thinking(CAP, span.clone()).halt(halt(tolerance));
                let thoughts = think(&model, &halting, &text)?;
                assert_eq!(thoughts.trace.passes.len(), pass, "{name}");
                assert_eq!(thoughts.trace.halted, [*reason], "{name}");
                let exactly = think(&model, &thinking(pass, span.clone()), &text)?;
                assert_identical(&name, &thoughts.z, &exactly.z)?;
                assert_eq!(thoughts.trace.drift(), exactly.trace.drift(), "{name}");
                assert_eq!(exactly.trace.halted, [Halted::Cap]);
                stops[rule][pass] += 1;
            }
            let lowest = quantity.iter().copied().fold(f64::INFINITY, f64::min);
            let never = thinking(CAP, span.clone()).halt(halt(0.995 * lowest));
            let trace = think(&model, &never, &text)?.trace;
            assert_eq!((trace.passes.len(), trace.halted), (CAP, vec![Halted::Cap]));
        }
    }
    for of_rule in stops {
        let different = of_rule.iter().filter(|&&stops| stops > 0).count();
        assert!(different > 3, "hardly any different passes to stop after: {of_rule:?}");
    }
    Ok(())
}

/// The rule wants less than the tolerance, not as much.
#[test]
fn a_quantity_at_the_tolerance_does_not_stop() -> Result {
    let model = tiny::thought_model(&tiny::config(), 5)?;
    let ids = tiny::tokens(model.decoder().config(), 5, 8);
    let text = text(&model, &ids, &[0..3, 3..7])?;
    let drift = think(&model, &thinking(1, 0..3), &text)?.trace.drift()[0];
    let reason = |tolerance: f64| -> Result<Halted> {
        let thinking = thinking(1, 0..3).halt(Halt::Drift(tolerance));
        Ok(think(&model, &thinking, &text)?.trace.halted[0])
    };
    assert_eq!(reason(drift)?, Halted::Cap);
    assert_eq!(reason(drift.next_up())?, Halted::Drift);
    Ok(())
}

#[test]
fn the_first_rule_to_be_met_counts() -> Result {
    let (config, span) = (tiny::config(), 0..3);
    let model = tiny::thought_model(&config, 6)?;
    let ids = tiny::tokens(&config, 6, 9);
    let segments = [0..3, 3..8];
    let text = text(&model, &ids, &segments)?;
    let quantities = quantities(&config, 6, span.clone(), &ids, &segments)?;
    let stop = |rules: &[Halt]| -> Result<(usize, Halted)> {
        let thinking = rules.iter().fold(thinking(CAP, span.clone()), |it, rule| it.halt(*rule));
        let trace = think(&model, &thinking, &text)?.trace;
        Ok((trace.passes.len(), trace.halted[0]))
    };
    let mut all = Vec::new();
    for ((halt, reason), quantity) in RULES.iter().zip(quantities) {
        for (tolerance, pass) in tolerances(&quantity).into_iter().step_by(2) {
            all.push((halt(tolerance), *reason, pass));
        }
    }
    let mut decided_by_the_second = 0;
    for (one, reason, pass) in &all {
        for (other, other_reason, other_pass) in &all {
            // In the same pass the one that was asked for first.
            let expected = match other_pass < pass {
                true => (*other_pass, *other_reason),
                false => (*pass, *reason),
            };
            assert_eq!(stop(&[*one, *other])?, expected, "{one:?}, {other:?}");
            decided_by_the_second += usize::from(other_pass < pass);
        }
    }
    assert!(decided_by_the_second > 10, "{all:?}");
    Ok(())
}

/// Whatever rounding makes of quantities that are 0.
#[test]
fn a_tolerance_of_0_never_stops() -> Result {
    let all = RULES.map(|(halt, _)| halt(0.0));
    for seed in 0..20 {
        let model = tiny::thought_model(&tiny::config(), seed)?;
        let ids = tiny::tokens(model.decoder().config(), seed, 12);
        let text = text(&model, &ids, &tiny::segments(seed, 12))?;
        for weight in [0.0, 1e-7, 0.3] {
            let still = Thinking::new(4).refine(Interpolate::new(weight));
            let trace = think(&model, &all.iter().fold(still, |it, rule| it.halt(*rule)), &text)?;
            assert_eq!(trace.trace.halted, [Halted::Cap], "weight {weight}");
            assert_eq!(trace.trace.passes.len(), 4);
        }
        // And the least there is above it stops what does not move at all.
        for (halt, reason) in RULES {
            let still = Thinking::new(4).refine(Interpolate::new(0.0)).halt(halt(1e-5));
            let trace = think(&model, &still, &text)?.trace;
            assert_eq!((trace.passes.len(), trace.halted), (1, vec![reason]));
        }
    }
    Ok(())
}

#[test]
fn sequences_of_a_batch_stop_one_by_one() -> Result {
    let (config, span) = (tiny::config(), 1..3);
    let (mut together, mut apart) = (0, 0);
    for seed in 10..16 {
        let model = tiny::thought_model(&config, seed)?;
        let lengths = [9, 4, 12, 6];
        let mut batch = Batch::ragged(&lengths)?;
        let (mut packed, mut texts) = (Vec::new(), Vec::new());
        for (sequence, length) in lengths.into_iter().enumerate() {
            let seed = 100 * seed + sequence as u64;
            let (ids, segments) =
                (tiny::tokens(&config, seed, length), tiny::segments(seed, length));
            batch = batch.with_context(sequence, &segments)?;
            packed.extend(ids.clone());
            texts.push((text(&model, &ids, &segments)?, ids, segments));
        }
        let batch = EncodedBatch::new(model.decoder(), &packed, batch)?;
        for (rule, (halt, reason)) in RULES.into_iter().enumerate() {
            // In the middle of what the first one goes through.
            let (_, ids, segments) = &texts[0];
            let quantity = &quantities(&config, seed, span.clone(), ids, segments)?[rule];
            let tolerance = (quantity[2] * quantity[3]).sqrt();
            let halting = thinking(CAP, span.clone()).halt(halt(tolerance)).detail(Detail::Tokens);
            let got = think(&model, &halting, &batch)?;

            let mut alone = Vec::new();
            for (sequence, (text, _, _)) in texts.iter().enumerate() {
                let one = think(&model, &halting, text)?;
                let name = format!("seed {seed}, {reason:?}, sequence {sequence}");
                let rows = batch.batch().rows(sequence);
                let of_batch = got.z.narrow(0, rows.start, rows.len())?;
                assert_close(&name, &of_batch, &one.z, 1e-5)?;
                assert_eq!(got.trace.halted[sequence], one.trace.halted[0], "{name}");
                alone.push(one.trace);
            }
            let ran: Vec<usize> = alone.iter().map(|trace| trace.passes.len()).collect();
            assert_eq!(got.trace.passes.len(), ran.iter().copied().max().unwrap_or(0));
            for (pass, got) in got.trace.passes.iter().enumerate() {
                // The mean over the tokens of sequences that still think.
                let (mut sum, mut tokens) = (0.0, 0);
                for (trace, length) in alone.iter().zip(lengths) {
                    if let Some(pass) = trace.passes.get(pass) {
                        sum += pass.drift * length as f64;
                        tokens += length;
                    }
                }
                let expected = sum / tokens as f64;
                let off = (got.drift - expected).abs();
                assert!(off <= 1e-5 + 1e-4 * expected, "{} for {expected}", got.drift);
                // What has stopped says the same ever after.
                let tokens = got.tokens.as_ref().ok_or("no numbers")?;
                for (sequence, trace) in alone.iter().enumerate() {
                    if trace.passes.len() <= pass {
                        assert!(tokens.kl[sequence].iter().all(|kl| *kl == 0.0), "{:?}", tokens.kl);
                    }
                }
            }
            match ran.iter().all(|passes| *passes == ran[0]) {
                true => together += 1,
                false => apart += 1,
            }
        }
    }
    assert!(apart > 2 * together, "{together} together, {apart} apart");
    Ok(())
}

/// There is nothing in it to go on thinking about, and it keeps no other from stopping.
#[test]
fn a_sequence_without_tokens_stops_at_once() -> Result {
    let (config, span) = (tiny::config(), 0..3);
    let model = tiny::thought_model(&config, 7)?;
    let ids = tiny::tokens(&config, 7, 8);
    let quantities = quantities(&config, 7, span.clone(), &ids, std::slice::from_ref(&(0..8)))?;
    for ((halt, reason), quantity) in RULES.into_iter().zip(quantities) {
        let tolerance = (quantity[2] * quantity[3]).sqrt();
        let halting = thinking(CAP, span.clone()).halt(halt(tolerance));
        let of = |lengths: &[usize]| -> Result<Thoughts> {
            let text = EncodedBatch::new(model.decoder(), &ids, Batch::ragged(lengths)?)?;
            think(&model, &halting, &text)
        };
        let (together, alone) = (of(&[0, 8, 0])?, of(&[8])?);
        let passes = alone.trace.passes.len();
        assert!((2..CAP).contains(&passes), "{reason:?} after {passes}");
        assert_eq!(together.trace.passes.len(), passes, "{reason:?}");
        assert_eq!(together.trace.halted, [reason; 3]);
        assert_identical("thoughts", &together.z, &alone.z)?;
    }
    Ok(())
}

/// A sequence that has stopped is left alone to the last bit, whatever the others go on to do.
#[test]
fn a_sequence_that_stopped_keeps_its_thoughts() -> Result {
    let model = tiny::thought_model(&tiny::config(), 20)?;
    let ids = tiny::tokens(model.decoder().config(), 20, 16);
    let batch = Batch::dense(2, 8)?.with_context(0, &[0..1, 2..3])?;
    let text = EncodedBatch::new(model.decoder(), &ids, batch)?;
    let after = |passes, rule: Option<Halt>| {
        think(&model, &rule.into_iter().fold(thinking(passes, 0..3), Thinking::halt), &text)
    };
    let one = after(1, None)?.trace.drift()[0];
    let thoughts = after(CAP, Some(Halt::Drift(one)))?;
    let ran = thoughts.trace.passes.len();
    assert!(ran > 1, "{ran}");
    // The first one drifts less than the mean, because less of it thinks.
    let (once, as_often) = (after(1, None)?.z, after(ran, None)?.z);
    let [first, second] = [0, 8].map(|start| move |z: &Tensor| z.narrow(0, start, 8));
    assert_identical("first", &first(&thoughts.z)?, &first(&once)?)?;
    assert_identical("second", &second(&thoughts.z)?, &second(&as_often)?)
}

#[test]
fn no_tolerance_but_a_number_from_0_on_is_taken() -> Result {
    let model = tiny::hybrid(&tiny::config(), 21)?;
    for (halt, spelled) in [
        (Halt::Drift(-0.1), "Drift(-0.1)"),
        (Halt::Cosine(f64::NAN), "Cosine(NaN)"),
        (Halt::Kl(f64::INFINITY), "Kl(inf)"),
        (Halt::Kl(f64::NEG_INFINITY), "Kl(-inf)"),
    ] {
        let thinking = Thinking::new(2).halt(Halt::Drift(0.1)).halt(halt);
        let expected = format!("parameter halt: expected a tolerance of at least 0, got {spelled}");
        let refused = thinking.validate().map_err(|error| error.to_string());
        assert_eq!(refused, Err(expected.clone()));
        let how = GenerationConfig::default().thinking(thinking);
        for refused in [
            model.generate([1, 2], &how).err(),
            model.think([1, 2], &how).err(),
            how.thinking(Thinking::none().halt(halt)).validate().err(),
        ] {
            assert_eq!(refused.map(|error: Error| error.to_string()), Some(expected.clone()));
        }
    }
    Ok(())
}

/// Passes done, from 0 to where it stopped, of all there might have been; for the loop by itself and
/// for an answer alike.
#[test]
fn progress_ends_where_thinking_does() -> Result {
    let model = tiny::hybrid(&tiny::config(), 22)?;
    let ids = tiny::tokens(model.config(), 22, 9);
    let all = GenerationConfig::default().thinking(thinking(CAP, 0..3));
    let drift = model.think(ids.as_slice(), &all)?.trace.drift();
    let lowest = drift.iter().copied().fold(f64::INFINITY, f64::min);
    for tolerance in [0.0, lowest * 1.001, drift[1] * 1.001, 10.0] {
        let thinking = thinking(CAP, 0..3).halt(Halt::Drift(tolerance));
        let how = GenerationConfig::default().thinking(thinking.clone()).max_tokens(2);
        let ran = model.think(ids.as_slice(), &how)?.trace.passes.len();
        let stops = drift.iter().position(|drift| *drift < tolerance);
        assert_eq!(ran, stops.map_or(CAP, |pass| pass + 1));
        let expected: Vec<_> = (0..=ran).map(|done| (done, CAP)).collect();

        let text = EncodedBatch::new(model.transformer(), &ids, tiny::prompt(9)?)?;
        let (mind, mut told) = (thinking.on(model.thought_model())?, Vec::new());
        let z = mind.encode(&text, Pass::Causal(text.batch()))?;
        mind.think(&text, z, |done, total| told.push((done, total)))?;
        assert_eq!(told, expected);

        let told = Arc::new(Mutex::new(Vec::new()));
        let hear = Arc::clone(&told);
        let stream = model.stream(ids.as_slice(), &how)?.on_progress(move |progress| {
            if let (Progress::Think { done, total }, Ok(mut told)) = (progress, hear.lock()) {
                told.push((done, total));
            }
        });
        assert_eq!(stream.collect_answer()?.traces[0].passes.len(), ran);
        assert_eq!(*told.lock().map_err(|_| "poisoned")?, expected);
    }
    Ok(())
}

/// An answer after stopping is the answer after that many passes.
#[test]
fn an_answer_goes_on_from_where_thinking_stopped() -> Result {
    let model = tiny::hybrid(&tiny::config(), 23)?;
    let ids = tiny::tokens(model.config(), 23, 9);
    let answer = |thinking| {
        let how = GenerationConfig::default().thinking(thinking).max_tokens(6).top_logprobs(2);
        model.generate(ids.as_slice(), &how)
    };
    let drift = answer(thinking(CAP, 1..3))?.drift();
    let halted = answer(thinking(CAP, 1..3).halt(Halt::Drift(drift[1] * 1.001)))?;
    let passes = halted.drift().len();
    assert!(passes < CAP && halted.traces[0].halted == [Halted::Drift]);
    let exactly = answer(thinking(passes, 1..3))?;
    assert_eq!(halted.top_logprobs, exactly.top_logprobs);
    let differs = |other: &hybrid_attention::Answer| other.logprobs != halted.logprobs;
    assert!(differs(&answer(thinking(CAP, 1..3))?));
    Ok(())
}

/// Thoughts that no sum of squares can hold are thoughts all the same.
#[test]
fn the_size_of_thoughts_does_not_matter() -> Result {
    let model = tiny::thought_model(&tiny::config(), 24)?;
    let text = tiny::text(model.decoder(), &Batch::one(5)?, 24)?;
    let z = tiny::noise(24, &[5, 16], 1.0)?;
    // The pass goes on from thoughts in proportion to their size.
    let double = hybrid_attention::refine::seq().add_fn(|_, step| Ok((step.z * 1.5)?));
    let rules = [Halt::Drift(0.4), Halt::Cosine(0.0)];
    let thinking = Thinking::new(2).refine(double).detail(Detail::Maps);
    let thinking = rules.iter().fold(thinking, |it, rule| it.halt(*rule));
    for size in [1e-25, 1e-12, 1.0, 1e12, 1e25] {
        let sized: Tensor = (&z * size)?;
        let trace = thinking.on(&model)?.think(&text, sized, |_, _| ())?.trace;
        assert_eq!(trace.halted, [Halted::Cap]);
        for pass in &trace.passes {
            assert!((pass.drift - 0.5).abs() < 1e-5, "drift {} at size {size}", pass.drift);
            let tokens = pass.tokens.as_ref().ok_or("no numbers")?;
            let cosines = tokens.cosine.concat();
            assert!(cosines.iter().all(|it| (it - 1.0).abs() < 1e-5), "{cosines:?} at {size}");
        }
    }
    Ok(())
}
