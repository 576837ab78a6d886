//! `config.json`, as `transformers` writes it.

use serde_json::Value;

use super::fields::{Fields, brief};
use super::quantization::Fp8;
use super::rope_parameters::RopeParameters;
use super::{Config, Experts, head_dim};
use crate::error::{Error, Result};

/// The architectures that are this model; they differ in their defaults, in the sliding window and in
/// experts.
#[derive(Clone, Copy, PartialEq)]
enum Family {
    Mistral,
    Ministral3,
    Llama,
    Mixtral,
}

/// Models whose text part is described by `text_config`.
const WRAPPERS: [&str; 2] = ["mistral3", "llava"];

impl Config {
    /// Reads the text of a Hugging Face `config.json` of `model_type` `mistral`, `mixtral`, `ministral`,
    /// `ministral3` or `llama`; or of `mistral3` or `llava`, whose `text_config` is one of these: what sees
    /// images is left out.
    ///
    /// The sizes `vocab_size`, `hidden_size`, `intermediate_size`, `num_hidden_layers` and
    /// `num_attention_heads` must be given. Anything else that is absent takes the default of
    /// `transformers` (`MistralConfig`, `MixtralConfig`, `LlamaConfig`, `Ministral3Config`): for Mistral
    /// `sliding_window` 4096 (but none where it is `null`), 8 key and value heads, 131072 positions; for Llama
    /// no window, as many key and value heads as query heads, 2048 positions; for both `rope_theta` 10000,
    /// `rms_norm_eps` 1e-6, `head_dim = hidden_size / num_attention_heads`; for Mixtral as for Mistral, but no
    /// window, `rope_theta` 1000000, `rms_norm_eps` 1e-5, and 8 experts of which a token runs through 2; for
    /// Ministral 3 no window, 8 key and value heads, 262144 positions, `rms_norm_eps` 1e-5, `head_dim` 128,
    /// and, if nothing is said about rotation, `rope_theta` 1000000 with YaRN by 16 from 16384 positions and
    /// `llama_4_scaling_beta` 0.1; for all `bos_token_id` 1 and `eos_token_id` 2, and untied embeddings. For
    /// `mistral3`, `tie_word_embeddings` beside `text_config` goes before the one in it, and embeddings are
    /// tied if neither is there; [`Checkpoint`](crate::load::Checkpoint) unties them where there is a head
    /// among the weights. Ids that are not in the vocabulary, and RoPE scaling by 1, are passed over with a
    /// warning. A window in a Llama's file, experts in that of anything but a Mixtral, and a scaling of queries
    /// in any but a Ministral 3's, are ignored with a warning, as `transformers` ignores them.
    ///
    /// `rope_scaling` or `rope_parameters` may be of the kinds of [`RopeScaling`](super::RopeScaling). With
    /// `dynamic` and `yarn`,
    /// `max_position_embeddings` is at least the scaled length. A `quantization_config` may say that weights
    /// are FP8 (`fp8`, or `compressed-tensors` of format `float-quantized`).
    ///
    /// # Errors
    /// [`Error::Malformed`] if `text` is not a JSON object, [`Error::Config`] for a field that is
    /// missing, mistyped or impossible, and [`Error::Unsupported`] for anything that would change the
    /// computation: another `model_type`, other kinds of RoPE scaling (`longrope`), biases, another
    /// activation, weights quantised in another way, partial rotation, layers of different kinds.
    pub fn from_json(text: &str) -> Result<Self> {
        let file = Fields::parse(text, "config.json")?;
        let wrapper = wrapper(&file)?;
        let inside = wrapper.map(|kind| text_config(&file, kind)).transpose()?;
        let fields = inside.as_ref().unwrap_or(&file);
        let family = match wrapper {
            Some("llava") => family(fields, Some(Family::Llama))?,
            Some(_) => family(fields, Some(Family::Mistral))?,
            None => family(fields, None)?,
        };
        refuse_variants(&file)?;
        refuse_variants(fields)?;

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
            None if family == Family::Ministral3 && !fields.contains("head_dim") => 128,
            None => head_dim(
                ("hidden_size", hidden_size),
                ("num_attention_heads", num_attention_heads),
            )?,
        };
        let (default_positions, default_eps) = match family {
            Family::Mistral => (131_072, 1e-6),
            Family::Mixtral => (131_072, 1e-5),
            Family::Ministral3 => (262_144, 1e-5),
            Family::Llama => (2048, 1e-6),
        };
        let positions = fields.size("max_position_embeddings")?.unwrap_or(default_positions);
        let rope = RopeParameters::read(fields, family == Family::Ministral3, positions)?;
        // Tokens may be said beside the text model's other fields, or in it.
        let said = |name: &str| [fields, &file].into_iter().find(|it| it.contains(name));
        let bos_token_id = match said("bos_token_id") {
            Some(fields) => fields.token("bos_token_id")?,
            None => Some(1),
        };
        let eos_token_ids = match said("eos_token_id") {
            Some(fields) => fields.tokens("eos_token_id")?,
            None => vec![2],
        };
        let tied = match file.flag("tie_word_embeddings")? {
            Some(tied) => Some(tied),
            None => fields.flag("tie_word_embeddings")?,
        };

        let config = Self {
            vocab_size: fields.required_size("vocab_size")?,
            hidden_size,
            intermediate_size: fields.required_size("intermediate_size")?,
            num_hidden_layers,
            num_attention_heads,
            num_key_value_heads,
            head_dim,
            rms_norm_eps: fields.number("rms_norm_eps")?.unwrap_or(default_eps),
            rope_theta: rope.theta.unwrap_or(family.rope_theta()),
            sliding_window: sliding_window(fields, family, num_hidden_layers)?,
            max_position_embeddings: rope
                .scaling
                .as_ref()
                .map_or(positions, |scaling| scaling.positions(positions)),
            tie_word_embeddings: tied.unwrap_or(wrapper == Some("mistral3")),
            rope_scaling: rope.scaling,
            query_scaling: rope.query_scaling,
            experts: experts(fields, family)?,
            bos_token_id,
            eos_token_ids,
        };
        let config = config.without_foreign_tokens();
        config.validate()?;
        Ok(config)
    }
}

/// The kind of model around the text model, if there is one.
fn wrapper(file: &Fields) -> Result<Option<&'static str>> {
    let kind = file.text("model_type")?;
    if kind.is_none() && architecture(file)? == Some("Mistral3ForConditionalGeneration") {
        return Ok(Some("mistral3"));
    }
    Ok(WRAPPERS.into_iter().find(|wrapper| kind == Some(wrapper)))
}

/// The fields of the text model.
fn text_config(file: &Fields, kind: &str) -> Result<Fields> {
    tracing::warn!(model_type = kind, "only the text part of this model is read");
    let missing = || Error::config("text_config", "an object", "nothing");
    file.object("text_config")?.ok_or_else(missing)
}

fn architecture(fields: &Fields) -> Result<Option<&str>> {
    let list = fields.list("architectures")?;
    Ok(list.and_then(|list| list.first()).and_then(Value::as_str))
}

/// `unsaid` is what it is if the file does not say.
fn family(fields: &Fields, unsaid: Option<Family>) -> Result<Family> {
    if let Some(kind) = fields.text("model_type")? {
        return match kind {
            "mistral" | "ministral" => Ok(Family::Mistral),
            "ministral3" => Ok(Family::Ministral3),
            "mixtral" => Ok(Family::Mixtral),
            "llama" => Ok(Family::Llama),
            other => Err(Error::unsupported("model_type", other)),
        };
    }
    match architecture(fields)? {
        Some("MistralForCausalLM" | "MistralModel") => Ok(Family::Mistral),
        Some("MixtralForCausalLM" | "MixtralModel") => Ok(Family::Mixtral),
        Some("Ministral3ForCausalLM" | "Ministral3Model") => Ok(Family::Ministral3),
        Some("LlamaForCausalLM" | "LlamaModel") => Ok(Family::Llama),
        Some(other) => Err(Error::unsupported("architecture", other)),
        None => unsaid.ok_or_else(|| {
            Error::config("model_type", "mistral, mixtral, ministral3 or llama", "nothing")
        }),
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
    // Weights in FP8 are widened as they are loaded; anything else is refused here.
    Fp8::read(fields)?;
    Ok(())
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
