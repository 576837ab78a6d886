//! A packed batch is its sequences one by one, in every pass.
//!
//! To the last bit, whatever weights are kept as: attention and norms always; all else as long as the
//! tokens of the pass are at most [`FEW`] both times, or more both times, because products of few rows and of
//! more are rounded differently, and so is attention of one query and of more. Otherwise, and for gradients, up
//! to rounding.

mod common;

use std::ops::Range;
use std::sync::Arc;

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor, Var};
use hybrid_attention::model::{Batch, KvCache, Linear, Mask, Pass, Sight, Transformer, attend};
use hybrid_attention::refine::Interpolate;
use hybrid_attention::thought::{EncodedBatch, ThoughtModel};
use hybrid_attention::{Config, HandOff, HybridModel, Thinking, WeightType};
use proptest::prelude::*;

use common::{Result, assert_close, assert_identical};
use common::{kept, tiny};

/// Up to so many rows are multiplied in one way, more in another.
const FEW: usize = 16;

/// What is not the same to the last bit is off by no more than this share of the largest number.
const ROUNDING: f32 = 2e-5;

const KEPT: [WeightType; 4] = [
    WeightType::Dense(DType::F32),
    WeightType::Dense(DType::BF16),
    WeightType::Dense(DType::F16),
    WeightType::Quantized(GgmlDType::Q8_0),
];

const SIGHTS: [Sight; 2] = [Sight::Causal, Sight::Bidirectional];

/// Two layers, whose rows are whole blocks of 32.
fn config(sliding_window: Option<usize>, tied: bool) -> Config {
    Config {
        hidden_size: 32,
        intermediate_size: 64,
        num_hidden_layers: 2,
        head_dim: 8,
        sliding_window,
        tie_word_embeddings: tied,
        max_position_embeddings: 4096,
        ..tiny::config()
    }
}

/// Two layers, and one that only thought passes run.
fn thought_model(config: &Config, kept: WeightType, seed: u64) -> Result<ThoughtModel> {
    let layers = config.num_hidden_layers;
    let with_one_more = Config { num_hidden_layers: layers + 1, ..config.clone() };
    let (last, thought) = (format!("model.layers.{layers}."), "thought.layers.0.");
    let renamed = |(name, tensor): (String, Tensor)| (name.replace(&last, thought), tensor);
    let tensors = tiny::weights(&with_one_more, seed)?.into_iter().map(renamed).collect();
    Ok(ThoughtModel::new(config, &mut kept::Kept { tensors, kept })?)
}

/// Rows of a stream: `(tokens, hidden)`.
fn rows(xs: &Tensor, of: &Range<usize>) -> Result<Tensor> {
    Ok(xs.narrow(0, of.start, of.len())?)
}

/// Fails unless a sequence is what it is alone: to the last bit where it has to be.
fn assert_same(name: &str, got: &Tensor, alone: &Tensor, exactly: bool) -> Result {
    match exactly {
        true => assert_identical(name, got, alone),
        false if got.elem_count() == 0 => {
            assert_eq!(got.dims(), alone.dims(), "{name}");
            Ok(())
        }
        false => assert_close(name, got, alone, ROUNDING),
    }
}

/// Whether products of so many rows are rounded alike.
fn alike(a: usize, b: usize) -> bool {
    (a <= FEW) == (b <= FEW)
}

/// Sequences as a pass may have them.
#[derive(Clone, Debug)]
struct Sequences {
    lengths: Vec<usize>,
    firsts: Vec<usize>,
    seed: u64,
    whole: bool,
}

impl Sequences {
    /// All context, or with runs of it.
    fn segments(&self, index: usize) -> Option<Vec<Range<usize>>> {
        let seed = self.seed.wrapping_add(index as u64);
        (!self.whole).then(|| tiny::segments(seed, self.lengths[index]))
    }

    fn batch(&self) -> Result<Batch> {
        let mut batch = Batch::ragged(&self.lengths)?;
        for index in 0..self.lengths.len() {
            batch = batch.starting_at(index, self.firsts[index])?;
            if let Some(segments) = self.segments(index) {
                batch = batch.with_context(index, &segments)?;
            }
        }
        Ok(batch)
    }

    fn alone(&self, index: usize) -> Result<Batch> {
        let batch = Batch::one(self.lengths[index])?.starting_at(0, self.firsts[index])?;
        Ok(match self.segments(index) {
            Some(segments) => batch.with_context(0, &segments)?,
            None => batch,
        })
    }

    /// As many tokens before each as its first position says.
    fn pasts(&self) -> Vec<Past> {
        (self.seed..).zip(self.firsts.iter().copied()).collect()
    }

    /// Those that are there at all: a pass alone needs a token.
    fn not_empty(&self) -> impl Iterator<Item = usize> + '_ {
        (0..self.lengths.len()).filter(|index| self.lengths[*index] > 0)
    }
}

fn sequences(most: usize, count: Range<usize>) -> impl Strategy<Value = Sequences> {
    let sequence = (0..most, 0usize..300);
    (prop::collection::vec(sequence, count), any::<u64>(), any::<bool>()).prop_map(
        |(sequences, seed, whole)| {
            let (lengths, firsts) = sequences.into_iter().unzip();
            Sequences { lengths, firsts, seed: seed % 10_000, whole }
        },
    )
}

fn windows() -> impl Strategy<Value = Option<usize>> {
    prop::option::of(1usize..40)
}

// ---- the parts ----

/// The blocks that are multiplied with in whole numbers, and those that are widened.
const BLOCKS: [GgmlDType; 6] = [
    GgmlDType::Q8_0,
    GgmlDType::Q4_0,
    GgmlDType::Q5_1,
    GgmlDType::Q4K,
    GgmlDType::Q6K,
    GgmlDType::Q2K,
];

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// A row of a product does not know how many others there are, but for whether they are few.
    #[test]
    fn a_row_of_a_product_is_what_it_is_beside_others(
        out in 1usize..80, len in 1usize..5, others in 1usize..40, from in 0usize..40,
        count in 1usize..40, seed in 0u64..1000,
    ) {
        let run = || -> Result {
            let total = from + count + others;
            let check = |name: &str, linear: &Linear, width: usize| -> Result {
                let xs = tiny::noise(seed, &[total, width], 1.0)?;
                let all = rows(&linear.forward(&xs)?, &(from..from + count))?;
                let some = linear.forward(&rows(&xs, &(from..from + count))?)?;
                assert_same(name, &all, &some, alike(total, count))
            };
            // A width that fills no vector, one that does, and one of whole blocks.
            for (width, dtype) in [7, 32 * len + 5, 256 * len].into_iter().flat_map(|width| {
                [DType::F32, DType::BF16, DType::F16].map(|dtype| (width, dtype))
            }) {
                let weight = tiny::noise(seed + 1, &[out, width], 0.1)?.to_dtype(dtype)?;
                check(&format!("{dtype:?} {width}"), &Linear::dense(&weight)?, width)?;
            }
            for blocks in BLOCKS {
                let weight = tiny::noise(seed + 1, &[out, 256 * len], 0.1)?;
                let weight = Arc::new(QTensor::quantize(&weight, blocks)?);
                check(&format!("{blocks:?}"), &Linear::quantized(weight)?, 256 * len)?;
            }
            Ok(())
        };
        tiny::holds(run())?;
    }

    /// Attention of a sequence does not know what else is in the pass, nor does a norm.
    #[test]
    fn attention_and_norms_are_of_each_sequence_alone(
        sequences in sequences(150, 1..6), sight in prop::sample::select(&SIGHTS),
        window in windows(), past in 0usize..200, heads in (1usize..3, 1usize..4, 1usize..12),
        dtype in prop::sample::select(&[DType::F32, DType::BF16, DType::F16][..]),
    ) {
        let run = || -> Result {
            let (kv_heads, group, half) = heads;
            let (batch, dim) = (sequences.batch()?, 2 * half);
            // Each goes on from its first position, and has at most `past` keys before it.
            let oldest: Vec<_> =
                sequences.firsts.iter().map(|first| first.saturating_sub(past)).collect();
            let held: Vec<_> = (0..oldest.len())
                .map(|i| sequences.firsts[i] + sequences.lengths[i] - oldest[i])
                .collect();
            let keys: usize = held.iter().sum();
            let q = tiny::noise(1, &[kv_heads * group, batch.tokens(), dim], 1.0)?;
            let k = tiny::noise(2, &[kv_heads, keys, dim], 1.0)?.to_dtype(dtype)?;
            let v = tiny::noise(3, &[kv_heads, keys, dim], 1.0)?.to_dtype(dtype)?;
            let mask = Mask::with_past(&batch, sight, window, &oldest)?;
            let all = attend(&q, &k, &v, &mask)?;
            let mut from = 0;
            for index in 0..oldest.len() {
                let of = batch.rows(index);
                let name = format!("sequence {index}");
                if !of.is_empty() {
                    let alone = sequences.alone(index)?;
                    let mask = Mask::with_past(&alone, sight, window, &oldest[index..=index])?;
                    let part = |of: &Tensor| of.narrow(1, from, held[index]);
                    let q = q.narrow(1, of.start, of.len())?;
                    let alone = attend(&q, &part(&k)?, &part(&v)?, &mask)?;
                    assert_identical(&name, &rows(&all, &of)?, &alone)?;
                }
                from += held[index];
            }

            let model = tiny::transformer(&config(None, true), 4)?;
            if batch.tokens() > 0 {
                let xs = tiny::noise(5, &[batch.tokens(), 32], 3.0)?;
                let all = model.norm(&xs)?;
                for index in sequences.not_empty() {
                    let of = batch.rows(index);
                    assert_identical("norm", &rows(&all, &of)?, &model.norm(&rows(&xs, &of)?)?)?;
                }
            }
            Ok(())
        };
        tiny::holds(run())?;
    }
}

// ---- passes ----

/// Runs a packed pass and each of its sequences alone, of which nothing is remembered.
fn uncached(model: &ThoughtModel, sequences: &Sequences, name: &str) -> Result {
    let (decoder, batch) = (model.decoder(), sequences.batch()?);
    let (tokens, hidden) = (batch.tokens(), decoder.config().hidden_size);
    let xs = tiny::noise(sequences.seed, &[tokens, hidden], 1.0)?;
    for sight in SIGHTS {
        let pass = Pass::uncached(&batch, sight);
        let all = decoder.forward(&xs, decoder.all_layers(), pass)?;
        let thought = model.forward_thought_layers(&xs, &batch, sight)?;
        let logits = decoder.logits(&all)?;
        for index in sequences.not_empty() {
            let (of, alone) = (batch.rows(index), sequences.alone(index)?);
            let (x, exactly) = (rows(&xs, &of)?, alike(tokens, of.len()));
            let name = format!("{name}, {sight:?}, sequence {index} of {sequences:?}");
            let h = decoder.forward(&x, decoder.all_layers(), Pass::uncached(&alone, sight))?;
            assert_same(&name, &rows(&all, &of)?, &h, exactly)?;
            assert_same(&name, &rows(&logits, &of)?, &decoder.logits(&h)?, exactly)?;
            let h = model.forward_thought_layers(&x, &alone, sight)?;
            assert_same(&name, &rows(&thought, &of)?, &h, exactly)?;
            // A leading dimension is no other text.
            let shaped = x.unsqueeze(0)?;
            let again = model.forward_thought_layers(&shaped, &alone, sight)?;
            assert_identical(&name, &again.squeeze(0)?, &h)?;
        }
        // Sequences of one length may stand in a rectangle.
        let shaped = xs.unsqueeze(0)?;
        let again =
            decoder.forward(&shaped, decoder.all_layers(), Pass::uncached(&batch, sight))?;
        assert_identical(name, &again.squeeze(0)?, &all)?;
    }
    Ok(())
}

/// [`uncached`] in a random model; sequences of no tokens at all have nothing to compare.
fn uncached_in_random_model(
    sequences: &Sequences,
    kept: WeightType,
    window: Option<usize>,
    tied: bool,
) -> Result {
    let model = thought_model(&config(window, tied), kept, sequences.seed)?;
    if sequences.lengths.iter().sum::<usize>() == 0 {
        return Ok(());
    }
    uncached(&model, sequences, &format!("{kept:?}"))
}

/// What a cache holds before a pass: so many random tokens, by their seed.
type Past = (u64, usize);

/// One cache for each sequence.
fn caches(model: &Transformer, dtype: DType, pasts: &[Past]) -> Result<Vec<KvCache>> {
    let pool = model.new_pool(dtype, usize::MAX)?;
    let cache = |&(seed, past): &Past| -> Result<KvCache> {
        let mut cache = pool.new_cache(2500)?;
        if past > 0 {
            let xs = model.embed_ids(&tiny::tokens(model.config(), seed, past))?;
            model.forward(&xs, model.all_layers(), Pass::Cached(&mut cache))?;
        }
        Ok(cache)
    };
    pasts.iter().map(cache).collect()
}

/// Runs a packed pass over caches and each of its sequences alone over its own, then one more token.
fn remembered(
    model: &Transformer,
    dtype: DType,
    sight: Sight,
    sequences: &Sequences,
    name: &str,
) -> Result {
    let batch = sequences.batch()?;
    let (tokens, hidden) = (batch.tokens(), model.config().hidden_size);
    let xs = tiny::noise(sequences.seed, &[tokens, hidden], 1.0)?;
    let mut together = caches(model, dtype, &sequences.pasts())?;
    let mut apart = caches(model, dtype, &sequences.pasts())?;
    let all = {
        let caches = together.iter_mut().collect();
        let pass = Pass::Remembered { batch: &batch, sight, caches };
        model.forward(&xs, model.all_layers(), pass)?
    };
    // What is in a cache was rounded: where sums are not the same, a few keys and values are the next number.
    let same = |name: &str, got: &Tensor, alone: &Tensor, exactly: bool| match dtype {
        DType::F32 => assert_same(name, got, alone, exactly),
        _ if exactly => assert_identical(name, got, alone),
        _ => assert_close(name, got, alone, 1.0 / 256.0),
    };
    for index in sequences.not_empty() {
        let (of, alone) = (batch.rows(index), sequences.alone(index)?);
        let exactly = alike(tokens, of.len());
        let name = format!("{name}, {dtype:?}, {sight:?}, sequence {index} of {sequences:?}");
        let x = rows(&xs, &of)?;
        let cache = &mut apart[index];
        let pass = match sight {
            Sight::Causal => Pass::Cached(cache),
            _ => Pass::Remembered { batch: &alone, sight, caches: vec![cache] },
        };
        let h = model.forward(&x, model.all_layers(), pass)?;
        same(&name, &rows(&all, &of)?, &h, exactly)?;
        // And so has it been remembered.
        let (got, alone) = (&mut together[index], &mut apart[index]);
        assert_eq!(got.len(), alone.len(), "{name}");
        // How long what no window sees is kept depends on where a pass was cut.
        if model.config().sliding_window.is_none() || tokens <= 512 {
            assert_eq!((got.oldest(), got.bytes()), (alone.oldest(), alone.bytes()), "{name}");
        }
        let next = model.embed_ids(&[7])?;
        let after = tiny::logits(model, &next, Pass::Cached(got))?;
        same(&name, &after, &tiny::logits(model, &next, Pass::Cached(alone))?, exactly)?;
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn a_packed_pass_is_its_sequences(
        sequences in sequences(40, 1..7), kept in prop::sample::select(&KEPT), window in windows(),
        tied: bool,
    ) {
        tiny::holds(uncached_in_random_model(&sequences, kept, window, tied))?;
    }

    /// So few that all of them together are few.
    #[test]
    fn a_packed_pass_of_few_tokens_is_its_sequences(
        sequences in sequences(5, 1..5), kept in prop::sample::select(&KEPT), window in windows(),
        tied: bool,
    ) {
        tiny::holds(uncached_in_random_model(&sequences, kept, window, tied))?;
    }

    #[test]
    fn a_packed_pass_over_caches_is_its_sequences(
        sequences in sequences(60, 1..6), kept in prop::sample::select(&KEPT), window in windows(),
        tied: bool, sight in prop::sample::select(&SIGHTS),
        dtype in prop::sample::select(&[DType::F32, DType::BF16][..]),
    ) {
        let run = || -> Result {
            let model = thought_model(&config(window, tied), kept, sequences.seed)?;
            if sequences.lengths.iter().sum::<usize>() == 0 {
                return Ok(());
            }
            remembered(model.decoder(), dtype, sight, &sequences, &format!("{kept:?}"))
        };
        tiny::holds(run())?;
    }

    /// The loss of a sequence, and its gradient, are its own.
    #[test]
    fn gradients_are_of_each_sequence_alone(
        sequences in sequences(24, 1..5), window in windows(), tied: bool,
        cached: bool, sight in prop::sample::select(&SIGHTS),
    ) {
        let run = || -> Result {
            let model = tiny::transformer(&config(window, tied), sequences.seed)?;
            let batch = sequences.batch()?;
            if batch.tokens() == 0 {
                return Ok(());
            }
            let (tokens, layers) = (batch.tokens(), model.all_layers());
            let xs = tiny::noise(sequences.seed, &[tokens, 32], 1.0)?;
            let weights = tiny::noise(9, &[tokens, 32], 0.3)?;
            let gradient = |of: &Range<usize>, batch: &Batch, pasts: &[Past]| -> Result<Tensor> {
                let var = Var::from_tensor(&rows(&xs, of)?)?;
                let mut held = caches(&model, DType::F32, pasts)?;
                let pass = match cached {
                    true => Pass::Remembered { batch, sight, caches: held.iter_mut().collect() },
                    false => Pass::uncached(batch, sight),
                };
                let h = model.forward(&var, layers.clone(), pass)?;
                let gradients = (h * rows(&weights, of)?)?.sum_all()?.backward()?;
                Ok(gradients.get(&var).ok_or("no gradient")?.clone())
            };
            let pasts = sequences.pasts();
            let all = gradient(&(0..tokens), &batch, &pasts)?;
            for index in sequences.not_empty() {
                let (of, alone) = (batch.rows(index), sequences.alone(index)?);
                let alone = gradient(&of, &alone, &pasts[index..=index])?;
                let name = format!("sequence {index} of {sequences:?}");
                assert_close(&name, &rows(&all, &of)?, &alone, ROUNDING)?;
            }
            Ok(())
        };
        tiny::holds(run())?;
    }
}

/// Of more tokens than run through an MLP, or into a cache, at a time: wherever they are cut.
#[test]
fn a_long_packed_pass_is_its_sequences() -> Result {
    for (lengths, firsts) in [
        (vec![1010, 20], vec![0, 0]), // what is widened at a time ends inside the second
        (vec![1024, 20], vec![0, 500]), // between the two
        (vec![20, 1023, 30], vec![3, 0, 0]),
        (vec![2060, 18], vec![0, 0]),
    ] {
        let sequences = Sequences { lengths, firsts, seed: 5, whole: false };
        for (kept, window) in KEPT.into_iter().zip([None, Some(30), None, Some(200)]) {
            let model = thought_model(&config(window, false), kept, 5)?;
            uncached(&model, &sequences, &format!("{kept:?} {window:?}"))?;
        }
    }
    for (lengths, firsts) in [
        (vec![511, 20], vec![0, 0]), // a chunk would end behind one token of the second
        (vec![20, 493, 30], vec![0, 0, 9]), // or before the last of it
        (vec![700, 30, 500], vec![90, 0, 300]),
        (vec![17, 512 - 16], vec![0, 0]),
        (vec![510, 1, 1, 1, 1, 30], vec![0, 3, 200, 0, 96, 1]),
        (vec![1030, 17], vec![0, 0]),
        (vec![256, 257, 520], vec![1, 2, 3]),
    ] {
        let sequences = Sequences { lengths, firsts, seed: 6, whole: true };
        for (kept, window) in KEPT.into_iter().zip([None, Some(30), None, Some(200)]) {
            let model = thought_model(&config(window, false), kept, 6)?;
            for (sight, dtype) in SIGHTS.into_iter().zip([DType::F32, DType::F16]) {
                let name = format!("{kept:?} {window:?}");
                remembered(model.decoder(), dtype, sight, &sequences, &name)?;
                remembered(model.decoder(), DType::F32, sight, &sequences, &name)?;
            }
        }
    }
    Ok(())
}

fn over<'a>(batch: &'a Batch, caches: &'a mut [KvCache]) -> Pass<'a> {
    Pass::Remembered { batch, sight: Sight::Causal, caches: caches.iter_mut().collect() }
}

/// Encoding, thinking and handing off, with plain tokens before, between and behind what thinks.
#[test]
#[allow(clippy::single_range_in_vec_init, reason = "a text with one run of context")]
fn packed_thoughts_are_those_of_each_text() -> Result {
    let lengths = [40, 25, 60, 1, 90];
    let context: [&[Range<usize>]; 5] =
        [&[0..39], &[2..9, 11..20], &[10..60], &[], &[0..30, 30..80]];
    for (kept, window) in KEPT.into_iter().flat_map(|kept| [(kept, None), (kept, Some(9))]) {
        let model = thought_model(&config(window, false), kept, 8)?;
        let decoder = model.decoder();
        let mut batch = Batch::ragged(&lengths)?;
        for (index, context) in context.iter().enumerate() {
            batch = batch.with_context(index, context)?;
        }
        let ids = tiny::tokens(decoder.config(), 8, batch.tokens());
        let text = EncodedBatch::new(decoder, &ids, batch.clone())?;
        for hand_off in [HandOff::Refined, HandOff::KeyValue, HandOff::Mixed { weight: 0.4 }] {
            let thinking = Thinking::new(3).span(1..2).refine(Interpolate::new(0.4));
            let mind = thinking.hand_off(hand_off).on(&model)?;
            let first = mind.encode(&text, Pass::Causal(&batch))?;
            let thoughts = mind.think(&text, first, |_, _| ())?;
            let h = mind.hand_off(&text, &thoughts, Pass::Causal(&batch))?;
            // Over caches, in which the prompts then are.
            let mut together = caches(decoder, DType::F32, &lengths.map(|_| (0, 0)))?;
            mind.encode(&text, over(&batch, &mut together))?;
            let cached = mind.hand_off(&text, &thoughts, over(&batch, &mut together))?;
            assert_close("cached", &cached, &h, ROUNDING)?;

            for (index, length) in lengths.into_iter().enumerate() {
                let (of, alone) =
                    (batch.rows(index), Batch::one(length)?.with_context(0, context[index])?);
                let name = format!("{kept:?} {window:?} {hand_off:?}, text {index}");
                let text = EncodedBatch::new(decoder, &ids[of.clone()], alone.clone())?;
                let mut cache = decoder.new_cache(2500)?;
                let first = mind.encode(&text, Pass::Cached(&mut cache))?;
                assert_close(&name, &rows(&thoughts.first, &of)?, &first, ROUNDING)?;
                let one = mind.think(&text, first, |_, _| ())?;
                assert_close(&name, &rows(&thoughts.z, &of)?, &one.z, ROUNDING)?;
                let one = mind.hand_off(&text, &one, Pass::Cached(&mut cache))?;
                assert_close(&name, &rows(&h, &of)?, &one, ROUNDING)?;
                let next = decoder.embed_ids(&[7])?;
                let got = tiny::logits(decoder, &next, Pass::Cached(&mut together[index]))?;
                let alone = tiny::logits(decoder, &next, Pass::Cached(&mut cache))?;
                assert_close(&name, &got, &alone, ROUNDING)?;
            }
        }
    }
    Ok(())
}

/// Vectors of texts do not know which others were asked for.
#[test]
fn vectors_of_texts_are_those_of_each() -> Result {
    let model = HybridModel::tiny(&Device::Cpu)?;
    let texts = [
        "The coin is in the jar. The jar is in the chest.",
        "Leo gave everything to Ida.",
        "The ball is in the box. The box is in the car. The car is in the garage of Ida.",
    ];
    for thinking in [Thinking::none(), Thinking::new(2).span(1..3)] {
        let config = hybrid_attention::EmbedConfig::default().thinking(thinking);
        let all = model.embed(&texts, &config)?;
        for (index, text) in texts.iter().enumerate() {
            let alone = model.embed(&[text], &config)?;
            assert_close(text, &rows(&all, &(index..index + 1))?, &alone, ROUNDING)?;
        }
    }
    Ok(())
}

// ---- decoding and prefill ----

/// Several sequences that go on token by token in one pass, each as alone, to the last bit.
#[test]
fn ragged_decoding_is_each_alone() -> Result {
    for (kept, window) in KEPT.into_iter().flat_map(|kept| [(kept, None), (kept, Some(50))]) {
        let model = thought_model(&config(window, false), kept, 10)?;
        let model = model.decoder();
        for (dtype, count) in
            [(DType::F32, 1), (DType::F32, 2), (DType::BF16, 5), (DType::F16, 9), (DType::F32, FEW)]
        {
            // From nothing to several blocks, some about to begin another.
            let past = |index: usize| [0, 3, 95, 96, 150, 300][index % 6] + index / 6;
            let pasts: Vec<Past> = (0..count).map(|index| (index as u64, past(index))).collect();
            let mut together = caches(model, dtype, &pasts)?;
            let mut apart = caches(model, dtype, &pasts)?;
            let batch = Batch::dense(count, 1)?;
            for step in 0..4 {
                let xs = model.embed_ids(&tiny::tokens(model.config(), 50 + step, count))?;
                let caches = together.iter_mut().collect();
                let pass = Pass::Remembered { batch: &batch, sight: Sight::Causal, caches };
                let logits = tiny::logits(model, &xs, pass)?;
                for (index, cache) in apart.iter_mut().enumerate() {
                    let of = index..index + 1;
                    let alone = tiny::logits(model, &rows(&xs, &of)?, Pass::Cached(cache))?;
                    let name = format!("{kept:?} {window:?} {dtype:?} {index} of {count}, {step}");
                    assert_identical(&name, &rows(&logits, &of)?, &alone)?;
                }
            }
        }
    }
    Ok(())
}

/// Some sequences read several tokens while others go on by one.
#[test]
fn ragged_steps_of_any_length_are_each_alone() -> Result {
    for kept in KEPT {
        let model = thought_model(&config(Some(60), true), kept, 11)?;
        let sequences = Sequences {
            lengths: vec![1, 5, 0, 2, 8],
            firsts: vec![200, 0, 7, 95, 96],
            seed: 3,
            whole: true,
        };
        for sight in SIGHTS {
            remembered(model.decoder(), DType::F32, sight, &sequences, &format!("{kept:?}"))?;
        }
    }
    Ok(())
}

/// A prompt that a cache takes up in pieces is the prompt read whole: to the last bit, wherever it is cut,
/// as long as each piece has more than a few tokens.
#[test]
fn prefill_in_chunks_is_the_whole() -> Result {
    for (kept, window) in
        KEPT.into_iter().flat_map(|kept| [(kept, None), (kept, Some(40)), (kept, Some(300))])
    {
        let model = thought_model(&config(window, false), kept, 12)?;
        let model = model.decoder();
        for length in [17, 96, 512, 513, 528, 1025, 1100, 1600] {
            let xs = model.embed_ids(&tiny::tokens(model.config(), 12, length))?;
            let batch = Batch::one(length)?;
            let whole = model.forward(&xs, model.all_layers(), Pass::Causal(&batch))?;
            for pieces in [vec![length], vec![length / 2, length - length / 2], vec![90, 333]] {
                let mut cache = model.new_cache(2000)?;
                let (mut from, mut exactly) = (0, true);
                for piece in pieces.into_iter().chain([length]) {
                    let of = from..length.min(from + piece);
                    if of.is_empty() {
                        break;
                    }
                    exactly &= of.len() > FEW;
                    let h = rows(&xs, &of)?;
                    let h = model.forward(&h, model.all_layers(), Pass::Cached(&mut cache))?;
                    let name = format!("{kept:?} {window:?} {of:?} of {length}");
                    assert_same(&name, &h, &rows(&whole, &of)?, exactly)?;
                    from = of.end;
                }
                assert_eq!((from, cache.len()), (length, length));
            }
        }
    }
    Ok(())
}
