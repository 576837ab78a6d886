//! One pre-norm transformer block.

use candle_core::{DType, Tensor};

use super::View;
use super::attention::Attention;
use super::kv_cache::KeyValues;
use super::linear::Linear;
use super::mlp::Mlp;
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

    /// `(batch, seq, hidden) -> (batch, seq, hidden)`: the residual stream in and out.
    /// `remember` as in [`Attention::forward`].
    pub(super) fn forward(
        &self,
        xs: &Tensor,
        view: &View,
        remember: impl FnOnce(KeyValues) -> Result<KeyValues>,
    ) -> Result<Tensor> {
        let normed = self.input_layernorm.forward(xs)?;
        let xs = (xs + self.self_attn.forward(&normed, view, remember)?)?;
        &xs + self.mlp.forward(&self.post_attention_layernorm.forward(&xs)?)?
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

    /// Who attends to whom in this block, see [`Attention::shares`].
    pub(super) fn attention_shares(&self, xs: &Tensor, view: &View) -> Result<Tensor> {
        self.self_attn.shares(&self.input_layernorm.forward(xs)?, view)
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
