//! The seeds of the fuzz targets load, and no prefix of them makes the loaders panic.

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::quantized::GgmlDType;
use candle_core::{DType, Device, Tensor};
use common::{Result, experts, write_consolidated, write_gguf, write_hugging_face};
use hybrid_attention::{Config, Experts};
use hybrid_attention_testing::hostile;

fn committed() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fuzz/corpus")
}

fn run_seeds(corpus: &Path, run: fn(&[u8]) -> hybrid_attention::Result<()>) -> Result {
    let mut seeds = 0;
    for entry in fs::read_dir(corpus)? {
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
    run_seeds(&committed().join("gguf"), hostile::gguf)
}

#[test]
fn folder_seeds_load() -> Result {
    run_seeds(&committed().join("folder"), hostile::folder)
}

/// A model of a few KB with `hidden` a multiple of the blocks it is to be stored in.
fn tiny(hidden: usize, experts: Option<Experts>) -> Result<(Config, BTreeMap<String, Tensor>)> {
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
        rope_scaling: None,
        query_scaling: None,
        experts,
        attention_bias: false,
        bos_token_id: Some(1),
        eos_token_ids: vec![2],
    };
    let mut tensors = BTreeMap::new();
    for (name, shape) in config.weights() {
        tensors.insert(name, Tensor::randn(0f32, 1f32, shape, &Device::Cpu)?);
    }
    Ok((config, tensors))
}

/// What is written here is what was committed, but for the random weights. To write that anew, set
/// `HYBRID_ATTENTION_CORPUS` to `tests/fuzz/corpus`.
#[test]
fn seeds_can_be_written_anew() -> Result {
    let temporary = tempfile::tempdir()?;
    let chosen = std::env::var_os("HYBRID_ATTENTION_CORPUS").map(PathBuf::from);
    let folder = chosen.as_deref().unwrap_or(temporary.path());
    for target in ["gguf", "folder"] {
        fs::create_dir_all(folder.join(target))?;
    }
    write_corpus(folder)?;
    run_seeds(&folder.join("gguf"), hostile::gguf)?;
    run_seeds(&folder.join("folder"), hostile::folder)?;
    for target in ["gguf", "folder"] {
        let names = |corpus: &Path| -> std::io::Result<BTreeSet<_>> {
            fs::read_dir(corpus.join(target))?.map(|entry| Ok(entry?.file_name())).collect()
        };
        assert_eq!(names(folder)?, names(&committed())?);
    }
    Ok(())
}

fn write_corpus(corpus: &Path) -> Result {
    let (config, tensors) = tiny(32, None)?;
    for dtype in [GgmlDType::Q4_0, GgmlDType::Q5_1, GgmlDType::Q8_0] {
        let path = corpus.join("gguf").join(format!("{dtype:?}").to_lowercase());
        write_gguf(&path, &config, &tensors, dtype)?;
    }
    let (config, tensors) = tiny(4, None)?;
    for dtype in [GgmlDType::F32, GgmlDType::F16, GgmlDType::BF16] {
        let path = corpus.join("gguf").join(format!("{dtype:?}").to_lowercase());
        write_gguf(&path, &config, &tensors, dtype)?;
    }

    let mixture = Experts { num_local_experts: 2, num_experts_per_tok: 1 };
    let (of_experts, packed) = tiny(32, Some(mixture.clone()))?;
    write_gguf(&corpus.join("gguf/experts"), &of_experts, &packed, GgmlDType::Q8_0)?;
    let (of_experts, packed) = tiny(4, Some(mixture))?;
    let folder = tempfile::tempdir()?;
    let packed = experts::pack(&of_experts, &packed)?;
    write_hugging_face(folder.path(), &of_experts, &packed)?;
    let mut seed = b"0".to_vec();
    seed.extend(fs::read(folder.path().join("config.json"))?);
    seed.push(0);
    seed.extend(fs::read(folder.path().join("model.safetensors"))?);
    fs::write(corpus.join("folder/experts"), seed)?;

    let folder = tempfile::tempdir()?;
    write_consolidated(folder.path(), &config, &tensors)?;
    let mut seed = b"1".to_vec();
    seed.extend(fs::read(folder.path().join("params.json"))?);
    seed.push(0);
    seed.extend(fs::read(folder.path().join("consolidated.safetensors"))?);
    fs::write(corpus.join("folder").join("consolidated"), seed)?;

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
        fs::write(corpus.join("folder").join(name), seed)?;
        let index: BTreeMap<_, _> =
            stored.keys().map(|name| (name, "model-00001-of-00001.safetensors")).collect();
        let index = serde_json::json!({ "weight_map": index });
        let generation = r#"{"eos_token_id": [2, 3], "temperature": 0.5, "top_k": 4}"#;
        let mut seed = format!("2{json}\0{generation}\0{index}\0").into_bytes();
        seed.extend(&weights);
        fs::write(corpus.join("folder").join(format!("shard_{name}")), seed)?;
    }
    Ok(())
}
