//! Stubs that grow side by side until one is left.

use std::cmp::Ordering;
use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use rand::{RngCore, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

use super::Candidates;
use super::stub::{Reason, Stub};
use crate::cancel::Cancel;
use crate::error::{Error, Result};
use crate::generate::answer::{Seconds, Token};
use crate::generate::config::GenerationConfig;
use crate::generate::conversation::Conversation;
use crate::generate::decoder::{Decoder, seconds_since};
use crate::generate::lane::Lane;
use crate::generate::progress::Progress;
use crate::generate::stop::StopReason;
use crate::generate::writer::Writer;
use crate::model::Transformer;

/// Whoever looks on.
type Told<'c> = Box<dyn FnMut(&[Stub]) + Send + 'c>;

/// A number for a stub.
type Judge<'c> = Box<dyn FnMut(&Stub) -> Result<f64> + Send + 'c>;

/// The candidates of one answer.
pub(in crate::generate) struct Race<'c> {
    how: Candidates,
    max_tokens: usize,
    /// All of them, in the order of their numbers.
    pub(in crate::generate) stubs: Vec<Stub>,
    /// Those that are still there, in the same order.
    racers: Vec<Racer>,
    /// Instead of their [`Score`](super::Score).
    pub(in crate::generate) own_score: Option<Judge<'c>>,
    /// How far from what a key expects.
    pub(in crate::generate) deviation: Option<Judge<'c>>,
    pub(in crate::generate) told: Told<'c>,
}

/// A stub that is still there.
struct Racer {
    index: usize,
    lane: Lane,
    /// The logits before its first token, until that is drawn.
    first: Option<Arc<[f32]>>,
    said: Vec<Token>,
    /// What went wrong with it, and with no other.
    failed: Option<Error>,
}

impl Racer {
    fn new(index: usize, lane: Lane, first: Result<Arc<[f32]>>) -> Self {
        let (first, failed) = match first {
            Ok(logits) => (Some(logits), None),
            Err(error) => (None, Some(error)),
        };
        Self { index, lane, first, said: Vec::new(), failed }
    }

    fn write(&mut self, logits: &[f32]) {
        match self.lane.write(logits) {
            Ok(token) => self.said.push(token),
            Err(error) => self.failed = Some(error),
        }
    }

    fn write_first(&mut self) {
        if let Some(logits) = self.first.take() {
            self.write(&logits);
        }
    }
}

/// An answer whose prompt has yet to be read.
pub(in crate::generate) struct Start<'a> {
    pub(in crate::generate) decoder: &'a mut Decoder,
    pub(in crate::generate) writer: &'a mut Writer,
    pub(in crate::generate) conversation: &'a mut Conversation,
    pub(in crate::generate) prompt_logprobs: bool,
    pub(in crate::generate) progress: &'a mut dyn FnMut(Progress),
}

impl<'c> Race<'c> {
    pub(in crate::generate) fn new(how: &Candidates, config: &GenerationConfig) -> Self {
        let seed = config.seed.unwrap_or_else(|| ChaCha8Rng::from_os_rng().next_u64());
        let stub = |index| Stub::new(index, Candidates::seed_of(seed, index));
        Self {
            how: how.clone(),
            max_tokens: config.max_tokens,
            stubs: (0..how.count()).map(stub).collect(),
            racers: Vec::new(),
            own_score: None,
            deviation: None,
            told: Box::new(|_| ()),
        }
    }

    /// Reads the prompt, once or once for each thought. Returns how many of its tokens did not run because the
    /// conversation had them.
    pub(in crate::generate) fn read(&mut self, start: Start<'_>) -> Result<usize> {
        let Start { decoder, writer, conversation, prompt_logprobs, progress } = start;
        if self.how.needs_key() && self.deviation.is_none() {
            return Err(Error::parameter("key", "one, given by TokenStream::key", "none"));
        }
        if !self.how.are_thoughts() {
            let read = decoder.read(prompt_logprobs, conversation, progress)?;
            let kept = read.kept;
            let first: Arc<[f32]> = writer.begin(read).into();
            let racer = |stub| {
                let lane = lane(stub, decoder.clone(), writer, conversation);
                Racer::new(stub.index, lane, Ok(Arc::clone(&first)))
            };
            self.racers = self.stubs.iter().map(racer).collect();
            return Ok(kept);
        }
        let (start, mut think) = (Instant::now(), 0.0);
        let begun = decoder.begin(prompt_logprobs, conversation)?;
        for stub in &self.stubs {
            let own = decoder.for_candidate(stub.index as u64);
            let mut lane = lane(stub, own, writer, conversation);
            let Lane { decoder, writer, conversation } = &mut lane;
            let first =
                match decoder.think_and_read(&begun, prompt_logprobs, conversation, progress) {
                    Ok(read) => {
                        think += read.seconds.think;
                        Ok(writer.begin(read).into())
                    }
                    Err(error @ Error::NotFinite { .. }) => Err(error), // of this thought, not of others
                    Err(error) => return Err(error),
                };
            self.racers.push(Racer::new(stub.index, lane, first));
        }
        let prefill = seconds_since(start) - think;
        writer.answer.seconds = Seconds { think, prefill, decode: 0.0 };
        Ok(0)
    }

    /// Writes until one stub is left, or all that are have ended. Returns the best, and what it has said.
    pub(in crate::generate) fn run(
        &mut self,
        transformer: &Transformer,
        cancel: &Cancel,
    ) -> Result<(Lane, Vec<Token>)> {
        self.racers.par_iter_mut().for_each(Racer::write_first);
        self.drop_the_failed()?;
        for tokens in 1usize.. {
            self.drop_the_hopeless()?;
            if tokens.is_multiple_of(self.how.every) && !self.is_decided() {
                self.drop_the_worst(tokens / self.how.every)?;
            }
            if self.is_decided() {
                break;
            }
            self.step(transformer, cancel)?;
        }
        self.decide()
    }

    /// What the winner became after it was left alone.
    pub(in crate::generate) fn complete(&mut self, writer: &Writer) {
        let won = self.stubs.iter_mut().find(|stub| stub.reason == Reason::Won);
        if let Some(stub) = won {
            refresh(stub, writer);
        }
    }

    fn is_decided(&self) -> bool {
        let ended = |racer: &Racer| racer.lane.writer.stop.is_some();
        // One that is alone goes on here, too, where it may have to end.
        let alone = self.racers.len() == 1 && self.how.within.is_none();
        alone || self.racers.iter().all(ended)
    }

    /// Runs the last token of each that has not ended, and draws the next ones.
    fn step(&mut self, transformer: &Transformer, cancel: &Cancel) -> Result<()> {
        let running = self.racers.iter_mut().filter(|racer| racer.lane.writer.stop.is_none());
        let mut running: Vec<&mut Racer> = running.collect();
        for racers in running.chunks_mut(Lane::MOST) {
            let mut lanes: Vec<&mut Lane> =
                racers.iter_mut().map(|racer| &mut racer.lane).collect();
            let logits = Lane::step_together(transformer, &mut lanes, cancel)?;
            // Drawing from a large vocabulary takes a while: on all cores.
            racers.par_iter_mut().zip(logits).for_each(|(racer, logits)| racer.write(&logits));
        }
        self.drop_the_failed()
    }

    /// Drops those whose numbers overflowed; if none is left, that is an error, and so is any other failure.
    fn drop_the_failed(&mut self) -> Result<()> {
        let (mut failed, mut first) = (Vec::new(), None);
        for racer in &mut self.racers {
            match racer.failed.take() {
                None => (),
                Some(error @ Error::NotFinite { .. }) => {
                    failed.push(racer.index);
                    first.get_or_insert(error);
                }
                Some(error) => return Err(error),
            }
        }
        self.drop_all(&failed, Reason::NotFinite);
        match first {
            Some(error) if self.racers.is_empty() => Err(error),
            _ => Ok(()),
        }
    }

    /// Records that a stub went, whose memory is free from here on.
    fn drop_one(&mut self, racer: &Racer, reason: Reason) {
        if let Some(stub) = self.stubs.get_mut(racer.index) {
            refresh(stub, &racer.lane.writer);
            stub.dropped_at = Some(stub.ids.len());
            stub.reason = reason;
        }
    }

    /// Drops those that cannot win any more, because one that has ended is better than they could become.
    fn drop_the_hopeless(&mut self) -> Result<()> {
        // Nothing is known of what a function, or a key, will make of longer texts.
        if self.own_score.is_some() || self.how.within.is_some() {
            return Ok(());
        }
        self.refresh();
        let stubs = racing(&self.stubs, &self.racers);
        let scores = self.how.score.of(&stubs);
        let ended = stubs.iter().zip(&scores).filter(|(stub, _)| stub.stop.is_some());
        let Some(best) = ended.map(|(_, score)| *score).max_by(f64::total_cmp) else {
            return Ok(());
        };
        let hopeless = |stub: &&Stub| {
            let bound = self.how.score.bound(stub, self.max_tokens).filter(|_| stub.stop.is_none());
            // By more than what rounding makes of a tie.
            bound.is_some_and(|bound| bound + 1e-9 * bound.abs() < best)
        };
        let out: Vec<usize> = stubs.into_iter().filter(hopeless).map(|stub| stub.index).collect();
        if out.is_empty() {
            return Ok(());
        }
        self.judge()?;
        self.drop_all(&out, Reason::Bound);
        (self.told)(&self.stubs);
        Ok(())
    }

    /// A round: drops all but the best, or, where some are as they should be, all but the best of these.
    fn drop_the_worst(&mut self, rounds: usize) -> Result<()> {
        self.judge()?;
        if let Some(best) = self.best_within() {
            let out: Vec<usize> =
                self.ranked().into_iter().filter(|index| *index != best).collect();
            self.drop_all(&out, Reason::Outscored);
            for Racer { lane, said, .. } in &mut self.racers {
                let rest = lane.writer.end(StopReason::Intended);
                said.iter_mut().last().into_iter().for_each(|token| token.text.push_str(&rest));
            }
            return Ok(());
        }
        let left = self.how.left_after(rounds);
        let out: Vec<usize> = self.ranked().into_iter().skip(left).collect();
        self.drop_all(&out, Reason::Outscored);
        (self.told)(&self.stubs);
        Ok(())
    }

    /// The best of those whose statistics are within what was asked for.
    fn best_within(&self) -> Option<usize> {
        let most = self.how.within?;
        let inside = |index: &usize| {
            let deviation = self.stubs.get(*index).and_then(|stub| stub.deviation);
            deviation.is_some_and(|deviation| deviation <= most)
        };
        self.ranked().into_iter().find(inside)
    }

    fn drop_all(&mut self, out: &[usize], reason: Reason) {
        let racers = std::mem::take(&mut self.racers);
        for racer in racers {
            match out.contains(&racer.index) {
                true => self.drop_one(&racer, reason),
                false => self.racers.push(racer),
            }
        }
    }

    /// The best of those that are left; the others have lost.
    fn decide(&mut self) -> Result<(Lane, Vec<Token>)> {
        self.judge()?;
        let won = self.ranked().first().copied();
        let mut winner = None;
        for racer in std::mem::take(&mut self.racers) {
            let Some(stub) = self.stubs.get_mut(racer.index) else { continue };
            match Some(racer.index) == won {
                true => {
                    stub.reason = Reason::Won;
                    winner = Some((racer.lane, racer.said));
                }
                false => stub.reason = Reason::Outscored,
            }
        }
        (self.told)(&self.stubs);
        winner.ok_or(Error::StreamFailed)
    }

    /// The numbers of those that are still there, the best first.
    fn ranked(&self) -> Vec<usize> {
        let mut stubs = racing(&self.stubs, &self.racers);
        stubs.sort_by(|a, b| better(a, b));
        stubs.into_iter().map(|stub| stub.index).collect()
    }

    /// Brings the records of those that are still there up to date.
    fn refresh(&mut self) {
        for racer in &self.racers {
            if let Some(stub) = self.stubs.get_mut(racer.index) {
                refresh(stub, &racer.lane.writer);
            }
        }
    }

    /// Gives each that is still there the score that it has now.
    fn judge(&mut self) -> Result<()> {
        self.refresh();
        if let Some(deviation) = &mut self.deviation {
            for racer in &self.racers {
                let Some(stub) = self.stubs.get_mut(racer.index) else { continue };
                stub.deviation = Some(deviation(stub)?).filter(|deviation| deviation.is_finite());
            }
        }
        let stubs = racing(&self.stubs, &self.racers);
        let scores = match &mut self.own_score {
            Some(own) => stubs.into_iter().map(own).collect::<Result<Vec<_>>>()?,
            None => self.how.score.of(&stubs),
        };
        for (racer, score) in self.racers.iter().zip(scores) {
            let Some(stub) = self.stubs.get_mut(racer.index) else { continue };
            if score.is_nan() {
                return Err(Error::parameter("score", "a number", score));
            }
            let tokens = stub.ids.len();
            stub.scores.retain(|(at, _)| *at != tokens);
            stub.scores.push((tokens, score));
        }
        Ok(())
    }
}

/// What a stub needs of its own, from what they have in common.
fn lane(stub: &Stub, decoder: Decoder, writer: &Writer, conversation: &Conversation) -> Lane {
    Lane { decoder, writer: writer.with_seed(stub.seed), conversation: conversation.bare_fork() }
}

/// Those that are still there, as they were when they were looked at last.
fn racing<'s>(stubs: &'s [Stub], racers: &[Racer]) -> Vec<&'s Stub> {
    racers.iter().filter_map(|racer| stubs.get(racer.index)).collect()
}

/// The better one first.
fn better(a: &Stub, b: &Stub) -> Ordering {
    let score = |stub: &Stub| stub.score().unwrap_or(f64::NEG_INFINITY);
    let by_score = score(b).total_cmp(&score(a));
    by_score.then(b.mean_logprob().total_cmp(&a.mean_logprob())).then(a.index.cmp(&b.index))
}

fn refresh(stub: &mut Stub, writer: &Writer) {
    let answer = &writer.answer;
    stub.ids.clone_from(&answer.ids);
    stub.text.clone_from(&answer.text);
    stub.logprobs.clone_from(&answer.logprobs);
    stub.stop = writer.stop;
    if let Some(confidence) = &writer.confidence {
        (stub.entropy, stub.certainty) = confidence.means();
    }
}

impl fmt::Debug for Race<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Race")
            .field("how", &self.how)
            .field("stubs", &self.stubs)
            .finish_non_exhaustive()
    }
}
