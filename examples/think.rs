//! A story told in the wrong order, and how far a model that thinks about it gets with every pass.
//!
//! ```text
//! cargo run --release --example think
//! cargo run --release --example think -- 12 7
//! ```
//!
//! The arguments are the number of facts from the question to the answer, the seed of the story, and the
//! number of fresh stories for each length of chain. The model is the small one that comes with the
//! crate. Names and wordings are from the suite's test split: no training story has them.

#![allow(clippy::print_stdout, reason = "a program")]

use std::error::Error;

use candle_core::Device;
use flashback_suite::{FACTS, LONGEST, Plan, Question, Split, Story};
use hybrid_attention::{Answer, GenerationConfig, HybridModel, Prompt};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

const PASSES: usize = 4;
const LENGTHS: [usize; 7] = [1, 2, 4, 6, 8, 10, 12];

fn main() -> Result<(), Box<dyn Error>> {
    let numbers = std::env::args().skip(1).map(|text| text.parse());
    let numbers = numbers.collect::<Result<Vec<u32>, _>>()?;
    let number = |index, default| numbers.get(index).copied().unwrap_or(default);
    let (hops, seed, stories) = (number(0, 8) as usize, number(1, 1), number(2, 20) as usize);
    if !(1..=LONGEST).contains(&hops) {
        return Err(format!("expected 1 to {LONGEST} facts, got {hops}").into());
    }

    let model = HybridModel::tiny(&Device::Cpu)?;
    let mut rng = ChaCha8Rng::seed_from_u64(seed.into());
    let story = draw(hops, &mut rng);
    let question = story.question_of(hops).ok_or("no such question")?;
    for line in format!("{}{} …", story.text(), story.ask(question)).lines() {
        println!("{}", wrap(line));
    }
    println!("\nRight is {}, {hops} of {FACTS} facts away.\n", question.answer);
    follow(&model, &story, &story.chain_of(hops))?;
    if stories > 0 {
        examine(&model, stories, &mut rng)?;
    }
    Ok(())
}

/// A story of the test split that holds a chain of `hops` facts.
fn draw(hops: usize, rng: &mut ChaCha8Rng) -> Story {
    Story::draw(&Plan::examination(Split::Test, hops), rng)
}

/// Thinks about the story with this many passes, as the checkpoint does, and answers the question, which
/// is only read.
fn ask(
    model: &HybridModel,
    story: &Story,
    question: &Question,
    passes: usize,
) -> hybrid_attention::Result<Answer> {
    let prompt = Prompt::default().context(story.text()).plain(story.ask(question));
    let thinking = model.thinking().clone().passes(passes);
    let config = GenerationConfig::default().max_tokens(8).thinking(thinking);
    model.generate(prompt, &config)
}

/// The answer after each number of passes, and what the last pass changed: how far the thoughts moved,
/// and for which names of the same chain, counted from its end, the end is now known.
fn follow(model: &HybridModel, story: &Story, chain: &[&Question]) -> hybrid_attention::Result<()> {
    println!(
        "passes  answer      probability  drift  right about the names 1, 2, … facts from the end"
    );
    for passes in 0..=PASSES {
        let answers = chain.iter().map(|question| ask(model, story, question, passes));
        let answers = answers.collect::<hybrid_attention::Result<Vec<_>>>()?;
        let right = chain.iter().zip(&answers).map(|(question, answer)| is_right(answer, question));
        let marks: String = right.map(|right| if right { " ✓" } else { " ·" }).collect();
        let Some(farthest) = answers.last() else { continue };
        let probability = farthest.logprobs.first().map_or(0.0, |logprob| logprob.exp() * 100.0);
        let drift = farthest.drift().last().map_or_else(String::new, |drift| format!("{drift:.2}"));
        let word = first_word(farthest);
        println!("{passes:>6}  {word:<10}  {probability:>9.1} %  {drift:>5} {marks}");
    }
    Ok(())
}

/// The share of right answers by the length of the chain.
fn examine(
    model: &HybridModel,
    stories: usize,
    rng: &mut ChaCha8Rng,
) -> hybrid_attention::Result<()> {
    println!("\nright answers over {stories} fresh stories each, in percent");
    let heads = (0..=PASSES)
        .map(|passes| format!("{passes:>4} {:<6}", if passes == 1 { "pass" } else { "passes" }));
    println!("facts  {}  a guess", heads.collect::<String>());
    let percent = |count: f64| 100.0 * count / stories as f64;
    for hops in LENGTHS {
        let (mut right, mut chance) = ([0; PASSES + 1], 0.0);
        for _ in 0..stories {
            let story = draw(hops, rng);
            let Some(question) = story.question_of(hops) else { continue };
            for (passes, right) in right.iter_mut().enumerate() {
                *right += i32::from(is_right(&ask(model, &story, question, passes)?, question));
            }
            chance += 1.0 / story.ends as f64;
        }
        let shares = right.map(|right| format!("{:>4.0}       ", percent(right.into())));
        println!("{hops:>5}  {}  {:>7.0}", shares.concat(), percent(chance));
    }
    Ok(())
}

fn is_right(answer: &Answer, question: &Question) -> bool {
    first_word(answer) == question.answer
}

fn first_word(answer: &Answer) -> &str {
    let mut words = answer.text.split(|c: char| !c.is_alphanumeric());
    words.find(|word| !word.is_empty()).unwrap_or("")
}

/// The text in lines that are easy to read.
fn wrap(text: &str) -> String {
    let mut lines = vec![String::new()];
    for word in text.split(' ') {
        match lines.last_mut() {
            Some(line) if line.is_empty() => line.push_str(word),
            Some(line) if line.len() + word.len() < 100 => *line = format!("{line} {word}"),
            _ => lines.push(word.to_string()),
        }
    }
    lines.join("\n")
}
