//! The weights of a checkpoint, taken one by one and accounted for at the end.

use std::collections::BTreeMap;
use std::ops::Range;

use candle_core::{Device, Tensor};

use super::convert::Stored;
use super::names::{Naming, Rows};
use super::scales::Scales;
use super::{Checkpoint, Entry, FREQUENCY_FACTORS, Layout, WeightType};
use crate::error::{Error, Result};
use crate::model::{Linear, Weights, is_or_is_under};

/// The weights of a [`Checkpoint`], each read when it is asked for.
pub struct CheckpointWeights<'a> {
    checkpoint: &'a Checkpoint,
    kept: WeightType,
    device: Device,
    /// By their names in the file, what was taken of them: where each run of bytes starts, and its length.
    used: BTreeMap<&'a str, BTreeMap<usize, usize>>,
    progress: Option<Box<Progress<'a>>>,
    /// Bytes of tensors that were taken, and of all that the files hold.
    done: u64,
    total: u64,
}

/// Besides the head, where rounding costs most for its size: llama.cpp's mixes spare these, too.
const DEAR: [&str; 3] = ["v_proj.weight", "down_proj.weight", ".w2.weight"];

/// A weight in a file.
struct Place<'a> {
    /// The name of its tensor.
    name: &'a str,
    tensor: &'a Entry,
    rows: Rows,
}

/// What follows the name of a projection in that of its scales: transformers, compressed-tensors, Mistral.
const SCALES: [&str; 3] = ["weight_scale_inv", "weight_scale", "qscale_weight"];

/// The same for those of activations, in this order.
const ACTIVATION_SCALES: [&str; 3] = ["activation_scale", "input_scale", "qscale_act"];

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
        let (place, kept) = (self.find(name)?, self.kept);
        let layout = self.layout(&place)?;
        let dtype = |stored| kept.dense(stored);
        let tensor = place.tensor.tensor(place.name, shape, &layout, dtype, &self.device)?;
        self.take(place.name, place.tensor.span(shape, place.rows));
        Ok(tensor)
    }

    fn linear(&mut self, name: &str, out_features: usize, in_features: usize) -> Result<Linear> {
        let place = self.find(name)?;
        let dear = name == self.head() || DEAR.iter().any(|dear| name.ends_with(dear));
        let blocks = match place.tensor.stored {
            Ok(stored) => self.kept.blocks(stored, in_features, dear, &self.device)?,
            Err(_) => None, // an error, which `tensor` reports
        };
        let Some(blocks) = blocks else {
            return Linear::dense(&self.tensor(name, &[out_features, in_features])?);
        };
        let (shape, layout) = ((out_features, in_features), self.layout(&place)?);
        let linear = place.tensor.linear(place.name, shape, &layout, blocks, &self.device)?;
        self.take(place.name, place.tensor.span(&[out_features, in_features], place.rows));
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
            used: BTreeMap::new(),
            progress: None,
            done: 0,
            total: checkpoint.tensors.values().map(|entry| entry.range.len() as u64).sum(),
        }
    }

    /// A weight by its Hugging Face name.
    fn find(&self, name: &str) -> Result<Place<'a>> {
        let Checkpoint { tensors, naming, path, config, packed, .. } = self.checkpoint;
        let packed = if *packed { naming.packed(name, config) } else { None };
        let alone = || (naming.spell(name), naming.rows(name, config.head_dim));
        let (spelled, rows) = packed.unwrap_or_else(alone);
        match tensors.get_key_value(spelled.as_str()) {
            Some((name, tensor)) => Ok(Place { name, tensor, rows }),
            None => Err(Error::MissingWeight { name: spelled, place: path.display().to_string() }),
        }
    }

    /// How a weight stands in its file. Scales that it has are taken, too.
    fn layout(&mut self, place: &Place<'a>) -> Result<Layout> {
        let scales = match place.tensor.stored {
            Ok(Stored::F8) => Some(self.scales(place.name, place.tensor)?),
            _ => None,
        };
        Ok(Layout { rows: place.rows, scales })
    }

    /// What the FP8 weight called `spelled` in the file is multiplied by. Rows are counted as they are
    /// stored.
    fn scales(&mut self, spelled: &str, entry: &Entry) -> Result<Scales> {
        let Checkpoint { tensors, path, fp8, .. } = self.checkpoint;
        let stem = spelled.strip_suffix("weight").unwrap_or(spelled);
        let mut names = SCALES.iter().map(|name| format!("{stem}{name}"));
        let Some((name, scale)) = names.find_map(|name| tensors.get_key_value(name.as_str()))
        else {
            let [first, ..] = SCALES;
            let (name, place) = (format!("{stem}{first}"), path.display().to_string());
            return Err(Error::MissingWeight { name, place });
        };
        let matrix = match entry.shape.as_slice() {
            [rows, row @ ..] if !row.is_empty() => (*rows, row.iter().product()),
            vector => (1, vector.iter().product()), // which is one row
        };
        let values = scale.numbers(name, &scale.shape)?;
        let block = fp8.unwrap_or_default().block;
        let scales = Scales::fit(values, &scale.shape, matrix, block).map_err(|expected| {
            let (name, place, got) = (name.clone(), scale.place(), scale.shape.clone());
            Error::WeightShape { name, place, expected, got }
        })?;
        self.take(name, scale.range.clone());
        Ok(scales)
    }

    /// The weight that computes the logits.
    fn head(&self) -> &'static str {
        match self.checkpoint.config.tie_word_embeddings {
            true => "model.embed_tokens.weight",
            false => "lm_head.weight",
        }
    }

    /// Records that these bytes of a tensor were taken.
    fn take(&mut self, name: &'a str, Range { start, end }: Range<usize>) {
        self.used.entry(name).or_default().insert(start, end - start);
        self.advance(end - start);
    }

    /// Whether all of a tensor was taken.
    fn is_used(&self, name: &str, entry: &Entry) -> bool {
        let taken = self.used.get(name).map(|runs| runs.values().sum::<usize>());
        taken.is_some_and(|taken| taken >= entry.range.len())
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
    /// checkpoint means, so each one among the model's own is an error. Tensors outside the model (what
    /// sees images, of a model that does), the rotary frequencies that old versions of `transformers`
    /// saved, and beside FP8 weights the scales of activations, are logged as warnings, one for each kind. A
    /// copy of the embedding table as the head of a model that ties the two is ignored.
    ///
    /// # Errors
    /// [`Error::UnusedWeight`] for the first such weight; [`Error::Unsupported`] for the frequency
    /// factors of LongRoPE in a GGUF file that are not all 1.
    pub fn finish(mut self) -> Result<()> {
        let mut strays = BTreeMap::<String, Vec<(&str, &Entry)>>::new();
        for (name, entry) in &self.checkpoint.tensors {
            if !self.is_used(name, entry)
                && let Some(kind) = self.judge(name, entry)?
            {
                strays.entry(kind).or_default().push((name, entry));
            }
        }
        for (kind, tensors) in strays {
            match tensors.as_slice() {
                [(name, entry)] => tracing::warn!(name, file = entry.place(), "tensor not used"),
                several => tracing::warn!(names = kind, count = several.len(), "tensors not used"),
            }
        }
        self.advance(usize::MAX);
        Ok(())
    }

    /// Refuses a tensor that nothing asked for, if it should have been. Otherwise, what it and others that
    /// are left out are called together; `None` if there is nothing to say.
    fn judge(&self, name: &str, entry: &Entry) -> Result<Option<String>> {
        let Checkpoint { tensors, naming, config, fp8, .. } = self.checkpoint;
        if *naming == Naming::Gguf && name == FREQUENCY_FACTORS {
            return Ok(None); // part of the config
        }
        if *naming == Naming::Gguf && name.starts_with("rope_f") {
            let factors = entry.numbers(name, &entry.shape)?;
            if factors.iter().any(|factor| *factor != 1.0) {
                return Err(Error::unsupported("rope scaling", name));
            }
            tracing::warn!(name, file = entry.place(), "rope scaling by 1 in all places: not used");
            return Ok(None);
        }
        let of_activations = ACTIVATION_SCALES.iter().filter(|_| fp8.is_some());
        let inert = of_activations.chain(&["rotary_emb.inv_freq"]);
        for ending in inert.copied() {
            if name.strip_suffix(ending).is_some_and(|stem| stem.ends_with('.')) {
                return Ok(Some(format!("*.{ending}")));
            }
        }
        if !naming.is_ours(name) {
            // `vision_tower`, or `model.vision_tower`
            let depth = if name.starts_with("model.") { 2 } else { 1 };
            let part: Vec<_> = name.split('.').take(depth).collect();
            return Ok(Some(format!("{}.*", part.join("."))));
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
                    return Ok(None);
                }
                "the head is tied to the embedding table, which differs".to_string()
            } else if name.starts_with("thought") {
                "only thought.gate and thought.layers.0, 1, .. without a gap are read".to_string()
            } else if self.used.contains_key(name) {
                "some of its experts were not asked for".to_string()
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
