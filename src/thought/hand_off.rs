//! The thoughts handed to the decoder.

use std::ops::Range;

use candle_core::{DType, Tensor};

use super::{EncodedBatch, HandOff, ThoughtLoop, Thoughts};
use crate::error::{Error, Result};
use crate::model::{Batch, KvCache, Pass, Sight, Transformer, flat};

/// Where the decoder continues: a stream that it reads causally, and the layers that have yet to run.
#[derive(Clone, Debug)]
pub struct Entry {
    /// `(tokens, hidden)`: the stream that enters the first of `layers`.
    pub xs: Tensor,
    /// What has yet to run.
    pub layers: Range<usize>,
}

impl ThoughtLoop {
    /// Hands thoughts off and gives the stream that leaves the last layer, `(tokens, hidden)`.
    /// For decoding, `pass` is the causal one over the cache that [`encode`](Self::encode) began to
    /// fill. A bidirectional one, for embedding, is run by the
    /// [thinker](super::ThoughtModel::thinker).
    ///
    /// # Errors
    /// As [`Transformer::forward`](crate::model::Transformer::forward) and [`enter`](Self::enter).
    pub fn hand_off(
        &self,
        text: &EncodedBatch,
        thoughts: &Thoughts,
        mut pass: Pass<'_>,
    ) -> Result<Tensor> {
        let Entry { xs, layers } = match &mut pass {
            Pass::Cached(cache) => self.enter(text, thoughts, Some(&mut [&mut **cache]))?,
            Pass::Remembered { caches, .. } => self.enter(text, thoughts, Some(caches))?,
            Pass::Causal(_) | Pass::Bidirectional(_) => self.enter(text, thoughts, None)?,
        };
        self.reader(&pass).forward(&xs, layers, self.cancellable(self.over(text, pass)))
    }

    /// The states that enter `layer` when a text is read and not thought about, `(tokens, hidden)`.
    pub(crate) fn read(&self, text: &EncodedBatch, layer: usize, pass: Pass<'_>) -> Result<Tensor> {
        match layer {
            0 => Ok(text.embeddings.clone()),
            _ => {
                let reader = self.reader(&pass);
                let context = self.cancellable(self.over(text, pass));
                reader.forward(&text.embeddings, 0..layer, context)
            }
        }
    }

    fn reader(&self, pass: &Pass<'_>) -> &Transformer {
        match pass.is_bidirectional() {
            true => self.model.thinker(),
            false => self.model.decoder(),
        }
    }

    /// The part of [`hand_off`](Self::hand_off) that needs the whole text at once: returns the stream
    /// that continues causally, which may be cut into pieces, and the layers that it has yet to run.
    /// `caches`, one for each sequence, are those that [`encode`](Self::encode) began to fill.
    ///
    /// [`HandOff::Refined`] does nothing here: the thoughts enter the span. [`HandOff::KeyValue`] and
    /// [`HandOff::Mixed`] run the span over the thoughts as they were thought, with the
    /// [thinker](super::ThoughtModel::thinker), and, causally, over the plain stream. For each context
    /// token the decoder gets `(1 - weight) · plain + weight · thoughts`: of the keys and values in
    /// every layer, which begin the cache, and of the stream that leaves the span. Plain tokens run
    /// causally over these keys and values. Mixing is done in `f32` (Bitune, Kopiczko et al. 2024). What
    /// a narrow cache will hold is rounded before anything attends to it.
    ///
    /// # Errors
    /// As [`Transformer::forward`](crate::model::Transformer::forward); [`Error::Parameter`] for a cache
    /// that is not empty in the layers of the span, or thoughts without a row for each token of the text.
    /// If it fails later, these layers of the caches are left empty.
    pub fn enter(
        &self,
        text: &EncodedBatch,
        thoughts: &Thoughts,
        caches: Option<&mut [&mut KvCache]>,
    ) -> Result<Entry> {
        let (span, n) = (self.span(), self.model.decoder().all_layers().end);
        for thoughts in [&thoughts.first, &thoughts.z] {
            text.batch().check(thoughts)?;
        }
        let weight = match self.thinking.hand_off {
            HandOff::KeyValue if !self.thinking.is_none() => 1.0,
            HandOff::Mixed { weight } if !self.thinking.is_none() => weight,
            _ => return Ok(Entry { xs: thoughts.z.clone(), layers: span.start..n }),
        };
        let layers = span.end..n;
        let Some(caches) = caches else {
            let xs = self.enter_uncached(text.batch(), thoughts, weight)?;
            return Ok(Entry { xs, layers });
        };
        for cache in caches.iter() {
            let held = cache.position(&span)?;
            if held > 0 {
                let got = format!("{held} positions in it; truncate these layers first");
                return Err(Error::parameter("cache", "an empty one to hand off to", got));
            }
        }
        caches.iter_mut().for_each(|cache| cache.keep_graph(true));
        let entered = self.enter_span(text.batch(), thoughts, weight, caches);
        caches.iter_mut().for_each(|cache| cache.keep_graph(false));
        if entered.is_err() {
            for cache in caches.iter_mut() {
                cache.truncate_layers(span.clone(), 0)?;
            }
        }
        Ok(Entry { xs: entered?, layers })
    }

    /// [`enter`](Self::enter) after thinking again: makes the cache of one sequence forget what depends
    /// on thoughts from position `changed` on, and returns the stream from the first forgotten position
    /// on. What layers before the span hold stays valid: no thought has entered them.
    ///
    /// # Errors
    /// As [`enter`](Self::enter); [`Error::Parameter`] for a position past the end of the text.
    pub fn enter_again(
        &self,
        text: &EncodedBatch,
        thoughts: &Thoughts,
        cache: &mut KvCache,
        changed: usize,
    ) -> Result<Entry> {
        let (Range { start: a, end: b }, n) = (self.span(), self.model.decoder().all_layers().end);
        let tokens = text.batch().tokens();
        if changed > tokens {
            let expected = format!("a position within the {tokens} tokens");
            return Err(Error::parameter("changed", expected, changed));
        }
        let from = match cache.truncate_layers(a..n, changed) {
            Err(Error::CacheRolled { .. }) => {
                // The window has dropped what would be needed: start over.
                cache.truncate_layers(a..n, 0)?;
                0
            }
            result => result.map(|()| changed)?,
        };
        if self.thinking.hand_off != HandOff::Refined {
            cache.truncate_layers(a..b, 0)?; // handed off whole
        }
        let Entry { xs, layers } = self.enter(text, thoughts, Some(&mut [cache]))?;
        let xs = flat(&xs)?;
        Ok(Entry { xs: xs.narrow(0, from, xs.dim(0)? - from)?, layers })
    }

    /// [`enter`](Self::enter) where nothing is to be remembered.
    fn enter_uncached(&self, batch: &Batch, thoughts: &Thoughts, weight: f64) -> Result<Tensor> {
        let (span, sight) = (self.span(), self.thinking.sight);
        let decoder = self.model.decoder();
        if weight == 0.0 {
            return decoder.forward(&thoughts.first, span, self.cancellable(Pass::Causal(batch)));
        }
        if weight == 1.0 && self.model.is_of_one_mind() {
            let pass = Pass::uncached(batch, sight);
            return decoder.forward(&thoughts.z, span, self.cancellable(pass));
        }
        let mut own = batch
            .lengths()
            .into_iter()
            .map(|len| Ok(decoder.new_cache(len.max(1))?.keeping_all()))
            .collect::<Result<Vec<_>>>()?;
        self.enter_span(batch, thoughts, weight, &mut own.iter_mut().collect::<Vec<_>>())
    }

    /// Runs the span into empty caches, and returns the stream that leaves it.
    fn enter_span(
        &self,
        batch: &Batch,
        thoughts: &Thoughts,
        weight: f64,
        caches: &mut [&mut KvCache],
    ) -> Result<Tensor> {
        let (span, sight, decoder) = (self.span(), self.thinking.sight, self.model.decoder());
        if weight == 0.0 {
            let caches = again(caches);
            let pass = Pass::Remembered { batch, sight: Sight::Causal, caches };
            return decoder.forward(&thoughts.first, span, self.cancellable(pass));
        }
        if weight == 1.0 && self.model.is_of_one_mind() {
            // Here plain tokens run causally anyway.
            let pass = Pass::Remembered { batch, sight, caches: again(caches) };
            return decoder.forward(&thoughts.z, span, self.cancellable(pass));
        }
        let (plain, z) = (flat(&thoughts.first)?, flat(&thoughts.z)?);
        // How plain tokens run over the mixture: a stream of its own.
        let (mut a, mut b, mut own) = (plain.clone(), z, plain);
        // With a mixture, the mixture is rounded and not its parts.
        let kept_as = caches.first().map_or(decoder.dtype(), |cache| cache.dtype());
        let kept_as = if weight < 1.0 { decoder.dtype() } else { kept_as };
        for layer in span {
            let causal = match weight < 1.0 {
                true => Some(Side::run(self, false, (&a, layer), batch, decoder.dtype())?),
                false => None,
            };
            let thought = Side::run(self, true, (&b, layer), batch, kept_as)?;
            let mut pieces = Vec::new();
            for (sequence, cache) in caches.iter_mut().enumerate() {
                let rows = batch.rows(sequence);
                for (run, thinks) in runs(batch.context(sequence), rows.len()) {
                    let of_stream = rows.start + run.start;
                    let own = own.narrow(0, of_stream, run.len())?;
                    if thinks {
                        let handed = thought.keys_and_values(sequence, layer, &run)?;
                        let handed = match &causal {
                            Some(causal) => {
                                let plain = causal.keys_and_values(sequence, layer, &run)?;
                                (
                                    mix(&plain.0, &handed.0, weight)?,
                                    mix(&plain.1, &handed.1, weight)?,
                                )
                            }
                            None => handed,
                        };
                        cache.extend(layer, &handed.0, &handed.1)?;
                        pieces.push(own); // replaced below, whatever it holds
                    } else {
                        let (batch, _) = batch.piece(&(of_stream..of_stream + run.len()));
                        let (sight, caches) = (Sight::Causal, vec![&mut **cache]);
                        let pass = Pass::Remembered { batch: &batch, sight, caches };
                        let pass = self.cancellable(pass);
                        pieces.push(decoder.forward(&own, layer..layer + 1, pass)?);
                    }
                }
            }
            own = Tensor::cat(&pieces, 0)?;
            if let Some(causal) = causal {
                a = causal.xs;
            }
            b = thought.xs;
        }
        let left = if weight < 1.0 { mix(&a, &b, weight)? } else { b };
        let left = crate::refine::Thinks(batch).or(&left, &own)?;
        Ok(left.reshape(thoughts.z.shape())?)
    }
}

/// One layer run over all sequences by the decoder or the thinker, with caches of its own.
struct Side {
    xs: Tensor,
    caches: Vec<KvCache>,
    dtype: DType,
}

impl Side {
    fn run(
        mind: &ThoughtLoop,
        thinks: bool,
        (xs, layer): (&Tensor, usize),
        batch: &Batch,
        kept_as: DType,
    ) -> Result<Self> {
        let (transformer, sight) = match thinks {
            true => (mind.model.thinker(), mind.thinking.sight),
            false => (mind.model.decoder(), Sight::Causal),
        };
        let pool = transformer.new_pool(kept_as, usize::MAX)?;
        let cache = |len: usize| Ok(pool.new_cache(len.max(1))?.keeping_all());
        let mut caches = batch.lengths().into_iter().map(cache).collect::<Result<Vec<_>>>()?;
        let xs = {
            let pass = Pass::Remembered { batch, sight, caches: caches.iter_mut().collect() };
            transformer.forward(xs, layer..layer + 1, mind.cancellable(pass))?
        };
        Ok(Self { xs, caches, dtype: transformer.dtype() })
    }

    fn keys_and_values(
        &self,
        sequence: usize,
        layer: usize,
        run: &Range<usize>,
    ) -> Result<(Tensor, Tensor)> {
        match self.caches.get(sequence) {
            Some(cache) => cache.keys_and_values(layer, run, self.dtype),
            None => Err(Error::parameter("sequence", "one of the batch", sequence)),
        }
    }
}

/// The same caches, reborrowed for another pass.
fn again<'a>(caches: &'a mut [&mut KvCache]) -> Vec<&'a mut KvCache> {
    caches.iter_mut().map(|cache| &mut **cache).collect()
}

/// A sequence of `len` tokens, as runs that think and runs that do not.
fn runs(context: &[Range<usize>], len: usize) -> Vec<(Range<usize>, bool)> {
    let (mut runs, mut at) = (Vec::new(), 0);
    for segment in context {
        runs.push((at..segment.start, false));
        runs.push((segment.clone(), true));
        at = segment.end;
    }
    runs.push((at..len, false));
    runs.retain(|(run, _)| !run.is_empty());
    runs
}

/// `(1 - weight) · plain + weight · thought`, in `f32`.
fn mix(plain: &Tensor, thought: &Tensor, weight: f64) -> Result<Tensor> {
    let (a, b) = (plain.to_dtype(DType::F32)?, thought.to_dtype(DType::F32)?);
    Ok(((a * (1.0 - weight))? + (b * weight)?)?.to_dtype(plain.dtype())?)
}
