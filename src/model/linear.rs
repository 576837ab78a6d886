//! A projection without bias. Its weight is dense or quantised, with or without low-rank adapters;
//! nobody else needs to know which.

use std::ops::Range;
use std::sync::{Arc, Mutex, PoisonError};

use candle_core::backend::BackendStorage;
use candle_core::quantized::{QMatMul, QTensor};
use candle_core::{
    CpuStorage, CustomOp1, CustomOp2, D, DType, Device, Layout, Module, Shape, Tensor,
};

use crate::kernels;
use crate::error::{Error, Result};

/// Elements of a narrow weight that are widened at a time for a gradient: 16 MiB of `f32`.
const WIDEN_AT_ONCE: usize = 1 << 22;

/// `y = x Wᵀ`, with `W` of shape `(out_features, in_features)`.
#[derive(Clone, Debug)]
pub struct Linear {
    weight: Weight,
    /// `(out_features, in_features)`
    shape: (usize, usize),
    /// Added to the weight.
    low_rank: Vec<LowRank>,
}

#[derive(Clone, Debug)]
enum Weight {
    /// Row-major on its device, in the input's type or, on the CPU, in a narrower one.
    Dense(Tensor),
    /// Blocks of a GGUF type. On the CPU they are unpacked a few at a time as they are multiplied; on
    /// other devices candle multiplies.
    Quantized(Arc<QTensor>),
}

/// `scale · B A`, a change of a weight that is never multiplied out (LoRA, Hu et al. 2021).
#[derive(Clone, Debug)]
pub(crate) struct LowRank {
    /// `A`, `(rank, in_features)`, in the type of the stream.
    pub(crate) a: Tensor,
    /// `B`, `(out_features, rank)`, in the type of the stream.
    pub(crate) b: Tensor,
    pub(crate) scale: f64,
}

impl Linear {
    /// A projection by a dense `weight` of shape `(out_features, in_features)`.
    ///
    /// # Errors
    /// When `weight` is no matrix, or a device has no room for a copy of one that is not contiguous.
    pub fn dense(weight: &Tensor) -> Result<Self> {
        let shape = weight.dims2()?;
        Ok(Self { weight: Weight::Dense(weight.contiguous()?), shape, low_rank: Vec::new() })
    }

    /// A projection by a quantised `weight` of shape `(out_features, in_features)`.
    ///
    /// # Errors
    /// When `weight` is no matrix, or candle cannot prepare that type.
    pub fn quantized(weight: Arc<QTensor>) -> Result<Self> {
        let shape = weight.shape().dims2()?;
        let device = weight.device();
        let weight = match device.is_cpu() && !kernels::reads_blocks(weight.dtype()) {
            true => Weight::Dense(weight.dequantize(&device)?),
            false => Weight::Quantized(weight),
        };
        Ok(Self { weight, shape, low_rank: Vec::new() })
    }

    /// `(out_features, in_features)`
    pub(crate) fn shape(&self) -> (usize, usize) {
        self.shape
    }

    pub(crate) fn device(&self) -> Device {
        match &self.weight {
            Weight::Dense(weight) => weight.device().clone(),
            Weight::Quantized(weight) => weight.device(),
        }
    }

    /// The type that products are made of on other devices than the CPU.
    pub(crate) fn dtype(&self) -> DType {
        match &self.weight {
            Weight::Dense(weight) => weight.dtype(),
            Weight::Quantized(_) => DType::F32,
        }
    }

    /// What the weight is kept as, as GGUF tools write it, and its bytes.
    pub(crate) fn kept(&self) -> (String, usize) {
        match &self.weight {
            Weight::Dense(weight) => {
                let dtype = weight.dtype();
                (dtype.as_str().to_string(), weight.elem_count() * dtype.size_in_bytes())
            }
            Weight::Quantized(weight) => {
                let name = format!("{:?}", weight.dtype()).to_lowercase(); // q8_0, q4k
                let name = match name.strip_suffix('k') {
                    Some(stem) => format!("{stem}_k"),
                    None => name,
                };
                (name, weight.storage_size_in_bytes())
            }
        }
    }

    /// Rows of the weight by their numbers: `(n)` of `u32` to `(n, in_features)`, in
    /// [`dtype`](Self::dtype). Adapters are left out.
    pub(crate) fn rows(&self, rows: &Tensor) -> Result<Tensor> {
        match &self.weight {
            Weight::Dense(weight) => Ok(weight.index_select(rows, 0)?),
            Weight::Quantized(weight) => Ok(weight.embedding(rows)?),
        }
    }

    /// Adds `low_rank` to the weight, which stays as it is.
    pub(crate) fn adapt(&mut self, low_rank: LowRank) {
        self.low_rank.push(low_rank);
    }

    /// The same with `change` multiplied out and added to the weight, computed in `f32` and rounded
    /// to the weight's own type. No gradient comes back through it.
    pub(crate) fn merged(&self, change: &LowRank) -> Result<Self> {
        let Weight::Dense(weight) = &self.weight else {
            return Err(Error::unsupported("merge", "into quantised weights"));
        };
        let of = |tensor: &Tensor| tensor.detach().to_dtype(DType::F32);
        let product = (of(&change.b)?.matmul(&of(&change.a)?)? * change.scale)?; // (out, in)
        let sum = (of(weight)? + product)?.to_dtype(weight.dtype())?;
        Ok(Self { weight: Weight::Dense(sum), ..self.clone() })
    }

    /// `(…, in_features) -> (…, out_features)`, in the type of `xs`.
    ///
    /// # Errors
    /// When the last dimension of `xs` is not `in_features`, or a device fails;
    /// [`Error::Unsupported`] when a gradient is wanted of a product with quantised weights on another
    /// device than the CPU, which candle would silently leave out.
    pub fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        self.times(&Input::new(xs, &[self])?)
    }

    /// [`forward`](Self::forward) of input that several projections share.
    pub(super) fn times(&self, input: &Input<'_>) -> Result<Tensor> {
        let Input { xs, rows } = input;
        let ys = match (&self.weight, rows) {
            (weight, Some(rows)) if weight.is_frozen(xs) => frozen(xs, rows, weight)?,
            (Weight::Dense(weight), _) => dense(xs, weight)?,
            (Weight::Quantized(weight), _) => quantized(xs, weight)?,
        };
        self.low_rank.iter().try_fold(ys, |ys, change| Ok((ys + change.forward(xs)?)?))
    }
}

/// What one or several projections multiply.
pub(super) struct Input<'a> {
    /// `(…, in_features)`
    xs: &'a Tensor,
    /// The same as kernels of the CPU read it, if one of the projections has a kernel.
    rows: Option<kernels::Rows>,
}

impl<'a> Input<'a> {
    pub(super) fn new(xs: &'a Tensor, projections: &[&Linear]) -> Result<Self> {
        let rows = match projections.iter().any(|projection| projection.weight.is_frozen(xs)) {
            true => Some(kernels::Rows::new(&xs.detach().reshape(((), xs.dim(D::Minus1)?))?)?),
            false => None,
        };
        Ok(Self { xs, rows })
    }
}

impl LowRank {
    /// `scale · x Aᵀ Bᵀ`: the scale goes to the narrow product in the middle.
    fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        let narrow = (Linear::dense(&self.a)?.forward(xs)? * self.scale)?; // (…, rank)
        Linear::dense(&self.b)?.forward(&narrow)
    }
}

/// By operations of candle's, and on the CPU with a gradient for the weight.
fn dense(xs: &Tensor, weight: &Tensor) -> Result<Tensor> {
    if on_cpu(xs) {
        let weight = weight.to_dtype(DType::F32)?.contiguous()?;
        return Ok(xs.contiguous()?.apply_op2(&weight, Product)?);
    }
    let (out_features, in_features) = weight.dims2()?;
    let ys = xs.reshape(((), in_features))?.matmul(&weight.to_dtype(xs.dtype())?.t()?)?;
    Ok(ys.reshape(with_last(xs, out_features))?)
}

/// On other devices than the CPU.
fn quantized(xs: &Tensor, weight: &Arc<QTensor>) -> Result<Tensor> {
    if xs.track_op() {
        return Err(Error::unsupported("gradient", "through quantised weights on this device"));
    }
    Ok(QMatMul::QTensor(Arc::clone(weight)).forward(&xs.contiguous()?)?)
}

fn on_cpu(xs: &Tensor) -> bool {
    xs.device().is_cpu() && xs.dtype() == DType::F32
}

/// The shape of `xs` with another last dimension.
fn with_last(xs: &Tensor, last: usize) -> Vec<usize> {
    let mut shape = xs.dims().to_vec();
    if let Some(of_xs) = shape.last_mut() {
        *of_xs = last;
    }
    shape
}

/// `x Wᵀ` on the CPU for a weight that has no gradient.
fn frozen(xs: &Tensor, rows: &kernels::Rows, weight: &Weight) -> Result<Tensor> {
    let (out_features, _) = weight.dims()?;
    let ys = weight.product(rows)?.reshape(with_last(xs, out_features))?;
    if !xs.track_op() {
        return Ok(ys);
    }
    let product = Mutex::new(Some(ys));
    Ok(xs.apply_op1(Frozen { weight: weight.clone(), product })?)
}

/// `x Wᵀ` on the CPU in `f32`, with a gradient for those of the two that want one. Of a product of
/// candle's own it would be computed for both, and every reshaping around it copied.
struct Product;

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
    ) -> candle_core::Result<(CpuStorage, Shape)> {
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
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
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

/// On the CPU, where a weight is widened a part at a time as it is used.
impl Weight {
    /// Whether it multiplies `xs` by a kernel of this crate, which leaves its own gradient out. A dense
    /// weight of `f32` that `xs` brings a gradient to is as fast without one.
    fn is_frozen(&self, xs: &Tensor) -> bool {
        on_cpu(xs)
            && match self {
                Self::Dense(weight) => {
                    let tracked = xs.track_op() || weight.track_op();
                    !tracked || !weight.track_op() && weight.dtype() != DType::F32
                }
                Self::Quantized(_) => true,
            }
    }

    fn product(&self, rows: &kernels::Rows) -> candle_core::Result<Tensor> {
        match self {
            Self::Dense(weight) => rows.times(weight),
            Self::Quantized(weight) => rows.times_quantized(weight),
        }
    }

    /// `(out_features, in_features)`
    fn dims(&self) -> candle_core::Result<(usize, usize)> {
        match self {
            Self::Dense(weight) => weight.dims2(),
            Self::Quantized(weight) => weight.shape().dims2(),
        }
    }

    /// Some of its rows in `f32`.
    fn rows(&self, rows: Range<usize>) -> candle_core::Result<Tensor> {
        match self {
            Self::Dense(weight) => {
                kernels::widen(&weight.narrow(0, rows.start, rows.len())?, DType::F32)
            }
            Self::Quantized(weight) => kernels::quantized_rows(weight, rows),
        }
    }
}

/// `x Wᵀ` in a graph that ends at `x`.
struct Frozen {
    weight: Weight,
    /// `x Wᵀ`, computed without a graph; taken by the one forward call.
    product: Mutex<Option<Tensor>>,
}

impl CustomOp1 for Frozen {
    fn name(&self) -> &'static str {
        "frozen-linear"
    }

    fn cpu_fwd(&self, _: &CpuStorage, _: &Layout) -> candle_core::Result<(CpuStorage, Shape)> {
        let taken = self.product.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(product) = taken else { candle_core::bail!("frozen-linear: run twice") };
        let values = product.flatten_all()?.to_vec1::<f32>()?;
        Ok((CpuStorage::F32(values), product.shape().clone()))
    }

    fn bwd(&self, xs: &Tensor, _: &Tensor, grad: &Tensor) -> candle_core::Result<Option<Tensor>> {
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
