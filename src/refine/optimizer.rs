//! How a gradient becomes a step.

use candle_core::Tensor;
use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};

/// How a [`GradientNudge`](super::GradientNudge) steps down its gradient.
///
/// Thoughts of one model are a hundred times the size of another's, so steps are taken in units of the
/// root mean square `s` of each thought where the nudge found it: with `x = x₀ + s·u`, the optimiser
/// moves `u` down the gradient of the loss in `u`, which is `s·g`. Where only the scale of the thoughts
/// differs, so does that of the steps, and nothing else.
///
/// A learning rate is in [0, 1e6], where 0 moves nothing.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
#[non_exhaustive]
pub enum Optimizer {
    /// Plain gradient descent: `x -= learning_rate · s² · g`. The gradient of a mean over the
    /// prompt shrinks with its length, and so do the steps.
    Sgd {
        /// Of the slope `s·g`, the share that is taken as a step in `u`.
        learning_rate: f64,
    },
    /// Adam (Kingma & Ba 2015) with bias correction, β₁ = 0.9, β₂ = 0.999 and ε = 1e-8. The size
    /// of the gradient does not matter.
    Adam {
        /// About how far every channel of a thought moves in a step, as a share of `s`; the first
        /// step changes every thought by this much, `‖x - x₀‖ / ‖x₀‖`.
        learning_rate: f64,
    },
}

impl Optimizer {
    fn learning_rate(self) -> f64 {
        let (Self::Sgd { learning_rate } | Self::Adam { learning_rate }) = self;
        learning_rate
    }

    pub(super) fn validate(self) -> Result<()> {
        check_ratio("learning_rate", self.learning_rate())
    }

    /// At the beginning of a descent, in units of `unit`, which has one size for each thought.
    pub(super) fn begin(self, unit: Tensor) -> Descent {
        let adam = match self {
            Self::Sgd { .. } => None,
            Self::Adam { .. } => Some(Adam::new(1e-8)),
        };
        Descent { learning_rate: self.learning_rate(), unit, adam }
    }
}

/// A descent in progress.
pub(super) struct Descent {
    learning_rate: f64,
    unit: Tensor,
    adam: Option<Adam>,
}

impl Descent {
    /// Where `x` moves from a point with this gradient.
    pub(super) fn step(&mut self, x: &Tensor, gradient: &Tensor) -> Result<Tensor> {
        let slope = gradient.broadcast_mul(&self.unit)?;
        let direction = match &mut self.adam {
            Some(adam) => adam.direction(&slope)?,
            None => slope,
        };
        Ok((x - (direction.broadcast_mul(&self.unit)? * self.learning_rate)?)?)
    }
}

/// The moments of the gradients so far.
pub(super) struct Adam {
    epsilon: f64,
    steps: i32,
    /// The running mean of the gradient, and of its square.
    moments: Option<(Tensor, Tensor)>,
}

impl Adam {
    const BETAS: (f64, f64) = (0.9, 0.999);

    pub(super) fn new(epsilon: f64) -> Self {
        Self { epsilon, steps: 0, moments: None }
    }

    /// `m̂ / (√v̂ + ε)`: to be subtracted, times the learning rate.
    pub(super) fn direction(&mut self, gradient: &Tensor) -> Result<Tensor> {
        let (b1, b2) = Self::BETAS;
        let (m, v) = ((gradient * (1.0 - b1))?, (gradient.sqr()? * (1.0 - b2))?);
        let (m, v) = match self.moments.take() {
            Some((m0, v0)) => (((m0 * b1)? + m)?, ((v0 * b2)? + v)?),
            None => (m, v), // they begin at zero
        };
        self.steps += 1;
        let mean = (&m / (1.0 - b1.powi(self.steps)))?;
        let spread = (&v / (1.0 - b2.powi(self.steps)))?.sqrt()?;
        self.moments = Some((m, v));
        Ok((mean / (spread + self.epsilon)?)?)
    }
}

/// The most steps any nudge accepts.
pub(super) const MAX_STEPS: usize = 1000;

pub(super) fn check_steps(steps: usize) -> Result<()> {
    if steps <= MAX_STEPS {
        return Ok(());
    }
    Err(Error::parameter("steps", format!("at most {MAX_STEPS}"), steps))
}

pub(super) fn check_ratio(name: &'static str, ratio: f64) -> Result<()> {
    if (0.0..=1e6).contains(&ratio) {
        return Ok(());
    }
    Err(Error::parameter(name, "a number in [0, 1e6]", ratio))
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    /// Two thoughts of different size, their gradients at each of three places.
    const START: [[f64; 2]; 2] = [[3.0, -4.0], [0.01, 0.02]];
    const GRADIENTS: [[[f64; 2]; 2]; 3] =
        [[[0.5, -2.0], [1e-3, 0.0]], [[0.25, 1.0], [-3e-3, 0.0]], [[-1.0, 0.5], [2e-3, 1e-6]]];

    fn unit(row: [f64; 2]) -> f64 {
        ((row[0] * row[0] + row[1] * row[1]) / 2.0).sqrt()
    }

    fn run(optimizer: Optimizer) -> Result<Vec<Vec<f64>>> {
        let units = START.map(|row| [unit(row)]);
        let mut descent = optimizer.begin(Tensor::new(&units, &Device::Cpu)?);
        let mut x = Tensor::new(&START, &Device::Cpu)?;
        for gradient in GRADIENTS {
            x = descent.step(&x, &Tensor::new(&gradient, &Device::Cpu)?)?;
        }
        Ok(x.to_vec2()?)
    }

    fn assert_close(got: &[Vec<f64>], expected: &[[f64; 2]; 2]) {
        for (got, expected) in got.iter().flatten().zip(expected.iter().flatten()) {
            assert!((got - expected).abs() < 1e-12, "{got} is not {expected}");
        }
    }

    #[test]
    fn sgd_is_its_formula() -> Result<()> {
        let mut expected = START;
        for gradient in GRADIENTS {
            for row in 0..2 {
                for channel in 0..2 {
                    expected[row][channel] -=
                        0.3 * unit(START[row]).powi(2) * gradient[row][channel];
                }
            }
        }
        assert_close(&run(Optimizer::Sgd { learning_rate: 0.3 })?, &expected);
        Ok(())
    }

    #[test]
    fn adam_is_its_algorithm() -> Result<()> {
        let mut expected = START;
        for row in 0..2 {
            for channel in 0..2 {
                let (mut m, mut v) = (0.0, 0.0);
                for (t, gradient) in GRADIENTS.iter().enumerate() {
                    let g = unit(START[row]) * gradient[row][channel];
                    m = 0.9 * m + 0.1 * g;
                    v = 0.999 * v + 0.001 * g * g;
                    let m_hat = m / (1.0 - 0.9f64.powf(t as f64 + 1.0));
                    let v_hat = v / (1.0 - 0.999f64.powf(t as f64 + 1.0));
                    expected[row][channel] -=
                        0.02 * unit(START[row]) * m_hat / (v_hat.sqrt() + 1e-8);
                }
            }
        }
        assert_close(&run(Optimizer::Adam { learning_rate: 0.02 })?, &expected);
        Ok(())
    }
}
