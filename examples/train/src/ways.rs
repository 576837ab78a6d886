//! Ways to do a task, side by side: what each came to item by item, and what it took; of one run, or of several.

use std::io::{Write, stdout};
use std::path::{Path, PathBuf};

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

impl Ways {
    pub(crate) fn new(ways: Vec<Way>) -> Self {
        Self(ways)
    }

    /// A Markdown table; `losses` says what they are of.
    pub(crate) fn table(&self, losses: &str) -> String {
        let items = self.0.first().map_or(0, |way| way.losses.len());
        let table = table(std::slice::from_ref(self));
        format!("{items} items. {losses}, mean ± standard error.\n\n{table}")
    }

    /// A way by its name, and the first one.
    fn find(&self, name: &str) -> Option<(&Way, &Way)> {
        Some((self.0.iter().find(|way| way.name == name)?, self.0.first()?))
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
    let read = |path: &PathBuf| Ok(terminal::read_record::<Record>(path)?.ways);
    let runs = terminal::records(runs)?.iter().map(read).collect::<Result<Vec<_>>>()?;
    write!(stdout(), "{}", table(&runs))?;
    Ok(())
}

/// The mean of one run, item by item, and its standard error; of several the mean of their means, and the standard deviation
/// of these in its place.
pub(crate) fn over_runs(runs: &[Vec<f64>]) -> Estimate {
    if let [one] = runs {
        return Estimate::of(one);
    }
    let means: Vec<f64> = runs.iter().map(|run| Estimate::of(run).mean).collect();
    let Estimate { mean, standard_error } = Estimate::of(&means);
    Estimate { mean, standard_error: standard_error * (means.len() as f64).sqrt() }
}

/// Item by item.
pub(crate) fn less(values: &[f64], base: &[f64]) -> Vec<f64> {
    values.iter().zip(base).map(|(value, base)| value - base).collect()
}

/// `0.312 ± 0.004`
pub(crate) fn shown(it: &Estimate) -> String {
    format!("{:.3} ± {:.3}", it.mean, it.standard_error)
}

/// The ways of all runs, each where it first occurs.
fn table(runs: &[Ways]) -> String {
    let mut names: Vec<&str> = Vec::new();
    for way in runs.iter().flat_map(|run| &run.0) {
        if !names.contains(&way.name.as_str()) {
            names.push(&way.name);
        }
    }
    let counts = runs.iter().flat_map(|run| &run.0).any(|way| !way.right.is_empty());
    let right = if counts { " right |" } else { "" };
    let mut table = format!(
        "| | seeds | loss | less {} |{right} tokens | ms |\n|{}\n",
        names.first().unwrap_or(&""),
        "---|".repeat(6 + usize::from(counts))
    );
    for name in names {
        let found: Vec<(&Way, &Way)> = runs.iter().filter_map(|run| run.find(name)).collect();
        let of = |figures: fn(&(&Way, &Way)) -> Vec<f64>| {
            over_runs(&found.iter().map(figures).collect::<Vec<_>>())
        };
        let mean = |figure: fn(&Way) -> f64| {
            found.iter().map(|(way, _)| figure(way)).sum::<f64>() / found.len() as f64
        };
        let right = match counts {
            true if found.iter().all(|(way, _)| !way.right.is_empty()) => {
                format!(" {} |", shown(&of(|(way, _)| way.right.clone())))
            }
            true => " |".to_string(),
            false => String::new(),
        };
        table += &format!(
            "| {name} | {} | {} | {} |{right} {:.0} | {:.0} |\n",
            found.len(),
            shown(&of(|(way, _)| way.losses.clone())),
            of(|(way, first)| less(&way.losses, &first.losses)).signed(),
            mean(|way| way.tokens),
            mean(|way| way.seconds * 1e3)
        );
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
        let runs = [[1.0, 3.0], [3.0, 5.0]]
            .map(|trained| Ways::new(vec![way("nothing", &[4.0, 6.0]), way("trained", &trained)]));
        // The means of the seeds are 2 and 4, of which 1.414 is the standard deviation.
        let both = table(&runs);
        assert!(
            both.contains("| trained | 2 | 3.000 ± 1.414 | -2.000 ± 1.414 | 10 | 2 |"),
            "{both}"
        );
        assert!(
            both.contains("| nothing | 2 | 5.000 ± 0.000 | +0.000 ± 0.000 | 10 | 2 |"),
            "{both}"
        );
        let [one, _] = runs;
        let one = one.table("Nats");
        assert!(one.contains("| trained | 1 | 2.000 ± 1.000 | -3.000 ± 0.000 | 10 | 2 |"), "{one}");
        report_ways(folder.path())?;
        assert!(report_ways(&folder.path().join("none")).is_err());
        Ok(())
    }
}
