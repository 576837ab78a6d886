//! A plain transformer: one set of blocks that runs causally or in both directions.
//!
//! [`Transformer`] holds weights and nothing else, so one copy serves any number of sequences
//! and threads; what a sequence remembers is a [`KvCache`], passed by `&mut`. Which tokens
//! see which is up to the [`Pass`], a required argument: there is no default mask.
//!
//! ```
//! # use std::collections::HashMap;
//! # use candle_core::{DType, Device, Tensor};
//! use hybrid_attention::{Config, model::{Batch, Pass, Transformer}};
//! # fn random_weights(config: &Config) -> candle_core::Result<HashMap<String, Tensor>> {
//! #     config.weights().map(|(name, shape)| {
//! #         Ok((name, Tensor::randn(0f32, 0.1, shape, &Device::Cpu)?))
//! #     }).collect()
//! # }
//! # fn main() -> hybrid_attention::Result<()> {
//! let config = Config::from_json(r#"{
//!     "model_type": "mistral", "vocab_size": 32, "hidden_size": 16, "intermediate_size": 24,
//!     "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2
//! }"#)?;
//! let transformer = Transformer::new(&config, &mut random_weights(&config)?)?;
//!
//! let xs = transformer.embed_ids(&[1, 5, 9])?;                            // (3, 16)
//! let thought = transformer.forward(&xs, 0..2, Pass::Bidirectional(&Batch::one(3)?))?;
//!
//! let mut cache = transformer.new_cache(64)?;
//! let h = transformer.forward(&xs, 0..2, Pass::Cached(&mut cache))?;
//! let logits = transformer.logits(&h)?;                                   // (3, 32)
//! # assert_eq!((thought.dims2()?, logits.dims2()?, cache.len()), ((3, 16), (3, 32), 3));
//! # Ok(())
//! # }
//! ```

mod attention;
mod block;
mod context;
mod experts;
mod feed_forward;
mod frequencies;
mod kv_cache;
mod linear;
mod mask;
mod mlp;
mod rope;
mod side;
mod stack;
mod tap;
mod weights;

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};

use self::block::RmsNorm;
use self::stack::in_pool;
use crate::config::Config;
use crate::error::{Error, Result};
use crate::kernels::{Compute, FreedMemory};

pub use self::attention::attend;
pub use self::context::{ForwardContext, Pass, SideSignal};
pub(crate) use self::kv_cache::CHUNK;
pub use self::kv_cache::{KeptTokens, KvCache, KvPool};
pub use self::linear::Linear;
pub(crate) use self::linear::LowRank;
pub use self::mask::{Mask, Sight};
pub use self::mlp::SideProjection;
pub use self::side::{Seen, SideSource};
pub use self::stack::Stack;
pub use self::tap::{Attended, Site, Tap};
pub use self::weights::Weights;
pub(crate) use self::weights::is_or_is_under;
pub use crate::batch::Batch;
pub(crate) use crate::batch::flat;
pub(crate) use crate::kernels::{Codebook, CodebookMatrix, reads_blocks};

/// The weights of a Mistral or a Mixtral, and the forward passes over them.
///
/// On the CPU the residual stream is `f32` whatever type the weights are kept in, and so is all arithmetic,
/// unless [`with_compute`](Self::with_compute) says otherwise; on other devices the stream has the type of
/// the weights. It is a tensor with a row of `hidden` numbers for each token of all sequences, one after the
/// other: `(tokens, hidden)`, or with any other leading dimensions that have as many rows, which a pass keeps.
///
/// Every pass is differentiable in its input, unless weights are quantised on a device other than the
/// CPU, and in its weights where these are not quantised: in those of a router through the shares of the
/// experts that it has chosen, not through the choice. To train a model, pass the tensors of candle
/// `Var`s as its weights: it then sees every step an optimiser takes, as long as they are `f32`. It
/// keeps a wider copy of half-precision norms, so with those it must be rebuilt after a step. Gradients
/// are of first order only.
///
/// No bit of what a pass computes depends on the number of threads, or on what else the machine does. It
/// depends on how much runs in one pass in one way only: products of up to 16 rows round differently
/// from those of more, and so does attention of one query from that of several. So the numbers of a
/// sequence are the same to the last bit, whatever sequences run beside it, as long as all together have
/// at most 16 tokens both times, or more than 16 both times. (A causal pass over caches is several: one
/// for each chunk of 512 tokens. Up to 16 tokens of one sequence have the numbers that they have alone where
/// they go [one by one](ForwardContext::one_by_one).)
#[derive(Debug)]
pub struct Transformer {
    config: Config,
    /// Used only for lookups; the head multiplies.
    embed_tokens: Linear,
    stack: Stack,
    norm: RmsNorm,
    /// What was saved from a base class or merged to embed texts may have none.
    lm_head: Option<Linear>,
    dtype: DType,
    device: Device,
    /// Dropped last, when the weights are free.
    _freed_memory: FreedMemory,
}

impl Transformer {
    /// Builds the blocks from `weights`, on the device and in the type in which they are passed.
    ///
    /// # Errors
    /// A config that [`Config::validate`] refuses; a weight that is missing or of another shape. Only
    /// `lm_head.weight` may be missing, which is then said by a warning: see
    /// [`has_head`](Self::has_head).
    pub fn new(config: &Config, weights: &mut impl Weights) -> Result<Self> {
        config.validate()?;
        let _freed_memory = FreedMemory::kept();
        let table = (config.vocab_size, config.hidden_size);
        let embed_tokens = weights.embedding("model.embed_tokens.weight", table.0, table.1)?;
        let device = embed_tokens.device();
        let dtype = if device.is_cpu() { DType::F32 } else { embed_tokens.dtype() };
        let (count, stream) = (config.num_hidden_layers, (dtype, &device));
        let stack = Stack::new(config, "model.layers", count, stream, weights)?;
        let norm = RmsNorm::new(config, "model.norm.weight", dtype, weights)?;
        let lm_head = if config.tie_word_embeddings {
            Some(embed_tokens.clone())
        } else {
            match weights.linear("lm_head.weight", table.0, table.1) {
                Ok(head) => Some(head),
                Err(Error::MissingWeight { name, place }) => {
                    tracing::warn!(name, place, "no vocabulary head: this model cannot generate");
                    None
                }
                Err(error) => return Err(error),
            }
        };
        let config = config.clone();
        Ok(Self { config, embed_tokens, stack, norm, lm_head, dtype, device, _freed_memory })
    }

    /// The shapes it was built with.
    #[must_use]
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The device it computes on.
    #[must_use]
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// The type of the residual stream and of the logits.
    #[must_use]
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Bytes of its matrices by type: `f32`, `bf16`, `q8_0`, `q4_k` and so on. Norms and low-rank
    /// adapters are left out.
    #[must_use]
    pub fn weight_bytes(&self) -> BTreeMap<String, usize> {
        let mut bytes = self.stack.weight_bytes();
        self.embed_tokens.count_bytes(&mut bytes);
        if let Some(head) = self.lm_head.as_ref().filter(|_| !self.config.tie_word_embeddings) {
            head.count_bytes(&mut bytes);
        }
        bytes
    }

    /// The whole stack as a layer range: `0..num_hidden_layers`.
    #[must_use]
    pub fn all_layers(&self) -> Range<usize> {
        0..self.stack.len()
    }

    /// Rows of the embedding table: `u32` ids of any shape, to a tensor with `hidden` numbers for each.
    ///
    /// # Errors
    /// [`Error::TokenOutOfRange`] for an id that is not in the vocabulary.
    pub fn embed(&self, tokens: &Tensor) -> Result<Tensor> {
        let mut shape = tokens.dims().to_vec();
        shape.push(self.config.hidden_size);
        Ok(self.embed_ids(&tokens.flatten_all()?.to_vec1::<u32>()?)?.reshape(shape)?)
    }

    /// [`Transformer::embed`] of ids on the host: `(tokens, hidden)`.
    ///
    /// # Errors
    /// As [`Transformer::embed`].
    pub fn embed_ids(&self, ids: &[u32]) -> Result<Tensor> {
        self.check_ids(ids)?;
        let ids = Tensor::new(ids, &self.device)?;
        Ok(self.embed_tokens.rows(&ids)?.to_dtype(self.dtype)?)
    }

    /// Runs `layers` over the residual stream `xs` and returns the stream that leaves them, in the shape
    /// of `xs`. What enters layer 0 is [`Transformer::embed_ids`]; what leaves the last layer goes to
    /// [`Transformer::logits`].
    ///
    /// # Errors
    /// [`Error::ContextFull`] when a cache, or the model, has no room for that many more positions, and
    /// [`Error::PoolFull`] when the pool of a cache has no memory for them; [`Error::Parameter`] when
    /// `layers`, the shape of `xs`, a cache or a side signal does not fit this model;
    /// [`Error::EmptyPrompt`] for a stream of no tokens; [`Error::Cancelled`]; and whatever a tap
    /// returns. On an error, caches are left as they were.
    pub fn forward<'a>(
        &self,
        xs: &Tensor,
        layers: Range<usize>,
        context: impl Into<ForwardContext<'a>>,
    ) -> Result<Tensor> {
        self.stack.forward(xs, layers, context)
    }

    /// The final norm of the stream that leaves the last layer: what transformers calls the last
    /// hidden state. `(.., hidden)` in and out.
    ///
    /// # Errors
    /// [`Error::Parameter`] for a stream of another width; when a device fails.
    pub fn norm(&self, hidden: &Tensor) -> Result<Tensor> {
        self.stack.check_stream(hidden)?;
        self.norm.forward(hidden)
    }

    /// Scores of every vocabulary entry as the next token, from the stream that leaves the last layer:
    /// `(.., hidden) -> (.., vocab)`. Pass only the positions you need: over a large vocabulary the head
    /// costs more than any layer.
    ///
    /// # Errors
    /// As [`Transformer::norm`]; [`Error::NoHead`] for a model that was loaded without one.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        self.head(&self.norm(hidden)?)
    }

    /// The head by itself, over the output of [`Transformer::norm`]: `(.., hidden) -> (.., vocab)`.
    ///
    /// # Errors
    /// As [`Transformer::logits`].
    pub fn head(&self, normed: &Tensor) -> Result<Tensor> {
        self.stack.check_stream(normed)?;
        let head = self.lm_head.as_ref().ok_or(Error::NoHead { needed_for: "the logits" })?;
        in_pool(|| head.forward(normed))
    }

    /// Whether it has a vocabulary head. Checkpoints that were saved to embed texts may have none: all but
    /// [`logits`](Self::logits) and [`head`](Self::head) works for these.
    #[must_use]
    pub fn has_head(&self) -> bool {
        self.lm_head.is_some()
    }

    /// An empty cache for one sequence of up to `capacity` positions, from a pool of its own without a
    /// limit. Keys and values are kept in the type of the residual stream.
    ///
    /// # Errors
    /// As [`KvPool::new_cache`].
    pub fn new_cache(&self, capacity: usize) -> Result<KvCache> {
        self.new_pool(self.dtype, usize::MAX)?.new_cache(capacity)
    }

    /// A pool that caches of this transformer take their memory from: at most `budget` bytes in total,
    /// with keys and values kept as `dtype`. On the CPU that may be `F32`, `BF16` or `F16`; on other
    /// devices only the type of the residual stream.
    ///
    /// `BF16` and `F16` need half the memory of `F32`, and each key and value is rounded to the nearest
    /// once, by at most 2⁻⁸ of it in `BF16` and 2⁻¹¹ in `F16`; scores and sums are computed in `f32`.
    /// `F16` is coarser below 0.00006, and keys and values beyond 65504 become infinite: a model that
    /// has such values needs another type. Gradients flow through the new tokens of a pass as if nothing
    /// had been rounded.
    ///
    /// # Errors
    /// [`Error::Parameter`] for another type.
    pub fn new_pool(&self, dtype: DType, budget: usize) -> Result<KvPool> {
        self.check_cache_dtype(dtype)?;
        Ok(KvPool::new(self, dtype, budget))
    }

    /// Refuses a type that keys and values cannot be kept in. On the CPU this crate's own kernel reads
    /// narrow ones beside wide queries; on other devices, candle's operations need a single type.
    fn check_cache_dtype(&self, dtype: DType) -> Result<()> {
        let narrow = self.device.is_cpu() && matches!(dtype, DType::BF16 | DType::F16);
        if dtype == self.dtype || narrow {
            return Ok(());
        }
        let expected = match self.device.is_cpu() {
            true => "F32, BF16 or F16".to_string(),
            false => format!("{:?}, the type of the stream on this device", self.dtype),
        };
        Err(Error::parameter("cache dtype", expected, format!("{dtype:?}")))
    }

    /// Puts `tokens` of what was [kept](KvCache::keep) behind what a cache holds, without running the model. Where
    /// they get other positions than they had, their keys are turned by the difference, which rounds them a
    /// second time. The cache may keep another type: a narrower one rounds them.
    ///
    /// What the tokens saw when they were read does not change: they are blind to what the cache holds.
    ///
    /// # Errors
    /// [`Error::Parameter`] for tokens or a cache of another transformer, and for no tokens or more than were
    /// kept; [`Error::ContextFull`] and [`Error::PoolFull`] for a cache without room; [`Error::Unsupported`] where
    /// reading at other positions would make other numbers: frequencies that depend on the length of a text
    /// (dynamic scaling, beyond the original length), and queries that grow at a position in between. The cache is
    /// then left as it was.
    pub fn place(
        &self,
        kept: &KeptTokens,
        tokens: Range<usize>,
        cache: &mut KvCache,
    ) -> Result<()> {
        self.check_cache(cache)?;
        kept.check_owner(self.stack_id())?;
        if tokens.is_empty() || tokens.end > kept.tokens() {
            let expected = format!("a run of the {} that were kept", kept.tokens());
            return Err(Error::parameter("tokens", expected, format!("{tokens:?}")));
        }
        let to = cache.position(&self.all_layers())?;
        self.check_context(to.saturating_add(tokens.len()))?;
        let from = kept.first() + tokens.start..kept.first() + tokens.end;
        let turn = self.stack.turn(&from, to)?;
        in_pool(|| cache.place(kept, &tokens, |keys| turn.keys(keys)))
    }

    /// Refuses a text of this length in which not everything is read anew, if that makes another of it.
    pub(crate) fn check_placed(&self, length: usize) -> Result<()> {
        self.stack.turn(&(0..length), 0).map(drop)
    }

    /// This transformer with columns that read a [`SideSignal`] in the MLP of one layer, or, for `None`,
    /// without those that it has there. All other tensors are shared.
    ///
    /// # Errors
    /// [`Error::Parameter`] for a layer that does not exist, or projections that do not fit its MLP;
    /// [`Error::Unsupported`] for a mixture of experts, where each would need columns of its own.
    pub fn with_side(&self, layer: usize, side: Option<SideProjection>) -> Result<Self> {
        let mut variant = self.variant();
        variant.stack.set_side(layer, side)?;
        Ok(variant)
    }

    /// This transformer with something that it looks up by the tokens of each pass, and the columns that read it, by
    /// layer. All other tensors are shared.
    ///
    /// Every pass through one of these layers then needs a batch with the [ids](Batch::with_ids) of its tokens, and of
    /// those that a cache [holds before them](Batch::following); without them it is an error, never a pass without
    /// the signal. A [`SideSignal`] that a caller brings has no place beside it.
    ///
    /// # Errors
    /// As [`with_side`](Self::with_side); [`Error::Parameter`] for a second source.
    pub fn with_side_source(
        &self,
        source: Arc<dyn SideSource>,
        columns: BTreeMap<usize, SideProjection>,
    ) -> Result<Self> {
        let mut variant = self.variant();
        variant.stack.attach(source, columns)?;
        Ok(variant)
    }

    /// This transformer, computed as exactly as `compute` says. All tensors are shared. On other devices than
    /// the CPU that makes no difference.
    #[must_use]
    pub fn with_compute(&self, compute: Compute) -> Self {
        let mut variant = self.variant();
        variant.stack.set_compute(compute);
        if let Some(head) = &mut variant.lm_head {
            head.set_compute(compute);
        }
        variant
    }

    /// Whether it looks something up by the tokens of a pass, which has to have them.
    #[must_use]
    pub fn has_side_source(&self) -> bool {
        self.stack.has_side_source()
    }

    /// What the feed-forward half of a layer reads of the stream after attention, which a tap shows: its norm.
    pub(crate) fn feed_forward_input(&self, layer: usize, xs: &Tensor) -> Result<Tensor> {
        self.stack.feed_forward_input(layer, xs)
    }

    /// The same tensors in a transformer of its own, to be changed: its keys and values will differ.
    pub(crate) fn variant(&self) -> Self {
        Self {
            config: self.config.clone(),
            embed_tokens: self.embed_tokens.clone(),
            stack: self.stack.variant(),
            norm: self.norm.clone(),
            lm_head: self.lm_head.clone(),
            dtype: self.dtype,
            device: self.device.clone(),
            _freed_memory: FreedMemory::kept(),
        }
    }

    /// The projection called `model.layers.0.self_attn.q_proj` or the like, or `lm_head`.
    pub(crate) fn projection_mut(&mut self, name: &str) -> Option<&mut Linear> {
        match name {
            "lm_head" => self.lm_head.as_mut(),
            _ => self.stack.projection_mut(name.strip_prefix("model.layers.")?),
        }
    }

    /// Refuses ids that are not in the vocabulary.
    pub(crate) fn check_ids(&self, ids: &[u32]) -> Result<()> {
        let vocab_size = self.config.vocab_size;
        match ids.iter().enumerate().find(|(_, id)| **id as usize >= vocab_size) {
            Some((position, &id)) => Err(Error::TokenOutOfRange { position, id, vocab_size }),
            None => Ok(()),
        }
    }

    /// Refuses a cache that another transformer made.
    pub(crate) fn check_cache(&self, cache: &KvCache) -> Result<()> {
        cache.check_owner(self.stack_id())
    }

    pub(crate) fn check_context(&self, requested: usize) -> Result<()> {
        self.stack.check_context(requested)
    }

    fn stack_id(&self) -> u64 {
        self.stack.id()
    }
}
