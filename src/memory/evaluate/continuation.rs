//! Does a choice of words say as much of how a text goes on as all of it does?

use serde::Serialize;

use super::rarity::Rarity;
use super::{Passage, Read, chance, check, every_score, room};
use crate::error::{Error, Result};
use crate::evaluate::{self, losses};
use crate::hybrid::HybridModel;
use crate::memory::salience::Salience;
use crate::thought::Thinking;

/// How much the next part of a text surprises the model after what was kept of the part before, in nats a token.
///
/// The kept words stand in front as a prompt has them, in the order of the text with a blank between spans and an empty
/// line behind them, so that no way is given more tokens than another. The first token of the next part is given in any
/// case.
///
/// ```
/// # use candle_core::Device;
/// use hybrid_attention::HybridModel;
/// use hybrid_attention::evaluate::Estimate;
/// use hybrid_attention::memory::evaluate::{Continuation, Passage};
///
/// # fn main() -> hybrid_attention::Result<()> {
/// let model = HybridModel::tiny(&Device::Cpu)?;
/// let text = "Then Eva gave everything to Max. Then Max gave all of it to Eva again.";
/// let passages: Vec<_> = Passage::cut(&model, text, 4)?.into_iter().collect();
/// for row in Continuation::default().run(&model, &passages, || ())? {
///     println!("{} {:?} {:.3}", row.name, row.share, Estimate::of(&row.losses).mean);
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Continuation {
    /// Scores of salience, by name. Their own budgets do not count.
    pub ways: Vec<(String, Salience)>,
    /// Shares of the tokens that are kept.
    pub shares: Vec<f64>,
    /// How often words are drawn by chance; a passage's figure is the mean of all draws.
    pub draws: u64,
}

impl Default for Continuation {
    /// All scores, at 25 and 50 %, and five draws.
    fn default() -> Self {
        Self { ways: every_score(), shares: vec![0.25, 0.5], draws: 5 }
    }
}

/// How well the next parts are predicted after what one way gives.
#[derive(Clone, Debug, Serialize)]
pub struct Given {
    /// Which way.
    pub name: String,
    /// The share of the tokens that it may keep; none for all of them, and for nothing.
    pub share: Option<f64>,
    /// For each passage, how many tokens are given of its first part.
    pub tokens: Vec<f64>,
    /// For each passage, the loss of its second part, in nats a token.
    pub losses: Vec<f64>,
}

impl Given {
    fn add(&mut self, (tokens, loss): (f64, f64)) {
        self.tokens.push(tokens);
        self.losses.push(loss);
    }
}

impl Continuation {
    /// The row in which all of the text is given.
    pub const WHOLE: &str = "whole";
    /// The row in which as many words are by chance.
    pub const RANDOM: &str = "random";
    /// The row in which nothing is.
    pub const NOTHING: &str = "nothing";

    /// All rows; `progress` is called for every passage.
    ///
    /// # Errors
    /// [`Error::Parameter`] for no passages, a share outside its range, or no draws; for a passage whose second part is
    /// of one token; as [`MainPoint::of`](crate::memory::MainPoint::of) and [`HybridModel::generate`].
    pub fn run(
        &self,
        model: &HybridModel,
        passages: &[Passage],
        progress: impl Fn(),
    ) -> Result<Vec<Given>> {
        if passages.is_empty() {
            return Err(Error::parameter("passages", "at least 1", 0));
        }
        check(&self.shares, self.draws)?;
        let rare = Rarity::of(passages.iter().map(|passage| passage.stored.as_str()));
        let mut rows = self.rows();
        for (index, passage) in (0u64..).zip(passages) {
            let own = self.ways.iter().map(|(_, salience)| salience.clone());
            let ways = chance(self.draws, index).chain([Salience::lead()]).chain(own);
            let read = Read::new(model, &passage.stored, &ways.collect::<Vec<_>>())?;
            let given = |text: &str| given(model, text, &passage.query);
            let mut found = vec![given(&passage.stored)?, given("")?];
            for &share in &self.shares {
                let chosen = |scores: &[f32]| {
                    let point = read.point(scores, room(share, &read))?;
                    let words: Vec<_> = point.spans().iter().map(|it| it.text.as_str()).collect();
                    given(&words.join(" "))
                };
                let all = read.scores.iter().map(|scores| chosen(scores));
                let mut all = all.collect::<Result<Vec<_>>>()?.into_iter();
                let drawn: Vec<_> = (0..self.draws).zip(&mut all).map(|(_, drawn)| drawn).collect();
                let mean = |of: fn(&(f64, f64)) -> f64| {
                    drawn.iter().map(of).sum::<f64>() / drawn.len() as f64
                };
                found.push((mean(|it| it.0), mean(|it| it.1)));
                found.push(chosen(&rare.scores(&read))?);
                found.extend(all);
            }
            rows.iter_mut().zip(found).for_each(|(row, found)| row.add(found));
            progress();
        }
        Ok(rows)
    }

    /// The rows, of no passage yet.
    fn rows(&self) -> Vec<Given> {
        let row = |name: &str, share| Given {
            name: name.to_owned(),
            share,
            tokens: Vec::new(),
            losses: Vec::new(),
        };
        let names: Vec<&str> = [Self::RANDOM, "idf", "lead"]
            .into_iter()
            .chain(self.ways.iter().map(|(name, _)| name.as_str()))
            .collect();
        let of_share = |share: &f64| {
            let share = Some(*share);
            names.iter().map(move |name| row(name, share)).collect::<Vec<_>>()
        };
        let shares = self.shares.iter().flat_map(of_share);
        [row(Self::WHOLE, None), row(Self::NOTHING, None)].into_iter().chain(shares).collect()
    }
}

/// How many tokens `text` is, and the loss of `next` after it.
fn given(model: &HybridModel, text: &str, next: &str) -> Result<(f64, f64)> {
    let needed_for = "an evaluation";
    let tokenizer = model.tokenizer().ok_or(Error::NoTokenizer { needed_for })?;
    let mut first = tokenizer.begin(Vec::new());
    let begins = !first.is_empty();
    let tokens = tokenizer.encode_said(text)?.len() as f64;
    if !text.is_empty() {
        first.extend(tokenizer.encode_said(&format!("{text}\n\n"))?);
    }
    let mut second = tokenizer.encode_said(next)?;
    first.extend(second.drain(..second.len().min(1)));
    let passage = evaluate::Passage { first, second, begins, only_read: 0 };
    let losses = losses(model, &[passage], evaluate::Passage::prompt, &Thinking::none(), || ())?;
    Ok((tokens, losses.iter().sum()))
}
