//! Scale, mask and softmax of attention scores in one pass over memory, in place.

use candle_core::{CpuStorage, InplaceOp1, Layout, Result};
use rayon::prelude::*;

use crate::model::mask::Mask;
use std::ops::Range;

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
        scores.par_chunks_mut(keys).enumerate().for_each(|(index, scores)| {
            // index counts (batch, head, query)
            let row = index / (self.heads * queries);
            let sees = self.mask.sees(row, self.queries.start + index % queries);
            let from = sees.start.saturating_sub(self.keys.start).min(keys);
            let to = sees.end.saturating_sub(self.keys.start).clamp(from, keys);
            scores[..from].fill(0.0);
            scores[to..].fill(0.0);
            softmax(&mut scores[from..to]);
        });
        Ok(())
    }
}

fn softmax(scores: &mut [f32]) {
    let max = scores.iter().fold(f32::NEG_INFINITY, |max, &score| max.max(score));
    let mut sum = 0.0;
    for score in scores.iter_mut() {
        *score = (*score - max).exp();
        sum += *score;
    }
    let scale = 1.0 / sum;
    for score in scores.iter_mut() {
        *score *= scale;
    }
}
