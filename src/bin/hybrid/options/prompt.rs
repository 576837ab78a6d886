//! What is asked.

use std::path::{Path, PathBuf};

use clap::{ArgGroup, Args};
use hybrid_attention::{HybridModel, Message, Prompt};

use crate::files::read_text;
use crate::terminal::Result;

/// One prompt: text, a file of text, or token ids.
#[derive(Args, Debug)]
#[command(next_help_heading = "Prompt")]
#[command(group(ArgGroup::new("input").required(true).args(["prompt", "prompt_file", "ids"])))]
pub(crate) struct PromptArgs {
    /// The prompt
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub(crate) prompt: Option<String>,

    /// A UTF-8 file that holds the prompt, taken as it is
    #[arg(long, value_name = "F", hide_short_help = true)]
    pub(crate) prompt_file: Option<PathBuf>,

    /// The prompt as token ids; needs no tokenizer
    #[arg(long, value_name = "1,2,3", value_delimiter = ',', value_parser = parse_id)]
    #[arg(conflicts_with = "chat", hide_short_help = true)]
    pub(crate) ids: Option<Vec<u32>>,

    /// Put the prompt into the model's chat template, as a user's message
    #[arg(long)]
    pub(crate) chat: bool,

    /// A system message in front of it
    #[arg(long, value_name = "TEXT", requires = "chat")]
    pub(crate) system: Option<String>,

    /// A chat template to use instead of the model's own: a file in Jinja
    #[arg(long, value_name = "F", requires = "chat", hide_short_help = true)]
    pub(crate) chat_template: Option<PathBuf>,
}

/// `model` with the chat template in this file.
pub(crate) fn with_chat_template(model: HybridModel, file: Option<&Path>) -> Result<HybridModel> {
    match file {
        Some(file) => Ok(model.with_chat_template(&read_text(file)?)?),
        None => Ok(model),
    }
}

impl PromptArgs {
    /// `model` with the chat template that was given.
    pub(crate) fn apply(&self, model: HybridModel) -> Result<HybridModel> {
        with_chat_template(model, self.chat_template.as_deref())
    }

    /// The prompt, all of it thought about if there is thinking.
    pub(crate) fn prompt(&self) -> Result<Prompt> {
        if let Some(ids) = &self.ids {
            return Ok(ids.clone().into());
        }
        Ok(self.prompt_of(&self.text()?))
    }

    /// A prompt of this text, with the same options.
    pub(crate) fn prompt_of(&self, text: &str) -> Prompt {
        if !self.chat {
            return text.into();
        }
        let system = self.system.iter().map(Message::system);
        let messages: Vec<Message> = system.chain([Message::user(text)]).collect();
        Prompt::chat(&messages)
    }

    /// The prompt that was given as text.
    pub(crate) fn text(&self) -> Result<String> {
        match (&self.prompt, &self.prompt_file) {
            (Some(text), _) => Ok(text.clone()),
            (_, Some(path)) => read_text(path),
            _ => Err("no prompt: give --prompt, --prompt-file or --ids".into()),
        }
    }
}

/// A prompt of which a part may be read without thinking about it.
#[derive(Args, Debug)]
pub(crate) struct ThoughtPromptArgs {
    #[command(flatten)]
    pub(crate) input: PromptArgs,

    /// Text after the prompt that is only read, not thought about
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    #[arg(conflicts_with_all = ["ids", "chat"], help_heading = "Prompt")]
    pub(crate) plain: Option<String>,
}

impl ThoughtPromptArgs {
    pub(crate) fn prompt(&self) -> Result<Prompt> {
        match &self.plain {
            None => self.input.prompt(),
            Some(plain) => Ok(Prompt::default().context(self.input.text()?).plain(plain)),
        }
    }
}

/// A token id, with or without blanks around it.
fn parse_id(text: &str) -> std::result::Result<u32, String> {
    text.trim().parse().map_err(|_| "expected token ids like 1,2,3".to_string())
}
