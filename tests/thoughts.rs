//! Thoughts as a prompt for another engine: transformers' answers after them, and a plain causal reading here.

mod common;

use std::collections::BTreeMap;
use std::fs;

use candle_core::{DType, Device, Tensor};
use hybrid_attention::model::{Batch, Pass};
use hybrid_attention::refine::{Interpolate, OutputNudge};
use hybrid_attention::thought::{EncodedBatch, Thoughts};
use hybrid_attention::{Error, GenerationConfig, HandOff, HybridModel, Prompt, Thinking};
use serde::Deserialize;
use serde_json::{Value, json};

use common::tiny;
use common::{Result, assert_close, fixture, fixture_config};

/// What `tests/fixtures/thoughts/make.py` has recorded.
#[derive(Deserialize)]
struct Golden {
    ids: Vec<u32>,
    passes: usize,
    weight: f64,
    answer_ids: Vec<u32>,
    logprobs: Vec<f32>,
}

impl Golden {
    fn all() -> Result<BTreeMap<String, Self>> {
        let text = fs::read_to_string(fixture("thoughts").join("golden.json"))?;
        let mut all: BTreeMap<String, Value> = serde_json::from_str(&text)?;
        all.remove("made with").ok_or("nothing has made them")?;
        let golden = |(case, value)| Ok((case, serde_json::from_value(value)?));
        all.into_iter().map(golden).collect()
    }

    fn config(&self) -> GenerationConfig {
        let thinking = Thinking::new(self.passes).refine(Interpolate::new(self.weight));
        GenerationConfig::default().thinking(thinking).max_tokens(self.answer_ids.len())
    }
}

/// transformers was given the embeddings in the file, as we make them, and answered as we do.
#[test]
fn transformers_answers_after_these_thoughts_as_we_do() -> Result {
    let golden = Golden::all()?;
    assert_eq!(golden.keys().collect::<Vec<_>>(), ["head_dim", "window"]);
    for (case, golden) in golden {
        let model = HybridModel::from_folder(fixture(&case), DType::F32, &Device::Cpu)?;
        let (folder, config) = (tempfile::tempdir()?, golden.config());
        let path = folder.path().join("thoughts.safetensors");
        model.think(golden.ids.as_slice(), &config)?.save(&path)?;
        let read = |path| -> Result<Tensor> {
            let mut tensors = candle_core::safetensors::load(path, &Device::Cpu)?;
            assert_eq!(tensors.len(), 1);
            Ok(tensors.remove("prompt_embeds").ok_or("no embeddings")?)
        };
        let handed_over = read(fixture("thoughts").join(format!("{case}.safetensors")))?;
        assert_close(&case, &read(path)?, &handed_over, 1e-6)?;

        let answer = model.generate(golden.ids.as_slice(), &config)?;
        assert_eq!(answer.ids, golden.answer_ids, "{case}");
        for (ours, theirs) in answer.logprobs.iter().zip(&golden.logprobs) {
            assert!((ours - theirs).abs() < 1e-4, "{case}: {ours} {theirs}");
        }
        // They do hand something over: without thinking the answer is another.
        let plain = model.generate(golden.ids.as_slice(), &config.thinking(Thinking::none()))?;
        assert_ne!(plain.logprobs, answer.logprobs, "{case}");
    }
    Ok(())
}

/// The greedy answer and its log-probabilities, by reading the embeddings causally, all of them for each token.
fn read_causally(
    model: &HybridModel,
    prompt: &Tensor,
    count: usize,
) -> Result<(Vec<u32>, Vec<f32>)> {
    let (decoder, mut xs) = (model.transformer(), prompt.clone());
    let (mut ids, mut logprobs) = (Vec::new(), Vec::new());
    for _ in 0..count {
        let len = xs.dim(0)?;
        let batch = Batch::one(len)?;
        let h = decoder.forward(&xs, decoder.all_layers(), Pass::Causal(&batch))?;
        let logits = decoder.logits(&h.narrow(0, len - 1, 1)?)?;
        let scores = candle_nn::ops::log_softmax(&logits, 1)?.squeeze(0)?.to_vec1::<f32>()?;
        let id = logits.argmax(1)?.to_vec1::<u32>()?;
        logprobs.push(scores[id[0] as usize]);
        xs = Tensor::cat(&[&xs, &decoder.embed_ids(&id)?], 0)?;
        ids.extend(id);
    }
    Ok((ids, logprobs))
}

#[test]
fn a_plain_engine_gives_our_answer_after_them() -> Result {
    let model = tiny::hybrid(&tiny::config(), 3)?;
    let some: [&[u32]; 3] = [&[3, 9, 27, 1], &[5, 8], &[30, 2, 7]];
    let rows = |ids: &[u32]| model.transformer().embed_ids(ids);
    for (prompt, all, plain) in [
        (Prompt::from(some[0]), some[0].to_vec(), 3..4),
        (Prompt::default().context_ids(some[0]).plain_ids(some[1]), some[..2].concat(), 4..6),
        (
            Prompt::default().plain_ids(some[0]).context_ids(some[2]),
            [some[0], some[2]].concat(),
            0..4,
        ),
    ] {
        for thinking in [
            Thinking::none(),
            Thinking::new(1).refine(Interpolate::new(0.7)),
            Thinking::new(3).span(..2),
        ] {
            let config = GenerationConfig::default().thinking(thinking.clone()).max_tokens(6);
            let thoughts = model.think(prompt.clone(), &config)?;
            let embeddings = thoughts.prompt_embeddings()?;
            let origin = thoughts.origin.as_ref().ok_or("no origin")?;
            assert_eq!(origin.ids(), all);
            let kept = embeddings.narrow(0, plain.start, plain.len())?;
            common::assert_identical("plain", &kept, &rows(&all[plain.clone()])?)?;
            let answer = model.generate(prompt.clone(), &config.eos_ids([]))?;
            let (ids, logprobs) = read_causally(&model, &embeddings, 6)?;
            assert_eq!(ids, answer.ids, "{thinking:?}");
            for (a, b) in logprobs.iter().zip(&answer.logprobs) {
                assert!((a - b).abs() < 1e-4, "{thinking:?}: {a} {b}");
            }
        }
    }
    Ok(())
}

#[test]
fn a_file_says_what_it_is_for() -> Result {
    let model = HybridModel::from_folder(fixture("head_dim"), DType::F32, &Device::Cpu)?;
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("thoughts.safetensors");
    let config = GenerationConfig::default().thinking(Thinking::new(2));
    let thoughts = model.think([4, 5, 6], &config)?;
    thoughts.save(&path)?;
    let bytes = fs::read(&path)?;
    let (_, header) = safetensors::SafeTensors::read_metadata(&bytes)?;
    let metadata = header.metadata().as_ref().ok_or("no metadata")?;
    let said = |key: &str| -> Result<Value> { Ok(serde_json::from_str(&metadata[key])?) };
    assert_eq!((said("prompt_ids")?, said("passes")?), (json!([4, 5, 6]), json!(2)));
    let expected = fixture_config("head_dim")?;
    assert_eq!(
        said("model")?,
        json!({
            "vocab_size": expected.vocab_size, "hidden_size": expected.hidden_size,
            "num_hidden_layers": expected.num_hidden_layers, "rope_theta": expected.rope_theta,
        })
    );
    assert_eq!(fs::read_dir(folder.path())?.count(), 1, "nothing else is left");
    let nowhere = folder.path().join("absent").join("thoughts.safetensors");
    assert!(matches!(thoughts.save(nowhere), Err(Error::Io { .. })));
    Ok(())
}

#[test]
fn what_is_no_prompt_says_why() -> Result {
    let model = tiny::hybrid(&tiny::config(), 3)?;
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("thoughts.safetensors");
    let refusal = |thoughts: &Thoughts| -> Result<String> {
        let refused = thoughts.save(&path).err().ok_or("saved")?;
        assert!(matches!(refused, Error::Parameter { .. }), "{refused:?}");
        assert_eq!(
            thoughts.prompt_embeddings().map_err(|e| e.to_string()).err(),
            Some(refused.to_string())
        );
        Ok(refused.to_string())
    };
    let two = Thinking::new(2);
    let of = "for a prompt in embeddings, got";
    for (thinking, expected) in [
        (
            two.clone().span(1..3),
            format!(
                "span: expected one that begins at layer 0, {of} 1..3: these thoughts enter layer 1"
            ),
        ),
        (
            two.clone().hand_off(HandOff::KeyValue),
            format!("hand_off: expected Refined, {of} KeyValue, which hands over keys and values"),
        ),
        (
            two.clone().hand_off(HandOff::Mixed { weight: 0.5 }),
            format!(
                "hand_off: expected Refined, {of} Mixed {{ weight: 0.5 }}, which hands over keys and values"
            ),
        ),
        (
            two.clone().rethink_every(4),
            format!("rethink_every: expected 0, {of} 4: the answer is thought about, too"),
        ),
        (
            two.clone().output_nudge(OutputNudge::new(2)),
            format!("output_nudge: expected none, {of} one, which is added before the head"),
        ),
        (
            Thinking::none().output_nudge(OutputNudge::new(2)),
            format!("output_nudge: expected none, {of} one, which is added before the head"),
        ),
    ] {
        let config = GenerationConfig::default().thinking(thinking);
        let thoughts = model.think([1, 2, 3], &config)?;
        assert_eq!(refusal(&thoughts)?, format!("parameter {expected}"));
    }

    let mind = two.on(model.thought_model())?;
    let text = EncodedBatch::new(model.transformer(), &[1, 2, 3], Batch::ragged(&[1, 2])?)?;
    let thoughts = mind.think(&text, text.embeddings().clone(), |_, _| ())?;
    assert!(
        refusal(&thoughts)?.contains("sequences: expected one, for a prompt in embeddings, got 2")
    );
    let by_hand = Thoughts { origin: None, ..thoughts };
    assert!(refusal(&by_hand)?.contains("thoughts: expected those of a thought loop"));
    assert!(!path.exists());
    Ok(())
}
