//! A story told in the wrong order, and how far a model that thinks about it gets with every pass.
//!
//! ```text
//! cargo run --release --example think
//! cargo run --release --example think -- --hops 12 --seed 7
//! ```
//!
//! Without `--model` this is the small model that comes with the crate. Names and wordings are of the
//! flashback suite's test split (`examples/flashback`): no training story has them.

mod common;
#[path = "flashback/suite/mod.rs"]
mod suite;

use std::io::{Write, stdout};
use std::process::ExitCode;

use clap::Parser;
use hybrid_attention::{Answer, GenerationConfig, HybridModel, Prompt};
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

use crate::suite::{FACTS, LONGEST, Plan, Question, Split, Story};

/// Tell a story in the wrong order and ask about it, after no thought pass, one, two, ...
#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    model: common::ModelArgs,

    /// Facts from the question to the answer, 1 to 12
    #[arg(long, default_value_t = 8, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=LONGEST as i64))]
    hops: u8,

    /// The most passes to try
    #[arg(long, default_value_t = 4, value_name = "N", value_parser = clap::value_parser!(u8).range(0..=64))]
    passes: u8,

    /// Decides the stories
    #[arg(long, default_value_t = 1)]
    seed: u64,

    /// Fresh stories for each length of chain in the table at the end; 0 for no table
    #[arg(long, default_value_t = 20, value_name = "N")]
    stories: usize,
}

fn main() -> ExitCode {
    common::main(|| run(&Cli::parse()))
}

fn run(cli: &Cli) -> common::Result<()> {
    let (model, _) = cli.model.load()?;
    let mut rng = ChaCha8Rng::seed_from_u64(cli.seed);
    let hops = usize::from(cli.hops);
    let story = draw(hops, &mut rng);
    let question = story.question_of(hops).ok_or("no such question")?;
    let text = format!("{}{} …", story.text(), story.ask(question));
    text.lines().try_for_each(|line| writeln!(stdout(), "{}", wrap(line)))?;
    writeln!(stdout())?;
    writeln!(stdout(), "Right is {}, {hops} of {FACTS} facts away.\n", question.answer)?;
    follow(cli, &model, &story, hops)?;
    if cli.stories > 0 {
        examine(cli, &model, &mut rng)?;
    }
    Ok(())
}

/// A story of the test split that holds a chain of `hops` facts.
fn draw(hops: usize, rng: &mut ChaCha8Rng) -> Story {
    Story::draw(&Plan::examination(Split::Test, hops), rng)
}

/// The text in lines that are easily read.
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

/// The answer after each number of passes, and what the pass has changed: how far the thoughts moved,
/// and for which names of the same chain the end is now known.
fn follow(cli: &Cli, model: &HybridModel, story: &Story, hops: usize) -> common::Result<()> {
    let chain = story.chain_of(hops);
    let about = "right about the names 1, 2, … facts from the end";
    writeln!(stdout(), "passes  answer      probability  drift  {about}")?;
    for passes in 0..=usize::from(cli.passes) {
        let (mut said, mut marks) = (None, String::new());
        for question in &chain {
            let answer = ask(model, story, question, passes)?;
            marks.push_str(if is_right(&answer, question) { " ✓" } else { " ·" });
            said = Some(answer); // of the one that is farthest from the end, in the end
        }
        let Some(answer) = said else { continue };
        let probability = answer.logprobs.first().map_or(0.0, |logprob| logprob.exp() * 100.0);
        let drift = answer.drift().last().map_or_else(String::new, |drift| format!("{drift:.2}"));
        let word = first_word(&answer);
        writeln!(stdout(), "{passes:>6}  {word:<10}  {probability:>9.1} %  {drift:>5} {marks}")?;
    }
    Ok(())
}

/// The share of right answers by the length of the chain.
fn examine(cli: &Cli, model: &HybridModel, rng: &mut ChaCha8Rng) -> common::Result<()> {
    const LENGTHS: [usize; 7] = [1, 2, 4, 6, 8, 10, 12];
    let passes = usize::from(cli.passes) + 1;
    writeln!(stdout(), "\nright answers over {} fresh stories each, in percent", cli.stories)?;
    write!(stdout(), "facts  ")?;
    (0..passes).try_for_each(|passes| {
        write!(stdout(), "{passes:>4} {:<6}", if passes == 1 { "pass" } else { "passes" })
    })?;
    writeln!(stdout(), "  a guess")?;
    let bar = common::bar((LENGTHS.len() * cli.stories) as u64, "[{bar:30}] {pos}/{len}");
    for hops in LENGTHS {
        let (mut right, mut chance) = (vec![0; passes], 0.0);
        for _ in 0..cli.stories {
            let story = draw(hops, rng);
            let Some(question) = story.question_of(hops) else { continue };
            for (passes, right) in right.iter_mut().enumerate() {
                *right += usize::from(is_right(&ask(model, &story, question, passes)?, question));
            }
            chance += 1.0 / story.ends as f64;
            bar.inc(1);
        }
        let percent = |count: f64| 100.0 * count / cli.stories as f64;
        write!(stdout(), "{hops:>5}  ")?;
        right
            .iter()
            .try_for_each(|&right| write!(stdout(), "{:>4.0}       ", percent(right as f64)))?;
        writeln!(stdout(), "  {:>7.0}", percent(chance))?;
    }
    bar.finish_and_clear();
    Ok(())
}

/// Thinks about the story with that many passes, as the checkpoint does, and answers the question,
/// which is only read.
fn ask(
    model: &HybridModel,
    story: &Story,
    question: &Question,
    passes: usize,
) -> common::Result<Answer> {
    let prompt = Prompt::default().context(story.text()).plain(story.ask(question));
    let thinking = model.thinking().clone().with_passes(passes);
    let config = GenerationConfig::default().max_tokens(8).thinking(thinking);
    Ok(model.generate(prompt, &config)?)
}

fn is_right(answer: &Answer, question: &Question) -> bool {
    first_word(answer) == question.answer
}

fn first_word(answer: &Answer) -> &str {
    let mut words = answer.text.split(|c: char| !c.is_alphanumeric());
    words.find(|word| !word.is_empty()).unwrap_or("")
}
