//! How the numbers and scales of blocks lie when they are taken apart: a chunk at a time.

/// Weights that share a scale, at least.
pub(super) const SCALE_GROUP: usize = 16;

/// Weights that lie together in every block.
pub(super) const PART: usize = 2 * SCALE_GROUP;

/// The weights of a large block, or of eight small ones.
pub(super) const CHUNK: usize = 8 * PART;

/// One number for each scale group of a chunk.
pub(super) type PerGroup = [f32; CHUNK / SCALE_GROUP];
