//! What a pass carries with it: who sees whom, what is remembered, and who looks on.

use std::collections::BTreeMap;
use std::ops::Range;

use candle_core::Tensor;

use super::kv_cache::{KvCache, Open, Remembered};
use super::linear::Linear;
use super::mask::{Mask, Sight};
use super::rope::Rotation;
use super::tap::{Attended, Site, Tap};
use crate::batch::Batch;
use crate::cancel::Cancel;
use crate::error::{Error, Result};

/// Who sees whom in a forward pass, and what of it is remembered.
#[derive(Debug)]
pub enum Pass<'a> {
    /// Every token sees itself and what came before it in its sequence, within this pass. Nothing is
    /// remembered.
    Causal(&'a Batch),
    /// A thought pass: inside each context segment every token sees every other; plain tokens
    /// stay causal. Nothing is remembered.
    Bidirectional(&'a Batch),
    /// Causal, for one sequence that continues from what its cache holds; the new tokens are added to
    /// it. New tokens are run in chunks, so a long prompt needs no more memory than a short one.
    /// Gradients flow through all new tokens; what the cache already holds is a constant to them.
    Cached(&'a mut KvCache),
    /// The same for several sequences side by side, or in both directions.
    Remembered {
        /// The new tokens of each sequence, with the context segments among them. Positions are those of
        /// the caches.
        batch: &'a Batch,
        /// Whether context tokens see what comes after them; if so, all new tokens run in one piece.
        sight: Sight,
        /// One for each sequence.
        caches: Vec<&'a mut KvCache>,
    },
}

impl<'a> Pass<'a> {
    /// Whether context tokens see what comes after them.
    pub(crate) fn is_bidirectional(&self) -> bool {
        matches!(
            self,
            Self::Bidirectional(_) | Self::Remembered { sight: Sight::Bidirectional, .. }
        )
    }

    /// A pass of which nothing is remembered.
    #[must_use]
    pub fn uncached(batch: &'a Batch, sight: Sight) -> Self {
        match sight {
            Sight::Causal => Self::Causal(batch),
            Sight::Bidirectional => Self::Bidirectional(batch),
        }
    }
}

/// A [`Pass`] with what else a caller may add: a [side signal](SideSignal), a [tap](Tap), a way to
/// [cancel](Cancel) it, tokens that go [one by one](ForwardContext::one_by_one). A plain pass has none of these.
///
/// ```
/// # use candle_core::Device;
/// use hybrid_attention::model::{Batch, ForwardContext, Pass, Site, Tap};
/// use hybrid_attention::{HybridModel, Result};
/// use candle_core::Tensor;
///
/// /// The length of what leaves each layer.
/// struct Norms(Vec<f32>);
///
/// impl Tap for Norms {
///     fn residual(&mut self, _layer: usize, site: Site, xs: &Tensor) -> Result<()> {
///         if site == Site::Output {
///             self.0.push(xs.sqr()?.sum_all()?.sqrt()?.to_scalar::<f32>()?);
///         }
///         Ok(())
///     }
/// }
/// # fn main() -> Result<()> {
/// let model = HybridModel::tiny(&Device::Cpu)?;
/// let (transformer, batch) = (model.transformer(), Batch::one(3)?);
/// let xs = transformer.embed_ids(&[11, 150, 12])?;
/// let mut norms = Norms(Vec::new());
/// let context = ForwardContext::from(Pass::Causal(&batch)).tap(&mut norms);
/// transformer.forward(&xs, 0..2, context)?;
/// assert_eq!(norms.0.len(), 2);
/// # Ok(())
/// # }
/// ```
pub struct ForwardContext<'a> {
    pub(super) pass: Pass<'a>,
    pub(super) side: Option<&'a SideSignal>,
    pub(super) tap: Option<&'a mut dyn Tap>,
    pub(super) cancel: Option<&'a Cancel>,
    pub(super) one_by_one: bool,
}

impl<'a> From<Pass<'a>> for ForwardContext<'a> {
    fn from(pass: Pass<'a>) -> Self {
        Self { pass, side: None, tap: None, cancel: None, one_by_one: false }
    }
}

impl<'a> ForwardContext<'a> {
    /// With a side signal.
    #[must_use]
    pub fn side(mut self, side: &'a SideSignal) -> Self {
        self.side = Some(side);
        self
    }

    /// With something that looks on.
    #[must_use]
    pub fn tap(mut self, tap: &'a mut dyn Tap) -> Self {
        self.tap = Some(tap);
        self
    }

    /// With a way to stop it.
    #[must_use]
    pub fn cancel(mut self, cancel: &'a Cancel) -> Self {
        self.cancel = Some(cancel);
        self
    }

    /// With each token computed as decoding computes it, after those before it and one by one: on the CPU, the
    /// numbers of up to 16 tokens are then, to the last bit, those of as many passes of one token. For a causal pass
    /// over caches; attention over many keys takes longer so. Default: several tokens of a sequence share the keys
    /// that they read, and round differently from one.
    ///
    /// ```
    /// # use candle_core::Device;
    /// use hybrid_attention::HybridModel;
    /// use hybrid_attention::model::{ForwardContext, Pass};
    ///
    /// # fn main() -> hybrid_attention::Result<()> {
    /// let model = HybridModel::tiny(&Device::Cpu)?;
    /// let transformer = model.transformer();
    /// let (layers, ids) = (transformer.all_layers(), [11, 150, 12]);
    ///
    /// let mut cache = transformer.new_cache(64)?;
    /// let together = ForwardContext::from(Pass::Cached(&mut cache)).one_by_one();
    /// let together = transformer.forward(&transformer.embed_ids(&ids)?, layers.clone(), together)?;
    ///
    /// let mut cache = transformer.new_cache(64)?;
    /// for (row, id) in ids.into_iter().enumerate() {
    ///     let xs = transformer.embed_ids(&[id])?;
    ///     let alone = transformer.forward(&xs, layers.clone(), Pass::Cached(&mut cache))?;
    ///     assert_eq!(alone.to_vec2::<f32>()?, together.narrow(0, row, 1)?.to_vec2::<f32>()?);
    /// }
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn one_by_one(mut self) -> Self {
        self.one_by_one = true;
        self
    }
}

impl std::fmt::Debug for ForwardContext<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ForwardContext")
            .field("pass", &self.pass)
            .field("side", &self.side)
            .field("tap", &self.tap.is_some())
            .field("cancel", &self.cancel)
            .field("one_by_one", &self.one_by_one)
            .finish()
    }
}

/// What goes into the MLPs of some layers beside the residual stream: for each of those layers a tensor
/// `(tokens, width)`, one row for each row of the pass. There the MLP reads `[context ; side]`, through
/// its [`SideProjection`](super::SideProjection)s. A mixture of experts reads none.
#[derive(Clone, Debug, Default)]
pub struct SideSignal {
    layers: BTreeMap<usize, Tensor>,
}

impl SideSignal {
    /// No signal.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// With `(tokens, width)` for one layer, replacing any signal there. A width of 0 removes it.
    #[must_use]
    pub fn layer(mut self, layer: usize, signal: Tensor) -> Self {
        self.layers.insert(layer, signal);
        self
    }

    /// The signal for a layer.
    #[must_use]
    pub fn get(&self, layer: usize) -> Option<&Tensor> {
        self.layers.get(&layer)
    }

    /// The width of the signal for a layer.
    ///
    /// # Errors
    /// [`Error::Parameter`] for a signal that does not have one row for each of `tokens`.
    pub(super) fn width(&self, layer: usize, tokens: usize) -> Result<usize> {
        match self.get(layer).map(Tensor::dims) {
            None => Ok(0),
            Some(&[rows, width]) if rows == tokens => Ok(width),
            Some(got) => {
                let expected = format!("(tokens, width), a row for each of {tokens}");
                Err(Error::parameter("side signal", expected, format!("{got:?}")))
            }
        }
    }
}

/// What a block is handed: all that it shares with the other blocks of a pass.
pub(super) struct BlockContext<'p, 'a, 'c> {
    pub(super) rotation: Rotation,
    pub(super) mask: Mask,
    /// Which rows of the pass run now.
    pub(super) rows: Range<usize>,
    pub(super) caches: Option<(&'p mut Open<'a, 'c>, Range<usize>)>,
    pub(super) side: Option<&'p SideSignal>,
    pub(super) tap: Option<&'p mut dyn Tap>,
    /// The layer that runs now.
    pub(super) layer: usize,
}

impl BlockContext<'_, '_, '_> {
    /// What the queries attend to, given the keys and values of the new tokens,
    /// `(kv_heads, tokens, head_dim)` each: everything that the caches hold, these included, or only
    /// these.
    pub(super) fn remember(&mut self, keys: Tensor, values: Tensor) -> Result<Remembered> {
        match &mut self.caches {
            Some((open, which)) => open.remember(self.layer, which, (&keys, &values), &self.mask),
            None => Ok(Remembered::Packed(keys, values)),
        }
    }

    /// The side signal of this layer, `(tokens, width)`.
    pub(super) fn side(&self) -> Result<Option<Tensor>> {
        let signal = self.side.and_then(|side| side.get(self.layer));
        let rows = |signal: &Tensor| signal.narrow(0, self.rows.start, self.rows.len());
        let signal = signal.filter(|signal| signal.elem_count() > 0);
        Ok(signal.map(rows).transpose()?)
    }

    /// Shows the residual stream to the tap.
    pub(super) fn show(&mut self, site: Site, xs: &Tensor) -> Result<()> {
        match &mut self.tap {
            Some(tap) => tap.residual(self.layer, site, xs),
            None => Ok(()),
        }
    }

    /// Shows what attention computes to the tap, with the context and what projects it.
    pub(super) fn show_attention(
        &mut self,
        q: &Tensor,
        remembered: &Remembered,
        projected: (&Tensor, &Linear),
    ) -> Result<()> {
        match &mut self.tap {
            Some(tap) => {
                let attended = Attended::new(q, remembered, projected, &self.mask);
                tap.attention(self.layer, &attended)
            }
            None => Ok(()),
        }
    }
}
