//! Ops one after the other.

use std::fmt;
use std::sync::Arc;

use candle_core::Tensor;
use serde::{Deserialize, Deserializer, Serialize, Serializer, ser};

use super::rows::Thinks;
use super::{
    CosineReweight, ForwardNudge, GradientNudge, Interpolate, Noise, Refine, Remove, Step,
    Substitute,
};
use crate::error::{Error, Result};

/// An empty sequence of ops, to add to: `seq().add(..).add(..).add_fn(..)`.
#[must_use]
pub fn seq() -> Seq {
    Seq::default()
}

/// Ops that run one after the other, each on the output of the one before.
///
/// After each op the result must have the shape, the type and the device of the thoughts, and rows that
/// do not think are reset to what they were. Without any op the thoughts become the output of the pass.
/// Serialised as a list of [`OpConfig`]s.
#[derive(Clone, Debug, Default)]
pub struct Seq {
    ops: Vec<Arc<dyn Refine>>,
}

/// An op as `hybrid.json` spells it: `{"op": "interpolate", "weight": 0.1}`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "op", rename_all = "snake_case")]
#[non_exhaustive]
pub enum OpConfig {
    /// [`CosineReweight`].
    CosineReweight(CosineReweight),
    /// [`Interpolate`].
    Interpolate(Interpolate),
    /// [`GradientNudge`].
    GradientNudge(GradientNudge),
    /// [`ForwardNudge`].
    ForwardNudge(ForwardNudge),
    /// [`Noise`].
    Noise(Noise),
    /// [`Remove`].
    Remove(Remove),
    /// [`Substitute`].
    Substitute(Substitute),
}

impl OpConfig {
    fn build(self) -> Arc<dyn Refine> {
        match self {
            Self::CosineReweight(op) => Arc::new(op),
            Self::Interpolate(op) => Arc::new(op),
            Self::GradientNudge(op) => Arc::new(op),
            Self::ForwardNudge(op) => Arc::new(op),
            Self::Noise(op) => Arc::new(op),
            Self::Remove(op) => Arc::new(op),
            Self::Substitute(op) => Arc::new(op),
        }
    }

    /// What it costs in readings of the text, at least one.
    fn reads(&self) -> usize {
        match self {
            Self::CosineReweight(_)
            | Self::Interpolate(_)
            | Self::Noise(_)
            | Self::Remove(_)
            | Self::Substitute(_) => 1,
            Self::GradientNudge(op) => op.reads(),
            Self::ForwardNudge(op) => op.reads(),
        }
    }
}

impl Seq {
    /// With `op` at the end.
    #[must_use]
    #[allow(clippy::should_implement_trait, reason = "adds to a sequence, not a sum")]
    pub fn add(mut self, op: impl Refine + 'static) -> Self {
        self.ops.push(Arc::new(op));
        self
    }

    /// With a function at the end, of the previous op's output and the step.
    #[must_use]
    pub fn add_fn<F>(self, function: F) -> Self
    where
        F: Fn(&Tensor, &Step<'_>) -> Result<Tensor> + Send + Sync + 'static,
    {
        self.add(Function(function))
    }

    /// Ops in it.
    #[must_use]
    pub fn len(&self) -> usize {
        self.ops.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.ops.is_empty()
    }

    /// The next thoughts: all ops over [`Step::h`].
    ///
    /// # Errors
    /// [`Error::Refinement`] that names the op: the error it returned, or what is wrong with its result;
    /// [`Error::Parameter`] for a step whose tensors do not fit each other or its batch.
    pub fn refine(&self, step: &Step<'_>) -> Result<Tensor> {
        step.batch.check(step.z)?;
        check_alike(step.h, step.z)?;
        let thinks = Thinks(step.batch);
        let first = thinks.or(step.h, step.z)?;
        self.ops.iter().enumerate().try_fold(first, |xs, (index, op)| {
            let refined = op.refine(&xs, step).and_then(|refined| {
                check_alike(&refined, step.z)?;
                thinks.or(&refined, step.z)
            });
            refined.map_err(|source| named(index, op.as_ref(), source))
        })
    }

    /// What the ops of a pass cost together, in readings of the text. One that only code can make counts
    /// as one.
    pub(crate) fn reads(&self) -> usize {
        let reads = |op: &Arc<dyn Refine>| op.to_config().map_or(1, |config| config.reads());
        self.ops.iter().map(reads).fold(0, usize::saturating_add)
    }

    /// Whether an op may do something else for each of several candidates.
    pub(crate) fn may_differ(&self) -> bool {
        let differs =
            |op: &Arc<dyn Refine>| matches!(op.to_config(), None | Some(OpConfig::Noise(_)));
        self.ops.iter().any(differs)
    }

    /// Checks the parameters of every op.
    ///
    /// # Errors
    /// [`Error::Refinement`] that names the op.
    pub fn validate(&self) -> Result<()> {
        let check = |(index, op): (usize, &Arc<dyn Refine>)| {
            op.validate().map_err(|source| named(index, op.as_ref(), source))
        };
        self.ops.iter().enumerate().try_for_each(check)
    }
}

/// Equal if they do the same: ops that can be written to a file are equal if they would be written the
/// same, and others only if they are the same value.
impl PartialEq for Seq {
    fn eq(&self, other: &Self) -> bool {
        let same =
            |(a, b): (&Arc<dyn Refine>, &Arc<dyn Refine>)| match (a.to_config(), b.to_config()) {
                (Some(a), Some(b)) => a == b,
                (None, None) => Arc::ptr_eq(a, b),
                _ => false,
            };
        self.ops.len() == other.ops.len() && self.ops.iter().zip(&other.ops).all(same)
    }
}

/// A single op is a sequence of one.
impl<R: Refine + 'static> From<R> for Seq {
    fn from(op: R) -> Self {
        seq().add(op)
    }
}

impl Serialize for Seq {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let config = |op: &Arc<dyn Refine>| {
            let message = || format!("{} cannot be written: only code can make it", op.name());
            op.to_config().ok_or_else(|| ser::Error::custom(message()))
        };
        let ops = self.ops.iter().map(config).collect::<Result<Vec<_>, _>>()?;
        ops.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Seq {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let ops = Vec::<OpConfig>::deserialize(deserializer)?;
        Ok(Self { ops: ops.into_iter().map(OpConfig::build).collect() })
    }
}

fn named(index: usize, op: &dyn Refine, source: Error) -> Error {
    Error::Refinement { op: op.name(), index, source: Box::new(source) }
}

/// Refuses a result that the next pass could not take.
fn check_alike(refined: &Tensor, z: &Tensor) -> Result<()> {
    let describe = |xs: &Tensor| {
        format!("{:?} of {:?} on {:?}", xs.dims(), xs.dtype(), xs.device().location())
    };
    if describe(refined) == describe(z) {
        return Ok(());
    }
    Err(Error::parameter("thoughts", describe(z), describe(refined)))
}

/// An op made from a function.
struct Function<F>(F);

impl<F> fmt::Debug for Function<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Function")
    }
}

impl<F> Refine for Function<F>
where
    F: Fn(&Tensor, &Step<'_>) -> Result<Tensor> + Send + Sync,
{
    fn name(&self) -> String {
        "function".to_string()
    }

    fn refine(&self, xs: &Tensor, step: &Step<'_>) -> Result<Tensor> {
        self.0(xs, step)
    }
}
