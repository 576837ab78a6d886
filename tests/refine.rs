//! The ops of a refinement against plain scalar loops, and what must hold for any of them.

mod common;

use std::ops::Range;

use candle_core::{DType, Device, Tensor, Var};
use hybrid_attention::model::Batch;
use hybrid_attention::refine::{
    Among, Anchor, CosineReweight, Focus, Interpolate, Noise, OpConfig, Refine, Seq, Step, seq,
};
use proptest::prelude::*;
use proptest::sample::select;
use serde_json::{Value, json};

use common::tiny::{self, holds};
use common::{Result, assert_identical};

type Row = Vec<f64>;

/// `(tokens, hidden)` as numbers.
fn numbers(xs: &Tensor) -> Result<Vec<Row>> {
    Ok(xs.to_dtype(DType::F64)?.to_vec2()?)
}

fn tensor(xs: &[Row]) -> Result<Tensor> {
    Ok(Tensor::new(xs.to_vec(), &Device::Cpu)?.to_dtype(DType::F32)?)
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn norm(a: &[f64]) -> f64 {
    dot(a, a).sqrt()
}

fn scaled(a: &[f64], by: f64) -> Row {
    a.iter().map(|a| a * by).collect()
}

fn line(from: &[f64], to: &[f64], share: f64) -> Row {
    from.iter().zip(to).map(|(from, to)| (1.0 - share) * from + share * to).collect()
}

/// 0 for a row of zeros.
fn cosine(a: &[f64], b: &[f64]) -> f64 {
    let norms = norm(a) * norm(b);
    if norms == 0.0 { 0.0 } else { dot(a, b) / norms }
}

/// Fails unless every number is within `tolerance` of the expected one, on the scale of the largest.
fn assert_near(what: &str, got: &Tensor, expected: &[Row], tolerance: f64) -> Result {
    let (got, expected) = (numbers(got)?.concat(), expected.concat());
    assert_eq!(got.len(), expected.len(), "{what}");
    let scale = expected.iter().fold(1e-30, |most: f64, x| most.max(x.abs()));
    for (index, (got, expected)) in got.iter().zip(&expected).enumerate() {
        let off = (got - expected).abs();
        assert!(off <= tolerance * scale, "{what}: {got} for {expected} at {index}");
    }
    Ok(())
}

/// Texts of different lengths with up to three segments each, some without any.
fn batches() -> impl Strategy<Value = Batch> {
    tiny::batches(1..4, 11, 0..7)
}

/// Thoughts of such a batch, a few of their rows zeros.
fn thoughts(batch: &Batch, hidden: usize, seed: u64) -> Result<Tensor> {
    let xs = tiny::noise(seed, &[batch.tokens(), hidden], 1.0)?;
    let keep = tiny::noise(!seed, &[batch.tokens(), 1], 1.0)?.gt(-1.5f32)?;
    Ok(xs.broadcast_mul(&keep.to_dtype(DType::F32)?)?)
}

/// The segment that a row of all is in, as rows of all.
fn segment_of(batch: &Batch, row: usize) -> Option<Range<usize>> {
    batch.segments().find(|run| run.contains(&row))
}

/// Text `text` alone.
fn alone(batch: &Batch, text: usize, xs: &Tensor) -> Result<(Batch, Tensor)> {
    let rows = batch.rows(text);
    let one = Batch::one(rows.len())?.with_context(0, batch.context(text))?;
    Ok((one, xs.narrow(0, rows.start, rows.len())?))
}

// ---- interpolation ----

#[derive(Clone, Debug)]
enum Weight {
    Same(f64),
    Each(Vec<f64>),
    Damped,
    Gate,
}

#[derive(Clone, Debug)]
struct Interpolation {
    weight: Weight,
    slerp: bool,
    anchor: Option<(Anchor, f64)>,
    match_norm: bool,
}

/// Hundredths, which JSON gives back to the bit.
fn shares() -> impl Strategy<Value = f64> {
    (0u32..=100).prop_map(|hundredths| f64::from(hundredths) / 100.0)
}

fn interpolations() -> impl Strategy<Value = Interpolation> {
    let weight = prop_oneof![
        shares().prop_map(Weight::Same),
        prop::collection::vec(shares(), 1..4).prop_map(Weight::Each),
        Just(Weight::Damped),
        Just(Weight::Gate),
    ];
    let anchor = (select(vec![Anchor::First, Anchor::FirstPass]), shares());
    (weight, any::<bool>(), prop::option::of(anchor), any::<bool>()).prop_map(
        |(weight, slerp, anchor, match_norm)| Interpolation {
            slerp: slerp && !matches!(weight, Weight::Gate),
            weight,
            anchor,
            match_norm,
        },
    )
}

impl Interpolation {
    fn op(&self) -> Interpolate {
        let mut op = match &self.weight {
            Weight::Same(weight) => Interpolate::new(*weight),
            Weight::Each(weights) => Interpolate::schedule(weights.iter().copied()),
            Weight::Damped => Interpolate::damped(),
            Weight::Gate => Interpolate::gated(),
        };
        if self.slerp {
            op = op.slerp();
        }
        if let Some((to, share)) = self.anchor {
            op = op.anchor(to, share);
        }
        if self.match_norm {
            op = op.match_norm();
        }
        op
    }

    /// What becomes of one row.
    fn row(&self, step: (usize, usize), gate: &[f64], [z, x, first, first_h]: [&Row; 4]) -> Row {
        let (index, passes) = step;
        let share = match &self.weight {
            Weight::Same(share) => *share,
            Weight::Each(shares) => shares[index.min(shares.len() - 1)],
            Weight::Damped => 1.0 / passes as f64,
            Weight::Gate => 0.0,
        };
        let mut next = match (&self.weight, self.slerp) {
            (Weight::Gate, _) => {
                let channel = |c: usize| z[c] + (x[c] - z[c]) / (1.0 + (-gate[c]).exp());
                (0..z.len()).map(channel).collect()
            }
            (_, true) => on_sphere(z, x, share),
            (_, false) => line(z, x, share),
        };
        if let Some((to, share)) = self.anchor {
            next = line(&next, if to == Anchor::First { first } else { first_h }, share);
        }
        if self.match_norm && norm(&next) > 0.0 {
            next = scaled(&next, norm(z) / norm(&next));
        }
        next
    }
}

/// By the arc cosine, as it stands in textbooks, and a straight line where it cannot be.
fn on_sphere(from: &[f64], to: &[f64], share: f64) -> Row {
    let angle = cosine(from, to).clamp(-1.0, 1.0).acos();
    let no_circle = norm(from) == 0.0 || norm(to) == 0.0 || std::f64::consts::PI - angle < 1e-3;
    if no_circle || angle < 1e-6 {
        return line(from, to, share);
    }
    let length = (1.0 - share) * norm(from) + share * norm(to);
    let from = scaled(from, ((1.0 - share) * angle).sin() / norm(from));
    let to = scaled(to, (share * angle).sin() / norm(to));
    from.iter().zip(&to).map(|(from, to)| length * (from + to) / angle.sin()).collect()
}

fn interpolation_is_its_reference(
    (batch, hidden, seed): (&Batch, usize, u64),
    it: &Interpolation,
    (index, passes): (usize, usize),
) -> Result {
    let thoughts = |salt| thoughts(batch, hidden, seed ^ salt);
    let (z, x, first, first_h) = (thoughts(1)?, thoughts(2)?, thoughts(3)?, thoughts(4)?);
    let gate = tiny::noise(seed, &[hidden], 2.0)?;
    let step = Step {
        first: &first,
        first_h: &first_h,
        index,
        passes,
        gate: Some(&gate),
        ..Step::new(&z, &x, batch)
    };
    let op = it.op();
    op.validate()?;
    let got = op.refine(&x, &step)?;
    let gate: Vec<f64> = gate.to_dtype(DType::F64)?.to_vec1()?;
    let reference = |inputs: [&Tensor; 4]| -> Result<Vec<Row>> {
        let [zs, xs, firsts, first_hs] =
            [numbers(inputs[0])?, numbers(inputs[1])?, numbers(inputs[2])?, numbers(inputs[3])?];
        let row = |row: usize| {
            let rows = [&zs[row], &xs[row], &firsts[row], &first_hs[row]];
            it.row((index, passes), &gate, rows)
        };
        Ok((0..batch.tokens()).map(row).collect())
    };
    let expected = reference([&z, &x, &first, &first_h])?;
    // Near rows that point in opposite ways, the circle is as uncertain as f32 is.
    assert_near("interpolated", &got, &expected, if it.slerp { 2e-3 } else { 1e-5 })?;

    for dtype in [DType::BF16, DType::F16, DType::F64] {
        let [z, x, first, first_h] = [
            z.to_dtype(dtype)?,
            x.to_dtype(dtype)?,
            first.to_dtype(dtype)?,
            first_h.to_dtype(dtype)?,
        ];
        let step = Step { z: &z, first: &first, h: &x, first_h: &first_h, ..step };
        let got = op.refine(&x, &step)?;
        assert_eq!(got.dtype(), dtype);
        if !it.slerp {
            // Of the rounded inputs: a sum that nearly cancels may change its sign when they are rounded.
            let expected = reference([&z, &x, &first, &first_h])?;
            assert_near("in another type", &got, &expected, 3e-2)?;
        }
    }
    Ok(())
}

proptest! {
    #[test]
    fn interpolation_is_what_it_says(
        batch in batches(), hidden in 1usize..9, seed: u64, it in interpolations(),
        index in 0usize..5, more in 1usize..4,
    ) {
        holds(interpolation_is_its_reference(
            (&batch, hidden, seed), &it, (index, index + more),
        ))?;
    }

    #[test]
    fn interpolation_ends_are_exact(batch in batches(), hidden in 1usize..9, seed: u64) {
        let run = || {
            for dtype in [DType::F32, DType::BF16] {
                let z = thoughts(&batch, hidden, seed)?.neg()?.to_dtype(dtype)?; // has -0.0
                let x = tiny::noise(!seed, z.dims(), 3.0)?.to_dtype(dtype)?;
                let step = Step::new(&z, &x, &batch);
                for op in [
                    Interpolate::new(0.0),
                    Interpolate::new(0.0).slerp(),
                    Interpolate::schedule([0.0]),
                    Interpolate::new(0.0).anchor(Anchor::FirstPass, 0.0),
                ] {
                    assert_identical("z", &op.refine(&x, &step)?, &z)?;
                }
                for op in [
                    Interpolate::new(1.0),
                    Interpolate::new(1.0).slerp(),
                    Interpolate::damped(),
                    Interpolate::new(0.3).anchor(Anchor::FirstPass, 1.0),
                ] {
                    assert_identical("xs", &op.refine(&x, &step)?, &x)?;
                }
            }
            Ok(())
        };
        holds(run())?;
    }

    /// Along a circle, equal shares of the way are equal angles, and lengths change evenly.
    #[test]
    fn slerp_turns_evenly(hidden in 2usize..9, seed: u64, share in 0.05..0.95) {
        let run = || {
            let batch = Batch::one(5)?;
            let z = tiny::noise(seed, &[5, hidden], 1.0)?;
            let x = tiny::noise(!seed, &[5, hidden], 3.0)?;
            let step = Step::new(&z, &x, &batch);
            let got = Interpolate::new(share).slerp().refine(&x, &step)?;
            let rows = [numbers(&z)?, numbers(&x)?, numbers(&got)?];
            for ((z, x), got) in rows[0].iter().zip(&rows[1]).zip(&rows[2]) {
                let whole = cosine(z, x).clamp(-1.0, 1.0).acos();
                if !(0.01..3.1).contains(&whole) {
                    continue;
                }
                let part = cosine(z, got).clamp(-1.0, 1.0).acos();
                assert!((part - share * whole).abs() < 1e-3, "{part} of {whole}");
                let length = (1.0 - share) * norm(z) + share * norm(x);
                assert!((norm(got) - length).abs() < 1e-3 * length, "{} {length}", norm(got));
            }
            Ok(())
        };
        holds(run())?;
    }
}

#[test]
fn slerp_where_no_one_circle_is() -> Result {
    let batch = Batch::one(1)?;
    let row = [3.0f32, -4.0, 12.0];
    let refined = |z: [f32; 3], x: [f32; 3], share: f64| -> Result<Row> {
        let z = Tensor::new(&[z], &Device::Cpu)?;
        let x = Tensor::new(&[x], &Device::Cpu)?;
        let op = Interpolate::new(share).slerp();
        Ok(numbers(&op.refine(&x, &Step::new(&z, &x, &batch))?)?.concat())
    };
    for share in [0.0, 0.1, 0.5, 0.9, 1.0] {
        for factor in [1.0, 2.5, 1.0001, -1.0, -0.3, 0.0, 1e-30, -1e-30, 1e30] {
            for (z, x) in [(row, row.map(|x| x * factor)), (row.map(|x| x * factor), row)] {
                let got = refined(z, x, share)?;
                let (z, x) = (z.map(f64::from), x.map(f64::from));
                let expected = line(&z, &x, share);
                let scale = norm(&z).max(norm(&x));
                for (got, expected) in got.iter().zip(&expected) {
                    let off = (got - expected).abs();
                    assert!(off <= 1e-6 * scale, "{z:?} to {x:?} at {share}: {got} {expected}");
                }
            }
        }
        assert_eq!(refined([0.0; 3], [0.0; 3], share)?, [0.0; 3]);
    }
    Ok(())
}

#[test]
fn slerp_is_steady_near_its_edges() -> Result {
    let batch = Batch::one(1)?;
    for exponent in -8..0 {
        for flip in [1.0, -1.0] {
            let turn = 3.0 * 10f64.powi(exponent);
            let z = tensor(&[vec![1.0, 0.0]])?;
            let x = tensor(&[vec![flip * 5.0 * turn.cos(), 5.0 * turn.sin()]])?;
            let op = Interpolate::new(0.25).slerp();
            let got = numbers(&op.refine(&x, &Step::new(&z, &x, &batch))?)?;
            let [zs, xs] = [numbers(&z)?, numbers(&x)?];
            let expected = on_sphere(&zs[0], &xs[0], 0.25);
            for (got, expected) in got[0].iter().zip(&expected) {
                assert!((got - expected).abs() < 2e-4, "{turn} {flip}: {got} for {expected}");
            }
        }
    }
    Ok(())
}

#[test]
fn matched_norms_are_those_of_the_thoughts() -> Result {
    let batch = Batch::one(4)?;
    let z = tensor(&[vec![3.0, 4.0], vec![0.0, 0.0], vec![1.0, 0.0], vec![6e19, 8e19]])?;
    let x = tensor(&[vec![0.0, 9.0], vec![1.0, 1.0], vec![-1.0, 0.0], vec![1e-30, 0.0]])?;
    let op = |weight| Interpolate::new(weight).match_norm();
    let step = Step::new(&z, &x, &batch);
    let expected = [vec![0.0, 5.0], vec![0.0, 0.0], vec![-1.0, 0.0], vec![1e20, 0.0]];
    assert_near("whole", &op(1.0).refine(&x, &step)?, &expected, 1e-6)?;
    // Halfway, the third row meets its opposite: it has no direction left.
    let got = numbers(&op(0.5).refine(&x, &step)?)?;
    assert_eq!(got[2], [0.0, 0.0]);
    Ok(())
}

// ---- re-weighting ----

#[derive(Clone, Debug)]
struct Reweighting {
    mix: bool,
    strength: f64,
    temperature: f64,
    among: Among,
    exclude_self: bool,
    focus: Picked,
}

/// A focus that fits every batch: rows are picked from those that think.
#[derive(Clone, Debug)]
enum Picked {
    All,
    Last,
    Rows(Vec<prop::sample::Index>),
}

fn reweightings() -> impl Strategy<Value = Reweighting> {
    let focus = prop_oneof![
        Just(Picked::All),
        Just(Picked::Last),
        prop::collection::vec(any::<prop::sample::Index>(), 1..5).prop_map(Picked::Rows),
    ];
    let among = select(vec![Among::Both, Among::Past, Among::Future]);
    let temperature = select(vec![0.05, 0.1, 0.5, 1.0, 20.0]);
    (any::<bool>(), shares(), temperature, among, any::<bool>(), focus).prop_map(
        |(mix, strength, temperature, among, exclude_self, focus)| Reweighting {
            mix,
            strength,
            temperature,
            among,
            exclude_self,
            focus,
        },
    )
}

impl Reweighting {
    fn focus(&self, batch: &Batch) -> Focus {
        match &self.focus {
            Picked::All => Focus::All,
            Picked::Last => Focus::Last,
            Picked::Rows(picks) => {
                let thinks = |text: usize, token: usize| {
                    batch.context(text).iter().any(|run| run.contains(&token))
                };
                let texts = 0..batch.sequences();
                let everywhere = |token: &usize| texts.clone().all(|text| thinks(text, *token));
                let longest = batch.lengths().into_iter().max().unwrap_or(0);
                let rows: Vec<usize> = (0..longest).filter(everywhere).collect();
                if rows.is_empty() {
                    return Focus::Last;
                }
                Focus::Rows(picks.iter().map(|pick| *pick.get(&rows)).collect())
            }
        }
    }

    fn op(&self, batch: &Batch) -> CosineReweight {
        let op = match self.mix {
            true => CosineReweight::mix(self.strength),
            false => CosineReweight::scale(self.strength),
        };
        let op = op.temperature(self.temperature).among(self.among).focus(self.focus(batch));
        if self.exclude_self { op.exclude_self() } else { op }
    }

    fn sees(&self, i: usize, j: usize) -> bool {
        match self.among {
            _ if i == j => !self.exclude_self,
            Among::Both => true,
            Among::Past => j < i,
            Among::Future => j > i,
        }
    }

    /// What `i` gives to every row; `None` where it has nothing to look at.
    fn weights(&self, rows: &[Row], i: usize) -> Option<Vec<f64>> {
        let score = |j: usize| match self.sees(i, j) {
            true => (cosine(&rows[i], &rows[j]) / self.temperature).exp(),
            false => 0.0,
        };
        let scores: Vec<f64> = (0..rows.len()).map(score).collect();
        let sum: f64 = scores.iter().sum();
        (sum > 0.0).then(|| scaled(&scores, 1.0 / sum))
    }

    fn segment(&self, rows: &[Row], in_focus: impl Fn(usize) -> bool) -> Vec<Row> {
        let n = rows.len();
        let all: Vec<Option<Vec<f64>>> =
            (0..n).map(|i| if in_focus(i) { self.weights(rows, i) } else { None }).collect();
        if self.mix {
            let moved = |(i, weights): (usize, &Option<Vec<f64>>)| {
                let Some(weights) = weights else { return rows[i].clone() };
                let mut mean = vec![0.0; rows[i].len()];
                for (weight, row) in weights.iter().zip(rows) {
                    for (mean, x) in mean.iter_mut().zip(row) {
                        *mean += weight * x;
                    }
                }
                line(&rows[i], &mean, self.strength)
            };
            return all.iter().enumerate().map(moved).collect();
        }
        let all: Vec<Vec<f64>> = all.into_iter().flatten().collect();
        if all.is_empty() {
            return rows.to_vec();
        }
        let relevance = |j: usize| all.iter().map(|w| w[j]).sum::<f64>() / all.len() as f64;
        let factor = |j: usize| (1.0 - self.strength) + self.strength * n as f64 * relevance(j);
        let changed: Vec<Row> = (0..n).map(|j| scaled(&rows[j], factor(j))).collect();
        let mean_norm = |rows: &[Row]| rows.iter().map(|row| norm(row)).sum::<f64>();
        let (before, after) = (mean_norm(rows), mean_norm(&changed));
        if after == 0.0 {
            return rows.to_vec();
        }
        changed.iter().map(|row| scaled(row, before / after)).collect()
    }

    fn reference(&self, batch: &Batch, xs: &Tensor) -> Result<Vec<Row>> {
        let mut all = numbers(xs)?;
        for (text, rows) in batch.all_rows().enumerate() {
            for segment in batch.context(text) {
                let in_focus = |row: usize| match self.focus(batch) {
                    Focus::Last => row + 1 == segment.len(),
                    Focus::Rows(tokens) => tokens.contains(&(segment.start + row)),
                    _ => true,
                };
                let own = &mut all[rows.start + segment.start..rows.start + segment.end];
                let refined = self.segment(own, in_focus);
                own.clone_from_slice(&refined);
            }
        }
        Ok(all)
    }
}

fn reweighted(op: &CosineReweight, batch: &Batch, xs: &Tensor) -> Result<Tensor> {
    // The op works on what the op before made: the thoughts must not matter.
    let z = tiny::noise(77, xs.dims(), 5.0)?.to_dtype(xs.dtype())?;
    Ok(op.refine(xs, &Step::new(&z, &z, batch))?)
}

fn reweighting_is_its_reference(
    (batch, hidden, seed): (&Batch, usize, u64),
    it: &Reweighting,
) -> Result {
    let xs = thoughts(batch, hidden, seed)?;
    let op = it.op(batch);
    op.validate()?;
    let got = reweighted(&op, batch, &xs)?;
    assert_near("reweighted", &got, &it.reference(batch, &xs)?, 2e-5)?;

    for dtype in [DType::BF16, DType::F16, DType::F64] {
        let xs = xs.to_dtype(dtype)?;
        let got = reweighted(&op, batch, &xs)?;
        assert_eq!(got.dtype(), dtype);
        assert_near("in another type", &got, &it.reference(batch, &xs)?, 1e-2)?;
    }
    for text in 0..batch.sequences() {
        if matches!(it.focus, Picked::Rows(_)) {
            break; // on its own a text may have other rows to pick from
        }
        let (one, rows) = alone(batch, text, &xs)?;
        let got = alone(batch, text, &got)?.1;
        assert_identical("one by one", &reweighted(&op, &one, &rows)?, &got)?;
    }
    Ok(())
}

/// Changes, one at a time, every row; only the segment it belongs to may differ.
fn nothing_leaks(
    (batch, hidden, seed): (&Batch, usize, u64),
    it: &Reweighting,
    poison: f32,
) -> Result {
    let (xs, op) = (thoughts(batch, hidden, seed)?, it.op(batch));
    let before = reweighted(&op, batch, &xs)?;
    for row in 0..batch.tokens() {
        let own = segment_of(batch, row);
        if own.is_none() {
            let row = |xs: &Tensor| xs.narrow(0, row, 1);
            assert_identical("a row that does not think", &row(&before)?, &row(&xs)?)?;
        }
        let own = own.unwrap_or(row..row + 1);
        let poisoned = (xs.narrow(0, row, 1)? * 0.0)?.affine(1.0, poison.into())?;
        let changed = xs.slice_assign(&[row..row + 1, 0..hidden], &poisoned)?;
        let after = reweighted(&op, batch, &changed)?;
        for other in (0..batch.tokens()).filter(|other| !own.contains(other)) {
            let row = |xs: &Tensor| xs.narrow(0, other, 1);
            assert_identical("untouched", &row(&after)?, &row(&before)?)?;
        }
    }
    Ok(())
}

proptest! {
    #[test]
    fn reweighting_is_what_it_says(
        batch in batches(), hidden in 1usize..9, seed: u64, it in reweightings(),
    ) {
        holds(reweighting_is_its_reference((&batch, hidden, seed), &it))?;
    }

    #[test]
    fn no_segment_sees_out_of_itself(
        batch in batches(), hidden in 1usize..5, seed: u64, it in reweightings(),
        poison in select(vec![3.0f32, f32::NAN, f32::INFINITY]),
    ) {
        holds(nothing_leaks((&batch, hidden, seed), &it, poison))?;
    }

    #[test]
    fn reweighting_of_strength_0_is_the_identity(
        batch in batches(), hidden in 1usize..9, seed: u64, it in reweightings(),
    ) {
        let it = Reweighting { strength: 0.0, ..it };
        let run = || {
            for dtype in [DType::F32, DType::BF16] {
                let xs = thoughts(&batch, hidden, seed)?.neg()?.to_dtype(dtype)?; // has -0.0
                assert_identical("xs", &reweighted(&it.op(&batch), &batch, &xs)?, &xs)?;
            }
            Ok(())
        };
        holds(run())?;
    }

    /// Weights that did not sum to 1 would make a mean of equal rows another row.
    #[test]
    fn equal_rows_are_fixed(batch in batches(), hidden in 1usize..9, seed: u64, it in reweightings()) {
        let run = || {
            let row = tiny::noise(seed, &[1, hidden], 1.0)?;
            let xs = row.broadcast_as((batch.tokens(), hidden))?;
            let mut it = it.clone();
            if !it.mix {
                // Seen from everywhere, equal rows are equally relevant.
                (it.among, it.focus) = (Among::Both, Picked::All);
            }
            assert_near("xs", &reweighted(&it.op(&batch), &batch, &xs)?, &numbers(&xs)?, 1e-5)
        };
        holds(run())?;
    }

    #[test]
    fn scaling_keeps_mean_norms_and_directions(
        batch in batches(), hidden in 1usize..9, seed: u64, it in reweightings(),
    ) {
        let it = Reweighting { mix: false, ..it };
        let run = || {
            let xs = thoughts(&batch, hidden, seed)?;
            let (before, after) = (numbers(&xs)?, numbers(&reweighted(&it.op(&batch), &batch, &xs)?)?);
            for segment in batch.segments() {
                let (before, after) = (&before[segment.clone()], &after[segment]);
                let norms = |rows: &[Row]| rows.iter().map(|row| norm(row)).sum::<f64>();
                let off = (norms(before) - norms(after)).abs();
                assert!(off <= 1e-5 * norms(before), "{off}");
                for (before, after) in before.iter().zip(after) {
                    let (turn, product) = (dot(before, after), norm(before) * norm(after));
                    assert!((turn - product).abs() <= 1e-5 * product, "{turn} {product}");
                }
            }
            Ok(())
        };
        holds(run())?;
    }

    /// Without past and future, a segment is a set: its rows in another order give the same rows in
    /// that order.
    #[test]
    fn order_does_not_matter_among_both(
        (n, order) in (1usize..12).prop_flat_map(|n| {
            (Just(n), Just((0..n as u32).collect::<Vec<_>>()).prop_shuffle())
        }),
        hidden in 1usize..9, seed: u64, it in reweightings(),
    ) {
        let it = Reweighting { among: Among::Both, focus: Picked::All, ..it };
        let run = || {
            let batch = Batch::one(n)?;
            let order = Tensor::new(order, &Device::Cpu)?;
            let (xs, op) = (thoughts(&batch, hidden, seed)?, it.op(&batch));
            let permuted = reweighted(&op, &batch, &xs.index_select(&order, 0)?)?;
            let expected = reweighted(&op, &batch, &xs)?.index_select(&order, 0)?;
            assert_near("permuted", &permuted, &numbers(&expected)?, 1e-5)
        };
        holds(run())?;
    }
}

#[test]
fn blocks_of_a_long_segment_make_the_whole() -> Result {
    let batch = Batch::ragged(&[720, 600])?.with_context(0, &[0..5, 10..710])?;
    let xs = thoughts(&batch, 6, 5)?;
    for (mix, among, exclude_self, focus) in [
        (true, Among::Both, false, Picked::All),
        (true, Among::Past, true, Picked::All),
        (true, Among::Future, false, Picked::All),
        (false, Among::Both, true, Picked::All),
        (false, Among::Past, false, Picked::All),
        (false, Among::Both, false, Picked::Last),
    ] {
        let it = Reweighting { mix, strength: 0.7, temperature: 0.1, among, exclude_self, focus };
        let got = reweighted(&it.op(&batch), &batch, &xs)?;
        assert_near(&format!("{it:?}"), &got, &it.reference(&batch, &xs)?, 5e-5)?;
    }
    Ok(())
}

#[test]
fn cold_and_hot_temperatures() -> Result {
    let batch = Batch::one(3)?;
    let xs = tensor(&[vec![1.0, 0.0], vec![0.0, 2.0], vec![0.1, 4.0]])?;
    let mix = |temperature| CosineReweight::mix(1.0).temperature(temperature);
    for cold in [1e-9, 1e-300, f64::MIN_POSITIVE] {
        let swapped = [vec![0.1, 4.0], vec![0.1, 4.0], vec![0.0, 2.0]];
        let op = mix(cold).exclude_self();
        assert_near("cold", &reweighted(&op, &batch, &xs)?, &swapped, 1e-6)?;
    }
    for hot in [1e9, 1e300, f64::MAX] {
        let mean = vec![1.1 / 3.0, 2.0];
        let means = [mean.clone(), mean.clone(), mean];
        assert_near("hot", &reweighted(&mix(hot), &batch, &xs)?, &means, 1e-6)?;
    }
    Ok(())
}

#[test]
fn relevance_without_length_changes_nothing() -> Result {
    let batch = Batch::one(2)?;
    let xs = tensor(&[vec![0.0, 0.0], vec![1.0, 2.0]])?;
    // The focus may look at the row of zeros only.
    let op = CosineReweight::scale(1.0).exclude_self().focus(Focus::Last);
    assert_identical("xs", &reweighted(&op, &batch, &xs)?, &xs)
}

// ---- any op ----

fn ops() -> Vec<Box<dyn Refine>> {
    let rows = Focus::Rows(vec![1]);
    vec![
        Box::new(Interpolate::damped()),
        Box::new(Interpolate::gated()),
        Box::new(Interpolate::schedule([0.2, 0.4]).anchor(Anchor::First, 0.3)),
        Box::new(Interpolate::new(0.3).slerp().anchor(Anchor::FirstPass, 0.2).match_norm()),
        Box::new(CosineReweight::mix(0.3)),
        Box::new(CosineReweight::mix(0.5).among(Among::Past).exclude_self()),
        Box::new(CosineReweight::scale(0.6).among(Among::Future).exclude_self()),
        Box::new(CosineReweight::scale(0.6).focus(rows)),
        Box::new(Noise::per_coordinate(0.3)),
        Box::new(Noise::per_row(0.3).uniform().keep_norm()),
    ]
}

/// Training through a thought loop needs the gradient of every op.
#[test]
fn gradients_are_slopes() -> Result {
    let batch = Batch::one(5)?.with_context(0, &[0..3, 4..5])?;
    let noise =
        |seed| -> Result<Tensor> { Ok(tiny::noise(seed, &[5, 4], 1.0)?.to_dtype(DType::F64)?) };
    let (z, x, gate) = (noise(1)?, noise(2)?, tiny::noise(3, &[4], 1.0)?);
    let (weights, first_h) = (noise(4)?, noise(5)?);
    for op in ops() {
        // Both inputs move at once, along `z` and along `x`.
        let loss = |z: &Tensor, x: &Tensor| -> Result<Tensor> {
            let step = Step {
                gate: Some(&gate),
                first_h: &first_h,
                index: 1,
                passes: 3,
                ..Step::new(z, x, &batch)
            };
            Ok((op.refine(x, &step)? * &weights)?.sum_all()?)
        };
        let (z_var, x_var) = (Var::from_tensor(&z)?, Var::from_tensor(&x)?);
        let gradients = loss(&z_var, &x_var)?.backward()?;
        for seed in 10..14 {
            let (dz, dx) = (noise(seed)?, noise(seed + 10)?);
            let along = |var: &Var, direction: &Tensor| -> Result<f64> {
                Ok(match gradients.get(var) {
                    Some(gradient) => (gradient * direction)?.sum_all()?.to_scalar()?,
                    None => 0.0,
                })
            };
            let expected = along(&z_var, &dz)? + along(&x_var, &dx)?;
            let at = |step: f64| -> Result<f64> {
                let (z, x) = ((&z + (&dz * step)?)?, (&x + (&dx * step)?)?);
                Ok(loss(&z, &x)?.to_scalar()?)
            };
            let slope = (at(1e-5)? - at(-1e-5)?) / 2e-5;
            let off = (slope - expected).abs();
            assert!(off < 1e-5 * (1.0 + slope.abs()), "{op:?}: {slope} for {expected}");
        }
    }
    Ok(())
}

#[test]
fn no_numbers_and_no_shape_panic() -> Result {
    let gate = Tensor::new(&[f32::NAN, 0.0, 1.0], &Device::Cpu)?;
    for op in ops() {
        for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, f32::MIN_POSITIVE] {
            let z = tiny::noise(1, &[6, 3], 1.0)?;
            let x = (&z * f64::from(bad))?;
            let batch = Batch::ragged(&[4, 2])?;
            let step = Step { gate: Some(&gate), ..Step::new(&z, &x, &batch) };
            op.refine(&x, &step)?;
            op.refine(&z, &Step { z: &x, ..step })?;
        }
        for dims in [[0, 0, 3], [0, 4, 3], [2, 0, 3], [2, 4, 0], [2, 4, 3]] {
            let x = Tensor::zeros(&dims, DType::F32, &Device::Cpu)?;
            for x in [x.flatten_to(1)?, x.flatten_all()?, x] {
                for batch in
                    [Batch::dense(dims[0], dims[1])?, Batch::ragged(&[4, 0])?, Batch::ragged(&[])?]
                {
                    let _any_error =
                        op.refine(&x, &Step { passes: 0, ..Step::new(&x, &x, &batch) });
                    let _any_error = seq().refine(&Step::new(&x, &x, &batch));
                }
            }
        }
    }
    Ok(())
}

/// What a model hands over need not lie in memory as it is read, nor be of two dimensions.
#[test]
fn any_strides_and_leading_dimensions_will_do() -> Result {
    let batch = Batch::ragged(&[5, 3, 2])?;
    let gate = tiny::noise(3, &[4], 1.0)?;
    let z = tiny::noise(1, &[5, 4, 2], 1.0)?.permute((2, 0, 1))?; // (2, 5, 4)
    let x = tiny::noise(2, &[4, 2, 5], 1.0)?.permute((1, 2, 0))?;
    for op in ops() {
        let refined = |z: &Tensor, x: &Tensor| {
            op.refine(x, &Step { gate: Some(&gate), ..Step::new(z, x, &batch) })
        };
        let got = refined(&z, &x)?;
        assert_identical("strided", &refined(&z.contiguous()?, &x.contiguous()?)?, &got)?;
        let flat = refined(&z.flatten_to(1)?, &x.flatten_to(1)?)?; // (10, 4)
        assert_identical("flat", &flat, &got.flatten_to(1)?)?;
    }
    Ok(())
}

// ---- parameters ----

fn message(result: hybrid_attention::Result<impl Sized>) -> String {
    result.err().map_or_else(|| "no error".to_string(), |error| error.to_string())
}

#[test]
fn parameters_are_checked() -> Result {
    let weight = "parameter weight: expected a share in [0, 1], got";
    let anchor = "parameter anchor: expected a share in [0, 1], got";
    let strength = "parameter strength: expected a share in [0, 1], got";
    let temperature = "parameter temperature: expected a finite number above 0, got";
    let half = || Interpolate::new(0.5);
    let mix = || CosineReweight::mix(0.5);
    let cases: Vec<(Box<dyn Refine>, String)> = vec![
        (Box::new(Interpolate::new(-0.1)), format!("{weight} -0.1")),
        (Box::new(Interpolate::new(1.01)), format!("{weight} 1.01")),
        (Box::new(Interpolate::new(f64::NAN)), format!("{weight} NaN")),
        (Box::new(Interpolate::schedule([0.1, f64::INFINITY])), format!("{weight} inf")),
        (
            Box::new(Interpolate::schedule([])),
            "parameter weight: expected at least one share in [0, 1], got []".into(),
        ),
        (Box::new(half().anchor(Anchor::First, 1.5)), format!("{anchor} 1.5")),
        (Box::new(half().anchor(Anchor::First, f64::NAN)), format!("{anchor} NaN")),
        (
            Box::new(Interpolate::gated().slerp()),
            "parameter along: expected line, where a gate weighs channel by channel, got sphere"
                .into(),
        ),
        (Box::new(CosineReweight::mix(-1.0)), format!("{strength} -1")),
        (Box::new(CosineReweight::scale(f64::NAN)), format!("{strength} NaN")),
        (Box::new(mix().temperature(0.0)), format!("{temperature} 0")),
        (Box::new(mix().temperature(-1.0)), format!("{temperature} -1")),
        (Box::new(mix().temperature(f64::INFINITY)), format!("{temperature} inf")),
        (Box::new(mix().temperature(f64::NAN)), format!("{temperature} NaN")),
        (
            Box::new(mix().focus(Focus::Rows(Vec::new()))),
            "parameter focus: expected at least one row, got []".into(),
        ),
    ];
    let (x, batch) = (Tensor::zeros((2, 3), DType::F32, &Device::Cpu)?, Batch::one(2)?);
    for (op, expected) in cases {
        assert_eq!(message(op.validate()), expected, "{op:?}");
        // Driven by hand, too
        let refined = op.refine(&x, &Step::new(&x, &x, &batch));
        assert_eq!(message(refined), expected, "{op:?}");
    }
    Ok(())
}

#[test]
fn what_only_the_text_can_tell_is_checked_in_the_pass() -> Result {
    let batch = Batch::ragged(&[5, 3])?.with_context(1, &[1..2, 2..3])?;
    let x = tiny::noise(1, &[8, 3], 1.0)?;
    let step = Step::new(&x, &x, &batch);
    let focused = |rows: &[usize], strength| {
        let op = CosineReweight::mix(strength).focus(Focus::Rows(rows.to_vec()));
        message(op.refine(&x, &step))
    };
    for strength in [0.0, 0.5] {
        assert_eq!(focused(&[1, 2], strength), "no error");
        assert_eq!(
            focused(&[2, 3], strength),
            "parameter focus: expected rows below the 3 tokens of sequence 1, got 3"
        );
        assert_eq!(
            focused(&[usize::MAX], strength),
            format!(
                "parameter focus: expected rows below the 5 tokens of sequence 0, got {}",
                usize::MAX
            )
        );
        assert_eq!(
            focused(&[0], strength),
            "parameter focus: expected rows in a context segment of sequence 1, got 0, which is plain"
        );
    }
    assert_eq!(
        message(Interpolate::gated().refine(&x, &step)),
        "parameter weight: expected a number: the checkpoint has no thought.gate, got gate"
    );
    let other = Batch::one(5)?;
    assert_eq!(
        message(CosineReweight::mix(0.1).refine(&x, &Step::new(&x, &x, &other))),
        "parameter batch: expected the 5 tokens of its 1 sequences, got a stream [8, 3]"
    );
    Ok(())
}

// ---- in JSON ----

/// Whether an op is read from this, and written like this again.
fn spelled(json: &Value, op: impl Refine + 'static) -> Result {
    let read: Seq = serde_json::from_value(json!([json]))?;
    assert_eq!(serde_json::to_value(&read)?, json!([json]));
    assert_eq!(serde_json::to_value(seq().add(op))?, json!([json]));
    Ok(())
}

#[test]
fn ops_are_spelled_plainly() -> Result {
    let (first, first_pass) = (Anchor::First, Anchor::FirstPass);
    let op = "interpolate";
    spelled(&json!({"op": op}), Interpolate::damped())?;
    spelled(&json!({"op": op, "weight": 0.1}), Interpolate::new(0.1))?;
    spelled(&json!({"op": op, "weight": "gate"}), Interpolate::gated())?;
    spelled(&json!({"op": op, "weight": [0.5, 0.25]}), Interpolate::schedule([0.5, 0.25]))?;
    spelled(&json!({"op": op, "along": "sphere"}), Interpolate::damped().slerp())?;
    spelled(&json!({"op": op, "match_norm": true}), Interpolate::damped().match_norm())?;
    let anchored = json!({"op": op, "anchor": {"to": "first", "share": 0.1}});
    spelled(&anchored, Interpolate::damped().anchor(first, 0.1))?;
    let anchored = json!({"op": op, "anchor": {"to": "first_pass", "share": 0.1}});
    spelled(&anchored, Interpolate::damped().anchor(first_pass, 0.1))?;
    let op = "cosine_reweight";
    let mix = json!({"op": op, "how": "mix", "strength": 0.1});
    spelled(&mix, CosineReweight::mix(0.1).temperature(0.1).among(Among::Both).focus(Focus::All))?;
    let past = json!({
        "op": op, "how": "scale", "strength": 0.1, "temperature": 0.5, "among": "past",
        "exclude_self": true, "focus": "last"
    });
    let scale = CosineReweight::scale(0.1).temperature(0.5).exclude_self();
    spelled(&past, scale.among(Among::Past).focus(Focus::Last))?;
    let rows = json!({
        "op": op, "how": "mix", "strength": 0.1, "among": "future", "focus": {"rows": [0, 7]}
    });
    let mix = CosineReweight::mix(0.1).among(Among::Future);
    spelled(&rows, mix.focus(Focus::Rows(vec![0, 7])))?;

    let op = "noise";
    spelled(&json!({"op": op, "sd": 0.1}), Noise::per_coordinate(0.1))?;
    spelled(&json!({"op": op, "sd": 0.1, "of": "row"}), Noise::per_row(0.1).seed(0))?;
    let all = json!({
        "op": op, "sd": 0.1, "of": "length", "shape": "uniform", "subtract": true,
        "keep_norm": true, "seed": u64::MAX
    });
    spelled(&all, Noise::relative(0.1).uniform().subtract().keep_norm().seed(u64::MAX))?;

    // What a person may write, too
    let read = |json: Value| serde_json::from_value::<OpConfig>(json);
    let damped = read(json!({"op": "interpolate", "weight": "damped", "along": "line"}))?;
    assert_eq!(damped, OpConfig::Interpolate(Interpolate::damped()));
    let whole = read(json!({"op": "interpolate", "weight": 1}))?;
    assert_eq!(whole, OpConfig::Interpolate(Interpolate::new(1.0)));
    Ok(())
}

#[test]
fn misspelled_ops_are_refused() {
    let refused = |json: Value| {
        let read = serde_json::from_value::<Seq>(json!([json]));
        read.err().map_or_else(|| "no error".to_string(), |error| error.to_string())
    };
    let cases = [
        (json!({"op": "interpolate", "wieght": 0.1}), "unknown field `wieght`"),
        (json!({"op": "interpolate", "weight": "half"}), "expected a number, a list of numbers"),
        (json!({"op": "interpolate", "weight": null}), "expected a number, a list of numbers"),
        (json!({"op": "interpolate", "along": "circle"}), "unknown variant `circle`"),
        (json!({"op": "interpolate", "anchor": {"to": "first"}}), "missing field `share`"),
        (
            json!({"op": "interpolate", "anchor": {"to": "first", "share": 0.1, "k": 1}}),
            "unknown field `k`",
        ),
        (json!({"op": "cosine_reweight", "how": "mix"}), "missing field `strength`"),
        (json!({"op": "cosine_reweight", "strength": 0.1}), "missing field `how`"),
        (
            json!({"op": "cosine_reweight", "how": "mix", "strength": 0.1, "self": false}),
            "unknown field `self`",
        ),
        (
            json!({"op": "cosine_reweight", "how": "mix", "strength": 0.1, "focus": {"rows": [-1]}}),
            "integer `-1`",
        ),
        (json!({"op": "cosine"}), "unknown variant `cosine`"),
        (json!({"weight": 0.1}), "missing field `op`"),
    ];
    for (json, expected) in cases {
        let message = refused(json.clone());
        assert!(message.contains(expected), "{json}: {message}");
    }
}

proptest! {
    #[test]
    fn every_setting_survives_json(
        interpolation in interpolations(), reweighting in reweightings(), batch in batches(),
    ) {
        let run = || {
            let (first, second) = (interpolation.op(), reweighting.op(&batch));
            let ops = seq().add(second.clone()).add(first.clone());
            let json = serde_json::to_string(&ops)?;
            let back: Vec<OpConfig> = serde_json::from_str(&json)?;
            let expected = [OpConfig::CosineReweight(second), OpConfig::Interpolate(first)];
            assert_eq!(back, expected, "{json}");
            let back: Seq = serde_json::from_str(&json)?;
            assert_eq!(serde_json::to_string(&back)?, json);
            Ok(())
        };
        holds(run())?;
    }
}

// ---- in a sequence ----

#[test]
fn a_sequence_without_ops_takes_the_new_state() -> Result {
    let batch = Batch::ragged(&[3, 2])?.with_context(0, &[0..0, 1..2])?;
    let (z, h) = (tiny::noise(1, &[5, 4], 1.0)?, tiny::noise(2, &[5, 4], 1.0)?);
    let got = numbers(&seq().refine(&Step::new(&z, &h, &batch))?)?;
    let (z, h) = (numbers(&z)?, numbers(&h)?);
    assert_eq!(got, [&z[0], &h[1], &z[2], &h[3], &h[4]].map(Vec::clone));
    assert!(seq().is_empty() && seq().add(Interpolate::damped()).len() == 1);
    Ok(())
}

#[test]
fn ops_run_in_order_over_rows_that_think() -> Result {
    let batch = Batch::one(2)?.with_context(0, &[0..0, 1..2])?;
    let z = tensor(&[vec![1.0], vec![1.0]])?;
    let h = tensor(&[vec![9.0], vec![5.0]])?;
    let refine = seq()
        .add_fn(|xs, _| Ok((xs + 2.0)?)) // [_, 7]
        .add(Interpolate::new(0.5)) // [_, 4]
        .add_fn(|xs, step| Ok((xs * step.h)?)); // [_, 20]
    let got = numbers(&refine.refine(&Step::new(&z, &h, &batch))?)?;
    assert_eq!(got, [[1.0], [20.0]]);
    Ok(())
}

#[test]
fn errors_name_the_op() -> Result {
    let batch = Batch::ragged(&[3, 2])?;
    let z = tiny::noise(1, &[5, 4], 1.0)?;
    let step = Step::new(&z, &z, &batch);
    let f32s = "expected [5, 4] of F32 on Cpu";
    let second = |op: Seq| message(op.refine(&step));
    let half = || seq().add(Interpolate::new(0.5));
    assert_eq!(
        second(half().add_fn(|xs, _| Ok(xs.narrow(0, 0, 1)?))),
        format!("refinement op 1 (function): parameter thoughts: {f32s}, got [1, 4] of F32 on Cpu")
    );
    assert_eq!(
        second(half().add_fn(|xs, _| Ok(xs.to_dtype(DType::BF16)?))),
        format!(
            "refinement op 1 (function): parameter thoughts: {f32s}, got [5, 4] of BF16 on Cpu"
        )
    );
    assert_eq!(
        second(half().add(Interpolate::gated())),
        "refinement op 1 (Interpolate): parameter weight: expected a number: \
         the checkpoint has no thought.gate, got gate"
    );
    assert_eq!(
        second(half().add(CosineReweight::mix(0.1).focus(Focus::Rows(vec![2])))),
        "refinement op 1 (CosineReweight): parameter focus: \
         expected rows below the 2 tokens of sequence 1, got 2"
    );
    assert_eq!(
        message(half().add(CosineReweight::mix(7.0)).validate()),
        "refinement op 1 (CosineReweight): parameter strength: expected a share in [0, 1], got 7"
    );
    let written = serde_json::to_string(&half().add_fn(|xs, _| Ok(xs.clone())));
    assert_eq!(
        written.err().map(|error| error.to_string()).as_deref(),
        Some("function cannot be written: only code can make it")
    );
    // A step that cannot be is no op's fault.
    let h = z.narrow(1, 0, 3)?;
    assert_eq!(
        message(half().refine(&Step::new(&z, &h, &batch))),
        format!("parameter thoughts: {f32s}, got [5, 3] of F32 on Cpu")
    );
    assert_eq!(
        message(half().refine(&Step::new(&z, &z, &Batch::dense(2, 4)?))),
        "parameter batch: expected the 8 tokens of its 2 sequences, got a stream [5, 4]"
    );
    Ok(())
}
