//! What finds texts best? The first part of each is stored, and the next asks for it among the first parts of all.

use hybrid_attention::evaluate::Estimate;
use hybrid_attention::memory::evaluate::{Compared, Retrieval, Row};
use serde_json::{Value, json};

use super::{Options, Report, bar, estimate, percent};
use crate::terminal::Result;

pub(super) fn run<'a>(options: &Options, lines: impl Iterator<Item = &'a str>) -> Result<Report> {
    let (model, _) = options.model.load()?;
    let passages = options.cut(&model, lines)?;
    let Retrieval { ways, shares, .. } = Retrieval::default();
    let retrieval = Retrieval {
        ways: options.ways(ways),
        shares: options.shares.clone().unwrap_or(shares),
        draws: options.draws,
    };
    let bar = bar(passages.len());
    let rows = retrieval.run(&model, &passages, || bar.inc(1))?;
    bar.finish_and_clear();
    Ok(Report { json: json(options, &rows), table: table(options, passages.len(), &rows) })
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
        let share = percent(row.share);
        let cells = controls(rows, row)
            .map(|other| other.map_or(String::new(), |other| difference(row, other).signed()));
        table += &format!(
            "| {compared} | {share} | {} | {} | {} | {} |\n",
            row.name,
            estimate(&row.reciprocal_ranks),
            cells.join(" | "),
            estimate(&row.found_first),
        );
    }
    table
}
