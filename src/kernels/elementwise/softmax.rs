//! Softmax of a row of scores, in place.

use super::LANES;
use super::exp::exp;

#[inline(always)]
pub(in crate::kernels) fn softmax_in_place(scores: &mut [f32]) {
    let max = largest(scores);
    let mut sums = [0f32; LANES];
    let (chunks, rest) = scores.as_chunks_mut::<LANES>();
    for chunk in chunks {
        for (sum, score) in sums.iter_mut().zip(chunk) {
            *score = exp(*score - max);
            *sum += *score;
        }
    }
    for (sum, score) in sums.iter_mut().zip(rest) {
        *score = exp(*score - max);
        *sum += *score;
    }
    let scale = 1.0 / sums.iter().sum::<f32>();
    for score in scores.iter_mut() {
        *score *= scale;
    }
}

/// The largest score; NaN is skipped here, and shows up in the sum.
#[inline(always)]
pub(super) fn largest(scores: &[f32]) -> f32 {
    let larger = |max: f32, score: f32| if score > max { score } else { max };
    let mut lanes = [f32::NEG_INFINITY; LANES];
    let (chunks, rest) = scores.as_chunks::<LANES>();
    for chunk in chunks {
        for (max, score) in lanes.iter_mut().zip(chunk) {
            *max = larger(*max, *score);
        }
    }
    lanes.iter().chain(rest).copied().fold(f32::NEG_INFINITY, larger)
}
