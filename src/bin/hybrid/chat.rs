//! `hybrid chat`: a chat in the terminal. What was read once stays in the cache, so that each turn runs
//! only what is new; with thinking, which looks at everything anew, the whole chat is read each time. What is said is
//! text: a control token that it spells is none.

use std::io::{Write, stdout};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

use clap::Args;
use hybrid_attention::{
    Cancel, Conversation, Error, GenerationConfig, HybridModel, Message, StopReason, Tokenizer,
};

use crate::input::{Input, Said};
use crate::options::{
    CacheArgs, ModelArgs, SamplingArgs, SpeculationArgs, ThinkingArgs, fared, kept,
    with_chat_template,
};
use crate::terminal::{self, Result, say};

#[derive(Args, Debug)]
#[command(after_long_help = KEYS)]
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

    #[command(flatten)]
    speculation: SpeculationArgs,
}

impl Options {
    /// `config` with what was given on the command line.
    fn config(&self, config: GenerationConfig) -> GenerationConfig {
        self.speculation.apply(self.sampling.apply(self.thinking.apply(config)))
    }
}

/// What is said of the keys at the end of the long help.
const KEYS: &str = "\
In a terminal the keys of a shell edit a message: arrows, Ctrl-A, Ctrl-E, Ctrl-W; the arrow up and Ctrl-R call back \
earlier ones, which are kept in memory until the chat ends and never written to a file. A pasted text is one message, \
however many lines and bytes it has, where the terminal marks pastes, as most do; Ctrl-V Ctrl-J begins a new line. Ctrl-C \
stops an answer. Where the input is no terminal, each line is a message.

/reset begins anew, /quit or Ctrl-D leaves; //reset says \"/reset\". All else that begins with a slash, but for a \
single word, is a message.";

/// What the chat is and how long it may become.
#[derive(Args, Debug)]
#[command(next_help_heading = "Chat")]
struct ChatArgs {
    /// A system message that stays in front of the chat
    #[arg(long, value_name = "TEXT")]
    system: Option<String>,

    /// A chat template to use instead of the model's own: a file in Jinja
    #[arg(long, value_name = "F", hide_short_help = true)]
    chat_template: Option<PathBuf>,

    /// The most tokens of one answer
    #[arg(long, default_value_t = 512, value_name = "N")]
    max_tokens: usize,

    /// Room for the chat, in tokens [default: 4096, or the model's own if that is less]
    #[arg(long, value_name = "N")]
    context: Option<usize>,
}

pub(crate) fn run(options: &Options) -> Result<()> {
    options.config(GenerationConfig::default()).validate()?; // before waiting for the weights
    options.thinking.warn();
    let (model, load) = options.model.load()?;
    let model = options.cache.apply(model)?;
    let model = with_chat_template(model, options.chat.chat_template.as_deref())?;
    let mut chat = Chat::new(options, &model)?;
    let kept = kept(&model);
    say(&format!("[loaded in {load:.1} s as {kept}; /reset begins anew, /quit leaves]"));
    let mut input = Input::new()?;
    if input.is_terminal() {
        chat.interrupt.listen()?;
    }
    loop {
        match input.next()? {
            Said::Nothing => {}
            Said::Quit => return Ok(()),
            Said::Reset => chat.reset(),
            Said::Unknown(word) => {
                say(&format!(
                    "[{word} is not a command: there are /reset and /quit; to say it, write /{word}]"
                ));
            }
            Said::Message(message) => chat.answer(&message)?,
        }
    }
}

/// Ctrl-C stops the answer in progress; where there is none, or it does not stop, it ends the program.
#[derive(Clone, Default)]
struct Interrupt {
    answer: Arc<Mutex<Option<Cancel>>>,
}

impl Interrupt {
    fn listen(&self) -> Result<()> {
        let this = self.clone();
        Ok(ctrlc::set_handler(move || match &*this.lock() {
            Some(cancel) if !cancel.is_cancelled() => cancel.cancel(),
            _ => std::process::exit(130), // as a shell reports SIGINT
        })?)
    }

    fn begin(&self) -> Cancel {
        let cancel = Cancel::default();
        *self.lock() = Some(cancel.clone());
        cancel
    }

    fn end(&self) {
        *self.lock() = None;
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Cancel>> {
        self.answer.lock().unwrap_or_else(PoisonError::into_inner)
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
    interrupt: Interrupt,
}

impl<'a> Chat<'a> {
    fn new(options: &Options, model: &'a HybridModel) -> Result<Self> {
        let tokenizer = model.tokenizer().filter(|tokenizer| tokenizer.has_chat_template());
        let tokenizer = tokenizer
            .ok_or("the checkpoint has no chat template: give one with --chat-template")?;
        let config = model.generation_config().max_tokens(options.chat.max_tokens);
        let context =
            options.chat.context.unwrap_or(model.config().max_position_embeddings.min(4096));
        Ok(Self {
            model,
            tokenizer,
            config: options.config(config),
            conversation: model.conversation(context)?,
            answer_room: options.chat.max_tokens.min(context / 4),
            system: options.chat.system.as_ref().map(Message::system),
            turns: Vec::new(),
            interrupt: Interrupt::default(),
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
        let mut stream = stream.on_progress(update).cancel(self.interrupt.begin());
        let mut failed = stream.read_prompt().err();
        bar.finish_and_clear();
        let (mut answer, mut count) = (String::new(), 0);
        for token in &mut stream {
            let text = match token {
                Ok(token) => token.text,
                Err(error) => {
                    failed = Some(error);
                    break;
                }
            };
            // The space between the template and the answer is for the model, not for the reader.
            let text = if answer.is_empty() { text.trim_start() } else { &text };
            answer.push_str(text);
            write!(stdout(), "{text}")?;
            stdout().flush()?;
            count += 1;
        }
        self.interrupt.end();
        match failed {
            Some(Error::Cancelled) if count == 0 => {
                say("[stopped before the answer began: this message is taken back]");
                self.turns.pop();
                return Ok(());
            }
            Some(Error::Cancelled) => {
                writeln!(stdout())?;
                say("[stopped: what was said so far is the answer]");
            }
            Some(error) => return Err(error.into()),
            None => writeln!(stdout())?,
        }
        if stream.stop() == Some(StopReason::Context) {
            say("[the context is full: this answer is cut short]");
        }
        let seconds = stream.seconds();
        say(&format!(
            "[{count} tokens, {:.1} a second{}; {} of {} prompt tokens known, the rest read in {:.1} s, thought {:.1} s]",
            f64::from(count) / seconds.decode.max(1e-9),
            fared(stream.speculated()),
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
