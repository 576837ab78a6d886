//! The matrix of a projection, as it is kept.

use std::ops::Range;
use std::sync::Arc;

use candle_core::quantized::QTensor;
use candle_core::{Device, Result, Tensor};

use super::storage::widen;
use super::{CodebookMatrix, quantized, reads_blocks};

/// `W`, `(out_features, in_features)`, of a product `x Wᵀ`.
#[derive(Clone, Debug)]
pub(crate) enum Weight {
    /// Row-major on its device, in the input's type or, on the CPU, in a narrower one.
    Dense(Tensor),
    /// Blocks of a GGUF type. On the CPU they are unpacked a few at a time as they are multiplied; on
    /// other devices candle multiplies.
    Quantized(Arc<QTensor>),
    /// Blocks of a GGUF type that candle does not have, on the CPU.
    Codebook(Arc<CodebookMatrix>),
}

impl Weight {
    pub(crate) fn dense(weight: &Tensor) -> Result<Self> {
        Ok(Self::Dense(weight.contiguous()?))
    }

    /// On the CPU, a type that no kernel reads is dequantised once and for all.
    pub(crate) fn quantized(weight: Arc<QTensor>) -> Result<Self> {
        let device = weight.device();
        match device.is_cpu() && !reads_blocks(weight.dtype()) {
            true => Ok(Self::Dense(weight.dequantize(&device)?)),
            false => Ok(Self::Quantized(weight)),
        }
    }

    /// `(out_features, in_features)`
    pub(crate) fn dims(&self) -> Result<(usize, usize)> {
        match self {
            Self::Dense(weight) => weight.dims2(),
            Self::Quantized(weight) => weight.shape().dims2(),
            Self::Codebook(weight) => Ok(weight.shape()),
        }
    }

    pub(crate) fn device(&self) -> Device {
        match self {
            Self::Dense(weight) => weight.device().clone(),
            Self::Quantized(weight) => weight.device(),
            Self::Codebook(_) => Device::Cpu,
        }
    }

    /// Some of its rows in `f32`.
    pub(super) fn rows(&self, rows: Range<usize>) -> Result<Tensor> {
        match self {
            Self::Dense(weight) => widen(&weight.narrow(0, rows.start, rows.len())?),
            Self::Quantized(weight) => quantized::rows(weight, rows),
            Self::Codebook(weight) => weight.rows(rows),
        }
    }
}
