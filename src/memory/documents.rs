//! A memory whose documents are read once.

use std::path::Path;

use super::kept::{self, Keep, Kept, Text};
use super::note::NoteId;
use super::recall::{Recall, Recalled};
use super::{Memory, embedding};
use crate::error::{Error, Result};
use crate::generate::Prompt;
use crate::thought::Document;

impl Memory {
    /// Keeps what reading leaves of texts, in the folder of the store, which is made if it is not there (`F.kept`
    /// for one in the file `F`): the keys and values of all layers, so that [`prompt`](Self::prompt) need not make
    /// the model read what it recalls. For `None` it reads as the folder says.
    ///
    /// [`remember`](Self::remember) reads each text and writes a file of its own, once;
    /// [`supersede`](Self::supersede) and [`forget`](Self::forget) remove it. A file holds what the model's caches
    /// would, in their type ([`HybridModel::with_cache_dtype`]), with a checksum, to which it is held when it is
    /// first used. [`prompt`](Self::prompt) puts documents one behind the other. One by itself is what the model
    /// would have made of it now, bit by bit ([`ThoughtLoop::read_document`]). Of several, each has seen itself
    /// alone and what stands before every text, and its keys are turned to its new place; the question sees all.
    /// [`Recall::recompute`] lets the end of each see those before it. What is not kept, as notes from before or
    /// after an [`import`](Self::import), is read now, with the same result and a warning.
    ///
    /// Files are mapped into memory while they are used. They must not be cut short or overwritten meanwhile: the
    /// process would end with `SIGBUS`. This crate replaces and removes them whole.
    ///
    /// ```
    /// # use candle_core::Device;
    /// use hybrid_attention::memory::{Keep, Memory, Note, Recall, Volatile};
    /// use hybrid_attention::{GenerationConfig, HandOff, HybridModel, Thinking};
    ///
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// let model = HybridModel::tiny(&Device::Cpu)?;
    /// let thinking = Thinking::new(2).hand_off(HandOff::KeyValue);
    /// # let folder = tempfile::tempdir()?;
    /// // or Memory::open("notes.redb", &model)?.keep(Keep::Thought(thinking))?
    /// let memory = Memory::over(Volatile::default(), &model, None)?.keep_in(folder.path(), Keep::Thought(thinking))?;
    /// memory.remember("Leo gave everything to Ida.", Note::default())?; // read now
    ///
    /// let prompt = memory.prompt("Who has what Leo had?", &Recall::best(1))?; // and not again
    /// let answer = model.generate(prompt, &GenerationConfig::default().max_tokens(2))?;
    /// # let _ = answer;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// [`HybridModel::with_cache_dtype`]: crate::HybridModel::with_cache_dtype
    /// [`ThoughtLoop::read_document`]: crate::thought::ThoughtLoop::read_document
    ///
    /// # Errors
    /// [`Error::Parameter`] for a store without a folder, thinking that needs the whole prompt, and
    /// [`Keep::Embedded`] where main points are embedded; [`Error::Io`]; [`Error::Malformed`] for a folder that does
    /// not say how it was read; [`Error::Store`] for one that another model has read, or this one with other
    /// settings.
    pub fn keep(self, how: impl Into<Option<Keep>>) -> Result<Self> {
        let Some(folder) = self.store.folder() else {
            let expected = "one with a folder beside it; Memory::keep_in takes a folder";
            return Err(Error::parameter("store", expected, self.store.place()));
        };
        self.keep_in(folder, how)
    }

    /// [`keep`](Self::keep) in a folder of your own, for this memory alone.
    ///
    /// # Errors
    /// As [`keep`](Self::keep).
    pub fn keep_in(
        mut self,
        folder: impl AsRef<Path>,
        how: impl Into<Option<Keep>>,
    ) -> Result<Self> {
        let kept = Kept::open(folder.as_ref(), &self.model, &self.embedding, how.into())?;
        self.kept = Some(kept.into());
        Ok(self)
    }

    /// How it reads documents, if it keeps them.
    #[must_use]
    pub fn keeps(&self) -> Option<&Keep> {
        self.kept.as_ref().map(|kept| kept.keep())
    }

    /// Whether the folder of the store holds documents that were kept, so that `keep(None)` takes them up.
    #[must_use]
    pub fn has_kept(&self) -> bool {
        self.store.folder().is_some_and(|folder| kept::is_one(&folder))
    }

    /// Whether what reading has left of a note is kept.
    #[must_use]
    pub fn is_kept(&self, id: NoteId) -> bool {
        self.kept.as_ref().is_some_and(|kept| kept.path(id).is_file())
    }

    /// What reading leaves of a note: kept, or read now; `None` where there is no such note.
    ///
    /// # Errors
    /// [`Error::Parameter`] for a memory that keeps nothing; [`Error::Malformed`] for a damaged file;
    /// [`Error::Store`] for one that another model has read, or this one with other settings, and for a store that
    /// fails; as [`ThoughtLoop::read_document`](crate::thought::ThoughtLoop::read_document).
    pub fn document(&self, id: NoteId) -> Result<Option<Document>> {
        let Some(kept) = &self.kept else {
            return Err(Error::parameter(
                "memory",
                "one that keeps documents",
                "one that does not",
            ));
        };
        let read = |record: super::Record| document(kept, id, &kept.text(&record.text)?);
        self.store.get(id)?.map(read).transpose()
    }

    /// [`context_of`](Self::context_of) notes of which documents are kept.
    pub(super) fn context_of_kept(
        &self,
        kept: &Kept,
        found: &[Recalled],
        recall: &Recall,
    ) -> Result<Prompt> {
        let between = kept.between()?.len();
        let mut room = recall.most_tokens();
        let mut documents = Vec::new();
        for note in found {
            let text = kept.text(&note.text)?;
            let (ids, lead) = text.ids();
            if let Some(left) = room.checked_sub(ids.len() - lead + between) {
                room = left;
                documents.push(document(kept, note.id, &text)?);
            }
        }
        documents.reverse();
        kept.prompt(&documents, recall.recomputed())
    }

    /// The vectors of a text, which is kept if it is not yet. Whether it was not is noted in `fresh`.
    pub(super) fn embed_and_keep(
        &self,
        text: &str,
        fresh: &mut Fresh<'_>,
    ) -> Result<embedding::Embedded> {
        let embed = || self.embedding.embed(&self.model, text);
        let Some(kept) = fresh.kept else { return embed() };
        let (id, text) = (NoteId::of(text), kept.text(text)?);
        // One that is still mapped may have been removed by somebody else.
        if kept.path(id).is_file() && kept.get(id, &text)?.is_some() {
            return embed();
        }
        let (vector, document) = kept.read(&text)?;
        kept.put(id, &document)?;
        fresh.notes.push(id);
        match vector {
            Some(vector) => Ok((vec![vector], Vec::new())),
            None => embed(),
        }
    }
}

/// The document of a text, read now if it is not kept.
fn document(kept: &Kept, id: NoteId, text: &Text<'_>) -> Result<Document> {
    match kept.get(id, text)? {
        Some(document) => Ok(document),
        None => {
            let path = kept.path(id);
            tracing::warn!(%id, path = %path.display(), "not kept: the document is read now");
            Ok(kept.read(text)?.1)
        }
    }
}

/// What has been kept of notes that are not in the store yet: removed again unless they get there.
pub(super) struct Fresh<'a> {
    kept: Option<&'a Kept>,
    notes: Vec<NoteId>,
}

impl<'a> Fresh<'a> {
    pub(super) fn new(kept: Option<&'a Kept>) -> Self {
        Self { kept, notes: Vec::new() }
    }

    /// They are in the store.
    pub(super) fn stay(mut self) {
        self.notes.clear();
    }
}

impl Drop for Fresh<'_> {
    fn drop(&mut self) {
        let Some(kept) = self.kept else { return };
        for id in &self.notes {
            if let Err(error) = kept.remove(*id) {
                tracing::warn!(%error, "a document is kept of a note that was not remembered");
            }
        }
    }
}
