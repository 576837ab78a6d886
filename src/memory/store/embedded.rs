//! A store in one file (redb), searched in memory.

use std::fmt::Display;
use std::ops::Bound;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError, RwLock};

use redb::{Database, ReadableDatabase, ReadableTable, ReadableTableMetadata, TableDefinition};

use super::index::{EXACT_UP_TO, Index};
use super::{Hit, Record, Search, Store, check};
use crate::error::{Error, Result};
use crate::memory::note::NoteId;

const ABOUT: TableDefinition<'_, &str, &str> = TableDefinition::new("about");
/// JSON, without the vectors.
const NOTES: TableDefinition<'_, [u8; 16], &[u8]> = TableDefinition::new("notes");
/// How many, `u32`, then their numbers, `f32`; all little-endian.
const VECTORS: TableDefinition<'_, [u8; 16], &[u8]> = TableDefinition::new("vectors");

const MANIFEST: &str = "manifest";

/// A [`Store`] in one file, for one process at a time.
///
/// What a call has added is on the disk when it returns, and a file of which the process or the machine was
/// stopped at any moment opens with all of that: every commit is in two phases. All vectors are in memory, four
/// bytes a number, and are read once when the file is opened. Up to a million of them are searched one by one,
/// exactly; beyond that those are that have most signs in common with the query.
#[derive(Debug)]
pub struct Embedded {
    path: PathBuf,
    database: Database,
    index: RwLock<Index>,
    /// One writer at a time: what is written and what is searched go on in the same order.
    writing: Mutex<()>,
}

impl Embedded {
    /// Opens the file at `path`, or makes it.
    ///
    /// # Errors
    /// [`Error::Store`] for a file that cannot be opened or made, is open elsewhere, or is damaged.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref().to_path_buf();
        let failed = |error: &dyn Display| Error::store(path.display(), error);
        let database = Database::create(&path).map_err(|error| failed(&error))?;
        let write = database.begin_write().map_err(|error| failed(&error))?;
        // So that reading never meets a file without them.
        write.open_table(ABOUT).map_err(|error| failed(&error))?;
        write.open_table(NOTES).map_err(|error| failed(&error))?;
        write.open_table(VECTORS).map_err(|error| failed(&error))?;
        write.commit().map_err(|error| failed(&error))?;
        let (index, writing) = (RwLock::new(Index::new(EXACT_UP_TO)), Mutex::new(()));
        let store = Self { path, database, index, writing };
        store.load()?;
        Ok(store)
    }

    /// Reads what is searched.
    fn load(&self) -> Result<()> {
        let mut index = self.index.write().unwrap_or_else(PoisonError::into_inner);
        let read = self.database.begin_read().map_err(|error| self.failed(error))?;
        let notes = read.open_table(NOTES).map_err(|error| self.failed(error))?;
        let vectors = read.open_table(VECTORS).map_err(|error| self.failed(error))?;
        for entry in notes.iter().map_err(|error| self.failed(error))? {
            let (id, note) = entry.map_err(|error| self.failed(error))?;
            let own = vectors.get(id.value()).map_err(|error| self.failed(error))?;
            let own = own.ok_or_else(|| self.failed("a note without vectors"))?;
            let record = self.record(note.value(), own.value())?;
            check(std::slice::from_ref(&record), index.width())?;
            index.put(&record);
        }
        Ok(())
    }

    fn failed(&self, error: impl Display) -> Error {
        Error::store(self.path.display(), error)
    }

    fn record(&self, note: &[u8], vectors: &[u8]) -> Result<Record> {
        let mut record: Record =
            serde_json::from_slice(note).map_err(|error| self.failed(error))?;
        record.vectors =
            read_vectors(vectors).ok_or_else(|| self.failed("vectors that are cut short"))?;
        Ok(record)
    }

    /// Writes in one transaction, which is on the disk when this returns.
    fn write<T>(&self, run: impl FnOnce(&redb::WriteTransaction) -> Result<T>) -> Result<T> {
        let mut write = self.database.begin_write().map_err(|error| self.failed(error))?;
        write.set_two_phase_commit(true);
        let done = run(&write)?;
        write.commit().map_err(|error| self.failed(error))?;
        Ok(done)
    }
}

impl Store for Embedded {
    fn place(&self) -> String {
        self.path.display().to_string()
    }

    fn manifest(&self) -> Result<Option<String>> {
        let read = self.database.begin_read().map_err(|error| self.failed(error))?;
        let about = read.open_table(ABOUT).map_err(|error| self.failed(error))?;
        let manifest = about.get(MANIFEST).map_err(|error| self.failed(error))?;
        Ok(manifest.map(|manifest| manifest.value().to_owned()))
    }

    fn claim(&self, manifest: &str) -> Result<String> {
        let _one = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(written) = self.manifest()? {
            return Ok(written);
        }
        self.write(|write| {
            let mut about = write.open_table(ABOUT).map_err(|error| self.failed(error))?;
            about.insert(MANIFEST, manifest).map_err(|error| self.failed(error))?;
            Ok(manifest.to_owned())
        })
    }

    fn put(&self, records: &[Record]) -> Result<()> {
        let _one = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        check(records, self.index.read().unwrap_or_else(PoisonError::into_inner).width())?;
        self.write(|write| {
            let mut notes = write.open_table(NOTES).map_err(|error| self.failed(error))?;
            let mut vectors = write.open_table(VECTORS).map_err(|error| self.failed(error))?;
            for record in records {
                let note = serde_json::to_vec(record).map_err(|error| self.failed(error))?;
                let id = record.id.bytes();
                notes.insert(id, note.as_slice()).map_err(|error| self.failed(error))?;
                let own = write_vectors(&record.vectors);
                vectors.insert(id, own.as_slice()).map_err(|error| self.failed(error))?;
            }
            Ok(())
        })?;
        let mut index = self.index.write().unwrap_or_else(PoisonError::into_inner);
        records.iter().for_each(|record| index.put(record));
        Ok(())
    }

    fn get(&self, id: NoteId) -> Result<Option<Record>> {
        let read = self.database.begin_read().map_err(|error| self.failed(error))?;
        let notes = read.open_table(NOTES).map_err(|error| self.failed(error))?;
        let vectors = read.open_table(VECTORS).map_err(|error| self.failed(error))?;
        let note = notes.get(id.bytes()).map_err(|error| self.failed(error))?;
        let own = vectors.get(id.bytes()).map_err(|error| self.failed(error))?;
        match (note, own) {
            (Some(note), Some(own)) => Ok(Some(self.record(note.value(), own.value())?)),
            _ => Ok(None),
        }
    }

    fn remove(&self, id: NoteId) -> Result<bool> {
        let _one = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let was = self.write(|write| {
            let mut notes = write.open_table(NOTES).map_err(|error| self.failed(error))?;
            let mut vectors = write.open_table(VECTORS).map_err(|error| self.failed(error))?;
            vectors.remove(id.bytes()).map_err(|error| self.failed(error))?;
            let note = notes.remove(id.bytes()).map_err(|error| self.failed(error))?;
            Ok(note.is_some())
        })?;
        self.index.write().unwrap_or_else(PoisonError::into_inner).remove(id);
        Ok(was)
    }

    fn nearest(&self, search: &Search) -> Result<Vec<Hit>> {
        self.index.read().unwrap_or_else(PoisonError::into_inner).nearest(search)
    }

    fn len(&self) -> Result<usize> {
        let read = self.database.begin_read().map_err(|error| self.failed(error))?;
        let notes = read.open_table(NOTES).map_err(|error| self.failed(error))?;
        let len = notes.len().map_err(|error| self.failed(error))?;
        usize::try_from(len).map_err(|error| self.failed(error))
    }

    fn page(&self, after: Option<NoteId>, most: usize) -> Result<Vec<Record>> {
        let read = self.database.begin_read().map_err(|error| self.failed(error))?;
        let notes = read.open_table(NOTES).map_err(|error| self.failed(error))?;
        let vectors = read.open_table(VECTORS).map_err(|error| self.failed(error))?;
        let from = after.map_or(Bound::Unbounded, |id| Bound::Excluded(id.bytes()));
        let some = notes.range::<[u8; 16]>((from, Bound::Unbounded));
        let some = some.map_err(|error| self.failed(error))?;
        some.take(most)
            .map(|entry| {
                let (id, note) = entry.map_err(|error| self.failed(error))?;
                let own = vectors.get(id.value()).map_err(|error| self.failed(error))?;
                let own = own.ok_or_else(|| self.failed("a note without vectors"))?;
                self.record(note.value(), own.value())
            })
            .collect()
    }
}

fn write_vectors(vectors: &[Vec<f32>]) -> Vec<u8> {
    let mut bytes = (vectors.len() as u32).to_le_bytes().to_vec();
    bytes.extend(vectors.iter().flatten().flat_map(|value| value.to_le_bytes()));
    bytes
}

/// `None` where the bytes are not vectors of one length.
fn read_vectors(bytes: &[u8]) -> Option<Vec<Vec<f32>>> {
    let (count, values) = bytes.split_first_chunk()?;
    let count = u32::from_le_bytes(*count) as usize;
    let width = (values.len() / 4).checked_div(count)?;
    if width == 0 || count.checked_mul(width)?.checked_mul(4)? != values.len() {
        return None;
    }
    let vector = |bytes: &[u8]| {
        bytes
            .chunks_exact(4)
            .filter_map(|value| value.first_chunk())
            .map(|v| f32::from_le_bytes(*v))
            .collect()
    };
    Some(values.chunks_exact(4 * width).map(vector).collect())
}
