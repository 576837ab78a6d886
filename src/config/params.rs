//! `params.json`, as Mistral publishes it beside `consolidated.safetensors`.

use super::fields::{Fields, brief};
use super::{Config, Experts, head_dim, validate_as};
use crate::error::{Error, Result};

impl Config {
    /// Reads the text of a `params.json`, the file beside `consolidated.safetensors`.
    ///
    /// `dim`, `n_layers`, `hidden_dim`, `n_heads`, `norm_eps` and `vocab_size` must be given. Absent,
    /// `n_kv_heads` is `n_heads`, `head_dim` is `dim / n_heads`, there is no `sliding_window`, and
    /// `rope_theta` is 10000 with such a window (v0.1) and 1000000 without (v0.2 and later), as in
    /// `mistral-inference`. `max_position_embeddings` or `max_seq_len` is 32768, embeddings are
    /// untied; text begins with token 1 and ends with 2. `moe` holds `num_experts` and
    /// `num_experts_per_tok`.
    ///
    /// # Errors
    /// As for [`Config::from_json`], with the names of this file.
    pub fn from_params_json(text: &str) -> Result<Self> {
        let fields = Fields::parse(text, "params.json")?;
        for field in ["num_experts", "yarn", "quantization", "vision_encoder", "lora"] {
            if let Some(value) = fields.get(field) {
                return Err(Error::unsupported(field, brief(value)));
            }
        }
        let hidden_size = fields.required_size("dim")?;
        let num_attention_heads = fields.required_size("n_heads")?;
        let head_dim = match fields.size("head_dim")? {
            Some(size) => size,
            None => head_dim(("dim", hidden_size), ("n_heads", num_attention_heads))?,
        };
        let positions = match fields.size("max_position_embeddings")? {
            Some(positions) => Some(positions),
            None => fields.size("max_seq_len")?,
        };
        let sliding_window = fields.size("sliding_window")?;
        let theta = if sliding_window.is_some() { 10_000.0 } else { 1_000_000.0 };
        let tied = match fields.flag("tied_embeddings")? {
            Some(tied) => Some(tied),
            None => fields.flag("tie_word_embeddings")?,
        };
        let config = Self {
            vocab_size: fields.required_size("vocab_size")?,
            hidden_size,
            intermediate_size: fields.required_size("hidden_dim")?,
            num_hidden_layers: fields.required_size("n_layers")?,
            num_attention_heads,
            num_key_value_heads: fields.size("n_kv_heads")?.unwrap_or(num_attention_heads),
            head_dim,
            rms_norm_eps: fields
                .number("norm_eps")?
                .ok_or_else(|| Error::config("norm_eps", "a number", "nothing"))?,
            rope_theta: fields.number("rope_theta")?.unwrap_or(theta),
            sliding_window,
            max_position_embeddings: positions.unwrap_or(32_768),
            tie_word_embeddings: tied.unwrap_or(false),
            rope_scaling: None,
            query_scaling: None,
            experts: experts(&fields)?,
            attention_bias: false,
            bos_token_id: Some(1),
            eos_token_ids: vec![2],
        };
        validate_as(
            config,
            &[
                ("hidden_size", "dim"),
                ("intermediate_size", "hidden_dim"),
                ("num_hidden_layers", "n_layers"),
                ("num_attention_heads", "n_heads"),
                ("num_key_value_heads", "n_kv_heads"),
                ("rms_norm_eps", "norm_eps"),
                ("num_local_experts", "moe.num_experts"),
                ("num_experts_per_tok", "moe.num_experts_per_tok"),
            ],
        )
    }
}

fn experts(fields: &Fields) -> Result<Option<Experts>> {
    const READ: [&str; 2] = ["num_experts", "num_experts_per_tok"];
    let Some(moe) = fields.object("moe")? else { return Ok(None) };
    // Shared experts, other scores, layers without experts: each would be another computation.
    if let Some((field, value)) =
        moe.iter().find(|(field, value)| !READ.contains(field) && !value.is_null())
    {
        return Err(Error::unsupported(format!("moe.{field}"), brief(value)));
    }
    let required = |field: &str| {
        let name = || format!("moe.{field}");
        moe.size(field)?.ok_or_else(|| Error::config(name(), "a non-negative integer", "nothing"))
    };
    let [num_local_experts, num_experts_per_tok] = READ.map(required);
    Ok(Some(Experts {
        num_local_experts: num_local_experts?,
        num_experts_per_tok: num_experts_per_tok?,
    }))
}
