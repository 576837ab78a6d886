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

    /// The same for kernels: each row a sequence, whose positions count from its first key here.
    pub(super) fn spans(&self, batch: usize) -> crate::kernels::Spans {
        let sequences = (0..batch).map(|row| crate::kernels::SequenceSpans {
            queries: row * self.queries()..(row + 1) * self.queries(),
            keys: 0..self.keys,
            from: row * self.keys,
            sees: (0..self.queries()).map(|query| self.sees(row, query)).collect(),
        });
        crate::kernels::Spans { sequences: sequences.collect() }
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

    /// The keys that any of these queries sees: all that attention needs to read for them.
    #[must_use]
    pub fn keys_of(&self, queries: &Range<usize>) -> Range<usize> {
        let spans = self.rows.iter().flat_map(|row| row.get(queries.clone()).unwrap_or(&[]));
        let union =
            spans.cloned().reduce(|all, span| all.start.min(span.start)..all.end.max(span.end));
        union.unwrap_or(0..0)
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
