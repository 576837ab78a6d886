//! How to choose tokens.

use clap::Args;
use hybrid_attention::GenerationConfig;

/// How to choose tokens; by default as the checkpoint says, else greedily.
#[derive(Args, Debug)]
#[command(next_help_heading = "Sampling")]
pub(crate) struct SamplingArgs {
    /// Divides the logits before sampling; 0 takes the likeliest token
    ///
    /// [default: the model's own, else 0]
    #[arg(long, value_name = "T")]
    pub(crate) temperature: Option<f64>,

    /// Sample among the K likeliest tokens; 0 among all
    #[arg(long, value_name = "K", hide_short_help = true)]
    pub(crate) top_k: Option<usize>,

    /// Sample among the likeliest tokens that together hold this probability
    #[arg(long, value_name = "P")]
    pub(crate) top_p: Option<f64>,

    /// Sample among tokens at least this share as likely as the likeliest
    #[arg(long, value_name = "P", hide_short_help = true)]
    pub(crate) min_p: Option<f64>,

    /// Make tokens already in the text less likely; 1 changes nothing
    #[arg(long, value_name = "R", hide_short_help = true)]
    pub(crate) repetition_penalty: Option<f64>,

    /// The seed of the sampler [default: a new one each time]
    #[arg(long)]
    pub(crate) seed: Option<u64>,
}

impl SamplingArgs {
    /// `config` with the options of the command line.
    pub(crate) fn apply(&self, mut config: GenerationConfig) -> GenerationConfig {
        config = self.temperature.into_iter().fold(config, GenerationConfig::temperature);
        config = self.top_k.into_iter().fold(config, GenerationConfig::top_k);
        config = self.top_p.into_iter().fold(config, GenerationConfig::top_p);
        config = self.min_p.into_iter().fold(config, GenerationConfig::min_p);
        config =
            self.repetition_penalty.into_iter().fold(config, GenerationConfig::repetition_penalty);
        self.seed.into_iter().fold(config, GenerationConfig::seed)
    }
}
