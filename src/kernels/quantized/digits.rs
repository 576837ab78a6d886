//! Sums over digits of 4 bits: for each row, what a table gives for its digit in each column.
//!
//! ```text
//! sums[r] = Σ weight(c) · tables[c][digit(r, c)]
//! ```
//!
//! With `(q - digit)²` in the tables that is how far the rows are from a query `q`, and with 0 or 1 the number of
//! digits that differ.

use pulp::{Arch, Simd, WithSimd};

use super::simd::{OnQuantSimd, QuantSimd, on_quant_simd};

/// Rows that lie together. Of each column, 16 bytes hold their digits: those of the first half of the rows in the
/// lower halves, those of the others in the upper.
pub(crate) const DIGIT_ROWS: usize = 32;

/// What a table gives for each of 16 digits: the bits of numbers without a sign.
pub(crate) type DigitTable = [i8; 16];

/// Columns that follow each other and weigh the same.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DigitRun {
    pub(crate) columns: usize,
    /// Small enough that the sums fit 64 bits.
    pub(crate) weight: u64,
}

/// The sums of blocks of rows, one block after the other: each 16 bytes for each of the columns. `most` is the
/// largest number in the tables.
pub(crate) fn sum_digits(
    digits: &[[u8; 16]],
    tables: &[DigitTable],
    most: u8,
    runs: &[DigitRun],
    sums: &mut [[u64; DIGIT_ROWS]],
) {
    Arch::new().dispatch(Sum { digits, tables, most, runs, sums });
}

struct Sum<'a> {
    digits: &'a [[u8; 16]],
    tables: &'a [DigitTable],
    most: u8,
    runs: &'a [DigitRun],
    sums: &'a mut [[u64; DIGIT_ROWS]],
}

impl WithSimd for Sum<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, simd: S) {
        on_quant_simd(simd, self);
    }
}

impl OnQuantSimd for Sum<'_> {
    type Output = ();

    /// Numbers are added up in bytes as long as they fit, then in 16 bits, then with their weight in 64.
    #[inline(always)]
    fn run(self, simd: impl QuantSimd) {
        let in_byte = usize::from(u8::MAX / self.most.max(1));
        let in_sixteen = usize::from(u16::MAX / u16::from(self.most.max(1)));
        let none = simd.load(&[0; 32]);
        // Two columns at a time. Of each half of the rows, the first 16 bytes are sums of the columns at even places.
        let add = |sums: &mut [_; 2], digits: &[[u8; 16]; 2], tables: &[DigitTable; 2]| {
            let digits = simd.load(&pulp::cast(*digits));
            for (sum, digits) in sums.iter_mut().zip([digits, simd.shift_down(digits, 4)]) {
                *sum = simd.sum(*sum, simd.look_up(tables, simd.and(digits, 15)));
            }
        };
        let blocks = self.digits.chunks_exact(self.tables.len().max(1));
        for (block, sums) in blocks.zip(self.sums) {
            *sums = [0; DIGIT_ROWS];
            let mut left = (block, self.tables);
            for DigitRun { columns, weight } in self.runs {
                let (digits, later_digits) = left.0.split_at((*columns).min(left.0.len()));
                let (tables, later_tables) = left.1.split_at((*columns).min(left.1.len()));
                left = (later_digits, later_tables);
                let most = 2 * in_sixteen;
                for (digits, tables) in digits.chunks(most).zip(tables.chunks(most)) {
                    let mut wide = [[none; 2]; 2];
                    let most = 2 * in_byte;
                    for (digits, tables) in digits.chunks(most).zip(tables.chunks(most)) {
                        let mut bytes = [none; 2];
                        let (pairs, last_digits) = digits.as_chunks();
                        let (pairs_of_tables, last_tables) = tables.as_chunks();
                        for (digits, tables) in pairs.iter().zip(pairs_of_tables) {
                            add(&mut bytes, digits, tables);
                        }
                        for (digits, table) in last_digits.iter().zip(last_tables) {
                            add(&mut bytes, &[*digits, [0; 16]], &[*table, [0; 16]]);
                        }
                        for (wide, bytes) in wide.iter_mut().zip(bytes) {
                            *wide = simd.sum_wide(*wide, bytes);
                        }
                    }
                    for (sums, wide) in sums.as_chunks_mut::<16>().0.iter_mut().zip(wide) {
                        // (columns at even and odd places, every other row)
                        let [even, odd]: [[[u16; 8]; 2]; 2] =
                            wide.map(|half| pulp::cast(simd.sixteens(half)));
                        for (at, [first, second]) in sums.as_chunks_mut().0.iter_mut().enumerate() {
                            let both = |rows: [[u16; 8]; 2]| {
                                rows.iter()
                                    .filter_map(|it| it.get(at))
                                    .copied()
                                    .map(u64::from)
                                    .sum::<u64>()
                            };
                            *first += weight * both(even);
                            *second += weight * both(odd);
                        }
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use rand::{RngCore, SeedableRng};
    use rand_chacha::ChaCha8Rng;

    use super::*;

    /// Digit by digit.
    fn plain(digits: &[[u8; 16]], tables: &[DigitTable], runs: &[DigitRun]) -> Vec<u64> {
        let weights = runs.iter().flat_map(|run| std::iter::repeat_n(run.weight, run.columns));
        let weights: Vec<u64> = weights.collect();
        let mut sums = Vec::new();
        for block in digits.chunks(tables.len()) {
            for row in 0..DIGIT_ROWS {
                let columns = block.iter().zip(tables).zip(&weights);
                sums.push(columns.fold(0, |sum, ((digits, table), weight)| {
                    let byte = digits[row % 16];
                    let digit = if row < 16 { byte & 15 } else { byte >> 4 };
                    sum + weight * u64::from(table[usize::from(digit)] as u8)
                }));
            }
        }
        sums
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        /// A processor takes only one of these paths; others take the others.
        #[test]
        fn every_vector_unit_sums_what_a_plain_loop_does(
            columns in prop::collection::vec(1usize..900, 1..4), blocks in 0usize..4,
            most in prop::sample::select(vec![0u8, 1, 81, 225, 255]),
            weight in prop::sample::select(vec![1u64, 10, 1 << 40]), seed: u64,
        ) {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            let runs: Vec<DigitRun> = (0..).zip(&columns).map(|(place, columns)| DigitRun {
                columns: *columns,
                weight: weight >> place,
            }).collect();
            let all = columns.iter().sum::<usize>();
            let mut tables = vec![[0; 16]; all];
            tables.iter_mut().flatten().for_each(|it| {
                // Often the largest there may be
                let random = rng.next_u32();
                let byte = if random % 3 == 0 { most } else { (random >> 8) as u8 % most.max(1) };
                *it = byte as i8;
            });
            let mut digits = vec![[0; 16]; blocks * all];
            digits.iter_mut().for_each(|bytes| rng.fill_bytes(bytes));
            let expected = plain(&digits, &tables, &runs);
            let check = |run: &dyn Fn(Sum<'_>)| {
                let mut sums = vec![[7; DIGIT_ROWS]; blocks];
                run(Sum { digits: &digits, tables: &tables, most, runs: &runs, sums: &mut sums });
                prop_assert_eq!(sums.concat(), expected.clone());
                Ok(())
            };
            check(&|it| Simd::vectorize(pulp::Scalar::new(), it))?;
            check(&|it| Arch::new().dispatch(it))?;
            #[cfg(target_arch = "x86_64")]
            if let Some(simd) = pulp::x86::V3::try_new() {
                check(&|it| Simd::vectorize(simd, it))?;
            }
        }
    }
}
