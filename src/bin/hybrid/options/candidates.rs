//! Whether to choose from several answers, and how.

use std::path::PathBuf;

use clap::Args;
use hybrid_attention::generate::{Candidates, Extract, Score};
use hybrid_attention::refine::Noise;
use hybrid_attention::statistics::{Fingerprint, Key};
use hybrid_attention::{GenerationConfig, HybridModel, TokenStream};

use crate::terminal;

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
    /// (a vote over all words; agreement:word over the first, agreement:number over the last number), key (--key), or
    /// random
    ///
    /// [default: logprob]
    #[arg(long, value_name = "SCORE", value_parser = parse_score, requires = "candidates", hide_short_help = true)]
    score: Option<Score>,

    /// Let them differ by what they think, not by how they are drawn: noise on what enters the first pass, of this
    /// deviation as a share of each vector's length
    #[arg(long, value_name = "SD", requires_all = ["candidates", "passes"], hide_short_help = true)]
    noise: Option<f64>,

    /// A key, which says what the statistics of an answer to this prompt should be: a file of Key::save
    #[arg(long, value_name = "F", requires = "candidates", hide_short_help = true)]
    key: Option<PathBuf>,

    /// End with the first that is within K standard errors of what the key says [default: never]
    #[arg(long, value_name = "K", requires = "key", hide_short_help = true)]
    within: Option<f64>,
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
        let (mut config, mut candidates) = (config, Candidates::samples(count));
        if let (Some(sd), Some(thinking)) = (self.noise, &mut config.thinking) {
            // Of noise there is a seed, too.
            let noise = Noise::relative(sd).seed(config.seed.unwrap_or(0));
            *thinking = thinking.clone().noise(noise);
            candidates = Candidates::thoughts(count);
        }
        candidates = match self.keep {
            Some(Keep::Share(share)) => candidates.keep(share),
            Some(Keep::All) => candidates.keep_all(),
            None => candidates,
        };
        candidates = self.every.into_iter().fold(candidates, Candidates::every);
        candidates = self.score.into_iter().fold(candidates, Candidates::score);
        candidates = self.within.into_iter().fold(candidates, Candidates::within);
        // At 0, which is no choice here but a default, all samples would be the same.
        let config = match temperature {
            None if config.temperature == 0.0 && self.noise.is_none() => {
                config.temperature(TEMPERATURE)
            }
            _ => config,
        };
        config.candidates(candidates)
    }
}

impl CandidateArgs {
    /// `stream`, whose candidates are held to the key, if there is one.
    pub(crate) fn hold_to_key(
        &self,
        model: &HybridModel,
        stream: TokenStream<'static>,
    ) -> terminal::Result<TokenStream<'static>> {
        let Some(path) = &self.key else { return Ok(stream) };
        let key = Key::load(path, &Fingerprint::of(model.transformer())?)?;
        Ok(stream.key(&key)?)
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
        "key" => Score::Key,
        "random" => Score::Random,
        _ => {
            let known = "logprob, sum, entropy, certainty, agreement, agreement:word, agreement:number, key or random";
            return Err(format!("expected {known}"));
        }
    })
}
