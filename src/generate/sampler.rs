//! From logits to the next token.

use std::cmp::Ordering;
use std::collections::HashMap;

use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::config::GenerationConfig;
use crate::error::{Error, Result};
use crate::kernels::log_sum_exp;

/// Draws tokens as a [`GenerationConfig`] says, in the order of transformers' logits processors:
/// penalties, temperature, top-k, top-p, min-p.
#[derive(Clone, Debug)]
pub struct Sampler {
    config: GenerationConfig,
    rng: ChaCha8Rng,
    /// Tokens of the prompt and of the answer so far, with how often each was generated.
    seen: HashMap<u32, usize>,
    /// The position in the text of the next token.
    position: usize,
}

impl Sampler {
    /// A sampler for an answer to `prompt`.
    ///
    /// # Errors
    /// [`Error::Parameter`] for a value outside its range.
    pub fn new(config: &GenerationConfig, prompt: &[u32]) -> Result<Self> {
        config.validate()?;
        let rng = match config.seed {
            Some(seed) => ChaCha8Rng::seed_from_u64(seed),
            None => ChaCha8Rng::from_os_rng(),
        };
        let seen = prompt.iter().map(|&id| (id, 0)).collect();
        Ok(Self { config: config.clone(), rng, seen, position: prompt.len() })
    }

    /// The same with another seed.
    pub(super) fn with_seed(mut self, seed: u64) -> Self {
        self.rng = ChaCha8Rng::seed_from_u64(seed);
        self
    }

    /// Draws the next token from one position's logits and remembers it for the penalties.
    ///
    /// # Errors
    /// [`Error::NotFinite`] when no token has a finite logit, or one is NaN; [`Error::Parameter`] for
    /// penalties that make a finite logit infinite.
    pub fn sample(&mut self, logits: &[f32]) -> Result<u32> {
        let id = match self.config.takes_likeliest() {
            true => self.likeliest(logits)?,
            false => self.draw(logits)?,
        };
        *self.seen.entry(id).or_insert(0) += 1;
        self.position += 1;
        Ok(id)
    }

    /// What [`draw`](Self::draw) comes to where there is neither a temperature nor a penalty, without a list of all tokens.
    fn likeliest(&self, logits: &[f32]) -> Result<u32> {
        let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
        let sound = logits.iter().fold(true, |sound, logit| sound & (*logit < f32::INFINITY));
        if !sound || !max.is_finite() {
            return Err(self.no_distribution());
        }
        let equals = (0u32..).zip(logits).filter(|(_, logit)| **logit == max);
        let best = equals.map(|(id, logit)| (id, f64::from(*logit))).min_by(likelier);
        best.map(|(id, _)| id).ok_or_else(|| self.no_distribution())
    }

    fn no_distribution(&self) -> Error {
        Error::NotFinite { what: "logits", position: self.position }
    }

    fn draw(&mut self, logits: &[f32]) -> Result<u32> {
        let mut candidates = self.distribution(logits)?;
        Ok(match candidates.as_slice() {
            [(only, _)] => *only,
            _ => {
                // Sorted by id, so that a draw does not depend on how candidates were selected.
                candidates.sort_unstable_by_key(|&(id, _)| id);
                let mut left = self.rng.random::<f64>();
                let drawn = candidates.iter().find(|(_, probability)| {
                    left -= probability;
                    left < 0.0
                });
                // Rounding can leave a tiny remainder: it goes to the last candidate.
                drawn.or(candidates.last()).map_or(0, |&(id, _)| id)
            }
        })
    }

    /// The tokens that [`sample`](Self::sample) would draw from and their probabilities, which sum
    /// to 1, in no particular order.
    ///
    /// # Errors
    /// As [`sample`](Self::sample).
    pub fn distribution(&self, logits: &[f32]) -> Result<Vec<(u32, f64)>> {
        let config = &self.config;
        let mut logits: Vec<f64> = logits.iter().copied().map(f64::from).collect();
        self.penalise(&mut logits)?;

        let candidates = || (0u32..).zip(logits.iter().copied());
        let best = candidates().min_by(likelier);
        let finite = logits.iter().all(|logit| !logit.is_nan() && *logit < f64::INFINITY);
        let Some((best, max)) = best.filter(|(_, max)| finite && max.is_finite()) else {
            return Err(self.no_distribution());
        };
        if config.temperature == 0.0 {
            return Ok(vec![(best, 1.0)]);
        }
        let mut candidates: Vec<(u32, f64)> = candidates().collect();
        if config.top_k > 0 && config.top_k < candidates.len() {
            candidates.select_nth_unstable_by(config.top_k - 1, likelier);
            candidates.truncate(config.top_k);
        }
        // Relative to the likeliest; a tiny temperature leaves only that one, at 1.
        for (_, weight) in &mut candidates {
            *weight = ((*weight - max) / config.temperature).exp();
        }
        if config.top_p < 1.0 {
            let needed = config.top_p * total(&candidates);
            keep_likeliest(&mut candidates, needed);
        }
        // A token of probability 0 must not be drawn.
        candidates.retain(|(_, weight)| *weight > 0.0 && *weight >= config.min_p);
        let total = total(&candidates);
        for (_, weight) in &mut candidates {
            *weight /= total;
        }
        Ok(candidates)
    }

    fn penalise(&self, logits: &mut [f64]) -> Result<()> {
        let config = &self.config;
        for (&id, &count) in &self.seen {
            let Some(logit) = logits.get_mut(id as usize) else { continue };
            let of_model = *logit;
            match of_model > 0.0 {
                true => *logit /= config.repetition_penalty,
                false => *logit *= config.repetition_penalty,
            }
            *logit -= config.frequency_penalty * count as f64;
            if count > 0 {
                *logit -= config.presence_penalty;
            }
            // Minus infinity forbids a token, as it should.
            if of_model.is_finite() && (logit.is_nan() || *logit == f64::INFINITY) {
                let got = format!(
                    "repetition {:e}, frequency {:e}, presence {:e} for a logit of {of_model:e}",
                    config.repetition_penalty, config.frequency_penalty, config.presence_penalty
                );
                return Err(Error::parameter("penalties", "ones that keep logits finite", got));
            }
        }
        Ok(())
    }
}

/// Cuts candidates down to the fewest that together weigh `needed`, likeliest first. A whole vocabulary
/// is expensive to sort and the first few are usually enough, so only as many as needed are sorted.
fn keep_likeliest(candidates: &mut Vec<(u32, f64)>, needed: f64) {
    let mut sorted = 128;
    loop {
        if sorted < candidates.len() {
            candidates.select_nth_unstable_by(sorted, likelier);
        }
        let first = candidates.len().min(sorted);
        candidates[..first].sort_unstable_by(likelier);
        let mut left = needed;
        let enough = candidates[..first].iter().position(|(_, weight)| {
            left -= weight;
            left <= 0.0
        });
        if enough.is_some() || first == candidates.len() {
            return candidates.truncate(enough.map_or(first, |last| last + 1));
        }
        sorted *= 8;
    }
}

/// Likelier first; the lower id among equals.
fn likelier(a: &(u32, f64), b: &(u32, f64)) -> Ordering {
    b.1.total_cmp(&a.1).then(a.0.cmp(&b.0))
}

fn total(candidates: &[(u32, f64)]) -> f64 {
    candidates.iter().map(|(_, weight)| weight).sum()
}

/// Log-probabilities under the model itself, before penalties and temperature.
#[derive(Debug)]
pub(super) struct LogProbs<'a> {
    logits: &'a [f32],
    /// `log Σ exp(logit)`
    log_sum: f64,
}

impl<'a> LogProbs<'a> {
    pub(super) fn new(logits: &'a [f32], position: usize) -> Result<Self> {
        let log_sum = log_sum_exp(logits);
        if !log_sum.is_finite() {
            return Err(Error::NotFinite { what: "logits", position });
        }
        Ok(Self { logits, log_sum })
    }

    pub(super) fn of(&self, id: u32) -> f32 {
        let logit = self.logits.get(id as usize).copied().unwrap_or(f32::NEG_INFINITY);
        (f64::from(logit) - self.log_sum) as f32
    }

    /// The entropy of the next token, `-Σ p log p`, and its self-certainty, `-log V - Σ log p / V`, both in nats. What
    /// cannot come counts in neither.
    fn entropy_and_certainty(&self) -> (f64, f64) {
        let (mut entropy, mut sum, mut possible) = (0.0, 0.0, 0.0);
        for &logit in self.logits.iter().filter(|logit| logit.is_finite()) {
            let logprob = f64::from(logit) - self.log_sum;
            entropy -= f64::from((logprob as f32).exp()) * logprob;
            sum += logprob;
            possible += 1.0;
        }
        (entropy.max(0.0), -sum / possible - possible.ln())
    }

    /// The `n` likeliest tokens, likeliest first.
    pub(super) fn top(&self, n: usize) -> Vec<(u32, f32)> {
        if n == 0 {
            return Vec::new();
        }
        let mut ids: Vec<(u32, f64)> =
            (0u32..).zip(self.logits.iter().copied().map(f64::from)).collect();
        if n < ids.len() {
            ids.select_nth_unstable_by(n - 1, likelier);
            ids.truncate(n);
        }
        ids.sort_unstable_by(likelier);
        ids.into_iter().map(|(id, _)| (id, self.of(id))).collect()
    }
}

/// How sure the model was of the tokens that it drew.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Confidence {
    entropy: f64,
    certainty: f64,
    tokens: f64,
}

impl Confidence {
    /// With another token.
    pub(super) fn add(&mut self, logprobs: &LogProbs<'_>) {
        let (entropy, certainty) = logprobs.entropy_and_certainty();
        self.entropy += entropy;
        self.certainty += certainty;
        self.tokens += 1.0;
    }

    /// The mean entropy and self-certainty.
    pub(super) fn means(self) -> (f64, f64) {
        let tokens = self.tokens.max(1.0);
        (self.entropy / tokens, self.certainty / tokens)
    }
}
