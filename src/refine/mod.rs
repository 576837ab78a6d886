//! Refinement: what becomes of the thoughts after each pass.
//!
//! A thought pass reads the thoughts `z` in both directions and gives `h`; a sequence of ops, each a
//! [`Refine`], makes the next `z` from the two. `z` is the residual stream that enters the first layer
//! of the span.
//!
//! ```
//! use hybrid_attention::Thinking;
//! use hybrid_attention::refine::{CosineReweight, Interpolate, seq};
//!
//! let refine = seq()
//!     .add(CosineReweight::mix(0.1).temperature(0.1)) // h, each row moved towards those like it
//!     .add(Interpolate::damped())                     // then a step from z towards that
//!     .add_fn(|xs, _step| Ok(xs.clamp(-1e4, 1e4)?));  // and whatever else you like
//! let thinking = Thinking::new(3).span(14..18).refine(refine);
//! # let _ = thinking;
//! ```

mod codes;
mod cosine;
mod digits;
mod interpolate;
mod noise;
mod nudge;
mod objective;
mod optimizer;
mod output;
mod remove;
mod rows;
mod search;
mod seq;
mod substitute;
mod trust;

use std::fmt::Debug;

use candle_core::Tensor;

use crate::batch::Batch;
use crate::error::{Error, Result};

pub use self::codes::{Codes, Near};
pub use self::cosine::{Among, CosineReweight, Focus};
pub use self::digits::{DigitDistance, Digits};
pub use self::interpolate::{Anchor, Interpolate};
pub use self::noise::Noise;
pub(crate) use self::noise::gaussian;
pub use self::nudge::GradientNudge;
pub use self::objective::Objective;
pub use self::optimizer::Optimizer;
pub use self::output::OutputNudge;
pub use self::remove::Remove;
pub(crate) use self::rows::{Thinks, cosines};
pub use self::search::ForwardNudge;
pub use self::seq::{OpConfig, Seq, seq};
pub use self::substitute::Substitute;

/// What a refinement is told about the pass that it refines.
///
/// All tensors of thoughts have the same shape, `(tokens, hidden)`, or other leading dimensions with as
/// many rows: the tokens of all sequences one after the other. Only the rows that [`Step::batch`] says
/// are context may change: whatever an op makes of plain rows is undone.
#[derive(Clone, Copy, Debug)]
pub struct Step<'a> {
    /// The thoughts that went into the pass.
    pub z: &'a Tensor,
    /// The first thoughts, before any pass.
    pub first: &'a Tensor,
    /// What came out of the pass, before any op. Plain rows after all context may have been left out of
    /// the pass: for those it is `z`.
    pub h: &'a Tensor,
    /// What came out of the first pass; in the first pass, `h` itself.
    pub first_h: &'a Tensor,
    /// The embeddings of the tokens. Equal to `first` for a span that begins at layer 0.
    pub embeddings: &'a Tensor,
    /// Which rows belong to which sequence, and which of them think together.
    pub batch: &'a Batch,
    /// Which pass this is, from 0.
    pub index: usize,
    /// How many passes there will be at most; at least 1.
    pub passes: usize,
    /// Which of several candidates these thoughts are, from 0: [`Noise`] differs from one to the other.
    pub candidate: u64,
    /// The checkpoint's own interpolation gate, `(hidden)`, if it has one: its sigmoid is the share
    /// of the new state.
    pub gate: Option<&'a Tensor>,
    /// How the decoder would read some thoughts; `None` without a model behind the step.
    pub readout: Option<&'a dyn Readout>,
}

impl<'a> Step<'a> {
    /// The first and only pass over `z`, with no model behind it. Change what differs:
    /// `Step { index: 1, passes: 3, ..Step::new(&z, &h, &batch) }`.
    #[must_use]
    pub fn new(z: &'a Tensor, h: &'a Tensor, batch: &'a Batch) -> Self {
        Self {
            z,
            first: z,
            h,
            first_h: h,
            embeddings: z,
            batch,
            index: 0,
            passes: 1,
            candidate: 0,
            gate: None,
            readout: None,
        }
    }
}

/// What a refinement may ask of the model: how its decoder would read some thoughts, and what its tokens are.
///
/// The layers from the span on read them causally, whatever the hand-off. Thoughts `z` are
/// `(tokens, hidden)`, or of another leading shape, as in the [`Step`].
pub trait Readout: Debug {
    /// The scores of every vocabulary entry as the next token: `(.., vocab)`.
    /// Differentiable when `z` is tracked.
    ///
    /// # Errors
    /// When the computation fails; [`Error::Unsupported`] for a tracked
    /// `z` over weights that carry no gradient.
    fn logits(&self, z: &Tensor) -> Result<Tensor>;

    /// How badly the next tokens of each sequence are predicted: `(sequences)` in `f32`, the mean
    /// negative log-likelihood in nats, 0 for a sequence of one token. Carries no gradient.
    ///
    /// # Errors
    /// When the computation fails.
    fn loss(&self, z: &Tensor) -> Result<Tensor>;

    /// [`Readout::loss`], and its gradient with respect to `z`, in the shape of `z`. Needs the
    /// memory of one layer's graph, not of all.
    ///
    /// # Errors
    /// When the computation fails; [`Error::Unsupported`] over weights
    /// that carry no gradient.
    fn loss_and_gradient(&self, z: &Tensor) -> Result<(Tensor, Tensor)>;

    /// The embedding table, to find the nearest row of.
    ///
    /// # Errors
    /// When the computation fails; by default [`Error::Unsupported`]: there is no table.
    fn codes(&self) -> Result<&Codes> {
        Err(Error::unsupported("readout", "one without an embedding table"))
    }
}

/// One op of a refinement: turns what came out of a thought pass, or of the op before, into what
/// goes to the next op, or the next pass.
///
/// ```
/// use candle_core::Tensor;
/// use hybrid_attention::{Result, model::Batch, refine::{Refine, Step}};
///
/// /// Moves less with every pass: `z + (xs - z) / (index + 2)`.
/// #[derive(Debug)]
/// struct Settle;
///
/// impl Refine for Settle {
///     fn refine(&self, xs: &Tensor, step: &Step<'_>) -> Result<Tensor> {
///         let share = 1.0 / (step.index + 2) as f64;
///         Ok((step.z + ((xs - step.z)? * share)?)?)
///     }
/// }
/// # use candle_core::Device;
/// # fn main() -> Result<()> {
/// let (z, h) = (Tensor::new(&[[[0f32]]], &Device::Cpu)?, Tensor::new(&[[[6f32]]], &Device::Cpu)?);
/// let batch = Batch::one(1)?;
/// let step = Step { index: 1, passes: 3, ..Step::new(&z, &h, &batch) };
/// assert_eq!(Settle.refine(&h, &step)?.to_vec3::<f32>()?, [[[2.0]]]);
/// # Ok(())
/// # }
/// ```
pub trait Refine: Debug + Send + Sync {
    /// The name that errors give it. Default: the name of its type.
    fn name(&self) -> String {
        let path = std::any::type_name::<Self>();
        path.rsplit("::").next().unwrap_or(path).to_string()
    }

    /// The next thoughts from `xs`, which is the output of the previous op, or [`Step::h`] for the first
    /// op, with [`Step::z`] in the rows that do not think. Both are `(.., hidden)`.
    ///
    /// # Errors
    /// When the computation fails; the thought loop ends with that error.
    fn refine(&self, xs: &Tensor, step: &Step<'_>) -> Result<Tensor>;

    /// Checks the parameters before any pass is run.
    ///
    /// # Errors
    /// [`Error::Parameter`] for one outside its range.
    fn validate(&self) -> Result<()> {
        Ok(())
    }

    /// How `hybrid.json` spells it; `None` (the default) for an op that only code can make.
    fn to_config(&self) -> Option<OpConfig> {
        None
    }
}

/// Whether a setting can be left out when writing.
fn is_default<T: Default + PartialEq>(setting: &T) -> bool {
    *setting == T::default()
}
