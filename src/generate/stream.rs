//! The one decoding loop of the crate: an iterator of tokens.

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use super::ahead::Ahead;
use super::answer::{Answer, Seconds, Speculated, Token};
use super::candidates::{Race, Start, Stub};
use super::config::GenerationConfig;
use super::conversation::Conversation;
use super::decoder::{Decoder, seconds_since};
use super::lane::Lane;
use super::progress::Progress;
use super::prompt::Prompt;
use super::source::Source;
use super::stop::StopReason;
use super::writer::Writer;
use crate::cancel::Cancel;
use crate::error::{Error, Result};
use crate::statistics::{Fingerprint, Key, Pairs, Summary, states};
use crate::thought::Trace;
use crate::tokenizer::Message;

/// A conversation of the stream's own, or one that outlives it.
#[derive(Debug)]
enum Held<'c> {
    Own(Box<Conversation>),
    Lent(&'c mut Conversation),
}

impl Held<'_> {
    fn get(&mut self) -> &mut Conversation {
        match self {
            Self::Own(own) => own,
            Self::Lent(lent) => lent,
        }
    }
}

/// An answer as it is generated: an iterator of [`Token`]s.
///
/// The stream is returned at once; the first call of `next` thinks about the prompt and reads it, and
/// each further one runs the model once, unless its token was [guessed](GenerationConfig::speculate) before.
/// It owns what it needs (`'static`, unless it belongs to a [`Conversation`]), so it can be sent to another
/// thread. To cancel it, drop it, or use its [`Cancel`] from elsewhere: the current call then ends with
/// [`Error::Cancelled`] before the next layer. After an error the stream ends.
///
/// Of [candidates](GenerationConfig::candidates) the stream is the one that wins: its first token comes when it can no
/// longer be overtaken, and with it, one by one, what it has said meanwhile.
///
/// ```
/// # use candle_core::Device;
/// use hybrid_attention::{Cancel, Error, GenerationConfig, HybridModel};
///
/// # fn main() -> hybrid_attention::Result<()> {
/// let model = HybridModel::tiny(&Device::Cpu)?;
/// let cancel = Cancel::default();
/// let stream = model.stream("Leo gave everything to Ida.", &GenerationConfig::default())?;
/// let mut stream = stream.cancel(cancel.clone()).on_progress(|progress| println!("{progress:?}"));
/// assert!(matches!(stream.next(), Some(Ok(_))));
/// cancel.cancel();
/// assert!(matches!(stream.next(), Some(Err(Error::Cancelled))));
/// assert!(stream.next().is_none());
/// # Ok(())
/// # }
/// ```
pub struct TokenStream<'c> {
    conversation: Held<'c>,
    decoder: Decoder,
    writer: Writer,
    next: Next,
    kept: usize,
    prompt_logprobs: bool,
    progress: Box<dyn FnMut(Progress) + Send + 'c>,
    /// The candidates, if there are several.
    race: Option<Box<Race<'c>>>,
    /// What guesses ahead, if anything does.
    ahead: Option<Ahead>,
    /// What the user said, for a turn of a conversation.
    said: Option<Message>,
}

/// Where the next logits come from.
#[derive(Debug)]
enum Next {
    /// The prompt, which has yet to be read.
    Prompt,
    /// They came with the prompt.
    Logits(Vec<f32>),
    /// A generated token that has not run yet.
    Token(u32),
    /// Candidates of which none has won yet.
    Race,
    /// Nowhere yet: the one that won has said this meanwhile.
    Said(VecDeque<Token>),
    /// Nowhere: a step failed, and with it the stream.
    Nothing,
}

impl<'c> TokenStream<'c> {
    /// Checks everything that can be checked before the model runs. Without a `conversation` the answer
    /// stands on its own.
    pub(crate) fn new(
        source: &Arc<Source>,
        prompt: &Prompt,
        config: &GenerationConfig,
        conversation: Option<&'c mut Conversation>,
    ) -> Result<Self> {
        let transformer = source.model.decoder();
        let prompt = source.encode(prompt)?;
        let mut writer = Writer::new(source, config, &prompt.ids)?;
        let (mind, total) = (source.mind(config, &prompt)?, prompt.ids.len());
        transformer.check_context(total)?;
        transformer.check_ids(&prompt.ids)?;
        let mut conversation = match conversation {
            Some(lent) => {
                transformer.check_cache(lent.cache())?;
                if total > lent.capacity() {
                    let (of, capacity) = ("the conversation", lent.capacity());
                    return Err(Error::ContextFull { of, capacity, requested: total });
                }
                Held::Lent(lent)
            }
            None => {
                let context = transformer.config().max_position_embeddings;
                let capacity = total.saturating_add(config.max_tokens).min(context).max(total);
                Held::Own(Box::new(Conversation::new(&source.pool, capacity)?))
            }
        };
        let race = match &config.candidates {
            None => None,
            Some(candidates) => {
                candidates.check(mind.thinking())?;
                let cache = conversation.get().cache();
                let end = total.saturating_add(config.max_tokens).min(cache.capacity());
                candidates.check_room(cache, total..end, mind.span().start)?;
                Some(Box::new(Race::new(candidates, config)))
            }
        };
        let decoder = Decoder::new(mind, prompt);
        let ahead = match &config.speculate {
            Some(how) if race.is_none() => Ahead::new(how, &decoder, &writer.answer.prompt_ids),
            _ => None,
        };
        writer.answer.speculated = ahead.is_some().then(Speculated::default);
        Ok(Self {
            conversation,
            race,
            ahead,
            decoder,
            writer,
            next: Next::Prompt,
            kept: 0,
            prompt_logprobs: config.prompt_logprobs,
            progress: Box::new(|_| ()),
            said: None,
        })
    }

    /// As a turn of its conversation, which adds it to its messages when the answer has ended.
    pub(crate) fn turn(mut self, said: Message) -> Self {
        self.said = Some(said);
        self
    }

    /// The same stream, which stops when this is cancelled, or when its time is up.
    #[must_use]
    pub fn cancel(mut self, cancel: Cancel) -> Self {
        self.decoder.cancel(cancel);
        self
    }

    /// The same stream, which reports how far the work before the first token has come.
    #[must_use]
    pub fn on_progress(mut self, call: impl FnMut(Progress) + Send + 'c) -> Self {
        self.progress = Box::new(call);
        self
    }

    /// The same stream, whose [candidates](GenerationConfig::candidates) are judged by a function instead of their
    /// [`Score`](super::Score): the higher the better, and of several that are equal, that with the higher mean
    /// log-probability. It is called for each stub that is still there, in every round and at the end.
    ///
    /// ```
    /// # use candle_core::Device;
    /// use hybrid_attention::generate::Candidates;
    /// use hybrid_attention::{GenerationConfig, HybridModel};
    ///
    /// # fn main() -> hybrid_attention::Result<()> {
    /// let model = HybridModel::tiny(&Device::Cpu)?;
    /// let config = GenerationConfig::default().temperature(1.0).seed(3).max_tokens(8);
    /// let config = config.candidates(Candidates::samples(6).every(4));
    /// let stream = model.stream("The coin is in the jar.", &config)?;
    /// let brief = stream.score_by(|stub| Ok(-(stub.text.len() as f64)))?.collect_answer()?;
    /// # assert_eq!(brief.candidates.len(), 6);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error::Parameter`] where there are no candidates. An error of the function ends the stream, and so does a
    /// score that is not a number.
    pub fn score_by(mut self, score: impl FnMut(&Stub) -> Result<f64> + Send + 'c) -> Result<Self> {
        let Some(race) = &mut self.race else { return Err(no_candidates()) };
        race.own_score = Some(Box::new(score));
        Ok(self)
    }

    /// The same stream, whose [candidates](GenerationConfig::candidates) are held to what `key` expects of an answer to
    /// this prompt: by [`Score::Key`](super::Score::Key), and for [`Candidates::within`](super::Candidates::within).
    ///
    /// What is compared are the [states](crate::statistics::states) of prompt and answer, each read by itself, as the key's
    /// examples should have been; an end-of-sequence token does not count.
    ///
    /// ```
    /// # use candle_core::Device;
    /// use hybrid_attention::generate::{Candidates, Score};
    /// use hybrid_attention::statistics::{Example, Fingerprint, Key, KeyConfig, states};
    /// use hybrid_attention::{GenerationConfig, HybridModel};
    ///
    /// # fn main() -> hybrid_attention::Result<()> {
    /// let model = HybridModel::tiny(&Device::Cpu)?;
    /// let of = |ids: &[u32]| states(model.transformer(), ids, 0);
    /// let example = |n: u32| Ok(Example { input: of(&[n, n + 7, 9, n])?, output: of(&[n + 7, n])? });
    /// let examples = (3..40).map(example).collect::<hybrid_attention::Result<Vec<_>>>()?;
    /// let config = KeyConfig { pairs: vec![hybrid_attention::statistics::Pairs::Full], ..KeyConfig::default() };
    /// let key = Key::fit(&examples, &config, Fingerprint::of(model.transformer())?)?;
    ///
    /// let candidates = Candidates::samples(4).every(2).score(Score::Key);
    /// let config = GenerationConfig::default().temperature(1.0).seed(5).max_tokens(6).candidates(candidates);
    /// let answer = model.stream([11, 150, 12, 13], &config)?.key(&key.insist())?.collect_answer()?;
    /// # assert!(answer.candidates.iter().any(|stub| stub.deviation.is_some()));
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// [`Error::Parameter`] where there are no candidates, for a key of another model, one that
    /// [declines](Key::declines), and a prompt that is too short for its pairs.
    pub fn key(mut self, key: &Key) -> Result<Self> {
        let Some(race) = &mut self.race else { return Err(no_candidates()) };
        if key.declines() {
            let (mean, variance) = (key.mean_r2(), key.variance_r2());
            let expected = "one that explains some of the answers held out from it, or insists";
            let got = format!("an R² of {mean:.3} for means and {variance:.3} for variances");
            return Err(Error::parameter("key", expected, got));
        }
        let model = self.decoder.mind().model().clone();
        Fingerprint::of(model.decoder())?.check("key", key.fingerprint())?;
        let layer = key.layer();
        let states = move |ids: &[u32]| states(model.decoder(), ids, layer);
        let input = Summary::of(&states(&self.writer.answer.prompt_ids)?, key.pairs())?;
        let intended = key.intended(&input)?;
        race.deviation = Some(Box::new(move |stub| {
            let ends = matches!(stub.stop, Some(StopReason::Eos | StopReason::StopId));
            let said = stub.ids.len() - usize::from(ends && !stub.ids.is_empty());
            match stub.ids.get(..said).unwrap_or(&[]) {
                [] | [_] => Ok(f64::INFINITY), // no pairs
                ids => intended.deviation(&Summary::of(&states(ids)?, Pairs::Full)?),
            }
        }));
        Ok(self)
    }

    /// The same stream, which tells of its [candidates](GenerationConfig::candidates) whenever some of them are
    /// dropped, and when one has won.
    #[must_use]
    pub fn on_candidates(mut self, call: impl FnMut(&[Stub]) + Send + 'c) -> Self {
        if let Some(race) = &mut self.race {
            race.told = Box::new(call);
        }
        self
    }

    /// The [candidates](GenerationConfig::candidates) as they were when they were judged last; none where there is
    /// only the answer.
    #[must_use]
    pub fn candidates(&self) -> &[Stub] {
        self.race.as_ref().map_or(&[], |race| &race.stubs)
    }

    /// The prompt as the model reads it.
    #[must_use]
    pub fn prompt_ids(&self) -> &[u32] {
        &self.writer.answer.prompt_ids
    }

    /// How many of the prompt's tokens were in the conversation's cache already, or came with
    /// [documents](Prompt::document), and did not run again; 0 before the prompt has been read.
    #[must_use]
    pub fn kept(&self) -> usize {
        self.kept
    }

    /// The log-probability of each prompt token, once it has been read; see [`Answer::prompt_logprobs`].
    #[must_use]
    pub fn prompt_logprobs(&self) -> Option<&[Option<f32>]> {
        self.writer.answer.prompt_logprobs.as_deref()
    }

    /// What thinking has done so far; see [`Answer::traces`].
    #[must_use]
    pub fn traces(&self) -> &[Trace] {
        &self.writer.answer.traces
    }

    /// Why the answer ended; `None` while it has not, and where an error ended it.
    #[must_use]
    pub fn stop(&self) -> Option<StopReason> {
        match self.next {
            Next::Prompt | Next::Nothing | Next::Race | Next::Said(_) => None,
            Next::Logits(_) | Next::Token(_) => self.writer.stop,
        }
    }

    /// How guesses have fared so far; see [`Answer::speculated`].
    #[must_use]
    pub fn speculated(&self) -> Option<Speculated> {
        self.writer.answer.speculated
    }

    /// Where the time has gone so far.
    #[must_use]
    pub fn seconds(&self) -> Seconds {
        self.writer.answer.seconds
    }

    /// Runs to the end and returns the whole answer, including tokens already taken from the stream.
    ///
    /// # Errors
    /// The first error of the stream; [`Error::StreamFailed`] when it was returned before.
    pub fn collect_answer(mut self) -> Result<Answer> {
        self.read_prompt()?;
        for token in &mut self {
            token?;
        }
        let answer = self.writer.finish()?;
        let candidates = self.race.map(|race| race.stubs).unwrap_or_default();
        Ok(Answer { candidates, ..answer })
    }

    /// Thinks about the prompt and reads it, if that has not been done: what the first call of `next`
    /// does by itself. Returns how many of the prompt's tokens were in the conversation's cache already.
    ///
    /// # Errors
    /// As those of the stream, which then ends; [`Error::StreamFailed`] when an error has ended it
    /// before.
    pub fn read_prompt(&mut self) -> Result<usize> {
        match self.next {
            Next::Logits(_) | Next::Token(_) | Next::Race | Next::Said(_) => return Ok(self.kept),
            Next::Nothing => return Err(Error::StreamFailed),
            Next::Prompt => self.next = Next::Nothing,
        }
        let Self { conversation, decoder, writer, progress, .. } = self;
        if let Some(race) = &mut self.race {
            let (conversation, prompt_logprobs) = (conversation.get(), self.prompt_logprobs);
            let start = Start { decoder, writer, conversation, prompt_logprobs, progress };
            self.kept = race.read(start)?;
            self.next = Next::Race;
            return Ok(self.kept);
        }
        let read = decoder.read(self.prompt_logprobs, conversation.get(), progress)?;
        self.kept = read.kept;
        self.next = Next::Logits(writer.begin(read));
        Ok(self.kept)
    }

    fn advance(&mut self) -> Result<Token> {
        if let Next::Race = self.next {
            self.next = Next::Nothing;
            self.next = Next::Said(self.race()?);
        }
        let logits = match std::mem::replace(&mut self.next, Next::Nothing) {
            Next::Logits(logits) => logits,
            Next::Token(id) => self.step(id)?,
            Next::Said(mut said) => {
                let token = said.pop_front().ok_or(Error::StreamFailed)?;
                self.next = match said.is_empty() {
                    true => Next::Token(token.id),
                    false => Next::Said(said),
                };
                self.end_turn()?;
                return Ok(token);
            }
            Next::Prompt | Next::Nothing | Next::Race => return Err(Error::StreamFailed),
        };
        let token = self.writer.write(&logits, self.conversation.get().has_room())?;
        self.next = Next::Token(token.id);
        self.end_turn()?;
        Ok(token)
    }

    /// The logits after a token that was drawn.
    fn step(&mut self, id: u32) -> Result<Vec<f32>> {
        let Self { conversation, decoder, writer, ahead, .. } = self;
        let (conversation, left) = (conversation.get(), writer.left());
        let Answer { traces, seconds, speculated, .. } = &mut writer.answer;
        if let Some(ahead) = ahead
            && let Some(logits) = ahead.step(id, left, decoder, conversation, speculated)?
        {
            return Ok(logits);
        }
        decoder.step(id, conversation, traces, seconds)
    }

    /// Lets the candidates write until one has won, which takes the place of the answer. Returns what it has said.
    fn race(&mut self) -> Result<VecDeque<Token>> {
        let Some(race) = &mut self.race else { return Err(Error::StreamFailed) };
        let transformer = self.decoder.transformer();
        let (winner, said) = race.run(transformer, self.decoder.cancelled_by())?;
        let Lane { decoder, writer, conversation } = winner;
        let seconds = self.writer.answer.seconds;
        (self.decoder, self.writer) = (decoder, writer);
        self.writer.answer.seconds = seconds;
        self.conversation.get().continue_as(conversation);
        Ok(said.into())
    }

    /// What is left to be done when the answer has ended.
    fn end_turn(&mut self) -> Result<()> {
        if self.stop().is_none() {
            return Ok(());
        }
        self.conversation.get().drop_guesses()?;
        if let Some(race) = &mut self.race {
            race.complete(&self.writer);
        }
        if let Some(said) = self.said.take() {
            let answer = Message::assistant(self.writer.answer.text.clone());
            self.conversation.get().messages.extend([said, answer]);
        }
        Ok(())
    }
}

impl Iterator for TokenStream<'_> {
    type Item = Result<Token>;

    fn next(&mut self) -> Option<Self::Item> {
        if let Next::Nothing = self.next {
            return None;
        }
        if let Err(error) = self.read_prompt() {
            return Some(Err(error));
        }
        if self.stop().is_some() {
            return None;
        }
        let (start, thought) = (Instant::now(), self.writer.answer.seconds.think);
        let token = self.advance();
        let seconds = &mut self.writer.answer.seconds;
        seconds.decode += seconds_since(start) - (seconds.think - thought);
        Some(token)
    }
}

fn no_candidates() -> Error {
    Error::parameter("candidates", "some to be judged", "none")
}

impl fmt::Debug for TokenStream<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TokenStream")
            .field("conversation", &self.conversation)
            .field("answer", &self.writer.answer)
            .field("next", &self.next)
            .finish_non_exhaustive()
    }
}
