//! A Mistral in plain loops over `f64`, one token and one number at a time. It shares nothing with
//! the crate but the names of the weights.

use std::collections::HashMap;

use candle_core::{DType, Tensor};
use hybrid_attention::Config;

use super::Result;

/// One vector per token.
pub(crate) type Stream = Vec<Vec<f64>>;

/// Keys or values: per token, per head, one vector.
pub(crate) type Heads = Vec<Vec<Vec<f64>>>;

pub(crate) struct Reference {
    config: Config,
    weights: HashMap<String, Vec<Vec<f64>>>,
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn times(matrix: &[Vec<f64>], x: &[f64]) -> Vec<f64> {
    matrix.iter().map(|row| dot(row, x)).collect()
}

fn plus(a: &[f64], b: &[f64]) -> Vec<f64> {
    a.iter().zip(b).map(|(a, b)| a + b).collect()
}

impl Reference {
    pub(crate) fn new(config: &Config, weights: &HashMap<String, Tensor>) -> Result<Self> {
        let rows = |tensor: &Tensor| -> Result<Vec<Vec<f64>>> {
            let tensor = tensor.to_dtype(DType::F64)?;
            let columns = tensor.dims().last().copied().unwrap_or(1);
            Ok(tensor.reshape(((), columns))?.to_vec2()?)
        };
        let weights = weights.iter().map(|(name, tensor)| Ok((name.clone(), rows(tensor)?)));
        Ok(Self { config: config.clone(), weights: weights.collect::<Result<_>>()? })
    }

    fn matrix(&self, name: &str) -> &[Vec<f64>] {
        &self.weights[name]
    }

    fn norm(&self, name: &str, x: &[f64]) -> Vec<f64> {
        let mean = dot(x, x) / x.len() as f64;
        let scale = 1.0 / (mean + self.config.rms_norm_eps).sqrt();
        x.iter().zip(&self.matrix(name)[0]).map(|(x, weight)| x * scale * weight).collect()
    }

    fn heads(&self, projected: &[f64], position: Option<usize>) -> Vec<Vec<f64>> {
        let (dim, half) = (self.config.head_dim, self.config.head_dim / 2);
        let rotate = |head: &[f64]| -> Vec<f64> {
            let Some(position) = position else { return head.to_vec() };
            let mut turned = head.to_vec();
            for i in 0..half {
                let frequency = self.config.rope_theta.powf(-2.0 * i as f64 / dim as f64);
                let (sin, cos) = (position as f64 * frequency).sin_cos();
                turned[i] = head[i] * cos - head[i + half] * sin;
                turned[i + half] = head[i + half] * cos + head[i] * sin;
            }
            turned
        };
        projected.chunks(dim).map(rotate).collect()
    }

    /// The keys and values of tokens that stand at `positions` and enter `layer`.
    pub(crate) fn keys_and_values(
        &self,
        layer: &str,
        xs: &[Vec<f64>],
        positions: &[usize],
    ) -> (Heads, Heads) {
        let mut pair = (Vec::new(), Vec::new());
        for (x, &position) in xs.iter().zip(positions) {
            let x = self.norm(&format!("{layer}.input_layernorm.weight"), x);
            let k = times(self.matrix(&format!("{layer}.self_attn.k_proj.weight")), &x);
            let v = times(self.matrix(&format!("{layer}.self_attn.v_proj.weight")), &x);
            pair.0.push(self.heads(&k, Some(position)));
            pair.1.push(self.heads(&v, None));
        }
        pair
    }

    /// One token `x` at `position` through `layer`, over the keys and values of `sees`; and the share
    /// of attention that each key gets, mean over the heads.
    pub(crate) fn token(
        &self,
        layer: &str,
        x: &[f64],
        position: usize,
        (keys, values): (&Heads, &Heads),
        sees: impl Fn(usize) -> bool,
    ) -> (Vec<f64>, Vec<f64>) {
        let normed = self.norm(&format!("{layer}.input_layernorm.weight"), x);
        let q = times(self.matrix(&format!("{layer}.self_attn.q_proj.weight")), &normed);
        let q = self.heads(&q, Some(position));
        let group = self.config.num_attention_heads / self.config.num_key_value_heads;
        let mut mixed = Vec::new();
        let mut shares = vec![0.0; keys.len()];
        for (head, q) in q.iter().enumerate() {
            let score = |key: usize| {
                dot(q, &keys[key][head / group]) / (self.config.head_dim as f64).sqrt()
            };
            let seen: Vec<usize> = (0..keys.len()).filter(|&key| sees(key)).collect();
            let max = seen.iter().map(|&key| score(key)).fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = seen.iter().map(|&key| (score(key) - max).exp()).sum();
            let mut y = vec![0.0; self.config.head_dim];
            for &key in &seen {
                let share = (score(key) - max).exp() / sum;
                shares[key] += share / self.config.num_attention_heads as f64;
                for (y, v) in y.iter_mut().zip(&values[key][head / group]) {
                    *y += share * v;
                }
            }
            mixed.extend(y);
        }
        let x = plus(x, &times(self.matrix(&format!("{layer}.self_attn.o_proj.weight")), &mixed));
        let normed = self.norm(&format!("{layer}.post_attention_layernorm.weight"), &x);
        let gate = times(self.matrix(&format!("{layer}.mlp.gate_proj.weight")), &normed);
        let up = times(self.matrix(&format!("{layer}.mlp.up_proj.weight")), &normed);
        let inner: Vec<f64> =
            gate.iter().zip(&up).map(|(gate, up)| gate / (1.0 + (-gate).exp()) * up).collect();
        let y = times(self.matrix(&format!("{layer}.mlp.down_proj.weight")), &inner);
        (plus(&x, &y), shares)
    }

    /// All tokens through `layer`, each seeing the others as `sees(query, key)` says.
    pub(crate) fn layer(
        &self,
        layer: &str,
        xs: &[Vec<f64>],
        sees: impl Fn(usize, usize) -> bool,
    ) -> Stream {
        let positions: Vec<usize> = (0..xs.len()).collect();
        let (keys, values) = self.keys_and_values(layer, xs, &positions);
        let token = |(i, x): (usize, &Vec<f64>)| {
            self.token(layer, x, i, (&keys, &values), |j| sees(i, j)).0
        };
        xs.iter().enumerate().map(token).collect()
    }

    /// The scores after a token that has left the last layer.
    pub(crate) fn logits(&self, x: &[f64]) -> Vec<f64> {
        let head = match self.config.tie_word_embeddings {
            true => "model.embed_tokens.weight",
            false => "lm_head.weight",
        };
        times(self.matrix(head), &self.norm("model.norm.weight", x))
    }

    /// The embeddings of some tokens.
    pub(crate) fn embed(&self, ids: &[u32]) -> Stream {
        let table = self.matrix("model.embed_tokens.weight");
        ids.iter().map(|&id| table[id as usize].clone()).collect()
    }
}
