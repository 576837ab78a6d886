//! All that decides how a run ends: two runs of the same settings end alike.

use clap::ValueEnum;
use hybrid_attention::Thinking;
use hybrid_attention::model::Sight;
use serde::{Deserialize, Serialize};

use crate::common;

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
    /// No passes, the same layers
    NoPasses,
    /// No passes, as many layers as four passes and the reading after them run
    Deep,
}

impl Arm {
    /// The most passes that it trains with.
    pub(crate) fn most_passes(self) -> usize {
        match self {
            Self::BothWays | Self::Causal => MOST_PASSES,
            Self::OnePass => 1,
            Self::NoPasses | Self::Deep => 0,
        }
    }

    pub(crate) fn sight(self) -> Sight {
        match self {
            Self::Causal => Sight::Causal,
            _ => Sight::Bidirectional,
        }
    }

    /// As it is written on the command line.
    pub(crate) fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_string())
    }
}

/// Passes are drawn from 0 to this many.
pub(crate) const MOST_PASSES: usize = 4;

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
}

impl Settings {
    /// Refuses what no run can be made of.
    pub(crate) fn check(&self) -> common::Result<()> {
        if self.batch == 0 {
            return Err("--batch: expected at least one text".into());
        }
        if self.span.0 == 0 || self.span.0 >= self.span.1 || self.span.1 > 64 {
            return Err("--span: expected A..B with 0 < A < B <= 64".into());
        }
        if self.gradient_passes == 0 {
            return Err("--gradient-passes: expected at least one".into());
        }
        if !(self.lr.is_finite() && self.lr > 0.0) {
            return Err(format!("--lr: expected a number above 0, got {}", self.lr).into());
        }
        Ok(())
    }

    /// The learning rate of a step: up in a line, on, and from `HOLD` of the run on down along a
    /// cosine.
    pub(crate) fn lr(&self, step: usize) -> f64 {
        const HOLD: f64 = 0.5;
        let warm = (step + 1) as f64 / self.warm_up.max(1) as f64;
        let cooling = (step as f64 / self.steps as f64 - HOLD).max(0.0) / (1.0 - HOLD);
        let cosine = (1.0 + (std::f64::consts::PI * cooling).cos()) / 2.0;
        self.lr * warm.min(1.0) * cosine.max(0.01)
    }

    /// How to think with this many passes.
    pub(crate) fn thinking(&self, passes: usize) -> Thinking {
        let thinking = Thinking::passes(passes).sight(self.arm.sight());
        if passes == 0 { thinking } else { thinking.span(self.span.0..self.span.1) }
    }
}
