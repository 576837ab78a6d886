//! `hybrid memory`: texts that are kept, found by what they say, and put in front of a question.

mod add;
mod ask;
mod documents;
mod eval;
mod how;
mod keep;

use clap::{Args, Subcommand};

use crate::terminal::Result;

#[derive(Args, Debug)]
pub(crate) struct Options {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Remember the texts of files; prints a JSON object for each note
    Add(add::Options),
    /// Find the notes that fit a question, and answer it by them
    Ask(ask::Options),
    /// Print what is remembered
    List(keep::ListOptions),
    /// Remove notes for good
    Forget(keep::ForgetOptions),
    /// Remember the notes that `list --json` of this or another store printed
    Import(keep::ImportOptions),
    /// Measure what finds texts best and says most of them, all of a text, its main point or words by chance, and what
    /// is recalled of conversations
    Eval(eval::Options),
    /// Measure documents that are read once: seconds to the first token, bytes, and what is lost when several are put
    /// together
    Documents(documents::Options),
}

pub(crate) fn run(options: &Options) -> Result<()> {
    match &options.command {
        Command::Add(options) => add::run(options),
        Command::Ask(options) => ask::run(options),
        Command::List(options) => keep::list(options),
        Command::Forget(options) => keep::forget(options),
        Command::Import(options) => keep::import(options),
        Command::Eval(options) => eval::run(options),
        Command::Documents(options) => documents::run(options),
    }
}
