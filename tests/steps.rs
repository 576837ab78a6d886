//! Attention step by step: every step is what the pass computed, or follows from the steps before it in `f64`.

mod common;

use std::ops::Range;

use candle_core::quantized::GgmlDType;
use candle_core::{DType, Device, Tensor};
use hybrid_attention::adapter::{Adapter, AdapterConfig, AdapterScope};
use hybrid_attention::model::{
    Attended, Batch, ForwardContext, KvCache, Mask, Pass, Sight, Site, Tap, Transformer,
};
use hybrid_attention::refine::{CosineReweight, Refine, Step};
use hybrid_attention::steps::{AttentionSteps, CosineSteps, HeadTap, SoftmaxSteps};
use hybrid_attention::thought::EncodedBatch;
use hybrid_attention::{Config, Error, HybridModel, Prompt, Thinking, WeightType};
use proptest::prelude::*;

use common::reference::cosine;
use common::{Result, assert_identical, config_of_large_blocks, smollm2, tiny};

/// Of the largest number that it is compared with.
const TOLERANCE: f64 = 1e-6;

const SIGHTS: [Sight; 2] = [Sight::Causal, Sight::Bidirectional];

type Matrix = Vec<Vec<f64>>;

fn matrix(xs: &Tensor) -> Result<Matrix> {
    assert_eq!(xs.dtype(), DType::F32);
    Ok(xs.to_dtype(DType::F64)?.to_vec2()?)
}

fn product(a: &Matrix, b: &Matrix) -> Matrix {
    let width = b.first().map_or(0, Vec::len);
    let entry = |row: &[f64], j: usize| row.iter().zip(b).map(|(a, b)| a * b[j]).sum();
    a.iter().map(|row| (0..width).map(|j| entry(row, j)).collect()).collect()
}

fn transposed(a: &Matrix) -> Matrix {
    (0..a.first().map_or(0, Vec::len)).map(|j| a.iter().map(|row| row[j]).collect()).collect()
}

/// The largest number that is there.
fn largest(a: &Matrix) -> f64 {
    let finite = a.iter().flatten().map(|a| a.abs()).filter(|a| a.is_finite());
    finite.fold(f64::MIN_POSITIVE, f64::max)
}

/// The length of the longest row.
fn longest(a: &Matrix) -> f64 {
    let lengths = a.iter().map(|row| row.iter().map(|a| a * a).sum::<f64>().sqrt());
    lengths.fold(0.0, f64::max)
}

/// How far two are apart; what is infinite in one must be so in the other.
fn apart(a: &Matrix, b: &Matrix) -> f64 {
    assert_eq!((a.len(), a.concat().len()), (b.len(), b.concat().len()));
    let pairs = a.iter().flatten().zip(b.iter().flatten());
    let off = pairs.map(|(a, b)| if a == b { 0.0 } else { (a - b).abs() });
    off.fold(0.0, |worst, off| if off.is_nan() { f64::INFINITY } else { worst.max(off) })
}

#[track_caller]
fn assert_near(name: &str, got: &Matrix, expected: &Matrix) {
    assert_near_as(name, got, expected, largest(expected));
}

#[track_caller]
fn assert_near_as(name: &str, got: &Matrix, expected: &Matrix, scale: f64) {
    let off = apart(got, expected) / scale;
    assert!(off <= TOLERANCE, "{name}: off by {off:.1e} of the largest");
}

/// What a layer was seen to compute, by a tap that knows nothing of steps: in each chunk of the pass.
#[derive(Default)]
struct Witness {
    layer: usize,
    before: Vec<Tensor>,
    attended: Vec<Seen>,
    after: Vec<Tensor>,
}

struct Seen {
    mask: Mask,
    queries: Tensor,
    /// Of each sequence that has tokens.
    keys_and_values: Vec<(usize, Tensor, Tensor)>,
    context: Tensor,
    /// `W_oᵀ`, `(heads · head_dim, hidden)`, read off its products with a unit matrix, which are exact.
    o_proj: Tensor,
}

impl Tap for Witness {
    fn residual(&mut self, layer: usize, site: Site, xs: &Tensor) -> hybrid_attention::Result<()> {
        match site {
            Site::Input if layer == self.layer => self.before.push(xs.copy()?),
            Site::AfterAttention if layer == self.layer => self.after.push(xs.copy()?),
            _ => (),
        }
        Ok(())
    }

    fn attention(&mut self, layer: usize, attended: &Attended<'_>) -> hybrid_attention::Result<()> {
        if layer != self.layer {
            return Ok(());
        }
        let mask = attended.mask().clone();
        let mut keys_and_values = Vec::new();
        for sequence in (0..mask.sequences()).filter(|it| !mask.sees(*it, 0).is_empty()) {
            let (keys, values) = attended.keys_and_values(sequence)?;
            keys_and_values.push((sequence, keys, values));
        }
        let (queries, context) = (attended.queries().copy()?, attended.context().copy()?);
        let unit = Tensor::eye(context.dim(1)?, context.dtype(), context.device())?;
        let o_proj = attended.output_projection(&unit)?;
        self.attended.push(Seen { mask, queries, keys_and_values, context, o_proj });
        Ok(())
    }
}

/// The steps of all heads of a layer, held to what was seen of it and to each other.
fn check(config: &Config, witness: &Witness, of_heads: &[Vec<AttentionSteps>]) -> Result {
    let (width, group) = (config.head_dim, config.num_attention_heads / config.num_key_value_heads);
    let mut number = 0;
    for (chunk, seen) in witness.attended.iter().enumerate() {
        let (mut from, o_proj) = (0, matrix(&seen.o_proj)?);
        for (sequence, keys, values) in &seen.keys_and_values {
            let mut shares = Tensor::zeros((), DType::F32, &Device::Cpu)?;
            let (mut projection, mut most) = (None, 0f64);
            for (head, steps) in of_heads.iter().enumerate() {
                let it = steps.get(number).ok_or("too few steps")?;
                let (rows, softmax) = (it.rows.clone(), &it.softmax);
                let own = |xs: &Tensor| xs.narrow(0, rows.start, rows.len());
                let columns = head * width..(head + 1) * width;

                // To the last bit what the pass computed.
                let queries = seen.queries.get(head)?;
                let context = own(&seen.context.narrow(1, columns.start, width)?)?;
                for (name, got, expected) in [
                    ("queries", &it.queries, &own(&queries)?),
                    ("keys", &it.keys, &keys.get(head / group)?),
                    ("values", &it.values, &values.get(head / group)?),
                    ("context", &it.context, &context),
                    ("before", &it.before, &own(&witness.before[chunk])?),
                    ("after", &it.after, &own(&witness.after[chunk])?),
                    ("before + projection", &(&it.before + &it.projection)?, &it.after),
                ] {
                    assert_identical(name, got, expected)?;
                }
                assert_eq!(rows, from..from + it.positions.len());
                assert_eq!(it.key_positions, seen.mask.keys(*sequence));
                assert_eq!(it.positions.end, it.key_positions.end);

                // Each step from those before it.
                let scores = product(&matrix(&it.queries)?, &transposed(&matrix(&it.keys)?));
                let scores: Matrix = (0..)
                    .zip(&scores)
                    .map(|(query, row)| {
                        let sees = seen.mask.sees(*sequence, query);
                        let score = |(key, score): (usize, &f64)| match sees.contains(&key) {
                            true => score / (width as f64).sqrt(),
                            false => f64::NEG_INFINITY,
                        };
                        it.key_positions.clone().zip(row).map(score).collect()
                    })
                    .collect();
                // A sum of products rounds as these do, however small it is.
                let terms = longest(&matrix(&it.queries)?) * longest(&matrix(&it.keys)?);
                let scale = (terms / (width as f64).sqrt()).max(f64::MIN_POSITIVE);
                assert_near_as("scores", &matrix(&softmax.scores)?, &scores, scale);
                check_softmax(softmax)?;
                let weights = matrix(&softmax.weights)?;
                let (values, context) = (matrix(&it.values)?, matrix(&it.context)?);
                // A mean of values rounds as they do, however small it is.
                assert_near_as("w v", &product(&weights, &values), &context, largest(&values));
                let share = product(&context, &o_proj[columns].to_vec());
                assert_near("share", &matrix(&it.share)?, &share);
                most += largest(&share); // partial sums are as large, and round as such
                shares = shares.broadcast_add(&it.share)?;
                projection = Some(it.projection.clone());
            }
            let projection = matrix(&projection.ok_or("no heads")?)?;
            assert_near_as("shares of all heads", &matrix(&shares)?, &projection, most);
            (number, from) = (number + 1, from + of_heads[0][number].rows.len());
        }
        assert_eq!(from, seen.context.dim(0)?, "every row is somebody's");
    }
    assert!(of_heads.iter().all(|steps| steps.len() == number), "more steps than sequences");
    Ok(())
}

/// Every step after the scores follows from those before it.
fn check_softmax(steps: &SoftmaxSteps) -> Result {
    let scores = matrix(&steps.scores)?;
    let most = |row: &Vec<f64>| vec![row.iter().copied().fold(f64::NEG_INFINITY, f64::max)];
    let maximum: Matrix = scores.iter().map(most).collect();
    if let Some(got) = &steps.maximum {
        assert_eq!(matrix(got)?, maximum);
    }
    let shift = |row: usize| if steps.maximum.is_some() { maximum[row][0] } else { 0.0 };
    let rows = || scores.iter().enumerate();
    let exponentials: Matrix = rows()
        .map(|(index, row)| row.iter().map(|score| (score - shift(index)).exp()).collect())
        .collect();
    let sums: Matrix = exponentials.iter().map(|row| vec![row.iter().sum()]).collect();
    let weights: Matrix = exponentials
        .iter()
        .zip(&sums)
        .map(|(row, sum)| row.iter().map(|e| e / sum[0]).collect())
        .collect();
    assert_near("exponentials", &matrix(&steps.exponentials)?, &exponentials);
    assert_near("sums", &matrix(&steps.sums)?, &sums);
    assert_near("weights", &matrix(&steps.weights)?, &weights);
    for (row, (weights, scores)) in matrix(&steps.weights)?.iter().zip(&scores).enumerate() {
        assert!((weights.iter().sum::<f64>() - 1.0).abs() <= TOLERANCE, "row {row}");
        for (weight, score) in weights.iter().zip(scores) {
            assert!(score.is_finite() || *weight == 0.0, "a weight where nothing is seen");
        }
    }
    Ok(())
}

/// Runs `xs` through the layers up to `layer`, with `tap`.
fn run(
    model: &Transformer,
    xs: &Tensor,
    (batch, sight, caches): (&Batch, Sight, &mut [KvCache]),
    layer: usize,
    tap: &mut dyn Tap,
) -> Result {
    let pass = match caches {
        [] => Pass::uncached(batch, sight),
        several => Pass::Remembered { batch, sight, caches: several.iter_mut().collect() },
    };
    model.forward(xs, 0..layer + 1, ForwardContext::from(pass).tap(tap))?;
    Ok(())
}

/// Holds all heads of a layer to what is seen of it. `caches` go on.
fn holds(
    model: &Transformer,
    xs: &Tensor,
    (batch, sight, caches): (&Batch, Sight, &mut [KvCache]),
    layer: usize,
) -> Result<Vec<Vec<AttentionSteps>>> {
    let of_head = |head| -> Result<Vec<AttentionSteps>> {
        let mut tap = HeadTap::new(layer, head);
        let mut forks: Vec<KvCache> = caches.iter().map(KvCache::fork).collect();
        run(model, xs, (batch, sight, &mut forks), layer, &mut tap)?;
        Ok(tap.into_steps()?)
    };
    let of_heads =
        (0..model.config().num_attention_heads).map(of_head).collect::<Result<Vec<_>>>()?;
    let mut witness = Witness { layer, ..Witness::default() };
    run(model, xs, (batch, sight, caches), layer, &mut witness)?;
    check(model.config(), &witness, &of_heads)?;
    Ok(of_heads)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    /// Any shape of model, any sequences with any segments, at any position.
    #[test]
    fn steps_are_what_the_pass_computes(
        config in tiny::configs(), batch in tiny::batches(1..4, 24, 0..7), first in 0usize..40,
        layer in 0usize..3, sight in prop::sample::select(&SIGHTS), seed in 0u64..1000,
    ) {
        let run = || -> Result {
            let layer = layer.min(config.num_hidden_layers - 1);
            let model = tiny::transformer(&config, seed)?;
            let batch = batch.clone().starting_at(0, first)?;
            let xs = tiny::noise(seed, &[batch.tokens(), config.hidden_size], 1.0)?;
            let steps = holds(&model, &xs, (&batch, sight, &mut []), layer)?;
            // Who sees whom is as the definition says.
            for (sequence, it) in steps[0].iter().enumerate() {
                assert_eq!((&it.rows, it.positions.start), (&batch.rows(sequence), batch.first(sequence)));
                assert_eq!(it.positions, it.key_positions);
                for (i, row) in matrix(&it.softmax.scores)?.iter().enumerate() {
                    for (j, score) in row.iter().enumerate() {
                        let together = |run: &Range<usize>| run.contains(&i) && run.contains(&j);
                        let ahead = sight == Sight::Bidirectional
                            && batch.context(sequence).iter().any(together);
                        let near = config.sliding_window.is_none_or(|window| i.abs_diff(j) < window);
                        assert_eq!(score.is_finite(), near && (j <= i || ahead), "{i} {j}");
                    }
                }
            }
            Ok(())
        };
        tiny::holds(run())?;
    }

    #[test]
    fn weights_follow_from_any_scores(
        (queries, keys) in (1usize..7, 1usize..7), reach in 0.0f32..400.0, seed in 0u64..1000,
        unseen in prop::collection::vec(0usize..49, 0..6),
    ) {
        let run = || -> Result {
            let mut scores = tiny::noise(seed, &[queries, keys], reach)?.to_vec2::<f32>()?;
            for place in unseen {
                // The first key is seen by all.
                if let Some(score) = scores.get_mut(place / 7).and_then(|row| row.get_mut(1 + place % 7)) {
                    *score = f32::NEG_INFINITY;
                }
            }
            let scores = Tensor::new(scores, &Device::Cpu)?;
            let steps = SoftmaxSteps::of(&scores)?;
            assert_identical("scores", &steps.scores, &scores)?;
            check_softmax(&steps)?;
            let small = (&scores * f64::from(20.0 / reach.max(20.0)))?;
            let (with, without) = (SoftmaxSteps::of(&small)?, SoftmaxSteps::without_maximum(&small)?);
            check_softmax(&without)?;
            assert_near("without", &matrix(&without.weights)?, &matrix(&with.weights)?);
            Ok(())
        };
        tiny::holds(run())?;
    }

    /// By definition in `f64`; and the context is one op of refinement.
    #[test]
    fn cosine_steps_are_one_op_and_the_definition(
        (tokens, hidden) in (1usize..12, 1usize..40), scale in 0.01f32..100.0, seed in 0u64..1000,
        zero in prop::option::of(0usize..12),
    ) {
        let run = || -> Result {
            let mut rows = tiny::noise(seed, &[tokens, hidden], scale)?.to_vec2::<f32>()?;
            if let Some(row) = zero.and_then(|row| rows.get_mut(row)) {
                row.fill(0.0);
            }
            let xs = Tensor::new(rows, &Device::Cpu)?;
            let steps = CosineSteps::of(&xs)?;
            assert_identical("embeddings", &steps.embeddings, &xs)?;
            let x = matrix(&xs)?;
            let like = |a: &Vec<f64>, b: &Vec<f64>| {
                let cosine = cosine(a, b);
                if cosine.is_nan() { 0.0 } else { cosine }
            };
            let cosines: Matrix =
                x.iter().map(|a| x.iter().map(|b| like(a, b)).collect()).collect();
            assert_near_as("cosines", &matrix(&steps.softmax.scores)?, &cosines, 1.0);
            assert!(steps.softmax.maximum.is_none());
            check_softmax(&steps.softmax)?;
            let context = matrix(&steps.context)?;
            let near = |name, expected: &Matrix| assert_near_as(name, &context, expected, largest(&x));
            near("w x", &product(&matrix(&steps.softmax.weights)?, &x));
            assert_identical("after", &steps.after, &(&steps.embeddings + &steps.context)?)?;
            let batch = Batch::one(tokens)?;
            let op = CosineReweight::mix(1.0).temperature(1.0);
            near("one op", &matrix(&op.refine(&xs, &Step::new(&xs, &xs, &batch))?)?);
            Ok(())
        };
        tiny::holds(run())?;
    }
}

/// Texts that caches take up, in several passes and chunks, kept as they are or narrower, under windows that let go
/// of blocks.
#[test]
fn steps_of_chunks_are_what_the_pass_computes() -> Result {
    for (sliding_window, kept_as) in [
        (None, DType::F32),
        (Some(7), DType::F32),
        (Some(130), DType::F32),
        (Some(130), DType::BF16),
    ] {
        let config = Config { sliding_window, num_hidden_layers: 2, ..tiny::config() };
        let model = tiny::transformer(&config, 3)?;
        let pool = model.new_pool(kept_as, usize::MAX)?;
        let mut caches = [pool.new_cache(1000)?, pool.new_cache(1000)?];
        for (turn, (lengths, sight)) in [
            ([100, 0], Sight::Causal),
            ([1, 1], Sight::Causal),
            ([520, 30], Sight::Causal),
            ([40, 23], Sight::Bidirectional),
        ]
        .into_iter()
        .enumerate()
        {
            let batch = Batch::ragged(&lengths)?.with_context(0, &[0..lengths[0] / 2])?;
            let xs = tiny::noise(turn as u64, &[batch.tokens(), config.hidden_size], 1.0)?;
            let before = caches.each_ref().map(KvCache::len);
            // All layers, so that the caches are of one length.
            let steps = holds(&model, &xs, (&batch, sight, &mut caches), 1)?;
            let of_first = steps[0].iter().filter(|it| it.positions.start >= before[0]);
            let chunks = if lengths[0] > 512 { 2 } else { 1 };
            assert!(of_first.count() >= chunks, "turn {turn}");
        }
    }
    Ok(())
}

/// Products with weights of any type are computed in `f32`.
#[test]
fn steps_hold_for_weights_of_any_type() -> Result {
    let folder = tempfile::tempdir()?;
    let config = config_of_large_blocks()?;
    let tensors = tiny::weights(&config, 5)?.into_iter().collect();
    common::write_hugging_face(folder.path(), &config, &tensors)?;
    let types =
        [GgmlDType::Q8_0, GgmlDType::Q4_0, GgmlDType::Q4K, GgmlDType::Q6K].map(WeightType::from);
    for weights in [DType::BF16, DType::F16].map(WeightType::from).into_iter().chain(types) {
        let model = HybridModel::from_folder(folder.path(), weights, &Device::Cpu)?;
        for (length, sight) in [(5, Sight::Causal), (40, Sight::Bidirectional)] {
            let xs = tiny::noise(6, &[length, config.hidden_size], 1.0)?;
            holds(model.transformer(), &xs, (&Batch::one(length)?, sight, &mut []), 0)?;
        }
    }
    Ok(())
}

#[test]
fn steps_hold_for_a_real_model() -> Result {
    let Some(path) = smollm2() else { return Ok(()) };
    let model = HybridModel::from_gguf(path, None, &Device::Cpu)?;
    let tokenizer = model.tokenizer().ok_or("no tokenizer")?;
    let text = "The trophy does not fit in the suitcase because it is too big. ".repeat(4);
    let ids = tokenizer.encode(&text, true)?;
    let xs = model.transformer().embed_ids(&ids)?;
    for (layer, sight) in
        [(0, Sight::Causal), (14, Sight::Causal), (29, Sight::Causal), (14, Sight::Bidirectional)]
    {
        holds(model.transformer(), &xs, (&Batch::one(ids.len())?, sight, &mut []), layer)?;
    }
    Ok(())
}

/// All that steps consist of.
fn assert_same(left: &AttentionSteps, right: &AttentionSteps) -> Result {
    assert_eq!((&left.rows, &left.positions), (&right.rows, &right.positions));
    assert_eq!(left.key_positions, right.key_positions);
    for (name, left, right) in [
        ("queries", &left.queries, &right.queries),
        ("keys", &left.keys, &right.keys),
        ("values", &left.values, &right.values),
        ("weights", &left.softmax.weights, &right.softmax.weights),
        ("share", &left.share, &right.share),
        ("projection", &left.projection, &right.projection),
        ("before", &left.before, &right.before),
        ("after", &left.after, &right.after),
    ] {
        assert_identical(name, left, right)?;
    }
    Ok(())
}

/// A prompt is read by what decodes or by what thinks, and a thought pass is run by what thinks.
#[test]
fn a_prompt_and_a_thought_pass_are_looked_into_by_one_tap() -> Result {
    let base = tiny::hybrid(&tiny::config(), 7)?;
    let how = AdapterConfig::rank(2).target_modules(["q_proj", "o_proj"]);
    let adapter = Adapter::new(base.config(), &how, 8, &Device::Cpu)?.trainable()?;
    for (index, variable) in adapter.variables()?.iter().enumerate() {
        variable.set(&tiny::noise(index as u64, variable.dims(), 0.3)?)?;
    }
    let model = base.with_adapter(&adapter, AdapterScope::Thinking)?;
    let (decoder, thinker) = (model.transformer(), model.thought_model().thinker());
    let ids = [3, 1, 4, 1, 5, 9, 2];
    let prompt =
        Prompt::default().plain_ids(&ids[..2]).context_ids(&ids[2..5]).context_ids(&ids[5..]);
    let batch = Batch::one(7)?.with_context(0, &[2..5, 5..6])?;
    let by_hand = |reader: &Transformer, xs: &Tensor, layers, pass| -> Result<AttentionSteps> {
        let mut tap = HeadTap::new(2, 3);
        reader.forward(xs, layers, ForwardContext::from(pass).tap(&mut tap))?;
        Ok(tap.into_steps()?.remove(0))
    };
    let xs = decoder.embed_ids(&ids)?;
    let causal = model.attention_steps(prompt.clone(), Sight::Causal, 2, 3)?;
    assert_same(&causal, &by_hand(decoder, &xs, 0..3, Pass::Causal(&batch))?)?;
    assert_same(&causal, &base.attention_steps(ids, Sight::Causal, 2, 3)?)?;
    let both_ways = model.attention_steps(prompt, Sight::Bidirectional, 2, 3)?;
    assert_same(&both_ways, &by_hand(thinker, &xs, 0..3, Pass::Bidirectional(&batch))?)?;
    assert!(apart(&matrix(&causal.after)?, &matrix(&both_ways.after)?) > 1e-2);

    for sight in SIGHTS {
        let mind = Thinking::new(2).span(1..3).sight(sight).on(model.thought_model())?;
        let text = EncodedBatch::new(decoder, &ids, batch.clone())?;
        let z = mind.encode(&text, Pass::Causal(&batch))?;
        let steps = mind.attention_steps(&z, &batch, 2, 3)?;
        assert_eq!(steps.len(), 1);
        assert_same(&steps[0], &by_hand(thinker, &z, 1..3, Pass::uncached(&batch, sight))?)?;
        // Of several sequences, each that has tokens.
        let several = Batch::ragged(&[3, 0, 4])?;
        let steps = mind.attention_steps(&z, &several, 1, 0)?;
        assert_eq!(steps.iter().map(|it| it.rows.clone()).collect::<Vec<_>>(), [0..3, 3..7]);
        let refused = mind.attention_steps(&z, &batch, 0, 0);
        assert_refused(refused, "parameter layer: expected one of the span 1..3, got 0");
    }
    Ok(())
}

#[track_caller]
fn assert_refused<T>(result: hybrid_attention::Result<T>, expected: &str) {
    assert_eq!(result.map(drop).map_err(|error| error.to_string()), Err(expected.to_string()));
}

#[test]
fn what_there_is_not_is_refused() -> Result {
    let model = tiny::hybrid(&tiny::config(), 9)?;
    let of = |prompt: Prompt, layer, head| {
        model.attention_steps(prompt, Sight::Bidirectional, layer, head)
    };
    let ids = |ids: &[u32]| Prompt::from(ids);
    for (refused, expected) in [
        (of(ids(&[1]), 3, 0), "parameter layer: expected less than 3, got 3"),
        (
            of(ids(&[1]), usize::MAX, 0),
            "parameter layer: expected less than 3, got 18446744073709551615",
        ),
        (of(ids(&[1]), 0, 4), "parameter head: expected less than 4, got 4"),
        (of(ids(&[]), 0, 0), "the prompt is empty: at least one token is needed"),
        (
            of(ids(&[1, 32]), 0, 0),
            "token id 32 at position 1: expected less than the vocabulary of 32",
        ),
        (
            of(ids(&[1; 2049]), 0, 0),
            "context full: the model has room for 2048 positions, 2049 requested",
        ),
        (
            of("text".into(), 0, 0),
            "no tokenizer in this checkpoint: a text prompt needs one; hand in token ids instead",
        ),
    ] {
        assert_refused(refused, expected);
    }
    let mind = Thinking::none().on(model.thought_model())?;
    let document = mind.read_document(&[1, 2], 0, DType::F32)?;
    let refused = of(Prompt::default().document(&document).plain_ids(&[3]), 0, 0);
    assert!(matches!(refused, Err(Error::Parameter { name: "prompt", .. })), "{refused:?}");

    // By hand.
    let (transformer, batch) = (model.transformer(), Batch::one(2)?);
    let xs = transformer.embed_ids(&[1, 2])?;
    for (layer, head, expected) in [
        (0, 4, Err("parameter head: expected less than 4, got 4")),
        (0, usize::MAX, Err("parameter head: expected less than 4, got 18446744073709551615")),
        (0, 0, Ok("parameter layer: expected one of those that ran, 1..3, got 0")),
        (3, 9, Ok("parameter layer: expected one of those that ran, 1..3, got 3")),
    ] {
        let layers = if expected.is_err() { 0..1 } else { 1..3 };
        let mut tap = HeadTap::new(layer, head);
        let ran = transformer.forward(
            &xs,
            layers,
            ForwardContext::from(Pass::Causal(&batch)).tap(&mut tap),
        );
        match expected {
            Err(expected) => assert_refused(ran, expected),
            Ok(expected) => assert_refused(ran.and_then(|_| tap.into_steps()), expected),
        }
    }
    assert_refused(
        HeadTap::new(5, 0).into_steps(),
        "parameter layer: expected a pass that has run, got 5",
    );
    let mind = Thinking::new(1).on(model.thought_model())?;
    let refused = mind.attention_steps(&xs, &Batch::one(3)?, 0, 0);
    assert_refused(
        refused,
        "parameter batch: expected the 3 tokens of its 1 sequences, got a stream [2, 16]",
    );
    Ok(())
}

#[test]
fn scores_and_rows_that_are_none_are_refused() -> Result {
    let tensor =
        |rows: &[[f32; 2]]| Tensor::from_slice(rows.as_flattened(), (rows.len(), 2), &Device::Cpu);
    let (infinite, unseen) = (f32::INFINITY, f32::NEG_INFINITY);
    let not_finite = |position| format!("scores are not finite at position {position}");
    for row in [[f32::NAN, 0.0], [infinite, 0.0], [unseen, unseen]] {
        let scores = tensor(&[[1.0, 2.0], row])?;
        assert_refused(SoftmaxSteps::of(&scores), &not_finite(1));
        assert_refused(SoftmaxSteps::without_maximum(&scores), &not_finite(1));
    }
    for row in [[89.0, 0.0], [-200.0, -200.0]] {
        let scores = tensor(&[row, [1.0, 2.0]])?;
        check_softmax(&SoftmaxSteps::of(&scores)?)?;
        assert_refused(SoftmaxSteps::without_maximum(&scores), &not_finite(0));
    }
    assert_refused(CosineSteps::of(&tensor(&[[1.0, 2.0], [f32::NAN, 1.0]])?), &not_finite(0));
    for (shape, got) in [
        (vec![2], "[2]"),
        (vec![0, 2], "[0, 2]"),
        (vec![2, 0], "[2, 0]"),
        (vec![1, 2, 2], "[1, 2, 2]"),
    ] {
        let empty = Tensor::zeros(shape, DType::F32, &Device::Cpu)?;
        let expected =
            format!("parameter scores: expected (queries, keys), at least one of each, got {got}");
        assert_refused(SoftmaxSteps::of(&empty), &expected);
        let expected = format!(
            "parameter embeddings: expected (tokens, hidden), at least one of each, got {got}"
        );
        assert_refused(CosineSteps::of(&empty), &expected);
    }
    Ok(())
}
