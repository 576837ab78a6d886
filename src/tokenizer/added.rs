//! What `tokenizer_config.json` and `added_tokens.json` add to a `tokenizer.json`, as `transformers` 4.57
//! reads them: tokens that fine-tunes bring along, and whether BOS and EOS stand around a text.

use std::collections::BTreeMap;

use serde::Deserialize;
use tokenizers::processors::template::{SpecialToken, TemplateProcessing};
use tokenizers::{AddedToken, Tokenizer};

use super::{failed, guard};
use crate::error::{Error, Result};

/// An entry of `added_tokens_decoder`; the flags have the defaults of `tokenizers`.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct Entry {
    content: String,
    #[serde(default)]
    single_word: bool,
    #[serde(default)]
    lstrip: bool,
    #[serde(default)]
    rstrip: bool,
    normalized: Option<bool>,
    #[serde(default)]
    special: bool,
}

impl Entry {
    /// An entry of `added_tokens.json`, which holds no flags.
    pub(super) fn named(content: String, special: bool) -> Self {
        let (single_word, lstrip, rstrip, normalized) = (false, false, false, None);
        Self { content, single_word, lstrip, rstrip, normalized, special }
    }
}

/// Adds those tokens, by their ids, that the vocabulary does not treat as added ones yet.
///
/// # Errors
/// [`Error::Tokenizer`] where a token gets another id than the file says: a new one gets the next free id.
pub(super) fn add(inner: &mut Tokenizer, tokens: &BTreeMap<u32, Entry>) -> Result<()> {
    let known = inner.get_added_vocabulary().get_added_tokens_decoder().clone();
    let is_new = |(id, entry): &(&u32, &Entry)| {
        known.get(id).is_none_or(|token| token.content != entry.content)
    };
    let new: Vec<_> = tokens.iter().filter(is_new).collect();
    let added = new.iter().map(|(_, entry)| {
        AddedToken::from(entry.content.clone(), entry.special)
            .single_word(entry.single_word)
            .lstrip(entry.lstrip)
            .rstrip(entry.rstrip)
            .normalized(entry.normalized.unwrap_or(!entry.special))
    });
    guard(|| inner.add_tokens(added.collect::<Vec<_>>()))?;
    for (&id, entry) in new {
        let got = inner.token_to_id(&entry.content);
        if got != Some(id) {
            let got = got.map_or_else(|| "none".to_owned(), |id| id.to_string());
            let message = format!("added token {:?}: expected id {id}, got {got}", entry.content);
            return Err(Error::Tokenizer { message });
        }
    }
    Ok(())
}

/// Puts BOS in front of a text and EOS behind it, or takes them away, where the file says so and
/// `tokenizer.json` does otherwise.
pub(super) fn surround(
    inner: &mut Tokenizer,
    [bos, eos]: [(Option<bool>, Option<&str>); 2],
) -> Result<()> {
    let around = guard(|| inner.encode_fast("", true))?.get_ids().to_vec();
    let id_of = |token: Option<&str>| {
        token.and_then(|token| Some((token.to_owned(), inner.token_to_id(token)?)))
    };
    let (bos_id, eos_id) = (id_of(bos.1), id_of(eos.1));
    let is = |at: Option<&u32>, token: &Option<(String, u32)>| {
        token.as_ref().is_some_and(|(_, id)| at == Some(id))
    };
    let has = [is(around.first(), &bos_id), is(around.last(), &eos_id)];
    let wants = [bos.0.unwrap_or(has[0]), eos.0.unwrap_or(has[1])];
    if wants == has {
        return Ok(());
    }
    let (mut template, mut special) = (vec!["$A".to_owned()], Vec::new());
    for (name, wanted, token) in
        [("add_bos_token", wants[0], bos_id), ("add_eos_token", wants[1], eos_id)]
    {
        match (wanted, token) {
            (false, _) => {}
            (true, Some((_, id))) => {
                let at = if name == "add_bos_token" { 0 } else { template.len() };
                template.insert(at, name.to_owned());
                special.push(SpecialToken::from((name.to_owned(), id)));
            }
            (true, None) => {
                tracing::warn!("{name} is true, but no such token is named: none is added")
            }
        }
    }
    let processor = TemplateProcessing::builder()
        .try_single(template)
        .map_err(failed)?
        .special_tokens(special)
        .build()
        .map_err(failed)?;
    inner.with_post_processor(Some(processor));
    Ok(())
}
