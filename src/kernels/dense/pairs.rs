//! The product of many input rows with a weight in `bf16`, for processors that multiply pairs of these: as
//! `many_rows`, where a pair stands for a number.
//!
//! ```text
//! x   is rounded and packed once:   tiles of TOKENS, and in a tile, for each two k, the pairs of those tokens
//! w   goes by panels:               PANEL rows, of which RUN pairs at a time are copied
//! y'  += w' x'                      MICRO_PANEL rows of the panel by one tile: each pair of the weight is broadcast
//! ```
//!
//! Products of two `bf16` are exact in `f32`, and so only their sums are rounded. In which order those of a
//! pair are added, and whether what is too small for a normal number counts, is up to the processor.

use std::cell::RefCell;

use half::bf16;
use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;

use super::pair_simd::{LANES, OnPairSimd, Pair, PairSimd, on_pair_simd};
use super::panels::{PANEL, SIDE, by_panels, with_room};

/// Rows of `x` in a tile: two vectors.
const TOKENS: usize = 2 * LANES;

/// Pairs of each row of the weight that are copied at a time, and how far apart the copies lie: not a
/// power of two, or those of a micro-panel would compete for the same lines of the cache.
const RUN: usize = 512;
const APART: usize = RUN + SIDE;

/// Rows that share the loads of a tile: their sums, two registers each, and the tile itself leave five of
/// 32 registers free.
const MICRO_PANEL: usize = 12;

/// The pairs of a tile's tokens for two successive `k`. A line of the cache each, so that no load of a
/// register touches two.
#[derive(Clone, Copy)]
#[repr(align(64))]
struct Step([[Pair; LANES]; 2]);

/// Rows of input, rounded to `bf16` and packed.
pub(in crate::kernels) struct PairTiles {
    rows: usize,
    len: usize,
    /// Tiles of so many steps as there are pairs in a row. The last pair of an odd row, and rows that there
    /// are not, are filled up with zeros.
    packed: Vec<Step>,
}

impl PairTiles {
    /// From `x`, `(rows, len)`, neither of them 0.
    pub(in crate::kernels) fn new(x: &[f32], len: usize) -> Self {
        let (rows, steps) = (x.len() / len, len.div_ceil(2));
        let mut packed = vec![Step([[[0; 2]; LANES]; 2]); rows.div_ceil(TOKENS) * steps];
        let tiles = packed.par_chunks_mut(steps).zip(x.par_chunks(TOKENS * len));
        tiles.for_each(|(tile, x)| on_pair_simd(Pack { x, len, tile }));
        Self { rows, len, packed }
    }

    /// So many rows of ones, a multiple of every tile's, to measure speed with.
    pub(in crate::kernels) fn ones(rows: usize, len: usize) -> Self {
        let ones = Step([[[bf16::ONE.to_bits(); 2]; LANES]; 2]);
        Self { rows, len, packed: vec![ones; rows / TOKENS * len.div_ceil(2)] }
    }

    /// `x Wᵀ` for `w` of `(out, len)`: `(rows, out)`.
    pub(in crate::kernels) fn product(&self, w: &[bf16]) -> Vec<f32> {
        let (tiles, len) = (self.rows.div_ceil(TOKENS), self.len);
        by_panels((self.rows, tiles * TOKENS), w.len() / len, |of, columns| {
            self.panel(&w[of.start * len..of.end * len], columns);
        })
    }

    /// The columns of at most [`PANEL`] rows of a weight, on the calling thread: `(rows of w, tokens of all
    /// tiles)`.
    pub(in crate::kernels) fn panel(&self, w: &[bf16], columns: &mut [f32]) {
        thread_local! {
            static COPY: RefCell<Vec<Pair>> = const { RefCell::new(Vec::new()) };
        }
        let (x, len) = (self.packed.as_slice(), self.len);
        with_room(&COPY, PANEL * APART, |copy| on_pair_simd(Panel { x, w, len, copy, columns }));
    }
}

/// Turns up to [`TOKENS`] rows of `x`, `(rows, len)`, into a tile.
struct Pack<'a> {
    x: &'a [f32],
    len: usize,
    tile: &'a mut [Step],
}

impl OnPairSimd for Pack<'_> {
    #[inline(always)]
    fn run(self, _: impl PairSimd) {
        // A few steps at a time, whose lines stay in the first-level cache.
        for (block, steps) in self.tile.chunks_mut(SIDE).enumerate() {
            for (token, x) in self.x.chunks_exact(self.len).enumerate() {
                let (half, lane) = (token / LANES, token % LANES);
                for (step, pair) in steps.iter_mut().zip(pairs(&x[2 * SIDE * block..])) {
                    step.0[half][lane] = pair;
                }
            }
        }
    }
}

/// The first pairs of a row, rounded. What there is not is 0.
#[inline(always)]
fn pairs(x: &[f32]) -> [Pair; SIDE] {
    let mut pairs = [[0; 2]; SIDE];
    let rounded = pairs.as_flattened_mut();
    match x.first_chunk::<{ 2 * SIDE }>() {
        Some(x) => rounded.iter_mut().zip(x).for_each(|(to, x)| *to = round(*x)),
        None => rounded.iter_mut().zip(x).for_each(|(to, x)| *to = round(*x)),
    }
    pairs
}

/// The bits of the nearest `bf16`, and of two that are as near, of the even one: as `half` does it, but
/// without a branch, so that it can be compiled into a loop.
#[inline(always)]
fn round(x: f32) -> u16 {
    const QUIET: u16 = 1 << 6; // or the bits that make a NaN might be those that are cut off
    let bits = x.to_bits();
    let up = bits.wrapping_add(0x7fff + (bits >> 16 & 1));
    if x.is_nan() { (bits >> 16) as u16 | QUIET } else { (up >> 16) as u16 }
}

struct Panel<'a> {
    /// Tiles.
    x: &'a [Step],
    w: &'a [bf16],
    len: usize,
    /// A buffer for a run of each row.
    copy: &'a mut [Pair],
    /// `(rows of w, tokens of all tiles)`
    columns: &'a mut [f32],
}

impl OnPairSimd for Panel<'_> {
    #[inline(always)]
    fn run(self, simd: impl PairSimd) {
        let Self { x, w, len, copy, columns } = self;
        let steps = len.div_ceil(2);
        let padded = x.len() / steps * TOKENS;
        for start in (0..steps).step_by(RUN) {
            let run = RUN.min(steps - start);
            let mut panel: [&[Pair]; PANEL] = [&[]; PANEL];
            let rows = w.chunks_exact(len).zip(copy.chunks_exact_mut(APART));
            for (row, (w, copy)) in panel.iter_mut().zip(rows) {
                let w = w[2 * start..len.min(2 * (start + run))].reinterpret_cast();
                let copy = &mut copy[..run];
                if let Some([_, odd]) = copy.last_mut() {
                    *odd = 0;
                }
                copy.as_flattened_mut()[..w.len()].copy_from_slice(w);
                *row = copy;
            }
            for (tile, x) in x.chunks_exact(steps).enumerate() {
                let x = &x[start..start + run];
                let columns = columns.chunks_mut(MICRO_PANEL * padded);
                for (micro_panel, columns) in panel.chunks_exact(MICRO_PANEL).zip(columns) {
                    // Past the last row of the weight, the first is multiplied again, to no effect.
                    let weights = std::array::from_fn(|row| match micro_panel[row] {
                        [] => &micro_panel[0][..run],
                        w => &w[..run],
                    });
                    let columns = columns.chunks_exact_mut(padded);
                    for (column, sums) in columns.zip(times(simd, weights, x)) {
                        let (places, _) = column[tile * TOKENS..].as_chunks_mut();
                        for (place, sums) in places.iter_mut().zip(sums) {
                            simd.store(sums, place, start > 0);
                        }
                    }
                }
            }
        }
    }
}

/// Each sum is a variable of its own: in an array they would be kept in memory.
macro_rules! times {
    ($($w:ident $left:ident $right:ident),*) => {
        /// `Σ w[n][k] · x[k]` over pairs, for each row `n` and both vectors of a tile.
        #[inline(always)]
        fn times<U: PairSimd>(
            simd: U,
            w: [&[Pair]; MICRO_PANEL],
            x: &[Step],
        ) -> [[U::Sums; 2]; MICRO_PANEL] {
            assert!(w.iter().all(|w| w.len() == x.len()), "a pair for each step");
            let [$($w),*] = w;
            $(let [mut $left, mut $right] = [simd.zero(); 2];)*
            for (k, Step([x_left, x_right])) in x.iter().enumerate() {
                let (x_left, x_right) = (simd.load(x_left), simd.load(x_right));
                $(
                    // SAFETY: `k` is below `x.len()`, which is the length of every row, as asserted
                    // above. A check at each weight would be another exit from the loop, and the
                    // sums would be kept in memory, at a quarter of the speed.
                    let w = simd.splat(unsafe { *$w.get_unchecked(k) });
                    $left = simd.add(w, x_left, $left);
                    $right = simd.add(w, x_right, $right);
                )*
            }
            [$([$left, $right]),*]
        }
    };
}

times!(w0 l0 r0, w1 l1 r1, w2 l2 r2, w3 l3 r3, w4 l4 r4, w5 l5 r5,
    w6 l6 r6, w7 l7 r7, w8 l8 r8, w9 l9 r9, w10 l10 r10, w11 l11 r11);

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::super::pair_simd::Plain;
    use super::*;

    /// A processor takes one of these only; others take the other.
    const UNITS: [&str; 2] = ["none", "this processor's"];

    /// `x Wᵀ` for at most [`PANEL`] rows of `w` on a vector unit, without what fills up tiles.
    fn columns(unit: &str, x: &[f32], w: &[bf16], len: usize) -> Vec<f32> {
        let tiles = PairTiles::new(x, len);
        let padded = tiles.rows.next_multiple_of(TOKENS);
        // Old contents must not matter.
        let mut columns = vec![f32::NAN; w.len() / len * padded];
        let mut copy = vec![[u16::MAX; 2]; PANEL * APART];
        let panel = Panel { x: &tiles.packed, w, len, copy: &mut copy, columns: &mut columns };
        match unit {
            "none" => panel.run(Plain),
            _ => on_pair_simd(panel),
        }
        let rows = columns.chunks_exact(padded);
        rows.flat_map(|column| &column[..tiles.rows]).copied().collect()
    }

    /// Every vector unit gives the sum of the products of rounded numbers, as far as the sums
    /// themselves are rounded: once for each product.
    fn check(x: &[f32], w: &[bf16], len: usize) {
        let exact = w.chunks_exact(len).flat_map(|w| {
            x.chunks_exact(len).map(move |x| {
                let products =
                    x.iter().zip(w).map(|(x, w)| bf16::from_f32(*x).to_f64() * w.to_f64());
                products.fold((0.0, 0.0), |(sum, size), it| (sum + it, size + it.abs()))
            })
        });
        let exact: Vec<(f64, f64)> = exact.collect();
        for unit in UNITS {
            let got = columns(unit, x, w, len);
            assert_eq!(got.len(), exact.len(), "{unit}");
            for (got, (sum, size)) in got.iter().zip(&exact) {
                let apart = (f64::from(*got) - sum).abs();
                let bound = len as f64 * (size * f64::from(f32::EPSILON) + 2f64.powi(-125));
                assert!(apart <= bound, "{unit}, rows of {len}: {got}, not {sum}");
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        #[test]
        fn every_vector_unit_multiplies_pairs(
            rows in 1usize..80, len in 1usize..90, out in 1usize..=PANEL, exponent in -30i32..30,
            seed: u64,
        ) {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            let scale = 2f32.powi(exponent);
            let x: Vec<f32> = (0..rows * len).map(|_| scale * rng.random_range(-1f32..1.0)).collect();
            let w = (0..out * len).map(|_| bf16::from_f32(rng.random_range(-1f32..1.0)));
            check(&x, &w.collect::<Vec<_>>(), len);
        }

        #[test]
        fn rounding_is_that_of_half(bits: u32) {
            let x = f32::from_bits(bits);
            prop_assert_eq!(round(x), bf16::from_f32(x).to_bits());
        }
    }

    /// Rows of several runs, the last of which is odd.
    #[test]
    fn long_rows_are_summed_up_run_by_run() {
        for len in [2 * RUN, 2 * RUN + 1, 4 * RUN + 7] {
            let value = |index: usize| ((index * 7919 + 13) % 201) as f32 / 100.0 - 1.0;
            let x: Vec<f32> = (0..33 * len).map(value).collect();
            let w: Vec<_> = (0..13 * len).map(|index| bf16::from_f32(value(index + 5))).collect();
            check(&x, &w, len);
        }
    }

    /// What is no number stays none, in its row and in no other, and beside an odd end as elsewhere.
    #[test]
    fn what_is_no_number_stays_none() {
        for (len, at) in [(6, 2), (7, 6)] {
            let mut x = vec![1f32; 3 * len];
            x[len + at] = f32::NAN;
            let w = vec![bf16::ONE; 5 * len];
            for unit in UNITS {
                for (index, y) in columns(unit, &x, &w, len).iter().enumerate() {
                    assert_eq!(y.is_nan(), index % 3 == 1, "{unit}");
                    assert!(y.is_nan() || *y == len as f32, "{unit}");
                }
            }
        }
    }

    /// More panels and tiles than one, and each element in its place.
    #[test]
    fn whole_products_are_panels_side_by_side() {
        let (rows, len, out) = (70, 9, 2 * PANEL + 5);
        let value = |index: usize| ((index * 31) % 17) as f32 - 8.0;
        let x: Vec<f32> = (0..rows * len).map(value).collect();
        let w: Vec<f32> = (0..out * len).map(|index| value(index + 3)).collect();
        let narrow: Vec<bf16> = w.iter().map(|w| bf16::from_f32(*w)).collect();
        let dot = |x: &[f32], w: &[f32]| x.iter().zip(w).map(|(x, w)| x * w).sum::<f32>();
        let expected = x.chunks(len).flat_map(|x| w.chunks(len).map(move |w| dot(x, w)));
        // Whole numbers, so that nothing is rounded
        assert_eq!(PairTiles::new(&x, len).product(&narrow), expected.collect::<Vec<_>>());
    }
}
