//! `hybrid generate`: answers one prompt, or a file of them.

use std::collections::BTreeMap;
use std::io::{Write, stdout};
use std::path::PathBuf;

use clap::Args;
use hybrid_attention::{Answer, GenerationConfig, HybridModel, Prompt, TokenStream};
use indicatif::ProgressBar;
use serde_json::{Value, json};

use crate::files::read_text;
use crate::options::{
    CacheArgs, CandidateArgs, ModelArgs, PromptArgs, SamplingArgs, SpeculationArgs, ThinkingArgs,
    fared, kept,
};
use crate::stubs;
use crate::terminal::{self, Result};

#[derive(Args, Debug)]
pub(crate) struct Options {
    #[command(flatten)]
    model: ModelArgs,

    #[command(flatten)]
    cache: CacheArgs,

    #[command(flatten)]
    input: PromptArgs,

    /// A UTF-8 file of prompts, one a line, to be answered side by side; empty lines are skipped
    ///
    /// Prints a JSON object a line, in the order of the prompts. Each answer is what it would be alone.
    #[arg(long, value_name = "F", group = "input", help_heading = "Prompt")]
    #[arg(conflicts_with_all = ["candidates", "speculate"])]
    prompts: Option<PathBuf>,

    #[command(flatten)]
    thinking: ThinkingArgs,

    #[command(flatten)]
    sampling: SamplingArgs,

    #[command(flatten)]
    candidates: CandidateArgs,

    #[command(flatten)]
    speculation: SpeculationArgs,

    #[command(flatten)]
    answer: AnswerArgs,
}

/// Where answers end, and what is printed of them.
#[derive(Args, Debug)]
#[command(next_help_heading = "Answer")]
struct AnswerArgs {
    /// The most tokens to generate
    #[arg(long, default_value_t = 128, value_name = "N")]
    max_tokens: usize,

    /// End the answer before this text; may be given several times
    #[arg(long, value_name = "TEXT", hide_short_help = true)]
    stop: Vec<String>,

    /// Also give the log-probability of each prompt token (with --json)
    #[arg(long, requires = "json", hide_short_help = true)]
    prompt_logprobs: bool,

    /// Print one JSON object instead of the text
    #[arg(long)]
    json: bool,
}

/// What is to be answered.
enum Asked {
    One(Prompt),
    /// Each with the number of its line, from 1.
    Many(Vec<(usize, Prompt)>),
}

impl Options {
    fn asked(&self) -> Result<Asked> {
        let Some(path) = &self.prompts else { return Ok(Asked::One(self.input.prompt()?)) };
        let text = read_text(path)?;
        let lines = (1..).zip(text.lines()).filter(|(_, line)| !line.trim().is_empty());
        let prompts: Vec<_> = lines.map(|(at, line)| (at, self.input.prompt_of(line))).collect();
        match prompts.is_empty() {
            true => Err(format!("{}: no prompts", path.display()).into()),
            false => Ok(Asked::Many(prompts)),
        }
    }

    /// `config` with what was given on the command line.
    fn config(&self, config: GenerationConfig) -> GenerationConfig {
        let AnswerArgs { max_tokens, stop, prompt_logprobs, .. } = &self.answer;
        let config = config.max_tokens(*max_tokens).prompt_logprobs(*prompt_logprobs);
        let config = self.sampling.apply(self.thinking.apply(config));
        let config = self.candidates.apply(config, self.sampling.temperature);
        let config = self.speculation.apply(config);
        stop.iter().fold(config, GenerationConfig::stop)
    }
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let asked = options.asked()?;
    options.config(GenerationConfig::default()).validate()?; // before waiting for the weights
    options.thinking.warn();
    let (model, load) = options.model.load()?;
    let model = options.input.apply(options.cache.apply(model)?)?;
    let config = options.config(model.generation_config());
    match asked {
        Asked::One(prompt) => {
            let stream = stubs::begin(&model, prompt, &config, &options.candidates)?;
            match options.answer.json {
                true => report_one(&model, stream, load),
                false => tell(&model, stream, load),
            }
        }
        Asked::Many(lines) => report_all(&model, &lines, &config, load),
    }
}

/// Prints one answer as it is generated.
pub(crate) fn tell(model: &HybridModel, mut stream: TokenStream<'_>, load: f64) -> Result<()> {
    let mut count = 0;
    for token in &mut stream {
        let token = token?;
        match model.tokenizer() {
            Some(_) => write!(stdout(), "{}", token.text)?,
            None => write!(stdout(), "{} ", token.id)?,
        }
        stdout().flush()?;
        count += 1;
    }
    writeln!(stdout())?;
    let seconds = stream.seconds();
    terminal::say(&format!(
        "[{count} tokens, {:.1} a second{}, stopped by {}; loaded in {load:.1} s as {}, thought {:.1} s, read the prompt in {:.1} s]",
        f64::from(count) / seconds.decode.max(1e-9),
        fared(stream.speculated()),
        terminal::stopped_by(stream.stop()),
        kept(model),
        seconds.think,
        seconds.prefill,
    ));
    Ok(())
}

/// One answer as a JSON object.
fn report_one(model: &HybridModel, stream: TokenStream<'_>, load: f64) -> Result<()> {
    // Candidates are shown as they go.
    let spinner = match stream.candidates() {
        [] => terminal::spinner("generating"),
        _ => ProgressBar::hidden(),
    };
    let answer = stream.collect_answer()?;
    spinner.finish_and_clear();
    Ok(writeln!(stdout(), "{}", report(model, &answer, load))?)
}

/// All answers in order, each as a JSON object on a line of its own. For a prompt that fails, the line
/// has its error; once all others are answered, the program fails, too.
fn report_all(
    model: &HybridModel,
    lines: &[(usize, Prompt)],
    config: &GenerationConfig,
    load: f64,
) -> Result<()> {
    let bar = terminal::bar(lines.len() as u64, "answering [{bar:30}] {pos}/{len}, {eta} to go");
    bar.tick(); // the first may take a while
    let prompts = lines.iter().map(|(_, prompt)| prompt.clone());
    let (mut ended, mut next, mut failed) = (BTreeMap::new(), 0, None);
    for (index, answer) in model.generate_many(prompts, config)? {
        ended.insert(index, answer);
        // Answers come as they end, and are printed in the order of their prompts.
        while let Some(answer) = ended.remove(&next) {
            let line = lines.get(next).map_or(0, |(line, _)| *line);
            let report = match answer {
                Ok(answer) => report(model, &answer, load),
                Err(error) => {
                    let message = error.to_string();
                    failed.get_or_insert_with(|| format!("--prompts: line {line}: {message}"));
                    json!({ "error": message })
                }
            };
            bar.suspend(|| writeln!(stdout(), "{report}"))?;
            next += 1;
        }
        bar.inc(1);
    }
    bar.finish_and_clear();
    failed.map_or(Ok(()), |message| Err(message.into()))
}

/// An answer as JSON.
pub(crate) fn report(model: &HybridModel, answer: &Answer, load: f64) -> Value {
    let mut report = json!({
        "prompt_ids": answer.prompt_ids,
        "ids": answer.ids,
        "text": model.tokenizer().map(|_| &answer.text),
        "logprobs": answer.logprobs,
        "stop": answer.stop,
        "drift": answer.drift(),
        "seconds": {
            "load": load,
            "think": answer.seconds.think,
            "prefill": answer.seconds.prefill,
            "decode": answer.seconds.decode,
        },
    });
    if let Some(logprobs) = &answer.prompt_logprobs {
        report["prompt_logprobs"] = json!(logprobs);
    }
    if !answer.candidates.is_empty() {
        report["candidates"] = stubs::report(&answer.candidates);
    }
    if let Some(speculated) = &answer.speculated {
        report["speculated"] = json!(speculated);
    }
    report
}
