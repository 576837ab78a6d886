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

use std::ops::Range;

use candle_core::{CpuStorage, Layout, Result, Storage, Tensor};
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use super::dot::dot;
use super::element::Element;
use super::exp::exp;
use super::softmax::softmax;
use super::tiles::Group;
use super::values;
use crate::model::Mask;

/// Keys that are scored at a time: with their values and the scores of a tile, they stay in the
/// first-level cache for each of the tiles that look at them. A multiple of every group.
const KEYS: usize = 48;

/// Rows that look at the same keys while these are in the cache, about.
const ROWS: usize = 128;

/// `softmax(q kᵀ · scale + mask) v` on the CPU, without a gradient.
///
/// `q` is `(batch, heads, queries, head_dim)` in `f32`; `k` and `v` are
/// `(batch, kv_heads, keys, head_dim)` in `f32`, `bf16` or `f16`. The result is
/// `(batch, queries, heads · head_dim)` in `f32`. The caller has seen to it that shapes and mask fit
/// each other. The plain twin is [`Attend`](super::Attend), and below it candle's operations.
pub(crate) fn attend(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    mask: &Mask,
    scale: f32,
) -> Result<Tensor> {
    let (batch, heads, queries, head_dim) = q.dims4()?;
    let kv_heads = k.dim(1)?;
    let q = q.contiguous()?;
    let (k, v) = (with_whole_rows(k)?, with_whole_rows(v)?);
    let held = values(&q);
    let sizes = Sizes { batch, heads, kv_heads, group: heads / kv_heads, queries, head_dim };
    let (k_storage, k_layout) = k.storage_and_layout();
    let (v_storage, v_layout) = v.storage_and_layout();
    let (Storage::Cpu(k), Storage::Cpu(v)) = (&*k_storage, &*v_storage) else {
        candle_core::bail!("attend: expected keys and values on the CPU");
    };
    let q = held.get()?;
    let ys = match (k, v) {
        (CpuStorage::F32(k), CpuStorage::F32(v)) => {
            let (k, v) = (Rows::new(k, k_layout), Rows::new(v, v_layout));
            Job { sizes, q, k, v, mask, scale }.run()
        }
        (CpuStorage::BF16(k), CpuStorage::BF16(v)) => {
            let (k, v) = (Rows::new(k, k_layout), Rows::new(v, v_layout));
            Job { sizes, q, k, v, mask, scale }.run()
        }
        (CpuStorage::F16(k), CpuStorage::F16(v)) => {
            let (k, v) = (Rows::new(k, k_layout), Rows::new(v, v_layout));
            Job { sizes, q, k, v, mask, scale }.run()
        }
        _ => candle_core::bail!("attend: expected keys and values of one type of weight"),
    };
    Tensor::from_vec(ys, (batch, queries, heads * head_dim), &candle_core::Device::Cpu)
}

/// Itself, if the keys of a head lie one behind the other, as those in a cache do.
fn with_whole_rows(tensor: &Tensor) -> Result<Tensor> {
    match (tensor.stride(), tensor.dim(3)?) {
        ([.., row, 1], head_dim) if *row == head_dim => Ok(tensor.clone()),
        _ => tensor.contiguous(),
    }
}

#[derive(Clone, Copy)]
struct Sizes {
    batch: usize,
    heads: usize,
    kv_heads: usize,
    /// Query heads to a key head.
    group: usize,
    queries: usize,
    head_dim: usize,
}

/// Keys or values: `(batch, kv_heads, keys, head_dim)`.
#[derive(Clone, Copy)]
struct Rows<'a, T> {
    values: &'a [T],
    start: usize,
    /// From one row of the batch, and from one head, to the next.
    steps: [usize; 2],
}

impl<'a, T> Rows<'a, T> {
    fn new(values: &'a [T], layout: &Layout) -> Self {
        let steps = match layout.stride() {
            [batch, head, ..] => [*batch, *head],
            _ => [0, 0],
        };
        Self { values, start: layout.start_offset(), steps }
    }

    /// Some keys of one head, `(keys, head_dim)`.
    fn of(&self, row: usize, head: usize, keys: &Range<usize>, head_dim: usize) -> &'a [T] {
        let start = self.start + row * self.steps[0] + head * self.steps[1];
        &self.values[start + keys.start * head_dim..start + keys.end * head_dim]
    }
}

/// All that is to be attended to.
#[derive(Clone, Copy)]
struct Job<'a, T> {
    sizes: Sizes,
    q: &'a [f32],
    k: Rows<'a, T>,
    v: Rows<'a, T>,
    mask: &'a Mask,
    scale: f32,
}

impl<T: Element> Job<'_, T> {
    fn run(self) -> Vec<f32> {
        let Sizes { batch, heads, kv_heads, group, queries, head_dim } = self.sizes;
        let mut ys = vec![0f32; batch * queries * heads * head_dim];
        if ys.is_empty() {
            return ys;
        }
        let arch = Arch::new();
        // Of a single query, key heads go to the threads; of more, blocks of queries.
        if queries == 1 {
            let heads = ys.par_chunks_mut(group * head_dim).enumerate();
            heads.for_each_init(Room::default, |room, (index, ys)| {
                let (row, head) = (index / kv_heads, index % kv_heads);
                arch.dispatch(One { job: self, row, head, ys, room });
            });
            return ys;
        }
        let of_query = heads * head_dim;
        let most = queries.div_ceil(2 * rayon::current_num_threads());
        let block = (ROWS / group).clamp(1, most);
        ys.par_chunks_mut(queries * of_query).enumerate().for_each(|(row, ys)| {
            let blocks = ys.par_chunks_mut(block * of_query).enumerate();
            blocks.for_each_init(Room::default, |room, (index, ys)| {
                let queries = index * block..queries.min((index + 1) * block);
                arch.dispatch(Block { job: self, row, queries, ys, room });
            });
        });
        ys
    }
}

/// What a thread needs again and again.
#[derive(Default)]
struct Room {
    /// Tiles of queries, `(head_dim, rows)` each, already scaled.
    q: Vec<f32>,
    /// Tiles of results, not yet divided by the sum.
    o: Vec<f32>,
    /// For each row: the largest score so far, and the sum of what all are then.
    largest: Vec<f32>,
    sum: Vec<f32>,
    /// The keys that each row sees: from the first to before the second.
    from: Vec<u32>,
    to: Vec<u32>,
    /// `(KEYS, rows)` of one tile, or all of one query.
    scores: Vec<f32>,
    /// Room for keys and values in `f32`, where they are narrower.
    wide: [Vec<f32>; 2],
}

/// The one query of a row of the batch, against the keys of a head: what a token costs that is decoded.
/// Few rows would leave most of a tile empty, so vectors run along the channels here.
struct One<'a, T> {
    job: Job<'a, T>,
    row: usize,
    head: usize,
    /// `(group, head_dim)`
    ys: &'a mut [f32],
    room: &'a mut Room,
}

impl<T: Element> WithSimd for One<'_, T> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        let Job { q, k, v, mask, scale, .. } = self.job;
        let Sizes { heads, group, head_dim, .. } = self.job.sizes;
        let Room { scores, wide: [wide, _], .. } = self.room;
        wide.resize(head_dim, 0.0);
        let keys = mask.sees(self.row, 0);
        let k = k.of(self.row, self.head, &keys, head_dim);
        let v = v.of(self.row, self.head, &keys, head_dim);
        let q = &q[(self.row * heads + self.head * group) * head_dim..][..group * head_dim];
        scores.resize(group * keys.len(), 0.0); // (group, keys)
        for (key, k) in k.chunks_exact(head_dim).enumerate() {
            let k = T::widen(simd, k, wide);
            for (q, scores) in q.chunks_exact(head_dim).zip(scores.chunks_exact_mut(keys.len())) {
                scores[key] = scale * dot(simd, q, k);
            }
        }
        scores.chunks_exact_mut(keys.len().max(1)).for_each(softmax);
        for (key, v) in v.chunks_exact(head_dim).enumerate() {
            let v = T::widen(simd, v, wide);
            let shares = scores.chunks_exact(keys.len());
            for (y, shares) in self.ys.chunks_exact_mut(head_dim).zip(shares) {
                y.iter_mut().zip(v).for_each(|(y, v)| *y += shares[key] * v);
            }
        }
    }
}

/// Some queries of one row of the batch, against the keys of all heads.
struct Block<'a, T> {
    job: Job<'a, T>,
    row: usize,
    queries: Range<usize>,
    /// `(queries, heads · head_dim)`
    ys: &'a mut [f32],
    room: &'a mut Room,
}

impl<T: Element> WithSimd for Block<'_, T> {
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

impl<T: Element> Block<'_, T> {
    /// The `index`th row of the block: its query, and its head among those of the key head.
    fn row(&self, index: usize) -> (usize, usize) {
        let group = self.job.sizes.group;
        (self.queries.start + index / group, index % group)
    }

    #[inline(always)]
    fn attend<S: Simd, const N: usize>(mut self, simd: S)
    where
        for<'b> [&'b [f32]; N]: Group<S>,
    {
        let Job { k, v, mask, .. } = self.job;
        let Sizes { kv_heads, group, head_dim, .. } = self.job.sizes;
        let width = 2 * S::F32_LANES;
        let rows = self.queries.len() * group;
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

        // Rows that fill a tile up see what the last one sees, so that their numbers stay finite.
        from.clear();
        to.clear();
        for index in 0..padded {
            let sees = mask.sees(self.row, self.row(index.min(rows - 1)).0);
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
            for start in (first..last).step_by(KEYS) {
                let keys = start..last.min(start + KEYS);
                let k = T::widen(simd, k.of(self.row, head, &keys, head_dim), wide_k);
                let v = T::widen(simd, v.of(self.row, head, &keys, head_dim), wide_v);
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

    /// Turns the queries of a head's group into tiles.
    #[inline(always)]
    fn pack(&self, head: usize, rows: usize, width: usize, tiles: &mut [f32]) {
        let Sizes { heads, group, queries, head_dim, .. } = self.job.sizes;
        for index in 0..rows {
            let (query, within) = self.row(index);
            let from = ((self.row * heads + head * group + within) * queries + query) * head_dim;
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
            let (query, within) = (index / group, index % group);
            let head = head * group + within;
            let y = &mut self.ys[(query * heads + head) * head_dim..][..head_dim];
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
    for<'b> [&'b [f32]; N]: Group<S>,
{
    let width = 2 * S::F32_LANES;
    let (q, _) = S::as_simd_f32s(q);
    let (q, _) = q.as_chunks::<2>();
    for (k, s) in k.chunks(N * head_dim).zip(s.chunks_mut(N * width)) {
        // Behind the last key, the first is scored again for nothing.
        let key = |n: usize| k.get(n * head_dim..(n + 1) * head_dim).unwrap_or(&k[..head_dim]);
        let products = Group::times(std::array::from_fn::<_, N, _>(key), simd, q);
        for (s, [left, right]) in s.chunks_exact_mut(width).zip(products) {
            let (s, _) = S::as_mut_simd_f32s(s);
            if let [s_left, s_right] = s {
                (*s_left, *s_right) = (left, right);
            }
        }
    }
}

/// Hides from each row the keys that it does not see; `start` is the first one here.
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

/// Turns scores into shares of a sum that is not yet known, `e^(score - largest)`, and says what has
/// to become of what was summed up before.
#[inline(always)]
fn shares(scores: &mut [f32], largest: &mut [f32], sum: &mut [f32], correction: &mut [f32]) {
    let width = largest.len();
    // NaN is passed over, and shows in the sum instead.
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
        // Of a row that has seen nothing yet, nothing is left either way.
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

/// Several channels, which share the loads of `p`. `v` begins at the first of them. Each sum has a
/// name, as those of an array are kept in memory.
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
                    // SAFETY: `key` is below `p.len()` and `$n` below `$count`, so the index is
                    // below `v.len()`, as asserted above. With a check, and so a way out of the
                    // loop, at each value the sums would be kept in memory.
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
