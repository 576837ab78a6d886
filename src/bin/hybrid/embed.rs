//! `hybrid embed`: sentence vectors from bidirectional passes, and how alike the sentences are.

use std::io::{Write, stdout};
use std::path::PathBuf;

use candle_core::Tensor;
use clap::{Args, ValueEnum};
use hybrid_attention::model::Sight;
use hybrid_attention::{EmbedConfig, HybridModel, Pooling};
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

    /// How the vectors of a text's tokens become one
    #[arg(long, value_enum, default_value_t = Pool::Mean)]
    pooling: Pool,

    /// Let tokens see only what comes before them
    #[arg(long)]
    causal: bool,

    /// Print one JSON object, {"vectors": [...], "cosine": [[...]]}, instead of a table
    #[arg(long)]
    json: bool,

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

    fn config(&self) -> EmbedConfig {
        let pooling = match self.pooling {
            Pool::Mean => Pooling::Mean,
            Pool::WeightedMean => Pooling::WeightedMean,
            Pool::Last => Pooling::LastToken,
        };
        let sight = if self.causal { Sight::Causal } else { Sight::Bidirectional };
        let config = EmbedConfig::default().pooling(pooling).sight(sight).batch_size(BATCH);
        self.thinking.thinking().into_iter().fold(config, EmbedConfig::thinking)
    }
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let texts = options.texts()?;
    options.thinking.warn();
    let config = options.config();
    let (model, _) = options.model.load()?;
    let vectors = embed(&model, &texts, &config)?; // (texts, hidden)
    let cosine = vectors.matmul(&vectors.t()?)?.to_vec2::<f32>()?; // unit length: no division
    if options.json {
        let vectors = vectors.to_vec2::<f32>()?;
        writeln!(stdout(), "{}", json!({ "vectors": vectors, "cosine": cosine }))?;
        return Ok(());
    }
    print_table(&texts, &cosine)
}

fn embed(model: &HybridModel, texts: &[String], config: &EmbedConfig) -> Result<Tensor> {
    let bar = terminal::bar(texts.len() as u64, "embedding [{bar:30}] {pos}/{len}");
    bar.tick(); // the first batch may take a while
    let mut batches = Vec::new();
    for batch in texts.chunks(BATCH) {
        batches.push(model.embed(batch, config)?);
        bar.inc(batch.len() as u64);
    }
    bar.finish_and_clear();
    Ok(Tensor::cat(&batches, 0)?)
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
