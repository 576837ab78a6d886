//! `e^x` in arithmetic that compilers turn into vector instructions, which a call of the C library
//! keeps them from doing.

/// Below this the result is taken to be the smallest one: nothing beside a softmax's 1.
const LOWEST: f32 = -87.0;

/// Above this the result would overflow; it is taken at this point.
const HIGHEST: f32 = 88.0;

/// `e^x` for `x` in `[-87, 88]`, to two units in the last place; `x` beyond that range counts as
/// its end, and NaN stays NaN.
///
/// `x = n ln 2 + r` with whole `n` and `|r| <= ln 2 / 2`; then `e^x = 2^n e^r`, with a polynomial
/// for `e^r` (Cody & Waite 1980; coefficients of Cephes' `expf`).
#[inline(always)]
pub(super) fn exp(x: f32) -> f32 {
    // Comparisons, not `clamp`, which compilers do not turn into one instruction that keeps NaN.
    let x = if x < LOWEST { LOWEST } else { x };
    let x = if x > HIGHEST { HIGHEST } else { x };
    // Adding 1.5 · 2^23 rounds to a whole number, which then stands in the lowest bits.
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
    e_r * two_n
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
        assert!(exp(f32::NEG_INFINITY) < 2e-38 && exp(-1e30) >= 0.0);
        assert!(exp(f32::INFINITY).is_finite() && exp(f32::INFINITY) > 1e38);
        assert!(exp(f32::NAN).is_nan());
    }
}
