//! The blocks of GGUF files, as llama.cpp's `ggml-common.h` lays them out. The plain twin of all of
//! them is candle's `dequantize`, with which they agree to the last bit.
//!
//! A block is known by its type here, and its type is its size: no two have the same. Its numbers are
//! taken apart 32 bytes at a time.

use super::element::{Element, Groups, PART, from_half};
use super::units::Unit;

/// 32 weights: a scale and 32 whole numbers.
pub(super) type Q8_0 = [u8; 34];
/// 32 weights: a scale and 32 numbers of 4 bits, less 8.
pub(super) type Q4_0 = [u8; 18];
/// 32 weights: a scale, a minimum and 32 numbers of 4 bits.
pub(super) type Q4_1 = [u8; 20];
/// 32 weights: a scale, a fifth bit for each, and 32 numbers of 4 bits, all less 16.
pub(super) type Q5_0 = [u8; 22];
/// 32 weights: a scale, a minimum, a fifth bit for each, and 32 numbers of 4 bits.
pub(super) type Q5_1 = [u8; 24];
/// 256 weights of 2 bits: 16 scales and minima of 4 bits, their scale and that of the minima.
pub(super) type Q2K = [u8; 84];
/// 256 weights of 3 bits: a third bit for each, 2 bits, 16 scales of 6 bits, and their scale.
pub(super) type Q3K = [u8; 110];
/// 256 weights of 4 bits: a scale and one for the minima, 8 scales and minima of 6 bits.
pub(super) type Q4K = [u8; 144];
/// 256 weights of 5 bits: as [`Q4K`], with a fifth bit for each.
pub(super) type Q5K = [u8; 176];
/// 256 weights of 6 bits: the lower 4 of each, the upper 2, 16 scales of 8 bits, and their scale.
pub(super) type Q6K = [u8; 210];

/// Does `$do` with the blocks of a [`QTensor`](candle_core::quantized::QTensor) on the CPU.
macro_rules! for_blocks {
    ($weight:expr, |$blocks:ident| $do:expr) => {{
        let (dtype, data) = ($weight.dtype(), $weight.data()?);
        $crate::model::kernels::blocks::for_blocks!(dtype, data, |$blocks| $do,
            Q8_0 Q4_0 Q4_1 Q5_0 Q5_1 Q2K Q3K Q4K Q5K Q6K)
    }};
    ($dtype:expr, $data:expr, |$blocks:ident| $do:expr, $($block:ident)*) => {
        match $dtype {
            $(candle_core::quantized::GgmlDType::$block => {
                const SIZE: usize = size_of::<$crate::model::kernels::blocks::$block>();
                let ($blocks, _) = $data.as_chunks::<SIZE>();
                $do
            })*
            other => candle_core::bail!("no kernel for {other:?}"),
        }
    };
}
pub(super) use for_blocks;

/// The `f16` of a block that is at `at`.
#[inline(always)]
fn scale(block: &[u8], at: usize) -> f32 {
    from_half(u16::from_le_bytes(*part(block, at)))
}

/// `N` bytes of a block from `at` on, which is a constant: there is no check left at run time.
#[inline(always)]
fn part<const N: usize>(block: &[u8], at: usize) -> &[u8; N] {
    block[at..].first_chunk().unwrap_or(&[0; N])
}

/// Implements [`Element`] for a block of 256 weights: `$read` takes it apart into whole numbers `q`, 32
/// at a time, and `d` and `m` for each group of 16, for a weight is `d q - m`.
macro_rules! block {
    ($name:ty, $minima:literal, |$unit:ident, $block:ident, $q:ident, $d:ident, $m:ident| $read:block) => {
        impl Element for $name {
            const LEN: usize = 256;
            const MINIMA: bool = $minima;

            #[inline(always)]
            fn take_apart($unit: impl Unit, w: &[Self], groups: &mut Groups) -> usize {
                let q = groups.q.as_chunks_mut::<PART>().0.as_chunks_mut::<8>().0;
                let d = groups.d.as_chunks_mut::<16>().0.iter_mut();
                let m = groups.m.as_chunks_mut::<16>().0.iter_mut();
                for ($block, ($q, ($d, $m))) in w.iter().zip(q.iter_mut().zip(d.zip(m))) {
                    $read
                }
                w.len() * 256
            }
        }
    };
}

/// [`Unit::nibbles`] with a fifth bit for each, one after another from `fifths` on.
#[inline(always)]
fn fives<U: Unit>(unit: U, block: &[u8], fifths: usize, at: usize) -> U::Bytes {
    const PLACES: u64 = u64::from_le_bytes([1, 2, 4, 8, 16, 32, 64, 128]);
    const ONES: u64 = u64::from_le_bytes([1; 8]);
    let mut bytes = [0; PART];
    for (eight, bits) in bytes.as_chunks_mut().0.iter_mut().zip(part::<4>(block, fifths)) {
        let set = (u64::from(*bits) * ONES) & PLACES; // a byte is not 0 where its bit is set ...
        *eight = ((set + 0x7f * ONES) >> 3).to_le_bytes(); // ... and carries into its upper bit then
    }
    unit.or(unit.nibbles(part(block, at)), unit.and(unit.load(&bytes), 16))
}

/// [`block!`] for 32 weights, whose scale and, where there is one, minimum are the first two `f16`:
/// `$numbers` are theirs, all less `$less`.
macro_rules! small_block {
    ($name:ty, $minima:literal, |$unit:ident, $block:ident| $numbers:expr, less $less:literal) => {
        impl Element for $name {
            const LEN: usize = PART;
            const MINIMA: bool = $minima;

            #[inline(always)]
            fn take_apart($unit: impl Unit, w: &[Self], groups: &mut Groups) -> usize {
                let q = groups.q.as_chunks_mut().0.iter_mut();
                let d = groups.d.as_chunks_mut().0.iter_mut();
                let m = groups.m.as_chunks_mut().0.iter_mut();
                for ($block, (q, (d, m))) in w.iter().zip(q.zip(d.zip(m))) {
                    $unit.write($numbers, $less, q);
                    *d = [$unit.half(u16::from_le_bytes(*part($block, 0))); 2];
                    if Self::MINIMA {
                        *m = [-$unit.half(u16::from_le_bytes(*part($block, 2))); 2];
                    }
                }
                w.len() * PART
            }
        }
    };
}

small_block!(Q8_0, false, |unit, block| unit.load(part(block, 2)), less 0);
small_block!(Q4_0, false, |unit, block| unit.nibbles(part(block, 2)), less 8);
small_block!(Q4_1, true, |unit, block| unit.nibbles(part(block, 4)), less 0);
small_block!(Q5_0, false, |unit, block| fives(unit, block, 2, 6), less 16);
small_block!(Q5_1, true, |unit, block| fives(unit, block, 4, 8), less 0);

// The numbers of a K block lie in 8 runs of 32. Those of a run have their bits in the same place of 32
// bytes, which other runs share.

block!(Q2K, true, |unit, block, q, d, m| {
    for half in 0..2 {
        let qs = unit.load(part(block, 16 + half * 32));
        for run in 0..4 {
            unit.write(unit.and(unit.shift_down(qs, 2 * run), 3), 0, &mut q[half * 4 + run]);
        }
    }
    let (packed, d_of_all, m_of_all) = (part::<16>(block, 0), scale(block, 80), scale(block, 82));
    *d = packed.map(|both| d_of_all * f32::from(both & 15));
    *m = packed.map(|both| m_of_all * f32::from(both >> 4));
});

block!(Q3K, false, |unit, block, q, d, _m| {
    let thirds = unit.load(part(block, 0));
    for half in 0..2 {
        let qs = unit.load(part(block, 32 + half * 32));
        for run in 0..4 {
            let low = unit.and(unit.shift_down(qs, 2 * run), 3);
            let third = unit.and(unit.shift_down(thirds, half * 4 + run), 1);
            unit.write(unit.or(low, unit.shift_up(third, 2)), 4, &mut q[half * 4 + run]);
        }
    }
    // 16 scales: the lower 4 bits in 8 bytes, the upper 2 of each in the 4 bytes behind.
    let (low, high, d_of_all) = (part::<8>(block, 96), part::<4>(block, 104), scale(block, 108));
    for (group, d) in d.iter_mut().enumerate() {
        let low = (low[group % 8] >> (group / 8 * 4)) & 15;
        let high = (high[group % 4] >> (group / 4 * 2)) & 3;
        *d = d_of_all * (f32::from(low | high << 4) - 32.0);
    }
});

/// Scales and minima of the groups of a [`Q4K`] or [`Q5K`] block. They are of 32 weights each, and
/// have 6 bits: those of the last four runs are put together of 4 bits and the 2 that the first four
/// leave over.
#[inline(always)]
fn scales_and_minima(block: &[u8], d: &mut [f32; 16], m: &mut [f32; 16]) {
    let packed = part::<12>(block, 4);
    let (d_of_all, m_of_all) = (scale(block, 0), scale(block, 2));
    for run in 0..4 {
        let [scale, minimum, rest] = [packed[run], packed[run + 4], packed[run + 8]];
        let first = [scale & 63, minimum & 63];
        let last = [(rest & 15) | (scale >> 6) << 4, (rest >> 4) | (minimum >> 6) << 4];
        for (run, [scale, minimum]) in [(run, first), (run + 4, last)] {
            [d[2 * run], d[2 * run + 1]] = [d_of_all * f32::from(scale); 2];
            [m[2 * run], m[2 * run + 1]] = [m_of_all * f32::from(minimum); 2];
        }
    }
}

block!(Q4K, true, |unit, block, q, d, m| {
    for pair in 0..4 {
        let qs = unit.load(part(block, 16 + pair * 32));
        unit.write(unit.and(qs, 15), 0, &mut q[2 * pair]);
        unit.write(unit.and(unit.shift_down(qs, 4), 15), 0, &mut q[2 * pair + 1]);
    }
    scales_and_minima(block, d, m);
});

block!(Q5K, true, |unit, block, q, d, m| {
    let fifths = unit.load(part(block, 16));
    for pair in 0..4 {
        let qs = unit.load(part(block, 48 + pair * 32));
        for run in 0..2 {
            let low = unit.and(unit.shift_down(qs, 4 * run), 15);
            let fifth = unit.and(unit.shift_down(fifths, 2 * pair + run), 1);
            unit.write(unit.or(low, unit.shift_up(fifth, 4)), 0, &mut q[2 * pair + run]);
        }
    }
    scales_and_minima(block, d, m);
});

block!(Q6K, false, |unit, block, q, d, _m| {
    for half in 0..2 {
        let high = unit.load(part(block, 128 + half * 32));
        for run in 0..4 {
            let low = unit.load(part(block, half * 64 + run % 2 * 32));
            let low = unit.and(unit.shift_down(low, run / 2 * 4), 15);
            let high = unit.and(unit.shift_down(high, 2 * run), 3);
            unit.write(unit.or(low, unit.shift_up(high, 4)), 32, &mut q[half * 4 + run]);
        }
    }
    let d_of_all = scale(block, 208);
    *d = part::<16>(block, 192).map(|packed| d_of_all * f32::from(packed as i8));
});
