//! What a run leaves behind: a state to go on from, and at the end a checkpoint and a record.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::Device;
use hybrid_attention::Thinking;
use plotters::prelude::*;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use safetensors::SafeTensors;
use serde::{Deserialize, Serialize};

use super::adamw::AdamW;
use super::lessons::Lessons;
use super::settings::{Arm, Settings};
use super::suite::{LONGEST, Scores, Split, Vocabulary, score};
use super::trainee::{Trainee, config_json};
use crate::common::{self, Result};

/// The folder of a run.
pub(crate) struct Run {
    folder: PathBuf,
    settings: Settings,
}

/// Where a run is.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Saved {
    settings: Settings,
    /// Steps that are done.
    pub(crate) step: usize,
    pub(crate) lessons: Lessons,
    /// Seconds of training so far.
    pub(crate) seconds: f64,
    curve: Vec<Point>,
    /// Losses since the last point of the curve.
    since: Vec<f32>,
}

/// One point of the curve of a run.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub(crate) struct Point {
    pub(crate) step: usize,
    /// Mean loss since the point before, in nats.
    pub(crate) loss: f32,
    /// Which lesson it was, from 0.
    pub(crate) lesson: usize,
}

/// What is kept of a run: all that the tables and figures are made of.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Record {
    pub(crate) settings: Settings,
    /// Parameters that were trained.
    pub(crate) parameters: usize,
    /// Seconds of training, and the threads that worked.
    pub(crate) seconds: f64,
    pub(crate) threads: usize,
    pub(crate) curve: Vec<Point>,
    /// Names and wordings that no training story has.
    pub(crate) test: Scores,
    /// New stories like those of the training.
    pub(crate) train: Scores,
}

/// Steps to a point of the curve.
const STEPS_PER_POINT: usize = 50;

/// Passes that are examined.
const PASSES: [usize; 7] = [0, 1, 2, 3, 4, 6, 8];

/// The seed of the examination's stories, the same for all runs.
const EXAMINATION: u64 = 20_261_122;

/// The state's metadata entry.
const RUN: &str = "run";

impl Saved {
    /// Takes a step's loss into the curve.
    pub(crate) fn note(&mut self, loss: f32, lesson: usize) {
        self.since.push(loss);
        if self.since.len() == STEPS_PER_POINT {
            let loss = self.since.iter().sum::<f32>() / STEPS_PER_POINT as f32;
            self.curve.push(Point { step: self.step + 1, loss, lesson });
            self.since.clear();
        }
    }
}

impl Run {
    pub(crate) fn open(folder: &Path, settings: &Settings) -> Result<Self> {
        let with_path = |error| format!("{}: {error}", folder.display());
        std::fs::create_dir_all(folder).map_err(with_path)?;
        Ok(Self { folder: folder.to_path_buf(), settings: settings.clone() })
    }

    fn state(&self) -> PathBuf {
        self.folder.join("state.safetensors")
    }

    /// The saved state, with the optimizer's part given back to it; the beginning if there is none.
    pub(crate) fn restore(&self, optimizer: &mut AdamW) -> Result<Saved> {
        let path = self.state();
        if !path.exists() {
            let settings = self.settings.clone();
            let lessons = Lessons::new();
            return Ok(Saved {
                settings,
                step: 0,
                lessons,
                seconds: 0.0,
                curve: Vec::new(),
                since: Vec::new(),
            });
        }
        let with_path = |error: &dyn std::fmt::Display| format!("{}: {error}", path.display());
        let bytes = std::fs::read(&path).map_err(|error| with_path(&error))?;
        let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|error| with_path(&error))?;
        let run = header.metadata().as_ref().and_then(|all| all.get(RUN));
        let run = run.ok_or_else(|| with_path(&"not the state of a run"))?;
        let saved: Saved = serde_json::from_str(run).map_err(|error| with_path(&error))?;
        if saved.settings != self.settings {
            let message = "a run of other settings is saved here; take another --out, or these:";
            let theirs = serde_json::to_string(&saved.settings)?;
            return Err(with_path(&format!("{message} {theirs}")).into());
        }
        let tensors = candle_core::safetensors::load_buffer(&bytes, &Device::Cpu)?;
        optimizer.restore(i32::try_from(saved.step)?, &tensors)?;
        Ok(saved)
    }

    /// Saves the state in one file, which takes the place of the one before only when it is whole.
    pub(crate) fn save(&self, saved: &Saved, optimizer: &AdamW) -> Result<()> {
        let metadata = HashMap::from([(RUN.to_string(), serde_json::to_string(saved)?)]);
        let path = self.state();
        let whole = path.with_extension("new");
        safetensors::serialize_to_file(optimizer.state(), Some(metadata), &whole)?;
        Ok(std::fs::rename(&whole, &path)?)
    }

    /// Examines what was trained and writes it down.
    pub(crate) fn finish(
        &self,
        settings: &Settings,
        trainee: &Trainee,
        vocabulary: &Vocabulary,
        saved: &Saved,
        stories: usize,
    ) -> Result<()> {
        let file = |name: &str| self.folder.join(name);
        // As if the names of one more step.
        let mut rng = ChaCha8Rng::seed_from_u64(settings.seed);
        rng.set_stream(settings.steps as u64 + 1);
        let weights = trainee.weights(&mut rng.clone())?;
        let transformer = trainee.transformer(&mut rng)?;
        let layers = transformer.all_layers().end;
        std::fs::write(file("config.json"), config_json(vocabulary, layers))?;
        candle_core::safetensors::save(&weights, file("model.safetensors"))?;
        let tokenizer = vocabulary.tokenizer().map_err(|error| error.to_string())?;
        tokenizer.save(file("tokenizer.json"), true).map_err(|error| error.to_string())?;
        if settings.arm.most_passes() > 0 {
            let thinking = settings.thinking(settings.arm.most_passes());
            std::fs::write(file("hybrid.json"), serde_json::to_string_pretty(&thinking)?)?;
        }
        if stories == 0 {
            return Ok(());
        }
        let passes: Vec<usize> = match settings.arm.most_passes() {
            0 => vec![0],
            _ => PASSES.to_vec(),
        };
        let bar = common::bar(2 * LONGEST as u64, "examination [{bar:30}] {pos}/{len}");
        let thinking = |passes: usize| -> Thinking { settings.thinking(passes) };
        let examine = |split, stories| {
            let progress = || bar.inc(1);
            score(&transformer, thinking, split, stories, &passes, EXAMINATION, progress)
        };
        let record = Record {
            settings: settings.clone(),
            parameters: trainee.parameters(),
            seconds: saved.seconds,
            threads: candle_core::utils::get_num_threads(),
            curve: saved.curve.clone(),
            test: examine(Split::Test, stories)?,
            train: examine(Split::Train, stories.div_ceil(4))?,
        };
        bar.finish_and_clear();
        common::write(&file("record.json"), |out| Ok(serde_json::to_writer_pretty(out, &record)?))?;
        draw(&file("curve.svg"), settings.arm, &record)
    }
}

/// The loss curve, and where each lesson began.
fn draw(path: &Path, arm: Arm, record: &Record) -> Result<()> {
    let root = SVGBackend::new(path, (720, 360)).into_drawing_area();
    root.fill(&WHITE)?;
    let highest = record.curve.iter().map(|point| point.loss).fold(0.0, f32::max);
    let mut chart = ChartBuilder::on(&root)
        .caption(format!("{} (seed {})", arm.name(), record.settings.seed), ("sans-serif", 18))
        .margin(10)
        .x_label_area_size(36)
        .y_label_area_size(48)
        .build_cartesian_2d(0..record.settings.steps, 0f32..highest.max(0.1))?;
    let label = |value: &f32| format!("{value:.1}");
    chart
        .configure_mesh()
        .disable_x_mesh()
        .x_desc("steps")
        .y_desc("loss, nats")
        .y_label_formatter(&label)
        .draw()?;
    for pair in record.curve.windows(2).filter(|pair| pair[0].lesson != pair[1].lesson) {
        let at = pair[1].step;
        chart.draw_series(LineSeries::new([(at, 0.0), (at, highest)], BLACK.mix(0.2)))?;
    }
    let points = record.curve.iter().map(|point| (point.step, point.loss));
    chart.draw_series(LineSeries::new(points, BLUE.stroke_width(2)))?;
    root.present()?;
    common::say(&format!("[wrote {}]", path.display()));
    Ok(())
}
