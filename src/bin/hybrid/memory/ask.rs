//! `hybrid memory ask`: the notes that fit a question, and an answer by them.

use std::io::{IsTerminal, Write, stdout};

use clap::Args;
use hybrid_attention::memory::{MainPoint, Memory, Recall, Recalled};
use hybrid_attention::{Error, GenerationConfig, HybridModel, Message, Prompt};
use serde_json::json;

use super::how::{How, StoreArgs, parse_tag};
use crate::generate;
use crate::options::{CacheArgs, ModelArgs, SamplingArgs, ThinkingArgs};
use crate::terminal::{self, Result};

#[derive(Args, Debug)]
#[command(next_help_heading = "Question")]
pub(crate) struct Options {
    /// The question
    #[arg(value_name = "QUESTION", allow_hyphen_values = true)]
    question: String,

    /// How many notes to find
    #[arg(long, default_value_t = 3, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    best: u64,

    /// Find only notes with this tag; may be given several times
    #[arg(long = "tag", value_name = "K=V", value_parser = parse_tag)]
    tags: Vec<(String, String)>,

    /// Find only notes of at least this score
    #[arg(long, value_name = "S", allow_negative_numbers = true)]
    min_score: Option<f32>,

    /// Prefer notes unlike those already taken, from 0, not at all, to below 1
    #[arg(long, value_name = "D", hide_short_help = true)]
    diversity: Option<f32>,

    /// The most tokens of notes in the prompt
    #[arg(long, default_value_t = 1024, value_name = "N", hide_short_help = true)]
    context: usize,

    /// Put notes and question into the model's chat template, as a user's message; notes that are kept stand before
    /// the conversation
    #[arg(long)]
    chat: bool,

    /// Of notes that are kept, run the last N tokens of each but the first again: these then see those before them
    #[arg(long, default_value_t = 0, value_name = "N", hide_short_help = true)]
    recompute: usize,

    /// Read notes now, and think about them as asked, also where what reading leaves is kept
    #[arg(long, hide_short_help = true)]
    reread: bool,

    /// The most tokens of the answer; 0 for none
    #[arg(long, default_value_t = 128, value_name = "N")]
    max_tokens: usize,

    /// Whose words are marked where the store embeds whole texts, and so says of no word that it carries them
    #[arg(long, value_enum, default_value_t = How::Received, value_name = "HOW", hide_short_help = true)]
    mark: How,

    /// Print one JSON object: {"found": [{"id", "text", "score", "spans": [[from, to, score], ..], ..}, ..],
    /// "answer": {..}}, with bytes of the text, and the answer as `generate --json` gives it
    #[arg(long)]
    json: bool,

    #[command(flatten)]
    store: StoreArgs,

    #[command(flatten)]
    model: ModelArgs,

    #[command(flatten)]
    cache: CacheArgs,

    #[command(flatten)]
    thinking: ThinkingArgs,

    #[command(flatten)]
    sampling: SamplingArgs,
}

impl Options {
    fn recall(&self) -> Recall {
        let recall = Recall::best(usize::try_from(self.best).unwrap_or(usize::MAX));
        let recall = recall.recompute(self.recompute);
        let recall =
            self.min_score.into_iter().fold(recall.tokens(self.context), Recall::min_score);
        let recall = self.diversity.into_iter().fold(recall, Recall::diversity);
        self.tags.iter().fold(recall, |recall, (name, value)| recall.tag(name, value))
    }

    fn config(&self, config: GenerationConfig) -> GenerationConfig {
        self.sampling.apply(self.thinking.apply(config.max_tokens(self.max_tokens)))
    }

    fn prompt(&self, model: &HybridModel, memory: &Memory, found: &[Recalled]) -> Result<Prompt> {
        if !self.chat {
            return Ok(memory.prompt_of(&self.question, found, &self.recall())?);
        }
        if memory.keeps().is_some() {
            let tokenizer = model.tokenizer().ok_or("the checkpoint has no tokenizer")?;
            let turn = tokenizer.encode_chat(&[Message::user(&self.question)], true)?;
            // Before the notes it stands already.
            let begins = usize::from(turn.first().copied() == tokenizer.bos_token_id());
            let turn = turn.get(begins..).unwrap_or_default();
            return Ok(memory.context_of(found, &self.recall())?.plain_ids(turn));
        }
        let texts = memory.fitting(found, &self.recall())?;
        let texts = texts.iter().rev().map(|found| format!("{}\n\n", found.text));
        let message = texts.chain([self.question.clone()]).collect::<String>();
        Ok(Prompt::chat(&[Message::user(message)]))
    }
}

pub(crate) fn run(options: &Options) -> Result<()> {
    options.config(GenerationConfig::default()).validate()?; // before waiting for the weights
    options.thinking.warn();
    let store = options.store.existing()?;
    let (model, load) = options.model.load()?;
    let model = options.cache.apply(model)?;
    let mut memory = Memory::over(store, &model, None)?;
    if memory.has_kept() && !options.reread {
        memory = memory.keep(None)?;
        if options.thinking.passes.is_some() {
            terminal::say(
                "note: notes are kept, and taken as they were thought about: --reread thinks now",
            );
        }
    }
    let mut found = memory.recall(&options.question, &options.recall())?;
    for note in found.iter_mut().filter(|note| note.spans.is_empty()) {
        note.spans = marked(&model, &note.text, options.mark)?;
    }
    let config = options.config(model.generation_config());
    let prompt = options.prompt(&model, &memory, &found)?;
    if !options.json {
        show(&found)?;
        return match options.max_tokens {
            0 => Ok(()),
            _ => generate::tell(&model, terminal::begin(&model, prompt, &config)?, load),
        };
    }
    let answer = terminal::begin(&model, prompt, &config)?.collect_answer()?;
    let found = found.iter().map(|note| {
        let mut found = json!({
            "id": note.id,
            "text": note.text,
            "score": note.score,
            "spans": note.spans,
            "source": note.note.source,
            "tags": note.note.tags,
        });
        if memory.keeps().is_some() {
            found["kept"] = memory.is_kept(note.id).into();
        }
        found
    });
    let found: Vec<_> = found.collect();
    let report = json!({ "found": found, "answer": generate::report(&model, &answer, load) });
    Ok(writeln!(stdout(), "{report}")?)
}

/// The words that carry a text, where the store does not say.
fn marked(model: &HybridModel, text: &str, how: How) -> Result<Vec<(usize, usize, f32)>> {
    let point = match MainPoint::of(model, text, &how.salience()) {
        // Long for a text that is read twice, and no reason not to answer.
        Err(Error::ContextFull { .. }) => MainPoint::of(model, text, &How::Received.salience()),
        other => other,
    }?;
    Ok(point.spans().iter().map(|span| (span.bytes.start, span.bytes.end, span.score)).collect())
}

/// The notes, best first. In a terminal the words that carry them are bold, and elsewhere between asterisks.
fn show(found: &[Recalled]) -> Result<()> {
    let (begin, end) = if stdout().is_terminal() { ("\x1b[1m", "\x1b[0m") } else { ("*", "*") };
    let mut out = stdout().lock();
    for (number, note) in (1..).zip(found) {
        let source = note.note.source.as_deref().unwrap_or_default();
        writeln!(out, "{number}. {:.3} {} {}", note.score, note.id, plain(source))?;
        let (mut text, mut at) = (String::new(), 0);
        for (from, to, _) in &note.spans {
            text += &plain(note.text.get(at..*from).unwrap_or_default());
            let span = plain(note.text.get(*from..*to).unwrap_or_default());
            text += &format!("{begin}{span}{end}");
            at = *to;
        }
        text += &plain(note.text.get(at..).unwrap_or_default());
        writeln!(out, "   {text}\n")?;
    }
    if found.is_empty() {
        terminal::say("[nothing was found]");
    }
    Ok(())
}

/// A text without control characters, its lines below each other.
fn plain(text: &str) -> String {
    let line = |line: &str| line.chars().flat_map(terminal::plain).collect::<String>();
    text.split('\n').map(|it| line(it.trim_end_matches('\r'))).collect::<Vec<_>>().join("\n   ")
}
