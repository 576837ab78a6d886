//! What stays in the cache between two prompts.

use candle_core::DType;

use crate::error::Result;
use crate::model::{KvCache, Layout, Transformer};

/// What one conversation keeps from turn to turn: a cache and the tokens in it.
///
/// A new prompt that begins like the tokens already here runs only from where it departs.
#[derive(Debug)]
pub struct Conversation {
    pub(super) cache: KvCache,
    /// The tokens whose plain keys and values are in the cache; none when what is there was
    /// thought about, because it then depends on the whole of its prompt.
    pub(super) ids: Vec<u32>,
}

impl Conversation {
    pub(crate) fn new(transformer: &Transformer, capacity: usize, dtype: DType) -> Result<Self> {
        let cache = transformer.new_cache_as(&Layout::dense(1, 1), capacity, dtype)?;
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

    /// Its keys and values: what they are kept as, and how many bytes are set aside for them.
    #[must_use]
    pub fn cache(&self) -> &KvCache {
        &self.cache
    }

    /// Forgets everything.
    pub fn reset(&mut self) {
        self.cache.reset();
        self.ids.clear();
    }

    /// Keeps what `prompt` begins with, all but its last token at most, and forgets the rest.
    /// Gives how many tokens are kept.
    pub(super) fn rewind(&mut self, prompt: &[u32]) -> usize {
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
