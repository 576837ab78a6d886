//! Several ways to choose among the same candidates, which are written only once.
//!
//! A stub has the same tokens whatever becomes of the others, so that what would have been dropped when can be told from
//! a record of all of them, written to their ends. That each way then ends in the same answer after the same number of
//! tokens is checked wherever it is also timed.

use std::cmp::Ordering;

use hybrid_attention::generate::{Candidates, Score, Stub};
use hybrid_attention::{GenerationConfig, HybridModel, Prompt};

use crate::Result;

/// Candidates after each token, all of them kept. What is dropped is found here by itself, not by the library, and so
/// checks it.
pub(crate) struct History(Vec<Vec<Stub>>);

/// A way to choose among the first of them.
#[derive(Clone, Copy)]
pub(crate) struct Choice {
    pub(crate) count: usize,
    /// Whether half of them are dropped every so many tokens.
    pub(crate) halve: Option<usize>,
    pub(crate) score: Score,
}

impl Choice {
    /// The same for the library.
    pub(crate) fn of(self, candidates: Candidates) -> Candidates {
        match self.halve {
            Some(every) => candidates.every(every).score(self.score),
            None => candidates.keep_all().score(self.score),
        }
    }
}

impl History {
    /// With a config whose candidates are all kept and judged after each token.
    pub(crate) fn record(
        model: &HybridModel,
        prompt: Prompt,
        config: &GenerationConfig,
    ) -> Result<Self> {
        let mut history = Vec::new();
        let stream = model.stream(prompt, config)?;
        stream.on_candidates(|stubs| history.push(stubs.to_vec())).collect_answer()?;
        Ok(Self(history))
    }

    /// The text that is chosen, and how many tokens are written until it is.
    pub(crate) fn replay(&self, choice: Choice, max_tokens: usize) -> Result<(String, usize)> {
        let Choice { count, halve, score } = choice;
        let mut left: Vec<usize> = (0..count).collect();
        let mut dropped = 0;
        for (stubs, tokens) in self.0.iter().zip(1..) {
            if left.len() == 1 {
                break;
            }
            let mut drop = |keep: &[usize], left: &mut Vec<usize>| {
                let out = left.iter().filter(|index| !keep.contains(index));
                dropped += out.map(|index| stubs[*index].ids.len()).sum::<usize>();
                left.retain(|index| keep.contains(index));
            };
            let hopeful = hopeful(&ranked(stubs, &left, score), score, max_tokens);
            drop(&hopeful, &mut left);
            let ended = left.iter().all(|index| stubs[*index].stop.is_some());
            if left.len() == 1 || ended {
                break;
            }
            if let Some(every) = halve.filter(|every| tokens % every == 0) {
                let most = (count as f64 * 0.5f64.powi(tokens as i32 / every as i32)).ceil();
                let ranked = ranked(stubs, &left, score);
                let best: Vec<usize> =
                    ranked.iter().take(most as usize).map(|(stub, _)| stub.index).collect();
                drop(&best, &mut left);
            }
        }
        let last = self.0.last().ok_or("no candidates")?;
        let best = ranked(last, &left, score).first().map(|(stub, _)| *stub);
        let written = dropped + left.iter().map(|index| last[*index].ids.len()).sum::<usize>();
        Ok((best.ok_or("none is left")?.text.clone(), written))
    }
}

/// Those that are left, the best first, with their scores.
fn ranked<'s>(stubs: &'s [Stub], left: &[usize], score: Score) -> Vec<(&'s Stub, f64)> {
    let stubs: Vec<&Stub> = left.iter().map(|index| &stubs[*index]).collect();
    let scores = score.of(&stubs);
    let means = Score::MeanLogprob.of(&stubs);
    let mut ranked: Vec<_> = stubs.into_iter().zip(scores).zip(means).collect();
    let better = |((a, of_a), mean_a): &((&Stub, f64), f64),
                  ((b, of_b), mean_b): &((&Stub, f64), f64)|
     -> Ordering {
        of_b.total_cmp(of_a).then(mean_b.total_cmp(mean_a)).then(a.index.cmp(&b.index))
    };
    ranked.sort_by(better);
    ranked.into_iter().map(|(stub, _)| stub).collect()
}

/// Those that could still become better than the best that has ended.
fn hopeful(ranked: &[(&Stub, f64)], score: Score, max_tokens: usize) -> Vec<usize> {
    let best = ranked.iter().find(|(stub, _)| stub.stop.is_some()).map(|(_, score)| *score);
    let can_win = |stub: &Stub| {
        let bound = score.bound(stub, max_tokens).filter(|_| stub.stop.is_none());
        bound.zip(best).is_none_or(|(bound, best)| bound + 1e-9 * bound.abs() >= best)
    };
    ranked.iter().filter(|(stub, _)| can_win(stub)).map(|(stub, _)| stub.index).collect()
}
