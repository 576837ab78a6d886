//! Log-probabilities of next tokens, and what is computed from them. Those of a whole text are never in
//! memory at once: a vocabulary is large.

use std::ops::Range;

use candle_core::{D, Tensor};

use crate::error::Result;
use crate::kernels::log_softmax;

/// Positions whose logits are in memory at a time.
const AT_ONCE: usize = 64;

/// `0..rows` in runs that are short enough to have their logits in memory.
pub(crate) fn runs(rows: usize) -> impl Iterator<Item = Range<usize>> {
    (0..rows).step_by(AT_ONCE).map(move |start| start..rows.min(start + AT_ONCE))
}

/// The log-probability of each row's target: logits `(rows, vocab)` to `(rows)`, in `f32`.
/// Differentiable.
pub(crate) fn of_targets(logits: &Tensor, targets: &[u32]) -> Result<Tensor> {
    let targets = Tensor::new(targets, logits.device())?.unsqueeze(D::Minus1)?; // (rows, 1)
    Ok(log_softmax(logits)?.gather(&targets, D::Minus1)?.squeeze(D::Minus1)?)
}

/// The entropy of each row of log-probabilities, in nats: `(rows, vocab)` to `(rows)`.
pub(crate) fn entropy(logprobs: &Tensor) -> Result<Tensor> {
    Ok((logprobs.exp()? * logprobs)?.sum(D::Minus1)?.neg()?)
}

/// The Kullback-Leibler divergence `Σ before · ln(before / after)` of each row of log-probabilities, in
/// nats: `(rows, vocab)` twice to `(rows)`.
pub(crate) fn divergence(before: &Tensor, after: &Tensor) -> Result<Tensor> {
    Ok((before.exp()? * (before - after)?)?.sum(D::Minus1)?)
}
