//! Noise on thoughts and embeddings, from a seed.

use std::f64::consts::{PI, TAU};

use candle_core::{D, Tensor};
use rand::{RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use super::optimizer::check_ratio;
use super::rows::{directions, wide};
use super::{OpConfig, Refine, Step, is_default};
use crate::batch::Batch;
use crate::error::Result;

/// Noise on every row of thoughts, or of embeddings, `(.., hidden)`: `x + e`, or `x - e`, with `e` drawn anew for
/// each coordinate.
///
/// What is drawn depends on the seed, on the [candidate](Step::candidate), on the pass, and on a token's place in
/// its sequence: not on other sequences, and not on the number of threads. It is the same when a text is thought
/// about again. Gradients take it for a constant.
///
/// As an op it acts after each pass; [`Thinking::noise`](crate::Thinking::noise) takes it before the first. Noise
/// up to twice the spread of an embedding table leaves its nearest token what it was (measured on SmolLM2's; see
/// [`Codes`](super::Codes)).
///
/// ```
/// use candle_core::{Device, Tensor};
/// use hybrid_attention::model::Batch;
/// use hybrid_attention::refine::Noise;
///
/// # fn main() -> hybrid_attention::Result<()> {
/// let xs = Tensor::new(&[[3f32, 4.0], [0.0, 0.0]], &Device::Cpu)?;
/// let batch = Batch::one(2)?;
/// let noise = Noise::relative(0.1).seed(7);
/// let (first, second) = (noise.on(&xs, &batch, 0)?, noise.on(&xs, &batch, 1)?); // two candidates
/// assert_ne!(first.to_vec2::<f32>()?, second.to_vec2::<f32>()?);
///
/// // The other way by the same, and a row without a length stays where it is
/// let other = noise.subtract().on(&xs, &batch, 0)?;
/// let middle = ((&first + other)? / 2.0)?.to_vec2::<f32>()?;
/// assert!((middle[0][0] - 3.0).abs() < 1e-6 && middle[1] == [0.0, 0.0]);
/// # Ok(())
/// # }
/// ```
///
/// In `hybrid.json`, where all but the deviation may be left out: `{"op": "noise", "sd": 0.1, "of": "coordinate",
/// "shape": "gaussian", "subtract": false, "keep_norm": false, "seed": 0}`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Noise {
    sd: f64,
    #[serde(default, skip_serializing_if = "is_default")]
    of: Of,
    #[serde(default, skip_serializing_if = "is_default")]
    shape: Shape,
    #[serde(default, skip_serializing_if = "is_default")]
    subtract: bool,
    #[serde(default, skip_serializing_if = "is_default")]
    keep_norm: bool,
    #[serde(default, skip_serializing_if = "is_default")]
    seed: u64,
}

/// What the standard deviation is of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Of {
    #[default]
    Coordinate,
    Row,
    Length,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Shape {
    #[default]
    Gaussian,
    Uniform,
}

impl Noise {
    /// A standard deviation for every coordinate, in the units of the rows: in [0, 1e6]. 0 leaves them as
    /// they were.
    #[must_use]
    pub fn per_coordinate(sd: f64) -> Self {
        Self {
            sd,
            of: Of::Coordinate,
            shape: Shape::Gaussian,
            subtract: false,
            keep_norm: false,
            seed: 0,
        }
    }

    /// A standard deviation for a row as a whole: the root mean square of the noise's length, in the units of the
    /// rows, in [0, 1e6]. Each coordinate has its share, `sd / √hidden`.
    #[must_use]
    pub fn per_row(sd: f64) -> Self {
        Self { of: Of::Row, ..Self::per_coordinate(sd) }
    }

    /// The same as a share of each row's own length: at 1, the noise is about as long as the row. In [0, 1e6].
    #[must_use]
    pub fn relative(sd: f64) -> Self {
        Self { of: Of::Length, ..Self::per_coordinate(sd) }
    }

    /// Draws evenly between `-√3` and `√3` standard deviations. Default: from a normal distribution.
    #[must_use]
    pub fn uniform(mut self) -> Self {
        self.shape = Shape::Uniform;
        self
    }

    /// Takes the noise off instead of adding it. Default: adds it. The two are opposite steps from one row.
    #[must_use]
    pub fn subtract(mut self) -> Self {
        self.subtract = true;
        self
    }

    /// Gives every row the length that it had. Default: rows become longer, by a factor `√(1 + sd²)` for
    /// [`relative`](Self::relative) noise.
    #[must_use]
    pub fn keep_norm(mut self) -> Self {
        self.keep_norm = true;
        self
    }

    /// The seed. Default 0. Two ops with one seed draw the same.
    #[must_use]
    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = seed;
        self
    }

    /// Embeddings with the noise of a candidate, on every row: what it is before the first pass. `(.., hidden)` in
    /// and out, with a row for each token of `batch`.
    ///
    /// # Errors
    /// [`Error::Parameter`](crate::Error::Parameter) for a deviation outside its range, and rows that do not fit
    /// the batch.
    pub fn on(&self, xs: &Tensor, batch: &Batch, candidate: u64) -> Result<Tensor> {
        self.at(xs, batch, candidate, 0)
    }

    /// `moment` is 0 before the first pass, and one more than the index of a pass after it.
    fn at(&self, xs: &Tensor, batch: &Batch, candidate: u64, moment: u64) -> Result<Tensor> {
        self.validate()?;
        batch.check(xs)?;
        if self.sd == 0.0 || xs.elem_count() == 0 {
            return Ok(xs.clone());
        }
        let (rows, hidden) = (wide(xs)?, xs.dim(D::Minus1)?);
        let noise = self.draw(batch, hidden, [self.seed, candidate, moment]);
        let noise = Tensor::from_vec(noise, xs.shape(), xs.device())?.to_dtype(rows.dtype())?;
        let sign = if self.subtract { -1.0 } else { 1.0 };
        let noise = match self.of {
            Of::Coordinate => (noise * (sign * self.sd))?,
            Of::Row => (noise * (sign * self.sd / (hidden as f64).sqrt()))?,
            Of::Length => {
                let (_, lengths) = directions(&rows.detach())?; // (.., 1)
                let each = (lengths * (sign * self.sd / (hidden as f64).sqrt()))?;
                noise.broadcast_mul(&each)?
            }
        };
        let mut noised = (&rows + noise)?;
        if self.keep_norm {
            let ((_, before), (direction, _)) = (directions(&rows)?, directions(&noised)?);
            noised = direction.broadcast_mul(&before)?;
        }
        Ok(noised.to_dtype(xs.dtype())?)
    }

    /// Numbers of variance 1, `(tokens, hidden)`: a stream of its own for each token, so that it does not matter
    /// which thread draws them.
    fn draw(&self, batch: &Batch, hidden: usize, key: [u64; 3]) -> Vec<f32> {
        let mut seed = [0; 32];
        for (bytes, word) in seed.chunks_exact_mut(8).zip(key) {
            bytes.copy_from_slice(&word.to_le_bytes());
        }
        let places: Vec<u64> = batch.all_rows().flat_map(|rows| 0..rows.len() as u64).collect();
        let mut noise = vec![0f32; places.len() * hidden];
        noise.par_chunks_exact_mut(hidden).zip(places).for_each(|(row, place)| {
            let mut rng = ChaCha8Rng::from_seed(seed);
            rng.set_stream(place);
            match self.shape {
                Shape::Gaussian => row.chunks_mut(2).for_each(|two| gaussian(two, &mut rng)),
                Shape::Uniform => row.iter_mut().for_each(|one| *one = uniform(&mut rng)),
            }
        });
        noise
    }
}

/// Two numbers of a normal distribution at a time (Box & Muller 1958).
pub(crate) fn gaussian(two: &mut [f32], rng: &mut impl RngCore) {
    let length = (-2.0 * share(rng).ln()).sqrt();
    let angle = TAU * share(rng) - PI;
    for (one, value) in two.iter_mut().zip([angle.cos(), angle.sin()]) {
        *one = (length * value) as f32;
    }
}

/// Evenly between -√3 and √3.
fn uniform(rng: &mut impl RngCore) -> f32 {
    (3f64.sqrt() * (2.0 * share(rng) - 1.0)) as f32
}

/// More than 0, and less than 1.
fn share(rng: &mut impl RngCore) -> f64 {
    (f64::from(rng.next_u32()) + 0.5) / 2f64.powi(32)
}

impl Refine for Noise {
    fn refine(&self, xs: &Tensor, step: &Step<'_>) -> Result<Tensor> {
        self.at(xs, step.batch, step.candidate, (step.index as u64).saturating_add(1))
    }

    fn validate(&self) -> Result<()> {
        check_ratio("sd", self.sd)
    }

    fn to_config(&self) -> Option<OpConfig> {
        Some(OpConfig::Noise(self.clone()))
    }
}
