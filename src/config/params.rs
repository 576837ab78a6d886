//! `params.json`, as Mistral publishes it beside `consolidated.safetensors`.

use super::fields::{Fields, brief};
use super::quantization::Fp8;
use super::rope::{QueryScaling, RopeScaling, yarn_magnitude};
use super::{Config, Experts, head_dim, validate_as};
use crate::error::{Error, Result};

impl Config {
    /// Reads the text of a `params.json`, the file beside `consolidated.safetensors`.
    ///
    /// `dim`, `n_layers`, `hidden_dim`, `n_heads`, `norm_eps` and `vocab_size` must be given. Absent,
    /// `n_kv_heads` is `n_heads`, `head_dim` is `dim / n_heads`, there is no `sliding_window`, and
    /// `rope_theta` is 10000 with such a window (v0.1) and 1000000 without (v0.2 and later), as in
    /// `mistral-inference`. `max_position_embeddings` or `max_seq_len` is 32768, embeddings are
    /// untied; text begins with token 1 and ends with 2. `yarn` and `llama_4_scaling` change rotation and
    /// queries, `quantization` may say that weights are FP8 (`qformat_weight` `fp8_e4m3`), and
    /// `vision_encoder` or `multimodal` is left out with a warning.
    ///
    /// # Errors
    /// As for [`Config::from_json`], with the names of this file.
    pub fn from_params_json(text: &str) -> Result<Self> {
        let fields = Fields::parse(text, "params.json")?;
        for field in ["num_experts", "lora"] {
            if let Some(value) = fields.get(field) {
                return Err(Error::unsupported(field, brief(value)));
            }
        }
        for field in ["vision_encoder", "multimodal"] {
            if fields.get(field).is_some() {
                tracing::warn!(field, "only the text part of this model is read");
            }
        }
        // Weights in FP8 are widened as they are loaded; anything else is refused here.
        Fp8::read_params(&fields)?;
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
        let positions = positions.unwrap_or(32_768);
        let rope_scaling = yarn(&fields)?;
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
            max_position_embeddings: rope_scaling
                .as_ref()
                .map_or(positions, |scaling| scaling.positions(positions)),
            tie_word_embeddings: tied.unwrap_or(false),
            rope_scaling,
            query_scaling: query_scaling(&fields)?,
            experts: experts(&fields)?,
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
                ("rope_scaling.factor", "yarn.factor"),
                ("rope_scaling.beta_fast", "yarn.beta"),
                ("rope_scaling.beta_slow", "yarn.alpha"),
                ("rope_scaling.original_max_position_embeddings", YARN_ORIGINAL),
                ("llama_4_scaling_beta", "llama_4_scaling.beta"),
                ("num_local_experts", "moe.num_experts"),
                ("num_experts_per_tok", "moe.num_experts_per_tok"),
            ],
        )
    }
}

const YARN_ORIGINAL: &str = "yarn.original_max_position_embeddings";

/// `beta` and `alpha` are the bounds that others call `beta_fast` and `beta_slow`, and `apply_scale` says
/// whether scores grow with the factor.
fn yarn(fields: &Fields) -> Result<Option<RopeScaling>> {
    let Some(yarn) = fields.object("yarn")? else { return Ok(None) };
    let missing = |field: &str| Error::config(format!("yarn.{field}"), "a number", "nothing");
    let factor = yarn.number("factor")?.ok_or_else(|| missing("factor"))?;
    if factor == 1.0 {
        tracing::warn!("rope scaling by a factor of 1 changes nothing: passed over");
        return Ok(None);
    }
    let original = yarn.size("original_max_position_embeddings")?;
    let applies = yarn.flag("apply_scale")?.unwrap_or(true);
    Ok(Some(RopeScaling::Yarn {
        factor,
        original_max_position_embeddings: original
            .ok_or_else(|| missing("original_max_position_embeddings"))?,
        beta_fast: yarn.number("beta")?.unwrap_or(32.0),
        beta_slow: yarn.number("alpha")?.unwrap_or(1.0),
        truncate: true,
        attention_factor: if applies { yarn_magnitude(factor, 1.0) } else { 1.0 },
    }))
}

fn query_scaling(fields: &Fields) -> Result<Option<QueryScaling>> {
    let Some(scaling) = fields.object("llama_4_scaling")? else { return Ok(None) };
    let missing =
        |field: &str| Error::config(format!("llama_4_scaling.{field}"), "a number", "nothing");
    let original = scaling.size("original_max_position_embeddings")?;
    Ok(Some(QueryScaling {
        beta: scaling.number("beta")?.ok_or_else(|| missing("beta"))?,
        original_max_position_embeddings: original
            .ok_or_else(|| missing("original_max_position_embeddings"))?,
    }))
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
