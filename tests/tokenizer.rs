//! Vocabularies of every kind against the libraries that made them, and bad ones against their error.

#![allow(clippy::print_stderr, reason = "how long it took")]

use std::collections::HashMap;
use std::error::Error;
use std::fs;
use std::sync::LazyLock;

use candle_core::quantized::gguf_file::{self, Value};
use hybrid_attention::{Message, Tokenizer};
use hybrid_attention_testing::smollm2;
use proptest::prelude::*;
use serde::Deserialize;

type Result<T = ()> = std::result::Result<T, Box<dyn Error>>;
type Metadata = HashMap<String, Value>;

const FIXTURES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures");

fn fixture<T: serde::de::DeserializeOwned>(name: &str) -> Result<T> {
    Ok(serde_json::from_str(&fs::read_to_string(format!("{FIXTURES}/{name}"))?)?)
}

fn from_folder(name: &str) -> Result<Tokenizer> {
    let folder = format!("{FIXTURES}/tokenizer/{name}");
    Ok(Tokenizer::from_folder(folder.as_ref())?.ok_or("no tokenizer")?)
}

fn strings<S: AsRef<str>>(items: &[S]) -> Value {
    Value::Array(items.iter().map(|s| Value::String(s.as_ref().to_owned())).collect())
}

// ---- SmolLM2: a real GGUF against llama.cpp and transformers ----

#[derive(Deserialize)]
struct SmolGolden {
    tokenize: Vec<SmolText>,
    chat: Vec<SmolChat>,
}

#[derive(Deserialize)]
struct SmolText {
    text: String,
    ids: Vec<u32>,
}

#[derive(Deserialize)]
struct SmolChat {
    messages: Vec<Message>,
    text: String,
    ids: Vec<u32>,
}

#[test]
fn smollm2_reads_as_llama_cpp_and_transformers_read_it() -> Result {
    let Some(path) = smollm2() else { return Ok(()) };
    let content = gguf_file::Content::read(&mut fs::File::open(path)?)?;
    let start = std::time::Instant::now();
    let tokenizer = Tokenizer::from_gguf(&content.metadata)?.ok_or("no tokenizer")?;
    eprintln!("built in {:?}", start.elapsed());
    assert_eq!(tokenizer.vocab_size(), 49152);
    assert_eq!((tokenizer.bos_token_id(), tokenizer.eos_token_id()), (Some(1), Some(2)));

    let golden: SmolGolden = fixture("smollm2/golden.json")?;
    for SmolText { text, ids } in &golden.tokenize {
        assert_eq!(&tokenizer.encode(text, false)?, ids, "{text:?}");
        assert_eq!(&tokenizer.decode(ids, false), text);
    }
    for SmolChat { messages, text, ids } in &golden.chat {
        assert_eq!(&tokenizer.render_chat(messages, true)?, text);
        assert_eq!(&tokenizer.encode_chat(messages, true)?, ids);
    }
    Ok(())
}

// ---- SentencePiece ----

#[derive(Deserialize)]
struct Pieces {
    tokens: Vec<String>,
    scores: Vec<f32>,
    token_type: Vec<i32>,
    bos_token_id: u32,
    eos_token_id: u32,
    unknown_token_id: u32,
    cases: Vec<PieceCase>,
    decode: Vec<DecodeCase>,
}

#[derive(Deserialize)]
struct PieceCase {
    text: String,
    ids: Vec<u32>,
    decoded: String,
}

#[derive(Deserialize)]
struct DecodeCase {
    ids: Vec<u32>,
    decoded: String,
}

fn sentencepiece() -> Result<(Metadata, Pieces)> {
    let pieces: Pieces = fixture("tokenizer/sentencepiece.json")?;
    let metadata = [
        ("model", Value::String("llama".to_owned())),
        ("tokens", strings(&pieces.tokens)),
        ("scores", Value::Array(pieces.scores.iter().map(|&s| Value::F32(s)).collect())),
        ("token_type", Value::Array(pieces.token_type.iter().map(|&t| Value::I32(t)).collect())),
        ("bos_token_id", Value::U32(pieces.bos_token_id)),
        ("eos_token_id", Value::U32(pieces.eos_token_id)),
        ("unknown_token_id", Value::U32(pieces.unknown_token_id)),
    ];
    Ok((metadata.map(|(key, value)| (format!("tokenizer.ggml.{key}"), value)).into(), pieces))
}

#[test]
fn sentencepiece_vocabularies_read_as_sentencepiece_reads_them() -> Result {
    let (metadata, pieces) = sentencepiece()?;
    let tokenizer = Tokenizer::from_gguf(&metadata)?.ok_or("no tokenizer")?;
    assert_eq!(tokenizer.vocab_size(), pieces.tokens.len());
    for PieceCase { text, ids, decoded } in &pieces.cases {
        assert_eq!(&tokenizer.encode(text, false)?, ids, "{text:?}");
        // SentencePiece, too, gives back a text with ▁ as one with spaces.
        assert_eq!(&tokenizer.decode(ids, true), decoded);
        let with_bos: Vec<u32> = [pieces.bos_token_id].iter().chain(ids).copied().collect();
        assert_eq!(tokenizer.encode(text, true)?, with_bos, "llama.cpp adds BOS by default");
        assert_eq!(tokenizer.encode(&format!("<s>{text}"), true)?, with_bos, "never twice");
    }
    for DecodeCase { ids, decoded } in &pieces.decode {
        assert_eq!(&tokenizer.decode(ids, true), decoded);
    }
    Ok(())
}

#[test]
fn gguf_flags_decide_what_is_added() -> Result {
    let (mut metadata, _) = sentencepiece()?;
    let with_space = Tokenizer::from_gguf(&metadata)?.ok_or("no tokenizer")?;
    for (flag, value) in
        [("add_bos_token", false), ("add_eos_token", true), ("add_space_prefix", false)]
    {
        metadata.insert(format!("tokenizer.ggml.{flag}"), Value::Bool(value));
    }
    let tokenizer = Tokenizer::from_gguf(&metadata)?.ok_or("no tokenizer")?;
    let ids = tokenizer.encode(" the", true)?;
    assert_eq!(ids.split_last(), Some((&2, with_space.encode("the", false)?.as_slice())));
    assert_eq!(tokenizer.decode(&ids, true), " the");
    Ok(())
}

/// A vocabulary of Llama 2's size must not take seconds.
#[test]
fn merges_of_a_large_vocabulary_are_found_quickly() -> Result {
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(str::to_owned).into();
    let letters = ["a", "b", "c", "d", "e", "f", "g", "h"];
    tokens.extend(letters.map(str::to_owned));
    for first in 3.. {
        if tokens.len() + letters.len() > 32768 {
            break;
        }
        let longer: Vec<_> = letters.iter().map(|l| format!("{}{l}", tokens[first])).collect();
        tokens.extend(longer);
    }
    let scores = (0..tokens.len()).map(|i| Value::F32(-(i as f32))).collect();
    let mut metadata = Metadata::new();
    metadata.insert("tokenizer.ggml.model".to_owned(), Value::String("llama".to_owned()));
    metadata.insert("tokenizer.ggml.tokens".to_owned(), strings(&tokens));
    metadata.insert("tokenizer.ggml.scores".to_owned(), Value::Array(scores));
    let start = std::time::Instant::now();
    assert!(Tokenizer::from_gguf(&metadata)?.is_some());
    assert!(start.elapsed().as_secs_f32() < 2.0, "{:?}", start.elapsed());
    Ok(())
}

// ---- Byte-level BPE in GGUF ----

/// The 256 letters of GPT-2's alphabet, their merges, and control tokens.
fn byte_level(pre: &str) -> Metadata {
    let mut tokens: Vec<String> = (0x21..=0x143u32)
        .filter_map(char::from_u32)
        .filter(|&c| is_letter(c))
        .map(String::from)
        .collect();
    tokens.extend(["12", "123", "Ġa", "ab", "abc", "'S"].map(str::to_owned));
    let mut types = vec![Value::I32(1); tokens.len()];
    tokens.extend(["<s>", "</s>", "[SYM]"].map(str::to_owned));
    types.extend([Value::I32(3), Value::I32(3), Value::I32(4)]);
    let end = tokens.len() as u32;
    [
        ("model", Value::String("gpt2".to_owned())),
        ("pre", Value::String(pre.to_owned())),
        ("tokens", strings(&tokens)),
        ("token_type", Value::Array(types)),
        // "abc" and "'S" have no merge: only a whole word becomes one of them.
        ("merges", strings(&["1 2", "12 3", "Ġ a", "a b"])),
        ("bos_token_id", Value::U32(end - 3)),
        ("eos_token_id", Value::U32(end - 2)),
    ]
    .map(|(key, value)| (format!("tokenizer.ggml.{key}"), value))
    .into()
}

fn is_letter(c: char) -> bool {
    !matches!(u32::from(c), 0x7f..=0xa0 | 0xad)
}

fn pieces(tokenizer: &Tokenizer, text: &str, add_special: bool) -> Result<Vec<String>> {
    let ids = tokenizer.encode(text, add_special)?;
    Ok(ids.into_iter().filter_map(|id| tokenizer.token(id)).collect())
}

#[test]
fn each_pre_tokenizer_splits_its_own_way() -> Result {
    let text = "abc 1234'S[SYM] a";
    let cases: [(&str, &[&str]); 6] = [
        ("default", &["ab", "c", "Ġ", "123", "4", "'", "S", "[SYM]", "Ġa"]),
        ("gpt-2", &["ab", "c", "Ġ", "123", "4", "'", "S", "[SYM]", "Ġa"]),
        ("smollm", &["ab", "c", "Ġ", "1", "2", "3", "4", "'", "S", "[SYM]", "Ġa"]),
        ("llama-bpe", &["<s>", "abc", "Ġ", "123", "4", "'S", "[SYM]", "Ġa"]),
        ("llama3", &["<s>", "abc", "Ġ", "123", "4", "'S", "[SYM]", "Ġa"]),
        ("tekken", &["<s>", "abc", "Ġ", "1", "2", "3", "4", "'S", "[SYM]", "Ġa"]),
    ];
    for (pre, expected) in cases {
        let tokenizer = Tokenizer::from_gguf(&byte_level(pre))?.ok_or("no tokenizer")?;
        assert_eq!(pieces(&tokenizer, text, true)?, expected, "{pre}");
    }
    let mut metadata = byte_level("");
    metadata.remove("tokenizer.ggml.pre");
    let tokenizer = Tokenizer::from_gguf(&metadata)?.ok_or("no tokenizer")?;
    assert_eq!(pieces(&tokenizer, "[SYM]</s>", true)?, ["[SYM]", "</s>"]);
    Ok(())
}

/// Patterns that backtrack must not give up on long runs, nor take quadratic time for them.
#[test]
fn long_runs_are_split_in_time() -> Result {
    for pre in ["default", "smollm", "llama-bpe", "tekken"] {
        let tokenizer = Tokenizer::from_gguf(&byte_level(pre))?.ok_or("no tokenizer")?;
        for run in ["a", " ", "\n", "漢", "1", "!", "\r ", "aB"] {
            let text = run.repeat(100_000);
            let start = std::time::Instant::now();
            let ids = tokenizer.encode(&text, false)?;
            assert_eq!(tokenizer.decode(&ids, false), text);
            assert!(start.elapsed().as_secs_f32() < 5.0, "{pre} {run:?} {:?}", start.elapsed());
        }
    }
    Ok(())
}

#[test]
fn no_vocabulary_is_no_error() -> Result {
    assert!(Tokenizer::from_gguf(&Metadata::new())?.is_none());
    assert!(Tokenizer::from_folder(tempfile::tempdir()?.path())?.is_none());
    Ok(())
}

// ---- tokenizer.json ----

#[derive(Deserialize)]
struct JsonCase {
    text: String,
    ids: Vec<u32>,
    with_special: Vec<u32>,
    decoded: String,
    decoded_with_special: String,
}

#[test]
fn tokenizer_json_reads_as_the_tokenizers_library_reads_it() -> Result {
    let golden: HashMap<String, Vec<JsonCase>> = fixture("tokenizer/tokenizers.json")?;
    for (name, cases) in golden {
        let tokenizer = from_folder(&name)?;
        for case in cases {
            assert_eq!(tokenizer.encode(&case.text, false)?, case.ids, "{name} {:?}", case.text);
            assert_eq!(tokenizer.decode(&case.ids, true), case.decoded);
            assert_eq!(tokenizer.decode(&case.ids, false), case.decoded_with_special);

            let bos = tokenizer.bos_token_id();
            let run = case.with_special.iter().take_while(|&&id| Some(id) == bos).count();
            let one_bos = &case.with_special[run.saturating_sub(1)..];
            assert_eq!(tokenizer.encode(&case.text, true)?, one_bos, "{name} {:?}", case.text);
        }
    }
    Ok(())
}

#[test]
fn named_tokens_come_from_the_configuration_then_the_map() -> Result {
    let llama = from_folder("llama")?;
    // bos as an added token of the configuration, which wins; eos only in the map.
    assert_eq!((llama.bos_token_id(), llama.eos_token_id()), (Some(1), Some(2)));
    assert!(llama.is_special(1) && !llama.is_special(300) && !llama.is_special(u32::MAX));
    assert_eq!(llama.token(1).as_deref(), Some("<s>"));
    assert_eq!(llama.token(u32::MAX), None);
    assert_eq!(llama.vocab_size(), 371);

    let byte_level = from_folder("byte_level")?;
    assert_eq!((byte_level.bos_token_id(), byte_level.eos_token_id()), (Some(339), Some(340)));
    assert_eq!(byte_level.vocab_size(), 342, "added tokens count");
    assert!(!byte_level.is_special(341), "[INST] was added as text");

    let bare =
        Tokenizer::from_bytes(&fs::read(format!("{FIXTURES}/tokenizer/llama/tokenizer.json"))?)?;
    assert_eq!((bare.bos_token_id(), bare.eos_token_id()), (Some(1), None));
    assert_eq!(bare.encode("<s>the cat", true)?, llama.encode("the cat", true)?);
    Ok(())
}

#[test]
fn the_template_file_wins_over_the_configuration() -> Result {
    let chat = [Message::user("x")];
    assert_eq!(from_folder("byte_level")?.render_chat(&chat, true)?, "user: x\n");
    let folder = tempfile::tempdir()?;
    for file in ["tokenizer.json", "tokenizer_config.json", "chat_template.json"] {
        fs::copy(format!("{FIXTURES}/tokenizer/byte_level/{file}"), folder.path().join(file))?;
    }
    let render = || -> Result<String> {
        Ok(Tokenizer::from_folder(folder.path())?
            .ok_or("no tokenizer")?
            .render_chat(&chat, true)?)
    };
    assert_eq!(render()?, "from chat_template.json");
    fs::remove_file(folder.path().join("chat_template.json"))?;
    assert_eq!(render()?, "from the configuration");
    Ok(())
}

/// As Mistral 7B v0.3 does it: only the first word of a text gets a space before it.
#[test]
fn metaspace_replaces_the_normalizer() -> Result {
    let bytes = fs::read(format!("{FIXTURES}/tokenizer/llama/tokenizer.json"))?;
    let mut json: serde_json::Value = serde_json::from_slice(&bytes)?;
    let metaspace = serde_json::json!(
        {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": false});
    json["normalizer"] = serde_json::Value::Null;
    json["pre_tokenizer"] = metaspace.clone();
    json["decoder"] = metaspace;
    let tokenizer = Tokenizer::from_bytes(&serde_json::to_vec(&json)?)?;
    assert_eq!(pieces(&tokenizer, "the<s>a b", false)?, ["▁the", "<s>", "a", "▁", "b"]);
    for text in ["the cat", "a  b", ""] {
        assert_eq!(tokenizer.decode(&tokenizer.encode(text, true)?, true), text);
    }
    let mut stream = tokenizer.decode_stream(&tokenizer.encode("the", true)?);
    let answer: String =
        tokenizer.encode("cat", false)?.iter().map(|&id| stream.push(id)).collect();
    assert_eq!(answer, " cat");
    Ok(())
}

#[test]
fn truncation_and_padding_of_the_file_are_ignored() -> Result {
    let bytes = fs::read(format!("{FIXTURES}/tokenizer/llama/tokenizer.json"))?;
    let mut json: serde_json::Value = serde_json::from_slice(&bytes)?;
    json["truncation"] = serde_json::json!({"direction": "Right", "max_length": 1, "strategy": "LongestFirst", "stride": 0});
    json["padding"] = serde_json::json!({"strategy": {"Fixed": 1u64 << 40}, "direction": "Right",
        "pad_to_multiple_of": null, "pad_id": 0, "pad_type_id": 0, "pad_token": "<unk>"});
    let tokenizer = Tokenizer::from_bytes(&serde_json::to_vec(&json)?)?;
    assert_eq!(tokenizer.encode("the cat", true)?, [1, 315, 296]);
    Ok(())
}

// ---- Streaming ----

static LLAMA: LazyLock<Option<Tokenizer>> = LazyLock::new(|| from_folder("llama").ok());
static BYTE_LEVEL: LazyLock<Option<Tokenizer>> = LazyLock::new(|| from_folder("byte_level").ok());

#[test]
fn a_continuation_keeps_its_space_and_characters_stay_whole() -> Result {
    let tokenizer = from_folder("llama")?;
    let prompt = tokenizer.encode("the cat", true)?;
    let mut stream = tokenizer.decode_stream(&prompt);
    let answer = tokenizer.encode("sat 😀", false)?;
    let texts: Vec<String> = answer.iter().map(|&id| stream.push(id)).collect();
    assert_eq!(texts, [" sat ", "", "", "", "😀"]);
    assert_eq!(stream.push(2), "", "a control token is no text");
    assert_eq!(stream.push(u32::MAX), "", "nor is an id without a token");
    assert_eq!(stream.finish(), "");

    // Cut in the middle of a character.
    let mut stream = tokenizer.decode_stream(&prompt);
    let texts: Vec<String> = answer.iter().take(4).map(|&id| stream.push(id)).collect();
    assert_eq!(texts, [" sat ", "", "", ""]);
    assert_eq!((stream.finish(), stream.finish()), ("\u{fffd}".repeat(3), String::new()));
    Ok(())
}

fn ids(limit: u32) -> impl Strategy<Value = Vec<u32>> {
    // Mostly bytes, which are what streaming is difficult for.
    prop::collection::vec(prop_oneof![0..limit, 3..259u32, 221..260u32], 0..40)
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_pieces_of_a_stream_are_the_text_after_the_prompt(
        text in "\\PC{0,12}", ids in ids(380), byte_level in any::<bool>(),
    ) {
        let tokenizer = if byte_level { &*BYTE_LEVEL } else { &*LLAMA };
        let tokenizer = tokenizer.as_ref().ok_or_else(|| TestCaseError::fail("no fixture"))?;
        let prompt = tokenizer.encode(&text, true).map_err(|e| TestCaseError::fail(e.to_string()))?;
        let mut stream = tokenizer.decode_stream(&prompt);
        let mut pieces: String = ids.iter().map(|&id| stream.push(id)).collect();
        pieces.push_str(&stream.finish());
        let whole = tokenizer.decode(&[prompt.clone(), ids].concat(), true);
        prop_assert_eq!(whole.strip_prefix(&tokenizer.decode(&prompt, true)), Some(pieces.as_str()));
    }

    /// The decoder is our own: it reads valid text as the tokenizers library does.
    #[test]
    fn decoding_agrees_with_the_tokenizers_library(ids in ids(342)) {
        for (name, ours) in [("llama", &*LLAMA), ("byte_level", &*BYTE_LEVEL)] {
            let ours = ours.as_ref().ok_or_else(|| TestCaseError::fail("no fixture"))?;
            let theirs = tokenizers::Tokenizer::from_file(format!("{FIXTURES}/tokenizer/{name}/tokenizer.json"))
                .and_then(|theirs| theirs.decode(&ids, false))
                .map_err(|e| TestCaseError::fail(e.to_string()))?;
            let valid = !theirs.contains(char::REPLACEMENT_CHARACTER);
            // It gives up on a whole run of bytes where only one of them is wrong.
            if valid || name == "byte_level" {
                prop_assert_eq!(ours.decode(&ids, false), theirs);
            }
        }
    }

    #[test]
    fn byte_level_text_survives_the_round_trip(text in any::<String>(), add_special in any::<bool>()) {
        let tokenizer = BYTE_LEVEL.as_ref().ok_or_else(|| TestCaseError::fail("no fixture"))?;
        let ids = tokenizer.encode(&text, add_special).map_err(|e| TestCaseError::fail(e.to_string()))?;
        prop_assert_eq!(tokenizer.decode(&ids, false), text);
    }
}

// ---- What is wrong says so ----

/// The error of a vocabulary after `key` was set to `value`, or removed.
fn gguf_error(mut metadata: Metadata, key: &str, value: Option<Value>) -> Result<String> {
    let key = format!("tokenizer.{key}");
    match value {
        Some(value) => metadata.insert(key, value),
        None => metadata.remove(&key),
    };
    Ok(Tokenizer::from_gguf(&metadata).err().ok_or("accepted")?.to_string())
}

#[test]
fn bad_metadata_is_refused_by_key() -> Result {
    let (spm, count) = {
        let (spm, pieces) = sentencepiece()?;
        (spm, pieces.tokens.len())
    };
    assert_eq!(count, 500);
    let bpe = || byte_level("smollm");
    let text = |s: &str| Some(Value::String(s.to_owned()));
    let one = |v: Value| Some(Value::Array(vec![v]));
    let cases = [
        (spm.clone(), "ggml.model", text("rwkv"), "unsupported GGUF tokenizer model: rwkv"),
        (
            spm.clone(),
            "ggml.model",
            Some(Value::U8(1)),
            "config field tokenizer.ggml.model: expected a string, got U8(1)",
        ),
        (bpe(), "ggml.pre", text("falcon"), "unsupported GGUF pre-tokenizer: falcon"),
        (
            spm.clone(),
            "ggml.tokens",
            None,
            "config field tokenizer.ggml.tokens: expected a value, got none",
        ),
        (
            spm.clone(),
            "ggml.tokens",
            text("a"),
            "config field tokenizer.ggml.tokens: expected an array of strings, got \"a\"",
        ),
        (
            spm.clone(),
            "ggml.tokens",
            one(Value::U32(7)),
            "config field tokenizer.ggml.tokens: expected an array of strings, got U32(7)",
        ),
        (
            spm.clone(),
            "ggml.tokens",
            Some(strings(&["a", "b", "a"])),
            "config field tokenizer.ggml.tokens: expected no token twice, got \"a\" at 0 and 2",
        ),
        (
            spm.clone(),
            "ggml.scores",
            None,
            "config field tokenizer.ggml.scores: expected a value, got none",
        ),
        (
            spm.clone(),
            "ggml.scores",
            one(Value::F32(0.0)),
            "config field tokenizer.ggml.scores: expected one for each of 500 tokens, got 1",
        ),
        (
            spm.clone(),
            "ggml.scores",
            one(Value::Bool(true)),
            "config field tokenizer.ggml.scores: expected an array of f32, got Bool(true)",
        ),
        (
            spm.clone(),
            "ggml.token_type",
            one(Value::I32(1)),
            "config field tokenizer.ggml.token_type: expected one for each of 500 tokens, got 1",
        ),
        (
            spm.clone(),
            "ggml.unknown_token_id",
            text("<unk>"),
            "config field tokenizer.ggml.unknown_token_id: expected a token id, got \"<unk>\"",
        ),
        (
            spm.clone(),
            "ggml.add_bos_token",
            Some(Value::U8(1)),
            "config field tokenizer.ggml.add_bos_token: expected a bool, got U8(1)",
        ),
        (
            spm,
            "chat_template",
            one(Value::U8(1)),
            "config field tokenizer.chat_template: expected a string, got an array",
        ),
        (
            bpe(),
            "ggml.merges",
            None,
            "config field tokenizer.ggml.merges: expected a value, got none",
        ),
        (
            bpe(),
            "ggml.merges",
            Some(strings(&["ab"])),
            "config field tokenizer.ggml.merges: expected two parts of a token with a space between, got \"ab\" at 0",
        ),
        (
            bpe(),
            "ggml.merges",
            Some(strings(&["1 2", "[SYM] [SYM]"])),
            "config field tokenizer.ggml.merges: expected two parts of a token with a space between, got \"[SYM] [SYM]\" at 1",
        ),
        (bpe(), "ggml.merges", Some(strings(&["a z"])), "tokenizer: Token `az` out of vocabulary"),
        (
            byte_level("tekken"),
            "ggml.bos_token_id",
            None,
            "config field tokenizer.ggml.bos_token_id: expected a value, got none",
        ),
    ];
    for (metadata, key, value, expected) in cases {
        assert_eq!(gguf_error(metadata, key, value)?, expected);
    }
    Ok(())
}

#[test]
fn what_is_no_file_is_not_read() -> Result {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("tokenizer.json");
    fs::create_dir(&path)?;
    let error = Tokenizer::from_folder(folder.path()).err().ok_or("read")?;
    assert_eq!(error.to_string(), format!("{}: not a regular file", path.display()));
    Ok(())
}

#[test]
fn bad_files_are_refused_by_name() -> Result {
    let folder = tempfile::tempdir()?;
    let definition = fs::read_to_string(format!("{FIXTURES}/tokenizer/llama/tokenizer.json"))?;
    let error = |file: &str, content: &[u8]| -> Result<String> {
        fs::write(folder.path().join("tokenizer.json"), &definition)?;
        fs::write(folder.path().join(file), content)?;
        let error = Tokenizer::from_folder(folder.path()).err().ok_or("accepted")?.to_string();
        fs::remove_file(folder.path().join(file))?;
        Ok(error.replace(&format!("{}/", folder.path().display()), ""))
    };
    assert_eq!(
        error("tokenizer.json", b"{")?,
        "tokenizer.json: EOF while parsing an object at line 1 column 1"
    );
    assert_eq!(
        error("tokenizer_config.json", b"[")?,
        "tokenizer_config.json: EOF while parsing a list at line 1 column 1"
    );
    assert_eq!(
        error("tokenizer_config.json", br#"{"eos_token": "<end>"}"#)?,
        "tokenizer.json: eos_token \"<end>\" is not a token of the vocabulary"
    );
    assert_eq!(
        error("special_tokens_map.json", br#"{"bos_token": 1}"#)?,
        "special_tokens_map.json: data did not match any variant of untagged enum Token at line 1 column 16"
    );
    assert_eq!(
        error("chat_template.jinja", b"\xff")?,
        "chat_template.jinja: invalid utf-8 sequence of 1 bytes from index 0"
    );
    assert_eq!(
        error("chat_template.json", b"{}")?,
        "chat_template.json: missing field `chat_template` at line 1 column 2"
    );

    let mut ctc: serde_json::Value = serde_json::from_str(&definition)?;
    ctc["decoder"] = serde_json::json!(
        {"type": "CTC", "pad_token": "", "word_delimiter_token": "", "cleanup": true});
    assert_eq!(
        error("tokenizer.json", &serde_json::to_vec(&ctc)?)?,
        r#"unsupported tokenizer decoder: {"cleanup":true,"pad_token":"","type":"CTC","word_delimiter_token":""}"#
    );
    // The tokenizers library panics on this one.
    let merges = br#"{"model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": ["a b"]}}"#;
    assert_eq!(
        error("tokenizer.json", merges)?,
        "tokenizer.json: the definition of the tokenizer contradicts itself"
    );

    fs::create_dir(folder.path().join("tokenizer_config.json"))?;
    fs::write(folder.path().join("tokenizer.json"), &definition)?;
    let error = Tokenizer::from_folder(folder.path()).err().ok_or("accepted")?.to_string();
    assert!(error.contains("tokenizer_config.json: "), "{error}");
    Ok(())
}
