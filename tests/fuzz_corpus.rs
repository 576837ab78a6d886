//! The seeds of the fuzz targets load, and no prefix of them makes the loaders panic.

mod common;
#[path = "common/hostile.rs"]
mod hostile;

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;

use candle_core::quantized::GgmlDType;
use candle_core::{DType, Device, Tensor};
use common::{Result, write_consolidated, write_gguf};
use hybrid_attention::Config;

fn corpus(target: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus").join(target)
}

fn run_seeds(target: &str, run: fn(&[u8]) -> hybrid_attention::Result<()>) -> Result {
    let mut seeds = 0;
    for entry in fs::read_dir(corpus(target))? {
        let path = entry?.path();
        let seed = fs::read(&path)?;
        run(&seed).map_err(|error| format!("{}: {error}", path.display()))?;
        for len in (0..seed.len()).step_by(7) {
            let _ = run(&seed[..len]);
        }
        seeds += 1;
    }
    assert!(seeds > 0);
    Ok(())
}

#[test]
fn gguf_seeds_load() -> Result {
    run_seeds("gguf", hostile::gguf)
}

#[test]
fn folder_seeds_load() -> Result {
    run_seeds("folder", hostile::folder)
}

/// A model of a few KB with `hidden` a multiple of the blocks it is to be stored in.
fn tiny(hidden: usize) -> Result<(Config, BTreeMap<String, Tensor>)> {
    let config = Config {
        vocab_size: 5,
        hidden_size: hidden,
        intermediate_size: hidden,
        num_hidden_layers: 1,
        num_attention_heads: 2,
        num_key_value_heads: 1,
        head_dim: hidden / 2,
        rms_norm_eps: 1e-5,
        rope_theta: 1e4,
        sliding_window: Some(3),
        max_position_embeddings: 9,
        tie_word_embeddings: true,
        bos_token_id: Some(1),
        eos_token_ids: vec![2],
    };
    let mut tensors = BTreeMap::new();
    for (name, shape) in config.weights() {
        tensors.insert(name, Tensor::randn(0f32, 1f32, shape, &Device::Cpu)?);
    }
    Ok((config, tensors))
}

#[test]
#[ignore = "writes tests/fuzz/corpus anew"]
fn write_corpus() -> Result {
    let (config, tensors) = tiny(32)?;
    for dtype in [GgmlDType::Q4_0, GgmlDType::Q5_1, GgmlDType::Q8_0] {
        let path = corpus("gguf").join(format!("{dtype:?}").to_lowercase());
        write_gguf(&path, &config, &tensors, dtype)?;
    }
    let (config, tensors) = tiny(4)?;
    for dtype in [GgmlDType::F32, GgmlDType::F16, GgmlDType::BF16] {
        let path = corpus("gguf").join(format!("{dtype:?}").to_lowercase());
        write_gguf(&path, &config, &tensors, dtype)?;
    }

    let folder = tempfile::tempdir()?;
    write_consolidated(folder.path(), &config, &tensors)?;
    let mut seed = b"1".to_vec();
    seed.extend(fs::read(folder.path().join("params.json"))?);
    seed.push(0);
    seed.extend(fs::read(folder.path().join("consolidated.safetensors"))?);
    fs::write(corpus("folder").join("consolidated"), seed)?;

    let json = r#"{"model_type": "mistral", "vocab_size": 5, "hidden_size": 4, "intermediate_size": 4,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 2,
        "rms_norm_eps": 1e-5, "sliding_window": 3, "layer_types": ["sliding_attention"],
        "rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}, "tie_word_embeddings": true,
        "max_position_embeddings": 9, "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": [2]}"#;
    for (name, dtype) in [("f32", DType::F32), ("bf16", DType::BF16), ("f64", DType::F64)] {
        let path = folder.path().join("model.safetensors");
        let mut stored = std::collections::HashMap::new();
        for (name, tensor) in &tensors {
            stored.insert(name.clone(), tensor.to_dtype(dtype)?);
        }
        candle_core::safetensors::save(&stored, &path)?;
        let weights = fs::read(&path)?;
        let mut seed = format!("0{json}\0").into_bytes();
        seed.extend(&weights);
        fs::write(corpus("folder").join(name), seed)?;
        let index: BTreeMap<_, _> =
            stored.keys().map(|name| (name, "model-00001-of-00001.safetensors")).collect();
        let index = serde_json::json!({ "weight_map": index });
        let generation = r#"{"eos_token_id": [2, 3], "temperature": 0.5, "top_k": 4}"#;
        let mut seed = format!("2{json}\0{generation}\0{index}\0").into_bytes();
        seed.extend(&weights);
        fs::write(corpus("folder").join(format!("shard_{name}")), seed)?;
    }
    Ok(())
}
