//! What the benches share: a model of random weights in the shape of SmolLM2-135M, and statistics.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Device, Tensor};
use hybrid_attention::load::Checkpoint;
use hybrid_attention::model::Weights;
use hybrid_attention::{Config, Result};
use serde_json::json;

/// SmolLM2-135M's `config.json`.
pub const SHAPE: &str = r#"{
    "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
    "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
    "rms_norm_eps": 1e-5, "rope_theta": 100000.0, "max_position_embeddings": 8192,
    "tie_word_embeddings": true
}"#;

/// Random `f32` weights on the CPU.
pub fn random_weights(config: &Config) -> Result<HashMap<String, Tensor>> {
    let random = |(name, shape): (String, Vec<usize>)| {
        Ok((name, Tensor::randn(0f32, 0.02, shape, &Device::Cpu)?))
    };
    config.weights().map(random).collect()
}

/// Some tokens, the same every time.
pub fn ids(count: usize) -> Vec<u32> {
    (0..count).map(|i| (3 + i * 7919 % 40_000) as u32).collect()
}

/// The values in ascending order.
pub fn sorted(mut values: Vec<f64>) -> Vec<f64> {
    values.sort_by(f64::total_cmp);
    values
}

/// The middle one of sorted values.
pub fn median(sorted: &[f64]) -> f64 {
    sorted[sorted.len() / 2]
}

/// The peak memory of this process in MiB, as Linux reports it; zero elsewhere.
pub fn peak_memory() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.split_whitespace().next()).unwrap_or("0");
    kib.parse::<f64>().unwrap_or(0.0) / 1024.0
}

/// Seconds that processors have spent on the threads of this process so far (Linux only).
pub fn of_processors() -> std::io::Result<f64> {
    let mut nanoseconds = 0.0;
    for thread in std::fs::read_dir("/proc/self/task")? {
        let spent = std::fs::read_to_string(thread?.path().join("schedstat"))?;
        let spent = spent.split(' ').next().unwrap_or_default().parse::<f64>();
        nanoseconds += spent.map_err(std::io::Error::other)?;
    }
    Ok(nanoseconds / 1e9)
}

/// Writes a GGUF file as a Hugging Face folder in `f32`.
pub fn unpack(gguf: &Path, folder: &Path) -> std::result::Result<(), Box<dyn std::error::Error>> {
    let checkpoint = Checkpoint::open(gguf)?;
    let config = checkpoint.config();
    let mut weights = checkpoint.weights(Some(DType::F32), &Device::Cpu);
    let tensors: HashMap<String, Tensor> = config
        .weights()
        .map(|(name, shape)| Ok((name.clone(), weights.tensor(&name, &shape)?)))
        .collect::<Result<_>>()?;
    candle_core::safetensors::save(&tensors, folder.join("model.safetensors"))?;
    let config = json!({
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
    });
    Ok(std::fs::write(folder.join("config.json"), config.to_string())?)
}
