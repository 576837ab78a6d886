//! Mixtures of experts: every format gives the same model, each token reads its own experts alone, and
//! gradients reach the router. What transformers makes of them is in `golden.rs`.

mod common;

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use candle_core::quantized::GgmlDType;
use candle_core::{DType, Device, Tensor, Var};
use common::gradient::check;
use common::reference::Reference;
use common::{
    Result, assert_close, assert_identical, experts, fixture, kept, logged, tiny,
    write_consolidated, write_gguf, write_gguf_as_spelled, write_hugging_face,
};
use hybrid_attention::adapter::{Adapter, AdapterConfig, AdapterScope};
use hybrid_attention::load::Checkpoint;
use hybrid_attention::model::{
    Batch, ForwardContext, Linear, Pass, SideProjection, SideSignal, Transformer, Weights,
};
use hybrid_attention::{
    Config, Error, Experts, GenerationConfig, HybridModel, Thinking, WeightType,
};
use proptest::prelude::*;
use proptest::test_runner::RngSeed;

fn mixture(all: usize, chosen: usize) -> Config {
    let experts = Experts { num_local_experts: all, num_experts_per_tok: chosen };
    Config { experts: Some(experts), ..tiny::config() }
}

/// Rows are whole blocks of 256.
fn wide_mixture() -> Config {
    Config {
        hidden_size: 256,
        intermediate_size: 512,
        num_hidden_layers: 2,
        head_dim: 64,
        bos_token_id: Some(1),
        eos_token_ids: vec![2],
        ..mixture(4, 2)
    }
}

const ROUTER: &str = "model.layers.0.block_sparse_moe.gate.weight";

fn tensors(config: &Config, seed: u64) -> Result<BTreeMap<String, Tensor>> {
    Ok(tiny::weights(config, seed)?.into_iter().collect())
}

fn causal(model: &Transformer, xs: &Tensor) -> Result<Tensor> {
    tiny::logits(model, xs, Pass::Causal(&Batch::one(xs.dim(0)?)?))
}

// ---- files ----

/// The same weights in every format that there is, matrices of GGUF files in blocks of `dtype`.
fn formats(
    folder: &Path,
    config: &Config,
    weights: &BTreeMap<String, Tensor>,
    dtype: GgmlDType,
) -> Result<Vec<(&'static str, PathBuf)>> {
    let packed = experts::pack(config, weights)?;
    // As saved from the base class: without a head, and without `model.`.
    let base = |tensors: &BTreeMap<String, Tensor>| -> BTreeMap<String, Tensor> {
        let strip = |name: &String| name.strip_prefix("model.").unwrap_or(name).to_string();
        tensors.iter().map(|(name, tensor)| (strip(name), tensor.clone())).collect()
    };
    let mut paths = Vec::new();
    for (name, tensors) in [
        ("hugging face", weights.clone()),
        ("hugging face, packed", packed.clone()),
        ("base class", base(weights)),
        ("base class, packed", base(&packed)),
    ] {
        let path = folder.join(name);
        fs::create_dir(&path)?;
        write_hugging_face(&path, config, &tensors)?;
        paths.push((name, path));
    }
    let path = folder.join("consolidated");
    fs::create_dir(&path)?;
    write_consolidated(&path, config, weights)?;
    paths.push(("consolidated", path));
    let path = folder.join("packed.gguf");
    write_gguf(&path, config, weights, dtype)?;
    paths.push(("gguf, packed", path));
    let path = folder.join("each.gguf");
    write_gguf_as_spelled(&path, config, &experts::for_gguf(config, weights, true)?, dtype)?;
    paths.push(("gguf, each", path));
    Ok(paths)
}

/// A checkpoint as a model, with everything in it used and counted.
fn load(path: &Path, kept: impl Into<WeightType>) -> Result<Transformer> {
    let checkpoint = Checkpoint::open(path)?;
    let (mut last, mut rose) = ((0, 0), true);
    let mut weights = checkpoint.weights(kept, &Device::Cpu).on_progress(|done, total| {
        rose &= done >= last.0 && done <= total;
        last = (done, total);
    });
    let model = Transformer::new(checkpoint.config(), &mut weights)?;
    weights.finish()?;
    assert!(rose && last.0 == last.1 && last.1 > 0, "{}: {last:?}", path.display());
    Ok(model)
}

#[test]
fn every_format_is_the_same_model_in_every_type() -> Result {
    let config = wide_mixture();
    let weights = tensors(&config, 5)?;
    let xs = tiny::noise(6, &[40, 256], 1.0)?;
    let folder = tempfile::tempdir()?;
    let paths = formats(folder.path(), &config, &weights, GgmlDType::F32)?;
    let in_memory =
        Transformer::new(&config, &mut weights.clone().into_iter().collect::<HashMap<_, _>>())?;
    let expected = causal(&in_memory, &xs)?;
    for kept in [
        WeightType::Stored,
        WeightType::Dense(DType::F32),
        WeightType::Dense(DType::BF16),
        WeightType::Dense(DType::F16),
        WeightType::Quantized(GgmlDType::Q8_0),
        WeightType::Quantized(GgmlDType::Q4K),
    ] {
        let mut first: Option<(Tensor, _)> = None;
        for (name, path) in &paths {
            let name = format!("{name}, {kept:?}");
            let model = load(path, kept)?;
            assert_eq!(model.config().experts, config.experts, "{name}");
            let got = causal(&model, &xs)?;
            if matches!(kept, WeightType::Stored | WeightType::Dense(DType::F32)) {
                assert_identical(&name, &got, &expected)?;
            }
            match &first {
                Some((logits, bytes)) => {
                    assert_identical(&name, &got, logits)?;
                    assert_eq!(&model.weight_bytes(), bytes, "{name}");
                }
                None => first = Some((got, model.weight_bytes())),
            }
        }
    }
    Ok(())
}

/// Experts that are stored in blocks stay in them, and `w2` is spared, as `down_proj` is; the router is
/// never rounded.
#[test]
fn experts_stay_in_their_blocks() -> Result {
    let config = wide_mixture();
    let weights = tensors(&config, 5)?;
    let count = |of: &str| -> usize {
        let these = weights.iter().filter(|(name, _)| name.contains(of));
        these.map(|(_, tensor)| tensor.elem_count()).sum()
    };
    let router = 4 * count("block_sparse_moe.gate");
    let matrices = count("proj") + count(".experts.") + count("embed_tokens") + count("lm_head");
    let folder = tempfile::tempdir()?;
    let paths = formats(folder.path(), &config, &weights, GgmlDType::Q4K)?;
    let stored: Vec<_> = paths.iter().filter(|(name, _)| name.starts_with("gguf")).collect();
    let xs = tiny::noise(6, &[20, 256], 1.0)?;
    let mut logits = Vec::new();
    for (name, path) in stored {
        let model = load(path, WeightType::Stored)?;
        let expected =
            BTreeMap::from([("f32".to_string(), router), ("q4_k".into(), matrices / 256 * 144)]);
        assert_eq!(model.weight_bytes(), expected, "{name}");
        logits.push(causal(&model, &xs)?);
    }
    assert_identical("packed and each", &logits[0], &logits[1])?;

    let dear = count("v_proj") + count(".w2.") + count("lm_head");
    let model = load(&paths[1].1, GgmlDType::Q4K)?;
    let expected = BTreeMap::from([
        ("f32".to_string(), router),
        ("q4_k".into(), (matrices - dear) / 256 * 144),
        ("q6_k".into(), dear / 256 * 210),
    ]);
    assert_eq!(model.weight_bytes(), expected);
    Ok(())
}

#[test]
fn what_is_wrong_with_a_file_is_said_in_its_own_words() -> Result {
    let config = mixture(3, 2);
    let weights = tensors(&config, 1)?;
    let packed = experts::pack(&config, &weights)?;
    let refused = |config: &Config, tensors: &BTreeMap<String, Tensor>| -> Result<String> {
        let folder = tempfile::tempdir()?;
        write_hugging_face(folder.path(), config, tensors)?;
        let error = load(folder.path(), None).err().ok_or("accepted")?.to_string();
        let root = folder.path().display().to_string();
        Ok(error.replace(&format!("{root}/"), "").replace(&root, "folder"))
    };
    let without = |tensors: &BTreeMap<String, Tensor>, name: &str| {
        let mut tensors = tensors.clone();
        assert!(tensors.remove(name).is_some(), "{name}");
        refused(&config, &tensors)
    };
    let with = |tensors: &BTreeMap<String, Tensor>, name: &str, shape: &[usize]| {
        let mut tensors = tensors.clone();
        tensors.insert(name.into(), tiny::noise(1, shape, 1.0)?);
        refused(&config, &tensors)
    };
    for name in ["block_sparse_moe.experts.2.w2.weight", "block_sparse_moe.gate.weight"] {
        let name = format!("model.layers.1.{name}");
        assert_eq!(without(&weights, &name)?, format!("weight {name} is missing from folder"));
    }
    for name in ["mlp.experts.down_proj", "mlp.experts.gate_up_proj", "mlp.gate.weight"] {
        let name = format!("model.layers.1.{name}");
        assert_eq!(without(&packed, &name)?, format!("weight {name} is missing from folder"));
    }
    let gate_up = "model.layers.0.mlp.experts.gate_up_proj";
    for shape in [&[3, 16, 48][..], &[2, 48, 16], &[3, 24, 16], &[144, 16]] {
        let expected = format!(
            "weight {gate_up} in model.safetensors: expected shape [3, 48, 16], got {shape:?}"
        );
        assert_eq!(with(&packed, gate_up, shape)?, expected);
    }
    let fourth = "model.layers.0.block_sparse_moe.experts.3.w1.weight";
    let unused = "in model.safetensors belongs to the model but is not used: this architecture has no \
                  such weight";
    assert_eq!(with(&weights, fourth, &[24, 16])?, format!("weight {fourth} {unused}"));
    let twice = "model.layers.0.block_sparse_moe.experts.0.w1.weight";
    assert_eq!(with(&packed, twice, &[24, 16])?, format!("weight {twice} {unused}"));
    // An expert's own values, by their place in the tensor: row 3 of w3 of expert 1.
    let mut spoiled = packed.clone();
    let mut values = packed.get(gate_up).ok_or("missing")?.flatten_all()?.to_vec1::<f32>()?;
    let at = (48 + 24 + 3) * 16 + 5;
    values[at] = f32::NAN;
    spoiled.insert(gate_up.into(), Tensor::from_vec(values, (3, 48, 16), &Device::Cpu)?);
    let expected = format!("expected finite values, got NaN at element {at}");
    assert_eq!(
        refused(&config, &spoiled)?,
        format!("weight {gate_up} in model.safetensors: {expected}")
    );

    // More experts than anybody has: whatever the file holds, nothing is made for them.
    let start = Instant::now();
    for all in [1_000_000_000, 2_147_483_647] {
        let config = Config { experts: mixture(all, 2).experts, ..config.clone() };
        for tensors in [&weights, &packed] {
            let error = refused(&config, tensors)?;
            assert!(
                error.contains("expected shape [") && error.contains(&all.to_string()),
                "{error}"
            );
        }
    }
    assert!(start.elapsed().as_secs_f64() < 5.0, "{:?}", start.elapsed());
    Ok(())
}

/// A tensor of which a part was taken has not been used.
#[test]
fn an_expert_that_nobody_took_is_missed() -> Result {
    let config = Config { num_hidden_layers: 1, ..mixture(3, 2) };
    let folder = tempfile::tempdir()?;
    let packed = experts::pack(&config, &tensors(&config, 1)?)?;
    write_hugging_face(folder.path(), &config, &packed)?;
    let checkpoint = Checkpoint::open(folder.path())?;
    let all_but = |left_out: &str| -> Result<String> {
        let mut weights = checkpoint.weights(None, &Device::Cpu);
        for (name, shape) in config.weights().filter(|(name, _)| !name.contains(left_out)) {
            weights.tensor(&name, &shape)?;
            weights.tensor(&name, &shape)?; // and twice is once
        }
        Ok(weights.finish().map_or_else(|error| error.to_string(), |()| "accepted".into()))
    };
    assert_eq!(all_but("nothing")?, "accepted");
    let expected = "is not used: some of its experts were not asked for";
    for (left_out, tensor) in [("experts.1.w3", "gate_up_proj"), ("experts.2.w2", "down_proj")] {
        let got = all_but(left_out)?;
        assert!(got.contains(tensor) && got.ends_with(expected), "{got}");
    }
    Ok(())
}

// ---- the computation ----

proptest! {
    // Always the same: some day, two logits would be so close that rounding chooses.
    #![proptest_config(ProptestConfig {
        rng_seed: RngSeed::Fixed(1),
        ..ProptestConfig::with_cases(48)
    })]

    /// Plain loops over `f64`, which take the softmax over all experts first, as the paper does.
    #[test]
    fn it_is_what_plain_loops_compute(
        all in 1usize..7, chosen in 1usize..7, seq in 1usize..40, seed in 0u64..1000,
        sees_all: bool,
    ) {
        let run = || -> Result {
            let config = mixture(all, chosen.min(all));
            let weights = tiny::weights(&config, seed)?;
            let reference = Reference::new(&config, &weights)?;
            let model = Transformer::new(&config, &mut weights.clone())?;
            let ids = tiny::tokens(&config, seed, seq);
            let batch = Batch::one(seq)?;
            let pass = if sees_all { Pass::Bidirectional(&batch) } else { Pass::Causal(&batch) };
            let got = tiny::logits(&model, &model.embed_ids(&ids)?, pass)?;
            let sees = |i: usize, j: usize| sees_all || j <= i;
            let xs = (0..3).fold(reference.embed(&ids), |xs, layer| {
                reference.layer(&format!("model.layers.{layer}"), &xs, sees)
            });
            let expected: Vec<f64> = xs.iter().flat_map(|x| reference.logits(x)).collect();
            let expected = Tensor::from_vec(expected, (seq, 32), &Device::Cpu)?;
            assert_close("logits", &got, &expected.to_dtype(DType::F32)?, 1e-4)
        };
        tiny::holds(run())?;
    }

    /// A token has the numbers that it has alone, to the last bit as long as the pass has as few tokens, or
    /// as many: however many of them choose an expert.
    #[test]
    fn a_batch_is_its_texts_to_the_last_bit(
        lengths in prop::collection::vec(1usize..40, 1..5), all in 1usize..9, seed in 0u64..1000,
        kept in prop::sample::select(&[
            WeightType::Dense(DType::F32),
            WeightType::Dense(DType::BF16),
            WeightType::Quantized(GgmlDType::Q8_0),
        ][..]),
    ) {
        let run = || -> Result {
            let config = Config {
                hidden_size: 32,
                intermediate_size: 64,
                head_dim: 8,
                ..mixture(all, all.min(2))
            };
            let model = kept::transformer(&config, kept, seed)?;
            let batch = Batch::ragged(&lengths)?;
            let xs = tiny::noise(seed, &[batch.tokens(), 32], 1.0)?;
            let together = tiny::logits(&model, &xs, Pass::Causal(&batch))?;
            for (sequence, length) in lengths.iter().enumerate() {
                let alone = causal(&model, &tiny::rows_of(&xs, &batch, sequence)?)?;
                let same = tiny::rows_of(&together, &batch, sequence)?;
                let few = |tokens: usize| tokens <= 16;
                match few(batch.tokens()) == few(*length) {
                    true => assert_identical("alone", &same, &alone)?,
                    false => assert_close("alone", &same, &alone, 1e-4)?,
                }
            }
            Ok(())
        };
        tiny::holds(run())?;
    }
}

/// So many tokens that they run in pieces, and an expert's rows do too.
#[test]
fn a_long_text_is_what_it_is_in_short() -> Result {
    let config = Config { num_hidden_layers: 1, max_position_embeddings: 8192, ..mixture(2, 2) };
    let model = tiny::transformer(&config, 3)?;
    let lengths = [2100, 17, 2500];
    let batch = Batch::ragged(&lengths)?;
    let xs = tiny::noise(4, &[batch.tokens(), 16], 1.0)?;
    let together = tiny::logits(&model, &xs, Pass::Causal(&batch))?;
    for sequence in 0..lengths.len() {
        let alone = causal(&model, &tiny::rows_of(&xs, &batch, sequence)?)?;
        assert_identical("alone", &tiny::rows_of(&together, &batch, sequence)?, &alone)?;
    }
    Ok(())
}

/// One token of a mixture reads two experts, and what is in the others is nothing to it.
#[test]
fn only_chosen_experts_are_read() -> Result {
    let config = Config { num_hidden_layers: 1, ..mixture(5, 2) };
    let weights = tiny::weights(&config, 8)?;
    let xs = tiny::noise(9, &[1, 16], 1.0)?;
    let expected = causal(&Transformer::new(&config, &mut weights.clone())?, &xs)?;
    let mut read = 0;
    for expert in 0..5 {
        let mut spoiled = weights.clone();
        for (name, tensor) in &mut spoiled {
            if name.contains(&format!("experts.{expert}.")) {
                *tensor = (tensor.ones_like()? * f64::NAN)?;
            }
        }
        let got = causal(&Transformer::new(&config, &mut spoiled)?, &xs)?;
        match got.sum_all()?.to_scalar::<f32>()?.is_nan() {
            true => read += 1,
            false => assert_identical("untouched", &got, &expected)?,
        }
    }
    assert_eq!(read, 2);
    Ok(())
}

/// A dense model is a mixture of one, and so is a mixture of equal experts.
#[test]
fn equal_experts_are_one_mlp() -> Result {
    let dense = tiny::config();
    let weights = tiny::weights(&dense, 2)?;
    let xs = tiny::noise(3, &[30, 16], 1.0)?;
    let expected = causal(&Transformer::new(&dense, &mut weights.clone())?, &xs)?;
    for (all, chosen) in [(1, 1), (4, 1), (4, 2), (4, 4)] {
        let config = mixture(all, chosen);
        let mut mixed = tiny::weights(&config, 4)?;
        for (name, tensor) in &mut mixed {
            let same = match name.split_once("block_sparse_moe.experts.") {
                Some((layer, rest)) => {
                    let matrix = match rest.split('.').nth(1) {
                        Some("w1") => "gate_proj",
                        Some("w3") => "up_proj",
                        _ => "down_proj",
                    };
                    format!("{layer}mlp.{matrix}.weight")
                }
                None => name.clone(),
            };
            if let Some(same) = weights.get(&same) {
                *tensor = same.clone();
            }
        }
        let got = causal(&Transformer::new(&config, &mut mixed)?, &xs)?;
        assert_close(&format!("{chosen} of {all}"), &got, &expected, 1e-5)?;
    }
    Ok(())
}

#[test]
fn gradients_are_those_of_finite_differences() -> Result {
    for (all, chosen) in [(3, 3), (4, 2)] {
        let config = Config { num_hidden_layers: 2, ..mixture(all, chosen) };
        let weights = tiny::weights(&config, 11)?;
        let ids = tiny::tokens(&config, 12, 7);
        let xs = Transformer::new(&config, &mut weights.clone())?.embed_ids(&ids)?;
        let of = |name: &str, x: &Tensor| -> Result<Tensor> {
            let mut weights = weights.clone();
            weights.insert(name.to_string(), x.clone());
            causal(&Transformer::new(&config, &mut weights)?, &xs)
        };
        for name in [
            ROUTER,
            "model.layers.1.block_sparse_moe.gate.weight",
            "model.layers.0.block_sparse_moe.experts.1.w1.weight",
            "model.layers.0.block_sparse_moe.experts.0.w3.weight",
            "model.layers.1.block_sparse_moe.experts.2.w2.weight",
        ] {
            check(&format!("{name}, {chosen} of {all}"), &weights[name], |x| of(name, x))?;
        }
        let model = Transformer::new(&config, &mut weights.clone())?;
        check(&format!("input, {chosen} of {all}"), &xs, |xs| causal(&model, xs))?;
    }
    // Through blocks, to the input.
    let model = kept::transformer(&wide_mixture(), GgmlDType::Q8_0.into(), 13)?;
    check("quantised", &tiny::noise(14, &[3, 256], 1.0)?, |xs| causal(&model, xs))?;
    Ok(())
}

/// An expert that no token has chosen has no gradient, and the others have one.
#[test]
fn gradients_go_where_tokens_went() -> Result {
    let config = Config { num_hidden_layers: 1, ..mixture(5, 2) };
    let mut weights = tiny::weights(&config, 8)?;
    let mut vars = BTreeMap::new();
    for (name, tensor) in weights.iter_mut().filter(|(name, _)| name.ends_with(".w2.weight")) {
        let var = Var::from_tensor(tensor)?;
        *tensor = var.as_tensor().clone();
        vars.insert(name.clone(), var);
    }
    let xs = tiny::noise(9, &[1, 16], 1.0)?;
    let gradients =
        causal(&Transformer::new(&config, &mut weights)?, &xs)?.sum_all()?.backward()?;
    assert_eq!(vars.values().filter(|var| gradients.get(var).is_some()).count(), 2);
    Ok(())
}

// ---- the rest of the crate ----

#[test]
fn it_thinks_and_generates() -> Result {
    let model = tiny::hybrid(&mixture(4, 2), 6)?;
    let prompt: &[u32] = &[3, 5, 7, 11, 13];
    let config = GenerationConfig::default().max_tokens(8);
    let plain = model.generate(prompt, &config)?;
    assert_eq!(plain.ids.len(), 8);
    let thought = model.generate(prompt, &config.clone().thinking(Thinking::new(2).span(1..3)))?;
    assert_eq!(thought.ids.len(), 8);
    assert!(thought.drift().iter().any(|drift| *drift > 0.0));
    let stream: hybrid_attention::Result<Vec<u32>> =
        model.stream(prompt, &config)?.map(|token| Ok(token?.id)).collect();
    assert_eq!(stream?, plain.ids);
    Ok(())
}

/// Numbers that no router can order are an error where they are used, and no panic.
#[test]
fn a_router_of_nans_is_an_error() -> Result {
    let config = mixture(4, 2);
    for row in [0..1, 0..4] {
        let mut weights = tiny::weights(&config, 6)?;
        let values = weights[ROUTER].to_vec2::<f32>()?;
        let spoiled = values.into_iter().enumerate().flat_map(|(index, values)| {
            let nan = row.contains(&index);
            values.into_iter().map(move |value| if nan { f32::NAN } else { value })
        });
        let spoiled: Vec<f32> = spoiled.collect();
        weights.insert(ROUTER.into(), Tensor::from_vec(spoiled, (4, 16), &Device::Cpu)?);
        let model = HybridModel::new(Transformer::new(&config, &mut weights)?, None)?;
        let answer = model.generate([1, 2, 3], &GenerationConfig::default().max_tokens(2));
        assert!(matches!(answer, Err(Error::NotFinite { what: "logits", .. })), "{answer:?}");
    }
    Ok(())
}

#[test]
fn a_side_signal_has_no_place_in_a_mixture() -> Result {
    let model = tiny::transformer(&mixture(4, 2), 6)?;
    let columns = Linear::dense(&tiny::noise(1, &[24, 3], 1.0)?)?;
    let side = SideProjection { gate: columns.clone(), up: columns };
    let refused = model.with_side(1, Some(side)).map(|_| ());
    let expected = "unsupported side signal: for a mixture of experts";
    assert_eq!(refused.err().ok_or("accepted")?.to_string(), expected);
    model.with_side(1, None)?;
    let xs = tiny::noise(2, &[5, 16], 1.0)?;
    let batch = Batch::one(5)?;
    let run = |width: usize| {
        let signal =
            SideSignal::new().layer(1, Tensor::zeros((5, width), DType::F32, &Device::Cpu)?);
        let context = ForwardContext::from(Pass::Causal(&batch)).side(&signal);
        model.forward(&xs, 0..3, context)
    };
    assert_eq!(run(3).err().ok_or("accepted")?.to_string(), expected);
    run(0)?;
    Ok(())
}

/// What `all-linear` is to peft, and what it computes with it: on the weights that it was made for, and on
/// the same as transformers 5 packs them.
#[test]
fn an_adapter_of_peft_is_what_peft_makes_of_it() -> Result {
    let adapter = Adapter::from_folder(fixture("mixtral_adapter"), &Device::Cpu)?;
    let read = |file: &str| candle_core::safetensors::load(fixture(file), &Device::Cpu);
    let expected = read("mixtral_adapter/logits.safetensors")?["causal.logits"].squeeze(0)?;
    let golden = read("mixtral/golden.safetensors")?;
    let ids: Vec<u32> = golden["input_ids"].to_dtype(DType::U32)?.flatten_all()?.to_vec1()?;
    for name in ["mixtral", "mixtral_packed"] {
        let checkpoint = Checkpoint::open(fixture(name))?;
        let config = Config { sliding_window: None, ..checkpoint.config().clone() };
        let base = Transformer::new(&config, &mut checkpoint.weights(None, &Device::Cpu))?;
        for model in [base.adapted(&adapter)?, base.merged(&adapter)?] {
            let got = causal(&model, &model.embed_ids(&ids)?)?;
            assert_close(name, &got, &expected, 1e-5)?;
        }
        let plain = causal(&base, &base.embed_ids(&ids)?)?;
        assert_close(name, &plain, &golden["causal.logits"].squeeze(0)?, 1e-5)?;
    }
    let all = r#"{"peft_type": "LORA", "r": 2, "lora_alpha": 3, "target_modules": "all-linear"}"#;
    let ours = Adapter::new(
        &common::fixture_config("mixtral")?,
        &AdapterConfig::from_json(all)?,
        1,
        &Device::Cpu,
    )?;
    let names =
        |adapter: &Adapter| -> Vec<String> { adapter.tensors().map(|(name, _)| name).collect() };
    assert_eq!(names(&ours), names(&adapter));
    Ok(())
}

/// Names are PEFT's for a Mixtral of transformers 4, where all of these are linear layers.
#[test]
fn adapters_reach_every_matrix() -> Result {
    let config = Config { num_hidden_layers: 1, ..mixture(2, 2) };
    let all = AdapterConfig::from_json(
        r#"{"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": "all-linear"}"#,
    )?;
    let adapter = Adapter::new(&config, &all, 1, &Device::Cpu)?.trainable()?;
    let modules: Vec<String> = adapter
        .tensors()
        .filter_map(|(name, _)| {
            let name = name.strip_prefix("base_model.model.model.layers.0.")?;
            Some(name.strip_suffix(".lora_A.weight")?.to_string())
        })
        .collect();
    let expected = [
        "block_sparse_moe.experts.0.w1",
        "block_sparse_moe.experts.0.w2",
        "block_sparse_moe.experts.0.w3",
        "block_sparse_moe.experts.1.w1",
        "block_sparse_moe.experts.1.w2",
        "block_sparse_moe.experts.1.w3",
        "block_sparse_moe.gate",
        "self_attn.k_proj",
        "self_attn.o_proj",
        "self_attn.q_proj",
        "self_attn.v_proj",
    ];
    assert_eq!(modules, expected);
    for (index, var) in adapter.variables()?.iter().enumerate() {
        var.set(&tiny::noise(20 + index as u64, var.dims(), 0.2)?)?;
    }
    let model = tiny::transformer(&config, 6)?;
    let (adapted, merged) = (model.adapted(&adapter)?, model.merged(&adapter)?);
    for tokens in [1, 5, 30] {
        let xs = tiny::noise(7, &[tokens, 16], 1.0)?;
        let got = causal(&adapted, &xs)?;
        assert_close("merged", &got.detach(), &causal(&merged, &xs)?, 1e-5)?;
        let plain = causal(&model, &xs)?;
        let moved = (got.detach() - &plain)?.abs()?.max_all()?.to_scalar::<f32>()?;
        assert!(moved > 1e-2, "{moved}");
        let gradients = got.sqr()?.sum_all()?.backward()?;
        let learning = adapter.variables()?.into_iter().filter(|var| gradients.get(var).is_some());
        assert_eq!(learning.count(), 2 * expected.len());
    }
    // Saved and read again it is the same; of a layer that lacks an expert it is missed.
    let folder = tempfile::tempdir()?;
    adapter.save(folder.path())?;
    let read = Adapter::from_folder(folder.path(), &Device::Cpu)?;
    let xs = tiny::noise(7, &[9, 16], 1.0)?;
    let again = causal(&model.adapted(&read)?, &xs)?;
    assert_close("read", &again, &causal(&adapted, &xs)?.detach(), 1e-5)?;
    let larger = tiny::transformer(&Config { num_hidden_layers: 1, ..mixture(3, 2) }, 6)?;
    let missing = larger.adapted(&read).map(|_| ()).err().ok_or("accepted")?.to_string();
    assert!(
        missing.contains("block_sparse_moe.experts.2.w1.lora_A.weight is missing"),
        "{missing}"
    );
    let attention = AdapterConfig::rank(2).target_modules(["q_proj", "w2"]);
    let attention = Adapter::new(&config, &attention, 1, &Device::Cpu)?;
    let mind = hybrid_attention::thought::ThoughtModel::from(model);
    mind.adapted(&attention, AdapterScope::Thinking)?;
    Ok(())
}

/// Nothing is said about a mixture that is as it should be.
#[test]
fn loading_is_silent() -> Result {
    let config = mixture(3, 2);
    let folder = tempfile::tempdir()?;
    write_hugging_face(folder.path(), &config, &experts::pack(&config, &tensors(&config, 1)?)?)?;
    let events = logged(|| load(folder.path(), None).map(|_| ()))?;
    assert!(events.is_empty(), "{events:?}");
    Ok(())
}
