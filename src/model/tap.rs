//! Looking into a pass.

use std::ops::Range;

use candle_core::Tensor;

use super::kv_cache::{Remembered, gather};
use super::linear::Linear;
use super::mask::Mask;
use crate::error::{Error, Result};
use crate::kernels::{self, SequenceSpans, Spans};

/// Looks on while a pass runs, layer by layer. It changes nothing, and without one nothing is computed
/// for it. An error it returns ends the pass.
///
/// A causal pass over a cache runs in chunks, and shows each of them.
pub trait Tap: Send {
    /// The residual stream at a place in a layer, `(tokens, hidden)`.
    ///
    /// # Errors
    /// Any error, which ends the pass.
    fn residual(&mut self, _layer: usize, _site: Site, _xs: &Tensor) -> Result<()> {
        Ok(())
    }

    /// What attention computes in a layer.
    ///
    /// # Errors
    /// Any error, which ends the pass.
    fn attention(&mut self, _layer: usize, _attended: &Attended<'_>) -> Result<()> {
        Ok(())
    }
}

/// Places in a block where the residual stream can be observed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Site {
    /// What enters it.
    Input,
    /// After attention, before the MLP.
    AfterAttention,
    /// What leaves it.
    Output,
}

/// The attention of one layer, as a [`Tap`] sees it. Scores and weights are computed on demand, by the
/// functions that the pass itself uses where it has no faster kernel.
#[derive(Debug)]
pub struct Attended<'a> {
    queries: &'a Tensor,
    remembered: &'a Remembered,
    context: &'a Tensor,
    o_proj: &'a Linear,
    mask: &'a Mask,
}

impl<'a> Attended<'a> {
    pub(super) fn new(
        queries: &'a Tensor,
        remembered: &'a Remembered,
        (context, o_proj): (&'a Tensor, &'a Linear),
        mask: &'a Mask,
    ) -> Self {
        Self { queries, remembered, context, o_proj, mask }
    }

    /// Who sees whom.
    #[must_use]
    pub fn mask(&self) -> &Mask {
        self.mask
    }

    /// The rows of a sequence among the tokens; an empty range for one that does not exist.
    pub(crate) fn rows(&self, sequence: usize) -> Range<usize> {
        self.mask.spans().sequences.get(sequence).map_or(0..0, |this| this.queries.clone())
    }

    /// Query heads.
    #[must_use]
    pub fn heads(&self) -> usize {
        self.queries.dims().first().copied().unwrap_or(0)
    }

    /// The queries, rotated: `(heads, tokens, head_dim)`.
    #[must_use]
    pub fn queries(&self) -> &Tensor {
        self.queries
    }

    /// The keys of one sequence, rotated, and its values: `(kv_heads, keys, head_dim)` each, at the
    /// positions [`Mask::keys`]. In the type of the queries, with values rounded as they are kept.
    ///
    /// # Errors
    /// [`Error::Parameter`] for a sequence that does not exist, or of which a cache holds no key.
    pub fn keys_and_values(&self, sequence: usize) -> Result<(Tensor, Tensor)> {
        let spans = self.mask.spans();
        let Some(this) = spans.sequences.get(sequence) else {
            let expected = format!("less than the {} of the pass", spans.sequences.len());
            return Err(Error::parameter("sequence", expected, sequence));
        };
        let dtype = self.queries.dtype();
        match self.remembered {
            Remembered::Packed(keys, values) => {
                let own = |of: &Tensor| of.narrow(1, this.from, this.keys.len())?.to_dtype(dtype);
                Ok((own(keys)?, own(values)?))
            }
            Remembered::Blocks(blocks) => match blocks.get(sequence) {
                Some(held) => gather(held, &this.keys, dtype),
                None => Err(Error::parameter("sequence", "one with blocks", sequence)),
            },
        }
    }

    /// What each token gathered from the values it saw, heads side by side, before the output
    /// projection: `(tokens, heads · head_dim)`.
    #[must_use]
    pub fn context(&self) -> &Tensor {
        self.context
    }

    /// The layer's output projection: of the [`context`](Self::context), what attention adds to the residual stream.
    /// `(.., heads · head_dim) -> (.., hidden)`
    ///
    /// # Errors
    /// As [`Linear::forward`].
    pub fn output_projection(&self, context: &Tensor) -> Result<Tensor> {
        self.o_proj.forward(context)
    }

    /// The scores `q kᵀ / sqrt(head_dim)` of one head over one sequence, for some of its queries:
    /// `(queries, keys)`, minus infinity where a query does not see a key.
    ///
    /// # Errors
    /// [`Error::Parameter`] for a sequence, a head or queries that do not exist.
    pub fn scores(&self, sequence: usize, head: usize, queries: Range<usize>) -> Result<Tensor> {
        let (keys, _) = self.keys_and_values(sequence)?;
        let Some(this) = self.mask.spans().sequences.get(sequence) else {
            return Err(Error::parameter("sequence", "one of the pass", sequence));
        };
        let (count, heads) = (this.queries.len(), self.heads());
        if head >= heads || queries.start >= queries.end || queries.end > count {
            let expected = format!("a head of {heads} and some queries of {count}");
            return Err(Error::parameter("scores", expected, format!("{head} and {queries:?}")));
        }
        // As if the sequence ran alone.
        let alone = SequenceSpans { queries: 0..count, from: 0, ..this.clone() };
        let q = self.queries.narrow(1, this.queries.start, count)?;
        let scale = 1.0 / (q.dim(2)? as f64).sqrt();
        let spans = Spans { sequences: vec![alone], ..Spans::default() };
        kernels::scores(&q, &keys, &spans, 0, head, queries, scale)
    }

    /// The weights of one head over one sequence, for some of its queries: the softmax of
    /// [`scores`](Self::scores), `(queries, keys)`, 0 where a query does not see a key.
    ///
    /// # Errors
    /// As [`scores`](Self::scores).
    pub fn weights(&self, sequence: usize, head: usize, queries: Range<usize>) -> Result<Tensor> {
        kernels::shares(&self.scores(sequence, head, queries)?)
    }

    /// The weights of one sequence, averaged over the heads: `(queries, keys)`. Only one head at a time
    /// is in memory.
    ///
    /// # Errors
    /// [`Error::Parameter`] for a sequence that does not exist.
    pub fn mean_weights(&self, sequence: usize) -> Result<Tensor> {
        let count = self.mask.spans().sequences.get(sequence).map_or(0, |it| it.queries.len());
        let mut sum = self.weights(sequence, 0, 0..count)?;
        for head in 1..self.heads() {
            sum = (sum + self.weights(sequence, head, 0..count)?)?;
        }
        Ok((sum / self.heads().max(1) as f64)?)
    }
}
