//! The thought loop: encode, think, hand off.
//!
//! ```text
//! encode     z = layers[0..a](embeddings)                     causal
//! think      repeat: h = layers[a..b](z)                      both ways inside context segments
//!                    z = refine(z, h)
//! hand off   the decoder receives z, as a HandOff says        causal
//! ```
//!
//! The thoughts `z` are the residual stream that enters layer `a`, before that layer's norm.
//! [`Thinking`] holds the settings, [`ThoughtLoop`] the verbs. Generation is built from them, and so can
//! be anything else; here an answer of one token, with all but the last token of the prompt thought
//! about, as [`HybridModel::generate`](crate::HybridModel::generate) does:
//!
//! ```
//! # use candle_core::Device;
//! use hybrid_attention::model::{Batch, Pass};
//! use hybrid_attention::thought::{EncodedBatch, Thinking};
//! use hybrid_attention::{GenerationConfig, HybridModel};
//! # fn main() -> hybrid_attention::Result<()> {
//! let model = HybridModel::tiny(&Device::Cpu)?;
//! let thinking = Thinking::new(2).span(1..3);
//! let mind = thinking.on(model.thought_model())?;
//! let decoder = model.transformer();
//!
//! let batch = Batch::one(3)?.with_context(0, &[0..2])?;
//! let text = EncodedBatch::new(decoder, &[11, 150, 12], batch)?;
//! let mut cache = decoder.new_cache(64)?;
//! let z = mind.encode(&text, Pass::Cached(&mut cache))?;              // (3, 128)
//! let thoughts = mind.think(&text, z, |_done, _passes| ())?;          // all passes, refined
//! let h = mind.hand_off(&text, &thoughts, Pass::Cached(&mut cache))?; // (3, 128)
//! let logits = decoder.logits(&h.narrow(0, 2, 1)?)?;                  // (1, 183)
//!
//! let config = GenerationConfig::default().thinking(thinking).max_tokens(1);
//! let answer = model.generate([11, 150, 12], &config)?;
//! assert_eq!(logits.argmax(1)?.to_vec1::<u32>()?, answer.ids);
//! assert_eq!(thoughts.trace.drift(), answer.drift());
//! # Ok(())
//! # }
//! ```

mod document;
mod export;
mod halting;
mod hand_off;
mod measure;
mod model;
mod readout;
mod recorder;
mod thinking;
mod trace;
mod watch;

use std::ops::Range;

use candle_core::Tensor;

use self::readout::CausalReadout;
use self::watch::Watch;
use crate::cancel::Cancel;
use crate::error::{Error, Result};
use crate::model::{Batch, ForwardContext, Pass, Sight, Transformer, flat};
use crate::refine::{Seq, Step, Thinks};
use crate::steps::{self, AttentionSteps};

pub use self::document::Document;
pub use self::export::Origin;
pub use self::halting::Halt;
pub use self::hand_off::Entry;
pub use self::model::ThoughtModel;
pub use self::thinking::{HandOff, Thinking};
pub use self::trace::{Detail, Halted, Map, Maps, PassTrace, TokenTrace, Trace};

/// Plain tokens at the ends of sequences are left out of the passes if they make up at least one in this
/// many: for fewer, cutting them off and putting them back costs more than running them.
const LEAST_TAIL: usize = 16;

/// Sequences to think about.
#[derive(Clone, Debug)]
pub struct EncodedBatch {
    ids: Vec<u32>,
    batch: Batch,
    embeddings: Tensor,
}

impl EncodedBatch {
    /// The sequences of `ids`, one after the other as `batch` says.
    ///
    /// # Errors
    /// [`Error::TokenOutOfRange`]; [`Error::Parameter`] when there is not one id for each token.
    pub fn new(transformer: &Transformer, ids: &[u32], batch: Batch) -> Result<Self> {
        let (batch, embeddings) = (batch.with_ids(ids)?, transformer.embed_ids(ids)?);
        Ok(Self { ids: ids.to_vec(), batch, embeddings })
    }

    /// The same text, where a sequence follows on tokens that its cache holds: [`Batch::following`].
    ///
    /// # Errors
    /// [`Error::Parameter`] when there is no such sequence.
    pub fn following(mut self, sequence: usize, past: &[u32]) -> Result<Self> {
        self.batch = self.batch.following(sequence, past)?;
        Ok(self)
    }

    /// The tokens, sequence after sequence.
    #[must_use]
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// Where each sequence begins, which of its tokens think together, and which these are.
    #[must_use]
    pub fn batch(&self) -> &Batch {
        &self.batch
    }

    /// The rows of the embedding table, `(tokens, hidden)`.
    #[must_use]
    pub fn embeddings(&self) -> &Tensor {
        &self.embeddings
    }
}

/// What the thought loop produces.
#[derive(Clone, Debug)]
pub struct Thoughts {
    /// The refined thoughts, `(tokens, hidden)`: the residual stream that enters the span.
    pub z: Tensor,
    /// The thoughts before the first pass. Those of plain tokens have not changed since.
    pub first: Tensor,
    /// What each pass did.
    pub trace: Trace,
    /// How they came about; `None` for thoughts that are put together by hand.
    pub origin: Option<Origin>,
}

/// The verbs of the method, for one [`Thinking`] on one [`ThoughtModel`].
#[derive(Clone, Debug)]
pub struct ThoughtLoop {
    thinking: Thinking,
    model: ThoughtModel,
    /// `a..b`. Without passes there are no thoughts to enter it, and it begins at 0.
    span: Range<usize>,
    refine: Seq,
    candidate: u64,
    cancel: Cancel,
}

impl ThoughtLoop {
    /// The layers `a..b` that a pass runs.
    #[must_use]
    pub fn span(&self) -> Range<usize> {
        self.span.clone()
    }

    /// How it thinks.
    #[must_use]
    pub fn thinking(&self) -> &Thinking {
        &self.thinking
    }

    /// The model it thinks with.
    #[must_use]
    pub fn model(&self) -> &ThoughtModel {
        &self.model
    }

    /// The same loop for one of several candidates, by its number: [`Noise`](crate::refine::Noise) is
    /// drawn anew for each. Default 0.
    #[must_use]
    pub fn candidate(mut self, candidate: u64) -> Self {
        self.candidate = candidate;
        self
    }

    /// The same loop, all of whose verbs stop when this is cancelled.
    #[must_use]
    pub fn cancel(mut self, cancel: Cancel) -> Self {
        self.cancel = cancel;
        self
    }

    /// Runs a text up to the span: the first thoughts, `(tokens, hidden)`. `pass` is a causal
    /// one; with a cache, those layers' part of it is filled.
    ///
    /// # Errors
    /// As [`Transformer::forward`]; [`Error::Parameter`] for a bidirectional pass.
    pub fn encode(&self, text: &EncodedBatch, pass: Pass<'_>) -> Result<Tensor> {
        if pass.is_bidirectional() {
            return Err(Error::parameter(
                "pass",
                "a causal one to encode with",
                "a bidirectional one",
            ));
        }
        match self.span.start {
            0 => Ok(text.embeddings.clone()),
            a => {
                let context = self.cancellable(self.over(text, pass));
                self.model.decoder().forward(&text.embeddings, 0..a, context)
            }
        }
    }

    /// One thought pass over `z`, unrefined: the span of the [thinker](ThoughtModel::thinker), then the
    /// checkpoint's own [thought layers](ThoughtModel::thought_layers). `(tokens, hidden)` in and out.
    ///
    /// # Errors
    /// As [`Transformer::forward`].
    pub fn think_once(&self, z: &Tensor, batch: &Batch) -> Result<Tensor> {
        let pass = || self.cancellable(Pass::uncached(batch, self.thinking.sight));
        let h = self.model.thinker().forward(z, self.span(), pass())?;
        self.model.run_thought_layers(&h, pass())
    }

    /// What one head of a layer of the span computes in a thought pass over `z`, as [`think_once`](Self::think_once)
    /// runs it: one for each sequence that has tokens.
    ///
    /// # Errors
    /// As [`Transformer::forward`]; [`Error::Parameter`] for a layer outside the span, and a head that there is not.
    pub fn attention_steps(
        &self,
        z: &Tensor,
        batch: &Batch,
        layer: usize,
        head: usize,
    ) -> Result<Vec<AttentionSteps>> {
        if !self.span.contains(&layer) {
            return Err(Error::parameter(
                "layer",
                format!("one of the span {:?}", self.span),
                layer,
            ));
        }
        let pass = Pass::uncached(batch, self.thinking.sight);
        steps::of_pass(self.model.thinker(), z, self.span.start, pass, (layer, head))
    }

    /// All passes over the first thoughts, refined after each; `progress` is called with the number of
    /// passes done, from 0 on, and the number in all. Plain tokens keep the thoughts they came with, and
    /// a sequence that halts keeps those it has.
    ///
    /// # Errors
    /// As [`Transformer::forward`]; [`Error::Refinement`]; [`Error::NotFinite`] with the index of
    /// the pass that overflowed.
    pub fn think(
        &self,
        text: &EncodedBatch,
        first: Tensor,
        mut progress: impl FnMut(usize, usize),
    ) -> Result<Thoughts> {
        let (batch, passes) = (&text.batch, self.thinking.passes);
        let readout = CausalReadout::new(&self.model, self.span.start, text);
        let mut watch = Watch::new(self, batch, &readout, &first)?;
        let begin = Step {
            embeddings: &text.embeddings,
            passes,
            candidate: self.candidate,
            gate: self.model.thought_gate(),
            readout: Some(&readout),
            ..Step::new(&first, &first, batch)
        };
        let (mut z, mut first_h) = (self.noised(&first, batch)?, None);
        for index in 0..passes {
            progress(index, passes);
            z = self.truncated(index, z, &first, batch)?;
            let h = self.think_ahead(&z, batch)?; // pass
            let first_h = &*first_h.get_or_insert_with(|| self.constant(&h));
            let step = Step { z: &z, h: &h, first_h, index, ..begin };
            let refined = self.refine.refine(&step)?; // refine
            z = watch.observe(index, &z, refined)?; // observe
            if watch.all_halted() {
                break;
            }
        }
        let trace = watch.trace();
        if passes > 0 {
            progress(trace.passes.len(), passes);
        }
        Ok(Thoughts { z, first, trace, origin: Some(Origin::new(self, text)) })
    }

    /// [`think_once`](Self::think_once) without the plain tokens after all context of their sequence,
    /// which no context sees: these keep `z`.
    fn think_ahead(&self, z: &Tensor, batch: &Batch) -> Result<Tensor> {
        let (front, kept) = batch.fronts();
        let (tokens, thinking) = (batch.tokens(), front.tokens());
        if thinking == 0 {
            return Ok(z.clone());
        }
        if (tokens - thinking) * LEAST_TAIL < tokens {
            return self.think_once(z, batch);
        }
        let rows = flat(z)?;
        let some = |rows: &Tensor, of: &Range<usize>| rows.narrow(0, of.start, of.len());
        let fronts =
            kept.iter().map(|of| some(&rows, of)).collect::<candle_core::Result<Vec<_>>>()?;
        let h = self.think_once(&Tensor::cat(&fronts, 0)?, &front)?;
        // Each sequence put back together: what has thought, and the tail as it was.
        let mut whole = Vec::with_capacity(2 * kept.len());
        for ((all, kept), thought) in batch.all_rows().zip(&kept).zip(front.all_rows()) {
            whole.push(some(&h, &thought)?);
            whole.push(some(&rows, &(kept.end..all.end))?);
        }
        Ok(Tensor::cat(&whole, 0)?.reshape(z.shape())?)
    }

    /// What enters the first pass.
    fn noised(&self, first: &Tensor, batch: &Batch) -> Result<Tensor> {
        match &self.thinking.noise {
            Some(noise) if self.thinking.passes > 0 => {
                Thinks(batch).or(&noise.on(first, batch, self.candidate)?, first)
            }
            _ => Ok(first.clone()),
        }
    }

    /// How many passes at the beginning carry no gradient.
    fn without_gradient(&self) -> usize {
        let passes = self.thinking.passes;
        passes.saturating_sub(self.thinking.gradient_passes.unwrap_or(passes))
    }

    /// The thoughts before pass `index`, detached from passes that carry no gradient. Plain rows stay as
    /// they came, whatever the passes.
    fn truncated(&self, index: usize, z: Tensor, first: &Tensor, batch: &Batch) -> Result<Tensor> {
        match (1..=self.without_gradient()).contains(&index) {
            true => Thinks(batch).or(&z.detach(), first),
            false => Ok(z),
        }
    }

    /// What the first pass made of them, as an anchor for later passes.
    fn constant(&self, h: &Tensor) -> Tensor {
        if self.without_gradient() == 0 { h.clone() } else { h.detach() }
    }

    /// `pass`, with the tokens of the text where the decoder looks something up by them.
    fn over<'a>(&self, text: &'a EncodedBatch, pass: Pass<'a>) -> Pass<'a> {
        match pass {
            Pass::Cached(cache) if self.model.decoder().has_side_source() => {
                let caches = std::iter::once(cache).collect();
                Pass::Remembered { batch: &text.batch, sight: Sight::Causal, caches }
            }
            pass => pass,
        }
    }

    fn cancellable<'a>(&'a self, pass: Pass<'a>) -> ForwardContext<'a> {
        ForwardContext::from(pass).cancel(&self.cancel)
    }
}
