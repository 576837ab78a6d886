//! The types of blocks that a matrix may be stored in.

use candle_core::quantized::GgmlDType;

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
