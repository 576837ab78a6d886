//! The tokenizer of a suite, as in its `tokenizer.json`.

use flashback_suite::{END, UNKNOWN, Vocabulary};
use tokenizers::decoders::fuse::Fuse;
use tokenizers::models::wordlevel::WordLevel;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, SplitDelimiterBehavior, Tokenizer};

/// A tokenizer that cuts text before and after each name.
pub(crate) fn tokenizer(vocabulary: &Vocabulary) -> tokenizers::Result<Tokenizer> {
    let pieces = || vocabulary.pieces().iter().zip(0..);
    let ids = pieces().map(|(piece, id)| (piece.clone(), id)).collect();
    let model = WordLevel::builder().vocab(ids).unk_token(UNKNOWN.to_string()).build()?;
    let names = pieces().filter(|(_, id)| vocabulary.is_name(*id)).map(|(piece, _)| piece.as_str());
    // Most follow a blank, and what ends an invented word a hyphen.
    let after = |before: char| names.clone().filter_map(move |piece| piece.strip_prefix(before));
    let alternatives = |before| after(before).collect::<Vec<_>>().join("|");
    let (blank, hyphen) = (alternatives(' '), alternatives('-'));
    let mut pattern = format!(" (?:{blank})\\b");
    if !hyphen.is_empty() {
        pattern += &format!("|-(?:{hyphen})\\b");
    }
    let name = SplitPattern::Regex(pattern);
    let mut tokenizer = Tokenizer::new(model);
    let cut = Split::new(name, SplitDelimiterBehavior::Isolated, false)?;
    tokenizer.with_pre_tokenizer(Some(cut));
    tokenizer.with_decoder(Some(Fuse::new()));
    let special = [UNKNOWN, END].map(|token| AddedToken::from(token, true));
    tokenizer.add_special_tokens(special)?;
    Ok(tokenizer)
}

/// Whether a checkpoint's tokenizer has the tokens of `vocabulary`, and no others.
pub(crate) fn is_of(tokenizer: &hybrid_attention::Tokenizer, vocabulary: &Vocabulary) -> bool {
    let pieces = vocabulary.pieces();
    tokenizer.vocab_size() == pieces.len()
        && pieces.iter().zip(0..).all(|(piece, id)| tokenizer.token(id).as_ref() == Some(piece))
}
