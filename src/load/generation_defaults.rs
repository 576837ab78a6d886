//! `generation_config.json`: how the makers of a checkpoint sample from it.

use std::path::Path;

use crate::config::Fields;
use crate::error::{Error, Result};

/// What `generation_config.json` says; `None`, or no ids, for what it leaves out.
///
/// The values are as in the file: the sampler that uses them checks their ranges.
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
    /// Sample from this many tokens.
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
        let text = std::fs::read_to_string(&path).map_err(Error::io(&path))?;
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
        Ok(Self {
            eos_token_ids: fields.tokens("eos_token_id")?,
            bos_token_id: fields.token("bos_token_id")?,
            do_sample: fields.flag("do_sample")?,
            temperature: fields.number("temperature")?,
            top_k: fields.size("top_k")?,
            top_p: fields.number("top_p")?,
            min_p: fields.number("min_p")?,
            repetition_penalty: fields.number("repetition_penalty")?,
        })
    }
}
