//! candle's flash attention (Dao 2023), for CUDA devices and behind the feature `flash-attn`: scores are
//! never held in memory. It is used only where it computes exactly what the mask says.

use std::ops::Range;

use candle_core::{DType, Tensor};

use super::SequenceSpans;
#[cfg(feature = "flash-attn")]
use super::Spans;
#[cfg(feature = "flash-attn")]
use crate::error::Result;

/// [`attend`](crate::kernels::attend) of queries, keys and values, packed, that fit each other and the
/// spans; `None` where the kernel cannot express it.
#[cfg(feature = "flash-attn")]
pub(in crate::kernels) fn attend(
    inputs: [&Tensor; 3],
    spans: &Spans,
    scale: f32,
) -> Result<Option<Tensor>> {
    let [q, ..] = inputs;
    let fit = |xs: &Tensor| xs.device().is_cuda() && xs.dtype() == q.dtype() && reads(xs);
    if !inputs.into_iter().all(fit) {
        return Ok(None);
    }
    let [sequence] = spans.sequences.as_slice() else { return Ok(None) };
    let Some(band) = Band::of(sequence) else { return Ok(None) };
    let (heads, queries, head_dim) = q.dims3()?;
    // It reads (batch, seq, heads, head_dim), in any order in memory.
    let [q, k, v] = inputs.map(|xs| xs.unsqueeze(0)?.transpose(1, 2));
    let (behind, ahead) = (band.behind, band.ahead);
    let ys = candle_flash_attn::flash_attn_windowed(&q?, &k?, &v?, scale, behind, ahead)?;
    Ok(Some(ys.reshape((queries, heads * head_dim))?))
}

/// Spans of the same shape for every query: the last query is at the last key, the others at those
/// before it, and each sees so many keys on either side of its own, or all for `None`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Band {
    behind: Option<usize>,
    ahead: Option<usize>,
}

impl Band {
    /// The band that describes a sequence's spans, if one does.
    fn of(spans: &SequenceSpans) -> Option<Self> {
        let keys = spans.keys.len();
        let past = keys.checked_sub(spans.sees.len())?;
        let first = spans.keys.start;
        let sees = || spans.sees.iter().map(|it| it.start - first..it.end - first);
        let placed = || sees().enumerate().map(|(query, sees)| (past + query, sees));
        // If any band describes these spans, it is the one that reaches as far as the widest query.
        let behind = placed().map(|(at, sees)| at.saturating_sub(sees.start)).max()?;
        let ahead = placed().map(|(at, sees)| sees.end.saturating_sub(at + 1)).max()?;
        let band = Self {
            behind: sees().any(|sees| sees.start > 0).then_some(behind),
            ahead: sees().any(|sees| sees.end < keys).then_some(ahead),
        };
        placed().all(|(at, sees)| sees == band.around(at, keys)).then_some(band)
    }

    /// What a query at key `at` sees of `keys` keys.
    fn around(&self, at: usize, keys: usize) -> Range<usize> {
        let start = self.behind.map_or(0, |behind| at.saturating_sub(behind));
        start..self.ahead.map_or(keys, |ahead| keys.min(at + ahead + 1))
    }
}

/// Numbers that the kernel loads at once, in 16 bytes.
const AT_ONCE: usize = 8;

/// The longest heads that the kernel supports.
const LONGEST_HEAD: usize = 512;

/// Whether the kernel can read `xs`, `(heads, queries, head_dim)`: it takes heads of 16-bit numbers,
/// each contiguous and aligned to 16 bytes. It does not check this in full, and gives no gradient.
fn reads(xs: &Tensor) -> bool {
    let layout = xs.layout();
    let (Some(head_dim), Some((step, strides))) =
        (layout.dims().last(), layout.stride().split_last())
    else {
        return false;
    };
    let aligned = |offset: &usize| offset.is_multiple_of(AT_ONCE);
    matches!(xs.dtype(), DType::F16 | DType::BF16)
        && !xs.track_op()
        && (1..=LONGEST_HEAD).contains(head_dim)
        && *step == 1
        && strides.iter().chain([head_dim, &layout.start_offset()]).all(aligned)
}

#[cfg(test)]
mod tests {
    use super::super::Spans;
    use super::super::spans::Case;
    use super::*;
    use crate::error::Result;
    use candle_core::{Device, Var};
    use proptest::prelude::*;

    fn sequence(case: Case) -> Result<SequenceSpans> {
        Ok(Spans::of(&[case]).sequence(0)?.clone())
    }

    #[test]
    fn the_kernel_is_given_what_it_can_read() -> Result<()> {
        let zeros = |dtype, dims: [usize; 3]| Tensor::zeros(&dims, dtype, &Device::Cpu);
        let heads = zeros(DType::BF16, [3, 40, 24])?;
        for readable in [
            heads.clone(),
            zeros(DType::F16, [1, 1, 512])?,
            heads.narrow(1, 5, 7)?,                      // of a cache
            heads.transpose(0, 1)?,                      // not yet heads by heads
            heads.narrow(2, 8, 16)?, // a part that begins at a multiple of 16 bytes
            heads.narrow(0, 0, 1)?.expand((4, 40, 24))?, // one for many
        ] {
            assert!(reads(&readable), "{:?}", readable.layout());
        }
        for unreadable in [
            zeros(DType::F32, [3, 40, 24])?,
            zeros(DType::F16, [1, 4, 20])?,
            zeros(DType::F16, [1, 4, 520])?,
            zeros(DType::F16, [1, 4, 0])?,
            heads.transpose(1, 2)?,
            heads.narrow(2, 4, 8)?,
            zeros(DType::F16, [2, 4, 20])?.narrow(2, 0, 16)?,
            Var::from_tensor(&heads)?.as_tensor().clone(),
        ] {
            assert!(!reads(&unreadable), "{:?}", unreadable.layout());
        }
        Ok(())
    }

    #[test]
    fn the_spans_of_a_prompt_and_of_an_answer_are_bands() -> Result<()> {
        let [causal, both, question] = [vec![], vec![0..8], vec![0..5]];
        let halves = vec![0..4, 4..8];
        let band = |behind, ahead| Some(Band { behind, ahead });
        for (segments, queries, held_from, window, expected) in [
            (&both, 0..8, 0, None, band(None, None)),
            (&both, 0..8, 0, Some(3), band(Some(2), Some(2))),
            (&both, 0..8, 0, Some(8), band(None, None)),
            (&causal, 0..8, 0, None, band(None, Some(0))),
            (&causal, 5..8, 0, None, band(None, Some(0))), // a chunk
            (&causal, 5..8, 0, Some(4), band(Some(3), Some(0))),
            (&causal, 5..8, 2, Some(4), band(Some(3), Some(0))), // the oldest keys are gone
            (&causal, 7..8, 0, None, band(None, None)),          // a token of the answer
            (&causal, 7..8, 0, Some(4), band(Some(3), None)),
            (&question, 0..8, 0, None, None),
            (&halves, 0..8, 0, None, None),
            (&both, 8..8, 0, None, None),
        ] {
            let (past, new) = (queries.start, queries.len());
            let case = Case { held_from, past, new, segments: segments.clone(), window };
            assert_eq!(Band::of(&sequence(case.clone())?), expected, "{case:?}");
        }
        Ok(())
    }

    /// Whether candle's flash attention lets a query see a key: `apply_mask_local` of its `mask.h`.
    fn flash_sees(band: Band, spans: &SequenceSpans, query: usize, key: usize) -> bool {
        let (keys, queries) = (spans.keys.len() as i64, spans.sees.len() as i64);
        let [left, right] = [band.behind, band.ahead].map(|it| it.map_or(keys, |it| it as i64));
        let at = query as i64 + keys - queries;
        let seen = (at - left).max(0)..keys.min(at + 1 + right);
        seen.contains(&(key as i64))
    }

    fn is(spans: &SequenceSpans, band: Band) -> bool {
        spans.sees.iter().enumerate().all(|(query, sees)| {
            (0..spans.keys.len()).all(|key| {
                sees.contains(&(key + spans.keys.start)) == flash_sees(band, spans, query, key)
            })
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(512))]

        /// Nothing else is taken for a band, and no band is missed.
        #[test]
        fn what_is_taken_for_a_band_is_one(
            total in 1usize..10, past in 0usize..10, held_from in 0usize..10,
            cuts in prop::option::of(prop::collection::vec(0usize..10, 2..5)),
            bidirectional: bool, window in prop::option::of(1usize..12),
        ) {
            let past = past.min(total - 1);
            let held_from = held_from.min(past);
            let segments = match cuts {
                Some(mut cuts) => {
                    cuts.sort_unstable();
                    cuts.chunks_exact(2).map(|cut| cut[0]..cut[1]).collect()
                }
                None if bidirectional => vec![0..total],
                None => vec![],
            };
            let case = Case { held_from, past, new: total - past, segments, window };
            let spans = sequence(case).map_err(|error| TestCaseError::fail(error.to_string()))?;
            let reaches = || std::iter::once(None).chain((0..total).map(Some));
            let mut bands = reaches()
                .flat_map(|behind| reaches().map(move |ahead| Band { behind, ahead }));
            match Band::of(&spans) {
                Some(band) => prop_assert!(is(&spans, band), "{band:?}"),
                None => prop_assert!(!bands.any(|band| is(&spans, band))),
            }
        }
    }
}
