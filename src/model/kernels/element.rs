//! What weights are stored as, and how they become `f32` on their way into a register.

use half::{bf16, f16, slice::HalfFloatSliceExt};

/// The smallest piece that weights are stored in: one number, or a GGUF block of several.
pub(super) trait Element: Copy + Send + Sync {
    /// Weights in it.
    const LEN: usize = 1;

    /// A run of weights in `f32`: itself, or what is written to the front of `wide`, which has room
    /// for all of them.
    fn widen<'a>(w: &'a [Self], wide: &'a mut [f32]) -> &'a [f32];
}

/// Weights that are widened at a time, into a buffer that stays in the first-level cache. A multiple
/// of every block.
pub(super) const RUN: usize = 512;

impl Element for f32 {
    #[inline(always)]
    fn widen<'a>(w: &'a [f32], _: &'a mut [f32]) -> &'a [f32] {
        w
    }
}

impl Element for bf16 {
    #[inline(always)]
    fn widen<'a>(w: &'a [bf16], wide: &'a mut [f32]) -> &'a [f32] {
        // A bf16 is the upper half of an f32; written out so that it is compiled, as vectors, into
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
    fn widen<'a>(w: &'a [f16], wide: &'a mut [f32]) -> &'a [f32] {
        let wide = &mut wide[..w.len()];
        w.convert_to_f32_slice(wide);
        wide
    }
}
