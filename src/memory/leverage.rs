//! Statistical leverage: how far a row of a matrix is from being made up of the others.

use candle_core::Tensor;

use crate::error::Result;
use crate::statistics::{Cholesky, dot};

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
    let ridged = gram.iter().enumerate().map(|(i, row)| {
        let own = |(j, value): (usize, &f32)| f64::from(*value) + if i == j { ridge } else { 0.0 };
        row.iter().enumerate().map(own).collect()
    });
    let lower = Cholesky::of(&ridged.collect::<Vec<_>>(), ridge);
    let of_row = |row: Vec<f32>| {
        let y = lower.halfway(row.into_iter().map(f64::from));
        dot(&y, &y) as f32
    };
    Ok(rows.to_vec2::<f32>()?.into_iter().map(of_row).collect())
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
