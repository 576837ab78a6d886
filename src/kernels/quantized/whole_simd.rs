//! What products of whole numbers need from a vector unit: of AVX-512 with VNNI, or of none.

use super::simd::Plain;

/// Four bytes that stand one after the other in a row.
pub(super) type Quad = [u8; 4];

/// Quads that are multiplied at a time: a register of AVX-512.
pub(super) const LANES: usize = 16;

/// Operations on [`LANES`] quads, and on as many sums.
pub(super) trait WholeSimd: Copy {
    type Quads: Copy;
    /// In `i32`.
    type Whole: Copy;
    /// In `f32`.
    type Sums: Copy;

    fn load(self, quads: &[Quad; LANES]) -> Self::Quads;
    /// The same quad, or number, in all lanes.
    fn splat_quad(self, quad: Quad) -> Self::Quads;
    fn splat_whole(self, number: i32) -> Self::Whole;
    fn splat(self, number: f32) -> Self::Sums;

    /// `whole + x[0] w[0] + .. + x[3] w[3]` in each lane, where the bytes of `x` have no sign and those of
    /// `w` have one.
    fn dot(self, whole: Self::Whole, x: Self::Quads, w: Self::Quads) -> Self::Whole;

    fn load_sums(self, sums: &[f32; LANES]) -> Self::Sums;
    fn to_sums(self, whole: Self::Whole) -> Self::Sums;
    fn add(self, a: Self::Sums, b: Self::Sums) -> Self::Sums;
    fn mul(self, a: Self::Sums, b: Self::Sums) -> Self::Sums;
    /// `a b + c`
    fn mul_add(self, a: Self::Sums, b: Self::Sums, c: Self::Sums) -> Self::Sums;
    fn store(self, sums: Self::Sums, to: &mut [f32; LANES]);
}

/// A task that runs on one of them.
pub(super) trait OnWholeSimd {
    fn run(self, simd: impl WholeSimd);
}

/// Runs it on the vector unit that this processor has.
pub(super) fn on_whole_simd(task: impl OnWholeSimd) {
    #[cfg(target_arch = "x86_64")]
    if let Some(simd) = super::simd::Vnni::here() {
        return x86::run(simd, task);
    }
    task.run(Plain);
}

/// What is fast is used instead of it; with its steps inlined, a compiler would be busy with hundreds of variables.
impl WholeSimd for Plain {
    type Quads = [Quad; LANES];
    type Whole = [i32; LANES];
    type Sums = [f32; LANES];

    #[inline(never)]
    fn load(self, quads: &[Quad; LANES]) -> [Quad; LANES] {
        *quads
    }

    #[inline(never)]
    fn splat_quad(self, quad: Quad) -> [Quad; LANES] {
        [quad; LANES]
    }

    #[inline(never)]
    fn splat_whole(self, number: i32) -> [i32; LANES] {
        [number; LANES]
    }

    #[inline(never)]
    fn splat(self, number: f32) -> [f32; LANES] {
        [number; LANES]
    }

    #[inline(never)]
    fn dot(self, mut whole: [i32; LANES], x: [Quad; LANES], w: [Quad; LANES]) -> [i32; LANES] {
        for ((whole, x), w) in whole.iter_mut().zip(x).zip(w) {
            for (x, w) in x.into_iter().zip(w) {
                *whole += i32::from(x) * i32::from(w as i8);
            }
        }
        whole
    }

    #[inline(never)]
    fn load_sums(self, sums: &[f32; LANES]) -> [f32; LANES] {
        *sums
    }

    #[inline(never)]
    fn to_sums(self, whole: [i32; LANES]) -> [f32; LANES] {
        whole.map(|number| number as f32)
    }

    #[inline(never)]
    fn add(self, mut a: [f32; LANES], b: [f32; LANES]) -> [f32; LANES] {
        a.iter_mut().zip(b).for_each(|(a, b)| *a += b);
        a
    }

    #[inline(never)]
    fn mul(self, mut a: [f32; LANES], b: [f32; LANES]) -> [f32; LANES] {
        a.iter_mut().zip(b).for_each(|(a, b)| *a *= b);
        a
    }

    #[inline(never)]
    fn mul_add(self, a: [f32; LANES], b: [f32; LANES], c: [f32; LANES]) -> [f32; LANES] {
        self.add(self.mul(a, b), c)
    }

    #[inline(never)]
    fn store(self, sums: [f32; LANES], to: &mut [f32; LANES]) {
        *to = sums;
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{__m512i, _mm512_dpbusd_epi32};

    use pulp::{cast, f32x16};

    use super::super::simd::Vnni;
    use super::{LANES, OnWholeSimd, Quad, WholeSimd};

    pub(super) fn run(simd: Vnni, task: impl OnWholeSimd) {
        // SAFETY: `simd` is proof that all of these are there.
        unsafe { run_with_vnni(simd, task) }
    }

    #[target_feature(
        enable = "avx,avx2,fma,avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx512vnni"
    )]
    fn run_with_vnni(simd: Vnni, task: impl OnWholeSimd) {
        task.run(simd);
    }

    impl WholeSimd for Vnni {
        type Quads = __m512i;
        type Whole = __m512i;
        type Sums = f32x16;

        #[inline(always)]
        fn load(self, quads: &[Quad; LANES]) -> __m512i {
            cast(*quads)
        }

        #[inline(always)]
        fn splat_quad(self, quad: Quad) -> __m512i {
            self.avx512f._mm512_set1_epi32(cast(quad))
        }

        #[inline(always)]
        fn splat_whole(self, number: i32) -> __m512i {
            self.avx512f._mm512_set1_epi32(number)
        }

        #[inline(always)]
        fn splat(self, number: f32) -> f32x16 {
            self.splat_f32x16(number)
        }

        #[inline(always)]
        fn dot(self, whole: __m512i, x: __m512i, w: __m512i) -> __m512i {
            // SAFETY: `self` is proof that this is there.
            unsafe { _mm512_dpbusd_epi32(whole, x, w) }
        }

        #[inline(always)]
        fn load_sums(self, sums: &[f32; LANES]) -> f32x16 {
            cast(*sums)
        }

        #[inline(always)]
        fn to_sums(self, whole: __m512i) -> f32x16 {
            self.convert_i32x16_to_f32x16(cast(whole))
        }

        #[inline(always)]
        fn add(self, a: f32x16, b: f32x16) -> f32x16 {
            self.add_f32x16(a, b)
        }

        #[inline(always)]
        fn mul(self, a: f32x16, b: f32x16) -> f32x16 {
            self.mul_f32x16(a, b)
        }

        #[inline(always)]
        fn mul_add(self, a: f32x16, b: f32x16, c: f32x16) -> f32x16 {
            self.mul_add_f32x16(a, b, c)
        }

        #[inline(always)]
        fn store(self, sums: f32x16, to: &mut [f32; LANES]) {
            *to = cast(sums);
        }
    }
}
