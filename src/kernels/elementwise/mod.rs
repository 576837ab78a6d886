//! What is computed element by element, or row by row: each in one pass over memory.

mod add;
mod exp;
mod log_sum_exp;
mod mix;
mod rms_norm;
mod softmax;
mod split_heads;
mod swiglu;

pub(super) use add::AddTo;
pub(super) use exp::exp;
pub(crate) use log_sum_exp::log_sum_exp;
pub(super) use mix::Mix;
pub(super) use rms_norm::RmsNorm;
pub(super) use softmax::softmax_in_place;
pub(super) use split_heads::SplitHeads;
pub(super) use swiglu::SwiGlu;

/// Partial results side by side: with only one, each step would wait for the one before.
pub(super) const LANES: usize = 32;
