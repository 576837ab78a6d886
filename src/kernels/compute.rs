//! How exactly products are computed, and in which arithmetic on this processor.

use std::hint::black_box;
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use half::bf16;

use super::dense::{PairTiles, Tiles, multiplies_pairs};
use super::quantized::{ByteTiles, Q8_0, QuantBlock, adds_all_bytes};

/// How exactly a model computes on the CPU. It can be chosen for a loaded model, by
/// [`HybridModel::with_compute`](crate::HybridModel::with_compute).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Compute {
    /// In `f32`, whatever weights are kept in. The default.
    #[default]
    Exact,
    /// Where more than 16 tokens run at a time, what is multiplied with weights is rounded to numbers that
    /// the processor multiplies in less time, if it has any:
    ///
    /// - with weights in `bf16` to `bf16`, by at most 2⁻⁸ of each number: AVX-512 with `bf16`;
    /// - with weights in blocks, each 32 numbers to bytes, by at most 1/254 of the largest of them: AVX-512 with
    ///   VNNI.
    ///
    /// On 1800 tokens of SmolLM2-135M that adds 0.11 % to the perplexity at `bf16`, 0.39 % at `Q8_0` and 1.03 % at `Q4_K`.
    ///
    /// Sums are in `f32`; of 32 bytes, they are exact. Whether that takes less time is measured when first asked
    /// for, in about a millisecond, once per process and with `Q8_0` for all blocks; a build with debug assertions takes it
    /// wherever the instructions are. On all other processors, and for weights in other types, this is
    /// [`Exact`](Self::Exact); so is every product of an input that carries a gradient, and the router of a mixture of experts.
    ///
    /// So numbers depend on the processor, and on what was measured there. Within a process they depend neither on the number
    /// of threads nor on what else is in a pass, as little as those of [`Exact`](Self::Exact).
    Fast,
}

/// What many rows of input are multiplied in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Arithmetic {
    /// Numbers in `f32`.
    Numbers,
    /// Pairs of `bf16`.
    Pairs,
    /// Bytes, with a scale for every few of them.
    Bytes,
}

/// What is measured: several tiles, as a weight is unpacked once for all of them, that fit the second-level
/// cache.
const ROWS: usize = 128;
const LEN: usize = 256;
const OUT: usize = 24;

impl Arithmetic {
    /// The faster one for weights in `bf16`.
    pub(super) fn of_bf16() -> Self {
        static FASTER: OnceLock<Arithmetic> = OnceLock::new();
        *FASTER.get_or_init(|| {
            let (numbers, pairs) = (Tiles::ones(ROWS, LEN), PairTiles::ones(ROWS, LEN));
            let w = [bf16::ONE; OUT * LEN];
            let gains = || gains(|ys| numbers.panel(&w, ys), |ys| pairs.panel(&w, ys));
            if multiplies_pairs() && gains() { Self::Pairs } else { Self::Numbers }
        })
    }

    /// The faster one for weights in blocks.
    pub(super) fn of_blocks() -> Self {
        static FASTER: OnceLock<Arithmetic> = OnceLock::new();
        *FASTER.get_or_init(|| {
            let (numbers, bytes) = (Tiles::ones(ROWS, LEN), ByteTiles::zeros(ROWS, LEN));
            let w = [[0; size_of::<Q8_0>()]; OUT * LEN / Q8_0::LEN];
            let gains = || gains(|ys| numbers.panel(&w, ys), |ys| bytes.panel(&w, ys));
            if adds_all_bytes() && gains() { Self::Bytes } else { Self::Numbers }
        })
    }
}

/// Whether another way to multiply [`ROWS`] by [`OUT`] rows takes less time than `numbers` do: a unit may be
/// there, but be half as wide. On this thread alone: others may wait for what is decided here.
fn gains(numbers: impl Fn(&mut [f32]), others: impl Fn(&mut [f32])) -> bool {
    const TURNS: usize = 16;
    /// Instructions come out once in one cycle or in two, so that others take all of the time, half of it or
    /// less: this is in between, out of reach of what disturbs the least of several turns.
    const LEAST_GAIN: f32 = 1.3;

    // Nothing is fast in a build with checks, and tests are to see what others run.
    if cfg!(debug_assertions) {
        return true;
    }
    let mut ys = [0f32; OUT * ROWS];
    let mut least = [Duration::MAX; 2];
    for _ in 0..TURNS {
        let start = Instant::now();
        numbers(black_box(&mut ys));
        let between = Instant::now();
        others(black_box(&mut ys));
        least = [least[0].min(between - start), least[1].min(between.elapsed())];
    }
    least[1].mul_f32(LEAST_GAIN) < least[0]
}
