//! How far thoughts moved, and how alike they are.

use candle_core::{D, DType, Tensor};

use crate::error::Result;
use crate::model::Batch;

/// For each sequence, one number per token.
pub(super) type PerToken = Vec<Vec<f32>>;

/// `‖z' - z‖ / ‖z‖` of every thought. One that was zero and no longer is
/// counts as changed by 1.
pub(super) fn drift(before: &Tensor, after: &Tensor, batch: &Batch) -> Result<PerToken> {
    per_token([before, after], batch, |[old, new]| {
        let change = old.iter().zip(new).map(|(&old, &new)| f64::from(new) - f64::from(old));
        let change = change.map(|change| change * change).sum::<f64>().sqrt();
        match length(old) {
            0.0 if change > 0.0 => 1.0,
            0.0 => change, // 0, or NaN
            length => change / length,
        }
    })
}

/// The cosine of every thought with the one in the same place. Two zero thoughts are alike, with a
/// cosine of 1; a zero thought is unlike any other, with 0.
pub(super) fn cosine(a: &Tensor, b: &Tensor, batch: &Batch) -> Result<PerToken> {
    per_token([a, b], batch, |[a, b]| match (length(a), length(b)) {
        (0.0, 0.0) => 1.0,
        (0.0, _) | (_, 0.0) => 0.0,
        (of_a, of_b) => {
            let dot: f64 = a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum();
            (dot / of_a / of_b).clamp(-1.0, 1.0)
        }
    })
}

/// The length of every thought.
pub(super) fn norms(z: &Tensor, batch: &Batch) -> Result<PerToken> {
    per_token([z], batch, |[z]| length(z))
}

/// The mean of some numbers; 0 if there are none.
pub(super) fn mean<'a>(values: impl IntoIterator<Item = &'a f32>) -> f64 {
    let (mut sum, mut count) = (0.0, 0usize);
    for &value in values {
        (sum, count) = (sum + f64::from(value), count + 1);
    }
    sum / count.max(1) as f64
}

/// One number per row, `(tokens)`, grouped by sequence.
pub(super) fn of_sequences(values: &[f32], batch: &Batch) -> PerToken {
    batch.all_rows().map(|rows| values.get(rows).unwrap_or(&[]).to_vec()).collect()
}

/// `measure` of every token's thoughts. In `f64`, where no square of an `f32` overflows or underflows,
/// and on the host: one pass over memory, where tensor operations would take several.
fn per_token<const N: usize>(
    thoughts: [&Tensor; N],
    batch: &Batch,
    measure: impl Fn([&[f32]; N]) -> f64,
) -> Result<PerToken> {
    let mut values = [const { Vec::new() }; N];
    let mut hidden = 1;
    for (values, thoughts) in values.iter_mut().zip(thoughts) {
        batch.check(thoughts)?;
        hidden = thoughts.dim(D::Minus1)?.max(1);
        *values = thoughts.flatten_all()?.to_dtype(DType::F32)?.to_vec1::<f32>()?;
    }
    let token = |row: usize| {
        let range = row * hidden..(row + 1) * hidden;
        measure(values.each_ref().map(|of| of.get(range.clone()).unwrap_or(&[]))) as f32
    };
    Ok(batch.all_rows().map(|rows| rows.map(token).collect()).collect())
}

fn length(z: &[f32]) -> f64 {
    z.iter().map(|&z| f64::from(z) * f64::from(z)).sum::<f64>().sqrt()
}
