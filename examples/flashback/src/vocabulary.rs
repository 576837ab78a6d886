//! The suite's tokens: names are tokens, and so is whatever stands between two names.

use std::collections::HashMap;
use std::ops::Range;

use crate::glossary::{COMMA, HERE, MEANS, syllables};
use crate::{CONTAINMENT, HAND_OVER, name};

/// Stands for a piece of text that no story has.
pub const UNKNOWN: &str = "<unk>";

/// Ends an answer.
pub const END: &str = "</s>";

/// All tokens, by number.
#[derive(Clone, Debug)]
pub struct Vocabulary {
    pieces: Vec<String>,
    ids: HashMap<String, u32>,
    /// The tokens that are names.
    names: Vec<Range<u32>>,
}

impl Default for Vocabulary {
    fn default() -> Self {
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
        Self::new(pieces, vec![names])
    }
}

impl Vocabulary {
    fn new(pieces: Vec<String>, names: Vec<Range<u32>>) -> Self {
        let ids = pieces.iter().cloned().zip(0..).collect();
        Self { pieces, ids, names }
    }

    /// With the tokens of the glossary suite: syllables are names, too.
    pub fn of_glossary() -> Self {
        let Self { mut pieces, mut names, .. } = Self::default();
        pieces.extend([HERE, MEANS, COMMA].map(str::to_string));
        let first = pieces.len() as u32;
        pieces.extend(syllables());
        names.push(first..pieces.len() as u32);
        Self::new(pieces, names)
    }

    /// What each token spells, in their order.
    pub fn pieces(&self) -> &[String] {
        &self.pieces
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
        self.names.iter().any(|names| names.contains(&id))
    }
}
