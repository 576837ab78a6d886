//! Guessing ahead in one answer: drafts, the pass that verifies them, and what becomes of them.

use std::collections::VecDeque;

use super::answer::Speculated;
use super::conversation::Conversation;
use super::decoder::Decoder;
use super::guesser::{Cost, Guesser};
use super::lookup::PromptLookup;
use crate::error::{Error, Result};

/// Guesses of what an answer says next, and what the model says after them.
#[derive(Debug)]
pub(super) struct Ahead {
    guesser: Guesser,
    /// Guesses that have run, each with the logits after it. The first is of the next token.
    guesses: VecDeque<(u32, Vec<f32>)>,
}

impl Ahead {
    /// For the answer to `prompt`; `None` where a step of it is more than one token through the model.
    pub(super) fn new(how: &PromptLookup, decoder: &Decoder, prompt: &[u32]) -> Option<Self> {
        if !decoder.steps_plainly() {
            return None;
        }
        let cost = Cost::of_model(decoder.transformer());
        Some(Self { guesser: Guesser::new(how, cost, prompt), guesses: VecDeque::new() })
    }

    /// The logits after a token that was drawn, of which at most `left` more may come: they are there if it was guessed,
    /// and else it runs with the next guesses. `None` where nothing is worth guessing, or there is no memory for it: the
    /// token has yet to run then.
    pub(super) fn step(
        &mut self,
        id: u32,
        left: usize,
        decoder: &mut Decoder,
        conversation: &mut Conversation,
        speculated: &mut Option<Speculated>,
    ) -> Result<Option<Vec<f32>>> {
        self.guesser.push(id);
        let mut count = |drafted, accepted| {
            let so_far = speculated.get_or_insert_default();
            so_far.drafted += drafted;
            so_far.accepted += accepted;
        };
        match self.guesses.pop_front() {
            Some((guess, logits)) if guess == id => {
                decoder.cancelled_by().check()?;
                decoder.took(id, conversation);
                conversation.confirm();
                count(0, 1);
                return Ok(Some(logits));
            }
            _ => self.guesses.clear(),
        }
        conversation.drop_guesses()?;
        // The last token that may come need not run, and so need not be guessed.
        let draft = self.guesser.draft(left.min(conversation.room()).saturating_sub(1));
        if draft.is_empty() {
            return Ok(None);
        }
        let mut logits = match decoder.step_ahead(id, &draft, conversation) {
            Ok(logits) => logits.into_iter(),
            // The token alone may need no new block.
            Err(Error::PoolFull { .. }) => return Ok(None),
            Err(error) => return Err(error),
        };
        count(draft.len(), 0);
        let first = logits.next();
        self.guesses = draft.into_iter().zip(logits).collect();
        Ok(first)
    }
}
