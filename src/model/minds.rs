//! One set of weights, two minds: what runs thought passes may differ from what decodes, by its
//! low-rank adapters and by nothing else.

use candle_core::Tensor;

use super::{Linear, Transformer, next_id};
use crate::error::Result;

/// When an adapter is active.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Mind {
    /// In thought passes, in the last run over the thoughts that `KeyValue` and `Mixed` hand over, and
    /// when a text is read in both directions to be embedded.
    Thinking,
    /// Whenever text is read causally: what comes before the span, the hand-off, every new token.
    Decoding,
    /// Always.
    #[default]
    Both,
}

impl Transformer {
    /// What runs thought passes: the same weights under the adapters for [`Mind::Thinking`]. This
    /// very transformer, unless an adapter is for one mind only.
    #[must_use]
    pub fn thinker(&self) -> &Self {
        self.thinker.as_deref().unwrap_or(self)
    }

    /// A transformer of the same tensors, of which `mind` is changed by `change`.
    pub(crate) fn changed(
        &self,
        mind: Mind,
        change: impl Fn(&mut Self) -> Result<()>,
    ) -> Result<Self> {
        let mut decoder = self.sharing();
        let mut thinker = match (&self.thinker, mind) {
            (None, Mind::Both) => None,
            _ => Some(Box::new(self.thinker().sharing())),
        };
        if mind != Mind::Thinking {
            change(&mut decoder)?;
        }
        if let Some(thinker) = &mut thinker
            && mind != Mind::Decoding
        {
            change(thinker)?;
        }
        decoder.thinker = thinker;
        Ok(decoder)
    }

    /// The same tensors under an id of its own, because its keys and values will be others; without
    /// a thinker.
    fn sharing(&self) -> Self {
        Self {
            id: next_id(),
            config: self.config.clone(),
            embed_tokens: self.embed_tokens.clone(),
            layers: self.layers.clone(),
            thought_layers: self.thought_layers.clone(),
            thought_gate: self.thought_gate.clone(),
            norm: self.norm.clone(),
            lm_head: self.lm_head.clone(),
            rope: self.rope.clone(),
            dtype: self.dtype,
            device: self.device.clone(),
            thinker: None,
        }
    }

    /// The projection called `model.layers.0.self_attn.q_proj` or the like, or `lm_head`.
    pub(crate) fn projection_mut(&mut self, name: &str) -> Option<&mut Linear> {
        if name == "lm_head" {
            return Some(&mut self.lm_head);
        }
        let (layer, projection) = name.strip_prefix("model.layers.")?.split_once('.')?;
        let index: usize = layer.parse().ok()?;
        if index.to_string() != layer {
            return None; // 00 would be the same projection under a second name
        }
        self.layers.get_mut(index)?.projection_mut(projection)
    }

    /// Replaces what a checkpoint has learned for its thought passes.
    pub(crate) fn set_thought_gate(&mut self, gate: Tensor) {
        self.thought_gate = Some(gate);
    }
}
