//! The text side of an answer: from logits to a token, from tokens to text, until it ends.

use super::answer::{Answer, Seconds, Token};
use super::config::GenerationConfig;
use super::decoder::PromptRead;
use super::sampler::{Confidence, LogProbs, Sampler};
use super::source::Source;
use super::stop::{StopReason, StopStrings};
use crate::error::{Error, Result};
use crate::tokenizer::DecodeStream;

/// Writes one answer.
#[derive(Clone, Debug)]
pub(super) struct Writer {
    sampler: Sampler,
    detokenizer: Option<DecodeStream>,
    stop_strings: StopStrings,
    stop_ids: Vec<u32>,
    eos_ids: Vec<u32>,
    max_tokens: usize,
    top_logprobs: usize,
    /// How sure the model was; only of candidates.
    pub(super) confidence: Option<Confidence>,
    /// Why it ended, once it has.
    pub(super) stop: Option<StopReason>,
    /// The answer so far; `stop` above, not its own field, says why it ended.
    pub(super) answer: Answer,
}

impl Writer {
    pub(super) fn new(source: &Source, config: &GenerationConfig, prompt: &[u32]) -> Result<Self> {
        if !source.model.decoder().has_head() {
            return Err(Error::NoHead { needed_for: "generating" });
        }
        let sampler = Sampler::new(config, prompt)?;
        let (stop_strings, stop_ids) = stops(config, source)?;
        Ok(Self {
            sampler,
            detokenizer: source.tokenizer.as_ref().map(|it| it.decode_stream(prompt)),
            stop_strings: StopStrings::new(stop_strings),
            stop_ids,
            eos_ids: config.eos_ids.clone().unwrap_or_else(|| source.eos_ids.clone()),
            max_tokens: config.max_tokens,
            top_logprobs: config.top_logprobs,
            confidence: config.candidates.is_some().then(Confidence::default),
            stop: (config.max_tokens == 0).then_some(StopReason::MaxTokens),
            answer: Answer {
                prompt_ids: prompt.to_vec(),
                ids: Vec::new(),
                text: String::new(),
                logprobs: Vec::new(),
                top_logprobs: Vec::new(),
                prompt_logprobs: None,
                stop: StopReason::MaxTokens,
                traces: Vec::new(),
                candidates: Vec::new(),
                speculated: None,
                seconds: Seconds::default(),
            },
        })
    }

    /// Another of the same answer, whose tokens are drawn with a seed of their own.
    pub(super) fn with_seed(&self, seed: u64) -> Self {
        Self { sampler: self.sampler.clone().with_seed(seed), ..self.clone() }
    }

    /// Records the result of reading the prompt, and returns the logits after it.
    pub(super) fn begin(&mut self, read: PromptRead) -> Vec<f32> {
        self.answer.prompt_logprobs = read.prompt_logprobs;
        self.answer.traces = read.traces;
        self.answer.seconds = read.seconds;
        read.logits
    }

    /// The next token, drawn from the logits before it. `has_room` says whether another one could run.
    pub(super) fn write(&mut self, logits: &[f32], has_room: bool) -> Result<Token> {
        let id = self.sampler.sample(logits)?;
        let position = self.answer.prompt_ids.len() + self.answer.ids.len();
        let logprobs = LogProbs::new(logits, position)?;
        let (logprob, top_logprobs) = (logprobs.of(id), logprobs.top(self.top_logprobs));
        if let Some(confidence) = &mut self.confidence {
            confidence.add(&logprobs);
        }
        self.answer.ids.push(id);

        self.stop = self.stop_at(id, has_room);
        let mut text = String::new();
        let hidden = matches!(self.stop, Some(StopReason::Eos | StopReason::StopId));
        if let Some(detokenizer) = &mut self.detokenizer {
            let mut piece = if hidden { String::new() } else { detokenizer.push(id) };
            if self.stop.is_some() {
                piece.push_str(&detokenizer.finish());
            }
            let (shown, met) = self.stop_strings.push(&piece);
            text = shown;
            if met {
                self.stop = Some(StopReason::StopString);
            } else if self.stop.is_some() {
                text.push_str(&self.stop_strings.finish());
            }
        }
        self.answer.text.push_str(&text);
        self.answer.logprobs.push(logprob);
        self.answer.top_logprobs.push(top_logprobs.clone());
        Ok(Token { id, text, logprob, top_logprobs })
    }

    /// Ends the answer after what it has said, if it has not ended. Returns text that was still held back.
    pub(super) fn end(&mut self, stop: StopReason) -> String {
        if self.stop.is_some() {
            return String::new();
        }
        self.stop = Some(stop);
        let piece = self.detokenizer.as_mut().map(DecodeStream::finish).unwrap_or_default();
        let (mut text, met) = self.stop_strings.push(&piece);
        if !met {
            text.push_str(&self.stop_strings.finish());
        }
        self.answer.text.push_str(&text);
        text
    }

    /// Whether the answer ends with this token, stop strings aside.
    fn stop_at(&self, id: u32, has_room: bool) -> Option<StopReason> {
        if self.eos_ids.contains(&id) {
            Some(StopReason::Eos)
        } else if self.stop_ids.contains(&id) {
            Some(StopReason::StopId)
        } else if self.answer.ids.len() >= self.max_tokens {
            Some(StopReason::MaxTokens)
        } else if !has_room {
            Some(StopReason::Context)
        } else {
            None
        }
    }

    /// The most tokens that may still come.
    pub(super) fn left(&self) -> usize {
        self.max_tokens.saturating_sub(self.answer.ids.len())
    }

    /// The last token that was drawn.
    pub(super) fn last(&self) -> Option<u32> {
        self.answer.ids.last().copied()
    }

    /// The whole answer.
    pub(super) fn finish(self) -> Result<Answer> {
        match self.stop {
            Some(stop) => Ok(Answer { stop, ..self.answer }),
            None => Err(Error::StreamFailed),
        }
    }
}

/// The texts and the tokens that end an answer. A text that is the spelling of a control token never
/// appears in the answer, so that token itself is looked for.
fn stops(config: &GenerationConfig, source: &Source) -> Result<(Vec<String>, Vec<u32>)> {
    let vocab_size = source.model.decoder().config().vocab_size;
    let (mut strings, mut ids) = (Vec::new(), config.stop_ids.clone());
    let eos_ids = config.eos_ids.as_deref().unwrap_or(&[]);
    for (name, given) in [("stop_id", ids.as_slice()), ("eos_ids", eos_ids)] {
        if let Some(id) = given.iter().find(|&&id| id as usize >= vocab_size) {
            let expected = format!("less than the vocabulary of {vocab_size}");
            return Err(Error::parameter(name, expected, id));
        }
    }
    for stop in &config.stop {
        let needed_for = "a stop string";
        let tokenizer = source.tokenizer.as_ref().ok_or(Error::NoTokenizer { needed_for })?;
        match tokenizer.special_id(stop) {
            Some(id) => ids.push(id),
            None => strings.push(stop.clone()),
        }
    }
    Ok((strings, ids))
}
