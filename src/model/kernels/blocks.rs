//! The blocks of GGUF files, as llama.cpp's `ggml-common.h` lays them out. The plain twin of all of
//! them is candle's `dequantize`, with which they agree to the last bit.
//!
//! A block is known by its type here, and its type is its size: no two have the same.

use std::hint::black_box;

use super::element::{Element, RUN, from_half};

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

/// A number of a block in `f16`.
#[inline(always)]
fn scale(bytes: [u8; 2]) -> f32 {
    from_half(u16::from_le_bytes(bytes))
}

/// `N` bytes of a block from `at` on, which is a constant: there is no check left at run time.
#[inline(always)]
fn part<const N: usize>(block: &[u8], at: usize) -> &[u8; N] {
    block[at..].first_chunk().unwrap_or(&[0; N])
}

/// Weights that share a scale, at least.
const GROUP: usize = 16;

/// Implements [`Element`] for a block of `$len` weights: `$read` takes it apart into whole numbers
/// `q`, and `[d, m]` for each group of them, for a weight is `d q - m`.
///
/// All of it is written out in `widen`: a function of its own would not be compiled for the vector
/// units of its caller. It is in two loops, and each step hidden from the next by a `black_box`, to
/// keep the compiler from vectors across several blocks or groups, which it then has to shuffle: one
/// group is a vector as it lies. (Measured with Q4_0 and Q4K: four to
/// six times the speed.)
macro_rules! block {
    ($name:ty, $len:literal, |$block:ident, $numbers:ident, $scales:ident| $read:block) => {
        impl Element for $name {
            const LEN: usize = $len;

            #[inline(always)]
            fn widen<'a>(w: &'a [Self], wide: &'a mut [f32]) -> &'a [f32] {
                let (wide, _) = wide.split_at_mut(w.len() * $len);
                let mut numbers = [[0i8; $len]; RUN / $len];
                let mut scales = [[[0f32; 2]; $len / GROUP]; RUN / $len];
                for (wide, w) in wide.chunks_mut(RUN).zip(w.chunks(RUN / $len)) {
                    let places = numbers.iter_mut().zip(&mut scales);
                    for ($block, ($numbers, $scales)) in w.iter().zip(places) {
                        let $block = black_box($block);
                        $read
                    }
                    let groups = numbers.as_flattened().as_chunks::<GROUP>().0.iter();
                    let groups = groups.zip(scales.as_flattened());
                    for (wide, (numbers, [d, m])) in wide.as_chunks_mut().0.iter_mut().zip(groups) {
                        let wide: &mut [f32; GROUP] = wide;
                        let d = black_box(d);
                        for (wide, q) in wide.iter_mut().zip(numbers) {
                            *wide = f32::from(*q) * d - m;
                        }
                    }
                }
                wide
            }
        }
    };
}

/// Writes each number in its place: an array that is made first and copied then is made of bytes.
#[inline(always)]
fn each<const N: usize>(numbers: &mut [i8; N], read: impl Fn(usize) -> i8) {
    for (i, number) in numbers.iter_mut().enumerate() {
        *number = read(i);
    }
}

/// Writes the lower halves of 16 bytes, less `less`, and the upper halves behind them.
#[inline(always)]
fn nibbles(bytes: &[u8; 16], less: i8, numbers: &mut [i8; 32]) {
    for (i, byte) in bytes.iter().enumerate() {
        numbers[i] = (byte & 15) as i8 - less;
        numbers[i + 16] = (byte >> 4) as i8 - less;
    }
}

/// [`nibbles`] with a fifth bit for each, one after another in `fifths`.
#[inline(always)]
fn fives(bytes: &[u8; 16], fifths: [u8; 4], less: i8, numbers: &mut [i8; 32]) {
    let fifths = u32::from_le_bytes(fifths);
    for (i, byte) in bytes.iter().enumerate() {
        let [low, high] = [fifths >> i, fifths >> (i + 16)].map(|bit| ((bit & 1) << 4) as u8);
        numbers[i] = (byte & 15 | low) as i8 - less;
        numbers[i + 16] = (byte >> 4 | high) as i8 - less;
    }
}

block!(Q8_0, 32, |block, numbers, scales| {
    let bytes = part::<32>(block, 2);
    each(numbers, |i| bytes[i] as i8);
    *scales = [[scale(*part(block, 0)), 0.0]; 2];
});

block!(Q4_0, 32, |block, numbers, scales| {
    nibbles(part(block, 2), 8, numbers);
    *scales = [[scale(*part(block, 0)), 0.0]; 2];
});

block!(Q4_1, 32, |block, numbers, scales| {
    nibbles(part(block, 4), 0, numbers);
    *scales = [[scale(*part(block, 0)), -scale(*part(block, 2))]; 2];
});

block!(Q5_0, 32, |block, numbers, scales| {
    fives(part(block, 6), *part(block, 2), 16, numbers);
    *scales = [[scale(*part(block, 0)), 0.0]; 2];
});

block!(Q5_1, 32, |block, numbers, scales| {
    fives(part(block, 8), *part(block, 4), 0, numbers);
    *scales = [[scale(*part(block, 0)), -scale(*part(block, 2))]; 2];
});

block!(Q2K, 256, |block, numbers, scales| {
    let (packed, qs) = (part::<16>(block, 0), part::<64>(block, 16));
    let (d, min) = (scale(*part(block, 80)), scale(*part(block, 82)));
    // 16 groups of 16 weights: 2 halves of the block x 4 shifts x 2 halves of 32 bytes.
    let (groups, _) = numbers.as_chunks_mut::<GROUP>();
    for (group, numbers) in groups.iter_mut().enumerate() {
        let (half, shift, side) = (group / 8, group / 2 % 4 * 2, group % 2);
        let qs = part::<16>(qs, half * 32 + side * 16);
        each(numbers, |i| ((qs[i] >> shift) & 3) as i8);
        let both = packed[group];
        scales[group] = [d * f32::from(both & 15), min * f32::from(both >> 4)];
    }
});

block!(Q3K, 256, |block, numbers, scales| {
    let (thirds, qs) = (part::<32>(block, 0), part::<64>(block, 32));
    let d = scale(*part(block, 108));
    let (groups, _) = numbers.as_chunks_mut::<GROUP>();
    for (group, numbers) in groups.iter_mut().enumerate() {
        let (half, shift, side) = (group / 8, group / 2 % 4 * 2, group % 2);
        let (qs, thirds) = (part::<16>(qs, half * 32 + side * 16), part::<16>(thirds, side * 16));
        let third = group / 2; // its place in a byte
        each(numbers, |i| {
            let missing = (!thirds[i] >> third) & 1;
            ((qs[i] >> shift) & 3) as i8 - (missing << 2) as i8
        });
        // 16 scales: the lower 4 bits in 8 bytes, the upper 2 of each in the 4 bytes behind.
        let low = (block[96 + group % 8] >> (group / 8 * 4)) & 15;
        let high = (block[104 + group % 4] >> (group / 4 * 2)) & 3;
        scales[group] = [d * (f32::from(low | high << 4) - 32.0), 0.0];
    }
});

/// `[d, m]` of the groups of a [`Q4K`] or [`Q5K`] block. Scales and minima are of 32 weights each, and
/// have 6 bits: those of the last four runs are put together of 4 bits and the 2 that the first four
/// leave over.
#[inline(always)]
fn scales_and_minima(block: &[u8]) -> [[f32; 2]; 16] {
    let (d, min, packed) = (scale(*part(block, 0)), scale(*part(block, 2)), part::<12>(block, 4));
    let mut groups = [[0.0; 2]; 16];
    for run in 0..4 {
        let [scale, minimum, rest] = [packed[run], packed[run + 4], packed[run + 8]];
        let first = [scale & 63, minimum & 63];
        let last = [(rest & 15) | (scale >> 6) << 4, (rest >> 4) | (minimum >> 6) << 4];
        for (run, [scale, minimum]) in [(run, first), (run + 4, last)] {
            let both = [d * f32::from(scale), min * f32::from(minimum)];
            [groups[2 * run], groups[2 * run + 1]] = [both; 2];
        }
    }
    groups
}

block!(Q4K, 256, |block, numbers, scales| {
    let qs = part::<128>(block, 16);
    let (runs, _) = numbers.as_chunks_mut::<32>();
    for (run, numbers) in runs.iter_mut().enumerate() {
        let qs = part::<32>(qs, run / 2 * 32);
        each(numbers, |i| ((qs[i] >> (run % 2 * 4)) & 15) as i8);
    }
    *scales = scales_and_minima(block);
});

block!(Q5K, 256, |block, numbers, scales| {
    let (fifths, qs) = (part::<32>(block, 16), part::<128>(block, 48));
    let (runs, _) = numbers.as_chunks_mut::<32>();
    for (run, numbers) in runs.iter_mut().enumerate() {
        let qs = part::<32>(qs, run / 2 * 32);
        each(numbers, |i| ((qs[i] >> (run % 2 * 4)) & 15 | ((fifths[i] >> run) & 1) << 4) as i8);
    }
    *scales = scales_and_minima(block);
});

block!(Q6K, 256, |block, numbers, scales| {
    let d = scale(*part(block, 208));
    let packed = part::<16>(block, 192);
    // 8 runs of 32 weights: 2 halves of the block x 4 pairs of upper bits.
    let (runs, _) = numbers.as_chunks_mut::<32>();
    for (run, numbers) in runs.iter_mut().enumerate() {
        let (half, pair) = (run / 4, run % 4);
        let low = part::<32>(block, half * 64 + pair % 2 * 32);
        let high = part::<32>(block, 128 + half * 32);
        each(numbers, |i| {
            let low = (low[i] >> (pair / 2 * 4)) & 15;
            (low | ((high[i] >> (2 * pair)) & 3) << 4) as i8 - 32
        });
    }
    *scales = packed.map(|packed| [d * f32::from(packed as i8), 0.0]);
});
