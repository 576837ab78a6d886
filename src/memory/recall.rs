//! What to recall, and how near-duplicates are told and kept apart.

use std::collections::{BTreeMap, HashSet};

use unicode_segmentation::UnicodeSegmentation;

use super::note::{Note, NoteId, now};
use super::store::{Recency, Record, Search};
use crate::error::{Error, Result};

/// Of two texts, the share of their runs of three words that both have, from which on they are the same text
/// written twice.
const SAME: f64 = 0.8;

/// How to recall.
///
/// ```
/// use hybrid_attention::memory::Recall;
///
/// let recall = Recall::best(5).min_score(0.3).tag("project", "harbour").recency(0.2, 30.0);
/// # let _ = recall;
/// ```
#[derive(Clone, Debug)]
pub struct Recall {
    best: usize,
    min_score: Option<f32>,
    tags: BTreeMap<String, String>,
    recency: Option<(f32, f64)>,
    diversity: f32,
    tokens: usize,
    recompute: usize,
}

/// A note that was recalled.
#[derive(Clone, Debug, PartialEq)]
pub struct Recalled {
    /// Its name.
    pub id: NoteId,
    /// Its text.
    pub text: String,
    /// What it was remembered with.
    pub note: Note,
    /// How well it fits: a cosine for one vector a text; blended with its age where that counts.
    pub score: f32,
    /// The words that carry it, where its main point is what it is found by: from byte, to byte, score.
    pub spans: Vec<(usize, usize, f32)>,
}

impl Recall {
    /// The best few notes, at least 1.
    #[must_use]
    pub fn best(best: usize) -> Self {
        Self {
            best,
            min_score: None,
            tags: BTreeMap::new(),
            recency: None,
            diversity: 0.0,
            tokens: 1024,
            recompute: 0,
        }
    }

    /// Only notes of at least this score.
    #[must_use]
    pub fn min_score(mut self, score: f32) -> Self {
        self.min_score = Some(score);
        self
    }

    /// Only notes with this tag; several must all be there.
    #[must_use]
    pub fn tag(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.tags.insert(name.into(), value.into());
        self
    }

    /// Prefers newer notes: a score becomes `(1 - weight) · score + weight · 2^(-age / half_life)`, with
    /// `weight` from 0 to 1 and the half-life in days.
    #[must_use]
    pub fn recency(mut self, weight: f32, half_life_days: f64) -> Self {
        self.recency = Some((weight, half_life_days));
        self
    }

    /// Prefers notes unlike those that are already taken, from 0, not at all, to below 1 (maximal marginal
    /// relevance, Carbonell and Goldstein 1998).
    #[must_use]
    pub fn diversity(mut self, diversity: f32) -> Self {
        self.diversity = diversity;
        self
    }

    /// The most tokens of recalled texts in a prompt. Default: 1024.
    #[must_use]
    pub fn tokens(mut self, tokens: usize) -> Self {
        self.tokens = tokens;
        self
    }

    /// Of documents that a memory [keeps](super::Memory::keep), runs the last so many tokens of each but the first
    /// again, causally: these then see the documents before it. Default: 0, none. All of a document if it has fewer.
    #[must_use]
    pub fn recompute(mut self, tokens: usize) -> Self {
        self.recompute = tokens;
        self
    }

    pub(super) fn recomputed(&self) -> usize {
        self.recompute
    }

    pub(super) fn most_tokens(&self) -> usize {
        self.tokens
    }

    pub(super) fn validate(&self) -> Result<()> {
        let not = |name, expected, got: &dyn std::fmt::Display| {
            Err(Error::parameter(name, expected, got))
        };
        if self.best == 0 {
            return not("best", "at least 1", &0);
        }
        if let Some(score) = self.min_score.filter(|score| score.is_nan()) {
            return not("min_score", "a number", &score);
        }
        if !(0.0..1.0).contains(&self.diversity) {
            return not("diversity", "from 0 to below 1", &self.diversity);
        }
        match self.recency {
            Some((weight, _)) if !(0.0..=1.0).contains(&weight) => {
                not("recency weight", "0 to 1", &weight)
            }
            Some((_, days)) if !(days > 0.0 && days.is_finite()) => {
                not("recency half-life", "days above 0", &days)
            }
            _ => Ok(()),
        }
    }

    /// For `most` notes, of which not all may be kept.
    pub(super) fn search(&self, vectors: Vec<Vec<f32>>, most: usize) -> Search {
        let recency = self.recency.map(|(weight, days)| Recency {
            weight,
            half_life: days * 86_400_000.0,
            now: now(),
        });
        let (min_score, tags) = (self.min_score, self.tags.clone());
        Search { vectors, best: most, min_score, tags, recency }
    }

    /// How many are asked for at first, so that enough are left once near-duplicates are one.
    pub(super) fn first_asked(&self) -> usize {
        self.best.saturating_mul(3).saturating_add(8)
    }

    /// The best few of `found`, which are in order: near-duplicates as one, and apart from each other.
    pub(super) fn choose(&self, found: Vec<(Record, f32)>) -> Vec<Recalled> {
        let mut left = distinct(found);
        let mut taken: Vec<(Record, f32)> = Vec::new();
        while taken.len() < self.best && !left.is_empty() {
            let worth = |(record, score): &(Record, f32)| {
                let alike = taken.iter().map(|(other, _)| alike(record, other));
                let nearest = alike.fold(0f32, f32::max);
                (1.0 - self.diversity) * score - self.diversity * nearest
            };
            let worths: Vec<f32> = left.iter().map(worth).collect();
            let best = (0..left.len()).rev().max_by(|&a, &b| {
                let worth = |at: usize| worths.get(at).copied().unwrap_or(f32::MIN);
                worth(a).total_cmp(&worth(b))
            });
            taken.push(left.remove(best.unwrap_or(0)));
        }
        let recalled = |(record, score): (Record, f32)| Recalled {
            id: record.id,
            text: record.text,
            note: record.note,
            score,
            spans: record.spans,
        };
        taken.into_iter().map(recalled).collect()
    }

    pub(super) fn wanted(&self) -> usize {
        self.best
    }
}

/// Of texts that are the same but for little, only the newest, with the best score of any of them: of a fact that
/// was put right, the older statement is not recalled beside the newer.
fn distinct(found: Vec<(Record, f32)>) -> Vec<(Record, f32)> {
    let mut kept: Vec<(Record, f32, HashSet<String>)> = Vec::new();
    for (record, score) in found {
        let runs = runs(&record.text);
        match kept.iter_mut().find(|(_, _, other)| overlap(&runs, other) >= SAME) {
            Some(same) if record.note.time > same.0.note.time => (same.0, same.2) = (record, runs),
            Some(_) => {}
            None => kept.push((record, score, runs)),
        }
    }
    kept.into_iter().map(|(record, score, _)| (record, score)).collect()
}

/// The runs of three words, in lower case; of a shorter text, all of it.
fn runs(text: &str) -> HashSet<String> {
    let lower = text.to_lowercase();
    let words: Vec<&str> = lower.unicode_words().collect();
    match words.len() {
        0 => HashSet::from([lower.trim().to_owned()]),
        1 | 2 => HashSet::from([words.join(" ")]),
        _ => words.windows(3).map(|run| run.join(" ")).collect(),
    }
}

/// The share of both that each has (Jaccard).
fn overlap(a: &HashSet<String>, b: &HashSet<String>) -> f64 {
    let both = a.intersection(b).count();
    both as f64 / (a.len() + b.len() - both).max(1) as f64
}

/// How alike two notes are: MaxSim, as a query is compared.
fn alike(a: &Record, b: &Record) -> f32 {
    let best = |x: &Vec<f32>| b.vectors.iter().map(|y| dot(x, y)).fold(f32::MIN, f32::max);
    a.vectors.iter().map(best).sum::<f32>() / a.vectors.len().max(1) as f32
}

/// Over as many numbers as the shorter one has.
pub(super) fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}
