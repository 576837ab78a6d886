//! Keys and values taken out of a cache, to be put into another.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};
use half::{bf16, f16};

use super::pool::Shape;
use super::{KvCache, KvPool};
use crate::error::{Error, Result};
use crate::model::Transformer;

/// Keys and values of neighbouring tokens in every layer, as a cache held them: what is left of a text that
/// was read once. [`Transformer::place`] puts them into another cache. Cheap to clone.
#[derive(Clone)]
pub struct KeptTokens {
    /// Of a pool like the one that they are from.
    shape: Arc<Shape>,
    /// The position of the first one.
    first: usize,
    tokens: usize,
    bytes: Arc<Bytes>,
}

/// `(layers, 2, kv_heads, tokens, head_dim)`, keys before values, little-endian: in memory, or mapped.
pub(crate) type Bytes = dyn AsRef<[u8]> + Send + Sync;

impl KvCache {
    /// A copy of what it holds for these positions in every layer.
    ///
    /// ```
    /// # use candle_core::Device;
    /// # use hybrid_attention::{HybridModel, model::Pass};
    /// let model = HybridModel::tiny(&Device::Cpu)?;
    /// let transformer = model.transformer();
    /// let mut cache = transformer.new_cache(64)?;
    /// let text = transformer.embed_ids(&[11, 150, 12, 42, 151])?;
    /// transformer.forward(&text, transformer.all_layers(), Pass::Cached(&mut cache))?;
    /// let kept = cache.keep(0..5)?;
    ///
    /// let mut other = transformer.new_cache(64)?;
    /// transformer.place(&kept, 0..5, &mut other)?; // as if it had read them
    /// transformer.place(&kept, 1..5, &mut other)?; // again, turned to their new positions
    /// assert_eq!(other.len(), 9);
    /// # Ok::<_, hybrid_attention::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Parameter`] for no positions, or some that it does not hold in every layer.
    pub fn keep(&self, positions: Range<usize>) -> Result<KeptTokens> {
        let held = self.oldest()..self.len();
        if positions.is_empty() || positions.start < held.start || positions.end > held.end {
            let expected = format!("a run of the positions {held:?} that are held");
            return Err(Error::parameter("positions", expected, format!("{positions:?}")));
        }
        let (shape, dtype) = (self.pool.shared_shape(), self.dtype());
        let mut bytes = Vec::new();
        for layer in &self.layers {
            let (keys, values) = layer.gather(&positions, dtype)?;
            write(&keys, &mut bytes)?;
            write(&values, &mut bytes)?;
        }
        let (first, tokens) = (positions.start, positions.len());
        Ok(KeptTokens { shape, first, tokens, bytes: Arc::new(bytes) })
    }

    /// Adds tokens that were kept behind what `layers` of it hold, with keys as `turned` gives them.
    pub(in crate::model) fn place(
        &mut self,
        kept: &KeptTokens,
        tokens: &Range<usize>,
        turned: impl Fn(Tensor) -> Result<Tensor>,
    ) -> Result<()> {
        let (dtype, device) = (self.dtype(), self.pool.shape().device.clone());
        let as_held = |xs: Tensor| -> Result<Tensor> {
            let same = xs.dtype() == dtype;
            Ok(if same { xs } else { xs.to_dtype(DType::F32)? }) // blocks round what is wider
        };
        self.append(0..self.layers.len(), tokens.len(), |layer| {
            let (keys, values) = kept.layer(layer, tokens, &device)?;
            Ok((as_held(turned(keys)?)?, as_held(values)?))
        })
    }
}

impl KeptTokens {
    /// Those that this transformer has left, from position 0 on: `bytes` as [`bytes`](Self::bytes) gave them.
    pub(crate) fn new(
        transformer: &Transformer,
        dtype: DType,
        tokens: usize,
        bytes: Arc<Bytes>,
    ) -> Result<Self> {
        let shape = KvPool::new(transformer, dtype, 0).shared_shape();
        let kept = Self { shape, first: 0, tokens, bytes };
        let (expected, got) = (kept.dims().into_iter().product::<usize>(), kept.bytes().len());
        let expected = expected.saturating_mul(dtype.size_in_bytes());
        if expected != got || tokens == 0 {
            let expected = format!("{expected} bytes for {:?}, at least one token", kept.dims());
            return Err(Error::parameter("keys and values", expected, got));
        }
        Ok(kept)
    }

    /// The same numbers, rounded to `dtype`, as what the other of the two transformers of a model takes.
    pub(crate) fn handed_to(&self, transformer: &Transformer, dtype: DType) -> Result<Self> {
        let mut bytes = Vec::new();
        for layer in 0..self.shape.layers {
            let (keys, values) = self.layer(layer, &(0..self.tokens), &Device::Cpu)?;
            write(&keys.to_dtype(dtype)?, &mut bytes)?;
            write(&values.to_dtype(dtype)?, &mut bytes)?;
        }
        Self::new(transformer, dtype, self.tokens, Arc::new(bytes))
    }

    /// How many tokens.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.tokens
    }

    /// The position at which the first of them was read.
    #[must_use]
    pub fn first(&self) -> usize {
        self.first
    }

    /// The type that keys and values are kept in.
    #[must_use]
    pub fn dtype(&self) -> DType {
        self.shape.dtype
    }

    /// The numbers, `(layers, 2, kv_heads, tokens, head_dim)` with keys before values, little-endian.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        (*self.bytes).as_ref()
    }

    /// `(layers, 2, kv_heads, tokens, head_dim)`
    pub(crate) fn dims(&self) -> [usize; 5] {
        let Shape { layers, kv_heads, head_dim, .. } = *self.shape;
        [layers, 2, kv_heads, self.tokens, head_dim]
    }

    /// The keys and values of the last token in the last layer, which depend on all that makes keys and values.
    pub(crate) fn last(&self) -> Result<Vec<f32>> {
        let last = self.tokens - 1..self.tokens;
        let (keys, values) =
            self.layer(self.shape.layers.saturating_sub(1), &last, &Device::Cpu)?;
        let both = Tensor::stack(&[keys, values], 0)?.to_dtype(DType::F32)?;
        Ok(both.flatten_all()?.to_vec1()?)
    }

    /// Refuses use by another transformer.
    pub(in crate::model) fn check_owner(&self, transformer: u64) -> Result<()> {
        match self.shape.owner == transformer {
            true => Ok(()),
            false => Err(Error::parameter("kept tokens", "this very transformer's", "another's")),
        }
    }

    /// Keys and values of some of the tokens in a layer, `(kv_heads, tokens, head_dim)` each.
    fn layer(
        &self,
        layer: usize,
        tokens: &Range<usize>,
        device: &Device,
    ) -> Result<(Tensor, Tensor)> {
        let [_, _, kv_heads, all, head_dim] = self.dims();
        let half = kv_heads * all * head_dim * self.dtype().size_in_bytes();
        let read = |index: usize| -> Result<Tensor> {
            let bytes = self.bytes().get(index * half..(index + 1) * half).unwrap_or_default();
            let shape = [kv_heads, all, head_dim];
            let xs = Tensor::from_raw_buffer(bytes, self.dtype(), &shape, device)?;
            Ok(xs.narrow(1, tokens.start, tokens.len())?)
        };
        Ok((read(2 * layer)?, read(2 * layer + 1)?))
    }
}

impl PartialEq for KeptTokens {
    fn eq(&self, other: &Self) -> bool {
        let about = |it: &Self| (it.shape.owner, it.first, it.dims(), it.dtype());
        about(self) == about(other) && self.bytes() == other.bytes()
    }
}

impl Eq for KeptTokens {}

impl fmt::Debug for KeptTokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KeptTokens")
            .field("first", &self.first)
            .field("tokens", &self.tokens)
            .field("dtype", &self.dtype())
            .finish_non_exhaustive()
    }
}

fn write(xs: &Tensor, to: &mut Vec<u8>) -> Result<()> {
    let xs = xs.detach().flatten_all()?;
    match xs.dtype() {
        DType::F32 => to.extend(xs.to_vec1::<f32>()?.into_iter().flat_map(f32::to_le_bytes)),
        DType::BF16 => to.extend(xs.to_vec1::<bf16>()?.into_iter().flat_map(bf16::to_le_bytes)),
        DType::F16 => to.extend(xs.to_vec1::<f16>()?.into_iter().flat_map(f16::to_le_bytes)),
        other => {
            let got = format!("{other:?}");
            return Err(Error::parameter("cache dtype", "F32, BF16 or F16 to be kept", got));
        }
    }
    Ok(())
}
