//! The weights of a checkpoint, taken one by one and accounted for at the end.

use std::collections::BTreeSet;

use candle_core::{DType, Device, Tensor};

use super::names::{Naming, Rows};
use super::{Checkpoint, Entry, WeightType};
use crate::error::{Error, Result};
use crate::model::{Linear, Weights, is_or_is_under};

/// The weights of a [`Checkpoint`], each read when it is asked for.
pub struct CheckpointWeights<'a> {
    checkpoint: &'a Checkpoint,
    kept: WeightType,
    device: Device,
    /// By their names in the file.
    used: BTreeSet<&'a str>,
    progress: Option<Box<Progress<'a>>>,
    /// Bytes of tensors that were taken, and of all that the files hold.
    done: u64,
    total: u64,
}

/// Besides the head, where rounding costs most for its size: llama.cpp's mixes spare these, too.
const DEAR: [&str; 2] = ["v_proj.weight", "down_proj.weight"];

type Progress<'a> = dyn FnMut(u64, u64) + 'a;

impl std::fmt::Debug for CheckpointWeights<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CheckpointWeights")
            .field("path", &self.checkpoint.path)
            .field("kept", &self.kept)
            .field("used", &self.used.len())
            .finish_non_exhaustive()
    }
}

impl Weights for CheckpointWeights<'_> {
    fn tensor(&mut self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let (spelled, entry) = self.find(name)?;
        let (rows, kept) = (self.rows(name), self.kept);
        let dtype = |stored| kept.dense(stored);
        let tensor = entry.tensor(spelled, shape, rows, dtype, &self.device)?;
        self.take(spelled, entry);
        Ok(tensor)
    }

    fn linear(&mut self, name: &str, out_features: usize, in_features: usize) -> Result<Linear> {
        let (spelled, entry) = self.find(name)?;
        let dear = name == self.head() || DEAR.iter().any(|dear| name.ends_with(dear));
        let blocks = match entry.stored {
            Ok(stored) => self.kept.blocks(stored, in_features, dear, &self.device)?,
            Err(_) => None, // an error, which `tensor` reports
        };
        let Some(blocks) = blocks else {
            return Linear::dense(&self.tensor(name, &[out_features, in_features])?);
        };
        let (shape, rows) = ((out_features, in_features), self.rows(name));
        let linear = entry.linear(spelled, shape, rows, blocks, &self.device)?;
        self.take(spelled, entry);
        Ok(linear)
    }

    fn embedding(&mut self, name: &str, vocab_size: usize, hidden_size: usize) -> Result<Linear> {
        self.linear(name, vocab_size, hidden_size)
    }

    fn contains(&self, name: &str) -> bool {
        let spelled = self.checkpoint.naming.spell(name);
        self.checkpoint.tensors.keys().any(|key| is_or_is_under(key, &spelled))
    }
}

impl<'a> CheckpointWeights<'a> {
    pub(super) fn new(checkpoint: &'a Checkpoint, kept: WeightType, device: &Device) -> Self {
        Self {
            checkpoint,
            kept,
            device: device.clone(),
            used: BTreeSet::new(),
            progress: None,
            done: 0,
            total: checkpoint.tensors.values().map(|entry| entry.range.len() as u64).sum(),
        }
    }

    /// A weight by its Hugging Face name: its name in the file, and where it is.
    fn find(&self, name: &str) -> Result<(&'a str, &'a Entry)> {
        let Checkpoint { tensors, naming, path, .. } = self.checkpoint;
        let spelled = naming.spell(name);
        match tensors.get_key_value(spelled.as_str()) {
            Some((spelled, entry)) => Ok((spelled, entry)),
            None => Err(Error::MissingWeight { name: spelled, place: path.display().to_string() }),
        }
    }

    fn rows(&self, name: &str) -> Rows {
        let Checkpoint { naming, config, .. } = self.checkpoint;
        naming.rows(name, config.head_dim)
    }

    /// The weight that computes the logits.
    fn head(&self) -> &'static str {
        match self.checkpoint.config.tie_word_embeddings {
            true => "model.embed_tokens.weight",
            false => "lm_head.weight",
        }
    }

    /// Records that a weight was taken.
    fn take(&mut self, spelled: &'a str, entry: &Entry) {
        self.used.insert(spelled);
        self.advance(entry.range.len());
    }

    /// Calls `report(done, total)`, in bytes of the files, after every weight and at the end.
    #[must_use]
    pub fn on_progress(mut self, report: impl FnMut(u64, u64) + 'a) -> Self {
        self.progress = Some(Box::new(report));
        self
    }

    /// Checks for tensors that nothing asked for, once the model has taken what it needs.
    ///
    /// A model that leaves a weight of its checkpoint unused computes something other than what the
    /// checkpoint means, so each one among the model's own is an error. Tensors outside the model, and
    /// the rotary frequencies that old versions of `transformers` saved, are logged as warnings. A copy
    /// of the embedding table as the head of a model that ties the two is ignored.
    ///
    /// # Errors
    /// [`Error::UnusedWeight`] for the first such weight; [`Error::Unsupported`] for the frequency
    /// factors of RoPE scaling in a GGUF file that are not all 1.
    pub fn finish(mut self) -> Result<()> {
        for (name, entry) in &self.checkpoint.tensors {
            if !self.used.contains(name.as_str()) {
                self.judge(name, entry)?;
            }
        }
        self.advance(usize::MAX);
        Ok(())
    }

    fn judge(&self, name: &str, entry: &Entry) -> Result<()> {
        let Checkpoint { tensors, naming, config, .. } = self.checkpoint;
        if *naming == Naming::Gguf && name.starts_with("rope_f") {
            let as_f32 = |_| DType::F32;
            let factors = entry.tensor(name, &entry.shape, Rows::InOrder, as_f32, &Device::Cpu)?;
            if factors.flatten_all()?.to_vec1::<f32>()?.iter().any(|factor| *factor != 1.0) {
                return Err(Error::unsupported("rope scaling", name));
            }
            tracing::warn!(name, file = entry.place(), "rope scaling by 1 in all places: not used");
            return Ok(());
        }
        if name.ends_with(".rotary_emb.inv_freq") || !naming.is_ours(name) {
            tracing::warn!(name, file = entry.place(), "tensor not used");
            return Ok(());
        }
        let reason =
            if let Some(layer) = naming.layer(name).filter(|n| *n >= config.num_hidden_layers) {
                format!("layer {layer} of a model of {} layers", config.num_hidden_layers)
            } else if config.tie_word_embeddings && name == naming.spell("lm_head.weight") {
                let embeddings = tensors.get(&naming.spell("model.embed_tokens.weight"));
                let same = |other: &Entry| {
                    other.stored == entry.stored
                        && other.shape == entry.shape
                        && other.bytes() == entry.bytes()
                };
                if embeddings.is_some_and(same) {
                    return Ok(());
                }
                "the head is tied to the embedding table, which differs".to_string()
            } else if name.starts_with("thought") {
                "only thought.gate and thought.layers.0, 1, .. without a gap are read".to_string()
            } else {
                "this architecture has no such weight".to_string()
            };
        let (name, place) = (name.to_string(), entry.place());
        Err(Error::UnusedWeight { name, place, reason })
    }

    /// Counts `bytes` more as done, up to all of them.
    fn advance(&mut self, bytes: usize) {
        self.done = self.done.saturating_add(bytes as u64).min(self.total);
        if let Some(report) = &mut self.progress {
            report(self.done, self.total);
        }
    }
}
