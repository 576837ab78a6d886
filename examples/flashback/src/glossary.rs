//! The glossary suite: short stories in which invented words stand for known things, and the glossary that explains them.
//!
//! ```text
//! Here zo-rik means coin, ba-lun means bell. The ba-lun lay in the chest. Earlier, the zo-rik was put in the jar.
//! Where is the coin?
//! In the jar
//! ```
//!
//! Without the glossary the question cannot be answered better than by a guess among the facts. A word is two syllables,
//! each of them a token, and the test split has pairs of them that the training split never uses, so that nothing can be
//! known of a word but what its entry says.

use std::collections::HashSet;
use std::fmt;

use rand::Rng;
use rand::seq::{IndexedRandom, SliceRandom};

use crate::names::THINGS;
use crate::{CONTAINMENT, Fact, Relation, Split, Vocabulary, name};

/// Facts of a [`Tale`] of an examination: a guess is right one time in as many.
pub const TALE_FACTS: usize = 6;

/// Syllables that begin a word, and as many that end one.
const SYLLABLES: usize = 200;

/// Invented words of the test split; the other split has three times as many.
pub const TEST_WORDS: usize = SYLLABLES * SYLLABLES / 4;

/// Begins a list of definitions.
pub(crate) const HERE: &str = "Here";

/// Stands between a word and what it means.
pub(crate) const MEANS: &str = " means";

/// Stands between two definitions.
pub(crate) const COMMA: &str = ",";

/// An invented word: `zo-rik`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Word {
    first: usize,
    second: usize,
}

/// How syllables are spelled that begin a word, and those that end one: what stands before, and after the vowel.
const FORMS: [(char, [&str; 2]); 2] = [(' ', ["", "m"]), ('-', ["k", "n"])];

const CONSONANTS: [char; 20] = [
    'b', 'c', 'd', 'f', 'g', 'h', 'j', 'k', 'l', 'm', 'n', 'p', 'q', 'r', 's', 't', 'v', 'w', 'x',
    'z',
];

const VOWELS: [char; 5] = ['a', 'e', 'i', 'o', 'u'];

/// A syllable as its token spells it.
fn syllable((before, ends): (char, [&str; 2]), index: usize) -> String {
    let (consonant, rest) = (CONSONANTS[index / 10], index % 10);
    format!("{before}{consonant}{}{}", VOWELS[rest / 2], ends[rest % 2])
}

/// The syllables that words begin with, then those that they end with.
pub(crate) fn syllables() -> impl Iterator<Item = String> {
    FORMS.into_iter().flat_map(|form| (0..SYLLABLES).map(move |index| syllable(form, index)))
}

impl fmt::Display for Word {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.pieces().concat().trim_start())
    }
}

impl Word {
    /// Whether this split uses it. A quarter of the pairs of syllables are held out for the test.
    fn is_of(self, split: Split) -> bool {
        let held_out = (self.first + self.second).is_multiple_of(4);
        held_out == (split == Split::Test)
    }

    /// What its tokens spell.
    fn pieces(self) -> [String; 2] {
        let [begins, ends] = FORMS;
        [syllable(begins, self.first), syllable(ends, self.second)]
    }

    /// Its tokens.
    pub fn ids(self, vocabulary: &Vocabulary) -> [u32; 2] {
        self.pieces().map(|piece| vocabulary.id(&piece))
    }
}

/// What a word means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The invented word.
    pub word: Word,
    /// The known thing that it stands for.
    pub meaning: &'static str,
}

impl Entry {
    fn pieces(self) -> Vec<String> {
        let [first, second] = self.word.pieces();
        vec![first, second, MEANS.to_string(), name(self.meaning)]
    }

    /// The tokens of `zo-rik means coin`, after a blank.
    pub fn ids(self, vocabulary: &Vocabulary) -> Vec<u32> {
        self.pieces().iter().map(|piece| vocabulary.id(piece)).collect()
    }
}

/// Invented words, each with what it means.
#[derive(Clone, Debug)]
pub struct Glossary {
    split: Split,
    /// In random order.
    pub entries: Vec<Entry>,
}

impl Glossary {
    /// Draws as many words of a split as there are, or `count`, and what they mean: every thing as often as any other.
    pub fn draw(split: Split, count: usize, rng: &mut impl Rng) -> Self {
        let count = count.min(match split {
            Split::Train => SYLLABLES * SYLLABLES - TEST_WORDS,
            Split::Test => TEST_WORDS,
        });
        let mut words = HashSet::new();
        let mut entries = Vec::with_capacity(count);
        let mut meanings = THINGS.train;
        while entries.len() < count {
            let word = Word {
                first: rng.random_range(0..SYLLABLES),
                second: rng.random_range(0..SYLLABLES),
            };
            if !word.is_of(split) || !words.insert(word) {
                continue;
            }
            if entries.len().is_multiple_of(meanings.len()) {
                meanings.shuffle(rng);
            }
            entries.push(Entry { word, meaning: meanings[entries.len() % meanings.len()] });
        }
        Self { split, entries }
    }
}

/// What the things of a tale are called.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Called {
    /// By invented words.
    Words,
    /// By their names.
    Names,
}

/// Facts about things, in random order, each of which can be asked about.
#[derive(Clone, Debug)]
pub struct Tale {
    facts: Vec<Fact>,
    /// The entries of the words that stand for the things of the facts, in their order.
    entries: Vec<Entry>,
}

impl Tale {
    /// Draws a tale of `facts` facts, at most [`TALE_FACTS`], with words of a glossary, which has to have some for as many
    /// different things.
    pub fn draw(glossary: &Glossary, facts: usize, rng: &mut impl Rng) -> Self {
        let facts = facts.min(TALE_FACTS);
        let mut entries: Vec<Entry> = Vec::with_capacity(facts);
        while let Some(&entry) = glossary.entries.choose(rng)
            && entries.len() < facts
        {
            if entries.iter().all(|other| other.meaning != entry.meaning) {
                entries.push(entry);
            }
        }
        let used = |thing: &&str| entries.iter().any(|entry| entry.meaning == *thing);
        let mut places: Vec<_> = THINGS.train.into_iter().filter(|thing| !used(thing)).collect();
        places.shuffle(rng);
        let fact = |(entry, to): (&Entry, &'static str)| {
            let (opener, verb) = glossary.split.wording(rng);
            Fact { from: entry.meaning, to, opener, verb }
        };
        let facts = entries.iter().zip(places).map(fact).collect();
        Self { facts, entries }
    }

    /// What the words of this tale mean, and, as far as they are fewer than `count`, other entries of the glossary, in
    /// random order.
    pub fn definitions(&self, glossary: &Glossary, count: usize, rng: &mut impl Rng) -> Vec<Entry> {
        let others = glossary.entries.iter().filter(|entry| !self.entries.contains(entry));
        let mut others: Vec<Entry> = others.copied().collect();
        let (more, _) = others.partial_shuffle(rng, count.saturating_sub(self.entries.len()));
        let mut all = [&self.entries, &*more].concat();
        all.shuffle(rng);
        all
    }

    fn pieces(&self, called: Called, definitions: &[Entry]) -> Vec<String> {
        let mut pieces = Vec::new();
        for (index, entry) in definitions.iter().enumerate() {
            pieces.push(if index == 0 { HERE } else { COMMA }.to_string());
            pieces.extend(entry.pieces());
        }
        for (fact, entry) in self.facts.iter().zip(&self.entries) {
            let opener = CONTAINMENT.openers[fact.opener];
            pieces.push(if pieces.is_empty() { opener.to_string() } else { format!(". {opener}") });
            match called {
                Called::Words => pieces.extend(entry.word.pieces()),
                Called::Names => pieces.push(name(fact.from)),
            }
            pieces.extend([CONTAINMENT.verbs[fact.verb].to_string(), name(fact.to)]);
        }
        pieces
    }

    /// The tale as a person reads it, without its last full stop, after the definitions.
    pub fn text(&self, called: Called, definitions: &[Entry]) -> String {
        self.pieces(called, definitions).concat()
    }

    /// The tokens of [`Tale::text`].
    pub fn ids(&self, called: Called, definitions: &[Entry], vocabulary: &Vocabulary) -> Vec<u32> {
        self.pieces(called, definitions).iter().map(|piece| vocabulary.id(piece)).collect()
    }

    /// The tokens of the question about a fact, which follow.
    pub fn ask_ids(&self, fact: usize, called: Called, vocabulary: &Vocabulary) -> Vec<u32> {
        let [before, after] = Relation::Containment.wording().question;
        let mut pieces = vec![format!(".\n{before}")];
        match called {
            Called::Words => pieces.extend(self.entries[fact].word.pieces()),
            Called::Names => pieces.push(name(self.facts[fact].from)),
        }
        pieces.push(after.to_string());
        pieces.iter().map(|piece| vocabulary.id(piece)).collect()
    }

    /// The token of its answer.
    pub fn answer_id(&self, fact: usize, vocabulary: &Vocabulary) -> u32 {
        vocabulary.id(&name(self.facts[fact].to))
    }
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;
    use rand_chacha::ChaCha8Rng;

    use super::*;

    #[test]
    fn a_tale_is_told_in_known_tokens_and_asks_for_what_it_told() {
        let vocabulary = Vocabulary::of_glossary();
        let mut rng = ChaCha8Rng::seed_from_u64(1);
        for split in [Split::Train, Split::Test] {
            let glossary = Glossary::draw(split, 10, &mut rng);
            for _ in 0..50 {
                let tale = Tale::draw(&glossary, TALE_FACTS, &mut rng);
                assert_eq!(Tale::draw(&glossary, 3, &mut rng).facts.len(), 3);
                let all = tale.definitions(&glossary, 10, &mut rng);
                assert_eq!(all.len(), 10);
                assert_eq!(tale.definitions(&glossary, 0, &mut rng).len(), TALE_FACTS);
                for (fact, called) in
                    (0..TALE_FACTS).flat_map(|it| [(it, Called::Words), (it, Called::Names)])
                {
                    let (told, asked) = (
                        tale.ids(called, &all, &vocabulary),
                        tale.ask_ids(fact, called, &vocabulary),
                    );
                    let answer = tale.answer_id(fact, &vocabulary);
                    let spelled = |ids: &[u32]| -> String {
                        ids.iter().map(|id| vocabulary.pieces()[*id as usize].as_str()).collect()
                    };
                    assert_eq!(spelled(&told), tale.text(called, &all));
                    let names = told.iter().filter(|id| vocabulary.is_name(**id)).count();
                    let own = if called == Called::Words { 3 } else { 2 };
                    assert_eq!(names, 3 * all.len() + own * TALE_FACTS);
                    assert!(told.iter().chain(&asked).all(|id| *id != 0) && answer != 0);
                    // What is asked about is told once, and followed by the answer.
                    let names = &asked[1..asked.len() - 1];
                    let story = &told[5 * all.len()..];
                    let places: Vec<usize> = story
                        .windows(names.len())
                        .enumerate()
                        .filter(|(_, it)| *it == names)
                        .map(|(at, _)| at)
                        .collect();
                    assert_eq!(places.len(), 1, "{}", tale.text(called, &all));
                    assert_eq!(story[places[0] + names.len() + 1], answer);
                }
            }
        }
    }

    #[test]
    fn words_of_the_test_are_in_no_glossary_to_learn_from() {
        let mut rng = ChaCha8Rng::seed_from_u64(2);
        let [train, test] =
            [Split::Train, Split::Test].map(|split| Glossary::draw(split, usize::MAX, &mut rng));
        assert_eq!((train.entries.len(), test.entries.len()), (3 * TEST_WORDS, TEST_WORDS));
        let words: HashSet<Word> = train.entries.iter().map(|entry| entry.word).collect();
        assert!(test.entries.iter().all(|entry| !words.contains(&entry.word)));
        let text: HashSet<String> =
            train.entries.iter().chain(&test.entries).map(|entry| entry.word.to_string()).collect();
        assert_eq!(text.len(), 4 * TEST_WORDS, "all spelled in their own way");
    }
}
