//! Attention without any weights, as it is worked through by hand.

use candle_core::Tensor;

use super::{SoftmaxSteps, check_matrix, copied};
use crate::error::Result;
use crate::refine::cosines;

/// Attention with cosines as scores: every row looks at every other and itself, and nothing is learned.
///
/// The context is what [`CosineReweight::mix`](crate::refine::CosineReweight::mix) of strength 1 and temperature 1
/// makes of the rows.
///
/// ```
/// use candle_core::Device;
/// use hybrid_attention::HybridModel;
/// use hybrid_attention::steps::CosineSteps;
///
/// # fn main() -> hybrid_attention::Result<()> {
/// let model = HybridModel::tiny(&Device::Cpu)?;
/// let steps = CosineSteps::of(&model.transformer().embed_ids(&[11, 150, 12])?)?;
/// println!("{}", steps.softmax.weights);
/// # assert_eq!((steps.softmax.weights.dims(), steps.after.dims()), ([3, 3].as_slice(), [3, 128].as_slice()));
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct CosineSteps {
    /// `x_i`, `(tokens, hidden)`: queries, keys and values at once, and the residual before.
    pub embeddings: Tensor,
    /// `s_ij = x_i · x_j / (|x_i| |x_j|)`, `(tokens, tokens)`, in `[-1, 1]`, and what follows from them without a
    /// maximum. A row of zeros is unlike all others and itself, with a cosine of 0.
    pub softmax: SoftmaxSteps,
    /// `c_i = Σ_j w_ij x_j`, `(tokens, hidden)`.
    pub context: Tensor,
    /// `x_i + c_i`, `(tokens, hidden)`: the residual after.
    pub after: Tensor,
}

impl CosineSteps {
    /// Of `(tokens, hidden)` rows: embeddings, thoughts, or any others.
    ///
    /// # Errors
    /// [`Error::Parameter`](crate::Error::Parameter) for what is no matrix of at least one row and column;
    /// [`Error::NotFinite`](crate::Error::NotFinite) for rows that are not.
    pub fn of(embeddings: &Tensor) -> Result<Self> {
        check_matrix("embeddings", "(tokens, hidden), at least one of each", embeddings)?;
        let embeddings = copied(embeddings)?;
        let softmax = SoftmaxSteps::without_maximum(&cosines(&embeddings)?)?;
        let context = softmax.weights.matmul(&embeddings)?; // (tokens, tokens) x (tokens, hidden)
        let after = (&embeddings + &context)?;
        Ok(Self { embeddings, softmax, context, after })
    }
}
