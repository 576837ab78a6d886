//! How texts become vectors.

use serde::{Deserialize, Serialize};

use crate::model::Sight;
use crate::pooling::Pooling;
use crate::thought::Thinking;

/// How [`HybridModel::embed`](crate::HybridModel::embed) turns a text into one vector.
///
/// What is not set here is as the checkpoint says: in the files of sentence-transformers beside it
/// (`modules.json`, the pooling module's `config.json`, `sentence_bert_config.json`,
/// `config_sentence_transformers.json`), or by an adapter that is active in
/// [`AdapterScope::Thinking`](crate::AdapterScope::Thinking) alone, which was trained to read both ways. A
/// checkpoint that says nothing is read causally, and the vectors of its tokens are averaged with weights
/// that grow with the position. Weights that were never trained to see what comes next make poor vectors
/// when they do: of SmolLM2-135M's vectors for 20 pairs of paraphrases (`tests/paraphrases.rs`), 34 of 40 are
/// nearest to their own pair in this way, and 13 of 40 when it reads both ways and takes the plain mean.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EmbedConfig {
    pub(crate) pooling: Option<Pooling>,
    pub(crate) sight: Option<Sight>,
    pub(crate) normalize: bool,
    pub(crate) thinking: Thinking,
    pub(crate) batch_size: usize,
    pub(crate) instruction: Option<String>,
    pub(crate) max_tokens: Option<usize>,
}

impl Default for EmbedConfig {
    fn default() -> Self {
        Self {
            pooling: None,
            sight: None,
            normalize: true,
            thinking: Thinking::none(),
            batch_size: 8,
            instruction: None,
            max_tokens: None,
        }
    }
}

impl EmbedConfig {
    /// How the tokens' vectors become one. Default: as the checkpoint says, else [`Pooling::Mean`] where
    /// tokens see what comes after them, and [`Pooling::WeightedMean`] where they do not.
    #[must_use]
    pub fn pooling(mut self, pooling: Pooling) -> Self {
        self.pooling = Some(pooling);
        self
    }

    /// Whether tokens see what comes after them. Default: as the checkpoint says, else [`Sight::Causal`].
    #[must_use]
    pub fn sight(mut self, sight: Sight) -> Self {
        self.sight = Some(sight);
        self
    }

    /// Whether vectors are scaled to length 1. Default: yes.
    #[must_use]
    pub fn normalize(mut self, normalize: bool) -> Self {
        self.normalize = normalize;
        self
    }

    /// How to think about a text before it is read. Default: not at all; a checkpoint's `hybrid.json`
    /// is about answers.
    #[must_use]
    pub fn thinking(mut self, thinking: Thinking) -> Self {
        self.thinking = thinking;
        self
    }

    /// Texts that run side by side, at least 1. Default: 8.
    #[must_use]
    pub fn batch_size(mut self, batch_size: usize) -> Self {
        self.batch_size = batch_size;
        self
    }

    /// What is put in front of each text: the text's tokens see it, but its own vectors, and that of BOS,
    /// are left out of the pooling (GritLM, Muennighoff 2024; LLM2Vec, BehnamGhader 2024). An empty
    /// instruction leaves out BOS alone. Default: the checkpoint's default prompt, if there is one, and
    /// whether it is pooled as its pooling module says; else nothing is put in front or left out.
    ///
    /// ```
    /// use candle_core::Device;
    /// use hybrid_attention::{EmbedConfig, HybridModel, Sight};
    ///
    /// # fn main() -> hybrid_attention::Result<()> {
    /// let model = HybridModel::tiny(&Device::Cpu)?; // or a GritLM
    /// let both_ways = EmbedConfig::default().sight(Sight::Bidirectional);
    /// let query = both_ways.clone().instruction("The coin is in the jar. ");
    /// let vectors = model.embed(&["Who has the coin"], &query)?;
    /// assert_eq!(vectors.dims2()?.0, 1);
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn instruction(mut self, instruction: impl Into<String>) -> Self {
        self.instruction = Some(instruction.into());
        self
    }

    /// Cuts each text, its instruction included, to this many tokens, at least 1; an EOS that the
    /// tokenizer adds is kept. Default: as the checkpoint says (`max_seq_length`), else none is cut, and
    /// one that is longer than the model's context is an error.
    #[must_use]
    pub fn max_tokens(mut self, max_tokens: usize) -> Self {
        self.max_tokens = Some(max_tokens);
        self
    }
}
