//! What answers are generated from.

use candle_core::DType;

use super::config::GenerationConfig;
use super::prompt::{EncodedPrompt, Prompt};
use crate::embed::EmbedDefaults;
use crate::error::{Error, Result};
use crate::model::KvPool;
use crate::thought::{Thinking, ThoughtLoop, ThoughtModel};
use crate::tokenizer::Tokenizer;

/// A model and what its checkpoint says about using it. Every part is cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Source {
    pub(crate) model: ThoughtModel,
    pub(crate) tokenizer: Option<Tokenizer>,
    /// What the checkpoint's tokenizer asks for that is not computed here, and so why there is none.
    pub(crate) untokenized: Option<(String, String)>,
    /// The checkpoint's own way to generate.
    pub(crate) defaults: GenerationConfig,
    /// Its end-of-sequence tokens.
    pub(crate) eos_ids: Vec<u32>,
    /// Its own thinking settings.
    pub(crate) thinking: Thinking,
    /// What it says about embedding.
    pub(crate) embed: EmbedDefaults,
    /// Where caches take their memory from.
    pub(crate) pool: KvPool,
}

impl Source {
    /// With another model of the same checkpoint, whose keys and values differ.
    pub(crate) fn with_model(&self, model: ThoughtModel) -> Result<Self> {
        let pool = model.decoder().new_pool(self.pool.dtype(), self.pool.budget_bytes())?;
        Ok(Self { model, pool, ..self.clone() })
    }

    /// With caches of another type, or another budget in bytes.
    pub(crate) fn with_pool(&self, dtype: DType, budget: usize) -> Result<Self> {
        let pool = self.model.decoder().new_pool(dtype, budget)?;
        Ok(Self { pool, ..self.clone() })
    }

    /// The prompt as the model takes it.
    pub(crate) fn encode(&self, prompt: &Prompt) -> Result<EncodedPrompt> {
        prompt.encode(self.tokenizer.as_ref()).map_err(|error| self.why(error))
    }

    /// What turns a text into token ids.
    pub(crate) fn tokenizer(&self) -> Result<&Tokenizer> {
        let missing = || self.why(Error::NoTokenizer { needed_for: "a text prompt" });
        self.tokenizer.as_ref().ok_or_else(missing)
    }

    /// For want of a tokenizer: what the checkpoint has instead.
    fn why(&self, error: Error) -> Error {
        match (error, &self.untokenized) {
            (Error::NoTokenizer { .. }, Some((what, got))) => Error::unsupported(what, got),
            (error, _) => error,
        }
    }

    /// What thinks about a prompt as `config` says.
    pub(super) fn mind(
        &self,
        config: &GenerationConfig,
        prompt: &EncodedPrompt,
    ) -> Result<ThoughtLoop> {
        prompt.thinking(self.thinking(config))?.on(&self.model)
    }

    /// What `config` says of thinking, or else the checkpoint.
    pub(crate) fn thinking<'a>(&'a self, config: &'a GenerationConfig) -> &'a Thinking {
        config.thinking.as_ref().unwrap_or(&self.thinking)
    }
}
