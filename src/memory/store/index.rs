//! Vectors in memory, searched one by one.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BinaryHeap};
use std::ops::Range;

use pulp::Arch;
use rayon::prelude::*;

use super::{Hit, Recency, Record, Search, check_width};
use crate::error::Result;
use crate::kernels::{FEW_ROWS, products};
use crate::memory::note::NoteId;

/// From how many vectors on a search first compares signs, and then scores what is near by these.
pub(super) const EXACT_UP_TO: usize = 1 << 20;

/// For each note to find, how many are scored after signs were compared; and at least how many.
const SCORED_PER_BEST: usize = 64;
const SCORED: usize = 1024;

/// Notes that one thread scores at a time.
const GROUP: usize = 1024;

/// What is searched of all notes.
#[derive(Debug)]
pub(super) struct Index {
    exact_up_to: usize,
    width: Option<usize>,
    /// `(vectors, width)`
    rows: Vec<f32>,
    /// A bit for the sign of each number, `(vectors, words)`: a 32nd of `rows`, kept before there are enough to
    /// compare signs first.
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
        let mut places = self.places_of(search);
        if self.rows.len() / width.max(1) > self.exact_up_to {
            places = self.near_by_signs(search, &places);
        }
        let queries = search.vectors.concat();
        let group = |places: &[usize]| self.best_of(places, &queries, width, search);
        let groups: Vec<Best> = places.par_chunks(GROUP).map(group).collect();
        let mut best = Best::of(search.best);
        groups.into_iter().flat_map(|group| group.hits).for_each(|Worst(hit)| best.offer(hit));
        Ok(best.in_order())
    }

    /// The places of the notes that may be found, in their order.
    fn places_of(&self, search: &Search) -> Vec<usize> {
        let fits = |entry: &Entry| {
            entry.found && search.tags.iter().all(|(n, value)| entry.tags.get(n) == Some(value))
        };
        let entries = self.entries.iter().enumerate();
        entries.filter(|(_, entry)| fits(entry)).map(|(place, _)| place).collect()
    }

    fn best_of(&self, places: &[usize], queries: &[f32], width: usize, search: &Search) -> Best {
        let mut best = Best::of(search.best);
        let scores = self.scores(places, queries, width);
        for (entry, score) in places.iter().filter_map(|place| self.entries.get(*place)).zip(scores)
        {
            let blend = |recency: &Recency| recency.blend(score, entry.time);
            let score = search.recency.as_ref().map_or(score, blend);
            if search.min_score.is_none_or(|least| score >= least) {
                best.offer(Hit { id: entry.id, score });
            }
        }
        best
    }

    /// MaxSim of each of these notes. Those that follow each other have rows that do, and are multiplied at
    /// once: of places `[3, 4, 5, 9]` first three notes, then one.
    fn scores(&self, places: &[usize], queries: &[f32], width: usize) -> Vec<f32> {
        let (mut scores, mut columns) = (Vec::with_capacity(places.len()), Vec::new());
        for run in places.chunk_by(|one, next| one + 1 == *next) {
            let from = run.first().copied().unwrap_or(0);
            let entries = self.entries.get(from..from + run.len()).unwrap_or_default();
            let rows = match (entries.first(), entries.last()) {
                (Some(first), Some(last)) => first.rows.start..last.rows.end,
                _ => continue,
            };
            let own = self.rows.get(rows.start * width..rows.end * width).unwrap_or_default();
            let start = scores.len();
            scores.resize(start + run.len(), 0f32);
            for queries in queries.chunks(FEW_ROWS * width) {
                let count = queries.len() / width;
                columns.resize(rows.len() * count, 0f32); // (rows, count)
                products(queries, own, width, &mut columns);
                let mut left = columns.as_slice();
                for (score, entry) in scores.iter_mut().skip(start).zip(entries) {
                    let (own, behind) = left.split_at(entry.rows.len() * count);
                    for query in 0..count {
                        let products = own.iter().skip(query).step_by(count);
                        *score += products.copied().fold(f32::NEG_INFINITY, f32::max);
                    }
                    left = behind;
                }
            }
        }
        let count = (queries.len() / width).max(1) as f32;
        scores.iter_mut().for_each(|score| *score /= count);
        scores
    }

    /// Those of the places whose notes have a vector near one of the query's, by how many signs are the same,
    /// each once, in their order.
    fn near_by_signs(&self, search: &Search, places: &[usize]) -> Vec<usize> {
        let (width, words) = (self.width.unwrap_or(0), self.words());
        let most = search.best.saturating_mul(SCORED_PER_BEST).max(SCORED);
        let mut near = vec![false; places.len()];
        for vector in &search.vectors {
            let query: Vec<u64> = signs(vector).collect();
            let mut apart = vec![u32::MAX; places.len()];
            apart.par_chunks_mut(GROUP).zip(places.par_chunks(GROUP)).for_each(
                |(apart, places)| {
                    Arch::new().dispatch(|| {
                        for (apart, place) in apart.iter_mut().zip(places) {
                            let rows =
                                self.entries.get(*place).map_or(0..0, |entry| entry.rows.clone());
                            let own = self.signs.get(rows.start * words..rows.end * words);
                            for row in own.unwrap_or_default().chunks_exact(words.max(1)) {
                                *apart = (*apart).min(differ(row, &query));
                            }
                        }
                    });
                },
            );
            // How many there are at each distance, and from where on only the first of them are taken.
            let mut counts = vec![0; width + 1];
            for apart in &apart {
                if let Some(count) = counts.get_mut(*apart as usize) {
                    *count += 1;
                }
            }
            let (mut room, mut last) = (most, u32::MAX);
            for (apart, count) in counts.into_iter().enumerate() {
                match room.checked_sub(count) {
                    Some(left) => room = left,
                    None => {
                        last = apart as u32;
                        break;
                    }
                }
            }
            for (near, apart) in near.iter_mut().zip(apart) {
                let taken = apart < last || apart == last && room > 0;
                room -= usize::from(taken && apart == last);
                *near |= taken;
            }
        }
        places.iter().zip(near).filter(|(_, near)| *near).map(|(place, _)| *place).collect()
    }
}

/// How many bits are not the same.
#[inline(always)]
fn differ(a: &[u64], b: &[u64]) -> u32 {
    a.iter().zip(b).map(|(a, b)| (a ^ b).count_ones()).sum()
}

/// A bit for each number: whether it is above 0.
fn signs(vector: &[f32]) -> impl Iterator<Item = u64> {
    vector.chunks(64).map(|some| {
        some.iter().enumerate().fold(0, |bits, (at, value)| bits | (u64::from(*value > 0.0) << at))
    })
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
    fn of(most: usize) -> Self {
        Self { hits: BinaryHeap::new(), most }
    }

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

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand::{Rng, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;
    use crate::memory::Note;

    /// Notes of one to three random vectors of length 1; some superseded, some gone, some put twice.
    fn filled(exact_up_to: usize, width: usize, notes: usize, seed: u64) -> (Index, Vec<Record>) {
        let mut rng = ChaCha8Rng::seed_from_u64(seed);
        let mut index = Index::new(exact_up_to);
        let mut there: BTreeMap<NoteId, Record> = BTreeMap::new();
        for number in 0..notes {
            let text = (number - usize::from(number % 9 == 8)).to_string();
            let id = NoteId::of(&text);
            let note = Note::default().time(number as i64).tag("third", (number % 3).to_string());
            let vectors = (0..1 + number % 3).map(|_| unit(&mut rng, width)).collect();
            let superseded_by = (number % 11 == 0).then(|| NoteId::of("new"));
            let record = Record { id, text, note, superseded_by, spans: Vec::new(), vectors };
            index.put(&record);
            there.insert(id, record);
            if number % 4 == 3 {
                let gone = NoteId::of(&rng.random_range(0..number).to_string());
                assert_eq!(index.remove(gone), there.remove(&gone).is_some());
            }
        }
        assert_eq!(index.len(), there.len());
        (index, there.into_values().collect())
    }

    fn unit(rng: &mut ChaCha8Rng, width: usize) -> Vec<f32> {
        let vector: Vec<f32> = (0..width).map(|_| rng.random_range(-1f32..1.0)).collect();
        let length = vector.iter().map(|value| value * value).sum::<f32>().sqrt().max(1e-6);
        vector.into_iter().map(|value| value / length).collect()
    }

    fn plain(record: &Record, search: &Search) -> f64 {
        let dot = |a: &[f32], b: &[f32]| -> f64 {
            a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
        };
        let best = |query: &Vec<f32>| {
            record.vectors.iter().map(|own| dot(query, own)).fold(f64::NEG_INFINITY, f64::max)
        };
        let score = search.vectors.iter().map(best).sum::<f64>() / search.vectors.len() as f64;
        match search.recency {
            Some(recency) => f64::from(recency.blend(score as f32, record.note.time.unwrap_or(0))),
            None => score,
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        /// While all notes are among those that are scored after their signs were compared, both ways find the
        /// same: those of a plain loop.
        #[test]
        fn both_ways_find_the_same_where_all_are_scored(
            width in 1usize..150,
            notes in 1usize..1000,
            queries in 1usize..40,
            best in 0usize..30,
            tag in 0usize..5,
            recent in any::<bool>(),
            seed in any::<u64>(),
        ) {
            let (exact, there) = filled(usize::MAX, width, notes, seed);
            let (by_signs, _) = filled(0, width, notes, seed);
            let mut rng = ChaCha8Rng::seed_from_u64(seed ^ 1);
            let search = Search {
                vectors: (0..queries).map(|_| unit(&mut rng, width)).collect(),
                best,
                tags: (tag < 4).then(|| ("third".to_owned(), tag.to_string())).into_iter().collect(),
                recency: recent.then_some(Recency { weight: 0.5, half_life: 100.0, now: 500 }),
                ..Search::default()
            };
            let found = exact.nearest(&search)?;
            prop_assert_eq!(&by_signs.nearest(&search)?, &found);
            let fits = |record: &&Record| {
                let kind = record.note.tags.get("third");
                record.superseded_by.is_none() && (tag >= 4 || kind == Some(&tag.to_string()))
            };
            let mut right: Vec<f64> =
                there.iter().filter(fits).map(|record| plain(record, &search)).collect();
            right.sort_by(|a, b| b.total_cmp(a));
            right.truncate(best);
            prop_assert_eq!(found.len(), right.len());
            for (hit, right) in found.iter().zip(right) {
                prop_assert!((f64::from(hit.score) - right).abs() < 1e-5, "{:?} {right}", hit);
                let record = there.iter().find(|record| record.id == hit.id);
                let record = record.ok_or_else(|| TestCaseError::fail("not there"))?;
                prop_assert!(fits(&record));
                prop_assert!((f64::from(hit.score) - plain(record, &search)).abs() < 1e-5);
            }
        }
    }

    /// With more notes than are scored: a note finds itself, scores are the exact ones, and of the best ten
    /// most are found although the vectors have no structure at all.
    #[test]
    fn signs_lead_to_what_is_near() -> Result<()> {
        let (width, notes) = (256, 12_000);
        let (exact, there) = filled(usize::MAX, width, notes, 3);
        let (by_signs, _) = filled(0, width, notes, 3);
        let mut rng = ChaCha8Rng::seed_from_u64(4);
        let mut common = 0;
        for record in there.iter().filter(|record| record.superseded_by.is_none()).step_by(80) {
            let vectors = record.vectors.clone();
            let itself = by_signs.nearest(&Search { vectors, best: 1, ..Search::default() })?;
            assert_eq!(itself.first().map(|hit| hit.id), Some(record.id));
            let search =
                Search { vectors: vec![unit(&mut rng, width)], best: 10, ..Search::default() };
            let (found, right) = (by_signs.nearest(&search)?, exact.nearest(&search)?);
            assert_eq!((found.len(), right.len()), (10, 10));
            common += found.iter().filter(|hit| right.contains(hit)).count();
            assert!(found.iter().zip(&right).all(|(found, right)| found.score <= right.score));
        }
        let asked =
            there.iter().filter(|record| record.superseded_by.is_none()).count().div_ceil(80);
        assert!(common * 10 > asked * 10 * 8, "{common} of {}", asked * 10);
        Ok(())
    }
}
