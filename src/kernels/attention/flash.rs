//! Attention that never has more than a few scores in memory: tile by tile, with a softmax that is
//! corrected as larger scores turn up (Milakov & Gimelshein 2018; Dao et al. 2022).
//!
//! ```text
//! a row    is a query of one head; the query heads of a key head are rows side by side, and so share
//!          the keys and values that are read
//! a tile   is two vectors of rows:     q' (head_dim, rows)   o' (head_dim, rows)
//! keys     go by, KEYS at a time:      s' (KEYS, rows)  = k q'
//!                                      p' = exp(s' - largest so far)
//!                                      o' = o' · correction + vᵀ p'
//! ```
//!
//! Scores lie with their rows side by side, so that the largest one, the sum and the mask of a row are
//! found by whole vectors.
//!
//! Each group of KEYS keys begins at a position that is a multiple of KEYS, wherever the queries begin
//! and wherever the keys are stored; a key that a row does not see adds exactly 0 to it. So how queries
//! are cut into blocks and tiles, which depends on the number of threads, does not change a bit:
//!
//! ```text
//! a row sees positions 50..130:   50..96   96..130             of keys 48..96, 96..144
//! beside one that sees 10..131:   10..48   48..96   96..131    the first all hidden from it, the others in part
//! ```

use std::ops::Range;

use candle_core::{DType, Device, Layout, Result, Storage, Tensor, WithDType};
use half::{bf16, f16};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::super::dense::{Element, MicroKernel, prefetch_ahead, prefetch_start};
use super::super::elementwise::{exp, softmax_in_place};
use super::super::storage::{elements, values};
use super::{HeldBlocks, KV_BLOCK, KeyValues, SequenceSpans, Spans};

/// Keys scored at a time: with their values and the scores of a tile, they stay in the first-level cache
/// for every tile that reads them. A multiple of every micro-panel.
pub(super) const KEYS: usize = 48;

/// About how many rows read the same keys while these are in the cache.
const ROWS: usize = 128;

/// `softmax(q kᵀ · scale + mask) v` on the CPU, without a gradient.
///
/// `q` is `(heads, queries, head_dim)` in `f32`; keys and values are in `f32`, `bf16` or `f16`. The
/// result is `(queries, heads · head_dim)` in `f32`. The caller has checked that shapes and spans fit
/// each other. The plain twin is [`Attend`](super::Attend), and below it candle's operations.
pub(in crate::kernels) fn attend(
    q: &Tensor,
    held: &KeyValues<'_>,
    spans: &Spans,
    scale: f32,
) -> Result<Tensor> {
    match held.tensors().next().map(Tensor::dtype) {
        Some(DType::BF16) => attend_to::<bf16>(q, held, spans, scale),
        Some(DType::F16) => attend_to::<f16>(q, held, spans, scale),
        _ => attend_to::<f32>(q, held, spans, scale),
    }
}

fn attend_to<T: Element + WithDType>(
    q: &Tensor,
    held: &KeyValues<'_>,
    spans: &Spans,
    scale: f32,
) -> Result<Tensor> {
    let (heads, queries, head_dim) = q.dims3()?;
    let q = q.contiguous()?;
    let q_values = values(&q);
    let q = q_values.get()?;
    let job = |kv_heads: usize, keys: &[Keys<'_, T>]| {
        let sizes = Sizes { heads, kv_heads, group: heads / kv_heads, queries, head_dim };
        Job { sizes, q, spans, keys, scale }.run()
    };
    let ys = match *held {
        KeyValues::Packed { keys, values } => {
            let (keys, values) = (with_whole_rows(keys)?, with_whole_rows(values)?);
            let (k_storage, k_layout) = keys.storage_and_layout();
            let (v_storage, v_layout) = values.storage_and_layout();
            let (k, v) = (slice::<T>(&k_storage)?, slice::<T>(&v_storage)?);
            let of = |spans: &SequenceSpans| Keys::Packed {
                keys: Packed::new(k, k_layout, spans, head_dim),
                values: Packed::new(v, v_layout, spans, head_dim),
            };
            job(keys.dim(0)?, &spans.sequences.iter().map(of).collect::<Vec<_>>())
        }
        KeyValues::Blocks(held) => {
            let Some(block) = held.iter().find_map(|held| held.blocks.first()) else {
                return Tensor::zeros((queries, heads * head_dim), DType::F32, &Device::Cpu);
            };
            let kv_heads = block.dim(1)?;
            let guards = held.iter().map(|held| held.blocks.iter().map(Tensor::storage_and_layout));
            let guards: Vec<Vec<_>> = guards.map(Iterator::collect).collect();
            let slices = guards.iter().map(|blocks| {
                blocks
                    .iter()
                    .map(|(storage, layout)| elements(slice::<T>(storage)?, layout))
                    .collect()
            });
            let slices = slices.collect::<Result<Vec<Vec<_>>>>()?;
            let of = |(held, blocks)| Keys::in_blocks(held, blocks, head_dim);
            job(kv_heads, &held.iter().zip(&slices).map(of).collect::<Vec<_>>())
        }
    };
    Tensor::from_vec(ys, (queries, heads * head_dim), &Device::Cpu)
}

/// A storage as a slice.
fn slice<T: WithDType>(storage: &Storage) -> Result<&[T]> {
    match storage {
        Storage::Cpu(storage) => storage.as_slice(),
        _ => candle_core::bail!("attend: expected keys and values on the CPU"),
    }
}

/// The tensor itself if the keys of a head are contiguous, as those in a cache are; else a copy.
fn with_whole_rows(tensor: &Tensor) -> Result<Tensor> {
    match (tensor.stride(), tensor.dim(2)?) {
        ([_, row, 1], head_dim) if *row == head_dim => Ok(tensor.clone()),
        _ => tensor.contiguous(),
    }
}

#[derive(Clone, Copy)]
struct Sizes {
    heads: usize,
    kv_heads: usize,
    /// Query heads to a key head.
    group: usize,
    queries: usize,
    head_dim: usize,
}

/// The keys and values of one sequence, wherever they lie.
#[derive(Clone, Copy)]
enum Keys<'a, T> {
    Packed {
        keys: Packed<'a, T>,
        values: Packed<'a, T>,
    },
    /// Each block is `(2, kv_heads, KV_BLOCK, head_dim)`; slot 0 of the first has position `first`.
    Blocks {
        first: usize,
        blocks: &'a [&'a [T]],
        head_dim: usize,
    },
}

/// Keys or values, `(kv_heads, keys, head_dim)`, some of which are the sequence's.
#[derive(Clone, Copy)]
struct Packed<'a, T> {
    elements: &'a [T],
    /// The offset of the sequence's first position, and that position.
    start: usize,
    first: usize,
    /// The stride from one head to the next.
    of_head: usize,
    head_dim: usize,
}

impl<'a, T> Packed<'a, T> {
    fn new(elements: &'a [T], layout: &Layout, spans: &SequenceSpans, head_dim: usize) -> Self {
        let start = layout.start_offset() + spans.from * head_dim;
        let of_head = layout.stride().first().copied().unwrap_or_default();
        Self { elements, start, first: spans.keys.start, of_head, head_dim }
    }

    fn of(&self, head: usize, positions: &Range<usize>) -> &'a [T] {
        let start = self.start + head * self.of_head;
        let at = |position: usize| start + (position - self.first) * self.head_dim;
        &self.elements[at(positions.start)..at(positions.end)]
    }
}

impl<'a, T> Keys<'a, T> {
    fn in_blocks(held: &HeldBlocks, blocks: &'a Vec<&'a [T]>, head_dim: usize) -> Self {
        Self::Blocks { first: held.first, blocks, head_dim }
    }

    /// As many of these positions as lie in one piece.
    fn piece(&self, positions: Range<usize>) -> Range<usize> {
        match self {
            Self::Packed { .. } => positions,
            // Positions 90..200 of blocks from 0 on: 90..96, then 96..192, then 192..200.
            Self::Blocks { .. } => {
                let end = (positions.start / KV_BLOCK + 1) * KV_BLOCK;
                positions.start..positions.end.min(end)
            }
        }
    }

    /// Keys and values of a head at positions that are contiguous, `(positions, head_dim)` each.
    #[inline(always)]
    fn of(&self, head: usize, positions: &Range<usize>) -> [&'a [T]; 2] {
        match self {
            Self::Packed { keys, values } => [keys, values].map(|it| it.of(head, positions)),
            Self::Blocks { first, blocks, head_dim } => {
                let (block, slot) =
                    ((positions.start - first) / KV_BLOCK, (positions.start - first) % KV_BLOCK);
                let (keys, values) = blocks[block].split_at(blocks[block].len() / 2);
                let start = (head * KV_BLOCK + slot) * head_dim;
                [keys, values].map(|it| &it[start..start + positions.len() * head_dim])
            }
        }
    }
}

/// Everything there is to attend to.
struct Job<'a, T> {
    sizes: Sizes,
    /// `(heads, queries, head_dim)`
    q: &'a [f32],
    spans: &'a Spans,
    /// Those of each sequence.
    keys: &'a [Keys<'a, T>],
    scale: f32,
}

impl<T: Element> Job<'_, T> {
    fn run(&self) -> Vec<f32> {
        let Sizes { heads, kv_heads, group, queries, head_dim } = self.sizes;
        let mut ys = vec![0f32; queries * heads * head_dim];
        let most = queries.div_ceil(2 * rayon::current_num_threads()).max(1);
        let block = (ROWS / group.max(1)).clamp(1, most);
        let (mut tasks, mut rest) = (Vec::new(), ys.as_mut_slice());
        for (spans, &keys) in self.spans.sequences.iter().zip(self.keys) {
            // A single query is shared out by key heads, several by blocks of queries.
            let alone = self.spans.one_by_one || spans.sees.len() == 1;
            let step = if alone { 1 } else { block };
            for start in (0..spans.sees.len()).step_by(step) {
                let queries = start..spans.sees.len().min(start + step);
                let of_queries = rest.split_off_mut(..queries.len() * heads * head_dim);
                let of_queries = of_queries.unwrap_or_default();
                let task = |head, ys| Task { spans, keys, queries: queries.clone(), head, ys };
                match alone {
                    true => {
                        let heads = of_queries.chunks_exact_mut(group * head_dim).enumerate();
                        tasks.extend(heads.map(|(head, ys)| task(Some(head), ys)));
                    }
                    false => tasks.push(task(None, of_queries)),
                }
            }
        }
        if self.spans.one_by_one {
            tasks.sort_by_key(|task| task.head); // queries of one sequence read the same keys
        }
        let arch = Arch::new();
        tasks.into_par_iter().for_each_init(Room::default, |room, task| match task.head {
            Some(head) => arch.dispatch(OneQuery { job: self, task, head, room }),
            None => arch.dispatch(QueryBlock { job: self, task, room }),
        });
        debug_assert_eq!(kv_heads * group, heads);
        ys
    }
}

/// Some queries of one sequence.
struct Task<'a, T> {
    spans: &'a SequenceSpans,
    keys: Keys<'a, T>,
    /// Counted from the first of the sequence.
    queries: Range<usize>,
    /// The one key head, or all.
    head: Option<usize>,
    /// `(queries, query heads · head_dim)`
    ys: &'a mut [f32],
}

/// Buffers that a thread reuses.
#[derive(Default)]
struct Room {
    /// Tiles of queries, `(head_dim, rows)` each, already scaled.
    q: Vec<f32>,
    /// Tiles of results, not yet divided by the sum.
    o: Vec<f32>,
    /// For each row: the largest score so far, and the sum of `e^(score - largest)`.
    largest: Vec<f32>,
    sum: Vec<f32>,
    /// The positions that each row sees: `from..to`.
    from: Vec<u32>,
    to: Vec<u32>,
    /// `(KEYS, rows)` of one tile, or all of one query.
    scores: Vec<f32>,
    /// Room for keys and values in `f32`, where they are narrower.
    wide: [Vec<f32>; 2],
}

/// One query of a sequence, against the keys of a head: the cost of decoding a token. So few rows
/// would leave most of a tile empty, so vectors run along the channels here.
struct OneQuery<'a, T> {
    job: &'a Job<'a, T>,
    task: Task<'a, T>,
    head: usize,
    room: &'a mut Room,
}

impl<T: Element> WithSimd for OneQuery<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Task { spans, keys, queries: Range { start: query, .. }, ys, .. } = self.task;
        let Sizes { group, queries, head_dim, .. } = self.job.sizes;
        let Room { scores, wide: [wide, q], .. } = self.room;
        if T::NARROW {
            wide.resize(AT_ONCE * head_dim, 0.0);
        }
        q.clear(); // (group, head_dim)
        for head in self.head * group..(self.head + 1) * group {
            let from = (head * queries + spans.queries.start + query) * head_dim;
            q.extend_from_slice(&self.job.q[from..from + head_dim]);
        }
        let Some(seen) = spans.sees.get(query) else { return };
        scores.resize(group * seen.len(), 0.0); // (group, seen)
        let mut rest = seen.clone();
        while !rest.is_empty() {
            let piece = keys.piece(rest.clone());
            let [k, v] = keys.of(self.head, &piece);
            // The next read continues elsewhere in memory.
            let next = keys.piece(piece.end..seen.end);
            prefetch_start(if next.is_empty() { v } else { keys.of(self.head, &next)[0] });
            let starts = (piece.start - seen.start..).step_by(AT_ONCE);
            for (start, k) in starts.zip(k.chunks(AT_ONCE * head_dim)) {
                prefetch_ahead(k);
                let k = T::widen(simd, k, wide);
                for (q, scores) in q.chunks_exact(head_dim).zip(scores.chunks_exact_mut(seen.len()))
                {
                    score_one(simd, q, k, self.job.scale, &mut scores[start..]);
                }
            }
            rest.start = piece.end;
        }
        scores.chunks_exact_mut(seen.len().max(1)).for_each(softmax_in_place);
        let mut rest = seen.clone();
        while !rest.is_empty() {
            let piece = keys.piece(rest.clone());
            let [_, v] = keys.of(self.head, &piece);
            let next = keys.piece(piece.end..seen.end);
            if !next.is_empty() {
                prefetch_start(keys.of(self.head, &next)[1]);
            }
            let starts = (piece.start - seen.start..).step_by(AT_ONCE);
            for (start, v) in starts.zip(v.chunks(AT_ONCE * head_dim)) {
                prefetch_ahead(v);
                let v = T::widen(simd, v, wide);
                let shares = scores.chunks_exact(seen.len());
                for (y, shares) in ys.chunks_exact_mut(head_dim).zip(shares) {
                    weigh_one(simd, &shares[start..], v, y);
                }
            }
            rest.start = piece.end;
        }
    }
}

/// Keys scored, and values added up, at a time for one query. Their number changes no bit of the result.
const AT_ONCE: usize = 4;

/// The scores of a query, `(head_dim)`, over up to [`AT_ONCE`] keys. Each sum is a variable of its own:
/// in an array they would be kept in memory.
#[inline(always)]
fn score_one<S: Simd>(simd: S, q: &[f32], k: &[f32], scale: f32, scores: &mut [f32]) {
    let (head_dim, zero) = (q.len(), simd.splat_f32s(0.0));
    let whole = S::as_simd_f32s(q).0;
    let steps = whole.len();
    if k.len() == AT_ONCE * head_dim {
        let (k0, k1) = (vectors::<S>(k, 0, head_dim, steps), vectors::<S>(k, 1, head_dim, steps));
        let (k2, k3) = (vectors::<S>(k, 2, head_dim, steps), vectors::<S>(k, 3, head_dim, steps));
        let (mut s0, mut s1, mut s2, mut s3) = (zero, zero, zero, zero);
        for step in 0..steps {
            let q = whole[step];
            s0 = simd.mul_add_e_f32s(q, k0[step], s0);
            s1 = simd.mul_add_e_f32s(q, k1[step], s1);
            s2 = simd.mul_add_e_f32s(q, k2[step], s2);
            s3 = simd.mul_add_e_f32s(q, k3[step], s3);
        }
        if let Some(scores) = scores.first_chunk_mut::<AT_ONCE>() {
            scores[0] = scale * all_of(simd, s0, q, k, 0);
            scores[1] = scale * all_of(simd, s1, q, k, 1);
            scores[2] = scale * all_of(simd, s2, q, k, 2);
            scores[3] = scale * all_of(simd, s3, q, k, 3);
        }
        return;
    }
    for (at, score) in scores.iter_mut().enumerate().take(k.len() / head_dim) {
        let (mut sum, k_whole) = (zero, vectors::<S>(k, at, head_dim, steps));
        for step in 0..steps {
            sum = simd.mul_add_e_f32s(whole[step], k_whole[step], sum);
        }
        *score = scale * all_of(simd, sum, q, k, at);
    }
}

/// The whole vectors of one of several rows, all cut to the same known length, so that a loop over them
/// has only one exit.
#[inline(always)]
fn vectors<S: Simd>(rows: &[f32], at: usize, head_dim: usize, steps: usize) -> &[S::f32s] {
    &S::as_simd_f32s(&rows[at * head_dim..(at + 1) * head_dim]).0[..steps]
}

/// The sum of all lanes, plus the products of the rest, which fills no vector.
#[inline(always)]
fn all_of<S: Simd>(simd: S, lanes: S::f32s, q: &[f32], k: &[f32], at: usize) -> f32 {
    let rest = q.len() / S::F32_LANES * S::F32_LANES;
    let k = &k[at * q.len()..(at + 1) * q.len()];
    let mut sum = simd.reduce_sum_f32s(lanes);
    for (q, k) in q[rest..].iter().zip(&k[rest..]) {
        sum += q * k;
    }
    sum
}

/// Adds up to [`AT_ONCE`] values, `(head_dim)` each, weighted by their shares, to `y`, one after the
/// other.
#[inline(always)]
fn weigh_one<S: Simd>(simd: S, shares: &[f32], v: &[f32], y: &mut [f32]) {
    let head_dim = y.len();
    let (whole, rest) = S::as_mut_simd_f32s(y);
    let (steps, first) = (whole.len(), head_dim - rest.len());
    for (v, share) in v.chunks_exact(head_dim).zip(shares) {
        for (y, v) in rest.iter_mut().zip(&v[first..]) {
            *y += share * v;
        }
    }
    if let (Some(shares), true) = (shares.first_chunk::<AT_ONCE>(), v.len() == AT_ONCE * head_dim) {
        let (v0, v1) = (vectors::<S>(v, 0, head_dim, steps), vectors::<S>(v, 1, head_dim, steps));
        let (v2, v3) = (vectors::<S>(v, 2, head_dim, steps), vectors::<S>(v, 3, head_dim, steps));
        let (p0, p1) = (simd.splat_f32s(shares[0]), simd.splat_f32s(shares[1]));
        let (p2, p3) = (simd.splat_f32s(shares[2]), simd.splat_f32s(shares[3]));
        for step in 0..steps {
            let y = simd.mul_add_e_f32s(p0, v0[step], whole[step]);
            let y = simd.mul_add_e_f32s(p1, v1[step], y);
            let y = simd.mul_add_e_f32s(p2, v2[step], y);
            whole[step] = simd.mul_add_e_f32s(p3, v3[step], y);
        }
        return;
    }
    for (at, share) in shares.iter().enumerate().take(v.len() / head_dim) {
        let (share, v) = (simd.splat_f32s(*share), vectors::<S>(v, at, head_dim, steps));
        for step in 0..steps {
            whole[step] = simd.mul_add_e_f32s(share, v[step], whole[step]);
        }
    }
}

/// Some queries of one sequence, against the keys of all heads.
struct QueryBlock<'a, T> {
    job: &'a Job<'a, T>,
    task: Task<'a, T>,
    room: &'a mut Room,
}

impl<T: Element> WithSimd for QueryBlock<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        if S::REGISTER_COUNT >= 32 {
            self.attend::<S, 12>(simd);
        } else {
            self.attend::<S, 6>(simd);
        }
    }
}

impl<T: Element> QueryBlock<'_, T> {
    /// The `index`th row of the block: its query, counted from the first of the block, and its head among
    /// those of the head group.
    fn row(&self, index: usize) -> (usize, usize) {
        let group = self.job.sizes.group;
        (index / group, index % group)
    }

    #[inline(always)]
    fn attend<S: Simd, const N: usize>(mut self, simd: S)
    where
        for<'b> [&'b [f32]; N]: MicroKernel<S>,
    {
        let Sizes { kv_heads, group, head_dim, .. } = self.job.sizes;
        let width = 2 * S::F32_LANES;
        let rows = self.task.queries.len() * group;
        let padded = rows.next_multiple_of(width);
        let room = std::mem::take(self.room);
        let Room { mut q, mut o, mut largest, mut sum, mut from, mut to, mut scores, mut wide } =
            room;
        q.resize(padded * head_dim, 0.0);
        o.resize(padded * head_dim, 0.0);
        scores.resize(KEYS * width, 0.0);
        if T::NARROW {
            wide.iter_mut().for_each(|wide| wide.resize(KEYS * head_dim, 0.0));
        }
        let [wide_k, wide_v] = &mut wide;

        // Rows that only fill up a tile see what the last one sees, so that their numbers stay finite.
        from.clear();
        to.clear();
        for index in 0..padded {
            let (query, _) = self.row(index.min(rows - 1));
            let sees = &self.task.spans.sees[self.task.queries.start + query];
            from.push(sees.start as u32);
            to.push(sees.end as u32);
        }
        let first = from.iter().copied().min().unwrap_or_default() as usize;
        let last = to.iter().copied().max().unwrap_or_default() as usize;

        for head in 0..kv_heads {
            self.pack(head, rows, width, &mut q);
            o.fill(0.0);
            largest.clear();
            largest.resize(padded, f32::NEG_INFINITY);
            sum.clear();
            sum.resize(padded, 0.0);
            for start in (first / KEYS * KEYS..last).step_by(KEYS) {
                let keys = start.max(first)..last.min(start + KEYS);
                let [k, v] = self.task.keys.of(head, &keys);
                let (k, v) = (T::widen(simd, k, wide_k), T::widen(simd, v, wide_v));
                let tiles =
                    q.chunks_exact(width * head_dim).zip(o.chunks_exact_mut(width * head_dim));
                for (tile, (q, o)) in tiles.enumerate() {
                    let rows = tile * width..(tile + 1) * width;
                    let (from, to) = (&from[rows.clone()], &to[rows.clone()]);
                    let scores = &mut scores[..keys.len() * width];
                    match seen(&keys, from, to) {
                        Seen::None => continue,
                        Seen::All => score::<S, N>(simd, k, q, head_dim, scores),
                        Seen::Some => {
                            score::<S, N>(simd, k, q, head_dim, scores);
                            hide(keys.start, from, to, scores);
                        }
                    }
                    let (largest, sum) = (&mut largest[rows.clone()], &mut sum[rows]);
                    let mut correction = [0f32; MOST_LANES];
                    let correction = &mut correction[..width];
                    shares(scores, largest, sum, correction);
                    weigh(simd, scores, v, head_dim, correction, o);
                }
            }
            self.unpack(head, rows, width, &o, &sum);
        }
        *self.room = Room { q, o, largest, sum, from, to, scores, wide };
    }

    /// Turns the queries of a head group into tiles.
    #[inline(always)]
    fn pack(&self, head: usize, rows: usize, width: usize, tiles: &mut [f32]) {
        let Sizes { group, queries, head_dim, .. } = self.job.sizes;
        let first = self.task.spans.queries.start + self.task.queries.start;
        for index in 0..rows {
            let (query, within) = self.row(index);
            let from = ((head * group + within) * queries + first + query) * head_dim;
            let tile = &mut tiles[index / width * width * head_dim..][..width * head_dim];
            let q = &self.job.q[from..from + head_dim];
            for (place, q) in tile.iter_mut().skip(index % width).step_by(width).zip(q) {
                *place = q * self.job.scale;
            }
        }
    }

    /// Turns tiles back, each row divided by its sum.
    #[inline(always)]
    fn unpack(&mut self, head: usize, rows: usize, width: usize, tiles: &[f32], sum: &[f32]) {
        let Sizes { heads, group, head_dim, .. } = self.job.sizes;
        for index in 0..rows {
            let (query, within) = self.row(index);
            let head = head * group + within;
            let y = &mut self.task.ys[(query * heads + head) * head_dim..][..head_dim];
            let tile = &tiles[index / width * width * head_dim..][..width * head_dim];
            let scale = 1.0 / sum[index];
            for (y, o) in y.iter_mut().zip(tile.iter().skip(index % width).step_by(width)) {
                *y = o * scale;
            }
        }
    }
}

/// Rows of a tile, at most: two vectors of the widest unit.
const MOST_LANES: usize = 32;

/// How much of some keys the rows of a tile see.
enum Seen {
    None,
    Some,
    All,
}

#[inline(always)]
fn seen(keys: &Range<usize>, from: &[u32], to: &[u32]) -> Seen {
    let (start, end) = (keys.start as u32, keys.end as u32);
    let any = from.iter().zip(to).fold(false, |any, (from, to)| any | (*from < end && start < *to));
    let all =
        from.iter().zip(to).fold(true, |all, (from, to)| all & (*from <= start && end <= *to));
    match (any, all) {
        (_, true) => Seen::All,
        (true, false) => Seen::Some,
        (false, false) => Seen::None,
    }
}

/// `s' = k q'`: `(keys, rows)`, `N` keys at a time.
#[inline(always)]
fn score<S: Simd, const N: usize>(simd: S, k: &[f32], q: &[f32], head_dim: usize, s: &mut [f32])
where
    for<'b> [&'b [f32]; N]: MicroKernel<S>,
{
    let width = 2 * S::F32_LANES;
    let (q, _) = S::as_simd_f32s(q);
    let (q, _) = q.as_chunks::<2>();
    for (k, s) in k.chunks(N * head_dim).zip(s.chunks_mut(N * width)) {
        // Past the last key, the first is scored again, to no effect.
        let key = |n: usize| k.get(n * head_dim..(n + 1) * head_dim).unwrap_or(&k[..head_dim]);
        let products = MicroKernel::times(std::array::from_fn::<_, N, _>(key), simd, q);
        for (s, [left, right]) in s.chunks_exact_mut(width).zip(products) {
            let (s, _) = S::as_mut_simd_f32s(s);
            if let [s_left, s_right] = s {
                (*s_left, *s_right) = (left, right);
            }
        }
    }
}

/// Hides from each row the keys that it does not see; `start` is the position of the first key here.
#[inline(always)]
fn hide(start: usize, from: &[u32], to: &[u32], scores: &mut [f32]) {
    for (key, scores) in scores.chunks_exact_mut(from.len()).enumerate() {
        let key = (start + key) as u32;
        for ((score, from), to) in scores.iter_mut().zip(from).zip(to) {
            let hidden = key < *from || *to <= key;
            *score = if hidden { f32::NEG_INFINITY } else { *score };
        }
    }
}

/// Turns scores into shares before normalisation, `e^(score - largest)`, and sets the `correction` by
/// which what was summed up before must be multiplied.
#[inline(always)]
fn shares(scores: &mut [f32], largest: &mut [f32], sum: &mut [f32], correction: &mut [f32]) {
    let width = largest.len();
    // NaN is skipped here; it shows up in the sum.
    let larger = |a: f32, b: f32| if b > a { b } else { a };
    let mut new = [0f32; MOST_LANES];
    let new = &mut new[..width];
    new.copy_from_slice(largest);
    for scores in scores.chunks_exact(width) {
        for (largest, score) in new.iter_mut().zip(scores) {
            *largest = larger(*largest, *score);
        }
    }
    for ((new, largest), correction) in new.iter_mut().zip(largest).zip(correction.iter_mut()) {
        let old = *largest;
        *largest = *new;
        // The sums of a row that has seen nothing yet are 0, and stay 0 under any correction.
        *new = if *new == f32::NEG_INFINITY { 0.0 } else { *new };
        *correction = exp(old - *new);
    }
    for (sum, correction) in sum.iter_mut().zip(correction) {
        *sum *= *correction;
    }
    for scores in scores.chunks_exact_mut(width) {
        for ((score, largest), sum) in scores.iter_mut().zip(new.iter()).zip(sum.iter_mut()) {
            *score = exp(*score - largest);
            *sum += *score;
        }
    }
}

/// `o' = o' · correction + vᵀ p'`
#[inline(always)]
fn weigh<S: Simd>(
    simd: S,
    p: &[f32],
    v: &[f32],
    head_dim: usize,
    correction: &[f32],
    o: &mut [f32],
) {
    let (p, _) = S::as_simd_f32s(p);
    let (p, _) = p.as_chunks::<2>();
    let ([left, right], _) = S::as_simd_f32s(correction) else { return };
    let correction = [*left, *right];
    let (o, _) = S::as_mut_simd_f32s(o);
    let (o, _) = o.as_chunks_mut::<2>(); // one for each channel
    let mut channel = 0;
    let mut rest = o;
    if S::REGISTER_COUNT >= 32 {
        let (eights, last) = rest.as_chunks_mut::<8>();
        for o in eights {
            eight(simd, p, &v[channel..], head_dim, correction, o);
            channel += 8;
        }
        rest = last;
    }
    let (fours, last) = rest.as_chunks_mut::<4>();
    for o in fours {
        four(simd, p, &v[channel..], head_dim, correction, o);
        channel += 4;
    }
    for o in last.as_chunks_mut::<1>().0 {
        one(simd, p, &v[channel..], head_dim, correction, o);
        channel += 1;
    }
}

/// Several channels, which share the loads of `p`. `v` begins at the first of them. Each sum is a
/// variable of its own: in an array they would be kept in memory.
macro_rules! channels {
    ($name:ident, $count:literal: $($n:literal $left:ident $right:ident),*) => {
        #[inline(always)]
        fn $name<S: Simd>(
            simd: S,
            p: &[[S::f32s; 2]],
            v: &[f32],
            head_dim: usize,
            correction: [S::f32s; 2],
            o: &mut [[S::f32s; 2]; $count],
        ) {
            let last = p.len().saturating_sub(1) * head_dim;
            assert!(v.len() >= last && v.len() - last >= $count, "a value for each share");
            let [$([mut $left, mut $right]),*] = *o;
            $(
                $left = simd.mul_f32s($left, correction[0]);
                $right = simd.mul_f32s($right, correction[1]);
            )*
            for (key, &[p_left, p_right]) in p.iter().enumerate() {
                $(
                    // SAFETY: `key` is below `p.len()` and `$n` below `$count`, so the index is below
                    // `v.len()`, as asserted above. A check at each value would be another exit from the
                    // loop, and the sums would be kept in memory.
                    let value = unsafe { *v.get_unchecked(key * head_dim + $n) };
                    let value = simd.splat_f32s(value);
                    $left = simd.mul_add_e_f32s(value, p_left, $left);
                    $right = simd.mul_add_e_f32s(value, p_right, $right);
                )*
            }
            *o = [$([$left, $right]),*];
        }
    };
}

channels!(one, 1: 0 l0 r0);
channels!(four, 4: 0 l0 r0, 1 l1 r1, 2 l2 r2, 3 l3 r3);
channels!(eight, 8: 0 l0 r0, 1 l1 r1, 2 l2 r2, 3 l3 r3, 4 l4 r4, 5 l5 r5, 6 l6 r6, 7 l7 r7);
