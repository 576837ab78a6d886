//! Statistical leverage: how far a row of a matrix is from being made up of the others.

use candle_core::Tensor;

use crate::error::Result;

/// Added to the diagonal, as a share of its mean: keys may lie in fewer directions than they have numbers.
const RIDGE: f64 = 1e-4;

/// The leverage of each row of `rows`, `(n, width)`: `x_i (Xᵀ X + r)⁻¹ x_iᵀ`, with a small ridge `r`. Between 0
/// and 1; 1 for a row that no others can make up, and in the sum at most the width.
///
/// With `L Lᵀ = Xᵀ X + r` (Cholesky), that is the squared length of the solution `y` of `L y = x_i`.
pub(super) fn leverage(rows: &Tensor) -> Result<Vec<f32>> {
    let gram = rows.t()?.matmul(rows)?.to_vec2::<f32>()?; // (width, width)
    let width = gram.len();
    let trace: f64 =
        gram.iter().enumerate().filter_map(|(i, row)| row.get(i)).map(|v| f64::from(*v)).sum();
    let ridge = RIDGE * trace / width.max(1) as f64 + f64::MIN_POSITIVE;
    let mut lower: Vec<Vec<f64>> = Vec::with_capacity(width);
    for (i, gram) in gram.iter().enumerate() {
        // row i of L, from the columns before it
        let mut row = Vec::with_capacity(i + 1);
        for (j, value) in gram.iter().take(i).enumerate() {
            let above = lower.get(j).map_or(&[][..], Vec::as_slice);
            let diagonal = above.last().copied().unwrap_or(1.0);
            row.push((f64::from(*value) - dot(&row, above)) / diagonal);
        }
        let own = gram.get(i).map_or(0.0, |value| f64::from(*value)) + ridge - dot(&row, &row);
        row.push(own.max(ridge).sqrt());
        lower.push(row);
    }
    let of_row = |row: Vec<f32>| {
        let mut y: Vec<f64> = Vec::with_capacity(width);
        for (value, lower) in row.iter().zip(&lower) {
            let diagonal = lower.last().copied().unwrap_or(1.0);
            y.push((f64::from(*value) - dot(lower, &y)) / diagonal);
        }
        dot(&y, &y) as f32
    };
    Ok(rows.to_vec2::<f32>()?.into_iter().map(of_row).collect())
}

/// Over as many numbers as the shorter one has.
fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Tensor};

    use super::leverage;
    use crate::error::Result;

    #[test]
    fn rows_that_nothing_else_makes_up_have_all_of_it() -> Result<()> {
        // Two rows in one direction share it, a third has its own; the ridge takes a little.
        let rows = [[1f32, 0.0, 0.0], [1.0, 0.0, 0.0], [0.0, 2.0, 0.0]];
        let found = leverage(&Tensor::new(&rows, &Device::Cpu)?)?;
        for (found, right) in found.iter().zip([0.5, 0.5, 1.0]) {
            assert!((found - right).abs() < 1e-3, "{found} {right}");
        }
        Ok(())
    }

    /// The leverages of a matrix add up to its rank, and a row stays the same under any change of basis.
    #[test]
    fn they_add_up_to_the_rank_whatever_the_basis() -> Result<()> {
        let rows = Tensor::randn(0f32, 1.0, (40, 6), &Device::Cpu)?;
        let found = leverage(&rows)?;
        assert!((found.iter().sum::<f32>() - 6.0).abs() < 1e-2, "{found:?}");
        let basis = (Tensor::randn(0f32, 0.2, (6, 6), &Device::Cpu)?
            + Tensor::eye(6, rows.dtype(), &Device::Cpu)?)?;
        for (a, b) in found.iter().zip(leverage(&rows.matmul(&basis)?)?) {
            assert!((a - b).abs() < 1e-2, "{a} {b}");
        }
        Ok(())
    }
}
