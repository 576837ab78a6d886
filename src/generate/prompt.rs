//! What to answer: text, token ids or a conversation, in parts that think and parts that do not.

use std::ops::Range;

use crate::error::{Error, Result};
use crate::tokenizer::{Message, Tokenizer};

/// A prompt. Text and token ids become one by [`From`]; [`Prompt::chat`] makes one of messages.
///
/// A prompt made from one piece is all *context*: thinking, if any, is about the whole of it.
/// Built in parts, it can hold back some from thinking:
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
/// Each part is turned into tokens by itself.
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

/// A prompt as the model takes it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct EncodedPrompt {
    pub(crate) ids: Vec<u32>,
    /// The runs of tokens to think about.
    pub(crate) context: Vec<Range<usize>>,
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

    fn with(mut self, content: Content, thinks: bool) -> Self {
        self.parts.push(Part { content, thinks });
        self
    }

    /// The token ids of all parts one after the other, and which runs of them think.
    pub(crate) fn encode(&self, tokenizer: Option<&Tokenizer>) -> Result<EncodedPrompt> {
        let mut ids = Vec::new();
        let mut context = Vec::new();
        for part in &self.parts {
            let start = ids.len();
            let needs = |needed_for| tokenizer.ok_or(Error::NoTokenizer { needed_for });
            match &part.content {
                Content::Ids(new) => ids.extend_from_slice(new),
                // Only the first part opens the sequence with BOS.
                Content::Text(text) => {
                    ids.extend(needs("a text prompt")?.encode(text, start == 0)?);
                }
                Content::Chat(messages) => {
                    ids.extend(needs("a chat")?.encode_chat(messages, true)?);
                }
            }
            if part.thinks && ids.len() > start {
                context.push(start..ids.len());
            }
        }
        if ids.is_empty() {
            return Err(Error::EmptyPrompt);
        }
        Ok(EncodedPrompt { ids, context })
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
        Self::from(ids.to_vec())
    }
}

impl<const N: usize> From<[u32; N]> for Prompt {
    fn from(ids: [u32; N]) -> Self {
        Self::from(ids.to_vec())
    }
}
