//! Dot products of a few input rows with every row of a weight.

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::ROWS_PER_TASK;
use super::element::{Element, RUN};

/// `columns[o * rows + r] = x[r] · w[o]` for `x` of `(rows, len)` and `w` of `(out, len)`.
pub(super) fn columns<T: Element>(x: &[f32], w: &[T], len: usize, columns: &mut [f32]) {
    if len == 0 || x.is_empty() {
        return;
    }
    let rows = x.len() / len;
    let arch = Arch::new();
    columns
        .par_chunks_mut(ROWS_PER_TASK * rows)
        .zip(w.par_chunks(ROWS_PER_TASK * (len / T::LEN)))
        .for_each(|(columns, w)| arch.dispatch(Task { x, w, len, columns }));
}

struct Task<'a, T> {
    x: &'a [f32],
    w: &'a [T],
    len: usize,
    columns: &'a mut [f32],
}

impl<T: Element> WithSimd for Task<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let rows = self.x.len() / self.len;
        let mut wide = [0f32; RUN];
        let weights = self.w.chunks_exact(self.len / T::LEN);
        for (column, w) in self.columns.chunks_exact_mut(rows).zip(weights) {
            column.fill(0.0);
            for (run, w) in w.chunks(RUN / T::LEN).enumerate() {
                let w = T::widen(w, &mut wide);
                for (y, x) in column.iter_mut().zip(self.x.chunks_exact(self.len)) {
                    *y += dot(simd, &x[run * RUN..][..w.len()], w);
                }
            }
        }
    }
}

/// `Σ x[i]·w[i]`
#[inline(always)]
fn dot<S: Simd>(simd: S, x: &[f32], w: &[f32]) -> f32 {
    let (x, x_tail) = S::as_simd_f32s(x);
    let (w, w_tail) = S::as_simd_f32s(w);
    // Four sums at once: one alone would wait for its own previous addition.
    let mut sums = [simd.splat_f32s(0.0); 4];
    let (x4, x_rest) = x.as_chunks::<4>();
    let (w4, w_rest) = w.as_chunks::<4>();
    for (x, w) in x4.iter().zip(w4) {
        for lane in 0..4 {
            sums[lane] = simd.mul_add_e_f32s(x[lane], w[lane], sums[lane]);
        }
    }
    for (&x, &w) in x_rest.iter().zip(w_rest) {
        sums[0] = simd.mul_add_e_f32s(x, w, sums[0]);
    }
    let sum = simd.add_f32s(simd.add_f32s(sums[0], sums[1]), simd.add_f32s(sums[2], sums[3]));
    let tail: f32 = x_tail.iter().zip(w_tail).map(|(x, w)| x * w).sum();
    simd.reduce_sum_f32s(sum) + tail
}
