//! The blocks of GGUF files, as llama.cpp's `ggml-common.h` lays them out. The plain twin of all of
//! them is candle's `dequantize`, with which they agree to the last bit.
//!
//! A block is known by its type here, and its type is its size: no two have the same.

use super::element::{Element, from_half};

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

#[inline(always)]
fn scale(bytes: [u8; 2]) -> f32 {
    from_half(u16::from_le_bytes(bytes))
}

/// `N` bytes of a block from `at` on, which is a constant: there is no check left at run time.
#[inline(always)]
fn part<const N: usize>(block: &[u8], at: usize) -> &[u8; N] {
    block[at..].first_chunk().unwrap_or(&[0; N])
}

/// Implements [`Element`] for a block of `$len` weights, of which `$read` makes `f32`. All of it is
/// written out in `widen`: a function of its own would not be compiled for the vector units of its
/// caller.
macro_rules! block {
    ($name:ty, $len:literal, |$block:ident, $wide:ident| $read:block) => {
        impl Element for $name {
            const LEN: usize = $len;

            #[inline(always)]
            fn widen<'a>(w: &'a [Self], wide: &'a mut [f32]) -> &'a [f32] {
                let (wide, _) = wide.split_at_mut(w.len() * $len);
                for ($wide, $block) in wide.as_chunks_mut::<$len>().0.iter_mut().zip(w) {
                    $read
                }
                wide
            }
        }
    };
}

/// The lower and the upper half of each of 16 bytes.
#[inline(always)]
fn nibbles(bytes: &[u8; 16]) -> [[i8; 16]; 2] {
    [0, 4].map(|shift| std::array::from_fn(|i| ((bytes[i] >> shift) & 15) as i8))
}

/// Writes `read` of `N` whole numbers to `wide`, from `at` on.
#[inline(always)]
fn write<const N: usize, T: Copy>(
    wide: &mut [f32],
    at: usize,
    numbers: &[T; N],
    read: impl Fn(T) -> f32,
) {
    for (wide, number) in wide[at..][..N].iter_mut().zip(numbers) {
        *wide = read(*number);
    }
}

block!(Q8_0, 32, |block, wide| {
    let d = scale(*part(block, 0));
    write(wide, 0, part::<32>(block, 2), |q| f32::from(q as i8) * d);
});

block!(Q4_0, 32, |block, wide| {
    let d = scale(*part(block, 0));
    let [low, high] = nibbles(part(block, 2));
    write(wide, 0, &low, |q| f32::from(q - 8) * d);
    write(wide, 16, &high, |q| f32::from(q - 8) * d);
});

block!(Q4_1, 32, |block, wide| {
    let (d, m) = (scale(*part(block, 0)), scale(*part(block, 2)));
    let [low, high] = nibbles(part(block, 4));
    write(wide, 0, &low, |q| f32::from(q) * d + m);
    write(wide, 16, &high, |q| f32::from(q) * d + m);
});

/// Adds to each of 16 numbers of 4 bits a fifth: bit `i` of `bits` to number `i`.
#[inline(always)]
fn fifth(numbers: [i8; 16], bits: u32) -> [i8; 16] {
    std::array::from_fn(|i| numbers[i] | (((bits >> i) & 1) << 4) as i8)
}

block!(Q5_0, 32, |block, wide| {
    let d = scale(*part(block, 0));
    let bits = u32::from_le_bytes(*part(block, 2));
    let [low, high] = nibbles(part(block, 6));
    write(wide, 0, &fifth(low, bits), |q| f32::from(q - 16) * d);
    write(wide, 16, &fifth(high, bits >> 16), |q| f32::from(q - 16) * d);
});

block!(Q5_1, 32, |block, wide| {
    let (d, m) = (scale(*part(block, 0)), scale(*part(block, 2)));
    let bits = u32::from_le_bytes(*part(block, 4));
    let [low, high] = nibbles(part(block, 8));
    write(wide, 0, &fifth(low, bits), |q| f32::from(q) * d + m);
    write(wide, 16, &fifth(high, bits >> 16), |q| f32::from(q) * d + m);
});

block!(Q2K, 256, |block, wide| {
    let (scales, qs) = (part::<16>(block, 0), part::<64>(block, 16));
    let (d, min) = (scale(*part(block, 80)), scale(*part(block, 82)));
    // 16 runs of 16 weights: 2 halves of the block x 4 shifts x 2 halves of 32 bytes.
    for (run, scales) in scales.iter().enumerate() {
        let (dl, ml) = (d * f32::from(scales & 15), min * f32::from(scales >> 4));
        let (half, shift, side) = (run / 8, run / 2 % 4 * 2, run % 2);
        let qs = part::<16>(qs, half * 32 + side * 16);
        write(wide, run * 16, qs, |q| dl * f32::from((q >> shift) & 3) - ml);
    }
});

block!(Q3K, 256, |block, wide| {
    let (thirds, qs) = (part::<32>(block, 0), part::<64>(block, 32));
    let d = scale(*part(block, 108));
    for run in 0..16 {
        // 16 scales: the lower 4 bits in 8 bytes, the upper 2 of each in the 4 bytes behind.
        let low = (block[96 + run % 8] >> (run / 8 * 4)) & 15;
        let high = (block[104 + run % 4] >> (run / 4 * 2)) & 3;
        let dl = d * (f32::from(low | high << 4) - 32.0);
        let (half, shift, side) = (run / 8, run / 2 % 4 * 2, run % 2);
        let (qs, thirds) = (part::<16>(qs, half * 32 + side * 16), part::<16>(thirds, side * 16));
        let third = run / 2; // its place in a byte
        let numbers: [i8; 16] = std::array::from_fn(|i| {
            let missing = (!thirds[i] >> third) & 1;
            ((qs[i] >> shift) & 3) as i8 - (missing << 2) as i8
        });
        write(wide, run * 16, &numbers, |q| dl * f32::from(q));
    }
});

/// Scales and minima of the 8 runs of 32 weights of a [`Q4K`] or [`Q5K`] block, 6 bits each: those
/// of the last four runs are put together of 4 bits and the 2 that the first four leave over.
#[inline(always)]
fn scales_and_minima(packed: &[u8; 12]) -> [[f32; 2]; 8] {
    let mut both = [[0; 2]; 8];
    for run in 0..4 {
        let [scale, minimum, rest] = [packed[run], packed[run + 4], packed[run + 8]];
        both[run] = [scale & 63, minimum & 63];
        both[run + 4] = [(rest & 15) | (scale >> 6) << 4, (rest >> 4) | (minimum >> 6) << 4];
    }
    both.map(|both| both.map(f32::from))
}

block!(Q4K, 256, |block, wide| {
    let (d, min) = (scale(*part(block, 0)), scale(*part(block, 2)));
    let (scales, qs) = (scales_and_minima(part(block, 4)), part::<128>(block, 16));
    for (run, [scale, minimum]) in scales.into_iter().enumerate() {
        let (d, m) = (d * scale, min * minimum);
        for side in 0..2 {
            let qs = part::<16>(qs, run / 2 * 32 + side * 16);
            let numbers: [i8; 16] = std::array::from_fn(|i| ((qs[i] >> (run % 2 * 4)) & 15) as i8);
            write(wide, run * 32 + side * 16, &numbers, |q| d * f32::from(q) - m);
        }
    }
});

block!(Q5K, 256, |block, wide| {
    let (d, min) = (scale(*part(block, 0)), scale(*part(block, 2)));
    let (scales, fifths) = (scales_and_minima(part(block, 4)), part::<32>(block, 16));
    let qs = part::<128>(block, 48);
    for (run, [scale, minimum]) in scales.into_iter().enumerate() {
        let (d, m) = (d * scale, min * minimum);
        for side in 0..2 {
            let qs = part::<16>(qs, run / 2 * 32 + side * 16);
            let fifths = part::<16>(fifths, side * 16);
            let numbers: [i8; 16] = std::array::from_fn(|i| {
                ((qs[i] >> (run % 2 * 4)) & 15 | ((fifths[i] >> run) & 1) << 4) as i8
            });
            write(wide, run * 32 + side * 16, &numbers, |q| d * f32::from(q) - m);
        }
    }
});

block!(Q6K, 256, |block, wide| {
    let d = scale(*part(block, 208));
    for half in 0..2 {
        let (low, high) = (part::<64>(block, half * 64), part::<32>(block, 128 + half * 32));
        let scales = part::<8>(block, 192 + half * 8);
        // 8 runs of 16 weights: 4 pairs of upper bits x 2 halves of 32 bytes.
        for (run, scale) in scales.iter().enumerate() {
            let (pair, side) = (run / 2, run % 2);
            let dl = d * f32::from(*scale as i8);
            let low = part::<16>(low, pair % 2 * 32 + side * 16);
            let high = part::<16>(high, side * 16);
            let numbers: [i8; 16] = std::array::from_fn(|i| {
                let low = (low[i] >> (pair / 2 * 4)) & 15;
                (low | ((high[i] >> (2 * pair)) & 3) << 4) as i8 - 32
            });
            write(wide, half * 128 + run * 16, &numbers, |q| dl * f32::from(q));
        }
    }
});
