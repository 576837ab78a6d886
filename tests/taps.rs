//! Looking into a pass: what a tap is shown is what a plain reference computes in `f64`, layer by layer from
//! what enters each, and looking on changes nothing.

mod common;

use std::ops::Range;

use candle_core::{DType, Tensor, Var};
use hybrid_attention::model::{
    Attended, Batch, ForwardContext, KvCache, Pass, Sight, Site, Tap, Transformer,
};
use hybrid_attention::{Config, Error};
use proptest::prelude::*;

use common::reference::{Heads, Reference, Stream};
use common::tiny;
use common::{Result, assert_identical};

/// Of the largest number that it is compared with.
const TOLERANCE: f64 = 1e-5;

const SIGHTS: [Sight; 2] = [Sight::Causal, Sight::Bidirectional];

/// Where something was shown.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Place {
    Residual(Site),
    Attention,
}

/// What attention of one sequence was shown to be.
struct Shown {
    keys_at: Range<usize>,
    /// Of each query.
    sees: Vec<Range<usize>>,
    /// Per head, `(queries, keys)`.
    scores: Vec<Vec<Vec<f32>>>,
    weights: Vec<Vec<Vec<f32>>>,
    mean: Vec<Vec<f32>>,
    keys: Tensor,
    values: Tensor,
}

/// One layer of one chunk.
#[derive(Default)]
struct Layer {
    layer: usize,
    input: Option<Tensor>,
    queries: Option<Tensor>,
    context: Option<Tensor>,
    after_attention: Option<Tensor>,
    output: Option<Tensor>,
    sequences: Vec<Shown>,
}

/// Writes everything down.
#[derive(Default)]
struct Recorder {
    places: Vec<(usize, Place)>,
    layers: Vec<Layer>,
}

impl Tap for Recorder {
    fn residual(&mut self, layer: usize, site: Site, xs: &Tensor) -> hybrid_attention::Result<()> {
        self.places.push((layer, Place::Residual(site)));
        if site == Site::Input {
            self.layers.push(Layer { layer, ..Layer::default() });
        }
        if let Some(last) = self.layers.last_mut() {
            let xs = Some(xs.detach().copy()?);
            match site {
                Site::Input => last.input = xs,
                Site::AfterAttention => last.after_attention = xs,
                Site::Output => last.output = xs,
            }
        }
        Ok(())
    }

    fn attention(&mut self, layer: usize, attended: &Attended<'_>) -> hybrid_attention::Result<()> {
        self.places.push((layer, Place::Attention));
        let Some(last) = self.layers.last_mut() else { return Err(Error::StreamFailed) };
        last.context = Some(attended.context().detach().copy()?);
        last.queries = Some(attended.queries().detach().copy()?);
        let mask = attended.mask();
        for sequence in 0..mask.sequences() {
            let count = count_of(attended, sequence)?;
            let sees = (0..count).map(|query| mask.sees(sequence, query)).collect();
            let (mut scores, mut weights, mut mean) = (Vec::new(), Vec::new(), Vec::new());
            for head in (0..attended.heads()).filter(|_| count > 0) {
                scores.push(attended.scores(sequence, head, 0..count)?.detach().to_vec2()?);
                weights.push(attended.weights(sequence, head, 0..count)?.detach().to_vec2()?);
                // Some of the queries are some of the rows.
                let some = count / 3..count;
                let part = attended.scores(sequence, head, some.clone())?.detach().to_vec2()?;
                assert!(scores.last().is_some_and(|all| near(&all[some], &part)), "{head}");
            }
            if count > 0 {
                mean = attended.mean_weights(sequence)?.detach().to_vec2()?;
            }
            let keys_at = mask.keys(sequence);
            // Of a sequence without any there is nothing to show.
            let (keys, values) = match keys_at.is_empty() {
                true => (attended.context().detach(), attended.context().detach()),
                false => {
                    let (keys, values) = attended.keys_and_values(sequence)?;
                    (keys.detach(), values.detach())
                }
            };
            last.sequences.push(Shown { keys_at, sees, scores, weights, mean, keys, values });
        }
        Ok(())
    }
}

/// How many queries a sequence has: as many as see anything.
fn count_of(attended: &Attended<'_>, sequence: usize) -> hybrid_attention::Result<usize> {
    let mask = attended.mask();
    Ok((0..mask.queries()).take_while(|query| !mask.sees(sequence, *query).is_empty()).count())
}

/// Whether products of some rows are those of all, up to rounding.
fn near(all: &[Vec<f32>], some: &[Vec<f32>]) -> bool {
    let same = |(a, b): (&f32, &f32)| a == b || (a - b).abs() < 1e-5 * a.abs().max(1.0);
    all.len() == some.len() && all.iter().flatten().zip(some.iter().flatten()).all(same)
}

/// How far numbers are off, and how large they should be.
#[derive(Default)]
struct Worst {
    off: f64,
    scale: f64,
}

impl Worst {
    fn add(&mut self, got: impl IntoIterator<Item = f32>, expected: &[f64]) {
        let mut count = 0;
        for (got, expected) in got.into_iter().zip(expected) {
            let got = f64::from(got);
            // What is not seen scores minus infinity on both sides.
            let off = if got == *expected { 0.0 } else { (got - expected).abs() };
            self.off = if off.is_nan() { f64::INFINITY } else { self.off.max(off) };
            if expected.is_finite() {
                self.scale = self.scale.max(expected.abs());
            }
            count += 1;
        }
        assert_eq!(count, expected.len());
    }

    fn check(&self, name: &str, tolerance: f64) {
        let Self { off, scale } = self;
        assert!(
            *off <= tolerance * scale,
            "{name}: off by {off:.1e} where values reach {scale:.1e}"
        );
    }
}

fn stream(xs: &Tensor) -> Result<Stream> {
    Ok(xs.to_dtype(DType::F64)?.to_vec2()?)
}

/// `(kv_heads, keys, head_dim)` as the reference has it.
fn heads(xs: &Tensor) -> Result<Heads> {
    Ok(xs.to_dtype(DType::F64)?.transpose(0, 1)?.to_vec3()?)
}

/// One sequence of a pass.
#[derive(Clone, Debug)]
struct Sequence {
    /// The position of its first token in the pass.
    first: usize,
    length: usize,
    segments: Vec<Range<usize>>,
}

impl Sequence {
    /// Whether a query at position `i` sees the key at position `j`, by the definition.
    fn sees(&self, window: Option<usize>, sight: Sight, i: usize, j: usize) -> bool {
        let near = window.is_none_or(|window| i.abs_diff(j) < window);
        let inside =
            |run: &Range<usize>, at| (self.first + run.start..self.first + run.end).contains(&at);
        let together = self.segments.iter().any(|run| inside(run, i) && inside(run, j));
        near && (j <= i || sight == Sight::Bidirectional && together)
    }
}

/// A model and its reference.
struct Both {
    model: Transformer,
    reference: Reference,
    config: Config,
    /// What caches keep keys and values as.
    kept_as: DType,
}

impl Both {
    fn new(config: &Config, seed: u64, kept_as: DType) -> Result<Self> {
        let weights = tiny::weights(config, seed)?;
        let reference = Reference::new(config, &weights)?;
        let model = Transformer::new(config, &mut weights.clone())?;
        Ok(Self { model, reference, config: config.clone(), kept_as })
    }

    /// Checks all that was written down of a pass. `pasts` holds, for each sequence, for each layer, what
    /// entered it before, and is given what enters it now.
    fn check(
        &self,
        recorder: &Recorder,
        (xs, ys): (&Tensor, &Tensor),
        scene: &Scene,
        pasts: &mut [Vec<Stream>],
    ) -> Result {
        let layers = self.model.all_layers();
        let places: Vec<_> = recorder
            .layers
            .iter()
            .flat_map(|it| {
                use Place::{Attention, Residual};
                let order = [
                    Residual(Site::Input),
                    Attention,
                    Residual(Site::AfterAttention),
                    Residual(Site::Output),
                ];
                order.map(|place| (it.layer, place))
            })
            .collect();
        assert_eq!(recorder.places, places);

        let mut from = 0;
        for chunk in recorder.layers.chunks(layers.len()) {
            let ran: Vec<_> = chunk.iter().map(|it| it.layer).collect();
            assert_eq!(ran, layers.clone().collect::<Vec<_>>());
            let input = chunk[0].input.as_ref().ok_or("no input")?;
            let rows = from..from + input.dim(0)?;
            assert_identical("what enters", input, &xs.narrow(0, from, rows.len())?)?;
            for (layer, next) in chunk.iter().zip(chunk.iter().skip(1).map(Some).chain([None])) {
                let output = layer.output.as_ref().ok_or("no output")?;
                let expected = match next {
                    Some(next) => next.input.clone().ok_or("no input")?,
                    None => ys.narrow(0, from, rows.len())?,
                };
                assert_identical("what leaves", output, &expected)?;
                self.check_layer(layer, &rows, scene, pasts)?;
            }
            from = rows.end;
        }
        assert_eq!(from, xs.dim(0)?);
        Ok(())
    }

    fn check_layer(
        &self,
        shown: &Layer,
        rows: &Range<usize>,
        scene: &Scene,
        pasts: &mut [Vec<Stream>],
    ) -> Result {
        let missing = "not shown";
        let name = format!("model.layers.{}", shown.layer);
        let inputs = stream(shown.input.as_ref().ok_or(missing)?)?;
        let contexts: Vec<Vec<f32>> = shown.context.as_ref().ok_or(missing)?.to_vec2()?;
        let after: Vec<Vec<f32>> = shown.after_attention.as_ref().ok_or(missing)?.to_vec2()?;
        let outputs: Vec<Vec<f32>> = shown.output.as_ref().ok_or(missing)?.to_vec2()?;
        let queries: Vec<Vec<Vec<f32>>> = shown.queries.as_ref().ok_or(missing)?.to_vec3()?;
        let group = self.config.num_attention_heads / self.config.num_key_value_heads;
        let mut worst: [Worst; 8] = Default::default();
        let mut by_weights = Worst::default();

        // Which sequences are in this chunk, and with which rows.
        let (mut start, mut at, mut sequences_shown) = (0, 0, shown.sequences.iter());
        let total: usize = scene.sequences.iter().map(|it| it.length).sum();
        for (sequence, past) in scene.sequences.iter().zip(pasts) {
            let all = start..start + sequence.length;
            start = all.end;
            let inside = all.start < rows.end && rows.start < all.end;
            if !inside && *rows != (0..total) {
                continue;
            }
            let own = all.start.max(rows.start)..all.end.min(rows.end);
            let it = sequences_shown.next().ok_or(missing)?;
            assert_eq!(it.sees.len(), own.len(), "{name}");
            if own.is_empty() {
                continue;
            }
            // The position of what `past` begins with, and of the first query.
            let base = if scene.cached { 0 } else { sequence.first };
            let first_query = sequence.first + own.start - all.start;
            past[shown.layer]
                .extend_from_slice(&inputs[own.start - rows.start..own.end - rows.start]);

            let held = &past[shown.layer];
            let positions: Vec<usize> = (base..base + held.len()).collect();
            let end = base + held.len();
            assert_eq!((it.keys_at.end, it.keys_at.start >= base), (end, true), "{name}");
            let (keys, values) = self.reference.keys_and_values(&name, held, &positions);
            let there = it.keys_at.start - base..end - base;
            // What is kept narrower is attended to as it is kept.
            let (mut kept_keys, mut kept_values) = (keys.clone(), values.clone());
            for (shown, (wide, kept), which) in [
                (&it.keys, (&keys, &mut kept_keys), 0),
                (&it.values, (&values, &mut kept_values), 1),
            ] {
                assert_identical(
                    &name,
                    shown,
                    &shown.to_dtype(self.kept_as)?.to_dtype(DType::F32)?,
                )?;
                let shown = heads(shown)?;
                assert_eq!(shown.len(), there.len());
                for (shown, wide) in shown.iter().zip(&wide[there.clone()]) {
                    let shown = shown.iter().flatten().map(|value| *value as f32);
                    worst[which].add(shown, &wide.concat());
                }
                if self.kept_as != DType::F32 {
                    kept[there.clone()].clone_from_slice(&shown);
                }
            }
            let shown_values = heads(&it.values)?;
            for (query, x) in held[first_query - base..].iter().enumerate() {
                let position = first_query + query;
                let sees = |key: usize| {
                    sequence.sees(self.config.sliding_window, scene.sight, position, base + key)
                };
                let seen: Vec<usize> = (0..held.len()).filter(|key| sees(*key)).collect();
                let expected_sees = base + seen[0]..base + seen[seen.len() - 1] + 1;
                assert_eq!(it.sees[query], expected_sees, "{name}, query {position}");
                assert_eq!(seen.len(), expected_sees.len());
                assert!(it.keys_at.start <= expected_sees.start, "a key that is seen is gone");
                let expected =
                    self.reference.attend(&name, x, position, (&kept_keys, &kept_values), sees);
                let row = at + query;
                let mut context = Vec::new();
                for head in 0..self.config.num_attention_heads {
                    let of_keys = |all: &[f64]| all[there.clone()].to_vec();
                    worst[2].add(queries[head][row].iter().copied(), &expected.queries[head]);
                    let scores = &it.scores[head][query];
                    worst[3].add(scores.iter().copied(), &of_keys(&expected.scores[head]));
                    let weights = &it.weights[head][query];
                    worst[4].add(weights.iter().copied(), &of_keys(&expected.weights[head]));
                    // 0 and minus infinity, to the last bit, where nothing is seen.
                    for (key, (score, weight)) in scores.iter().zip(weights).enumerate() {
                        let seen = expected_sees.contains(&(it.keys_at.start + key));
                        assert_eq!(seen, score.is_finite());
                        assert!(seen || *score == f32::NEG_INFINITY && *weight == 0.0);
                    }
                    for channel in 0..self.config.head_dim {
                        let of_head = shown_values.iter().map(|it| it[head / group][channel]);
                        let weighed =
                            of_head.zip(weights).map(|(value, weight)| value * f64::from(*weight));
                        context.push(weighed.sum::<f64>());
                    }
                }
                let mean = expected.mean_weights()[there.clone()].to_vec();
                worst[5].add(it.mean[query].iter().copied(), &mean);
                worst[6].add(contexts[row].iter().copied(), &expected.context);
                by_weights.add(contexts[row].iter().copied(), &context);
                let x = self.reference.after_attention(&name, x, &expected.context);
                worst[7].add(after[row].iter().copied(), &x);
                worst[7]
                    .add(outputs[row].iter().copied(), &self.reference.after_mlp(&name, &x, &[]));
            }
            at += own.len();
        }
        assert!(sequences_shown.next().is_none(), "more sequences than there are");
        let unit = match self.kept_as {
            DType::BF16 => 1.0 / 256.0,
            DType::F16 => 1.0 / 2048.0,
            _ => TOLERANCE,
        };
        let names =
            ["keys", "values", "queries", "scores", "weights", "mean", "context", "residual"];
        for (index, (what, worst)) in names.into_iter().zip(&worst).enumerate() {
            worst.check(&format!("{name}, {what}"), if index < 2 { unit } else { TOLERANCE });
        }
        by_weights.check(&format!("{name}, weights times values"), 2e-6);
        Ok(())
    }
}

/// A pass.
struct Scene {
    sequences: Vec<Sequence>,
    sight: Sight,
    /// Whether caches remember it.
    cached: bool,
}

impl Scene {
    fn batch(&self) -> Result<Batch> {
        let lengths: Vec<_> = self.sequences.iter().map(|it| it.length).collect();
        let mut batch = Batch::ragged(&lengths)?;
        for (index, sequence) in self.sequences.iter().enumerate() {
            let with_context = batch.with_context(index, &sequence.segments)?;
            batch = with_context.starting_at(index, sequence.first)?;
        }
        Ok(batch)
    }

    fn run(
        &self,
        model: &Transformer,
        xs: &Tensor,
        caches: &mut [KvCache],
        tap: Option<&mut Recorder>,
    ) -> Result<Tensor> {
        let batch = self.batch()?;
        let pass = match caches {
            [] => Pass::uncached(&batch, self.sight),
            [only] if self.sight == Sight::Causal => Pass::Cached(only),
            several => {
                let caches = several.iter_mut().collect();
                Pass::Remembered { batch: &batch, sight: self.sight, caches }
            }
        };
        let context = match tap {
            Some(tap) => ForwardContext::from(pass).tap(tap),
            None => ForwardContext::from(pass),
        };
        Ok(model.forward(xs, model.all_layers(), context)?)
    }

    /// Looks on while the pass runs, and fails unless it is the same as without that.
    fn watched(
        &self,
        model: &Transformer,
        xs: &Tensor,
        caches: &mut [KvCache],
    ) -> Result<(Recorder, Tensor)> {
        let mut unwatched: Vec<KvCache> = caches.iter().map(KvCache::fork).collect();
        let expected = self.run(model, xs, &mut unwatched, None)?;
        let mut recorder = Recorder::default();
        let got = self.run(model, xs, caches, Some(&mut recorder))?;
        assert_identical("looked at", &got, &expected)?;
        for (cache, mut unwatched) in caches.iter().zip(unwatched) {
            assert_eq!(
                (cache.len(), cache.oldest(), cache.bytes()),
                (unwatched.len(), unwatched.oldest(), unwatched.bytes())
            );
            let next = tiny::embed(model, &[1])?;
            let said = tiny::logits(model, &next, Pass::Cached(&mut cache.fork()))?;
            let expected = tiny::logits(model, &next, Pass::Cached(&mut unwatched))?;
            assert_identical("what it says next", &said, &expected)?;
        }
        Ok((recorder, got))
    }
}

fn sequences() -> impl Strategy<Value = Vec<Sequence>> {
    let sequence = (0usize..14, 0usize..40, any::<bool>(), 0u64..1000).prop_map(
        |(length, first, whole, seed)| {
            let all = std::iter::once(0..length).filter(|all| !all.is_empty());
            let segments = if whole { all.collect() } else { tiny::segments(seed, length) };
            Sequence { first, length, segments }
        },
    );
    prop::collection::vec(sequence, 1..4)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Any shape of model, any sequences, of which nothing is remembered.
    #[test]
    fn what_is_shown_is_the_reference(
        config in tiny::shapes(), sequences in sequences(), seed in 0u64..1000,
        sight in prop::sample::select(&SIGHTS),
    ) {
        let run = || -> Result {
            let both = Both::new(&config, seed, DType::F32)?;
            let (model, scene) = (&both.model, Scene { sequences, sight, cached: false });
            let tokens = scene.batch()?.tokens();
            if tokens == 0 {
                return Ok(());
            }
            let xs = tiny::noise(seed, &[tokens, config.hidden_size], 1.0)?;
            let (recorder, ys) = scene.watched(model, &xs, &mut [])?;
            // A pass with a gradient shows the same, and the gradient is the same.
            let (var, mut tracked) = (Var::from_tensor(&xs)?, Recorder::default());
            let tracked_ys = scene.run(model, &var, &mut [], Some(&mut tracked))?;
            let unwatched = scene.run(model, &var, &mut [], None)?;
            let gradient = |ys: &Tensor| -> Result<Tensor> {
                Ok(ys.sqr()?.sum_all()?.backward()?.get(&var).ok_or("no gradient")?.clone())
            };
            assert_identical("gradient", &gradient(&tracked_ys)?, &gradient(&unwatched)?)?;

            for (recorder, ys) in [(recorder, ys), (tracked, tracked_ys.detach())] {
                let layers = config.num_hidden_layers;
                let mut pasts = vec![vec![Stream::new(); layers]; scene.sequences.len()];
                both.check(&recorder, (&xs, &ys), &scene, &mut pasts)?;
            }
            Ok(())
        };
        tiny::holds(run())?;
    }
}

/// A text in several passes, each in several chunks, that a cache takes up; alone and beside others;
/// kept as it is or narrower; under windows that let go of blocks.
#[test]
fn what_is_shown_of_chunks_is_the_reference() -> Result {
    for (sliding_window, kept_as) in [
        (None, DType::F32),
        (Some(7), DType::F32),
        (Some(130), DType::F32),
        (None, DType::BF16),
        (Some(130), DType::F16),
    ] {
        let config = Config { sliding_window, num_hidden_layers: 2, ..tiny::config() };
        let both = Both::new(&config, 3, kept_as)?;
        let (model, layers) = (&both.model, both.model.all_layers());
        let pool = model.new_pool(kept_as, usize::MAX)?;
        for turns in [
            vec![vec![530]],
            vec![vec![100], vec![1], vec![30], vec![520], vec![40]],
            vec![vec![40, 0, 97], vec![1, 1, 1], vec![300, 5, 230], vec![20, 0, 30]],
        ] {
            let count = turns[0].len();
            let mut caches = Vec::new();
            for _ in 0..count {
                caches.push(pool.new_cache(1000)?);
            }
            let mut pasts = vec![vec![Stream::new(); layers.len()]; count];
            for (turn, lengths) in (0..).zip(&turns) {
                // The last one in both directions, in runs of context.
                let last = turn == 3 || turn == 4;
                let sight = if last { Sight::Bidirectional } else { Sight::Causal };
                let sequence = |(cache, &length): (&KvCache, &usize)| {
                    let segments = tiny::segments(turn, length);
                    Sequence { first: cache.len(), length, segments }
                };
                let sequences = caches.iter().zip(lengths).map(sequence).collect();
                let scene = Scene { sequences, sight, cached: true };
                let tokens = scene.batch()?.tokens();
                let xs = tiny::noise(turn, &[tokens, config.hidden_size], 1.0)?;
                let (recorder, ys) = scene.watched(model, &xs, &mut caches)?;
                both.check(&recorder, (&xs, &ys), &scene, &mut pasts)?;
            }
        }
    }
    Ok(())
}

/// Only the layers that run are shown, by their numbers in the model.
#[test]
fn layers_have_their_own_numbers() -> Result {
    let model = tiny::transformer(&tiny::config(), 4)?;
    let (xs, batch) = (tiny::noise(4, &[5, 16], 1.0)?, Batch::one(5)?);
    for layers in [0..1, 1..3, 2..3, 1..1] {
        let mut recorder = Recorder::default();
        let context = ForwardContext::from(Pass::Causal(&batch)).tap(&mut recorder);
        model.forward(&xs, layers.clone(), context)?;
        let shown: Vec<_> = recorder.layers.iter().map(|it| it.layer).collect();
        assert_eq!(shown, layers.collect::<Vec<_>>());
    }
    Ok(())
}

/// Asks for what there is not.
#[derive(Default)]
struct Curious {
    asked: usize,
}

impl Tap for Curious {
    fn attention(&mut self, _: usize, attended: &Attended<'_>) -> hybrid_attention::Result<()> {
        let heads = attended.heads();
        let refused = [
            attended.scores(2, 0, 0..1).map(drop),
            attended.scores(0, heads, 0..1).map(drop),
            attended.scores(0, 0, 0..4).map(drop),
            attended.scores(0, 0, 1..1).map(drop),
            attended.scores(0, 0, 3..usize::MAX).map(drop),
            attended.weights(2, 0, 0..1).map(drop),
            attended.weights(1, 0, 0..3).map(drop),
            attended.weights(1, usize::MAX, 0..1).map(drop),
            attended.mean_weights(2).map(drop),
            attended.mean_weights(usize::MAX).map(drop),
            attended.keys_and_values(2).map(drop),
        ];
        for (index, refused) in refused.into_iter().enumerate() {
            assert!(matches!(refused, Err(Error::Parameter { .. })), "{index}: {refused:?}");
            self.asked += 1;
        }
        assert_eq!((attended.mask().keys(2), attended.mask().sees(0, 3)), (0..0, 0..0));
        Ok(())
    }
}

#[test]
fn what_is_not_there_is_refused() -> Result {
    let model = tiny::transformer(&tiny::config(), 5)?;
    let (xs, batch) = (tiny::noise(5, &[5, 16], 1.0)?, Batch::ragged(&[3, 2])?);
    let mut curious = Curious::default();
    model.forward(&xs, 0..3, ForwardContext::from(Pass::Causal(&batch)).tap(&mut curious))?;
    let mut caches = [model.new_cache(8)?, model.new_cache(8)?];
    let caches = caches.iter_mut().collect();
    let pass = Pass::Remembered { batch: &batch, sight: Sight::Causal, caches };
    model.forward(&xs, 0..3, ForwardContext::from(pass).tap(&mut curious))?;
    assert_eq!(curious.asked, 2 * 3 * 11);
    Ok(())
}

/// Has enough at some place.
struct Impatient {
    enough: (usize, Place),
    seen: Vec<(usize, Place)>,
}

impl Impatient {
    fn look(&mut self, at: (usize, Place)) -> hybrid_attention::Result<()> {
        self.seen.push(at);
        if at == self.enough {
            Err(Error::NotFinite { what: "patience", position: 7 })
        } else {
            Ok(())
        }
    }
}

impl Tap for Impatient {
    fn residual(&mut self, layer: usize, site: Site, _: &Tensor) -> hybrid_attention::Result<()> {
        self.look((layer, Place::Residual(site)))
    }

    fn attention(&mut self, layer: usize, _: &Attended<'_>) -> hybrid_attention::Result<()> {
        self.look((layer, Place::Attention))
    }
}

/// The error of a tap is the error of the pass, and nothing runs after it.
#[test]
fn an_error_of_a_tap_ends_the_pass() -> Result {
    let model = tiny::transformer(&tiny::config(), 6)?;
    let (xs, batch) = (tiny::noise(6, &[600, 16], 1.0)?, Batch::one(600)?);
    let sites = [Site::Input, Site::AfterAttention, Site::Output].map(Place::Residual);
    for enough in (0..3).flat_map(|layer| {
        sites.into_iter().chain([Place::Attention]).map(move |place| (layer, place))
    }) {
        for sight in SIGHTS {
            for cached in [false, true] {
                let mut cache = model.new_cache(600)?;
                let mut tap = Impatient { enough, seen: Vec::new() };
                let pass = match cached {
                    true => Pass::Remembered { batch: &batch, sight, caches: vec![&mut cache] },
                    false => Pass::uncached(&batch, sight),
                };
                let ended = model.forward(&xs, 0..3, ForwardContext::from(pass).tap(&mut tap));
                let patience: hybrid_attention::Result<()> =
                    Err(Error::NotFinite { what: "patience", position: 7 });
                assert_eq!(format!("{:?}", ended.map(drop)), format!("{patience:?}"));
                assert_eq!(tap.seen.iter().filter(|at| **at == enough).count(), 1);
                assert_eq!(tap.seen.last(), Some(&enough));
                assert!(cache.is_empty() && cache.bytes() == 0);
            }
        }
    }
    Ok(())
}
