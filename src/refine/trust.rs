//! How far a nudge may go, and the best point it passed.

use candle_core::{D, DType, Tensor};

use super::Step;
use super::rows::{Thinks, wide};
use crate::batch::{Batch, flat};
use crate::error::{Error, Result};

/// The bound of a nudge that is not given one.
pub(super) fn default_trust() -> f64 {
    0.1
}

/// How far thoughts may move from where a nudge found them. Computes in at least `f32`.
pub(super) struct Trust<'a> {
    /// Where the nudge found them.
    pub(super) start: Tensor,
    /// Their lengths, `(.., 1)`.
    lengths: Tensor,
    ratio: f64,
    thinks: Thinks<'a>,
}

impl<'a> Trust<'a> {
    pub(super) fn new(xs: &Tensor, ratio: f64, step: &Step<'a>) -> Result<Self> {
        step.batch.check(xs)?;
        let start = wide(xs)?;
        let lengths = lengths(&start)?;
        Ok(Self { thinks: Thinks(step.batch), start, lengths, ratio })
    }

    /// The root mean square of each thought: `(.., 1)`.
    pub(super) fn unit(&self) -> Result<Tensor> {
        Ok((&self.lengths / (self.start.dim(D::Minus1)? as f64).sqrt())?)
    }

    /// `x`, with each thought brought back within its bound, and those that do not think back to their
    /// start.
    pub(super) fn hold(&self, x: &Tensor) -> Result<Tensor> {
        const SMALLEST: f64 = f32::MIN_POSITIVE as f64;
        const LARGEST: f64 = f32::MAX as f64;
        // an infinite offset times 0 is NaN; one whose length overflows does not move
        let offset = (x - &self.start)?.clamp(-LARGEST, LARGEST)?;
        let allowed = ((&self.lengths * self.ratio)? / lengths(&offset)?.maximum(SMALLEST)?)?;
        let held = (&self.start + offset.broadcast_mul(&allowed.minimum(1.0)?)?)?;
        self.thinks.or(&held, &self.start)
    }

    /// `gradient` where a token thinks, 0 elsewhere.
    pub(super) fn moving(&self, gradient: &Tensor) -> Result<Tensor> {
        let gradient = gradient.detach().to_dtype(self.start.dtype())?;
        let moving = self.thinks.or(&gradient, &gradient.zeros_like()?)?;
        // 0 for finite numbers, NaN for others
        let zeros = self.thinks.0.sum(&(&moving * 0.0)?)?.to_vec1::<f32>()?;
        match zeros.iter().position(|zero| zero.is_nan()) {
            Some(position) => Err(Error::NotFinite { what: "gradients", position }),
            None => Ok(moving),
        }
    }
}

fn lengths(xs: &Tensor) -> Result<Tensor> {
    Ok(xs.sqr()?.sum_keepdim(D::Minus1)?.sqrt()?)
}

/// The best thoughts so far, for each sequence separately.
pub(super) struct Best {
    pub(super) xs: Tensor,
    losses: Vec<f32>,
}

impl Best {
    /// The better of the best so far and `xs`; of equals, the best so far.
    pub(super) fn of(
        before: Option<Self>,
        xs: &Tensor,
        losses: Vec<f32>,
        batch: &Batch,
    ) -> Result<Self> {
        let Some(before) = before else { return Ok(Self { xs: xs.clone(), losses }) };
        let pairs = losses.iter().zip(&before.losses);
        let better: Vec<f32> = pairs.map(|(new, old)| if new < old { 1.0 } else { 0.0 }).collect();
        let lower = losses.iter().zip(&before.losses).map(|(new, old)| new.min(*old)).collect();
        let better = batch.spread(&better, xs.device())?.to_dtype(DType::U8)?; // (tokens, 1)
        let (new, old) = (flat(xs)?, flat(&before.xs)?);
        let best = better.broadcast_as(new.shape())?.where_cond(&new, &old)?;
        Ok(Self { xs: best.reshape(xs.shape())?, losses: lower })
    }
}
