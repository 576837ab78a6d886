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
//! [`Thinking`] says how, [`ThoughtLoop`] is the verbs, driven here by hand:
//!
//! ```
//! # use candle_core::Device;
//! use hybrid_attention::HybridModel;
//! use hybrid_attention::model::{Layout, Pass};
//! use hybrid_attention::thought::{Text, Thinking};
//! # fn main() -> hybrid_attention::Result<()> {
//! let model = HybridModel::tiny(&Device::Cpu)?;
//! let transformer = model.transformer();
//! let thinking = Thinking::passes(2).span(1..3);
//! let mind = thinking.on(transformer)?;
//! let text = Text::new(transformer, &[11, 150, 12], Layout::dense(1, 3))?;
//! let mut cache = transformer.new_cache(text.layout(), 64)?;
//!
//! let z = mind.encode(&text, Pass::Cached(&mut cache))?;             // (1, 3, 128)
//! let h = mind.think_once(&z, text.layout())?;                       // one pass, unrefined
//! let thoughts = mind.think(&text, z, |_done, _passes| ())?;         // all passes, refined
//! let h = mind.hand_off(&text, &thoughts, Pass::Cached(&mut cache))?; // (1, 3, 128)
//! let logits = transformer.logits(&h.narrow(1, 2, 1)?)?;             // (1, 1, 183)
//! # assert_eq!((logits.dims3()?, cache.len()), ((1, 1, model.config().vocab_size), 3));
//! # assert_eq!((h.dim(2)?, model.config().vocab_size), (128, 183));
//! # Ok(())
//! # }
//! ```

mod halting;
mod measure;
mod readout;
mod recorder;
mod thinking;
mod trace;

use std::ops::Range;
use std::time::Instant;

use candle_core::Tensor;

use self::halting::Halting;
use self::readout::CausalReadout;
use self::recorder::Recorder;
use crate::error::{Error, Result};
use crate::model::{HandOver, KvCache, Layout, Pass, Sight, Transformer};
use crate::refine::{Seq, Step, Thinks};

pub use self::halting::Halt;
pub(crate) use self::readout::LOGITS_AT_ONCE;
pub use self::thinking::{HandOff, Thinking};
pub use self::trace::{Detail, Halted, Map, Maps, PassTrace, TokenTrace, Trace};

/// Plain tokens at the end of a text are left out of the passes if they are at least one in this
/// many: to cut fewer off, and to put them back, costs more than to take them along.
const LEAST_TAIL: usize = 16;

/// A batch of texts to think about.
#[derive(Clone, Debug)]
pub struct Text {
    ids: Vec<u32>,
    layout: Layout,
    embeddings: Tensor,
}

impl Text {
    /// The texts of `ids`, laid out row by row as `layout` says. Padding may be any token: it is
    /// never seen.
    ///
    /// # Errors
    /// [`Error::TokenOutOfRange`]; [`Error::Parameter`] when `ids` do not fill the layout.
    pub fn new(transformer: &Transformer, ids: &[u32], layout: Layout) -> Result<Self> {
        let (batch, seq) = (layout.batch(), layout.seq());
        if batch.checked_mul(seq) != Some(ids.len()) {
            let expected = format!("{batch} rows of {seq} tokens");
            return Err(Error::parameter("ids", expected, ids.len()));
        }
        let embeddings = transformer.embed_ids(ids, (batch, seq))?;
        Ok(Self { ids: ids.to_vec(), layout, embeddings })
    }

    /// The tokens, row by row, padding included.
    #[must_use]
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// Where each row begins and which of its tokens think together.
    #[must_use]
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// The rows of the embedding table, `(batch, seq, hidden)`.
    #[must_use]
    pub fn embeddings(&self) -> &Tensor {
        &self.embeddings
    }
}

/// What the thought loop leaves behind.
#[derive(Clone, Debug)]
pub struct Thoughts {
    /// The refined thoughts, `(batch, seq, hidden)`: the residual stream that enters the span.
    pub z: Tensor,
    /// The thoughts before the first pass. Plain tokens have kept theirs.
    pub first: Tensor,
    /// What each pass did.
    pub trace: Trace,
}

/// The verbs of the method, for one [`Thinking`] on one [`Transformer`].
#[derive(Clone, Debug)]
pub struct ThoughtLoop<'a> {
    thinking: &'a Thinking,
    transformer: &'a Transformer,
    /// `a..b`. Without passes there are no thoughts to enter it, and it begins at 0.
    span: Range<usize>,
    refine: Seq,
}

impl<'a> ThoughtLoop<'a> {
    /// The layers `a..b` that a pass runs.
    #[must_use]
    pub fn span(&self) -> Range<usize> {
        self.span.clone()
    }

    /// Runs a text up to the span: the first thoughts, `(batch, seq, hidden)`. `pass` is a causal
    /// one; with a cache, those layers' part of it is filled.
    ///
    /// # Errors
    /// As [`Transformer::forward`]; [`Error::Parameter`] for a bidirectional pass.
    pub fn encode(&self, text: &Text, pass: Pass<'_>) -> Result<Tensor> {
        match (self.span.start, pass) {
            (_, Pass::Bidirectional(_)) => {
                Err(Error::parameter("pass", "a causal one to encode with", "a bidirectional one"))
            }
            (0, _) => Ok(text.embeddings.clone()),
            (a, pass) => self.transformer.forward(&text.embeddings, 0..a, pass),
        }
    }

    /// One thought pass over `z`, unrefined: the span of the [thinker](Transformer::thinker), then the checkpoint's own
    /// [thought layers](Transformer::thought_layers). `(batch, seq, hidden)` in and out.
    ///
    /// # Errors
    /// As [`Transformer::forward`].
    pub fn think_once(&self, z: &Tensor, layout: &Layout) -> Result<Tensor> {
        let pass = match self.thinking.sight {
            Sight::Causal => Pass::Causal(layout),
            Sight::Bidirectional => Pass::Bidirectional(layout),
        };
        let h = self.transformer.thinker().forward(z, self.span(), pass)?;
        self.transformer.forward_thought_layers(&h, layout, self.thinking.sight)
    }

    /// [`think_once`](Self::think_once) for what thinks: plain tokens behind all context, which no
    /// context sees, keep `z`.
    fn think_ahead(&self, z: &Tensor, layout: &Layout) -> Result<Tensor> {
        let (seq, end) = (layout.seq(), layout.context_end());
        if end == 0 {
            return Ok(z.clone());
        }
        if (seq - end) * LEAST_TAIL < seq {
            return self.think_once(z, layout);
        }
        let h = self.think_once(&z.narrow(1, 0, end)?.contiguous()?, &layout.front(end))?;
        Ok(Tensor::cat(&[h, z.narrow(1, end, seq - end)?], 1)?)
    }

    /// All passes over the first thoughts `z`, refined after each; `progress` is told how many are
    /// done, from 0 on, and how many there are. Plain tokens keep the thoughts they came with, and
    /// a row that halts keeps those it has.
    ///
    /// # Errors
    /// As [`Transformer::forward`]; [`Error::Refinement`]; [`Error::NotFinite`] with the index of
    /// the pass that overflowed.
    pub fn think(
        &self,
        text: &Text,
        z: Tensor,
        mut progress: impl FnMut(usize, usize),
    ) -> Result<Thoughts> {
        let (layout, passes) = (&text.layout, self.thinking.passes);
        let first = z.clone();
        let mut trace = Trace { tokens: layout.seq(), ..Trace::default() };
        if passes == 0 {
            return Ok(Thoughts { z, first, trace });
        }
        let readout = CausalReadout::new(self.transformer, self.span.start, text);
        let mut recorder = Recorder {
            detail: self.thinking.detail,
            transformer: self.transformer,
            span: self.span(),
            sight: self.thinking.sight,
            layout,
            readout: &readout,
            first: &first,
            hidden: None,
        };
        trace.first = recorder.tokens(&first)?;
        let mut halting = Halting::new(&self.thinking.halt, layout);
        let (mut z, mut first_h) = (z, None);
        progress(0, passes);
        let without_gradient =
            passes.saturating_sub(self.thinking.gradient_passes.unwrap_or(passes));
        for index in 0..passes {
            let started = Instant::now();
            if (1..=without_gradient).contains(&index) {
                // Plain rows are as they came, whatever the passes.
                z = Thinks(layout).or(&z.detach(), &first)?;
            }
            let h = self.think_ahead(&z, layout)?;
            let first_h: &Tensor = first_h.get_or_insert_with(|| match without_gradient {
                0 => h.clone(),
                _ => h.detach(),
            });
            let step = Step {
                z: &z,
                first: &first,
                h: &h,
                first_h,
                embeddings: &text.embeddings,
                layout,
                index,
                passes,
                gate: self.transformer.thought_gate(),
                readout: Some(&readout),
            };
            let refined = halting.keep_halted(&self.refine.refine(&step)?, &z)?;
            let drift = measure::drift(&z, &refined, layout)?;
            if drift.iter().flatten().any(|drift| !drift.is_finite()) {
                return Err(Error::NotFinite { what: "thoughts", position: index });
            }
            trace.passes.push(PassTrace {
                drift: halting.mean_of_active(&drift),
                seconds: started.elapsed().as_secs_f64(),
                tokens: recorder.tokens(&refined)?,
                maps: recorder.maps(&z, &refined)?,
            });
            halting.look(&drift, &z, &refined, &readout)?;
            z = refined;
            progress(index + 1, passes);
            if halting.all_halted() {
                break;
            }
        }
        trace.halted = halting.reasons();
        Ok(Thoughts { z, first, trace })
    }

    /// Hands thoughts over and gives the stream that leaves the last layer, `(batch, seq, hidden)`.
    /// For decoding, `pass` is the causal one over the cache that [`encode`](Self::encode) began to
    /// fill. A bidirectional one, for embedding, is run by the [thinker](Transformer::thinker).
    ///
    /// # Errors
    /// As [`Transformer::forward`] and [`Transformer::hand_over`].
    pub fn hand_off(&self, text: &Text, thoughts: &Thoughts, mut pass: Pass<'_>) -> Result<Tensor> {
        let cache = match &mut pass {
            Pass::Cached(cache) => Some(&mut **cache),
            Pass::Causal(_) | Pass::Bidirectional(_) => None,
        };
        let (xs, layers) = self.enter(text, thoughts, cache)?;
        let reader = match pass {
            Pass::Bidirectional(_) => self.transformer.thinker(),
            Pass::Causal(_) | Pass::Cached(_) => self.transformer,
        };
        reader.forward(&xs, layers, pass)
    }

    /// The part of [`hand_off`](Self::hand_off) that needs the whole text at once: gives the stream
    /// that goes on causally, which may be cut into pieces, and the layers that it has yet to run.
    pub(crate) fn enter(
        &self,
        text: &Text,
        thoughts: &Thoughts,
        cache: Option<&mut KvCache>,
    ) -> Result<(Tensor, Range<usize>)> {
        let (Range { start: a, end: b }, n) = (self.span(), self.transformer.all_layers().end);
        let weight = match self.thinking.hand_off {
            HandOff::KeyValue if !self.thinking.is_none() => 1.0,
            HandOff::Mixed { weight } if !self.thinking.is_none() => weight,
            _ => return Ok((thoughts.z.clone(), a..n)),
        };
        let (plain, z) = (&thoughts.first, &thoughts.z);
        let what = HandOver { plain, z, weight, sight: self.thinking.sight };
        let xs = self.transformer.hand_over(&what, a..b, &text.layout, cache)?;
        Ok((xs, b..n))
    }

    /// [`enter`](Self::enter) after thinking again: makes `cache` forget what depends on thoughts
    /// from position `changed` on, and gives the stream from the first one forgotten. What layers
    /// before the span hold stays true: no thought has entered them.
    pub(crate) fn enter_again(
        &self,
        text: &Text,
        thoughts: &Thoughts,
        cache: &mut KvCache,
        changed: usize,
    ) -> Result<(Tensor, Range<usize>)> {
        let (Range { start: a, end: b }, n) = (self.span(), self.transformer.all_layers().end);
        let from = match cache.truncate_layers(a..n, changed) {
            Err(Error::CacheRolled { .. }) => {
                // The window has let go of what would be needed: begin anew.
                cache.truncate_layers(a..n, 0)?;
                0
            }
            result => result.map(|()| changed)?,
        };
        if self.thinking.hand_off != HandOff::Refined {
            cache.truncate_layers(a..b, 0)?; // handed over whole
        }
        let (xs, layers) = self.enter(text, thoughts, Some(cache))?;
        Ok((xs.narrow(1, from, text.layout.seq() - from)?, layers))
    }
}
