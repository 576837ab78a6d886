//! Vectors in memory, searched one by one.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BinaryHeap};
use std::ops::Range;

use super::{Hit, Record, Search, check_width};
use crate::error::Result;
use crate::memory::note::NoteId;

/// From how many vectors on a search first compares signs, and then scores what is near by these.
pub(super) const EXACT_UP_TO: usize = 1 << 20;

/// For each note to find, how many are scored after signs were compared; and at least how many.
const SCORED_PER_BEST: usize = 64;
const SCORED: usize = 1024;

/// What is searched of all notes.
#[derive(Debug)]
pub(super) struct Index {
    exact_up_to: usize,
    width: Option<usize>,
    /// `(vectors, width)`
    rows: Vec<f32>,
    /// A bit for the sign of each number, `(vectors, words)`; made where signs are compared.
    signs: Vec<u64>,
    entries: Vec<Entry>,
    places: BTreeMap<NoteId, usize>,
    /// Rows whose notes are gone.
    dead: usize,
}

#[derive(Debug)]
struct Entry {
    id: NoteId,
    rows: Range<usize>,
    tags: BTreeMap<String, String>,
    time: i64,
    found: bool,
}

impl Index {
    pub(super) fn new(exact_up_to: usize) -> Self {
        Self {
            exact_up_to,
            width: None,
            rows: Vec::new(),
            signs: Vec::new(),
            entries: Vec::new(),
            places: BTreeMap::new(),
            dead: 0,
        }
    }

    /// Numbers of a vector, once there is one.
    pub(super) fn width(&self) -> Option<usize> {
        self.width
    }

    pub(super) fn len(&self) -> usize {
        self.places.len()
    }

    /// Adds a note in the place of one of the same name. Its vectors are [checked](super::check).
    pub(super) fn put(&mut self, record: &Record) {
        self.remove(record.id);
        let width = record.vectors.first().map_or(0, Vec::len);
        self.width = Some(width);
        let first = self.rows.len() / width.max(1);
        for vector in &record.vectors {
            self.rows.extend_from_slice(vector);
            self.signs.extend(signs(vector));
        }
        self.places.insert(record.id, self.entries.len());
        self.entries.push(Entry {
            id: record.id,
            rows: first..first + record.vectors.len(),
            tags: record.note.tags.clone(),
            time: record.note.time.unwrap_or(0),
            found: record.superseded_by.is_none(),
        });
    }

    pub(super) fn remove(&mut self, id: NoteId) -> bool {
        let Some(place) = self.places.remove(&id) else { return false };
        if let Some(entry) = self.entries.get_mut(place) {
            entry.found = false;
            self.dead += entry.rows.len();
        }
        if 2 * self.dead > self.signs.len() / self.words().max(1) {
            self.compact();
        }
        true
    }

    fn words(&self) -> usize {
        self.width.unwrap_or(0).div_ceil(64)
    }

    /// Drops the rows of notes that are gone.
    fn compact(&mut self) {
        let (width, words) = (self.width.unwrap_or(0), self.words());
        let (mut rows, mut bits, mut entries) = (Vec::new(), Vec::new(), Vec::new());
        for (place, mut entry) in std::mem::take(&mut self.entries).into_iter().enumerate() {
            if self.places.get(&entry.id) != Some(&place) {
                continue;
            }
            let first = rows.len() / width.max(1);
            let own = |per_row: usize| entry.rows.start * per_row..entry.rows.end * per_row;
            rows.extend_from_slice(self.rows.get(own(width)).unwrap_or_default());
            bits.extend_from_slice(self.signs.get(own(words)).unwrap_or_default());
            self.places.insert(entry.id, entries.len());
            entry.rows = first..first + entry.rows.len();
            entries.push(entry);
        }
        (self.rows, self.signs, self.entries, self.dead) = (rows, bits, entries, 0);
    }

    pub(super) fn nearest(&self, search: &Search) -> Result<Vec<Hit>> {
        let Some(width) = self.width else { return Ok(Vec::new()) };
        for vector in &search.vectors {
            check_width("query", vector, width)?;
        }
        let mut best = Best { hits: BinaryHeap::new(), most: search.best };
        let mut consider = |entry: &Entry| {
            if !entry.found
                || !search.tags.iter().all(|(n, value)| entry.tags.get(n) == Some(value))
            {
                return;
            }
            let mut score = self.score(&search.vectors, entry.rows.clone(), width);
            if let Some(recency) = &search.recency {
                score = recency.blend(score, entry.time);
            }
            if search.min_score.is_none_or(|least| score >= least) {
                best.offer(Hit { id: entry.id, score });
            }
        };
        if self.rows.len() / width.max(1) <= self.exact_up_to {
            self.entries.iter().for_each(&mut consider);
        } else {
            let near = self.near_by_signs(search);
            near.iter().filter_map(|place| self.entries.get(*place)).for_each(&mut consider);
        }
        Ok(best.in_order())
    }

    /// MaxSim over the vectors of one note.
    fn score(&self, queries: &[Vec<f32>], rows: Range<usize>, width: usize) -> f32 {
        let own = self.rows.get(rows.start * width..rows.end * width).unwrap_or_default();
        let best = |query: &Vec<f32>| {
            own.chunks_exact(width).map(|row| dot(query, row)).fold(f32::NEG_INFINITY, f32::max)
        };
        queries.iter().map(best).sum::<f32>() / queries.len().max(1) as f32
    }

    /// The places of the entries that have a vector near one of the query's, by how many signs are the same,
    /// each once, in their order. What is filtered out is not among them.
    fn near_by_signs(&self, search: &Search) -> Vec<usize> {
        let words = self.words();
        let most = search.best.saturating_mul(SCORED_PER_BEST).max(SCORED);
        let mut places = Vec::new();
        for vector in &search.vectors {
            let query: Vec<u64> = signs(vector).collect();
            // By distance, then place: as many lists as there are distances.
            let mut near: Vec<Vec<usize>> = vec![Vec::new(); self.width.unwrap_or(0) + 1];
            for (place, entry) in self.entries.iter().enumerate() {
                if !entry.found || !search.tags.iter().all(|(n, v)| entry.tags.get(n) == Some(v)) {
                    continue;
                }
                let own = self.signs.get(entry.rows.start * words..entry.rows.end * words);
                let apart = |row: &[u64]| -> u32 {
                    row.iter().zip(&query).map(|(a, b)| (a ^ b).count_ones()).sum()
                };
                let nearest = own.unwrap_or_default().chunks_exact(words.max(1)).map(apart).min();
                if let Some(list) = nearest.and_then(|apart| near.get_mut(apart as usize)) {
                    list.push(place);
                }
            }
            places.extend(near.into_iter().flatten().take(most));
        }
        places.sort_unstable();
        places.dedup();
        places
    }
}

/// A bit for each number: whether it is above 0.
fn signs(vector: &[f32]) -> impl Iterator<Item = u64> {
    vector.chunks(64).map(|some| {
        some.iter().enumerate().fold(0, |bits, (at, value)| bits | (u64::from(*value > 0.0) << at))
    })
}

/// In 16 sums, so that it is vectorised.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    const LANES: usize = 16;
    let mut sums = [0f32; LANES];
    let (a_rest, b_rest) = (a.chunks_exact(LANES).remainder(), b.chunks_exact(LANES).remainder());
    for (a, b) in a.chunks_exact(LANES).zip(b.chunks_exact(LANES)) {
        for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
            *sum += a * b;
        }
    }
    let rest: f32 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    sums.iter().sum::<f32>() + rest
}

/// The best few, the worst of them on top.
struct Best {
    hits: BinaryHeap<Worst>,
    most: usize,
}

#[derive(PartialEq)]
struct Worst(Hit);

impl Eq for Worst {}

impl PartialOrd for Worst {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Worst {
    /// Greater is worse: of a lower score, or of the same and a later name.
    fn cmp(&self, other: &Self) -> Ordering {
        other.0.score.total_cmp(&self.0.score).then(self.0.id.cmp(&other.0.id))
    }
}

impl Best {
    fn offer(&mut self, hit: Hit) {
        if self.hits.len() < self.most {
            self.hits.push(Worst(hit));
        } else if self.hits.peek().is_some_and(|worst| Worst(hit) < *worst) {
            self.hits.pop();
            self.hits.push(Worst(hit));
        }
    }

    fn in_order(self) -> Vec<Hit> {
        self.hits.into_sorted_vec().into_iter().map(|Worst(hit)| hit).collect()
    }
}
