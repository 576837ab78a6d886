//! Checkpoints as people have them, and as nobody should send them: what no computation touches keeps no
//! model from loading, and what would starve the program that loads it is refused by name.
//!
//! `fixtures/cases` holds random Mistrals of two layers; what they answer is as transformers 4.57 and
//! llama.cpp give it.

mod common;

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::Write;
use std::path::Path;
use std::time::Instant;

use candle_core::{Device, Tensor};
use hybrid_attention::load::Checkpoint;
use hybrid_attention::{
    EmbedConfig, Error, GenerationConfig, HybridModel, Pooling, Sight, WeightType,
};
use serde_json::{Value, json};

use common::{Result, fixture, logged};

/// What "the cat" is, and what follows it.
const PROMPT: [u32; 3] = [1, 315, 296];
const ANSWER: [u32; 4] = [305, 79, 72, 365];

/// The control with other files in place of its own, or beside them.
fn folder(files: &[(&str, Vec<u8>)]) -> Result<tempfile::TempDir> {
    let folder = tempfile::tempdir()?;
    for entry in fs::read_dir(fixture("cases/plain"))? {
        let path = entry?.path();
        fs::copy(&path, folder.path().join(path.file_name().unwrap_or_default()))?;
    }
    for (name, content) in files {
        fs::write(folder.path().join(name), content)?;
    }
    Ok(folder)
}

fn plain(name: &str) -> Result<Value> {
    Ok(serde_json::from_slice(&fs::read(fixture("cases/plain").join(name))?)?)
}

/// `config.json` with other fields.
fn config(fields: &Value) -> Result<(&'static str, Vec<u8>)> {
    let mut config = plain("config.json")?;
    for (field, value) in fields.as_object().into_iter().flatten() {
        config[field] = value.clone();
    }
    Ok(("config.json", config.to_string().into_bytes()))
}

fn load(path: &Path) -> hybrid_attention::Result<HybridModel> {
    HybridModel::open(path, WeightType::Stored, &Device::Cpu)
}

fn refusal<T>(result: hybrid_attention::Result<T>) -> String {
    match result {
        Ok(_) => "accepted".to_string(),
        Err(error) => error.to_string(),
    }
}

/// Loads, and answers as the control does.
fn answers(path: &Path) -> Result {
    let model = load(path)?;
    let how = model.generation_config().max_tokens(4);
    let answer = model.generate("the cat", &how)?;
    assert_eq!((answer.prompt_ids.as_slice(), answer.ids.as_slice()), (&PROMPT[..], &ANSWER[..]));
    Ok(())
}

/// The same, and something is said about `what`.
fn answers_and_warns(path: &Path, what: &str) -> Result {
    let log = logged(|| answers(path))?;
    assert!(
        log.iter().any(|event| event.starts_with("WARN") && event.contains(what)),
        "{what}: {log:?}"
    );
    Ok(())
}

fn assert_near(got: &[f32], expected: &[f32]) {
    for (got, expected) in got.iter().zip(expected) {
        assert!((got - expected).abs() < 2e-5, "{got} {expected}");
    }
}

fn first(vectors: &Tensor) -> Result<Vec<f32>> {
    Ok(vectors.to_vec2::<f32>()?.concat())
}

#[test]
fn the_control_answers() -> Result {
    answers(folder(&[])?.path())
}

#[test]
fn a_base_class_embeds_and_says_that_it_has_no_head() -> Result {
    let base = fs::read(fixture("cases/base/model.safetensors"))?;
    let with_prefix =
        folder(&[("model.safetensors", fs::read(fixture("cases/plain/model.safetensors"))?)])?;
    let path = with_prefix.path().join("model.safetensors");
    let mut tensors = candle_core::safetensors::load(&path, &Device::Cpu)?;
    tensors.remove("lm_head.weight");
    tensors.insert("score.weight".into(), tensors["model.norm.weight"].clone());
    candle_core::safetensors::save(&tensors, &path)?;
    let without_prefix = folder(&[
        ("model.safetensors", base),
        config(&json!({ "architectures": ["MistralModel"] }))?,
    ])?;
    for folder in [&without_prefix, &with_prefix] {
        let model = load(folder.path())?;
        let both_ways = EmbedConfig::default().pooling(Pooling::Mean).sight(Sight::Bidirectional);
        let vectors = model.embed(&["the cat"], &both_ways)?;
        assert_near(&first(&vectors)?, &[0.1745, -0.12399, 0.3972, 0.16472, 0.33954, 0.1442]);
        let last = EmbedConfig::default().pooling(Pooling::LastToken).sight(Sight::Causal);
        let vectors = model.embed(&["the cat</s>"], &last)?;
        assert_near(&first(&vectors)?, &[0.04416, -0.04613, 0.26208, 0.22004, 0.24996, 0.13789]);

        assert!(!model.transformer().has_head());
        let refused = model.stream("the cat", &GenerationConfig::default());
        assert!(matches!(refused, Err(Error::NoHead { needed_for: "generating" })));
        let xs = model.transformer().embed_ids(&PROMPT)?;
        assert!(matches!(model.transformer().logits(&xs), Err(Error::NoHead { .. })));
        let many = model.generate_many(["the cat"], &GenerationConfig::default())?;
        assert!(many.into_iter().all(|answer| format!("{answer:?}").contains("NoHead")));
    }
    Ok(())
}

#[test]
fn a_tokenizer_may_have_more_tokens_than_the_table() -> Result {
    let mut tokenizer = plain("tokenizer.json")?;
    let pad = json!({ "id": 371, "content": "<pad>", "single_word": false, "lstrip": false,
        "rstrip": false, "normalized": false, "special": true });
    tokenizer["added_tokens"].as_array_mut().ok_or("no list")?.push(pad);
    let folder = folder(&[
        ("tokenizer.json", tokenizer.to_string().into_bytes()),
        config(&json!({ "pad_token_id": 371 }))?,
    ])?;
    answers_and_warns(folder.path(), "the tokenizer has tokens that the model has not")?;
    let model = load(folder.path())?;
    let refused = model.generate("the cat<pad>", &GenerationConfig::default());
    assert!(matches!(refused, Err(Error::TokenOutOfRange { id: 371, position: 3, .. })));
    let Err(Error::InText { text: 1, source }) =
        model.embed(&["the cat", "<pad>"], &EmbedConfig::default())
    else {
        return Err("embedded".into());
    };
    assert!(matches!(*source, Error::TokenOutOfRange { id: 371, .. }));
    Ok(())
}

#[test]
fn special_tokens_that_the_model_has_not_are_passed_over() -> Result {
    for ids in [
        json!({ "bos_token_id": -1, "eos_token_id": -1, "pad_token_id": -1 }),
        json!({ "bos_token_id": 371, "eos_token_id": [2, 32000], "pad_token_id": 32000 }),
        json!({ "eos_token_id": u64::MAX }),
    ] {
        answers_and_warns(folder(&[config(&ids)?])?.path(), "eos_token_id")?;
    }
    let path = fixture("cases/pad_4294967295.gguf");
    answers_and_warns(&path, "tokenizer.ggml.padding_token_id")
}

#[test]
fn an_index_may_name_what_no_shard_holds_unless_it_is_needed() -> Result {
    let names = ["model.embed_tokens.weight", "model.layers.0.self_attn.rotary_emb.inv_freq"];
    let index = |names: &[&str]| {
        let map: HashMap<_, _> = names.iter().map(|name| (*name, "shard.safetensors")).collect();
        json!({ "weight_map": map }).to_string().into_bytes()
    };
    let folder = folder(&[("model.safetensors.index.json", index(&names))])?;
    let (whole, shard) =
        (folder.path().join("model.safetensors"), folder.path().join("shard.safetensors"));
    fs::rename(whole, &shard)?;
    answers_and_warns(folder.path(), names[1])?;

    let mut tensors = candle_core::safetensors::load(&shard, &Device::Cpu)?;
    tensors.remove("model.norm.weight");
    candle_core::safetensors::save(&tensors, &shard)?;
    let missing = load(folder.path());
    assert!(
        matches!(missing, Err(Error::MissingWeight { name, .. }) if name == "model.norm.weight")
    );
    Ok(())
}

#[test]
fn rope_scaling_by_one_is_none() -> Result {
    for scaling in [
        json!({ "type": "linear", "factor": 1.0 }),
        json!({ "rope_type": "dynamic", "factor": 1 }),
        json!({ "rope_type": "llama3", "factor": 1.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192 }),
        json!({ "rope_type": "yarn", "factor": 1.0, "beta_fast": 32.0 }),
    ] {
        let folder = folder(&[config(&json!({ "rope_scaling": scaling }))?])?;
        answers_and_warns(folder.path(), "rope scaling")?;
    }
    for scaling in [
        json!({ "type": "linear", "factor": 1.5 }),
        json!({ "rope_type": "yarn", "factor": 1.0, "attention_factor": 1.1 }),
        json!({ "rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 128 }),
    ] {
        let folder = folder(&[config(&json!({ "rope_scaling": scaling }))?])?;
        assert!(load(folder.path())?.config().rope_scaling.is_some(), "{scaling}");
    }
    for scaling in [json!({ "type": "linear" }), json!({ "rope_type": "longrope", "factor": 2.0 })]
    {
        let folder = folder(&[config(&json!({ "rope_scaling": scaling }))?])?;
        let refused = load(folder.path());
        let is_named = matches!(refused, Err(Error::Config { .. } | Error::Unsupported { .. }));
        assert!(is_named, "{scaling}");
    }
    Ok(())
}

#[test]
fn generation_defaults_that_nothing_uses_are_passed_over() -> Result {
    let of = |json: &str| folder(&[("generation_config.json", json.as_bytes().to_vec())]);
    for json in [
        r#"{"do_sample": false, "top_k": -1}"#,
        r#"{"top_k": 50.0}"#,
        r#"{"do_sample": false, "top_p": 0.0}"#,
        r#"{"top_k": -3, "temperature": "warm"}"#,
        r#"{"eos_token_id": -1, "bos_token_id": -1}"#,
        r#"{"eos_token_id": [2, 32000]}"#,
        r#"{"eos_token_id": [32000]}"#,
        // Of nothing, the likeliest is left.
        r#"{"do_sample": true, "top_p": 0.0}"#,
        r#"{"do_sample": true, "top_k": 1.0}"#,
    ] {
        answers(of(json)?.path())?;
    }
    let eos =
        |json| Ok::<_, Box<dyn std::error::Error>>(load(of(json)?.path())?.eos_ids().to_vec());
    assert_eq!(eos(r#"{"eos_token_id": [300, 32000]}"#)?, [300]);
    assert_eq!(eos(r#"{"eos_token_id": 32000}"#)?, [2], "that of config.json");
    assert_eq!(eos(r#"{"eos_token_id": [3.0, -1]}"#)?, [3]);
    let all = load(of(r#"{"do_sample": true, "top_k": -1}"#)?.path())?.generation_config();
    let expected = GenerationConfig::default().temperature(1.0);
    assert_eq!(format!("{all:?}"), format!("{expected:?}"));
    for json in [r#"{"do_sample": true, "top_k": -3}"#, r#"{"do_sample": true, "top_p": -0.1}"#] {
        assert!(matches!(load(of(json)?.path()), Err(Error::Malformed { .. })), "{json}");
    }
    Ok(())
}

/// `ffn_up` of the first layer is in `IQ4_NL`; llama.cpp answers so.
#[test]
fn blocks_with_a_codebook_are_read() -> Result {
    let model = load(&fixture("cases/iq4_nl.gguf"))?;
    let config = GenerationConfig::default().max_tokens(4).temperature(0.0);
    assert_eq!(model.generate(PROMPT, &config)?.ids, [305, 299, 145, 333]);
    Ok(())
}

#[test]
fn a_tokenizer_of_another_kind_keeps_no_ids_from_being_answered() -> Result {
    let path = fixture("cases/deepseek_llm.gguf");
    let log = logged(|| {
        let model = load(&path)?;
        let answer = model.generate([1, 300], &GenerationConfig::default().max_tokens(2))?;
        assert_eq!(answer.ids.len(), 2);
        let of_text = "unsupported GGUF pre-tokenizer: deepseek-llm";
        assert_eq!(refusal(model.generate("the cat", &GenerationConfig::default())), of_text);
        assert_eq!(refusal(model.embed(&["the cat"], &EmbedConfig::default())), of_text);
        Ok(())
    })?;
    assert!(log.iter().any(|event| event.contains("deepseek-llm")), "{log:?}");
    Ok(())
}

#[test]
fn a_default_of_a_file_has_a_budget() -> Result {
    let of = |json: &Value| folder(&[("hybrid.json", json.to_string().into_bytes())]);
    let nudge = |steps: usize, directions: usize| json!({ "passes": 4, "refine": [{ "op": "forward_nudge", "steps": steps, "directions": directions }] });
    for (json, expected) in [
        (
            json!({ "passes": 1024, "refine": [{ "op": "forward_nudge", "steps": 1000, "directions": 1000 }] }),
            "parameter thinking: expected at most 1000 readings of the prompt, as the default of a \
             checkpoint, got passes x (1 + refine + halt) + output_nudge = 1024 x (1 + 2001001 + 0) + 0 = \
             2049026048",
        ),
        (
            json!({ "passes": 1024, "detail": "maps" }),
            "parameter detail: expected drift, as the default of a checkpoint, got Maps",
        ),
        (
            json!({ "passes": 1024 }),
            "parameter thinking: expected at most 1000 readings of the prompt, as the default of a \
             checkpoint, got passes x (1 + refine + halt) + output_nudge = 1024 x (1 + 1 + 0) + 0 = 2048",
        ),
        (
            json!({ "passes": 100, "rethink_every": 1, "halt": [{ "drift": 0.03 }] }),
            "parameter rethink_every: expected at most 100 readings for each new token, as the default of a \
             checkpoint, got passes x (1 + refine + halt) + output_nudge = 100 x (1 + 1 + 1) + 0 = 300 every 1",
        ),
    ] {
        let folder = of(&json)?;
        let path = folder.path().join("hybrid.json");
        assert_eq!(refusal(load(folder.path())), format!("{}: {expected}", path.display()));
        // What is asked for in code is the caller's own.
        hybrid_attention::Thinking::from_json(&json.to_string())?.validate()?;
    }
    for json in [
        nudge(8, 8),
        json!({ "passes": 4, "rethink_every": 1 }),
        json!({ "output_nudge": { "steps": 5 } }),
    ] {
        load(of(&json)?.path())?;
    }
    Ok(())
}

/// A GGUF header of this many arrays of so many zeros, in a file that is sparse from there on.
fn sparse_gguf(path: &Path, arrays: u64, len: u64) -> Result {
    let mut file = File::create(path)?;
    file.write_all(b"GGUF\x03\0\0\0")?;
    file.write_all(&[0u64.to_le_bytes(), arrays.to_le_bytes()].concat())?;
    let mut at = 24;
    for array in 0..arrays {
        use std::io::{Seek, SeekFrom};
        let key = format!("a{array}");
        file.seek(SeekFrom::Start(at))?;
        file.write_all(&[&(key.len() as u64).to_le_bytes(), key.as_bytes()].concat())?;
        file.write_all(
            &[&9u32.to_le_bytes()[..], &0u32.to_le_bytes(), &len.to_le_bytes()].concat(),
        )?;
        at += 8 + key.len() as u64 + 16 + len;
    }
    Ok(file.set_len(at)?)
}

#[test]
fn metadata_may_take_no_more_than_a_file_of_its_size_may() -> Result {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("sparse.gguf");
    sparse_gguf(&path, 16, 1 << 24)?;
    let start = Instant::now();
    let error = refusal(Checkpoint::open(&path));
    assert!(error.contains("a0: metadata up to") && error.contains("bytes of memory"), "{error}");
    sparse_gguf(&path, 16, 1 << 20)?;
    let error = refusal(Checkpoint::open(&path));
    assert!(error.contains(": metadata up to"), "{error}");
    assert!(start.elapsed().as_secs_f64() < 1.0, "{:?}", start.elapsed());
    // What is no more than the vocabulary of a real model is read.
    sparse_gguf(&path, 4, 300_000)?;
    assert!(refusal(Checkpoint::open(&path)).contains("general.architecture"));
    Ok(())
}

#[test]
fn a_text_of_a_checkpoint_has_a_bound() -> Result {
    for (name, most) in
        [("config.json", 64 << 20), ("tokenizer.json", 256 << 20), ("hybrid.json", 64 << 20)]
    {
        let folder = folder(&[(name, Vec::new())])?;
        let path = folder.path().join(name);
        File::options().write(true).open(&path)?.set_len(1 << 40)?;
        let expected =
            format!("{}: more than {most} bytes, which no such file has", path.display());
        assert_eq!(refusal(load(folder.path())), expected);
    }
    Ok(())
}

#[test]
fn a_head_is_no_wider_than_any_is() -> Result {
    let wide = config(&json!({ "head_dim": 1 << 20 }))?;
    let start = Instant::now();
    let expected = "config field head_dim: expected 1 to 16384, got 1048576";
    assert_eq!(refusal(load(folder(&[wide])?.path())), expected);
    assert!(start.elapsed().as_secs_f64() < 1.0);
    Ok(())
}

#[test]
fn a_tokenizer_lets_a_text_grow_within_bounds() -> Result {
    let mut tokenizer = plain("tokenizer.json")?;
    let doubles = json!({ "type": "Replace", "pattern": { "String": "a" }, "content": "aa" });
    tokenizer["normalizer"] = json!({ "type": "Sequence", "normalizers": vec![doubles; 40] });
    let folder = folder(&[("tokenizer.json", tokenizer.to_string().into_bytes())])?;
    let start = Instant::now();
    assert_eq!(
        refusal(load(folder.path())),
        "config field normalizer of tokenizer.json: expected steps that make a text at most 64 times as \
         long, got 1099511627776 times by 40 Replace"
    );
    assert!(start.elapsed().as_secs_f64() < 1.0);
    Ok(())
}

/// What a mapping cannot stand: the file is cut short once it is open.
#[test]
fn a_checkpoint_that_was_read_does_not_need_its_files() -> Result {
    let folder = folder(&[])?;
    let checkpoint = Checkpoint::read(folder.path())?;
    File::options().write(true).open(folder.path().join("model.safetensors"))?.set_len(1)?;
    let model = HybridModel::from_checkpoint(&checkpoint, None, &Device::Cpu, |_, _| ())?;
    assert_eq!(model.generate(PROMPT, &GenerationConfig::default().max_tokens(4))?.ids, ANSWER);
    assert!(matches!(
        HybridModel::read(folder.path(), None, &Device::Cpu),
        Err(Error::Malformed { .. })
    ));
    answers(&fixture("cases/plain"))?;
    let model = HybridModel::read(fixture("cases/plain"), None, &Device::Cpu)?;
    assert_eq!(model.generate("the cat", &GenerationConfig::default().max_tokens(4))?.ids, ANSWER);
    Ok(())
}
