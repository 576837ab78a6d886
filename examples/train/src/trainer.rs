//! A training run: step by step, with its state saved along the way.

use std::path::Path;
use std::time::Instant;

use flashback_suite::Vocabulary;
use hybrid_attention::dictionary::Entries;

use crate::base::Base;
use crate::entries::OfDictionary;
use crate::flashback::{self, Flashback};
use crate::glossary::OfGlossary;
use crate::lost_words::LostWords;
use crate::options::{Options, name};
use crate::pairs::Pairs;
use crate::record::{Run, Saved};
use crate::settings::{OfEntries, OfPairs, Settings, Suite};
use crate::task::Task;
use crate::terminal::{self, Result};
use crate::text::Text;
use crate::trainee::Trainee;

/// Gradients longer than this are clipped to it.
const LONGEST_GRADIENT: f64 = 1.0;

/// Trains as `options` say: from where an earlier run with the same settings stopped, or from the
/// beginning.
///
/// # Errors
/// When the options do not make sense, when a file cannot be read or written, and when the loss
/// diverges.
pub fn train(options: &Options) -> Result<()> {
    if let Some(model) = &options.model {
        check_apart(&options.out, model)?;
    }
    let base = options.model.as_deref().map(Base::load).transpose()?;
    match (base, &options.text, &options.pairs, &options.entries) {
        (Some(base), Some(path), ..) => teach_text(options, base, path),
        (Some(base), None, Some(path), _) => teach_pairs(options, base, path),
        (Some(base), None, None, Some(path)) => {
            let mut settings = options.settings(Some(&base), None);
            settings.check(Some(base.config.num_hidden_layers))?;
            let entries = Entries::from_tsv(path)?;
            settings.entries = Some(OfEntries { file: name(path), entries: entries.len() });
            let begun =
                OfDictionary::begin(&settings, base, &entries, &options.out, options.stories);
            let (task, trainee) = begun?;
            teach(options, &settings, &task, &trainee)
        }
        (base, ..) => {
            let settings = options.settings(base.as_ref(), None);
            settings.check(base.as_ref().map(|base| base.config.num_hidden_layers))?;
            teach_suite(options, &settings, base)
        }
    }
}

/// A text's second halves, or its lost words.
fn teach_text(options: &Options, base: Base, path: &Path) -> Result<()> {
    let layers = base.config.num_hidden_layers;
    let settings = |fingerprint: &str| -> Result<Settings> {
        let of_text = options.of_text(path, fingerprint);
        let settings = options.settings(Some(&base), Some(of_text));
        settings.check(Some(layers))?;
        Ok(settings)
    };
    if let Some(lost) = options.lost() {
        let sizes = (options.tokens, options.passages);
        let task = LostWords::read(path, options.held_out.as_deref(), &base, sizes, &lost)?;
        let settings = settings(&task.fingerprint)?;
        return teach(options, &settings, &task, &Trainee::on(base, &settings, None)?);
    }
    if options.held_out.is_some() {
        return Err("--held-out: for --lost or --pairs".into());
    }
    let task = Text::read(path, &base, options.tokens, options.passages)?;
    let settings = settings(&task.fingerprint)?;
    teach(options, &settings, &task, &Trainee::on(base, &settings, None)?)
}

/// Vectors of queries and passages.
fn teach_pairs(options: &Options, base: Base, path: &Path) -> Result<()> {
    let held_out = options.held_out.as_deref().ok_or("--pairs: give --held-out")?;
    let how = options.of_pairs(path, held_out);
    let task = Pairs::read(path, held_out, &base, &how, options.passages)?;
    let mut settings = options.settings(Some(&base), None);
    settings.pairs = Some(OfPairs { fingerprint: task.fingerprint.clone(), ..how });
    settings.check(Some(base.config.num_hidden_layers))?;
    teach(options, &settings, &task, &Trainee::on(base, &settings, None)?)
}

fn teach_suite(options: &Options, settings: &Settings, base: Option<Base>) -> Result<()> {
    let stories = options.stories;
    match settings.suite {
        Suite::Glossary => {
            let (task, trainee) = OfGlossary::begin(settings, base, stories)?;
            teach(options, settings, &task, &trainee)
        }
        Suite::Flashback if settings.dictionary.is_some() => {
            Err("--dictionary: for --entries or --suite glossary".into())
        }
        Suite::Flashback => {
            let vocabulary = Vocabulary::default();
            let trainee = match base {
                None => Trainee::new(settings, &vocabulary)?,
                Some(base) => {
                    flashback::check_base(&base, &vocabulary)?;
                    Trainee::on(base, settings, Some(&vocabulary))?
                }
            };
            teach(options, settings, &Flashback { vocabulary, stories }, &trainee)
        }
    }
}

/// Refuses to write results where they would change the checkpoint: a `hybrid.json` beside its weights
/// would become part of it.
fn check_apart(out: &Path, model: &Path) -> Result<()> {
    let (Ok(out), Ok(model)) = (out.canonicalize(), model.canonicalize()) else { return Ok(()) };
    let folder = if model.is_dir() { Some(model.as_path()) } else { model.parent() };
    match folder == Some(out.as_path()) {
        true => Err(format!("--out: {} is the folder of the checkpoint", out.display()).into()),
        false => Ok(()),
    }
}

/// Runs a training run from where it stands to its end.
fn teach(
    options: &Options,
    settings: &Settings,
    task: &impl Task,
    trainee: &Trainee,
) -> Result<()> {
    let run = Run::open(&options.out, settings)?;
    let saved = steps(options.saves_every(), settings, task, trainee, &run)?;
    run.finish(trainee, task, &saved)
}

/// All steps that are not done yet.
fn steps<T: Task>(
    saves_every: u64,
    settings: &Settings,
    task: &T,
    trainee: &Trainee,
    run: &Run,
) -> Result<Saved> {
    let mut optimizer = trainee.optimizer(settings)?;
    let mut saved = run.restore(&mut optimizer)?;
    if saved.step > 0 {
        terminal::say(&format!("[going on after step {}]", saved.step));
    }
    let bar = terminal::bar(settings.steps as u64, "{msg} [{bar:30}] {pos}/{len} {eta}");
    let before = saved.seconds;
    let started = Instant::now();
    while saved.step < settings.steps {
        let mut rng = settings.rng(saved.step);
        let exercise = task.draw(settings, &saved.lessons, &mut rng)?;
        let model = trainee.model(&mut rng)?;
        let (loss, right) = task.loss(&model, settings, &exercise)?;
        let value = loss.to_scalar::<f32>()?;
        if !value.is_finite() {
            let step = saved.step + 1;
            return Err(format!("step {step}: the loss is {value}; try a lower --lr").into());
        }
        let grads = loss.backward()?;
        optimizer.step(&grads, settings.lr(saved.step), LONGEST_GRADIENT)?;

        let lesson = saved.lessons.now();
        let done = (saved.step + 1) as f64 / settings.steps as f64;
        task.mark(settings, &mut saved.lessons, exercise.passes, right, done);
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
