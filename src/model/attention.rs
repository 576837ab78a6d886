//! Grouped-query attention: project, rotate, remember, attend (Ainslie et al. 2023).

use candle_core::Tensor;

use super::context::BlockContext;
use super::kv_cache::Remembered;
use super::linear::Linear;
use super::mask::Mask;
use super::rope::Rotation;
use super::weights::{Weights, projection};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::kernels::{self, Fresh, Input, KeyValues};

/// The attention of one block.
#[derive(Clone, Debug)]
pub(super) struct Attention {
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    o_proj: Linear,
    heads: usize,
    kv_heads: usize,
    /// `1 / sqrt(head_dim)`
    scale: f64,
}

impl Attention {
    /// Its weights are `{prefix}.self_attn.*`.
    pub(super) fn new(config: &Config, prefix: &str, weights: &mut impl Weights) -> Result<Self> {
        let mut linear = |name| projection(weights, config, prefix, name);
        Ok(Self {
            q_proj: linear("self_attn.q_proj")?,
            k_proj: linear("self_attn.k_proj")?,
            v_proj: linear("self_attn.v_proj")?,
            o_proj: linear("self_attn.o_proj")?,
            heads: config.num_attention_heads,
            kv_heads: config.num_key_value_heads,
            scale: 1.0 / (config.head_dim as f64).sqrt(),
        })
    }

    /// By their names in a checkpoint.
    pub(super) fn projections_mut(&mut self) -> [(&'static str, &mut Linear); 4] {
        [
            ("self_attn.q_proj", &mut self.q_proj),
            ("self_attn.k_proj", &mut self.k_proj),
            ("self_attn.v_proj", &mut self.v_proj),
            ("self_attn.o_proj", &mut self.o_proj),
        ]
    }

    /// `(tokens, hidden) -> (tokens, hidden)`
    pub(super) fn forward(&self, xs: &Tensor, cx: &mut BlockContext<'_, '_, '_>) -> Result<Fresh> {
        let (q, keys, values) = self.project(xs, &cx.rotation)?; // (heads or kv_heads, tokens, head_dim)
        let remembered = cx.remember(keys, values)?;
        let spans = cx.mask.spans();
        let context = kernels::attend(&q, &remembered.key_values(), spans, self.scale)?;
        let context = context.into_tensor(); // (tokens, heads · head_dim)
        cx.show_attention(&q, &remembered, (&context, &self.o_proj))?;
        self.o_proj.product(&context)
    }

    /// Queries, keys and values of `xs`, each `(heads or kv_heads, tokens, head_dim)`.
    fn project(&self, xs: &Tensor, rotation: &Rotation) -> Result<(Tensor, Tensor, Tensor)> {
        let input =
            Input::new(xs, &[&self.q_proj, &self.k_proj, &self.v_proj].map(Linear::weight))?;
        let projected =
            |projection: &Linear| -> Result<_> { Ok(projection.times(&input)?.into_tensor()) };
        let queries = || rotation.split_queries(&projected(&self.q_proj)?, self.heads);
        let keys = || rotation.split_keys(&projected(&self.k_proj)?, self.kv_heads);
        let values = || kernels::split_heads(&projected(&self.v_proj)?, self.kv_heads, None);
        // Side by side: while one waits for memory, another multiplies (a sixth of the time of 2048
        // tokens of SmolLM2; nothing for one).
        let (q, (keys, values)) = rayon::join(queries, || rayon::join(keys, values));
        Ok((q?, keys?, values?))
    }
}

impl Remembered {
    fn key_values(&self) -> KeyValues<'_> {
        match self {
            Self::Packed(keys, values) => KeyValues::Packed { keys, values },
            Self::Blocks(blocks) => KeyValues::Blocks(blocks),
        }
    }
}

/// `softmax(q kᵀ / sqrt(head_dim) + mask) v`: the attention of every pass of the crate.
///
/// `q` is `(heads, tokens, head_dim)`, `k` and `v` are `(kv_heads, keys, head_dim)`, with the tokens and
/// the keys of all sequences of the mask one after the other. They are not repeated: the
/// `heads / kv_heads` query heads of a group share their one key head. On the CPU, `k` and `v` may be
/// narrower than an `f32` `q` (`bf16`, `f16`) where nothing tracks a gradient. Queries go block by
/// block, each against the keys that some query of the block sees, so a long prompt never has all its
/// scores in memory. Returns the heads side by side: `(tokens, heads · head_dim)`. It is differentiable
/// in `q`, `k` and `v`.
///
/// With the feature `flash-attn`, on a CUDA device, candle's flash attention computes it where the
/// three are all `f16` or all `bf16`, nothing tracks a gradient, a head has a multiple of 8 numbers, at
/// most 512, and the mask is of one sequence and lets each query see all keys, or a fixed number
/// behind and ahead of itself: the whole of a prompt, what came before, a sliding window. It compiles
/// against candle's types, but has never been run on a GPU.
///
/// ```
/// # use candle_core::{Device, Tensor};
/// use hybrid_attention::model::{Batch, Mask, Sight, attend};
///
/// let random = |heads| Tensor::randn(0f32, 1.0, (heads, 5, 16), &Device::Cpu);
/// let (q, k, v) = (random(8)?, random(2)?, random(2)?);
/// let mask = Mask::new(&Batch::ragged(&[2, 3])?, Sight::Causal, None)?;
/// assert_eq!(attend(&q, &k, &v, &mask)?.dims(), [5, 8 * 16]);
/// # Ok::<_, hybrid_attention::Error>(())
/// ```
///
/// # Errors
/// [`Error::Parameter`] where there are no heads, or the shapes do not fit each other or the mask; when a
/// device fails.
pub fn attend(q: &Tensor, k: &Tensor, v: &Tensor, mask: &Mask) -> Result<Tensor> {
    if q.dims().first() == Some(&0) {
        return Err(Error::parameter("q", "at least one head", "none"));
    }
    let scale = 1.0 / (q.dims().last().copied().unwrap_or(1) as f64).sqrt();
    let held = KeyValues::Packed { keys: k, values: v };
    Ok(kernels::attend(q, &held, mask.spans(), scale)?.into_tensor())
}
