//! The one decoding loop of the crate: an iterator of tokens.

use std::time::Instant;

use candle_core::DType;

use super::answer::{Answer, Seconds, Token};
use super::config::GenerationConfig;
use super::conversation::Conversation;
use super::prompt::Prompt;
use super::reader::{Reader, seconds_since};
use super::sampler::{LogProbs, Sampler};
use super::stop::{StopReason, StopStrings};
use crate::error::{Error, Result};
use crate::model::Transformer;
use crate::thought::{Thinking, Trace};
use crate::tokenizer::{DecodeStream, Tokenizer};

/// A conversation of the stream's own, or one that outlives it.
#[derive(Debug)]
enum Held<'a> {
    Own(Box<Conversation>),
    Lent(&'a mut Conversation),
}

impl Held<'_> {
    fn get(&mut self) -> &mut Conversation {
        match self {
            Self::Own(own) => own,
            Self::Lent(lent) => lent,
        }
    }
}

/// What a stream generates with.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Source<'a> {
    pub(crate) transformer: &'a Transformer,
    pub(crate) tokenizer: Option<&'a Tokenizer>,
    /// The checkpoint's end-of-sequence tokens.
    pub(crate) eos_ids: &'a [u32],
    /// The checkpoint's own thinking.
    pub(crate) thinking: &'a Thinking,
    /// What a cache of the stream's own keeps keys and values as.
    pub(crate) cache_dtype: DType,
}

/// An answer as it comes: an iterator of [`Token`]s. Drop it to cancel.
///
/// The prompt has been thought about and read when the stream is handed out; each call of `next`
/// then runs the model once. After an error it ends.
#[derive(Debug)]
pub struct TokenStream<'a> {
    source: Source<'a>,
    conversation: Held<'a>,
    sampler: Sampler,
    detokenizer: Option<DecodeStream<'a>>,
    stop_strings: StopStrings,
    stop_ids: Vec<u32>,
    config: GenerationConfig,
    reader: Reader<'a>,
    next: Next,
    stop: Option<StopReason>,
    kept: usize,
    /// What came so far; `stop` holds its own reason to end.
    answer: Answer,
}

/// Where the next logits come from.
#[derive(Debug)]
enum Next {
    /// They came with the prompt.
    Logits(Vec<f32>),
    /// A generated token that has not run yet.
    Token(u32),
    /// Nowhere: the step that took the last of them failed, and with it the stream.
    Nothing,
}

impl<'a> TokenStream<'a> {
    /// Thinks about the prompt and reads it. Without a `conversation` the answer stands alone.
    pub(crate) fn new(
        source: Source<'a>,
        prompt: &Prompt,
        config: &GenerationConfig,
        conversation: Option<&'a mut Conversation>,
    ) -> Result<Self> {
        let transformer = source.transformer;
        let prompt = prompt.encode(source.tokenizer)?;
        let ids = prompt.ids.clone();
        let sampler = Sampler::new(config, &ids)?;
        let thinking = config.thinking.as_ref().unwrap_or(source.thinking);
        let mut reader = Reader::new(transformer, thinking, prompt)?;
        let (stop_strings, stop_ids) = stops(config, source)?;
        let mut conversation = match conversation {
            Some(lent) => Held::Lent(lent),
            None => {
                let context = transformer.config().max_position_embeddings;
                let wanted = ids.len().saturating_add(config.max_tokens);
                let capacity = wanted.min(context).max(ids.len());
                Held::Own(Box::new(Conversation::new(transformer, capacity, source.cache_dtype)?))
            }
        };
        let read = reader.read(config, conversation.get())?;
        let detokenizer = source.tokenizer.map(|it| it.decode_stream(&ids));
        Ok(Self {
            source,
            conversation,
            sampler,
            detokenizer,
            stop_strings: StopStrings::new(stop_strings),
            stop_ids,
            config: config.clone(),
            reader,
            next: Next::Logits(read.logits),
            stop: (config.max_tokens == 0).then_some(StopReason::MaxTokens),
            kept: read.kept,
            answer: Answer {
                prompt_ids: ids,
                ids: Vec::new(),
                text: String::new(),
                logprobs: Vec::new(),
                top_logprobs: Vec::new(),
                prompt_logprobs: read.prompt_logprobs,
                stop: StopReason::MaxTokens,
                traces: read.traces,
                seconds: read.seconds,
            },
        })
    }

    /// The prompt as the model took it.
    #[must_use]
    pub fn prompt_ids(&self) -> &[u32] {
        &self.answer.prompt_ids
    }

    /// How many of the prompt's tokens were in the conversation's cache already and did not run
    /// again.
    #[must_use]
    pub fn kept(&self) -> usize {
        self.kept
    }

    /// The log-probability of each prompt token; see [`Answer::prompt_logprobs`].
    #[must_use]
    pub fn prompt_logprobs(&self) -> Option<&[Option<f32>]> {
        self.answer.prompt_logprobs.as_deref()
    }

    /// What thinking did so far; see [`Answer::traces`].
    #[must_use]
    pub fn traces(&self) -> &[Trace] {
        &self.answer.traces
    }

    /// Why the answer ended; `None` while it has not.
    #[must_use]
    pub fn stop(&self) -> Option<StopReason> {
        self.stop
    }

    /// Where the time went so far.
    #[must_use]
    pub fn seconds(&self) -> Seconds {
        self.answer.seconds
    }

    /// Runs to the end and gives the whole answer, tokens already taken from the stream included.
    ///
    /// # Errors
    /// The first error of the stream; [`Error::StreamFailed`] when it was given before.
    pub fn collect_answer(mut self) -> Result<Answer> {
        for token in &mut self {
            token?;
        }
        match self.stop {
            Some(stop) => Ok(Answer { stop, ..self.answer }),
            None => Err(Error::StreamFailed),
        }
    }

    fn advance(&mut self) -> Result<Token> {
        let logits = match std::mem::replace(&mut self.next, Next::Nothing) {
            Next::Logits(logits) => logits,
            Next::Token(id) => {
                let answer = &mut self.answer;
                let conversation = self.conversation.get();
                self.reader.go_on(id, conversation, &mut answer.traces, &mut answer.seconds)?
            }
            Next::Nothing => return Err(Error::StreamFailed),
        };
        let id = self.sampler.sample(&logits)?;
        let position = self.answer.prompt_ids.len() + self.answer.ids.len();
        let logprobs = LogProbs::new(&logits, position)?;
        let (logprob, top_logprobs) = (logprobs.of(id), logprobs.top(self.config.top_logprobs));
        self.answer.ids.push(id);

        self.stop = self.stop_at(id);
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
        self.next = Next::Token(id);
        self.answer.text.push_str(&text);
        self.answer.logprobs.push(logprob);
        self.answer.top_logprobs.push(top_logprobs.clone());
        Ok(Token { id, text, logprob, top_logprobs })
    }

    /// Whether the answer ends with this token, stop strings aside.
    fn stop_at(&mut self, id: u32) -> Option<StopReason> {
        let eos_ids = self.config.eos_ids.as_deref().unwrap_or(self.source.eos_ids);
        let cache = &self.conversation.get().cache;
        if eos_ids.contains(&id) {
            Some(StopReason::Eos)
        } else if self.stop_ids.contains(&id) {
            Some(StopReason::StopId)
        } else if self.answer.ids.len() >= self.config.max_tokens {
            Some(StopReason::MaxTokens)
        } else if cache.len() >= cache.capacity() {
            Some(StopReason::Context)
        } else {
            None
        }
    }
}

/// The texts and the tokens that end an answer. A text that is the spelling of a control token never
/// shows in the answer, so that token itself is looked for.
fn stops(config: &GenerationConfig, source: Source<'_>) -> Result<(Vec<String>, Vec<u32>)> {
    let vocab_size = source.transformer.config().vocab_size;
    let (mut strings, mut ids) = (Vec::new(), config.stop_ids.clone());
    let eos_ids = config.eos_ids.as_deref().unwrap_or(&[]);
    for (name, given) in [("stop_id", ids.as_slice()), ("eos_ids", eos_ids)] {
        if let Some(id) = given.iter().find(|&&id| id as usize >= vocab_size) {
            let expected = format!("less than the vocabulary of {vocab_size}");
            return Err(Error::parameter(name, expected, id));
        }
    }
    for stop in &config.stop {
        let tokenizer =
            source.tokenizer.ok_or(Error::NoTokenizer { needed_for: "a stop string" })?;
        match tokenizer.special_id(stop) {
            Some(id) => ids.push(id),
            None => strings.push(stop.clone()),
        }
    }
    Ok((strings, ids))
}

impl Iterator for TokenStream<'_> {
    type Item = Result<Token>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.stop.is_some() || matches!(self.next, Next::Nothing) {
            return None;
        }
        let (start, thought) = (Instant::now(), self.answer.seconds.think);
        let token = self.advance();
        let seconds = &mut self.answer.seconds;
        seconds.decode += seconds_since(start) - (seconds.think - thought);
        Some(token)
    }
}
