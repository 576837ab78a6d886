//! Random changes of the fuzz targets' seeds: whatever becomes of a file, loading it gives a model or an
//! error. Two seconds of it, or as many as `HYBRID_ATTENTION_MUTATIONS` says; where there is a nightly
//! compiler, the targets in `tests/fuzz` do more.

#![allow(clippy::print_stderr, reason = "what was run is worth seeing")]

use std::fs;
use std::time::{Duration, Instant};

use hybrid_attention_testing::{Result, hostile, root};
use proptest::prelude::Rng;
use proptest::test_runner::{RngAlgorithm, TestRng};

/// Numbers that parsers trip over, as bytes of headers, exponents and the like.
const EDGES: [u8; 8] = [0, 1, 0x7e, 0x7f, 0x80, 0xfe, 0xff, b'9'];

struct Mutator(TestRng);

impl Mutator {
    fn below(&mut self, end: usize) -> usize {
        (self.0.next_u64() % end.max(1) as u64) as usize
    }

    /// One byte, a run, or a copy of another part.
    fn change(&mut self, data: &mut Vec<u8>) {
        let at = self.below(data.len());
        match self.below(6) {
            0 => data[at] = EDGES[self.below(EDGES.len())],
            1 => data[at] ^= 1 << self.below(8),
            2 => data[at] = self.below(256) as u8,
            3 => drop(data.drain(at..data.len().min(at + 1 + self.below(8)))),
            4 => data.insert(at, EDGES[self.below(EDGES.len())]),
            _ => {
                let from = self.below(data.len());
                let len = self.below(16).min(data.len() - at.max(from));
                data.copy_within(from..from + len, at);
            }
        }
    }
}

#[test]
fn no_change_of_a_seed_makes_the_loaders_panic() -> Result {
    let seconds = std::env::var("HYBRID_ATTENTION_MUTATIONS").ok();
    let seconds: u64 = seconds.as_deref().unwrap_or("2").parse()?;
    let only = std::env::var("HYBRID_ATTENTION_MUTATIONS_OF").unwrap_or_default();
    let mut seeds = Vec::new();
    for (target, run) in [("folder", hostile::folder as fn(&[u8]) -> _), ("gguf", hostile::gguf)] {
        for entry in fs::read_dir(root().join("tests/fuzz/corpus").join(target))? {
            let path = entry?.path();
            if path.to_string_lossy().contains(&only) {
                seeds.push((run, fs::read(path)?));
            }
        }
    }
    assert!(!seeds.is_empty());
    let (mut runs, mut accepted) = (0, 0);
    let seed = [7, seconds as u8].repeat(16);
    let mut random = Mutator(TestRng::from_seed(RngAlgorithm::ChaCha, &seed));
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(seconds) {
        let chosen = random.below(seeds.len());
        let (run, mut data) = seeds[chosen].clone();
        for _ in 0..=random.below(4) {
            random.change(&mut data);
        }
        accepted += usize::from(run(&data).is_ok());
        runs += 1;
    }
    eprintln!("{runs} runs, {accepted} accepted");
    assert!(runs > accepted && accepted > 0);
    Ok(())
}
