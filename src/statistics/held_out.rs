//! What is chosen by examples that are left out, and what that is worth on others.

use candle_core::{DType, Device, Tensor};
use rand::SeedableRng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;

use super::key::{Example, KeyConfig};
use super::ridge::{Standard, fit, kernel};
use super::{Pairs, Summary};
use crate::error::{Error, Result};

/// The statistics of all examples, `(examples, 2 hidden)` in `f64`.
pub(super) struct Data {
    inputs: Vec<Tensor>,
    pub(super) output: Tensor,
}

/// The best of the pairs and strengths to choose from.
pub(super) struct Choice {
    /// Which of those to choose from.
    pub(super) pairs: usize,
    pub(super) strength: f64,
    pub(super) x: Standard,
    pub(super) y: Standard,
    pub(super) dual: Tensor,
    pub(super) left_out: Tensor,
}

impl Data {
    pub(super) fn of(examples: &[Example], pairs: &[Pairs]) -> Result<Self> {
        let in_example = |text| move |error| Error::InText { text, source: Box::new(error) };
        let mut width = None;
        let mut summary = |text: usize, rows: &Tensor, pairs: Pairs| -> Result<Summary> {
            let summary = Summary::of(rows, pairs).map_err(in_example(text))?;
            let (own, width) = (summary.mean.len(), *width.get_or_insert(summary.mean.len()));
            match own == width {
                true => Ok(summary),
                false => {
                    let expected = format!("states of {width} channels, as in the first");
                    Err(in_example(text)(Error::parameter("examples", expected, own)))
                }
            }
        };
        let table = |rows: Vec<Vec<f32>>| -> Result<Tensor> {
            Ok(Tensor::new(rows, &Device::Cpu)?.to_dtype(DType::F64)?)
        };
        let mut inputs = Vec::with_capacity(pairs.len());
        for pairs in pairs {
            let mut rows = Vec::with_capacity(examples.len());
            for (text, example) in examples.iter().enumerate() {
                let Summary { mean, sd, .. } = summary(text, &example.input, *pairs)?;
                rows.push([mean, sd].concat());
            }
            inputs.push(table(rows)?);
        }
        let mut rows = Vec::with_capacity(examples.len());
        for (text, example) in examples.iter().enumerate() {
            let Summary { mean, variance, .. } = summary(text, &example.output, Pairs::Full)?;
            rows.push([mean, variance].concat());
        }
        Ok(Self { inputs, output: table(rows)? })
    }

    /// Some of the examples.
    fn only(&self, rows: &[u32]) -> Result<Self> {
        let index = Tensor::new(rows, &Device::Cpu)?;
        let some = |of: &Tensor| Ok::<_, Error>(of.index_select(&index, 0)?);
        let inputs = self.inputs.iter().map(some).collect::<Result<Vec<_>>>()?;
        Ok(Self { inputs, output: some(&self.output)? })
    }

    /// The pairs and the strength for which examples that are left out are least off, all columns counting alike.
    pub(super) fn choose(&self, config: &KeyConfig) -> Result<Choice> {
        let y = Standard::of(&self.output)?;
        let mut best: Option<(f64, Choice)> = None;
        for (pairs, input) in self.inputs.iter().enumerate() {
            let x = Standard::of(input)?;
            let kernel = kernel(&x)?;
            for strength in &config.strengths {
                let fit = fit(&kernel, &y.values, *strength)?;
                let off = fit.left_out.sqr()?.sum_all()?.to_scalar::<f64>()?;
                if best.as_ref().is_none_or(|(least, _)| off < *least) {
                    let (x, y) = (x.clone(), y.clone());
                    let (dual, left_out) = (fit.dual, fit.left_out);
                    let strength = *strength;
                    best = Some((off, Choice { pairs, strength, x, y, dual, left_out }));
                }
            }
        }
        let none = || Error::parameter("examples", "finite statistics", "none that can be fitted");
        best.map(|(_, choice)| choice).ok_or_else(none)
    }

    /// What is explained of examples that neither the choice nor the fit has seen: of means, and of variances.
    pub(super) fn held_out(&self, config: &KeyConfig) -> Result<(f64, f64)> {
        let (examples, columns) = self.output.dims2()?;
        let mut order: Vec<u32> = (0..examples as u32).collect();
        order.shuffle(&mut ChaCha8Rng::seed_from_u64(config.seed));
        let mut off = Tensor::zeros(columns, DType::F64, &Device::Cpu)?;
        let mut all = off.clone();
        for fold in 0..config.folds {
            let in_fold = |at: &usize| at % config.folds == fold;
            let (mut held, mut seen) = (Vec::new(), Vec::new());
            for (at, row) in order.iter().enumerate() {
                if in_fold(&at) { held.push(*row) } else { seen.push(*row) }
            }
            let best = self.only(&seen)?.choose(config)?;
            let held = self.only(&held)?;
            let Some(input) = held.inputs.get(best.pairs) else { continue };
            let near = best.x.apply(input)?.matmul(&best.x.values.t()?.contiguous()?)?;
            let expected = near.matmul(&best.dual)?; // (held, columns), in spreads
            let own = best.y.apply(&held.output)?;
            off = (off + (&own - expected)?.sqr()?.sum(0)?)?;
            all = (all + own.sqr()?.sum(0)?)?;
        }
        let share = |from: usize| -> Result<f64> {
            let sum = |of: &Tensor| of.narrow(0, from, columns / 2)?.sum_all()?.to_scalar::<f64>();
            let (off, all) = (sum(&off)?, sum(&all)?);
            // An output that never changes leaves nothing to explain.
            Ok(if all > 0.0 { 1.0 - off / all } else { 0.0 })
        };
        Ok((share(0)?, share(columns / 2)?))
    }
}
