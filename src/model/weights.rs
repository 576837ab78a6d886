//! The seam between a model and whatever holds its tensors.

use std::collections::HashMap;

use candle_core::{DType, Tensor};

use super::linear::Linear;
use crate::config::Config;
use crate::error::{Error, Result};

/// Where a [`Transformer`](super::Transformer) takes its weights from.
///
/// Names are those of a Hugging Face checkpoint (`model.layers.0.self_attn.q_proj.weight`) and rows of
/// `q_proj` and `k_proj` are in Hugging Face order (the two halves of a head one after the other),
/// whatever names and order the source itself uses. Each matrix of an expert is one by itself, under the
/// names of `transformers` 4 (`model.layers.0.block_sparse_moe.experts.7.w1.weight`, beside `w3`, the up
/// projection, and `w2`, the down projection), even where the source packs them; and
/// `model.layers.0.block_sparse_moe.gate.weight` is the router.
pub trait Weights {
    /// The tensor called `name`, checked to have `shape`.
    ///
    /// # Errors
    /// [`Error::MissingWeight`], [`Error::WeightShape`], or whatever the source runs into.
    fn tensor(&mut self, name: &str, shape: &[usize]) -> Result<Tensor>;

    /// Whether there is a tensor called `name`, or any whose name continues it after a dot. Asked only
    /// about what a checkpoint may have in addition to the model's own weights; the default answer is
    /// that it has none.
    fn contains(&self, _name: &str) -> bool {
        false
    }

    /// The projection called `name`: `(out_features, in_features)`.
    ///
    /// # Errors
    /// As [`Weights::tensor`].
    fn linear(&mut self, name: &str, out_features: usize, in_features: usize) -> Result<Linear> {
        Linear::dense(&self.tensor(name, &[out_features, in_features])?)
    }

    /// The embedding table called `name`, `(vocab_size, hidden_size)`, whose rows are looked up; where
    /// it is also the head, it multiplies, too.
    ///
    /// # Errors
    /// As [`Weights::tensor`].
    fn embedding(&mut self, name: &str, vocab_size: usize, hidden_size: usize) -> Result<Linear> {
        Linear::dense(&self.tensor(name, &[vocab_size, hidden_size])?)
    }
}

/// The projection of a block that is called `{prefix}.{name}`, as `self_attn.q_proj` of
/// `model.layers.0`.
pub(super) fn projection(
    weights: &mut impl Weights,
    config: &Config,
    prefix: &str,
    name: &str,
) -> Result<Linear> {
    let (out_features, in_features) = config.projection(name);
    weights.linear(&format!("{prefix}.{name}.weight"), out_features, in_features)
}

/// Tensors in memory, in `f32`, `f16` or `bf16`: for tests, training, hand-made weights.
impl Weights for HashMap<String, Tensor> {
    fn tensor(&mut self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let place = || "memory".to_string();
        let tensor = self
            .get(name)
            .ok_or_else(|| Error::MissingWeight { name: name.to_string(), place: place() })?;
        if !matches!(tensor.dtype(), DType::F32 | DType::F16 | DType::BF16) {
            return Err(Error::WeightDType {
                name: name.to_string(),
                place: place(),
                expected: "F32, F16 or BF16",
                got: format!("{:?}", tensor.dtype()),
            });
        }
        if tensor.dims() != shape {
            return Err(Error::WeightShape {
                name: name.to_string(),
                place: place(),
                expected: shape.to_vec(),
                got: tensor.dims().to_vec(),
            });
        }
        Ok(tensor.clone())
    }

    fn contains(&self, name: &str) -> bool {
        self.keys().any(|key| is_or_is_under(key, name))
    }
}

/// Whether `key` is `name`, or continues it after a dot.
pub(crate) fn is_or_is_under(key: &str, name: &str) -> bool {
    key.strip_prefix(name).is_some_and(|rest| rest.is_empty() || rest.starts_with('.'))
}
