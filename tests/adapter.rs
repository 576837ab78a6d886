//! Low-rank adapters: what peft computes with the same files, what plain weights compute that have the
//! same change in them, and one set of weights with a mind of its own for thinking.

#![allow(clippy::print_stderr, reason = "the largest deviation is worth seeing")]

mod common;

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use candle_core::backprop::GradStore;
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor, Var};
use hybrid_attention::adapter::{Adapter, AdapterConfig, AdapterScope};
use hybrid_attention::model::{Batch, KvCache, Linear, Pass, Sight, Transformer, Weights};
use hybrid_attention::refine::Interpolate;
use hybrid_attention::thought::{Detail, EncodedBatch, HandOff, ThoughtModel, Thoughts};
use hybrid_attention::{Config, EmbedConfig, Error, GenerationConfig, HybridModel, Thinking};
use proptest::prelude::*;
use serde_json::{Value, json};
use tempfile::TempDir;

use common::gradient::scalar;
use common::reference::{ByDefinition, Reference, ThoughtLoop};
use common::tiny::{self, holds};
use common::{Result, assert_close, assert_identical, fixture};

const PROJECTIONS: [&str; 7] =
    ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"];

const HAND_OFFS: [HandOff; 3] =
    [HandOff::Refined, HandOff::KeyValue, HandOff::Mixed { weight: 0.4 }];

const SCOPES: [AdapterScope; 3] =
    [AdapterScope::Thinking, AdapterScope::Decoding, AdapterScope::Both];

type Tensors = HashMap<String, Tensor>;

/// An adapter of every projection and of the head, for each rank and scale a little different.
fn everywhere() -> AdapterConfig {
    AdapterConfig::rank(3)
        .alpha(4.0)
        .target_modules(PROJECTIONS.iter().chain(&["lm_head"]).copied())
        .rank_pattern(r"layers\.1\..*", 2)
        .alpha_pattern("layers.0.mlp.up_proj", 1.5)
}

/// An adapter whose `B` is not zero, as after training.
fn trained(config: &Config, how: &AdapterConfig, seed: u64) -> Result<Adapter> {
    let adapter = Adapter::new(config, how, seed, &Device::Cpu)?.trainable()?;
    for (index, variable) in adapter.variables()?.iter().enumerate().skip(1).step_by(2) {
        variable.set(&tiny::noise(seed * 100 + index as u64, variable.dims(), 0.3)?)?;
    }
    Ok(adapter)
}

/// `W + scale · B A`, matrix by matrix.
fn added(weights: &Tensors, adapter: &Adapter, scale: impl Fn(&str) -> f64) -> Result<Tensors> {
    let halves: HashMap<String, &Tensor> = adapter.tensors().collect();
    let mut weights = weights.clone();
    for (name, a) in halves.iter().filter(|(name, _)| name.contains(".lora_A.")) {
        let b = halves[&name.replace(".lora_A.", ".lora_B.")];
        let name = name.replace("base_model.model.", "").replace(".lora_A.", ".");
        let change = (b.detach().matmul(&a.detach())? * scale(&name))?;
        let base = weights.get(&name).or(weights.get("model.embed_tokens.weight"));
        let base = base.ok_or("no such weight")?;
        let sum = (base.to_dtype(DType::F32)? + change)?.to_dtype(base.dtype())?;
        weights.insert(name, sum);
    }
    Ok(weights)
}

/// The scales of [`everywhere`].
fn scale_everywhere(name: &str) -> f64 {
    let rank = if name.contains("layers.1.") { 2.0 } else { 3.0 };
    let alpha = if name.contains("layers.0.mlp.up_proj") { 1.5 } else { 4.0 };
    alpha / rank
}

fn plus(weights: &Tensors, adapter: &Adapter) -> Result<Tensors> {
    added(weights, adapter, scale_everywhere)
}

fn build(config: &Config, weights: &Tensors) -> Result<Transformer> {
    Ok(Transformer::new(config, &mut weights.clone())?)
}

fn build_thinking(config: &Config, weights: &Tensors) -> Result<ThoughtModel> {
    Ok(ThoughtModel::new(config, &mut weights.clone())?)
}

/// The logits of a causal reading.
fn causal(model: &Transformer, ids: &[u32]) -> Result<Tensor> {
    tiny::logits(model, &tiny::embed(model, ids)?, Pass::Causal(&Batch::one(ids.len())?))
}

fn think(model: &ThoughtModel, thinking: &Thinking, text: &EncodedBatch) -> Result<Thoughts> {
    let mind = thinking.on(model)?;
    let z = mind.encode(text, Pass::Causal(text.batch()))?;
    Ok(mind.think(text, z, |_, _| ())?)
}

fn apart(a: &Tensor, b: &Tensor) -> Result<bool> {
    Ok((a - b)?.abs()?.max_all()?.to_scalar::<f32>()? > 1e-3)
}

// ---- what peft computes ----

const CASES: [&str; 3] = ["causal_lm", "rslora", "base_model"];

fn fixture_base() -> Result<HybridModel> {
    Ok(HybridModel::from_folder(fixture("adapter"), None, &Device::Cpu)?)
}

fn fixture_adapter(name: &str) -> Result<Adapter> {
    Ok(Adapter::from_folder(fixture("adapter").join(name), &Device::Cpu)?)
}

fn golden(name: &str) -> Result<Tensors> {
    let path = fixture("adapter").join(name).join("golden.safetensors");
    Ok(candle_core::safetensors::load(path, &Device::Cpu)?)
}

#[test]
fn loaded_output_is_pefts() -> Result {
    let base = fixture_base()?;
    let base = base.transformer();
    for name in CASES {
        let (adapter, golden) = (fixture_adapter(name)?, golden(name)?);
        let ids = golden["input_ids"].to_dtype(DType::U32)?;
        let batch = Batch::one(ids.dim(1)?)?;
        for (how, model) in
            [("adapted", base.adapted(&adapter)?), ("merged", base.merged(&adapter)?)]
        {
            let xs = model.embed(&ids)?;
            let causal = model.forward(&xs, model.all_layers(), Pass::Causal(&batch))?;
            let both = model.forward(&xs, model.all_layers(), Pass::Bidirectional(&batch))?;
            let mut found = vec![
                ("causal.hidden", model.norm(&causal)?),
                ("bidirectional.hidden", model.norm(&both)?),
            ];
            if golden.contains_key("causal.logits") {
                found.push(("causal.logits", model.logits(&causal)?));
                found.push(("merged.logits", model.logits(&causal)?));
            }
            for (what, found) in found {
                let largest = |xs: &Tensor| xs.abs()?.max_all()?.to_scalar::<f32>();
                let off = largest(&(&found - &golden[what])?)? / largest(&golden[what])?;
                eprintln!("{name}, {how}, {what}: off by {off:.1e}");
                assert_close(&format!("{name}, {how}, {what}"), &found, &golden[what], 1e-5)?;
            }
        }
        // The bare model says something else.
        let plain = tiny::embed(base, &ids.flatten_all()?.to_vec1::<u32>()?)?;
        let plain = base.forward(&plain, base.all_layers(), Pass::Causal(&batch))?;
        assert!(apart(&base.norm(&plain)?, &golden["causal.hidden"])?, "{name} changes nothing");
    }
    Ok(())
}

/// What is saved has peft's names and shapes, and is the same when it is loaded again.
#[test]
fn saved_and_loaded_it_is_the_same() -> Result {
    for name in CASES {
        let adapter = fixture_adapter(name)?;
        let folder = tempfile::tempdir()?;
        let path = folder.path().join("new").join("folder");
        adapter.save(&path)?;
        let theirs = fixture("adapter").join(name).join("adapter_model.safetensors");
        let theirs = candle_core::safetensors::load(theirs, &Device::Cpu)?;
        let ours =
            candle_core::safetensors::load(path.join("adapter_model.safetensors"), &Device::Cpu)?;
        let shapes = |tensors: &Tensors| -> BTreeMap<String, Vec<usize>> {
            tensors.iter().map(|(name, it)| (name.clone(), it.dims().to_vec())).collect()
        };
        assert_eq!(shapes(&ours), shapes(&theirs), "{name}");
        for (name, tensor) in &theirs {
            assert_identical(name, &ours[name], &tensor.to_dtype(DType::F32)?)?;
        }
        let config = |path: &Path| -> Result<Value> {
            Ok(serde_json::from_str(&fs::read_to_string(path.join("adapter_config.json"))?)?)
        };
        let (written, read) = (config(&path)?, config(&fixture("adapter").join(name))?);
        for field in [
            "peft_type",
            "task_type",
            "r",
            "lora_alpha",
            "use_rslora",
            "target_modules",
            "bias",
            "rank_pattern",
            "alpha_pattern",
            "fan_in_fan_out",
            "inference_mode",
            "lora_dropout",
        ] {
            assert_eq!(written[field], read[field], "{name}: {field}");
        }

        let again = Adapter::from_folder(&path, &Device::Cpu)?;
        assert_eq!(again.config(), adapter.config());
        assert!(again.thought_gate().is_none());
        for ((name, one), (again, other)) in adapter.tensors().zip(again.tensors()) {
            assert_eq!(name, again);
            assert_identical(&name, one, other)?;
        }
        assert_eq!(again.tensors().count(), adapter.tensors().count());
    }
    Ok(())
}

#[test]
fn a_gate_stands_beside_the_adapter() -> Result {
    let config = tiny::config();
    let folder = tempfile::tempdir()?;
    let bare = trained(&config, &everywhere(), 1)?;
    let gate = tiny::noise(1, &[16], 1.0)?;
    bare.clone().with_thought_gate(&gate)?.save(&folder)?;
    let loaded = Adapter::from_folder(&folder, &Device::Cpu)?;
    assert_identical("gate", loaded.thought_gate().ok_or("no gate")?, &gate)?;

    // It is the thinker's, and nobody else's.
    let mut weights = tiny::weights(&config, 1)?;
    weights.insert("thought.gate".into(), tiny::noise(2, &[16], 1.0)?);
    let base = build_thinking(&config, &weights)?;
    let gate_of = |model: &ThoughtModel| -> Result<Tensor> {
        Ok(model.thought_gate().ok_or("no gate")?.clone())
    };
    for scope in [AdapterScope::Thinking, AdapterScope::Both] {
        assert_identical("new", &gate_of(&base.adapted(&loaded, scope)?)?, &gate)?;
    }
    assert_identical("merged", &gate_of(&base.merged(&loaded)?)?, &gate)?;
    let decoding = base.adapted(&loaded, AdapterScope::Decoding)?;
    assert_identical("old", &gate_of(&decoding)?, &weights["thought.gate"])?;
    for scope in SCOPES {
        assert_identical("old", &gate_of(&base.adapted(&bare, scope)?)?, &weights["thought.gate"])?;
    }

    // One that was there before does not stay beside an adapter without.
    bare.save(&folder)?;
    assert!(Adapter::from_folder(&folder, &Device::Cpu)?.thought_gate().is_none());
    let mut names: Vec<_> = fs::read_dir(&folder)?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<Result<_>>()?;
    names.sort();
    assert_eq!(names, ["adapter_config.json", "adapter_model.safetensors"]);

    let error = bare.clone().with_thought_gate(&gate.unsqueeze(0)?).err().ok_or("taken")?;
    assert!(matches!(error, Error::Parameter { name: "thought.gate", .. }), "{error}");
    let wrong = bare.with_thought_gate(&tiny::noise(1, &[15], 1.0)?)?;
    for taken in [base.adapted(&wrong, AdapterScope::Both), base.merged(&wrong)] {
        let error = taken.err().ok_or("taken")?;
        assert!(
            matches!(&error, Error::WeightShape { name, .. } if name == "thought.gate"),
            "{error}"
        );
    }
    Ok(())
}

/// A folder in the way, and one that nothing can be written to.
#[test]
fn what_cannot_be_saved_is_an_error() -> Result {
    let adapter = Adapter::new(&tiny::config(), &AdapterConfig::default(), 1, &Device::Cpu)?;
    let folder = tempfile::tempdir()?;
    fs::write(folder.path().join("file"), "")?;
    assert!(matches!(adapter.save(folder.path().join("file")), Err(Error::Io { .. })));
    fs::create_dir_all(folder.path().join("adapter_model.safetensors").join("in the way"))?;
    assert!(matches!(adapter.save(&folder), Err(Error::Io { .. })));
    assert_eq!(fs::read_dir(&folder)?.count(), 2, "a part is left behind");
    fs::remove_dir_all(folder.path().join("adapter_model.safetensors"))?;
    fs::create_dir_all(folder.path().join("thought.safetensors"))?;
    assert!(matches!(adapter.save(&folder), Err(Error::Io { .. })));
    Ok(())
}

// ---- new ones ----

#[test]
fn a_new_adapter_changes_nothing_yet() -> Result {
    let config = tiny::config();
    let base = tiny::transformer(&config, 3)?;
    let adapter = Adapter::new(&config, &everywhere(), 3, &Device::Cpu)?;
    let ids = tiny::tokens(&config, 3, 7);
    assert_close("logits", &causal(&base.adapted(&adapter)?, &ids)?, &causal(&base, &ids)?, 0.0)?;

    let count = adapter.tensors().count();
    assert_eq!(count, 2 * (3 * 7 + 1));
    for (name, tensor) in adapter.tensors() {
        let rank = if name.contains("layers.1.") { 2 } else { 3 };
        let largest = tensor.abs()?.max_all()?.to_scalar::<f32>()?;
        if name.contains("lora_A") {
            let reach = 1.0 / (tensor.dim(1)? as f32).sqrt();
            assert_eq!(tensor.dim(0)?, rank, "{name}");
            assert!(largest <= reach && largest > 0.7 * reach, "{name}: {largest} of {reach}");
        } else {
            assert_eq!((tensor.dim(1)?, largest), (rank, 0.0), "{name}");
        }
    }
    // The same seed gives the same one.
    let again = Adapter::new(&config, &everywhere(), 3, &Device::Cpu)?;
    let other = Adapter::new(&config, &everywhere(), 4, &Device::Cpu)?;
    for (((name, one), (_, same)), (_, other)) in
        adapter.tensors().zip(again.tensors()).zip(other.tensors())
    {
        assert_identical(&name, one, same)?;
        assert!(name.contains("lora_B") || apart(one, other)?, "{name}");
    }
    assert!(adapter.variables()?.is_empty());
    let trainable = adapter.clone().with_thought_gate(&tiny::noise(1, &[16], 1.0)?)?.trainable()?;
    assert_eq!(trainable.variables()?.len(), count + 1);
    Ok(())
}

#[test]
fn modules_are_chosen_as_peft_chooses_them() -> Result {
    let config = tiny::config();
    let names = |how: AdapterConfig| -> Result<Vec<String>> {
        let adapter = Adapter::new(&config, &how, 1, &Device::Cpu)?;
        let names = adapter.tensors().filter_map(|(name, _)| {
            let name = name.strip_prefix("base_model.model.")?.strip_suffix(".lora_A.weight")?;
            Some(name.to_string())
        });
        Ok(names.collect())
    };
    let default = AdapterConfig::default();
    let each = |names: &[&str]| -> Vec<String> {
        (0..3).flat_map(|i| names.iter().map(move |n| format!("model.layers.{i}.{n}"))).collect()
    };
    assert_eq!(names(default.clone())?, each(&["self_attn.q_proj", "self_attn.v_proj"]));
    let one = default.clone().target_modules(["layers.1.mlp.up_proj", "lm_head"]);
    assert_eq!(names(one)?, ["lm_head", "model.layers.1.mlp.up_proj"]);
    let two = default.clone().target_modules(["o_proj"]).layers_to_transform([0, 2]);
    let expected = ["model.layers.0.self_attn.o_proj", "model.layers.2.self_attn.o_proj"];
    assert_eq!(names(two)?, expected);

    let from = |fields: Value| -> Result<AdapterConfig> {
        let mut all = json!({"peft_type": "LORA", "r": 2, "lora_alpha": 2});
        if let (Some(all), Some(fields)) = (all.as_object_mut(), fields.as_object()) {
            all.extend(fields.clone());
        }
        Ok(AdapterConfig::from_json(&all.to_string())?)
    };
    for (fields, expected) in [
        (json!({}), each(&["self_attn.q_proj", "self_attn.v_proj"])),
        (json!({"target_modules": null}), each(&["self_attn.q_proj", "self_attn.v_proj"])),
        (
            json!({"target_modules": "all-linear", "exclude_modules": ["mlp.up_proj", "o_proj"]}),
            each(&[
                "mlp.down_proj",
                "mlp.gate_proj",
                "self_attn.k_proj",
                "self_attn.q_proj",
                "self_attn.v_proj",
            ]),
        ),
        (
            json!({"target_modules": r".*\.(q|k)_proj", "exclude_modules": r".*\.0\..*"}),
            each(&["self_attn.k_proj", "self_attn.q_proj"]).split_off(2),
        ),
        (
            json!({"target_modules": ["q_proj"], "layers_to_transform": 1, "layers_pattern": "layers"}),
            vec!["model.layers.1.self_attn.q_proj".to_string()],
        ),
        (
            json!({"target_modules": ["q_proj"], "layers_to_transform": []}),
            each(&["self_attn.q_proj"]),
        ),
    ] {
        assert_eq!(names(from(fields.clone())?)?, expected, "{fields}");
    }
    // The first pattern that matches counts, in the order of the file; and that order is kept.
    let text = r#"{"peft_type": "LORA", "r": 8, "target_modules": ["q_proj", "k_proj"],
        "rank_pattern": {"q_proj": 2, ".*": 1, "k_proj": 7}}"#;
    let how = AdapterConfig::from_json(text)?;
    for how in [AdapterConfig::from_json(&how.to_json())?, how] {
        let adapter = Adapter::new(&config, &how, 1, &Device::Cpu)?;
        for (name, tensor) in adapter.tensors().filter(|(name, _)| name.contains("lora_A")) {
            assert_eq!(tensor.dim(0)?, if name.contains("q_proj") { 2 } else { 1 }, "{name}");
        }
    }
    let named = AdapterConfig::default().base_model("a/b").use_rslora(true).to_json();
    let named: Value = serde_json::from_str(&named)?;
    assert_eq!(
        (&named["base_model_name_or_path"], &named["use_rslora"]),
        (&json!("a/b"), &json!(true))
    );
    Ok(())
}

#[test]
fn settings_that_make_no_adapter_are_errors() -> Result {
    let config = tiny::config();
    let how = AdapterConfig::default;
    let none: [&str; 0] = [];
    for (how, expected) in [
        (AdapterConfig::rank(0), "config field r: expected 1 to 2147483647, got 0"),
        (AdapterConfig::rank(usize::MAX), "config field r: expected 1 to 2147483647"),
        (
            AdapterConfig::rank(17),
            "parameter r: expected at most 16, the larger side of model.layers.0",
        ),
        (how().rank_pattern("q_proj", 0), "config field rank_pattern: expected 1 to"),
        (how().alpha(f64::NAN), "config field lora_alpha: expected a number that is finite in f32"),
        (how().alpha(1e300), "config field lora_alpha"),
        (how().alpha_pattern("q_proj", f64::INFINITY), "config field alpha_pattern"),
        (how().target_modules(none), "config field target_modules: expected at least one"),
        (how().target_modules(["q_proj", "c_attn"]), "parameter target_modules: expected ends of"),
        (how().target_modules(["embed_tokens"]), "got embed_tokens"),
        (how().layers_to_transform([7]), "expected at least one projection of the model, got none"),
        (how().rank_pattern("(?=q)", 2), "unsupported adapter field rank_pattern"),
        (
            how().alpha_pattern("((a{99}){99}){99}", 2.0),
            "config field alpha_pattern: expected regular expressions that compile to at most",
        ),
        (
            how().rank_pattern("q_proj)|(.*", 2),
            "unsupported adapter field rank_pattern: the regular expression q_proj)|(.*",
        ),
    ] {
        let made = Adapter::new(&config, &how, 1, &Device::Cpu);
        let error = made.err().ok_or(expected)?.to_string();
        assert!(error.contains(expected), "{error}; expected {expected}");
    }
    Ok(())
}

// ---- what is computed ----

/// An adapter on the side, or multiplied out: the model with the change in its weights.
#[test]
fn adapted_is_merged_is_the_sum() -> Result {
    for tied in [false, true] {
        let config = Config { tie_word_embeddings: tied, ..tiny::config() };
        let adapter = trained(&config, &everywhere(), 5)?;
        let untied = Config { tie_word_embeddings: false, ..config.clone() };
        for (dtype, tolerance) in [(DType::F32, 1e-5), (DType::BF16, 2e-2), (DType::F16, 3e-3)] {
            let mut weights = Tensors::new();
            for (name, weight) in tiny::weights(&config, 5)? {
                weights.insert(name, weight.to_dtype(dtype)?);
            }
            let sum = build(&untied, &plus(&weights, &adapter)?)?;
            let base = build(&config, &weights)?;
            for seq in [1, 40] {
                let ids = tiny::tokens(&config, 5, seq);
                let expected = causal(&sum, &ids)?;
                let name = format!("{dtype:?}, tied {tied}, {seq} tokens");
                assert_identical(&name, &causal(&base.merged(&adapter)?, &ids)?, &expected)?;
                assert_close(
                    &name,
                    &causal(&base.adapted(&adapter)?, &ids)?,
                    &expected,
                    tolerance,
                )?;
                assert!(apart(&causal(&base, &ids)?, &expected)?);
            }
            // Kept in half precision, the base is the one that was rounded to it.
            let wide = weights.into_iter().map(|(name, it)| Ok((name, it.to_dtype(DType::F32)?)));
            let wide = build(&config, &wide.collect::<Result<Tensors>>()?)?.adapted(&adapter)?;
            let ids = tiny::tokens(&config, 5, 9);
            let narrow = causal(&base.adapted(&adapter)?, &ids)?;
            assert_close("rounded", &narrow, &causal(&wide, &ids)?, 1e-5)?;
        }
    }
    Ok(())
}

#[test]
fn adapters_add_up() -> Result {
    let config = tiny::config();
    let (one, two) = (trained(&config, &everywhere(), 6)?, trained(&config, &everywhere(), 7)?);
    let weights = tiny::weights(&config, 6)?;
    let base = build(&config, &weights)?;
    let ids = tiny::tokens(&config, 6, 9);
    let expected = causal(&build(&config, &plus(&plus(&weights, &one)?, &two)?)?, &ids)?;
    for model in [
        base.adapted(&one)?.adapted(&two)?,
        base.merged(&one)?.merged(&two)?,
        base.merged(&one)?.adapted(&two)?,
        base.adapted(&one)?.merged(&two)?,
    ] {
        assert_close("both", &causal(&model, &ids)?, &expected, 1e-5)?;
    }

    // One for both reaches what thinks and what decodes where they differ already.
    let base = ThoughtModel::from(base);
    let plain = causal(&base.decoder().adapted(&two)?, &ids)?;
    for (scope, decodes, thinks) in
        [(AdapterScope::Thinking, &plain, &expected), (AdapterScope::Decoding, &expected, &plain)]
    {
        let first = base.adapted(&one, scope)?;
        for model in [first.adapted(&two, AdapterScope::Both)?, first.merged(&two)?] {
            assert_close("decodes", &causal(model.decoder(), &ids)?, decodes, 1e-5)?;
            assert_close("thinks", &causal(model.thinker(), &ids)?, thinks, 1e-5)?;
        }
    }
    Ok(())
}

/// Tensors whose matrices are handed over as blocks of a GGUF type.
struct Quantized {
    weights: Tensors,
    dtype: GgmlDType,
}

impl Weights for Quantized {
    fn tensor(&mut self, name: &str, shape: &[usize]) -> hybrid_attention::Result<Tensor> {
        self.weights.tensor(name, shape)
    }

    fn linear(&mut self, name: &str, out: usize, input: usize) -> hybrid_attention::Result<Linear> {
        let weight = self.tensor(name, &[out, input])?;
        Linear::quantized(Arc::new(QTensor::quantize(&weight, self.dtype)?))
    }
}

#[test]
fn quantised_weights_are_adapted_but_not_merged() -> Result {
    let config = Config {
        hidden_size: 64,
        intermediate_size: 96,
        num_attention_heads: 2,
        num_key_value_heads: 1,
        head_dim: 32,
        ..tiny::config()
    };
    let weights = tiny::weights(&config, 8)?;
    let adapter = trained(&config, &everywhere(), 8)?;
    let ids = tiny::tokens(&config, 8, 9);
    for dtype in [GgmlDType::Q4_0, GgmlDType::Q8_0] {
        let rounded = weights.iter().map(|(name, weight)| {
            let matrix = weight.rank() == 2 && !name.contains("embed_tokens");
            Ok((
                name.clone(),
                match matrix {
                    true => QTensor::quantize(weight, dtype)?.dequantize(&Device::Cpu)?,
                    false => weight.clone(),
                },
            ))
        });
        let rounded: Tensors = rounded.collect::<Result<_>>()?;
        let expected = causal(&build(&config, &rounded)?.adapted(&adapter)?, &ids)?;
        let mut quantized = Quantized { weights: weights.clone(), dtype };
        let base = Transformer::new(&config, &mut quantized)?;
        let found = causal(&base.adapted(&adapter)?, &ids)?;
        assert_close(&format!("{dtype:?}"), &found.detach(), &expected.detach(), 1e-5)?;
        assert!(apart(&found, &causal(&base, &ids)?)?);

        // Adapters learn on them as they do on the numbers that the blocks stand for.
        let [expected, found] = [expected.sqr()?.backward()?, found.sqr()?.backward()?];
        for variable in adapter.variables()? {
            let of = |gradients: &GradStore| gradients.get(&variable).cloned().ok_or("no gradient");
            assert_close("gradient", &of(&found)?, &of(&expected)?, 1e-4)?;
        }
        let error = base.merged(&adapter).err().ok_or("merged")?;
        assert_eq!(error.to_string(), "unsupported merge: into quantised weights");
    }
    Ok(())
}

fn adapter_without_variables(adapter: &Adapter) -> Result<Adapter> {
    let folder = tempfile::tempdir()?;
    adapter.save(&folder)?;
    Ok(Adapter::from_folder(&folder, &Device::Cpu)?)
}

// ---- two minds ----

fn batch() -> Result<Batch> {
    Ok(Batch::one(10)?.with_context(0, &SEGMENTS)?)
}

/// Two context segments around a plain one, and a plain end.
const SEGMENTS: [Range<usize>; 2] = [1..4, 6..9];

#[test]
fn an_adapter_for_one_mind_leaves_the_other_bit_for_bit() -> Result {
    let config = tiny::config();
    let base = tiny::thought_model(&config, 9)?;
    let adapter = adapter_without_variables(&trained(&config, &everywhere(), 9)?)?;
    let both = base.adapted(&adapter, AdapterScope::Both)?;
    assert!(std::ptr::eq(both.thinker(), both.decoder()));
    let text = tiny::text(base.decoder(), &batch()?, 9)?;
    let z = tiny::noise(9, &[10, 16], 1.0)?;
    for sight in [Sight::Bidirectional, Sight::Causal] {
        let thinking = Thinking::new(2).sight(sight);
        let pass = |model: &ThoughtModel| -> Result<Tensor> {
            Ok(thinking.on(model)?.think_once(&z, text.batch())?)
        };
        for scope in SCOPES {
            let model = base.adapted(&adapter, scope)?;
            let name = format!("{scope:?}, {sight:?}");
            let (thinks, decodes) = match scope {
                AdapterScope::Thinking => (&both, &base),
                AdapterScope::Decoding => (&base, &both),
                AdapterScope::Both => (&both, &both),
            };
            assert_identical(&name, &pass(&model)?, &pass(thinks)?)?;
            let (ids, decoder) = (text.ids(), model.decoder());
            let expected = causal(decodes.decoder(), ids)?;
            assert_identical(&name, &causal(decoder, ids)?, &expected)?;
            let thought = causal(model.thinker(), ids)?;
            assert_identical(&name, &thought, &causal(thinks.thinker(), ids)?)?;
            let mut cache = decoder.new_cache(20)?;
            let xs = tiny::embed(decoder, ids)?;
            let cached = tiny::logits(decoder, &xs, Pass::Cached(&mut cache))?;
            assert_close(&name, &cached, &expected, 1e-5)?;
            // What the keys mean lies in the decoder's weights.
            let by_base =
                |cache: &mut KvCache| tiny::logits(base.decoder(), &xs, Pass::Cached(cache));
            if scope == AdapterScope::Thinking {
                assert!(std::ptr::eq(decoder, base.decoder()), "nothing of it has changed");
                cache.reset();
                assert_identical(&name, &by_base(&mut cache)?, &cached)?;
            } else {
                let error = by_base(&mut cache).err().ok_or("taken")?;
                assert!(error.to_string().contains("cache"), "{error}");
            }
        }
    }
    let (base, both) = (causal(base.decoder(), text.ids())?, causal(both.decoder(), text.ids())?);
    assert!(apart(&base, &both)?);
    Ok(())
}

fn tensor(rows: &[Vec<f64>]) -> Result<Tensor> {
    Ok(Tensor::new(rows.to_vec(), &Device::Cpu)?.to_dtype(DType::F32)?)
}

/// Two plain models with the changes in their weights, one of which thinks and one decodes, in loops.
fn two_minds_are_two_models(
    config: &Config,
    span: Range<usize>,
    hand_off: HandOff,
    seed: u64,
) -> Result {
    let weights = tiny::weights(config, seed)?;
    let for_decoding = trained(config, &everywhere(), seed)?;
    let for_thinking = trained(config, &everywhere(), seed + 1)?;
    let decoder = Reference::new(config, &plus(&weights, &for_decoding)?)?;
    let thinker = Reference::new(config, &plus(&weights, &for_thinking)?)?;
    let model = build_thinking(config, &weights)?
        .adapted(&adapter_without_variables(&for_decoding)?, AdapterScope::Decoding)?
        .adapted(&adapter_without_variables(&for_thinking)?, AdapterScope::Thinking)?;
    let reader = model.decoder();

    let (ids, answer) = (tiny::tokens(config, seed, 10), tiny::tokens(config, seed + 1, 3));
    let text = EncodedBatch::new(reader, &ids, batch()?)?;
    let thinking =
        Thinking::new(2).span(span.clone()).refine(Interpolate::new(0.4)).hand_off(hand_off);
    let thinking = thinking.detail(Detail::Maps);
    let mind = thinking.on(&model)?;
    let mut cache = reader.new_cache(13)?;
    let first = mind.encode(&text, Pass::Cached(&mut cache))?;
    let thoughts = mind.think(&text, first, |_, _| ())?;
    let h = mind.hand_off(&text, &thoughts, Pass::Cached(&mut cache))?;
    let uncached = mind.hand_off(&text, &thoughts, Pass::Causal(text.batch()))?;
    assert_close("without a cache", &uncached, &h, 1e-5)?;

    let loops = |reference| ThoughtLoop {
        reference,
        span: span.clone(),
        segments: &SEGMENTS,
        both_ways: true,
        thought_layers: 0,
        share: vec![0.4; config.hidden_size],
    };
    let first = loops(&decoder).encode(&ids);
    let (mut z, mut shares) = (first.clone(), Vec::new());
    for _ in 0..2 {
        (z, shares) = loops(&thinker).pass(&z);
    }
    assert_close("first", &thoughts.first, &tensor(&first)?, 1e-4)?;
    assert_close("thoughts", &thoughts.z, &tensor(&z)?, 1e-4)?;
    // Who saw whom, in the thinker's last pass.
    let maps = thoughts.trace.passes.last().and_then(|pass| pass.maps.as_ref()).ok_or("no maps")?;
    for (layer, expected) in maps.attention.iter().zip(&shares) {
        let found = Tensor::new(layer[0].clone(), &Device::Cpu)?;
        assert_close("attention", &found, &tensor(expected)?, 1e-4)?;
    }

    let mut got = vec![reader.logits(&h.narrow(0, 9, 1)?)?];
    for &id in &answer {
        got.push(tiny::logits(reader, &reader.embed_ids(&[id])?, Pass::Cached(&mut cache))?);
    }
    let expected = match hand_off {
        HandOff::Refined => {
            let said = loops(&decoder).logits(&z);
            assert_close("re-read", &reader.logits(&h)?, &tensor(&said)?, 1e-4)?;
            vec![said[9].clone()]
        }
        _ => {
            let weight = if let HandOff::Mixed { weight } = hand_off { weight } else { 1.0 };
            let by_loops =
                ByDefinition { decoder: &decoder, thinker: &thinker, segments: &SEGMENTS };
            let layers = config.num_hidden_layers;
            by_loops.logits(layers, span.clone(), weight, (&ids, &answer), (&z, &first))
        }
    };
    for (at, (got, expected)) in got.iter().zip(&expected).enumerate() {
        let name = format!("{hand_off:?} {span:?}, logits {at}");
        assert_close(&name, got, &tensor(std::slice::from_ref(expected))?, 2e-4)?;
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(12))]

    #[test]
    fn every_hand_off_keeps_the_minds_apart(
        (a, b) in (0usize..3).prop_flat_map(|a| (Just(a), a + 1..=3)),
        weight in 0.0..=1.0, window in prop::option::of(1usize..6), seed in 0u64..1000,
    ) {
        let config = Config { sliding_window: window, ..tiny::config() };
        for hand_off in [HandOff::Refined, HandOff::KeyValue, HandOff::Mixed { weight }] {
            holds(two_minds_are_two_models(&config, a..b, hand_off, seed))?;
        }
    }
}

/// A causal pass of all sequences after their caches.
fn remembered<'a>(batch: &'a Batch, caches: &'a mut [KvCache]) -> Pass<'a> {
    Pass::Remembered { batch, sight: Sight::Causal, caches: caches.iter_mut().collect() }
}

/// Minds of their own that think alike are one: the two ways through a hand-off agree.
#[test]
fn a_mind_of_its_own_that_is_the_same_changes_nothing() -> Result {
    let config = Config { sliding_window: Some(4), ..tiny::config() };
    let base = tiny::thought_model(&config, 11)?;
    let nothing = Adapter::new(&config, &everywhere(), 11, &Device::Cpu)?;
    let apart = base.adapted(&nothing, AdapterScope::Thinking)?;
    let batch =
        Batch::ragged(&[9, 6])?.with_context(0, &[0..4, 5..8])?.with_context(1, &[1..3, 3..6])?;
    let text = tiny::text(base.decoder(), &batch, 11)?;
    for hand_off in HAND_OFFS.into_iter().chain([0.0, 1.0].map(|weight| HandOff::Mixed { weight }))
    {
        for span in [0..3, 1..2] {
            let thinking = Thinking::new(2).span(span.clone()).hand_off(hand_off);
            let read = |model: &ThoughtModel| -> Result<Tensor> {
                let (mind, decoder) = (thinking.on(model)?, model.decoder());
                let mut caches = [decoder.new_cache(10)?, decoder.new_cache(10)?];
                let z = mind.encode(&text, remembered(&batch, &mut caches))?;
                let thoughts = mind.think(&text, z, |_, _| ())?;
                let h = mind.hand_off(&text, &thoughts, remembered(&batch, &mut caches))?;
                let next = decoder.embed_ids(&[3, 4])?;
                let step = Batch::dense(2, 1)?;
                let next = decoder.forward(&next, 0..3, remembered(&step, &mut caches))?;
                Ok(Tensor::cat(&[h, next], 0)?) // (9 + 6 + 2, hidden)
            };
            assert_close(&format!("{hand_off:?} {span:?}"), &read(&apart)?, &read(&base)?, 1e-5)?;
        }
    }
    Ok(())
}

#[test]
fn answers_are_those_of_their_minds() -> Result {
    let config = tiny::config();
    let adapter = adapter_without_variables(&trained(&config, &everywhere(), 12)?)?;
    let with = |mind| -> Result<HybridModel> {
        Ok(tiny::hybrid(&config, 12)?.with_adapter(&adapter, mind)?)
    };
    let ids = tiny::tokens(&config, 12, 9);
    let plain = GenerationConfig::default().max_tokens(5).top_logprobs(2);
    let (base, both) = (tiny::hybrid(&config, 12)?, with(AdapterScope::default())?);
    let thinking = with(AdapterScope::Thinking)?.generate(ids.as_slice(), &plain)?;
    let bare = base.generate(ids.as_slice(), &plain)?;
    assert_eq!((thinking.ids, thinking.top_logprobs), (bare.ids, bare.top_logprobs.clone()));
    let decoding = with(AdapterScope::Decoding)?.generate(ids.as_slice(), &plain)?;
    let adapted = both.generate(ids.as_slice(), &plain)?;
    assert_eq!(decoding.top_logprobs, adapted.top_logprobs);
    assert_ne!(adapted.top_logprobs, bare.top_logprobs);

    // Thinking again on the way is thinking from scratch, and thoughts are the thinker's.
    for hand_off in HAND_OFFS {
        let thinking = Thinking::new(2).span(1..3).hand_off(hand_off);
        let how = GenerationConfig::default().thinking(thinking.clone());
        for mind in [AdapterScope::Thinking, AdapterScope::Decoding] {
            let model = with(mind)?;
            let again = how.clone().thinking(thinking.clone().rethink_every(2)).max_tokens(5);
            let answer = model.generate(ids.as_slice(), &again)?;
            let (mut text, mut expected) = (ids.clone(), Vec::new());
            for count in [2, 2, 1] {
                let part = model.generate(text.as_slice(), &how.clone().max_tokens(count))?;
                text.extend(&part.ids);
                expected.extend(part.logprobs);
            }
            assert_eq!(answer.ids, text[9..], "{hand_off:?}, {mind:?}");
            let tensor = |values: &[f32]| Tensor::new(values, &Device::Cpu);
            assert_close("logprobs", &tensor(&answer.logprobs)?, &tensor(&expected)?, 1e-4)?;
        }
        let z = |model: &HybridModel| -> Result<Tensor> {
            let from_0 = GenerationConfig::default().thinking(Thinking::new(2).span(0..2));
            Ok(model.think(ids.as_slice(), &from_0)?.z)
        };
        assert_identical("thoughts", &z(&with(AdapterScope::Thinking)?)?, &z(&both)?)?;
        assert_identical("thoughts", &z(&with(AdapterScope::Decoding)?)?, &z(&base)?)?;
    }
    Ok(())
}

/// What is read in both directions is the thinker's, what is read causally the decoder's.
#[test]
fn embeddings_are_those_of_the_mind_that_reads() -> Result {
    let tokenizer = fixture("tokenizer").join("llama");
    let config = Config { vocab_size: 371, ..tiny::config() };
    let adapter = adapter_without_variables(&trained(&config, &everywhere(), 13)?)?;
    let bare = || -> Result<HybridModel> {
        let tokenizer = hybrid_attention::Tokenizer::from_folder(&tokenizer)?;
        Ok(HybridModel::new(tiny::transformer(&config, 13)?, tokenizer)?)
    };
    let base = bare()?;
    let both = bare()?.with_adapter(&adapter, AdapterScope::Both)?;
    let thinks = bare()?.with_adapter(&adapter, AdapterScope::Thinking)?;
    let decodes = bare()?.with_adapter(&adapter, AdapterScope::Decoding)?;
    let embed = |model: &HybridModel, sight, thinking: &Thinking| -> Result<Tensor> {
        let how = EmbedConfig::default().sight(sight).thinking(thinking.clone());
        Ok(model.embed(&["a cat", "the dog and the cat"], &how)?)
    };
    let none = Thinking::none();
    for (model, sight, same) in [
        (&thinks, Sight::Bidirectional, &both),
        (&thinks, Sight::Causal, &base),
        (&decodes, Sight::Bidirectional, &base),
        (&decodes, Sight::Causal, &both),
    ] {
        assert_identical(
            &format!("{sight:?}"),
            &embed(model, sight, &none)?,
            &embed(same, sight, &none)?,
        )?;
    }
    assert!(apart(&embed(&base, Sight::Causal, &none)?, &embed(&both, Sight::Causal, &none)?)?);
    // From layer 0 on nothing is encoded, so all of it is the thinker's.
    let thinking = Thinking::new(2).span(0..2).hand_off(HandOff::KeyValue);
    let found = embed(&thinks, Sight::Bidirectional, &thinking)?;
    assert_close("thought", &found, &embed(&both, Sight::Bidirectional, &thinking)?, 1e-5)
}

// ---- gradients ----

/// Through encode, think and hand off: the slope along every variable's own gradient.
#[test]
fn gradients_reach_the_adapter_and_nothing_else() -> Result {
    const STEP: f64 = 1e-2;
    let config = tiny::config();
    let weights = tiny::weights(&config, 14)?;
    let base = build_thinking(&config, &weights)?;
    let gate = tiny::noise(14, &[16], 1.0)?;
    for (scope, hand_off) in SCOPES.into_iter().flat_map(|scope| HAND_OFFS.map(|it| (scope, it))) {
        let adapter = trained(&config, &everywhere(), 14)?.with_thought_gate(&gate)?.trainable()?;
        let model = base.adapted(&adapter, scope)?;
        let text = tiny::text(model.decoder(), &batch()?, 14)?;
        let thinking = Thinking::new(2).span(1..3).hand_off(hand_off);
        let thinking = match scope {
            AdapterScope::Decoding => thinking.refine(Interpolate::new(0.4)),
            _ => thinking.refine(Interpolate::gated()),
        };
        let loss = || -> Result<Tensor> {
            let thoughts = think(&model, &thinking, &text)?;
            let mind = thinking.on(&model)?;
            let h = mind.hand_off(&text, &thoughts, Pass::Causal(text.batch()))?;
            let logits = model.decoder().logits(&h)?;
            Ok((&logits * tiny::noise(7, logits.dims(), 0.3)?)?.sum_all()?)
        };
        let gradients = loss()?.backward()?;
        for (name, weight) in &weights {
            assert!(
                gradients.get(weight).is_none(),
                "{scope:?}, {hand_off:?}: {name} has a gradient"
            );
        }
        let names = adapter.tensors().map(|(name, _)| name).chain(["thought.gate".to_string()]);
        let mut reached = 0;
        for (name, variable) in names.zip(adapter.variables()?) {
            let name = format!("{scope:?}, {hand_off:?}, {name}");
            let Some(gradient) = gradients.get(&variable) else { continue };
            let norm = scalar(&gradient.sqr()?)?.sqrt();
            if norm < 1e-3 {
                continue; // a slope that rounding hides
            }
            reached += 1;
            let (start, direction) = (variable.as_tensor().copy()?, (gradient / norm)?.detach());
            let at = |step: f64| -> Result<f64> {
                variable.set(&(&start + (&direction * step)?)?)?;
                scalar(&loss()?)
            };
            let slope = (at(STEP)? - at(-STEP)?) / (2.0 * STEP);
            variable.set(&start)?;
            let off = (slope - norm).abs() / norm;
            assert!(off < 0.02, "{name}: slope {slope}, gradient {norm}");
        }
        // Thought passes run layers 1 and 2 and no head; decoding all of it, and no gate.
        let expected = match scope {
            AdapterScope::Thinking => 2 * 2 * 7 + 1,
            AdapterScope::Decoding => 2 * (3 * 7 + 1),
            AdapterScope::Both => 2 * (3 * 7 + 1) + 1,
        };
        assert!(reached >= expected - 4, "{scope:?}, {hand_off:?}: {reached} of {expected}");
        assert!(reached <= expected, "{scope:?}, {hand_off:?}: {reached} of {expected}");
    }
    Ok(())
}

/// An optimiser's steps are seen by the transformer, which shares its tensors.
#[test]
fn a_step_down_the_gradient_lowers_the_loss() -> Result {
    let config = tiny::config();
    let base = tiny::transformer(&config, 15)?;
    let adapter = Adapter::new(&config, &everywhere(), 15, &Device::Cpu)?.trainable()?;
    let model = base.adapted(&adapter)?;
    let ids = tiny::tokens(&config, 15, 8);
    let loss = || -> Result<Tensor> {
        let logits = causal(&model, &ids[..7])?.squeeze(0)?;
        Ok(candle_nn::loss::cross_entropy(&logits, &Tensor::new(&ids[1..], &Device::Cpu)?)?)
    };
    let before = scalar(&loss()?)?;
    for _ in 0..20 {
        let gradients = loss()?.backward()?;
        for variable in adapter.variables()? {
            let Some(gradient) = gradients.get(&variable) else { continue };
            variable.set(&(variable.as_tensor() - (gradient * 0.3)?)?.detach())?;
        }
    }
    let after = scalar(&loss()?)?;
    assert!(after < 0.7 * before, "{before} to {after}");
    // What was learned is what is saved.
    let saved = base.adapted(&adapter_without_variables(&adapter)?)?;
    assert_close("saved", &causal(&saved, &ids)?, &causal(&model, &ids)?.detach(), 1e-5)
}

/// A copy to train leaves the one it was made of alone, and weights that are variables stay apart.
#[test]
fn variables_are_copies() -> Result {
    let config = tiny::config();
    let adapter = Adapter::new(&config, &AdapterConfig::default(), 16, &Device::Cpu)?;
    let trainable = adapter.trainable()?;
    let again = trainable.trainable()?;
    for variable in trainable.variables()? {
        variable.set(&variable.ones_like()?)?;
    }
    for ((name, tensor), (_, copy)) in adapter.tensors().zip(again.tensors()) {
        assert_identical(&name, tensor, &copy.detach())?;
        assert!(!tensor.is_variable() && copy.is_variable());
    }
    let mut weights = tiny::weights(&config, 16)?;
    let name = "model.layers.0.self_attn.q_proj.weight";
    let weight = Var::from_tensor(&weights[name])?;
    weights.insert(name.into(), weight.as_tensor().clone());
    let merged = build(&config, &weights)?.merged(&trainable)?;
    assert!(!causal(&merged, &[1, 2])?.track_op());
    Ok(())
}

// ---- broken and hostile files ----

/// The folder of the fixture's first adapter, to be broken.
struct Broken {
    folder: TempDir,
    config: Value,
    tensors: Tensors,
}

impl Broken {
    fn new() -> Result<Self> {
        let from = fixture("adapter").join("causal_lm");
        let config = serde_json::from_str(&fs::read_to_string(from.join("adapter_config.json"))?)?;
        let weights = from.join("adapter_model.safetensors");
        let tensors = candle_core::safetensors::load(weights, &Device::Cpu)?;
        Ok(Self { folder: tempfile::tempdir()?, config, tensors })
    }

    fn write(&self) -> Result {
        let file = |name| self.folder.path().join(name);
        fs::write(file("adapter_config.json"), self.config.to_string())?;
        Ok(candle_core::safetensors::save(&self.tensors, file("adapter_model.safetensors"))?)
    }

    /// Why the folder is not loaded, or not put on the fixture's model; without its path.
    fn refusal(&self) -> Result<Error> {
        let base = fixture_base()?;
        let load = || {
            let adapter = Adapter::from_folder(&self.folder, &Device::Cpu)?;
            base.thought_model().adapted(&adapter, AdapterScope::Both)
        };
        Ok(load().err().ok_or("accepted")?)
    }

    fn message(&self) -> Result<String> {
        let root = self.folder.path().display().to_string();
        let message = self.refusal()?.to_string();
        Ok(message.replace(&format!("{root}/"), "").replace(&root, "folder"))
    }

    /// Renames the tensors in which `from` occurs.
    fn rename(&mut self, from: &str, to: &str) {
        let tensors = std::mem::take(&mut self.tensors);
        self.tensors =
            tensors.into_iter().map(|(name, tensor)| (name.replace(from, to), tensor)).collect();
    }
}

const A: &str = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight";
const B: &str = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight";

#[test]
fn broken_configurations_are_errors() -> Result {
    for (field, value, expected) in [
        ("peft_type", json!("IA3"), "unsupported adapter field peft_type: IA3"),
        (
            "peft_type",
            json!(null),
            "adapter_config.json: peft_type: expected \"LORA\", got nothing",
        ),
        ("use_dora", json!(true), "unsupported adapter field use_dora: true"),
        ("bias", json!("lora_only"), "unsupported adapter field bias: lora_only"),
        ("lora_bias", json!(true), "unsupported adapter field lora_bias: true"),
        ("fan_in_fan_out", json!(true), "unsupported adapter field fan_in_fan_out: true"),
        (
            "modules_to_save",
            json!(["lm_head"]),
            "unsupported adapter field modules_to_save: [\"lm_head\"]",
        ),
        (
            "layer_replication",
            json!([[0, 2]]),
            "unsupported adapter field layer_replication: [[0,2]]",
        ),
        (
            "trainable_token_indices",
            json!([3]),
            "unsupported adapter field trainable_token_indices: [3]",
        ),
        (
            "init_lora_weights",
            json!("pissa"),
            "unsupported adapter field init_lora_weights: \"pissa\"",
        ),
        ("init_lora_weights", json!(3), "unsupported adapter field init_lora_weights: 3"),
        ("use_something_new", json!(true), "unsupported adapter field use_something_new: true"),
        ("target_parameters", json!(["x"]), "unsupported adapter field target_parameters: [\"x\"]"),
        ("r", json!(0), "adapter_config.json: r: expected 1 to 2147483647, got 0"),
        ("r", json!(-1), "adapter_config.json: r: expected a non-negative integer, got -1"),
        ("r", json!("8"), "adapter_config.json: r: expected a non-negative integer, got \"8\""),
        (
            "r",
            json!(3),
            "lora_A.weight in adapter_model.safetensors: expected shape [3, 40], got [4, 40]",
        ),
        (
            "lora_alpha",
            json!(1e300),
            "adapter_config.json: lora_alpha: expected a number that is finite in f32",
        ),
        ("lora_alpha", json!([]), "adapter_config.json: lora_alpha: expected a number, got []"),
        ("use_rslora", json!(1), "adapter_config.json: use_rslora: expected true or false, got 1"),
        (
            "target_modules",
            json!([]),
            "adapter_config.json: target_modules: expected at least one module",
        ),
        (
            "target_modules",
            json!([1]),
            "target_modules: expected a list of names, or a pattern, got [1]",
        ),
        (
            "target_modules",
            json!("("),
            "unsupported adapter field target_modules: the regular expression (",
        ),
        (
            "target_modules",
            json!(["q_proj"]),
            "is none of the modules that adapter_config.json gives an adapter",
        ),
        (
            "target_modules",
            json!(["q_proj", "v_proj", "down_proj", "up_proj"]),
            "weight base_model.model.model.layers.0.mlp.up_proj.lora_A.weight is missing from",
        ),
        ("layers_to_transform", json!([0, 1]), "is none of the modules"),
        (
            "layers_to_transform",
            json!("all"),
            "layers_to_transform: expected a layer, or a list of them",
        ),
        ("rank_pattern", json!({"q_proj": 2}), "expected shape [2, 24], got [4, 24]"),
        ("rank_pattern", json!({"q_proj": 0}), "adapter_config.json: rank_pattern: expected 1 to"),
        ("rank_pattern", json!({"q_proj": 1.5}), "rank_pattern q_proj: expected a number, got 1.5"),
        (
            "rank_pattern",
            json!(["q_proj"]),
            "adapter_config.json: invalid type: sequence, expected an object",
        ),
        (
            "alpha_pattern",
            json!({"q_proj": "2"}),
            "alpha_pattern q_proj: expected a number, got \"2\"",
        ),
        (
            "alpha_pattern",
            json!({"q_proj": 1e300}),
            "alpha_pattern: expected a number that is finite in f32",
        ),
    ] {
        let mut broken = Broken::new()?;
        broken.config[field] = value;
        broken.write()?;
        let message = broken.message()?;
        assert!(message.contains(expected), "{message}\nexpected {expected}");
    }
    let broken = Broken::new()?;
    broken.write()?;
    for (text, expected) in [
        ("", "adapter_config.json: not JSON"),
        ("[]", "adapter_config.json: expected a JSON object, got []"),
        ("{\"peft_type\": \"LORA\", \"r\": NaN}", "adapter_config.json: not JSON"),
        ("{}", "peft_type: expected \"LORA\", got nothing"),
    ] {
        fs::write(broken.folder.path().join("adapter_config.json"), text)?;
        let message = broken.message()?;
        assert!(message.contains(expected), "{message}\nexpected {expected}");
    }
    Ok(())
}

#[test]
fn broken_tensors_are_errors() -> Result {
    type Break = fn(&mut Broken) -> Result;
    let cases: [(Break, &str); 11] = [
        (
            |it| {
                it.tensors.remove(A);
                Ok(())
            },
            "q_proj.lora_A.weight is missing from",
        ),
        (
            |it| {
                it.tensors.remove(B);
                Ok(())
            },
            "q_proj.lora_B.weight is missing from",
        ),
        (
            |it| {
                it.tensors.remove(A);
                it.tensors.remove(B);
                Ok(())
            },
            "lora_A.weight is missing from",
        ),
        (
            |it| {
                it.tensors.clear();
                Ok(())
            },
            "adapter_model.safetensors: no tensors",
        ),
        (
            |it| {
                it.tensors.insert(
                    "base_model.model.lm_head.weight".into(),
                    tiny::noise(1, &[48, 24], 1.0)?,
                );
                Ok(())
            },
            "unsupported adapter tensor: base_model.model.lm_head.weight in adapter_model.safetensors",
        ),
        (
            |it| {
                it.tensors.insert(
                    "base_model.model.model.embed_tokens.lora_embedding_A".into(),
                    tiny::noise(1, &[4, 48], 1.0)?,
                );
                Ok(())
            },
            "unsupported adapter tensor: base_model.model.model.embed_tokens.lora_embedding_A",
        ),
        (
            |it| {
                it.tensors.insert(A.replace("lora_A", "lora_A.default"), it.tensors[A].clone());
                Ok(())
            },
            "one adapter is expected",
        ),
        (
            |it| {
                it.tensors
                    .insert(A.replace("model.model.model", "model.model"), it.tensors[A].clone());
                Ok(())
            },
            "beside those of a MistralForCausalLM",
        ),
        (
            |it| {
                it.tensors.insert(A.into(), tiny::noise(1, &[4, 23], 1.0)?);
                Ok(())
            },
            "expected shape [4, 24], got [4, 23]",
        ),
        (
            |it| {
                it.tensors.insert(B.into(), tiny::noise(1, &[128], 1.0)?);
                Ok(())
            },
            "expected shape [128, 4], got [128]",
        ),
        (
            |it| {
                it.tensors.insert(B.into(), (tiny::noise(1, &[32, 4], 1.0)? * f64::NAN)?);
                Ok(())
            },
            "expected finite values, got NaN at element 0",
        ),
    ];
    let refused = |broken: &Broken, expected: &str| -> Result {
        broken.write()?;
        let message = broken.message()?;
        assert!(message.contains(expected), "{message}\nexpected {expected}");
        Ok(())
    };
    for (break_it, expected) in cases {
        let mut broken = Broken::new()?;
        break_it(&mut broken)?;
        refused(&broken, expected)?;
    }
    for (from, to, expected) in [
        ("layers.2.", "layers.3.", "layers.2.self_attn.q_proj.lora_A.weight is missing"),
        ("layers.2.", "layers.02.", "is missing from"),
        ("layers.2.", "layers.x.", "is missing from"),
        ("base_model.model.", "", "unsupported adapter tensor: model.layers"),
        ("lora_A", "lora_C", "unsupported adapter tensor"),
        ("lora_A.weight", "lora_A.bias", "unsupported adapter tensor"),
        ("lora_A.weight", "lora_A.a.b.weight", "unsupported adapter tensor"),
        ("lora_A.weight", "lora_A..weight", "unsupported adapter tensor"),
    ] {
        let mut broken = Broken::new()?;
        broken.rename(from, to);
        refused(&broken, expected)?;
    }

    let mut broken = Broken::new()?;
    broken.tensors.insert(A.into(), Tensor::zeros((4, 24), DType::U32, &Device::Cpu)?);
    broken.write()?;
    assert!(matches!(broken.refusal()?, Error::WeightDType { .. }));
    // Layers beyond the model's, once its own are complete.
    let mut broken = Broken::new()?;
    for (name, tensor) in broken.tensors.clone() {
        broken.tensors.insert(name.replace("layers.2.", "layers.3."), tensor);
    }
    broken.write()?;
    let message = broken.message()?;
    let expected = "is not used: this model has no model.layers.3.mlp.down_proj; it has 3 layers";
    assert!(message.contains(expected), "{message}");
    Ok(())
}

#[test]
fn broken_folders_are_errors() -> Result {
    let broken = Broken::new()?;
    let in_folder = |name: &str| broken.folder.path().join(name);
    broken.write()?;
    let load = |path: &Path| Adapter::from_folder(path, &Device::Cpu).err().ok_or("loaded");
    assert!(matches!(load(&in_folder("none"))?, Error::Io { .. }));
    let error = load(&in_folder("adapter_config.json"))?;
    assert!(error.to_string().contains("not a folder of adapter_config.json"), "{error}");

    let path = in_folder("adapter_model.safetensors");
    let whole = fs::read(&path)?;
    fs::write(&path, b"version https://git-lfs.github.com/spec/v1")?;
    assert!(broken.message()?.contains("a Git LFS pointer"));
    fs::write(&path, &whole[..whole.len() - 1])?;
    assert!(matches!(broken.refusal()?, Error::Malformed { .. }));
    fs::write(&path, b"")?;
    assert!(matches!(broken.refusal()?, Error::Malformed { .. }));
    fs::remove_file(&path)?;
    assert_eq!(broken.message()?, "folder: no adapter_model.safetensors in this folder");
    fs::write(in_folder("adapter_model.bin"), "")?;
    assert!(broken.message()?.contains("but adapter_model.bin: only safetensors is read"));
    fs::create_dir(&path)?;
    assert!(matches!(broken.refusal()?, Error::Malformed { .. }));
    fs::remove_dir(&path)?;

    fs::write(&path, &whole)?;
    let gate = |tensors: &[(&str, Tensor)]| -> Result<String> {
        let tensors: Tensors =
            tensors.iter().map(|(name, it)| (name.to_string(), it.clone())).collect();
        candle_core::safetensors::save(&tensors, in_folder("thought.safetensors"))?;
        broken.message()
    };
    assert!(gate(&[])?.contains("thought.safetensors: no tensors"));
    let message = gate(&[("thought.layers.0.x", tiny::noise(1, &[24], 1.0)?)])?;
    assert!(message.contains("beside an adapter only thought.gate is read"), "{message}");
    let message = gate(&[("thought.gate", tiny::noise(1, &[4, 6], 1.0)?)])?;
    assert!(message.contains("expected shape [6], got [4, 6]"), "{message}");
    let message = gate(&[("thought.gate", tiny::noise(1, &[23], 1.0)?)])?;
    assert!(message.contains("thought.gate in"), "{message}");
    Ok(())
}

/// Names with the adapter's own in them, as `torch.save` of a wrapped model has them.
#[test]
fn the_name_of_an_adapter_may_stand_in_its_tensors() -> Result {
    let mut named = Broken::new()?;
    named.rename("lora_A.weight", "lora_A.default.weight");
    named.rename("lora_B.weight", "lora_B.default.weight");
    named.write()?;
    let loaded = Adapter::from_folder(&named.folder, &Device::Cpu)?;
    for ((name, tensor), (other, expected)) in
        loaded.tensors().zip(fixture_adapter("causal_lm")?.tensors())
    {
        assert_eq!(name, other);
        assert_identical(&name, tensor, expected)?;
    }
    Ok(())
}

/// Loads, applies and reads with whatever is there.
fn survive(folder: &Path) -> hybrid_attention::Result<()> {
    let base = HybridModel::from_folder(fixture("adapter"), None, &Device::Cpu)?;
    let adapter = Adapter::from_folder(folder, &Device::Cpu)?;
    for scope in SCOPES {
        base.thought_model().adapted(&adapter, scope)?;
    }
    base.thought_model().merged(&adapter)?;
    base.transformer().adapted(&adapter)?;
    base.transformer().merged(&adapter)?;
    let model = base.with_adapter(&adapter, AdapterScope::Both)?;
    model.generate([3], &GenerationConfig::default().max_tokens(1))?;
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Bytes changed, cut off or put in anywhere: an adapter, or an error.
    #[test]
    fn no_file_makes_it_panic(
        in_config: bool, at: prop::sample::Index, header: bool, bytes in prop::collection::vec(any::<u8>(), 0..4),
        removed in 0usize..4,
    ) {
        let run = || -> Result {
            let folder = tempfile::tempdir()?;
            for name in ["adapter_config.json", "adapter_model.safetensors"] {
                let mut content = fs::read(fixture("adapter").join("causal_lm").join(name))?;
                if in_config == (name == "adapter_config.json") {
                    // Most of a safetensors file is numbers; its head is where it breaks.
                    let room = if header { content.len().min(2500) } else { content.len() };
                    let at = at.index(room);
                    let end = (at + removed).min(content.len());
                    content.splice(at..end, bytes.iter().copied());
                }
                fs::write(folder.path().join(name), content)?;
            }
            survive(folder.path()).ok();
            Ok(())
        };
        holds(run())?;
    }
}
