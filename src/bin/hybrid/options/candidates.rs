//! Whether to choose from several answers, and how.

use clap::Args;
use hybrid_attention::GenerationConfig;
use hybrid_attention::generate::{Candidates, Extract, Score};

/// The temperature of candidates where nothing else says one: what the model itself would say.
const TEMPERATURE: f64 = 1.0;

/// Whether to choose from several answers; by default there is one.
#[derive(Args, Debug)]
#[command(next_help_heading = "Candidates")]
pub(crate) struct CandidateArgs {
    /// Write N answers side by side, drop the worst of them as they grow, and give the one that is left
    #[arg(long, value_name = "N")]
    pub(crate) candidates: Option<usize>,

    /// The share of them that a round leaves, within (0, 1); all, to drop only those that can no longer win
    ///
    /// [default: 0.5]
    #[arg(long, value_name = "S", value_parser = parse_keep, requires = "candidates", hide_short_help = true)]
    keep: Option<Keep>,

    /// Tokens of each from one round to the next [default: 8]
    #[arg(long, value_name = "N", requires = "candidates", hide_short_help = true)]
    every: Option<usize>,

    /// What the best is best by: logprob (the mean), sum (of log-probabilities), entropy, certainty, agreement
    /// (a vote over all words; agreement:word over the first, agreement:number over the last number), or random
    ///
    /// [default: logprob]
    #[arg(long, value_name = "SCORE", value_parser = parse_score, requires = "candidates", hide_short_help = true)]
    score: Option<Score>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Keep {
    Share(f64),
    All,
}

impl CandidateArgs {
    /// `config` with the options of the command line, where `temperature` is what was given there.
    pub(crate) fn apply(
        &self,
        config: GenerationConfig,
        temperature: Option<f64>,
    ) -> GenerationConfig {
        let Some(count) = self.candidates else { return config };
        let mut candidates = Candidates::samples(count);
        candidates = match self.keep {
            Some(Keep::Share(share)) => candidates.keep(share),
            Some(Keep::All) => candidates.keep_all(),
            None => candidates,
        };
        candidates = self.every.into_iter().fold(candidates, Candidates::every);
        candidates = self.score.into_iter().fold(candidates, Candidates::score);
        // At 0, which is no choice here but a default, all of them would be the same.
        let config = match temperature {
            None if config.temperature == 0.0 => config.temperature(TEMPERATURE),
            _ => config,
        };
        config.candidates(candidates)
    }
}

/// `0.5` or `all`
fn parse_keep(text: &str) -> Result<Keep, String> {
    match (text, text.parse()) {
        ("all", _) => Ok(Keep::All),
        (_, Ok(share)) => Ok(Keep::Share(share)),
        _ => Err("expected a share like 0.5, or all".into()),
    }
}

fn parse_score(text: &str) -> Result<Score, String> {
    Ok(match text {
        "logprob" => Score::MeanLogprob,
        "sum" => Score::SumLogprob,
        "entropy" => Score::Entropy,
        "certainty" => Score::SelfCertainty,
        "agreement" => Score::Agreement(Extract::Words),
        "agreement:word" => Score::Agreement(Extract::FirstWord),
        "agreement:number" => Score::Agreement(Extract::LastNumber),
        "random" => Score::Random,
        _ => {
            let known = "logprob, sum, entropy, certainty, agreement, agreement:word, agreement:number or random";
            return Err(format!("expected {known}"));
        }
    })
}
