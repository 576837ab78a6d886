//! Nudges: the gradients they go down, and where they may go.

#![allow(clippy::print_stderr, reason = "the figures of a real model")]

mod common;

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{D, DType, Device, Tensor, Var};
use candle_nn::ops::log_softmax;
use hybrid_attention::load::Checkpoint;
use hybrid_attention::model::{Batch, Linear, Pass, Transformer, Weights};
use hybrid_attention::refine::{
    ForwardNudge, GradientNudge, Optimizer, OutputNudge, Readout, Refine, Seq, Step, seq,
};
use hybrid_attention::thought::{EncodedBatch, ThoughtModel};
use hybrid_attention::{Config, Error, HybridModel, Thinking};
use proptest::prelude::*;

use common::tiny::{self, holds};
use common::{Result, assert_close, assert_identical, smollm2};

/// What the crate's own functions return.
type Theirs<T> = hybrid_attention::Result<T>;

/// What `ask` answers inside a thought pass over `ids`, asked with the readout of thoughts that
/// enter layer `entry` and with those thoughts.
fn ask(
    model: &ThoughtModel,
    (ids, batch, entry): (&[u32], &Batch, usize),
    ask: impl Fn(&dyn Readout, &Step<'_>) -> Theirs<Vec<Tensor>> + Send + Sync + 'static,
) -> Result<Vec<Tensor>> {
    let answers = Arc::new(Mutex::new(Vec::new()));
    let noted = Arc::clone(&answers);
    let ask = move |_: &Tensor, step: &Step<'_>| {
        let readout = step.readout.ok_or(Error::EmptyPrompt)?;
        if let Ok(mut noted) = noted.lock() {
            *noted = ask(readout, step)?;
        }
        Ok(step.z.clone())
    };
    let end = model.decoder().all_layers().end;
    let thinking = Thinking::new(1).span(entry..end).refine(seq().add_fn(ask));
    let mind = thinking.on(model)?;
    let text = EncodedBatch::new(model.decoder(), ids, batch.clone())?;
    let z = mind.encode(&text, Pass::Causal(batch))?;
    mind.think(&text, z, |_, _| ())?;
    let answers = answers.lock().map_err(|_| "poisoned")?;
    Ok(answers.clone())
}

/// The thoughts about `ids`, and the same after `op`: `[before, after, loss before, loss after]`.
fn nudged(
    model: &ThoughtModel,
    text: (&[u32], &Batch, usize),
    op: impl Refine + 'static,
) -> Result<[Tensor; 4]> {
    let answers = ask(model, text, move |readout, step| {
        let after = op.refine(step.z, step)?;
        let losses = [readout.loss(step.z)?, readout.loss(&after)?];
        let [old, new] = losses;
        Ok(vec![step.z.clone(), after, old, new])
    })?;
    answers.try_into().map_err(|_| "four answers".into())
}

fn scalar(xs: &Tensor) -> Result<f64> {
    let values = xs.flatten_all()?.to_dtype(DType::F32)?.to_vec1::<f32>()?;
    Ok(values.into_iter().map(f64::from).sum())
}

/// The relative change of each thought: `‖after - before‖ / ‖before‖`.
fn changes(before: &Tensor, after: &Tensor) -> Result<Vec<f32>> {
    let norm = |xs: &Tensor| xs.sqr()?.sum(D::Minus1)?.sqrt();
    Ok((norm(&(after - before)?)? / norm(before)?)?.to_vec1()?)
}

/// Texts of both kinds: one all context, and two of unequal length with plain tokens.
fn batches() -> Result<[Batch; 2]> {
    Ok([Batch::one(5)?, Batch::ragged(&[7, 4])?.with_context(0, &[1..3, 4..6])?])
}

fn ids(config: &Config, batch: &Batch, seed: u64) -> Vec<u32> {
    tiny::tokens(config, seed, batch.tokens())
}

fn windowed() -> Config {
    Config { sliding_window: Some(3), tie_word_embeddings: true, ..tiny::config() }
}

/// What the two nudges have in common is said of both.
fn both(
    gradient: impl Fn(GradientNudge) -> GradientNudge,
    forward: impl Fn(ForwardNudge) -> ForwardNudge,
) -> [Seq; 2] {
    [gradient(GradientNudge::new(3)).into(), forward(ForwardNudge::new(3).directions(3)).into()]
}

// The readout that nudges go by.

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Central differences of fourth order, along the gradient and along a random direction.
    #[test]
    fn the_readouts_gradient_is_the_slope_of_its_loss(
        config in tiny::configs(), seed in 0u64..1000, entry in 0usize..3,
        lengths in prop::collection::vec(1usize..9, 1..3),
    ) {
        let slopes = || -> Result {
            let model = tiny::thought_model(&config, seed)?;
            let batch = Batch::ragged(&lengths)?;
            let entry = entry % config.num_hidden_layers;
            let text = ids(&config, &batch, seed);
            let shape = [batch.tokens(), config.hidden_size];
            let random = tiny::noise(seed, &shape, 1.0)?;
            let answers = ask(&model, (&text, &batch, entry), move |readout, step| {
                let (loss, gradient) = readout.loss_and_gradient(step.z)?;
                let mut answers = vec![loss, readout.loss(step.z)?, gradient.clone()];
                for direction in [&gradient, &random] {
                    let length = direction.sqr()?.sum_all()?.sqrt()?.to_scalar::<f32>()?;
                    let unit = (direction / f64::from(length.max(1e-12)))?;
                    for size in STEPS.into_iter().flat_map(|it| [it, -it, 2.0 * it, -2.0 * it]) {
                        answers.push(readout.loss(&(step.z + (&unit * size)?)?)?);
                    }
                    answers.push(unit);
                }
                Ok(answers)
            })?;
            let [loss, fused, gradient, differences @ ..] = answers.as_slice() else {
                return Err("no answers".into());
            };
            assert_close("loss", loss, fused, 1e-5)?;
            let norm = scalar(&gradient.sqr()?)?.sqrt();
            for along in differences.chunks_exact(13) {
                let losses = along[..12].iter().map(scalar).collect::<Result<Vec<_>>>()?;
                let slopes = losses.chunks_exact(4).zip(STEPS).map(|(loss, step)| {
                    (8.0 * (loss[0] - loss[1]) - (loss[2] - loss[3])) / (12.0 * step)
                });
                let expected = scalar(&(gradient * &along[12])?)?;
                let off = slopes.map(|slope| (slope - expected).abs()).fold(f64::INFINITY, f64::min);
                assert!(off < 1e-3 * norm + 1e-4, "{expected} is off by {off}, the norm is {norm}");
            }
            Ok(())
        };
        holds(slopes())?;
    }
}

/// Half the distance between the inner points of a finite difference: the large for where rounding
/// counts, the small for where the loss is curved, as at a thought near zero. A wrong gradient
/// agrees with none.
const STEPS: [f64; 3] = [0.02, 0.005, 0.001];

/// The mean negative log-likelihood of each sequence's next tokens, with candle's own operations.
fn cross_entropy(logits: &Tensor, ids: &[u32], batch: &Batch) -> Theirs<Tensor> {
    let logprobs = log_softmax(logits, D::Minus1)?;
    let of_sequence = |rows: Range<usize>| -> Theirs<Tensor> {
        let predicted = rows.len() - 1;
        let targets = Tensor::new(&ids[rows.start + 1..rows.end], &Device::Cpu)?.unsqueeze(1)?;
        let of_targets = logprobs.narrow(0, rows.start, predicted)?.gather(&targets, 1)?;
        Ok((of_targets.sum_all()? / -(predicted as f64))?)
    };
    let losses = batch.all_rows().map(of_sequence).collect::<Theirs<Vec<_>>>()?;
    Ok(Tensor::stack(&losses, 0)?)
}

#[test]
fn the_readouts_gradient_is_that_of_one_graph_through_all_layers() -> Result {
    for config in [tiny::config(), windowed()] {
        let model = tiny::thought_model(&config, 1)?;
        for batch in batches()? {
            for entry in [0, 1] {
                let text = ids(&config, &batch, 1);
                let (own_text, own_batch) = (text.clone(), batch.clone());
                let answers = ask(&model, (&text, &batch, entry), move |readout, step| {
                    let z = Var::from_tensor(step.z)?;
                    let logits = readout.logits(z.as_tensor())?;
                    let loss = cross_entropy(&logits, &own_text, &own_batch)?;
                    let gradient = loss.sum_all()?.backward()?.remove(&z);
                    let gradient = gradient.ok_or(Error::EmptyPrompt)?;
                    let (ours, our_gradient) = readout.loss_and_gradient(step.z)?;
                    let fused = readout.logits(step.z)?;
                    Ok(vec![ours, loss, our_gradient, gradient.detach(), fused, logits.detach()])
                })?;
                let [ours, loss, our_gradient, gradient, fused, logits] = answers.as_slice() else {
                    return Err("no answers".into());
                };
                // a tracked gradient would keep the layers' graphs
                assert!(!ours.track_op() && !our_gradient.track_op());
                assert_close("loss", ours, &loss.detach(), 1e-5)?;
                assert_close("gradient", our_gradient, gradient, 1e-4)?;
                assert_close("fused and differentiable logits", fused, logits, 1e-5)?;
            }
        }
    }
    Ok(())
}

/// Longer than the block of positions whose scores stand in memory at a time.
#[test]
fn the_readouts_loss_is_the_cross_entropy_of_the_decoder() -> Result {
    let config = windowed();
    let model = tiny::thought_model(&config, 2)?;
    let batch = Batch::ragged(&[150, 1, 64, 65, 0])?;
    let text = ids(&config, &batch, 2);
    let answers = ask(&model, (&text, &batch, 1), |readout, step| {
        Ok(vec![readout.loss(step.z)?, readout.loss_and_gradient(step.z)?.0])
    })?;
    let decoder = model.decoder();
    let logits = tiny::logits(decoder, &decoder.embed_ids(&text)?, Pass::Causal(&batch))?;
    let logits = logits.to_vec2::<f32>()?;
    for (sequence, rows) in batch.all_rows().enumerate() {
        let (mut expected, predicted) = (0.0, rows.len().saturating_sub(1));
        for row in rows.start..rows.start + predicted {
            let scores: Vec<f64> = logits[row].iter().map(|&x| f64::from(x)).collect();
            let total = scores.iter().map(|score| score.exp()).sum::<f64>().ln();
            expected += (total - scores[text[row + 1] as usize]) / predicted as f64;
        }
        for answer in &answers {
            let loss = f64::from(answer.to_vec1::<f32>()?[sequence]);
            assert!((loss - expected).abs() < 1e-4, "{sequence}: {loss}, not {expected}");
        }
    }
    Ok(())
}

// Where a nudge goes.

fn target(like: &Tensor) -> Result<Tensor> {
    tiny::noise(99, like.dims(), 1.0)
}

fn distance(to: &Tensor) -> impl Fn(&Tensor, &Step<'_>) -> Theirs<Tensor> + use<> {
    let to = to.clone();
    move |xs, step| step.batch.sum(&(xs - &to)?.sqr()?)
}

/// The iterates written out: `x -= η s² · 2 (x - target)`, then back into the trust region.
#[test]
fn sgd_takes_the_steps_of_a_hand_calculation() -> Result {
    let z = tiny::noise(1, &[3, 8], 2.0)?;
    let goal = target(&z)?;
    let (rate, ratio) = (0.03, 0.3);
    for steps in [1, 2, 5] {
        let nudge = GradientNudge::new(steps)
            .optimizer(Optimizer::Sgd { learning_rate: rate })
            .trust(ratio)
            .objective_fn(distance(&goal));
        let got = nudge.refine(&z, &Step::new(&z, &z, &Batch::one(3)?))?;
        let got = got.to_vec2::<f32>()?;
        let (z, goal) = (z.to_vec2::<f32>()?, goal.to_vec2::<f32>()?);
        for token in 0..3 {
            let wide = |row: &[f32]| row.iter().map(|&x| f64::from(x)).collect::<Vec<_>>();
            let (start, goal) = (wide(&z[token]), wide(&goal[token]));
            let norm = |xs: &[f64]| xs.iter().map(|x| x * x).sum::<f64>().sqrt();
            let unit = norm(&start) / 8f64.sqrt();
            let mut x = start.clone();
            for _ in 0..steps {
                for (x, goal) in x.iter_mut().zip(&goal) {
                    *x -= rate * unit * unit * 2.0 * (*x - goal);
                }
                let offset: Vec<f64> = x.iter().zip(&start).map(|(x, start)| x - start).collect();
                let keep = (ratio * norm(&start) / norm(&offset)).min(1.0);
                x = start
                    .iter()
                    .zip(&offset)
                    .map(|(start, offset)| start + keep * offset)
                    .collect();
            }
            for (got, x) in got[token].iter().zip(&x) {
                assert!((f64::from(*got) - x).abs() < 1e-5, "{got}, not {x} after {steps}");
            }
        }
    }
    Ok(())
}

#[test]
fn a_target_within_reach_is_reached() -> Result {
    let z = tiny::noise(1, &[8, 16], 1.0)?;
    let goal = (&z + (target(&z)? * 0.2)?)?;
    let optimizers =
        [Optimizer::Sgd { learning_rate: 0.2 }, Optimizer::Adam { learning_rate: 0.02 }];
    for (optimizer, off) in optimizers.into_iter().zip([1e-4, 0.02]) {
        let nudge =
            GradientNudge::new(200).optimizer(optimizer).trust(1.0).objective_fn(distance(&goal));
        let got = nudge.refine(&z, &Step::new(&z, &z, &Batch::dense(2, 4)?))?;
        assert_close(&format!("{optimizer:?}"), &got, &goal, off)?;
    }
    Ok(())
}

/// Towards a target far away, each token goes as far as it may, however long it is.
#[test]
fn no_thought_leaves_its_trust_region() -> Result {
    let sizes = Tensor::new(&[[1e-3f32], [1.0], [300.0]], &Device::Cpu)?;
    let z = tiny::noise(1, &[3, 64], 1.0)?.broadcast_mul(&sizes)?;
    let goal = (target(&z)?.broadcast_mul(&sizes)? * 1e3)?;
    let batch = Batch::one(3)?;
    let step = Step::new(&z, &z, &batch);
    for ratio in [1e-3, 0.1, 2.0] {
        let nudges = both(
            |nudge| nudge.trust(ratio).objective_fn(distance(&goal)),
            |nudge| nudge.trust(ratio).sigma(5.0).objective_fn(distance(&goal)),
        );
        for nudge in nudges {
            let got = nudge.refine(&step)?;
            let changes = changes(&z, &got)?;
            let furthest = changes.iter().copied().fold(0.0, f32::max);
            assert!(furthest <= ratio as f32 * 1.0001, "{changes:?} beyond {ratio}");
        }
        // three steps of Adam at 1 leave every region; the long thought's target counts most
        let nudge = GradientNudge::new(3)
            .optimizer(Optimizer::Adam { learning_rate: 1.0 })
            .trust(ratio)
            .objective_fn(distance(&goal));
        let changes = changes(&z, &nudge.refine(&z, &step)?)?;
        assert!(changes.iter().all(|change| *change > ratio as f32 * 0.99), "{changes:?}");
    }
    Ok(())
}

/// With rates that lead anywhere, each sequence for itself.
#[test]
fn the_loss_of_no_sequence_rises() -> Result {
    let rates = [1e-3, 0.1, 10.0, 1e6];
    let optimizers = rates
        .map(|learning_rate| [Optimizer::Sgd { learning_rate }, Optimizer::Adam { learning_rate }]);
    for config in [tiny::config(), windowed()] {
        let model = tiny::thought_model(&config, 3)?;
        for batch in batches()? {
            let text = ids(&config, &batch, 3);
            let check = |name: &str, [_, _, before, after]: [Tensor; 4]| -> Result {
                let (before, after) = (before.to_vec1::<f32>()?, after.to_vec1::<f32>()?);
                for (before, after) in before.iter().zip(&after) {
                    // fused and differentiable forms round differently
                    assert!(after <= &(before + 1e-5), "{name}: {before} to {after}");
                }
                Ok(())
            };
            for &optimizer in optimizers.iter().flatten() {
                for trust in [0.1, 1e6] {
                    let nudge = GradientNudge::new(3).optimizer(optimizer).trust(trust);
                    let name = format!("{nudge:?}");
                    check(&name, nudged(&model, (&text, &batch, 0), nudge)?)?;
                }
            }
            for sigma in rates {
                let nudge = ForwardNudge::new(3).directions(2).sigma(sigma).trust(100.0);
                check(&format!("{nudge:?}"), nudged(&model, (&text, &batch, 1), nudge)?)?;
            }
        }
    }
    Ok(())
}

#[test]
fn the_loss_falls_on_random_models() -> Result {
    for (seed, config) in [tiny::config(), windowed()].into_iter().enumerate() {
        let model = tiny::thought_model(&config, seed as u64)?;
        let batch = Batch::one(12)?;
        let text = ids(&config, &batch, 4);
        for entry in [0, 2] {
            let nudge = GradientNudge::new(4);
            let [_, _, before, after] = nudged(&model, (&text, &batch, entry), nudge)?;
            assert!(scalar(&after)? < scalar(&before)? - 0.01, "{before} to {after}");
            let nudge = ForwardNudge::new(4);
            let [_, _, before, after] = nudged(&model, (&text, &batch, entry), nudge)?;
            assert!(scalar(&after)? < scalar(&before)? - 0.01, "{before} to {after}");
        }
    }
    Ok(())
}

/// Asked directly, not through a sequence that would put them back.
#[test]
fn rows_that_do_not_think_keep_their_bits() -> Result {
    let batch =
        Batch::ragged(&[6, 3])?.with_context(0, &[1..3, 4..6])?.with_context(1, &[0..1, 1..2])?;
    let z = tiny::noise(1, &[9, 8], 1.0)?;
    // zeros of both signs, and what need not be a number
    let z = z.slice_assign(&[0..1, 0..8], &Tensor::full(-0f32, (1, 8), &Device::Cpu)?)?;
    let z = z.slice_assign(&[3..4, 0..8], &Tensor::full(f32::NAN, (1, 8), &Device::Cpu)?)?;
    let (goal, real) = (target(&z)?, z.eq(&z)?);
    let loss = move |xs: &Tensor, step: &Step<'_>| -> Theirs<Tensor> {
        let off = real.where_cond(&(xs - &goal)?, &xs.zeros_like()?)?;
        step.batch.sum(&off.sqr()?)
    };
    let step = Step::new(&z, &z, &batch);
    let gradient = GradientNudge::new(3).objective_fn(loss.clone()).refine(&z, &step)?;
    let forward = ForwardNudge::new(3).objective_fn(loss).refine(&z, &step)?;
    for got in [gradient, forward] {
        for (row, thinks) in batch.thinks().into_iter().enumerate() {
            let token = |xs: &Tensor| -> Result<Vec<u32>> {
                Ok(xs.get(row)?.to_vec1::<f32>()?.into_iter().map(f32::to_bits).collect())
            };
            assert_eq!(token(&got)? == token(&z)?, thinks == 0, "row {row}");
        }
    }
    Ok(())
}

#[test]
fn a_batch_is_its_sequences_one_by_one() -> Result {
    for config in [tiny::config(), windowed()] {
        let model = tiny::thought_model(&config, 5)?;
        let sequences: [(usize, &[Range<usize>]); 3] =
            [(7, &[0..3, 3..7]), (4, &[1..2, 3..4]), (1, &[0..1, 1..1])];
        let mut batch = Batch::ragged(&sequences.each_ref().map(|it| it.0))?;
        for (sequence, (_, segments)) in sequences.iter().enumerate() {
            batch = batch.with_context(sequence, segments)?;
        }
        let text = ids(&config, &batch, 5);
        for nudge in both(|nudge| nudge, |nudge| nudge) {
            let run = |text: &[u32], batch: &Batch| {
                let nudge = nudge.clone();
                nudged(&model, (text, batch, 1), Whole(nudge))
            };
            let [_, together, ..] = run(&text, &batch)?;
            for (sequence, (length, segments)) in sequences.iter().enumerate() {
                let rows = batch.rows(sequence);
                let one = Batch::one(*length)?.with_context(0, segments)?;
                let [_, alone, ..] = run(&text[rows.clone()], &one)?;
                let together = together.narrow(0, rows.start, *length)?;
                assert_close(&format!("{nudge:?}, {sequence}"), &together, &alone, 2e-4)?;
            }
        }
    }
    Ok(())
}

/// A sequence as an op.
#[derive(Debug)]
struct Whole(Seq);

impl Refine for Whole {
    fn refine(&self, xs: &Tensor, step: &Step<'_>) -> Theirs<Tensor> {
        self.0.refine(&Step { h: xs, ..*step })
    }
}

#[test]
fn no_strength_is_no_change() -> Result {
    let model = tiny::thought_model(&tiny::config(), 6)?;
    let batch = Batch::dense(2, 4)?;
    let text = ids(model.decoder().config(), &batch, 6);
    let still: [Seq; 7] = [
        GradientNudge::new(0).into(),
        GradientNudge::new(2).trust(0.0).into(),
        GradientNudge::new(2).optimizer(Optimizer::Sgd { learning_rate: 0.0 }).into(),
        GradientNudge::new(2).optimizer(Optimizer::Adam { learning_rate: 0.0 }).into(),
        ForwardNudge::new(0).into(),
        ForwardNudge::new(2).trust(0.0).into(),
        ForwardNudge::new(2).sigma(0.0).into(),
    ];
    for nudge in still {
        let [before, after, ..] = nudged(&model, (&text, &batch, 1), Whole(nudge))?;
        assert_identical("thoughts", &after, &before)?;
    }
    // a thought of no length has nowhere to go
    let z = Tensor::zeros((2, 4), DType::F32, &Device::Cpu)?;
    let goal = target(&z)?;
    for nudge in both(|it| it.objective_fn(distance(&goal)), |it| it.objective_fn(distance(&goal)))
    {
        assert_identical("zeros", &nudge.refine(&Step::new(&z, &z, &Batch::one(2)?))?, &z)?;
    }
    Ok(())
}

#[test]
fn the_result_carries_no_gradient() -> Result {
    let z = Var::from_tensor(&tiny::noise(1, &[3, 8], 1.0)?)?;
    let goal = target(&z)?;
    for steps in [0, 2] {
        let batch = Batch::one(3)?;
        let step = Step::new(&z, &z, &batch);
        let gradient = GradientNudge::new(steps).objective_fn(distance(&goal)).refine(&z, &step)?;
        let forward = ForwardNudge::new(steps).objective_fn(distance(&goal)).refine(&z, &step)?;
        assert!(!gradient.track_op() && !forward.track_op());
    }
    Ok(())
}

/// Half precision is what an accelerator thinks in; the steps are counted in f32.
#[test]
fn thoughts_keep_their_type() -> Result {
    let z = tiny::noise(1, &[3, 8], 1.0)?;
    let goal = target(&z)?;
    let batch = Batch::one(3)?;
    let wide = GradientNudge::new(4).objective_fn(distance(&goal));
    let wide = wide.refine(&z, &Step::new(&z, &z, &batch))?;
    for (dtype, off) in [(DType::BF16, 1e-2), (DType::F16, 2e-3), (DType::F64, 1e-5)] {
        let z = z.to_dtype(dtype)?;
        let goal = goal.to_dtype(dtype)?;
        let loss = move |xs: &Tensor, step: &Step<'_>| -> Theirs<Tensor> {
            step.batch.sum(&(xs - &goal)?.to_dtype(DType::F32)?.sqr()?)
        };
        let step = Step::new(&z, &z, &batch);
        let got = GradientNudge::new(4).objective_fn(loss.clone()).refine(&z, &step)?;
        assert_eq!(got.dtype(), dtype);
        assert_close("gradient", &got.to_dtype(DType::F32)?, &wide, off)?;
        assert_eq!(ForwardNudge::new(2).objective_fn(loss).refine(&z, &step)?.dtype(), dtype);
    }
    Ok(())
}

// The search.

/// Everything an objective was asked about.
type Asked = Arc<Mutex<Vec<(Tensor, f32)>>>;

fn noting(goal: &Tensor) -> (Asked, impl Fn(&Tensor, &Step<'_>) -> Theirs<Tensor> + use<>) {
    let asked = Asked::default();
    let (noted, loss) = (Arc::clone(&asked), distance(goal));
    let noting = move |xs: &Tensor, step: &Step<'_>| {
        let loss = loss(xs, step)?;
        if let Ok(mut noted) = noted.lock() {
            noted.push((xs.detach(), loss.detach().to_vec1::<f32>()?.iter().sum()));
        }
        Ok(loss)
    };
    (asked, noting)
}

#[test]
fn nothing_is_evaluated_twice() -> Result {
    let z = tiny::noise(1, &[3, 8], 1.0)?;
    let batch = Batch::one(3)?;
    let step = Step::new(&z, &z, &batch);
    for steps in [1, 4] {
        let (asked, loss) = noting(&target(&z)?);
        GradientNudge::new(steps).objective_fn(loss).refine(&z, &step)?;
        assert_eq!(asked.lock().map_err(|_| "poisoned")?.len(), steps + 1);
        let (asked, loss) = noting(&target(&z)?);
        ForwardNudge::new(steps).directions(5).objective_fn(loss).refine(&z, &step)?;
        assert_eq!(asked.lock().map_err(|_| "poisoned")?.len(), 1 + steps * 11);
    }
    Ok(())
}

/// One step: mirrored probes of the right size, and then their weighted mean.
#[test]
fn a_search_goes_to_the_weighted_mean_of_its_probes() -> Result {
    let z = tiny::noise(1, &[3, 40], 2.0)?;
    let (asked, loss) = noting(&target(&z)?);
    let nudge = ForwardNudge::new(1).directions(6).sigma(0.07).temperature(0.8).objective_fn(loss);
    let got = nudge.refine(&z, &Step::new(&z, &z, &Batch::one(3)?))?;
    let asked = asked.lock().map_err(|_| "poisoned")?;
    let [(start, _), probes @ .., (mean, _)] = asked.as_slice() else {
        return Err("nothing was asked".into());
    };
    assert_identical("start", start, &z)?;
    assert_eq!(probes.len(), 12);
    for pair in probes.chunks_exact(2) {
        assert_close("mirrored", &((&pair[0].0 + &pair[1].0)? / 2.0)?, &z, 1e-6)?;
        for (probe, _) in pair {
            for change in changes(&z, probe)? {
                assert!((change - 0.07).abs() < 1e-5, "{change}");
            }
        }
    }
    let losses: Vec<f64> = probes.iter().map(|(_, loss)| f64::from(*loss)).collect();
    let average = losses.iter().sum::<f64>() / 12.0;
    let spread = (losses.iter().map(|x| (x - average).powi(2)).sum::<f64>() / 12.0).sqrt();
    let weights: Vec<f64> = losses.iter().map(|x| (-(x - average) / spread / 0.8).exp()).collect();
    let total = weights.iter().sum::<f64>();
    let mut expected = z.zeros_like()?;
    for ((probe, _), weight) in probes.iter().zip(&weights) {
        expected = (expected + (probe * (weight / total))?)?;
    }
    assert_close("mean", mean, &expected, 1e-5)?;
    // and what is returned is the best of all
    let best = asked.iter().min_by(|a, b| a.1.total_cmp(&b.1)).ok_or("nothing was asked")?;
    assert_identical("best", &got, &best.0)
}

#[test]
fn a_seed_says_where_to_look() -> Result {
    let z = tiny::noise(1, &[5, 8], 1.0)?;
    let batch = Batch::one(5)?;
    let goal = target(&z)?;
    let run = |seed, index| {
        let nudge = ForwardNudge::new(2).seed(seed).objective_fn(distance(&goal));
        nudge.refine(&z, &Step { index, passes: 2, ..Step::new(&z, &z, &batch) })
    };
    assert_identical("again", &run(7, 0)?, &run(7, 0)?)?;
    let others = [run(7, 1)?, run(8, 0)?];
    for other in &others {
        assert!(scalar(&(other - run(7, 0)?)?.abs()?)? > 0.0);
    }
    let default = ForwardNudge::new(2).objective_fn(distance(&goal));
    assert_identical("0", &default.refine(&z, &Step::new(&z, &z, &batch))?, &run(0, 0)?)
}

// What is refused.

#[test]
fn an_objective_is_checked() -> Result {
    let z = tiny::noise(1, &[6, 4], 1.0)?;
    let batch = Batch::dense(2, 3)?;
    let step = Step::new(&z, &z, &batch);
    let start = z.clone();
    type Loss = Box<dyn Fn(&Tensor, &Step<'_>) -> Theirs<Tensor> + Send + Sync>;
    let wrong: [(Loss, &str, bool); 7] = [
        (
            Box::new(|xs, _| Ok(xs.sqr()?.sum_all()?)),
            "expected a loss of [2] of F32, got [] of",
            true,
        ),
        (Box::new(|xs, _| Ok(xs.sqr()?.sum(1)?)), "got [6] of F32", true),
        (
            Box::new(|xs, step| Ok(step.batch.sum(&xs.sqr()?)?.to_dtype(DType::F64)?)),
            "got [2] of F64",
            true,
        ),
        (
            Box::new(|xs, step| Ok((step.batch.sum(xs)? * f64::NAN)?)),
            "losses are not finite at position 0",
            true,
        ),
        (
            Box::new(|_, _| Ok(Tensor::new(&[1f32, f32::INFINITY], &Device::Cpu)?)),
            "losses are not finite at position 1",
            true,
        ),
        (Box::new(|xs, step| step.batch.sum(&xs.detach())), "no gradient leads back from", false),
        // at the start the distance has no slope
        (
            Box::new(move |xs, step| Ok(step.batch.sum(&(xs - &start)?.sqr()?)?.sqrt()?)),
            "gradients are not finite at position 0",
            false,
        ),
    ];
    for (loss, message, of_both) in wrong {
        let loss = Arc::new(loss);
        let own = Arc::clone(&loss);
        let gradient = GradientNudge::new(2).objective_fn(move |xs, step| own(xs, step));
        let error = gradient.refine(&z, &step).err().ok_or("accepted")?;
        assert!(error.to_string().contains(message), "{error}, not {message}");
        let forward = ForwardNudge::new(2).objective_fn(move |xs, step| loss(xs, step));
        match forward.refine(&z, &step) {
            Ok(_) => assert!(!of_both, "{message}"),
            Err(error) => assert!(of_both && error.to_string().contains(message), "{error}"),
        }
    }
    Ok(())
}

#[test]
fn thoughts_of_any_shape_are_nudged_or_refused() -> Result {
    for shape in [[0, 3, 4], [2, 0, 4], [2, 3, 0], [2, 3, 1]] {
        let z = Tensor::zeros(&shape, DType::F32, &Device::Cpu)?;
        for z in [z.flatten_to(1)?, z] {
            for batch in [Batch::dense(shape[0], shape[1])?, Batch::ragged(&[3, 1])?] {
                let fits = batch.tokens() == shape[0] * shape[1];
                let step = Step::new(&z, &z, &batch);
                let gradient = GradientNudge::new(2).objective_fn(distance(&z)).refine(&z, &step);
                let forward = ForwardNudge::new(2).objective_fn(distance(&z)).refine(&z, &step);
                for got in [gradient, forward] {
                    match got {
                        Ok(got) => assert!(fits && got.dims() == z.dims(), "{z:?}, {batch:?}"),
                        Err(Error::Parameter { name: "batch", .. }) => assert!(!fits, "{z:?}"),
                        // candle takes no sums of nothing
                        Err(error) => assert!(shape.contains(&0), "{z:?}: {error}"),
                    }
                }
            }
        }
    }
    let z = Tensor::zeros((3, 4), DType::F32, &Device::Cpu)?;
    let batch = Batch::dense(3, 4)?;
    let fewer = GradientNudge::new(1).objective_fn(distance(&z));
    assert!(fewer.refine(&z, &Step::new(&z, &z, &batch)).is_err());
    Ok(())
}

#[test]
fn without_a_model_there_must_be_an_objective() -> Result {
    let z = tiny::noise(1, &[3, 4], 1.0)?;
    let batch = Batch::one(3)?;
    for nudge in both(|nudge| nudge, |nudge| nudge) {
        let Err(Error::Refinement { source, .. }) = nudge.refine(&Step::new(&z, &z, &batch)) else {
            return Err("accepted".into());
        };
        assert!(matches!(*source, Error::Parameter { name: "readout", .. }), "{source}");
    }
    Ok(())
}

#[test]
fn parameters_have_ranges() -> Result {
    let sgd = |learning_rate| GradientNudge::new(1).optimizer(Optimizer::Sgd { learning_rate });
    let adam = |learning_rate| GradientNudge::new(1).optimizer(Optimizer::Adam { learning_rate });
    let good: [Seq; 6] = [
        GradientNudge::new(1000).trust(1e6).into(),
        sgd(1e6).into(),
        adam(0.0).into(),
        ForwardNudge::new(1000).directions(1000).sigma(1e6).trust(0.0).into(),
        ForwardNudge::new(0).directions(1).temperature(1e-300).into(),
        ForwardNudge::new(0).temperature(1e6).seed(u64::MAX).into(),
    ];
    good.iter().try_for_each(Seq::validate)?;
    for bad in [-1.0, 1.1e6, f64::NAN, f64::INFINITY] {
        let nudges: [(Seq, &str); 6] = [
            (GradientNudge::new(1).trust(bad).into(), "trust"),
            (sgd(bad).into(), "learning_rate"),
            (adam(bad).into(), "learning_rate"),
            (ForwardNudge::new(1).trust(bad).into(), "trust"),
            (ForwardNudge::new(1).sigma(bad).into(), "sigma"),
            (ForwardNudge::new(1).temperature(bad).into(), "temperature"),
        ];
        for (nudge, parameter) in nudges {
            refused(&nudge, parameter)?;
        }
        let output = OutputNudge::new(1).learning_rate(bad).validate();
        assert!(matches!(output, Err(Error::Parameter { name: "learning_rate", .. })));
    }
    refused(&GradientNudge::new(1001).into(), "steps")?;
    refused(&ForwardNudge::new(1001).into(), "steps")?;
    refused(&ForwardNudge::new(1).directions(0).into(), "directions")?;
    refused(&ForwardNudge::new(1).directions(1001).into(), "directions")?;
    refused(&ForwardNudge::new(1).temperature(0.0).into(), "temperature")?;
    assert!(OutputNudge::new(1001).validate().is_err());
    Ok(OutputNudge::new(1000).validate()?)
}

fn refused(nudge: &Seq, parameter: &str) -> Result {
    match nudge.validate() {
        Err(Error::Refinement { source, .. }) => {
            assert!(
                matches!(*source, Error::Parameter { name, .. } if name == parameter),
                "{source}"
            );
            Ok(())
        }
        other => Err(format!("{nudge:?}: {other:?}").into()),
    }
}

#[test]
fn settings_survive_being_written() -> Result {
    let every = seq()
        .add(GradientNudge::new(3).optimizer(Optimizer::Sgd { learning_rate: 0.5 }).trust(0.2))
        .add(
            ForwardNudge::new(2)
                .directions(5)
                .sigma(0.01)
                .temperature(2.0)
                .trust(0.3)
                .seed(u64::MAX),
        );
    let written = serde_json::to_value(&every)?;
    let expected = serde_json::json!([
        {"op": "gradient_nudge", "steps": 3, "optimizer": {"sgd": {"learning_rate": 0.5}}, "trust": 0.2},
        {"op": "forward_nudge", "steps": 2, "directions": 5, "sigma": 0.01, "temperature": 2.0,
         "trust": 0.3, "seed": u64::MAX},
    ]);
    assert_eq!(written, expected);
    let read: Seq = serde_json::from_value(written)?;
    assert_eq!(serde_json::to_value(&read)?, expected);

    // what may be left out has the default of `new`
    let read: Seq = serde_json::from_str(
        r#"[{"op": "gradient_nudge", "steps": 4}, {"op": "forward_nudge", "steps": 4}]"#,
    )?;
    let default = seq().add(GradientNudge::new(4)).add(ForwardNudge::new(4));
    assert_eq!(serde_json::to_value(&read)?, serde_json::to_value(&default)?);
    assert_eq!(
        serde_json::to_value(GradientNudge::new(4))?,
        serde_json::json!({"steps": 4, "optimizer": {"adam": {"learning_rate": 0.01}}, "trust": 0.1}),
    );
    let output: OutputNudge = serde_json::from_str(r#"{"steps": 3}"#)?;
    assert_eq!(output, OutputNudge::new(3));
    assert_eq!(serde_json::to_string(&output)?, r#"{"steps":3,"learning_rate":0.01}"#);

    for unknown in [
        r#"[{"op": "gradient_nudge"}]"#,
        r#"[{"op": "gradient_nudge", "steps": 1, "goal": null}]"#,
        r#"[{"op": "gradient_nudge", "steps": 1, "sigma": 0.1}]"#,
        r#"[{"op": "gradient_nudge", "steps": -1}]"#,
        r#"[{"op": "gradient_nudge", "steps": 1, "optimizer": {"adam": {"learning_rate": 1, "beta": 1}}}]"#,
        r#"[{"op": "gradient_nudge", "steps": 1, "optimizer": "adam"}]"#,
        r#"[{"op": "forward_nudge", "steps": 1, "learning_rate": 0.1}]"#,
    ] {
        assert!(serde_json::from_str::<Seq>(unknown).is_err(), "{unknown}");
    }
    assert!(serde_json::from_str::<OutputNudge>(r#"{"steps": 1, "trust": 1}"#).is_err());

    // an objective is code
    let none = Tensor::zeros((1, 1), DType::F32, &Device::Cpu)?;
    for nudge in both(|it| it.objective_fn(distance(&none)), |it| it.objective_fn(distance(&none)))
    {
        let error = serde_json::to_string(&nudge).err().ok_or("written")?;
        assert!(error.to_string().contains("only code can make it"), "{error}");
    }
    let own = GradientNudge::new(1).objective_fn(distance(&none));
    assert!(own.to_config().is_none() && serde_json::to_string(&own).is_err());
    assert!(own == own.clone() && own != GradientNudge::new(1));
    Ok(())
}

// Quantised weights.

/// Projections in blocks of 32, all else as it is.
struct Quantized(HashMap<String, Tensor>);

impl Weights for Quantized {
    fn tensor(&mut self, name: &str, shape: &[usize]) -> Theirs<Tensor> {
        self.0.tensor(name, shape)
    }

    fn linear(&mut self, name: &str, out_features: usize, in_features: usize) -> Theirs<Linear> {
        let weight = self.0.tensor(name, &[out_features, in_features])?;
        Linear::quantized(Arc::new(QTensor::quantize(&weight, GgmlDType::Q8_0)?))
    }
}

/// Both forms go over quantised weights as they do over the numbers that the blocks stand for.
#[test]
fn quantised_weights_are_nudged_over_like_any_others() -> Result {
    let config = Config {
        hidden_size: 32,
        intermediate_size: 64,
        head_dim: 8,
        sliding_window: Some(4),
        ..tiny::config()
    };
    let weights = tiny::weights(&config, 8)?;
    let unpacked = weights.iter().map(|(name, weight)| -> Result<_> {
        let matrix = weight.rank() == 2 && !name.contains("embed_tokens");
        let weight = match matrix {
            true => QTensor::quantize(weight, GgmlDType::Q8_0)?.dequantize(&Device::Cpu)?,
            false => weight.clone(),
        };
        Ok((name.clone(), weight))
    });
    let mut unpacked: HashMap<_, _> = unpacked.collect::<Result<_>>()?;
    let quantized = Transformer::new(&config, &mut Quantized(weights))?.into();
    let unpacked = Transformer::new(&config, &mut unpacked)?.into();
    let batch = Batch::ragged(&[8, 5])?;
    let text = ids(&config, &batch, 8);
    fn same(
        models: [&ThoughtModel; 2],
        text: (&[u32], &Batch, usize),
        op: impl Refine + Clone + 'static,
    ) -> Result {
        let [quantized, unpacked] = models;
        let [before, after, loss, nudged_loss] = nudged(quantized, text, op.clone())?;
        let [_, expected, ..] = nudged(unpacked, text, op)?;
        assert_close("nudged", &after, &expected, 1e-4)?;
        assert!(scalar(&(after - before)?.abs()?)? > 0.0);
        assert!(scalar(&nudged_loss)? < scalar(&loss)? - 0.01, "{loss} to {nudged_loss}");
        Ok(())
    }
    for entry in [0, 1] {
        let text = (text.as_slice(), &batch, entry);
        same([&quantized, &unpacked], text, GradientNudge::new(2))?;
        same([&quantized, &unpacked], text, ForwardNudge::new(4))?;
    }
    Ok(())
}

// The vector at the output.

/// AdamW on `mean(Wᵀ (softmax - onehot))` in scalar loops, the best kept; over several blocks.
#[test]
fn the_output_vector_is_a_scalar_calculation() -> Result {
    let (hidden, vocab, seq) = (5, 7, 150);
    let normed = tiny::noise(1, &[seq, hidden], 1.0)?;
    let weight = tiny::noise(2, &[vocab, hidden], 1.0)?;
    let text = tiny::tokens(&Config { vocab_size: vocab, ..tiny::config() }, 3, seq);
    let head = Linear::dense(&weight)?;
    let (h, w) = (normed.to_vec2::<f32>()?, weight.to_vec2::<f32>()?);
    let evaluate = |delta: &[f64]| -> (f64, Vec<f64>) {
        let (mut loss, mut gradient) = (0.0, vec![0.0; hidden]);
        for (h, &next) in h.iter().zip(&text[1..]) {
            let at = |w: &Vec<f32>| -> f64 {
                (0..hidden).map(|i| f64::from(w[i]) * (f64::from(h[i]) + delta[i])).sum()
            };
            let scores: Vec<f64> = w.iter().map(at).collect();
            let total: f64 = scores.iter().map(|score| score.exp()).sum();
            loss += (total.ln() - scores[next as usize]) / (seq - 1) as f64;
            for (token, score) in scores.iter().enumerate() {
                let off = score.exp() / total - f64::from(u8::from(token == next as usize));
                for i in 0..hidden {
                    gradient[i] += off * f64::from(w[token][i]) / (seq - 1) as f64;
                }
            }
        }
        (loss, gradient)
    };
    for (steps, rate) in [(1, 0.01), (4, 0.1), (4, 5.0)] {
        let (mut delta, mut m, mut v) = (vec![0.0; hidden], vec![0.0; hidden], vec![0.0; hidden]);
        let mut tried = vec![(evaluate(&delta).0, delta.clone())];
        for t in 1..=steps {
            let (_, gradient) = evaluate(&delta);
            for i in 0..hidden {
                m[i] = 0.9 * m[i] + 0.1 * gradient[i];
                v[i] = 0.999 * v[i] + 0.001 * gradient[i].powi(2);
                let m_hat = m[i] / (1.0 - 0.9f64.powi(t));
                let v_hat: f64 = v[i] / (1.0 - 0.999f64.powi(t));
                delta[i] -= rate * (m_hat / (v_hat.sqrt() + 1e-5) + 1e-8 * delta[i]);
            }
            tried.push((evaluate(&delta).0, delta.clone()));
        }
        let best = tried.iter().min_by(|a, b| a.0.total_cmp(&b.0)).ok_or("none")?;
        let nudge = OutputNudge::new(steps as usize).learning_rate(rate);
        let got = nudge.fit(&normed, &text, &|xs| head.forward(xs))?;
        assert_eq!((got.dims(), got.track_op()), ([1, hidden].as_slice(), false));
        for (got, expected) in got.to_vec2::<f32>()?[0].iter().zip(&best.1) {
            let off = (f64::from(*got) - expected).abs();
            assert!(off < 1e-4 * rate, "{got}, not {expected}, at {rate}");
        }
    }
    Ok(())
}

#[test]
fn an_output_vector_needs_a_text_that_fits() -> Result {
    let weight = tiny::noise(2, &[7, 5], 1.0)?;
    let head = Linear::dense(&weight)?;
    let forward = |xs: &Tensor| head.forward(xs);
    let normed = tiny::noise(1, &[3, 5], 1.0)?;
    let fit = |normed: &Tensor, ids: &[u32]| OutputNudge::new(2).fit(normed, ids, &forward);
    assert!(scalar(&fit(&normed, &[1, 2, 3])?.abs()?)? > 0.0);
    let zero = Tensor::zeros((1, 5), DType::F32, &Device::Cpu)?;
    assert_identical("one token", &fit(&normed.narrow(0, 0, 1)?, &[1])?, &zero)?;
    assert_identical("no token", &fit(&normed.narrow(0, 0, 0)?, &[])?, &zero)?;
    assert_identical("no step", &OutputNudge::new(0).fit(&normed, &[1, 2, 3], &forward)?, &zero)?;

    for (normed, ids) in [
        (normed.clone(), [1u32, 2].as_slice()),
        (normed.unsqueeze(0)?, &[1, 2, 3]),
        (tiny::noise(1, &[3, 1, 5], 1.0)?, &[1, 2, 3]),
    ] {
        let error = fit(&normed, ids);
        assert!(matches!(error, Err(Error::Parameter { name: "normed", .. })), "{error:?}");
    }
    let error = fit(&normed, &[1, 2, 7]);
    let Err(Error::TokenOutOfRange { position: 2, id: 7, vocab_size: 7 }) = error else {
        return Err(format!("{error:?}").into());
    };
    let infinite = (&normed * f64::INFINITY)?;
    assert!(matches!(fit(&infinite, &[1, 2, 3]), Err(Error::NotFinite { what: "losses", .. })));
    let cut = OutputNudge::new(1).fit(&normed, &[1, 2, 3], &|xs| head.forward(&xs.detach()));
    assert!(matches!(cut, Err(Error::Unsupported { .. })), "{cut:?}");
    assert!(OutputNudge::new(1).fit(&normed, &[1, 2, 3], &|xs| Ok(xs.sum_all()?)).is_err());
    Ok(())
}

// A real model.

const PROMPTS: [&str; 2] = [
    "The capital of France is Paris, and the capital of Germany is",
    "A river is a natural stream of water that flows towards an ocean, a lake, or another river.",
];

/// Prints the figures and fails unless each prompt's loss falls by `least` nats.
fn falls(name: &str, before: f64, after: f64, least: f64) {
    eprintln!("{name}: {before:.4} to {after:.4}");
    assert!(after < before - least, "{name}: {before} to {after}");
}

#[test]
fn the_loss_falls_on_smollm2() -> Result {
    let Some(path) = smollm2() else { return Ok(()) };
    let quantised = HybridModel::from_gguf(&path, None, &Device::Cpu)?;
    let tokenizer = quantised.tokenizer().ok_or("no tokenizer")?;
    for prompt in PROMPTS {
        let text = tokenizer.encode(prompt, true)?;
        let batch = Batch::one(text.len())?;
        let nudge = ForwardNudge::new(2).directions(4);
        let [_, _, before, after] = nudged(quantised.thought_model(), (&text, &batch, 20), nudge)?;
        falls("forward nudge at layer 20", scalar(&before)?, scalar(&after)?, 0.001);
    }

    let dense = HybridModel::from_gguf(&path, DType::F32, &Device::Cpu)?;
    let (thinker, model) = (dense.thought_model(), dense.transformer());
    let checkpoint = Checkpoint::open(&path)?;
    let shape = [checkpoint.config().vocab_size, checkpoint.config().hidden_size];
    let mut weights = checkpoint.weights(Some(DType::F32), &Device::Cpu);
    let head = Linear::dense(&weights.tensor("model.embed_tokens.weight", &shape)?)?;
    for prompt in PROMPTS {
        let text = tokenizer.encode(prompt, true)?;
        let batch = Batch::one(text.len())?;
        for entry in [0, 20] {
            let nudge = GradientNudge::new(2);
            let [z, nudged_z, before, after] = nudged(thinker, (&text, &batch, entry), nudge)?;
            let furthest = changes(&z, &nudged_z)?.into_iter().fold(0.0, f32::max);
            assert!(furthest < 0.0201, "{furthest}");
            let name = format!("gradient nudge at layer {entry}");
            falls(&name, scalar(&before)?, scalar(&after)?, 0.05);
        }
        let xs = model.embed_ids(&text)?;
        let normed =
            model.norm(&model.forward(&xs, model.all_layers(), Pass::Causal(&batch))?)?;
        let delta = OutputNudge::new(5).fit(&normed, &text, &|xs| head.forward(xs))?;
        let loss = |xs: &Tensor| -> Result<f64> {
            scalar(&cross_entropy(&head.forward(xs)?, &text, &batch)?)
        };
        falls("output nudge", loss(&normed)?, loss(&normed.broadcast_add(&delta)?)?, 0.01);
    }
    Ok(())
}
