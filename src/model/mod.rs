//! The transformer: one set of blocks that runs causally or in both directions.
//!
//! [`Transformer`] holds weights and nothing else, so one copy serves any number of conversations
//! and threads; what a conversation remembers is a [`KvCache`], handed in by `&mut`. Which tokens
//! see which is said by the [`Pass`], a required argument: there is no default mask.
//!
//! ```
//! # use std::collections::HashMap;
//! # use candle_core::{DType, Device, Tensor};
//! use hybrid_attention::{Config, model::{Layout, Pass, Transformer}};
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
//! let tokens = Tensor::new(&[[1u32, 5, 9]], &Device::Cpu)?;
//! let layout = Layout::dense(1, 3);
//!
//! let xs = transformer.embed(&tokens)?;                                   // (1, 3, 16)
//! let thought = transformer.forward(&xs, 0..2, Pass::Bidirectional(&layout))?;
//!
//! let mut cache = transformer.new_cache(&layout, 64)?;
//! let h = transformer.forward(&xs, 0..2, Pass::Cached(&mut cache))?;
//! let logits = transformer.logits(&h)?;                                   // (1, 3, 32)
//! # assert_eq!((thought.dims3()?, logits.dims3()?, cache.len()), ((1, 3, 16), (1, 3, 32), 3));
//! # Ok(())
//! # }
//! ```

mod attention;
mod block;
mod hand_over;
mod kv_cache;
mod linear;
mod mask;
mod minds;
mod mlp;
mod packing;
mod rope;
mod weights;

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use candle_core::{DType, Device, Tensor};

use self::block::{Block, RmsNorm};
use self::packing::Packing;
use self::rope::{Rope, Rotation};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::kernels;

pub use self::attention::attend;
pub use self::hand_over::HandOver;
pub(crate) use self::kv_cache::CHUNK;
pub use self::kv_cache::KvCache;
pub use self::linear::Linear;
pub(crate) use self::linear::LowRank;
pub use self::mask::{Mask, Sight};
pub use self::minds::Mind;
pub use self::weights::Weights;
pub(crate) use self::weights::is_or_is_under;
pub(crate) use crate::kernels::reads_blocks;
pub use crate::layout::Layout;

/// Who sees whom in a forward pass, and what is remembered of it.
#[derive(Debug)]
pub enum Pass<'a> {
    /// Every token sees itself and what came before it in this very pass. Nothing is remembered.
    Causal(&'a Layout),
    /// Causal, going on after what the cache holds; the new tokens are added to it. New tokens
    /// are taken up in chunks, so a long prompt needs no more memory than a short one. Gradients
    /// flow through all new tokens; what the cache holds already is a constant to them.
    Cached(&'a mut KvCache),
    /// A thought pass: inside each context segment every token sees every other; plain tokens
    /// stay causal. Nothing is remembered.
    Bidirectional(&'a Layout),
}

/// The weights of a Mistral, and the forward passes over them.
///
/// On the CPU the residual stream is `f32` whatever type the weights are kept in; on other devices
/// it has the type of the weights.
///
/// Every pass is differentiable in its input, unless weights are quantised on another device than the
/// CPU, and in its weights where these are not quantised. To train a model, hand over the tensors of
/// candle `Var`s as its weights: it then sees every step an optimiser takes, as long as they are `f32`.
/// Of half-precision norms and gates it keeps a wider copy, so it has to be built anew after a step.
/// Gradients are of first order only.
///
/// Thought passes may run on a variant of it that shares the weights and has other low-rank adapters:
/// its [`thinker`](Transformer::thinker).
#[derive(Debug)]
pub struct Transformer {
    /// Tells this one from all others of the process.
    id: u64,
    config: Config,
    /// Only looked up in; the head multiplies.
    embed_tokens: Linear,
    layers: Vec<Block>,
    /// Run after the span in every thought pass.
    thought_layers: Vec<Block>,
    thought_gate: Option<Tensor>,
    norm: RmsNorm,
    lm_head: Linear,
    rope: Arc<Rope>,
    dtype: DType,
    device: Device,
    /// What runs thought passes, where that is not this very transformer. It has none of its own.
    thinker: Option<Box<Self>>,
}

/// What all blocks of one pass share.
#[derive(Debug)]
struct View {
    rotation: Rotation,
    mask: Arc<Mask>,
}

impl Transformer {
    /// Builds the blocks from `weights`, on the device and in the type they are handed over.
    ///
    /// Beside the model's own, `thought.layers.{i}.*` (the weights of further blocks, from 0 on)
    /// and `thought.gate` (`[hidden]`) are taken where there are any: what a checkpoint has learned
    /// for its thought passes.
    ///
    /// # Errors
    /// A config that [`Config::validate`] refuses; a weight that is missing or of another shape.
    pub fn new(config: &Config, weights: &mut impl Weights) -> Result<Self> {
        config.validate()?;
        kernels::keep_freed_memory();
        let table = (config.vocab_size, config.hidden_size);
        let embed_tokens = weights.embedding("model.embed_tokens.weight", table.0, table.1)?;
        let device = embed_tokens.device();
        let dtype = if device.is_cpu() { DType::F32 } else { embed_tokens.dtype() };
        let layers = (0..config.num_hidden_layers)
            .map(|index| Block::new(config, &format!("model.layers.{index}"), dtype, weights))
            .collect::<Result<_>>()?;
        let mut thought_layers = Vec::new();
        for index in 0.. {
            let prefix = format!("thought.layers.{index}");
            if !weights.contains(&prefix) {
                break;
            }
            thought_layers.push(Block::new(config, &prefix, dtype, weights)?);
        }
        let thought_gate = match weights.contains("thought.gate") {
            true => Some(weights.tensor("thought.gate", &[table.1])?.to_dtype(dtype)?),
            false => None,
        };
        let norm = RmsNorm::new(config, "model.norm.weight", dtype, weights)?;
        let lm_head = if config.tie_word_embeddings {
            embed_tokens.clone()
        } else {
            weights.linear("lm_head.weight", table.0, table.1)?
        };
        Ok(Self {
            id: next_id(),
            config: config.clone(),
            embed_tokens,
            layers,
            thought_layers,
            thought_gate,
            norm,
            lm_head,
            rope: Arc::new(Rope::new(config, dtype, &device)?),
            dtype,
            device,
            thinker: None,
        })
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

    /// Bytes of its matrices by what they are kept as: `f32`, `bf16`, `q8_0`, `q4_k` and so on. Norms,
    /// gates and adapters are left out.
    #[must_use]
    pub fn weight_bytes(&self) -> BTreeMap<String, usize> {
        let head = (!self.config.tie_word_embeddings).then_some(&self.lm_head);
        let blocks = self.layers.iter().chain(&self.thought_layers).flat_map(Block::projections);
        let mut bytes = BTreeMap::new();
        for linear in blocks.chain([&self.embed_tokens]).chain(head) {
            let (kept, count) = linear.kept();
            *bytes.entry(kept).or_default() += count;
        }
        bytes
    }

    /// The whole stack as a layer range: `0..num_hidden_layers`.
    #[must_use]
    pub fn all_layers(&self) -> Range<usize> {
        0..self.layers.len()
    }

    /// How many blocks the checkpoint has that run in thought passes only.
    #[must_use]
    pub fn thought_layers(&self) -> usize {
        self.thinker().thought_layers.len()
    }

    /// The checkpoint's `thought.gate`, `(hidden)`, if it has one. Its sigmoid is the share of the
    /// new state that a thought takes over, channel by channel.
    #[must_use]
    pub fn thought_gate(&self) -> Option<&Tensor> {
        self.thinker().thought_gate.as_ref()
    }

    /// Rows of the embedding table: `(batch, seq)` of `u32` to `(batch, seq, hidden)`.
    ///
    /// # Errors
    /// [`Error::TokenOutOfRange`] for an id that is not in the vocabulary.
    pub fn embed(&self, tokens: &Tensor) -> Result<Tensor> {
        let shape = tokens.dims2()?;
        self.embed_ids(&tokens.flatten_all()?.to_vec1::<u32>()?, shape)
    }

    /// [`Transformer::embed`] of ids on the host, laid out as `(batch, seq)`.
    pub(crate) fn embed_ids(&self, ids: &[u32], (batch, seq): (usize, usize)) -> Result<Tensor> {
        let (vocab_size, hidden) = (self.config.vocab_size, self.config.hidden_size);
        for (position, &id) in ids.iter().enumerate() {
            if id as usize >= vocab_size {
                return Err(Error::TokenOutOfRange { position, id, vocab_size });
            }
        }
        let ids = Tensor::new(ids, &self.device)?;
        let rows = self.embed_tokens.rows(&ids)?.to_dtype(self.dtype)?;
        Ok(rows.reshape((batch, seq, hidden))?)
    }

    /// Runs `layers` over the residual stream `xs` and gives the stream that leaves them, both
    /// `(batch, seq, hidden)`. What enters layer 0 is [`Transformer::embed`]; what leaves the last
    /// layer goes to [`Transformer::logits`].
    ///
    /// Where a row is padded, the result means nothing and no token depends on what came in. Without a
    /// cache only the tokens are computed, so a batch costs what its rows do, and padding keeps what
    /// came in.
    ///
    /// # Errors
    /// [`Error::ContextFull`] when the cache, or the model, has no room for `seq` more positions;
    /// [`Error::Parameter`] when `layers`, the shape of `xs` or the cache does not fit this model;
    /// [`Error::EmptyPrompt`] when `seq` is 0.
    pub fn forward(&self, xs: &Tensor, layers: Range<usize>, pass: Pass<'_>) -> Result<Tensor> {
        in_pool(|| self.forward_here(xs, layers, pass))
    }

    fn forward_here(&self, xs: &Tensor, layers: Range<usize>, pass: Pass<'_>) -> Result<Tensor> {
        let (batch, seq) = self.check_stream(xs)?;
        self.check_layers(&layers)?;
        if layers.is_empty() {
            return Ok(xs.clone());
        }
        match pass {
            Pass::Causal(layout) => self.uncached(&self.layers[layers], xs, layout, Sight::Causal),
            Pass::Bidirectional(layout) => {
                self.uncached(&self.layers[layers], xs, layout, Sight::Bidirectional)
            }
            Pass::Cached(cache) => {
                cache.check_owner(self.id)?;
                check_batch(cache.layout().batch(), batch)?;
                cache.check_room(&layers, seq)?; // before the first chunk is taken up
                cache.cut_graph();
                let chunks = (0..seq).step_by(CHUNK).map(|start| {
                    let chunk = xs.narrow(1, start, CHUNK.min(seq - start))?;
                    self.cached(&chunk, layers.clone(), cache)
                });
                let chunks = chunks.collect::<Result<Vec<_>>>();
                cache.cut_graph();
                match chunks?.as_slice() {
                    [only] => Ok(only.clone()),
                    chunks => Ok(Tensor::cat(chunks, 1)?),
                }
            }
        }
    }

    /// Runs `blocks` over all of `xs` at once, from position 0 on. Of rows of different lengths only
    /// the tokens run; padding keeps what came in, which nothing reads.
    ///
    /// So on every device: where candle's operations attend, a block of queries makes scores over the
    /// keys that it sees, which are those of the rows it is of, not over all that are packed.
    fn uncached(
        &self,
        blocks: &[Block],
        xs: &Tensor,
        layout: &Layout,
        sight: Sight,
    ) -> Result<Tensor> {
        let run = |xs: Tensor, view: &View| {
            blocks.iter().try_fold(xs, |xs, block| block.forward(&xs, view, Ok))
        };
        self.check_layout(xs, layout)?;
        match Packing::new(layout, &self.device)? {
            None => run(xs.clone(), &self.view(xs, layout, sight)?),
            Some(packing) => {
                let window = self.config.sliding_window;
                let view = Packing::view(layout, sight, window, &self.rope)?;
                packing.run(xs, |xs| run(xs, &view))
            }
        }
    }

    /// Runs the blocks that the checkpoint has for thought passes only, `(batch, seq, hidden)` in
    /// and out; without any, `xs` comes back.
    ///
    /// # Errors
    /// As [`Transformer::forward`].
    pub fn forward_thought_layers(
        &self,
        xs: &Tensor,
        layout: &Layout,
        sight: Sight,
    ) -> Result<Tensor> {
        let layers = &self.thinker().thought_layers;
        if layers.is_empty() {
            return Ok(xs.clone());
        }
        in_pool(|| self.uncached(layers, xs, layout, sight))
    }

    /// Where attention goes when `layers` run over `xs`: for each layer the share of every token's
    /// attention that every other gets, mean over the heads, `(batch, seq, seq)`. To look into;
    /// [`Transformer::forward`] never makes such a square.
    ///
    /// # Errors
    /// As [`Transformer::forward`].
    pub fn attention_shares(
        &self,
        xs: &Tensor,
        layers: Range<usize>,
        layout: &Layout,
        sight: Sight,
    ) -> Result<Vec<Tensor>> {
        self.check_layers(&layers)?;
        let view = self.view(xs, layout, sight)?;
        let mut xs = xs.clone();
        let mut shares = Vec::with_capacity(layers.len());
        for block in &self.layers[layers] {
            shares.push(block.attention_shares(&xs, &view)?);
            xs = block.forward(&xs, &view, Ok)?;
        }
        Ok(shares)
    }

    /// What the blocks share when all of `xs` runs at once, padding included, from position 0 on.
    fn view(&self, xs: &Tensor, layout: &Layout, sight: Sight) -> Result<View> {
        self.check_layout(xs, layout)?;
        let seq = layout.seq();
        Ok(View {
            rotation: self.rope.at(0, seq, &layout.starts())?,
            mask: Arc::new(Mask::new(layout, sight, 0..seq, 0, self.config.sliding_window)),
        })
    }

    fn cached(&self, xs: &Tensor, layers: Range<usize>, cache: &mut KvCache) -> Result<Tensor> {
        let seq = xs.dim(1)?;
        let past = cache.position(&layers)?;
        self.check_context(past + seq)?;
        cache.reserve(&layers, seq)?;
        let new = past..past + seq;
        let first = cache.first(&layers);
        let layout = cache.layout();
        let view = View {
            rotation: self.rope.at(past, seq, &layout.starts())?,
            mask: Arc::new(Mask::new(
                layout,
                Sight::Causal,
                new,
                first,
                self.config.sliding_window,
            )),
        };
        let mut xs = xs.clone();
        for (index, block) in layers.clone().zip(&self.layers[layers]) {
            xs = block.forward(&xs, &view, |new| cache.layer(index)?.append(&new))?;
        }
        Ok(xs)
    }

    /// The final norm of the stream that leaves the last layer: what transformers calls the last
    /// hidden state. `(batch, seq, hidden)` in and out.
    ///
    /// # Errors
    /// When a device fails.
    pub fn norm(&self, hidden: &Tensor) -> Result<Tensor> {
        self.check_stream(hidden)?;
        self.norm.forward(hidden)
    }

    /// Scores of every vocabulary entry as the next token, from the stream that leaves the last
    /// layer: `(batch, seq, hidden) -> (batch, seq, vocab)`. Hand in only the positions you need;
    /// over a large vocabulary this is the dearest layer of all.
    ///
    /// # Errors
    /// When a device fails.
    pub fn logits(&self, hidden: &Tensor) -> Result<Tensor> {
        self.head(&self.norm(hidden)?)
    }

    /// The head by itself, over what [`Transformer::norm`] gives:
    /// `(batch, seq, hidden) -> (batch, seq, vocab)`.
    ///
    /// # Errors
    /// When a device fails.
    pub fn head(&self, normed: &Tensor) -> Result<Tensor> {
        self.check_stream(normed)?;
        in_pool(|| self.lm_head.forward(normed))
    }

    /// An empty cache for `layout`'s batch with room for `capacity` positions per row, padding
    /// included. Only where each row begins matters here, not how long it is. Keys and values are kept
    /// in the type of the residual stream.
    ///
    /// # Errors
    /// [`Error::Parameter`] for a capacity of zero or beyond memory, [`Error::ContextFull`] for one
    /// beyond the model's `max_position_embeddings`.
    pub fn new_cache(&self, layout: &Layout, capacity: usize) -> Result<KvCache> {
        self.new_cache_as(layout, capacity, self.dtype)
    }

    /// As [`Transformer::new_cache`], with keys and values kept as `dtype`: on the CPU `F32`, `BF16`
    /// or `F16`, on other devices the type of the residual stream and no other.
    ///
    /// `BF16` and `F16` need half the memory of `F32`, and each key and value is rounded to the
    /// nearest once, by at most 2⁻⁸ of it in `BF16` and 2⁻¹¹ in `F16`; scores and sums are computed in
    /// `f32`. `F16` is coarser below 0.00006, and beyond 65504 keys and values become infinite: a model
    /// that has such needs another. Gradients flow through the new tokens of a pass as if nothing had
    /// been rounded.
    ///
    /// ```
    /// # use candle_core::{DType, Device};
    /// # use hybrid_attention::{HybridModel, model::Layout};
    /// let model = HybridModel::tiny(&Device::Cpu)?;
    /// let transformer = model.transformer();
    /// let wide = transformer.new_cache(&Layout::dense(1, 1), 64)?;
    /// let narrow = transformer.new_cache_as(&Layout::dense(1, 1), 64, DType::BF16)?;
    /// assert_eq!(wide.bytes(), 2 * narrow.bytes());
    /// # Ok::<_, hybrid_attention::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`Transformer::new_cache`]; [`Error::Parameter`] for another type.
    pub fn new_cache_as(&self, layout: &Layout, capacity: usize, dtype: DType) -> Result<KvCache> {
        self.check_cache_dtype(dtype)?;
        self.check_context(capacity)?;
        KvCache::new(self, layout, capacity, dtype)
    }

    /// Refuses a type that keys and values cannot be kept as. On the CPU this crate's own kernel reads
    /// narrow ones beside wide queries; candle's operations, on other devices, know one type only.
    pub(crate) fn check_cache_dtype(&self, dtype: DType) -> Result<()> {
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

    fn check_layers(&self, layers: &Range<usize>) -> Result<()> {
        if layers.start <= layers.end && layers.end <= self.layers.len() {
            return Ok(());
        }
        let expected = format!("a range within 0..{}", self.layers.len());
        Err(Error::parameter("layers", expected, format!("{layers:?}")))
    }

    /// The batch and the sequence length of a residual stream `(batch, seq, hidden)`.
    fn check_stream(&self, xs: &Tensor) -> Result<(usize, usize)> {
        match xs.dims() {
            [_, 0, _] => Err(Error::EmptyPrompt),
            [batch, seq, hidden] if *batch > 0 && *hidden == self.config.hidden_size => {
                Ok((*batch, *seq))
            }
            got => {
                let expected = format!("a stream (batch, seq, {})", self.config.hidden_size);
                Err(Error::parameter("xs", expected, format!("{got:?}")))
            }
        }
    }

    /// Refuses a stream that is not laid out as `layout` says, and one that is too long.
    fn check_layout(&self, xs: &Tensor, layout: &Layout) -> Result<()> {
        let (batch, seq) = self.check_stream(xs)?;
        check_batch(layout.batch(), batch)?;
        if layout.seq() != seq {
            let expected = format!("the sequence of {} slots it describes", layout.seq());
            return Err(Error::parameter("layout", expected, seq));
        }
        self.check_context(seq)
    }

    /// Refuses more positions than the model was trained for.
    pub(crate) fn check_context(&self, requested: usize) -> Result<()> {
        let capacity = self.config.max_position_embeddings;
        if requested > capacity {
            return Err(Error::ContextFull { capacity, requested });
        }
        Ok(())
    }
}

/// Does `work` on a thread of rayon's pool: from outside, each of its many small parallel steps would
/// wait for a thread of the pool to take it up.
fn in_pool<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    rayon::scope(|_| work())
}

fn next_id() -> u64 {
    static NEXT_ID: AtomicU64 = AtomicU64::new(0);
    NEXT_ID.fetch_add(1, Ordering::Relaxed)
}

fn check_batch(expected: usize, got: usize) -> Result<()> {
    if expected == got {
        return Ok(());
    }
    Err(Error::parameter("batch", format!("the {expected} rows the pass was made for"), got))
}
