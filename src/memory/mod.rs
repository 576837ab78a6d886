//! A memory of what texts say: which words carry a text, and notes that are found by what they say.
//!
//! ```
//! # use candle_core::Device;
//! use hybrid_attention::memory::{Embedding, Memory, Note, Recall, Volatile};
//! use hybrid_attention::{GenerationConfig, HybridModel};
//!
//! # fn main() -> hybrid_attention::Result<()> {
//! let model = HybridModel::tiny(&Device::Cpu)?;
//! // or Memory::open("notes.redb", &model), with the feature redb
//! let memory = Memory::over(Volatile::default(), &model, Embedding::default())?;
//! memory.remember("Then Eva gave everything to Max.", Note::default().tag("story", "1"))?;
//! let moved = memory.remember("Earlier, Leo had handed everything to Ida.", Note::default())?;
//! memory.supersede(moved, "Earlier, Leo had handed everything to Otto.", Note::default())?;
//!
//! let recall = Recall::best(2);
//! for found in memory.recall("Who has what Leo had?", &recall)? {
//!     println!("{:.3} {}", found.score, found.text);
//! }
//! let prompt = memory.prompt("Who has what Leo had?", &recall)?;
//! let answer = model.generate(prompt, &GenerationConfig::default().max_tokens(2))?;
//! # let _ = answer;
//! # Ok(())
//! # }
//! ```

mod documents;
mod embedding;
pub mod evaluate;
mod kept;
mod leverage;
mod look;
mod main_point;
mod note;
mod pieces;
mod recall;
mod salience;
pub mod store;
mod words;

use std::collections::HashMap;
use std::io::{BufRead, Write};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::Value;

pub use embedding::Embedding;
pub use kept::Keep;
pub use main_point::{MainPoint, Span};
pub use note::{Note, NoteId};
pub use pieces::pieces;
pub use recall::{Recall, Recalled};
pub use salience::{Heads, Reading, Salience};
#[cfg(feature = "redb")]
pub use store::Embedded;
#[cfg(feature = "pgvector")]
pub use store::Postgres;
pub use store::{Record, Store, Volatile};

use self::documents::Fresh;
use self::embedding::Embedded as Vectors;
use self::kept::Kept;
use self::note::now;
use crate::error::{Error, Result};
use crate::fingerprint;
use crate::generate::Prompt;
use crate::hybrid::HybridModel;
use crate::tokenizer::Tokenizer;

/// Texts with what they were remembered with, found by what they say.
///
/// It takes `&self` everywhere and can be shared between threads. What it writes is in its store when a call
/// returns.
///
/// The store knows which model made its vectors, by what that makes of a fixed text, and how. It refuses another
/// model, the same in another weight type or with another adapter, and another [`Embedding`]: their vectors
/// cannot be compared. [`export`](Self::export) and [`import`](Self::import) carry notes over.
#[derive(Clone, Debug)]
pub struct Memory {
    model: HybridModel,
    embedding: Embedding,
    store: Arc<dyn Store>,
    /// What it keeps of the texts beside their vectors, if it does.
    kept: Option<Arc<Kept>>,
}

/// What the vectors of a store are, as it says itself.
#[derive(Debug, Serialize, Deserialize)]
struct Manifest {
    format: u32,
    embedding: Value,
    /// What the model makes of a fixed text.
    probe: Vec<f32>,
}

impl Manifest {
    const FORMAT: u32 = 1;

    fn check_format(&self) -> Result<(), String> {
        match self.format {
            Self::FORMAT => Ok(()),
            other => Err(format!("format {other} of a memory: {} is read", Self::FORMAT)),
        }
    }

    /// Whether vectors of `other` can be compared with those of this one, and if not, why.
    fn check(&self, other: &Self) -> Result<(), String> {
        if self.embedding != other.embedding {
            return Err(format!(
                "its notes were embedded by {}, not by {}",
                other.embedding, self.embedding
            ));
        }
        fingerprint::check(&other.probe, &self.probe, "vectors")
    }
}

impl Memory {
    /// Opens the memory in the file at `path`, or makes one, which finds its notes by their whole text. One that is
    /// there finds them by what it was made with.
    ///
    /// # Errors
    /// As [`Embedded::open`] and [`Memory::over`].
    #[cfg(feature = "redb")]
    pub fn open(path: impl AsRef<std::path::Path>, model: &HybridModel) -> Result<Self> {
        Self::over(Embedded::open(path)?, model, None)
    }

    /// A memory over a store, which finds its notes by what `embedding` says; for `None` by what the store was made
    /// with, or by their whole text where it is a new one.
    ///
    /// # Errors
    /// [`Error::Store`] for a store that fails, whose vectors are another model's or were made another way, or
    /// that for `None` does not say how they were made, because it was by a closure; [`Error::Unsupported`] for a model
    /// with a [dictionary](crate::dictionary); what [`HybridModel::embed`]
    /// and [`MainPoint::of`] say.
    pub fn over(
        store: impl Store + 'static,
        model: &HybridModel,
        embedding: impl Into<Option<Embedding>>,
    ) -> Result<Self> {
        let thinks = model.thought_model();
        if thinks.decoder().has_side_source() || thinks.thinker().has_side_source() {
            // Its fixed text may hold no headword, and then would not tell dictionaries apart.
            return Err(Error::unsupported(
                "memory",
                "of a model that looks words up in a dictionary",
            ));
        }
        let failed = |error: &dyn std::fmt::Display| Error::store(store.place(), error);
        let read = |text: &str| -> Result<Manifest> {
            let found: Manifest = serde_json::from_str(text).map_err(|error| failed(&error))?;
            found.check_format().map_err(|error| failed(&error))?;
            Ok(found)
        };
        let embedding = match (embedding.into(), store.manifest()?) {
            (Some(embedding), _) => embedding,
            (None, None) => Embedding::default(),
            (None, Some(text)) => {
                Embedding::from_settings(read(&text)?.embedding).map_err(|error| failed(&error))?
            }
        };
        let (settings, probe) = (embedding.settings()?, embedding.probe(model)?);
        let ours = Manifest { format: Manifest::FORMAT, embedding: settings, probe };
        let text = serde_json::to_string(&ours).map_err(|error| failed(&error))?;
        let written = read(&store.claim(&text)?)?;
        ours.check(&written).map_err(|message| failed(&message))?;
        Ok(Self { model: model.clone(), embedding, store: Arc::new(store), kept: None })
    }

    /// What its notes are found by.
    #[must_use]
    pub fn embedding(&self) -> &Embedding {
        &self.embedding
    }

    /// Where the notes are.
    #[must_use]
    pub fn store(&self) -> &dyn Store {
        &*self.store
    }

    /// Remembers a text. The same text has the same name: it is remembered once, with what was said last.
    ///
    /// # Errors
    /// [`Error::EmptyPrompt`] for a text of nothing, [`Error::ContextFull`] for one that the model cannot read
    /// at once, [`Error::Parameter`] for a tag or a source with a NUL; [`Error::Store`]; what
    /// [`HybridModel::embed`] and [`MainPoint::of`] say. Where [documents are kept](Self::keep), as
    /// [`document`](Self::document), and [`Error::Io`] for a file that cannot be written.
    pub fn remember(&self, text: &str, note: Note) -> Result<NoteId> {
        let mut fresh = Fresh::new(self.kept.as_deref());
        let record = self.record(text, note, None, &mut fresh)?;
        self.store.put(std::slice::from_ref(&record))?;
        fresh.stay();
        Ok(record.id)
    }

    /// Remembers many texts at once: all of them, or none if one is refused.
    ///
    /// # Errors
    /// [`Error::InText`] with what [`remember`](Self::remember) says of a text; [`Error::Store`].
    pub fn remember_all<T: AsRef<str>>(
        &self,
        texts: impl IntoIterator<Item = (T, Note)>,
    ) -> Result<Vec<NoteId>> {
        let texts: Vec<(T, Note)> = texts.into_iter().collect();
        let named: Vec<&str> = texts.iter().map(|(text, _)| text.as_ref()).collect();
        let embedded = match &self.kept {
            None => self.embedding.embed_all(&self.model, &named)?,
            Some(_) => vec![None; texts.len()], // by the pass that is kept
        };
        let mut fresh = Fresh::new(self.kept.as_deref());
        let record = |(index, ((text, note), embedded)): (usize, ((T, Note), _))| {
            let record = self.record(text.as_ref(), note, embedded, &mut fresh);
            record.map_err(|error| Error::in_text(index, error))
        };
        let records = texts.into_iter().zip(embedded).enumerate().map(record);
        let records = records.collect::<Result<Vec<_>>>()?;
        self.store.put(&records)?;
        fresh.stay();
        Ok(records.iter().map(|record| record.id).collect())
    }

    fn record(
        &self,
        text: &str,
        mut note: Note,
        embedded: Option<Vectors>,
        fresh: &mut Fresh<'_>,
    ) -> Result<Record> {
        note.validate()?;
        if text.trim().is_empty() {
            return Err(Error::EmptyPrompt);
        }
        note.time.get_or_insert_with(now);
        let (vectors, spans) = match embedded {
            Some(embedded) => embedded,
            None => self.embed_and_keep(text, fresh)?,
        };
        let (id, text) = (NoteId::of(text), text.to_owned());
        Ok(Record { id, text, note, superseded_by: None, spans, vectors })
    }

    /// Remembers `text` in the place of the note `old`, which is kept and never recalled again. Returns the name
    /// of the new one.
    ///
    /// # Errors
    /// [`Error::Parameter`] for a name that no note has, or that of the same text; as
    /// [`remember`](Self::remember).
    pub fn supersede(&self, old: NoteId, text: &str, note: Note) -> Result<NoteId> {
        let mut fresh = Fresh::new(self.kept.as_deref());
        let new = self.record(text, note, None, &mut fresh)?;
        if new.id == old {
            return Err(Error::parameter("text", "another one than the note has", "the same"));
        }
        let mut past = self.store.get(old)?.ok_or_else(|| unknown(old))?;
        past.superseded_by = Some(new.id);
        let id = new.id;
        self.store.put(&[past, new])?;
        fresh.stay();
        self.kept.as_ref().map_or(Ok(()), |kept| kept.remove(old))?;
        Ok(id)
    }

    /// Removes a note for good, and what is kept of it. Returns whether it was there.
    ///
    /// # Errors
    /// [`Error::Store`]; [`Error::Io`] for a file that cannot be removed.
    pub fn forget(&self, id: NoteId) -> Result<bool> {
        self.kept.as_ref().map_or(Ok(()), |kept| kept.remove(id))?;
        self.store.remove(id)
    }

    /// A note by its name, superseded or not.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub fn get(&self, id: NoteId) -> Result<Option<Record>> {
        self.store.get(id)
    }

    /// How many notes there are, superseded ones too.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub fn len(&self) -> Result<usize> {
        self.store.len()
    }

    /// Whether there are none.
    ///
    /// # Errors
    /// [`Error::Store`].
    pub fn is_empty(&self) -> Result<bool> {
        self.store.is_empty()
    }

    /// All notes, superseded ones too, in the order of their names. What is added meanwhile may be among them.
    pub fn iter(&self) -> impl Iterator<Item = Result<Record>> + '_ {
        store::records(&*self.store)
    }

    /// The notes that fit a query best, best first. Near-duplicates are one note, the newest of them.
    ///
    /// # Errors
    /// [`Error::EmptyPrompt`] for a query of nothing; [`Error::Parameter`] for a setting outside its range;
    /// [`Error::Store`]; what [`HybridModel::embed`] and [`MainPoint::of`] say of the query.
    pub fn recall(&self, query: &str, recall: &Recall) -> Result<Vec<Recalled>> {
        recall.validate()?;
        if query.trim().is_empty() {
            return Err(Error::EmptyPrompt);
        }
        let (vectors, _) = self.embedding.embed(&self.model, query)?;
        let mut asked = recall.first_asked();
        loop {
            let hits = self.store.nearest(&recall.search(vectors.clone(), asked))?;
            let all = hits.len() < asked;
            let scores: HashMap<NoteId, f32> = hits.iter().map(|hit| (hit.id, hit.score)).collect();
            let ids: Vec<NoteId> = hits.iter().map(|hit| hit.id).collect();
            // One that is gone since is none.
            let found = self.store.get_many(&ids)?.into_iter().filter_map(|record| {
                let score = *scores.get(&record.id)?;
                Some((record, score))
            });
            let chosen = recall.choose(found.collect());
            if all || chosen.len() >= recall.wanted() {
                return Ok(chosen);
            }
            asked = asked.saturating_mul(4);
        }
    }

    /// A prompt of what is recalled, as context that can be thought about, and the question, which stays plain;
    /// where [documents are kept](Self::keep), of these, which need not be read again.
    /// Best notes first are taken while they fit [`Recall::tokens`]; the best one stands last, next to the
    /// question. What texts and question say is text: control tokens that they spell are none.
    ///
    /// # Errors
    /// As [`recall`](Self::recall); [`Error::Tokenizer`]; where documents are kept, as [`document`](Self::document).
    pub fn prompt(&self, question: &str, recall: &Recall) -> Result<Prompt> {
        self.prompt_of(question, &self.recall(question, recall)?, recall)
    }

    /// [`prompt`](Self::prompt) of notes that were recalled already.
    ///
    /// # Errors
    /// [`Error::Tokenizer`]; where documents are kept, as [`document`](Self::document).
    pub fn prompt_of(&self, question: &str, found: &[Recalled], recall: &Recall) -> Result<Prompt> {
        let question = self.tokenizer()?.encode_said(question)?;
        Ok(self.context_of(found, recall)?.plain_ids(&question))
    }

    /// What [`prompt_of`](Self::prompt_of) puts before the question, for a question of your own: a turn of a chat,
    /// say.
    ///
    /// # Errors
    /// As [`prompt_of`](Self::prompt_of).
    pub fn context_of(&self, found: &[Recalled], recall: &Recall) -> Result<Prompt> {
        if let Some(kept) = &self.kept {
            return self.context_of_kept(kept, found, recall);
        }
        let first = Prompt::default().plain_ids(&self.tokenizer()?.begin(Vec::new()));
        let texts = self.fitting_ids(found, recall)?;
        Ok(texts.iter().rev().fold(first, |prompt, (_, ids)| prompt.context_ids(ids)))
    }

    /// Those of `found` that fit [`Recall::tokens`], the first ones first, for a prompt of your own: each is counted
    /// with an empty line behind it.
    ///
    /// # Errors
    /// [`Error::NoTokenizer`], [`Error::Tokenizer`].
    pub fn fitting<'a>(&self, found: &'a [Recalled], recall: &Recall) -> Result<Vec<&'a Recalled>> {
        Ok(self.fitting_ids(found, recall)?.into_iter().map(|(note, _)| note).collect())
    }

    fn fitting_ids<'a>(
        &self,
        found: &'a [Recalled],
        recall: &Recall,
    ) -> Result<Vec<(&'a Recalled, Vec<u32>)>> {
        let tokenizer = self.tokenizer()?;
        let mut room = recall.most_tokens();
        let mut texts = Vec::new();
        for note in found {
            let ids = tokenizer.encode_said(&format!("{}\n\n", note.text))?;
            if let Some(left) = room.checked_sub(ids.len()) {
                room = left;
                texts.push((note, ids));
            }
        }
        Ok(texts)
    }

    fn tokenizer(&self) -> Result<&Tokenizer> {
        self.model.tokenizer().ok_or(Error::NoTokenizer { needed_for: "a memory" })
    }

    /// Writes all notes as JSON, one a line, without their vectors.
    ///
    /// # Errors
    /// [`Error::Store`], also for what cannot be written.
    pub fn export(&self, to: &mut impl Write) -> Result<()> {
        for record in self.iter() {
            let record = record?;
            let failed = |error: &dyn std::fmt::Display| Error::store("export", error);
            let line = serde_json::to_string(&record).map_err(|error| failed(&error))?;
            writeln!(to, "{line}").map_err(|error| failed(&error))?;
        }
        Ok(())
    }

    /// Reads notes that [`export`](Self::export) wrote, from this memory or another, and embeds their texts
    /// anew. All of them are remembered, or none; none is [kept](Self::keep). Returns how many there were.
    ///
    /// # Errors
    /// [`Error::InText`] with what is wrong with a line, counted from 0; as [`remember`](Self::remember).
    pub fn import(&self, from: &mut impl BufRead) -> Result<usize> {
        let mut records = Vec::new();
        for (index, line) in from.lines().enumerate() {
            let wrong = |error: &dyn std::fmt::Display| {
                Error::in_text(index, Error::parameter("note", "a line of JSON", error))
            };
            let line = line.map_err(|error| wrong(&error))?;
            if line.trim().is_empty() {
                continue;
            }
            let read: Record = serde_json::from_str(&line).map_err(|error| wrong(&error))?;
            let record = self.record(&read.text, read.note, None, &mut Fresh::new(None));
            let record = record.map_err(|error| Error::in_text(index, error))?;
            records.push(Record { superseded_by: read.superseded_by, ..record });
        }
        self.store.put(&records)?;
        Ok(records.len())
    }
}

fn unknown(id: NoteId) -> Error {
    Error::parameter("note", "the name of a note that is there", id)
}
