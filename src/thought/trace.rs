//! What a run of the thought loop leaves for inspection.

use serde::{Deserialize, Serialize};

/// How much a [`Trace`] holds. More costs more, but never changes the thoughts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Detail {
    /// Drift and seconds of each pass.
    #[default]
    Drift,
    /// Numbers for every token too: [`TokenTrace`]. Costs a causal reading of all thoughts, including
    /// the vocabulary head, for each pass.
    Tokens,
    /// Similarity and attention too: [`Maps`]. Costs running each pass again, and memory that grows with
    /// the square of the text's length.
    Maps,
}

/// Why the thought loop ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Halted {
    /// All passes were run.
    Cap,
    /// [`Halt::Drift`](super::Halt::Drift) was met.
    Drift,
    /// [`Halt::Cosine`](super::Halt::Cosine) was met.
    Cosine,
    /// [`Halt::Kl`](super::Halt::Kl) was met.
    Kl,
}

/// What one run of the thought loop did, pass by pass.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Trace {
    /// Tokens of the longest sequence that was thought about.
    pub tokens: usize,
    /// Why each sequence stopped thinking; empty when there were no passes.
    pub halted: Vec<Halted>,
    /// The first thoughts, before any pass; if [`Detail`] asks for them.
    pub first: Option<TokenTrace>,
    /// One for each pass that was run.
    pub passes: Vec<PassTrace>,
}

impl Trace {
    /// The drift of each pass.
    #[must_use]
    pub fn drift(&self) -> Vec<f64> {
        self.passes.iter().map(|pass| pass.drift).collect()
    }
}

/// What one pass did.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct PassTrace {
    /// The relative change of the thoughts, `‖z' - z‖ / ‖z‖`, averaged over the tokens of the sequences
    /// that were still thinking. Under about 0.03 further passes change little.
    pub drift: f64,
    /// The time of the pass and its refinement, in seconds, without that of making this trace.
    pub seconds: f64,
    /// The thoughts after it, token by token; if [`Detail`] asks for them.
    pub tokens: Option<TokenTrace>,
    /// Which thoughts were alike, and which saw which; if [`Detail`] asks for them.
    pub maps: Option<Maps>,
}

/// Thoughts as numbers: for each sequence, one for each token.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct TokenTrace {
    /// Cosine to the token's first thought, in `[-1, 1]`.
    pub cosine: Vec<Vec<f32>>,
    /// Length of the thought.
    pub norm: Vec<Vec<f32>>,
    /// Entropy of the next-token distribution when the thoughts are read causally, in nats.
    pub entropy: Vec<Vec<f32>>,
    /// How far that distribution moved in this pass: the Kullback-Leibler divergence of the one
    /// after from the one before, `Σ before · ln(before / after)`, in nats. 0 for first thoughts.
    pub kl: Vec<Vec<f32>>,
}

/// A square of numbers, `(tokens, tokens)`: row by row.
pub type Map = Vec<Vec<f32>>;

/// Which thoughts were alike, and which saw which, in one pass.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Maps {
    /// For each sequence, the cosine of every thought with every other after the pass.
    pub similarity: Vec<Map>,
    /// For each layer of the span, for each sequence, the share of every token's (row's) attention that
    /// goes to every other (column), averaged over the heads.
    pub attention: Vec<Vec<Map>>,
}
