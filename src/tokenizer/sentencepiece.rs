//! SentencePiece's `tokenizer.model`, as the `sentencepiece` library reads it: vocabularies of byte-pair encoding, as
//! Llama and Mistral have them.

use std::collections::HashSet;

use tokenizers::normalizers::replace::ReplacePattern;
use tokenizers::normalizers::{NormalizerWrapper, Prepend, Replace, Sequence as Normalizers};
use tokenizers::pre_tokenizers::metaspace::{Metaspace, PrependScheme};
use tokenizers::{
    AddedToken, AddedVocabulary, DecoderWrapper, PostProcessorWrapper, PreTokenizerWrapper,
    TokenizerBuilder,
};

use super::bpe::{self, Kind, merges_by_score};
use super::instruct::Version;
use super::protobuf::{Fields, Value};
use super::{Surroundings, Vocabulary, failed, guard, wrong};
use crate::error::{Error, Result};

/// Published vocabularies have up to 256 thousand.
const MOST_PIECES: usize = 1 << 22;

/// Where a space is put before a text: the `add_dummy_prefix` of SentencePiece.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Prefix {
    /// As the file says, before each stretch of text between control tokens: each is a text of its own to SentencePiece.
    Each,
    /// Before the whole text, unless it begins with one: what transformers calls `legacy: false`.
    First,
    Never,
}

/// What the file says, with the defaults of its format.
struct Model<'b> {
    pieces: Vec<&'b str>,
    scores: Vec<f32>,
    kinds: Vec<Kind>,
    /// The token of what has none.
    unk: Option<&'b str>,
    kind_of_model: u64,
    byte_fallback: bool,
    bos_piece: &'b str,
    eos_piece: &'b str,
    pad_piece: &'b str,
    /// Says that spaces belong to the end of a word.
    suffix: bool,
    /// Rules for characters that stand for others, compiled, of encoding and of decoding.
    rules: [&'b [u8]; 2],
    normalizer: &'b str,
    add_dummy_prefix: bool,
    remove_extra_whitespaces: bool,
    escape_whitespaces: bool,
}

/// # Errors
/// [`Error::Tokenizer`] if it is not such a file, [`Error::Unsupported`] if it asks for what is not read here.
pub(super) fn read(bytes: &[u8], prefix: Prefix) -> Result<Vocabulary> {
    let model = Model::read(bytes)?;
    model.check()?;
    let Model { pieces, scores, kinds, .. } = &model;
    let merges = merges_by_score(pieces, scores, kinds)?;
    let of_kind = |kind| {
        let all = pieces.iter().zip(kinds).filter(move |&(_, it)| *it == kind);
        all.map(|(&piece, _)| piece)
    };
    let named = |name| of_kind(Kind::Special).find(|piece| *piece == name).map(str::to_owned);
    let bpe = bpe::sentencepiece(pieces, merges, model.unk, model.byte_fallback)?;

    // Control tokens are found in the text as it is, symbols in what is left when spaces are marked. So that the
    // vocabulary does not mark the spelling of a symbol itself, it is told of no normalizer.
    let mut added = AddedVocabulary::new();
    let special = of_kind(Kind::Special).map(|piece| AddedToken::from(piece, true));
    let symbols = of_kind(Kind::UserDefined)
        .map(|piece| AddedToken::from(piece, false).normalized(prefix == Prefix::Each));
    let tokens: Vec<AddedToken> = special.chain(symbols).collect();
    guard(|| added.add_tokens(tokens, &bpe, None::<&NormalizerWrapper>))?;

    let strip = match prefix {
        Prefix::Never => 0,
        // No space that is removed was in a text.
        _ if model.remove_extra_whitespaces => usize::MAX,
        _ => model.add_dummy_prefix.into(),
    };
    let metaspace = PreTokenizerWrapper::from(Metaspace::new('▁', PrependScheme::First, false));
    let inner = TokenizerBuilder::new()
        .with_model(bpe)
        .with_normalizer(model.normalizers(prefix)?)
        .with_pre_tokenizer((prefix == Prefix::First).then_some(metaspace))
        .with_post_processor(None::<PostProcessorWrapper>)
        .with_decoder(Some(DecoderWrapper::from(bpe::sentencepiece_decoder(strip)?)))
        .with_added_vocabulary(added)
        .build()
        .map_err(failed)?;

    let around = Surroundings {
        bos_token: named(model.bos_piece),
        eos_token: named(model.eos_piece),
        unk_token: model.unk.map(str::to_owned),
        pad_token: named(model.pad_piece),
        chat_template: None,
    };
    let has = |token: &str| of_kind(Kind::Special).any(|piece| piece == token);
    let version = if has("[SYSTEM_PROMPT]") && has("[/SYSTEM_PROMPT]") {
        Some(Version::V7)
    } else {
        (has("[INST]") && has("[/INST]")).then_some(Version::V3)
    };
    Ok(Vocabulary { inner: inner.into(), around, version })
}

impl<'b> Model<'b> {
    fn read(bytes: &'b [u8]) -> Result<Self> {
        let mut model = Self {
            pieces: Vec::new(),
            scores: Vec::new(),
            kinds: Vec::new(),
            unk: None,
            kind_of_model: 1,
            byte_fallback: false,
            bos_piece: "<s>",
            eos_piece: "</s>",
            pad_piece: "<pad>",
            suffix: false,
            rules: [&[]; 2],
            normalizer: "",
            add_dummy_prefix: true,
            remove_extra_whitespaces: true,
            escape_whitespaces: true,
        };
        for field in Fields::of(bytes) {
            match field? {
                (1, Value::Bytes(piece)) => model.piece(piece)?,
                (2, Value::Bytes(trainer)) => model.trainer(trainer)?,
                (3, Value::Bytes(normalizer)) => model.normalizer(normalizer)?,
                (5, Value::Bytes(denormalizer)) => {
                    for field in Fields::of(denormalizer) {
                        if let (2, Value::Bytes(rules)) = field? {
                            model.rules[1] = rules;
                        }
                    }
                }
                _ => {}
            }
        }
        Ok(model)
    }

    fn piece(&mut self, message: &'b [u8]) -> Result<()> {
        let id = self.pieces.len();
        if id == MOST_PIECES {
            return Err(wrong("pieces", format!("at most {MOST_PIECES}"), "more"));
        }
        let (mut piece, mut score, mut kind) = ("", 0.0, 1);
        for field in Fields::of(message) {
            match field? {
                (1, Value::Bytes(bytes)) => piece = text(bytes)?,
                (2, Value::Fixed32(bytes)) => score = f32::from_le_bytes(bytes),
                (3, Value::Varint(value)) => kind = value,
                _ => {}
            }
        }
        if piece.is_empty() {
            return Err(wrong(format!("piece {id}"), "a text", "\"\""));
        }
        if kind == 2 && self.unk.replace(piece).is_some() {
            return Err(wrong("type of the pieces", "one of the kind unknown", "two"));
        }
        self.pieces.push(piece);
        // So that there is one zero only.
        self.scores.push(score + 0.0);
        self.kinds.push(match kind {
            1 => Kind::Text,
            2 | 3 => Kind::Special,
            4 => Kind::UserDefined,
            6 => Kind::Byte,
            // 5 are tokens that encoding must take apart again.
            other => return Err(Error::unsupported("SentencePiece type of token", other)),
        });
        Ok(())
    }

    fn trainer(&mut self, message: &'b [u8]) -> Result<()> {
        for field in Fields::of(message) {
            match field? {
                (3, Value::Varint(kind)) => self.kind_of_model = kind,
                (24, Value::Varint(flag)) => self.suffix = flag != 0,
                (35, Value::Varint(flag)) => self.byte_fallback = flag != 0,
                (46, Value::Bytes(bytes)) if !bytes.is_empty() => self.bos_piece = text(bytes)?,
                (47, Value::Bytes(bytes)) if !bytes.is_empty() => self.eos_piece = text(bytes)?,
                (48, Value::Bytes(bytes)) if !bytes.is_empty() => self.pad_piece = text(bytes)?,
                _ => {}
            }
        }
        Ok(())
    }

    fn normalizer(&mut self, message: &'b [u8]) -> Result<()> {
        for field in Fields::of(message) {
            match field? {
                (1, Value::Bytes(name)) => self.normalizer = text(name)?,
                (2, Value::Bytes(rules)) => self.rules[0] = rules,
                (3, Value::Varint(flag)) => self.add_dummy_prefix = flag != 0,
                (4, Value::Varint(flag)) => self.remove_extra_whitespaces = flag != 0,
                (5, Value::Varint(flag)) => self.escape_whitespaces = flag != 0,
                _ => {}
            }
        }
        Ok(())
    }

    /// Whether it is a vocabulary that is read here, and one that the library would accept.
    fn check(&self) -> Result<()> {
        let kind = match self.kind_of_model {
            1 => "unigram",
            2 => "",
            3 => "word",
            4 => "char",
            _ => "unknown",
        };
        if !kind.is_empty() {
            return Err(Error::unsupported("SentencePiece model type", kind));
        }
        // Rules are applied to the longest text that one of them knows, which the normalizer of tokenizers does not.
        if self.rules.iter().any(|rules| !rules.is_empty()) {
            return Err(Error::unsupported("SentencePiece normalizer", self.normalizer));
        }
        for (asked, name) in [
            (self.suffix, "treat_whitespace_as_suffix"),
            (!self.escape_whitespaces, "escape_whitespaces: false"),
        ] {
            if asked {
                return Err(Error::unsupported("SentencePiece normalizer", name));
            }
        }
        if self.unk.is_none() {
            return Err(wrong("type of the pieces", "one of the kind unknown", "none"));
        }
        let mut seen = HashSet::with_capacity(self.pieces.len());
        if let Some(piece) = self.pieces.iter().find(|piece| !seen.insert(**piece)) {
            return Err(wrong("pieces", "none twice", format!("{piece:?}")));
        }

        let of_kind = |kind| self.kinds.iter().filter(move |it| **it == kind).count();
        let bytes = (0..=255u8).filter(|byte| seen.contains(format!("<{byte:#04X}>").as_str()));
        let expected = if self.byte_fallback { 256 } else { 0 };
        if of_kind(Kind::Byte) != expected || (self.byte_fallback && bytes.count() != expected) {
            let flag = format!("{expected} with byte_fallback {}", self.byte_fallback);
            return Err(wrong("pieces of the kind byte", flag, of_kind(Kind::Byte)));
        }
        // The library merges characters even if they are no tokens themselves.
        let text = self.pieces.iter().zip(&self.kinds).filter(|(_, kind)| **kind == Kind::Text);
        for (&piece, _) in text {
            let unknown = |c: &char| !seen.contains(&*c.encode_utf8(&mut [0; 4]));
            if let Some(c) = piece.chars().find(unknown) {
                let got = format!("{piece:?}, of which {c:?} is no token");
                return Err(Error::unsupported("SentencePiece token", got));
            }
        }
        Ok(())
    }

    /// What is done to a text before it is split.
    fn normalizers(&self, prefix: Prefix) -> Result<Option<Normalizers>> {
        let mut steps: Vec<NormalizerWrapper> = Vec::new();
        if self.remove_extra_whitespaces {
            // At the end, the mark of a space counts as one.
            for (spaces, content) in [("^ +", ""), ("[ ▁]+$", ""), (" {2,}", " ")] {
                let spaces = ReplacePattern::Regex(spaces.to_owned());
                steps.push(guard(|| Replace::new(spaces, content))?.into());
            }
        }
        if prefix == Prefix::First {
            return Ok((!steps.is_empty()).then(|| Normalizers::new(steps)));
        }
        if prefix == Prefix::Each && self.add_dummy_prefix {
            steps.push(Prepend::new("▁".to_owned()).into());
        }
        steps.push(guard(|| Replace::new(" ", "▁"))?.into());
        Ok(Some(Normalizers::new(steps)))
    }
}

fn text(bytes: &[u8]) -> Result<&str> {
    std::str::from_utf8(bytes).map_err(failed)
}
