//! Does a choice of words find a text as well as all of it does?
//!
//! Each text is cut in two: the first part is stored, the second asks for it among the first parts of all texts. The
//! figure is the reciprocal of the rank at which its own first part is found (its mean over texts is the MRR).
//! Beside every score of salience stand its controls: the whole text, as many tokens chosen by chance, the first ones,
//! the rarest words, and tf-idf, which needs no model.
//!
//! ```
//! # use candle_core::Device;
//! use hybrid_attention::HybridModel;
//! use hybrid_attention::evaluate::Estimate;
//! use hybrid_attention::memory::evaluate::{Passage, Retrieval};
//!
//! # fn main() -> hybrid_attention::Result<()> {
//! let model = HybridModel::tiny(&Device::Cpu)?;
//! let texts = [
//!     "Then Eva gave everything to Max. Then Max gave all of it to Eva again.",
//!     "Earlier, Leo had handed everything to Ida. By then, Ida had it from Leo.",
//! ];
//! let cut = |text: &&str| Passage::cut(&model, text, 4).transpose();
//! let passages = texts.iter().filter_map(cut).collect::<hybrid_attention::Result<Vec<_>>>()?;
//! for row in Retrieval::default().run(&model, &passages, || ())? {
//!     println!("{} {:?} {:.3}", row.name, row.share, Estimate::of(&row.reciprocal_ranks).mean);
//! }
//! # Ok(())
//! # }
//! ```

use std::collections::{BTreeMap, HashMap, HashSet};

use candle_core::{D, Tensor};
use serde::Serialize;
use unicode_segmentation::UnicodeSegmentation;

use super::main_point::{MainPoint, Read};
use super::salience::Salience;
use crate::embed::EmbedConfig;
use crate::error::{Error, Result};
use crate::hybrid::HybridModel;
use crate::pooling::unit_length;

/// Two adjacent parts of a text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Passage {
    /// What is stored.
    pub stored: String,
    /// What asks for it.
    pub query: String,
}

impl Passage {
    /// The first `tokens` tokens of a text, and as many behind them, both to the end of their last whole word; `None` for
    /// a text that has not as many.
    ///
    /// # Errors
    /// [`Error::NoTokenizer`], [`Error::Tokenizer`].
    pub fn cut(model: &HybridModel, text: &str, tokens: usize) -> Result<Option<Self>> {
        let needed_for = "an evaluation";
        let tokenizer = model.tokenizer().ok_or(Error::NoTokenizer { needed_for })?;
        let text = text.trim();
        let (_, bytes) = tokenizer.encode_spans(text, true)?;
        let ends = (tokens.checked_sub(1), tokens.saturating_mul(2).checked_sub(1));
        let (Some(middle), Some(end)) = ends else { return Ok(None) };
        let (Some(middle), Some(end)) = (bytes.get(middle), bytes.get(end)) else {
            return Ok(None);
        };
        // The last end of a word at or before a byte.
        let whole = |byte: usize| {
            let words = text.unicode_word_indices().map(|(at, word)| at + word.len());
            words.take_while(|end| *end <= byte).last().unwrap_or(0)
        };
        let (middle, end) = (whole(middle.end), whole(end.end));
        let stored = text.get(..middle).unwrap_or_default().trim();
        let query = text.get(middle..end).unwrap_or_default().trim();
        let both = !stored.is_empty() && !query.is_empty();
        Ok(both.then(|| Self { stored: stored.to_owned(), query: query.to_owned() }))
    }
}

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
        let ways = [
            ("last 8 queries", Salience::last_queries(8)),
            ("received", Salience::received()),
            ("value-weighted", Salience::value_weighted()),
            ("reconstruct", Salience::reconstruct()),
            ("leverage", Salience::leverage()),
        ];
        let ways = ways.map(|(name, salience)| (name.to_owned(), salience));
        Self { ways: ways.into(), shares: vec![0.12, 0.25, 0.5], draws: 5 }
    }
}

/// What the parts are compared by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Compared {
    /// One vector for each text: [`Embedding::Whole`](super::Embedding::Whole) or
    /// [`Embedding::MainPoint`](super::Embedding::MainPoint).
    Vectors,
    /// A vector for each token kept: [`Embedding::Words`](super::Embedding::Words).
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

/// Scores of each token of both parts of a passage.
type Scores = [Vec<f32>; 2];

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
        if self.draws == 0 {
            return Err(Error::parameter("draws", "at least 1", 0));
        }
        for share in &self.shares {
            Salience::lead().share(*share).validate()?;
        }
        let rare = Rarity::of(passages.iter().map(|passage| passage.stored.as_str()));
        let mut ways: Vec<(String, Vec<Scores>)> = vec![("lead".into(), Vec::new())];
        ways.push(("idf".into(), Vec::new()));
        ways.extend(self.ways.iter().map(|(name, _)| (name.clone(), Vec::new())));
        let mut draws = vec![Vec::new(); usize::try_from(self.draws).unwrap_or(usize::MAX)];
        let mut read = Vec::with_capacity(passages.len());
        for (index, passage) in (0u64..).zip(passages) {
            let both = [Read::new(model, &passage.stored)?, Read::new(model, &passage.query)?];
            let score = |way: &dyn Fn(&Read<'_>) -> Result<Vec<f32>>| -> Result<Scores> {
                let [stored, query] = &both;
                Ok([way(stored)?, way(query)?])
            };
            let by = |salience: &Salience| score(&|read| salience.scores(&read.reading()));
            let given = [by(&Salience::lead())?, score(&|read| Ok(rare.scores(read)))?];
            let own = self.ways.iter().map(|(_, salience)| by(salience));
            let own = given.into_iter().map(Ok).chain(own).collect::<Result<Vec<_>>>()?;
            ways.iter_mut().zip(own).for_each(|((_, all), own)| all.push(own));
            for (draw, all) in (0..self.draws).zip(&mut draws) {
                // Other words of the two parts, and of other passages.
                let seed = |part| Salience::random((draw << 32) + 2 * index + part);
                let [stored, query] = &both;
                let scores = |read: &Read<'_>, part| seed(part).scores(&read.reading());
                all.push([scores(stored, 0)?, scores(query, 1)?]);
            }
            read.push(both);
            progress();
        }

        let mut rows = vec![whole(model, passages)?, rare.row(passages)];
        for compared in [Compared::Vectors, Compared::Words] {
            let level = |read: &Read<'_>| vec![0.0; read.ids.len()];
            let level: Vec<Scores> = read.iter().map(|both| both.each_ref().map(level)).collect();
            let all = row(&read, &level, 1.0, compared)?;
            rows.push(Row { name: "all words".into(), share: None, ..all });
            for &share in &self.shares {
                let of_draws = draws.iter().map(|scores| row(&read, scores, share, compared));
                let random = mean(of_draws.collect::<Result<Vec<_>>>()?);
                rows.push(Row { name: Self::RANDOM.into(), ..random });
                for (name, scores) in &ways {
                    rows.push(Row { name: name.clone(), ..row(&read, scores, share, compared)? });
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

fn row(read: &[[Read<'_>; 2]], scores: &[Scores], share: f64, compared: Compared) -> Result<Row> {
    let points = |part: usize| -> Result<Vec<MainPoint>> {
        let both = read.iter().zip(scores);
        let both = both.filter_map(|(read, scores)| read.get(part).zip(scores.get(part)));
        let room = |read: &Read<'_>| Salience::lead().share(share).room(read.ids.len());
        both.map(|(read, scores)| read.point(scores, room(read))).collect()
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
    fn new(compared: Compared, share: Option<f64>, scores: &[Vec<f32>]) -> Self {
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
fn mean(rows: Vec<Row>) -> Row {
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

/// In how few texts a word is.
struct Rarity {
    texts: usize,
    /// In how many of them each word is.
    counts: HashMap<String, usize>,
}

impl Rarity {
    fn of<'a>(texts: impl Iterator<Item = &'a str>) -> Self {
        let mut rarity = Self { texts: 0, counts: HashMap::new() };
        for text in texts {
            rarity.texts += 1;
            for word in lower(text).into_iter().collect::<HashSet<_>>() {
                *rarity.counts.entry(word).or_default() += 1;
            }
        }
        rarity
    }

    /// `ln((1 + texts) / (1 + those with the word)) + 1`
    fn idf(&self, word: &str) -> f64 {
        let with = self.counts.get(word).copied().unwrap_or(0);
        ((1.0 + self.texts as f64) / (1.0 + with as f64)).ln() + 1.0
    }

    /// Of each token, that of the word that it spells; of no word, 0.
    fn scores(&self, read: &Read<'_>) -> Vec<f32> {
        let mut scores = vec![0.0; read.ids.len()];
        for word in read.words() {
            let text = read.reading().text.get(word.bytes).unwrap_or_default();
            let idf = self.idf(&text.to_lowercase()) as f32;
            scores.get_mut(word.tokens).into_iter().flatten().for_each(|score| *score = idf);
        }
        scores
    }

    /// How often each word is there, times its idf; of length 1.
    fn vector(&self, text: &str) -> BTreeMap<String, f64> {
        let mut vector: BTreeMap<String, f64> = BTreeMap::new();
        for word in lower(text) {
            let idf = self.idf(&word);
            *vector.entry(word).or_default() += idf;
        }
        let length = vector.values().map(|value| value * value).sum::<f64>().sqrt();
        vector.values_mut().for_each(|value| *value /= length.max(f64::MIN_POSITIVE));
        vector
    }

    fn row(&self, passages: &[Passage]) -> Row {
        let stored: Vec<_> = passages.iter().map(|it| self.vector(&it.stored)).collect();
        let scores = passages.iter().map(|passage| {
            let query = self.vector(&passage.query);
            let dot = |stored: &BTreeMap<String, f64>| {
                query.iter().filter_map(|(word, a)| Some(a * stored.get(word)?)).sum::<f64>() as f32
            };
            stored.iter().map(dot).collect()
        });
        let scores: Vec<Vec<f32>> = scores.collect();
        Row { name: "tf-idf".into(), ..Row::new(Compared::Counts, None, &scores) }
    }
}

fn lower(text: &str) -> Vec<String> {
    text.unicode_words().map(str::to_lowercase).collect()
}
