//! Rows of numbers as digits, and how far these are apart.

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::kernels::{DIGIT_ROWS, DigitRun, DigitTable};

/// How the digits of a table are made and weighed. The default is one decimal digit for each coordinate,
/// which finds what exact search finds as long as noise stays below twice the spread of the table.
///
/// A coordinate's range, three standard deviations of the table to either side of the coordinate's mean, is
/// cut into `base` parts, each of these again, and so on: the first digit says which part, the next which
/// part of that. What is outside of the range takes the part at its end. Digits are kept in the order of
/// their weight: the first of all coordinates, then the second of all, each weighing `factor` times the next.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Digits {
    base: usize,
    places: usize,
    factor: usize,
}

impl Default for Digits {
    fn default() -> Self {
        Self { base: 10, places: 1, factor: 10 }
    }
}

impl Digits {
    /// What a digit counts up to, 2 to 16. Default 10. Each takes half a byte.
    #[must_use]
    pub fn base(mut self, base: usize) -> Self {
        self.base = base;
        self
    }

    /// Digits of each coordinate, 1 to 4. Default 1.
    #[must_use]
    pub fn places(mut self, places: usize) -> Self {
        self.places = places;
        self
    }

    /// How much more a digit weighs than the one to its right: 1 to 100, and squared where differences are. Default
    /// 10. Of no effect on a single digit.
    #[must_use]
    pub fn factor(mut self, factor: usize) -> Self {
        self.factor = factor;
        self
    }

    pub(super) fn validate(self) -> Result<()> {
        for (name, got, range) in [
            ("base", self.base, 2..=16),
            ("places", self.places, 1..=4),
            ("factor", self.factor, 1..=100),
        ] {
            if !range.contains(&got) {
                let (least, most) = range.into_inner();
                return Err(Error::parameter(name, format!("{least} to {most}"), got));
            }
        }
        Ok(())
    }

    /// How many parts a coordinate's range has in the end.
    fn levels(self) -> usize {
        (0..self.places).fold(1, |levels, _| levels * self.base)
    }
}

/// How far two codes are from each other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum DigitDistance {
    /// The sum of squared differences of digits.
    #[default]
    Squared,
    /// How many digits differ.
    Hamming,
}

/// Where the parts of each coordinate's range begin.
#[derive(Debug)]
pub(super) struct Grid {
    how: Digits,
    /// `(hidden)`
    means: Vec<f32>,
    width: f32,
}

impl Grid {
    /// How far a coordinate's range goes to either side of its mean, in standard deviations of the table.
    const REACH: f32 = 3.0;

    /// For coordinates with these means, and a table with this standard deviation around them.
    pub(super) fn new(how: Digits, means: Vec<f32>, sd: f32) -> Self {
        let width = 2.0 * Self::REACH * sd / how.levels() as f32;
        // Of rows that are all the same any digits will do.
        Self { how, means, width: if width > 0.0 { width } else { 1.0 } }
    }

    /// Digits of a row.
    pub(super) fn columns(&self) -> usize {
        self.means.len() * self.how.places
    }

    /// Which of the parts of its range each coordinate of a row is in.
    fn parts<'a>(&'a self, row: &'a [f32]) -> impl Iterator<Item = usize> + 'a {
        let levels = self.how.levels();
        row.iter().zip(&self.means).map(move |(value, mean)| {
            // A cast of what is below 0 gives 0.
            let part = ((value - mean) / self.width + levels as f32 / 2.0) as usize;
            part.min(levels - 1)
        })
    }

    /// The digits of each coordinate of a row: of all the first, then of all the second, and so on.
    fn digits(&self, row: &[f32]) -> Vec<usize> {
        let parts: Vec<usize> = self.parts(row).collect();
        let mut digits = Vec::with_capacity(parts.len() * self.how.places);
        let mut below = self.how.levels();
        for _ in 0..self.how.places {
            below /= self.how.base;
            digits.extend(parts.iter().map(|part| part / below % self.how.base));
        }
        digits
    }

    /// Writes the digits of at most [`DIGIT_ROWS`] rows to their block.
    pub(super) fn write(&self, rows: &[f32], block: &mut [[u8; 16]]) {
        for (place, row) in rows.chunks_exact(self.means.len()).enumerate() {
            let shift = if place < DIGIT_ROWS / 2 { 0 } else { 4 };
            for (bytes, digit) in block.iter_mut().zip(self.digits(row)) {
                if let Some(byte) = bytes.get_mut(place % (DIGIT_ROWS / 2)) {
                    *byte |= (digit as u8) << shift; // a digit is below 16
                }
            }
        }
    }

    /// What each column of a query is apart from each digit.
    pub(super) fn tables(&self, query: &[f32], distance: DigitDistance) -> Vec<DigitTable> {
        let table = |own: usize| {
            let mut digit = 0;
            [(); 16].map(|()| {
                let apart = own.abs_diff(digit);
                digit += 1;
                let byte = match distance {
                    DigitDistance::Squared => (apart * apart) as u8, // at most 15²
                    DigitDistance::Hamming => u8::from(apart > 0),
                };
                byte as i8
            })
        };
        self.digits(query).into_iter().map(table).collect()
    }

    /// The largest number of those tables that a digit of this base can find.
    pub(super) fn most(&self, distance: DigitDistance) -> u8 {
        match distance {
            DigitDistance::Squared => ((self.how.base - 1) * (self.how.base - 1)) as u8,
            DigitDistance::Hamming => 1,
        }
    }

    /// The weights of the places, the first first.
    pub(super) fn runs(&self, distance: DigitDistance) -> Vec<DigitRun> {
        let factor = match distance {
            DigitDistance::Squared => self.how.factor * self.how.factor,
            DigitDistance::Hamming => self.how.factor,
        } as u64;
        let run = |place: usize| DigitRun {
            columns: self.means.len(),
            weight: (place + 1..self.how.places).fold(1, |weight, _| weight * factor),
        };
        (0..self.how.places).map(run).collect()
    }
}
