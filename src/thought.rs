//! The thought loop: encode, think, hand off.
//!
//! ```text
//! encode     z = layers[0..a](embeddings)                     causal
//! think      repeat: h = layers[a..b](z)                      both ways inside context segments
//!                    z = refine(z, h)
//! hand off   layers[a..n] re-read z and fill the cache        causal
//! ```
//!
//! The thoughts `z` are the residual stream that enters layer `a`, before that layer's norm.

use std::ops::Range;
use std::sync::Arc;

use candle_core::{D, DType, Tensor};

use crate::error::{Error, Result};
use crate::model::{Layout, Pass, Transformer};
use crate::refine::{Interpolate, Refine, Step};

/// How the decoder receives the thoughts.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum HandOff {
    /// Layers `a..n` re-read the thoughts causally; this pass fills the cache. The decoder sees
    /// nothing but refined embeddings, in the form it was trained to read.
    #[default]
    Refined,
}

/// How to think about a prompt before answering it. The default is not to.
///
/// Not thinking is the right default for weights that were not trained to think: for those no
/// source shows a bidirectional prompt helping generation, and strong settings ruin it.
///
/// ```
/// use hybrid_attention::{Thinking, refine::Interpolate};
///
/// let thinking = Thinking::passes(3).span(14..18).refine(Interpolate::new(0.1));
/// # let _ = thinking;
/// ```
#[derive(Clone, Debug)]
pub struct Thinking {
    passes: usize,
    span: Option<Range<usize>>,
    refine: Arc<dyn Refine>,
    hand_off: HandOff,
}

impl Default for Thinking {
    fn default() -> Self {
        Self::none()
    }
}

impl Thinking {
    /// The most passes that are accepted. Published loops saturate at three or four.
    pub const MAX_PASSES: usize = 1024;

    /// No thinking: exactly a plain Mistral.
    #[must_use]
    pub fn none() -> Self {
        Self::passes(0)
    }

    /// This many thought passes, at most [`Thinking::MAX_PASSES`], over the whole stack unless
    /// [`span`](Self::span) says otherwise, refined by [`Interpolate::damped`]. 0 is no thinking.
    #[must_use]
    pub fn passes(passes: usize) -> Self {
        let refine = Arc::new(Interpolate::damped());
        Self { passes, span: None, refine, hand_off: HandOff::default() }
    }

    /// The layers a thought pass runs, `a..b` with `a < b <= num_hidden_layers`.
    #[must_use]
    pub fn span(mut self, span: Range<usize>) -> Self {
        self.span = Some(span);
        self
    }

    /// What becomes of the thoughts after each pass.
    #[must_use]
    pub fn refine(mut self, refine: impl Refine + 'static) -> Self {
        self.refine = Arc::new(refine);
        self
    }

    /// How the decoder receives the thoughts. Default [`HandOff::Refined`].
    #[must_use]
    pub fn hand_off_by(mut self, hand_off: HandOff) -> Self {
        self.hand_off = hand_off;
        self
    }

    /// Whether there is any thinking to do.
    #[must_use]
    pub fn is_none(&self) -> bool {
        self.passes == 0
    }

    /// Checks the settings against a model.
    ///
    /// # Errors
    /// [`Error::Parameter`] for too many passes, a span that is empty or beyond the model's layers,
    /// or a refinement outside its range.
    pub fn validate(&self, transformer: &Transformer) -> Result<()> {
        self.validate_alone()?;
        let layers = transformer.all_layers().end;
        if let Some(span) = &self.span
            && (span.is_empty() || span.end > layers)
        {
            let expected = format!("a non-empty range within 0..{layers}");
            return Err(Error::parameter("span", expected, format!("{span:?}")));
        }
        Ok(())
    }

    /// Checks what does not depend on the model.
    pub(crate) fn validate_alone(&self) -> Result<()> {
        if self.passes > Self::MAX_PASSES {
            let expected = format!("at most {}", Self::MAX_PASSES);
            return Err(Error::parameter("passes", expected, self.passes));
        }
        self.refine.validate()
    }

    /// The span `a..b`. Without passes there are no thoughts to enter it, and it begins at 0.
    fn resolved_span(&self, transformer: &Transformer) -> Range<usize> {
        match &self.span {
            Some(span) if !self.is_none() => span.clone(),
            _ => transformer.all_layers(),
        }
    }

    /// Runs embeddings `(batch, seq, hidden)` up to the span: the first thoughts. `pass` is a
    /// causal one; with a cache, those layers' part of it is filled.
    ///
    /// # Errors
    /// As [`Thinking::validate`] and [`Transformer::forward`]; [`Error::Parameter`] for a
    /// bidirectional pass.
    pub fn encode(
        &self,
        transformer: &Transformer,
        embeddings: &Tensor,
        pass: Pass<'_>,
    ) -> Result<Tensor> {
        self.validate(transformer)?;
        match (self.resolved_span(transformer).start, pass) {
            (_, Pass::Bidirectional(_)) => {
                Err(Error::parameter("pass", "a causal one to encode with", "a bidirectional one"))
            }
            (0, _) => Ok(embeddings.clone()),
            (a, pass) => transformer.forward(embeddings, 0..a, pass),
        }
    }

    /// One thought pass over `z`, unrefined: `(batch, seq, hidden)` in and out.
    ///
    /// # Errors
    /// As [`Transformer::forward`].
    pub fn think_once(
        &self,
        transformer: &Transformer,
        z: &Tensor,
        layout: &Layout,
    ) -> Result<Tensor> {
        transformer.forward(z, self.resolved_span(transformer), Pass::Bidirectional(layout))
    }

    /// All passes over the first thoughts `z`, refined after each; `progress` is told how many are
    /// done, from 0 on, and how many there are. Plain tokens keep the thoughts they came with.
    ///
    /// # Errors
    /// As [`Thinking::validate`] and [`Transformer::forward`]; [`Error::NotFinite`] with the index
    /// of the pass that overflowed.
    pub fn think(
        &self,
        transformer: &Transformer,
        z: Tensor,
        layout: &Layout,
        mut progress: impl FnMut(usize, usize),
    ) -> Result<Thoughts> {
        self.validate(transformer)?;
        let mut thoughts = Thoughts { z, drift: Vec::with_capacity(self.passes) };
        if !self.is_none() {
            progress(0, self.passes);
        }
        for index in 0..self.passes {
            let h = self.think_once(transformer, &thoughts.z, layout)?;
            let step = Step { z: &thoughts.z, index, passes: self.passes };
            let refined = keep_plain(&self.refine.refine(&h, &step)?, &thoughts.z, layout)?;
            let drift = drift(&thoughts.z, &refined, layout)?;
            if !drift.is_finite() {
                return Err(Error::NotFinite { what: "thoughts", position: index });
            }
            thoughts.drift.push(drift);
            thoughts.z = refined;
            progress(index + 1, self.passes);
        }
        Ok(thoughts)
    }

    /// Hands thoughts, or a chunk of them, over: runs the layers from `a` on and gives the stream
    /// that leaves the last, `(batch, seq, hidden)`. For decoding, `pass` is the causal one over
    /// the cache that [`encode`](Self::encode) began to fill.
    ///
    /// # Errors
    /// As [`Transformer::forward`].
    pub fn hand_off(
        &self,
        transformer: &Transformer,
        z: &Tensor,
        pass: Pass<'_>,
    ) -> Result<Tensor> {
        let a = self.resolved_span(transformer).start;
        match self.hand_off {
            HandOff::Refined => transformer.forward(z, a..transformer.all_layers().end, pass),
        }
    }
}

/// What the thought loop leaves behind.
#[derive(Clone, Debug)]
pub struct Thoughts {
    /// The refined thoughts, `(batch, seq, hidden)`: the residual stream that enters the span.
    pub z: Tensor,
    /// For each pass the relative change of the thoughts, `‖z' - z‖ / ‖z‖`, mean over the tokens.
    /// Under about 0.03 further passes change little.
    pub drift: Vec<f64>,
}

/// `refined` where a token thinks, `z` where it is plain or padding.
fn keep_plain(refined: &Tensor, z: &Tensor, layout: &Layout) -> Result<Tensor> {
    if layout.is_all_context() {
        return Ok(refined.clone());
    }
    let thinks = Tensor::new(layout.thinks(), z.device())?.unsqueeze(D::Minus1)?; // (batch, seq, 1)
    Ok(thinks.broadcast_as(z.shape())?.where_cond(refined, z)?)
}

/// `‖z' - z‖ / ‖z‖` of each token, averaged over all tokens that are not padding.
fn drift(before: &Tensor, after: &Tensor, layout: &Layout) -> Result<f64> {
    let norm = |xs: &Tensor| xs.to_dtype(DType::F32)?.sqr()?.sum(D::Minus1)?.sqrt(); // (batch, seq)
    let smallest = f64::from(f32::MIN_POSITIVE);
    let ratio = (norm(&(after - before)?)? / norm(before)?.maximum(smallest)?)?;
    let real = Tensor::new(layout.real(), before.device())?;
    let mean = ((ratio * &real)?.sum_all()? / real.sum_all()?)?;
    Ok(f64::from(mean.to_scalar::<f32>()?))
}
