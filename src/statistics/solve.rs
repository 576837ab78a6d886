//! Symmetric positive definite systems by Cholesky's decomposition.

use rayon::prelude::*;

/// The lower triangle `L` of `L Lᵀ = A`, row by row.
pub(crate) struct Cholesky(Vec<Vec<f64>>);

impl Cholesky {
    /// Of a matrix whose lower triangle is given row by row. What rounding has left of a square on the
    /// diagonal is taken for `least`, which must be above 0, where it is less.
    pub(crate) fn of(matrix: &[Vec<f64>], least: f64) -> Self {
        let mut lower: Vec<Vec<f64>> = Vec::with_capacity(matrix.len());
        for (i, given) in matrix.iter().enumerate() {
            // row i of L, from the columns before it
            let mut row = Vec::with_capacity(i + 1);
            for (value, above) in given.iter().zip(&lower) {
                let diagonal = above.last().copied().unwrap_or(1.0);
                row.push((value - dot(&row, above)) / diagonal);
            }
            let own = given.get(i).copied().unwrap_or(0.0) - dot(&row, &row);
            row.push(own.max(least).sqrt());
            lower.push(row);
        }
        Self(lower)
    }

    /// The solution `y` of `L y = b`.
    pub(crate) fn halfway(&self, b: impl IntoIterator<Item = f64>) -> Vec<f64> {
        let mut y: Vec<f64> = Vec::with_capacity(self.0.len());
        for (value, lower) in b.into_iter().zip(&self.0) {
            let diagonal = lower.last().copied().unwrap_or(1.0);
            y.push((value - dot(lower, &y)) / diagonal);
        }
        y
    }

    /// The solution `x` of `A x = b`.
    pub(crate) fn solve(&self, b: impl IntoIterator<Item = f64>) -> Vec<f64> {
        let mut x = self.halfway(b);
        for (i, lower) in self.0.iter().enumerate().rev() {
            let diagonal = lower.last().copied().unwrap_or(1.0);
            let (before, from) = x.split_at_mut(i);
            let Some(own) = from.first_mut() else { continue };
            *own /= diagonal;
            before.iter_mut().zip(lower).for_each(|(x, l)| *x -= l * *own);
        }
        x
    }

    /// The rows of `A⁻¹`.
    pub(crate) fn inverse(&self) -> Vec<Vec<f64>> {
        let n = self.0.len();
        let unit = |i: usize| (0..n).map(move |j| if i == j { 1.0 } else { 0.0 });
        (0..n).into_par_iter().map(|i| self.solve(unit(i))).collect()
    }
}

/// Over as many numbers as the shorter one has.
pub(crate) fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// What is solved for gives the right side back, and the inverse the unit matrix.
        #[test]
        fn a_solution_solves(
            n in 1usize..20, values in prop::collection::vec(-1.0..1.0f64, 20 * 20),
            b in prop::collection::vec(-1.0..1.0f64, 20),
        ) {
            // M Mᵀ + 1/10
            let row = |i: usize| &values[i * 20..i * 20 + n];
            let a: Vec<Vec<f64>> = (0..n)
                .map(|i| (0..n).map(|j| dot(row(i), row(j)) + if i == j { 0.1 } else { 0.0 }).collect())
                .collect();
            let cholesky = Cholesky::of(&a, f64::MIN_POSITIVE);
            let x = cholesky.solve(b.iter().copied());
            let y = cholesky.halfway(b.iter().copied());
            prop_assert!((dot(&y, &y) - dot(&x, &b)).abs() < 1e-9 * (1.0 + dot(&y, &y)));
            let inverse = cholesky.inverse();
            for (i, (a, b)) in a.iter().zip(&b).enumerate() {
                prop_assert!((dot(a, &x) - b).abs() < 1e-9, "{} {}", dot(a, &x), b);
                for j in 0..n {
                    let product: f64 = a.iter().zip(&inverse).map(|(a, row)| a * row[j]).sum();
                    let unit = if i == j { 1.0 } else { 0.0 };
                    prop_assert!((product - unit).abs() < 1e-8);
                }
            }
        }
    }
}
