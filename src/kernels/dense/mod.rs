//! Products with weights of one number each: `f32`, `bf16`, `f16`. What multiplies many rows also reads
//! blocks, through [`Element`].

mod element;
mod few_rows;
mod many_rows;

pub(super) use element::{Element, from_half};
#[cfg(test)]
pub(super) use few_rows::FewRows;
pub(super) use few_rows::{few_rows, prefetch_ahead};
pub(super) use many_rows::{MicroKernel, Tiles};

/// Rows of the weight that one task multiplies with several rows of `x`: enough to outweigh handing out
/// the task, and no more than their sums have room for.
const ROWS_PER_TASK: usize = 24;

/// Of a weight with `out` rows, those that one task multiplies with so many rows of `x`. Few tasks read
/// long runs of the weight, which is all that counts for one row of `x`.
pub(super) fn rows_per_task(rows: usize, out: usize) -> usize {
    match rows {
        1 => out.div_ceil(rayon::current_num_threads()).clamp(32, 288),
        _ => ROWS_PER_TASK,
    }
}
