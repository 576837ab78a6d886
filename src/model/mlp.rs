//! The gated feed-forward half of a block (SwiGLU, Shazeer 2020).

use std::ops::Range;

use candle_core::Tensor;

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
    /// Its weights are `{prefix}.{name}` with these names for gate, up and down.
    pub(super) fn new(
        config: &Config,
        prefix: &str,
        [gate, up, down]: [&str; 3],
        weights: &mut impl Weights,
    ) -> Result<Self> {
        let mut linear = |name| projection(weights, config, prefix, name);
        Ok(Self {
            gate_proj: linear(gate)?,
            up_proj: linear(up)?,
            down_proj: linear(down)?,
            side: None,
        })
    }

    /// Gate, up and down.
    pub(super) fn projections_mut(&mut self) -> [&mut Linear; 3] {
        [&mut self.gate_proj, &mut self.up_proj, &mut self.down_proj]
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

    /// `(tokens, hidden) -> (tokens, hidden)`; `all`, unless 0, is how many tokens there are with those that
    /// go elsewhere, and that it does not matter to the last bit how many do. A long text runs piece by piece, because the intermediate activations are several times as wide.
    pub(super) fn forward(&self, xs: &Tensor, side: Option<&Tensor>, all: usize) -> Result<Fresh> {
        let tokens = xs.dim(0)?;
        if tokens <= TOKENS_AT_ONCE || xs.track_op() {
            return self.piece(xs, side, all);
        }
        let pieces = pieces(tokens, TOKENS_AT_ONCE).map(|rows| {
            let some = |of: &Tensor| of.narrow(0, rows.start, rows.len())?.contiguous();
            self.piece(&some(xs)?, side.map(some).transpose()?.as_ref(), all)
        });
        Fresh::cat(pieces.collect::<Result<Vec<_>>>()?, 0)
    }

    fn piece(&self, xs: &Tensor, side: Option<&Tensor>, all: usize) -> Result<Fresh> {
        let input = Input::among(all, xs, &[&self.gate_proj, &self.up_proj].map(Linear::weight))?;
        let (gate, up) =
            rayon::join(|| self.gate_proj.times(&input), || self.up_proj.times(&input));
        let (mut gate, mut up) = (gate?, up?); // (tokens, intermediate)
        if let Some(side) = side {
            let columns = self.side_columns(side.dim(1)?)?;
            let input = input.with(side, &[&columns.gate, &columns.up].map(Linear::weight))?;
            gate = (gate + columns.gate.times(&input)?)?;
            up = (up + columns.up.times(&input)?)?;
        }
        let inner = kernels::swiglu(gate, up.tensor())?;
        self.down_proj.times(&input.with(inner.tensor(), &[self.down_proj.weight()])?)
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

/// So many rows in pieces of at most `most`, all about equal: a last piece of only a few rows would be
/// rounded as few rows are.
pub(super) fn pieces(rows: usize, most: usize) -> impl Iterator<Item = Range<usize>> {
    let step = rows.div_ceil(rows.div_ceil(most).max(1)).max(1);
    (0..rows).step_by(step).map(move |start| start..rows.min(start + step))
}
