//! How the decoder would read some thoughts, for refinements, halting and traces.

use candle_core::{D, DType, Tensor, Var};
use candle_nn::ops::log_softmax;

use super::Text;
use crate::error::{Error, Result};
use crate::model::{Pass, Transformer};
use crate::refine::Readout;

/// Positions whose logits stand in memory at a time.
pub(crate) const LOGITS_AT_ONCE: usize = 64;

/// Layers `a..n` over thoughts about a text, causally and without a cache, then the head.
#[derive(Debug)]
pub(super) struct CausalReadout<'a> {
    transformer: &'a Transformer,
    /// The layer `a` that thoughts enter.
    entry: usize,
    text: &'a Text,
}

impl<'a> CausalReadout<'a> {
    pub(super) fn new(transformer: &'a Transformer, entry: usize, text: &'a Text) -> Self {
        Self { transformer, entry, text }
    }

    /// The stream that leaves the last layer, `(batch, seq, hidden)`.
    pub(super) fn hidden(&self, z: &Tensor) -> Result<Tensor> {
        let layers = self.entry..self.transformer.all_layers().end;
        self.transformer.forward(z, layers, Pass::Causal(&self.text.layout))
    }

    /// Scores after the last token of each row: `(batch, vocab)`.
    pub(super) fn last_logits(&self, z: &Tensor) -> Result<Tensor> {
        let last = self.hidden(z)?.narrow(1, self.text.layout.seq() - 1, 1)?;
        Ok(self.transformer.logits(&last)?.squeeze(1)?)
    }

    /// The loss of each row, `(batch)`, from the stream that leaves the last layer; with its
    /// gradient in the shape of `hidden`, if wanted. Block by block, so that the scores of a whole
    /// text never stand in memory.
    fn loss_of_hidden(&self, hidden: &Tensor, gradient: bool) -> Result<(Tensor, Option<Tensor>)> {
        let (batch, seq, _) = hidden.dims3()?;
        let device = hidden.device();
        let (targets, weights) = self.targets();
        let mut loss = Tensor::zeros(batch, DType::F32, device)?;
        let mut gradients = Vec::new();
        for from in (0..seq).step_by(LOGITS_AT_ONCE) {
            let count = LOGITS_AT_ONCE.min(seq - from);
            let block = |rows: &[Vec<u32>]| {
                rows.iter().flat_map(|row| row[from..from + count].to_vec()).collect::<Vec<_>>()
            };
            let target = Tensor::from_vec(block(&targets), (batch, count, 1), device)?;
            let weight: Vec<f32> =
                weights.iter().flat_map(|row| row[from..from + count].to_vec()).collect();
            let weight = Tensor::from_vec(weight, (batch, count), device)?;
            let hidden = Var::from_tensor(&hidden.narrow(1, from, count)?.detach())?;
            let input =
                if gradient { hidden.as_tensor().clone() } else { hidden.as_detached_tensor() };
            let logits = self.transformer.logits(&input)?.to_dtype(DType::F32)?;
            let logprobs =
                log_softmax(&logits, D::Minus1)?.gather(&target, D::Minus1)?.squeeze(D::Minus1)?;
            let losses = (logprobs * weight)?.neg()?.sum(D::Minus1)?; // (batch)
            if gradient {
                let mut of = losses.sum_all()?.backward()?;
                gradients.push(of.remove(&hidden).ok_or_else(no_gradient)?.detach());
            }
            loss = (loss + losses.detach())?;
        }
        let gradient = if gradient { Some(Tensor::cat(&gradients, 1)?) } else { None };
        Ok((loss, gradient))
    }

    /// For each slot the token that should follow, and its share of the row's mean: 0 for padding
    /// and for the last token.
    fn targets(&self) -> (Vec<Vec<u32>>, Vec<Vec<f32>>) {
        let layout = &self.text.layout;
        let seq = layout.seq();
        let mut targets = Vec::with_capacity(layout.batch());
        let mut weights = Vec::with_capacity(layout.batch());
        for (ids, start) in self.text.ids.chunks(seq.max(1)).zip(layout.starts()) {
            let predicted = seq.saturating_sub(start + 1);
            let mut next: Vec<u32> = ids.iter().skip(1).copied().collect();
            next.resize(seq, 0);
            targets.push(next);
            let share = 1.0 / predicted.max(1) as f32;
            let weight = |slot| if slot >= start && slot + 1 < seq { share } else { 0.0 };
            weights.push((0..seq).map(weight).collect());
        }
        (targets, weights)
    }
}

impl Readout for CausalReadout<'_> {
    fn logits(&self, z: &Tensor) -> Result<Tensor> {
        self.transformer.logits(&self.hidden(z)?)
    }

    fn loss(&self, z: &Tensor) -> Result<Tensor> {
        Ok(self.loss_of_hidden(&self.hidden(&z.detach())?, false)?.0)
    }

    /// Forwards without a graph, keeping only what enters each layer; then back through the layers
    /// one by one, each run again with a graph of its own.
    fn loss_and_gradient(&self, z: &Tensor) -> Result<(Tensor, Tensor)> {
        let layout = &self.text.layout;
        let run = |xs: &Tensor, layer: usize| {
            self.transformer.forward(xs, layer..layer + 1, Pass::Causal(layout))
        };
        let layers = self.entry..self.transformer.all_layers().end;
        let mut entering = Vec::with_capacity(layers.len());
        let mut xs = z.detach();
        for layer in layers.clone() {
            entering.push(xs.clone());
            xs = run(&xs, layer)?;
        }
        let (loss, gradient) = self.loss_of_hidden(&xs, true)?;
        let mut gradient = gradient.ok_or_else(no_gradient)?;
        for (layer, xs) in layers.zip(entering).rev() {
            let xs = Var::from_tensor(&xs)?;
            let pulled = (run(&xs, layer)? * gradient)?.sum_all()?;
            // candle's gradients are tracked: the next layer's would lead back through this one again
            gradient = pulled.backward()?.remove(&xs).ok_or_else(no_gradient)?.detach();
        }
        Ok((loss, gradient))
    }
}

fn no_gradient() -> Error {
    Error::unsupported("gradient", "none reaches the thoughts")
}
