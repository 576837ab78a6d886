//! One pre-norm transformer block.

use candle_core::{DType, Tensor};

use super::attention::Attention;
use super::context::BlockContext;
use super::linear::Linear;
use super::mlp::{Mlp, SideProjection};
use super::tap::Site;
use super::weights::Weights;
use crate::config::Config;
use crate::error::Result;
use crate::kernels;

/// Attention, then MLP, each behind its norm and added to the residual stream.
#[derive(Clone, Debug)]
pub(super) struct Block {
    input_layernorm: RmsNorm,
    self_attn: Attention,
    post_attention_layernorm: RmsNorm,
    mlp: Mlp,
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
            self_attn: Attention::new(config, &name("self_attn"), weights)?,
            post_attention_layernorm: RmsNorm::new(config, &after, dtype, weights)?,
            mlp: Mlp::new(config, &name("mlp"), weights)?,
        })
    }

    /// `(tokens, hidden) -> (tokens, hidden)`: the residual stream in and out.
    pub(super) fn forward(&self, xs: &Tensor, cx: &mut BlockContext<'_, '_, '_>) -> Result<Tensor> {
        cx.show(Site::Input, xs)?;
        let xs = (xs + self.self_attn.forward(&self.input_layernorm.forward(xs)?, cx)?)?;
        cx.show(Site::AfterAttention, &xs)?;
        let xs = (&xs + self.mlp.forward(&self.post_attention_layernorm.forward(&xs)?, cx)?)?;
        cx.show(Site::Output, &xs)?;
        Ok(xs)
    }

    /// All of its projections.
    pub(super) fn projections(&self) -> impl Iterator<Item = &Linear> {
        self.self_attn.projections().into_iter().chain(self.mlp.projections())
    }

    /// The projection called `self_attn.q_proj` or the like.
    pub(super) fn projection_mut(&mut self, name: &str) -> Option<&mut Linear> {
        match name.split_once('.')? {
            ("self_attn", name) => self.self_attn.projection_mut(name),
            ("mlp", name) => self.mlp.projection_mut(name),
            _ => None,
        }
    }

    pub(super) fn set_side(&mut self, side: Option<SideProjection>) -> Result<()> {
        self.mlp.set_side(side)
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
