//! Re-weighting of thoughts by similarity.

use std::collections::BTreeSet;
use std::ops::Range;

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use super::rows::{directions, wide};
use super::{OpConfig, Refine, Step, is_default};
use crate::batch::{Batch, flat};
use crate::error::{Error, Result};
use crate::kernels::softmax;

/// Lets every row move towards those like it, or strengthens the rows that matter to a focus.
///
/// Each row `i` of a context segment weighs the rows `j` of the same segment that it may look at by
/// `w_ij = softmax_j(cos(x_i, x_j) / temperature)`. Rows never see another segment, or anything that
/// does not think, so nothing leaks through plain text. The rows are the output of the previous op,
/// `(.., hidden)`; a row of zeros is unlike all others, with a cosine of 0.
///
/// * [`mix`](Self::mix): `x_i + strength · (Σ_j w_ij x_j - x_i)` for every row in focus. At strength
///   1 this is one retrieval from a modern Hopfield network (Ramsauer et al. 2021) that stores the
///   segment, its patterns compared by direction.
/// * [`scale`](Self::scale): with `r_j` the mean of `w_ij` over the rows in focus, each of the `n`
///   rows is multiplied by `(1 - strength) + strength · n · r_j`, then all of them by one number
///   that restores the segment's mean norm.
///
/// Rows are scored in blocks: memory grows with the length of a segment, not with its square.
///
/// ```
/// use candle_core::{Device, Tensor};
/// use hybrid_attention::{Result, model::Batch};
/// use hybrid_attention::refine::{Among, CosineReweight, Focus, Refine, Step};
///
/// # fn main() -> Result<()> {
/// let xs = Tensor::new(&[[[1f32, 0.0], [0.0, 2.0], [0.0, 4.0]]], &Device::Cpu)?;
/// let batch = Batch::one(3)?;
/// let step = Step::new(&xs, &xs, &batch);
/// let refined = |op: CosineReweight| -> Result<_> {
///     Ok(op.refine(&xs, &step)?.round()?.to_vec3::<f32>()?)
/// };
///
/// // Halfway towards those like it: the last two meet the other halfway, at 3
/// let mix = CosineReweight::mix(1.0).temperature(0.01);
/// assert_eq!(refined(mix.clone())?, [[[1.0, 0.0], [0.0, 3.0], [0.0, 3.0]]]);
/// let backward = mix.among(Among::Past).exclude_self();
/// assert_eq!(refined(backward)?, [[[1.0, 0.0], [1.0, 0.0], [0.0, 2.0]]]);
/// // All strength to what the first row is about, which is itself: 7 = 1 + 2 + 4
/// let scale = CosineReweight::scale(1.0).temperature(0.01).focus(Focus::Rows(vec![0]));
/// assert_eq!(refined(scale)?, [[[7.0, 0.0], [0.0, 0.0], [0.0, 0.0]]]);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CosineReweight {
    how: How,
    strength: f64,
    #[serde(default, skip_serializing_if = "is_default")]
    temperature: Temperature,
    #[serde(default, skip_serializing_if = "is_default")]
    among: Among,
    #[serde(default, skip_serializing_if = "is_default")]
    exclude_self: bool,
    #[serde(default, skip_serializing_if = "is_default")]
    focus: Focus,
}

/// Which rows of its segment a row may look at, besides itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Among {
    /// All of them.
    #[default]
    Both,
    /// Those before it.
    Past,
    /// Those after it.
    Future,
}

/// The rows that look at others.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Focus {
    /// All of them.
    #[default]
    All,
    /// The last row of each segment.
    Last,
    /// These tokens, counted from the first token of every sequence; at least one. Each must be in a
    /// context segment. Order and repetitions do not matter.
    Rows(Vec<usize>),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum How {
    Mix,
    Scale,
}

#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
struct Temperature(f64);

impl Default for Temperature {
    fn default() -> Self {
        Self(0.1)
    }
}

impl CosineReweight {
    /// Moves each row in focus by this share, in `[0, 1]`, of the way to the weighted mean of the rows
    /// it looks at. 0 changes nothing; 1 replaces the row by that mean.
    #[must_use]
    pub fn mix(strength: f64) -> Self {
        Self::new(How::Mix, strength)
    }

    /// Makes rows longer that the focus finds relevant and others shorter, by a share in `[0, 1]`. 0
    /// changes nothing; at 1 a row of no relevance becomes zero.
    #[must_use]
    pub fn scale(strength: f64) -> Self {
        Self::new(How::Scale, strength)
    }

    fn new(how: How, strength: f64) -> Self {
        Self {
            how,
            strength,
            temperature: Temperature::default(),
            among: Among::Both,
            exclude_self: false,
            focus: Focus::All,
        }
    }

    /// What cosines are divided by before the softmax, above 0. Default 0.1. Small temperatures keep
    /// only the most similar row, large ones weigh all rows alike.
    #[must_use]
    pub fn temperature(mut self, temperature: f64) -> Self {
        self.temperature = Temperature(temperature);
        self
    }

    /// Which rows a row may look at. Default [`Among::Both`].
    #[must_use]
    pub fn among(mut self, among: Among) -> Self {
        self.among = among;
        self
    }

    /// Does not let a row look at itself. Default: it does, so that a row that is like no other stays
    /// about where it was. A row that has nothing else to look at stays where it is.
    #[must_use]
    pub fn exclude_self(mut self) -> Self {
        self.exclude_self = true;
        self
    }

    /// The rows that look at others: with [`mix`](Self::mix) the ones that move, with
    /// [`scale`](Self::scale) the ones that decide what is relevant. A segment without any is left as it
    /// is. Default [`Focus::All`].
    #[must_use]
    pub fn focus(mut self, focus: Focus) -> Self {
        self.focus = focus;
        self
    }

    /// The tokens of a sequence that are listed in the focus; for any other focus the segment decides.
    fn listed(&self, sequence: usize, batch: &Batch) -> Result<BTreeSet<usize>> {
        let Focus::Rows(rows) = &self.focus else {
            return Ok(BTreeSet::new());
        };
        let length = batch.rows(sequence).len();
        for row in rows {
            if *row >= length {
                let expected = format!("rows below the {length} tokens of sequence {sequence}");
                return Err(Error::parameter("focus", expected, row));
            }
            if batch.context(sequence).iter().all(|segment| !segment.contains(row)) {
                let expected = format!("rows in a context segment of sequence {sequence}");
                return Err(Error::parameter("focus", expected, format!("{row}, which is plain")));
            }
        }
        Ok(rows.iter().copied().collect())
    }

    /// The rows of a segment that look at others and have any to look at, counted from its first row.
    fn queries(&self, segment: &Range<usize>, listed: &BTreeSet<usize>) -> Vec<usize> {
        let n = segment.len();
        let sees_any = |row: &usize| match (self.exclude_self, self.among) {
            (false, _) => true,
            (true, Among::Both) => n > 1,
            (true, Among::Past) => *row > 0,
            (true, Among::Future) => row + 1 < n,
        };
        match &self.focus {
            Focus::All => (0..n).filter(sees_any).collect(),
            Focus::Last => n.checked_sub(1).into_iter().filter(sees_any).collect(),
            Focus::Rows(_) => {
                let rows = listed.range(segment.clone()).map(|row| row - segment.start);
                rows.filter(sees_any).collect()
            }
        }
    }

    /// One segment, `(rows, hidden)`.
    fn segment(&self, rows: &Tensor, queries: &[usize]) -> Result<Tensor> {
        if queries.is_empty() {
            return Ok(rows.clone());
        }
        let wide = wide(rows)?.contiguous()?;
        let refined = match self.how {
            How::Mix => self.mixed(&wide, queries)?,
            How::Scale => self.scaled(&wide, queries)?,
        };
        Ok(refined.to_dtype(rows.dtype())?)
    }

    fn mixed(&self, rows: &Tensor, queries: &[usize]) -> Result<Tensor> {
        let mut pieces = vec![rows.clone()];
        self.each_block(rows, queries, |block, weights| {
            let own = rows.index_select(block, 0)?;
            let step = ((weights.matmul(rows)? - &own)? * self.strength)?;
            pieces.push((own + step)?);
            Ok(())
        })?;
        // Row i of the result is row i of the segment, or its moved version.
        let n = rows.dim(0)?;
        let mut source: Vec<usize> = (0..n).collect();
        for (place, query) in queries.iter().enumerate() {
            if let Some(source) = source.get_mut(*query) {
                *source = n + place;
            }
        }
        Ok(Tensor::cat(&pieces, 0)?.index_select(&indices(&source, rows)?, 0)?)
    }

    fn scaled(&self, rows: &Tensor, queries: &[usize]) -> Result<Tensor> {
        let n = rows.dim(0)?;
        let mut relevance = Tensor::zeros((n, 1), rows.dtype(), rows.device())?;
        self.each_block(rows, queries, |_, weights| {
            relevance = (&relevance + weights.sum(0)?.unsqueeze(1)?)?;
            Ok(())
        })?;
        let (strength, spread) = (self.strength, n as f64 / queries.len() as f64);
        let factors = relevance.affine(strength * spread, 1.0 - strength)?;
        let (_, lengths) = directions(rows)?;
        let (before, after) = (lengths.sum_all()?, (&lengths * &factors)?.sum_all()?);
        if after.eq(0.0)?.to_scalar::<u8>()? == 1 {
            // Everything relevant has length 0: no factor can restore the mean norm.
            return Ok(rows.clone());
        }
        Ok(rows.broadcast_mul(&factors.broadcast_mul(&(before / after)?)?)?)
    }

    /// Calls a function with one block of `queries` after the other and their weights, `(block, rows)`.
    fn each_block(
        &self,
        rows: &Tensor,
        queries: &[usize],
        mut block: impl FnMut(&Tensor, &Tensor) -> Result<()>,
    ) -> Result<()> {
        /// The most queries at once, and the most scores.
        const QUERIES: usize = 256;
        const SCORES: usize = 1 << 20;
        let n = rows.dim(0)?;
        let (units, _) = directions(rows)?;
        let keys = units.t()?; // (hidden, rows)
        // A lower temperature leaves only the most similar row anyway, but could overflow.
        let sharpness = (1.0 / self.temperature.0).min(1e30);
        for queries in queries.chunks((SCORES / n.max(1)).clamp(1, QUERIES)) {
            let index = indices(queries, rows)?;
            let cosines = units.index_select(&index, 0)?.matmul(&keys)?; // (block, rows)
            let scores = self.masked((cosines * sharpness)?, queries)?;
            block(&index, &softmax(&scores)?)?;
        }
        Ok(())
    }

    /// `scores`, `(block, rows)`, with minus infinity for what the query may not look at.
    fn masked(&self, scores: Tensor, queries: &[usize]) -> Result<Tensor> {
        if self.among == Among::Both && !self.exclude_self {
            return Ok(scores);
        }
        let n = scores.dim(1)?;
        let mut bias = vec![0f32; queries.len() * n];
        for (query, bias) in queries.iter().zip(bias.chunks_mut(n.max(1))) {
            let (past, rest) = bias.split_at_mut((*query).min(n));
            let (own, future) = rest.split_at_mut(rest.len().min(1));
            match self.among {
                Among::Both => (),
                Among::Past => future.fill(f32::NEG_INFINITY),
                Among::Future => past.fill(f32::NEG_INFINITY),
            }
            if self.exclude_self {
                own.fill(f32::NEG_INFINITY);
            }
        }
        let bias = Tensor::from_vec(bias, scores.shape(), scores.device())?;
        Ok((&scores + bias.to_dtype(scores.dtype())?)?)
    }
}

impl Refine for CosineReweight {
    fn refine(&self, xs: &Tensor, step: &Step<'_>) -> Result<Tensor> {
        self.validate()?;
        let batch = step.batch;
        batch.check(xs)?;
        let listed = (0..batch.sequences()).map(|sequence| self.listed(sequence, batch));
        let listed = listed.collect::<Result<Vec<_>>>()?;
        if self.strength == 0.0 || xs.elem_count() == 0 {
            return Ok(xs.clone());
        }
        // Segment by segment; the rows between them unchanged.
        let rows = flat(xs)?;
        let (mut pieces, mut done) = (Vec::new(), 0);
        for (sequence, listed) in listed.iter().enumerate() {
            let start = batch.rows(sequence).start;
            for segment in batch.context(sequence) {
                let from = start + segment.start;
                pieces.push(rows.narrow(0, done, from - done)?);
                let own = rows.narrow(0, from, segment.len())?;
                pieces.push(self.segment(&own, &self.queries(segment, listed))?);
                done = from + segment.len();
            }
        }
        pieces.push(rows.narrow(0, done, batch.tokens() - done)?);
        Ok(Tensor::cat(&pieces, 0)?.reshape(xs.shape())?)
    }

    fn validate(&self) -> Result<()> {
        let Self { strength, temperature: Temperature(temperature), focus, .. } = self;
        if !(0.0..=1.0).contains(strength) {
            return Err(Error::parameter("strength", "a share in [0, 1]", strength));
        }
        if !(temperature.is_finite() && *temperature > 0.0) {
            return Err(Error::parameter("temperature", "a finite number above 0", temperature));
        }
        if *focus == Focus::Rows(Vec::new()) {
            return Err(Error::parameter("focus", "at least one row", "[]"));
        }
        Ok(())
    }

    fn to_config(&self) -> Option<OpConfig> {
        Some(OpConfig::CosineReweight(self.clone()))
    }
}

/// As an index into the rows of `of`, of which there are fewer than candle can count.
fn indices(rows: &[usize], of: &Tensor) -> Result<Tensor> {
    let rows: Vec<u32> = rows.iter().map(|row| *row as u32).collect();
    Ok(Tensor::new(rows, of.device())?)
}
