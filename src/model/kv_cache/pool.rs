//! Blocks of positions, and the budget that they are taken from.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use candle_core::{DType, Device, Tensor};

use super::{KvCache, memory_of_machine};
use crate::error::{Error, Result};
use crate::kernels::KV_BLOCK;
use crate::model::Transformer;

/// Where caches take their memory from: a budget in bytes that they share, and the type that keys and
/// values are kept in. Cheap to clone; a clone is the same pool.
///
/// A block holds the keys and values of [`KvPool::BLOCK`] positions in one layer. Blocks are allocated
/// when positions are added, not before, and return to the budget when no cache holds them any more.
///
/// ```
/// use candle_core::{DType, Device};
/// use hybrid_attention::{Error, HybridModel, model::Pass};
///
/// let model = HybridModel::tiny(&Device::Cpu)?;
/// let transformer = model.transformer();
/// let pool = transformer.new_pool(DType::F32, 1 << 20)?; // a mebibyte
/// let mut cache = pool.new_cache(64)?;
/// let xs = transformer.embed_ids(&[11, 150, 12])?;
/// transformer.forward(&xs, transformer.all_layers(), Pass::Cached(&mut cache))?;
/// assert_eq!(pool.used_bytes(), cache.bytes());
///
/// let tight = transformer.new_pool(DType::F32, 1000)?;
/// let mut cache = tight.new_cache(64)?;
/// let full = transformer.forward(&xs, transformer.all_layers(), Pass::Cached(&mut cache));
/// assert!(matches!(full, Err(Error::PoolFull { .. })) && cache.is_empty());
/// # Ok::<_, Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct KvPool {
    shape: Arc<Shape>,
    budget: Arc<Budget>,
}

/// What the caches of a pool have in common.
#[derive(Debug)]
pub(super) struct Shape {
    /// Which transformer's keys and values these are: they mean something only to its weights.
    pub(super) owner: u64,
    pub(super) layers: usize,
    pub(super) kv_heads: usize,
    pub(super) head_dim: usize,
    pub(super) window: Option<usize>,
    pub(super) most_positions: usize,
    pub(super) dtype: DType,
    pub(super) device: Device,
}

#[derive(Debug)]
struct Budget {
    bytes: usize,
    used: AtomicUsize,
}

/// Keys and values of some positions in one layer. Dropping it returns its bytes to the budget.
#[derive(Debug)]
pub(super) struct Block {
    /// `(2, kv_heads, KV_BLOCK, head_dim)`: keys, values
    pub(super) tensor: Tensor,
    /// Its share of the budget.
    _share: Share,
}

/// A part of the budget.
#[derive(Debug)]
struct Share {
    budget: Arc<Budget>,
    bytes: usize,
}

impl Drop for Share {
    fn drop(&mut self) {
        self.budget.used.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

impl KvPool {
    /// Positions in a block.
    pub const BLOCK: usize = KV_BLOCK;

    pub(in crate::model) fn new(transformer: &Transformer, dtype: DType, bytes: usize) -> Self {
        let config = transformer.config();
        let shape = Shape {
            owner: transformer.stack_id(),
            layers: config.num_hidden_layers,
            kv_heads: config.num_key_value_heads,
            head_dim: config.head_dim,
            window: config.sliding_window,
            most_positions: config.max_position_embeddings,
            dtype,
            device: transformer.device().clone(),
        };
        let budget = Budget { bytes, used: AtomicUsize::new(0) };
        Self { shape: Arc::new(shape), budget: Arc::new(budget) }
    }

    /// An empty cache for one sequence of up to `capacity` positions.
    ///
    /// # Errors
    /// [`Error::Parameter`] for a capacity of zero or beyond memory, [`Error::ContextFull`] for one
    /// beyond the model's `max_position_embeddings`.
    pub fn new_cache(&self, capacity: usize) -> Result<KvCache> {
        KvCache::new(self, capacity)
    }

    /// Bytes that its caches may hold in total.
    #[must_use]
    pub fn budget_bytes(&self) -> usize {
        self.budget.bytes
    }

    /// Bytes that they hold now; a block held by several counts once.
    #[must_use]
    pub fn used_bytes(&self) -> usize {
        self.budget.used.load(Ordering::Relaxed)
    }

    /// Layers of each cache.
    pub(crate) fn layers(&self) -> usize {
        self.shape.layers
    }

    /// What these positions take in this many layers, those before them aside: of the blocks that they are in, all.
    /// Under a window, what is held at a time.
    pub(crate) fn bytes_of(&self, positions: Range<usize>, layers: usize) -> usize {
        let Range { start, end } = positions;
        if start >= end {
            return 0;
        }
        let blocks = end.div_ceil(KV_BLOCK) - start / KV_BLOCK;
        let seen = self.shape.window.map_or(usize::MAX, |window| window.div_ceil(KV_BLOCK) + 1);
        self.block_bytes().saturating_mul(blocks.min(seen)).saturating_mul(layers)
    }

    /// Refuses this many bytes more, where the budget or the memory of the machine has no room for them.
    ///
    /// # Errors
    /// [`Error::PoolFull`].
    pub(crate) fn check_free(&self, bytes: usize) -> Result<()> {
        let memory = if self.shape.device.is_cpu() { memory_of_machine() } else { usize::MAX };
        let (budget, used) = (self.budget.bytes.min(memory), self.used_bytes());
        match used.checked_add(bytes).filter(|sum| *sum <= budget) {
            Some(_) => Ok(()),
            None => Err(Error::PoolFull { budget, used, requested: bytes }),
        }
    }

    /// The type that keys and values are kept in.
    #[must_use]
    pub fn dtype(&self) -> DType {
        self.shape.dtype
    }

    /// Whether the two share a budget.
    pub(super) fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.budget, &other.budget)
    }

    pub(super) fn shape(&self) -> &Shape {
        &self.shape
    }

    pub(super) fn shared_shape(&self) -> Arc<Shape> {
        Arc::clone(&self.shape)
    }

    /// Bytes of a block.
    pub(super) fn block_bytes(&self) -> usize {
        let Shape { kv_heads, head_dim, dtype, .. } = &*self.shape;
        let sizes = [2, *kv_heads, KV_BLOCK, *head_dim, dtype.size_in_bytes()];
        sizes.into_iter().fold(1, usize::saturating_mul)
    }

    /// This many new blocks, or none.
    pub(super) fn take(&self, count: usize) -> Result<Vec<Block>> {
        let (bytes, budget) = (self.block_bytes(), &self.budget);
        let requested = bytes.saturating_mul(count);
        let within = |used: usize| used.checked_add(requested).filter(|sum| *sum <= budget.bytes);
        if let Err(used) = budget.used.fetch_update(Ordering::Relaxed, Ordering::Relaxed, within) {
            return Err(Error::PoolFull { budget: budget.bytes, used, requested });
        }
        // From here on, dropping a share returns its part, whatever happens.
        let shares: Vec<_> =
            (0..count).map(|_| Share { budget: Arc::clone(budget), bytes }).collect();
        let Shape { kv_heads, head_dim, dtype, device, .. } = &*self.shape;
        let block = |share| {
            let tensor = Tensor::zeros((2, *kv_heads, KV_BLOCK, *head_dim), *dtype, device)?;
            Ok(Block { tensor, _share: share })
        };
        shares.into_iter().map(block).collect()
    }
}
