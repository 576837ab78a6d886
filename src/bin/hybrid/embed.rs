//! `hybrid embed`: sentence vectors, and how alike the sentences are.

use std::io::{Write, stdout};
use std::ops::Range;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use clap::Args;
use hybrid_attention::statistics::{Fingerprint, Generic};
use hybrid_attention::{EmbedConfig, Error, HybridModel};
use indicatif::ProgressBar;

use crate::files::read_text;
use crate::options::{EmbedArgs, ModelArgs, ThinkingArgs};
use crate::terminal::{self, Result};
use crate::vectors::VectorFile;

/// With --json vectors are printed in the order of their texts, and computed in that of their lengths: this many
/// texts at a time.
const WINDOW: usize = 4096;

/// The most texts of a table.
const TABLE: usize = 64;

/// Rows of cosines that are computed at a time.
const ROWS: usize = 256;

/// Characters of a text that label its row.
const LABEL: usize = 32;

#[derive(Args, Debug)]
#[command(next_help_heading = "Texts and vectors")]
pub(crate) struct Options {
    /// The texts
    #[arg(value_name = "TEXT")]
    texts: Vec<String>,

    /// A UTF-8 file with more texts, one a line; empty lines are skipped
    #[arg(long, value_name = "F")]
    file: Option<PathBuf>,

    /// Print a JSON object a line instead of a table: {"vector": [...]} for each text, in their order
    #[arg(long)]
    json: bool,

    /// Write the vectors to this file instead, (texts, hidden) in f32: NAME.safetensors, as the tensor
    /// vectors, or NAME.npy
    ///
    /// They are written as they come, at their places, so that a large corpus need not fit in memory; until all are
    /// there, the file is NAME.part.
    #[arg(long, value_name = "F", conflicts_with = "json")]
    out: Option<PathBuf>,

    /// With --json, print the cosine of each pair at last: {"cosine": [[...]]}; for N texts these are N x N
    /// numbers
    #[arg(long, requires = "json")]
    cosine: bool,

    /// Take what is generic out of the vectors: the mean in this file of `hybrid generic`, whose layer they are then of
    #[arg(long, value_name = "F")]
    generic: Option<PathBuf>,

    /// And so many of its directions [default: 0]
    #[arg(long, value_name = "K", requires = "generic")]
    remove: Option<usize>,

    /// Leave the mean in
    #[arg(long, requires = "remove", hide_short_help = true)]
    keep_mean: bool,

    #[command(flatten)]
    embedding: EmbedArgs,

    #[command(flatten)]
    model: ModelArgs,

    #[command(flatten)]
    thinking: ThinkingArgs,
}

impl Options {
    fn texts(&self) -> Result<Vec<String>> {
        let mut texts = self.texts.clone();
        if let Some(path) = &self.file {
            let lines = read_text(path)?;
            texts.extend(lines.lines().filter(|line| !line.trim().is_empty()).map(str::to_owned));
        }
        if texts.is_empty() {
            return Err("no texts: give them as arguments or with --file".into());
        }
        Ok(texts)
    }

    fn config(&self) -> Result<EmbedConfig> {
        let config = self.embedding.config()?;
        Ok(self.thinking.thinking().into_iter().fold(config, EmbedConfig::thinking))
    }

    /// `config`, with what of the file is to be taken out of the vectors.
    fn removing(&self, model: &HybridModel, config: EmbedConfig) -> Result<EmbedConfig> {
        let Some(path) = &self.generic else { return Ok(config) };
        let generic = Generic::load(path, &Fingerprint::of(model.transformer())?)?;
        let remove = generic.remove(self.remove.unwrap_or(0))?;
        Ok(config.remove(if self.keep_mean { remove.keep_mean() } else { remove }))
    }
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let texts = options.texts()?;
    let is_table = !options.json && options.out.is_none();
    if is_table && texts.len() > TABLE {
        let count = texts.len();
        return Err(format!(
            "a table of {count} texts would be too large: --json prints their vectors, --out writes them to a \
             file; up to {TABLE} are compared"
        )
        .into());
    }
    options.out.as_deref().map_or(Ok(()), VectorFile::check)?;
    options.thinking.warn();
    let config = options.config()?;
    config.validate()?; // before waiting for the weights
    let (model, _) = options.model.load()?;
    let config = options.removing(&model, config)?;
    if let Some(path) = &options.out {
        return write(&model, &texts, &config, path);
    }
    let (mut vectors, mut out) = (Vec::new(), stdout().lock());
    let bar = terminal::bar(texts.len() as u64, BAR);
    for (at, window) in (0..).step_by(WINDOW).zip(texts.chunks(WINDOW)) {
        let mut own = vec![Vec::new(); window.len()];
        embed(&model, window, at, &config, &bar, |index, vector| {
            own.get_mut(index - at).into_iter().for_each(|place| place.clone_from(&vector));
            Ok(())
        })?;
        for vector in own {
            if options.json {
                let vector = serde_json::to_string(&vector)?;
                bar.suspend(|| writeln!(out, "{{\"vector\":{vector}}}"))?;
            }
            if !options.json || options.cosine {
                vectors.push(vector);
            }
        }
    }
    bar.finish_and_clear();
    drop(out);
    if vectors.is_empty() {
        return Ok(());
    }
    let vectors = Tensor::new(vectors, &Device::Cpu)?; // (texts, hidden)
    match is_table {
        true => print_table(&texts, &cosines(&vectors, 0..texts.len())?),
        false => print_cosines(&vectors),
    }
}

pub(crate) const BAR: &str = "embedding [{bar:30}] {pos}/{len}, {eta} to go";

/// Vectors as they are computed, each with the index of its text among all, of which `texts` are those from `at` on.
pub(crate) fn embed(
    model: &HybridModel,
    texts: &[String],
    at: usize,
    config: &EmbedConfig,
    bar: &ProgressBar,
    mut each: impl FnMut(usize, Vec<f32>) -> Result<()>,
) -> Result<()> {
    bar.tick(); // the first batch may take a while
    let numbered = |error| match error {
        Error::InText { text, source } => format!("text {}: {source}", at + text + 1).into(),
        Error::NotFinite { what, position } => {
            Error::NotFinite { what, position: at + position }.into()
        }
        other => Box::<dyn std::error::Error>::from(other),
    };
    for next in model.embed_many(texts, config).map_err(numbered)? {
        let (index, vector) = next.map_err(numbered)?;
        each(at + index, vector)?;
        bar.inc(1);
    }
    Ok(())
}

/// All vectors into a file.
fn write(model: &HybridModel, texts: &[String], config: &EmbedConfig, path: &Path) -> Result<()> {
    let mut file = VectorFile::new(path, texts.len(), model.config().hidden_size)?;
    let bar = terminal::bar(texts.len() as u64, BAR);
    embed(model, texts, 0, config, &bar, |index, vector| file.write(index, &vector))?;
    bar.finish_and_clear();
    file.finish()
}

/// The cosine of each of some rows of unit length with each of all.
fn cosines(all: &Tensor, some: Range<usize>) -> Result<Vec<Vec<f32>>> {
    let rows = all.narrow(0, some.start, some.len())?;
    Ok(rows.matmul(&all.t()?)?.to_vec2::<f32>()?) // (some, all)
}

/// All pairs as one JSON object, some rows at a time.
fn print_cosines(all: &Tensor) -> Result<()> {
    let (mut out, count) = (stdout().lock(), all.dim(0)?);
    write!(out, "{{\"cosine\":[")?;
    for start in (0..count).step_by(ROWS) {
        for (row, cosines) in (start..).zip(cosines(all, start..count.min(start + ROWS))?) {
            let comma = if row > 0 { "," } else { "" };
            write!(out, "{comma}{}", serde_json::to_string(&cosines)?)?;
        }
    }
    Ok(writeln!(out, "]}}")?)
}

/// A row for each text, numbered; the columns have the same numbers.
fn print_table(texts: &[String], cosine: &[Vec<f32>]) -> Result<()> {
    let number = texts.len().to_string().len();
    let labels: Vec<String> = texts.iter().map(|text| label(text)).collect();
    let width = labels.iter().map(|label| label.chars().count()).max().unwrap_or(0);
    let head: String = (1..=texts.len()).map(|column| format!("{column:>8}")).collect();
    let mut out = stdout().lock();
    writeln!(out, "{:1$}{head}", "", number + 1 + width)?;
    for (row, (label, values)) in labels.iter().zip(cosine).enumerate() {
        let values: String = values.iter().map(|value| format!("{value:>8.3}")).collect();
        writeln!(out, "{:>number$} {label:width$}{values}", row + 1)?;
    }
    Ok(())
}

/// `text` on one line, cut to [`LABEL`] characters.
fn label(text: &str) -> String {
    let line = text.split_whitespace().collect::<Vec<_>>().join(" ");
    let line: String = line.chars().flat_map(terminal::plain).collect();
    if line.chars().count() <= LABEL {
        return line;
    }
    line.chars().take(LABEL - 1).chain(['…']).collect()
}
