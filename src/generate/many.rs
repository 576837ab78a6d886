//! Many answers side by side: each token of all of them in one pass.

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use rayon::prelude::*;

use super::answer::Answer;
use super::config::GenerationConfig;
use super::conversation::Conversation;
use super::decoder::{Decoder, seconds_since};
use super::lane::Lane;
use super::prompt::Prompt;
use super::source::Source;
use super::writer::Writer;
use crate::cancel::Cancel;
use crate::error::{Error, Result};

/// Answers to several prompts, each as soon as it ends: an iterator over the index of the prompt, from 0
/// on, and its answer.
///
/// Each prompt is thought about and read by itself; then the next tokens of up to
/// [`side_by_side`](Self::side_by_side) answers run in one pass. Every answer is the one that
/// [`HybridModel::generate`](crate::HybridModel::generate) gives for its prompt alone, to the last bit:
/// its numbers do not depend on what runs beside it. An error in one prompt affects no other. Nothing is
/// [guessed ahead](GenerationConfig::speculate): the rows of a pass are those of other answers.
///
/// When the memory that caches may take in total is used up, the answer begun last is dropped, and
/// started over when another has ended.
///
/// ```
/// # use candle_core::Device;
/// use hybrid_attention::{GenerationConfig, HybridModel};
///
/// # fn main() -> hybrid_attention::Result<()> {
/// let model = HybridModel::tiny(&Device::Cpu)?;
/// let config = GenerationConfig::default().max_tokens(4);
/// let prompts = ["The coin is in the jar.", "Leo gave everything to Ida."];
/// for (index, answer) in model.generate_many(prompts, &config)? {
///     let prompt = *prompts.get(index).unwrap_or(&"");
///     assert_eq!(answer?.ids, model.generate(prompt, &config)?.ids);
/// }
/// # Ok(())
/// # }
/// ```
pub struct Answers {
    source: Arc<Source>,
    config: GenerationConfig,
    waiting: VecDeque<(usize, Prompt)>,
    /// Answers in progress, in the order in which they were begun.
    lanes: Vec<Begun>,
    /// Answers that have ended and were not returned yet.
    ended: VecDeque<(usize, Result<Answer>)>,
    side_by_side: usize,
    /// Lanes that memory has room for, as far as is known.
    room: usize,
    cancel: Cancel,
}

/// One answer in progress, and what to begin it anew with.
struct Begun {
    index: usize,
    prompt: Prompt,
    lane: Lane,
}

impl Answers {
    /// The most answers that run side by side: up to this many rows, products are computed as they are
    /// for one row.
    pub const MOST: usize = Lane::MOST;

    pub(crate) fn new(
        source: &Arc<Source>,
        prompts: impl IntoIterator<Item = impl Into<Prompt>>,
        config: &GenerationConfig,
    ) -> Result<Self> {
        config.validate()?;
        if config.candidates.is_some() {
            let expected =
                "none for many prompts: each has an answer of its own by `generate` or `stream`";
            return Err(Error::parameter("candidates", expected, "some"));
        }
        source.thinking(config).on(&source.model)?;
        Ok(Self {
            source: Arc::clone(source),
            config: config.clone(),
            waiting: prompts.into_iter().map(Into::into).enumerate().collect(),
            lanes: Vec::new(),
            ended: VecDeque::new(),
            side_by_side: 8,
            room: usize::MAX,
            cancel: Cancel::default(),
        })
    }

    /// Runs up to this many answers in one pass, at least 1 and at most [`MOST`](Self::MOST); values
    /// outside are clamped. Default 8.
    #[must_use]
    pub fn side_by_side(mut self, answers: usize) -> Self {
        self.side_by_side = answers.clamp(1, Self::MOST);
        self
    }

    /// The same answers, all of which end with [`Error::Cancelled`] when this is cancelled.
    #[must_use]
    pub fn cancel(mut self, cancel: Cancel) -> Self {
        self.cancel = cancel;
        self
    }

    /// Answers not yet returned.
    #[must_use]
    pub fn left(&self) -> usize {
        self.waiting.len() + self.lanes.len() + self.ended.len()
    }

    /// Begins answers until as many as allowed run side by side.
    fn fill(&mut self) {
        while self.lanes.len() < self.side_by_side.min(self.room) {
            let Some((index, prompt)) = self.waiting.pop_front() else { break };
            match self.begin(index, &prompt) {
                Ok(begun) => self.keep_or_end(begun),
                Err(Error::PoolFull { .. }) if !self.lanes.is_empty() => {
                    self.waiting.push_front((index, prompt));
                    self.room = self.lanes.len();
                }
                Err(error) => self.ended.push_back((index, Err(error))),
            }
        }
    }

    /// Reads a prompt and writes its first token.
    fn begin(&self, index: usize, prompt: &Prompt) -> Result<Begun> {
        let (source, config) = (&self.source, &self.config);
        let transformer = source.model.decoder();
        let encoded = source.encode(prompt)?;
        let total = encoded.ids.len();
        transformer.check_context(total)?;
        let writer = Writer::new(source, config, &encoded.ids)?;
        let context = transformer.config().max_position_embeddings;
        let capacity = total.saturating_add(config.max_tokens).min(context).max(total);
        let conversation = Conversation::new(&source.pool, capacity)?;
        let decoder = Decoder::new(source.mind(config, &encoded)?, encoded);
        let mut lane = Lane { decoder, writer, conversation };
        lane.decoder.cancel(self.cancel.clone());
        let Lane { decoder, writer, conversation } = &mut lane;
        let read = decoder.read(config.prompt_logprobs, conversation, &mut |_| ())?;
        let logits = writer.begin(read);
        if lane.writer.stop.is_none() {
            lane.write(&logits)?;
        }
        Ok(Begun { index, prompt: prompt.clone(), lane })
    }

    /// Runs the last token of every answer in progress, and writes the next one of each.
    fn step(&mut self) {
        let lanes = std::mem::take(&mut self.lanes);
        let (mut together, alone): (Vec<Begun>, Vec<Begun>) =
            lanes.into_iter().partition(|begun| begun.lane.decoder.steps_plainly());
        let mut alone = VecDeque::from(alone);
        let mut lanes: Vec<&mut Lane> = together.iter_mut().map(|begun| &mut begun.lane).collect();
        match Lane::step_together(self.source.model.decoder(), &mut lanes, &self.cancel) {
            Ok(logits) => {
                // Drawing from a large vocabulary takes a while: on all cores.
                let begun = together.into_par_iter().zip(logits);
                let written: Vec<_> = begun.map(|(begun, logits)| begun.write(&logits)).collect();
                written.into_iter().for_each(|(begun, written)| self.take_back(begun, written));
            }
            Err(error @ Error::PoolFull { .. }) => self.give_way(together, alone.len(), error),
            // Stepping each by itself shows which one failed: the failed pass left no trace.
            Err(_) => alone.extend(together),
        }
        while let Some(mut begun) = alone.pop_front() {
            match begun.step_alone() {
                Err(error @ Error::PoolFull { .. }) => {
                    self.give_way(vec![begun], alone.len(), error);
                }
                Err(error) => self.end(begun.index, Err(error)),
                Ok(logits) => {
                    let (begun, written) = begun.write(&logits);
                    self.take_back(begun, written);
                }
            }
        }
        self.lanes.sort_by_key(|begun| begun.index);
    }

    fn take_back(&mut self, begun: Begun, written: Result<()>) {
        match written {
            Ok(()) => self.keep_or_end(begun),
            Err(error) => self.end(begun.index, Err(error)),
        }
    }

    fn keep_or_end(&mut self, begun: Begun) {
        match begun.lane.writer.stop {
            None => self.lanes.push(begun),
            Some(_) => self.end(begun.index, begun.lane.writer.finish()),
        }
    }

    fn end(&mut self, index: usize, answer: Result<Answer>) {
        self.room = usize::MAX; // the memory it held is free again
        self.ended.push_back((index, answer));
    }

    /// Handles answers whose step got no memory, while `others` have yet to step.
    fn give_way(&mut self, mut lanes: Vec<Begun>, others: usize, error: Error) {
        let under_way = self.lanes.len() + lanes.len() + others;
        if let Some(Begun { index, prompt, .. }) = lanes.pop() {
            match under_way {
                1 => self.end(index, Err(error)),
                _ => {
                    self.waiting.push_front((index, prompt));
                    self.room = under_way - 1;
                }
            }
        }
        self.lanes.append(&mut lanes);
    }
}

impl Begun {
    fn write(mut self, logits: &[f32]) -> (Self, Result<()>) {
        let written = self.lane.write(logits).map(|_token| ());
        (self, written)
    }

    fn step_alone(&mut self) -> Result<Vec<f32>> {
        let Lane { decoder, writer, conversation } = &mut self.lane;
        let Some(id) = writer.last() else { return Err(Error::StreamFailed) };
        let start = Instant::now();
        let answer = &mut writer.answer;
        let thought = answer.seconds.think;
        let logits = decoder.step(id, conversation, &mut answer.traces, &mut answer.seconds);
        let seconds = &mut answer.seconds;
        seconds.decode += seconds_since(start) - (seconds.think - thought);
        logits
    }
}

impl Iterator for Answers {
    type Item = (usize, Result<Answer>);

    fn next(&mut self) -> Option<Self::Item> {
        loop {
            if let Some(ended) = self.ended.pop_front() {
                return Some(ended);
            }
            self.fill();
            if self.lanes.is_empty() && self.ended.is_empty() {
                return None;
            }
            if self.ended.is_empty() {
                self.step();
            }
        }
    }
}

impl fmt::Debug for Answers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Answers")
            .field("config", &self.config)
            .field("waiting", &self.waiting.len())
            .field("under_way", &self.lanes.len())
            .field("side_by_side", &self.side_by_side)
            .finish_non_exhaustive()
    }
}
