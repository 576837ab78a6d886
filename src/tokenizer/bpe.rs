//! What all vocabularies of byte-pair encoding share: merges where a file stores none, and the steps around
//! them, bytewise or as SentencePiece has them.

use std::collections::HashMap;

use tokenizers::decoders::{
    byte_fallback::ByteFallback, fuse::Fuse, sequence::Sequence as Decoders, strip::Strip,
};
use tokenizers::models::bpe::{BPE, Merges, Vocab};
use tokenizers::normalizers::Replace;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::sequence::Sequence as PreTokenizers;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{DecoderWrapper, PreTokenizerWrapper, SplitDelimiterBehavior};

use super::{failed, guard};
use crate::error::Result;

/// Bytes of the longest token that merges are derived for, since the work grows with the square.
/// SentencePiece trains tokens of at most 16 characters by default.
pub(super) const LONGEST_MERGE: usize = 1024;

/// The squares of the lengths of all tokens, added up: the bytes that are looked up and kept for merges, at most.
/// The 130072 tokens of Mistral Nemo, the largest published vocabulary of the kind, come to 7 million.
const MOST_WORK: usize = 1 << 28;

/// What a file says about a token.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Kind {
    /// Text, as BPE merges it.
    Text,
    /// `<unk>`, or a control token such as `</s>`.
    Special,
    /// A symbol that is never split, and counts as text.
    UserDefined,
    /// `<0x41>`
    Byte,
}

pub(super) fn vocab(tokens: &[&str]) -> Vocab {
    tokens.iter().map(|&token| token.to_owned()).zip(0..).collect()
}

/// The merges of a vocabulary that stores none, as SentencePiece's and tiktoken's: each way to split a token into
/// two tokens, the best score first, as transformers converts them. Bytes and control tokens are left
/// out, since no text is merged into one.
///
/// # Errors
/// [`crate::Error::Tokenizer`] if the tokens are too long for it.
pub(super) fn merges_by_score(tokens: &[&str], scores: &[f32], kinds: &[Kind]) -> Result<Merges> {
    let mergeable = |token: &&&str| token.len() <= LONGEST_MERGE;
    let work = tokens.iter().filter(mergeable).map(|token| token.len().pow(2));
    let work = work.fold(0, usize::saturating_add);
    if work > MOST_WORK {
        let most = format!("at most {MOST_WORK} for the squares of their lengths, got {work}");
        return Err(failed(format!("tokens too long to derive merges from: expected {most}")));
    }
    let text = |&(id, _): &(usize, &str)| {
        kinds.get(id).is_some_and(|kind| matches!(kind, Kind::Text | Kind::UserDefined))
    };
    let ids: HashMap<&str, usize> =
        tokens.iter().copied().enumerate().filter(text).map(|(id, token)| (token, id)).collect();
    let mut merges = Vec::with_capacity(2 * tokens.len());
    for (&token, &score) in tokens.iter().zip(scores) {
        if token.len() > LONGEST_MERGE || !ids.contains_key(token) {
            continue;
        }
        let first = merges.len();
        for (length, (at, _)) in token.char_indices().enumerate().skip(1) {
            let (left, right) = token.split_at(at);
            if let (Some(&l), Some(&r)) = (ids.get(left), ids.get(right)) {
                merges.push((score, length, right.chars().count(), (l, r), left, right));
            }
        }
        if let Some(ways) = merges.get_mut(first..) {
            ways.sort_by_key(|&(.., ids, _, _)| ids);
        }
    }
    // Stable, so that ties stay in the order of the vocabulary.
    merges.sort_by(|a, b| b.0.total_cmp(&a.0).then((b.1, b.2).cmp(&(a.1, a.2))));
    Ok(merges.into_iter().map(|(.., left, right)| (left.to_owned(), right.to_owned())).collect())
}

/// A tokenizer that splits by `patterns`, one after the other, and spells bytes in the alphabet of GPT-2.
pub(super) fn byte_level(model: BPE, patterns: &[&str]) -> Result<tokenizers::Tokenizer> {
    let mut splits = Vec::with_capacity(patterns.len() + 1);
    for &pattern in patterns {
        let pattern = SplitPattern::Regex(pattern.to_owned());
        let split = guard(|| Split::new(pattern, SplitDelimiterBehavior::Isolated, false))?;
        splits.push(PreTokenizerWrapper::from(split));
    }
    splits.push(ByteLevel::new(false, false, false).into());

    let mut inner = tokenizers::Tokenizer::new(model);
    inner.with_pre_tokenizer(Some(PreTokenizers::new(splits)));
    inner.with_decoder(Some(ByteLevel::default()));
    Ok(inner)
}

/// The model of a SentencePiece vocabulary; `byte_fallback` writes a character without a token as its bytes, otherwise
/// it is `unk`.
pub(super) fn sentencepiece(
    tokens: &[&str],
    merges: Merges,
    unk: Option<&str>,
    byte_fallback: bool,
) -> Result<BPE> {
    let model = BPE::builder().vocab_and_merges(vocab(tokens), merges);
    let mut model = model.byte_fallback(byte_fallback).fuse_unk(true);
    if let Some(unk) = unk {
        model = model.unk_token(unk.to_owned());
    }
    guard(|| model.build())
}

/// What turns the tokens of a SentencePiece vocabulary back into text. `strip`: spaces that are cut from its start, at
/// most.
pub(super) fn sentencepiece_decoder(strip: usize) -> Result<Decoders> {
    let mut decoders: Vec<DecoderWrapper> = vec![
        Replace::new("▁", " ").map_err(failed)?.into(),
        ByteFallback::new().into(),
        Fuse::new().into(),
    ];
    if strip > 0 {
        decoders.push(Strip::new(' ', strip, 0).into());
    }
    Ok(Decoders::new(decoders))
}
