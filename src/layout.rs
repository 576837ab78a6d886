//! Which slots of a batch hold tokens, and which of those think together.

use std::ops::Range;

use crate::error::{Error, Result};

/// The shape of the text in a `(batch, seq)` block: where each row's tokens stand and which runs
/// of them are *context* (thought about, each run seeing the whole of itself) rather than *plain*
/// (always causal).
///
/// Rows of different length end together: a shorter row is padded on its **left**, so that the
/// next token of every row goes into the same slot. Padding is never seen by a token.
///
/// ```text
/// lengths [2, 4]  ->  slots  0 1 2 3
///             row 0:         · · A B     positions of A, B: 0, 1
///             row 1:         C D E F     positions 0, 1, 2, 3
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Layout {
    seq: usize,
    rows: Vec<Row>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Row {
    /// The first slot that holds a token.
    start: usize,
    /// Context segments in slots, ascending, apart from each other, within `start..seq`.
    context: Vec<Range<usize>>,
}

impl Layout {
    /// `batch` rows of `seq` tokens, each row one context segment.
    #[must_use]
    pub fn dense(batch: usize, seq: usize) -> Self {
        Self { seq, rows: vec![Row::whole(0, seq); batch] }
    }

    /// Rows of these lengths, padded on the left to the longest, each one context segment.
    #[must_use]
    pub fn ragged(lengths: &[usize]) -> Self {
        let seq = lengths.iter().copied().max().unwrap_or(0);
        Self { seq, rows: lengths.iter().map(|length| Row::whole(seq - length, seq)).collect() }
    }

    /// The same rows, with only these runs of tokens as context segments and everything else
    /// plain. Runs count tokens from the first of row `row`, not slots.
    ///
    /// # Errors
    /// [`Error::Parameter`] when there is no such row, or the runs are not ascending, apart from
    /// each other, and within the row.
    pub fn with_context(mut self, row: usize, segments: &[Range<usize>]) -> Result<Self> {
        let (seq, batch) = (self.seq, self.rows.len());
        let this = self.rows.get_mut(row).ok_or_else(|| {
            Error::parameter("row", format!("less than the batch of {batch}"), row)
        })?;
        let length = seq - this.start;
        let mut free = 0;
        for segment in segments {
            if segment.start < free || segment.end < segment.start || segment.end > length {
                return Err(Error::parameter(
                    "segments",
                    format!("ascending runs of the row's {length} tokens"),
                    format!("{segments:?}"),
                ));
            }
            free = segment.end;
        }
        let in_slots = |run: &Range<usize>| run.start + this.start..run.end + this.start;
        this.context = segments.iter().filter(|run| !run.is_empty()).map(in_slots).collect();
        Ok(self)
    }

    /// Rows of the block.
    #[must_use]
    pub fn batch(&self) -> usize {
        self.rows.len()
    }

    /// Slots of each row: the length of the longest.
    #[must_use]
    pub fn seq(&self) -> usize {
        self.seq
    }

    /// The first slot of each row that holds a token.
    #[must_use]
    pub fn starts(&self) -> Vec<usize> {
        self.rows.iter().map(|row| row.start).collect()
    }

    /// The context segments of `row`, in slots.
    #[must_use]
    pub fn context(&self, row: usize) -> &[Range<usize>] {
        self.rows.get(row).map_or(&[], |row| &row.context)
    }

    /// `1.0` where a slot holds a token and `0.0` where it holds padding: `(batch, seq)`.
    #[must_use]
    pub fn real(&self) -> Vec<Vec<f32>> {
        let flag = |row: &Row, slot: usize| if slot >= row.start { 1.0 } else { 0.0 };
        self.rows.iter().map(|row| (0..self.seq).map(|slot| flag(row, slot)).collect()).collect()
    }

    /// `1` where a slot belongs to a context segment: `(batch, seq)`.
    #[must_use]
    pub fn thinks(&self) -> Vec<Vec<u8>> {
        let inside = |row: &Row, slot| u8::from(row.context.iter().any(|run| run.contains(&slot)));
        self.rows.iter().map(|row| (0..self.seq).map(|slot| inside(row, slot)).collect()).collect()
    }

    /// The slot after the last that belongs to a context segment, in any row; 0 where none does.
    pub(crate) fn context_end(&self) -> usize {
        let ends = self.rows.iter().filter_map(|row| row.context.last());
        ends.map(|segment| segment.end).max().unwrap_or(0)
    }

    /// The first `seq` slots, which hold all context. A row that begins later is all padding.
    pub(crate) fn front(&self, seq: usize) -> Self {
        let front = |row: &Row| Row { start: row.start.min(seq), context: row.context.clone() };
        Self { seq, rows: self.rows.iter().map(front).collect() }
    }

    /// Whether every token of every row is context and no row is padded.
    #[must_use]
    pub fn is_all_context(&self) -> bool {
        self.rows.iter().all(|row| *row == Row::whole(0, self.seq))
    }
}

impl Row {
    /// All of `start..seq` as one context segment.
    fn whole(start: usize, seq: usize) -> Self {
        let context = if start < seq { std::iter::once(start..seq).collect() } else { Vec::new() };
        Self { start, context }
    }
}
