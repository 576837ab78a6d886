//! How to think: the settings of the thought loop.

use std::fmt::Display;
use std::ops::{Bound, RangeBounds};

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use super::halting::Halt;
use super::trace::Detail;
use super::{ThoughtLoop, ThoughtModel};
use crate::apart;
use crate::cancel::Cancel;
use crate::error::{Error, Result};
use crate::model::Sight;
use crate::refine::{Interpolate, Noise, OutputNudge, Refine, Seq, Step, seq};

/// The end of a span that goes up to the last layer, whichever that is.
const TOP: usize = usize::MAX;

/// How the decoder receives the thoughts.
///
/// In every form the last token of the prompt, and every plain segment, is run causally over the result
/// for the others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
#[non_exhaustive]
pub enum HandOff {
    /// Layers `a..n` re-read the thoughts causally; this pass fills the cache. The decoder sees
    /// nothing but refined embeddings, in the form it was trained to read.
    #[default]
    Refined,
    /// One last bidirectional run of the span over the thoughts: its keys and values become the
    /// cache of layers `a..b`, and its output goes causally through `b..n` (a prefix-LM; GritLM's
    /// document caching, Muennighoff et al. 2024).
    KeyValue,
    /// As [`HandOff::KeyValue`], but keys, values and output are
    /// `(1 - weight) · causal + weight · bidirectional`, the causal ones those of the plain model
    /// (Bitune, Kopiczko et al. 2024). At weight 0 this is the plain model, at 1 `KeyValue`.
    Mixed {
        /// Share of the bidirectional run, in `[0, 1]`.
        weight: f64,
    },
}

impl HandOff {
    fn validate(self) -> Result<()> {
        match self {
            Self::Mixed { weight } if !(0.0..=1.0).contains(&weight) => {
                Err(Error::parameter("hand_off weight", "a share in [0, 1]", weight))
            }
            _ => Ok(()),
        }
    }
}

/// How to think about a prompt before answering it. The default is not to, and every part is off until
/// it is asked for:
///
/// | part | what there is |
/// |---|---|
/// | [`passes`](Self::passes), [`span`](Self::span) | how often, and through which layers `a..b` |
/// | [`noise`](Self::noise) | on what enters the first pass |
/// | [`refine`](Self::refine) | a [sequence](crate::refine) of ops: [`Interpolate`], [`CosineReweight`](crate::refine::CosineReweight), nudges by [gradient](crate::refine::GradientNudge) or by [trial](crate::refine::ForwardNudge), [noise](Noise), the [nearest embedding](crate::refine::Substitute), your own, a closure |
/// | [`halt`](Self::halt) | stop early by drift, by cosine, or by what the model would say next |
/// | [`hand_off`](Self::hand_off) | `Refined`: all layers re-read the thoughts. `KeyValue`: their keys and values become the cache. `Mixed`: these and the plain model's, in proportion |
/// | [`rethink_every`](Self::rethink_every) | think again over prompt and answer every so many tokens |
/// | [`output_nudge`](Self::output_nudge) | one vector added before the head, fitted to the prompt (SLOT) |
/// | [`sight`](Self::sight) | bidirectional; or causal, as a control of equal cost |
/// | [`detail`](Self::detail) | how much the trace records for you to look into |
///
/// A checkpoint that was trained to think says so beside its weights: tensors `thought.layers.{i}.*`
/// (further blocks, named like the model's own) run after the span in every pass; the sigmoid of
/// `thought.gate`, `(hidden)`, is each channel's share of the new state; and a `hybrid.json`, which
/// [`from_json`](Self::from_json) reads, is used whenever the caller says nothing about thinking.
///
/// What a checkpoint orders runs on the machine of whoever only says `generate`, so a `hybrid.json` has a
/// budget that settings of your own have not: see [`Thinking::MOST_READS_FROM_FILE`].
///
/// Not thinking is the right default for weights that were not trained to think: for those no
/// source shows a bidirectional prompt helping generation, and strong settings ruin it.
///
/// ```
/// use hybrid_attention::Thinking;
/// use hybrid_attention::refine::{CosineReweight, Interpolate, seq};
/// use hybrid_attention::thought::Halt;
///
/// let thinking = Thinking::new(3)
///     .span(14..18)
///     .refine(seq().add(CosineReweight::mix(0.1)).add(Interpolate::new(0.1)))
///     .halt(Halt::Drift(0.03));
/// # let _ = thinking;
/// ```
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Thinking {
    pub(super) passes: usize,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) span: Option<(usize, usize)>,
    pub(super) sight: Sight,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) noise: Option<Noise>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) refine: Option<Seq>,
    pub(super) halt: Vec<Halt>,
    pub(super) hand_off: HandOff,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) output_nudge: Option<OutputNudge>,
    pub(super) rethink_every: usize,
    pub(super) detail: Detail,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) gradient_passes: Option<usize>,
}

impl Thinking {
    /// The most passes that are accepted. Published loops saturate at three or four.
    pub const MAX_PASSES: usize = 1024;

    /// How often the default thinking of a checkpoint, its `hybrid.json`, may read the prompt: 1000 times
    /// (published ones do so three or four times, with nudges some hundred times). What you ask for
    /// yourself, in code or on the command line, has no such limit, and can be
    /// [cancelled](crate::Cancel).
    ///
    /// A pass counts as one reading, each op and each halting rule as one more in every pass, a step of a
    /// [`GradientNudge`](crate::refine::GradientNudge) as three, a step of a
    /// [`ForwardNudge`](crate::refine::ForwardNudge) in N directions as 2N + 1, and a step of an
    /// [`OutputNudge`] as one. With [`rethink_every`](Self::rethink_every) R, a new token costs an R-th of
    /// that, which may be at most a tenth of the budget. A `hybrid.json` may ask for no
    /// [`detail`](Self::detail) but `drift` either: what is recorded is for who looks at it to say.
    ///
    /// ```text
    /// {"passes": 4, "refine": [{"op": "forward_nudge", "steps": 8, "directions": 8}]}
    /// 4 passes of (1 + 1 + 8 · 17) readings: 552
    /// ```
    pub const MOST_READS_FROM_FILE: usize = 1000;

    /// No thinking: exactly a plain Mistral.
    #[must_use]
    pub fn none() -> Self {
        Self::default()
    }

    /// Reads what a checkpoint's `hybrid.json` holds: these settings as JSON, where what is left out has its
    /// default, and maybe an object `embed`, which [`EmbedConfig::from_hybrid_json`] reads. The budget that such a file has is checked when a checkpoint is loaded, not here.
    ///
    /// ```
    /// use hybrid_attention::Thinking;
    ///
    /// let thinking = Thinking::from_json(r#"{
    ///     "passes": 3, "span": [14, 18],
    ///     "refine": [{"op": "interpolate", "weight": 0.1}],
    ///     "halt": [{"drift": 0.03}],
    ///     "hand_off": {"mixed": {"weight": 0.5}}
    /// }"#)?;
    /// # assert!(!thinking.is_none());
    /// # Ok::<_, hybrid_attention::Error>(())
    /// ```
    ///
    /// [`EmbedConfig::from_hybrid_json`]: crate::EmbedConfig::from_hybrid_json
    ///
    /// # Errors
    /// [`Error::Malformed`] for text that is something else, or names a setting that does not exist; as
    /// [`Thinking::validate`] for values.
    pub fn from_json(text: &str) -> Result<Self> {
        let malformed = |error: &dyn Display| Error::malformed("JSON text of a Thinking", error);
        if !text.trim_start().starts_with('{') {
            return Err(malformed(&"expected a JSON object")); // serde would take a list, too
        }
        let (thinking, _): (Self, _) =
            apart::read(text, "embed").map_err(|error| malformed(&error))?;
        thinking.validate()?;
        Ok(thinking)
    }

    /// Checks the budget that thinking has which comes with a checkpoint and was asked for by nobody.
    ///
    /// # Errors
    /// [`Error::Parameter`] for what goes beyond [`Thinking::MOST_READS_FROM_FILE`].
    pub(crate) fn check_as_default(&self) -> Result<()> {
        const MOST: usize = Thinking::MOST_READS_FROM_FILE;
        if self.detail != Detail::Drift {
            let expected = "drift, as the default of a checkpoint";
            return Err(Error::parameter("detail", expected, format!("{:?}", self.detail)));
        }
        let ops = self.refine.as_ref().map_or(1, Seq::reads);
        let each = ops.saturating_add(self.halt.len()).saturating_add(1);
        let nudge = self.output_nudge.as_ref().map_or(0, OutputNudge::reads);
        let reads = self.passes.saturating_mul(each).saturating_add(nudge);
        let halts = self.halt.len();
        let what = format!(
            "passes x (1 + refine + halt) + output_nudge = {} x (1 + {ops} + {halts}) + {nudge} = {reads}",
            self.passes
        );
        if reads > MOST {
            let expected =
                format!("at most {MOST} readings of the prompt, as the default of a checkpoint");
            return Err(Error::parameter("thinking", expected, what));
        }
        let most = self.rethink_every.saturating_mul(MOST / 10);
        if self.rethink_every > 0 && reads > most {
            let every = self.rethink_every;
            let expected = format!(
                "at most {} readings for each new token, as the default of a checkpoint",
                MOST / 10
            );
            return Err(Error::parameter(
                "rethink_every",
                expected,
                format!("{what} every {every}"),
            ));
        }
        Ok(())
    }

    /// At most this many thought passes over the whole stack, unless [`span`](Self::span) says otherwise:
    /// [`none`](Self::none) with [`passes`](Self::passes).
    #[must_use]
    pub fn new(passes: usize) -> Self {
        Self::none().passes(passes)
    }

    /// The layers a thought pass runs, `a..b` with `a < b <= num_hidden_layers`, or `a..` up to the last.
    #[must_use]
    pub fn span(mut self, span: impl RangeBounds<usize>) -> Self {
        let start = match span.start_bound() {
            Bound::Included(&start) => start,
            Bound::Excluded(&before) => before.saturating_add(1),
            Bound::Unbounded => 0,
        };
        let end = match span.end_bound() {
            Bound::Included(&last) => last.saturating_add(1),
            Bound::Excluded(&end) => end,
            Bound::Unbounded => TOP,
        };
        self.span = Some((start, end));
        self
    }

    /// Whether tokens of a context segment see what comes after them in a pass. Default
    /// [`Sight::Bidirectional`]; [`Sight::Causal`] makes the loop its own control of equal cost.
    #[must_use]
    pub fn sight(mut self, sight: Sight) -> Self {
        self.sight = sight;
        self
    }

    /// Noise on what enters the first pass: on the embeddings of context, for a span from layer 0 on, and on its
    /// first thoughts for any other. Default: none, and none without passes. [`Step::first`], the hand-off and plain
    /// tokens keep what is free of noise. To draw something else for each of several candidates:
    /// [`ThoughtLoop::candidate`].
    ///
    /// ```
    /// use hybrid_attention::Thinking;
    /// use hybrid_attention::refine::Noise;
    ///
    /// let thinking = Thinking::new(1).noise(Noise::relative(0.5).keep_norm().seed(7));
    /// # thinking.validate()?;
    /// # Ok::<_, hybrid_attention::Error>(())
    /// ```
    #[must_use]
    pub fn noise(mut self, noise: Noise) -> Self {
        self.noise = Some(noise);
        self
    }

    /// What each pass does to the thoughts: one op, or a [`seq`](crate::refine::seq) of them. Default
    /// [`Interpolate::gated`] for a checkpoint that has learned a gate, and [`Interpolate::damped`] for
    /// any other.
    #[must_use]
    pub fn refine(mut self, refine: impl Into<Seq>) -> Self {
        self.refine = Some(refine.into());
        self
    }

    /// The next thoughts as a function of what a pass made of them and of the [`Step`]. Such settings
    /// cannot be written to a file.
    ///
    /// ```
    /// use hybrid_attention::Thinking;
    ///
    /// let halfway = Thinking::new(2).refine_fn(|xs, step| Ok(((xs + step.z)? / 2.0)?));
    /// # let _ = halfway;
    /// ```
    #[must_use]
    pub fn refine_fn<F>(self, function: F) -> Self
    where
        F: Fn(&Tensor, &Step<'_>) -> Result<Tensor> + Send + Sync + 'static,
    {
        self.refine(seq().add_fn(function))
    }

    /// Stops thinking before the last pass when this is met; may be called several times, and the first
    /// to be met decides. Default: never.
    #[must_use]
    pub fn halt(mut self, halt: Halt) -> Self {
        self.halt.push(halt);
        self
    }

    /// How the decoder receives the thoughts. Default [`HandOff::Refined`].
    #[must_use]
    pub fn hand_off(mut self, hand_off: HandOff) -> Self {
        self.hand_off = hand_off;
        self
    }

    /// Fits one vector to the prompt, once it has been read, and adds it to every final hidden state of
    /// the answer (SLOT, arXiv 2505.12392). Default: none. It needs no passes: after [`Thinking::none`]
    /// it is the only part that runs.
    #[must_use]
    pub fn output_nudge(mut self, nudge: OutputNudge) -> Self {
        self.output_nudge = Some(nudge);
        self
    }

    /// Thinks again, over prompt and answer, after every `tokens` new tokens: the answer extends the
    /// prompt's last part if that is context, and becomes a part of its own otherwise. Default 0: never.
    #[must_use]
    pub fn rethink_every(mut self, tokens: usize) -> Self {
        self.rethink_every = tokens;
        self
    }

    /// How much the [`Trace`](super::Trace) holds. Default [`Detail::Drift`].
    #[must_use]
    pub fn detail(mut self, detail: Detail) -> Self {
        self.detail = detail;
        self
    }

    /// For training through the loop: gradients flow back through the last `passes` passes only, at
    /// least one, which limits their memory (truncated backpropagation). Changes no thoughts. Default:
    /// through all of them.
    ///
    /// What came before, the layers before the span and the embeddings, then learns nothing through the
    /// thoughts of context, not even through an anchor to the result of the first pass. It still does
    /// through plain rows, which no pass changes, and through [`first`](super::Thoughts::first), where
    /// an anchor or a hand-off reads it. Passes count from the cap: if thinking halts before the last
    /// `passes` begin, gradients flow through one pass.
    #[must_use]
    pub fn gradient_passes(mut self, passes: usize) -> Self {
        self.gradient_passes = Some(passes);
        self
    }

    /// At most this many thought passes, up to [`Thinking::MAX_PASSES`]. Default 0: no thinking.
    ///
    /// ```
    /// use hybrid_attention::Thinking;
    ///
    /// let own = Thinking::new(4).span(1..3); // a checkpoint's, say
    /// let (none, longer) = (own.clone().passes(0), own.passes(8));
    /// assert!(none.is_none() && !longer.is_none());
    /// ```
    #[must_use]
    pub fn passes(mut self, passes: usize) -> Self {
        self.passes = passes;
        self
    }

    /// Whether there are no passes.
    #[must_use]
    pub fn is_none(&self) -> bool {
        self.passes == 0
    }

    /// Whether it may be another for each of several candidates: with noise, or ops of one's own.
    pub(crate) fn may_differ(&self) -> bool {
        self.noise.is_some() || self.refine.as_ref().is_some_and(Seq::may_differ)
    }

    /// The nudge of the final hidden states of an answer, if there is one.
    #[must_use]
    pub fn chosen_output_nudge(&self) -> Option<&OutputNudge> {
        self.output_nudge.as_ref()
    }

    /// How many new tokens to think again after; 0 is never.
    #[must_use]
    pub fn rethinks_every(&self) -> usize {
        self.rethink_every
    }

    /// These settings on a model, checked against it.
    ///
    /// # Errors
    /// As [`Thinking::validate`]; [`Error::Parameter`] for a span that is empty or beyond the
    /// model's layers.
    pub fn on(&self, model: &ThoughtModel) -> Result<ThoughtLoop> {
        self.validate()?;
        let all = model.decoder().all_layers();
        let span = match self.span {
            Some((a, TOP)) => a..all.end,
            Some((a, b)) => a..b,
            None => all.clone(),
        };
        if span.is_empty() || span.end > all.end {
            let expected = format!("a non-empty range within {all:?}");
            return Err(Error::parameter("span", expected, format!("{span:?}")));
        }
        let span = if self.is_none() { all } else { span };
        let refine = self.refine.clone().unwrap_or_else(|| match model.thought_gate() {
            Some(_) => Interpolate::gated().into(),
            None => Interpolate::damped().into(),
        });
        let (thinking, model) = (self.clone(), model.clone());
        Ok(ThoughtLoop { thinking, model, span, refine, candidate: 0, cancel: Cancel::default() })
    }

    /// Checks what does not depend on the model.
    ///
    /// # Errors
    /// [`Error::Parameter`] for too many passes, gradients through none, or a tolerance or a deviation
    /// outside its range;
    /// [`Error::Refinement`] for an op's own parameter.
    pub fn validate(&self) -> Result<()> {
        if self.passes > Self::MAX_PASSES {
            let expected = format!("at most {}", Self::MAX_PASSES);
            return Err(Error::parameter("passes", expected, self.passes));
        }
        if self.gradient_passes == Some(0) {
            return Err(Error::parameter("gradient_passes", "at least one", 0));
        }
        self.hand_off.validate()?;
        self.output_nudge.as_ref().map_or(Ok(()), OutputNudge::validate)?;
        self.halt.iter().try_for_each(Halt::validate)?;
        self.noise.as_ref().map_or(Ok(()), Noise::validate)?;
        self.refine.as_ref().map_or(Ok(()), Seq::validate)
    }
}
