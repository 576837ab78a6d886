//! The model as users see it: weights, tokenizer and defaults of one checkpoint together.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};

use crate::adapter::{Adapter, AdapterScope};
use crate::config::Config;
use crate::embed::{self, EmbedConfig, EmbedDefaults, Readable, Vectors};
use crate::error::{Error, Result};
use crate::generate::{
    Answer, Answers, Conversation, GenerationConfig, Prompt, Source, TokenStream,
};
use crate::hub::Pretrained;
use crate::kernels::Compute;
use crate::load::{Checkpoint, WeightType};
use crate::model::{Pass, Sight, Transformer};
use crate::steps::{self, AttentionSteps};
use crate::thought::{Document, EncodedBatch, Thinking, ThoughtModel, Thoughts};
use crate::tokenizer::{Message, Tokenizer};

/// A Mistral that can think before it answers.
///
/// A handle: a clone is the same model and costs next to nothing, so threads, tasks and handlers can each
/// have one. It is `Send + Sync` and takes `&self` everywhere; each answer has its own cache.
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
#[derive(Clone, Debug)]
pub struct HybridModel {
    source: Arc<Source>,
}

impl HybridModel {
    /// Loads a folder, as [`from_folder`](Self::from_folder) does, or a GGUF file, as
    /// [`from_gguf`](Self::from_gguf) does, whichever `path` is.
    ///
    /// While they are loaded the files are mapped into memory. They must not be cut short or overwritten
    /// meanwhile, by a download into the same place say: the process would end with `SIGBUS`, which no
    /// program can catch as an error. Where that cannot be ruled out (a network share, files that others
    /// write), use [`HybridModel::read`]. Once loaded, a model has nothing to do with its files any more.
    ///
    /// # Errors
    /// As [`HybridModel::from_folder`].
    pub fn open(
        path: impl AsRef<Path>,
        weights: impl Into<WeightType>,
        device: &Device,
    ) -> Result<Self> {
        Self::from_checkpoint(&Checkpoint::open(path)?, weights, device, |_, _| ())
    }

    /// [`HybridModel::open`] that reads the files instead of mapping them, and so turns one that is cut
    /// short meanwhile into an error. It needs memory for the files beside the weights while it loads. See
    /// [`Checkpoint::read`].
    ///
    /// # Errors
    /// As [`HybridModel::from_folder`].
    pub fn read(
        path: impl AsRef<Path>,
        weights: impl Into<WeightType>,
        device: &Device,
    ) -> Result<Self> {
        Self::from_checkpoint(&Checkpoint::read(path)?, weights, device, |_, _| ())
    }

    /// Loads a model of the Hugging Face hub by its name, `org/name`: from the cache that transformers and
    /// `hf download` fill too, and with the feature `hub` from the hub, if it is not there. A path that
    /// exists is opened as it is. See [`hub`](crate::hub) for names with a revision or a GGUF file, and
    /// [`Pretrained`] for tokens, mirrors and progress.
    ///
    /// ```no_run
    /// use candle_core::{DType, Device};
    /// use hybrid_attention::HybridModel;
    ///
    /// let model = HybridModel::from_pretrained("mistralai/Mistral-7B-v0.3", DType::BF16, &Device::Cpu)?;
    /// # Ok::<_, hybrid_attention::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`Pretrained::fetch`] and [`HybridModel::from_folder`].
    pub fn from_pretrained(
        model: impl Into<Pretrained>,
        weights: impl Into<WeightType>,
        device: &Device,
    ) -> Result<Self> {
        Self::open(model.into().fetch(|_| ())?, weights, device)
    }

    /// Loads a folder as it is downloaded from a hub: `config.json` with `model.safetensors` or its
    /// shards, or Mistral's own `params.json` with `consolidated.safetensors`; the tokenizer in any of the
    /// formats of [`Tokenizer::from_folder`], `tokenizer_config.json` and `generation_config.json` where there are any.
    ///
    /// `weights` is the type to keep them in: a `DType` (`F32`, `BF16` or `F16`), a `GgmlDType` to
    /// quantise them to while loading, or [`WeightType::Stored`]. On the CPU everything is computed in
    /// `f32` whatever they are kept in.
    ///
    /// The files must not be cut short or overwritten while they are loaded: see
    /// [`open`](Self::open), and [`read`](Self::read) where that cannot be ruled out.
    ///
    /// A checkpoint without a vocabulary head, as of models that embed texts, loads with a warning:
    /// [`embed`](Self::embed) works, and what generates is [`Error::NoHead`]. What nothing needs (a token
    /// id beyond the vocabulary, a tokenizer of a kind that is not read while prompts are token ids) is
    /// named by a warning, too.
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

    /// Loads a GGUF file, its tokenizer and its chat template; for `NAME.gguf` without a template that is
    /// `NAME.jinja` or `chat_template.jinja` beside it. With [`WeightType::Stored`], quantised
    /// weights stay quantised. A model that is split, into `NAME-00001-of-00003.gguf` and so on, is loaded
    /// by any of its parts.
    ///
    /// The files must not be cut short or overwritten while they are loaded: see
    /// [`open`](Self::open), and [`read`](Self::read) where that cannot be ruled out.
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

    /// The small model that comes with this crate, in `f32`: a million parameters, trained to think both
    /// ways about the stories of the flashback suite (`examples/flashback`) and nothing else. It needs
    /// no files; it was compiled in from `src/tiny`.
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
        let model = ThoughtModel::new(&config, &mut weights)?;
        thinking.on(&model)?;
        Ok(Self::new(model, Some(tokenizer))?.with(|source| source.thinking = thinking))
    }

    /// Loads an opened checkpoint, telling `progress` how many of its bytes have been read, and how many
    /// there are.
    ///
    /// # Errors
    /// As [`HybridModel::from_folder`].
    pub fn from_checkpoint(
        checkpoint: &Checkpoint,
        weights: impl Into<WeightType>,
        device: &Device,
        progress: impl FnMut(u64, u64),
    ) -> Result<Self> {
        // What is cheap and may fail comes before the weights.
        let tokenizer = match checkpoint.gguf_metadata() {
            Some(metadata) => Tokenizer::from_gguf(metadata).and_then(|tokenizer| {
                tokenizer.map(|it| it.with_template_beside(&checkpoint.unsplit_path())).transpose()
            }),
            None => Tokenizer::from_folder(checkpoint.path()),
        };
        let (tokenizer, untokenized) = match tokenizer {
            // Token ids need none, and for text it is said why there is none.
            Err(Error::Unsupported { what, got }) => {
                tracing::warn!(
                    what,
                    got,
                    "the tokenizer is not read: only token ids can be prompts"
                );
                (None, Some((what, got)))
            }
            tokenizer => (tokenizer?, None),
        };
        let mut embed = match checkpoint.gguf_metadata() {
            Some(_) => EmbedDefaults::default(),
            None => embed::sentence_transformers(checkpoint.path())?,
        };
        let mut said = checkpoint.generation_defaults()?;
        let vocab_size = checkpoint.config().vocab_size;
        said.eos_token_ids.retain(|&id| {
            let known = (id as usize) < vocab_size;
            if !known {
                let file = "generation_config.json";
                tracing::warn!(
                    id,
                    vocab_size,
                    file,
                    "eos_token_id is no token of the model: not used"
                );
            }
            known
        });

        let mut defaults = GenerationConfig::default();
        // transformers ignores the sampling values of a file that does not say `do_sample`.
        if said.do_sample == Some(true) {
            // Of the likeliest tokens that make up nothing, one is left.
            let (top_k, top_p) = match said.top_p {
                Some(0.0) => (1, 1.0),
                top_p => (said.top_k.unwrap_or(50), top_p.unwrap_or(1.0)),
            };
            defaults = defaults
                .temperature(said.temperature.unwrap_or(1.0))
                .top_k(top_k)
                .top_p(top_p)
                .min_p(said.min_p.unwrap_or(0.0));
        }
        defaults = defaults.repetition_penalty(said.repetition_penalty.unwrap_or(1.0));
        defaults.validate().map_err(|error| {
            Error::malformed(checkpoint.path().join("generation_config.json"), error)
        })?;

        let (own_file, own) = match checkpoint.hybrid_json()? {
            Some((path, text)) => (path, own_settings(&text)),
            None => (PathBuf::new(), Ok((Thinking::none(), EmbedConfig::default()))),
        };
        let malformed = |error| match error {
            Error::Malformed { message, .. } => Error::malformed(&own_file, message),
            other => Error::malformed(&own_file, other),
        };
        let (thinking, own_embed) = own.map_err(malformed)?;

        let mut weights = checkpoint.weights(weights, device).on_progress(progress);
        let model = ThoughtModel::new(checkpoint.config(), &mut weights)?;
        weights.finish()?;
        for thinking in std::iter::once(&thinking).chain(&own_embed.thinking) {
            thinking.on(&model).map_err(malformed)?;
        }
        embed.or_own(own_embed);

        Ok(Self::new(model, tokenizer)?.with(|source| {
            source.defaults = defaults;
            source.untokenized = untokenized;
            source.embed = embed;
            source.thinking = thinking;
            if !said.eos_token_ids.is_empty() {
                source.eos_ids = said.eos_token_ids;
            }
        }))
    }

    /// Assembles a model from its parts: a [`ThoughtModel`], or a [`Transformer`] that has nothing extra
    /// for thought passes. Without a tokenizer, prompts are token ids.
    ///
    /// A tokenizer may have more tokens than the model has embeddings, as those of many fine-tunes have one
    /// for padding: that is said by a warning, and only a prompt that uses such a token is an error,
    /// [`Error::TokenOutOfRange`].
    ///
    /// # Errors
    /// When a device fails.
    pub fn new(model: impl Into<ThoughtModel>, tokenizer: Option<Tokenizer>) -> Result<Self> {
        let model = model.into();
        let decoder = model.decoder();
        let vocab_size = decoder.config().vocab_size;
        if let Some(tokens) = tokenizer.as_ref().map(Tokenizer::vocab_size)
            && tokens > vocab_size
        {
            tracing::warn!(tokens, vocab_size, "the tokenizer has tokens that the model has not");
        }
        let eos = tokenizer.as_ref().and_then(Tokenizer::eos_token_id);
        let eos_ids = match decoder.config().eos_token_ids.as_slice() {
            [] => eos.into_iter().collect(),
            ids => ids.to_vec(),
        };
        let (defaults, thinking) = (GenerationConfig::default(), Thinking::none());
        let pool = decoder.new_pool(decoder.dtype(), usize::MAX)?;
        let (untokenized, embed) = (None, EmbedDefaults::default());
        let source =
            Source { model, tokenizer, untokenized, defaults, eos_ids, thinking, embed, pool };
        Ok(Self { source: Arc::new(source) })
    }

    /// The same model with something else in its source.
    fn with(self, change: impl FnOnce(&mut Source)) -> Self {
        let mut source = Source::clone(&self.source);
        change(&mut source);
        Self { source: Arc::new(source) }
    }

    /// A model of the same weights with a low-rank adapter that is active where `scope` says; more can
    /// be added. This model does not change, and no weights are copied. Use [`AdapterScope::Thinking`]
    /// for an adapter that was trained to read in both directions (LLM2Vec): thought passes and
    /// bidirectional [`embed`](Self::embed) then use it, and answers are decoded as before.
    ///
    /// ```no_run
    /// # use candle_core::{DType, Device};
    /// use hybrid_attention::adapter::{Adapter, AdapterScope};
    /// use hybrid_attention::HybridModel;
    ///
    /// # fn main() -> hybrid_attention::Result<()> {
    /// let base = HybridModel::from_folder("Mistral-7B-v0.3", DType::BF16, &Device::Cpu)?;
    /// let adapter = Adapter::from_folder("both-ways-adapter", &Device::Cpu)?;
    /// let both_ways = base.with_adapter(&adapter, AdapterScope::Thinking)?;
    /// # let _ = (base, both_ways);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// As [`ThoughtModel::adapted`].
    pub fn with_adapter(&self, adapter: &Adapter, scope: AdapterScope) -> Result<Self> {
        let model = self.source.model.adapted(adapter, scope)?;
        let mut source = self.source.with_model(model)?;
        if scope == AdapterScope::Thinking {
            source.embed.sight = Some(Sight::Bidirectional); // what such an adapter is for
        }
        Ok(Self { source: Arc::new(source) })
    }

    /// The same with another model of the same checkpoint, whose keys and values differ.
    pub(crate) fn with_thought_model(&self, model: ThoughtModel) -> Result<Self> {
        Ok(Self { source: Arc::new(self.source.with_model(model)?) })
    }

    /// The same model, computed as exactly as `compute` says; no weights are copied. Default:
    /// [`Compute::Exact`].
    ///
    /// ```no_run
    /// use candle_core::{DType, Device};
    /// use hybrid_attention::{Compute, HybridModel};
    ///
    /// let model = HybridModel::from_folder("Mistral-7B-v0.3", DType::BF16, &Device::Cpu)?;
    /// let model = model.with_compute(Compute::Fast)?;
    /// # Ok::<_, hybrid_attention::Error>(())
    /// ```
    ///
    /// # Errors
    /// None at present.
    pub fn with_compute(&self, compute: Compute) -> Result<Self> {
        self.with_thought_model(self.source.model.with_compute(compute)?)
    }

    /// The same model with caches that keep keys and values as `dtype`, both those of its conversations
    /// and those of single answers. Default: the type of the residual stream, `F32` on the CPU; there,
    /// `BF16` and `F16` need half the memory, and rounding changes the output slightly. See
    /// [`Transformer::new_pool`].
    ///
    /// # Errors
    /// [`Error::Parameter`] for a type that this device's caches cannot have.
    pub fn with_cache_dtype(&self, dtype: DType) -> Result<Self> {
        let budget = self.source.pool.budget_bytes();
        Ok(Self { source: Arc::new(self.source.with_pool(dtype, budget)?) })
    }

    /// The same model, whose caches take at most `bytes` in total over all answers and conversations of
    /// this handle and its clones. Whatever needs more ends with [`Error::PoolFull`]. Default: no limit.
    ///
    /// # Errors
    /// None at present.
    pub fn with_cache_budget(&self, bytes: usize) -> Result<Self> {
        let dtype = self.source.pool.dtype();
        Ok(Self { source: Arc::new(self.source.with_pool(dtype, bytes)?) })
    }

    /// The transformer that decodes, to be driven by hand.
    #[must_use]
    pub fn transformer(&self) -> &Transformer {
        self.source.model.decoder()
    }

    /// What decodes and what thinks, to be driven by hand: see [`Thinking::on`].
    #[must_use]
    pub fn thought_model(&self) -> &ThoughtModel {
        &self.source.model
    }

    /// The shapes of the model.
    #[must_use]
    pub fn config(&self) -> &Config {
        self.transformer().config()
    }

    /// The tokenizer, if the checkpoint came with one.
    #[must_use]
    pub fn tokenizer(&self) -> Option<&Tokenizer> {
        self.source.tokenizer.as_ref()
    }

    /// The same model with this chat template, as [`Tokenizer::with_chat_template`] takes it.
    ///
    /// # Errors
    /// [`Error::NoTokenizer`].
    pub fn with_chat_template(&self, source: &str) -> Result<Self> {
        let tokenizer = self.tokenizer().ok_or(Error::NoTokenizer { needed_for: "a chat" })?;
        let tokenizer = tokenizer.clone().with_chat_template(source);
        Ok(self.clone().with(|source| source.tokenizer = Some(tokenizer)))
    }

    /// The tokens that end an answer.
    #[must_use]
    pub fn eos_ids(&self) -> &[u32] {
        &self.source.eos_ids
    }

    /// The checkpoint's own way to think, from its `hybrid.json`, which may cost no more than
    /// [`Thinking::MOST_READS_FROM_FILE`] says; not at all without one. Used
    /// wherever a [`GenerationConfig`] says nothing about thinking.
    #[must_use]
    pub fn thinking(&self) -> &Thinking {
        &self.source.thinking
    }

    /// The checkpoint's own generation settings: [`GenerationConfig::default`] with what its
    /// `generation_config.json` says.
    #[must_use]
    pub fn generation_config(&self) -> GenerationConfig {
        self.source.defaults.clone()
    }

    /// Thinks about a prompt as `config` says, and returns the refined thoughts, `(tokens, hidden)`, and
    /// how far each pass moved them. Without passes these are the embeddings; of several candidates, they are those of
    /// the first.
    ///
    /// # Errors
    /// An empty prompt, one that is too long for the model or has [documents](Prompt::document), text without a
    /// tokenizer, or settings outside their range.
    pub fn think(&self, prompt: impl Into<Prompt>, config: &GenerationConfig) -> Result<Thoughts> {
        let prompt = self.source.encode(&prompt.into())?;
        prompt.check_read_whole()?;
        config.validate()?;
        self.transformer().check_context(prompt.ids.len())?;
        let text = EncodedBatch::new(self.transformer(), &prompt.ids, prompt.batch()?)?;
        let mind = self.source.thinking(config).on(&self.source.model)?;
        let z = mind.encode(&text, Pass::Causal(text.batch()))?;
        mind.think(&text, z, |_done, _passes| ())
    }

    /// What one head of one layer computes, step by step, while a prompt is read without thinking: causally by what
    /// decodes, or in both directions, inside each part that is [context](Prompt::context), by what
    /// [thinks](ThoughtModel::thinker). The prompt's last token is read causally either way.
    ///
    /// For passes over thoughts see [`ThoughtLoop::attention_steps`](crate::thought::ThoughtLoop::attention_steps), for
    /// several texts at once and for caches [`HeadTap`](crate::steps::HeadTap).
    ///
    /// ```
    /// use candle_core::Device;
    /// use hybrid_attention::{HybridModel, Sight};
    ///
    /// # fn main() -> hybrid_attention::Result<()> {
    /// let model = HybridModel::tiny(&Device::Cpu)?;
    /// let steps = model.attention_steps("The coin is in the jar.", Sight::Causal, 2, 1)?;
    /// println!("{}\n{}", steps.softmax.scores, steps.softmax.weights);
    /// let after = (&steps.before + &steps.projection)?;
    /// assert_eq!(after.to_vec2::<f32>()?, steps.after.to_vec2::<f32>()?);
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// As [`think`](Self::think); [`Error::Parameter`] for a layer or a head that there is not.
    pub fn attention_steps(
        &self,
        prompt: impl Into<Prompt>,
        sight: Sight,
        layer: usize,
        head: usize,
    ) -> Result<AttentionSteps> {
        let prompt = self.source.encode(&prompt.into())?;
        prompt.check_read_whole()?;
        let reader = match sight {
            Sight::Causal => self.source.model.decoder(),
            Sight::Bidirectional => self.source.model.thinker(),
        };
        reader.check_context(prompt.ids.len())?;
        let batch = prompt.batch()?.with_ids(&prompt.ids)?;
        let xs = reader.embed_ids(&prompt.ids)?;
        let pass = Pass::uncached(&batch, sight);
        steps::of_pass(reader, &xs, 0, pass, (layer, head))?.pop().ok_or(Error::EmptyPrompt)
    }

    /// Answers a prompt: [`HybridModel::stream`], collected.
    ///
    /// # Errors
    /// As [`HybridModel::stream`].
    pub fn generate(&self, prompt: impl Into<Prompt>, config: &GenerationConfig) -> Result<Answer> {
        self.stream(prompt, config)?.collect_answer()
    }

    /// Answers a prompt token by token. The stream is returned before the model runs, and owns what it
    /// needs; see [`TokenStream`] for progress and cancelling.
    ///
    /// # Errors
    /// [`Error::EmptyPrompt`]; [`Error::ContextFull`] for a prompt longer than the model's context;
    /// [`Error::TokenOutOfRange`]; [`Error::NoTokenizer`] for text without a tokenizer,
    /// [`Error::Unsupported`] for text where the checkpoint's is of a kind that is not read;
    /// [`Error::NoHead`]; [`Error::Tokenizer`] for text that it fails on; [`Error::Template`] for a chat that the
    /// checkpoint has no template for; [`Error::Parameter`] for a setting outside its range, or one that does not go
    /// with [candidates](GenerationConfig::candidates); [`Error::PoolFull`] where the caches have no room for all of these.
    /// The stream itself may end with [`Error::NotFinite`] when the model's numbers overflow, with
    /// [`Error::PoolFull`], [`Error::Cancelled`], or when a device fails.
    pub fn stream(
        &self,
        prompt: impl Into<Prompt>,
        config: &GenerationConfig,
    ) -> Result<TokenStream<'static>> {
        TokenStream::new(&self.source, &prompt.into(), config, None)
    }

    /// Answers many prompts, several of them side by side: each answer as soon as it ends, and the same
    /// to the last bit as alone. See [`Answers`].
    ///
    /// # Errors
    /// [`Error::Parameter`] for a setting outside its range, and for [candidates](GenerationConfig::candidates). If
    /// something is wrong with one prompt, its answer is an error.
    pub fn generate_many(
        &self,
        prompts: impl IntoIterator<Item = impl Into<Prompt>>,
        config: &GenerationConfig,
    ) -> Result<Answers> {
        Answers::new(&self.source, prompts, config)
    }

    /// Answers the last message of a conversation. What messages say is text: a control token that they spell, as
    /// in `<|im_end|>`, is none; [`Prompt::trusted_chat`] is for messages in which it is one.
    ///
    /// # Errors
    /// As [`HybridModel::stream`], and [`Error::Template`] when the checkpoint has no chat template
    /// or it refuses these messages; [`Error::Parameter`] for no messages at all.
    pub fn chat(&self, messages: &[Message], config: &GenerationConfig) -> Result<Answer> {
        self.generate(Prompt::chat(messages), config)
    }

    /// An empty conversation with room for `capacity` tokens, for [`say`](Self::say) and
    /// [`stream_in`](Self::stream_in).
    ///
    /// # Errors
    /// [`Error::Parameter`] for no room at all, [`Error::ContextFull`] for more than the model's
    /// context.
    pub fn conversation(&self, capacity: usize) -> Result<Conversation> {
        Conversation::new(&self.source.pool, capacity)
    }

    /// Adds a message to a conversation and streams the answer. When it has ended, both are among the
    /// conversation's [`messages`](Conversation::messages); a stream that fails or is dropped earlier
    /// leaves them as they were.
    ///
    /// # Errors
    /// As [`HybridModel::chat`] and [`HybridModel::stream_in`].
    pub fn say<'c>(
        &self,
        conversation: &'c mut Conversation,
        text: impl Into<String>,
        config: &GenerationConfig,
    ) -> Result<TokenStream<'c>> {
        let said = Message::user(text);
        let messages = [conversation.messages(), std::slice::from_ref(&said)].concat();
        Ok(self.stream_in(conversation, Prompt::chat(&messages), config)?.turn(said))
    }

    /// As [`HybridModel::stream`], but in a conversation that continues: what the prompt begins with and
    /// the conversation already holds is not run again. Thinking looks at the whole prompt each time,
    /// and so do prompt log-probabilities, so with these nothing can be reused.
    ///
    /// # Errors
    /// As [`HybridModel::stream`]; [`Error::ContextFull`] also for a prompt longer than the
    /// conversation's room, and [`Error::Parameter`] for another model's conversation.
    pub fn stream_in<'c>(
        &self,
        conversation: &'c mut Conversation,
        prompt: impl Into<Prompt>,
        config: &GenerationConfig,
    ) -> Result<TokenStream<'c>> {
        TokenStream::new(&self.source, &prompt.into(), config, Some(conversation))
    }

    /// What reads texts to embed them, and whether in both directions.
    pub(crate) fn reads_texts(&self) -> (&Transformer, Sight) {
        match self.source.embed.sight.unwrap_or(Sight::Causal) {
            Sight::Causal => (self.source.model.decoder(), Sight::Causal),
            both_ways => (self.source.model.thinker(), both_ways),
        }
    }

    /// One vector for each text: `(texts, hidden)`, in `f32`. Bidirectional reading uses the adapters
    /// for [`AdapterScope::Thinking`], causal reading those for [`AdapterScope::Decoding`].
    ///
    /// # Errors
    /// [`Error::InText`] with what [`HybridModel::stream`] says of a text, [`Error::EmptyPrompt`] among it
    /// where nothing is left to pool; [`Error::EmptyPrompt`] for no texts at all; [`Error::NotFinite`] with
    /// the index of the text whose vector is not finite; [`Error::Parameter`] for a setting outside its
    /// range, and for what was found in another model and is to be [removed](EmbedConfig::remove); [`Error::Unsupported`] where the checkpoint's sentence-transformers files ask for what this
    /// crate does not compute and `config` names no pooling.
    pub fn embed<T: AsRef<str>>(&self, texts: &[T], config: &EmbedConfig) -> Result<Tensor> {
        self.embed_many(texts, config)?.collect_all()
    }

    /// The vectors of many texts, each as soon as it is computed, so that all of them need not fit in memory: see
    /// [`Vectors`]. For no texts at all there are none.
    ///
    /// # Errors
    /// As [`embed`](Self::embed); what is wrong with a text shows here, before anything is computed.
    pub fn embed_many<T: AsRef<str>>(&self, texts: &[T], config: &EmbedConfig) -> Result<Vectors> {
        let Source { model, embed, .. } = &*self.source;
        Vectors::new(model, self.source.tokenizer()?, embed, config, texts)
    }

    /// The vector of one text, bit by bit as [`embed`](Self::embed) makes it, and the keys and values that the same
    /// pass leaves (GritLM's document caching, Muennighoff 2024): for a checkpoint that was trained for both, a text
    /// that is found by its vector need not be read again. They are kept in the type of the model's caches. BOS and
    /// the instruction are its [lead](Document::lead). An EOS behind the text is seen and not kept; control tokens
    /// that the text spells are kept as text, which takes a second pass.
    ///
    /// ```
    /// use candle_core::Device;
    /// use hybrid_attention::{EmbedConfig, GenerationConfig, HybridModel, Prompt, Sight};
    ///
    /// # fn main() -> hybrid_attention::Result<()> {
    /// let model = HybridModel::tiny(&Device::Cpu)?; // or a GritLM, with the instruction "<|embed|>\n"
    /// let config = EmbedConfig::default().sight(Sight::Bidirectional);
    /// let (vector, document) = model.embed_document("Leo gave everything to Ida.", &config)?;
    /// let prompt = Prompt::default().document(&document).plain("\nWho has what Leo had?\nIt is with");
    /// let answer = model.generate(prompt, &GenerationConfig::default().max_tokens(2))?;
    /// # assert_eq!((vector.len(), answer.ids.len()), (128, 2));
    /// # Ok(())
    /// # }
    /// ```
    ///
    /// # Errors
    /// As [`embed`](Self::embed); [`Error::Parameter`] for embedding that thinks or stops at a layer, and for a text
    /// that is longer than [`EmbedConfig::max_tokens`].
    pub fn embed_document(&self, text: &str, config: &EmbedConfig) -> Result<(Vec<f32>, Document)> {
        self.readable(text, config)?.read(self.cache_dtype())
    }

    /// The same, before it is run.
    pub(crate) fn readable(&self, text: &str, config: &EmbedConfig) -> Result<Readable> {
        let vectors = self.embed_many(&[text], config).map_err(|error| match error {
            Error::InText { source, .. } => *source,
            other => other,
        })?;
        Readable::new(vectors, self.source.tokenizer()?, text)
    }

    /// The type that its caches keep keys and values in.
    pub(crate) fn cache_dtype(&self) -> DType {
        self.source.pool.dtype()
    }
}

/// What a `hybrid.json` says of answers, and of embedding.
fn own_settings(text: &str) -> Result<(Thinking, EmbedConfig)> {
    let thinking = Thinking::from_json(text)?;
    thinking.check_as_default()?;
    Ok((thinking, EmbedConfig::from_hybrid_json(text)?))
}
