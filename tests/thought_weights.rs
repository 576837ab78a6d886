//! What a checkpoint has learned for its thought passes: further layers, and a gate.

mod common;

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

use candle_core::quantized::GgmlDType;
use candle_core::{DType, Device, Tensor};
use hybrid_attention::load::Checkpoint;
use hybrid_attention::model::{Batch, Pass, Sight};
use hybrid_attention::refine::Interpolate;
use hybrid_attention::thought::{EncodedBatch, HandOff, ThoughtModel, Thoughts};
use hybrid_attention::{Config, Error, GenerationConfig, HybridModel, Thinking};

use common::reference::{Reference, Stream, ThoughtLoop};
use common::tiny;
use common::{
    Result, assert_close, assert_identical, write_consolidated, write_gguf, write_hugging_face,
};

type Weights = BTreeMap<String, Tensor>;

const GATE: &str = "thought.gate";

/// Three layers and a window.
fn config() -> Config {
    Config { sliding_window: Some(5), ..tiny::config() }
}

/// The same with the two thought layers as ordinary ones at the end.
fn five() -> Config {
    Config { num_hidden_layers: 5, ..config() }
}

fn plain_weights(seed: u64) -> Result<Weights> {
    let names: Vec<String> = config().weights().map(|(name, _)| name).collect();
    let all = tiny::weights(&five(), seed)?.into_iter();
    Ok(all.filter(|(name, _)| names.contains(name)).collect())
}

/// Two thought layers, which are layers 3 and 4 of [`five`].
fn with_layers(seed: u64) -> Result<Weights> {
    let mut weights = plain_weights(seed)?;
    for (name, tensor) in tiny::weights(&five(), seed)? {
        for (from, to) in
            [("model.layers.3.", "thought.layers.0."), ("model.layers.4.", "thought.layers.1.")]
        {
            if let Some(rest) = name.strip_prefix(from) {
                weights.insert(format!("{to}{rest}"), tensor.clone());
            }
        }
    }
    Ok(weights)
}

fn gate(seed: u64) -> Result<Tensor> {
    tiny::noise(seed, &[config().hidden_size], 2.0)
}

fn with_gate(mut weights: Weights, seed: u64) -> Result<Weights> {
    weights.insert(GATE.to_string(), gate(seed)?);
    Ok(weights)
}

fn thought_model(weights: &Weights) -> Result<ThoughtModel> {
    let mut weights: HashMap<_, _> = weights.clone().into_iter().collect();
    Ok(ThoughtModel::new(&config(), &mut weights)?)
}

fn hybrid(weights: &Weights) -> Result<HybridModel> {
    Ok(HybridModel::new(thought_model(weights)?, None)?)
}

/// Writes a folder as Hugging Face has it and loads it.
fn load(weights: &Weights) -> Result<HybridModel> {
    let folder = tempfile::tempdir()?;
    write_hugging_face(folder.path(), &config(), weights)?;
    Ok(HybridModel::from_folder(folder.path(), None, &Device::Cpu)?)
}

fn refusal(weights: &Weights) -> Result<Error> {
    let folder = tempfile::tempdir()?;
    write_hugging_face(folder.path(), &config(), weights)?;
    let loaded = HybridModel::from_folder(folder.path(), None, &Device::Cpu);
    Ok(loaded.err().ok_or("it was loaded")?)
}

fn batch() -> Result<Batch> {
    Ok(Batch::ragged(&[9, 6])?.with_context(0, &[0..4, 5..8])?.with_context(1, &[1..3, 3..6])?)
}

fn think(model: &ThoughtModel, thinking: &Thinking, text: &EncodedBatch) -> Result<Thoughts> {
    let mind = thinking.on(model)?;
    let z = mind.encode(text, Pass::Causal(text.batch()))?;
    Ok(mind.think(text, z, |_, _| ())?)
}

const SPANS: [Range<usize>; 3] = [0..3, 1..2, 2..3];

#[test]
fn a_folder_with_thought_weights_loads() -> Result {
    let bare = load(&plain_weights(1)?)?;
    assert_eq!(bare.thought_model().thought_layers(), 0);
    assert!(bare.thought_model().thought_gate().is_none());

    let model = load(&with_gate(with_layers(1)?, 1)?)?;
    assert_eq!(model.thought_model().thought_layers(), 2);
    let loaded = model.thought_model().thought_gate().ok_or("no gate")?;
    assert_identical(GATE, loaded, &gate(1)?)?;
    assert_eq!(model.transformer().all_layers(), 0..3);

    let mut one = with_layers(1)?;
    one.retain(|name, _| !name.starts_with("thought.layers.1."));
    assert_eq!(load(&one)?.thought_model().thought_layers(), 1);
    let only = load(&with_gate(plain_weights(1)?, 1)?)?;
    assert_eq!(only.thought_model().thought_layers(), 0);
    assert!(only.thought_model().thought_gate().is_some());
    Ok(())
}

/// The span, then the same two blocks as a model that has them as its last layers.
#[test]
fn a_pass_goes_on_through_the_thought_layers() -> Result {
    let model = load(&with_layers(2)?)?;
    let model = model.thought_model();
    let longer = tiny::transformer(&five(), 2)?;
    let batch = batch()?;
    let text = tiny::text(model.decoder(), &batch, 2)?;
    let z = tiny::noise(2, &[15, 16], 1.0)?;
    for sight in [Sight::Bidirectional, Sight::Causal] {
        let pass = || Pass::uncached(&batch, sight);
        for span in SPANS {
            let thinking = Thinking::new(1).span(span.clone()).sight(sight);
            let h = thinking.on(model)?.think_once(&z, &batch)?;
            let of_span = longer.forward(&z, span, pass())?;
            let expected = longer.forward(&of_span, 3..5, pass())?;
            assert_identical("a pass", &h, &expected)?;
            let direct = model.forward_thought_layers(&of_span, &batch, sight)?;
            assert_identical("the layers alone", &direct, &expected)?;
        }
    }
    // What is read causally for the decoder, and to see what it would say, is the model's own.
    let thoughts = think(model, &Thinking::new(2), &text)?;
    let thinking = Thinking::new(2);
    let h = thinking.on(model)?.hand_off(&text, &thoughts, Pass::Causal(&batch))?;
    assert_identical("hand-off", &h, &longer.forward(&thoughts.z, 0..3, Pass::Causal(&batch))?)
}

#[test]
fn thinking_with_them_is_what_loops_make_of_it() -> Result {
    let (ids, segments) = (tiny::tokens(&config(), 3, 9), [0..4, 5..8]);
    let batch = Batch::one(9)?.with_context(0, &segments)?;
    for (weights, thought_layers, gated) in [
        (with_layers(3)?, 2, false),
        (with_gate(with_layers(3)?, 3)?, 2, true),
        (with_gate(plain_weights(3)?, 3)?, 0, true),
    ] {
        let model = load(&weights)?;
        let model = model.thought_model();
        let all: HashMap<_, _> = weights.into_iter().collect();
        let reference = Reference::new(&config(), &all)?;
        let text = EncodedBatch::new(model.decoder(), &ids, batch.clone())?;
        for span in SPANS {
            // Without a gate: damped, over three passes.
            let share = match gated {
                true => {
                    let gate = gate(3)?.to_dtype(DType::F64)?.to_vec1::<f64>()?;
                    gate.into_iter().map(|gate| 1.0 / (1.0 + (-gate).exp())).collect()
                }
                false => vec![1.0 / 3.0; 16],
            };
            let by_loops = ThoughtLoop {
                reference: &reference,
                span: span.clone(),
                segments: &segments,
                both_ways: true,
                thought_layers,
                share,
            };
            let first = by_loops.encode(&ids);
            let expected: Stream = (0..3).fold(first, |z, _| by_loops.pass(&z).0);
            let expected = Tensor::new(expected, &Device::Cpu)?.to_dtype(DType::F32)?;
            let z = think(model, &Thinking::new(3).span(span.clone()), &text)?.z;
            let name = format!("{thought_layers} layers, gated {gated}, {span:?}");
            assert_close(&name, &z, &expected, 1e-5)?;
        }
    }
    Ok(())
}

/// As a checkpoint begins to be trained: blocks whose output projections are zero add nothing.
#[test]
fn layers_of_zero_output_change_nothing() -> Result {
    let mut weights = with_layers(4)?;
    for (name, tensor) in &mut weights {
        let output = name.ends_with("o_proj.weight") || name.ends_with("down_proj.weight");
        if name.starts_with("thought.") && output {
            *tensor = tensor.zeros_like()?;
        }
    }
    let (model, bare) = (load(&weights)?, load(&plain_weights(4)?)?);
    assert_eq!(model.thought_model().thought_layers(), 2);
    let text = tiny::text(model.transformer(), &batch()?, 4)?;
    let prompt = tiny::tokens(&config(), 4, 12);
    for span in SPANS {
        let thinking = Thinking::new(3).span(span.clone());
        let got = think(model.thought_model(), &thinking, &text)?;
        let expected = think(bare.thought_model(), &thinking, &text)?;
        assert_identical("thoughts", &got.z, &expected.z)?;
        assert_eq!(got.trace.drift(), expected.trace.drift());
        let how = GenerationConfig::default().thinking(thinking).max_tokens(5);
        let (got, expected) =
            (model.generate(prompt.as_slice(), &how)?, bare.generate(prompt.as_slice(), &how)?);
        assert_eq!((got.ids, got.logprobs), (expected.ids, expected.logprobs));
    }
    Ok(())
}

/// Not to the last bit, except where passes are run.
#[test]
fn without_passes_they_are_not_there() -> Result {
    let (model, bare) = (hybrid(&with_gate(with_layers(5)?, 5)?)?, hybrid(&plain_weights(5)?)?);
    let prompt = tiny::tokens(&config(), 5, 12);
    let how = GenerationConfig::default().max_tokens(8).top_logprobs(3).prompt_logprobs(true);
    let expected = bare.generate(prompt.as_slice(), &how)?;
    for how in [how.clone(), how.clone().thinking(Thinking::new(0).span(1..2))] {
        let plain = model.generate(prompt.as_slice(), &how)?;
        assert_eq!(plain.ids, expected.ids);
        assert_eq!(plain.top_logprobs, expected.top_logprobs);
        assert_eq!(plain.prompt_logprobs, expected.prompt_logprobs);
    }
    let weighted = Thinking::new(2).refine(Interpolate::new(0.5));
    let how = how.thinking(weighted);
    let (one, other) = (model.generate(prompt.as_slice(), &how)?, bare.generate(prompt, &how)?);
    assert_ne!(one.logprobs, other.logprobs);
    Ok(())
}

/// A folder of Mistral's own layout, and a GGUF file: names and rows of thought weights stay as
/// Hugging Face has them.
#[test]
fn every_kind_of_checkpoint_holds_them() -> Result {
    let weights = with_gate(with_layers(6)?, 6)?;
    let folder = tempfile::tempdir()?;
    write_consolidated(folder.path(), &config(), &weights)?;
    let file = folder.path().join("model.gguf");
    write_gguf(&file, &config(), &weights, GgmlDType::F32)?;
    let text = tiny::text(thought_model(&weights)?.decoder(), &batch()?, 6)?;
    let expected = think(&thought_model(&weights)?, &Thinking::new(2).span(1..3), &text)?;
    for model in [
        HybridModel::from_folder(folder.path(), None, &Device::Cpu)?,
        HybridModel::from_gguf(&file, None, &Device::Cpu)?,
    ] {
        assert_eq!(model.thought_model().thought_layers(), 2);
        let got = think(model.thought_model(), &Thinking::new(2).span(1..3), &text)?;
        assert_identical("thoughts", &got.z, &expected.z)?;
    }
    Ok(())
}

/// In half precision and as blocks, too.
#[test]
fn they_may_be_stored_in_any_type() -> Result {
    let sizes = Config { hidden_size: 32, intermediate_size: 64, head_dim: 8, ..config() };
    let wide = Config { num_hidden_layers: 4, ..sizes.clone() };
    let mut weights: Weights = tiny::weights(&wide, 7)?.into_iter().collect();
    for name in weights.keys().cloned().collect::<Vec<_>>() {
        if let Some(rest) = name.strip_prefix("model.layers.3.") {
            let tensor = weights.remove(&name).ok_or("gone")?;
            weights.insert(format!("thought.layers.0.{rest}"), tensor);
        }
    }
    weights.insert(GATE.to_string(), tiny::noise(7, &[32], 2.0)?);
    let folder = tempfile::tempdir()?;
    let text = tiny::text(&tiny::transformer(&sizes, 7)?, &batch()?, 7)?;
    let thinking = Thinking::new(2);
    let mut thoughts = Vec::new();
    let halved = weights.iter().map(|(name, it)| Ok((name.clone(), it.to_dtype(DType::BF16)?)));
    write_hugging_face(folder.path(), &sizes, &halved.collect::<Result<_>>()?)?;
    for dtype in [None, Some(DType::F32), Some(DType::F16)] {
        let model = HybridModel::from_folder(folder.path(), dtype, &Device::Cpu)?;
        thoughts.push(think(model.thought_model(), &thinking, &text)?.z);
    }
    let file = folder.path().join("model.gguf");
    write_gguf(&file, &sizes, &weights, GgmlDType::Q8_0)?;
    let model = HybridModel::from_gguf(&file, None, &Device::Cpu)?;
    thoughts.push(think(model.thought_model(), &thinking, &text)?.z);
    let mut memory: HashMap<_, _> = weights.into_iter().collect();
    let expected = think(&ThoughtModel::new(&sizes, &mut memory)?, &thinking, &text)?.z;
    for z in thoughts {
        assert_close("thoughts", &z, &expected, 0.05)?;
    }
    Ok(())
}

#[test]
fn progress_reaches_the_end() -> Result {
    let folder = tempfile::tempdir()?;
    let weights = with_gate(with_layers(8)?, 8)?;
    write_hugging_face(folder.path(), &config(), &weights)?;
    let told = RefCell::new(Vec::new());
    let checkpoint = Checkpoint::open(folder.path())?;
    HybridModel::from_checkpoint(&checkpoint, None, &Device::Cpu, |done, total| {
        told.borrow_mut().push((done, total));
    })?;
    let told = told.into_inner();
    let bytes: usize = weights.values().map(|tensor| 4 * tensor.elem_count()).sum();
    assert!(told.iter().all(|(_, total)| *total == bytes as u64), "{told:?} of {bytes}");
    assert!(told.windows(2).all(|pair| pair[0].0 <= pair[1].0), "{told:?}");
    // Once for every weight, and once more when all are judged.
    assert_eq!(told.len(), weights.len() + 1);
    let whole = (bytes as u64, bytes as u64);
    assert_eq!(told[told.len() - 2..], [whole, whole]);
    Ok(())
}

// ---- the gate ----

#[test]
fn the_gate_is_taken_unless_something_else_is_asked_for() -> Result {
    let (gated, bare) =
        (thought_model(&with_gate(plain_weights(9)?, 9)?)?, thought_model(&plain_weights(9)?)?);
    let text = tiny::text(gated.decoder(), &batch()?, 9)?;
    let default = think(&gated, &Thinking::new(3), &text)?.z;
    let asked = think(&gated, &Thinking::new(3).refine(Interpolate::gated()), &text)?.z;
    assert_identical("the default", &default, &asked)?;
    for refine in [Interpolate::damped(), Interpolate::new(0.2)] {
        let thinking = Thinking::new(3).refine(refine.clone());
        let (one, other) = (think(&gated, &thinking, &text)?.z, think(&bare, &thinking, &text)?.z);
        assert_identical(&format!("{refine:?}"), &one, &other)?;
        let apart = (&one - &default)?.abs()?.max_all()?.to_scalar::<f32>()?;
        assert!(apart > 1e-2, "{apart}");
    }
    let damped = think(&bare, &Thinking::new(3).refine(Interpolate::damped()), &text)?.z;
    assert_identical("without a gate", &think(&bare, &Thinking::new(3), &text)?.z, &damped)
}

#[test]
fn a_gate_that_is_not_there_is_named() -> Result {
    let model = hybrid(&with_layers(10)?)?;
    let how = GenerationConfig::default().thinking(Thinking::new(1).refine(Interpolate::gated()));
    let error = model.generate([1, 2, 3], &how).err().ok_or("generated")?.to_string();
    assert!(error.contains("the checkpoint has no thought.gate"), "{error}");
    Ok(())
}

// ---- what is refused ----

#[test]
fn a_missing_weight_of_a_thought_layer_is_named() -> Result {
    let weights = with_layers(11)?;
    let of_layers = weights.keys().filter(|name| name.starts_with("thought.layers.1."));
    let mut count = 0;
    for name in of_layers {
        let mut weights = weights.clone();
        weights.remove(name);
        match refusal(&weights)? {
            Error::MissingWeight { name: missing, .. } => assert_eq!(missing, *name),
            other => return Err(format!("without {name}: {other}").into()),
        }
        count += 1;
    }
    assert_eq!(count, 9);
    Ok(())
}

#[test]
fn what_would_stay_unused_is_refused() -> Result {
    let renamed = |from: &str, to: &str| -> Result<Weights> {
        let moved = |(name, tensor): (String, Tensor)| match name.strip_prefix(from) {
            Some(rest) => (format!("{to}{rest}"), tensor),
            None => (name, tensor),
        };
        Ok(with_layers(12)?.into_iter().map(moved).collect())
    };
    let with = |name: &str| -> Result<Weights> {
        let mut weights = with_layers(12)?;
        weights.insert(name.to_string(), gate(12)?);
        Ok(weights)
    };
    for (weights, expected) in [
        (
            renamed("thought.layers.1.", "thought.layers.2.")?,
            "thought.layers.2.input_layernorm.weight",
        ),
        (
            renamed("thought.layers.0.", "thought.layers.-1.")?,
            "thought.layers.-1.input_layernorm.weight",
        ),
        (
            renamed("thought.layers.1.", "thought.layers.01.")?,
            "thought.layers.01.input_layernorm.weight",
        ),
        (with("thought.norm.weight")?, "thought.norm.weight"),
        (with("thought.gates")?, "thought.gates"),
        (with("thought.layers.0.self_attn.q_proj.bias")?, "thought.layers.0.self_attn.q_proj.bias"),
        (with("thought.layers.weight")?, "thought.layers.weight"),
    ] {
        match refusal(&weights)? {
            Error::UnusedWeight { name, reason, place } => {
                assert_eq!(name, expected);
                assert!(reason.contains("thought.gate and thought.layers.0, 1, .."), "{reason}");
                assert!(place.ends_with("model.safetensors"), "{place}");
            }
            other => return Err(format!("{expected}: {other}").into()),
        }
    }
    Ok(())
}

#[test]
fn wrong_shapes_types_and_values_are_refused() -> Result {
    let with = |name: &str, tensor: Tensor| -> Result<Error> {
        let mut weights = with_gate(with_layers(13)?, 13)?;
        assert!(weights.insert(name.to_string(), tensor).is_some(), "{name}");
        refusal(&weights)
    };
    let zeros = |shape: &[usize]| Tensor::zeros(shape, DType::F32, &Device::Cpu);
    let q_proj = "thought.layers.1.self_attn.q_proj.weight";
    for (name, shape, expected) in [
        (GATE, vec![15], vec![16]),
        (GATE, vec![1, 16], vec![16]),
        (q_proj, vec![24, 15], vec![24, 16]),
        (q_proj, vec![16, 24], vec![24, 16]),
        ("thought.layers.0.input_layernorm.weight", vec![17], vec![16]),
    ] {
        match with(name, zeros(&shape)?)? {
            Error::WeightShape { name: of, expected: wanted, got, .. } => {
                assert_eq!((of.as_str(), wanted, got), (name, expected, shape));
            }
            other => return Err(format!("{name}: {other}").into()),
        }
    }
    let mut values = vec![0f32; 16];
    for bad in [f32::NAN, f32::INFINITY] {
        values[11] = bad;
        match with(GATE, Tensor::new(values.as_slice(), &Device::Cpu)?)? {
            Error::WeightValue { name, index, got, .. } => {
                assert_eq!((name.as_str(), index), (GATE, 11));
                assert_eq!(got.to_bits(), bad.to_bits());
            }
            other => return Err(format!("{bad}: {other}").into()),
        }
    }
    match with(GATE, Tensor::zeros(16, DType::U32, &Device::Cpu)?)? {
        Error::WeightDType { name, .. } => assert_eq!(name, GATE),
        other => return Err(other.into()),
    }
    Ok(())
}

// ---- the vocabulary head ----

/// A pass never runs it: thoughts are finite over a head that holds NaN, and none of what only
/// looks at them needs it either; what reads them for the next token does.
#[test]
fn a_pass_never_runs_the_head() -> Result {
    let mut weights = with_gate(with_layers(14)?, 14)?;
    let head = weights.get("lm_head.weight").ok_or("no head")?;
    let nan = Tensor::full(f32::NAN, head.shape(), &Device::Cpu)?;
    weights.insert("lm_head.weight".to_string(), nan);
    let model = thought_model(&weights)?;
    let text = tiny::text(model.decoder(), &batch()?, 14)?;
    for hand_off in [HandOff::Refined, HandOff::KeyValue, HandOff::Mixed { weight: 0.5 }] {
        for span in SPANS {
            let thinking = Thinking::new(3).span(span).hand_off(hand_off);
            let thoughts = think(&model, &thinking, &text)?;
            assert!(thoughts.trace.drift().iter().all(|drift| drift.is_finite() && *drift > 0.0));
            let mind = thinking.on(&model)?;
            let h = mind.hand_off(&text, &thoughts, Pass::Causal(text.batch()))?;
            for xs in [&thoughts.z, &h] {
                let sum = xs.abs()?.sum_all()?.to_scalar::<f32>()?;
                assert!(sum.is_finite() && sum > 0.0, "{hand_off:?}: {sum}");
            }
            assert!(model.decoder().logits(&h)?.sum_all()?.to_scalar::<f32>()?.is_nan());
        }
    }
    Ok(())
}
