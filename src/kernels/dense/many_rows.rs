//! The product of many input rows with a weight, limited by the speed of arithmetic.
//!
//! ```text
//! x   is packed once:   tiles of a few tokens, and in a tile, for each k, those tokens side by side
//! w   goes by panels:   PANEL rows, of which RUN weights at a time are widened to f32
//! y'  += w' x'          MICRO_PANEL rows of the panel by one tile: sums stay in registers for a whole run
//! ```
//!
//! A tile fills two vector registers, so a step of `k` loads these, and each weight of the micro-panel
//! is broadcast to a register and multiplied with both. Rows of a weight are read as they lie: the much
//! smaller `x` is transposed instead. The result is `yᵀ`, and each panel of it is transposed back while
//! it is in the cache.

use std::cell::RefCell;
use std::mem::MaybeUninit;

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::element::{Element, RUN};
use super::panels::{PANEL, SIDE, by_panels, with_room};

/// Rows that share the loads of a tile: their sums, two registers each, and the tile itself leave one of
/// 32 registers free, or of 16.
const MICRO_PANEL: usize = 12;
const SMALL_MICRO_PANEL: usize = 6;

/// Rows of input, packed.
pub(in crate::kernels) struct Tiles {
    rows: usize,
    len: usize,
    /// Tiles of `(len, tokens)`, filled up with zeros.
    packed: Vec<f32>,
}

impl Tiles {
    /// From `x`, `(rows, len)`, neither of them 0.
    pub(in crate::kernels) fn new(x: &[f32], len: usize) -> Self {
        Self { rows: x.len() / len, len, packed: Arch::new().dispatch(Pack { x, len }) }
    }

    /// So many rows of ones, a multiple of every tile's, to measure speed with.
    pub(in crate::kernels) fn ones(rows: usize, len: usize) -> Self {
        Self { rows, len, packed: vec![1.0; rows * len] }
    }

    /// `x Wᵀ` for `w` of `(out, len)`: `(rows, out)`.
    pub(in crate::kernels) fn product<T: Element>(&self, w: &[T]) -> Vec<f32> {
        let row_len = self.len / T::LEN;
        by_panels((self.rows, self.padded()), w.len() / row_len, |of, columns| {
            self.panel(&w[of.start * row_len..of.end * row_len], columns);
        })
    }

    /// The columns of at most [`PANEL`] rows of a weight, on the calling thread: `(rows of w, padded)`.
    pub(in crate::kernels) fn panel<T: Element>(&self, w: &[T], columns: &mut [f32]) {
        thread_local! {
            static WIDE: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
        }
        let (x, len) = (self.packed.as_slice(), self.len);
        with_room(&WIDE, if T::NARROW { PANEL * RUN } else { 0 }, |wide| {
            Arch::new().dispatch(Panel { x, w, len, wide, columns });
        });
    }

    /// Rows, and those that fill up the last tile.
    fn padded(&self) -> usize {
        self.packed.len() / self.len
    }
}

/// Turns `x` of `(rows, len)` into tiles.
struct Pack<'a> {
    x: &'a [f32],
    len: usize,
}

impl WithSimd for Pack<'_> {
    type Output = Vec<f32>;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> Vec<f32> {
        let (len, tokens) = (self.len, 2 * S::F32_LANES);
        let rows = self.x.len() / len;
        let size = rows.next_multiple_of(tokens) * len;
        let mut packed = Vec::with_capacity(size);
        let tiles = packed.spare_capacity_mut()[..size].par_chunks_mut(tokens * len);
        tiles.zip(self.x.par_chunks(tokens * len)).for_each(|(tile, x)| {
            // A few steps at a time, whose lines stay in the first-level cache.
            for (block, steps) in tile.chunks_mut(SIDE * tokens).enumerate() {
                for (token, x) in x.chunks_exact(len).enumerate() {
                    for (step, x) in steps.chunks_exact_mut(tokens).zip(&x[block * SIDE..]) {
                        step[token].write(*x);
                    }
                }
                for step in steps.chunks_exact_mut(tokens) {
                    step[x.len() / len..].fill(MaybeUninit::new(0.0));
                }
            }
        });
        // SAFETY: there is room for `size`, and each step of each tile, of which there are as many as tiles
        // of `x`, has been written: the tokens that there are, and zeros behind them.
        unsafe { packed.set_len(size) };
        packed
    }
}

struct Panel<'a, T> {
    /// Tiles of `(len, tokens)`.
    x: &'a [f32],
    w: &'a [T],
    len: usize,
    /// A buffer for a run of each row in `f32`, where weights are narrower.
    wide: &'a mut [f32],
    /// `(rows of w, tokens of all tiles)`
    columns: &'a mut [f32],
}

impl<T: Element> WithSimd for Panel<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        if S::REGISTER_COUNT >= 32 {
            self.multiply::<S, MICRO_PANEL>(simd);
        } else {
            self.multiply::<S, SMALL_MICRO_PANEL>(simd);
        }
    }
}

impl<T: Element> Panel<'_, T> {
    #[inline(always)]
    fn multiply<S: Simd, const N: usize>(self, simd: S)
    where
        for<'b> [&'b [f32]; N]: MicroKernel<S>,
    {
        let Self { x, w, len, wide, columns } = self;
        let (tokens, padded) = (2 * S::F32_LANES, x.len() / len);
        let row_len = len / T::LEN;
        for start in (0..len).step_by(RUN) {
            let run = RUN.min(len - start);
            // The run of each row in f32, which is in the weight or in `wide`.
            let mut panel: [&[f32]; PANEL] = [&[]; PANEL];
            let mut rooms = wide.chunks_exact_mut(RUN);
            for (row, w) in panel.iter_mut().zip(w.chunks_exact(row_len)) {
                let wide = rooms.next().unwrap_or_default();
                *row = T::widen(simd, &w[start / T::LEN..][..run / T::LEN], wide);
            }
            for (tile, x) in x.chunks_exact(tokens * len).enumerate() {
                let (x, _) = S::as_simd_f32s(&x[start * tokens..][..run * tokens]);
                let (x, _) = x.as_chunks::<2>();
                let micro_panels = panel.chunks_exact(N).zip(columns.chunks_mut(N * padded));
                for (micro_panel, columns) in micro_panels {
                    // Past the last row of the weight, the first is multiplied again, to no effect.
                    let weights = std::array::from_fn(|row| match micro_panel[row] {
                        [] => &micro_panel[0][..run],
                        w => &w[..run],
                    });
                    let columns = columns.chunks_exact_mut(padded);
                    for (column, sums) in columns.zip(MicroKernel::times(weights, simd, x)) {
                        let (place, _) =
                            S::as_mut_simd_f32s(&mut column[tile * tokens..][..tokens]);
                        for (place, sum) in place.iter_mut().zip(sums) {
                            *place = if start == 0 { sum } else { simd.add_f32s(*place, sum) };
                        }
                    }
                }
            }
        }
    }
}

/// As many rows of a weight as share the loads of a tile: a micro-panel.
pub(in crate::kernels) trait MicroKernel<S: Simd>: Sized {
    /// `Σ w[n][k] · x[k]` for each row `n`.
    fn times(self, simd: S, x: &[[S::f32s; 2]]) -> impl Iterator<Item = [S::f32s; 2]>;
}

/// Each sum is a variable of its own: in an array they would be kept in memory.
macro_rules! micro_kernel {
    ($count:literal: $($w:ident $left:ident $right:ident),*) => {
        impl<S: Simd> MicroKernel<S> for [&[f32]; $count] {
            #[inline(always)]
            fn times(self, simd: S, x: &[[S::f32s; 2]]) -> impl Iterator<Item = [S::f32s; 2]> {
                assert!(self.iter().all(|w| w.len() == x.len()), "a weight for each step");
                let [$($w),*] = self;
                $(let [mut $left, mut $right] = [simd.splat_f32s(0.0); 2];)*
                for (k, &[x_left, x_right]) in x.iter().enumerate() {
                    $(
                        // SAFETY: `k` is below `x.len()`, which is the length of every row, as asserted
                        // above. A check at each weight would be another exit from the loop, and the
                        // sums would be kept in memory, at a quarter of the speed.
                        let w = simd.splat_f32s(unsafe { *$w.get_unchecked(k) });
                        $left = simd.mul_add_e_f32s(w, x_left, $left);
                        $right = simd.mul_add_e_f32s(w, x_right, $right);
                    )*
                }
                [$([$left, $right]),*].into_iter()
            }
        }
    };
}

micro_kernel!(6: w0 l0 r0, w1 l1 r1, w2 l2 r2, w3 l3 r3, w4 l4 r4, w5 l5 r5);
micro_kernel!(12: w0 l0 r0, w1 l1 r1, w2 l2 r2, w3 l3 r3, w4 l4 r4, w5 l5 r5,
    w6 l6 r6, w7 l7 r7, w8 l8 r8, w9 l9 r9, w10 l10 r10, w11 l11 r11);

#[cfg(test)]
mod tests {
    use super::*;

    /// The columns of a panel of `w`, on the vector unit `simd`.
    fn columns<S: Simd>(simd: S, x: &[f32], w: &[f32], len: usize) -> Vec<f32> {
        let packed = simd.vectorize(Pack { x, len });
        let padded = packed.len() / len;
        // Old contents must not matter.
        let mut columns = vec![f32::NAN; w.len() / len * padded];
        simd.vectorize(Panel { x: &packed, w, len, wide: &mut [], columns: &mut columns });
        let rows = columns.chunks_exact(padded);
        rows.flat_map(|column| &column[..x.len() / len]).copied().collect()
    }

    /// A processor takes only one of these paths; others take the others.
    #[test]
    fn every_vector_unit_multiplies() {
        for (rows, len, out) in [(1, 1, 1), (33, 7, 5), (20, RUN, 12), (70, 2 * RUN + 9, PANEL)] {
            let value = |index: usize| ((index * 7919 + 13) % 201) as f32 / 100.0 - 1.0;
            let x: Vec<f32> = (0..rows * len).map(value).collect();
            let w: Vec<f32> = (0..out * len).map(|index| value(index + 5)).collect();
            let expected = w.chunks_exact(len).flat_map(|w| {
                let products = move |x: &[f32]| -> f64 {
                    x.iter().zip(w).map(|(x, w)| f64::from(*x) * f64::from(*w)).sum()
                };
                x.chunks_exact(len).map(products)
            });
            let expected: Vec<f64> = expected.collect();
            let check = |name: &str, got: Vec<f32>| {
                assert_eq!(got.len(), expected.len(), "{name}");
                for (got, expected) in got.into_iter().zip(&expected) {
                    let apart = (f64::from(got) - expected).abs();
                    assert!(apart < 1e-5 * (len as f64).sqrt(), "{name}: {got}, not {expected}");
                }
            };
            check("scalar", columns(pulp::Scalar::new(), &x, &w, len));
            #[cfg(target_arch = "x86_64")]
            {
                use pulp::x86::{V3, V4};
                let v3 = V3::try_new().map(|simd| columns(simd, &x, &w, len));
                let v4 = V4::try_new().map(|simd| columns(simd, &x, &w, len));
                v3.into_iter().for_each(|got| check("AVX2", got));
                v4.into_iter().for_each(|got| check("AVX-512", got));
            }
        }
    }
}
