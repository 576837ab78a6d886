//! A store that lasts as long as the process.

use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::index::{EXACT_UP_TO, Index};
use super::{Hit, Record, Search, Store, check};
use crate::error::Result;
use crate::memory::note::NoteId;

/// A [`Store`] in memory, which is gone with the process.
#[derive(Debug)]
pub struct Volatile {
    held: RwLock<Held>,
}

#[derive(Debug)]
struct Held {
    manifest: Option<String>,
    records: BTreeMap<NoteId, Record>,
    index: Index,
}

impl Default for Volatile {
    fn default() -> Self {
        let index = Index::new(EXACT_UP_TO);
        Self { held: RwLock::new(Held { manifest: None, records: BTreeMap::new(), index }) }
    }
}

impl Volatile {
    // A poisoned lock only means that another thread panicked: nothing is left half done inside.
    fn read(&self) -> RwLockReadGuard<'_, Held> {
        self.held.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Held> {
        self.held.write().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Store for Volatile {
    fn place(&self) -> String {
        "memory".to_owned()
    }

    fn manifest(&self) -> Result<Option<String>> {
        Ok(self.read().manifest.clone())
    }

    fn claim(&self, manifest: &str) -> Result<String> {
        Ok(self.write().manifest.get_or_insert_with(|| manifest.to_owned()).clone())
    }

    fn put(&self, records: &[Record]) -> Result<()> {
        let mut held = self.write();
        check(records, held.index.width())?;
        for record in records {
            held.index.put(record);
            held.records.insert(record.id, record.clone());
        }
        Ok(())
    }

    fn get(&self, id: NoteId) -> Result<Option<Record>> {
        Ok(self.read().records.get(&id).cloned())
    }

    fn remove(&self, id: NoteId) -> Result<bool> {
        let mut held = self.write();
        held.index.remove(id);
        Ok(held.records.remove(&id).is_some())
    }

    fn nearest(&self, search: &Search) -> Result<Vec<Hit>> {
        self.read().index.nearest(search)
    }

    fn len(&self) -> Result<usize> {
        Ok(self.read().index.len())
    }

    fn page(&self, after: Option<NoteId>, most: usize) -> Result<Vec<Record>> {
        let from = after.map_or(Bound::Unbounded, Bound::Excluded);
        let held = self.read();
        let records = held.records.range((from, Bound::Unbounded));
        Ok(records.take(most).map(|(_, record)| record.clone()).collect())
    }
}
