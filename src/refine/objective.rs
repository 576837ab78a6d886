//! What a nudge lowers.

use std::fmt;
use std::sync::Arc;

use candle_core::{DType, Tensor, Var};
use serde::{Serialize, Serializer, ser};

use super::{Readout, Step};
use crate::error::{Error, Result};

/// What a nudge lowers.
///
/// ```
/// use candle_core::Tensor;
/// use hybrid_attention::Result;
/// use hybrid_attention::refine::{GradientNudge, Objective, Step};
///
/// /// Thoughts near the embeddings.
/// #[derive(Debug)]
/// struct Grounded;
///
/// impl Objective for Grounded {
///     fn loss(&self, xs: &Tensor, step: &Step<'_>) -> Result<Tensor> {
///         step.batch.sum(&(xs - step.embeddings)?.sqr()?) // (sequences)
///     }
/// }
/// let nudge = GradientNudge::new(4).objective(Grounded);
/// # let _ = nudge;
/// ```
pub trait Objective: fmt::Debug + Send + Sync {
    /// One number for each sequence, `(sequences)` in `f32`, that depends on no other sequence of `xs`,
    /// which is `(.., hidden)`; [`Batch::sum`](crate::model::Batch::sum) makes one. For a
    /// [`GradientNudge`](super::GradientNudge) `xs` is tracked, and the loss must be differentiable in
    /// it.
    ///
    /// # Errors
    /// When the computation fails; the nudge ends with that error. It also ends with
    /// [`Error::NotFinite`], with the index of the sequence, for a loss or a gradient that is not
    /// finite, and with [`Error::Parameter`] for a loss of another shape or one that no gradient flows
    /// back from.
    fn loss(&self, xs: &Tensor, step: &Step<'_>) -> Result<Tensor>;
}

/// An objective made from a function.
struct Function<F>(F);

impl<F> fmt::Debug for Function<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Function")
    }
}

impl<F> Objective for Function<F>
where
    F: Fn(&Tensor, &Step<'_>) -> Result<Tensor> + Send + Sync,
{
    fn loss(&self, xs: &Tensor, step: &Step<'_>) -> Result<Tensor> {
        self.0(xs, step)
    }
}

/// The objective of a nudge: the readout's own loss, unless another is given.
#[derive(Clone, Debug, Default)]
pub(super) struct Goal(Option<Arc<dyn Objective>>);

impl Goal {
    pub(super) fn own(objective: impl Objective + 'static) -> Self {
        Self(Some(Arc::new(objective)))
    }

    pub(super) fn function<F>(function: F) -> Self
    where
        F: Fn(&Tensor, &Step<'_>) -> Result<Tensor> + Send + Sync + 'static,
    {
        Self::own(Function(function))
    }

    pub(super) fn is_next_token(&self) -> bool {
        self.0.is_none()
    }

    /// The loss of each sequence.
    pub(super) fn loss(&self, xs: &Tensor, step: &Step<'_>) -> Result<Vec<f32>> {
        let loss = match &self.0 {
            Some(objective) => objective.loss(xs, step)?,
            None => readout(step)?.loss(xs)?,
        };
        losses(&loss, step.batch.sequences())
    }

    /// [`Goal::loss`], and its gradient with respect to `xs`.
    pub(super) fn loss_and_gradient(
        &self,
        xs: &Tensor,
        step: &Step<'_>,
    ) -> Result<(Vec<f32>, Tensor)> {
        let sequences = step.batch.sequences();
        let Some(objective) = &self.0 else {
            let (loss, gradient) = readout(step)?.loss_and_gradient(xs)?;
            return Ok((losses(&loss, sequences)?, gradient));
        };
        let xs = Var::from_tensor(xs)?;
        let loss = objective.loss(xs.as_tensor(), step)?;
        let losses = losses(&loss, sequences)?;
        // sequences do not depend on each other: the gradient of the sum is that of each
        let gradient = loss.sum_all()?.backward()?.remove(&xs).ok_or_else(|| {
            let expected = "a loss that is differentiable in the thoughts";
            Error::parameter("objective", expected, "one that no gradient leads back from")
        })?;
        Ok((losses, gradient))
    }
}

impl PartialEq for Goal {
    fn eq(&self, other: &Self) -> bool {
        match (&self.0, &other.0) {
            (None, None) => true,
            (Some(a), Some(b)) => Arc::ptr_eq(a, b),
            _ => false,
        }
    }
}

impl Serialize for Goal {
    fn serialize<S: Serializer>(&self, _serializer: S) -> Result<S::Ok, S::Error> {
        Err(ser::Error::custom("an objective of its own cannot be written: only code can make it"))
    }
}

fn readout<'a>(step: &Step<'a>) -> Result<&'a dyn Readout> {
    step.readout.ok_or_else(|| {
        Error::parameter("readout", "a model behind the step, or an objective of its own", "none")
    })
}

/// Refuses a loss that is not one finite number for each sequence.
fn losses(loss: &Tensor, sequences: usize) -> Result<Vec<f32>> {
    if loss.dims() != [sequences] || loss.dtype() != DType::F32 {
        let got = format!("{:?} of {:?}", loss.dims(), loss.dtype());
        return Err(Error::parameter("objective", format!("a loss of [{sequences}] of F32"), got));
    }
    let losses = loss.to_vec1::<f32>()?;
    match losses.iter().position(|loss| !loss.is_finite()) {
        Some(position) => Err(Error::NotFinite { what: "losses", position }),
        None => Ok(losses),
    }
}
