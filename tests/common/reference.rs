//! A Mistral, or a mixture of its blocks, in plain loops over `f64`, one token and one number at a time. It shares nothing with
//! the crate but the names of the weights.

use std::collections::HashMap;
use std::ops::Range;

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
    kept_as: Option<DType>,
}

/// What attention makes of one token.
#[derive(Default)]
pub(crate) struct Attended {
    /// Per head, rotated.
    pub(crate) queries: Vec<Vec<f64>>,
    /// Per head, of every key; minus infinity for one that is not seen.
    pub(crate) scores: Vec<Vec<f64>>,
    /// Per head, of every key.
    pub(crate) weights: Vec<Vec<f64>>,
    /// What was gathered from the values, heads side by side.
    pub(crate) context: Vec<f64>,
}

impl Attended {
    /// Of every key, mean over the heads.
    pub(crate) fn mean_weights(&self) -> Vec<f64> {
        let keys = self.weights.first().map_or(0, Vec::len);
        let mean_over_heads =
            |key: usize| mean(&self.weights.iter().map(|head| head[key]).collect::<Vec<_>>());
        (0..keys).map(mean_over_heads).collect()
    }
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
        let weights = weights.collect::<Result<_>>()?;
        Ok(Self { config: config.clone(), weights, kept_as: None })
    }

    /// The same with all keys and values rounded to `dtype`.
    pub(crate) fn keeping(self, dtype: DType) -> Self {
        Self { kept_as: Some(dtype), ..self }
    }

    /// A key or a value as it is kept.
    fn kept(&self, x: Vec<f64>) -> Vec<f64> {
        let round = |x: f64| match self.kept_as {
            Some(DType::BF16) => f64::from(half::bf16::from_f64(x)),
            Some(DType::F16) => f64::from(half::f16::from_f64(x)),
            _ => x,
        };
        x.into_iter().map(round).collect()
    }

    fn matrix(&self, name: &str) -> &[Vec<f64>] {
        &self.weights[name]
    }

    pub(crate) fn norm(&self, name: &str, x: &[f64]) -> Vec<f64> {
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
            let kept = |heads: Vec<Vec<f64>>| heads.into_iter().map(|it| self.kept(it)).collect();
            pair.0.push(kept(self.heads(&k, Some(position))));
            pair.1.push(kept(self.heads(&v, None)));
        }
        pair
    }

    /// What the attention of `layer` makes of one token `x` at `position`, over the keys and values of
    /// `sees`.
    pub(crate) fn attend(
        &self,
        layer: &str,
        x: &[f64],
        position: usize,
        (keys, values): (&Heads, &Heads),
        sees: impl Fn(usize) -> bool,
    ) -> Attended {
        let normed = self.norm(&format!("{layer}.input_layernorm.weight"), x);
        let q = times(self.matrix(&format!("{layer}.self_attn.q_proj.weight")), &normed);
        let queries = self.heads(&q, Some(position));
        let group = self.config.num_attention_heads / self.config.num_key_value_heads;
        let mut all = Attended { queries, ..Attended::default() };
        for (head, q) in all.queries.iter().enumerate() {
            let score = |key: usize| match sees(key) {
                true => dot(q, &keys[key][head / group]) / (self.config.head_dim as f64).sqrt(),
                false => f64::NEG_INFINITY,
            };
            let scores: Vec<f64> = (0..keys.len()).map(score).collect();
            let weights = softmax(&scores);
            let mut context = vec![0.0; self.config.head_dim];
            for (weight, values) in weights.iter().zip(values) {
                for (sum, value) in context.iter_mut().zip(&values[head / group]) {
                    *sum += weight * value;
                }
            }
            all.scores.push(scores);
            all.weights.push(weights);
            all.context.extend(context);
        }
        all
    }

    /// The residual stream `x` behind the attention of `layer`, which has gathered `context`.
    pub(crate) fn after_attention(&self, layer: &str, x: &[f64], context: &[f64]) -> Vec<f64> {
        plus(x, &times(self.matrix(&format!("{layer}.self_attn.o_proj.weight")), context))
    }

    /// The residual stream `x` behind the MLP of `layer`, which reads `[x ; side]`: where there is a `side`,
    /// its first two projections are as much wider.
    pub(crate) fn after_mlp(&self, layer: &str, x: &[f64], side: &[f64]) -> Vec<f64> {
        let mut input = self.norm(&format!("{layer}.post_attention_layernorm.weight"), x);
        input.extend_from_slice(side);
        let mlp = |names: [&str; 3]| {
            let [gate, up, down] = names.map(|it| self.matrix(&format!("{layer}.{it}.weight")));
            let (gate, up) = (times(gate, &input), times(up, &input));
            let inner = gate.iter().zip(&up).map(|(gate, up)| gate / (1.0 + (-gate).exp()) * up);
            times(down, &inner.collect::<Vec<_>>())
        };
        let Some(of) = &self.config.experts else {
            return plus(x, &mlp(["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]));
        };
        // By the book: the softmax over all experts, of which the largest are taken and made to sum to 1.
        let router = self.matrix(&format!("{layer}.block_sparse_moe.gate.weight"));
        let shares = softmax(&times(router, &input));
        let mut order: Vec<usize> = (0..of.num_local_experts).collect();
        order.sort_by(|a, b| shares[*b].total_cmp(&shares[*a]));
        order.truncate(of.num_experts_per_tok);
        let total: f64 = order.iter().map(|expert| shares[*expert]).sum();
        order.iter().fold(x.to_vec(), |sum, expert| {
            let name = |matrix| format!("block_sparse_moe.experts.{expert}.{matrix}");
            let ys = mlp([name("w1"), name("w3"), name("w2")].each_ref().map(String::as_str));
            sum.iter().zip(&ys).map(|(sum, y)| sum + shares[*expert] / total * y).collect()
        })
    }

    /// One token `x` at `position` through `layer`, over the keys and values of `sees`; and the share
    /// of attention that each key gets, mean over the heads.
    pub(crate) fn token(
        &self,
        layer: &str,
        x: &[f64],
        position: usize,
        keys_and_values: (&Heads, &Heads),
        sees: impl Fn(usize) -> bool,
    ) -> (Vec<f64>, Vec<f64>) {
        let attended = self.attend(layer, x, position, keys_and_values, sees);
        let x = self.after_attention(layer, x, &attended.context);
        (self.after_mlp(layer, &x, &[]), attended.mean_weights())
    }

    /// All tokens through `layer`, each seeing the others as `sees(query, key)` says.
    pub(crate) fn layer(
        &self,
        layer: &str,
        xs: &[Vec<f64>],
        sees: impl Fn(usize, usize) -> bool,
    ) -> Stream {
        self.layer_and_shares(layer, xs, sees).0
    }

    /// [`Reference::layer`], and the share of each token's attention that every other gets.
    fn layer_and_shares(
        &self,
        layer: &str,
        xs: &[Vec<f64>],
        sees: impl Fn(usize, usize) -> bool,
    ) -> (Stream, Vec<Vec<f64>>) {
        let positions: Vec<usize> = (0..xs.len()).collect();
        let (keys, values) = self.keys_and_values(layer, xs, &positions);
        let token =
            |(i, x): (usize, &Vec<f64>)| self.token(layer, x, i, (&keys, &values), |j| sees(i, j));
        xs.iter().enumerate().map(token).unzip()
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

/// The thought loop over one row of tokens.
pub(crate) struct ThoughtLoop<'a> {
    pub(crate) reference: &'a Reference,
    pub(crate) span: Range<usize>,
    /// The runs of tokens that think together.
    pub(crate) segments: &'a [Range<usize>],
    /// Whether they see what comes after them.
    pub(crate) both_ways: bool,
    /// Blocks that run after the span.
    pub(crate) thought_layers: usize,
    /// The share of the new state, channel by channel.
    pub(crate) share: Vec<f64>,
}

impl ThoughtLoop<'_> {
    fn causal(&self, i: usize, j: usize) -> bool {
        j <= i && self.reference.config.sliding_window.is_none_or(|window| i < j + window)
    }

    fn sees(&self, i: usize, j: usize) -> bool {
        let together = self.segments.iter().any(|run| run.contains(&i) && run.contains(&j));
        let near = self.reference.config.sliding_window.is_none_or(|window| i.abs_diff(j) < window);
        self.causal(i, j) || self.both_ways && together && near
    }

    /// The first thoughts.
    pub(crate) fn encode(&self, ids: &[u32]) -> Stream {
        let layer = |xs: Stream, layer| {
            self.reference.layer(&format!("model.layers.{layer}"), &xs, |i, j| self.causal(i, j))
        };
        (0..self.span.start).fold(self.reference.embed(ids), layer)
    }

    /// The thoughts after a pass over `z`, and the shares of attention in each layer of the span.
    pub(crate) fn pass(&self, z: &Stream) -> (Stream, Vec<Vec<Vec<f64>>>) {
        let (mut h, mut shares) = (z.clone(), Vec::new());
        for layer in self.span.clone() {
            let name = format!("model.layers.{layer}");
            let (next, of_layer) =
                self.reference.layer_and_shares(&name, &h, |i, j| self.sees(i, j));
            h = next;
            shares.push(of_layer);
        }
        for layer in 0..self.thought_layers {
            let name = format!("thought.layers.{layer}");
            h = self.reference.layer(&name, &h, |i, j| self.sees(i, j));
        }
        let refined = |(token, (z, h)): (usize, (&Vec<f64>, &Vec<f64>))| -> Vec<f64> {
            if !self.segments.iter().any(|run| run.contains(&token)) {
                return z.clone();
            }
            let channels = z.iter().zip(h).zip(&self.share);
            channels.map(|((z, h), share)| (1.0 - share) * z + share * h).collect()
        };
        (z.iter().zip(&h).enumerate().map(refined).collect(), shares)
    }

    /// The scores after every token when a decoder reads the thoughts `z`.
    pub(crate) fn logits(&self, z: &Stream) -> Vec<Vec<f64>> {
        let layer = |xs: Stream, layer| {
            self.reference.layer(&format!("model.layers.{layer}"), &xs, |i, j| self.causal(i, j))
        };
        let h = (self.span.start..self.reference.config.num_hidden_layers).fold(z.clone(), layer);
        h.iter().map(|x| self.reference.logits(x)).collect()
    }
}

fn mix<T>(a: &[T], b: &[T], weight: f64) -> Vec<T>
where
    T: Mix,
{
    a.iter().zip(b).map(|(a, b)| a.mix(b, weight)).collect()
}

trait Mix: Sized {
    fn mix(&self, other: &Self, weight: f64) -> Self;
}

impl Mix for f64 {
    fn mix(&self, other: &Self, weight: f64) -> Self {
        (1.0 - weight) * self + weight * other
    }
}

impl<T: Mix> Mix for Vec<T> {
    fn mix(&self, other: &Self, weight: f64) -> Self {
        mix(self, other, weight)
    }
}

/// A prompt handed over by its definition, then decoded token by token; the logits after the last
/// prompt token and after each answer token.
pub(crate) struct ByDefinition<'a> {
    pub(crate) decoder: &'a Reference,
    /// What runs over the thoughts.
    pub(crate) thinker: &'a Reference,
    pub(crate) segments: &'a [Range<usize>],
}

impl ByDefinition<'_> {
    fn causal(&self, i: usize, j: usize) -> bool {
        j <= i && self.decoder.config.sliding_window.is_none_or(|w| i < j + w)
    }

    fn both_ways(&self, i: usize, j: usize) -> bool {
        let together = self.segments.iter().any(|run| run.contains(&i) && run.contains(&j));
        self.causal(i, j)
            || together && self.decoder.config.sliding_window.is_none_or(|w| i.abs_diff(j) < w)
    }

    /// `z` and `plain` enter layer `span.start`; layers before it have read `ids` plainly.
    pub(crate) fn logits(
        &self,
        layers: usize,
        span: Range<usize>,
        weight: f64,
        (ids, answer): (&[u32], &[u32]),
        (z, plain): (&Stream, &Stream),
    ) -> Vec<Vec<f64>> {
        let (r, seq) = (self.decoder, ids.len());
        let positions: Vec<usize> = (0..seq).collect();
        let thinks = |i: usize| self.segments.iter().any(|run| run.contains(&i));
        let mut caches: Vec<(Heads, Heads)> = Vec::new();
        let mut xs = r.embed(ids);
        for layer in 0..span.start {
            let name = format!("model.layers.{layer}");
            caches.push(r.keys_and_values(&name, &xs, &positions));
            xs = r.layer(&name, &xs, |i, j| self.causal(i, j));
        }
        // Three streams: the plain model's, the thoughts', and that of plain tokens over both.
        let (mut a, mut b, mut own) = (plain.clone(), z.clone(), plain.clone());
        for layer in span.clone() {
            let name = format!("model.layers.{layer}");
            let of = |r: &Reference, xs: &Stream| r.keys_and_values(&name, xs, &positions);
            let ((ka, va), (kb, vb), (ko, vo)) = (of(r, &a), of(self.thinker, &b), of(r, &own));
            let pick = |mixed: Heads, own: Heads| -> Heads {
                let each = mixed.into_iter().zip(own).enumerate();
                each.map(|(i, (mixed, own))| if thinks(i) { mixed } else { own }).collect()
            };
            let (k, v) = (pick(mix(&ka, &kb, weight), ko), pick(mix(&va, &vb, weight), vo));
            a = r.layer(&name, &a, |i, j| self.causal(i, j));
            b = self.thinker.layer(&name, &b, |i, j| self.both_ways(i, j));
            let through = |(i, x): (usize, &Vec<f64>)| {
                r.token(&name, x, i, (&k, &v), |j| self.causal(i, j)).0
            };
            own = own.iter().enumerate().map(through).collect();
            caches.push((k, v));
        }
        let mixed = mix(&a, &b, weight);
        let each = mixed.into_iter().zip(own).enumerate();
        let mut xs: Stream =
            each.map(|(i, (mixed, own))| if thinks(i) { mixed } else { own }).collect();
        for layer in span.end..layers {
            let name = format!("model.layers.{layer}");
            caches.push(r.keys_and_values(&name, &xs, &positions));
            xs = r.layer(&name, &xs, |i, j| self.causal(i, j));
        }
        let mut logits = vec![r.logits(&xs[seq - 1])];
        for (at, &id) in (seq..).zip(answer) {
            let mut x = r.embed(&[id]).remove(0);
            for (layer, (keys, values)) in caches.iter_mut().enumerate() {
                let name = format!("model.layers.{layer}");
                let (k, v) = r.keys_and_values(&name, std::slice::from_ref(&x), &[at]);
                keys.extend(k);
                values.extend(v);
                x = r.token(&name, &x, at, (keys, values), |j| self.causal(at, j)).0;
            }
            logits.push(r.logits(&x));
        }
        logits
    }
}

/// The length of a vector.
pub(crate) fn length(x: &[f64]) -> f64 {
    dot(x, x).sqrt()
}

/// `‖after - before‖ / ‖before‖`.
pub(crate) fn drift(before: &[f64], after: &[f64]) -> f64 {
    let change: Vec<f64> = before.iter().zip(after).map(|(a, b)| b - a).collect();
    length(&change) / length(before)
}

/// The cosine of the angle between two vectors.
pub(crate) fn cosine(a: &[f64], b: &[f64]) -> f64 {
    dot(a, b) / (length(a) * length(b))
}

fn softmax(logits: &[f64]) -> Vec<f64> {
    let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = logits.iter().map(|logit| (logit - max).exp()).sum();
    logits.iter().map(|logit| (logit - max).exp() / sum).collect()
}

/// The entropy of what `logits` say, in nats.
pub(crate) fn entropy(logits: &[f64]) -> f64 {
    softmax(logits).iter().map(|p| -p * p.ln()).sum()
}

/// The divergence of what is said after from what was said before, in nats.
pub(crate) fn kl(before: &[f64], after: &[f64]) -> f64 {
    let (before, after) = (softmax(before), softmax(after));
    before.iter().zip(&after).map(|(before, after)| before * (before / after).ln()).sum()
}

/// The mean of some numbers.
pub(crate) fn mean(values: &[f64]) -> f64 {
    values.iter().sum::<f64>() / values.len() as f64
}
