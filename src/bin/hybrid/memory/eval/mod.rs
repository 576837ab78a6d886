//! `hybrid memory eval`: what is a memory worth?
//!
//! ```text
//! benches/texts.sh target/texts
//! hybrid memory eval --model PATH --texts target/texts/lee.txt
//! hybrid memory eval --model PATH --texts target/texts/lee.txt --what continuation
//! hybrid memory eval --model PATH --texts target/texts/lee.txt --what generic --others target/texts/boolq.txt
//! cargo run -p flashback-suite --bin conversations -- 50 1 > target/texts/stories.jsonl
//! hybrid memory eval --model PATH --texts target/texts/stories.jsonl --what conversations
//! ```
//!
//! Words and directions by chance are drawn with fixed seeds: the same model and texts give the same table.

mod continuation;
mod conversations;
mod generics;
mod retrieval;

use std::io::{Write, stdout};
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use hybrid_attention::HybridModel;
use hybrid_attention::evaluate::Estimate;
use hybrid_attention::memory::Salience;
use hybrid_attention::memory::evaluate::Passage;
use indicatif::ProgressBar;
use serde_json::Value;

use super::how::How;
use crate::files::read_text;
use crate::options::ModelArgs;
use crate::terminal::{self, Result};

#[derive(Args, Debug)]
#[command(next_help_heading = "Texts")]
pub(crate) struct Options {
    /// What to measure: what finds a text's first part by its next, what says most of how it goes on, what
    /// finds it better without what all texts have in common, or what answers questions about what was told
    #[arg(long, value_enum, default_value_t = What::Retrieval, value_name = "WHAT")]
    what: What,

    /// A UTF-8 file of texts, one a line; those that are too short are skipped. For conversations, of stories: a JSON
    /// object a line
    #[arg(long, value_name = "F")]
    texts: PathBuf,

    /// For generic, other texts: a third says what is generic, a third chooses, and the last is tested, too
    #[arg(long, value_name = "F")]
    others: Option<PathBuf>,

    /// The layers whose entering states are compared without what is generic, beside what leaves the final norm
    /// [default: a third, two thirds, and all of them]
    #[arg(long, value_name = "N,N", value_delimiter = ',')]
    layers: Option<Vec<usize>>,

    /// Directions to choose from [default: 1,2,4,8,16,32]
    #[arg(long, value_name = "K,K", value_delimiter = ',')]
    directions: Option<Vec<usize>>,

    /// The most texts to take, from the first on, and of --others three times as many
    #[arg(long, value_name = "N")]
    passages: Option<usize>,

    /// Tokens of each part
    #[arg(long, default_value_t = 96, value_name = "N")]
    tokens: usize,

    /// Shares of the tokens that are kept [default: 0.12,0.25,0.5, and of a continuation 0.25,0.5]
    #[arg(long, value_name = "S,S", value_delimiter = ',')]
    shares: Option<Vec<f64>>,

    /// How often words, or directions, are drawn by chance
    #[arg(long, default_value_t = 5, value_name = "N")]
    draws: u64,

    /// Scores of words to compare, beside their controls [default: all]
    #[arg(long, value_enum, value_name = "HOW,HOW", value_delimiter = ',')]
    salience: Option<Vec<How>>,

    /// Notes that are recalled of conversations
    #[arg(long, default_value_t = 3, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    best: u64,

    /// Print a JSON object instead of a table, with the figures of each text
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    model: ModelArgs,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum What {
    Retrieval,
    Continuation,
    Generic,
    Conversations,
}

/// A figure for each passage or story, as JSON and as a Markdown table.
struct Report {
    json: Value,
    table: String,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let texts = read_text(&options.texts)?;
    let lines = texts.lines().filter(|line| !line.trim().is_empty());
    let report = match options.what {
        What::Conversations => conversations::run(options, lines)?,
        What::Retrieval => retrieval::run(options, lines)?,
        What::Continuation => continuation::run(options, lines)?,
        What::Generic => generics::run(options, lines)?,
    };
    match options.json {
        true => Ok(writeln!(stdout(), "{}", report.json)?),
        false => Ok(write!(stdout(), "{}", report.table)?),
    }
}

impl Options {
    fn most(&self) -> usize {
        self.passages.unwrap_or(usize::MAX)
    }

    /// Those of the lines that are long enough.
    fn cut<'a>(
        &self,
        model: &HybridModel,
        lines: impl Iterator<Item = &'a str>,
    ) -> Result<Vec<Passage>> {
        let cut = lines.filter_map(|line| Passage::cut(model, line, self.tokens).transpose());
        Ok(cut.take(self.most()).collect::<hybrid_attention::Result<_>>()?)
    }

    /// The scores that were named, in the place of all.
    fn ways(&self, all: Vec<(String, Salience)>) -> Vec<(String, Salience)> {
        match &self.salience {
            None => all,
            Some(named) => named.iter().map(|how| (how.name(), how.salience())).collect(),
        }
    }
}

fn bar(count: usize) -> ProgressBar {
    let bar = terminal::bar(count as u64, "reading [{bar:30}] {pos}/{len}, {eta} to go");
    bar.tick();
    bar
}

/// `0.574 ± 0.028`
fn estimate(values: &[f64]) -> String {
    let Estimate { mean, standard_error } = Estimate::of(values);
    format!("{mean:.3} ± {standard_error:.3}")
}

/// `25 %`
fn percent(share: Option<f64>) -> String {
    share.map_or("all".to_owned(), |share| format!("{} %", 100.0 * share))
}
