//! Products of small matrices that lie somewhere in a slice, on the calling thread.

use candle_core::Result;
use gemm::{Parallelism, gemm};

/// A matrix in a slice: element `(i, j)` stands at `i · row + j · column`.
#[derive(Clone, Copy, Debug)]
pub(in crate::kernels) struct Matrix<'a> {
    values: &'a [f32],
    shape: (usize, usize),
    row: usize,
    column: usize,
}

impl<'a> Matrix<'a> {
    /// The rows of `values` from `start` on, each `row` after the one before.
    pub(in crate::kernels) fn rows(
        values: &'a [f32],
        start: usize,
        shape: (usize, usize),
        row: usize,
    ) -> Result<Self> {
        let Some(values) = values.get(start..) else {
            candle_core::bail!("a matrix that begins at {start} of {} values", values.len());
        };
        check(values.len(), shape, row, 1)?;
        Ok(Self { values, shape, row, column: 1 })
    }

    /// Rows become columns.
    pub(in crate::kernels) fn t(self) -> Self {
        let (rows, columns) = self.shape;
        Self { shape: (columns, rows), row: self.column, column: self.row, ..self }
    }
}

/// `into = keep · into + scale · a b`, where the rows of `into` are contiguous and `keep` is 0 or 1.
pub(in crate::kernels) fn product(
    into: &mut [f32],
    keep: bool,
    scale: f32,
    a: Matrix<'_>,
    b: Matrix<'_>,
) -> Result<()> {
    let ((m, k), (b_rows, n)) = (a.shape, b.shape);
    if k != b_rows {
        candle_core::bail!("product of {:?} and {:?}", a.shape, b.shape);
    }
    check(into.len(), (m, n), n, 1)?;
    check(a.values.len(), a.shape, a.row, a.column)?;
    check(b.values.len(), b.shape, b.row, b.column)?;
    let strides = [n, a.column, a.row, b.column, b.row].map(|stride| stride as isize);
    let [into_row, a_column, a_row, b_column, b_row] = strides;
    // SAFETY: the checks above hold every element that these sizes and strides lead to within its
    // slice, and `into` is borrowed mutably, so it overlaps neither factor.
    unsafe {
        gemm(
            m,
            n,
            k,
            into.as_mut_ptr(),
            1,
            into_row,
            keep,
            a.values.as_ptr(),
            a_column,
            a_row,
            b.values.as_ptr(),
            b_column,
            b_row,
            1.0,
            scale,
            false,
            false,
            false,
            Parallelism::None,
        );
    }
    Ok(())
}

/// Refuses a matrix whose last element is outside its slice.
fn check(len: usize, (rows, columns): (usize, usize), row: usize, column: usize) -> Result<()> {
    if rows == 0 || columns == 0 || (rows - 1) * row + (columns - 1) * column < len {
        return Ok(());
    }
    candle_core::bail!("a matrix {rows} x {columns} in {len} values");
}
