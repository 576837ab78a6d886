//! The model's side of an answer: read the prompt, think about it, continue token by token. All of it
//! uses the public verbs of [`ThoughtLoop`] and [`Transformer`].

use std::ops::Range;
use std::time::{Duration, Instant};

use candle_core::{DType, Tensor};

use super::answer::Seconds;
use super::conversation::Conversation;
use super::progress::Progress;
use super::prompt::EncodedPrompt;
use super::sampler::LogProbs;
use crate::cancel::Cancel;
use crate::error::{Error, Result};
use crate::likelihood;
use crate::model::{Batch, CHUNK, ForwardContext, Pass, Sight, Transformer};
use crate::thought::{EncodedBatch, Entry, ThoughtLoop, Trace};

/// A text that is being read and written, and what must be kept of it to think about it again.
#[derive(Clone, Debug)]
pub(super) struct Decoder {
    mind: ThoughtLoop,
    /// What was thought about last: the prompt, then prompt and answer.
    text: EncodedPrompt,
    /// Tokens added since then.
    new: Vec<u32>,
    /// The first thoughts of all tokens that have run, `(tokens, hidden)` in pieces; kept only if they
    /// will be thought about again.
    first: Vec<Tensor>,
    /// What is added to the final hidden states of the answer, `(1, hidden)`.
    output_nudge: Option<Tensor>,
    cancel: Cancel,
}

/// A prompt that has come as far as the first layer that thinks.
pub(super) struct Begun {
    start: Instant,
    text: EncodedBatch,
    /// The first thoughts of `text`.
    first: Tensor,
    /// Prompt tokens before it, which are in the cache.
    held: usize,
    /// How many of these did not run, because the conversation had them, or documents that were read before.
    kept: usize,
}

/// The result of the work before the first token.
pub(super) struct PromptRead {
    /// After the last prompt token, one for each entry of the vocabulary.
    pub(super) logits: Vec<f32>,
    /// Prompt tokens that did not run because the conversation had them, or documents that were read before.
    pub(super) kept: usize,
    pub(super) prompt_logprobs: Option<Vec<Option<f32>>>,
    pub(super) traces: Vec<Trace>,
    pub(super) seconds: Seconds,
}

impl Decoder {
    pub(super) fn new(mind: ThoughtLoop, prompt: EncodedPrompt) -> Self {
        let (new, first, cancel) = (Vec::new(), Vec::new(), Cancel::default());
        Self { mind, text: prompt, new, first, output_nudge: None, cancel }
    }

    pub(super) fn cancel(&mut self, cancel: Cancel) {
        self.mind = self.mind.clone().cancel(cancel.clone());
        self.cancel = cancel;
    }

    /// The same for one of several candidates, whose thoughts are its own.
    pub(super) fn for_candidate(&self, candidate: u64) -> Self {
        Self { mind: self.mind.clone().candidate(candidate), ..self.clone() }
    }

    pub(super) fn mind(&self) -> &ThoughtLoop {
        &self.mind
    }

    /// What stops it.
    pub(super) fn cancelled_by(&self) -> &Cancel {
        &self.cancel
    }

    pub(super) fn transformer(&self) -> &Transformer {
        self.mind.model().decoder()
    }

    /// Thinks about the prompt and reads it into the conversation's cache, as far as it is not yet
    /// there.
    pub(super) fn read(
        &mut self,
        wants_logprobs: bool,
        conversation: &mut Conversation,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<PromptRead> {
        let begun = self.begin(wants_logprobs, conversation)?;
        self.think_and_read(&begun, wants_logprobs, conversation, progress)
    }

    /// Reads the prompt up to the layers that think: what candidates that think have in common.
    pub(super) fn begin(
        &mut self,
        wants_logprobs: bool,
        conversation: &mut Conversation,
    ) -> Result<Begun> {
        let start = Instant::now();
        let ids = &self.text.ids;
        let plain = self.mind.thinking().is_none();
        // Thoughts depend on the whole prompt; prompt logprobs and an output nudge need the output of
        // the last layer at every position: in these cases nothing from before can be kept.
        if !plain || wants_logprobs || self.fits_output() || self.has_documents() {
            conversation.forget();
        }
        // What is in the cache, and how much of that did not run now.
        let (held, kept) = match self.has_documents() {
            true => self.place(conversation)?,
            false => {
                let kept = conversation.rewind(ids);
                (kept, kept)
            }
        };
        let new = ids.get(held..).unwrap_or(&[]);
        let batch = if plain { Batch::one(new.len())? } else { self.text.batch()? };
        let text =
            EncodedBatch::new(self.transformer(), new, batch).map_err(|error| match error {
                Error::TokenOutOfRange { position, id, vocab_size } => {
                    Error::TokenOutOfRange { position: held + position, id, vocab_size }
                }
                other => other,
            })?;
        let text = text.following(0, ids.get(..held).unwrap_or(&[]))?;
        let first = self.mind.encode(&text, Pass::Cached(&mut conversation.cache))?;
        if self.thinks_again() {
            self.first = vec![first.clone()];
        }
        Ok(Begun { start, text, first, held, kept })
    }

    /// The rest of [`read`](Self::read).
    pub(super) fn think_and_read(
        &mut self,
        begun: &Begun,
        wants_logprobs: bool,
        conversation: &mut Conversation,
        progress: &mut dyn FnMut(Progress),
    ) -> Result<PromptRead> {
        let Begun { start, text, first, held, kept } = begun;
        let (plain, total) = (self.mind.thinking().is_none(), self.text.ids.len());
        let thinking_from = Instant::now();
        let thoughts = self.mind.think(text, first.clone(), |done, total| {
            progress(Progress::Think { done, total });
        })?;
        let think = if plain { 0.0 } else { seconds_since(thinking_from) };

        let new = text.ids();
        let mut scores = PromptLogProbs::new(wants_logprobs, &self.text.ids, *held);
        let cache = &mut conversation.cache;
        let Entry { xs, layers } = self.mind.enter(text, &thoughts, Some(&mut [cache]))?;
        let mut hidden = Vec::new();
        progress(Progress::Prefill { done: *held, total });
        for from in (0..new.len()).step_by(CHUNK) {
            let length = CHUNK.min(new.len() - from);
            let xs = xs.narrow(0, from, length)?;
            let ids = new.get(from..from + length).unwrap_or(&[]);
            let h = self.forward(&xs, ids, layers.clone(), conversation)?;
            scores.add(self.transformer(), &h)?;
            match self.fits_output() {
                true => hidden.push(h),
                false => hidden = vec![h.narrow(0, length - 1, 1)?],
            }
            if self.reads_plainly() {
                conversation.ids.extend(new.iter().skip(from).take(length));
            }
            progress(Progress::Prefill { done: held + from + length, total });
        }
        let prompt_logprobs = scores.done;
        let hidden = Tensor::cat(&hidden, 0)?;
        self.fit_output(&hidden)?;
        let logits = self.logits(&hidden)?;
        let traces = if plain { Vec::new() } else { vec![thoughts.trace] };
        let seconds = Seconds { think, prefill: seconds_since(*start) - think, decode: 0.0 };
        Ok(PromptRead { logits, kept: *kept, prompt_logprobs, traces, seconds })
    }

    /// Puts the documents into an empty cache, and reads what stands before and between them. Returns how many
    /// tokens it then holds, and how many of these did not run.
    fn place(&self, conversation: &mut Conversation) -> Result<(usize, usize)> {
        let (transformer, ids) = (self.transformer(), &self.text.ids);
        transformer.check_placed(ids.len())?;
        let (mut held, mut kept) = (0, 0);
        for (place, document, tokens) in &self.text.documents {
            self.cancel.check()?;
            let between = ids.get(held..place.start).unwrap_or(&[]);
            if !between.is_empty() {
                let xs = transformer.embed_ids(between)?;
                self.forward(&xs, between, transformer.all_layers(), conversation)?;
            }
            transformer.place(document.kept(), tokens.clone(), &mut conversation.cache)?;
            (held, kept) = (place.end, kept + place.len());
        }
        Ok((held, kept))
    }

    /// Runs a generated token and returns the logits after it.
    pub(super) fn step(
        &mut self,
        id: u32,
        conversation: &mut Conversation,
        traces: &mut Vec<Trace>,
        seconds: &mut Seconds,
    ) -> Result<Vec<f32>> {
        if !self.thinks_again() {
            let xs = self.transformer().embed_ids(&[id])?;
            let h = self.forward(&xs, &[id], self.transformer().all_layers(), conversation)?;
            self.took(id, conversation);
            return self.logits(&h);
        }
        let mut text = EncodedBatch::new(self.transformer(), &[id], Batch::one(1)?)?;
        if self.transformer().has_side_source() {
            text = text.following(0, &self.ran())?;
        }
        let xs = self.mind.encode(&text, Pass::Cached(&mut conversation.cache))?;
        self.first.push(xs.clone());
        self.new.push(id);
        if self.new.len() < self.mind.thinking().rethinks_every() {
            let layers = self.mind.span().start..self.transformer().all_layers().end;
            return self.logits(&self.forward(&xs, &[id], layers, conversation)?);
        }
        self.think_again(conversation, traces, seconds)
    }

    /// Runs a generated token and guesses of those after it, and returns the logits after each of them: those of as
    /// many [steps](Self::step), of which only the first is sure to be one. It [steps plainly](Self::steps_plainly).
    pub(super) fn step_ahead(
        &mut self,
        id: u32,
        guesses: &[u32],
        conversation: &mut Conversation,
    ) -> Result<Vec<Vec<f32>>> {
        let ids = [&[id], guesses].concat();
        let (xs, layers) = (self.transformer().embed_ids(&ids)?, self.transformer().all_layers());
        let h = self.run(&xs, &ids, layers, conversation, true)?; // (1 + guesses, hidden)
        self.took(id, conversation);
        conversation.guessed(guesses.len());
        Ok(self.transformer().logits(&h)?.to_dtype(DType::F32)?.to_vec2()?)
    }

    /// Records a generated token that has run.
    pub(super) fn took(&mut self, id: u32, conversation: &mut Conversation) {
        self.new.push(id);
        if self.reads_plainly() {
            conversation.ids.push(id);
        }
    }

    /// Thinks about prompt and answer, and rebuilds the cache from the first position that this changes.
    fn think_again(
        &mut self,
        conversation: &mut Conversation,
        traces: &mut Vec<Trace>,
        seconds: &mut Seconds,
    ) -> Result<Vec<f32>> {
        let changed = self.text.extend(&std::mem::take(&mut self.new));
        // An output nudge is fitted to the last layer's output at every position.
        let changed = if self.output_nudge.is_some() { 0 } else { changed };
        let text = EncodedBatch::new(self.transformer(), &self.text.ids, self.text.batch()?)?;
        let first = Tensor::cat(&self.first, 0)?;
        self.first = vec![first.clone()];
        let start = Instant::now();
        let thoughts = self.mind.think(&text, first, |_, _| ())?;
        seconds.think += seconds_since(start);

        let cache = &mut conversation.cache;
        let Entry { xs, layers } = self.mind.enter_again(&text, &thoughts, cache, changed)?;
        let from = self.text.ids.len().saturating_sub(xs.dim(0)?);
        let ids = self.text.ids.get(from..).unwrap_or(&[]);
        let h = self.forward(&xs, ids, layers, conversation)?;
        traces.push(thoughts.trace);
        self.fit_output(&h)?;
        self.logits(&h)
    }

    /// All tokens that have run, from the beginning of the text.
    pub(super) fn ran(&self) -> Vec<u32> {
        [self.text.ids.as_slice(), &self.new].concat()
    }

    /// Runs the tokens `ids`, whose stream is `xs`, behind what the cache holds in these layers.
    fn forward(
        &self,
        xs: &Tensor,
        ids: &[u32],
        layers: Range<usize>,
        conversation: &mut Conversation,
    ) -> Result<Tensor> {
        self.run(xs, ids, layers, conversation, false)
    }

    /// [`forward`](Self::forward), where tokens may go [one by one](ForwardContext::one_by_one).
    fn run(
        &self,
        xs: &Tensor,
        ids: &[u32],
        layers: Range<usize>,
        conversation: &mut Conversation,
        one_by_one: bool,
    ) -> Result<Tensor> {
        let (transformer, cache) = (self.transformer(), &mut conversation.cache);
        let batch;
        let pass = if transformer.has_side_source() {
            let (mut past, held) = (self.ran(), cache.position(&layers)?);
            past.truncate(held);
            batch = Batch::one(ids.len())?.with_ids(ids)?.following(0, &past)?;
            let caches = std::iter::once(cache).collect();
            Pass::Remembered { batch: &batch, sight: Sight::Causal, caches }
        } else {
            Pass::Cached(cache)
        };
        let mut context = ForwardContext::from(pass).cancel(&self.cancel);
        if one_by_one {
            context = context.one_by_one();
        }
        transformer.forward(xs, layers, context)
    }

    /// Fits the output nudge, if there is one, to the last layer's output, `(tokens, hidden)`.
    fn fit_output(&mut self, hidden: &Tensor) -> Result<()> {
        if let Some(nudge) = self.mind.thinking().chosen_output_nudge() {
            let normed = self.transformer().norm(hidden)?;
            let head = |xs: &Tensor| self.transformer().head(xs);
            self.output_nudge = Some(nudge.fit(&normed, &self.text.ids, &head)?);
        }
        Ok(())
    }

    fn fits_output(&self) -> bool {
        self.mind.thinking().chosen_output_nudge().is_some()
    }

    fn has_documents(&self) -> bool {
        !self.text.documents.is_empty()
    }

    /// Whether all keys and values are those of plain tokens, which the beginning of another prompt can share.
    fn reads_plainly(&self) -> bool {
        self.mind.thinking().is_none() && !self.has_documents()
    }

    fn thinks_again(&self) -> bool {
        !self.mind.thinking().is_none() && self.mind.thinking().rethinks_every() > 0
    }

    /// Whether each of its steps is one token through all layers and the head, and so can run beside
    /// those of others.
    pub(super) fn steps_plainly(&self) -> bool {
        !self.thinks_again() && !self.fits_output()
    }

    /// The logits after the last position of `h`, `(tokens, hidden)`.
    fn logits(&self, h: &Tensor) -> Result<Vec<f32>> {
        let mut normed = self.transformer().norm(&h.narrow(0, h.dim(0)? - 1, 1)?)?;
        if let Some(nudge) = &self.output_nudge {
            normed = normed.broadcast_add(nudge)?;
        }
        let logits = self.transformer().head(&normed)?;
        Ok(logits.flatten_all()?.to_dtype(DType::F32)?.to_vec1()?)
    }
}

/// Log-probabilities of the prompt's own tokens, position by position.
struct PromptLogProbs<'a> {
    ids: &'a [u32],
    done: Option<Vec<Option<f32>>>,
}

impl<'a> PromptLogProbs<'a> {
    /// Of the tokens after the first `held`, after which nothing is known of the next.
    fn new(wanted: bool, ids: &'a [u32], held: usize) -> Self {
        Self { ids, done: wanted.then(|| vec![None; held + 1]) }
    }

    /// Adds the positions after `h`, `(positions, hidden)`.
    fn add(&mut self, transformer: &Transformer, h: &Tensor) -> Result<()> {
        let Some(done) = &mut self.done else { return Ok(()) };
        for run in likelihood::runs(h.dim(0)?) {
            let some = h.narrow(0, run.start, run.len())?;
            let logits = transformer.logits(&some)?.to_dtype(DType::F32)?;
            for logits in logits.to_vec2::<f32>()? {
                // The last position predicts the first generated token, not one of the prompt.
                if let Some(&id) = self.ids.get(done.len()) {
                    let logprobs = LogProbs::new(&logits, done.len())?;
                    done.push(Some(logprobs.of(id)));
                }
            }
        }
        Ok(())
    }
}

pub(super) fn seconds_since(start: Instant) -> f64 {
    Duration::as_secs_f64(&start.elapsed())
}
