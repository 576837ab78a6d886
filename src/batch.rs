//! Which tokens of a pass belong together, and which of those think.

use std::ops::Range;
use std::sync::Arc;

use candle_core::{DType, Device, Tensor};

use crate::error::{Error, Result};

/// The sequences that run together, one after the other without padding: how long each is, the position
/// at which it begins, and which runs of it are *context* (thought about, each run seeing all of itself)
/// rather than *plain* (always causal).
///
/// ```text
/// lengths [2, 4]  ->  rows         0 1 2 3 4 5
///                     tokens       A B C D E F     sequence 0 is rows 0..2, sequence 1 rows 2..6
///                     positions    0 1 0 1 2 3
/// ```
///
/// Their residual stream is a tensor `(tokens, hidden)`, or one of any other leading shape with as many
/// rows: `(1, seq, hidden)` for one sequence, `(count, seq, hidden)` for several of one length.
///
/// ```
/// use hybrid_attention::model::Batch;
///
/// let batch = Batch::ragged(&[2, 4])?.with_context(1, &[0..3])?;
/// assert_eq!((batch.tokens(), batch.rows(1)), (6, 2..6));
/// assert_eq!(batch.thinks(), [1, 1, 1, 1, 1, 0]);
/// # Ok::<_, hybrid_attention::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Batch {
    sequences: Vec<Sequence>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Sequence {
    /// Its rows among those of all sequences.
    rows: Range<usize>,
    /// The position of its first token.
    first: usize,
    /// Context segments, counted from the first token: ascending, not overlapping, not empty.
    context: Vec<Range<usize>>,
    ids: Option<Ids>,
}

/// The tokens of a sequence.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Ids {
    /// Those before the pass, then those of its rows, and any that were cut off behind them.
    all: Arc<[u32]>,
    past: usize,
}

impl Batch {
    /// The most tokens of a batch: positions are 31-bit numbers everywhere.
    pub const MAX_TOKENS: usize = i32::MAX as usize;

    /// One sequence of `len` tokens, all of it one context segment.
    ///
    /// # Errors
    /// As [`Batch::dense`].
    pub fn one(len: usize) -> Result<Self> {
        Self::new(std::iter::once(len))
    }

    /// `count` sequences of `len` tokens, each one context segment.
    ///
    /// # Errors
    /// [`Error::Parameter`] for more than [`MAX_TOKENS`](Self::MAX_TOKENS), or more sequences than
    /// memory holds.
    pub fn dense(count: usize, len: usize) -> Result<Self> {
        Self::new((0..count).map(|_| len))
    }

    /// Sequences of these lengths, each one context segment.
    ///
    /// # Errors
    /// As [`Batch::dense`].
    pub fn ragged(lengths: &[usize]) -> Result<Self> {
        Self::new(lengths.iter().copied())
    }

    fn new(lengths: impl ExactSizeIterator<Item = usize>) -> Result<Self> {
        let count = lengths.len();
        let mut sequences = Vec::new();
        if sequences.try_reserve_exact(count).is_err() {
            return Err(too_many(format!("{count} sequences")));
        }
        let mut end = 0usize;
        for len in lengths {
            let start = end;
            end = start.saturating_add(len);
            if end > Self::MAX_TOKENS {
                return Err(too_many(format!("{start} tokens and {len} more")));
            }
            sequences.push(Sequence::whole(start..end));
        }
        Ok(Self { sequences })
    }

    /// The same sequences, with only these runs of tokens of one of them as its context segments, and
    /// the rest of it plain. Runs count from the first token of that sequence.
    ///
    /// # Errors
    /// [`Error::Parameter`] when there is no such sequence, or the runs are not ascending, free of
    /// overlaps, and within it.
    pub fn with_context(mut self, sequence: usize, segments: &[Range<usize>]) -> Result<Self> {
        let this = self.sequence_mut(sequence)?;
        let (length, mut free) = (this.rows.len(), 0);
        for segment in segments {
            if segment.start < free || segment.end < segment.start || segment.end > length {
                return Err(Error::parameter(
                    "segments",
                    format!("ascending runs of the sequence's {length} tokens"),
                    format!("{segments:?}"),
                ));
            }
            free = segment.end;
        }
        this.context = segments.iter().filter(|run| !run.is_empty()).cloned().collect();
        Ok(self)
    }

    /// The same sequences, one of which begins at position `first` instead of 0. Not for a pass that
    /// continues from a cache, which knows its own positions.
    ///
    /// # Errors
    /// [`Error::Parameter`] when there is no such sequence, or its positions would be too large to
    /// count.
    pub fn starting_at(mut self, sequence: usize, first: usize) -> Result<Self> {
        let this = self.sequence_mut(sequence)?;
        if first.saturating_add(this.rows.len()) > Self::MAX_TOKENS {
            let expected = format!("positions up to {}", Self::MAX_TOKENS);
            return Err(Error::parameter("first", expected, first));
        }
        this.first = first;
        Ok(self)
    }

    /// The same sequences, with the token of each row, for what is looked up by tokens: see
    /// [`Transformer::with_side_source`](crate::model::Transformer::with_side_source). Nothing else needs them.
    ///
    /// ```
    /// use hybrid_attention::model::Batch;
    ///
    /// let batch = Batch::ragged(&[2, 1])?.with_ids(&[11, 150, 12])?.following(1, &[7, 8])?;
    /// assert_eq!((batch.ids(0), batch.ids(1)), (Some(&[11, 150][..]), Some(&[12][..])));
    /// # Ok::<_, hybrid_attention::Error>(())
    /// ```
    ///
    /// # Errors
    /// [`Error::Parameter`] when there is not one id for each token.
    pub fn with_ids(mut self, ids: &[u32]) -> Result<Self> {
        if ids.len() != self.tokens() {
            let expected = format!("{} tokens, as in the batch", self.tokens());
            return Err(Error::parameter("ids", expected, ids.len()));
        }
        for this in &mut self.sequences {
            let all = ids.get(this.rows.clone()).unwrap_or(&[]).into();
            this.ids = Some(Ids { all, past: 0 });
        }
        Ok(self)
    }

    /// The same sequences, one of which follows on all tokens of `past`, as a cache holds them. They are not rows of
    /// the pass.
    ///
    /// # Errors
    /// [`Error::Parameter`] when there is no such sequence, or it has no [ids](Self::with_ids) of its own.
    pub fn following(mut self, sequence: usize, past: &[u32]) -> Result<Self> {
        let this = self.sequence_mut(sequence)?;
        let Some(ids) = &mut this.ids else {
            return Err(Error::parameter("ids", "those of the batch's own tokens first", "none"));
        };
        let own = ids.all.get(ids.past..).unwrap_or(&[]);
        *ids = Ids { all: [past, own].concat().into(), past: past.len() };
        Ok(self)
    }

    /// The tokens of a sequence's rows, if the batch has them.
    #[must_use]
    pub fn ids(&self, sequence: usize) -> Option<&[u32]> {
        let (all, past) = self.seen(sequence)?;
        all.get(past..)
    }

    /// The tokens of a sequence from its beginning, and how many of them come before its rows.
    pub(crate) fn seen(&self, sequence: usize) -> Option<(&[u32], usize)> {
        let this = self.sequences.get(sequence)?;
        let ids = this.ids.as_ref()?;
        Some((ids.all.get(..ids.past + this.rows.len())?, ids.past))
    }

    fn sequence_mut(&mut self, sequence: usize) -> Result<&mut Sequence> {
        let count = self.sequences.len();
        self.sequences.get_mut(sequence).ok_or_else(|| {
            Error::parameter("sequence", format!("less than the {count} of the batch"), sequence)
        })
    }

    /// Sequences in it.
    #[must_use]
    pub fn sequences(&self) -> usize {
        self.sequences.len()
    }

    /// Tokens of all sequences together.
    #[must_use]
    pub fn tokens(&self) -> usize {
        self.sequences.last().map_or(0, |last| last.rows.end)
    }

    /// The rows of a sequence among those of all; an empty range for one that does not exist.
    #[must_use]
    pub fn rows(&self, sequence: usize) -> Range<usize> {
        self.sequences.get(sequence).map_or(0..0, |this| this.rows.clone())
    }

    /// The rows of every sequence.
    pub fn all_rows(&self) -> impl ExactSizeIterator<Item = Range<usize>> + '_ {
        self.sequences.iter().map(|this| this.rows.clone())
    }

    /// The length of every sequence.
    #[must_use]
    pub fn lengths(&self) -> Vec<usize> {
        self.all_rows().map(|rows| rows.len()).collect()
    }

    /// The position at which a sequence begins.
    #[must_use]
    pub fn first(&self, sequence: usize) -> usize {
        self.sequences.get(sequence).map_or(0, |this| this.first)
    }

    /// The position of every row.
    pub fn positions(&self) -> impl Iterator<Item = usize> + '_ {
        self.sequences.iter().flat_map(|this| this.first..this.first + this.rows.len())
    }

    /// The context segments of a sequence, counted from its first token.
    #[must_use]
    pub fn context(&self, sequence: usize) -> &[Range<usize>] {
        self.sequences.get(sequence).map_or(&[], |this| &this.context)
    }

    /// The context segments of all sequences, in rows.
    pub fn segments(&self) -> impl Iterator<Item = Range<usize>> + '_ {
        self.sequences.iter().flat_map(|this| {
            let start = this.rows.start;
            this.context.iter().map(move |run| start + run.start..start + run.end)
        })
    }

    /// `1` for every row that belongs to a context segment, `0` for a plain one.
    #[must_use]
    pub fn thinks(&self) -> Vec<u8> {
        let mut thinks = vec![0; self.tokens()];
        for run in self.segments() {
            if let Some(rows) = thinks.get_mut(run) {
                rows.fill(1);
            }
        }
        thinks
    }

    /// Whether every token is context, and each sequence one segment.
    #[must_use]
    pub fn is_all_context(&self) -> bool {
        self.sequences.iter().all(|this| this.context == Sequence::whole(this.rows.clone()).context)
    }

    /// The sequences without the plain tokens after their last context segment, and the rows that
    /// remain.
    pub(crate) fn fronts(&self) -> (Self, Vec<Range<usize>>) {
        let mut front = self.clone();
        let (mut kept, mut end) = (Vec::with_capacity(self.sequences.len()), 0);
        for this in &mut front.sequences {
            let len = this.context.last().map_or(0, |last| last.end);
            kept.push(this.rows.start..this.rows.start + len);
            this.rows = end..end + len;
            end += len;
        }
        (front, kept)
    }

    /// Its rows in pieces of at most `most`, all of about the same length. Where possible, no piece ends
    /// or begins with a single row of a longer sequence: attention of one query rounds differently from
    /// that of several, as products of few rows do, and how a pass was cut should not show.
    ///
    /// ```text
    /// lengths [5, 3], at most 6  ->  rows 0..3, 3..8: 0..4 would leave one row of the first
    /// ```
    pub(crate) fn cuts(&self, most: usize) -> Vec<Range<usize>> {
        let (most, tokens) = (most.max(1), self.tokens());
        let (mut cuts, mut start) = (Vec::new(), 0);
        while start < tokens {
            let left = tokens - start;
            let mut end = start + left.div_ceil(left.div_ceil(most));
            while end > start + 1 && self.leaves_one(start, end) {
                end -= 1;
            }
            cuts.push(start..end);
            start = end;
        }
        cuts
    }

    /// Whether the rows `start..end` leave a single row of a longer sequence on one side of `end`.
    fn leaves_one(&self, start: usize, end: usize) -> bool {
        let cut = self.all_rows().find(|rows| rows.start < end && end < rows.end);
        cut.is_some_and(|rows| end - rows.start.max(start) == 1 || rows.end - end == 1)
    }

    /// A piece of it: the sequences that `rows` belong to and any empty ones between them, cut to these
    /// rows, and which of all sequences they are. Nothing in the piece is context.
    ///
    /// ```text
    /// lengths [2, 4, 3], rows 1..5  ->  lengths [1, 3], sequences 0..2, the first from position 1 on
    /// lengths [2, 0, 3], rows 1..4  ->  lengths [1, 0, 2], sequences 0..3
    /// ```
    pub(crate) fn piece(&self, rows: &Range<usize>) -> (Self, Range<usize>) {
        let inside = |this: &Sequence| this.rows.start < rows.end && rows.start < this.rows.end;
        let from = self.sequences.iter().position(inside).unwrap_or(0);
        let to = self.sequences.iter().rposition(inside).map_or(from, |last| last + 1);
        let cut = self.sequences.get(from..to).unwrap_or(&[]).iter().map(|this| {
            let skipped = rows.start.saturating_sub(this.rows.start);
            let start = this.rows.start.max(rows.start) - rows.start;
            let end = this.rows.end.min(rows.end) - rows.start;
            let ids = this.ids.clone().map(|ids| Ids { past: ids.past + skipped, ..ids });
            Sequence { rows: start..end, first: this.first + skipped, context: Vec::new(), ids }
        });
        (Self { sequences: cut.collect() }, from..to)
    }

    /// The same rows, each a sequence of its own, at the position that it has.
    pub(crate) fn one_by_one(&self) -> Self {
        let row = |(row, first)| Sequence { first, ..Sequence::whole(row..row + 1) };
        Self { sequences: self.positions().enumerate().map(row).collect() }
    }

    /// The positions that each sequence reaches: one more than its last.
    pub(crate) fn ends(&self) -> Vec<usize> {
        let end = |this: &Sequence| this.first.saturating_add(this.rows.len());
        self.sequences.iter().map(end).collect()
    }

    /// Refuses a stream that does not have one row for each token.
    ///
    /// # Errors
    /// [`Error::Parameter`].
    pub fn check(&self, xs: &Tensor) -> Result<()> {
        let rows: usize = xs.dims().split_last().map_or(0, |(_, leading)| leading.iter().product());
        if rows == self.tokens() {
            return Ok(());
        }
        let (sequences, tokens) = (self.sequences(), self.tokens());
        let expected = format!("the {tokens} tokens of its {sequences} sequences");
        Err(Error::parameter("batch", expected, format!("a stream {:?}", xs.dims())))
    }

    /// One number for each sequence: the sum over its rows and over all channels of `xs`, in `f32`.
    /// Differentiable.
    ///
    /// ```
    /// # use candle_core::{Device, Tensor};
    /// use hybrid_attention::model::Batch;
    ///
    /// let xs = Tensor::new(&[[1f32, 2.0], [3.0, 4.0], [5.0, 6.0]], &Device::Cpu)?;
    /// let sums = Batch::ragged(&[1, 2])?.sum(&xs)?;
    /// assert_eq!(sums.to_vec1::<f32>()?, [3.0, 18.0]);
    /// # Ok::<_, hybrid_attention::Error>(())
    /// ```
    ///
    /// # Errors
    /// As [`Batch::check`].
    pub fn sum(&self, xs: &Tensor) -> Result<Tensor> {
        self.check(xs)?;
        let xs = flat(xs)?.to_dtype(DType::F32)?;
        let sum = |rows: Range<usize>| xs.narrow(0, rows.start, rows.len())?.sum_all();
        let sums = self.all_rows().map(sum).collect::<candle_core::Result<Vec<_>>>()?;
        Ok(Tensor::stack(&sums, 0)?)
    }

    /// For every row the value of its sequence: `(tokens, 1)`.
    pub(crate) fn spread(&self, values: &[f32], device: &Device) -> Result<Tensor> {
        let of_rows = |(rows, value): (Range<usize>, &f32)| std::iter::repeat_n(*value, rows.len());
        let rows: Vec<f32> = self.all_rows().zip(values).flat_map(of_rows).collect();
        Ok(Tensor::from_vec(rows, (self.tokens(), 1), device)?)
    }
}

impl Sequence {
    /// All rows as one context segment, from position 0 on.
    fn whole(rows: Range<usize>) -> Self {
        let whole = 0..rows.len();
        let context = if whole.is_empty() { Vec::new() } else { std::iter::once(whole).collect() };
        Self { rows, first: 0, context, ids: None }
    }
}

/// A stream as `(tokens, hidden)`, whatever its leading dimensions.
pub(crate) fn flat(xs: &Tensor) -> Result<Tensor> {
    Ok(xs.flatten_to(xs.rank().saturating_sub(2))?)
}

fn too_many(got: String) -> Error {
    let expected = format!("at most {} tokens, and as many sequences", Batch::MAX_TOKENS);
    Error::parameter("batch", expected, got)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        /// Whatever the lengths, each row of a piece is at the position that it had.
        #[test]
        fn a_piece_is_some_rows_of_the_whole(
            sequences in prop::collection::vec((0usize..5, 0usize..9), 1..7),
            (start, len) in (0usize..20, 1usize..20),
        ) {
            let lengths: Vec<_> = sequences.iter().map(|(len, _)| *len).collect();
            let mut batch = Batch::ragged(&lengths)?;
            for (index, (_, first)) in sequences.iter().enumerate() {
                batch = batch.starting_at(index, *first)?;
            }
            let rows = start.min(batch.tokens())..(start + len).min(batch.tokens());
            let (piece, which) = batch.piece(&rows);
            prop_assert_eq!(piece.tokens(), rows.len());
            prop_assert_eq!(piece.sequences(), which.len());
            let at = |batch: &Batch, from: usize| -> Vec<_> {
                let of = |index: usize| {
                    let positions = batch.first(index)..batch.first(index) + batch.rows(index).len();
                    positions.map(move |position| (from + index, position))
                };
                (0..batch.sequences()).flat_map(of).collect()
            };
            prop_assert_eq!(&at(&piece, which.start), &at(&batch, 0)[rows]);
        }
    }
}
