//! What stays in the cache between two prompts.

use crate::error::Result;
use crate::model::{KvCache, KvPool};
use crate::tokenizer::Message;

/// What one conversation keeps from turn to turn: its messages, a cache and the tokens in it.
///
/// Of a new prompt that begins like the tokens already here, only the rest is run.
///
/// ```no_run
/// # use candle_core::{DType, Device};
/// use hybrid_attention::{GenerationConfig, HybridModel};
///
/// # fn main() -> hybrid_attention::Result<()> {
/// let model = HybridModel::from_folder("Mistral-7B-Instruct-v0.3", DType::BF16, &Device::Cpu)?;
/// let mut conversation = model.conversation(4096)?;
/// for question in ["Why is the sky blue?", "And in the evening?"] {
///     for token in model.say(&mut conversation, question, &GenerationConfig::default())? {
///         print!("{}", token?.text);
///     }
/// }
/// assert_eq!(conversation.messages().len(), 4);
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Conversation {
    pub(super) cache: KvCache,
    /// The tokens whose plain keys and values are in the cache; empty when its contents came from
    /// thinking, because then they depend on the whole prompt.
    pub(super) ids: Vec<u32>,
    /// How many tokens at the end of the cache are guesses of which it is not known yet whether they are right. An
    /// answer that is dropped in the middle may leave some.
    guesses: usize,
    pub(super) messages: Vec<Message>,
}

impl Conversation {
    pub(crate) fn new(pool: &KvPool, capacity: usize) -> Result<Self> {
        let (ids, messages) = (Vec::new(), Vec::new());
        Ok(Self { cache: pool.new_cache(capacity)?, ids, guesses: 0, messages })
    }

    /// What has been said so far: in [`HybridModel::say`](crate::HybridModel::say) and its answers, and
    /// whatever was [added](Self::push).
    #[must_use]
    pub fn messages(&self) -> &[Message] {
        &self.messages
    }

    /// Adds a message, such as a system prompt.
    pub fn push(&mut self, message: Message) {
        self.messages.push(message);
    }

    /// A second conversation that continues from here. The two share the contents of the cache until one
    /// of them writes to it.
    #[must_use]
    pub fn fork(&self) -> Self {
        Self { messages: self.messages.clone(), ..self.bare_fork() }
    }

    /// A [`fork`](Self::fork) that has heard no messages.
    pub(super) fn bare_fork(&self) -> Self {
        let (cache, ids, guesses) = (self.cache.fork(), self.ids.clone(), self.guesses);
        Self { cache, ids, guesses, messages: Vec::new() }
    }

    /// Goes on from where a [`bare_fork`](Self::bare_fork) has come to.
    pub(super) fn continue_as(&mut self, fork: Self) {
        (self.cache, self.ids, self.guesses) = (fork.cache, fork.ids, fork.guesses);
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

    /// Its keys and values: the type they are kept in, and how many bytes they take.
    #[must_use]
    pub fn cache(&self) -> &KvCache {
        &self.cache
    }

    /// Forgets everything.
    pub fn reset(&mut self) {
        self.forget();
        self.messages.clear();
    }

    /// Forgets what is in the cache.
    pub(super) fn forget(&mut self) {
        self.cache.reset();
        self.ids.clear();
        self.guesses = 0;
    }

    /// Whether there is room to run another token.
    pub(super) fn has_room(&self) -> bool {
        self.room() > 0
    }

    /// How many more tokens there is room to run.
    pub(super) fn room(&self) -> usize {
        self.cache.capacity().saturating_sub(self.known())
    }

    /// How many tokens of the cache are no guesses.
    fn known(&self) -> usize {
        self.cache.len().saturating_sub(self.guesses)
    }

    /// Records that the last tokens that have run are guesses.
    pub(super) fn guessed(&mut self, guesses: usize) {
        self.guesses = guesses;
    }

    /// Records that the first of the guesses is right.
    pub(super) fn confirm(&mut self) {
        self.guesses = self.guesses.saturating_sub(1);
    }

    /// Forgets the guesses. No window has dropped what the next token would see: the token before them ran with them.
    pub(super) fn drop_guesses(&mut self) -> Result<()> {
        self.cache.truncate(self.known())?;
        self.guesses = 0;
        Ok(())
    }

    /// Keeps the tokens that `prompt` begins with too, all but its last token at most, and forgets the
    /// rest. Returns how many tokens are kept.
    pub(super) fn rewind(&mut self, prompt: &[u32]) -> usize {
        let same = self.ids.iter().zip(prompt).take_while(|(old, new)| old == new).count();
        let keep = same.min(prompt.len().saturating_sub(1));
        self.guesses = 0; // as they come after all of `ids`
        if self.cache.truncate(keep).is_err() {
            // The window has dropped what would be needed: start over.
            self.forget();
        }
        self.ids.truncate(keep);
        self.ids.len()
    }
}
