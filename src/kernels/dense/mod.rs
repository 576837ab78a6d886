//! Products with weights of one number each: `f32`, `bf16`, `f16`. What multiplies many rows also reads
//! blocks, through [`Element`].

mod element;
mod few_rows;
mod many_rows;

pub(super) use element::{Element, from_half};
#[cfg(test)]
pub(super) use few_rows::FewRows;
pub(super) use few_rows::{dot, few_rows, prefetch_ahead};
pub(super) use many_rows::{MicroKernel, Tiles};

/// Rows of the weight that one task multiplies where `x` has few: enough to outweigh handing out the task.
pub(super) const ROWS_PER_TASK: usize = 24;
