//! `hybrid measure`: does thinking about a text help to predict how it continues?
//!
//! Each passage is cut in two. The first half is thought about, the second only read, and the figure
//! is the negative log-likelihood of the second half's tokens: how surprised the model is by them,
//! in nats per token, lower being better. Beside every setting stand its controls: no thinking, the
//! first half read twice, and a loop of the same cost whose passes see only what comes before.
//!
//! Thoughts move along the sphere and keep their length: what leaves a stack is many times as long as
//! what enters it, and a straight step, however small, would mostly be a change of length. The first
//! token is only read, unless `--first` says otherwise: models park their attention on it (attention
//! sinks, Xiao et al. 2023), and they lose that when it changes.
//!
//! ```text
//! pip download --no-deps gensim && python3 -m zipfile -e gensim-*.whl .
//! hybrid measure --model PATH --text gensim/test/test_data/lee_background.cor
//! ```
//!
//! Nothing is random: the same model and text give the same table.

use std::io::{Write, stdout};
use std::ops::Range;
use std::path::PathBuf;

use clap::Args;
use hybrid_attention::evaluate::{Estimate, Passage, losses};
use hybrid_attention::model::Sight;
use hybrid_attention::refine::Interpolate;
use hybrid_attention::thought::HandOff;
use hybrid_attention::{HybridModel, Prompt, Thinking};
use serde::Serialize;
use serde_json::json;

use crate::files::{check_folder, read_text, write};
use crate::options::{ModelArgs, parse_span};
use crate::terminal::{self, Result};

const HAND_OFFS: [HandOff; 3] =
    [HandOff::Refined, HandOff::KeyValue, HandOff::Mixed { weight: 0.5 }];
const PASSES: [usize; 2] = [1, 3];
const WEIGHTS: [f64; 3] = [0.05, 0.2, 1.0];
const SIGHTS: [Sight; 2] = [Sight::Bidirectional, Sight::Causal];

#[derive(Args, Debug)]
#[command(next_help_heading = "Passages")]
pub(crate) struct Options {
    /// A UTF-8 file of passages, one a line; those that are too short are skipped
    #[arg(long, value_name = "F")]
    text: PathBuf,

    /// How many passages to take, from the first on
    #[arg(long, default_value_t = 40, value_name = "N")]
    passages: usize,

    /// Tokens of each half; what a passage has beyond the second half is not used
    #[arg(long, default_value_t = 96, value_name = "N")]
    tokens: usize,

    /// Think about the first token, too
    #[arg(long)]
    first: bool,

    /// The layers to think with besides all of them [default: the middle third]
    #[arg(long, value_name = "A..B", value_parser = parse_span)]
    span: Option<Range<usize>>,

    /// Also write the figures as JSON, those of each passage included
    #[arg(long, value_name = "F")]
    json: Option<PathBuf>,

    #[command(flatten)]
    model: ModelArgs,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    if options.passages < 2 || options.tokens < 2 {
        return Err("expected at least 2 --passages and 2 --tokens".into());
    }
    options.json.iter().try_for_each(|path| check_folder(path))?;
    let text = read_text(&options.text)?;
    let (model, _) = options.model.load()?;
    let passages = passages(&model, &text, options)?;
    let layers = model.config().num_hidden_layers;
    let middle = options.span.clone().unwrap_or(layers / 3..(2 * layers / 3).max(layers / 3 + 1));
    let settings = settings(&[0..layers, middle]);

    let own = settings.iter().filter(|setting| **setting == setting.equal()).count();
    let count = (own + 2) * passages.len();
    let bar = terminal::bar(count as u64, "measuring [{bar:30}] {pos}/{len}, {eta} to go");
    let measure = |prompt: &dyn Fn(&Passage) -> Prompt, thinking: &Thinking| {
        losses(&model, &passages, prompt, thinking, || bar.inc(1))
    };
    let plain = measure(&Passage::prompt, &Thinking::none())?;
    let repeated = measure(&Passage::repeated, &Thinking::none())?;
    let mut thought: Vec<Vec<f64>> = Vec::new();
    for setting in &settings {
        let same = settings.iter().zip(&thought).find(|(done, _)| **done == setting.equal());
        thought.push(match same {
            Some((_, losses)) => losses.clone(),
            None => measure(&Passage::prompt, &setting.thinking())?,
        });
    }
    bar.finish_and_clear();

    let report = Report { tokens: options.tokens, plain, repeated, settings, thought };
    if let Some(path) = &options.json {
        write(path, |file| Ok(serde_json::to_writer(file, &report.json())?))?;
    }
    Ok(write!(stdout(), "{}", report.table())?)
}

/// The first `--passages` lines of `text` that have two halves of `--tokens` tokens.
fn passages(model: &HybridModel, text: &str, options: &Options) -> Result<Vec<Passage>> {
    let (count, tokens, only_read) =
        (options.passages, options.tokens, usize::from(!options.first));
    let tokenizer = model.tokenizer().ok_or("the checkpoint has no tokenizer")?;
    let mut passages = Vec::new();
    for line in text.lines() {
        let ids = tokenizer.encode(line.trim(), true)?;
        let halves = (ids.get(..tokens), ids.get(tokens..2 * tokens));
        if let (Some(first), Some(second)) = halves
            && passages.len() < count
        {
            let begins = ids.first().copied() == tokenizer.bos_token_id();
            let (first, second) = (first.to_vec(), second.to_vec());
            passages.push(Passage { first, second, begins, only_read });
        }
    }
    match passages.len() {
        found if found == count => Ok(passages),
        found => Err(format!("only {found} of {count} passages have {tokens} tokens twice").into()),
    }
}

/// One way to think.
#[derive(Clone, Debug, PartialEq, Serialize)]
struct Setting {
    hand_off: HandOff,
    span: Range<usize>,
    passes: usize,
    sight: Sight,
    weight: f64,
}

impl Setting {
    fn thinking(&self) -> Thinking {
        Thinking::new(self.passes)
            .span(self.span.clone())
            .sight(self.sight)
            .refine(Interpolate::new(self.weight).slerp().match_norm())
            .hand_off(self.hand_off)
    }

    /// A setting that computes the same: a causal run gives the keys and values that re-reading gives.
    fn equal(&self) -> Self {
        let hand_off = match (self.hand_off, self.sight) {
            (HandOff::KeyValue, Sight::Causal) => HandOff::Refined,
            (other, _) => other,
        };
        Self { hand_off, ..self.clone() }
    }
}

/// All combinations, in the order of the table: one row after the other.
fn settings(spans: &[Range<usize>]) -> Vec<Setting> {
    let mut settings = Vec::new();
    for hand_off in HAND_OFFS {
        for span in spans {
            for passes in PASSES {
                for sight in SIGHTS {
                    settings.extend(WEIGHTS.map(|weight| Setting {
                        hand_off,
                        span: span.clone(),
                        passes,
                        sight,
                        weight,
                    }));
                }
            }
        }
    }
    settings
}

/// Losses in nats per token, one for each passage.
struct Report {
    tokens: usize,
    plain: Vec<f64>,
    repeated: Vec<f64>,
    settings: Vec<Setting>,
    /// For each setting.
    thought: Vec<Vec<f64>>,
}

impl Report {
    fn json(&self) -> serde_json::Value {
        let row = |(setting, losses): (&Setting, &Vec<f64>)| {
            let difference = Estimate::of_difference(losses, &self.plain);
            json!({ "setting": setting, "difference": difference, "losses": losses })
        };
        json!({
            "passages": self.plain.len(),
            "tokens": self.tokens,
            "plain": { "mean": Estimate::of(&self.plain), "losses": self.plain },
            "repeated": {
                "difference": Estimate::of_difference(&self.repeated, &self.plain),
                "losses": self.repeated,
            },
            "thought": self.settings.iter().zip(&self.thought).map(row).collect::<Vec<_>>(),
        })
    }

    /// A Markdown table; each row has every sight and weight for one hand-off, span and number of
    /// passes.
    fn table(&self) -> String {
        let plain = Estimate::of(&self.plain);
        let mut table = format!(
            "{} passages, {} tokens thought about, {} predicted. Nats per token, ± standard error.\n\
             No thinking: {:.3} ± {:.3}. First half read twice: {}. The others, less no thinking:\n\n",
            self.plain.len(),
            self.tokens,
            self.tokens,
            plain.mean,
            plain.standard_error,
            Estimate::of_difference(&self.repeated, &self.plain).signed(),
        );
        let columns = SIGHTS.iter().flat_map(|sight| WEIGHTS.map(|weight| (*sight, weight)));
        let heads: Vec<String> = columns
            .map(|(sight, weight)| match sight {
                Sight::Bidirectional => format!("both ways, w = {weight}"),
                Sight::Causal => format!("causal, w = {weight}"),
            })
            .collect();
        table += &format!("| hand-off | layers | passes | {} |\n", heads.join(" | "));
        table += &format!("|---|---|---|{}\n", "---|".repeat(heads.len()));
        let rows = self.settings.chunks(heads.len()).zip(self.thought.chunks(heads.len()));
        for (settings, losses) in rows {
            let Some(Setting { hand_off, span, passes, .. }) = settings.first() else { continue };
            let cells: Vec<String> = losses
                .iter()
                .map(|losses| Estimate::of_difference(losses, &self.plain).signed())
                .collect();
            let hand_off = match hand_off {
                HandOff::Refined => "refined".to_owned(),
                HandOff::KeyValue => "key-value".to_owned(),
                HandOff::Mixed { weight } => format!("mixed, {weight}"),
                other => format!("{other:?}"),
            };
            table += &format!("| {hand_off} | {span:?} | {passes} | {} |\n", cells.join(" | "));
        }
        table
    }
}
