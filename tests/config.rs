//! Configurations of published checkpoints, in all three spellings, and what is refused of them.

mod common;

use std::collections::HashMap;

use candle_core::quantized::gguf_file::Value;
use common::{Result, gguf_metadata, logged};
use hybrid_attention::{Config, Experts};
use serde_json::json;

fn mistral_7b_v01() -> Config {
    Config {
        vocab_size: 32000,
        hidden_size: 4096,
        intermediate_size: 14336,
        num_hidden_layers: 32,
        num_attention_heads: 32,
        num_key_value_heads: 8,
        head_dim: 128,
        rms_norm_eps: 1e-5,
        rope_theta: 1e4,
        sliding_window: Some(4096),
        max_position_embeddings: 32768,
        tie_word_embeddings: false,
        rope_scaling: None,
        query_scaling: None,
        experts: None,
        bos_token_id: Some(1),
        eos_token_ids: vec![2],
    }
}

const MISTRAL_7B_V01: &str = r#"{
    "architectures": ["MistralForCausalLM"], "bos_token_id": 1, "eos_token_id": 2,
    "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.02,
    "intermediate_size": 14336, "max_position_embeddings": 32768, "model_type": "mistral",
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096,
    "tie_word_embeddings": false, "torch_dtype": "bfloat16", "transformers_version": "4.34.0.dev0",
    "use_cache": true, "vocab_size": 32000}"#;

/// The v0.1 file with some fields set, or removed where the value is the string `absent`.
fn edited(edits: &[(&str, serde_json::Value)]) -> Result<String> {
    let mut file: serde_json::Map<_, _> = serde_json::from_str(MISTRAL_7B_V01)?;
    for (field, value) in edits {
        if value == "absent" {
            file.remove(*field);
        } else {
            file.insert((*field).into(), value.clone());
        }
    }
    Ok(serde_json::to_string(&file)?)
}

fn refusal(config: hybrid_attention::Result<Config>) -> String {
    config.map_or_else(|error| error.to_string(), |config| format!("accepted: {config:?}"))
}

#[test]
fn mistral_7b() -> Result {
    assert_eq!(Config::from_json(MISTRAL_7B_V01)?, mistral_7b_v01());
    let v02 = edited(&[("sliding_window", json!(null)), ("rope_theta", json!(1e6))])?;
    let expected = Config { sliding_window: None, rope_theta: 1e6, ..mistral_7b_v01() };
    assert_eq!(Config::from_json(&v02)?, expected);
    let v03 = edited(&[
        ("sliding_window", json!(null)),
        ("rope_theta", json!(1000000)),
        ("vocab_size", json!(32768)),
    ])?;
    assert_eq!(Config::from_json(&v03)?, Config { vocab_size: 32768, ..expected });
    Ok(())
}

#[test]
fn nemo_and_small_say_their_head_dim() -> Result {
    let nemo = r#"{"architectures": ["MistralForCausalLM"], "attention_dropout": 0.0,
        "bos_token_id": 1, "eos_token_id": 2, "head_dim": 128, "hidden_act": "silu",
        "hidden_size": 5120, "initializer_range": 0.02, "intermediate_size": 14336,
        "max_position_embeddings": 1024000, "model_type": "mistral", "num_attention_heads": 32,
        "num_hidden_layers": 40, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0, "sliding_window": null, "tie_word_embeddings": false,
        "torch_dtype": "bfloat16", "use_cache": true, "vocab_size": 131072}"#;
    let expected = Config {
        vocab_size: 131_072,
        hidden_size: 5120,
        num_hidden_layers: 40,
        rope_theta: 1e6,
        sliding_window: None,
        max_position_embeddings: 1_024_000,
        ..mistral_7b_v01()
    };
    assert_eq!(Config::from_json(nemo)?, expected);
    let small = nemo
        .replace("\"intermediate_size\": 14336", "\"intermediate_size\": 32768")
        .replace("1024000", "32768")
        .replace("\"rope_theta\": 1000000.0", "\"rope_theta\": 100000000.0");
    let expected = Config {
        intermediate_size: 32768,
        max_position_embeddings: 32768,
        rope_theta: 1e8,
        ..expected
    };
    assert_eq!(Config::from_json(&small)?, expected);
    Ok(())
}

#[test]
fn gritlm_7b() -> Result {
    let gritlm = r#"{"_name_or_path": "mistralai/Mistral-7B-v0.1", "architectures": ["MistralForCausalLM"],
        "attention_dropout": 0.0, "auto_map": {"AutoModelForCausalLM": "modeling_gritlm7b.MistralForCausalLM"},
        "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096,
        "id2label": {"0": "LABEL_0"}, "initializer_range": 0.02, "intermediate_size": 14336,
        "label2id": {"LABEL_0": 0}, "max_position_embeddings": 32768, "model_type": "mistral",
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096,
        "tie_word_embeddings": false, "use_cache": false, "vocab_size": 32000}"#;
    assert_eq!(Config::from_json(gritlm)?, mistral_7b_v01());
    Ok(())
}

#[test]
fn small_llamas() -> Result {
    let tiny_llama = r#"{"architectures": ["LlamaForCausalLM"], "attention_bias": false,
        "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 2048,
        "initializer_range": 0.02, "intermediate_size": 5632, "max_position_embeddings": 2048,
        "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 22,
        "num_key_value_heads": 4, "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": null,
        "rope_theta": 10000.0, "tie_word_embeddings": false, "use_cache": true, "vocab_size": 32000}"#;
    let expected = Config {
        hidden_size: 2048,
        intermediate_size: 5632,
        num_hidden_layers: 22,
        num_key_value_heads: 4,
        head_dim: 64,
        sliding_window: None,
        max_position_embeddings: 2048,
        ..mistral_7b_v01()
    };
    assert_eq!(Config::from_json(tiny_llama)?, expected);

    let smollm2 = r#"{"architectures": ["LlamaForCausalLM"], "attention_bias": false,
        "attention_dropout": 0.0, "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu",
        "hidden_size": 576, "initializer_range": 0.041666666666666664, "intermediate_size": 1536,
        "is_llama_config": true, "max_position_embeddings": 8192, "mlp_bias": false,
        "model_type": "llama", "num_attention_heads": 9, "num_hidden_layers": 30,
        "num_key_value_heads": 3, "pad_token_id": 2, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_interleaved": false, "rope_scaling": null, "rope_theta": 100000,
        "tie_word_embeddings": true, "use_cache": true, "vocab_size": 49152}"#;
    let expected = Config {
        vocab_size: 49152,
        hidden_size: 576,
        intermediate_size: 1536,
        num_hidden_layers: 30,
        num_attention_heads: 9,
        num_key_value_heads: 3,
        head_dim: 64,
        rope_theta: 1e5,
        max_position_embeddings: 8192,
        tie_word_embeddings: true,
        ..expected
    };
    assert_eq!(Config::from_json(smollm2)?, expected);
    assert_eq!(expected.weights().count(), 272);
    Ok(())
}

#[test]
fn defaults_of_transformers() -> Result {
    let sizes = r#""vocab_size": 64, "hidden_size": 64, "intermediate_size": 64,
        "num_hidden_layers": 1, "num_attention_heads": 16"#;
    let mistral = Config {
        vocab_size: 64,
        hidden_size: 64,
        intermediate_size: 64,
        num_hidden_layers: 1,
        num_attention_heads: 16,
        num_key_value_heads: 8,
        head_dim: 4,
        rms_norm_eps: 1e-6,
        rope_theta: 1e4,
        sliding_window: Some(4096),
        max_position_embeddings: 131_072,
        tie_word_embeddings: false,
        rope_scaling: None,
        query_scaling: None,
        experts: None,
        bos_token_id: Some(1),
        eos_token_ids: vec![2],
    };
    let llama = Config {
        num_key_value_heads: 16,
        sliding_window: None,
        max_position_embeddings: 2048,
        ..mistral.clone()
    };
    for (text, expected) in [
        (r#""model_type": "mistral""#, &mistral),
        (r#""architectures": ["MistralModel"]"#, &mistral),
        (r#""model_type": null, "architectures": ["MistralForCausalLM"]"#, &mistral),
        (r#""architectures": ["LlamaForCausalLM"]"#, &llama),
        (r#""model_type": "llama""#, &llama),
        // ignored by the reference
        (r#""model_type": "llama", "sliding_window": 32"#, &llama),
        (r#""model_type": "llama", "num_key_value_heads": null, "head_dim": null"#, &llama),
        (r#""model_type": "llama", "layer_types": ["full_attention"]"#, &llama),
        (
            r#""model_type": "mistral", "num_key_value_heads": null, "bos_token_id": null,
               "eos_token_id": null"#,
            &Config {
                num_key_value_heads: 16,
                bos_token_id: None,
                eos_token_ids: vec![],
                ..mistral.clone()
            },
        ),
        (
            r#""model_type": "mistral", "eos_token_id": [2, 32, 7], "sliding_window": null"#,
            &Config { eos_token_ids: vec![2, 32, 7], sliding_window: None, ..mistral.clone() },
        ),
        (
            r#""model_type": "mistral", "layer_types": ["full_attention"], "sliding_window": 8"#,
            &Config { sliding_window: None, ..mistral.clone() },
        ),
        (
            r#""model_type": "mistral", "layer_types": ["sliding_attention"], "sliding_window": 8"#,
            &Config { sliding_window: Some(8), ..mistral.clone() },
        ),
        (
            r#""model_type": "mistral", "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}"#,
            &Config { rope_theta: 5e5, ..mistral.clone() },
        ),
        (
            r#""model_type": "mistral", "rope_theta": 7, "rope_scaling": {"type": "default"},
               "partial_rotary_factor": 1.0"#,
            &Config { rope_theta: 7.0, ..mistral.clone() },
        ),
    ] {
        assert_eq!(&Config::from_json(&format!("{{{text}, {sizes}}}"))?, expected, "{text}");
    }
    Ok(())
}

#[test]
fn the_window_of_a_llama_is_ignored_with_a_warning() -> Result {
    let text = edited(&[("model_type", json!("llama"))])?;
    let events = logged(|| {
        assert_eq!(Config::from_json(&text)?.sliding_window, None);
        Ok(())
    })?;
    assert_eq!(events, ["WARN message=a llama has no sliding window: ignored sliding_window=4096"]);
    Ok(())
}

/// Mixtral 8x7B v0.1, as it is published in each format; without what has defaults, it is the same.
#[test]
fn mixtral() -> Result {
    let expected = Config {
        rope_theta: 1e6,
        sliding_window: None,
        experts: Some(Experts { num_local_experts: 8, num_experts_per_tok: 2 }),
        ..mistral_7b_v01()
    };
    let published = r#"{"architectures": ["MixtralForCausalLM"], "attention_dropout": 0.0,
        "bos_token_id": 1, "eos_token_id": 2, "hidden_act": "silu", "hidden_size": 4096,
        "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 32768,
        "model_type": "mixtral", "num_attention_heads": 32, "num_experts_per_tok": 2,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "num_local_experts": 8,
        "output_router_logits": false, "rms_norm_eps": 1e-05, "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.02, "sliding_window": null, "tie_word_embeddings": false,
        "torch_dtype": "bfloat16", "transformers_version": "4.36.0.dev0", "use_cache": true,
        "vocab_size": 32000}"#;
    assert_eq!(Config::from_json(published)?, expected);
    let sizes = r#"{"architectures": ["MixtralModel"], "vocab_size": 32000, "hidden_size": 4096,
        "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "max_position_embeddings": 32768}"#;
    assert_eq!(Config::from_json(sizes)?, expected);

    let params = r#"{"dim": 4096, "n_layers": 32, "head_dim": 128, "hidden_dim": 14336, "n_heads": 32,
        "n_kv_heads": 8, "norm_eps": 1e-05, "vocab_size": 32000,
        "moe": {"num_experts_per_tok": 2, "num_experts": 8}}"#;
    assert_eq!(Config::from_params_json(params)?, expected);

    let mut metadata: HashMap<_, _> = gguf_metadata(&expected).into_iter().collect();
    let expected = Config { rms_norm_eps: f64::from(1e-5f32), ..expected };
    assert_eq!(Config::from_gguf(&metadata)?, expected);
    metadata.insert("llama.expert_used_count".into(), Value::U32(9));
    assert_eq!(
        refusal(Config::from_gguf(&metadata)),
        "config field llama.expert_used_count: expected 1 to 8, the experts that there are, got 9"
    );
    for (field, value, expected) in [
        ("num_local_experts", 0, "num_local_experts: expected 1 to 2147483647, got 0"),
        (
            "num_experts_per_tok",
            0,
            "num_experts_per_tok: expected 1 to 8, the experts that there are, got 0",
        ),
        (
            "num_experts_per_tok",
            9,
            "num_experts_per_tok: expected 1 to 8, the experts that there are, got 9",
        ),
    ] {
        let mut file: serde_json::Value = serde_json::from_str(published)?;
        file[field] = json!(value);
        assert_eq!(
            refusal(Config::from_json(&file.to_string())),
            format!("config field {expected}")
        );
    }
    Ok(())
}

/// Each weight has a name, and as many as there are experts.
#[test]
fn weights_of_a_mixture() {
    let config = Config {
        num_hidden_layers: 1,
        experts: Some(Experts { num_local_experts: 3, num_experts_per_tok: 2 }),
        ..mistral_7b_v01()
    };
    let weights: HashMap<_, _> = config.weights().collect();
    assert_eq!(weights.len(), 2 + 6 + 1 + 3 * 3 + 1);
    let shape = |name: &str| {
        weights.get(&format!("model.layers.0.block_sparse_moe.{name}.weight")).cloned()
    };
    assert_eq!(shape("gate"), Some(vec![3, 4096]));
    for expert in 0..3 {
        for matrix in ["w1", "w3"] {
            assert_eq!(shape(&format!("experts.{expert}.{matrix}")), Some(vec![14336, 4096]));
        }
        assert_eq!(shape(&format!("experts.{expert}.w2")), Some(vec![4096, 14336]));
    }
}

#[test]
fn experts_of_anything_but_a_mixtral_are_ignored_with_a_warning() -> Result {
    let text = edited(&[("num_local_experts", json!(8)), ("num_experts_per_tok", json!(2))])?;
    let events = logged(|| {
        assert_eq!(Config::from_json(&text)?.experts, None);
        Ok(())
    })?;
    assert_eq!(
        events,
        ["WARN message=only a mixtral has experts: ignored num_local_experts=\"8\""]
    );
    let text = edited(&[("num_local_experts", json!(null))])?;
    let silent = logged(|| {
        assert_eq!(Config::from_json(&text)?.experts, None);
        Ok(())
    })?;
    assert!(silent.is_empty(), "{silent:?}");
    Ok(())
}

#[test]
fn params_json() -> Result {
    let v01 = r#"{"dim": 4096, "n_layers": 32, "head_dim": 128, "hidden_dim": 14336, "n_heads": 32,
        "n_kv_heads": 8, "norm_eps": 1e-05, "sliding_window": 4096, "vocab_size": 32000}"#;
    assert_eq!(Config::from_params_json(v01)?, mistral_7b_v01());
    let v03 = r#"{"dim": 4096, "n_layers": 32, "head_dim": 128, "hidden_dim": 14336, "n_heads": 32,
        "n_kv_heads": 8, "norm_eps": 1e-05, "vocab_size": 32768, "rope_theta": 1000000.0}"#;
    let expected =
        Config { vocab_size: 32768, rope_theta: 1e6, sliding_window: None, ..mistral_7b_v01() };
    assert_eq!(Config::from_params_json(v03)?, expected);
    let short = r#"{"dim": 64, "n_layers": 1, "hidden_dim": 8, "n_heads": 4, "norm_eps": 0,
        "vocab_size": 8, "max_seq_len": 99, "tied_embeddings": true, "moe": null}"#;
    let expected = Config {
        vocab_size: 8,
        hidden_size: 64,
        intermediate_size: 8,
        num_hidden_layers: 1,
        num_attention_heads: 4,
        num_key_value_heads: 4,
        head_dim: 16,
        rms_norm_eps: 0.0,
        rope_theta: 1e6,
        sliding_window: None,
        max_position_embeddings: 99,
        tie_word_embeddings: true,
        ..mistral_7b_v01()
    };
    assert_eq!(Config::from_params_json(short)?, expected);
    Ok(())
}

#[test]
fn gguf() -> Result {
    let expected = Config { rms_norm_eps: f64::from(1e-5f32), ..mistral_7b_v01() };
    let mut metadata: HashMap<_, _> = gguf_metadata(&expected).into_iter().collect();
    assert_eq!(Config::from_gguf(&metadata)?, expected);

    for key in ["vocab_size", "rope.freq_base", "attention.head_count_kv", "attention.key_length"] {
        metadata.remove(&format!("llama.{key}"));
    }
    let tokens = vec![Value::String("a".into()); 100];
    metadata.insert("tokenizer.ggml.tokens".into(), Value::Array(tokens));
    metadata.insert("tokenizer.ggml.eot_token_id".into(), Value::U32(99));
    metadata.insert("llama.rope.scaling.type".into(), Value::String("linear".into()));
    metadata.insert("llama.rope.scaling.factor".into(), Value::F32(1.0));
    metadata.insert("llama.expert_count".into(), Value::U32(0));
    metadata.insert("llama.attention.sliding_window".into(), Value::U64(0));
    let expected = Config {
        vocab_size: 100,
        num_key_value_heads: 32,
        sliding_window: None,
        eos_token_ids: vec![2, 99],
        ..expected
    };
    assert_eq!(Config::from_gguf(&metadata)?, expected);

    let mistral = metadata
        .into_iter()
        .map(|(key, value)| match key.strip_prefix("llama.") {
            Some(name) => (format!("mistral.{name}"), value),
            None if key == "general.architecture" => (key, Value::String("mistral".into())),
            None => (key, value),
        })
        .collect();
    assert_eq!(Config::from_gguf(&mistral)?, expected);
    Ok(())
}

#[test]
fn refused_in_config_json() -> Result {
    let layer_types = |kind: &str| {
        let mut kinds = vec!["sliding_attention"; 32];
        kinds[31] = kind;
        json!(kinds)
    };
    for (field, value, expected) in [
        ("model_type", json!("mistral4"), "unsupported model_type: mistral4"),
        (
            "model_type",
            json!("mistral3"),
            "config field text_config: expected an object, got nothing",
        ),
        ("model_type", json!("qwen2"), "unsupported model_type: qwen2"),
        ("model_type", json!(7), "config field model_type: expected a string, got 7"),
        ("rope_scaling", json!({"rope_type": "longrope"}), "unsupported rope scaling: longrope"),
        ("rope_scaling", json!({"rope_type": "su"}), "unsupported rope scaling: su"),
        (
            "rope_scaling",
            json!({"type": "linear"}),
            "config field rope_scaling.factor: expected a number, got nothing",
        ),
        (
            "rope_scaling",
            json!({"type": "linear", "factor": 0.5}),
            "config field rope_scaling.factor: expected 1 to 1000000, got 0.5",
        ),
        (
            "rope_scaling",
            json!({"type": "dynamic", "factor": "4"}),
            r#"config field factor: expected a number, got "4""#,
        ),
        (
            "rope_parameters",
            json!({"rope_type": "llama3", "factor": 8}),
            "config field rope_parameters.low_freq_factor: expected a number, got nothing",
        ),
        (
            "rope_parameters",
            json!({"rope_type": "llama3", "factor": 8, "low_freq_factor": 4, "high_freq_factor": 4}),
            "config field rope_scaling.high_freq_factor: expected more than low_freq_factor, 4, got 4",
        ),
        (
            "rope_parameters",
            json!({"rope_type": "yarn", "factor": 4, "beta_fast": -1}),
            "config field rope_scaling.beta_fast: expected above 0, at most 1000000, got -1",
        ),
        (
            "rope_parameters",
            json!({"rope_type": "yarn", "factor": 4, "rope_theta": 1}),
            "config field rope_theta: expected more than 1, for yarn, got 1",
        ),
        (
            "rope_parameters",
            json!({"rope_type": "yarn", "factor": 4, "original_max_position_embeddings": 0}),
            "config field rope_scaling.original_max_position_embeddings: expected 1 to 2147483647, got 0",
        ),
        (
            "rope_parameters",
            json!({"full_attention": {"rope_type": "default"}}),
            "unsupported rope scaling: per kind of layer: full_attention",
        ),
        (
            "rope_scaling",
            json!({"factor": 2}),
            "config field rope_scaling.rope_type: expected a string, got nothing",
        ),
        (
            "rope_scaling",
            json!("yarn"),
            r#"config field rope_scaling: expected an object, got "yarn""#,
        ),
        ("attention_bias", json!(true), "unsupported attention_bias: true"),
        ("mlp_bias", json!(true), "unsupported mlp_bias: true"),
        ("hidden_act", json!("gelu"), "unsupported hidden_act: gelu"),
        (
            "quantization_config",
            json!({"quant_method": "gptq", "bits": 4}),
            "unsupported quantization_config: gptq",
        ),
        (
            "quantization_config",
            json!({"quant_method": "fp8", "weight_block_size": [128]}),
            "config field weight_block_size: expected two sizes above 0, got [128]",
        ),
        (
            "quantization_config",
            json!({"quant_method": "compressed-tensors", "format": "pack-quantized"}),
            "unsupported compressed-tensors: pack-quantized",
        ),
        (
            "quantization_config",
            json!({"quant_method": "compressed-tensors", "format": "float-quantized", "config_groups":
                {"group_0": {"weights": {"num_bits": 4, "type": "float"}}}}),
            r#"unsupported compressed-tensors: group_0.weights: {"num_bits":4,"type":"float"}"#,
        ),
        ("partial_rotary_factor", json!(0.5), "unsupported partial_rotary_factor: 0.5"),
        (
            "rope_parameters",
            json!({"partial_rotary_factor": 0.25}),
            "unsupported partial_rotary_factor: 0.25",
        ),
        (
            "layer_types",
            layer_types("full_attention"),
            r#"unsupported layer_types: "sliding_attention" beside "full_attention""#,
        ),
        (
            "layer_types",
            json!(["full_attention"]),
            "config field layer_types: expected 32 kinds, got 1",
        ),
        (
            "hidden_size",
            json!("absent"),
            "config field hidden_size: expected a non-negative integer, got nothing",
        ),
        (
            "hidden_size",
            json!(null),
            "config field hidden_size: expected a non-negative integer, got nothing",
        ),
        (
            "hidden_size",
            json!(-4096),
            "config field hidden_size: expected a non-negative integer, got -4096",
        ),
        (
            "hidden_size",
            json!(4096.0),
            "config field hidden_size: expected a non-negative integer, got 4096.0",
        ),
        (
            "vocab_size",
            json!("32000"),
            r#"config field vocab_size: expected a non-negative integer, got "32000""#,
        ),
        ("vocab_size", json!(0), "config field vocab_size: expected 1 to 2147483647, got 0"),
        (
            "intermediate_size",
            json!(1u64 << 31),
            "config field intermediate_size: expected 1 to 2147483647, got 2147483648",
        ),
        (
            "num_hidden_layers",
            json!(0),
            "config field num_hidden_layers: expected 1 to 2147483647, got 0",
        ),
        (
            "num_attention_heads",
            json!(0),
            "config field num_attention_heads: expected 1 to 2147483647, got 0",
        ),
        (
            "num_key_value_heads",
            json!(0),
            "config field num_key_value_heads: expected 1 to 2147483647, got 0",
        ),
        (
            "num_key_value_heads",
            json!(5),
            "config field num_attention_heads: expected a multiple of the 5 key and value heads, got 32",
        ),
        (
            "num_attention_heads",
            json!(24),
            "config field hidden_size: expected a multiple of the 24 heads, as head_dim is not given, got 4096",
        ),
        ("head_dim", json!(63), "config field head_dim: expected an even number, got 63"),
        ("head_dim", json!(0), "config field head_dim: expected 1 to 2147483647, got 0"),
        (
            "rms_norm_eps",
            json!(-1e-5),
            "config field rms_norm_eps: expected 0 or more, below 1, got -0.00001",
        ),
        ("rms_norm_eps", json!(1), "config field rms_norm_eps: expected 0 or more, below 1, got 1"),
        (
            "rms_norm_eps",
            json!("1e-5"),
            r#"config field rms_norm_eps: expected a number, got "1e-5""#,
        ),
        (
            "rope_theta",
            json!(0),
            "config field rope_theta: expected a finite number above 0, got 0",
        ),
        ("rope_theta", json!([]), "config field rope_theta: expected a number, got []"),
        (
            "sliding_window",
            json!(0),
            "config field sliding_window: expected 1 to 2147483647, got 0",
        ),
        (
            "max_position_embeddings",
            json!(0),
            "config field max_position_embeddings: expected 1 to 2147483647, got 0",
        ),
        (
            "tie_word_embeddings",
            json!(1),
            "config field tie_word_embeddings: expected true or false, got 1",
        ),
        ("bos_token_id", json!("1"), r#"config field bos_token_id: expected a token id, got "1""#),
        (
            "eos_token_id",
            json!([2, "x"]),
            r#"config field eos_token_id: expected a token id or a list of them, got [2,"x"]"#,
        ),
    ] {
        let text = edited(&[(field, value)])?;
        assert_eq!(refusal(Config::from_json(&text)), expected);
    }
    // Tokens that the model has not are in no text.
    for (bos, eos) in [(json!(32000), json!([2, 40000])), (json!(-1), json!([-1, 2]))] {
        let text = edited(&[("bos_token_id", bos), ("eos_token_id", eos)])?;
        let config = Config::from_json(&text)?;
        assert_eq!((config.bos_token_id, config.eos_token_ids), (None, vec![2]));
    }
    let text = edited(&[
        ("vocab_size", json!(i32::MAX)),
        ("hidden_size", json!(i32::MAX)),
        ("head_dim", json!(2)),
    ])?;
    assert_eq!(
        refusal(Config::from_json(&text)),
        "config field vocab_size: expected weights that memory can address, \
         got 2147483647 x 1 x 2147483647 elements"
    );
    let text = edited(&[
        ("sliding_window", json!(null)),
        ("layer_types", json!(vec!["sliding_attention"; 32])),
    ])?;
    assert_eq!(
        refusal(Config::from_json(&text)),
        "config field sliding_window: expected a size, as every layer is sliding_attention, got nothing"
    );
    let text =
        edited(&[("model_type", json!("absent")), ("architectures", json!(["Phi3ForCausalLM"]))])?;
    assert_eq!(refusal(Config::from_json(&text)), "unsupported architecture: Phi3ForCausalLM");
    for (text, expected) in [
        (
            "{}",
            "config field model_type: expected mistral, mixtral, ministral3 or llama, got nothing",
        ),
        ("[1]", "config.json: expected a JSON object, got [1]"),
        ("", "config.json: not JSON: EOF while parsing a value at line 1 column 0"),
        (r#"{"rope_theta": NaN}"#, "config.json: not JSON: expected value at line 1 column 16"),
    ] {
        assert_eq!(refusal(Config::from_json(text)), expected);
    }
    Ok(())
}

#[test]
fn refused_in_params_json() -> Result {
    let file = json!({"dim": 64, "n_layers": 2, "hidden_dim": 96, "n_heads": 4, "n_kv_heads": 2,
        "norm_eps": 1e-5, "vocab_size": 32});
    for (field, value, expected) in [
        ("moe", json!(8), "config field moe: expected an object, got 8"),
        (
            "moe",
            json!({"num_experts": 8}),
            "config field moe.num_experts_per_tok: expected a non-negative integer, got nothing",
        ),
        (
            "moe",
            json!({"num_experts": 0, "num_experts_per_tok": 0}),
            "config field moe.num_experts: expected 1 to 2147483647, got 0",
        ),
        (
            "moe",
            json!({"num_experts": 8, "num_experts_per_tok": 9}),
            "config field moe.num_experts_per_tok: expected 1 to 8, the experts that there are, got 9",
        ),
        (
            "moe",
            json!({"num_experts": 8, "num_experts_per_tok": 2, "num_shared_experts": 1}),
            "unsupported moe.num_shared_experts: 1",
        ),
        ("num_experts", json!(8), "unsupported num_experts: 8"),
        (
            "yarn",
            json!({"factor": 4}),
            "config field yarn.original_max_position_embeddings: expected a number, got nothing",
        ),
        (
            "llama_4_scaling",
            json!({"original_max_position_embeddings": 4}),
            "config field llama_4_scaling.beta: expected a number, got nothing",
        ),
        (
            "llama_4_scaling",
            json!({"original_max_position_embeddings": 4, "beta": -0.1}),
            "config field llama_4_scaling.beta: expected 0 to 1000, got -0.1",
        ),
        (
            "quantization",
            json!({"qformat_weight": "int4"}),
            r#"unsupported quantization: {"qformat_weight":"int4"}"#,
        ),
        ("lora", json!({"rank": 8}), r#"unsupported lora: {"rank":8}"#),
        ("dim", json!(0), "config field dim: expected 1 to 2147483647, got 0"),
        (
            "dim",
            json!(66),
            "config field dim: expected a multiple of the 4 heads, as head_dim is not given, got 66",
        ),
        ("n_heads", json!(0), "config field n_heads: expected 1 to 2147483647, got 0"),
        (
            "n_kv_heads",
            json!(3),
            "config field n_heads: expected a multiple of the 3 key and value heads, got 4",
        ),
        ("norm_eps", json!(null), "config field norm_eps: expected a number, got nothing"),
        ("norm_eps", json!(-1), "config field norm_eps: expected 0 or more, below 1, got -1"),
        ("n_layers", json!(1.5), "config field n_layers: expected a non-negative integer, got 1.5"),
    ] {
        let mut file = file.clone();
        file[field] = value;
        assert_eq!(refusal(Config::from_params_json(&file.to_string())), expected);
    }
    assert_eq!(
        refusal(Config::from_params_json("dim = 64")),
        "params.json: not JSON: expected value at line 1 column 1"
    );
    Ok(())
}

#[test]
fn refused_in_gguf_metadata() -> Result {
    let metadata: HashMap<_, _> = gguf_metadata(&mistral_7b_v01()).into_iter().collect();
    let text = |text: &str| Some(Value::String(text.into()));
    let number = |number: u32| Some(Value::U32(number));
    for (key, value, expected) in [
        ("general.architecture", text("qwen2"), "unsupported general.architecture: qwen2"),
        (
            "general.architecture",
            None,
            "config field general.architecture: expected a string, got nothing",
        ),
        (
            "general.architecture",
            number(1),
            "config field general.architecture: expected a string, got U32(1)",
        ),
        (
            "llama.expert_count",
            number(8),
            "config field llama.expert_used_count: expected a non-negative integer, got nothing",
        ),
        ("llama.rope.scaling.type", text("longrope"), "unsupported rope scaling: longrope"),
        (
            "llama.rope.scale_linear",
            Some(Value::F32(0.5)),
            "config field llama.rope.scaling.factor: expected 1 to 1000000, got 0.5",
        ),
        (
            "llama.rope.scaling.type",
            number(0),
            "config field llama.rope.scaling.type: expected a string, got U32(0)",
        ),
        (
            "llama.rope.dimension_count",
            number(64),
            "config field llama.rope.dimension_count: expected the head size of 128, got 64",
        ),
        (
            "llama.attention.value_length",
            number(64),
            "config field llama.attention.value_length: expected the head size of 128, got 64",
        ),
        (
            "llama.block_count",
            None,
            "config field llama.block_count: expected a non-negative integer, got nothing",
        ),
        (
            "llama.block_count",
            number(0),
            "config field llama.block_count: expected 1 to 2147483647, got 0",
        ),
        (
            "llama.block_count",
            Some(Value::I32(-1)),
            "config field llama.block_count: expected a non-negative integer, got I32(-1)",
        ),
        (
            "llama.vocab_size",
            None,
            "config field llama.vocab_size: expected a non-negative integer, got nothing",
        ),
        (
            "llama.attention.head_count_kv",
            Some(Value::Array(vec![Value::U32(8); 32])),
            "config field llama.attention.head_count_kv: expected a non-negative integer, got an array of 32",
        ),
        (
            "llama.attention.head_count_kv",
            number(7),
            "config field llama.attention.head_count: expected a multiple of the 7 key and value heads, got 32",
        ),
        (
            "llama.attention.layer_norm_rms_epsilon",
            None,
            "config field llama.attention.layer_norm_rms_epsilon: expected a number, got nothing",
        ),
        (
            "llama.attention.layer_norm_rms_epsilon",
            Some(Value::F32(f32::NAN)),
            "config field llama.attention.layer_norm_rms_epsilon: expected 0 or more, below 1, got NaN",
        ),
        (
            "llama.rope.freq_base",
            Some(Value::F32(f32::INFINITY)),
            "config field llama.rope.freq_base: expected a finite number above 0, got inf",
        ),
        (
            "llama.rope.freq_base",
            text("big"),
            r#"config field llama.rope.freq_base: expected a number, got String("big")"#,
        ),
        (
            "tokenizer.ggml.eos_token_id",
            Some(Value::Bool(true)),
            "config field tokenizer.ggml.eos_token_id: expected a token id, got Bool(true)",
        ),
    ] {
        let mut metadata = metadata.clone();
        match value {
            Some(value) => metadata.insert(key.into(), value),
            None => metadata.remove(key),
        };
        assert_eq!(refusal(Config::from_gguf(&metadata)), expected);
    }
    let mut yarn = metadata;
    yarn.insert("llama.rope.scaling.type".into(), Value::String("yarn".into()));
    yarn.insert("llama.rope.scaling.factor".into(), Value::F32(2.0));
    yarn.insert("llama.rope.scaling.yarn_ext_factor".into(), Value::F32(0.5));
    let expected = "unsupported llama.rope.scaling.yarn_ext_factor: 0.5";
    assert_eq!(refusal(Config::from_gguf(&yarn)), expected);
    Ok(())
}

#[test]
fn a_config_by_hand_is_checked_by_validate() -> Result {
    mistral_7b_v01().validate()?;
    let config = Config { rope_theta: f64::NAN, ..mistral_7b_v01() };
    assert_eq!(
        refusal(config.validate().map(|()| config.clone())),
        "config field rope_theta: expected a finite number above 0, got NaN"
    );
    Ok(())
}

/// What a file says is shown, but not all of it, and no command to the terminal.
#[test]
fn errors_are_short_and_plain() -> Result {
    let long = format!("{{\"model_type\": \"\\u001b[2J{}\"}}", "x".repeat(1 << 20));
    let error = Config::from_json(&long).err().ok_or("accepted")?.to_string();
    assert!(error.starts_with("unsupported model_type: \\u{1b}[2Jxxx"), "{error}");
    assert!(error.ends_with("xx…") && error.len() < 1000, "{}", error.len());
    Ok(())
}
