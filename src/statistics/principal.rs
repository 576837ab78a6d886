//! The directions in which rows extend most: a thin singular value decomposition.

use super::solve::dot;

/// A direction, and how far rows extend along it.
pub(super) struct Principal {
    /// A right singular vector, of length 1.
    pub(super) direction: Vec<f64>,
    /// The square of its singular value: the sum of squares of what the rows are along it.
    pub(super) square: f64,
}

/// What is less than this share of the greatest square is what rounding to `f32` has left.
const ROUNDING: f64 = 1e-12;

/// Rows are at right angles when their cosine is at most this.
const RIGHT: f64 = 1e-13;

/// More than ever were needed: each sweep squares what is left to turn.
const SWEEPS: usize = 60;

/// The right singular vectors of some rows and the squares of their singular values, the greatest first; as many
/// as the rows have dimensions.
pub(super) fn principal(rows: Vec<Vec<f64>>) -> Vec<Principal> {
    let width = rows.first().map_or(0, Vec::len);
    // The smaller side: of more rows than numbers, the sums of products `Xᵀ X`, whose rows turn to `λ vᵀ`.
    let many = rows.len() > width;
    let mut rows = if many { products(&rows, width) } else { rows };
    orthogonalise(&mut rows);
    let mut found: Vec<Principal> = rows
        .into_iter()
        .map(|mut row| {
            let square = dot(&row, &row);
            let length = square.sqrt();
            row.iter_mut().for_each(|it| *it /= length.max(f64::MIN_POSITIVE));
            Principal { direction: row, square: if many { length } else { square } }
        })
        .collect();
    found.sort_by(|a, b| b.square.total_cmp(&a.square));
    let least = found.first().map_or(0.0, |first| ROUNDING * first.square);
    found.retain(|it| it.square > least);
    found
}

/// `Xᵀ X`, `(width, width)`
fn products(rows: &[Vec<f64>], width: usize) -> Vec<Vec<f64>> {
    let mut sums = vec![vec![0.0; width]; width];
    for row in rows {
        for (sums, own) in sums.iter_mut().zip(row) {
            sums.iter_mut().zip(row).for_each(|(sum, other)| *sum += own * other);
        }
    }
    sums
}

/// Turns rows in the plane of each two until all are at right angles (one-sided Jacobi; Hestenes 1958). Turning
/// changes nothing of `Xᵀ X`, so what is left are the right singular vectors, as long as their singular values.
fn orthogonalise(rows: &mut [Vec<f64>]) {
    let greatest = rows.iter().map(|row| dot(row, row)).fold(0.0, f64::max);
    let nothing = greatest * 1e-28;
    for _ in 0..SWEEPS {
        let mut turned = false;
        for i in 1..rows.len() {
            let (before, from) = rows.split_at_mut(i);
            let Some(b) = from.first_mut() else { continue };
            for a in before {
                let (of_a, of_b, both) = (dot(a, a), dot(b, b), dot(a, b));
                if of_a.min(of_b) <= nothing || both.abs() <= RIGHT * (of_a * of_b).sqrt() {
                    continue;
                }
                turn(a, b, (of_b - of_a) / (2.0 * both));
                turned = true;
            }
        }
        if !turned {
            break;
        }
    }
}

/// By the smaller of the two angles that make a right one of theirs; `cot` is the cotangent of twice that angle.
fn turn(a: &mut [f64], b: &mut [f64], cot: f64) {
    let tan = cot.signum() / (cot.abs() + cot.hypot(1.0));
    let cos = 1.0 / tan.hypot(1.0);
    let sin = cos * tan;
    for (a, b) in a.iter_mut().zip(b) {
        (*a, *b) = (cos * *a - sin * *b, sin * *a + cos * *b);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// `Σ σ² v vᵀ` is `Xᵀ X`, with directions of length 1 at right angles to each other, the greatest first, and
        /// no more than the rows span: for more rows than numbers, fewer, and rows that repeat.
        #[test]
        fn directions_make_the_products_of_the_rows(
            n in 1usize..14, width in 1usize..14, rank in 1usize..14,
            values in prop::collection::vec(-1.0..1.0f64, 2 * 14 * 14), scale in 1e-3..1e3f64,
        ) {
            // (n, rank) times (rank, width)
            let (left, right) = values.split_at(14 * 14);
            let rows: Vec<Vec<f64>> = (0..n)
                .map(|i| {
                    let of = |j: usize| (0..rank).map(|k| left[14 * i + k] * right[14 * k + j]).sum::<f64>();
                    (0..width).map(|j| scale * of(j)).collect()
                })
                .collect();
            let found = principal(rows.clone());
            prop_assert!(found.len() <= n.min(width).min(rank));
            prop_assert!(found.windows(2).all(|two| two[0].square >= two[1].square));
            for (i, a) in found.iter().enumerate() {
                for (j, b) in found.iter().enumerate() {
                    let unit = f64::from(u8::from(i == j));
                    prop_assert!((dot(&a.direction, &b.direction) - unit).abs() < 1e-6);
                }
            }
            let greatest = found[0].square;
            for (i, row) in products(&rows, width).iter().enumerate() {
                for (j, product) in row.iter().enumerate() {
                    let of = |it: &Principal| it.square * it.direction[i] * it.direction[j];
                    let sum: f64 = found.iter().map(of).sum();
                    prop_assert!((sum - product).abs() < 1e-10 * greatest, "{} {}", sum, product);
                }
            }
        }
    }

    /// Directions and lengths that are known beforehand come out, in both shapes.
    #[test]
    fn what_was_put_in_comes_out() {
        let (a, b) = ([0.6, 0.8, 0.0], [-0.8, 0.6, 0.0]);
        let row = |of_a: f64, of_b: f64| -> Vec<f64> {
            a.iter().zip(b).map(|(a, b)| of_a * a + of_b * b).collect()
        };
        for repeated in [1, 4] {
            let rows = (0..repeated).flat_map(|_| [row(3.0, 0.0), row(0.0, -2.0)]);
            let found = principal(rows.collect());
            assert_eq!(found.len(), 2);
            for (found, (direction, square)) in found.iter().zip([(a, 9.0), (b, 4.0)]) {
                assert!((found.square - square * f64::from(repeated)).abs() < 1e-12);
                assert!((dot(&found.direction, &direction).abs() - 1.0).abs() < 1e-12);
            }
        }
        assert!(principal(vec![vec![0.0; 3]; 2]).is_empty() && principal(Vec::new()).is_empty());
    }
}
