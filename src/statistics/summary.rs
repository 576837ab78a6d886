//! Sequences summed up by their pairs.

use candle_core::{DType, Device, Tensor};
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use crate::batch::flat;
use crate::error::{Error, Result};

/// Which pairs of rows of a sequence are looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
#[non_exhaustive]
pub enum Pairs {
    /// All of them.
    Full,
    /// Some, chosen by chance, each pair as likely as any other; all where there are no more. The same seed
    /// chooses the same pairs of a sequence of some length.
    Scattershot {
        /// How many, 1 to 2²⁰.
        count: usize,
        /// Of the choice.
        seed: u64,
    },
    /// Neighbours, level by level: at level 0 the first row and the second, the third and the fourth, and so
    /// on; at the next the midpoints of these pairs, paired the same way. A pair of level `l` spans `2^(l +
    /// 1)` rows, and rows that do not fill one are left out.
    ///
    /// ```text
    /// level 0    (0 1) (2 3) (4 5) (6 7) (8 9) 10
    /// level 1    (01 23)     (45 67)
    /// level 2    (0123 4567)
    /// ```
    Level(usize),
}

impl Pairs {
    /// The highest level: its pairs span more rows than a text has.
    const MOST_LEVEL: usize = 24;

    /// Rows that a sequence must have for one pair.
    #[must_use]
    pub fn needs(self) -> usize {
        match self {
            Self::Full | Self::Scattershot { .. } => 2,
            Self::Level(level) => 2 << level.min(Self::MOST_LEVEL),
        }
    }

    pub(super) fn validate(self) -> Result<()> {
        match self {
            Self::Scattershot { count, .. } if !(1..=1 << 20).contains(&count) => {
                Err(Error::parameter("count", "1 to 1048576 pairs", count))
            }
            Self::Level(level) if level > Self::MOST_LEVEL => {
                Err(Error::parameter("level", format!("at most {}", Self::MOST_LEVEL), level))
            }
            _ => Ok(()),
        }
    }
}

/// Statistics of the pairs of a sequence, one number for each channel: `(hidden)`.
///
/// Of a pair `w`, `x` the midpoint is `(w + x) / 2`, and the standard deviation, of these two numbers, `|w -
/// x| / 2`.
#[derive(Clone, Debug, PartialEq)]
pub struct Summary {
    /// Which pairs these are.
    pub pairs: Pairs,
    /// How many there were.
    pub count: usize,
    /// The mean of their midpoints. Of all pairs, that is the mean of the rows.
    pub mean: Vec<f32>,
    /// The mean of their variances, `((w - x) / 2)²`. Of all pairs, that is half the sample variance of the rows.
    pub variance: Vec<f32>,
    /// The mean of their standard deviations. Of all pairs, that is half of Gini's mean difference.
    pub sd: Vec<f32>,
}

impl Summary {
    /// Of rows `(tokens, hidden)`.
    ///
    /// # Errors
    /// As [`Running::add`] and [`Running::summary`].
    pub fn of(rows: &Tensor, pairs: Pairs) -> Result<Self> {
        let mut running = Running::new(pairs)?;
        running.add(rows)?;
        running.summary()
    }

    /// The mean distance of the two of a pair, `Σ |w - x|` over the channels.
    #[must_use]
    pub fn l1(&self) -> f32 {
        2.0 * self.sd.iter().sum::<f32>()
    }
}

/// A [`Summary`] of a sequence that grows. Adding a row costs as much as there are levels, or, for all pairs
/// and some of them, as there are rows. Added one by one or all at once, rows give the same to the last bit.
///
/// ```
/// # use candle_core::{Device, Tensor};
/// use hybrid_attention::statistics::{Pairs, Running};
///
/// # fn main() -> hybrid_attention::Result<()> {
/// let mut running = Running::new(Pairs::Full)?;
/// running.add(&Tensor::new(&[[1f32], [2.0]], &Device::Cpu)?)?;
/// assert_eq!(running.summary()?.sd, [0.5]); // |1 - 2| / 2
/// running.add(&Tensor::new(&[[6f32]], &Device::Cpu)?)?;
/// let summary = running.summary()?;
/// assert_eq!((summary.count, summary.mean[0], summary.variance[0]), (3, 3.0, 3.5));
/// assert_eq!(running.median()?, [3.5]); // of 1.5, 3.5 and 4
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Running {
    pairs: Pairs,
    rows: usize,
    hidden: usize,
    kind: Kind,
}

#[derive(Clone, Debug)]
enum Kind {
    /// Rows, their moments, and the sum of deviations of all pairs.
    Full { rows: Vec<f32>, mean: Vec<f64>, squares: Vec<f64>, deviations: Vec<f64> },
    /// Rows, and the pairs chosen so far (a reservoir; Vitter 1985).
    Scattershot { rows: Vec<f32>, chosen: Vec<(usize, usize)>, seen: u64, rng: Box<ChaCha8Rng> },
    /// What waits at each level for another to pair with, and the sums of the pairs of the last.
    Level { waiting: Vec<Option<Vec<f64>>>, midpoints: Vec<f32>, sums: [Vec<f64>; 3] },
}

impl Running {
    /// Of a sequence without rows.
    ///
    /// # Errors
    /// [`Error::Parameter`] for a count or a level outside its range.
    pub fn new(pairs: Pairs) -> Result<Self> {
        pairs.validate()?;
        let none = Vec::new;
        let kind = match pairs {
            Pairs::Full => {
                Kind::Full { rows: none(), mean: vec![], squares: vec![], deviations: vec![] }
            }
            Pairs::Scattershot { seed, .. } => {
                let rng = Box::new(ChaCha8Rng::seed_from_u64(seed));
                Kind::Scattershot { rows: none(), chosen: Vec::new(), seen: 0, rng }
            }
            Pairs::Level(level) => Kind::Level {
                waiting: vec![None; level + 1],
                midpoints: none(),
                sums: [vec![], vec![], vec![]],
            },
        };
        Ok(Self { pairs, rows: 0, hidden: 0, kind })
    }

    /// Which pairs it looks at.
    #[must_use]
    pub fn pairs(&self) -> Pairs {
        self.pairs
    }

    /// Rows added so far.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Adds rows, `(.., hidden)`.
    ///
    /// # Errors
    /// [`Error::Parameter`] for rows of another width than those before; [`Error::NotFinite`] for one that
    /// holds a NaN or an infinity. Nothing is added then.
    pub fn add(&mut self, rows: &Tensor) -> Result<()> {
        let rows = flat(&rows.detach())?;
        let (_, hidden) = rows
            .dims2()
            .map_err(|_| Error::parameter("rows", "(.., hidden)", format!("{:?}", rows.dims())))?;
        if hidden == 0 || self.rows > 0 && hidden != self.hidden {
            let expected = match self.rows {
                0 => "at least one channel".to_string(),
                _ => format!("{} channels, as before", self.hidden),
            };
            return Err(Error::parameter("rows", expected, hidden));
        }
        let values = rows.to_device(&Device::Cpu)?.to_dtype(DType::F32)?;
        let values = values.flatten_all()?.to_vec1::<f32>()?;
        if let Some(index) = values.iter().position(|value| !value.is_finite()) {
            return Err(Error::NotFinite { what: "states", position: self.rows + index / hidden });
        }
        self.hidden = hidden;
        values.chunks_exact(hidden).for_each(|row| self.push(row));
        Ok(())
    }

    fn push(&mut self, row: &[f32]) {
        self.rows += 1;
        match (&mut self.kind, self.pairs) {
            (Kind::Full { rows, mean, squares, deviations }, _) => {
                for sums in [&mut *mean, &mut *squares, &mut *deviations] {
                    sums.resize(row.len(), 0.0);
                }
                for before in rows.chunks_exact(row.len()) {
                    for ((sum, w), x) in deviations.iter_mut().zip(before).zip(row) {
                        *sum += f64::from(w - x).abs() / 2.0;
                    }
                }
                // Welford 1962
                for ((mean, squares), x) in mean.iter_mut().zip(squares).zip(row) {
                    let before = f64::from(*x) - *mean;
                    *mean += before / self.rows as f64;
                    *squares += before * (f64::from(*x) - *mean);
                }
                rows.extend_from_slice(row);
            }
            (Kind::Scattershot { rows, chosen, seen, rng }, Pairs::Scattershot { count, .. }) => {
                let new = self.rows - 1;
                for before in 0..new {
                    *seen += 1;
                    if chosen.len() < count {
                        chosen.push((before, new));
                    } else if let Ok(place) = usize::try_from(rng.random_range(0..*seen))
                        && let Some(pair) = chosen.get_mut(place)
                    {
                        *pair = (before, new);
                    }
                }
                rows.extend_from_slice(row);
            }
            (Kind::Level { waiting, midpoints, sums }, _) => {
                let mut own: Vec<f64> = row.iter().map(|x| f64::from(*x)).collect();
                let last = waiting.len() - 1;
                for (level, waiting) in waiting.iter_mut().enumerate() {
                    let Some(before) = waiting.take() else {
                        *waiting = Some(own);
                        return;
                    };
                    if level == last {
                        add_pair(&before, &own, sums);
                    }
                    for (x, w) in own.iter_mut().zip(before) {
                        *x = (*x + w) / 2.0;
                    }
                }
                midpoints.extend(own.into_iter().map(|x| x as f32));
            }
            _ => {}
        }
    }

    /// What the rows so far come to.
    ///
    /// # Errors
    /// [`Error::Parameter`] where there is no pair: of one token, or fewer than a level needs.
    pub fn summary(&self) -> Result<Summary> {
        let count = self.count()?;
        let sum = |of: [&Vec<f64>; 3], by: [f64; 3]| {
            let [mean, variance, sd] = [0, 1, 2]
                .map(|at| of[at].iter().map(|it| (it / by[at]) as f32).collect::<Vec<_>>());
            Summary { pairs: self.pairs, count, mean, variance, sd }
        };
        let n = count as f64;
        Ok(match &self.kind {
            Kind::Full { mean, squares, deviations, .. } => {
                let half_sample = 2.0 * (self.rows as f64 - 1.0);
                sum([mean, squares, deviations], [1.0, half_sample, n])
            }
            Kind::Scattershot { .. } => {
                let mut sums = [vec![], vec![], vec![]];
                self.each_pair(|w, x| {
                    let wide = |row: &[f32]| row.iter().map(|x| f64::from(*x)).collect::<Vec<_>>();
                    add_pair(&wide(w), &wide(x), &mut sums);
                });
                let [mean, squares, deviations] = &sums;
                sum([mean, squares, deviations], [n; 3])
            }
            Kind::Level { sums: [mean, squares, deviations], .. } => {
                sum([mean, squares, deviations], [n; 3])
            }
        })
    }

    /// The median of the pairs' midpoints, channel by channel (Hodges & Lehmann 1963): the mean of the middle
    /// two, where they are even in number. Looks at all pairs again, however often it is asked.
    ///
    /// # Errors
    /// As [`Running::summary`].
    pub fn median(&self) -> Result<Vec<f32>> {
        let count = self.count()?;
        let mut columns = vec![Vec::with_capacity(count); self.hidden];
        match &self.kind {
            Kind::Level { midpoints, .. } => {
                for row in midpoints.chunks_exact(self.hidden) {
                    columns.iter_mut().zip(row).for_each(|(column, x)| column.push(*x));
                }
            }
            _ => self.each_pair(|w, x| {
                for (column, (w, x)) in columns.iter_mut().zip(w.iter().zip(x)) {
                    column.push(((f64::from(*w) + f64::from(*x)) / 2.0) as f32);
                }
            }),
        }
        Ok(columns.into_iter().map(median).collect())
    }

    /// How many pairs there are.
    fn count(&self) -> Result<usize> {
        let needs = self.pairs.needs();
        if self.rows < needs {
            let expected = format!("at least {needs}, for one pair of {:?}", self.pairs);
            return Err(Error::parameter("tokens", expected, self.rows));
        }
        Ok(match &self.kind {
            Kind::Full { .. } => self.rows * (self.rows - 1) / 2,
            Kind::Scattershot { chosen, .. } => chosen.len(),
            Kind::Level { .. } => self.rows / needs,
        })
    }

    /// Each pair of rows, the earlier first; of levels, none.
    fn each_pair(&self, mut pair: impl FnMut(&[f32], &[f32])) {
        let row = |rows: &Vec<f32>, at: usize| {
            rows.get(at * self.hidden..(at + 1) * self.hidden).unwrap_or_default().to_vec()
        };
        match &self.kind {
            Kind::Full { rows, .. } => {
                for (at, x) in rows.chunks_exact(self.hidden).enumerate() {
                    rows.chunks_exact(self.hidden).take(at).for_each(|w| pair(w, x));
                }
            }
            Kind::Scattershot { rows, chosen, .. } => {
                chosen.iter().for_each(|(w, x)| pair(&row(rows, *w), &row(rows, *x)));
            }
            Kind::Level { .. } => {}
        }
    }
}

/// Adds the midpoint, the variance and the standard deviation of a pair.
fn add_pair(w: &[f64], x: &[f64], [mean, variance, sd]: &mut [Vec<f64>; 3]) {
    for sums in [&mut *mean, &mut *variance, &mut *sd] {
        sums.resize(x.len(), 0.0);
    }
    let pairs = w.iter().zip(x);
    for ((w, x), ((mean, variance), sd)) in pairs.zip(mean.iter_mut().zip(variance).zip(sd)) {
        let apart = (w - x).abs() / 2.0;
        *mean += (w + x) / 2.0;
        *variance += apart * apart;
        *sd += apart;
    }
}

fn median(mut values: Vec<f32>) -> f32 {
    let middle = values.len() / 2;
    let even = values.len().is_multiple_of(2);
    if middle >= values.len() {
        return 0.0;
    }
    let (below, upper, _) = values.select_nth_unstable_by(middle, f32::total_cmp);
    let upper = *upper;
    match below.iter().copied().reduce(f32::max) {
        Some(lower) if even => ((f64::from(lower) + f64::from(upper)) / 2.0) as f32,
        _ => upper,
    }
}
