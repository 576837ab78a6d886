//! Fills a trace with what was asked for, beside the loop and without changing its thoughts.

use candle_core::{DType, Tensor};

use super::ThoughtLoop;
use super::measure::{self, PerToken};
use super::readout::CausalReadout;
use super::trace::{Detail, Map, Maps, TokenTrace};
use crate::error::Result;
use crate::kernels::log_softmax;
use crate::likelihood;
use crate::model::{Attended, Batch, ForwardContext, Pass, Tap, flat};
use crate::refine::cosines;

/// Looks at the thoughts after every pass, in as much detail as a [`Detail`] asks for.
pub(super) struct Recorder<'a> {
    mind: &'a ThoughtLoop,
    batch: &'a Batch,
    readout: &'a CausalReadout<'a>,
    /// The thoughts before any pass.
    first: &'a Tensor,
    /// What left the last layer when the latest thoughts were read causally.
    hidden: Option<Tensor>,
}

impl<'a> Recorder<'a> {
    pub(super) fn new(
        mind: &'a ThoughtLoop,
        batch: &'a Batch,
        readout: &'a CausalReadout<'a>,
        first: &'a Tensor,
    ) -> Self {
        Self { mind, batch, readout, first, hidden: None }
    }

    /// The thoughts `z` as numbers, compared with those of the previous call.
    pub(super) fn tokens(&mut self, z: &Tensor) -> Result<Option<TokenTrace>> {
        if self.mind.thinking.detail < Detail::Tokens {
            return Ok(None);
        }
        let hidden = self.readout.hidden(&z.detach())?;
        let before = self.hidden.replace(hidden.clone());
        let (entropy, kl) = self.distributions(before.as_ref().unwrap_or(&hidden), &hidden)?;
        Ok(Some(TokenTrace {
            cosine: measure::cosine(self.first, z, self.batch)?,
            norm: measure::norms(z, self.batch)?,
            entropy,
            kl,
        }))
    }

    /// Entropy of the next-token distributions after `after`, and their divergence from those after
    /// `before`.
    fn distributions(&self, before: &Tensor, after: &Tensor) -> Result<(PerToken, PerToken)> {
        let (before, after) = (flat(before)?, flat(after)?);
        let (mut entropies, mut divergences) = (Vec::new(), Vec::new());
        for run in likelihood::runs(self.batch.tokens()) {
            let says = |hidden: &Tensor| -> Result<Tensor> {
                let some = hidden.narrow(0, run.start, run.len())?;
                log_softmax(&self.readout.transformer().logits(&some)?) // (run, vocab)
            };
            let (old, new) = (says(&before)?, says(&after)?);
            entropies.extend(likelihood::entropy(&new)?.to_vec1::<f32>()?);
            divergences.extend(likelihood::divergence(&old, &new)?.to_vec1::<f32>()?);
        }
        let of = |values: &[f32]| measure::of_sequences(values, self.batch);
        Ok((of(&entropies), of(&divergences)))
    }

    /// Which thoughts were alike after a pass over `before`, and which saw which in it.
    pub(super) fn maps(&self, before: &Tensor, after: &Tensor) -> Result<Option<Maps>> {
        if self.mind.thinking.detail < Detail::Maps {
            return Ok(None);
        }
        let after = flat(&after.detach())?;
        let similarity = |rows: std::ops::Range<usize>| -> Result<Map> {
            if rows.is_empty() {
                return Ok(Map::new()); // candle cannot read an empty square
            }
            Ok(cosines(&after.narrow(0, rows.start, rows.len())?)?.to_vec2()?)
        };
        let similarity = self.batch.all_rows().map(similarity).collect::<Result<_>>()?;
        let mut shares = Shares { sequences: self.batch.sequences(), layers: Vec::new() };
        let pass = Pass::uncached(self.batch, self.mind.thinking.sight);
        let context = ForwardContext::from(pass).tap(&mut shares);
        self.mind.model.thinker().forward(&before.detach(), self.mind.span(), context)?;
        Ok(Some(Maps { similarity, attention: shares.layers }))
    }
}

/// The share of every token's attention that goes to every other, averaged over the heads: for each
/// layer, for each sequence.
struct Shares {
    sequences: usize,
    layers: Vec<Vec<Map>>,
}

impl Tap for Shares {
    fn attention(&mut self, _layer: usize, attended: &Attended<'_>) -> Result<()> {
        let map = |sequence: usize| -> Result<Map> {
            if attended.mask().keys(sequence).is_empty() {
                return Ok(Map::new());
            }
            Ok(attended.mean_weights(sequence)?.to_dtype(DType::F32)?.to_vec2()?)
        };
        self.layers.push((0..self.sequences).map(map).collect::<Result<_>>()?);
        Ok(())
    }
}
