//! Products of a few input rows with every row of a weight: with one row the limit is how fast the
//! weight is read, with many it is arithmetic.
//!
//! However many rows there are, a product is summed in the same order, so that a row gives the same bits
//! alone and beside others:
//!
//! ```text
//! lane l of a vector   x[l] w[l] + x[l + LANES] w[l + LANES] + ...     each fused to the sum so far
//! y                    the sum of all lanes + the products that fill no vector
//! ```
//!
//! One row is multiplied with several rows of the weight side by side, which are widened in registers.
//! With several rows, the widened weights are shared:
//!
//! ```text
//! the rows of the weight go by COLUMNS at a time, and of these a RUN at a time:
//!     it is widened once, and stays in the first-level cache while
//!     a few rows of x at a time are multiplied with all of it: their sums stay in registers
//! ```

use std::ops::Range;

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::element::Element;
use super::rows_per_task;
use crate::kernels::input_rows::FEW_ROWS;

/// Weights of each row that are widened at a time where several rows of `x` share them. A multiple of
/// every block's length.
const RUN: usize = 512;

/// Rows of the weight whose sums, for two rows of `x`, fill 12 of 16 registers, or for four 24 of 32.
pub(super) const COLUMNS: usize = 6;

/// `columns[o * rows + r] = x[r] · w[o]` for `x` of `(rows, len)`, at most [`FEW_ROWS`], and `w` of
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
    let (rows, arch) = (x.len() / len, Arch::new());
    let of_task = rows_per_task(columns.len() / rows);
    columns
        .par_chunks_mut(of_task * rows)
        .zip(w.par_chunks(of_task * (len / T::LEN)))
        .for_each(|(columns, w)| arch.dispatch(FewRows { x, w, len, columns }));
}

/// The same of numbers, on the calling thread: `columns[o * rows + r] = x[r] · w[o]`.
pub(crate) fn products(x: &[f32], w: &[f32], len: usize, columns: &mut [f32]) {
    if len > 0 && !x.is_empty() {
        Arch::new().dispatch(FewRows { x, w, len, columns });
    }
}

pub(in crate::kernels) struct FewRows<'a, T> {
    pub(in crate::kernels) x: &'a [f32],
    /// `(out, len)`
    pub(in crate::kernels) w: &'a [T],
    pub(in crate::kernels) len: usize,
    pub(in crate::kernels) columns: &'a mut [f32],
}

impl<T: Element> WithSimd for FewRows<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        match self.x.len() == self.len {
            true => self.one(simd),
            false => self.several(simd),
        }
    }
}

impl<T: Element> FewRows<'_, T> {
    /// Several parts of the weight side by side, row by row: a processor can have more loads in flight
    /// from several than from one.
    #[inline(always)]
    fn one<S: Simd>(self, simd: S) {
        let Self { x, w, len, columns } = self;
        let (of_stream, row_len) = (columns.len() / STREAMS, len / T::LEN);
        let row = |row: usize| &w[row * row_len..][..row_len];
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

    #[inline(always)]
    fn several<S: Simd>(self, simd: S) {
        let Self { x, w, len, columns } = self;
        let (rows, row_len) = (x.len() / len, len / T::LEN);
        let zero = simd.splat_f32s(0.0);
        let mut sums = [[zero; COLUMNS]; FEW_ROWS];
        let mut wide = [[0f32; RUN]; COLUMNS];
        for (w, columns) in w.chunks(COLUMNS * row_len).zip(columns.chunks_mut(COLUMNS * rows)) {
            let mut next = Next::behind(w);
            columns.fill(0.0);
            for sums in &mut sums[..rows] {
                *sums = [zero; COLUMNS];
            }
            for start in (0..len).step_by(RUN) {
                let run = RUN.min(len - start);
                let mut panel: [&[f32]; COLUMNS] = [&[]; COLUMNS];
                for ((panel, wide), w) in panel.iter_mut().zip(&mut wide).zip(w.chunks(row_len)) {
                    let w = &w[start / T::LEN..][..run / T::LEN];
                    *panel = T::widen(simd, w, wide);
                }
                let rest = run / S::F32_LANES * S::F32_LANES; // from here on no vector is filled
                if rest < run {
                    for (columns, w) in columns.chunks_exact_mut(rows).zip(panel) {
                        for (y, x) in columns.iter_mut().zip(x.chunks_exact(len)) {
                            *y = dot_rest(&x[start + rest..start + run], &w[rest..]);
                        }
                    }
                }
                // Past the last row of the weight, the first is multiplied again, to no effect.
                let first = panel[0];
                for w in &mut panel {
                    *w = if w.is_empty() { first } else { *w };
                }
                multiply(simd, x, len, start..start + run, panel, &mut next, &mut sums[..rows]);
            }
            for (column, columns) in columns.chunks_exact_mut(rows).enumerate() {
                for (y, sums) in columns.iter_mut().zip(&sums) {
                    *y += simd.reduce_sum_f32s(sums[column]);
                }
            }
        }
    }
}

/// Adds to `sums` the products of a run of all rows of `x` with that of [`COLUMNS`] rows of the weight.
#[inline(always)]
fn multiply<S: Simd>(
    simd: S,
    x: &[f32],
    len: usize,
    run: Range<usize>,
    w: [&[f32]; COLUMNS],
    next: &mut Next,
    sums: &mut [[S::f32s; COLUMNS]],
) {
    let (mut x, mut rest) = (x, sums);
    if S::REGISTER_COUNT >= 32 {
        let (fours, behind) = rest.as_chunks_mut::<4>();
        for sums in fours {
            four_rows(simd, x, len, &run, w, next, sums);
            x = &x[4 * len..];
        }
        rest = behind;
    }
    let (twos, last) = rest.as_chunks_mut::<2>();
    for sums in twos {
        two_rows(simd, x, len, &run, w, next, sums);
        x = &x[2 * len..];
    }
    if let ([sums], _) = last.as_chunks_mut::<1>() {
        one_row(simd, x, len, &run, w, next, sums);
    }
}

/// The whole vectors of a slice, up to the most that there can be.
#[inline(always)]
fn vectors<S: Simd>(slice: &[f32], steps: usize) -> &[S::f32s] {
    &S::as_simd_f32s(slice).0[..steps]
}

/// The first rows of `x` by [`COLUMNS`] rows of the weight. Each sum is a variable of its own: in an
/// array they would be kept in memory.
macro_rules! rows_by_columns {
    ($name:ident, $rows:literal: $($n:literal $x:ident $a:ident $b:ident $c:ident $d:ident $e:ident $f:ident),*) => {
        #[inline(always)]
        fn $name<S: Simd>(
            simd: S,
            x: &[f32],
            len: usize,
            run: &Range<usize>,
            w: [&[f32]; COLUMNS],
            next: &mut Next,
            sums: &mut [[S::f32s; COLUMNS]; $rows],
        ) {
            // All cut to one known length, so that no check, and no other exit, is left in the loop.
            let steps = run.len() / S::F32_LANES;
            let (w0, w1, w2) =
                (vectors::<S>(w[0], steps), vectors::<S>(w[1], steps), vectors::<S>(w[2], steps));
            let (w3, w4, w5) =
                (vectors::<S>(w[3], steps), vectors::<S>(w[4], steps), vectors::<S>(w[5], steps));
            $(let $x = vectors::<S>(&x[$n * len..][run.clone()], steps);)*
            let [$([mut $a, mut $b, mut $c, mut $d, mut $e, mut $f]),*] = *sums;
            for k in 0..steps {
                next.prefetch();
                let (w0, w1, w2, w3, w4, w5) = (w0[k], w1[k], w2[k], w3[k], w4[k], w5[k]);
                $(
                    $a = simd.mul_add_e_f32s($x[k], w0, $a);
                    $b = simd.mul_add_e_f32s($x[k], w1, $b);
                    $c = simd.mul_add_e_f32s($x[k], w2, $c);
                    $d = simd.mul_add_e_f32s($x[k], w3, $d);
                    $e = simd.mul_add_e_f32s($x[k], w4, $e);
                    $f = simd.mul_add_e_f32s($x[k], w5, $f);
                )*
            }
            *sums = [$([$a, $b, $c, $d, $e, $f]),*];
        }
    };
}

rows_by_columns!(one_row, 1: 0 x0 a0 b0 c0 d0 e0 f0);
rows_by_columns!(two_rows, 2: 0 x0 a0 b0 c0 d0 e0 f0, 1 x1 a1 b1 c1 d1 e1 f1);
rows_by_columns!(four_rows, 4: 0 x0 a0 b0 c0 d0 e0 f0, 1 x1 a1 b1 c1 d1 e1 f1,
    2 x2 a2 b2 c2 d2 e2 f2, 3 x3 a3 b3 c3 d3 e3 f3);

/// Rows of a weight that are read side by side for one row of `x`.
const STREAMS: usize = 4;

/// `Σ x[i]·w[i]` for some rows of weights, which are widened in registers, few enough at a time to stay
/// there.
#[inline(always)]
fn dot_rows<S: Simd, T: Element, const N: usize>(simd: S, x: &[f32], w: [&[T]; N]) -> [f32; N] {
    let mut sums = [simd.splat_f32s(0.0); N];
    let (x, x_rest) = x.as_chunks::<STEP>();
    let of_step = STEP / T::LEN;
    for (step, x) in x.iter().enumerate() {
        for (sum, w) in sums.iter_mut().zip(w) {
            let w = &w[step * of_step..][..of_step];
            prefetch_ahead(w);
            let mut wide = [0f32; STEP];
            *sum = dot_step(simd, x, T::widen(simd, w, &mut wide), *sum);
        }
    }
    let mut all = [0.0; N];
    for ((y, sum), w) in all.iter_mut().zip(sums).zip(w) {
        let mut wide = [0f32; STEP];
        let w = T::widen(simd, &w[x.len() * of_step..], &mut wide);
        let rest = x_rest.len() / S::F32_LANES * S::F32_LANES;
        let sum = dot_step(simd, &x_rest[..rest], &w[..rest], sum);
        *y = dot_rest(&x_rest[rest..], &w[rest..]) + simd.reduce_sum_f32s(sum);
    }
    all
}

/// Weights that are widened in registers at a time. A multiple of the length of every block read this
/// way.
const STEP: usize = 64;

/// Adds the products of whole vectors.
#[inline(always)]
fn dot_step<S: Simd>(simd: S, x: &[f32], w: &[f32], mut sum: S::f32s) -> S::f32s {
    for (x, w) in S::as_simd_f32s(x).0.iter().zip(S::as_simd_f32s(w).0) {
        sum = simd.mul_add_e_f32s(*x, *w, sum);
    }
    sum
}

/// The products that fill no vector.
#[inline(always)]
fn dot_rest(x: &[f32], w: &[f32]) -> f32 {
    x.iter().zip(w).fold(0.0, |sum, (x, w)| sum + x * w)
}

/// How far ahead of a run, in bytes, the weight is prefetched. A row of `x` that is longer than the
/// first-level cache is read from the second one again and again, and keeps a processor from looking far
/// enough ahead in the weight by itself: half the speed at rows of 14336.
const AHEAD: usize = 4096;

/// Prefetches what lies [`AHEAD`] of this run.
#[inline(always)]
pub(in crate::kernels) fn prefetch_ahead<T>(run: &[T]) {
    let first = run.as_ptr().cast::<u8>().wrapping_add(AHEAD);
    for at in (0..size_of_val(run)).step_by(LINE) {
        prefetch::<false>(first.wrapping_add(at));
    }
}

/// Prefetches the first lines of a run, from which [`prefetch_ahead`] then continues.
#[inline(always)]
pub(in crate::kernels) fn prefetch_start<T>(run: &[T]) {
    let first = run.as_ptr().cast::<u8>();
    for at in (0..size_of_val(run).min(AHEAD)).step_by(LINE) {
        prefetch::<false>(first.wrapping_add(at));
    }
}

/// Bytes that are fetched from memory at once.
const LINE: usize = 64;

/// Prefetches the line at this address, into the first-level cache or only into the `SECOND`.
#[inline(always)]
fn prefetch<const SECOND: bool>(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T0, _MM_HINT_T1, _mm_prefetch};
        // SAFETY: a prefetch reads and writes nothing, and ignores an invalid address.
        unsafe {
            if SECOND {
                _mm_prefetch::<_MM_HINT_T1>(at.cast());
            } else {
                _mm_prefetch::<_MM_HINT_T0>(at.cast());
            }
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// The part of the weight that is read next, prefetched a few lines at a time between multiplications:
/// more at once would have to wait for each other.
struct Next {
    at: *const u8,
    lines: usize,
}

impl Next {
    /// The same amount, right behind it.
    #[inline(always)]
    fn behind<T>(w: &[T]) -> Self {
        Self { at: w.as_ptr_range().end.cast(), lines: size_of_val(w) / LINE }
    }

    #[inline(always)]
    fn prefetch(&mut self) {
        const AT_ONCE: usize = 3;
        if let Some(left) = self.lines.checked_sub(AT_ONCE) {
            for line in 0..AT_ONCE {
                prefetch::<true>(self.at.wrapping_add(line * LINE));
            }
            self.at = self.at.wrapping_add(AT_ONCE * LINE);
            self.lines = left;
        }
    }
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;

    /// The columns of a weight, on the vector unit `simd`.
    fn columns<S: Simd, T: Element>(simd: S, x: &[f32], w: &[T], len: usize) -> Vec<f32> {
        // Old contents must not matter.
        let mut columns = vec![f32::NAN; x.len() / len * (w.len() / len)];
        simd.vectorize(FewRows { x, w, len, columns: &mut columns });
        columns
    }

    /// Sixteen rows at once, each of them alone, and the definition.
    fn check<S: Simd, T: Element>(simd: S, x: &[f32], (w, wide): (&[T], &[f32]), len: usize) {
        for rows in 1..=FEW_ROWS {
            let x = &x[..rows * len];
            let together = columns(simd, x, w, len);
            for (row, x) in x.chunks_exact(len).enumerate() {
                let alone = columns(simd, x, w, len);
                let of_row = together.iter().skip(row).step_by(rows);
                for ((alone, together), w) in alone.iter().zip(of_row).zip(wide.chunks_exact(len)) {
                    assert_eq!(alone.to_bits(), together.to_bits(), "row {row} of {rows}, {len}");
                    let products = x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w));
                    let apart = (f64::from(*alone) - products.sum::<f64>()).abs();
                    assert!(apart < 1e-5 * (len as f64).sqrt(), "row {row} of {rows}, {len}");
                }
            }
        }
    }

    /// A processor takes only one of these paths; others take the others.
    #[test]
    fn every_vector_unit_sums_up_in_one_order() {
        for (len, out) in [(1, 1), (7, 5), (64, 4), (RUN, 3), (2 * RUN + 73, 31), (1037, 13)] {
            let value = |index: usize| ((index * 7919 + 13) % 201) as f32 / 100.0 - 1.0;
            let x: Vec<f32> = (0..FEW_ROWS * len).map(value).collect();
            let w: Vec<f32> = (0..out * len).map(|index| value(index + 5)).collect();
            let narrow: Vec<bf16> = w.iter().map(|w| bf16::from_f32(*w)).collect();
            let rounded: Vec<f32> = narrow.iter().map(|w| w.to_f32()).collect();
            check(pulp::Scalar::new(), &x, (&w, &w), len);
            check(pulp::Scalar::new(), &x, (&narrow, &rounded), len);
            #[cfg(target_arch = "x86_64")]
            {
                use pulp::x86::{V3, V4};
                if let Some(simd) = V3::try_new() {
                    check(simd, &x, (&w, &w), len);
                    check(simd, &x, (&narrow, &rounded), len);
                }
                if let Some(simd) = V4::try_new() {
                    check(simd, &x, (&w, &w), len);
                    check(simd, &x, (&narrow, &rounded), len);
                }
            }
        }
    }
}
