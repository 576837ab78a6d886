//! The type that weights are kept in, in memory.

use candle_core::quantized::GgmlDType;
use candle_core::{DType, Device};

use super::block_type::BlockType;
use super::convert::Stored;
use crate::error::{Error, Result};

/// The type that weights are kept in, in memory. On the CPU all computing is in `f32`, whatever the
/// weights are kept in, unless [`Compute`](crate::Compute) says otherwise; up to 16 tokens at a time are
/// multiplied with blocks in integers of 21 bits and a sign, nearly as fine as `f32` among numbers of similar
/// size (`Q8_0` only where the processor has VNNI).
///
/// A [`DType`], an `Option` of one (`None` is the default) and a [`GgmlDType`] convert into it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum WeightType {
    /// As they are stored: `f32`, `f16` and `bf16` stay as they are, `f64` becomes `f32`, FP8 becomes
    /// `bf16`, and matrices in blocks of a GGUF type stay in them (those in `Q8_1` and `Q8K`, which no file
    /// should hold, and on other devices than the CPU those in `IQ4_NL`, `IQ4_XS` and `MXFP4`, become `f32`).
    #[default]
    Stored,
    /// In `f32`, `f16` or `bf16`, whatever they are stored as.
    Dense(DType),
    /// Matrices in blocks of a GGUF type, rounded as they are loaded; norms, the routers of mixtures and the
    /// like as stored.
    ///
    /// Where rounding costs most, in the head (the embedding table, if that is the head), in `v_proj`
    /// and in `down_proj`, which in an expert is `w2`, blocks have at least `Q6K`, much as in llama.cpp's mixes (`Q4_K_M`). Also as
    /// there, if the rows of a matrix are not a multiple of the 256 weights of a `K` block, blocks of 32
    /// weights are used instead (`Q2K`, `Q3K`: `Q4_0`; `Q4K`: `Q5_0`; `Q5K`: `Q5_1`; `Q6K`: `Q8_0`).
    /// Rows that are not a multiple of 32 stay as they are stored, and so do matrices that are stored in
    /// blocks no larger than the requested ones.
    Quantized(GgmlDType),
}

impl From<DType> for WeightType {
    fn from(dtype: DType) -> Self {
        Self::Dense(dtype)
    }
}

impl From<GgmlDType> for WeightType {
    fn from(blocks: GgmlDType) -> Self {
        Self::Quantized(blocks)
    }
}

impl From<Option<DType>> for WeightType {
    fn from(dtype: Option<DType>) -> Self {
        dtype.map_or(Self::Stored, Self::Dense)
    }
}

impl WeightType {
    /// The type for a tensor that is not a matrix to multiply with.
    pub(super) fn dense(self, stored: Stored) -> DType {
        match self {
            Self::Dense(dtype) => dtype,
            Self::Stored | Self::Quantized(_) => stored.dtype(),
        }
    }

    /// The blocks that a matrix with rows of `row_len` weights is kept in; `None` if in none. A `dear`
    /// matrix is one where rounding costs more than in others.
    pub(super) fn blocks(
        self,
        stored: Stored,
        row_len: usize,
        dear: bool,
        device: &Device,
    ) -> Result<Option<BlockType>> {
        let kept = match stored {
            Stored::Blocks(BlockType::Codebook(_)) if !device.is_cpu() => None,
            Stored::Blocks(blocks) if blocks.is_multiplied() => Some(blocks),
            _ => None,
        };
        let wanted = match self {
            Self::Stored => return Ok(kept),
            Self::Dense(_) => return Ok(None),
            Self::Quantized(wanted) if BlockType::from(wanted).is_multiplied() => wanted,
            Self::Quantized(other) => {
                let expected = "Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2K, Q3K, Q4K, Q5K or Q6K";
                return Err(Error::parameter("blocks", expected, format!("{other:?}")));
            }
        };
        let bits = |blocks: GgmlDType| BlockType::from(blocks).bits();
        let wanted = match dear && bits(wanted) < bits(GgmlDType::Q6K) {
            true => GgmlDType::Q6K,
            false => wanted,
        };
        let fitting = match row_len.is_multiple_of(wanted.block_size()) {
            true => Some(wanted),
            false => Some(smaller(wanted)).filter(|it| row_len.is_multiple_of(it.block_size())),
        };
        let fitting = fitting.map(BlockType::from);
        Ok(match (kept, fitting) {
            (Some(kept), Some(fitting)) if kept.bits() > fitting.bits() => Some(fitting),
            (kept, fitting) => kept.or(fitting),
        })
    }
}

/// The type with blocks of 32 weights that replaces one with 256.
fn smaller(blocks: GgmlDType) -> GgmlDType {
    match blocks {
        GgmlDType::Q2K | GgmlDType::Q3K => GgmlDType::Q4_0,
        GgmlDType::Q4K => GgmlDType::Q5_0,
        GgmlDType::Q5K => GgmlDType::Q5_1,
        GgmlDType::Q6K => GgmlDType::Q8_0,
        small => small,
    }
}
