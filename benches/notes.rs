//! Stores of notes: how long a search takes, how much it finds where only some are scored, and adding.
//!
//! ```text
//! cargo bench --bench notes --features redb [-- [--cpu] [search | signs | add]]
//! ```
//!
//! `--cpu` counts the time that processors spend on a search, of all threads together (Linux only).
//! Searching 100 000 vectors of 4096 takes 4 GB of memory, and comparing signs of a million of 576 takes 8.

#![allow(clippy::print_stdout)]

use std::error::Error;
use std::hint::black_box;
use std::time::Instant;

use candle_core::{Device, Tensor};
use hybrid_attention::memory::store::{Hit, Search};
use hybrid_attention::memory::{Embedded, Note, NoteId, Record, Store, Volatile};
use rayon::ThreadPoolBuilder;

use hybrid_attention_benches::{median, of_processors, sorted};

type Result<T = (), E = Box<dyn Error + Send + Sync>> = std::result::Result<T, E>;

const QUERIES: usize = 20;

fn main() -> Result {
    let asked: Vec<String> = std::env::args().skip(1).filter(|it| !it.starts_with('-')).collect();
    let wanted = |name: &str| asked.is_empty() || asked.iter().any(|it| it == name);
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    println!("load before: {}\n", load.trim());
    if wanted("search") {
        println!(
            "| vectors | numbers | threads | ms: least | middle | GB/s |\n|---|---|---|---|---|---|"
        );
        for width in [576, 4096] {
            search(100_000, width)?;
        }
    }
    if wanted("signs") {
        println!(
            "\n| vectors of 576 | how many | scored | ms, one thread | of the best 10 |\n|---|---|---|---|---|"
        );
        for centres in [None, Some(4096)] {
            signs(centres)?;
        }
    }
    if wanted("add") {
        println!(
            "\n| notes at once | notes | a second | bytes a note | ms to open |\n|---|---|---|---|---|"
        );
        for (at_once, notes) in [(10_000, 10_000), (100, 10_000), (1, 1000)] {
            add(at_once, notes)?;
        }
    }
    Ok(())
}

/// Vectors of length 1, each near one of these, if there are any.
fn vectors(count: usize, width: usize, near: Option<&[Vec<f32>]>) -> Result<Vec<Vec<f32>>> {
    let mut all = Tensor::randn(0f32, 1.0, (count, width), &Device::Cpu)?.to_vec2::<f32>()?;
    for (index, vector) in all.iter_mut().enumerate() {
        if let Some(centres) = near {
            let centre = &centres[index * 7919 % centres.len()];
            vector.iter_mut().zip(centre).for_each(|(value, centre)| {
                *value = 0.7 * *value / (width as f32).sqrt() + centre;
            });
        }
        let length = vector.iter().map(|value| value * value).sum::<f32>().sqrt();
        vector.iter_mut().for_each(|value| *value /= length);
    }
    Ok(all)
}

fn records(from: usize, vectors: Vec<Vec<f32>>) -> Vec<Record> {
    let record = |(index, vector): (usize, Vec<f32>)| {
        let text = format!("note {index}: somebody gave something to somebody else, somewhere");
        let note = Note::default().time(index as i64).tag("story", (index % 100).to_string());
        let (id, vectors) = (NoteId::of(&text), vec![vector]);
        Record { id, text, note, superseded_by: None, spans: Vec::new(), vectors }
    };
    vectors.into_iter().enumerate().map(|(index, vector)| record((from + index, vector))).collect()
}

const AT_ONCE: usize = 10_000;

fn fill(
    store: &dyn Store,
    from: usize,
    to: usize,
    width: usize,
    near: Option<&[Vec<f32>]>,
) -> Result {
    for from in (from..to).step_by(AT_ONCE) {
        store.put(&records(from, vectors(AT_ONCE.min(to - from), width, near)?))?;
    }
    Ok(())
}

fn best(vector: &[f32], best: usize) -> Search {
    Search { vectors: vec![vector.to_vec()], best, ..Search::default() }
}

fn search(count: usize, width: usize) -> Result {
    let store = Volatile::default();
    fill(&store, 0, count, width, None)?;
    let threads = [1, std::thread::available_parallelism()?.get()];
    let pool = |threads| ThreadPoolBuilder::new().num_threads(threads).build();
    // All of them first: what a thread that has ended has spent is counted no more.
    let pools = threads.into_iter().map(pool).collect::<Result<Vec<_>, _>>()?;
    for (threads, pool) in threads.into_iter().zip(pools) {
        let queries = vectors(QUERIES, width, None)?;
        let times = pool.install(|| times(&store, &queries))?;
        let bytes = (4 * count * width) as f64;
        println!(
            "| {count} | {width} | {threads} | {:.1} | {:.1} | {:.1} |",
            times[0],
            median(&times),
            bytes / times[0] / 1e6
        );
    }
    Ok(())
}

/// Milliseconds of each search, sorted; on a machine that others use too, those that processors spend on it.
fn times(store: &dyn Store, queries: &[Vec<f32>]) -> Result<Vec<f64>> {
    let cpu = std::env::args().any(|argument| argument == "--cpu");
    let mut times = Vec::new();
    for query in queries {
        let (start, spent) = (Instant::now(), if cpu { of_processors()? } else { 0.0 });
        black_box(store.nearest(&best(query, 10))?);
        let seconds = if cpu { of_processors()? - spent } else { start.elapsed().as_secs_f64() };
        times.push(seconds * 1e3);
    }
    Ok(sorted(times))
}

/// More vectors than are searched one by one, beside the same in two stores that are.
fn signs(centres: Option<usize>) -> Result {
    const WIDTH: usize = 576;
    let count = (1 << 20) + 1024;
    let centres = centres.map(|count| vectors(count, WIDTH, None)).transpose()?;
    let near = centres.as_deref();
    let queries = vectors(QUERIES, WIDTH, near)?;
    let pool = ThreadPoolBuilder::new().num_threads(1).build()?;
    let whole = Volatile::default();
    let mut right: Vec<Vec<Hit>> = vec![Vec::new(); QUERIES];
    let mut exact = 0.0;
    for (from, to) in [(0, count / 2), (count / 2, count)] {
        let half = Volatile::default();
        for from in (from..to).step_by(AT_ONCE) {
            let records = records(from, vectors(AT_ONCE.min(to - from), WIDTH, near)?);
            half.put(&records)?;
            whole.put(&records)?;
        }
        for (query, right) in queries.iter().zip(&mut right) {
            right.extend(half.nearest(&best(query, 10))?);
        }
        exact += pool.install(|| times(&half, &queries))?[0];
    }
    let mut found = 0;
    for (query, right) in queries.iter().zip(&mut right) {
        right.sort_by(|a, b| b.score.total_cmp(&a.score));
        right.truncate(10);
        let hits = whole.nearest(&best(query, 10))?;
        found += hits.iter().filter(|hit| right.iter().any(|it| it.id == hit.id)).count();
    }
    let by_signs = pool.install(|| times(&whole, &queries))?[0];
    let kind = if near.is_some() { "near 4096 centres" } else { "without structure" };
    let recall = found as f64 / (10 * QUERIES) as f64;
    println!("| {kind} | {count} | all | {exact:.1} | 1 |");
    println!("| {kind} | {count} | 1024 | {by_signs:.1} | {recall:.2} |");
    Ok(())
}

fn add(at_once: usize, notes: usize) -> Result {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("notes.redb");
    let store = Embedded::open(&path)?;
    let records = records(0, vectors(notes, 576, None)?);
    let start = Instant::now();
    for some in records.chunks(at_once) {
        store.put(some)?;
    }
    let a_second = notes as f64 / start.elapsed().as_secs_f64();
    drop(store);
    let bytes = std::fs::metadata(&path)?.len() as f64 / notes as f64;
    let start = Instant::now();
    assert_eq!(Embedded::open(&path)?.len()?, notes);
    let opening = start.elapsed().as_secs_f64() * 1e3;
    println!("| {at_once} | {notes} | {a_second:.0} | {bytes:.0} | {opening:.0} |");
    Ok(())
}
