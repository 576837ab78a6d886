//! Vocabularies in GGUF metadata, the keys `tokenizer.ggml.*`.
//!
//! Defaults and splitting patterns are those of llama.cpp (`llama-vocab.cpp`), whose format it is.

use std::collections::HashMap;

use candle_core::quantized::gguf_file::Value;
use tokenizers::AddedToken;
use tokenizers::models::bpe::{BPE, Merges};
use tokenizers::normalizers::{NormalizerWrapper, Prepend, Replace, Sequence as Normalizers};
use tokenizers::processors::template::{SpecialToken, TemplateProcessing};

use super::bpe::{self, Kind, merges_by_score, vocab};
use super::{Surroundings, Tokenizer, failed, guard};
use crate::config::{integer, is_integer};
use crate::error::{Error, Result};

/// GPT-2's pattern as llama.cpp writes it; whitespace that it leaves over becomes a piece of its own.
const GPT2: &str = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)";

/// Llama 3's pattern.
const LLAMA3: &str = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// Mistral Nemo's pattern, as in its `tokenizer.json`; llama.cpp approximates it.
const TEKKEN: &str = r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+";

/// `tokenizer.ggml.*`, with errors that name the key.
struct Metadata<'m>(&'m HashMap<String, Value>);

pub(super) fn read(metadata: &HashMap<String, Value>) -> Result<Option<Tokenizer>> {
    let metadata = Metadata(metadata);
    match metadata.string("model")? {
        None => Ok(None),
        Some("gpt2") => byte_level(&metadata).map(Some),
        Some("llama") => sentencepiece(&metadata).map(Some),
        Some(other) => Err(Error::unsupported("GGUF tokenizer model", other)),
    }
}

fn byte_level(metadata: &Metadata<'_>) -> Result<Tokenizer> {
    let pre = metadata.string("pre")?.unwrap_or_else(|| {
        tracing::warn!("tokenizer.ggml.pre is missing: text is split as by \"default\"");
        "default"
    });
    // Whether whole words that are tokens are taken without merging; the same families begin with BOS.
    let (patterns, whole_words): (&[&str], bool) = match pre {
        "default" => (&[r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"], false),
        "gpt-2" | "gpt2" => (&[GPT2], false),
        "smollm" => (&[r"\p{N}", GPT2], false),
        "llama-bpe" | "llama3" | "llama-v3" => (&[LLAMA3], true),
        "tekken" => (&[TEKKEN], true),
        other => return Err(Error::unsupported("GGUF pre-tokenizer", other)),
    };
    let tokens = metadata.tokens()?;
    let merges = metadata.merges(&tokens)?.ok_or_else(|| missing("merges"))?;
    let model = guard(|| {
        BPE::builder().vocab_and_merges(vocab(&tokens), merges).ignore_merges(whole_words).build()
    })?;

    let inner = bpe::byte_level(model, patterns)?;
    let ids = NamedTokens { bos: None, eos: None, unk: None, add_bos: whole_words };
    finish(metadata, inner, &tokens, ids)
}

fn sentencepiece(metadata: &Metadata<'_>) -> Result<Tokenizer> {
    let tokens = metadata.tokens()?;
    let merges = match metadata.merges(&tokens)? {
        Some(merges) => merges,
        None => {
            let (scores, kinds) = (metadata.scores(tokens.len())?, metadata.kinds(tokens.len())?);
            merges_by_score(&tokens, &scores, &kinds)?
        }
    };
    let ids = NamedTokens { bos: Some(1), eos: Some(2), unk: Some(0), add_bos: true };
    let unk = metadata.token("unknown_token_id", ids.unk, &tokens)?.map(|(_, unk)| unk);
    let model = bpe::sentencepiece(&tokens, merges, unk, true)?;

    let prefix = metadata.bool("add_space_prefix")?.unwrap_or(true);
    let mut normalizers: Vec<NormalizerWrapper> = Vec::new();
    if prefix {
        normalizers.push(Prepend::new("▁".to_owned()).into());
    }
    normalizers.push(Replace::new(" ", "▁").map_err(failed)?.into());

    let mut inner = tokenizers::Tokenizer::new(model);
    inner.with_normalizer(Some(Normalizers::new(normalizers))).map_err(failed)?;
    inner.with_decoder(Some(bpe::sentencepiece_decoder(prefix.into())?));
    finish(metadata, inner, &tokens, ids)
}

/// Ids to use where the metadata names none, and whether BOS is added where it does not say.
#[derive(Clone, Copy)]
struct NamedTokens {
    bos: Option<u32>,
    eos: Option<u32>,
    unk: Option<u32>,
    add_bos: bool,
}

/// What both kinds of vocabulary share: symbols, named tokens, chat template.
fn finish(
    metadata: &Metadata<'_>,
    mut inner: tokenizers::Tokenizer,
    tokens: &[&str],
    default: NamedTokens,
) -> Result<Tokenizer> {
    let kinds = metadata.kinds(tokens.len())?;
    let added = tokens.iter().zip(&kinds).filter_map(|(&token, kind)| match kind {
        Kind::Special => Some(AddedToken::from(token, true)),
        Kind::UserDefined => Some(AddedToken::from(token, false).normalized(false)),
        Kind::Text | Kind::Byte => None,
    });
    guard(|| inner.add_tokens(added))?;

    let bos = metadata.token("bos_token_id", default.bos, tokens)?;
    let eos = metadata.token("eos_token_id", default.eos, tokens)?;
    let unk = metadata.token("unknown_token_id", default.unk, tokens)?;
    let pad = metadata.token("padding_token_id", None, tokens)?;

    let mut template = vec!["$A"];
    let mut special = Vec::new();
    if metadata.bool("add_bos_token")?.unwrap_or(default.add_bos) {
        let (id, _) = bos.ok_or_else(|| missing("bos_token_id"))?;
        template.insert(0, "bos");
        special.push(SpecialToken::from(("bos", id)));
    }
    if metadata.bool("add_eos_token")?.unwrap_or(false) {
        let (id, _) = eos.ok_or_else(|| missing("eos_token_id"))?;
        template.push("eos");
        special.push(SpecialToken::from(("eos", id)));
    }
    let processor = TemplateProcessing::builder()
        .try_single(template)
        .map_err(failed)?
        .special_tokens(special)
        .build()
        .map_err(failed)?;
    inner.with_post_processor(Some(processor));

    let text = |token: Option<(u32, &str)>| token.map(|(_, text)| text.to_owned());
    let around = Surroundings {
        bos_token: text(bos),
        eos_token: text(eos),
        unk_token: text(unk),
        pad_token: text(pad),
        chat_template: match metadata.0.get("tokenizer.chat_template") {
            None => None,
            Some(Value::String(source)) => Some(source.clone()),
            Some(other) => return Err(wrong("tokenizer.chat_template", "a string", other)),
        },
    };
    Tokenizer::new(inner, around)
}

impl<'m> Metadata<'m> {
    fn get(&self, key: &str) -> Option<&'m Value> {
        self.0.get(&full(key))
    }

    fn string(&self, key: &str) -> Result<Option<&'m str>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(other) => Err(wrong(&full(key), "a string", other)),
        }
    }

    fn bool(&self, key: &str) -> Result<Option<bool>> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(*flag)),
            Some(other) => Err(wrong(&full(key), "a bool", other)),
        }
    }

    /// An array whose every element `read` accepts.
    fn array<T>(
        &self,
        key: &str,
        expected: &str,
        read: impl Fn(&'m Value) -> Option<T>,
    ) -> Result<Option<Vec<T>>> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let Value::Array(items) = value else { return Err(wrong(&full(key), expected, value)) };
        let read = |item| read(item).ok_or_else(|| wrong(&full(key), expected, item));
        items.iter().map(read).collect::<Result<_>>().map(Some)
    }

    /// An array with one element for each token.
    fn per_token<T>(
        &self,
        key: &str,
        expected: &str,
        count: usize,
        read: impl Fn(&'m Value) -> Option<T>,
    ) -> Result<Option<Vec<T>>> {
        let array = self.array(key, expected, read)?;
        match &array {
            Some(items) if items.len() != count => {
                let expected = format!("one for each of {count} tokens");
                Err(Error::config(full(key), expected, items.len()))
            }
            _ => Ok(array),
        }
    }

    fn tokens(&self) -> Result<Vec<&'m str>> {
        let tokens = self.array("tokens", "an array of strings", as_str)?;
        let tokens = tokens.ok_or_else(|| missing("tokens"))?;
        let mut seen = HashMap::with_capacity(tokens.len());
        for (id, &token) in tokens.iter().enumerate() {
            if let Some(before) = seen.insert(token, id) {
                let got = format!("{token:?} at {before} and {id}");
                return Err(Error::config(full("tokens"), "no token twice", got));
            }
        }
        Ok(tokens)
    }

    fn scores(&self, count: usize) -> Result<Vec<f32>> {
        let read = |value: &Value| value.to_f32().ok();
        let scores = self.per_token("scores", "an array of f32", count, read)?;
        scores.ok_or_else(|| missing("scores"))
    }

    /// Without types every token is text.
    fn kinds(&self, count: usize) -> Result<Vec<Kind>> {
        let read = |value: &Value| {
            let kind = match value {
                Value::I32(kind) => i64::from(*kind),
                Value::U32(kind) => i64::from(*kind),
                _ => return None,
            };
            Some(match kind {
                2 | 3 => Kind::Special,
                4 => Kind::UserDefined,
                6 => Kind::Byte,
                _ => Kind::Text,
            })
        };
        let kinds = self.per_token("token_type", "an array of i32", count, read)?;
        Ok(kinds.unwrap_or_else(|| vec![Kind::Text; count]))
    }

    fn merges(&self, tokens: &[&str]) -> Result<Option<Merges>> {
        let Some(merges) = self.array("merges", "an array of strings", as_str)? else {
            return Ok(None);
        };
        let longest = tokens.iter().map(|token| token.len()).max().unwrap_or(0);
        let split = |(index, merge): (usize, &str)| {
            let expected = "two parts of a token with a space between";
            let bad = || Error::config(full("merges"), expected, format!("{merge:?} at {index}"));
            let (left, right) = merge.split_once(' ').ok_or_else(bad)?;
            // The builder would copy a longer merge past the end of its buffer.
            if left.is_empty() || right.is_empty() || left.len() + right.len() > longest {
                return Err(bad());
            }
            Ok((left.to_owned(), right.to_owned()))
        };
        merges.into_iter().enumerate().map(split).collect::<Result<_>>().map(Some)
    }

    /// The token whose id is under `key`. Without one, or where no token has it, the one of `default`, if
    /// the vocabulary reaches so far.
    fn token<'t>(
        &self,
        key: &str,
        default: Option<u32>,
        tokens: &[&'t str],
    ) -> Result<Option<(u32, &'t str)>> {
        let at = |id: u32| tokens.get(id as usize).map(|&text| (id, text));
        let Some(value) = self.get(key) else { return Ok(default.and_then(at)) };
        if !is_integer(value) {
            return Err(wrong(&full(key), "a token id", value));
        }
        let found = integer(value).and_then(|id| id.try_into().ok()).and_then(at);
        if found.is_none() {
            // As llama.cpp does: -1, for none, is common, and padding is not needed.
            let (key, tokens) = (full(key), tokens.len());
            tracing::warn!(key, id = ?value, tokens, "no token has this id: not used");
            return Ok(default.and_then(at));
        }
        Ok(found)
    }
}

fn as_str(value: &Value) -> Option<&str> {
    match value {
        Value::String(text) => Some(text),
        _ => None,
    }
}

fn full(key: &str) -> String {
    format!("tokenizer.ggml.{key}")
}

fn missing(key: &str) -> Error {
    Error::config(full(key), "a value", "none")
}

/// For an array, gives only its type: it may hold a whole vocabulary.
fn wrong(key: &str, expected: &str, got: &Value) -> Error {
    let got = match got {
        Value::Array(_) => "an array".to_owned(),
        Value::String(text) => format!("{text:?}"),
        other => format!("{other:?}"),
    };
    Error::config(key, expected, got)
}
