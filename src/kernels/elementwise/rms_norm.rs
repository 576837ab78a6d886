//! Root-mean-square norm that carries a gradient.

use candle_core::{CpuStorage, CustomOp2, Layout, Result, Shape, Tensor};
use pulp::Arch;
use rayon::prelude::*;

use super::super::storage::{f32s, gradient_for, values};
use super::LANES;

/// About how many elements one task computes.
const RUN: usize = 1 << 14;

/// `x / sqrt(mean(x²) + eps) · weight` over the last dimension of a contiguous `x` in `f32`; the
/// weight has that dimension. The plain twin is `candle_nn::ops::rms_norm_slow`.
#[derive(Debug)]
pub(in crate::kernels) struct RmsNorm {
    /// Keeps rows of zeros from being divided by zero.
    pub(in crate::kernels) eps: f32,
}

impl CustomOp2 for RmsNorm {
    fn name(&self) -> &'static str {
        "rms-norm"
    }

    fn cpu_fwd(
        &self,
        xs: &CpuStorage,
        xs_layout: &Layout,
        weight: &CpuStorage,
        weight_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (xs, weight) = (f32s(xs, xs_layout)?, f32s(weight, weight_layout)?);
        let (width, rows_at_once) = widths(weight);
        let mut ys = vec![0f32; xs.len()];
        let arch = Arch::new();
        let run = rows_at_once * width;
        ys.par_chunks_mut(run).zip(xs.par_chunks(run)).for_each(|(ys, xs)| {
            arch.dispatch(|| {
                for (y, x) in ys.chunks_exact_mut(width).zip(xs.chunks_exact(width)) {
                    let scale = self.scale(x);
                    for ((y, x), weight) in y.iter_mut().zip(x).zip(weight) {
                        *y = x * scale * weight;
                    }
                }
            });
        });
        Ok((CpuStorage::F32(ys), xs_layout.shape().clone()))
    }

    /// With `s = 1 / sqrt(mean(x²) + eps)` and `g = grad · weight`:
    /// `dx = s (g - x s² mean(g · x))`, `dweight = Σ grad · x s`.
    fn bwd(
        &self,
        xs: &Tensor,
        weight: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        let (xs_values, weight_values, grad) = (values(xs), values(weight), values(&grad));
        let (x, w, grad) = (xs_values.get()?, weight_values.get()?, grad.get()?);
        let (width, rows_at_once) = widths(w);
        let run = rows_at_once * width;
        let mut dx = vec![0f32; x.len()];
        let arch = Arch::new();
        // Summed in the order of the runs, so that threads do not affect how it rounds.
        let sums: Vec<Vec<f32>> = dx
            .par_chunks_mut(run)
            .zip(x.par_chunks(run).zip(grad.par_chunks(run)))
            .map(|(dx, (x, grad))| {
                let mut sum = vec![0f32; width];
                arch.dispatch(|| {
                    let rows = x.chunks_exact(width).zip(grad.chunks_exact(width));
                    for (dx, (x, grad)) in dx.chunks_exact_mut(width).zip(rows) {
                        self.row_backward(x, w, grad, dx, &mut sum);
                    }
                });
                sum
            })
            .collect();
        let dx = gradient_for(xs, dx)?;
        if !weight.track_op() {
            return Ok((dx, None));
        }
        let mut dw = vec![0f32; width];
        for sum in sums {
            for (dw, sum) in dw.iter_mut().zip(sum) {
                *dw += sum;
            }
        }
        Ok((dx, gradient_for(weight, dw)?))
    }
}

impl RmsNorm {
    /// NaN where the squares overflow: dividing by infinity would make zeros of the largest numbers, and
    /// nobody would learn of it.
    #[inline(always)]
    fn scale(&self, x: &[f32]) -> f32 {
        let squares = dot(x, x);
        if squares == f32::INFINITY {
            return f32::NAN;
        }
        1.0 / (squares / x.len() as f32 + self.eps).sqrt()
    }

    #[inline(always)]
    fn row_backward(&self, x: &[f32], w: &[f32], grad: &[f32], dx: &mut [f32], dw: &mut [f32]) {
        let scale = self.scale(x);
        for ((dx, grad), w) in dx.iter_mut().zip(grad).zip(w) {
            *dx = grad * w;
        }
        let along = scale * scale * dot(dx, x) / x.len() as f32;
        for (((dx, x), grad), dw) in dx.iter_mut().zip(x).zip(grad).zip(dw) {
            *dx = scale * (*dx - x * along);
            *dw += grad * (x * scale);
        }
    }
}

/// The width of a row, and how many rows go to one task.
fn widths(weight: &[f32]) -> (usize, usize) {
    let width = weight.len().max(1);
    (width, (RUN / width).max(1))
}

#[inline(always)]
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0f32; LANES];
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    for (a, b) in a.iter().zip(b) {
        for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
            *sum += a * b;
        }
    }
    for ((sum, a), b) in sums.iter_mut().zip(a_rest).zip(b_rest) {
        *sum += a * b;
    }
    sums.iter().sum()
}
