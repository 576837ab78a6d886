//! Weights in FP8, and what they are multiplied by.

/// The values of `F8_E4M3` by their bits: a sign, 4 bits of exponent, 3 of mantissa, no infinity, and as the
/// two NaN those with all other bits set (Micikevicius et al. 2022).
pub(super) const E4M3: [f32; 256] = {
    let mut values = [0.0; 256];
    let mut bits = 0;
    while bits < 256 {
        let (exponent, mantissa) = ((bits as u32 >> 3) & 15, bits as u32 & 7);
        let size = match (exponent, mantissa) {
            (0, _) => mantissa as f32 / 512.0,
            (15, 7) => f32::NAN,
            _ => f32::from_bits(((exponent + 127 - 7) << 23) | (mantissa << 20)),
        };
        values[bits] = if bits < 128 { size } else { -size };
        bits += 1;
    }
    values
};

/// The scales of a matrix.
///
/// Those of a matrix of 3 x 5 in blocks of 2 x 2, and the element of each, by row and column:
///
/// ```text
/// a b c        a a b b c
/// d e f        a a b b c
///              d d e e f        row 2 has d e f, each for 2 columns
/// ```
#[derive(Debug)]
pub(super) struct Scales {
    values: Vec<f32>,
    /// Rows and columns that share a scale.
    block: (usize, usize),
    /// Scales of a row.
    per_row: usize,
}

impl Scales {
    /// `values`, stored in this shape, for a matrix `(rows, columns)`: one for all, one for each row, or one
    /// for each `block`. If they are none of these, the shape of the last.
    pub(super) fn fit(
        values: Vec<f32>,
        stored: &[usize],
        (rows, columns): (usize, usize),
        block: (usize, usize),
    ) -> Result<Self, Vec<usize>> {
        let blocks = [rows.div_ceil(block.0.max(1)), columns.div_ceil(block.1.max(1))];
        let block = match stored {
            _ if values.len() == 1 => (rows, columns),
            [count] | [count, 1] if *count == rows => (1, columns),
            stored if stored == blocks => block,
            _ => return Err(blocks.to_vec()),
        };
        let block = (block.0.max(1), block.1.max(1));
        let per_row = columns.div_ceil(block.1);
        Ok(Self { values, block, per_row })
    }

    /// Those of one row, each for [`width`](Self::width) columns.
    pub(super) fn of_row(&self, row: usize) -> &[f32] {
        let start = row / self.block.0 * self.per_row;
        self.values.get(start..).and_then(|rest| rest.get(..self.per_row)).unwrap_or_default()
    }

    pub(super) fn width(&self) -> usize {
        self.block.1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worked_example() -> Result<(), Vec<usize>> {
        let values = vec![1.0, 2.0, 3.0, 4.0, 5.0, 6.0];
        let scales = Scales::fit(values, &[2, 3], (3, 5), (2, 2))?;
        assert_eq!(scales.of_row(1), [1.0, 2.0, 3.0]);
        assert_eq!(scales.of_row(2), [4.0, 5.0, 6.0]);
        assert_eq!(scales.width(), 2);
        Ok(())
    }

    #[test]
    fn a_row_or_all_may_share_one() -> Result<(), Vec<usize>> {
        let rows = Scales::fit(vec![1.0, 2.0, 3.0], &[3, 1], (3, 5), (2, 2))?;
        assert_eq!((rows.of_row(2), rows.width()), ([3.0].as_slice(), 5));
        for shape in [[].as_slice(), &[1], &[1, 1]] {
            let all = Scales::fit(vec![7.0], shape, (3, 5), (2, 2))?;
            assert_eq!((all.of_row(2), all.width()), ([7.0].as_slice(), 5));
        }
        let wrong = Scales::fit(vec![1.0, 2.0], &[2], (3, 5), (2, 2));
        assert_eq!(wrong.err(), Some(vec![2, 3]));
        Ok(())
    }
}
