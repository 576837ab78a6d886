//! Teaches a model to think.
//!
//! ```text
//! cargo run --release --bin train -- --out target/runs/both-ways-1
//! ```
//!
//! trains a small model from nothing on the flashback suite (see `examples/flashback`), and
//!
//! ```text
//! cargo run --release --bin train -- --out target/runs/smollm2-both-ways --rank 8 \
//!     --model SmolLM2-135M-Instruct.Q4_1.gguf --text gensim/test/test_data/lee_background.cor
//! ```
//!
//! an adapter for the thought passes of a checkpoint on a text, one passage a line, of which every
//! fifth is held out for the examination. `--arm no-passes` makes it a plain causal adapter, the
//! control of the same size; without `--rank` all weights are trained.
//!
//! A run that was stopped, for whatever reason, continues when the same command is given again, and ends
//! as if it had never been interrupted.

use std::process::ExitCode;

use clap::Parser;
use hybrid_attention_train::{Options, terminal, train};

fn main() -> ExitCode {
    terminal::main(|| train(&Options::parse()))
}
