//! Interpolation between the old thoughts and what the pass made of them.

use std::f64::consts::PI;

use candle_core::{D, DType, Device, Tensor};
use candle_nn::ops::sigmoid;
use serde::{Deserialize, Serialize};

use super::rows::{directions, wide};
use super::{OpConfig, Refine, Step, is_default};
use crate::error::{Error, Result};

/// Rows that are closer than this to opposite directions, in radians, have no unique great circle.
const NO_CIRCLE: f64 = 1e-3;

/// A step from the thoughts `z` towards what the pass, and the ops before this one, made of them:
/// `z' = z + w · (xs - z)`. All tensors are `(.., hidden)`.
///
/// Undamped (`w = 1`) repetition of the whole stack ruins a pretrained model; `w = 1 / passes` over a
/// few middle layers is the only training-free setting with gains on record. It is the [`Default`].
///
/// ```
/// use candle_core::{Device, Tensor};
/// use hybrid_attention::{Result, model::Batch};
/// use hybrid_attention::refine::{Anchor, Interpolate, Refine, Step, seq};
///
/// # fn main() -> Result<()> {
/// let z = Tensor::new(&[[[4f32, 0.0]]], &Device::Cpu)?;
/// let h = Tensor::new(&[[[0f32, 4.0]]], &Device::Cpu)?;
/// let batch = Batch::one(1)?;
/// let second = Step { index: 1, passes: 4, ..Step::new(&z, &h, &batch) };
/// let refined = |op: Interpolate| -> Result<_> {
///     Ok(op.refine(&h, &second)?.to_vec3::<f32>()?)
/// };
///
/// assert_eq!(refined(Interpolate::damped())?, [[[3.0, 1.0]]]);
/// assert_eq!(refined(Interpolate::schedule([1.0, 0.5]))?, [[[2.0, 2.0]]]);
/// // On the sphere the length stays 4: 2.83 = 4 / √2
/// let halfway = refined(Interpolate::new(0.5).slerp())?;
/// assert!(halfway[0][0].iter().all(|x| (x - 8f32.sqrt()).abs() < 1e-5));
/// // Of the new state whole, half is taken back to the first thoughts
/// assert_eq!(refined(Interpolate::new(1.0).anchor(Anchor::First, 0.5))?, [[[2.0, 2.0]]]);
///
/// let written = serde_json::json!([{"op": "interpolate", "weight": 0.1, "along": "sphere"}]);
/// assert_eq!(serde_json::json!(seq().add(Interpolate::new(0.1).slerp())), written);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Interpolate {
    #[serde(skip_serializing_if = "is_default")]
    weight: Weight,
    #[serde(skip_serializing_if = "is_default")]
    along: Along,
    #[serde(skip_serializing_if = "is_default")]
    anchor: Option<Anchored>,
    #[serde(skip_serializing_if = "is_default")]
    match_norm: bool,
}

/// What an anchor ties the thoughts to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Anchor {
    /// The first thoughts, before any pass: [`Step::first`].
    First,
    /// What the first pass made of them: [`Step::first_h`].
    FirstPass,
}

/// The share of the new state.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(untagged, expecting = "expected a number, a list of numbers, \"damped\" or \"gate\"")]
enum Weight {
    Same(f64),
    Each(Vec<f64>),
    Named(Named),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Named {
    Damped,
    Gate,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Along {
    #[default]
    Line,
    Sphere,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Anchored {
    to: Anchor,
    share: f64,
}

impl Interpolate {
    /// A fixed share `weight` of the new state, in `[0, 1]`. 0 leaves the thoughts exactly as they were,
    /// 1 takes the new state entirely.
    #[must_use]
    pub fn new(weight: f64) -> Self {
        Self { weight: Weight::Same(weight), ..Self::default() }
    }

    /// `w = 1 / passes`, so that all passes together go about as far as one undamped one.
    #[must_use]
    pub fn damped() -> Self {
        Self::default()
    }

    /// One share per pass, each in `[0, 1]`; the last is used for all later passes. At least one.
    #[must_use]
    pub fn schedule(weights: impl IntoIterator<Item = f64>) -> Self {
        Self { weight: Weight::Each(weights.into_iter().collect()), ..Self::default() }
    }

    /// A share of its own for every channel, as the checkpoint was trained with: the sigmoid of
    /// [`Step::gate`]. A checkpoint without a gate is an error in the first pass.
    #[must_use]
    pub fn gated() -> Self {
        Self { weight: Weight::Named(Named::Gate), ..Self::default() }
    }

    /// Moves along the great circle between the directions of the two rows, with the length changing
    /// evenly from one to the other (Shoemake 1985), so that rows which point apart do not shrink on the
    /// way. Default: along the straight line between them, which is also used where there is no unique
    /// circle: for rows of zeros, and rows that point in opposite directions to within a milliradian.
    /// Not for [`Interpolate::gated`].
    #[must_use]
    pub fn slerp(mut self) -> Self {
        self.along = Along::Sphere;
        self
    }

    /// Pulls the result back by this share, in `[0, 1]`, towards where the thoughts began:
    /// `β · g(first) + (1 - β) · z'`, the iteration of Halpern (1967), which does not drift away over
    /// many passes. Default 0: no anchor. 1 discards what the pass did.
    #[must_use]
    pub fn anchor(mut self, to: Anchor, share: f64) -> Self {
        self.anchor = (share != 0.0).then_some(Anchored { to, share });
        self
    }

    /// Gives every row of the result, anchor included, the length that its thought had before the pass.
    /// Rows of zeros stay zero. Default: lengths are not restored. By itself this does not make an
    /// undamped loop stable.
    #[must_use]
    pub fn match_norm(mut self) -> Self {
        self.match_norm = true;
        self
    }

    fn interpolated(&self, z: &Tensor, xs: &Tensor, step: &Step<'_>) -> Result<Tensor> {
        let share = match &self.weight {
            Weight::Same(share) => *share,
            Weight::Each(shares) => {
                let share = shares.get(step.index).or(shares.last());
                share.copied().ok_or_else(no_weights)?
            }
            Weight::Named(Named::Damped) => 1.0 / step.passes.max(1) as f64,
            Weight::Named(Named::Gate) => {
                let Some(gate) = step.gate else {
                    let expected = "a number: the checkpoint has no thought.gate";
                    return Err(Error::parameter("weight", expected, "gate"));
                };
                let share = sigmoid(&gate.to_dtype(z.dtype())?)?; // (hidden)
                return Ok((z + (xs - z)?.broadcast_mul(&share)?)?);
            }
        };
        match self.along {
            Along::Line => lerp(z, xs, share),
            Along::Sphere => slerp(z, xs, share),
        }
    }
}

impl Refine for Interpolate {
    fn refine(&self, xs: &Tensor, step: &Step<'_>) -> Result<Tensor> {
        self.validate()?;
        if xs.elem_count() == 0 {
            return Ok(xs.clone());
        }
        let z = wide(step.z)?;
        let mut next = self.interpolated(&z, &wide(xs)?, step)?;
        if let Some(Anchored { to, share }) = self.anchor {
            let anchor = match to {
                Anchor::First => step.first,
                Anchor::FirstPass => step.first_h,
            };
            next = lerp(&next, &wide(anchor)?, share)?;
        }
        if self.match_norm {
            let ((_, before), (direction, _)) = (directions(&z)?, directions(&next)?);
            next = direction.broadcast_mul(&before)?;
        }
        Ok(next.to_dtype(step.z.dtype())?)
    }

    fn validate(&self) -> Result<()> {
        match &self.weight {
            Weight::Same(weight) => check_share("weight", *weight),
            Weight::Each(weights) if weights.is_empty() => Err(no_weights()),
            Weight::Each(weights) => weights.iter().try_for_each(|it| check_share("weight", *it)),
            Weight::Named(Named::Gate) if self.along == Along::Sphere => {
                let expected = "line, where a gate weighs channel by channel";
                Err(Error::parameter("along", expected, "sphere"))
            }
            Weight::Named(_) => Ok(()),
        }?;
        self.anchor.map_or(Ok(()), |anchor| check_share("anchor", anchor.share))
    }

    fn to_config(&self) -> Option<OpConfig> {
        Some(OpConfig::Interpolate(self.clone()))
    }
}

impl Default for Weight {
    fn default() -> Self {
        Self::Named(Named::Damped)
    }
}

pub(super) fn check_share(name: &'static str, share: f64) -> Result<()> {
    match (0.0..=1.0).contains(&share) {
        true => Ok(()),
        false => Err(Error::parameter(name, "a share in [0, 1]", share)),
    }
}

fn no_weights() -> Error {
    Error::parameter("weight", "at least one share in [0, 1]", "[]")
}

/// From `from` towards `to`. Both ends are exact, whatever the other one holds.
pub(super) fn lerp(from: &Tensor, to: &Tensor, share: f64) -> Result<Tensor> {
    if share == 0.0 {
        return Ok(from.clone());
    }
    if share == 1.0 {
        return Ok(to.clone());
    }
    Ok((from + ((to - from)? * share)?)?)
}

/// [`lerp`] along great circles, row by row: with `u` and `v` the directions and `ω` the angle
/// between them, `length · (sin((1-w)ω) · u + sin(wω) · v) / sin ω`.
fn slerp(from: &Tensor, to: &Tensor, share: f64) -> Result<Tensor> {
    if share == 0.0 || share == 1.0 {
        return lerp(from, to, share);
    }
    let ((u, before), (v, after)) = (directions(from)?, directions(to)?);
    let opposite = (&u + &v)?.sqr()?.sum_keepdim(D::Minus1)?.le(NO_CIRCLE * NO_CIRCLE)?;
    let circle = ((before.gt(0.0)? * after.gt(0.0)?)? * opposite.eq(0u8)?)?;
    let angle = angle(&u, &v)?; // (.., 1), as all of these
    let length = (lerp(&before, &after, share)? / angle.sin()?)?;
    let weight = |share: f64, own: &Tensor| -> Result<Tensor> {
        let on_circle = (&length * (&angle * share)?.sin()?)?;
        Ok(circle.where_cond(&on_circle, &(own * share)?)?)
    };
    let part = u.broadcast_mul(&weight(1.0 - share, &before)?)?;
    Ok((part + v.broadcast_mul(&weight(share, &after)?)?)?)
}

/// The angles between two rows of unit length, kept far enough from 0 and π to divide by their sines. At
/// 0 that changes no digit of the result in `f32`.
fn angle(u: &Tensor, v: &Tensor) -> Result<Tensor> {
    let lengths = |rows: Tensor| -> Result<Vec<f64>> {
        let lengths = rows.sqr()?.sum(D::Minus1)?.sqrt()?.flatten_all()?;
        Ok(lengths.to_device(&Device::Cpu)?.to_dtype(DType::F64)?.to_vec1()?)
    };
    // Kahan's form: unlike the arc cosine it loses no digits at small angles. On the host, since candle
    // has no arc functions.
    let (apart, together) = (lengths((u - v)?)?, lengths((u + v)?)?);
    let angle = |(apart, together): (&f64, &f64)| {
        (2.0 * apart.atan2(*together)).clamp(NO_CIRCLE, PI - NO_CIRCLE)
    };
    let angles: Vec<f64> = apart.iter().zip(&together).map(angle).collect();
    let cosine = (u * v)?.sum_keepdim(D::Minus1)?;
    let angle = Tensor::from_vec(angles, cosine.shape(), &Device::Cpu)?;
    let angle = angle.to_dtype(u.dtype())?.to_device(u.device())?;
    // Adds only the gradient of the arc cosine.
    let gradient = ((cosine.detach() - cosine)? / angle.sin()?)?;
    Ok((angle + gradient)?)
}
