//! A candidate, as far as it has come.

use serde::Serialize;

use crate::generate::stop::StopReason;

/// A candidate: its text so far, how it was judged, and what became of it.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[non_exhaustive]
pub struct Stub {
    /// Its number, from 0.
    pub index: usize,
    /// The seed that its tokens are drawn with; see [`Candidates::seed_of`](super::Candidates::seed_of).
    pub seed: u64,
    /// Its tokens, an end-of-sequence token included.
    pub ids: Vec<u32>,
    /// Their text. Empty without a tokenizer.
    pub text: String,
    /// The log-probability of each, before penalties and temperature.
    pub logprobs: Vec<f32>,
    /// The mean entropy of what the next token might have been, in nats, before penalties and temperature; over the
    /// tokens that it had when it was judged last.
    pub entropy: f64,
    /// The mean self-certainty in the same places, in nats: `KL(uniform ‖ p)` (Kang et al. 2025).
    pub certainty: f64,
    /// How far its statistics were from those that a [key](crate::TokenStream::key) expects, in standard errors; `None`
    /// without a key, and for fewer than two tokens.
    pub deviation: Option<f64>,
    /// Every time that it was judged: how many tokens it had, and its score.
    pub scores: Vec<(usize, f64)>,
    /// How many tokens it had when it was dropped; `None` for one that was not, the winner among them.
    pub dropped_at: Option<usize>,
    /// What became of it.
    pub reason: Reason,
    /// Why its text ended, if it has.
    pub stop: Option<StopReason>,
}

/// What became of a [`Stub`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Reason {
    /// Nothing yet.
    Running,
    /// It is the answer.
    Won,
    /// Others had better scores, in a round or at the end.
    Outscored,
    /// Whatever it would have gone on to say, its score would have been less than that of one that had ended.
    Bound,
    /// The model's numbers overflowed.
    NotFinite,
}

impl Stub {
    pub(super) fn new(index: usize, seed: u64) -> Self {
        Self {
            index,
            seed,
            ids: Vec::new(),
            text: String::new(),
            logprobs: Vec::new(),
            entropy: 0.0,
            certainty: 0.0,
            deviation: None,
            scores: Vec::new(),
            dropped_at: None,
            reason: Reason::Running,
            stop: None,
        }
    }

    /// The score that it was given last.
    #[must_use]
    pub fn score(&self) -> Option<f64> {
        self.scores.last().map(|(_, score)| *score)
    }

    /// The sum of its log-probabilities.
    pub(super) fn sum_logprob(&self) -> f64 {
        self.logprobs.iter().map(|&logprob| f64::from(logprob)).sum()
    }

    pub(super) fn mean_logprob(&self) -> f64 {
        self.sum_logprob() / self.logprobs.len().max(1) as f64
    }
}
