//! Matrices in blocks of GGUF types that candle does not have: each weight is 4 bits, which choose one of
//! 16 numbers out of a codebook, times a scale.
//!
//! Source: `ggml-common.h` and the `dequantize_row_*` of llama.cpp.

use std::ops::Range;

use candle_core::{Device, Result, Tensor};
use half::f16;

use super::blocks::{Iq4Nl, Iq4Xs, Mxfp4, QuantBlock};
use super::chunk::{CHUNK, PART};
use super::widened;

/// Finer where there are more weights: around 0.
pub(super) const NON_LINEAR: [i8; 16] =
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113];

/// The numbers of a float with 2 bits of exponent and 1 of mantissa, doubled.
pub(super) const E2M1: [i8; 16] = [0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12];

/// A type of such blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Codebook {
    /// 32 weights: an `f16` scale and the [`NON_LINEAR`] numbers.
    Iq4Nl,
    /// 256 weights: an `f16` scale, one of 6 bits for every 32, and the [`NON_LINEAR`] numbers.
    Iq4Xs,
    /// 32 weights: a power of two and the [`E2M1`] numbers (OCP Microscaling Formats, 2023).
    Mxfp4,
}

impl Codebook {
    /// Weights of a block.
    pub(crate) fn block_size(self) -> usize {
        match self {
            Self::Iq4Nl | Self::Mxfp4 => PART,
            Self::Iq4Xs => CHUNK,
        }
    }

    /// Bytes of a block.
    pub(crate) fn type_size(self) -> usize {
        match self {
            Self::Iq4Nl => size_of::<Iq4Nl>(),
            Self::Iq4Xs => size_of::<Iq4Xs>(),
            Self::Mxfp4 => size_of::<Mxfp4>(),
        }
    }

    /// As `ggml.h` spells it.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Iq4Nl => "IQ4_NL",
            Self::Iq4Xs => "IQ4_XS",
            Self::Mxfp4 => "MXFP4",
        }
    }

    /// The weights of whole blocks, by their definition: the plain twin of the kernels.
    pub(crate) fn dequantize(self, blocks: &[u8], out: &mut [f32]) {
        let blocks = blocks.chunks_exact(self.type_size());
        for (block, out) in blocks.zip(out.chunks_exact_mut(self.block_size())) {
            let (parts, _) = out.as_chunks_mut::<PART>();
            match (self, block) {
                (Self::Iq4Nl, [a, b, numbers @ ..]) => {
                    let d = f16::from_le_bytes([*a, *b]).to_f32();
                    parts.iter_mut().for_each(|out| look_up(&NON_LINEAR, numbers, d, out));
                }
                (Self::Mxfp4, [exponent, numbers @ ..]) => {
                    let d = half_of_power(*exponent);
                    parts.iter_mut().for_each(|out| look_up(&E2M1, numbers, d, out));
                }
                (Self::Iq4Xs, [a, b, high_a, high_b, l0, l1, l2, l3, numbers @ ..]) => {
                    let d = f16::from_le_bytes([*a, *b]).to_f32();
                    let high = u16::from_le_bytes([*high_a, *high_b]);
                    let scales = scales([*l0, *l1, *l2, *l3], high);
                    for ((out, scale), numbers) in
                        parts.iter_mut().zip(scales).zip(numbers.chunks(PART / 2))
                    {
                        look_up(&NON_LINEAR, numbers, d * scale, out);
                    }
                }
                _ => {}
            }
        }
    }
}

/// `d` times the numbers that 16 bytes choose: the lower 4 bits of each, then the upper.
fn look_up(codebook: &[i8; 16], bytes: &[u8], d: f32, out: &mut [f32; PART]) {
    let (low, high) = out.split_at_mut(PART / 2);
    for ((low, high), byte) in low.iter_mut().zip(high).zip(bytes) {
        *low = d * f32::from(codebook[usize::from(byte & 15)]);
        *high = d * f32::from(codebook[usize::from(byte >> 4)]);
    }
}

/// The scales of the 8 parts of an [`Iq4Xs`] block: 6 bits less 32 each, the lower 4 in `low`, the upper
/// 2 in `high`, the first part's at the bottom.
#[inline(always)]
pub(super) fn scales(low: [u8; 4], high: u16) -> [f32; 8] {
    let low = u32::from_le_bytes(low);
    let mut part = 0;
    [(); 8].map(|()| {
        let scale = (low >> (4 * part) & 15) | (u32::from(high) >> (2 * part) & 3) << 4;
        part += 1;
        scale as f32 - 32.0
    })
}

/// Half of `2^(exponent - 127)`, half because the numbers of [`E2M1`] are doubled. The two smallest are
/// no normal `f32`.
#[inline(always)]
pub(super) fn half_of_power(exponent: u8) -> f32 {
    let exponent = u32::from(exponent);
    f32::from_bits(if exponent < 2 { 1 << (21 + exponent) } else { (exponent - 1) << 23 })
}

/// A matrix in such blocks, on the CPU.
#[derive(Debug)]
pub(crate) struct CodebookMatrix {
    codebook: Codebook,
    blocks: Vec<u8>,
    /// `(out_features, in_features)`
    shape: (usize, usize),
}

/// Does `$do` with the blocks of a [`CodebookMatrix`].
macro_rules! for_codebook {
    ($weight:expr, |$blocks:ident| $do:expr) => {{
        let (codebook, data) = $weight.blocks();
        match codebook {
            $crate::kernels::quantized::Codebook::Iq4Nl => {
                let $blocks = data.as_chunks::<2>().0.as_chunks::<9>().0;
                $do
            }
            $crate::kernels::quantized::Codebook::Iq4Xs => {
                let $blocks = data.as_chunks::<136>().0;
                $do
            }
            $crate::kernels::quantized::Codebook::Mxfp4 => {
                let $blocks = data.as_chunks::<17>().0;
                $do
            }
        }
    }};
}
pub(in crate::kernels) use for_codebook;

impl CodebookMatrix {
    /// # Errors
    /// When rows of `in_features` are not whole blocks, or there are not as many as `shape` says.
    pub(crate) fn new(codebook: Codebook, blocks: Vec<u8>, shape: (usize, usize)) -> Result<Self> {
        let (out, len) = shape;
        let of_row = len / codebook.block_size() * codebook.type_size();
        if !len.is_multiple_of(codebook.block_size())
            || out.checked_mul(of_row) != Some(blocks.len())
        {
            let (name, bytes) = (codebook.name(), blocks.len());
            candle_core::bail!("{bytes} bytes of {name} blocks are no matrix of shape {shape:?}");
        }
        Ok(Self { codebook, blocks, shape })
    }

    /// `(out_features, in_features)`
    pub(crate) fn shape(&self) -> (usize, usize) {
        self.shape
    }

    /// Its type and its bytes.
    pub(crate) fn blocks(&self) -> (Codebook, &[u8]) {
        (self.codebook, &self.blocks)
    }

    /// Some of its rows in `f32`: `(rows, in_features)`.
    pub(crate) fn rows(&self, rows: Range<usize>) -> Result<Tensor> {
        for_codebook!(self, |blocks| widened(blocks, self.shape.1, rows))
    }

    /// Rows by index, `(n)` of `u32`, in `f32`: `(n, in_features)`.
    pub(crate) fn select(&self, rows: &Tensor) -> Result<Tensor> {
        fn chosen<B: QuantBlock>(
            w: &[B],
            (out, len): (usize, usize),
            rows: &[u32],
        ) -> Result<Tensor> {
            let of_row = len / B::LEN;
            let mut chosen = Vec::with_capacity(rows.len() * of_row);
            for row in rows {
                let row = *row as usize;
                let Some(w) = w.get(row * of_row..).and_then(|rest| rest.get(..of_row)) else {
                    candle_core::bail!("row {row} of {out}");
                };
                chosen.extend_from_slice(w);
            }
            widened(&chosen, len, 0..rows.len())
        }
        let rows = rows.to_device(&Device::Cpu)?.to_vec1::<u32>()?;
        for_codebook!(self, |blocks| chosen(blocks, self.shape, &rows))
    }
}
