//! A mixture of experts in the place of an MLP (Jiang et al. 2024): a router sends each token through a
//! few of several MLPs.

use std::borrow::Cow;

use candle_core::{DType, Tensor};
use rayon::prelude::*;

use super::linear::Linear;
use super::mlp::{Mlp, pieces};
use super::weights::Weights;
use crate::config::{Config, EXPERT, Experts, ROUTER, of_expert};
use crate::error::Result;
use crate::kernels::{self, Fresh};

/// Tokens that run at a time: of 8 experts, each reads some hundreds of them, so that reading its weights
/// again costs little, and what all of them compute has room.
const TOKENS_AT_ONCE: usize = 2048;

/// Up to so many tokens, experts run side by side: products of few rows wait for memory.
const FEW_TOKENS: usize = 16;

/// `Σ shareₑ(x) · mlpₑ(x)` over the experts that `x` has chosen: those of the largest logits of the
/// router, with their softmax as shares.
#[derive(Clone, Debug)]
pub(super) struct Mixture {
    /// `(experts, hidden)`
    router: Linear,
    experts: Vec<Mlp>,
    /// Experts that a token runs through.
    chosen: usize,
}

impl Mixture {
    /// Its weights are `{prefix}.block_sparse_moe.*`.
    pub(super) fn new(
        config: &Config,
        Experts { num_local_experts, num_experts_per_tok }: &Experts,
        prefix: &str,
        weights: &mut impl Weights,
    ) -> Result<Self> {
        // Not as a projection: it is never kept in blocks. It is small, and rounding it sends tokens
        // elsewhere.
        let router = [*num_local_experts, config.hidden_size];
        let router = weights.tensor(&format!("{prefix}.{ROUTER}.weight"), &router)?;
        let expert = |index| {
            let names = names_of(index);
            Mlp::new(config, prefix, names.each_ref().map(String::as_str), weights)
        };
        Ok(Self {
            router: Linear::dense(&router)?,
            experts: (0..*num_local_experts).map(expert).collect::<Result<_>>()?,
            chosen: *num_experts_per_tok,
        })
    }

    /// By their names in a checkpoint.
    pub(super) fn projections_mut(
        &mut self,
    ) -> impl Iterator<Item = (Cow<'static, str>, &mut Linear)> {
        let experts = self.experts.iter_mut().enumerate().flat_map(|(index, expert)| {
            names_of(index).map(Cow::from).into_iter().zip(expert.projections_mut())
        });
        std::iter::once((Cow::from(ROUTER), &mut self.router)).chain(experts)
    }

    /// `(tokens, hidden) -> (tokens, hidden)`
    pub(super) fn forward(&self, xs: &Tensor) -> Result<Fresh> {
        let tokens = xs.dim(0)?;
        if tokens <= TOKENS_AT_ONCE || xs.track_op() {
            return self.piece(xs);
        }
        let pieces = pieces(tokens, TOKENS_AT_ONCE)
            .map(|rows| self.piece(&xs.narrow(0, rows.start, rows.len())?.contiguous()?));
        Fresh::cat(pieces.collect::<Result<Vec<_>>>()?, 0)
    }

    fn piece(&self, xs: &Tensor) -> Result<Fresh> {
        let (tokens, device) = (xs.dim(0)?, xs.device());
        let logits = self.router.forward(xs)?.to_dtype(DType::F32)?; // (tokens, experts)
        let routes = Routes::new(&logits.to_vec2()?, self.chosen);
        let ids = |ids: &[u32]| Tensor::new(ids, device);
        let chosen = ids(&routes.chosen)?.reshape((tokens, self.chosen))?;
        let shares = kernels::softmax(&logits.gather(&chosen, 1)?)?.to_dtype(xs.dtype())?;

        // Each expert reads the tokens that chose it, and no other.
        let busy: Vec<_> = self
            .experts
            .iter()
            .zip(&routes.of_expert)
            .filter(|(_, rows)| !rows.is_empty())
            .collect();
        let run = |(expert, rows): (&Mlp, &Vec<u32>)| -> Result<Fresh> {
            expert.forward(&xs.index_select(&ids(rows)?, 0)?, None, tokens)
        };
        let ys: Result<Vec<_>> = match tokens <= FEW_TOKENS {
            true => busy.into_par_iter().map(run).collect(),
            false => busy.into_iter().map(run).collect(),
        };
        let ys = Fresh::cat(ys?, 0)?.into_tensor(); // (tokens · chosen, hidden), expert by expert
        kernels::mix(&ys, &routes.places, &shares)
    }
}

fn names_of(expert: usize) -> [String; 3] {
    EXPERT.map(|matrix| of_expert(expert, matrix))
}

/// Which tokens go through which experts.
#[derive(Debug)]
struct Routes {
    /// The experts that each token chose, in ascending order: `(tokens, chosen)`.
    chosen: Vec<u32>,
    /// The tokens that chose each expert, in ascending order.
    of_expert: Vec<Vec<u32>>,
    /// Where, if the tokens of all experts stand one expert after the other, each of `chosen` is:
    /// `(tokens, chosen)`.
    places: Vec<u32>,
}

impl Routes {
    /// From the logits of each token, of which the `chosen` largest count; of equal ones the first. A NaN
    /// is larger than any number, so that it is not hidden by being left out.
    ///
    /// ```text
    /// logits of two tokens    3 1 2    0 5 4      two of them are chosen
    /// chosen                  0 2      1 2
    /// of_expert               0        1        0 1
    /// places                  0 2      1 3
    /// ```
    fn new(logits: &[Vec<f32>], chosen: usize) -> Self {
        let experts = logits.first().map_or(0, Vec::len);
        let mut routes =
            Self { chosen: Vec::new(), of_expert: vec![Vec::new(); experts], places: Vec::new() };
        for (token, logits) in (0..).zip(logits) {
            let size = |logit: f32| if logit.is_nan() { f32::NAN.abs() } else { logit };
            let mut order: Vec<_> =
                (0..).zip(logits).map(|(index, it)| (index, size(*it))).collect();
            order.sort_by(|(_, a), (_, b)| b.total_cmp(a)); // equal ones keep their order
            let mut best: Vec<u32> = order.iter().map(|(index, _)| *index).take(chosen).collect();
            best.sort_unstable();
            for index in best {
                routes.chosen.push(index);
                if let Some(tokens) = routes.of_expert.get_mut(index as usize) {
                    routes.places.push(tokens.len() as u32); // within the expert
                    tokens.push(token);
                }
            }
        }
        let mut before = 0;
        let starts = routes.of_expert.iter().map(|tokens| {
            let start = before;
            before += tokens.len() as u32;
            start
        });
        let starts: Vec<_> = starts.collect();
        for (place, expert) in routes.places.iter_mut().zip(&routes.chosen) {
            *place += starts.get(*expert as usize).copied().unwrap_or(0);
        }
        routes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_worked_example() {
        let routes = Routes::new(&[vec![3.0, 1.0, 2.0], vec![0.0, 5.0, 4.0]], 2);
        assert_eq!(routes.chosen, [0, 2, 1, 2]);
        assert_eq!(routes.of_expert, [vec![0], vec![1], vec![0, 1]]);
        assert_eq!(routes.places, [0, 2, 1, 3]);
    }

    #[test]
    fn of_equal_logits_the_first_counts_and_nan_before_all() {
        let nan = -f32::NAN.abs(); // what an x86 processor makes of infinity - infinity
        assert_eq!(Routes::new(&[vec![1.0, 2.0, 2.0, 2.0]], 2).chosen, [1, 2]);
        assert_eq!(Routes::new(&[vec![0.0, -0.0, f32::NEG_INFINITY]], 1).chosen, [0]);
        assert_eq!(Routes::new(&[vec![f32::INFINITY, nan, 1.0]], 1).chosen, [1]);
    }
}
