//! A store in one file (redb), searched in memory.

use std::fmt::Display;
use std::ops::Bound;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError, RwLock};
use std::{fs, io};

use redb::{
    Builder, Database, DatabaseError, ReadTransaction, ReadableDatabase, ReadableTable,
    ReadableTableMetadata, TableDefinition, WriteTransaction,
};

use super::index::{EXACT_UP_TO, Index};
use super::{Hit, Record, Search, Store, check};
use crate::error::{Error, Result};
use crate::memory::kept;
use crate::memory::note::NoteId;
use crate::replace::{appended, unique};

const ABOUT: TableDefinition<'_, &str, &str> = TableDefinition::new("about");
/// JSON, without the vectors.
const NOTES: TableDefinition<'_, [u8; 16], &[u8]> = TableDefinition::new("notes");
/// How many, `u32`, then their numbers, `f32`; all little-endian.
const VECTORS: TableDefinition<'_, [u8; 16], &[u8]> = TableDefinition::new("vectors");

const MANIFEST: &str = "manifest";

/// Behind the name of the file, that of the folder of what is kept of its notes.
const KEPT: &str = ".kept";

/// Bytes of the file that are kept in memory: little, as all vectors are held anyway.
const CACHE: usize = 64 << 20;

/// A [`Store`] in one file, for one process at a time.
///
/// What a call has added is on the disk when it returns, and a file of which the process or the machine was
/// stopped at any moment opens with all of that: every commit is in two phases. A file that was damaged is
/// refused: all of it is read when it is opened, and held to its checksums. After a call that failed to write,
/// to a full disk or a broken one, every later one may fail; opened again, the file has what was added before.
///
/// All vectors are in memory, four bytes a number. Up to a million of them are searched one by one, exactly;
/// beyond that those are that have most signs in common with the query.
#[derive(Debug)]
pub struct Embedded {
    path: PathBuf,
    database: Guarded,
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
        let path = path.as_ref();
        if !path.try_exists().map_err(|error| Error::store(path.display(), error))? {
            make(path).map_err(|error| Error::store(path.display(), error))?;
        }
        Self::over(path.to_path_buf(), |builder| builder.create(path))
    }

    fn over(
        path: PathBuf,
        open: impl FnOnce(&Builder) -> Result<Database, DatabaseError>,
    ) -> Result<Self> {
        let mut builder = Database::builder();
        builder.set_check_integrity_on_open(true).set_cache_size(CACHE);
        let database = guard(|| open(&builder).map_err(|error| error.to_string()));
        let database = database.map_err(|error| Error::store(path.display(), error))?;
        let (index, writing) = (RwLock::new(Index::new(EXACT_UP_TO)), Mutex::new(()));
        let store = Self { path, database: Guarded(Some(database)), index, writing };
        // So that reading never meets a file without them.
        store.write(|write| {
            write.open_table(ABOUT).map_err(|error| store.failed(error))?;
            write.open_table(NOTES).map_err(|error| store.failed(error))?;
            write.open_table(VECTORS).map_err(|error| store.failed(error))?;
            Ok(())
        })?;
        store.load()?;
        Ok(store)
    }

    /// Reads what is searched.
    fn load(&self) -> Result<()> {
        let mut index = self.index.write().unwrap_or_else(PoisonError::into_inner);
        self.read(|read| {
            let notes = read.open_table(NOTES).map_err(|error| self.failed(error))?;
            let vectors = read.open_table(VECTORS).map_err(|error| self.failed(error))?;
            for entry in notes.iter().map_err(|error| self.failed(error))? {
                let (id, note) = entry.map_err(|error| self.failed(error))?;
                let own = vectors.get(id.value()).map_err(|error| self.failed(error))?;
                let own = own.ok_or_else(|| self.failed("a note without vectors"))?;
                let record = self.record(note.value(), own.value())?;
                check(std::slice::from_ref(&record), index.width())
                    .map_err(|error| self.failed(error))?;
                index.put(&record);
            }
            Ok(())
        })
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

    fn read<T>(&self, run: impl FnOnce(&ReadTransaction) -> Result<T>) -> Result<T> {
        self.guarded(|database| run(&database.begin_read().map_err(|error| self.failed(error))?))
    }

    /// Writes in one transaction, which is on the disk when this returns.
    fn write<T>(&self, run: impl FnOnce(&WriteTransaction) -> Result<T>) -> Result<T> {
        self.guarded(|database| {
            let mut write = database.begin_write().map_err(|error| self.failed(error))?;
            write.set_two_phase_commit(true);
            let done = run(&write)?;
            write.commit().map_err(|error| self.failed(error))?;
            Ok(done)
        })
    }

    fn guarded<T>(&self, run: impl FnOnce(&Database) -> Result<T>) -> Result<T> {
        let Some(database) = &self.database.0 else { return Err(self.failed("it is closed")) };
        // What failed inside of `run` is an error of this crate already.
        guard(|| Ok(run(database))).unwrap_or_else(|error| Err(self.failed(error)))
    }
}

/// Makes an empty store, whole or not at all: of a file that was only begun redb cannot tell that it is one. It
/// is made under another name, which a process that is stopped meanwhile leaves behind.
fn make(path: &Path) -> Result<(), String> {
    let begun = &unique(path, "new");
    // Of a process that had the same number.
    fs::remove_file(begun).ok();
    let made = guard(|| {
        let made = Database::create(begun).and_then(Database::close);
        made.map_err(|error| error.to_string())
    });
    // Unlike renaming, this leaves what somebody else has made there since; but not every disk knows links.
    let named = made.and_then(|()| match fs::hard_link(begun, path) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            fs::rename(begun, path).map_err(|error| error.to_string())
        }
        _ => Ok(()),
    });
    fs::remove_file(begun).ok();
    // The name has to last, too. Where folders cannot be opened as files, nothing needs to be done for it.
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    if let Ok(folder) = fs::File::open(folder.unwrap_or(Path::new("."))) {
        folder.sync_all().ok();
    }
    named
}

/// Runs code of redb, which may panic on a file that was damaged while it was open, and makes that an error.
fn guard<T>(run: impl FnOnce() -> Result<T, String>) -> Result<T, String> {
    catch_unwind(AssertUnwindSafe(run))
        .unwrap_or_else(|_| Err("it is damaged: what it says contradicts itself".to_owned()))
}

/// Closed without a panic, too. Always there until then.
#[derive(Debug)]
struct Guarded(Option<Database>);

impl Drop for Guarded {
    fn drop(&mut self) {
        let database = self.0.take();
        if let Err(error) =
            guard(|| database.map_or(Ok(()), Database::close).map_err(|error| error.to_string()))
        {
            tracing::debug!(
                error,
                "a memory was not closed; it is checked when it is opened anyway"
            );
        }
    }
}

impl Store for Embedded {
    fn place(&self) -> String {
        self.path.display().to_string()
    }

    fn folder(&self) -> Option<PathBuf> {
        Some(appended(&self.path, KEPT))
    }

    fn manifest(&self) -> Result<Option<String>> {
        self.read(|read| {
            let about = read.open_table(ABOUT).map_err(|error| self.failed(error))?;
            let manifest = about.get(MANIFEST).map_err(|error| self.failed(error))?;
            Ok(manifest.map(|manifest| manifest.value().to_owned()))
        })
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
        self.read(|read| {
            let notes = read.open_table(NOTES).map_err(|error| self.failed(error))?;
            let vectors = read.open_table(VECTORS).map_err(|error| self.failed(error))?;
            let note = notes.get(id.bytes()).map_err(|error| self.failed(error))?;
            let own = vectors.get(id.bytes()).map_err(|error| self.failed(error))?;
            match (note, own) {
                (Some(note), Some(own)) => Ok(Some(self.record(note.value(), own.value())?)),
                _ => Ok(None),
            }
        })
    }

    fn remove(&self, id: NoteId) -> Result<bool> {
        kept::remove(&appended(&self.path, KEPT), id).map_err(|error| self.failed(error))?;
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
        self.read(|read| {
            let notes = read.open_table(NOTES).map_err(|error| self.failed(error))?;
            let len = notes.len().map_err(|error| self.failed(error))?;
            usize::try_from(len).map_err(|error| self.failed(error))
        })
    }

    fn page(&self, after: Option<NoteId>, most: usize) -> Result<Vec<Record>> {
        self.read(|read| {
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
        })
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

#[cfg(test)]
mod tests {
    use std::sync::{Arc, MutexGuard};

    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;
    use redb::StorageBackend;

    use super::*;
    use crate::memory::Note;

    type Bytes = Vec<u8>;

    /// A disk that fails from some call on, and what would be on it then.
    #[derive(Clone, Debug, Default)]
    struct Disk(Arc<Mutex<State>>);

    #[derive(Debug, Default)]
    struct State {
        /// As a process sees it.
        now: Bytes,
        /// As of the last sync.
        kept: Bytes,
        /// What was done since.
        since: Vec<Change>,
        /// Calls that write which succeed still, if that is limited.
        left: Option<usize>,
        calls: usize,
    }

    #[derive(Clone, Debug)]
    enum Change {
        Length(usize),
        Bytes(usize, Bytes),
    }

    impl Change {
        fn apply(&self, to: &mut Bytes) {
            match self {
                Self::Length(length) => to.resize(*length, 0),
                Self::Bytes(at, bytes) => {
                    to.resize(to.len().max(at + bytes.len()), 0);
                    to[*at..at + bytes.len()].copy_from_slice(bytes);
                }
            }
        }
    }

    /// What a disk writes as a whole.
    const SECTOR: usize = 512;

    impl Disk {
        fn of(now: Bytes) -> Self {
            let kept = now.clone();
            Self(Arc::new(Mutex::new(State { now, kept, ..State::default() })))
        }

        fn state(&self) -> MutexGuard<'_, State> {
            self.0.lock().unwrap_or_else(PoisonError::into_inner)
        }

        /// One that writes.
        fn call(&self) -> io::Result<MutexGuard<'_, State>> {
            let mut state = self.state();
            match &mut state.left {
                Some(0) => return Err(io::Error::from(io::ErrorKind::StorageFull)),
                Some(left) => *left -= 1,
                None => {}
            }
            state.calls += 1;
            Ok(state)
        }

        fn change(&self, change: Change) -> io::Result<()> {
            let mut state = self.call()?;
            change.apply(&mut state.now);
            state.since.push(change);
            Ok(())
        }

        /// What is on the disk when the power fails: of what was not synced any part, in any order.
        fn after_a_power_cut(&self, rng: &mut impl Rng) -> Bytes {
            let state = self.state();
            let mut bytes = state.kept.clone();
            for change in &state.since {
                match change {
                    Change::Length(_) => {
                        if rng.random() {
                            change.apply(&mut bytes);
                        }
                    }
                    Change::Bytes(at, written) => {
                        for (index, sector) in written.chunks(SECTOR).enumerate() {
                            if rng.random() {
                                let at = at + index * SECTOR;
                                Change::Bytes(at, sector.to_vec()).apply(&mut bytes);
                            }
                        }
                    }
                }
            }
            bytes
        }
    }

    impl StorageBackend for Disk {
        fn len(&self) -> io::Result<u64> {
            Ok(self.state().now.len() as u64)
        }

        fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
            let state = self.state();
            let at = offset as usize;
            let bytes = state.now.get(at..at + out.len());
            out.copy_from_slice(bytes.ok_or(io::ErrorKind::UnexpectedEof)?);
            Ok(())
        }

        fn set_len(&self, len: u64) -> io::Result<()> {
            self.change(Change::Length(len as usize))
        }

        fn sync_data(&self) -> io::Result<()> {
            let mut state = self.call()?;
            state.kept = state.now.clone();
            state.since.clear();
            Ok(())
        }

        fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
            self.change(Change::Bytes(offset as usize, data.to_vec()))
        }
    }

    fn open(disk: &Disk) -> Result<Embedded> {
        let disk = disk.clone();
        Embedded::over(PathBuf::from("a disk"), |builder| builder.create_with_backend(disk))
    }

    fn record(index: usize) -> Record {
        let text = format!("text {index} {}", "x".repeat(index % 7 * 300));
        Record {
            id: NoteId::of(&text),
            text,
            note: Note::default().time(index as i64).tag("index", index.to_string()),
            superseded_by: None,
            spans: Vec::new(),
            vectors: vec![vec![index as f32, 1.0, 0.5]; 1 + index % 3],
        }
    }

    const STEPS: usize = 12;

    /// Puts three notes a step, removes the first of the step before, and says how many steps were done.
    fn work(store: &Embedded) -> (usize, Result<()>) {
        for step in 0..STEPS {
            let some: Vec<Record> = (3 * step..3 * step + 3).map(record).collect();
            let mut done = store.put(&some);
            if done.is_ok() && step > 0 {
                done = store.remove(record(3 * (step - 1)).id).map(drop);
            }
            if done.is_err() {
                return (step, done);
            }
        }
        (STEPS, Ok(()))
    }

    /// What was acknowledged is there, as it was; of the step that was cut short, all or nothing of each call.
    fn check_work(store: &Embedded, steps: usize) -> Result<()> {
        let there = |index: usize| -> Result<bool> {
            let (right, found) = (record(index), store.get(record(index).id)?);
            assert!(found.is_none() || found.as_ref() == Some(&right), "{index}");
            Ok(found.is_some())
        };
        for step in 0..=steps.min(STEPS - 1) {
            let three = [there(3 * step)?, there(3 * step + 1)?, there(3 * step + 2)?];
            let removed = [false, true, true];
            match steps - step {
                // Under way: not yet put, or put.
                0 => assert!(three == [false; 3] || three == [true; 3], "{step} {three:?}"),
                // Its first note is removed under way.
                1 => assert!(three == removed || three == [true; 3], "{step} {three:?}"),
                _ => assert_eq!(three, removed, "{step}"),
            }
        }
        assert_eq!(store.page(None, usize::MAX)?.len(), store.len()?);
        // It is of use.
        store.put(&[record(1000)])?;
        assert!(there(1000)?);
        Ok(())
    }

    #[test]
    fn a_disk_that_fails_at_any_call_loses_nothing_acknowledged() -> Result<()> {
        // Making a file is not done in its place.
        let made = Disk::default();
        drop(open(&made)?);
        let made = made.state().now.clone();
        let whole = Disk::of(made.clone());
        let store = open(&whole)?;
        let calls_of_opening = whole.state().calls;
        assert!(work(&store).1.is_ok());
        drop(store);
        let calls = whole.state().calls;
        assert!(calls > calls_of_opening + 4 * STEPS, "{calls}");
        let mut rng = ChaCha8Rng::seed_from_u64(5);
        for left in 0..calls {
            let disk = Disk::of(made.clone());
            disk.state().left = Some(left);
            let (steps, error) = match open(&disk) {
                Ok(store) => work(&store),
                Err(error) => (0, Err(error)),
            };
            // Only closing it fails without a word.
            match error {
                Err(Error::Store { place, .. }) => assert_eq!(place, "a disk"),
                Err(other) => return Err(other),
                Ok(()) => assert_eq!(steps, STEPS),
            }
            let killed = disk.state().now.clone();
            check_work(&open(&Disk::of(killed))?, steps)?;
            for _ in 0..3 {
                let left_over = disk.after_a_power_cut(&mut rng);
                check_work(&open(&Disk::of(left_over))?, steps)?;
            }
        }
        Ok(())
    }

    /// Every byte of the header, and every 61st of the rest: it is refused, or says what it said.
    #[test]
    fn a_damaged_byte_is_found_or_does_not_matter() -> Result<()> {
        let disk = Disk::default();
        let store = open(&disk)?;
        store.claim("a manifest")?;
        assert!(work(&store).1.is_ok());
        let right = (store.manifest()?, store.page(None, usize::MAX)?);
        drop(store);
        let bytes = disk.state().now.clone();
        let (mut refused, mut tried) = (0, 0);
        for at in (0..4096).chain((4096..bytes.len()).step_by(61)) {
            for flip in [1u8, 0x80, 0xff] {
                let mut damaged = bytes.clone();
                damaged[at] ^= flip;
                tried += 1;
                let read = open(&Disk::of(damaged))
                    .and_then(|store| Ok((store.manifest()?, store.page(None, usize::MAX)?)));
                match read {
                    Ok(read) => assert_eq!(read, right, "byte {at} {flip:#x}"),
                    Err(Error::Store { place, .. }) => {
                        refused += 1;
                        assert_eq!(place, "a disk");
                    }
                    Err(other) => return Err(other),
                }
            }
        }
        // Most of the file is room.
        assert!(refused * 50 > tried, "{refused} of {tried}");
        Ok(())
    }
}
