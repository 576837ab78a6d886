//! Who sees whom in a pass, as numbers: what attention kernels work from.

use std::ops::Range;

use crate::error::{Error, Result};

/// For every query of a pass, the one unbroken run of keys that it sees. Queries of several sequences
/// lie one after the other, and so do keys, unless they lie in blocks; no sequence sees another.
///
/// ```text
/// two sequences that go on:   a has positions 0..5 in its cache, and 2 new ones; b is new, with 3
///
/// packed queries       0 1 2 3 4            a: queries 0..2, keys (positions) 0..7, from 0
/// positions            5 6 0 1 2            b: queries 2..5, keys (positions) 0..3, from 7
///
/// causal, no window    query 0 sees 0..6, query 1 sees 0..7, query 2 sees 0..1, 3 sees 0..2, 4 sees 0..3
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Spans {
    /// In the order of the queries, which they cover completely.
    pub(crate) sequences: Vec<SequenceSpans>,
    /// Whether each query is rounded as if it came alone, however many of its sequence come with it.
    pub(crate) one_by_one: bool,
}

/// One sequence of a pass.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct SequenceSpans {
    /// Its rows among the packed queries.
    pub(crate) queries: Range<usize>,
    /// The positions whose keys are present.
    pub(crate) keys: Range<usize>,
    /// Where they begin among packed keys: the key of position `p` is packed key `from + p - keys.start`.
    pub(crate) from: usize,
    /// For each query, the positions that it sees, within `keys`; never empty.
    pub(crate) sees: Vec<Range<usize>>,
}

impl Spans {
    /// Packed queries of all sequences.
    pub(crate) fn queries(&self) -> usize {
        self.sequences.last().map_or(0, |last| last.queries.end)
    }

    /// Packed keys of all sequences.
    pub(crate) fn keys(&self) -> usize {
        self.sequences.last().map_or(0, |last| last.from + last.keys.len())
    }
}

impl Spans {
    pub(super) fn sequence(&self, number: usize) -> Result<&SequenceSpans> {
        let missing = || {
            let expected = format!("less than {}", self.sequences.len());
            Error::parameter("sequence", expected, number)
        };
        self.sequences.get(number).ok_or_else(missing)
    }

    /// For each packed query the packed keys that it sees.
    pub(super) fn packed(&self) -> impl Iterator<Item = Range<usize>> {
        self.sequences.iter().flat_map(|it| it.sees.iter().map(|sees| it.packed(sees)))
    }

    /// Whether sequences follow each other without a gap and each query sees some of its own keys.
    pub(super) fn are_consistent(&self) -> bool {
        let (mut query, mut key) = (0, 0);
        self.sequences.iter().all(|it| {
            let follows = (it.queries.start, it.from) == (query, key);
            let within = |sees: &Range<usize>| {
                it.keys.start <= sees.start && sees.start < sees.end && sees.end <= it.keys.end
            };
            (query, key) = (it.queries.end, it.from + it.keys.len());
            follows && it.queries.len() == it.sees.len() && it.sees.iter().all(within)
        })
    }
}

impl SequenceSpans {
    /// Positions as packed keys.
    pub(super) fn packed(&self, positions: &Range<usize>) -> Range<usize> {
        let at = |position| self.from + position - self.keys.start;
        at(positions.start)..at(positions.end)
    }
}

/// A sequence of tests: what came before, what is new, and which rule holds.
#[cfg(test)]
#[derive(Clone, Debug, Default)]
pub(super) struct Case {
    /// The first position whose key is still held.
    pub(super) held_from: usize,
    pub(super) past: usize,
    pub(super) new: usize,
    /// Positions that see each other in both directions; others see what came before them.
    pub(super) segments: Vec<Range<usize>>,
    /// How many positions a query sees behind it, itself included, and as many ahead.
    pub(super) window: Option<usize>,
}

#[cfg(test)]
impl Case {
    fn sees(&self, query: usize) -> Range<usize> {
        let window = self.window.unwrap_or(usize::MAX).max(1);
        let segment = self.segments.iter().find(|it| it.contains(&query));
        let end = segment.map_or(query + 1, |it| it.end).min(query.saturating_add(window));
        let start = (query + 1).saturating_sub(window).max(self.held_from);
        start..end.min(self.past + self.new)
    }
}

#[cfg(test)]
impl Spans {
    pub(super) fn of(cases: &[Case]) -> Self {
        let mut spans = Self::default();
        for case in cases {
            let (first, total) = (spans.queries(), case.past + case.new);
            let keys = case.held_from..total;
            spans.sequences.push(SequenceSpans {
                queries: first..first + case.new,
                from: spans.keys(),
                keys,
                sees: (case.past..total).map(|query| case.sees(query)).collect(),
            });
        }
        spans
    }
}
