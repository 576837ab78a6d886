//! `tekken.json` and SentencePiece's `tokenizer.model` against `mistral-common`, `sentencepiece` and `transformers`.

#![allow(clippy::print_stderr, reason = "how long it took")]

use std::collections::{BTreeMap, HashMap};
use std::error::Error;
use std::fs;
use std::path::Path;
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use hybrid_attention::{Config, GenerationConfig, HybridModel, Message, Tokenizer};
use hybrid_attention_testing::{fixture, mistral_common};
use serde::Deserialize;
use serde_json::{Value, json};
use tempfile::TempDir;

type Result<T = ()> = std::result::Result<T, Box<dyn Error>>;

/// `mistral.json`, as `mistral.py` beside it writes it.
#[derive(Deserialize)]
struct Golden {
    texts: Vec<String>,
    /// Of the texts, by vocabulary.
    ids: BTreeMap<String, Vec<Vec<u32>>>,
    /// Of the ids.
    decoded: BTreeMap<String, Vec<String>>,
    special_tokens: Value,
    messages: Vec<Vec<Message>>,
    chats: Vec<Chats>,
}

/// The ids of all the messages.
#[derive(Deserialize)]
struct Chats {
    file: String,
    version: String,
    ids: Vec<Vec<u32>>,
}

fn golden() -> Result<Golden> {
    Ok(serde_json::from_slice(&fs::read(fixture("tokenizer/mistral.json"))?)?)
}

fn tekken() -> Result<Value> {
    Ok(serde_json::from_slice(&fs::read(fixture("tokenizer/tekken/tekken.json"))?)?)
}

fn model(name: &str) -> Result<Vec<u8>> {
    Ok(fs::read(fixture("tokenizer/sentencepiece").join(name).with_extension("model"))?)
}

fn small(name: &str) -> Result<Tokenizer> {
    Ok(match name {
        "tekken" => Tokenizer::from_tekken(&serde_json::to_vec(&tekken()?)?)?,
        _ => Tokenizer::from_sentencepiece(&model(name)?)?,
    })
}

/// A folder of these files.
fn folder(files: &[(&str, &[u8])]) -> Result<TempDir> {
    let folder = tempfile::tempdir()?;
    for (name, bytes) in files {
        fs::write(folder.path().join(name), bytes)?;
    }
    Ok(folder)
}

fn from_folder(files: &[(&str, &[u8])]) -> Result<Tokenizer> {
    let folder = folder(files)?;
    Ok(Tokenizer::from_folder(folder.path())?.ok_or("no tokenizer")?)
}

/// The ids of a text in which nothing is a control token: what a user says.
fn said(tokenizer: &Tokenizer, text: &str) -> Result<Vec<u32>> {
    let plain = tokenizer.clone().with_chat_template("{{ messages[0].content }}");
    let ids = plain.encode_chat(&[Message::user(text)], false)?;
    let bos = tokenizer.bos_token_id().ok_or("no BOS")?;
    assert_eq!(ids.first(), Some(&bos));
    Ok(ids[1..].to_vec())
}

/// How many of the texts have other ids, and how many spell a control token.
fn compare(tokenizer: &Tokenizer, texts: &[String], golden: &[Vec<u32>]) -> Result<(usize, usize)> {
    assert_eq!(texts.len(), golden.len());
    let (mut differ, mut controls) = (0, 0);
    for (text, ids) in texts.iter().zip(golden) {
        let got = said(tokenizer, text)?;
        if got != *ids {
            differ += 1;
            eprintln!("{text:?}\n  {got:?}\n  {ids:?}");
        }
        let encoded = tokenizer.encode(text, false)?;
        if encoded.iter().any(|&id| tokenizer.is_special(id)) {
            controls += 1;
        } else {
            assert_eq!(encoded, got, "{text:?}");
        }
    }
    Ok((differ, controls))
}

// ---- Small files and odd lines ----

#[test]
fn texts_are_encoded_as_by_mistral_common_and_sentencepiece() -> Result {
    let golden = golden()?;
    for (name, ids) in &golden.ids {
        let tokenizer = small(name)?;
        let (differ, controls) = compare(&tokenizer, &golden.texts, ids)?;
        assert_eq!(differ, 0, "{name}");
        assert!(name == "other" || controls > 5, "{name}: {controls}");
    }
    Ok(())
}

#[test]
fn ids_are_decoded_as_by_mistral_common_and_sentencepiece() -> Result {
    let golden = golden()?;
    for (name, ids) in &golden.ids {
        let tokenizer = small(name)?;
        let texts = golden.decoded.get(name).unwrap_or(&golden.texts);
        for (ids, text) in ids.iter().zip(texts) {
            let decoded = tokenizer.decode(ids, true);
            // SentencePiece writes a sign for what had no token; it is a special token here, as in transformers, and
            // a space before and after it is lost.
            if name == "other" && text.contains('\u{2047}') {
                let text = text.replace(" \u{2047} ", "");
                assert_eq!(decoded.trim_start(), text.trim_start());
            } else {
                assert_eq!(&decoded, text, "{name}");
            }
            // Token by token, nothing is cut in the middle of a character.
            let mut stream = tokenizer.decode_stream(&[]);
            let mut pieces: Vec<String> = ids.iter().map(|&id| stream.push(id)).collect();
            assert!(
                name == "other"
                    || !pieces.concat().contains('\u{fffd}')
                    || text.contains('\u{fffd}')
            );
            pieces.push(stream.finish());
            assert_eq!(pieces.concat(), decoded, "{name}");
        }
    }
    Ok(())
}

#[test]
fn named_tokens_are_those_of_the_file() -> Result {
    for (name, size) in [("tekken", 624), ("v1", 600), ("v3", 600), ("v7", 600), ("other", 400)] {
        let tokenizer = small(name)?;
        let named = (tokenizer.bos_token_id(), tokenizer.eos_token_id());
        assert_eq!((named, tokenizer.vocab_size()), ((Some(1), Some(2)), size), "{name}");
        assert!((0..3).all(|id| tokenizer.is_special(id)));
        let plain = tokenizer.encode("the cat", false)?;
        assert_eq!(tokenizer.encode("the cat", true)?, [&[1], plain.as_slice()].concat());
        let (bos, eos) = if name == "other" { ("<begin>", "<end>") } else { ("<s>", "</s>") };
        assert_eq!(tokenizer.encode(&format!("{bos}the cat{eos}"), true)?, {
            [&[1], plain.as_slice(), &[2]].concat()
        });
        assert_eq!(tokenizer.token(1).as_deref(), Some(bos));
    }
    // Symbols of the user's are text: they are found as such, and decoded.
    let v7 = small("v7")?;
    let ids = v7.encode("a [REF]", false)?;
    let symbol = *ids.last().ok_or("no ids")?;
    assert_eq!(v7.token(symbol).as_deref(), Some("[REF]"));
    assert!(!v7.is_special(symbol));
    assert_eq!(v7.decode(&ids, true), "a [REF]");
    Ok(())
}

/// `legacy` and `add_prefix_space` of `tokenizer_config.json`.
#[test]
fn the_space_before_a_text_is_where_transformers_puts_it() -> Result {
    let golden: BTreeMap<String, Vec<Vec<u32>>> =
        serde_json::from_slice(&fs::read(fixture("tokenizer/llama_prefix.json"))?)?;
    let texts = self::golden()?.texts;
    let v3 = model("v3")?;
    for (config, ids) in golden {
        let files =
            [("tokenizer.model", v3.as_slice()), ("tokenizer_config.json", config.as_bytes())];
        let tokenizer = from_folder(&files)?;
        for (text, ids) in texts.iter().zip(ids) {
            assert_eq!(tokenizer.encode(text, false)?, ids, "{config} {text:?}");
        }
    }
    Ok(())
}

// ---- Chats ----

#[test]
fn chats_are_written_as_by_mistral_common() -> Result {
    let golden = golden()?;
    assert_eq!(golden.chats.len(), 8);
    for Chats { file, version, ids } in &golden.chats {
        let tokenizer = if file == "tekken.json" {
            let mut tekken = tekken()?;
            tekken["config"]["version"] = json!(version);
            if version == "v11" || version == "v13" {
                tekken["special_tokens"] = golden.special_tokens.clone();
            }
            from_folder(&[("tekken.json", &serde_json::to_vec(&tekken)?)])?
        } else {
            let name = format!("tokenizer.model.{version}");
            from_folder(&[(&name, &model(file)?)])?
        };
        for (messages, ids) in golden.messages.iter().zip(ids) {
            let got = tokenizer.encode_chat(messages, true)?;
            assert_eq!(&got, ids, "{file} {version} {messages:?}");
        }
    }
    Ok(())
}

#[test]
fn templates_refuse_what_they_do_not_write() -> Result {
    for name in ["tekken", "v3", "v7"] {
        let tool = Message { role: "tool".to_owned(), content: "4".to_owned() };
        let error = small(name)?.render_chat(&[Message::user("2 + 2"), tool], true);
        let error = error.err().ok_or("written")?.to_string();
        assert!(error.contains("messages of the role tool are not written"), "{error}");
    }
    let first = [Message::assistant("hello"), Message::user("hello")];
    let error = small("v3")?.render_chat(&first, true).err().ok_or("written")?.to_string();
    assert!(error.contains("the assistant speaks before the user"), "{error}");
    assert_eq!(small("v7")?.render_chat(&first, true)?, "<s>hello</s>[INST]hello[/INST]");
    Ok(())
}

#[test]
fn a_template_is_chosen_by_what_the_folder_says() -> Result {
    let (v1, v3) = (model("v1")?, model("v3")?);
    let tekken = serde_json::to_vec(&tekken()?)?;
    let converted = fs::read(fixture("tokenizer/tekken_converted/tokenizer.json"))?;
    let [mistral, llama]: [&[u8]; 2] =
        [br#"{"model_type": "mistral"}"#, br#"{"model_type": "llama"}"#];
    let named = br#"{"bos_token": "<s>"}"#;
    let (spaced, plain) = ("<s>[INST] x [/INST]", "<s>[INST]x[/INST]");
    type Files<'f> = &'f [(&'f str, &'f [u8])];
    let cases: [(Files<'_>, Option<&str>); 11] = [
        (&[("tokenizer.model", &v3)], Some(plain)),
        (&[("tokenizer.model", &v1)], None),
        (&[("tokenizer.model", &v1), ("config.json", llama)], None),
        (&[("tokenizer.model", &v1), ("config.json", mistral)], Some(spaced)),
        (&[("tokenizer.model", &v1), ("params.json", b"{}")], Some(spaced)),
        (&[("tokenizer.model.v1", &v1)], Some(spaced)),
        (&[("tokenizer.json", &converted)], None),
        // Whatever the folder brings comes first.
        (&[("tokenizer.model", &v3), ("chat_template.jinja", b"own")], Some("own")),
        (
            &[
                ("tokenizer.json", &converted),
                ("tekken.json", b"{"),
                ("tokenizer_config.json", named),
            ],
            None,
        ),
        (
            &[
                ("tokenizer.json", &converted),
                ("tekken.json", &tekken),
                ("tokenizer_config.json", named),
            ],
            Some(plain),
        ),
        (&[("tekken.json", &tekken), ("tokenizer.model", &v1)], Some(plain)),
    ];
    for (files, expected) in cases {
        let tokenizer = from_folder(files)?;
        let names: Vec<&str> = files.iter().map(|(name, _)| *name).collect();
        assert_eq!(tokenizer.has_chat_template(), expected.is_some(), "{names:?}");
        if let Some(expected) = expected {
            assert_eq!(tokenizer.render_chat(&[Message::user("x")], true)?, expected, "{names:?}");
        }
    }
    Ok(())
}

// ---- Folders ----

#[test]
fn the_first_file_is_read_and_the_highest_version() -> Result {
    let llama = fs::read(fixture("tokenizer/llama/tokenizer.json"))?;
    let tekken = serde_json::to_vec(&tekken()?)?;
    let (v1, v3, other) = (model("v1")?, model("v3")?, model("other")?);
    let mut files: Vec<(&str, &[u8])> = vec![
        ("tokenizer.json", &llama),
        ("tekken.json", &tekken),
        ("mistral_instruct_tokenizer_241114.model.v7m1", &v3),
        ("tokenizer.model.v3", &other),
        ("tokenizer.model", &v1),
        ("tokenizer.model.v99", b"no version"),
    ];
    let sizes = [371, 624, 600, 400, 600];
    for size in sizes {
        assert_eq!(from_folder(&files)?.vocab_size(), size);
        files.remove(0);
    }
    let folder = folder(&files)?;
    assert!(Tokenizer::from_folder(folder.path())?.is_none());
    Ok(())
}

#[test]
fn what_the_configuration_says_comes_before_the_file() -> Result {
    let v3 = model("v3")?;
    let config = json!({
        "add_bos_token": false, "add_eos_token": true, "eos_token": "[/INST]",
        "added_tokens_decoder": {"600": {"content": "<|new|>", "special": true}},
    });
    let config = serde_json::to_vec(&config)?;
    let tokenizer = from_folder(&[("tokenizer.model", &v3), ("tokenizer_config.json", &config)])?;
    assert_eq!((tokenizer.bos_token_id(), tokenizer.eos_token_id()), (Some(1), Some(4)));
    let mut ids = small("v3")?.encode("the", false)?;
    ids.extend([600, 4]);
    assert_eq!(tokenizer.encode("the<|new|>", true)?, ids);
    assert_eq!(tokenizer.vocab_size(), 601);
    Ok(())
}

// ---- The same vocabulary as tokenizer.json ----

#[test]
fn tekken_is_what_transformers_makes_of_it() -> Result {
    let folder = fixture("tokenizer/tekken_converted");
    let converted = Tokenizer::from_folder(&folder)?.ok_or("no tokenizer")?;
    let ours = small("tekken")?;
    for text in golden()?.texts {
        let ids = ours.encode(&text, false)?;
        assert_eq!(converted.encode(&text, false)?, ids, "{text:?}");
        assert_eq!(converted.decode(&ids, false), ours.decode(&ids, false));
        assert_eq!(ours.decode(&ids, false), text);
    }
    Ok(())
}

#[test]
fn perplexity_is_the_same_by_either_file() -> Result {
    let config = r#"{
        "model_type": "mistral", "vocab_size": 624, "hidden_size": 16, "intermediate_size": 24,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2
    }"#;
    let mut weights = HashMap::new();
    for (name, shape) in Config::from_json(config)?.weights() {
        weights.insert(name, Tensor::randn(0f32, 0.5, shape, &Device::Cpu)?);
    }
    let named = br#"{"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": true}"#;
    let converted = fs::read(fixture("tokenizer/tekken_converted/tokenizer.json"))?;
    let tekken = serde_json::to_vec(&tekken()?)?;
    let folders = [
        folder(&[("tekken.json", &tekken)])?,
        folder(&[("tokenizer.json", &converted), ("tokenizer_config.json", named)])?,
    ];
    let text = fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/LICENSE"))?;
    let text = text.get(..2000).ok_or("a short licence")?;
    let mut losses = Vec::new();
    for folder in &folders {
        fs::write(folder.path().join("config.json"), config)?;
        candle_core::safetensors::save(&weights, folder.path().join("model.safetensors"))?;
        let model = HybridModel::from_folder(folder.path(), DType::F32, &Device::Cpu)?;
        let config = GenerationConfig::default().max_tokens(1).prompt_logprobs(true);
        let logprobs = model.generate(text, &config)?.prompt_logprobs.ok_or("none")?;
        assert!(logprobs.len() > 500);
        losses.push(logprobs);
    }
    assert_eq!(losses[0], losses[1]);
    Ok(())
}

// ---- What is wrong says so ----

#[test]
fn bad_tekken_files_are_refused() -> Result {
    let token =
        |rank: usize, bytes: &str| json!({"rank": rank, "token_bytes": bytes, "token_str": null});
    let special =
        |rank: usize, text: &str| json!([{"rank": rank, "token_str": text, "is_control": true}]);
    let twice = json!([{"rank": 0, "token_str": "a"}, {"rank": 0, "token_str": "b"}]);
    let long = format!("{}=", "A".repeat(699)); // 524 zeros, of two bytes each in the alphabet
    let cases = [
        (
            "/config/pattern",
            json!("("),
            "Parsing error at position 1: Opening parenthesis without closing parenthesis",
        ),
        (
            "/config/version",
            json!("v11"),
            "special_tokens: expected a list, as from version v11 on, got none",
        ),
        (
            "/config/default_vocab_size",
            json!(279),
            "default_vocab_size: expected 280 to 627, got 279",
        ),
        (
            "/config/default_vocab_size",
            json!(628),
            "default_vocab_size: expected 280 to 627, got 628",
        ),
        (
            "/config/default_num_special_tokens",
            json!(1u64 << 40),
            "default_num_special_tokens: expected at most 65536, got 1099511627776",
        ),
        (
            "/config/default_num_special_tokens",
            json!(19),
            "special_tokens[19].rank: expected less than 19, got 19",
        ),
        (
            "/special_tokens",
            special(24, "x"),
            "special_tokens[0].rank: expected less than 24, got 24",
        ),
        (
            "/special_tokens",
            special(0, ""),
            "special_tokens[0].token_str: expected a text, got \"\"",
        ),
        (
            "/special_tokens",
            special(0, "<SPECIAL_7>"),
            "token 7: expected no token twice, got \"<SPECIAL_7>\"",
        ),
        ("/special_tokens", special(0, "a"), "token 121: expected no token twice, got \"a\""),
        ("/special_tokens", twice, "special_tokens[1].rank: expected no rank twice, got 0"),
        ("/vocab/3", token(4, "Aw=="), "vocab[3].rank: expected 3, got 4"),
        ("/vocab/3", token(3, "Ax=="), "accepted"),
        ("/vocab/3", token(3, "Aw="), "vocab[3].token_bytes: expected bytes in base 64, got Aw="),
        ("/vocab/3", token(3, "BA=="), "vocab[3].token_bytes: expected [3] alone, got [4]"),
        (
            "/vocab/300",
            token(300, ""),
            "vocab[300].token_bytes: expected 1 to 1024 bytes when spelled, got 0",
        ),
        (
            "/vocab/300",
            token(300, &long),
            "vocab[300].token_bytes: expected 1 to 1024 bytes when spelled, got 1048",
        ),
        ("/vocab/300", token(300, "AA=="), "token 324: expected no token twice, got \"Ā\""),
        // Too many to be looked at.
        ("/vocab/601", token(0, "?"), "accepted"),
    ];
    for (place, value, expected) in cases {
        let mut tekken = tekken()?;
        tekken["special_tokens"] = Value::Null;
        *tekken.pointer_mut(place).ok_or("no such place")? = value;
        let got = Tokenizer::from_tekken(&serde_json::to_vec(&tekken)?);
        let got = got.map_or_else(|error| error.to_string(), |_| "accepted".to_owned());
        assert_eq!(got.strip_prefix("tokenizer: ").unwrap_or(&got), expected, "{place}");
    }
    let error = from_folder(&[("tekken.json", b"{}")]).err().ok_or("accepted")?.to_string();
    assert!(error.ends_with("tekken.json: missing field `config` at line 1 column 2"), "{error}");
    Ok(())
}

/// Fields that follow a file overrule what it says, or add to it.
#[test]
fn bad_sentencepiece_files_are_refused() -> Result {
    let piece = |text: &[u8], kind: u8| {
        [&[0x0a, text.len() as u8 + 4, 0x0a, text.len() as u8], text, &[0x18, kind]].concat()
    };
    let cases: [(Vec<u8>, &str); 15] = [
        (vec![0x12, 2, 0x18, 1], "unsupported SentencePiece model type: unigram"),
        (vec![0x12, 2, 0x18, 3], "unsupported SentencePiece model type: word"),
        (vec![0x12, 2, 0x18, 4], "unsupported SentencePiece model type: char"),
        (
            vec![0x12, 3, 0xc0, 1, 1],
            "unsupported SentencePiece normalizer: treat_whitespace_as_suffix",
        ),
        (
            vec![0x12, 3, 0x98, 2, 0],
            "tokenizer: pieces of the kind byte: expected 0 with byte_fallback false, got 256",
        ),
        (
            vec![0x1a, 8, 0x0a, 3, b'n', b'm', b't', 0x12, 1, 0],
            "unsupported SentencePiece normalizer: nmt",
        ),
        (vec![0x2a, 3, 0x12, 1, 0], "unsupported SentencePiece normalizer: identity"),
        (vec![0x1a, 2, 0x28, 0], "unsupported SentencePiece normalizer: escape_whitespaces: false"),
        (piece(b"new", 5), "unsupported SentencePiece type of token: 5"),
        (piece(b"", 1), "tokenizer: piece 600: expected a text, got \"\""),
        (piece(b"<s>", 1), "tokenizer: pieces: expected none twice, got \"<s>\""),
        (
            piece(b"new", 2),
            "tokenizer: type of the pieces: expected one of the kind unknown, got two",
        ),
        (piece(b"\xff", 1), "tokenizer: invalid utf-8 sequence of 1 bytes from index 0"),
        (
            piece("a\u{1f600}".as_bytes(), 1),
            "unsupported SentencePiece token: \"a😀\", of which '😀' is no token",
        ),
        (vec![0x0a, 0x7f], "tokenizer: not a protocol buffer 2 bytes before the end of a message"),
    ];
    for (fields, expected) in cases {
        let bytes = [model("v3")?, fields].concat();
        let error = Tokenizer::from_sentencepiece(&bytes).err().ok_or("accepted")?.to_string();
        assert_eq!(error, expected);
    }
    assert!(Tokenizer::from_sentencepiece(&[model("v3")?, piece(b"new", 4)].concat()).is_ok());
    Ok(())
}

// ---- Real files and real lines ----

/// `lines.json`, as `real_lines.py` writes it.
#[derive(Deserialize)]
struct Lines {
    real: usize,
    texts: Vec<String>,
    ids: BTreeMap<String, Vec<Vec<u32>>>,
}

fn open(path: &Path) -> Result<Tokenizer> {
    let bytes = fs::read(path)?;
    let start = Instant::now();
    let tokenizer = if path.extension().is_some_and(|it| it == "json") {
        Tokenizer::from_tekken(&bytes)?
    } else {
        Tokenizer::from_sentencepiece(&bytes)?
    };
    eprintln!("{}: read in {:?}", path.display(), start.elapsed());
    Ok(tokenizer)
}

#[test]
fn real_lines_are_encoded_as_by_mistral_common() -> Result {
    let Some(folder) = mistral_common() else { return Ok(()) };
    let lines: Lines = serde_json::from_slice(&fs::read(folder.join("lines.json"))?)?;
    assert!(lines.real >= 10_000);
    assert_eq!(lines.ids.len(), 7);
    for (name, golden) in lines.ids {
        let tokenizer = open(&folder.join("mistral_common/data").join(&name))?;
        let (differ, controls) = compare(&tokenizer, &lines.texts, &golden)?;
        let all = golden.len();
        eprintln!("{name}: {differ} of {all} lines differ; {controls} spell control tokens");
        assert_eq!(differ, 0, "{name}");
        assert!(controls > 10);
        for (text, ids) in lines.texts.iter().zip(&golden) {
            let text =
                if name.ends_with(".json") { text.clone() } else { text.replace('▁', " ") };
            assert_eq!(tokenizer.decode(ids, false), text);
        }
    }
    Ok(())
}
