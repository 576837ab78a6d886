//! The same weights in candle-transformers' own models give the same logits.

#![allow(clippy::print_stderr, reason = "figures of a test that fails")]

use std::collections::HashMap;
use std::fs;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::{llama, mistral};
use hybrid_attention::load::Checkpoint;
use hybrid_attention::model::{Batch, Pass, Transformer, Weights};
use hybrid_attention::{Config, HybridModel};
use hybrid_attention_testing::tiny::{self, holds};
use hybrid_attention_testing::{Result, assert_close, fixture, smollm2};
use proptest::prelude::*;
use serde_json::Value;

/// The logits after every token of one text: `(1, seq, vocab)`.
fn logits(model: &Transformer, ids: &[u32]) -> Result<Tensor> {
    let tokens = Tensor::new(ids, model.device())?.unsqueeze(0)?;
    let layout = Batch::one(ids.len())?;
    let h = model.forward(&model.embed(&tokens)?, model.all_layers(), Pass::Causal(&layout))?;
    Ok(model.logits(&h)?)
}

/// The same shape for candle-transformers' own Llama, up to 64 positions.
fn candle_llama(config: &Config) -> llama::Config {
    llama::Config {
        hidden_size: config.hidden_size,
        intermediate_size: config.intermediate_size,
        vocab_size: config.vocab_size,
        num_hidden_layers: config.num_hidden_layers,
        num_attention_heads: config.num_attention_heads,
        num_key_value_heads: config.num_key_value_heads,
        use_flash_attn: false,
        rms_norm_eps: config.rms_norm_eps,
        rope_theta: config.rope_theta as f32,
        bos_token_id: None,
        eos_token_id: None,
        rope_scaling: None,
        max_position_embeddings: 64,
        tie_word_embeddings: config.tie_word_embeddings,
    }
}

/// The logits of every position, token by token, from a model that gives only the last.
fn one_by_one(
    ids: &[u32],
    mut step: impl FnMut(&Tensor, usize) -> candle_core::Result<Tensor>,
) -> Result<Tensor> {
    let logits = ids.iter().enumerate().map(|(position, id)| {
        step(&Tensor::new(&[[*id]], &Device::Cpu)?, position)?.reshape((1, 1, ()))
    });
    Ok(Tensor::cat(&logits.collect::<candle_core::Result<Vec<_>>>()?, 1)?)
}

/// candle keeps one key more than the window says, so it is compared without a window.
fn candle_agrees(config: &Config, seed: u64, seq: usize) -> Result {
    let mut config = Config { sliding_window: None, ..config.clone() };
    let ids = tiny::tokens(&config, seed, seq);
    let ours = |config: &Config| -> Result<Tensor> {
        logits(&Transformer::new(config, &mut tiny::weights(config, seed)?)?, &ids)
    };
    let weights = |config: &Config| -> Result<VarBuilder<'static>> {
        let mut weights = tiny::weights(config, seed)?;
        if config.tie_word_embeddings {
            let table = weights.get("model.embed_tokens.weight").cloned().ok_or("no table")?;
            weights.insert("lm_head.weight".into(), table);
        }
        Ok(VarBuilder::from_tensors(weights, DType::F32, &Device::Cpu))
    };
    let theirs = mistral::Config {
        vocab_size: config.vocab_size,
        hidden_size: config.hidden_size,
        intermediate_size: config.intermediate_size,
        num_hidden_layers: config.num_hidden_layers,
        num_attention_heads: config.num_attention_heads,
        head_dim: Some(config.head_dim),
        num_key_value_heads: config.num_key_value_heads,
        hidden_act: candle_nn::Activation::Silu,
        max_position_embeddings: 64,
        rms_norm_eps: config.rms_norm_eps,
        rope_theta: config.rope_theta,
        sliding_window: None,
        use_flash_attn: false,
    };
    let mut theirs = mistral::Model::new(&theirs, weights(&config)?)?;
    let expected = one_by_one(&ids, |id, position| theirs.forward(id, position))?;
    assert_close("mistral", &ours(&config)?, &expected, 1e-4)?;

    // candle's Llama supports no other head width.
    config.hidden_size = config.num_attention_heads * config.head_dim;
    let theirs = candle_llama(&config);
    let mut cache = llama::Cache::new(true, DType::F32, &theirs, &Device::Cpu)?;
    let theirs = llama::Llama::load(weights(&config)?, &theirs)?;
    let expected = one_by_one(&ids, |id, position| theirs.forward(id, position, &mut cache))?;
    assert_close("llama", &ours(&config)?, &expected, 1e-4)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn a_plain_mistral_is_candles(config in tiny::shapes(), seed: u64, seq in 1usize..20) {
        holds(candle_agrees(&config, seed, seq))?;
    }
}

/// The same weights in candle-transformers' own Llama, token by token through its cache.
#[test]
fn logits_are_those_of_candle_transformers() -> Result {
    let Some(path) = smollm2() else { return Ok(()) };
    let model = HybridModel::from_gguf(&path, None, &Device::Cpu)?;
    let checkpoint = Checkpoint::open(&path)?;
    let config = checkpoint.config();
    let mut weights = checkpoint.weights(None, &Device::Cpu);
    let named =
        config.weights().map(|(name, shape)| Ok((name.clone(), weights.tensor(&name, &shape)?)));
    let named = named.collect::<Result<HashMap<_, _>>>()?;
    let theirs = candle_llama(config);
    let mut cache = llama::Cache::new(true, DType::F32, &theirs, &Device::Cpu)?;
    let weights = VarBuilder::from_tensors(named, DType::F32, &Device::Cpu);
    let theirs = llama::Llama::load(weights, &theirs)?;

    let golden: Value = serde_json::from_str(&fs::read_to_string(fixture("smollm2/golden.json"))?)?;
    let cases = golden["generate"].as_array().ok_or("no cases")?;
    let mut prompts = cases.iter().map(|case| serde_json::from_value(case["ids"].clone()));
    let long = |ids: &Vec<u32>| ids.len() >= 30;
    let ids: Vec<u32> = prompts.find_map(|ids| ids.ok().filter(long)).ok_or("no long prompt")?;
    let ids = &ids[..30];
    let ours = logits(model.transformer(), ids)?; // (1, 30, vocab)
    let ids = Tensor::new(ids, &Device::Cpu)?.unsqueeze(0)?; // (1, 30)

    let largest = |xs: &Tensor| xs.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>();
    let mut worst = 0f32;
    for position in 0..30 {
        let golden = theirs.forward(&ids.narrow(1, position, 1)?, position, &mut cache)?;
        let ours = ours.narrow(1, position, 1)?.squeeze(1)?;
        worst = worst.max(largest(&(ours - &golden)?)? / largest(&golden)?);
    }
    eprintln!("largest deviation of a logit from candle-transformers: {worst:.1e}");
    assert!(worst < 1e-4, "off by {worst}");
    Ok(())
}
