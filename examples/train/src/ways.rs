//! Ways to do a task, side by side: what each came to item by item, and what it took; of one run, or of several.

use std::io::{Write, stdout};
use std::path::Path;

use hybrid_attention::evaluate::Estimate;
use serde::{Deserialize, Serialize};

use crate::terminal::{self, Result};

/// A way, measured.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Way {
    pub(crate) name: String,
    /// The nats of each item.
    pub(crate) losses: Vec<f64>,
    /// Whether each is right, 1 or 0; none where that is not counted.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(crate) right: Vec<f64>,
    /// Of an item: tokens that are read, and seconds.
    pub(crate) tokens: f64,
    pub(crate) seconds: f64,
}

/// Several of them, of the same items; the others are compared with the first.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Ways(Vec<Way>);

/// What a table says of a way.
struct Row {
    name: String,
    seeds: usize,
    loss: Estimate,
    less: Estimate,
    right: Option<Estimate>,
    tokens: f64,
    seconds: f64,
}

impl Ways {
    pub(crate) fn new(ways: Vec<Way>) -> Self {
        Self(ways)
    }

    /// A Markdown table; `losses` says what they are of.
    pub(crate) fn table(&self, losses: &str) -> String {
        let rows: Vec<Row> = self.rows().collect();
        let items = self.0.first().map_or(0, |way| way.losses.len());
        format!("{items} items. {losses}, mean ± standard error.\n\n{}", table(&rows))
    }

    fn rows(&self) -> impl Iterator<Item = Row> {
        let first = self.0.first();
        self.0.iter().map(move |way| Row {
            name: way.name.clone(),
            seeds: 1,
            loss: Estimate::of(&way.losses),
            less: Estimate::of_difference(
                &way.losses,
                first.map_or(&[], |first| first.losses.as_slice()),
            ),
            right: (!way.right.is_empty()).then(|| Estimate::of(&way.right)),
            tokens: way.tokens,
            seconds: way.seconds,
        })
    }
}

/// Prints the table of all records of a folder, whose runs were examined on the same items: means over the runs that have
/// a way, ± their standard deviation, or of a single one the standard error over its items.
///
/// # Errors
/// When there are no such records, or one cannot be read.
pub fn report_ways(runs: &Path) -> Result<()> {
    #[derive(Deserialize)]
    struct Record {
        ways: Ways,
    }
    let mut rows = Vec::<Vec<Row>>::new();
    for path in terminal::records(runs)? {
        let record: Record = terminal::read_record(&path)?;
        for row in record.ways.rows() {
            match rows.iter_mut().find(|rows| rows.iter().any(|other| other.name == row.name)) {
                Some(same) => same.push(row),
                None => rows.push(vec![row]),
            }
        }
    }
    let rows: Vec<Row> = rows.into_iter().filter_map(over_seeds).collect();
    write!(stdout(), "{}", table(&rows))?;
    Ok(())
}

/// Of rows of the same way, their means and how far these lie apart.
fn over_seeds(rows: Vec<Row>) -> Option<Row> {
    let [first, others @ ..] = rows.as_slice() else { return None };
    if others.is_empty() {
        return rows.into_iter().next();
    }
    let of = |value: &dyn Fn(&Row) -> f64| -> Estimate {
        spread(&rows.iter().map(value).collect::<Vec<_>>())
    };
    let right = rows.iter().filter_map(|row| Some(row.right?.mean)).collect::<Vec<_>>();
    Some(Row {
        name: first.name.clone(),
        seeds: rows.len(),
        loss: of(&|row| row.loss.mean),
        less: of(&|row| row.less.mean),
        right: (right.len() == rows.len()).then(|| spread(&right)),
        tokens: of(&|row| row.tokens).mean,
        seconds: of(&|row| row.seconds).mean,
    })
}

/// The mean of some runs, and the standard deviation in the place of the standard error.
pub(crate) fn spread(values: &[f64]) -> Estimate {
    let Estimate { mean, standard_error } = Estimate::of(values);
    Estimate { mean, standard_error: standard_error * (values.len() as f64).sqrt() }
}

/// `0.312 ± 0.004`
pub(crate) fn shown(it: &Estimate) -> String {
    format!("{:.3} ± {:.3}", it.mean, it.standard_error)
}

fn table(rows: &[Row]) -> String {
    let counts = rows.iter().any(|row| row.right.is_some());
    let right = if counts { " right |" } else { "" };
    let first = rows.first().map_or("", |row| row.name.as_str());
    let mut table = format!(
        "| | seeds | loss | less {first} |{right} tokens | ms |\n|{}\n",
        "---|".repeat(6 + usize::from(counts))
    );
    for Row { name, seeds, loss, less, right, tokens, seconds } in rows {
        let (loss, less, ms) = (shown(loss), less.signed(), seconds * 1e3);
        let right = match (counts, right) {
            (true, Some(right)) => format!(" {} |", shown(right)),
            (true, None) => " |".to_string(),
            (false, _) => String::new(),
        };
        table +=
            &format!("| {name} | {seeds} | {loss} | {less} |{right} {tokens:.0} | {ms:.0} |\n");
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    fn way(name: &str, losses: &[f64]) -> Way {
        let (losses, right) = (losses.to_vec(), Vec::new());
        Way { name: name.into(), losses, right, tokens: 10.0, seconds: 0.002 }
    }

    #[test]
    fn runs_of_the_same_way_are_one_row() -> Result<()> {
        let folder = tempfile::tempdir()?;
        for (file, trained) in [("a.json", [1.0, 3.0]), ("b.json", [3.0, 5.0])] {
            let ways = Ways::new(vec![way("nothing", &[4.0, 6.0]), way("trained", &trained)]);
            let record = serde_json::json!({ "ways": ways, "seconds": 1.0 });
            std::fs::write(folder.path().join(file), record.to_string())?;
        }
        let mut rows = Vec::new();
        for seed in [[1.0, 3.0], [3.0, 5.0]] {
            let ways = Ways::new(vec![way("nothing", &[4.0, 6.0]), way("trained", &seed)]);
            rows.extend(ways.rows().nth(1));
        }
        let row = over_seeds(rows).ok_or("no row")?;
        // The means of the seeds are 2 and 4, of which 1.414 is the standard deviation.
        assert_eq!((row.loss.mean, row.less.mean, row.seeds), (3.0, -2.0, 2));
        assert!((row.loss.standard_error - 2f64.sqrt()).abs() < 1e-12);
        report_ways(folder.path())?;
        assert!(report_ways(&folder.path().join("none")).is_err());
        let table = table(&[row]);
        assert!(
            table.contains("| trained | 2 | 3.000 ± 1.414 | -2.000 ± 1.414 | 10 | 2 |"),
            "{table}"
        );
        Ok(())
    }
}
