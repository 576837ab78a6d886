//! GGUF files that candle does not read: types it lacks, and models in several files.
//!
//! `fixtures/gguf` was written by llama.cpp's own Python package.

mod common;

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor, Var};
use common::gguf::{GgufFile, key, string};
use common::{
    Result, assert_close, assert_identical, config_of_large_blocks, fixture, interleave, logged,
    tiny,
};
use half::f16;
use hybrid_attention::load::Checkpoint;
use hybrid_attention::model::{Batch, Pass, Transformer, Weights};
use hybrid_attention::{Config, GenerationConfig, HybridModel, Message, Thinking, WeightType};
use rand::{Rng, RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;

/// Name, number, weights and bytes of a block.
type Kind = (&'static str, u32, usize, usize);

const KINDS: [Kind; 3] = [("iq4_nl", 20, 32, 18), ("iq4_xs", 23, 256, 136), ("mxfp4", 39, 32, 17)];

/// Random blocks whose weights are about 0.1.
fn random_blocks((_, number, size, bytes): Kind, elements: usize, seed: u64) -> Vec<u8> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut blocks = vec![0; elements / size * bytes];
    rng.fill_bytes(&mut blocks);
    for block in blocks.chunks_exact_mut(bytes) {
        let scale = f16::from_f32(match number {
            20 => rng.random_range(-0.002f32..0.002),
            _ => rng.random_range(-0.0001f32..0.0001),
        });
        match number {
            39 => block[0] = rng.random_range(119..124),
            _ => block[..2].copy_from_slice(&scale.to_le_bytes()),
        }
    }
    blocks
}

/// A file with a model whose matrices are random blocks.
fn write_model(path: &Path, config: &Config, kind: Kind) -> Result {
    let mut file = GgufFile::of(config)?;
    for (seed, (name, dims)) in config.weights().enumerate() {
        let (seed, elements) = (seed as u64, dims.iter().product());
        match dims.len() {
            2 => file.push(&name, &dims, kind.1, &random_blocks(kind, elements, seed)),
            _ => file.push(&name, &dims, 0, &1f32.to_le_bytes().repeat(elements)),
        }
    }
    Ok(fs::write(path, file.bytes())?)
}

/// What the fixture's tensors are called here.
const NAMES: [(&str, &str); 4] = [
    ("blk.0.attn_q.weight", "model.layers.0.self_attn.q_proj.weight"),
    ("blk.0.attn_v.weight", "model.layers.0.self_attn.v_proj.weight"),
    ("blk.0.attn_output.weight", "model.layers.0.self_attn.o_proj.weight"),
    ("blk.0.ffn_gate.weight", "model.layers.0.mlp.gate_proj.weight"),
];

/// Calls `check` with each tensor that `read` gives for a name and a shape, and with ggml's numbers.
fn each_codebook(
    read: impl Fn(&Checkpoint, &str, (usize, usize)) -> Result<Tensor>,
    check: impl Fn(&str, &Tensor, &Tensor) -> Result,
) -> Result {
    let checkpoint = Checkpoint::open(fixture("gguf/codebooks.gguf"))?;
    let by_ggml =
        candle_core::safetensors::load(fixture("gguf/codebooks.safetensors"), &Device::Cpu)?;
    for (stored, name) in NAMES {
        let by_ggml = &by_ggml[stored];
        let mut tensor = read(&checkpoint, name, by_ggml.dims2()?)?;
        if name.contains("q_proj") {
            tensor = interleave(&tensor, checkpoint.config().head_dim)?;
        }
        check(name, &tensor, by_ggml)?;
    }
    Ok(())
}

#[test]
fn numbers_are_those_of_ggml() -> Result {
    for dtype in [None, Some(DType::F32), Some(DType::BF16)] {
        each_codebook(
            |checkpoint, name, dims| {
                Ok(checkpoint.weights(dtype, &Device::Cpu).tensor(name, &[dims.0, dims.1])?)
            },
            |name, tensor, by_ggml| {
                assert_identical(name, tensor, &by_ggml.to_dtype(dtype.unwrap_or(DType::F32))?)
            },
        )?;
    }
    Ok(())
}

/// Each number of a matrix in blocks is read out by a row of the identity, some of them at a time.
#[test]
fn numbers_in_blocks_are_those_of_ggml() -> Result {
    for rows in [1, 16, 1024] {
        each_codebook(
            |checkpoint, name, (out, len)| {
                let linear = checkpoint.weights(None, &Device::Cpu).linear(name, out, len)?;
                let identity = Tensor::eye(len, DType::F32, &Device::Cpu)?;
                let columns = (0..len).step_by(rows).map(|first| {
                    let some = identity.narrow(0, first, rows.min(len - first))?;
                    Ok(linear.forward(&some)?)
                });
                Ok(Tensor::cat(&columns.collect::<Result<Vec<_>>>()?, 0)?.t()?.contiguous()?)
            },
            |name, tensor, by_ggml| {
                for row in 0..by_ggml.dim(0)? {
                    let [got, expected] = [tensor, by_ggml].map(|it| it.narrow(0, row, 1));
                    let expected = (expected? + 0.0)?; // a sum that begins at 0 has no -0
                    let largest = expected.abs()?.max_all()?.to_scalar::<f32>()?;
                    // What few rows are multiplied with, 12 times these, would be infinite.
                    if rows > 16 || largest < 2f32.powi(120) {
                        assert_identical(name, &got?, &expected)?;
                    }
                }
                Ok(())
            },
        )?;
    }
    Ok(())
}

#[test]
fn matrices_in_blocks_are_their_numbers() -> Result {
    let (config, folder) = (config_of_large_blocks()?, tempfile::tempdir()?);
    let path = folder.path().join("model.gguf");
    for kind in KINDS {
        write_model(&path, &config, kind)?;
        let checkpoint = Checkpoint::open(&path)?;
        let name = "model.layers.0.mlp.down_proj.weight";
        let linear = checkpoint.weights(None, &Device::Cpu).linear(name, 256, 512)?;
        let wide = checkpoint.weights(DType::F32, &Device::Cpu).tensor(name, &[256, 512])?;
        for rows in [1, 2, 5, 16, 17, 40] {
            let name = format!("{rows} rows by {}", kind.0);
            let xs = tiny::noise(2, &[rows, 512], 1.0)?;
            let ys = linear.forward(&xs)?;
            assert_close(&name, &ys, &xs.matmul(&wide.t()?)?, 2e-6)?;
            if rows <= 16 {
                // To the last bit, whatever comes beside it.
                let last = linear.forward(&xs.narrow(0, rows - 1, 1)?)?;
                assert_identical(&name, &ys.narrow(0, rows - 1, 1)?, &last)?;
            }
            let xs = Var::from_tensor(&xs)?;
            let slope = tiny::noise(3, &[rows, 256], 1.0)?;
            let gradients = (linear.forward(xs.as_tensor())? * &slope)?.sum_all()?.backward()?;
            let gradient = gradients.get(xs.as_tensor()).ok_or("no gradient")?;
            assert_close(&name, gradient, &slope.matmul(&wide)?, 1e-6)?;
        }
    }
    Ok(())
}

#[test]
fn models_in_blocks_are_models_of_their_numbers() -> Result {
    let (config, folder) = (config_of_large_blocks()?, tempfile::tempdir()?);
    let path = folder.path().join("model.gguf");
    for kind in KINDS {
        write_model(&path, &config, kind)?;
        let load = |kept: WeightType| -> Result<Transformer> {
            let checkpoint = Checkpoint::open(&path)?;
            let mut weights = checkpoint.weights(kept, &Device::Cpu);
            let transformer = Transformer::new(checkpoint.config(), &mut weights)?;
            weights.finish()?;
            Ok(transformer)
        };
        let (kept, wide) = (load(WeightType::Stored)?, load(DType::F32.into())?);
        let elements = wide.weight_bytes()["f32"] / 4;
        let bytes = BTreeMap::from([(kind.0.to_string(), elements / kind.2 * kind.3)]);
        assert_eq!(kept.weight_bytes(), bytes);
        let embedded = |model: &Transformer| -> Result<Tensor> {
            Ok(model.embed(&Tensor::new(&[[1u32, 5, 31, 0, 5]], &Device::Cpu)?)?)
        };
        assert_identical(kind.0, &embedded(&kept)?, &embedded(&wide)?)?;
        let logits = |model: &Transformer| -> Result<Tensor> {
            let pass = Batch::one(5)?;
            Ok(model.logits(&model.forward(&embedded(model)?, 0..1, Pass::Causal(&pass))?)?)
        };
        assert_close(kind.0, &logits(&kept)?, &logits(&wide)?, 1e-5)?;
    }
    Ok(())
}

/// Smaller blocks are rounded from the numbers; larger ones would only take more room.
#[test]
fn blocks_are_rounded_to_smaller_ones_only() -> Result {
    let (config, folder) = (config_of_large_blocks()?, tempfile::tempdir()?);
    let path = folder.path().join("model.gguf");
    let kept = |kept: WeightType| -> Result<Vec<String>> {
        let checkpoint = Checkpoint::open(&path)?;
        let model = Transformer::new(&config, &mut checkpoint.weights(kept, &Device::Cpu))?;
        Ok(model.weight_bytes().into_keys().collect())
    };
    for kind in KINDS {
        write_model(&path, &config, kind)?;
        for same in [GgmlDType::Q8_0, GgmlDType::Q4_1, GgmlDType::Q4K] {
            assert_eq!(kept(same.into())?, [kind.0], "{same:?}");
        }
        assert_eq!(kept(GgmlDType::Q3K.into())?, [kind.0, "q3_k"]);

        let checkpoint = Checkpoint::open(&path)?;
        let name = "model.layers.0.mlp.up_proj.weight";
        let mut weights = checkpoint.weights(GgmlDType::Q3K, &Device::Cpu);
        let linear = weights.linear(name, 512, 256)?;
        let ys = linear.forward(&Tensor::eye(256, DType::F32, &Device::Cpu)?)?;
        let wide = checkpoint.weights(DType::F32, &Device::Cpu).tensor(name, &[512, 256])?;
        let expected = QTensor::quantize(&wide, GgmlDType::Q3K)?.dequantize(&Device::Cpu)?;
        assert_identical(kind.0, &ys.t()?.contiguous()?, &(expected + 0.0)?)?;
    }
    Ok(())
}

#[test]
fn scales_that_are_not_finite_are_refused() -> Result {
    let (config, folder) = (config_of_large_blocks()?, tempfile::tempdir()?);
    let path = folder.path().join("model.gguf");
    for kind in KINDS {
        let mut file = GgufFile::of(&config)?;
        let mut blocks = random_blocks(kind, 256 * 32, 1);
        match kind.1 {
            39 => blocks[..2].copy_from_slice(&[0xff, 0x77]), // 12 times 2^127
            _ => blocks[..2].copy_from_slice(&f16::INFINITY.to_le_bytes()),
        }
        file.push("model.embed_tokens.weight", &[32, 256], kind.1, &blocks);
        fs::write(&path, file.bytes())?;
        let checkpoint = Checkpoint::open(&path)?;
        for kept in [WeightType::Stored, DType::F32.into(), GgmlDType::Q2K.into()] {
            let mut weights = checkpoint.weights(kept, &Device::Cpu);
            let error = weights.linear("model.embed_tokens.weight", 32, 256).err();
            let error = error.map(|error| error.to_string()).unwrap_or_default();
            let expected = "expected finite values, got ";
            assert!(error.contains(expected) && error.ends_with("inf at element 0"), "{error}");
        }
    }
    Ok(())
}

/// Every weight as it is stored, and the configuration.
fn all(
    path: &Path,
    open: fn(&Path) -> hybrid_attention::Result<Checkpoint>,
) -> Result<(Config, HashMap<String, Tensor>)> {
    let checkpoint = open(path)?;
    let mut weights = checkpoint.weights(None, &Device::Cpu);
    let mut tensors = HashMap::new();
    for (name, shape) in checkpoint.config().weights() {
        tensors.insert(name.clone(), weights.tensor(&name, &shape)?);
    }
    weights.finish()?;
    Ok((checkpoint.config().clone(), tensors))
}

fn open(path: &Path) -> hybrid_attention::Result<Checkpoint> {
    Checkpoint::open(path)
}

fn read(path: &Path) -> hybrid_attention::Result<Checkpoint> {
    Checkpoint::read(path)
}

#[test]
fn any_part_opens_the_whole() -> Result {
    let folder = fixture("gguf/split");
    let (config, tensors) = all(&folder.join("whole.gguf"), open)?;
    assert!(!config.tie_word_embeddings);
    for name in ["parts", "first"] {
        let part = |no: usize| folder.join(format!("{name}-0000{no}-of-00003.gguf"));
        for no in 1..=3 {
            for how in [open, read] {
                let (config_of_parts, of_parts) = all(&part(no), how)?;
                assert_eq!(config_of_parts, config);
                assert_eq!(of_parts.len(), tensors.len());
                for (name, tensor) in &of_parts {
                    assert_identical(name, tensor, &tensors[name])?;
                }
            }
            let checkpoint = Checkpoint::open(part(no))?;
            assert_eq!(checkpoint.path(), part(1));
            let metadata = checkpoint.gguf_metadata().ok_or("no metadata")?;
            assert!(metadata.contains_key("llama.block_count"));
        }
    }
    Ok(())
}

/// A folder with copies of the fixture's parts.
fn parts() -> Result<(tempfile::TempDir, [PathBuf; 3])> {
    let folder = tempfile::tempdir()?;
    let part = |no: usize| format!("parts-0000{no}-of-00003.gguf");
    for no in 1..=3 {
        fs::copy(fixture("gguf/split").join(part(no)), folder.path().join(part(no)))?;
    }
    let paths = [1, 2, 3].map(|no| folder.path().join(part(no)));
    Ok((folder, paths))
}

/// The words of the error for the first part, with the folder cut off.
fn refusal(folder: &Path, path: &Path) -> String {
    let message = all(path, open).map_or_else(|error| error.to_string(), |_| "accepted".into());
    message.replace(&format!("{}/", folder.display()), "")
}

#[test]
fn parts_that_do_not_fit_are_refused() -> Result {
    let (folder, [first, second, third]) = parts()?;
    let folder = folder.path();
    let refused = |path: &Path| refusal(folder, path);
    assert_eq!(refused(&first), "accepted");
    let bytes = [&first, &second, &third].map(fs::read);
    let [first_bytes, second_bytes, third_bytes] = bytes;
    let (first_bytes, second_bytes, third_bytes) = (first_bytes?, second_bytes?, third_bytes?);

    let renamed = folder.join("model.gguf");
    fs::write(&renamed, &second_bytes)?;
    assert_eq!(
        refused(&renamed),
        "model.gguf: part 2 of 3 of a model of 12 tensors: expected a name with -00002-of-00003.gguf, by \
         which the others are found"
    );
    fs::write(&third, &second_bytes)?;
    assert_eq!(
        refused(&first),
        "parts-00003-of-00003.gguf: expected part 3 of 3 of a model of 12 tensors, got part 2 of 3 of a \
         model of 12 tensors"
    );
    fs::copy(fixture("gguf/split/whole.gguf"), &third)?;
    assert_eq!(
        refused(&second),
        "parts-00003-of-00003.gguf: expected part 3 of 3 of a model of 12 tensors, got a whole model"
    );
    fs::write(&third, &third_bytes[..third_bytes.len() - 1])?;
    let cut = refused(&first);
    assert!(
        cut.starts_with("parts-00003-of-00003.gguf: ") && cut.ends_with("end of the file"),
        "{cut}"
    );
    fs::remove_file(&third)?;
    assert_eq!(
        refused(&first),
        "parts-00001-of-00003.gguf: part 3 of 3 of a model of 12 tensors is missing: no \
         parts-00003-of-00003.gguf beside it"
    );
    fs::write(&third, &third_bytes)?;
    fs::remove_file(&first)?;
    assert_eq!(
        refused(&third),
        "parts-00003-of-00003.gguf: part 1 of 3 of a model of 12 tensors is missing: no \
         parts-00001-of-00003.gguf beside it"
    );
    fs::write(&first, &first_bytes)?;
    assert_eq!(refused(&third), "accepted");
    Ok(())
}

/// Parts with these numbers, metadata and tensors; of the first, the whole metadata.
fn write_parts(folder: &Path, parts: [GgufFile; 2]) -> Result<PathBuf> {
    for (no, part) in parts.iter().enumerate() {
        fs::write(folder.join(format!("m-0000{}-of-00002.gguf", no + 1)), part.bytes())?;
    }
    Ok(folder.join("m-00001-of-00002.gguf"))
}

#[test]
fn headers_of_parts_are_held_against_each_other() -> Result {
    let (config, folder) = (tiny::config(), tempfile::tempdir()?);
    let folder = folder.path();
    let base = || -> Result<[GgufFile; 2]> {
        let mut parts = [GgufFile::of(&config)?, GgufFile::default()];
        for (index, (name, dims)) in config.weights().enumerate() {
            let zeros = vec![0; 4 * dims.iter().product::<usize>()];
            parts[index % 2].push(&name, &dims, 0, &zeros);
        }
        Ok(parts)
    };
    let count = config.weights().count() as i32;
    let numbered = |[a, b]: [GgufFile; 2]| [a.part(0, 2, count), b.part(1, 2, count)];
    let refused = |parts: [GgufFile; 2]| -> Result<String> {
        Ok(refusal(folder, &write_parts(folder, parts)?))
    };
    assert_eq!(refused(numbered(base()?))?, "accepted");
    let [a, b] = base()?;
    assert_eq!(
        refused([a.part(0, 2, count + 1), b.part(1, 2, count + 1)])?,
        format!(
            "m-00001-of-00002.gguf: split.tensors.count: expected {} tensors in all parts, got {count}",
            count + 1
        )
    );
    let [a, b] = base()?;
    assert_eq!(
        refused([a.part(0, 2, count), b.part(1, 2, count - 1)])?,
        format!(
            "m-00002-of-00002.gguf: expected part 2 of 2 of a model of {count} tensors, got part 2 of 2 \
             of a model of {} tensors",
            count - 1
        )
    );
    let [a, mut b] = base()?;
    b.push("model.embed_tokens.weight", &[1], 0, &[0; 4]);
    let twice = "m-00002-of-00002.gguf: token_embd.weight is in another part too";
    assert_eq!(refused(numbered([a, b]))?, twice);
    let [a, mut b] = base()?;
    b.keys.push(key("general.architecture", 8, &string("mistral")));
    let another = "m-00002-of-00002.gguf: a part of another model: general.architecture is not as in the first";
    assert_eq!(refused(numbered([a, b]))?, another);
    let [a, mut b] = base()?;
    b.keys = a.keys.clone();
    b.keys.push(key("general.alignment", 4, &32u32.to_le_bytes()));
    assert_eq!(refused(numbered([a, b]))?, "accepted");
    let [a, mut b] = base()?;
    b.keys.push(key("general.name", 8, &string("second")));
    let parts = numbered([a, b]);
    let log = logged(|| {
        assert_eq!(refused(parts)?, "accepted");
        Ok(())
    })?;
    assert!(log.iter().any(|event| event.contains("general.name")), "{log:?}");

    for (no, of, tensors, expected) in [
        (2, 2, 1, "split.no: expected less than 2, at most 65535, got 2"),
        (0, 1, 1, "weight token_embd.weight is missing from"),
    ] {
        let message = refused([GgufFile::of(&config)?.part(no, of, tensors), GgufFile::default()])?;
        assert!(message.contains(expected), "{message}");
    }
    let mut odd = GgufFile::of(&config)?;
    odd.keys.push(key("split.count", 8, &string("2")));
    let message = refused([odd, GgufFile::default()])?;
    let expected = "m-00001-of-00002.gguf: split.count: expected a whole number, got String(\"2\")";
    assert_eq!(message, expected);
    Ok(())
}

/// A model with a tokenizer whose second part has no tensors: its file with three keys more, and a fourth
/// that fills them up to the alignment of the data.
fn split_with_tokenizer(folder: &Path) -> Result<PathBuf> {
    let mut whole = fs::read(fixture("no_template.gguf"))?;
    let count = |at: usize| u64::from(whole[at]);
    let (tensors, keys) = (count(8), count(16));
    let mut more = GgufFile::default().part(0, 2, tensors as i32);
    let len = more.keys.concat().len() + key("fill", 8, &string("")).len();
    more.keys.push(key("fill", 8, &string(&" ".repeat(len.next_multiple_of(32) - len))));
    whole[16..24].copy_from_slice(&(keys + 4).to_le_bytes());
    whole.splice(24..24, more.keys.concat());
    let first = folder.join("m-00001-of-00002.gguf");
    fs::write(&first, whole)?;
    let second = GgufFile::default().part(1, 2, tensors as i32);
    fs::write(folder.join("m-00002-of-00002.gguf"), second.bytes())?;
    Ok(first)
}

/// What lies beside a model's file lies beside its parts under the same name.
#[test]
fn files_beside_the_parts_are_found() -> Result {
    let folder = tempfile::tempdir()?;
    let path = split_with_tokenizer(folder.path())?;
    let load = || HybridModel::from_gguf(&path, None, &Device::Cpu);
    let rendered = |model: &HybridModel| -> Result<String> {
        let tokenizer = model.tokenizer().ok_or("no tokenizer")?;
        Ok(tokenizer.render_chat(&[Message::user("hi")], true)?)
    };
    assert!(rendered(&load()?).is_err());
    fs::write(folder.path().join("m.jinja"), "of the file")?;
    fs::write(folder.path().join("hybrid.json"), r#"{"passes": 2}"#)?;
    let model = load()?;
    assert_eq!(rendered(&model)?, "of the file");
    assert_eq!(format!("{:?}", model.thinking()), format!("{:?}", Thinking::new(2)));

    let whole = fixture("no_template.gguf");
    let whole = HybridModel::from_gguf(whole, None, &Device::Cpu)?;
    let config = GenerationConfig::default().max_tokens(8).thinking(Thinking::new(0));
    let answers = [&model, &whole].map(|model| model.generate("the cat", &config));
    let [of_parts, of_whole] = answers;
    assert_eq!(of_parts?.logprobs, of_whole?.logprobs);
    Ok(())
}
