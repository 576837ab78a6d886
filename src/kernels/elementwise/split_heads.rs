//! Cuts a projection into heads and rotates them, in one pass over memory.

use candle_core::{CpuStorage, CustomOp1, D, Layout, Result, Shape, Tensor};
use pulp::Arch;
use rayon::prelude::*;

use super::super::storage::{f32s, values};

/// About how many elements one task rotates.
const TASK: usize = 1 << 13;

/// `(tokens, heads · head_dim) -> (heads, tokens, head_dim)`, contiguous, in `f32`; each head rotated by
/// the angles of its position, if there are any. The plain twin is a transposition and a rotation by
/// candle operations.
#[derive(Debug)]
pub(in crate::kernels) struct SplitHeads {
    /// Into how many heads.
    pub(in crate::kernels) heads: usize,
    /// Cosines and sines: `(tokens, head_dim / 2)`.
    pub(in crate::kernels) rotation: Option<(Tensor, Tensor)>,
}

impl CustomOp1 for SplitHeads {
    fn name(&self) -> &'static str {
        "split-heads"
    }

    fn cpu_fwd(&self, xs: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (tokens, width) = layout.shape().dims2()?;
        let head_dim = width / self.heads;
        let xs = f32s(xs, layout)?;
        let mut ys = vec![0f32; xs.len()];
        let arch = Arch::new();
        self.with_angles((tokens, head_dim), |angles| {
            // (head, run of tokens) by (head, run of tokens), so that few heads keep all cores busy
            let (of_head, run) = ((tokens * head_dim).max(1), (TASK / head_dim.max(1)).max(1));
            let heads = ys.par_chunks_mut(of_head).with_min_len(TASK.div_ceil(of_head));
            heads.enumerate().for_each(|(head, ys)| {
                let runs = ys.par_chunks_mut((run * head_dim).max(1)).enumerate();
                runs.for_each(|(index, ys)| {
                    arch.dispatch(|| {
                        for (token, y) in ys.chunks_exact_mut(head_dim.max(1)).enumerate() {
                            let token = index * run + token;
                            let from = token * width + head * head_dim;
                            turn(&xs[from..from + head_dim], y, angles.at(token), 1.0);
                        }
                    });
                });
            });
        })?;
        Ok((CpuStorage::F32(ys), (self.heads, tokens, head_dim).into()))
    }

    /// Each head rotated back by its angles, then put where it came from.
    fn bwd(&self, xs: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let (tokens, width) = xs.dims2()?;
        let head_dim = width / self.heads;
        let grad = grad.contiguous()?;
        let grad = values(&grad);
        let grad = grad.get()?;
        let mut dx = vec![0f32; grad.len()];
        let arch = Arch::new();
        self.with_angles((tokens, head_dim), |angles| {
            // token by token: (heads, head_dim)
            dx.par_chunks_mut(width.max(1)).with_min_len(16).enumerate().for_each(|(token, dx)| {
                arch.dispatch(|| {
                    for (head, dx) in dx.chunks_exact_mut(head_dim.max(1)).enumerate() {
                        let from = (head * tokens + token) * head_dim;
                        turn(&grad[from..from + head_dim], dx, angles.at(token), -1.0);
                    }
                });
            });
        })?;
        Ok(Some(Tensor::from_vec(dx, xs.shape(), xs.device())?))
    }
}

impl SplitHeads {
    /// Calls `work` with the angles, after checking that there are enough of them.
    fn with_angles(
        &self,
        (tokens, head_dim): (usize, usize),
        work: impl FnOnce(Angles<'_>),
    ) -> Result<()> {
        let Some((cos, sin)) = &self.rotation else {
            work(Angles { cos: &[], sin: &[], half: 0 });
            return Ok(());
        };
        let half = cos.dim(D::Minus1)?;
        let (cos, sin) = (values(cos), values(sin));
        let (cos, sin) = (cos.get()?, sin.get()?);
        if head_dim != 2 * half || [cos.len(), sin.len()] != [tokens * half; 2] {
            candle_core::bail!(
                "split-heads: {} angles for {tokens} heads of {head_dim}",
                cos.len()
            );
        }
        work(Angles { cos, sin, half });
        Ok(())
    }
}

/// The angles of every token.
#[derive(Clone, Copy)]
struct Angles<'a> {
    cos: &'a [f32],
    sin: &'a [f32],
    half: usize,
}

impl<'a> Angles<'a> {
    #[inline(always)]
    fn at(&self, token: usize) -> (&'a [f32], &'a [f32]) {
        let of_token = token * self.half..(token + 1) * self.half;
        (&self.cos[of_token.clone()], &self.sin[of_token])
    }
}

/// Rotates one head by its angles, or with a `sign` of -1 back; without angles it is copied.
#[inline(always)]
fn turn(x: &[f32], y: &mut [f32], (cos, sin): (&[f32], &[f32]), sign: f32) {
    let half = cos.len();
    if half == 0 {
        y.copy_from_slice(x);
        return;
    }
    let ((x1, x2), (y1, y2)) = (x.split_at(half), y.split_at_mut(half));
    let (x, y) = (x1.iter().zip(x2), y1.iter_mut().zip(y2));
    for (((x1, x2), (y1, y2)), (cos, sin)) in x.zip(y).zip(cos.iter().zip(sin)) {
        let sin = sign * sin;
        *y1 = x1 * cos - x2 * sin;
        *y2 = x2 * cos + x1 * sin;
    }
}
