//! The few operations that candle has twice: a fused form that silently cuts the gradient graph,
//! and a differentiable one. The fused form is taken only where nothing tracks a gradient.

use candle_core::{D, DType, Tensor};
use candle_nn::ops;

use super::kernels::SwiGlu;
use crate::error::Result;

/// `x / sqrt(mean(x²) + eps) · weight` over the last dimension, computed in `f32`
/// (Zhang & Sennrich 2019; `MistralRMSNorm` of transformers).
pub(super) fn rms_norm(xs: &Tensor, weight: &Tensor, eps: f64) -> Result<Tensor> {
    if xs.track_op() || weight.track_op() {
        return Ok(ops::rms_norm_slow(xs, weight, eps as f32)?);
    }
    Ok(ops::rms_norm(&xs.contiguous()?, weight, eps as f32)?)
}

/// Rotates the two halves of each head by the angles of its position (Su et al. 2021, in the
/// order of transformers' `rotate_half`).
///
/// `xs` is `(batch, heads, seq, head_dim)`; `cos` and `sin` are `(seq, head_dim / 2)`, or
/// `(batch, seq, head_dim / 2)` where rows stand at different positions.
pub(super) fn rope(xs: &Tensor, cos: &Tensor, sin: &Tensor) -> Result<Tensor> {
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

/// `silu(gate) · up`, element by element. `gate` must not be used any more: its memory may be.
pub(super) fn swiglu(gate: Tensor, up: &Tensor) -> Result<Tensor> {
    if kernels_apply(&gate) && kernels_apply(up) && gate.is_contiguous() && up.is_contiguous() {
        gate.inplace_op2(up, &SwiGlu)?;
        return Ok(gate);
    }
    Ok((gate.silu()? * up)?)
}

/// Whether `xs` can be handed to this crate's CPU kernels: `f32`, on the CPU, no gradient wanted.
pub(super) fn kernels_apply(xs: &Tensor) -> bool {
    xs.device().is_cpu() && xs.dtype() == DType::F32 && !xs.track_op()
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Var};
    use proptest::prelude::*;

    /// `op` of plain tensors and of tracked ones, the largest difference between the two.
    fn forms_differ_by(inputs: &[Tensor], op: impl Fn(&[Tensor]) -> Result<Tensor>) -> Result<f32> {
        let copies = || inputs.iter().map(Tensor::copy).collect::<candle_core::Result<Vec<_>>>();
        let fused = op(&copies()?)?;
        let mut tracked = copies()?;
        tracked[0] = Var::from_tensor(&tracked[0])?.into_inner();
        let differentiable = op(&tracked)?;
        assert!(!fused.track_op() && differentiable.track_op());
        Ok((fused - differentiable)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?)
    }

    proptest! {
        #[test]
        fn fused_and_differentiable_forms_agree(
            batch in 1usize..3, heads in 1usize..4, seq in 1usize..9, half in 1usize..40,
            batched_rotation: bool,
        ) {
            let run = || -> Result<[f32; 4]> {
                let random = |shape: &[usize]| Tensor::randn(0f32, 2.0, shape, &Device::Cpu);
                let xs = random(&[batch, heads, seq, 2 * half])?;
                let angles = match batched_rotation {
                    true => random(&[batch, seq, half])?,
                    false => random(&[seq, half])?,
                };
                let rotation = [xs.clone(), angles.cos()?, angles.sin()?];
                let scaled = [xs.clone(), random(&[2 * half])?];
                let gated = [xs.clone(), random(xs.dims())?];
                Ok([
                    forms_differ_by(&rotation, |it| rope(&it[0], &it[1], &it[2]))?,
                    forms_differ_by(&scaled, |it| rms_norm(&it[0], &it[1], 1e-5))?,
                    forms_differ_by(&gated, |it| swiglu(it[0].clone(), &it[1]))?,
                    forms_differ_by(&[xs], |it| softmax(&it[0]))?,
                ])
            };
            let differences = run().map_err(|error| TestCaseError::fail(error.to_string()))?;
            prop_assert!(differences.iter().all(|d| *d < 2e-5), "{differences:?}");
        }
    }
}
