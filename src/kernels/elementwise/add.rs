//! A sum that is written over one of its parts.

use candle_core::{CpuStorage, InplaceOp2, Layout, Result};
use rayon::prelude::*;

use super::super::storage::{f32s, f32s_mut};

/// Elements that one task computes.
const RUN: usize = 1 << 14;

/// `ys += xs`, both contiguous, of one shape, in `f32`. The plain twin is candle's addition, which needs
/// new memory: for a large tensor that costs more than the sum.
#[derive(Debug)]
pub(in crate::kernels) struct AddTo;

impl InplaceOp2 for AddTo {
    fn name(&self) -> &'static str {
        "add-to"
    }

    fn cpu_fwd(
        &self,
        ys: &mut CpuStorage,
        ys_layout: &Layout,
        xs: &CpuStorage,
        xs_layout: &Layout,
    ) -> Result<()> {
        let ys = f32s_mut(ys, ys_layout)?;
        let xs = f32s(xs, xs_layout)?;
        if xs.len() != ys.len() {
            candle_core::bail!("add-to: {xs_layout:?} to {ys_layout:?}");
        }
        ys.par_chunks_mut(RUN).zip(xs.par_chunks(RUN)).for_each(|(ys, xs)| {
            ys.iter_mut().zip(xs).for_each(|(y, x)| *y += x);
        });
        Ok(())
    }
}
