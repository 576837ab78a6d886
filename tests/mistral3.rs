//! Mistral Small 3 and Ministral 3 as they are published: models that see images, whose text part is read.

mod common;

use std::collections::{BTreeMap, HashMap};
use std::fs;

use candle_core::quantized::gguf_file::Value;
use candle_core::{DType, Device, Tensor};
use hybrid_attention::load::Checkpoint;
use hybrid_attention::model::{Transformer, Weights};
use hybrid_attention::{Config, QueryScaling, RopeScaling};
use serde_json::json;

use common::{Result, assert_identical, gguf_metadata, logged, tiny};

/// The shape and scaling of Ministral 3 8B.
fn ministral_8b() -> Config {
    Config {
        vocab_size: 131_072,
        hidden_size: 4096,
        intermediate_size: 14336,
        num_hidden_layers: 34,
        num_attention_heads: 32,
        num_key_value_heads: 8,
        head_dim: 128,
        rms_norm_eps: 1e-5,
        rope_theta: 1e6,
        sliding_window: None,
        max_position_embeddings: 262_144,
        tie_word_embeddings: false,
        rope_scaling: Some(RopeScaling::Yarn {
            factor: 16.0,
            original_max_position_embeddings: 16384,
            beta_fast: 32.0,
            beta_slow: 1.0,
            truncate: true,
            attention_factor: 1.0,
        }),
        query_scaling: Some(QueryScaling { beta: 0.1, original_max_position_embeddings: 16384 }),
        experts: None,
        bos_token_id: Some(1),
        eos_token_ids: vec![2],
    }
}

const TEXT: &str = r#""head_dim": 128, "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336,
    "max_position_embeddings": 262144, "model_type": "ministral3", "num_attention_heads": 32,
    "num_hidden_layers": 34, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
    "rope_parameters": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 16.0, "llama_4_scaling_beta": 0.1,
        "mscale": 1.0, "mscale_all_dim": 1.0, "original_max_position_embeddings": 16384,
        "rope_theta": 1000000.0, "rope_type": "yarn", "type": "yarn"},
    "sliding_window": null, "vocab_size": 131072"#;

fn wrapped(text: &str, beside: &str) -> String {
    format!(
        r#"{{"architectures": ["Mistral3ForConditionalGeneration"], "image_token_index": 10,
        "model_type": "mistral3", "projector_hidden_act": "gelu", "spatial_merge_size": 2,
        "text_config": {{{text}}}, "vision_config": {{"model_type": "pixtral", "head_dim": 64}}{beside}}}"#
    )
}

#[test]
fn ministral_3_in_all_spellings() -> Result {
    let expected = ministral_8b();
    let quantized = r#", "tie_word_embeddings": false, "quantization_config": {"activation_scheme": "static",
        "dequantize": false, "modules_to_not_convert": ["lm_head"], "quant_method": "fp8",
        "weight_block_size": null}"#;
    assert_eq!(Config::from_json(&wrapped(TEXT, quantized))?, expected);
    assert_eq!(Config::from_json(&format!("{{{TEXT}}}"))?, expected);
    // what `Ministral3Config` takes where a file says nothing
    let short = r#"{"architectures": ["Ministral3ForCausalLM"], "vocab_size": 131072, "hidden_size": 4096,
        "intermediate_size": 14336, "num_hidden_layers": 34, "num_attention_heads": 32}"#;
    assert_eq!(Config::from_json(short)?, expected);

    let params = r#"{"dim": 4096, "n_layers": 34, "head_dim": 128, "hidden_dim": 14336, "n_heads": 32,
        "n_kv_heads": 8, "rope_theta": 1000000.0, "norm_eps": 1e-05, "vocab_size": 131072,
        "tied_embeddings": false, "max_position_embeddings": 262144, "use_biases": false,
        "llama_4_scaling": {"original_max_position_embeddings": 16384, "beta": 0.1},
        "quantization": {"qformat_weight": "fp8_e4m3", "qscheme_act": "TENSOR"},
        "yarn": {"original_max_position_embeddings": 16384, "factor": 16, "apply_scale": false,
            "beta": 32, "alpha": 1},
        "vision_encoder": {"image_token_id": 10, "hidden_size": 1024}}"#;
    assert_eq!(Config::from_params_json(params)?, expected);

    let mut metadata: HashMap<_, _> = gguf_metadata(&expected)
        .into_iter()
        .map(|(key, value)| (key.replace("llama.", "mistral3."), value))
        .collect();
    let number = |value: f32| Value::F32(value);
    for (key, value) in [
        ("general.architecture", Value::String("mistral3".into())),
        ("mistral3.rope.scaling.type", Value::String("yarn".into())),
        ("mistral3.rope.scaling.factor", number(16.0)),
        ("mistral3.rope.scaling.yarn_beta_fast", number(32.0)),
        ("mistral3.rope.scaling.yarn_beta_slow", number(1.0)),
        ("mistral3.rope.scaling.yarn_log_multiplier", number(1.0)),
        ("mistral3.rope.scaling.original_context_length", Value::U32(16384)),
        ("mistral3.attention.temperature_scale", number(0.1)),
    ] {
        metadata.insert(key.into(), value);
    }
    let beta = f64::from(0.1f32);
    let expected = Config {
        rms_norm_eps: f64::from(1e-5f32),
        query_scaling: Some(QueryScaling { beta, original_max_position_embeddings: 16384 }),
        ..expected
    };
    assert_eq!(Config::from_gguf(&metadata)?, expected);
    Ok(())
}

#[test]
fn small_3_1_says_little_more_than_its_sizes() -> Result {
    let text = r#""head_dim": 128, "hidden_act": "silu", "hidden_size": 5120, "intermediate_size": 32768,
        "max_position_embeddings": 131072, "model_type": "mistral", "num_attention_heads": 32,
        "num_hidden_layers": 40, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 1000000000.0,
        "sliding_window": null, "vocab_size": 131072"#;
    let expected = Config {
        hidden_size: 5120,
        intermediate_size: 32768,
        num_hidden_layers: 40,
        rope_theta: 1e9,
        max_position_embeddings: 131_072,
        tie_word_embeddings: true, // as transformers has it, until a head is found
        rope_scaling: None,
        query_scaling: None,
        ..ministral_8b()
    };
    assert_eq!(Config::from_json(&wrapped(text, ""))?, expected);
    // the text part of a Llava is a Llama unless it says otherwise
    let llava =
        wrapped(text, "").replace(r#""model_type": "mistral3""#, r#""model_type": "llava""#);
    assert_eq!(
        Config::from_json(&llava)?,
        Config { tie_word_embeddings: false, ..expected.clone() }
    );
    let llama = llava.replace(r#""model_type": "mistral", "#, "").replace("131072,", "99,");
    let positions = Config::from_json(&llama)?.max_position_embeddings;
    assert_eq!(positions, 99);
    // tokens may be said on either side
    let tokens = wrapped(text, r#", "bos_token_id": 3, "eos_token_id": [4, 5]"#);
    let said = Config { bos_token_id: Some(3), eos_token_ids: vec![4, 5], ..expected };
    assert_eq!(Config::from_json(&tokens)?, said);
    Ok(())
}

#[test]
fn attention_factors_are_those_of_transformers() -> Result {
    let factor = |fields: &str| -> Result<f64> {
        let rope = format!(r#"{{"rope_type": "yarn", "factor": 16.0{fields}}}"#);
        let text = format!(
            r#"{{"model_type": "mistral", "vocab_size": 8, "hidden_size": 8, "intermediate_size": 8,
            "num_hidden_layers": 1, "num_attention_heads": 8, "head_dim": 4, "rope_scaling": {rope}}}"#
        );
        match Config::from_json(&text)?.rope_scaling {
            Some(RopeScaling::Yarn { attention_factor, .. }) => Ok(attention_factor),
            other => Err(format!("{other:?}").into()),
        }
    };
    let log = 16f64.ln();
    let close =
        |got: f64, expected: f64| assert!((got - expected).abs() < 1e-12, "{got} {expected}");
    close(factor("")?, 0.1 * log + 1.0);
    close(factor(r#", "attention_factor": 1.5"#)?, 1.5);
    close(factor(r#", "mscale": 1.0, "mscale_all_dim": 1.0"#)?, 1.0);
    close(
        factor(r#", "mscale": 0.7, "mscale_all_dim": 1.4"#)?,
        (0.07 * log + 1.0) / (0.14 * log + 1.0),
    );
    // both or neither, and 0 is neither
    close(factor(r#", "mscale": 0.7"#)?, 0.1 * log + 1.0);
    close(factor(r#", "mscale": 0.7, "mscale_all_dim": 0"#)?, 0.1 * log + 1.0);
    Ok(())
}

#[test]
fn a_scaled_model_reads_its_scaled_length() -> Result {
    let positions = |rope: &str, beside: &str| -> Result<(usize, Option<RopeScaling>)> {
        let text = format!(
            r#"{{"model_type": "mistral", "vocab_size": 8, "hidden_size": 8, "intermediate_size": 8,
            "num_hidden_layers": 1, "num_attention_heads": 8, "head_dim": 4, "rope_scaling": {{{rope}}},
            "max_position_embeddings": 1000{beside}}}"#
        );
        let config = Config::from_json(&text)?;
        Ok((config.max_position_embeddings, config.rope_scaling))
    };
    let dynamic = positions(r#""type": "dynamic", "factor": 2.5"#, "")?;
    let scaling = RopeScaling::Dynamic { factor: 2.5, original_max_position_embeddings: 1000 };
    assert_eq!(dynamic, (2500, Some(scaling)));
    let yarn = r#""type": "yarn", "factor": 4.0, "original_max_position_embeddings": 500"#;
    assert_eq!(positions(yarn, "")?.0, 2000);
    // beside the dictionary goes before inside it
    assert_eq!(positions(yarn, r#", "original_max_position_embeddings": 100"#)?.0, 1000);
    assert_eq!(positions(r#""type": "linear", "factor": 4.0"#, "")?.0, 1000);
    Ok(())
}

#[test]
fn only_ministral_3_scales_its_queries() -> Result {
    let text = format!("{{{TEXT}}}").replace("ministral3", "mistral");
    let events = logged(|| {
        assert_eq!(Config::from_json(&text)?, Config { query_scaling: None, ..ministral_8b() });
        Ok(())
    })?;
    let expected =
        "WARN message=only ministral3 scales its queries: llama_4_scaling_beta is ignored beta=0.1";
    assert_eq!(events, [expected]);
    Ok(())
}

fn text_of_tiny(tied: Option<bool>) -> serde_json::Value {
    let config = tiny::config();
    let mut text = json!({"model_type": "mistral", "sliding_window": null, "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size, "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers, "head_dim": config.head_dim,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads});
    if let Some(tied) = tied {
        text["tie_word_embeddings"] = tied.into();
    }
    text
}

type Spelling = fn(&str) -> String;

/// As published, as classes of transformers 5 call their parameters, and as the base class is saved.
const SPELLINGS: [Spelling; 3] = [
    |name| format!("language_model.{name}"),
    |name| match name.strip_prefix("model.") {
        Some(rest) => format!("model.language_model.{rest}"),
        None => name.to_string(),
    },
    |name| match name.strip_prefix("model.") {
        Some(rest) => format!("language_model.{rest}"),
        None => name.to_string(),
    },
];

/// Opens `tensors` so spelled, with a tensor of the part that sees; what it warns of.
fn open(
    tensors: &BTreeMap<String, Tensor>,
    spell: Spelling,
    config: &serde_json::Value,
) -> Result<(Config, BTreeMap<String, Tensor>, Vec<String>)> {
    let folder = tempfile::tempdir()?;
    let mut stored: HashMap<_, _> =
        tensors.iter().map(|(name, tensor)| (spell(name), tensor.clone())).collect();
    let prefix = if stored.keys().any(|name| name.starts_with("model.")) { "model." } else { "" };
    for name in
        ["vision_tower.a.weight", "vision_tower.b.weight", "multi_modal_projector.norm.weight"]
    {
        stored.insert(format!("{prefix}{name}"), Tensor::ones(3, DType::F32, &Device::Cpu)?);
    }
    candle_core::safetensors::save(&stored, folder.path().join("model.safetensors"))?;
    fs::write(folder.path().join("config.json"), config.to_string())?;
    let mut read = (tiny::config(), BTreeMap::new());
    let events = logged(|| {
        let checkpoint = Checkpoint::open(folder.path())?;
        let mut weights = checkpoint.weights(None, &Device::Cpu);
        read.0 = checkpoint.config().clone();
        for (name, shape) in checkpoint.config().weights() {
            read.1.insert(name.clone(), weights.tensor(&name, &shape)?);
        }
        weights.finish()?;
        Transformer::new(checkpoint.config(), &mut checkpoint.weights(None, &Device::Cpu))?;
        Ok(())
    })?;
    let events = events.into_iter().map(|it| it.replace(&folder.path().display().to_string(), ""));
    Ok((read.0, read.1, events.collect()))
}

#[test]
fn the_text_part_is_found_under_all_its_names() -> Result {
    let all: BTreeMap<_, _> = tiny::weights(&tiny::config(), 9)?.into_iter().collect();
    for spell in SPELLINGS {
        // a head that is there is used, whatever the file says
        for beside in [None, Some(true), Some(false)] {
            let mut config = json!({"model_type": "mistral3", "text_config": text_of_tiny(None)});
            if let Some(tied) = beside {
                config["tie_word_embeddings"] = tied.into();
            }
            let (config, read, events) = open(&all, spell, &config)?;
            assert!(!config.tie_word_embeddings);
            assert_eq!(read.len(), all.len());
            for (name, tensor) in &read {
                assert_identical(name, tensor, &all[name])?;
            }
            let prefix = if spell("model.norm").starts_with("model.") { "model." } else { "" };
            let expected = [
                "WARN message=only the text part of this model is read model_type=\"mistral3\""
                    .into(),
                format!(
                    "WARN message=tensor not used name=\"{prefix}multi_modal_projector.norm.weight\" \
                     file=\"/model.safetensors\""
                ),
                format!("WARN message=tensors not used names=\"{prefix}vision_tower.*\" count=2"),
            ];
            assert_eq!(events, expected);
        }
        // one that is not there is the embedding table
        let mut headless = all.clone();
        headless.remove("lm_head.weight");
        for (inside, beside) in [(None, None), (Some(true), None), (Some(false), Some(true))] {
            let mut config = json!({"model_type": "mistral3", "text_config": text_of_tiny(inside)});
            if let Some(tied) = beside {
                config["tie_word_embeddings"] = json!(tied);
            }
            let (config, read, _) = open(&headless, spell, &config)?;
            assert!(config.tie_word_embeddings);
            assert_eq!(read.len(), headless.len());
        }
    }
    Ok(())
}

/// A tensor in the place of the text model's own is never left out.
#[test]
fn a_stray_weight_of_the_text_part_is_refused() -> Result {
    for (spell, name) in SPELLINGS.into_iter().zip([
        "language_model.model.layers.0.self_attn.q_proj.bias",
        "model.language_model.layers.0.self_attn.q_proj.bias",
        "language_model.layers.0.self_attn.q_proj.bias",
    ]) {
        let mut all: BTreeMap<_, _> = tiny::weights(&tiny::config(), 9)?.into_iter().collect();
        let own = "model.layers.0.self_attn.q_proj.bias".to_string();
        all.insert(own, Tensor::ones(3, DType::F32, &Device::Cpu)?);
        let config = json!({"model_type": "mistral3", "text_config": text_of_tiny(None)});
        let error = open(&all, spell, &config).err().ok_or("accepted")?.to_string();
        assert!(error.starts_with(&format!("weight {name} in ")), "{error}");
        assert!(error.ends_with("this architecture has no such weight"), "{error}");
    }
    Ok(())
}
