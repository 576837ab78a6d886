//! Random tiny models: the same shape and seed give the same one.

use std::collections::HashMap;
use std::ops::Range;

use candle_core::{Device, Tensor};
use hybrid_attention::model::{Batch, KvCache, Pass, Sight, Transformer};
use hybrid_attention::thought::{EncodedBatch, ThoughtModel};
use hybrid_attention::{Config, HybridModel};
use proptest::prelude::*;
use proptest::test_runner::TestCaseError;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::Result;

/// Three layers, grouped heads wider than `hidden / heads`, no window, an untied head.
pub(crate) fn config() -> Config {
    Config {
        vocab_size: 32,
        hidden_size: 16,
        intermediate_size: 24,
        num_hidden_layers: 3,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 6,
        rms_norm_eps: 1e-5,
        rope_theta: 10_000.0,
        sliding_window: None,
        max_position_embeddings: 2048,
        tie_word_embeddings: false,
        bos_token_id: None,
        eos_token_ids: Vec::new(),
    }
}

/// Any shape of model, with and without a window.
pub(crate) fn configs() -> impl Strategy<Value = Config> {
    let heads = (1usize..4, 1usize..4, 1usize..7);
    let sizes = (4usize..40, 1usize..40, 1usize..4, 2usize..60);
    let others = (prop::option::of(1usize..10), 1e2..1e6, any::<bool>());
    (heads, sizes, others).prop_map(|(heads, sizes, (sliding_window, rope_theta, tied))| Config {
        num_key_value_heads: heads.0,
        num_attention_heads: heads.0 * heads.1,
        head_dim: 2 * heads.2,
        hidden_size: sizes.0,
        intermediate_size: sizes.1,
        num_hidden_layers: sizes.2,
        vocab_size: sizes.3,
        sliding_window,
        rope_theta,
        tie_word_embeddings: tied,
        ..config()
    })
}

/// Uniform values of mean 0 and standard deviation `scale`.
pub(crate) fn noise(seed: u64, shape: &[usize], scale: f32) -> Result<Tensor> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let reach = scale * 3f32.sqrt();
    let values: Vec<f32> =
        (0..shape.iter().product()).map(|_| rng.random_range(-reach..=reach)).collect();
    Ok(Tensor::from_vec(values, shape, &Device::Cpu)?)
}

/// Weights that keep activations near 1.
pub(crate) fn weights(config: &Config, seed: u64) -> Result<HashMap<String, Tensor>> {
    let weight = |(index, (name, shape)): (usize, (String, Vec<usize>))| {
        let seed = seed.wrapping_mul(1000).wrapping_add(index as u64);
        let tensor = match shape.as_slice() {
            [_] => (noise(seed, &shape, 0.2)? + 1.0)?,
            [_, _] if name.contains("embed_tokens") => noise(seed, &shape, 1.0)?,
            [.., fan_in] => noise(seed, &shape, 1.0 / (*fan_in as f32).sqrt())?,
            [] => return Err("a weight without a shape".into()),
        };
        Ok((name, tensor))
    };
    config.weights().enumerate().map(weight).collect()
}

pub(crate) fn transformer(config: &Config, seed: u64) -> Result<Transformer> {
    Ok(Transformer::new(config, &mut weights(config, seed)?)?)
}

/// The same as a model that thinks, with nothing of its own for thought passes.
pub(crate) fn thought_model(config: &Config, seed: u64) -> Result<ThoughtModel> {
    Ok(transformer(config, seed)?.into())
}

pub(crate) fn hybrid(config: &Config, seed: u64) -> Result<HybridModel> {
    Ok(HybridModel::new(transformer(config, seed)?, None)?)
}

/// Random tokens of a model's vocabulary.
pub(crate) fn tokens(config: &Config, seed: u64, count: usize) -> Vec<u32> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    (0..count).map(|_| rng.random_range(0..config.vocab_size as u32)).collect()
}

/// The embeddings of one sequence of tokens: `(1, seq, hidden)`.
pub(crate) fn embed(model: &Transformer, ids: &[u32]) -> Result<Tensor> {
    Ok(model.embed(&Tensor::new(ids, model.device())?.unsqueeze(0)?)?)
}

/// How a prompt of one piece is laid out: context up to its last token.
pub(crate) fn prompt(length: usize) -> Result<Batch> {
    let context = 0..length - 1;
    Ok(Batch::one(length)?.with_context(0, std::slice::from_ref(&context))?)
}

/// Random tokens for every row of `batch`.
pub(crate) fn text(model: &Transformer, batch: &Batch, seed: u64) -> Result<EncodedBatch> {
    let ids = tokens(model.config(), seed, batch.tokens());
    Ok(EncodedBatch::new(model, &ids, batch.clone())?)
}

/// Runs of tokens of a sequence of this length, apart from each other.
pub(crate) fn segments(seed: u64, length: usize) -> Vec<Range<usize>> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let mut segments = Vec::new();
    let mut from = rng.random_range(0..3);
    while from < length {
        let to = (from + rng.random_range(1..6)).min(length);
        segments.push(from..to);
        from = to + rng.random_range(0..3);
    }
    segments
}

/// All layers over `xs`, and the logits after them.
pub(crate) fn logits(model: &Transformer, xs: &Tensor, pass: Pass<'_>) -> Result<Tensor> {
    Ok(model.logits(&model.forward(xs, model.all_layers(), pass)?)?)
}

/// The rows of one sequence of a batch.
pub(crate) fn rows_of(xs: &Tensor, batch: &Batch, sequence: usize) -> Result<Tensor> {
    let rows = batch.rows(sequence);
    Ok(xs.narrow(0, rows.start, rows.len())?)
}

/// Runs `xs`, `(tokens, hidden)`, through all layers and the cache, `chunk` tokens at a time.
pub(crate) fn through(
    model: &Transformer,
    cache: &mut KvCache,
    xs: &Tensor,
    chunk: usize,
) -> Result<Tensor> {
    let chunks = steps(0..xs.dim(0)?, chunk).into_iter().map(|step| {
        let chunk = xs.narrow(0, step.start, step.len())?;
        Ok(model.forward(&chunk, model.all_layers(), Pass::Cached(cache))?)
    });
    Ok(Tensor::cat(&chunks.collect::<Result<Vec<_>>>()?, 0)?)
}

/// Positions, `chunk` at a time.
pub(crate) fn steps(positions: Range<usize>, chunk: usize) -> Vec<Range<usize>> {
    let step = |start: usize| start..positions.end.min(start + chunk);
    positions.clone().step_by(chunk).map(step).collect()
}

/// Runs the sequences of `batch` through all layers and a cache each, side by side: in one pass those
/// tokens of each that stand at the positions of a step. Where a sequence has come to its end, it goes on
/// with no tokens. Gives what comes out in the order of `xs`, `(tokens, hidden)`.
pub(crate) fn side_by_side(
    model: &Transformer,
    caches: &mut [KvCache],
    (xs, batch): (&Tensor, &Batch),
    steps: &[Range<usize>],
) -> Result<Tensor> {
    let (mut order, mut pieces) = (Vec::new(), Vec::new());
    for step in steps {
        let at = |of: &Range<usize>, position: usize| of.end.min(of.start + position);
        let rows: Vec<Range<usize>> =
            batch.all_rows().map(|of| at(&of, step.start)..at(&of, step.end)).collect();
        let lengths: Vec<usize> = rows.iter().map(ExactSizeIterator::len).collect();
        let rows: Vec<u32> = rows.into_iter().flatten().map(|row| row as u32).collect();
        let xs = xs.index_select(&Tensor::new(rows.as_slice(), xs.device())?, 0)?;
        let (piece, caches) = (Batch::ragged(&lengths)?, caches.iter_mut().collect());
        let pass = Pass::Remembered { batch: &piece, sight: Sight::Causal, caches };
        pieces.push(model.forward(&xs, model.all_layers(), pass)?);
        order.extend(rows);
    }
    let mut place = vec![0u32; order.len()];
    for (from, row) in (0..).zip(order) {
        place[row as usize] = from;
    }
    Ok(Tensor::cat(&pieces, 0)?.index_select(&Tensor::new(place, xs.device())?, 0)?)
}

/// A property that may fail with any error, as proptest wants it.
pub(crate) fn holds(property: Result) -> std::result::Result<(), TestCaseError> {
    property.map_err(|error| TestCaseError::fail(error.to_string()))
}
