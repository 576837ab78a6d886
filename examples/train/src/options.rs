//! The command line of `train`, and the settings that it makes.

use std::ops::Range;
use std::path::{Path, PathBuf};

use clap::Parser;
use hybrid_attention::Pooling;
use hybrid_attention::adapter::AdapterScope;
use serde::de::DeserializeOwned;

use crate::base::Base;
use crate::settings::{
    Arm, AskedAt, Lost, LowRank, MOST_PASSES, OfPairs, OfText, Reads, Sees, Settings, Suite,
};

/// Teach a model to think: a new small one, a checkpoint, or an adapter on it, on the flashback suite
/// or on any text.
#[derive(Debug, Parser)]
pub struct Options {
    /// The folder of this run: where it is saved and goes on from, and where its results go
    #[arg(long, value_name = "DIR")]
    pub(crate) out: PathBuf,

    /// The method, or a control
    #[arg(long, value_enum, default_value_t = Arm::BothWays)]
    arm: Arm,

    /// What to learn without --text
    #[arg(long, value_enum, default_value_t, conflicts_with = "reads")]
    suite: Suite,

    /// A checkpoint to train: a folder with safetensors, or a .gguf file [default: a new small model]
    #[arg(long, value_name = "PATH")]
    pub(crate) model: Option<PathBuf>,

    /// Train a low-rank adapter of this rank in the layers of the span: for thought passes, or for
    /// decoding where there are none [default: train all weights]
    #[arg(long, value_name = "R", requires = "model")]
    rank: Option<usize>,

    /// What the adapter adds is scaled by alpha / rank [default: the rank]
    #[arg(long, value_name = "A", requires = "rank")]
    alpha: Option<f64>,

    /// Train how MLPs read a dictionary, at this rank, in the layers of the span: that of --entries, or of --suite
    /// glossary
    #[arg(long, value_name = "R", requires = "model", conflicts_with_all = ["rank", "reads"])]
    dictionary: Option<usize>,

    /// How the entries of the dictionary are read
    #[arg(long, value_enum, requires = "dictionary", default_value_t = Sees::BothWays)]
    sees: Sees,

    /// A file of headwords and definitions, a tab between them: learn to say what held-out ones mean, with
    /// --dictionary, or with --rank alone
    #[arg(long, value_name = "TSV", requires = "model", conflicts_with_all = ["reads", "suite"])]
    pub(crate) entries: Option<PathBuf>,

    /// The projections that have an adapter
    #[arg(long, value_name = "NAMES", value_delimiter = ',', requires = "rank")]
    #[arg(default_value = "q_proj,k_proj,v_proj,o_proj")]
    target: Vec<String>,

    /// The layers that have an adapter [default: those of the span]
    #[arg(long, value_name = "A..B", requires = "rank", value_parser = parse_span)]
    adapter_layers: Option<Range<usize>>,

    /// When the adapter is active: thinking, decoding or both [default: thinking, or decoding where there are no passes; both
    /// with --lost and --pairs]
    #[arg(long, value_name = "WHEN", requires = "rank", value_parser = parse_named::<AdapterScope>)]
    adapter_for: Option<AdapterScope>,

    /// A UTF-8 file of passages to learn from, one a line; those that are too short are skipped
    /// [default: learn the flashback suite]
    #[arg(long, value_name = "F", requires = "model", group = "reads")]
    pub(crate) text: Option<PathBuf>,

    /// A file of queries and the passages that answer them, a tab between them: learn vectors by which those of --held-out
    /// are found
    #[arg(long, value_name = "TSV", requires_all = ["model", "held_out"], group = "reads")]
    pub(crate) pairs: Option<PathBuf>,

    /// What the cosines of --pairs are divided by
    #[arg(long, value_name = "T", requires = "pairs", default_value_t = 0.05)]
    temperature: f64,

    /// How the vectors of a text's tokens become one: mean, weighted-mean or last-token [default: weighted-mean where the last
    /// ones have seen most, else mean]
    #[arg(long, value_name = "HOW", requires = "pairs", value_parser = parse_named::<Pooling>)]
    pooling: Option<Pooling>,

    /// Blank this share of a text's words, and learn to fill them where they stand
    #[arg(long, value_name = "SHARE", requires = "text")]
    lost: Option<f64>,

    /// What stands for each token of a lost word: the text of one token
    #[arg(long, value_name = "TEXT", requires = "lost", default_value = "_")]
    blank: String,

    /// Where a lost word is asked for
    #[arg(long, value_enum, requires = "lost", default_value_t = AskedAt::Before)]
    asked_at: AskedAt,

    /// A file of what is held out, as --text with --lost [default: every fifth line of that], or as --pairs
    #[arg(long, value_name = "F", requires = "reads")]
    pub(crate) held_out: Option<PathBuf>,

    /// Tokens that are thought about, and as many to be predicted after them; with --lost or --pairs,
    /// the most of a text
    #[arg(long, default_value_t = 64, value_name = "N", requires = "reads")]
    pub(crate) tokens: usize,

    /// The most passes to think about a text with
    #[arg(long, default_value_t = 2, value_name = "N", requires = "reads")]
    passes: usize,

    /// Decides the first weights and every text
    #[arg(long, default_value_t = 1)]
    seed: u64,

    /// Steps of the whole run [default: 6000; 300 for --text, 500 for --pairs, 600 for --entries]
    #[arg(long, value_name = "N")]
    steps: Option<usize>,

    /// Texts in each step [default: 64; 4 for --text, 16 for --entries; 32 for --pairs, and as many passages]
    #[arg(long, value_name = "N")]
    batch: Option<usize>,

    /// The learning rate after the warm-up [default: 2e-3; 1e-3 for --rank and --dictionary; 3e-5 for a
    /// checkpoint]
    #[arg(long)]
    lr: Option<f64>,

    /// The layers that a thought pass runs; a new model has one more [default: 1..3; the middle
    /// third for --text and --pairs; all for --entries, and for a model with --suite glossary]
    #[arg(long, value_name = "A..B", value_parser = parse_span)]
    span: Option<Range<usize>>,

    /// Let gradients flow through the last K passes only [default: all]
    #[arg(long, value_name = "K")]
    gradient_passes: Option<usize>,

    /// Steps between two saved states; a run that is killed does at most as many again [default: 100;
    /// 10 for --rank and --dictionary]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    save_every: Option<u64>,

    /// Stories in the examination at the end, for each length of chain if there are chains; or the most entries, of those
    /// held out
    #[arg(long, default_value_t = 300, value_name = "N", conflicts_with = "reads")]
    pub(crate) stories: usize,

    /// The most passages in the examination at the end, or queries, of those held out
    #[arg(long, default_value_t = 60, value_name = "N", requires = "reads")]
    pub(crate) passages: usize,
}

impl Options {
    /// What is lost of a text, if words are.
    pub(crate) fn lost(&self) -> Option<Lost> {
        let held_out = self.held_out.as_deref().map(name);
        let lost = |share| Lost { share, blank: self.blank.clone(), at: self.asked_at, held_out };
        self.lost.map(lost)
    }

    /// A text that has this fingerprint.
    pub(crate) fn of_text(&self, path: &Path, fingerprint: &str) -> OfText {
        OfText {
            file: name(path),
            fingerprint: fingerprint.to_string(),
            tokens: self.tokens,
            passes: self.passes,
            lost: self.lost(),
        }
    }

    /// Pairs, as they are read.
    pub(crate) fn of_pairs(&self, path: &Path, held_out: &Path) -> OfPairs {
        OfPairs {
            file: name(path),
            held_out: name(held_out),
            fingerprint: String::new(),
            tokens: self.tokens,
            passes: self.passes,
            temperature: self.temperature,
            pooling: self.pooling,
        }
    }

    pub(crate) fn settings(&self, base: Option<&Base>, text: Option<OfText>) -> Settings {
        let entries = self.entries.is_some();
        let reads = text.is_some() || self.pairs.is_some();
        let (batch, steps) = match (&text, &self.pairs, &self.entries) {
            (Some(_), ..) => (4, 300),
            (_, Some(_), _) => (32, 500),
            (.., Some(_)) => (16, 600),
            (None, None, None) => (64, 6000),
        };
        let steps = self.steps.unwrap_or(steps);
        let span = self.span.clone().unwrap_or_else(|| match base {
            Some(base) if reads => base.middle(),
            Some(base) if entries || self.suite == Suite::Glossary => {
                0..base.config.num_hidden_layers
            }
            _ => 1..3,
        });
        let lr = match (self.rank.or(self.dictionary), base) {
            (_, None) => 2e-3,
            (Some(_), _) => 1e-3,
            (None, _) => 3e-5,
        };
        let low_rank = |rank| LowRank {
            rank,
            alpha: self.alpha.unwrap_or(rank as f64),
            target: self.target.clone(),
            layers: self.adapter_layers.as_ref().map(|layers| (layers.start, layers.end)),
            mind: self
                .adapter_for
                .or((self.lost.is_some() || self.pairs.is_some()).then_some(AdapterScope::Both)),
        };
        Settings {
            arm: self.arm,
            seed: self.seed,
            steps,
            batch: self.batch.unwrap_or(batch),
            lr: self.lr.unwrap_or(lr),
            warm_up: if reads { steps / 10 } else { 100 },
            span: (span.start, span.end),
            gradient_passes: self.gradient_passes.unwrap_or(MOST_PASSES.max(self.passes)),
            model: base.map(|base| name(&base.path)),
            adapter: self.rank.map(low_rank),
            suite: self.suite,
            dictionary: self.dictionary.map(|rank| Reads { rank, sees: self.sees }),
            entries: None,
            text,
            pairs: None,
        }
    }

    pub(crate) fn saves_every(&self) -> u64 {
        let small = self.rank.or(self.dictionary).is_some();
        self.save_every.unwrap_or(if small { 10 } else { 100 })
    }
}

/// The last part of a path: where a file is located makes no difference to a run.
pub(crate) fn name(path: &Path) -> String {
    let whole = path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
    whole.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

/// `1..3`
fn parse_span(text: &str) -> Result<Range<usize>, String> {
    let ends = text.split_once("..").and_then(|(a, b)| Some((a.parse().ok()?, b.parse().ok()?)));
    ends.map(|(a, b)| a..b).ok_or_else(|| "expected two layer numbers like 14..18".to_string())
}

/// A setting of the library by its name, `weighted-mean` for `weighted_mean`.
fn parse_named<T: DeserializeOwned>(text: &str) -> Result<T, String> {
    serde_json::from_value(text.replace('-', "_").into()).map_err(|error| error.to_string())
}
