//! What weights are kept as: the blocks of a GGUF file, and those that they are rounded to while they
//! are loaded, hold the numbers that candle's own quantisation gives.

mod common;

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor};
use common::{
    Result, assert_identical, config_of_large_blocks, fixture, fixture_config, fixture_weights,
    interleave, tiny, write_consolidated, write_gguf,
};
use half::f16;
use hybrid_attention::load::Checkpoint;
use hybrid_attention::model::{Batch, Linear, Pass, Transformer, Weights};
use hybrid_attention::{Config, HybridModel, WeightType};
use proptest::prelude::*;

const BLOCKS: [GgmlDType; 10] = [
    GgmlDType::Q2K,
    GgmlDType::Q3K,
    GgmlDType::Q4K,
    GgmlDType::Q5K,
    GgmlDType::Q6K,
    GgmlDType::Q4_0,
    GgmlDType::Q4_1,
    GgmlDType::Q5_0,
    GgmlDType::Q5_1,
    GgmlDType::Q8_0,
];

type Tensors = BTreeMap<String, Tensor>;

/// A model of the shape `edit` gives it, and random weights for it.
fn model(edit: impl FnOnce(&mut Config)) -> Result<(Config, Tensors)> {
    let mut config = config_of_large_blocks()?;
    edit(&mut config);
    let mut tensors = Tensors::new();
    for (seed, (name, shape)) in config.weights().enumerate() {
        tensors.insert(name, tiny::noise(seed as u64, &shape, 0.3)?);
    }
    Ok((config, tensors))
}

/// The numbers in a projection, read off its products with a unit matrix, which are exact.
fn numbers(linear: &Linear, in_features: usize) -> Result<Tensor> {
    let ones = Tensor::eye(in_features, DType::F32, &Device::Cpu)?;
    Ok(linear.forward(&ones)?.t()?.contiguous()?)
}

/// Checks every matrix of the checkpoint against `expected`, which is given its name and values.
fn assert_matrices(
    path: &Path,
    kept: impl Into<WeightType>,
    tensors: &Tensors,
    expected: impl Fn(&str, &Tensor) -> Result<Tensor>,
) -> Result {
    let checkpoint = Checkpoint::open(path)?;
    let mut weights = checkpoint.weights(kept, &Device::Cpu);
    for (name, tensor) in tensors {
        if let [out, input] = *tensor.dims() {
            let linear = weights.linear(name, out, input)?;
            // Sums do not tell -0 from 0.
            let expected = (expected(name, tensor)? + 0.0)?;
            assert_identical(name, &numbers(&linear, input)?, &expected)?;
        } else {
            weights.tensor(name, tensor.dims())?;
        }
    }
    Ok(weights.finish()?)
}

/// Whether a matrix is spared the coarsest blocks.
fn dear(name: &str) -> bool {
    ["lm_head.weight", "v_proj.weight", "down_proj.weight"].iter().any(|end| name.ends_with(end))
}

fn rounded(tensor: &Tensor, blocks: GgmlDType) -> Result<Tensor> {
    Ok(QTensor::quantize(tensor, blocks)?.dequantize(&Device::Cpu)?)
}

#[test]
fn blocks_of_a_gguf_file_stay_as_they_are() -> Result {
    let (config, tensors) = model(|_| ())?;
    for blocks in BLOCKS {
        let file = tempfile::NamedTempFile::new()?;
        write_gguf(file.path(), &config, &tensors, blocks)?;
        assert_matrices(file.path(), None, &tensors, |_, tensor| rounded(tensor, blocks))?;

        let load = |kept: WeightType| -> Result<Transformer> {
            let checkpoint = Checkpoint::open(file.path())?;
            let mut weights = checkpoint.weights(kept, &Device::Cpu);
            let transformer = Transformer::new(checkpoint.config(), &mut weights)?;
            weights.finish()?;
            Ok(transformer)
        };
        let (kept, wide) = (load(WeightType::Stored)?, load(DType::F32.into())?);
        let elements: usize =
            tensors.values().filter(|it| it.rank() == 2).map(Tensor::elem_count).sum();
        let bytes = elements / blocks.block_size() * blocks.type_size();
        assert_eq!(kept.weight_bytes().into_values().collect::<Vec<_>>(), [bytes]);
        assert_eq!(wide.weight_bytes().get("f32"), Some(&(4 * elements)));

        let logits = |model: &Transformer| -> Result<Tensor> {
            let xs = model.embed(&Tensor::new(&[[1u32, 5, 31, 0, 5]], &Device::Cpu)?)?;
            let pass = Batch::one(5)?;
            Ok(model.logits(&model.forward(&xs, 0..1, Pass::Causal(&pass))?)?)
        };
        common::assert_close("logits", &logits(&kept)?, &logits(&wide)?, 1e-5)?;
    }
    Ok(())
}

#[test]
fn types_are_named_as_gguf_tools_do() -> Result {
    let (_, tensors) = model(|_| ())?;
    let (config, _) = model(|_| ())?;
    let folder = tempfile::tempdir()?;
    write_consolidated(folder.path(), &config, &tensors)?;
    let named = |kept: WeightType| -> Result<Vec<String>> {
        let checkpoint = Checkpoint::open(folder.path())?;
        let mut weights = checkpoint.weights(kept, &Device::Cpu);
        let transformer = Transformer::new(&config, &mut weights)?;
        Ok(transformer.weight_bytes().into_keys().collect())
    };
    assert_eq!(named(GgmlDType::Q8_0.into())?, ["q8_0"]);
    assert_eq!(named(GgmlDType::Q4K.into())?, ["q4_k", "q6_k"]);
    assert_eq!(named(DType::BF16.into())?, ["bf16"]);
    assert_eq!(named(WeightType::default())?, ["f32"]);
    Ok(())
}

#[test]
fn matrices_are_rounded_as_candle_rounds_them() -> Result {
    let (config, tensors) = model(|_| ())?;
    let folder = tempfile::tempdir()?;
    // Mistral's own layout: the rows of queries and keys have to be moved, too.
    write_consolidated(folder.path(), &config, &tensors)?;
    for blocks in BLOCKS {
        let finer_than_6k = matches!(blocks, GgmlDType::Q8_0 | GgmlDType::Q6K);
        assert_matrices(folder.path(), blocks, &tensors, |name, tensor| {
            rounded(tensor, if dear(name) && !finer_than_6k { GgmlDType::Q6K } else { blocks })
        })?;
    }
    Ok(())
}

#[test]
fn a_tied_table_is_rounded_as_a_head() -> Result {
    let (config, tensors) = model(|config| config.tie_word_embeddings = true)?;
    let folder = tempfile::tempdir()?;
    write_consolidated(folder.path(), &config, &tensors)?;
    assert_matrices(folder.path(), GgmlDType::Q4K, &tensors, |name, tensor| {
        let dear = dear(name) || name == "model.embed_tokens.weight";
        rounded(tensor, if dear { GgmlDType::Q6K } else { GgmlDType::Q4K })
    })
}

#[test]
fn rows_that_no_k_block_divides_have_smaller_blocks() -> Result {
    let (config, tensors) = model(|config| {
        (config.hidden_size, config.head_dim, config.intermediate_size) = (96, 24, 40);
    })?;
    let folder = tempfile::tempdir()?;
    write_consolidated(folder.path(), &config, &tensors)?;
    for (wanted, stand_in, head) in [
        (GgmlDType::Q2K, GgmlDType::Q4_0, GgmlDType::Q8_0),
        (GgmlDType::Q3K, GgmlDType::Q4_0, GgmlDType::Q8_0),
        (GgmlDType::Q4K, GgmlDType::Q5_0, GgmlDType::Q8_0),
        (GgmlDType::Q5K, GgmlDType::Q5_1, GgmlDType::Q8_0),
        (GgmlDType::Q6K, GgmlDType::Q8_0, GgmlDType::Q8_0),
        (GgmlDType::Q4_1, GgmlDType::Q4_1, GgmlDType::Q8_0),
    ] {
        assert_matrices(folder.path(), wanted, &tensors, |name, tensor| match tensor.dim(1)? {
            40 => Ok(tensor.clone()), // no multiple of 32: as stored
            _ if dear(name) => rounded(tensor, head),
            _ => rounded(tensor, stand_in),
        })?;
    }
    Ok(())
}

#[test]
fn blocks_no_larger_than_the_wanted_ones_are_not_rounded_again() -> Result {
    let (config, tensors) = model(|_| ())?;
    let file = tempfile::NamedTempFile::new()?;
    write_gguf(file.path(), &config, &tensors, GgmlDType::Q4_0)?;
    let as_stored = |_: &str, tensor: &Tensor| rounded(tensor, GgmlDType::Q4_0);
    assert_matrices(file.path(), GgmlDType::Q8_0, &tensors, as_stored)?;
    write_gguf(file.path(), &config, &tensors, GgmlDType::Q8_0)?;
    assert_matrices(file.path(), GgmlDType::Q6K, &tensors, |_, tensor| {
        rounded(&rounded(tensor, GgmlDType::Q8_0)?, GgmlDType::Q6K)
    })
}

#[test]
fn half_precision_stays_so_in_gguf_files_too() -> Result {
    let (config, tensors) = model(|_| ())?;
    for (stored, dtype) in [(GgmlDType::F16, DType::F16), (GgmlDType::BF16, DType::BF16)] {
        let file = tempfile::NamedTempFile::new()?;
        write_gguf(file.path(), &config, &tensors, stored)?;
        let checkpoint = Checkpoint::open(file.path())?;
        let mut weights = checkpoint.weights(None, &Device::Cpu);
        for (name, tensor) in &tensors {
            let loaded = weights.tensor(name, tensor.dims())?;
            let expected =
                if tensor.rank() == 2 { tensor.to_dtype(dtype)? } else { tensor.clone() };
            assert_identical(name, &loaded, &expected)?;
        }
    }
    Ok(())
}

#[test]
fn what_cannot_be_kept_so_is_refused() -> Result {
    let (config, mut tensors) = model(|_| ())?;
    let folder = tempfile::tempdir()?;
    write_consolidated(folder.path(), &config, &tensors)?;
    let refusal = |kept: WeightType| -> Result<String> {
        let checkpoint = Checkpoint::open(folder.path())?;
        let mut weights = checkpoint.weights(kept, &Device::Cpu);
        let built = Transformer::new(&config, &mut weights);
        let error = built.err().ok_or("accepted")?.to_string();
        Ok(error.replace(&folder.path().display().to_string(), "."))
    };
    for blocks in [GgmlDType::F32, GgmlDType::F16, GgmlDType::BF16, GgmlDType::Q8_1, GgmlDType::Q8K]
    {
        let expected =
            "parameter blocks: expected Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2K, Q3K, Q4K, Q5K or Q6K";
        assert_eq!(refusal(blocks.into())?, format!("{expected}, got {blocks:?}"));
    }
    // A scale of 1e8 / 127 is no f16. The third row of the file is row 1 of the first head.
    let name = "model.layers.0.self_attn.q_proj.weight";
    let mut rows = tensors.get(name).ok_or("missing")?.to_vec2::<f32>()?;
    rows[1][40] = 1e8;
    let spoiled = Tensor::new(rows, &Device::Cpu)?;
    tensors.insert(name.into(), spoiled);
    write_consolidated(folder.path(), &config, &tensors)?;
    let got = refusal(GgmlDType::Q8_0.into())?;
    let expected = "weight layers.0.attention.wq.weight in ./consolidated.safetensors, converted to Q8_0: expected finite values, got ";
    assert!(got.starts_with(expected), "{got}");
    assert!(got.ends_with(&format!("at element {}", 2 * 256 + 32)), "{got}");
    Ok(())
}

#[test]
fn blocks_with_an_infinite_scale_are_refused() -> Result {
    let (config, tensors) = model(|_| ())?;
    let file = tempfile::NamedTempFile::new()?;
    write_gguf(file.path(), &config, &tensors, GgmlDType::Q8_0)?;
    let bytes = fs::read(file.path())?;
    let q_proj =
        interleave(tensors.get("model.layers.0.self_attn.q_proj.weight").ok_or("missing")?, 64)?;
    let blocks = QTensor::quantize(&q_proj, GgmlDType::Q8_0)?.data()?.into_owned();
    let start = bytes.windows(blocks.len()).position(|at| at == blocks).ok_or("not found")?;
    let mut spoiled = bytes.clone();
    // the scale of the second block of the sixth row
    let at = start + (5 * 8 + 1) * 34;
    spoiled[at..at + 2].copy_from_slice(&f16::INFINITY.to_le_bytes());
    fs::write(file.path(), spoiled)?;
    let got = HybridModel::from_gguf(file.path(), None, &Device::Cpu).err().ok_or("accepted")?;
    let got = got.to_string();
    let first = 5 * 256 + 32;
    assert!(got.contains("blk.0.attn_q.weight") && got.contains("expected finite values"), "{got}");
    assert!(got.ends_with(&format!("at element {first}")), "{got}");
    Ok(())
}

/// On narrow weights nothing is rounded but the weights: the model computes what it computes in `f32`
/// with the rounded ones. How far that is from the unrounded ones is for the weights to say: one of them
/// is off by 2^-12 of itself in f16 and by 2^-9 in bf16 at most, in Q8_0 by 2^-8 of the largest of 32, and
/// the random ones of the fixtures multiply that by ten before it comes out. In a mixture it may also send a
/// token to another expert.
#[test]
fn nothing_but_the_weights_is_rounded() -> Result {
    for name in common::FIXTURES {
        let run = |config: &Config, weights: &mut dyn FnMut() -> Result<Transformer>| {
            let model = weights()?;
            let ids = Tensor::arange(0, config.vocab_size as u32, &Device::Cpu)?.unsqueeze(0)?;
            let xs = model.embed(&ids.narrow(1, 0, 24)?)?;
            let batch = Batch::one(24)?;
            let out = model.forward(&xs, model.all_layers(), Pass::Causal(&batch))?;
            Ok(model.norm(&out)?)
        };
        let load = |kept: WeightType| -> Result<Tensor> {
            let checkpoint = Checkpoint::open(fixture(name))?;
            run(checkpoint.config(), &mut || {
                let mut weights = checkpoint.weights(kept, &Device::Cpu);
                let model = Transformer::new(checkpoint.config(), &mut weights)?;
                weights.finish()?;
                Ok(model)
            })
        };
        let config = fixture_config(name)?;
        let wide = load(DType::F32.into())?;
        let distance = |xs: &Tensor| -> Result<f32> {
            let norm = |xs: &Tensor| -> Result<f32> {
                Ok(xs.sqr()?.sum_all()?.to_scalar::<f32>()?.sqrt())
            };
            Ok(norm(&(xs - &wide)?)? / norm(&wide)?)
        };
        for (kept, at_most) in [
            (WeightType::Dense(DType::F16), 0.01),
            (WeightType::Dense(DType::BF16), 0.05),
            (WeightType::Quantized(GgmlDType::Q8_0), 0.1),
        ] {
            let got = load(kept)?;
            let of_rounded = run(&config, &mut || {
                let weights = fixture_weights(name)?.into_iter().map(|(name, tensor)| {
                    let tensor = match kept {
                        WeightType::Dense(dtype) => tensor.to_dtype(dtype)?.to_dtype(DType::F32)?,
                        WeightType::Quantized(blocks)
                            if common::in_blocks(&name, &tensor, blocks) =>
                        {
                            rounded(&tensor, blocks)?
                        }
                        _ => tensor,
                    };
                    Ok((name, tensor))
                });
                let mut weights = weights.collect::<Result<HashMap<_, _>>>()?;
                Ok(Transformer::new(&config, &mut weights)?)
            })?;
            common::assert_close(&format!("{name} {kept:?}"), &got, &of_rounded, 1e-5)?;
            let off = distance(&got)?;
            let at_most = if config.experts.is_some() { 4.0 * at_most } else { at_most };
            assert!(off > 0.0 && off < at_most, "{name} {kept:?}: {off}");
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Any number of rows: every task's share ends up in its place.
    #[test]
    fn any_number_of_rows(vocab in 1usize..700, k_block: bool) {
        let run = || -> Result {
            let blocks = if k_block { GgmlDType::Q4K } else { GgmlDType::Q5_1 };
            let (config, tensors) = model(|config| config.vocab_size = vocab)?;
            let folder = tempfile::tempdir()?;
            write_consolidated(folder.path(), &config, &tensors)?;
            let name = "model.embed_tokens.weight";
            let checkpoint = Checkpoint::open(folder.path())?;
            let mut weights = checkpoint.weights(blocks, &Device::Cpu);
            let linear = weights.linear(name, vocab, 256)?;
            let expected = rounded(tensors.get(name).ok_or("missing")?, blocks)?;
            assert_identical(name, &numbers(&linear, 256)?, &(expected + 0.0)?)
        };
        tiny::holds(run())?;
    }
}
