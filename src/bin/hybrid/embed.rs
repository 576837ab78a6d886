//! `hybrid embed`: sentence vectors, and how alike the sentences are.

use std::io::{Write, stdout};
use std::path::PathBuf;

use candle_core::Tensor;
use clap::{Args, ValueEnum};
use hybrid_attention::model::Sight;
use hybrid_attention::{EmbedConfig, Error, HybridModel, Pooling};
use serde_json::json;

use crate::files::read_text;
use crate::options::{ModelArgs, ThinkingArgs};
use crate::terminal::{self, Result};

/// Texts that run side by side.
const BATCH: usize = 8;

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

    /// How the vectors of a text's tokens become one [default: as the checkpoint says, else mean where
    /// tokens see both ways, and weighted-mean where they do not]
    #[arg(long, value_enum)]
    pooling: Option<Pool>,

    /// Let tokens see only what comes before them: the default, unless the checkpoint says otherwise
    #[arg(long, conflicts_with = "both_ways")]
    causal: bool,

    /// Let tokens see what comes after them, too: for weights that were trained for it
    #[arg(long)]
    both_ways: bool,

    /// Put this in front of each text, and leave it and BOS out of the pooling
    #[arg(long, value_name = "T")]
    instruction: Option<String>,

    /// Cut texts to this many tokens [default: as the checkpoint says, else a text that is longer than
    /// the context is an error]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    truncate: Option<u64>,

    /// Print a JSON object a line instead of a table: {"vector": [...]} for each text, in their order
    #[arg(long)]
    json: bool,

    /// With --json, print the cosine of each pair at last: {"cosine": [[...]]}
    #[arg(long, requires = "json")]
    cosine: bool,

    #[command(flatten)]
    model: ModelArgs,

    #[command(flatten)]
    thinking: ThinkingArgs,
}

/// A pooling on the command line.
#[derive(Clone, Copy, Debug, ValueEnum)]
enum Pool {
    Mean,
    WeightedMean,
    Last,
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
        let mut config = EmbedConfig::default().batch_size(BATCH);
        if let Some(pooling) = self.pooling {
            config = config.pooling(match pooling {
                Pool::Mean => Pooling::Mean,
                Pool::WeightedMean => Pooling::WeightedMean,
                Pool::Last => Pooling::LastToken,
            });
        }
        if self.causal || self.both_ways {
            config = config.sight(if self.causal { Sight::Causal } else { Sight::Bidirectional });
        }
        if let Some(instruction) = &self.instruction {
            config = config.instruction(instruction);
        }
        if let Some(most) = self.truncate {
            config = config.max_tokens(usize::try_from(most)?);
        }
        Ok(self.thinking.thinking().into_iter().fold(config, EmbedConfig::thinking))
    }
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let texts = options.texts()?;
    options.thinking.warn();
    let config = options.config()?;
    let (model, _) = options.model.load()?;
    let Some(vectors) = embed(&model, &texts, &config, options)? else { return Ok(()) };
    let cosine = vectors.matmul(&vectors.t()?)?.to_vec2::<f32>()?; // unit length: no division
    if options.json {
        writeln!(stdout(), "{}", json!({ "cosine": cosine }))?;
        return Ok(());
    }
    print_table(&texts, &cosine)
}

/// All vectors, `(texts, hidden)`, if their cosines are wanted. As JSON they are printed batch by batch, so
/// that a large corpus need not fit in memory.
fn embed(
    model: &HybridModel,
    texts: &[String],
    config: &EmbedConfig,
    options: &Options,
) -> Result<Option<Tensor>> {
    let bar = terminal::bar(texts.len() as u64, "embedding [{bar:30}] {pos}/{len}");
    bar.tick(); // the first batch may take a while
    let mut batches = Vec::new();
    for (index, batch) in texts.chunks(BATCH).enumerate() {
        let vectors = model.embed(batch, config).map_err(|error| match error {
            Error::InText { text, source } => {
                format!("text {}: {source}", index * BATCH + text + 1).into()
            }
            other => Box::<dyn std::error::Error>::from(other),
        })?;
        if options.json {
            let mut out = stdout().lock();
            for vector in vectors.to_vec2::<f32>()? {
                writeln!(out, "{}", json!({ "vector": vector }))?;
            }
        }
        if !options.json || options.cosine {
            batches.push(vectors);
        }
        bar.inc(batch.len() as u64);
    }
    bar.finish_and_clear();
    match batches.as_slice() {
        [] => Ok(None),
        batches => Ok(Some(Tensor::cat(batches, 0)?)),
    }
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
