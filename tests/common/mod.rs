//! What tests share: fixtures, comparisons, and checkpoints rewritten into other formats by code
//! that shares nothing with the loader.

#![allow(dead_code, reason = "each test binary uses a part")]

pub(crate) mod experts;
pub(crate) mod gguf;
pub(crate) mod gradient;
pub(crate) mod hub;
pub(crate) mod kept;
pub(crate) mod reference;
#[cfg(feature = "pgvector")]
pub(crate) mod server;
pub(crate) mod tiny;

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;
use std::sync::{Arc, Mutex};

use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{Device, Tensor};
use hybrid_attention::Config;
#[allow(unused_imports, reason = "each test binary uses a part")]
pub(crate) use hybrid_attention_testing::{
    Result, assert_close, assert_identical, fixture, smollm2,
};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Metadata, Subscriber};

/// The checkpoints under `tests/fixtures`.
pub(crate) const FIXTURES: [&str; 5] =
    ["window", "head_dim", "tied_sharded", "mixtral", "mixtral_packed"];

/// Texts to be embedded, of unequal length.
pub(crate) const TEXTS: [&str; 5] = [
    "the cat sat on the mat",
    "a dog",
    "x",
    "the quick brown fox jumps over the lazy dog, and then it does so again and again",
    "naïve café 😀",
];

/// The configuration of a fixture.
pub(crate) fn fixture_config(name: &str) -> Result<Config> {
    Ok(Config::from_json(&fs::read_to_string(fixture(name).join("config.json"))?)?)
}

/// One layer, whose rows are whole blocks of 256.
pub(crate) fn config_of_large_blocks() -> Result<Config> {
    Ok(Config {
        vocab_size: 32,
        hidden_size: 256,
        intermediate_size: 512,
        num_hidden_layers: 1,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 64,
        ..fixture_config("window")?
    })
}

/// Every tensor of a fixture, read by candle, with one for each matrix of each expert.
pub(crate) fn fixture_weights(name: &str) -> Result<BTreeMap<String, Tensor>> {
    let mut tensors = BTreeMap::new();
    for entry in fs::read_dir(fixture(name))? {
        let path = entry?.path();
        let file = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if file.starts_with("model") && file.ends_with(".safetensors") {
            tensors.extend(candle_core::safetensors::load(&path, &Device::Cpu)?);
        }
    }
    experts::unpack(&tensors)
}

/// `a0 b0 .. a1 b1 ..` to `a0 a1 b0 b1 ..`, for the rows of every head.
pub(crate) fn interleave(tensor: &Tensor, head_dim: usize) -> Result<Tensor> {
    let (rows, columns) = tensor.dims2()?;
    let halves = tensor.reshape((rows / head_dim, 2, head_dim / 2, columns))?;
    Ok(halves.transpose(1, 2)?.contiguous()?.reshape((rows, columns))?)
}

/// Replaces the parts of Hugging Face names by `spelling`, and orders rows as Mistral and llama.cpp
/// do. They know nothing of the weights for thought passes.
fn rename(
    tensors: &BTreeMap<String, Tensor>,
    head_dim: usize,
    spelling: &[(&str, &str)],
) -> Result<Vec<(String, Tensor)>> {
    let mut renamed = Vec::new();
    for (name, tensor) in tensors {
        if name.starts_with("thought.") {
            renamed.push((name.clone(), tensor.clone()));
            continue;
        }
        let rotated = name.contains("q_proj") || name.contains("k_proj");
        let tensor = if rotated { interleave(tensor, head_dim)? } else { tensor.clone() };
        let name =
            spelling.iter().fold(name.clone(), |name, (ours, file)| name.replace(ours, file));
        renamed.push((name, tensor));
    }
    Ok(renamed)
}

/// Writes `config.json` and `model.safetensors`.
pub(crate) fn write_hugging_face(
    folder: &Path,
    config: &Config,
    tensors: &BTreeMap<String, Tensor>,
) -> Result {
    let mut json = serde_json::json!({
        "model_type": "mistral",
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "sliding_window": config.sliding_window,
        "max_position_embeddings": config.max_position_embeddings,
        "tie_word_embeddings": config.tie_word_embeddings,
    });
    if let Some(of) = &config.experts {
        json["model_type"] = "mixtral".into();
        json["num_local_experts"] = of.num_local_experts.into();
        json["num_experts_per_tok"] = of.num_experts_per_tok.into();
    }
    fs::write(folder.join("config.json"), json.to_string())?;
    let tensors: HashMap<_, _> = tensors.clone().into_iter().collect();
    Ok(candle_core::safetensors::save(&tensors, folder.join("model.safetensors"))?)
}

/// Writes `params.json` and `consolidated.safetensors`.
pub(crate) fn write_consolidated(
    folder: &Path,
    config: &Config,
    tensors: &BTreeMap<String, Tensor>,
) -> Result {
    let spelling = [
        ("model.layers.", "layers."),
        ("self_attn.q_proj", "attention.wq"),
        ("self_attn.k_proj", "attention.wk"),
        ("self_attn.v_proj", "attention.wv"),
        ("self_attn.o_proj", "attention.wo"),
        ("block_sparse_moe.", "feed_forward."),
        ("mlp.gate_proj", "feed_forward.w1"),
        ("mlp.down_proj", "feed_forward.w2"),
        ("mlp.up_proj", "feed_forward.w3"),
        ("input_layernorm", "attention_norm"),
        ("post_attention_layernorm", "ffn_norm"),
        ("model.embed_tokens", "tok_embeddings"),
        ("model.norm", "norm"),
        ("lm_head", "output"),
    ];
    let mut params = serde_json::json!({
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "head_dim": config.head_dim,
        "hidden_dim": config.intermediate_size,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "norm_eps": config.rms_norm_eps,
        "vocab_size": config.vocab_size,
        "rope_theta": config.rope_theta,
        "sliding_window": config.sliding_window,
        "max_position_embeddings": config.max_position_embeddings,
        "tied_embeddings": config.tie_word_embeddings,
    });
    if let Some(of) = &config.experts {
        params["moe"] = serde_json::json!({
            "num_experts": of.num_local_experts,
            "num_experts_per_tok": of.num_experts_per_tok,
        });
    }
    fs::write(folder.join("params.json"), params.to_string())?;
    let tensors: HashMap<_, _> = rename(tensors, config.head_dim, &spelling)?.into_iter().collect();
    Ok(candle_core::safetensors::save(&tensors, folder.join("consolidated.safetensors"))?)
}

/// The metadata that llama.cpp would write for `config`.
pub(crate) fn gguf_metadata(config: &Config) -> Vec<(String, Value)> {
    let mut metadata = vec![("general.architecture".to_string(), Value::String("llama".into()))];
    let mut size = |key: &str, size: usize| {
        metadata.push((format!("llama.{key}"), Value::U32(size as u32)));
    };
    size("block_count", config.num_hidden_layers);
    size("context_length", config.max_position_embeddings);
    size("embedding_length", config.hidden_size);
    size("feed_forward_length", config.intermediate_size);
    size("attention.head_count", config.num_attention_heads);
    size("attention.head_count_kv", config.num_key_value_heads);
    size("attention.key_length", config.head_dim);
    size("attention.value_length", config.head_dim);
    size("rope.dimension_count", config.head_dim);
    size("vocab_size", config.vocab_size);
    if let Some(of) = &config.experts {
        size("expert_count", of.num_local_experts);
        size("expert_used_count", of.num_experts_per_tok);
    }
    if let Some(window) = config.sliding_window {
        size("attention.sliding_window", window);
    }
    let mut number = |key: &str, number: f64| {
        metadata.push((format!("llama.{key}"), Value::F32(number as f32)));
    };
    number("rope.freq_base", config.rope_theta);
    number("attention.layer_norm_rms_epsilon", config.rms_norm_eps);
    if let Some(id) = config.bos_token_id {
        metadata.push(("tokenizer.ggml.bos_token_id".into(), Value::U32(id)));
    }
    for id in config.eos_token_ids.iter().take(1) {
        metadata.push(("tokenizer.ggml.eos_token_id".into(), Value::U32(*id)));
    }
    metadata
}

/// Parts of the Hugging Face names, and what llama.cpp has in their place.
pub(crate) const GGUF_NAMES: [(&str, &str); 13] = [
    ("model.layers.", "blk."),
    ("self_attn.q_proj", "attn_q"),
    ("self_attn.k_proj", "attn_k"),
    ("self_attn.v_proj", "attn_v"),
    ("self_attn.o_proj", "attn_output"),
    ("mlp.gate_proj", "ffn_gate"),
    ("mlp.down_proj", "ffn_down"),
    ("mlp.up_proj", "ffn_up"),
    ("input_layernorm", "attn_norm"),
    ("post_attention_layernorm", "ffn_norm"),
    ("model.embed_tokens", "token_embd"),
    ("model.norm", "output_norm"),
    ("lm_head", "output"),
];

/// Writes a GGUF file: matrices whose rows are whole blocks as `dtype`, all else as f32. Experts are
/// packed.
pub(crate) fn write_gguf(
    path: &Path,
    config: &Config,
    tensors: &BTreeMap<String, Tensor>,
    dtype: GgmlDType,
) -> Result {
    let tensors = experts::for_gguf(config, tensors, false)?;
    write_gguf_as_spelled(path, config, &tensors, dtype)
}

/// [`write_gguf`] of tensors among which those of experts are called as in such a file.
pub(crate) fn write_gguf_as_spelled(
    path: &Path,
    config: &Config,
    tensors: &BTreeMap<String, Tensor>,
    dtype: GgmlDType,
) -> Result {
    let mut quantized = Vec::new();
    for (name, tensor) in rename(tensors, config.head_dim, &GGUF_NAMES)? {
        let blocks = in_blocks(&name, &tensor, dtype);
        let dtype = if blocks { dtype } else { GgmlDType::F32 };
        quantized.push((name, QTensor::quantize(&tensor, dtype)?));
    }
    let metadata = gguf_metadata(config);
    let metadata: Vec<_> = metadata.iter().map(|(key, value)| (key.as_str(), value)).collect();
    let tensors: Vec<_> = quantized.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    Ok(gguf_file::write(&mut fs::File::create(path)?, &metadata, &tensors)?)
}

/// Whether [`write_gguf`], or the loader, puts a tensor in blocks.
pub(crate) fn in_blocks(name: &str, tensor: &Tensor, dtype: GgmlDType) -> bool {
    let router = experts::is_router(name) || name.contains("ffn_gate_inp");
    let whole = tensor.dims().last().is_some_and(|row| row % dtype.block_size() == 0);
    tensor.rank() > 1 && !router && whole
}

/// What `run` logs, each event as its fields in order.
pub(crate) fn logged(run: impl FnOnce() -> Result) -> Result<Vec<String>> {
    let log = Log::default();
    tracing::subscriber::with_default(log.clone(), run)?;
    let events = log.0.lock().map_err(|_| "poisoned")?;
    Ok(events.clone())
}

#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<String>>>);

impl Subscriber for Log {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.target().starts_with("hybrid_attention")
    }

    fn event(&self, event: &Event<'_>) {
        struct Fields(String);
        impl Visit for Fields {
            fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
                self.0 += &format!(" {field}={value:?}");
            }
        }
        let mut fields = Fields(event.metadata().level().to_string());
        event.record(&mut fields);
        if let Ok(mut events) = self.0.lock() {
            events.push(fields.0);
        }
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }
    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}
