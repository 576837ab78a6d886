//! Grouped-query attention: project, rotate, remember, attend (Ainslie et al. 2023).

use std::sync::Arc;

use candle_core::Tensor;

use super::View;
use super::kv_cache::KeyValues;
use super::linear::Linear;
use super::mask::Mask;
use super::rope::split_heads;
use super::weights::Weights;
use crate::config::Config;
use crate::error::{Error, Result};
use crate::kernels::{self, Fresh, Input};

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
    ) -> Result<Fresh> {
        let (q, new) = self.project(xs, view)?;
        let KeyValues { keys, values, .. } = remember(new)?; // (batch, kv_heads, keys, head_dim)
        self.o_proj.product(&attend(&q, &keys, &values, &view.mask)?)
    }

    /// Queries, keys and values of `xs`, each `(batch, heads or kv_heads, seq, head_dim)`.
    fn project(&self, xs: &Tensor, view: &View) -> Result<(Tensor, KeyValues)> {
        let input =
            Input::new(xs, &[self.q_proj.weight(), self.k_proj.weight(), self.v_proj.weight()])?;
        let rotated = |projection: &Linear, heads| {
            view.rotation.split_heads(projection.times(&input)?.tensor(), heads)
        };
        // Side by side: while one waits for memory, another multiplies (a sixth of the time of 2048
        // tokens of SmolLM2; nothing for one).
        let (q, (keys, values)) = rayon::join(
            || rotated(&self.q_proj, self.heads),
            || {
                rayon::join(
                    || rotated(&self.k_proj, self.kv_heads),
                    || split_heads(self.v_proj.times(&input)?.tensor(), self.kv_heads, None),
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
                Some(bias) => kernels::softmax(&scores.broadcast_add(bias)?),
                None => kernels::softmax(&scores),
            }
        };
        let sum = (1..self.heads)
            .try_fold(share(0)?, |sum, head| -> Result<Tensor> { Ok((sum + share(head)?)?) })?;
        Ok((sum / self.heads as f64)?.squeeze(1)?)
    }
}

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
    let (batch, heads, queries, head_dim) = q.dims4()?;
    let packed = |xs: &Tensor| -> Result<Tensor> {
        let (_, heads, len, head_dim) = xs.dims4()?;
        match batch {
            1 => Ok(xs.squeeze(0)?),
            _ => Ok(xs.transpose(0, 1)?.reshape((heads, batch * len, head_dim))?),
        }
    };
    let (keys, values) = (packed(k)?, packed(v)?);
    let held = kernels::KeyValues::Packed { keys: &keys, values: &values };
    let scale = 1.0 / (head_dim as f64).sqrt();
    let ys = kernels::attend(&packed(q)?, &held, &Arc::new(mask.spans(batch)), scale)?;
    Ok(ys.into_tensor().reshape((batch, queries, heads * head_dim))?)
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
