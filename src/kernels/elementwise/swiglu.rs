//! `silu(gate) · up` in one pass over memory.

use candle_core::{CpuStorage, CustomOp2, InplaceOp2, Layout, Result, Shape, Tensor};
use pulp::Arch;
use rayon::prelude::*;

use super::super::storage::{f32s, f32s_mut, gradient_for, values};
use super::exp::exp;

/// Elements that one task computes.
const RUN: usize = 1 << 14;

/// `silu(gate) · up`, both contiguous, of one shape, in `f32`: written over `gate`, or to a new tensor
/// with a gradient. The plain twin is `gate.silu()? * up`.
#[derive(Debug)]
pub(in crate::kernels) struct SwiGlu;

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
        let (gate, up) = (f32s_mut(gate, gate_layout)?, f32s(up, up_layout)?);
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

impl CustomOp2 for SwiGlu {
    fn name(&self) -> &'static str {
        "swiglu"
    }

    fn cpu_fwd(
        &self,
        gate: &CpuStorage,
        gate_layout: &Layout,
        up: &CpuStorage,
        up_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let (gate, up) = (f32s(gate, gate_layout)?, f32s(up, up_layout)?);
        let mut ys = vec![0f32; gate.len()];
        let arch = Arch::new();
        let inputs = gate.par_chunks(RUN).zip(up.par_chunks(RUN));
        ys.par_chunks_mut(RUN).zip(inputs).for_each(|(ys, (gate, up))| {
            arch.dispatch(|| {
                for (y, (gate, up)) in ys.iter_mut().zip(gate.iter().zip(up)) {
                    *y = gate * (up / (1.0 + exp(-gate)));
                }
            });
        });
        Ok((CpuStorage::F32(ys), gate_layout.shape().clone()))
    }

    /// With `s = sigmoid(gate)`: `dgate = grad · up · s (1 + gate (1 - s))`, `dup = grad · gate s`.
    fn bwd(
        &self,
        gate: &Tensor,
        up: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>)> {
        let grad = grad.contiguous()?;
        let [gate_values, up_values, grad] = [gate, up, &grad].map(values);
        let (g, u, grad) = (gate_values.get()?, up_values.get()?, grad.get()?);
        let (mut dg, mut du) = (vec![0f32; g.len()], vec![0f32; u.len()]);
        let arch = Arch::new();
        let inputs = g.par_chunks(RUN).zip(u.par_chunks(RUN)).zip(grad.par_chunks(RUN));
        let outputs = dg.par_chunks_mut(RUN).zip(du.par_chunks_mut(RUN));
        outputs.zip(inputs).for_each(|((dg, du), ((g, u), grad))| {
            arch.dispatch(|| {
                let inputs = g.iter().zip(u).zip(grad);
                for ((dg, du), ((g, u), grad)) in dg.iter_mut().zip(du).zip(inputs) {
                    let s = 1.0 / (1.0 + exp(-g));
                    *dg = grad * u * (s * (1.0 + g * (1.0 - s)));
                    *du = grad * (g * s);
                }
            });
        });
        Ok((gradient_for(gate, dg)?, gradient_for(up, du)?))
    }
}
