//! How far thoughts moved, and how alike they are.

use candle_core::{D, DType, Tensor};

use crate::error::Result;
use crate::model::Layout;
use crate::refine::directions;

/// One number per row of the batch and token, padding left out.
pub(super) type PerToken = Vec<Vec<f32>>;

/// `‖z' - z‖ / ‖z‖` of every thought.
pub(super) fn drift(before: &Tensor, after: &Tensor, layout: &Layout) -> Result<PerToken> {
    // Keeps the quotient finite; overflow shows in it all the same.
    let smallest = f64::from(f32::MIN_POSITIVE);
    let ratio = (norms(&(after - before)?)? / norms(before)?.maximum(smallest)?)?;
    of_tokens(&ratio, layout)
}

/// The cosine of every thought with the one in the same place.
pub(super) fn cosine(a: &Tensor, b: &Tensor, layout: &Layout) -> Result<PerToken> {
    of_tokens(&(units(a)? * units(b)?)?.sum(D::Minus1)?, layout)
}

/// The cosine of every thought with every other: `(batch, seq, hidden) -> (batch, seq, seq)`.
pub(super) fn similarity(xs: &Tensor) -> Result<Tensor> {
    let units = units(xs)?;
    Ok(units.matmul(&units.t()?)?)
}

/// The length of every thought: `(batch, seq, hidden) -> (batch, seq)` in `f32`. Taken in every
/// pass, so the short way: where this overflows, so does a norm of the model.
pub(super) fn norms(xs: &Tensor) -> Result<Tensor> {
    Ok(xs.detach().to_dtype(DType::F32)?.sqr()?.sum(D::Minus1)?.sqrt()?)
}

/// Every thought at length 1, in `f32`.
fn units(xs: &Tensor) -> Result<Tensor> {
    Ok(directions(&xs.detach().to_dtype(DType::F32)?)?.0)
}

/// `(batch, seq)` as numbers.
pub(super) fn of_tokens(values: &Tensor, layout: &Layout) -> Result<PerToken> {
    let rows = values.to_vec2::<f32>()?.into_iter().zip(layout.starts());
    Ok(rows.map(|(row, start)| row.get(start..).unwrap_or(&[]).to_vec()).collect())
}

/// The mean of some numbers; 0 of none.
pub(super) fn mean<'a>(values: impl IntoIterator<Item = &'a f32>) -> f64 {
    let (mut sum, mut count) = (0.0, 0usize);
    for &value in values {
        (sum, count) = (sum + f64::from(value), count + 1);
    }
    sum / count.max(1) as f64
}
