//! Attention that carries a gradient and keeps no scores for it.

use std::ops::Range;
use std::sync::Arc;

use candle_core::{CpuStorage, CustomOp3, Layout, Result, Shape, Tensor};
use pulp::Arch;
use rayon::prelude::*;

use super::super::elementwise::{LANES, softmax_in_place};
use super::super::matrix::{Matrix, product};
use super::super::storage::{f32s, gradient_for, values};
use super::{SequenceSpans, Spans};

/// Scores in memory at a time, for each thread: 256 KiB, which stay in its cache.
const SCORES_AT_ONCE: usize = 1 << 16;

/// The most queries that are scored at a time: half of a causal block's square is computed for nothing.
const QUERIES_AT_ONCE: usize = 128;

/// `softmax(q kᵀ · scale + mask) v`, for `q` of `(heads, queries, head_dim)` and `k`, `v` of
/// `(kv_heads, keys, head_dim)`, all packed and contiguous, in `f32`; the result is
/// `(queries, heads · head_dim)`.
///
/// In the backward pass the scores are recomputed block by block instead of being kept: one more product
/// of five, and a long text needs no more memory than a short one (Rabe & Staats 2021). Each head group
/// of each sequence is a task of its own, so neither the number of threads nor what else is in the pass
/// changes how anything rounds.
#[derive(Debug)]
pub(in crate::kernels) struct Attend {
    /// Who sees whom.
    pub(in crate::kernels) spans: Arc<Spans>,
    /// What scores are multiplied by.
    pub(in crate::kernels) scale: f32,
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
        let Sizes { heads, queries, head_dim, .. } = sizes;
        let mut by_head = vec![0f32; q.len()]; // (heads, queries, head_dim)
        let of_queries = self.spans.sequences.iter().map(|it| it.queries.len());
        let tasks = self.head_groups(&sizes).zip(parts(&mut by_head, &sizes, of_queries, heads));
        let tasks: Vec<_> = tasks.collect();
        tasks.into_par_iter().try_for_each(|(group, ys)| self.forward(&group, [q, k, v], ys))?;

        let mut ys = vec![0f32; q.len()];
        ys.par_chunks_mut((heads * head_dim).max(1)).with_min_len(16).enumerate().for_each(
            |(query, ys)| {
                for (head, y) in ys.chunks_exact_mut(head_dim).enumerate() {
                    let from = (head * queries + query) * head_dim;
                    y.copy_from_slice(&by_head[from..from + head_dim]);
                }
            },
        );
        Ok((CpuStorage::F32(ys), (queries, heads * head_dim).into()))
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
        let of_queries = self.spans.sequences.iter().map(|it| it.queries.len());
        let of_keys = || self.spans.sequences.iter().map(|it| it.keys.len());
        let gradients = parts(&mut dq, &sizes, of_queries, sizes.heads).zip(
            parts(&mut dk, &sizes, of_keys(), sizes.kv_heads).zip(parts(
                &mut dv,
                &sizes,
                of_keys(),
                sizes.kv_heads,
            )),
        );
        let tasks: Vec<_> = self.head_groups(&sizes).zip(gradients).collect();
        tasks.into_par_iter().try_for_each(|(group, (dq, (dk, dv)))| {
            self.backward(&group, inputs, grad, [dq, dk, dv])
        })?;
        Ok((gradient_for(q, dq)?, gradient_for(k, dk)?, gradient_for(v, dv)?))
    }
}

/// Cuts `(heads, tokens of all sequences, head_dim)` into the parts that each task writes, in the order
/// of [`Attend::head_groups`]: for each head of its group, the tokens of its sequence.
fn parts<'a>(
    all: &'a mut [f32],
    sizes: &Sizes,
    tokens: impl Iterator<Item = usize> + Clone,
    heads: usize,
) -> impl Iterator<Item = Vec<&'a mut [f32]>> {
    let of_head = all.len() / heads.max(1);
    let (of_group, head_dim) = (heads / sizes.kv_heads, sizes.head_dim);
    let mut parts = Vec::new();
    for of_group in all.chunks_mut((of_group * of_head).max(1)) {
        let mut rest: Vec<_> = of_group.chunks_mut(of_head.max(1)).collect();
        for tokens in tokens.clone() {
            let first = |rest: &mut &'a mut [f32]| rest.split_off_mut(..tokens * head_dim);
            parts.push(rest.iter_mut().map(|rest| first(rest).unwrap_or_default()).collect());
        }
    }
    parts.into_iter()
}

/// The query heads of one key head, in one sequence.
struct HeadGroup<'a> {
    sizes: &'a Sizes,
    kv_head: usize,
    spans: &'a SequenceSpans,
}

impl Attend {
    /// All sequences of the first head group, then those of the next.
    fn head_groups<'a>(&'a self, sizes: &'a Sizes) -> impl Iterator<Item = HeadGroup<'a>> {
        let sequences = move |kv_head| {
            self.spans.sequences.iter().map(move |spans| HeadGroup { sizes, kv_head, spans })
        };
        (0..sizes.kv_heads).flat_map(sequences)
    }

    /// `ys` is `(queries, head_dim)` for each head of the group.
    fn forward(
        &self,
        group: &HeadGroup<'_>,
        [q, k, v]: [&[f32]; 3],
        mut ys: Vec<&mut [f32]>,
    ) -> Result<()> {
        let (head_dim, arch) = (group.sizes.head_dim, Arch::new());
        let mut scores = Vec::new();
        for block in group.blocks() {
            let seen = group.seen_by(&block);
            let (keys, values) = (group.keys(k, &seen)?, group.keys(v, &seen)?);
            for (head, ys) in ys.iter_mut().enumerate() {
                let queries = group.queries(q, head, &block)?;
                scores.resize(block.len() * seen.len(), 0.0);
                product(&mut scores, false, self.scale, queries, keys.t())?;
                group.softmax(arch, &block, &seen, &mut scores);
                let shares = Matrix::rows(&scores, 0, (block.len(), seen.len()), seen.len())?;
                let ys = &mut ys[block.start * head_dim..block.end * head_dim];
                product(ys, false, 1.0, shares, values)?;
            }
        }
        Ok(())
    }

    /// With shares `p = softmax(s)` and `dp = grad vᵀ`: `dv = pᵀ grad`, `ds = p (dp - Σ p dp)`,
    /// `dq = scale · ds k`, `dk = scale · dsᵀ q`.
    fn backward(
        &self,
        group: &HeadGroup<'_>,
        [q, k, v]: [&[f32]; 3],
        grad: &[f32],
        [mut dq, mut dk, mut dv]: [Vec<&mut [f32]>; 3],
    ) -> Result<()> {
        let ([dk], [dv]) = (dk.as_mut_slice(), dv.as_mut_slice()) else {
            candle_core::bail!("attend: a head group has one key head");
        };
        let (head_dim, arch) = (group.sizes.head_dim, Arch::new());
        let (mut shares, mut slopes) = (Vec::new(), Vec::new());
        for block in group.blocks() {
            let seen = group.seen_by(&block);
            let (keys, values) = (group.keys(k, &seen)?, group.keys(v, &seen)?);
            let square = (block.len(), seen.len());
            let first = group.spans.keys.start;
            let of_seen = (seen.start - first) * head_dim..(seen.end - first) * head_dim;
            for (head, dq) in dq.iter_mut().enumerate() {
                let queries = group.queries(q, head, &block)?;
                shares.resize(square.0 * square.1, 0.0);
                product(&mut shares, false, self.scale, queries, keys.t())?;
                group.softmax(arch, &block, &seen, &mut shares);
                let p = Matrix::rows(&shares, 0, square, square.1)?;

                let grad = group.rows_of_result(grad, head, &block)?;
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
                let dq = &mut dq[block.start * head_dim..block.end * head_dim];
                product(dq, false, self.scale, ds, keys)?;
                product(&mut dk[of_seen.clone()], true, self.scale, ds.t(), queries)?;
            }
        }
        Ok(())
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

/// The shapes of the inputs.
#[derive(Debug)]
struct Sizes {
    heads: usize,
    kv_heads: usize,
    queries: usize,
    keys: usize,
    head_dim: usize,
}

impl Sizes {
    fn new(q: &Shape, k: &Shape, v: &Shape) -> Result<Self> {
        let (heads, queries, head_dim) = q.dims3()?;
        let (kv_heads, keys, _) = k.dims3()?;
        let fit = k.dims() == v.dims() && k.dims() == [kv_heads, keys, head_dim];
        if !fit || kv_heads == 0 || heads % kv_heads != 0 {
            candle_core::bail!("attend: queries {q:?}, keys {k:?} and values {v:?}");
        }
        Ok(Self { heads, kv_heads, queries, keys, head_dim })
    }
}

/// A `block` counts queries from the sequence's first one; `seen` are positions.
impl HeadGroup<'_> {
    /// Blocks of few enough queries for the most keys that one of them sees.
    fn blocks(&self) -> impl Iterator<Item = Range<usize>> {
        let (queries, sees) = (self.spans.sees.len(), &self.spans.sees);
        let most_seen = sees.iter().map(Range::len).max().unwrap_or(0);
        let step = (SCORES_AT_ONCE / most_seen.max(1)).clamp(1, QUERIES_AT_ONCE);
        (0..queries).step_by(step).map(move |start| start..queries.min(start + step))
    }

    /// The keys that some query of the block sees.
    fn seen_by(&self, block: &Range<usize>) -> Range<usize> {
        let spans = self.spans.sees[block.clone()].iter().cloned();
        let union = spans.reduce(|all, it| all.start.min(it.start)..all.end.max(it.end));
        union.unwrap_or(0..0)
    }

    /// `(seen, head_dim)` of the keys or values.
    fn keys<'a>(&self, of: &'a [f32], seen: &Range<usize>) -> Result<Matrix<'a>> {
        let Sizes { keys, head_dim, .. } = *self.sizes;
        let start = (self.kv_head * keys + self.spans.packed(seen).start) * head_dim;
        Matrix::rows(of, start, (seen.len(), head_dim), head_dim)
    }

    /// `(block, head_dim)` of the queries of a head of the group.
    fn queries<'a>(&self, of: &'a [f32], head: usize, block: &Range<usize>) -> Result<Matrix<'a>> {
        let Sizes { queries, head_dim, .. } = *self.sizes;
        let query = self.spans.queries.start + block.start;
        Matrix::rows(
            of,
            (self.head(head) * queries + query) * head_dim,
            (block.len(), head_dim),
            head_dim,
        )
    }

    /// The `(block, head_dim)` of a head in the result of attention, where all heads of a query lie side
    /// by side.
    fn rows_of_result<'a>(
        &self,
        of: &'a [f32],
        head: usize,
        block: &Range<usize>,
    ) -> Result<Matrix<'a>> {
        let Sizes { heads, head_dim, .. } = *self.sizes;
        let (width, query) = (heads * head_dim, self.spans.queries.start + block.start);
        let start = query * width + self.head(head) * head_dim;
        Matrix::rows(of, start, (block.len(), head_dim), width)
    }

    /// The index, among all heads, of a head of the group.
    fn head(&self, within: usize) -> usize {
        self.kv_head * (self.sizes.heads / self.sizes.kv_heads) + within
    }

    /// Turns scores `(block, seen)` into shares.
    fn softmax(&self, arch: Arch, block: &Range<usize>, seen: &Range<usize>, scores: &mut [f32]) {
        if seen.is_empty() {
            return;
        }
        arch.dispatch(|| {
            let rows = scores.chunks_exact_mut(seen.len());
            for (sees, scores) in self.spans.sees[block.clone()].iter().zip(rows) {
                let (from, to) = (sees.start - seen.start, sees.end - seen.start);
                scores[..from].fill(0.0);
                scores[to..].fill(0.0);
                softmax_in_place(&mut scores[from..to]);
            }
        });
    }
}
