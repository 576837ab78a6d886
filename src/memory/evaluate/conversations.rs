//! What is recalled of what was told, and put right since, and is it answered by?

use std::collections::HashMap;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::generate::{GenerationConfig, Prompt};
use crate::hybrid::HybridModel;
use crate::memory::note::now;
use crate::memory::{Embedding, Memory, Note, NoteId, Recall, Recalled, Volatile};
use crate::thought::Thinking;

/// The milliseconds of a day.
const DAY: f64 = 86_400_000.0;

/// Tokens of an answer that are generated: names are short.
const ANSWER: usize = 4;

/// Something that was said.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Told {
    /// The words.
    pub text: String,
    /// How long ago, in days.
    pub days_ago: f64,
    /// What was told before and is not true since: its place in [`Story::told`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub corrects: Option<usize>,
}

/// A question about what was told, and what may be answered.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Asked {
    /// The question; it is also what is asked for in the memory.
    pub question: String,
    /// How the answer begins; a blank and a name follow.
    pub begins: String,
    /// What tells the answer: its place in [`Story::told`].
    pub by: usize,
    /// The right name.
    pub answer: String,
    /// What was right before it was corrected.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub old: Option<String>,
    /// Wrong ones.
    pub others: Vec<String>,
}

/// What was told, over several conversations, and what is asked about it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Story {
    /// In the order in which it was told.
    pub told: Vec<Told>,
    /// Questions, at least one.
    pub asked: Vec<Asked>,
}

impl Story {
    fn validate(&self) -> Result<()> {
        let wrong = |name, expected: &str, got: &dyn std::fmt::Display| {
            Err(Error::parameter(name, expected, got))
        };
        if self.asked.is_empty() {
            return wrong("asked", "at least 1 question", &0);
        }
        for (place, told) in self.told.iter().enumerate() {
            if let Some(corrects) = told.corrects.filter(|corrects| *corrects >= place) {
                return wrong("corrects", "the place of something told before", &corrects);
            }
            if !(told.days_ago >= 0.0 && told.days_ago.is_finite()) {
                return wrong("days_ago", "at least 0", &told.days_ago);
            }
        }
        for asked in &self.asked {
            if asked.by >= self.told.len() {
                return wrong("by", "the place of something told", &asked.by);
            }
        }
        Ok(())
    }

    /// A memory of it. What is put right is superseded, or only contradicted.
    fn remember(&self, model: &HybridModel, supersede: bool) -> Result<(Memory, Vec<NoteId>)> {
        let memory = Memory::over(Volatile::default(), model, Embedding::default())?;
        let now = now();
        let note = |told: &Told| Note::default().time(now - (told.days_ago * DAY) as i64);
        if !supersede {
            let told = self.told.iter().map(|told| (told.text.as_str(), note(told)));
            let ids = memory.remember_all(told)?;
            return Ok((memory, ids));
        }
        let mut ids = Vec::with_capacity(self.told.len());
        for told in &self.told {
            let old: Option<NoteId> = told.corrects.and_then(|old| ids.get(old).copied());
            ids.push(match old {
                Some(old) => memory.supersede(old, &told.text, note(told))?,
                None => memory.remember(&told.text, note(told))?,
            });
        }
        Ok((memory, ids))
    }
}

/// What answers questions about a story: a memory that supersedes what is put right, one that only adds, one that
/// prefers newer notes, all that was told in the prompt, and nothing.
///
/// An answer is right two ways: where the first token of the right name is likelier than that of any other name that may
/// be answered, and where the likeliest text says it.
///
/// ```
/// # use candle_core::Device;
/// use hybrid_attention::HybridModel;
/// use hybrid_attention::memory::evaluate::{Asked, Conversations, Story, Told};
///
/// # fn main() -> hybrid_attention::Result<()> {
/// let model = HybridModel::tiny(&Device::Cpu)?;
/// let told = |text: &str, days_ago, corrects| Told { text: text.into(), days_ago, corrects };
/// let story = Story {
///     told: vec![told("Eva gave it to Max.", 2.0, None), told("Eva gave it to Leo.", 1.0, Some(0))],
///     asked: vec![Asked {
///         question: "Who has it?".into(),
///         begins: "It is with".into(),
///         by: 1,
///         answer: "Leo".into(),
///         old: Some("Max".into()),
///         others: vec!["Ida".into()],
///     }],
/// };
/// for row in Conversations::default().run(&model, &[story], || ())? {
///     println!("{} {:?} {:?}", row.name, row.right, row.old);
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Conversations {
    /// How many notes are recalled.
    pub best: usize,
    /// How newer notes are preferred in one of the rows: the weight, and the half-life in days.
    pub recency: (f32, f64),
}

impl Default for Conversations {
    /// Three notes; a weight of 0.1 and a half-life of a day.
    fn default() -> Self {
        Self { best: 3, recency: (0.1, 1.0) }
    }
}

/// What one way remembers and answers. Each figure is, for each story, the share of its questions. What only corrected
/// facts have leaves out the stories that ask about none.
#[derive(Clone, Debug, Serialize)]
pub struct Held {
    /// Which way.
    pub name: String,
    /// The note that tells the answer is recalled first; nothing where none are.
    pub first: Vec<f64>,
    /// It is among the best.
    pub recalled: Vec<f64>,
    /// Among them is one that was corrected.
    pub old_recalled: Vec<f64>,
    /// The right name is likeliest of those that may be answered.
    pub right: Vec<f64>,
    /// The same, of corrected facts alone.
    pub right_corrected: Vec<f64>,
    /// Of corrected facts, the old name is.
    pub old: Vec<f64>,
    /// The likeliest text says the right name.
    pub said: Vec<f64>,
    /// Of corrected facts, it says the old name.
    pub old_said: Vec<f64>,
}

/// What became of one question.
#[derive(Debug)]
struct Mark {
    /// Of the notes, in their order, whether each tells the answer, and whether it was corrected; none where all is
    /// given, or nothing.
    recalled: Option<Vec<(bool, bool)>>,
    /// Whether it is about a fact that was corrected.
    corrected: bool,
    right: bool,
    old: bool,
    said: bool,
    old_said: bool,
}

impl Conversations {
    /// The row in which nothing is remembered.
    pub const NOTHING: &str = "nothing";
    /// The row in which all that was told stands in the prompt.
    pub const ALL: &str = "all of it";
    /// The row of a memory in which what is put right is superseded.
    pub const SUPERSEDED: &str = "memory, superseded";
    /// The row of a memory in which both statements stay.
    pub const BOTH: &str = "memory, both kept";
    /// The same, newer notes preferred.
    pub const NEWER: &str = "memory, both kept, newer preferred";

    /// All rows; `progress` is called for every story.
    ///
    /// # Errors
    /// [`Error::InText`] with the index of a story and what is wrong with it; [`Error::Parameter`] for no stories; as
    /// [`Memory::recall`] and [`HybridModel::generate`].
    pub fn run(
        &self,
        model: &HybridModel,
        stories: &[Story],
        progress: impl Fn(),
    ) -> Result<Vec<Held>> {
        if stories.is_empty() {
            return Err(Error::parameter("stories", "at least 1", 0));
        }
        let checked = |(index, story): (usize, &Story)| {
            story.validate().map_err(|error| Error::in_text(index, error))
        };
        stories.iter().enumerate().try_for_each(checked)?;
        let recall = Recall::best(self.best).tokens(usize::MAX);
        let newer = recall.clone().recency(self.recency.0, self.recency.1);
        let mut marks: Vec<(&str, Vec<Vec<Mark>>)> =
            [Self::NOTHING, Self::ALL, Self::SUPERSEDED, Self::BOTH, Self::NEWER]
                .map(|name| (name, Vec::new()))
                .into();
        for story in stories {
            let superseded = story.remember(model, true)?;
            let both = story.remember(model, false)?;
            for (name, marks) in &mut marks {
                let mark = |asked: &Asked| match *name {
                    Self::NOTHING => answered(&both.0, asked, &[], None),
                    Self::ALL => answered(&both.0, asked, &all(&both)?, None),
                    Self::SUPERSEDED => recalled(story, &superseded, asked, &recall),
                    Self::NEWER => recalled(story, &both, asked, &newer),
                    _ => recalled(story, &both, asked, &recall),
                };
                marks.push(story.asked.iter().map(mark).collect::<Result<_>>()?);
            }
            progress();
        }
        Ok(marks.iter().map(|(name, marks)| Held::of(name, marks)).collect())
    }
}

/// All that is in a memory, the last told first, as what is recalled best first.
fn all((memory, ids): &(Memory, Vec<NoteId>)) -> Result<Vec<Recalled>> {
    let mut all = Vec::with_capacity(ids.len());
    for id in ids.iter().rev() {
        all.extend(memory.get(*id)?.map(|record| Recalled {
            id: record.id,
            text: record.text,
            note: record.note,
            score: 0.0,
            spans: Vec::new(),
        }));
    }
    Ok(all)
}

fn recalled(
    story: &Story,
    (memory, ids): &(Memory, Vec<NoteId>),
    asked: &Asked,
    recall: &Recall,
) -> Result<Mark> {
    let found = memory.recall(&asked.question, recall)?;
    let corrected: Vec<_> = story.told.iter().filter_map(|told| ids.get(told.corrects?)).collect();
    let tells = ids.get(asked.by);
    let kinds = found.iter().map(|it| (Some(&it.id) == tells, corrected.contains(&&it.id)));
    let kinds = kinds.collect();
    answered(memory, asked, &found, Some(kinds))
}

/// What the memory's model answers after these notes.
fn answered(
    memory: &Memory,
    asked: &Asked,
    notes: &[Recalled],
    recalled: Option<Vec<(bool, bool)>>,
) -> Result<Mark> {
    let model = &memory.model;
    let needed_for = "an evaluation";
    let tokenizer = model.tokenizer().ok_or(Error::NoTokenizer { needed_for })?;
    let question = format!("{}\n{}", asked.question, asked.begins);
    let everything = Recall::best(1).tokens(usize::MAX);
    let prompt: Prompt = memory.prompt_of(&question, notes, &everything)?;
    let config = GenerationConfig::default()
        .thinking(Thinking::none())
        .temperature(0.0)
        .max_tokens(ANSWER)
        .top_logprobs(model.config().vocab_size);
    let answer = model.generate(prompt, &config)?;
    let of_first: HashMap<u32, f32> =
        answer.top_logprobs.first().into_iter().flatten().copied().collect();
    let before = tokenizer.encode_said(&question)?.len();
    let likely = |name: &String| -> Result<f32> {
        let ids = tokenizer.encode_said(&format!("{question} {name}"))?;
        let first = ids.get(before).and_then(|id| of_first.get(id));
        Ok(first.copied().unwrap_or(f32::NEG_INFINITY))
    };
    let others = asked.others.iter().map(likely).collect::<Result<Vec<_>>>()?;
    let other = others.into_iter().fold(f32::NEG_INFINITY, f32::max);
    let (right, old) = (likely(&asked.answer)?, asked.old.as_ref().map(likely).transpose()?);
    let old = old.unwrap_or(f32::NEG_INFINITY);
    let says = |name: &String| {
        let rest = answer.text.trim_start().strip_prefix(name.as_str());
        rest.is_some_and(|rest| !rest.starts_with(char::is_alphanumeric))
    };
    Ok(Mark {
        recalled,
        corrected: asked.old.is_some(),
        right: right > old.max(other),
        old: old > right.max(other),
        said: says(&asked.answer),
        old_said: asked.old.as_ref().is_some_and(says),
    })
}

impl Held {
    fn of(name: &str, stories: &[Vec<Mark>]) -> Self {
        let shares = |of: &dyn Fn(&Mark) -> Option<bool>| -> Vec<f64> {
            let of_story = stories.iter().filter_map(|marks| {
                let held: Vec<bool> = marks.iter().filter_map(of).collect();
                let count = held.iter().filter(|held| **held).count();
                (!held.is_empty()).then(|| count as f64 / held.len() as f64)
            });
            of_story.collect()
        };
        Self {
            name: name.to_owned(),
            first: shares(&|it| Some(it.recalled.as_ref()?.first().is_some_and(|it| it.0))),
            recalled: shares(&|it| Some(it.recalled.as_ref()?.iter().any(|it| it.0))),
            old_recalled: shares(&|it| Some(it.recalled.as_ref()?.iter().any(|it| it.1))),
            right: shares(&|it| Some(it.right)),
            right_corrected: shares(&|it| it.corrected.then_some(it.right)),
            old: shares(&|it| it.corrected.then_some(it.old)),
            said: shares(&|it| Some(it.said)),
            old_said: shares(&|it| it.corrected.then_some(it.old_said)),
        }
    }
}
