//! What a memory is worth: four tables, on your model and your texts.
//!
//! - [`Retrieval`]: does a choice of words find a text as well as all of it does?
//! - [`Continuation`]: does it say as much of how the text goes on?
//! - [`Generics`]: is a text found better without what all texts have in common?
//! - [`Conversations`]: what is recalled of what was told, and put right since, and is it answered by?
//!
//! ```
//! # use candle_core::Device;
//! use hybrid_attention::HybridModel;
//! use hybrid_attention::evaluate::Estimate;
//! use hybrid_attention::memory::evaluate::{Passage, Retrieval};
//!
//! # fn main() -> hybrid_attention::Result<()> {
//! let model = HybridModel::tiny(&Device::Cpu)?;
//! let texts = [
//!     "Then Eva gave everything to Max. Then Max gave all of it to Eva again.",
//!     "Earlier, Leo had handed everything to Ida. By then, Ida had it from Leo.",
//! ];
//! let cut = |text: &&str| Passage::cut(&model, text, 4).transpose();
//! let passages = texts.iter().filter_map(cut).collect::<hybrid_attention::Result<Vec<_>>>()?;
//! for row in Retrieval::default().run(&model, &passages, || ())? {
//!     println!("{} {:?} {:.3}", row.name, row.share, Estimate::of(&row.reciprocal_ranks).mean);
//! }
//! # Ok(())
//! # }
//! ```

mod continuation;
mod conversations;
mod generics;
mod rarity;
mod retrieval;

use unicode_segmentation::UnicodeSegmentation;

pub use continuation::{Continuation, Given};
pub use conversations::{Asked, Conversations, Held, Story, Told};
pub use generics::{AtLayer, Generics, Tested};
pub use retrieval::{Compared, Retrieval, Row};

use rarity::Rarity;

use super::main_point::Read;
use super::salience::Salience;
use crate::error::{Error, Result};
use crate::hybrid::HybridModel;

/// Two adjacent parts of a text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Passage {
    /// What is stored.
    pub stored: String,
    /// What asks for it, and is how it goes on.
    pub query: String,
}

impl Passage {
    /// The first `tokens` tokens of a text, and as many behind them, both to the end of their last whole word; `None` for
    /// a text that has not as many.
    ///
    /// # Errors
    /// [`Error::NoTokenizer`], [`Error::Tokenizer`].
    pub fn cut(model: &HybridModel, text: &str, tokens: usize) -> Result<Option<Self>> {
        let needed_for = "an evaluation";
        let tokenizer = model.tokenizer().ok_or(Error::NoTokenizer { needed_for })?;
        let text = text.trim();
        let (_, bytes) = tokenizer.encode_spans(text, true)?;
        let ends = (tokens.checked_sub(1), tokens.saturating_mul(2).checked_sub(1));
        let (Some(middle), Some(end)) = ends else { return Ok(None) };
        let (Some(middle), Some(end)) = (bytes.get(middle), bytes.get(end)) else {
            return Ok(None);
        };
        // The last end of a word at or before a byte.
        let whole = |byte: usize| {
            let words = text.unicode_word_indices().map(|(at, word)| at + word.len());
            words.take_while(|end| *end <= byte).last().unwrap_or(0)
        };
        let (middle, end) = (whole(middle.end), whole(end.end));
        let stored = text.get(..middle).unwrap_or_default().trim();
        let query = text.get(middle..end).unwrap_or_default().trim();
        let both = !stored.is_empty() && !query.is_empty();
        Ok(both.then(|| Self { stored: stored.to_owned(), query: query.to_owned() }))
    }
}

/// Words by chance: other ones in each draw, and in each text.
fn chance(draws: u64, text: u64) -> impl Iterator<Item = Salience> {
    (0..draws).map(move |draw| Salience::random((draw << 32) + text))
}

/// All scores of salience, by name.
fn every_score() -> Vec<(String, Salience)> {
    let ways = [
        ("last 8 queries", Salience::last_queries(8)),
        ("received", Salience::received()),
        ("value-weighted", Salience::value_weighted()),
        ("reconstruct", Salience::reconstruct()),
        ("leverage", Salience::leverage()),
    ];
    ways.map(|(name, salience)| (name.to_owned(), salience)).into()
}

fn check(shares: &[f64], draws: u64) -> Result<()> {
    if draws == 0 {
        return Err(Error::parameter("draws", "at least 1", 0));
    }
    shares.iter().try_for_each(|share| Salience::lead().share(*share).validate())
}

/// How many tokens this share of a text is.
fn room(share: f64, read: &Read<'_>) -> usize {
    Salience::lead().share(share).room(read.ids.len())
}
