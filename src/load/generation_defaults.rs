//! `generation_config.json`: how the makers of a checkpoint sample from it.

use std::path::Path;

use crate::config::Fields;
use crate::error::{Error, Result};

/// What `generation_config.json` says; `None`, or no ids, for what it leaves out.
///
/// The values are as in the file: whoever samples with them checks their ranges. A `top_k` of -1, as other
/// programs spell "all", is 0 here. Token ids that are none (-1), and values of sampling that cannot be
/// read in a file that does not say `do_sample`, are passed over with a warning: nothing would use them.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct GenerationDefaults {
    /// The tokens that end a text; the file has one or a list.
    pub eos_token_ids: Vec<u32>,
    /// The token that begins a text.
    pub bos_token_id: Option<u32>,
    /// Whether to sample; greedy otherwise.
    pub do_sample: Option<bool>,
    /// Divides the logits.
    pub temperature: Option<f64>,
    /// Sample from this many tokens; 0 is all.
    pub top_k: Option<usize>,
    /// Sample from the likeliest tokens that make up this probability.
    pub top_p: Option<f64>,
    /// Sample from tokens at least this likely, relative to the likeliest.
    pub min_p: Option<f64>,
    /// Divides the positive logits of tokens seen before, multiplies the negative ones.
    pub repetition_penalty: Option<f64>,
}

impl GenerationDefaults {
    /// Reads `folder/generation_config.json`; without that file, everything is left out.
    pub(super) fn read(folder: &Path) -> Result<Self> {
        let path = folder.join("generation_config.json");
        if !path.is_file() {
            return Ok(Self::default());
        }
        let text = super::read_text(&path)?;
        Self::from_json(&text).map_err(|error| match error {
            Error::Malformed { message, .. } => Error::malformed(&path, message),
            Error::Config { field, expected, got } => {
                Error::malformed(&path, format!("{field}: expected {expected}, got {got}"))
            }
            other => other,
        })
    }

    fn from_json(text: &str) -> Result<Self> {
        let fields = Fields::parse(text, "generation_config.json")?;
        let do_sample = fields.flag("do_sample")?;
        // Not used where nothing is sampled: what is wrong with one is no reason not to load.
        let sampling = |value: Result<Option<f64>>| match value {
            Err(error) if do_sample != Some(true) => {
                tracing::warn!(%error, file = "generation_config.json", "not used");
                Ok(None)
            }
            value => value,
        };
        let top_k = sampling(fields.number("top_k").and_then(|top_k| match top_k {
            Some(-1.0) => Ok(Some(0.0)),
            Some(k) if !(0.0..=f64::from(u32::MAX)).contains(&k) || k.fract() != 0.0 => {
                Err(Error::config("top_k", "a non-negative integer", k))
            }
            top_k => Ok(top_k),
        }))?;
        Ok(Self {
            eos_token_ids: fields.tokens("eos_token_id")?,
            bos_token_id: fields.token("bos_token_id")?,
            do_sample,
            temperature: sampling(fields.number("temperature"))?,
            top_k: top_k.map(|top_k| top_k as usize),
            top_p: sampling(fields.number("top_p"))?,
            min_p: sampling(fields.number("min_p"))?,
            repetition_penalty: fields.number("repetition_penalty")?,
        })
    }
}
