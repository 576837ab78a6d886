//! Every number of a trace against a Mistral in plain loops.

mod common;

use std::ops::Range;

use hybrid_attention::model::{Batch, Pass, Sight, Transformer};
use hybrid_attention::refine::Interpolate;
use hybrid_attention::thought::{
    Detail, EncodedBatch, Halt, Halted, ThoughtModel, Thoughts, TokenTrace, Trace,
};
use hybrid_attention::{Config, GenerationConfig, Thinking};
use proptest::prelude::*;
use serde_json::{Value, json};

use common::reference::{self, Reference, Stream, ThoughtLoop};
use common::tiny::{self, holds};
use common::{Result, assert_identical};

const DETAILS: [Detail; 3] = [Detail::Drift, Detail::Tokens, Detail::Maps];

/// Sequences of tokens, and which of these think.
struct Texts {
    sequences: Vec<(Vec<u32>, Vec<Range<usize>>)>,
}

impl Texts {
    fn new(config: &Config, lengths: &[usize], seed: u64) -> Self {
        let text = |(index, &length): (usize, &usize)| {
            let seed = seed.wrapping_add(index as u64);
            (tiny::tokens(config, seed, length), tiny::segments(seed, length))
        };
        Self { sequences: lengths.iter().enumerate().map(text).collect() }
    }

    /// One behind the other.
    fn packed(&self, model: &ThoughtModel) -> Result<EncodedBatch> {
        let lengths: Vec<usize> = self.sequences.iter().map(|(ids, _)| ids.len()).collect();
        let mut batch = Batch::ragged(&lengths)?;
        for (sequence, (_, segments)) in self.sequences.iter().enumerate() {
            batch = batch.with_context(sequence, segments)?;
        }
        let ids: Vec<u32> = self.sequences.iter().flat_map(|(ids, _)| ids.clone()).collect();
        Ok(EncodedBatch::new(model.decoder(), &ids, batch)?)
    }
}

fn think(model: &ThoughtModel, thinking: &Thinking, text: &EncodedBatch) -> Result<Thoughts> {
    let mind = thinking.on(model)?;
    let z = mind.encode(text, Pass::Causal(text.batch()))?;
    Ok(mind.think(text, z, |_, _| ())?)
}

/// Fails unless the two have one shape and nearly the same values.
fn assert_near(name: &str, got: &[Vec<f32>], expected: &[Vec<f64>]) {
    let same = got.iter().map(Vec::len).eq(expected.iter().map(Vec::len));
    assert!(same, "{name}: {got:?} for {expected:?}");
    for (at, (got, expected)) in got.iter().flatten().zip(expected.iter().flatten()).enumerate() {
        let off = (f64::from(*got) - expected).abs();
        assert!(off <= 2e-5 + 1e-4 * expected.abs(), "{name}: {got} for {expected} at {at}");
    }
}

/// A sequence as the loops have it, alone.
struct ByLoops {
    first: Stream,
    z: Stream,
    logits: Stream,
}

fn tokens_agree(
    name: &str,
    got: Option<&TokenTrace>,
    before: &[ByLoops],
    now: &[ByLoops],
) -> Result {
    let got = got.ok_or("no numbers for tokens")?;
    let each = |number: &dyn Fn(&ByLoops, &ByLoops, usize) -> f64| -> Stream {
        let sequences = before.iter().zip(now);
        sequences
            .map(|(old, new)| (0..new.z.len()).map(|token| number(old, new, token)).collect())
            .collect()
    };
    let cosine = each(&|_, new, at| reference::cosine(&new.first[at], &new.z[at]));
    assert_near(&format!("{name}: cosine"), &got.cosine, &cosine);
    let norm = each(&|_, new, at| reference::length(&new.z[at]));
    assert_near(&format!("{name}: norm"), &got.norm, &norm);
    let entropy = each(&|_, new, at| reference::entropy(&new.logits[at]));
    assert_near(&format!("{name}: entropy"), &got.entropy, &entropy);
    let kl = each(&|old, new, at| reference::kl(&old.logits[at], &new.logits[at]));
    assert_near(&format!("{name}: kl"), &got.kl, &kl);
    Ok(())
}

fn agrees_with_the_loops(
    config: &Config,
    lengths: &[usize],
    span: Range<usize>,
    sight: Sight,
    seed: u64,
) -> Result {
    let model = tiny::thought_model(config, seed)?;
    let reference = Reference::new(config, &tiny::weights(config, seed)?)?;
    let texts = Texts::new(config, lengths, seed);
    let refine = Interpolate::new(0.4);
    let thinking = Thinking::new(2).span(span.clone()).sight(sight).refine(refine);
    let text = texts.packed(&model)?;
    let Thoughts { trace, .. } = think(&model, &thinking.detail(Detail::Maps), &text)?;
    assert_eq!(Some(trace.tokens), lengths.iter().copied().max());
    assert_eq!(trace.halted, vec![Halted::Cap; lengths.len()]);
    assert_eq!(trace.passes.len(), 2);

    let loops = texts.sequences.iter().map(|(_, segments)| ThoughtLoop {
        reference: &reference,
        span: span.clone(),
        segments,
        both_ways: sight == Sight::Bidirectional,
        thought_layers: 0,
        share: vec![0.4; config.hidden_size],
    });
    let loops: Vec<_> = loops.collect();
    let encoded = |(it, (ids, _)): (&ThoughtLoop<'_>, &(Vec<u32>, _))| {
        let z = it.encode(ids);
        ByLoops { first: z.clone(), logits: it.logits(&z), z }
    };
    let mut before: Vec<ByLoops> = loops.iter().zip(&texts.sequences).map(encoded).collect();
    tokens_agree("first", trace.first.as_ref(), &before, &before)?;
    for (index, pass) in trace.passes.iter().enumerate() {
        let name = format!("pass {index} of {span:?}");
        let (mut now, mut drifts) = (Vec::new(), Vec::new());
        let maps = pass.maps.as_ref().ok_or("no maps")?;
        assert_eq!(maps.similarity.len(), lengths.len());
        assert_eq!(maps.attention.len(), span.len());
        for (sequence, (by_loops, old)) in loops.iter().zip(&before).enumerate() {
            let (z, shares) = by_loops.pass(&old.z);
            drifts.extend(old.z.iter().zip(&z).map(|(old, new)| reference::drift(old, new)));
            let similarity: Stream =
                z.iter().map(|a| z.iter().map(|b| reference::cosine(a, b)).collect()).collect();
            assert_near(&format!("{name}: similarity"), &maps.similarity[sequence], &similarity);
            for (got, shares) in maps.attention.iter().zip(&shares) {
                assert_eq!(got.len(), lengths.len());
                assert_near(&format!("{name}: attention"), &got[sequence], shares);
            }
            now.push(ByLoops { first: old.first.clone(), logits: by_loops.logits(&z), z });
        }
        tokens_agree(&name, pass.tokens.as_ref(), &before, &now)?;
        let drift = reference::mean(&drifts);
        let off = (pass.drift - drift).abs();
        assert!(off <= 1e-5 + 1e-4 * drift, "{name}: drift {} for {drift}", pass.drift);
        assert!(pass.seconds > 0.0 && pass.seconds < 600.0, "{} seconds", pass.seconds);
        before = now;
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn a_trace_is_what_loops_make_of_it(
        lengths in prop::collection::vec(1usize..10, 1..4), window in prop::option::of(1usize..5),
        (from, to) in (0usize..3).prop_flat_map(|from| (Just(from), from + 1..=3)),
        causal in prop::bool::weighted(0.2), seed in 0u64..10_000,
    ) {
        let config = Config { sliding_window: window, ..tiny::config() };
        let sight = if causal { Sight::Causal } else { Sight::Bidirectional };
        holds(agrees_with_the_loops(&config, &lengths, from..to, sight, seed))?;
    }
}

/// Longer than one block of logits, than two, and exactly one.
#[test]
fn long_texts_are_read_in_blocks() -> Result {
    let both = Sight::Bidirectional;
    agrees_with_the_loops(&tiny::config(), &[64], 0..3, both, 1)?;
    agrees_with_the_loops(&tiny::config(), &[65, 3], 1..2, both, 2)?;
    let config = Config { sliding_window: Some(9), tie_word_embeddings: true, ..tiny::config() };
    agrees_with_the_loops(&config, &[70, 133], 0..2, both, 3)
}

#[test]
fn what_is_not_asked_for_is_not_there() -> Result {
    let model = tiny::thought_model(&tiny::config(), 4)?;
    let text = Texts::new(model.decoder().config(), &[5, 3], 4).packed(&model)?;
    let trace = |detail| -> Result<Trace> {
        Ok(think(&model, &Thinking::new(2).detail(detail), &text)?.trace)
    };
    for (detail, tokens, maps) in
        [(Detail::Drift, false, false), (Detail::Tokens, true, false), (Detail::Maps, true, true)]
    {
        let trace = trace(detail)?;
        assert_eq!(trace.first.is_some(), tokens, "{detail:?}");
        for pass in trace.passes {
            assert_eq!((pass.tokens.is_some(), pass.maps.is_some()), (tokens, maps), "{detail:?}");
        }
    }
    let default = think(&model, &Thinking::new(2), &text)?.trace;
    assert!(default.first.is_none() && default.passes.iter().all(|pass| pass.tokens.is_none()));
    Ok(())
}

/// There is nothing to tell of it, and it moves no number of the others.
#[test]
fn a_sequence_without_tokens_has_no_numbers() -> Result {
    let model = tiny::thought_model(&tiny::config(), 9)?;
    let ids = tiny::tokens(model.decoder().config(), 9, 4);
    let thinking = Thinking::new(2).detail(Detail::Maps);
    let traced = |batch| -> Result<Trace> {
        let text = EncodedBatch::new(model.decoder(), &ids, batch)?;
        Ok(think(&model, &thinking, &text)?.trace)
    };
    let (two, one) = (traced(Batch::ragged(&[4, 0])?)?, traced(Batch::one(4)?)?);
    for (pass, alone) in two.passes.iter().zip(&one.passes) {
        assert!((pass.drift - alone.drift).abs() < 1e-6);
        let (tokens, maps) = (pass.tokens.as_ref(), pass.maps.as_ref());
        let (tokens, maps) = (tokens.ok_or("no numbers")?, maps.ok_or("no maps")?);
        for numbers in [&tokens.cosine, &tokens.norm, &tokens.entropy, &tokens.kl] {
            assert_eq!(numbers.iter().map(Vec::len).collect::<Vec<_>>(), [4, 0]);
        }
        assert_eq!(maps.similarity.iter().map(Vec::len).collect::<Vec<_>>(), [4, 0]);
        assert_eq!(maps.attention[2].iter().map(Vec::len).collect::<Vec<_>>(), [4, 0]);
    }
    Ok(())
}

/// Neither the thoughts nor the answer, to the last bit.
#[test]
fn looking_changes_nothing() -> Result {
    let halts = [None, Some(Halt::Drift(0.2)), Some(Halt::Cosine(0.02)), Some(Halt::Kl(0.05))];
    for (window, halt) in [None, Some(3)].into_iter().flat_map(|w| halts.map(|halt| (w, halt))) {
        let config = Config { sliding_window: window, ..tiny::config() };
        let model = tiny::hybrid(&config, 5)?;
        let thinking = Thinking::new(4).span(1..3).refine(Interpolate::new(0.3));
        let thinking = halt.into_iter().fold(thinking, Thinking::halt);
        let text = Texts::new(&config, &[70, 6, 1], 5).packed(model.thought_model())?;
        let seen = |detail| think(model.thought_model(), &thinking.clone().detail(detail), &text);
        let blind = seen(Detail::Drift)?;
        let answer = |detail| {
            let thinking = thinking.clone().rethink_every(3).detail(detail);
            let how = GenerationConfig::default().thinking(thinking).max_tokens(8).top_logprobs(3);
            model.generate(tiny::tokens(&config, 5, 9), &how)
        };
        let unseen = answer(Detail::Drift)?;
        for detail in DETAILS {
            let seen = seen(detail)?;
            assert_identical("thoughts", &seen.z, &blind.z)?;
            assert_identical("first thoughts", &seen.first, &blind.first)?;
            assert_eq!(seen.trace.drift(), blind.trace.drift());
            assert_eq!(seen.trace.halted, blind.trace.halted);
            let answer = answer(detail)?;
            assert_eq!(answer.ids, unseen.ids);
            assert_eq!(answer.top_logprobs, unseen.top_logprobs);
            assert_eq!(answer.traces.len(), unseen.traces.len());
            for trace in &answer.traces {
                let maps = trace.passes.iter().all(|pass| pass.maps.is_some());
                assert_eq!(maps, detail == Detail::Maps);
            }
        }
    }
    Ok(())
}

/// A trace of an answer is that of thinking about its prompt by hand; after thinking again, about
/// all that there was.
#[test]
fn an_answer_has_the_traces_of_its_thoughts() -> Result {
    let model = tiny::hybrid(&tiny::config(), 6)?;
    let ids = tiny::tokens(model.config(), 6, 9);
    let thinking = Thinking::new(3).span(0..2).detail(Detail::Maps).halt(Halt::Drift(0.3));
    let how = GenerationConfig::default().thinking(thinking.clone().rethink_every(4)).max_tokens(9);
    let answer = model.generate(ids.as_slice(), &how)?;
    assert_eq!(answer.traces.len(), 3);
    let mut text = ids;
    for (got, new) in answer.traces.iter().zip(answer.ids.chunks(4)) {
        let mut expected = model.think(text.as_slice(), &how)?.trace;
        let mut got = got.clone();
        for trace in [&mut got, &mut expected] {
            trace.passes.iter_mut().for_each(|pass| pass.seconds = 0.0);
        }
        assert_eq!(got.tokens, text.len());
        let (got, expected) = (serde_json::to_value(got)?, serde_json::to_value(expected)?);
        assert_like("trace", &got, &expected);
        text.extend(new);
    }
    Ok(())
}

/// The same JSON, its numbers up to rounding.
fn assert_like(at: &str, got: &Value, expected: &Value) {
    match (got, expected) {
        (Value::Object(got), Value::Object(expected)) => {
            assert!(got.keys().eq(expected.keys()), "{at}: {got:?} for {expected:?}");
            for (key, got) in got {
                assert_like(&format!("{at}.{key}"), got, &expected[key]);
            }
        }
        (Value::Array(got), Value::Array(expected)) => {
            assert_eq!(got.len(), expected.len(), "{at}");
            for (got, expected) in got.iter().zip(expected) {
                assert_like(at, got, expected);
            }
        }
        (Value::Number(a), Value::Number(b)) => {
            let (a, b) = (a.as_f64().unwrap_or(f64::NAN), b.as_f64().unwrap_or(f64::NAN));
            assert!((a - b).abs() <= 2e-5 + 1e-4 * b.abs(), "{at}: {a} for {b}");
        }
        _ => assert_eq!(got, expected, "{at}"),
    }
}

#[test]
fn a_trace_is_written_as_documented() -> Result {
    let model = tiny::thought_model(&tiny::config(), 7)?;
    let text = Texts::new(model.decoder().config(), &[3, 2], 7).packed(&model)?;
    let trace = think(&model, &Thinking::new(1), &text)?.trace;
    let (drift, seconds) = (trace.passes[0].drift, trace.passes[0].seconds);
    let expected = json!({
        "tokens": 3, "halted": ["cap", "cap"], "first": null,
        "passes": [{"drift": drift, "seconds": seconds, "tokens": null, "maps": null}],
    });
    assert_eq!(serde_json::to_value(&trace)?, expected);

    let still = Thinking::new(1).halt(Halt::Cosine(3.0)).detail(Detail::Maps);
    let trace = think(&model, &still, &text)?.trace;
    let written = serde_json::to_value(&trace)?;
    assert_eq!(written["halted"], json!(["cosine", "cosine"]));
    let first = trace.first.ok_or("no numbers")?;
    let of_first = json!({
        "cosine": first.cosine, "norm": first.norm, "entropy": first.entropy, "kl": first.kl,
    });
    assert_eq!(written["first"], of_first);
    let maps = trace.passes[0].maps.as_ref().ok_or("no maps")?;
    let of_pass = json!({"similarity": maps.similarity, "attention": maps.attention});
    assert_eq!(written["passes"][0]["maps"], of_pass);
    let nothing = think(&model, &Thinking::none(), &text)?.trace;
    let none = json!({"tokens": 3, "halted": [], "first": null, "passes": []});
    assert_eq!(serde_json::to_value(nothing)?, none);
    Ok(())
}

/// A token whose embedding is zero, as that of a padding token often is, has no length to compare with.
#[test]
fn thoughts_of_length_0_are_traced_in_numbers() -> Result {
    let config = tiny::config();
    let mut weights = tiny::weights(&config, 8)?;
    let name = "model.embed_tokens.weight";
    let table = weights.get(name).ok_or("no table")?;
    let zero = table.narrow(0, 0, 1)?.zeros_like()?;
    let table = candle_core::Tensor::cat(&[zero, table.narrow(0, 1, 31)?], 0)?;
    weights.insert(name.to_string(), table);
    let model = ThoughtModel::from(Transformer::new(&config, &mut weights)?);
    let text = EncodedBatch::new(model.decoder(), &[5, 0, 9, 0], Batch::one(4)?)?;
    for weight in [0.0, 0.3, 1.0] {
        let thinking = Thinking::new(2).refine(Interpolate::new(weight)).detail(Detail::Maps);
        let thoughts = think(&model, &thinking, &text)?;
        let drift = thoughts.trace.drift();
        assert!(drift.iter().all(|drift| *drift < 100.0), "{drift:?}");
        assert_eq!(drift[0] == 0.0, weight == 0.0, "{drift:?}");
        let written = serde_json::to_string(&thoughts.trace)?;
        assert_eq!(written.matches("null").count(), 0, "{written}");
        let tokens = thoughts.trace.passes[1].tokens.as_ref().ok_or("no numbers")?;
        let one = |cosine: f32| (cosine - 1.0).abs() < 1e-6;
        assert_eq!(tokens.cosine.concat().iter().all(|it| one(*it)), weight == 0.0);
        let halts = thinking.clone().halt(Halt::Cosine(1e-4));
        let halted = think(&model, &halts, &text)?.trace.halted;
        let expected = if weight == 0.0 { Halted::Cosine } else { Halted::Cap };
        assert_eq!(halted, [expected], "weight {weight}");
    }
    Ok(())
}
