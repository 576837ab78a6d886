//! Many answers side by side: each token of all of them in one pass.

use std::collections::VecDeque;
use std::fmt;
use std::sync::Arc;
use std::time::Instant;

use candle_core::DType;
use rayon::prelude::*;

use super::answer::Answer;
use super::config::GenerationConfig;
use super::conversation::Conversation;
use super::decoder::{Decoder, seconds_since};
use super::prompt::Prompt;
use super::source::Source;
use super::writer::Writer;
use crate::cancel::Cancel;
use crate::error::{Error, Result};
use crate::model::{Batch, ForwardContext, Pass, Sight};

/// Answers to several prompts, each as soon as it ends: an iterator over the index of the prompt, from 0
/// on, and its answer.
///
/// Each prompt is thought about and read by itself; then the next tokens of up to
/// [`side_by_side`](Self::side_by_side) answers run in one pass. Every answer is the one that
/// [`HybridModel::generate`](crate::HybridModel::generate) gives for its prompt alone, to the last bit:
/// its numbers do not depend on what runs beside it. An error in one prompt affects no other.
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
    lanes: Vec<Lane>,
    /// Answers that have ended and were not returned yet.
    ended: VecDeque<(usize, Result<Answer>)>,
    side_by_side: usize,
    /// Lanes that memory has room for, as far as is known.
    room: usize,
    cancel: Cancel,
}

/// One answer in progress.
struct Lane {
    index: usize,
    prompt: Prompt,
    decoder: Decoder,
    writer: Writer,
    conversation: Conversation,
}

impl Answers {
    /// The most answers that run side by side: up to this many rows, products are computed as they are
    /// for one row.
    pub const MOST: usize = 16;

    pub(crate) fn new(
        source: &Arc<Source>,
        prompts: impl IntoIterator<Item = impl Into<Prompt>>,
        config: &GenerationConfig,
    ) -> Result<Self> {
        config.validate()?;
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
                Ok(lane) => self.keep_or_end(lane),
                Err(Error::PoolFull { .. }) if !self.lanes.is_empty() => {
                    self.waiting.push_front((index, prompt));
                    self.room = self.lanes.len();
                }
                Err(error) => self.ended.push_back((index, Err(error))),
            }
        }
    }

    /// Reads a prompt and writes its first token.
    fn begin(&self, index: usize, prompt: &Prompt) -> Result<Lane> {
        let (source, config) = (&self.source, &self.config);
        let transformer = source.model.decoder();
        let encoded = source.encode(prompt)?;
        let total = encoded.ids.len();
        transformer.check_context(total)?;
        let mut writer = Writer::new(source, config, &encoded.ids)?;
        let context = transformer.config().max_position_embeddings;
        let capacity = total.saturating_add(config.max_tokens).min(context).max(total);
        let mut conversation = Conversation::new(&source.pool, capacity)?;
        let mut decoder = Decoder::new(source.mind(config, &encoded)?, encoded);
        decoder.cancel(self.cancel.clone());
        let read = decoder.read(config.prompt_logprobs, &mut conversation, &mut |_| ())?;
        let logits = writer.begin(read);
        if writer.stop.is_none() {
            writer.write(&logits, conversation.has_room())?;
        }
        Ok(Lane { index, prompt: prompt.clone(), decoder, writer, conversation })
    }

    /// Runs the last token of every answer in progress, and writes the next one of each.
    fn step(&mut self) {
        let lanes = std::mem::take(&mut self.lanes);
        let (mut together, alone): (Vec<Lane>, Vec<Lane>) =
            lanes.into_iter().partition(|lane| lane.decoder.steps_plainly());
        let mut alone = VecDeque::from(alone);
        match self.step_together(&mut together) {
            Ok(logits) => {
                // Drawing from a large vocabulary takes a while: on all cores.
                let lanes = together.into_par_iter().zip(logits);
                let written: Vec<_> = lanes.map(|(lane, logits)| lane.write(&logits)).collect();
                written.into_iter().for_each(|(lane, written)| self.take_back(lane, written));
            }
            Err(error @ Error::PoolFull { .. }) => self.give_way(together, alone.len(), error),
            // Stepping each by itself shows which one failed: the failed pass left no trace.
            Err(_) => alone.extend(together),
        }
        while let Some(mut lane) = alone.pop_front() {
            match lane.step_alone() {
                Err(error @ Error::PoolFull { .. }) => {
                    self.give_way(vec![lane], alone.len(), error);
                }
                Err(error) => self.end(lane.index, Err(error)),
                Ok(logits) => {
                    let (lane, written) = lane.write(&logits);
                    self.take_back(lane, written);
                }
            }
        }
        self.lanes.sort_by_key(|lane| lane.index);
    }

    /// The logits after the last token of each, in one pass.
    fn step_together(&self, lanes: &mut [Lane]) -> Result<Vec<Vec<f32>>> {
        let ids: Vec<u32> = lanes.iter().filter_map(|lane| lane.writer.last()).collect();
        if ids.is_empty() {
            return Ok(Vec::new());
        }
        let (start, transformer) = (Instant::now(), self.source.model.decoder());
        let xs = transformer.embed_ids(&ids)?; // (lanes, hidden)
        let batch = Batch::dense(ids.len(), 1)?;
        let caches = lanes.iter_mut().map(|lane| &mut lane.conversation.cache).collect();
        let pass = Pass::Remembered { batch: &batch, sight: Sight::Causal, caches };
        let context = ForwardContext::from(pass).cancel(&self.cancel);
        let h = transformer.forward(&xs, transformer.all_layers(), context)?;
        let logits = transformer.logits(&h)?.to_dtype(DType::F32)?.to_vec2()?; // (lanes, vocab)
        let seconds = seconds_since(start);
        for (lane, id) in lanes.iter_mut().zip(ids) {
            lane.decoder.took(id, &mut lane.conversation);
            lane.writer.answer.seconds.decode += seconds;
        }
        Ok(logits)
    }

    fn take_back(&mut self, lane: Lane, written: Result<()>) {
        match written {
            Ok(()) => self.keep_or_end(lane),
            Err(error) => self.end(lane.index, Err(error)),
        }
    }

    fn keep_or_end(&mut self, lane: Lane) {
        match lane.writer.stop {
            None => self.lanes.push(lane),
            Some(_) => self.end(lane.index, lane.writer.finish()),
        }
    }

    fn end(&mut self, index: usize, answer: Result<Answer>) {
        self.room = usize::MAX; // the memory it held is free again
        self.ended.push_back((index, answer));
    }

    /// Handles lanes whose step got no memory, while `others` have yet to step.
    fn give_way(&mut self, mut lanes: Vec<Lane>, others: usize, error: Error) {
        let under_way = self.lanes.len() + lanes.len() + others;
        if let Some(Lane { index, prompt, .. }) = lanes.pop() {
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

impl Lane {
    fn write(mut self, logits: &[f32]) -> (Self, Result<()>) {
        let written = self.writer.write(logits, self.conversation.has_room()).map(|_token| ());
        (self, written)
    }

    fn step_alone(&mut self) -> Result<Vec<f32>> {
        let Some(id) = self.writer.last() else { return Err(Error::StreamFailed) };
        let start = Instant::now();
        let answer = &mut self.writer.answer;
        let thought = answer.seconds.think;
        let logits =
            self.decoder.step(id, &mut self.conversation, &mut answer.traces, &mut answer.seconds);
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
