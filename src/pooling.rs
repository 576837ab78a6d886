//! From one vector per token to one per text.

use candle_core::{D, Tensor};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::model::Layout;

/// How the vectors of a text's tokens become one. Padding never takes part.
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
    /// `(batch, seq, hidden) -> (batch, hidden)` over the tokens that `layout` says are real.
    ///
    /// # Errors
    /// [`Error::Parameter`] when `layout` does not fit `hidden`.
    pub fn pool(self, hidden: &Tensor, layout: &Layout) -> Result<Tensor> {
        let (batch, seq, _) = hidden.dims3()?;
        if (layout.batch(), layout.seq()) != (batch, seq) {
            let expected = format!("{batch} rows of {seq} slots");
            let got = format!("{} rows of {}", layout.batch(), layout.seq());
            return Err(Error::parameter("layout", expected, got));
        }
        let weight = |start: usize, slot: usize| match self {
            _ if slot < start => 0.0,
            Self::Mean => 1.0,
            Self::WeightedMean => (slot - start + 1) as f32,
            // Rows end together, so this is the last token of each.
            Self::LastToken => f32::from(u8::from(slot + 1 == seq)),
        };
        let row = |start: usize| {
            let weights: Vec<f32> = (0..seq).map(|slot| weight(start, slot)).collect();
            let sum: f32 = weights.iter().sum::<f32>().max(f32::MIN_POSITIVE);
            weights.into_iter().map(|weight| weight / sum).collect::<Vec<_>>()
        };
        let weights: Vec<Vec<f32>> = layout.starts().into_iter().map(row).collect();
        let weights = Tensor::new(weights, hidden.device())?.to_dtype(hidden.dtype())?;
        Ok(hidden.broadcast_mul(&weights.unsqueeze(D::Minus1)?)?.sum(1)?)
    }
}

/// Vectors scaled to length 1 over the last dimension; a zero vector stays zero.
pub(crate) fn unit_length(vectors: &Tensor) -> Result<Tensor> {
    let norm = vectors.sqr()?.sum_keepdim(D::Minus1)?.sqrt()?;
    Ok(vectors.broadcast_div(&norm.maximum(f64::from(f32::MIN_POSITIVE))?)?)
}
