//! Everything that determines the outcome of a run: two runs with the same settings end alike.

use clap::ValueEnum;
use hybrid_attention::adapter::AdapterScope;
use hybrid_attention::model::Sight;
use hybrid_attention::refine::Interpolate;
use hybrid_attention::thought::HandOff;
use hybrid_attention::{Pooling, Thinking};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use crate::terminal;

/// What is trained: the method, or one of its controls.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Arm {
    /// Passes that see both ways, as many as are drawn
    BothWays,
    /// The same with passes that see only what comes before
    Causal,
    /// One pass that sees both ways, never more
    OnePass,
    /// A prefix-LM: what is thought about is read both ways by the span, and its keys and values kept, with no pass before
    Prefix,
    /// No passes, the same layers
    NoPasses,
    /// No passes, as many layers as four passes and the reading after them run
    Deep,
    /// No passes, one reading by all layers that sees both ways; for --lost
    Whole,
    /// No passes, the text read twice, the second time with all of it before; for --lost
    Twice,
    /// No passes, the text written out again with its lost words; for --lost
    Rewrite,
}

impl Arm {
    pub(crate) fn sight(self) -> Sight {
        match self {
            Self::Causal => Sight::Causal,
            _ => Sight::Bidirectional,
        }
    }

    /// Its spelling on the command line.
    pub(crate) fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_string())
    }
}

/// What a model is taught where there is no text.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Suite {
    /// Facts in the wrong order
    #[default]
    Flashback,
    /// Facts in words that a glossary explains
    Glossary,
}

/// How the entries of a dictionary are read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Sees {
    /// Each token sees the whole entry
    BothWays,
    /// Each token sees what comes before it
    Causal,
}

impl Sees {
    /// Its spelling on the command line.
    pub(crate) fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_string())
    }
}

impl Suite {
    #[allow(clippy::trivially_copy_pass_by_ref, reason = "as serde calls it")]
    fn is_default(&self) -> bool {
        *self == Self::default()
    }
}

/// Where a lost word is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum AskedAt {
    /// At the token before, as the next one
    Before,
    /// At the blank itself
    Blank,
}

/// Passes on the flashback suite are drawn from 0 to this many.
pub(crate) const MOST_PASSES: usize = 4;

/// The most texts in a batch: more would fit in no memory.
const MOST_TEXTS: usize = 4096;

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Settings {
    pub(crate) arm: Arm,
    pub(crate) seed: u64,
    pub(crate) steps: usize,
    /// Texts in a batch.
    pub(crate) batch: usize,
    /// The learning rate after the warm-up.
    pub(crate) lr: f64,
    /// Steps in which the learning rate rises from 0.
    pub(crate) warm_up: usize,
    /// The layers that a pass runs.
    pub(crate) span: (usize, usize),
    /// Gradients flow through this many of the last passes.
    pub(crate) gradient_passes: usize,
    /// The checkpoint that is trained, by its name; without one it is a new small model.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) model: Option<String>,
    /// What is trained of it; without any, all weights.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) adapter: Option<LowRank>,
    #[serde(default, skip_serializing_if = "Suite::is_default")]
    pub(crate) suite: Suite,
    /// The columns that read a dictionary, if that is what is trained.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) dictionary: Option<Reads>,
    /// The entries that it learns to expand, if it does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) entries: Option<OfEntries>,
    /// What it learns; without any, the suite.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) text: Option<OfText>,
    /// The pairs whose vectors it learns to make alike, if it does.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) pairs: Option<OfPairs>,
}

/// A low-rank adapter.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct LowRank {
    pub(crate) rank: usize,
    pub(crate) alpha: f64,
    pub(crate) target: Vec<String>,
    /// The layers that have it; without any, those of the span.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) layers: Option<(usize, usize)>,
    /// When it is active; without any, in thought passes, or where there are none in decoding.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) mind: Option<AdapterScope>,
}

/// Columns that read a dictionary, in the layers of the span.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Reads {
    pub(crate) rank: usize,
    pub(crate) sees: Sees,
}

/// A file of entries.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct OfEntries {
    /// The name of the file.
    pub(crate) file: String,
    /// How many it has.
    pub(crate) entries: usize,
}

/// Files of pairs, and how they are read.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct OfPairs {
    /// The names of the files.
    pub(crate) file: String,
    pub(crate) held_out: String,
    /// Tells their tokens from those of others.
    pub(crate) fingerprint: String,
    /// The most tokens of a text.
    pub(crate) tokens: usize,
    /// The most passes.
    pub(crate) passes: usize,
    /// What cosines are divided by.
    pub(crate) temperature: f64,
    /// How the vectors of a text's tokens become one, if it is chosen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) pooling: Option<Pooling>,
}

impl OfPairs {
    /// The pooling of an arm: where the last tokens have seen most, they count most, unless another is chosen.
    pub(crate) fn pooling(&self, arm: Arm) -> Pooling {
        self.pooling.unwrap_or(match arm {
            Arm::Causal | Arm::NoPasses => Pooling::WeightedMean,
            _ => Pooling::Mean,
        })
    }
}

/// A text, and how it is read.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct OfText {
    /// The name of the file.
    pub(crate) file: String,
    /// Tells its tokens from those of another text.
    pub(crate) fingerprint: String,
    /// Tokens that are thought about, and as many that are predicted.
    pub(crate) tokens: usize,
    /// The most passes.
    pub(crate) passes: usize,
    /// What is lost of it; without any, its second half is predicted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) lost: Option<Lost>,
}

/// Words that are lost, to be filled in.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Lost {
    /// Of all words.
    pub(crate) share: f64,
    /// What stands for each token of a lost word.
    pub(crate) blank: String,
    pub(crate) at: AskedAt,
    /// The name of the file of passages that are held out, if it is one of its own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) held_out: Option<String>,
}

impl Settings {
    /// Refuses settings that no run can use. `layers` are those of the checkpoint, if there is one.
    pub(crate) fn check(&self, layers: Option<usize>) -> terminal::Result<()> {
        if !(1..=MOST_TEXTS).contains(&self.batch) {
            return Err(format!("--batch: expected 1 to {MOST_TEXTS}, got {}", self.batch).into());
        }
        // A new model has a layer before the span.
        let (first, last) = layers.map_or((1, 64), |layers| (0, layers));
        if self.span.0 < first || self.span.0 >= self.span.1 || self.span.1 > last {
            let message = format!("--span: expected A..B with {first} <= A < B <= {last}");
            return Err(message.into());
        }
        if layers.is_some() && self.arm == Arm::Deep {
            return Err("--arm deep: it has layers of its own, so it is no checkpoint's".into());
        }
        let lost = self.text.as_ref().is_some_and(|text| text.lost.is_some());
        let pairs = self.pairs.is_some();
        let name = self.arm.name();
        match self.arm {
            Arm::Whole | Arm::Twice if !lost && !pairs => {
                return Err(format!("--arm {name}: for --text with --lost, or --pairs").into());
            }
            Arm::Rewrite if !lost => {
                return Err(format!("--arm {name}: for --text with --lost").into());
            }
            _ => {}
        }
        if let Some(LowRank { rank, alpha, layers: of, .. }) = &self.adapter {
            if let Some((first, end)) = *of
                && (first >= end || layers.is_some_and(|layers| end > layers))
            {
                let layers = layers.unwrap_or_default();
                let message = format!("expected A..B with A < B <= {layers}, got {first}..{end}");
                return Err(format!("--adapter-layers: {message}").into());
            }
            if *rank == 0 {
                return Err("--rank: expected at least 1".into());
            }
            if !(alpha.is_finite() && *alpha > 0.0) {
                return Err(format!("--alpha: expected a number above 0, got {alpha}").into());
            }
        }
        if self.chosen_passes() == Some(0) {
            return Err("--passes: expected at least one; for none there is --arm no-passes".into());
        }
        if self.gradient_passes == 0 {
            return Err("--gradient-passes: expected at least one".into());
        }
        if !(self.lr.is_finite() && self.lr > 0.0) {
            return Err(format!("--lr: expected a number above 0, got {}", self.lr).into());
        }
        Ok(())
    }

    /// The most passes, where they are chosen.
    fn chosen_passes(&self) -> Option<usize> {
        let of_text = self.text.as_ref().map(|text| text.passes);
        of_text.or(self.pairs.as_ref().map(|pairs| pairs.passes))
    }

    /// The most passes that it trains with.
    pub(crate) fn most_passes(&self) -> usize {
        match self.arm {
            Arm::BothWays | Arm::Causal => self.chosen_passes().unwrap_or(MOST_PASSES),
            Arm::OnePass | Arm::Prefix => 1,
            Arm::NoPasses | Arm::Deep | Arm::Whole | Arm::Twice | Arm::Rewrite => 0,
        }
    }

    /// The random numbers of a step. Each step has its own, so that a resumed run draws the same.
    pub(crate) fn rng(&self, step: usize) -> ChaCha8Rng {
        let mut rng = ChaCha8Rng::seed_from_u64(self.seed);
        rng.set_stream(step as u64 + 1);
        rng
    }

    /// Draws the number of passes for a step, up to `most`.
    pub(crate) fn draw_passes(&self, most: usize, rng: &mut impl Rng) -> usize {
        // An adapter for thought passes learns nothing without one.
        let least = usize::from(self.adapter.is_some()).min(self.most_passes());
        let most = self.most_passes().min(most).max(least);
        if matches!(self.arm, Arm::OnePass | Arm::Prefix) {
            most
        } else {
            rng.random_range(least..=most)
        }
    }

    /// The learning rate of a step: it rises linearly, stays constant, and after the share `HOLD` of the
    /// run falls along a cosine.
    pub(crate) fn lr(&self, step: usize) -> f64 {
        const HOLD: f64 = 0.5;
        let warm = (step + 1) as f64 / self.warm_up.max(1) as f64;
        let cooling = (step as f64 / self.steps as f64 - HOLD).max(0.0) / (1.0 - HOLD);
        let cosine = (1.0 + (std::f64::consts::PI * cooling).cos()) / 2.0;
        self.lr * warm.min(1.0) * cosine.max(0.01)
    }

    /// How to think with this many passes.
    pub(crate) fn thinking(&self, passes: usize) -> Thinking {
        let thinking = Thinking::new(passes).sight(self.arm.sight());
        match (passes, self.arm) {
            (0, _) => thinking,
            // The pass that thinking takes at least leaves the thoughts as they are.
            (_, Arm::Prefix) => {
                let thinking = thinking.span(self.span.0..self.span.1);
                thinking.refine(Interpolate::new(0.0)).hand_off(HandOff::KeyValue)
            }
            _ => thinking.span(self.span.0..self.span.1),
        }
    }

    /// Whether the new state of a pass goes through a gate.
    pub(crate) fn has_gate(&self) -> bool {
        self.most_passes() > 0 && self.arm != Arm::Prefix
    }
}
