//! A nudge that needs no gradient: random probes, weighted by how much they help.

use candle_core::{D, Tensor};
use rand::{RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::objective::{Goal, Objective};
use super::optimizer::{check_ratio, check_steps};
use super::trust::{Best, Trust, default_trust};
use super::{OpConfig, Refine, Step};
use crate::batch::Batch;
use crate::error::{Error, Result};

/// Moves thoughts towards a lower loss by forward passes alone, and so works where no gradient can
/// flow: over quantised weights on a GPU, or for an objective that is not differentiable.
///
/// An evolution strategy. Each step probes pairs `x ± σ·s·ε` around the best thoughts so far, with `ε`
/// random signs (Spall 1992) and `s` the root mean square of each thought, so that a probe moves every
/// thought by a share σ of its length. The step is the mean of the probes, weighted by the softmax of
/// their standardised rewards (as in path integral control, Williams et al. 2017); pairs cancel whatever
/// does not depend on the direction (Salimans et al. 2017). Each sequence keeps the best point of all
/// that were tried, the start included, so the loss never rises. A nudge of K steps in N directions
/// costs 1 + K·(2N + 1) forward passes of the layers `a..n` and the head.
///
/// A few random directions capture little of a gradient in many thousand channels: where one can flow, a
/// [`GradientNudge`](super::GradientNudge) gets much further in the same time.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use hybrid_attention::model::Batch;
/// use hybrid_attention::refine::{ForwardNudge, Refine, Step};
/// # fn main() -> hybrid_attention::Result<()> {
/// let z = Tensor::new(&[[[3f32, 4.0]]], &Device::Cpu)?;
/// let nudge = ForwardNudge::new(10).seed(7).objective_fn(|xs, step| step.batch.sum(&xs.abs()?));
/// let nudged = nudge.refine(&z, &Step::new(&z, &z, &Batch::one(1)?))?;
/// let size = nudged.abs()?.sum_all()?.to_scalar::<f32>()?;
/// assert!(size < 6.5, "{size}"); // 7 at first; trust ends at 6.3
/// # Ok(())
/// # }
/// ```
///
/// In `hybrid.json`, where all but the steps may be left out: `{"op": "forward_nudge", "steps": 4,
/// "directions": 8, "sigma": 0.05, "temperature": 1.0, "trust": 0.1, "seed": 0}`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ForwardNudge {
    steps: usize,
    #[serde(default = "default_directions")]
    directions: usize,
    #[serde(default = "default_sigma")]
    sigma: f64,
    #[serde(default = "default_temperature")]
    temperature: f64,
    #[serde(default = "default_trust")]
    trust: f64,
    #[serde(default)]
    seed: u64,
    #[serde(skip_deserializing, skip_serializing_if = "Goal::is_next_token")]
    goal: Goal,
}

fn default_directions() -> usize {
    8
}

fn default_sigma() -> f64 {
    0.05
}

fn default_temperature() -> f64 {
    1.0
}

impl ForwardNudge {
    /// This many steps, up to 1000. 0 leaves the thoughts as they were.
    #[must_use]
    pub fn new(steps: usize) -> Self {
        Self {
            steps,
            directions: default_directions(),
            sigma: default_sigma(),
            temperature: default_temperature(),
            trust: default_trust(),
            seed: 0,
            goal: Goal::default(),
        }
    }

    /// What it costs in readings of the text.
    pub(super) fn reads(&self) -> usize {
        let step = self.directions.saturating_mul(2).saturating_add(1);
        self.steps.saturating_mul(step).saturating_add(1)
    }

    /// Directions of a step, 1 to 1000, each probed both ways. Default 8.
    #[must_use]
    pub fn directions(mut self, directions: usize) -> Self {
        self.directions = directions;
        self
    }

    /// How far a probe moves each thought, as a share of its length where the nudge found it: in
    /// [0, 1e6]. Default 0.05; 0 leaves the thoughts as they were.
    #[must_use]
    pub fn sigma(mut self, ratio: f64) -> Self {
        self.sigma = ratio;
        self
    }

    /// How even the weights of the probes are, more than 0 and up to 1e6, in standard deviations of
    /// their losses. Default 1. Towards 0 the step is the best probe; when high, the steps are short and
    /// follow the mean gradient.
    #[must_use]
    pub fn temperature(mut self, temperature: f64) -> Self {
        self.temperature = temperature;
        self
    }

    /// How far each thought may move in total, as a share of its length where the nudge found it: in [0,
    /// 1e6]. Default 0.1; 0 leaves the thoughts as they were.
    #[must_use]
    pub fn trust(mut self, ratio: f64) -> Self {
        self.trust = ratio;
        self
    }

    /// The seed of the directions. Default 0. The same seed gives each token the same directions,
    /// whatever other sequences there are.
    #[must_use]
    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// What to lower instead of the prompt's own next-token loss. Need not be differentiable.
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

    /// The random signs of one direction, in the shape of the thoughts. Those of a token depend on its
    /// place in its sequence, not on what else is in the batch.
    fn signs(&self, like: &Tensor, batch: &Batch, place: [usize; 3]) -> Result<Tensor> {
        let hidden = like.dim(D::Minus1)?;
        let key = [self.seed, place[0] as u64, place[1] as u64, place[2] as u64];
        let mut seed = [0; 32];
        for (bytes, word) in seed.chunks_exact_mut(8).zip(key) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        let mut signs = Vec::with_capacity(like.elem_count());
        for rows in batch.all_rows() {
            let mut rng = ChaCha8Rng::from_seed(seed);
            for _token in rows {
                let mut bits = 0;
                for channel in 0..hidden {
                    bits = if channel % 32 == 0 { rng.next_u32() } else { bits >> 1 };
                    signs.push(if bits & 1 == 1 { 1f32 } else { -1.0 });
                }
            }
        }
        Ok(Tensor::from_vec(signs, like.shape(), like.device())?.to_dtype(like.dtype())?)
    }

    /// Each pair's share of the step, signed, for each sequence: the difference of the softmax weights
    /// of its two probes.
    fn shares(&self, losses: &[[Vec<f32>; 2]]) -> Vec<Vec<f32>> {
        let sequences = losses.first().map_or(0, |[plus, _]| plus.len());
        let mut shares = vec![Vec::with_capacity(sequences); losses.len()];
        for sequence in 0..sequences {
            let its = |loss: &Vec<f32>| f64::from(loss.get(sequence).copied().unwrap_or(0.0));
            let values: Vec<f64> = losses.iter().flatten().map(its).collect();
            let weights = self.weights(&values);
            for (share, pair) in shares.iter_mut().zip(weights.chunks_exact(2)) {
                if let [plus, minus] = pair {
                    share.push((plus - minus) as f32);
                }
            }
        }
        shares
    }

    /// The softmax of `-losses` in standard deviations, over the temperature.
    fn weights(&self, losses: &[f64]) -> Vec<f64> {
        let count = losses.len().max(1) as f64;
        let mean = losses.iter().sum::<f64>() / count;
        let variance = losses.iter().map(|loss| (loss - mean).powi(2)).sum::<f64>() / count;
        let lowest = losses.iter().copied().fold(f64::INFINITY, f64::min);
        let scale = (variance.sqrt() * self.temperature).max(f64::MIN_POSITIVE);
        let weights: Vec<f64> = losses.iter().map(|loss| ((lowest - loss) / scale).exp()).collect();
        let sum = weights.iter().sum::<f64>();
        weights.into_iter().map(|weight| weight / sum).collect()
    }
}

impl Refine for ForwardNudge {
    fn refine(&self, xs: &Tensor, step: &Step<'_>) -> Result<Tensor> {
        let xs = xs.detach();
        if self.steps == 0 || self.sigma == 0.0 || self.trust == 0.0 {
            return Ok(xs);
        }
        let trust = Trust::new(&xs, self.trust, step)?;
        let sigma = (trust.unit()? * self.sigma)?; // (.., 1)
        let mut best = Best::of(None, &xs, self.goal.loss(&xs, step)?, step.batch)?;
        for index in 0..self.steps {
            let from = best.xs.to_dtype(trust.start.dtype())?;
            let probe = |direction: usize| -> Result<Tensor> {
                let signs = self.signs(&from, step.batch, [step.index, index, direction])?;
                Ok(signs.broadcast_mul(&sigma)?)
            };
            let look = |x: Tensor, best: Best| -> Result<(Best, Vec<f32>)> {
                let x = trust.hold(&x)?.to_dtype(xs.dtype())?;
                let losses = self.goal.loss(&x, step)?;
                Ok((Best::of(Some(best), &x, losses.clone(), step.batch)?, losses))
            };
            let mut losses = Vec::with_capacity(self.directions);
            for direction in 0..self.directions {
                let offset = probe(direction)?;
                let (better, plus) = look((&from + &offset)?, best)?;
                let (better, minus) = look((&from - &offset)?, better)?;
                best = better;
                losses.push([plus, minus]);
            }
            // the directions are drawn again rather than kept: they are as large as the thoughts
            let mut moved = from.clone();
            for (direction, share) in self.shares(&losses).into_iter().enumerate() {
                let share = step.batch.spread(&share, from.device())?; // (tokens, 1)
                let share = share.to_dtype(from.dtype())?.reshape(sigma.shape())?;
                moved = (moved + probe(direction)?.broadcast_mul(&share)?)?;
            }
            best = look(moved, best)?.0;
        }
        Ok(best.xs)
    }

    fn validate(&self) -> Result<()> {
        check_steps(self.steps)?;
        if !(1..=1000).contains(&self.directions) {
            return Err(Error::parameter("directions", "1 to 1000", self.directions));
        }
        check_ratio("sigma", self.sigma)?;
        if !(self.temperature > 0.0 && self.temperature <= 1e6) {
            let expected = "more than 0 and up to 1e6";
            return Err(Error::parameter("temperature", expected, self.temperature));
        }
        check_ratio("trust", self.trust)
    }

    fn to_config(&self) -> Option<OpConfig> {
        self.goal.is_next_token().then(|| OpConfig::ForwardNudge(self.clone()))
    }
}
