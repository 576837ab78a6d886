//! `Compute::Fast` rounds what many rows are multiplied with, by as much as it says, and nothing else;
//! `Compute::Exact` is what there was before.

mod common;

use std::collections::HashMap;
use std::sync::Arc;

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor, Var};
use hybrid_attention::model::{Batch, Linear, Pass, Sight, Transformer};
use hybrid_attention::thought::ThoughtModel;
use hybrid_attention::{Compute, Config, Experts, GenerationConfig, HybridModel, Thinking};
use proptest::prelude::*;
use proptest::test_runner::TestCaseError;

use common::tiny;
use common::{Result, assert_close, assert_identical, fixture};

/// A projection in `bf16`, or in blocks, and its weight in `f32`.
fn projection(kept: Option<GgmlDType>, out: usize, width: usize) -> Result<(Linear, Tensor)> {
    let weight = tiny::noise(1, &[out, width], 1.0)?;
    Ok(match kept {
        None => {
            let weight = weight.to_dtype(DType::BF16)?;
            (Linear::dense(&weight)?, weight.to_dtype(DType::F32)?)
        }
        Some(blocks) => {
            let weight = Arc::new(QTensor::quantize(&weight, blocks)?);
            let wide = weight.dequantize(&Device::Cpu)?;
            (Linear::quantized(weight)?, wide)
        }
    })
}

/// Weights of every kind that it knows: `bf16`, and blocks.
const KINDS: [Option<GgmlDType>; 11] = [
    None,
    Some(GgmlDType::Q4_0),
    Some(GgmlDType::Q4_1),
    Some(GgmlDType::Q5_0),
    Some(GgmlDType::Q5_1),
    Some(GgmlDType::Q8_0),
    Some(GgmlDType::Q2K),
    Some(GgmlDType::Q3K),
    Some(GgmlDType::Q4K),
    Some(GgmlDType::Q5K),
    Some(GgmlDType::Q6K),
];

fn rows_of(xs: &Tensor) -> Result<Vec<Vec<f32>>> {
    Ok(xs.to_vec2()?)
}

/// Fails where a product is further off than rounding its input can move it.
fn check_bound(kind: Option<GgmlDType>, xs: &Tensor, wide: &Tensor, ys: &Tensor) -> Result {
    let (xs, wide, ys) = (rows_of(xs)?, rows_of(wide)?, rows_of(ys)?);
    for (x, ys) in xs.iter().zip(&ys) {
        let moved: Vec<f64> = match kind {
            None => x.iter().map(|x| f64::from(x.abs()) / 255.0).collect(),
            Some(_) => {
                let largest = |x: &[f32]| x.iter().fold(0f32, |most, x| most.max(x.abs()));
                let of = |x: &[f32]| vec![f64::from(largest(x)) / 250.0; x.len()];
                x.chunks(32).flat_map(of).collect()
            }
        };
        for (w, y) in wide.iter().zip(ys) {
            let of = |(x, w): (&f32, &f32)| f64::from(*x) * f64::from(*w);
            let exact: f64 = x.iter().zip(w).map(of).sum();
            let bound: f64 = moved.iter().zip(w).map(|(moved, w)| moved * f64::from(w.abs())).sum();
            let apart = (f64::from(*y) - exact).abs();
            assert!(apart <= bound + 1e-4, "{kind:?}: {y}, not {exact}, give or take {bound}");
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    /// Few rows are what they are; many are off by no more than their rounding.
    #[test]
    fn products_are_rounded_by_as_much_as_it_says(
        kind in prop::sample::select(KINDS.to_vec()), rows in 1usize..100, out in 1usize..120,
        width in 1usize..70,
    ) {
        let run = || -> Result {
            let width = kind.map_or(width, |blocks| blocks.block_size() * (1 + width % 3));
            let (exact, wide) = projection(kind, out, width)?;
            let fast = exact.clone().with_compute(Compute::Fast);
            let xs = tiny::noise(2, &[rows, width], 1.0)?;
            let (exact, ys) = (exact.forward(&xs)?, fast.forward(&xs)?);
            match rows <= 16 {
                true => assert_identical("few rows", &ys, &exact)?,
                false => check_bound(kind, &xs, &wide, &ys)?,
            }
            let back = fast.with_compute(Compute::Exact);
            assert_identical("exact again", &back.forward(&xs)?, &exact)
        };
        run().map_err(|error| TestCaseError::fail(error.to_string()))?;
    }
}

/// A row gives the same bits whatever other rows come with it, as long as these are many.
#[test]
fn a_row_gives_the_same_bits_among_many() -> Result {
    for kind in KINDS {
        let (linear, _) = projection(kind, 70, 768)?;
        let linear = linear.with_compute(Compute::Fast);
        let xs = tiny::noise(2, &[90, 768], 1.0)?;
        let all = linear.forward(&xs)?;
        for (from, rows) in [(0, 17), (5, 40), (63, 27)] {
            let some = linear.forward(&xs.narrow(0, from, rows)?.contiguous()?)?;
            assert_identical(&format!("{kind:?}"), &some, &all.narrow(0, from, rows)?)?;
        }
    }
    Ok(())
}

/// A gradient is one of the exact product, and so is the product that it is taken of.
#[test]
fn gradients_are_exact() -> Result {
    for kind in KINDS {
        let (exact, _) = projection(kind, 24, 256)?;
        let fast = exact.clone().with_compute(Compute::Fast);
        let xs = Var::from_tensor(&tiny::noise(2, &[40, 256], 1.0)?)?;
        let slope = tiny::noise(3, &[40, 24], 1.0)?;
        let run = |linear: &Linear| -> Result<(Tensor, Tensor)> {
            let ys = linear.forward(xs.as_tensor())?;
            let gradients = (&ys * &slope)?.sum_all()?.backward()?;
            Ok((ys.detach(), gradients.get(xs.as_tensor()).ok_or("no gradient")?.clone()))
        };
        let ((ys, gradient), (exact_ys, exact_gradient)) = (run(&fast)?, run(&exact)?);
        assert_identical("product", &ys, &exact_ys)?;
        assert_identical("gradient", &gradient, &exact_gradient)?;
    }
    Ok(())
}

/// Random weights, of which some are in `bf16`.
fn weights(config: &Config, narrow: impl Fn(&str) -> bool) -> Result<HashMap<String, Tensor>> {
    let kept = |(name, weight): (String, Tensor)| {
        let dtype = if narrow(&name) { DType::BF16 } else { DType::F32 };
        let weight = weight.to_dtype(dtype)?;
        Ok((name, weight))
    };
    tiny::weights(config, 3)?.into_iter().map(kept).collect()
}

fn run(model: &Transformer, sight: Sight) -> Result<Tensor> {
    let batch = Batch::ragged(&[40, 19])?;
    let xs = model.embed_ids(&tiny::tokens(model.config(), 4, batch.tokens()))?;
    tiny::logits(model, &xs, Pass::uncached(&batch, sight))
}

/// A whole model: near the exact one, exact where it is asked to be again, and wherever nothing can be rounded.
#[test]
fn a_fast_model_is_near_the_exact_one() -> Result {
    let config = Config { hidden_size: 64, intermediate_size: 160, ..tiny::config() };
    for (name, narrow) in [("f32", false), ("bf16", true)] {
        let exact = Transformer::new(&config, &mut weights(&config, |_| narrow)?)?;
        let fast = exact.with_compute(Compute::Fast);
        for sight in [Sight::Causal, Sight::Bidirectional] {
            let expected = run(&exact, sight)?;
            match narrow {
                false => assert_identical(name, &run(&fast, sight)?, &expected)?,
                true => assert_close(name, &run(&fast, sight)?, &expected, 0.02)?,
            }
            assert_identical(name, &run(&fast.with_compute(Compute::Exact), sight)?, &expected)?;
        }
    }
    Ok(())
}

/// A router that is rounded sends tokens elsewhere, so it is the one matrix that never is.
#[test]
fn routers_stay_exact() -> Result {
    let experts = Experts { num_local_experts: 5, num_experts_per_tok: 2 };
    let config = Config { experts: Some(experts), ..tiny::config() };
    let exact = Transformer::new(&config, &mut weights(&config, |name| name.contains(".gate."))?)?;
    let fast = exact.with_compute(Compute::Fast);
    assert_identical("logits", &run(&fast, Sight::Causal)?, &run(&exact, Sight::Causal)?)
}

/// What thinks is computed as what decodes is: a model that has thought layers gives the same thoughts as one
/// that was exact all along, when it is exact again, and near ones when it is fast.
#[test]
fn thoughts_are_computed_as_answers_are() -> Result {
    let config = tiny::config();
    let mut tensors = weights(&config, |_| true)?;
    let layer = tensors.clone().into_iter().filter_map(|(name, tensor)| {
        let name = name.strip_prefix("model.layers.1.")?;
        Some((format!("thought.layers.0.{name}"), tensor))
    });
    tensors.extend(layer.collect::<Vec<_>>());
    let exact = HybridModel::new(ThoughtModel::new(&config, &mut tensors)?, None)?;
    let fast = exact.with_compute(Compute::Fast)?;
    let how = GenerationConfig::default().thinking(Thinking::new(2).span(0..3));
    let prompt = tiny::tokens(&config, 5, 40);
    let think =
        |model: &HybridModel| -> Result<Tensor> { Ok(model.think(prompt.as_slice(), &how)?.z) };
    let expected = think(&exact)?;
    assert_close("fast", &think(&fast)?, &expected, 0.05)?;
    assert_identical("exact again", &think(&fast.with_compute(Compute::Exact)?)?, &expected)
}

/// The default is exact, for a model from files as for one from memory.
#[test]
fn models_are_exact_unless_told_otherwise() -> Result {
    assert_eq!(Compute::default(), Compute::Exact);
    let model = HybridModel::from_folder(fixture("window"), DType::BF16, &Device::Cpu)?;
    let ids = tiny::tokens(model.config(), 1, 30);
    let how = GenerationConfig::default().max_tokens(3).prompt_logprobs(true);
    let answer = |model: &HybridModel| -> Result<_> {
        let answer = model.generate(ids.as_slice(), &how)?;
        Ok((answer.ids, answer.logprobs, answer.prompt_logprobs))
    };
    assert_eq!(answer(&model)?, answer(&model.with_compute(Compute::Exact)?)?);
    Ok(())
}
