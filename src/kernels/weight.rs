//! The matrix of a projection, as it is kept.

use std::ops::Range;
use std::sync::Arc;

use candle_core::quantized::QTensor;
use candle_core::{DType, Device, Result, Tensor};

use super::compute::{Arithmetic, Compute};
use super::storage::widen;
use super::{CodebookMatrix, quantized, reads_blocks};

/// `W`, `(out_features, in_features)`, of a product `x Wᵀ`.
#[derive(Clone, Debug)]
pub(crate) struct Weight {
    pub(crate) kept: Kept,
    pub(crate) compute: Compute,
}

/// What a weight is kept in.
#[derive(Clone, Debug)]
pub(crate) enum Kept {
    /// Row-major on its device, in the input's type or, on the CPU, in a narrower one.
    Dense(Tensor),
    /// Blocks of a GGUF type. On the CPU they are unpacked a few at a time as they are multiplied; on
    /// other devices candle multiplies.
    Quantized(Arc<QTensor>),
    /// Blocks of a GGUF type that candle does not have, on the CPU.
    Codebook(Arc<CodebookMatrix>),
}

impl From<Kept> for Weight {
    fn from(kept: Kept) -> Self {
        Self { kept, compute: Compute::Exact }
    }
}

impl Weight {
    pub(crate) fn dense(weight: &Tensor) -> Result<Self> {
        Ok(Kept::Dense(weight.contiguous()?).into())
    }

    /// On the CPU, a type that no kernel reads is dequantised once and for all.
    pub(crate) fn quantized(weight: Arc<QTensor>) -> Result<Self> {
        let device = weight.device();
        Ok(match device.is_cpu() && !reads_blocks(weight.dtype()) {
            true => Kept::Dense(weight.dequantize(&device)?).into(),
            false => Kept::Quantized(weight).into(),
        })
    }

    /// `(out_features, in_features)`
    pub(crate) fn dims(&self) -> Result<(usize, usize)> {
        match &self.kept {
            Kept::Dense(weight) => weight.dims2(),
            Kept::Quantized(weight) => weight.shape().dims2(),
            Kept::Codebook(weight) => Ok(weight.shape()),
        }
    }

    pub(crate) fn device(&self) -> Device {
        match &self.kept {
            Kept::Dense(weight) => weight.device().clone(),
            Kept::Quantized(weight) => weight.device(),
            Kept::Codebook(_) => Device::Cpu,
        }
    }

    /// How many rows of input are multiplied with it, where no gradient is wanted.
    pub(super) fn arithmetic(&self) -> Arithmetic {
        match (self.compute, &self.kept) {
            (Compute::Fast, Kept::Dense(weight)) if weight.dtype() == DType::BF16 => {
                Arithmetic::of_bf16()
            }
            (Compute::Fast, Kept::Quantized(_) | Kept::Codebook(_)) => Arithmetic::of_blocks(),
            _ => Arithmetic::Numbers,
        }
    }

    /// Some of its rows in `f32`.
    pub(super) fn rows(&self, rows: Range<usize>) -> Result<Tensor> {
        match &self.kept {
            Kept::Dense(weight) => widen(&weight.narrow(0, rows.start, rows.len())?),
            Kept::Quantized(weight) => quantized::rows(weight, rows),
            Kept::Codebook(weight) => weight.rows(rows),
        }
    }
}
