//! From token ids to text, one token at a time.
//!
//! Decoders of the tokenizers crate take the whole sequence. This one turns each token into bytes and
//! returns the characters that are complete, so that text never changes once it is out and a token costs
//! the same at any length.

use serde::Deserialize;
use serde::de::IgnoredAny;
use tokenizers::DecoderWrapper;

use super::Tokenizer;
use crate::error::{Error, Result};

/// How the spelling of a token in the vocabulary becomes bytes of text.
#[derive(Debug, Default)]
pub(super) struct Detokenizer {
    /// Each character of a token stands for one byte, by the alphabet of GPT-2.
    byte_level: bool,
    /// `<0xE6>` stands for one byte.
    byte_fallback: bool,
    /// Pairs of (spelling, text), such as ("▁", " ").
    replace: Vec<(String, String)>,
    /// A character cut from the start of a text, and how often at most.
    strip: Option<(char, usize)>,
}

/// The decoder part of a `tokenizer.json`.
#[derive(Deserialize)]
#[serde(tag = "type")]
enum Part {
    ByteLevel,
    ByteFallback,
    Fuse,
    Replace {
        pattern: Pattern,
        content: String,
    },
    Strip {
        content: char,
        start: usize,
        stop: usize,
    },
    Metaspace {
        replacement: char,
        prepend_scheme: String,
    },
    Sequence {
        decoders: Vec<Part>,
    },
    #[serde(other)]
    Other,
}

#[derive(Deserialize)]
enum Pattern {
    String(String),
    Regex(IgnoredAny),
}

impl Detokenizer {
    /// Reads the decoders of byte-level and SentencePiece vocabularies, the two that Mistral and its
    /// relatives use. Others look at more than one token, or at the end of the text.
    pub(super) fn new(decoder: Option<&DecoderWrapper>) -> Result<Self> {
        let json = serde_json::to_value(decoder).map_err(super::failed)?;
        let mut detokenizer = Self::default();
        let known = Part::deserialize(&json).is_ok_and(|part| detokenizer.add(part));
        if known { Ok(detokenizer) } else { Err(Error::unsupported("tokenizer decoder", json)) }
    }

    /// Whether `part` could be added.
    fn add(&mut self, part: Part) -> bool {
        match part {
            Part::ByteLevel => self.byte_level = true,
            Part::ByteFallback => self.byte_fallback = true,
            Part::Fuse => {}
            Part::Replace { pattern: Pattern::String(pattern), content } => {
                self.replace.push((pattern, content));
            }
            Part::Strip { content, start, stop: 0 } => self.strip = Some((content, start)),
            Part::Metaspace { replacement, prepend_scheme } => {
                self.replace.push((replacement.to_string(), " ".to_owned()));
                self.strip = (prepend_scheme != "never").then_some((' ', 1));
            }
            Part::Sequence { decoders } => {
                return decoders.into_iter().all(|part| self.add(part));
            }
            Part::Replace { pattern: Pattern::Regex(_), .. } | Part::Strip { .. } | Part::Other => {
                return false;
            }
        }
        true
    }

    pub(super) fn append(&self, token: &str, bytes: &mut Vec<u8>) {
        if self.byte_level {
            let spelled: Option<Vec<u8>> = token.chars().map(byte_of).collect();
            // A token that was added to the vocabulary is spelled literally.
            return bytes.extend(spelled.unwrap_or_else(|| token.as_bytes().to_vec()));
        }
        if self.byte_fallback
            && let Some(byte) = fallback_byte(token)
        {
            return bytes.push(byte);
        }
        let mut text = token.to_owned();
        for (spelling, content) in &self.replace {
            text = text.replace(spelling, content);
        }
        bytes.extend(text.as_bytes());
    }
}

/// The byte that `c` stands for in the alphabet of GPT-2: printable bytes are spelled as
/// themselves, and the other 68 are numbered upwards from U+0100.
fn byte_of(c: char) -> Option<u8> {
    let code = u32::from(c);
    let byte = match code {
        0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => code,
        0x100..=0x120 => code - 0x100,        // 0x00..=0x20
        0x121..=0x142 => code - 0x121 + 0x7f, // 0x7f..=0xa0
        0x143 => 0xad,
        _ => return None,
    };
    u8::try_from(byte).ok()
}

/// The character that stands for a byte: the inverse of [`byte_of`].
pub(super) fn letter_of(byte: u8) -> char {
    let code = u32::from(byte);
    let code = match byte {
        0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => code,
        0x00..=0x20 => 0x100 + code,
        0x7f..=0xa0 => 0x121 + code - 0x7f,
        0xad => 0x143,
    };
    char::from_u32(code).unwrap_or(char::REPLACEMENT_CHARACTER)
}

/// `<0xE6>` -> 0xE6
fn fallback_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    let two = digits.len() == 2 && digits.bytes().all(|b| b.is_ascii_hexdigit());
    two.then(|| u8::from_str_radix(digits, 16).ok()).flatten()
}

/// Decodes token by token; made by [`Tokenizer::decode_stream`].
///
/// The concatenated pieces are the text that follows the prompt: what [`Tokenizer::decode`] gives for
/// prompt and answer together, minus what it gives for the prompt. A character that is spread over
/// several tokens comes with the last of them.
#[derive(Clone, Debug)]
pub struct DecodeStream {
    tokenizer: Tokenizer,
    skip_special: bool,
    /// The start of an incomplete character: 0 to 3 bytes between calls.
    pending: Vec<u8>,
    /// How many characters may still be stripped; 0 once the text has begun.
    strip: usize,
}

impl DecodeStream {
    pub(super) fn start(tokenizer: &Tokenizer, skip_special: bool) -> Self {
        let strip = tokenizer.detokenizer.strip.map_or(0, |(_, times)| times);
        Self { tokenizer: tokenizer.clone(), skip_special, pending: Vec::new(), strip }
    }

    /// Takes the next token and returns the text that it completes, which is empty for a control token
    /// and in the middle of a character.
    pub fn push(&mut self, id: u32) -> String {
        if self.skip_special && self.tokenizer.is_special(id) {
            return String::new();
        }
        if let Some(token) = self.tokenizer.token(id) {
            self.tokenizer.detokenizer.append(&token, &mut self.pending);
        }
        let text = self.take_complete();
        self.strip_start(text)
    }

    /// Returns what is left: U+FFFD if the last character never became complete, otherwise nothing.
    pub fn finish(&mut self) -> String {
        let mut text = String::new();
        self.replace_invalid(self.pending.len(), &mut text);
        self.pending.clear();
        self.strip_start(text)
    }

    /// Moves the complete characters out of `pending`, with U+FFFD for invalid bytes.
    fn take_complete(&mut self) -> String {
        let mut text = String::new();
        let bytes = std::mem::take(&mut self.pending);
        let mut chunks = bytes.utf8_chunks().peekable();
        while let Some(chunk) = chunks.next() {
            text.push_str(chunk.valid());
            let invalid = chunk.invalid();
            let may_go_on = std::str::from_utf8(invalid).is_err_and(|e| e.error_len().is_none());
            if may_go_on && chunks.peek().is_none() {
                self.pending = invalid.to_vec();
            } else {
                self.replace_invalid(invalid.len(), &mut text);
            }
        }
        text
    }

    /// SentencePiece writes one U+FFFD for each byte, byte-level decoders one for the sequence.
    fn replace_invalid(&self, bytes: usize, text: &mut String) {
        let count = if self.tokenizer.detokenizer.byte_fallback { bytes } else { bytes.min(1) };
        text.extend(std::iter::repeat_n(char::REPLACEMENT_CHARACTER, count));
    }

    fn strip_start(&mut self, mut text: String) -> String {
        if let Some((content, _)) = self.tokenizer.detokenizer.strip {
            while self.strip > 0 && !text.is_empty() {
                if text.starts_with(content) {
                    text.remove(0);
                    self.strip -= 1;
                } else {
                    self.strip = 0;
                }
            }
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::{byte_of, letter_of};

    #[test]
    fn every_byte_has_a_letter_of_its_own() {
        let alphabet = tokenizers::pre_tokenizers::byte_level::ByteLevel::alphabet();
        let letters: HashSet<char> = (0..=255).map(letter_of).collect();
        assert_eq!(letters, alphabet.into_iter().collect());
        assert!((0..=255).all(|byte| byte_of(letter_of(byte)) == Some(byte)));
    }
}
