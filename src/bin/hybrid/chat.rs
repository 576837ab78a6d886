//! `hybrid chat`: a chat in the terminal. What has been read stays in the cache, so that each turn runs
//! only what is new; with thinking, which looks at everything anew, the whole chat is read each time.

use std::io::{BufRead, IsTerminal, Write, stderr, stdin, stdout};

use clap::Args;
use hybrid_attention::{
    Conversation, GenerationConfig, HybridModel, Message, StopReason, Tokenizer,
};

use crate::options::{CacheArgs, ModelArgs, SamplingArgs, ThinkingArgs, kept};
use crate::terminal::{self, Result, say};

#[derive(Args, Debug)]
pub(crate) struct Options {
    #[command(flatten)]
    model: ModelArgs,

    #[command(flatten)]
    cache: CacheArgs,

    #[command(flatten)]
    chat: ChatArgs,

    #[command(flatten)]
    thinking: ThinkingArgs,

    #[command(flatten)]
    sampling: SamplingArgs,
}

/// What the chat is and how long it may become.
#[derive(Args, Debug)]
#[command(next_help_heading = "Chat")]
struct ChatArgs {
    /// A system message that stays in front of the chat
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,

    /// The most tokens of one answer
    #[arg(long, default_value_t = 512, value_name = "N")]
    max_tokens: usize,

    /// Room for the chat, in tokens [default: 4096, or the model's own if that is less]
    #[arg(long, value_name = "N")]
    context: Option<usize>,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    let config = options.sampling.apply(GenerationConfig::default());
    options.thinking.apply(config).validate()?; // before waiting for the weights
    options.thinking.warn();
    let (model, load) = options.model.load()?;
    let model = options.cache.apply(model)?;
    let mut chat = Chat::new(options, &model)?;
    let kept = kept(&model);
    say(&format!("[loaded in {load:.1} s as {kept}; /reset begins anew, /quit leaves]"));
    let interactive = stdin().is_terminal();
    loop {
        if interactive {
            write!(stderr(), "> ")?;
        }
        let mut line = Vec::new();
        if stdin().lock().read_until(b'\n', &mut line)? == 0 {
            return Ok(());
        }
        let Ok(line) = String::from_utf8(line) else {
            say("[not UTF-8: ignored]");
            continue;
        };
        match line.trim() {
            "" => {}
            "/quit" => return Ok(()),
            "/reset" => chat.reset(),
            command if command.starts_with('/') => {
                say(&format!("[{command} is not a command: there are /reset and /quit]"));
            }
            message => chat.answer(message)?,
        }
    }
}

struct Chat<'a> {
    model: &'a HybridModel,
    tokenizer: &'a Tokenizer,
    config: GenerationConfig,
    conversation: Conversation,
    /// Tokens of the context to keep free for an answer.
    answer_room: usize,
    system: Option<Message>,
    /// The messages of the user and the model, alternating.
    turns: Vec<Message>,
}

impl<'a> Chat<'a> {
    fn new(options: &Options, model: &'a HybridModel) -> Result<Self> {
        let tokenizer = model.tokenizer().filter(|tokenizer| tokenizer.has_chat_template());
        let tokenizer = tokenizer.ok_or("the checkpoint has no chat template")?;
        let config = model.generation_config().max_tokens(options.chat.max_tokens);
        let context =
            options.chat.context.unwrap_or(model.config().max_position_embeddings.min(4096));
        Ok(Self {
            model,
            tokenizer,
            config: options.sampling.apply(options.thinking.apply(config)),
            conversation: model.conversation(context)?,
            answer_room: options.chat.max_tokens.min(context / 4),
            system: options.chat.system.as_ref().map(Message::system),
            turns: Vec::new(),
        })
    }

    fn reset(&mut self) {
        self.turns.clear();
        self.conversation.reset();
        say("[forgotten]");
    }

    fn answer(&mut self, message: &str) -> Result<()> {
        self.turns.push(Message::user(message));
        let Some(prompt) = self.fitting_prompt()? else { return Ok(()) };
        let (bar, update) = terminal::reading_bar();
        let stream = self.model.stream_in(&mut self.conversation, prompt, &self.config)?;
        let mut stream = stream.on_progress(update);
        stream.read_prompt()?;
        bar.finish_and_clear();
        let (mut answer, mut count) = (String::new(), 0);
        for token in &mut stream {
            let text = token?.text;
            // The space between the template and the answer is for the model, not for the reader.
            let text = if answer.is_empty() { text.trim_start() } else { &text };
            answer.push_str(text);
            write!(stdout(), "{text}")?;
            stdout().flush()?;
            count += 1;
        }
        writeln!(stdout())?;
        if stream.stop() == Some(StopReason::Context) {
            say("[the context is full: this answer is cut short]");
        }
        let seconds = stream.seconds();
        say(&format!(
            "[{count} tokens, {:.1} a second; {} of {} prompt tokens known, the rest read in {:.1} s, thought {:.1} s]",
            f64::from(count) / seconds.decode.max(1e-9),
            stream.kept(),
            stream.prompt_ids().len(),
            seconds.prefill,
            seconds.think,
        ));
        self.turns.push(Message::assistant(answer.trim()));
        Ok(())
    }

    /// The whole chat as token ids. If it leaves no room for an answer, the oldest questions and answers
    /// are forgotten; a message that is too long by itself is dropped, and `None` returned.
    fn fitting_prompt(&mut self) -> Result<Option<Vec<u32>>> {
        let context = self.conversation.capacity();
        for old in (0..self.turns.len()).step_by(2) {
            let turns = self.turns.iter().skip(old);
            let messages: Vec<Message> = self.system.iter().chain(turns).cloned().collect();
            let prompt = self.tokenizer.encode_chat(&messages, true)?;
            if prompt.len() + self.answer_room <= context {
                if old > 0 {
                    say(&format!("[the context is full: forgot the oldest {old} messages]"));
                }
                self.turns.drain(..old);
                return Ok(Some(prompt));
            }
        }
        say(&format!("[this message leaves no room for an answer in {context} tokens: ignored]"));
        self.turns.pop();
        Ok(None)
    }
}
