//! What a checkpoint says about rotation beside `rope_theta`.

use super::MAX_SIZE;
use crate::error::{Error, Result};

/// How rotary frequencies are changed so that a model reads longer texts than it was first trained on.
///
/// Without it, pair `i` of a head is turned by `position · theta^(-2i / head_dim)`. All of it is computed
/// as `transformers` does, in `f32`.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// All frequencies divided by `factor`.
    Linear {
        /// At least 1.
        factor: f64,
    },
    /// A larger base for a longer text ("NTK-aware"): for one of `n` positions, more than
    /// `original_max_position_embeddings` = `m`, `theta` becomes
    /// `theta · (factor · n / m - (factor - 1))^(head_dim / (head_dim - 2))`.
    ///
    /// So the frequencies depend on how long the text is: a sequence is rotated by the highest position
    /// that it has in a pass, that of the whole prompt also where a pass runs in chunks. Keys that a cache
    /// holds keep the frequencies of the pass that computed them, as in `transformers`; so from `m` on,
    /// and with this kind of scaling only, decoding with a cache is *not* what computing the whole text
    /// again would give, and an earlier token changes where later ones are added. (`transformers` also
    /// keeps the frequencies of the longest text until one shorter than `m` comes; here each pass is by
    /// itself.)
    Dynamic {
        /// At least 1.
        factor: f64,
        /// `m`. [`Config::from_json`](super::Config::from_json) takes it from the file's
        /// `max_position_embeddings`, and multiplies that by `factor`.
        original_max_position_embeddings: usize,
    },
    /// Low frequencies divided by `factor`, high ones left, and those between interpolated (Llama 3.1).
    Llama3 {
        /// At least 1.
        factor: f64,
        /// Pairs that turn fewer times than this in the original length are low; above 0.
        low_freq_factor: f64,
        /// Pairs that turn more often than this are high; above `low_freq_factor`.
        high_freq_factor: f64,
        /// The length the model was first trained on; above 0.
        original_max_position_embeddings: usize,
    },
    /// The same by the index of the pair instead of its frequency, and larger scores (Peng et al. 2023).
    /// `rope_theta` must be above 1.
    Yarn {
        /// At least 1.
        factor: f64,
        /// The length the model was first trained on; above 0.
        original_max_position_embeddings: usize,
        /// Pairs that turn more often than this in the original length keep their frequency; above 0,
        /// usually 32.
        beta_fast: f64,
        /// Pairs that turn fewer times than this are divided by `factor`; above 0, usually 1.
        beta_slow: f64,
        /// Whether the two bounds are rounded to whole pairs; usually true.
        truncate: bool,
        /// Cosines and sines, so queries and keys both, are multiplied by it; above 0. Where a file does
        /// not say, it is `0.1 · ln(factor) + 1`.
        attention_factor: f64,
    },
    /// Each frequency divided by its own factor: what `rope_freqs.weight` of a GGUF file holds.
    Factors(
        /// `head_dim / 2` numbers above 0.
        Vec<f32>,
    ),
}

/// Queries are multiplied by `1 + beta · ln(1 + floor(position / original_max_position_embeddings))`,
/// after they are rotated. Positions are those of the sequence, whatever its window or cache.
#[derive(Clone, Debug, PartialEq)]
pub struct QueryScaling {
    /// `llama_4_scaling_beta`; 0 to 1000.
    pub beta: f64,
    /// Positions below it are left as they are; above 0.
    pub original_max_position_embeddings: usize,
}

impl RopeScaling {
    /// How many positions a model of `stated` ones reads: those of the scaled length, where they are
    /// more and the kind of scaling says what it starts from.
    pub(super) fn positions(&self, stated: usize) -> usize {
        match self {
            Self::Dynamic { factor, original_max_position_embeddings: original }
            | Self::Yarn { factor, original_max_position_embeddings: original, .. } => {
                stated.max(((*original as f64 * factor) as usize).min(MAX_SIZE))
            }
            _ => stated,
        }
    }

    /// Checks the ranges given at the fields.
    pub(super) fn validate(&self, head_dim: usize, rope_theta: f64) -> Result<()> {
        let (factor, original) = match self {
            Self::Linear { factor } => (*factor, 1),
            Self::Dynamic { factor, original_max_position_embeddings }
            | Self::Llama3 { factor, original_max_position_embeddings, .. }
            | Self::Yarn { factor, original_max_position_embeddings, .. } => {
                (*factor, *original_max_position_embeddings)
            }
            Self::Factors(factors) => return validate_factors(factors, head_dim),
        };
        check("rope_scaling.factor", factor, "1 to 1000000", (1.0..=1e6).contains(&factor))?;
        check_length("rope_scaling.original_max_position_embeddings", original)?;
        let positive = |field, value: f64| {
            check(field, value, "above 0, at most 1000000", value > 0.0 && value <= 1e6)
        };
        match self {
            Self::Dynamic { .. } if head_dim == 2 => {
                Err(Error::config("head_dim", "more than 2, for dynamic rope scaling", head_dim))
            }
            Self::Llama3 { low_freq_factor, high_freq_factor, .. } => {
                positive("rope_scaling.low_freq_factor", *low_freq_factor)?;
                positive("rope_scaling.high_freq_factor", *high_freq_factor)?;
                let expected = format!("more than low_freq_factor, {low_freq_factor}");
                let above = high_freq_factor > low_freq_factor;
                check("rope_scaling.high_freq_factor", *high_freq_factor, &expected, above)
            }
            Self::Yarn { beta_fast, beta_slow, attention_factor, .. } => {
                positive("rope_scaling.beta_fast", *beta_fast)?;
                positive("rope_scaling.beta_slow", *beta_slow)?;
                positive("rope_scaling.attention_factor", *attention_factor)?;
                check("rope_theta", rope_theta, "more than 1, for yarn", rope_theta > 1.0)
            }
            _ => Ok(()),
        }
    }
}

impl QueryScaling {
    /// Checks the ranges given at the fields.
    pub(super) fn validate(&self) -> Result<()> {
        let within = (0.0..=1000.0).contains(&self.beta);
        check("llama_4_scaling_beta", self.beta, "0 to 1000", within)?;
        check_length("original_max_position_embeddings", self.original_max_position_embeddings)
    }
}

fn validate_factors(factors: &[f32], head_dim: usize) -> Result<()> {
    let field = "rope_scaling.factors";
    if factors.len() != head_dim / 2 {
        let expected = format!("{} numbers, half the head", head_dim / 2);
        return Err(Error::config(field, expected, factors.len()));
    }
    match factors.iter().find(|factor| !(0.001..=1e6).contains(*factor)) {
        Some(factor) => Err(Error::config(field, "0.001 to 1000000", factor)),
        None => Ok(()),
    }
}

fn check(field: &str, value: f64, expected: &str, within: bool) -> Result<()> {
    if within { Ok(()) } else { Err(Error::config(field, expected, value)) }
}

fn check_length(field: &str, length: usize) -> Result<()> {
    if (1..=MAX_SIZE).contains(&length) {
        return Ok(());
    }
    Err(Error::config(field, format!("1 to {MAX_SIZE}"), length))
}

/// What YaRN multiplies scores by for a text `factor` times as long: the paper's proposal, with the weight
/// that some files give the logarithm.
pub(super) fn yarn_magnitude(factor: f64, weight: f64) -> f64 {
    if factor <= 1.0 { 1.0 } else { 0.1 * weight * factor.ln() + 1.0 }
}
