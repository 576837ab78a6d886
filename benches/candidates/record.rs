//! What came of every item, kept in a file, and the table of it.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::PathBuf;

use hybrid_attention::evaluate::Estimate;
use serde_json::{Value, json};

use crate::Result;
use crate::tasks::Task;
use crate::ways::{self, Way};

/// What came of an item.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Done {
    pub(crate) figure: f64,
    /// Those of all candidates.
    pub(crate) tokens: usize,
    /// Where it was run by itself.
    pub(crate) seconds: Option<f64>,
}

/// By the name of the way and the number of the item.
pub(crate) struct Record {
    done: HashMap<(String, usize), Done>,
    file: Option<File>,
}

impl Record {
    /// With what is in the file, if there is one.
    pub(crate) fn open(path: Option<PathBuf>) -> Result<Self> {
        let Some(path) = path else { return Ok(Self { done: HashMap::new(), file: None }) };
        let text = if path.exists() { std::fs::read_to_string(&path)? } else { String::new() };
        // A run that was stopped may have left half a line.
        let lines = text.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
        let read = |line: Value| -> Option<((String, usize), Done)> {
            let key = (line["way"].as_str()?.to_owned(), line["item"].as_u64()? as usize);
            let tokens = line["tokens"].as_u64()? as usize;
            let (figure, seconds) = (line["figure"].as_f64()?, line["seconds"].as_f64());
            Some((key, Done { figure, tokens, seconds }))
        };
        let done = lines.filter_map(read).collect();
        let mut file = OpenOptions::new().create(true).append(true).open(path)?;
        if !text.is_empty() && !text.ends_with('\n') {
            writeln!(file)?;
        }
        Ok(Self { done, file: Some(file) })
    }

    pub(crate) fn get(&self, way: &str, item: usize) -> Option<Done> {
        self.done.get(&(way.to_owned(), item)).copied()
    }

    pub(crate) fn add(&mut self, way: &str, item: usize, done: Done) -> Result<()> {
        if let Some(file) = &mut self.file {
            let Done { figure, tokens, seconds } = done;
            let line = json!({ "way": way, "item": item, "figure": figure, "tokens": tokens, "seconds": seconds });
            writeln!(file, "{line}")?;
        }
        self.done.insert((way.to_owned(), item), done);
        Ok(())
    }

    /// The figures of a way, item by item.
    fn of(&self, way: &str, items: usize) -> Vec<Done> {
        (0..items).filter_map(|item| self.get(way, item)).collect()
    }

    /// A Markdown table.
    pub(crate) fn table(&self, task: &Task) -> String {
        let count = task.items.len();
        let ways = ways::all(task);
        let seconds = |way: &Way, item| self.get(&way.name, item).and_then(|done| done.seconds);
        // What others took is compared with nothing.
        let timed: Vec<usize> = (0..count)
            .filter(|&item| ways.iter().all(|way| seconds(way, item).is_some()))
            .collect();
        let mut table = format!(
            "{count} items of {}: {}, mean ± standard error; differences item by item, in brackets how many of their \
             standard errors. Of candidates, dropping at random is of the same kind. Seconds are those of {} items.\n\n\
             | way | figure | less greedy | less dropping at random | tokens | seconds |\n|---|---|---|---|---|---|\n",
            task.name,
            task.figure,
            timed.len(),
        );
        let figures = |way: &str| -> Vec<f64> {
            self.of(way, count).iter().map(|done| done.figure).collect()
        };
        let greedy = figures("greedy");
        for way in &ways {
            let own = self.of(&way.name, count);
            let values = figures(&way.name);
            let mean = |of: Vec<f64>| of.iter().sum::<f64>() / of.len() as f64;
            let seconds = match timed.len() {
                0 => String::new(),
                _ => {
                    let of = timed.iter().filter_map(|&item| seconds(way, item));
                    format!("{:.3}", mean(of.collect()))
                }
            };
            let random = way.name.split_once(", ").map(|(kind, _)| format!("{kind}, random"));
            let random = random.filter(|random| *random != way.name).map(|random| figures(&random));
            let Estimate { mean: figure, standard_error } = Estimate::of(&values);
            table += &format!(
                "| {} | {figure:.3} ± {standard_error:.3} | {} | {} | {:.1} | {seconds} |\n",
                way.name,
                if way.name == "greedy" { String::new() } else { less(&values, &greedy) },
                random.map_or_else(String::new, |random| less(&values, &random)),
                mean(own.iter().map(|done| done.tokens as f64).collect()),
            );
        }
        table
    }
}

/// `+0.031 ± 0.010 (3.1)`
fn less(values: &[f64], base: &[f64]) -> String {
    let difference = Estimate::of_difference(values, base);
    let Estimate { mean, standard_error } = difference;
    // Where all items come to the same, there is nothing to be off by.
    let errors = if standard_error > 0.0 { mean / standard_error } else { 0.0 };
    format!("{} ({errors:.1})", difference.signed())
}
