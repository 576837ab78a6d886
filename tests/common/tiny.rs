//! Random tiny models: the same shape and seed give the same one.

use std::ops::Range;

use candle_core::Tensor;
use hybrid_attention::model::{Batch, KvCache, Pass, Sight, Transformer};
use hybrid_attention::thought::{EncodedBatch, ThoughtModel};
use hybrid_attention::{Config, HybridModel};
pub(crate) use hybrid_attention_testing::tiny::*;
use proptest::prelude::*;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::Result;

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

/// The embeddings of one row of tokens: `(1, seq, hidden)`.
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

/// Batches of texts: how long each is, and so many cuts between which it is context; some without any.
pub(crate) fn batches(
    sequences: Range<usize>,
    longest: usize,
    cuts: Range<usize>,
) -> impl Strategy<Value = Batch> {
    let sequence = (1..=longest).prop_flat_map(move |length| {
        let cuts = prop::collection::vec(0..=length, cuts.clone());
        (Just(length), prop::option::of(cuts))
    });
    prop::collection::vec(sequence, sequences).prop_filter_map("valid segments", |sequences| {
        let lengths: Vec<usize> = sequences.iter().map(|(length, _)| *length).collect();
        let mut batch = Batch::ragged(&lengths).ok()?;
        for (sequence, (_, cuts)) in sequences.into_iter().enumerate() {
            let Some(mut cuts) = cuts else { continue };
            cuts.sort_unstable();
            let segments: Vec<_> = cuts.chunks_exact(2).map(|cut| cut[0]..cut[1]).collect();
            batch = batch.with_context(sequence, &segments).ok()?;
        }
        Some(batch)
    })
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
