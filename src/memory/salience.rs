//! How much each token of a text matters to it.

use std::fmt;
use std::ops::{Bound, Range, RangeBounds};
use std::sync::Arc;

use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::hybrid::HybridModel;
use crate::model::{Sight, Transformer};

/// How tokens are scored, and how many of them are kept.
///
/// ```
/// use hybrid_attention::memory::{Heads, Salience};
///
/// let salience = Salience::last_queries(8).layers(10..).heads(Heads::Max).share(0.25);
/// # let _ = salience;
/// ```
///
/// A plain attention weight says where attention goes, and much of it goes to the first token and to punctuation. So the
/// first token is never chosen, nor are tokens that are not part of a word. None of these scores is known to be better
/// than chance on every model: `hybrid memory eval` holds each to a [random](Salience::random) choice of as many tokens.
/// On SmolLM2-135M all but [`last_queries`](Salience::last_queries) are better at finding texts by one vector of a quarter or
/// half of their tokens, and [`received`](Salience::received) is best or as good as any.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Salience {
    pub(super) scorer: Scorer,
    #[serde(default = "all", skip_serializing_if = "is_all")]
    layers: Bounds,
    pub(super) heads: Heads,
    pub(super) budget: Budget,
}

/// How the scores that the heads of a layer give become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Heads {
    /// Their mean.
    Mean,
    /// The largest: a token matters that matters to some head.
    Max,
}

/// How much of a text is kept, in tokens.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Budget {
    /// Of all its tokens, above 0 and at most 1.
    Share(f64),
    Tokens(usize),
}

/// A text as a closure of [`Salience::by`] is given it.
#[derive(Clone, Copy, Debug)]
pub struct Reading<'a> {
    /// The model that reads it.
    pub model: &'a HybridModel,
    /// The text.
    pub text: &'a str,
    /// Its tokens.
    pub ids: &'a [u32],
    /// The bytes of the text that each token stands for; none for one that was added around it.
    pub bytes: &'a [Range<usize>],
}

type Closure = dyn Fn(&Reading<'_>) -> Result<Vec<f32>> + Send + Sync;

#[derive(Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Scorer {
    LastQueries {
        queries: usize,
    },
    Received,
    ValueWeighted,
    Reconstruct,
    Leverage,
    Random {
        seed: u64,
    },
    Lead,
    /// Written so that a store can tell that it is one; it cannot be read.
    #[serde(skip_deserializing, serialize_with = "nothing")]
    By(Arc<Closure>),
}

fn nothing<S: serde::Serializer>(_: &Arc<Closure>, to: S) -> std::result::Result<S::Ok, S::Error> {
    to.serialize_unit()
}

type Bounds = (Bound<usize>, Bound<usize>);

fn all() -> Bounds {
    (Bound::Unbounded, Bound::Unbounded)
}

fn is_all(layers: &Bounds) -> bool {
    *layers == all()
}

impl fmt::Debug for Scorer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::LastQueries { queries } => write!(f, "LastQueries({queries})"),
            Self::Received => f.write_str("Received"),
            Self::ValueWeighted => f.write_str("ValueWeighted"),
            Self::Reconstruct => f.write_str("Reconstruct"),
            Self::Leverage => f.write_str("Leverage"),
            Self::Random { seed } => write!(f, "Random({seed})"),
            Self::Lead => f.write_str("Lead"),
            Self::By(_) => f.write_str("By(closure)"),
        }
    }
}

impl Salience {
    fn new(scorer: Scorer, heads: Heads) -> Self {
        Self { scorer, layers: all(), heads, budget: Budget::Share(0.25) }
    }

    /// The attention that the last `queries` tokens pay to a token, averaged with that of its neighbours: what
    /// SnapKV (Li et al. 2024) keeps of a prompt by. Biased to what a text ends with.
    #[must_use]
    pub fn last_queries(queries: usize) -> Self {
        Self::new(Scorer::LastQueries { queries }, Heads::Mean)
    }

    /// The attention that a token receives from all tokens, when all see both ways.
    #[must_use]
    pub fn received() -> Self {
        Self::new(Scorer::Received, Heads::Mean)
    }

    /// The same, times the length of the token's value vector: attention moves what a value holds, and the
    /// tokens that receive most hold least (Guo et al. 2024).
    #[must_use]
    pub fn value_weighted() -> Self {
        Self::new(Scorer::ValueWeighted, Heads::Mean)
    }

    /// The most attention that a token is paid while the text is read a second time behind itself: what a
    /// model needs of it to say it again (KVzip, Kim et al. 2025). Needs twice the positions of the text.
    #[must_use]
    pub fn reconstruct() -> Self {
        Self::new(Scorer::Reconstruct, Heads::Max)
    }

    /// How far a token's keys are from being made up of the others' (their statistical leverage), plus the
    /// attention it [receives](Self::received), both as multiples of their mean: as Compactor (Chari and
    /// Van Durme 2025) blends the two. Keys are taken as they are rotated.
    #[must_use]
    pub fn leverage() -> Self {
        Self::new(Scorer::Leverage, Heads::Mean)
    }

    /// Words by chance: the control that any score has to beat.
    #[must_use]
    pub fn random(seed: u64) -> Self {
        Self::new(Scorer::Random { seed }, Heads::Mean)
    }

    /// The first words: another control.
    #[must_use]
    pub fn lead() -> Self {
        Self::new(Scorer::Lead, Heads::Mean)
    }

    /// Your own: a score for each token, the higher, the more it matters.
    #[must_use]
    pub fn by<F>(score: F) -> Self
    where
        F: Fn(&Reading<'_>) -> Result<Vec<f32>> + Send + Sync + 'static,
    {
        Self::new(Scorer::By(Arc::new(score)), Heads::Mean)
    }

    /// The layers whose attention is asked. Default: all; their scores are averaged.
    #[must_use]
    pub fn layers(mut self, layers: impl RangeBounds<usize>) -> Self {
        self.layers = (layers.start_bound().cloned(), layers.end_bound().cloned());
        self
    }

    /// How the scores of heads become one. Default: their mean; for
    /// [`reconstruct`](Self::reconstruct) the largest.
    #[must_use]
    pub fn heads(mut self, heads: Heads) -> Self {
        self.heads = heads;
        self
    }

    /// Keeps this share of a text's tokens, rounded up, above 0 and at most 1. Default: a quarter.
    #[must_use]
    pub fn share(mut self, share: f64) -> Self {
        self.budget = Budget::Share(share);
        self
    }

    /// Keeps this many tokens, at least 1.
    #[must_use]
    pub fn tokens(mut self, tokens: usize) -> Self {
        self.budget = Budget::Tokens(tokens);
        self
    }

    /// Checks what does not depend on the model.
    ///
    /// # Errors
    /// [`Error::Parameter`] naming what is outside its range.
    pub fn validate(&self) -> Result<()> {
        match self.budget {
            Budget::Share(share) if !(share > 0.0 && share <= 1.0) => {
                return Err(Error::parameter("share", "above 0, at most 1", share));
            }
            Budget::Tokens(0) => return Err(Error::parameter("tokens", "at least 1", 0)),
            _ => {}
        }
        match self.scorer {
            Scorer::LastQueries { queries: 0 } => {
                Err(Error::parameter("last_queries", "at least 1", 0))
            }
            _ => Ok(()),
        }
    }

    /// How many of a text's tokens may be kept.
    pub(super) fn room(&self, tokens: usize) -> usize {
        match self.budget {
            Budget::Share(share) => (share * tokens as f64).ceil() as usize,
            Budget::Tokens(most) => most,
        }
    }

    /// Which way the attention looks that it scores by; `None` for a score that asks no attention.
    pub(super) fn sight(&self) -> Option<Sight> {
        match self.scorer {
            Scorer::LastQueries { .. } | Scorer::Reconstruct => Some(Sight::Causal),
            Scorer::Received | Scorer::ValueWeighted | Scorer::Leverage => {
                Some(Sight::Bidirectional)
            }
            Scorer::Random { .. } | Scorer::Lead | Scorer::By(_) => None,
        }
    }

    /// A score for each token of `reading`, where it takes no look at attention.
    pub(super) fn given(&self, reading: &Reading<'_>) -> Result<Option<Vec<f32>>> {
        let tokens = 0..reading.ids.len();
        Ok(match &self.scorer {
            Scorer::Random { seed } => {
                let mut scores: Vec<f32> = tokens.map(|token| token as f32).collect();
                scores.shuffle(&mut ChaCha8Rng::seed_from_u64(*seed));
                Some(scores)
            }
            Scorer::Lead => Some(tokens.map(|token| -(token as f32)).collect()),
            Scorer::By(score) => Some(score(reading)?),
            _ => None,
        })
    }

    /// The layers that are asked, of those that there are.
    pub(super) fn layers_of(&self, transformer: &Transformer) -> Result<Range<usize>> {
        let all = transformer.all_layers().end;
        let start = match self.layers.0 {
            Bound::Included(start) => start,
            Bound::Excluded(before) => before.saturating_add(1),
            Bound::Unbounded => 0,
        };
        let end = match self.layers.1 {
            Bound::Included(last) => last.saturating_add(1),
            Bound::Excluded(end) => end,
            Bound::Unbounded => all,
        };
        match start < end && end <= all {
            true => Ok(start..end),
            false => {
                let expected = format!("some of the layers 0..{all}");
                Err(Error::parameter("salience layers", expected, format!("{start}..{end}")))
            }
        }
    }
}
