//! Products `x Wᵀ` on the CPU that carry a gradient.

use std::sync::{Mutex, PoisonError};

use candle_core::backend::BackendStorage;
use candle_core::{CpuStorage, CustomOp1, CustomOp2, Layout, Result, Shape, Tensor};

use super::weight::Weight;

/// Elements of a narrow weight that are widened at a time for a gradient: 16 MiB of `f32`.
const WIDEN_AT_ONCE: usize = 1 << 22;

/// `x Wᵀ` in `f32`, with a gradient for whichever of the two wants one. candle's own product would
/// compute it for both, and copy at every reshape around it.
pub(super) struct Product;

impl CustomOp2 for Product {
    fn name(&self) -> &'static str {
        "linear"
    }

    fn cpu_fwd(
        &self,
        xs: &CpuStorage,
        xs_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (out_features, in_features) = weight_layout.shape().dims2()?;
        let mut shape = xs_layout.dims().to_vec();
        if shape.pop() != Some(in_features) || !xs_layout.is_contiguous() {
            candle_core::bail!("linear: {xs_layout:?} does not fit weight {weight_layout:?}");
        }
        let rows = shape.iter().product();
        shape.push(out_features);
        let flat = Layout::contiguous_with_offset((rows, in_features), xs_layout.start_offset());
        let sizes = (1, rows, out_features, in_features);
        let ys = xs.matmul(weight, sizes, &flat, &weight_layout.transpose(0, 1)?)?;
        Ok((ys, shape.into()))
    }

    fn bwd(
        &self,
        xs: &Tensor,
        weight: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let (out_features, in_features) = weight.dims2()?;
        let grad = grad.contiguous()?.reshape(((), out_features))?; // (rows, out)
        let of_xs = match xs.track_op() {
            true => Some(grad.matmul(&weight.detach())?.reshape(xs.shape())?),
            false => None,
        };
        let of_weight = match weight.track_op() {
            true => Some(grad.t()?.matmul(&xs.detach().reshape(((), in_features))?)?),
            false => None,
        };
        Ok((of_xs, of_weight))
    }
}

/// `x Wᵀ` in a graph that ends at `x`.
pub(super) struct Frozen {
    weight: Weight,
    /// `x Wᵀ`, computed without a graph; taken by the one forward call.
    product: Mutex<Option<Tensor>>,
}

impl Frozen {
    pub(super) fn new(weight: &Weight, product: Tensor) -> Self {
        Self { weight: weight.clone(), product: Mutex::new(Some(product)) }
    }
}

impl CustomOp1 for Frozen {
    fn name(&self) -> &'static str {
        "frozen-linear"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> Result<(CpuStorage, Shape)> {
        let taken = self.product.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(product) = taken else { candle_core::bail!("frozen-linear: run twice") };
        let values = product.flatten_all()?.to_vec1::<f32>()?;
        Ok((CpuStorage::F32(values), product.shape().clone()))
    }

    /// The weight is widened a part at a time as it is used.
    fn bwd(&self, xs: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let (out_features, in_features) = self.weight.dims()?;
        let grad = grad.reshape(((), out_features))?; // (rows of x, out)
        let step = (WIDEN_AT_ONCE / in_features.max(1)).max(1);
        let mut sum: Option<Tensor> = None;
        for start in (0..out_features).step_by(step) {
            let rows = self.weight.rows(start..out_features.min(start + step))?;
            let part = grad.narrow(1, start, rows.dim(0)?)?.matmul(&rows)?; // (rows of x, in)
            sum = Some(match sum {
                Some(sum) => (sum + part)?,
                None => part,
            });
        }
        sum.map(|sum| sum.reshape(xs.shape())).transpose()
    }
}
