//! Mask and softmax of attention scores, in place.

use std::ops::Range;

use candle_core::{CpuStorage, InplaceOp1, Layout, Result};
use pulp::Arch;
use rayon::prelude::*;

use super::LANES;
use super::exp::exp;
use crate::model::mask::Mask;

/// Turns scores `(batch, heads, queries, keys)` into probabilities: each query's softmax over the
/// keys it sees, zero elsewhere. The plain twin adds [`Mask::bias`] and calls candle's softmax.
#[derive(Debug)]
pub(crate) struct MaskedSoftmax<'a> {
    /// Who sees whom.
    pub(crate) mask: &'a Mask,
    /// The queries of the mask that the scores hold.
    pub(crate) queries: Range<usize>,
    /// The keys of the mask that the scores hold.
    pub(crate) keys: Range<usize>,
    /// Heads per row of the batch.
    pub(crate) heads: usize,
}

impl InplaceOp1 for MaskedSoftmax<'_> {
    fn name(&self) -> &'static str {
        "masked-softmax"
    }

    fn cpu_fwd(&self, storage: &mut CpuStorage, layout: &Layout) -> Result<()> {
        let (CpuStorage::F32(scores), true) = (storage, layout.is_contiguous()) else {
            candle_core::bail!("masked-softmax: expected contiguous f32 scores");
        };
        let (keys, queries) = (self.keys.len(), self.queries.len());
        let start = layout.start_offset();
        let Some(scores) = scores.get_mut(start..start + layout.shape().elem_count()) else {
            candle_core::bail!("masked-softmax: scores outside their storage");
        };
        if keys == 0 {
            return Ok(());
        }
        let arch = Arch::new();
        scores.par_chunks_mut(keys).enumerate().for_each(|(index, scores)| {
            // index counts (batch, head, query)
            let row = index / (self.heads * queries);
            let sees = self.mask.sees(row, self.queries.start + index % queries);
            let from = sees.start.saturating_sub(self.keys.start).min(keys);
            let to = sees.end.saturating_sub(self.keys.start).clamp(from, keys);
            scores[..from].fill(0.0);
            scores[to..].fill(0.0);
            arch.dispatch(|| softmax(&mut scores[from..to]));
        });
        Ok(())
    }
}

#[inline(always)]
pub(super) fn softmax(scores: &mut [f32]) {
    let max = largest(scores);
    let mut sums = [0f32; LANES];
    let (chunks, rest) = scores.as_chunks_mut::<LANES>();
    for chunk in chunks {
        for (sum, score) in sums.iter_mut().zip(chunk) {
            *score = exp(*score - max);
            *sum += *score;
        }
    }
    for (sum, score) in sums.iter_mut().zip(rest) {
        *score = exp(*score - max);
        *sum += *score;
    }
    let scale = 1.0 / sums.iter().sum::<f32>();
    for score in scores.iter_mut() {
        *score *= scale;
    }
}

/// The largest score; NaN is passed over, and shows in the sum instead.
#[inline(always)]
fn largest(scores: &[f32]) -> f32 {
    let larger = |max: f32, score: f32| if score > max { score } else { max };
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (chunks, rest) = scores.as_chunks::<LANES>();
    for chunk in chunks {
        for (max, score) in lanes.iter_mut().zip(chunk) {
            *max = larger(*max, *score);
        }
    }
    lanes.iter().chain(rest).copied().fold(f32::NEG_INFINITY, larger)
}
