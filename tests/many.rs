//! Answers side by side: each is the one that its prompt gets alone, to the last bit, whatever runs beside
//! it, however little memory there is and whatever happens to the others.

mod common;

use std::collections::BTreeMap;
use std::time::Duration;

use candle_core::{DType, Device, Tensor};
use hybrid_attention::model::{KvPool, Transformer};
use hybrid_attention::refine::{Interpolate, OutputNudge};
use hybrid_attention::thought::Trace;
use hybrid_attention::{
    Answer, Answers, Cancel, Config, Error, GenerationConfig, Halt, HandOff, HybridModel, Message,
    Prompt, Thinking,
};
use proptest::prelude::*;

use common::Result;
use common::tiny;

/// What came of a prompt, without the time it took: all of it to the last bit.
#[derive(Clone, Debug, PartialEq)]
struct Came {
    prompt_ids: Vec<u32>,
    ids: Vec<u32>,
    text: String,
    logprobs: Vec<u32>,
    top_logprobs: Vec<Vec<(u32, u32)>>,
    prompt_logprobs: Option<Vec<Option<u32>>>,
    stop: String,
    traces: Vec<(usize, Vec<u64>, String)>,
}

impl From<Answer> for Came {
    fn from(answer: Answer) -> Self {
        let top = |top: &Vec<(u32, f32)>| top.iter().map(|(id, it)| (*id, it.to_bits())).collect();
        let trace = |trace: &Trace| {
            let drift = trace.drift().into_iter().map(f64::to_bits).collect();
            (trace.tokens, drift, format!("{:?}", trace.halted))
        };
        Self {
            logprobs: answer.logprobs.iter().map(|it| it.to_bits()).collect(),
            top_logprobs: answer.top_logprobs.iter().map(top).collect(),
            prompt_logprobs: answer
                .prompt_logprobs
                .map(|all| all.into_iter().map(|it| it.map(f32::to_bits)).collect()),
            stop: format!("{:?}", answer.stop),
            traces: answer.traces.iter().map(trace).collect(),
            prompt_ids: answer.prompt_ids,
            ids: answer.ids,
            text: answer.text,
        }
    }
}

/// An answer, or what an error says.
type Outcome = std::result::Result<Came, String>;

fn outcome(answer: hybrid_attention::Result<Answer>) -> Outcome {
    answer.map(Came::from).map_err(|error| error.to_string())
}

fn alone(model: &HybridModel, prompts: &[Prompt], config: &GenerationConfig) -> Vec<Outcome> {
    prompts.iter().map(|prompt| outcome(model.generate(prompt.clone(), config))).collect()
}

/// All outcomes in the order of the prompts; fails unless each came once, and as many were left as said.
fn collected(mut answers: Answers, count: usize) -> Result<Vec<Outcome>> {
    let mut all = BTreeMap::new();
    assert_eq!(answers.left(), count);
    while let Some((index, answer)) = answers.next() {
        assert_eq!(all.insert(index, outcome(answer)), None, "{index} came twice");
        assert_eq!(answers.left(), count - all.len());
    }
    assert!(all.keys().copied().eq(0..count), "{:?}", all.keys());
    assert!(answers.next().is_none() && answers.left() == 0);
    Ok(all.into_values().collect())
}

/// THE assertion: side by side is alone.
fn check(
    name: &str,
    model: &HybridModel,
    prompts: &[Prompt],
    config: &GenerationConfig,
    widths: &[usize],
) -> Result {
    let expected = alone(model, prompts, config);
    for &width in widths {
        let answers = model.generate_many(prompts.to_vec(), config)?.side_by_side(width);
        let got = collected(answers, prompts.len())?;
        for (index, (got, expected)) in got.iter().zip(&expected).enumerate() {
            assert_eq!(got, expected, "{name}: prompt {index}, {width} side by side");
        }
    }
    Ok(())
}

/// Texts of about `4 * sentences` tokens that the tiny model has words for.
fn story(seed: usize, sentences: usize) -> String {
    let (things, places) =
        (["coin", "ball", "ring", "key", "egg"], ["jar", "chest", "box", "cart", "tent", "bag"]);
    let sentence = |at: usize| {
        let (thing, place) = (things[(seed + at) % 5], places[(seed + 2 * at) % 6]);
        format!("The {thing} is in the {place}.")
    };
    (0..sentences).map(sentence).collect::<Vec<_>>().join(" ")
}

/// Of all lengths, some of them twice.
fn stories() -> Vec<Prompt> {
    let mut prompts: Vec<Prompt> = [1, 6, 2, 24, 1, 9, 3, 40, 5, 2, 14, 4, 8, 1, 30, 7, 2, 3, 1]
        .iter()
        .enumerate()
        .map(|(seed, sentences)| Prompt::from(story(seed, *sentences).as_str()))
        .collect();
    prompts.push(Prompt::from("Leo gave everything to Ida."));
    prompts.push(Prompt::from([11u32, 150, 12]));
    prompts.push(Prompt::default().context(story(3, 4)).plain(" Earlier, the ball is in the jar."));
    prompts.push(Prompt::default().plain(story(4, 4)).context_ids(&[11, 150, 12]));
    prompts
}

#[test]
fn every_way_to_draw_is_as_alone() -> Result {
    let model = HybridModel::tiny(&Device::Cpu)?;
    let plain = GenerationConfig::default().max_tokens(20).thinking(Thinking::none());
    let sampled = plain.clone().temperature(0.9).seed(5);
    for (name, config) in [
        ("greedy", plain.clone()),
        ("on and on", plain.clone().eos_ids([])),
        ("sampled", sampled.clone().eos_ids([])),
        ("sampled of few", sampled.clone().top_p(0.8).top_k(9).min_p(0.01).eos_ids([])),
        (
            "penalties",
            sampled.repetition_penalty(1.2).frequency_penalty(0.5).presence_penalty(-0.3),
        ),
        ("stops", plain.clone().eos_ids([]).stop("jar").stop(". The").stop_id(44)),
        ("logprobs", plain.clone().top_logprobs(4).prompt_logprobs(true)),
        ("nothing", plain.clone().max_tokens(0).prompt_logprobs(true)),
        ("one", plain.max_tokens(1)),
    ] {
        check(name, &model, &stories(), &config, &[1, 3, 8, Answers::MOST])?;
    }
    Ok(())
}

#[test]
fn every_number_side_by_side_is_as_alone() -> Result {
    let model = HybridModel::tiny(&Device::Cpu)?;
    let config = GenerationConfig::default().max_tokens(9).eos_ids([]).thinking(Thinking::none());
    let widths: Vec<_> = (1..=Answers::MOST).chain([0, 99, usize::MAX]).collect();
    check("widths", &model, &stories(), &config, &widths)?;
    let none: Vec<Prompt> = Vec::new();
    assert_eq!(collected(model.generate_many(none, &config)?, 0)?, []);
    Ok(())
}

#[test]
fn every_way_to_think_is_as_alone() -> Result {
    let model = HybridModel::tiny(&Device::Cpu)?;
    let own = GenerationConfig::default().max_tokens(12).eos_ids([]);
    let passes = || Thinking::new(2).span(1..3).refine(Interpolate::new(0.3));
    for (name, thinking) in [
        ("refined", passes()),
        ("key-value", passes().hand_off(HandOff::KeyValue)),
        ("mixed", passes().hand_off(HandOff::Mixed { weight: 0.3 })),
        ("halting", passes().passes(6).halt(Halt::Drift(0.2))),
        ("re-thinking", passes().rethink_every(4)),
        ("re-thinking each token", passes().rethink_every(1).hand_off(HandOff::KeyValue)),
        (
            "re-thinking a mixture",
            passes().rethink_every(5).hand_off(HandOff::Mixed { weight: 0.3 }),
        ),
        ("output nudge", Thinking::none().output_nudge(OutputNudge::new(2))),
        ("output nudge of thoughts", passes().output_nudge(OutputNudge::new(2)).rethink_every(6)),
    ] {
        let config = own.clone().thinking(thinking).prompt_logprobs(name == "refined");
        check(name, &model, &stories(), &config, &[2, 7])?;
    }
    // As the checkpoint says, and drawn.
    check("its own", &model, &stories(), &own, &[5])?;
    check("its own, drawn", &model, &stories(), &own.temperature(1.1).seed(9), &[Answers::MOST])
}

/// Random models under a window, with caches of any type, some answers up to the end of the context.
#[test]
fn every_cache_is_as_alone() -> Result {
    for (sliding_window, dtype) in
        [(None, DType::F32), (Some(5), DType::F32), (Some(110), DType::BF16), (None, DType::F16)]
    {
        let config = Config {
            sliding_window,
            max_position_embeddings: 240,
            vocab_size: 50,
            ..tiny::config()
        };
        let model = tiny::hybrid(&config, 3)?.with_cache_dtype(dtype)?;
        let lengths = [1, 95, 96, 97, 230, 3, 240, 190, 40, 239, 12];
        let prompts: Vec<_> = lengths
            .iter()
            .enumerate()
            .map(|(seed, length)| {
                Prompt::from(tiny::tokens(&config, seed as u64, *length).as_slice())
            })
            .collect();
        let how = GenerationConfig::default().max_tokens(30);
        check("greedy", &model, &prompts, &how, &[4, Answers::MOST])?;
        check("drawn", &model, &prompts, &how.clone().temperature(1.0).seed(2), &[7])?;
        let thinking = Thinking::new(2).span(1..3).rethink_every(7);
        check("thinking", &model, &prompts, &how.thinking(thinking), &[6])?;
    }
    Ok(())
}

// ---- what goes wrong ----

/// A prompt that cannot be answered is an error in its own place, the one it gets alone.
#[test]
fn a_bad_prompt_is_its_own_error() -> Result {
    let model = HybridModel::tiny(&Device::Cpu)?;
    let bad: Vec<Prompt> = vec![
        Prompt::from(<[u32; 0]>::default()),
        Prompt::from([11, 183]),
        Prompt::from([11, 5, u32::MAX, 200].as_slice()),
        Prompt::from(vec![11u32; 513]),
        Prompt::chat(&[Message::user("Where is the coin?")]),
        Prompt::chat(&[]),
        Prompt::from(""),
    ];
    let mut prompts = stories();
    for (at, bad) in bad.into_iter().enumerate() {
        prompts.insert((3 * at) % prompts.len(), bad);
    }
    for thinking in [Thinking::none(), Thinking::new(2).span(1..3)] {
        let config = GenerationConfig::default().max_tokens(6).thinking(thinking);
        let expected = alone(&model, &prompts, &config);
        assert!(expected.iter().filter(|it| it.is_err()).count() >= 5, "{expected:?}");
        check("bad among good", &model, &prompts, &config, &[1, 2, 8])?;
    }
    // What is wrong for all is said at once.
    let refused = |config: &GenerationConfig| model.generate_many(stories(), config).map(drop);
    for config in [
        GenerationConfig::default().temperature(-1.0),
        GenerationConfig::default().thinking(Thinking::new(1).span(3..9)),
        GenerationConfig::default().stop(""),
    ] {
        assert!(matches!(refused(&config), Err(Error::Parameter { .. })), "{config:?}");
    }
    let without_words = tiny::hybrid(&tiny::config(), 1)?;
    let prompts = [Prompt::from("words"), Prompt::from([1u32, 2]), Prompt::from("more words")];
    let config = GenerationConfig::default().max_tokens(4);
    check("without a tokenizer", &without_words, &prompts, &config, &[3])?;
    // A stop string needs a tokenizer for every prompt, and each of them says so.
    check("a stop", &without_words, &prompts, &config.stop("x"), &[3])
}

/// Numbers that overflow in one answer, at its prompt or later, do so in no other.
#[test]
fn numbers_that_overflow_are_those_of_one_answer() -> Result {
    let config = Config { vocab_size: 50, ..tiny::config() };
    let weights = tiny::weights(&config, 6)?;
    let sound = HybridModel::new(Transformer::new(&config, &mut weights.clone())?, None)?;
    let prompts: Vec<_> = (0..10)
        .map(|seed| Prompt::from(tiny::tokens(&config, seed, 3 + 9 * seed as usize).as_slice()))
        .collect();
    let how = GenerationConfig::default().max_tokens(16);
    let mut broken_at = Vec::new();
    for index in 0..prompts.len() {
        // The token that this answer says third is one whose embedding overflows.
        let said = sound.generate(prompts[index].clone(), &how)?.ids[2];
        let table = "model.embed_tokens.weight";
        let mut rows: Vec<Vec<f32>> = weights[table].to_vec2()?;
        rows[said as usize].fill(f32::INFINITY);
        let mut weights = weights.clone();
        weights.insert(table.into(), Tensor::new(rows, &Device::Cpu)?);
        let model = HybridModel::new(Transformer::new(&config, &mut weights)?, None)?;
        let expected = alone(&model, &prompts, &how);
        broken_at.push(expected.iter().filter(|it| it.is_err()).count());
        check("overflow", &model, &prompts, &how, &[1, 4, Answers::MOST])?;
    }
    // Some stay sound beside some that do not.
    assert!(broken_at.iter().any(|broken| (1..prompts.len()).contains(broken)), "{broken_at:?}");
    Ok(())
}

/// Little memory: answers give way and are begun anew, and nothing of that can be seen.
#[test]
fn a_tight_budget_changes_no_answer() -> Result {
    let config = Config { vocab_size: 50, max_position_embeddings: 400, ..tiny::config() };
    let ample = tiny::hybrid(&config, 7)?;
    let per_block = 2 * config.num_key_value_heads * KvPool::BLOCK * config.head_dim * 4;
    let block = per_block * config.num_hidden_layers;
    // Most begin in one block and end in two.
    let lengths = [90, 85, 3, 95, 94, 60, 92, 96, 88, 1, 93, 80];
    let prompts: Vec<_> = lengths
        .iter()
        .enumerate()
        .map(|(seed, length)| Prompt::from(tiny::tokens(&config, seed as u64, *length).as_slice()))
        .collect();
    let plain = GenerationConfig::default().max_tokens(25);
    let passes = || Thinking::new(2).span(1..3);
    for (name, how) in [
        ("plain", plain.clone()),
        ("drawn", plain.clone().temperature(0.8).seed(3)),
        ("thinking", plain.clone().thinking(passes())),
        ("re-thinking", plain.clone().thinking(passes().rethink_every(5))),
        (
            "re-thinking key-value",
            plain.clone().thinking(passes().rethink_every(4).hand_off(HandOff::KeyValue)),
        ),
        ("output nudge", plain.thinking(Thinking::none().output_nudge(OutputNudge::new(2)))),
    ] {
        let expected = alone(&ample, &prompts, &how);
        assert!(expected.iter().all(Outcome::is_ok));
        // Room for one whole answer, for a little more, for several.
        for blocks in [2, 3, 4, 7] {
            let model = ample.with_cache_budget(blocks * block)?;
            assert_eq!(alone(&model, &prompts, &how), expected, "{name}, alone");
            for width in [1, 3, 8, Answers::MOST] {
                let answers = model.generate_many(prompts.clone(), &how)?.side_by_side(width);
                let got = collected(answers, prompts.len())?;
                for (index, (got, expected)) in got.iter().zip(&expected).enumerate() {
                    assert_eq!(got, expected, "{name}: {index}, {width} in {blocks} blocks");
                }
            }
        }
        // Too little for those that grow beyond a block, which is an error in their place, and no other.
        let model = ample.with_cache_budget(block)?;
        let fit: Vec<_> = alone(&model, &prompts, &how).iter().map(Outcome::is_ok).collect();
        assert!(fit.contains(&true) && fit.contains(&false), "{name}: {fit:?}");
        for width in [1, 5] {
            let answers = model.generate_many(prompts.clone(), &how)?.side_by_side(width);
            for (index, got) in collected(answers, prompts.len())?.into_iter().enumerate() {
                match got {
                    Ok(got) => assert_eq!(Ok(&got), expected[index].as_ref(), "{name}: {index}"),
                    Err(error) => {
                        assert!(
                            !fit[index] && error.starts_with("key-value pool full"),
                            "{name}: {error}"
                        );
                    }
                }
            }
        }
    }
    Ok(())
}

#[test]
fn what_is_cancelled_ends() -> Result {
    let model = HybridModel::tiny(&Device::Cpu)?;
    let prompts = stories();
    for thinking in [Thinking::none(), Thinking::new(2).span(1..3).rethink_every(4)] {
        let config = GenerationConfig::default().max_tokens(30).eos_ids([]).thinking(thinking);
        let expected = alone(&model, &prompts, &config);
        for after in [0, 1, 5] {
            let cancel = Cancel::default();
            let answers = model.generate_many(prompts.clone(), &config)?.side_by_side(4);
            let mut answers = answers.cancel(cancel.clone());
            let mut seen = Vec::new();
            for _ in 0..after {
                let (index, answer) = answers.next().ok_or("an end")?;
                assert_eq!(outcome(answer), expected[index]);
                seen.push(index);
            }
            cancel.cancel();
            for (index, answer) in &mut answers {
                // Those that had ended before are given all the same.
                match answer {
                    Ok(answer) => assert_eq!(Ok(answer.into()), expected[index]),
                    Err(error) => assert!(matches!(error, Error::Cancelled), "{error}"),
                }
                seen.push(index);
            }
            seen.sort_unstable();
            assert!(seen.into_iter().eq(0..prompts.len()), "each once");
            assert_eq!(answers.left(), 0);
        }
        // A time that is up.
        let answers = model.generate_many(prompts.clone(), &config)?;
        for (_, answer) in answers.cancel(Cancel::after(Duration::ZERO)) {
            assert!(matches!(answer, Err(Error::Cancelled)), "{answer:?}");
        }
        // Dropping them gives all memory back.
        let model = model.with_cache_budget(1 << 22)?;
        let mut answers = model.generate_many(prompts.clone(), &config)?;
        answers.next();
        drop(answers);
        let conversation = model.conversation(8)?;
        assert_eq!(conversation.cache().pool().used_bytes(), 0);
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn any_answers_are_as_alone(
        lengths in prop::collection::vec(1usize..130, 1..14), width in 1usize..17,
        max_tokens in 0usize..40, window in prop::option::of(1usize..60), tied: bool,
        seed in prop::option::of(0u64..100), blocks in prop::option::of(2usize..9),
        dtype in prop::sample::select(&[DType::F32, DType::BF16, DType::F16][..]),
        passes in 0usize..3, rethink in 0usize..6,
    ) {
        let run = || -> Result {
            let config = Config { sliding_window: window, tie_word_embeddings: tied, ..tiny::config() };
            let mut model = tiny::hybrid(&config, 8)?.with_cache_dtype(dtype)?;
            if let Some(blocks) = blocks {
                let positions = 2 * config.num_key_value_heads * KvPool::BLOCK * config.num_hidden_layers;
                let bytes = positions * config.head_dim * dtype.size_in_bytes();
                model = model.with_cache_budget(blocks * bytes)?;
            }
            let prompts: Vec<_> = (0..)
                .zip(&lengths)
                .map(|(seed, length)| Prompt::from(tiny::tokens(&config, seed, *length).as_slice()))
                .collect();
            let thinking = Thinking::new(passes).rethink_every(rethink);
            let how = GenerationConfig::default().max_tokens(max_tokens).thinking(thinking);
            let how = match seed {
                Some(seed) => how.temperature(1.0).seed(seed),
                None => how,
            };
            check("random", &model, &prompts, &how, &[width])
        };
        tiny::holds(run())?;
    }
}
