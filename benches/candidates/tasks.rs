//! What is asked, and how answers are marked.

use std::collections::HashMap;
use std::path::Path;

use candle_core::{DType, Device};
use flashback_suite::{LONGEST, Plan, Split, Story};
use hybrid_attention::generate::Extract;
use hybrid_attention::refine::Interpolate;
use hybrid_attention::statistics::{Example, Fingerprint, Key, KeyConfig, states};
use hybrid_attention::{HybridModel, Message, Prompt, Thinking};
use hybrid_attention_testing::smollm2;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;
use serde_json::Value;

use crate::Result;

/// A chain longer than any that the small model learned, where it errs.
const HOPS: usize = LONGEST;

/// Tokens of a passage that are the prompt, and of those that follow.
const HALF: usize = 64;

/// Questions among which the others of the file are passed over.
const QUESTIONS: usize = 240;

/// Passages that are asked for at most; a key is fitted to the others.
const PASSAGES: usize = 200;

/// Items of one kind, and the settings that all ways to choose among answers to them have in common.
pub(crate) struct Task {
    pub(crate) name: &'static str,
    pub(crate) figure: &'static str,
    pub(crate) model: HybridModel,
    pub(crate) items: Vec<Item>,
    /// How thoughts are thought, before noise.
    pub(crate) thinking: Thinking,
    /// Whether the model thinks anyway.
    pub(crate) thinks: bool,
    pub(crate) extract: Extract,
    pub(crate) temperature: f64,
    pub(crate) max_tokens: usize,
    pub(crate) every: usize,
    /// As many whole answers take as many tokens as candidates of which the worst are dropped.
    pub(crate) whole: usize,
    pub(crate) key: Option<Key>,
    /// Deviations of the noise that thoughts begin with, as shares of each vector's length.
    pub(crate) noise: &'static [f64],
    /// How many items are run way by way.
    pub(crate) timed: usize,
}

pub(crate) struct Item {
    pub(crate) prompt: Prompt,
    right: Right,
}

enum Right {
    /// What is extracted from a right answer.
    Is(Extract, String),
    /// How the text goes on in truth.
    GoesOn(String),
}

impl Item {
    /// 1 for a right answer and 0 for any other; of a text that goes on, the F measure of its words.
    pub(crate) fn mark(&self, text: &str) -> f64 {
        match &self.right {
            Right::Is(extract, right) => f64::from(extract.find(text).as_ref() == Some(right)),
            Right::GoesOn(truth) => overlap(text, truth),
        }
    }
}

/// How many words two texts have in common: the harmonic mean of their shares (ROUGE-1, Lin 2004).
fn overlap(a: &str, b: &str) -> f64 {
    let words = |text: &str| Extract::Words.find(text).unwrap_or_default();
    let (a, b) = (words(a), words(b));
    let mut left = HashMap::<&str, usize>::new();
    b.split_whitespace().for_each(|word| *left.entry(word).or_default() += 1);
    let mut common = 0.0;
    for word in a.split_whitespace() {
        if let Some(left) = left.get_mut(word).filter(|left| **left > 0) {
            *left -= 1;
            common += 1.0;
        }
    }
    let all = (a.split_whitespace().count() + b.split_whitespace().count()) as f64;
    if all == 0.0 { 0.0 } else { 2.0 * common / all }
}

impl Task {
    pub(crate) fn flashback(items: usize) -> Result<Self> {
        let model = HybridModel::tiny(&Device::Cpu)?;
        let mut rng = ChaCha8Rng::seed_from_u64(16);
        let mut all = Vec::new();
        for _ in 0..items {
            let story = Story::draw(&Plan::examination(Split::Test, HOPS), &mut rng);
            let question = story.question_of(HOPS).ok_or("no such question")?;
            let prompt = Prompt::default().context(story.text()).plain(story.ask(question));
            let right = Right::Is(Extract::FirstWord, question.answer.to_lowercase());
            all.push(Item { prompt, right });
        }
        Ok(Self {
            name: "flashback",
            figure: "right answers",
            thinking: model.thinking().clone(),
            thinks: true,
            model,
            items: all,
            extract: Extract::FirstWord,
            temperature: 1.0,
            max_tokens: 3,
            every: 1,
            whole: 10, // 16 + 8 + 4 tokens
            key: None,
            noise: &[0.1, 0.2],
            timed: items,
        })
    }

    /// Lines of `{"passage": .., "question": .., "answer": ..}`, whose answers begin with a number.
    pub(crate) fn questions(file: &Path, items: usize) -> Result<Self> {
        let mut all = Vec::new();
        for line in std::fs::read_to_string(file)?.lines() {
            let json: Value = serde_json::from_str(line)?;
            let of = |key: &str| json[key].as_str().unwrap_or_default().trim();
            let first = of("answer").split_whitespace().next().unwrap_or_default();
            let Some(right) = Extract::LastNumber.find(first) else { continue };
            let text = format!("{} {}", of("passage"), of("question"));
            let prompt = Prompt::chat(&[Message::user(text)]);
            all.push(Item { prompt, right: Right::Is(Extract::LastNumber, right) });
        }
        // Some from everywhere, as they are in the order of their kinds, and the same ones however many are asked for.
        let step = (all.len() / QUESTIONS).max(1);
        let all: Vec<Item> = all.into_iter().step_by(step).take(items).collect();
        Ok(Self {
            name: "questions",
            figure: "right answers",
            extract: Extract::LastNumber,
            temperature: 0.7,
            max_tokens: 48,
            every: 6,
            whole: 4, // 6 (16 + 8 + 4 + 2) + 24 tokens, of 48 each
            ..Self::of_smollm2(all)?
        })
    }

    /// A text a line, of which those that are too short are left out; the key is fitted to those that are not asked for.
    pub(crate) fn passages(file: &Path, items: usize) -> Result<Self> {
        let mut task = Self::of_smollm2(Vec::new())?;
        let tokenizer = task.model.tokenizer().ok_or("no tokenizer")?;
        let text = std::fs::read_to_string(file)?;
        let (mut all, mut examples) = (Vec::new(), Vec::new());
        for line in text.lines() {
            let ids = tokenizer.encode(line.trim(), true)?;
            let (Some(first), Some(second)) = (ids.get(..HALF), ids.get(HALF..2 * HALF)) else {
                continue;
            };
            if all.len() < PASSAGES {
                let right = Right::GoesOn(tokenizer.decode(second, true));
                all.push(Item { prompt: first.into(), right });
            } else {
                let of = |ids| states(task.model.transformer(), ids, 0);
                examples.push(Example { input: of(first)?, output: of(second)? });
            }
        }
        let (config, model) = (KeyConfig::default(), task.model.transformer());
        if examples.len() >= 2 * config.folds {
            let key = Key::fit(&examples, &config, Fingerprint::of(model)?)?;
            eprintln!(
                "[key: R² {:.3} of means, {:.3} of variances]",
                key.mean_r2(),
                key.variance_r2()
            );
            task.key = Some(key.insist());
        }
        all.truncate(items);
        task.items = all;
        Ok(task)
    }

    fn of_smollm2(items: Vec<Item>) -> Result<Self> {
        let path = smollm2().ok_or("no SmolLM2: the README fetches it")?;
        Ok(Self {
            name: "passages",
            figure: "words in common with what follows",
            model: HybridModel::from_gguf(path, DType::BF16, &Device::Cpu)?,
            items,
            // What thinks is the noise: weights that were not trained to think lose by passes, so that nothing of
            // this one is taken, and it is as short as can be.
            thinking: Thinking::new(1).span(0..1).refine(Interpolate::new(0.0)),
            thinks: false,
            extract: Extract::Words,
            temperature: 0.7,
            max_tokens: HALF,
            every: 8,
            whole: 4, // 8 (16 + 8 + 4 + 2) + 32 tokens, of 64 each
            key: None,
            noise: &[0.2],
            timed: 8,
        })
    }
}
