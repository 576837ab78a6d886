//! The glossary suite as a task: to look facts up, then by invented words, then by what definitions say of these.

use std::ops::Range;

use candle_core::{D, Tensor};
use candle_nn::ops::log_softmax;
use flashback_suite::{Called, Glossary, Split, TALE_FACTS, Tale, Vocabulary};
use hybrid_attention::dictionary::{Dictionary, Entries};
use hybrid_attention::evaluate::Estimate;
use hybrid_attention::model::Batch;
use hybrid_attention::thought::ThoughtModel;
use hybrid_attention::{HybridModel, Thinking};
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

use crate::base::Base;
use crate::entries;
use crate::flashback::check_base;
use crate::lessons::{Lessons, Wording};
use crate::score::read;
use crate::settings::{Arm, Sees, Settings};
use crate::task::{Exercise, Task};
use crate::terminal::{self, Result};
use crate::trainee::Trainee;

/// How tales are told and asked about.
#[derive(Clone, Copy)]
struct Telling {
    told: Called,
    asked: Called,
    definitions: Definitions,
}

/// What stands before a tale.
#[derive(Clone, Copy)]
enum Definitions {
    None,
    /// Those of its words.
    Own,
    /// Up to as many others among them.
    Among,
}

const BY_NAMES: Telling =
    Telling { told: Called::Names, asked: Called::Names, definitions: Definitions::None };

const BY_WORDS: Telling =
    Telling { told: Called::Words, asked: Called::Words, definitions: Definitions::None };

/// Told by names, asked about by words: a definition is looked up where the question is read.
const fn asked(definitions: Definitions) -> Telling {
    Telling { told: Called::Names, asked: Called::Words, definitions }
}

/// Told by words, asked about by names: facts are read with their definitions, or these looked up the other way.
const fn told(definitions: Definitions) -> Telling {
    Telling { told: Called::Words, asked: Called::Names, definitions }
}

struct Lesson {
    /// As often as each stands here.
    tellings: &'static [Telling],
    /// The most facts; two at least.
    facts: usize,
    wording: Wording,
    /// The share of the run by which it ends at the latest.
    ends: f64,
}

/// What is taught, one after the other. Two steps of reasoning are first found where there is little to choose from.
const LESSONS: [Lesson; 10] = {
    use Definitions::{Among, Own};
    const fn lesson(
        tellings: &'static [Telling],
        facts: usize,
        wording: Wording,
        ends: f64,
    ) -> Lesson {
        Lesson { tellings, facts, wording, ends }
    }
    const ASKED: &[Telling] = &[BY_NAMES, asked(Own), asked(Own), asked(Own)];
    const DEFINED: &[Telling] = &[BY_NAMES, asked(Own), told(Own), told(Own)];
    const AMONG: &[Telling] = &[BY_NAMES, asked(Among), told(Among), told(Among)];
    [
        lesson(&[BY_NAMES], TALE_FACTS, Wording::Terse, 0.15),
        lesson(&[BY_NAMES, BY_WORDS], TALE_FACTS, Wording::Terse, 0.2),
        lesson(ASKED, 2, Wording::Terse, 0.35),
        lesson(ASKED, 4, Wording::Terse, 0.45),
        lesson(ASKED, TALE_FACTS, Wording::Terse, 0.5),
        lesson(DEFINED, 3, Wording::Terse, 0.65),
        lesson(DEFINED, TALE_FACTS, Wording::Terse, 0.7),
        lesson(DEFINED, TALE_FACTS, Wording::Both, 0.75),
        lesson(DEFINED, TALE_FACTS, Wording::Full, 0.8),
        lesson(AMONG, TALE_FACTS, Wording::Full, 1.0),
    ]
};

/// What is read with a dictionary, or without one by a control that has as much to learn.
const BESIDE: Lesson = Lesson {
    tellings: &[BY_NAMES, asked(Definitions::None), told(Definitions::None)],
    facts: TALE_FACTS,
    wording: Wording::Full,
    ends: 1.0,
};

/// Words of a dictionary to learn with.
const LEARNED: usize = 10_000;

/// Words of the glossary of the examination.
const WORDS: usize = 10;

/// Tokens that are read side by side in an examination.
const MOST_TOKENS: usize = 4096;

/// The seed of the examination, the same for all runs.
const EXAMINATION: u64 = 20_261_128;

/// Teaches a model the suite.
pub(crate) struct OfGlossary {
    vocabulary: Vocabulary,
    /// Tales of the examination; 0 for none.
    tales: usize,
    /// The entries that are the same in all tales, where what reads them is learned.
    beside: Option<Glossary>,
}

/// The shares of right answers; a guess among the facts is right in a sixth.
#[derive(Debug, Serialize)]
pub(crate) struct Examination {
    tales: usize,
    /// Told and asked by names.
    names: Estimate,
    /// Told in words that nothing in the prompt explains, and asked by names: of the test split, or where these are
    /// learned of the dictionary.
    undefined: Estimate,
    /// The same words after their definitions.
    defined: Estimate,
    /// The same after the definitions of four others, too.
    among: Estimate,
    /// Told in names and asked by a word, after the definitions of the tale's words; where a dictionary is learned, without.
    asked: Estimate,
}

/// How an entry is read.
pub(crate) const TEMPLATE: &str = "Here {headword} means {definition}";

/// The dictionary of a glossary: each entry is read as a definition at the beginning of a tale.
pub(crate) fn compile(
    model: &HybridModel,
    glossary: &Glossary,
    layers: Range<usize>,
    sees: Sees,
) -> Result<Dictionary> {
    let entries = glossary.entries.iter().map(|it| (it.word.to_string(), it.meaning));
    let config = entries::config(layers, sees).template(TEMPLATE);
    Ok(Dictionary::compile(model, &Entries::new(entries)?, &config)?)
}

impl Task for OfGlossary {
    type Examination = Examination;

    const STEPS_PER_POINT: usize = 50;

    fn draw(&self, settings: &Settings, at: &Lessons, rng: &mut ChaCha8Rng) -> Result<Exercise> {
        let Lesson { tellings, facts: most, wording, .. } = match self.beside {
            Some(_) => &BESIDE,
            None => &LESSONS[at.now()],
        };
        let telling = tellings[rng.random_range(0..tellings.len())];
        let terse = wording.is_terse(rng);
        let facts = match self.beside {
            Some(_) => *most,
            None => rng.random_range(2..=*most),
        };
        let definitions = match telling.definitions {
            Definitions::None => 0,
            Definitions::Own => facts,
            Definitions::Among => rng.random_range(facts..=2 * facts),
        };
        let (mut ids, mut answers) = (Vec::new(), Vec::new());
        // As many questions in each step, and so about as many tokens.
        let stories = settings.batch * TALE_FACTS / facts;
        for _ in 0..stories {
            // What a word meant in one tale says nothing of the next.
            let own = match self.beside {
                Some(_) => None,
                None => Some(Glossary::draw(Split::Train, definitions.max(WORDS), rng)),
            };
            let Some(glossary) = own.as_ref().or(self.beside.as_ref()) else { continue };
            let tale = Tale::draw(glossary, facts, rng);
            let told = self.told(&tale, glossary, telling.told, definitions, rng);
            ids.extend(told.filter(|id| !terse || self.vocabulary.is_name(*id)));
            let mut order: Vec<usize> = (0..facts).collect();
            order.shuffle(rng);
            for fact in order {
                let mut asked = tale.ask_ids(fact, telling.asked, &self.vocabulary);
                asked.truncate(asked.len() - usize::from(terse));
                ids.extend(asked);
                answers.push((ids.len() as u32 - 1, tale.answer_id(fact, &self.vocabulary)));
            }
        }
        let batch = Batch::dense(stories, ids.len() / stories)?;
        Ok(Exercise { ids, batch, answers, passes: 0, end: None })
    }

    fn mark(&self, _: &Settings, at: &mut Lessons, _: usize, right: f64, done: f64) {
        at.note(right);
        if self.beside.is_some() {
            return;
        }
        at.move_on(&LESSONS.map(|lesson| lesson.ends), done);
    }

    fn status(&self, at: &Lessons, _: f32) -> String {
        format!("lesson {} right {:.0} %", at.now() + 1, at.right() * 100.0)
    }

    fn examine(&self, settings: &Settings, trainee: &Trainee) -> Result<Option<Examination>> {
        if self.tales == 0 {
            return Ok(None);
        }
        let model = trainee.model(&mut settings.rng(settings.steps))?;
        let bar = terminal::bar(5, "examination [{bar:30}] {pos}/{len}");
        let share = |told, asked, definitions| -> Result<Estimate> {
            let right = self.right(&model, [told, asked], definitions)?;
            bar.inc(1);
            Ok(Estimate::of(&right))
        };
        let (words, names) = (Called::Words, Called::Names);
        let given = if self.beside.is_some() { 0 } else { TALE_FACTS };
        let examination = Examination {
            tales: self.tales,
            names: share(names, names, 0)?,
            undefined: share(words, names, 0)?,
            defined: share(words, names, TALE_FACTS)?,
            among: share(words, names, WORDS)?,
            asked: share(names, words, given)?,
        };
        bar.finish_and_clear();
        Ok(Some(examination))
    }
}

impl OfGlossary {
    /// What is taught, and whom: a new model, or what a checkpoint that has learned the suite lacks without definitions.
    pub(crate) fn begin(
        settings: &Settings,
        base: Option<Base>,
        tales: usize,
    ) -> Result<(Self, Trainee)> {
        let vocabulary = Vocabulary::of_glossary();
        if settings.arm != Arm::NoPasses {
            return Err("--suite glossary: without passes, for --arm no-passes".into());
        }
        let Some(base) = base else {
            let trainee = Trainee::new(settings, &vocabulary)?;
            return Ok((Self { vocabulary, tales, beside: None }, trainee));
        };
        check_base(&base, &vocabulary)?;
        let mut rng = ChaCha8Rng::seed_from_u64(settings.seed);
        let glossary = Glossary::draw(Split::Train, LEARNED, &mut rng);
        let trainee = match (&settings.dictionary, &settings.adapter) {
            (Some(reads), _) => {
                let layers = settings.span.0..settings.span.1;
                let dictionary = compile(&base.with_tokenizer()?, &glossary, layers, reads.sees)?;
                Trainee::reading(base, dictionary, settings)?
            }
            (None, Some(_)) => Trainee::on(base, settings, None)?,
            (None, None) => {
                return Err("--suite glossary: with --model, give --dictionary or --rank".into());
            }
        };
        Ok((Self { vocabulary, tales, beside: Some(glossary) }, trainee))
    }

    /// A tale after so many definitions, those of its words among them; or after none.
    fn told(
        &self,
        tale: &Tale,
        glossary: &Glossary,
        called: Called,
        definitions: usize,
        rng: &mut impl Rng,
    ) -> impl Iterator<Item = u32> {
        let definitions = match definitions {
            0 => Vec::new(),
            count => tale.definitions(glossary, count, rng),
        };
        tale.ids(called, &definitions, &self.vocabulary).into_iter()
    }

    /// For each tale of the examination, whether what it is asked is answered right.
    fn right(
        &self,
        model: &ThoughtModel,
        [told, asked]: [Called; 2],
        definitions: usize,
    ) -> Result<Vec<f64>> {
        let mut rng = ChaCha8Rng::seed_from_u64(EXAMINATION);
        let own = Glossary::draw(Split::Test, WORDS, &mut rng);
        let glossary = self.beside.as_ref().unwrap_or(&own);
        let mut prompts = Vec::with_capacity(self.tales);
        for (tale, fact) in tales(glossary, self.tales) {
            let mut ids: Vec<u32> =
                self.told(&tale, glossary, told, definitions, &mut rng).collect();
            ids.extend(tale.ask_ids(fact, asked, &self.vocabulary));
            prompts.push((ids, tale.answer_id(fact, &self.vocabulary)));
        }
        let [right, _] = answered(model, &prompts)?;
        Ok(right)
    }
}

/// Tales of an examination, and the fact that each is asked about.
pub(crate) fn tales(glossary: &Glossary, count: usize) -> Vec<(Tale, usize)> {
    let mut rng = ChaCha8Rng::seed_from_u64(EXAMINATION);
    let tale = |_| (Tale::draw(glossary, TALE_FACTS, &mut rng), rng.random_range(0..TALE_FACTS));
    (0..count).map(tale).collect()
}

/// For each prompt, all as long, whether what the model says next is right, 1 or 0, and the nats of what is.
pub(crate) fn answered(model: &ThoughtModel, asked: &[(Vec<u32>, u32)]) -> Result<[Vec<f64>; 2]> {
    let (mut right, mut nats) = (Vec::with_capacity(asked.len()), Vec::with_capacity(asked.len()));
    let tokens = asked.first().map_or(0, |(ids, _)| ids.len());
    for some in asked.chunks((MOST_TOKENS / tokens.max(1)).max(1)) {
        let ids: Vec<u32> = some.iter().flat_map(|(ids, _)| ids).copied().collect();
        let batch = Batch::dense(some.len(), tokens)?;
        let last: Vec<u32> = batch.all_rows().map(|rows| rows.end as u32 - 1).collect();
        let hidden = read(model, &Thinking::none(), &ids, batch)?; // (tokens, hidden)
        let last = hidden.index_select(&Tensor::new(last, hidden.device())?, 0)?;
        let logits = model.decoder().logits(&last)?; // (prompts, vocab)
        let said: Vec<u32> = logits.argmax(D::Minus1)?.to_vec1()?;
        let both = said.iter().zip(some);
        right.extend(both.map(|(said, (_, answer))| f64::from(said == answer)));
        let answers: Vec<u32> = some.iter().map(|(_, answer)| *answer).collect();
        let answers = Tensor::new(answers, hidden.device())?.unsqueeze(1)?;
        let logprobs = log_softmax(&logits, D::Minus1)?.gather(&answers, 1)?.squeeze(1)?;
        nats.extend(logprobs.to_vec1::<f32>()?.into_iter().map(|logprob| -f64::from(logprob)));
    }
    Ok([right, nats])
}
