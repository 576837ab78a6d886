//! How the decoder would read some thoughts, for refinements, halting and traces.

use candle_core::{Tensor, Var};

use super::{EncodedBatch, ThoughtModel};
use crate::error::{Error, Result};
use crate::likelihood;
use crate::model::{Pass, Transformer, flat};
use crate::refine::{Codes, Readout};

/// Layers `a..n` over thoughts about a text, causally and without a cache, then the head.
#[derive(Debug)]
pub(super) struct CausalReadout<'a> {
    model: &'a ThoughtModel,
    /// The layer `a` that thoughts enter.
    entry: usize,
    text: &'a EncodedBatch,
}

/// The token that follows, and its weight in the loss of its sequence.
struct Target {
    row: usize,
    id: u32,
    weight: f32,
    sequence: usize,
}

impl<'a> CausalReadout<'a> {
    pub(super) fn new(model: &'a ThoughtModel, entry: usize, text: &'a EncodedBatch) -> Self {
        Self { model, entry, text }
    }

    /// The decoder's head.
    pub(super) fn transformer(&self) -> &Transformer {
        self.model.decoder()
    }

    /// The stream that leaves the last layer, in the shape of `z`.
    pub(super) fn hidden(&self, z: &Tensor) -> Result<Tensor> {
        let layers = self.entry..self.transformer().all_layers().end;
        self.transformer().forward(z, layers, Pass::Causal(&self.text.batch))
    }

    /// Logits after the last token of each sequence: `(sequences, vocab)`.
    pub(super) fn last_logits(&self, z: &Tensor) -> Result<Tensor> {
        let last = self.text.batch.all_rows().map(|rows| rows.end.saturating_sub(1) as u32);
        let last = Tensor::new(last.collect::<Vec<_>>(), z.device())?;
        self.transformer().logits(&flat(&self.hidden(z)?)?.index_select(&last, 0)?)
    }

    /// The loss of each sequence, `(sequences)`, from the stream that leaves the last layer; with its
    /// gradient in the shape of `hidden`, if wanted. Run by run, so that the logits of a whole text are
    /// never in memory.
    fn loss_of_hidden(&self, hidden: &Tensor, gradient: bool) -> Result<(Tensor, Option<Tensor>)> {
        let (device, rows) = (hidden.device(), flat(hidden)?);
        let mut losses = vec![0f64; self.text.batch.sequences()];
        let (targets, mut of_rows) = (self.targets(), Vec::new());
        let mut rest = targets.as_slice();
        for run in likelihood::runs(rows.dim(0)?) {
            let (these, later) = rest.split_at(rest.partition_point(|it| it.row < run.end));
            rest = later;
            let run_rows = Var::from_tensor(&rows.narrow(0, run.start, run.len())?.detach())?;
            let input = match gradient {
                true => run_rows.as_tensor().clone(),
                false => run_rows.as_detached_tensor(),
            };
            // A row that predicts nothing weighs nothing.
            let (mut ids, mut weights) = (vec![0; run.len()], vec![0f32; run.len()]);
            for target in these {
                if let (Some(id), Some(weight)) =
                    (ids.get_mut(target.row - run.start), weights.get_mut(target.row - run.start))
                {
                    (*id, *weight) = (target.id, target.weight);
                }
            }
            let logprobs = likelihood::of_targets(&self.transformer().logits(&input)?, &ids)?;
            let parts = (logprobs * Tensor::new(weights, device)?)?.neg()?; // (rows)
            let values = parts.to_vec1::<f32>()?;
            for target in these {
                let value = values.get(target.row - run.start).copied().unwrap_or(0.0);
                if let Some(loss) = losses.get_mut(target.sequence) {
                    *loss += f64::from(value);
                }
            }
            if gradient {
                let mut of = parts.sum_all()?.backward()?;
                of_rows.push(of.remove(&run_rows).ok_or_else(no_gradient)?.detach());
            }
        }
        let losses: Vec<f32> = losses.into_iter().map(|loss| loss as f32).collect();
        let gradient = match gradient {
            true => Some(Tensor::cat(&of_rows, 0)?.reshape(hidden.shape())?),
            false => None,
        };
        Ok((Tensor::new(losses, device)?, gradient))
    }

    /// The tokens that have another after them, in row order.
    fn targets(&self) -> Vec<Target> {
        let mut targets = Vec::new();
        for (sequence, rows) in self.text.batch.all_rows().enumerate() {
            let weight = 1.0 / rows.len().saturating_sub(1).max(1) as f32;
            let next = self.text.ids.iter().skip(rows.start + 1).take(rows.len().saturating_sub(1));
            let of_row = |(row, id): (usize, &u32)| Target { row, id: *id, weight, sequence };
            targets.extend((rows.start..).zip(next).map(of_row));
        }
        targets
    }
}

impl Readout for CausalReadout<'_> {
    fn logits(&self, z: &Tensor) -> Result<Tensor> {
        self.transformer().logits(&self.hidden(z)?)
    }

    fn loss(&self, z: &Tensor) -> Result<Tensor> {
        Ok(self.loss_of_hidden(&self.hidden(&z.detach())?, false)?.0)
    }

    /// Runs forward without a graph, keeping only what enters each layer; then backward through the
    /// layers one by one, each run again with a graph of its own.
    fn loss_and_gradient(&self, z: &Tensor) -> Result<(Tensor, Tensor)> {
        let batch = &self.text.batch;
        let run = |xs: &Tensor, layer: usize| {
            self.transformer().forward(xs, layer..layer + 1, Pass::Causal(batch))
        };
        let layers = self.entry..self.transformer().all_layers().end;
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
            // candle's gradients are tracked: the next layer's would lead back through this layer again
            gradient = pulled.backward()?.remove(&xs).ok_or_else(no_gradient)?.detach();
        }
        Ok((loss, gradient))
    }

    fn codes(&self) -> Result<&Codes> {
        self.model.codes()
    }
}

fn no_gradient() -> Error {
    Error::unsupported("gradient", "none reaches the thoughts")
}
