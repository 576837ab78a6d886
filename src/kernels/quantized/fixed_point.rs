//! A row of input in fixed point, so that it can be multiplied with the integers of blocks; the products
//! themselves are in `few_rows`.
//!
//! Processors multiply four times as many bytes at a time as `f32`. An integer up to 2²¹ takes three
//! bytes, and is hardly coarser than the largest `f32` beside it; sums of their products are exact,
//! where sums of `f32` are rounded at every step.

use super::chunk::{CHUNK, PerGroup, SCALE_GROUP};

/// Numbers that are multiplied at a time: a register of AVX-512.
const STEP: usize = 64;

/// Between 2²³ and 2²⁴, `f32` has no fractional bits: those of a smaller number that is added are
/// rounded away, and the difference of the bits is the integer.
const TO_WHOLE: f32 = (3 << 22) as f32;

/// A chunk of a row, `x = scale (65536 bytes[.][0] + 256 bytes[.][1] + bytes[.][2])`, and the sums of its
/// groups.
#[repr(align(64))] // a line of the cache, so that no load of a register touches two
pub(in crate::kernels) struct FixedPoint {
    pub(super) bytes: [[[i8; STEP]; 3]; CHUNK / STEP],
    pub(super) scale: f32,
    pub(super) sums: PerGroup,
}

impl FixedPoint {
    #[inline(always)]
    pub(super) fn new(x: &[f32; CHUNK]) -> Self {
        const SIGN: u32 = 1 << 31;
        const MANTISSA: u32 = 23;
        let mut x = *x;
        // Without the sign, the bits of `f32` order as the magnitudes do, with NaN the largest.
        let largest = x.iter().fold(0, |largest, x| largest.max(x.to_bits() & !SIGN));
        // A power of two, so that numbers of fewer than 21 bits are not rounded, and such that the
        // largest becomes at most 2²¹: 1.0, for example, has the exponent 127, and becomes 2²⁰.
        let exponent = largest >> MANTISSA;
        let to_whole = f32::from_bits((254 + 20 - exponent).min(254) << MANTISSA);
        let mut scale = 1.0 / to_whole;
        if exponent == 255 {
            (x, scale) = ([0.0; CHUNK], f32::NAN); // infinite or NaN
        }

        let mut whole = [0i32; CHUNK];
        for (whole, x) in whole.iter_mut().zip(x) {
            *whole = (x * to_whole + TO_WHOLE).to_bits() as i32 - TO_WHOLE.to_bits() as i32;
        }
        let mut bytes = [[[0; STEP]; 3]; CHUNK / STEP];
        for ([high, middle, low], whole) in bytes.iter_mut().zip(whole.as_chunks::<STEP>().0) {
            for (index, whole) in whole.iter().enumerate() {
                // 0x12_85_f0 is 0x13 << 16, less 0x7a << 8, less 0x10.
                low[index] = *whole as i8;
                let upper = (whole - i32::from(low[index])) >> 8;
                middle[index] = upper as i8;
                high[index] = ((upper - i32::from(middle[index])) >> 8) as i8;
            }
        }
        // Sums of the rounded numbers, so that the rounding of `x` makes no difference between it and
        // its sums.
        let mut sums = [0.0; CHUNK / SCALE_GROUP];
        for (sum, group) in sums.iter_mut().zip(whole.as_chunks::<SCALE_GROUP>().0) {
            *sum = scale * group.iter().sum::<i32>() as f32; // 16 times 21 bits and a sign
        }
        Self { bytes, scale, sums }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn back(fixed: &FixedPoint, index: usize) -> f64 {
        let bytes = fixed.bytes[index / STEP];
        let [high, middle, low] = bytes.map(|bytes| i64::from(bytes[index % STEP]));
        (high * 65536 + middle * 256 + low) as f64 * f64::from(fixed.scale)
    }

    proptest! {
        #[test]
        fn nothing_is_further_off_than_the_largest_rounds(
            x in prop::collection::vec(-1f32..1.0, CHUNK),
            exponent in -140i32..120,
        ) {
            let mut scaled = [0.0; CHUNK];
            scaled.iter_mut().zip(&x).for_each(|(scaled, x)| *scaled = x * 2f32.powi(exponent));
            let x = scaled;
            let largest = x.iter().fold(0f32, |largest, x| largest.max(x.abs()));
            // The largest is at least half a power of two, of which one unit is 2⁻²¹; but no step is
            // smaller than the inverse of the largest f32.
            let bound = f64::from(largest) * 2f64.powi(-21) + 2f64.powi(-128);
            let fixed = FixedPoint::new(&x);
            for (index, x) in x.iter().enumerate() {
                prop_assert!((back(&fixed, index) - f64::from(*x)).abs() <= bound);
            }
            for (group, sum) in fixed.sums.iter().enumerate() {
                let of = (0..SCALE_GROUP).map(|index| back(&fixed, group * SCALE_GROUP + index));
                let of: f64 = of.sum();
                prop_assert!((of - f64::from(*sum)).abs() <= 16.0 * bound, "{of} {sum}");
            }
        }
    }

    #[test]
    fn what_is_no_number_stays_none() {
        for x in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let mut chunk = [1.0; CHUNK];
            chunk[17] = x;
            assert!(FixedPoint::new(&chunk).scale.is_nan());
        }
        assert_eq!(back(&FixedPoint::new(&[0.0; CHUNK]), 1), 0.0);
    }
}
