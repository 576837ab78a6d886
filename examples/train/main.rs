//! Teaches a model to think.
//!
//! ```text
//! cargo run --release --example train -- --out target/runs/both-ways-1
//! ```
//!
//! trains a small model from nothing on the flashback suite (see `examples/flashback`), and
//!
//! ```text
//! cargo run --release --example train -- --out target/runs/smollm2-both-ways --rank 8 \
//!     --model SmolLM2-135M-Instruct.Q4_1.gguf --text gensim/test/test_data/lee_background.cor
//! ```
//!
//! an adapter for the thought passes of a checkpoint on a text, one passage a line, of which every
//! fifth is held out for the examination. `--arm no-passes` makes it a plain causal adapter, the
//! control of the same size; without `--rank` all weights are trained.
//!
//! A run that was stopped, in whatever way, goes on when the same command is given again, and ends as
//! if it had never been.

#[path = "../common/mod.rs"]
mod common;
#[path = "../flashback/suite/mod.rs"]
mod suite;

mod adamw;
mod base;
mod curve;
mod flashback;
mod lessons;
mod names;
mod record;
mod settings;
mod task;
mod text;
mod trainee;

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use candle_core::{D, Tensor};
use candle_nn::loss::cross_entropy;
use clap::Parser;
use hybrid_attention::model::Transformer;

use crate::base::Base;
use crate::common::Result;
use crate::flashback::Flashback;
use crate::record::{Run, Saved};
use crate::settings::{Arm, LowRank, MOST_PASSES, OfText, Settings};
use crate::suite::{Vocabulary, read};
use crate::task::{Batch, Task};
use crate::text::Text;
use crate::trainee::Trainee;

/// Teach a model to think: a new small one, a checkpoint, or an adapter on it, on the flashback suite
/// or on any text.
#[derive(Parser)]
struct Cli {
    /// The folder of this run: where it is saved and goes on from, and where its results go
    #[arg(long, value_name = "DIR")]
    out: PathBuf,

    /// The method, or a control
    #[arg(long, value_enum, default_value_t = Arm::BothWays)]
    arm: Arm,

    /// A checkpoint to train: a folder with safetensors, or a .gguf file [default: a new small model]
    #[arg(long, value_name = "PATH")]
    model: Option<PathBuf>,

    /// Train a low-rank adapter of this rank in the layers of the span: for thought passes, or for
    /// decoding where there are none [default: train all weights]
    #[arg(long, value_name = "R", requires = "model")]
    rank: Option<usize>,

    /// What the adapter adds is scaled by alpha / rank [default: the rank]
    #[arg(long, value_name = "A", requires = "rank")]
    alpha: Option<f64>,

    /// The projections that have an adapter
    #[arg(long, value_name = "NAMES", value_delimiter = ',', requires = "rank")]
    #[arg(default_value = "q_proj,k_proj,v_proj,o_proj")]
    target: Vec<String>,

    /// A UTF-8 file of passages to learn from, one a line; those that are too short are skipped
    /// [default: learn the flashback suite]
    #[arg(long, value_name = "F", requires = "model")]
    text: Option<PathBuf>,

    /// Tokens that are thought about, and as many to be predicted after them
    #[arg(long, default_value_t = 64, value_name = "N", requires = "text")]
    tokens: usize,

    /// The most passes to think about a text with
    #[arg(long, default_value_t = 2, value_name = "N", requires = "text")]
    passes: usize,

    /// Decides the first weights and every text
    #[arg(long, default_value_t = 1)]
    seed: u64,

    /// Steps of the whole run [default: 6000; 300 for --text]
    #[arg(long, value_name = "N")]
    steps: Option<usize>,

    /// Texts in each step [default: 64; 4 for --text]
    #[arg(long, value_name = "N")]
    batch: Option<usize>,

    /// The learning rate after the warm-up [default: 2e-3; 1e-3 for --rank; 3e-5 for a checkpoint]
    #[arg(long)]
    lr: Option<f64>,

    /// The layers that a thought pass runs; a new model has one more [default: 1..3; the middle
    /// third for --text]
    #[arg(long, value_name = "A..B", value_parser = common::parse_span)]
    span: Option<Range<usize>>,

    /// Let gradients flow through the last K passes only [default: all]
    #[arg(long, value_name = "K")]
    gradient_passes: Option<usize>,

    /// Steps between two saved states; a run that is killed does at most as many again [default: 100;
    /// 10 for --rank]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    save_every: Option<u64>,

    /// Stories for each length of chain in the examination at the end
    #[arg(long, default_value_t = 300, value_name = "N", conflicts_with = "text")]
    stories: usize,

    /// The most passages in the examination at the end, of those held out
    #[arg(long, default_value_t = 60, value_name = "N", requires = "text")]
    passages: usize,
}

/// Gradients longer than this are cut to it.
const LONGEST_GRADIENT: f64 = 1.0;

fn main() -> ExitCode {
    common::main(|| run(&Cli::parse()))
}

fn run(cli: &Cli) -> Result<()> {
    if let Some(model) = &cli.model {
        check_apart(&cli.out, model)?;
    }
    let base = cli.model.as_deref().map(Base::load).transpose()?;
    match (base, &cli.text) {
        (Some(base), Some(path)) => {
            let text = Text::read(path, &base, cli.tokens, cli.passages)?;
            let settings = cli.settings(Some(&base), Some((path.as_path(), &text)));
            settings.check(Some(base.config.num_hidden_layers))?;
            teach(cli, &settings, &text, &Trainee::on(base, &settings, None)?)
        }
        (base, _) => {
            let (vocabulary, stories) = (Vocabulary::new(), cli.stories);
            let settings = cli.settings(base.as_ref(), None);
            settings.check(base.as_ref().map(|base| base.config.num_hidden_layers))?;
            let trainee = match base {
                None => Trainee::for_flashback(&settings, &vocabulary)?,
                Some(base) => {
                    flashback::check_base(&base, &vocabulary)?;
                    Trainee::on(base, &settings, Some(&vocabulary))?
                }
            };
            teach(cli, &settings, &Flashback { vocabulary, stories }, &trainee)
        }
    }
}

/// Refuses to leave results where they would change the checkpoint: a `hybrid.json` beside its weights
/// is its own.
fn check_apart(out: &Path, model: &Path) -> Result<()> {
    let (Ok(out), Ok(model)) = (out.canonicalize(), model.canonicalize()) else { return Ok(()) };
    let folder = if model.is_dir() { Some(model.as_path()) } else { model.parent() };
    match folder == Some(out.as_path()) {
        true => Err(format!("--out: {} is the folder of the checkpoint", out.display()).into()),
        false => Ok(()),
    }
}

/// A run from where it is to its end.
fn teach(cli: &Cli, settings: &Settings, task: &impl Task, trainee: &Trainee) -> Result<()> {
    let run = Run::open(&cli.out, settings)?;
    let saved = train(cli.saves_every(), settings, task, trainee, &run)?;
    run.finish(trainee, task, &saved)
}

/// All steps that are not done yet.
fn train<T: Task>(
    saves_every: u64,
    settings: &Settings,
    task: &T,
    trainee: &Trainee,
    run: &Run,
) -> Result<Saved> {
    let mut optimizer = trainee.optimizer(settings)?;
    let mut saved = run.restore(&mut optimizer)?;
    if saved.step > 0 {
        common::say(&format!("[going on after step {}]", saved.step));
    }
    let bar = common::bar(settings.steps as u64, "{msg} [{bar:30}] {pos}/{len} {eta}");
    let before = saved.seconds;
    let started = Instant::now();
    while saved.step < settings.steps {
        let mut rng = settings.rng(saved.step);
        let batch = task.draw(settings, &saved.lessons, &mut rng)?;
        let transformer = trainee.transformer(&mut rng)?;
        let (loss, right) = loss(&transformer, settings, &batch)?;
        let value = loss.to_scalar::<f32>()?;
        if !value.is_finite() {
            let step = saved.step + 1;
            return Err(format!("step {step}: the loss is {value}; try a lower --lr").into());
        }
        let grads = loss.backward()?;
        optimizer.step(&grads, settings.lr(saved.step), LONGEST_GRADIENT)?;

        let lesson = saved.lessons.now();
        let done = (saved.step + 1) as f64 / settings.steps as f64;
        task.mark(settings, &mut saved.lessons, batch.passes, right, done);
        saved.note(value, lesson, T::STEPS_PER_POINT);
        saved.step += 1;
        saved.seconds = before + started.elapsed().as_secs_f64();
        bar.set_message(task.status(&saved.lessons, value));
        bar.set_position(saved.step as u64);
        if (saved.step as u64).is_multiple_of(saves_every) || saved.step == settings.steps {
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

impl Cli {
    fn settings(&self, base: Option<&Base>, text: Option<(&Path, &Text)>) -> Settings {
        let for_text = |of_text, other| if text.is_some() { of_text } else { other };
        let steps = self.steps.unwrap_or(for_text(300, 6000));
        let span = self.span.clone().unwrap_or_else(|| match base {
            Some(base) if text.is_some() => base.middle(),
            _ => 1..3,
        });
        let lr = match (self.rank, base) {
            (_, None) => 2e-3,
            (Some(_), _) => 1e-3,
            (None, _) => 3e-5,
        };
        let low_rank = |rank| LowRank {
            rank,
            alpha: self.alpha.unwrap_or(rank as f64),
            target: self.target.clone(),
        };
        let of_text = |(path, text): (&Path, &Text)| OfText {
            file: name(path),
            fingerprint: text.fingerprint.clone(),
            tokens: self.tokens,
            passes: self.passes,
        };
        Settings {
            arm: self.arm,
            seed: self.seed,
            steps,
            batch: self.batch.unwrap_or(for_text(4, 64)),
            lr: self.lr.unwrap_or(lr),
            warm_up: for_text(steps / 10, 100),
            span: (span.start, span.end),
            gradient_passes: self.gradient_passes.unwrap_or(MOST_PASSES.max(self.passes)),
            model: base.map(|base| name(&base.path)),
            adapter: self.rank.map(low_rank),
            text: text.map(of_text),
        }
    }

    fn saves_every(&self) -> u64 {
        self.save_every.unwrap_or(if self.rank.is_some() { 10 } else { 100 })
    }
}

/// The last part of a path: where a file stands makes no difference to a run.
fn name(path: &Path) -> String {
    let whole = path.canonicalize().unwrap_or_else(|_| path.to_path_buf());
    whole.file_name().unwrap_or_default().to_string_lossy().into_owned()
}
