//! Embeddings as digits: the nearest row of a table, found by a scan of small numbers.

use std::cmp::Ordering;
use std::collections::BinaryHeap;
use std::fmt;
use std::ops::Range;

use candle_core::{D, DType, Device, Tensor};
use rayon::prelude::*;

use super::digits::{DigitDistance, Digits, Grid};
use super::rows::wide;
use crate::batch::flat;
use crate::error::{Error, Result};
use crate::kernels::{DIGIT_ROWS, DigitTable, sum_digits};

/// A row of a table, and how far it is.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Near {
    /// Its index: of an embedding table, the token id.
    pub row: u32,
    /// The squared distance from the query.
    pub distance: f32,
}

/// A table of embeddings as digits, to find the nearest row of: a scan of half a byte a digit, after which
/// the best few are ranked by what they are.
///
/// SmolLM2's table, 49,152 rows of 576 (113 MB in `f32`), takes 14 MB. There the nearest row is that of exact
/// search in all of 500 queries with noise of one or two standard deviations, and in 99.8 % at three. One query
/// is found 4 to 5 times as fast as by a matrix product; more than sixteen at once are not (`cargo bench --bench codes`).
///
/// ```
/// use candle_core::{Device, Tensor};
/// use hybrid_attention::refine::{Codes, DigitDistance, Digits, Noise};
/// use hybrid_attention::model::Batch;
///
/// # fn main() -> hybrid_attention::Result<()> {
/// let table = Tensor::randn(0f32, 1.0, (500, 64), &Device::Cpu)?;
/// let codes = Codes::new(&table, Digits::default())?;
///
/// let tokens = table.narrow(0, 7, 3)?; // rows 7, 8 and 9, with noise as large as the table's spread
/// let noised = Noise::per_coordinate(1.0).on(&tokens, &Batch::one(3)?, 0)?;
/// for (row, near) in (7..).zip(codes.nearest(&noised, 5)?) {
///     assert_eq!((near[0].row, near.len()), (row, 5));
/// }
/// let differing = codes.scan(&tokens, 1, DigitDistance::Hamming)?; // by digits alone
/// assert_eq!(differing[0], [(7, 0)]);
/// # Ok(())
/// # }
/// ```
pub struct Codes {
    table: Table,
    rows: usize,
    hidden: usize,
    grid: Grid,
    /// Blocks of [`DIGIT_ROWS`] rows, in each the columns: first digits, second digits, …
    digits: Vec<[u8; 16]>,
}

/// Rows of the table by their indices.
type Table = Box<dyn Fn(&[u32]) -> Result<Tensor> + Send + Sync>;

impl Codes {
    /// Rows that are read at once.
    const AT_ONCE: usize = 4096;
    /// Blocks of rows that one thread scans at a time: as many as stay in its cache for the next query.
    const BLOCKS: usize = 32;
    /// Queries that are scanned side by side.
    const QUERIES: usize = 64;
    /// How many of the nearest by digits are ranked by what they are, at least.
    const RANKED: usize = 32;

    /// The codes of a table, `(rows, hidden)`, which is kept beside them to rank the nearest.
    ///
    /// # Errors
    /// [`Error::Parameter`] for digits outside their ranges, and a table without rows, or that is no matrix;
    /// [`Error::NotFinite`] for a row that holds a NaN or an infinity.
    pub fn new(table: &Tensor, how: Digits) -> Result<Self> {
        let (rows, hidden) = table.dims2().map_err(|_| {
            Error::parameter("table", "(rows, hidden)", format!("{:?}", table.dims()))
        })?;
        let table = table.detach().contiguous()?;
        let look_up =
            move |ids: &[u32]| Ok(table.index_select(&Tensor::new(ids, table.device())?, 0)?);
        Self::of((rows, hidden), Box::new(look_up), how)
    }

    /// The same of a table that is read row by row.
    pub(crate) fn of((rows, hidden): (usize, usize), table: Table, how: Digits) -> Result<Self> {
        how.validate()?;
        if rows == 0 || hidden == 0 || u32::try_from(rows).is_err() {
            let expected = "at least one row and one column, and at most 2³² rows";
            return Err(Error::parameter("table", expected, format!("[{rows}, {hidden}]")));
        }
        let (means, sd) = spread(&table, rows, hidden)?;
        let grid = Grid::new(how, means, sd);
        let columns = grid.columns();
        let mut digits = vec![[0; 16]; rows.div_ceil(DIGIT_ROWS) * columns];
        for (from, some) in parts(rows).zip(digits.chunks_mut(Self::AT_ONCE / DIGIT_ROWS * columns))
        {
            let values = read(&table, from)?;
            let blocks = values.par_chunks(DIGIT_ROWS * hidden).zip(some.par_chunks_mut(columns));
            blocks.for_each(|(values, block)| grid.write(values, block));
        }
        Ok(Self { table, rows, hidden, grid, digits })
    }

    /// Rows of the table.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Numbers of a row.
    #[must_use]
    pub fn hidden(&self) -> usize {
        self.hidden
    }

    /// Bytes that the digits take.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.digits.as_flattened().len()
    }

    /// The `best` rows that are nearest to each of the queries, `(.., hidden)`, the nearest first: those that
    /// are nearest by digits, at least 32 of them, ranked by their squared distance. Of equals, the one that
    /// comes first in the table.
    ///
    /// # Errors
    /// [`Error::Parameter`] for queries of another width, [`Error::NotFinite`] for one that holds a NaN or an
    /// infinity.
    pub fn nearest(&self, queries: &Tensor, best: usize) -> Result<Vec<Vec<Near>>> {
        let queries = self.queries(queries)?;
        let scanned = self.scan_all(&queries, best.max(Self::RANKED), DigitDistance::Squared);
        let ranked = queries.chunks_exact(self.hidden).zip(scanned);
        ranked.map(|(query, scanned)| self.rank(query, &scanned, best)).collect()
    }

    /// The `best` rows by digits alone, the nearest first, each with its distance.
    ///
    /// # Errors
    /// As [`Codes::nearest`].
    pub fn scan(
        &self,
        queries: &Tensor,
        best: usize,
        distance: DigitDistance,
    ) -> Result<Vec<Vec<(u32, u64)>>> {
        Ok(self.scan_all(&self.queries(queries)?, best, distance))
    }

    /// Rows of the table, `(n, hidden)`, in its own type.
    pub(super) fn look_up(&self, rows: &[u32]) -> Result<Tensor> {
        (self.table)(rows)
    }

    /// The numbers of the queries, row after row.
    fn queries(&self, queries: &Tensor) -> Result<Vec<f32>> {
        let width = queries.dims().last().copied().unwrap_or(0);
        if width != self.hidden {
            let expected = format!("rows of {}", self.hidden);
            return Err(Error::parameter("queries", expected, format!("{:?}", queries.dims())));
        }
        finite(&flat(queries)?, "queries", 0)
    }

    fn scan_all(
        &self,
        queries: &[f32],
        best: usize,
        distance: DigitDistance,
    ) -> Vec<Vec<(u32, u64)>> {
        let queries: Vec<&[f32]> = queries.chunks_exact(self.hidden).collect();
        let mut found = Vec::with_capacity(queries.len());
        for queries in queries.chunks(Self::QUERIES) {
            let tables: Vec<_> = queries.iter().map(|it| self.grid.tables(it, distance)).collect();
            let columns = self.grid.columns();
            let parts =
                self.digits.par_chunks(Self::BLOCKS * columns).enumerate().map(|(part, digits)| {
                    let first = part * Self::BLOCKS * DIGIT_ROWS;
                    let rows = first..self.rows.min(first + Self::BLOCKS * DIGIT_ROWS);
                    let scan = |tables: &Vec<DigitTable>| {
                        self.scan_part(digits, rows.clone(), tables, best, distance)
                    };
                    tables.iter().map(scan).collect::<Vec<_>>()
                });
            let mut merged = vec![Best::of(best); queries.len()];
            for part in parts.collect::<Vec<_>>() {
                for (merged, part) in merged.iter_mut().zip(part) {
                    part.rows.into_iter().for_each(|it| merged.offer(it));
                }
            }
            found.extend(merged.into_iter().map(Best::in_order));
        }
        found
    }

    /// The best of some blocks of rows.
    fn scan_part(
        &self,
        digits: &[[u8; 16]],
        rows: Range<usize>,
        tables: &[DigitTable],
        best: usize,
        distance: DigitDistance,
    ) -> Best {
        let mut sums = [[0; DIGIT_ROWS]; Self::BLOCKS];
        sum_digits(digits, tables, self.grid.most(distance), &self.grid.runs(distance), &mut sums);
        let mut found = Best::of(best);
        for (row, sum) in rows.zip(sums.as_flattened()) {
            found.offer((*sum, row as u32)); // there are no more than that
        }
        found
    }

    /// The best few by their squared distance.
    fn rank(&self, query: &[f32], scanned: &[(u32, u64)], best: usize) -> Result<Vec<Near>> {
        let ids: Vec<u32> = scanned.iter().map(|(row, _)| *row).collect();
        if ids.is_empty() {
            return Ok(Vec::new());
        }
        let rows = values(&self.look_up(&ids)?)?;
        let distance = |row: &[f32]| -> f32 {
            query.iter().zip(row).map(|(a, b)| f64::from(a - b).powi(2)).sum::<f64>() as f32
        };
        let near = ids.iter().zip(rows.chunks_exact(self.hidden));
        let mut near: Vec<Near> =
            near.map(|(row, values)| Near { row: *row, distance: distance(values) }).collect();
        near.sort_by(|a, b| a.distance.total_cmp(&b.distance).then(a.row.cmp(&b.row)));
        near.truncate(best);
        Ok(near)
    }
}

impl fmt::Debug for Codes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut debug = f.debug_struct("Codes");
        debug.field("rows", &self.rows).field("hidden", &self.hidden);
        debug.finish_non_exhaustive()
    }
}

/// The best few, the worst of them on top: of a greater distance, or of the same and a later row.
#[derive(Clone)]
struct Best {
    rows: BinaryHeap<(u64, u32)>,
    most: usize,
}

impl Best {
    fn of(most: usize) -> Self {
        Self { rows: BinaryHeap::new(), most }
    }

    fn offer(&mut self, row: (u64, u32)) {
        if self.rows.len() < self.most {
            self.rows.push(row);
        } else if let Some(mut worst) = self.rows.peek_mut()
            && row.cmp(&worst) == Ordering::Less
        {
            *worst = row;
        }
    }

    fn in_order(self) -> Vec<(u32, u64)> {
        self.rows.into_sorted_vec().into_iter().map(|(distance, row)| (row, distance)).collect()
    }
}

/// The rows of a table, some at a time.
fn parts(rows: usize) -> impl Iterator<Item = Range<usize>> {
    (0..rows).step_by(Codes::AT_ONCE).map(move |from| from..rows.min(from + Codes::AT_ONCE))
}

/// The mean of each coordinate, and the standard deviation of all around these.
fn spread(table: &Table, rows: usize, hidden: usize) -> Result<(Vec<f32>, f32)> {
    let mut means = vec![0f64; hidden];
    for some in parts(rows) {
        for row in read(table, some)?.chunks_exact(hidden) {
            means.iter_mut().zip(row).for_each(|(mean, value)| *mean += f64::from(*value));
        }
    }
    let means: Vec<f32> = means.into_iter().map(|sum| (sum / rows as f64) as f32).collect();
    let mut squares = 0f64;
    for some in parts(rows) {
        for row in read(table, some)?.chunks_exact(hidden) {
            let apart = row.iter().zip(&means).map(|(value, mean)| f64::from(value - mean));
            squares += apart.map(|it| it * it).sum::<f64>();
        }
    }
    Ok((means, (squares / (rows * hidden) as f64).sqrt() as f32))
}

fn read(table: &Table, rows: Range<usize>) -> Result<Vec<f32>> {
    let ids: Vec<u32> = rows.clone().map(|row| row as u32).collect();
    finite(&table(&ids)?, "embeddings", rows.start)
}

/// The numbers of some rows, of which the first is row `first` of them all.
fn finite(rows: &Tensor, what: &'static str, first: usize) -> Result<Vec<f32>> {
    let values = values(rows)?;
    match values.iter().position(|value| !value.is_finite()) {
        Some(index) => {
            Err(Error::NotFinite { what, position: first + index / rows.dim(D::Minus1)?.max(1) })
        }
        None => Ok(values),
    }
}

fn values(rows: &Tensor) -> Result<Vec<f32>> {
    let rows = wide(&rows.detach())?.to_dtype(DType::F32)?;
    Ok(rows.to_device(&Device::Cpu)?.flatten_all()?.to_vec1()?)
}
