//! How texts become vectors.

use std::fmt::Display;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::apart;
use crate::error::{Error, Result};
use crate::model::Sight;
use crate::pooling::Pooling;
use crate::refine::Remove;
use crate::thought::Thinking;

/// How [`HybridModel::embed`](crate::HybridModel::embed) turns a text into one vector.
///
/// What is not set here is as the checkpoint says: in the `embed` object of its `hybrid.json`
/// ([`EmbedConfig::from_hybrid_json`]), in the files of sentence-transformers beside it
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
    pub(crate) normalize: Option<bool>,
    pub(crate) thinking: Option<Thinking>,
    pub(crate) batch_tokens: usize,
    pub(crate) instruction: Option<String>,
    pub(crate) max_tokens: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    layer: Option<usize>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) remove: Option<Box<Remove>>,
}

impl Default for EmbedConfig {
    fn default() -> Self {
        Self {
            pooling: None,
            sight: None,
            normalize: None,
            thinking: None,
            batch_tokens: Self::BATCH_TOKENS,
            instruction: None,
            max_tokens: None,
            layer: None,
            remove: None,
        }
    }
}

impl EmbedConfig {
    /// The default of [`batch_tokens`](Self::batch_tokens).
    pub const BATCH_TOKENS: usize = 1024;

    /// The most bytes of an instruction that comes from a `hybrid.json`: it is read again with every text.
    pub const MOST_INSTRUCTION_FROM_FILE: usize = 4096;

    /// Reads the `embed` object of a `hybrid.json`, the rest of which is about answers
    /// ([`Thinking::from_json`]): these settings as JSON, where what is left out has its default; all
    /// defaults where there is no such object.
    ///
    /// What it asks for has a budget, as all of the file has, which is checked here: thinking that costs no more
    /// than [`Thinking::MOST_READS_FROM_FILE`], an instruction of at most
    /// [`MOST_INSTRUCTION_FROM_FILE`](Self::MOST_INSTRUCTION_FROM_FILE) bytes, and nothing said of
    /// [`batch_tokens`](Self::batch_tokens), which is for the machine and not for the model, nor of
    /// [`layer`](Self::layer) and [`remove`](Self::remove), which could not be undone.
    ///
    /// ```
    /// use hybrid_attention::{EmbedConfig, Pooling, Sight};
    ///
    /// let own = EmbedConfig::from_hybrid_json(r#"{
    ///     "passes": 4,
    ///     "embed": {"instruction": "query: ", "pooling": "mean", "sight": "bidirectional"}
    /// }"#)?;
    /// let same = EmbedConfig::default().instruction("query: ").pooling(Pooling::Mean);
    /// assert_eq!(own, same.sight(Sight::Bidirectional));
    /// # Ok::<_, hybrid_attention::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Malformed`] for text that is no JSON object, or names a setting that does not exist;
    /// [`Error::Parameter`] for a value outside its range or budget.
    pub fn from_hybrid_json(text: &str) -> Result<Self> {
        let malformed =
            |error: &dyn Display| Error::malformed("JSON text of an EmbedConfig", error);
        let (_, own): (Map<String, Value>, _) =
            apart::read(text, "embed").map_err(|error| malformed(&error))?;
        let own: Self = match own {
            None => return Ok(Self::default()),
            Some(own @ Value::Object(_)) => serde_json::from_value(own)
                .map_err(|error| malformed(&format_args!("embed: {error}")))?,
            Some(_) => return Err(malformed(&"embed: expected an object")),
        };
        own.validate()?;
        for (name, is_set) in [
            ("batch_tokens", own.batch_tokens != Self::BATCH_TOKENS),
            ("layer", own.layer.is_some()),
            ("remove", own.remove.is_some()),
        ] {
            if is_set {
                let expected = "nothing, as the default of a checkpoint";
                return Err(Error::parameter(name, expected, "a value"));
            }
        }
        let bytes = own.instruction.as_ref().map_or(0, String::len);
        if bytes > Self::MOST_INSTRUCTION_FROM_FILE {
            let most = Self::MOST_INSTRUCTION_FROM_FILE;
            let expected = format!("at most {most} bytes, as the default of a checkpoint");
            return Err(Error::parameter("instruction", expected, bytes));
        }
        own.thinking.as_ref().map_or(Ok(()), Thinking::check_as_default)?;
        Ok(own)
    }

    /// Checks what does not depend on the model.
    ///
    /// # Errors
    /// [`Error::Parameter`], also for a [layer](Self::layer) that is not that of what is to be
    /// [removed](Self::remove), and [`Error::Refinement`], as [`Thinking::validate`] for its thinking.
    pub fn validate(&self) -> Result<()> {
        for (name, value) in
            [("batch_tokens", Some(self.batch_tokens)), ("max_tokens", self.max_tokens)]
        {
            if value == Some(0) {
                return Err(Error::parameter(name, "at least 1", 0));
            }
        }
        self.reads_to()?;
        self.thinking.as_ref().map_or(Ok(()), Thinking::validate)
    }

    /// The layer whose entering states are pooled; `None` for what leaves the final norm.
    pub(crate) fn reads_to(&self) -> Result<Option<usize>> {
        let of = self.remove.as_deref().map(Remove::layer);
        match (of, self.layer) {
            (Some(of), Some(layer)) if of != self.layer => {
                let of = of.map_or("what leaves the final norm".into(), |of| format!("layer {of}"));
                let expected = format!("vectors of layer {layer} to remove something from");
                Err(Error::parameter("remove", expected, of))
            }
            (of, layer) => Ok(layer.or(of.flatten())),
        }
    }

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

    /// Whether vectors are scaled to length 1. Default: as the checkpoint's `hybrid.json` says, else yes.
    #[must_use]
    pub fn normalize(mut self, normalize: bool) -> Self {
        self.normalize = Some(normalize);
        self
    }

    /// How to think about a text before it is read. Default: as the `embed` object of the checkpoint's
    /// `hybrid.json` says, else not at all; the rest of that file is about answers.
    #[must_use]
    pub fn thinking(mut self, thinking: Thinking) -> Self {
        self.thinking = Some(thinking);
        self
    }

    /// Tokens that run side by side, at least 1: texts are sorted by their length and packed, without
    /// padding, until they hold this many; one that is longer runs alone. More need more memory, and on a GPU
    /// may be faster. Default: [`BATCH_TOKENS`](Self::BATCH_TOKENS).
    #[must_use]
    pub fn batch_tokens(mut self, batch_tokens: usize) -> Self {
        self.batch_tokens = batch_tokens;
        self
    }

    /// What is put in front of each text: the text's tokens see it, but its own vectors, and that of BOS,
    /// are left out of the pooling (GritLM, Muennighoff 2024; LLM2Vec, BehnamGhader 2024). An empty
    /// instruction leaves out BOS alone. Default: as the checkpoint's `hybrid.json` says, else
    /// the default prompt that sentence-transformers would use, if there is one, and whether it is pooled as its
    /// pooling module says; else nothing is put in front or left out.
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

    /// Pools the states that enter this layer, `0` (embeddings) to as many layers as there are, and runs no layer
    /// from there on: vectors of the residual stream itself, which has not passed the final norm. Not for embedding
    /// that [thinks](Self::thinking). Default: what leaves the last layer, behind the final norm.
    #[must_use]
    pub fn layer(mut self, layer: usize) -> Self {
        self.layer = Some(layer);
        self
    }

    /// Takes what is generic out of the vectors, before they are scaled: a mean and directions that
    /// [`Generic::remove`](crate::statistics::Generic::remove) found. They are then of the
    /// [layer](Self::layer) that these are of. Whether this model found them is checked once for each call, which
    /// takes as long as a text of 16 tokens. Default: nothing is taken out.
    #[must_use]
    pub fn remove(mut self, remove: Remove) -> Self {
        self.remove = Some(Box::new(remove));
        self
    }
}
