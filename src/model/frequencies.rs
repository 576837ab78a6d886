//! How fast each pair of a head turns.

use std::borrow::Cow;
use std::f64::consts::TAU;

use crate::config::{Config, RopeScaling};

/// The frequencies of rotation: `theta^(-2i / head_dim)` for `i` in `0..head_dim / 2`, unless they are
/// scaled.
///
/// They are computed in f32 and in the order in which transformers does it: distant positions then round
/// the same way.
#[derive(Debug)]
pub(super) struct Frequencies {
    /// Of a text of the original length.
    original: Vec<f32>,
    /// Cosines and sines are multiplied by it.
    magnitude: f32,
    growing: Option<Growing>,
}

/// Frequencies of longer texts, where they depend on the length.
#[derive(Debug)]
struct Growing {
    theta: f32,
    factor: f64,
    head_dim: usize,
    original_length: usize,
}

impl Frequencies {
    pub(super) fn new(config: &Config) -> Self {
        let (theta, head_dim) = (config.rope_theta, config.head_dim);
        let mut original: Vec<f32> = powers(theta, head_dim).map(|power| 1.0 / power).collect();
        let (mut magnitude, mut growing) = (1.0, None);
        match config.rope_scaling.as_ref() {
            None => {}
            Some(RopeScaling::Linear { factor }) => {
                original.iter_mut().for_each(|freq| *freq /= *factor as f32);
            }
            Some(&RopeScaling::Dynamic { factor, original_max_position_embeddings }) => {
                let original_length = original_max_position_embeddings;
                growing = Some(Growing { theta: theta as f32, factor, head_dim, original_length });
            }
            Some(&RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_max_position_embeddings,
            }) => {
                let factors = (low_freq_factor as f32, high_freq_factor as f32);
                let length = original_max_position_embeddings as f32;
                for freq in &mut original {
                    *freq = llama3(*freq, factor as f32, factors, length);
                }
            }
            Some(&RopeScaling::Yarn {
                factor,
                original_max_position_embeddings,
                beta_fast,
                beta_slow,
                truncate,
                attention_factor,
            }) => {
                let pair_that_turns = |times: f64| {
                    let length = original_max_position_embeddings as f64;
                    head_dim as f64 * (length / (times * TAU)).ln() / (2.0 * theta.ln())
                };
                let (mut low, mut high) = (pair_that_turns(beta_fast), pair_that_turns(beta_slow));
                if truncate {
                    (low, high) = (low.floor(), high.ceil());
                }
                let ramp = (low.max(0.0), high.min(head_dim as f64 - 1.0));
                original = yarn(powers(theta, head_dim), factor as f32, ramp).collect();
                magnitude = attention_factor as f32;
            }
            Some(RopeScaling::Factors(factors)) => {
                original.iter_mut().zip(factors).for_each(|(freq, factor)| *freq /= factor);
            }
        }
        Self { original, magnitude, growing }
    }

    /// How many there are: half the head.
    pub(super) fn len(&self) -> usize {
        self.original.len()
    }

    /// What cosines and sines are multiplied by.
    pub(super) fn magnitude(&self) -> f32 {
        self.magnitude
    }

    /// Whether they are others than the original ones for a text of so many positions.
    pub(super) fn grow_at(&self, length: usize) -> bool {
        self.growing.as_ref().is_some_and(|growing| length > growing.original_length)
    }

    /// Those of a text of so many positions.
    pub(super) fn at(&self, length: usize) -> Cow<'_, [f32]> {
        match &self.growing {
            Some(growing) if length > growing.original_length => growing.at(length).into(),
            _ => Cow::Borrowed(&self.original),
        }
    }
}

impl Growing {
    fn at(&self, length: usize) -> Vec<f32> {
        let &Self { theta, factor, head_dim, original_length } = self;
        let dim = head_dim as f64;
        let times = factor as f32 * length as f32 / original_length as f32 - (factor - 1.0) as f32;
        let theta = theta * times.powf((dim / (dim - 2.0)) as f32);
        powers(f64::from(theta), head_dim).map(|power| 1.0 / power).collect()
    }
}

/// `theta^(2i / head_dim)`
fn powers(theta: f64, head_dim: usize) -> impl Iterator<Item = f32> {
    let dim = head_dim as f32;
    (0..head_dim / 2).map(move |i| theta.powf(f64::from((2 * i) as f32 / dim)) as f32)
}

/// A wave longer than `length / low` is slowed down by `factor`, one shorter than `length / high` is left,
/// and one between them is slowed down in part.
fn llama3(freq: f32, factor: f32, (low, high): (f32, f32), length: f32) -> f32 {
    let wave = TAU as f32 / freq;
    if wave > length / low {
        return freq / factor;
    }
    if wave < length / high {
        return freq;
    }
    let kept = (length / wave - low) / (high - low);
    (1.0 - kept) * freq / factor + kept * freq
}

/// Pairs below the first index of `ramp` keep their frequency, those above the second are slowed down by
/// `factor`, and those between them in part.
fn yarn(
    powers: impl Iterator<Item = f32>,
    factor: f32,
    (low, high): (f64, f64),
) -> impl Iterator<Item = f32> {
    let high = if high == low { high + 0.001 } else { high }; // as transformers avoids dividing by 0
    let (start, width) = (low as f32, (high - low) as f32);
    powers.enumerate().map(move |(pair, power)| {
        let kept = 1.0 - ((pair as f32 - start) / width).clamp(0.0, 1.0);
        1.0 / (factor * power) * (1.0 - kept) + 1.0 / power * kept
    })
}
