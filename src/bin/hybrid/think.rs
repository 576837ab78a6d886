//! `hybrid think`: what was thought about a prompt, as embeddings that another engine takes in the place of its
//! tokens. `examples/thoughts` hands them to transformers and vLLM.

use std::path::PathBuf;

use clap::Args;
use hybrid_attention::{GenerationConfig, Thinking};

use crate::files::{check_folder, write};
use crate::options::{ModelArgs, ThinkingArgs, ThoughtPromptArgs};
use crate::terminal::{self, Result, say};
use crate::torch;

#[derive(Args, Debug)]
#[command(next_help_heading = "Thoughts")]
pub(crate) struct Options {
    /// The file to write: NAME.safetensors, with the tensor prompt_embeds, or NAME.pt, the tensor alone as
    /// torch.save writes it; (tokens, hidden) in f32
    ///
    /// An engine that has the model's weights reads them causally from position 0 on, and answers as hybrid generate
    /// does. That needs thoughts of a span that begins at layer 0, handed off as refined.
    #[arg(long, value_name = "F")]
    out: PathBuf,

    #[command(flatten)]
    model: ModelArgs,

    #[command(flatten)]
    asked: ThoughtPromptArgs,

    #[command(flatten)]
    thinking: ThinkingArgs,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let prompt = options.asked.prompt()?;
    let path = &options.out;
    let is_torch = match path.extension().and_then(|extension| extension.to_str()) {
        Some("pt") => true,
        Some("safetensors") => false,
        _ => {
            let path = path.display();
            return Err(format!("{path}: expected a name that ends in .safetensors or .pt").into());
        }
    };
    check_folder(path)?;
    options.thinking.warn();
    let config = options.thinking.apply(GenerationConfig::default());
    config.validate()?; // before waiting for the weights
    let (model, _) = options.model.load()?;
    let model = options.asked.input.apply(model)?;
    let asked_for = options.thinking.thinking();
    if asked_for.as_ref().unwrap_or(model.thinking()) == &Thinking::none() {
        say("note: without --passes these are the plain embeddings of the prompt");
    }
    let spinner = terminal::spinner("thinking");
    let thoughts = model.think(prompt, &config);
    spinner.finish_and_clear();
    let thoughts = thoughts?;
    let embeddings = thoughts.prompt_embeddings()?;
    match is_torch {
        true => write(path, |file| torch::save(file, &embeddings))?,
        false => {
            thoughts.save(path)?;
            say(&format!("[wrote {}]", path.display()));
        }
    }
    let (tokens, hidden) = embeddings.dims2()?;
    let drift: Vec<String> =
        thoughts.trace.drift().iter().map(|drift| format!("{drift:.3}")).collect();
    let passes = drift.len();
    say(&format!(
        "[{tokens} tokens of {hidden} numbers; {passes} passes, drift {}]",
        drift.join(" ")
    ));
    Ok(())
}
