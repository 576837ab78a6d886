//! Ridge regression of many numbers on many, from few examples: in as many dimensions as there are examples.

use candle_core::{D, DType, Device, Tensor};

use super::solve::Cholesky;
use crate::error::Result;

/// Numbers of all examples, `(examples, columns)` in `f64`, with the mean of each column taken off and its
/// spread divided out.
#[derive(Clone, Debug)]
pub(super) struct Standard {
    pub(super) values: Tensor,
    /// `(columns)`
    pub(super) means: Tensor,
    /// `(columns)`: 1 for a column that is the same in all examples.
    pub(super) spreads: Tensor,
}

impl Standard {
    pub(super) fn of(values: &Tensor) -> Result<Self> {
        let means = values.mean(0)?;
        let centred = values.broadcast_sub(&means)?;
        let spreads = centred.sqr()?.mean(0)?.sqrt()?;
        let constant = spreads.le(&(means.abs()? * 1e-9)?)?.to_dtype(DType::F64)?;
        let constant = constant.maximum(&spreads.eq(0.0)?.to_dtype(DType::F64)?)?;
        let kept = constant.affine(-1.0, 1.0)?;
        let spreads = ((spreads * &kept)? + constant)?;
        let values = centred.broadcast_mul(&kept)?.broadcast_div(&spreads)?;
        Ok(Self { values, means, spreads })
    }

    /// Others, in the same units.
    pub(super) fn apply(&self, values: &Tensor) -> Result<Tensor> {
        Ok(values.broadcast_sub(&self.means)?.broadcast_div(&self.spreads)?)
    }
}

/// `X Xᵀ`, `(examples, examples)`.
pub(super) fn kernel(x: &Standard) -> Result<Tensor> {
    Ok(x.values.matmul(&x.values.t()?.contiguous()?)?)
}

/// A fit of `y` on `x`.
pub(super) struct Fit {
    /// `α = (X Xᵀ + λ)⁻¹ Y`, `(examples, columns of y)`: what is expected of a row `x` is `x Xᵀ α`.
    pub(super) dual: Tensor,
    /// How far each example is from what a fit without it expects of it, `(examples, columns of y)`.
    pub(super) left_out: Tensor,
}

/// Ridge regression with `λ` as a share of the mean square of a row: `strength` above 0.
///
/// What each example would be off by if it were left out needs no other fit: with `r` the residual of the fit
/// with all, and `H` what turns `Y` into what is expected of it, that is `r_i / (1 - H_ii)` (Allen 1974).
/// With the means fitted, too, `H = 1/n + K (K + λ)⁻¹`, and so `r = λ α` and
/// `1 - H_ii = λ (K + λ)⁻¹_ii - 1/n`.
pub(super) fn fit(kernel: &Tensor, y: &Tensor, strength: f64) -> Result<Fit> {
    let rows = kernel.to_vec2::<f64>()?;
    let n = rows.len().max(1) as f64;
    let trace: f64 = rows.iter().enumerate().filter_map(|(i, row)| row.get(i)).sum();
    let lambda = (strength * trace / n).max(f64::MIN_POSITIVE);
    let ridged: Vec<Vec<f64>> = rows
        .into_iter()
        .enumerate()
        .map(|(i, mut row)| {
            row.truncate(i + 1);
            row.last_mut().into_iter().for_each(|own| *own += lambda);
            row
        })
        .collect();
    let inverse = Cholesky::of(&ridged, lambda).inverse();
    let own = inverse.iter().enumerate().filter_map(|(i, row)| row.get(i));
    let free: Vec<f64> = own.map(|own| (lambda * own - 1.0 / n).max(1e-9)).collect();
    let free = Tensor::new(free, &Device::Cpu)?.unsqueeze(D::Minus1)?; // (examples, 1)
    let dual = Tensor::new(inverse, &Device::Cpu)?.matmul(y)?;
    let left_out = (&dual * lambda)?.broadcast_div(&free)?;
    Ok(Fit { dual, left_out })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn random(shape: (usize, usize)) -> Result<Tensor> {
        Ok(Tensor::randn(0f64, 1.0, shape, &Device::Cpu)?)
    }

    fn numbers(xs: &Tensor) -> Result<Vec<f64>> {
        Ok(xs.flatten_all()?.to_vec1()?)
    }

    fn assert_near(got: &Tensor, expected: &Tensor) -> Result<()> {
        for (got, expected) in numbers(got)?.into_iter().zip(numbers(expected)?) {
            assert!((got - expected).abs() < 1e-8 * (1.0 + expected.abs()), "{got} {expected}");
        }
        Ok(())
    }

    /// With more columns than examples and fewer: `Xᵀ α` solves the normal equations `(Xᵀ X + λ) w = Xᵀ Y`.
    #[test]
    fn it_solves_the_normal_equations() -> Result<()> {
        for (n, p) in [(12, 30), (30, 5)] {
            let (x, y) = (Standard::of(&random((n, p))?)?, Standard::of(&random((n, 3))?)?);
            let kernel = kernel(&x)?;
            for strength in [0.01, 1.0] {
                let found = fit(&kernel, &y.values, strength)?;
                let transposed = x.values.t()?.contiguous()?;
                let weights = transposed.matmul(&found.dual)?; // (p, 3)
                let lambda = strength * p as f64; // columns of variance 1: a row's mean square is p
                let left = (transposed.matmul(&x.values.matmul(&weights)?)? + (weights * lambda)?)?;
                assert_near(&left, &transposed.matmul(&y.values)?)?;
            }
        }
        Ok(())
    }

    /// What the closed form says of an example that is left out is what a fit without it says.
    #[test]
    fn leaving_one_out_is_fitting_without_it() -> Result<()> {
        let (n, p) = (9, 4);
        let (x, y) =
            (Standard::of(&random((n, p))?)?.values, Standard::of(&random((n, 2))?)?.values);
        let all = Standard { values: x.clone(), means: x.mean(0)?, spreads: x.mean(0)? };
        let found = fit(&kernel(&all)?, &y, 0.3)?;
        let lambda = 0.3 * p as f64;
        for left_out in 0..n {
            let others: Vec<u32> = (0..n as u32).filter(|row| *row as usize != left_out).collect();
            let others = Tensor::new(others, &Device::Cpu)?;
            let (xs, ys) = (x.index_select(&others, 0)?, y.index_select(&others, 0)?);
            let (x_mean, y_mean) = (xs.mean_keepdim(0)?, ys.mean_keepdim(0)?);
            let (xs, ys) = (xs.broadcast_sub(&x_mean)?, ys.broadcast_sub(&y_mean)?);
            let transposed = xs.t()?.contiguous()?;
            let gram = transposed.matmul(&xs)?.to_vec2::<f64>()?;
            let ridged: Vec<Vec<f64>> = gram
                .into_iter()
                .enumerate()
                .map(|(i, mut row)| {
                    row[i] += lambda;
                    row
                })
                .collect();
            let inverse = Cholesky::of(&ridged, f64::MIN_POSITIVE).inverse();
            let weights = Tensor::new(inverse, &Device::Cpu)?.matmul(&transposed.matmul(&ys)?)?;
            let own = (x.narrow(0, left_out, 1)? - x_mean)?.matmul(&weights)?;
            let residual = ((y.narrow(0, left_out, 1)? - own)? - y_mean)?;
            assert_near(&found.left_out.narrow(0, left_out, 1)?, &residual)?;
        }
        Ok(())
    }

    /// A column that does not change says nothing, and overflows nothing.
    #[test]
    fn a_constant_column_is_left_out() -> Result<()> {
        let rows = Tensor::new(&[[1e6f64, 1.0, 0.0], [1e6, 3.0, 0.0]], &Device::Cpu)?;
        let standard = Standard::of(&rows)?;
        assert_eq!(standard.values.to_vec2::<f64>()?, [[0.0, -1.0, 0.0], [0.0, 1.0, 0.0]]);
        assert_eq!(standard.spreads.to_vec1::<f64>()?, [1.0; 3]);
        assert_near(&standard.apply(&rows)?, &standard.values)
    }
}
