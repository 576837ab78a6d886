//! The rules of the forward pass, over random tiny models: what sees what, and that every way to
//! compute the same thing gives the same numbers.

mod common;

use std::collections::BTreeSet;
use std::ops::Range;
use std::thread::ScopedJoinHandle;

use candle_core::{Device, Tensor, Var};
use hybrid_attention::model::{Batch, KvCache, KvPool, Mask, Pass, Sight, Transformer};
use hybrid_attention::refine::Interpolate;
use hybrid_attention::thought::{EncodedBatch, ThoughtModel};
use hybrid_attention::{Config, Error, GenerationConfig, HybridModel, Thinking};
use proptest::prelude::*;

use common::tiny::{self, holds, rows_of, through};
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
fn thought_logits(model: &ThoughtModel, thinking: &Thinking, ids: &[u32]) -> Result<Tensor> {
    let decoder = model.decoder();
    let text = EncodedBatch::new(decoder, ids, Batch::one(ids.len())?)?;
    let mut cache = decoder.new_cache(ids.len())?;
    let mind = thinking.on(model)?;
    let z = mind.encode(&text, Pass::Cached(&mut cache))?;
    let thoughts = mind.think(&text, z, |_, _| ())?;
    Ok(decoder.logits(&mind.hand_off(&text, &thoughts, Pass::Cached(&mut cache))?)?)
}

fn passes_0(config: &Config, span: Range<usize>, weight: f64, seed: u64, seq: usize) -> Result {
    let model = ThoughtModel::from(tiny::transformer(config, seed)?);
    let (decoder, ids) = (model.decoder(), tiny::tokens(config, seed, seq));
    let mut cache = decoder.new_cache(seq)?;
    let plain = tiny::logits(decoder, &decoder.embed_ids(&ids)?, Pass::Cached(&mut cache))?;
    let none = Thinking::new(0).span(span).refine(Interpolate::new(weight));
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
    let model = ThoughtModel::from(tiny::transformer(config, seed)?);
    let (decoder, ids) = (model.decoder(), tiny::tokens(config, seed, seq));
    let xs = decoder.embed_ids(&ids)?;
    let plain = tiny::logits(decoder, &xs, Pass::Causal(&Batch::one(seq)?))?;
    let thinking = Thinking::new(passes).span(span).refine(Interpolate::new(0.0));
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

/// Texts with up to two segments each, some without any.
fn batches(sequences: Range<usize>, longest: usize) -> impl Strategy<Value = Batch> {
    tiny::batches(sequences, longest, 0..6)
}

/// The rule in the documentation of [`Mask`], word for word: `query` and `key` are positions, and the
/// query is one of the new tokens.
fn sees(
    (batch, sequence): (&Batch, usize),
    sight: Sight,
    window: Option<usize>,
    (query, key): (usize, usize),
) -> bool {
    let first = batch.first(sequence);
    let inside = |run: &&Range<usize>, position: usize| {
        (first + run.start..first + run.end).contains(&position)
    };
    let segment = batch.context(sequence).iter().find(|run| inside(run, query));
    let within = |distance: usize| window.is_none_or(|window| distance < window);
    let behind = key <= query && within(query - key);
    let ahead = key > query
        && sight == Sight::Bidirectional
        && segment.is_some_and(|segment| inside(&segment, key))
        && within(key - query);
    behind || ahead
}

fn sights() -> impl Strategy<Value = Sight> {
    prop_oneof![Just(Sight::Causal), Just(Sight::Bidirectional)]
}

/// The rows whose stream changes when the one at `changed` does.
fn moved(
    model: &Transformer,
    batch: &Batch,
    sight: Sight,
    changed: usize,
    seed: u64,
) -> Result<BTreeSet<usize>> {
    let (tokens, hidden) = (batch.tokens(), model.config().hidden_size);
    let before = tiny::noise(seed, &[tokens, hidden], 1.0)?;
    let other = tiny::noise(seed.wrapping_add(1), &[1, hidden], 1.0)?;
    let after = before.slice_assign(&[changed..changed + 1, 0..hidden], &other)?;
    let run = |xs: &Tensor| -> Result<Vec<Vec<f32>>> {
        let ys = model.forward(xs, model.all_layers(), Pass::uncached(batch, sight))?;
        Ok(ys.to_vec2()?)
    };
    let (before, after) = (run(&before)?, run(&after)?);
    Ok((0..tokens).filter(|&row| before[row] != after[row]).collect())
}

/// `past` has for each sequence the position at which it goes on, and the oldest one that is left.
fn mask_is_the_rule(
    batch: &Batch,
    sight: Sight,
    window: Option<usize>,
    past: &[(usize, usize)],
) -> Result {
    let (mut batch, mut oldest) = (batch.clone(), Vec::new());
    for (sequence, (first, gone)) in (0..batch.sequences()).zip(past) {
        batch = batch.starting_at(sequence, *first)?;
        oldest.push(*first.min(gone));
    }
    let mask = Mask::with_past(&batch, sight, window, &oldest)?;
    assert_eq!((mask.queries(), mask.sequences()), (batch.tokens(), batch.sequences()));
    for (sequence, rows) in batch.all_rows().enumerate() {
        let (first, oldest) = (batch.first(sequence), oldest[sequence]);
        let end = first + rows.len();
        assert_eq!(mask.keys(sequence), oldest..end);
        for query in first..end {
            for key in 0..end + 2 {
                let there = (oldest..end).contains(&key);
                let expected = there && sees((&batch, sequence), sight, window, (query, key));
                let got = mask.sees(sequence, query - first).contains(&key);
                assert_eq!(got, expected, "sequence {sequence}, query {query}, key {key}");
            }
        }
    }
    let alone = Mask::new(&batch, sight, window)?;
    let firsts: Vec<usize> = (0..batch.sequences()).map(|it| batch.first(it)).collect();
    assert_eq!(alone, Mask::with_past(&batch, sight, window, &firsts)?);
    Ok(())
}

/// A token moves those that see it, and nothing of any other sequence.
fn one_layer(config: &Config, batch: &Batch, sight: Sight, at: usize, seed: u64) -> Result {
    let model = tiny::transformer(&Config { num_hidden_layers: 1, ..config.clone() }, seed)?;
    let (at, window) = (at % batch.tokens(), config.sliding_window);
    let sequence = batch.all_rows().position(|rows| rows.contains(&at)).ok_or("in no sequence")?;
    let rows = batch.rows(sequence);
    let sees =
        |row: &usize| sees((batch, sequence), sight, window, (row - rows.start, at - rows.start));
    let expected: BTreeSet<usize> = rows.clone().filter(sees).collect();
    assert_eq!(moved(&model, batch, sight, at, seed)?, expected, "token {at}");
    Ok(())
}

fn causal(config: &Config, seed: u64, seq: usize, at: usize) -> Result {
    let (model, at) = (tiny::transformer(config, seed)?, at % seq);
    let moved = moved(&model, &Batch::one(seq)?, Sight::Causal, at, seed)?;
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
    let batch = Batch::one(seq)?.with_context(0, std::slice::from_ref(&segment))?;
    let at = segment.start + at % inside;
    let from = |sight| moved(&model, &batch, sight, at, seed);
    assert_eq!(from(Sight::Bidirectional)?, (segment.start..seq).collect(), "token {at}");
    assert_eq!(from(Sight::Causal)?, (at..seq).collect(), "token {at}");
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn the_mask_is_its_documentation(
        batch in batches(1..4, 16), sight in sights(), window in prop::option::of(1usize..20),
        past in prop::collection::vec((0usize..16, 0usize..16), 3),
    ) {
        holds(mask_is_the_rule(&batch, sight, window, &past))?;
    }

    #[test]
    fn one_layer_reaches_exactly_as_far_as_the_mask(
        config in tiny::configs(), batch in batches(1..4, 16), sight in sights(), at: usize,
        seed: u64,
    ) {
        holds(one_layer(&config, &batch, sight, at, seed))?;
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

/// All sequences of a batch through their caches side by side, `chunk` tokens of each at a time.
fn side_by_side(
    model: &Transformer,
    caches: &mut [KvCache],
    (xs, batch): (&Tensor, &Batch),
    chunk: usize,
) -> Result<Tensor> {
    let longest = batch.lengths().into_iter().max().unwrap_or(0);
    tiny::side_by_side(model, caches, (xs, batch), &tiny::steps(0..longest, chunk))
}

/// A cache for each sequence of a batch.
fn caches(model: &Transformer, batch: &Batch) -> Result<Vec<KvCache>> {
    batch.lengths().into_iter().map(|length| Ok(model.new_cache(length.max(1))?)).collect()
}

/// Embeddings of random tokens: `(tokens, hidden)`.
fn inputs(model: &Transformer, batch: &Batch, seed: u64) -> Result<Tensor> {
    Ok(model.embed_ids(&tiny::tokens(model.config(), seed, batch.tokens()))?)
}

/// One sequence by itself.
fn alone(batch: &Batch, sequence: usize) -> Result<Batch> {
    let length = batch.rows(sequence).len();
    Ok(Batch::one(length)?.with_context(0, batch.context(sequence))?)
}

fn cached_is_uncached(config: &Config, batch: &Batch, chunk: usize, seed: u64) -> Result {
    let model = tiny::transformer(config, seed)?;
    let xs = inputs(&model, batch, seed)?;
    let expected = model.forward(&xs, model.all_layers(), Pass::Causal(batch))?;
    for chunk in [chunk, 1, batch.tokens()] {
        let mut caches = caches(&model, batch)?;
        let ys = side_by_side(&model, &mut caches, (&xs, batch), chunk)?;
        for (sequence, cache) in caches.iter_mut().enumerate() {
            let expected = rows_of(&expected, batch, sequence)?;
            let name = format!("sequence {sequence}, chunks of {chunk}");
            assert_close(&name, &rows_of(&ys, batch, sequence)?, &expected, ROUNDING)?;
            assert_eq!(cache.len(), batch.rows(sequence).len());
            cache.reset();
            let ys = through(&model, cache, &rows_of(&xs, batch, sequence)?, chunk)?;
            assert_close(&format!("{name}, alone"), &ys, &expected, ROUNDING)?;
        }
    }
    Ok(())
}

fn batch_is_its_sequences(config: &Config, batch: &Batch, chunk: usize, seed: u64) -> Result {
    let model = tiny::transformer(config, seed)?;
    let xs = inputs(&model, batch, seed)?;
    let run = |xs: &Tensor, batch: &Batch| -> Result<[Tensor; 4]> {
        let pass = |pass: Pass<'_>| model.forward(xs, model.all_layers(), pass);
        let (causal, both_ways) = (pass(Pass::Causal(batch))?, pass(Pass::Bidirectional(batch))?);
        let through = side_by_side(&model, &mut caches(&model, batch)?, (xs, batch), chunk)?;
        let (sight, mut caches) = (Sight::Bidirectional, caches(&model, batch)?);
        let caches = caches.iter_mut().collect();
        let remembered = pass(Pass::Remembered { batch, sight, caches })?;
        Ok([causal, both_ways, through, remembered])
    };
    let together = run(&xs, batch)?;
    assert_close("remembered", &together[3], &together[1], ROUNDING)?;
    for sequence in 0..batch.sequences() {
        let alone = run(&rows_of(&xs, batch, sequence)?, &alone(batch, sequence)?)?;
        for (index, (together, alone)) in together.iter().zip(alone).enumerate() {
            let together = rows_of(together, batch, sequence)?;
            let name = format!("sequence {sequence}, pass {index}");
            assert_close(&name, &together, &alone, ROUNDING)?;
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn cached_and_chunked_is_the_full_recomputation(
        config in tiny::configs(), batch in batches(1..4, 20), chunk in 1usize..10, seed: u64,
    ) {
        holds(cached_is_uncached(&config, &batch, chunk, seed))?;
    }

    #[test]
    fn a_ragged_batch_is_its_sequences_one_by_one(
        config in tiny::configs(), batch in batches(2..4, 20), chunk in 1usize..10, seed: u64,
    ) {
        holds(batch_is_its_sequences(&config, &batch, chunk, seed))?;
    }
}

// ---- packing ----

/// A tiny model whose last layers run in thought passes only, as `thoughts` blocks of its own.
fn with_thought_layers(config: &Config, thoughts: usize, seed: u64) -> Result<ThoughtModel> {
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
    Ok(ThoughtModel::new(config, &mut weights)?)
}

/// Sequences of these lengths with context segments, their order and emptiness as they come.
fn with_segments(lengths: &[usize], seed: u64) -> Result<Batch> {
    let mut batch = Batch::ragged(lengths)?;
    for (sequence, &length) in lengths.iter().enumerate() {
        let segments = tiny::segments(seed.wrapping_add(sequence as u64), length);
        batch = batch.with_context(sequence, &segments)?;
    }
    Ok(batch)
}

/// What leaves `layers` and the thought layers after them, and the gradient of a sum of it that
/// weighs every element by `weights`.
fn with_gradient(
    model: &ThoughtModel,
    xs: &Tensor,
    layers: Range<usize>,
    (batch, sight): (&Batch, Sight),
    weights: &Tensor,
) -> Result<[Tensor; 2]> {
    let xs = Var::from_tensor(xs)?;
    let h = model.decoder().forward(xs.as_tensor(), layers, Pass::uncached(batch, sight))?;
    let ys = model.forward_thought_layers(&h, batch, sight)?;
    let gradients = (&ys * weights)?.sum_all()?.backward()?;
    Ok([ys.detach(), gradients.get(&xs).ok_or("no gradient")?.clone()])
}

/// Values and gradients of every sequence are those of that sequence alone, whatever stands in its
/// neighbours; and of a loss that leaves a sequence out, nothing reaches it.
fn neighbours_take_no_part(
    config: &Config,
    batch: &Batch,
    span: Range<usize>,
    thoughts: usize,
    seed: u64,
) -> Result {
    let model = with_thought_layers(config, thoughts, seed)?;
    let (tokens, hidden) = (batch.tokens(), config.hidden_size);
    let xs = inputs(model.decoder(), batch, seed)?;
    let weights = tiny::noise(seed, &[tokens, hidden], 1.0)?;
    let filled = || (0..batch.sequences()).filter(|it| !batch.rows(*it).is_empty());
    for sight in [Sight::Causal, Sight::Bidirectional] {
        let run = |xs: &Tensor, batch: &Batch, weights: &Tensor| {
            with_gradient(&model, xs, span.clone(), (batch, sight), weights)
        };
        let untracked = |xs: &Tensor| -> Result<Tensor> {
            let h = model.decoder().forward(xs, span.clone(), Pass::uncached(batch, sight))?;
            Ok(model.forward_thought_layers(&h, batch, sight)?)
        };
        let [ys, gradient] = run(&xs, batch, &weights)?;
        for sequence in filled() {
            let of = |xs: &Tensor| rows_of(xs, batch, sequence);
            let [expected, slope] = run(&of(&xs)?, &alone(batch, sequence)?, &of(&weights)?)?;
            let name = format!("{sight:?}, sequence {sequence}");
            assert_close(&name, &of(&ys)?, &expected, ROUNDING)?;
            let name = format!("gradient, {name}");
            assert_close(&name, &of(&gradient)?, &slope, 10.0 * ROUNDING)?;
        }
        // Every second sequence is left out of the loss, then filled with what is no number.
        for odd in [0, 1] {
            let kept = |sequence: usize| sequence % 2 == odd;
            let kept_rows = batch.all_rows().enumerate().flat_map(|(sequence, rows)| {
                std::iter::repeat_n(f32::from(u8::from(kept(sequence))), rows.len())
            });
            let kept_rows = Tensor::from_iter(kept_rows, &Device::Cpu)?.reshape((tokens, 1))?;
            let [_, of_some] = run(&xs, batch, &weights.broadcast_mul(&kept_rows)?)?;
            let holes = Tensor::full(f32::NAN, xs.shape(), &Device::Cpu)?;
            let holes = kept_rows.broadcast_as(xs.shape())?.gt(0f32)?.where_cond(&xs, &holes)?;
            let [with_holes, _] = run(&holes, batch, &weights)?;
            let (plain, plain_with_holes) = (untracked(&xs)?, untracked(&holes)?);
            for sequence in filled() {
                let of = |xs: &Tensor| rows_of(xs, batch, sequence);
                if !kept(sequence) {
                    let none = xs.zeros_like()?;
                    assert_identical("left out", &of(&of_some)?.abs()?, &of(&none)?)?;
                    continue;
                }
                let name = "beside what is no number";
                assert_identical(name, &of(&with_holes)?, &of(&ys)?)?;
                assert_identical(name, &of(&plain_with_holes)?, &of(&plain)?)?;
            }
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn a_sequence_takes_no_part_in_its_neighbours(
        (config, span) in configs_with_span(), lengths in prop::collection::vec(0usize..24, 1..5),
        longest in 1usize..24, thoughts in 0usize..3, seed: u64,
    ) {
        let lengths = [lengths, vec![longest]].concat();
        let batch = with_segments(&lengths, seed).map_err(|e| TestCaseError::fail(e.to_string()))?;
        holds(neighbours_take_no_part(&config, &batch, span, thoughts, seed))?;
    }
}

/// Longer than what any part of attention takes at a time, beside sequences that are much shorter.
#[test]
fn long_and_short_sequences_are_packed_alike() -> Result {
    for sliding_window in [None, Some(70)] {
        let config = Config { sliding_window, ..tiny::config() };
        let batch = with_segments(&[1, 700, 0, 64, 701, 3], 5)?;
        neighbours_take_no_part(&config, &batch, 0..3, 1, 5)?;
        let batch = Batch::ragged(&[400, 900, 1])?;
        neighbours_take_no_part(&config, &batch, 1..3, 0, 6)?;
    }
    Ok(())
}

// ---- the cache ----

/// Tokens that the blocks take up at a time: the room of a rolling cache beyond its window.
const CHUNK: usize = 512;

/// Positions that there is memory for in every layer: whole blocks, as many as hold what is there.
fn held(cache: &KvCache, config: &Config) -> usize {
    let Config { num_hidden_layers, num_key_value_heads, head_dim, .. } = config;
    let position = 2 * num_key_value_heads * head_dim * cache.dtype().size_in_bytes();
    assert_eq!(cache.oldest() % KvPool::BLOCK, 0);
    let held = cache.bytes() / num_hidden_layers / position;
    assert_eq!(held, cache.len().next_multiple_of(KvPool::BLOCK) - cache.oldest());
    held
}

fn rolling(window: usize, seq: usize, chunk: usize, less: usize, seed: u64) -> Result {
    let config = Config { sliding_window: Some(window), num_hidden_layers: 2, ..tiny::config() };
    let model = tiny::transformer(&config, seed)?;
    let batch = Batch::ragged(&[seq, seq - less])?;
    let xs = inputs(&model, &batch, seed)?;
    let expected = model.forward(&xs, model.all_layers(), Pass::Causal(&batch))?;
    // A block is begun before the window, and one is not full.
    let most = window + CHUNK + 2 * KvPool::BLOCK;

    let mut caches = caches(&model, &batch)?;
    assert!(caches.iter().all(|cache| held(cache, &config) == 0));
    let together = side_by_side(&model, &mut caches, (&xs, &batch), chunk)?;
    for (sequence, cache) in caches.iter_mut().enumerate() {
        let expected = rows_of(&expected, &batch, sequence)?;
        assert!(held(cache, &config) < most && cache.oldest() > 0, "{}", cache.oldest());
        let ys = rows_of(&together, &batch, sequence)?;
        assert_close(&format!("sequence {sequence}"), &ys, &expected, ROUNDING)?;
        cache.reset();
        assert_eq!((cache.bytes(), cache.pool().used_bytes()), (0, 0));
        let ys = through(&model, cache, &rows_of(&xs, &batch, sequence)?, chunk)?;
        assert!(held(cache, &config) < most && cache.oldest() > 0, "{}", cache.oldest());
        assert_close(&format!("sequence {sequence}, alone"), &ys, &expected, ROUNDING)?;
    }
    Ok(())
}

/// Layers of one pass that took up what came before in chunks of different sizes.
fn layers_apart(window: usize, chunks: [usize; 2], seed: u64) -> Result {
    let config = Config { sliding_window: Some(window), ..tiny::config() };
    let model = tiny::transformer(&config, seed)?;
    let batch = Batch::one(950)?;
    let xs = inputs(&model, &batch, seed)?;
    let expected = model.forward(&xs, 0..3, Pass::Causal(&batch))?;
    let mut cache = model.new_cache(950)?;
    let past = xs.narrow(0, 0, 900)?;
    let mut in_chunks = |xs: &Tensor, layers: Range<usize>, chunk: usize| -> Result<Tensor> {
        let chunks = (0..900).step_by(chunk).map(|start| {
            let xs = xs.narrow(0, start, chunk.min(900 - start))?;
            Ok(model.forward(&xs, layers.clone(), Pass::Cached(&mut cache))?)
        });
        Ok(Tensor::cat(&chunks.collect::<Result<Vec<_>>>()?, 0)?)
    };
    let z = in_chunks(&past, 0..1, chunks[0])?;
    in_chunks(&z, 1..3, chunks[1])?;
    let ys = through(&model, &mut cache, &xs.narrow(0, 900, 50)?, 7)?;
    assert_close("after layers apart", &ys, &expected.narrow(0, 900, 50)?, ROUNDING)
}

/// Goes back to `length` after `seq` tokens and on with others.
fn truncated(window: Option<usize>, seq: usize, length: usize, seed: u64) -> Result {
    let config = Config { sliding_window: window, num_hidden_layers: 2, ..tiny::config() };
    let model = tiny::transformer(&config, seed)?;
    let (old, new) = (tiny::tokens(&config, seed, seq), tiny::tokens(&config, !seed, 5));
    let mut cache = model.new_cache(seq + new.len())?;
    through(&model, &mut cache, &model.embed_ids(&old)?, seq)?;
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
    let ys = through(&model, &mut cache, &model.embed_ids(&new)?, 2)?;

    let all = [&old[..kept], new.as_slice()].concat();
    let xs = model.embed_ids(&all)?;
    let fresh = model.forward(&xs, model.all_layers(), Pass::Causal(&Batch::one(all.len())?))?;
    assert_close("after truncate", &ys, &fresh.narrow(0, kept, new.len())?, ROUNDING)?;

    cache.reset();
    assert!(cache.is_empty());
    let ys = through(&model, &mut cache, &xs, all.len())?;
    assert_close("after reset", &ys, &fresh, ROUNDING)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(8))]

    #[test]
    fn a_rolling_cache_is_the_uncached_window(
        window in 1usize..40, seq in 630usize..1500, chunk in 1usize..700, less in 0usize..30,
        seed: u64,
    ) {
        holds(rolling(window, seq, chunk, less, seed))?;
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
    let mut cache = model.new_cache(1024)?;
    through(&model, &mut cache, &model.embed_ids(&tiny::tokens(&config, 1, 600))?, 600)?;
    // The second half needs position 297, and let go of the three blocks before it.
    assert_eq!((cache.oldest(), 3 * KvPool::BLOCK), (288, 288));
    let rolled = cache.truncate(290);
    assert!(matches!(rolled, Err(Error::CacheRolled { length: 290, oldest: 288 })), "{rolled:?}");
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
    let xs = model.embed_ids(&tiny::tokens(&config, 1, 700))?;
    let mut cache = model.new_cache(650)?;
    let mut add = |xs: &Tensor| model.forward(xs, model.all_layers(), Pass::Cached(&mut cache));

    let refused = |result: std::result::Result<(), Error>, what, room, asked| {
        assert!(
            matches!(result, Err(Error::ContextFull { of, capacity, requested })
                if of == what && capacity == room && requested == asked),
            "{result:?}"
        );
    };
    refused(add(&xs).map(|_| ()), "the cache", 650, 700);
    // Nothing of the refused tokens stays: there is room for exactly 650.
    add(&xs.narrow(0, 0, 650)?)?;
    refused(add(&xs.narrow(0, 650, 1)?).map(|_| ()), "the cache", 650, 651);
    assert_eq!(cache.len(), 650);

    let most = config.max_position_embeddings;
    refused(model.new_cache(most + 1).map(|_| ()), "the model", most, most + 1);
    let long = Batch::one(most + 1)?;
    let xs = model.embed_ids(&vec![0; most + 1])?;
    let beyond = model.forward(&xs, model.all_layers(), Pass::Causal(&long));
    refused(beyond.map(|_| ()), "the model", most, most + 1);
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
        let thinking = Thinking::new(2).span(1..3).refine(Interpolate::new(0.2));
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

/// Longer than what any part of a block takes at a time, at once and through caches.
#[test]
fn a_long_text_at_once_is_the_same_in_chunks() -> Result {
    let model = tiny::transformer(&tiny::config(), 14)?;
    let batch = Batch::ragged(&[1300, 900])?;
    let xs = tiny::text(&model, &batch, 14)?.embeddings().clone();
    let whole = model.forward(&xs, 0..3, Pass::Causal(&batch))?;
    let mut caches = caches(&model, &batch)?;
    let (sight, remembering) = (Sight::Causal, caches.iter_mut().collect());
    let pass = Pass::Remembered { batch: &batch, sight, caches: remembering };
    let chunks = model.forward(&xs, 0..3, pass)?;
    assert_eq!(caches.iter().map(KvCache::len).collect::<Vec<_>>(), [1300, 900]);
    for (sequence, cache) in caches.iter_mut().enumerate() {
        let expected = rows_of(&whole, &batch, sequence)?;
        assert_close("side by side", &rows_of(&chunks, &batch, sequence)?, &expected, ROUNDING)?;
        cache.reset();
        let xs = rows_of(&xs, &batch, sequence)?;
        let ys = model.forward(&xs, 0..3, Pass::Cached(cache))?;
        assert_close("alone", &ys, &expected, ROUNDING)?;
    }
    Ok(())
}
