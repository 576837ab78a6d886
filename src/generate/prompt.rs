//! What to answer: text, token ids or a conversation, in parts that think and parts that do not.

use std::ops::Range;

use crate::error::{Error, Result};
use crate::model::Batch;
use crate::tokenizer::{Message, Tokenizer};

/// A prompt. Text and token ids become one by [`From`]; [`Prompt::chat`] makes one of messages.
///
/// A prompt made from one piece is all *context*: thinking, if any, covers all of it except its last
/// token. That one is always read causally, because the answer begins from it. A prompt built in parts
/// can keep more out of thinking:
///
/// ```
/// use hybrid_attention::Prompt;
///
/// let prompt = Prompt::default()
///     .context("The ball is in the box. The box is in the car.")
///     .plain(" Where is the ball?");
/// # let _ = prompt;
/// ```
///
/// The tokens are those of the whole text, no matter where one part ends and the next begins.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Prompt {
    parts: Vec<Part>,
}

#[derive(Clone, Debug, PartialEq)]
struct Part {
    content: Content,
    thinks: bool,
}

#[derive(Clone, Debug, PartialEq)]
enum Content {
    Text(String),
    Ids(Vec<u32>),
    Chat(Vec<Message>),
}

/// A prompt as the model reads it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct EncodedPrompt {
    pub(crate) ids: Vec<u32>,
    /// The runs of tokens that are context, each a part of the prompt.
    context: Vec<Range<usize>>,
}

impl Prompt {
    /// A conversation, rendered by the checkpoint's chat template up to where the assistant speaks.
    #[must_use]
    pub fn chat(messages: &[Message]) -> Self {
        Self::default().with(Content::Chat(messages.to_vec()), true)
    }

    /// Adds text that is thought about, as a segment of its own.
    #[must_use]
    pub fn context(self, text: impl Into<String>) -> Self {
        self.with(Content::Text(text.into()), true)
    }

    /// Adds text that is only read causally.
    #[must_use]
    pub fn plain(self, text: impl Into<String>) -> Self {
        self.with(Content::Text(text.into()), false)
    }

    /// Adds tokens that are thought about, as a segment of their own.
    #[must_use]
    pub fn context_ids(self, ids: &[u32]) -> Self {
        self.with(Content::Ids(ids.to_vec()), true)
    }

    /// Adds tokens that are only read causally.
    #[must_use]
    pub fn plain_ids(self, ids: &[u32]) -> Self {
        self.with(Content::Ids(ids.to_vec()), false)
    }

    fn with(mut self, content: Content, thinks: bool) -> Self {
        self.parts.push(Part { content, thinks });
        self
    }

    /// The token ids of all parts one after the other, and which runs of them think.
    pub(crate) fn encode(&self, tokenizer: Option<&Tokenizer>) -> Result<EncodedPrompt> {
        let needs = |needed_for| tokenizer.ok_or(Error::NoTokenizer { needed_for });
        let mut encoded = EncodedPrompt { ids: Vec::new(), context: Vec::new() };
        let is_text = |part: &Part| matches!(part.content, Content::Text(_));
        for parts in self.parts.chunk_by(|a, b| is_text(a) && is_text(b)) {
            match parts {
                [Part { content: Content::Ids(ids), thinks }] => encoded.add(ids, *thinks),
                [Part { content: Content::Chat(messages), thinks }] => {
                    encoded.add(&needs("a chat")?.encode_chat(messages, true)?, *thinks);
                }
                texts => encoded.add_texts(texts, needs("a text prompt")?)?,
            }
        }
        if encoded.ids.is_empty() {
            return Err(Error::EmptyPrompt);
        }
        Ok(encoded)
    }
}

impl EncodedPrompt {
    /// Which of its tokens think together: the context, except for the very last token.
    pub(crate) fn batch(&self) -> Result<Batch> {
        let mut runs = self.context.clone();
        match runs.last_mut() {
            Some(last) if last.end == self.ids.len() => last.end -= 1,
            _ => (),
        }
        Batch::one(self.ids.len())?.with_context(0, &runs)
    }

    /// Appends tokens of the answer. They are context: they extend the last part if that is context, and
    /// become a part of their own otherwise. Returns the first position whose thoughts depend on them.
    pub(super) fn extend(&mut self, answer: &[u32]) -> usize {
        let end = self.ids.len();
        self.ids.extend_from_slice(answer);
        match self.context.last_mut() {
            Some(last) if last.end == end => last.end = self.ids.len(),
            _ => self.context.push(end..self.ids.len()),
        }
        self.context.last().map_or(end, |last| last.start)
    }

    fn add(&mut self, ids: &[u32], thinks: bool) {
        let start = self.ids.len();
        self.ids.extend_from_slice(ids);
        if thinks && !ids.is_empty() {
            self.context.push(start..self.ids.len());
        }
    }

    /// Adds neighbouring texts, encoded together as one text and then cut: the tokens do not depend on
    /// where one part ends. A token across a boundary goes to the part that it begins in.
    fn add_texts(&mut self, parts: &[Part], tokenizer: &Tokenizer) -> Result<()> {
        let text = |part: &Part| match &part.content {
            Content::Text(text) => text.clone(),
            _ => String::new(),
        };
        let texts: Vec<String> = parts.iter().map(text).collect();
        // BOS is added only at the beginning of the sequence.
        let (ids, starts) = tokenizer.encode_with_starts(&texts.concat(), self.ids.is_empty())?;
        let (mut from, mut end_of_text) = (0, 0);
        for (index, (part, text)) in parts.iter().zip(&texts).enumerate() {
            end_of_text += text.len();
            let to = match index + 1 == parts.len() {
                true => ids.len(),
                false => starts.partition_point(|&start| start < end_of_text).max(from),
            };
            self.add(ids.get(from..to).unwrap_or(&[]), part.thinks);
            from = to;
        }
        Ok(())
    }
}

/// As [`Prompt::chat`].
impl From<&[Message]> for Prompt {
    fn from(messages: &[Message]) -> Self {
        Self::chat(messages)
    }
}

/// As [`Prompt::chat`].
impl From<&Vec<Message>> for Prompt {
    fn from(messages: &Vec<Message>) -> Self {
        Self::chat(messages)
    }
}

impl From<&str> for Prompt {
    fn from(text: &str) -> Self {
        Self::default().context(text)
    }
}

impl From<String> for Prompt {
    fn from(text: String) -> Self {
        Self::default().context(text)
    }
}

impl From<&String> for Prompt {
    fn from(text: &String) -> Self {
        Self::from(text.as_str())
    }
}

impl From<Vec<u32>> for Prompt {
    fn from(ids: Vec<u32>) -> Self {
        Self::default().with(Content::Ids(ids), true)
    }
}

impl From<&[u32]> for Prompt {
    fn from(ids: &[u32]) -> Self {
        Self::default().context_ids(ids)
    }
}

impl<const N: usize> From<[u32; N]> for Prompt {
    fn from(ids: [u32; N]) -> Self {
        Self::from(ids.to_vec())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::path::Path;

    fn tokenizer(name: &str) -> Result<Tokenizer> {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/tokenizer");
        let found = Tokenizer::from_folder(&folder.join(name))?;
        found.ok_or(Error::NoTokenizer { needed_for: "this test" })
    }

    proptest! {
        /// Wherever a text is cut, its tokens stay the same, and each part has those that begin in it.
        #[test]
        fn cuts_move_no_token(
            words in prop::collection::vec("[a-z]{1,6}|é|漢字", 1..8),
            thinks in prop::collection::vec(any::<bool>(), 8),
            llama: bool,
        ) {
            let run = || -> Result<()> {
                let tokenizer = tokenizer(if llama { "llama" } else { "byte_level" })?;
                let mut prompt = Prompt::default();
                let mut parts = Vec::new();
                for (index, (word, &thinks)) in words.iter().zip(&thinks).enumerate() {
                    let text = if index == 0 { word.clone() } else { format!(" {word}") };
                    prompt = if thinks { prompt.context(&text) } else { prompt.plain(&text) };
                    parts.push((text, thinks));
                }
                let whole: String = parts.iter().map(|(text, _)| text.as_str()).collect();
                let encoded = prompt.encode(Some(&tokenizer))?;
                assert_eq!(encoded.ids, tokenizer.encode(&whole, true)?);

                // A token begins where the text of those before it ends.
                let mut stream = tokenizer.decode_stream(&[]);
                let mut begins = 0;
                for (index, &id) in encoded.ids.iter().enumerate() {
                    let mut end = 0;
                    let part = parts.iter().find(|(text, _)| {
                        end += text.len();
                        begins < end
                    });
                    let inside = encoded.context.iter().any(|run| run.contains(&index));
                    assert_eq!(Some(inside), part.map(|(_, thinks)| *thinks), "token {index}");
                    begins += stream.push(id).len();
                }
                Ok(())
            };
            run().map_err(|error| TestCaseError::fail(error.to_string()))?;
        }
    }
}
