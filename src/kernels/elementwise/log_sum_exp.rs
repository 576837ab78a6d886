//! The logarithm of a sum of exponentials: what turns logits into log-probabilities.

use pulp::{Arch, Simd, WithSimd};

use super::LANES;
use super::exp::exp;
use super::softmax::largest;

/// Numbers that are summed in `f32` before they go to the sum of all.
const RUN: usize = 1024;

/// `log Σ e^x`, with the sum in `f64`; not finite where no `x` is, or one is NaN or infinite.
pub(crate) fn log_sum_exp(xs: &[f32]) -> f64 {
    Arch::new().dispatch(LogSumExp { xs })
}

struct LogSumExp<'a> {
    xs: &'a [f32],
}

impl WithSimd for LogSumExp<'_> {
    type Output = f64;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> f64 {
        let max = largest(self.xs);
        let mut all = 0f64;
        for run in self.xs.chunks(RUN) {
            let mut sums = [0f32; LANES];
            let (chunks, rest) = run.as_chunks::<LANES>();
            for chunk in chunks {
                for (sum, x) in sums.iter_mut().zip(chunk) {
                    *sum += exp(*x - max);
                }
            }
            for (sum, x) in sums.iter_mut().zip(rest) {
                *sum += exp(*x - max);
            }
            all += sums.iter().copied().map(f64::from).sum::<f64>();
        }
        f64::from(max) + all.ln()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn it_is_that_of_the_definition(
            xs in prop::collection::vec(-30f32..30.0, 1..3000), forbidden in 0usize..3000,
        ) {
            let mut xs = xs;
            let forbidden = forbidden % xs.len();
            if xs.len() > 1 {
                xs[forbidden] = f32::NEG_INFINITY;
            }
            let expected = xs.iter().map(|x| f64::from(*x).exp()).sum::<f64>().ln();
            prop_assert!((log_sum_exp(&xs) - expected).abs() < 1e-6 * expected.abs().max(1.0));
        }
    }

    #[test]
    fn what_is_no_distribution_is_not_finite() {
        let (none, nan, inf) = (f32::NEG_INFINITY, f32::NAN, f32::INFINITY);
        for xs in [vec![], vec![none; 40], vec![1.0, nan, 2.0], vec![nan; 20], vec![0.0, inf]] {
            assert!(!log_sum_exp(&xs).is_finite(), "{xs:?}");
        }
        assert_eq!(log_sum_exp(&[3.0, none]), 3.0);
    }
}
