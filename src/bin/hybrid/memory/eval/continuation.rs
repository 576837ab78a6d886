//! What says most of how a text goes on? The next part of each is predicted after what is kept of the first.

use hybrid_attention::evaluate::Estimate;
use hybrid_attention::memory::evaluate::{Continuation, Given};
use serde_json::{Value, json};

use super::{Options, Report, bar, estimate, percent};
use crate::terminal::Result;

pub(super) fn run<'a>(options: &Options, lines: impl Iterator<Item = &'a str>) -> Result<Report> {
    let (model, _) = options.model.load()?;
    let passages = options.cut(&model, lines)?;
    let Continuation { ways, shares, .. } = Continuation::default();
    let continuation = Continuation {
        ways: options.ways(ways),
        shares: options.shares.clone().unwrap_or(shares),
        draws: options.draws,
    };
    let bar = bar(passages.len());
    let rows = continuation.run(&model, &passages, || bar.inc(1))?;
    bar.finish_and_clear();
    Ok(Report { json: json(options, &rows), table: table(options, &rows) })
}

/// How much more a row loses than nothing given, and than as many words by chance.
fn differences(rows: &[Given], row: &Given) -> [Option<Estimate>; 2] {
    let than = |name: &str, share| {
        let other = rows.iter().find(|other| other.name == name && other.share == share)?;
        (row.name != name).then(|| Estimate::of_difference(&row.losses, &other.losses))
    };
    [than(Continuation::NOTHING, None), than(Continuation::RANDOM, row.share)]
}

fn json(options: &Options, rows: &[Given]) -> Value {
    let row = |row: &Given| {
        let [nothing, chance] = differences(rows, row);
        json!({
            "name": row.name,
            "share": row.share,
            "tokens": Estimate::of(&row.tokens),
            "loss": Estimate::of(&row.losses),
            "less_nothing": nothing,
            "less_random": chance,
            "losses": row.losses,
        })
    };
    let passages = rows.first().map_or(0, |row| row.losses.len());
    let rows: Vec<Value> = rows.iter().map(row).collect();
    json!({ "passages": passages, "tokens": options.tokens, "rows": rows })
}

/// A Markdown table.
fn table(options: &Options, rows: &[Given]) -> String {
    let mut table = format!(
        "{} texts: the {1} tokens after the first {1}, given what is kept of those. Nats a token, ± standard error; \
         differences text by text.\n\n\
         | tokens kept | which | tokens given | loss | less nothing | less random |\n|---|---|---|---|---|---|\n",
        rows.first().map_or(0, |row| row.losses.len()),
        options.tokens,
    );
    for row in rows {
        let kept =
            if row.name == Continuation::NOTHING { "none".into() } else { percent(row.share) };
        let cells = differences(rows, row).map(|it| it.map_or(String::new(), Estimate::signed));
        table += &format!(
            "| {kept} | {} | {:.1} | {} | {} |\n",
            row.name,
            Estimate::of(&row.tokens).mean,
            estimate(&row.losses),
            cells.join(" | "),
        );
    }
    table
}
