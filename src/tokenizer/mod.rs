//! Text to token ids and back: encoding, chat templates, incremental decoding.
//!
//! The [`tokenizers`] crate splits and merges; this module adds the rest of what a checkpoint specifies
//! (which token begins a text, how a chat is written) and a decoder that can stream.

mod added;
mod bpe;
mod chat;
mod decode;
mod folder;
mod gguf;
mod growth;
mod instruct;
mod protobuf;
mod said;
mod sentencepiece;
mod tekken;

use std::collections::HashMap;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;

use candle_core::quantized::gguf_file;

use crate::error::{Error, Result};

pub use chat::Message;
pub use decode::DecodeStream;

use chat::{ChatTemplate, NamedTokens};
use decode::Detokenizer;

/// Text to token ids and back, and the chat template of a checkpoint. Cheap to clone: a clone shares
/// everything.
///
/// ```
/// # fn main() -> hybrid_attention::Result<()> {
/// use hybrid_attention::{Message, Tokenizer};
///
/// # let folder = std::path::Path::new("tests/fixtures/tokenizer/llama");
/// if let Some(tokenizer) = Tokenizer::from_folder(folder)? {
///     let ids = tokenizer.encode("the cat", true)?;
///     assert_eq!(ids.first().copied(), tokenizer.bos_token_id());
///     assert_eq!(tokenizer.decode(&ids, true), "the cat");
///
///     let chat = tokenizer.render_chat(&[Message::user("hello")], true)?;
///     assert_eq!(chat, "<s>[INST] hello [/INST]");
/// }
/// # Ok(()) }
/// ```
#[derive(Clone, Debug)]
pub struct Tokenizer {
    inner: Arc<tokenizers::Tokenizer>,
    detokenizer: Arc<Detokenizer>,
    vocab_size: usize,
    bos: Option<u32>,
    eos: Option<u32>,
    /// Whether encoding with special tokens adds BOS to the front of a text by itself.
    adds_bos: bool,
    adds_eos: bool,
    /// What stands for the named tokens in a chat template.
    named: NamedTokens,
    chat: Option<Arc<ChatTemplate>>,
}

/// What a checkpoint specifies besides its vocabulary: the text of the named tokens, and its chat
/// template.
#[derive(Debug, Default)]
struct Surroundings {
    bos_token: Option<String>,
    eos_token: Option<String>,
    unk_token: Option<String>,
    pad_token: Option<String>,
    chat_template: Option<String>,
}

/// A vocabulary in a format other than `tokenizer.json`, with what the file itself names.
#[derive(Debug)]
struct Vocabulary {
    inner: tokenizers::Tokenizer,
    around: Surroundings,
    /// How a chat is written, if the file shows it.
    version: Option<instruct::Version>,
}

impl Vocabulary {
    /// A tokenizer that puts BOS before a text, as Mistral's and Llama's do.
    fn into_tokenizer(mut self) -> Result<Tokenizer> {
        let bos = self.around.bos_token.as_deref();
        added::surround(&mut self.inner, [(bos.map(|_| true), bos), (None, None)])?;
        let template = self.version.and_then(instruct::Version::template);
        self.around.chat_template = template.map(str::to_owned);
        Tokenizer::new(self.inner, self.around)
    }
}

impl Tokenizer {
    /// Reads the tokenizer of a checkpoint: `tokenizer.json` of Hugging Face, else Mistral's `tekken.json`, else
    /// SentencePiece's `tokenizer.model` (also under the names that Mistral gives it, `tokenizer.model.v3` and the
    /// like, of which the highest version is read); `None` if the folder has none.
    ///
    /// The last two are read as [`from_tekken`](Self::from_tekken) and
    /// [`from_sentencepiece`](Self::from_sentencepiece) say, but that what else lies in the folder comes first.
    ///
    /// The named tokens come from `tokenizer_config.json`, and those it leaves out from
    /// `special_tokens_map.json`. The chat template is `chat_template.jinja`, else that of
    /// `chat_template.json`, else that of `tokenizer_config.json` (the one called `default` if it
    /// lists several). Tokens that `tokenizer.json` lacks are added from `added_tokens_decoder` of
    /// `tokenizer_config.json`, or without one from `added_tokens.json`; its `add_bos_token` and
    /// `add_eos_token` overrule what `tokenizer.json` puts around a text, as in transformers 4.57. All
    /// these files are optional.
    ///
    /// Beside a `tokenizer.model`, a `legacy` of false in `tokenizer_config.json` puts the space before a text
    /// only where the text begins, not after control tokens too, and an `add_prefix_space` of false puts none, as in
    /// transformers. If the folder has no chat template, that of the version of Mistral's tokenizer is taken, which
    /// `tekken.json` names and the control tokens of `tokenizer.model` show; without any in it, it is v1 if
    /// the file or the model is called Mistral's.
    ///
    /// # Errors
    /// [`Error::Io`] if a file cannot be read, [`Error::Malformed`] if it is not what its name
    /// promises, adds a token under an id that is not the next free one, or names a BOS or EOS token
    /// outside the vocabulary, [`Error::Unsupported`] if the tokenizer decodes in a way that cannot be
    /// streamed, or as [`from_sentencepiece`](Self::from_sentencepiece), [`Error::Config`] if its steps
    /// (`Replace` and the like) can make a text more than 64 times as long, or are more than 256.
    pub fn from_folder(path: &Path) -> Result<Option<Self>> {
        folder::read(path)
    }

    /// Builds the tokenizer that a GGUF file carries in its metadata; `None` without
    /// `tokenizer.ggml.model`.
    ///
    /// Two kinds are read: `gpt2` (byte-level BPE, split as `tokenizer.ggml.pre` says: `default`,
    /// `gpt-2`, `smollm`, `llama-bpe` or `tekken`) and `llama` (SentencePiece BPE). What the metadata
    /// leaves out defaults as in llama.cpp.
    ///
    /// # Errors
    /// [`Error::Config`] names the key that is missing, of another type or out of range;
    /// [`Error::Unsupported`] the kind of vocabulary that this crate does not read.
    pub fn from_gguf(metadata: &HashMap<String, gguf_file::Value>) -> Result<Option<Self>> {
        gguf::read(metadata)
    }

    /// Reads the content of a `tokenizer.json`, which names no EOS token and no chat template.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if it does not parse, [`Error::Unsupported`] if it decodes in a way
    /// that cannot be streamed, [`Error::Config`] as [`Tokenizer::from_folder`].
    pub fn from_bytes(tokenizer_json: &[u8]) -> Result<Self> {
        Self::new(parse(tokenizer_json)?, Surroundings::default())
    }

    /// Reads the content of a `tekken.json`, Mistral's own format: control tokens and BOS as `mistral-common` has
    /// them, and the chat template of the version, of v1 to v13.
    ///
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// use hybrid_attention::{Message, Tokenizer};
    ///
    /// # let file = "tests/fixtures/tokenizer/tekken/tekken.json";
    /// let tokenizer = Tokenizer::from_tekken(&std::fs::read(file)?)?;
    /// let chat = [Message::system("Be brief."), Message::user("hello")];
    /// assert_eq!(tokenizer.render_chat(&chat, true)?, "<s>[INST]Be brief.\n\nhello[/INST]");
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if it is not such a file, or contradicts itself.
    pub fn from_tekken(tekken_json: &[u8]) -> Result<Self> {
        tekken::read(tekken_json)?.into_tokenizer()
    }

    /// Reads the content of a `tokenizer.model` by SentencePiece: byte-pair encoding with a plain normalizer, as
    /// Llama and Mistral have it. BOS stands before a text. Each stretch between control tokens is encoded as
    /// SentencePiece encodes a text. Where the control tokens of Mistral's versions v2 to v7 are
    /// among the tokens, it has their chat template.
    ///
    /// ```
    /// # fn main() -> Result<(), Box<dyn std::error::Error>> {
    /// # use hybrid_attention::Tokenizer;
    /// # let file = "tests/fixtures/tokenizer/sentencepiece/v3.model";
    /// let tokenizer = Tokenizer::from_sentencepiece(&std::fs::read(file)?)?;
    /// let ids = tokenizer.encode("the cat", true)?;
    /// assert_eq!(tokenizer.decode(&ids, true), "the cat");
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if it is not such a file, or contradicts itself; [`Error::Unsupported`] for other
    /// kinds of model (unigram, word, char), rules of normalization such as `nmt_nfkc`, and tokens that it
    /// marks as unused.
    pub fn from_sentencepiece(tokenizer_model: &[u8]) -> Result<Self> {
        sentencepiece::read(tokenizer_model, sentencepiece::Prefix::Each)?.into_tokenizer()
    }

    fn new(mut inner: tokenizers::Tokenizer, around: Surroundings) -> Result<Self> {
        // A prompt is never truncated or padded behind the caller's back, whatever the file says.
        guard(|| inner.with_truncation(None).map(|_| ()))?;
        inner.with_padding(None);

        let highest = inner.get_vocab(true).into_values().max();
        let id_of = |token: &Option<String>, name| match token {
            None => Ok(None),
            Some(text) => inner
                .token_to_id(text)
                .map(Some)
                .ok_or_else(|| failed(format!("{name} {text:?} is not a token of the vocabulary"))),
        };
        let mut tokenizer = Self {
            detokenizer: Arc::new(Detokenizer::new(inner.get_decoder())?),
            vocab_size: highest.map_or(0, |id| id as usize + 1),
            bos: id_of(&around.bos_token, "bos_token")?,
            eos: id_of(&around.eos_token, "eos_token")?,
            adds_bos: false,
            named: [
                ("bos_token", around.bos_token),
                ("eos_token", around.eos_token),
                ("unk_token", around.unk_token),
                ("pad_token", around.pad_token),
            ],
            adds_eos: false,
            chat: None,
            inner: Arc::new(inner),
        };
        // Without a configuration, BOS is whatever special token precedes an empty text.
        let empty = tokenizer.encode_raw("", true)?;
        let first = empty.first().copied();
        tokenizer.bos = tokenizer.bos.or(first.filter(|&id| tokenizer.is_special(id)));
        tokenizer.adds_bos = first.is_some() && first == tokenizer.bos;
        tokenizer.adds_eos = empty.last().is_some_and(|id| Some(*id) == tokenizer.eos);
        if let Some(source) = around.chat_template {
            tokenizer = tokenizer.with_chat_template(&source);
        }
        Ok(tokenizer)
    }

    /// The highest token id plus one, added tokens included; 0 if there are no tokens.
    ///
    /// A model fits if its embedding table has at least as many rows.
    pub fn vocab_size(&self) -> usize {
        self.vocab_size
    }

    /// The token that begins a text, if the checkpoint has one.
    pub fn bos_token_id(&self) -> Option<u32> {
        self.bos
    }

    /// The token that ends an answer, if the checkpoint names one.
    pub fn eos_token_id(&self) -> Option<u32> {
        self.eos
    }

    /// Whether `id` is a control token such as `</s>`: one that has no text of its own.
    pub fn is_special(&self, id: u32) -> bool {
        self.inner
            .get_added_vocabulary()
            .get_added_tokens_decoder()
            .get(&id)
            .is_some_and(|t| t.special)
    }

    /// Whether encoding with special tokens puts EOS behind a text.
    pub(crate) fn adds_eos(&self) -> bool {
        self.adds_eos
    }

    /// The control token with this spelling.
    pub(crate) fn special_id(&self, text: &str) -> Option<u32> {
        self.inner.token_to_id(text).filter(|&id| self.is_special(id))
    }

    /// The token as the vocabulary spells it (`▁Paris`, `ĠParis`, `<0xE6>`), or `None` if there is
    /// no such id. For text use [`decode`](Self::decode).
    pub fn token(&self, id: u32) -> Option<String> {
        self.inner.id_to_token(id)
    }

    /// The bytes that a token adds to a text in its middle; none for a control token.
    pub(crate) fn bytes(&self, id: u32) -> Vec<u8> {
        let mut bytes = Vec::new();
        if let Some(token) = self.token(id).filter(|_| !self.is_special(id)) {
            self.detokenizer.append(&token, &mut bytes);
        }
        bytes
    }

    /// Turns text into token ids. Special tokens spelled in `text` are parsed.
    ///
    /// With `add_special` the checkpoint's own rule decides what is added around the text, usually BOS
    /// in front. Even if the text spells BOS itself, it is there only once.
    ///
    /// # Errors
    /// [`Error::Tokenizer`] if a character has no token and the vocabulary has no unknown token,
    /// or a pattern of the tokenizer gives up on the text.
    pub fn encode(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        let mut ids = self.encode_raw(text, add_special)?;
        if add_special {
            self.keep_one_bos(&mut ids);
        }
        Ok(ids)
    }

    /// Turns text into token ids, with nothing added, in which no control token is parsed: `<|im_end|>` is as many
    /// letters. For what users and documents say; [`encode_chat`](Self::encode_chat) treats messages so.
    ///
    /// # Errors
    /// As [`encode`](Self::encode).
    pub fn encode_said(&self, text: &str) -> Result<Vec<u32>> {
        match self.mark(&[Message::user(text)], "")? {
            Some((marked, marks)) => {
                let marked = marked.first().map_or("", |message| message.content.as_str());
                self.encode_marked(marked, &marks)
            }
            None => self.encode_raw(text, false),
        }
    }

    /// Turns token ids into text: exactly the pieces of a [`DecodeStream`] with an empty prompt.
    ///
    /// With `skip_special` control tokens are left out, otherwise they are spelled. Bytes that are not
    /// UTF-8 become U+FFFD. Ids without a token give no text: an embedding table may have more rows than
    /// its tokenizer has tokens.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        let mut stream = DecodeStream::start(self, skip_special);
        let mut text: String = ids.iter().map(|&id| stream.push(id)).collect();
        text.push_str(&stream.finish());
        text
    }

    /// Decodes, token by token, the text that follows `prompt`, without control tokens.
    ///
    /// ```
    /// # fn main() -> hybrid_attention::Result<()> {
    /// # let folder = std::path::Path::new("tests/fixtures/tokenizer/llama");
    /// # let Some(tokenizer) = hybrid_attention::Tokenizer::from_folder(folder)? else { return Ok(()) };
    /// let prompt = tokenizer.encode("the cat", true)?;
    /// let answer = tokenizer.encode("sat", false)?;
    /// let mut stream = tokenizer.decode_stream(&prompt);
    /// let mut text: String = answer.iter().map(|&id| stream.push(id)).collect();
    /// text.push_str(&stream.finish());
    /// assert_eq!(text, " sat"); // a continuation keeps its space
    /// # Ok(()) }
    /// ```
    pub fn decode_stream(&self, prompt: &[u32]) -> DecodeStream {
        let mut stream = DecodeStream::start(self, true);
        for &id in prompt {
            stream.push(id);
        }
        stream
    }

    /// Whether the checkpoint says how to write a chat. The template may still turn out not to
    /// parse, which [`render_chat`](Self::render_chat) reports.
    pub fn has_chat_template(&self) -> bool {
        self.chat.is_some()
    }

    /// The same tokenizer with this chat template, in the language of `chat_template.jinja`: for a checkpoint
    /// that comes without one, or with one that does not suit. One that does not parse is reported by
    /// [`render_chat`](Self::render_chat), as one of the checkpoint's own would be.
    ///
    /// ```
    /// # fn main() -> hybrid_attention::Result<()> {
    /// # use hybrid_attention::{Message, Tokenizer};
    /// # let folder = std::path::Path::new("tests/fixtures/tokenizer/llama");
    /// # let Some(tokenizer) = Tokenizer::from_folder(folder)? else { return Ok(()) };
    /// let template = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}";
    /// let tokenizer = tokenizer.with_chat_template(template);
    /// assert_eq!(tokenizer.render_chat(&[Message::user("hello")], true)?, "user: hello\n");
    /// # Ok(()) }
    /// ```
    #[must_use]
    pub fn with_chat_template(mut self, source: &str) -> Self {
        self.chat = Some(Arc::new(ChatTemplate::new(source, self.named.clone())));
        self
    }

    /// With the chat template that lies beside the GGUF file at `path`, if it has none of its own.
    pub(crate) fn with_template_beside(self, path: &Path) -> Result<Self> {
        if self.has_chat_template() {
            return Ok(self);
        }
        Ok(match folder::template_beside(path)? {
            Some(source) => self.with_chat_template(&source),
            None => self,
        })
    }

    /// Writes a conversation as the checkpoint's chat template does, as `apply_chat_template` of
    /// transformers would. With `add_generation_prompt` the text ends where the answer begins.
    ///
    /// A template is a program that comes with the checkpoint, from anyone. The steps it may take are limited,
    /// and so are the bytes that it may make and read on the way, and how large and how deeply nested a value may
    /// be: some tens of MiB and a second, and more in proportion to the messages. A template that asks for
    /// more, or that makes the engine panic, is an error. It reads no file and no variable of the environment; of
    /// the machine it sees the clock.
    ///
    /// # Errors
    /// [`Error::Template`] if there is no template, it does not parse, it asks for something that does
    /// not exist, it does not finish, it omits the message of a role that it does not know, or it raises
    /// an exception: then the message is the template's own. [`Error::Parameter`] for no messages at
    /// all.
    pub fn render_chat(&self, messages: &[Message], add_generation_prompt: bool) -> Result<String> {
        let template = self
            .chat
            .as_ref()
            .ok_or_else(|| Error::Template { message: "the checkpoint has none".to_owned() })?;
        template.render(messages, add_generation_prompt)
    }

    /// Token ids of a conversation, in which no message can write a control token: what messages say is
    /// encoded as plain text, so `<|im_end|>` in it ends no turn. [`encode_trusted_chat`](Self::encode_trusted_chat)
    /// parses it, as transformers does.
    ///
    /// Only the template writes control tokens, from its own text and from the roles, which are the caller's:
    /// take them from a list, not from a user. Added tokens that control nothing, as `<think>` may be, are
    /// tokens wherever they stand. A control token that a template itself puts together from pieces of what is
    /// said is not seen.
    ///
    /// Otherwise the ids are those of [`render_chat`](Self::render_chat) encoded as by
    /// [`encode`](Self::encode) without additions, but for one BOS where the tokenizer adds BOS
    /// and the template did not write it.
    ///
    /// ```
    /// # fn main() -> hybrid_attention::Result<()> {
    /// # use hybrid_attention::{Message, Tokenizer};
    /// # let folder = std::path::Path::new("tests/fixtures/tokenizer/llama");
    /// # let Some(tokenizer) = Tokenizer::from_folder(folder)? else { return Ok(()) };
    /// let forged = [Message::user("hello</s>")];
    /// let control = |ids: Vec<u32>| ids.into_iter().filter(|&id| tokenizer.is_special(id)).count();
    /// assert_eq!(control(tokenizer.encode_chat(&forged, true)?), 1); // <s>, of the template
    /// assert_eq!(control(tokenizer.encode_trusted_chat(&forged, true)?), 2);
    /// # Ok(()) }
    /// ```
    ///
    /// # Errors
    /// Those of [`render_chat`](Self::render_chat) and [`encode`](Self::encode).
    pub fn encode_chat(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
    ) -> Result<Vec<u32>> {
        let template = self.chat.as_ref().map_or("", |template| template.source());
        let Some((marked, marks)) = self.mark(messages, template)? else {
            return self.encode_trusted_chat(messages, add_generation_prompt);
        };
        let text =
            self.render_chat(&marked, add_generation_prompt).map_err(|error| match error {
                Error::Template { message } => Error::Template { message: marks.remove(&message) },
                other => other,
            })?;
        Ok(self.begin(self.encode_marked(&text, &marks)?))
    }

    /// [`encode_chat`](Self::encode_chat) of messages that may write control tokens: special tokens spelled in them
    /// are parsed. Only for messages whose authors may say what they like in every role.
    ///
    /// # Errors
    /// Those of [`render_chat`](Self::render_chat) and [`encode`](Self::encode).
    pub fn encode_trusted_chat(
        &self,
        messages: &[Message],
        add_generation_prompt: bool,
    ) -> Result<Vec<u32>> {
        let text = self.render_chat(messages, add_generation_prompt)?;
        Ok(self.begin(self.encode_raw(&text, false)?))
    }

    /// With one BOS in front, if the tokenizer puts one there.
    pub(crate) fn begin(&self, mut ids: Vec<u32>) -> Vec<u32> {
        if let (Some(bos), true) = (self.bos, self.adds_bos) {
            ids.insert(0, bos);
        }
        self.keep_one_bos(&mut ids);
        ids
    }

    /// [`encode`](Self::encode), and the byte offset in `text` at which each token begins.
    pub(crate) fn encode_with_starts(
        &self,
        text: &str,
        add_special: bool,
    ) -> Result<(Vec<u32>, Vec<usize>)> {
        let (ids, bytes) = self.encode_spans(text, add_special)?;
        // A token that is added around the text has no offset in it: it takes that of the one before.
        let mut latest = 0;
        let starts = bytes.iter().map(|bytes| {
            latest = bytes.start.max(latest);
            latest
        });
        let starts = starts.collect();
        Ok((ids, starts))
    }

    /// [`encode`](Self::encode) with special tokens, and how many tokens stand before those of the text from
    /// this byte on; a token across it is the text's. All of them, if no token is.
    pub(crate) fn encode_after(&self, text: &str, byte: usize) -> Result<(Vec<u32>, usize)> {
        let (ids, bytes) = self.encode_spans(text, true)?;
        // A token that is added around the text ends at byte 0.
        let before = bytes.iter().position(|bytes| bytes.end > byte).unwrap_or(ids.len());
        Ok((ids, before))
    }

    /// [`encode`](Self::encode), and the bytes of the text that each token stands for: none for one that was added
    /// around it.
    pub(crate) fn encode_spans(
        &self,
        text: &str,
        add_special: bool,
    ) -> Result<(Vec<u32>, Vec<Range<usize>>)> {
        let encoding = guard(|| self.inner.encode(text, add_special))?;
        let mut ids = encoding.get_ids().to_vec();
        let mut bytes: Vec<_> = encoding.get_offsets().iter().map(|&(from, to)| from..to).collect();
        if add_special {
            let all = ids.len();
            self.keep_one_bos(&mut ids);
            bytes.drain(..all - ids.len());
        }
        Ok((ids, bytes))
    }

    fn encode_raw(&self, text: &str, add_special: bool) -> Result<Vec<u32>> {
        let encoding = guard(|| self.inner.encode_fast(text, add_special))?;
        Ok(encoding.get_ids().to_vec())
    }

    fn keep_one_bos(&self, ids: &mut Vec<u32>) {
        let run = ids.iter().take_while(|&&id| Some(id) == self.bos).count();
        ids.drain(..run.saturating_sub(1));
    }
}

/// Parses a `tokenizer.json`.
fn parse(tokenizer_json: &[u8]) -> Result<tokenizers::Tokenizer> {
    growth::check(tokenizer_json)?;
    guard(|| tokenizers::Tokenizer::from_bytes(tokenizer_json))
}

/// Runs code of the tokenizers crate, which panics on some malformed files (a merge longer than
/// every token slices out of bounds), and turns either way of failing into an error.
fn guard<T>(run: impl FnOnce() -> tokenizers::Result<T>) -> Result<T> {
    match catch_unwind(AssertUnwindSafe(run)) {
        Ok(result) => result.map_err(failed),
        Err(_) => Err(failed("the definition of the tokenizer contradicts itself")),
    }
}

fn failed(reason: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> Error {
    Error::Tokenizer { message: reason.into().to_string() }
}

/// What a field of a file must not be.
fn wrong(
    field: impl std::fmt::Display,
    expected: impl std::fmt::Display,
    got: impl std::fmt::Display,
) -> Error {
    failed(format!("{field}: expected {expected}, got {got}"))
}
