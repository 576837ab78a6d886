//! The gated feed-forward half of a block (SwiGLU, Shazeer 2020).

use candle_core::Tensor;

use super::linear::Linear;
use super::weights::Weights;
use crate::config::Config;
use crate::error::Result;
use crate::kernels::{Fresh, Input, swiglu};

/// Tokens that are widened at a time; enough that reading the weights again costs nothing.
const TOKENS_AT_ONCE: usize = 1024;

/// `down(silu(gate(x)) · up(x))`
#[derive(Clone, Debug)]
pub(super) struct Mlp {
    gate_proj: Linear,
    up_proj: Linear,
    down_proj: Linear,
}

impl Mlp {
    pub(super) fn new(config: &Config, prefix: &str, weights: &mut impl Weights) -> Result<Self> {
        let (hidden, inner) = (config.hidden_size, config.intermediate_size);
        let mut linear =
            |name: &str, out, input| weights.linear(&format!("{prefix}.{name}.weight"), out, input);
        Ok(Self {
            gate_proj: linear("gate_proj", inner, hidden)?,
            up_proj: linear("up_proj", inner, hidden)?,
            down_proj: linear("down_proj", hidden, inner)?,
        })
    }

    pub(super) fn projections(&self) -> [&Linear; 3] {
        [&self.gate_proj, &self.up_proj, &self.down_proj]
    }

    pub(super) fn projection_mut(&mut self, name: &str) -> Option<&mut Linear> {
        match name {
            "gate_proj" => Some(&mut self.gate_proj),
            "up_proj" => Some(&mut self.up_proj),
            "down_proj" => Some(&mut self.down_proj),
            _ => None,
        }
    }

    /// `(batch, seq, hidden) -> (batch, seq, hidden)`. A long text goes piece by piece, because what
    /// stands inside is several times as wide.
    pub(super) fn forward(&self, xs: &Tensor) -> Result<Fresh> {
        let (batch, seq, _) = xs.dims3()?;
        let step = (TOKENS_AT_ONCE / batch).max(1);
        if seq <= step || xs.track_op() {
            return self.forward_whole(xs);
        }
        let pieces = (0..seq).step_by(step).map(|start| {
            let piece = xs.narrow(1, start, step.min(seq - start))?.contiguous()?;
            self.forward_whole(&piece)
        });
        Fresh::cat(pieces.collect::<Result<Vec<_>>>()?, 1)
    }

    fn forward_whole(&self, xs: &Tensor) -> Result<Fresh> {
        let input = Input::new(xs, &[self.gate_proj.weight(), self.up_proj.weight()])?;
        let (gate, up) =
            rayon::join(|| self.gate_proj.times(&input), || self.up_proj.times(&input));
        self.down_proj.product(swiglu(gate?, up?.tensor())?.tensor()) // (batch, seq, intermediate) inside
    }
}
