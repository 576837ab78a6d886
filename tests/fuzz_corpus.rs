//! The seeds of the fuzz targets load, and no prefix of them makes the loaders or readers panic.

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::quantized::GgmlDType;
use candle_core::{DType, Device, Tensor};
use common::gguf::GgufFile;
use common::{Result, experts, fixture, write_consolidated, write_gguf, write_hugging_face};
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
fn split_seeds_load() -> Result {
    run_seeds(&committed().join("split"), hostile::split)
}

#[test]
fn folder_seeds_load() -> Result {
    run_seeds(&committed().join("folder"), hostile::folder)
}

#[test]
fn tekken_seeds_load() -> Result {
    run_seeds(&committed().join("tekken"), hostile::tekken)
}

#[test]
fn sentencepiece_seeds_load() -> Result {
    run_seeds(&committed().join("sentencepiece"), hostile::sentencepiece)
}

/// The fuzz targets.
const TARGETS: [&str; 5] = ["gguf", "split", "folder", "tekken", "sentencepiece"];

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
    for target in TARGETS {
        fs::create_dir_all(folder.join(target))?;
    }
    write_corpus(folder)?;
    run_seeds(&folder.join("gguf"), hostile::gguf)?;
    run_seeds(&folder.join("split"), hostile::split)?;
    run_seeds(&folder.join("folder"), hostile::folder)?;
    run_seeds(&folder.join("tekken"), hostile::tekken)?;
    run_seeds(&folder.join("sentencepiece"), hostile::sentencepiece)?;
    for target in TARGETS {
        let names = |corpus: &Path| -> std::io::Result<BTreeSet<_>> {
            fs::read_dir(corpus.join(target))?.map(|entry| Ok(entry?.file_name())).collect()
        };
        assert_eq!(names(folder)?, names(&committed())?);
    }
    Ok(())
}

/// A model whose matrices, where their rows are whole blocks, are zeros in blocks of this number, of so many weights and bytes, in so many
/// parts.
fn zeros(config: &Config, block: (u32, usize, usize), count: u16) -> Result<Vec<GgufFile>> {
    let mut parts = vec![GgufFile::default(); count.into()];
    parts[0] = GgufFile::of(config)?;
    for (index, (name, dims)) in config.weights().enumerate() {
        let elements: usize = dims.iter().product();
        let (kind, bytes) = match dims.len() {
            2 if dims[1] % block.1 == 0 => (block.0, elements / block.1 * block.2),
            _ => (0, 4 * elements),
        };
        parts[index % usize::from(count)].push(&name, &dims, kind, &vec![0; bytes]);
    }
    let tensors = config.weights().count() as i32;
    let numbered = parts.into_iter().zip(0..).map(|(part, no)| part.part(no, count, tensors));
    Ok(numbered.collect())
}

fn write_corpus(corpus: &Path) -> Result {
    let (config, _) = tiny(32, None)?;
    for (name, block) in [("iq4_nl", (20, 32, 18)), ("mxfp4", (39, 32, 17))] {
        fs::write(corpus.join("gguf").join(name), zeros(&config, block, 1)?[0].bytes())?;
        for count in [2, 3] {
            let mut seed = count.to_string().into_bytes();
            seed.extend(zeros(&config, block, count)?.iter().flat_map(GgufFile::bytes));
            fs::write(corpus.join("split").join(format!("{name}_{count}")), seed)?;
        }
    }
    let few = |config| Config { head_dim: 2, intermediate_size: 2, hidden_size: 256, ..config };
    let config = few(config);
    fs::write(corpus.join("gguf").join("iq4_xs"), zeros(&config, (23, 256, 136), 1)?[0].bytes())?;
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

    // FP8 with a scale for all, each row, and each block; the last as the text part of another model
    for (name, quantization, shape) in [
        ("fp8", r#"{"quant_method": "fp8", "weight_block_size": null}"#, [1, 1]),
        (
            "fp8_rows",
            r#"{"quant_method": "compressed-tensors", "format": "float-quantized",
                "config_groups": {"group_0": {"weights": {"num_bits": 8, "type": "float"}}}}"#,
            [4, 1],
        ),
        ("fp8_blocks", r#"{"quant_method": "fp8", "weight_block_size": [2, 3]}"#, [2, 2]),
    ] {
        let (wrapped, prefix) = match name {
            "fp8_blocks" => (true, "language_model."),
            _ => (false, ""),
        };
        let mut stored = std::collections::HashMap::new();
        for (own, tensor) in &tensors {
            let own = format!("{prefix}{own}");
            if !own.contains("_proj") {
                stored.insert(own, tensor.to_dtype(DType::BF16)?);
                continue;
            }
            stored.insert(own.clone(), tensor.to_dtype(DType::F8E4M3)?);
            let rows = tensor.dim(0)?;
            let shape = match shape {
                [2, 2] => [rows.div_ceil(2), 2],
                [4, 1] => [rows, 1],
                one => one,
            };
            let suffix = if name == "fp8_rows" { "scale" } else { "scale_inv" };
            let scales = Tensor::rand(0.5f32, 1.5, &shape, &Device::Cpu)?;
            stored.insert(format!("{own}_{suffix}"), scales);
        }
        let own = json.trim_end_matches('}');
        let quantization = format!(r#""quantization_config": {quantization}"#);
        let config = match wrapped {
            true => {
                let rope = r#""rope_theta": 1e4, "rope_type": "yarn", "factor": 3, "mscale": 1,
                    "mscale_all_dim": 1, "original_max_position_embeddings": 3,
                    "llama_4_scaling_beta": 0.1"#;
                let text = json
                    .replace(r#""rope_theta": 1e4, "rope_type": "default""#, rope)
                    .replace(r#""mistral""#, r#""ministral3""#);
                format!(
                    r#"{{"model_type": "mistral3", "text_config": {text}, "tie_word_embeddings": true,
                        {quantization}}}"#
                )
            }
            false => format!("{own}, {quantization}}}"),
        };
        let path = folder.path().join("model.safetensors");
        candle_core::safetensors::save(&stored, &path)?;
        let mut seed = format!("0{config}\0").into_bytes();
        seed.extend(fs::read(&path)?);
        fs::write(corpus.join("folder").join(name), seed)?;
    }
    write_vocabularies(corpus)
}

/// Those of the tests, with as few tokens as there may be.
fn write_vocabularies(corpus: &Path) -> Result {
    let bytes = fs::read(fixture("tokenizer/tekken/tekken.json"))?;
    let mut tekken: serde_json::Value = serde_json::from_slice(&bytes)?;
    let few: Vec<_> = tekken["vocab"].as_array().into_iter().flatten().take(262).cloned().collect();
    tekken["vocab"] = few.into();
    tekken["config"]["default_vocab_size"] = (24 + 260).into();
    fs::write(corpus.join("tekken/v3"), serde_json::to_vec(&tekken)?)?;
    tekken["config"]["version"] = "v13".into();
    tekken["special_tokens"] = (["<unk>", "<s>", "</s>", "[INST]", "[/INST]"].iter().enumerate())
        .map(|(rank, token)| serde_json::json!({"rank": rank, "token_str": token}))
        .collect();
    fs::write(corpus.join("tekken/v13"), serde_json::to_vec(&tekken)?)?;
    for name in ["v1", "v3", "v7", "other"] {
        let model = fixture("tokenizer/sentencepiece").join(name).with_extension("model");
        fs::copy(model, corpus.join("sentencepiece").join(name))?;
    }
    Ok(())
}
