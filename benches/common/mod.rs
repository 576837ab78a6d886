//! What the benches share: a model of random weights in the shape of SmolLM2-135M, and figures.

#![allow(dead_code, reason = "each bench uses a part")]

use std::collections::HashMap;

use candle_core::{Device, Tensor};
use hybrid_attention::{Config, Result};

pub(crate) const SHAPE: &str = r#"{
    "model_type": "llama", "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536,
    "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
    "rms_norm_eps": 1e-5, "rope_theta": 100000.0, "max_position_embeddings": 8192,
    "tie_word_embeddings": true
}"#;

/// Random `f32` weights on the CPU.
pub(crate) fn random_weights(config: &Config) -> Result<HashMap<String, Tensor>> {
    let random = |(name, shape): (String, Vec<usize>)| {
        Ok((name, Tensor::randn(0f32, 0.02, shape, &Device::Cpu)?))
    };
    config.weights().map(random).collect()
}

/// Some tokens, always the same.
pub(crate) fn ids(count: usize) -> Vec<u32> {
    (0..count).map(|i| (3 + i * 7919 % 40_000) as u32).collect()
}

pub(crate) fn sorted(mut values: Vec<f64>) -> Vec<f64> {
    values.sort_by(f64::total_cmp);
    values
}

pub(crate) fn median(sorted: &[f64]) -> f64 {
    sorted[sorted.len() / 2]
}

/// The peak memory of this process in MiB, as Linux counts it; zero elsewhere.
pub(crate) fn peak_memory() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib = line.and_then(|line| line.split_whitespace().next()).unwrap_or("0");
    kib.parse::<f64>().unwrap_or(0.0) / 1024.0
}
