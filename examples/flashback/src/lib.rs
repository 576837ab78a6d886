//! The flashback suite: short stories whose facts come in the wrong order, and a question that can only
//! be answered by putting them back together.
//!
//! ```text
//! Earlier, the coin was put in the jar. The chest is in the cart. Before that, the jar had been
//! hidden in the chest.
//! Where is the coin?
//! In the cart
//! ```
//!
//! A story is a shuffled list of facts, each saying that one name leads to another: a thing is in
//! a thing, or a person handed everything to a person. The facts make up chains, and the question
//! names a link: the answer is the end of its chain, some number of *hops* away. Read left to
//! right, a fact is understood only as far as the facts before it reach.
//!
//! The test split has names of its own and, for the facts, pairings of opener and verb that the
//! training split never uses.
//!
//! A suite beside it asks about stories whose words a [`Glossary`] explains.

mod conversations;
mod glossary;
mod names;
mod vocabulary;

use rand::Rng;
use rand::seq::SliceRandom;

pub use conversations::{ASKED, Asked, CONVERSATIONS, CORRECTED, Conversations, TOLD, Told};
pub use glossary::{Called, Entry, Glossary, TALE_FACTS, TEST_WORDS, Tale, Word};
use names::{Names, PEOPLE, THINGS};
pub use vocabulary::{END, UNKNOWN, Vocabulary};

/// The longest chain that is asked about.
pub const LONGEST: usize = 12;

/// The longest chain in a story beside the one that is asked about, and in any training story.
pub const LONGEST_TRAINED: usize = 8;

/// Facts in each story of an examination.
pub const FACTS: usize = 20;

/// What the facts of a story tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Relation {
    /// Things are in things.
    Containment,
    /// People hand everything they have to people.
    HandOver,
}

/// Which names and wordings a story may use.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Split {
    /// Stories to learn from.
    Train,
    /// Stories to be examined on.
    Test,
}

/// How the sentences of a relation are worded.
struct Wording {
    names: Names,
    /// Begin a fact, before the first name.
    openers: [&'static str; 5],
    /// Stand between the two names.
    verbs: [&'static str; 6],
    /// Stand before and after the name that is asked about.
    question: [&'static str; 2],
}

const CONTAINMENT: Wording = Wording {
    names: THINGS,
    openers: ["The", "Earlier, the", "Before that, the", "By then, the", "That day, the"],
    verbs: [
        " is in the",
        " was put in the",
        " had been hidden in the",
        " had been left in the",
        " lay in the",
        " was found in the",
    ],
    question: ["Where is the", "?\nIn the"],
};

const HAND_OVER: Wording = Wording {
    names: PEOPLE,
    openers: ["Then", "Earlier,", "Before that,", "By then,", "That day,"],
    verbs: [
        " gave everything to",
        " had handed everything to",
        " sent everything to",
        " had passed everything on to",
        " left everything with",
        " brought everything to",
    ],
    question: ["Who has what", " had?\nIt is with"],
};

impl Relation {
    fn wording(self) -> &'static Wording {
        match self {
            Self::Containment => &CONTAINMENT,
            Self::HandOver => &HAND_OVER,
        }
    }
}

impl Split {
    fn names(self, of: &'static Names) -> &'static [&'static str] {
        match self {
            Self::Train => &of.train,
            Self::Test => &of.test,
        }
    }

    /// Whether this split words facts this way. A quarter of the pairings are held out for the test.
    fn has(self, opener: usize, verb: usize) -> bool {
        let held_out = (opener + verb).is_multiple_of(4);
        held_out == (self == Self::Test)
    }

    /// Draws an opener and a verb.
    fn wording(self, rng: &mut impl Rng) -> (usize, usize) {
        loop {
            let (opener, verb) = (rng.random_range(0..5), rng.random_range(0..6));
            if self.has(opener, verb) {
                return (opener, verb);
            }
        }
    }
}

/// One sentence: `from` is in, or handed everything to, `to`.
#[derive(Clone, Debug)]
struct Fact {
    from: &'static str,
    to: &'static str,
    opener: usize,
    verb: usize,
}

/// A name to ask about.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Question {
    /// A link of a chain.
    pub name: &'static str,
    /// The end of its chain.
    pub answer: &'static str,
    /// Facts that lead from the name to the answer.
    pub hops: usize,
}

/// What a story is drawn from.
#[derive(Clone, Debug)]
pub struct Plan {
    /// The split whose names and wordings it uses.
    pub split: Split,
    /// Facts in all.
    pub facts: usize,
    /// The longest chain.
    pub longest: usize,
    /// The length of one of the chains, if it matters.
    pub one_of: Option<usize>,
}

impl Plan {
    /// What examinations ask about: a chain of `hops` facts among others.
    pub fn examination(split: Split, hops: usize) -> Self {
        Self { split, facts: FACTS, longest: LONGEST_TRAINED, one_of: Some(hops) }
    }
}

/// Facts in the order they are told, and all that can be asked about them.
#[derive(Clone, Debug)]
pub struct Story {
    relation: Relation,
    facts: Vec<Fact>,
    /// One about each fact, in random order.
    pub questions: Vec<Question>,
    /// The number of chain ends, among which a guess would choose.
    pub ends: usize,
}

impl Story {
    /// Draws a story. One chain has length `one_of`, the others any length up to `longest`, until there
    /// are enough facts.
    pub fn draw(plan: &Plan, rng: &mut impl Rng) -> Self {
        let relation = if rng.random() { Relation::Containment } else { Relation::HandOver };
        let wording = relation.wording();
        let mut names = plan.split.names(&wording.names).to_vec();
        names.shuffle(rng);

        let mut lengths = Vec::new();
        let mut missing = plan.facts;
        let mut spare = names.len() - plan.facts; // every chain has one name more than facts
        while missing > 0 {
            let drawn = match plan.one_of {
                Some(length) if lengths.is_empty() => length,
                _ => rng.random_range(1..=plan.longest),
            };
            let length = if spare == 1 { missing } else { drawn.min(missing) };
            lengths.push(length);
            missing -= length;
            spare -= 1;
        }
        let (mut facts, mut questions) = (Vec::new(), Vec::new());
        let mut names = names.as_slice();
        for &length in &lengths {
            let (chain, rest) = names.split_at(length + 1);
            names = rest;
            for (index, link) in chain.windows(2).enumerate() {
                let (opener, verb) = plan.split.wording(rng);
                facts.push(Fact { from: link[0], to: link[1], opener, verb });
                questions.push(Question {
                    name: link[0],
                    answer: chain[length],
                    hops: length - index,
                });
            }
        }
        facts.shuffle(rng);
        questions.shuffle(rng);
        Self { relation, facts, questions, ends: lengths.len() }
    }

    /// The pieces of the story's text, each of them one token.
    fn pieces(&self) -> impl Iterator<Item = String> {
        let wording = self.relation.wording();
        self.facts.iter().enumerate().flat_map(|(index, fact)| {
            let opener = wording.openers[fact.opener];
            let opener = if index == 0 { opener.to_string() } else { format!(". {opener}") };
            let verb = wording.verbs[fact.verb].to_string();
            [opener, name(fact.from), verb, name(fact.to)]
        })
    }

    /// The first question whose answer is `hops` facts away.
    pub fn question_of(&self, hops: usize) -> Option<&Question> {
        self.questions.iter().find(|question| question.hops == hops)
    }

    /// Questions about all links of a chain of `length`, from the last one on.
    pub fn chain_of(&self, length: usize) -> Vec<&Question> {
        let Some(first) = self.question_of(length) else { return Vec::new() };
        let same =
            self.questions.iter().filter(|it| it.answer == first.answer && it.hops <= length);
        let mut chain: Vec<_> = same.collect();
        chain.sort_by_key(|question| question.hops);
        chain
    }

    /// The story as a person reads it, up to but not including the last full stop. That one begins the
    /// question, so that no token is part of both.
    pub fn text(&self) -> String {
        self.pieces().collect()
    }

    /// The question as it follows the story; the answer comes next.
    pub fn ask(&self, question: &Question) -> String {
        let [before, after] = self.relation.wording().question;
        format!(".\n{before} {}{after}", question.name)
    }

    /// The tokens of [`Story::text`].
    pub fn ids(&self, vocabulary: &Vocabulary) -> Vec<u32> {
        self.pieces().map(|piece| vocabulary.id(&piece)).collect()
    }

    /// The story as names alone, two for each fact: the first lessons in reading use it.
    pub fn terse_ids(&self, vocabulary: &Vocabulary) -> Vec<u32> {
        let names = self.facts.iter().flat_map(|fact| [fact.from, fact.to]);
        names.map(|it| vocabulary.id(&name(it))).collect()
    }

    /// The tokens of [`Story::ask`].
    pub fn ask_ids(&self, question: &Question, vocabulary: &Vocabulary) -> [u32; 3] {
        let [before, after] = self.relation.wording().question;
        let pieces = [format!(".\n{before}"), name(question.name), after.to_string()];
        pieces.map(|piece| vocabulary.id(&piece))
    }

    /// The token of the answer.
    pub fn answer_id(&self, question: &Question, vocabulary: &Vocabulary) -> u32 {
        vocabulary.id(&name(question.answer))
    }
}

/// A name as it appears in a text, after a space.
fn name(name: &str) -> String {
    format!(" {name}")
}
