//! Lost words as a task: a passage with blanks, each of which is filled where it stands.
//!
//! ```text
//! read     The coin _ in the _ _ table.          one blank for each token of a lost word
//! asked        at "coin": is   at "the": box      or at the blanks themselves
//! ```
//!
//! What comes after a blank says as much of it as what comes before: a reader that sees both ways should fill it better. A
//! causal one sees the rest too if it reads the text twice, or writes it out again: these are the controls.

use std::io::{Write, stdout};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::Instant;

use candle_core::Tensor;
use candle_nn::loss::cross_entropy;
use hybrid_attention::Tokenizer;
use hybrid_attention::model::Batch;
use hybrid_attention::thought::ThoughtModel;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

use crate::base::Base;
use crate::lessons::Lessons;
use crate::score::read_by;
use crate::settings::{Arm, AskedAt, Lost, Settings};
use crate::task::{Exercise, Task};
use crate::terminal::{self, Result};
use crate::text::{HELD_OUT, ONLY_READ, fingerprint};
use crate::trainee::Trainee;
use crate::ways::{Way, Ways};

/// Stands before the text that [`Arm::Rewrite`] writes out again.
const AGAIN: &str = "\n\nThe same text without blanks:\n";

/// The seed of what is lost in the examination, the same for all runs.
const EXAMINATION: u64 = 20_261_128;

/// The tokens of each word.
type Words = Vec<Vec<u32>>;

pub(crate) struct LostWords {
    /// Pieces of passages to draw from.
    train: Vec<Words>,
    /// The beginnings of passages that are never trained on, with their blanks.
    held_out: Vec<Puzzle>,
    /// The tokens that begin a text.
    begin: Vec<u32>,
    blank: u32,
    /// The tokens of [`AGAIN`].
    again: Vec<u32>,
    lost: Lost,
    /// Tells these tokens from those of another text.
    pub(crate) fingerprint: String,
    /// The checkpoint, to compare with.
    model: PathBuf,
}

/// A passage, and what is lost of it.
struct Puzzle {
    whole: Vec<u32>,
    blanked: Vec<u32>,
    /// The tokens that are lost.
    lost: Vec<usize>,
    /// How many words these are.
    words: usize,
}

/// A text as an arm reads it.
struct Laid {
    ids: Vec<u32>,
    /// What is thought about.
    context: Range<usize>,
    /// Where something is asked, and the answer.
    answers: Vec<(usize, u32)>,
}

#[derive(Debug, Serialize)]
pub(crate) struct Examination {
    /// Pieces of text that were trained on.
    trained_on: usize,
    /// Nats of a lost word.
    ways: Ways,
}

impl LostWords {
    /// Reads passages, one a line. Of those held out, the first `examined` are for the examination; without a file of them
    /// they are every fifth line.
    pub(crate) fn read(
        path: &Path,
        held_out: Option<&Path>,
        base: &Base,
        (tokens, examined): (usize, usize),
        lost: &Lost,
    ) -> Result<Self> {
        if !(lost.share > 0.0 && lost.share < 1.0) {
            return Err(
                format!("--lost: expected a share between 0 and 1, got {}", lost.share).into()
            );
        }
        let tokenizer = &base.tokenizer;
        let (begin, again) = (tokenizer.encode("", true)?, tokenizer.encode(AGAIN, false)?);
        let blank = match tokenizer.encode(&lost.blank, false)?.as_slice() {
            [blank] => *blank,
            several => {
                let message = format!("got {} for {:?}", several.len(), lost.blank);
                return Err(format!("--blank: expected the text of one token, {message}").into());
            }
        };
        // Read twice, with what stands between.
        let most =
            (base.config.max_position_embeddings / 2).saturating_sub(begin.len() + again.len());
        if !(2..=most).contains(&tokens) {
            return Err(
                format!("--tokens: expected 2 to {most}, for the text is read twice").into()
            );
        }
        if examined == 1 {
            return Err("--passages: expected at least 2, or 0 for no examination".into());
        }
        let (mut train, mut examination) = (Vec::new(), Vec::new());
        for (index, line) in terminal::read_text(path)?.lines().enumerate() {
            match held_out {
                None if index % HELD_OUT + 1 == HELD_OUT => {
                    examination.push(words(tokenizer, line)?);
                }
                _ => train.extend(pieces(words(tokenizer, line)?, tokens)),
            }
        }
        if let Some(path) = held_out {
            for line in terminal::read_text(path)?.lines() {
                examination.push(words(tokenizer, line)?);
            }
        }
        let firsts = examination.into_iter().filter_map(|words| pieces(words, tokens).next());
        let firsts: Vec<Words> = firsts.take(examined).collect();
        if train.is_empty() || firsts.len() < examined.min(2) {
            let message =
                format!("{} pieces to learn from, {} held out", train.len(), firsts.len());
            let expected = format!("passages of {} tokens or more", tokens.div_ceil(2));
            return Err(format!("{}: too few {expected}: {message}", path.display()).into());
        }
        let both = train.iter().chain(&firsts).map(|words| words.concat());
        let fingerprint = fingerprint(&both.collect::<Vec<_>>());
        let model = base.path.clone();
        let (held_out, lost) = (Vec::new(), lost.clone());
        let mut task = Self { train, held_out, begin, blank, again, lost, fingerprint, model };
        let mut rng = ChaCha8Rng::seed_from_u64(EXAMINATION);
        task.held_out = firsts.iter().map(|words| task.puzzle(words, &mut rng)).collect();
        Ok(task)
    }

    /// Loses words by chance, at least one, but never the first.
    fn puzzle(&self, words: &Words, rng: &mut impl Rng) -> Puzzle {
        let mut gone: Vec<bool> = words.iter().map(|_| rng.random_bool(self.lost.share)).collect();
        let one = rng.random_range(1..words.len().max(2));
        if let Some(first) = gone.first_mut() {
            *first = false;
        }
        if !gone.contains(&true)
            && let Some(one) = gone.get_mut(one)
        {
            *one = true;
        }
        let (mut whole, mut blanked) = (self.begin.clone(), self.begin.clone());
        let mut lost = Vec::new();
        for (word, &gone) in words.iter().zip(&gone) {
            if gone {
                lost.extend(whole.len()..whole.len() + word.len());
            }
            whole.extend(word);
            blanked.extend(word.iter().map(|id| if gone { self.blank } else { *id }));
        }
        Puzzle { whole, blanked, lost, words: gone.iter().filter(|gone| **gone).count() }
    }

    /// How an arm reads a passage, and where it is asked about what is lost.
    fn lay_out(&self, arm: Arm, puzzle: &Puzzle) -> Laid {
        let Puzzle { whole, blanked, lost, .. } = puzzle;
        let again = blanked.iter().skip(self.begin.len());
        let (mut ids, before, at) = (blanked.clone(), self.begin.len(), self.lost.at);
        let (shift, at) = match arm {
            Arm::Twice => {
                ids.extend(again);
                (blanked.len() - before, at)
            }
            Arm::Rewrite => {
                ids.extend(&self.again);
                let shift = ids.len() - before;
                ids.extend(whole.iter().skip(before));
                // At the word itself, nothing would be left to ask.
                (shift, AskedAt::Before)
            }
            _ => (0, at),
        };
        let answer = |&lost: &usize| {
            let asked = lost + shift - usize::from(at == AskedAt::Before);
            Some((asked, *whole.get(lost)?))
        };
        Laid {
            ids,
            context: ONLY_READ..blanked.len(),
            answers: lost.iter().filter_map(answer).collect(),
        }
    }

    /// The nats of a lost word of each passage held out.
    fn way(
        &self,
        name: &str,
        model: &ThoughtModel,
        settings: &Settings,
        how: (Arm, usize),
        progress: impl Fn(),
    ) -> Result<Way> {
        let (mut losses, mut tokens, start) = (Vec::new(), 0, Instant::now());
        for puzzle in &self.held_out {
            let Laid { ids, context, answers } = self.lay_out(how.0, puzzle);
            tokens += ids.len();
            let batch = Batch::one(ids.len())?.with_context(0, std::slice::from_ref(&context))?;
            let hidden = read_by(model, settings, how, &ids, batch)?;
            let (at, answers): (Vec<u32>, Vec<u32>) =
                answers.into_iter().map(|(at, id)| (at as u32, id)).unzip();
            let hidden = hidden.index_select(&Tensor::new(at, hidden.device())?, 0)?;
            let logits = model.decoder().logits(&hidden)?; // (answers, vocab)
            let of_word = answers.len() as f64 / puzzle.words as f64; // tokens
            let answers = Tensor::new(answers, hidden.device())?;
            let loss = cross_entropy(&logits, &answers)?.to_scalar::<f32>()?;
            losses.push(f64::from(loss) * of_word);
            progress();
        }
        let count = self.held_out.len() as f64;
        let (tokens, seconds) = (tokens as f64 / count, start.elapsed().as_secs_f64() / count);
        Ok(Way { name: name.to_string(), losses, right: Vec::new(), tokens, seconds })
    }
}

impl Task for LostWords {
    type Examination = Examination;

    const STEPS_PER_POINT: usize = 10;

    fn draw(&self, settings: &Settings, _: &Lessons, rng: &mut ChaCha8Rng) -> Result<Exercise> {
        let passes = settings.draw_passes(settings.most_passes(), rng);
        let (mut ids, mut answers) = (Vec::new(), Vec::new());
        let (mut lengths, mut contexts) = (Vec::new(), Vec::new());
        for _ in 0..settings.batch {
            let words = &self.train[rng.random_range(0..self.train.len())];
            let laid = self.lay_out(settings.arm, &self.puzzle(words, rng));
            let start = ids.len();
            answers.extend(laid.answers.into_iter().map(|(at, id)| ((start + at) as u32, id)));
            lengths.push(laid.ids.len());
            contexts.push(laid.context);
            ids.extend(laid.ids);
        }
        let mut batch = Batch::ragged(&lengths)?;
        for (sequence, context) in contexts.iter().enumerate() {
            batch = batch.with_context(sequence, std::slice::from_ref(context))?;
        }
        Ok(Exercise { ids, batch, answers, passes, end: None })
    }

    fn status(&self, _: &Lessons, loss: f32) -> String {
        format!("loss {loss:.3}")
    }

    fn examine(&self, settings: &Settings, trainee: &Trainee) -> Result<Option<Examination>> {
        if self.held_out.is_empty() {
            return Ok(None);
        }
        let least = usize::from(settings.most_passes() > 0);
        let trained = least..=settings.most_passes();
        let untrained = [
            ("checkpoint, causal", Arm::NoPasses),
            ("checkpoint, the text read twice", Arm::Twice),
            ("checkpoint, writing it out again", Arm::Rewrite),
        ];
        let count = (untrained.len() + trained.clone().count()) * self.held_out.len();
        let bar = terminal::bar(count as u64, "examination [{bar:30}] {pos}/{len}, {eta} to go");
        let model = Base::load(&self.model)?.model()?;
        let mut ways = Vec::new();
        for (name, arm) in untrained {
            ways.push(self.way(name, &model, settings, (arm, 0), || bar.inc(1))?);
        }
        drop(model);
        let model = trainee.model(&mut settings.rng(settings.steps))?;
        for passes in trained {
            let name = match least {
                0 => format!("trained, {}", settings.arm.name()),
                _ => format!("trained, {}, {passes} passes", settings.arm.name()),
            };
            ways.push(self.way(&name, &model, settings, (settings.arm, passes), || bar.inc(1))?);
        }
        bar.finish_and_clear();
        let ways = Ways::new(ways);
        write!(stdout(), "{}", ways.table("Nats per lost word"))?;
        Ok(Some(Examination { trained_on: self.train.len(), ways }))
    }
}

/// The words of a line, each with the blank before it.
fn words(tokenizer: &Tokenizer, line: &str) -> Result<Words> {
    let mut words = Words::new();
    for id in tokenizer.encode(line.trim(), false)? {
        let token = tokenizer.token(id).unwrap_or_default();
        // A blank, as it is, or as byte-level tokenizers and SentencePiece spell it.
        let begins = token.starts_with([' ', 'Ġ', '▁']);
        match words.last_mut() {
            Some(word) if !begins => word.push(id),
            _ => words.push(vec![id]),
        }
    }
    Ok(words)
}

/// Pieces of whole words, each of at most so many tokens, and at least two words and half as many tokens.
fn pieces(words: Words, tokens: usize) -> impl Iterator<Item = Words> {
    let mut pieces = vec![Words::new()];
    let mut room = tokens;
    for word in words {
        if word.len() > room {
            pieces.push(Words::new());
            room = tokens;
        }
        room = room.saturating_sub(word.len());
        if let Some(last) = pieces.last_mut() {
            last.push(word);
        }
    }
    let long_enough = move |words: &Words| {
        let count = words.iter().map(Vec::len).sum::<usize>();
        words.len() >= 2 && (tokens.div_ceil(2)..=tokens).contains(&count)
    };
    pieces.into_iter().filter(long_enough)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn task(share: f64, at: AskedAt) -> LostWords {
        LostWords {
            train: Vec::new(),
            held_out: Vec::new(),
            begin: vec![1],
            blank: 9,
            again: vec![7, 8],
            lost: Lost { share, blank: "_".into(), at, held_out: None },
            fingerprint: String::new(),
            model: PathBuf::new(),
        }
    }

    #[test]
    fn each_arm_is_asked_where_the_lost_word_is_next() {
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        let words: Words = (0..40).map(|word| vec![100 + 2 * word, 101 + 2 * word]).collect();
        for share in [0.01, 0.4, 0.99] {
            for arm in [Arm::BothWays, Arm::Whole, Arm::NoPasses, Arm::Twice, Arm::Rewrite] {
                for at in [AskedAt::Before, AskedAt::Blank] {
                    let task = task(share, at);
                    let puzzle = task.puzzle(&words, &mut rng);
                    assert_eq!(puzzle.lost.len(), 2 * puzzle.words);
                    assert!(puzzle.words > 0 && puzzle.lost[0] > 2);
                    let laid = task.lay_out(arm, &puzzle);
                    assert_eq!(laid.ids.first(), Some(&1));
                    assert_eq!(laid.ids.iter().filter(|id| **id == 1).count(), 1);
                    assert_eq!(laid.answers.len(), puzzle.lost.len());
                    for ((asked, id), lost) in laid.answers.iter().zip(&puzzle.lost) {
                        assert_eq!(puzzle.whole[*lost], *id);
                        assert_eq!(puzzle.blanked[*lost], 9);
                        let shown = match arm {
                            // What is asked for is written next.
                            Arm::Rewrite => Some((laid.ids[asked + 1], *id)),
                            // The blank follows, or is the last of the text.
                            _ if at == AskedAt::Before => Some((laid.ids[asked + 1], 9)),
                            _ => Some((laid.ids[*asked], 9)),
                        };
                        assert!(shown.is_some_and(|(got, expected)| got == expected));
                    }
                }
            }
        }
    }

    #[test]
    fn pieces_are_whole_words_in_their_order() {
        let words: Words = (0..30u32).map(|word| vec![word; 1 + word as usize % 5]).collect();
        for tokens in [4, 7, 20, 89, 90, 180, 181] {
            let pieces: Vec<Words> = pieces(words.clone(), tokens).collect();
            for piece in &pieces {
                let count = piece.concat().len();
                assert!(count <= tokens && 2 * count >= tokens && piece.len() >= 2);
            }
            // All of them together have 90 tokens.
            assert_eq!(pieces.is_empty(), tokens > 180);
            let ids: Vec<u32> = pieces.concat().iter().map(|word| word[0]).collect();
            assert!(ids.windows(2).all(|two| two[0] < two[1]));
            if (20..=180).contains(&tokens) {
                assert!(pieces[0][0] == [0] && ids.len() >= 25, "little is cut off: {ids:?}");
            }
        }
    }
}
