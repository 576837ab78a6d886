//! What the states of a text say as a whole: means and variances of pairs, and what those of a prompt let one
//! expect of its answer.
//!
//! ```text
//! summary       means, variances and deviations of pairs, as a text grows     Summary, Running
//! distance      how far two summaries are from each other                     Distance
//! key           ridge regression from an input's to an output's, and whether that says anything    Key
//! generic       what many texts have in common: mean, directions, what these explain of others    Generic, Subspace
//! transition    which state comes next: a matrix, or one made of the past     Transition
//! ```
//!
//! All of them take rows of numbers, `(tokens, hidden)`, whatever these are: embeddings, or hidden states of
//! a layer, which [`states`] gives.
//!
//! ```
//! # use candle_core::Device;
//! use hybrid_attention::HybridModel;
//! use hybrid_attention::statistics::{Distance, Pairs, Summary, states};
//!
//! # fn main() -> hybrid_attention::Result<()> {
//! let model = HybridModel::tiny(&Device::Cpu)?;
//! let summary = |ids: &[u32]| Summary::of(&states(model.transformer(), ids, 2)?, Pairs::Full);
//! let (one, same, other) = (summary(&[5, 150, 9, 151])?, summary(&[5, 150, 9, 152])?, summary(&[7, 40, 3])?);
//! let apart = |a: &Summary, b: &Summary| Distance::Cosine.between(&a.sd, &b.sd);
//! assert!(apart(&one, &same)? < apart(&one, &other)?);
//! # Ok(())
//! # }
//! ```

mod distance;
mod file;
mod fingerprint;
mod generic;
mod held_out;
mod key;
mod principal;
mod ridge;
mod rows;
mod solve;
mod subspace;
mod summary;
mod transition;

use candle_core::Tensor;

use crate::error::{Error, Result};
use crate::model::{Batch, Pass, Transformer};

pub use self::distance::Distance;
pub use self::fingerprint::Fingerprint;
pub use self::generic::{Explained, Generic};
pub use self::key::{Example, Intended, Key, KeyConfig, Part};
pub(crate) use self::solve::{Cholesky, dot};
pub use self::subspace::Subspace;
pub use self::summary::{Pairs, Running, Summary};
pub use self::transition::{Figures, Transition, TransitionConfig};

/// The states of a text that enter a layer, `(tokens, hidden)`, read causally: its embeddings for layer 0,
/// what leaves the last layer for as many as there are.
///
/// # Errors
/// [`Error::EmptyPrompt`] for no tokens; [`Error::TokenOutOfRange`]; [`Error::Parameter`] for a layer that is
/// not there; as [`Transformer::forward`].
pub fn states(transformer: &Transformer, ids: &[u32], layer: usize) -> Result<Tensor> {
    let layers = transformer.all_layers().end;
    if layer > layers {
        return Err(Error::parameter("layer", format!("0 to {layers}"), layer));
    }
    if ids.is_empty() {
        return Err(Error::EmptyPrompt);
    }
    let xs = transformer.embed_ids(ids)?;
    match layer {
        0 => Ok(xs),
        _ => {
            let batch = Batch::one(ids.len())?.with_ids(ids)?;
            transformer.forward(&xs, 0..layer, Pass::Causal(&batch))
        }
    }
}
