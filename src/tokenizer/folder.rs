//! The tokenizer files of a Hugging Face checkpoint.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use serde::Deserialize;
use serde::de::DeserializeOwned;

use super::{Surroundings, Tokenizer, added, parse};
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

pub(super) fn read(folder: &Path) -> Result<Option<Tokenizer>> {
    let path = folder.join("tokenizer.json");
    let Some(bytes) = read_if_present(&path)? else {
        let other =
            ["tekken.json", "tokenizer.model"].into_iter().find(|it| folder.join(it).is_file());
        return other.map_or(Ok(None), |other| {
            let got = format!(
                "{other} without tokenizer.json, which transformers writes: \
                 AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
            );
            Err(Error::unsupported("tokenizer", got))
        });
    };
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
    let token = |config: Option<Token>, map: Option<Token>| config.or(map).map(Token::text);
    let around = Surroundings {
        bos_token: token(config.bos_token, map.bos_token),
        eos_token: token(config.eos_token, map.eos_token),
        unk_token: token(config.unk_token, map.unk_token),
        pad_token: token(config.pad_token, map.pad_token),
        chat_template,
    };
    // Nothing below reads a file, so errors must be told which file they are about.
    let in_file = |error| match error {
        Error::Tokenizer { message } => Error::malformed(&path, message),
        other => other,
    };
    let mut inner = parse(&bytes).map_err(in_file)?;
    added::add(&mut inner, &tokens).map_err(|error| match error {
        Error::Tokenizer { message } => Error::malformed(&config_path, message),
        other => other,
    })?;
    // The class that stands for `tokenizer.json` as it is looks at neither flag.
    if config.tokenizer_class.as_deref() != Some("PreTrainedTokenizerFast") {
        let ends = [
            (config.add_bos_token, around.bos_token.as_deref()),
            (config.add_eos_token, around.eos_token.as_deref()),
        ];
        added::surround(&mut inner, ends).map_err(in_file)?;
    }
    Tokenizer::new(inner, around).map(Some).map_err(in_file)
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
