//! Teaches a model to think.
//!
//! ```text
//! cargo run --release --example train -- --out target/runs/both-ways-1
//! ```
//!
//! trains a small model from nothing on the flashback suite (see `examples/flashback`). A run that was
//! stopped, in whatever way, goes on when the same command is given again, and ends as if it had
//! never been.

#[path = "../common/mod.rs"]
mod common;
#[path = "../flashback/suite/mod.rs"]
mod suite;

mod adamw;
mod lessons;
mod record;
mod settings;
mod trainee;

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use candle_core::{D, Tensor};
use candle_nn::loss::cross_entropy;
use clap::Parser;
use hybrid_attention::model::Transformer;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use crate::adamw::AdamW;
use crate::common::Result;
use crate::lessons::Batch;
use crate::record::{Run, Saved};
use crate::settings::{Arm, Settings};
use crate::suite::{Vocabulary, read};
use crate::trainee::Trainee;

/// Train a small model on the flashback suite.
#[derive(Parser)]
struct Cli {
    /// The folder of this run: where it is saved and goes on from, and where its results go
    #[arg(long, value_name = "DIR")]
    out: PathBuf,

    /// The method, or a control
    #[arg(long, value_enum, default_value_t = Arm::BothWays)]
    arm: Arm,

    /// Decides the first weights and every text
    #[arg(long, default_value_t = 1)]
    seed: u64,

    /// Steps of the whole run
    #[arg(long, default_value_t = 6000, value_name = "N")]
    steps: usize,

    /// Texts in each step
    #[arg(long, default_value_t = 64, value_name = "N")]
    batch: usize,

    /// The learning rate after the warm-up
    #[arg(long, default_value_t = 2e-3)]
    lr: f64,

    /// The layers that a thought pass runs; one more follows
    #[arg(long, default_value = "1..3", value_name = "A..B", value_parser = common::parse_span)]
    span: std::ops::Range<usize>,

    /// Let gradients flow through the last K passes only [default: all]
    #[arg(long, value_name = "K")]
    gradient_passes: Option<usize>,

    /// Steps between two saved states; a run that is killed does at most as many again
    #[arg(long, default_value_t = 100, value_name = "N")]
    save_every: usize,

    /// Stories for each length of chain in the examination at the end
    #[arg(long, default_value_t = 300, value_name = "N")]
    stories: usize,
}

/// Gradients longer than this are cut to it.
const LONGEST_GRADIENT: f64 = 1.0;

fn main() -> ExitCode {
    common::main(|| {
        let cli = Cli::parse();
        let settings = Settings {
            arm: cli.arm,
            seed: cli.seed,
            steps: cli.steps,
            batch: cli.batch,
            lr: cli.lr,
            warm_up: 100,
            span: (cli.span.start, cli.span.end),
            gradient_passes: cli.gradient_passes.unwrap_or(settings::MOST_PASSES),
        };
        settings.check()?;
        let vocabulary = Vocabulary::new();
        let trainee = Trainee::for_flashback(&settings, &vocabulary)?;
        let run = Run::open(&cli.out, &settings)?;
        let saved = train(&cli, &settings, &vocabulary, &trainee, &run)?;
        run.finish(&settings, &trainee, &vocabulary, &saved, cli.stories)
    })
}

/// All steps that are not done yet.
fn train(
    cli: &Cli,
    settings: &Settings,
    vocabulary: &Vocabulary,
    trainee: &Trainee,
    run: &Run,
) -> Result<Saved> {
    let mut optimizer = AdamW::new(&trainee.vars, 0.98, 0.01)?;
    let mut saved = run.restore(&mut optimizer)?;
    if saved.step > 0 {
        common::say(&format!("[going on after step {}]", saved.step));
    }
    let bar = common::bar(settings.steps as u64, "{msg} [{bar:30}] {pos}/{len} {eta}");
    let before = saved.seconds;
    let started = Instant::now();
    while saved.step < settings.steps {
        // Each step has random numbers of its own, so that a resumed run draws the same.
        let mut rng = ChaCha8Rng::seed_from_u64(settings.seed);
        rng.set_stream(saved.step as u64 + 1);
        let batch = saved.lessons.draw(settings.arm, settings.batch, vocabulary, &mut rng)?;
        let transformer = trainee.transformer(&mut rng)?;
        let (loss, right) = loss(&transformer, settings, &batch)?;
        let grads = loss.backward()?;
        optimizer.step(&grads, settings.lr(saved.step), LONGEST_GRADIENT)?;

        let done = (saved.step + 1) as f64 / settings.steps as f64;
        let lesson = saved.lessons.now();
        saved.lessons.mark(settings.arm, batch.passes, right, done);
        saved.note(loss.to_scalar()?, lesson);
        saved.step += 1;
        saved.seconds = before + started.elapsed().as_secs_f64();
        let right = saved.lessons.right() * 100.0;
        bar.set_message(format!("lesson {} right {right:.0} %", lesson + 1));
        bar.set_position(saved.step as u64);
        if saved.step.is_multiple_of(cli.save_every) || saved.step == settings.steps {
            run.save(&saved, &optimizer)?;
        }
    }
    bar.finish_and_clear();
    Ok(saved)
}

/// How badly the answers of a batch are predicted, in nats, and the share that is right.
fn loss(transformer: &Transformer, settings: &Settings, batch: &Batch) -> Result<(Tensor, f64)> {
    let thinking = settings.thinking(batch.passes).gradient_passes(settings.gradient_passes);
    let hidden = read(transformer, &thinking, &batch.ids, batch.layout.clone())?;
    let (at, answers): (Vec<u32>, Vec<u32>) = batch.answers.iter().copied().unzip();
    let at = Tensor::new(at, hidden.device())?;
    let hidden = hidden.flatten(0, 1)?.index_select(&at, 0)?; // (answers, hidden)
    let logits = transformer.logits(&hidden.unsqueeze(0)?)?.squeeze(0)?; // (answers, vocab)
    let said: Vec<u32> = logits.argmax(D::Minus1)?.to_vec1()?;
    let asked = batch.asked(&said);
    let loss = cross_entropy(&logits, &Tensor::new(answers, hidden.device())?)?;
    Ok((loss, asked))
}
