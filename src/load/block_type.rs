//! The types of blocks that a matrix may be stored in.

use candle_core::quantized::GgmlDType;
use half::f16;

use crate::model::{Codebook, reads_blocks};

/// A type of blocks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum BlockType {
    Candle(GgmlDType),
    /// Candle has no such type.
    Codebook(Codebook),
}

impl From<GgmlDType> for BlockType {
    fn from(blocks: GgmlDType) -> Self {
        Self::Candle(blocks)
    }
}

impl From<Codebook> for BlockType {
    fn from(codebook: Codebook) -> Self {
        Self::Codebook(codebook)
    }
}

impl BlockType {
    /// Weights of a block.
    pub(super) fn block_size(self) -> usize {
        match self {
            Self::Candle(blocks) => blocks.block_size(),
            Self::Codebook(codebook) => codebook.block_size(),
        }
    }

    /// Bytes of a block.
    pub(super) fn type_size(self) -> usize {
        match self {
            Self::Candle(blocks) => blocks.type_size(),
            Self::Codebook(codebook) => codebook.type_size(),
        }
    }

    /// Where in a block its `f16` scales and offsets stand, by the structs of llama.cpp's `ggml-common.h`. If these are
    /// finite, so are all weights: what multiplies them has at most 14 bits. `None` where other things count.
    fn halves(self) -> Option<&'static [usize]> {
        let Self::Candle(blocks) = self else { return None };
        Some(match blocks {
            GgmlDType::Q4_0 | GgmlDType::Q5_0 | GgmlDType::Q8_0 => &[0],
            GgmlDType::Q4_1 | GgmlDType::Q5_1 | GgmlDType::Q4K | GgmlDType::Q5K => &[0, 2],
            GgmlDType::Q2K => &[80, 82],
            GgmlDType::Q3K => &[108],
            GgmlDType::Q6K => &[208],
            _ => return None,
        })
    }

    /// Whether all weights of these blocks are finite, as far as that can be seen without computing them.
    pub(super) fn are_surely_finite(self, blocks: &[u8]) -> bool {
        let Some(halves) = self.halves() else { return false };
        blocks.chunks_exact(self.type_size()).all(|block| {
            halves.iter().all(|&at| {
                let half = block.get(at..).and_then(<[u8]>::first_chunk);
                half.is_some_and(|bits| f16::from_le_bytes(*bits).is_finite())
            })
        })
    }

    /// Whether there are kernels for it.
    pub(super) fn is_multiplied(self) -> bool {
        match self {
            Self::Candle(blocks) => reads_blocks(blocks),
            Self::Codebook(_) => true,
        }
    }

    /// Bits per weight, times 256: an integer for every type.
    pub(super) fn bits(self) -> usize {
        self.type_size() * 8 * 256 / self.block_size()
    }

    pub(super) fn name(self) -> String {
        match self {
            Self::Candle(blocks) => format!("{blocks:?}"),
            Self::Codebook(codebook) => codebook.name().to_string(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::borrow::Cow;

    use candle_core::CpuStorage;
    use memmap2::MmapMut;
    use proptest::prelude::*;

    use super::*;

    const TYPES: [GgmlDType; 10] = [
        GgmlDType::Q4_0,
        GgmlDType::Q4_1,
        GgmlDType::Q5_0,
        GgmlDType::Q5_1,
        GgmlDType::Q8_0,
        GgmlDType::Q2K,
        GgmlDType::Q3K,
        GgmlDType::Q4K,
        GgmlDType::Q5K,
        GgmlDType::Q6K,
    ];

    proptest! {
        /// Whatever the bytes of a block are. With the largest of `f16` at its scales, too.
        #[test]
        fn blocks_with_finite_scales_have_finite_weights(
            which in 0..TYPES.len(), seed in any::<u64>(), largest in any::<bool>(),
        ) {
            use rand::{RngCore, SeedableRng};
            let (blocks, mut rng) = (TYPES[which], rand_chacha::ChaCha8Rng::seed_from_u64(seed));
            let kind = BlockType::from(blocks);
            // A mapping, because candle asserts that blocks are aligned.
            let mut bytes = MmapMut::map_anon(blocks.type_size())?;
            rng.fill_bytes(&mut bytes);
            if largest {
                for at in kind.halves().unwrap_or_default() {
                    bytes[*at..at + 2].copy_from_slice(&f16::MAX.to_le_bytes());
                }
            }
            let stored = blocks.from_data(Cow::Borrowed(&bytes));
            let CpuStorage::F32(weights) = stored.dequantize(blocks.block_size())? else {
                return Err(TestCaseError::fail("not f32"));
            };
            let finite = weights.iter().all(|weight| weight.is_finite());
            prop_assert!(finite || !kind.are_surely_finite(&bytes), "{blocks:?}");
            prop_assert!(!largest || kind.are_surely_finite(&bytes), "{blocks:?}");
        }
    }
}
