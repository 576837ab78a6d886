//! What the flashback suite teaches, in which order.

use hybrid_attention::Result;
use hybrid_attention::model::Batch;
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use crate::settings::Settings;
use crate::task::Exercise;
use flashback_suite::{Plan, Split, Story, Vocabulary};

/// How stories are told.
#[derive(Clone, Copy, PartialEq)]
pub(crate) enum Wording {
    /// Names alone, nothing else: the binding of neighbours is learned first.
    Terse,
    /// Terse or full, at random.
    Both,
    Full,
}

impl Wording {
    /// Draws whether a batch is told in names alone.
    pub(crate) fn is_terse(self, rng: &mut impl Rng) -> bool {
        match self {
            Self::Terse => true,
            Self::Both => rng.random(),
            Self::Full => false,
        }
    }
}

struct Lesson {
    longest: usize,
    wording: Wording,
    passes: usize,
    /// The share of the run by which it ends at the latest. That way even a control that never learns
    /// its first lessons is not examined on chains that it has never seen.
    ends: f64,
}

/// Longer and longer chains. A model that has not yet learned to look a name up learns nothing from
/// passes or from long sentences, so these come later.
const LESSONS: [Lesson; 10] = {
    const fn lesson(longest: usize, wording: Wording, passes: usize, ends: f64) -> Lesson {
        Lesson { longest, wording, passes, ends }
    }
    [
        lesson(1, Wording::Terse, 0, 0.25),
        lesson(2, Wording::Terse, 2, 0.45),
        lesson(3, Wording::Terse, 4, 0.48),
        lesson(3, Wording::Both, 4, 0.51),
        lesson(3, Wording::Full, 4, 0.54),
        lesson(4, Wording::Full, 4, 0.57),
        lesson(5, Wording::Full, 4, 0.60),
        lesson(6, Wording::Full, 4, 0.63),
        lesson(7, Wording::Full, 4, 0.66),
        lesson(8, Wording::Full, 4, 1.00),
    ]
};

/// The share of right answers that ends a lesson.
const LEARNED: f64 = 0.85;

/// Questions to each story. The answers of all but the last are left out of the text: an answer
/// might give away the next.
const QUESTIONS: usize = 8;

/// Where a run is in its lessons.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Lessons {
    now: usize,
    /// The running share of right answers in this lesson.
    right: f64,
}

impl Lessons {
    pub(crate) fn new() -> Self {
        Self { now: 0, right: 0.0 }
    }

    pub(crate) fn now(&self) -> usize {
        self.now
    }

    pub(crate) fn right(&self) -> f64 {
        self.right
    }

    /// Draws an exercise of the present lesson.
    pub(crate) fn draw(
        &self,
        settings: &Settings,
        vocabulary: &Vocabulary,
        rng: &mut ChaCha8Rng,
    ) -> Result<Exercise> {
        let Lesson { longest, wording, passes, .. } = &LESSONS[self.now];
        let passes = settings.draw_passes(*passes, rng);
        let terse = wording.is_terse(rng);
        let facts = rng.random_range(longest + 2..=2 * longest + 4);
        let plan = Plan { split: Split::Train, facts, longest: *longest, one_of: None };
        let (mut ids, mut answers, mut context) = (Vec::new(), Vec::new(), 0);
        for _ in 0..settings.batch {
            let story = Story::draw(&plan, rng);
            let told = if terse { story.terse_ids(vocabulary) } else { story.ids(vocabulary) };
            context = told.len();
            ids.extend(told);
            let mut answer = 0;
            for question in story.questions.iter().cycle().take(QUESTIONS) {
                let [before, name, after] = story.ask_ids(question, vocabulary);
                ids.extend([before, name]);
                ids.extend((!terse).then_some(after));
                answer = story.answer_id(question, vocabulary);
                answers.push((ids.len() as u32 - 1, answer));
            }
            ids.push(answer);
            answers.push((ids.len() as u32 - 1, vocabulary.end()));
        }
        let mut batch = Batch::dense(settings.batch, ids.len() / settings.batch)?;
        for sequence in 0..settings.batch {
            batch = batch.with_context(sequence, std::slice::from_ref(&(0..context)))?;
        }
        Ok(Exercise { ids, batch, answers, passes, end: Some(vocabulary.end()) })
    }

    /// Records the share of right answers in a batch, and moves on to the next lesson when this one is
    /// learned, or its time is up.
    pub(crate) fn mark(&mut self, most_passes: usize, passes: usize, right: f64, done: f64) {
        // Without passes little can be done about long chains: a lesson with passes counts only those
        // batches.
        if passes > 0 || most_passes.min(LESSONS[self.now].passes) == 0 {
            self.note(right);
        }
        self.move_on(&LESSONS.map(|lesson| lesson.ends), done);
    }

    pub(crate) fn note(&mut self, right: f64) {
        self.right += 0.03 * (right - self.right);
    }

    /// Takes the next of some lessons, each of which ends at a share of the run at the latest.
    pub(crate) fn move_on(&mut self, ends: &[f64], done: f64) {
        let last = self.now + 1 == ends.len();
        if !last && (self.right >= LEARNED || done >= ends[self.now]) {
            *self = Self { now: self.now + 1, right: 0.5 };
        }
    }
}
