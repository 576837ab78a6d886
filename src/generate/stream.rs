//! The one decoding loop of the crate: an iterator of tokens.

use std::time::{Duration, Instant};

use candle_core::{DType, Tensor};
use serde::Serialize;

use super::config::{GenerationConfig, Progress};
use super::prompt::{EncodedPrompt, Prompt};
use super::sampler::{LogProbs, Sampler};
use super::stop::{StopReason, StopStrings};
use crate::error::{Error, Result};
use crate::model::{KvCache, Layout, Pass, Transformer};
use crate::tokenizer::{DecodeStream, Tokenizer};

/// Prompt tokens that go through the blocks between two reports of progress.
const CHUNK: usize = 512;

/// Prompt positions whose logits stand in memory at a time.
const LOGITS_AT_ONCE: usize = 64;

/// A generated token.
#[derive(Clone, Debug, PartialEq)]
pub struct Token {
    /// Its id.
    pub id: u32,
    /// The text that it completed: what follows everything given before, in whole characters.
    /// Empty while a character, or what may be a stop string, is still incomplete, and for special
    /// tokens; the last token brings along what is left.
    pub text: String,
    /// Its log-probability by the model, before penalties and temperature.
    pub logprob: f32,
    /// The likeliest tokens at its place with their log-probabilities, likeliest first; as many as
    /// [`GenerationConfig::top_logprobs`] asks for.
    pub top_logprobs: Vec<(u32, f32)>,
}

/// What came of a prompt.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// The prompt as the model took it.
    pub prompt_ids: Vec<u32>,
    /// The generated tokens, an end-of-sequence token included.
    pub ids: Vec<u32>,
    /// Their text, as it follows the prompt. Empty without a tokenizer.
    pub text: String,
    /// The log-probability of each generated token, before penalties and temperature.
    pub logprobs: Vec<f32>,
    /// The likeliest tokens at the place of each generated one; see [`Token::top_logprobs`].
    pub top_logprobs: Vec<Vec<(u32, f32)>>,
    /// The log-probability of each prompt token after those before it, `None` for the first;
    /// `None` altogether unless [`GenerationConfig::prompt_logprobs`] asked for them.
    pub prompt_logprobs: Option<Vec<Option<f32>>>,
    /// Why it ended.
    pub stop: StopReason,
    /// The relative change of the thoughts in each pass; see
    /// [`Thoughts::drift`](crate::thought::Thoughts::drift).
    pub drift: Vec<f64>,
    /// Where the time went.
    pub seconds: Seconds,
}

/// Where the time of an answer went, in seconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Seconds {
    /// The thought passes.
    pub think: f64,
    /// Everything else before the first token.
    pub prefill: f64,
    /// Everything after.
    pub decode: f64,
}

/// What one conversation keeps from turn to turn: a cache and the tokens in it.
///
/// A new prompt that begins like the tokens already here runs only from where it departs.
#[derive(Debug)]
pub struct Conversation {
    cache: KvCache,
    /// The tokens whose plain keys and values are in the cache; none when what is there was
    /// thought about, because it then depends on the whole of its prompt.
    ids: Vec<u32>,
}

impl Conversation {
    pub(crate) fn new(transformer: &Transformer, capacity: usize) -> Result<Self> {
        let cache = transformer.new_cache(&Layout::dense(1, 1), capacity)?;
        Ok(Self { cache, ids: Vec::new() })
    }

    /// The tokens it remembers.
    #[must_use]
    pub fn ids(&self) -> &[u32] {
        &self.ids
    }

    /// The tokens it has room for.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.cache.capacity()
    }

    /// Forgets everything.
    pub fn reset(&mut self) {
        self.cache.reset();
        self.ids.clear();
    }

    /// Keeps what `prompt` begins with, all but its last token at most, and forgets the rest.
    /// Gives how many tokens are kept.
    fn rewind(&mut self, prompt: &[u32]) -> usize {
        let same = self.ids.iter().zip(prompt).take_while(|(old, new)| old == new).count();
        let keep = same.min(prompt.len().saturating_sub(1));
        if self.cache.truncate(keep).is_err() {
            // The window has let go of what would be needed: begin anew.
            self.reset();
        }
        self.ids.truncate(keep);
        self.ids.len()
    }
}

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
    config: GenerationConfig,
    next: Next,
    generated: usize,
    stop: Option<StopReason>,
    failed: bool,
    prompt_ids: Vec<u32>,
    kept: usize,
    prompt_logprobs: Option<Vec<Option<f32>>>,
    drift: Vec<f64>,
    seconds: Seconds,
}

/// Where the next logits come from.
#[derive(Debug)]
enum Next {
    /// The last token of the prompt: `(vocab,)`.
    Logits(Tensor),
    /// A generated token that has not run yet.
    Token(u32),
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
        let sampler = Sampler::new(config, &prompt.ids)?;
        config.thinking.validate(transformer)?;
        if !config.stop.is_empty() && source.tokenizer.is_none() {
            return Err(Error::NoTokenizer { needed_for: "a stop string" });
        }
        let mut conversation = match conversation {
            Some(lent) => Held::Lent(lent),
            None => {
                let context = transformer.config().max_position_embeddings;
                let wanted = prompt.ids.len().saturating_add(config.max_tokens);
                let capacity = wanted.min(context).max(prompt.ids.len());
                Held::Own(Box::new(Conversation::new(transformer, capacity)?))
            }
        };
        let read = Reading::new(transformer, config, conversation.get()).read(&prompt)?;
        let detokenizer = source.tokenizer.map(|it| it.decode_stream(&prompt.ids));
        Ok(Self {
            source,
            conversation,
            sampler,
            detokenizer,
            stop_strings: StopStrings::new(config.stop.clone()),
            config: config.clone(),
            next: Next::Logits(read.logits),
            generated: 0,
            stop: (config.max_tokens == 0).then_some(StopReason::MaxTokens),
            failed: false,
            prompt_ids: prompt.ids,
            kept: read.kept,
            prompt_logprobs: read.prompt_logprobs,
            drift: read.drift,
            seconds: read.seconds,
        })
    }

    /// The prompt as the model took it.
    #[must_use]
    pub fn prompt_ids(&self) -> &[u32] {
        &self.prompt_ids
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
        self.prompt_logprobs.as_deref()
    }

    /// The relative change of the thoughts in each pass.
    #[must_use]
    pub fn drift(&self) -> &[f64] {
        &self.drift
    }

    /// Why the answer ended; `None` while it has not.
    #[must_use]
    pub fn stop(&self) -> Option<StopReason> {
        self.stop
    }

    /// Where the time went so far.
    #[must_use]
    pub fn seconds(&self) -> Seconds {
        self.seconds
    }

    /// Runs to the end and gives everything at once.
    ///
    /// # Errors
    /// The first error of the stream.
    pub fn collect_answer(mut self) -> Result<Answer> {
        let mut answer = Answer {
            prompt_ids: Vec::new(),
            ids: Vec::new(),
            text: String::new(),
            logprobs: Vec::new(),
            top_logprobs: Vec::new(),
            prompt_logprobs: None,
            stop: StopReason::MaxTokens,
            drift: Vec::new(),
            seconds: Seconds::default(),
        };
        for token in &mut self {
            let token = token?;
            answer.ids.push(token.id);
            answer.text.push_str(&token.text);
            answer.logprobs.push(token.logprob);
            answer.top_logprobs.push(token.top_logprobs);
        }
        answer.stop = self.stop.unwrap_or(StopReason::MaxTokens);
        (answer.prompt_ids, answer.prompt_logprobs) = (self.prompt_ids, self.prompt_logprobs);
        (answer.drift, answer.seconds) = (self.drift, self.seconds);
        Ok(answer)
    }

    fn advance(&mut self) -> Result<Token> {
        let logits = match &self.next {
            Next::Logits(logits) => logits.to_vec1::<f32>()?,
            Next::Token(id) => self.run(*id)?,
        };
        let id = self.sampler.sample(&logits)?;
        let logprobs = LogProbs::new(&logits, self.prompt_ids.len() + self.generated)?;
        let (logprob, top_logprobs) = (logprobs.of(id), logprobs.top(self.config.top_logprobs));
        self.generated += 1;

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
        Ok(Token { id, text, logprob, top_logprobs })
    }

    /// Whether the answer ends with this token, stop strings aside.
    fn stop_at(&mut self, id: u32) -> Option<StopReason> {
        let eos_ids = self.config.eos_ids.as_deref().unwrap_or(self.source.eos_ids);
        let cache = &self.conversation.get().cache;
        if eos_ids.contains(&id) {
            Some(StopReason::Eos)
        } else if self.config.stop_ids.contains(&id) {
            Some(StopReason::StopId)
        } else if self.generated >= self.config.max_tokens {
            Some(StopReason::MaxTokens)
        } else if cache.len() >= cache.capacity() {
            Some(StopReason::Context)
        } else {
            None
        }
    }

    /// Runs one generated token and gives the logits after it.
    fn run(&mut self, id: u32) -> Result<Vec<f32>> {
        let transformer = self.source.transformer;
        let conversation = self.conversation.get();
        let xs = transformer.embed(&Tensor::new(&[[id]], transformer.device())?)?;
        let layers = transformer.all_layers();
        let pass = Pass::Cached(&mut conversation.cache);
        let h = transformer.forward(&xs, layers, pass)?; // (1, 1, hidden)
        if self.config.thinking.is_none() {
            conversation.ids.push(id);
        }
        Ok(transformer.logits(&h)?.flatten_all()?.to_dtype(DType::F32)?.to_vec1()?)
    }
}

impl Iterator for TokenStream<'_> {
    type Item = Result<Token>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.stop.is_some() || self.failed {
            return None;
        }
        let start = Instant::now();
        let token = self.advance();
        self.seconds.decode += seconds_since(start);
        self.failed = token.is_err();
        Some(token)
    }
}

/// The work before the first token.
struct Reading<'a> {
    transformer: &'a Transformer,
    config: &'a GenerationConfig,
    conversation: &'a mut Conversation,
}

/// What it leaves.
struct Read {
    /// After the last prompt token, `(vocab,)` in `f32`.
    logits: Tensor,
    /// Prompt tokens that did not run because the conversation had them.
    kept: usize,
    prompt_logprobs: Option<Vec<Option<f32>>>,
    drift: Vec<f64>,
    seconds: Seconds,
}

impl<'a> Reading<'a> {
    fn new(
        transformer: &'a Transformer,
        config: &'a GenerationConfig,
        conversation: &'a mut Conversation,
    ) -> Self {
        Self { transformer, config, conversation }
    }

    fn read(self, prompt: &EncodedPrompt) -> Result<Read> {
        let start = Instant::now();
        let Self { transformer, config, conversation } = self;
        let thinking = &config.thinking;
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
        let tokens = Tensor::new(new, transformer.device())?.unsqueeze(0)?;
        let embeddings = transformer.embed(&tokens).map_err(|error| match error {
            Error::TokenOutOfRange { position, id, vocab_size } => {
                Error::TokenOutOfRange { position: kept + position, id, vocab_size }
            }
            other => other,
        })?; // (1, new, hidden)
        let layout = Layout::dense(1, new.len());
        let layout = match thinking.is_none() {
            true => layout,
            false => layout.with_context(0, &prompt.context)?,
        };

        let cache = &mut conversation.cache;
        let z = thinking.encode(transformer, &embeddings, Pass::Cached(cache))?;
        let thinking_from = Instant::now();
        let thoughts = thinking.think(transformer, z, &layout, |done, passes| {
            config.report(Progress::Think { done, total: passes });
        })?;
        let think = if thinking.is_none() { 0.0 } else { seconds_since(thinking_from) };

        let mut scores = PromptLogProbs::new(config.prompt_logprobs, &prompt.ids);
        let mut last = None;
        config.report(Progress::Prefill { done: kept, total });
        for from in (0..new.len()).step_by(CHUNK) {
            let length = CHUNK.min(new.len() - from);
            let z = thoughts.z.narrow(1, from, length)?;
            let h = thinking.hand_off(transformer, &z, Pass::Cached(cache))?;
            scores.add(transformer, &h)?;
            last = Some(h.narrow(1, length - 1, 1)?);
            if thinking.is_none() {
                conversation.ids.extend(new.iter().skip(from).take(length));
            }
            config.report(Progress::Prefill { done: kept + from + length, total });
        }
        let logits = transformer.logits(&last.ok_or(Error::EmptyPrompt)?)?;
        let logits = logits.flatten_all()?.to_dtype(DType::F32)?;
        let seconds = Seconds { think, prefill: seconds_since(start) - think, decode: 0.0 };
        Ok(Read { logits, kept, prompt_logprobs: scores.done, drift: thoughts.drift, seconds })
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
                    let logprobs = LogProbs::new(&logits, done.len() - 1)?;
                    done.push(Some(logprobs.of(id)));
                }
            }
        }
        Ok(())
    }
}

fn seconds_since(start: Instant) -> f64 {
    Duration::as_secs_f64(&start.elapsed())
}
