//! Which keys each query may see. Nothing else decides this.

use std::ops::Range;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use crate::batch::Batch;
use crate::error::{Error, Result};
use crate::kernels::{SequenceSpans, Spans};

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

/// Which keys each query sees. Whatever the mask, that is one unbroken run of keys of its own sequence:
///
/// ```text
/// query i sees key j  when  i - window < j          (sliding window, if any)
///                     and   j <= i                  (causal), or
///                           j in i's segment and j < i + window   (bidirectional)
/// ```
///
/// Positions count from the beginning of the sequence, even when the oldest keys are gone:
///
/// ```text
/// causal, past 2, new 3, window 3  ->  query 2 sees keys 0 1 2
///                                      query 3 sees keys 1 2 3
///                                      query 4 sees keys 2 3 4
/// bidirectional, 4 tokens, window 2 -> 0 sees 0 1; 1 sees 0 1 2; 2 sees 1 2 3; 3 sees 2 3
/// ```
///
/// ```
/// use hybrid_attention::model::{Batch, Mask, Sight};
///
/// let mask = Mask::new(&Batch::ragged(&[2, 4])?, Sight::Causal, Some(3))?;
/// assert_eq!((mask.sees(0, 1), mask.sees(1, 3)), (0..2, 1..4));
/// # Ok::<_, hybrid_attention::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mask {
    spans: Arc<Spans>,
}

impl Mask {
    /// The mask of sequences that run by themselves: their keys are those of the pass.
    ///
    /// `window` is the number of positions a query sees to its left, itself included (Mistral's
    /// `sliding_window`), and, bidirectionally, as many to its right; `None` for no limit. At least 1:
    /// a query always sees itself.
    ///
    /// # Errors
    /// [`Error::Parameter`] for more tokens than memory holds.
    pub fn new(batch: &Batch, sight: Sight, window: Option<usize>) -> Result<Self> {
        let oldest: Vec<usize> = (0..batch.sequences()).map(|index| batch.first(index)).collect();
        Self::with_past(batch, sight, window, &oldest)
    }

    /// The mask of sequences that continue: keys of each are there from its position in `oldest` on.
    /// Where `oldest` has no entry, they begin where the sequence begins in this pass.
    ///
    /// # Errors
    /// As [`Mask::new`].
    pub fn with_past(
        batch: &Batch,
        sight: Sight,
        window: Option<usize>,
        oldest: &[usize],
    ) -> Result<Self> {
        let (mut sequences, mut from) = (Vec::with_capacity(batch.sequences()), 0);
        for (index, queries) in batch.all_rows().enumerate() {
            let first = batch.first(index);
            let oldest = oldest.get(index).map_or(first, |oldest| first.min(*oldest));
            let keys = oldest..first + queries.len();
            let sees = spans(batch.context(index), sight, window, first, &keys)?;
            let held = keys.len();
            sequences.push(SequenceSpans { queries, keys, from, sees });
            from += held;
        }
        Ok(Self { spans: Arc::new(Spans { sequences, one_by_one: false }) })
    }

    /// The same, with every query rounded as if it came alone.
    pub(super) fn one_by_one(&self) -> Self {
        let sequences = self.spans.sequences.clone();
        Self { spans: Arc::new(Spans { sequences, one_by_one: true }) }
    }

    /// The positions that a query of a sequence sees; an empty range for a query or sequence that does
    /// not exist.
    #[must_use]
    pub fn sees(&self, sequence: usize, query: usize) -> Range<usize> {
        let this = self.spans.sequences.get(sequence);
        this.and_then(|this| this.sees.get(query)).cloned().unwrap_or(0..0)
    }

    /// The positions of a sequence whose keys are present.
    #[must_use]
    pub fn keys(&self, sequence: usize) -> Range<usize> {
        self.spans.sequences.get(sequence).map_or(0..0, |this| this.keys.clone())
    }

    /// Queries of all sequences together.
    #[must_use]
    pub fn queries(&self) -> usize {
        self.spans.queries()
    }

    /// Sequences.
    #[must_use]
    pub fn sequences(&self) -> usize {
        self.spans.sequences.len()
    }

    pub(crate) fn spans(&self) -> &Arc<Spans> {
        &self.spans
    }
}

/// What each query of one sequence sees, over `keys`: the queries begin at position `first`.
fn spans(
    context: &[Range<usize>],
    sight: Sight,
    window: Option<usize>,
    first: usize,
    keys: &Range<usize>,
) -> Result<Vec<Range<usize>>> {
    let mut sees = Vec::new();
    if sees.try_reserve_exact(keys.end - first).is_err() {
        let got = format!("{} tokens", keys.end - first);
        return Err(Error::parameter("batch", "as many tokens as memory holds", got));
    }
    let mut segments = context.iter().map(|run| first + run.start..first + run.end).peekable();
    let window = window.map(|window| window.max(1));
    let span = |query: usize| {
        while segments.next_if(|segment| segment.end <= query).is_some() {}
        let end = match segments.peek() {
            Some(segment) if sight == Sight::Bidirectional && segment.contains(&query) => {
                segment.end
            }
            _ => query + 1,
        };
        let (oldest, newest) = match window {
            Some(window) => ((query + 1).saturating_sub(window), query.saturating_add(window)),
            None => (0, usize::MAX),
        };
        oldest.max(keys.start)..end.min(newest)
    };
    sees.extend((first..keys.end).map(span));
    Ok(sees)
}
