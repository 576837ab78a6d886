//! Products with weights that are kept in the blocks of GGUF files.
//!
//! ```text
//! chunk         how numbers and scales of blocks lie: sizes and nothing else
//! fixed_point   a row of input as whole numbers                     reads chunk
//! simd          what a vector simd does with both                   reads chunk, fixed_point
//! blocks        the formats                                         reads chunk, simd, codebook
//! codebook      those that candle lacks, and matrices in them       reads chunk, blocks
//! few_rows      products of a few rows                              reads all of them
//! whole_simd    what a vector unit does with bytes                  reads simd
//! many_rows     products of many that need not be exact             reads chunk, simd, blocks, whole_simd
//! digits        sums over digits of 4 bits, of no block             reads simd
//! ```

pub(super) mod blocks;
mod chunk;
mod codebook;
mod digits;
#[cfg(test)]
mod every_block;
mod few_rows;
mod fixed_point;
mod many_rows;
mod simd;
mod whole_simd;

use std::ops::Range;

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Result, Tensor};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::dense::Element;
pub(super) use blocks::{Q8_0, QuantBlock, for_blocks};
pub(super) use codebook::for_codebook;
pub(crate) use codebook::{Codebook, CodebookMatrix};
pub(crate) use digits::{DIGIT_ROWS, DigitRun, DigitTable, sum_digits};
pub(super) use few_rows::{few_rows, to_fixed_point};
pub(super) use fixed_point::FixedPoint;
pub(super) use many_rows::ByteTiles;
pub(super) use simd::adds_all_bytes;

/// Whether there are kernels for blocks of this type.
pub(crate) fn reads_blocks(dtype: GgmlDType) -> bool {
    use GgmlDType::{BF16, F16, F32, Q8_1, Q8K};
    !matches!(dtype, F32 | F16 | BF16 | Q8_1 | Q8K)
}

/// Rows of a quantised weight on the CPU in `f32`: `(rows, in)`.
pub(crate) fn rows(weight: &QTensor, rows: Range<usize>) -> Result<Tensor> {
    let (_, len) = weight.shape().dims2()?;
    for_blocks!(weight, |blocks| widened(blocks, len, rows))
}

fn widened<B: QuantBlock>(w: &[B], len: usize, rows: Range<usize>) -> Result<Tensor> {
    let row_len = (len / B::LEN).max(1);
    let Some(w) = w.get(rows.start * row_len..rows.end * row_len) else {
        candle_core::bail!("rows {rows:?} of {}", w.len() / row_len);
    };
    let mut wide = vec![0f32; rows.len() * len];
    let arch = Arch::new();
    wide.par_chunks_mut(len.max(1))
        .zip(w.par_chunks(row_len))
        .for_each(|(wide, w)| arch.dispatch(Widen { w, wide }));
    Tensor::from_vec(wide, (rows.len(), len), &Device::Cpu)
}

/// A row of a weight, to be widened.
struct Widen<'a, B> {
    w: &'a [B],
    wide: &'a mut [f32],
}

impl<B: QuantBlock> WithSimd for Widen<'_, B> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        B::widen(simd, self.w, self.wide);
    }
}
