//! `hybrid generic`: what vectors of texts have in common, and how much of others it explains.
//!
//! ```text
//! hybrid generic --model PATH --texts FILE --layer 20 --out generic.safetensors
//! hybrid embed --model PATH --generic generic.safetensors --remove 4 "a cat" "a dog"
//! ```

use std::io::{Write, stdout};
use std::path::PathBuf;

use candle_core::{Device, Tensor};
use clap::Args;
use hybrid_attention::statistics::{Explained, Fingerprint, Generic, Subspace};
use serde_json::{Value, json};

use crate::embed::{BAR, embed};
use crate::files::{check_folder, read_text};
use crate::options::{EmbedArgs, ModelArgs};
use crate::terminal::{self, Result, say};

/// One text of so many is held out.
const FOLD: usize = 5;

#[derive(Args, Debug)]
#[command(next_help_heading = "Texts and vectors")]
pub(crate) struct Options {
    /// A UTF-8 file of texts, one a line; empty lines are skipped
    #[arg(long, value_name = "F")]
    texts: PathBuf,

    /// Write what all of them have in common to this file, for `hybrid embed --generic`: NAME.safetensors
    #[arg(long, value_name = "F")]
    out: Option<PathBuf>,

    /// Print a JSON object instead of a table
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    embedding: EmbedArgs,

    #[command(flatten)]
    model: ModelArgs,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let text = read_text(&options.texts)?;
    let texts: Vec<String> =
        text.lines().filter(|line| !line.trim().is_empty()).map(str::to_owned).collect();
    let least = 2 * FOLD;
    if texts.len() < least {
        let (path, count) = (options.texts.display(), texts.len());
        return Err(format!("{path}: expected at least {least} texts, got {count}").into());
    }
    options.out.as_deref().map_or(Ok(()), check_folder)?;
    let config = options.embedding.config()?.normalize(false);
    config.validate()?;
    let (model, _) = options.model.load()?;

    let mut vectors = vec![Vec::new(); texts.len()];
    let bar = terminal::bar(texts.len() as u64, BAR);
    embed(&model, &texts, 0, &config, &bar, |index, vector| {
        vectors.get_mut(index).into_iter().for_each(|place| place.clone_from(&vector));
        Ok(())
    })?;
    bar.finish_and_clear();

    let (layer, fingerprint) = (options.embedding.layer, Fingerprint::of(model.transformer())?);
    let held = Held::of(&vectors, layer, &fingerprint)?;
    if let Some(path) = &options.out {
        let all = Generic::fit(&Tensor::new(vectors, &Device::Cpu)?, layer, fingerprint)?;
        all.save(path)?;
        say(&format!("[wrote {}]", path.display()));
    }
    match options.json {
        true => Ok(writeln!(stdout(), "{}", held.json())?),
        false => Ok(write!(stdout(), "{}", held.table())?),
    }
}

/// What most of the texts explain of those that were held out.
struct Held {
    texts: usize,
    held: usize,
    /// So many directions, and as many by chance.
    explained: Vec<(usize, Explained, Explained)>,
}

impl Held {
    fn of(vectors: &[Vec<f32>], layer: Option<usize>, fingerprint: &Fingerprint) -> Result<Self> {
        let some = |held: bool| -> Vec<Vec<f32>> {
            let all = vectors.iter().enumerate();
            all.filter(|(at, _)| (at % FOLD == FOLD - 1) == held)
                .map(|(_, it)| it.clone())
                .collect()
        };
        let (seen, held) = (some(false), some(true));
        let (texts, count) = (seen.len(), held.len());
        let table = |rows: Vec<Vec<f32>>| Tensor::new(rows, &Device::Cpu);
        let generic = Generic::fit(&table(seen)?, layer, fingerprint.clone())?;
        let held = table(held)?;
        let (most, width) = (generic.variances().len(), generic.mean().len());
        let counts = (0..).map(|power| 1 << power).take_while(|k| *k <= most.min(64));
        let explained = counts.map(|k| {
            let own = generic.explained(&held, &generic.subspace(k)?)?;
            Ok((k, own, generic.explained(&held, &Subspace::random(width, k, 0)?)?))
        });
        Ok(Self { texts, held: count, explained: explained.collect::<Result<_>>()? })
    }

    /// The share of the mean.
    fn mean(&self) -> f64 {
        self.explained.first().map_or(0.0, |(_, own, _)| own.mean)
    }

    fn json(&self) -> Value {
        let row = |(k, own, chance): &(usize, Explained, Explained)| json!({ "directions": k, "variance": own.directions, "by_chance": chance.directions });
        let rows: Vec<Value> = self.explained.iter().map(row).collect();
        json!({ "texts": self.texts, "held_out": self.held, "mean": self.mean(), "rows": rows })
    }

    /// A Markdown table.
    fn table(&self) -> String {
        let mut table = format!(
            "What {} texts explain of {} others: their mean {:.1} % of the squared length, and of the variance around it\n\n\
             | directions | % | by chance |\n|---|---|---|\n",
            self.texts,
            self.held,
            100.0 * self.mean(),
        );
        for (k, own, chance) in &self.explained {
            let [own, chance] = [own, chance].map(|it| 100.0 * it.directions);
            table += &format!("| {k} | {own:.1} | {chance:.1} |\n");
        }
        table
    }
}
