//! Where an adapter is active.

use serde::{Deserialize, Serialize};

/// When an adapter is active.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum AdapterScope {
    /// In thought passes, in the last run over the thoughts that `KeyValue` and `Mixed` hand off, and
    /// when a text is read in both directions to be embedded.
    Thinking,
    /// Whenever text is read causally: what comes before the span, the hand-off, every new token.
    Decoding,
    /// Always.
    #[default]
    Both,
}
