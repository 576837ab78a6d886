//! Answers one prompt, with or without thinking about it first.
//!
//! ```text
//! cargo run --release --example generate -- --model PATH --prompt "Once upon a time"
//! ```

mod common;

use std::io::{Write, stdout};
use std::process::ExitCode;

use clap::Parser;
use hybrid_attention::{Answer, GenerationConfig, HybridModel};
use serde_json::json;

/// Answer one prompt, with or without thinking about it first.
#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    model: common::ModelArgs,

    #[command(flatten)]
    cache: common::CacheArgs,

    #[command(flatten)]
    input: common::PromptArgs,

    #[command(flatten)]
    thinking: common::ThinkingArgs,

    /// The most tokens to generate
    #[arg(long, default_value_t = 128, value_name = "N")]
    max_tokens: usize,

    #[command(flatten)]
    sampling: common::SamplingArgs,

    /// End the answer before this text; may be given several times
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,

    /// Also give the log-probability of each prompt token (with --json)
    #[arg(long, requires = "json")]
    prompt_logprobs: bool,

    /// Print one JSON object instead of the text
    #[arg(long)]
    json: bool,
}

impl Cli {
    /// `config` with what was given on the command line.
    fn config(&self, config: GenerationConfig) -> GenerationConfig {
        let config = config.max_tokens(self.max_tokens).prompt_logprobs(self.prompt_logprobs);
        let config = self.sampling.apply(self.thinking.apply(config));
        self.stop.iter().fold(config, GenerationConfig::stop)
    }
}

fn main() -> ExitCode {
    common::main(|| run(&Cli::parse()))
}

fn run(cli: &Cli) -> common::Result<()> {
    let prompt = cli.input.prompt()?;
    cli.config(GenerationConfig::default()).validate()?; // before the wait for the weights
    cli.thinking.warn();
    let (model, load) = cli.model.load()?;
    let model = cli.cache.apply(model)?;

    let (bar, update) = common::reading_bar();
    let config = cli.config(model.generation_config()).on_progress(update);
    let mut stream = model.stream(prompt, &config)?;
    bar.finish_and_clear();

    if cli.json {
        let spinner = common::spinner("generating");
        let answer = stream.collect_answer()?;
        spinner.finish_and_clear();
        writeln!(stdout(), "{}", report(&model, &answer, load))?;
        return Ok(());
    }
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
    common::say(&format!(
        "[{count} tokens, {:.1} a second, stopped by {}; loaded in {load:.1} s as {}, thought {:.1} s, read the prompt in {:.1} s]",
        f64::from(count) / seconds.decode.max(1e-9),
        common::stopped_by(stream.stop()),
        common::kept(&model),
        seconds.think,
        seconds.prefill,
    ));
    Ok(())
}

fn report(model: &HybridModel, answer: &Answer, load: f64) -> serde_json::Value {
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
    report
}
