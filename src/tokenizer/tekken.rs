//! `tekken.json`, the vocabulary of Mistral's models since Nemo, as `mistral-common` reads it.
//!
//! It stores tokens by rank and no merges, as tiktoken does: of two neighbours, those are merged first whose union has
//! the lowest rank. Control tokens come before all others: with 1000 of them, rank 0 has the id 1000.

use std::borrow::Cow;
use std::collections::HashSet;

use serde::Deserialize;
use serde::de::IgnoredAny;
use tokenizers::AddedToken;
use tokenizers::models::bpe::BPE;

use super::bpe::{self, Kind, LONGEST_MERGE, merges_by_score};
use super::decode::letter_of;
use super::instruct::Version;
use super::{Surroundings, Vocabulary, failed, guard, wrong};
use crate::error::Result;

/// Control tokens of a file that lists none, up to version v7; those that follow are fillers.
const CONTROL: [&str; 20] = [
    "<unk>",
    "<s>",
    "</s>",
    "[INST]",
    "[/INST]",
    "[AVAILABLE_TOOLS]",
    "[/AVAILABLE_TOOLS]",
    "[TOOL_RESULTS]",
    "[/TOOL_RESULTS]",
    "[TOOL_CALLS]",
    "[IMG]",
    "<pad>",
    "[IMG_BREAK]",
    "[IMG_END]",
    "[PREFIX]",
    "[MIDDLE]",
    "[SUFFIX]",
    "[SYSTEM_PROMPT]",
    "[/SYSTEM_PROMPT]",
    "[TOOL_CONTENT]",
];

/// Published files have 1000.
const MOST_CONTROL: usize = 1 << 16;

#[derive(Deserialize)]
struct File<'f> {
    config: Config,
    #[serde(borrow)]
    vocab: Vec<Entry<'f>>,
    special_tokens: Option<Vec<Control>>,
}

/// Only what says how a chat is written.
#[derive(Deserialize)]
struct Head {
    config: Config,
    #[serde(rename = "vocab")]
    _vocab: IgnoredAny,
}

#[derive(Deserialize)]
struct Config {
    pattern: String,
    /// Of all tokens. Those of `vocab` that are too many are left out.
    default_vocab_size: usize,
    default_num_special_tokens: usize,
    version: Option<String>,
}

#[derive(Deserialize)]
struct Entry<'f> {
    rank: usize,
    /// In base 64.
    #[serde(borrow)]
    token_bytes: Cow<'f, str>,
}

#[derive(Deserialize)]
struct Control {
    rank: usize,
    token_str: String,
}

/// # Errors
/// [`crate::Error::Tokenizer`] says what of it cannot be.
pub(super) fn read(bytes: &[u8]) -> Result<Vocabulary> {
    let File { config, vocab, special_tokens } = serde_json::from_slice(bytes).map_err(failed)?;
    let version = config.version();
    let controls = config.controls(special_tokens, version)?;
    let room = config.default_vocab_size.checked_sub(controls.len());
    let count = room.filter(|&count| (256..=vocab.len()).contains(&count)).ok_or_else(|| {
        let range = format!("{} to {}", controls.len() + 256, controls.len() + vocab.len());
        wrong("default_vocab_size", range, config.default_vocab_size)
    })?;

    let mut tokens = controls.clone();
    for (rank, entry) in vocab.iter().take(count).enumerate() {
        if entry.rank != rank {
            return Err(wrong(format!("vocab[{rank}].rank"), rank, entry.rank));
        }
        let field = || format!("vocab[{rank}].token_bytes");
        let text = &*entry.token_bytes;
        let bytes = base64(text).ok_or_else(|| wrong(field(), "bytes in base 64", text))?;
        let single = u8::try_from(rank).map(|byte| vec![byte]);
        if let Ok(single) = single
            && bytes != single
        {
            return Err(wrong(field(), format!("{single:?} alone"), format!("{bytes:?}")));
        }
        let spelled: String = bytes.into_iter().map(letter_of).collect();
        if spelled.is_empty() || spelled.len() > LONGEST_MERGE {
            let range = format!("1 to {LONGEST_MERGE} bytes when spelled");
            return Err(wrong(field(), range, spelled.len()));
        }
        tokens.push(spelled);
    }
    let tokens: Vec<&str> = tokens.iter().map(String::as_str).collect();
    let mut seen = HashSet::with_capacity(tokens.len());
    if let Some((id, token)) = tokens.iter().enumerate().find(|(_, token)| !seen.insert(**token)) {
        return Err(wrong(format!("token {id}"), "no token twice", format!("{token:?}")));
    }

    let mut kinds = vec![Kind::Special; controls.len()];
    kinds.resize(tokens.len(), Kind::Text);
    // The lowest rank first; exact up to 2^24, and a vocabulary of as many tokens is more than a file may hold.
    let scores: Vec<f32> = (0..tokens.len()).map(|id| -(id as f32)).collect();
    let merges = merges_by_score(&tokens, &scores, &kinds)?;
    let model = BPE::builder().vocab_and_merges(bpe::vocab(&tokens), merges).ignore_merges(true);
    let mut inner = bpe::byte_level(guard(|| model.build())?, &[&config.pattern])?;
    let added = controls.iter().map(|control| AddedToken::from(control.clone(), true));
    guard(|| inner.add_tokens(added.collect::<Vec<_>>()))?;

    let named = |name: &str| controls.iter().find(|control| *control == name).cloned();
    let around = Surroundings {
        bos_token: named("<s>"),
        eos_token: named("</s>"),
        unk_token: named("<unk>"),
        pad_token: named("<pad>"),
        chat_template: None,
    };
    Ok(Vocabulary { inner, around, version })
}

/// How a chat is written for the model beside this file.
pub(super) fn version(bytes: &[u8]) -> Result<Option<Version>> {
    let head: Head = serde_json::from_slice(bytes).map_err(failed)?;
    Ok(head.config.version())
}

impl Config {
    fn version(&self) -> Option<Version> {
        self.version.as_deref().and_then(Version::parse)
    }

    /// The control tokens by id, fillers included.
    fn controls(
        &self,
        listed: Option<Vec<Control>>,
        version: Option<Version>,
    ) -> Result<Vec<String>> {
        let count = self.default_num_special_tokens;
        if count > MOST_CONTROL {
            let most = format!("at most {MOST_CONTROL}");
            return Err(wrong("default_num_special_tokens", most, count));
        }
        let listed = match listed {
            Some(listed) => listed,
            // A newer file lists them; which ones an unknown one means is not known.
            None if version.is_some_and(|version| version <= Version::V7) => {
                let all = CONTROL.iter().enumerate();
                all.map(|(rank, token)| Control { rank, token_str: (*token).to_owned() }).collect()
            }
            None => return Err(wrong("special_tokens", "a list, as from version v11 on", "none")),
        };
        let mut controls = vec![None; count];
        for (index, Control { rank, token_str }) in listed.into_iter().enumerate() {
            let field = |name| format!("special_tokens[{index}].{name}");
            if token_str.is_empty() {
                return Err(wrong(field("token_str"), "a text", "\"\""));
            }
            match controls.get_mut(rank) {
                Some(free @ None) => *free = Some(token_str),
                Some(Some(_)) => return Err(wrong(field("rank"), "no rank twice", rank)),
                None => return Err(wrong(field("rank"), format!("less than {count}"), rank)),
            }
        }
        let filler = |(rank, control): (_, Option<_>)| {
            control.unwrap_or_else(|| format!("<SPECIAL_{rank}>"))
        };
        Ok(controls.into_iter().enumerate().map(filler).collect())
    }
}

/// Base 64 with padding: `"SGk="` -> `b"Hi"`.
fn base64(text: &str) -> Option<Vec<u8>> {
    let value = |digit: u8| match digit {
        b'A'..=b'Z' => Some(digit - b'A'),
        b'a'..=b'z' => Some(digit - b'a' + 26),
        b'0'..=b'9' => Some(digit - b'0' + 52),
        b'+' => Some(62),
        b'/' => Some(63),
        _ => None,
    };
    let digits = text.trim_end_matches('=');
    // Four digits make three bytes; of the last ones, two make one byte and three make two.
    if !text.len().is_multiple_of(4) || text.len() - digits.len() > 2 {
        return None;
    }
    let mut bytes = Vec::with_capacity(digits.len() / 4 * 3 + 2);
    for quad in digits.as_bytes().chunks(4) {
        let mut bits = 0u32;
        for index in 0..4 {
            let digit = quad.get(index).map_or(Some(0), |&digit| value(digit))?;
            bits = bits << 6 | u32::from(digit);
        }
        let [_, three @ ..] = bits.to_be_bytes();
        bytes.extend(three.iter().take(quad.len() - 1));
    }
    Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::base64;

    #[test]
    fn base_64_is_read_as_rfc_4648_writes_it() {
        let vectors = [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
            ("fooba", "Zm9vYmE="),
            ("foobar", "Zm9vYmFy"),
        ];
        for (text, coded) in vectors {
            assert_eq!(base64(coded).as_deref(), Some(text.as_bytes()), "{coded}");
        }
        assert_eq!(base64("/+8="), Some(vec![0xff, 0xef]));
        for coded in ["Zg", "Zg=", "=", "====", "Z===", "Zm9v=", "Zm9v====", "Z g=", "Zm-v", "é"] {
            assert_eq!(base64(coded), None, "{coded}");
        }
    }
}
