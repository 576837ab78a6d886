//! Attention over packed sequences, whose keys lie packed or in the blocks of a cache.
//!
//! ```text
//! spans       who sees whom, as numbers
//! blocks      the blocks of a cache: written, and gathered into packed keys
//! composite   scores and shares in candle's operations, on any device: what the others are tested against
//! gradient    on the CPU, with a gradient, keeping no scores
//! flash       on the CPU, without a gradient, reading narrow keys and blocks in place
//! flash_attn  on CUDA, by candle's own kernel
//! ```

mod blocks;
mod composite;
mod flash;
#[cfg(any(test, feature = "flash-attn"))]
mod flash_attn;
mod gradient;
mod spans;
#[cfg(test)]
mod tests;

use candle_core::{DType, Tensor};

use crate::error::{Error, Result};
pub(crate) use blocks::{HeldBlocks, KV_BLOCK, gather, write_block};
pub(super) use composite::attend as attend_composite;
pub(crate) use composite::{scores, shares};
pub(super) use flash::attend as attend_in_place;
#[cfg(feature = "flash-attn")]
pub(super) use flash_attn::attend as attend_on_cuda;
pub(super) use gradient::Attend;
pub(crate) use spans::{SequenceSpans, Spans};

/// The keys and values of the sequences of a pass.
#[derive(Clone, Copy, Debug)]
pub(crate) enum KeyValues<'a> {
    /// Those of all sequences one after the other, as [`SequenceSpans::from`] says.
    Packed {
        /// `(kv_heads, keys, head_dim)`. On the CPU, keys and values may be narrower than queries.
        keys: &'a Tensor,
        /// `(kv_heads, keys, head_dim)`
        values: &'a Tensor,
    },
    /// Those of each sequence in blocks, in the order of the spans.
    Blocks(&'a [HeldBlocks]),
}

impl KeyValues<'_> {
    /// All tensors of it.
    pub(super) fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        let (packed, held) = match *self {
            Self::Packed { keys, values } => ([Some(keys), Some(values)], [].as_slice()),
            Self::Blocks(held) => ([None; 2], held),
        };
        packed.into_iter().flatten().chain(held.iter().flat_map(|held| &held.blocks))
    }

    /// Whether [`attend_in_place`] reads them.
    pub(super) fn are_read_in_place(&self) -> bool {
        let read = |dtype| matches!(dtype, DType::F32 | DType::BF16 | DType::F16);
        self.tensors().all(|it| it.device().is_cpu() && read(it.dtype()))
    }
}

/// Refuses tensors that do not fit each other or the spans, and spans that contradict themselves, before
/// anything is computed.
pub(super) fn check(q: &Tensor, held: &KeyValues<'_>, spans: &Spans) -> Result<()> {
    let (queries, keys) = (spans.queries(), spans.keys());
    let fits = |kv_heads: usize, key_dim: usize| match *q.dims() {
        [heads, q_len, head_dim] => {
            head_dim == key_dim
                && [heads, kv_heads, head_dim].iter().all(|dim| *dim > 0)
                && heads.is_multiple_of(kv_heads)
                && q_len == queries
        }
        _ => false,
    };
    let fit = match held {
        KeyValues::Packed { keys: k, values: v } => match *k.dims() {
            [kv_heads, k_len, key_dim] => {
                fits(kv_heads, key_dim)
                    && k_len == keys
                    && k.dims() == v.dims()
                    && k.dtype() == v.dtype()
            }
            _ => false,
        },
        KeyValues::Blocks(held) => {
            let mut blocks = held.iter().flat_map(|held| &held.blocks);
            let like = blocks.next();
            held.len() == spans.sequences.len()
                && held.iter().zip(&spans.sequences).all(|(held, spans)| held.have(&spans.keys))
                && like.is_none_or(|like| match *like.dims() {
                    [2, kv_heads, KV_BLOCK, key_dim] => {
                        let same =
                            |it: &Tensor| it.dims() == like.dims() && it.dtype() == like.dtype();
                        fits(kv_heads, key_dim)
                            && like.is_contiguous()
                            && blocks.all(|it| same(it) && it.is_contiguous())
                    }
                    _ => false,
                })
        }
    };
    if fit && spans.are_consistent() {
        return Ok(());
    }
    let expected = format!(
        "spans that name all of them, queries (heads, {queries}, dim) and twice (kv_heads, {keys}, dim) or blocks (2, kv_heads, {KV_BLOCK}, dim), kv_heads a divisor of heads"
    );
    let shapes: Vec<_> = held.tensors().map(Tensor::dims).collect();
    Err(Error::parameter("q, k and v", expected, format!("{:?} and {shapes:?}", q.dims())))
}
