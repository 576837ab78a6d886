//! `config.json`, as `transformers` writes it.

use serde_json::Value;

use super::fields::{Fields, brief};
use super::{Config, Experts, head_dim};
use crate::error::{Error, Result};

/// The architectures that are this model; they differ in their defaults, in the sliding window and in
/// experts.
#[derive(Clone, Copy, PartialEq)]
enum Family {
    Mistral,
    Llama,
    Mixtral,
}

impl Config {
    /// Reads the text of a Hugging Face `config.json` of `model_type` `mistral`, `mixtral` or `llama`.
    ///
    /// The sizes `vocab_size`, `hidden_size`, `intermediate_size`, `num_hidden_layers` and
    /// `num_attention_heads` must be given. Anything else that is absent takes the default of
    /// `transformers` 4.51 (`MistralConfig`, `MixtralConfig`, `LlamaConfig`): for Mistral `sliding_window` 4096 (but none
    /// where it is `null`), 8 key and value heads, 131072 positions; for Llama no window, as many key
    /// and value heads as query heads, 2048 positions; for Mixtral as for Mistral, but no window, `rope_theta`
    /// 1000000, `rms_norm_eps` 1e-5, and 8 experts of which a token runs through 2; else `rope_theta` 10000, `rms_norm_eps` 1e-6,
    /// untied embeddings, `head_dim = hidden_size / num_attention_heads`, `bos_token_id` 1 and
    /// `eos_token_id` 2. Ids that are not in the vocabulary, and RoPE scaling by 1, are passed over with a
    /// warning. A window in a Llama's file, or experts in that of anything but a Mixtral, are ignored with a
    /// warning, as `transformers` ignores them.
    ///
    /// # Errors
    /// [`Error::Malformed`] if `text` is not a JSON object, [`Error::Config`] for a field that is
    /// missing, mistyped or impossible, and [`Error::Unsupported`] for anything that would change the
    /// computation: another `model_type`, RoPE scaling, biases, another activation, quantised
    /// weights, partial rotation, layers of different kinds.
    pub fn from_json(text: &str) -> Result<Self> {
        let fields = Fields::parse(text, "config.json")?;
        let family = family(&fields)?;
        refuse_variants(&fields)?;
        let rope_theta = rope_theta(&fields)?.unwrap_or(family.rope_theta());

        let hidden_size = fields.required_size("hidden_size")?;
        let num_attention_heads = fields.required_size("num_attention_heads")?;
        let num_hidden_layers = fields.required_size("num_hidden_layers")?;
        let num_key_value_heads = match fields.size("num_key_value_heads")? {
            Some(heads) => heads,
            None if family != Family::Llama && !fields.contains("num_key_value_heads") => 8,
            None => num_attention_heads,
        };
        let head_dim = match fields.size("head_dim")? {
            Some(size) => size,
            None => head_dim(
                ("hidden_size", hidden_size),
                ("num_attention_heads", num_attention_heads),
            )?,
        };
        let default_positions = if family == Family::Llama { 2048 } else { 131_072 };
        let default_eps = if family == Family::Mixtral { 1e-5 } else { 1e-6 };
        let bos_token_id = match fields.token("bos_token_id")? {
            None if !fields.contains("bos_token_id") => Some(1),
            given => given,
        };
        let eos_token_ids =
            if fields.contains("eos_token_id") { fields.tokens("eos_token_id")? } else { vec![2] };

        let config = Self {
            vocab_size: fields.required_size("vocab_size")?,
            hidden_size,
            intermediate_size: fields.required_size("intermediate_size")?,
            num_hidden_layers,
            num_attention_heads,
            num_key_value_heads,
            head_dim,
            rms_norm_eps: fields.number("rms_norm_eps")?.unwrap_or(default_eps),
            rope_theta,
            sliding_window: sliding_window(&fields, family, num_hidden_layers)?,
            max_position_embeddings: fields
                .size("max_position_embeddings")?
                .unwrap_or(default_positions),
            tie_word_embeddings: fields.flag("tie_word_embeddings")?.unwrap_or(false),
            rope_scaling: None,
            query_scaling: None,
            experts: experts(&fields, family)?,
            attention_bias: false,
            bos_token_id,
            eos_token_ids,
        };
        let config = config.without_foreign_tokens();
        config.validate()?;
        Ok(config)
    }
}

fn family(fields: &Fields) -> Result<Family> {
    if let Some(kind) = fields.text("model_type")? {
        return match kind {
            "mistral" => Ok(Family::Mistral),
            "mixtral" => Ok(Family::Mixtral),
            "llama" => Ok(Family::Llama),
            other => Err(Error::unsupported("model_type", other)),
        };
    }
    match fields.list("architectures")?.and_then(|list| list.first()).and_then(Value::as_str) {
        Some("MistralForCausalLM" | "MistralModel") => Ok(Family::Mistral),
        Some("MixtralForCausalLM" | "MixtralModel") => Ok(Family::Mixtral),
        Some("LlamaForCausalLM" | "LlamaModel") => Ok(Family::Llama),
        Some(other) => Err(Error::unsupported("architecture", other)),
        None => Err(Error::config("model_type", "mistral, mixtral or llama", "nothing")),
    }
}

impl Family {
    /// Where a file does not say.
    fn rope_theta(self) -> f64 {
        if self == Self::Mixtral { 1_000_000.0 } else { 10_000.0 }
    }
}

/// `num_local_experts` and how many of them a token runs through. Only a Mixtral has any: `transformers`
/// reads these fields in no other file.
fn experts(fields: &Fields, family: Family) -> Result<Option<Experts>> {
    if family == Family::Mixtral {
        return Ok(Some(Experts {
            num_local_experts: fields.size("num_local_experts")?.unwrap_or(8),
            num_experts_per_tok: fields.size("num_experts_per_tok")?.unwrap_or(2),
        }));
    }
    if let Some(experts) = fields.get("num_local_experts") {
        let num_local_experts = brief(experts);
        tracing::warn!(num_local_experts, "only a mixtral has experts: ignored");
    }
    Ok(None)
}

/// Refuses the fields that would change the computation, except those about rotation and window.
fn refuse_variants(fields: &Fields) -> Result<()> {
    for field in ["attention_bias", "mlp_bias"] {
        if fields.flag(field)? == Some(true) {
            return Err(Error::unsupported(field, true));
        }
    }
    if let Some(act) = fields.text("hidden_act")?.filter(|act| *act != "silu") {
        return Err(Error::unsupported("hidden_act", act));
    }
    if let Some(quantization) = fields.object("quantization_config")? {
        let method = quantization.text("quant_method")?.unwrap_or("no quant_method");
        return Err(Error::unsupported("quantization_config", method));
    }
    Ok(())
}

/// `rope_theta` is beside the sizes or, from `transformers` 5 on, in `rope_parameters`.
fn rope_theta(fields: &Fields) -> Result<Option<f64>> {
    let mut theta = fields.number("rope_theta")?;
    refuse_partial_rotation(fields)?;
    for name in ["rope_scaling", "rope_parameters"] {
        let Some(rope) = fields.object(name)? else { continue };
        // `type` is how transformers spelled it before 4.43
        let kind = rope.text("rope_type")?.or(rope.text("type")?);
        match kind {
            Some("default") => {}
            Some(kind) if scales_by_one(&rope, kind)? => {
                tracing::warn!(kind, "rope scaling by a factor of 1 changes nothing: passed over");
            }
            Some(other) => return Err(Error::unsupported("rope scaling", other)),
            None if name == "rope_scaling" => {
                return Err(Error::config("rope_scaling.rope_type", "a string", "nothing"));
            }
            None => {}
        }
        if let Some(layers) = rope.nested().next() {
            return Err(Error::unsupported("rope scaling", format!("per kind of layer: {layers}")));
        }
        refuse_partial_rotation(&rope)?;
        theta = rope.number("rope_theta")?.or(theta);
    }
    Ok(theta)
}

/// Whether RoPE scaling of this kind leaves every angle as it is.
fn scales_by_one(rope: &Fields, kind: &str) -> Result<bool> {
    let factor = rope.number("factor")? == Some(1.0);
    Ok(match kind {
        "linear" | "dynamic" | "llama3" => factor,
        // Where these are given, they say how much is scaled, whatever the factor says.
        "yarn" => {
            let others = ["attention_factor", "original_max_position_embeddings"];
            factor && others.iter().all(|field| rope.get(field).is_none())
        }
        _ => false,
    })
}

fn refuse_partial_rotation(fields: &Fields) -> Result<()> {
    match fields.number("partial_rotary_factor")? {
        None | Some(1.0) => Ok(()),
        Some(factor) => Err(Error::unsupported("partial_rotary_factor", factor)),
    }
}

fn sliding_window(fields: &Fields, family: Family, layers: usize) -> Result<Option<usize>> {
    let mut window = fields.size("sliding_window")?;
    if family == Family::Mistral && !fields.contains("sliding_window") {
        window = Some(4096);
    }
    if let Some(kinds) = fields.list("layer_types")? {
        if kinds.len() != layers {
            return Err(Error::config("layer_types", format!("{layers} kinds"), kinds.len()));
        }
        let uniform = |kind: &str| kinds.iter().all(|each| each == kind);
        if uniform("full_attention") {
            window = None;
        } else if !uniform("sliding_attention") {
            let first = kinds.first().map_or_else(String::new, brief);
            let got = match kinds.iter().find(|kind| Some(*kind) != kinds.first()) {
                Some(other) => format!("{first} beside {}", brief(other)),
                None => first,
            };
            return Err(Error::unsupported("layer_types", got));
        } else if window.is_none() {
            let expected = "a size, as every layer is sliding_attention";
            return Err(Error::config("sliding_window", expected, "nothing"));
        }
    }
    if let (Family::Llama, Some(size)) = (family, window) {
        tracing::warn!(sliding_window = size, "a llama has no sliding window: ignored");
        return Ok(None);
    }
    Ok(window)
}
