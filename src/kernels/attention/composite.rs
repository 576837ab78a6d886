//! Attention in candle's operations, which runs on any device and carries a gradient: scores, shares,
//! and the weighted sum. Whatever looks into a pass reads the same scores.

use std::ops::Range;

use candle_core::{DType, Device, Tensor};

use super::super::door::softmax;
use super::Spans;
use crate::error::{Error, Result};

/// About how many scores are in memory at a time: 256 MiB of `f32`, enough to keep a device busy.
const SCORES_AT_ONCE: usize = 1 << 26;

/// The scores of some queries of a sequence, counted from its first one, in one head, over all keys of
/// the sequence: `q kᵀ · scale`, `-inf` where a query does not see a key. `(queries, keys)`
///
/// `q` is `(heads, queries of all sequences, head_dim)`, `keys` `(kv_heads, keys of all, head_dim)`.
pub(crate) fn scores(
    q: &Tensor,
    keys: &Tensor,
    spans: &Spans,
    sequence: usize,
    head: usize,
    queries: Range<usize>,
    scale: f64,
) -> Result<Tensor> {
    let (heads, kv_heads) = (q.dim(0)?, keys.dim(0)?);
    let of = spans.sequence(sequence)?;
    if head >= heads || kv_heads == 0 || queries.end > of.queries.len() || queries.is_empty() {
        let expected = format!("a head of {heads} and queries of {}", of.queries.len());
        return Err(Error::parameter("scores", expected, format!("{head} and {queries:?}")));
    }
    let queries = of.queries.start + queries.start..of.queries.start + queries.end;
    let q = q.narrow(0, head, 1)?;
    let k = keys.narrow(0, head * kv_heads / heads, 1)?.to_dtype(q.dtype())?;
    let rows = Rows { q: &(q * scale)?, k: &k, sees: &spans.packed().collect::<Vec<_>>() };
    Ok(rows.scores(queries, of.packed(&of.keys))?.squeeze(0)?)
}

/// The share of each key in a query's result: softmax over the last dimension.
pub(crate) fn shares(scores: &Tensor) -> Result<Tensor> {
    softmax(scores)
}

/// `softmax(q kᵀ · scale + mask) v` for packed keys and values: `(queries, heads · head_dim)`.
///
/// Queries go block by block, each against the keys that some query of the block sees, so a long prompt
/// never has all its scores in memory.
pub(in crate::kernels) fn attend(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    spans: &Spans,
    scale: f64,
) -> Result<Tensor> {
    by_blocks(q, k, v, spans, scale, SCORES_AT_ONCE)
}

pub(super) fn by_blocks(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    spans: &Spans,
    scale: f64,
    at_once: usize,
) -> Result<Tensor> {
    let (heads, queries, head_dim) = q.dims3()?;
    let kv_heads = k.dim(0)?;
    let (k, v) = (k.to_dtype(q.dtype())?, v.to_dtype(q.dtype())?);
    let sees: Vec<_> = spans.packed().collect();
    let rows = Rows { q: &(q * scale)?, k: &k, sees: &sees };
    let most = at_once / heads.max(1);
    let mut blocks = Vec::with_capacity(spans.sequences.len());
    // No block has queries of two sequences: a mask hides one from the other, but a number that is not
    // finite gets through a mask.
    for of in &spans.sequences {
        let step = (most / of.keys.len().max(1)).max(1);
        let mut start = of.queries.start;
        while start < of.queries.end {
            // Under a window, a query sees fewer keys than the sequence has.
            let mut block = start..of.queries.end.min(start + step);
            while block.end < of.queries.end {
                let twice = start..of.queries.end.min(start + 2 * block.len());
                if twice.len() * rows.seen_by(&twice).len() > most {
                    break;
                }
                block = twice;
            }
            let (count, seen) = (block.len(), rows.seen_by(&block));
            start = block.end;
            let shares = shares(&rows.scores(block, seen.clone())?)?; // (heads, block, seen)
            let shares = shares.reshape((kv_heads, heads / kv_heads * count, seen.len()))?;
            let ys = shares.matmul(&v.narrow(1, seen.start, seen.len())?)?;
            blocks.push(ys.reshape((heads, count, head_dim))?);
        }
    }
    let ys = match blocks.as_slice() {
        [] => q.clone(),
        [only] => only.clone(),
        blocks => Tensor::cat(blocks, 1)?,
    };
    Ok(ys.transpose(0, 1)?.reshape((queries, heads * head_dim))?)
}

/// Queries, already scaled, and keys, all packed, of one type.
struct Rows<'a> {
    /// `(heads, queries, head_dim)`
    q: &'a Tensor,
    /// `(kv_heads, keys, head_dim)`
    k: &'a Tensor,
    /// For each query the packed keys that it sees.
    sees: &'a [Range<usize>],
}

impl Rows<'_> {
    /// `(heads, queries, keys)`: the query heads of a head group share their one key head.
    fn scores(&self, queries: Range<usize>, keys: Range<usize>) -> Result<Tensor> {
        let (heads, _, head_dim) = self.q.dims3()?;
        let kv_heads = self.k.dim(0)?;
        let k = self.k.narrow(1, keys.start, keys.len())?;
        let q = self.q.narrow(1, queries.start, queries.len())?;
        let q = q.reshape((kv_heads, heads / kv_heads * queries.len(), head_dim))?;
        let scores = q.matmul(&k.t()?)?.reshape((heads, queries.len(), keys.len()))?;
        match bias(&self.sees[queries], &keys, scores.dtype(), scores.device())? {
            Some(bias) => Ok(scores.broadcast_add(&bias)?),
            None => Ok(scores),
        }
    }

    /// The keys that any of these queries sees, those between them included.
    fn seen_by(&self, queries: &Range<usize>) -> Range<usize> {
        let spans = self.sees[queries.clone()].iter().cloned();
        let union = spans.reduce(|all, it| all.start.min(it.start)..all.end.max(it.end));
        union.unwrap_or(0..0)
    }
}

/// What is added to the scores of queries over `keys`, `(queries, keys)`: `0` where a query sees a key,
/// `-inf` where it does not; `None` where each of them sees all.
fn bias(
    sees: &[Range<usize>],
    keys: &Range<usize>,
    dtype: DType,
    device: &Device,
) -> Result<Option<Tensor>> {
    if sees.iter().all(|sees| sees.start <= keys.start && keys.end <= sees.end) {
        return Ok(None);
    }
    let mut bias = Vec::with_capacity(sees.len() * keys.len());
    for sees in sees {
        let seen = |key| if sees.contains(&key) { 0f32 } else { f32::NEG_INFINITY };
        bias.extend(keys.clone().map(seen));
    }
    let shape = (sees.len(), keys.len());
    Ok(Some(Tensor::from_vec(bias, shape, device)?.to_dtype(dtype)?))
}
