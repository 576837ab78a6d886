//! Dot products of a few input rows with every row of a weight, limited by how fast it is read.

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::element::{Element, GROUP, Groups, RUN};
use super::units::{Lanes, OnUnit, Unit, on_unit};
use super::{FEW_ROWS, ROWS_PER_TASK};

/// `columns[o * rows + r] = x[r] · w[o]` for `x` of `(rows, len)`, at most [`FEW_ROWS`], and `w` of
/// `(out, len)`.
pub(super) fn columns<T: Element>(x: &[f32], w: &[T], len: usize, columns: &mut [f32]) {
    if len == 0 || x.is_empty() {
        return;
    }
    let rows = x.len() / len;
    let sums = match T::MINIMA {
        true => x.chunks_exact(len).flat_map(sums_of_groups).collect(),
        false => Vec::new(),
    };
    let arch = Arch::new();
    columns
        .par_chunks_mut(ROWS_PER_TASK * rows)
        .zip(w.par_chunks(ROWS_PER_TASK * (len / T::LEN)))
        .for_each(|(columns, w)| match T::LEN {
            1 => arch.dispatch(Wide { x, w, len, columns }),
            _ => arch.dispatch(Blocks { x, sums: &sums, w, len, columns }),
        });
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
        let rows = self.x.len() / self.len;
        let mut wide = [0f32; RUN];
        for (column, w) in self.columns.chunks_exact_mut(rows).zip(self.w.chunks_exact(self.len)) {
            if let [y] = column {
                *y = dot_row(simd, self.x, w);
                continue;
            }
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

/// `Σ x[i]·w[i]` for weights that are widened in registers, so few at a time that they stay there.
#[inline(always)]
fn dot_row<S: Simd, T: Element>(simd: S, x: &[f32], w: &[T]) -> f32 {
    const STEP: usize = 64;
    let mut sums = [simd.splat_f32s(0.0); 4];
    let ((x, x_tail), (w, w_tail)) = (x.as_chunks::<STEP>(), w.as_chunks::<STEP>());
    for (x, w) in x.iter().zip(w) {
        prefetch_ahead(w);
        let mut wide = [0f32; STEP];
        let (x, w) = (S::as_simd_f32s(x).0, S::as_simd_f32s(T::widen(simd, w, &mut wide)).0);
        for (lane, (x, w)) in x.iter().zip(w).enumerate() {
            sums[lane % 4] = simd.mul_add_e_f32s(*x, *w, sums[lane % 4]);
        }
    }
    let sum = simd.add_f32s(simd.add_f32s(sums[0], sums[1]), simd.add_f32s(sums[2], sums[3]));
    let mut wide = [0f32; STEP];
    let tail = T::widen(simd, w_tail, &mut wide);
    let tail: f32 = x_tail.iter().zip(tail).map(|(x, w)| x * w).sum();
    simd.reduce_sum_f32s(sum) + tail
}

/// `Σ x[i]·w[i]`
#[inline(always)]
pub(super) fn dot<S: Simd>(simd: S, x: &[f32], w: &[f32]) -> f32 {
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

/// Of a run of `x`, or of what is left and zeros.
type Sums = [f32; RUN / GROUP];

/// The sum of each group of a row of `x`.
fn sums_of_groups(x: &[f32]) -> impl Iterator<Item = Sums> {
    x.chunks(RUN).map(|run| {
        let mut sums = [0.0; RUN / GROUP];
        for (sum, x) in sums.iter_mut().zip(run.as_chunks::<GROUP>().0) {
            *sum = total(x);
        }
        sums
    })
}

struct Blocks<'a, T> {
    x: &'a [f32],
    /// For each run of each row of `x`, where the blocks have minima.
    sums: &'a [Sums],
    w: &'a [T],
    len: usize,
    columns: &'a mut [f32],
}

impl<T: Element> WithSimd for Blocks<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        on_unit(simd, self);
    }
}

impl<T: Element> OnUnit for Blocks<'_, T> {
    type Output = ();

    /// `Σ x·(d q - m)` is `Σ d (x·q) - Σ m Σ x`: what is the same for a group is multiplied once.
    #[inline(always)]
    fn run(self, unit: impl Unit) {
        let rows = self.x.len() / self.len;
        let runs = self.len.div_ceil(RUN);
        let mut groups = Groups::new();
        let weights = self.w.chunks_exact(self.len / T::LEN);
        for (column, w) in self.columns.chunks_exact_mut(rows).zip(weights) {
            let mut lanes: [Lanes; FEW_ROWS] = [[0.0; 16]; FEW_ROWS];
            for (run, w) in w.chunks(RUN / T::LEN).enumerate() {
                prefetch_ahead(w);
                let count = T::take_apart(unit, w, &mut groups);
                let (q, _) = groups.q[..count].as_chunks();
                let x = self.x.chunks_exact(self.len);
                for (row, (x, lanes)) in x.zip(&mut lanes).enumerate() {
                    let (x, _) = x[run * RUN..][..count].as_chunks();
                    unit.add_products(x, q, &groups.d[..x.len()], lanes);
                    if T::MINIMA {
                        // What an earlier run has left behind the last group meets a zero.
                        let sums = &self.sums[row * runs + run];
                        for (m, sum) in groups.m.as_chunks().0.iter().zip(sums.as_chunks().0) {
                            unit.subtract(m, sum, lanes);
                        }
                    }
                }
            }
            for (y, lanes) in column.iter_mut().zip(&lanes) {
                *y = total(lanes);
            }
        }
    }
}

/// The sum of all lanes, in pairs.
#[inline(always)]
fn total(lanes: &Lanes) -> f32 {
    let mut lanes = *lanes;
    for half in [8, 4, 2, 1] {
        let (left, right) = lanes.split_at_mut(half);
        for (left, right) in left.iter_mut().zip(right) {
            *left += *right;
        }
    }
    lanes[0]
}

/// How far ahead of a run, in bytes, the weight is asked for. A row of `x` that is longer than the
/// first-level cache comes from the second one again and again, and keeps a processor from seeing far
/// enough ahead in the weight by itself: half the speed at rows of 14336.
const AHEAD: usize = 4096;

/// Asks for what lies [`AHEAD`] of this run.
#[inline(always)]
fn prefetch_ahead<T>(run: &[T]) {
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

#[cfg(test)]
mod tests {
    use candle_core::quantized::GgmlDType;
    use rand::{RngCore, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::super::blocks::{Q2K, Q3K, Q4_0, Q4_1, Q4K, Q5_0, Q5_1, Q5K, Q6K, Q8_0};
    use super::*;

    /// Three rows of weights, widened, and their products with two rows of `x`, on the unit `simd`.
    fn run<S: Simd, T: Element>(simd: S, x: &[f32], w: &[T], len: usize) -> (Vec<f32>, Vec<f32>) {
        struct Widen<'a, T>(&'a [T], &'a mut [f32]);
        impl<T: Element> WithSimd for Widen<'_, T> {
            type Output = ();
            fn with_simd<S: Simd>(self, simd: S) {
                T::widen(simd, self.0, self.1);
            }
        }
        let rows = w.len() * T::LEN / len;
        let (mut wide, mut columns) = (vec![f32::NAN; rows * len], vec![f32::NAN; rows * 2]);
        simd.vectorize(Widen(w, &mut wide));
        let sums: Vec<_> = x.chunks_exact(len).flat_map(sums_of_groups).collect();
        simd.vectorize(Blocks { x, sums: &sums, w, len, columns: &mut columns });
        (wide, columns)
    }

    fn check<const SIZE: usize>(dtype: GgmlDType)
    where
        [u8; SIZE]: Element,
    {
        let mut random = ChaCha8Rng::seed_from_u64(3);
        for len in [256, 768, 1280] {
            let mut w = vec![[0u8; SIZE]; 3 * len / dtype.block_size()];
            for block in &mut w {
                random.fill_bytes(block);
                // Scales, wherever they are, that are neither infinite nor NaN.
                block.iter_mut().for_each(|byte| *byte &= 0xbf);
            }
            let value = |i: usize| ((i * 7919 + 13) % 201) as f32 / 100.0 - 1.0;
            let x: Vec<f32> = (0..2 * len).map(value).collect();
            let expected = dtype.from_data(w.as_flattened().into()).dequantize(3 * len);
            let expected = expected.and_then(|it| Ok(it.as_slice::<f32>()?.to_vec()));
            let expected = expected.unwrap_or_default();
            let check = |name: &str, (wide, columns): (Vec<f32>, Vec<f32>)| {
                let same = |(a, b): (&f32, &f32)| a == b;
                assert!(wide.len() == expected.len() && wide.iter().zip(&expected).all(same));
                let pairs = expected.chunks_exact(len).flat_map(|w| {
                    x.chunks_exact(len).map(move |x| x.iter().zip(w).map(|(x, w)| (*x, *w)))
                });
                for (got, pairs) in columns.iter().zip(pairs) {
                    let products = pairs.map(|(x, w)| f64::from(x) * f64::from(w));
                    let (sum, size) =
                        products.fold((0.0, 0.0), |(sum, size), it| (sum + it, size + it.abs()));
                    let apart = (f64::from(*got) - sum).abs();
                    assert!(apart <= 2e-6 * size, "{dtype:?} {name}: {got}, not {sum} of {size}");
                }
            };
            check("scalar", run(pulp::Scalar::new(), &x, &w, len));
            #[cfg(target_arch = "x86_64")]
            {
                use pulp::x86::{V3, V4};
                let v3 = V3::try_new().map(|simd| run(simd, &x, &w, len));
                let v4 = V4::try_new().map(|simd| run(simd, &x, &w, len));
                v3.into_iter().for_each(|got| check("AVX2", got));
                v4.into_iter().for_each(|got| check("AVX-512", got));
            }
        }
    }

    /// This processor takes one of these paths only, whoever has another one another.
    #[test]
    fn every_vector_unit_reads_every_block() {
        check::<{ size_of::<Q4_0>() }>(GgmlDType::Q4_0);
        check::<{ size_of::<Q4_1>() }>(GgmlDType::Q4_1);
        check::<{ size_of::<Q5_0>() }>(GgmlDType::Q5_0);
        check::<{ size_of::<Q5_1>() }>(GgmlDType::Q5_1);
        check::<{ size_of::<Q8_0>() }>(GgmlDType::Q8_0);
        check::<{ size_of::<Q2K>() }>(GgmlDType::Q2K);
        check::<{ size_of::<Q3K>() }>(GgmlDType::Q3K);
        check::<{ size_of::<Q4K>() }>(GgmlDType::Q4K);
        check::<{ size_of::<Q5K>() }>(GgmlDType::Q5K);
        check::<{ size_of::<Q6K>() }>(GgmlDType::Q6K);
    }
}
