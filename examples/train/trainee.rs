//! What is trained: a transformer and the variables in it.

use std::collections::HashMap;

use candle_core::{Device, Tensor, Var};
use hybrid_attention::Config;
use hybrid_attention::model::Transformer;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::settings::{Arm, MOST_PASSES, Settings};
use super::suite::Vocabulary;
use crate::common::Result;

/// A model in training.
pub(crate) struct Trainee {
    pub(crate) transformer: Transformer,
    /// What changes, by name.
    pub(crate) vars: Vec<(String, Var)>,
    /// What does not: with the variables, all weights of the checkpoint.
    frozen: HashMap<String, Tensor>,
}

/// Channels of an embedding that tell names from what stands between them. Only through something
/// that is alike in many tokens can attention find a position rather than a token.
const KIND_CHANNELS: usize = 16;

impl Trainee {
    /// A small new model for the flashback suite. Its embeddings are drawn once and stay: so a name
    /// that no training story has is as good as any other.
    pub(crate) fn for_flashback(settings: &Settings, vocabulary: &Vocabulary) -> Result<Self> {
        let (a, b) = settings.span;
        let layers = match settings.arm {
            Arm::Deep => b + MOST_PASSES * (b - a) + 1,
            _ => b + 1,
        };
        let config = Config::from_json(&config_json(vocabulary, layers))?;
        let hidden = config.hidden_size;
        let mut rng = ChaCha8Rng::seed_from_u64(settings.seed);
        let (mut vars, mut frozen) = (Vec::new(), HashMap::new());
        let gate = (settings.arm.most_passes() > 0).then(|| ("thought.gate".into(), vec![hidden]));
        for (name, shape) in config.weights().chain(gate) {
            let count: usize = shape.iter().product();
            let values = match (name.as_str(), shape.as_slice()) {
                ("model.embed_tokens.weight", _) => embeddings(vocabulary, hidden, &mut rng),
                ("thought.gate", _) => vec![0.0; count], // half of the new state
                // the head is the embeddings, which are long
                ("model.norm.weight", _) => vec![0.05; count],
                (_, [_]) => vec![1.0; count],
                (_, shape) => {
                    let fan_in = shape.last().copied().unwrap_or(1) as f32;
                    normals(count, (3.0 * fan_in).sqrt().recip(), &mut rng)
                }
            };
            let tensor = Tensor::from_vec(values, shape, &Device::Cpu)?;
            match name.as_str() {
                "model.embed_tokens.weight" => drop(frozen.insert(name, tensor)),
                _ => vars.push((name, Var::from_tensor(&tensor)?)),
            }
        }
        let mut all = frozen.clone();
        all.extend(vars.iter().map(|(name, var)| (name.clone(), var.as_tensor().clone())));
        Ok(Self { transformer: Transformer::new(&config, &mut all)?, vars, frozen })
    }

    /// Parameters that are trained.
    pub(crate) fn parameters(&self) -> usize {
        self.vars.iter().map(|(_, var)| var.elem_count()).sum()
    }

    /// All weights, as a checkpoint has them.
    pub(crate) fn weights(&self) -> HashMap<String, Tensor> {
        let vars = self.vars.iter().map(|(name, var)| (name.clone(), var.as_detached_tensor()));
        self.frozen.clone().into_iter().chain(vars).collect()
    }
}

/// The configuration of a model of that many layers, as `config.json` has it.
pub(crate) fn config_json(vocabulary: &Vocabulary, layers: usize) -> String {
    format!(
        r#"{{
  "architectures": ["MistralForCausalLM"],
  "model_type": "mistral",
  "vocab_size": {},
  "hidden_size": 128,
  "intermediate_size": 448,
  "num_hidden_layers": {layers},
  "num_attention_heads": 4,
  "num_key_value_heads": 4,
  "head_dim": 32,
  "hidden_act": "silu",
  "max_position_embeddings": 512,
  "rms_norm_eps": 1e-5,
  "rope_theta": 10000.0,
  "sliding_window": null,
  "tie_word_embeddings": true,
  "bos_token_id": null,
  "eos_token_id": {},
  "torch_dtype": "bfloat16"
}}
"#,
        vocabulary.len(),
        vocabulary.end()
    )
}

/// Rows drawn at random but for what they have in common with all names, or with all other tokens.
fn embeddings(vocabulary: &Vocabulary, hidden: usize, rng: &mut impl Rng) -> Vec<f32> {
    let mut rows = normals(vocabulary.len() * hidden, 1.0, rng);
    let kinds = [normals(KIND_CHANNELS, 2.0, rng), normals(KIND_CHANNELS, 2.0, rng)];
    for (row, id) in rows.chunks_mut(hidden).zip(0..) {
        let kind = &kinds[usize::from(vocabulary.is_name(id))];
        row[..KIND_CHANNELS].copy_from_slice(kind);
    }
    rows
}

/// Normally distributed numbers (Box & Muller 1958).
fn normals(count: usize, deviation: f32, rng: &mut impl Rng) -> Vec<f32> {
    let normal = |_| {
        let (a, b) = (1.0 - rng.random::<f32>(), rng.random::<f32>()); // a is not 0
        (-2.0 * a.ln()).sqrt() * (std::f32::consts::TAU * b).cos() * deviation
    };
    (0..count).map(normal).collect()
}
