//! When to stop.

use std::fmt;

use serde::Serialize;

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum StopReason {
    /// The model gave an end-of-sequence token.
    Eos,
    /// The model gave one of [`stop_id`](super::GenerationConfig::stop_id)'s tokens.
    StopId,
    /// The text reached one of [`stop`](super::GenerationConfig::stop)'s strings; it ends before it.
    StopString,
    /// [`max_tokens`](super::GenerationConfig::max_tokens) are generated.
    MaxTokens,
    /// The cache, or the model's context, is full.
    Context,
    /// Its statistics came [within](super::Candidates::within) what a key expects.
    Intended,
}

impl fmt::Display for StopReason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Eos => "end of sequence",
            Self::StopId => "stop token",
            Self::StopString => "stop string",
            Self::MaxTokens => "token limit",
            Self::Context => "context full",
            Self::Intended => "intended statistics",
        })
    }
}

/// Holds back text that may turn out to be the beginning of a stop string.
#[derive(Clone, Debug)]
pub(super) struct StopStrings {
    stops: Vec<String>,
    held: String,
}

impl StopStrings {
    pub(super) fn new(stops: Vec<String>) -> Self {
        Self { stops, held: String::new() }
    }

    /// Adds text. Returns what can be shown now, and whether a stop string followed it.
    pub(super) fn push(&mut self, text: &str) -> (String, bool) {
        self.held.push_str(text);
        let met = self.stops.iter().filter_map(|stop| self.held.find(stop.as_str())).min();
        if let Some(at) = met {
            self.held.truncate(at);
            return (std::mem::take(&mut self.held), true);
        }
        let suspicious = |at: &usize| {
            let rest = self.held.get(*at..).unwrap_or("");
            self.stops.iter().any(|stop| stop.starts_with(rest))
        };
        let starts = self.held.char_indices().map(|(at, _)| at);
        let keep_from = starts.into_iter().find(suspicious).unwrap_or(self.held.len());
        let held = self.held.split_off(keep_from);
        (std::mem::replace(&mut self.held, held), false)
    }

    /// The text still held back when the answer ends for another reason.
    pub(super) fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// However the text is cut into pieces, what is shown is the text before the first stop.
        #[test]
        fn pieces_do_not_matter(
            pieces in prop::collection::vec("[abé]{0,4}", 0..12),
            stops in prop::collection::vec("[abé]{1,4}", 0..3),
        ) {
            let whole = pieces.concat();
            let mut strings = StopStrings::new(stops.clone());
            let mut shown = String::new();
            let mut stopped = false;
            for piece in &pieces {
                let (text, met) = strings.push(piece);
                shown.push_str(&text);
                stopped = met;
                if met { break }
            }
            if !stopped {
                shown.push_str(&strings.finish());
            }
            prop_assert_eq!(stopped, stops.iter().any(|stop| whole.contains(stop.as_str())));
            if stopped {
                // Another stop may begin earlier and end later; it is not known yet when one is found.
                prop_assert!(whole.starts_with(&shown));
                prop_assert!(stops.iter().all(|stop| !shown.contains(stop.as_str())));
                prop_assert!(stops.iter().any(|stop| whole[shown.len()..].starts_with(stop.as_str())));
            } else {
                prop_assert_eq!(shown, whole);
            }
        }
    }
}
