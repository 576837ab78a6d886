//! Steps down the gradient of an objective, and what every nudge of thoughts shares: the objective,
//! the trust region, and the best place found.

use std::fmt;
use std::sync::Arc;

use candle_core::{D, DType, Tensor, Var};
use serde::{Deserialize, Serialize, Serializer, ser};

use super::optimizer::{Optimizer, check_ratio, check_steps};
use super::seq::Thinks;
use super::{OpConfig, Refine, Step};
use crate::error::{Error, Result};

/// Moves thoughts down the gradient of an objective, the weights frozen.
///
/// The objective is the prompt's own next-token loss when it is decoded from the thoughts, unless
/// another is given. Each row of the batch keeps the best place it came by, the start included, so
/// the loss never rises. A nudge of K steps costs K gradients (each about three times the layers
/// `a..n` and the head) and one forward pass. Only tokens of context segments move; the result
/// carries no gradient.
///
/// A lower loss of the prompt is not yet a better answer: thoughts that enter late layers can spell
/// out the token that follows, and within a few steps do. The trust region is what holds them to
/// their meaning.
///
/// Over quantised weights no gradient can flow, which is an error: use
/// [`ForwardNudge`](super::ForwardNudge) there.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use hybrid_attention::model::Layout;
/// use hybrid_attention::refine::{GradientNudge, Optimizer, Refine, Step};
/// # fn main() -> hybrid_attention::Result<()> {
/// let z = Tensor::new(&[[[3f32, 4.0]]], &Device::Cpu)?; // one token of size √12.5
/// let nudge = GradientNudge::new(1)
///     .optimizer(Optimizer::Sgd { learning_rate: 0.04 })
///     .trust(0.5)
///     .objective_fn(|xs, _step| Ok((xs.sqr()?.sum((1, 2))? * 0.5)?)); // its gradient: the thoughts
/// let nudged = nudge.refine(&z, &Step::new(&z, &z, &Layout::dense(1, 1)))?;
/// assert_eq!(nudged.to_vec3::<f32>()?, [[[1.5, 2.0]]]); // halfway to 0, where trust ends
/// # Ok(())
/// # }
/// ```
///
/// In `hybrid.json`, where all but the steps may be left out:
/// `{"op": "gradient_nudge", "steps": 4, "optimizer": {"adam": {"learning_rate": 0.01}}, "trust": 0.1}`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct GradientNudge {
    steps: usize,
    #[serde(default = "default_optimizer")]
    optimizer: Optimizer,
    #[serde(default = "default_trust")]
    trust: f64,
    #[serde(skip_deserializing, skip_serializing_if = "Goal::is_next_token")]
    goal: Goal,
}

fn default_optimizer() -> Optimizer {
    Optimizer::Adam { learning_rate: 0.01 }
}

pub(super) fn default_trust() -> f64 {
    0.1
}

impl GradientNudge {
    /// This many steps, up to 1000. 0 leaves the thoughts as they were.
    #[must_use]
    pub fn new(steps: usize) -> Self {
        let (optimizer, trust) = (default_optimizer(), default_trust());
        Self { steps, optimizer, trust, goal: Goal::default() }
    }

    /// How a gradient becomes a step. Default [`Optimizer::Adam`] at 0.01: four steps change a
    /// thought by about 3 %.
    #[must_use]
    pub fn optimizer(mut self, optimizer: Optimizer) -> Self {
        self.optimizer = optimizer;
        self
    }

    /// How far each thought may move in all, as a share of its length where the nudge found it: in
    /// [0, 1e6]. What a step goes beyond that is taken back. Default 0.1; 0 leaves the thoughts as
    /// they were.
    #[must_use]
    pub fn trust(mut self, ratio: f64) -> Self {
        self.trust = ratio;
        self
    }

    /// What to lower instead of the prompt's own next-token loss.
    #[must_use]
    pub fn objective(mut self, objective: impl Objective + 'static) -> Self {
        self.goal = Goal::own(objective);
        self
    }

    /// As [`objective`](Self::objective), from a function: of the thoughts, and of the step.
    #[must_use]
    pub fn objective_fn<F>(mut self, function: F) -> Self
    where
        F: Fn(&Tensor, &Step<'_>) -> Result<Tensor> + Send + Sync + 'static,
    {
        self.goal = Goal::function(function);
        self
    }
}

impl Refine for GradientNudge {
    fn refine(&self, xs: &Tensor, step: &Step<'_>) -> Result<Tensor> {
        let xs = xs.detach();
        if self.steps == 0 || self.trust == 0.0 {
            return Ok(xs);
        }
        let trust = Trust::new(&xs, self.trust, step)?;
        let mut descent = self.optimizer.begin(trust.unit()?);
        let (mut wide, mut here) = (trust.start.clone(), xs.clone());
        let mut best: Option<Best> = None;
        for _ in 0..self.steps {
            let (losses, gradient) = self.goal.loss_and_gradient(&here, step)?;
            best = Some(Best::of(best, &here, losses)?);
            wide = trust.hold(&descent.step(&wide, &trust.moving(&gradient)?)?)?;
            here = wide.to_dtype(xs.dtype())?;
        }
        let losses = self.goal.loss(&here, step)?;
        Ok(Best::of(best, &here, losses)?.xs)
    }

    fn validate(&self) -> Result<()> {
        check_steps(self.steps)?;
        self.optimizer.validate()?;
        check_ratio("trust", self.trust)
    }

    fn to_config(&self) -> Option<OpConfig> {
        self.goal.is_next_token().then(|| OpConfig::GradientNudge(self.clone()))
    }
}

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
///         Ok((xs - step.embeddings)?.sqr()?.sum((1, 2))?) // (batch)
///     }
/// }
/// let nudge = GradientNudge::new(4).objective(Grounded);
/// # let _ = nudge;
/// ```
pub trait Objective: fmt::Debug + Send + Sync {
    /// One number for each row of the batch, `(batch)` in `f32`, that depends on no other row of
    /// `xs`, which is `(batch, seq, hidden)`. For a [`GradientNudge`] `xs` is tracked, and the loss
    /// must be differentiable in it.
    ///
    /// # Errors
    /// When the computation fails; the nudge ends with that error. It also ends with
    /// [`Error::NotFinite`], at the row of the batch, for a loss or a gradient that is not, and with
    /// [`Error::Parameter`] for a loss of another shape or one that no gradient leads back from.
    fn loss(&self, xs: &Tensor, step: &Step<'_>) -> Result<Tensor>;
}

/// An objective made of a function.
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

/// The objective of a nudge: the readout's own loss, unless there is another.
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

    /// The loss of each row of the batch.
    pub(super) fn loss(&self, xs: &Tensor, step: &Step<'_>) -> Result<Vec<f32>> {
        let loss = match &self.0 {
            Some(objective) => objective.loss(xs, step)?,
            None => readout(step)?.loss(xs)?,
        };
        losses(&loss, xs.dim(0)?)
    }

    /// [`Goal::loss`], and its gradient with respect to `xs`.
    fn loss_and_gradient(&self, xs: &Tensor, step: &Step<'_>) -> Result<(Vec<f32>, Tensor)> {
        let batch = xs.dim(0)?;
        let Some(objective) = &self.0 else {
            let (loss, gradient) = readout(step)?.loss_and_gradient(xs)?;
            return Ok((losses(&loss, batch)?, gradient));
        };
        let xs = Var::from_tensor(xs)?;
        let loss = objective.loss(xs.as_tensor(), step)?;
        let losses = losses(&loss, batch)?;
        // rows do not depend on each other: the slope of the sum is that of each
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

fn readout<'a>(step: &Step<'a>) -> Result<&'a dyn super::Readout> {
    step.readout.ok_or_else(|| {
        Error::parameter("readout", "a model behind the step, or an objective of its own", "none")
    })
}

/// Refuses a loss that is not one finite number for each row.
fn losses(loss: &Tensor, batch: usize) -> Result<Vec<f32>> {
    if loss.dims() != [batch] || loss.dtype() != DType::F32 {
        let got = format!("{:?} of {:?}", loss.dims(), loss.dtype());
        return Err(Error::parameter("objective", format!("a loss of [{batch}] of F32"), got));
    }
    let losses = loss.to_vec1::<f32>()?;
    match losses.iter().position(|loss| !loss.is_finite()) {
        Some(position) => Err(Error::NotFinite { what: "losses", position }),
        None => Ok(losses),
    }
}

/// How far thoughts may go from where a nudge found them. Computes in `f32` at least.
pub(super) struct Trust {
    /// Where the nudge found them.
    pub(super) start: Tensor,
    /// Their lengths, `(batch, seq, 1)`.
    lengths: Tensor,
    ratio: f64,
    thinks: Thinks,
}

impl Trust {
    pub(super) fn new(xs: &Tensor, ratio: f64, step: &Step<'_>) -> Result<Self> {
        let (batch, seq, _) = xs.dims3()?;
        if (batch, seq) != (step.layout.batch(), step.layout.seq()) {
            let expected = format!("{batch} rows of {seq} slots, as the thoughts have");
            let got = format!("{} of {}", step.layout.batch(), step.layout.seq());
            return Err(Error::parameter("layout", expected, got));
        }
        let start = match xs.dtype() {
            DType::F64 => xs.clone(),
            _ => xs.to_dtype(DType::F32)?,
        };
        let lengths = lengths(&start)?;
        Ok(Self { thinks: Thinks::new(step.layout, xs)?, start, lengths, ratio })
    }

    /// The root mean square of each thought: `(batch, seq, 1)`.
    pub(super) fn unit(&self) -> Result<Tensor> {
        Ok((&self.lengths / (self.start.dim(D::Minus1)? as f64).sqrt())?)
    }

    /// `x`, each thought brought back within its bound; those that do not think, to their start.
    pub(super) fn hold(&self, x: &Tensor) -> Result<Tensor> {
        const SMALLEST: f64 = f32::MIN_POSITIVE as f64;
        const LARGEST: f64 = f32::MAX as f64;
        // an infinite offset times 0 is NaN; one whose length overflows goes nowhere
        let offset = (x - &self.start)?.clamp(-LARGEST, LARGEST)?;
        let allowed = ((&self.lengths * self.ratio)? / lengths(&offset)?.maximum(SMALLEST)?)?;
        let held = (&self.start + offset.broadcast_mul(&allowed.minimum(1.0)?)?)?;
        self.thinks.or(&held, &self.start)
    }

    /// `gradient` where a token thinks, 0 elsewhere.
    fn moving(&self, gradient: &Tensor) -> Result<Tensor> {
        let gradient = gradient.detach().to_dtype(self.start.dtype())?;
        let moving = self.thinks.or(&gradient, &gradient.zeros_like()?)?;
        // 0 for finite numbers, NaN for others
        let zeros = (&moving * 0.0)?.sum((1, 2))?.to_dtype(DType::F32)?.to_vec1::<f32>()?;
        match zeros.iter().position(|zero| zero.is_nan()) {
            Some(position) => Err(Error::NotFinite { what: "gradients", position }),
            None => Ok(moving),
        }
    }
}

fn lengths(xs: &Tensor) -> Result<Tensor> {
    Ok(xs.sqr()?.sum_keepdim(D::Minus1)?.sqrt()?)
}

/// The best thoughts so far, each row of the batch for itself.
pub(super) struct Best {
    pub(super) xs: Tensor,
    losses: Vec<f32>,
}

impl Best {
    /// The better of what there was and `xs`; of equals, what there was.
    pub(super) fn of(before: Option<Self>, xs: &Tensor, losses: Vec<f32>) -> Result<Self> {
        let Some(before) = before else { return Ok(Self { xs: xs.clone(), losses }) };
        let better: Vec<u8> =
            losses.iter().zip(&before.losses).map(|(new, old)| u8::from(new < old)).collect();
        let lower = losses.iter().zip(&before.losses).map(|(new, old)| new.min(*old)).collect();
        let better = Tensor::new(better, xs.device())?.reshape(((), 1, 1))?; // (batch, 1, 1)
        let xs = better.broadcast_as(xs.shape())?.where_cond(xs, &before.xs)?;
        Ok(Self { xs, losses: lower })
    }
}
