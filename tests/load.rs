//! Loaded tensors equal those of candle's own readers, whatever the format of the checkpoint.

mod common;

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;

use candle_core::quantized::gguf_file::Content;
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor};
use common::tiny::holds;
use common::{
    FIXTURES, Result, assert_identical, config_of_large_blocks, fixture, fixture_config,
    fixture_weights, in_blocks, interleave, logged, smollm2, write_consolidated, write_gguf,
};
use half::{bf16, f16};
use hybrid_attention::Config;
use hybrid_attention::load::{Checkpoint, GenerationDefaults};
use hybrid_attention::model::Weights;
use proptest::prelude::*;

/// Every weight that the configuration asks for, by the name that Hugging Face gives it.
fn load(path: &Path, dtype: Option<DType>) -> Result<(Config, BTreeMap<String, Tensor>)> {
    let checkpoint = Checkpoint::open(path)?;
    let mut weights = checkpoint.weights(dtype, &Device::Cpu);
    let mut tensors = BTreeMap::new();
    for (name, shape) in checkpoint.config().weights() {
        tensors.insert(name.clone(), weights.tensor(&name, &shape)?);
    }
    weights.finish()?;
    Ok((checkpoint.config().clone(), tensors))
}

fn assert_all_identical(
    left: &BTreeMap<String, Tensor>,
    right: &BTreeMap<String, Tensor>,
) -> Result {
    assert_eq!(left.keys().collect::<Vec<_>>(), right.keys().collect::<Vec<_>>());
    for (name, tensor) in left {
        assert_identical(name, tensor, right.get(name).ok_or("missing")?)?;
    }
    Ok(())
}

#[test]
fn folders_equal_candles_own_read() -> Result {
    for name in FIXTURES {
        let (config, tensors) = load(&fixture(name), None)?;
        assert_eq!(config, fixture_config(name)?);
        assert_all_identical(&tensors, &fixture_weights(name)?)?;
    }
    Ok(())
}

#[test]
fn dtypes_equal_candles_conversion() -> Result {
    let expected = fixture_weights("window")?;
    for dtype in [DType::F32, DType::BF16, DType::F16] {
        let (_, tensors) = load(&fixture("window"), Some(dtype))?;
        for (name, tensor) in &expected {
            let loaded = tensors.get(name).ok_or("missing")?;
            assert_identical(name, &tensor.to_dtype(dtype)?, loaded)?;
        }
    }
    Ok(())
}

#[test]
fn consolidated_equals_hugging_face() -> Result {
    for name in FIXTURES {
        let folder = tempfile::tempdir()?;
        write_consolidated(folder.path(), &fixture_config(name)?, &fixture_weights(name)?)?;
        let (config, tensors) = load(folder.path(), None)?;
        assert_eq!(config, fixture_config(name)?);
        assert_all_identical(&tensors, &fixture_weights(name)?)?;
    }
    Ok(())
}

#[test]
fn config_json_serves_consolidated_weights_too() -> Result {
    let folder = tempfile::tempdir()?;
    write_consolidated(folder.path(), &fixture_config("window")?, &fixture_weights("window")?)?;
    fs::remove_file(folder.path().join("params.json"))?;
    fs::copy(fixture("window").join("config.json"), folder.path().join("config.json"))?;
    assert_all_identical(&load(folder.path(), None)?.1, &fixture_weights("window")?)
}

#[test]
fn params_json_serves_hugging_face_weights_too() -> Result {
    let folder = tempfile::tempdir()?;
    write_consolidated(folder.path(), &fixture_config("head_dim")?, &fixture_weights("head_dim")?)?;
    fs::remove_file(folder.path().join("consolidated.safetensors"))?;
    let file = "model.safetensors";
    fs::copy(fixture("head_dim").join(file), folder.path().join(file))?;
    let (config, tensors) = load(folder.path(), None)?;
    assert_eq!(config, fixture_config("head_dim")?);
    assert_all_identical(&tensors, &fixture_weights("head_dim")?)
}

#[test]
fn hugging_face_files_are_taken_where_both_are() -> Result {
    let folder = tempfile::tempdir()?;
    write_consolidated(folder.path(), &fixture_config("head_dim")?, &fixture_weights("head_dim")?)?;
    fs::write(folder.path().join("consolidated.safetensors"), "would not load")?;
    for file in ["config.json", "model.safetensors"] {
        fs::copy(fixture("head_dim").join(file), folder.path().join(file))?;
    }
    assert_all_identical(&load(folder.path(), None)?.1, &fixture_weights("head_dim")?)
}

#[test]
fn gguf_equals_hugging_face_and_candles_blocks() -> Result {
    for name in FIXTURES {
        let (mut config, tensors) = (fixture_config(name)?, fixture_weights(name)?);
        for dtype in [
            GgmlDType::F32,
            GgmlDType::F16,
            GgmlDType::BF16,
            GgmlDType::Q8_0,
            GgmlDType::Q4_0,
            GgmlDType::Q4_1,
            GgmlDType::Q5_0,
            GgmlDType::Q5_1,
        ] {
            let file = tempfile::NamedTempFile::new()?;
            write_gguf(file.path(), &config, &tensors, dtype)?;
            let (loaded_config, loaded) = load(file.path(), Some(DType::F32))?;
            // the file has room for f32 only
            config.rms_norm_eps = f64::from(config.rms_norm_eps as f32);
            assert_eq!(loaded_config, config);
            for (name, tensor) in &tensors {
                let expected = if in_blocks(name, tensor, dtype) {
                    QTensor::quantize(tensor, dtype)?.dequantize(&Device::Cpu)?
                } else {
                    tensor.clone()
                };
                assert_identical(name, &expected, loaded.get(name).ok_or("missing")?)?;
            }
        }
    }
    Ok(())
}

#[test]
fn k_quants_equal_candles_dequantize() -> Result {
    let config = config_of_large_blocks()?;
    let mut tensors = BTreeMap::new();
    for (name, shape) in config.weights() {
        tensors.insert(name, Tensor::randn(0f32, 1f32, shape, &Device::Cpu)?);
    }
    for dtype in [
        GgmlDType::Q2K,
        GgmlDType::Q3K,
        GgmlDType::Q4K,
        GgmlDType::Q5K,
        GgmlDType::Q6K,
        GgmlDType::Q8K,
    ] {
        let file = tempfile::NamedTempFile::new()?;
        write_gguf(file.path(), &config, &tensors, dtype)?;
        for wanted in [DType::F32, DType::BF16] {
            let (_, loaded) = load(file.path(), Some(wanted))?;
            for (name, tensor) in tensors.iter().filter(|(_, tensor)| tensor.rank() == 2) {
                let expected = QTensor::quantize(tensor, dtype)?.dequantize(&Device::Cpu)?;
                let loaded = loaded.get(name).ok_or("missing")?;
                assert_identical(name, &expected.to_dtype(wanted)?, loaded)?;
            }
        }
    }
    Ok(())
}

#[test]
fn a_head_that_consolidated_weights_leave_out_is_tied() -> Result {
    let folder = tempfile::tempdir()?;
    let config = fixture_config("tied_sharded")?;
    write_consolidated(folder.path(), &config, &fixture_weights("tied_sharded")?)?;
    let path = folder.path().join("params.json");
    let mut params: serde_json::Value = serde_json::from_str(&fs::read_to_string(&path)?)?;
    params.as_object_mut().ok_or("params.json is no object")?.remove("tied_embeddings");
    fs::write(path, params.to_string())?;
    assert!(Checkpoint::open(folder.path())?.config().tie_word_embeddings);
    Ok(())
}

#[test]
fn a_copied_head_of_a_tied_model_is_no_error() -> Result {
    let folder = tempfile::tempdir()?;
    let (config, mut tensors) = (fixture_config("tied_sharded")?, fixture_weights("tied_sharded")?);
    let table = tensors.get("model.embed_tokens.weight").ok_or("missing")?.clone();
    tensors.insert("lm_head.weight".into(), table);
    write_consolidated(folder.path(), &config, &tensors)?;
    load(folder.path(), None)?;
    Ok(())
}

#[test]
fn inert_and_foreign_tensors_are_no_error() -> Result {
    let folder = tempfile::tempdir()?;
    let mut tensors: HashMap<_, _> = fixture_weights("window")?.into_iter().collect();
    let ones = Tensor::ones(4, DType::F32, &Device::Cpu)?;
    tensors.insert("model.layers.0.self_attn.rotary_emb.inv_freq".into(), ones.clone());
    tensors.insert("score.weight".into(), ones);
    candle_core::safetensors::save(&tensors, folder.path().join("model.safetensors"))?;
    fs::copy(fixture("window").join("config.json"), folder.path().join("config.json"))?;
    let events = logged(|| {
        assert_all_identical(&load(folder.path(), None)?.1, &fixture_weights("window")?)
    })?;
    let file = folder.path().join("model.safetensors");
    let expected = ["model.layers.0.self_attn.rotary_emb.inv_freq", "score.weight"]
        .map(|name| format!("WARN message=tensor not used name={name:?} file={file:?}"));
    assert_eq!(events, expected);
    Ok(())
}

#[test]
fn progress_reaches_the_total() -> Result {
    let checkpoint = Checkpoint::open(fixture("tied_sharded"))?;
    let reports = RefCell::new(Vec::new());
    let mut weights = checkpoint
        .weights(None, &Device::Cpu)
        .on_progress(|done, total| reports.borrow_mut().push((done, total)));
    for (name, shape) in checkpoint.config().weights() {
        weights.tensor(&name, &shape)?;
    }
    weights.finish()?;
    let reports = reports.into_inner();
    assert!(reports.is_sorted());
    assert_eq!(reports.first(), Some(&(128 * 64 * 4, 731_904)));
    assert_eq!(reports.last(), Some(&(731_904, 731_904)));
    Ok(())
}

#[test]
fn metadata_and_path_are_there_for_the_tokenizer() -> Result {
    let folder = Checkpoint::open(fixture("window"))?;
    assert_eq!(folder.path(), fixture("window"));
    assert!(folder.gguf_metadata().is_none());
    let file = tempfile::NamedTempFile::new()?;
    write_gguf(
        file.path(),
        &fixture_config("window")?,
        &fixture_weights("window")?,
        GgmlDType::F32,
    )?;
    let gguf = Checkpoint::open(file.path())?;
    assert_eq!(gguf.path(), file.path());
    assert!(gguf.gguf_metadata().is_some_and(|m| m.contains_key("tokenizer.ggml.bos_token_id")));
    assert_eq!(gguf.generation_defaults()?, GenerationDefaults::default());
    Ok(())
}

#[test]
fn generation_defaults_are_read() -> Result {
    assert_eq!(Checkpoint::open(fixture("window"))?.generation_defaults()?, Default::default());
    let folder = tempfile::tempdir()?;
    for file in ["config.json", "model.safetensors"] {
        fs::copy(fixture("window").join(file), folder.path().join(file))?;
    }
    fs::write(
        folder.path().join("generation_config.json"),
        r#"{"_from_model_config": true, "bos_token_id": 1, "eos_token_id": [2, 7], "do_sample": true,
            "temperature": 0.6, "top_k": 50, "top_p": 0.9, "min_p": null, "repetition_penalty": 1}"#,
    )?;
    let expected = GenerationDefaults {
        eos_token_ids: vec![2, 7],
        bos_token_id: Some(1),
        do_sample: Some(true),
        temperature: Some(0.6),
        top_k: Some(50),
        top_p: Some(0.9),
        min_p: None,
        repetition_penalty: Some(1.0),
    };
    assert_eq!(Checkpoint::open(folder.path())?.generation_defaults()?, expected);
    Ok(())
}

/// A folder with the one-layer shape of `config`, whose embedding table is `bytes`, stored as
/// `dtype` behind a header of `padding` extra bytes, so that nothing is aligned.
fn write_table(
    folder: &Path,
    shape: [usize; 2],
    dtype: &str,
    bytes: &[u8],
    padding: usize,
) -> Result {
    let [rows, columns] = shape;
    let config = format!(
        r#"{{"model_type": "llama", "vocab_size": {rows}, "hidden_size": {columns},
            "intermediate_size": 1, "num_hidden_layers": 1, "num_attention_heads": 1, "head_dim": 2,
            "bos_token_id": null, "eos_token_id": null}}"#
    );
    fs::write(folder.join("config.json"), config)?;
    let header = format!(
        r#"{{"model.embed_tokens.weight": {{"dtype": "{dtype}", "shape": {shape:?},
            "data_offsets": [0, {}]}}{}}}"#,
        bytes.len(),
        " ".repeat(padding),
    );
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend_from_slice(header.as_bytes());
    file.extend_from_slice(bytes);
    fs::write(folder.join("model.safetensors"), file)?;
    Ok(())
}

fn load_table(folder: &Path, shape: [usize; 2], dtype: DType) -> Result<Tensor> {
    let checkpoint = Checkpoint::open(folder)?;
    let mut weights = checkpoint.weights(Some(dtype), &Device::Cpu);
    Ok(weights.tensor("model.embed_tokens.weight", &shape)?)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_shape_type_and_alignment_converts_as_candle_does(
        rows in 1usize..70,
        columns in 1usize..1500,
        stored in 0usize..4,
        wanted in 0usize..3,
        padding in 0usize..8,
        seed in any::<u32>(),
    ) {
        let wanted = [DType::F32, DType::BF16, DType::F16][wanted];
        let stored = [DType::F64, DType::F32, DType::F16, DType::BF16][stored];
        let values: Vec<f64> = (0..rows * columns)
            .map(|i| f64::from((i as u32).wrapping_mul(2_654_435_761) ^ seed) / 1e6 - 2000.0)
            .collect();
        let (name, bytes): (_, Vec<u8>) = match stored {
            DType::F64 => ("F64", values.iter().flat_map(|x| x.to_le_bytes()).collect()),
            DType::F32 => ("F32", values.iter().flat_map(|x| (*x as f32).to_le_bytes()).collect()),
            DType::F16 => {
                ("F16", values.iter().flat_map(|x| f16::from_f64(*x).to_le_bytes()).collect())
            }
            _ => ("BF16", values.iter().flat_map(|x| bf16::from_f64(*x).to_le_bytes()).collect()),
        };
        let check = || -> Result {
            let folder = tempfile::tempdir()?;
            write_table(folder.path(), [rows, columns], name, &bytes, padding)?;
            let loaded = load_table(folder.path(), [rows, columns], wanted)?;
            let expected = Tensor::from_vec(values.clone(), (rows, columns), &Device::Cpu)?;
            // f64 is narrowed by way of f32
            let stored = if stored == DType::F64 { DType::F32 } else { stored };
            let expected = expected.to_dtype(stored)?;
            assert_identical("table", &loaded, &expected.to_dtype(wanted)?)
        };
        holds(check())?;
    }
}

/// The published SmolLM2-135M-Instruct in Q4_1, against candle's reader.
#[test]
fn smollm2_equals_candles_own_read() -> Result {
    let Some(path) = smollm2() else { return Ok(()) };
    let (config, tensors) = load(&path, None)?;
    assert_eq!(config.num_hidden_layers, 30);
    assert!(config.tie_word_embeddings);
    let mut file = fs::File::open(&path)?;
    let content = Content::read(&mut file)?;
    assert_eq!(tensors.len(), content.tensor_infos.len());
    for (name, tensor) in &tensors {
        let spelling = [
            ("model.layers.", "blk."),
            ("self_attn.o_proj", "attn_output"),
            ("self_attn.", "attn_"),
            ("mlp.", "ffn_"),
            ("post_attention_layernorm", "ffn_norm"),
            ("input_layernorm", "attn_norm"),
            ("_proj", ""),
            ("model.embed_tokens", "token_embd"),
            ("model.norm", "output_norm"),
        ];
        let spelled = spelling.iter().fold(name.clone(), |name, (from, to)| name.replace(from, to));
        let expected =
            content.tensor(&mut file, &spelled, &Device::Cpu)?.dequantize(&Device::Cpu)?;
        let rotated = name.contains("q_proj") || name.contains("k_proj");
        let loaded = if rotated { interleave(tensor, 64)? } else { tensor.clone() };
        assert_identical(name, &loaded, &expected)?;
    }
    Ok(())
}
