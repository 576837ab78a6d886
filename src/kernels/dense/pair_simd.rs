//! What products of pairs need from a vector unit: of AVX-512 with `bf16`, or of none.

use half::bf16;

/// The bits of two `bf16`.
pub(super) type Pair = [u16; 2];

/// Pairs that are multiplied at a time: a register of AVX-512.
pub(super) const LANES: usize = 16;

/// Operations on [`LANES`] pairs, and on as many sums in `f32`.
pub(super) trait PairSimd: Copy {
    type Pairs: Copy;
    type Sums: Copy;

    fn load(self, pairs: &[Pair; LANES]) -> Self::Pairs;
    /// The same pair in all lanes.
    fn splat(self, pair: Pair) -> Self::Pairs;
    fn zero(self) -> Self::Sums;
    /// `sums + w[0] x[0] + w[1] x[1]` in each lane. What is too small for a normal number may become 0.
    fn add(self, w: Self::Pairs, x: Self::Pairs, sums: Self::Sums) -> Self::Sums;
    /// Writes sums, or adds them to what is there.
    fn store(self, sums: Self::Sums, to: &mut [f32; LANES], add: bool);
}

/// A task that runs on one of them.
pub(super) trait OnPairSimd {
    fn run(self, simd: impl PairSimd);
}

/// Runs it on the vector unit that this processor has.
pub(super) fn on_pair_simd(task: impl OnPairSimd) {
    #[cfg(target_arch = "x86_64")]
    if let Some(simd) = x86::Bf16::try_new() {
        return simd.run(task);
    }
    task.run(Plain);
}

/// Whether that is one which multiplies pairs.
pub(in crate::kernels) fn multiplies_pairs() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        x86::Bf16::try_new().is_some()
    }
    #[cfg(not(target_arch = "x86_64"))]
    false
}

/// Any processor, for tests: products in pairs are only chosen where there are instructions for them. With its steps inlined, a compiler would be busy with hundreds
/// of variables.
#[derive(Clone, Copy)]
pub(super) struct Plain;

impl PairSimd for Plain {
    type Pairs = [Pair; LANES];
    type Sums = [f32; LANES];

    #[inline(never)]
    fn load(self, pairs: &[Pair; LANES]) -> [Pair; LANES] {
        *pairs
    }

    #[inline(never)]
    fn splat(self, pair: Pair) -> [Pair; LANES] {
        [pair; LANES]
    }

    #[inline(never)]
    fn zero(self) -> [f32; LANES] {
        [0.0; LANES]
    }

    #[inline(never)]
    fn add(self, w: [Pair; LANES], x: [Pair; LANES], mut sums: [f32; LANES]) -> [f32; LANES] {
        let wide = |pair: Pair| pair.map(|bits| bf16::from_bits(bits).to_f32());
        for ((sum, w), x) in sums.iter_mut().zip(w).zip(x) {
            let ([w0, w1], [x0, x1]) = (wide(w), wide(x));
            *sum = *sum + w0 * x0 + w1 * x1;
        }
        sums
    }

    #[inline(never)]
    fn store(self, sums: [f32; LANES], to: &mut [f32; LANES], add: bool) {
        for (to, sum) in to.iter_mut().zip(sums) {
            *to = if add { *to + sum } else { sum };
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{__m512, __m512bh, __m512i, _mm512_dpbf16_ps};
    use std::mem::transmute;

    use pulp::x86::V4;
    use pulp::{cast, f32x16};

    use super::{LANES, OnPairSimd, Pair, PairSimd};

    /// AVX-512 with instructions that multiply pairs.
    #[derive(Clone, Copy)]
    pub(super) struct Bf16 {
        v4: V4,
    }

    impl Bf16 {
        pub(super) fn try_new() -> Option<Self> {
            let v4 = V4::try_new().filter(|_| is_x86_feature_detected!("avx512bf16"));
            v4.map(|v4| Self { v4 })
        }

        pub(super) fn run(self, task: impl OnPairSimd) {
            // SAFETY: `self` is proof that all of these are there.
            unsafe { run_with_bf16(self, task) }
        }
    }

    #[target_feature(
        enable = "avx,avx2,fma,avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx512bf16"
    )]
    fn run_with_bf16(simd: Bf16, task: impl OnPairSimd) {
        task.run(simd);
    }

    impl PairSimd for Bf16 {
        type Pairs = __m512i;
        type Sums = __m512;

        #[inline(always)]
        fn load(self, pairs: &[Pair; LANES]) -> __m512i {
            cast(*pairs)
        }

        #[inline(always)]
        fn splat(self, pair: Pair) -> __m512i {
            self.v4.avx512f._mm512_set1_epi32(cast(pair))
        }

        #[inline(always)]
        fn zero(self) -> __m512 {
            cast([0f32; LANES])
        }

        #[inline(always)]
        fn add(self, w: __m512i, x: __m512i, sums: __m512) -> __m512 {
            // SAFETY: `self` is proof that this is there. Both types are 512 bits, and mean pairs of `bf16`.
            unsafe {
                let w = transmute::<__m512i, __m512bh>(w);
                _mm512_dpbf16_ps(sums, w, transmute::<__m512i, __m512bh>(x))
            }
        }

        #[inline(always)]
        fn store(self, sums: __m512, to: &mut [f32; LANES], add: bool) {
            let (sums, old): (f32x16, f32x16) = (cast(sums), cast(*to));
            *to = cast(if add { self.v4.add_f32x16(old, sums) } else { sums });
        }
    }
}
