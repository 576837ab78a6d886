//! What the kernels for blocks ask of a vector unit. Compilers do not find these steps by themselves in
//! code that is written for any unit, so they are spelled out for AVX2 and AVX-512.

use std::any::Any;

use pulp::Simd;

use super::element::{GROUP, PART, from_half};

/// Sums side by side, to be added up at last.
pub(super) type Lanes = [f32; 16];

/// Steps on 32 bytes, and from the whole numbers in them to `f32`.
pub(super) trait Unit: Copy {
    /// 32 bytes.
    type Bytes: Copy;

    fn load(self, bytes: &[u8; PART]) -> Self::Bytes;
    /// The lower halves of 16 bytes, and behind them the upper halves.
    fn nibbles(self, bytes: &[u8; 16]) -> Self::Bytes;
    fn and(self, bytes: Self::Bytes, byte: u8) -> Self::Bytes;
    fn or(self, a: Self::Bytes, b: Self::Bytes) -> Self::Bytes;
    /// Moves bits down, those of one byte into the one below, too.
    fn shift_down(self, bytes: Self::Bytes, by: usize) -> Self::Bytes;
    /// Moves bits up, those of one byte into the one above, too.
    fn shift_up(self, bytes: Self::Bytes, by: usize) -> Self::Bytes;
    /// Writes each byte less `less`, as a number with a sign.
    fn write(self, bytes: Self::Bytes, less: u8, numbers: &mut [i8; PART]);

    /// The `f16` with these bits.
    fn half(self, bits: u16) -> f32;

    /// Adds `Σ d (x·q)` over groups to the lanes.
    fn add_products(self, x: &[[f32; GROUP]], q: &[[i8; GROUP]], d: &[f32], lanes: &mut Lanes);

    /// Takes `a·b` from the lanes.
    fn subtract(self, a: &Lanes, b: &Lanes, lanes: &mut Lanes);

    /// `d q - m` for each group.
    fn scale(self, q: &[[i8; GROUP]], d: &[f32], m: &[f32], wide: &mut [[f32; GROUP]]);
}

/// Something to be done on one of them.
pub(super) trait OnUnit {
    type Output;
    fn run(self, unit: impl Unit) -> Self::Output;
}

/// Does it on the unit that is `simd`'s.
#[inline(always)]
pub(super) fn on_unit<S: Simd, T: OnUnit>(simd: S, task: T) -> T::Output {
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

/// Any processor: eight bytes at a time, as a `u64`.
#[derive(Clone, Copy)]
pub(super) struct Plain;

/// A byte in every place of eight.
const fn all(byte: u8) -> u64 {
    u64::from_ne_bytes([byte; 8])
}

impl Unit for Plain {
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
    fn write(self, bytes: [u64; 4], less: u8, numbers: &mut [i8; PART]) {
        for (numbers, eight) in numbers.as_chunks_mut::<8>().0.iter_mut().zip(bytes) {
            *numbers = eight.to_le_bytes().map(|byte| byte.wrapping_sub(less) as i8);
        }
    }

    #[inline(always)]
    fn half(self, bits: u16) -> f32 {
        from_half(bits)
    }

    #[inline(always)]
    fn add_products(self, x: &[[f32; GROUP]], q: &[[i8; GROUP]], d: &[f32], lanes: &mut Lanes) {
        for ((x, q), d) in x.iter().zip(q).zip(d) {
            for (lane, (x, q)) in lanes.iter_mut().zip(x.iter().zip(q)) {
                *lane += d * (x * f32::from(*q));
            }
        }
    }

    #[inline(always)]
    fn subtract(self, a: &Lanes, b: &Lanes, lanes: &mut Lanes) {
        for ((lane, a), b) in lanes.iter_mut().zip(a).zip(b) {
            *lane -= a * b;
        }
    }

    #[inline(always)]
    fn scale(self, q: &[[i8; GROUP]], d: &[f32], m: &[f32], wide: &mut [[f32; GROUP]]) {
        for ((wide, q), (d, m)) in wide.iter_mut().zip(q).zip(d.iter().zip(m)) {
            for (wide, q) in wide.iter_mut().zip(q) {
                *wide = f32::from(*q) * d - m;
            }
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{__m128i, __m256i};

    use pulp::x86::{V3, V4};
    use pulp::{cast, f32x8, f32x16, u64x2};

    use super::{GROUP, Lanes, PART, Unit, from_half};

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
            fn write(self, bytes: __m256i, less: u8, numbers: &mut [i8; PART]) {
                let less = self.avx._mm256_set1_epi8(less as i8);
                *numbers = cast(self.avx2._mm256_sub_epi8(bytes, less));
            }
        };
    }

    /// The numbers of a group in `f32`.
    trait Wide {
        type Group;
        fn wide(self, q: &[i8; GROUP]) -> Self::Group;
    }

    impl Wide for V3 {
        type Group = [f32x8; 2];

        #[inline(always)]
        fn wide(self, q: &[i8; GROUP]) -> [f32x8; 2] {
            let halves: [i64; 2] = cast(*q);
            halves.map(|half| {
                let q = self.avx2._mm256_cvtepi8_epi32(cast([half, 0]));
                self.convert_i32x8_to_f32x8(cast(q))
            })
        }
    }

    impl Wide for V4 {
        type Group = f32x16;

        #[inline(always)]
        fn wide(self, q: &[i8; GROUP]) -> f32x16 {
            let q = self.avx512f._mm512_cvtepi8_epi32(cast(*q));
            self.convert_i32x16_to_f32x16(cast(q))
        }
    }

    impl Unit for V3 {
        bytes!();

        #[inline(always)]
        fn half(self, bits: u16) -> f32 {
            from_half(bits)
        }

        #[inline(always)]
        fn add_products(self, x: &[[f32; GROUP]], q: &[[i8; GROUP]], d: &[f32], lanes: &mut Lanes) {
            // Several sums by turns: one alone would wait for its own previous addition.
            let mut sums: [f32x8; 2] = cast(*lanes);
            for ((x, q), d) in x.iter().zip(q).zip(d) {
                let x: [f32x8; 2] = cast(*x);
                let (q, d) = (Wide::wide(self, q), self.splat_f32x8(*d));
                for half in 0..2 {
                    let products = self.mul_f32x8(q[half], x[half]);
                    sums[half] = self.mul_add_f32x8(products, d, sums[half]);
                }
            }
            *lanes = cast(sums);
        }

        #[inline(always)]
        fn subtract(self, a: &Lanes, b: &Lanes, lanes: &mut Lanes) {
            let (a, b, sums): ([f32x8; 2], [f32x8; 2], [f32x8; 2]) =
                (cast(*a), cast(*b), cast(*lanes));
            *lanes =
                cast([0, 1].map(|half| self.negate_mul_add_f32x8(a[half], b[half], sums[half])));
        }

        #[inline(always)]
        fn scale(self, q: &[[i8; GROUP]], d: &[f32], m: &[f32], wide: &mut [[f32; GROUP]]) {
            for ((wide, q), (d, m)) in wide.iter_mut().zip(q).zip(d.iter().zip(m)) {
                let (d, m) = (self.splat_f32x8(*d), self.splat_f32x8(*m));
                *wide = cast(Wide::wide(self, q).map(|q| self.mul_sub_f32x8(q, d, m)));
            }
        }
    }

    impl Unit for V4 {
        bytes!();

        #[inline(always)]
        fn half(self, bits: u16) -> f32 {
            let halves = self.avx._mm256_set1_epi16(bits as i16);
            let values: [f32; 16] = cast(self.avx512f._mm512_cvtph_ps(halves));
            values[0]
        }

        #[inline(always)]
        fn add_products(self, x: &[[f32; GROUP]], q: &[[i8; GROUP]], d: &[f32], lanes: &mut Lanes) {
            // Two sums by turns: one alone would wait for its own previous addition.
            let mut sums: [f32x16; 2] = [cast(*lanes), self.splat_f32x16(0.0)];
            let mut add = |sum: usize, x: &[f32; GROUP], q: &[i8; GROUP], d: f32| {
                let products = self.mul_f32x16(Wide::wide(self, q), cast(*x));
                sums[sum] = self.mul_add_f32x16(products, self.splat_f32x16(d), sums[sum]);
            };
            let (x, q, d) = (x.as_chunks::<2>().0, q.as_chunks::<2>().0, d.as_chunks::<2>().0);
            for ((x, q), d) in x.iter().zip(q).zip(d) {
                add(0, &x[0], &q[0], d[0]);
                add(1, &x[1], &q[1], d[1]);
            }
            let sum = self.add_f32x16(sums[0], sums[1]);
            *lanes = cast(sum);
        }

        #[inline(always)]
        fn subtract(self, a: &Lanes, b: &Lanes, lanes: &mut Lanes) {
            *lanes = cast(self.negate_mul_add_f32x16(cast(*a), cast(*b), cast(*lanes)));
        }

        #[inline(always)]
        fn scale(self, q: &[[i8; GROUP]], d: &[f32], m: &[f32], wide: &mut [[f32; GROUP]]) {
            for ((wide, q), (d, m)) in wide.iter_mut().zip(q).zip(d.iter().zip(m)) {
                let (d, m) = (self.splat_f32x16(*d), self.splat_f32x16(*m));
                *wide = cast(self.mul_sub_f32x16(Wide::wide(self, q), d, m));
            }
        }
    }
}
