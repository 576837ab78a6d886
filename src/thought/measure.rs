//! How far thoughts moved, and how alike they are.

use candle_core::{D, DType, Tensor};

use crate::error::Result;
use crate::model::Layout;

/// One number per row of the batch and token, padding left out.
pub(super) type PerToken = Vec<Vec<f32>>;

/// Keeps quotients of lengths finite.
const SMALLEST: f64 = f32::MIN_POSITIVE as f64;

/// `‖z' - z‖ / ‖z‖` of every thought: per row of the batch, per token.
pub(super) fn drift(before: &Tensor, after: &Tensor, layout: &Layout) -> Result<PerToken> {
    let ratio = (norms(&(after - before)?)? / norms(before)?.maximum(SMALLEST)?)?;
    of_tokens(&ratio, layout)
}

/// The cosine of every thought with the one in the same place: per row of the batch, per token.
pub(super) fn cosine(a: &Tensor, b: &Tensor, layout: &Layout) -> Result<PerToken> {
    let (a32, b32) = (a.to_dtype(DType::F32)?, b.to_dtype(DType::F32)?);
    let dots = (&a32 * &b32)?.sum(D::Minus1)?; // (batch, seq)
    let lengths = (norms(a)?.maximum(SMALLEST)? * norms(b)?.maximum(SMALLEST)?)?;
    of_tokens(&(dots / lengths)?, layout)
}

/// The cosine of every thought with every other: `(batch, seq, hidden) -> (batch, seq, seq)`.
pub(super) fn similarity(xs: &Tensor) -> Result<Tensor> {
    let lengths = norms(xs)?.maximum(SMALLEST)?.unsqueeze(D::Minus1)?; // (batch, seq, 1)
    let directions = xs.to_dtype(DType::F32)?.broadcast_div(&lengths)?;
    Ok(directions.matmul(&directions.t()?)?)
}

/// The length of every thought: `(batch, seq, hidden) -> (batch, seq)` in `f32`.
pub(super) fn norms(xs: &Tensor) -> Result<Tensor> {
    Ok(xs.to_dtype(DType::F32)?.sqr()?.sum(D::Minus1)?.sqrt()?)
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
