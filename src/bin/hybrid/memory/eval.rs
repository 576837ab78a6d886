//! `hybrid memory eval`: what finds texts best?
//!
//! Each text is cut in two; the first part is stored, and the second asks for it among the first parts of all.
//!
//! ```text
//! benches/texts.sh target/texts
//! hybrid memory eval --model PATH --texts target/texts/lee.txt
//! ```
//!
//! Words by chance are drawn with fixed seeds: the same model and texts give the same table.

use std::io::{Write, stdout};
use std::path::PathBuf;

use clap::Args;
use hybrid_attention::evaluate::Estimate;
use hybrid_attention::memory::evaluate::{Compared, Passage, Retrieval, Row};
use serde_json::{Value, json};

use crate::files::read_text;
use crate::options::ModelArgs;
use crate::terminal::{self, Result};

#[derive(Args, Debug)]
#[command(next_help_heading = "Texts")]
pub(crate) struct Options {
    /// A UTF-8 file of texts, one a line; those that are too short are skipped
    #[arg(long, value_name = "F")]
    texts: PathBuf,

    /// The most texts to take, from the first on
    #[arg(long, value_name = "N")]
    passages: Option<usize>,

    /// Tokens of each part
    #[arg(long, default_value_t = 96, value_name = "N")]
    tokens: usize,

    /// Shares of the tokens that are kept
    #[arg(long, value_name = "S,S", value_delimiter = ',', default_values_t = [0.12, 0.25, 0.5])]
    shares: Vec<f64>,

    /// How often words are drawn by chance
    #[arg(long, default_value_t = 5, value_name = "N")]
    draws: u64,

    /// Print a JSON object instead of a table, with the figures of each text
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    model: ModelArgs,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let lines = read_text(&options.texts)?;
    let (model, _) = options.model.load()?;
    let most = options.passages.unwrap_or(usize::MAX);
    let cut = lines.lines().filter_map(|l| Passage::cut(&model, l, options.tokens).transpose());
    let passages = cut.take(most).collect::<hybrid_attention::Result<Vec<_>>>()?;
    let retrieval =
        Retrieval { shares: options.shares.clone(), draws: options.draws, ..Retrieval::default() };
    let bar = terminal::bar(passages.len() as u64, "reading [{bar:30}] {pos}/{len}, {eta} to go");
    bar.tick();
    let rows = retrieval.run(&model, &passages, || bar.inc(1))?;
    bar.finish_and_clear();
    match options.json {
        true => Ok(writeln!(stdout(), "{}", json(options, &rows))?),
        false => Ok(write!(stdout(), "{}", table(options, passages.len(), &rows))?),
    }
}

/// What a row is compared with: all of each text, and as many tokens by chance.
fn controls<'a>(rows: &'a [Row], row: &Row) -> [Option<&'a Row>; 2] {
    let whole = rows.iter().find(|other| other.name == Retrieval::WHOLE);
    let chance = rows.iter().find(|other| {
        other.name == Retrieval::RANDOM
            && (other.compared, other.share) == (row.compared, row.share)
    });
    [
        whole.filter(|_| row.name != Retrieval::WHOLE),
        chance.filter(|_| row.name != Retrieval::RANDOM),
    ]
}

fn difference(row: &Row, other: &Row) -> Estimate {
    Estimate::of_difference(&row.reciprocal_ranks, &other.reciprocal_ranks)
}

fn json(options: &Options, rows: &[Row]) -> Value {
    let row = |row: &Row| {
        let [whole, chance] = controls(rows, row);
        json!({
            "name": row.name,
            "compared": row.compared,
            "share": row.share,
            "mrr": Estimate::of(&row.reciprocal_ranks),
            "recall_at_1": Estimate::of(&row.found_first),
            "less_whole": whole.map(|whole| difference(row, whole)),
            "less_random": chance.map(|chance| difference(row, chance)),
            "reciprocal_ranks": row.reciprocal_ranks,
        })
    };
    let passages = rows.first().map_or(0, |row| row.reciprocal_ranks.len());
    let rows: Vec<Value> = rows.iter().map(row).collect();
    json!({ "passages": passages, "tokens": options.tokens, "rows": rows })
}

/// A Markdown table.
fn table(options: &Options, passages: usize, rows: &[Row]) -> String {
    let mut table = format!(
        "{passages} texts: the first {0} tokens of each are found by the next {0}. MRR and recall@1, ± standard error; \
         differences of MRR text by text.\n\n\
         | compared | tokens kept | which | MRR | less whole | less random | recall@1 |\n|---|---|---|---|---|---|---|\n",
        options.tokens,
    );
    for row in rows {
        let compared = match row.compared {
            Compared::Counts => "counts of words",
            Compared::Words => "a vector a token",
            _ => "one vector",
        };
        let share = row.share.map_or("all".to_owned(), |share| format!("{} %", 100.0 * share));
        let plain = |values: &[f64]| {
            let Estimate { mean, standard_error } = Estimate::of(values);
            format!("{mean:.3} ± {standard_error:.3}")
        };
        let cells = controls(rows, row)
            .map(|other| other.map_or(String::new(), |other| difference(row, other).signed()));
        table += &format!(
            "| {compared} | {share} | {} | {} | {} | {} |\n",
            row.name,
            plain(&row.reciprocal_ranks),
            cells.join(" | "),
            plain(&row.found_first),
        );
    }
    table
}
