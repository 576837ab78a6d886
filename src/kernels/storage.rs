//! What candle's tensors hold on the CPU, as slices.

use std::ops::Deref;

use candle_core::{CpuStorage, DType, Layout, Result, Storage, Tensor};
use half::slice::HalfFloatSliceExt;
use rayon::prelude::*;

/// `tensor.to_dtype(F32)`; for the half types on the CPU, on all cores.
pub(super) fn widen(tensor: &Tensor) -> Result<Tensor> {
    if !tensor.device().is_cpu() || !tensor.is_contiguous() {
        return tensor.to_dtype(DType::F32);
    }
    let (storage, layout) = tensor.storage_and_layout();
    let mut wide = vec![0f32; layout.shape().elem_count()];
    match &*storage {
        Storage::Cpu(CpuStorage::BF16(narrow)) => {
            widen_slice(elements(narrow, layout)?, &mut wide);
        }
        Storage::Cpu(CpuStorage::F16(narrow)) => {
            widen_slice(elements(narrow, layout)?, &mut wide);
        }
        _ => return tensor.to_dtype(DType::F32),
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

/// The elements of the storage that belong to a contiguous tensor.
pub(super) fn elements<'a, T>(storage: &'a [T], layout: &Layout) -> Result<&'a [T]> {
    let (start, count) = (layout.start_offset(), layout.shape().elem_count());
    match storage.get(start..start + count) {
        Some(elements) if layout.is_contiguous() => Ok(elements),
        _ => candle_core::bail!("{layout:?} is no run of a storage of {}", storage.len()),
    }
}

/// The same, to be written to.
pub(super) fn elements_mut<'a, T>(storage: &'a mut [T], layout: &Layout) -> Result<&'a mut [T]> {
    let (start, count, all) = (layout.start_offset(), layout.shape().elem_count(), storage.len());
    match storage.get_mut(start..start + count) {
        Some(elements) if layout.is_contiguous() => Ok(elements),
        _ => candle_core::bail!("{layout:?} is no run of a storage of {all}"),
    }
}

/// The elements of a contiguous `f32` storage.
pub(crate) fn f32s<'a>(storage: &'a CpuStorage, layout: &Layout) -> Result<&'a [f32]> {
    match storage {
        CpuStorage::F32(values) => elements(values, layout),
        _ => candle_core::bail!("expected f32 values"),
    }
}

/// The same, to be written to.
pub(super) fn f32s_mut<'a>(storage: &'a mut CpuStorage, layout: &Layout) -> Result<&'a mut [f32]> {
    match storage {
        CpuStorage::F32(values) => elements_mut(values, layout),
        _ => candle_core::bail!("expected f32 values"),
    }
}

/// The elements of a contiguous `f32` tensor on the CPU, held for reading as long as this lives.
pub(crate) struct Values<'a, S> {
    storage: S,
    layout: &'a Layout,
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
