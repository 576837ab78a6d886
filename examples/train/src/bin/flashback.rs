//! The flashback suite by itself: stories to read, the test as a file, and what trained models made
//! of it.
//!
//! ```text
//! cargo run --release --bin flashback -- story --hops 4
//! cargo run --release --bin flashback -- test --out examples/flashback/test.jsonl
//! cargo run --release --bin flashback -- report
//! ```
//!
//! `report` makes the README's table and figure of the records in `runs/flashback`, which are those
//! that `train` leaves behind.

use std::io::{Write, stdout};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use flashback_suite::{LONGEST, Plan, Split, Story};
use hybrid_attention_train::report;
use hybrid_attention_train::terminal::{self, Result};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde_json::json;

/// Stories whose facts come in the wrong order, and who understands them.
#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Tell one story, ask about it, and give the answer away
    Story {
        /// Facts from the question to the answer
        #[arg(long, default_value_t = 3, value_name = "N", value_parser = parse_hops)]
        hops: usize,

        /// Decides the story
        #[arg(long, default_value_t = 1)]
        seed: u64,
    },

    /// Write stories of the test split, with questions and answers, one JSON object a line
    Test {
        /// The file to write
        #[arg(long, value_name = "F")]
        out: PathBuf,

        /// Stories for each length of chain
        #[arg(long, default_value_t = 20, value_name = "N")]
        stories: usize,

        /// Decides the stories
        #[arg(long, default_value_t = 2026)]
        seed: u64,
    },

    /// Print the table of recorded runs and draw the figure
    Report {
        /// Where the records are
        #[arg(long, value_name = "DIR", default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/runs/flashback"))]
        runs: PathBuf,

        /// Where the figure goes, as SVG
        #[arg(long, value_name = "F", default_value = concat!(env!("CARGO_MANIFEST_DIR"), "/accuracy.svg"))]
        figure: PathBuf,
    },
}

fn parse_hops(text: &str) -> std::result::Result<usize, String> {
    let hops = text.parse().ok().filter(|hops| (1..=LONGEST).contains(hops));
    hops.ok_or_else(|| format!("expected 1 to {LONGEST}"))
}

fn main() -> ExitCode {
    terminal::main(|| match Cli::parse().command {
        Command::Story { hops, seed } => tell(hops, seed),
        Command::Test { out, stories, seed } => write_test(&out, stories, seed),
        Command::Report { runs, figure } => report(&runs, &figure),
    })
}

/// A story of the test split that holds a chain of `hops` facts.
fn draw(hops: usize, rng: &mut ChaCha8Rng) -> Story {
    Story::draw(&Plan::examination(Split::Test, hops), rng)
}

fn tell(hops: usize, seed: u64) -> Result<()> {
    let story = draw(hops, &mut ChaCha8Rng::seed_from_u64(seed));
    let question = story.question_of(hops).ok_or("no such question")?;
    writeln!(stdout(), "{}{} {}", story.text(), story.ask(question), question.answer)?;
    Ok(())
}

fn write_test(path: &Path, stories: usize, seed: u64) -> Result<()> {
    terminal::check_folder(path)?;
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    terminal::write(path, |out| {
        for hops in 1..=LONGEST {
            for _ in 0..stories {
                let story = draw(hops, &mut rng);
                let Some(question) = story.question_of(hops) else { continue };
                let line = json!({
                    "story": story.text(),
                    "question": story.ask(question),
                    "answer": question.answer,
                    "hops": hops,
                    "chains": story.ends,
                });
                writeln!(out, "{line}")?;
            }
        }
        Ok(())
    })
}
