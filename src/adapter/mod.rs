//! Low-rank adapters (LoRA, Hu et al. 2021) in the layout of PEFT: a folder of
//! `adapter_config.json` and `adapter_model.safetensors`.
//!
//! An adapter adds `scale · B A` to some projections, with `A` of shape `(rank, in_features)`, `B` of
//! `(out_features, rank)` and a scale of `alpha / rank`, or `alpha / sqrt(rank)` with rsLoRA
//! (Kalajdzievski 2023). It may be active in thought passes, in decoding, or in both ([`AdapterScope`]), so
//! that one set of weights serves both: nothing of the base model is copied.
//!
//! ```
//! # use std::collections::HashMap;
//! # use candle_core::{Device, Tensor};
//! use hybrid_attention::adapter::{Adapter, AdapterConfig, AdapterScope};
//! use hybrid_attention::model::{Batch, Pass};
//! use hybrid_attention::thought::ThoughtModel;
//! # use hybrid_attention::Config;
//! # fn main() -> hybrid_attention::Result<()> {
//! # let config = Config::from_json(r#"{
//! #     "model_type": "mistral", "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24,
//! #     "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2
//! # }"#)?;
//! # let mut weights: HashMap<_, _> = config.weights().map(|(name, shape)| {
//! #     Ok((name, Tensor::randn(0f32, 0.1, shape, &Device::Cpu)?))
//! # }).collect::<Result<_, candle_core::Error>>()?;
//! # let base = ThoughtModel::new(&config, &mut weights)?;
//! // To train: A as PEFT draws it, B zero, both candle variables.
//! let how = AdapterConfig::rank(4).alpha(8.0);
//! let adapter = Adapter::new(&config, &how, 42, &Device::Cpu)?.trainable()?;
//! let adapted = base.adapted(&adapter, AdapterScope::Thinking)?;
//!
//! let xs = adapted.decoder().embed_ids(&[1, 5, 9])?;
//! let h = adapted.thinker().forward(&xs, 0..2, Pass::Bidirectional(&Batch::one(3)?))?;
//! let gradients = h.sqr()?.sum_all()?.backward()?;
//! for variable in adapter.variables()? {
//!     assert!(gradients.get(&variable).is_some());
//! }
//! # let folder = std::env::temp_dir().join(format!("adapter-example-{}", std::process::id()));
//!
//! adapter.save(&folder)?;
//! let same = Adapter::from_folder(&folder, &Device::Cpu)?;
//! let merged = base.merged(&same)?; // plain weights again
//! # std::fs::remove_dir_all(&folder).ok();
//! # let _ = merged;
//! # Ok(())
//! # }
//! ```
//!
//! Thought passes, bidirectional embeddings and the last run over the thoughts that `KeyValue` and
//! `Mixed` hand off use the thinker's adapters; everything that is read causally uses the decoder's.
//! Base weights may be quantised or kept in half precision; several adapters add up. A gate that was
//! learned with an adapter is stored beside it, as `thought.gate` in `thought.safetensors`.
//!
//! DoRA, biases, `modules_to_save`, adapted embeddings and initialisations that change the base weights
//! (PiSSA, OLoRA) are refused by name. So is an adapter of the head that carries a copy of the head, as
//! PEFT saves it unless `save_embedding_layers=False`.

mod apply;
mod config;
mod file;
mod modules;
mod scope;

use std::collections::BTreeMap;

use candle_core::{Device, Tensor, Var};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

pub use self::config::AdapterConfig;
pub(crate) use self::file::{Values, serialize};
pub use self::scope::AdapterScope;

use crate::config::Config;
use crate::error::{Error, Result};

/// Low-rank changes of a model's projections, and what comes with them for thought passes.
///
/// Its tensors are `f32`, whatever type they were stored in.
#[derive(Clone, Debug)]
pub struct Adapter {
    config: AdapterConfig,
    wrapped: Wrapped,
    /// By module: `model.layers.0.self_attn.q_proj`, or `lm_head`.
    pairs: BTreeMap<String, Pair>,
    thought_gate: Option<Tensor>,
    /// Where it comes from, as errors name it.
    place: String,
}

/// What PEFT wrapped; it shows in the names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wrapped {
    /// A `MistralForCausalLM`: `base_model.model.model.layers.0…`
    CausalLm,
    /// A `MistralModel`, as LLM2Vec does: `base_model.model.layers.0…`
    Base,
}

/// What is added to one projection.
#[derive(Clone, Debug)]
struct Pair {
    /// `(rank, in_features)`
    a: Tensor,
    /// `(out_features, rank)`
    b: Tensor,
    scale: f64,
}

const PREFIX: &str = "base_model.model.";

impl Wrapped {
    /// The name of a module inside what was wrapped.
    fn inner(self, module: &str) -> &str {
        match self {
            Self::CausalLm => module,
            Self::Base => module.strip_prefix("model.").unwrap_or(module),
        }
    }

    /// PEFT's name of a tensor: `half` is `A` or `B`.
    fn tensor(self, module: &str, half: &str) -> String {
        format!("{PREFIX}{}.lora_{half}.weight", self.inner(module))
    }
}

impl Adapter {
    /// An adapter that changes nothing yet, for training: as in PEFT, `A` is uniform in
    /// `±1 / sqrt(in_features)` and `B` zero. The same seed gives the same adapter.
    ///
    /// # Errors
    /// As [`AdapterConfig::validate`] and [`Config::validate`]; [`Error::Parameter`] for one of
    /// `target_modules` that the model does not have, if there is nothing to adapt, or for a rank larger
    /// than both sides of a projection.
    pub fn new(model: &Config, config: &AdapterConfig, seed: u64, device: &Device) -> Result<Self> {
        config.validate()?;
        model.validate()?;
        let rules = config.rules()?;
        for name in config.target_names() {
            let alone = AdapterConfig::default().target_modules([name]);
            let alone = alone.rules()?;
            if !projections(model).any(|(module, _)| alone.targets(&module)) {
                let expected = "ends of names of projections, as q_proj or layers.0.mlp.up_proj";
                return Err(Error::parameter("target_modules", expected, name));
            }
        }
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut pairs = BTreeMap::new();
        for (module, (out, input)) in projections(model) {
            if !rules.targets(&module) {
                continue;
            }
            let rank = rules.rank(&module);
            let widest = out.max(input);
            if rank > widest {
                let expected = format!("at most {widest}, the larger side of {module}");
                return Err(Error::parameter("r", expected, rank));
            }
            // Kaiming's uniform distribution with a = sqrt(5), as torch initialises a projection.
            let reach = 1.0 / (input as f32).sqrt();
            let values = (0..rank * input).map(|_| rng.random_range(-reach..=reach)).collect();
            let a = Tensor::from_vec::<_, f32>(values, (rank, input), device)?;
            let b = Tensor::from_vec(vec![0f32; out * rank], (out, rank), device)?;
            let scale = rules.scale(&module);
            pairs.insert(module, Pair { a, b, scale });
        }
        if pairs.is_empty() {
            let expected = "at least one projection of the model";
            return Err(Error::parameter("target_modules", expected, "none"));
        }
        let (config, place) = (config.clone(), "memory".to_string());
        Ok(Self { config, wrapped: Wrapped::CausalLm, pairs, thought_gate: None, place })
    }

    /// What `adapter_config.json` says.
    #[must_use]
    pub fn config(&self) -> &AdapterConfig {
        &self.config
    }

    /// The matrices under PEFT's names, `A` `(rank, in_features)` and `B` `(out_features, rank)` of
    /// every projection it has.
    pub fn tensors(&self) -> impl Iterator<Item = (String, &Tensor)> {
        self.pairs.iter().flat_map(|(module, pair)| {
            let name = |half| self.wrapped.tensor(module, half);
            [(name("A"), &pair.a), (name("B"), &pair.b)]
        })
    }

    /// What was learned with it for thought passes, `(hidden)`: replaces the checkpoint's own
    /// [`thought_gate`](crate::thought::ThoughtModel::thought_gate) wherever the adapter thinks.
    #[must_use]
    pub fn thought_gate(&self) -> Option<&Tensor> {
        self.thought_gate.as_ref()
    }

    /// The same with a gate for thought passes, `(hidden)`; its sigmoid is the share of the new state
    /// that a thought takes over, channel by channel.
    ///
    /// # Errors
    /// [`Error::Parameter`] for anything but a vector.
    pub fn with_thought_gate(mut self, gate: &Tensor) -> Result<Self> {
        if gate.rank() != 1 {
            let got = format!("{:?}", gate.dims());
            return Err(Error::parameter("thought.gate", "a vector (hidden)", got));
        }
        self.thought_gate = Some(gate.to_dtype(candle_core::DType::F32)?);
        Ok(self)
    }

    /// A copy whose tensors, including the gate, are [`variables`](Self::variables): a transformer made
    /// with it sees an optimiser's changes to them, and provides their gradients.
    ///
    /// # Errors
    /// When a device has no room.
    pub fn trainable(&self) -> Result<Self> {
        let variable = |tensor: &Tensor| -> Result<Tensor> {
            Ok(Var::from_tensor(&tensor.detach().copy()?)?.into_inner())
        };
        let mut copy = self.clone();
        for pair in copy.pairs.values_mut() {
            (pair.a, pair.b) = (variable(&pair.a)?, variable(&pair.b)?);
        }
        copy.thought_gate = copy.thought_gate.as_ref().map(variable).transpose()?;
        Ok(copy)
    }

    /// What an optimiser must change: the tensors in the order of [`tensors`](Self::tensors), then the
    /// gate. Empty unless the adapter is [`trainable`](Self::trainable).
    ///
    /// # Errors
    /// When a device fails.
    pub fn variables(&self) -> Result<Vec<Var>> {
        let tensors = self.tensors().map(|(_, tensor)| tensor).chain(&self.thought_gate);
        tensors.filter(|it| it.is_variable()).map(|it| Ok(Var::from_tensor(it)?)).collect()
    }
}

/// The modules that can have an adapter, and their `(out_features, in_features)`.
fn projections(model: &Config) -> impl Iterator<Item = (String, (usize, usize))> {
    let matrix = |(name, shape): (String, Vec<usize>)| {
        let module = name.strip_suffix(".weight")?;
        match shape.as_slice() {
            [out, input] if module.starts_with("model.layers.") => {
                Some((module.to_string(), (*out, *input)))
            }
            _ => None,
        }
    };
    let head = ("lm_head".to_string(), (model.vocab_size, model.hidden_size));
    model.weights().filter_map(matrix).chain(std::iter::once(head))
}
