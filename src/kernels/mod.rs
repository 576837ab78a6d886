//! What a model computes with: products, attention, and elementwise operations. CPU kernels where
//! candle's own are slow, each compiled for the processor's vector units by run-time detection
//! ([`pulp`]) and tested against its plain twin in candle operations.
//!
//! ```text
//! door         which form of an operation runs: the only place that asks
//! fresh        a tensor that nobody else holds
//! compute      how exactly, and what is fastest here
//! weight, input_rows, gradients      both sides of a product, and its gradient
//! dense        products with numbers         quantized    products with blocks
//! attention    over packed sequences         elementwise  norms, gates, rotations, sums
//! matrix, storage                    small products in slices, and the slices themselves
//! memory                             what the allocator keeps of freed memory
//! ```
//!
//! Nothing here knows about models.

mod attention;
mod compute;
mod dense;
mod door;
mod elementwise;
mod fresh;
mod gradients;
mod input_rows;
mod matrix;
mod memory;
mod quantized;
mod storage;
mod weight;

pub(crate) use attention::{
    HeldBlocks, KV_BLOCK, KeyValues, SequenceSpans, Spans, gather, scores, shares, write_block,
};
pub use compute::Compute;
pub(crate) use dense::products;
pub(crate) use door::{
    Input, attend, fits_kernels, log_softmax, mix, rms_norm, rotate, softmax, split_heads, swiglu,
};
pub(crate) use elementwise::log_sum_exp;
pub(crate) use fresh::Fresh;
pub(crate) use input_rows::FEW_ROWS;
pub(crate) use memory::FreedMemory;
pub use memory::keep_freed_memory;
pub(crate) use quantized::{
    Codebook, CodebookMatrix, DIGIT_ROWS, DigitRun, DigitTable, reads_blocks, sum_digits,
};
pub(crate) use storage::{f32s, gradient_for, values};
pub(crate) use weight::{Kept, Weight};
