//! Reading a text with a look at what its tokens are paid.

use std::ops::Range;

use candle_core::{DType, Tensor};

use super::leverage;
use super::salience::{Heads, Reading, Salience, Scorer};
use crate::error::{Error, Result};
use crate::model::{Attended, Batch, ForwardContext, Pass, Sight, Tap};

/// Rows of a matrix of attention weights that are in memory at a time.
const ROWS_AT_ONCE: usize = 128;

/// The final states of a text's tokens, `(tokens, hidden)` in `f32`, as the checkpoint reads texts to embed them; and a
/// score for each token by each of `ways`. All that look the same way look at one pass, which also makes the states if
/// the checkpoint reads that way.
pub(super) fn look(reading: &Reading<'_>, ways: &[Salience]) -> Result<(Tensor, Vec<Vec<f32>>)> {
    let (reader, sight) = reading.model.reads_texts();
    let mut scores = ways.iter().map(|way| way.given(reading)).collect::<Result<Vec<_>>>()?;
    let h = pass(reading, sight, ways, &mut scores, true)?;
    let tokens = reading.ids.len();
    let states = reader.norm(&h.narrow(0, 0, tokens)?)?.to_dtype(DType::F32)?;
    let other = match sight {
        Sight::Causal => Sight::Bidirectional,
        Sight::Bidirectional => Sight::Causal,
    };
    if ways.iter().any(|way| way.sight() == Some(other)) {
        pass(reading, other, ways, &mut scores, false)?;
    }
    let scores = scores.into_iter().map(|scores| checked(scores.unwrap_or_default(), tokens));
    Ok((states, scores.collect::<Result<_>>()?))
}

/// Runs the text, with a tap on the attention for those of `ways` that look this way, through all layers or only those
/// that they ask. Returns what leaves the last one.
fn pass(
    reading: &Reading<'_>,
    sight: Sight,
    ways: &[Salience],
    scores: &mut [Option<Vec<f32>>],
    all_layers: bool,
) -> Result<Tensor> {
    let (model, ids) = (reading.model, reading.ids);
    let transformer = match sight {
        Sight::Causal => model.thought_model().decoder(),
        Sight::Bidirectional => model.thought_model().thinker(),
    };
    let mut read = ids.to_vec();
    let again = |way: &Salience| matches!(way.scorer, Scorer::Reconstruct);
    if sight == Sight::Causal && ways.iter().any(again) {
        read.extend(ids.iter().filter(|id| Some(**id) != transformer.config().bos_token_id));
    }
    transformer.check_context(read.len())?;
    let own = ways.iter().zip(scores).filter(|(way, _)| way.sight() == Some(sight));
    let (mut taps, mut own_scores) = (Vec::new(), Vec::new());
    for (way, scores) in own {
        let queries = match way.scorer {
            Scorer::LastQueries { queries } => ids.len().saturating_sub(queries)..ids.len(),
            Scorer::Reconstruct => ids.len()..read.len(),
            _ => 0..ids.len(),
        };
        taps.push(Columns {
            scorer: &way.scorer,
            heads: way.heads,
            layers: way.layers_of(transformer)?,
            queries,
            attention: vec![0.0; ids.len()],
            leverage: vec![0.0; ids.len()],
        });
        own_scores.push(scores);
    }
    let asked = taps.iter().map(|tap| tap.layers.end).max();
    let end = asked.filter(|_| !all_layers).unwrap_or(transformer.all_layers().end);
    let batch = Batch::one(read.len())?.with_ids(&read)?;
    let xs = transformer.embed_ids(&read)?;
    let mut taps = Together(taps);
    let context = ForwardContext::from(Pass::uncached(&batch, sight));
    let context = if asked.is_some() { context.tap(&mut taps) } else { context };
    let h = transformer.forward(&xs, 0..end, context)?;
    for (tap, scores) in taps.0.into_iter().zip(own_scores) {
        *scores = Some(tap.scores());
    }
    Ok(h)
}

fn checked(scores: Vec<f32>, tokens: usize) -> Result<Vec<f32>> {
    if scores.len() != tokens {
        let expected = format!("one for each of {tokens} tokens");
        return Err(Error::parameter("salience scores", expected, scores.len()));
    }
    match scores.iter().position(|score| !score.is_finite()) {
        Some(position) => Err(Error::NotFinite { what: "salience scores", position }),
        None => Ok(scores),
    }
}

/// Several that look on at one pass.
struct Together<'a>(Vec<Columns<'a>>);

impl Tap for Together<'_> {
    fn attention(&mut self, layer: usize, attended: &Attended<'_>) -> Result<()> {
        self.0.iter_mut().try_for_each(|tap| tap.attention(layer, attended))
    }
}

/// What is paid to each of the first few keys: sums of columns of the attention weights, of one head and some
/// rows at a time.
struct Columns<'a> {
    scorer: &'a Scorer,
    heads: Heads,
    layers: Range<usize>,
    /// Whose attention counts.
    queries: Range<usize>,
    /// Of each key, the mean over layers.
    attention: Vec<f32>,
    leverage: Vec<f32>,
}

impl Tap for Columns<'_> {
    fn attention(&mut self, layer: usize, attended: &Attended<'_>) -> Result<()> {
        if !self.layers.contains(&layer) {
            return Ok(());
        }
        let (keys, values) = attended.keys_and_values(0)?; // (kv_heads, keys, head_dim)
        let (kv_heads, heads) = (keys.dim(0)?, attended.heads());
        let share = 1.0 / self.layers.len() as f32;
        let mut of_layer = vec![0f32; self.attention.len()];
        for head in 0..heads {
            let mut of_head = self.paid(attended, head)?;
            if matches!(self.scorer, Scorer::ValueWeighted) {
                let values = values.get(head * kv_heads / heads)?.to_dtype(DType::F32)?;
                let lengths = values.sqr()?.sum(1)?.sqrt()?.to_vec1::<f32>()?;
                of_head.iter_mut().zip(lengths).for_each(|(score, length)| *score *= length);
            }
            for (all, own) in of_layer.iter_mut().zip(of_head) {
                match self.heads {
                    Heads::Mean => *all += own / heads as f32,
                    Heads::Max => *all = all.max(own),
                }
            }
        }
        self.attention.iter_mut().zip(of_layer).for_each(|(all, own)| *all += own * share);
        if matches!(self.scorer, Scorer::Leverage) {
            for head in 0..kv_heads {
                let own = leverage::leverage(&keys.get(head)?.to_dtype(DType::F32)?)?;
                self.leverage.iter_mut().zip(own).for_each(|(all, own)| *all += own * share);
            }
        }
        Ok(())
    }
}

impl Columns<'_> {
    fn scores(self) -> Vec<f32> {
        match self.scorer {
            Scorer::LastQueries { .. } => with_neighbours(&self.attention),
            Scorer::Leverage => {
                let both = of_mean(&self.leverage).zip(of_mean(&self.attention));
                both.map(|(leverage, attention)| leverage + attention).collect()
            }
            _ => self.attention,
        }
    }

    /// What one head pays to each key: the most of any query where the text is read again, else the mean.
    fn paid(&self, attended: &Attended<'_>, head: usize) -> Result<Vec<f32>> {
        let tokens = self.attention.len();
        let mut paid = vec![0f32; tokens];
        for start in self.queries.clone().step_by(ROWS_AT_ONCE) {
            let rows = start..self.queries.end.min(start + ROWS_AT_ONCE);
            let weights = attended.weights(0, head, rows)?; // (rows, keys)
            let weights = weights.narrow(1, 0, tokens)?.to_dtype(DType::F32)?;
            let most = matches!(self.scorer, Scorer::Reconstruct);
            let some: Tensor = if most { weights.max(0)? } else { weights.sum(0)? };
            for (all, some) in paid.iter_mut().zip(some.to_vec1::<f32>()?) {
                *all = if most { all.max(some) } else { *all + some / self.queries.len() as f32 };
            }
        }
        Ok(paid)
    }
}

/// The mean of each score and of its two neighbours on either side: what matters comes in runs.
fn with_neighbours(scores: &[f32]) -> Vec<f32> {
    const REACH: usize = 2;
    let mean = |at: usize| {
        let near = at.saturating_sub(REACH)..(at + REACH + 1).min(scores.len());
        let near = scores.get(near).unwrap_or_default();
        near.iter().sum::<f32>() / near.len().max(1) as f32
    };
    (0..scores.len()).map(mean).collect()
}

/// `values` as multiples of their mean; as they are if that is 0.
fn of_mean(values: &[f32]) -> impl Iterator<Item = f32> {
    let mean = values.iter().sum::<f32>() / values.len().max(1) as f32;
    let mean = if mean > 0.0 { mean } else { 1.0 };
    values.iter().map(move |value| value / mean)
}
