//! Weights in FP8 are what transformers, and candle, widen them to; so is the model they make.

mod common;

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor};
use hybrid_attention::load::{Checkpoint, WeightType};
use hybrid_attention::model::{Batch, Pass, Transformer, Weights};
use proptest::prelude::*;
use serde_json::{Value, json};
use tempfile::TempDir;

use common::{
    Result, assert_close, assert_identical, fixture, interleave, logged, tiny, write_consolidated,
    write_hugging_face,
};

const CPU: Device = Device::Cpu;

fn transformer(path: &Path, kept: impl Into<WeightType>) -> Result<Transformer> {
    let checkpoint = Checkpoint::open(path)?;
    let mut weights = checkpoint.weights(kept, &CPU);
    let model = Transformer::new(checkpoint.config(), &mut weights)?;
    weights.finish()?;
    Ok(model)
}

#[test]
fn logits_are_those_of_transformers() -> Result {
    for case in ["fp8_tensor", "fp8_block"] {
        let path = fixture("scaled").join(case);
        let golden = candle_core::safetensors::load(path.join("golden.safetensors"), &CPU)?;
        let ids: Vec<u32> = golden["input_ids"].to_dtype(DType::U32)?.flatten_all()?.to_vec1()?;
        let model = transformer(&path, DType::F32)?;
        let xs = model.embed_ids(&ids)?;
        let h = model.forward(&xs, model.all_layers(), Pass::Causal(&Batch::one(ids.len())?))?;
        let expected = golden["causal.logits"].squeeze(0)?;
        assert_close(case, &model.logits(&h)?, &expected, 1e-5)?;

        let checkpoint = Checkpoint::open(&path)?;
        let name = "model.layers.0.self_attn.q_proj.weight";
        let expected = &golden["q_proj"];
        for (kept, dtype) in
            [(Some(DType::F32), DType::F32), (Some(DType::F16), DType::F16), (None, DType::BF16)]
        {
            let widened = checkpoint.weights(kept, &CPU).tensor(name, &[64, 32])?;
            assert_eq!(widened.dtype(), dtype);
            assert_identical(case, &widened, &expected.to_dtype(dtype)?)?;
        }
    }
    Ok(())
}

#[test]
fn what_is_left_out_is_named_once() -> Result {
    let events = logged(|| {
        transformer(&fixture("scaled/fp8_tensor"), DType::F32)?;
        Ok(())
    })?;
    let expected = [
        r#"WARN message=only the text part of this model is read model_type="mistral3""#,
        r#"WARN message=tensors not used names="*.activation_scale" count=14"#,
        r#"WARN message=tensors not used names="multi_modal_projector.*" count=4"#,
        r#"WARN message=tensors not used names="vision_tower.*" count=11"#,
    ];
    assert_eq!(events, expected);
    Ok(())
}

/// A folder with these tensors, and the configuration of `tiny` with another field or so.
fn folder(tensors: &HashMap<String, Tensor>, quantization: &Value) -> Result<TempDir> {
    let folder = tempfile::tempdir()?;
    write_hugging_face(folder.path(), &tiny::config(), &BTreeMap::new())?;
    let path = folder.path().join("config.json");
    let mut config: Value = serde_json::from_str(&fs::read_to_string(&path)?)?;
    config["quantization_config"] = quantization.clone();
    fs::write(path, config.to_string())?;
    candle_core::safetensors::save(tensors, folder.path().join("model.safetensors"))?;
    Ok(folder)
}

fn blocks_of(rows: usize, columns: usize) -> Value {
    json!({"quant_method": "fp8", "weight_block_size": [rows, columns]})
}

/// `scales` repeated over their blocks, by candle.
fn widened(fp8: &Tensor, scales: &Tensor, block: (usize, usize)) -> Result<Tensor> {
    let (rows, columns) = fp8.dims2()?;
    let index = |len: usize, block: usize| -> Result<Tensor> {
        let index: Vec<u32> = (0..len).map(|at| (at / block) as u32).collect();
        Ok(Tensor::new(index, &CPU)?)
    };
    let scales = scales.to_dtype(DType::F32)?.index_select(&index(rows, block.0)?, 0)?;
    let scales = scales.index_select(&index(columns, block.1)?, 1)?;
    Ok((fp8.to_dtype(DType::F32)? * scales)?)
}

/// The tensors of `tiny`, whose projections are in FP8, and the same as wide as they mean to be.
fn model_in_fp8(
    seed: u64,
    block: (usize, usize),
    dtype: DType,
) -> Result<(HashMap<String, Tensor>, BTreeMap<String, Tensor>)> {
    let (mut stored, mut wide) = (HashMap::new(), BTreeMap::new());
    for (name, tensor) in tiny::weights(&tiny::config(), seed)? {
        if !name.contains("_proj") {
            stored.insert(name.clone(), tensor.clone());
            wide.insert(name, tensor);
            continue;
        }
        let (rows, columns) = tensor.dims2()?;
        let fp8 = (tensor * 100.0)?.to_dtype(DType::F8E4M3)?;
        let shape = [rows.div_ceil(block.0), columns.div_ceil(block.1)];
        let scales = (tiny::noise(seed + 1, &shape, 0.002)? + 0.01)?.to_dtype(dtype)?;
        wide.insert(name.clone(), widened(&fp8, &scales, block)?);
        stored.insert(format!("{name}_scale_inv"), scales);
        stored.insert(name, fp8);
    }
    Ok((stored, wide))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Of any size of block, at the edges of a matrix too, and in any type of scale.
    #[test]
    fn fp8_is_the_plain_checkpoint_of_its_values(
        seed in 0..1000u64, rows in 1..40usize, columns in 1..40usize, narrow: bool,
    ) {
        let check = || -> Result {
            let dtype = if narrow { DType::BF16 } else { DType::F32 };
            let (stored, wide) = model_in_fp8(seed, (rows, columns), dtype)?;
            let folder = folder(&stored, &blocks_of(rows, columns))?;
            let checkpoint = Checkpoint::open(folder.path())?;
            let mut weights = checkpoint.weights(DType::F32, &CPU);
            for (name, tensor) in &wide {
                assert_identical(name, &weights.tensor(name, tensor.dims())?, tensor)?;
            }
            Ok(weights.finish()?)
        };
        check().map_err(|error| TestCaseError::fail(error.to_string()))?;
    }
}

/// Mistral's own files interleave the rows of queries and keys, with their scales; one is for all of a matrix.
#[test]
fn consolidated_files_have_one_scale() -> Result {
    let config = tiny::config();
    let (stored, _) = model_in_fp8(3, (1000, 1000), DType::F32)?;
    let folder = tempfile::tempdir()?;
    write_consolidated(folder.path(), &config, &tiny::weights(&config, 3)?.into_iter().collect())?;
    let path = folder.path().join("consolidated.safetensors");
    let mut tensors = candle_core::safetensors::load(&path, &CPU)?;
    let mut wide = HashMap::new();
    for (name, fp8) in stored.iter().filter(|(_, tensor)| tensor.dtype() == DType::F8E4M3) {
        let scale = stored[&format!("{name}_scale_inv")].flatten_all()?;
        wide.insert(name.clone(), widened(fp8, &scale.reshape((1, 1))?, (1000, 1000))?);
        let rotated = name.contains("q_proj") || name.contains("k_proj");
        let bytes = match rotated {
            true => interleave(&fp8.to_dtype(DType::F32)?, config.head_dim)?,
            false => fp8.to_dtype(DType::F32)?,
        };
        let own = [
            ("model.", ""),
            ("self_attn.q_proj", "attention.wq"),
            ("self_attn.k_proj", "attention.wk"),
            ("self_attn.v_proj", "attention.wv"),
            ("self_attn.o_proj", "attention.wo"),
            ("mlp.gate_proj", "feed_forward.w1"),
            ("mlp.down_proj", "feed_forward.w2"),
            ("mlp.up_proj", "feed_forward.w3"),
        ]
        .iter()
        .fold(name.clone(), |name, (ours, file)| name.replace(ours, file));
        let stem = own.trim_end_matches("weight").to_string();
        assert!(tensors.insert(own, bytes.to_dtype(DType::F8E4M3)?).is_some(), "{stem}");
        tensors.insert(format!("{stem}qscale_weight"), scale.reshape(())?);
        tensors.insert(format!("{stem}qscale_act"), scale.reshape(())?);
    }
    tensors.insert("vision_encoder.ln_pre.weight".into(), Tensor::ones(4, DType::F32, &CPU)?);
    candle_core::safetensors::save(&tensors, &path)?;
    let path = folder.path().join("params.json");
    let mut params: Value = serde_json::from_str(&fs::read_to_string(&path)?)?;
    params["quantization"] = json!({"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR"});
    params["vision_encoder"] = json!({"hidden_size": 4});
    fs::write(&path, params.to_string())?;

    let checkpoint = Checkpoint::open(folder.path())?;
    let mut weights = checkpoint.weights(DType::F32, &CPU);
    for (name, shape) in checkpoint.config().weights() {
        let tensor = weights.tensor(&name, &shape)?;
        if let Some(expected) = wide.get(&name) {
            assert_identical(&name, &tensor, expected)?;
        }
    }
    Ok(weights.finish()?)
}

#[test]
fn rows_may_have_scales_of_their_own() -> Result {
    let (mut stored, wide) = model_in_fp8(4, (1, 1000), DType::BF16)?;
    let scales: Vec<_> = stored.keys().filter(|it| it.ends_with("_scale_inv")).cloned().collect();
    for (index, name) in scales.into_iter().enumerate() {
        let scale = stored.remove(&name).ok_or("no scale")?;
        // (rows, 1) or (rows)
        let scale = if index % 2 == 0 { scale } else { scale.flatten_all()? };
        stored.insert(name.replace("_scale_inv", "_scale"), scale);
    }
    let groups = json!({"group_0": {"targets": ["Linear"], "weights":
        {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": true}}});
    let quantization = json!({"quant_method": "compressed-tensors", "format": "float-quantized",
        "config_groups": groups});
    let folder = folder(&stored, &quantization)?;
    let checkpoint = Checkpoint::open(folder.path())?;
    let mut weights = checkpoint.weights(DType::F32, &CPU);
    for (name, tensor) in &wide {
        assert_identical(name, &weights.tensor(name, tensor.dims())?, tensor)?;
    }
    Ok(weights.finish()?)
}

/// The 254 numbers there are.
#[test]
fn each_byte_is_the_number_that_candle_takes_it_for() -> Result {
    let bytes: Vec<u8> = (0..=255).filter(|byte| byte & 0x7f != 0x7f).collect();
    let view =
        safetensors::tensor::TensorView::new(safetensors::Dtype::F8_E4M3, vec![127, 2], &bytes)?;
    let file = safetensors::serialize([("it", view)], None)?;
    let fp8 = candle_core::safetensors::load_buffer(&file, &CPU)?.remove("it").ok_or("nothing")?;
    let tensors = HashMap::from([
        ("model.norm.weight".to_string(), fp8.clone()),
        ("model.norm.weight_scale".to_string(), Tensor::ones(1, DType::F32, &CPU)?),
    ]);
    let folder = folder(&tensors, &blocks_of(128, 128))?;
    let checkpoint = Checkpoint::open(folder.path())?;
    let read = checkpoint.weights(DType::F32, &CPU).tensor("model.norm.weight", &[127, 2])?;
    assert_identical("all", &read, &fp8.to_dtype(DType::F32)?)
}

#[test]
fn fp8_may_become_blocks_while_it_is_loaded() -> Result {
    let path = fixture("scaled/fp8_block");
    let checkpoint = Checkpoint::open(&path)?;
    let wide =
        candle_core::safetensors::load(path.join("golden.safetensors"), &CPU)?["q_proj"].clone();
    let mut weights = checkpoint.weights(GgmlDType::Q8_0, &CPU);
    let linear = weights.linear("model.layers.0.self_attn.q_proj.weight", 64, 32)?;
    let expected = QTensor::quantize(&wide, GgmlDType::Q8_0)?.dequantize(&CPU)?;
    let rows = Tensor::eye(32, DType::F32, &CPU)?;
    assert_close("q8_0", &linear.forward(&rows)?.t()?, &expected, 1e-6)
}

#[test]
fn refusals() -> Result {
    let name = "model.layers.1.mlp.up_proj.weight";
    let refusal = |edit: &dyn Fn(&mut HashMap<String, Tensor>) -> Result| -> Result<String> {
        let (mut stored, _) = model_in_fp8(5, (16, 16), DType::F32)?;
        edit(&mut stored)?;
        let folder = folder(&stored, &blocks_of(16, 16))?;
        let error = transformer(folder.path(), DType::F32).err().ok_or("accepted")?.to_string();
        Ok(error.replace(&format!("{}", folder.path().display()), "FOLDER"))
    };
    let scale = format!("{name}_scale_inv");
    let shape = model_in_fp8(5, (16, 16), DType::F32)?.0[&scale].dims().to_vec();
    let with = |value: f32| -> Result<String> {
        refusal(&|stored| {
            let scales = stored[&scale].flatten_all()?.to_vec1::<f32>()?;
            let scales: Vec<f32> =
                scales.iter().enumerate().map(|(i, it)| if i == 1 { value } else { *it }).collect();
            stored.insert(scale.clone(), Tensor::from_vec(scales, shape.clone(), &CPU)?);
            Ok(())
        })
    };
    let place = "FOLDER/model.safetensors";
    for (value, shown) in [(f32::NAN, "NaN"), (f32::INFINITY, "inf"), (f32::NEG_INFINITY, "-inf")] {
        assert_eq!(
            with(value)?,
            format!("weight {scale} in {place}: expected finite values, got {shown} at element 1")
        );
    }
    let overflow = with(1e38)?;
    assert!(
        overflow.starts_with(&format!("weight {name} in {place}: expected finite")),
        "{overflow}"
    );
    assert_eq!(
        refusal(&|stored| {
            stored.remove(&scale);
            Ok(())
        })?,
        format!("weight {scale} is missing from FOLDER")
    );
    assert_eq!(
        refusal(&|stored| {
            stored.insert(scale.clone(), Tensor::ones((7, 7), DType::F32, &CPU)?);
            Ok(())
        })?,
        format!("weight {scale} in {place}: expected shape {shape:?}, got [7, 7]")
    );
    // a scale that nothing is multiplied by
    assert_eq!(
        refusal(&|stored| {
            let wide = stored[name].to_dtype(DType::F32)?;
            stored.insert(name.into(), wide);
            Ok(())
        })?,
        format!(
            "weight {scale} in {place} belongs to the model but is not used: this architecture has no \
             such weight"
        )
    );
    // NaN, of which FP8 has two
    for byte in [0x7f, 0xff] {
        let (stored, _) = model_in_fp8(5, (16, 16), DType::F32)?;
        let folder = folder(&stored, &blocks_of(16, 16))?;
        let path = folder.path().join("model.safetensors");
        let mut bytes = fs::read(&path)?;
        let start = {
            let (_, header) = safetensors::SafeTensors::read_metadata(&bytes)?;
            let info = header.info(name).ok_or("no weight")?;
            bytes.len() - header.data_len() + info.data_offsets.0
        };
        bytes[start + 33] = byte;
        fs::write(&path, bytes)?;
        let error = transformer(folder.path(), DType::F32).err().ok_or("accepted")?.to_string();
        let expected = format!(
            "weight {name} in {}: expected finite values, got NaN at element 33",
            path.display()
        );
        assert_eq!(error, expected);
    }
    Ok(())
}
