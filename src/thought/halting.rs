//! When to stop thinking before the last pass.

use candle_core::{DType, Tensor};
use serde::{Deserialize, Serialize};

use super::measure;
use super::readout::CausalReadout;
use super::trace::Halted;
use crate::error::{Error, Result};
use crate::kernels::log_softmax;
use crate::likelihood;
use crate::model::{Batch, flat};

/// A reason to stop thinking before the last pass: a sequence stops after the pass that
/// moved it by less than a tolerance, which is at least 0; 0 never stops it.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
#[non_exhaustive]
pub enum Halt {
    /// By drift: the relative change `‖z' - z‖ / ‖z‖`, averaged over the sequence's tokens. 0.03 is a
    /// good threshold.
    Drift(f64),
    /// By cosine distance: `1 - cos(z', z)`, averaged over the sequence's tokens, in `[0, 2]`.
    Cosine(f64),
    /// By what the model would say: the Kullback-Leibler divergence of the next-token distribution at
    /// the sequence's last token after the pass from the one before it, in nats, when the thoughts are
    /// read causally. Costs one such reading after every pass.
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

/// Which sequences still think. Each halts by itself: a batch is its sequences one by one.
pub(super) struct Halting<'a> {
    rules: &'a [Halt],
    batch: &'a Batch,
    halted: Vec<Option<Halted>>,
    /// The next-token distributions before the pass, as log-probabilities `(sequences, vocab)`.
    said: Option<Tensor>,
}

impl<'a> Halting<'a> {
    pub(super) fn new(rules: &'a [Halt], batch: &'a Batch) -> Self {
        Self { rules, batch, halted: vec![None; batch.sequences()], said: None }
    }

    pub(super) fn all_halted(&self) -> bool {
        self.halted.iter().all(Option::is_some)
    }

    /// Why each sequence stopped; the cap, if nothing stopped it before.
    pub(super) fn reasons(self) -> Vec<Halted> {
        self.halted.into_iter().map(|halted| halted.unwrap_or(Halted::Cap)).collect()
    }

    /// The mean over all tokens of the sequences that still think.
    pub(super) fn mean_of_active(&self, rows: &[Vec<f32>]) -> f64 {
        let active = self.halted.iter().zip(rows).filter(|(halted, _)| halted.is_none());
        measure::mean(active.flat_map(|(_, row)| row))
    }

    /// `refined`, but `z` in the sequences that have halted.
    pub(super) fn keep_halted(&self, refined: Tensor, z: &Tensor) -> Result<Tensor> {
        if self.halted.iter().all(Option::is_none) {
            return Ok(refined);
        }
        let thinks: Vec<f32> =
            self.halted.iter().map(|it| if it.is_none() { 1.0 } else { 0.0 }).collect();
        let thinks = self.batch.spread(&thinks, z.device())?.to_dtype(DType::U8)?; // (tokens, 1)
        let (new, old) = (flat(&refined)?, flat(z)?);
        let kept = thinks.broadcast_as(new.shape())?.where_cond(&new, &old)?;
        Ok(kept.reshape(z.shape())?)
    }

    /// Halts the sequences that this pass, from `before` to `after`, moved little enough.
    pub(super) fn update(
        &mut self,
        drift: &[Vec<f32>],
        before: &Tensor,
        after: &Tensor,
        readout: &CausalReadout<'_>,
    ) -> Result<()> {
        let (mut kl, lengths) = (None, self.batch.lengths());
        for rule in self.rules {
            let (moved, tolerance, reason) = match *rule {
                Halt::Drift(tolerance) => {
                    (drift.iter().map(measure::mean).collect(), tolerance, Halted::Drift)
                }
                Halt::Cosine(tolerance) => {
                    let cosine = measure::cosine(before, after, self.batch)?;
                    let distance = cosine.iter().map(|row| 1.0 - measure::mean(row));
                    (distance.collect(), tolerance, Halted::Cosine)
                }
                Halt::Kl(tolerance) => {
                    let moved = match &kl {
                        Some(kl) => Vec::clone(kl),
                        None => kl.insert(self.kl(before, after, readout)?).clone(),
                    };
                    (moved, tolerance, Halted::Kl)
                }
            };
            for ((halted, moved), tokens) in self.halted.iter_mut().zip(moved).zip(&lengths) {
                let moved = if *tokens == 0 { 0.0 } else { moved };
                // Rounding can make quantities negative that cannot be.
                if halted.is_none() && tolerance > 0.0 && moved < tolerance {
                    *halted = Some(reason);
                }
            }
        }
        Ok(())
    }

    /// The divergence of what each sequence would say after the pass from what it would have said
    /// before it.
    fn kl(
        &mut self,
        before: &Tensor,
        after: &Tensor,
        readout: &CausalReadout<'_>,
    ) -> Result<Vec<f64>> {
        let says = |z: &Tensor| log_softmax(&readout.last_logits(z)?);
        let old = match self.said.take() {
            Some(said) => said,
            None => says(before)?,
        };
        let new = says(after)?;
        let kl = likelihood::divergence(&old, &new)?; // (sequences)
        self.said = Some(new);
        Ok(kl.to_vec1::<f32>()?.into_iter().map(f64::from).collect())
    }
}
