//! One pre-norm transformer block.

use std::borrow::Cow;

use candle_core::{DType, Tensor};

use super::attention::Attention;
use super::context::BlockContext;
use super::feed_forward::FeedForward;
use super::linear::Linear;
use super::mlp::SideProjection;
use super::tap::Site;
use super::weights::Weights;
use crate::config::Config;
use crate::error::Result;
use crate::kernels;

/// Attention, then MLP or experts, each after its norm and added to the residual stream.
#[derive(Clone, Debug)]
pub(super) struct Block {
    input_layernorm: RmsNorm,
    self_attn: Attention,
    post_attention_layernorm: RmsNorm,
    feed_forward: FeedForward,
}

impl Block {
    pub(super) fn new(
        config: &Config,
        prefix: &str,
        dtype: DType,
        weights: &mut impl Weights,
    ) -> Result<Self> {
        let name = |part: &str| format!("{prefix}.{part}");
        let after = name("post_attention_layernorm.weight");
        Ok(Self {
            input_layernorm: RmsNorm::new(config, &name("input_layernorm.weight"), dtype, weights)?,
            self_attn: Attention::new(config, prefix, weights)?,
            post_attention_layernorm: RmsNorm::new(config, &after, dtype, weights)?,
            feed_forward: FeedForward::new(config, prefix, weights)?,
        })
    }

    /// `(tokens, hidden) -> (tokens, hidden)`: the residual stream in and out.
    pub(super) fn forward(&self, xs: &Tensor, cx: &mut BlockContext<'_, '_, '_>) -> Result<Tensor> {
        let xs = (xs + self.self_attn.forward(&self.input_layernorm.forward(xs)?, cx)?)?;
        cx.show(Site::AfterAttention, &xs)?;
        &xs + self.feed_forward.forward(&self.feed_forward_input(&xs)?, cx)?
    }

    /// What the MLP or the experts read of the stream after attention, `(tokens, hidden)`.
    pub(super) fn feed_forward_input(&self, xs: &Tensor) -> Result<Tensor> {
        self.post_attention_layernorm.forward(xs)
    }

    /// All of its projections, by the names they have in a checkpoint: `self_attn.q_proj` and so on.
    pub(super) fn projections_mut(
        &mut self,
    ) -> impl Iterator<Item = (Cow<'static, str>, &mut Linear)> {
        let attention = self.self_attn.projections_mut().into_iter();
        attention.map(|(name, it)| (name.into(), it)).chain(self.feed_forward.projections_mut())
    }

    /// Refuses a side signal of a width that it does not read.
    pub(super) fn check_side(&self, width: usize) -> Result<()> {
        self.feed_forward.check_side(width)
    }

    pub(super) fn set_side(&mut self, side: Option<SideProjection>) -> Result<()> {
        self.feed_forward.set_side(side)
    }
}

/// Root-mean-square norm with a learned scale.
#[derive(Clone, Debug)]
pub(super) struct RmsNorm {
    weight: Tensor,
    eps: f64,
}

impl RmsNorm {
    pub(super) fn new(
        config: &Config,
        name: &str,
        dtype: DType,
        weights: &mut impl Weights,
    ) -> Result<Self> {
        let weight = weights.tensor(name, &[config.hidden_size])?.to_dtype(dtype)?;
        Ok(Self { weight, eps: config.rms_norm_eps })
    }

    pub(super) fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        kernels::rms_norm(xs, &self.weight, self.eps)
    }
}
