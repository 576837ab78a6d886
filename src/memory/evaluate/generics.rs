//! Are texts found better without what is generic in their vectors?

use candle_core::Tensor;
use serde::Serialize;

use super::retrieval::{Compared, Row, mean, tf_idf};
use super::{Passage, Rarity};
use crate::embed::EmbedConfig;
use crate::error::{Error, Result};
use crate::hybrid::HybridModel;
use crate::pooling::unit_length;
use crate::refine::Remove;
use crate::statistics::{Explained, Fingerprint, Generic, Subspace};

/// What is compared: vectors with their [`Generic`] and without it, held out. It is made of some passages; how many
/// directions are taken out, and of which layer the vectors are, is chosen by others; and what that is worth is seen
/// on a third kind, which neither has seen.
#[derive(Clone, Debug)]
pub struct Generics {
    /// The layers whose entering states are pooled; `None` for what leaves the final norm.
    pub layers: Vec<Option<usize>>,
    /// The numbers of directions to choose from.
    pub counts: Vec<usize>,
    /// How often directions are drawn by chance; a passage's figure is the mean of all draws.
    pub draws: u64,
}

/// How well passages are found that nothing was chosen by.
#[derive(Clone, Debug, Serialize)]
pub struct Tested {
    /// What needs no model.
    pub tf_idf: Row,
    /// Layer by layer.
    pub layers: Vec<AtLayer>,
}

/// The same with the states of one layer.
#[derive(Clone, Debug, Serialize)]
pub struct AtLayer {
    /// The layer that they enter; `None` for what leaves the final norm.
    pub layer: Option<usize>,
    /// Whether other passages are found best in this one.
    pub chosen: bool,
    /// The directions by which other passages are found best.
    pub k: usize,
    /// The most directions to choose from, of which the next figures are.
    pub most: usize,
    /// How much of the tested passages the mean and the most directions explain.
    pub explained: Explained,
    /// How much as many directions by chance explain.
    pub by_chance: f64,
    /// What the most directions have in common with those of the tested passages themselves.
    pub overlap: f64,
    /// What was taken out: [`NOTHING`](Generics::NOTHING), [`MEAN`](Generics::MEAN),
    /// [`DIRECTIONS`](Generics::DIRECTIONS), [`BOTH`](Generics::BOTH), [`RANDOM`](Generics::RANDOM).
    pub rows: Vec<Row>,
}

/// What was found of a layer before any test.
struct Choice {
    generic: Generic,
    k: usize,
    /// The mean reciprocal rank by which `k` was chosen.
    mrr: f64,
}

/// The vectors of the first parts, and of the next.
type Parts = [Tensor; 2];

impl Generics {
    /// Nothing taken out.
    pub const NOTHING: &str = "nothing";
    /// The mean alone.
    pub const MEAN: &str = "mean";
    /// `k` directions, and not the mean.
    pub const DIRECTIONS: &str = "k directions";
    /// The mean and `k` directions.
    pub const BOTH: &str = "mean, k directions";
    /// The mean and `k` directions by chance: the control.
    pub const RANDOM: &str = "mean, k random";

    /// For a model: a third of its layers, two thirds, all of them, and behind the final norm; 1, 2, 4, 8, 16 or 32
    /// directions; five draws.
    #[must_use]
    pub fn new(model: &HybridModel) -> Self {
        let all = model.transformer().all_layers().end;
        let layers = vec![Some(all / 3), Some(2 * all / 3), Some(all), None];
        Self { layers, counts: vec![1, 2, 4, 8, 16, 32], draws: 5 }
    }

    /// How well the passages of each of `tests` are found, where those of `fit` say what is generic and those of
    /// `choose` how much of it to take out, and of which layer. `progress` is called whenever passages of one kind
    /// have been read up to one layer: `layers * (2 + tests)` times.
    ///
    /// # Errors
    /// [`Error::Parameter`] for fewer than two passages of a kind, no layers, counts or draws, a layer that is not
    /// there, and more directions than the vectors of the passages have; as [`HybridModel::embed`].
    pub fn run(
        &self,
        model: &HybridModel,
        [fit, choose]: [&[Passage]; 2],
        tests: &[&[Passage]],
        progress: impl Fn(),
    ) -> Result<Vec<Tested>> {
        let most = self.check(&[&[fit, choose], tests].concat())?;
        let fingerprint = Fingerprint::of(model.transformer())?;
        let read = |passages: &[Passage], layer| {
            let parts = vectors(model, passages, layer);
            progress();
            parts
        };
        let mut best: Option<(usize, f64)> = None;
        let mut found: Vec<Vec<AtLayer>> = vec![Vec::new(); tests.len()];
        for (index, layer) in self.layers.iter().enumerate() {
            let both = Tensor::cat(&read(fit, *layer)?, 0)?;
            let generic = Generic::fit(&both, *layer, fingerprint.clone())?;
            let choice = self.choose(generic, &read(choose, *layer)?)?;
            if best.is_none_or(|(_, mrr)| choice.mrr > mrr) {
                best = Some((index, choice.mrr));
            }
            for (passages, found) in tests.iter().zip(&mut found) {
                found.push(self.test(&choice, &read(passages, *layer)?, most)?);
            }
        }
        let tested = tests.iter().zip(found).map(|(passages, mut layers)| {
            for (index, at) in layers.iter_mut().enumerate() {
                at.chosen = best.is_some_and(|(best, _)| best == index);
            }
            let rare = Rarity::of(passages.iter().map(|passage| passage.stored.as_str()));
            Tested { tf_idf: tf_idf(&rare, passages), layers }
        });
        Ok(tested.collect())
    }

    /// The most directions.
    fn check(&self, passages: &[&[Passage]]) -> Result<usize> {
        if let Some(few) = passages.iter().find(|passages| passages.len() < 2) {
            return Err(Error::parameter("passages", "at least 2 of each kind", few.len()));
        }
        for (name, none) in [("layers", self.layers.is_empty()), ("draws", self.draws == 0)] {
            if none {
                return Err(Error::parameter(name, "at least 1", 0));
            }
        }
        let most = self.counts.iter().max().copied().unwrap_or(0);
        if self.counts.contains(&0) || most == 0 {
            let got = format!("{:?}", self.counts);
            return Err(Error::parameter("counts", "at least one, each 1 or more", got));
        }
        // Each passage has two vectors, and their mean is no direction.
        let fewest = passages.iter().map(|passages| 2 * passages.len() - 1).min().unwrap_or(0);
        if most > fewest {
            let expected = format!("at most {fewest}, as there are passages for");
            return Err(Error::parameter("counts", expected, most));
        }
        Ok(most)
    }

    fn choose(&self, generic: Generic, parts: &Parts) -> Result<Choice> {
        let mut best = (0, f64::NEG_INFINITY);
        for k in &self.counts {
            let ranks = row(Self::BOTH, parts, &generic.remove(*k)?)?.reciprocal_ranks;
            let mrr = ranks.iter().sum::<f64>() / ranks.len() as f64;
            if mrr > best.1 {
                best = (*k, mrr);
            }
        }
        Ok(Choice { generic, k: best.0, mrr: best.1 })
    }

    fn test(&self, choice: &Choice, parts: &Parts, most: usize) -> Result<AtLayer> {
        let Choice { generic, k, .. } = choice;
        let (both, width) = (Tensor::cat(parts, 0)?, generic.mean().len());
        let own = Generic::fit(&both, generic.layer(), generic.fingerprint().clone())?;
        let all = generic.subspace(most)?;
        let by_chance = generic.explained(&both, &Subspace::random(width, most, 0)?)?;
        let draw = |seed| {
            let drawn = Subspace::random(width, *k, seed)?;
            row(Self::RANDOM, parts, &generic.remove_others(&drawn)?)
        };
        let drawn = (0..self.draws).map(draw).collect::<Result<Vec<_>>>()?;
        Ok(AtLayer {
            layer: generic.layer(),
            chosen: false,
            k: *k,
            most,
            explained: generic.explained(&both, &all)?,
            by_chance: by_chance.directions,
            overlap: all.overlap(&own.subspace(most)?)?,
            rows: vec![
                row(Self::NOTHING, parts, &Remove::default())?,
                row(Self::MEAN, parts, &generic.remove(0)?)?,
                row(Self::DIRECTIONS, parts, &generic.remove(*k)?.keep_mean())?,
                row(Self::BOTH, parts, &generic.remove(*k)?)?,
                mean(drawn),
            ],
        })
    }
}

/// As they are pooled, before anything is taken out of them.
fn vectors(model: &HybridModel, passages: &[Passage], layer: Option<usize>) -> Result<Parts> {
    let config = layer.into_iter().fold(EmbedConfig::default(), EmbedConfig::layer);
    let config = config.normalize(false);
    let embed = |part: fn(&Passage) -> &str| {
        let texts: Vec<&str> = passages.iter().map(part).collect();
        model.embed(&texts, &config)
    };
    Ok([embed(|it| &it.stored)?, embed(|it| &it.query)?])
}

fn row(name: &str, [stored, query]: &Parts, remove: &Remove) -> Result<Row> {
    let left = |vectors: &Tensor| unit_length(&remove.apply(vectors)?);
    let scores = left(query)?.matmul(&left(stored)?.t()?)?.to_vec2::<f32>()?;
    Ok(Row { name: name.into(), ..Row::new(Compared::Vectors, None, &scores) })
}
