//! Stories told over several conversations, in plain English, with corrections: for `hybrid memory eval`.

use rand::Rng;
use rand::seq::SliceRandom;
use serde::Serialize;

use crate::{Plan, Relation, Split, Story};

/// Facts of a story, none of which leads on to another.
pub const TOLD: usize = 12;

/// How many of them are put right, in the last conversation.
pub const CORRECTED: usize = 4;

/// Questions about facts that were put right, and as many about others.
pub const ASKED: usize = 3;

/// Conversations, a day apart.
pub const CONVERSATIONS: usize = 4;

/// Something that was said.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Told {
    /// The words.
    pub text: String,
    /// How long ago.
    pub days_ago: f64,
    /// What was told before and is not true since, by its place.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub corrects: Option<usize>,
}

/// A question, and what may be answered.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Asked {
    /// The question.
    pub question: String,
    /// How the answer begins; a blank and a name follow.
    pub begins: String,
    /// What tells the answer, by its place.
    pub by: usize,
    /// The right name.
    pub answer: &'static str,
    /// The name that was right before.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub old: Option<&'static str>,
    /// All others that a fact leads to, or a correction.
    pub others: Vec<&'static str>,
}

/// A story as it is told, and what is asked about it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Conversations {
    /// In the order in which it is told: facts, and then corrections.
    pub told: Vec<Told>,
    /// Questions, those about corrected facts first.
    pub asked: Vec<Asked>,
}

impl Conversations {
    /// Draws a story with the names of the training split, of which there are more.
    pub fn draw(rng: &mut impl Rng) -> Self {
        let plan = Plan { split: Split::Train, facts: TOLD, longest: 1, one_of: None };
        let story = Story::draw(&plan, rng);
        let wording = story.relation.wording();
        let used = |name: &str| story.facts.iter().any(|it| it.from == name || it.to == name);
        let mut unused: Vec<&str> =
            plan.split.names(&wording.names).iter().copied().filter(|name| !used(name)).collect();
        unused.shuffle(rng);
        let mut order: Vec<usize> = (0..TOLD).collect();
        order.shuffle(rng);

        let tell = |place: usize, text: String, corrects| {
            // All conversations but the last tell as many facts.
            let conversation = (place * (CONVERSATIONS - 1) / TOLD).min(CONVERSATIONS - 1);
            let days_ago = (CONVERSATIONS - conversation) as f64 - place as f64 / 100.0;
            Told { text, days_ago, corrects }
        };
        let mut told: Vec<Told> = Vec::new();
        for fact in &story.facts {
            let text = story.relation.tell(fact.from, wording.verbs[fact.verb], fact.to);
            told.push(tell(told.len(), text, None));
        }
        for (&place, new) in order.iter().zip(&unused).take(CORRECTED) {
            let text = story.relation.correct(story.facts[place].from, new);
            told.push(tell(told.len(), text, Some(place)));
        }

        let new = &unused[..CORRECTED];
        let all: Vec<&str> =
            story.facts.iter().map(|fact| fact.to).chain(new.iter().copied()).collect();
        let ask = |place: usize, corrected: Option<usize>| {
            let fact = &story.facts[place];
            let answer = corrected.map_or(fact.to, |index| new[index]);
            let old = corrected.map(|_| fact.to);
            let others = all.iter().copied().filter(|name| *name != answer && Some(*name) != old);
            let [question, begins] = story.relation.ask(fact.from);
            let by = corrected.map_or(place, |index| TOLD + index);
            Asked { question, begins, by, answer, old, others: others.collect() }
        };
        let corrected = order.iter().take(ASKED).enumerate();
        let corrected = corrected.map(|(index, &place)| ask(place, Some(index)));
        let others = order[CORRECTED..].iter().take(ASKED).map(|&place| ask(place, None));
        let asked = corrected.chain(others).collect();
        Self { told, asked }
    }
}

impl Relation {
    fn tell(self, from: &str, verb: &str, to: &str) -> String {
        match self {
            Self::Containment => format!("The {from}{verb} {to}."),
            Self::HandOver => format!("{from}{verb} {to}."),
        }
    }

    fn correct(self, from: &str, to: &str) -> String {
        match self {
            Self::Containment => format!("The {from} is in the {to} now."),
            Self::HandOver => format!("{from} gave everything to {to} after all."),
        }
    }

    /// The question, and how its answer begins.
    fn ask(self, from: &str) -> [String; 2] {
        match self {
            Self::Containment => [format!("Where is the {from}?"), format!("The {from} is in the")],
            Self::HandOver => {
                [format!("Who has what {from} had?"), format!("What {from} had is with")]
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    use super::*;

    #[test]
    fn what_is_asked_was_told_and_what_was_corrected_is_told_anew() {
        for seed in 0..50 {
            let story = Conversations::draw(&mut ChaCha8Rng::seed_from_u64(seed));
            assert_eq!((story.told.len(), story.asked.len()), (TOLD + CORRECTED, 2 * ASKED));
            let days: Vec<f64> = story.told.iter().map(|told| told.days_ago).collect();
            assert!(days.is_sorted_by(|a, b| a > b) && days.iter().all(|days| *days > 0.0));
            let mut conversations: Vec<f64> = days.iter().map(|days| days.ceil()).collect();
            conversations.dedup();
            assert_eq!(conversations, [4.0, 3.0, 2.0, 1.0]);
            for asked in &story.asked {
                let told = &story.told[asked.by];
                assert!(told.text.contains(asked.answer), "{told:?} {asked:?}");
                // The name that is asked about is the last but the question mark, or but "had?".
                let name = asked.question.trim_end_matches(" had?").trim_end_matches('?');
                let name = name.rsplit(' ').next().unwrap_or_default();
                assert!(told.text.contains(name) && asked.begins.contains(name));
                assert_eq!(told.corrects.is_some(), asked.old.is_some());
                if let (Some(corrects), Some(old)) = (told.corrects, asked.old) {
                    let before = &story.told[corrects].text;
                    assert!(before.contains(old) && before.contains(name), "{before} {asked:?}");
                }
                let mut names = asked.others.clone();
                names.extend(asked.old.into_iter().chain([asked.answer]));
                names.sort_unstable();
                names.dedup();
                assert_eq!(names.len(), TOLD + CORRECTED, "names that differ");
            }
        }
    }
}
