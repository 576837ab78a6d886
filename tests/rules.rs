//! The rules of the forward pass, over random tiny models: what sees what, and that every way to
//! compute the same thing gives the same numbers.

mod common;

use std::collections::BTreeSet;
use std::ops::Range;
use std::thread::ScopedJoinHandle;

use candle_core::{Device, IndexOp, Tensor, Var};
use hybrid_attention::model::{KvCache, Layout, Mask, Pass, Sight, Transformer};
use hybrid_attention::refine::Interpolate;
use hybrid_attention::thought::Text;
use hybrid_attention::{Config, Error, GenerationConfig, HybridModel, Thinking};
use proptest::prelude::*;

use common::tiny::{self, holds};
use common::{Result, assert_close, assert_identical};

/// Sums in another order round differently.
const ROUNDING: f32 = 1e-5;

// ---- not thinking ----

fn spans(layers: usize) -> impl Strategy<Value = Range<usize>> {
    (0..layers).prop_flat_map(move |a| (a + 1..=layers).prop_map(move |b| a..b))
}

fn configs_with_span() -> impl Strategy<Value = (Config, Range<usize>)> {
    tiny::configs().prop_flat_map(|config| {
        let span = spans(config.num_hidden_layers);
        (Just(config), span)
    })
}

/// Encode, think and hand off through a cache; the logits of every token.
fn thought_logits(model: &Transformer, thinking: &Thinking, ids: &[u32]) -> Result<Tensor> {
    let text = Text::new(model, ids, Layout::dense(1, ids.len()))?;
    let mut cache = model.new_cache(text.layout(), ids.len())?;
    let mind = thinking.on(model)?;
    let z = mind.encode(&text, Pass::Cached(&mut cache))?;
    let thoughts = mind.think(&text, z, |_, _| ())?;
    Ok(model.logits(&mind.hand_off(&text, &thoughts, Pass::Cached(&mut cache))?)?)
}

fn passes_0(config: &Config, span: Range<usize>, weight: f64, seed: u64, seq: usize) -> Result {
    let model = tiny::transformer(config, seed)?;
    let ids = tiny::tokens(config, seed, seq);
    let xs = tiny::embed(&model, &ids)?;
    let mut cache = model.new_cache(&Layout::dense(1, seq), seq)?;
    let plain = tiny::logits(&model, &xs, Pass::Cached(&mut cache))?;
    let none = Thinking::passes(0).span(span).refine(Interpolate::new(weight));
    for thinking in [&none, &Thinking::none()] {
        assert_identical("logits", &thought_logits(&model, thinking, &ids)?, &plain)?;
    }

    let model = HybridModel::new(model, None)?;
    let config = GenerationConfig::default().max_tokens(4).top_logprobs(2);
    let plain = model.generate(ids.as_slice(), &config)?;
    let answer = model.generate(ids.as_slice(), &config.thinking(none))?;
    assert_eq!((answer.ids, answer.top_logprobs), (plain.ids, plain.top_logprobs));
    Ok(())
}

fn strength_0(config: &Config, span: Range<usize>, passes: usize, seed: u64, seq: usize) -> Result {
    let model = tiny::transformer(config, seed)?;
    let ids = tiny::tokens(config, seed, seq);
    let xs = tiny::embed(&model, &ids)?;
    let plain = tiny::logits(&model, &xs, Pass::Causal(&Layout::dense(1, seq)))?;
    let thinking = Thinking::passes(passes).span(span).refine(Interpolate::new(0.0));
    assert_close("logits", &thought_logits(&model, &thinking, &ids)?, &plain, ROUNDING)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn passes_0_is_a_plain_mistral(
        (config, span) in configs_with_span(), weight in 0.0..1.0, seed: u64, seq in 1usize..20,
    ) {
        holds(passes_0(&config, span, weight, seed, seq))?;
    }

    #[test]
    fn strength_0_changes_nothing(
        (config, span) in configs_with_span(), passes in 1usize..4, seed: u64, seq in 1usize..20,
    ) {
        holds(strength_0(&config, span, passes, seed, seq))?;
    }
}

// ---- who sees whom ----

/// A batch of texts: how long each is, and two cuts that make its middle third context.
fn layouts(batch: Range<usize>, longest: usize) -> impl Strategy<Value = Layout> {
    let row = (1..=longest).prop_flat_map(|length| {
        let cuts = prop::collection::vec(0..=length, 0..6);
        (Just(length), prop::option::of(cuts))
    });
    prop::collection::vec(row, batch).prop_filter_map("valid segments", |rows| {
        let lengths: Vec<usize> = rows.iter().map(|(length, _)| *length).collect();
        let mut layout = Layout::ragged(&lengths);
        for (row, (_, cuts)) in rows.into_iter().enumerate() {
            let Some(mut cuts) = cuts else { continue };
            cuts.sort_unstable();
            let segments: Vec<_> = cuts.chunks_exact(2).map(|cut| cut[0]..cut[1]).collect();
            layout = layout.with_context(row, &segments).ok()?;
        }
        Some(layout)
    })
}

/// The rule in the documentation of [`Mask`], word for word.
fn sees(
    (layout, row): (&Layout, usize),
    sight: Sight,
    window: Option<usize>,
    (query, key): (usize, usize),
) -> bool {
    let start = layout.starts()[row];
    if query < start {
        return query == key;
    }
    let segment = layout.context(row).iter().find(|segment| segment.contains(&query));
    let within = |distance: usize| window.is_none_or(|window| distance < window);
    let behind = key <= query && within(query - key);
    let ahead = key > query
        && sight == Sight::Bidirectional
        && segment.is_some_and(|segment| segment.contains(&key))
        && within(key - query);
    start <= key && (behind || ahead)
}

fn sights() -> impl Strategy<Value = Sight> {
    prop_oneof![Just(Sight::Causal), Just(Sight::Bidirectional)]
}

fn uncached(layout: &Layout, sight: Sight) -> Pass<'_> {
    match sight {
        Sight::Causal => Pass::Causal(layout),
        Sight::Bidirectional => Pass::Bidirectional(layout),
    }
}

/// The slots whose stream changes when the one at `changed` does.
fn moved(
    model: &Transformer,
    layout: &Layout,
    sight: Sight,
    changed: usize,
    seed: u64,
) -> Result<BTreeSet<usize>> {
    let (seq, hidden) = (layout.seq(), model.config().hidden_size);
    let before = tiny::noise(seed, &[1, seq, hidden], 1.0)?;
    let other = tiny::noise(seed.wrapping_add(1), &[1, 1, hidden], 1.0)?;
    let after = before.slice_assign(&[0..1, changed..changed + 1, 0..hidden], &other)?;
    let run = |xs: &Tensor| -> Result<Vec<Vec<f32>>> {
        let ys = model.forward(xs, model.all_layers(), uncached(layout, sight))?;
        Ok(ys.squeeze(0)?.to_vec2()?)
    };
    let (before, after) = (run(&before)?, run(&after)?);
    Ok((0..seq).filter(|&slot| before[slot] != after[slot]).collect())
}

fn mask_is_the_rule(
    layout: &Layout,
    sight: Sight,
    window: Option<usize>,
    past: usize,
    first: usize,
) -> Result {
    let past = past.min(layout.seq() - 1);
    let first = first.min(past);
    let mask = Mask::new(layout, sight, past..layout.seq(), first, window);
    assert_eq!((mask.queries(), mask.keys()), (layout.seq() - past, layout.seq() - first));
    for row in 0..layout.batch() {
        for query in past..layout.seq() {
            for key in first..layout.seq() {
                let expected = sees((layout, row), sight, window, (query, key));
                let got = mask.sees(row, query - past).contains(&(key - first));
                assert_eq!(got, expected, "row {row}, query {query}, key {key}");
            }
        }
    }
    Ok(())
}

fn one_layer(config: &Config, layout: &Layout, sight: Sight, at: usize, seed: u64) -> Result {
    let model = tiny::transformer(&Config { num_hidden_layers: 1, ..config.clone() }, seed)?;
    let at = at % layout.seq();
    let window = config.sliding_window;
    let expected: BTreeSet<usize> =
        (0..layout.seq()).filter(|&slot| sees((layout, 0), sight, window, (slot, at))).collect();
    assert_eq!(moved(&model, layout, sight, at, seed)?, expected, "token {at}");
    Ok(())
}

fn causal(config: &Config, seed: u64, seq: usize, at: usize) -> Result {
    let (model, at) = (tiny::transformer(config, seed)?, at % seq);
    let moved = moved(&model, &Layout::dense(1, seq), Sight::Causal, at, seed)?;
    assert_eq!(moved.first(), Some(&at), "token {at}");
    Ok(())
}

/// `before` plain tokens, a context segment, `after` plain tokens; no window.
fn segment(config: &Config, seed: u64, parts: [usize; 3], at: usize) -> Result {
    let config = Config { sliding_window: None, ..config.clone() };
    let model = tiny::transformer(&config, seed)?;
    let [before, inside, after] = parts;
    let seq = before + inside + after;
    let segment = before..before + inside;
    let layout = Layout::dense(1, seq).with_context(0, std::slice::from_ref(&segment))?;
    let at = segment.start + at % inside;
    let from = |sight| moved(&model, &layout, sight, at, seed);
    assert_eq!(from(Sight::Bidirectional)?, (segment.start..seq).collect(), "token {at}");
    assert_eq!(from(Sight::Causal)?, (at..seq).collect(), "token {at}");
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn the_mask_is_its_documentation(
        layout in layouts(1..4, 16), sight in sights(), window in prop::option::of(1usize..20),
        past in 0usize..16, first in 0usize..16,
    ) {
        holds(mask_is_the_rule(&layout, sight, window, past, first))?;
    }

    #[test]
    fn one_layer_reaches_exactly_as_far_as_the_mask(
        config in tiny::configs(), layout in layouts(1..2, 16), sight in sights(), at: usize,
        seed: u64,
    ) {
        holds(one_layer(&config, &layout, sight, at, seed))?;
    }

    #[test]
    fn causally_a_token_moves_nothing_before_it(
        config in tiny::configs(), seed: u64, seq in 1usize..20, at: usize,
    ) {
        holds(causal(&config, seed, seq, at))?;
    }

    #[test]
    fn in_a_segment_a_token_moves_everything(
        config in tiny::configs(), seed: u64, before in 0usize..5, inside in 1usize..10,
        after in 0usize..5, at: usize,
    ) {
        holds(segment(&config, seed, [before, inside, after], at))?;
    }
}

// ---- one result, many ways ----

/// Runs `xs` through the cache, `chunk` tokens at a time.
fn through(model: &Transformer, cache: &mut KvCache, xs: &Tensor, chunk: usize) -> Result<Tensor> {
    let seq = xs.dim(1)?;
    let chunks = (0..seq).step_by(chunk).map(|start| {
        let chunk = xs.narrow(1, start, chunk.min(seq - start))?;
        Ok(model.forward(&chunk, model.all_layers(), Pass::Cached(cache))?)
    });
    Ok(Tensor::cat(&chunks.collect::<Result<Vec<_>>>()?, 1)?)
}

/// The embeddings of `layout`'s tokens, padding included.
fn inputs(model: &Transformer, layout: &Layout, seed: u64) -> Result<Tensor> {
    let (batch, seq) = (layout.batch(), layout.seq());
    let ids = tiny::tokens(model.config(), seed, batch * seq);
    Ok(model.embed(&Tensor::new(ids, &Device::Cpu)?.reshape((batch, seq))?)?)
}

/// Row `row` of `xs` without its padding.
fn row_of(xs: &Tensor, layout: &Layout, row: usize) -> Result<Tensor> {
    let start = layout.starts()[row];
    Ok(xs.i(row..row + 1)?.narrow(1, start, layout.seq() - start)?)
}

fn cached_is_uncached(config: &Config, layout: &Layout, chunk: usize, seed: u64) -> Result {
    let model = tiny::transformer(config, seed)?;
    let xs = inputs(&model, layout, seed)?;
    let expected = model.forward(&xs, model.all_layers(), Pass::Causal(layout))?;
    for chunk in [chunk, 1, layout.seq()] {
        let mut cache = model.new_cache(layout, layout.seq())?;
        let ys = through(&model, &mut cache, &xs, chunk)?;
        for row in 0..layout.batch() {
            let (ys, expected) = (row_of(&ys, layout, row)?, row_of(&expected, layout, row)?);
            assert_close(&format!("row {row}, chunks of {chunk}"), &ys, &expected, ROUNDING)?;
        }
    }
    Ok(())
}

fn batch_is_its_rows(config: &Config, layout: &Layout, chunk: usize, seed: u64) -> Result {
    let model = tiny::transformer(config, seed)?;
    let xs = inputs(&model, layout, seed)?;
    let run = |xs: &Tensor, layout: &Layout| -> Result<[Tensor; 3]> {
        let pass = |pass: Pass<'_>| model.forward(xs, model.all_layers(), pass);
        let mut cache = model.new_cache(layout, layout.seq())?;
        let (causal, both_ways) = (pass(Pass::Causal(layout))?, pass(Pass::Bidirectional(layout))?);
        Ok([causal, both_ways, through(&model, &mut cache, xs, chunk)?])
    };
    let together = run(&xs, layout)?;
    for row in 0..layout.batch() {
        let alone = run(&row_of(&xs, layout, row)?, &alone(layout, row)?)?;
        for (index, (together, alone)) in together.iter().zip(alone).enumerate() {
            let together = row_of(together, layout, row)?;
            assert_close(&format!("row {row}, pass {index}"), &together, &alone, ROUNDING)?;
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn cached_and_chunked_is_the_full_recomputation(
        config in tiny::configs(), layout in layouts(1..4, 20), chunk in 1usize..10, seed: u64,
    ) {
        holds(cached_is_uncached(&config, &layout, chunk, seed))?;
    }

    #[test]
    fn a_ragged_batch_is_its_rows_one_by_one(
        config in tiny::configs(), layout in layouts(2..4, 20), chunk in 1usize..10, seed: u64,
    ) {
        holds(batch_is_its_rows(&config, &layout, chunk, seed))?;
    }
}

// ---- padding ----

/// A tiny model whose last layers run in thought passes only, as `thoughts` blocks of its own.
fn with_thought_layers(config: &Config, thoughts: usize, seed: u64) -> Result<Transformer> {
    let all = config.num_hidden_layers;
    let longer = Config { num_hidden_layers: all + thoughts, ..config.clone() };
    let mut weights = tiny::weights(&longer, seed)?;
    for layer in 0..thoughts {
        let from = format!("model.layers.{}.", all + layer);
        let names: Vec<String> =
            weights.keys().filter(|name| name.starts_with(&from)).cloned().collect();
        for name in names {
            let weight = weights.remove(&name).ok_or("no weight")?;
            weights.insert(name.replace(&from, &format!("thought.layers.{layer}.")), weight);
        }
    }
    Ok(Transformer::new(config, &mut weights)?)
}

/// Row `row` of `layout` by itself.
fn alone(layout: &Layout, row: usize) -> Result<Layout> {
    let start = layout.starts()[row];
    let segments: Vec<_> =
        layout.context(row).iter().map(|run| run.start - start..run.end - start).collect();
    Ok(Layout::dense(1, layout.seq() - start).with_context(0, &segments)?)
}

/// Rows of these lengths with context segments, their order and emptiness as they come.
fn with_segments(lengths: &[usize], seed: u64) -> Result<Layout> {
    let mut layout = Layout::ragged(lengths);
    for (row, &length) in lengths.iter().enumerate() {
        layout =
            layout.with_context(row, &tiny::segments(seed.wrapping_add(row as u64), length))?;
    }
    Ok(layout)
}

/// What leaves `layers` and the thought layers after them, and the gradient of a sum of it that
/// weighs every element by `weights`.
fn with_gradient(
    model: &Transformer,
    xs: &Tensor,
    layers: Range<usize>,
    (layout, sight): (&Layout, Sight),
    weights: &Tensor,
) -> Result<[Tensor; 2]> {
    let xs = Var::from_tensor(xs)?;
    let h = model.forward(xs.as_tensor(), layers, uncached(layout, sight))?;
    let ys = model.forward_thought_layers(&h, layout, sight)?;
    let gradients = (&ys * weights)?.sum_all()?.backward()?;
    Ok([ys.detach(), gradients.get(&xs).ok_or("no gradient")?.clone()])
}

/// Values and gradients of every row are those of that row alone, whatever stands in the padding;
/// and of a loss that leaves the padding out, none reaches it.
fn padding_is_left_out(
    config: &Config,
    layout: &Layout,
    span: Range<usize>,
    thoughts: usize,
    seed: u64,
) -> Result {
    let model = with_thought_layers(config, thoughts, seed)?;
    let (batch, seq, hidden) = (layout.batch(), layout.seq(), config.hidden_size);
    let xs = inputs(&model, layout, seed)?;
    let real = Tensor::new(layout.real(), &Device::Cpu)?.unsqueeze(2)?; // (batch, seq, 1)
    let weights = tiny::noise(seed, &[batch, seq, hidden], 1.0)?.broadcast_mul(&real)?;
    for sight in [Sight::Causal, Sight::Bidirectional] {
        let run = |xs: &Tensor, layers: Range<usize>, layout: &Layout, weights: &Tensor| {
            with_gradient(&model, xs, layers, (layout, sight), weights)
        };
        let [ys, gradient] = run(&xs, span.clone(), layout, &weights)?;
        for row in 0..batch {
            let start = layout.starts()[row];
            let padding = |of: &Tensor| of.i((row..row + 1, ..start));
            assert_identical("padding", &padding(&ys)?, &padding(&xs)?)?;
            assert_identical(
                "of padding",
                &padding(&gradient)?.abs()?,
                &padding(&xs.zeros_like()?)?,
            )?;
            if start == seq {
                continue; // an empty row
            }
            let (xs, weights) = (row_of(&xs, layout, row)?, row_of(&weights, layout, row)?);
            let [expected, slope] = run(&xs, span.clone(), &alone(layout, row)?, &weights)?;
            let name = format!("{sight:?}, row {row}");
            assert_close(&name, &row_of(&ys, layout, row)?, &expected, ROUNDING)?;
            let name = format!("gradient, {name}");
            assert_close(&name, &row_of(&gradient, layout, row)?, &slope, 10.0 * ROUNDING)?;
        }
        // Where there is padding, nothing: not even what is no number.
        let holes = Tensor::full(f32::NAN, xs.shape(), &Device::Cpu)?;
        let holes = real.broadcast_as(xs.shape())?.gt(0f32)?.where_cond(&xs, &holes)?;
        let [with_holes, _] = run(&holes, span.clone(), layout, &weights)?;
        for row in (0..batch).filter(|row| layout.starts()[*row] < seq) {
            let (got, expected) = (row_of(&with_holes, layout, row)?, row_of(&ys, layout, row)?);
            assert_identical("beside padding that is no number", &got, &expected)?;
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn padding_takes_no_part(
        (config, span) in configs_with_span(), lengths in prop::collection::vec(0usize..24, 1..5),
        longest in 1usize..24, thoughts in 0usize..3, seed: u64,
    ) {
        let lengths = [lengths, vec![longest]].concat();
        let layout = with_segments(&lengths, seed).map_err(|e| TestCaseError::fail(e.to_string()))?;
        holds(padding_is_left_out(&config, &layout, span, thoughts, seed))?;
    }
}

/// Longer than what any part of attention takes at a time, beside rows that are much shorter.
#[test]
fn long_and_short_rows_are_packed_alike() -> Result {
    for sliding_window in [None, Some(70)] {
        let config = Config { sliding_window, ..tiny::config() };
        let layout = with_segments(&[1, 700, 0, 64, 701, 3], 5)?;
        padding_is_left_out(&config, &layout, 0..3, 1, 5)?;
        let layout = Layout::ragged(&[400, 900, 1]);
        padding_is_left_out(&config, &layout, 1..3, 0, 6)?;
    }
    Ok(())
}

// ---- the cache ----

/// Tokens that the blocks take up at a time: the room of a rolling cache beyond its window.
const CHUNK: usize = 512;

fn rolling(window: usize, seq: usize, chunk: usize, pad: usize, seed: u64) -> Result {
    let config = Config { sliding_window: Some(window), num_hidden_layers: 2, ..tiny::config() };
    let model = tiny::transformer(&config, seed)?;
    let layout = Layout::ragged(&[seq, seq - pad]);
    let xs = inputs(&model, &layout, seed)?;
    let expected = model.forward(&xs, model.all_layers(), Pass::Causal(&layout))?;
    let mut cache = model.new_cache(&layout, seq)?;
    assert!(cache.slots() < window + CHUNK && cache.slots() < seq, "{} slots", cache.slots());
    let ys = through(&model, &mut cache, &xs, chunk)?;
    assert!(cache.slots() < window + CHUNK, "{} slots", cache.slots());
    for row in 0..2 {
        let (ys, expected) = (row_of(&ys, &layout, row)?, row_of(&expected, &layout, row)?);
        assert_close(&format!("row {row}"), &ys, &expected, ROUNDING)?;
    }
    Ok(())
}

/// Layers of one pass that took up what came before in chunks of different sizes.
fn layers_apart(window: usize, chunks: [usize; 2], seed: u64) -> Result {
    let config = Config { sliding_window: Some(window), ..tiny::config() };
    let model = tiny::transformer(&config, seed)?;
    let layout = Layout::dense(1, 950);
    let xs = inputs(&model, &layout, seed)?;
    let expected = model.forward(&xs, 0..3, Pass::Causal(&layout))?;
    let mut cache = model.new_cache(&layout, 950)?;
    let past = xs.narrow(1, 0, 900)?;
    let mut in_chunks = |xs: &Tensor, layers: Range<usize>, chunk: usize| -> Result<Tensor> {
        let chunks = (0..900).step_by(chunk).map(|start| {
            let xs = xs.narrow(1, start, chunk.min(900 - start))?;
            Ok(model.forward(&xs, layers.clone(), Pass::Cached(&mut cache))?)
        });
        Ok(Tensor::cat(&chunks.collect::<Result<Vec<_>>>()?, 1)?)
    };
    let z = in_chunks(&past, 0..1, chunks[0])?;
    in_chunks(&z, 1..3, chunks[1])?;
    let ys = through(&model, &mut cache, &xs.narrow(1, 900, 50)?, 7)?;
    assert_close("after layers apart", &ys, &expected.narrow(1, 900, 50)?, ROUNDING)
}

/// Goes back to `length` after `seq` tokens and on with others.
fn truncated(window: Option<usize>, seq: usize, length: usize, seed: u64) -> Result {
    let config = Config { sliding_window: window, num_hidden_layers: 2, ..tiny::config() };
    let model = tiny::transformer(&config, seed)?;
    let (old, new) = (tiny::tokens(&config, seed, seq), tiny::tokens(&config, !seed, 5));
    let layout = Layout::dense(1, 1);
    let mut cache = model.new_cache(&layout, seq + new.len())?;
    through(&model, &mut cache, &tiny::embed(&model, &old)?, seq)?;
    let kept = match cache.truncate(length) {
        Ok(()) => length.min(seq),
        Err(Error::CacheRolled { length: asked, oldest }) => {
            let window = window.ok_or("rolled without a window")?;
            assert!(asked == length && length + 1 < window + oldest, "{oldest} is old enough");
            seq
        }
        Err(other) => return Err(other.into()),
    };
    assert_eq!(cache.len(), kept);
    let ys = through(&model, &mut cache, &tiny::embed(&model, &new)?, 2)?;

    let all = [&old[..kept], new.as_slice()].concat();
    let xs = tiny::embed(&model, &all)?;
    let fresh =
        model.forward(&xs, model.all_layers(), Pass::Causal(&Layout::dense(1, all.len())))?;
    assert_close("after truncate", &ys, &fresh.narrow(1, kept, new.len())?, ROUNDING)?;

    cache.reset();
    assert!(cache.is_empty());
    let ys = through(&model, &mut cache, &xs, all.len())?;
    assert_close("after reset", &ys, &fresh, ROUNDING)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(8))]

    #[test]
    fn a_rolling_cache_is_the_uncached_window(
        window in 1usize..40, seq in 600usize..1500, chunk in 1usize..700, pad in 0usize..30,
        seed: u64,
    ) {
        holds(rolling(window, seq, chunk, pad, seed))?;
    }

    #[test]
    fn layers_may_take_up_the_past_in_chunks_of_their_own(
        window in 1usize..40, one in 90usize..950, other in 90usize..950, seed: u64,
    ) {
        holds(layers_apart(window, [one, other], seed))?;
    }

    #[test]
    fn a_truncated_or_reset_cache_is_a_fresh_one(
        window in prop::option::of(1usize..40), seq in 520usize..1200, back in 0usize..1200,
        seed: u64,
    ) {
        holds(truncated(window, seq, seq.saturating_sub(back), seed))?;
        holds(truncated(window, seq, seq.saturating_sub(back % 60), seed))?;
    }
}

#[test]
fn a_rolled_cache_says_what_it_has_let_go_of() -> Result {
    let config = Config { sliding_window: Some(4), ..tiny::config() };
    let model = tiny::transformer(&config, 1)?;
    let mut cache = model.new_cache(&Layout::dense(1, 1), 1024)?;
    through(&model, &mut cache, &tiny::embed(&model, &tiny::tokens(&config, 1, 600))?, 600)?;
    // The second chunk let go of all but 3 of the first 512.
    let rolled = cache.truncate(511);
    assert!(matches!(rolled, Err(Error::CacheRolled { length: 511, oldest: 509 })), "{rolled:?}");
    cache.truncate(usize::MAX)?;
    assert_eq!(cache.len(), 600);
    cache.truncate(512)?;
    assert_eq!(cache.len(), 512);
    cache.truncate(0)?;
    assert!(cache.is_empty());

    // Where nothing before a position is seen, it can always be returned to.
    truncated(Some(4), 600, 0, 2)?;
    truncated(Some(1), 600, 300, 2)
}

#[test]
fn a_full_cache_is_an_error_that_changes_nothing() -> Result {
    let config = tiny::config();
    let model = tiny::transformer(&config, 1)?;
    let xs = tiny::embed(&model, &tiny::tokens(&config, 1, 700))?;
    let mut cache = model.new_cache(&Layout::dense(1, 1), 650)?;
    let mut add = |xs: &Tensor| model.forward(xs, model.all_layers(), Pass::Cached(&mut cache));

    let full = add(&xs);
    assert!(matches!(full, Err(Error::ContextFull { capacity: 650, requested: 700 })), "{full:?}");
    // Nothing of the refused tokens stays: there is room for exactly 650.
    add(&xs.narrow(1, 0, 650)?)?;
    let full = add(&xs.narrow(1, 650, 1)?);
    assert!(matches!(full, Err(Error::ContextFull { capacity: 650, requested: 651 })), "{full:?}");
    assert_eq!(cache.len(), 650);

    let long = Layout::dense(1, config.max_position_embeddings + 1);
    let capacity = config.max_position_embeddings;
    let beyond = model.new_cache(&long, capacity + 1).map(|_| ());
    assert!(
        matches!(beyond, Err(Error::ContextFull { capacity: c, requested: r })
            if c == capacity && r == capacity + 1),
        "{beyond:?}"
    );
    Ok(())
}

// ---- one copy of the weights ----

#[test]
fn weights_are_shared_between_threads() -> Result {
    fn shared<T: Send + Sync>(_: &T) {}
    let config = Config { sliding_window: Some(5), ..tiny::config() };
    let model = tiny::hybrid(&config, 3)?;
    shared(&model);
    let ask = |seed: u64| {
        let prompt = tiny::tokens(&config, seed, 9);
        let thinking = Thinking::passes(2).span(1..3).refine(Interpolate::new(0.2));
        let how = GenerationConfig::default().max_tokens(40).temperature(1.0).seed(seed);
        model.generate(prompt, &how.thinking(thinking))
    };
    let alone = (0..4).map(ask).collect::<std::result::Result<Vec<_>, _>>()?;
    let together = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4).map(|seed| scope.spawn(move || ask(seed))).collect();
        threads.into_iter().map(ScopedJoinHandle::join).collect::<Vec<_>>()
    });
    for (alone, together) in alone.into_iter().zip(together) {
        let together = together.map_err(|_| "a thread panicked")??;
        assert_eq!((together.ids, together.logprobs), (alone.ids, alone.logprobs));
    }
    Ok(())
}

/// Longer than what any part of a block takes at a time, at once and through a cache.
#[test]
fn a_long_text_at_once_is_the_same_in_chunks() -> Result {
    let model = tiny::transformer(&tiny::config(), 14)?;
    let layout = Layout::ragged(&[1300, 900]);
    let xs = tiny::text(&model, &layout, 14)?.embeddings().clone();
    let whole = model.forward(&xs, 0..3, Pass::Causal(&layout))?;
    let mut cache = model.new_cache(&layout, 1300)?;
    let chunks = model.forward(&xs, 0..3, Pass::Cached(&mut cache))?;
    for (row, length) in [(0, 1300), (1, 900)] {
        let text = |xs: &Tensor| xs.narrow(0, row, 1)?.narrow(1, 1300 - length, length);
        assert_close("row", &text(&whole)?, &text(&chunks)?, ROUNDING)?;
    }
    Ok(())
}
