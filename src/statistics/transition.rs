//! Which state comes next: from a matrix that holds for all texts, or from one made of what this text did before.

use candle_core::Tensor;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

use super::rows::rows_of;
use super::solve::{Cholesky, dot};
use crate::error::{Error, Result};

/// How a [`Transition`] is fitted.
#[derive(Clone, Debug, PartialEq)]
pub struct TransitionConfig {
    /// Kinds of rows that are told apart, 2 to 4096. Default 16.
    pub states: usize,
    /// Steps of the past that a matrix is made of, 1 to 65,536. Default 32.
    pub window: usize,
    /// How many steps the default matrix counts for in one made of the past, above 0. Default 1.
    pub prior: f64,
    /// Of the clusters and of which texts are held out. Default 0.
    pub seed: u64,
}

impl Default for TransitionConfig {
    fn default() -> Self {
        Self { states: 16, window: 32, prior: 1.0, seed: 0 }
    }
}

impl TransitionConfig {
    fn validate(&self) -> Result<()> {
        if !(2..=4096).contains(&self.states) {
            return Err(Error::parameter("states", "2 to 4096", self.states));
        }
        if !(1..=65_536).contains(&self.window) {
            return Err(Error::parameter("window", "1 to 65536", self.window));
        }
        if !(self.prior > 0.0 && self.prior <= 1e6) {
            return Err(Error::parameter("prior", "a number above 0 and up to 1e6", self.prior));
        }
        Ok(())
    }
}

/// How far what is expected is from what comes, in nats a step, the mean over steps of texts that are held out.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Figures {
    /// By the default matrix.
    pub default: f64,
    /// By the one made of the past.
    pub generated: f64,
    /// By whichever of the two turns out closer, as in training: what no choice made beforehand can do better than.
    pub closer: f64,
    /// By the one that the gate chooses, as in use.
    pub gated: f64,
    /// Steps that these are means of.
    pub steps: usize,
}

/// Two paths to the next state of a text. States are clusters of rows (k-means; Lloyd 1982, begun as Arthur &
/// Vassilvitskii 2007). The *default* path is a matrix of how often each followed each in other texts; the
/// *generated* one is made of how often it did so in the steps just past, with the default for a prior. In
/// training whichever comes closer to what came is kept; in use, where that is not known, a gate chooses, a
/// logistic regression on how sure both are, how much they agree, and how often the past has been in this
/// state.
/// On SmolLM2 and news the gate always takes the default, and rightly so; texts that repeat themselves are
/// what the other path is for.
///
/// Half of the texts go into the matrix, a quarter teaches the gate, and a quarter is held out for the [`Figures`].
///
/// ```
/// # use candle_core::Device;
/// use hybrid_attention::HybridModel;
/// use hybrid_attention::statistics::{Transition, TransitionConfig, states};
///
/// # fn main() -> hybrid_attention::Result<()> {
/// let model = HybridModel::tiny(&Device::Cpu)?;
/// let text = |first: u32| (0..30).map(|at| 20 + (first + at) % (3 + first % 4)).collect::<Vec<_>>(); // cycles
/// let texts: Vec<_> = (0..16).map(|it| states(model.transformer(), &text(it), 1)).collect::<Result<_, _>>()?;
/// let transition = Transition::fit(&texts, &TransitionConfig { states: 8, ..TransitionConfig::default() })?;
///
/// let next = transition.next(&texts[0])?; // a probability for each state
/// assert!((next.iter().sum::<f64>() - 1.0).abs() < 1e-9);
/// let figures = transition.figures();
/// assert!(figures.closer <= figures.gated && figures.closer <= figures.default);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Transition {
    centres: Vec<Vec<f32>>,
    matrix: Vec<Vec<f64>>,
    config: TransitionConfig,
    gate: Features,
    figures: Figures,
}

/// What the gate looks at, beside a constant.
type Features = [f64; 5];

/// What both paths say of a step.
struct Step {
    default: Vec<f64>,
    generated: Vec<f64>,
    features: Features,
}

impl Transition {
    /// Fits one to texts: rows of states `(tokens, hidden)` each.
    ///
    /// # Errors
    /// [`Error::Parameter`] for settings outside their ranges, fewer than four texts, or fewer different rows
    /// than states; [`Error::InText`] for a text of fewer than two rows, of another width than the first, or
    /// that is not finite.
    pub fn fit(texts: &[Tensor], config: &TransitionConfig) -> Result<Self> {
        config.validate()?;
        if texts.len() < 4 {
            return Err(Error::parameter("texts", "at least 4", texts.len()));
        }
        let mut width = None;
        let mut all = Vec::with_capacity(texts.len());
        for (text, rows) in texts.iter().enumerate() {
            let rows = rows_of(rows, &mut width, 2);
            all.push(rows.map_err(|error| Error::InText { text, source: Box::new(error) })?);
        }
        let mut rng = ChaCha8Rng::seed_from_u64(config.seed);
        all.shuffle(&mut rng);
        let held_out = all.split_off(all.len() - (all.len() / 4).max(1));
        let for_gate = all.split_off(all.len() - (all.len() / 3).max(1));

        let centres = centres(&all, config.states, &mut rng)?;
        let walk = |rows: &Vec<Vec<f32>>| nearest_of(rows, &centres);
        let matrix = matrix(all.iter().map(walk), config.states);
        let (gate, figures) = ([0.0; 5], Figures::default());
        let mut fitted =
            Self { matrix, config: config.clone(), gate, figures, centres: Vec::new() };
        let walks: Vec<_> = for_gate.iter().map(walk).collect();
        fitted.gate = fitted.learned(&walks);
        let walks: Vec<_> = held_out.iter().map(walk).collect();
        fitted.figures = fitted.measured(&walks);
        Ok(Self { centres, ..fitted })
    }

    /// What each path came to on texts that were held out.
    #[must_use]
    pub fn figures(&self) -> Figures {
        self.figures
    }

    /// The rows that states are nearest to: `states` of them, of `hidden` numbers.
    #[must_use]
    pub fn centres(&self) -> &[Vec<f32>] {
        &self.centres
    }

    /// The probability of each state, in columns, after each, in rows: the default path.
    #[must_use]
    pub fn matrix(&self) -> &[Vec<f64>] {
        &self.matrix
    }

    /// The states of rows `(tokens, hidden)`.
    ///
    /// # Errors
    /// [`Error::Parameter`] for no rows, or rows of another width; [`Error::NotFinite`].
    pub fn walk(&self, rows: &Tensor) -> Result<Vec<usize>> {
        let mut width = self.centres.first().map(Vec::len);
        Ok(nearest_of(&rows_of(rows, &mut width, 1)?, &self.centres))
    }

    /// The probability of each state after rows `(tokens, hidden)`, by the path that the gate chooses.
    ///
    /// # Errors
    /// As [`Transition::walk`].
    pub fn next(&self, past: &Tensor) -> Result<Vec<f64>> {
        let step = self.step(&self.walk(past)?);
        Ok(if self.generates(&step.features) { step.generated } else { step.default })
    }

    fn generates(&self, features: &Features) -> bool {
        dot(&self.gate, features) > 0.0
    }

    /// After a walk of at least one state.
    fn step(&self, walk: &[usize]) -> Step {
        let now = walk.last().copied().unwrap_or(0);
        let default = self.matrix.get(now).cloned().unwrap_or_default();
        let from = walk.len().saturating_sub(self.config.window + 1);
        let past = walk.get(from..).unwrap_or_default();
        let prior = self.config.prior;
        let mut generated: Vec<f64> = default.iter().map(|it| it * prior).collect();
        let mut seen = 0.0;
        for pair in past.windows(2) {
            if let [before, after] = pair
                && *before == now
                && let Some(count) = generated.get_mut(*after)
            {
                *count += 1.0;
                seen += 1.0;
            }
        }
        generated.iter_mut().for_each(|it| *it /= seen + prior);
        let entropy = |of: &[f64]| -of.iter().map(|p| p * p.ln()).sum::<f64>();
        let common = default.iter().zip(&generated).map(|(a, b)| a.min(*b)).sum::<f64>();
        let features = [1.0, entropy(&default), entropy(&generated), common, f64::ln_1p(seen)];
        Step { default, generated, features }
    }

    /// What each step of some walks costs by both paths, in nats, and what the gate sees of it.
    fn steps(&self, walks: &[Vec<usize>]) -> Vec<(f64, f64, Features)> {
        let of_walk = |walk: &Vec<usize>| {
            let cost = |to: usize| {
                let next = walk.get(to).copied().unwrap_or(0);
                let step = self.step(walk.get(..to).unwrap_or_default());
                let nats = |of: &[f64]| -of.get(next).copied().unwrap_or(1.0).ln();
                (nats(&step.default), nats(&step.generated), step.features)
            };
            (1..walk.len()).map(cost).collect::<Vec<_>>()
        };
        walks.par_iter().map(of_walk).collect::<Vec<_>>().concat()
    }

    /// The gate: which path was closer, told from what was known before, each step counting by how much
    /// closer. Newton's method, with a little ridge.
    fn learned(&self, walks: &[Vec<usize>]) -> Features {
        const RIDGE: f64 = 1e-2;
        let steps = self.steps(walks);
        let mut gate: Features = [0.0; 5];
        for _ in 0..20 {
            let mut slope = gate.map(|weight| -RIDGE * weight);
            let mut curve = vec![vec![0.0; gate.len()]; gate.len()];
            curve.iter_mut().enumerate().for_each(|(i, row)| row[i] = RIDGE);
            for (default, generated, features) in &steps {
                let (weight, closer) =
                    ((default - generated).abs(), f64::from(generated < default));
                let share = 1.0 / (1.0 + (-dot(&gate, features)).exp());
                for ((slope, row), own) in slope.iter_mut().zip(&mut curve).zip(features) {
                    *slope += weight * (closer - share) * own;
                    for (curve, other) in row.iter_mut().zip(features) {
                        *curve += weight * share * (1.0 - share) * own * other;
                    }
                }
            }
            let by = Cholesky::of(&curve, RIDGE * 1e-6).solve(slope);
            gate.iter_mut().zip(by).for_each(|(weight, by)| *weight += by.clamp(-10.0, 10.0));
        }
        gate
    }

    fn measured(&self, walks: &[Vec<usize>]) -> Figures {
        let steps = self.steps(walks);
        let mean = |of: &dyn Fn(&(f64, f64, Features)) -> f64| {
            steps.iter().map(of).sum::<f64>() / steps.len().max(1) as f64
        };
        Figures {
            default: mean(&|step| step.0),
            generated: mean(&|step| step.1),
            closer: mean(&|step| step.0.min(step.1)),
            gated: mean(&|step| if self.generates(&step.2) { step.1 } else { step.0 }),
            steps: steps.len(),
        }
    }
}

/// Squared.
fn apart(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2)).sum()
}

/// The nearest centre and how far it is; of equals the first.
fn nearest(row: &[f32], centres: &[Vec<f32>]) -> (usize, f64) {
    let far = (0, f64::INFINITY);
    centres.iter().enumerate().fold(far, |best, (at, centre)| {
        let own = apart(row, centre);
        if own < best.1 { (at, own) } else { best }
    })
}

fn nearest_of(rows: &[Vec<f32>], centres: &[Vec<f32>]) -> Vec<usize> {
    rows.par_iter().map(|row| nearest(row, centres).0).collect()
}

/// Clusters of all rows. What is added up is added in the order of the rows, whichever threads there are.
fn centres(texts: &[Vec<Vec<f32>>], count: usize, rng: &mut ChaCha8Rng) -> Result<Vec<Vec<f32>>> {
    let rows: Vec<&Vec<f32>> = texts.iter().flatten().collect();
    let mut centres: Vec<Vec<f32>> = Vec::with_capacity(count);
    let mut left = vec![f64::INFINITY; rows.len()];
    while centres.len() < count {
        let next = match centres.last() {
            None => rng.random_range(0..rows.len().max(1)),
            Some(last) => {
                left.par_iter_mut()
                    .zip(&rows)
                    .for_each(|(left, row)| *left = left.min(apart(row, last)));
                let mut at = rng.random_range(0.0..1.0) * left.iter().sum::<f64>();
                let reached = left.iter().position(|it| {
                    at -= it;
                    at < 0.0
                });
                let Some(next) = reached else {
                    let expected = format!("at least {count} different rows");
                    return Err(Error::parameter("states", expected, centres.len()));
                };
                next
            }
        };
        centres.extend(rows.get(next).map(|row| (*row).clone()));
    }
    for _ in 0..25 {
        let of_row: Vec<usize> = rows.par_iter().map(|row| nearest(row, &centres).0).collect();
        let mut sums = vec![(vec![0f64; rows.first().map_or(0, |row| row.len())], 0usize); count];
        for (row, own) in rows.iter().zip(of_row) {
            if let Some((sum, count)) = sums.get_mut(own) {
                sum.iter_mut().zip(row.iter()).for_each(|(sum, value)| *sum += f64::from(*value));
                *count += 1;
            }
        }
        let before = centres.clone();
        for (centre, (sum, count)) in centres.iter_mut().zip(sums).filter(|(_, (_, n))| *n > 0) {
            *centre = sum.into_iter().map(|it| (it / count as f64) as f32).collect();
        }
        if centres == before {
            break;
        }
    }
    Ok(centres)
}

/// How often each state followed each, with one step that follows the others in proportion.
fn matrix(walks: impl Iterator<Item = Vec<usize>>, states: usize) -> Vec<Vec<f64>> {
    let mut counts = vec![vec![0f64; states]; states];
    let mut arrivals = vec![1f64; states];
    for walk in walks {
        for pair in walk.windows(2) {
            if let [before, after] = pair
                && let Some(count) = counts.get_mut(*before).and_then(|row| row.get_mut(*after))
                && let Some(arrivals) = arrivals.get_mut(*after)
            {
                *count += 1.0;
                *arrivals += 1.0;
            }
        }
    }
    let all: f64 = arrivals.iter().sum();
    for row in &mut counts {
        let own = row.iter().sum::<f64>() + 1.0;
        row.iter_mut().zip(&arrivals).for_each(|(count, it)| *count = (*count + it / all) / own);
    }
    counts
}
