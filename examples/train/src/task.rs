//! What is taught: where the texts of a step come from, and what is asked at the end.

use candle_core::{D, Tensor};
use candle_nn::loss::cross_entropy;
use hybrid_attention::model::Batch;
use hybrid_attention::thought::ThoughtModel;
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

use crate::lessons::Lessons;
use crate::score::read_by;
use crate::settings::Settings;
use crate::terminal::Result;
use crate::trainee::Trainee;

/// Something to learn.
pub(crate) trait Task {
    /// What a record holds of the examination.
    type Examination: Serialize;

    /// Steps per point of the curve.
    const STEPS_PER_POINT: usize;

    /// Draws the texts of one step.
    fn draw(&self, settings: &Settings, at: &Lessons, rng: &mut ChaCha8Rng) -> Result<Exercise>;

    /// How badly an exercise was done, in nats, and the share that is right: by default of its answers.
    fn loss(
        &self,
        model: &ThoughtModel,
        settings: &Settings,
        exercise: &Exercise,
    ) -> Result<(Tensor, f64)> {
        let how = (settings.arm, exercise.passes);
        let hidden = read_by(model, settings, how, &exercise.ids, exercise.batch.clone())?;
        let (at, answers): (Vec<u32>, Vec<u32>) = exercise.answers.iter().copied().unzip();
        let at = Tensor::new(at, hidden.device())?;
        let hidden = hidden.index_select(&at, 0)?; // (answers, hidden)
        let logits = model.decoder().logits(&hidden)?; // (answers, vocab)
        let said: Vec<u32> = logits.argmax(D::Minus1)?.to_vec1()?;
        let asked = exercise.asked(&said);
        let loss = cross_entropy(&logits, &Tensor::new(answers, hidden.device())?)?;
        Ok((loss, asked))
    }

    /// Records how a step went: its number of passes, the share of right answers, and the share of the
    /// run that is done. By default there is only one lesson.
    fn mark(&self, _: &Settings, _: &mut Lessons, _passes: usize, _right: f64, _done: f64) {}

    /// A few words beside the progress bar.
    fn status(&self, at: &Lessons, loss: f32) -> String;

    /// Examines what was trained, if requested.
    fn examine(&self, settings: &Settings, trainee: &Trainee) -> Result<Option<Self::Examination>>;
}

/// Sequences of one length, and what should be predicted in them.
pub(crate) struct Exercise {
    pub(crate) ids: Vec<u32>,
    pub(crate) batch: Batch,
    /// Where something should be predicted, as a row among all, and what.
    pub(crate) answers: Vec<(u32, u32)>,
    /// Passes to think about it with.
    pub(crate) passes: usize,
    /// The token that ends an answer.
    pub(crate) end: Option<u32>,
}

impl Exercise {
    /// The share of questions to which the right answer was `said`, one token for each of
    /// [`Exercise::answers`]. The token that ends an answer is not counted.
    pub(crate) fn asked(&self, said: &[u32]) -> f64 {
        let questions =
            self.answers.iter().zip(said).filter(|((_, answer), _)| Some(*answer) != self.end);
        let right: Vec<bool> = questions.map(|((_, answer), said)| answer == said).collect();
        right.iter().filter(|&&right| right).count() as f64 / right.len().max(1) as f64
    }
}
