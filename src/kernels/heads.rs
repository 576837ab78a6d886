//! Cuts a projection into heads and turns them, in one pass over memory.

use candle_core::{CpuStorage, CustomOp1, Layout, Result, Shape, Tensor};
use pulp::Arch;
use rayon::prelude::*;

use super::{f32s, values};

/// Elements that one task turns, at least.
const TASK: usize = 1 << 13;

/// `(batch, seq, heads · head_dim) -> (batch, heads, seq, head_dim)`, contiguous, in `f32`; each
/// head turned by the angles of its position, if there are any. The plain twin is a transposition
/// and a rotation by candle operations.
#[derive(Debug)]
pub(crate) struct SplitHeads {
    /// Into how many heads.
    pub(crate) heads: usize,
    /// Cosines and sines: `(seq, head_dim / 2)`, or `(batch, seq, head_dim / 2)`.
    pub(crate) rotation: Option<(Tensor, Tensor)>,
}

impl CustomOp1 for SplitHeads {
    fn name(&self) -> &'static str {
        "split-heads"
    }

    fn cpu_fwd(&self, xs: &CpuStorage, layout: &Layout) -> Result<(CpuStorage, Shape)> {
        let (batch, seq, width) = layout.shape().dims3()?;
        let head_dim = width / self.heads;
        let xs = f32s(xs, layout)?;
        let mut ys = vec![0f32; xs.len()];
        let arch = Arch::new();
        self.with_rows((batch, seq), |angles| {
            // (batch, head) by (batch, head): (seq, head_dim)
            let of_head = (seq * head_dim).max(1);
            let runs = ys.par_chunks_mut(of_head).with_min_len(TASK.div_ceil(of_head)).enumerate();
            runs.for_each(|(index, ys)| {
                let (row, head) = (index / self.heads, index % self.heads);
                arch.dispatch(|| {
                    for (slot, y) in ys.chunks_exact_mut(head_dim).enumerate() {
                        let from = (row * seq + slot) * width + head * head_dim;
                        turn(&xs[from..from + head_dim], y, angles.at(row, slot), 1.0);
                    }
                });
            });
        })?;
        Ok((CpuStorage::F32(ys), (batch, self.heads, seq, head_dim).into()))
    }

    /// Each head turned back by its angles, then laid where it came from.
    fn bwd(&self, xs: &Tensor, _: &Tensor, grad: &Tensor) -> Result<Option<Tensor>> {
        let (batch, seq, width) = xs.dims3()?;
        let head_dim = width / self.heads;
        let grad = grad.contiguous()?;
        let grad = values(&grad);
        let grad = grad.get()?;
        let mut dx = vec![0f32; grad.len()];
        let arch = Arch::new();
        self.with_rows((batch, seq), |angles| {
            // (batch, slot) by (batch, slot): (heads, head_dim)
            dx.par_chunks_mut(width.max(1)).with_min_len(16).enumerate().for_each(|(index, dx)| {
                let (row, slot) = (index / seq, index % seq);
                arch.dispatch(|| {
                    for (head, dx) in dx.chunks_exact_mut(head_dim).enumerate() {
                        let from = ((row * self.heads + head) * seq + slot) * head_dim;
                        turn(&grad[from..from + head_dim], dx, angles.at(row, slot), -1.0);
                    }
                });
            });
        })?;
        Ok(Some(Tensor::from_vec(dx, xs.shape(), xs.device())?))
    }
}

impl SplitHeads {
    /// Calls `work` with the angles at hand, once they are known to be as many as needed.
    fn with_rows(&self, shape: (usize, usize), work: impl FnOnce(Angles<'_>)) -> Result<()> {
        let Some((cos, sin)) = &self.rotation else {
            work(Angles { cos: &[], sin: &[], half: 0, row: 0 });
            return Ok(());
        };
        let ((batch, seq), half) = (shape, cos.dim(candle_core::D::Minus1)?);
        let row = if cos.rank() == 3 { seq * half } else { 0 };
        let (cos, sin) = (values(cos), values(sin));
        let (cos, sin) = (cos.get()?, sin.get()?);
        let expected = if row == 0 { seq * half } else { batch * row };
        if cos.len() != expected || sin.len() != expected {
            candle_core::bail!("split-heads: {} angles for {expected}", cos.len());
        }
        work(Angles { cos, sin, half, row });
        Ok(())
    }
}

/// The angles of every slot.
#[derive(Clone, Copy)]
struct Angles<'a> {
    cos: &'a [f32],
    sin: &'a [f32],
    half: usize,
    /// From one row of the batch to the next; 0 where all stand alike.
    row: usize,
}

impl<'a> Angles<'a> {
    #[inline(always)]
    fn at(&self, row: usize, slot: usize) -> (&'a [f32], &'a [f32]) {
        let from = row * self.row + slot * self.half;
        (&self.cos[from..from + self.half], &self.sin[from..from + self.half])
    }
}

/// Turns one head by its angles, or for `sign` -1 back; without angles it is copied.
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
