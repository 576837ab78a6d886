//! What weights are stored as, and how they become `f32` on their way into a register.

use half::{bf16, f16};
use pulp::Simd;

/// The smallest piece that weights are stored in: one number, or a GGUF block of several.
pub(in crate::kernels) trait Element: Copy + Send + Sync {
    /// Weights in it.
    const LEN: usize = 1;

    /// Whether [`widen`](Self::widen) needs a buffer.
    const NARROW: bool = true;

    /// A run of weights in `f32`: the run itself, or, if the weights are narrower, a copy at the front
    /// of `wide`, which has room for all of them.
    fn widen<'a, S: Simd>(simd: S, w: &'a [Self], wide: &'a mut [f32]) -> &'a [f32];
}

/// Weights that are widened at a time, into a buffer that stays in the first-level cache. A multiple
/// of every block.
pub(in crate::kernels) const RUN: usize = 512;

impl Element for f32 {
    const NARROW: bool = false;

    #[inline(always)]
    fn widen<'a, S: Simd>(_: S, w: &'a [f32], _: &'a mut [f32]) -> &'a [f32] {
        w
    }
}

impl Element for bf16 {
    #[inline(always)]
    fn widen<'a, S: Simd>(_: S, w: &'a [bf16], wide: &'a mut [f32]) -> &'a [f32] {
        // A bf16 is the upper half of an f32; written out so that the compiler can vectorise it inside
        // the loop.
        let wide = &mut wide[..w.len()];
        for (wide, w) in wide.iter_mut().zip(w) {
            *wide = f32::from_bits(u32::from(w.to_bits()) << 16);
        }
        wide
    }
}

impl Element for f16 {
    #[inline(always)]
    fn widen<'a, S: Simd>(_: S, w: &'a [f16], wide: &'a mut [f32]) -> &'a [f32] {
        let wide = &mut wide[..w.len()];
        for (wide, w) in wide.iter_mut().zip(w) {
            *wide = from_half(w.to_bits());
        }
        wide
    }
}

/// The `f32` that is the `f16` with these bits.
///
/// Shifted into place, exponent and mantissa make an `f32` that is 2¹¹² times too small, subnormal
/// numbers included; infinities and NaN get their exponent back. `half` looks for a processor
/// instruction at every call, which cannot be compiled into a loop.
#[inline(always)]
pub(in crate::kernels) fn from_half(bits: u16) -> f32 {
    const TWO_TO_112: f32 = f32::from_bits((127 + 112) << 23);
    const TOP: u32 = 0x7c00;
    let bits = u32::from(bits);
    let size = f32::from_bits((bits & 0x7fff) << 13) * TWO_TO_112;
    let endless = if bits & TOP == TOP { 0x7f80_0000 } else { 0 };
    f32::from_bits(size.to_bits() | endless | (bits & 0x8000) << 16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_half_is_what_half_says() {
        for bits in 0..=u16::MAX {
            let (ours, theirs) = (from_half(bits), f16::from_bits(bits).to_f32());
            assert!(
                ours.to_bits() == theirs.to_bits() || ours.is_nan() && theirs.is_nan(),
                "{bits:x}"
            );
        }
    }
}
