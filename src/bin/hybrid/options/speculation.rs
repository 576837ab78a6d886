//! Whether to guess ahead.

use clap::Args;
use hybrid_attention::GenerationConfig;
use hybrid_attention::generate::{PromptLookup, Speculated};

/// Whether to guess ahead; by default there is one token to a pass.
#[derive(Args, Debug)]
#[command(next_help_heading = "Speed")]
pub(crate) struct SpeculationArgs {
    /// Guess up to N tokens ahead from what the text says already, and run them in one pass: the same answer, sooner
    /// where it repeats the prompt or itself [without N: 10]
    #[arg(long, value_name = "N", num_args = 0..=1)]
    pub(crate) speculate: Option<Option<usize>>,
}

impl SpeculationArgs {
    /// `config` with the options of the command line.
    pub(crate) fn apply(&self, config: GenerationConfig) -> GenerationConfig {
        let lookup = PromptLookup::default();
        match self.speculate {
            None => config,
            Some(None) => config.speculate(lookup),
            Some(Some(tokens)) => config.speculate(lookup.tokens(tokens)),
        }
    }
}

/// How guesses fared, for display behind the speed of an answer.
pub(crate) fn fared(speculated: Option<Speculated>) -> String {
    let fared =
        |Speculated { drafted, accepted }| format!(", {accepted} of {drafted} guesses right");
    speculated.map(fared).unwrap_or_default()
}
