//! What is sampled: transformers' own distributions, the OpenAI formula, and log-probabilities.

use std::collections::{HashMap, HashSet};
use std::error::Error;
use std::fs;

use candle_core::{D, DType, Device, Tensor};
use candle_nn::ops::log_softmax;
use hybrid_attention::generate::Sampler;
use hybrid_attention::model::{Batch, Pass, Transformer};
use hybrid_attention::{Config, GenerationConfig, HybridModel};
use proptest::prelude::*;
use serde::Deserialize;

type Result<T = ()> = std::result::Result<T, Box<dyn Error>>;

const FIXTURE: &str =
    concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/sampling/distributions.json");

#[derive(Deserialize)]
struct Fixture {
    prompt: Vec<u32>,
    logits: Vec<Vec<f32>>,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    logits: usize,
    settings: Settings,
    expected: HashMap<u32, f64>,
}

#[derive(Debug, Deserialize)]
struct Settings {
    temperature: f64,
    top_k: usize,
    top_p: f64,
    min_p: f64,
    repetition_penalty: f64,
}

impl Settings {
    fn config(&self) -> GenerationConfig {
        GenerationConfig::default()
            .temperature(self.temperature)
            .top_k(self.top_k)
            .top_p(self.top_p)
            .min_p(self.min_p)
            .repetition_penalty(self.repetition_penalty)
    }
}

fn fixture() -> Result<Fixture> {
    Ok(serde_json::from_str(&fs::read_to_string(FIXTURE)?)?)
}

#[test]
fn distributions_are_those_of_transformers() -> Result {
    let fixture = fixture()?;
    for Case { logits, settings, expected } in &fixture.cases {
        let sampler = Sampler::new(&settings.config(), &fixture.prompt)?;
        let got = sampler.distribution(&fixture.logits[*logits])?;
        let support: HashSet<u32> = got.iter().map(|(id, _)| *id).collect();
        assert_eq!(support, expected.keys().copied().collect(), "{settings:?}");
        for (id, probability) in &got {
            let expected = expected[id];
            assert!((probability - expected).abs() < 1e-6, "{settings:?} {id}: {probability}");
        }
    }
    assert_eq!(fixture.cases.len(), 70);
    Ok(())
}

#[test]
fn temperature_0_is_the_limit_of_small_temperatures() -> Result {
    let fixture = fixture()?;
    for logits in &fixture.logits {
        let at = |temperature| {
            let config = GenerationConfig::default().temperature(temperature);
            Sampler::new(&config, &[])?.distribution(logits)
        };
        let greedy = at(0.0)?;
        assert_eq!(greedy.len(), 1);
        assert_eq!(at(1e-6)?, greedy);
        assert_eq!(at(f64::MIN_POSITIVE)?, greedy);
    }
    Ok(())
}

/// `logit - count * frequency - (count > 0) * presence`, the prompt not counted.
#[test]
fn frequency_and_presence_follow_the_openai_formula() -> Result {
    let logits = [1.0f32, 2.0, -0.5, 3.0, 0.25, -4.0];
    for (frequency, presence) in [(0.5, 0.0), (0.0, 1.5), (0.3, 0.7), (-2.0, 2.0), (2.0, -2.0)] {
        let config = GenerationConfig::default()
            .temperature(1.0)
            .frequency_penalty(frequency)
            .presence_penalty(presence)
            .seed(3);
        let mut sampler = Sampler::new(&config, &[0, 0, 1, 5])?;
        let mut counts = [0.0f64; 6];
        for _ in 0..12 {
            let changed: Vec<f64> = logits
                .iter()
                .zip(counts)
                .map(|(logit, count)| {
                    f64::from(*logit) - count * frequency - f64::from(count > 0.0) * presence
                })
                .collect();
            let sum: f64 = changed.iter().map(|logit| logit.exp()).sum();
            for (id, probability) in sampler.distribution(&logits)? {
                let expected = changed[id as usize].exp() / sum;
                assert!((probability - expected).abs() < 1e-12, "{id}: {probability} {expected}");
            }
            counts[sampler.sample(&logits)? as usize] += 1.0;
        }
    }
    Ok(())
}

/// Each token's count is binomial: 5 standard deviations are met by chance once in 10⁶.
#[test]
fn draws_follow_the_distribution() -> Result {
    const DRAWS: usize = 20_000;
    let fixture = fixture()?;
    for case in fixture.cases.iter().filter(|case| case.expected.len() > 2).step_by(5) {
        // The penalty would change the distribution from draw to draw.
        let config = case.settings.config().repetition_penalty(1.0).seed(11);
        let logits = &fixture.logits[case.logits];
        let mut sampler = Sampler::new(&config, &[])?;
        let distribution = sampler.distribution(logits)?;
        let mut counts: HashMap<u32, usize> = HashMap::new();
        for _ in 0..DRAWS {
            *counts.entry(sampler.sample(logits)?).or_default() += 1;
        }
        let n = DRAWS as f64;
        for (id, p) in &distribution {
            let count = counts.remove(id).unwrap_or(0) as f64;
            let spread = 5.0 * (n * p * (1.0 - p)).sqrt() + 1.0;
            assert!((count - n * p).abs() < spread, "{:?} {id}: {count} of {}", config, n * p);
        }
        assert!(counts.is_empty(), "drawn outside the support: {counts:?}");
    }
    Ok(())
}

fn draws(config: &GenerationConfig, logits: &[f32]) -> Result<Vec<u32>> {
    let mut sampler = Sampler::new(config, &[1])?;
    Ok((0..40).map(|_| sampler.sample(logits)).collect::<hybrid_attention::Result<_>>()?)
}

#[test]
fn a_seed_decides_the_tokens() -> Result {
    let logits = &fixture()?.logits[0];
    let config = GenerationConfig::default().temperature(1.0);
    let seeded: Vec<Vec<u32>> =
        (0..8).map(|seed| draws(&config.clone().seed(seed), logits)).collect::<Result<_>>()?;
    for (seed, tokens) in (0..).zip(&seeded) {
        assert_eq!(&draws(&config.clone().seed(seed), logits)?, tokens);
    }
    assert_eq!(seeded.iter().collect::<HashSet<_>>().len(), 8, "every seed is another text");
    assert_ne!(draws(&config, logits)?, draws(&config, logits)?, "no seed is a new one each time");
    Ok(())
}

proptest! {
    /// Taking the likeliest by its logit is what the distribution says, ties and errors included.
    #[test]
    fn the_likeliest_is_that_of_the_distribution(
        logits in prop::collection::vec(
            prop_oneof![
                4 => prop::sample::select(vec![-1.5f32, -0.0, 0.0, 2.0, 2.5]),
                2 => -3f32..3.0,
                1 => Just(f32::NEG_INFINITY),
                1 => prop::sample::select(vec![f32::NAN, f32::INFINITY, -1.0, -1.0, -1.0, -1.0]),
            ],
            0..40,
        ),
    ) {
        let config = GenerationConfig::default().temperature(0.0);
        let mut sampler = Sampler::new(&config, &[1, 2])?;
        let expected = sampler.distribution(&logits);
        match (sampler.sample(&logits), expected) {
            (Ok(id), Ok(expected)) => prop_assert_eq!(vec![(id, 1.0)], expected),
            (Err(got), Err(expected)) => prop_assert_eq!(got.to_string(), expected.to_string()),
            (got, expected) => prop_assert!(false, "{got:?} {expected:?}"),
        }
    }

    /// A sampler never draws what it does not list, and what it lists sums to 1.
    #[test]
    fn a_distribution_is_one(
        logits in prop::collection::vec(prop_oneof![9 => -50f32..50.0, 1 => Just(f32::NEG_INFINITY)], 1..40),
        prompt in prop::collection::vec(0u32..50, 0..8),
        temperature in prop_oneof![Just(0.0), 1e-6..5.0],
        top_k in 0usize..50,
        top_p in 1e-6..=1.0f64,
        min_p in 0.0..=1.0f64,
        repetition in 0.1..5.0f64,
        penalties in (-2.0..=2.0f64, -2.0..=2.0f64),
    ) {
        prop_assume!(logits.iter().any(|logit| logit.is_finite()));
        let config = GenerationConfig::default()
            .temperature(temperature).top_k(top_k).top_p(top_p).min_p(min_p)
            .repetition_penalty(repetition)
            .frequency_penalty(penalties.0).presence_penalty(penalties.1);
        let mut sampler = Sampler::new(&config, &prompt)?;
        for _ in 0..4 {
            let distribution = sampler.distribution(&logits)?;
            let sum: f64 = distribution.iter().map(|(_, probability)| probability).sum();
            prop_assert!((sum - 1.0).abs() < 1e-9, "{}", sum);
            prop_assert!(distribution.iter().all(|(_, probability)| *probability > 0.0));
            prop_assert!(top_k == 0 || distribution.len() <= top_k);
            let id = sampler.sample(&logits)?;
            prop_assert!(distribution.iter().any(|(listed, _)| *listed == id));
        }
    }
}

#[test]
fn logits_that_are_not_finite_are_refused() -> Result {
    let nan = [0.0, f32::NAN, 1.0];
    let infinite = [0.0, f32::INFINITY];
    let nothing = [f32::NEG_INFINITY; 3];
    for temperature in [0.0, 1.0] {
        let config = GenerationConfig::default().temperature(temperature);
        for logits in [&nan[..], &infinite, &nothing, &[]] {
            let mut sampler = Sampler::new(&config, &[4, 4, 4])?;
            assert_eq!(sampler.sample(&[0.0, f32::NEG_INFINITY])?, 0, "one finite logit is enough");
            let error = sampler.sample(logits).err().ok_or("sampled")?;
            assert_eq!(error.to_string(), "logits are not finite at position 4");
        }
    }
    // An overflow in the penalty is the penalty's.
    let config = GenerationConfig::default().repetition_penalty(f64::MIN_POSITIVE);
    let error = Sampler::new(&config, &[0])?.sample(&[1e30, 1.0]).err().ok_or("sampled")?;
    let expected = "parameter penalties: expected ones that keep logits finite, got repetition";
    assert!(error.to_string().starts_with(expected), "{error}");
    Ok(())
}

// ---- log-probabilities ----

const VOCAB: usize = 48;

/// A model of random weights; `embedding` scales the rows that tokens enter with.
fn tiny(embedding: f64) -> Result<Transformer> {
    let config = Config::from_json(&format!(
        r#"{{"model_type": "mistral", "vocab_size": {VOCAB}, "hidden_size": 16,
            "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "max_position_embeddings": 64}}"#
    ))?;
    let mut weights = HashMap::new();
    for (name, shape) in config.weights() {
        let scale = if name.contains("embed") { embedding } else { 1.0 };
        let weight = (Tensor::randn(0f32, 0.4, shape, &Device::Cpu)? * scale)?;
        weights.insert(name, weight);
    }
    Ok(Transformer::new(&config, &mut weights)?)
}

#[test]
fn logprobs_are_the_models_own() -> Result {
    let model = HybridModel::new(tiny(1.0)?, None)?;
    let transformer = model.transformer();
    let prompt = [1u32, 7, 30];
    let plain = GenerationConfig::default().max_tokens(6).eos_ids([]).top_logprobs(VOCAB);
    let warped = plain.clone().temperature(1.7).top_k(9).seed(5);
    let penalised = plain.clone().repetition_penalty(1.9).frequency_penalty(1.0);
    for config in [plain, warped, penalised] {
        let answer = model.generate(prompt, &config)?;
        let ids = [prompt.to_vec(), answer.ids.clone()].concat();
        let (batch, xs) = (Batch::one(ids.len())?, transformer.embed_ids(&ids)?);
        let h = transformer.forward(&xs, transformer.all_layers(), Pass::Causal(&batch))?;
        let logits = transformer.logits(&h)?.to_dtype(DType::F32)?;
        let expected = log_softmax(&logits, D::Minus1)?.to_vec2::<f32>()?;
        assert_eq!(answer.logprobs.len(), 6);
        for (index, (&id, &logprob)) in answer.ids.iter().zip(&answer.logprobs).enumerate() {
            let expected = &expected[prompt.len() - 1 + index];
            assert!((logprob - expected[id as usize]).abs() < 1e-5, "{logprob}");
            let top = &answer.top_logprobs[index];
            let sum: f64 = top.iter().map(|(_, logprob)| f64::from(*logprob).exp()).sum();
            assert!((sum - 1.0).abs() < 1e-5, "{sum}");
            assert_eq!(top.iter().map(|(id, _)| *id).collect::<HashSet<_>>().len(), VOCAB);
            assert!(top.is_sorted_by(|a, b| a.1 >= b.1));
            for (id, logprob) in top {
                assert!((logprob - expected[*id as usize]).abs() < 1e-5, "{id}: {logprob}");
            }
        }
    }
    Ok(())
}

#[test]
fn fewer_top_logprobs_are_the_first_of_all() -> Result {
    let model = HybridModel::new(tiny(1.0)?, None)?;
    let at = |n| model.generate([5, 6], &GenerationConfig::default().max_tokens(4).top_logprobs(n));
    let all = at(usize::MAX)?;
    for n in [0, 1, 3, VOCAB - 1, VOCAB, VOCAB + 1] {
        let some = at(n)?;
        assert_eq!(some.ids, all.ids);
        for (some, all) in some.top_logprobs.iter().zip(&all.top_logprobs) {
            assert_eq!(some, &all[..n.min(VOCAB)]);
        }
    }
    // Greedy takes the likeliest.
    for (index, top) in all.top_logprobs.iter().enumerate() {
        assert_eq!(top[0], (all.ids[index], all.logprobs[index]));
    }
    Ok(())
}

#[test]
fn a_model_that_overflows_is_an_error() -> Result {
    let model = HybridModel::new(tiny(f64::INFINITY)?, None)?;
    let config = GenerationConfig::default();
    let error = model.generate([1, 2, 3], &config).err().ok_or("answered")?;
    assert_eq!(error.to_string(), "logits are not finite at position 3");
    let prompt_logprobs = config.prompt_logprobs(true).max_tokens(0);
    let error = model.generate([1, 2, 3], &prompt_logprobs).err().ok_or("answered")?;
    assert_eq!(error.to_string(), "logits are not finite at position 1");

    let mut stream = model.stream([1], &GenerationConfig::default())?;
    assert!(stream.next().is_some_and(|token| token.is_err()));
    assert!(stream.next().is_none(), "after an error it ends");
    Ok(())
}

/// A penalty may be so small that a logit divided by it is infinite: that is no fault of the model's.
#[test]
fn a_penalty_that_overflows_is_named() -> Result {
    for (penalty, logit, refused) in [
        (f64::from_bits(1), 2.0, true),
        (f64::from_bits(1), -2.0, false),
        (1e-300, 2.0, false),
        (f64::MAX, -2.0, false), // minus infinity: never again
    ] {
        let config = GenerationConfig::default().repetition_penalty(penalty);
        let drawn = Sampler::new(&config, &[1])?.sample(&[0.5, logit, 1.0]);
        match drawn.map_err(|error| error.to_string()) {
            Err(error) if refused => {
                assert!(error.starts_with("parameter penalties: expected"), "{error}");
            }
            drawn => assert_eq!(drawn.ok(), Some(if logit > 0.0 { 1 } else { 2 }), "{penalty}"),
        }
    }
    Ok(())
}
