//! Keys and values of thoughts, handed to the decoder as they are.

use std::ops::Range;
use std::sync::Arc;

use candle_core::{DType, Tensor};

use super::kv_cache::{KeyValues, KvCache};
use super::mask::{Mask, Sight};
use super::{Pass, Transformer, View, check_batch, in_pool};
use crate::error::{Error, Result};
use crate::layout::Layout;

/// What [`Transformer::hand_over`] hands to the decoder: streams of `(batch, seq, hidden)`.
#[derive(Clone, Copy, Debug)]
pub struct HandOver<'a> {
    /// The stream of the plain model.
    pub plain: &'a Tensor,
    /// The thoughts.
    pub z: &'a Tensor,
    /// Share of the run over the thoughts, in `[0, 1]`.
    pub weight: f64,
    /// Whether context tokens see what comes after them in the run over the thoughts.
    pub sight: Sight,
}

impl Transformer {
    /// Runs `layers` over the thoughts and, causally, over the plain stream, and gives the decoder
    /// of each context token `(1 - weight) · plain + weight · thoughts`: of its keys and values in
    /// every layer, which begin `cache`, and of the stream that leaves the last, which is returned.
    /// Plain tokens run causally over these keys and values. The run over the thoughts is that of the
    /// [`thinker`](Transformer::thinker), all else the decoder's own. Mixing is done in `f32` (Bitune,
    /// Kopiczko et al. 2024). What a narrow cache will hold is rounded before plain tokens attend to
    /// it, as the tokens after them will.
    ///
    /// At weight 0 this is the causal pass over the plain stream and nothing else, at 1 the
    /// bidirectional one over the thoughts (a prefix-LM; GritLM's document caching).
    ///
    /// # Errors
    /// As [`Transformer::forward`]; [`Error::Parameter`] for a weight outside its range, streams of
    /// different shape, or a cache that is not empty in `layers`.
    pub fn hand_over(
        &self,
        what: &HandOver<'_>,
        layers: Range<usize>,
        layout: &Layout,
        cache: Option<&mut KvCache>,
    ) -> Result<Tensor> {
        let HandOver { plain, z, weight, sight } = *what;
        if !(0.0..=1.0).contains(&weight) {
            return Err(Error::parameter("weight", "a share in [0, 1]", weight));
        }
        if plain.dims() != z.dims() {
            let expected = format!("thoughts {:?} like the plain stream", plain.dims());
            return Err(Error::parameter("z", expected, format!("{:?}", z.dims())));
        }
        if weight == 0.0 {
            let pass = cache.map_or(Pass::Causal(layout), Pass::Cached);
            return self.forward(plain, layers, pass);
        }
        self.check_layers(&layers)?;
        if weight == 1.0 && self.thinker.is_none() && cache.is_none() {
            return in_pool(|| self.uncached(&self.layers[layers], z, layout, sight));
        }
        let thought = self.view(z, layout, sight)?;
        let mut keep = Keep::new(self, &layers, layout, cache)?;
        if weight == 1.0 && self.thinker.is_none() {
            let mut xs = z.clone();
            for index in layers {
                let mut new = None;
                xs = self.run(index, &xs, &thought, keep.dtype(), &mut new)?;
                keep.layer(index, new)?;
            }
            return Ok(xs);
        }

        let mix = |plain: &Tensor, thought: &Tensor| -> Result<Tensor> {
            let (a, b) = (plain.to_dtype(DType::F32)?, thought.to_dtype(DType::F32)?);
            Ok(((a * (1.0 - weight))? + (b * weight)?)?.to_dtype(plain.dtype())?)
        };
        let causal = self.view(plain, layout, Sight::Causal)?;
        let tail = Tail::new(self, layout, plain)?;
        let (mut a, mut b) = (plain.clone(), z.clone());
        // What the plain tokens make of the mixture: a stream of its own.
        let mut own = tail.of(plain, 1)?;
        // Of a mixture, it is the mixture that is kept, and not what is mixed.
        let kept_as = if weight < 1.0 { None } else { keep.dtype() };
        for index in layers {
            let (mut keys_a, mut keys_b, mut handed) = (None, None, None);
            if weight < 1.0 {
                a = self.run(index, &a, &causal, None, &mut keys_a)?;
            }
            b = self.thinker().run(index, &b, &thought, kept_as, &mut keys_b)?;
            let Some(keys_b) = keys_b else { continue };
            let mixed = match keys_a {
                Some(keys_a) => keys_a.zip(&keys_b, mix)?,
                None => keys_b,
            };
            if let Some(view) = &tail.view {
                own = self.layers[index].forward(&own, view, |new| {
                    let all = mixed.zip(&new, |mixed, new| tail.put(mixed, new, 2))?;
                    let all = rounded(all, keep.dtype())?;
                    handed = Some(all.clone());
                    Ok(all)
                })?;
            } else {
                handed = Some(mixed);
            }
            keep.layer(index, handed)?;
        }
        let left = if weight < 1.0 { mix(&a, &b)? } else { b };
        tail.put(&left, &own, 1)
    }

    /// One block over `xs`, its keys and values laid aside; rounded, if they are to be kept so.
    fn run(
        &self,
        index: usize,
        xs: &Tensor,
        view: &View,
        kept_as: Option<DType>,
        aside: &mut Option<KeyValues>,
    ) -> Result<Tensor> {
        self.layers[index].forward(xs, view, |new| {
            let new = rounded(new, kept_as)?;
            *aside = Some(new.clone());
            Ok(new)
        })
    }
}

/// As a cache of this type will hold them; without one, as they are.
fn rounded(all: KeyValues, kept_as: Option<DType>) -> Result<KeyValues> {
    match kept_as {
        Some(dtype) => all.rounded(dtype),
        None => Ok(all),
    }
}

/// Where the keys and values go.
struct Keep<'a>(Option<&'a mut KvCache>);

impl<'a> Keep<'a> {
    fn new(
        transformer: &Transformer,
        layers: &Range<usize>,
        layout: &Layout,
        cache: Option<&'a mut KvCache>,
    ) -> Result<Self> {
        if let Some(cache) = &cache {
            cache.check_owner(transformer.id)?;
            check_batch(cache.layout().batch(), layout.batch())?;
            if cache.layout().starts() != layout.starts() {
                let (expected, got) = (cache.layout().starts(), layout.starts());
                let expected = format!("rows that begin at {expected:?}, as in the cache");
                return Err(Error::parameter("layout", expected, format!("{got:?}")));
            }
            cache.check_room(layers, layout.seq())?;
            let held = cache.position(layers)?;
            if held > 0 {
                let got = format!("{held} positions in it; truncate these layers first");
                return Err(Error::parameter("cache", "an empty one to hand over to", got));
            }
        }
        Ok(Self(cache))
    }

    fn dtype(&self) -> Option<DType> {
        self.0.as_ref().map(|cache| cache.dtype())
    }

    fn layer(&mut self, index: usize, all: Option<KeyValues>) -> Result<()> {
        match (&mut self.0, all) {
            (Some(cache), Some(all)) => cache.layer(index)?.fill(&all),
            _ => Ok(()),
        }
    }
}

/// The slots from the first plain token of any row on, which is mostly the last token alone.
struct Tail {
    start: usize,
    /// Who sees whom when these slots run causally; `None` without plain tokens.
    view: Option<View>,
    /// `1` where a slot is context after all: `(batch, slots)`.
    thinks: Tensor,
}

impl Tail {
    fn new(transformer: &Transformer, layout: &Layout, xs: &Tensor) -> Result<Self> {
        let (seq, starts, thinks) = (layout.seq(), layout.starts(), layout.thinks());
        let first_plain = |(thinks, &start): (&Vec<u8>, &usize)| {
            thinks.iter().skip(start).position(|&thinks| thinks == 0).map(|at| start + at)
        };
        let start = thinks.iter().zip(&starts).filter_map(first_plain).min().unwrap_or(seq);
        let thinks = Tensor::new(thinks, xs.device())?.narrow(1, start, seq - start)?;
        let view = match start < seq {
            true => Some(View {
                rotation: transformer.rope.at(start, seq - start, &starts)?,
                mask: Arc::new(Mask::new(
                    layout,
                    Sight::Causal,
                    start..seq,
                    0,
                    transformer.config.sliding_window,
                )),
            }),
            false => None,
        };
        Ok(Self { start, view, thinks })
    }

    /// The tail's slots of `xs`, which count along `dim`.
    fn of(&self, xs: &Tensor, dim: usize) -> Result<Tensor> {
        Ok(xs.narrow(dim, self.start, xs.dim(dim)? - self.start)?)
    }

    /// `xs` with `own` in the place of its plain tokens; slots count along `dim` in both.
    fn put(&self, xs: &Tensor, own: &Tensor, dim: usize) -> Result<Tensor> {
        if self.view.is_none() {
            return Ok(xs.clone());
        }
        let mut shape = vec![1; xs.rank()];
        (shape[0], shape[dim]) = self.thinks.dims2()?;
        let thinks = self.thinks.reshape(shape)?.broadcast_as(own.shape())?;
        let tail = thinks.where_cond(&self.of(xs, dim)?, own)?;
        Ok(Tensor::cat(&[&xs.narrow(dim, 0, self.start)?, &tail], dim)?)
    }
}
