//! What is generic, taken out of rows.

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use super::rows::wide;
use super::{OpConfig, Refine, Step};
use crate::error::{Error, Result};

/// Takes a mean `μ`, and then all that lies along some directions `V`, out of every row: with `c = x - μ`, what is left
/// is `c - Vᵀ V c` (all but the top; Mu & Viswanath 2018). [`Generic::remove`] makes one, for
/// [`EmbedConfig::remove`] and as an op of a refinement; [`Remove::default`] takes nothing out.
///
/// What is left is at right angles to the directions, so that taking these out a second time changes nothing. A mean
/// is taken off as often as this is done: with several passes, [`keep_mean`](Self::keep_mean).
///
/// An op sees thoughts and no model: it refuses those of another width, and cannot tell whether they are of the
/// layer that the directions were found in. What leaves a span `a..b` are states that enter layer `b`.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use hybrid_attention::refine::Remove;
///
/// # fn main() -> hybrid_attention::Result<()> {
/// let remove = Remove::new(Some(vec![1.0, 1.0, 1.0]), vec![vec![0.0, 0.6, 0.8]])?;
/// let rows = Tensor::new(&[[3f32, 4.0, 5.0]], &Device::Cpu)?; // 2 3 4 without the mean, of which 0 3 4 goes
/// let left = remove.apply(&rows)?.to_vec2::<f32>()?;
/// assert!(left[0].iter().zip([2.0, 0.0, 0.0]).all(|(a, b)| (a - b).abs() < 1e-6));
/// # Ok(())
/// # }
/// ```
///
/// In `hybrid.json`: `{"op": "remove", "directions": [[0.0, 0.6, 0.8]]}`, and `"mean"` if there is one.
///
/// [`Generic::remove`]: crate::statistics::Generic::remove
/// [`EmbedConfig::remove`]: crate::EmbedConfig::remove
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "Spelled")]
pub struct Remove {
    #[serde(skip_serializing_if = "Option::is_none")]
    mean: Option<Vec<f32>>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    directions: Vec<Vec<f32>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    layer: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    fingerprint: Option<Vec<f32>>,
}

/// The same, which may be anything.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Spelled {
    mean: Option<Vec<f32>>,
    #[serde(default)]
    directions: Vec<Vec<f32>>,
    layer: Option<usize>,
    fingerprint: Option<Vec<f32>>,
}

impl TryFrom<Spelled> for Remove {
    type Error = Error;

    fn try_from(spelled: Spelled) -> Result<Self> {
        let Spelled { mean, directions, layer, fingerprint } = spelled;
        Ok(Self { layer, fingerprint, ..Self::new(mean, directions)? })
    }
}

impl Remove {
    /// The most directions of one.
    pub const MOST_DIRECTIONS: usize = 256;

    /// How far the product of two directions may be from 0, and that of one with itself from 1.
    const ROUNDING: f64 = 1e-4;

    /// Takes out a mean, if there is one, and directions, if there are any: rows of length 1 at right angles to each
    /// other.
    ///
    /// # Errors
    /// [`Error::Parameter`] for numbers that are not finite, rows of different widths, more than
    /// [`MOST_DIRECTIONS`](Self::MOST_DIRECTIONS), and directions that are not of length 1 or not at right angles.
    pub fn new(mean: Option<Vec<f32>>, directions: Vec<Vec<f32>>) -> Result<Self> {
        let mut all = mean.iter().chain(&directions);
        let width = all.clone().next().map_or(0, Vec::len);
        if let Some(row) = all.find(|row| row.is_empty() || row.len() != width) {
            let expected = format!("{} numbers in each row", width.max(1));
            return Err(Error::parameter("directions", expected, row.len()));
        }
        let mut numbers = mean.iter().chain(&directions).flatten();
        if let Some(bad) = numbers.find(|it| !it.is_finite()) {
            return Err(Error::parameter("directions", "finite numbers, as in the mean", bad));
        }
        if directions.len() > width.min(Self::MOST_DIRECTIONS) {
            let expected = format!("at most {} directions", width.min(Self::MOST_DIRECTIONS));
            return Err(Error::parameter("directions", expected, directions.len()));
        }
        for (i, a) in directions.iter().enumerate() {
            for (j, b) in directions.iter().enumerate().take(i + 1) {
                let product: f64 =
                    a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum();
                let right = f64::from(u8::from(i == j));
                if (product - right).abs() > Self::ROUNDING {
                    let expected = format!("{right} as the product of rows {j} and {i}");
                    return Err(Error::parameter("directions", expected, product));
                }
            }
        }
        Ok(Self { mean, directions, layer: None, fingerprint: None })
    }

    /// Whose they are: see [`layer`](Self::layer).
    pub(crate) fn made_by(mut self, layer: Option<usize>, fingerprint: &[f32]) -> Self {
        (self.layer, self.fingerprint) = (layer, Some(fingerprint.to_vec()));
        self
    }

    /// The same, which leaves the mean in: rows become `x - Vᵀ V x`.
    #[must_use]
    pub fn keep_mean(mut self) -> Self {
        self.mean = None;
        self
    }

    /// The layer whose entering states it was made for; `None` for what leaves the final norm.
    #[must_use]
    pub fn layer(&self) -> Option<usize> {
        self.layer
    }

    /// Numbers of the rows that it is for; `None` where it takes nothing out.
    #[must_use]
    pub fn width(&self) -> Option<usize> {
        self.mean.iter().chain(&self.directions).map(Vec::len).next()
    }

    /// What the model makes of something fixed that it was made for, where that is known.
    pub(crate) fn fingerprint(&self) -> Option<&[f32]> {
        self.fingerprint.as_deref()
    }

    /// What is left of rows, `(.., hidden)` in and out. If nothing is to be taken out, they are the same.
    ///
    /// # Errors
    /// [`Error::Parameter`] for rows of another width; when a device fails.
    pub fn apply(&self, rows: &Tensor) -> Result<Tensor> {
        let Some(width) = self.width() else { return Ok(rows.clone()) };
        if rows.dims().last() != Some(&width) {
            let expected = format!("rows of {width} numbers");
            return Err(Error::parameter("rows", expected, format!("{:?}", rows.dims())));
        }
        if rows.elem_count() == 0 {
            return Ok(rows.clone());
        }
        let mut left = wide(rows)?;
        let (dtype, device) = (left.dtype(), rows.device());
        if let Some(mean) = &self.mean {
            left = left.broadcast_sub(&Tensor::new(mean.as_slice(), device)?.to_dtype(dtype)?)?;
        }
        if !self.directions.is_empty() {
            let directions = Tensor::new(self.directions.clone(), device)?.to_dtype(dtype)?; // (k, hidden)
            let flat = left.reshape(((), width))?; // (rows, hidden)
            let along = flat.matmul(&directions.t()?)?; // (rows, k)
            left = (flat - along.matmul(&directions)?)?.reshape(rows.shape())?;
        }
        Ok(left.to_dtype(rows.dtype())?)
    }
}

impl Refine for Remove {
    fn refine(&self, xs: &Tensor, step: &Step<'_>) -> Result<Tensor> {
        step.batch.check(xs)?;
        self.apply(xs)
    }

    fn to_config(&self) -> Option<OpConfig> {
        Some(OpConfig::Remove(self.clone()))
    }
}
