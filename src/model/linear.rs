//! A projection without bias. Its weight is dense or quantised, with or without low-rank adapters; no
//! caller needs to know which.

use std::collections::BTreeMap;
use std::sync::Arc;

use candle_core::quantized::QTensor;
use candle_core::{DType, Device, Tensor};

use crate::error::{Error, Result};
use crate::kernels::{CodebookMatrix, Compute, Fresh, Input, Kept, Weight};

/// `y = x Wᵀ`, with `W` of shape `(out_features, in_features)`.
#[derive(Clone, Debug)]
pub struct Linear {
    weight: Weight,
    /// `(out_features, in_features)`
    shape: (usize, usize),
    /// Added to the weight.
    low_rank: Vec<LowRank>,
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
    /// When `weight` is not a matrix, or a device has no room for a copy of one that is not contiguous.
    pub fn dense(weight: &Tensor) -> Result<Self> {
        let shape = weight.dims2()?;
        check_size(shape)?;
        Ok(Self { weight: Weight::dense(weight)?, shape, low_rank: Vec::new() })
    }

    /// A projection by a quantised `weight` of shape `(out_features, in_features)`.
    ///
    /// # Errors
    /// When `weight` is not a matrix, or candle cannot prepare that type.
    pub fn quantized(weight: Arc<QTensor>) -> Result<Self> {
        let shape = weight.shape().dims2()?;
        Ok(Self { weight: Weight::quantized(weight)?, shape, low_rank: Vec::new() })
    }

    /// A projection by a weight in blocks of a type that candle does not have, on the CPU.
    pub(crate) fn codebook(weight: CodebookMatrix) -> Self {
        let shape = weight.shape();
        Self { weight: Kept::Codebook(Arc::new(weight)).into(), shape, low_rank: Vec::new() }
    }

    /// The same projection, computed as exactly as this says. Adapters are computed in `f32` either way.
    #[must_use]
    pub fn with_compute(mut self, compute: Compute) -> Self {
        self.set_compute(compute);
        self
    }

    pub(super) fn set_compute(&mut self, compute: Compute) {
        self.weight.compute = compute;
    }

    /// `(out_features, in_features)`
    pub(crate) fn shape(&self) -> (usize, usize) {
        self.shape
    }

    pub(crate) fn device(&self) -> Device {
        self.weight.device()
    }

    /// The type that products are computed in on devices other than the CPU.
    pub(crate) fn dtype(&self) -> DType {
        match &self.weight.kept {
            Kept::Dense(weight) => weight.dtype(),
            Kept::Quantized(_) | Kept::Codebook(_) => DType::F32,
        }
    }

    /// The type of the weight, in the spelling of GGUF tools, and its bytes.
    fn kept(&self) -> (String, usize) {
        match &self.weight.kept {
            Kept::Dense(weight) => {
                let dtype = weight.dtype();
                (dtype.as_str().to_string(), weight.elem_count() * dtype.size_in_bytes())
            }
            Kept::Quantized(weight) => {
                let name = format!("{:?}", weight.dtype()).to_lowercase(); // q8_0, q4k
                let name = match name.strip_suffix('k') {
                    Some(stem) => format!("{stem}_k"),
                    None => name,
                };
                (name, weight.storage_size_in_bytes())
            }
            Kept::Codebook(weight) => {
                let (codebook, blocks) = weight.blocks();
                (codebook.name().to_lowercase(), blocks.len())
            }
        }
    }

    /// Adds its bytes to the count for its type.
    pub(crate) fn count_bytes(&self, bytes: &mut BTreeMap<String, usize>) {
        let (kept, count) = self.kept();
        *bytes.entry(kept).or_default() += count;
    }

    /// Rows of the weight by index: `(n)` of `u32` to `(n, in_features)`, in [`dtype`](Self::dtype).
    /// Adapters are left out.
    pub(crate) fn rows(&self, rows: &Tensor) -> Result<Tensor> {
        match &self.weight.kept {
            Kept::Dense(weight) => Ok(weight.index_select(rows, 0)?),
            Kept::Quantized(weight) => Ok(weight.embedding(rows)?),
            Kept::Codebook(weight) => Ok(weight.select(rows)?),
        }
    }

    /// Adds `low_rank` to the weight, which stays as it is.
    pub(crate) fn adapt(&mut self, low_rank: LowRank) {
        self.low_rank.push(low_rank);
    }

    /// The same with `change` multiplied out and added to the weight, computed in `f32` and rounded to
    /// the weight's own type. No gradient flows through it.
    pub(crate) fn merged(&self, change: &LowRank) -> Result<Self> {
        let Kept::Dense(weight) = &self.weight.kept else {
            return Err(Error::unsupported("merge", "into quantised weights"));
        };
        let of = |tensor: &Tensor| tensor.detach().to_dtype(DType::F32);
        let product = (of(&change.b)?.matmul(&of(&change.a)?)? * change.scale)?; // (out, in)
        let sum = (of(weight)? + product)?.to_dtype(weight.dtype())?;
        let weight = Weight { kept: Kept::Dense(sum), ..self.weight };
        Ok(Self { weight, ..self.clone() })
    }

    /// `(…, in_features) -> (…, out_features)`, in the type of `xs`.
    ///
    /// # Errors
    /// When the last dimension of `xs` is not `in_features`, or a device fails; [`Error::Unsupported`]
    /// when a gradient is wanted for a product with quantised weights on a device other than the CPU,
    /// which candle would silently drop.
    pub fn forward(&self, xs: &Tensor) -> Result<Tensor> {
        Ok(self.product(xs)?.into_tensor())
    }

    /// [`forward`](Self::forward), as a tensor that may be overwritten.
    pub(crate) fn product(&self, xs: &Tensor) -> Result<Fresh> {
        let rows =
            xs.dims().iter().rev().skip(1).try_fold(1, |all: usize, dim| all.checked_mul(*dim));
        check_size((rows.unwrap_or(usize::MAX), self.shape.0.max(self.shape.1)))?;
        self.times(&Input::new(xs, &[&self.weight])?)
    }

    /// [`forward`](Self::forward) of input that several projections share.
    pub(crate) fn times(&self, input: &Input) -> Result<Fresh> {
        let ys = input.times(&self.weight)?;
        self.low_rank.iter().try_fold(ys, |ys, change| ys + change.product(input)?)
    }

    /// What an [`Input`] must be laid out for.
    pub(crate) fn weight(&self) -> &Weight {
        &self.weight
    }
}

impl LowRank {
    /// `scale · x Aᵀ Bᵀ`: the scale is applied to the narrow product in the middle.
    fn product(&self, input: &Input) -> Result<Fresh> {
        let (a, b) = (Linear::dense(&self.a)?, Linear::dense(&self.b)?);
        let narrow = input.with(input.tensor(), &[a.weight()])?;
        let narrow = (a.times(&narrow)?.into_tensor() * self.scale)?; // (…, rank)
        b.times(&input.with(&narrow, &[b.weight()])?)
    }
}

/// Refuses a matrix of more bytes than memory can hold: a view can have them by repeating itself.
fn check_size((rows, columns): (usize, usize)) -> Result<()> {
    const MOST: usize = isize::MAX as usize / size_of::<f64>();
    match rows.checked_mul(columns) {
        Some(elements) if elements <= MOST => Ok(()),
        _ => {
            let expected = format!("at most {MOST} elements");
            Err(Error::parameter("matrix", expected, format!("{rows} x {columns}")))
        }
    }
}
