//! `hybrid`: a Mistral that thinks both ways before it speaks, on the command line.
//!
//! ```text
//! cargo install --path . --features cli
//! hybrid generate --model PATH --prompt "Once upon a time"
//! ```

mod chat;
mod dictionary;
mod embed;
mod files;
mod generate;
mod generic;
mod input;
mod inspect;
mod measure;
mod memory;
mod options;
mod stubs;
mod terminal;
mod think;
mod torch;
mod vectors;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// A Mistral that thinks both ways before it speaks.
#[derive(Debug, Parser)]
#[command(name = "hybrid", bin_name = "hybrid", version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Answer prompts, with or without thinking about them first
    Generate(generate::Options),
    /// Chat in the terminal: a line, or what is pasted, is a message; /reset begins anew, /quit leaves
    Chat(chat::Options),
    /// Turn texts into vectors and compare them with each other
    Embed(embed::Options),
    /// Find what vectors of texts have in common, and how much of others it explains
    Generic(generic::Options),
    /// Look into the thought passes over a prompt: drift, tokens, similarity and attention
    Inspect(inspect::Options),
    /// Think about a prompt, and write the thoughts as embeddings for another engine
    Think(think::Options),
    /// Measure whether thinking about the first half of a passage helps to predict the second
    Measure(measure::Options),
    /// Remember texts, find them by what they say, and answer by them
    Memory(memory::Options),
    /// Read the entries of a dictionary once, for models that were trained to look words up in it
    Dictionary(dictionary::Options),
}

fn main() -> ExitCode {
    let Cli { command } = Cli::parse();
    terminal::main(|| match &command {
        Command::Generate(options) => generate::run(options),
        Command::Chat(options) => chat::run(options),
        Command::Embed(options) => embed::run(options),
        Command::Generic(options) => generic::run(options),
        Command::Inspect(options) => inspect::run(options),
        Command::Think(options) => think::run(options),
        Command::Measure(options) => measure::run(options),
        Command::Memory(options) => memory::run(options),
        Command::Dictionary(options) => dictionary::run(options),
    })
}
