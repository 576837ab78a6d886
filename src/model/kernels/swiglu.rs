//! `silu(gate) · up` in one pass over memory.

use candle_core::{CpuStorage, InplaceOp2, Layout, Result};
use pulp::Arch;
use rayon::prelude::*;

use super::exp::exp;
use super::within;

/// Elements that one task computes.
const RUN: usize = 1 << 14;

/// Replaces `gate` by `silu(gate) · up`, both contiguous, of one shape, in `f32`. The plain twin is
/// `gate.silu()? * up`.
#[derive(Debug)]
pub(crate) struct SwiGlu;

impl InplaceOp2 for SwiGlu {
    fn name(&self) -> &'static str {
        "swiglu"
    }

    fn cpu_fwd(
        &self,
        gate: &mut CpuStorage,
        gate_layout: &Layout,
        up: &CpuStorage,
        up_layout: &Layout,
    ) -> Result<()> {
        let contiguous = gate_layout.is_contiguous() && up_layout.is_contiguous();
        let (CpuStorage::F32(gate), CpuStorage::F32(up), true) = (gate, up, contiguous) else {
            candle_core::bail!("swiglu: expected contiguous f32");
        };
        let (start, count) = (gate_layout.start_offset(), gate_layout.shape().elem_count());
        let Some(gate) = gate.get_mut(start..start + count) else {
            candle_core::bail!("swiglu: gate outside its storage");
        };
        let up = within(up, up_layout, count)?;
        let arch = Arch::new();
        gate.par_chunks_mut(RUN).zip(up.par_chunks(RUN)).for_each(|(gate, up)| {
            arch.dispatch(|| {
                for (gate, up) in gate.iter_mut().zip(up) {
                    *gate *= up / (1.0 + exp(-*gate));
                }
            });
        });
        Ok(())
    }
}
