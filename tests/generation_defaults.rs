//! What a checkpoint's files say about generation reaches the model that is loaded from them.

use std::error::Error;
use std::fs;
use std::path::Path;

use candle_core::Device;
use hybrid_attention::{GenerationConfig, HybridModel, Prompt};

type Result<T = ()> = std::result::Result<T, Box<dyn Error>>;

const FIXTURES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures");

/// A checkpoint of 128 tokens, whose configuration says that 2 ends a text.
fn folder(files: &[(&str, &str)]) -> Result<tempfile::TempDir> {
    let folder = tempfile::tempdir()?;
    for file in ["config.json", "model.safetensors"] {
        fs::copy(format!("{FIXTURES}/head_dim/{file}"), folder.path().join(file))?;
    }
    for (file, content) in files {
        fs::write(folder.path().join(file), content)?;
    }
    Ok(folder)
}

fn load(path: &Path) -> hybrid_attention::Result<HybridModel> {
    HybridModel::from_folder(path, None, &Device::Cpu)
}

fn with_defaults(json: &str) -> Result<HybridModel> {
    Ok(load(folder(&[("generation_config.json", json)])?.path())?)
}

fn assert_config(model: &HybridModel, expected: &GenerationConfig) {
    assert_eq!(format!("{:?}", model.generation_config()), format!("{expected:?}"));
}

#[test]
fn sampling_values_count_where_the_file_says_to_sample() -> Result {
    let values = r#""temperature": 0.6, "top_k": 7, "top_p": 0.9, "min_p": 0.02"#;
    let sampled = GenerationConfig::default().temperature(0.6).top_k(7).top_p(0.9).min_p(0.02);
    assert_config(&with_defaults(&format!(r#"{{"do_sample": true, {values}}}"#))?, &sampled);
    // What the file leaves out is as in transformers.
    let bare = GenerationConfig::default().temperature(1.0).top_k(50);
    assert_config(&with_defaults(r#"{"do_sample": true}"#)?, &bare);
    for not in [r#""do_sample": false,"#, r#""do_sample": null,"#, ""] {
        let model = with_defaults(&format!("{{{not} {values}}}"))?;
        assert_config(&model, &GenerationConfig::default());
    }
    // The penalty counts for greedy generation too.
    let penalised = GenerationConfig::default().repetition_penalty(1.3);
    assert_config(&with_defaults(r#"{"repetition_penalty": 1.3}"#)?, &penalised);
    assert_config(&load(folder(&[])?.path())?, &GenerationConfig::default());
    Ok(())
}

#[test]
fn end_tokens_come_from_the_most_specific_file() -> Result {
    assert_eq!(load(folder(&[])?.path())?.eos_ids(), [2], "config.json");
    assert_eq!(with_defaults(r#"{"eos_token_id": 9}"#)?.eos_ids(), [9]);
    assert_eq!(with_defaults(r#"{"eos_token_id": [9, 4, 100]}"#)?.eos_ids(), [9, 4, 100]);
    assert_eq!(with_defaults(r#"{"eos_token_id": null}"#)?.eos_ids(), [2]);

    let free = load(folder(&[])?.path())?
        .generate([5, 6], &GenerationConfig::default().eos_ids([]).max_tokens(20))?;
    let end = free.ids[4];
    let model = with_defaults(&format!(r#"{{"eos_token_id": [{end}, 127]}}"#))?;
    let answer = model.generate([5, 6], &model.generation_config())?;
    assert_eq!(answer.ids.last(), Some(&end), "{:?}", answer.ids);
    assert!(free.ids.starts_with(&answer.ids));
    Ok(())
}

/// The file is taken as it is; the range of a value is checked when it is used.
#[test]
fn a_value_out_of_range_is_refused_with_its_file() -> Result {
    let folder = folder(&[("generation_config.json", r#"{"do_sample": true, "top_p": 7.5}"#)])?;
    let path = folder.path().join("generation_config.json");
    let error = load(folder.path()).err().ok_or("loaded")?.to_string();
    let expected = "parameter top_p: expected within (0, 1], got 7.5";
    assert_eq!(error, format!("{}: {expected}", path.display()));
    Ok(())
}

#[test]
fn a_malformed_file_is_named() -> Result {
    let folder = folder(&[("generation_config.json", r#"{"do_sample": true, "top_k": -3}"#)])?;
    let error = load(folder.path()).err().ok_or("loaded")?.to_string();
    let path = folder.path().join("generation_config.json");
    assert!(error.starts_with(&format!("{}: top_k: expected ", path.display())), "{error}");
    Ok(())
}

#[test]
fn a_folder_without_a_tokenizer_works_with_ids() -> Result {
    let model = load(folder(&[])?.path())?;
    assert!(model.tokenizer().is_none());
    let config = GenerationConfig::default().max_tokens(3);
    let answer = model.generate([1, 5, 9], &config)?;
    assert_eq!((answer.prompt_ids, answer.text.as_str()), (vec![1, 5, 9], ""));
    assert!(!answer.ids.is_empty());
    assert_eq!(
        model.think(Prompt::from("hi"), &config).err().ok_or("thought")?.to_string(),
        "no tokenizer in this checkpoint: a text prompt needs one; hand in token ids instead"
    );
    Ok(())
}
