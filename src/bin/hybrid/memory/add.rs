//! `hybrid memory add`: files into notes.

use std::io::{Write, stdout};
use std::path::PathBuf;

use clap::{Args, ValueEnum};
use hybrid_attention::HybridModel;
use hybrid_attention::memory::{Keep, Memory, Note, NoteId, pieces};
use serde_json::json;

use super::how::{NewStoreArgs, parse_tag, tagged};
use crate::files::{check_folder, read_text};
use crate::options::{CacheArgs, ModelArgs, ThinkingArgs};
use crate::terminal::{self, Result};

/// The most tokens of a note: a few of them fit a prompt.
const TOKENS: usize = 512;

#[derive(Args, Debug)]
#[command(next_help_heading = "Notes")]
pub(crate) struct Options {
    /// UTF-8 files; each is one note, or several where it is split or too long
    #[arg(value_name = "FILE", required = true)]
    files: Vec<PathBuf>,

    /// What becomes a note: a file, a paragraph between empty lines, or a line
    #[arg(long, value_enum, default_value_t = Split::Files, value_name = "BY")]
    split: Split,

    /// The most tokens of a note; a longer one is cut where a paragraph, a sentence or a word ends
    /// [default: 512, or half of the model's context if that is less]
    #[arg(long, value_name = "N")]
    tokens: Option<usize>,

    /// A tag of the notes, to ask by; may be given several times
    #[arg(long = "tag", value_name = "K=V", value_parser = parse_tag)]
    tags: Vec<(String, String)>,

    /// Where the notes are from [default: the name of the file]
    #[arg(long, value_name = "TEXT")]
    source: Option<String>,

    /// The note that this one takes the place of: it is kept, and never found again
    #[arg(long, value_name = "ID")]
    supersede: Option<NoteId>,

    /// Keep what reading each note leaves, in the folder F.kept beside the store, so that `ask` need not read it
    /// again: as it is thought about, or as the pass leaves it that embeds it, which for models that were trained to
    /// embed and to answer by that is one pass for both [default: thought; once documents are kept, as they are]
    #[arg(long, value_enum, value_name = "HOW", num_args = 0..=1, require_equals = true)]
    #[arg(default_missing_value = "thought")]
    keep: Option<Kept>,

    #[command(flatten)]
    store: NewStoreArgs,

    #[command(flatten)]
    model: ModelArgs,

    #[command(flatten)]
    cache: CacheArgs,

    #[command(flatten)]
    thinking: ThinkingArgs,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Kept {
    Thought,
    Embedded,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Split {
    Files,
    Paragraphs,
    Lines,
}

impl Split {
    /// The texts of a file, of which none is blank.
    fn texts(self, text: &str) -> Vec<String> {
        let mut texts = vec![String::new()];
        match self {
            Self::Files => texts.push(text.to_owned()),
            Self::Lines => texts.extend(text.lines().map(str::to_owned)),
            Self::Paragraphs => {
                for line in text.lines() {
                    match texts.last_mut() {
                        Some(last) if !line.trim().is_empty() => {
                            *last += line;
                            last.push('\n');
                        }
                        _ => texts.push(String::new()),
                    }
                }
            }
        }
        let texts = texts.into_iter().map(|text| text.trim().to_owned());
        texts.filter(|text| !text.is_empty()).collect()
    }
}

impl Options {
    /// `memory`, which keeps documents if that was asked for.
    fn keeping(&self, memory: Memory, model: &HybridModel) -> Result<Memory> {
        let thinking = self.thinking.thinking();
        let keep = match (self.keep, thinking) {
            (None, _) => return Ok(memory),
            (Some(Kept::Embedded), _) => Some(Keep::Embedded),
            (Some(Kept::Thought), Some(thinking)) => Some(Keep::Thought(thinking)),
            (Some(Kept::Thought), None) if memory.has_kept() => None,
            (Some(Kept::Thought), None) => Some(Keep::Thought(model.thinking().clone())),
        };
        Ok(memory.keep(keep)?)
    }
}

pub(crate) fn run(options: &Options) -> Result<()> {
    options.thinking.warn();
    if options.thinking.passes.is_some() && !matches!(options.keep, Some(Kept::Thought)) {
        terminal::say("note: notes are thought about where --keep keeps what that leaves");
    }
    let files = options.files.iter().map(|path| {
        let texts = options.split.texts(&read_text(path)?);
        match texts.is_empty() {
            true => Err(format!("{}: no text", path.display()).into()),
            false => Ok((path, texts)),
        }
    });
    let files = files.collect::<Result<Vec<_>>>()?;
    options.store.embedding()?; // before waiting for the weights
    check_folder(options.store.path())?;
    let (model, _) = options.model.load()?;
    let model = options.cache.apply(model)?;
    let memory = options.keeping(options.store.open(&model)?, &model)?;
    let count = files.iter().map(|(_, texts)| texts.len() as u64).sum();
    let bar = terminal::bar(count, "remembering [{bar:30}] {pos}/{len}, {eta} to go");
    bar.tick();
    for (path, texts) in files {
        let source = options.source.clone().unwrap_or_else(|| path.display().to_string());
        let note = tagged(Note::default().source(source), &options.tags);
        for text in texts {
            let cut = cut(&model, &text, options.tokens)
                .map_err(|error| format!("{}: {error}", path.display()))?;
            let ids = match options.supersede {
                None => memory.remember_all(cut.iter().map(|text| (text, note.clone())))?,
                Some(old) => match (cut.as_slice(), count) {
                    ([text], 1) => vec![memory.supersede(old, text, note.clone())?],
                    _ => return Err("--supersede takes one note, and here are several".into()),
                },
            };
            for id in ids {
                bar.suspend(|| print(&model, &memory, id))?;
            }
            bar.inc(1);
        }
    }
    bar.finish_and_clear();
    Ok(())
}

/// A text in pieces that are not too long.
fn cut(model: &HybridModel, text: &str, most: Option<usize>) -> Result<Vec<String>> {
    let tokenizer = model.tokenizer().ok_or("the checkpoint has no tokenizer")?;
    let most = most.unwrap_or_else(|| TOKENS.min(model.config().max_position_embeddings / 2));
    let pieces = pieces(tokenizer, text, most)?;
    Ok(pieces.into_iter().filter_map(|piece| text.get(piece)).map(str::to_owned).collect())
}

fn print(model: &HybridModel, memory: &Memory, id: NoteId) -> Result<()> {
    let Some(record) = memory.get(id)? else { return Ok(()) };
    let tokens = model.tokenizer().map(|it| it.encode(&record.text, true)).transpose()?;
    let mut line = json!({
        "id": id,
        "text": record.text,
        "tokens": tokens.map(|ids| ids.len()),
        "source": record.note.source,
        "tags": record.note.tags,
        "spans": record.spans,
    });
    if memory.keeps().is_some() {
        line["kept"] = memory.is_kept(id).into();
    }
    Ok(writeln!(stdout(), "{line}")?)
}
