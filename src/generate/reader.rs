//! The model's side of an answer: read the prompt, think about it, go on token by token.

use std::sync::Arc;
use std::time::{Duration, Instant};

use candle_core::{DType, Tensor};

use super::answer::Seconds;
use super::config::{GenerationConfig, Progress};
use super::conversation::Conversation;
use super::prompt::EncodedPrompt;
use super::sampler::LogProbs;
use crate::error::{Error, Result};
use crate::model::{CHUNK, Layout, Pass, Transformer};
use crate::thought::{LOGITS_AT_ONCE, Text, Thinking, ThoughtLoop, Trace};

/// What a text has been read with, and what of it must be kept to think about it again.
#[derive(Debug)]
pub(super) struct Reader<'a> {
    transformer: &'a Transformer,
    thinking: Arc<Thinking>,
    /// What was thought about last: the prompt, then prompt and answer.
    text: EncodedPrompt,
    /// Tokens since then.
    new: Vec<u32>,
    /// The first thoughts of all tokens that have run, `(1, seq, hidden)` in pieces; kept only where
    /// they will be thought about again.
    first: Vec<Tensor>,
    /// What is added to the final hidden states of the answer, `(1, hidden)`.
    output_nudge: Option<Tensor>,
}

/// What is left of the work before the first token.
pub(super) struct PromptRead {
    /// After the last prompt token, one for each token of the vocabulary.
    pub(super) logits: Vec<f32>,
    /// Prompt tokens that did not run because the conversation had them.
    pub(super) kept: usize,
    pub(super) prompt_logprobs: Option<Vec<Option<f32>>>,
    pub(super) traces: Vec<Trace>,
    pub(super) seconds: Seconds,
}

impl<'a> Reader<'a> {
    pub(super) fn new(
        transformer: &'a Transformer,
        thinking: &Thinking,
        prompt: EncodedPrompt,
    ) -> Result<Self> {
        thinking.on(transformer)?;
        Ok(Self {
            transformer,
            thinking: Arc::new(thinking.clone()),
            text: prompt,
            new: Vec::new(),
            first: Vec::new(),
            output_nudge: None,
        })
    }

    /// Thinks about the prompt and reads it into the conversation's cache, as far as it is not
    /// there.
    pub(super) fn read(
        &mut self,
        config: &GenerationConfig,
        conversation: &mut Conversation,
    ) -> Result<PromptRead> {
        let start = Instant::now();
        let ids = &self.text.ids;
        let total = ids.len();
        if total > conversation.capacity() {
            let capacity = conversation.capacity();
            return Err(Error::ContextFull { capacity, requested: total });
        }
        let plain = self.thinking.is_none();
        // Thoughts depend on the whole prompt; prompt logprobs and an output nudge need what leaves
        // the last layer at every position: then nothing from before can be kept.
        let fits_output = self.thinking.chosen_output_nudge().is_some();
        if !plain || config.prompt_logprobs || fits_output {
            conversation.reset();
        }
        let kept = conversation.rewind(ids);
        let new = ids.get(kept..).unwrap_or(&[]);
        let layout = if plain { Layout::dense(1, new.len()) } else { self.text.layout()? };
        let text = Text::new(self.transformer, new, layout).map_err(|error| match error {
            Error::TokenOutOfRange { position, id, vocab_size } => {
                Error::TokenOutOfRange { position: kept + position, id, vocab_size }
            }
            other => other,
        })?;

        let mind = self.thinking.on(self.transformer)?;
        let first = mind.encode(&text, Pass::Cached(&mut conversation.cache))?;
        if self.thinks_again() {
            self.first = vec![first.clone()];
        }
        let thinking_from = Instant::now();
        let thoughts = mind.think(&text, first, |done, passes| {
            config.report(Progress::Think { done, total: passes });
        })?;
        let think = if plain { 0.0 } else { seconds_since(thinking_from) };

        let mut scores = PromptLogProbs::new(config.prompt_logprobs, ids);
        let (xs, layers) = mind.enter(&text, &thoughts, Some(&mut conversation.cache))?;
        let mut hidden = Vec::new();
        config.report(Progress::Prefill { done: kept, total });
        for from in (0..new.len()).step_by(CHUNK) {
            let length = CHUNK.min(new.len() - from);
            let xs = xs.narrow(1, from, length)?;
            let pass = Pass::Cached(&mut conversation.cache);
            let h = self.transformer.forward(&xs, layers.clone(), pass)?;
            scores.add(self.transformer, &h)?;
            match fits_output {
                true => hidden.push(h),
                false => hidden = vec![h.narrow(1, length - 1, 1)?],
            }
            if plain {
                conversation.ids.extend(new.iter().skip(from).take(length));
            }
            config.report(Progress::Prefill { done: kept + from + length, total });
        }
        let prompt_logprobs = scores.done;
        let hidden = Tensor::cat(&hidden, 1)?;
        self.fit_output(&hidden)?;
        let logits = self.logits(&hidden)?;
        let traces = if plain { Vec::new() } else { vec![thoughts.trace] };
        let seconds = Seconds { think, prefill: seconds_since(start) - think, decode: 0.0 };
        Ok(PromptRead { logits, kept, prompt_logprobs, traces, seconds })
    }

    /// Goes on after a generated token: gives the logits after it.
    pub(super) fn go_on(
        &mut self,
        id: u32,
        conversation: &mut Conversation,
        traces: &mut Vec<Trace>,
        seconds: &mut Seconds,
    ) -> Result<Vec<f32>> {
        if !self.thinks_again() {
            let xs = self.transformer.embed_ids(&[id], (1, 1))?;
            let pass = Pass::Cached(&mut conversation.cache);
            let h = self.transformer.forward(&xs, self.transformer.all_layers(), pass)?; // (1, 1, hidden)
            if self.thinking.is_none() {
                conversation.ids.push(id);
            }
            return self.logits(&h);
        }
        let thinking = Arc::clone(&self.thinking);
        let mind = thinking.on(self.transformer)?;
        let text = Text::new(self.transformer, &[id], Layout::dense(1, 1))?;
        let xs = mind.encode(&text, Pass::Cached(&mut conversation.cache))?;
        self.first.push(xs.clone());
        self.new.push(id);
        if self.new.len() < thinking.rethinks_every() {
            let layers = mind.span().start..self.transformer.all_layers().end;
            let pass = Pass::Cached(&mut conversation.cache);
            return self.logits(&self.transformer.forward(&xs, layers, pass)?);
        }
        self.think_again(&mind, conversation, traces, seconds)
    }

    /// Thinks about prompt and answer, and rebuilds the cache from the first position on that this
    /// changes.
    fn think_again(
        &mut self,
        mind: &ThoughtLoop<'_>,
        conversation: &mut Conversation,
        traces: &mut Vec<Trace>,
        seconds: &mut Seconds,
    ) -> Result<Vec<f32>> {
        let changed = self.text.extend(&std::mem::take(&mut self.new));
        // An output nudge is fitted to all that leaves the last layer.
        let changed = if self.output_nudge.is_some() { 0 } else { changed };
        let text = Text::new(self.transformer, &self.text.ids, self.text.layout()?)?;
        let first = Tensor::cat(&self.first, 1)?;
        self.first = vec![first.clone()];
        let start = Instant::now();
        let thoughts = mind.think(&text, first, |_, _| ())?;
        seconds.think += seconds_since(start);

        let cache = &mut conversation.cache;
        let (xs, layers) = mind.enter_again(&text, &thoughts, cache, changed)?;
        let h = self.transformer.forward(&xs, layers, Pass::Cached(cache))?;
        traces.push(thoughts.trace);
        self.fit_output(&h)?;
        self.logits(&h)
    }

    /// Fits the output nudge, if there is one, to what leaves the last layer: `(1, seq, hidden)`.
    fn fit_output(&mut self, hidden: &Tensor) -> Result<()> {
        if let Some(nudge) = self.thinking.chosen_output_nudge() {
            let normed = self.transformer.norm(hidden)?;
            let head = |xs: &Tensor| self.transformer.head(xs);
            self.output_nudge = Some(nudge.fit(&normed, &self.text.ids, &head)?);
        }
        Ok(())
    }

    fn thinks_again(&self) -> bool {
        !self.thinking.is_none() && self.thinking.rethinks_every() > 0
    }

    /// The scores after the last position of `h`, `(1, seq, hidden)`.
    fn logits(&self, h: &Tensor) -> Result<Vec<f32>> {
        let mut normed = self.transformer.norm(&h.narrow(1, h.dim(1)? - 1, 1)?)?;
        if let Some(nudge) = &self.output_nudge {
            normed = normed.broadcast_add(nudge)?;
        }
        let logits = self.transformer.head(&normed)?;
        Ok(logits.flatten_all()?.to_dtype(DType::F32)?.to_vec1()?)
    }
}

/// Log-probabilities of the prompt's own tokens, position by position.
struct PromptLogProbs<'a> {
    ids: &'a [u32],
    done: Option<Vec<Option<f32>>>,
}

impl<'a> PromptLogProbs<'a> {
    fn new(wanted: bool, ids: &'a [u32]) -> Self {
        Self { ids, done: wanted.then(|| vec![None]) }
    }

    /// Adds the positions after `h`, `(1, positions, hidden)`.
    fn add(&mut self, transformer: &Transformer, h: &Tensor) -> Result<()> {
        let Some(done) = &mut self.done else { return Ok(()) };
        let positions = h.dim(1)?;
        for from in (0..positions).step_by(LOGITS_AT_ONCE) {
            let some = h.narrow(1, from, LOGITS_AT_ONCE.min(positions - from))?;
            let logits = transformer.logits(&some)?.squeeze(0)?.to_dtype(DType::F32)?;
            for logits in logits.to_vec2::<f32>()? {
                // The last position tells of the first generated token, not of the prompt.
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
