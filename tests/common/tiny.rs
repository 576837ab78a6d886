//! Random tiny models: the same shape and seed give the same one.

use std::ops::Range;

use candle_core::Tensor;
use hybrid_attention::model::{Batch, Pass, Transformer};
use hybrid_attention::thought::EncodedBatch;
use hybrid_attention::{Config, HybridModel};
pub(crate) use hybrid_attention_testing::tiny::*;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

use super::Result;

pub(crate) fn transformer(config: &Config, seed: u64) -> Result<Transformer> {
    Ok(Transformer::new(config, &mut weights(config, seed)?)?)
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

/// Random tokens in every slot of `layout`.
pub(crate) fn text(model: &Transformer, layout: &Batch, seed: u64) -> Result<EncodedBatch> {
    let ids = tokens(model.config(), seed, layout.batch() * layout.seq());
    Ok(EncodedBatch::new(model, &ids, layout.clone())?)
}

/// Runs of tokens of a row of this length, apart from each other.
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
