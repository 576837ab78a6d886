//! `hybrid memory list`, `forget` and `import`: what a store holds.

use std::fs::File;
use std::io::{BufReader, Write, stdout};
use std::path::PathBuf;

use clap::Args;
use hybrid_attention::memory::store::{Store, records};
use hybrid_attention::memory::{NoteId, Record};

use super::how::{NewStoreArgs, StoreArgs};
use crate::files::check_folder;
use crate::options::ModelArgs;
use crate::terminal::{self, Result};

/// Characters of a text that are shown of it.
const SHOWN: usize = 72;

#[derive(Args, Debug)]
#[command(next_help_heading = "Notes")]
pub(crate) struct ListOptions {
    /// Print a JSON object a line, with all that is known of each note but its vectors: what `import` reads
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    store: StoreArgs,
}

pub(crate) fn list(options: &ListOptions) -> Result<()> {
    let store = options.store.existing()?;
    let mut out = stdout().lock();
    for record in records(&store) {
        let record = record?;
        match options.json {
            true => writeln!(out, "{}", serde_json::to_string(&record)?)?,
            false => writeln!(out, "{}", line(&record))?,
        }
    }
    Ok(())
}

/// A note on one line: its name, what is past, and how it begins.
fn line(record: &Record) -> String {
    let words = record.text.split_whitespace().collect::<Vec<_>>().join(" ");
    let plain: String = words.chars().flat_map(terminal::plain).collect();
    let text = match plain.chars().count() <= SHOWN {
        true => plain,
        false => plain.chars().take(SHOWN - 1).chain(['…']).collect(),
    };
    let past = record.superseded_by.map(|id| format!(" (superseded by {id})"));
    format!("{}{} {text}", record.id, past.unwrap_or_default())
}

#[derive(Args, Debug)]
#[command(next_help_heading = "Notes")]
pub(crate) struct ForgetOptions {
    /// The names of the notes, as add and list print them
    #[arg(value_name = "ID", required = true)]
    ids: Vec<NoteId>,

    #[command(flatten)]
    store: StoreArgs,
}

pub(crate) fn forget(options: &ForgetOptions) -> Result<()> {
    let store = options.store.existing()?;
    for id in &options.ids {
        if store.get(*id)?.is_none() {
            return Err(format!("{}: no note {id}", options.store.store.display()).into());
        }
    }
    for id in &options.ids {
        store.remove(*id)?;
    }
    Ok(())
}

#[derive(Args, Debug)]
#[command(next_help_heading = "Notes")]
pub(crate) struct ImportOptions {
    /// A file of notes as `list --json` prints them
    #[arg(value_name = "FILE")]
    file: PathBuf,

    #[command(flatten)]
    store: NewStoreArgs,

    #[command(flatten)]
    model: ModelArgs,
}

pub(crate) fn import(options: &ImportOptions) -> Result<()> {
    let named = |error: &dyn std::fmt::Display| format!("{}: {error}", options.file.display());
    let file = File::open(&options.file).map_err(|error| named(&error))?;
    options.store.embedding()?; // before waiting for the weights
    check_folder(options.store.path())?;
    let (model, _) = options.model.load()?;
    let memory = options.store.open(&model)?;
    let count = memory.import(&mut BufReader::new(file)).map_err(|error| named(&error))?;
    terminal::say(&format!("[{count} notes]"));
    Ok(())
}
