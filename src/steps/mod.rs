//! Attention laid open: every intermediate result of one head, as a tensor with a name.
//!
//! ```text
//! AttentionSteps   scores, softmax, context, output projection, residual       of any pass, by a HeadTap
//! CosineSteps      the same with cosines of the embeddings as scores           of any rows
//! SoftmaxSteps     scores, row maximum, exponentials, row sums, weights        of any scores; a part of both
//! ```
//!
//! What a pass keeps is read from the pass itself, and only what its fused kernel never writes down is worked out
//! again. All tensors are `f32` on the CPU.

mod attention;
mod cosine;
mod softmax;

use candle_core::{DType, Device, Tensor};

pub(crate) use self::attention::of_pass;
pub use self::attention::{AttentionSteps, HeadTap};
pub use self::cosine::CosineSteps;
pub use self::softmax::SoftmaxSteps;
use crate::error::{Error, Result};

/// A copy in `f32` on the CPU, without gradient.
fn copied(xs: &Tensor) -> Result<Tensor> {
    let here = xs.detach().to_device(&Device::Cpu)?;
    Ok(here.to_dtype(DType::F32)?.force_contiguous()?)
}

/// Refuses what is no matrix, or has nothing in it.
fn check_matrix(name: &'static str, rows: &str, xs: &Tensor) -> Result<()> {
    match xs.dims() {
        [_, _] if xs.elem_count() > 0 => Ok(()),
        got => Err(Error::parameter(name, rows, format!("{got:?}"))),
    }
}
