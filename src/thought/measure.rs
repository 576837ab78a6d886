//! How far thoughts moved, and how alike they are.

use candle_core::{D, DType, Tensor};

use crate::error::Result;
use crate::model::Layout;
use crate::refine::directions;

/// `‖z' - z‖ / ‖z‖` of every thought: per row of the batch, per token. A thought that was zero and no
/// longer is has changed by 1: all that it is.
pub(super) fn drift(before: &Tensor, after: &Tensor, layout: &Layout) -> Result<Vec<Vec<f32>>> {
    let change = (after.to_dtype(DType::F32)? - before.to_dtype(DType::F32)?)?;
    let mut drift = of_tokens(&norms(&change)?, layout)?;
    let before = of_tokens(&norms(before)?, layout)?;
    for (change, length) in drift.iter_mut().flatten().zip(before.into_iter().flatten()) {
        if length > 0.0 {
            *change /= length;
        } else if *change > 0.0 {
            *change = 1.0;
        }
    }
    Ok(drift)
}

/// The cosine of every thought with the one in the same place: per row of the batch, per token. Two
/// thoughts of zeros are alike, with a cosine of 1; one of them is unlike any other, with 0.
pub(super) fn cosine(a: &Tensor, b: &Tensor, layout: &Layout) -> Result<Vec<Vec<f32>>> {
    let (a, b) = (directions(&a.to_dtype(DType::F32)?)?, directions(&b.to_dtype(DType::F32)?)?);
    let cosine = (a.0 * b.0)?.sum(D::Minus1)?; // (batch, seq)
    let zeros = (a.1.eq(0f32)? * b.1.eq(0f32)?)?.squeeze(D::Minus1)?;
    of_tokens(&(cosine + zeros.to_dtype(DType::F32)?)?.clamp(-1f32, 1f32)?, layout)
}

/// The cosine of every thought with every other: `(batch, seq, hidden) -> (batch, seq, seq)`.
pub(super) fn similarity(xs: &Tensor) -> Result<Tensor> {
    let (directions, _) = directions(&xs.to_dtype(DType::F32)?)?;
    Ok(directions.matmul(&directions.t()?)?.clamp(-1f32, 1f32)?)
}

/// The length of every thought: `(batch, seq, hidden) -> (batch, seq)` in `f32`.
pub(super) fn norms(xs: &Tensor) -> Result<Tensor> {
    let (_, lengths) = directions(&xs.to_dtype(DType::F32)?)?; // (batch, seq, 1)
    Ok(lengths.squeeze(D::Minus1)?)
}

/// `(batch, seq)` as numbers per row of the batch and token, padding left out.
pub(super) fn of_tokens(values: &Tensor, layout: &Layout) -> Result<Vec<Vec<f32>>> {
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
