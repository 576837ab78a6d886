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
/// `tokenizer.json` does otherwise. Each is a flag, and the token that is named.
pub(super) fn surround(
    inner: &mut Tokenizer,
    [bos, eos]: [(Option<bool>, Option<&str>); 2],
) -> Result<()> {
    let around = guard(|| inner.encode_fast("", true))?.get_ids().to_vec();
    let id_of = |token: Option<&str>| token.and_then(|token| inner.token_to_id(token));
    let eos_id = id_of(eos.1);
    // A BOS that is not named is what stands in front.
    let first = around.first().copied().filter(|id| Some(*id) != eos_id);
    let bos_id = id_of(bos.1).or(first);
    let has = [
        bos_id.is_some() && around.first() == bos_id.as_ref(),
        eos_id.is_some() && around.last() == eos_id.as_ref(),
    ];
    let mut wants = has;
    for (wants, (name, flag, id)) in
        wants.iter_mut().zip([("add_bos_token", bos.0, bos_id), ("add_eos_token", eos.0, eos_id)])
    {
        *wants = flag.unwrap_or(*wants);
        if *wants && id.is_none() {
            tracing::warn!("{name} is true, but no such token is named: none is added");
            *wants = false;
        }
    }
    if wants == has {
        return Ok(());
    }
    let bos = bos_id.filter(|_| wants[0]).map(|id| SpecialToken::from(("bos".to_owned(), id)));
    let eos = eos_id.filter(|_| wants[1]).map(|id| SpecialToken::from(("eos".to_owned(), id)));
    let names = [bos.as_ref().map(|_| "bos"), Some("$A"), eos.as_ref().map(|_| "eos")];
    let processor = TemplateProcessing::builder()
        .try_single(names.into_iter().flatten().collect::<Vec<_>>())
        .map_err(failed)?
        .special_tokens(bos.into_iter().chain(eos).collect::<Vec<_>>())
        .build()
        .map_err(failed)?;
    inner.with_post_processor(Some(processor));
    Ok(())
}
