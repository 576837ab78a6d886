//! Rows of input on the CPU, laid out once for all the weights that they are multiplied with.

use std::sync::OnceLock;

use candle_core::quantized::QTensor;
use candle_core::{CpuStorage, Error, Result, Storage, Tensor};
use half::bf16;
use rayon::prelude::*;

use super::compute::Arithmetic;
use super::dense::{self, Element, PairTiles, Tiles};
use super::quantized::{self, ByteTiles, FixedPoint, QuantBlock, for_blocks, for_codebook};
use super::storage::{elements, values};
use super::weight::{Kept, Weight};

/// Up to this many rows of input, each row of the weight is multiplied as it is read; for more it pays
/// to transpose the input.
pub(crate) const FEW_ROWS: usize = 16;

/// Rows of input as the kernels for products read them.
pub(super) struct InputRows {
    /// `(rows, in)`, contiguous.
    xs: Tensor,
    /// For more than [`FEW_ROWS`] rows.
    many: Option<ManyRows>,
    /// For fewer, if a weight asks for it.
    fixed_point: OnceLock<Vec<FixedPoint>>,
}

/// Many rows, in each of the ways that they are multiplied in.
struct ManyRows {
    numbers: Option<Tiles>,
    pairs: Option<PairTiles>,
    bytes: Option<ByteTiles>,
}

impl ManyRows {
    fn new(x: &[f32], len: usize, ways: &[Arithmetic]) -> Self {
        Self {
            numbers: ways.contains(&Arithmetic::Numbers).then(|| Tiles::new(x, len)),
            pairs: ways.contains(&Arithmetic::Pairs).then(|| PairTiles::new(x, len)),
            bytes: ways.contains(&Arithmetic::Bytes).then(|| ByteTiles::new(x, len)),
        }
    }

    fn numbers<T: Element>(&self, w: &[T]) -> Option<Vec<f32>> {
        self.numbers.as_ref().map(|tiles| tiles.product(w))
    }

    fn pairs(&self, w: &[bf16]) -> Option<Vec<f32>> {
        self.pairs.as_ref().map(|tiles| tiles.product(w))
    }

    fn bytes<B: QuantBlock>(&self, w: &[B]) -> Option<Vec<f32>> {
        self.bytes.as_ref().map(|tiles| tiles.product(w))
    }
}

impl InputRows {
    /// `xs` is `(rows, in)` in `f32`. They are multiplied by what multiplies `among` rows, if that is more,
    /// in any of these `ways`.
    pub(super) fn new(xs: &Tensor, among: usize, ways: &[Arithmetic]) -> Result<Self> {
        let (rows, len) = xs.dims2()?;
        let xs = xs.contiguous()?;
        // Not on first use: that would be on several threads at a time.
        let many = match rows.max(among) > FEW_ROWS && rows > 0 && len > 0 {
            true => Some(ManyRows::new(values(&xs).get()?, len, ways)),
            false => None,
        };
        Ok(Self { xs, many, fixed_point: OnceLock::new() })
    }

    /// Whether they can be multiplied in this way.
    pub(super) fn fit(&self, way: Arithmetic) -> bool {
        self.many.as_ref().is_none_or(|many| match way {
            Arithmetic::Numbers => many.numbers.is_some(),
            Arithmetic::Pairs => many.pairs.is_some(),
            Arithmetic::Bytes => many.bytes.is_some(),
        })
    }

    /// `x Wᵀ`, `(rows, out)` in `f32`. The plain twin is candle's product with `W` widened.
    pub(super) fn times(&self, weight: &Weight, way: Arithmetic) -> Result<Tensor> {
        match &weight.kept {
            Kept::Dense(weight) => self.times_dense(weight, way),
            Kept::Quantized(weight) => self.times_quantized(weight, way),
            Kept::Codebook(weight) => {
                for_codebook!(weight, |blocks| self.times_blocks(blocks, weight.shape().1, way))
            }
        }
    }

    fn times_dense(&self, weight: &Tensor, way: Arithmetic) -> Result<Tensor> {
        let (_, len) = weight.dims2()?;
        let (storage, layout) = weight.storage_and_layout();
        match &*storage {
            Storage::Cpu(CpuStorage::F32(w)) => self.times_numbers(elements(w, layout)?, len),
            Storage::Cpu(CpuStorage::BF16(w)) if way == Arithmetic::Pairs => {
                let w = elements(w, layout)?;
                let few = |x: &[f32], columns: &mut [f32]| dense::few_rows(x, w, len, columns);
                self.multiply(w, len, |many| many.pairs(w), few)
            }
            Storage::Cpu(CpuStorage::BF16(w)) => self.times_numbers(elements(w, layout)?, len),
            Storage::Cpu(CpuStorage::F16(w)) => self.times_numbers(elements(w, layout)?, len),
            _ => Err(Error::UnsupportedDTypeForOp(weight.dtype(), "product")),
        }
    }

    fn times_quantized(&self, weight: &QTensor, way: Arithmetic) -> Result<Tensor> {
        let (_, len) = weight.shape().dims2()?;
        for_blocks!(weight, |blocks| self.times_blocks(blocks, len, way))
    }

    fn times_numbers<T: Element>(&self, w: &[T], len: usize) -> Result<Tensor> {
        let few = |x: &[f32], columns: &mut [f32]| dense::few_rows(x, w, len, columns);
        self.multiply(w, len, |many| many.numbers(w), few)
    }

    fn times_blocks<B: QuantBlock>(&self, w: &[B], len: usize, way: Arithmetic) -> Result<Tensor> {
        let few = |x: &[f32], columns: &mut [f32]| {
            let fixed_point = || self.fixed_point.get_or_init(|| quantized::to_fixed_point(x, len));
            quantized::few_rows(x, fixed_point, w, len, columns);
        };
        let many = |many: &ManyRows| match way {
            Arithmetic::Bytes => many.bytes(w),
            Arithmetic::Numbers | Arithmetic::Pairs => many.numbers(w),
        };
        self.multiply(w, len, many, few)
    }

    /// `x Wᵀ` for rows of `len` weights, by what multiplies `many` rows, if they are laid out for it, or by
    /// what multiplies a `few`.
    fn multiply<T: Element>(
        &self,
        w: &[T],
        len: usize,
        many: impl FnOnce(&ManyRows) -> Option<Vec<f32>>,
        few: impl FnOnce(&[f32], &mut [f32]),
    ) -> Result<Tensor> {
        let (rows, x_len) = self.xs.dims2()?;
        let row_len = (len / T::LEN).max(1);
        if x_len != len || !w.len().is_multiple_of(row_len) {
            candle_core::bail!("product: rows of {x_len} do not fit a weight with rows of {len}");
        }
        let out = w.len() / row_len;
        if let Some(rows_of_x) = &self.many {
            let Some(ys) = many(rows_of_x) else {
                candle_core::bail!("product: {rows} rows are not laid out for this weight");
            };
            return Tensor::from_vec(ys, (rows, out), self.xs.device());
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
