//! What ops share about rows of thoughts: how long they are, which way they point, which of them think.

use std::ops::Range;

use candle_core::{CpuStorage, CustomOp2, D, DType, Layout, Shape, Tensor};

use crate::batch::{Batch, flat};
use crate::error::Result;
use crate::kernels::{f32s, fits_kernels, gradient_for, values};

/// Rows of a `(.., hidden)` tensor as their directions, of length 1, and their lengths, `(.., 1)`. A
/// row of zeros has neither, and both are zero. Neither overflows where a sum of squares would.
pub(crate) fn directions(rows: &Tensor) -> Result<(Tensor, Tensor)> {
    let nonzero = |xs: &Tensor| -> Result<Tensor> { Ok((xs + xs.eq(0.0)?.to_dtype(xs.dtype())?)?) };
    // The scaling cancels out, so its gradient may be left out.
    let unit = nonzero(&rows.detach().abs()?.max_keepdim(D::Minus1)?)?;
    let scaled = rows.broadcast_div(&unit)?;
    let square = scaled.sqr()?.sum_keepdim(D::Minus1)?;
    let (length, real) = (nonzero(&square)?.sqrt()?, square.ne(0.0)?.to_dtype(rows.dtype())?);
    Ok((scaled.broadcast_div(&length)?, ((length * real)? * unit)?))
}

/// The cosine of every row with every other, in `f32` without gradient: `(rows, hidden) -> (rows, rows)`.
pub(crate) fn cosines(rows: &Tensor) -> Result<Tensor> {
    let (directions, _) = directions(&rows.detach().to_dtype(DType::F32)?)?;
    Ok(directions.matmul(&directions.t()?)?.clamp(-1f32, 1f32)?)
}

/// In a type in which sums over many rows and channels lose nothing: half precision as `f32`.
pub(crate) fn wide(xs: &Tensor) -> Result<Tensor> {
    let dtype = if xs.dtype() == DType::F64 { DType::F64 } else { DType::F32 };
    Ok(xs.to_dtype(dtype)?)
}

/// Which rows think.
pub(crate) struct Thinks<'a>(pub(crate) &'a Batch);

impl Thinks<'_> {
    /// `xs` where a row thinks, `z` where it is plain: both of one shape, with a row for each token.
    pub(crate) fn or(&self, xs: &Tensor, z: &Tensor) -> Result<Tensor> {
        let batch = self.0;
        if batch.is_all_context() {
            return Ok(xs.clone());
        }
        batch.check(xs)?;
        if [xs, z].iter().all(|it| fits_kernels(it)) {
            let op = Choose { runs: batch.segments().collect() };
            return Ok(xs.contiguous()?.apply_op2(&z.contiguous()?, op)?);
        }
        self.run_by_run(xs, z)
    }

    /// Put together run by run, which costs one copy; a choice per element costs several.
    fn run_by_run(&self, xs: &Tensor, z: &Tensor) -> Result<Tensor> {
        let (rows, kept) = (flat(xs)?, flat(z)?);
        let (mut runs, mut at) = (Vec::new(), 0);
        for run in self.0.segments() {
            runs.push(kept.narrow(0, at, run.start - at)?);
            runs.push(rows.narrow(0, run.start, run.len())?);
            at = run.end;
        }
        runs.push(kept.narrow(0, at, self.0.tokens() - at)?);
        Ok(Tensor::cat(&runs, 0)?.reshape(xs.shape())?)
    }
}

/// [`Thinks::or`] on the CPU. Composed of candle's operations it would allocate a gradient as large as
/// the whole batch for every run.
struct Choose {
    /// The rows that think.
    runs: Vec<Range<usize>>,
}

impl Choose {
    /// Every run of elements that think, in rows of `hidden`.
    fn elements(&self, hidden: usize) -> impl Iterator<Item = Range<usize>> {
        self.runs.iter().map(move |run| run.start * hidden..run.end * hidden)
    }
}

impl CustomOp2 for Choose {
    fn name(&self) -> &'static str {
        "choose"
    }

    fn cpu_fwd(
        &self,
        xs: &CpuStorage,
        xs_layout: &Layout,
        z: &CpuStorage,
        z_layout: &Layout,
    ) -> candle_core::Result<(CpuStorage, Shape)> {
        let hidden = xs_layout.dims().last().copied().unwrap_or(0);
        let (xs, z) = (f32s(xs, xs_layout)?, f32s(z, z_layout)?);
        let fits = self.elements(hidden).last().is_none_or(|run| run.end <= xs.len());
        if !fits || xs_layout.dims() != z_layout.dims() {
            candle_core::bail!("choose: {xs_layout:?} or {z_layout:?} does not fit the batch");
        }
        let mut ys = z.to_vec();
        for run in self.elements(hidden) {
            ys[run.clone()].copy_from_slice(&xs[run]);
        }
        Ok((CpuStorage::F32(ys), xs_layout.shape().clone()))
    }

    /// Each element of the gradient goes to where the value came from.
    fn bwd(
        &self,
        xs: &Tensor,
        z: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> candle_core::Result<(Option<Tensor>, Option<Tensor>)> {
        let hidden = xs.dim(D::Minus1)?;
        let grad = grad.contiguous()?;
        let grad = values(&grad);
        let grad = grad.get()?;
        let mut of_xs = vec![0f32; grad.len()];
        let mut of_z = grad.to_vec();
        for run in self.elements(hidden) {
            of_xs[run.clone()].copy_from_slice(&grad[run.clone()]);
            of_z[run].fill(0.0);
        }
        Ok((gradient_for(xs, of_xs)?, gradient_for(z, of_z)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Var};
    use proptest::prelude::*;

    proptest! {
        /// Choosing in one copy gives the same values and gradients as choosing run by run.
        #[test]
        fn both_choices_agree(
            lengths in prop::collection::vec(0usize..7, 1..4), hidden in 1usize..5,
            cuts in prop::collection::vec(0usize..7, 3),
        ) {
            let run = || -> Result<()> {
                let mut batch = Batch::ragged(&lengths)?;
                for (sequence, length) in lengths.iter().enumerate() {
                    let mut cuts = cuts.clone();
                    cuts.iter_mut().for_each(|cut| *cut = (*cut).min(*length));
                    cuts.sort_unstable();
                    batch = batch.with_context(sequence, &[cuts[0]..cuts[1], cuts[2]..*length])?;
                }
                if batch.tokens() == 0 {
                    return Ok(());
                }
                let shape = (batch.tokens(), hidden);
                let random = || Tensor::randn(0f32, 1.0, shape, &Device::Cpu);
                let (xs, z) = (Var::from_tensor(&random()?)?, Var::from_tensor(&random()?)?);
                let weights = random()?;
                let numbers = |tensor: &Tensor| tensor.flatten_all()?.to_vec1::<f32>();
                let all = |ys: Tensor| -> Result<[Vec<f32>; 3]> {
                    let gradients = (&ys * &weights)?.sum_all()?.backward()?;
                    let of = |it: &Var| match gradients.get(it) {
                        Some(gradient) => numbers(gradient),
                        None => numbers(&it.zeros_like()?),
                    };
                    Ok([numbers(&ys)?, of(&xs)?, of(&z)?])
                };
                let thinks = Thinks(&batch);
                let (in_one, run_by_run) = (thinks.or(&xs, &z)?, thinks.run_by_run(&xs, &z)?);
                assert_eq!(all(in_one)?, all(run_by_run)?);
                Ok(())
            };
            run().map_err(|error| TestCaseError::fail(error.to_string()))?;
        }
    }
}
