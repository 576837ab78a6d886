//! What weights are stored as, and how they become `f32` on their way into a register.

use half::{bf16, f16};
use pulp::Simd;

use super::units::{OnUnit, Unit, on_unit};

/// The smallest piece that weights are stored in: one number, or a GGUF block of several.
pub(super) trait Element: Copy + Send + Sync {
    /// Weights in it.
    const LEN: usize = 1;

    /// Whether [`widen`](Self::widen) needs room.
    const NARROW: bool = true;

    /// Whether blocks of it have minima.
    const MINIMA: bool = false;

    /// A run of weights in `f32`: itself, or what is written to the front of `wide`, which has room
    /// for all of them if these are narrower. As it stands, it is for blocks.
    #[inline(always)]
    fn widen<'a, S: Simd>(simd: S, w: &'a [Self], wide: &'a mut [f32]) -> &'a [f32] {
        let (wide, _) = wide.split_at_mut(w.len() * Self::LEN);
        let mut groups = Groups::new();
        for (wide, w) in wide.chunks_mut(RUN).zip(w.chunks(RUN / Self::LEN)) {
            on_unit(simd, Widen { w, groups: &mut groups, wide });
        }
        wide
    }

    /// Takes a run of blocks apart, [`RUN`] weights at most: gives how many weights they are, or 0 for
    /// what is no block.
    fn take_apart(_unit: impl Unit, _w: &[Self], _groups: &mut Groups) -> usize {
        0
    }
}

/// A run of blocks, to be widened.
struct Widen<'a, T> {
    w: &'a [T],
    groups: &'a mut Groups,
    wide: &'a mut [f32],
}

impl<T: Element> OnUnit for Widen<'_, T> {
    type Output = ();

    #[inline(always)]
    fn run(self, unit: impl Unit) {
        T::take_apart(unit, self.w, self.groups);
        let (q, wide) = (self.groups.q.as_chunks().0, self.wide.as_chunks_mut().0);
        unit.scale(q, &self.groups.d, &self.groups.m, wide);
    }
}

/// Weights of a block that share a scale, at least.
pub(super) const GROUP: usize = 16;

/// Weights that lie together in every block.
pub(super) const PART: usize = 2 * GROUP;

/// A run of blocks, taken apart: whole numbers `q` for each weight, `d` and `m` for each group of
/// them. A weight is `d q - m`.
pub(super) struct Groups {
    pub(super) q: [i8; RUN],
    pub(super) d: [f32; RUN / GROUP],
    pub(super) m: [f32; RUN / GROUP],
}

impl Groups {
    pub(super) const fn new() -> Self {
        Self { q: [0; RUN], d: [0.0; RUN / GROUP], m: [0.0; RUN / GROUP] }
    }
}

/// Weights that are widened at a time, into a buffer that stays in the first-level cache. A multiple
/// of every block.
pub(super) const RUN: usize = 512;

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
/// Moved up, exponent and mantissa are an `f32` that is 2¹¹² times too small, subnormal ones
/// included; infinities and NaN get their exponent back. `half` looks for a processor instruction at
/// every call, which cannot be compiled into a loop.
#[inline(always)]
pub(super) fn from_half(bits: u16) -> f32 {
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
