//! A projection without bias, dense or quantised.

use candle_core::Tensor;

/// `y = x Wᵀ`.
#[derive(Clone, Debug)]
pub struct Linear {
    weight: Tensor,
}

impl Linear {
    /// A dense projection; `weight` is `(out_features, in_features)`.
    pub fn dense(weight: Tensor) -> Self {
        Self { weight }
    }
}
