//! Products with weights of one number each: `f32`, `bf16`, `f16`. What multiplies many rows also reads
//! blocks, through [`Element`].

mod element;
mod few_rows;
mod many_rows;
mod pair_simd;
mod pairs;
mod panels;

pub(super) use element::{Element, from_half};
#[cfg(test)]
pub(super) use few_rows::FewRows;
pub(crate) use few_rows::products;
pub(super) use few_rows::{few_rows, prefetch_ahead, prefetch_start};
pub(super) use many_rows::{MicroKernel, Tiles};
pub(super) use pair_simd::multiplies_pairs;
pub(super) use pairs::PairTiles;
pub(super) use panels::{PANEL, by_panels, with_room};

/// How many of a weight's `out` rows one task multiplies with few rows of `x`: enough to outweigh the
/// cost of a task, and to read long runs of the weight, but some for each thread.
pub(super) fn rows_per_task(out: usize) -> usize {
    out.div_ceil(rayon::current_num_threads()).clamp(48, 288).next_multiple_of(few_rows::COLUMNS)
}
