//! Rows of input on the CPU, laid out once for all the weights that they are multiplied with.

use std::sync::OnceLock;

use candle_core::quantized::QTensor;
use candle_core::{CpuStorage, Error, Result, Storage, Tensor};
use rayon::prelude::*;

use super::dense::{self, Element, Tiles};
use super::quantized::{self, FixedPoint, QuantBlock, for_blocks, for_codebook};
use super::storage::{elements, values};
use super::weight::Weight;

/// Up to this many rows of input, each row of the weight is multiplied as it is read; for more it pays
/// to transpose the input.
pub(crate) const FEW_ROWS: usize = 16;

/// Rows of input as the kernels for products read them.
pub(super) struct InputRows {
    /// `(rows, in)`, contiguous.
    xs: Tensor,
    /// For more than [`FEW_ROWS`] rows.
    tiles: Option<Tiles>,
    /// For fewer, if a weight asks for it.
    fixed_point: OnceLock<Vec<FixedPoint>>,
}

impl InputRows {
    /// `xs` is `(rows, in)` in `f32`. They are multiplied by what multiplies `among` rows, if that is more.
    pub(super) fn new(xs: &Tensor, among: usize) -> Result<Self> {
        let (rows, len) = xs.dims2()?;
        let xs = xs.contiguous()?;
        // Not on first use: that would be on several threads at a time.
        let tiles = match rows.max(among) > FEW_ROWS && rows > 0 && len > 0 {
            true => Some(Tiles::new(values(&xs).get()?, len)),
            false => None,
        };
        Ok(Self { xs, tiles, fixed_point: OnceLock::new() })
    }

    /// `x Wᵀ`, `(rows, out)` in `f32`. The plain twin is candle's product with `W` widened.
    pub(super) fn times(&self, weight: &Weight) -> Result<Tensor> {
        match weight {
            Weight::Dense(weight) => self.times_dense(weight),
            Weight::Quantized(weight) => self.times_quantized(weight),
            Weight::Codebook(weight) => {
                for_codebook!(weight, |blocks| self.times_blocks(blocks, weight.shape().1))
            }
        }
    }

    fn times_dense(&self, weight: &Tensor) -> Result<Tensor> {
        let (_, len) = weight.dims2()?;
        let (storage, layout) = weight.storage_and_layout();
        match &*storage {
            Storage::Cpu(CpuStorage::F32(w)) => self.times_numbers(elements(w, layout)?, len),
            Storage::Cpu(CpuStorage::BF16(w)) => self.times_numbers(elements(w, layout)?, len),
            Storage::Cpu(CpuStorage::F16(w)) => self.times_numbers(elements(w, layout)?, len),
            _ => Err(Error::UnsupportedDTypeForOp(weight.dtype(), "product")),
        }
    }

    fn times_quantized(&self, weight: &QTensor) -> Result<Tensor> {
        let (_, len) = weight.shape().dims2()?;
        for_blocks!(weight, |blocks| self.times_blocks(blocks, len))
    }

    fn times_numbers<T: Element>(&self, w: &[T], len: usize) -> Result<Tensor> {
        self.multiply(w, len, |x, columns| dense::few_rows(x, w, len, columns))
    }

    fn times_blocks<B: QuantBlock>(&self, w: &[B], len: usize) -> Result<Tensor> {
        self.multiply(w, len, |x, columns| {
            let fixed_point = || self.fixed_point.get_or_init(|| quantized::to_fixed_point(x, len));
            quantized::few_rows(x, fixed_point, w, len, columns);
        })
    }

    /// `x Wᵀ` for rows of `len` weights. Where `x` has few rows, `few` multiplies them.
    fn multiply<T: Element>(
        &self,
        w: &[T],
        len: usize,
        few: impl FnOnce(&[f32], &mut [f32]),
    ) -> Result<Tensor> {
        let (rows, x_len) = self.xs.dims2()?;
        let row_len = (len / T::LEN).max(1);
        if x_len != len || !w.len().is_multiple_of(row_len) {
            candle_core::bail!("product: rows of {x_len} do not fit a weight with rows of {len}");
        }
        let out = w.len() / row_len;
        if let Some(tiles) = &self.tiles {
            return Tensor::from_vec(tiles.product(w), (rows, out), self.xs.device());
        }
        // Column-major first, so that a task writes one unbroken run: (out, rows).
        let mut columns = vec![0f32; out * rows];
        few(values(&self.xs).get()?, &mut columns);
        let ys = if rows == 1 { columns } else { transposed(&columns, rows) };
        Tensor::from_vec(ys, (rows, out), self.xs.device())
    }
}

/// `(out, rows)` to `(rows, out)`
fn transposed(columns: &[f32], rows: usize) -> Vec<f32> {
    const TASK: usize = 1 << 13;
    let mut ys = vec![0f32; columns.len()];
    let out = (columns.len() / rows.max(1)).max(1);
    let of_rows = ys.par_chunks_mut(out).with_min_len(TASK.div_ceil(out)).enumerate();
    of_rows.for_each(|(row, ys)| {
        for (y, column) in ys.iter_mut().zip(columns.chunks_exact(rows)) {
            *y = column[row];
        }
    });
    ys
}
