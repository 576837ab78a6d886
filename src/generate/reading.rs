//! The work before the first token: think about the prompt, read it into the cache.

use std::time::{Duration, Instant};

use candle_core::{DType, Tensor};

use super::answer::Seconds;
use super::config::{GenerationConfig, Progress};
use super::conversation::Conversation;
use super::prompt::EncodedPrompt;
use super::sampler::LogProbs;
use crate::error::{Error, Result};
use crate::model::{CHUNK, Layout, Pass, Transformer};
use crate::thought::{Text, Thinking, Trace};

/// Prompt positions whose logits stand in memory at a time.
const LOGITS_AT_ONCE: usize = 64;

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

/// Thinks about `prompt` and reads it into the conversation's cache, as far as it is not there.
pub(super) fn read_prompt(
    transformer: &Transformer,
    prompt: &EncodedPrompt,
    thinking: &Thinking,
    config: &GenerationConfig,
    conversation: &mut Conversation,
) -> Result<PromptRead> {
    let start = Instant::now();
    let total = prompt.ids.len();
    if total > conversation.capacity() {
        let capacity = conversation.capacity();
        return Err(Error::ContextFull { capacity, requested: total });
    }
    // Thoughts depend on the whole prompt, and prompt logprobs need every position's logits:
    // then nothing from before can be kept.
    if !thinking.is_none() || config.prompt_logprobs {
        conversation.reset();
    }
    let kept = conversation.rewind(&prompt.ids);
    let new = prompt.ids.get(kept..).unwrap_or(&[]);
    let layout = Layout::dense(1, new.len());
    let layout = match thinking.is_none() {
        true => layout,
        false => layout.with_context(0, &prompt.context)?,
    };
    let text = Text::new(transformer, new, layout).map_err(|error| match error {
        Error::TokenOutOfRange { position, id, vocab_size } => {
            Error::TokenOutOfRange { position: kept + position, id, vocab_size }
        }
        other => other,
    })?;

    let cache = &mut conversation.cache;
    let mind = thinking.on(transformer)?;
    let z = mind.encode(&text, Pass::Cached(cache))?;
    let thinking_from = Instant::now();
    let thoughts = mind.think(&text, z, |done, passes| {
        config.report(Progress::Think { done, total: passes });
    })?;
    let think = if thinking.is_none() { 0.0 } else { seconds_since(thinking_from) };

    let mut scores = PromptLogProbs::new(config.prompt_logprobs, &prompt.ids);
    let mut last = None;
    config.report(Progress::Prefill { done: kept, total });
    for from in (0..new.len()).step_by(CHUNK) {
        let length = CHUNK.min(new.len() - from);
        let z = thoughts.z.narrow(1, from, length)?;
        let h = transformer.forward(
            &z,
            mind.span().start..transformer.all_layers().end,
            Pass::Cached(cache),
        )?;
        scores.add(transformer, &h)?;
        last = Some(h.narrow(1, length - 1, 1)?);
        if thinking.is_none() {
            conversation.ids.extend(new.iter().skip(from).take(length));
        }
        config.report(Progress::Prefill { done: kept + from + length, total });
    }
    let logits = transformer.logits(&last.ok_or(Error::EmptyPrompt)?)?;
    let logits = logits.flatten_all()?.to_dtype(DType::F32)?.to_vec1()?;
    let traces = if thinking.is_none() { Vec::new() } else { vec![thoughts.trace] };
    let seconds = Seconds { think, prefill: seconds_since(start) - think, decode: 0.0 };
    Ok(PromptRead { logits, kept, prompt_logprobs: scores.done, traces, seconds })
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
