//! The tokenizer files of a checkpoint, Hugging Face's and Mistral's.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::instruct::Version;
use super::sentencepiece::Prefix;
use super::{Surroundings, Tokenizer, Vocabulary, added, parse, sentencepiece, tekken};
use crate::error::{Error, Result};
use crate::load::read_bytes;

/// What `tokenizer_config.json` and `special_tokens_map.json` say; both use the same token names.
#[derive(Default, Deserialize)]
struct TokenizerConfig {
    bos_token: Option<Token>,
    eos_token: Option<Token>,
    unk_token: Option<Token>,
    pad_token: Option<Token>,
    #[serde(default)]
    additional_special_tokens: Option<Vec<Token>>,
    /// By their ids.
    added_tokens_decoder: Option<BTreeMap<u32, added::Entry>>,
    tokenizer_class: Option<String>,
    add_bos_token: Option<bool>,
    add_eos_token: Option<bool>,
    /// Of SentencePiece's vocabularies.
    legacy: Option<bool>,
    add_prefix_space: Option<bool>,
    chat_template: Option<Templates>,
}

/// `"<s>"`, or an added token with its flags spelled out.
#[derive(Deserialize)]
#[serde(untagged)]
enum Token {
    Text(String),
    Added { content: String },
}

/// One template, or several, of which `default` is for plain chat.
#[derive(Deserialize)]
#[serde(untagged)]
enum Templates {
    One(String),
    Named(Vec<NamedTemplate>),
}

#[derive(Deserialize)]
struct NamedTemplate {
    name: String,
    template: String,
}

/// `chat_template.json`.
#[derive(Deserialize)]
struct TemplateFile {
    chat_template: Templates,
}

/// In the order in which they are looked for.
enum Format {
    TokenizerJson,
    Tekken,
    SentencePiece,
}

pub(super) fn read(folder: &Path) -> Result<Option<Tokenizer>> {
    let Some((path, format, bytes)) = find(folder)? else { return Ok(None) };
    let config_path = folder.join("tokenizer_config.json");
    let config: TokenizerConfig = parse_if_present(&config_path)?.unwrap_or_default();
    let map: TokenizerConfig =
        parse_if_present(&folder.join("special_tokens_map.json"))?.unwrap_or_default();

    let jinja = folder.join("chat_template.jinja");
    let chat_template = if let Some(bytes) = read_if_present(&jinja)? {
        Some(String::from_utf8(bytes).map_err(|error| Error::malformed(&jinja, error))?)
    } else if let Some(file) = parse_if_present(&folder.join("chat_template.json"))? {
        let TemplateFile { chat_template } = file;
        chat_template.default()
    } else {
        config.chat_template.and_then(Templates::default)
    };
    let tokens = match config.added_tokens_decoder {
        Some(tokens) => tokens,
        // Before transformers 4.34 they stood in a file of their own.
        None => {
            let file = parse_if_present(&folder.join("added_tokens.json"))?;
            let named =
                [&config.bos_token, &config.eos_token, &config.unk_token, &config.pad_token];
            let lists = [&config.additional_special_tokens, &map.additional_special_tokens];
            let special: Vec<&str> = named
                .into_iter()
                .flatten()
                .chain(lists.into_iter().flatten().flatten())
                .map(Token::as_str)
                .collect();
            let entry = |(content, id): (String, u32)| {
                let special = special.contains(&content.as_str());
                (id, added::Entry::named(content, special))
            };
            file.unwrap_or_else(HashMap::new).into_iter().map(entry).collect()
        }
    };
    // Nothing below reads a file, so errors must be told which file they are about.
    let in_file = |error| match error {
        Error::Tokenizer { message } => Error::malformed(&path, message),
        other => other,
    };
    let vocabulary = match format {
        Format::TokenizerJson => parse(&bytes).map(|inner| Vocabulary {
            inner,
            around: Surroundings::default(),
            version: None,
        }),
        Format::Tekken => tekken::read(&bytes),
        Format::SentencePiece => {
            let prefix = match (config.add_prefix_space, config.legacy) {
                (Some(false), _) => Prefix::Never,
                (_, Some(false)) => Prefix::First,
                _ => Prefix::Each,
            };
            sentencepiece::read(&bytes, prefix).map_err(|error| match error {
                Error::Unsupported { what, got } => {
                    let made = "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)";
                    let instead =
                        format!("{got}; transformers makes a tokenizer.json of it: {made}");
                    Error::unsupported(what, instead)
                }
                other => other,
            })
        }
    };
    let Vocabulary { mut inner, around: own, version } = vocabulary.map_err(in_file)?;
    let chat_template = match chat_template {
        Some(template) => Some(template),
        None => version_of(folder, &path, &format, version)?
            .and_then(Version::template)
            .map(str::to_owned),
    };
    let token = |config: Option<Token>, map: Option<Token>, own| {
        config.or(map).map_or(own, |it| Some(it.text()))
    };
    let around = Surroundings {
        bos_token: token(config.bos_token, map.bos_token, own.bos_token),
        eos_token: token(config.eos_token, map.eos_token, own.eos_token),
        unk_token: token(config.unk_token, map.unk_token, own.unk_token),
        pad_token: token(config.pad_token, map.pad_token, own.pad_token),
        chat_template,
    };
    added::add(&mut inner, &tokens).map_err(|error| match error {
        Error::Tokenizer { message } => Error::malformed(&config_path, message),
        other => other,
    })?;
    let is_json = matches!(format, Format::TokenizerJson);
    // The class that stands for `tokenizer.json` as it is looks at neither flag.
    if !is_json || config.tokenizer_class.as_deref() != Some("PreTrainedTokenizerFast") {
        // The other files do not say what stands around a text: with them, it is BOS.
        let adds_bos = (!is_json && around.bos_token.is_some()).then_some(true);
        let ends = [
            (config.add_bos_token.or(adds_bos), around.bos_token.as_deref()),
            (config.add_eos_token, around.eos_token.as_deref()),
        ];
        added::surround(&mut inner, ends).map_err(in_file)?;
    }
    Tokenizer::new(inner, around).map(Some).map_err(in_file)
}

/// The file that holds the vocabulary, and its bytes.
fn find(folder: &Path) -> Result<Option<(PathBuf, Format, Vec<u8>)>> {
    for (name, format) in
        [("tokenizer.json", Format::TokenizerJson), ("tekken.json", Format::Tekken)]
    {
        let path = folder.join(name);
        if let Some(bytes) = read_if_present(&path)? {
            return Ok(Some((path, format, bytes)));
        }
    }
    let path = versioned(folder)?.unwrap_or_else(|| folder.join("tokenizer.model"));
    let bytes = read_if_present(&path)?;
    Ok(bytes.map(|bytes| (path, Format::SentencePiece, bytes)))
}

/// The file of the highest version of those that Mistral calls `tokenizer.model.v3`,
/// `mistral_instruct_tokenizer_241114.model.v7m1` and the like; `m1` is for images.
fn versioned(folder: &Path) -> Result<Option<PathBuf>> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::io(folder)(error)),
    };
    let mut highest = None;
    for entry in entries {
        let name = entry.map_err(Error::io(folder))?.file_name();
        let Some(name) = name.to_str() else { continue };
        highest = highest.max(name_version(name).map(|version| (version, name.to_owned())));
    }
    Ok(highest.map(|(_, name)| folder.join(name)))
}

/// `tokenizer.model.v7m1` -> v7
fn name_version(name: &str) -> Option<Version> {
    let (_, version) = name.rsplit_once(".model.")?;
    Version::parse(version.split_once('m').map_or(version, |(version, _)| version))
}

/// How a chat is written for this model, which may be by Mistral.
fn version_of(
    folder: &Path,
    path: &Path,
    format: &Format,
    version: Option<Version>,
) -> Result<Option<Version>> {
    match format {
        Format::Tekken => Ok(version),
        // Mistral's newer models come with both, and without a template.
        Format::TokenizerJson => {
            let path = folder.join("tekken.json");
            let Some(bytes) = read_if_present(&path)? else { return Ok(None) };
            Ok(tekken::version(&bytes).unwrap_or_else(|error| {
                // Tokens come from the other file.
                tracing::warn!(path = %path.display(), %error, "not read for a chat template");
                None
            }))
        }
        // Nothing tells the first version from the vocabulary of Llama.
        Format::SentencePiece if version.is_none() => {
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            let is_first = match name_version(name) {
                Some(version) => version == Version::V1,
                None => is_mistral(folder)?,
            };
            Ok(is_first.then_some(Version::V1))
        }
        Format::SentencePiece => Ok(version),
    }
}

/// Whether the model is called so, or comes in Mistral's own format.
fn is_mistral(folder: &Path) -> Result<bool> {
    #[derive(Deserialize)]
    struct Config {
        model_type: Option<String>,
    }
    Ok(match parse_if_present(&folder.join("config.json"))? {
        Some(Config { model_type }) => {
            matches!(model_type.as_deref(), Some("mistral" | "mixtral"))
        }
        None => folder.join("params.json").is_file(),
    })
}

/// The chat template that lies beside a GGUF file `NAME.gguf`: `NAME.jinja`, else `chat_template.jinja`.
pub(super) fn template_beside(gguf: &Path) -> Result<Option<String>> {
    for path in [gguf.with_extension("jinja"), gguf.with_file_name("chat_template.jinja")] {
        if let Some(bytes) = read_if_present(&path)? {
            let source =
                String::from_utf8(bytes).map_err(|error| Error::malformed(&path, error))?;
            return Ok(Some(source));
        }
    }
    Ok(None)
}

impl Token {
    fn as_str(&self) -> &str {
        match self {
            Self::Text(content) | Self::Added { content } => content,
        }
    }

    fn text(self) -> String {
        match self {
            Self::Text(content) | Self::Added { content } => content,
        }
    }
}

impl Templates {
    fn default(self) -> Option<String> {
        match self {
            Self::One(template) => Some(template),
            Self::Named(list) => list.into_iter().find(|t| t.name == "default").map(|t| t.template),
        }
    }
}

fn read_if_present(path: &Path) -> Result<Option<Vec<u8>>> {
    match fs::metadata(path) {
        // A pipe or a device may never end.
        Ok(metadata) if !metadata.is_file() => Err(Error::malformed(path, "not a regular file")),
        // The largest vocabularies take some dozens of megabytes.
        Ok(_) => read_bytes(path, 256 << 20).map(Some),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(error) => Err(Error::io(path)(error)),
    }
}

fn parse_if_present<T: DeserializeOwned>(path: &Path) -> Result<Option<T>> {
    let Some(bytes) = read_if_present(path)? else { return Ok(None) };
    serde_json::from_slice(&bytes).map(Some).map_err(|error| Error::malformed(path, error))
}
