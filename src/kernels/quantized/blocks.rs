//! The blocks of GGUF files, as llama.cpp's `ggml-common.h` lays them out. The plain twin of all of
//! them is candle's `dequantize`, or that of [`codebook`](super::codebook), with which they agree to the
//! last bit.
//!
//! A block is identified by its type here, and its type is its size: no two have the same, but for
//! [`Iq4Nl`]. Blocks are unpacked a chunk at a time, and their numbers 32 bytes at a time.

use pulp::Simd;

use super::super::dense::Element;
use super::chunk::{CHUNK, PART, PerGroup, SCALE_GROUP};
use super::codebook::{E2M1, NON_LINEAR, half_of_power, scales};
use super::simd::{OnQuantSimd, QuantSimd, on_quant_simd};

/// A block holds integers `q`, one for each weight, and scales `d` and minima `m` for groups of them: a
/// weight is `d q - m`.
pub(in crate::kernels) trait QuantBlock: Copy + Send + Sync {
    /// Weights in it, [`PART`] or [`CHUNK`].
    const LEN: usize;

    /// Where its numbers are signed bytes, and there are no minima: what makes them 0 or more when it is
    /// added. Otherwise they are 0 to 63, and it is 0.
    const LIFT: u8 = 0;

    /// What is subtracted from its numbers, where minima are that many scales; `None` for minima of their own.
    const CENTRE: Option<u8>;

    /// Groups of a part that have a scale of their own: 1, where both have the same, or 2.
    const GROUPS: usize = 1;

    /// The numbers of a part of a chunk.
    fn numbers<U: QuantSimd>(simd: U, chunk: &[Self], part: usize) -> U::Bytes;

    /// Scales and minima of a chunk, or of as many small blocks as there are.
    fn scales(simd: impl QuantSimd, chunk: &[Self], d: &mut PerGroup, m: &mut PerGroup);
}

impl<B: QuantBlock> Element for B {
    const LEN: usize = B::LEN;

    #[inline(always)]
    fn widen<'a, S: Simd>(simd: S, w: &'a [B], wide: &'a mut [f32]) -> &'a [f32] {
        let (wide, _) = wide.split_at_mut(w.len() * B::LEN);
        for (wide, chunk) in wide.chunks_mut(CHUNK).zip(w.chunks(CHUNK / B::LEN)) {
            on_quant_simd(simd, Widen { chunk, wide });
        }
        wide
    }
}

/// A chunk of blocks, to be widened.
struct Widen<'a, B> {
    chunk: &'a [B],
    wide: &'a mut [f32],
}

impl<B: QuantBlock> OnQuantSimd for Widen<'_, B> {
    type Output = ();

    #[inline(always)]
    fn run(self, simd: impl QuantSimd) {
        let (mut d, mut m) = ([0.0; CHUNK / SCALE_GROUP], [0.0; CHUNK / SCALE_GROUP]);
        B::scales(simd, self.chunk, &mut d, &mut m);
        let groups = d.as_chunks().0.iter().zip(m.as_chunks().0);
        for (part, (wide, (d, m))) in self.wide.as_chunks_mut().0.iter_mut().zip(groups).enumerate()
        {
            simd.scale(B::numbers(simd, self.chunk, part), d, m, wide);
        }
    }
}

/// 32 weights: a scale and 32 whole numbers.
pub(in crate::kernels) type Q8_0 = [u8; 34];
/// 32 weights: a scale and 32 numbers of 4 bits, minus 8.
pub(in crate::kernels) type Q4_0 = [u8; 18];
/// 32 weights: a scale, a minimum and 32 numbers of 4 bits.
pub(in crate::kernels) type Q4_1 = [u8; 20];
/// 32 weights: a scale, a fifth bit for each, and 32 numbers of 4 bits, all minus 16.
pub(in crate::kernels) type Q5_0 = [u8; 22];
/// 32 weights: a scale, a minimum, a fifth bit for each, and 32 numbers of 4 bits.
pub(in crate::kernels) type Q5_1 = [u8; 24];
/// 256 weights of 2 bits: 16 scales and minima of 4 bits, their scale and that of the minima.
pub(in crate::kernels) type Q2K = [u8; 84];
/// 256 weights of 3 bits: a third bit for each, 2 bits, 16 scales of 6 bits, and their scale.
pub(in crate::kernels) type Q3K = [u8; 110];
/// 256 weights of 4 bits: a scale and one for the minima, 8 scales and minima of 6 bits.
pub(in crate::kernels) type Q4K = [u8; 144];
/// 256 weights of 5 bits: as [`Q4K`], with a fifth bit for each.
pub(in crate::kernels) type Q5K = [u8; 176];
/// 256 weights of 6 bits: the lower 4 of each, the upper 2, 16 scales of 8 bits, and their scale.
pub(in crate::kernels) type Q6K = [u8; 210];
/// 32 weights: a scale and 4 bits for each. In pairs of bytes, because [`Q4_0`] has the same size.
pub(in crate::kernels) type Iq4Nl = [[u8; 2]; 9];
/// 256 weights: a scale, 8 scales of 6 bits, and 4 bits for each.
pub(in crate::kernels) type Iq4Xs = [u8; 136];
/// 32 weights: an exponent and 4 bits for each.
pub(in crate::kernels) type Mxfp4 = [u8; 17];

/// Does `$do` with the blocks of a [`QTensor`](candle_core::quantized::QTensor) on the CPU.
macro_rules! for_blocks {
    ($weight:expr, |$blocks:ident| $do:expr) => {{
        let (dtype, data) = ($weight.dtype(), $weight.data()?);
        $crate::kernels::quantized::for_blocks!(dtype, data, |$blocks| $do,
            Q8_0 Q4_0 Q4_1 Q5_0 Q5_1 Q2K Q3K Q4K Q5K Q6K)
    }};
    ($dtype:expr, $data:expr, |$blocks:ident| $do:expr, $($block:ident)*) => {
        match $dtype {
            $(candle_core::quantized::GgmlDType::$block => {
                const SIZE: usize = size_of::<$crate::kernels::quantized::blocks::$block>();
                let ($blocks, _) = $data.as_chunks::<SIZE>();
                $do
            })*
            other => candle_core::bail!("no kernel for {other:?}"),
        }
    };
}
pub(in crate::kernels) use for_blocks;

/// The `f16` at byte `at` of a block.
#[inline(always)]
fn scale(simd: impl QuantSimd, block: &[u8], at: usize) -> f32 {
    simd.half(u16::from_le_bytes(*part(block, at)))
}

/// `N` bytes of a block from `at` on, which is a constant, so that no check is left at run time.
#[inline(always)]
fn part<const N: usize>(block: &[u8], at: usize) -> &[u8; N] {
    block[at..].first_chunk().unwrap_or(&[0; N])
}

/// Implements [`QuantBlock`] for 256 weights: `$numbers` are those of part `$part`, from 0 to 7, and
/// `$scales` sets the scales `$d` and minima `$m` of its groups.
macro_rules! large_block {
    (
        $name:ty, centre $centre:expr, groups $groups:literal, |$simd:ident, $block:ident|
        $part:ident => $numbers:expr,
        ($d:ident, $m:ident) => $scales:block
    ) => {
        impl QuantBlock for $name {
            const LEN: usize = CHUNK;
            const CENTRE: Option<u8> = $centre;
            const GROUPS: usize = $groups;

            #[inline(always)]
            fn numbers<U: QuantSimd>($simd: U, chunk: &[Self], $part: usize) -> U::Bytes {
                let $block = &chunk[0];
                $numbers
            }

            #[inline(always)]
            fn scales($simd: impl QuantSimd, chunk: &[Self], $d: &mut PerGroup, $m: &mut PerGroup) {
                let $block = &chunk[0];
                $scales
            }
        }
    };
}

/// [`QuantSimd::nibbles`] with a fifth bit for each, one after another from `fifths` on.
#[inline(always)]
fn fives<U: QuantSimd>(simd: U, block: &[u8], fifths: usize, at: usize) -> U::Bytes {
    let fifths = simd.and(simd.bits(*part(block, fifths)), 16);
    simd.or(simd.nibbles(part(block, at)), fifths)
}

/// The `f16` at `at` of each small block of a chunk, for both of its groups; 0 where there is none.
#[inline(always)]
fn pairs_of_scales<const N: usize>(simd: impl QuantSimd, chunk: &[[u8; N]], at: usize) -> PerGroup {
    let bits = |block: usize| chunk.get(block).map_or([0; 2], |block| *part(block, at));
    simd.pairs([bits(0), bits(1), bits(2), bits(3), bits(4), bits(5), bits(6), bits(7)])
}

/// Implements [`QuantBlock`] for 32 weights, whose scale is their first `f16`: `$numbers` are theirs, and
/// `$minima` are those of a `$chunk` with the scales `$d`.
macro_rules! small_block {
    (
        $name:ty, centre $centre:expr, lift $lift:literal,
        |$simd:ident, $block:ident| $numbers:expr,
        |$chunk:ident, $d:ident| $minima:expr
    ) => {
        impl QuantBlock for $name {
            const LEN: usize = PART;
            const LIFT: u8 = $lift;
            const CENTRE: Option<u8> = $centre;

            #[inline(always)]
            fn numbers<U: QuantSimd>($simd: U, chunk: &[Self], part: usize) -> U::Bytes {
                let $block = &chunk[part];
                $numbers
            }

            #[inline(always)]
            fn scales($simd: impl QuantSimd, $chunk: &[Self], d: &mut PerGroup, m: &mut PerGroup) {
                let $d = pairs_of_scales($simd, $chunk, 0);
                (*d, *m) = ($d, $minima);
            }
        }
    };
}

/// The minima of a chunk of small blocks, which are stored after the scales, and with the opposite sign.
#[inline(always)]
fn minima<const N: usize>(simd: impl QuantSimd, chunk: &[[u8; N]]) -> PerGroup {
    pairs_of_scales(simd, chunk, 2).map(|m| -m)
}

small_block!(Q8_0, centre Some(0), lift 128,
    |simd, block| simd.load(part(block, 2)), |chunk, d| [0.0; 16]);
small_block!(Q4_0, centre Some(8), lift 0,
    |simd, block| simd.nibbles(part(block, 2)), |chunk, d| d.map(|d| 8.0 * d));
small_block!(Q4_1, centre None, lift 0,
    |simd, block| simd.nibbles(part(block, 4)), |chunk, d| minima(simd, chunk));
small_block!(Q5_0, centre Some(16), lift 0,
    |simd, block| fives(simd, block, 2, 6), |chunk, d| d.map(|d| 16.0 * d));
small_block!(Q5_1, centre None, lift 0,
    |simd, block| fives(simd, block, 4, 8), |chunk, d| minima(simd, chunk));

// The parts of a large block have their bits at the same place in 32 bytes, which other parts share.

large_block!(Q2K, centre None, groups 2, |simd, block| n => {
    let qs = simd.load(part(block, 16 + n / 4 * 32));
    simd.and(simd.shift_down(qs, n % 4 * 2), 3)
}, (d, m) => {
    let packed = part::<16>(block, 0);
    let (d_of_all, m_of_all) = (scale(simd, block, 80), scale(simd, block, 82));
    *d = packed.map(|both| d_of_all * f32::from(both & 15));
    *m = packed.map(|both| m_of_all * f32::from(both >> 4));
});

large_block!(Q3K, centre Some(4), groups 2, |simd, block| n => {
    let (thirds, qs) = (simd.load(part(block, 0)), simd.load(part(block, 32 + n / 4 * 32)));
    let low = simd.and(simd.shift_down(qs, n % 4 * 2), 3);
    let third = simd.and(simd.shift_down(thirds, n), 1);
    simd.or(low, simd.shift_up(third, 2))
}, (d, m) => {
    // 16 scales: the lower 4 bits in 8 bytes, the upper 2 of each in the 4 bytes behind.
    let (low, high) = (u64::from_le_bytes(*part(block, 96)), u32::from_le_bytes(*part(block, 104)));
    let low = [low, low >> 4].map(|low| low & u64::from_ne_bytes([15; 8]));
    let high = [high, high >> 2, high >> 4, high >> 6].map(|high| high & u32::from_ne_bytes([3; 4]));
    let (low, high) = (low.map(u64::to_le_bytes), high.map(u32::to_le_bytes));
    let d_of_all = scale(simd, block, 108);
    for ((d, low), high) in d.iter_mut().zip(low.as_flattened()).zip(high.as_flattened()) {
        *d = d_of_all * (f32::from(low | high << 4) - 32.0);
    }
    *m = d.map(|d| 4.0 * d);
});

/// Scales and minima of the groups of a [`Q4K`] or [`Q5K`] block. They are for 32 weights each, and have
/// 6 bits: those of the last four parts are put together from 4 bits and the 2 that the first four leave
/// over.
#[inline(always)]
fn scales_and_minima(simd: impl QuantSimd, block: &[u8], d: &mut PerGroup, m: &mut PerGroup) {
    let packed = part::<12>(block, 4);
    let (d_of_all, m_of_all) = (scale(simd, block, 0), scale(simd, block, 2));
    for part in 0..4 {
        let [scale, minimum, rest] = [packed[part], packed[part + 4], packed[part + 8]];
        let first = [scale & 63, minimum & 63];
        let last = [(rest & 15) | (scale >> 6) << 4, (rest >> 4) | (minimum >> 6) << 4];
        for (part, [scale, minimum]) in [(part, first), (part + 4, last)] {
            [d[2 * part], d[2 * part + 1]] = [d_of_all * f32::from(scale); 2];
            [m[2 * part], m[2 * part + 1]] = [m_of_all * f32::from(minimum); 2];
        }
    }
}

large_block!(Q4K, centre None, groups 1, |simd, block| n => {
    simd.and(simd.shift_down(simd.load(part(block, 16 + n / 2 * 32)), n % 2 * 4), 15)
}, (d, m) => {
    scales_and_minima(simd, block, d, m);
});

large_block!(Q5K, centre None, groups 1, |simd, block| n => {
    let (fifths, qs) = (simd.load(part(block, 16)), simd.load(part(block, 48 + n / 2 * 32)));
    let low = simd.and(simd.shift_down(qs, n % 2 * 4), 15);
    let fifth = simd.and(simd.shift_down(fifths, n), 1);
    simd.or(low, simd.shift_up(fifth, 4))
}, (d, m) => {
    scales_and_minima(simd, block, d, m);
});

large_block!(Q6K, centre Some(32), groups 2, |simd, block| n => {
    let (half, quarter) = (n / 4, n % 4);
    let low = simd.load(part(block, half * 64 + quarter % 2 * 32));
    let low = simd.and(simd.shift_down(low, quarter / 2 * 4), 15);
    let high = simd.load(part(block, 128 + half * 32));
    let high = simd.and(simd.shift_down(high, 2 * quarter), 3);
    simd.or(low, simd.shift_up(high, 4))
}, (d, m) => {
    let d_of_all = scale(simd, block, 208);
    *d = part::<16>(block, 192).map(|packed| d_of_all * f32::from(packed as i8));
    *m = d.map(|d| 32.0 * d);
});

// The numbers of a codebook have a sign, and groups of 32 share a scale.

impl QuantBlock for Iq4Nl {
    const LEN: usize = PART;
    const LIFT: u8 = 128;
    const CENTRE: Option<u8> = Some(0);

    #[inline(always)]
    fn numbers<U: QuantSimd>(simd: U, chunk: &[Self], n: usize) -> U::Bytes {
        simd.look_up(&[NON_LINEAR; 2], simd.nibbles(part(chunk[n].as_flattened(), 2)))
    }

    #[inline(always)]
    fn scales(simd: impl QuantSimd, chunk: &[Self], d: &mut PerGroup, m: &mut PerGroup) {
        let bits = |block: usize| chunk.get(block).map_or([0; 2], |block| block[0]);
        *d = simd.pairs([bits(0), bits(1), bits(2), bits(3), bits(4), bits(5), bits(6), bits(7)]);
        *m = [0.0; CHUNK / SCALE_GROUP];
    }
}

impl QuantBlock for Mxfp4 {
    const LEN: usize = PART;
    const LIFT: u8 = 12;
    const CENTRE: Option<u8> = Some(0);

    #[inline(always)]
    fn numbers<U: QuantSimd>(simd: U, chunk: &[Self], n: usize) -> U::Bytes {
        simd.look_up(&[E2M1; 2], simd.nibbles(part(&chunk[n], 1)))
    }

    #[inline(always)]
    fn scales(_: impl QuantSimd, chunk: &[Self], d: &mut PerGroup, m: &mut PerGroup) {
        *d = [0.0; CHUNK / SCALE_GROUP];
        for (d, block) in d.as_chunks_mut().0.iter_mut().zip(chunk) {
            *d = [half_of_power(block[0]); 2];
        }
        *m = [0.0; CHUNK / SCALE_GROUP];
    }
}

impl QuantBlock for Iq4Xs {
    const LEN: usize = CHUNK;
    const LIFT: u8 = 128;
    const CENTRE: Option<u8> = Some(0);

    #[inline(always)]
    fn numbers<U: QuantSimd>(simd: U, chunk: &[Self], n: usize) -> U::Bytes {
        simd.look_up(&[NON_LINEAR; 2], simd.nibbles(part(&chunk[0], 8 + 16 * n)))
    }

    #[inline(always)]
    fn scales(simd: impl QuantSimd, chunk: &[Self], d: &mut PerGroup, m: &mut PerGroup) {
        let block = &chunk[0];
        let d_of_all = scale(simd, block, 0);
        let scales = scales(*part(block, 4), u16::from_le_bytes(*part(block, 2)));
        for (d, scale) in d.as_chunks_mut().0.iter_mut().zip(scales) {
            *d = [d_of_all * scale; 2];
        }
        *m = [0.0; CHUNK / SCALE_GROUP];
    }
}
