//! Some directions, and how much two sets of them have in common.

use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use super::solve::dot;
use crate::error::{Error, Result};
use crate::refine::gaussian;

/// What some directions span: rows of length 1, at right angles to each other.
///
/// ```
/// use hybrid_attention::statistics::Subspace;
///
/// # fn main() -> hybrid_attention::Result<()> {
/// let (one, other) = (Subspace::random(64, 16, 1)?, Subspace::random(64, 16, 2)?);
/// assert!((one.overlap(&one)? - 1.0).abs() < 1e-9);
/// assert!((one.overlap(&other)? - 16.0 / 64.0).abs() < 0.1); // what is expected of chance
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Subspace(Vec<Vec<f64>>);

impl Subspace {
    /// Of rows that are at right angles to each other.
    pub(super) fn of(rows: &[Vec<f32>]) -> Self {
        let wide = |row: &Vec<f32>| row.iter().map(|it| f64::from(*it)).collect();
        Self(rows.iter().map(wide).collect())
    }

    /// `k` directions of `width` numbers by chance, all as likely: the control for directions that were found. Of
    /// what any row is, they are expected to hold `k / width`.
    ///
    /// # Errors
    /// [`Error::Parameter`] for no directions, or more than there are numbers.
    pub fn random(width: usize, k: usize, seed: u64) -> Result<Self> {
        if !(1..=width).contains(&k) {
            return Err(Error::parameter("k", format!("1 to {width}"), k));
        }
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut rows: Vec<Vec<f64>> = Vec::with_capacity(k);
        while rows.len() < k {
            let mut drawn = vec![0f32; width];
            drawn.chunks_mut(2).for_each(|two| gaussian(two, &mut rng));
            let mut row: Vec<f64> = drawn.into_iter().map(f64::from).collect();
            // Gram & Schmidt, twice: the second time takes off what rounding has left.
            for _ in 0..2 {
                for other in &rows {
                    let along = dot(&row, other);
                    row.iter_mut().zip(other).for_each(|(it, other)| *it -= along * other);
                }
                let length = dot(&row, &row).sqrt().max(f64::MIN_POSITIVE);
                row.iter_mut().for_each(|it| *it /= length);
            }
            rows.push(row);
        }
        Ok(Self(rows))
    }

    /// How many directions there are.
    #[must_use]
    pub fn dimensions(&self) -> usize {
        self.0.len()
    }

    /// Numbers of a direction.
    #[must_use]
    pub fn width(&self) -> usize {
        self.0.first().map_or(0, Vec::len)
    }

    /// The directions, `dimensions` rows of `width` numbers.
    #[must_use]
    pub fn directions(&self) -> Vec<Vec<f32>> {
        let narrow = |row: &Vec<f64>| row.iter().map(|it| *it as f32).collect();
        self.0.iter().map(narrow).collect()
    }

    /// What two have in common: the mean squared cosine of the angles between them (principal angles; Jordan 1875),
    /// of which there are as many as the smaller one has dimensions. 1 where it lies within the other, 0 where they
    /// are at right angles; of two by chance the larger one's dimensions over the width is expected.
    ///
    /// # Errors
    /// [`Error::Parameter`] for directions of other widths, and where there are none.
    pub fn overlap(&self, other: &Self) -> Result<f64> {
        let dimensions = self.dimensions().min(other.dimensions());
        if self.width() != other.width() || dimensions == 0 {
            let expected = format!("directions of {} numbers", self.width());
            let got = format!("{} of {}", other.dimensions(), other.width());
            return Err(Error::parameter("other", expected, got));
        }
        // The cosines are the singular values of `A Bᵀ`.
        let squares = self.0.iter().map(|row| other.square_within(row));
        Ok(squares.sum::<f64>() / dimensions as f64)
    }

    /// The squared length of what lies within it of a row.
    pub(super) fn square_within(&self, row: &[f64]) -> f64 {
        self.0.iter().map(|direction| dot(direction, row).powi(2)).sum()
    }
}
