//! The model as its user meets it: weights, tokenizer and defaults of one checkpoint together.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use serde::{Deserialize, Serialize};

use crate::adapter::Adapter;
use crate::config::Config;
use crate::error::{Error, Result};
use crate::generate::{
    Answer, Conversation, GenerationConfig, Progress, Prompt, Source, TokenStream,
};
use crate::load::{Checkpoint, WeightType};
use crate::model::{Layout, Mind, Pass, Sight, Transformer};
use crate::pooling::{self, Pooling};
use crate::thought::{Text, Thinking, Thoughts};
use crate::tokenizer::{Message, Tokenizer};

/// A Mistral that can think before it answers.
///
/// It is `Send + Sync` and takes `&self` everywhere: one copy serves any number of threads, each
/// answer having its own cache.
///
/// ```
/// use candle_core::{DType, Device};
/// use hybrid_attention::{GenerationConfig, HybridModel};
///
/// # fn main() -> hybrid_attention::Result<()> {
/// # let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/src/tiny");
/// let model = HybridModel::from_folder(folder, DType::BF16, &Device::Cpu)?; // or a Mistral 7B
/// let config = GenerationConfig::default().max_tokens(3);
/// let answer = model.generate("The coin is in the jar. The jar is in the chest.", &config)?;
/// assert_eq!(answer.ids.len(), answer.logprobs.len());
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct HybridModel {
    transformer: Transformer,
    tokenizer: Option<Tokenizer>,
    defaults: GenerationConfig,
    eos_ids: Vec<u32>,
    thinking: Thinking,
    cache_dtype: DType,
}

/// How [`HybridModel::embed`] makes one vector of a text.
///
/// The default reads each text once in both directions and averages its tokens' vectors.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct EmbedConfig {
    pooling: Pooling,
    sight: Sight,
    normalize: bool,
    thinking: Thinking,
    batch_size: usize,
}

impl Default for EmbedConfig {
    fn default() -> Self {
        Self {
            pooling: Pooling::Mean,
            sight: Sight::Bidirectional,
            normalize: true,
            thinking: Thinking::none(),
            batch_size: 8,
        }
    }
}

impl EmbedConfig {
    /// How the tokens' vectors become one. Default [`Pooling::Mean`].
    #[must_use]
    pub fn pooling(mut self, pooling: Pooling) -> Self {
        self.pooling = pooling;
        self
    }

    /// Whether tokens see what comes after them. Default [`Sight::Bidirectional`].
    #[must_use]
    pub fn sight(mut self, sight: Sight) -> Self {
        self.sight = sight;
        self
    }

    /// Whether vectors are scaled to length 1. Default yes.
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

    /// Texts that run side by side, at least 1. Default 8.
    #[must_use]
    pub fn batch_size(mut self, batch_size: usize) -> Self {
        self.batch_size = batch_size;
        self
    }
}

impl HybridModel {
    /// Loads a folder as it is downloaded from a hub: `config.json` with `model.safetensors` or its
    /// shards, or Mistral's own `params.json` with `consolidated.safetensors`; `tokenizer.json`,
    /// `tokenizer_config.json` and `generation_config.json` where there are any.
    ///
    /// `weights` is what they are kept as: a `DType` (`F32`, `BF16` or `F16`), a `GgmlDType` to quantise
    /// them to as they are loaded, or [`WeightType::Stored`]. On the CPU everything is computed in `f32`
    /// whatever they are kept as.
    ///
    /// # Errors
    /// A folder that is not what it should be: see [`Checkpoint::open`],
    /// [`CheckpointWeights::finish`](crate::load::CheckpointWeights::finish),
    /// [`Tokenizer::from_folder`] and [`HybridModel::new`].
    pub fn from_folder(
        path: impl AsRef<Path>,
        weights: impl Into<WeightType>,
        device: &Device,
    ) -> Result<Self> {
        let checkpoint = Checkpoint::open(&path)?;
        if checkpoint.gguf_metadata().is_some() {
            let message = "a GGUF file, not a folder: HybridModel::from_gguf loads it";
            return Err(Error::malformed(path, message));
        }
        Self::from_checkpoint(&checkpoint, weights, device, |_, _| ())
    }

    /// Loads a GGUF file, its tokenizer and its chat template. With [`WeightType::Stored`], quantised
    /// weights stay quantised.
    ///
    /// # Errors
    /// As [`HybridModel::from_folder`].
    pub fn from_gguf(
        path: impl AsRef<Path>,
        weights: impl Into<WeightType>,
        device: &Device,
    ) -> Result<Self> {
        let checkpoint = Checkpoint::open(&path)?;
        if checkpoint.gguf_metadata().is_none() {
            let message = "a folder, not a GGUF file: HybridModel::from_folder loads it";
            return Err(Error::malformed(path, message));
        }
        Self::from_checkpoint(&checkpoint, weights, device, |_, _| ())
    }

    /// The small model that comes with this crate, in `f32`: a million parameters that were trained to
    /// think both ways about the stories of the flashback suite (`examples/flashback`), and speak of
    /// nothing else. It needs no files; `src/tiny` is where it was compiled from.
    ///
    /// ```
    /// use candle_core::Device;
    /// use hybrid_attention::{GenerationConfig, HybridModel, Prompt};
    ///
    /// let model = HybridModel::tiny(&Device::Cpu)?;
    /// let prompt = Prompt::default()
    ///     .context(
    ///         "Then Eva gave everything to Max. Earlier, Leo had handed everything to Ida. \
    ///          Before that, Max sent everything to Nora. By then, Ida left everything with Eva. \
    ///          Then Paul gave everything to Otto",
    ///     )
    ///     .plain(".\nWho has what Leo had?\nIt is with");
    /// let answer = model.generate(prompt, &GenerationConfig::default().max_tokens(1))?;
    /// assert_eq!(answer.text, " Nora"); // Leo, Ida, Eva, Max, Nora
    /// # Ok::<_, hybrid_attention::Error>(())
    /// ```
    ///
    /// # Errors
    /// When a device fails.
    pub fn tiny(device: &Device) -> Result<Self> {
        let config = Config::from_json(include_str!("tiny/config.json"))?;
        let weights = include_bytes!("tiny/model.safetensors");
        let weights = candle_core::safetensors::load_buffer(weights, device)?.into_iter();
        let mut weights = weights
            .map(|(name, tensor)| Ok((name, tensor.to_dtype(DType::F32)?)))
            .collect::<candle_core::Result<HashMap<_, _>>>()?;
        let tokenizer = Tokenizer::from_bytes(include_bytes!("tiny/tokenizer.json"))?;
        let thinking = Thinking::from_json(include_str!("tiny/hybrid.json"))?;
        let transformer = Transformer::new(&config, &mut weights)?;
        thinking.on(&transformer)?;
        Ok(Self { thinking, ..Self::new(transformer, Some(tokenizer))? })
    }

    /// Loads an opened checkpoint, telling `progress` how many of its bytes are read, of how many.
    ///
    /// # Errors
    /// As [`HybridModel::from_folder`].
    pub fn from_checkpoint(
        checkpoint: &Checkpoint,
        weights: impl Into<WeightType>,
        device: &Device,
        progress: impl FnMut(u64, u64),
    ) -> Result<Self> {
        // What costs little and may fail comes before the weights.
        let tokenizer = match checkpoint.gguf_metadata() {
            Some(metadata) => Tokenizer::from_gguf(metadata)?,
            None => Tokenizer::from_folder(checkpoint.path())?,
        };
        check_tokenizer(tokenizer.as_ref(), checkpoint.config())?;
        let said = checkpoint.generation_defaults()?;
        let vocab_size = checkpoint.config().vocab_size;
        if let Some(id) = said.eos_token_ids.iter().find(|&&id| id as usize >= vocab_size) {
            let expected = format!("less than the vocabulary of {vocab_size}");
            return Err(Error::config("eos_token_id of generation_config.json", expected, id));
        }

        let mut defaults = GenerationConfig::default();
        // transformers ignores the sampling values of a file that does not say `do_sample`.
        if said.do_sample == Some(true) {
            defaults = defaults
                .temperature(said.temperature.unwrap_or(1.0))
                .top_k(said.top_k.unwrap_or(50))
                .top_p(said.top_p.unwrap_or(1.0))
                .min_p(said.min_p.unwrap_or(0.0));
        }
        defaults = defaults.repetition_penalty(said.repetition_penalty.unwrap_or(1.0));
        defaults.validate().map_err(|error| {
            Error::malformed(checkpoint.path().join("generation_config.json"), error)
        })?;

        let (thinking_file, thinking) = match checkpoint.hybrid_json()? {
            Some((path, text)) => (path, Thinking::from_json(&text)),
            None => (PathBuf::new(), Ok(Thinking::none())),
        };
        let malformed = |error| match error {
            Error::Malformed { message, .. } => Error::malformed(&thinking_file, message),
            other => Error::malformed(&thinking_file, other),
        };
        let thinking = thinking.map_err(malformed)?;

        let mut weights = checkpoint.weights(weights, device).on_progress(progress);
        let transformer = Transformer::new(checkpoint.config(), &mut weights)?;
        weights.finish()?;
        thinking.on(&transformer).map_err(malformed)?;

        let mut model = Self::new(transformer, tokenizer)?;
        model.defaults = defaults;
        model.thinking = thinking;
        if !said.eos_token_ids.is_empty() {
            model.eos_ids = said.eos_token_ids;
        }
        Ok(model)
    }

    /// Puts a model together from its parts. Without a tokenizer, prompts are token ids.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] when the tokenizer has more tokens than the model has embeddings.
    pub fn new(transformer: Transformer, tokenizer: Option<Tokenizer>) -> Result<Self> {
        check_tokenizer(tokenizer.as_ref(), transformer.config())?;
        let eos = tokenizer.as_ref().and_then(Tokenizer::eos_token_id);
        let eos_ids = match transformer.config().eos_token_ids.as_slice() {
            [] => eos.into_iter().collect(),
            ids => ids.to_vec(),
        };
        let (defaults, thinking) = (GenerationConfig::default(), Thinking::none());
        let cache_dtype = transformer.dtype();
        Ok(Self { transformer, tokenizer, defaults, eos_ids, thinking, cache_dtype })
    }

    /// The model with a low-rank adapter that is active in one mind, or in both; more may follow. Give
    /// [`Mind::Thinking`] what was trained to read in both directions (LLM2Vec): thought passes and
    /// bidirectional [`embed`](Self::embed) then use it, and answers are decoded as ever.
    ///
    /// ```no_run
    /// # use candle_core::{DType, Device};
    /// # use hybrid_attention::{Adapter, HybridModel};
    /// use hybrid_attention::model::Mind;
    ///
    /// # fn main() -> hybrid_attention::Result<()> {
    /// let model = HybridModel::from_folder("Mistral-7B-v0.3", DType::BF16, &Device::Cpu)?;
    /// let adapter = Adapter::from_folder("both-ways-adapter", &Device::Cpu)?;
    /// let model = model.with_adapter(&adapter, Mind::Thinking)?;
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// As [`Transformer::adapted_for`].
    pub fn with_adapter(mut self, adapter: &Adapter, mind: Mind) -> Result<Self> {
        self.transformer = self.transformer.adapted_for(adapter, mind)?;
        Ok(self)
    }

    /// The model with caches that keep keys and values as `dtype`, those of its conversations and those
    /// of answers that stand alone. Default: the type of the residual stream, `F32` on the CPU; there,
    /// `BF16` and `F16` need half the memory, and rounding moves what is said a little. See
    /// [`Transformer::new_cache_as`].
    ///
    /// ```
    /// use candle_core::{DType, Device};
    /// use hybrid_attention::HybridModel;
    ///
    /// let model = HybridModel::tiny(&Device::Cpu)?;
    /// let bytes = model.conversation(256)?.cache().bytes();
    /// let model = model.with_cache_dtype(DType::BF16)?;
    /// assert_eq!(model.conversation(256)?.cache().bytes(), bytes / 2);
    /// # Ok::<_, hybrid_attention::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Parameter`] for a type that this device's caches cannot have.
    pub fn with_cache_dtype(mut self, dtype: DType) -> Result<Self> {
        self.transformer.check_cache_dtype(dtype)?;
        self.cache_dtype = dtype;
        Ok(self)
    }

    /// The blocks, to be driven by hand.
    #[must_use]
    pub fn transformer(&self) -> &Transformer {
        &self.transformer
    }

    /// The shapes of the model.
    #[must_use]
    pub fn config(&self) -> &Config {
        self.transformer.config()
    }

    /// The tokenizer, if the checkpoint came with one.
    #[must_use]
    pub fn tokenizer(&self) -> Option<&Tokenizer> {
        self.tokenizer.as_ref()
    }

    /// The tokens that end an answer.
    #[must_use]
    pub fn eos_ids(&self) -> &[u32] {
        &self.eos_ids
    }

    /// The checkpoint's own way to think, from its `hybrid.json`; not at all without one. Used
    /// wherever a [`GenerationConfig`] says nothing about thinking.
    #[must_use]
    pub fn thinking(&self) -> &Thinking {
        &self.thinking
    }

    /// The checkpoint's own way to generate: [`GenerationConfig::default`] with what its
    /// `generation_config.json` says.
    #[must_use]
    pub fn generation_config(&self) -> GenerationConfig {
        self.defaults.clone()
    }

    /// Thinks about a prompt as `config` says, and gives the refined thoughts,
    /// `(1, seq, hidden)`, and how far each pass moved them. Without passes these are the
    /// embeddings.
    ///
    /// # Errors
    /// An empty prompt, one that is too long for the model, text without a tokenizer, or settings
    /// outside their range.
    pub fn think(&self, prompt: impl Into<Prompt>, config: &GenerationConfig) -> Result<Thoughts> {
        let prompt = prompt.into().encode(self.tokenizer())?;
        config.validate()?;
        self.transformer.check_context(prompt.ids.len())?;
        let text = Text::new(&self.transformer, &prompt.ids, prompt.layout()?)?;
        let mind = config.chosen_thinking().unwrap_or(&self.thinking).on(&self.transformer)?;
        let z = mind.encode(&text, Pass::Causal(text.layout()))?;
        mind.think(&text, z, |done, total| {
            config.report(Progress::Think { done, total });
        })
    }

    /// Answers a prompt: [`HybridModel::stream`], collected.
    ///
    /// # Errors
    /// As [`HybridModel::stream`].
    pub fn generate(&self, prompt: impl Into<Prompt>, config: &GenerationConfig) -> Result<Answer> {
        self.stream(prompt, config)?.collect_answer()
    }

    /// Answers a prompt token by token. Dropping the stream cancels it.
    ///
    /// # Errors
    /// [`Error::EmptyPrompt`]; [`Error::ContextFull`] for a prompt longer than the model's context;
    /// [`Error::TokenOutOfRange`]; [`Error::NoTokenizer`] for text without a tokenizer;
    /// [`Error::Tokenizer`] for text that it fails on; [`Error::Template`] for a chat that the
    /// checkpoint has no template for; [`Error::Parameter`] for a setting outside its range;
    /// [`Error::NotFinite`] when the model's numbers overflow.
    pub fn stream(
        &self,
        prompt: impl Into<Prompt>,
        config: &GenerationConfig,
    ) -> Result<TokenStream<'_>> {
        TokenStream::new(self.source(), &prompt.into(), config, None)
    }

    /// Answers the last message of a conversation.
    ///
    /// # Errors
    /// As [`HybridModel::stream`], and [`Error::Template`] when the checkpoint has no chat template
    /// or it refuses these messages.
    pub fn chat(&self, messages: &[Message], config: &GenerationConfig) -> Result<Answer> {
        self.generate(Prompt::chat(messages), config)
    }

    /// An empty conversation with room for `capacity` tokens, for
    /// [`stream_in`](Self::stream_in).
    ///
    /// # Errors
    /// [`Error::Parameter`] for no room at all, [`Error::ContextFull`] for more than the model's
    /// context.
    pub fn conversation(&self, capacity: usize) -> Result<Conversation> {
        Conversation::new(&self.transformer, capacity, self.cache_dtype)
    }

    /// As [`HybridModel::stream`], but in a conversation that goes on: as far as the prompt begins
    /// like what is already there, it is not run again. Thinking looks at the whole prompt each
    /// time, and so do prompt log-probabilities, so with them nothing can be kept.
    ///
    /// # Errors
    /// As [`HybridModel::stream`]; [`Error::ContextFull`] also for a prompt longer than the
    /// conversation's room.
    pub fn stream_in<'a>(
        &'a self,
        conversation: &'a mut Conversation,
        prompt: impl Into<Prompt>,
        config: &GenerationConfig,
    ) -> Result<TokenStream<'a>> {
        TokenStream::new(self.source(), &prompt.into(), config, Some(conversation))
    }

    /// One vector for each text: `(texts, hidden)`, in `f32`. What is read in both directions is read
    /// with the adapters for [`Mind::Thinking`], what is read causally with those for
    /// [`Mind::Decoding`].
    ///
    /// # Errors
    /// As [`HybridModel::stream`]; [`Error::EmptyPrompt`] also for no texts at all, and
    /// [`Error::NotFinite`] with the index of the text whose vector is.
    pub fn embed<T: AsRef<str>>(&self, texts: &[T], config: &EmbedConfig) -> Result<Tensor> {
        if config.batch_size == 0 {
            return Err(Error::parameter("batch_size", "at least 1", 0));
        }
        let encode = |text: &T| {
            let ids = Prompt::from(text.as_ref()).encode(self.tokenizer())?.ids;
            self.transformer.check_context(ids.len())?;
            Ok(ids)
        };
        let ids = texts.iter().map(encode).collect::<Result<Vec<_>>>()?;
        // Texts of like length side by side need little padding.
        let mut order: Vec<usize> = (0..ids.len()).collect();
        order.sort_by_key(|&text| ids.get(text).map_or(0, Vec::len));
        let mut vectors = vec![Vec::new(); ids.len()];
        for batch in order.chunks(config.batch_size) {
            let texts: Vec<&[u32]> =
                batch.iter().filter_map(|&i| Some(ids.get(i)?.as_slice())).collect();
            let rows = self.embed_batch(&texts, config)?.to_vec2::<f32>()?;
            for (&text, row) in batch.iter().zip(rows) {
                if row.iter().any(|value| !value.is_finite()) {
                    return Err(Error::NotFinite { what: "vectors", position: text });
                }
                if let Some(vector) = vectors.get_mut(text) {
                    *vector = row;
                }
            }
        }
        if vectors.is_empty() {
            return Err(Error::EmptyPrompt);
        }
        Ok(Tensor::new(vectors, self.transformer.device())?)
    }

    fn embed_batch(&self, texts: &[&[u32]], config: &EmbedConfig) -> Result<Tensor> {
        let transformer = &self.transformer;
        let lengths: Vec<usize> = texts.iter().map(|ids| ids.len()).collect();
        let layout = Layout::ragged(&lengths);
        // Any token will do for padding: it is never seen.
        let pad = |ids: &&[u32]| [&vec![0; layout.seq() - ids.len()], *ids].concat();
        let tokens: Vec<u32> = texts.iter().flat_map(pad).collect();
        let text = Text::new(transformer, &tokens, layout.clone())?;

        let mind = config.thinking.on(transformer)?;
        let z = mind.encode(&text, Pass::Causal(&layout))?;
        let thoughts = mind.think(&text, z, |_, _| ())?;
        let pass = match config.sight {
            Sight::Causal => Pass::Causal(&layout),
            Sight::Bidirectional => Pass::Bidirectional(&layout),
        };
        let h = transformer.norm(&mind.hand_off(&text, &thoughts, pass)?)?;
        let vectors = config.pooling.pool(&h.to_dtype(DType::F32)?, &layout)?;
        if config.normalize { pooling::unit_length(&vectors) } else { Ok(vectors) }
    }

    fn source(&self) -> Source<'_> {
        Source {
            transformer: &self.transformer,
            tokenizer: self.tokenizer(),
            eos_ids: &self.eos_ids,
            thinking: &self.thinking,
            cache_dtype: self.cache_dtype,
        }
    }
}

/// Ids that a tokenizer can give must be rows of the embedding table.
fn check_tokenizer(tokenizer: Option<&Tokenizer>, config: &Config) -> Result<()> {
    match tokenizer.map(Tokenizer::vocab_size) {
        Some(tokens) if tokens > config.vocab_size => Err(Error::Tokenizer {
            message: format!(
                "expected at most the vocab_size of {} tokens, got {tokens}",
                config.vocab_size
            ),
        }),
        _ => Ok(()),
    }
}
