//! A checkpoint to start from.

use std::collections::HashMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use hybrid_attention::load::Checkpoint;
use hybrid_attention::model::Weights;
use hybrid_attention::thought::ThoughtModel;
use hybrid_attention::{Config, HybridModel, Tokenizer};
use indicatif::HumanBytes;

use crate::terminal::{self, Result};

/// What a folder or a GGUF file holds, in `f32`.
pub(crate) struct Base {
    pub(crate) path: PathBuf,
    pub(crate) config: Config,
    pub(crate) tokenizer: Tokenizer,
    pub(crate) weights: HashMap<String, Tensor>,
}

/// What comes with a checkpoint beside its weights, and does not change in training.
const BESIDE: [&str; 6] = [
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "generation_config.json",
];

impl Base {
    pub(crate) fn load(path: &Path) -> Result<Self> {
        let checkpoint = Checkpoint::open(path)?;
        let tokenizer = match checkpoint.gguf_metadata() {
            Some(metadata) => Tokenizer::from_gguf(metadata)?,
            None => Tokenizer::from_folder(path)?,
        };
        let tokenizer = tokenizer.ok_or_else(|| format!("{}: no tokenizer", path.display()))?;
        let config = checkpoint.config().clone();

        let bar = terminal::bar(0, "{msg} [{bar:30}] {percent}%");
        let progress = |done, total| {
            bar.set_length(total);
            bar.set_message(format!("loading {}", HumanBytes(total)));
            bar.set_position(done);
        };
        let mut stored = checkpoint.weights(Some(DType::F32), &Device::Cpu).on_progress(progress);
        let mut wanted: Vec<_> = config.weights().collect();
        if stored.contains("thought.gate") {
            wanted.push(("thought.gate".to_string(), vec![config.hidden_size]));
        }
        for index in (0..).take_while(|index| stored.contains(&format!("thought.layers.{index}"))) {
            let own = format!("thought.layers.{index}.");
            wanted.extend(config.weights().filter_map(|(name, shape)| {
                Some((name.strip_prefix("model.layers.0.").map(|name| own.clone() + name)?, shape))
            }));
        }
        let tensor = |(name, shape): (String, Vec<usize>)| {
            let tensor = stored.tensor(&name, &shape)?;
            Ok((name, tensor))
        };
        let weights = wanted.into_iter().map(tensor).collect::<Result<_>>()?;
        stored.finish()?;
        bar.finish_and_clear();
        Ok(Self { path: path.to_path_buf(), config, tokenizer, weights })
    }

    /// The middle third of its layers.
    pub(crate) fn middle(&self) -> Range<usize> {
        let layers = self.config.num_hidden_layers;
        layers / 3..(2 * layers / 3).max(layers / 3 + 1)
    }

    /// The model as it was.
    pub(crate) fn model(mut self) -> Result<ThoughtModel> {
        Ok(ThoughtModel::new(&self.config, &mut self.weights)?)
    }

    /// The same with its tokenizer.
    pub(crate) fn with_tokenizer(&self) -> Result<HybridModel> {
        let model = ThoughtModel::new(&self.config, &mut self.weights.clone())?;
        Ok(HybridModel::new(model, Some(self.tokenizer.clone()))?)
    }
}

/// Whether a checkpoint can be trained as a whole: the files beside its weights are then copied.
pub(crate) fn check_copyable(path: &Path) -> Result<()> {
    match path.join("config.json").is_file() {
        true => Ok(()),
        false => Err(format!(
            "{}: not a folder with config.json, which goes beside weights that are all trained; \
             give --rank to train an adapter",
            path.display()
        )
        .into()),
    }
}

/// Copies the files beside the weights.
pub(crate) fn copy_beside(from: &Path, to: &Path) -> Result<()> {
    for name in BESIDE {
        let file = from.join(name);
        if file.is_file() {
            std::fs::copy(&file, to.join(name))
                .map_err(|error| format!("{}: {error}", file.display()))?;
        }
    }
    Ok(())
}
