//! Thoughts put in the place of the nearest embedding.

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use super::interpolate::{check_share, lerp};
use super::rows::wide;
use super::{Codes, OpConfig, Refine, Step};
use crate::batch::flat;
use crate::error::{Error, Result};

/// Moves every row that thinks to, or towards, the nearest row of the model's embedding table: `x + share ·
/// (e - x)` (rounding, as in Diffusion-LM; Li et al. 2022). The nearest is that of the least squared
/// distance, found by [`Codes`], which are made once for a model and kept with it.
///
/// Only thoughts that enter layer 0 live among embeddings: of a span that begins further up, the nearest
/// embedding says little. Gradients take the embedding for a constant.
///
/// ```
/// # use candle_core::Device;
/// use hybrid_attention::refine::{Interpolate, Noise, Substitute, seq};
/// use hybrid_attention::{GenerationConfig, HybridModel, Thinking};
///
/// # fn main() -> hybrid_attention::Result<()> {
/// let model = HybridModel::tiny(&Device::Cpu)?;
/// let back = seq().add(Interpolate::new(0.0)).add(Substitute::new(1.0));
/// let thinking = Thinking::new(1).noise(Noise::relative(0.5)).refine(back);
/// let thoughts = model.think("The coin is in the jar.", &GenerationConfig::default().thinking(thinking))?;
/// let apart = (&thoughts.z - &thoughts.first)?.abs()?.max_all()?.to_scalar::<f32>()?;
/// assert_eq!(apart, 0.0); // so little noise does not change the nearest
/// # Ok(())
/// # }
/// ```
///
/// In `hybrid.json`: `{"op": "substitute", "share": 1.0}`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Substitute {
    share: f64,
}

impl Substitute {
    /// By this share of the way, in `[0, 1]`. 0 changes nothing; at 1 thoughts become embeddings.
    #[must_use]
    pub fn new(share: f64) -> Self {
        Self { share }
    }

    /// `(rows, hidden)` in and out.
    fn moved(&self, rows: &Tensor, codes: &Codes) -> Result<Tensor> {
        let own = wide(rows)?;
        let nearest = codes.nearest(&own, 1)?;
        let ids: Vec<u32> = nearest.into_iter().flatten().map(|near| near.row).collect();
        let nearest = codes.look_up(&ids)?.to_device(own.device())?.to_dtype(own.dtype())?;
        Ok(lerp(&own, &nearest, self.share)?.to_dtype(rows.dtype())?)
    }
}

impl Refine for Substitute {
    fn refine(&self, xs: &Tensor, step: &Step<'_>) -> Result<Tensor> {
        self.validate()?;
        step.batch.check(xs)?;
        if self.share == 0.0 || xs.elem_count() == 0 {
            return Ok(xs.clone());
        }
        let model = || Error::parameter("step", "one with a model behind it", "none");
        let codes = step.readout.ok_or_else(model)?.codes()?;
        // Segment by segment; the rows between them unchanged.
        let rows = flat(xs)?;
        let (mut pieces, mut done) = (Vec::new(), 0);
        for segment in step.batch.segments() {
            pieces.push(rows.narrow(0, done, segment.start - done)?);
            pieces.push(self.moved(&rows.narrow(0, segment.start, segment.len())?, codes)?);
            done = segment.end;
        }
        pieces.push(rows.narrow(0, done, step.batch.tokens() - done)?);
        Ok(Tensor::cat(&pieces, 0)?.reshape(xs.shape())?)
    }

    fn validate(&self) -> Result<()> {
        check_share("share", self.share)
    }

    fn to_config(&self) -> Option<OpConfig> {
        Some(OpConfig::Substitute(self.clone()))
    }
}
