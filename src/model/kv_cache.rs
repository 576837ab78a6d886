//! What a conversation remembers: the keys and values of its tokens, layer by layer.

use std::ops::Range;

use candle_core::{DType, Tensor};

use super::Transformer;
use crate::error::{Error, Result};
use crate::layout::Layout;

/// Tokens that run through the blocks at a time when a cache takes them up.
pub(crate) const CHUNK: usize = 512;

/// The keys and values of one conversation, or of one batch of them side by side.
///
/// Room for `capacity` positions is set aside at once. Under a sliding window only the last
/// `window - 1` positions matter to what comes next, so a cache holds those and one chunk of new
/// ones, however long the text; older ones are let go of.
///
/// ```text
/// window 4, room for 3 + 2 slots:
///   after 5 tokens   [0 1 2 3 4]   first = 0
///   token 5 comes    [2 3 4]       the last window - 1 move to the front, first = 2
///                    [2 3 4 5 _]   and the new one goes behind them
/// ```
///
/// It may keep them narrower than they are computed. Then a token attends to all keys and values as
/// they are kept, also to its own and to those that came in the same pass, so that what is computed
/// does not depend on how a text was cut into passes. Only new tokens are converted.
#[derive(Debug)]
pub struct KvCache {
    /// Which transformer's keys and values these are.
    owner: u64,
    layers: Vec<LayerCache>,
    capacity: usize,
    layout: Layout,
    dtype: DType,
}

/// The keys and values of some tokens in one layer, `(batch, kv_heads, tokens, head_dim)`.
#[derive(Clone, Debug)]
pub(super) struct KeyValues {
    pub(super) keys: Tensor,
    pub(super) values: Tensor,
    /// Whether a gradient will come back through what is computed with them.
    pub(super) tracked: bool,
}

impl KeyValues {
    /// Applies `f` to the keys and to the values, each paired with the other's.
    pub(super) fn zip(
        &self,
        other: &Self,
        f: impl Fn(&Tensor, &Tensor) -> Result<Tensor>,
    ) -> Result<Self> {
        Ok(Self {
            keys: f(&self.keys, &other.keys)?,
            values: f(&self.values, &other.values)?,
            tracked: self.tracked || other.tracked,
        })
    }

    /// Of the type and shape they have, with the values that are left when they are kept as `dtype`.
    pub(super) fn rounded(self, dtype: DType) -> Result<Self> {
        let Self { keys, values, tracked } = self;
        Ok(Self { keys: rounded(&keys, dtype)?, values: rounded(&values, dtype)?, tracked })
    }
}

/// `xs` with the values that are left when it is kept as `dtype`. Its gradient is that of `xs`: the
/// slope of rounding is 0 or none, so it is taken for a constant shift, which a backward pass does
/// not see (Bengio et al. 2013). The gradient of candle's `to_dtype` would be rounded as well, and in
/// `f16` overflow.
fn rounded(xs: &Tensor, dtype: DType) -> Result<Tensor> {
    if xs.dtype() == dtype {
        return Ok(xs.clone());
    }
    let plain = xs.detach();
    let kept = plain.to_dtype(dtype)?.to_dtype(xs.dtype())?;
    match xs.track_op() {
        // What is kept is so near that the difference is exact, and with it the sum.
        true => Ok((xs + (kept - plain)?)?),
        false => Ok(kept),
    }
}

/// One layer's part of a [`KvCache`].
#[derive(Debug)]
pub(super) struct LayerCache {
    /// `(batch, kv_heads, slots, head_dim)`, of which `len - first` slots are filled.
    keys: Tensor,
    values: Tensor,
    /// What the filled slots hold, with the graph it came from, while one pass takes up more
    /// tokens than one chunk.
    live: Option<(Tensor, Tensor)>,
    /// The position that slot 0 holds.
    first: usize,
    /// The position that the next token takes.
    len: usize,
    window: Option<usize>,
}

impl KvCache {
    pub(super) fn new(
        owner: &Transformer,
        layout: &Layout,
        capacity: usize,
        dtype: DType,
    ) -> Result<Self> {
        let Transformer { id, config, device, .. } = owner;
        if capacity == 0 {
            return Err(Error::parameter("capacity", "at least one position", capacity));
        }
        let window = config.sliding_window;
        let slots = window.map_or(capacity, |w| capacity.min((w - 1).saturating_add(CHUNK)));
        let shape = (layout.batch(), config.num_key_value_heads, slots, config.head_dim);
        let sizes = [shape.0, shape.1, shape.2, shape.3, dtype.size_in_bytes()];
        let bytes = sizes.iter().try_fold(1usize, |product, &size| product.checked_mul(size));
        let zeros = || match bytes {
            Some(bytes) if !device.is_cpu() || fits_memory(bytes) => {
                Ok(Tensor::zeros(shape, dtype, device)?)
            }
            _ => Err(Error::parameter("capacity", "a cache that fits memory", capacity)),
        };
        let layer = |_| {
            let (keys, values) = (zeros()?, zeros()?);
            Ok(LayerCache { keys, values, live: None, first: 0, len: 0, window })
        };
        let layers = (0..config.num_hidden_layers).map(layer).collect::<Result<_>>()?;
        Ok(Self { owner: *id, layers, capacity, layout: layout.clone(), dtype })
    }

    /// Positions taken up so far.
    #[must_use]
    pub fn len(&self) -> usize {
        self.layers.iter().map(|layer| layer.len).min().unwrap_or(0)
    }

    /// Whether nothing has been taken up yet.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Positions there is room for, in all.
    #[must_use]
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// Positions whose keys and values are set aside at a time: `capacity`, or less under a
    /// sliding window.
    #[must_use]
    pub fn slots(&self) -> usize {
        self.layers.first().map_or(0, |layer| layer.keys.dims().get(2).copied().unwrap_or(0))
    }

    /// What keys and values are kept as.
    #[must_use]
    pub fn dtype(&self) -> DType {
        self.dtype
    }

    /// Bytes set aside for keys and values in all layers: those of [`slots`](Self::slots) positions
    /// for each row of the batch, however few are filled.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let elements = |layer: &LayerCache| layer.keys.elem_count() + layer.values.elem_count();
        self.layers.iter().map(elements).sum::<usize>() * self.dtype.size_in_bytes()
    }

    /// The rows of this cache and where each begins.
    #[must_use]
    pub fn layout(&self) -> &Layout {
        &self.layout
    }

    /// Forgets everything; the room stays.
    pub fn reset(&mut self) {
        for layer in &mut self.layers {
            (layer.first, layer.len) = (0, 0);
        }
    }

    /// Forgets all but the first `length` positions; longer than the text is no change.
    ///
    /// # Errors
    /// [`Error::CacheRolled`] when a sliding window has let go of positions that the next token
    /// would have to see; the cache is then unchanged.
    pub fn truncate(&mut self, length: usize) -> Result<()> {
        self.truncate_layers(0..self.layers.len(), length)
    }

    /// As [`KvCache::truncate`], in these layers only: what was computed before layer `a` stays
    /// true when the thoughts that enter it have changed.
    ///
    /// # Errors
    /// As [`KvCache::truncate`]; [`Error::Parameter`] for layers that there are not.
    pub fn truncate_layers(&mut self, layers: Range<usize>, length: usize) -> Result<()> {
        let count = self.layers.len();
        let Some(layers) = self.layers.get_mut(layers.clone()) else {
            let expected = format!("a range within 0..{count}");
            return Err(Error::parameter("layers", expected, format!("{layers:?}")));
        };
        for layer in layers.iter() {
            // The next token sees positions oldest..length, and itself.
            let oldest =
                layer.window.map_or(0, |window| length.saturating_add(1).saturating_sub(window));
            if length < layer.len && oldest < length && oldest < layer.first {
                return Err(Error::CacheRolled { length, oldest: layer.first });
            }
        }
        for layer in layers {
            layer.len = layer.len.min(length);
            layer.first = layer.first.min(layer.len);
        }
        Ok(())
    }

    /// Refuses to be used by another transformer: what the keys mean lies in its weights.
    pub(super) fn check_owner(&self, transformer: u64) -> Result<()> {
        if self.owner == transformer {
            return Ok(());
        }
        Err(Error::parameter("cache", "one made by this very transformer", "another's"))
    }

    /// The position at which `layers` go on, which must be one for all of them.
    pub(super) fn position(&self, layers: &Range<usize>) -> Result<usize> {
        let Some(layers) = self.layers.get(layers.clone()) else {
            let expected = format!("one of at least {} layers", layers.end);
            return Err(Error::parameter("cache", expected, self.layers.len()));
        };
        let Some(first) = layers.first() else { return Ok(self.len()) };
        if layers.iter().any(|layer| layer.len != first.len) {
            return Err(Error::parameter(
                "cache",
                "the same length in every layer of the pass",
                "layers of different length; an earlier pass failed half-way: reset or truncate it",
            ));
        }
        Ok(first.len)
    }

    /// Refuses `new` more positions in `layers` where there is no room for all of them.
    pub(super) fn check_room(&self, layers: &Range<usize>, new: usize) -> Result<()> {
        let requested = self.position(layers)?.saturating_add(new);
        if requested > self.capacity {
            return Err(Error::ContextFull { capacity: self.capacity, requested });
        }
        Ok(())
    }

    /// Makes room for `new` more positions in `layers`, letting go of what no window will see.
    ///
    /// One mask serves all layers of a pass, so all of them then hold the same positions, also if
    /// they took up what came before in chunks of different sizes.
    pub(super) fn reserve(&mut self, layers: &Range<usize>, new: usize) -> Result<()> {
        self.check_room(layers, new)?;
        let layers = self.layers.get_mut(layers.clone()).unwrap_or(&mut []);
        let aligned = layers.windows(2).all(|pair| pair[0].first == pair[1].first);
        for layer in layers {
            layer.reserve(new, !aligned)?;
        }
        Ok(())
    }

    /// Makes what is held a constant: no gradient will lead back to the pass that computed it.
    pub(super) fn cut_graph(&mut self) {
        for layer in &mut self.layers {
            layer.live = None;
        }
    }

    /// The position that slot 0 of `layers` holds.
    pub(super) fn first(&self, layers: &Range<usize>) -> usize {
        self.layers.get(layers.start).map_or(0, |layer| layer.first)
    }

    pub(super) fn layer(&mut self, index: usize) -> Result<&mut LayerCache> {
        let layers = self.layers.len();
        self.layers.get_mut(index).ok_or_else(|| {
            Error::parameter("cache", format!("one of more than {index} layers"), layers)
        })
    }
}

/// Whether this many bytes can be had. Where they cannot, making a tensor of them would end the
/// process.
fn fits_memory(bytes: usize) -> bool {
    let mut memory = Vec::<u8>::new();
    let fits = memory.try_reserve_exact(bytes).is_ok();
    std::hint::black_box(memory); // else the compiler may leave the allocation out
    fits
}

impl LayerCache {
    /// Makes room for `new` more positions. With `roll`, lets go of what no window will see even
    /// if there is room.
    fn reserve(&mut self, new: usize, roll: bool) -> Result<()> {
        let slots = self.keys.dim(2)?;
        let held = self.len - self.first;
        if held + new <= slots && !roll {
            return Ok(());
        }
        let keep = self.window.map_or(held, |window| held.min(window - 1));
        if keep + new > slots {
            return Err(Error::ContextFull { capacity: slots, requested: keep + new });
        }
        if keep > 0 {
            for tensor in [&self.keys, &self.values] {
                // A copy, because source and destination may overlap.
                let recent = tensor.narrow(2, held - keep, keep)?.force_contiguous()?;
                tensor.slice_set(&recent, 2, 0)?;
            }
        }
        if let Some((keys, values)) = self.live.take() {
            let recent = |tensor: Tensor| tensor.narrow(2, held - keep, keep);
            self.live = Some((recent(keys)?, recent(values)?));
        }
        self.first = self.len - keep;
        Ok(())
    }

    /// Makes `all` the keys and values of this layer: those of every position from 0 on. Under a
    /// window only the last of them are kept, if there is no room for all.
    pub(super) fn fill(&mut self, all: &KeyValues) -> Result<()> {
        let (len, slots) = (all.keys.dim(2)?, self.keys.dim(2)?);
        let keep = match self.window {
            Some(window) if len > slots => window - 1,
            _ => len,
        };
        if keep > slots {
            return Err(Error::ContextFull { capacity: slots, requested: keep });
        }
        if keep > 0 {
            for (own, all) in [(&self.keys, &all.keys), (&self.values, &all.values)] {
                let recent = all.narrow(2, len - keep, keep)?.detach().to_dtype(own.dtype())?;
                own.slice_set(&recent.contiguous()?, 2, 0)?;
            }
        }
        (self.first, self.len) = (len - keep, len);
        Ok(())
    }

    /// Takes up the keys and values of new tokens and gives those of all tokens held, these
    /// included. [`KvCache::reserve`] has made the room.
    ///
    /// Where they are tracked, what is given is a copy in their own type, because the cache's own
    /// memory is written again, and the new tokens carry their gradient. Else it may be narrower than
    /// they are.
    pub(super) fn append(&mut self, new: &KeyValues) -> Result<KeyValues> {
        let (held, dtype) = (self.len - self.first, self.keys.dtype());
        let count = new.keys.dim(2)?;
        for (all, new) in [(&self.keys, &new.keys), (&self.values, &new.values)] {
            all.slice_set(&new.detach().to_dtype(dtype)?.contiguous()?, 2, held)?;
        }
        let (keys, values) = if new.tracked {
            let constant = || -> Result<(Tensor, Tensor)> {
                let wide = |all: &Tensor| all.narrow(2, 0, held)?.to_dtype(new.keys.dtype());
                Ok((wide(&self.keys)?, wide(&self.values)?))
            };
            let (keys, values) = self.live.take().map_or_else(constant, Ok)?;
            let new = new.clone().rounded(dtype)?;
            let all =
                (Tensor::cat(&[&keys, &new.keys], 2)?, Tensor::cat(&[&values, &new.values], 2)?);
            self.live.insert(all).clone()
        } else {
            (self.keys.narrow(2, 0, held + count)?, self.values.narrow(2, 0, held + count)?)
        };
        self.len += count;
        Ok(KeyValues { keys, values, tracked: new.tracked })
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::model::{Mask, Sight, attend};
    use candle_core::{Device, Var};

    const HEADS: usize = 2;
    const HEAD_DIM: usize = 20;

    fn random(heads: usize, len: usize) -> Result<Tensor> {
        Ok(Tensor::randn(0f32, 1.0, (1, heads, len, HEAD_DIM), &Device::Cpu)?)
    }

    fn empty(slots: usize, window: Option<usize>, dtype: DType) -> Result<LayerCache> {
        let zeros = || Tensor::zeros((1, HEADS, slots, HEAD_DIM), dtype, &Device::Cpu);
        Ok(LayerCache { keys: zeros()?, values: zeros()?, live: None, first: 0, len: 0, window })
    }

    fn bits(xs: &Tensor) -> Result<Vec<u32>> {
        let values = xs.to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
        Ok(values.into_iter().map(f32::to_bits).collect())
    }

    /// A narrow cache beside a wide one that is given the rounded numbers: tokens in pieces, tracked
    /// and not, while the window rolls. What is held is the same, and so is attention over it.
    #[test]
    fn a_narrow_cache_is_a_wide_one_of_rounded_numbers() -> Result<()> {
        for (dtype, window) in
            [DType::BF16, DType::F16].into_iter().flat_map(|it| [(it, None), (it, Some(9))])
        {
            let slots = window.map_or(70, |window| window - 1 + 20);
            let mut narrow = empty(slots, window, dtype)?;
            let mut wide = empty(slots, window, DType::F32)?;
            for (count, tracked) in [(20, false), (1, false), (7, true), (1, true), (20, false)] {
                let (keys, values) = (random(HEADS, count)?, random(HEADS, count)?);
                let round = |xs: &Tensor| xs.to_dtype(dtype)?.to_dtype(DType::F32);
                let rounded = (round(&keys)?, round(&values)?);
                let var = |xs: &Tensor| -> Result<Tensor> {
                    let tracked = tracked.then(|| Var::from_tensor(xs)).transpose()?;
                    Ok(tracked.map_or_else(|| xs.clone(), |var| var.as_tensor().clone()))
                };
                let new = KeyValues { keys: var(&keys)?, values: var(&values)?, tracked };
                let (a, b) = rounded;
                let of_rounded = KeyValues { keys: a, values: b, tracked: false };
                for cache in [&mut narrow, &mut wide] {
                    cache.reserve(count, false)?;
                    cache.live = None;
                }
                let (got, expected) = (narrow.append(&new)?, wide.append(&of_rounded)?);
                assert_eq!(bits(&got.keys)?, bits(&expected.keys)?, "{dtype:?} {window:?}");
                assert_eq!(bits(&got.values)?, bits(&expected.values)?, "{dtype:?} {window:?}");
                assert_eq!(got.keys.dtype(), if tracked { DType::F32 } else { dtype });
                assert_eq!((narrow.first, narrow.len), (wide.first, wide.len));

                let (q, held) = (random(2 * HEADS, count)?, narrow.first..narrow.len);
                let layout = Layout::dense(1, held.end);
                let queries = held.end - count..held.end;
                let mask = Mask::new(&layout, Sight::Causal, queries, held.start, window);
                let mask = Arc::new(mask);
                let got = attend(&q, &got.keys.detach(), &got.values.detach(), &mask)?;
                let expected = attend(&q, &expected.keys, &expected.values, &mask)?;
                assert_eq!(bits(&got)?, bits(&expected)?, "{dtype:?} {window:?}");
            }

            let all = KeyValues {
                keys: random(HEADS, slots)?,
                values: random(HEADS, slots)?,
                tracked: false,
            };
            narrow.fill(&all)?;
            wide.fill(&all.clone().rounded(dtype)?)?;
            assert_eq!(bits(&narrow.keys)?, bits(&wide.keys)?, "{dtype:?} {window:?}");
            assert_eq!(bits(&narrow.values)?, bits(&wide.values)?, "{dtype:?} {window:?}");
        }
        Ok(())
    }

    /// With a graph and without, also where a number is too large or too small for its type.
    #[test]
    fn rounding_gives_the_same_numbers_with_a_gradient() -> Result<()> {
        let edges =
            [0f32, 1e-9, -3e-8, 6e-5, 1.0, 1.003, -255.7, 65519.0, 65520.0, -1e30, f32::MAX];
        let xs = Tensor::new(&edges, &Device::Cpu)?;
        let xs = Tensor::cat(&[&xs, &Tensor::randn(0f32, 1e-4, 999, &Device::Cpu)?], 0)?;
        for dtype in [DType::F32, DType::BF16, DType::F16] {
            let var = Var::from_tensor(&xs)?;
            let (ys, slope) =
                (rounded(var.as_tensor(), dtype)?, Tensor::rand(0f32, 1.0, 1010, &Device::Cpu)?);
            let expected = xs.to_dtype(dtype)?.to_dtype(DType::F32)?;
            assert_eq!(ys.to_vec1::<f32>()?, expected.to_vec1::<f32>()?, "{dtype:?}");
            assert_eq!(rounded(&xs, dtype)?.to_vec1::<f32>()?, expected.to_vec1::<f32>()?);
            let gradients = (&ys * &slope)?.sum_all()?.backward()?;
            let gradient = gradients.get(&var).map(Tensor::to_vec1::<f32>).transpose()?;
            assert_eq!(gradient, Some(slope.to_vec1::<f32>()?), "{dtype:?}");
        }
        Ok(())
    }
}
