//! The weights of a checkpoint, handed out one by one and accounted for in the end.

use std::collections::BTreeSet;

use candle_core::{DType, Device, Tensor};

use super::convert::Stored;
use super::names::Naming;
use super::{Checkpoint, Entry};
use crate::error::{Error, Result};
use crate::model::{Weights, is_or_is_under};

/// The weights of a [`Checkpoint`], each read when it is asked for.
pub struct CheckpointWeights<'a> {
    checkpoint: &'a Checkpoint,
    dtype: Option<DType>,
    device: Device,
    /// By the names of the file.
    used: BTreeSet<&'a str>,
    progress: Option<Box<Progress<'a>>>,
    /// Bytes of tensors that were taken, and of all that the files hold.
    done: u64,
    total: u64,
}

type Progress<'a> = dyn FnMut(u64, u64) + 'a;

impl std::fmt::Debug for CheckpointWeights<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CheckpointWeights")
            .field("path", &self.checkpoint.path)
            .field("dtype", &self.dtype)
            .field("used", &self.used.len())
            .finish_non_exhaustive()
    }
}

impl Weights for CheckpointWeights<'_> {
    fn tensor(&mut self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let Checkpoint { tensors, naming, config, path, .. } = self.checkpoint;
        let spelled = naming.spell(name);
        let Some((spelled, entry)) = tensors.get_key_value(spelled.as_str()) else {
            return Err(Error::MissingWeight { name: spelled, place: path.display().to_string() });
        };
        let rows = naming.rows(name, config.head_dim);
        let as_stored = |stored: Stored| match naming {
            Naming::Gguf => DType::F32,
            Naming::HuggingFace | Naming::Mistral => stored.dtype(),
        };
        let dtype = |stored| self.dtype.unwrap_or_else(|| as_stored(stored));
        let tensor = entry.tensor(spelled, shape, rows, dtype, &self.device)?;
        self.used.insert(spelled);
        self.advance(entry.range.len());
        Ok(tensor)
    }

    fn contains(&self, name: &str) -> bool {
        let spelled = self.checkpoint.naming.spell(name);
        self.checkpoint.tensors.keys().any(|key| is_or_is_under(key, &spelled))
    }
}

impl<'a> CheckpointWeights<'a> {
    pub(super) fn new(checkpoint: &'a Checkpoint, dtype: Option<DType>, device: &Device) -> Self {
        Self {
            checkpoint,
            dtype,
            device: device.clone(),
            used: BTreeSet::new(),
            progress: None,
            done: 0,
            total: checkpoint.tensors.values().map(|entry| entry.range.len() as u64).sum(),
        }
    }

    /// Calls `report(done, total)`, in bytes of the files, after every weight and at the end.
    #[must_use]
    pub fn on_progress(mut self, report: impl FnMut(u64, u64) + 'a) -> Self {
        self.progress = Some(Box::new(report));
        self
    }

    /// Judges the tensors that nothing asked for, once the model has taken what it needs.
    ///
    /// A model that leaves a weight of its checkpoint unused computes something else than the
    /// checkpoint means, so each one that stands among the model's own is an error. Tensors outside
    /// the model, and the rotary frequencies that old versions of `transformers` saved, are logged
    /// as warnings. A copy of the embedding table as the head of a model that ties the two is as
    /// good as none.
    ///
    /// # Errors
    /// [`Error::UnusedWeight`] for the first such weight; [`Error::Unsupported`] for the frequency
    /// factors of RoPE scaling in a GGUF file.
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
            return Err(Error::unsupported("rope scaling", name));
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

    /// `bytes` more are done, at most all of them.
    fn advance(&mut self, bytes: usize) {
        self.done = self.done.saturating_add(bytes as u64).min(self.total);
        if let Some(report) = &mut self.progress {
            report(self.done, self.total);
        }
    }
}
