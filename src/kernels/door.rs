//! The one door: here, and nowhere else, it is decided which form of an operation runs.
//!
//! Most have three: one without a graph, one of this crate that carries a gradient, and the composite one
//! of candle's operations, which runs on any device and which the others are tested against. candle's own
//! fused forms silently cut the gradient graph: they are taken only where nothing tracks a gradient.

use std::sync::Arc;

use candle_core::quantized::{QMatMul, QTensor};
use candle_core::{D, DType, Module, Tensor};
use candle_nn::ops;

use super::attention::{self, Attend, KeyValues, Spans, gather};
use super::compute::Arithmetic;
use super::elementwise::{AddTo, Mix, RmsNorm, SplitHeads, SwiGlu};
use super::fresh::Fresh;
use super::gradients::{Frozen, Product};
use super::input_rows::InputRows;
use super::weight::{Kept, Weight};
use crate::error::{Error, Result};

/// Whether this crate's CPU kernels read `xs`.
pub(crate) fn fits_kernels(xs: &Tensor) -> bool {
    xs.device().is_cpu() && xs.dtype() == DType::F32
}

/// `x / sqrt(mean(x²) + eps) · weight` over the last dimension, computed in `f32`
/// (Zhang & Sennrich 2019; `MistralRMSNorm` of transformers).
pub(crate) fn rms_norm(xs: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    if fits_kernels(xs) && fits_kernels(weight) {
        let eps = eps as f32;
        return Ok(xs.contiguous()?.apply_op2(&weight.contiguous()?, RmsNorm { eps })?);
    }
    if !xs.track_op() && !weight.track_op() {
        return Ok(ops::rms_norm(&xs.contiguous()?, weight, eps as f32)?);
    }
    Ok(ops::rms_norm_slow(xs, weight, eps as f32)?)
}

/// Cuts `(tokens, heads · head_dim)` into heads, `(heads, tokens, head_dim)`, and rotates each by the
/// angles of its position, if there are any: cosines and sines, `(tokens, head_dim / 2)`.
///
/// # Errors
/// [`Error::Parameter`] where the width is no multiple of `heads`; when a device fails.
pub(crate) fn split_heads(
    xs: &Tensor,
    heads: usize,
    rotation: Option<(&Tensor, &Tensor)>,
) -> Result<Tensor> {
    let (tokens, width) = xs.dims2()?;
    if heads == 0 || !width.is_multiple_of(heads) {
        return Err(Error::parameter("heads", format!("a divisor of the width {width}"), heads));
    }
    if fits_kernels(xs) {
        let rotation = match rotation {
            Some((cos, sin)) => Some((cos.contiguous()?, sin.contiguous()?)),
            None => None,
        };
        return Ok(xs.contiguous()?.apply_op1(SplitHeads { heads, rotation })?);
    }
    let xs = xs.reshape((tokens, heads, width / heads))?.transpose(0, 1)?.contiguous()?;
    rotation.map_or(Ok(xs.clone()), |(cos, sin)| rotate(&xs, cos, sin))
}

/// Rotates the two halves of each head by the angles of its position (Su et al. 2021, in the
/// order of transformers' `rotate_half`): `xs` is `(heads, tokens, head_dim)`, `cos` and `sin` are
/// `(tokens, head_dim / 2)`.
pub(crate) fn rotate(xs: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    if !xs.track_op() {
        let xs = xs.unsqueeze(0)?.contiguous()?;
        return Ok(
            candle_nn::rotary_emb::rope(&xs, &cos.contiguous()?, &sin.contiguous()?)?.squeeze(0)?
        );
    }
    let half = xs.dim(D::Minus1)? / 2;
    let (x1, x2) = (xs.narrow(D::Minus1, 0, half)?, xs.narrow(D::Minus1, half, half)?);
    let y1 = (x1.broadcast_mul(cos)? - x2.broadcast_mul(sin)?)?;
    let y2 = (x2.broadcast_mul(cos)? + x1.broadcast_mul(sin)?)?;
    Ok(Tensor::cat(&[y1, y2], D::Minus1)?)
}

/// Softmax over the last dimension.
pub(crate) fn softmax(xs: &Tensor) -> Result<Tensor> {
    if xs.track_op() {
        return Ok(ops::softmax(xs, D::Minus1)?);
    }
    Ok(ops::softmax_last_dim(&xs.contiguous()?)?)
}

/// The logarithm of [`softmax`] in `f32`, with a gradient.
pub(crate) fn log_softmax(xs: &Tensor) -> Result<Tensor> {
    Ok(ops::log_softmax(&xs.to_dtype(DType::F32)?, D::Minus1)?)
}

/// `xs + ys`, in the place of `ys` where possible.
pub(super) fn add(xs: &Tensor, ys: Fresh) -> Result<Fresh> {
    let ys = ys.into_tensor();
    let tracked = xs.track_op() || ys.track_op();
    let whole = xs.dims() == ys.dims() && xs.is_contiguous() && ys.is_contiguous();
    if tracked || !whole || !fits_kernels(xs) || !fits_kernels(&ys) {
        return Ok(Fresh::new((xs + ys)?));
    }
    ys.inplace_op2(xs, &AddTo)?;
    Ok(Fresh::new(ys))
}

/// `silu(gate) · up`, element by element, in the place of `gate` where possible.
pub(crate) fn swiglu(gate: Fresh, up: &Tensor) -> Result<Fresh> {
    let gate = gate.into_tensor();
    let fit = fits_kernels(&gate) && fits_kernels(up);
    if !fit || gate.dims() != up.dims() || !gate.is_contiguous() || !up.is_contiguous() {
        return Ok(Fresh::new((gate.silu()? * up)?));
    }
    if gate.track_op() || up.track_op() {
        return Ok(Fresh::new(gate.apply_op2(up, SwiGlu)?));
    }
    gate.inplace_op2(up, &SwiGlu)?;
    Ok(Fresh::new(gate))
}

/// `ys[t] = Σ shares[t, s] · rows[places[t, s]]`: each row of the result is the sum of some of `rows`, of
/// `(.., width)`, with `shares` of `(count, several)` in the same type: `(count, width)`.
///
/// # Errors
/// Where `places` are not as many as shares, or not rows; when a device fails.
pub(crate) fn mix(rows: &Tensor, places: &[u32], shares: &Tensor) -> Result<Fresh> {
    let tracked = rows.track_op() || shares.track_op();
    if !tracked && fits_kernels(rows) && fits_kernels(shares) {
        let mixed = rows.contiguous()?.apply_op2_no_bwd(&shares.contiguous()?, &Mix { places })?;
        return Ok(Fresh::new(mixed));
    }
    let (count, several) = shares.dims2()?;
    let places = Tensor::new(places, rows.device())?.reshape((count, several))?;
    let mut sum = Tensor::zeros((count, rows.dim(1)?), rows.dtype(), rows.device())?;
    for column in 0..several {
        let these = places.narrow(1, column, 1)?.flatten_all()?.contiguous()?;
        let part = rows.index_select(&these, 0)?.broadcast_mul(&shares.narrow(1, column, 1)?)?;
        sum = (sum + part)?;
    }
    Ok(Fresh::new(sum))
}

/// What one or several weights multiply.
pub(crate) struct Input {
    /// `(…, in_features)`
    xs: Tensor,
    /// The same as this crate's CPU kernels read it, if one of them multiplies one of the weights.
    rows: Option<InputRows>,
    /// Rows that it is rounded like.
    among: usize,
}

impl Input {
    /// Lays `xs`, `(…, in_features)`, out for all of these weights.
    pub(crate) fn new(xs: &Tensor, weights: &[&Weight]) -> Result<Self> {
        Self::among(0, xs, weights)
    }

    /// [`new`](Self::new) of some of `all` rows. On the CPU, unless a gradient for the weight is wanted, the
    /// product of each is the same, to the last bit, as if all were there.
    pub(crate) fn among(all: usize, xs: &Tensor, weights: &[&Weight]) -> Result<Self> {
        let frozen = weights.iter().filter(|weight| is_frozen(weight, xs, all));
        let ways: Vec<_> = frozen.map(|weight| way(weight, xs)).collect();
        let rows = match ways.as_slice() {
            [] => None,
            ways => Some(input_rows(xs, all, ways)?),
        };
        Ok(Self { xs: xs.clone(), rows, among: all })
    }

    /// Other numbers for the same rows.
    pub(crate) fn with(&self, xs: &Tensor, weights: &[&Weight]) -> Result<Self> {
        Self::among(self.among, xs, weights)
    }

    /// `(…, in_features)`
    pub(crate) fn tensor(&self) -> &Tensor {
        &self.xs
    }

    /// `x Wᵀ`, `(…, out_features)`, in the type of `x`.
    pub(crate) fn times(&self, weight: &Weight) -> Result<Fresh> {
        let ys = match &weight.kept {
            _ if is_frozen(weight, &self.xs, self.among) => {
                let way = way(weight, &self.xs);
                match self.rows.as_ref().filter(|rows| rows.fit(way)) {
                    Some(rows) => frozen(&self.xs, rows, weight, way)?,
                    None => {
                        frozen(&self.xs, &input_rows(&self.xs, self.among, &[way])?, weight, way)?
                    }
                }
            }
            Kept::Dense(weight) => dense(&self.xs, weight)?,
            Kept::Quantized(weight) => quantized(&self.xs, weight)?,
            Kept::Codebook(weight) => dense(&self.xs, &weight.rows(0..weight.shape().0)?)?,
        };
        Ok(Fresh::new(ys))
    }
}

/// Whether a kernel of this crate multiplies `xs` by this weight without a gradient for the weight. For
/// a dense `f32` weight and a tracked `xs`, it would be no faster than candle's; but that rounds a row
/// `among` others by how many there are.
fn is_frozen(weight: &Weight, xs: &Tensor, among: usize) -> bool {
    fits_kernels(xs)
        && match &weight.kept {
            Kept::Dense(weight) => {
                let tracked = xs.track_op() || weight.track_op();
                !tracked || !weight.track_op() && (weight.dtype() != DType::F32 || among > 0)
            }
            Kept::Quantized(_) | Kept::Codebook(_) => true,
        }
}

/// What many rows are multiplied in. A gradient is wanted of the product itself, not of a rounded one.
fn way(weight: &Weight, xs: &Tensor) -> Arithmetic {
    if xs.track_op() { Arithmetic::Numbers } else { weight.arithmetic() }
}

fn input_rows(xs: &Tensor, among: usize, ways: &[Arithmetic]) -> Result<InputRows> {
    Ok(InputRows::new(&xs.detach().reshape(((), xs.dim(D::Minus1)?))?, among, ways)?)
}

/// On the CPU, with a gradient for `x` alone.
fn frozen(xs: &Tensor, rows: &InputRows, weight: &Weight, way: Arithmetic) -> Result<Tensor> {
    let (out_features, _) = weight.dims()?;
    let ys = rows.times(weight, way)?.reshape(with_last(xs, out_features))?;
    if !xs.track_op() {
        return Ok(ys);
    }
    Ok(xs.apply_op1(Frozen::new(weight, ys))?)
}

/// By candle's operations, and on the CPU with a gradient for the weight.
fn dense(xs: &Tensor, weight: &Tensor) -> Result<Tensor> {
    if fits_kernels(xs) {
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

/// The shape of `xs` with another last dimension.
fn with_last(xs: &Tensor, last: usize) -> Vec<usize> {
    let mut shape = xs.dims().to_vec();
    if let Some(of_xs) = shape.last_mut() {
        *of_xs = last;
    }
    shape
}

/// `softmax(q kᵀ · scale + mask) v`: the attention of every pass of the crate.
///
/// `q` is `(heads, queries, head_dim)`, the queries of all sequences one after the other; the
/// `heads / kv_heads` query heads of a head group share their one key head. On the CPU, keys and values
/// may be narrower than an `f32` `q`. Returns the heads side by side, `(queries, heads · head_dim)`. It
/// is differentiable in `q` and in packed keys and values.
///
/// On the CPU no bit of a query's result depends on what else is in the pass, on the number of threads,
/// or on whether keys lie packed or in blocks. Only a sequence's last query rounds differently when it
/// comes alone than when it comes with others, unless the spans say that all go one by one.
///
/// With the feature `flash-attn`, on a CUDA device, candle's flash attention computes it where all
/// three are `f16` or all `bf16`, nothing tracks a gradient, a head has a multiple of 8 numbers, at most
/// 512, and there is one sequence whose queries each see all keys, or a fixed number behind and
/// ahead of themselves. It compiles against candle's types, but has never been run on a GPU.
///
/// # Errors
/// [`Error::Parameter`] where shapes do not fit each other or the spans; when a device fails.
pub(crate) fn attend(
    q: &Tensor,
    held: &KeyValues<'_>,
    spans: &Arc<Spans>,
    scale: f64,
) -> Result<Fresh> {
    attention::check(q, held, spans)?;
    let tracked = q.track_op() || held.tensors().any(Tensor::track_op);
    if !tracked && fits_kernels(q) && held.are_read_in_place() {
        return Ok(Fresh::new(attention::attend_in_place(q, held, spans, scale as f32)?));
    }
    let gathered;
    let (k, v) = match *held {
        KeyValues::Packed { keys, values } => (keys, values),
        KeyValues::Blocks(held) => {
            gathered = gather(held, spans, q.dtype())?;
            (&gathered.0, &gathered.1)
        }
    };
    #[cfg(feature = "flash-attn")]
    if let Some(ys) = attention::attend_on_cuda([q, k, v], spans, scale as f32)? {
        return Ok(Fresh::new(ys));
    }
    if fits_kernels(q) && k.device().is_cpu() && v.device().is_cpu() {
        let wide = |it: &Tensor| it.to_dtype(DType::F32)?.contiguous();
        let op = Attend { spans: Arc::clone(spans), scale: scale as f32 };
        return Ok(Fresh::new(q.contiguous()?.apply_op3(&wide(k)?, &wide(v)?, op)?));
    }
    Ok(Fresh::new(attention::attend_composite(q, k, v, spans, scale)?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Var};
    use proptest::prelude::*;

    /// `op` of tracked inputs, and its gradients with respect to them for a sum in which every element
    /// has a different weight.
    fn with_gradients(
        inputs: &[Tensor],
        op: impl Fn(&[Tensor]) -> Result<Tensor>,
    ) -> Result<Vec<Tensor>> {
        let vars = inputs.iter().map(Var::from_tensor).collect::<candle_core::Result<Vec<_>>>()?;
        let tracked: Vec<Tensor> = vars.iter().map(|var| var.as_tensor().clone()).collect();
        let ys = op(&tracked)?;
        assert!(ys.track_op());
        let weights = Tensor::arange(0f32, ys.elem_count() as f32, ys.device())?.sin()?;
        let gradients = (&ys * weights.reshape(ys.shape())?)?.sum_all()?.backward()?;
        let mut all = vec![ys.detach()];
        for var in &vars {
            all.push(gradients.get(var).cloned().unwrap_or(var.zeros_like()?));
        }
        Ok(all)
    }

    /// How much the forms of an op differ, in their values and in their gradients: the one without
    /// a graph, the fused one with a graph, and the composite one.
    fn forms_differ_by(
        inputs: &[Tensor],
        fused: impl Fn(&[Tensor]) -> Result<Tensor>,
        composite: impl Fn(&[Tensor]) -> Result<Tensor>,
    ) -> Result<f32> {
        let copies = inputs.iter().map(Tensor::copy).collect::<candle_core::Result<Vec<_>>>()?;
        let expected = with_gradients(inputs, composite)?;
        let mut pairs = vec![(fused(&copies)?, expected[0].clone())];
        pairs.extend(with_gradients(inputs, fused)?.into_iter().zip(expected));
        let mut largest = 0f32;
        for (got, expected) in pairs {
            let difference = (got - &expected)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?;
            let size = expected.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?;
            largest = largest.max(difference / size.max(1.0));
        }
        Ok(largest)
    }

    proptest! {
        #[test]
        fn all_forms_agree(
            tokens in 1usize..80, heads in 1usize..4, half in 1usize..40,
        ) {
            let run = || -> Result<[f32; 4]> {
                let random = |shape: &[usize]| Tensor::randn(0f32, 2.0, shape, &Device::Cpu);
                let xs = random(&[tokens, heads * 2 * half])?;
                let angles = random(&[tokens, half])?;
                let (cos, sin) = (angles.cos()?, angles.sin()?);
                let split = |xs: &Tensor| -> Result<Tensor> {
                    let xs = xs.reshape((tokens, heads, 2 * half))?;
                    Ok(xs.transpose(0, 1)?.contiguous()?)
                };
                let scaled = [xs.clone(), random(&[heads * 2 * half])?];
                let gated = [xs.clone(), random(xs.dims())?];
                let only = std::slice::from_ref(&xs);
                let sum = (&gated[0] + Fresh::new(gated[1].copy()?))?;
                assert_eq!(sum.to_vec2::<f32>()?, (&gated[0] + &gated[1])?.to_vec2::<f32>()?);
                Ok([
                    forms_differ_by(
                        only,
                        |it| split_heads(&it[0], heads, Some((&cos, &sin))),
                        |it| rotate(&split(&it[0])?, &cos, &sin),
                    )?,
                    forms_differ_by(only, |it| split_heads(&it[0], heads, None), |it| split(&it[0]))?,
                    forms_differ_by(
                        &scaled,
                        |it| rms_norm(&it[0], &it[1], 1e-5),
                        |it| Ok(ops::rms_norm_slow(&it[0], &it[1], 1e-5)?),
                    )?,
                    forms_differ_by(
                        &gated,
                        |it| Ok(swiglu(Fresh::new(it[0].clone()), &it[1])?.into_tensor()),
                        |it| Ok((it[0].silu()? * &it[1])?),
                    )?,
                ])
            };
            let differences = run().map_err(|error| TestCaseError::fail(error.to_string()))?;
            prop_assert!(differences.iter().all(|d| *d < 2e-5), "{differences:?}");
        }

        #[test]
        fn mixtures_agree(count in 1usize..40, several in 1usize..5, width in 1usize..80) {
            let run = || -> Result<f32> {
                let rows = Tensor::randn(0f32, 2.0, (count * several, width), &Device::Cpu)?;
                let shares = Tensor::randn(0f32, 1.0, (count, several), &Device::Cpu)?;
                let all = count * several;
                let places: Vec<u32> = (0..all).map(|place| (place * 7 % all) as u32).collect();
                let picked = Tensor::new(places.as_slice(), &Device::Cpu)?;
                let beyond = vec![all as u32; all];
                assert!(mix(&rows, &beyond, &shares).is_err() && mix(&rows, &[], &shares).is_err());
                forms_differ_by(
                    &[rows, shares],
                    |it| Ok(mix(&it[0], &places, &it[1])?.into_tensor()),
                    |it| {
                        let picked = it[0].index_select(&picked, 0)?;
                        let picked = picked.broadcast_mul(&it[1].reshape((all, 1))?)?;
                        Ok(picked.reshape((count, several, width))?.sum(1)?)
                    },
                )
            };
            let difference = run().map_err(|error| TestCaseError::fail(error.to_string()))?;
            prop_assert!(difference < 2e-5, "{difference}");
        }

        #[test]
        fn softmax_forms_agree(rows in 1usize..9, width in 1usize..80) {
            let run = || -> Result<f32> {
                let xs = Tensor::randn(0f32, 2.0, (rows, width), &Device::Cpu)?;
                forms_differ_by(&[xs], |it| softmax(&it[0]), |it| Ok(ops::softmax(&it[0], D::Minus1)?))
            };
            let difference = run().map_err(|error| TestCaseError::fail(error.to_string()))?;
            prop_assert!(difference < 2e-5, "{difference}");
        }
    }

    #[test]
    fn a_logarithm_of_shares_is_the_logarithm_of_shares() -> Result<()> {
        let xs = Tensor::randn(0f32, 2.0, (3, 50), &Device::Cpu)?;
        let difference = (log_softmax(&xs)?.exp()? - softmax(&xs)?)?.abs()?;
        assert!(difference.flatten_all()?.max(0)?.to_scalar::<f32>()? < 1e-6);
        Ok(())
    }

    /// A sum is written where its fresh part was, and where that is impossible, the sum is the same.
    #[test]
    fn a_sum_is_the_same_wherever_it_lies() -> Result<()> {
        let random = |dims: (usize, usize)| Tensor::randn(0f32, 1.0, dims, &Device::Cpu);
        let (xs, ys) = (random((5, 6))?, random((5, 6))?);
        let expected = (&xs + &ys)?.to_vec2::<f32>()?;
        let turned = ys.t()?.contiguous()?.t()?;
        let row = random((1, 6))?.broadcast_as((5, 6))?;
        let var = Var::from_tensor(&xs)?;
        assert_eq!((&xs + Fresh::new(ys.copy()?))?.to_vec2::<f32>()?, expected);
        assert_eq!((&xs + Fresh::new(turned))?.to_vec2::<f32>()?, expected);
        let tracked = (var.as_tensor() + Fresh::new(ys.copy()?))?;
        assert!(tracked.track_op());
        assert_eq!(tracked.to_vec2::<f32>()?, expected);
        let sum = (Fresh::new(xs.copy()?) + Fresh::new(ys.copy()?))?;
        assert_eq!(sum.tensor().to_vec2::<f32>()?, expected);
        let sum = (&row + Fresh::new(ys.copy()?))?;
        assert_eq!(sum.to_vec2::<f32>()?, (&row + &ys)?.to_vec2::<f32>()?);
        assert!((&xs + Fresh::new(random((6, 5))?)).is_err());
        Ok(())
    }
}
