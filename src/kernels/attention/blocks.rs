//! The blocks of a cache: written a few tokens at a time, and gathered where no kernel reads them in
//! place.

use std::ops::Range;

use candle_core::{CpuStorage, DType, InplaceOp3, Layout, Tensor};
use half::slice::HalfFloatSliceExt;
use half::{bf16, f16};

use super::super::storage::elements_mut;
use super::{Spans, flash::KEYS};
use crate::error::{Error, Result};

/// Positions of a block. A multiple of the keys that the attention kernel reads at a time, so that these
/// lie in one block.
pub(crate) const KV_BLOCK: usize = 2 * KEYS;

/// The keys and values of one sequence.
#[derive(Clone, Debug, Default)]
pub(crate) struct HeldBlocks {
    /// The position of slot 0 of the first block, a multiple of [`KV_BLOCK`].
    pub(crate) first: usize,
    /// Each `(2, kv_heads, KV_BLOCK, head_dim)`, keys before values, contiguous.
    pub(crate) blocks: Vec<Tensor>,
}

impl HeldBlocks {
    /// Whether the blocks hold all of these positions.
    pub(super) fn have(&self, positions: &Range<usize>) -> bool {
        self.first.is_multiple_of(KV_BLOCK)
            && (positions.is_empty()
                || self.first <= positions.start
                    && positions.end <= self.first + self.blocks.len() * KV_BLOCK)
    }
}

/// Copies tokens `from..from + count` of packed keys and values, `(kv_heads, tokens, head_dim)` each,
/// into slots `slot..slot + count` of a block, in place, rounded to the block's type as candle's
/// `to_dtype` rounds. No gradient flows back.
///
/// # Errors
/// [`Error::Parameter`] where they do not fit; when a device fails.
pub(crate) fn write_block(
    block: &Tensor,
    keys: &Tensor,
    values: &Tensor,
    from: usize,
    count: usize,
    slot: usize,
) -> Result<()> {
    let ends = (from.checked_add(count), slot.checked_add(count));
    let fit = match (block.dims(), keys.dims(), ends) {
        (
            &[2, heads, slots, dim],
            &[kv_heads, tokens, key_dim],
            (Some(token_end), Some(slot_end)),
        ) => (heads, dim) == (kv_heads, key_dim) && token_end <= tokens && slot_end <= slots,
        _ => false,
    };
    if !fit || keys.dims() != values.dims() || !block.is_contiguous() {
        let expected = format!("{count} tokens from {from} on and as many slots from {slot} on");
        let got = format!("{:?}, {:?} and {:?}", block.dims(), keys.dims(), values.dims());
        return Err(Error::parameter("block, keys and values", expected, got));
    }
    let new = |tokens: &Tensor| tokens.detach().narrow(1, from, count);
    let (keys, values) = (new(keys)?, new(values)?);
    if block.device().is_cpu() {
        return Ok(block.detach().inplace_op3(&keys, &values, &Write { slot })?);
    }
    let both = Tensor::stack(&[keys, values], 0)?.to_dtype(block.dtype())?;
    Ok(block.slice_set(&both.contiguous()?, 2, slot)?)
}

/// Writes keys and values, `(kv_heads, tokens, head_dim)`, into the slots of a block from `slot` on.
struct Write {
    slot: usize,
}

impl InplaceOp3 for Write {
    fn name(&self) -> &'static str {
        "write-block"
    }

    fn cpu_fwd(
        &self,
        block: &mut CpuStorage,
        block_layout: &Layout,
        keys: &CpuStorage,
        keys_layout: &Layout,
        values: &CpuStorage,
        values_layout: &Layout,
    ) -> candle_core::Result<()> {
        for (half, (from, layout)) in
            [(keys, keys_layout), (values, values_layout)].into_iter().enumerate()
        {
            let slots = Slots { half, first: self.slot, layout: block_layout };
            match (&mut *block, from) {
                (CpuStorage::F32(block), CpuStorage::F32(from)) => {
                    slots.fill(block, from, layout, <[f32]>::copy_from_slice)
                }
                (CpuStorage::BF16(block), CpuStorage::BF16(from)) => {
                    slots.fill(block, from, layout, <[bf16]>::copy_from_slice)
                }
                (CpuStorage::F16(block), CpuStorage::F16(from)) => {
                    slots.fill(block, from, layout, <[f16]>::copy_from_slice)
                }
                (CpuStorage::BF16(block), CpuStorage::F32(from)) => {
                    slots.fill(block, from, layout, <[bf16]>::convert_from_f32_slice)
                }
                (CpuStorage::F16(block), CpuStorage::F32(from)) => {
                    slots.fill(block, from, layout, <[f16]>::convert_from_f32_slice)
                }
                _ => candle_core::bail!("write-block: expected f32 or the type of the block"),
            }?;
        }
        Ok(())
    }
}

/// Where keys (half 0) or values (half 1) go.
struct Slots<'a> {
    half: usize,
    first: usize,
    /// `(2, kv_heads, slots, head_dim)`
    layout: &'a Layout,
}

impl Slots<'_> {
    /// Writes `from`, `(kv_heads, tokens, head_dim)`, row by row.
    fn fill<B, T>(
        &self,
        block: &mut [B],
        from: &[T],
        layout: &Layout,
        write: impl Fn(&mut [B], &[T]),
    ) -> candle_core::Result<()> {
        let (_, kv_heads, slots, head_dim) = self.layout.shape().dims4()?;
        let block = elements_mut(block, self.layout)?;
        let (_, tokens, _) = layout.shape().dims3()?;
        let &[of_head, of_token, 1] = layout.stride() else {
            candle_core::bail!("write-block: expected whole rows, not {layout:?}");
        };
        for head in 0..kv_heads {
            for token in 0..tokens {
                let to = ((self.half * kv_heads + head) * slots + self.first + token) * head_dim;
                let from_start = layout.start_offset() + head * of_head + token * of_token;
                write(&mut block[to..to + head_dim], &from[from_start..from_start + head_dim]);
            }
        }
        Ok(())
    }
}

/// Packed keys and values, `(kv_heads, keys, head_dim)` in `dtype`, for the positions that the spans
/// name.
///
/// # Errors
/// When a device has no room for them, the blocks do not hold these positions, or there are none.
pub(crate) fn gather(held: &[HeldBlocks], spans: &Spans, dtype: DType) -> Result<(Tensor, Tensor)> {
    let (mut keys, mut values) = (Vec::new(), Vec::new());
    for (held, spans) in held.iter().zip(&spans.sequences) {
        if !held.have(&spans.keys) {
            let expected = format!("blocks that hold positions {:?}", spans.keys);
            let got = format!("{} from position {} on", held.blocks.len(), held.first);
            return Err(Error::parameter("blocks", expected, got));
        }
        let mut position = spans.keys.start;
        while position < spans.keys.end {
            // With a first block at 96, block 1 holds positions 192..288.
            let (number, slot) =
                ((position - held.first) / KV_BLOCK, (position - held.first) % KV_BLOCK);
            let count = (KV_BLOCK - slot).min(spans.keys.end - position);
            let slots = held.blocks[number].narrow(2, slot, count)?; // (2, kv_heads, count, head_dim)
            keys.push(slots.get(0)?);
            values.push(slots.get(1)?);
            position += count;
        }
    }
    let packed = |parts: &[Tensor]| -> Result<Tensor> {
        let copy = match parts {
            [] => return Err(Error::parameter("keys and values", "some", "none")),
            // Always a copy: the block may be overwritten before the backward pass.
            [only] => only.force_contiguous()?,
            parts => Tensor::cat(parts, 1)?,
        };
        Ok(copy.to_dtype(dtype)?)
    };
    Ok((packed(&keys)?, packed(&values)?))
}
