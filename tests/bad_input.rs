//! Hostile and broken checkpoints: each is an error that says what, where, expected and got.

mod common;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use candle_core::{DType, Device};
use common::Result;
use common::gguf::{GgufFile, key, string, tensor};
use half::f16;
use hybrid_attention::load::Checkpoint;
use hybrid_attention::model::Weights;
use serde_json::{Value, json};
use tempfile::TempDir;

/// Opens `path`, takes every weight and finishes; the error, with the temporary folder cut off.
fn refusal(folder: &TempDir, path: &Path, dtype: Option<DType>) -> String {
    let load = || -> hybrid_attention::Result<()> {
        let checkpoint = Checkpoint::open(path)?;
        checkpoint.generation_defaults()?;
        let mut weights = checkpoint.weights(dtype, &Device::Cpu);
        for (name, shape) in checkpoint.config().weights() {
            weights.tensor(&name, &shape)?;
        }
        weights.finish()
    };
    let message = load().map_or_else(|error| error.to_string(), |()| "accepted".to_string());
    let root = folder.path().display().to_string();
    message.replace(&format!("{root}/"), "").replace(&root, "folder")
}

/// A tensor of a safetensors file.
#[derive(Clone)]
struct Stored {
    dtype: &'static str,
    shape: Vec<usize>,
    bytes: Vec<u8>,
}

impl Stored {
    fn f32(shape: &[usize]) -> Self {
        Self::values(shape, &vec![0.5; shape.iter().product()])
    }

    fn values(shape: &[usize], values: &[f32]) -> Self {
        let bytes = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        Self { dtype: "F32", shape: shape.to_vec(), bytes }
    }
}

type Tensors = BTreeMap<String, Stored>;

/// A checkpoint of one layer, in parts, so that each test can break one.
struct Model {
    config: Value,
    tensors: Tensors,
}

fn model() -> Model {
    let config = json!({"model_type": "mistral", "vocab_size": 4, "hidden_size": 4,
        "intermediate_size": 6, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "tie_word_embeddings": true});
    let tensors = [
        ("embed_tokens", vec![4, 4]),
        ("layers.0.input_layernorm", vec![4]),
        ("layers.0.self_attn.q_proj", vec![4, 4]),
        ("layers.0.self_attn.k_proj", vec![2, 4]),
        ("layers.0.self_attn.v_proj", vec![2, 4]),
        ("layers.0.self_attn.o_proj", vec![4, 4]),
        ("layers.0.post_attention_layernorm", vec![4]),
        ("layers.0.mlp.gate_proj", vec![6, 4]),
        ("layers.0.mlp.up_proj", vec![6, 4]),
        ("layers.0.mlp.down_proj", vec![4, 6]),
        ("norm", vec![4]),
    ];
    let tensors =
        tensors.map(|(name, shape)| (format!("model.{name}.weight"), Stored::f32(&shape)));
    Model { config, tensors: tensors.into() }
}

fn file_of(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), data].concat()
}

fn safetensors(tensors: &Tensors) -> Vec<u8> {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (name, Stored { dtype, shape, bytes }) in tensors {
        let offsets = [data.len(), data.len() + bytes.len()];
        let entry = json!({"dtype": dtype, "shape": shape, "data_offsets": offsets});
        header.insert(name.clone(), entry);
        data.extend(bytes);
    }
    file_of(&Value::Object(header).to_string(), &data)
}

impl Model {
    fn write(&self) -> Result<TempDir> {
        let folder = tempfile::tempdir()?;
        fs::write(folder.path().join("config.json"), self.config.to_string())?;
        fs::write(folder.path().join("model.safetensors"), safetensors(&self.tensors))?;
        Ok(folder)
    }
}

/// The refusal of [`model`] after `edit`.
fn edited(edit: impl FnOnce(&mut Model)) -> Result<String> {
    edited_as(None, edit)
}

fn edited_as(dtype: Option<DType>, edit: impl FnOnce(&mut Model)) -> Result<String> {
    let mut model = model();
    edit(&mut model);
    let folder = model.write()?;
    Ok(refusal(&folder, folder.path(), dtype))
}

/// The refusal of [`model`] with `bytes` as its `model.safetensors`.
fn with_file(bytes: &[u8]) -> Result<String> {
    let folder = model().write()?;
    fs::write(folder.path().join("model.safetensors"), bytes)?;
    Ok(refusal(&folder, folder.path(), None))
}

/// The refusal of a folder of these files.
fn folder_of(files: &[(&str, &[u8])]) -> Result<String> {
    let folder = tempfile::tempdir()?;
    for (name, content) in files {
        fs::write(folder.path().join(name), content)?;
    }
    Ok(refusal(&folder, folder.path(), None))
}

const EMBED: &str = "model.embed_tokens.weight";
const Q_PROJ: &str = "model.layers.0.self_attn.q_proj.weight";
const INDEX: &str = "model.safetensors.index.json";

#[test]
fn the_unbroken_model_is_accepted() -> Result {
    assert_eq!(edited(|_| ())?, "accepted");
    Ok(())
}

#[test]
fn paths() -> Result {
    let folder = tempfile::tempdir()?;
    assert_eq!(
        refusal(&folder, &folder.path().join("absent"), None),
        "absent: No such file or directory (os error 2)"
    );
    assert_eq!(
        refusal(&folder, folder.path(), None),
        "folder: no weights in this folder: looked for model.safetensors, \
         model.safetensors.index.json and consolidated.safetensors"
    );
    for content in ["", "GG", "PK\u{3}\u{4} a zip"] {
        let path = folder.path().join("a file");
        fs::write(&path, content)?;
        assert_eq!(
            refusal(&folder, &path, None),
            "a file: neither a folder nor a GGUF file, which starts with GGUF"
        );
    }
    Ok(())
}

#[test]
fn folders() -> Result {
    let (config, weights) = (model().config.to_string(), safetensors(&model().tensors));
    let config = config.as_bytes();
    assert_eq!(
        folder_of(&[("config.json", config), ("pytorch_model.bin", b"")])?,
        "folder: no safetensors in this folder, but pytorch_model.bin: \
         only safetensors and GGUF are read"
    );
    assert_eq!(
        folder_of(&[("params.json", b"{}"), ("consolidated.00.pth", b"")])?,
        "folder: no safetensors in this folder, but consolidated.00.pth: \
         only safetensors and GGUF are read"
    );
    assert_eq!(
        folder_of(&[("config.json", config), ("Mistral.Q4_K_M.gguf", b"GGUF")])?,
        "folder: no safetensors in this folder, but Mistral.Q4_K_M.gguf: open that file itself"
    );
    assert_eq!(
        folder_of(&[("model.safetensors", &weights)])?,
        "folder: weights, but neither config.json nor params.json beside them"
    );
    assert_eq!(
        folder_of(&[("config.json", b"{"), ("model.safetensors", &weights)])?,
        "config.json: not JSON: EOF while parsing an object at line 1 column 1"
    );
    assert_eq!(
        folder_of(&[("config.json", b"\xff"), ("model.safetensors", &weights)])?,
        "config.json: stream did not contain valid UTF-8"
    );
    for (generation, expected) in [
        ("[]", "expected a JSON object, got []"),
        (
            r#"{"do_sample": true, "temperature": "hot"}"#,
            r#"temperature: expected a number, got "hot""#,
        ),
        (r#"{"do_sample": true, "top_k": -2}"#, "top_k: expected a non-negative integer, got -2"),
        (
            r#"{"eos_token_id": [1, "2"]}"#,
            r#"eos_token_id: expected a token id or a list of them, got [1,"2"]"#,
        ),
    ] {
        let files = [
            ("config.json", config),
            ("model.safetensors", &weights),
            ("generation_config.json", generation.as_bytes()),
        ];
        assert_eq!(folder_of(&files)?, format!("generation_config.json: {expected}"));
    }
    Ok(())
}

#[test]
fn configurations() -> Result {
    for (field, value, expected) in [
        ("vocab_size", json!(0), "config field vocab_size: expected 1 to 2147483647, got 0"),
        (
            "hidden_size",
            json!(1u64 << 40),
            "config field hidden_size: expected 1 to 2147483647, got 1099511627776",
        ),
        (
            "num_key_value_heads",
            json!(3),
            "config field num_attention_heads: expected a multiple of the 3 key and value heads, got 2",
        ),
        ("model_type", json!("gemma"), "unsupported model_type: gemma"),
    ] {
        assert_eq!(edited(|model| model.config[field] = value)?, expected);
    }
    assert_eq!(
        edited(|model| model.config["num_hidden_layers"] = json!(2_000_000_000))?,
        "weight model.layers.1.input_layernorm.weight is missing from folder"
    );
    Ok(())
}

#[test]
fn safetensors_files() -> Result {
    let whole = safetensors(&model().tensors);
    assert_eq!(
        with_file(b"")?,
        "model.safetensors: the header should take 8 bytes, but the file has 0"
    );
    assert_eq!(
        with_file(&whole[..100])?,
        format!(
            "model.safetensors: the header should take {} bytes, but the file has 100",
            8 + u64::from_le_bytes(whole[..8].try_into()?)
        )
    );
    assert_eq!(
        with_file(&whole[..whole.len() - 1])?,
        "model.safetensors: the header promises 592 bytes of tensors, found 591"
    );
    assert_eq!(
        with_file(&[&whole[..], b"more"].concat())?,
        "model.safetensors: the header promises 592 bytes of tensors, found 596"
    );
    assert_eq!(
        with_file(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")?,
        "model.safetensors: a Git LFS pointer, not the file itself: fetch it with git lfs pull"
    );
    assert_eq!(
        with_file(&u64::MAX.to_le_bytes())?,
        "model.safetensors: a header of 18446744073709551615 bytes: at most 100000000 are read"
    );
    assert_eq!(
        with_file(&file_of("not json", b""))?,
        "model.safetensors: header: expected ident at line 1 column 2"
    );
    let entry = |shape: &str, offsets: &str| {
        format!(r#"{{"dtype": "F32", "shape": {shape}, "data_offsets": {offsets}}}"#)
    };
    let two = |a: &str, b: &str| format!(r#"{{"a": {a}, "b": {b}}}"#);
    for (header, expected) in [
        // overlapping
        (
            two(&entry("[2]", "[0, 8]"), &entry("[2]", "[4, 12]")),
            "header: invalid offset for tensor `b`",
        ),
        // a gap
        (
            two(&entry("[1]", "[0, 4]"), &entry("[1]", "[8, 12]")),
            "header: invalid offset for tensor `b`",
        ),
        (
            two(&entry("[1]", "[0, 4]"), &entry("[2]", "[4, 8]")),
            "header: invalid shape, data type, or offset for tensor",
        ),
        (
            format!(r#"{{"a": {}}}"#, entry("[4294967296, 4294967296, 4]", "[0, 0]")),
            "header: overflow computing buffer size from shape and/or element type",
        ),
        // the sum of offset and header overflows 64 bits: safetensors 0.8 itself panics here
        (
            format!(
                "{{{}}}",
                (0..8u64)
                    .map(|i| {
                        let (size, start) = (2_305_843_009_213_693_951u64, i * 2_305_843_009_213_693_951);
                        format!(
                            r#""{i}": {{"dtype": "U8", "shape": [{size}], "data_offsets": [{start}, {}]}}"#,
                            start + size
                        )
                    })
                    .collect::<Vec<_>>()
                    .join(", ")
            ),
            "the header promises 18446744073709551608 bytes of tensors, found 12",
        ),
    ] {
        assert_eq!(with_file(&file_of(&header, &[0; 12]))?, format!("model.safetensors: {expected}"));
    }
    Ok(())
}

#[test]
fn shards() -> Result {
    let (config, weights) = (model().config.to_string(), safetensors(&model().tensors));
    let with_index = |index: &str| {
        folder_of(&[
            ("config.json", config.as_bytes()),
            (INDEX, index.as_bytes()),
            ("1.safetensors", &weights),
        ])
    };
    for shard in ["../1.safetensors", "/etc/passwd", "a/1.safetensors", r"..\\1", ".", "..", ""] {
        let message = format!("{INDEX}: {EMBED} is in \"{shard}\", which is not a file name");
        let index = format!(r#"{{"weight_map": {{"{EMBED}": "{shard}"}}}}"#);
        assert_eq!(with_index(&index)?, message);
    }
    for (index, expected) in [
        ("no".to_string(), "expected ident at line 1 column 2".to_string()),
        ("{}".into(), "missing field `weight_map` at line 1 column 2".into()),
        (r#"{"weight_map": {}}"#.into(), "weight_map is empty".into()),
        (
            r#"{"weight_map": {"a": 1}}"#.into(),
            "invalid type: integer `1`, expected a string at line 1 column 22".into(),
        ),
        (
            format!(r#"{{"weight_map": {{"{EMBED}": "2.safetensors"}}}}"#),
            "the shard 2.safetensors is not in the folder".into(),
        ),
    ] {
        assert_eq!(with_index(&index)?, format!("{INDEX}: {expected}"));
    }
    assert_eq!(
        folder_of(&[
            ("config.json", config.as_bytes()),
            (INDEX, br#"{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}"#),
            ("1.safetensors", &weights),
            ("2.safetensors", &weights),
        ])?,
        format!("2.safetensors: {EMBED} is in another shard too")
    );
    Ok(())
}

#[test]
fn weights_missing_or_misshapen() -> Result {
    let edited_tensors = |edit: fn(&mut Tensors)| edited(|model| edit(&mut model.tensors));
    assert_eq!(
        edited_tensors(|tensors| drop(tensors.remove(Q_PROJ)))?,
        format!("weight {Q_PROJ} is missing from folder")
    );
    assert_eq!(
        edited(|model| model.config["tie_word_embeddings"] = json!(false))?,
        "weight lm_head.weight is missing from folder"
    );
    assert_eq!(
        edited_tensors(|tensors| drop(tensors.insert(Q_PROJ.into(), Stored::f32(&[2, 8]))))?,
        format!("weight {Q_PROJ} in model.safetensors: expected shape [4, 4], got [2, 8]")
    );
    for (dtype, size) in [("I64", 8), ("F8_E5M2", 1), ("BOOL", 1), ("U8", 1)] {
        let stored = Stored { dtype, shape: vec![4, 4], bytes: vec![0; 16 * size] };
        assert_eq!(
            edited(|model| drop(model.tensors.insert(EMBED.into(), stored)))?,
            format!(
                "weight {EMBED} in model.safetensors: expected F64, F32, F16 or BF16, got {dtype}"
            )
        );
    }
    Ok(())
}

#[test]
fn weights_not_finite() -> Result {
    let with_value = |index: usize, value: f32, dtype| {
        edited_as(dtype, |model| {
            let mut values = [0.5; 16];
            values[index] = value;
            model.tensors.insert(Q_PROJ.into(), Stored::values(&[4, 4], &values));
        })
    };
    let message = format!("weight {Q_PROJ} in model.safetensors");
    for dtype in [None, Some(DType::F32), Some(DType::BF16), Some(DType::F16)] {
        assert_eq!(
            with_value(6, f32::NAN, dtype)?,
            format!("{message}: expected finite values, got NaN at element 6")
        );
        assert_eq!(
            with_value(15, f32::NEG_INFINITY, dtype)?,
            format!("{message}: expected finite values, got -inf at element 15")
        );
    }
    assert_eq!(
        with_value(3, 1e10, Some(DType::F16))?,
        format!("{message}, converted to f16: expected finite values, got inf at element 3")
    );
    assert_eq!(
        with_value(3, -f32::MAX, Some(DType::BF16))?,
        format!("{message}, converted to bf16: expected finite values, got -inf at element 3")
    );
    assert_eq!(with_value(3, 65504.0, Some(DType::F16))?, "accepted");

    let with_f64 = |value: f64| {
        let bytes = [value; 16].iter().flat_map(|value| value.to_le_bytes()).collect();
        let stored = Stored { dtype: "F64", shape: vec![4, 4], bytes };
        edited(|model| drop(model.tensors.insert(Q_PROJ.into(), stored)))
    };
    assert_eq!(
        with_f64(1e300)?,
        format!("{message}, converted to f32: expected finite values, got inf at element 0")
    );
    let mut bytes = vec![0; 32];
    bytes[20..22].copy_from_slice(&f16::INFINITY.to_le_bytes());
    let stored = Stored { dtype: "F16", shape: vec![4, 4], bytes };
    assert_eq!(
        edited(|model| drop(model.tensors.insert(Q_PROJ.into(), stored)))?,
        format!("{message}: expected finite values, got inf at element 10")
    );
    assert_eq!(
        edited_as(Some(DType::F64), |_| ())?,
        "parameter dtype: expected f32, f16 or bf16, got f64"
    );
    Ok(())
}

#[test]
fn weights_left_over() -> Result {
    let with_extra =
        |name: &str, stored| edited(|model| drop(model.tensors.insert(name.into(), stored)));
    for (name, reason) in [
        ("model.layers.1.mlp.up_proj.weight", "layer 1 of a model of 1 layers"),
        ("model.layers.0.self_attn.q_proj.bias", "this architecture has no such weight"),
        ("model.layers.0.self_attn.q_norm.weight", "this architecture has no such weight"),
        ("model.layers.x.mlp.up_proj.weight", "this architecture has no such weight"),
        ("lm_head.bias", "this architecture has no such weight"),
        ("lm_head.weight", "the head is tied to the embedding table, which differs"),
    ] {
        assert_eq!(
            with_extra(name, Stored::f32(&[4]))?,
            format!(
                "weight {name} in model.safetensors belongs to the model but is not used: {reason}"
            )
        );
    }
    assert_eq!(with_extra("lm_head.weight", Stored::f32(&[4, 4]))?, "accepted");
    Ok(())
}

#[test]
fn names_are_those_of_the_file() -> Result {
    let params = json!({"dim": 4, "n_layers": 1, "hidden_dim": 6, "n_heads": 2, "n_kv_heads": 1,
        "norm_eps": 1e-5, "vocab_size": 4, "tied_embeddings": true});
    let mut tensors = Tensors::from([("tok_embeddings.weight".to_string(), Stored::f32(&[4, 4]))]);
    let refused = |tensors: &Tensors| {
        folder_of(&[
            ("params.json", params.to_string().as_bytes()),
            ("consolidated.safetensors", &safetensors(tensors)),
        ])
    };
    assert_eq!(refused(&tensors)?, "weight layers.0.attention_norm.weight is missing from folder");
    tensors.insert("layers.0.attention_norm.weight".into(), Stored::f32(&[4]));
    tensors.insert("layers.0.attention.wq.weight".into(), Stored::f32(&[4, 5]));
    assert_eq!(
        refused(&tensors)?,
        "weight layers.0.attention.wq.weight in consolidated.safetensors: \
         expected shape [4, 4], got [4, 5]"
    );
    // rows change places on the way; the index is that of the file
    let mut values = [0.5; 16];
    values[5] = f32::NAN;
    tensors.insert("layers.0.attention.wq.weight".into(), Stored::values(&[4, 4], &values));
    assert_eq!(
        refused(&tensors)?,
        "weight layers.0.attention.wq.weight in consolidated.safetensors: \
         expected finite values, got NaN at element 5"
    );
    Ok(())
}

/// A whole model of the shape of [`model`], with a head of its own.
fn gguf() -> GgufFile {
    let mut keys = vec![key("general.architecture", 8, &string("llama"))];
    for (name, size) in [
        ("block_count", 1u32),
        ("context_length", 9),
        ("embedding_length", 4),
        ("feed_forward_length", 6),
        ("attention.head_count", 2),
        ("attention.head_count_kv", 1),
        ("vocab_size", 4),
    ] {
        keys.push(key(&format!("llama.{name}"), 4, &size.to_le_bytes()));
    }
    keys.push(key("llama.attention.layer_norm_rms_epsilon", 6, &1e-5f32.to_le_bytes()));
    let (mut tensors, mut data) = (Vec::new(), Vec::new());
    for (name, dims) in [
        ("token_embd", vec![4, 4]),
        ("blk.0.attn_norm", vec![4]),
        ("blk.0.attn_q", vec![4, 4]),
        ("blk.0.attn_k", vec![4, 2]),
        ("blk.0.attn_v", vec![4, 2]),
        ("blk.0.attn_output", vec![4, 4]),
        ("blk.0.ffn_norm", vec![4]),
        ("blk.0.ffn_gate", vec![4, 6]),
        ("blk.0.ffn_up", vec![4, 6]),
        ("blk.0.ffn_down", vec![6, 4]),
        ("output_norm", vec![4]),
        ("output", vec![4, 4]),
    ] {
        tensors.push(tensor(&format!("{name}.weight"), &dims, 0, data.len() as u64));
        let len = dims.iter().product::<u64>() as usize;
        data.extend(std::iter::repeat_n(0.5f32.to_le_bytes(), len).flatten());
        data.resize(data.len().next_multiple_of(32), 0);
    }
    GgufFile { keys, tensors, data, ..GgufFile::default() }
}

fn gguf_refusal(bytes: &[u8]) -> Result<String> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("model.gguf");
    fs::write(&path, bytes)?;
    Ok(refusal(&folder, &path, None))
}

fn gguf_edited(edit: impl FnOnce(&mut GgufFile)) -> Result<String> {
    let mut file = gguf();
    edit(&mut file);
    gguf_refusal(&file.bytes())
}

#[test]
fn gguf_files() -> Result {
    assert_eq!(gguf_edited(|_| ())?, "accepted");
    assert_eq!(
        gguf_refusal(b"GGUF")?,
        "model.gguf: 4 bytes expected at 4, but the file ends after 0"
    );
    let whole = gguf().bytes();
    assert_eq!(
        gguf_refusal(&whole[..100])?,
        "model.gguf: llama.block_count: 4 bytes expected at 98, but the file ends after 2"
    );
    assert_eq!(
        gguf_refusal(&whole[..whole.len() - 1])?,
        "model.gguf: output.weight: F32 [4, 4] reaches beyond the end of the file"
    );
    for (version, expected) in [
        (1u32, "GGUF version 1: only 2 and 3 are read"),
        (4, "GGUF version 4: only 2 and 3 are read"),
        (0, "GGUF version 0: only 2 and 3 are read"),
        (3u32.swap_bytes(), "a big-endian GGUF file: only little-endian ones are read"),
    ] {
        assert_eq!(
            gguf_edited(|file| file.start[4..].copy_from_slice(&version.to_le_bytes()))?,
            format!("model.gguf: {expected}")
        );
    }
    let counts = [&b"GGUF"[..], &3u32.to_le_bytes(), &u64::MAX.to_le_bytes(), &0u64.to_le_bytes()];
    assert_eq!(
        gguf_refusal(&counts.concat())?,
        "model.gguf: 8 bytes expected at 24, but the file ends after 0"
    );
    Ok(())
}

#[test]
fn gguf_keys() -> Result {
    let huge = (1u64 << 60).to_le_bytes();
    let nested = |depth: usize| {
        let mut value = Vec::new();
        for _ in 0..depth {
            value.extend(9u32.to_le_bytes());
            value.extend(1u64.to_le_bytes());
        }
        value
    };
    let alignment = |kind: u32, value: &[u8]| key("general.alignment", kind, value);
    for (entry, expected) in [
        (
            alignment(4, &0u32.to_le_bytes()),
            "general.alignment: expected a power of two from 8, got U32(0)",
        ),
        (
            alignment(4, &48u32.to_le_bytes()),
            "general.alignment: expected a power of two from 8, got U32(48)",
        ),
        (
            alignment(4, &4u32.to_le_bytes()),
            "general.alignment: expected a power of two from 8, got U32(4)",
        ),
        (
            alignment(8, &string("32")),
            "general.alignment: expected a power of two from 8, got String(\"32\")",
        ),
        (
            alignment(10, &(1u64 << 63).to_le_bytes()),
            "token_embd.weight: F32 [4, 4] reaches beyond the end of the file",
        ),
        (key("llama.block_count", 4, &[0; 4]), "the key llama.block_count comes twice"),
        (
            key("a", 8, &huge),
            "a: 1152921504606846976 bytes expected at 411, but the file ends after 1413",
        ),
        (
            key("a", 9, &[&0u32.to_le_bytes()[..], &huge].concat()),
            "a: an array of 1152921504606846976 elements, but the file ends after 1409 bytes",
        ),
        (key("a", 9, &nested(1000)), "a: arrays nested more than 4 deep"),
        (key("a", 13, &[]), "a: unknown type of value 13"),
        (key("a", 7, &[2]), "a: expected a bool of 0 or 1, got 2"),
        (
            [&1u64.to_le_bytes()[..], b"\xff", &[0; 12]].concat(),
            "a metadata key at 390 is not valid UTF-8",
        ),
    ] {
        let refused = gguf_edited(|file| file.keys.push(entry))?;
        assert_eq!(refused, format!("model.gguf: {expected}"));
    }
    let array = [&0u32.to_le_bytes()[..], &(1u64 << 24).to_le_bytes()].concat();
    let refused = gguf_edited(|file| file.keys.push(key("a", 9, &array)))?;
    assert!(
        refused.contains("an array of 16777216 elements, but the file ends after"),
        "{refused}"
    );
    assert_eq!(
        gguf_edited(|file| file.keys[0] = key("general.architecture", 8, &string("mamba")))?,
        "unsupported general.architecture: mamba"
    );
    assert_eq!(
        gguf_edited(|file| file.keys.push(key("split.count", 2, &2u16.to_le_bytes())))?,
        "model.gguf: a part of 2, but split.no does not say which"
    );
    // not all tokens of real vocabularies are UTF-8
    let token = [&1u64.to_le_bytes()[..], b"\xff"].concat();
    assert_eq!(gguf_edited(|file| file.keys.push(key("a", 8, &token)))?, "accepted");
    Ok(())
}

#[test]
fn gguf_tensors() -> Result {
    let name = "output.weight";
    for (row, expected) in [
        (tensor(name, &[4, 4], 0, 32), "the tensors token_embd.weight and output.weight overlap"),
        (
            tensor(name, &[4, 4], 16, 0),
            "output.weight: ggml type 16 (IQ2_XXS) is not read; these are: F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS, MXFP4",
        ),
        (
            tensor(name, &[4, 4], 4, 0),
            "output.weight: ggml type 4 (Q4_2) is not read; these are: F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS, MXFP4",
        ),
        (
            tensor(name, &[4, 4], 2, 0),
            "output.weight: rows of shape [4, 4] are not whole Q4_0 blocks of 32",
        ),
        (
            tensor(name, &[128, 2], 12, 0),
            "output.weight: rows of shape [2, 128] are not whole Q4K blocks of 256",
        ),
        (
            tensor(name, &[128, 2], 23, 0),
            "output.weight: rows of shape [2, 128] are not whole IQ4_XS blocks of 256",
        ),
        (
            tensor(name, &[1 << 30, 1 << 10], 39, 0),
            "output.weight: MXFP4 [1024, 1073741824] reaches beyond the end of the file",
        ),
        (
            tensor(name, &[1 << 40, 1 << 40], 0, 0),
            "output.weight: F32 [1099511627776, 1099511627776] reaches beyond the end of the file",
        ),
        (tensor(name, &[4, u64::MAX], 0, 0), "output.weight: a dimension of 18446744073709551615"),
        (tensor(name, &[4, 0], 0, 0), "output.weight: a dimension of 0"),
        (tensor(name, &[], 0, 0), "output.weight: expected 1 to 4 dimensions, got 0"),
        (tensor(name, &[1; 5], 0, 0), "output.weight: expected 1 to 4 dimensions, got 5"),
        (
            tensor(name, &[4, 4], 0, 8),
            "output.weight: its offset is not a multiple of the alignment of 32",
        ),
        (
            tensor(name, &[4, 4], 0, u64::MAX - 31),
            "output.weight: F32 [4, 4] reaches beyond the end of the file",
        ),
        (tensor("blk.0.attn_q.weight", &[4], 0, 0), "the tensor blk.0.attn_q.weight comes twice"),
    ] {
        assert_eq!(gguf_edited(|file| file.tensors[11] = row)?, format!("model.gguf: {expected}"));
    }
    Ok(())
}

#[test]
fn gguf_weights() -> Result {
    let extra = |name: &str| {
        gguf_edited(|file| {
            file.tensors.push(tensor(name, &[4], 0, file.data.len() as u64));
            file.data.resize(file.data.len() + 32, 0);
        })
    };
    for (name, reason) in [
        ("blk.1.ffn_up.weight", "layer 1 of a model of 1 layers"),
        ("blk.0.attn_q.bias", "this architecture has no such weight"),
        ("output_norm.bias", "this architecture has no such weight"),
    ] {
        let used = "belongs to the model but is not used";
        assert_eq!(extra(name)?, format!("weight {name} in model.gguf {used}: {reason}"));
    }
    assert_eq!(
        extra("rope_freqs.weight")?,
        "weight rope_freqs.weight in model.gguf: expected shape [1], got [4]"
    );
    let factor = |name: &str, factor: f32| {
        gguf_edited(|file| {
            file.tensors.push(tensor(name, &[1], 0, file.data.len() as u64));
            file.data.extend(factor.to_le_bytes());
            file.data.resize(file.data.len() + 28, 0);
        })
    };
    assert_eq!(factor("rope_freqs.weight", 1.0)?, "accepted");
    assert_eq!(factor("rope_freqs.weight", 8.0)?, "accepted");
    assert_eq!(
        factor("rope_freqs.weight", 0.0)?,
        "config field rope_scaling.factors: expected 0.001 to 1000000, got 0"
    );
    assert_eq!(
        factor("rope_factors_long.weight", 8.0)?,
        "unsupported rope scaling: rope_factors_long.weight"
    );
    assert_eq!(factor("rope_factors_long.weight", 1.0)?, "accepted");
    assert_eq!(extra("cls.weight")?, "accepted");
    assert_eq!(
        gguf_edited(|file| drop(file.tensors.remove(2)))?,
        "weight blk.0.attn_q.weight is missing from model.gguf"
    );
    assert_eq!(
        gguf_edited(|file| file.tensors[2] = tensor("blk.0.attn_q.weight", &[2, 4], 0, 96))?,
        "weight blk.0.attn_q.weight in model.gguf: expected shape [4, 4], got [4, 2]"
    );
    assert_eq!(
        gguf_edited(|file| file.data[..4].copy_from_slice(&f32::NAN.to_le_bytes()))?,
        "weight token_embd.weight in model.gguf: expected finite values, got NaN at element 0"
    );
    // the head is tied where it is absent
    assert_eq!(gguf_edited(|file| drop(file.tensors.pop()))?, "accepted");
    Ok(())
}
