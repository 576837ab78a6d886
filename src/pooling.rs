//! From one vector per token to one per text.

use std::ops::Range;

use candle_core::{D, Tensor};
use serde::{Deserialize, Serialize};

use crate::error::Result;
use crate::model::{Batch, flat};

/// How the vectors of a text's tokens become one.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Pooling {
    /// Their mean (GritLM, LLM2Vec). The right one for bidirectional passes.
    #[default]
    Mean,
    /// Their mean weighted by position, 1 for the first token (Muennighoff 2022): for causal
    /// passes, where later tokens have seen more.
    WeightedMean,
    /// The last token's vector alone.
    LastToken,
}

impl Pooling {
    /// One vector for each sequence of `batch`: `(tokens, hidden) -> (sequences, hidden)`.
    ///
    /// # Errors
    /// [`Error::Parameter`](crate::Error::Parameter) when `hidden` does not have one row for each token.
    pub fn pool(self, hidden: &Tensor, batch: &Batch) -> Result<Tensor> {
        self.pool_after(hidden, batch, &[])
    }

    /// The same, where the first few tokens of each sequence are left out; positions count them.
    pub(crate) fn pool_after(
        self,
        hidden: &Tensor,
        batch: &Batch,
        left_out: &[usize],
    ) -> Result<Tensor> {
        batch.check(hidden)?;
        let hidden = flat(hidden)?;
        let pool = |(rows, left_out): (Range<usize>, usize)| -> Result<Tensor> {
            let count = rows.len();
            let weight = |token: usize| match self {
                Self::Mean => 1.0,
                Self::WeightedMean => (token + 1) as f32,
                Self::LastToken => f32::from(u8::from(token + 1 == count)),
            };
            let pooled = left_out.min(count)..count;
            let sum: f32 = pooled.clone().map(weight).sum::<f32>().max(f32::MIN_POSITIVE);
            let weights: Vec<f32> = pooled.clone().map(|token| weight(token) / sum).collect();
            let weights = Tensor::from_vec(weights, (pooled.len(), 1), hidden.device())?;
            let own = hidden.narrow(0, rows.start + pooled.start, pooled.len())?;
            Ok(own.broadcast_mul(&weights.to_dtype(hidden.dtype())?)?.sum(0)?) // (hidden)
        };
        let left_out = left_out.iter().copied().chain(std::iter::repeat(0));
        let pooled = batch.all_rows().zip(left_out).map(pool).collect::<Result<Vec<_>>>()?;
        Ok(Tensor::stack(&pooled, 0)?)
    }
}

/// Vectors scaled to length 1 over the last dimension; a zero vector stays zero.
pub(crate) fn unit_length(vectors: &Tensor) -> Result<Tensor> {
    let norm = vectors.sqr()?.sum_keepdim(D::Minus1)?.sqrt()?;
    Ok(vectors.broadcast_div(&norm.maximum(f64::from(f32::MIN_POSITIVE))?)?)
}
