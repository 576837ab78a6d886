//! CPU kernels where candle's own are slow. Each is compiled for the processor's vector units by
//! run-time detection ([`pulp`]), and is tested against its plain twin in candle operations.

mod attend;
mod dot;
mod exp;
mod heads;
mod product;
mod rms_norm;
mod softmax;
mod swiglu;

use std::ops::Deref;

use candle_core::{CpuStorage, DType, Error, Result, Storage, Tensor};
use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;

pub(crate) use attend::Attend;
pub(crate) use heads::SplitHeads;
pub(crate) use rms_norm::RmsNorm;
pub(crate) use softmax::MaskedSoftmax;
pub(crate) use swiglu::SwiGlu;

/// Partial results side by side: one alone would wait for its own previous step.
const LANES: usize = 32;

/// Rows of the weight that one task multiplies: enough to outweigh handing out the task.
const ROWS_PER_TASK: usize = 32;

/// `x Wᵀ` for a few rows of `x`, limited by the speed at which `W` is read.
///
/// `xs` is `(rows, in)` in `f32`, `weight` is `(out, in)` in `f32`, `bf16` or `f16`; the result is
/// `(rows, out)` in `f32`. The plain twin is `xs.matmul(&weight.to_dtype(F32)?.t()?)`.
pub(crate) fn matvec(xs: &Tensor, weight: &Tensor) -> Result<Tensor> {
    let (rows, in_features) = xs.dims2()?;
    let (out_features, weight_in) = weight.dims2()?;
    if in_features != weight_in {
        candle_core::bail!("matvec: {:?} does not fit weight {:?}", xs.shape(), weight.shape());
    }
    let xs = xs.contiguous()?;
    if !weight.is_contiguous() {
        candle_core::bail!("matvec: expected a contiguous weight");
    }
    let (x_storage, x_layout) = xs.storage_and_layout();
    let (w_storage, w_layout) = weight.storage_and_layout();
    let (Storage::Cpu(CpuStorage::F32(x)), Storage::Cpu(w)) = (&*x_storage, &*w_storage) else {
        candle_core::bail!("matvec: expected f32 input on the CPU, got {:?}", xs.dtype());
    };
    let x = within(x, x_layout, rows * in_features)?;

    // Column-major first, so that a task writes one unbroken run: (out, rows).
    let mut columns = vec![0f32; out_features * rows];
    let count = out_features * in_features;
    match w {
        CpuStorage::F32(w) => {
            dot::columns(x, within(w, w_layout, count)?, in_features, &mut columns);
        }
        CpuStorage::BF16(w) => {
            dot::columns(x, within(w, w_layout, count)?, in_features, &mut columns);
        }
        CpuStorage::F16(w) => {
            dot::columns(x, within(w, w_layout, count)?, in_features, &mut columns);
        }
        _ => return Err(Error::UnsupportedDTypeForOp(weight.dtype(), "matvec")),
    }
    Tensor::from_vec(columns, (out_features, rows), xs.device())?.t()?.contiguous()
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
