//! A promise made a type: nobody else holds this tensor.

use std::ops::Add;

use candle_core::Tensor;

use super::door;
use crate::error::Result;

/// A tensor that nobody else holds, so that a result may be written over it. Only kernels make one, from
/// what they have just computed.
///
/// ```text
/// let xs = (&xs + attention.forward(..)?)?;      // the sum lies where the output of attention lay
/// ```
#[derive(Debug)]
pub(crate) struct Fresh(Tensor);

impl Fresh {
    /// `tensor` must be new: no clone, view or reshaped form of it lives elsewhere.
    pub(super) fn new(tensor: Tensor) -> Self {
        Self(tensor)
    }

    /// Several, one after the other along `dim`.
    pub(crate) fn cat(parts: Vec<Self>, dim: usize) -> Result<Self> {
        let parts: Vec<_> = parts.into_iter().map(Self::into_tensor).collect();
        Ok(Self(Tensor::cat(&parts, dim)?))
    }

    /// The tensor, free to be shared.
    pub(crate) fn into_tensor(self) -> Tensor {
        self.0
    }

    /// The tensor, for reading. A clone of it must not outlive this.
    pub(crate) fn tensor(&self) -> &Tensor {
        &self.0
    }
}

impl Add<Fresh> for &Tensor {
    type Output = Result<Tensor>;

    fn add(self, fresh: Fresh) -> Result<Tensor> {
        door::add(self, fresh).map(Fresh::into_tensor)
    }
}

impl Add for Fresh {
    type Output = Result<Self>;

    fn add(self, other: Self) -> Result<Self> {
        door::add(&self.0, other)
    }
}
