//! The blocks.

mod linear;
mod weights;

pub use linear::Linear;
pub use weights::Weights;
