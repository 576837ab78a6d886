//! What messages say is text: a control token that they spell is not one.
//!
//! A template may trim, cut, search and join what a message says, so only the rendered text shows where it went.
//! And there it must be told apart from what the template wrote. So one character of every control token that a
//! message spells is replaced by a mark, a private character that occurs nowhere else. The template
//! sees a text of the same length with the same words. When the rendered text is encoded, its control tokens are
//! taken out first; then the marks are replaced by what they stand for, and what is left is split and
//! merged as any text.

use std::collections::BTreeMap;

use tokenizers::{Model, OffsetReferential, OffsetType, PreTokenizer};

use super::{Message, Tokenizer, guard};
use crate::error::Result;

/// The private characters of the last plane, from the last one down.
const PRIVATE: std::ops::RangeInclusive<char> = '\u{100000}'..='\u{10fffd}';

/// Marks, and the characters that they stand for.
#[derive(Debug, Default)]
pub(super) struct Marks(Vec<(char, char)>);

impl Marks {
    /// The mark of a character: one that is none of `taken`.
    fn of(&mut self, c: char, taken: &dyn Fn(char) -> bool) -> Option<char> {
        if let Some((mark, _)) = self.0.iter().find(|(_, of)| *of == c) {
            return Some(*mark);
        }
        let free = |mark: &char| !taken(*mark) && self.0.iter().all(|(other, _)| other != mark);
        let mark = PRIVATE.rev().find(free)?;
        self.0.push((mark, c));
        Some(mark)
    }

    /// `text` as it was before it was marked.
    pub(super) fn remove(&self, text: &str) -> String {
        let of = |c: char| self.0.iter().find(|(mark, _)| *mark == c).map_or(c, |(_, of)| *of);
        text.chars().map(of).collect()
    }
}

impl Tokenizer {
    /// `messages` with marks in them, if any spells a control token.
    pub(super) fn mark(
        &self,
        messages: &[Message],
        template: &str,
    ) -> Result<Option<(Vec<Message>, Marks)>> {
        let added = self.inner.get_added_vocabulary().get_added_tokens_decoder();
        let taken = |c: char| {
            let said = messages.iter().any(|m| m.content.contains(c) || m.role.contains(c));
            said || template.contains(c) || added.values().any(|token| token.content.contains(c))
        };
        let mut marks = Marks::default();
        let mut marked = messages.to_vec();
        for message in &mut marked {
            // Where one is broken, another may appear.
            loop {
                let places = self.spelled(&message.content)?;
                let vital = places.into_iter().filter_map(|place| vital(&message.content, place));
                let vital: BTreeMap<usize, char> = vital.collect();
                let mut broken = String::with_capacity(message.content.len());
                for (at, c) in message.content.char_indices() {
                    let mark = vital.get(&at).and_then(|&c| marks.of(c, &taken));
                    broken.push(mark.unwrap_or(c));
                }
                if broken == message.content {
                    break;
                }
                message.content = broken;
            }
        }
        Ok((!marks.0.is_empty()).then_some((marked, marks)))
    }

    /// The places in `text` where a control token is spelled, in letters of any case.
    fn spelled(&self, text: &str) -> Result<Vec<(usize, usize)>> {
        guard(|| {
            let added = self.inner.get_added_vocabulary();
            let mut places = Vec::new();
            // As it is, and in letters that a template may change it to, which are as many bytes.
            let mut texts =
                vec![text.to_owned(), text.to_ascii_lowercase(), text.to_ascii_uppercase()];
            texts.dedup();
            for text in texts {
                let pieces = added.extract_and_normalize(self.inner.get_normalizer(), &text);
                for (_, place, tokens) in
                    pieces.get_splits(OffsetReferential::Original, OffsetType::Byte)
                {
                    if tokens.iter().flatten().any(|token| self.is_special(token.id)) {
                        places.push(place);
                    }
                }
            }
            // Whether these are tokens depends on what the template writes around them.
            let words = added.get_added_tokens_decoder().values();
            for word in words.filter(|t| t.special && t.single_word && !t.content.is_empty()) {
                let found = text.match_indices(&word.content);
                places.extend(found.map(|(start, word)| (start, start + word.len())));
            }
            Ok(places)
        })
    }

    /// Token ids of a rendered text with marks in it. Without marks, those of
    /// [`encode_raw`](Self::encode_raw).
    pub(super) fn encode_marked(&self, text: &str, marks: &Marks) -> Result<Vec<u32>> {
        guard(|| {
            let added = self.inner.get_added_vocabulary();
            let mut pieces = added.extract_and_normalize(self.inner.get_normalizer(), text);
            pieces.split(|_, mut piece| {
                for (mark, of) in &marks.0 {
                    piece.replace(*mark, of.encode_utf8(&mut [0; 4]))?;
                }
                Ok(std::iter::once(piece))
            })?;
            if let Some(splitter) = self.inner.get_pre_tokenizer() {
                splitter.pre_tokenize(&mut pieces)?;
            }
            let model = self.inner.get_model();
            pieces.tokenize(|piece| {
                let text = piece.get();
                let mut tokens = Vec::new();
                for token in model.tokenize(text)? {
                    let (start, end) = token.offsets;
                    let source = text.get(start..end).unwrap_or_default();
                    // A vocabulary of pieces may hold `</s>` as one of them. An unknown character, too, becomes a
                    // control token, but that is not how it is spelled.
                    if !self.is_special(token.id) || self.token(token.id).as_deref() != Some(source)
                    {
                        tokens.push(token);
                        continue;
                    }
                    for (at, c) in source.char_indices() {
                        for mut part in model.tokenize(c.encode_utf8(&mut [0; 4]))? {
                            let place = (start + at, start + at + c.len_utf8());
                            part.offsets = place;
                            tokens.push(part);
                        }
                    }
                }
                Ok(tokens)
            })?;
            let encoding = pieces.into_encoding(None, 0, OffsetType::Byte)?;
            Ok(self.inner.post_process(encoding, None, false)?.get_ids().to_vec())
        })
    }
}

/// The character of a spelled token to mark: a sign if there is one, as templates change letters and cut blanks, and
/// the last one, as they ask how a message begins.
fn vital(text: &str, (start, end): (usize, usize)) -> Option<(usize, char)> {
    let spelled = text.get(start..end)?;
    let mut signs = spelled.char_indices().rev().filter(|(_, c)| !c.is_whitespace());
    let sign = signs.clone().find(|(_, c)| !c.is_alphanumeric());
    let (at, c) = sign.or_else(|| signs.next()).or_else(|| spelled.char_indices().next())?;
    Some((start + at, c))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::path::Path;

    proptest! {
        /// Piece by piece, the ids are those of the crate that does it in one call.
        #[test]
        fn without_marks_nothing_changes(
            words in prop::collection::vec("[a-z <>/]{0,6}|é|漢字|</s>|<s>| <\\|endoftext\\|> |\n", 0..12),
            llama: bool,
        ) {
            let run = || -> Result<()> {
                let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tokenizer");
                let folder = folder.join(if llama { "llama" } else { "byte_level" });
                let Some(tokenizer) = Tokenizer::from_folder(&folder)? else { return Ok(()) };
                let text = words.concat();
                let ids = tokenizer.encode_marked(&text, &Marks::default())?;
                assert_eq!(ids, tokenizer.encode_raw(&text, false)?);
                Ok(())
            };
            run().map_err(|error| TestCaseError::fail(error.to_string()))?;
        }
    }
}
