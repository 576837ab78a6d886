//! Dot products of a few input rows with every row of a weight that is kept in blocks.
//!
//! Factors common to all weights of a group are multiplied once: `Σ (d q - m)·x` is
//! `Σ d (q·x) - Σ m Σ x`.

use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::super::dense::{self, prefetch_ahead, rows_per_task};
use super::super::input_rows::FEW_ROWS;
use super::blocks::QuantBlock;
use super::chunk::{CHUNK, PART, SCALE_GROUP};
use super::fixed_point::FixedPoint;
use super::simd::{Lanes, OnQuantSimd, Parts, QuantSimd, adds_all_bytes, on_quant_simd_for_chunks};

/// `columns[o * rows + r] = x[r] · w[o]` for `x` of `(rows, len)`, at most [`FEW_ROWS`], and `w` of
/// `(out, len)`. `fixed_point` gives what [`to_fixed_point`] makes of `x`.
pub(in crate::kernels) fn few_rows<'a, B: QuantBlock>(
    x: &[f32],
    fixed_point: impl FnOnce() -> &'a Vec<FixedPoint>,
    w: &[B],
    len: usize,
    columns: &mut [f32],
) {
    if len == 0 || x.is_empty() {
        return;
    }
    if B::LIFT == 128 && !adds_all_bytes() {
        return dense::few_rows(x, w, len, columns);
    }
    let (x, rows, arch) = (fixed_point().as_slice(), x.len() / len, Arch::new());
    let of_task = rows_per_task(columns.len() / rows);
    columns
        .par_chunks_mut(of_task * rows)
        .zip(w.par_chunks(of_task * (len / B::LEN)))
        .for_each(|(columns, w)| arch.dispatch(Whole { x, w, len, columns }));
}

/// The chunks of each row of `x` in fixed point.
pub(in crate::kernels) fn to_fixed_point(x: &[f32], len: usize) -> Vec<FixedPoint> {
    Arch::new().dispatch(ToFixedPoint { x, len })
}

/// How many chunks a row of this length is read as.
fn chunks(len: usize) -> usize {
    len.div_ceil(CHUNK)
}

/// Rows of `x`, to be put in fixed point. Where a row is not a whole number of chunks, the last of
/// several chunks holds zeros and then what is left over, just as the last chunk of the weight holds
/// what has been multiplied already and then what is left over:
///
/// ```text
/// 576 numbers:   chunk 0 is 0..256,  chunk 1 is 256..512,  chunk 2 is 320..576, up to 512 times 0
/// ```
struct ToFixedPoint<'a> {
    x: &'a [f32],
    len: usize,
}

impl WithSimd for ToFixedPoint<'_> {
    type Output = Vec<FixedPoint>;

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) -> Vec<FixedPoint> {
        let mut fixed = Vec::with_capacity(self.x.len().div_ceil(self.len) * chunks(self.len));
        for x in self.x.chunks_exact(self.len) {
            let (whole, rest) = x.as_chunks::<CHUNK>();
            fixed.extend(whole.iter().map(FixedPoint::new));
            if !rest.is_empty() {
                // A chunk that ends with the row, or, in a shorter row, begins with it.
                let mut last = [0.0; CHUNK];
                let start = if whole.is_empty() { 0 } else { CHUNK - rest.len() };
                last[start..start + rest.len()].copy_from_slice(rest);
                fixed.push(FixedPoint::new(&last));
            }
        }
        fixed
    }
}

/// Blocks multiplied in integers.
struct Whole<'a, B> {
    /// The chunks of each row.
    x: &'a [FixedPoint],
    w: &'a [B],
    len: usize,
    columns: &'a mut [f32],
}

impl<B: QuantBlock> WithSimd for Whole<'_, B> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        on_quant_simd_for_chunks(simd, self);
    }
}

impl<B: QuantBlock> OnQuantSimd for Whole<'_, B> {
    type Output = ();

    #[inline(always)]
    fn run(self, simd: impl QuantSimd) {
        if self.x.len() == chunks(self.len) {
            self.rows::<1>(simd); // whose sums stay in registers
        } else {
            self.rows::<FEW_ROWS>(simd);
        }
    }
}

impl<B: QuantBlock> Whole<'_, B> {
    /// For at most `ROWS` rows of `x`.
    #[inline(always)]
    fn rows<const ROWS: usize>(self, simd: impl QuantSimd) {
        let (chunks, of_chunk) = (chunks(self.len), CHUNK / B::LEN);
        let weights = self.w.chunks_exact(self.len / B::LEN);
        let columns = self.columns.chunks_exact_mut(self.x.len() / chunks);
        for (column, w) in columns.zip(weights) {
            let mut lanes: [Lanes; ROWS] = [[0.0; 16]; ROWS];
            let whole = w.chunks_exact(of_chunk);
            let rest = whole.remainder();
            for (index, chunk) in whole.enumerate() {
                prefetch_ahead(chunk);
                let x = self.x.iter().skip(index).step_by(chunks);
                add_chunk(simd, chunk, x, &mut lanes);
            }
            if let Some(first) = rest.first() {
                let x = self.x.iter().skip(chunks - 1).step_by(chunks);
                if let Some((_, last)) = w.split_at_checked(w.len().wrapping_sub(of_chunk)) {
                    add_chunk(simd, last, x, &mut lanes);
                } else {
                    // Filled up with blocks that are multiplied by zeros.
                    let mut filled = [*first; CHUNK / PART];
                    filled[..rest.len()].copy_from_slice(rest);
                    add_chunk(simd, &filled, x, &mut lanes);
                }
            }
            for (y, lanes) in column.iter_mut().zip(&lanes) {
                *y = total(lanes);
            }
        }
    }
}

/// Adds the products of a chunk with that of each row of `x`.
#[inline(always)]
fn add_chunk<'a, U: QuantSimd, B: QuantBlock>(
    simd: U,
    chunk: &[B],
    x: impl Iterator<Item = &'a FixedPoint>,
    lanes: &mut [Lanes],
) {
    assert!(chunk.len() >= CHUNK / B::LEN);
    let (mut d, mut m) = ([0.0; CHUNK / SCALE_GROUP], [0.0; CHUNK / SCALE_GROUP]);
    B::scales(simd, chunk, &mut d, &mut m);
    let numbers = |part| match B::LIFT {
        0 => B::numbers(simd, chunk, part),
        lift => simd.add(B::numbers(simd, chunk, part), lift),
    };
    if B::LIFT > 0 {
        m = d.map(|d| f32::from(B::LIFT) * d);
    }
    let q: Parts<U> = [
        [numbers(0), numbers(1)],
        [numbers(2), numbers(3)],
        [numbers(4), numbers(5)],
        [numbers(6), numbers(7)],
    ];
    for (x, lanes) in x.zip(lanes) {
        simd.add_chunk(&q, &d, &m, x, lanes);
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

#[cfg(test)]
mod tests {
    use super::super::super::dense::{Element, FewRows};
    use super::super::every_block::{OnBlocks, every_block};
    use super::*;

    /// Three rows of weights, widened, and their products with two rows of `x`, in `whole` numbers or
    /// not, on the vector unit `simd`.
    fn run<S: Simd, B: QuantBlock>(
        simd: S,
        x: &[f32],
        w: &[B],
        len: usize,
        whole: bool,
    ) -> (Vec<f32>, Vec<f32>) {
        struct Widen<'a, T>(&'a [T], &'a mut [f32]);
        impl<T: Element> WithSimd for Widen<'_, T> {
            type Output = ();
            fn with_simd<S: Simd>(self, simd: S) {
                T::widen(simd, self.0, self.1);
            }
        }
        let rows = w.len() * B::LEN / len;
        let (mut wide, mut columns) = (vec![f32::NAN; rows * len], vec![f32::NAN; rows * 2]);
        simd.vectorize(Widen(w, &mut wide));
        let fixed = simd.vectorize(ToFixedPoint { x, len });
        match whole {
            true => simd.vectorize(Whole { x: &fixed, w, len, columns: &mut columns }),
            false => simd.vectorize(FewRows { x, w, len, columns: &mut columns }),
        }
        (wide, columns)
    }

    struct Check;

    impl OnBlocks for Check {
        fn run<B: QuantBlock>(&self, name: &str, w: &[B], expected: &[f32], len: usize) {
            let whole = B::LIFT != 128;
            let value = |i: usize| ((i * 7919 + 13) % 201) as f32 / 100.0 - 1.0;
            let x: Vec<f32> = (0..2 * len).map(value).collect();
            let check = |unit: &str, (wide, columns): (Vec<f32>, Vec<f32>)| {
                let same = |(a, b): (&f32, &f32)| a == b;
                assert!(wide.len() == expected.len() && wide.iter().zip(expected).all(same));
                let pairs = expected.chunks_exact(len).flat_map(|w| {
                    x.chunks_exact(len).map(move |x| x.iter().zip(w).map(|(x, w)| (*x, *w)))
                });
                for (got, pairs) in columns.iter().zip(pairs) {
                    let products = pairs.map(|(x, w)| f64::from(x) * f64::from(w));
                    let (sum, size) =
                        products.fold((0.0, 0.0), |(sum, size), it| (sum + it, size + it.abs()));
                    let apart = (f64::from(*got) - sum).abs();
                    assert!(apart <= 2e-6 * size, "{name} {unit}: {got}, not {sum} of {size}");
                }
            };
            check("scalar", run(pulp::Scalar::new(), &x, w, len, whole));
            #[cfg(target_arch = "x86_64")]
            {
                use pulp::x86::{V3, V4};
                let v3 = V3::try_new().map(|simd| run(simd, &x, w, len, whole));
                let v4 = V4::try_new().map(|simd| run(simd, &x, w, len, whole));
                v3.into_iter().for_each(|got| check("AVX2", got));
                v4.into_iter().for_each(|got| check("AVX-512", got));
                if let (Some(simd), true) = (V4::try_new(), adds_all_bytes()) {
                    check("VNNI", run(simd, &x, w, len, true));
                }
            }
        }
    }

    /// A processor takes only one of these paths; others take the others.
    #[test]
    fn every_vector_unit_reads_every_block() {
        every_block(3, &[256, 768, 1280, 32, 576, 1056], &Check);
    }
}
