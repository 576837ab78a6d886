//! When to stop thinking before the last pass.

use candle_core::{D, DType, Tensor};
use candle_nn::ops::log_softmax;
use serde::{Deserialize, Serialize};

use super::measure;
use super::readout::CausalReadout;
use super::trace::Halted;
use crate::error::{Error, Result};
use crate::model::Layout;

/// A reason to stop thinking before the last pass: a row of the batch stops after the pass that
/// moved it by less than a tolerance, which is at least 0; 0 never stops it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
#[non_exhaustive]
pub enum Halt {
    /// By drift: the relative change `‖z' - z‖ / ‖z‖`, mean over the row's tokens. 0.03 is a good
    /// exit.
    Drift(f64),
    /// By cosine distance: `1 - cos(z', z)`, mean over the row's tokens, in `[0, 2]`.
    Cosine(f64),
    /// By what it would say: the Kullback-Leibler divergence of the next-token distribution at the
    /// row's last token after the pass from the one before it, in nats, when the thoughts are read
    /// causally. Costs such a reading after every pass.
    Kl(f64),
}

impl Halt {
    pub(super) fn validate(&self) -> Result<()> {
        let (Self::Drift(tolerance) | Self::Cosine(tolerance) | Self::Kl(tolerance)) = *self;
        if tolerance >= 0.0 && tolerance.is_finite() {
            return Ok(());
        }
        Err(Error::parameter("halt", "a tolerance of at least 0", format!("{self:?}")))
    }
}

/// Which rows of a batch still think. Each row halts by itself: a batch is its rows one by one.
pub(super) struct Halting<'a> {
    rules: &'a [Halt],
    layout: &'a Layout,
    halted: Vec<Option<Halted>>,
    /// The next-token distributions before the pass, as log-probabilities `(batch, vocab)`.
    said: Option<Tensor>,
}

impl<'a> Halting<'a> {
    pub(super) fn new(rules: &'a [Halt], layout: &'a Layout) -> Self {
        Self { rules, layout, halted: vec![None; layout.batch()], said: None }
    }

    pub(super) fn all_halted(&self) -> bool {
        self.halted.iter().all(Option::is_some)
    }

    /// Why each row stopped; the cap, if nothing stopped it before.
    pub(super) fn reasons(self) -> Vec<Halted> {
        self.halted.into_iter().map(|halted| halted.unwrap_or(Halted::Cap)).collect()
    }

    /// The mean over all tokens of the rows that still think.
    pub(super) fn mean_of_active(&self, rows: &[Vec<f32>]) -> f64 {
        let active = self.halted.iter().zip(rows).filter(|(halted, _)| halted.is_none());
        measure::mean(active.flat_map(|(_, row)| row))
    }

    /// `refined`, but `z` in the rows that have halted.
    pub(super) fn keep_halted(&self, refined: &Tensor, z: &Tensor) -> Result<Tensor> {
        if self.halted.iter().all(Option::is_none) {
            return Ok(refined.clone());
        }
        let thinks: Vec<u8> = self.halted.iter().map(|it| u8::from(it.is_none())).collect();
        let thinks = Tensor::new(thinks, z.device())?.reshape(((), 1, 1))?; // (batch, 1, 1)
        Ok(thinks.broadcast_as(z.shape())?.where_cond(refined, z)?)
    }

    /// Halts the rows that this pass, from `before` to `after`, moved little enough.
    pub(super) fn look(
        &mut self,
        drift: &[Vec<f32>],
        before: &Tensor,
        after: &Tensor,
        readout: &CausalReadout<'_>,
    ) -> Result<()> {
        for rule in self.rules {
            let (moved, tolerance, reason) = match *rule {
                Halt::Drift(tolerance) => {
                    (drift.iter().map(measure::mean).collect(), tolerance, Halted::Drift)
                }
                Halt::Cosine(tolerance) => {
                    let cosine = measure::cosine(before, after, self.layout)?;
                    let distance = cosine.iter().map(|row| 1.0 - measure::mean(row));
                    (distance.collect(), tolerance, Halted::Cosine)
                }
                Halt::Kl(tolerance) => (self.kl(before, after, readout)?, tolerance, Halted::Kl),
            };
            for (halted, moved) in self.halted.iter_mut().zip(moved) {
                if halted.is_none() && moved < tolerance {
                    *halted = Some(reason);
                }
            }
        }
        Ok(())
    }

    /// The divergence of what each row would say after the pass from what it would have said
    /// before it.
    fn kl(
        &mut self,
        before: &Tensor,
        after: &Tensor,
        readout: &CausalReadout<'_>,
    ) -> Result<Vec<f64>> {
        let says = |z: &Tensor| -> Result<Tensor> {
            Ok(log_softmax(&readout.last_logits(z)?.to_dtype(DType::F32)?, D::Minus1)?)
        };
        let old = match self.said.take() {
            Some(said) => said,
            None => says(before)?,
        };
        let new = says(after)?;
        let kl = (old.exp()? * (&old - &new)?)?.sum(D::Minus1)?; // (batch)
        self.said = Some(new);
        Ok(kl.to_vec1::<f32>()?.into_iter().map(f64::from).collect())
    }
}
