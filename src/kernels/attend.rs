//! Attention that carries a gradient and keeps no scores for it.

use std::ops::Range;
use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor};
use pulp::Arch;
use rayon::prelude::*;

use super::product::{Matrix, product};
use super::softmax::softmax;
use super::{LANES, f32s, gradient_for, values};
use crate::model::Mask;

/// Scores that stand in memory at a time, for each thread: 256 KiB, which stay in its cache.
const SCORES_AT_ONCE: usize = 1 << 16;

/// Queries that are scored at a time, at most: a causal block computes half of its square for
/// nothing.
const QUERIES_AT_ONCE: usize = 128;

/// `softmax(q kᵀ · scale + mask) v`, for `q` of `(batch, heads, queries, head_dim)` and `k`, `v` of
/// `(batch, kv_heads, keys, head_dim)`, all contiguous, in `f32`; the result is
/// `(batch, queries, heads · head_dim)`.
///
/// Going back, the scores are computed anew, block by block, instead of being kept: one more
/// product of five, and a long text needs no more memory than a short one (Rabe & Staats 2021).
/// The plain twin adds [`Mask::bias`] and calls candle's softmax.
#[derive(Debug)]
pub(crate) struct Attend {
    /// Who sees whom.
    pub(crate) mask: Arc<Mask>,
    /// By which scores are multiplied.
    pub(crate) scale: f32,
}

impl CustomOp3 for Attend {
    fn name(&self) -> &'static str {
        "attend"
    }

    fn cpu_fwd(
        &self,
        q: &CpuStorage,
        q_layout: &Layout,
        k: &CpuStorage,
        k_layout: &Layout,
        v: &CpuStorage,
        v_layout: &Layout,
    ) -> Result<(CpuStorage, Shape)> {
        let sizes = Sizes::new(q_layout.shape(), k_layout.shape(), v_layout.shape())?;
        let (q, k, v) = (f32s(q, q_layout)?, f32s(k, k_layout)?, f32s(v, v_layout)?);
        let Sizes { batch, heads, queries, head_dim, .. } = sizes;
        let mut by_head = vec![0f32; q.len()]; // (batch, heads, queries, head_dim)
        by_head
            .par_chunks_mut(sizes.of_group().max(1))
            .enumerate()
            .try_for_each(|(index, ys)| self.forward_group(&sizes, index, [q, k, v], ys))?;

        let mut ys = vec![0f32; q.len()];
        ys.par_chunks_mut((heads * head_dim).max(1)).with_min_len(16).enumerate().for_each(
            |(index, ys)| {
                let (row, query) = (index / queries, index % queries);
                for (head, y) in ys.chunks_exact_mut(head_dim).enumerate() {
                    let from = ((row * heads + head) * queries + query) * head_dim;
                    y.copy_from_slice(&by_head[from..from + head_dim]);
                }
            },
        );
        Ok((CpuStorage::F32(ys), (batch, queries, heads * head_dim).into()))
    }

    fn bwd(
        &self,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
        _: &Tensor,
        grad: &Tensor,
    ) -> Result<(Option<Tensor>, Option<Tensor>, Option<Tensor>)> {
        let sizes = Sizes::new(q.shape(), k.shape(), v.shape())?;
        let grad = grad.contiguous()?;
        let held = [q, k, v, &grad].map(values);
        let [q_values, k_values, v_values, grad] = &held;
        let inputs = [q_values.get()?, k_values.get()?, v_values.get()?];
        let grad = grad.get()?;
        let [mut dq, mut dk, mut dv] = inputs.map(|input| vec![0f32; input.len()]);
        let (of_group, of_keys) = (sizes.of_group().max(1), sizes.of_keys().max(1));
        let gradients = dk.par_chunks_mut(of_keys).zip(dv.par_chunks_mut(of_keys));
        dq.par_chunks_mut(of_group).zip(gradients).enumerate().try_for_each(
            |(index, (dq, (dk, dv)))| {
                self.backward_group(&sizes, index, inputs, grad, [dq, dk, dv])
            },
        )?;
        Ok((gradient_for(q, dq)?, gradient_for(k, dk)?, gradient_for(v, dv)?))
    }
}

impl Attend {
    /// The query heads of one key head of one row of the batch: `(group, queries, head_dim)`.
    fn forward_group(
        &self,
        sizes: &Sizes,
        index: usize,
        [q, k, v]: [&[f32]; 3],
        ys: &mut [f32],
    ) -> Result<()> {
        let (head_dim, arch) = (sizes.head_dim, Arch::new());
        let mut scores = Vec::new();
        for block in sizes.blocks(&self.mask) {
            let seen = self.keys_of(sizes, index, &block);
            let (keys, values) = (sizes.keys(k, index, &seen)?, sizes.keys(v, index, &seen)?);
            for head in 0..sizes.group {
                let queries = sizes.queries(q, index, head, &block)?;
                scores.resize(block.len() * seen.len(), 0.0);
                product(&mut scores, false, self.scale, queries, keys.t())?;
                self.softmax(arch, sizes, index, &block, &seen, &mut scores);
                let shares = Matrix::rows(&scores, 0, (block.len(), seen.len()), seen.len())?;
                let from = (head * sizes.queries + block.start) * head_dim;
                product(&mut ys[from..][..block.len() * head_dim], false, 1.0, shares, values)?;
            }
        }
        Ok(())
    }

    /// With shares `p = softmax(s)` and `dp = grad vᵀ`: `dv = pᵀ grad`, `ds = p (dp - Σ p dp)`,
    /// `dq = scale · ds k`, `dk = scale · dsᵀ q`.
    fn backward_group(
        &self,
        sizes: &Sizes,
        index: usize,
        [q, k, v]: [&[f32]; 3],
        grad: &[f32],
        [dq, dk, dv]: [&mut [f32]; 3],
    ) -> Result<()> {
        let (head_dim, arch) = (sizes.head_dim, Arch::new());
        let (mut shares, mut slopes) = (Vec::new(), Vec::new());
        for block in sizes.blocks(&self.mask) {
            let seen = self.keys_of(sizes, index, &block);
            let (keys, values) = (sizes.keys(k, index, &seen)?, sizes.keys(v, index, &seen)?);
            let square = (block.len(), seen.len());
            let of_seen = seen.start * head_dim..seen.end * head_dim;
            for head in 0..sizes.group {
                let queries = sizes.queries(q, index, head, &block)?;
                shares.resize(square.0 * square.1, 0.0);
                product(&mut shares, false, self.scale, queries, keys.t())?;
                self.softmax(arch, sizes, index, &block, &seen, &mut shares);
                let p = Matrix::rows(&shares, 0, square, square.1)?;

                let grad = sizes.rows_of_result(grad, index, head, &block)?;
                product(&mut dv[of_seen.clone()], true, 1.0, p.t(), grad)?;
                slopes.resize(square.0 * square.1, 0.0);
                product(&mut slopes, false, 1.0, grad, values.t())?;
                if square.1 > 0 {
                    arch.dispatch(|| {
                        let rows = shares.chunks_exact(square.1);
                        for (slopes, shares) in slopes.chunks_exact_mut(square.1).zip(rows) {
                            softmax_backward(shares, slopes);
                        }
                    });
                }
                let ds = Matrix::rows(&slopes, 0, square, square.1)?;
                let from = (head * sizes.queries + block.start) * head_dim;
                product(&mut dq[from..][..square.0 * head_dim], false, self.scale, ds, keys)?;
                product(&mut dk[of_seen.clone()], true, self.scale, ds.t(), queries)?;
            }
        }
        Ok(())
    }

    /// The keys that some query of the block sees, in the row of the batch that `index` is of.
    fn keys_of(&self, sizes: &Sizes, index: usize, block: &Range<usize>) -> Range<usize> {
        let spans = block.clone().map(|query| self.mask.sees(index / sizes.kv_heads, query));
        let union = spans.reduce(|all, span| all.start.min(span.start)..all.end.max(span.end));
        union.unwrap_or(0..0)
    }

    /// Turns scores `(block, seen)` into shares.
    fn softmax(
        &self,
        arch: Arch,
        sizes: &Sizes,
        index: usize,
        block: &Range<usize>,
        seen: &Range<usize>,
        scores: &mut [f32],
    ) {
        if seen.is_empty() {
            return;
        }
        arch.dispatch(|| {
            for (query, scores) in block.clone().zip(scores.chunks_exact_mut(seen.len())) {
                let sees = self.mask.sees(index / sizes.kv_heads, query);
                let (from, to) = (sees.start - seen.start, sees.end - seen.start);
                scores[..from].fill(0.0);
                scores[to..].fill(0.0);
                softmax(&mut scores[from..to]);
            }
        });
    }
}

/// `slopes = shares · (slopes - Σ shares · slopes)`
#[inline(always)]
fn softmax_backward(shares: &[f32], slopes: &mut [f32]) {
    let mut sums = [0f32; LANES];
    let ((p, p_rest), (dp, dp_rest)) = (shares.as_chunks::<LANES>(), slopes.as_chunks::<LANES>());
    for (p, dp) in p.iter().zip(dp) {
        for ((sum, p), dp) in sums.iter_mut().zip(p).zip(dp) {
            *sum += p * dp;
        }
    }
    for ((sum, p), dp) in sums.iter_mut().zip(p_rest).zip(dp_rest) {
        *sum += p * dp;
    }
    let sum: f32 = sums.iter().sum();
    for (slope, share) in slopes.iter_mut().zip(shares) {
        *slope = share * (*slope - sum);
    }
}

/// The shapes of the inputs, and where in them the parts lie that belong together. An `index`
/// counts (batch, kv_head).
#[derive(Debug)]
struct Sizes {
    batch: usize,
    heads: usize,
    kv_heads: usize,
    /// Query heads for each key head.
    group: usize,
    queries: usize,
    keys: usize,
    head_dim: usize,
}

impl Sizes {
    fn new(q: &Shape, k: &Shape, v: &Shape) -> Result<Self> {
        let (batch, heads, queries, head_dim) = q.dims4()?;
        let (_, kv_heads, keys, _) = k.dims4()?;
        let fit = k.dims() == v.dims() && k.dims() == [batch, kv_heads, keys, head_dim];
        if !fit || kv_heads == 0 || heads % kv_heads != 0 {
            candle_core::bail!("attend: queries {q:?}, keys {k:?} and values {v:?}");
        }
        Ok(Self { batch, heads, kv_heads, group: heads / kv_heads, queries, keys, head_dim })
    }

    /// Elements of the queries of one key head.
    fn of_group(&self) -> usize {
        self.group * self.queries * self.head_dim
    }

    /// Elements of the keys of one key head.
    fn of_keys(&self) -> usize {
        self.keys * self.head_dim
    }

    /// Few enough queries at a time for the most keys that one of them sees: of many short rows, one
    /// behind the other, none sees more than its own.
    fn blocks(&self, mask: &Mask) -> impl Iterator<Item = Range<usize>> {
        let queries = self.queries;
        let step = (SCORES_AT_ONCE / mask.most_seen().max(1)).clamp(1, QUERIES_AT_ONCE);
        (0..queries).step_by(step).map(move |start| start..queries.min(start + step))
    }

    /// `(seen, head_dim)` of the keys or values.
    fn keys<'a>(&self, of: &'a [f32], index: usize, seen: &Range<usize>) -> Result<Matrix<'a>> {
        let start = (index * self.keys + seen.start) * self.head_dim;
        Matrix::rows(of, start, (seen.len(), self.head_dim), self.head_dim)
    }

    /// `(block, head_dim)` of the queries.
    fn queries<'a>(
        &self,
        of: &'a [f32],
        index: usize,
        head: usize,
        block: &Range<usize>,
    ) -> Result<Matrix<'a>> {
        let start = ((index * self.group + head) * self.queries + block.start) * self.head_dim;
        Matrix::rows(of, start, (block.len(), self.head_dim), self.head_dim)
    }

    /// `(block, head_dim)` of what attention gives, where all heads of a query lie side by side.
    fn rows_of_result<'a>(
        &self,
        of: &'a [f32],
        index: usize,
        head: usize,
        block: &Range<usize>,
    ) -> Result<Matrix<'a>> {
        let (row, kv_head) = (index / self.kv_heads, index % self.kv_heads);
        let width = self.heads * self.head_dim;
        let start = (row * self.queries + block.start) * width
            + (kv_head * self.group + head) * self.head_dim;
        Matrix::rows(of, start, (block.len(), self.head_dim), width)
    }
}
