//! What follows attention in a block: one MLP, or a mixture of them.

use std::borrow::Cow;

use candle_core::Tensor;

use super::context::BlockContext;
use super::experts::Mixture;
use super::linear::Linear;
use super::mlp::{Mlp, SideProjection};
use super::weights::Weights;
use crate::config::Config;
use crate::error::{Error, Result};
use crate::kernels::Fresh;

const MLP: [&str; 3] = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"];

#[derive(Clone, Debug)]
pub(super) enum FeedForward {
    Mlp(Box<Mlp>),
    Experts(Mixture),
}

impl FeedForward {
    pub(super) fn new(config: &Config, prefix: &str, weights: &mut impl Weights) -> Result<Self> {
        match &config.experts {
            None => Ok(Self::Mlp(Box::new(Mlp::new(config, prefix, MLP, weights)?))),
            Some(of) => Ok(Self::Experts(Mixture::new(config, of, prefix, weights)?)),
        }
    }

    /// `(tokens, hidden) -> (tokens, hidden)`
    pub(super) fn forward(&self, xs: &Tensor, cx: &BlockContext<'_, '_, '_>) -> Result<Fresh> {
        match self {
            Self::Mlp(mlp) => mlp.forward(xs, cx.side()?.as_ref(), 0),
            Self::Experts(mixture) => mixture.forward(xs),
        }
    }

    /// By their names in a checkpoint.
    pub(super) fn projections_mut(
        &mut self,
    ) -> Box<dyn Iterator<Item = (Cow<'static, str>, &mut Linear)> + '_> {
        match self {
            Self::Mlp(mlp) => Box::new(MLP.map(Cow::from).into_iter().zip(mlp.projections_mut())),
            Self::Experts(mixture) => Box::new(mixture.projections_mut()),
        }
    }

    /// Refuses a side signal of a width that is not read.
    pub(super) fn check_side(&self, width: usize) -> Result<()> {
        match self {
            Self::Mlp(mlp) => mlp.side_columns(width).map(|_| ()),
            Self::Experts(_) => Err(reads_no_side()),
        }
    }

    pub(super) fn set_side(&mut self, side: Option<SideProjection>) -> Result<()> {
        match self {
            Self::Mlp(mlp) => mlp.set_side(side),
            Self::Experts(_) if side.is_none() => Ok(()),
            Self::Experts(_) => Err(reads_no_side()),
        }
    }
}

/// A side projection is columns of one `gate_proj` and one `up_proj`.
fn reads_no_side() -> Error {
    Error::unsupported("side signal", "for a mixture of experts")
}
