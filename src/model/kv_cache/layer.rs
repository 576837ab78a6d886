//! One layer's part of a cache.

use std::collections::VecDeque;
use std::ops::Range;
use std::sync::Arc;

use candle_core::{DType, Tensor};

use super::pool::Block;
use crate::error::{Error, Result};
use crate::kernels::{self, HeldBlocks, KV_BLOCK, SequenceSpans, Spans};

/// The blocks of one layer, and how far they are filled.
///
/// ```text
/// blocks of 4, len 10, the first four positions dropped:   first 4   [4 5 6 7] [8 9 _ _]
/// position 9 stands in block 9/4 - first/4 = 1, slot 9 % 4 = 1
/// ```
#[derive(Debug, Default)]
pub(super) struct LayerCache {
    blocks: VecDeque<Arc<Block>>,
    /// The position in slot 0 of the first block: a multiple of [`KV_BLOCK`].
    first: usize,
    /// The position that the next token takes.
    len: usize,
    /// What is held from some position on, with the graph that it came from: only during a pass over
    /// more tokens than one chunk, or for as long as the cache keeps its graph.
    live: Option<Live>,
}

/// Keys and values in a graph, `(kv_heads, positions, head_dim)` each.
#[derive(Clone, Debug)]
struct Live {
    from: usize,
    keys: Tensor,
    values: Tensor,
}

/// What is needed to undo a pass.
#[derive(Debug)]
pub(super) struct Saved {
    first: usize,
    len: usize,
    /// How many blocks there were.
    blocks: usize,
    /// Those of them that the pass has dropped.
    dropped: Vec<Arc<Block>>,
    /// The last of them, if the pass writes into a copy instead.
    copied: Option<Arc<Block>>,
    live: Option<Live>,
}

impl LayerCache {
    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn oldest(&self) -> usize {
        self.first
    }

    pub(super) fn blocks(&self) -> usize {
        self.blocks.len()
    }

    pub(super) fn fork(&self) -> Self {
        let Self { blocks, first, len, live } = self;
        Self { blocks: blocks.clone(), first: *first, len: *len, live: live.clone() }
    }

    pub(super) fn reset(&mut self) {
        *self = Self::default();
    }

    /// Forgets positions from `length` on. The caller has checked that nothing before is missing.
    pub(super) fn truncate(&mut self, length: usize) {
        if length >= self.len {
            return;
        }
        self.blocks.truncate(length.div_ceil(KV_BLOCK).saturating_sub(self.first / KV_BLOCK));
        self.len = length;
        if self.blocks.is_empty() {
            self.first = length / KV_BLOCK * KV_BLOCK;
        }
        self.live = None;
    }

    pub(super) fn save(&self) -> Saved {
        let Self { blocks, first, len, live } = self;
        let (blocks, dropped, copied) = (blocks.len(), Vec::new(), None);
        Saved { first: *first, len: *len, blocks, dropped, copied, live: live.clone() }
    }

    pub(super) fn restore(&mut self, saved: Saved) {
        // What is left of the original blocks after those that were dropped.
        self.blocks.truncate(saved.blocks - saved.dropped.len());
        saved.dropped.into_iter().rev().for_each(|block| self.blocks.push_front(block));
        if let (Some(last), Some(shared)) = (self.blocks.back_mut(), saved.copied) {
            *last = shared;
        }
        (self.first, self.len, self.live) = (saved.first, saved.len, saved.live);
    }

    /// Drops the blocks that no token from here on sees. Those that this pass has made can be used
    /// again.
    pub(super) fn roll(&mut self, window: usize, saved: &mut Saved, spare: &mut Vec<Block>) {
        let needed = (self.len + 1).saturating_sub(window);
        while self.first + KV_BLOCK <= needed {
            let Some(block) = self.blocks.pop_front() else { break };
            if saved.dropped.len() < saved.blocks {
                saved.dropped.push(block);
            } else if let Ok(block) = Arc::try_unwrap(block) {
                spare.push(block);
            }
            self.first += KV_BLOCK;
        }
    }

    /// How many blocks a pass needs that adds tokens in pieces of these lengths: as many as it makes
    /// minus those that it drops on the way, and a copy of the last one if another cache holds it too.
    ///
    /// ```text
    /// blocks of 4, window 3, positions 0..6 in blocks 0 and 1, pieces of 4, 4 and 4
    /// 6..10    holds blocks 1 2      has made 2
    /// 10..14   holds blocks 2 3      has made 2 and 3
    /// 14..18   holds blocks 3 4      4 reuses 2: the pass needs 2 blocks
    /// ```
    pub(super) fn lacking(&self, pieces: &[usize], window: Option<usize>) -> usize {
        // Blocks are numbered by their positions: block n begins at position n * KV_BLOCK.
        let (mut first, mut len) = (self.first / KV_BLOCK, self.len);
        let own = first + self.blocks.len(); // blocks from here on are made by the pass
        let writes = pieces.iter().any(|new| *new > 0);
        let copy = usize::from(writes && self.shares_its_last());
        let mut most = copy;
        for new in pieces {
            if let Some(window) = window {
                let needed = (len + 1).saturating_sub(window) / KV_BLOCK;
                first = first.max(needed.min(len.div_ceil(KV_BLOCK)));
            }
            len += new;
            most = most.max(copy + len.div_ceil(KV_BLOCK).saturating_sub(first.max(own)));
        }
        most
    }

    /// Whether the next position goes into a block that another cache holds too.
    fn shares_its_last(&self) -> bool {
        let inside = self.blocks.get(self.len / KV_BLOCK - self.first / KV_BLOCK);
        inside.is_some_and(|block| Arc::strong_count(block) > 1)
    }

    /// Takes what `new` more positions need from the spare blocks of the pass.
    pub(super) fn supply(
        &mut self,
        new: usize,
        saved: &mut Saved,
        spare: &mut Vec<Block>,
    ) -> Result<()> {
        if new == 0 {
            return Ok(());
        }
        if self.shares_its_last()
            && let Some(last) = self.blocks.back_mut()
            && let Some(copy) = spare.pop()
        {
            copy.tensor.slice_set(&last.tensor, 0, 0)?;
            saved.copied = Some(std::mem::replace(last, Arc::new(copy)));
        }
        while self.first + self.blocks.len() * KV_BLOCK < self.len + new {
            let Some(block) = spare.pop() else { break };
            self.blocks.push_back(Arc::new(block));
        }
        Ok(())
    }

    /// Adds rows `rows` of new keys and values, `(kv_heads, tokens, head_dim)`. There are blocks for
    /// them that nobody else holds. If they are in a graph, it is kept beside the blocks, with the
    /// values rounded as the blocks round them.
    pub(super) fn append(
        &mut self,
        keys: &Tensor,
        values: &Tensor,
        rows: &Range<usize>,
    ) -> Result<()> {
        let tracked = keys.track_op() || values.track_op();
        if !tracked && self.live.is_none() {
            return self.write(keys, values, rows);
        }
        if rows.is_empty() {
            return Ok(());
        }
        let kept_as = self.blocks.front().map_or(keys.dtype(), |block| block.tensor.dtype());
        let new = |of: &Tensor| rounded(&of.narrow(1, rows.start, rows.len())?, kept_as);
        let (mut all_keys, mut all_values) = (new(keys)?, new(values)?);
        if self.first < self.len {
            let (old_keys, old_values) = self.gather(&(self.first..self.len), keys.dtype())?;
            all_keys = Tensor::cat(&[old_keys, all_keys], 1)?;
            all_values = Tensor::cat(&[old_values, all_values], 1)?;
        }
        self.write(&keys.detach(), &values.detach(), rows)?;
        self.live = Some(Live { from: self.first, keys: all_keys, values: all_values });
        Ok(())
    }

    fn write(&mut self, keys: &Tensor, values: &Tensor, rows: &Range<usize>) -> Result<()> {
        let mut row = rows.start;
        while row < rows.end {
            let slot = self.len % KV_BLOCK;
            let count = (KV_BLOCK - slot).min(rows.end - row);
            let Some(block) = self.blocks.get(self.len / KV_BLOCK - self.first / KV_BLOCK) else {
                let capacity = self.first + self.blocks.len() * KV_BLOCK;
                return Err(Error::ContextFull {
                    of: "the cache",
                    capacity,
                    requested: self.len + count,
                });
            };
            kernels::write_block(&block.tensor, keys, values, row, count, slot)?;
            row += count;
            self.len += count;
        }
        Ok(())
    }

    /// Whether a gradient would flow back to what computed some of what is held.
    pub(super) fn is_in_graph(&self) -> bool {
        self.live.is_some()
    }

    /// Makes what is held a constant: no gradient will flow back to the pass that computed it.
    pub(super) fn cut_graph(&mut self) {
        self.live = None;
    }

    /// Its blocks as kernels read them.
    pub(super) fn held(&self) -> HeldBlocks {
        let blocks = self.blocks.iter().map(|block| block.tensor.clone()).collect();
        HeldBlocks { first: self.first, blocks }
    }

    /// Keys and values of the positions `range`, `(kv_heads, positions, head_dim)` each in `dtype`; in
    /// their graph, where there is one.
    pub(super) fn gather(&self, range: &Range<usize>, dtype: DType) -> Result<(Tensor, Tensor)> {
        if let Some(Live { from, keys, values }) = &self.live
            && *from <= range.start
        {
            let some = |of: &Tensor| of.narrow(1, range.start - from, range.len())?.to_dtype(dtype);
            return Ok((some(keys)?, some(values)?));
        }
        gather(&self.held(), range, dtype)
    }
}

/// Keys and values of some positions of one sequence, `(kv_heads, positions, head_dim)` each in `dtype`.
pub(in crate::model) fn gather(
    held: &HeldBlocks,
    range: &Range<usize>,
    dtype: DType,
) -> Result<(Tensor, Tensor)> {
    let (keys, from) = (range.clone(), 0);
    let only = SequenceSpans { queries: 0..0, keys, from, sees: Vec::new() };
    let spans = Spans { sequences: vec![only], ..Spans::default() };
    kernels::gather(std::slice::from_ref(held), &spans, dtype)
}

/// `xs`, rounded as if it were kept as `dtype`. Its gradient is that of `xs`: the slope of rounding is 0
/// or undefined, so rounding is treated as a constant shift, which a backward pass does not see (Bengio
/// et al. 2013). The gradient of candle's `to_dtype` would be rounded as well, and overflow in `f16`.
fn rounded(xs: &Tensor, dtype: DType) -> Result<Tensor> {
    if xs.dtype() == dtype {
        return Ok(xs.clone());
    }
    let plain = xs.detach();
    let kept = plain.to_dtype(dtype)?.to_dtype(xs.dtype())?;
    match xs.track_op() {
        // The rounded value is so close that the difference is exact, and so is the sum.
        true => Ok((xs + (kept - plain)?)?),
        false => Ok(kept),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use candle_core::{Device, Var};

    /// With a graph and without, also where a number is too large or too small for its type.
    #[test]
    fn rounding_gives_the_same_numbers_with_a_gradient() -> Result<()> {
        let edges =
            [0f32, 1e-9, -3e-8, 6e-5, 1.0, 1.003, -255.7, 65519.0, 65520.0, -1e30, f32::MAX];
        let xs = Tensor::new(&edges, &Device::Cpu)?;
        let xs = Tensor::cat(&[&xs, &Tensor::randn(0f32, 1e-4, 999, &Device::Cpu)?], 0)?;
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            let var = Var::from_tensor(&xs)?;
            let (ys, slope) =
                (rounded(var.as_tensor(), dtype)?, Tensor::rand(0f32, 1.0, 1010, &Device::Cpu)?);
            let expected = xs.to_dtype(dtype)?.to_dtype(DType::F32)?;
            assert_eq!(ys.to_vec1::<f32>()?, expected.to_vec1::<f32>()?, "{dtype:?}");
            assert_eq!(rounded(&xs, dtype)?.to_vec1::<f32>()?, expected.to_vec1::<f32>()?);
            let gradients = (&ys * &slope)?.sum_all()?.backward()?;
            let gradient = gradients.get(&var).map(Tensor::to_vec1::<f32>).transpose()?;
            assert_eq!(gradient, Some(slope.to_vec1::<f32>()?), "{dtype:?}");
        }
        Ok(())
    }
}
