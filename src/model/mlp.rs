//! The gated feed-forward half of a block (SwiGLU, Shazeer 2020).

use candle_core::Tensor;

use super::context::BlockContext;
use super::linear::Linear;
use super::weights::{Weights, projection};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::kernels::{self, Fresh, Input};

/// Tokens that run at a time; enough that reading the weights again costs nothing.
const TOKENS_AT_ONCE: usize = 1024;

/// `down(silu(gate(x)) · up(x))`, where `x` is the normed residual stream, or with a side signal
/// `[x ; side]`.
#[derive(Clone, Debug)]
pub(super) struct Mlp {
    gate_proj: Linear,
    up_proj: Linear,
    down_proj: Linear,
    side: Option<SideProjection>,
}

/// The columns of an MLP's projections that read a [side signal](super::SideSignal): with
/// `[W U]` as the wide projection, `[W U] [x ; side] = W x + U side`, so that the weights of the
/// checkpoint stay as they are, quantised or not, and a `U` of zeros changes nothing.
#[derive(Clone, Debug)]
pub struct SideProjection {
    /// Added to `gate_proj`: `(intermediate, width)`
    pub gate: Linear,
    /// Added to `up_proj`: `(intermediate, width)`
    pub up: Linear,
}

impl Mlp {
    /// Its weights are `{prefix}.mlp.*`.
    pub(super) fn new(config: &Config, prefix: &str, weights: &mut impl Weights) -> Result<Self> {
        let mut linear = |name| projection(weights, config, prefix, name);
        Ok(Self {
            gate_proj: linear("mlp.gate_proj")?,
            up_proj: linear("mlp.up_proj")?,
            down_proj: linear("mlp.down_proj")?,
            side: None,
        })
    }

    /// By their names in a checkpoint.
    pub(super) fn projections_mut(&mut self) -> [(&'static str, &mut Linear); 3] {
        [
            ("mlp.gate_proj", &mut self.gate_proj),
            ("mlp.up_proj", &mut self.up_proj),
            ("mlp.down_proj", &mut self.down_proj),
        ]
    }

    pub(super) fn set_side(&mut self, side: Option<SideProjection>) -> Result<()> {
        if let Some(SideProjection { gate, up }) = &side {
            let inner = self.gate_proj.shape().0;
            if gate.shape() != up.shape() || gate.shape().0 != inner {
                let expected = format!("gate and up of one shape ({inner}, width)");
                let got = format!("{:?} and {:?}", gate.shape(), up.shape());
                return Err(Error::parameter("side projection", expected, got));
            }
        }
        self.side = side;
        Ok(())
    }

    /// `(tokens, hidden) -> (tokens, hidden)`. A long text runs piece by piece, because the intermediate
    /// activations are several times as wide.
    pub(super) fn forward(&self, xs: &Tensor, cx: &BlockContext<'_, '_, '_>) -> Result<Fresh> {
        let (tokens, side) = (xs.dim(0)?, cx.side()?);
        if tokens <= TOKENS_AT_ONCE || xs.track_op() {
            return self.piece(xs, side.as_ref());
        }
        // Pieces of about equal size: a last piece of only a few rows would be rounded as few rows are.
        let step = tokens.div_ceil(tokens.div_ceil(TOKENS_AT_ONCE));
        let pieces = (0..tokens).step_by(step).map(|start| {
            let some = |of: &Tensor| -> Result<Tensor> {
                Ok(of.narrow(0, start, step.min(tokens - start))?.contiguous()?)
            };
            let side = side.as_ref().map(some).transpose()?;
            self.piece(&some(xs)?, side.as_ref())
        });
        Fresh::cat(pieces.collect::<Result<Vec<_>>>()?, 0)
    }

    fn piece(&self, xs: &Tensor, side: Option<&Tensor>) -> Result<Fresh> {
        let input = Input::new(xs, &[&self.gate_proj, &self.up_proj].map(Linear::weight))?;
        let (gate, up) =
            rayon::join(|| self.gate_proj.times(&input), || self.up_proj.times(&input));
        let (mut gate, mut up) = (gate?, up?); // (tokens, intermediate)
        if let Some(side) = side {
            let columns = self.side_columns(side.dim(1)?)?;
            let input = Input::new(side, &[&columns.gate, &columns.up].map(Linear::weight))?;
            gate = (gate + columns.gate.times(&input)?)?;
            up = (up + columns.up.times(&input)?)?;
        }
        self.down_proj.product(kernels::swiglu(gate, up.tensor())?.tensor())
    }

    /// The columns that read a signal of this width.
    pub(super) fn side_columns(&self, width: usize) -> Result<&SideProjection> {
        let expected = match &self.side {
            Some(columns) if columns.gate.shape().1 == width => return Ok(columns),
            Some(columns) => format!("a width of {}", columns.gate.shape().1),
            None => "none for a layer without a side projection".to_string(),
        };
        Err(Error::parameter("side signal", expected, format!("a width of {width}")))
    }
}
