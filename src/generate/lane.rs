//! An answer in progress that can step beside others.

use std::time::Instant;

use candle_core::DType;

use super::answer::Token;
use super::conversation::Conversation;
use super::decoder::{Decoder, seconds_since};
use super::writer::Writer;
use crate::cancel::Cancel;
use crate::error::Result;
use crate::model::{Batch, ForwardContext, Pass, Sight, Transformer};

/// What an answer needs of its own to go on.
#[derive(Debug)]
pub(super) struct Lane {
    pub(super) decoder: Decoder,
    pub(super) writer: Writer,
    pub(super) conversation: Conversation,
}

impl Lane {
    /// The most lanes of one pass: up to this many rows, products are computed as they are for one row.
    pub(super) const MOST: usize = 16;

    /// Draws the next token from the logits before it.
    pub(super) fn write(&mut self, logits: &[f32]) -> Result<Token> {
        self.writer.write(logits, self.conversation.has_room())
    }

    /// The logits after the last token of each, in one pass. All of them step plainly.
    pub(super) fn step_together(
        transformer: &Transformer,
        lanes: &mut [&mut Self],
        cancel: &Cancel,
    ) -> Result<Vec<Vec<f32>>> {
        let ids: Vec<u32> = lanes.iter().filter_map(|lane| lane.writer.last()).collect();
        if ids.is_empty() {
            return Ok(Vec::new());
        }
        let start = Instant::now();
        let xs = transformer.embed_ids(&ids)?; // (lanes, hidden)
        let mut batch = Batch::dense(ids.len(), 1)?;
        if transformer.has_side_source() {
            batch = batch.with_ids(&ids)?;
            for (sequence, lane) in lanes.iter().enumerate() {
                batch = batch.following(sequence, &lane.decoder.ran())?;
            }
        }
        let caches = lanes.iter_mut().map(|lane| &mut lane.conversation.cache).collect();
        let pass = Pass::Remembered { batch: &batch, sight: Sight::Causal, caches };
        let context = ForwardContext::from(pass).cancel(cancel);
        let h = transformer.forward(&xs, transformer.all_layers(), context)?;
        let logits = transformer.logits(&h)?.to_dtype(DType::F32)?.to_vec2()?; // (lanes, vocab)
        let seconds = seconds_since(start);
        for (lane, id) in lanes.iter_mut().zip(ids) {
            lane.decoder.took(id, &mut lane.conversation);
            lane.writer.answer.seconds.decode += seconds;
        }
        Ok(logits)
    }
}
