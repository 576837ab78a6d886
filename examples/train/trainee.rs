//! What is trained: a transformer and the variables in it.

use std::collections::HashMap;

use candle_core::{DType, Device, Tensor, Var};
use hybrid_attention::Config;
use hybrid_attention::model::Transformer;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::settings::{Arm, MOST_PASSES, Settings};
use super::suite::Vocabulary;
use crate::common::Result;

/// A model in training.
pub(crate) struct Trainee {
    config: Config,
    /// What changes, by name.
    pub(crate) vars: Vec<(String, Var)>,
    embeddings: Embeddings,
}

impl Trainee {
    /// A small new model for the flashback suite.
    pub(crate) fn for_flashback(settings: &Settings, vocabulary: &Vocabulary) -> Result<Self> {
        let (a, b) = settings.span;
        let layers = match settings.arm {
            Arm::Deep => b + MOST_PASSES * (b - a) + 1,
            _ => b + 1,
        };
        let config = Config::from_json(&config_json(vocabulary, layers))?;
        let mut rng = ChaCha8Rng::seed_from_u64(settings.seed);
        let gate = ("thought.gate".to_string(), vec![config.hidden_size]);
        let gate = (settings.arm.most_passes() > 0).then_some(gate);
        let mut vars = Vec::new();
        for (name, shape) in config.weights().chain(gate) {
            let count: usize = shape.iter().product();
            let values = match (name.as_str(), shape.as_slice()) {
                (EMBEDDINGS, _) => continue,
                ("thought.gate", _) => vec![0.0; count], // half of the new state
                // the head is the embeddings, which are long
                ("model.norm.weight", _) => vec![0.05; count],
                (_, [_]) => vec![1.0; count],
                (_, shape) => {
                    let fan_in = shape.last().copied().unwrap_or(1) as f32;
                    normals(count, (3.0 * fan_in).sqrt().recip(), &mut rng)
                }
            };
            vars.push((name, Var::from_vec(values, shape, &Device::Cpu)?));
        }
        let embeddings = Embeddings::new(vocabulary, config.hidden_size, &mut rng);
        Ok(Self { config, vars, embeddings })
    }

    /// The model with names that are drawn from `rng`.
    pub(crate) fn transformer(&self, rng: &mut impl Rng) -> Result<Transformer> {
        let vars = self.vars.iter().map(|(name, var)| (name.clone(), var.as_tensor().clone()));
        let mut weights: HashMap<_, _> = vars.collect();
        weights.insert(EMBEDDINGS.to_string(), self.embeddings.draw(rng)?);
        Ok(Transformer::new(&self.config, &mut weights)?)
    }

    /// Parameters that are trained.
    pub(crate) fn parameters(&self) -> usize {
        self.vars.iter().map(|(_, var)| var.elem_count()).sum()
    }

    /// All weights in `bf16`, as a checkpoint has them, with names that are drawn from `rng`.
    pub(crate) fn weights(&self, rng: &mut impl Rng) -> Result<HashMap<String, Tensor>> {
        let vars = self.vars.iter().map(|(name, var)| (name.clone(), var.as_detached_tensor()));
        let all = vars.chain([(EMBEDDINGS.to_string(), self.embeddings.draw(rng)?)]);
        let narrow = all.map(|(name, tensor)| Ok((name, tensor.to_dtype(DType::BF16)?)));
        Ok(narrow.collect::<candle_core::Result<_>>()?)
    }
}

/// The embedding table. It is not trained. Names have other vectors in every step, so there is
/// nothing to be learned about any of them, and one that no training story has is as good as
/// another.
struct Embeddings {
    /// `(vocab, hidden)`, row by row.
    rows: Vec<f32>,
    hidden: usize,
    /// Whether each token is a name.
    is_name: Vec<bool>,
}

const EMBEDDINGS: &str = "model.embed_tokens.weight";

/// Channels that are alike in all names, or in all other tokens. Only through something that many
/// tokens share can attention find a position, rather than a token.
const KIND_CHANNELS: usize = 16;

/// How much longer the row is that ends an answer. It is said behind a name, whose own row is part of
/// the stream there and scores high by itself, as the head is the embeddings.
const LOUD: f32 = 4.0;

impl Embeddings {
    fn new(vocabulary: &Vocabulary, hidden: usize, rng: &mut impl Rng) -> Self {
        let mut rows = normals(vocabulary.len() * hidden, 1.0, rng);
        let kinds = [normals(KIND_CHANNELS, 2.0, rng), normals(KIND_CHANNELS, 2.0, rng)];
        let is_name: Vec<bool> =
            (0..vocabulary.len() as u32).map(|id| vocabulary.is_name(id)).collect();
        for (row, &is_name) in rows.chunks_mut(hidden).zip(&is_name) {
            row[..KIND_CHANNELS].copy_from_slice(&kinds[usize::from(is_name)]);
        }
        let end = vocabulary.end() as usize * hidden;
        rows[end..end + hidden].iter_mut().for_each(|value| *value *= LOUD);
        Self { rows, hidden, is_name }
    }

    fn draw(&self, rng: &mut impl Rng) -> candle_core::Result<Tensor> {
        let mut rows = self.rows.clone();
        for (row, _) in rows.chunks_mut(self.hidden).zip(&self.is_name).filter(|(_, name)| **name) {
            let own = &mut row[KIND_CHANNELS..];
            own.copy_from_slice(&normals(own.len(), 1.0, rng));
        }
        Tensor::from_vec(rows, (self.is_name.len(), self.hidden), &Device::Cpu)
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
  "intermediate_size": 384,
  "num_hidden_layers": {layers},
  "num_attention_heads": 4,
  "num_key_value_heads": 4,
  "head_dim": 64,
  "hidden_act": "silu",
  "max_position_embeddings": 512,
  "rms_norm_eps": 1e-5,
  "rope_theta": 1000000.0,
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

/// Normally distributed numbers (Box & Muller 1958).
fn normals(count: usize, deviation: f32, rng: &mut impl Rng) -> Vec<f32> {
    let normal = |_| {
        let (a, b) = (1.0 - rng.random::<f32>(), rng.random::<f32>()); // a is not 0
        (-2.0 * a.ln()).sqrt() * (std::f32::consts::TAU * b).cos() * deviation
    };
    (0..count).map(normal).collect()
}
