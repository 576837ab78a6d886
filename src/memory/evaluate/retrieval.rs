//! Does a choice of words find a text as well as all of it does?

use std::collections::BTreeMap;

use candle_core::{D, Tensor};
use serde::Serialize;

use super::{Passage, Rarity, Read, chance, check, every_score, room};
use crate::embed::EmbedConfig;
use crate::error::{Error, Result};
use crate::hybrid::HybridModel;
use crate::memory::main_point::MainPoint;
use crate::memory::salience::Salience;
use crate::pooling::unit_length;

/// What is compared.
#[derive(Clone, Debug)]
pub struct Retrieval {
    /// Scores of salience, by name. Their own budgets do not count.
    pub ways: Vec<(String, Salience)>,
    /// Shares of the tokens that are kept.
    pub shares: Vec<f64>,
    /// How often words are drawn by chance; a passage's figure is the mean of all draws.
    pub draws: u64,
}

impl Default for Retrieval {
    /// All scores, at 12, 25 and 50 %, and five draws.
    fn default() -> Self {
        Self { ways: every_score(), shares: vec![0.12, 0.25, 0.5], draws: 5 }
    }
}

/// What the parts are compared by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Compared {
    /// One vector for each text: [`Embedding::Whole`](crate::memory::Embedding::Whole) or
    /// [`Embedding::MainPoint`](crate::memory::Embedding::MainPoint).
    Vectors,
    /// A vector for each token kept: [`Embedding::Words`](crate::memory::Embedding::Words).
    Words,
    /// Counts of words.
    Counts,
}

/// How well one way finds the passages.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// Which way.
    pub name: String,
    /// What is compared.
    pub compared: Compared,
    /// The share of the tokens that it may keep; none where it keeps all.
    pub share: Option<f64>,
    /// For each passage, the reciprocal of the rank at which its first part is found. Of equal scores, the others
    /// come first.
    pub reciprocal_ranks: Vec<f64>,
    /// For each passage, the share of draws that found it first: 0 or 1 where there is one.
    pub found_first: Vec<f64>,
}

impl Retrieval {
    /// The names of the rows that others are compared with.
    pub const WHOLE: &str = "whole";
    /// The same.
    pub const RANDOM: &str = "random";

    /// All rows; `progress` is called for every passage that was read.
    ///
    /// # Errors
    /// [`Error::Parameter`] for fewer than two passages, a share outside its range, or no draws; as
    /// [`MainPoint::of`] and [`HybridModel::embed`].
    pub fn run(
        &self,
        model: &HybridModel,
        passages: &[Passage],
        progress: impl Fn(),
    ) -> Result<Vec<Row>> {
        if passages.len() < 2 {
            return Err(Error::parameter("passages", "at least 2", passages.len()));
        }
        check(&self.shares, self.draws)?;
        let rare = Rarity::of(passages.iter().map(|passage| passage.stored.as_str()));
        let mut read = Vec::with_capacity(passages.len());
        for (index, passage) in (0u64..).zip(passages) {
            let part = |text, part| {
                // Other words of the two parts, and of other passages.
                let drawn = chance(self.draws, 2 * index + part);
                let own = self.ways.iter().map(|(_, salience)| salience.clone());
                let ways: Vec<_> = [Salience::lead()].into_iter().chain(own).chain(drawn).collect();
                Read::new(model, text, &ways)
            };
            read.push([part(&passage.stored, 0)?, part(&passage.query, 1)?]);
            progress();
        }

        let mut rows = vec![whole(model, passages)?, tf_idf(&rare, passages)];
        let by =
            |way: usize| move |read: &Read<'_>| read.scores.get(way).cloned().unwrap_or_default();
        for compared in [Compared::Vectors, Compared::Words] {
            let level = |read: &Read<'_>| vec![0.0; read.ids.len()];
            let all = row(&read, level, 1.0, compared)?;
            rows.push(Row { name: "all words".into(), share: None, ..all });
            for &share in &self.shares {
                let drawn = (0..self.draws).zip(1 + self.ways.len()..);
                let drawn = drawn.map(|(_, way)| row(&read, by(way), share, compared));
                let random = mean(drawn.collect::<Result<Vec<_>>>()?);
                rows.push(Row { name: Self::RANDOM.into(), ..random });
                rows.push(Row { name: "lead".into(), ..row(&read, by(0), share, compared)? });
                let idf = row(&read, |read| rare.scores(read), share, compared)?;
                rows.push(Row { name: "idf".into(), ..idf });
                for (way, (name, _)) in (1..).zip(&self.ways) {
                    let own = row(&read, by(way), share, compared)?;
                    rows.push(Row { name: name.clone(), ..own });
                }
            }
        }
        Ok(rows)
    }
}

fn whole(model: &HybridModel, passages: &[Passage]) -> Result<Row> {
    let embed = |part: fn(&Passage) -> &str| {
        let texts: Vec<&str> = passages.iter().map(part).collect();
        model.embed(&texts, &EmbedConfig::default())
    };
    let (stored, query) = (embed(|it| &it.stored)?, embed(|it| &it.query)?);
    let scores = query.matmul(&stored.t()?)?.to_vec2::<f32>()?;
    Ok(Row::new(Compared::Vectors, None, &scores))
}

/// `scores` of each token of both parts of a passage choose what is compared.
fn row(
    read: &[[Read<'_>; 2]],
    scores: impl Fn(&Read<'_>) -> Vec<f32>,
    share: f64,
    compared: Compared,
) -> Result<Row> {
    let points = |part: usize| -> Result<Vec<MainPoint>> {
        let read = read.iter().filter_map(|both| both.get(part));
        read.map(|read| read.point(&scores(read), room(share, read))).collect()
    };
    let (stored, query) = (points(0)?, points(1)?);
    let scores = match compared {
        Compared::Vectors => {
            let vectors = |points: &[MainPoint]| -> Result<Tensor> {
                let all = points.iter().map(MainPoint::vector).collect::<Result<Vec<_>>>()?;
                Ok(Tensor::stack(&all, 0)?) // (passages, hidden)
            };
            vectors(&query)?.matmul(&vectors(&stored)?.t()?)?.to_vec2::<f32>()?
        }
        _ => {
            let rows = |point: &MainPoint| unit_length(point.states());
            let stored = stored.iter().map(rows).collect::<Result<Vec<_>>>()?;
            let max_sim = |point: &MainPoint| -> Result<Vec<f32>> {
                let query = rows(point)?;
                let score = |stored: &Tensor| -> Result<f32> {
                    let all = query.matmul(&stored.t()?)?; // (words of the query, of the stored)
                    Ok(all.max(D::Minus1)?.mean_all()?.to_scalar()?)
                };
                stored.iter().map(score).collect()
            };
            query.iter().map(max_sim).collect::<Result<Vec<_>>>()?
        }
    };
    Ok(Row::new(compared, Some(share), &scores))
}

impl Row {
    /// Of scores, a row for each query.
    pub(super) fn new(compared: Compared, share: Option<f64>, scores: &[Vec<f32>]) -> Self {
        let rank = |(own, scores): (usize, &Vec<f32>)| {
            let right = scores.get(own).copied().unwrap_or(f32::NAN);
            // At or above it, itself among them.
            scores.iter().filter(|score| **score >= right).count().max(1)
        };
        let ranks: Vec<usize> = scores.iter().enumerate().map(rank).collect();
        Self {
            name: Retrieval::WHOLE.into(),
            compared,
            share,
            reciprocal_ranks: ranks.iter().map(|rank| 1.0 / *rank as f64).collect(),
            found_first: ranks.iter().map(|rank| f64::from(u8::from(*rank == 1))).collect(),
        }
    }
}

/// Passage by passage.
pub(super) fn mean(rows: Vec<Row>) -> Row {
    let count = rows.len() as f64;
    let mut rows = rows.into_iter();
    let Some(mut mean) = rows.next() else { return Row::new(Compared::Vectors, None, &[]) };
    let add = |sum: &mut Vec<f64>, more: &[f64]| {
        sum.iter_mut().zip(more).for_each(|(sum, more)| *sum += more);
    };
    for row in rows {
        add(&mut mean.reciprocal_ranks, &row.reciprocal_ranks);
        add(&mut mean.found_first, &row.found_first);
    }
    mean.reciprocal_ranks.iter_mut().for_each(|sum| *sum /= count);
    mean.found_first.iter_mut().for_each(|share| *share /= count);
    mean
}

/// What needs no model: how often each word is in a text, times how rare it is.
pub(super) fn tf_idf(rare: &Rarity, passages: &[Passage]) -> Row {
    let stored: Vec<_> = passages.iter().map(|it| rare.vector(&it.stored)).collect();
    let scores = passages.iter().map(|passage| {
        let query = rare.vector(&passage.query);
        let dot = |stored: &BTreeMap<String, f64>| {
            query.iter().filter_map(|(word, a)| Some(a * stored.get(word)?)).sum::<f64>() as f32
        };
        stored.iter().map(dot).collect()
    });
    let scores: Vec<Vec<f32>> = scores.collect();
    Row { name: "tf-idf".into(), ..Row::new(Compared::Counts, None, &scores) }
}
