//! Refinement: what becomes of the thoughts after each pass.
//!
//! A thought pass reads the thoughts `z` in both directions and gives `h`; a [`Refine`] makes the
//! next `z` of the two. `z` is the residual stream that enters the first layer of the span.

mod interpolate;

use std::fmt::Debug;

use candle_core::Tensor;

use crate::error::Result;

pub use self::interpolate::Interpolate;

/// What a refinement is told of the pass it refines.
#[derive(Clone, Copy, Debug)]
pub struct Step<'a> {
    /// The thoughts that went into the pass, `(batch, seq, hidden)`.
    pub z: &'a Tensor,
    /// Which pass this is, from 0.
    pub index: usize,
    /// How many passes there will be; at least 1.
    pub passes: usize,
}

/// Turns what came out of a thought pass into the thoughts that go into the next.
///
/// ```
/// use candle_core::Tensor;
/// use hybrid_attention::{Result, refine::{Refine, Step}};
///
/// /// Moves less with every pass: `z + (h - z) / (index + 2)`.
/// #[derive(Debug)]
/// struct Settle;
///
/// impl Refine for Settle {
///     fn refine(&self, h: &Tensor, step: &Step<'_>) -> Result<Tensor> {
///         let share = 1.0 / (step.index + 2) as f64;
///         Ok((step.z + ((h - step.z)? * share)?)?)
///     }
/// }
/// # use candle_core::Device;
/// # fn main() -> Result<()> {
/// let (z, h) = (Tensor::new(&[[[0f32]]], &Device::Cpu)?, Tensor::new(&[[[6f32]]], &Device::Cpu)?);
/// let next = Settle.refine(&h, &Step { z: &z, index: 1, passes: 3 })?;
/// assert_eq!(next.to_vec3::<f32>()?, [[[2.0]]]);
/// # Ok(())
/// # }
/// ```
pub trait Refine: Debug + Send + Sync {
    /// The next thoughts, from `h`, the stream that left the span: both `(batch, seq, hidden)`.
    ///
    /// # Errors
    /// When the computation fails; the thought loop ends with that error.
    fn refine(&self, h: &Tensor, step: &Step<'_>) -> Result<Tensor>;

    /// Checks the parameters before any pass is run.
    ///
    /// # Errors
    /// [`Error::Parameter`](crate::Error::Parameter) for one outside its range.
    fn validate(&self) -> Result<()> {
        Ok(())
    }
}
