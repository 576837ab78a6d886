//! Steps down the gradient of an objective.

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use super::objective::{Goal, Objective};
use super::optimizer::{Optimizer, check_ratio, check_steps};
use super::trust::{Best, Trust, default_trust};
use super::{OpConfig, Refine, Step};
use crate::error::Result;

/// Moves thoughts down the gradient of an objective, the weights frozen.
///
/// The objective is the prompt's own next-token loss when it is decoded from the thoughts, unless
/// another is given. Each sequence keeps the best point it passed, the start included, so the loss never
/// rises. A nudge of K steps costs K gradients (each about three times the layers `a..n` and the head)
/// and one forward pass. Only tokens of context segments move; the result carries no gradient.
///
/// A lower loss on the prompt is not necessarily a better answer: thoughts that enter late layers can
/// spell out the token that follows, and within a few steps they do. The trust region is what keeps them
/// close to their meaning.
///
/// It is an error where no gradient can flow: over quantised weights on a device other than the CPU. Use
/// [`ForwardNudge`](super::ForwardNudge) there.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use hybrid_attention::model::Batch;
/// use hybrid_attention::refine::{GradientNudge, Optimizer, Refine, Step};
/// # fn main() -> hybrid_attention::Result<()> {
/// let z = Tensor::new(&[[[3f32, 4.0]]], &Device::Cpu)?; // one token of size √12.5
/// let nudge = GradientNudge::new(1)
///     .optimizer(Optimizer::Sgd { learning_rate: 0.04 })
///     .trust(0.5)
///     .objective_fn(|xs, step| Ok((step.batch.sum(&xs.sqr()?)? * 0.5)?)); // its gradient: the thoughts
/// let nudged = nudge.refine(&z, &Step::new(&z, &z, &Batch::one(1)?))?;
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

impl GradientNudge {
    /// This many steps, up to 1000. 0 leaves the thoughts as they were.
    #[must_use]
    pub fn new(steps: usize) -> Self {
        let (optimizer, trust) = (default_optimizer(), default_trust());
        Self { steps, optimizer, trust, goal: Goal::default() }
    }

    /// What it costs in readings of the text.
    pub(super) fn reads(&self) -> usize {
        self.steps.saturating_mul(3).saturating_add(1)
    }

    /// How a gradient becomes a step. Default [`Optimizer::Adam`] at 0.01: four steps change a
    /// thought by about 3 %.
    #[must_use]
    pub fn optimizer(mut self, optimizer: Optimizer) -> Self {
        self.optimizer = optimizer;
        self
    }

    /// How far each thought may move in total, as a share of its length where the nudge found it: in [0,
    /// 1e6]. What a step goes beyond that is taken back. Default 0.1; 0 leaves the thoughts as they
    /// were.
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

    /// As [`objective`](Self::objective), from a function of the thoughts and the step.
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
            best = Some(Best::of(best, &here, losses, step.batch)?);
            wide = trust.hold(&descent.step(&wide, &trust.moving(&gradient)?)?)?;
            here = wide.to_dtype(xs.dtype())?;
        }
        let losses = self.goal.loss(&here, step)?;
        Ok(Best::of(best, &here, losses, step.batch)?.xs)
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
