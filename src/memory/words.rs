//! Whole words of a text, and the tokens that spell them.

use std::ops::Range;

use unicode_segmentation::UnicodeSegmentation;

/// A word of a text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Word {
    /// Where in the text.
    pub(super) bytes: Range<usize>,
    /// The tokens that spell some of it.
    pub(super) tokens: Range<usize>,
}

/// The words of `text` by the rules of Unicode (UAX #29), which takes punctuation and blanks for none, and an
/// ideograph for one. `tokens` are the bytes of each token, in their order; a token that has none, as BOS, is in
/// no word.
///
/// Tokens that spell a piece of a word, with or without the blank before it, count as all of it:
///
/// ```text
/// text     a  b a l d   m a n .
/// bytes    0 1 2 3 4 5 6 7 8 9 10        words  0..1     2..6     7..10
/// tokens   0..1  1..4  4..6  6..10 10..11       tokens 0, tokens 1 2, token 3; none has the last one
/// ```
pub(super) fn words(text: &str, tokens: &[Range<usize>]) -> Vec<Word> {
    let mut first = 0;
    let word = |(start, word): (usize, &str)| {
        let bytes = start..start + word.len();
        let ends_before = |token: &&Range<usize>| token.end <= bytes.start;
        first += tokens.iter().skip(first).take_while(ends_before).count();
        // A token without bytes inside a word is skipped over: none of the word is lost by it.
        let begins_in = |token: &&Range<usize>| token.start < bytes.end;
        let count = tokens.iter().skip(first).take_while(begins_in).count();
        Word { bytes, tokens: first..first + count }
    };
    let words = text.unicode_word_indices().map(word);
    words.filter(|word| !word.tokens.is_empty()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worked_example() {
        let tokens = [0..1, 1..4, 4..6, 6..10, 10..11];
        let found = words("a bald man.", &tokens);
        let tokens: Vec<_> = found.iter().map(|word| word.tokens.clone()).collect();
        assert_eq!(tokens, [0..1, 1..3, 3..4]);
        let bytes: Vec<_> = found.iter().map(|word| word.bytes.clone()).collect();
        assert_eq!(bytes, [0..1, 2..6, 7..10]);
    }

    #[test]
    fn a_token_may_spell_two_words_and_bos_none() {
        // BOS, then one token for both ideographs
        let found = words("東京", &[0..0, 0..6]);
        let tokens: Vec<_> = found.iter().map(|word| word.tokens.clone()).collect();
        assert_eq!(tokens, [1..2, 1..2]);
        assert_eq!(words("?! …", &[0..1, 1..2, 2..6]), []);
    }
}
