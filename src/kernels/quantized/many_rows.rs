//! The product of many input rows with a weight in blocks, both in bytes: for processors that multiply four
//! times as many of these as `f32`.
//!
//! ```text
//! x   is rounded and packed once:   tiles of TOKENS, in which every PART of a token has a scale, and 32 bytes
//! w   goes by panels:               PANEL rows, of which RUN parts at a time are unpacked to bytes
//! y'  += w' x'                      MICRO_PANEL rows of the panel by one tile, part by part:
//!                                   whole = Σ q x                  exact, in i32
//!                                   sum  += (d · scale) whole      in f32; and where there are minima
//!                                   sum  -= m · Σ x
//! ```
//!
//! Instructions multiply bytes without a sign by bytes with one. The numbers of a block get one: 8 of 4 bits
//! is subtracted from them. Those of `x` lose theirs: they lie between 1 and 255, and 128 times the numbers of a
//! block is what sums begin below 0 with.

use std::cell::RefCell;
use std::ops::Range;

use pulp::{Arch, Simd, WithSimd, cast};
use rayon::prelude::*;

use super::super::dense::{PANEL, by_panels, with_room};
use super::blocks::QuantBlock;
use super::chunk::{CHUNK, PART, SCALE_GROUP};
use super::simd::{OnQuantSimd, QuantSimd, on_quant_simd};
use super::whole_simd::{LANES, OnWholeSimd, Quad, WholeSimd, on_whole_simd};

/// Rows of `x` in a tile: two vectors.
const TOKENS: usize = 2 * LANES;

/// Parts of each row of the weight that are unpacked at a time: whole chunks.
const RUN: usize = 4 * CHUNK / PART;

/// Rows that share the loads of a tile: their sums in `i32` and in `f32`, two registers each, and the tile
/// itself leave six of 32 registers free.
const MICRO_PANEL: usize = 6;

/// Products of a part with those of a register.
const STEPS: usize = PART / size_of::<Quad>();

/// What makes a byte with a sign one without.
const LIFT: i32 = 128;

/// A part of the tokens of a tile.
#[derive(Clone, Copy)]
#[repr(align(64))] // a line of the cache, so that no load of a register touches two
struct TilePart {
    /// `(steps, tokens)`
    quads: [[[Quad; LANES]; 2]; STEPS],
    /// What one is worth.
    scale: [[f32; LANES]; 2],
    /// The sums of both groups, with the scale.
    sums: [[[f32; LANES]; 2]; PART / SCALE_GROUP],
}

/// A part of a row of the weight. A line of the cache.
#[derive(Clone, Copy, Default)]
#[repr(align(64))]
struct RowPart {
    /// With a sign.
    quads: [Quad; STEPS],
    /// Scales, minima, and what sums begin with: for both groups, or for all where these have the same scale.
    d: [f32; 2],
    m: [f32; 2],
    start: [i32; 2],
}

/// Rows of input, rounded to bytes and packed.
pub(in crate::kernels) struct ByteTiles {
    rows: usize,
    /// Of a row.
    parts: usize,
    /// Tiles of so many parts; rows that there are not are filled up with zeros.
    packed: Vec<TilePart>,
}

impl ByteTiles {
    /// From `x`, `(rows, len)`, neither of them 0; of blocks, `len` is whole parts.
    pub(in crate::kernels) fn new(x: &[f32], len: usize) -> Self {
        let (rows, parts) = (x.len() / len, len / PART);
        let mut packed = vec![TilePart::EMPTY; rows.div_ceil(TOKENS) * parts];
        let tiles = packed.par_chunks_mut(parts.max(1)).zip(x.par_chunks(TOKENS * len));
        tiles.for_each(|(tile, x)| Arch::new().dispatch(Pack { x, len, tile }));
        Self { rows, parts, packed }
    }

    /// So many rows of zeros, a multiple of every tile's, to measure speed with.
    pub(in crate::kernels) fn zeros(rows: usize, len: usize) -> Self {
        let parts = len / PART;
        Self { rows, parts, packed: vec![TilePart::EMPTY; rows / TOKENS * parts] }
    }

    /// `x Wᵀ` for `w` of `(out, len)`: `(rows, out)`.
    pub(in crate::kernels) fn product<B: QuantBlock>(&self, w: &[B]) -> Vec<f32> {
        let (row_len, tiles) = (self.parts * PART / B::LEN, self.rows.div_ceil(TOKENS));
        by_panels((self.rows, tiles * TOKENS), w.len() / row_len.max(1), |of, columns| {
            self.panel(&w[of.start * row_len..of.end * row_len], columns);
        })
    }

    /// The columns of at most [`PANEL`] rows of a weight, on the calling thread: `(rows of w, tokens of all
    /// tiles)`.
    pub(in crate::kernels) fn panel<B: QuantBlock>(&self, w: &[B], columns: &mut [f32]) {
        thread_local! {
            static UNPACKED: RefCell<Vec<RowPart>> = const { RefCell::new(Vec::new()) };
        }
        let unpack = |unpack: Unpack<'_, B>| Arch::new().dispatch(unpack);
        with_room(&UNPACKED, PANEL * RUN, |rows| {
            self.multiply(w, rows, columns, unpack, |multiply| on_whole_simd(multiply));
        });
    }

    /// Unpacks runs into `rows` and multiplies them.
    fn multiply<B: QuantBlock>(
        &self,
        w: &[B],
        rows: &mut [RowPart],
        columns: &mut [f32],
        unpack: impl Fn(Unpack<'_, B>),
        multiply: impl Fn(Multiply<'_>),
    ) {
        let row_len = self.parts * PART / B::LEN;
        for start in (0..self.parts).step_by(RUN) {
            let run = RUN.min(self.parts - start);
            let blocks = start * PART / B::LEN..(start + run) * PART / B::LEN;
            unpack(Unpack { w, row_len, blocks, run, rows });
            multiply(Multiply {
                tiles: &self.packed,
                parts: self.parts,
                start,
                run,
                rows: &rows[..w.len() / row_len * RUN],
                columns,
                groups: B::GROUPS,
                minima: B::CENTRE.is_none(),
            });
        }
    }
}

impl TilePart {
    const EMPTY: Self = Self {
        quads: [[[[0; 4]; LANES]; 2]; STEPS],
        scale: [[0.0; LANES]; 2],
        sums: [[[0.0; LANES]; 2]; 2],
    };
}

/// Turns up to [`TOKENS`] rows of `x`, `(rows, len)`, into a tile.
struct Pack<'a> {
    x: &'a [f32],
    len: usize,
    tile: &'a mut [TilePart],
}

impl WithSimd for Pack<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        // A few parts at a time, whose lines stay in the first-level cache.
        const AT_ONCE: usize = CHUNK / PART;
        for (block, tile) in self.tile.chunks_mut(AT_ONCE).enumerate() {
            for (token, x) in self.x.chunks_exact(self.len).enumerate() {
                let (half, lane) = (token / LANES, token % LANES);
                let (parts, _) = x[block * CHUNK..].as_chunks::<PART>();
                for (x, part) in parts.iter().zip(tile.iter_mut()) {
                    let (quads, scale, sums) = round(x);
                    for (place, quad) in part.quads.iter_mut().zip(quads) {
                        place[half][lane] = quad;
                    }
                    part.scale[half][lane] = scale;
                    for (place, sum) in part.sums.iter_mut().zip(sums) {
                        place[half][lane] = sum;
                    }
                }
            }
        }
    }
}

/// A part of a row as bytes from 1 to 255, of which 128 are 0, with what one is worth and the sums of both
/// groups.
#[inline(always)]
fn round(x: &[f32; PART]) -> ([Quad; STEPS], f32, [f32; PART / SCALE_GROUP]) {
    const SIGN: u32 = 1 << 31;
    /// Between 2²³ and 2²⁴, `f32` has no fractional bits: those of a smaller number that is added are
    /// rounded away, and the difference of the bits is the integer.
    const TO_WHOLE: f32 = (3 << 22) as f32;
    /// The inverse of a smaller one might be infinite.
    const LEAST: f32 = 1e-36;

    // Without the sign, the bits of `f32` order as the magnitudes do, with NaN the largest.
    let largest = x.iter().fold(0, |largest, x| largest.max(x.to_bits() & !SIGN));
    let largest = f32::from_bits(largest);
    let (scale, to_scale) = match largest {
        LEAST..=f32::MAX => (largest / 127.0, 127.0 / largest),
        ..LEAST => (0.0, 0.0),
        _ => (f32::NAN, 0.0), // infinite or NaN
    };
    let mut whole = [0i32; PART];
    for (whole, x) in whole.iter_mut().zip(x) {
        let scaled = if to_scale > 0.0 { x * to_scale } else { 0.0 };
        *whole = (scaled + TO_WHOLE).to_bits() as i32 - TO_WHOLE.to_bits() as i32;
    }
    let mut quads = [[0; 4]; STEPS];
    for (byte, whole) in quads.as_flattened_mut().iter_mut().zip(whole) {
        *byte = (whole + LIFT) as u8;
    }
    let mut sums = [0.0; PART / SCALE_GROUP];
    for (sum, group) in sums.iter_mut().zip(whole.as_chunks::<SCALE_GROUP>().0) {
        *sum = scale * group.iter().sum::<i32>() as f32;
    }
    (quads, scale, sums)
}

/// A run of each row of the weight, to be unpacked.
struct Unpack<'a, B> {
    /// Rows of so many blocks.
    w: &'a [B],
    row_len: usize,
    /// Those of the run, from the beginning of a chunk on, and how many parts that is.
    blocks: Range<usize>,
    run: usize,
    /// Each [`RUN`] after the one before.
    rows: &'a mut [RowPart],
}

impl<B: QuantBlock> WithSimd for Unpack<'_, B> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        on_quant_simd(simd, self);
    }
}

impl<B: QuantBlock> OnQuantSimd for Unpack<'_, B> {
    type Output = ();

    #[inline(always)]
    fn run(self, simd: impl QuantSimd) {
        let rows = self.w.chunks_exact(self.row_len).zip(self.rows.chunks_exact_mut(RUN));
        for (w, row) in rows {
            let chunks = w[self.blocks.clone()].chunks(CHUNK / B::LEN);
            for (chunk, row) in chunks.zip(row[..self.run].chunks_mut(CHUNK / PART)) {
                unpack(simd, chunk, row);
            }
        }
    }
}

/// The parts of a chunk, or of as many small blocks as there are.
#[inline(always)]
fn unpack<B: QuantBlock>(simd: impl QuantSimd, chunk: &[B], row: &mut [RowPart]) {
    let (mut d, mut m) = ([0.0; CHUNK / SCALE_GROUP], [0.0; CHUNK / SCALE_GROUP]);
    B::scales(simd, chunk, &mut d, &mut m);
    let groups = d.as_chunks().0.iter().zip(m.as_chunks().0);
    for (part, (to, (d, m))) in row.iter_mut().zip(groups).enumerate() {
        let mut numbers = B::numbers(simd, chunk, part);
        if let Some(centre) = B::CENTRE
            && centre > 0
        {
            numbers = simd.add(numbers, centre.wrapping_neg());
        }
        let [first, second] = simd.signed_sums(numbers);
        let start = if B::GROUPS == 1 { [first + second, 0] } else { [first, second] };
        let quads = cast(simd.signed(numbers));
        *to = RowPart { quads, d: *d, m: *m, start: start.map(|sum| -LIFT * sum) };
    }
}

/// The product of a run of some rows with all tiles.
struct Multiply<'a> {
    tiles: &'a [TilePart],
    /// Of a tile.
    parts: usize,
    /// Which of them.
    start: usize,
    run: usize,
    /// Runs of the rows, each [`RUN`] after the one before.
    rows: &'a [RowPart],
    /// `(rows of w, tokens of all tiles)`
    columns: &'a mut [f32],
    /// Groups of a part that have a scale of their own, and whether these have minima.
    groups: usize,
    minima: bool,
}

impl OnWholeSimd for Multiply<'_> {
    #[inline(always)]
    fn run(self, simd: impl WholeSimd) {
        match (self.groups, self.minima) {
            (1, false) => self.by_groups::<1, false>(simd),
            (1, true) => self.by_groups::<1, true>(simd),
            (_, false) => self.by_groups::<2, false>(simd),
            (_, true) => self.by_groups::<2, true>(simd),
        }
    }
}

impl Multiply<'_> {
    #[inline(always)]
    fn by_groups<const GROUPS: usize, const MINIMA: bool>(self, simd: impl WholeSimd) {
        let Self { tiles, parts, start, run, rows, columns, .. } = self;
        let padded = tiles.len() / parts * TOKENS;
        for (tile, x) in tiles.chunks_exact(parts).enumerate() {
            let x = &x[start..start + run];
            let columns = columns.chunks_mut(MICRO_PANEL * padded);
            for (rows, columns) in rows.chunks(MICRO_PANEL * RUN).zip(columns) {
                // Past the last row of the weight, the first is multiplied again, to no effect.
                let row = |row: usize| rows.get(row * RUN..).filter(|rows| !rows.is_empty());
                let w = std::array::from_fn(|index| &row(index).unwrap_or(rows)[..run]);
                let sums = times::<_, GROUPS, MINIMA>(simd, w, x);
                for (column, sums) in columns.chunks_exact_mut(padded).zip(sums) {
                    let (places, _) = column[tile * TOKENS..].as_chunks_mut();
                    for (place, sums) in places.iter_mut().zip(sums) {
                        let old = simd.load_sums(place);
                        simd.store(if start > 0 { simd.add(old, sums) } else { sums }, place);
                    }
                }
            }
        }
    }
}

/// Each sum is a variable of its own: in an array they would be kept in memory.
macro_rules! times {
    ($($w:ident $whole_left:ident $whole_right:ident $left:ident $right:ident),*) => {
        /// `Σ w[n] · x` for each row `n` and both vectors of a tile.
        #[inline(always)]
        fn times<U: WholeSimd, const GROUPS: usize, const MINIMA: bool>(
            simd: U,
            w: [&[RowPart]; MICRO_PANEL],
            x: &[TilePart],
        ) -> [[U::Sums; 2]; MICRO_PANEL] {
            assert!(w.iter().all(|w| w.len() == x.len()), "a part for each part");
            let [$($w),*] = w;
            $(let [mut $left, mut $right] = [simd.splat(0.0); 2];)*
            for (index, x) in x.iter().enumerate() {
                // SAFETY: `index` is below `x.len()`, which is the length of every row, as asserted above.
                // A check at each would be another exit from the loop, and the sums would be kept in
                // memory.
                $(let $w = unsafe { $w.get_unchecked(index) };)*
                for group in 0..GROUPS {
                    $(let [mut $whole_left, mut $whole_right] = [simd.splat_whole($w.start[group]); 2];)*
                    for step in group * (STEPS / GROUPS)..(group + 1) * (STEPS / GROUPS) {
                        let [x_left, x_right] = &x.quads[step];
                        let (x_left, x_right) = (simd.load(x_left), simd.load(x_right));
                        $(
                            let q = simd.splat_quad($w.quads[step]);
                            $whole_left = simd.dot($whole_left, x_left, q);
                            $whole_right = simd.dot($whole_right, x_right, q);
                        )*
                    }
                    let [x_left, x_right] = &x.scale;
                    let (x_left, x_right) = (simd.load_sums(x_left), simd.load_sums(x_right));
                    $(
                        let d = simd.splat($w.d[group]);
                        $left = simd.mul_add(simd.to_sums($whole_left), simd.mul(d, x_left), $left);
                        $right = simd.mul_add(simd.to_sums($whole_right), simd.mul(d, x_right), $right);
                    )*
                    if MINIMA {
                        let [left, right] = &x.sums[group];
                        let (mut x_left, mut x_right) = (simd.load_sums(left), simd.load_sums(right));
                        if GROUPS == 1 {
                            let [left, right] = &x.sums[1];
                            x_left = simd.add(x_left, simd.load_sums(left));
                            x_right = simd.add(x_right, simd.load_sums(right));
                        }
                        $(
                            let m = simd.splat(-$w.m[group]);
                            $left = simd.mul_add(m, x_left, $left);
                            $right = simd.mul_add(m, x_right, $right);
                        )*
                    }
                }
            }
            [$([$left, $right]),*]
        }
    };
}

times!(w0 a0 b0 l0 r0, w1 a1 b1 l1 r1, w2 a2 b2 l2 r2,
    w3 a3 b3 l3 r3, w4 a4 b4 l4 r4, w5 a5 b5 l5 r5);

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::every_block::{OnBlocks, every_block};
    use super::super::simd::Plain;
    use super::*;

    /// The columns of a panel without what fills up tiles, unpacked and multiplied by these.
    fn columns<B: QuantBlock>(
        tiles: &ByteTiles,
        w: &[B],
        unpack: impl Fn(Unpack<'_, B>),
        multiply: impl Fn(Multiply<'_>),
    ) -> Vec<f32> {
        let padded = tiles.rows.next_multiple_of(TOKENS);
        let out = w.len() * B::LEN / (tiles.parts * PART);
        // Old contents must not matter.
        let mut columns = vec![f32::NAN; out * padded];
        let old = RowPart { quads: [[7; 4]; STEPS], d: [9.0; 2], m: [9.0; 2], start: [9; 2] };
        tiles.multiply(w, &mut vec![old; PANEL * RUN], &mut columns, unpack, multiply);
        columns.chunks_exact(padded).flat_map(|column| &column[..tiles.rows]).copied().collect()
    }

    /// A part as the numbers that its bytes stand for.
    fn back(x: &[f32; PART]) -> [f64; PART] {
        let (quads, scale, _) = round(x);
        let mut numbers = [0.0; PART];
        for (number, byte) in numbers.iter_mut().zip(quads.as_flattened()) {
            *number = f64::from(scale) * f64::from(i32::from(*byte) - LIFT);
        }
        numbers
    }

    struct Check;

    impl OnBlocks for Check {
        /// Every vector unit gives the product with the rounded numbers.
        fn run<B: QuantBlock>(&self, name: &str, w: &[B], wide: &[f32], len: usize) {
            let value = |i: usize| ((i * 7919 + 13) % 201) as f32 / 100.0 - 1.0;
            let x: Vec<f32> = (0..33 * len).map(value).collect();
            let rounded: Vec<f64> = x.as_chunks().0.iter().flat_map(back).collect();
            let tiles = ByteTiles::new(&x, len);
            let check = |unit: &str, got: Vec<f32>| {
                let pairs = wide
                    .chunks_exact(len)
                    .flat_map(|w| rounded.chunks_exact(len).map(move |x| x.iter().zip(w)));
                assert_eq!(got.len(), pairs.clone().count(), "{name} {unit}");
                for (got, pairs) in got.iter().zip(pairs) {
                    let products = pairs.map(|(x, w)| x * f64::from(*w));
                    let (sum, size) =
                        products.fold((0.0, 0.0), |(sum, size), it| (sum + it, size + it.abs()));
                    let apart = (f64::from(*got) - sum).abs();
                    assert!(
                        apart <= 4e-6 * size,
                        "{name} {unit}, {len}: {got}, not {sum} of {size}"
                    );
                }
            };
            let plain = |unpack: Unpack<'_, B>| OnQuantSimd::run(unpack, Plain);
            let here = |unpack: Unpack<'_, B>| Arch::new().dispatch(unpack);
            check("none", columns(&tiles, w, plain, |it| OnWholeSimd::run(it, Plain)));
            check("this processor's", columns(&tiles, w, here, |it| on_whole_simd(it)));
            #[cfg(target_arch = "x86_64")]
            if let Some(simd) = pulp::x86::V3::try_new() {
                let avx2 = |unpack: Unpack<'_, B>| OnQuantSimd::run(unpack, simd);
                check("AVX2", columns(&tiles, w, avx2, |it| OnWholeSimd::run(it, Plain)));
            }
        }
    }

    /// A processor takes only one of these paths; others take the others.
    #[test]
    fn every_vector_unit_multiplies_every_block() {
        every_block(7, &[256, 1280, 32, 576, 1056], &Check);
    }

    proptest! {
        #[test]
        fn nothing_is_further_off_than_half_a_step(
            // Up to where the sum of a group is still a number.
            x in prop::collection::vec(-1f32..1.0, PART), exponent in -149i32..124,
        ) {
            let mut scaled = [0.0; PART];
            scaled.iter_mut().zip(&x).for_each(|(scaled, x)| *scaled = x * 2f32.powi(exponent));
            let largest = scaled.iter().fold(0f32, |largest, x| largest.max(x.abs()));
            // Halves are rounded up or down, and the inverse of the scale is rounded, too.
            let bound = f64::from(largest) / 254.0 * 1.001 + 1e-36;
            let (got, (_, _, sums)) = (back(&scaled), round(&scaled));
            for (got, x) in got.iter().zip(scaled) {
                prop_assert!((got - f64::from(x)).abs() <= bound, "{got}, not {x}");
            }
            for (sum, group) in sums.iter().zip(got.chunks(SCALE_GROUP)) {
                let apart = (f64::from(*sum) - group.iter().sum::<f64>()).abs();
                prop_assert!(apart <= 1e-6 * 16.0 * f64::from(largest), "{sum}");
            }
        }
    }

    /// What is no number stays none, in its row and in no other.
    #[test]
    fn what_is_no_number_stays_none() {
        for none in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut x = vec![1f32; 3 * PART];
            x[PART + 17] = none;
            // 0.5 (q - 8) of q = 1
            let mut block = [0x11; 18];
            block[..2].copy_from_slice(&half::f16::from_f32(0.5).to_bits().to_le_bytes());
            for (row, y) in ByteTiles::new(&x, PART).product(&[block]).into_iter().enumerate() {
                assert!(if row == 1 { y.is_nan() } else { (y + 112.0).abs() < 1e-4 }, "{y}");
            }
        }
        assert_eq!(ByteTiles::new(&[0.0; PART], PART).product(&[[1u8; 18]]), [0.0]);
    }
}
