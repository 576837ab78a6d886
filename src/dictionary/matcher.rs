//! Which rows stand in a headword.

use std::cmp::Reverse;
use std::fmt;

use aho_corasick::{AhoCorasick, AhoCorasickKind};

use super::forms::{BEGINS_INSIDE, ENDS_INSIDE};
use crate::error::{Error, Result};
use crate::model::Seen;

/// Bytes of a token in the automaton.
const WIDTH: usize = size_of::<u32>();

/// Finds headwords by their tokens, all at once: an Aho-Corasick automaton over bytes, of which a token is the four of
/// its id. All ids have as many, and so what is found at a multiple of four is found in tokens; what begins elsewhere
/// is no match.
///
/// ```text
/// a row has the entry of the longest headword that it stands in
///     whose tokens it all sees
///     before whose first token a word may begin, and behind whose last, if the row sees that far, one may end
/// of several as long, that of the first
/// ```
pub(super) struct Matcher {
    automaton: AhoCorasick,
    /// The entry of each form.
    entries: Vec<u32>,
    /// The most tokens of a form.
    longest: usize,
    /// By token: see [`borders`](super::forms::borders).
    borders: Vec<u32>,
}

impl fmt::Debug for Matcher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { entries, longest, .. } = self;
        f.debug_struct("Matcher").field("forms", &entries.len()).field("longest", longest).finish()
    }
}

impl Matcher {
    /// Of forms, each with its entry; no two are equal and none is empty.
    pub(super) fn new<'a>(
        forms: impl Iterator<Item = (&'a [u32], u32)>,
        borders: Vec<u32>,
    ) -> Result<Self> {
        let (mut patterns, mut entries, mut longest) = (Vec::new(), Vec::new(), 0);
        for (form, entry) in forms {
            longest = longest.max(form.len());
            patterns.push(bytes(form));
            entries.push(entry);
        }
        // No other kind takes so little memory for many patterns. Where a mismatch leads back to, the last byte of a
        // first token, hundreds of bytes may follow: in a list they would be gone through for every state.
        let kind = Some(AhoCorasickKind::ContiguousNFA);
        let automaton =
            AhoCorasick::builder().kind(kind).dense_depth(4).prefilter(false).build(&patterns);
        let automaton = automaton
            .map_err(|error| Error::parameter("entries", "as many as an automaton holds", error))?;
        Ok(Self { automaton, entries, longest, borders })
    }

    /// The entry of each row.
    pub(super) fn entries(&self, seen: &Seen<'_>) -> Vec<Option<u32>> {
        let (ids, rows) = (seen.ids(), seen.rows());
        let sees: Vec<usize> = seen.sees().collect();
        // The longest headword that has a token among the rows begins here at the earliest.
        let from = rows.start.saturating_sub(self.longest.saturating_sub(1));
        let text = bytes(ids.get(from..).unwrap_or(&[]));
        let mut best: Vec<Option<(usize, Reverse<usize>, u32)>> = vec![None; rows.len()];
        for found in self.automaton.find_overlapping_iter(&text) {
            let (start, end) = (from + found.start() / WIDTH, from + found.end() / WIDTH);
            let first_row = start.max(rows.start);
            if found.start() % WIDTH != 0 || end <= first_row {
                continue;
            }
            if start > 0 && self.goes_on(ids, start) {
                continue;
            }
            let Some(entry) = self.entries.get(found.pattern().as_usize()) else { continue };
            let whole = !self.goes_on(ids, end);
            let candidate = (end - start, Reverse(start), *entry);
            let covered = first_row - rows.start..end - rows.start;
            let these = best.get_mut(covered.clone()).into_iter().flatten();
            for (best, sees) in these.zip(sees.get(covered).unwrap_or(&[])) {
                if *sees >= end && (whole || *sees == end) && Some(candidate) > *best {
                    *best = Some(candidate);
                }
            }
        }
        best.into_iter().map(|best| best.map(|(.., entry)| entry)).collect()
    }

    /// Whether the token at this place goes on with the word before it.
    fn goes_on(&self, ids: &[u32], at: usize) -> bool {
        let has = |at: usize, border: u32| {
            let id = ids.get(at).and_then(|id| usize::try_from(*id).ok());
            id.and_then(|id| self.borders.get(id)).is_some_and(|it| it & border != 0)
        };
        at > 0 && has(at - 1, ENDS_INSIDE) && has(at, BEGINS_INSIDE)
    }
}

fn bytes(ids: &[u32]) -> Vec<u8> {
    ids.iter().flat_map(|id| id.to_be_bytes()).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proptest::prelude::*;

    use super::*;

    /// The same by the words of the documentation, for one row after the other.
    fn reference(
        forms: &BTreeMap<Vec<u32>, u32>,
        borders: &[u32],
        ids: &[u32],
        row: usize,
        sees: usize,
    ) -> Option<u32> {
        let inside = |at: usize, border: u32| borders[ids[at] as usize] & border != 0;
        let cuts = |at: usize| {
            at > 0 && at < ids.len() && inside(at - 1, ENDS_INSIDE) && inside(at, BEGINS_INSIDE)
        };
        let mut best: Option<(usize, u32)> = None;
        for start in 0..=row {
            for end in row + 1..=sees {
                let Some(entry) = forms.get(&ids[start..end]) else { continue };
                let right = end < sees && cuts(end);
                let longer = best.is_none_or(|(length, _)| end - start > length);
                if !cuts(start) && !right && longer {
                    best = Some((end - start, *entry));
                }
            }
        }
        best.map(|(_, entry)| entry)
    }

    /// Ids whose bytes repeat each other, so that many are found between tokens.
    fn id(small: u32) -> u32 {
        [0, 1, 256, 257, 65_536, 65_793][small as usize % 6]
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(512))]

        #[test]
        fn rows_have_the_longest_headword_that_they_see(
            forms in prop::collection::vec((prop::collection::vec(0u32..6, 1..5), 0u32..9), 0..12),
            borders in prop::collection::vec(0u32..4, 6),
            text in prop::collection::vec(0u32..6, 1..24),
            past in 0usize..12,
            cuts in prop::collection::vec(0usize..24, 0..5),
            causal: bool,
        ) {
            let mut all = vec![0; 65_794];
            for (small, border) in (0..).zip(&borders) {
                all[id(small) as usize] = *border;
            }
            let spell = |of: &Vec<u32>| of.iter().map(|it| id(*it)).collect::<Vec<_>>();
            let forms: BTreeMap<Vec<u32>, u32> =
                forms.iter().map(|(form, entry)| (spell(form), *entry)).collect();
            let ids = spell(&text);
            let past = past.min(ids.len());
            let mut cuts: Vec<usize> = cuts.into_iter().filter(|cut| past + cut <= ids.len()).collect();
            cuts.sort_unstable();
            cuts.dedup();
            let segments: Vec<_> =
                cuts.windows(2).map(|cut| cut[0]..cut[1]).take(if causal { 0 } else { 9 }).collect();
            let seen = Seen::new(&ids, past, &segments);

            let of_forms = forms.iter().map(|(form, entry)| (form.as_slice(), *entry));
            let matcher = Matcher::new(of_forms, all.clone()).map_err(|it| TestCaseError::fail(it.to_string()))?;
            let got = matcher.entries(&seen);
            for (row, got) in (past..ids.len()).zip(&got) {
                let segment = segments.iter().find(|it| it.contains(&(row - past)));
                let sees = segment.map_or(row + 1, |segment| past + segment.end);
                prop_assert_eq!(*got, reference(&forms, &all, &ids, row, sees), "row {}", row);
            }
            prop_assert_eq!(got.len(), ids.len() - past);
        }
    }
}
