//! What vectors of many texts have in common.

use std::path::Path;

use candle_core::{Device, Tensor};
use serde::{Deserialize, Serialize};

use super::file;
use super::principal::principal;
use super::rows::rows_of;
use super::solve::dot;
use super::{Fingerprint, Subspace};
use crate::error::{Error, Result};
use crate::load::TensorFile;
use crate::refine::Remove;

/// What is generic in the vectors of texts: their mean, and the directions in which they differ most around it.
///
/// The vectors are states that enter a layer, pooled over the tokens of each text, or what
/// [`embed`](crate::HybridModel::embed) makes of them by default. Two texts look alike for what all have in common;
/// [`remove`](Self::remove) takes it off (all but the top; Mu & Viswanath 2018). Whether that helps depends on the
/// model, the layer and the texts: [`hybrid memory eval --what generic`](crate::memory::evaluate::Generics) shows
/// it on your own, held out.
///
/// ```
/// # use candle_core::Device;
/// use hybrid_attention::statistics::{Generic, Subspace};
/// use hybrid_attention::{EmbedConfig, HybridModel};
///
/// # fn main() -> hybrid_attention::Result<()> {
/// let model = HybridModel::tiny(&Device::Cpu)?;
/// let texts = ["The coin is in the jar.", "Leo gave everything to Ida.", "The jar lay in the chest.", "Max has it."];
/// let generic = Generic::of(&model, &texts, 2)?; // of the states that enter layer 2
///
/// let others = model.embed(&["The urn is in the tray.", "Ida gave it to Max."],
///     &EmbedConfig::default().layer(2).normalize(false))?;
/// let explained = generic.explained(&others, &generic.subspace(2)?)?;
/// let by_chance = generic.explained(&others, &Subspace::random(128, 2, 0)?)?;
/// assert!(explained.mean > 0.5 && explained.directions > by_chance.directions);
///
/// let without = EmbedConfig::default().remove(generic.remove(2)?);
/// assert_eq!(model.embed(&["The coin is in the jar."], &without)?.dims(), [1, 128]);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq)]
pub struct Generic {
    about: About,
    fingerprint: Fingerprint,
    mean: Vec<f32>,
    directions: Vec<Vec<f32>>,
    variances: Vec<f32>,
}

/// What its file says of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct About {
    format: u32,
    layer: Option<usize>,
    texts: usize,
}

/// How much of some vectors is explained.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Explained {
    /// By the mean: the share of their squared length that is gone when it is taken off. 1 for all of it, 0 or less
    /// for nothing.
    pub mean: f64,
    /// By the directions: the share of their squared distance to the mean that lies along these, 0 to 1.
    pub directions: f64,
}

impl Generic {
    const FORMAT: u32 = 1;
    const ABOUT: &str = "generic";

    /// That of vectors, `(texts, hidden)`, which the model with this fingerprint has made: of the states that enter
    /// `layer`, or, for `None`, of those that [`embed`](crate::HybridModel::embed) pools by default, behind the final
    /// norm. A few hundred texts are enough. The time that directions take grows with the cube of their number, and of
    /// the width from there on; it is on one thread. Make them as vectors will be made that it is taken off:
    ///
    /// ```
    /// # use candle_core::Device;
    /// use hybrid_attention::statistics::{Fingerprint, Generic};
    /// use hybrid_attention::{EmbedConfig, HybridModel, Pooling};
    ///
    /// # fn main() -> hybrid_attention::Result<()> {
    /// let model = HybridModel::tiny(&Device::Cpu)?;
    /// let config = EmbedConfig::default().layer(1).pooling(Pooling::LastToken);
    /// let vectors = model.embed(&["The coin is in the jar", "The key is in the hat"], &config.clone().normalize(false))?;
    /// let generic = Generic::fit(&vectors, 1, Fingerprint::of(model.transformer())?)?;
    /// let config = config.remove(generic.remove(0)?); // the mean alone
    /// # model.embed(&["The cap is in the can"], &config)?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error::Parameter`] for vectors of another width than the model's, fewer than two, or all the same;
    /// [`Error::NotFinite`] with the row of one that is not finite.
    pub fn fit(
        vectors: &Tensor,
        layer: impl Into<Option<usize>>,
        fingerprint: Fingerprint,
    ) -> Result<Self> {
        let rows = rows_of(vectors, &mut Some(fingerprint.channels()), 2)?;
        let texts = rows.len();
        let mut mean = vec![0f64; fingerprint.channels()];
        for row in &rows {
            mean.iter_mut().zip(row).for_each(|(mean, it)| *mean += f64::from(*it));
        }
        mean.iter_mut().for_each(|it| *it /= texts as f64);
        let centred = rows.iter().map(|row| less(row, &mean)).collect();
        let mut found = principal(centred);
        found.truncate(Remove::MOST_DIRECTIONS);
        if found.is_empty() {
            return Err(Error::parameter("vectors", "at least two that differ", "all the same"));
        }
        let narrow = |row: &Vec<f64>| row.iter().map(|it| *it as f32).collect::<Vec<_>>();
        Ok(Self {
            about: About { format: Self::FORMAT, layer: layer.into(), texts },
            fingerprint,
            mean: narrow(&mean),
            directions: found.iter().map(|it| narrow(&it.direction)).collect(),
            variances: found.iter().map(|it| (it.square / (texts - 1) as f64) as f32).collect(),
        })
    }

    /// Which model it is for.
    #[must_use]
    pub fn fingerprint(&self) -> &Fingerprint {
        &self.fingerprint
    }

    /// The layer whose entering states it is of; `None` for what leaves the final norm.
    #[must_use]
    pub fn layer(&self) -> Option<usize> {
        self.about.layer
    }

    /// How many texts it was made of.
    #[must_use]
    pub fn texts(&self) -> usize {
        self.about.texts
    }

    /// The mean of their vectors, `hidden` numbers.
    #[must_use]
    pub fn mean(&self) -> &[f32] {
        &self.mean
    }

    /// The variance along each direction, the greatest first: at most one fewer than there were texts, no more than a
    /// vector has numbers, and no more than [`Remove::MOST_DIRECTIONS`]. Directions in which texts do not differ are
    /// left out.
    #[must_use]
    pub fn variances(&self) -> &[f32] {
        &self.variances
    }

    /// The first `k` directions.
    ///
    /// # Errors
    /// [`Error::Parameter`] for more than there are.
    pub fn subspace(&self, k: usize) -> Result<Subspace> {
        Ok(Subspace::of(self.first(k)?))
    }

    /// How much of other vectors, `(texts, hidden)`, its mean explains, and how much of the rest some directions:
    /// its own, or [others](Subspace::random) beside them.
    ///
    /// # Errors
    /// [`Error::Parameter`] for vectors or directions of another width, or no vectors; [`Error::NotFinite`].
    pub fn explained(&self, vectors: &Tensor, by: &Subspace) -> Result<Explained> {
        if by.width() != self.mean.len() {
            let expected = format!("directions of {} numbers", self.mean.len());
            return Err(Error::parameter("by", expected, by.width()));
        }
        let rows = rows_of(vectors, &mut Some(self.mean.len()), 1)?;
        let mean: Vec<f64> = self.mean.iter().map(|it| f64::from(*it)).collect();
        let nothing = vec![0.0; mean.len()];
        let (mut all, mut left, mut within) = (0.0, 0.0, 0.0);
        for row in &rows {
            let (whole, centred) = (less(row, &nothing), less(row, &mean));
            all += dot(&whole, &whole);
            left += dot(&centred, &centred);
            within += by.square_within(&centred);
        }
        let share = |of: f64, whole: f64| if whole > 0.0 { of / whole } else { 0.0 };
        Ok(Explained { mean: share(all - left, all), directions: share(within, left) })
    }

    /// Takes the mean and the first `k` directions out of vectors: for [`EmbedConfig::remove`], and for thoughts as
    /// an op of a refinement. For 0 it takes the mean alone; see [`Remove::keep_mean`].
    ///
    /// # Errors
    /// [`Error::Parameter`] for more directions than there are.
    ///
    /// [`EmbedConfig::remove`]: crate::EmbedConfig::remove
    pub fn remove(&self, k: usize) -> Result<Remove> {
        self.removing(self.first(k)?.to_vec())
    }

    /// Takes the mean out, and other directions than its own: the control.
    ///
    /// # Errors
    /// [`Error::Parameter`] for directions of another width.
    pub fn remove_others(&self, directions: &Subspace) -> Result<Remove> {
        self.removing(directions.directions())
    }

    fn removing(&self, directions: Vec<Vec<f32>>) -> Result<Remove> {
        let remove = Remove::new(Some(self.mean.clone()), directions)?;
        Ok(remove.made_by(self.about.layer, self.fingerprint.numbers()))
    }

    fn first(&self, k: usize) -> Result<&[Vec<f32>]> {
        let most = self.directions.len();
        self.directions
            .get(..k)
            .ok_or_else(|| Error::parameter("k", format!("at most {most} directions"), k))
    }

    /// Writes it as a safetensors file, which appears whole or not at all.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn save(&self, path: impl AsRef<Path>) -> Result<()> {
        let row = |values: &[f32]| Tensor::new(values, &Device::Cpu);
        let tensors = [
            ("directions", Tensor::new(self.directions.clone(), &Device::Cpu)?),
            ("fingerprint", self.fingerprint.tensor()?),
            ("mean", row(&self.mean)?),
            ("variances", row(&self.variances)?),
        ];
        file::save(path.as_ref(), (Self::ABOUT, &self.about), &tensors)
    }

    /// Reads one that was made with the model of this fingerprint.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Malformed`] for a file that is none, or cut short; [`Error::MissingWeight`],
    /// [`Error::WeightShape`] and [`Error::WeightValue`] for one of its tensors; [`Error::Parameter`] for that of
    /// another model.
    pub fn load(path: impl AsRef<Path>, fingerprint: &Fingerprint) -> Result<Self> {
        let path = path.as_ref();
        let file = TensorFile::open(path)?;
        let none = || Error::malformed(path, "nothing generic: its metadata says nothing of it");
        let about = file.metadata(Self::ABOUT).ok_or_else(none)?;
        let about: About = serde_json::from_str(about)
            .map_err(|error| Error::malformed(path, format!("metadata: {error}")))?;
        if about.format != Self::FORMAT {
            let message = format!("format {} of a generic: {} is read", about.format, Self::FORMAT);
            return Err(Error::malformed(path, message));
        }
        let rows = |name: &str| {
            let found = file.tensors().find(|(it, _)| *it == name);
            found.and_then(|(_, shape)| shape.first().copied()).unwrap_or(0)
        };
        let tensor = |name: &str, shape: &[usize]| file.tensor(name, shape, &Device::Cpu);
        let (channels, count) = (rows("fingerprint"), rows("directions"));
        let own = Fingerprint::from_numbers(tensor("fingerprint", &[channels])?.to_vec1()?);
        fingerprint.check("generic", &own)?;
        let generic = Self {
            mean: tensor("mean", &[channels])?.to_vec1()?,
            directions: tensor("directions", &[count, channels])?.to_vec2()?,
            variances: tensor("variances", &[count])?.to_vec1()?,
            about,
            fingerprint: own,
        };
        generic.remove(count).map_err(|error| Error::malformed(path, error))?;
        match generic.variances.iter().find(|it| **it <= 0.0) {
            Some(bad) => {
                Err(Error::malformed(path, format!("variances: expected more than 0, got {bad}")))
            }
            None => Ok(generic),
        }
    }
}

fn less(row: &[f32], mean: &[f64]) -> Vec<f64> {
    row.iter().zip(mean).map(|(it, mean)| f64::from(*it) - mean).collect()
}
