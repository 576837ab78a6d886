//! How a text goes on if it goes on as it did before, and how many such guesses pay.

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash, Hasher};

use super::lookup::PromptLookup;
use crate::model::Transformer;

/// Places where the last tokens occurred that are compared, from the latest on.
const COMPARED: usize = 32;

/// A text, and the places in it where its last tokens occurred before, found as matches are in Lempel-Ziv compression
/// (1977): those that end in the same few tokens hang in a chain, the latest first.
///
/// ```text
/// shortest 2     tokens      a b c a b d a b ?
///                places    0 1 2 3 4 5 6 7 8        a b before 8, before that at 5, before that at 2
///                guesses   d a b d a b ..           what followed 5; the end follows on itself
/// ```
#[derive(Debug)]
pub(super) struct Guesser {
    how: PromptLookup,
    cost: Cost,
    text: Vec<u32>,
    /// The latest place before which each run of the shortest length occurred, by its hash.
    latest: HashMap<u64, usize>,
    /// For each place but the first, the one before it in its chain.
    earlier: Vec<Option<usize>>,
    /// The best place that the end of the text is like.
    found: Option<Match>,
    /// How often guesses were right, by the length of the run before them: from the shortest to the longest.
    odds: Vec<Odds>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Match {
    /// Tokens before the place that are the same as at the end of the text, as far as they were compared.
    length: usize,
    place: usize,
}

impl Guesser {
    pub(super) fn new(how: &PromptLookup, cost: Cost, prompt: &[u32]) -> Self {
        let mut guesser = Self {
            how: how.clone(),
            cost,
            text: Vec::with_capacity(prompt.len()),
            latest: HashMap::with_capacity(prompt.len()),
            earlier: Vec::with_capacity(prompt.len()),
            found: None,
            odds: how.lengths().map(Odds::before).collect(),
        };
        let mut chain = None;
        for id in prompt {
            chain = guesser.add(*id);
        }
        guesser.found = guesser.best(chain);
        guesser
    }

    /// Goes on with a token, and learns from it whether the guess was right.
    pub(super) fn push(&mut self, id: u32) {
        if let Some(Match { length, place }) = self.found {
            let right = self.text.get(place) == Some(&id);
            let odds = length.saturating_sub(*self.how.lengths().start());
            self.odds.get_mut(odds).into_iter().for_each(|odds| odds.learn(right));
        }
        let chain = self.add(id);
        self.found = self.best(chain);
    }

    /// Guesses of what comes next, at most so many and as many as promise to pay.
    pub(super) fn draft(&self, most: usize) -> Vec<u32> {
        let Some(Match { length, place }) = self.found else { return Vec::new() };
        let guesses = self.worth(length, most.min(self.how.most()));
        let after = self.text.get(place..).unwrap_or(&[]);
        after.iter().cycle().take(guesses).copied().collect()
    }

    /// Adds a token. Returns the latest place, if any, that the new end may be like.
    fn add(&mut self, id: u32) -> Option<usize> {
        self.text.push(id);
        let end = self.text.len();
        let run = end.checked_sub(*self.how.lengths().start()).and_then(|at| self.text.get(at..));
        let chain = run.and_then(|run| {
            let mut hasher = DefaultHasher::new();
            run.hash(&mut hasher);
            self.latest.insert(hasher.finish(), end)
        });
        self.earlier.push(chain);
        chain
    }

    /// The place in a chain before which most tokens are the same as at the end of the text; of several the latest.
    fn best(&self, chain: Option<usize>) -> Option<Match> {
        let (shortest, longest) = self.how.lengths().into_inner();
        let chain =
            std::iter::successors(chain, |place| *self.earlier.get(place.checked_sub(1)?)?);
        let mut best: Option<Match> = None;
        for place in chain.take(COMPARED) {
            let before = self.text.get(..place).unwrap_or(&[]).iter().rev();
            let same = before.zip(self.text.iter().rev()).take(longest);
            let length = same.take_while(|(a, b)| a == b).count();
            // Less than the shortest where only the hashes are the same.
            if length >= best.map_or(shortest, |best| best.length + 1) {
                best = Some(Match { length, place });
            }
            if length == longest {
                break;
            }
        }
        best
    }

    /// How many guesses after a run of this length promise most tokens in the time of a pass: of a guess it counts
    /// how probable it is that it and those before it are right (Leviathan et al. 2023, section 3.2, with odds that grow
    /// with the run).
    fn worth(&self, length: usize, most: usize) -> usize {
        let shortest = *self.how.lengths().start();
        let last = self.odds.len().saturating_sub(1);
        let (mut right, mut tokens) = (1.0, 1.0);
        let mut best = (0, 1.0);
        for guesses in 1..=most {
            let odds = (length - shortest + guesses - 1).min(last);
            right *= self.odds.get(odds).map_or(0.0, Odds::probability);
            tokens += right;
            let speed = tokens / self.cost.of(guesses);
            if speed > best.1 {
                best = (guesses, speed);
            }
        }
        best.0
    }
}

/// How often guesses were right, of which the last few dozen count most.
#[derive(Clone, Copy, Debug)]
struct Odds {
    right: f64,
    all: f64,
}

impl Odds {
    /// What the last guess counts less with each one after it.
    const FADE: f64 = 0.98;

    /// Those after a run of so many tokens before anything is known: as if a few guesses had come out so.
    fn before(length: usize) -> Self {
        let (length, all) = (length as f64, 8.0);
        Self { right: all * length / (length + 5.0), all }
    }

    fn learn(&mut self, right: bool) {
        self.right = Self::FADE * self.right + f64::from(right);
        self.all = Self::FADE * self.all + 1.0;
    }

    fn probability(&self) -> f64 {
        self.right / self.all
    }
}

/// What a pass over a token and some guesses takes, where one over a token alone takes 1.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cost {
    /// For the first guess, beside what each takes: products of several rows are not those of one row.
    some: f64,
    each: f64,
}

impl Cost {
    /// As measured at `bf16` and in blocks with SmolLM2-135M on two cores with AVX-512 (`benches/README.md`, sequences side by
    /// side). At `f32`, on more cores and on other devices a guess costs less; then some are left out that would have
    /// paid.
    pub(super) fn of_model(transformer: &Transformer) -> Self {
        let bytes = transformer.weight_bytes();
        let numbers = |kind: &str| matches!(kind, "f32" | "bf16" | "f16");
        let (mut dense, mut blocks) = (0, 0);
        for (kind, bytes) in &bytes {
            *(if numbers(kind) { &mut dense } else { &mut blocks }) += bytes;
        }
        match dense >= blocks {
            true => Self { some: 0.3, each: 0.18 },
            false => Self { some: 0.1, each: 0.45 },
        }
    }

    fn of(&self, guesses: usize) -> f64 {
        1.0 + self.some + self.each * guesses as f64
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn guesser(how: &PromptLookup, text: &[u32]) -> Guesser {
        Guesser::new(how, Cost { some: 0.0, each: 0.0 }, text)
    }

    /// By the definition: of all places, that with most tokens in common, up to `longest`; of several the latest.
    fn by_definition(how: &PromptLookup, text: &[u32]) -> Option<Match> {
        let (shortest, longest) = how.lengths().into_inner();
        let length = |place: usize| {
            let same = |n: usize| n <= place && text[place - n..place] == text[text.len() - n..];
            (shortest..=longest).rev().find(|n| same(*n))
        };
        let places = (1..text.len()).filter_map(|place| Some((length(place)?, place)));
        places.max().map(|(length, place)| Match { length, place })
    }

    proptest! {
        /// However a text comes in, its end is like the place that the definition names, and guesses are what followed.
        #[test]
        fn the_longest_and_latest_run_is_found(
            text in prop::collection::vec(0u32..4, 0..30), cut in 0usize..30,
            shortest in 1usize..5, more in 0usize..6, most in 0usize..20,
        ) {
            let how = PromptLookup::default().tokens(15).shortest(shortest).longest(shortest + more);
            let (prompt, answer) = text.split_at(cut.min(text.len()));
            let mut guesser = guesser(&how, prompt);
            answer.iter().for_each(|id| guesser.push(*id));
            let found = by_definition(&how, &text);
            prop_assert_eq!(guesser.found, found);

            // A guess costs nothing here, so that as many come as may.
            let mut expected = text;
            let draft = guesser.draft(most);
            prop_assert_eq!(draft.len(), found.map_or(0, |_| most.min(15)));
            for id in draft {
                let Some(Match { place, .. }) = found else { break };
                let next = expected[place + expected.len() - guesser.text.len()];
                prop_assert_eq!(id, next);
                expected.push(next);
            }
        }

        /// The number of guesses is the best of all by its definition, and no guess is made at a loss.
        #[test]
        fn as_many_guesses_as_pay(
            outcomes in prop::collection::vec((2usize..9, any::<bool>()), 0..60),
            some in 0.0..1.0, each in 0.0..1.0, length in 2usize..9, most in 0usize..16,
        ) {
            let how = PromptLookup::default();
            let mut guesser = Guesser::new(&how, Cost { some, each }, &[]);
            outcomes.iter().for_each(|(length, right)| guesser.odds[length - 2].learn(*right));
            let speed = |guesses: usize| {
                let odds = |at: usize| guesser.odds[(length - 2 + at).min(6)].probability();
                let right = |guesses| (0..guesses).map(odds).product::<f64>();
                let takes = if guesses == 0 { 1.0 } else { 1.0 + some + each * guesses as f64 };
                (0..=guesses).map(right).sum::<f64>() / takes
            };
            let chosen = speed(guesser.worth(length, most));
            prop_assert!(chosen >= 1.0);
            prop_assert!((0..=most).all(|guesses| speed(guesses) <= chosen + 1e-12));
        }
    }

    /// Where every guess is wrong, they end; where every one is right, they become as many as may be.
    #[test]
    fn guesses_follow_what_came_of_them() {
        let (how, cost) = (PromptLookup::default().tokens(15), Cost { some: 0.3, each: 0.18 });
        let phrase = [1, 2, 3, 4, 5, 6];
        let mut right = Guesser::new(&how, cost, &[phrase, phrase].concat());
        (0..120).for_each(|at| right.push(phrase[at % 6]));
        assert_eq!(right.draft(99).len(), 15);
        assert_eq!(right.draft(4), phrase[..4]);

        // Pairs that occur again and again, each time before another token.
        let mut wrong = Guesser::new(&how, cost, &[]);
        let drafts: Vec<usize> = (0..40)
            .map(|at| {
                [1, 2, 10 + at].into_iter().for_each(|id| wrong.push(id));
                [1, 2].into_iter().for_each(|id| wrong.push(id));
                wrong.draft(99).len()
            })
            .collect();
        assert_eq!(drafts.last(), Some(&0));
    }

    /// Of many places only the latest are compared.
    #[test]
    fn a_long_chain_is_not_followed_to_its_end() {
        let how = PromptLookup::default().shortest(1).longest(3);
        let once = [7, 8, 9, 1];
        let text = [once.to_vec(), [5, 9].repeat(COMPARED), vec![7, 8, 9]].concat();
        let found = guesser(&how, &text).found;
        assert_eq!(found, Some(Match { length: 1, place: 4 + 2 * COMPARED }));
        let text = [once.to_vec(), [5, 9].repeat(COMPARED - 1), vec![7, 8, 9]].concat();
        assert_eq!(guesser(&how, &text).found, Some(Match { length: 3, place: 3 }));
    }
}
