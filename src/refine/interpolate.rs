//! Damped interpolation between the old thoughts and what the pass made of them.

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use super::{OpConfig, Refine, Step};
use crate::error::{Error, Result};

/// `z' = z + w · (h - z)`.
///
/// Undamped (`w = 1`) repetition of the whole stack ruins a pretrained model; `w = 1 / passes` over
/// a few middle layers is the one setting with gains on record that needs no training.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Interpolate {
    /// `None`: one over the number of passes.
    weight: Option<f64>,
}

impl Interpolate {
    /// A fixed share `weight` of the new state, in `[0, 1]`. 0 leaves the thoughts as they were,
    /// 1 takes the new state whole.
    #[must_use]
    pub fn new(weight: f64) -> Self {
        Self { weight: Some(weight) }
    }

    /// `w = 1 / passes`, so that all passes together go about as far as one undamped one.
    #[must_use]
    pub fn damped() -> Self {
        Self { weight: None }
    }
}

impl Refine for Interpolate {
    fn refine(&self, xs: &Tensor, step: &Step<'_>) -> Result<Tensor> {
        let weight = self.weight.unwrap_or(1.0 / step.passes.max(1) as f64);
        Ok((step.z + ((xs - step.z)? * weight)?)?)
    }

    fn validate(&self) -> Result<()> {
        match self.weight {
            Some(weight) if !(0.0..=1.0).contains(&weight) => {
                Err(Error::parameter("weight", "a share in [0, 1]", weight))
            }
            _ => Ok(()),
        }
    }

    fn to_config(&self) -> Option<OpConfig> {
        Some(OpConfig::Interpolate(*self))
    }
}
