//! From scores to weights.

use candle_core::{DType, Tensor};

use super::{check_matrix, copied};
use crate::error::{Error, Result};

/// How scores become weights: row by row, each weight is positive and they sum to 1.
///
/// Worked out in `f64` and rounded to `f32` at the end.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use hybrid_attention::steps::SoftmaxSteps;
///
/// // A row of attention worked through by hand. The scores are found back from its weights, and so up to a number
/// // added to all of them, which changes no weight
/// let scores = Tensor::new(&[[0f32, 0.10, 0.05, 0.03, 0.02]], &Device::Cpu)?;
/// let steps = SoftmaxSteps::without_maximum(&scores)?;
/// let rounded = |xs: &Tensor| -> hybrid_attention::Result<Vec<Vec<i64>>> {
///     Ok((xs * 1000.0)?.round()?.to_dtype(candle_core::DType::I64)?.to_vec2()?)
/// };
/// assert_eq!(rounded(&steps.exponentials)?, [[1000, 1105, 1051, 1030, 1020]]);
/// assert_eq!(rounded(&steps.sums)?, [[5207]]);
/// assert_eq!(rounded(&steps.weights)?, [[192, 212, 202, 198, 196]]); // of 1000; a row that sums to 174 is wrong
///
/// // A row's maximum is 1 in its exponentials, and its weights are the same
/// let steps = SoftmaxSteps::of(&(scores + 1000.0)?)?;
/// assert_eq!(rounded(&steps.exponentials)?, [[905, 1000, 951, 932, 923]]);
/// assert_eq!(rounded(&steps.weights)?, [[192, 212, 202, 198, 196]]);
/// # Ok::<_, hybrid_attention::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct SoftmaxSteps {
    /// `s_ij`, `(queries, keys)`: how well key `j` fits query `i`; minus infinity for one that it does not see.
    pub scores: Tensor,
    /// `m_i = max_j s_ij`, `(queries, 1)`: taken off the scores, so that no exponential can overflow. It is in
    /// numerator and denominator and changes no weight; `None` where it was left out.
    pub maximum: Option<Tensor>,
    /// `e_ij = exp(s_ij - m_i)`, `(queries, keys)`: 0 for a key that is not seen, and 1 for the best.
    pub exponentials: Tensor,
    /// `Z_i = Σ_j e_ij`, `(queries, 1)`.
    pub sums: Tensor,
    /// `w_ij = e_ij / Z_i`, `(queries, keys)`: the rows sum to 1.
    pub weights: Tensor,
}

impl SoftmaxSteps {
    /// Of `(queries, keys)` scores of any size.
    ///
    /// # Errors
    /// [`Error::Parameter`] for what is no matrix of at least one score; [`Error::NotFinite`] with the row in which
    /// a score is NaN or infinite, or no key is seen.
    pub fn of(scores: &Tensor) -> Result<Self> {
        Self::new(scores, true)
    }

    /// The same as textbooks and hands have it, with `e_ij = exp(s_ij)`: for small scores such as cosines.
    ///
    /// # Errors
    /// As [`of`](Self::of), and [`Error::NotFinite`] also where exponentials overflow, from scores of 88 on, or all
    /// of a row vanish.
    pub fn without_maximum(scores: &Tensor) -> Result<Self> {
        Self::new(scores, false)
    }

    fn new(scores: &Tensor, with_maximum: bool) -> Result<Self> {
        check_matrix("scores", "(queries, keys), at least one of each", scores)?;
        let scores = copied(scores)?;
        let wide = scores.to_dtype(DType::F64)?;
        let maximum = with_maximum.then(|| wide.max_keepdim(1)).transpose()?; // (queries, 1)
        let exponentials = match &maximum {
            Some(maximum) => wide.broadcast_sub(maximum)?.exp()?,
            None => wide.exp()?,
        };
        let sums = exponentials.sum_keepdim(1)?; // (queries, 1)
        let weights = exponentials.broadcast_div(&sums)?;
        let narrow = |xs: &Tensor| xs.to_dtype(DType::F32);
        let sums = narrow(&sums)?;
        let usable = |sum: &f32| sum.is_finite() && *sum > 0.0;
        match sums.flatten_all()?.to_vec1::<f32>()?.iter().position(|sum| !usable(sum)) {
            Some(position) => Err(Error::NotFinite { what: "scores", position }),
            None => Ok(Self {
                scores,
                maximum: maximum.as_ref().map(narrow).transpose()?,
                exponentials: narrow(&exponentials)?,
                sums,
                weights: narrow(&weights)?,
            }),
        }
    }
}
