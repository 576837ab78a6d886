//! Settings as JSON: what they are written like, what reads them, and the checkpoint's own.

mod common;

use std::fs;
use std::path::Path;

use candle_core::Device;
use candle_core::quantized::GgmlDType;
use hybrid_attention::generate::{Candidates, Extract, PromptLookup, Score};
use hybrid_attention::model::Sight;
use hybrid_attention::refine::{
    Among, Anchor, CosineReweight, Focus, ForwardNudge, GradientNudge, Interpolate, Noise,
    OpConfig, Optimizer, OutputNudge, Refine, Seq, Step, Substitute, seq,
};
use hybrid_attention::thought::{Detail, Halt, HandOff};
use hybrid_attention::{
    EmbedConfig, Error, GenerationConfig, HybridModel, Message, Pooling, Prompt, Thinking,
};
use proptest::prelude::*;
use proptest::sample::select;
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tempfile::TempDir;

use common::tiny::{self, holds};
use common::{Result, assert_identical, fixture, write_gguf, write_hugging_face};

// ---- the checkpoint's own thinking ----

/// A checkpoint of three layers whose tokenizer can chat.
fn folder(hybrid_json: Option<&str>) -> Result<TempDir> {
    let folder = tempfile::tempdir()?;
    let config = hybrid_attention::Config { vocab_size: 512, ..tiny::config() };
    let weights = tiny::weights(&config, 1)?.into_iter().collect();
    write_hugging_face(folder.path(), &config, &weights)?;
    let tokenizer = fixture("tokenizer").join("llama");
    for entry in fs::read_dir(tokenizer)? {
        let path = entry?.path();
        if let Some(name) = path.file_name() {
            fs::copy(&path, folder.path().join(name))?;
        }
    }
    let template = "{% for message in messages %}{{ message['content'] }} {% endfor %}";
    let path = folder.path().join("tokenizer_config.json");
    let text = fs::read_to_string(&path).unwrap_or_else(|_| "{}".to_string());
    let mut tokenizer: Value = serde_json::from_str(&text)?;
    tokenizer["chat_template"] = json!(template);
    fs::write(path, tokenizer.to_string())?;
    if let Some(text) = hybrid_json {
        fs::write(folder.path().join("hybrid.json"), text)?;
    }
    Ok(folder)
}

fn load(path: &Path) -> hybrid_attention::Result<HybridModel> {
    HybridModel::from_folder(path, None, &Device::Cpu)
}

const OWN: &str = r#"{
    "passes": 2, "span": [1, 3],
    "refine": [{"op": "cosine_reweight", "how": "mix", "strength": 0.2},
               {"op": "interpolate", "weight": 0.4}],
    "hand_off": "key_value"
}"#;

fn own() -> Thinking {
    let refine = seq().add(CosineReweight::mix(0.2)).add(Interpolate::new(0.4));
    let thinking = Thinking::new(2).span(1..3).refine(refine);
    thinking.hand_off(HandOff::KeyValue)
}

fn greedy() -> GenerationConfig {
    GenerationConfig::default().max_tokens(5)
}

#[test]
fn the_checkpoints_own_thinking_counts_where_nothing_is_said() -> Result {
    let (model, bare) = (load(folder(Some(OWN))?.path())?, load(folder(None)?.path())?);
    assert_eq!(serde_json::to_value(model.thinking())?, serde_json::to_value(own())?);
    assert!(bare.thinking().is_none() && !model.thinking().is_none());

    let prompt = "the cat sat on the mat";
    let thought = bare.generate(prompt, &greedy().thinking(own()))?;
    let plain = bare.generate(prompt, &greedy())?;
    assert_ne!(thought.logprobs, plain.logprobs);
    let logprobs = |model: &HybridModel, how: &GenerationConfig| -> Result<[Vec<f32>; 3]> {
        let mut streamed = Vec::new();
        for token in model.stream(prompt, how)? {
            streamed.push(token?.logprob);
        }
        let mut conversation = model.conversation(64)?;
        let held = model.stream_in(&mut conversation, prompt, how)?.collect_answer()?;
        Ok([model.generate(prompt, how)?.logprobs, streamed, held.logprobs])
    };
    let [thought, plain] =
        [thought.logprobs, plain.logprobs].map(|it| [it.clone(), it.clone(), it]);
    assert_eq!(logprobs(&model, &greedy())?, thought);
    assert_eq!(logprobs(&model, &greedy().thinking(Thinking::none()))?, plain);
    let other = Thinking::new(1).span(0..1);
    let asked = logprobs(&model, &greedy().thinking(other.clone()))?;
    assert_eq!(asked, logprobs(&bare, &greedy().thinking(other))?);
    assert_ne!(asked, thought);
    // The settings that come with a checkpoint leave its thinking in place.
    assert_eq!(logprobs(&model, &model.generation_config().max_tokens(5))?, thought);
    Ok(())
}

#[test]
fn so_it_does_for_thoughts_and_chats() -> Result {
    let (model, bare) = (load(folder(Some(OWN))?.path())?, load(folder(None)?.path())?);
    let messages = [Message::user("the cat"), Message::assistant("sat"), Message::user("where?")];
    for prompt in [Prompt::from("the cat sat"), Prompt::chat(&messages)] {
        let thoughts = model.think(prompt.clone(), &greedy())?;
        let expected = bare.think(prompt.clone(), &greedy().thinking(own()))?;
        assert_identical("thoughts", &thoughts.z, &expected.z)?;
        assert_eq!(thoughts.trace.passes.len(), 2);
        let none = model.think(prompt.clone(), &greedy().thinking(Thinking::none()))?;
        assert_identical("no thoughts", &none.z, &bare.think(prompt, &greedy())?.z)?;
    }
    let answer = model.chat(&messages, &greedy())?;
    assert_eq!(answer.traces.len(), 1);
    let expected = bare.chat(&messages, &greedy().thinking(own()))?;
    assert_eq!(answer.logprobs, expected.logprobs);
    let none = model.chat(&messages, &greedy().thinking(Thinking::none()))?;
    assert_eq!(none.logprobs, bare.chat(&messages, &greedy())?.logprobs);
    Ok(())
}

/// Loading fails with the file's name and what is wrong in it.
#[test]
fn a_hybrid_json_that_is_none_is_refused() -> Result {
    for (text, expected) in [
        ("", "expected a JSON object"),
        ("{", "EOF while parsing"),
        ("[]", "expected a JSON object"),
        ("null", "expected a JSON object"),
        (r#"{"pases": 3}"#, "unknown field `pases`"),
        (r#"{"passes": 3} x"#, "trailing characters"),
        (r#"{"passes": 3, "passes": 4}"#, "duplicate field `passes`"),
        (r#"{"passes": -1}"#, "invalid value: integer `-1`"),
        (r#"{"passes": 2.5}"#, "invalid type: floating point `2.5`"),
        (r#"{"passes": 99999999999999999999}"#, "invalid type: floating point"),
        (r#"{"passes": 1025}"#, "passes: expected at most 1024, got 1025"),
        (r#"{"refine": [{"op": "interpolat"}]}"#, "unknown variant `interpolat`"),
        (r#"{"refine": {"op": "interpolate"}}"#, "invalid type: map"),
        (
            r#"{"refine": [{"op": "interpolate"}, {"op": "interpolate", "weight": 1.5}]}"#,
            "refinement op 1 (Interpolate): parameter weight: expected a share in [0, 1], got 1.5",
        ),
        (r#"{"refine": [{"op": "interpolate", "weight": []}]}"#, "at least one share"),
        (r#"{"halt": [{"drift": -0.5}]}"#, "halt: expected a tolerance of at least 0"),
        (r#"{"halt": [{"entropy": 0.5}]}"#, "unknown variant `entropy`"),
        (r#"{"halt": {"drift": 0.5}}"#, "invalid type: map"),
        (r#"{"hand_off": "keyvalue"}"#, "unknown variant `keyvalue`"),
        (r#"{"hand_off": {"mixed": {"weight": 1.01}}}"#, "hand_off weight: expected a share"),
        (r#"{"hand_off": {"mixed": {}}}"#, "missing field `weight`"),
        (r#"{"hand_off": {"mixed": {"weight": 0.5, "k": 1}}}"#, "unknown field `k`"),
        (r#"{"sight": "both"}"#, "unknown variant `both`"),
        (r#"{"detail": "all"}"#, "unknown variant `all`"),
        (r#"{"span": [1]}"#, "invalid length 1"),
        (r#"{"span": [1, 2, 3]}"#, "trailing characters"),
        (r#"{"passes": 1, "span": [1, 4]}"#, "span: expected a non-empty range within 0..3"),
        (r#"{"passes": 1, "span": [2, 2]}"#, "span: expected a non-empty range within 0..3"),
        (r#"{"passes": 1, "span": [2, 1]}"#, "got 2..1"),
    ] {
        let folder = folder(Some(text))?;
        let file = folder.path().join("hybrid.json");
        match load(folder.path()) {
            Err(Error::Malformed { path, message }) => {
                assert_eq!(path, file, "{text}");
                assert!(message.contains(expected), "{text}: {message}");
            }
            other => return Err(format!("{text}: {:?}", other.map(|_| "loaded")).into()),
        }
    }
    // No text at all.
    let folder = folder(None)?;
    fs::write(folder.path().join("hybrid.json"), [0xff, 0xfe])?;
    match load(folder.path()) {
        Err(Error::Io { path, .. }) => assert!(path.ends_with("hybrid.json"), "{path:?}"),
        other => return Err(format!("{:?}", other.map(|_| "loaded")).into()),
    }
    Ok(())
}

/// The `embed` object of a `hybrid.json` is what a caller who says nothing gets; the caller goes before it.
#[test]
fn a_hybrid_json_says_how_to_embed() -> Result {
    let texts = ["the cat", "the dog sat on the mat and thought about it"];
    let own = r#"{"passes": 1, "embed": {
        "pooling": "last_token", "sight": "bidirectional", "normalize": false, "instruction": "about ",
        "max_tokens": 7, "thinking": {"passes": 2, "span": [0, 2]}
    }}"#;
    let same = EmbedConfig::default()
        .pooling(Pooling::LastToken)
        .sight(Sight::Bidirectional)
        .normalize(false)
        .instruction("about ")
        .max_tokens(7)
        .thinking(Thinking::new(2).span(0..2));
    assert_eq!(EmbedConfig::from_hybrid_json(own)?, same);
    let (told, bare) = (folder(Some(own))?, folder(None)?);
    let (told, bare) = (load(told.path())?, load(bare.path())?);
    let vectors = |model: &HybridModel, config: &EmbedConfig| -> Result<Vec<Vec<f32>>> {
        Ok(model.embed(&texts, config)?.to_vec2()?)
    };
    assert_eq!(vectors(&told, &EmbedConfig::default())?, vectors(&bare, &same)?);
    // One setting at a time, from the caller.
    for change in [
        |config: EmbedConfig| config.pooling(Pooling::Mean),
        |config: EmbedConfig| config.sight(Sight::Causal),
        |config: EmbedConfig| config.normalize(true),
        |config: EmbedConfig| config.instruction("the "),
        |config: EmbedConfig| config.max_tokens(5),
        |config: EmbedConfig| config.thinking(Thinking::none()),
    ] {
        let changed = vectors(&told, &change(EmbedConfig::default()))?;
        assert_eq!(changed, vectors(&bare, &change(same.clone()))?);
        assert_ne!(changed, vectors(&bare, &same)?);
    }
    // It is not about answers.
    assert_eq!(told.thinking(), &Thinking::new(1));
    let none = EmbedConfig::from_hybrid_json(r#"{"passes": 3}"#)?;
    assert_eq!(none, EmbedConfig::default());
    Ok(())
}

#[test]
fn an_embed_object_that_is_none_is_refused() -> Result {
    let long = format!(r#"{{"embed": {{"instruction": "{}"}}}}"#, "a".repeat(4097));
    for (text, expected) in [
        (r#"{"embed": []}"#, "embed: expected an object"),
        (r#"{"embed": null}"#, "embed: expected an object"),
        (r#"{"embed": {"pool": "mean"}}"#, "embed: unknown field `pool`"),
        (r#"{"embed": {"pooling": "max"}}"#, "embed: unknown variant `max`"),
        (r#"{"embed": {}, "passes": 1, "embed": {}}"#, "duplicate field `embed`"),
        (r#"{"embed": {"max_tokens": 0}}"#, "parameter max_tokens: expected at least 1, got 0"),
        (r#"{"embed": {"batch_tokens": 9}}"#, "parameter batch_tokens: expected nothing, as the"),
        (&long, "parameter instruction: expected at most 4096 bytes, as the default of a"),
        (r#"{"embed": {"thinking": {"passes": 1024}}}"#, "expected at most 1000 readings"),
        (r#"{"embed": {"thinking": {"passes": 1, "span": [1, 9]}}}"#, "within 0..3"),
        (r#"{"embed": {"thinking": {"embed": {}}}}"#, "unknown field `embed`"),
        ("7", "invalid type: integer `7`, expected a JSON object"),
    ] {
        if !text.contains("span") {
            let refused = EmbedConfig::from_hybrid_json(text).err().ok_or(text)?.to_string();
            assert!(refused.contains(expected), "{text}: {refused}");
        }
        if text != "7" {
            let folder = folder(Some(text))?;
            match load(folder.path()) {
                Err(Error::Malformed { path, message }) => {
                    assert!(path.ends_with("hybrid.json"), "{path:?}");
                    assert!(message.contains(expected), "{text}: {message}");
                }
                other => return Err(format!("{text}: {:?}", other.map(|_| "loaded")).into()),
            }
        }
    }
    Ok(())
}

/// Beside a GGUF file it counts as in a folder, and a file elsewhere does not.
#[test]
fn a_gguf_file_has_its_hybrid_json_beside_it() -> Result {
    let (folder, config) = (tempfile::tempdir()?, tiny::config());
    let weights = tiny::weights(&config, 1)?.into_iter().collect();
    let path = folder.path().join("model.gguf");
    write_gguf(&path, &config, &weights, GgmlDType::F32)?;
    let load = || HybridModel::from_gguf(&path, None, &Device::Cpu);
    assert!(load()?.thinking().is_none());
    fs::write(folder.path().join("hybrid.json"), OWN)?;
    assert_eq!(serde_json::to_value(load()?.thinking())?, serde_json::to_value(own())?);
    fs::write(folder.path().join("hybrid.json"), "{")?;
    let refused = load().err().map(|error| error.to_string()).unwrap_or_default();
    assert!(refused.contains("hybrid.json") && refused.contains("EOF"), "{refused}");
    Ok(())
}

#[test]
fn a_hybrid_json_may_say_little() -> Result {
    for text in ["{}", r#"{"passes": 0}"#, r#"{"span": null, "refine": null}"#] {
        let model = load(folder(Some(text))?.path())?;
        let thinking = serde_json::to_value(model.thinking())?;
        assert_eq!(thinking, serde_json::to_value(Thinking::none())?, "{text}");
    }
    let model = load(folder(Some(r#"{"passes": 2}"#))?.path())?;
    let thinking = serde_json::to_value(model.thinking())?;
    assert_eq!(thinking, serde_json::to_value(Thinking::new(2))?);
    Ok(())
}

// ---- there and back ----

fn shares() -> impl Strategy<Value = f64> {
    prop_oneof![select(vec![0.0, 0.5, 1.0, 0.1]), 0.0..=1.0]
}

fn noises() -> impl Strategy<Value = Noise> {
    let of = select(vec![Noise::per_coordinate, Noise::per_row, Noise::relative]);
    (of, shares(), any::<(bool, bool, bool, u64)>()).prop_map(
        |(of, sd, (uniform, subtract, keep_norm, seed))| {
            let noise = of(sd).seed(seed);
            let noise = if uniform { noise.uniform() } else { noise };
            let noise = if subtract { noise.subtract() } else { noise };
            if keep_norm { noise.keep_norm() } else { noise }
        },
    )
}

fn ops() -> impl Strategy<Value = OpConfig> {
    let weight = prop_oneof![
        shares().prop_map(Interpolate::new),
        prop::collection::vec(shares(), 1..4).prop_map(Interpolate::schedule),
        Just(Interpolate::damped()),
    ];
    let anchor = prop::option::of((select(vec![Anchor::First, Anchor::FirstPass]), shares()));
    let interpolate = (weight, any::<bool>(), any::<bool>(), anchor).prop_map(
        |(op, slerp, match_norm, anchor)| {
            let op = if slerp { op.slerp() } else { op };
            let op = if match_norm { op.match_norm() } else { op };
            OpConfig::Interpolate(anchor.into_iter().fold(op, |op, (to, by)| op.anchor(to, by)))
        },
    );
    let focus = prop_oneof![
        Just(Focus::All),
        Just(Focus::Last),
        prop::collection::vec(0usize..4, 1..4).prop_map(Focus::Rows),
    ];
    let among = select(vec![Among::Both, Among::Past, Among::Future]);
    let reweight = (shares(), any::<bool>(), 0.01..10.0, among, any::<bool>(), focus).prop_map(
        |(strength, mix, temperature, among, exclude_self, focus)| {
            let op = if mix { CosineReweight::mix } else { CosineReweight::scale };
            let op = op(strength).temperature(temperature).among(among).focus(focus);
            OpConfig::CosineReweight(if exclude_self { op.exclude_self() } else { op })
        },
    );
    let optimizer = prop_oneof![
        shares().prop_map(|learning_rate| Optimizer::Sgd { learning_rate }),
        shares().prop_map(|learning_rate| Optimizer::Adam { learning_rate }),
    ];
    let gradient = (0usize..3, optimizer, 0.01..1.0).prop_map(|(steps, optimizer, trust)| {
        OpConfig::GradientNudge(GradientNudge::new(steps).optimizer(optimizer).trust(trust))
    });
    let sizes = (0.01..1.0, 0.01..10.0, 0.01..1.0);
    let forward = (0usize..3, 1usize..4, sizes, any::<u64>()).prop_map(
        |(steps, directions, (sigma, temperature, trust), seed)| {
            let op = ForwardNudge::new(steps).directions(directions).sigma(sigma);
            OpConfig::ForwardNudge(op.temperature(temperature).trust(trust).seed(seed))
        },
    );
    prop_oneof![
        interpolate,
        reweight,
        gradient,
        forward,
        noises().prop_map(OpConfig::Noise),
        shares().prop_map(|share| OpConfig::Substitute(Substitute::new(share))),
        Just(OpConfig::Interpolate(Interpolate::gated()))
    ]
}

fn sequence(ops: Vec<OpConfig>) -> Option<Seq> {
    ops.into_iter().try_fold(seq(), |seq, op| match op {
        OpConfig::Interpolate(op) => Some(seq.add(op)),
        OpConfig::CosineReweight(op) => Some(seq.add(op)),
        OpConfig::GradientNudge(op) => Some(seq.add(op)),
        OpConfig::ForwardNudge(op) => Some(seq.add(op)),
        OpConfig::Noise(op) => Some(seq.add(op)),
        OpConfig::Substitute(op) => Some(seq.add(op)),
        _ => None,
    })
}

fn thinkings() -> impl Strategy<Value = Thinking> {
    let refine = prop::option::of(
        prop::collection::vec(ops(), 0..4).prop_filter_map("a kind of op left out", sequence),
    );
    let halt = prop_oneof![
        (0.0..1.0).prop_map(Halt::Drift),
        (0.0..1.0).prop_map(Halt::Cosine),
        (0.0..1.0).prop_map(Halt::Kl),
    ];
    let hand_off = prop_oneof![
        Just(HandOff::Refined),
        Just(HandOff::KeyValue),
        shares().prop_map(|weight| HandOff::Mixed { weight }),
    ];
    let how = (
        prop::option::of((0usize..3, 1usize..4)),
        select(vec![Sight::Causal, Sight::Bidirectional]),
        hand_off,
        select(vec![Detail::Drift, Detail::Tokens, Detail::Maps]),
    );
    let nudge = (0usize..3, shares())
        .prop_map(|(steps, learning_rate)| OutputNudge::new(steps).learning_rate(learning_rate));
    let refine = (refine, prop::option::of(nudge), prop::option::of(noises()));
    let gradient = prop::option::of(1usize..4);
    let when = (0usize..4, prop::collection::vec(halt, 0..4), 0usize..5, gradient);
    (when, how, refine).prop_map(
        |(
            (passes, halts, every, gradient),
            (span, sight, hand_off, detail),
            (refine, nudge, noise),
        )| {
            let thinking = Thinking::new(passes).sight(sight).hand_off(hand_off);
            let thinking = thinking.rethink_every(every).detail(detail);
            let thinking = halts.into_iter().fold(thinking, Thinking::halt);
            let thinking = gradient.into_iter().fold(thinking, Thinking::gradient_passes);
            let thinking = refine.into_iter().fold(thinking, Thinking::refine);
            let thinking = nudge.into_iter().fold(thinking, Thinking::output_nudge);
            let thinking = noise.into_iter().fold(thinking, Thinking::noise);
            span.into_iter().fold(thinking, |it, (from, to)| it.span(from..to.max(from + 1)))
        },
    )
}

fn generations() -> impl Strategy<Value = GenerationConfig> {
    let penalties = (0.5..2.0, -2.0..=2.0, -2.0..=2.0);
    let sampling = (0.0..2.0, 0usize..9, 0.1..=1.0, shares(), prop::option::of(any::<u64>()));
    let ids = || prop::collection::vec(0u32..32, 0..3);
    let stops = (prop::collection::vec(".{1,5}", 0..3), ids(), prop::option::of(ids()));
    let given = (0usize..9, any::<bool>(), 0usize..9, prop::option::of(thinkings()));
    let given = (given, prop::option::of(candidates()), prop::option::of(lookups()));
    (penalties, sampling, stops, given).prop_map(|(penalties, sampling, stops, given)| {
        let ((max_tokens, prompt_logprobs, top_logprobs, thinking), candidates, lookup) = given;
        let config = GenerationConfig::default()
            .max_tokens(max_tokens)
            .prompt_logprobs(prompt_logprobs)
            .top_logprobs(top_logprobs)
            .repetition_penalty(penalties.0)
            .frequency_penalty(penalties.1)
            .presence_penalty(penalties.2)
            .temperature(sampling.0)
            .top_k(sampling.1)
            .top_p(sampling.2)
            .min_p(sampling.3);
        let config = sampling.4.into_iter().fold(config, GenerationConfig::seed);
        let config = stops.0.into_iter().fold(config, GenerationConfig::stop);
        let config = stops.1.into_iter().fold(config, GenerationConfig::stop_id);
        let config = stops.2.into_iter().fold(config, GenerationConfig::eos_ids);
        let config = candidates.into_iter().fold(config, GenerationConfig::candidates);
        let config = lookup.into_iter().fold(config, GenerationConfig::speculate);
        thinking.into_iter().fold(config, GenerationConfig::thinking)
    })
}

fn candidates() -> impl Strategy<Value = Candidates> {
    let score = select(vec![
        Score::MeanLogprob,
        Score::SumLogprob,
        Score::Entropy,
        Score::SelfCertainty,
        Score::Agreement(Extract::LastNumber),
        Score::Agreement(Extract::FirstWord),
        Score::Random,
        Score::Key,
    ]);
    let rules = (prop::option::of(0.0..1.1), 0usize..5, prop::option::of(0.0..3.0));
    (any::<bool>(), 0usize..6, score, rules).prop_map(|(thoughts, count, score, rules)| {
        let (keep, every, within) = rules;
        let of = if thoughts { Candidates::thoughts(count) } else { Candidates::samples(count) };
        let of = keep.map_or(of.clone().keep_all(), |share| of.keep(share));
        within.into_iter().fold(of.score(score).every(every), Candidates::within)
    })
}

fn lookups() -> impl Strategy<Value = PromptLookup> {
    (0usize..20, 0usize..9, 0usize..80).prop_map(|(tokens, shortest, longest)| {
        PromptLookup::default().tokens(tokens).shortest(shortest).longest(longest)
    })
}

fn embeddings() -> impl Strategy<Value = EmbedConfig> {
    let pooling = select(vec![Pooling::Mean, Pooling::WeightedMean, Pooling::LastToken]);
    let sight = select(vec![Sight::Causal, Sight::Bidirectional]);
    (pooling, sight, any::<bool>(), thinkings(), 0usize..20).prop_map(
        |(pooling, sight, normalize, thinking, batch_tokens)| {
            let config = EmbedConfig::default().pooling(pooling).sight(sight);
            config.normalize(normalize).thinking(thinking).batch_tokens(batch_tokens)
        },
    )
}

/// Written, read and written again: the same text, the same setting.
fn survives<T>(setting: &T) -> Result<T>
where
    T: Serialize + DeserializeOwned + std::fmt::Debug + PartialEq,
{
    let text = serde_json::to_string(setting)?;
    let back: T = serde_json::from_str(&text)?;
    assert_eq!(&back, setting, "{text}");
    assert_eq!(format!("{back:?}"), format!("{setting:?}"), "{text}");
    assert_eq!(serde_json::to_string(&back)?, text);
    let by_value: T = serde_json::from_value(serde_json::to_value(setting)?)?;
    assert_eq!(format!("{by_value:?}"), format!("{setting:?}"), "{text}");
    Ok(back)
}

/// A model without a gate to go by or a tokenizer to stop by.
fn answer(model: &HybridModel, how: &GenerationConfig) -> std::result::Result<String, String> {
    let answer = model.generate([1, 5, 9, 2, 7], how).map_err(|error| error.to_string())?;
    let mut traces = answer.traces;
    traces.iter_mut().flat_map(|trace| &mut trace.passes).for_each(|pass| pass.seconds = 0.0);
    let (ids, logprobs) = (answer.ids, answer.logprobs);
    Ok(format!("{ids:?} {logprobs:?} {:?} {:?} {traces:?}", answer.top_logprobs, answer.stop))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn thinking_survives_json(thinking in thinkings()) {
        holds((|| {
            let text = serde_json::to_string(&thinking)?;
            survives(&thinking)?;
            let read = Thinking::from_json(&text);
            match thinking.validate() {
                Ok(()) => assert_eq!(format!("{:?}", read?), format!("{thinking:?}")),
                Err(error) => assert!(read.is_err(), "{error}"),
            }
            Ok(())
        })())?;
    }

    #[test]
    fn generation_settings_survive_json(config in generations()) {
        holds((|| {
            let back = survives(&config)?;
            assert!(back.validate().is_ok() == config.validate().is_ok());
            Ok(())
        })())?;
    }

    /// What is read does what was written does.
    #[test]
    fn what_survives_behaves_the_same(thinking in thinkings(), seed: u64) {
        holds((|| {
            let model = tiny::hybrid(&tiny::config(), 2)?;
            let how = greedy().thinking(thinking).temperature(0.9).seed(seed).top_logprobs(2);
            assert_eq!(answer(&model, &survives(&how)?), answer(&model, &how));
            Ok(())
        })())?;
    }

    #[test]
    fn embedding_settings_survive_json(config in embeddings()) {
        holds(survives(&config).map(|_| ()))?;
    }
}

/// Each setting by its name, so that none can be left out of the above unseen.
#[test]
fn settings_are_spelled_plainly() -> Result {
    let thinking = own().sight(Sight::Causal).rethink_every(7).detail(Detail::Maps);
    let thinking = thinking.output_nudge(OutputNudge::new(3).learning_rate(0.1));
    let thinking = thinking.halt(Halt::Drift(0.03)).halt(Halt::Cosine(0.01)).halt(Halt::Kl(0.5));
    let refine = json!([
        {"op": "cosine_reweight", "how": "mix", "strength": 0.2},
        {"op": "interpolate", "weight": 0.4},
    ]);
    let mut written = json!({
        "passes": 2, "span": [1, 3], "sight": "causal", "refine": refine,
        "halt": [{"drift": 0.03}, {"cosine": 0.01}, {"kl": 0.5}], "hand_off": "key_value",
        "output_nudge": {"steps": 3, "learning_rate": 0.1}, "rethink_every": 7, "detail": "maps",
    });
    assert_eq!(serde_json::to_value(&thinking)?, written);
    let mixed = thinking.clone().hand_off(HandOff::Mixed { weight: 0.25 });
    written["hand_off"] = json!({"mixed": {"weight": 0.25}});
    assert_eq!(serde_json::to_value(&mixed)?, written);
    written["hand_off"] = json!("refined");
    let refined = thinking.hand_off(HandOff::Refined);
    assert_eq!(serde_json::to_value(&refined)?, written);

    let config = GenerationConfig::default()
        .thinking(refined.clone())
        .max_tokens(1)
        .temperature(2.0)
        .top_k(3)
        .top_p(0.4)
        .min_p(0.5)
        .repetition_penalty(1.6)
        .frequency_penalty(0.7)
        .presence_penalty(-0.8)
        .seed(u64::MAX)
        .stop("a\n")
        .stop_id(9)
        .eos_ids([])
        .top_logprobs(10)
        .prompt_logprobs(true)
        .candidates(
            Candidates::thoughts(9)
                .keep(0.25)
                .every(3)
                .score(Score::Agreement(Extract::LastNumber))
                .within(1.5),
        )
        .speculate(PromptLookup::default().tokens(7).shortest(3).longest(5));
    let expected = json!({
        "thinking": written, "max_tokens": 1, "temperature": 2.0, "top_k": 3, "top_p": 0.4,
        "min_p": 0.5, "repetition_penalty": 1.6, "frequency_penalty": 0.7,
        "presence_penalty": -0.8, "seed": u64::MAX, "stop": ["a\n"], "stop_ids": [9],
        "eos_ids": [], "top_logprobs": 10, "prompt_logprobs": true,
        "candidates": {
            "count": 9, "differ": "thoughts", "keep": 0.25, "every": 3, "within": 1.5,
            "score": {"agreement": "last_number"},
        },
        "speculate": {"tokens": 7, "shortest": 3, "longest": 5},
    });
    assert_eq!(serde_json::to_value(&config)?, expected);
    survives(&config)?;

    let config = EmbedConfig::default().pooling(Pooling::LastToken).sight(Sight::Causal);
    let config = config.normalize(false).thinking(refined).batch_tokens(3);
    let expected = json!({
        "pooling": "last_token", "sight": "causal", "normalize": false, "thinking": written,
        "batch_tokens": 3, "instruction": null, "max_tokens": null,
    });
    assert_eq!(serde_json::to_value(&config)?, expected);
    Ok(())
}

/// Whatever is left out has its default, one setting at a time.
#[test]
fn defaults_may_be_left_out() -> Result {
    fn each<T: Default + Serialize + DeserializeOwned>() -> Result {
        let default = serde_json::to_value(T::default())?;
        let keys: Vec<String> = default.as_object().ok_or("no object")?.keys().cloned().collect();
        assert!(keys.len() > 3);
        for key in &keys {
            let mut some = default.clone();
            some.as_object_mut().ok_or("no object")?.remove(key);
            let read: T = serde_json::from_value(some)?;
            assert_eq!(serde_json::to_value(read)?, default, "without {key}");
        }
        let read: T = serde_json::from_str("{}")?;
        assert_eq!(serde_json::to_value(read)?, default);
        let unknown = json!({"no_such_setting": 1});
        let refused = serde_json::from_value::<T>(unknown).err().ok_or("read")?.to_string();
        assert!(refused.contains("unknown field `no_such_setting`"), "{refused}");
        Ok(())
    }
    each::<Thinking>()?;
    each::<GenerationConfig>()?;
    each::<EmbedConfig>()
}

#[test]
fn ops_made_in_code_refuse_to_be_written() -> Result {
    #[derive(Debug)]
    struct Settle;

    impl Refine for Settle {
        fn refine(
            &self,
            xs: &candle_core::Tensor,
            _: &Step<'_>,
        ) -> hybrid_attention::Result<candle_core::Tensor> {
            Ok(xs.clone())
        }
    }

    let built_in = seq().add(Interpolate::damped());
    for (refine, name) in [
        (built_in.clone().add(Settle), "Settle"),
        (built_in.add_fn(|xs, _| Ok(xs.clone())), "function"),
    ] {
        let thinking = Thinking::new(1).refine(refine);
        let expected = format!("{name} cannot be written: only code can make it");
        let message = |written: serde_json::Result<String>| -> Result<String> {
            Ok(written.err().ok_or("it was written")?.to_string())
        };
        assert_eq!(message(serde_json::to_string(&thinking))?, expected);
        let generation = GenerationConfig::default().thinking(thinking.clone());
        assert_eq!(message(serde_json::to_string(&generation))?, expected);
        let embedding = EmbedConfig::default().thinking(thinking);
        assert_eq!(message(serde_json::to_string(&embedding))?, expected);
    }
    Ok(())
}

// ---- anything at all ----

/// Values that some setting takes, and others that none does.
fn values() -> impl Strategy<Value = Value> {
    let plain = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        (0u64..6).prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        shares().prop_map(Value::from),
        select(vec![
            "refined",
            "key_value",
            "mixed",
            "causal",
            "maps",
            "interpolate",
            "gate",
            "mix",
            "last",
            "cosine_reweight",
            "",
            "é\u{0}",
        ])
        .prop_map(Value::from),
    ];
    plain.prop_recursive(2, 8, 3, |inner| {
        let key = select(vec![
            "op", "weight", "mixed", "drift", "kl", "cosine", "how", "strength", "rows", "focus",
            "anchor", "to", "share",
        ]);
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..3).prop_map(Value::from),
            prop::collection::vec((key, inner), 0..3)
                .prop_map(|entries| entries.into_iter().map(|(k, v)| (k.to_string(), v)).collect()),
        ]
    })
}

/// Puts `value` where `at` leads, one step after the other.
fn edit(json: &mut Value, at: &[usize], value: Value) {
    let entry = match (json, at) {
        (json, []) => {
            *json = value;
            return;
        }
        (Value::Object(map), [step, ..]) if !map.is_empty() => {
            let step = step % map.len();
            map.iter_mut().map(|(_, entry)| entry).nth(step)
        }
        (Value::Array(list), [step, ..]) if !list.is_empty() => {
            let step = step % list.len();
            list.get_mut(step)
        }
        (json, _) => {
            *json = value;
            return;
        }
    };
    if let Some(entry) = entry {
        edit(entry, &at[1..], value);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// Either it is refused with a text, or it is a setting that can be thought with.
    #[test]
    fn edited_settings_are_settings_or_refused(
        config in generations(),
        edits in prop::collection::vec((prop::collection::vec(0usize..20, 1..6), values()), 1..4),
    ) {
        holds((|| {
            let model = tiny::hybrid(&tiny::config(), 3)?;
            let mut json = serde_json::to_value(&config)?;
            for (at, value) in edits {
                edit(&mut json, &at, value);
            }
            let read = serde_json::from_value::<GenerationConfig>(json.clone());
            let Ok(config) = read else { return Ok(()) };
            if config.validate().is_ok() {
                survives(&config)?;
            }
            let refused = model.generate([1, 2, 3], &config.clone().max_tokens(2)).err();
            assert!(refused.is_none_or(|error| !error.to_string().is_empty()));
            if let Some(thinking) = json.get("thinking") {
                let refused = Thinking::from_json(&thinking.to_string()).err();
                assert!(refused.is_none_or(|error| !error.to_string().is_empty()));
            }
            Ok(())
        })())?;
    }

    #[test]
    fn edited_text_is_read_or_refused(
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..5),
    ) {
        let mut bytes = OWN.as_bytes().to_vec();
        for (at, byte) in edits {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        let text = String::from_utf8_lossy(&bytes);
        if let Err(error) = Thinking::from_json(&text) {
            prop_assert!(!error.to_string().is_empty());
        }
    }
}
