//! Fills a trace with what was asked for, beside the loop and without touching its thoughts.

use std::ops::Range;

use candle_core::{D, DType, Tensor};
use candle_nn::ops::log_softmax;

use super::measure::{self, PerToken};
use super::readout::{CausalReadout, LOGITS_AT_ONCE};
use super::trace::{Detail, Map, Maps, TokenTrace};
use crate::error::Result;
use crate::model::{Layout, Sight, Transformer};

/// Looks at the thoughts after every pass, as closely as a [`Detail`] asks.
pub(super) struct Recorder<'a> {
    pub(super) detail: Detail,
    pub(super) transformer: &'a Transformer,
    pub(super) span: Range<usize>,
    pub(super) sight: Sight,
    pub(super) layout: &'a Layout,
    pub(super) readout: &'a CausalReadout<'a>,
    /// The thoughts before any pass.
    pub(super) first: &'a Tensor,
    /// What left the last layer when the latest thoughts were read causally.
    pub(super) hidden: Option<Tensor>,
}

impl Recorder<'_> {
    /// The thoughts `z` in numbers, compared with those of the call before.
    pub(super) fn tokens(&mut self, z: &Tensor) -> Result<Option<TokenTrace>> {
        if self.detail < Detail::Tokens {
            return Ok(None);
        }
        let hidden = self.readout.hidden(&z.detach())?;
        let before = self.hidden.replace(hidden.clone());
        let (entropy, kl) = self.distributions(before.as_ref().unwrap_or(&hidden), &hidden)?;
        Ok(Some(TokenTrace {
            cosine: measure::cosine(self.first, z, self.layout)?,
            norm: measure::norms(z, self.layout)?,
            entropy,
            kl,
        }))
    }

    /// Entropy of the next-token distributions after `after`, and their divergence from those after
    /// `before`, in blocks: the scores of a whole text never stand in memory.
    fn distributions(&self, before: &Tensor, after: &Tensor) -> Result<(PerToken, PerToken)> {
        let seq = self.layout.seq();
        let (mut entropies, mut divergences) = (Vec::new(), Vec::new());
        for from in (0..seq).step_by(LOGITS_AT_ONCE) {
            let says = |hidden: &Tensor| -> Result<Tensor> {
                let some = hidden.narrow(1, from, LOGITS_AT_ONCE.min(seq - from))?;
                let logits = self.transformer.logits(&some)?.to_dtype(DType::F32)?;
                Ok(log_softmax(&logits, D::Minus1)?) // (batch, some, vocab)
            };
            let (old, new) = (says(before)?, says(after)?);
            entropies.push((new.exp()? * &new)?.sum(D::Minus1)?.neg()?);
            divergences.push((old.exp()? * (&old - &new)?)?.sum(D::Minus1)?);
        }
        let (entropy, kl) = (Tensor::cat(&entropies, 1)?, Tensor::cat(&divergences, 1)?);
        Ok((measure::of_tokens(&entropy, self.layout)?, measure::of_tokens(&kl, self.layout)?))
    }

    /// Who was like whom after a pass over `before`, and who saw whom in it.
    pub(super) fn maps(&self, before: &Tensor, after: &Tensor) -> Result<Option<Maps>> {
        if self.detail < Detail::Maps {
            return Ok(None);
        }
        let (span, layout) = (self.span.clone(), self.layout);
        let attention = self.transformer.thinker().attention_shares(
            &before.detach(),
            span,
            layout,
            self.sight,
        )?;
        Ok(Some(Maps {
            similarity: self.of_rows(&measure::similarity(after)?)?,
            attention: attention.iter().map(|it| self.of_rows(it)).collect::<Result<_>>()?,
        }))
    }

    /// Squares `(batch, seq, seq)` as numbers, without padding.
    fn of_rows(&self, squares: &Tensor) -> Result<Vec<Map>> {
        let row = |(index, start): (usize, usize)| -> Result<Map> {
            let tokens = self.layout.seq() - start;
            if tokens == 0 {
                return Ok(Map::new()); // candle cannot read a square of none
            }
            let square = squares.get(index)?.narrow(0, start, tokens)?.narrow(1, start, tokens)?;
            Ok(square.to_dtype(DType::F32)?.to_vec2()?)
        };
        self.layout.starts().into_iter().enumerate().map(row).collect()
    }
}
