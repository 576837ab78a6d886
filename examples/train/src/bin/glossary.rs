//! The glossary suite: its stories, and what explains their words best.
//!
//! ```text
//! R=target/runs
//! cargo run --release --bin train -- --suite glossary --arm no-passes --span 1..5 --out $R/base
//! cargo run --release --bin train -- --suite glossary --arm no-passes --model $R/base --dictionary 8 --steps 1000 \
//!     --out $R/beside
//! cargo run --release --bin train -- --suite glossary --arm no-passes --model $R/base --rank 3 --steps 1000 \
//!     --target q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj --out $R/adapter
//! cargo run --release --bin glossary -- arms --base $R/base --dictionary $R/beside --adapter $R/adapter
//! ```

use std::io::{Write, stdout};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Parser, Subcommand};
use flashback_suite::{Called, Glossary, Split, TALE_FACTS, Tale};
use hybrid_attention_train::terminal::{self, Result};
use hybrid_attention_train::{Arms, arms, report_arms, report_ways};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

/// Stories in words that a glossary explains, and who understands them.
#[derive(Parser)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Tell one story after the definitions of its words
    Story {
        /// Decides the story
        #[arg(long, default_value_t = 1)]
        seed: u64,
    },

    /// Compare what explains the words: definitions in the prompt, a dictionary beside it, an adapter, or nothing
    Arms(Arms),

    /// Print the table of comparisons that are recorded, of several seeds
    Report {
        /// Where they are: what `arms --out` writes
        #[arg(long, value_name = "DIR")]
        runs: PathBuf,
    },

    /// Print the table of recorded runs of `train --entries`
    Entries {
        /// Where their records are, copied together under names of their own
        #[arg(long, value_name = "DIR")]
        runs: PathBuf,
    },
}

fn main() -> ExitCode {
    terminal::main(|| match Cli::parse().command {
        Command::Story { seed } => tell(seed),
        Command::Arms(how) => arms(&how),
        Command::Report { runs } => report_arms(&runs),
        Command::Entries { runs } => report_ways(&runs),
    })
}

fn tell(seed: u64) -> Result<()> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let glossary = Glossary::draw(Split::Test, TALE_FACTS, &mut rng);
    let tale = Tale::draw(&glossary, TALE_FACTS, &mut rng);
    let definitions = tale.definitions(&glossary, TALE_FACTS, &mut rng);
    writeln!(stdout(), "{}.", tale.text(Called::Words, &definitions))?;
    Ok(())
}
