//! How to think.

use std::ops::Range;

use clap::Args;
use hybrid_attention::refine::Interpolate;
use hybrid_attention::thought::{Halt, HandOff};
use hybrid_attention::{GenerationConfig, Thinking};

use crate::terminal::say;

/// How to think; by default as the checkpoint says, which for most is not at all.
#[derive(Args, Debug)]
#[command(next_help_heading = "Thinking")]
pub(crate) struct ThinkingArgs {
    /// Bidirectional thought passes over the prompt; 0 is a plain Mistral
    ///
    /// [default: as the checkpoint's hybrid.json says, for answers or for vectors, else 0]
    #[arg(long, value_name = "N")]
    pub(crate) passes: Option<usize>,

    /// The layers that a thought pass runs [default: all]
    #[arg(long, value_name = "A..B", value_parser = parse_span)]
    pub(crate) span: Option<Range<usize>>,

    /// Share of the new state in z += w (h - z), in [0, 1]
    ///
    /// [default: one over the passes, or the checkpoint's own gate]
    #[arg(long, value_name = "W")]
    pub(crate) weight: Option<f64>,

    /// Stop thinking after a pass that moves the thoughts by less than this share of their length;
    /// 0.03 is a good exit [default: never]
    #[arg(long, value_name = "D", hide_short_help = true)]
    pub(crate) halt_drift: Option<f64>,

    /// How the decoder receives the thoughts: refined, key-value, or mixed:W with the share W of
    /// their keys and values [default: refined]
    #[arg(long, value_name = "H", value_parser = parse_hand_off, hide_short_help = true)]
    pub(crate) hand_off: Option<HandOff>,

    /// Think again over prompt and answer after every N new tokens; of no use where there is no
    /// answer [default: never]
    #[arg(long, value_name = "N", hide_short_help = true)]
    pub(crate) rethink_every: Option<usize>,
}

impl ThinkingArgs {
    /// The thinking that was asked for, if any was.
    pub(crate) fn thinking(&self) -> Option<Thinking> {
        let mut thinking = Thinking::new(self.passes?);
        thinking = thinking.rethink_every(self.rethink_every.unwrap_or(0));
        let weight = self.weight.map(Interpolate::new);
        thinking = weight.into_iter().fold(thinking, Thinking::refine);
        thinking = self.span.iter().cloned().fold(thinking, Thinking::span);
        thinking = self.halt_drift.map(Halt::Drift).into_iter().fold(thinking, Thinking::halt);
        Some(self.hand_off.into_iter().fold(thinking, Thinking::hand_off))
    }

    /// `config` with the options of the command line.
    pub(crate) fn apply(&self, config: GenerationConfig) -> GenerationConfig {
        self.thinking().into_iter().fold(config, GenerationConfig::thinking)
    }

    /// Warns about options that have no effect.
    pub(crate) fn warn(&self) {
        let options = [
            ("--span", self.span.is_some()),
            ("--weight", self.weight.is_some()),
            ("--halt-drift", self.halt_drift.is_some()),
            ("--hand-off", self.hand_off.is_some()),
            ("--rethink-every", self.rethink_every.is_some()),
        ];
        for (option, _) in
            options.iter().filter(|(_, given)| *given && self.passes.unwrap_or(0) == 0)
        {
            say(&format!("note: {option} does nothing without --passes"));
        }
    }
}

/// `14..18`
pub(crate) fn parse_span(text: &str) -> Result<Range<usize>, String> {
    let ends = text.split_once("..").and_then(|(a, b)| Some((a.parse().ok()?, b.parse().ok()?)));
    ends.map(|(a, b)| a..b).ok_or_else(|| "expected two layer numbers like 14..18".to_string())
}

/// `refined`, `key-value` or `mixed:0.5`
fn parse_hand_off(text: &str) -> Result<HandOff, String> {
    match (text, text.strip_prefix("mixed:").map(str::parse)) {
        ("refined", _) => Ok(HandOff::Refined),
        ("key-value", _) => Ok(HandOff::KeyValue),
        (_, Some(Ok(weight))) => Ok(HandOff::Mixed { weight }),
        _ => Err("expected refined, key-value or mixed:W with a share W, as in mixed:0.5".into()),
    }
}
