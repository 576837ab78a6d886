//! The flashback suite, and the model that comes with the crate and was trained on it.

use std::collections::{HashMap, HashSet};

use candle_core::Device;
use flashback_suite::{LONGEST, Plan, Split, Story, Vocabulary};
use hybrid_attention::{GenerationConfig, HybridModel, Prompt, Thinking, Tokenizer};
use hybrid_attention_testing::Result;
use hybrid_attention_train::score;
use proptest::prelude::*;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

const TINY: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../../src/tiny");

fn plan() -> impl Strategy<Value = (Plan, u64)> {
    let split = prop::sample::select(vec![Split::Train, Split::Test]);
    (split, 1usize..=20, 1usize..=8, 0usize..=12, any::<u64>()).prop_map(
        |(split, facts, longest, one_of, seed)| {
            let one_of = (1..=facts).contains(&one_of).then_some(one_of);
            (Plan { split, facts, longest, one_of }, seed)
        },
    )
}

fn draw((plan, seed): &(Plan, u64)) -> Story {
    Story::draw(plan, &mut ChaCha8Rng::seed_from_u64(*seed))
}

/// The two names of each sentence, as a reader finds them: a thing follows "the", a person has a capital
/// that no sentence begins with.
fn facts(text: &str) -> Vec<(String, String)> {
    let openers = ["The", "Earlier", "Before", "By", "That", "Then"];
    let sentence = |sentence: &str| {
        let words: Vec<&str> = sentence.split([' ', ',']).filter(|word| !word.is_empty()).collect();
        let things = words.windows(2).filter(|pair| pair[0].eq_ignore_ascii_case("the"));
        let things: Vec<&str> = things.map(|pair| pair[1]).collect();
        let people = words.iter().filter(|word| word.starts_with(char::is_uppercase));
        let people: Vec<&str> = people.copied().filter(|word| !openers.contains(word)).collect();
        let names = if people.is_empty() { things } else { people };
        assert_eq!(names.len(), 2, "{sentence:?}");
        (names[0].to_string(), names[1].to_string())
    };
    text.split(". ").map(sentence).collect()
}

proptest! {
    /// Reading the text and putting the facts back together leads to the answer, in as many steps as the
    /// question says, and every name but the ends can be asked about.
    #[test]
    fn the_text_implies_the_answers(drawn in plan()) {
        let story = draw(&drawn);
        let facts = facts(&story.text());
        prop_assert_eq!(facts.len(), drawn.0.facts);
        let next: HashMap<&str, &str> = facts.iter().map(|(a, b)| (a.as_str(), b.as_str())).collect();
        prop_assert_eq!(next.len(), facts.len(), "a name leads to one name only");
        prop_assert_eq!(story.questions.len(), facts.len());
        for question in &story.questions {
            let (mut at, mut hops) = (question.name, 0);
            while let Some(to) = next.get(at) {
                (at, hops) = (to, hops + 1);
            }
            prop_assert_eq!((at, hops), (question.answer, question.hops));
            prop_assert!(story.ask(question).contains(question.name));
        }
        let ends: HashSet<&str> = story.questions.iter().map(|question| question.answer).collect();
        prop_assert_eq!(ends.len(), story.ends);
        if let Some(length) = drawn.0.one_of {
            let chain = story.chain_of(length);
            let hops: Vec<usize> = chain.iter().map(|question| question.hops).collect();
            prop_assert_eq!(hops, (1..=length).collect::<Vec<_>>());
        }
    }

    /// The published tokenizer turns the text into what the training used, and turns that back into the
    /// text.
    #[test]
    fn text_and_tokens_are_the_same(drawn in plan()) {
        let (story, vocabulary) = (draw(&drawn), Vocabulary::default());
        let json = std::fs::read(format!("{TINY}/tokenizer.json"))?;
        let tokenizer = Tokenizer::from_bytes(&json).map_err(|e| TestCaseError::fail(e.to_string()))?;
        let question = &story.questions[0];
        let text = format!("{}{} {}", story.text(), story.ask(question), question.answer);
        let ids = tokenizer.encode(&text, true).map_err(|e| TestCaseError::fail(e.to_string()))?;
        let mut expected = story.ids(&vocabulary);
        expected.extend(story.ask_ids(question, &vocabulary));
        expected.push(story.answer_id(question, &vocabulary));
        prop_assert_eq!(&ids, &expected);
        prop_assert!(ids.iter().all(|&id| id > vocabulary.end()), "no unknown piece");
        prop_assert_eq!(tokenizer.decode(&ids, true), text);
        let names: Vec<u32> = ids.iter().copied().filter(|&id| vocabulary.is_name(id)).collect();
        prop_assert_eq!(&names[..2 * drawn.0.facts], &story.terse_ids(&vocabulary)[..]);
    }
}

/// No name of the test is in a training story, and neither is any of its pairings of opener and verb.
#[test]
fn the_test_is_held_out() {
    let mut seen = [(); 2].map(|()| (HashSet::new(), HashSet::new()));
    for (split, (names, wordings)) in [Split::Train, Split::Test].into_iter().zip(&mut seen) {
        for seed in 0..300 {
            let story = draw(&(Plan { split, facts: 12, longest: 4, one_of: None }, seed));
            for (sentence, (a, b)) in story.text().split(". ").zip(facts(&story.text())) {
                let words = sentence.split(' ');
                let wording = words.map(|word| if word == a || word == b { "_" } else { word });
                wordings.insert(wording.collect::<Vec<_>>().join(" "));
                names.extend([a, b]);
            }
        }
    }
    let [(train_names, train_wordings), (test_names, test_wordings)] = seen;
    assert!(train_names.is_disjoint(&test_names));
    assert!(train_wordings.is_disjoint(&test_wordings));
    assert_eq!((train_names.len(), test_names.len()), (96, 48));
    assert_eq!(train_wordings.len() + test_wordings.len(), 2 * 5 * 6);
}

/// What a person would try first: the model that comes with the crate, on stories that it has never
/// seen, with names that no training story has.
#[test]
fn the_tiny_model_understands_more_with_every_pass() -> Result {
    let model = HybridModel::tiny(&Device::Cpu)?;
    let own = model.thinking().clone();
    let thinking = |passes| own.clone().passes(passes);
    let scores = score(model.thought_model(), thinking, Split::Test, 60, &[0, 1, 2, 4], 77, || ())?;
    let share = |index: usize, length: usize| scores.right[index][length - 1];
    assert!(share(0, 1) > 0.9, "a single fact needs no thinking: {:?}", scores.right);
    assert!(share(3, 8) > 0.9, "four passes put chains of eight together: {:?}", scores.right);
    assert!(share(0, 8) < 0.3, "without a pass they are a guess: {:?}", scores.right);
    for length in [4, 8] {
        let shares: Vec<f64> = (0..4).map(|index| share(index, length)).collect();
        assert!(shares.windows(2).all(|pair| pair[1] > pair[0] - 0.05), "{length}: {shares:?}");
    }
    Ok(())
}

/// Batched scoring and an answer through the public API are the same.
#[test]
fn scores_are_what_generate_answers() -> Result {
    let model = HybridModel::tiny(&Device::Cpu)?;
    let seed = 3;
    let thinking = |passes| model.thinking().clone().passes(passes);
    let scores = score(model.thought_model(), thinking, Split::Test, 8, &[2], seed, || ())?;
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    for hops in 1..=LONGEST {
        let mut right = 0;
        for _ in 0..8 {
            let story = Story::draw(&Plan::examination(Split::Test, hops), &mut rng);
            let question = story.question_of(hops).ok_or("no question")?;
            let prompt = Prompt::default().context(story.text()).plain(story.ask(question));
            let config = GenerationConfig::default().thinking(thinking(2)).max_tokens(1);
            let answer = model.generate(prompt, &config)?;
            right += usize::from(answer.text.split_whitespace().next() == Some(question.answer));
        }
        assert_eq!(scores.right[0][hops - 1], right as f64 / 8.0, "chains of {hops}");
    }
    Ok(())
}

/// The folder loads like any other checkpoint and is the model that is compiled in.
#[test]
fn the_tiny_folder_is_the_tiny_model() -> Result {
    let folder = HybridModel::from_folder(TINY, candle_core::DType::F32, &Device::Cpu)?;
    let compiled = HybridModel::tiny(&Device::Cpu)?;
    assert_eq!(
        serde_json::to_value(folder.thinking())?,
        serde_json::to_value(compiled.thinking())?
    );
    assert_eq!(folder.eos_ids(), compiled.eos_ids());
    let story = draw(&(Plan { split: Split::Test, facts: 9, longest: 5, one_of: None }, 4));
    let prompt = || Prompt::default().context(story.text()).plain(story.ask(&story.questions[0]));
    for thinking in [Thinking::none(), folder.thinking().clone()] {
        let config = GenerationConfig::default().thinking(thinking).max_tokens(3);
        let (a, b) = (folder.generate(prompt(), &config)?, compiled.generate(prompt(), &config)?);
        assert_eq!((a.text, a.ids, a.logprobs), (b.text, b.ids, b.logprobs));
    }
    assert!(std::fs::metadata(format!("{TINY}/model.safetensors"))?.len() < 4_000_000);
    Ok(())
}
