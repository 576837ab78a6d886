//! The metadata of a GGUF file, as llama.cpp writes it.

use std::collections::{HashMap, HashSet};

use candle_core::quantized::gguf_file::Value;

use super::rope::{QueryScaling, RopeScaling, yarn_magnitude};
use super::{Config, Experts, head_dim, validate_as};
use crate::error::{Error, Result};

impl Config {
    /// Reads the metadata of a GGUF file of `general.architecture` `llama`, `mistral` or `mistral3`;
    /// llama.cpp calls a Mistral `llama` too.
    ///
    /// `block_count`, `context_length`, `embedding_length`, `feed_forward_length`,
    /// `attention.head_count` and `attention.layer_norm_rms_epsilon` must be given. Absent,
    /// `attention.head_count_kv` is `attention.head_count`, `attention.key_length` is
    /// `embedding_length / head_count`, `rope.freq_base` is 10000, `vocab_size` is the number of
    /// `tokenizer.ggml.tokens`, and there are no `attention.sliding_window` and no experts. With an
    /// `expert_count` other than 0 goes an `expert_used_count`. An end-of-turn token
    /// counts as an end of text, and so does every token that is spelled like one, such as `<|im_end|>`,
    /// as in llama.cpp. `rope.scaling.type` may be `linear` or `yarn`, and of a `mistral3`,
    /// `attention.temperature_scale` scales queries; what a tensor `rope_freqs.weight` says (Llama 3.1) is
    /// added by [`Checkpoint`](crate::load::Checkpoint). `tie_word_embeddings` is false: the metadata does not say, and
    /// [`Checkpoint`](crate::load::Checkpoint) sets it where the file holds no `output.weight`.
    ///
    /// # Errors
    /// [`Error::Config`] and [`Error::Unsupported`] as for [`Config::from_json`], with the names of this
    /// file.
    pub fn from_gguf(metadata: &HashMap<String, Value>) -> Result<Self> {
        let metadata = Metadata::new(metadata)?;
        metadata.refuse_variants()?;

        let hidden = metadata.required_size("embedding_length")?;
        let heads = metadata.required_size("attention.head_count")?;
        let head_dim = match metadata.size("attention.key_length")? {
            Some(size) => size,
            None => head_dim(
                (&metadata.key("embedding_length"), hidden),
                (&metadata.key("attention.head_count"), heads),
            )?,
        };
        for name in ["attention.value_length", "rope.dimension_count"] {
            if let Some(size) = metadata.size(name)?.filter(|size| *size != head_dim) {
                let expected = format!("the head size of {head_dim}");
                return Err(Error::config(metadata.key(name), expected, size));
            }
        }
        let vocab_size = match (metadata.size("vocab_size")?, metadata.general(TOKENS)) {
            (Some(size), _) => size,
            (None, Some(Value::Array(tokens))) => tokens.len(),
            _ => return Err(Error::config(metadata.key("vocab_size"), INTEGER, "nothing")),
        };
        let mut eos_token_ids = Vec::new();
        for key in ["eos_token_id", "eot_token_id", "eom_token_id"] {
            eos_token_ids.extend(metadata.token(&format!("tokenizer.ggml.{key}"))?);
        }
        eos_token_ids.extend(metadata.ends_by_text());
        let mut seen = HashSet::new();
        eos_token_ids.retain(|id| seen.insert(*id));
        let positions = metadata.required_size("context_length")?;
        let rope_scaling = metadata.rope_scaling(positions)?;
        let config = Self {
            vocab_size,
            hidden_size: hidden,
            intermediate_size: metadata.required_size("feed_forward_length")?,
            num_hidden_layers: metadata.required_size("block_count")?,
            num_attention_heads: heads,
            num_key_value_heads: metadata.size("attention.head_count_kv")?.unwrap_or(heads),
            head_dim,
            rms_norm_eps: metadata
                .number(EPSILON)?
                .ok_or_else(|| Error::config(metadata.key(EPSILON), "a number", "nothing"))?,
            rope_theta: metadata.number("rope.freq_base")?.unwrap_or(10_000.0),
            // llama.cpp reads 0 as none
            sliding_window: metadata.size("attention.sliding_window")?.filter(|size| *size > 0),
            max_position_embeddings: rope_scaling
                .as_ref()
                .map_or(positions, |scaling| scaling.positions(positions)),
            tie_word_embeddings: false,
            rope_scaling,
            query_scaling: metadata.query_scaling(positions)?,
            experts: metadata.experts()?,
            bos_token_id: metadata.token("tokenizer.ggml.bos_token_id")?,
            eos_token_ids,
        };
        let names = [
            ("vocab_size", "vocab_size"),
            ("hidden_size", "embedding_length"),
            ("intermediate_size", "feed_forward_length"),
            ("num_hidden_layers", "block_count"),
            ("num_attention_heads", "attention.head_count"),
            ("num_key_value_heads", "attention.head_count_kv"),
            ("head_dim", "attention.key_length"),
            ("rms_norm_eps", EPSILON),
            ("rope_theta", "rope.freq_base"),
            ("sliding_window", "attention.sliding_window"),
            ("max_position_embeddings", "context_length"),
            ("rope_scaling.factor", "rope.scaling.factor"),
            ("rope_scaling.beta_fast", "rope.scaling.yarn_beta_fast"),
            ("rope_scaling.beta_slow", "rope.scaling.yarn_beta_slow"),
            ("rope_scaling.attention_factor", "rope.scaling.attn_factor"),
            ("rope_scaling.original_max_position_embeddings", ORIGINAL),
            ("llama_4_scaling_beta", TEMPERATURE),
            ("num_local_experts", "expert_count"),
            ("num_experts_per_tok", "expert_used_count"),
        ]
        .map(|(ours, theirs)| (ours, metadata.key(theirs)));
        let mut names: Vec<_> = names.iter().map(|(ours, key)| (*ours, key.as_str())).collect();
        names.push(("bos_token_id", "tokenizer.ggml.bos_token_id"));
        names.push(("eos_token_id", "tokenizer.ggml.eos_token_id"));
        validate_as(config, &names)
    }
}

/// Tokens that llama.cpp ends an answer at, whatever `eos_token_id` says, because files name one end and
/// fine-tunes write another (`special_eog_ids` in its `llama-vocab.cpp`).
const ENDS: [&str; 14] = [
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|eom_id|>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "<end_of_utterance>",
    "<｜end▁of▁sentence｜>",
];

/// Mistral Small 3 and its kin, where something is scaled; others are called `llama`.
const MISTRAL3: &str = "mistral3";
const ORIGINAL: &str = "rope.scaling.original_context_length";
const TEMPERATURE: &str = "attention.temperature_scale";
const EPSILON: &str = "attention.layer_norm_rms_epsilon";
const TOKENS: &str = "tokenizer.ggml.tokens";
const INTEGER: &str = "a non-negative integer";

/// Typed access to `{architecture}.{name}`, with errors that name the whole key.
struct Metadata<'a> {
    values: &'a HashMap<String, Value>,
    architecture: &'a str,
}

impl<'a> Metadata<'a> {
    fn new(values: &'a HashMap<String, Value>) -> Result<Self> {
        let architecture = match values.get("general.architecture") {
            Some(Value::String(architecture)) => architecture.as_str(),
            other => return Err(mistyped("general.architecture", "a string", other)),
        };
        if !["llama", "mistral", MISTRAL3].contains(&architecture) {
            return Err(Error::unsupported("general.architecture", architecture));
        }
        Ok(Self { values, architecture })
    }

    fn refuse_variants(&self) -> Result<()> {
        Ok(())
    }

    /// How llama.cpp scales frequencies. What the tensor `rope_freqs.weight` says comes in addition.
    fn rope_scaling(&self, positions: usize) -> Result<Option<RopeScaling>> {
        // before scaling had types, llama.cpp knew only the linear kind
        let factor = match self.number("rope.scaling.factor")? {
            Some(factor) => Some(factor),
            None => self.number("rope.scale_linear")?,
        };
        let factor = factor.filter(|factor| *factor != 0.0).unwrap_or(1.0);
        let key = self.key("rope.scaling.type");
        let kind = match self.values.get(&key) {
            None => "linear",
            Some(Value::String(kind)) => kind.as_str(),
            other => return Err(mistyped(&key, "a string", other)),
        };
        let magnitude = self.number("rope.scaling.attn_factor")?.unwrap_or(1.0);
        match kind {
            "none" => return Ok(None),
            "linear" | "yarn" if factor == 1.0 && magnitude == 1.0 => {
                if kind == "yarn" {
                    tracing::warn!(key, "rope scaling by 1 changes nothing: passed over");
                }
                return Ok(None);
            }
            "linear" if magnitude == 1.0 => return Ok(Some(RopeScaling::Linear { factor })),
            "yarn" => {}
            other => return Err(Error::unsupported("rope scaling", other)),
        }
        if let Some(mixed) = self.number("rope.scaling.yarn_ext_factor")?
            && mixed >= 0.0
            && mixed != 1.0
        {
            return Err(Error::unsupported(self.key("rope.scaling.yarn_ext_factor"), mixed));
        }
        if let Some(given) = self.number("rope.scaling.yarn_attn_factor")? {
            let key = self.key("rope.scaling.yarn_attn_factor");
            tracing::warn!(key, given, "llama.cpp computes this factor itself: ignored");
        }
        // Of other architectures llama.cpp does not read it.
        let log = "rope.scaling.yarn_log_multiplier";
        let log = if self.architecture == MISTRAL3 { self.number(log)? } else { None };
        let whole = yarn_magnitude(factor, 1.0);
        let attention_factor = match log.filter(|log| *log != 0.0) {
            Some(log) => whole / yarn_magnitude(factor, log),
            None => whole,
        };
        Ok(Some(RopeScaling::Yarn {
            factor,
            original_max_position_embeddings: self.original_length(positions)?,
            beta_fast: self.number("rope.scaling.yarn_beta_fast")?.unwrap_or(32.0),
            beta_slow: self.number("rope.scaling.yarn_beta_slow")?.unwrap_or(1.0),
            truncate: true,
            attention_factor: attention_factor * magnitude,
        }))
    }

    fn query_scaling(&self, positions: usize) -> Result<Option<QueryScaling>> {
        let Some(beta) = self.number(TEMPERATURE)?.filter(|beta| *beta != 0.0) else {
            return Ok(None);
        };
        if self.architecture != MISTRAL3 {
            tracing::warn!(
                key = self.key(TEMPERATURE),
                beta,
                "only mistral3 scales its queries: ignored"
            );
            return Ok(None);
        }
        let original_max_position_embeddings = self.original_length(positions)?;
        Ok(Some(QueryScaling { beta, original_max_position_embeddings }))
    }

    fn original_length(&self, positions: usize) -> Result<usize> {
        Ok(self.size(ORIGINAL)?.unwrap_or(positions))
    }

    /// llama.cpp takes a count of 0 for none, and of 1 for a mixture of one.
    fn experts(&self) -> Result<Option<Experts>> {
        match self.size("expert_count")? {
            None | Some(0) => Ok(None),
            Some(num_local_experts) => {
                let num_experts_per_tok = self.required_size("expert_used_count")?;
                Ok(Some(Experts { num_local_experts, num_experts_per_tok }))
            }
        }
    }

    fn key(&self, name: &str) -> String {
        format!("{}.{name}", self.architecture)
    }

    fn general(&self, key: &str) -> Option<&'a Value> {
        self.values.get(key)
    }

    fn size(&self, name: &str) -> Result<Option<usize>> {
        let key = self.key(name);
        let Some(value) = self.values.get(&key) else { return Ok(None) };
        let size = integer(value).and_then(|size| size.try_into().ok());
        size.map(Some).ok_or_else(|| mistyped(&key, INTEGER, Some(value)))
    }

    fn required_size(&self, name: &str) -> Result<usize> {
        self.size(name)?.ok_or_else(|| Error::config(self.key(name), INTEGER, "nothing"))
    }

    fn number(&self, name: &str) -> Result<Option<f64>> {
        let key = self.key(name);
        match self.values.get(&key) {
            None => Ok(None),
            Some(Value::F32(number)) => Ok(Some(f64::from(*number))),
            Some(Value::F64(number)) => Ok(Some(*number)),
            other => Err(mistyped(&key, "a number", other)),
        }
    }

    /// The ids of [`ENDS`] that are in the vocabulary, in its order.
    fn ends_by_text(&self) -> impl Iterator<Item = u32> {
        let tokens = match self.general(TOKENS) {
            Some(Value::Array(tokens)) => tokens.as_slice(),
            _ => &[],
        };
        let ends =
            |token: &Value| matches!(token, Value::String(text) if ENDS.contains(&text.as_str()));
        (0u32..).zip(tokens).filter(move |(_, token)| ends(token)).map(|(id, _)| id)
    }

    fn token(&self, key: &str) -> Result<Option<u32>> {
        let Some(value) = self.values.get(key) else { return Ok(None) };
        if !is_integer(value) {
            return Err(mistyped(key, "a token id", Some(value)));
        }
        let id = integer(value).and_then(|id| id.try_into().ok());
        if id.is_none() {
            tracing::warn!(key, id = ?value, "no token has this id: not used");
        }
        Ok(id)
    }
}

/// An unsigned or non-negative value of any integer type: writers do not agree on which.
pub(crate) fn integer(value: &Value) -> Option<u64> {
    match value {
        Value::U8(n) => Some((*n).into()),
        Value::U16(n) => Some((*n).into()),
        Value::U32(n) => Some((*n).into()),
        Value::U64(n) => Some(*n),
        Value::I8(n) => (*n).try_into().ok(),
        Value::I16(n) => (*n).try_into().ok(),
        Value::I32(n) => (*n).try_into().ok(),
        Value::I64(n) => (*n).try_into().ok(),
        _ => None,
    }
}

/// Whether a value is of any integer type.
pub(crate) fn is_integer(value: &Value) -> bool {
    use Value::{I8, I16, I32, I64, U8, U16, U32, U64};
    matches!(value, U8(_) | U16(_) | U32(_) | U64(_) | I8(_) | I16(_) | I32(_) | I64(_))
}

fn mistyped(key: &str, expected: &str, got: Option<&Value>) -> Error {
    let got = match got {
        None => "nothing".to_string(),
        // an array may hold the whole vocabulary
        Some(Value::Array(items)) => format!("an array of {}", items.len()),
        Some(value) => format!("{value:?}"),
    };
    Error::config(key, expected, got)
}
