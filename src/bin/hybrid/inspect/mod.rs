//! `hybrid inspect`: what the thought passes do to a prompt, as one page for the browser and as JSON.
//!
//! ```text
//! hybrid inspect --model PATH --passes 3 --span 10..20 \
//!     --prompt "The trophy does not fit in the suitcase because it is too big."
//! ```
//!
//! The page, `inspect.html` unless `--out` says otherwise, is self-contained: no network, no scripts.
//! `--json` writes the same numbers, and all of them where the page must pool. With `--candidates` the page also
//! draws which of them were dropped when; they are drawn with seed 0. With `--attention` it works through a head, too,
//! or through attention with cosines as scores; then a model that does not think has a page as well.

mod draw;
mod page;
mod steps;
mod steps_page;
mod tokens;

use std::io::Write;
use std::path::PathBuf;

use clap::Args;
use hybrid_attention::generate::Stub;
use hybrid_attention::thought::{Detail, Trace};
use hybrid_attention::{Answer, GenerationConfig, HybridModel, Prompt, Thinking};
use serde::Serialize;

use self::steps::{Chosen, Worked, parse_chosen};
use self::tokens::Token;
use crate::files::{check_folder, write};
use crate::options::{CandidateArgs, ModelArgs, ThinkingArgs, ThoughtPromptArgs};
use crate::stubs;
use crate::terminal::{self, Result};

#[derive(Args, Debug)]
#[command(next_help_heading = "Page")]
pub(crate) struct Options {
    /// The most tokens of the two answers, with and without thinking
    #[arg(long, default_value_t = 32, value_name = "N")]
    max_tokens: usize,

    /// Leave out similarity and attention, which grow with the square of the prompt
    #[arg(long)]
    no_maps: bool,

    /// Also work through a head of a layer step by step, from queries and keys to the residual, as in 10:3, or through
    /// attention with cosines of the embeddings as scores: cosine; may be given several times
    #[arg(long, value_name = "LAYER:HEAD", value_parser = parse_chosen)]
    attention: Vec<Chosen>,

    /// The page to write
    #[arg(long, default_value = "inspect.html", value_name = "F")]
    out: PathBuf,

    /// Also write the numbers as JSON
    #[arg(long, value_name = "F")]
    json: Option<PathBuf>,

    #[command(flatten)]
    model: ModelArgs,

    #[command(flatten)]
    asked: ThoughtPromptArgs,

    #[command(flatten)]
    thinking: ThinkingArgs,

    #[command(flatten)]
    candidates: CandidateArgs,
}

impl Options {
    /// Bytes of the text that is thought about, if that is only a part of it.
    fn context_bytes(&self) -> Result<Option<usize>> {
        self.asked.plain.as_ref().map(|_| Ok(self.asked.input.text()?.len())).transpose()
    }

    /// What was asked for, or else the checkpoint's `own` thinking.
    fn thinking(&self, own: &Thinking) -> Result<Thinking> {
        let thinking = self.thinking.thinking().unwrap_or_else(|| own.clone());
        let other = !self.attention.is_empty() && self.candidates.candidates.is_none();
        if thinking.is_none() && !other {
            return Err(
                "nothing to look into without thinking: give --passes or --attention".into()
            );
        }
        Ok(thinking.detail(if self.no_maps { Detail::Tokens } else { Detail::Maps }))
    }

    /// The likeliest answer, or with thinking the best of the candidates.
    fn config(&self, config: GenerationConfig, thinking: Thinking) -> GenerationConfig {
        let thinks = !thinking.is_none();
        let config = config.temperature(0.0).max_tokens(self.max_tokens).thinking(thinking);
        if thinks { self.candidates.apply(config.seed(0), None) } else { config }
    }

    /// Finds errors now that would otherwise appear only after all the work.
    fn check(&self) -> Result<()> {
        self.json.iter().chain([&self.out]).try_for_each(|path| check_folder(path))?;
        // What the checkpoint says is not known yet.
        let thinking = self.thinking(&Thinking::new(1))?;
        Ok(self.config(GenerationConfig::default(), thinking).validate()?)
    }
}

/// Everything there is to show.
#[derive(Serialize)]
struct Inspection {
    model: String,
    layers: usize,
    tokens: Vec<Token>,
    #[serde(flatten)]
    passes: Option<Passes>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    attention: Vec<Worked>,
}

/// What thinking did.
#[derive(Serialize)]
struct Passes {
    settings: Thinking,
    trace: Trace,
    /// The control: the same prompt without thinking.
    plain: Said,
    thought: Said,
    /// From which the one after thinking was chosen.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    candidates: Vec<Stub>,
}

/// An answer, as far as it was generated.
#[derive(Serialize)]
struct Said {
    tokens: Vec<Token>,
    logprobs: Vec<f32>,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let (prompt, context_bytes) = (options.asked.prompt()?, options.context_bytes()?);
    options.check()?; // before waiting for the weights
    let (model, _) = options.model.load()?;
    let model = options.asked.input.apply(model)?;

    let thinking = options.thinking(model.thinking())?;
    let (ids, attention) =
        steps::work_through(&model, &prompt, context_bytes, &thinking, &options.attention)?;
    let (thought_about, passes) = match thinking.is_none() {
        true => (Some(0), None),
        false => (context_bytes, Some(compare(options, &model, &prompt, thinking)?)),
    };
    let inspection = Inspection {
        model: options.model.name(),
        layers: model.config().num_hidden_layers,
        tokens: tokens::of_prompt(model.tokenizer(), &ids, thought_about),
        passes,
        attention,
    };
    if let Some(path) = &options.json {
        write(path, |file| Ok(serde_json::to_writer(file, &inspection)?))?;
    }
    let page = page::render(&inspection)?;
    write(&options.out, |file| Ok(file.write_all(page.as_bytes())?))
}

/// What thinking does to the prompt, and to the answer.
fn compare(
    options: &Options,
    model: &HybridModel,
    prompt: &Prompt,
    thinking: Thinking,
) -> Result<Passes> {
    let answer = |thinking| -> Result<Answer> {
        let config = options.config(model.generation_config(), thinking);
        let stream = match config.candidates {
            Some(_) => stubs::begin(model, prompt.clone(), &config, &options.candidates)?,
            None => terminal::begin(model, prompt.clone(), &config)?,
        };
        Ok(stream.collect_answer()?)
    };
    let mut thought = answer(thinking.clone())?;
    let plain = answer(Thinking::none())?;
    if thought.traces.is_empty() {
        return Err("the model left no trace of its thinking".into());
    }
    Ok(Passes {
        // With its noise, if the candidates have some.
        settings: options.config(model.generation_config(), thinking).thinking.unwrap_or_default(),
        trace: thought.traces.swap_remove(0),
        plain: said(model, &plain),
        thought: said(model, &thought),
        candidates: thought.candidates,
    })
}

fn said(model: &HybridModel, answer: &Answer) -> Said {
    Said {
        tokens: tokens::of_answer(model.tokenizer(), &answer.prompt_ids, &answer.ids),
        logprobs: answer.logprobs.clone(),
    }
}
