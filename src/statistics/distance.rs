//! How far apart two rows of statistics are.

use crate::error::{Error, Result};

/// A distance of two rows of statistics: of the means of two [summaries](super::Summary), or of their
/// variances, or of any others that belong together.
#[derive(Clone, Copy, Debug, PartialEq)]
#[non_exhaustive]
pub enum Distance<'a> {
    /// `√(Σ (a - b)² / v)` with a variance `v` above 0 for each number: what an ordinary difference is
    /// (Mahalanobis 1936, with a diagonal covariance).
    Mahalanobis(&'a [f32]),
    /// `Σ |a - b|`.
    Manhattan,
    /// One minus the cosine, 0 to 2; 1 where either is all zeros.
    Cosine,
}

impl Distance<'_> {
    /// Between two rows of as many numbers.
    ///
    /// # Errors
    /// [`Error::Parameter`] for rows of different lengths, and variances that are not above 0 or not as many.
    pub fn between(self, a: &[f32], b: &[f32]) -> Result<f64> {
        if a.len() != b.len() {
            return Err(Error::parameter("b", format!("{} numbers, as in a", a.len()), b.len()));
        }
        let pairs = a.iter().zip(b).map(|(a, b)| (f64::from(*a), f64::from(*b)));
        Ok(match self {
            Self::Mahalanobis(variances) => {
                if variances.len() != a.len() {
                    let expected = format!("{}, one for each number", a.len());
                    return Err(Error::parameter("variances", expected, variances.len()));
                }
                if let Some(bad) = variances.iter().find(|it| !(**it > 0.0 && it.is_finite())) {
                    return Err(Error::parameter("variances", "finite numbers above 0", bad));
                }
                let each = pairs.zip(variances).map(|((a, b), v)| (a - b).powi(2) / f64::from(*v));
                each.sum::<f64>().sqrt()
            }
            Self::Manhattan => pairs.map(|(a, b)| (a - b).abs()).sum(),
            Self::Cosine => {
                let (mut both, mut of_a, mut of_b) = (0.0, 0.0, 0.0);
                for (a, b) in pairs {
                    both += a * b;
                    of_a += a * a;
                    of_b += b * b;
                }
                match of_a > 0.0 && of_b > 0.0 {
                    true => 1.0 - both / (of_a.sqrt() * of_b.sqrt()),
                    false => 1.0,
                }
            }
        })
    }
}
