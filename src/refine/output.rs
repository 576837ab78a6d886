//! A nudge of what the decoder says rather than of what it reads.

use candle_core::{D, DType, Tensor, Var};
use serde::{Deserialize, Serialize};

use super::optimizer::{Adam, check_ratio, check_steps};
use crate::error::{Error, Result};
use crate::likelihood;

/// One vector, fitted to the prompt, that is added to every final hidden state before the head
/// (SLOT, arXiv 2505.12392).
///
/// The vector δ begins at zero and takes a few steps of AdamW (with the ε = 1e-5 and the weight decay of
/// 1e-8 of the paper's code) on the prompt's own next-token loss; then it is used for every generated
/// token. The layers run once and only the head is run again, so a step is cheap. Unlike in the paper,
/// the δ of the lowest loss is kept, zero included, so the loss of the prompt never rises. It is not a
/// [`Refine`](super::Refine) op: it changes no thoughts.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use hybrid_attention::model::Linear;
/// use hybrid_attention::refine::OutputNudge;
/// # fn main() -> hybrid_attention::Result<()> {
/// let head = Linear::dense(&Tensor::new(&[[1f32, 0.0], [0.0, 1.0]], &Device::Cpu)?)?;
/// let normed = Tensor::new(&[[1f32, 0.0], [1.0, 0.0]], &Device::Cpu)?; // says token 0
/// let nudge = OutputNudge::new(3);
/// let delta = nudge.fit(&normed, &[0, 1], &|xs| head.forward(xs))?; // 1 followed
/// let scores = head.forward(&normed.broadcast_add(&delta)?)?.to_vec2::<f32>()?;
/// assert!(scores[1][1] > 0.0); // it is likelier now
/// # Ok(())
/// # }
/// ```
///
/// Serialised as `{"steps": 3, "learning_rate": 0.01}`, where the rate may be left out.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OutputNudge {
    steps: usize,
    #[serde(default = "default_learning_rate")]
    learning_rate: f64,
}

fn default_learning_rate() -> f64 {
    0.01
}

impl OutputNudge {
    const EPSILON: f64 = 1e-5;
    const WEIGHT_DECAY: f64 = 1e-8;

    /// This many steps, up to 1000; the paper uses 3 to 5. 0 leaves the vector at zero.
    #[must_use]
    pub fn new(steps: usize) -> Self {
        Self { steps, learning_rate: default_learning_rate() }
    }

    /// What it costs in readings of the text, if one of its head alone counts as much.
    pub(crate) fn reads(&self) -> usize {
        self.steps.saturating_add(1)
    }

    /// About how far a step moves each channel: in [0, 1e6]. Default 0.01. Channels of a final
    /// hidden state are about the size of the final norm's weights.
    #[must_use]
    pub fn learning_rate(mut self, learning_rate: f64) -> Self {
        self.learning_rate = learning_rate;
        self
    }

    /// Checks the parameters.
    ///
    /// # Errors
    /// [`Error::Parameter`] for one outside its range.
    pub fn validate(&self) -> Result<()> {
        check_steps(self.steps)?;
        check_ratio("learning_rate", self.learning_rate)
    }

    /// The vector for a text, `(1, hidden)` in the type of `normed`, to be added to the input of the
    /// head. `normed` are the text's final hidden states after the final norm, `(tokens, hidden)`; `ids`
    /// its tokens; `head` gives the logits, `(n, hidden) -> (n, vocab)`. Zero for a text of one token,
    /// which predicts nothing.
    ///
    /// # Errors
    /// What `head` returns, including [`Error::Unsupported`] for one that carries no gradient;
    /// [`Error::Parameter`] when the shapes do not fit each other; [`Error::TokenOutOfRange`];
    /// [`Error::NotFinite`] when a loss is not finite.
    pub fn fit(
        &self,
        normed: &Tensor,
        ids: &[u32],
        head: &dyn Fn(&Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let hidden = match normed.dims() {
            &[tokens, hidden] if tokens == ids.len() => hidden,
            got => {
                let expected = format!("({}, hidden), a state for each token", ids.len());
                return Err(Error::parameter("normed", expected, format!("{got:?}")));
            }
        };
        let prompt = Prompt { normed: normed.detach(), ids, head };
        let mut delta = Tensor::zeros((1, hidden), DType::F32, normed.device())?;
        if self.steps == 0 || ids.len() < 2 {
            return Ok(delta.to_dtype(normed.dtype())?);
        }
        let mut best = (f64::INFINITY, delta.clone());
        let mut adam = Adam::new(Self::EPSILON);
        // one more than there are steps, to evaluate where the last one led
        for step in 0..=self.steps {
            let (loss, gradient) = prompt.loss(&delta, step < self.steps)?;
            if loss < best.0 {
                best = (loss, delta.clone());
            }
            if let Some(gradient) = gradient {
                let step = (adam.direction(&gradient)? + (&delta * Self::WEIGHT_DECAY)?)?;
                delta = (delta - (step * self.learning_rate)?)?;
            }
        }
        Ok(best.1.to_dtype(normed.dtype())?)
    }
}

/// A text as the head sees it.
struct Prompt<'a> {
    normed: Tensor,
    ids: &'a [u32],
    head: &'a dyn Fn(&Tensor) -> Result<Tensor>,
}

impl Prompt<'_> {
    /// The mean negative log-likelihood of each next token with `delta` added, in nats; with its
    /// gradient with respect to `delta`, if wanted.
    fn loss(&self, delta: &Tensor, gradient: bool) -> Result<(f64, Option<Tensor>)> {
        let predicted = self.ids.len().saturating_sub(1);
        let (mut loss, mut slope) = (0.0, delta.zeros_like()?);
        for run in likelihood::runs(predicted) {
            let targets = self.ids.get(run.start + 1..=run.end).unwrap_or(&[]);
            let normed = self.normed.narrow(0, run.start, run.len())?;
            let delta = Var::from_tensor(delta)?;
            let added = if gradient { delta.as_tensor() } else { &delta.as_detached_tensor() };
            let logits = (self.head)(&normed.broadcast_add(&added.to_dtype(normed.dtype())?)?)?;
            let vocab_size = logits.dim(D::Minus1)?;
            for (position, &id) in (run.start + 1..).zip(targets) {
                if id as usize >= vocab_size {
                    return Err(Error::TokenOutOfRange { position, id, vocab_size });
                }
            }
            let logprobs = likelihood::of_targets(&logits, targets)?;
            let part = (logprobs.sum_all()? / -(predicted as f64))?;
            let value = f64::from(part.to_scalar::<f32>()?);
            if !value.is_finite() {
                return Err(Error::NotFinite { what: "losses", position: run.start });
            }
            if gradient {
                let of_part = part.backward()?.remove(&delta).ok_or_else(|| {
                    Error::unsupported("gradient", "none leads back through the head")
                })?;
                slope = (slope + of_part.detach())?;
            }
            loss += value;
        }
        Ok((loss, gradient.then_some(slope)))
    }
}
