//! Where notes are kept: one trait, and what implements it.

#[cfg(feature = "redb")]
mod embedded;
mod index;
#[cfg(feature = "pgvector")]
mod postgres;
mod volatile;

use std::collections::BTreeMap;
use std::fmt;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

#[cfg(feature = "redb")]
pub use self::embedded::Embedded;
#[cfg(feature = "pgvector")]
pub use self::postgres::Postgres;
pub use self::volatile::Volatile;
use super::note::{Note, NoteId};
use crate::error::{Error, Result};

/// Notes read from a store at a time.
const PAGE: usize = 256;

/// A note with the vectors that it is found by.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Record {
    /// The name of the text.
    pub id: NoteId,
    /// The text.
    pub text: String,
    /// What it is remembered with; its time is set.
    pub note: Note,
    /// The note that replaced it: it is kept, and never found.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub superseded_by: Option<NoteId>,
    /// The words that carry the text, where its main point is what it is found by: from byte, to byte, score.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub spans: Vec<(usize, usize, f32)>,
    /// One vector or several, all of the same length. Not written as JSON.
    #[serde(skip)]
    pub vectors: Vec<Vec<f32>>,
}

/// What to find.
#[derive(Clone, Debug, Default)]
pub struct Search {
    /// The vectors of the query. A note's score is, averaged over these, the largest product with any of its
    /// own (MaxSim, Khattab and Zaharia 2020); of one vector each, their product.
    pub vectors: Vec<Vec<f32>>,
    /// The most notes to find.
    pub best: usize,
    /// Finds only notes of at least this score.
    pub min_score: Option<f32>,
    /// Finds only notes with all of these tags.
    pub tags: BTreeMap<String, String>,
    /// Prefers newer ones.
    pub recency: Option<Recency>,
}

/// How much newer notes are preferred: a score becomes `(1 - weight) · score + weight · 2^(-age / half_life)`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Recency {
    /// From 0, not at all, to 1.
    pub weight: f32,
    /// In milliseconds, above 0.
    pub half_life: f64,
    /// From when ages are counted, in milliseconds since 1970. What is newer has the age 0.
    pub now: i64,
}

impl Recency {
    pub(super) fn blend(&self, score: f32, time: i64) -> f32 {
        let age = self.now.saturating_sub(time).max(0) as f64;
        let recent = (-age / self.half_life).exp2() as f32;
        (1.0 - self.weight) * score + self.weight * recent
    }
}

/// A note that was found.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Hit {
    /// Its name.
    pub id: NoteId,
    /// Its score.
    pub score: f32,
}

/// Where a memory keeps its notes. Implementations are shared between threads; what one call has done, the
/// next one sees.
///
/// Each call is done as a whole or, where it returns an error, not at all. An error of a store is
/// [`Error::Store`], which names the path or the host.
pub trait Store: Send + Sync + fmt::Debug {
    /// Where it is, for error messages: a path or a host, never a password.
    fn place(&self) -> String;

    /// A folder beside it for files of its notes, whether it is there or not; `None` for a store that is not on this
    /// machine's disk. [`remove`](Self::remove) removes what is kept of a note there.
    fn folder(&self) -> Option<PathBuf> {
        None
    }

    /// What [`claim`](Self::claim) has written.
    ///
    /// # Errors
    /// [`Error::Store`].
    fn manifest(&self) -> Result<Option<String>>;

    /// Writes what the vectors are, if nothing is written yet, and returns what is written now.
    ///
    /// # Errors
    /// [`Error::Store`].
    fn claim(&self, manifest: &str) -> Result<String>;

    /// Adds notes, all or none, each in the place of one of the same name.
    ///
    /// # Errors
    /// [`Error::Store`]; [`Error::Parameter`] for vectors that are not of one length, or none.
    fn put(&self, records: &[Record]) -> Result<()>;

    /// A note by its name.
    ///
    /// # Errors
    /// [`Error::Store`].
    fn get(&self, id: NoteId) -> Result<Option<Record>>;

    /// Those of these notes that are there, in this order.
    ///
    /// # Errors
    /// [`Error::Store`].
    fn get_many(&self, ids: &[NoteId]) -> Result<Vec<Record>> {
        ids.iter().filter_map(|id| self.get(*id).transpose()).collect()
    }

    /// Removes a note. Returns whether it was there.
    ///
    /// # Errors
    /// [`Error::Store`].
    fn remove(&self, id: NoteId) -> Result<bool>;

    /// The best notes, best first, of equal ones by name; none that is superseded.
    ///
    /// # Errors
    /// [`Error::Store`]; [`Error::Parameter`] for vectors of another length than the notes'.
    fn nearest(&self, search: &Search) -> Result<Vec<Hit>>;

    /// How many notes there are, superseded ones too.
    ///
    /// # Errors
    /// [`Error::Store`].
    fn len(&self) -> Result<usize>;

    /// Whether there are none.
    ///
    /// # Errors
    /// As [`len`](Self::len).
    fn is_empty(&self) -> Result<bool> {
        Ok(self.len()? == 0)
    }

    /// The first `most` notes whose names come after `after`, in the order of their names.
    ///
    /// # Errors
    /// [`Error::Store`].
    fn page(&self, after: Option<NoteId>, most: usize) -> Result<Vec<Record>>;
}

impl Store for Box<dyn Store> {
    fn place(&self) -> String {
        (**self).place()
    }

    fn folder(&self) -> Option<PathBuf> {
        (**self).folder()
    }

    fn manifest(&self) -> Result<Option<String>> {
        (**self).manifest()
    }

    fn claim(&self, manifest: &str) -> Result<String> {
        (**self).claim(manifest)
    }

    fn put(&self, records: &[Record]) -> Result<()> {
        (**self).put(records)
    }

    fn get(&self, id: NoteId) -> Result<Option<Record>> {
        (**self).get(id)
    }

    fn get_many(&self, ids: &[NoteId]) -> Result<Vec<Record>> {
        (**self).get_many(ids)
    }

    fn remove(&self, id: NoteId) -> Result<bool> {
        (**self).remove(id)
    }

    fn nearest(&self, search: &Search) -> Result<Vec<Hit>> {
        (**self).nearest(search)
    }

    fn len(&self) -> Result<usize> {
        (**self).len()
    }

    fn page(&self, after: Option<NoteId>, most: usize) -> Result<Vec<Record>> {
        (**self).page(after, most)
    }
}

/// All notes of a store, superseded ones too, in the order of their names. What is added meanwhile may be among them.
pub fn records(store: &dyn Store) -> impl Iterator<Item = Result<Record>> + '_ {
    let (mut after, mut ended) = (None, false);
    let pages = std::iter::from_fn(move || {
        if ended {
            return None;
        }
        let page = store.page(after, PAGE);
        let next = page.as_ref().ok().and_then(|page| page.last()).map(|record| record.id);
        ended = next.is_none();
        after = next;
        Some(page)
    });
    pages.flat_map(|page| match page {
        Ok(records) => records.into_iter().map(Ok).collect(),
        Err(error) => vec![Err(error)],
    })
}

/// Refuses records without vectors, and vectors that are of no use.
fn check(records: &[Record], width: Option<usize>) -> Result<()> {
    let mut width = width;
    for record in records {
        if record.vectors.is_empty() {
            return Err(Error::parameter("vectors", "at least one of each note", "none"));
        }
        for vector in &record.vectors {
            check_width("vectors", vector, *width.get_or_insert(vector.len()))?;
        }
    }
    Ok(())
}

fn check_width(name: &'static str, vector: &[f32], width: usize) -> Result<()> {
    if vector.len() != width || width == 0 {
        let expected = format!("vectors of {} numbers", width.max(1));
        return Err(Error::parameter(name, expected, format!("one of {}", vector.len())));
    }
    match vector.iter().position(|value| !value.is_finite()) {
        Some(position) => Err(Error::NotFinite { what: "vectors", position }),
        None => Ok(()),
    }
}
