//! The operations that have several forms: fused ones that carry no gradient, fused ones of this
//! crate that do, and the composite ones of candle, which run on any device and which the others
//! are tested against. candle's own fused forms silently cut the gradient graph: they are taken
//! only where nothing tracks a gradient.

use candle_core::{D, DType, Tensor};
use candle_nn::ops;

use crate::kernels::{AddTo, RmsNorm, SplitHeads, SwiGlu};
use crate::error::Result;

/// `x / sqrt(mean(x²) + eps) · weight` over the last dimension, computed in `f32`
/// (Zhang & Sennrich 2019; `MistralRMSNorm` of transformers).
pub(super) fn rms_norm(xs: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    if kernels_fit(xs) && kernels_fit(weight) {
        let eps = eps as f32;
        return Ok(xs.contiguous()?.apply_op2(&weight.contiguous()?, RmsNorm { eps })?);
    }
    if !xs.track_op() && !weight.track_op() {
        return Ok(ops::rms_norm(&xs.contiguous()?, weight, eps as f32)?);
    }
    Ok(ops::rms_norm_slow(xs, weight, eps as f32)?)
}

/// Cuts `(batch, seq, heads · head_dim)` into heads, `(batch, heads, seq, head_dim)`, and turns
/// each by the angles of its position, if there are any: cosines and sines as for [`rope`].
pub(super) fn split_heads(
    xs: &Tensor,
    heads: usize,
    rotation: Option<(&Tensor, &Tensor)>,
) -> Result<Tensor> {
    if kernels_fit(xs) {
        let rotation = match rotation {
            Some((cos, sin)) => Some((cos.contiguous()?, sin.contiguous()?)),
            None => None,
        };
        return Ok(xs.contiguous()?.apply_op1(SplitHeads { heads, rotation })?);
    }
    let (batch, seq, width) = xs.dims3()?;
    let xs = xs.reshape((batch, seq, heads, width / heads))?.transpose(1, 2)?.contiguous()?;
    rotation.map_or(Ok(xs.clone()), |(cos, sin)| rope(&xs, cos, sin))
}

/// Rotates the two halves of each head by the angles of its position (Su et al. 2021, in the
/// order of transformers' `rotate_half`).
///
/// `xs` is `(batch, heads, seq, head_dim)`; `cos` and `sin` are `(seq, head_dim / 2)`, or
/// `(batch, seq, head_dim / 2)` where rows stand at different positions.
fn rope(xs: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
    if !xs.track_op() {
        return Ok(candle_nn::rotary_emb::rope(&xs.contiguous()?, cos, sin)?);
    }
    let (cos, sin) = match cos.rank() {
        3 => (cos.unsqueeze(1)?, sin.unsqueeze(1)?), // (batch, 1, seq, half)
        _ => (cos.clone(), sin.clone()),
    };
    let half = xs.dim(D::Minus1)? / 2;
    let (x1, x2) = (xs.narrow(D::Minus1, 0, half)?, xs.narrow(D::Minus1, half, half)?);
    let y1 = (x1.broadcast_mul(&cos)? - x2.broadcast_mul(&sin)?)?;
    let y2 = (x2.broadcast_mul(&cos)? + x1.broadcast_mul(&sin)?)?;
    Ok(Tensor::cat(&[y1, y2], D::Minus1)?)
}

/// Softmax over the last dimension.
pub(super) fn softmax(xs: &Tensor) -> Result<Tensor> {
    if xs.track_op() {
        return Ok(ops::softmax(xs, D::Minus1)?);
    }
    Ok(ops::softmax_last_dim(&xs.contiguous()?)?)
}

/// `xs + ys`. `ys` must not be used any more: its memory may be.
pub(super) fn add(xs: &Tensor, ys: Tensor) -> Result<Tensor> {
    let tracked = xs.track_op() || ys.track_op();
    let whole = xs.dims() == ys.dims() && xs.is_contiguous() && ys.is_contiguous();
    if tracked || !whole || !kernels_fit(xs) || !kernels_fit(&ys) {
        return Ok((xs + ys)?);
    }
    ys.inplace_op2(xs, &AddTo)?;
    Ok(ys)
}

/// `silu(gate) · up`, element by element. `gate` must not be used any more: its memory may be.
pub(super) fn swiglu(gate: Tensor, up: &Tensor) -> Result<Tensor> {
    let fit = kernels_fit(&gate) && kernels_fit(up);
    if !fit || !gate.is_contiguous() || !up.is_contiguous() {
        return Ok((gate.silu()? * up)?);
    }
    if gate.track_op() || up.track_op() {
        return Ok(gate.apply_op2(up, SwiGlu)?);
    }
    gate.inplace_op2(up, &SwiGlu)?;
    Ok(gate)
}

/// Whether `xs` can be handed to this crate's CPU kernels.
pub(super) fn kernels_fit(xs: &Tensor) -> bool {
    xs.device().is_cpu() && xs.dtype() == DType::F32
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Var};
    use proptest::prelude::*;

    /// `op` of tracked inputs and its gradients with respect to them, for a sum that weighs every
    /// element differently.
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
            batch in 1usize..3, heads in 1usize..4, seq in 1usize..40, half in 1usize..40,
            batched_rotation: bool,
        ) {
            let run = || -> Result<[f32; 4]> {
                let random = |shape: &[usize]| Tensor::randn(0f32, 2.0, shape, &Device::Cpu);
                let xs = random(&[batch, seq, heads * 2 * half])?;
                let angles = match batched_rotation {
                    true => random(&[batch, seq, half])?,
                    false => random(&[seq, half])?,
                };
                let (cos, sin) = (angles.cos()?, angles.sin()?);
                let split = |xs: &Tensor| -> Result<Tensor> {
                    let xs = xs.reshape((batch, seq, heads, 2 * half))?;
                    Ok(xs.transpose(1, 2)?.contiguous()?)
                };
                let scaled = [xs.clone(), random(&[heads * 2 * half])?];
                let gated = [xs.clone(), random(xs.dims())?];
                let only = std::slice::from_ref(&xs);
                let sum = add(&gated[0].copy()?, gated[1].copy()?)?;
                assert_eq!(sum.to_vec3::<f32>()?, (&gated[0] + &gated[1])?.to_vec3::<f32>()?);
                Ok([
                    forms_differ_by(
                        only,
                        |it| split_heads(&it[0], heads, Some((&cos, &sin))),
                        |it| rope(&split(&it[0])?, &cos, &sin),
                    )?,
                    forms_differ_by(only, |it| split_heads(&it[0], heads, None), |it| split(&it[0]))?,
                    forms_differ_by(
                        &scaled,
                        |it| rms_norm(&it[0], &it[1], 1e-5),
                        |it| Ok(ops::rms_norm_slow(&it[0], &it[1], 1e-5)?),
                    )?,
                    forms_differ_by(
                        &gated,
                        |it| swiglu(it[0].clone(), &it[1]),
                        |it| Ok((it[0].silu()? * &it[1])?),
                    )?,
                ])
            };
            let differences = run().map_err(|error| TestCaseError::fail(error.to_string()))?;
            prop_assert!(differences.iter().all(|d| *d < 2e-5), "{differences:?}");
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
}
