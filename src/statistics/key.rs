//! What the statistics of an input let one expect of those of its output.

use std::path::Path;

use candle_core::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};

use super::file;
use super::held_out::Data;
use super::{Distance, Fingerprint, Pairs, Summary};
use crate::error::{Error, Result};
use crate::load::TensorFile;

/// An input and the output that belongs to it, as rows of states: `(tokens, hidden)` each.
#[derive(Clone, Debug)]
pub struct Example {
    /// The states of the input.
    pub input: Tensor,
    /// The states of the output, at least two.
    pub output: Tensor,
}

/// How a [`Key`] is fitted.
#[derive(Clone, Debug, PartialEq)]
pub struct KeyConfig {
    /// The layer whose states the examples hold; see [`states`](super::states). Only remembered. Default 0:
    /// embeddings.
    pub layer: usize,
    /// The pairs of the input that may be looked at, of which those are kept that say most. Default: all of
    /// them, and levels 0 to 2.
    pub pairs: Vec<Pairs>,
    /// The strengths of the ridge to choose from, each above 0, as shares of the mean square of an example's
    /// statistics. Default: powers of ten from 0.01 to 1000.
    pub strengths: Vec<f64>,
    /// Parts of the examples that are held out in turn, at least 2. Default 5.
    pub folds: usize,
    /// Of their choice. Default 0.
    pub seed: u64,
}

impl Default for KeyConfig {
    fn default() -> Self {
        let pairs = vec![Pairs::Full, Pairs::Level(0), Pairs::Level(1), Pairs::Level(2)];
        let strengths = vec![0.01, 0.1, 1.0, 10.0, 100.0, 1000.0];
        Self { layer: 0, pairs, strengths, folds: 5, seed: 0 }
    }
}

impl KeyConfig {
    fn validate(&self, examples: usize) -> Result<()> {
        self.pairs.iter().try_for_each(|pairs| pairs.validate())?;
        if self.pairs.is_empty() {
            return Err(Error::parameter("pairs", "at least one kind", "[]"));
        }
        let fits = |strength: &f64| *strength > 0.0 && *strength <= 1e9;
        if self.strengths.is_empty() || !self.strengths.iter().all(fits) {
            let expected = "at least one number above 0 and up to 1e9";
            return Err(Error::parameter("strengths", expected, format!("{:?}", self.strengths)));
        }
        if !(2..=1000).contains(&self.folds) {
            return Err(Error::parameter("folds", "2 to 1000", self.folds));
        }
        if examples < 2 * self.folds {
            let expected = format!("at least two for each of {} folds", self.folds);
            return Err(Error::parameter("examples", expected, examples));
        }
        Ok(())
    }
}

/// A ridge regression from the statistics of an input, its pairs' means and standard deviations, to those of
/// the output, the mean and the variance of all pairs of it, channel by channel.
///
/// Which pairs of the input, and how strong the ridge, is chosen by what is expected of examples that are
/// left out. How much of it all is worth is then seen on parts of the examples that neither choice nor fit
/// has seen: [`Key::mean_r2`] and [`Key::variance_r2`], the share of the output's variance around its mean
/// over examples that is explained, all channels counting alike. Where neither is above 0 the key knows
/// nothing and [declines](Key::declines). Of SmolLM2's embeddings of news, from the first half of a text to
/// the second, that is 0.03 for means and 0.02 for variances; of the states that enter layer 10, where the
/// second half has seen the first, 0.22 and 0.04 (`cargo bench --bench codes`).
///
/// ```
/// # use candle_core::{Device, Tensor};
/// use hybrid_attention::HybridModel;
/// use hybrid_attention::statistics::{Example, Fingerprint, Key, KeyConfig, Pairs, Summary, states};
///
/// # fn main() -> hybrid_attention::Result<()> {
/// let model = HybridModel::tiny(&Device::Cpu)?;
/// let of = |ids: &[u32]| states(model.transformer(), ids, 2);
/// let mut examples = Vec::new();
/// for first in 0..80 {
///     let input = of(&[first, first + 3, 2 * first, 9])?;
///     examples.push(Example { output: (&input * 2.0)?, input }); // an output that follows from the input
/// }
/// let config = KeyConfig { layer: 2, pairs: vec![Pairs::Full], ..KeyConfig::default() };
/// let key = Key::fit(&examples, &config, Fingerprint::of(model.transformer())?)?;
/// assert!(!key.declines() && key.mean_r2() > 0.5);
///
/// let input = Summary::of(&of(&[3, 6, 6, 9])?, key.pairs())?;
/// let output = Summary::of(&(of(&[3, 6, 6, 9])? * 2.0)?, Pairs::Full)?;
/// assert!(key.intended(&input)?.deviation(&output)? < 1.0); // in standard errors
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Key {
    about: About,
    fingerprint: Fingerprint,
    /// The mean of the input's statistics, `(2 hidden)`: means, then deviations.
    input: Tensor,
    /// The examples, in units of the statistics' spreads and divided by these once more: `(examples, 2 hidden)`.
    directions: Tensor,
    /// `(examples, 2 hidden)`: to the output's means, then its variances.
    weights: Tensor,
    /// The mean of the output's statistics, `(2 hidden)`.
    output: Vec<f32>,
    /// What a prediction is off by, `(2 hidden)`.
    errors: Vec<f32>,
    insists: bool,
}

/// What its file says of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct About {
    format: u32,
    layer: usize,
    pairs: Pairs,
    strength: f64,
    mean_r2: f64,
    variance_r2: f64,
}

/// What is expected of one statistic of an output.
#[derive(Clone, Debug, PartialEq)]
pub struct Part {
    /// `(hidden)`
    pub values: Vec<f32>,
    /// Their standard errors, each above 0: the root mean square of what such expectations are off by for
    /// examples that are left out.
    pub errors: Vec<f32>,
    /// The share of its variance that is explained on held-out examples.
    pub r2: f64,
}

/// The statistics that an output is expected to have.
#[derive(Clone, Debug, PartialEq)]
pub struct Intended {
    /// The means of its channels.
    pub mean: Part,
    /// The variances of its pairs; at least 0.
    pub variance: Part,
}

impl Intended {
    /// How far an output is from this, in standard errors: their root mean square over the channels of those
    /// parts that explain anything, or of both if neither does.
    ///
    /// # Errors
    /// [`Error::Parameter`] for a summary of other pairs than [`Pairs::Full`], or of another width.
    pub fn deviation(&self, output: &Summary) -> Result<f64> {
        if output.pairs != Pairs::Full {
            let got = format!("{:?}", output.pairs);
            return Err(Error::parameter("output", "a summary of all pairs", got));
        }
        let both = [(&self.mean, &output.mean), (&self.variance, &output.variance)];
        let any = both.iter().any(|(part, _)| part.r2 > 0.0);
        let (mut squares, mut count) = (0.0, 0);
        for (part, values) in both.into_iter().filter(|(part, _)| !any || part.r2 > 0.0) {
            let variances: Vec<f32> = part.errors.iter().map(|it| it * it).collect();
            let apart = Distance::Mahalanobis(&variances).between(&part.values, values)?;
            squares += apart * apart;
            count += values.len();
        }
        Ok((squares / count.max(1) as f64).sqrt())
    }
}

impl Key {
    const FORMAT: u32 = 1;
    const ABOUT: &str = "key";

    /// Fits one to examples whose states all come from one layer of the model with this fingerprint.
    ///
    /// # Errors
    /// [`Error::Parameter`] for settings outside their ranges, too few examples, or states of different widths;
    /// [`Error::InText`] with the index of an example that is too short for its pairs, or not finite.
    pub fn fit(examples: &[Example], config: &KeyConfig, fingerprint: Fingerprint) -> Result<Self> {
        config.validate(examples.len())?;
        let data = Data::of(examples, &config.pairs)?;
        let hidden = data.output.dim(1)? / 2;
        if hidden != fingerprint.channels() {
            let expected = format!("states of the model's {} channels", fingerprint.channels());
            return Err(Error::parameter("examples", expected, hidden));
        }
        let (mean_r2, variance_r2) = data.held_out(config)?;
        let best = data.choose(config)?;
        let errors = best.left_out.sqr()?.mean(0)?.sqrt()?.mul(&best.y.spreads)?;
        let narrow = |xs: Tensor| xs.to_dtype(DType::F32);
        // above 0, as variances of a distance
        let errors = narrow(errors)?.to_vec1::<f32>()?.into_iter().map(|it| it.max(1e-12));
        let pairs = config.pairs.get(best.pairs).copied().unwrap_or(Pairs::Full);
        let (layer, strength) = (config.layer, best.strength);
        let about = About { format: Self::FORMAT, layer, pairs, strength, mean_r2, variance_r2 };
        Ok(Self {
            about,
            fingerprint,
            input: narrow(best.x.means)?,
            directions: narrow(best.x.values.broadcast_div(&best.x.spreads)?)?,
            weights: narrow(best.dual.broadcast_mul(&best.y.spreads)?)?,
            output: narrow(best.y.means)?.to_vec1()?,
            errors: errors.collect(),
            insists: false,
        })
    }

    /// Which model it is for.
    #[must_use]
    pub fn fingerprint(&self) -> &Fingerprint {
        &self.fingerprint
    }

    /// The layer whose states it is about.
    #[must_use]
    pub fn layer(&self) -> usize {
        self.about.layer
    }

    /// The pairs of the input that it looks at.
    #[must_use]
    pub fn pairs(&self) -> Pairs {
        self.about.pairs
    }

    /// The strength of its ridge.
    #[must_use]
    pub fn strength(&self) -> f64 {
        self.about.strength
    }

    /// The share of the variance of output means, over held-out examples, that it explains: 1 for all of it,
    /// 0 or less for nothing.
    #[must_use]
    pub fn mean_r2(&self) -> f64 {
        self.about.mean_r2
    }

    /// The same of output variances.
    #[must_use]
    pub fn variance_r2(&self) -> f64 {
        self.about.variance_r2
    }

    /// Whether it has nothing to say, and should rank nothing: it explains no held-out variance of either.
    #[must_use]
    pub fn declines(&self) -> bool {
        !(self.insists || self.about.mean_r2 > 0.0 || self.about.variance_r2 > 0.0)
    }

    /// The same key, which never declines.
    #[must_use]
    pub fn insist(mut self) -> Self {
        self.insists = true;
        self
    }

    /// What is expected of the output for an input of these statistics, whether the key declines or not.
    ///
    /// # Errors
    /// [`Error::Parameter`] for a summary of other pairs than [`Key::pairs`], or of another width.
    pub fn intended(&self, input: &Summary) -> Result<Intended> {
        if input.pairs != self.about.pairs {
            let (expected, got) = (format!("a summary of {:?}", self.about.pairs), input.pairs);
            return Err(Error::parameter("input", expected, format!("{got:?}")));
        }
        let hidden = self.output.len() / 2;
        if input.mean.len() != hidden || input.sd.len() != hidden {
            let expected = format!("{hidden} channels");
            return Err(Error::parameter("input", expected, input.mean.len()));
        }
        let own = Tensor::new([input.mean.as_slice(), input.sd.as_slice()].concat(), &Device::Cpu)?;
        let apart = (own - &self.input)?.unsqueeze(1)?; // (2 hidden, 1)
        let near = self.directions.matmul(&apart)?.t()?.contiguous()?; // (1, examples)
        let change = near.matmul(&self.weights)?.flatten_all()?.to_vec1::<f32>()?;
        let values: Vec<f32> = self.output.iter().zip(change).map(|(mean, by)| mean + by).collect();
        let part = |from: usize, r2: f64, least: f32| Part {
            values: values.iter().skip(from).take(hidden).map(|it| it.max(least)).collect(),
            errors: self.errors.iter().skip(from).take(hidden).copied().collect(),
            r2,
        };
        Ok(Intended {
            mean: part(0, self.about.mean_r2, f32::NEG_INFINITY),
            variance: part(hidden, self.about.variance_r2, 0.0),
        })
    }

    /// Writes it as a safetensors file, which appears whole or not at all.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let row = |values: &[f32]| Tensor::new(values, &Device::Cpu);
        let tensors = [
            ("directions", self.directions.clone()),
            ("errors", row(&self.errors)?),
            ("fingerprint", self.fingerprint.tensor()?),
            ("input", self.input.clone()),
            ("output", row(&self.output)?),
            ("weights", self.weights.clone()),
        ];
        file::save(path.as_ref(), (Self::ABOUT, &self.about), &tensors)
    }

    /// Reads one that was fitted on the model with this fingerprint.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Malformed`] for a file that is no key, or cut short; [`Error::MissingWeight`],
    /// [`Error::WeightShape`] and [`Error::WeightValue`] for one of its tensors; [`Error::Parameter`] for
    /// that of another model.
    pub fn load(path: impl AsRef<Path>, fingerprint: &Fingerprint) -> Result<Self> {
        let path = path.as_ref();
        let file = TensorFile::open(path)?;
        let no_key = || Error::malformed(path, "not a key: its metadata has none");
        let about = file.metadata(Self::ABOUT).ok_or_else(no_key)?;
        let about: About = serde_json::from_str(about)
            .map_err(|error| Error::malformed(path, format!("metadata: {error}")))?;
        if about.format != Self::FORMAT {
            let message = format!("format {} of a key: {} is read", about.format, Self::FORMAT);
            return Err(Error::malformed(path, message));
        }
        about.pairs.validate().map_err(|error| Error::malformed(path, error))?;
        let shape = |name: &str| {
            let found = file.tensors().find(|(it, _)| *it == name);
            found.map_or_else(Vec::new, |(_, shape)| shape.to_vec())
        };
        let tensor = |name: &str, shape: &[usize]| file.tensor(name, shape, &Device::Cpu);
        let channels = shape("fingerprint").first().copied().unwrap_or(0);
        let own = tensor("fingerprint", &[channels])?.to_vec1()?;
        let own = Fingerprint::from_numbers(own);
        fingerprint.check("key", &own)?;
        let (columns, examples) = (2 * channels, shape("weights").first().copied().unwrap_or(0));
        let key = Self {
            input: tensor("input", &[columns])?,
            directions: tensor("directions", &[examples, columns])?,
            weights: tensor("weights", &[examples, columns])?,
            output: tensor("output", &[columns])?.to_vec1()?,
            errors: tensor("errors", &[columns])?.to_vec1()?,
            about,
            fingerprint: own,
            insists: false,
        };
        match key.errors.iter().find(|it| **it <= 0.0) {
            Some(bad) => {
                Err(Error::malformed(path, format!("errors: expected more than 0, got {bad}")))
            }
            None => Ok(key),
        }
    }
}
