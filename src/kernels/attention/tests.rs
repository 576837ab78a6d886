//! Each form of attention against its definition, and the kernel against itself.

use std::ops::Range;
use std::sync::Arc;

use candle_core::{D, DType, Device, Tensor, Var};
use proptest::prelude::*;

use super::super::door::attend;
use super::composite::by_blocks;
use super::spans::Case;
use super::*;

/// The definition, one sequence after the other: every score, every entry of the mask, one softmax.
fn naive(q: &Tensor, k: &Tensor, v: &Tensor, spans: &Spans, scale: f64) -> Result<Tensor> {
    let (heads, _, head_dim) = q.dims3()?;
    let head_of: Vec<u32> = (0..heads).map(|head| (head * k.dims()[0] / heads) as u32).collect();
    let head_of = Tensor::new(head_of, q.device())?;
    let (k, v) = (k.index_select(&head_of, 0)?, v.index_select(&head_of, 0)?);
    let rows = spans.sequences.iter().filter(|it| !it.queries.is_empty()).map(|it| {
        let (queries, keys) = (it.queries.len(), it.keys.len());
        let of = |kv: &Tensor| kv.narrow(1, it.from, keys)?.contiguous();
        let q = q.narrow(1, it.queries.start, queries)?.contiguous()?;
        let scores = (q.matmul(&of(&k)?.t()?)? * scale)?.broadcast_add(&mask(it)?)?;
        let ys = candle_nn::ops::softmax(&scores, D::Minus1)?.matmul(&of(&v)?)?;
        ys.transpose(0, 1)?.reshape((queries, heads * head_dim))
    });
    Ok(Tensor::cat(&rows.collect::<candle_core::Result<Vec<_>>>()?, 0)?)
}

/// 0 where a query sees a key, `-inf` where not.
fn mask(spans: &SequenceSpans) -> candle_core::Result<Tensor> {
    let seen = |(sees, key): (&Range<usize>, usize)| match sees.contains(&key) {
        true => 0f32,
        false => f32::NEG_INFINITY,
    };
    let pairs = spans.sees.iter().flat_map(|sees| spans.keys.clone().map(move |key| (sees, key)));
    let mask: Vec<f32> = pairs.map(seen).collect();
    Tensor::from_vec(mask, (spans.sees.len(), spans.keys.len()), &Device::Cpu)
}

fn random(heads: usize, tokens: usize, head_dim: usize) -> Result<Tensor> {
    Ok(Tensor::randn(0f32, 1.0, (heads, tokens, head_dim), &Device::Cpu)?)
}

fn largest_difference(a: &Tensor, b: &Tensor) -> Result<f32> {
    match a.elem_count() {
        0 => Ok(0.0),
        _ => Ok((a - b)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?),
    }
}

fn bits(tensor: &Tensor) -> Result<Vec<u32>> {
    let values = tensor.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
    Ok(values.into_iter().map(f32::to_bits).collect())
}

fn attend_packed(inputs: [&Tensor; 3], spans: &Arc<Spans>, scale: f64) -> Result<Tensor> {
    let [q, keys, values] = inputs;
    Ok(attend(q, &KeyValues::Packed { keys, values }, spans, scale)?.into_tensor())
}

/// What `attend` gives for tracked inputs, and the gradients of its sum, with every element weighted by
/// `weights`.
fn with_gradients(
    inputs: &[Tensor; 3],
    weights: &Tensor,
    attend: impl Fn([&Tensor; 3]) -> Result<Tensor>,
) -> Result<[Tensor; 4]> {
    let [q, k, v] = inputs.each_ref().map(Var::from_tensor);
    let (q, k, v) = (q?, k?, v?);
    let ys = attend([q.as_tensor(), k.as_tensor(), v.as_tensor()])?;
    let gradients = (&ys * weights)?.sum_all()?.backward()?;
    let of = |input: &Var| -> Result<Tensor> {
        Ok(gradients.get(input).map_or_else(|| input.zeros_like(), |it| Ok(it.detach()))?)
    };
    Ok([ys.detach(), of(&q)?, of(&k)?, of(&v)?])
}

/// Packed keys and values in blocks, some of whose slots were never written: those hold NaN.
fn in_blocks(
    keys: &Tensor,
    values: &Tensor,
    spans: &Spans,
    dtype: DType,
) -> Result<Vec<HeldBlocks>> {
    let (kv_heads, _, head_dim) = keys.dims3()?;
    let held = spans.sequences.iter().map(|it| -> Result<HeldBlocks> {
        let first = it.keys.start / KV_BLOCK * KV_BLOCK;
        let mut blocks = Vec::new();
        for start in (first..it.keys.end).step_by(KV_BLOCK) {
            let shape = (2, kv_heads, KV_BLOCK, head_dim);
            let block = Tensor::full(f32::NAN, shape, &Device::Cpu)?.to_dtype(dtype)?;
            let held = start.max(it.keys.start)..it.keys.end.min(start + KV_BLOCK);
            // As they come in, in two parts.
            let middle = held.start + held.len() / 3;
            for part in [held.start..middle, middle..held.end] {
                let from = it.from + part.start - it.keys.start;
                write_block(&block, keys, values, from, part.len(), part.start - start)?;
            }
            blocks.push(block);
        }
        Ok(HeldBlocks { first, blocks })
    });
    held.collect()
}

#[test]
fn narrow_keys_and_values_are_the_numbers_they_stand_for() -> Result<()> {
    for new in [1, 70] {
        let cases = [
            Case { past: 130 - new, new, window: Some(90), ..Case::default() },
            Case { past: 101 - new, new, window: Some(90), ..Case::default() },
        ];
        let spans = Arc::new(Spans::of(&cases));
        let (q, k, v) = (random(6, 2 * new, 20)?, random(2, 231, 20)?, random(2, 231, 20)?);
        for dtype in [DType::BF16, DType::F16] {
            let narrow = [k.to_dtype(dtype)?, v.to_dtype(dtype)?];
            let wide = [narrow[0].to_dtype(DType::F32)?, narrow[1].to_dtype(DType::F32)?];
            let expected = attend_packed([&q, &wide[0], &wide[1]], &spans, 0.2)?;
            let got = attend_packed([&q, &narrow[0], &narrow[1]], &spans, 0.2)?;
            assert_eq!(bits(&got)?, bits(&expected)?, "{dtype:?}");
            // With a gradient, too.
            let var = Var::from_tensor(&q)?;
            let tracked = attend_packed([var.as_tensor(), &narrow[0], &narrow[1]], &spans, 0.2)?;
            assert!(largest_difference(&tracked, &expected)? < 1e-5);
        }
    }
    Ok(())
}

/// Sequences packed together attend as each does by itself, in each of the three forms; in the last of
/// them, whether one score at a time is in memory or all are.
#[test]
fn packed_sequences_see_themselves_alone() -> Result<()> {
    for both in [false, true] {
        for window in [None, Some(1), Some(20)] {
            let segments = if both { vec![3..60, 60..140] } else { vec![] };
            let case = |new| Case { new, segments: segments.clone(), window, ..Case::default() };
            let cases = [1, 30, 0, 150, 7, 149].map(case);
            let spans = Arc::new(Spans::of(&cases));
            let total = spans.queries();
            let inputs = [random(6, total, 10)?, random(2, total, 10)?, random(2, total, 10)?];
            let [q, k, v] = &inputs;
            let weights = Tensor::randn(0f32, 1.0, (total, 60), &Device::Cpu)?;
            let expected =
                with_gradients(&inputs, &weights, |[q, k, v]| naive(q, k, v, &spans, 0.3))?;
            let kernel = attend_packed([q, k, v], &spans, 0.3)?;
            let tracked =
                with_gradients(&inputs, &weights, |inputs| attend_packed(inputs, &spans, 0.3))?;
            assert!(largest_difference(&kernel, &expected[0])? < 1e-5);
            for (got, expected) in tracked.iter().zip(&expected) {
                assert!(largest_difference(got, expected)? < 1e-4);
            }
            for at_once in [1, 20_000, usize::MAX] {
                let composite = by_blocks(q, k, v, &spans, 0.3, at_once)?;
                assert!(largest_difference(&composite, &expected[0])? < 1e-5);
            }
        }
    }
    Ok(())
}

/// Whatever a sequence holds, infinities and NaN included, its neighbours are not affected.
#[test]
fn nothing_of_a_sequence_reaches_another() -> Result<()> {
    let cases = [2, 3, 1, 40, 5].map(|new| Case { new, ..Case::default() });
    let spans = Arc::new(Spans::of(&cases));
    let total = spans.queries();
    let inputs = [random(4, total, 8)?, random(2, total, 8)?, random(2, total, 8)?];
    for bad in [f32::NAN, f32::INFINITY] {
        // The second sequence, and the fourth.
        let spoiled = |it: &Tensor| {
            let spoil = Tensor::full(bad, (it.dim(0)?, total, 8), &Device::Cpu)?;
            let is_bad: Vec<u8> = (0..total)
                .map(|at| ((2..5).contains(&at) || (6..46).contains(&at)).into())
                .collect();
            let is_bad = Tensor::new(is_bad, &Device::Cpu)?.reshape((1, total, 1))?;
            is_bad.broadcast_as(it.shape())?.where_cond(&spoil, it)
        };
        let [q, k, v] = inputs.each_ref().map(spoiled);
        let (q, k, v) = (q?, k?, v?);
        type Form<'a> = &'a dyn Fn([&Tensor; 3]) -> Result<Tensor>;
        let forms: [(&str, Form<'_>); 3] = [
            ("in place", &|it| attend_packed(it, &spans, 0.3)),
            ("tracked", &|[q, k, v]| {
                attend_packed([Var::from_tensor(q)?.as_tensor(), k, v], &spans, 0.3)
            }),
            ("composite", &|[q, k, v]| by_blocks(q, k, v, &spans, 0.3, usize::MAX)),
        ];
        for (form, attend) in forms {
            let (got, expected) = (attend([&q, &k, &v])?, attend(inputs.each_ref())?);
            for rows in [0..2, 5..6, 46..51] {
                let rows = |of: &Tensor| bits(&of.narrow(0, rows.start, rows.len())?);
                assert_eq!(rows(&got)?, rows(&expected)?, "{form} beside {bad}");
            }
        }
    }
    Ok(())
}

#[test]
fn what_does_not_fit_is_refused() -> Result<()> {
    let zeros = |dims: &[usize]| Tensor::zeros(dims, DType::F32, &Device::Cpu);
    let case = |past, new| Case { past, new, ..Case::default() };
    let spans = Arc::new(Spans::of(&[case(0, 3), case(2, 1)]));
    let (q, k) = (zeros(&[4, 4, 8])?, zeros(&[2, 6, 8])?);
    attend_packed([&q, &k, &k], &spans, 1.0)?;
    let changed = |change: fn(&mut Spans)| {
        let mut spans = Spans::clone(&spans);
        change(&mut spans);
        Arc::new(spans)
    };
    for (q, k, v, spans) in [
        (&q, &k, &k, Arc::new(Spans::of(&[case(0, 3)]))),
        (&q, &k, &k, Arc::new(Spans::of(&[case(0, 3), case(1, 1)]))),
        (&q, &zeros(&[3, 6, 8])?, &zeros(&[3, 6, 8])?, spans.clone()), // heads
        (&q, &k, &zeros(&[2, 6, 9])?, spans.clone()),
        (&q, &k, &zeros(&[2, 6, 8])?.to_dtype(DType::F16)?, spans.clone()),
        (&q, &zeros(&[0, 6, 8])?, &zeros(&[0, 6, 8])?, spans.clone()),
        (&zeros(&[0, 4, 8])?, &k, &k, spans.clone()),
        (&zeros(&[4, 4])?, &k, &k, spans.clone()),
        (&q, &k, &k, changed(|it| it.sequences[1].from = 2)),
        (&q, &k, &k, changed(|it| it.sequences[1].sees[0] = 0..4)),
        (&q, &k, &k, changed(|it| it.sequences[1].sees[0] = 1..1)),
        (&q, &k, &k, changed(|it| it.sequences[0].sees.truncate(2))),
    ] {
        let error = attend_packed([q, k, v], &spans, 1.0).err().map(|error| error.to_string());
        assert!(error.is_some_and(|it| it.starts_with("parameter q, k and v: expected")));
    }
    let block = |heads, slots| Tensor::zeros((2, heads, slots, 8), DType::F32, &Device::Cpu);
    let held = |first, blocks| HeldBlocks { first, blocks };
    let one = || -> Result<HeldBlocks> { Ok(held(0, vec![block(2, KV_BLOCK)?])) };
    attend(&q, &KeyValues::Blocks(&[one()?, one()?]), &spans, 1.0)?;
    for held in [
        vec![one()?],
        vec![one()?, held(0, vec![])],
        vec![one()?, held(KV_BLOCK, vec![block(2, KV_BLOCK)?])],
        vec![one()?, held(1, vec![block(2, KV_BLOCK)?])],
        vec![one()?, held(0, vec![block(4, KV_BLOCK)?])],
        vec![one()?, held(0, vec![block(2, KV_BLOCK - 1)?])],
        vec![one()?, held(0, vec![block(2, KV_BLOCK)?.to_dtype(DType::BF16)?])],
        vec![one()?, held(0, vec![block(KV_BLOCK, 2)?.transpose(1, 2)?])],
    ] {
        let error = attend(&q, &KeyValues::Blocks(&held), &spans, 1.0).err();
        let error = error.map(|error| error.to_string());
        assert!(error.is_some_and(|it| it.starts_with("parameter q, k and v: expected")));
    }
    Ok(())
}

/// What is written to a block is what candle's conversion makes of it, and comes back in its place.
#[test]
fn blocks_hold_what_was_written() -> Result<()> {
    let cases = [
        Case { held_from: 100, past: 250, new: 40, ..Case::default() },
        Case { past: 0, new: 1, ..Case::default() },
        Case { past: 95, new: 1, ..Case::default() },
    ];
    let spans = Spans::of(&cases);
    let (k, v) = (random(2, spans.keys(), 7)?, random(2, spans.keys(), 7)?);
    // As a projection leaves them: the heads of a row side by side.
    let k = k.transpose(0, 1)?.contiguous()?.transpose(0, 1)?;
    for dtype in [DType::F32, DType::BF16, DType::F16] {
        let held = in_blocks(&k, &v, &spans, dtype)?;
        let kept = [k.to_dtype(dtype)?, v.to_dtype(dtype)?];
        let (keys, values) = gather(&held, &spans, dtype)?;
        assert_eq!((bits(&keys)?, bits(&values)?), (bits(&kept[0])?, bits(&kept[1])?));
        // What has the block's type already is copied.
        let again = in_blocks(&kept[0], &kept[1], &spans, dtype)?;
        let (keys, values) = gather(&again, &spans, DType::F32)?;
        assert_eq!((bits(&keys)?, bits(&values)?), (bits(&kept[0])?, bits(&kept[1])?));
    }
    let block = Tensor::zeros((2, 2, KV_BLOCK, 7), DType::F32, &Device::Cpu)?;
    for (from, count, slot) in
        [(spans.keys(), 1, 0), (0, 2, KV_BLOCK - 1), (usize::MAX, 2, 0), (0, 2, usize::MAX)]
    {
        let error = write_block(&block, &k, &v, from, count, slot).err();
        assert!(error.is_some_and(|it| it.to_string().starts_with("parameter block")));
    }
    assert!(write_block(&block, &k, &v.narrow(0, 0, 1)?, 0, 1, 0).is_err());
    Ok(())
}

/// Scores that are asked for, and the shares made of them, are those that attention was computed with.
#[test]
fn scores_and_shares_are_those_of_the_result() -> Result<()> {
    let cases = [
        Case { past: 3, new: 2, ..Case::default() },
        Case { new: 40, segments: vec![5..30], window: Some(9), ..Case::default() },
    ];
    let spans = Spans::of(&cases);
    let (q, k, v) = (random(4, 42, 6)?, random(2, 45, 6)?, random(2, 45, 6)?);
    let expected = attend_composite(&q, &k, &v, &spans, 0.4)?.reshape((42, 4, 6))?;
    for (number, sequence) in spans.sequences.iter().enumerate() {
        for head in 0..4 {
            let queries = 1..sequence.queries.len();
            let scores = scores(&q, &k, &spans, number, head, queries.clone(), 0.4)?;
            let rows = mask(sequence)?.narrow(0, 1, queries.len())?;
            let hidden = scores.eq(f32::NEG_INFINITY)?.to_vec2::<u8>()?;
            assert_eq!(hidden, rows.eq(f32::NEG_INFINITY)?.to_vec2::<u8>()?);
            let v = v.get(head / 2)?.narrow(0, sequence.from, sequence.keys.len())?;
            let ys = shares(&scores)?.matmul(&v)?;
            let of = expected.narrow(0, sequence.queries.start + 1, queries.len())?;
            let of = of.narrow(1, head, 1)?.squeeze(1)?;
            assert!(largest_difference(&ys, &of)? < 1e-5);
        }
    }
    for (sequence, head, queries) in [(2, 0, 0..1), (0, 4, 0..1), (0, 0, 0..3), (0, 0, 1..1)] {
        assert!(scores(&q, &k, &spans, sequence, head, queries, 0.4).is_err());
    }
    Ok(())
}

/// Any sequence of a pass.
fn any_case() -> impl Strategy<Value = Case> {
    let sizes = (prop_oneof![Just(0usize), 0usize..260], prop_oneof![Just(1usize), 1usize..150]);
    let rule = (prop::option::of(1usize..200), any::<bool>(), 0usize..260);
    (sizes, rule).prop_map(|((past, new), (window, both, held_from))| Case {
        held_from: held_from.min(past),
        past,
        new,
        segments: if both {
            vec![past / 2..past + new / 2, past + new / 2..past + new]
        } else {
            vec![]
        },
        window,
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// The kernel, the form with a gradient, its gradients and the definition agree.
    #[test]
    fn every_form_is_the_definition(
        cases in prop::collection::vec(any_case(), 1..4),
        kv_heads in 1usize..3, group in 1usize..4, head_dim in 1usize..9,
    ) {
        let run = || -> Result<[f32; 6]> {
            let spans = Arc::new(Spans::of(&cases));
            let (queries, keys) = (spans.queries(), spans.keys());
            let inputs = [
                random(kv_heads * group, queries, head_dim)?,
                random(kv_heads, keys, head_dim)?,
                random(kv_heads, keys, head_dim)?,
            ];
            let [q, k, v] = &inputs;
            let shape = (queries, kv_heads * group * head_dim);
            let weights = Tensor::randn(0f32, 1.0, shape, &Device::Cpu)?;
            let expected = with_gradients(&inputs, &weights, |[q, k, v]| naive(q, k, v, &spans, 0.4))?;
            let got = with_gradients(&inputs, &weights, |inputs| attend_packed(inputs, &spans, 0.4))?;
            let kernel = attend_packed([q, k, v], &spans, 0.4)?;
            let composite = attend_composite(q, k, v, &spans, 0.4)?;
            Ok([
                largest_difference(&kernel, &expected[0])?,
                largest_difference(&composite, &expected[0])?,
                largest_difference(&got[0], &expected[0])?,
                largest_difference(&got[1], &expected[1])? / 10.0,
                largest_difference(&got[2], &expected[2])? / 10.0,
                largest_difference(&got[3], &expected[3])? / 10.0,
            ])
        };
        let differences = run().map_err(|error| TestCaseError::fail(error.to_string()))?;
        prop_assert!(differences.iter().all(|it| *it < 1e-5), "{differences:?}");
    }

    /// Queries that go one by one are those that come alone.
    #[test]
    fn one_by_one_is_alone(
        cases in prop::collection::vec(any_case(), 1..4),
        kv_heads in 1usize..4, group in 1usize..4, head_dim in 1usize..12,
        dtype in prop_oneof![Just(DType::F32), Just(DType::BF16), Just(DType::F16)],
    ) {
        let run = || -> Result<()> {
            let spans = Arc::new(Spans { one_by_one: true, ..Spans::of(&cases) });
            let q = random(kv_heads * group, spans.queries(), head_dim)?;
            let k = random(kv_heads, spans.keys(), head_dim)?.to_dtype(dtype)?;
            let v = random(kv_heads, spans.keys(), head_dim)?.to_dtype(dtype)?;
            let held = in_blocks(&k, &v, &spans, dtype)?;
            let got = attend(&q, &KeyValues::Blocks(&held), &spans, 0.4)?.into_tensor();
            assert_eq!(bits(&got)?, bits(&attend_packed([&q, &k, &v], &spans, 0.4)?)?);
            for (sequence, held) in spans.sequences.iter().zip(&held) {
                for (query, sees) in sequence.queries.clone().zip(&sequence.sees) {
                    let alone = SequenceSpans {
                        queries: 0..1, keys: sequence.keys.clone(), from: 0, sees: vec![sees.clone()],
                    };
                    let alone = Arc::new(Spans { sequences: vec![alone], ..Spans::default() });
                    let held = KeyValues::Blocks(std::slice::from_ref(held));
                    let alone = attend(&q.narrow(1, query, 1)?, &held, &alone, 0.4)?;
                    assert_eq!(bits(&got.narrow(0, query, 1)?)?, bits(alone.tensor())?, "{query}");
                }
            }
            Ok(())
        };
        run().map_err(|error| TestCaseError::fail(error.to_string()))?;
    }

    /// No bit of a query's result depends on the number of threads, on what else is in the pass, on
    /// where its keys lie, or on the chunks that its sequence comes in.
    #[test]
    fn every_bit_of_a_sequence_is_its_own(
        cases in prop::collection::vec(any_case(), 1..5),
        kv_heads in 1usize..4, group in 1usize..4, head_dim in 1usize..12,
        dtype in prop_oneof![Just(DType::F32), Just(DType::BF16), Just(DType::F16)], cut in 2usize..150,
    ) {
        let run = || -> Result<()> {
            let spans = Arc::new(Spans::of(&cases));
            let q = random(kv_heads * group, spans.queries(), head_dim)?;
            let k = random(kv_heads, spans.keys(), head_dim)?.to_dtype(dtype)?;
            let v = random(kv_heads, spans.keys(), head_dim)?.to_dtype(dtype)?;
            let held = in_blocks(&k, &v, &spans, dtype)?;
            let width = kv_heads * group * head_dim;
            let expected = bits(&attend_packed([&q, &k, &v], &spans, 0.4)?)?;
            for threads in [1, 2, 3, 7] {
                let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build();
                let pool = pool.map_err(candle_core::Error::wrap)?;
                let packed = pool.install(|| attend_packed([&q, &k, &v], &spans, 0.4))?;
                assert_eq!(bits(&packed)?, expected, "{threads} threads");
                let blocks = pool.install(|| attend(&q, &KeyValues::Blocks(&held), &spans, 0.4))?;
                assert_eq!(bits(blocks.tensor())?, expected, "{threads} threads, blocks");
            }
            for (number, sequence) in spans.sequences.iter().enumerate() {
                let alone = Arc::new(Spans::of(&cases[number..=number]));
                let q = q.narrow(1, sequence.queries.start, sequence.queries.len())?;
                let of = |it: &Tensor| it.narrow(1, sequence.from, sequence.keys.len());
                let (k, v) = (of(&k)?, of(&v)?);
                let rows = sequence.queries.start * width..sequence.queries.end * width;
                let expected = &expected[rows];
                assert_eq!(bits(&attend_packed([&q, &k, &v], &alone, 0.4)?)?, expected, "alone");
                let held = &held[number..=number];
                let blocks = attend(&q, &KeyValues::Blocks(held), &alone, 0.4)?;
                assert_eq!(bits(blocks.tensor())?, expected, "alone, blocks");
                // In chunks, as far as a chunk has more than one query and sees only what has come.
                let case = &cases[number];
                for start in (0..case.new).step_by(cut) {
                    let end = case.new.min(start + cut);
                    let sees = &sequence.sees[start..end];
                    let come = sequence.keys.start..case.past + end;
                    if end - start < 2 || sees.iter().any(|it| it.end > come.end) {
                        continue;
                    }
                    let chunk = Arc::new(Spans { sequences: vec![SequenceSpans {
                        queries: 0..end - start,
                        keys: come.clone(),
                        from: 0,
                        sees: sees.to_vec(),
                    }], ..Spans::default() });
                    let q = q.narrow(1, start, end - start)?;
                    let (k, v) = (k.narrow(1, 0, come.len())?, v.narrow(1, 0, come.len())?);
                    let expected = &expected[start * width..end * width];
                    assert_eq!(bits(&attend_packed([&q, &k, &v], &chunk, 0.4)?)?, expected, "chunk");
                }
            }
            Ok(())
        };
        run().map_err(|error| TestCaseError::fail(error.to_string()))?;
    }
}
