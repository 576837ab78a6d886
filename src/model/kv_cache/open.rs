//! Caches that a pass is writing into.

use std::ops::Range;

use candle_core::Tensor;

use super::layer::Saved;
use super::pool::Block;
use super::{KvCache, LayerCache};
use crate::error::{Error, Result};
use crate::kernels::HeldBlocks;
use crate::model::mask::Mask;

/// The caches of a pass, one for each of its sequences, while it runs. Unless it is
/// [committed](Self::commit), they are restored to what they were when it began, however it ends.
pub(in crate::model) struct Open<'a, 'c> {
    caches: &'a mut [&'c mut KvCache],
    layers: Range<usize>,
    /// For each cache, for each of the layers.
    saved: Vec<Vec<Saved>>,
    /// For each cache, blocks that hold nothing yet, or nothing any longer.
    spare: Vec<Vec<Block>>,
}

/// What the queries of a pass attend to.
#[derive(Debug)]
pub(in crate::model) enum Remembered {
    /// Keys and values of all sequences one after the other, `(kv_heads, keys, head_dim)` each.
    Packed(Tensor, Tensor),
    /// The blocks of each sequence.
    Blocks(Vec<HeldBlocks>),
}

impl<'a, 'c> Open<'a, 'c> {
    /// Begins a pass over `layers`, all of which continue from the same position. It runs in `pieces`,
    /// each over some of the caches, with a number of new tokens for each of these. All the memory that
    /// they will need is taken now, for all of them or for none.
    pub(in crate::model) fn begin(
        caches: &'a mut [&'c mut KvCache],
        layers: &Range<usize>,
        pieces: &[(Range<usize>, Vec<usize>)],
    ) -> Result<Self> {
        let mut new = vec![Vec::new(); caches.len()];
        for (which, lengths) in pieces {
            let new = new.get_mut(which.clone()).unwrap_or(&mut []);
            new.iter_mut().zip(lengths).for_each(|(new, length)| new.push(*length));
        }
        for (cache, new) in caches.iter().zip(&new) {
            cache.check_room(layers, new.iter().sum())?;
        }
        let spare = take(caches, layers, &new)?;
        let mut open = Self { caches, layers: layers.clone(), saved: Vec::new(), spare };
        for cache in open.caches.iter_mut() {
            open.saved.push(cache.layers_mut(layers).iter().map(LayerCache::save).collect());
        }
        open.cut_graphs();
        Ok(open)
    }

    /// The oldest position that all layers of each of `which` hold.
    pub(in crate::model) fn oldest(&self, which: &Range<usize>) -> Vec<usize> {
        let caches = self.caches.get(which.clone()).unwrap_or(&[]);
        let oldest = |cache: &&'c mut KvCache| {
            let layers = cache.layers.get(self.layers.clone()).unwrap_or(&[]);
            layers.iter().map(LayerCache::oldest).max().unwrap_or(0)
        };
        caches.iter().map(oldest).collect()
    }

    /// Makes room for the next piece in each of its caches, dropping what no window will see.
    pub(in crate::model) fn reserve(&mut self, which: &Range<usize>, new: &[usize]) -> Result<()> {
        let Self { caches, layers, saved, spare } = self;
        let caches = caches.get_mut(which.clone()).unwrap_or(&mut []);
        let saved = saved.get_mut(which.clone()).unwrap_or(&mut []);
        let spare = spare.get_mut(which.clone()).unwrap_or(&mut []);
        for (((cache, saved), spare), new) in caches.iter_mut().zip(saved).zip(spare).zip(new) {
            let window = cache.rolls_at();
            for (layer, saved) in cache.layers_mut(layers).iter_mut().zip(saved) {
                if let Some(window) = window {
                    layer.roll(window, saved, spare);
                }
                layer.supply(*new, saved, spare)?;
            }
        }
        Ok(())
    }

    /// Adds the keys and values of new tokens to one layer, `(kv_heads, tokens, head_dim)` each, and
    /// returns all that `mask` says are there, these included. [`Open::reserve`] has made the room.
    ///
    /// Where these, or any that a cache holds, are tracked, a copy in their own type is returned,
    /// because blocks are overwritten, and keys and values carry their gradient.
    pub(in crate::model) fn remember(
        &mut self,
        layer: usize,
        which: &Range<usize>,
        (keys, values): (&Tensor, &Tensor),
        mask: &Mask,
    ) -> Result<Remembered> {
        let rows: Vec<_> = mask.spans().sequences.iter().map(|this| this.queries.clone()).collect();
        self.write(layer, which, (keys, values), &rows)?;
        let held = self.caches.get(which.clone()).unwrap_or(&[]);
        let held: Vec<_> = held.iter().filter_map(|cache| cache.layers.get(layer)).collect();
        let in_graph = |layer: &&LayerCache| layer.is_in_graph();
        let tracked = keys.track_op() || values.track_op() || held.iter().any(in_graph);
        if !tracked && keys.device().is_cpu() {
            return Ok(Remembered::Blocks(held.into_iter().map(LayerCache::held).collect()));
        }
        let (mut all_keys, mut all_values) = (Vec::new(), Vec::new());
        // There is nothing to gather for a sequence without tokens.
        let sequences = held.into_iter().zip(&mask.spans().sequences);
        for (layer, this) in sequences.filter(|(_, this)| !this.keys.is_empty()) {
            let (keys, values) = layer.gather(&this.keys, keys.dtype())?;
            all_keys.push(keys);
            all_values.push(values);
        }
        Ok(Remembered::Packed(Tensor::cat(&all_keys, 1)?, Tensor::cat(&all_values, 1)?))
    }

    /// Adds, in one layer of each of `which`, its rows of new keys and values.
    pub(super) fn write(
        &mut self,
        layer: usize,
        which: &Range<usize>,
        (keys, values): (&Tensor, &Tensor),
        rows: &[Range<usize>],
    ) -> Result<()> {
        let caches = self.caches.get_mut(which.clone()).unwrap_or(&mut []);
        for (cache, rows) in caches.iter_mut().zip(rows) {
            let layers = cache.layers.len();
            let Some(layer) = cache.layers.get_mut(layer) else {
                let expected = format!("one of more than {layer} layers");
                return Err(Error::parameter("cache", expected, layers));
            };
            layer.append(keys, values, rows)?;
        }
        Ok(())
    }

    /// Keeps what was added.
    pub(in crate::model) fn commit(mut self) {
        self.saved.clear();
    }

    fn cut_graphs(&mut self) {
        for cache in self.caches.iter_mut().filter(|cache| !cache.keeps_graph) {
            cache.layers.iter_mut().for_each(LayerCache::cut_graph);
        }
    }
}

/// Takes the blocks that each of the caches lacks for its new tokens from its pool.
fn take(
    caches: &[&mut KvCache],
    layers: &Range<usize>,
    new: &[Vec<usize>],
) -> Result<Vec<Vec<Block>>> {
    let lacking = |(cache, new): (&&mut KvCache, &Vec<usize>)| -> usize {
        let layers = cache.layers.get(layers.clone()).unwrap_or(&[]);
        layers.iter().map(|layer| layer.lacking(new, cache.rolls_at())).sum()
    };
    let lacking: Vec<usize> = caches.iter().zip(new).map(lacking).collect();
    let mut spare: Vec<Vec<Block>> = caches.iter().map(|_| Vec::new()).collect();
    for (index, cache) in caches.iter().enumerate() {
        let of_pool = |other: &usize| caches[*other].pool.is(&cache.pool);
        if (0..index).any(|other| of_pool(&other)) {
            continue;
        }
        let of_pool: Vec<usize> = (index..caches.len()).filter(of_pool).collect();
        let mut blocks = cache.pool.take(of_pool.iter().map(|other| lacking[*other]).sum())?;
        for other in of_pool {
            spare[other] = blocks.split_off(blocks.len() - lacking[other]);
        }
    }
    Ok(spare)
}

impl Drop for Open<'_, '_> {
    fn drop(&mut self) {
        let Self { caches, layers, saved, .. } = self;
        for (cache, saved) in caches.iter_mut().zip(saved.drain(..)) {
            for (layer, saved) in cache.layers_mut(layers).iter_mut().zip(saved) {
                layer.restore(saved);
            }
        }
        self.cut_graphs();
    }
}
