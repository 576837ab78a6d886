//! The documents that a memory keeps: a folder with a file for each note.

mod file;

use std::collections::VecDeque;
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};

use candle_core::DType;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sha2::{Digest, Sha256};

use super::embedding::{Embedding, PROBE};
use super::note::NoteId;
use crate::embed::{EmbedConfig, Readable};
use crate::error::{Error, Result};
use crate::fingerprint;
use crate::generate::Prompt;
use crate::hybrid::HybridModel;
use crate::load::read_text;
use crate::replace::create;
use crate::thought::{Document, Thinking, ThoughtLoop};
use crate::tokenizer::Tokenizer;

/// What the folder says of itself.
const MANIFEST: &str = "kept.json";

/// Documents whose files stay mapped, and need not be checked again.
const MOST_OPEN: usize = 64;

/// How a memory reads the documents that it [keeps](super::Memory::keep).
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Keep {
    /// As the context of an answer is read with this thinking, or causally where it has no passes: what is recalled
    /// then stands for what [`Memory::prompt`](super::Memory::prompt) of the same memory would have made the model
    /// think about.
    Thought(Thinking),
    /// As the pass leaves them that embeds them, so that one run gives both the vector and what is kept
    /// ([`HybridModel::embed_document`]); for an [`Embedding::Whole`]. The right choice for a model that was trained
    /// to embed and to answer by what that pass leaves, as GritLM was.
    Embedded,
}

impl From<Thinking> for Keep {
    fn from(thinking: Thinking) -> Self {
        Self::Thought(thinking)
    }
}

/// What a folder says of the documents in it.
#[derive(Debug, Serialize, Deserialize)]
struct Manifest {
    format: u32,
    keep: Keep,
    /// The settings of the embedding, where that is what reads.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    embedding: Option<Value>,
    /// What reading a fixed text leaves.
    probe: Vec<f32>,
}

impl Manifest {
    const FORMAT: u32 = 1;

    fn read(path: &Path) -> Result<(Self, String)> {
        let text = read_text(path)?;
        let wrong = |error: &dyn std::fmt::Display| Error::malformed(path, error);
        let found: Self = serde_json::from_str(&text).map_err(|error| wrong(&error))?;
        if found.format != Self::FORMAT {
            let (got, read) = (found.format, Self::FORMAT);
            return Err(wrong(&format_args!("format {got} of kept documents: {read} is read")));
        }
        if let Keep::Thought(thinking) = &found.keep {
            // It may be a stranger's: no more thinking than a checkpoint may ask for.
            let checked = thinking.validate().and_then(|()| thinking.check_as_default());
            checked.map_err(|error| wrong(&error))?;
        }
        Ok((found, text))
    }

    /// Why documents that `other` reads could not stand beside those of this folder.
    fn check(&self, other: &Self) -> Result<(), String> {
        let settings = |it: &Self| serde_json::to_string(&(&it.keep, &it.embedding));
        let (theirs, ours) = (settings(self), settings(other));
        let (theirs, ours) = theirs.and_then(|it| Ok((it, ours?))).map_err(|it| it.to_string())?;
        if theirs != ours {
            return Err(format!("its documents were read by {theirs}, not by {ours}"));
        }
        fingerprint::check(&self.probe, &other.probe, "keys and values")
    }
}

/// How it reads.
#[derive(Debug)]
enum Reader {
    Thinks(Box<ThoughtLoop>),
    Embeds(Box<EmbedConfig>),
}

/// Documents that are kept in a folder.
#[derive(Debug)]
pub(super) struct Kept {
    folder: PathBuf,
    model: HybridModel,
    keep: Keep,
    reader: Reader,
    /// The SHA-256 of what the folder says of itself, which every file in it repeats.
    claim: String,
    open: Mutex<VecDeque<(NoteId, Document)>>,
}

/// A text as it is read to be kept.
#[derive(Debug)]
pub(super) enum Text<'a> {
    Thought { mind: &'a ThoughtLoop, ids: Vec<u32>, lead: usize },
    Embedded(Box<Readable>),
}

impl Text<'_> {
    /// Its tokens, and how many of them stand before the text.
    pub(super) fn ids(&self) -> (&[u32], usize) {
        match self {
            Self::Thought { ids, lead, .. } => (ids, *lead),
            Self::Embedded(readable) => readable.ids(),
        }
    }

    /// Reads it now; where that embeds it, its vector, too.
    fn read(&self, dtype: DType) -> Result<(Option<Vec<f32>>, Document)> {
        match self {
            Self::Thought { mind, ids, lead } => Ok((None, mind.read_document(ids, *lead, dtype)?)),
            Self::Embedded(readable) => {
                let (vector, document) = readable.read(dtype)?;
                Ok((Some(vector), document))
            }
        }
    }
}

impl Kept {
    /// Opens the folder, or makes it, for what `keep` reads; for `None` for what reads those that are in it.
    pub(super) fn open(
        folder: &Path,
        model: &HybridModel,
        embedding: &Embedding,
        keep: Option<Keep>,
    ) -> Result<Self> {
        let path = folder.join(MANIFEST);
        let keep = match keep {
            Some(Keep::Thought(thinking)) => Keep::Thought(thinking.as_of_documents()?),
            Some(Keep::Embedded) => Keep::Embedded,
            None => Manifest::read(&path)?.0.keep,
        };
        let (reader, settings) = match (&keep, embedding) {
            (Keep::Thought(thinking), _) => {
                let thinks = thinking.as_of_documents()?.on(model.thought_model())?;
                (Reader::Thinks(Box::new(thinks)), None)
            }
            (Keep::Embedded, Embedding::Whole(config)) => {
                (Reader::Embeds(Box::new(config.clone())), Some(embedding.settings()?))
            }
            (Keep::Embedded, other) => {
                let expected = "an embedding of whole texts, to keep what its pass leaves";
                return Err(Error::parameter("embedding", expected, format!("{other:?}")));
            }
        };
        let (folder, open) = (folder.to_path_buf(), Mutex::default());
        let (model, claim) = (model.clone(), String::new());
        let mut kept = Self { folder, model, keep, reader, claim, open };

        // Not in the type of the caches, of which there may be several.
        let dtype = kept.model.transformer().dtype();
        let probe = kept.text(PROBE)?.read(dtype)?.1.kept().last()?;
        let keep = kept.keep.clone();
        let ours = Manifest { format: Manifest::FORMAT, keep, embedding: settings, probe };
        let text = serde_json::to_string(&ours)
            .map_err(|error| Error::parameter("keep", "settings that JSON can hold", error))?;
        fs::create_dir_all(&kept.folder).map_err(Error::io(&kept.folder))?;
        create(&path, text.as_bytes())?;
        let (found, text) = Manifest::read(&path)?;
        found.check(&ours).map_err(|message| Error::store(kept.folder.display(), message))?;
        kept.claim = file::hex(&Sha256::digest(text.as_bytes()));
        Ok(kept)
    }

    pub(super) fn keep(&self) -> &Keep {
        &self.keep
    }

    /// What of a text is read.
    pub(super) fn text(&self, text: &str) -> Result<Text<'_>> {
        match &self.reader {
            Reader::Thinks(mind) => {
                let tokenizer = self.tokenizer()?;
                let mut ids = tokenizer.begin(Vec::new());
                let lead = ids.len();
                ids.extend(tokenizer.encode_said(&format!("{text}\n\n"))?);
                Ok(Text::Thought { mind, ids, lead })
            }
            Reader::Embeds(config) => {
                Ok(Text::Embedded(Box::new(self.model.readable(text, config)?)))
            }
        }
    }

    /// Reads a text now; where that embeds it, its vector, too.
    pub(super) fn read(&self, text: &Text<'_>) -> Result<(Option<Vec<f32>>, Document)> {
        text.read(self.model.cache_dtype())
    }

    /// The document of a note, if it is kept. Its tokens must be those of `text`.
    ///
    /// # Errors
    /// As [`file::read`]; [`Error::Store`] for other tokens.
    pub(super) fn get(&self, id: NoteId, text: &Text<'_>) -> Result<Option<Document>> {
        let held = self.opened().iter().find(|(it, _)| *it == id).map(|(_, it)| it.clone());
        let document = match held {
            Some(held) => held,
            None => {
                let transformer = self.model.transformer();
                let read = file::read(&self.folder, id, &self.claim, transformer)?;
                let Some(document) = read else { return Ok(None) };
                self.hold(id, document.clone());
                document
            }
        };
        if (document.ids(), document.lead()) != text.ids() {
            let message =
                "its tokens are not those that its text has now: was it another tokenizer?";
            return Err(Error::store(file::path(&self.folder, id).display(), message));
        }
        Ok(Some(document))
    }

    fn hold(&self, id: NoteId, document: Document) {
        let mut open = self.opened();
        open.retain(|(it, _)| *it != id);
        open.push_back((id, document));
        let extra = open.len().saturating_sub(MOST_OPEN);
        open.drain(..extra);
    }

    pub(super) fn put(&self, id: NoteId, document: &Document) -> Result<()> {
        file::write(&self.folder, id, &self.claim, document)
    }

    pub(super) fn remove(&self, id: NoteId) -> Result<()> {
        self.opened().retain(|(it, _)| *it != id);
        remove(&self.folder, id)
    }

    /// The file of a note, whether it is there or not.
    pub(super) fn path(&self, id: NoteId) -> PathBuf {
        file::path(&self.folder, id)
    }

    /// The tokens that keep documents apart where they do not themselves.
    pub(super) fn between(&self) -> Result<Vec<u32>> {
        match &self.reader {
            Reader::Thinks(_) => Ok(Vec::new()),
            Reader::Embeds(_) => self.tokenizer()?.encode_said("\n\n"),
        }
    }

    /// A prompt of documents, the last of which stands next to what follows.
    pub(super) fn prompt(&self, documents: &[Document], recomputed: usize) -> Result<Prompt> {
        let between = self.between()?;
        if documents.is_empty() {
            return Ok(Prompt::default().plain_ids(&self.tokenizer()?.begin(Vec::new())));
        }
        let add = |prompt: Prompt, document: &Document| {
            let prompt = prompt.document_recomputed(document, recomputed);
            if between.is_empty() { prompt } else { prompt.plain_ids(&between) }
        };
        Ok(documents.iter().fold(Prompt::default(), add))
    }

    fn tokenizer(&self) -> Result<&Tokenizer> {
        self.model.tokenizer().ok_or(Error::NoTokenizer { needed_for: "a memory" })
    }

    // A poisoned lock only means that another thread panicked: nothing is left half done inside.
    fn opened(&self) -> MutexGuard<'_, VecDeque<(NoteId, Document)>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Whether documents are kept in a folder.
pub(super) fn is_one(folder: &Path) -> bool {
    folder.join(MANIFEST).is_file()
}

/// Removes what is kept of a note in a folder, if anything is.
pub(super) fn remove(folder: &Path, id: NoteId) -> Result<()> {
    let path = file::path(folder, id);
    match fs::remove_file(&path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(Error::io(&path)(error)),
        _ => Ok(()),
    }
}
