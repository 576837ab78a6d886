//! What a sequence remembers: the keys and values of its tokens, layer by layer, in blocks.

mod kept;
mod layer;
mod open;
mod pool;
#[cfg(test)]
mod tests;

use std::ops::Range;
use std::sync::OnceLock;

use candle_core::{DType, Tensor};

use self::layer::LayerCache;
use self::pool::Shape;
use crate::error::{Error, Result};
use crate::kernels::KV_BLOCK;

pub use self::kept::KeptTokens;
pub(super) use self::layer::gather;
pub(super) use self::open::{Open, Remembered};
pub use self::pool::KvPool;

/// Tokens that a cached pass runs through the blocks at a time.
pub(crate) const CHUNK: usize = 512;

/// The keys and values of one sequence.
///
/// They lie in blocks of [`KvPool::BLOCK`] positions. [`fork`](Self::fork) gives a second cache that
/// continues from here and shares the blocks; whichever of the two first writes into a shared block gets
/// a copy of it. Under a sliding window, blocks that no later token sees are dropped.
///
/// ```text
/// blocks of 4, window 5, 10 positions held:   [· · · ·] [4 5 6 7] [8 9 _ _]
/// a fork shares both blocks; token 10 of either goes into a copy of the second
/// ```
///
/// It may keep keys and values in a narrower type than they are computed in. Then a token attends to all
/// of them as they are kept, including its own and those that came in the same pass, so that the results
/// do not depend on how a text was cut into passes.
///
/// A pass that fails leaves the caches it was given as they were.
#[derive(Debug)]
pub struct KvCache {
    pool: KvPool,
    layers: Vec<LayerCache>,
    capacity: usize,
    /// Whether what is held keeps the graph it came from when a pass ends.
    keeps_graph: bool,
    /// Whether it also holds what no window will see.
    keeps_all: bool,
}

impl KvCache {
    fn new(pool: &KvPool, capacity: usize) -> Result<Self> {
        let Shape { layers, window, most_positions, device, .. } = pool.shape();
        if capacity == 0 {
            return Err(Error::parameter("capacity", "at least one position", capacity));
        }
        if capacity > *most_positions {
            return Err(Error::ContextFull {
                of: "the model",
                capacity: *most_positions,
                requested: capacity,
            });
        }
        let held = window.map_or(capacity, |w| capacity.min((w - 1).saturating_add(CHUNK)));
        let bytes = [pool.block_bytes(), held.div_ceil(KV_BLOCK), *layers];
        let bytes = bytes.into_iter().fold(1, usize::saturating_mul);
        if device.is_cpu() && !fits_memory(bytes) {
            return Err(Error::parameter("capacity", "a cache that fits memory", capacity));
        }
        let layers = (0..*layers).map(|_| LayerCache::default()).collect();
        Ok(Self { pool: pool.clone(), layers, capacity, keeps_graph: false, keeps_all: false })
    }

    /// A second cache that continues from here. It costs no memory until one of the two writes, and then
    /// only that of the blocks that are written to.
    ///
    /// ```
    /// # use candle_core::Device;
    /// # use hybrid_attention::{HybridModel, model::Pass};
    /// let model = HybridModel::tiny(&Device::Cpu)?;
    /// let transformer = model.transformer();
    /// let mut cache = transformer.new_cache(64)?;
    /// let prompt = transformer.embed_ids(&[11, 150, 12])?;
    /// transformer.forward(&prompt, transformer.all_layers(), Pass::Cached(&mut cache))?;
    ///
    /// let mut other = cache.fork();
    /// assert_eq!(cache.pool().used_bytes(), cache.bytes()); // shared
    /// let token = transformer.embed_ids(&[42])?;
    /// transformer.forward(&token, transformer.all_layers(), Pass::Cached(&mut other))?;
    /// assert_eq!((cache.len(), other.len()), (3, 4));
    /// # Ok::<_, hybrid_attention::Error>(())
    /// ```
    #[must_use]
    pub fn fork(&self) -> Self {
        Self {
            pool: self.pool.clone(),
            layers: self.layers.iter().map(LayerCache::fork).collect(),
            capacity: self.capacity,
            keeps_graph: self.keeps_graph,
            keeps_all: self.keeps_all,
        }
    }

    /// Positions added so far.
    #[must_use]
    pub fn len(&self) -> usize {
        self.layers.iter().map(LayerCache::len).min().unwrap_or(0)
    }

    /// Whether nothing has been added yet.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Positions there is room for in total.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// The oldest position whose keys and values are still there in every layer: 0 unless a sliding
    /// window has moved on.
    #[must_use]
    pub fn oldest(&self) -> usize {
        self.layers.iter().map(LayerCache::oldest).max().unwrap_or(0)
    }

    /// The type that keys and values are kept in.
    #[must_use]
    pub fn dtype(&self) -> DType {
        self.pool.dtype()
    }

    /// Where its memory comes from.
    #[must_use]
    pub fn pool(&self) -> &KvPool {
        &self.pool
    }

    /// Bytes of its blocks in all layers. A block that a [`fork`](Self::fork) shares counts in both.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let blocks: usize = self.layers.iter().map(LayerCache::blocks).sum();
        blocks.saturating_mul(self.pool.block_bytes())
    }

    /// Forgets everything, and releases its memory.
    pub fn reset(&mut self) {
        self.layers.iter_mut().for_each(LayerCache::reset);
    }

    /// Forgets all but the first `length` positions; does nothing if there are no more than that.
    ///
    /// # Errors
    /// [`Error::CacheRolled`] when a sliding window has dropped positions that the next token would have
    /// to see; the cache is then unchanged.
    pub fn truncate(&mut self, length: usize) -> Result<()> {
        self.truncate_layers(0..self.layers.len(), length)
    }

    /// As [`KvCache::truncate`], in these layers only: what was computed before layer `a` remains valid
    /// when the stream that enters it has changed.
    ///
    /// # Errors
    /// As [`KvCache::truncate`]; [`Error::Parameter`] for layers that do not exist.
    pub fn truncate_layers(&mut self, layers: Range<usize>, length: usize) -> Result<()> {
        let (count, window) = (self.layers.len(), self.pool.shape().window);
        let Some(layers) = self.layers.get_mut(layers.clone()) else {
            let expected = format!("a range within 0..{count}");
            return Err(Error::parameter("layers", expected, format!("{layers:?}")));
        };
        // The next token sees positions needed..length, and itself.
        let needed = window.map_or(0, |window| length.saturating_add(1).saturating_sub(window));
        for layer in layers.iter() {
            if length < layer.len() && needed < length && needed < layer.oldest() {
                return Err(Error::CacheRolled { length, oldest: layer.oldest() });
            }
        }
        layers.iter_mut().for_each(|layer| layer.truncate(length));
        Ok(())
    }

    /// Adds keys and values that were computed elsewhere, `(kv_heads, tokens, head_dim)` each, after
    /// what `layer` holds.
    ///
    /// # Errors
    /// [`Error::ContextFull`], [`Error::PoolFull`]; [`Error::Parameter`] for a layer that does not exist
    /// or tensors of another shape. Nothing is added then.
    pub(crate) fn extend(&mut self, layer: usize, keys: &Tensor, values: &Tensor) -> Result<()> {
        let Shape { kv_heads, head_dim, .. } = self.pool.shape();
        let tokens = match (keys.dims(), values.dims()) {
            ([heads, tokens, dim], of_values)
                if (heads, dim) == (kv_heads, head_dim) && keys.dims() == of_values =>
            {
                *tokens
            }
            _ => {
                let expected = format!("twice ({kv_heads}, tokens, {head_dim})");
                let got = format!("{:?} and {:?}", keys.dims(), values.dims());
                return Err(Error::parameter("keys and values", expected, got));
            }
        };
        let both = (keys.clone(), values.clone());
        self.append(layer..layer.saturating_add(1), tokens, |_| Ok(both.clone()))
    }

    /// Adds so many tokens after what `layers` hold, with the keys and values that `of` gives of each layer; all
    /// or, if it fails, none.
    fn append(
        &mut self,
        layers: Range<usize>,
        tokens: usize,
        of: impl Fn(usize) -> Result<(Tensor, Tensor)>,
    ) -> Result<()> {
        let mut caches = [self];
        let mut open = Open::begin(&mut caches, &layers, &[(0..1, vec![tokens])])?;
        open.reserve(&(0..1), &[tokens])?;
        for layer in layers {
            let (keys, values) = of(layer)?;
            open.write(layer, &(0..1), (&keys, &values), std::slice::from_ref(&(0..tokens)))?;
        }
        open.commit();
        Ok(())
    }

    /// The keys and values that `layer` holds for positions `range`, `(kv_heads, tokens, head_dim)` each
    /// in `dtype`: with the graph they came from, if that was kept.
    pub(crate) fn keys_and_values(
        &self,
        layer: usize,
        range: &Range<usize>,
        dtype: DType,
    ) -> Result<(Tensor, Tensor)> {
        let Some(layer) = self.layers.get(layer) else {
            let expected = format!("less than {}", self.layers.len());
            return Err(Error::parameter("layer", expected, layer));
        };
        layer.gather(range, dtype)
    }

    /// The same, but dropping nothing: neither what no window will see, nor, when a pass ends, the graph
    /// that its keys and values come from.
    pub(crate) fn keeping_all(self) -> Self {
        Self { keeps_graph: true, keeps_all: true, ..self }
    }

    /// Sets whether it keeps, from now on, the graph that its keys and values come from.
    pub(crate) fn keep_graph(&mut self, keeps_graph: bool) {
        self.keeps_graph = keeps_graph;
        if !keeps_graph {
            self.layers.iter_mut().for_each(LayerCache::cut_graph);
        }
    }

    /// Refuses use by another transformer.
    pub(super) fn check_owner(&self, transformer: u64) -> Result<()> {
        if self.pool.shape().owner == transformer {
            return Ok(());
        }
        Err(Error::parameter("cache", "one made by this very transformer", "another's"))
    }

    /// The position from which `layers` continue, which must be the same for all of them.
    pub(crate) fn position(&self, layers: &Range<usize>) -> Result<usize> {
        let Some(layers) = self.layers.get(layers.clone()) else {
            let expected = format!("one of at least {} layers", layers.end);
            return Err(Error::parameter("cache", expected, self.layers.len()));
        };
        let Some(first) = layers.first() else { return Ok(self.len()) };
        if layers.iter().any(|layer| layer.len() != first.len()) {
            return Err(Error::parameter(
                "cache",
                "the same length in every layer of the pass",
                "layers of different length: truncate it to what they have in common",
            ));
        }
        Ok(first.len())
    }

    /// Refuses `new` more positions in `layers` where there is no room for all of them.
    pub(super) fn check_room(&self, layers: &Range<usize>, new: usize) -> Result<()> {
        let requested = self.position(layers)?.saturating_add(new);
        if requested > self.capacity {
            return Err(Error::ContextFull { of: "the cache", capacity: self.capacity, requested });
        }
        Ok(())
    }

    /// The window beyond which it drops blocks.
    fn rolls_at(&self) -> Option<usize> {
        self.pool.shape().window.filter(|_| !self.keeps_all)
    }

    fn layers_mut(&mut self, layers: &Range<usize>) -> &mut [LayerCache] {
        self.layers.get_mut(layers.clone()).unwrap_or(&mut [])
    }
}

/// Whether this many bytes can be allocated. If they cannot, making a tensor of that size would abort
/// the process.
fn fits_memory(bytes: usize) -> bool {
    if bytes > memory_of_machine() {
        return false; // where memory is overcommitted, all of it could be had, and not be used
    }
    let mut memory = Vec::<u8>::new();
    let fits = memory.try_reserve_exact(bytes).is_ok();
    std::hint::black_box(memory); // otherwise the compiler may optimise the allocation away
    fits
}

/// Bytes of memory and of room to swap; where the system does not say, no limit.
fn memory_of_machine() -> usize {
    static BYTES: OnceLock<usize> = OnceLock::new();
    let kilobytes = |line: &str| -> Option<usize> {
        let (key, value) = line.split_once(':')?;
        let counts = ["MemTotal", "SwapTotal"].contains(&key);
        counts.then(|| value.trim().strip_suffix("kB")?.trim().parse().ok()).flatten()
    };
    *BYTES.get_or_init(|| match std::fs::read_to_string("/proc/meminfo") {
        Ok(text) => match text.lines().filter_map(kilobytes).fold(0, usize::saturating_add) {
            0 => usize::MAX,
            sum => sum.saturating_mul(1024),
        },
        Err(_) => usize::MAX,
    })
}
