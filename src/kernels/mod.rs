//! CPU kernels where candle's own are slow. Each is compiled for the processor's vector units by
//! run-time detection ([`pulp`]), and is tested against its plain twin in candle operations.

mod add;
mod attend;
mod block_dot;
mod blocks;
mod dot;
mod element;
mod exp;
mod fixed;
mod flash;
mod heads;
mod product;
mod rms_norm;
mod softmax;
mod spans;
mod swiglu;
mod tiles;
mod units;

use std::ops::{Deref, Range};
use std::sync::{Once, OnceLock};

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{CpuStorage, DType, Device, Error, Result, Storage, Tensor};
use half::slice::HalfFloatSliceExt;
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

pub(crate) use add::AddTo;
pub(crate) use attend::Attend;
use blocks::{Block, for_blocks};
use element::Element;
use fixed::Fixed;
pub(crate) use flash::attend;
pub(crate) use heads::SplitHeads;
pub(crate) use rms_norm::RmsNorm;
pub(crate) use swiglu::SwiGlu;
use tiles::Tiles;

/// Partial results side by side: one alone would wait for its own previous step.
const LANES: usize = 32;

/// Rows of the weight that one task multiplies: enough to outweigh handing out the task.
const ROWS_PER_TASK: usize = 32;

/// Up to this many rows of input, each row of the weight is multiplied as it is read; more are worth
/// turning the input for.
const FEW_ROWS: usize = 16;

/// Rows of input on the CPU as products read them. They are laid out once, for all the weights that
/// they are multiplied with.
pub(crate) struct Rows {
    /// `(rows, in)`, contiguous.
    xs: Tensor,
    tiles: Option<Tiles>,
    fixed: OnceLock<Vec<Fixed>>,
}

impl Rows {
    /// `xs` is `(rows, in)` in `f32`.
    pub(crate) fn new(xs: &Tensor) -> Result<Self> {
        let (rows, len) = xs.dims2()?;
        let xs = xs.contiguous()?;
        // Not when they are needed first: that would be on several threads at a time.
        let tiles = match rows > FEW_ROWS && len > 0 {
            true => Some(Tiles::new(values(&xs).get()?, len)),
            false => None,
        };
        Ok(Self { xs, tiles, fixed: OnceLock::new() })
    }

    /// `x Wᵀ`: `weight` is `(out, in)` in `f32`, `bf16` or `f16`; the result is `(rows, out)` in `f32`.
    /// The plain twin is `xs.matmul(&weight.to_dtype(F32)?.t()?)`.
    pub(crate) fn times(&self, weight: &Tensor) -> Result<Tensor> {
        let (out, len) = weight.dims2()?;
        if !weight.is_contiguous() {
            candle_core::bail!("product: expected a contiguous weight");
        }
        let (storage, layout) = weight.storage_and_layout();
        match &*storage {
            Storage::Cpu(CpuStorage::F32(w)) => {
                self.times_dense(within(w, layout, out * len)?, len)
            }
            Storage::Cpu(CpuStorage::BF16(w)) => {
                self.times_dense(within(w, layout, out * len)?, len)
            }
            Storage::Cpu(CpuStorage::F16(w)) => {
                self.times_dense(within(w, layout, out * len)?, len)
            }
            _ => Err(Error::UnsupportedDTypeForOp(weight.dtype(), "product")),
        }
    }

    /// [`times`](Self::times) for a quantised weight. The plain twin multiplies by
    /// `weight.dequantize(..)`.
    pub(crate) fn times_quantized(&self, weight: &QTensor) -> Result<Tensor> {
        let (_, len) = weight.shape().dims2()?;
        for_blocks!(weight, |blocks| self.times_blocks(blocks, len))
    }

    fn times_dense<T: Element>(&self, w: &[T], len: usize) -> Result<Tensor> {
        self.multiply(w, len, |x, columns| dot::columns(x, w, len, columns))
    }

    fn times_blocks<B: Block>(&self, w: &[B], len: usize) -> Result<Tensor> {
        self.multiply(w, len, |x, columns| {
            let fixed = || self.fixed.get_or_init(|| block_dot::fix(x, len));
            block_dot::columns(x, fixed, w, len, columns);
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
        Tensor::from_vec(columns, (out, rows), self.xs.device())?.t()?.contiguous()
    }
}

/// Rows of a quantised weight on the CPU in `f32`: `(rows, in)`.
pub(crate) fn quantized_rows(weight: &QTensor, rows: Range<usize>) -> Result<Tensor> {
    let (_, len) = weight.shape().dims2()?;
    for_blocks!(weight, |blocks| widened_rows(blocks, len, rows))
}

/// Whether there are kernels for blocks of this type.
pub(crate) fn reads_blocks(dtype: GgmlDType) -> bool {
    use GgmlDType::{BF16, F16, F32, Q8_1, Q8K};
    !matches!(dtype, F32 | F16 | BF16 | Q8_1 | Q8K)
}

fn widened_rows<T: Element>(w: &[T], len: usize, rows: Range<usize>) -> Result<Tensor> {
    let row_len = (len / T::LEN).max(1);
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
struct Widen<'a, T> {
    w: &'a [T],
    wide: &'a mut [f32],
}

impl<T: Element> WithSimd for Widen<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        T::widen(simd, self.w, self.wide);
    }
}

/// Makes glibc keep the memory of one result for the next, where that is what allocates.
///
/// It gives back what is free beyond twice the largest block that was ever freed, and asks for memory
/// zeroed by the system whenever a result is larger: a tenth of a pass over 512 tokens. A block just
/// under 32 MiB, the most that it considers, is freed here once, as any program may.
pub(crate) fn keep_freed_memory() {
    const JUST_UNDER: usize = (32 << 20) - (64 << 10);
    static ONCE: Once = Once::new();
    ONCE.call_once(|| drop(std::hint::black_box(Vec::<u8>::with_capacity(JUST_UNDER))));
}

/// `tensor.to_dtype(dtype)`, on all cores for the half types on the CPU.
pub(crate) fn widen(tensor: &Tensor, dtype: DType) -> Result<Tensor> {
    if !tensor.device().is_cpu() || dtype != DType::F32 || !tensor.is_contiguous() {
        return tensor.to_dtype(dtype);
    }
    let (storage, layout) = tensor.storage_and_layout();
    let count = layout.shape().elem_count();
    let mut wide = vec![0f32; count];
    match &*storage {
        Storage::Cpu(CpuStorage::BF16(narrow)) => {
            widen_slice(within(narrow, layout, count)?, &mut wide);
        }
        Storage::Cpu(CpuStorage::F16(narrow)) => {
            widen_slice(within(narrow, layout, count)?, &mut wide);
        }
        _ => return tensor.to_dtype(dtype),
    }
    Tensor::from_vec(wide, layout.shape(), tensor.device())
}

fn widen_slice<T: Sync>(narrow: &[T], wide: &mut [f32])
where
    [T]: HalfFloatSliceExt,
{
    const RUN: usize = 1 << 14;
    wide.par_chunks_mut(RUN)
        .zip(narrow.par_chunks(RUN))
        .for_each(|(wide, narrow)| narrow.convert_to_f32_slice(wide));
}

/// The `count` elements that a contiguous tensor shows of its storage.
fn within<'a, T>(storage: &'a [T], layout: &candle_core::Layout, count: usize) -> Result<&'a [T]> {
    let start = layout.start_offset();
    match storage.get(start..start + count) {
        Some(elements) => Ok(elements),
        None => candle_core::bail!("{count} elements at {start} of a storage of {}", storage.len()),
    }
}

/// The elements of a contiguous `f32` storage.
pub(crate) fn f32s<'a>(storage: &'a CpuStorage, layout: &candle_core::Layout) -> Result<&'a [f32]> {
    let (CpuStorage::F32(values), true) = (storage, layout.is_contiguous()) else {
        candle_core::bail!("expected contiguous f32 values");
    };
    within(values, layout, layout.shape().elem_count())
}

/// The same, to be written to.
pub(crate) fn f32s_mut<'a>(
    storage: &'a mut CpuStorage,
    layout: &candle_core::Layout,
) -> Result<&'a mut [f32]> {
    let (CpuStorage::F32(values), true) = (storage, layout.is_contiguous()) else {
        candle_core::bail!("expected contiguous f32 values");
    };
    let (start, count) = (layout.start_offset(), layout.shape().elem_count());
    match values.get_mut(start..start + count) {
        Some(values) => Ok(values),
        None => candle_core::bail!("{count} elements at {start} are outside their storage"),
    }
}

/// The elements of a contiguous `f32` tensor on the CPU, held for reading as long as this lives.
pub(crate) struct Values<'a, S> {
    storage: S,
    layout: &'a candle_core::Layout,
}

pub(crate) fn values(tensor: &Tensor) -> Values<'_, impl Deref<Target = Storage>> {
    let (storage, layout) = tensor.storage_and_layout();
    Values { storage, layout }
}

impl<S: Deref<Target = Storage>> Values<'_, S> {
    pub(crate) fn get(&self) -> Result<&[f32]> {
        match &*self.storage {
            Storage::Cpu(storage) => f32s(storage, self.layout),
            _ => candle_core::bail!("expected values on the CPU"),
        }
    }
}

/// A gradient for `input`, if it wants one.
pub(crate) fn gradient_for(input: &Tensor, gradient: Vec<f32>) -> Result<Option<Tensor>> {
    match input.track_op() {
        true => Tensor::from_vec(gradient, input.shape(), input.device()).map(Some),
        false => Ok(None),
    }
}
