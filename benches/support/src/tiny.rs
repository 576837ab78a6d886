//! Random tiny models: the same shape and seed give the same model.

use std::collections::HashMap;

use candle_core::{Device, Tensor};
use hybrid_attention::{Config, Experts, QueryScaling, RopeScaling};
use proptest::prelude::*;
use proptest::test_runner::TestCaseError;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::Result;

/// Three layers, grouped heads wider than `hidden / heads`, no window, an untied head.
pub fn config() -> Config {
    Config {
        vocab_size: 32,
        hidden_size: 16,
        intermediate_size: 24,
        num_hidden_layers: 3,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 6,
        rms_norm_eps: 1e-5,
        rope_theta: 10_000.0,
        sliding_window: None,
        max_position_embeddings: 2048,
        tie_word_embeddings: false,
        rope_scaling: None,
        query_scaling: None,
        experts: None,
        bos_token_id: None,
        eos_token_ids: Vec::new(),
    }
}

/// Any shape of model, with and without a window, scaled rotation and scaled queries, dense or a mixture of
/// experts. Of these every token runs through all: where two of them are nearly equal, which is chosen is for
/// rounding to say.
pub fn configs() -> impl Strategy<Value = Config> {
    let queries = (0.0..0.5, 1usize..20).prop_map(|(beta, original_max_position_embeddings)| {
        QueryScaling { beta, original_max_position_embeddings }
    });
    let scaling = (prop::option::of(scalings()), prop::option::of(queries));
    let experts = prop::option::of(1usize..5);
    (shapes(), scaling, experts).prop_map(|(config, (rope_scaling, query_scaling), experts)| {
        let all = |all| Experts { num_local_experts: all, num_experts_per_tok: all };
        // of some kinds the head must fit
        let plain = Config { query_scaling, experts: experts.map(all), ..config };
        let scaled = Config { rope_scaling, ..plain.clone() };
        if scaled.validate().is_ok() { scaled } else { plain }
    })
}

/// Scaling of any kind that depends on positions alone: all but `Dynamic`.
fn scalings() -> impl Strategy<Value = RopeScaling> {
    let numbers = (1.0..8.0, 1usize..20, 0.1..2.0, 2.0..40.0, any::<bool>(), 0.8..1.3);
    (0..4, numbers).prop_map(|(kind, (factor, original, low, high, truncate, magnitude))| {
        let original_max_position_embeddings = original;
        match kind {
            0 => RopeScaling::Linear { factor },
            1 => RopeScaling::Llama3 {
                factor,
                low_freq_factor: low,
                high_freq_factor: high,
                original_max_position_embeddings,
            },
            2 => RopeScaling::Factors(vec![1.0, factor as f32, high as f32]),
            _ => RopeScaling::Yarn {
                factor,
                original_max_position_embeddings,
                beta_fast: high,
                beta_slow: low,
                truncate,
                attention_factor: magnitude,
            },
        }
    })
}

/// Any shape of dense model, with and without a window, that scales nothing.
pub fn shapes() -> impl Strategy<Value = Config> {
    let heads = (1usize..4, 1usize..4, 1usize..7);
    let sizes = (4usize..40, 1usize..40, 1usize..4, 2usize..60);
    let others = (prop::option::of(1usize..10), 1e2..1e6, any::<bool>());
    (heads, sizes, others).prop_map(|(heads, sizes, (sliding_window, rope_theta, tied))| Config {
        num_key_value_heads: heads.0,
        num_attention_heads: heads.0 * heads.1,
        head_dim: 2 * heads.2,
        hidden_size: sizes.0,
        intermediate_size: sizes.1,
        num_hidden_layers: sizes.2,
        vocab_size: sizes.3,
        sliding_window,
        rope_theta,
        tie_word_embeddings: tied,
        ..config()
    })
}

/// Uniform values of mean 0 and standard deviation `scale`.
pub fn noise(seed: u64, shape: &[usize], scale: f32) -> Result<Tensor> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let reach = scale * 3f32.sqrt();
    let values: Vec<f32> =
        (0..shape.iter().product()).map(|_| rng.random_range(-reach..=reach)).collect();
    Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
}

/// Weights that keep activations near 1.
pub fn weights(config: &Config, seed: u64) -> Result<HashMap<String, Tensor>> {
    let weight = |(index, (name, shape)): (usize, (String, Vec<usize>))| {
        let seed = seed.wrapping_mul(1000).wrapping_add(index as u64);
        let tensor = match shape.as_slice() {
            [_] => (noise(seed, &shape, 0.2)? + 1.0)?,
            [_, _] if name.contains("embed_tokens") => noise(seed, &shape, 1.0)?,
            [.., fan_in] => noise(seed, &shape, 1.0 / (*fan_in as f32).sqrt())?,
            [] => return Err("a weight without a shape".into()),
        };
        Ok((name, tensor))
    };
    config.weights().enumerate().map(weight).collect()
}

/// Random tokens of a model's vocabulary.
pub fn tokens(config: &Config, seed: u64, count: usize) -> Vec<u32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..count).map(|_| rng.random_range(0..config.vocab_size as u32)).collect()
}

/// A property that may fail with any error, in the form that proptest needs.
pub fn holds(property: Result) -> std::result::Result<(), TestCaseError> {
    property.map_err(|error| TestCaseError::fail(error.to_string()))
}
