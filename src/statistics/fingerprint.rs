//! Which model some numbers come from.

use candle_core::{DType, Device, Tensor};

use super::states;
use crate::error::{Error, Result};
use crate::fingerprint;
use crate::model::Transformer;

/// What a model makes of a few fixed tokens, by which numbers that were made with it know it again.
#[derive(Clone, Debug, PartialEq)]
pub struct Fingerprint(Vec<f32>);

impl Fingerprint {
    const TOKENS: u64 = 16;

    /// Of a model: one short pass through all of its layers.
    ///
    /// # Errors
    /// As [`Transformer::forward`].
    pub fn of(model: &Transformer) -> Result<Self> {
        let vocab = model.config().vocab_size.max(1) as u64;
        // spread over the vocabulary
        let ids: Vec<u32> =
            (1..=Self::TOKENS).map(|at| (at * 2_654_435_761 % vocab) as u32).collect();
        let h = states(model, &ids, model.all_layers().end)?;
        let last = h.narrow(0, ids.len() - 1, 1)?.flatten_all()?;
        Ok(Self(last.to_device(&Device::Cpu)?.to_dtype(DType::F32)?.to_vec1()?))
    }

    pub(super) fn channels(&self) -> usize {
        self.0.len()
    }

    pub(crate) fn numbers(&self) -> &[f32] {
        &self.0
    }

    pub(crate) fn from_numbers(numbers: Vec<f32>) -> Self {
        Self(numbers)
    }

    pub(super) fn tensor(&self) -> Result<Tensor> {
        Ok(Tensor::new(self.0.as_slice(), &Device::Cpu)?)
    }

    /// Refuses that of another model.
    ///
    /// # Errors
    /// [`Error::Parameter`] with the name `what`.
    pub fn check(&self, what: &'static str, other: &Self) -> Result<()> {
        let same = fingerprint::check(&other.0, &self.0, "states");
        same.map_err(|got| Error::parameter(what, "one of this model", got))
    }
}
