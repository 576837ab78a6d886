//! A model that thinks: one set of weights, with what decodes and what runs thought passes.

use std::collections::BTreeMap;
use std::sync::{Arc, OnceLock};

use candle_core::Tensor;

use crate::adapter::{Adapter, AdapterScope};
use crate::config::Config;
use crate::error::Result;
use crate::kernels::Compute;
use crate::model::{Batch, ForwardContext, Pass, Sight, Stack, Transformer, Weights};
use crate::refine::{Codes, Digits};

/// A [`Transformer`] and what comes with it for thought passes: low-rank adapters of their own, blocks
/// that only they run, a gate.
///
/// Cheap to clone; a clone shares all weights.
#[derive(Clone, Debug)]
pub struct ThoughtModel {
    /// Reads causally: what comes before the span, what is handed off, every new token.
    decoder: Arc<Transformer>,
    /// Runs thought passes. The decoder itself, unless an adapter is for one of the two only.
    thinker: Arc<Transformer>,
    /// Run after the span in every thought pass.
    thought_layers: Option<Arc<Stack>>,
    thought_gate: Option<Tensor>,
    /// Of the embedding table, once they are asked for.
    codes: Arc<OnceLock<Codes>>,
}

impl From<Transformer> for ThoughtModel {
    fn from(transformer: Transformer) -> Self {
        let decoder = Arc::new(transformer);
        Self {
            thinker: Arc::clone(&decoder),
            decoder,
            thought_layers: None,
            thought_gate: None,
            codes: Arc::default(),
        }
    }
}

impl ThoughtModel {
    /// Builds a transformer from `weights`, and takes `thought.layers.{i}.*` (the weights of further
    /// blocks, from 0 on) and `thought.gate` (`[hidden]`) where there are any: what a checkpoint has
    /// learned for its thought passes.
    ///
    /// # Errors
    /// As [`Transformer::new`].
    pub fn new(config: &Config, weights: &mut impl Weights) -> Result<Self> {
        let transformer = Transformer::new(config, weights)?;
        let (dtype, device) = (transformer.dtype(), transformer.device().clone());
        let prefix = "thought.layers";
        let count =
            (0..).take_while(|index| weights.contains(&format!("{prefix}.{index}"))).count();
        let thought_layers = match count {
            0 => None,
            _ => Some(Arc::new(Stack::new(config, prefix, count, (dtype, &device), weights)?)),
        };
        let thought_gate = match weights.contains("thought.gate") {
            true => {
                let gate = weights.tensor("thought.gate", &[config.hidden_size])?;
                Some(gate.to_dtype(dtype)?)
            }
            false => None,
        };
        Ok(Self { thought_layers, thought_gate, ..Self::from(transformer) })
    }

    /// What decodes.
    #[must_use]
    pub fn decoder(&self) -> &Transformer {
        &self.decoder
    }

    /// What runs thought passes: the same weights under the adapters for
    /// [`AdapterScope::Thinking`]. The [decoder](Self::decoder) itself, unless an adapter is for one of
    /// the two only.
    #[must_use]
    pub fn thinker(&self) -> &Transformer {
        &self.thinker
    }

    /// Whether the same transformer decodes and thinks.
    pub(super) fn is_of_one_mind(&self) -> bool {
        Arc::ptr_eq(&self.decoder, &self.thinker)
    }

    /// How many blocks the checkpoint has that run in thought passes only.
    #[must_use]
    pub fn thought_layers(&self) -> usize {
        self.thought_layers.as_ref().map_or(0, |layers| layers.len())
    }

    /// The checkpoint's `thought.gate`, `(hidden)`, if it has one. Its sigmoid is the share of the
    /// new state that a thought takes over, channel by channel.
    #[must_use]
    pub fn thought_gate(&self) -> Option<&Tensor> {
        self.thought_gate.as_ref()
    }

    /// The embedding table as [`Codes`] of one decimal digit a coordinate. Made when they are first asked
    /// for, for all clones, and not again when a table changes that is being trained.
    ///
    /// # Errors
    /// As [`Codes::new`].
    pub fn codes(&self) -> Result<&Codes> {
        if let Some(codes) = self.codes.get() {
            return Ok(codes);
        }
        let (decoder, config) = (Arc::clone(&self.decoder), self.decoder.config());
        let size = (config.vocab_size, config.hidden_size);
        let look_up = move |ids: &[u32]| decoder.embed_ids(ids);
        let made = Codes::of(size, Box::new(look_up), Digits::default())?;
        Ok(self.codes.get_or_init(|| made))
    }

    /// Bytes of its matrices by type, those of thought layers included; see
    /// [`Transformer::weight_bytes`].
    #[must_use]
    pub fn weight_bytes(&self) -> BTreeMap<String, usize> {
        let mut bytes = self.decoder.weight_bytes();
        for (kept, count) in self.thought_layers.iter().flat_map(|layers| layers.weight_bytes()) {
            *bytes.entry(kept).or_default() += count;
        }
        bytes
    }

    /// Runs the blocks that the checkpoint has for thought passes only, `(.., hidden)` in and out;
    /// without any, returns `xs`.
    ///
    /// # Errors
    /// As [`Transformer::forward`].
    pub fn forward_thought_layers(
        &self,
        xs: &Tensor,
        batch: &Batch,
        sight: Sight,
    ) -> Result<Tensor> {
        self.run_thought_layers(xs, Pass::uncached(batch, sight).into())
    }

    /// [`forward_thought_layers`](Self::forward_thought_layers) in a pass that can be cancelled.
    pub(super) fn run_thought_layers(
        &self,
        xs: &Tensor,
        context: ForwardContext<'_>,
    ) -> Result<Tensor> {
        match &self.thought_layers {
            Some(layers) => layers.forward(xs, 0..layers.len(), context),
            None => Ok(xs.clone()),
        }
    }

    /// This model with a low-rank adapter that is active where `scope` says. The weights are shared, not
    /// copied, and may be quantised; several adapters add up. A gate that the adapter brings is for
    /// thinking and replaces any other.
    ///
    /// # Errors
    /// As [`Transformer::adapted`].
    pub fn adapted(&self, adapter: &Adapter, scope: AdapterScope) -> Result<Self> {
        let changed = self.changed(scope, |transformer| transformer.adapted(adapter))?;
        let gate = match scope {
            AdapterScope::Decoding => None,
            AdapterScope::Thinking | AdapterScope::Both => adapter.gate_for(&self.decoder)?,
        };
        Ok(Self { thought_gate: gate.or_else(|| self.thought_gate.clone()), ..changed })
    }

    /// This model with an adapter multiplied out; see [`Transformer::merged`].
    ///
    /// # Errors
    /// As [`Transformer::merged`].
    pub fn merged(&self, adapter: &Adapter) -> Result<Self> {
        let changed =
            self.changed(AdapterScope::Both, |transformer| transformer.merged(adapter))?;
        let gate = adapter.gate_for(&self.decoder)?;
        Ok(Self { thought_gate: gate.or_else(|| self.thought_gate.clone()), ..changed })
    }

    /// This model, computed as exactly as `compute` says: what decodes, what thinks, and the thought layers. All
    /// tensors are shared.
    ///
    /// # Errors
    /// None at present.
    pub fn with_compute(&self, compute: Compute) -> Result<Self> {
        let changed =
            self.changed(AdapterScope::Both, |transformer| Ok(transformer.with_compute(compute)))?;
        let thought_layers = self.thought_layers.as_ref().map(|layers| {
            let mut layers = layers.variant();
            layers.set_compute(compute);
            Arc::new(layers)
        });
        Ok(Self { thought_layers, ..changed })
    }

    /// This model with `change` made to what decodes, to what thinks, or to both.
    pub(crate) fn changed(
        &self,
        scope: AdapterScope,
        change: impl Fn(&Transformer) -> Result<Transformer>,
    ) -> Result<Self> {
        let mut changed = self.clone();
        if scope != AdapterScope::Thinking {
            changed.decoder = Arc::new(change(&self.decoder)?);
        }
        changed.thinker = match scope {
            AdapterScope::Both if self.is_of_one_mind() => Arc::clone(&changed.decoder),
            AdapterScope::Both | AdapterScope::Thinking => Arc::new(change(&self.thinker)?),
            AdapterScope::Decoding => Arc::clone(&self.thinker),
        };
        Ok(changed)
    }
}
