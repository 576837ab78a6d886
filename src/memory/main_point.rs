//! The main point of a text: the words that carry it.

use std::ops::Range;

use candle_core::Tensor;

use super::look::look;
use super::salience::{Reading, Salience};
use super::words::{Word, words};
use crate::error::{Error, Result};
use crate::hybrid::HybridModel;
use crate::pooling::unit_length;

/// The words of a text that carry it, and the states that their tokens have in its context.
///
/// ```
/// # use candle_core::Device;
/// use hybrid_attention::HybridModel;
/// use hybrid_attention::memory::{MainPoint, Salience};
///
/// # fn main() -> hybrid_attention::Result<()> {
/// let model = HybridModel::tiny(&Device::Cpu)?;
/// let text = "Then Eva gave everything to Max. Earlier, Leo had handed everything to Ida.";
/// let point = MainPoint::of(&model, text, &Salience::received().share(0.5))?;
/// for span in point.spans() {
///     println!("{:?} {} {:.3}", span.bytes, span.text, span.score);
/// }
/// assert!(point.share() < 0.6); // of so few tokens, rounded up
/// assert_eq!(point.vector()?.dims(), [model.config().hidden_size]);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct MainPoint {
    spans: Vec<Span>,
    tokens: usize,
    kept: Vec<usize>,
    states: Tensor,
}

/// A run of chosen words.
#[derive(Clone, Debug, PartialEq)]
pub struct Span {
    /// Where in the text.
    pub bytes: Range<usize>,
    /// From the first to the last of the tokens that spell its words, counted from the first of the text, BOS included.
    pub tokens: Range<usize>,
    /// What stands there.
    pub text: String,
    /// The highest of its words' scores, each the mean of its tokens'.
    pub score: f32,
}

impl MainPoint {
    /// Reads `text` and finds its main point.
    ///
    /// Words are taken by their scores, highest first, of equal ones the earlier, while their tokens fit the
    /// budget; at least one is. A word that begins with the first token of all is taken only where nothing
    /// else is left, because attention goes there whatever it is. Of a text without any word, all is kept.
    ///
    /// # Errors
    /// [`Error::EmptyPrompt`] for a text of no tokens, [`Error::ContextFull`] for one that is too long for the
    /// model, [`Error::NoTokenizer`], [`Error::Tokenizer`]; [`Error::Parameter`] for settings outside their
    /// range; [`Error::NotFinite`]; whatever a closure of [`Salience::by`] returns.
    pub fn of(model: &HybridModel, text: &str, salience: &Salience) -> Result<Self> {
        salience.validate()?;
        let read = Read::new(model, text, std::slice::from_ref(salience))?;
        let scores = read.scores.first().map_or(&[][..], Vec::as_slice);
        read.point(scores, salience.room(read.ids.len()))
    }

    /// The chosen words in the order of the text, neighbours as one span.
    #[must_use]
    pub fn spans(&self) -> &[Span] {
        &self.spans
    }

    /// The tokens that were kept, counted from the first of the text.
    #[must_use]
    pub fn tokens(&self) -> &[usize] {
        &self.kept
    }

    /// The share of the text's tokens that was kept.
    #[must_use]
    pub fn share(&self) -> f64 {
        self.kept.len() as f64 / self.tokens.max(1) as f64
    }

    /// Its words, with ` … ` where something was left out.
    #[must_use]
    pub fn text(&self) -> String {
        let texts: Vec<_> = self.spans.iter().map(|span| span.text.as_str()).collect();
        texts.join(" … ")
    }

    /// The final states of the kept tokens, as they are in the context of all of the text: `(kept, hidden)` in
    /// `f32`, after the last norm. Read causally, or both ways where the checkpoint's vectors are
    /// ([`HybridModel::embed`]).
    #[must_use]
    pub fn states(&self) -> &Tensor {
        &self.states
    }

    /// Their mean, scaled to length 1: `(hidden)`, in `f32`.
    ///
    /// # Errors
    /// When a device fails.
    pub fn vector(&self) -> Result<Tensor> {
        unit_length(&self.states.mean(0)?)
    }
}

/// A text that was read, before anything is chosen.
#[derive(Debug)]
pub(super) struct Read<'a> {
    pub(super) text: &'a str,
    pub(super) ids: Vec<u32>,
    bytes: Vec<Range<usize>>,
    /// The tokens that spell something.
    spelled: Vec<usize>,
    states: Tensor,
    /// A score for each token, by each of the ways it was read with.
    pub(super) scores: Vec<Vec<f32>>,
}

impl<'a> Read<'a> {
    pub(super) fn new(model: &'a HybridModel, text: &'a str, ways: &[Salience]) -> Result<Self> {
        let tokenizer =
            model.tokenizer().ok_or(Error::NoTokenizer { needed_for: "a main point" })?;
        let (ids, bytes) = tokenizer.encode_spans(text, true)?;
        model.transformer().check_context(ids.len())?;
        model.transformer().check_ids(&ids)?;
        let spelled = |token: &usize| bytes.get(*token).is_some_and(|bytes| !bytes.is_empty());
        let spelled: Vec<usize> = (0..ids.len()).filter(spelled).collect();
        if spelled.is_empty() {
            return Err(Error::EmptyPrompt);
        }
        let reading = Reading { model, text, ids: &ids, bytes: &bytes };
        let (states, scores) = look(&reading, ways)?;
        Ok(Self { text, ids, bytes, spelled, states, scores })
    }

    pub(super) fn words(&self) -> Vec<Word> {
        words(self.text, &self.bytes)
    }

    /// The words of the highest `scores`, of at most `room` tokens.
    pub(super) fn point(&self, scores: &[f32], room: usize) -> Result<MainPoint> {
        let words = scored(self.words(), scores);
        let (spans, kept) = if words.is_empty() {
            let score = scores.iter().copied().fold(f32::MIN, f32::max);
            let (first, last) = (self.spelled.first(), self.spelled.last());
            let tokens = first.copied().unwrap_or(0)..last.map_or(0, |last| last + 1);
            let span = Span { bytes: 0..self.text.len(), tokens, text: self.text.into(), score };
            (vec![span], self.spelled.clone())
        } else {
            let chosen = choose(&words, room, self.ids.len());
            (merged(self.text, &words, &chosen), tokens_of(&words, &chosen))
        };
        let rows: Vec<u32> = kept.iter().map(|token| *token as u32).collect();
        let rows = Tensor::new(rows, self.states.device())?;
        let states = self.states.index_select(&rows, 0)?;
        Ok(MainPoint { spans, tokens: self.ids.len(), kept, states })
    }
}

/// Each word with the mean score of its tokens.
fn scored(words: Vec<Word>, scores: &[f32]) -> Vec<(Word, f32)> {
    let score = |word: Word| {
        let own = scores.get(word.tokens.clone()).unwrap_or_default();
        let mean = own.iter().sum::<f32>() / own.len().max(1) as f32;
        (word, mean)
    };
    words.into_iter().map(score).collect()
}

/// The indices of the words to keep, in the order of the text.
fn choose(words: &[(Word, f32)], room: usize, tokens: usize) -> Vec<usize> {
    let mut order: Vec<usize> = (0..words.len()).collect();
    let key = |index: &usize| {
        words.get(*index).map_or((true, 0.0), |(word, score)| (word.tokens.start == 0, *score))
    };
    order.sort_by(|a, b| {
        let ((a_first, a), (b_first, b)) = (key(a), key(b));
        a_first.cmp(&b_first).then(b.total_cmp(&a))
    });
    let (mut taken, mut count, mut chosen) = (vec![false; tokens], 0, Vec::new());
    for index in order {
        let Some((word, _)) = words.get(index) else { continue };
        let Some(own) = taken.get_mut(word.tokens.clone()) else { continue };
        let new = own.iter().filter(|taken| !**taken).count();
        if count + new <= room || chosen.is_empty() {
            own.fill(true);
            count += new;
            chosen.push(index);
        }
    }
    chosen.sort_unstable();
    chosen
}

fn tokens_of(words: &[(Word, f32)], chosen: &[usize]) -> Vec<usize> {
    let words = chosen.iter().filter_map(|index| words.get(*index));
    let mut tokens: Vec<usize> = words.flat_map(|(word, _)| word.tokens.clone()).collect();
    tokens.dedup(); // words of one token are neighbours
    tokens
}

/// Chosen words as spans: neighbours with only blanks between them are one.
fn merged(text: &str, words: &[(Word, f32)], chosen: &[usize]) -> Vec<Span> {
    let mut spans: Vec<Span> = Vec::new();
    let mut last = None;
    for &index in chosen {
        let Some((word, score)) = words.get(index) else { continue };
        let between = spans.last().and_then(|span| text.get(span.bytes.end..word.bytes.start));
        let goes_on = last.is_some_and(|last| last + 1 == index)
            && between.is_some_and(|between| between.chars().all(char::is_whitespace));
        match spans.last_mut().filter(|_| goes_on) {
            Some(span) => {
                span.bytes.end = word.bytes.end;
                span.tokens.end = word.tokens.end;
                span.score = span.score.max(*score);
            }
            None => spans.push(Span {
                bytes: word.bytes.clone(),
                tokens: word.tokens.clone(),
                text: String::new(),
                score: *score,
            }),
        }
        last = Some(index);
    }
    for span in &mut spans {
        span.text = text.get(span.bytes.clone()).unwrap_or_default().to_owned();
    }
    spans
}
