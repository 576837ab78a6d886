//! The flashback suite as a task: lessons of longer and longer chains, and an examination on chains
//! longer than any of them.

use hybrid_attention::Thinking;
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

use crate::base::Base;
use crate::lessons::Lessons;
use crate::score::{Scores, score};
use crate::settings::Settings;
use flashback_suite::{LONGEST, Split, Vocabulary};

use crate::task::{Exercise, Task};
use crate::terminal::{self, Result};
use crate::tokenizer;
use crate::trainee::Trainee;

/// Passes that are examined.
const PASSES: [usize; 7] = [0, 1, 2, 3, 4, 6, 8];

/// The seed of the examination's stories, the same for all runs.
const EXAMINATION: u64 = 20_261_122;

pub(crate) struct Flashback {
    pub(crate) vocabulary: Vocabulary,
    /// Stories for each length of chain in the examination; 0 for no examination.
    pub(crate) stories: usize,
}

#[derive(Debug, Serialize)]
pub(crate) struct Examination {
    /// Names and wordings that no training story has.
    test: Scores,
    /// New stories like those of the training.
    train: Scores,
}

impl Task for Flashback {
    type Examination = Examination;

    const STEPS_PER_POINT: usize = 50;

    fn draw(&self, settings: &Settings, at: &Lessons, rng: &mut ChaCha8Rng) -> Result<Exercise> {
        Ok(at.draw(settings, &self.vocabulary, rng)?)
    }

    fn mark(&self, settings: &Settings, at: &mut Lessons, passes: usize, right: f64, done: f64) {
        at.mark(settings.most_passes(), passes, right, done);
    }

    fn status(&self, at: &Lessons, _: f32) -> String {
        format!("lesson {} right {:.0} %", at.now() + 1, at.right() * 100.0)
    }

    fn examine(&self, settings: &Settings, trainee: &Trainee) -> Result<Option<Examination>> {
        if self.stories == 0 {
            return Ok(None);
        }
        let model = trainee.model(&mut settings.rng(settings.steps))?;
        let passes: Vec<usize> = match settings.most_passes() {
            0 => vec![0],
            _ => PASSES.to_vec(),
        };
        let bar = terminal::bar(2 * LONGEST as u64, "examination [{bar:30}] {pos}/{len}");
        let thinking = |passes: usize| -> Thinking { settings.thinking(passes) };
        let examine = |split, stories| {
            let progress = || bar.inc(1);
            score(&model, thinking, split, stories, &passes, EXAMINATION, progress)
        };
        let examination = Examination {
            test: examine(Split::Test, self.stories)?,
            train: examine(Split::Train, self.stories.div_ceil(4))?,
        };
        bar.finish_and_clear();
        Ok(Some(examination))
    }
}

/// Whether a checkpoint can read stories: it must know every piece of them as one token.
pub(crate) fn check_base(base: &Base, vocabulary: &Vocabulary) -> Result<()> {
    let said = |message: &str| Err(format!("{}: {message}", base.path.display()).into());
    let same = vocabulary.pieces().len() == base.config.vocab_size
        && tokenizer::is_of(&base.tokenizer, vocabulary);
    if !same {
        return said("not the tokenizer of the suite; give --text to learn from a text");
    }
    match base.config.tie_word_embeddings {
        true => Ok(()),
        false => said("its head is not its embedding table, so that no new names can be drawn"),
    }
}
