//! The tokens that a headword may stand as in a text.

use std::collections::HashSet;

use crate::error::Result;
use crate::tokenizer::Tokenizer;

/// A token that begins with a letter or digit, and so goes on with the word before it.
pub(super) const BEGINS_INSIDE: u32 = 1;
/// A token that ends with one, so that the word may go on.
pub(super) const ENDS_INSIDE: u32 = 2;

/// The forms of a headword: as it is spelled, and with a capital first letter; each with a space before it and
/// without one. Some may be equal, or none where the tokenizer has no tokens for it.
pub(super) struct Forms {
    pub(super) spelled: Vec<Vec<u32>>,
    pub(super) capital: Vec<Vec<u32>>,
}

impl Forms {
    pub(super) fn of(headword: &str, tokenizer: &Tokenizer) -> Result<Self> {
        let mut letters = headword.chars();
        let first: String = letters.next().into_iter().flat_map(char::to_uppercase).collect();
        let capital = format!("{first}{}", letters.as_str());
        let mut seen = HashSet::new();
        let mut forms = |spelling: &str| -> Result<Vec<Vec<u32>>> {
            let forms = [false, true].map(|space| form(spelling, space, tokenizer));
            let forms = forms.into_iter().filter_map(Result::transpose);
            let forms = forms.collect::<Result<Vec<_>>>()?;
            Ok(forms.into_iter().filter(|form| seen.insert(form.clone())).collect())
        };
        Ok(Self { spelled: forms(headword)?, capital: forms(&capital)? })
    }
}

/// The tokens of a word within a text, behind a line break: nothing merges with that, in any tokenizer that is read.
fn form(spelling: &str, space: bool, tokenizer: &Tokenizer) -> Result<Option<Vec<u32>>> {
    const BEFORE: &str = "\n";
    let text = format!("{BEFORE}{}{spelling}", if space { " " } else { "" });
    let (ids, bytes) = tokenizer.encode_spans(&text, false)?;
    let from = bytes.iter().position(|bytes| bytes.end > BEFORE.len()).unwrap_or(ids.len());
    let whole = bytes.get(from).is_some_and(|bytes| bytes.start >= BEFORE.len());
    let form = ids.get(from..).unwrap_or(&[]);
    // A control token, or the one for what is unknown, stands for anything.
    let own = whole && !form.iter().any(|id| tokenizer.is_special(*id));
    Ok(own.then(|| form.to_vec()))
}

/// For each token whether it begins and whether it ends inside a word: with a letter or a digit of any script. A part
/// of a character does, too.
pub(super) fn borders(tokenizer: &Tokenizer, vocab_size: usize) -> Vec<u32> {
    let border = |id: u32| {
        let bytes = tokenizer.bytes(id);
        let text = String::from_utf8_lossy(&bytes);
        let inside = |c: Option<char>| {
            c.is_some_and(|c| c.is_alphanumeric() || c == char::REPLACEMENT_CHARACTER)
        };
        let begins = if inside(text.chars().next()) { BEGINS_INSIDE } else { 0 };
        let ends = if inside(text.chars().next_back()) { ENDS_INSIDE } else { 0 };
        begins | ends
    };
    (0..u32::try_from(vocab_size).unwrap_or(u32::MAX)).map(border).collect()
}
