//! Dot products of a few input rows with every row of a dense weight, limited by how fast it is read;
//! those with blocks are in `quantized`.

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::ROWS_PER_TASK;
use super::element::{Element, RUN};

/// `columns[o * rows + r] = x[r] · w[o]` for `x` of `(rows, len)`, few of them, and dense `w` of
/// `(out, len)`.
pub(in crate::kernels) fn few_rows<T: Element>(
    x: &[f32],
    w: &[T],
    len: usize,
    columns: &mut [f32],
) {
    if len == 0 || x.is_empty() {
        return;
    }
    let rows = x.len() / len;
    let arch = Arch::new();
    columns
        .par_chunks_mut(ROWS_PER_TASK * rows)
        .zip(w.par_chunks(ROWS_PER_TASK * len))
        .for_each(|(columns, w)| arch.dispatch(Wide { x, w, len, columns }));
}

struct Wide<'a, T> {
    x: &'a [f32],
    w: &'a [T],
    len: usize,
    columns: &'a mut [f32],
}

impl<T: Element> WithSimd for Wide<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        if self.x.len() == self.len {
            return self.one_row(simd);
        }
        let rows = self.x.len() / self.len;
        let mut wide = [0f32; RUN];
        for (column, w) in self.columns.chunks_exact_mut(rows).zip(self.w.chunks_exact(self.len)) {
            column.fill(0.0);
            for (run, w) in w.chunks(RUN).enumerate() {
                prefetch_ahead(w);
                let w = T::widen(simd, w, &mut wide);
                for (y, x) in column.iter_mut().zip(self.x.chunks_exact(self.len)) {
                    *y += dot(simd, &x[run * RUN..][..w.len()], w);
                }
            }
        }
    }
}

impl<T: Element> Wide<'_, T> {
    /// Several parts of the weight side by side, row by row: a processor has more of them on their way
    /// from memory than of one.
    #[inline(always)]
    fn one_row<S: Simd>(self, simd: S) {
        let Self { x, w, len, columns } = self;
        let of_stream = columns.len() / STREAMS;
        let row = |row: usize| &w[row * len..][..len];
        for first in 0..of_stream {
            let rows = std::array::from_fn(|stream| row(first + stream * of_stream));
            let sums: [f32; STREAMS] = dot_rows(simd, x, rows);
            for (stream, sum) in sums.into_iter().enumerate() {
                columns[first + stream * of_stream] = sum;
            }
        }
        for (last, y) in columns.iter_mut().enumerate().skip(of_stream * STREAMS) {
            [*y] = dot_rows(simd, x, [row(last)]);
        }
    }
}

/// Rows of a weight that are read at a time.
const STREAMS: usize = 4;

/// `Σ x[i]·w[i]` for some rows of weights, which are widened in registers, so few at a time that they
/// stay there.
#[inline(always)]
fn dot_rows<S: Simd, T: Element, const N: usize>(simd: S, x: &[f32], w: [&[T]; N]) -> [f32; N] {
    const STEP: usize = 64;
    let mut sums = [[simd.splat_f32s(0.0); 2]; N];
    let (x, x_tail) = x.as_chunks::<STEP>();
    let (w, w_tail) = (w.map(|w| w.as_chunks::<STEP>().0), w.map(|w| w.as_chunks::<STEP>().1));
    for (step, x) in x.iter().enumerate() {
        let (x, _) = S::as_simd_f32s(x);
        for (sums, w) in sums.iter_mut().zip(w) {
            let Some(w) = w.get(step) else { continue };
            prefetch_ahead(w);
            let mut wide = [0f32; STEP];
            let (w, _) = S::as_simd_f32s(T::widen(simd, w, &mut wide));
            for (lane, (x, w)) in x.iter().zip(w).enumerate() {
                sums[lane % 2] = simd.mul_add_e_f32s(*x, *w, sums[lane % 2]);
            }
        }
    }
    let mut all = [0.0; N];
    for ((all, [left, right]), w) in all.iter_mut().zip(sums).zip(w_tail) {
        let mut wide = [0f32; STEP];
        let tail = T::widen(simd, w, &mut wide);
        let tail: f32 = x_tail.iter().zip(tail).map(|(x, w)| x * w).sum();
        *all = simd.reduce_sum_f32s(simd.add_f32s(left, right)) + tail;
    }
    all
}

/// `Σ x[i]·w[i]`
#[inline(always)]
pub(in crate::kernels) fn dot<S: Simd>(simd: S, x: &[f32], w: &[f32]) -> f32 {
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

/// How far ahead of a run, in bytes, the weight is asked for. A row of `x` that is longer than the
/// first-level cache comes from the second one again and again, and keeps a processor from seeing far
/// enough ahead in the weight by itself: half the speed at rows of 14336.
const AHEAD: usize = 4096;

/// Asks for what lies [`AHEAD`] of this run.
#[inline(always)]
pub(in crate::kernels) fn prefetch_ahead<T>(run: &[T]) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _mm_prefetch};
        const LINE: usize = 64;
        let first = run.as_ptr().cast::<i8>().wrapping_add(AHEAD);
        for at in (0..size_of_val(run)).step_by(LINE) {
            // SAFETY: nothing is read or written, and an address that is nobody's is passed over.
            unsafe { _mm_prefetch::<_MM_HINT_T0>(first.wrapping_add(at)) };
        }
    }
}
