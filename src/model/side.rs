//! What a transformer looks up by the tokens of a pass.

use std::fmt::Debug;
use std::ops::Range;
use std::sync::Arc;

use super::context::{Pass, SideSignal};
use super::mask::Sight;
use crate::batch::Batch;
use crate::error::{Error, Result};

/// Something that brings a [`SideSignal`] by the tokens of a pass, as a dictionary does. A transformer that has one
/// asks it in every pass: see [`Transformer::with_side_source`](super::Transformer::with_side_source).
///
/// What it says of a row may depend on the tokens that the row [sees](Seen::sees) and on nothing else. Then cached
/// decoding is full recomputation, and a sequence is the same whatever runs beside it.
///
/// ```
/// # use std::collections::BTreeMap;
/// # use std::ops::Range;
/// # use std::sync::Arc;
/// # use candle_core::{Device, Tensor};
/// use hybrid_attention::model::{Batch, Linear, Pass, Seen, SideProjection, SideSignal, SideSource};
/// # use hybrid_attention::{HybridModel, Result};
///
/// /// How often each token has occurred.
/// #[derive(Debug)]
/// struct Counts;
///
/// impl SideSource for Counts {
///     fn signal(&self, texts: &[Seen<'_>], _: Range<usize>) -> Result<SideSignal> {
///         let of = |(ids, at): (&[u32], usize)| {
///             let (seen, own) = (ids.get(..=at).unwrap_or(&[]), ids.get(at));
///             seen.iter().filter(|id| Some(*id) == own).count() as f32
///         };
///         let counts = texts.iter().flat_map(|text| text.rows().map(|at| of((text.ids(), at))));
///         let counts: Vec<f32> = counts.collect();
///         let rows = counts.len();
///         Ok(SideSignal::new().layer(1, Tensor::from_vec(counts, (rows, 1), &Device::Cpu)?))
///     }
/// }
/// # fn main() -> Result<()> {
/// let model = HybridModel::tiny(&Device::Cpu)?;
/// let column = || Linear::dense(&Tensor::full(0.1f32, (384, 1), &Device::Cpu)?);
/// let columns = BTreeMap::from([(1, SideProjection { gate: column()?, up: column()? })]);
/// let counting = model.transformer().with_side_source(Arc::new(Counts), columns)?;
///
/// let ids = [11, 150, 11];
/// let (xs, batch) = (counting.embed_ids(&ids)?, Batch::one(3)?.with_ids(&ids)?);
/// let h = counting.forward(&xs, 0..4, Pass::Causal(&batch))?; // (3, 128)
/// assert!(counting.forward(&xs, 0..4, Pass::Causal(&Batch::one(3)?)).is_err()); // of which tokens?
/// # let _ = h;
/// # Ok(())
/// # }
/// ```
pub trait SideSource: Debug + Send + Sync {
    /// The signal of these layers: in each of them, if any, a row for each row of all `texts`, one text after the
    /// other.
    ///
    /// # Errors
    /// Any error, which ends the pass before anything is computed.
    fn signal(&self, texts: &[Seen<'_>], layers: Range<usize>) -> Result<SideSignal>;
}

/// The tokens of one sequence of a pass, and how many of them each of its rows sees.
#[derive(Clone, Copy, Debug)]
pub struct Seen<'a> {
    ids: &'a [u32],
    past: usize,
    /// Counted from the first row; none where the pass is causal.
    segments: &'a [Range<usize>],
}

impl<'a> Seen<'a> {
    /// `ids` with those before the pass, of which there are `past`, where rows see to the end of their segment. Segments
    /// count from the first row, ascending.
    #[must_use]
    pub fn new(ids: &'a [u32], past: usize, segments: &'a [Range<usize>]) -> Self {
        Self { ids, past: past.min(ids.len()), segments }
    }

    /// The tokens from the beginning of the sequence, those before the pass first.
    #[must_use]
    pub fn ids(&self) -> &'a [u32] {
        self.ids
    }

    /// Which of the tokens are rows of the pass: the last ones.
    #[must_use]
    pub fn rows(&self) -> Range<usize> {
        self.past..self.ids.len()
    }

    /// How many of the tokens, from the first on, each row sees: up to itself in a causal pass, and to the end of its
    /// context segment in a bidirectional one. A sliding window does not count.
    pub fn sees(&self) -> impl Iterator<Item = usize> + 'a {
        let (past, mut segments) = (self.past, self.segments.iter().peekable());
        self.rows().map(move |at| {
            let row = at - past;
            while segments.next_if(|segment| segment.end <= row).is_some() {}
            match segments.peek() {
                Some(segment) if segment.contains(&row) => past + segment.end,
                _ => at + 1,
            }
        })
    }
}

/// A source, and the layers that read it.
#[derive(Clone, Debug)]
pub(super) struct Attached {
    pub(super) source: Arc<dyn SideSource>,
    pub(super) layers: Vec<usize>,
}

impl Attached {
    /// What the source says of a pass through `layers`; nothing where none of these reads it.
    pub(super) fn signal(
        &self,
        layers: &Range<usize>,
        pass: &Pass<'_>,
    ) -> Result<Option<SideSignal>> {
        if !self.layers.iter().any(|layer| layers.contains(layer)) {
            return Ok(None);
        }
        let (batch, sight) = match pass {
            Pass::Causal(batch) => (*batch, Sight::Causal),
            Pass::Bidirectional(batch) => (*batch, Sight::Bidirectional),
            Pass::Remembered { batch, sight, .. } => (*batch, *sight),
            Pass::Cached(_) => return Err(no_tokens("a pass over a cache alone, without a batch")),
        };
        let texts = (0..batch.sequences()).map(|sequence| seen(batch, sequence, sight));
        let texts = texts.collect::<Option<Vec<_>>>();
        let texts = texts.ok_or_else(|| no_tokens("a batch without ids"))?;
        if let Pass::Remembered { caches, .. } = pass {
            for (cache, text) in caches.iter().zip(&texts) {
                let (held, past) = (cache.position(layers)?, text.rows().start);
                if held != past {
                    let expected = format!(
                        "the ids of the {held} tokens that the cache holds (Batch::following), for what is looked up \
                         by them"
                    );
                    return Err(Error::parameter("pass", expected, past));
                }
            }
        }
        self.source.signal(&texts, layers.clone()).map(Some)
    }
}

fn seen(batch: &Batch, sequence: usize, sight: Sight) -> Option<Seen<'_>> {
    let (ids, past) = batch.seen(sequence)?;
    let segments = match sight {
        Sight::Causal => &[],
        Sight::Bidirectional => batch.context(sequence),
    };
    Some(Seen::new(ids, past, segments))
}

fn no_tokens(got: &str) -> Error {
    let expected =
        "a batch with the ids of its tokens (Batch::with_ids), for what is looked up by them";
    Error::parameter("pass", expected, got)
}
