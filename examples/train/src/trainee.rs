//! What is trained: a transformer and the variables in it.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor, Var};
use hybrid_attention::adapter::{AdapterConfig, AdapterScope};
use hybrid_attention::dictionary::{Dictionary, DictionaryAdapter};
use hybrid_attention::thought::ThoughtModel;
use hybrid_attention::{Adapter, Config};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use crate::adamw::AdamW;
use crate::base::{self, Base};
use crate::names::{EMBEDDINGS, Embeddings, normals};
use crate::settings::{Arm, LowRank, MOST_PASSES, Settings};
use crate::terminal::Result;
use crate::tokenizer::tokenizer;
use flashback_suite::Vocabulary;

/// A model in training.
pub(crate) struct Trainee {
    config: Config,
    /// The variables that are trained, by name.
    pub(crate) vars: Vec<(String, Var)>,
    /// Weights that are not.
    frozen: HashMap<String, Tensor>,
    /// The embedding table, where its names are drawn anew in every step.
    names: Option<Embeddings>,
    kind: Kind,
}

/// What is trained, and so what the run leaves at the end.
enum Kind {
    /// A new small model for a suite with this vocabulary.
    New(Vocabulary),
    /// All weights of the checkpoint in this folder.
    Whole(PathBuf),
    /// A low-rank adapter, and where it is active.
    Adapter(Box<Adapter>, AdapterScope),
    /// How a dictionary is read.
    Reading(Dictionary, DictionaryAdapter),
}

const GATE: &str = "thought.gate";

/// The initial gate of a checkpoint that has none: a pass moves each channel by a twentieth of the way,
/// so that at first the model is nearly what it was.
const FIRST_GATE: f32 = -3.0;

/// The learning rate of a checkpoint's gate. It must move by several units to matter, a weight only by
/// hundredths.
const GATE_LR: f64 = 0.01;

impl Trainee {
    /// A small new model for a suite.
    pub(crate) fn new(settings: &Settings, vocabulary: &Vocabulary) -> Result<Self> {
        let (a, b) = settings.span;
        let layers = match settings.arm {
            Arm::Deep => b + MOST_PASSES * (b - a) + 1,
            _ => b + 1,
        };
        let config = Config::from_json(&config_json(vocabulary, layers))?;
        let mut rng = ChaCha8Rng::seed_from_u64(settings.seed);
        let gate = (GATE.to_string(), vec![config.hidden_size]);
        let gate = settings.has_gate().then_some(gate);
        let mut vars = Vec::new();
        for (name, shape) in config.weights().chain(gate) {
            let count: usize = shape.iter().product();
            let values = match (name.as_str(), shape.as_slice()) {
                (EMBEDDINGS, _) => continue,
                (GATE, _) => vec![0.0; count], // half of the new state
                // the head is the embedding table, whose rows are long
                ("model.norm.weight", _) => vec![0.05; count],
                (_, [_]) => vec![1.0; count],
                (_, shape) => {
                    let fan_in = shape.last().copied().unwrap_or(1) as f32;
                    normals(count, (3.0 * fan_in).sqrt().recip(), &mut rng)
                }
            };
            vars.push((name, Var::from_vec(values, shape, &Device::Cpu)?));
        }
        let names = Some(Embeddings::new(vocabulary, config.hidden_size, &mut rng));
        Ok(Self {
            config,
            vars,
            frozen: HashMap::new(),
            names,
            kind: Kind::New(vocabulary.clone()),
        })
    }

    /// A checkpoint, or an adapter on it. With a vocabulary, it is trained on the flashback suite.
    pub(crate) fn on(
        base: Base,
        settings: &Settings,
        vocabulary: Option<&Vocabulary>,
    ) -> Result<Self> {
        let Base { path, config, mut weights, .. } = base;
        let mut names = None;
        if let (Some(vocabulary), Some(table)) = (vocabulary, weights.get(EMBEDDINGS)) {
            names = Some(Embeddings::of(table, vocabulary)?);
            weights.remove(EMBEDDINGS);
        }
        let gate = match weights.get(GATE) {
            Some(gate) => gate.clone(),
            None => Tensor::full(FIRST_GATE, config.hidden_size, &Device::Cpu)?,
        };
        let (thinks, has_gate) = (settings.most_passes() > 0, settings.has_gate());
        let Some(LowRank { rank, alpha, target, layers, mind }) = &settings.adapter else {
            base::check_copyable(&path)?;
            if has_gate {
                weights.insert(GATE.to_string(), gate);
            }
            let mut vars = Vec::with_capacity(weights.len());
            for (name, tensor) in weights {
                vars.push((name, Var::from_tensor(&tensor)?));
            }
            vars.sort_by(|(a, _), (b, _)| a.cmp(b));
            return Ok(Self {
                config,
                vars,
                frozen: HashMap::new(),
                names,
                kind: Kind::Whole(path),
            });
        };

        let (first, end) = layers.unwrap_or(settings.span);
        let how = AdapterConfig::rank(*rank)
            .alpha(*alpha)
            .target_modules(target)
            .layers_to_transform(first..end);
        let how = settings.model.iter().fold(how, AdapterConfig::base_model);
        let mut adapter = Adapter::new(&config, &how, settings.seed, &Device::Cpu)?;
        if has_gate {
            adapter = adapter.with_thought_gate(&gate)?;
        }
        let adapter = adapter.trainable()?;
        let tensors = adapter.tensors().map(|(name, _)| name);
        let gate = adapter.thought_gate().map(|_| GATE.to_string());
        let vars = tensors.chain(gate).zip(adapter.variables()?).collect();
        let alone = if thinks { AdapterScope::Thinking } else { AdapterScope::Decoding };
        let scope = mind.unwrap_or(alone);
        Ok(Self {
            config,
            vars,
            frozen: weights,
            names,
            kind: Kind::Adapter(Box::new(adapter), scope),
        })
    }

    /// What reads a dictionary beside a checkpoint.
    pub(crate) fn reading(base: Base, dictionary: Dictionary, settings: &Settings) -> Result<Self> {
        let Base { config, weights, .. } = base;
        let rank = settings.dictionary.as_ref().map_or(1, |reads| reads.rank);
        let how = dictionary.config();
        let adapter = DictionaryAdapter::new(&config, how, rank, settings.seed, &Device::Cpu)?;
        let adapter = adapter.trainable()?;
        let names = adapter.tensors().map(|(name, _)| name);
        let vars = names.zip(adapter.variables()?).collect();
        let kind = Kind::Reading(dictionary, adapter);
        Ok(Self { config, vars, frozen: weights, names: None, kind })
    }

    /// The same with another dictionary.
    pub(crate) fn with_dictionary(&self, other: &Dictionary) -> Result<Option<ThoughtModel>> {
        let Kind::Reading(_, adapter) = &self.kind else { return Ok(None) };
        let model = ThoughtModel::new(&self.config, &mut self.frozen.clone())?;
        Ok(Some(model.with_dictionary(other, adapter, AdapterScope::Both)?))
    }

    /// The optimiser of the variables.
    pub(crate) fn optimizer(&self, settings: &Settings) -> Result<AdamW> {
        let optimizer = AdamW::new(&self.vars, 0.98, 0.01)?;
        Ok(match self.kind {
            Kind::New(_) | Kind::Reading(..) => optimizer,
            Kind::Whole(_) | Kind::Adapter(..) => optimizer.with_rate(GATE, GATE_LR / settings.lr),
        })
    }

    /// The model with names that are drawn from `rng`.
    pub(crate) fn model(&self, rng: &mut impl Rng) -> Result<ThoughtModel> {
        let mut weights = self.frozen.clone();
        if !matches!(self.kind, Kind::Adapter(..) | Kind::Reading(..)) {
            let vars = self.vars.iter();
            weights.extend(vars.map(|(name, var)| (name.clone(), var.as_tensor().clone())));
        }
        if let Some(names) = &self.names {
            weights.insert(EMBEDDINGS.to_string(), names.draw(rng)?);
        }
        let model = ThoughtModel::new(&self.config, &mut weights)?;
        Ok(match &self.kind {
            Kind::Adapter(adapter, scope) => model.adapted(adapter, *scope)?,
            Kind::Reading(dictionary, adapter) => {
                model.with_dictionary(dictionary, adapter, AdapterScope::Both)?
            }
            Kind::New(_) | Kind::Whole(_) => model,
        })
    }

    /// Parameters that are trained.
    pub(crate) fn parameters(&self) -> usize {
        self.vars.iter().map(|(_, var)| var.elem_count()).sum()
    }

    /// Writes what was trained, ready to load: a checkpoint, with names drawn from `rng`, or an adapter.
    pub(crate) fn save(&self, folder: &Path, rng: &mut impl Rng) -> Result<()> {
        let weights = folder.join("model.safetensors");
        match &self.kind {
            Kind::New(vocabulary) => {
                let config = config_json(vocabulary, self.config.num_hidden_layers);
                std::fs::write(folder.join("config.json"), config)?;
                candle_core::safetensors::save(&self.weights(DType::BF16, rng)?, weights)?;
                let tokenizer = tokenizer(vocabulary).map_err(|error| error.to_string())?;
                let path = folder.join("tokenizer.json");
                tokenizer.save(path, true).map_err(|error| error.to_string())?;
            }
            Kind::Whole(from) => {
                base::copy_beside(from, folder)?;
                // In `bf16` a small change to a large weight would be lost.
                candle_core::safetensors::save(&self.weights(DType::F32, rng)?, weights)?;
            }
            Kind::Adapter(adapter, _) => adapter.save(folder)?,
            Kind::Reading(_, adapter) => adapter.save(folder.join(DictionaryAdapter::FILE))?,
        }
        Ok(())
    }

    /// All weights of a checkpoint.
    fn weights(&self, dtype: DType, rng: &mut impl Rng) -> Result<HashMap<String, Tensor>> {
        let mut all = HashMap::new();
        for (name, var) in &self.vars {
            all.insert(name.clone(), var.as_detached_tensor().to_dtype(dtype)?);
        }
        if let Some(names) = &self.names {
            all.insert(EMBEDDINGS.to_string(), names.draw(rng)?.to_dtype(dtype)?);
        }
        Ok(all)
    }
}

/// The configuration of a model with this many layers, as in `config.json`.
fn config_json(vocabulary: &Vocabulary, layers: usize) -> String {
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
        vocabulary.pieces().len(),
        vocabulary.end()
    )
}
