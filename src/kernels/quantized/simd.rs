//! What the kernels for blocks need from a vector unit. Compilers do not find these steps by themselves
//! in code that is written for any unit, so they are spelled out for AVX2 and AVX-512.

use std::any::Any;

use pulp::Simd;

use super::super::dense::from_half;
use super::chunk::{PART, PerGroup, SCALE_GROUP};
use super::fixed_point::FixedPoint;

/// Sums side by side, to be added up at the end.
pub(super) type Lanes = [f32; 16];

/// Operations on 32 bytes, and from the integers in them to `f32`.
pub(in crate::kernels) trait QuantSimd: Copy {
    /// 32 bytes.
    type Bytes: Copy;

    fn load(self, bytes: &[u8; PART]) -> Self::Bytes;
    /// The lower halves of 16 bytes, followed by the upper halves.
    fn nibbles(self, bytes: &[u8; 16]) -> Self::Bytes;
    fn and(self, bytes: Self::Bytes, byte: u8) -> Self::Bytes;
    fn or(self, a: Self::Bytes, b: Self::Bytes) -> Self::Bytes;
    /// Shifts bits down, also from one byte into the one below.
    fn shift_down(self, bytes: Self::Bytes, by: usize) -> Self::Bytes;
    /// Shifts bits up, also from one byte into the one above.
    fn shift_up(self, bytes: Self::Bytes, by: usize) -> Self::Bytes;

    /// Adds the same to every byte, without a carry into the one above.
    fn add(self, bytes: Self::Bytes, byte: u8) -> Self::Bytes;

    /// As numbers with a sign.
    fn signed(self, bytes: Self::Bytes) -> [i8; PART];
    /// The sums of both halves of these.
    fn signed_sums(self, bytes: Self::Bytes) -> [i32; 2];

    /// The numbers that bytes up to 15 choose out of codebooks: the first 16 out of the first, the others out of the
    /// second.
    fn look_up(self, codebooks: &[[i8; 16]; 2], bytes: Self::Bytes) -> Self::Bytes;

    /// A byte for each bit, with all of its bits set or none.
    fn bits(self, bits: [u8; 4]) -> Self::Bytes;

    /// Bytes added to bytes. All sums must fit a byte.
    fn sum(self, a: Self::Bytes, b: Self::Bytes) -> Self::Bytes;
    /// Adds bytes to 32 numbers of 16 bits: those at even places to the first half, the others to the second.
    fn sum_wide(self, sums: [Self::Bytes; 2], bytes: Self::Bytes) -> [Self::Bytes; 2];
    /// As numbers of 16 bits.
    fn sixteens(self, bytes: Self::Bytes) -> [u16; 16];

    /// The `f16` with these bits.
    #[inline(always)]
    fn half(self, bits: u16) -> f32 {
        from_half(bits)
    }

    /// Several of them, each twice.
    #[inline(always)]
    fn pairs(self, halves: [[u8; 2]; 8]) -> PerGroup {
        let mut pairs = [0.0; 16];
        for (pair, half) in pairs.as_chunks_mut().0.iter_mut().zip(halves) {
            *pair = [from_half(u16::from_le_bytes(half)); 2];
        }
        pairs
    }

    /// Adds `Σ (d q - m)·x` over a chunk to the lanes, for numbers from 0 to 63, or to 255 where
    /// [`adds_all_bytes`] holds.
    ///
    /// Four products to a lane are at most `4 · 255 · 2²¹`, which is less than 2³¹.
    fn add_chunk(
        self,
        q: &Parts<Self>,
        d: &PerGroup,
        m: &PerGroup,
        x: &FixedPoint,
        lanes: &mut Lanes,
    );

    /// `d q - m` for the two groups of a part. Numbers up to 63 are the same with a sign and without.
    fn scale(self, q: Self::Bytes, d: &[f32; 2], m: &[f32; 2], wide: &mut [f32; PART]);
}

/// The numbers of a chunk, two parts at a time.
pub(super) type Parts<U> = [[<U as QuantSimd>::Bytes; 2]; 4];

/// A task that runs on one of them.
pub(super) trait OnQuantSimd {
    type Output;
    fn run(self, simd: impl QuantSimd) -> Self::Output;
}

/// Runs it on the vector unit that `simd` stands for.
#[inline(always)]
pub(super) fn on_quant_simd<S: Simd, T: OnQuantSimd>(simd: S, task: T) -> T::Output {
    #[cfg(target_arch = "x86_64")]
    {
        use pulp::x86::{V3, V4};
        let simd: &dyn Any = &simd;
        if let Some(simd) = simd.downcast_ref::<V4>() {
            return task.run(*simd);
        }
        if let Some(simd) = simd.downcast_ref::<V3>() {
            return task.run(*simd);
        }
    }
    task.run(Plain)
}

/// The same, with instructions that few processors have and [`QuantSimd::add_chunk`] gains by.
#[inline(always)]
pub(super) fn on_quant_simd_for_chunks<S: Simd, T: OnQuantSimd>(simd: S, task: T) -> T::Output {
    #[cfg(target_arch = "x86_64")]
    {
        let simd: &dyn Any = &simd;
        let v4 = simd.downcast_ref::<pulp::x86::V4>();
        if let Some(simd) = v4.and_then(|v4| Vnni::try_new(*v4)) {
            return simd.run(task);
        }
    }
    on_quant_simd(simd, task)
}

/// Whether [`on_quant_simd_for_chunks`] finds a vector unit here that multiplies unsigned bytes of any
/// size. Others add up pairs in 16 bits.
pub(in crate::kernels) fn adds_all_bytes() -> bool {
    #[cfg(target_arch = "x86_64")]
    {
        Vnni::here().is_some()
    }
    #[cfg(not(target_arch = "x86_64"))]
    false
}

#[cfg(target_arch = "x86_64")]
pub(super) use x86::Vnni;

/// Any processor: eight bytes at a time, as a `u64`.
#[derive(Clone, Copy)]
pub(super) struct Plain;

/// The same byte in all eight places.
const fn all(byte: u8) -> u64 {
    u64::from_ne_bytes([byte; 8])
}

impl QuantSimd for Plain {
    type Bytes = [u64; 4];

    #[inline(always)]
    fn load(self, bytes: &[u8; PART]) -> [u64; 4] {
        let mut eights = bytes.as_chunks().0.iter().map(|eight| u64::from_le_bytes(*eight));
        [(); 4].map(|()| eights.next().unwrap_or_default())
    }

    #[inline(always)]
    fn nibbles(self, bytes: &[u8; 16]) -> [u64; 4] {
        let mut twice = [0; PART];
        twice[..16].copy_from_slice(bytes);
        twice[16..].copy_from_slice(&(u128::from_le_bytes(*bytes) >> 4).to_le_bytes());
        self.and(self.load(&twice), 15)
    }

    #[inline(always)]
    fn and(self, bytes: [u64; 4], byte: u8) -> [u64; 4] {
        bytes.map(|eight| eight & all(byte))
    }

    #[inline(always)]
    fn or(self, a: [u64; 4], b: [u64; 4]) -> [u64; 4] {
        [a[0] | b[0], a[1] | b[1], a[2] | b[2], a[3] | b[3]]
    }

    #[inline(always)]
    fn shift_down(self, bytes: [u64; 4], by: usize) -> [u64; 4] {
        bytes.map(|eight| eight >> by)
    }

    #[inline(always)]
    fn shift_up(self, bytes: [u64; 4], by: usize) -> [u64; 4] {
        bytes.map(|eight| eight << by)
    }

    #[inline(always)]
    fn add(self, bytes: [u64; 4], byte: u8) -> [u64; 4] {
        // The upper bits apart, so that nothing is carried out of a byte.
        bytes.map(|eight| {
            let lower = (eight & all(0x7f)) + all(byte & 0x7f);
            lower ^ (eight ^ all(byte)) & all(0x80)
        })
    }

    #[inline(always)]
    fn signed(self, bytes: [u64; 4]) -> [i8; PART] {
        numbers(bytes)
    }

    #[inline(always)]
    fn signed_sums(self, bytes: [u64; 4]) -> [i32; 2] {
        let numbers = numbers(bytes).map(i32::from);
        let (first, second) = numbers.split_at(SCALE_GROUP);
        [first.iter().sum(), second.iter().sum()]
    }

    #[inline(always)]
    fn look_up(self, [first, second]: &[[i8; 16]; 2], bytes: [u64; 4]) -> [u64; 4] {
        let choose = |codebook: &[i8; 16], eight: u64| {
            let chosen = eight.to_le_bytes().map(|byte| codebook[usize::from(byte & 15)] as u8);
            u64::from_le_bytes(chosen)
        };
        let [a, b, c, d] = bytes;
        [choose(first, a), choose(first, b), choose(second, c), choose(second, d)]
    }

    #[inline(always)]
    fn bits(self, bits: [u8; 4]) -> [u64; 4] {
        const PLACES: u64 = u64::from_le_bytes([1, 2, 4, 8, 16, 32, 64, 128]);
        bits.map(|bits| {
            let set = (u64::from(bits) * all(1)) & PLACES; // a byte is not 0 where its bit is set ...
            let ones = ((set + all(0x7f)) >> 7) & all(1); // ... and carries into its upper bit then
            ones * 0xff
        })
    }

    #[inline(always)]
    fn sum(self, a: [u64; 4], b: [u64; 4]) -> [u64; 4] {
        [a[0] + b[0], a[1] + b[1], a[2] + b[2], a[3] + b[3]]
    }

    #[inline(always)]
    fn sum_wide(self, [even, odd]: [[u64; 4]; 2], bytes: [u64; 4]) -> [[u64; 4]; 2] {
        const EVEN: u64 = u64::from_le_bytes([255, 0, 255, 0, 255, 0, 255, 0]);
        [
            self.sum(even, bytes.map(|eight| eight & EVEN)),
            self.sum(odd, bytes.map(|eight| (eight >> 8) & EVEN)),
        ]
    }

    #[inline(always)]
    fn sixteens(self, bytes: [u64; 4]) -> [u16; 16] {
        let mut numbers = [0; 16];
        for (numbers, eight) in numbers.as_chunks_mut::<4>().0.iter_mut().zip(bytes) {
            let mut place = 0;
            *numbers = [(); 4].map(|()| {
                let number = (eight >> place) as u16;
                place += 16;
                number
            });
        }
        numbers
    }

    #[inline(always)]
    fn add_chunk(
        self,
        q: &Parts<Self>,
        d: &PerGroup,
        m: &PerGroup,
        x: &FixedPoint,
        lanes: &mut Lanes,
    ) {
        let groups = d.as_chunks::<4>().0.iter();
        for ((q, bytes), d) in q.iter().zip(&x.bytes).zip(groups) {
            let q = q.map(numbers);
            for (index, q) in q.as_flattened().iter().enumerate() {
                let whole = bytes.iter().fold(0, |whole, it| whole * 256 + i32::from(it[index]));
                let whole = whole * i32::from(*q);
                lanes[index % SCALE_GROUP] += x.scale * d[index / SCALE_GROUP] * whole as f32;
            }
        }
        for ((lane, m), sum) in lanes.iter_mut().zip(m).zip(&x.sums) {
            *lane -= m * sum;
        }
    }

    #[inline(always)]
    fn scale(self, q: [u64; 4], d: &[f32; 2], m: &[f32; 2], wide: &mut [f32; PART]) {
        let wide = wide.as_chunks_mut::<SCALE_GROUP>().0;
        for ((wide, q), (d, m)) in
            wide.iter_mut().zip(numbers(q).as_chunks().0).zip(d.iter().zip(m))
        {
            let q: &[i8; SCALE_GROUP] = q;
            for (wide, q) in wide.iter_mut().zip(q) {
                *wide = f32::from(*q) * d - m;
            }
        }
    }
}

#[inline(always)]
fn numbers(bytes: [u64; 4]) -> [i8; PART] {
    let mut numbers = [0; PART];
    for (numbers, eight) in numbers.as_chunks_mut::<8>().0.iter_mut().zip(bytes) {
        *numbers = eight.to_le_bytes().map(|byte| byte as i8);
    }
    numbers
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{
        __m128i, __m256i, _mm512_dpbusd_epi32, _mm512_setzero_si512, _mm512_slli_epi32,
    };
    use std::ops::Deref;

    use pulp::x86::{V3, V4};
    use pulp::{cast, f32x8, f32x16, u64x2};

    use super::{FixedPoint, Lanes, OnQuantSimd, PART, Parts, PerGroup, QuantSimd};

    /// The steps on bytes, 32 of which fill a register of AVX2.
    macro_rules! bytes {
        () => {
            type Bytes = __m256i;

            #[inline(always)]
            fn load(self, bytes: &[u8; PART]) -> __m256i {
                cast(*bytes)
            }

            #[inline(always)]
            fn nibbles(self, bytes: &[u8; 16]) -> __m256i {
                let low: __m128i = cast(*bytes);
                self.and(cast([low, self.sse2._mm_srl_epi64(low, cast(u64x2(4, 0)))]), 15)
            }

            #[inline(always)]
            fn and(self, bytes: __m256i, byte: u8) -> __m256i {
                self.avx2._mm256_and_si256(bytes, self.avx._mm256_set1_epi8(byte as i8))
            }

            #[inline(always)]
            fn or(self, a: __m256i, b: __m256i) -> __m256i {
                self.avx2._mm256_or_si256(a, b)
            }

            #[inline(always)]
            fn shift_down(self, bytes: __m256i, by: usize) -> __m256i {
                self.avx2._mm256_srl_epi64(bytes, cast(u64x2(by as u64, 0)))
            }

            #[inline(always)]
            fn shift_up(self, bytes: __m256i, by: usize) -> __m256i {
                self.avx2._mm256_sll_epi64(bytes, cast(u64x2(by as u64, 0)))
            }

            #[inline(always)]
            fn add(self, bytes: __m256i, byte: u8) -> __m256i {
                self.avx2._mm256_add_epi8(bytes, self.avx._mm256_set1_epi8(byte as i8))
            }

            #[inline(always)]
            fn signed(self, bytes: __m256i) -> [i8; PART] {
                cast(bytes)
            }

            #[inline(always)]
            fn signed_sums(self, bytes: __m256i) -> [i32; 2] {
                const LIFTED: i32 = 128 * PART as i32 / 2;
                let zero = self.avx._mm256_setzero_si256();
                let sums: [[i32; 2]; 4] =
                    cast(self.avx2._mm256_sad_epu8(self.add(bytes, 128), zero)); // of 8 bytes each
                [sums[0][0] + sums[1][0] - LIFTED, sums[2][0] + sums[3][0] - LIFTED]
            }

            #[inline(always)]
            fn look_up(self, codebooks: &[[i8; 16]; 2], bytes: __m256i) -> __m256i {
                self.avx2._mm256_shuffle_epi8(cast(*codebooks), bytes)
            }

            #[inline(always)]
            fn bits(self, bits: [u8; 4]) -> __m256i {
                const BYTES: [[u8; 8]; 4] = [[0; 8], [1; 8], [2; 8], [3; 8]];
                const PLACES: [[u8; 8]; 4] = [[1, 2, 4, 8, 16, 32, 64, 128]; 4];
                let bytes = self.avx._mm256_set1_epi32(i32::from_le_bytes(bits));
                let bytes = self.avx2._mm256_shuffle_epi8(bytes, cast(BYTES));
                let set = self.avx2._mm256_and_si256(bytes, cast(PLACES));
                self.avx2._mm256_cmpeq_epi8(set, cast(PLACES))
            }

            #[inline(always)]
            fn sum(self, a: __m256i, b: __m256i) -> __m256i {
                self.avx2._mm256_add_epi8(a, b)
            }

            #[inline(always)]
            fn sum_wide(self, [even, odd]: [__m256i; 2], bytes: __m256i) -> [__m256i; 2] {
                let low = self.avx2._mm256_and_si256(bytes, self.avx._mm256_set1_epi16(255));
                let high = self.avx2._mm256_srli_epi16::<8>(bytes);
                [self.avx2._mm256_add_epi16(even, low), self.avx2._mm256_add_epi16(odd, high)]
            }

            #[inline(always)]
            fn sixteens(self, bytes: __m256i) -> [u16; 16] {
                cast(bytes)
            }
        };
    }

    /// The numbers of a part in `f32`.
    trait Wide {
        type Part;
        fn wide(self, q: __m256i) -> Self::Part;
    }

    impl Wide for V3 {
        type Part = [f32x8; 4];

        #[inline(always)]
        fn wide(self, q: __m256i) -> [f32x8; 4] {
            let eights: [i64; 4] = cast(q);
            eights.map(|eight| {
                let q = self.avx2._mm256_cvtepi8_epi32(cast([eight, 0]));
                self.convert_i32x8_to_f32x8(cast(q))
            })
        }
    }

    impl Wide for V4 {
        type Part = [f32x16; 2];

        #[inline(always)]
        fn wide(self, q: __m256i) -> [f32x16; 2] {
            let groups: [__m128i; 2] = cast(q);
            groups.map(|group| {
                let q = self.avx512f._mm512_cvtepi8_epi32(group);
                self.convert_i32x16_to_f32x16(cast(q))
            })
        }
    }

    impl QuantSimd for V3 {
        bytes!();

        #[inline(always)]
        fn add_chunk(
            self,
            q: &Parts<Self>,
            d: &PerGroup,
            m: &PerGroup,
            x: &FixedPoint,
            lanes: &mut Lanes,
        ) {
            let scale = self.splat_f32x8(x.scale);
            let d: [f32x8; 2] = cast(*d);
            let d = d.map(|d| self.mul_f32x8(d, scale));
            let one = self.avx._mm256_set1_epi16(1);
            let to_middle = self.avx._mm256_set1_epi16(256);
            let mut sums = [self.splat_f32x8(0.0); 2];
            for (step, (q, bytes)) in q.iter().zip(&x.bytes).enumerate() {
                let bytes: [[__m256i; 2]; 3] = bytes.map(cast);
                for half in 0..2 {
                    // Pairs of products fit 16 bits: 2 · 63 · 128 = 16128.
                    let [high, middle, low] =
                        bytes.map(|x| self.avx2._mm256_maddubs_epi16(q[half], x[half]));
                    let high = self.avx2._mm256_madd_epi16(high, to_middle);
                    let middle = self.avx2._mm256_madd_epi16(middle, one);
                    let low = self.avx2._mm256_madd_epi16(low, one);
                    let upper = self.avx2._mm256_add_epi32(high, middle);
                    let upper = self.avx2._mm256_slli_epi32::<8>(upper);
                    let whole = self.avx2._mm256_add_epi32(upper, low);
                    let whole = self.convert_i32x8_to_f32x8(cast(whole));
                    // The scales of two groups, four times each: part 6 of 8 has groups 12 and 13, which
                    // are 4 and 5 of the second eight.
                    let (eight, first) = (step / 2, (step % 2 * 4 + half * 2) as i32);
                    let each = cast([[first; 4], [first + 1; 4]]);
                    let d = self.avx2._mm256_permutevar8x32_ps(cast(d[eight]), each);
                    sums[half] = self.mul_add_f32x8(whole, cast(d), sums[half]);
                }
            }
            let (m, x_sums, old): ([f32x8; 2], [f32x8; 2], [f32x8; 2]) =
                (cast(*m), cast(x.sums), cast(*lanes));
            *lanes = cast([0, 1].map(|half| {
                let sum = self.negate_mul_add_f32x8(m[half], x_sums[half], sums[half]);
                self.add_f32x8(old[half], sum)
            }));
        }

        #[inline(always)]
        fn scale(self, q: __m256i, d: &[f32; 2], m: &[f32; 2], wide: &mut [f32; PART]) {
            let q = Wide::wide(self, q);
            let (d, m) = (d.map(|d| self.splat_f32x8(d)), m.map(|m| self.splat_f32x8(m)));
            let eight = |eight: usize| self.mul_sub_f32x8(q[eight], d[eight / 2], m[eight / 2]);
            *wide = cast([eight(0), eight(1), eight(2), eight(3)]);
        }
    }

    impl QuantSimd for V4 {
        bytes!();

        #[inline(always)]
        fn half(self, bits: u16) -> f32 {
            let halves = self.avx._mm256_set1_epi16(bits as i16);
            let values: [f32; 16] = cast(self.avx512f._mm512_cvtph_ps(halves));
            values[0]
        }

        #[inline(always)]
        fn pairs(self, halves: [[u8; 2]; 8]) -> PerGroup {
            let halves: __m128i = cast(halves);
            let low = self.sse2._mm_unpacklo_epi16(halves, halves);
            let high = self.sse2._mm_unpackhi_epi16(halves, halves);
            cast(self.avx512f._mm512_cvtph_ps(cast([low, high])))
        }

        #[inline(always)]
        fn add_chunk(
            self,
            q: &Parts<Self>,
            d: &PerGroup,
            m: &PerGroup,
            x: &FixedPoint,
            lanes: &mut Lanes,
        ) {
            V3::add_chunk(*self, q, d, m, x, lanes);
        }

        #[inline(always)]
        fn scale(self, q: __m256i, d: &[f32; 2], m: &[f32; 2], wide: &mut [f32; PART]) {
            let q = Wide::wide(self, q);
            let (d, m) = (d.map(|d| self.splat_f32x16(d)), m.map(|m| self.splat_f32x16(m)));
            *wide = cast([0, 1].map(|group| self.mul_sub_f32x16(q[group], d[group], m[group])));
        }
    }

    /// AVX-512 with instructions that add up four products of bytes.
    #[derive(Clone, Copy)]
    pub(in super::super) struct Vnni {
        v4: V4,
    }

    impl Vnni {
        pub(in super::super) fn here() -> Option<Self> {
            V4::try_new().and_then(Self::try_new)
        }

        pub(super) fn try_new(v4: V4) -> Option<Self> {
            is_x86_feature_detected!("avx512vnni").then_some(Self { v4 })
        }

        #[inline(always)]
        pub(super) fn run<T: OnQuantSimd>(self, task: T) -> T::Output {
            // SAFETY: `self` is proof that all of these are there.
            unsafe { run_with_vnni(self, task) }
        }
    }

    #[target_feature(
        enable = "avx,avx2,fma,avx512f,avx512bw,avx512cd,avx512dq,avx512vl,avx512vnni"
    )]
    fn run_with_vnni<T: OnQuantSimd>(simd: Vnni, task: T) -> T::Output {
        task.run(simd)
    }

    impl Deref for Vnni {
        type Target = V4;

        #[inline(always)]
        fn deref(&self) -> &V4 {
            &self.v4
        }
    }

    impl QuantSimd for Vnni {
        bytes!();

        #[inline(always)]
        fn half(self, bits: u16) -> f32 {
            self.v4.half(bits)
        }

        #[inline(always)]
        fn pairs(self, halves: [[u8; 2]; 8]) -> PerGroup {
            self.v4.pairs(halves)
        }

        #[inline(always)]
        fn add_chunk(
            self,
            q: &Parts<Self>,
            d: &PerGroup,
            m: &PerGroup,
            x: &FixedPoint,
            lanes: &mut Lanes,
        ) {
            let d = self.mul_f32x16(cast(*d), self.splat_f32x16(x.scale));
            let mut sum = self.splat_f32x16(0.0);
            for (step, (q, bytes)) in q.iter().zip(&x.bytes).enumerate() {
                let q = cast(*q);
                let [high, middle, low] = bytes.map(cast);
                // SAFETY: `self` is proof that these are there.
                let whole = unsafe {
                    let whole = _mm512_dpbusd_epi32(_mm512_setzero_si512(), q, high);
                    let whole = _mm512_dpbusd_epi32(_mm512_slli_epi32::<8>(whole), q, middle);
                    _mm512_dpbusd_epi32(_mm512_slli_epi32::<8>(whole), q, low)
                };
                let first = 4 * step as i32;
                let each = cast([[first; 4], [first + 1; 4], [first + 2; 4], [first + 3; 4]]);
                let d = self.avx512f._mm512_permutexvar_ps(each, cast(d));
                sum = self.mul_add_f32x16(self.convert_i32x16_to_f32x16(cast(whole)), cast(d), sum);
            }
            let sum = self.negate_mul_add_f32x16(cast(*m), cast(x.sums), sum);
            *lanes = cast(self.add_f32x16(cast(*lanes), sum));
        }

        #[inline(always)]
        fn scale(self, q: __m256i, d: &[f32; 2], m: &[f32; 2], wide: &mut [f32; PART]) {
            self.v4.scale(q, d, m, wide);
        }
    }
}
