//! `e^x` in arithmetic that compilers can vectorise, unlike a call of the C library.

/// Below this the result is 0, as it is beside the 1 of a softmax.
const LOWEST: f32 = -87.0;

/// Above this the result is infinite; by the exact rule that begins at 88.7.
const HIGHEST: f32 = 88.0;

/// `e^x` for `x` in `[-87, 88]`, to two units in the last place; 0 below and infinity above it, and
/// NaN for NaN.
///
/// `x = n ln 2 + r` with whole `n` and `|r| <= ln 2 / 2`; then `e^x = 2^n e^r`, with a polynomial
/// for `e^r` (Cody & Waite 1980; coefficients of Cephes' `expf`).
#[inline(always)]
pub(in crate::kernels) fn exp(x: f32) -> f32 {
    // Adding 1.5 · 2^23 rounds to a whole number, which is then in the lowest bits.
    const ROUND: f32 = 12_582_912.0;
    let shifted = x * std::f32::consts::LOG2_E + ROUND;
    let n = shifted - ROUND;
    // ln 2 in two parts, the first exact in few bits, so that n times it is exact.
    let r = x - n * 0.693_359_4 - n * -2.121_944_4e-4;
    let mut poly = 1.987_569_1e-4;
    for coefficient in [1.398_2e-3, 8.333_452e-3, 4.166_579_6e-2, 1.666_666_5e-1, 5e-1] {
        poly = poly * r + coefficient;
    }
    let e_r = poly * r * r + r + 1.0;
    let two_n = f32::from_bits((shifted.to_bits().wrapping_add(127)) << 23);
    // Selections, not branches: all lanes of a vector go the same way.
    let inside = e_r * two_n;
    let above = if x > HIGHEST { f32::INFINITY } else { inside };
    if x < LOWEST { 0.0 } else { above }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(20_000))]
        #[test]
        fn agrees_with_the_standard_library(x in -87f32..88.0) {
            let expected = f64::from(x).exp();
            let relative = (f64::from(exp(x)) - expected).abs() / expected;
            prop_assert!(relative < 2.4e-7, "{x}: {relative}");
        }
    }

    #[test]
    fn keeps_to_its_ends() {
        assert_eq!(exp(0.0), 1.0);
        assert_eq!([exp(f32::NEG_INFINITY), exp(-1e30), exp(-87.1)], [0.0; 3]);
        assert_eq!([exp(f32::INFINITY), exp(1e30), exp(89.0)], [f32::INFINITY; 3]);
        assert!(exp(f32::NAN).is_nan());
    }
}
