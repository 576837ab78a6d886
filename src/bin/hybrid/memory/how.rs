//! Which store, and what its notes are found by.

use std::path::{Path, PathBuf};

use clap::{Args, ValueEnum};
use hybrid_attention::memory::{Embedded, Embedding, Memory, Note, Salience};
use hybrid_attention::{EmbedConfig, HybridModel};

use crate::terminal::Result;

/// Which store.
#[derive(Args, Debug)]
#[command(next_help_heading = "Store")]
pub(crate) struct StoreArgs {
    /// The file of notes
    #[arg(long, value_name = "F")]
    pub(crate) store: PathBuf,
}

impl StoreArgs {
    /// The store, which must be there.
    pub(crate) fn existing(&self) -> Result<Embedded> {
        match self.store.is_file() {
            true => Ok(Embedded::open(&self.store)?),
            false => Err(format!("{}: no such file", self.store.display()).into()),
        }
    }
}

/// A store that is made where there is none, and what its notes are found by.
#[derive(Args, Debug)]
#[command(next_help_heading = "Store")]
pub(crate) struct NewStoreArgs {
    /// The file of notes; made if it is not there
    #[arg(long, value_name = "F")]
    store: PathBuf,

    /// What of a text it is found by: one vector of all of it, one of its main point, or one for each
    /// token of its main point. Fixed when the store is made [default: as the store says; for a new one whole]
    #[arg(long, value_enum, value_name = "WHAT")]
    embed: Option<What>,

    /// How words are scored for a main point; `hybrid memory eval` compares the ways
    /// [default: received]
    #[arg(long, value_enum, value_name = "HOW", requires = "embed")]
    salience: Option<How>,

    /// The share of a text's tokens that is its main point, above 0 and at most 1 [default: 0.25]
    #[arg(long, value_name = "S", requires = "embed")]
    share: Option<f64>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum What {
    Whole,
    MainPoint,
    Words,
}

/// A score of salience on the command line.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(crate) enum How {
    /// Attention that the last 8 tokens pay
    LastQueries,
    /// Attention received from all tokens, both ways
    Received,
    /// The same times the length of the value
    ValueWeighted,
    /// Attention paid while the text is read again behind itself: needs twice its place in the context
    Reconstruct,
    /// How far keys are from being made up of others, plus attention received
    Leverage,
    /// By chance: a control
    Random,
    /// The first words: a control
    Lead,
}

impl How {
    /// As it is written on the command line.
    pub(crate) fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_owned())
    }

    pub(crate) fn salience(self) -> Salience {
        match self {
            Self::LastQueries => Salience::last_queries(8),
            Self::Received => Salience::received(),
            Self::ValueWeighted => Salience::value_weighted(),
            Self::Reconstruct => Salience::reconstruct(),
            Self::Leverage => Salience::leverage(),
            Self::Random => Salience::random(0),
            Self::Lead => Salience::lead(),
        }
    }
}

impl NewStoreArgs {
    /// What was asked for, if anything was.
    pub(crate) fn embedding(&self) -> Result<Option<Embedding>> {
        let Some(what) = self.embed else { return Ok(None) };
        if what == What::Whole && (self.salience.is_some() || self.share.is_some()) {
            return Err("--salience and --share are for --embed main-point and words".into());
        }
        let salience = self.salience.unwrap_or(How::Received).salience();
        let salience = self.share.into_iter().fold(salience, Salience::share);
        let embedding = match what {
            What::Whole => Embedding::Whole(EmbedConfig::default()),
            What::MainPoint => Embedding::MainPoint(salience),
            What::Words => Embedding::Words(salience),
        };
        embedding.validate()?;
        Ok(Some(embedding))
    }

    pub(crate) fn open(&self, model: &HybridModel) -> Result<Memory> {
        Ok(Memory::over(Embedded::open(&self.store)?, model, self.embedding()?)?)
    }

    pub(crate) fn path(&self) -> &Path {
        &self.store
    }
}

/// `project=harbour`
pub(crate) fn parse_tag(text: &str) -> std::result::Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err("expected a name and a value like project=harbour".to_owned()),
    }
}

/// `note` with these tags.
pub(crate) fn tagged(note: Note, tags: &[(String, String)]) -> Note {
    tags.iter().fold(note, |note, (name, value)| note.tag(name, value))
}
