//! What to answer: text, token ids or a conversation, in parts that think and parts that do not.

use std::borrow::Cow;
use std::ops::Range;

use crate::error::{Error, Result};
use crate::model::Batch;
use crate::thought::{Document, Thinking};
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
    Chat {
        messages: Vec<Message>,
        trusted: bool,
    },
    /// Some tokens of a document that was read once.
    Document(Document, Range<usize>),
}

/// A prompt as the model reads it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct EncodedPrompt {
    pub(crate) ids: Vec<u32>,
    /// The runs of tokens that are context, each a part of the prompt.
    context: Vec<Range<usize>>,
    /// What was read before: where in the prompt, and which tokens of which document.
    pub(super) documents: Vec<(Range<usize>, Document, Range<usize>)>,
}

impl Prompt {
    /// A conversation, rendered by the checkpoint's chat template up to where the assistant speaks. What messages
    /// say is text: a control token that they spell is none, so no user can open a turn of the system. See
    /// [`Tokenizer::encode_chat`] for what that means exactly.
    ///
    /// ```
    /// use hybrid_attention::{Message, Prompt};
    ///
    /// let prompt = Prompt::chat(&[Message::system("Be brief."), Message::user("Why is the sky blue?")]);
    /// # let _ = prompt;
    /// ```
    #[must_use]
    pub fn chat(messages: &[Message]) -> Self {
        let messages = messages.to_vec();
        Self::default().with(Content::Chat { messages, trusted: false }, true)
    }

    /// A [`chat`](Self::chat) whose messages may write control tokens, as
    /// [`Tokenizer::encode_trusted_chat`] parses them.
    #[must_use]
    pub fn trusted_chat(messages: &[Message]) -> Self {
        let messages = messages.to_vec();
        Self::default().with(Content::Chat { messages, trusted: true }, true)
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

    /// Adds a document that was [read](crate::thought::ThoughtLoop::read_document) before: its keys and values are
    /// put into the cache, and the model does not run over it. It is blind to whatever stands before it; what comes
    /// after it sees it. What stood before it when it was read, its [lead](Document::lead), is added only at the
    /// beginning of a prompt.
    ///
    /// It was thought about when it was read, so thinking that the generation config asks for does not concern it;
    /// beside documents, all other parts must be plain where there is thinking, and the prompt must end with a plain
    /// one. [`Answer::prompt_logprobs`](super::Answer::prompt_logprobs) begin behind the last document.
    ///
    /// ```
    /// # use candle_core::{Device, DType};
    /// use hybrid_attention::{GenerationConfig, HybridModel, Prompt, Thinking};
    ///
    /// # fn main() -> hybrid_attention::Result<()> {
    /// let model = HybridModel::tiny(&Device::Cpu)?;
    /// let mind = Thinking::none().on(model.thought_model())?;
    /// let (a, b) = (mind.read_document(&[11, 150, 12], 0, DType::F32)?, mind.read_document(&[42, 151], 0, DType::F32)?);
    /// let prompt = Prompt::default().document(&a).document(&b).plain_ids(&[13, 14]);
    /// let answer = model.generate(prompt, &GenerationConfig::default().max_tokens(1))?;
    /// assert_eq!(answer.prompt_ids, [11, 150, 12, 42, 151, 13, 14]);
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn document(self, document: &Document) -> Self {
        self.document_recomputed(document, 0)
    }

    /// The same, but the last `tokens` tokens of the document, or all of it if it has fewer, are plain: they are run
    /// again, causally, and see what stands before it. A document that begins the prompt has nothing before it and
    /// is taken as it was read.
    #[must_use]
    pub fn document_recomputed(mut self, document: &Document, tokens: usize) -> Self {
        let (ids, begins) = (document.ids(), self.parts.is_empty());
        let (from, recomputed) = if begins { (0, 0) } else { (document.lead(), tokens) };
        let to = ids.len().saturating_sub(recomputed).max(from);
        if from < to {
            self = self.with(Content::Document(document.clone(), from..to), false);
        }
        match ids.get(to..) {
            Some(rest) if !rest.is_empty() => self.plain_ids(rest),
            _ => self,
        }
    }

    fn with(mut self, content: Content, thinks: bool) -> Self {
        self.parts.push(Part { content, thinks });
        self
    }

    /// The token ids of all parts one after the other, and which runs of them think.
    pub(crate) fn encode(&self, tokenizer: Option<&Tokenizer>) -> Result<EncodedPrompt> {
        let needs = |needed_for| tokenizer.ok_or(Error::NoTokenizer { needed_for });
        let mut encoded = EncodedPrompt::default();
        let is_text = |part: &Part| matches!(part.content, Content::Text(_));
        for parts in self.parts.chunk_by(|a, b| is_text(a) && is_text(b)) {
            match parts {
                [Part { content: Content::Ids(ids), thinks }] => encoded.add(ids, *thinks),
                [Part { content: Content::Chat { messages, trusted }, thinks }] => {
                    let tokenizer = needs("a chat")?;
                    let ids = match trusted {
                        true => tokenizer.encode_trusted_chat(messages, true)?,
                        false => tokenizer.encode_chat(messages, true)?,
                    };
                    encoded.add(&ids, *thinks);
                }
                [Part { content: Content::Document(document, tokens), .. }] => {
                    let start = encoded.ids.len();
                    encoded.add(document.ids().get(tokens.clone()).unwrap_or(&[]), false);
                    let place = start..encoded.ids.len();
                    encoded.documents.push((place, document.clone(), tokens.clone()));
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

    /// The thinking that `chosen` leaves to do: none beside documents, which were thought about when they were read.
    ///
    /// # Errors
    /// [`Error::Parameter`] beside documents, for what has to think about all of a prompt, and for no token behind
    /// the last of them.
    pub(super) fn thinking<'a>(&self, chosen: &'a Thinking) -> Result<Cow<'a, Thinking>> {
        let Some((last, ..)) = self.documents.last() else { return Ok(Cow::Borrowed(chosen)) };
        chosen.as_of_documents()?;
        if !chosen.is_none() && !self.context.is_empty() {
            let expected = "plain parts beside documents that were read before";
            return Err(Error::parameter("prompt", expected, "context to think about"));
        }
        match last.end < self.ids.len() {
            true => Ok(Cow::Owned(Thinking::none())),
            false => {
                let expected = "tokens to run behind its last document";
                Err(Error::parameter("prompt", expected, "none"))
            }
        }
    }

    /// Refuses documents where a prompt is to be thought about as a whole.
    pub(crate) fn check_read_whole(&self) -> Result<()> {
        match self.documents.is_empty() {
            true => Ok(()),
            false => Err(Error::parameter(
                "prompt",
                "one without documents that were read before, to think about",
                self.documents.len(),
            )),
        }
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
