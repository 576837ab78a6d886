//! The suite's tokenizer: names are tokens, and so is whatever stands between two names.

use std::collections::HashMap;
use std::ops::Range;

use tokenizers::decoders::fuse::Fuse;
use tokenizers::models::wordlevel::WordLevel;
use tokenizers::pre_tokenizers::split::{Split, SplitPattern};
use tokenizers::{AddedToken, SplitDelimiterBehavior, Tokenizer};

use super::{CONTAINMENT, HAND_OVER, name};

/// Stands for a piece of text that no story has.
const UNKNOWN: &str = "<unk>";

/// Ends an answer.
const END: &str = "</s>";

/// All tokens, by number.
pub struct Vocabulary {
    pieces: Vec<String>,
    ids: HashMap<String, u32>,
    /// The tokens that are names.
    names: Range<u32>,
}

impl Vocabulary {
    pub fn new() -> Self {
        let wordings = [&CONTAINMENT, &HAND_OVER];
        let mut pieces = vec![UNKNOWN.to_string(), END.to_string()];
        let first = pieces.len() as u32;
        for names in wordings.map(|wording| &wording.names) {
            pieces.extend(names.train.iter().chain(&names.test).map(|it| name(it)));
        }
        let names = first..pieces.len() as u32;
        pieces.push(".".to_string());
        for wording in wordings {
            let [before, after] = wording.question;
            pieces.extend(wording.openers.iter().map(ToString::to_string));
            pieces.extend(wording.openers.iter().map(|opener| format!(". {opener}")));
            pieces.extend(wording.verbs.iter().map(ToString::to_string));
            pieces.extend([format!(".\n{before}"), after.to_string()]);
        }
        let ids = pieces.iter().cloned().zip(0..).collect();
        Self { pieces, ids, names }
    }

    /// How many tokens there are.
    pub fn len(&self) -> usize {
        self.pieces.len()
    }

    /// The token of a piece of text.
    pub fn id(&self, piece: &str) -> u32 {
        self.ids.get(piece).copied().unwrap_or(0)
    }

    /// The token that ends an answer.
    pub fn end(&self) -> u32 {
        self.id(END)
    }

    /// Whether a token is a name.
    pub fn is_name(&self, id: u32) -> bool {
        self.names.contains(&id)
    }

    /// Whether a tokenizer has these tokens, and no others.
    pub fn is_of(&self, tokenizer: &hybrid_attention::Tokenizer) -> bool {
        tokenizer.vocab_size() == self.len()
            && self
                .pieces
                .iter()
                .zip(0..)
                .all(|(piece, id)| tokenizer.token(id).as_ref() == Some(piece))
    }

    /// The same as `tokenizer.json` has it: text is cut before and after each name.
    pub fn tokenizer(&self) -> tokenizers::Result<Tokenizer> {
        let vocabulary = self.ids.iter().map(|(piece, &id)| (piece.clone(), id)).collect();
        let model =
            WordLevel::builder().vocab(vocabulary).unk_token(UNKNOWN.to_string()).build()?;
        let names: Vec<&str> =
            self.names.clone().map(|id| self.pieces[id as usize].trim_start()).collect();
        let name = SplitPattern::Regex(format!(" (?:{})\\b", names.join("|")));
        let mut tokenizer = Tokenizer::new(model);
        let cut = Split::new(name, SplitDelimiterBehavior::Isolated, false)?;
        tokenizer.with_pre_tokenizer(Some(cut));
        tokenizer.with_decoder(Some(Fuse::new()));
        let special = [UNKNOWN, END].map(|token| AddedToken::from(token, true));
        tokenizer.add_special_tokens(special)?;
        Ok(tokenizer)
    }
}
