//! Grouped-query attention: project, rotate, remember, attend (Ainslie et al. 2023).

use std::sync::Arc;

use candle_core::{D, Tensor};

use super::View;
#[cfg(feature = "flash-attn")]
use super::flash_attn;
use crate::kernels::{self, Attend};
use super::kv_cache::KeyValues;
use super::linear::{Input, Linear};
use super::mask::Mask;
use super::ops;
use super::weights::Weights;
use crate::config::Config;
use crate::error::{Error, Result};

/// The attention of one block.
#[derive(Clone, Debug)]
pub(super) struct Attention {
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    o_proj: Linear,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
}

impl Attention {
    pub(super) fn new(config: &Config, prefix: &str, weights: &mut impl Weights) -> Result<Self> {
        let (hidden, head_dim) = (config.hidden_size, config.head_dim);
        let (heads, kv_heads) = (config.num_attention_heads, config.num_key_value_heads);
        let mut linear =
            |name: &str, out, input| weights.linear(&format!("{prefix}.{name}.weight"), out, input);
        Ok(Self {
            q_proj: linear("q_proj", heads * head_dim, hidden)?,
            k_proj: linear("k_proj", kv_heads * head_dim, hidden)?,
            v_proj: linear("v_proj", kv_heads * head_dim, hidden)?,
            o_proj: linear("o_proj", hidden, heads * head_dim)?,
            heads,
            kv_heads,
            head_dim,
        })
    }

    pub(super) fn projections(&self) -> [&Linear; 4] {
        [&self.q_proj, &self.k_proj, &self.v_proj, &self.o_proj]
    }

    pub(super) fn projection_mut(&mut self, name: &str) -> Option<&mut Linear> {
        match name {
            "q_proj" => Some(&mut self.q_proj),
            "k_proj" => Some(&mut self.k_proj),
            "v_proj" => Some(&mut self.v_proj),
            "o_proj" => Some(&mut self.o_proj),
            _ => None,
        }
    }

    /// `(batch, seq, hidden) -> (batch, seq, hidden)`. `remember` is given the keys and values of
    /// `xs` and gives those that `xs` attends to: with a cache, they begin before `xs`.
    pub(super) fn forward(
        &self,
        xs: &Tensor,
        view: &View,
        remember: impl FnOnce(KeyValues) -> Result<KeyValues>,
    ) -> Result<Tensor> {
        let (q, new) = self.project(xs, view)?;
        let KeyValues { keys, values, .. } = remember(new)?; // (batch, kv_heads, keys, head_dim)
        self.o_proj.forward(&attend(&q, &keys, &values, &view.mask)?)
    }

    /// Queries, keys and values of `xs`, each `(batch, heads or kv_heads, seq, head_dim)`.
    fn project(&self, xs: &Tensor, view: &View) -> Result<(Tensor, KeyValues)> {
        let input = Input::new(xs, &[&self.q_proj, &self.k_proj, &self.v_proj])?;
        let rotated = |projection: &Linear, heads| {
            view.rotation.split_heads(&projection.times(&input)?, heads)
        };
        // Side by side: while one waits for memory, another multiplies (a sixth of the time of 2048
        // tokens of SmolLM2; nothing for one).
        let (q, (keys, values)) = rayon::join(
            || rotated(&self.q_proj, self.heads),
            || {
                rayon::join(
                    || rotated(&self.k_proj, self.kv_heads),
                    || ops::split_heads(&self.v_proj.times(&input)?, self.kv_heads, None),
                )
            },
        );
        let (q, keys, values) = (q?, keys?, values?);
        let tracked = [&q, &keys, &values].iter().any(|tensor| tensor.track_op());
        Ok((q, KeyValues { keys, values, tracked }))
    }

    /// The share of each token's attention that goes to every other, mean over the heads:
    /// `(batch, seq, hidden) -> (batch, seq, seq)`. One head at a time stands in memory.
    pub(super) fn shares(&self, xs: &Tensor, view: &View) -> Result<Tensor> {
        let (q, KeyValues { keys, .. }) = self.project(xs, view)?;
        let all = (0..view.mask.queries(), 0..view.mask.keys());
        let bias = view.mask.bias(&all.0, &all.1, q.dtype(), q.device())?;
        let scale = 1.0 / (self.head_dim as f64).sqrt();
        let share = |head: usize| -> Result<Tensor> {
            let (q, k) =
                (q.narrow(1, head, 1)?, keys.narrow(1, head * self.kv_heads / self.heads, 1)?);
            let scores = (q.matmul(&k.t()?)? * scale)?; // (batch, 1, seq, seq)
            match &bias {
                Some(bias) => ops::softmax(&scores.broadcast_add(bias)?),
                None => ops::softmax(&scores),
            }
        };
        let sum = (1..self.heads)
            .try_fold(share(0)?, |sum, head| -> Result<Tensor> { Ok((sum + share(head)?)?) })?;
        Ok((sum / self.heads as f64)?.squeeze(1)?)
    }
}

/// Scores that stand in memory at a time, about, where candle's operations compute them: 256 MiB of
/// `f32`, to keep a device busy.
const SCORES_AT_ONCE: usize = 1 << 26;

/// `softmax(q kᵀ / sqrt(head_dim) + mask) v`: the attention of every pass of the crate.
///
/// `q` is `(batch, heads, queries, head_dim)`, `k` and `v` are `(batch, kv_heads, keys, head_dim)`
/// and stay as they are: the `heads / kv_heads` query heads of a group share their one key head. On the
/// CPU, `k` and `v` may be narrower than an `f32` `q` (`bf16`, `f16`) where nothing tracks a gradient.
/// Queries go block by block, each against the keys that some query of the block sees, so a long
/// prompt never has all its scores in memory. Returns the heads side by side:
/// `(batch, queries, heads · head_dim)`. It is differentiable in `q`, `k` and `v`.
///
/// With the feature `flash-attn`, on a CUDA device, candle's flash attention computes it where the
/// three are all `f16` or all `bf16`, nothing tracks a gradient, a head has a multiple of 8 numbers, at
/// most 512, and the mask is the same for all rows and lets each query see all keys, or so many behind
/// and ahead of itself: the whole of a prompt, what came before, a sliding window. It has been compiled
/// against candle's types, and never yet been run on a GPU.
///
/// ```
/// # use std::sync::Arc;
/// # use candle_core::{Device, Tensor};
/// use hybrid_attention::model::{Layout, Mask, Sight, attend};
///
/// let random = |heads| Tensor::randn(0f32, 1.0, (1, heads, 5, 16), &Device::Cpu);
/// let (q, k, v) = (random(8)?, random(2)?, random(2)?);
/// let mask = Arc::new(Mask::new(&Layout::dense(1, 5), Sight::Causal, 0..5, 0, None));
/// assert_eq!(attend(&q, &k, &v, &mask)?.dims(), [1, 5, 8 * 16]);
/// # Ok::<_, hybrid_attention::Error>(())
/// ```
///
/// # Errors
/// [`Error::Parameter`] where the shapes do not fit each other or the mask; when a device fails.
pub fn attend(q: &Tensor, k: &Tensor, v: &Tensor, mask: &Arc<Mask>) -> Result<Tensor> {
    check(q, k, v, mask)?;
    let scale = 1.0 / (q.dim(3)? as f64).sqrt();
    let tracked = [q, k, v].iter().any(|tensor| tensor.track_op());
    if !tracked && ops::kernels_fit(q) && [k, v].iter().all(|tensor| tensor.device().is_cpu()) {
        return Ok(kernels::attend(q, k, v, mask, scale as f32)?);
    }
    #[cfg(feature = "flash-attn")]
    if let Some(ys) = flash_attn::attend(q, k, v, mask, scale as f32)? {
        return Ok(ys);
    }
    if ![q, k, v].iter().all(|tensor| ops::kernels_fit(tensor)) {
        return by_blocks(q, k, v, mask, scale, SCORES_AT_ONCE);
    }
    let op = Attend { mask: Arc::clone(mask), scale: scale as f32 };
    Ok(q.contiguous()?.apply_op3(&k.contiguous()?, &v.contiguous()?, op)?)
}

fn check(q: &Tensor, k: &Tensor, v: &Tensor, mask: &Mask) -> Result<()> {
    let (keys, queries) = (mask.keys(), mask.queries());
    let fit = match (q.dims(), k.dims()) {
        ([batch, heads, q_len, head_dim], [k_batch, kv_heads, k_len, k_dim]) => {
            (batch, head_dim) == (k_batch, k_dim)
                && [*batch, *head_dim, *kv_heads].iter().all(|dim| *dim > 0)
                && heads.is_multiple_of(*kv_heads)
                && (*q_len, *k_len) == (queries, keys)
                && k.dims() == v.dims()
                && mask.is_for(*batch)
        }
        _ => false,
    };
    if fit {
        return Ok(());
    }
    let expected = format!(
        "a mask for their batch, queries (batch, heads, {queries}, dim) and twice (batch, kv_heads, {keys}, dim), kv_heads a divisor of heads"
    );
    let got = format!("{:?}, {:?} and {:?}", q.dims(), k.dims(), v.dims());
    Err(Error::parameter("q, k and v", expected, got))
}

/// [`attend`] in operations of candle's, which any device has, with about `at_once` scores in memory.
fn by_blocks(
    q: &Tensor,
    k: &Tensor,
    v: &Tensor,
    mask: &Mask,
    scale: f64,
    at_once: usize,
) -> Result<Tensor> {
    let (batch, heads, queries, head_dim) = q.dims4()?;
    let kv_heads = k.dim(1)?;
    let group = heads / kv_heads;
    let q = (q * scale)?;
    let most = at_once / (batch * heads).max(1);
    let step = (most / mask.keys().max(1)).max(1);
    let (mut blocks, mut start) = (Vec::with_capacity(queries.div_ceil(step)), 0);
    while start < queries {
        // Many short rows, one behind the other, have many keys of which a block sees few.
        let mut block = start..queries.min(start + step);
        while block.end < queries {
            let twice = start..queries.min(start + 2 * block.len());
            if twice.len() * mask.keys_of(&twice).len() > most {
                break;
            }
            block = twice;
        }
        let seen = mask.keys_of(&block);
        let (rows, keys) = (block.len(), seen.len());
        let k = k.narrow(2, seen.start, keys)?;
        let v = v.narrow(2, seen.start, keys)?;
        let q = q.narrow(2, start, rows)?.reshape((batch, kv_heads, group * rows, head_dim))?;

        let scores = q.matmul(&k.t()?)?.reshape((batch, heads, rows, keys))?;
        let probabilities = match mask.bias(&block, &seen, scores.dtype(), scores.device())? {
            Some(bias) => ops::softmax(&scores.broadcast_add(&bias)?)?,
            None => ops::softmax(&scores)?,
        };
        let ys = probabilities.reshape((batch, kv_heads, group * rows, keys))?.matmul(&v)?;
        blocks.push(ys.reshape((batch, heads, rows, head_dim))?);
        start = block.end;
    }
    let ys = match <[Tensor; 1]>::try_from(blocks) {
        Ok([only]) => only,
        Err(blocks) => Tensor::cat(&blocks, D::Minus2)?,
    };
    Ok(ys.transpose(1, 2)?.reshape((batch, queries, heads * head_dim))?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Layout, Sight};
    use candle_core::{DType, Device, Var};
    use proptest::prelude::*;

    /// The definition: every score, every mask entry, one softmax.
    fn naive(q: &Tensor, k: &Tensor, v: &Tensor, mask: &Mask) -> Result<Tensor> {
        let (batch, heads, queries, head_dim) = q.dims4()?;
        let group = heads / k.dim(1)?;
        let head_of: Vec<u32> = (0..heads).map(|head| (head / group) as u32).collect();
        let head_of = Tensor::new(head_of, q.device())?;
        let (k, v) = (k.index_select(&head_of, 1)?, v.index_select(&head_of, 1)?);
        let scores = (q.matmul(&k.t()?.contiguous()?)? / (head_dim as f64).sqrt())?;
        let all = (0..mask.queries(), 0..mask.keys());
        let scores = match mask.bias(&all.0, &all.1, scores.dtype(), scores.device())? {
            Some(bias) => scores.broadcast_add(&bias)?,
            None => scores,
        };
        let ys = candle_nn::ops::softmax(&scores, D::Minus1)?.matmul(&v.contiguous()?)?;
        Ok(ys.transpose(1, 2)?.reshape((batch, queries, heads * head_dim))?)
    }

    fn largest_difference(a: &Tensor, b: &Tensor) -> Result<f32> {
        Ok((a - b)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?)
    }

    /// What `attend` gives for tracked inputs, and the gradients of a sum of it that weighs every
    /// element by `weights`.
    fn with_gradients(
        inputs: &[Tensor; 3],
        weights: &Tensor,
        attend: impl Fn(&Tensor, &Tensor, &Tensor) -> Result<Tensor>,
    ) -> Result<[Tensor; 4]> {
        let [q, k, v] = inputs.each_ref().map(Var::from_tensor);
        let (q, k, v) = (q?, k?, v?);
        let ys = attend(q.as_tensor(), k.as_tensor(), v.as_tensor())?;
        let gradients = (&ys * weights)?.sum_all()?.backward()?;
        let of = |input: &Var| -> Result<Tensor> {
            Ok(gradients.get(input).map_or_else(|| input.zeros_like(), |it| Ok(it.detach()))?)
        };
        Ok([ys.detach(), of(&q)?, of(&k)?, of(&v)?])
    }

    #[test]
    fn narrow_keys_and_values_are_the_numbers_they_stand_for() -> Result<()> {
        for queries in [1, 70] {
            let random = |heads, len| Tensor::randn(0f32, 1.0, (2, heads, len, 20), &Device::Cpu);
            let (q, k, v) = (random(6, queries)?, random(2, 130)?, random(2, 130)?);
            let layout = Layout::ragged(&[130, 101]);
            let mask = Mask::new(&layout, Sight::Causal, 130 - queries..130, 0, Some(90));
            let mask = Arc::new(mask);
            for dtype in [DType::BF16, DType::F16] {
                let narrow = [k.to_dtype(dtype)?, v.to_dtype(dtype)?];
                let wide = [narrow[0].to_dtype(DType::F32)?, narrow[1].to_dtype(DType::F32)?];
                let expected = attend(&q, &wide[0], &wide[1], &mask)?;
                let got = attend(&q, &narrow[0], &narrow[1], &mask)?;
                assert_eq!(got.to_vec3::<f32>()?, expected.to_vec3::<f32>()?, "{dtype:?}");
            }
        }
        Ok(())
    }

    /// Rows behind each other in one sequence attend as they do side by side, in each of the three
    /// forms; in the last of them, whether one score at a time stands in memory or all.
    #[test]
    fn packed_rows_see_themselves_alone() -> Result<()> {
        let lengths = [1, 30, 0, 150, 7, 149];
        let layout = Layout::ragged(&lengths).with_context(3, &[3..60, 60..140])?;
        let random = |heads, len| Tensor::randn(0f32, 1.0, (1, heads, len, 10), &Device::Cpu);
        let total: usize = lengths.iter().sum();
        let inputs = [random(6, total)?, random(2, total)?, random(2, total)?];
        let [q, k, v] = &inputs;
        let weights = Tensor::randn(0f32, 1.0, (1, total, 60), &Device::Cpu)?;
        for sight in [Sight::Causal, Sight::Bidirectional] {
            for window in [None, Some(1), Some(20)] {
                let packed = Arc::new(Mask::packed(&layout, sight, window));
                let kernel = attend(q, k, v, &packed)?;
                let tracked =
                    with_gradients(&inputs, &weights, |q, k, v| attend(q, k, v, &packed))?;
                let mut first = 0;
                let mut alone: [Vec<Tensor>; 4] = Default::default();
                for (row, length) in lengths.into_iter().enumerate().filter(|(_, it)| *it > 0) {
                    let start = layout.seq() - length;
                    let segments: Vec<_> = layout.context(row).iter().collect();
                    let segments: Vec<_> =
                        segments.iter().map(|it| it.start - start..it.end - start).collect();
                    let layout = Layout::dense(1, length).with_context(0, &segments)?;
                    let mask = Mask::new(&layout, sight, 0..length, 0, window);
                    let of_row = |it: &Tensor, dim| it.narrow(dim, first, length)?.contiguous();
                    let inputs = [of_row(q, 2)?, of_row(k, 2)?, of_row(v, 2)?];
                    let weights = of_row(&weights, 1)?;
                    let row = with_gradients(&inputs, &weights, |q, k, v| naive(q, k, v, &mask))?;
                    alone.iter_mut().zip(row).for_each(|(all, row)| all.push(row));
                    first += length;
                }
                let [ys, dq, dk, dv] = &alone;
                let expected = [
                    Tensor::cat(ys, 1)?,
                    Tensor::cat(dq, 2)?,
                    Tensor::cat(dk, 2)?,
                    Tensor::cat(dv, 2)?,
                ];
                assert!(largest_difference(&kernel, &expected[0])? < 1e-5);
                for (got, expected) in tracked.iter().zip(&expected) {
                    assert!(largest_difference(got, expected)? < 1e-4);
                }
                for at_once in [1, 20_000, usize::MAX] {
                    let scale = 1.0 / 10f64.sqrt();
                    let composite = by_blocks(q, k, v, &packed, scale, at_once)?;
                    assert!(largest_difference(&composite, &expected[0])? < 1e-5);
                }
            }
        }
        Ok(())
    }

    #[test]
    fn what_does_not_fit_is_refused() -> Result<()> {
        let zeros = |dims: &[usize]| Tensor::zeros(dims, DType::F32, &Device::Cpu);
        let mask = |lengths: &[usize]| {
            Arc::new(Mask::new(&Layout::ragged(lengths), Sight::Causal, 0..3, 0, None))
        };
        let (q, k) = (zeros(&[2, 4, 3, 8])?, zeros(&[2, 2, 3, 8])?);
        attend(&q, &k, &k, &mask(&[3, 2]))?;
        for (q, k, v, mask) in [
            (&q, &k, &k, mask(&[3, 2, 1])), // of another batch
            (&q, &k, &k, Arc::new(Mask::new(&Layout::dense(2, 4), Sight::Causal, 0..4, 0, None))),
            (&q, &zeros(&[2, 3, 3, 8])?, &zeros(&[2, 3, 3, 8])?, mask(&[3, 2])), // heads
            (&q, &k, &zeros(&[2, 2, 3, 9])?, mask(&[3, 2])),
            (&q, &zeros(&[2, 0, 3, 8])?, &zeros(&[2, 0, 3, 8])?, mask(&[3, 2])),
            (&zeros(&[4, 3, 8])?, &k, &k, mask(&[3, 2])),
        ] {
            let error = attend(q, k, v, &mask).err().map(|error| error.to_string());
            assert!(error.is_some_and(|it| it.starts_with("parameter q, k and v: expected")));
        }
        Ok(())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// The blocked kernel, the differentiable kernel, its gradients and the definition agree.
        #[test]
        fn blocked_attention_is_the_definition(
            batch in 1usize..3, kv_heads in 1usize..3, group in 1usize..4, head_dim in 1usize..9,
            past in 0usize..60, queries in prop_oneof![Just(1usize), 1usize..300], window in prop::option::of(1usize..40),
            bidirectional: bool, pad in 0usize..4,
        ) {
            let run = || -> Result<(f32, Vec<f32>)> {
                let device = Device::Cpu;
                let total = past + queries;
                let lengths: Vec<usize> = (0..batch).map(|row| total - pad.min(total) * row).collect();
                let layout = Layout::ragged(&lengths);
                let sight = if bidirectional { Sight::Bidirectional } else { Sight::Causal };
                let mask = Arc::new(Mask::new(&layout, sight, past..total, 0, window));
                let random = |heads, len| Tensor::randn(0f32, 1.0, (batch, heads, len, head_dim), &device);
                let inputs =
                    [random(kv_heads * group, queries)?, random(kv_heads, total)?, random(kv_heads, total)?];
                let [q, k, v] = &inputs;
                let weights = Tensor::randn(0f32, 1.0, (batch, queries, kv_heads * group * head_dim), &device)?;
                let expected = with_gradients(&inputs, &weights, |q, k, v| naive(q, k, v, &mask))?;
                let got = with_gradients(&inputs, &weights, |q, k, v| attend(q, k, v, &mask))?;
                let fused = attend(q, k, v, &mask)?;
                let differences = expected.iter().zip(&got).map(|(a, b)| largest_difference(a, b));
                Ok((largest_difference(&fused, &expected[0])?, differences.collect::<Result<_>>()?))
            };
            let (fused, differences) = run().map_err(|e| TestCaseError::fail(e.to_string()))?;
            prop_assert!(fused < 1e-5, "fused differs by {fused}");
            prop_assert!(differences[0] < 1e-5, "differentiable differs by {}", differences[0]);
            prop_assert!(differences.iter().all(|it| *it < 1e-4), "gradients: {differences:?}");
        }
    }
}
