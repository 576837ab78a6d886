//! How the numbers and scales of blocks are laid out when they are unpacked: a chunk at a time.

/// The fewest weights that share a scale.
pub(super) const SCALE_GROUP: usize = 16;

/// Weights that are stored together in every block.
pub(super) const PART: usize = 2 * SCALE_GROUP;

/// The weights of a large block, or of eight small ones.
pub(super) const CHUNK: usize = 8 * PART;

/// One number for each scale group of a chunk.
pub(super) type PerGroup = [f32; CHUNK / SCALE_GROUP];
