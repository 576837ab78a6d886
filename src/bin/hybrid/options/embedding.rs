//! How a text becomes a vector.

use clap::{Args, ValueEnum};
use hybrid_attention::model::Sight;
use hybrid_attention::{EmbedConfig, Pooling};

use crate::terminal::Result;

/// How a text becomes a vector; by default as the checkpoint says.
#[derive(Args, Debug)]
#[command(next_help_heading = "Texts and vectors")]
pub(crate) struct EmbedArgs {
    /// How the vectors of a text's tokens become one [default: as the checkpoint says, else mean where
    /// tokens see both ways, and weighted-mean where they do not]
    #[arg(long, value_enum)]
    pooling: Option<Pool>,

    /// Let tokens see only what comes before them: the default, unless the checkpoint says otherwise
    #[arg(long, conflicts_with = "both_ways")]
    causal: bool,

    /// Let tokens see what comes after them, too: for weights that were trained for it
    #[arg(long)]
    both_ways: bool,

    /// Put this in front of each text, and leave it and BOS out of the pooling
    #[arg(long, value_name = "T")]
    instruction: Option<String>,

    /// Cut texts to this many tokens [default: as the checkpoint says, else a text that is longer than
    /// the context is an error]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    truncate: Option<u64>,

    /// Pool the states that enter this layer, of 0 to as many as there are [default: what leaves the last layer, behind
    /// the final norm]
    #[arg(long, value_name = "N", hide_short_help = true)]
    pub(crate) layer: Option<usize>,

    /// Tokens that run side by side: texts of similar length are packed until they hold this many
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..), hide_short_help = true)]
    #[arg(default_value_t = EmbedConfig::BATCH_TOKENS as u64)]
    batch_tokens: u64,
}

/// A pooling on the command line.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum Pool {
    Mean,
    WeightedMean,
    Last,
}

impl From<Pool> for Pooling {
    fn from(pool: Pool) -> Self {
        match pool {
            Pool::Mean => Self::Mean,
            Pool::WeightedMean => Self::WeightedMean,
            Pool::Last => Self::LastToken,
        }
    }
}

impl EmbedArgs {
    pub(crate) fn config(&self) -> Result<EmbedConfig> {
        let mut config = EmbedConfig::default();
        config = config.batch_tokens(usize::try_from(self.batch_tokens)?);
        if let Some(pooling) = self.pooling {
            config = config.pooling(pooling.into());
        }
        if self.causal || self.both_ways {
            config = config.sight(if self.causal { Sight::Causal } else { Sight::Bidirectional });
        }
        if let Some(instruction) = &self.instruction {
            config = config.instruction(instruction);
        }
        if let Some(most) = self.truncate {
            config = config.max_tokens(usize::try_from(most)?);
        }
        Ok(self.layer.into_iter().fold(config, EmbedConfig::layer))
    }
}
