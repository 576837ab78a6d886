//! Long texts in pieces that a model can read.

use std::ops::Range;

use unicode_segmentation::UnicodeSegmentation;

use crate::error::{Error, Result};
use crate::tokenizer::Tokenizer;

/// The least that pieces may be asked to have: enough for any character, and what is added around a text.
const LEAST: usize = 16;

/// A text in pieces of at most `most` tokens each, counted with what the tokenizer adds around a text: the bytes of each,
/// in their order, without blanks around them. Of a text that is short enough there is one, of a blank text none.
///
/// A piece ends where a paragraph does, else where a sentence or a word does, if there is one in its second half.
///
/// ```
/// # use candle_core::Device;
/// use hybrid_attention::HybridModel;
/// use hybrid_attention::memory::pieces;
///
/// # fn main() -> hybrid_attention::Result<()> {
/// let model = HybridModel::tiny(&Device::Cpu)?;
/// let tokenizer = model.tokenizer().unwrap();
/// let text = "Then Eva gave everything to Max. Earlier, Leo had handed everything to Ida. ".repeat(3);
/// for piece in pieces(tokenizer, &text, 20)? {
///     assert!(tokenizer.encode(&text[piece], true)?.len() <= 20);
/// }
/// # Ok(())
/// # }
/// ```
///
/// # Errors
/// [`Error::Parameter`] for `most` below 16; [`Error::Tokenizer`].
pub fn pieces(tokenizer: &Tokenizer, text: &str, most: usize) -> Result<Vec<Range<usize>>> {
    if most < LEAST {
        return Err(Error::parameter("tokens of a piece", "at least 16", most));
    }
    let (body, from) = (text.trim(), text.len() - text.trim_start().len());
    if body.is_empty() {
        return Ok(Vec::new());
    }
    if tokenizer.encode(body, true)?.len() <= most {
        return Ok(vec![from..from + body.len()]);
    }
    let (_, tokens) = tokenizer.encode_spans(text, true)?;
    let around = tokens.iter().filter(|bytes| bytes.is_empty()).count();
    let (mut pieces, mut first, mut start) = (Vec::new(), 0, 0);
    loop {
        let rest = text.get(start..).unwrap_or_default();
        start += rest.len() - rest.trim_start().len();
        if start >= text.len() {
            return Ok(pieces);
        }
        let before = |token: &&Range<usize>| token.end <= start;
        first += tokens.iter().skip(first).take_while(before).count();
        let mut room = most.saturating_sub(around).max(1);
        let piece = loop {
            let end = tokens.get(first + room).map_or(text.len(), |token| token.start);
            let end = start + cut(text.get(start..).unwrap_or_default(), end.saturating_sub(start));
            let piece = text.get(start..end).unwrap_or_default().trim_end();
            // By itself a piece may be spelled in more tokens than as a part of the text.
            let over = tokenizer.encode(piece, true)?.len().saturating_sub(most);
            if over == 0 || room == 1 {
                break start..start + piece.len();
            }
            room = room.saturating_sub(over).max(1);
        };
        start = piece.end;
        pieces.push(piece);
    }
}

/// Where to cut `text`, at `most` bytes or before; behind its first character at least.
fn cut(text: &str, most: usize) -> usize {
    let whole = |at: &usize| text.is_char_boundary(*at);
    let most = (0..=most.min(text.len())).rev().find(whole).unwrap_or(0);
    let first = text.chars().next().map_or(0, char::len_utf8);
    if most == text.len() || most <= first {
        return most.max(first);
    }
    let head = text.get(..most).unwrap_or_default();
    let late = |at: &usize| *at > most / 2;
    let paragraph = head.rfind("\n\n").filter(late);
    // What goes on behind the cut is looked at, too: a sentence or a word that is cut does not end there.
    let near = text.get(..(most + 64..text.len()).find(whole).unwrap_or(text.len()));
    let near = near.unwrap_or(text);
    let last = |bounds: &mut dyn Iterator<Item = (usize, &str)>| {
        bounds.map(|(at, _)| at).take_while(|at| *at <= most).last().filter(late)
    };
    let sentence = || last(&mut near.split_sentence_bound_indices());
    let word = || last(&mut near.split_word_bound_indices());
    paragraph.or_else(sentence).or_else(word).unwrap_or(most)
}

#[cfg(test)]
mod tests {
    use super::cut;

    #[test]
    fn cuts_are_where_something_ends() {
        assert_eq!(cut("One two. Three four.", 12), 9); // "One two. "
        assert_eq!(cut("One two three four", 10), 8);
        assert_eq!(cut("A b c d.\n\nC. D e", 14), 8);
        assert_eq!((cut("éé", 1), cut("éé", 3), cut("ab", 9), cut("", 3)), (2, 2, 2, 0));
    }
}
