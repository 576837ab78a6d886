//! Gradients through the forward passes against finite differences, and the differentiable form
//! of each against the fused one.

mod common;

use std::collections::HashMap;

use candle_core::{DType, Tensor, Var};
use hybrid_attention::model::{Batch, KvPool, Linear, Pass, Sight, Transformer};
use hybrid_attention::refine::Interpolate;
use hybrid_attention::thought::ThoughtModel;
use hybrid_attention::{Config, Thinking};

use common::gradient::check;
use common::tiny;
use common::{Result, assert_close, assert_identical};

/// With a window and without; tied and not.
fn configs() -> [Config; 2] {
    let windowed = Config { sliding_window: Some(3), tie_word_embeddings: true, ..tiny::config() };
    [tiny::config(), windowed]
}

fn inputs(config: &Config, batch: &Batch) -> Result<Tensor> {
    tiny::noise(5, &[batch.tokens(), config.hidden_size], 1.0)
}

fn batchs() -> Result<[Batch; 2]> {
    Ok([Batch::one(5)?, Batch::ragged(&[6, 3])?.with_context(0, &[1..3, 4..6])?])
}

#[test]
fn of_the_inputs() -> Result {
    for config in configs() {
        let model = tiny::transformer(&config, 11)?;
        for batch in &batchs()? {
            let xs = inputs(&config, batch)?;
            let layers = model.all_layers();
            check("causal", &xs, |xs| tiny::logits(&model, xs, Pass::Causal(batch)))?;
            check("bidirectional", &xs, |xs| {
                Ok(model.forward(xs, layers.clone(), Pass::Bidirectional(batch))?)
            })?;
        }
    }
    Ok(())
}

/// What is in the cache is a constant; the new tokens are not.
#[test]
fn of_new_tokens_through_a_cache() -> Result {
    for config in configs() {
        let model = tiny::transformer(&config, 12)?;
        let batch = Batch::one(7)?;
        let xs = inputs(&config, &batch)?;
        let (past, new) = (xs.narrow(0, 0, 4)?, xs.narrow(0, 4, 3)?);
        check("cached", &new, |new| {
            let mut cache = model.new_cache(7)?;
            model.forward(&past, model.all_layers(), Pass::Cached(&mut cache))?;
            tiny::logits(&model, new, Pass::Cached(&mut cache))
        })?;
    }
    Ok(())
}

/// Two sequences of different length, side by side, with and without a past.
#[test]
fn of_new_tokens_through_caches_side_by_side() -> Result {
    for config in configs() {
        let model = tiny::transformer(&config, 16)?;
        let (past, new) = (Batch::one(4)?, Batch::ragged(&[3, 5])?.with_context(1, &[1..4])?);
        let (past, xs) = (inputs(&config, &past)?, inputs(&config, &new)?);
        for sight in [Sight::Causal, Sight::Bidirectional] {
            check(&format!("side by side, {sight:?}"), &xs, |xs| {
                let (mut a, mut b) = (model.new_cache(7)?, model.new_cache(5)?);
                model.forward(&past, model.all_layers(), Pass::Cached(&mut a))?;
                let caches = vec![&mut a, &mut b];
                tiny::logits(&model, xs, Pass::Remembered { batch: &new, sight, caches })
            })?;
        }
    }
    Ok(())
}

/// Only the queries are trained, so that the keys of the pass carry no gradient of their own; then
/// the cache goes on to other tokens, in the same blocks or in others, before the gradient is taken. The
/// keys of a head lie in one piece where there is no other head, and where they fill a block.
#[test]
fn of_a_pass_whose_cache_is_written_again() -> Result {
    let one_head = Config { num_key_value_heads: 1, ..tiny::config() };
    let name = "model.layers.0.self_attn.q_proj.weight";
    for (config, seq) in [(tiny::config(), 4), (one_head, 4), (tiny::config(), KvPool::BLOCK)] {
        let xs = inputs(&config, &Batch::one(seq)?)?;
        let gradient = |kept: Option<usize>| -> Result<Tensor> {
            let mut weights = tiny::weights(&config, 15)?;
            let weight = Var::from_tensor(&weights[name])?;
            weights.insert(name.to_owned(), weight.as_tensor().clone());
            let model = Transformer::new(&config, &mut weights)?;
            let mut cache = model.new_cache(seq)?;
            let h = model.forward(&xs, model.all_layers(), Pass::Cached(&mut cache))?;
            if let Some(kept) = kept {
                cache.truncate(kept)?;
                let others = (xs.narrow(0, 0, seq - kept)? * -2.0)?;
                model.forward(&others, model.all_layers(), Pass::Cached(&mut cache))?;
            }
            let gradients = h.sum_all()?.backward()?;
            Ok(gradients.get(weight.as_tensor()).ok_or("no gradient")?.clone())
        };
        for kept in [0, 1] {
            let name = format!("{seq} tokens, {kept} kept");
            assert_identical(&name, &gradient(Some(kept))?, &gradient(None)?)?;
        }
    }
    Ok(())
}

#[test]
fn of_the_inputs_through_thought_and_hand_off() -> Result {
    let thought_model = ThoughtModel::from(tiny::transformer(&tiny::config(), 13)?);
    let model = thought_model.decoder();
    let batch = Batch::one(6)?.with_context(0, &[0..3, 3..4])?;
    let xs = inputs(model.config(), &batch)?;
    let text = tiny::text(model, &batch, 13)?;
    let thinking = Thinking::new(2).span(1..3).refine(Interpolate::new(0.4));
    check("thoughts", &xs, |xs| {
        let mind = thinking.on(&thought_model)?;
        let z = model.forward(xs, 0..1, Pass::Causal(&batch))?;
        let thoughts = mind.think(&text, z, |_, _| ())?;
        Ok(model.logits(&mind.hand_off(&text, &thoughts, Pass::Causal(&batch))?)?)
    })
}

/// Every weight, one at a time: a form that cuts the graph at one of them would show here. Few
/// tokens and more take different kernels.
#[test]
fn of_every_weight() -> Result {
    for (config, seq) in configs().into_iter().zip([3, 6]).chain([(tiny::config(), 6)]) {
        let weights = tiny::weights(&config, 14)?;
        let ids = tiny::tokens(&config, 14, seq);
        let batch = Batch::one(seq)?;
        for (name, weight) in &weights {
            for sight in [Sight::Causal, Sight::Bidirectional] {
                check(name, weight, |weight| {
                    let mut weights: HashMap<_, _> = weights.clone();
                    weights.insert(name.clone(), weight.clone());
                    let model = Transformer::new(&config, &mut weights)?;
                    let pass = Pass::uncached(&batch, sight);
                    tiny::logits(&model, &model.embed_ids(&ids)?, pass)
                })?;
            }
        }
    }
    Ok(())
}

/// The slope of the sum of `x Wᵀ` is the sum of the rows of `x`, in every row of `W`.
#[test]
fn of_half_precision_weights() -> Result {
    for dtype in [DType::BF16, DType::F16] {
        for rows in [1, 4, 5, 40] {
            let xs = tiny::noise(1, &[rows, 6], 1.0)?;
            let weight = Var::from_tensor(&tiny::noise(2, &[3, 6], 1.0)?.to_dtype(dtype)?)?;
            let ys = Linear::dense(weight.as_tensor())?.forward(&xs)?;
            let gradients = ys.sum_all()?.backward()?;
            let gradient = gradients.get(&weight).ok_or("no gradient")?.to_dtype(DType::F32)?;
            let expected = xs.sum_keepdim(0)?.broadcast_as((3, 6))?.contiguous()?;
            assert_close(&format!("{rows} rows by {dtype:?}"), &gradient, &expected, 1e-2)?;
        }
    }
    Ok(())
}
