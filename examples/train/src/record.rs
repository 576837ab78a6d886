//! What a run leaves behind: a state to resume from, and at the end a checkpoint and a record.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use safetensors::SafeTensors;
use serde::{Deserialize, Serialize};

use crate::adamw::AdamW;
use crate::curve;
use crate::lessons::Lessons;
use crate::settings::Settings;
use crate::task::Task;
use crate::terminal::{self, Result};
use crate::trainee::Trainee;

/// The folder of a run.
pub(crate) struct Run {
    folder: PathBuf,
    settings: Settings,
}

/// How far a run has come.
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

/// The record of a run: everything that the tables and figures are made from.
#[derive(Debug, Serialize)]
struct Record<'a, E> {
    settings: &'a Settings,
    /// Parameters that were trained.
    parameters: usize,
    /// Seconds of training, and the threads that worked.
    seconds: f64,
    threads: usize,
    curve: &'a [Point],
    #[serde(flatten)]
    examination: E,
}

/// The state's metadata entries: where the run is, and a checksum of that and of all tensors.
const RUN: &str = "run";
const CRC32: &str = "crc32";

/// Of the run's text and, in the order of their names, all tensors.
fn checksum(run: &str, state: &HashMap<String, Tensor>) -> Result<String> {
    let mut crc = crc32fast::Hasher::new();
    crc.update(run.as_bytes());
    for (name, tensor) in state.iter().collect::<BTreeMap<_, _>>() {
        crc.update(name.as_bytes());
        for value in tensor.flatten_all()?.to_vec1::<f32>()? {
            crc.update(&value.to_le_bytes());
        }
    }
    Ok(format!("{:08x}", crc.finalize()))
}

impl Saved {
    /// Adds a step's loss to the curve.
    pub(crate) fn note(&mut self, loss: f32, lesson: usize, steps_per_point: usize) {
        self.since.push(loss);
        if self.since.len() == steps_per_point {
            let loss = self.since.iter().sum::<f32>() / steps_per_point as f32;
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

    /// The saved state, with the optimiser's part restored into it; the initial state if there is none.
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
        let entry = |name: &str| header.metadata().as_ref().and_then(|all| all.get(name));
        let run = entry(RUN).ok_or_else(|| with_path(&"not the state of a run"))?;
        let saved: Saved = serde_json::from_str(run).map_err(|error| with_path(&error))?;
        if saved.settings != self.settings {
            let message = "a run of other settings is saved here; take another --out, or these:";
            let theirs = serde_json::to_string(&saved.settings)?;
            return Err(with_path(&format!("{message} {theirs}")).into());
        }
        let tensors = candle_core::safetensors::load_buffer(&bytes, &Device::Cpu)?;
        if entry(CRC32) != Some(&checksum(run, &tensors)?) {
            let message = "damaged: its checksum is another one; delete it to begin anew";
            return Err(with_path(&message).into());
        }
        optimizer.restore(i32::try_from(saved.step)?, &tensors)?;
        Ok(saved)
    }

    /// Saves the state in one file, which replaces the previous one only when it is complete.
    pub(crate) fn save(&self, saved: &Saved, optimizer: &AdamW) -> Result<()> {
        let (run, state) = (serde_json::to_string(saved)?, optimizer.state());
        let crc32 = checksum(&run, &state)?;
        let metadata = HashMap::from([(RUN.to_string(), run), (CRC32.to_string(), crc32)]);
        let path = self.state();
        let whole = path.with_extension("new");
        let content = safetensors::serialize(state, Some(metadata))?;
        let write = || {
            let mut file = File::create(&whole)?;
            file.write_all(&content)?;
            file.sync_all()?; // else a crash might leave the new name with no content
            std::fs::rename(&whole, &path)
        };
        write().map_err(|error| {
            std::fs::remove_file(&whole).ok(); // what there was is still there
            format!("{}: {error}", path.display()).into()
        })
    }

    /// Saves what was trained, examines it, and saves the record.
    pub(crate) fn finish<T: Task>(&self, trainee: &Trainee, task: &T, saved: &Saved) -> Result<()> {
        let settings = &self.settings;
        let file = |name: &str| self.folder.join(name);
        // With the names that one more step would have had.
        trainee.save(&self.folder, &mut settings.rng(settings.steps))?;
        if settings.most_passes() > 0 {
            let thinking = settings.thinking(settings.most_passes());
            let path = file("hybrid.json");
            std::fs::write(&path, serde_json::to_string_pretty(&thinking)?)
                .map_err(|error| format!("{}: {error}", path.display()))?;
        }
        let Some(examination) = task.examine(settings, trainee)? else { return Ok(()) };
        let record = Record {
            settings,
            parameters: trainee.parameters(),
            seconds: saved.seconds,
            threads: candle_core::utils::get_num_threads(),
            curve: &saved.curve,
            examination,
        };
        terminal::write(&file("record.json"), |out| {
            Ok(serde_json::to_writer_pretty(out, &record)?)
        })?;
        curve::draw(&file("curve.svg"), settings, &saved.curve)
    }
}
