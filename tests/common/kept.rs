//! Random weights in every type that a loader keeps them in.

use std::collections::HashMap;
use std::sync::Arc;

use candle_core::Tensor;
use candle_core::quantized::QTensor;
use hybrid_attention::model::{Linear, Transformer, Weights};
use hybrid_attention::{Config, WeightType};

use super::{Result, tiny};

/// Random weights, kept as a loader would keep them.
pub(crate) struct Kept {
    pub(crate) tensors: HashMap<String, Tensor>,
    pub(crate) kept: WeightType,
}

impl Weights for Kept {
    fn tensor(&mut self, name: &str, shape: &[usize]) -> hybrid_attention::Result<Tensor> {
        self.tensors.tensor(name, shape)
    }

    fn contains(&self, name: &str) -> bool {
        self.tensors.contains(name)
    }

    fn linear(&mut self, name: &str, out: usize, input: usize) -> hybrid_attention::Result<Linear> {
        let weight = self.tensors.tensor(name, &[out, input])?;
        match self.kept {
            WeightType::Dense(dtype) => Linear::dense(&weight.to_dtype(dtype)?),
            WeightType::Quantized(blocks) => {
                Linear::quantized(Arc::new(QTensor::quantize(&weight, blocks)?))
            }
            WeightType::Stored => Linear::dense(&weight),
        }
    }

    fn embedding(
        &mut self,
        name: &str,
        vocab: usize,
        hidden: usize,
    ) -> hybrid_attention::Result<Linear> {
        self.linear(name, vocab, hidden)
    }
}

/// [`tiny::transformer`], kept so.
pub(crate) fn transformer(config: &Config, kept: WeightType, seed: u64) -> Result<Transformer> {
    let tensors = tiny::weights(config, seed)?;
    Ok(Transformer::new(config, &mut Kept { tensors, kept })?)
}
