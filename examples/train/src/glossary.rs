//! The glossary suite as a task: to look facts up, then by invented words, then by what definitions say of these.

use candle_core::{D, Tensor};
use flashback_suite::{Called, Glossary, Split, TALE_FACTS, Tale, Vocabulary};
use hybrid_attention::Thinking;
use hybrid_attention::evaluate::Estimate;
use hybrid_attention::model::Batch;
use hybrid_attention::thought::ThoughtModel;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

use crate::lessons::Lessons;
use crate::score::read;
use crate::settings::Settings;
use crate::task::{Exercise, Task};
use crate::terminal::{self, Result};
use crate::trainee::Trainee;

/// How tales are told and asked about.
#[derive(Clone, Copy)]
struct Telling {
    told: Called,
    asked: Called,
    /// The most definitions before them; as many as there are facts at least, or none.
    definitions: usize,
}

const BY_NAMES: Telling = Telling { told: Called::Names, asked: Called::Names, definitions: 0 };

const BY_WORDS: Telling = Telling { told: Called::Words, asked: Called::Words, definitions: 0 };

const fn defined(definitions: usize) -> Telling {
    Telling { told: Called::Words, asked: Called::Names, definitions }
}

/// What is told in each lesson, as often as it stands here, and the share of the run by which it ends at the latest.
const LESSONS: [(&[Telling], f64); 4] = [
    (&[BY_NAMES], 0.2),
    (&[BY_NAMES, BY_WORDS], 0.3),
    (&[BY_NAMES, BY_WORDS, defined(TALE_FACTS), defined(TALE_FACTS)], 0.6),
    (&[BY_NAMES, BY_WORDS, defined(2 * TALE_FACTS), defined(2 * TALE_FACTS)], 1.0),
];

/// Words of the glossary of the examination.
const WORDS: usize = 10;

/// The seed of the examination, the same for all runs.
const EXAMINATION: u64 = 20_261_128;

/// Teaches a model the suite.
pub(crate) struct OfGlossary {
    pub(crate) vocabulary: Vocabulary,
    /// Tales of the examination; 0 for none.
    pub(crate) tales: usize,
}

/// The shares of right answers over tales with words of the test split; a guess among the facts is right in a sixth.
#[derive(Debug, Serialize)]
pub(crate) struct Examination {
    tales: usize,
    /// Told and asked by names.
    names: Estimate,
    /// Told in words that nothing explains, and asked by names.
    nothing: Estimate,
    /// The same after the definitions of these words.
    defined: Estimate,
    /// The same after all of a glossary of ten.
    all_defined: Estimate,
}

impl Task for OfGlossary {
    type Examination = Examination;

    const STEPS_PER_POINT: usize = 50;

    fn draw(&self, settings: &Settings, at: &Lessons, rng: &mut ChaCha8Rng) -> Result<Exercise> {
        let (tellings, _) = LESSONS[at.now()];
        let telling = tellings[rng.random_range(0..tellings.len())];
        let definitions = match telling.definitions {
            0 => 0,
            most => rng.random_range(TALE_FACTS..=most),
        };
        let (mut ids, mut answers) = (Vec::new(), Vec::new());
        for _ in 0..settings.batch {
            // What a word meant in one tale says nothing of the next.
            let glossary = Glossary::draw(Split::Train, definitions.max(WORDS), rng);
            let tale = Tale::draw(&glossary, rng);
            ids.extend(self.told(&tale, &glossary, telling.told, definitions, rng));
            let mut facts: Vec<usize> = (0..TALE_FACTS).collect();
            facts.shuffle(rng);
            for fact in facts {
                ids.extend(tale.ask_ids(fact, telling.asked, &self.vocabulary));
                answers.push((ids.len() as u32 - 1, tale.answer_id(fact, &self.vocabulary)));
            }
        }
        let batch = Batch::dense(settings.batch, ids.len() / settings.batch)?;
        Ok(Exercise { ids, batch, answers, passes: 0, end: None })
    }

    fn mark(&self, _: &Settings, at: &mut Lessons, _: usize, right: f64, done: f64) {
        at.note(right);
        at.move_on(&LESSONS.map(|(_, ends)| ends), done);
    }

    fn status(&self, at: &Lessons, _: f32) -> String {
        format!("lesson {} right {:.0} %", at.now() + 1, at.right() * 100.0)
    }

    fn examine(&self, settings: &Settings, trainee: &Trainee) -> Result<Option<Examination>> {
        if self.tales == 0 {
            return Ok(None);
        }
        let model = trainee.model(&mut settings.rng(settings.steps))?;
        let bar = terminal::bar(4, "examination [{bar:30}] {pos}/{len}");
        let share = |told, definitions| -> Result<Estimate> {
            let right = self.right(&model, told, definitions)?;
            bar.inc(1);
            Ok(Estimate::of(&right))
        };
        let examination = Examination {
            tales: self.tales,
            names: share(Called::Names, 0)?,
            nothing: share(Called::Words, 0)?,
            defined: share(Called::Words, TALE_FACTS)?,
            all_defined: share(Called::Words, WORDS)?,
        };
        bar.finish_and_clear();
        Ok(Some(examination))
    }
}

impl OfGlossary {
    /// A tale after so many definitions, those of its words among them; or after none.
    fn told(
        &self,
        tale: &Tale,
        glossary: &Glossary,
        called: Called,
        definitions: usize,
        rng: &mut impl Rng,
    ) -> Vec<u32> {
        let definitions = match definitions {
            0 => Vec::new(),
            count => tale.definitions(glossary, count, rng),
        };
        tale.ids(called, &definitions, &self.vocabulary)
    }

    /// For each tale of the examination, whether what it is asked by name is answered right.
    fn right(&self, model: &ThoughtModel, told: Called, definitions: usize) -> Result<Vec<f64>> {
        let mut rng = ChaCha8Rng::seed_from_u64(EXAMINATION);
        let glossary = Glossary::draw(Split::Test, WORDS, &mut rng);
        let mut tales: Vec<(Tale, usize)> = Vec::with_capacity(self.tales);
        tales.resize_with(self.tales, || {
            (Tale::draw(&glossary, &mut rng), rng.random_range(0..TALE_FACTS))
        });
        let mut right = Vec::with_capacity(self.tales);
        for some in tales.chunks(50) {
            let mut ids = Vec::new();
            for (tale, fact) in some {
                ids.extend(self.told(tale, &glossary, told, definitions, &mut rng));
                ids.extend(tale.ask_ids(*fact, Called::Names, &self.vocabulary));
            }
            let batch = Batch::dense(some.len(), ids.len() / some.len())?;
            let last: Vec<u32> = batch.all_rows().map(|rows| rows.end as u32 - 1).collect();
            let hidden = read(model, &Thinking::none(), &ids, batch)?; // (tokens, hidden)
            let last = hidden.index_select(&Tensor::new(last, hidden.device())?, 0)?;
            let said: Vec<u32> = model.decoder().logits(&last)?.argmax(D::Minus1)?.to_vec1()?;
            let answers = some.iter().map(|(tale, fact)| tale.answer_id(*fact, &self.vocabulary));
            right.extend(said.iter().zip(answers).map(|(said, answer)| f64::from(*said == answer)));
        }
        Ok(right)
    }
}
