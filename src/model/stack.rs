//! A stack of blocks, and the passes through it.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use candle_core::{DType, Device, Tensor};

use super::block::Block;
use super::context::{BlockContext, ForwardContext, Pass, SideSignal};
use super::kv_cache::{CHUNK, KvCache, Open};
use super::linear::Linear;
use super::mask::{Mask, Sight};
use super::mlp::SideProjection;
use super::rope::{Rope, Turn};
use super::side::{Attached, SideSource};
use super::tap::{Site, Tap};
use super::weights::Weights;
use crate::batch::{Batch, flat};
use crate::cancel::Cancel;
use crate::config::{Config, ROUTER};
use crate::error::{Error, Result};
use crate::kernels::Compute;

/// A stack of transformer blocks: what turns one residual stream into another.
///
/// A [`Transformer`](super::Transformer) is one with an embedding table below and a vocabulary head
/// above.
#[derive(Clone, Debug)]
pub struct Stack {
    /// Tells this stack's caches from all others of the process.
    id: u64,
    blocks: Vec<Block>,
    rope: Arc<Rope>,
    hidden_size: usize,
    window: Option<usize>,
    most_positions: usize,
    side_source: Option<Attached>,
}

/// What the pieces of a pass have in common.
struct Running<'p> {
    layers: Range<usize>,
    sight: Sight,
    side: Option<&'p SideSignal>,
    cancel: Option<&'p Cancel>,
    one_by_one: bool,
}

/// The tap of a pass.
type Onlooker<'p> = Option<&'p mut dyn Tap>;

impl Stack {
    /// `count` blocks, whose weights are `{prefix}.{0, 1, ..}.*`, with a stream of type `dtype`.
    ///
    /// # Errors
    /// A weight that is missing or of another shape.
    pub(crate) fn new(
        config: &Config,
        prefix: &str,
        count: usize,
        (dtype, device): (DType, &Device),
        weights: &mut impl Weights,
    ) -> Result<Self> {
        let block = |index| Block::new(config, &format!("{prefix}.{index}"), dtype, weights);
        Ok(Self {
            id: next_id(),
            blocks: (0..count).map(block).collect::<Result<_>>()?,
            rope: Arc::new(Rope::new(config, dtype, device)?),
            hidden_size: config.hidden_size,
            window: config.sliding_window,
            most_positions: config.max_position_embeddings,
            side_source: None,
        })
    }

    /// How many blocks there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.blocks.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.blocks.is_empty()
    }

    /// Runs `layers` over the residual stream `xs`; see
    /// [`Transformer::forward`](super::Transformer::forward).
    ///
    /// # Errors
    /// As [`Transformer::forward`](super::Transformer::forward).
    pub fn forward<'a>(
        &self,
        xs: &Tensor,
        layers: Range<usize>,
        context: impl Into<ForwardContext<'a>>,
    ) -> Result<Tensor> {
        let context = context.into();
        in_pool(|| self.run(xs, layers, context))
    }

    fn run(
        &self,
        xs: &Tensor,
        layers: Range<usize>,
        context: ForwardContext<'_>,
    ) -> Result<Tensor> {
        let ForwardContext { pass, side, tap, cancel, one_by_one } = context;
        let tokens = self.check_stream(xs)?;
        self.check_layers(&layers)?;
        let continues =
            matches!(pass, Pass::Cached(_) | Pass::Remembered { sight: Sight::Causal, .. });
        if one_by_one && !continues {
            let expected = "a causal one over caches, for tokens that go one by one";
            return Err(Error::parameter("pass", expected, "another"));
        }
        if layers.is_empty() {
            return Ok(xs.clone());
        }
        let looked_up = match &self.side_source {
            Some(attached) => attached.signal(&layers, &pass)?,
            None => None,
        };
        let side = match (side, &looked_up) {
            (Some(_), Some(_)) => {
                let expected = "none where it is looked up by tokens";
                return Err(Error::parameter("side signal", expected, "one of the caller's"));
            }
            (side, looked_up) => side.or(looked_up.as_ref()),
        };
        if let Some(side) = side {
            for (layer, block) in layers.clone().zip(&self.blocks[layers.clone()]) {
                match side.width(layer, tokens)? {
                    0 => (),
                    width => block.check_side(width)?,
                }
            }
        }
        let mut running = Running { layers, sight: Sight::Causal, side, cancel, one_by_one };
        let flat = flat(xs)?; // (tokens, hidden)
        let ys = match pass {
            Pass::Causal(batch) => self.uncached(&flat, batch, &running, tap)?,
            Pass::Bidirectional(batch) => {
                running.sight = Sight::Bidirectional;
                self.uncached(&flat, batch, &running, tap)?
            }
            Pass::Cached(cache) => {
                self.cached(&flat, &Batch::one(tokens)?, &mut [cache], &running, tap)?
            }
            Pass::Remembered { batch, sight, mut caches } => {
                running.sight = sight;
                self.cached(&flat, batch, &mut caches, &running, tap)?
            }
        };
        Ok(ys.reshape(xs.shape())?)
    }

    /// All sequences at once, each seeing only itself.
    fn uncached(
        &self,
        xs: &Tensor,
        batch: &Batch,
        running: &Running<'_>,
        mut tap: Onlooker<'_>,
    ) -> Result<Tensor> {
        batch.check(xs)?;
        let ends = batch.ends();
        for end in &ends {
            self.check_context(*end)?;
        }
        let context = BlockContext {
            rotation: self.rope.at(batch, &ends)?,
            mask: Mask::new(batch, running.sight, self.window)?,
            rows: 0..batch.tokens(),
            caches: None,
            side: running.side,
            tap: tap.as_mut().map(|tap| &mut **tap as &mut dyn Tap),
            layer: 0,
        };
        self.blocks(xs, context, running)
    }

    /// Sequences that continue from their caches: causally in chunks, bidirectionally all at once.
    fn cached(
        &self,
        xs: &Tensor,
        batch: &Batch,
        caches: &mut [&mut KvCache],
        running: &Running<'_>,
        mut tap: Onlooker<'_>,
    ) -> Result<Tensor> {
        batch.check(xs)?;
        if caches.len() != batch.sequences() {
            let expected = format!("one for each of {} sequences", batch.sequences());
            return Err(Error::parameter("caches", expected, caches.len()));
        }
        // Everything is checked before anything is added.
        let mut batch = batch.clone();
        for (sequence, cache) in caches.iter().enumerate() {
            cache.check_owner(self.id)?;
            let (first, new) = (cache.position(&running.layers)?, batch.rows(sequence).len());
            cache.check_room(&running.layers, new)?;
            self.check_context(first.saturating_add(new))?;
            batch = batch.starting_at(sequence, first)?;
        }
        let ends = batch.ends();
        let piece = |rows: Range<usize>| (rows.clone(), batch.piece(&rows));
        let pieces: Vec<_> = match running.sight {
            Sight::Causal if batch.tokens() > CHUNK => {
                batch.cuts(CHUNK).into_iter().map(piece).collect()
            }
            _ => vec![(0..batch.tokens(), (batch.clone(), 0..batch.sequences()))],
        };
        let needed = pieces.iter().map(|(_, (piece, which))| (which.clone(), piece.lengths()));
        let needed: Vec<_> = needed.collect();
        let mut open = Open::begin(caches, &running.layers, &needed)?;
        let mut chunks = Vec::new();
        for (rows, (piece, which)) in pieces {
            open.reserve(&which, &piece.lengths())?;
            let oldest = open.oldest(&which);
            let mask = Mask::with_past(&piece, running.sight, self.window, &oldest)?;
            let (rotation, mask) = if running.one_by_one {
                let each = piece.one_by_one();
                (self.rope.at(&each, &each.ends())?, mask.one_by_one())
            } else {
                (self.rope.at(&piece, ends.get(which.clone()).unwrap_or_default())?, mask)
            };
            let context = BlockContext {
                rotation,
                mask,
                rows: rows.clone(),
                caches: Some((&mut open, which)),
                side: running.side,
                tap: tap.as_mut().map(|tap| &mut **tap as &mut dyn Tap),
                layer: 0,
            };
            chunks.push(self.blocks(&xs.narrow(0, rows.start, rows.len())?, context, running)?);
        }
        open.commit();
        match chunks.as_slice() {
            [only] => Ok(only.clone()),
            chunks => Ok(Tensor::cat(chunks, 0)?),
        }
    }

    fn blocks(
        &self,
        xs: &Tensor,
        mut context: BlockContext<'_, '_, '_>,
        running: &Running<'_>,
    ) -> Result<Tensor> {
        let mut xs = xs.clone();
        for (layer, block) in running.layers.clone().zip(&self.blocks[running.layers.clone()]) {
            running.cancel.map_or(Ok(()), Cancel::check)?;
            context.layer = layer;
            context.show(Site::Input, &xs)?;
            xs = block.forward(&xs, &mut context)?;
            context.show(Site::Output, &xs)?;
        }
        Ok(xs)
    }

    /// The same blocks and tensors under an id of its own, for `change` to alter: its keys and values
    /// will differ, too.
    pub(crate) fn variant(&self) -> Self {
        Self { id: next_id(), ..self.clone() }
    }

    /// Computes products as exactly as this says; but those of a router, where rounding sends tokens
    /// elsewhere, in `f32`.
    pub(crate) fn set_compute(&mut self, compute: Compute) {
        let projections = self.blocks.iter_mut().flat_map(Block::projections_mut);
        for (_, linear) in projections.filter(|(name, _)| *name != ROUTER) {
            linear.set_compute(compute);
        }
    }

    /// What takes keys from their positions to as many from `to` on.
    pub(super) fn turn(&self, from: &Range<usize>, to: usize) -> Result<Turn> {
        self.rope.turn(from, to)
    }

    pub(super) fn id(&self) -> u64 {
        self.id
    }

    /// Bytes of its matrices by type.
    pub(crate) fn weight_bytes(&self) -> BTreeMap<String, usize> {
        let mut bytes = BTreeMap::new();
        // On a clone, which shares all tensors: the one list of projections lends them mutably.
        for (_, linear) in self.blocks.clone().iter_mut().flat_map(Block::projections_mut) {
            linear.count_bytes(&mut bytes);
        }
        bytes
    }

    /// The projection called `0.self_attn.q_proj` or the like.
    pub(super) fn projection_mut(&mut self, name: &str) -> Option<&mut Linear> {
        let (layer, name) = name.split_once('.')?;
        let index: usize = layer.parse().ok()?;
        if index.to_string() != layer {
            return None; // 00 would be the same projection under a second name
        }
        let mut all = self.blocks.get_mut(index)?.projections_mut();
        all.find(|(own, _)| *own == name).map(|(_, linear)| linear)
    }

    pub(super) fn set_side(&mut self, layer: usize, side: Option<SideProjection>) -> Result<()> {
        let layers = self.blocks.len();
        match self.blocks.get_mut(layer) {
            Some(block) => block.set_side(side),
            None => Err(Error::parameter("layer", format!("less than {layers}"), layer)),
        }
    }

    pub(super) fn attach(
        &mut self,
        source: Arc<dyn SideSource>,
        columns: BTreeMap<usize, SideProjection>,
    ) -> Result<()> {
        if self.side_source.is_some() {
            let expected = "one without any";
            return Err(Error::parameter("transformer", expected, "one with a side source"));
        }
        let layers = columns.keys().copied().collect();
        for (layer, side) in columns {
            self.set_side(layer, Some(side))?;
        }
        self.side_source = Some(Attached { source, layers });
        Ok(())
    }

    pub(super) fn has_side_source(&self) -> bool {
        self.side_source.is_some()
    }

    /// The norm before the feed-forward half of a layer, over the stream after its attention.
    pub(super) fn feed_forward_input(&self, layer: usize, xs: &Tensor) -> Result<Tensor> {
        self.check_stream(xs)?;
        let layers = self.blocks.len();
        match self.blocks.get(layer) {
            Some(block) => block.feed_forward_input(xs),
            None => Err(Error::parameter("layer", format!("less than {layers}"), layer)),
        }
    }

    fn check_layers(&self, layers: &Range<usize>) -> Result<()> {
        if layers.start <= layers.end && layers.end <= self.blocks.len() {
            return Ok(());
        }
        let expected = format!("a range within 0..{}", self.blocks.len());
        Err(Error::parameter("layers", expected, format!("{layers:?}")))
    }

    /// The tokens of a residual stream `(.., hidden)`.
    pub(super) fn check_stream(&self, xs: &Tensor) -> Result<usize> {
        match xs.dims() {
            [leading @ .., hidden] if !leading.is_empty() && *hidden == self.hidden_size => {
                match leading.iter().product() {
                    0 => Err(Error::EmptyPrompt),
                    tokens => Ok(tokens),
                }
            }
            got => {
                let expected = format!("a stream (tokens, {})", self.hidden_size);
                Err(Error::parameter("xs", expected, format!("{got:?}")))
            }
        }
    }

    /// Refuses more positions than the model was trained for.
    pub(crate) fn check_context(&self, requested: usize) -> Result<()> {
        let capacity = self.most_positions;
        if requested > capacity {
            return Err(Error::ContextFull { of: "the model", capacity, requested });
        }
        Ok(())
    }
}

/// Runs `work` on a thread of rayon's pool: from outside, each of its many small parallel steps would
/// wait for a thread of the pool to take it.
pub(super) fn in_pool<T: Send>(work: impl FnOnce() -> T + Send) -> T {
    rayon::scope(|_| work())
}

fn next_id() -> u64 {
    static NEXT_ID: AtomicU64 = AtomicU64::new(0);
    NEXT_ID.fetch_add(1, Ordering::Relaxed)
}
