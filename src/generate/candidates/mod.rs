//! Several stubs of an answer, of which the worst are dropped while they are written.

mod race;
mod score;
mod stub;

use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::config::GenerationConfig;
use crate::error::{Error, Result};
use crate::model::KvCache;
use crate::thought::Thinking;

pub(super) use self::race::{Race, Start};
pub use self::score::{Extract, Score};
pub use self::stub::{Reason, Stub};

/// Several candidates for an answer to one prompt. Their texts so far, the *stubs*, grow side by side, one token of
/// each in a pass; every so many tokens the worst of them are dropped, and the one that is left is the answer.
///
/// Candidates differ by what is drawn for them: [`samples`](Self::samples) by their tokens,
/// [`thoughts`](Self::thoughts) by the noise that they think with. What is drawn for one depends on the seed and its
/// number alone, so that it is the same whatever becomes of the others: a stub has, to the last bit, the numbers that
/// it would have by itself.
///
/// | what | how |
/// |---|---|
/// | drop the worst half every 8 tokens (successive halving, Jamieson & Talwalkar 2016) | the default |
/// | drop the worst, as in Speculative Rejection (Sun et al. 2024) | [`keep`](Self::keep), [`every`](Self::every) |
/// | best of n | [`keep_all`](Self::keep_all) |
/// | end when a text is as its prompt lets one expect | [`within`](Self::within), with a [key](super::TokenStream::key) |
/// | best by what | [`score`](Self::score), or a function: [`TokenStream::score_by`](super::TokenStream::score_by) |
///
/// Some [scores](Score) cannot rise above a bound that is known while a stub is being written: a sum of
/// log-probabilities only falls. A stub whose bound is below the score of one that has ended can no longer win, and
/// is dropped at once. Writing ends when one is left, which then goes on alone, or when all that are left have ended.
///
/// It need not help. Dropping by [`Score::Random`] costs as much and is the control that a score has to beat, and the greedy
/// answer is one that costs a fraction: on the stories of [`HybridModel::tiny`](crate::HybridModel::tiny) no way to choose
/// was better than that. `cargo bench --bench candidates` holds all of them to these controls.
///
/// The prompt is read once, and samples share its keys and values, each with blocks of its own from the last block of
/// the prompt on. Of thoughts, the layers before the [span](Thinking::span) are shared in the same way. From there on
/// every [hand-off](crate::HandOff) gives each thought keys and values of its own, and the memory of a prompt for each.
/// What all of them may need at once is compared with the [budget](crate::HybridModel::with_cache_budget) of the
/// caches and the memory of the machine before anything is computed. A stub that is dropped frees its blocks.
///
/// ```
/// # use candle_core::Device;
/// use hybrid_attention::generate::{Candidates, Reason, Score};
/// use hybrid_attention::{GenerationConfig, HybridModel};
///
/// # fn main() -> hybrid_attention::Result<()> {
/// let model = HybridModel::tiny(&Device::Cpu)?;
/// let candidates = Candidates::samples(8).keep(0.5).every(2).score(Score::MeanLogprob);
/// let config = GenerationConfig::default().temperature(1.0).seed(1).max_tokens(9).candidates(candidates);
/// let answer = model.generate("The coin is in the jar. The jar is in the chest.", &config)?;
///
/// assert_eq!(answer.candidates.len(), 8);
/// let won = answer.candidates.iter().find(|stub| stub.reason == Reason::Won);
/// assert_eq!(won.map(|stub| &stub.ids), Some(&answer.ids));
/// for stub in &answer.candidates {
///     println!("{:?} after {:?} tokens: {}", stub.reason, stub.dropped_at, stub.text);
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Candidates {
    count: usize,
    #[serde(default)]
    differ: Differ,
    #[serde(default = "half")]
    keep: Option<f64>,
    #[serde(default = "eight")]
    every: usize,
    #[serde(default)]
    score: Score,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    within: Option<f64>,
}

/// How candidates differ.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Differ {
    #[default]
    Samples,
    Thoughts,
}

fn half() -> Option<f64> {
    Some(0.5)
}

fn eight() -> usize {
    8
}

impl Candidates {
    /// The most candidates that are accepted.
    pub const MOST: usize = 1024;

    /// As many samples, each drawn with a [seed](Self::seed_of) of its own, at a
    /// [temperature](GenerationConfig::temperature) above 0. At least 1, at most [`MOST`](Self::MOST).
    #[must_use]
    pub fn samples(count: usize) -> Self {
        let (differ, score) = (Differ::Samples, Score::default());
        Self { count, differ, keep: half(), every: eight(), score, within: None }
    }

    /// As many thoughts: each reads the prompt and thinks about it by itself, and draws its own
    /// [noise](crate::refine::Noise) by its number. At least 1, at most [`MOST`](Self::MOST).
    ///
    /// Decoding is as of samples: greedy at temperature 0, and with a seed for each at any other.
    #[must_use]
    pub fn thoughts(count: usize) -> Self {
        Self { differ: Differ::Thoughts, ..Self::samples(count) }
    }

    /// The share of the candidates that is left by a round, in (0, 1): after `r` rounds no more than
    /// `⌈count · shareʳ⌉` are, those that have ended included. Default 0.5.
    #[must_use]
    pub fn keep(mut self, share: f64) -> Self {
        self.keep = Some(share);
        self
    }

    /// Drops none in a round; those are still dropped that can no longer win.
    #[must_use]
    pub fn keep_all(mut self) -> Self {
        self.keep = None;
        self
    }

    /// A round comes after every so many tokens of each, at least 1. Default 8.
    #[must_use]
    pub fn every(mut self, tokens: usize) -> Self {
        self.every = tokens;
        self
    }

    /// What the best one is best by. Default [`Score::MeanLogprob`].
    #[must_use]
    pub fn score(mut self, score: Score) -> Self {
        self.score = score;
        self
    }

    /// Ends all of it in the first round in which the statistics of a stub are within so many standard errors of those
    /// that a [key](super::TokenStream::key) expects: the best of such stubs is the answer, and ends there, even if it is
    /// the last one left. Above 0. Default: never.
    #[must_use]
    pub fn within(mut self, standard_errors: f64) -> Self {
        self.within = Some(standard_errors);
        self
    }

    /// Whether a [key](super::TokenStream::key) has to be given.
    pub(super) fn needs_key(&self) -> bool {
        self.score == Score::Key || self.within.is_some()
    }

    /// How many there are.
    #[must_use]
    pub fn count(&self) -> usize {
        self.count
    }

    /// The seed of the candidate of this number, from 0, where the answer's is `seed`: as of any answer that is
    /// generated alone. That of the first is `seed` itself.
    ///
    /// ```
    /// # use candle_core::Device;
    /// use hybrid_attention::generate::Candidates;
    /// use hybrid_attention::{GenerationConfig, HybridModel};
    ///
    /// # fn main() -> hybrid_attention::Result<()> {
    /// let model = HybridModel::tiny(&Device::Cpu)?;
    /// let config = GenerationConfig::default().temperature(1.0).max_tokens(4);
    /// let prompt = "The coin is in the jar.";
    /// let four = config.clone().seed(7).candidates(Candidates::samples(4).keep_all());
    /// let third = model.generate(prompt, &config.seed(Candidates::seed_of(7, 2)))?;
    /// let answer = model.generate(prompt, &four)?;
    /// assert!(third.ids.starts_with(&answer.candidates[2].ids));
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn seed_of(seed: u64, candidate: usize) -> u64 {
        // An odd number, so that no two of them are the same.
        seed.wrapping_add((candidate as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15))
    }

    /// Checks what depends on nothing else.
    pub(super) fn validate(&self, config: &GenerationConfig) -> Result<()> {
        if !(1..=Self::MOST).contains(&self.count) {
            let expected = format!("1 to {}", Self::MOST);
            return Err(Error::parameter("candidates", expected, self.count));
        }
        if let Some(share) = self.keep
            && !(share > 0.0 && share < 1.0)
        {
            return Err(Error::parameter("keep", "a share within (0, 1)", share));
        }
        if self.every == 0 {
            return Err(Error::parameter("every", "at least 1 token", 0));
        }
        if let Some(errors) = self.within
            && !(errors > 0.0 && errors.is_finite())
        {
            return Err(Error::parameter("within", "above 0 standard errors", errors));
        }
        if config.max_tokens == 0 {
            return Err(Error::parameter("max_tokens", "at least 1 for candidates", 0));
        }
        if self.differ == Differ::Samples && self.count > 1 && config.temperature == 0.0 {
            let expected = "above 0 for candidates that are samples";
            return Err(Error::parameter("temperature", expected, 0));
        }
        Ok(())
    }

    /// Refuses thinking that candidates do not go with.
    pub(super) fn check(&self, thinking: &Thinking) -> Result<()> {
        let refuse = |expected: &str, got| Err(Error::parameter("candidates", expected, got));
        // With either, a stub takes passes of its own and cannot step beside the others.
        if !thinking.is_none() && thinking.rethinks_every() > 0 {
            let got = format!("rethink_every {}", thinking.rethinks_every());
            return refuse("thinking that does not think again", got);
        }
        if thinking.chosen_output_nudge().is_some() {
            return refuse("thinking without an output nudge", "output_nudge".to_owned());
        }
        if self.are_thoughts() && thinking.is_none() {
            return refuse("at least one pass for candidates that are thoughts", "0".to_owned());
        }
        if self.are_thoughts() && !thinking.may_differ() {
            return refuse(
                "thinking with noise for candidates that are thoughts",
                "none".to_owned(),
            );
        }
        Ok(())
    }

    /// Refuses what there is no room for. The prompt ends, and answers begin, at the start of `new`, and end with it;
    /// of thoughts, the layers before `span` are the same for all. `cache` may hold some of the prompt.
    pub(super) fn check_room(&self, cache: &KvCache, new: Range<usize>, span: usize) -> Result<()> {
        let pool = cache.pool();
        let shared = if self.are_thoughts() { span } else { pool.layers() };
        let own = pool.layers().saturating_sub(shared);
        let of_all = pool.bytes_of(0..new.start, shared);
        let after = |rounds: usize, tokens: usize| {
            let end = new.start.saturating_add(tokens).min(new.end);
            let each =
                pool.bytes_of(new.start..end, shared).saturating_add(pool.bytes_of(0..end, own));
            each.saturating_mul(self.left_after(rounds))
        };
        // They need most before some round, or at the end.
        let mut most = 0;
        for rounds in 0usize.. {
            let last =
                self.left_after(rounds) == 1 || rounds.saturating_mul(self.every) >= new.len();
            let tokens = if last { new.len() } else { (rounds + 1).saturating_mul(self.every) };
            most = most.max(after(rounds, tokens));
            if last {
                break;
            }
        }
        pool.check_free(of_all.saturating_add(most).saturating_sub(cache.bytes()))
    }

    /// How many may be left after this many rounds.
    fn left_after(&self, rounds: usize) -> usize {
        let Some(share) = self.keep else { return self.count };
        let rounds = i32::try_from(rounds).unwrap_or(i32::MAX);
        let left = self.count as f64 * share.powi(rounds);
        // What rounding adds to a whole number is not one more candidate.
        ((left - 1e-9).ceil() as usize).clamp(1, self.count.max(1))
    }

    fn are_thoughts(&self) -> bool {
        self.differ == Differ::Thoughts
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rounds_leave_what_the_share_says() {
        let left =
            |candidates: &Candidates| (0..6).map(|round| candidates.left_after(round)).collect();
        let of = |count, share| -> Vec<usize> { left(&Candidates::samples(count).keep(share)) };
        assert_eq!(of(16, 0.5), [16, 8, 4, 2, 1, 1]);
        assert_eq!(of(30, 0.1), [30, 3, 1, 1, 1, 1]);
        assert_eq!(of(5, 0.7), [5, 4, 3, 2, 2, 1]);
        assert_eq!(of(1, 0.5), [1; 6]);
        assert_eq!(left(&Candidates::samples(7).keep_all()), [7; 6]);
        assert_eq!(Candidates::samples(9).keep(0.999).left_after(usize::MAX), 1);
    }
}
