//! Does it help to write several answers side by side and drop the worst? And what does it cost?
//!
//! ```text
//! cargo bench --bench candidates -- flashback                                 # the small model's own stories
//! benches/texts.sh target/texts
//! cargo bench --bench candidates -- questions target/texts/asdiv.jsonl        # SmolLM2, sums in words
//! cargo bench --bench candidates -- passages target/texts/lee.txt             # SmolLM2, how news goes on
//! cargo bench --bench candidates -- cost                                      # 16 stubs beside one answer
//! ```
//!
//! Every way to choose is run on the same items with the same seeds, so that differences are taken item by item.
//! Beside each stands dropping at random with the same rounds, which writes as many tokens. Figures of items are
//! appended to a file, `--out`, and what is there is not run again: a run can be stopped and taken up, and `--items` of as
//! many as there are gives the table of them. `--items 2` is a quick look at whether all of it works.
//!
//! The first items, `--timed` of them, are run way by way. For the others candidates are written once, and each way chooses
//! among the same ones.

#![allow(clippy::print_stdout, clippy::print_stderr, reason = "a program")]

mod cost;
mod record;
mod replay;
mod tasks;
mod ways;

use std::path::PathBuf;

use record::Record;
use tasks::Task;

pub(crate) type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

const USAGE: &str = "expected flashback, questions FILE, passages FILE or cost; then maybe --items N, --timed N and --out FILE";

fn main() -> Result<()> {
    // Cargo adds an option of its own.
    let arguments: Vec<String> = std::env::args().skip(1).filter(|it| it != "--bench").collect();
    let (mut words, mut items, mut timed, mut out) = (Vec::new(), None, None, None);
    let mut arguments = arguments.into_iter();
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--items" => items = Some(arguments.next().ok_or(USAGE)?.parse::<usize>()?),
            "--timed" => timed = Some(arguments.next().ok_or(USAGE)?.parse::<usize>()?),
            "--out" => out = Some(PathBuf::from(arguments.next().ok_or(USAGE)?)),
            _ => words.push(argument),
        }
    }
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let task = match words.as_slice() {
        ["cost"] => return cost::run(),
        ["flashback"] => Task::flashback(items.unwrap_or(240))?,
        ["questions", file] => Task::questions(file.as_ref(), items.unwrap_or(240))?,
        ["passages", file] => Task::passages(file.as_ref(), items.unwrap_or(usize::MAX))?,
        _ => return Err(USAGE.into()),
    };
    let mut record = Record::open(out)?;
    let timed = timed.unwrap_or(task.timed);
    // Item by item: if it is stopped, all ways have come as far.
    for (index, item) in task.items.iter().enumerate() {
        ways::run(&task, (index, item), index < timed, &mut record)?;
        eprintln!("[{}: {} of {}]", task.name, index + 1, task.items.len());
    }
    println!("{}", record.table(&task));
    Ok(())
}
