//! Noise on thoughts: what is drawn, on which rows, and that nothing but its seed decides it.

mod common;

use candle_core::{D, DType, Tensor};
use hybrid_attention::model::{Batch, Pass};
use hybrid_attention::refine::{Interpolate, Noise, Refine, Step, seq};
use hybrid_attention::thought::Thoughts;
use hybrid_attention::{Error, GenerationConfig, HandOff, Thinking};
use proptest::prelude::*;
use rayon::ThreadPoolBuilder;
use serde_json::json;

use common::tiny::{self, holds};
use common::{Result, assert_close, assert_identical};

fn numbers(xs: &Tensor) -> Result<Vec<f64>> {
    Ok(xs.to_dtype(DType::F64)?.flatten_all()?.to_vec1()?)
}

/// The lengths of the rows.
fn lengths(xs: &Tensor) -> Result<Vec<f64>> {
    numbers(&xs.sqr()?.sum(D::Minus1)?.sqrt()?)
}

fn mean(of: impl ExactSizeIterator<Item = f64>) -> f64 {
    let count = of.len() as f64;
    of.sum::<f64>() / count
}

/// Random rows of very different lengths, the last of zeros.
fn rows(tokens: usize, hidden: usize) -> Result<Tensor> {
    let scales: Vec<f32> =
        (0..tokens).map(|row| if row + 1 == tokens { 0.0 } else { (row + 1) as f32 }).collect();
    let xs = tiny::noise(3, &[tokens, hidden], 1.0)?;
    Ok(xs.broadcast_mul(&Tensor::from_vec(scales, (tokens, 1), xs.device())?)?)
}

/// Over 100,000 numbers, the moments of what is drawn are within five standard errors of those promised.
#[test]
fn what_is_drawn_has_the_moments_it_is_said_to_have() -> Result {
    let (tokens, hidden) = (100, 1001); // an odd width: Gaussian numbers come in pairs
    let (xs, batch) = (rows(tokens, hidden)?, Batch::one(tokens)?);
    let count = (tokens * hidden) as f64;
    for (noise, fourth) in [
        (Noise::per_coordinate(0.25), 3.0),
        (Noise::per_coordinate(0.25).uniform(), 1.8),
        (Noise::per_coordinate(0.25).seed(u64::MAX).subtract(), 3.0),
    ] {
        let drawn = numbers(&(noise.on(&xs, &batch, 5)? - &xs)?)?;
        let moment = |power: i32| mean(drawn.iter().map(|it| (it / 0.25).powi(power)));
        assert!(moment(1).abs() < 5.0 / count.sqrt(), "{noise:?}: mean {}", moment(1));
        let off = (moment(2) - 1.0).abs();
        assert!(off < 5.0 * 2f64.sqrt() / count.sqrt(), "{noise:?}: variance {}", moment(2));
        assert!((moment(4) - fourth).abs() < 0.2, "{noise:?}: fourth moment {}", moment(4));
        // One row does not repeat another, nor a column.
        let of = |from: usize, by: usize| drawn[from..].iter().step_by(by).take(1001);
        let together = |a: usize, b: usize, by: usize| {
            of(a, by).zip(of(b, by)).map(|(a, b)| a * b).sum::<f64>()
                / (0.0625 * 1001f64.min(drawn.len() as f64 / by as f64))
        };
        assert!(together(0, hidden, 1).abs() < 0.2 && together(0, 1, hidden).abs() < 0.5);
    }
    let even = (Noise::per_coordinate(1.0).uniform().on(&xs, &batch, 0)? - &xs)?;
    assert!(numbers(&even)?.iter().all(|it| it.abs() <= 3f64.sqrt() + 1e-4));
    Ok(())
}

#[test]
fn deviations_are_of_what_they_are_said_to_be_of() -> Result {
    let (tokens, hidden) = (50, 1600);
    let (xs, batch) = (rows(tokens, hidden)?, Batch::one(tokens)?);
    let before = lengths(&xs)?;
    let length = |noise: &Noise| lengths(&(noise.on(&xs, &batch, 0)? - &xs)?);
    for shape in [|noise: Noise| noise, Noise::uniform] {
        for (row, length) in length(&shape(Noise::per_coordinate(0.3)))?.iter().enumerate() {
            assert!((length / (0.3 * 40.0) - 1.0).abs() < 0.1, "row {row}: {length}");
        }
        for (row, length) in length(&shape(Noise::per_row(0.3)))?.iter().enumerate() {
            assert!((length / 0.3 - 1.0).abs() < 0.1, "row {row}: {length}");
        }
        let relative = length(&shape(Noise::relative(0.3)))?;
        for (row, (length, before)) in relative.iter().zip(&before).enumerate() {
            assert!((length - 0.3 * before).abs() <= 0.03 * before, "row {row}: {length}");
        }
        // With the lengths kept, the direction is that of the longer row.
        let (free, kept) = (shape(Noise::relative(2.0)), shape(Noise::relative(2.0)).keep_norm());
        let (free, kept) = (free.on(&xs, &batch, 0)?, kept.on(&xs, &batch, 0)?);
        let (long, after) = (lengths(&free)?, lengths(&kept)?);
        for ((before, long), after) in before.iter().zip(&long).zip(&after) {
            assert!((after - before).abs() <= 1e-5 * before, "{after} for {before}");
            assert!((long - 5f64.sqrt() * before).abs() <= 0.2 * before, "{long} for {before}");
        }
        let by: Vec<f32> = before
            .iter()
            .zip(&long)
            .map(|(before, long)| if *long > 0.0 { (before / long) as f32 } else { 0.0 })
            .collect();
        let by = Tensor::from_vec(by, (tokens, 1), xs.device())?;
        assert_close("direction", &kept, &free.broadcast_mul(&by)?, 1e-5)?;
    }
    Ok(())
}

fn noises() -> impl Strategy<Value = Noise> {
    let of = prop::sample::select(vec![Noise::per_coordinate, Noise::per_row, Noise::relative]);
    (of, 0.01..3.0, any::<(bool, bool, bool, u64)>()).prop_map(
        |(of, sd, (uniform, subtract, keep_norm, seed))| {
            let noise = of(sd).seed(seed);
            let noise = if uniform { noise.uniform() } else { noise };
            let noise = if subtract { noise.subtract() } else { noise };
            if keep_norm { noise.keep_norm() } else { noise }
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    /// The rows of a sequence are the same whatever stands beside it, whichever thread draws them; and they are
    /// others for another seed, candidate or pass.
    #[test]
    fn only_seed_candidate_pass_and_place_decide(
        noise in noises(), batch in tiny::batches(1..4, 9, 0..5), hidden in 1usize..9,
        candidate: u64, index in 0usize..4, threads in 1usize..8, seed: u64,
    ) {
        holds((|| {
            let xs = tiny::noise(seed, &[batch.tokens(), hidden], 1.0)?;
            let step = Step { candidate, index, ..Step::new(&xs, &xs, &batch) };
            let all = noise.refine(&xs, &step)?;
            let pool = ThreadPoolBuilder::new().num_threads(threads).build()?;
            let refined = pool.install(|| {
                let step = Step { candidate, index, ..Step::new(&xs, &xs, &batch) };
                noise.refine(&xs, &step).map_err(|error| error.to_string())
            })?;
            assert_identical("threads", &refined, &all)?;
            for text in 0..batch.sequences() {
                let alone = Batch::one(batch.rows(text).len())?;
                let own = tiny::rows_of(&xs, &batch, text)?;
                let step = Step { candidate, index, ..Step::new(&own, &own, &alone) };
                let expected = tiny::rows_of(&all, &batch, text)?;
                assert_identical("alone", &noise.refine(&own, &step)?, &expected)?;
            }
            let first = noise.on(&xs, &batch, candidate)?;
            let others = [
                noise.refine(&xs, &Step { candidate: candidate ^ 1, ..step })?,
                noise.refine(&xs, &Step { index: index + 1, ..step })?,
                noise.clone().seed(1 << 40).refine(&xs, &step)?,
                noise.on(&xs, &batch, candidate ^ 1)?,
                first,
            ];
            // Of one channel, only the sign of a row is left where lengths are kept.
            if hidden > 1 {
                for other in others {
                    assert_ne!(numbers(&other)?, numbers(&all)?);
                }
            }
            Ok(())
        })())?;
    }

    #[test]
    fn taken_off_and_added_it_is_the_same(
        seed: u64, sd in 0.0..2.0, of in 0usize..3,
    ) {
        holds((|| {
            let (xs, batch) = (rows(6, 8)?, Batch::ragged(&[4, 2])?);
            let noise = [Noise::per_coordinate, Noise::per_row, Noise::relative][of](sd).seed(seed);
            let (more, less) = (noise.on(&xs, &batch, 3)?, noise.subtract().on(&xs, &batch, 3)?);
            assert_close("middle", &((more + less)? / 2.0)?, &xs, 1e-5)
        })())?;
    }
}

#[test]
fn without_a_deviation_no_bit_changes() -> Result {
    let (xs, batch) = (rows(6, 8)?, Batch::one(6)?);
    for noise in [Noise::per_coordinate(0.0), Noise::per_row(0.0), Noise::relative(0.0).keep_norm()]
    {
        assert_identical("rows", &noise.on(&xs, &batch, 9)?, &xs)?;
        let step = Step { candidate: 9, ..Step::new(&xs, &xs, &batch) };
        assert_identical("rows", &noise.refine(&xs, &step)?, &xs)?;
    }
    // Half precision stays what it is.
    let half = xs.to_dtype(DType::BF16)?;
    assert_eq!(Noise::relative(0.1).on(&half, &batch, 0)?.dtype(), DType::BF16);
    Ok(())
}

/// Before the first pass noise is put on context only, and what is free of it stays so for whoever reads it.
#[test]
fn the_loop_begins_with_noise() -> Result {
    let model = tiny::thought_model(&tiny::config(), 1)?;
    let batch = Batch::ragged(&[7, 4])?.with_context(0, &[1..3, 4..6])?;
    let text = tiny::text(model.decoder(), &batch, 1)?;
    let noise = Noise::relative(0.5).seed(3);
    let refine = Interpolate::new(0.3);
    let plain = Thinking::new(2).span(1..3).refine(refine.clone());
    let noised = plain.clone().noise(noise.clone());
    let think = |thinking: &Thinking, candidate: u64, z: &Tensor| -> Result<Thoughts> {
        let mind = thinking.on(&model)?.candidate(candidate);
        Ok(mind.think(&text, z.clone(), |_, _| ())?)
    };
    let first = noised.on(&model)?.encode(&text, Pass::Causal(&batch))?;
    let got = think(&noised, 4, &first)?;
    assert_identical("first", &got.first, &first)?;

    // By hand: the rows of context with noise, the others as they came.
    let drawn = noise.on(&first, &batch, 4)?;
    let pick: Vec<u8> = batch.thinks();
    let pick = Tensor::from_vec(pick, (11, 1), first.device())?.broadcast_as(first.shape())?;
    let z = pick.where_cond(&drawn, &first)?;
    assert_identical("thoughts", &got.z, &think(&plain, 0, &z)?.z)?;
    assert!(numbers(&got.z)? != numbers(&think(&noised, 5, &first)?.z)?, "another candidate");
    assert!(numbers(&got.z)? != numbers(&think(&plain, 4, &first)?.z)?, "no noise");

    // After a pass: an op that is told which pass it is.
    let op = plain.clone().passes(1).refine(seq().add(refine.clone()).add(noise.clone()));
    let once = think(&plain.passes(1), 0, &first)?.z;
    let step = Step { candidate: 4, index: 0, ..Step::new(&once, &once, &batch) };
    let by_hand = pick.where_cond(&noise.refine(&once, &step)?, &once)?;
    assert_identical("op", &think(&op, 4, &first)?.z, &by_hand)
}

/// Noise of deviation 0, and any noise without passes, leave an answer as it is, to the bit. So does noise on
/// thoughts of which the decoder receives nothing.
#[test]
fn off_is_off() -> Result {
    let model = tiny::hybrid(&tiny::config(), 2)?;
    let config = |thinking: Thinking| GenerationConfig::default().max_tokens(6).thinking(thinking);
    let answer = |thinking: &Thinking| -> Result<_> {
        let answer = model.generate([3, 1, 4, 1, 5, 9], &config(thinking.clone()))?;
        Ok((answer.ids, answer.logprobs))
    };
    let (some, none) = (Noise::relative(1.0), Noise::relative(0.0));
    assert_eq!(answer(&Thinking::none().noise(some.clone()))?, answer(&Thinking::none())?);
    let thinking = Thinking::new(2).span(1..3);
    assert_eq!(answer(&thinking.clone().noise(none))?, answer(&thinking)?);
    assert_ne!(answer(&thinking.clone().noise(some.clone()))?, answer(&thinking)?);
    let unheard = thinking.noise(some).hand_off(HandOff::Mixed { weight: 0.0 });
    assert_eq!(answer(&unheard)?, answer(&Thinking::none())?);
    Ok(())
}

#[test]
fn a_deviation_that_is_none_is_refused() -> Result {
    let (xs, batch) = (rows(3, 4)?, Batch::one(3)?);
    let model = tiny::thought_model(&tiny::config(), 1)?;
    for bad in [-0.1, f64::NAN, f64::INFINITY, 1e7] {
        for noise in [Noise::per_coordinate(bad), Noise::per_row(bad), Noise::relative(bad)] {
            let step = Step::new(&xs, &xs, &batch);
            for refused in [
                noise.validate(),
                noise.on(&xs, &batch, 0).map(drop),
                noise.refine(&xs, &step).map(drop),
            ] {
                assert!(matches!(refused, Err(Error::Parameter { name: "sd", .. })), "{refused:?}");
            }
            let refused = Thinking::new(1).noise(noise.clone()).on(&model).map(drop);
            assert!(matches!(refused, Err(Error::Parameter { name: "sd", .. })), "{refused:?}");
            let refused = Thinking::new(1).refine(noise).on(&model).map(drop);
            assert!(matches!(refused, Err(Error::Refinement { index: 0, .. })), "{refused:?}");
        }
    }
    let refused = Noise::relative(1.0).on(&xs, &Batch::one(4)?, 0).map(drop);
    assert!(matches!(refused, Err(Error::Parameter { name: "batch", .. })), "{refused:?}");
    for (text, expected) in [
        (json!({"passes": 1, "noise": {}}), "missing field `sd`"),
        (json!({"passes": 1, "noise": {"sd": -1.0}}), "sd: expected a number in [0, 1e6], got -1"),
        (json!({"passes": 1, "noise": {"sd": 1.0, "of": "table"}}), "unknown variant `table`"),
        (json!({"passes": 1, "refine": [{"op": "noise", "sd": 1.0, "sed": 1}]}), "unknown field"),
    ] {
        let message = Thinking::from_json(&text.to_string()).err().ok_or("accepted")?.to_string();
        assert!(message.contains(expected), "{text}: {message}");
    }
    let read = Thinking::from_json(
        r#"{"passes": 1, "noise": {"sd": 0.5, "of": "length", "shape": "uniform", "subtract": true,
            "keep_norm": true, "seed": 9}, "refine": [{"op": "noise", "sd": 0.1, "of": "row"}]}"#,
    )?;
    let own = Noise::relative(0.5).uniform().subtract().keep_norm().seed(9);
    assert_eq!(read, Thinking::new(1).noise(own).refine(Noise::per_row(0.1)));
    Ok(())
}
