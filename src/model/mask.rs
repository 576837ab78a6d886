//! Which keys each query may see. The only place that knows.

use std::ops::Range;

use candle_core::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::layout::Layout;

/// How far a query looks ahead of itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Sight {
    /// Not at all: a token sees itself and what came before it.
    Causal,
    /// To the end of its context segment; a plain token not at all.
    #[default]
    Bidirectional,
}

/// Which keys each query sees. Whatever the mask, that is one unbroken run of keys:
///
/// ```text
/// query i sees key j  when  start <= j              (no padding)
///                     and   i - window < j          (sliding window, if any)
///                     and   j <= i                  (causal), or
///                           j in i's segment and j < i + window   (bidirectional)
/// ```
///
/// Slots count from the beginning of the conversation, also when the oldest keys are gone:
///
/// ```text
/// causal, past 2, new 3, window 3  ->  query 2 sees keys 0 1 2
///                                      query 3 sees keys 1 2 3
///                                      query 4 sees keys 2 3 4
/// bidirectional, 4 tokens, window 2 -> 0 sees 0 1; 1 sees 0 1 2; 2 sees 1 2 3; 3 sees 2 3
/// ```
///
/// Padding sees only itself, so that its numbers stay finite; no token ever sees padding.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mask {
    /// Per row of the batch and query, the keys it sees, counted from the first key held. Rows
    /// that are all alike are stored once.
    rows: Vec<Vec<Range<usize>>>,
    keys: usize,
}

/// A mask that is the same for every row and query: the last query stands at the last key, the others
/// at those before it, and each sees so many keys on either side of its own, `None` for all.
#[cfg(any(test, feature = "flash-attn"))]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Band {
    pub(super) behind: Option<usize>,
    pub(super) ahead: Option<usize>,
}

#[cfg(any(test, feature = "flash-attn"))]
impl Band {
    /// What the query at key `at` sees of `keys` keys.
    fn around(&self, at: usize, keys: usize) -> Range<usize> {
        let start = self.behind.map_or(0, |behind| at.saturating_sub(behind));
        start..self.ahead.map_or(keys, |ahead| keys.min(at + ahead + 1))
    }
}

impl Mask {
    /// The mask of the slots `queries` of `layout` over the keys `first_key..queries.end`. A query
    /// always sees itself: its key is held whatever `first_key`, and a window is at least 1.
    ///
    /// `window` is the number of positions a query sees to its left, itself included (Mistral's
    /// `sliding_window`), and, bidirectionally, as many to its right; `None` for no limit.
    #[must_use]
    pub fn new(
        layout: &Layout,
        sight: Sight,
        queries: Range<usize>,
        first_key: usize,
        window: Option<usize>,
    ) -> Self {
        let first_key = first_key.min(queries.start);
        let mut rows: Vec<Vec<Range<usize>>> = Vec::new();
        for (row, start) in layout.starts().into_iter().enumerate() {
            let mut segments = layout.context(row).iter().peekable();
            let spans = queries.clone().map(|query| {
                if query < start {
                    return query - first_key..query + 1 - first_key;
                }
                while segments.next_if(|segment| segment.end <= query).is_some() {}
                let segment_end = match segments.peek() {
                    Some(segment) if sight == Sight::Bidirectional && segment.contains(&query) => {
                        segment.end
                    }
                    _ => query + 1,
                };
                let (oldest, newest) = match window {
                    Some(window) => {
                        let window = window.max(1);
                        ((query + 1).saturating_sub(window), query.saturating_add(window))
                    }
                    None => (0, usize::MAX),
                };
                let from = oldest.max(start).max(first_key);
                let to = segment_end.min(newest).min(queries.end);
                from - first_key..to - first_key
            });
            rows.push(spans.collect());
        }
        if rows.windows(2).all(|pair| pair[0] == pair[1]) {
            rows.truncate(1);
        }
        Self { rows, keys: queries.end.saturating_sub(first_key) }
    }

    /// The mask of all tokens of `layout` as one row, behind each other and without padding.
    ///
    /// ```text
    /// lengths [2, 4], causal  ->  query 0 sees key 0,  1 sees 0 1         (row 0)
    ///                             query 2 sees key 2,  3 sees 2 3  ...    (row 1: from 2 on)
    /// ```
    pub(super) fn packed(layout: &Layout, sight: Sight, window: Option<usize>) -> Self {
        let padded = Self::new(layout, sight, 0..layout.seq(), 0, window);
        let (mut spans, mut first) = (Vec::new(), 0);
        for (row, start) in layout.starts().into_iter().enumerate() {
            // Slot `start` of this row is key `first`.
            spans.extend((start..layout.seq()).map(|query| {
                let sees = padded.sees(row, query);
                sees.start - start + first..sees.end - start + first
            }));
            first += layout.seq() - start;
        }
        Self { rows: vec![spans], keys: first }
    }

    /// The keys that `query` of batch row `row` sees, both counted from the first one here.
    #[must_use]
    pub fn sees(&self, row: usize, query: usize) -> Range<usize> {
        let row = if self.rows.len() == 1 { 0 } else { row };
        self.rows.get(row).and_then(|row| row.get(query)).cloned().unwrap_or(0..0)
    }

    /// Queries per row.
    #[must_use]
    pub fn queries(&self) -> usize {
        self.rows.first().map_or(0, Vec::len)
    }

    /// Whether it is for a batch of so many rows.
    pub(super) fn is_for(&self, batch: usize) -> bool {
        self.rows.len() == batch || self.rows.len() == 1
    }

    /// Keys per row.
    #[must_use]
    pub fn keys(&self) -> usize {
        self.keys
    }

    /// The number of keys that a query sees, at most.
    pub(crate) fn most_seen(&self) -> usize {
        self.rows.iter().flatten().map(Range::len).max().unwrap_or(0)
    }

    /// The keys that any of these queries sees: all that attention needs to read for them.
    #[must_use]
    pub fn keys_of(&self, queries: &Range<usize>) -> Range<usize> {
        let spans = self.rows.iter().flat_map(|row| row.get(queries.clone()).unwrap_or(&[]));
        let union =
            spans.cloned().reduce(|all, span| all.start.min(span.start)..all.end.max(span.end));
        union.unwrap_or(0..0)
    }

    /// The band that it is, if it is one.
    #[cfg(any(test, feature = "flash-attn"))]
    pub(super) fn band(&self) -> Option<Band> {
        let [row] = self.rows.as_slice() else { return None };
        let past = self.keys.checked_sub(row.len())?;
        let placed = || row.iter().enumerate().map(|(query, sees)| (past + query, sees));
        // If any band is this mask, the one that reaches as far as its furthest queries do is.
        let behind = placed().map(|(at, sees)| at.saturating_sub(sees.start)).max()?;
        let ahead = placed().map(|(at, sees)| sees.end.saturating_sub(at + 1)).max()?;
        let band = Band {
            behind: row.iter().any(|sees| sees.start > 0).then_some(behind),
            ahead: row.iter().any(|sees| sees.end < self.keys).then_some(ahead),
        };
        placed().all(|(at, sees)| *sees == band.around(at, self.keys)).then_some(band)
    }

    /// What is added to the scores of `queries` over `keys`, as far as there are any, before their
    /// softmax: `0` where a
    /// query sees a key, `-inf` where it does not; `None` when each of them sees all.
    /// Shape `(batch, 1, queries, keys)`, or `(1, 1, queries, keys)` when all rows are alike.
    ///
    /// # Errors
    /// When the device has no room for it.
    pub fn bias(
        &self,
        queries: &Range<usize>,
        keys: &Range<usize>,
        dtype: DType,
        device: &Device,
    ) -> Result<Option<Tensor>> {
        let queries = queries.start..queries.end.min(self.queries());
        let keys = keys.start..keys.end.min(self.keys);
        let one_row = |row| queries.clone().map(move |query| self.sees(row, query));
        let sees = || (0..self.rows.len()).flat_map(one_row);
        if sees().all(|sees| sees.start <= keys.start && keys.end <= sees.end) {
            return Ok(None);
        }
        let mut bias = Vec::with_capacity(self.rows.len() * queries.len() * keys.len());
        for sees in sees() {
            let seen = |key| if sees.contains(&key) { 0f32 } else { f32::NEG_INFINITY };
            bias.extend(keys.clone().map(seen));
        }
        let shape = (self.rows.len(), 1, queries.len(), keys.len());
        Ok(Some(Tensor::from_vec(bias, shape, device)?.to_dtype(dtype)?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_masks_of_a_prompt_and_of_an_answer_are_bands() -> Result<()> {
        let dense = Layout::dense(2, 8);
        let (causal, both) = (Sight::Causal, Sight::Bidirectional);
        let halves = Layout::dense(1, 8).with_context(0, &[0..4, 4..8])?;
        let question = Layout::dense(1, 8).with_context(0, std::slice::from_ref(&(0..5)))?;
        let padded = Layout::ragged(&[8, 6]);
        let band = |behind, ahead| Some(Band { behind, ahead });
        for (layout, sight, queries, first, window, expected) in [
            (&dense, both, 0..8, 0, None, band(None, None)),
            (&dense, both, 0..8, 0, Some(3), band(Some(2), Some(2))),
            (&dense, both, 0..8, 0, Some(8), band(None, None)),
            (&dense, causal, 0..8, 0, None, band(None, Some(0))),
            (&dense, causal, 5..8, 0, None, band(None, Some(0))), // a chunk
            (&dense, causal, 5..8, 0, Some(4), band(Some(3), Some(0))),
            (&dense, causal, 5..8, 2, Some(4), band(Some(3), Some(0))), // the oldest keys are gone
            (&dense, causal, 7..8, 0, None, band(None, None)),          // a token of the answer
            (&dense, causal, 7..8, 0, Some(4), band(Some(3), None)),
            (&question, causal, 0..8, 0, None, band(None, Some(0))),
            (&question, both, 0..8, 0, None, None),
            (&halves, both, 0..8, 0, None, None),
            (&padded, causal, 0..8, 0, None, None),
            (&padded, causal, 7..8, 0, None, None),
            (&padded, causal, 7..8, 0, Some(6), band(Some(5), None)), // out of sight of the padding
            (&dense, both, 8..8, 0, None, None),
        ] {
            let mask = Mask::new(layout, sight, queries.clone(), first, window);
            let case = format!("{layout:?} {sight:?} {queries:?} {first} {window:?}");
            assert_eq!(mask.band(), expected, "{case}");
        }
        Ok(())
    }

    /// Whether candle's flash attention lets a query see a key: `apply_mask_local` of its `mask.h`.
    fn flash_sees(band: Band, mask: &Mask, query: usize, key: usize) -> bool {
        let (keys, queries) = (mask.keys() as i64, mask.queries() as i64);
        let [left, right] = [band.behind, band.ahead].map(|it| it.map_or(keys, |it| it as i64));
        let at = query as i64 + keys - queries;
        let seen = (at - left).max(0)..keys.min(at + 1 + right);
        seen.contains(&(key as i64))
    }

    fn is(mask: &Mask, batch: usize, band: Band) -> bool {
        let pairs =
            (0..mask.queries()).flat_map(|query| (0..mask.keys()).map(move |key| (query, key)));
        let mut entries = pairs.flat_map(|pair| (0..batch).map(move |row| (row, pair)));
        entries.all(|(row, (query, key))| {
            mask.sees(row, query).contains(&key) == flash_sees(band, mask, query, key)
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(512))]

        /// Nothing else is taken for a band, and no band is missed.
        #[test]
        fn what_is_taken_for_a_band_is_one(
            longest in 1usize..10, shorter in prop::collection::vec(prop_oneof![3 => Just(0), 1 => 1usize..4], 0..3),
            cuts in prop::option::of(prop::collection::vec(0usize..10, 2..5)), bidirectional: bool,
            window in prop::option::of(1usize..12), past in 0usize..10, first in 0usize..10,
        ) {
            let lengths = shorter.iter().map(|by| longest.saturating_sub(*by));
            let mut layout = Layout::ragged(&lengths.chain([longest]).collect::<Vec<_>>());
            if let Some(mut cuts) = cuts {
                cuts.sort_unstable();
                let segments: Vec<_> = cuts.chunks_exact(2).map(|cut| cut[0]..cut[1]).collect();
                for row in 0..layout.batch() {
                    layout = layout.clone().with_context(row, &segments).unwrap_or(layout);
                }
            }
            let sight = if bidirectional { Sight::Bidirectional } else { Sight::Causal };
            let mask = Mask::new(&layout, sight, past.min(longest - 1)..longest, first, window);

            let reaches = || std::iter::once(None).chain((0..longest).map(Some));
            let mut bands = reaches()
                .flat_map(|behind| reaches().map(move |ahead| Band { behind, ahead }));
            match mask.band() {
                Some(band) => prop_assert!(is(&mask, layout.batch(), band), "{band:?}"),
                None => prop_assert!(!bands.any(|band| is(&mask, layout.batch(), band))),
            }
        }
    }
}
