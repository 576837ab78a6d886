//! Pairs as a task: a query and the passage that answers it should have like vectors, and unlike those of the other passages
//! of a batch (contrastive learning with in-batch negatives: van den Oord et al. 2018, InfoNCE).

use std::collections::{BTreeMap, HashSet};
use std::io::{Write, stdout};
use std::path::{Path, PathBuf};

use candle_core::{D, Tensor};
use candle_nn::loss::cross_entropy;
use hybrid_attention::Pooling;
use hybrid_attention::evaluate::Estimate;
use hybrid_attention::model::Batch;
use hybrid_attention::thought::ThoughtModel;
use rand::Rng;
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

use crate::base::Base;
use crate::lessons::Lessons;
use crate::score::read_by;
use crate::settings::{Arm, OfPairs, Settings};
use crate::task::{Exercise, Task};
use crate::terminal::{self, Result};
use crate::text::{ONLY_READ, fingerprint};
use crate::trainee::Trainee;

/// Tokens that run side by side in the examination.
const MOST_TOKENS: usize = 2048;

/// The most of the first places that count as found, beside the first one.
const PLACES: usize = 10;

pub(crate) struct Pairs {
    /// Those to learn from: a query, and its passage by its number.
    train: Vec<(Vec<u32>, usize)>,
    /// Those of the examination.
    held_out: Vec<(Vec<u32>, usize)>,
    /// Each once.
    passages: Vec<Vec<u32>>,
    /// How many of them there are to learn from.
    learned: usize,
    how: OfPairs,
    /// Tells these tokens from those of other pairs.
    pub(crate) fingerprint: String,
    /// The checkpoint, to compare with.
    model: PathBuf,
}

#[derive(Debug, Serialize)]
pub(crate) struct Examination {
    queries: usize,
    /// Among which each query's own is to be found.
    passages: usize,
    found: Vec<Found>,
}

/// Where the right passages stand.
#[derive(Debug, Serialize)]
struct Found {
    name: String,
    /// For each query, 1 over the place of its passage.
    reciprocal: Vec<f64>,
}

impl Pairs {
    /// Reads pairs, one a line, a query and a passage with a tab between them. Those held out come from a file of their own.
    pub(crate) fn read(
        path: &Path,
        held_out: &Path,
        base: &Base,
        how: &OfPairs,
        examined: usize,
    ) -> Result<Self> {
        if !(how.temperature.is_finite() && how.temperature > 0.0) {
            let got = how.temperature;
            return Err(format!("--temperature: expected a number above 0, got {got}").into());
        }
        let most = base.config.max_position_embeddings / 2;
        if !(ONLY_READ + 1..=most).contains(&how.tokens) {
            let least = ONLY_READ + 1;
            return Err(format!(
                "--tokens: expected {least} to {most}, for a text may be read twice"
            )
            .into());
        }
        if examined == 1 {
            return Err("--passages: expected at least 2, or 0 for no examination".into());
        }
        let mut numbers = BTreeMap::new();
        let mut passages = Vec::new();
        let mut pairs_of = |path: &Path| -> Result<Vec<(Vec<u32>, usize)>> {
            let text = terminal::read_text(path)?;
            let mut pairs = Vec::new();
            for (number, line) in (1..).zip(text.lines()) {
                let at = || format!("{}: line {number}", path.display());
                let Some((query, passage)) = line.split_once('\t') else {
                    return Err(format!("{}: expected a query, a tab and a passage", at()).into());
                };
                let tokens = |text: &str| -> Result<Vec<u32>> {
                    let mut ids = base.tokenizer.encode(text.trim(), true)?;
                    ids.truncate(how.tokens);
                    match ids.len() > ONLY_READ {
                        true => Ok(ids),
                        false => Err(format!("{}: an empty query or passage", at()).into()),
                    }
                };
                let next = numbers.len();
                let passage = passage.trim();
                let passage = match numbers.get(passage) {
                    Some(&known) => known,
                    None => {
                        passages.push(tokens(passage)?);
                        numbers.insert(passage.to_string(), next);
                        next
                    }
                };
                pairs.push((tokens(query)?, passage));
            }
            Ok(pairs)
        };
        let train = pairs_of(path)?;
        let mut held_out = pairs_of(held_out)?;
        held_out.truncate(examined);
        let learned = train.iter().map(|(_, passage)| *passage).collect::<HashSet<_>>().len();
        if learned < 2 || held_out.len() < examined.min(2) {
            let found =
                format!("{} passages to learn from, {} pairs held out", learned, held_out.len());
            return Err(
                format!("{}: expected at least 2 of each, got {found}", path.display()).into()
            );
        }
        let queries = train.iter().chain(&held_out).map(|(query, _)| query);
        let fingerprint = fingerprint(&queries.chain(&passages).cloned().collect::<Vec<_>>());
        let model = base.path.clone();
        Ok(Self { train, held_out, passages, learned, how: how.clone(), fingerprint, model })
    }

    /// One vector for each text, `(texts, hidden)`.
    fn vectors(
        &self,
        model: &ThoughtModel,
        settings: &Settings,
        how: (Arm, usize),
        pooling: Pooling,
        texts: &[&[u32]],
    ) -> Result<Tensor> {
        let (mut ids, mut lengths) = (Vec::new(), Vec::new());
        // The rows that are pooled: of a text that is read twice, those of the second reading.
        let mut pooled = Vec::new();
        for text in texts {
            let before = ids.len();
            ids.extend_from_slice(text);
            if how.0 == Arm::Twice {
                ids.extend_from_slice(text.get(ONLY_READ..).unwrap_or_default());
            }
            let own = if how.0 == Arm::Twice { text.len() - ONLY_READ } else { text.len() };
            pooled.extend((ids.len() - own..ids.len()).map(|row| row as u32));
            lengths.push((ids.len() - before, own));
        }
        let of =
            |which: fn(&(usize, usize)) -> usize| lengths.iter().map(which).collect::<Vec<_>>();
        let mut batch = Batch::ragged(&of(|(all, _)| *all))?;
        for (sequence, (all, _)) in lengths.iter().enumerate() {
            batch = batch.with_context(sequence, std::slice::from_ref(&(ONLY_READ..*all)))?;
        }
        let hidden = read_by(model, settings, how, &ids, batch)?;
        let hidden = hidden.index_select(&Tensor::new(pooled, hidden.device())?, 0)?;
        let normed = model.decoder().norm(&hidden)?;
        Ok(pooling.pool(&normed, &Batch::ragged(&of(|(_, own)| *own))?)?)
    }

    /// For each query of the examination 1 over the place of its passage among all.
    fn found(
        &self,
        name: String,
        model: &ThoughtModel,
        settings: &Settings,
        how: (Arm, usize),
        pooling: Pooling,
        progress: impl Fn(u64),
    ) -> Result<Found> {
        let all = |texts: Vec<&[u32]>| -> Result<Tensor> {
            let mut vectors = Vec::new();
            let some = texts.chunk_by({
                let mut tokens = 0;
                move |text: &&[u32], _| {
                    tokens += text.len();
                    let goes_on = tokens < MOST_TOKENS;
                    tokens = if goes_on { tokens } else { 0 };
                    goes_on
                }
            });
            for some in some {
                vectors.push(unit_length(&self.vectors(model, settings, how, pooling, some)?)?);
                progress(some.len() as u64);
            }
            Ok(Tensor::cat(&vectors, 0)?)
        };
        let passages = all(self.passages.iter().map(Vec::as_slice).collect())?;
        let queries = all(self.held_out.iter().map(|(query, _)| query.as_slice()).collect())?;
        let scores: Vec<Vec<f32>> = queries.matmul(&passages.t()?)?.to_vec2()?; // (queries, passages)
        let place = |(scores, (_, right)): (&Vec<f32>, &(Vec<u32>, usize))| {
            let own = scores.get(*right).copied().unwrap_or(f32::NAN);
            1.0 / scores.iter().filter(|score| **score >= own).count().max(1) as f64
        };
        Ok(Found { name, reciprocal: scores.iter().zip(&self.held_out).map(place).collect() })
    }
}

/// Vectors scaled to length 1.
fn unit_length(vectors: &Tensor) -> Result<Tensor> {
    let norm = vectors.sqr()?.sum_keepdim(D::Minus1)?.sqrt()?;
    Ok(vectors.broadcast_div(&norm.maximum(1e-12)?)?)
}

/// How badly each query, `(pairs, hidden)`, finds its own passage among those of all, in nats; and the share that do.
fn contrast(queries: &Tensor, passages: &Tensor, temperature: f64) -> Result<(Tensor, f64)> {
    let pairs = queries.dim(0)?;
    let scores = unit_length(queries)?.matmul(&unit_length(passages)?.t()?)?;
    let scores = (scores / temperature)?; // (queries, passages)
    let right = Tensor::arange(0, pairs as u32, queries.device())?;
    let said: Vec<u32> = scores.argmax(D::Minus1)?.to_vec1()?;
    let found = (0..).zip(&said).filter(|(own, said)| own == *said).count();
    Ok((cross_entropy(&scores, &right)?, found as f64 / pairs.max(1) as f64))
}

impl Task for Pairs {
    type Examination = Examination;

    const STEPS_PER_POINT: usize = 10;

    /// The queries of a batch, then their passages, no two of which are the same: all `ids` one after the other, and how
    /// long each text is in its `batch`.
    fn draw(&self, settings: &Settings, _: &Lessons, rng: &mut ChaCha8Rng) -> Result<Exercise> {
        let count = settings.batch.min(self.learned);
        let (mut taken, mut queries, mut passages) = (HashSet::new(), Vec::new(), Vec::new());
        while queries.len() < count {
            let (query, passage) = &self.train[rng.random_range(0..self.train.len())];
            if taken.insert(*passage) {
                queries.push(query.as_slice());
                passages.extend(self.passages.get(*passage).map(Vec::as_slice));
            }
        }
        let texts = [queries, passages].concat();
        let lengths: Vec<usize> = texts.iter().map(|text| text.len()).collect();
        let passes = settings.draw_passes(settings.most_passes(), rng);
        let batch = Batch::ragged(&lengths)?;
        Ok(Exercise { ids: texts.concat(), batch, answers: Vec::new(), passes, end: None })
    }

    fn loss(
        &self,
        model: &ThoughtModel,
        settings: &Settings,
        exercise: &Exercise,
    ) -> Result<(Tensor, f64)> {
        let rows = exercise.batch.all_rows();
        let texts: Vec<&[u32]> = rows.filter_map(|rows| exercise.ids.get(rows)).collect();
        let how = (settings.arm, exercise.passes);
        let vectors = self.vectors(model, settings, how, self.how.pooling(settings.arm), &texts)?;
        let pairs = texts.len() / 2;
        let (queries, passages) = (vectors.narrow(0, 0, pairs)?, vectors.narrow(0, pairs, pairs)?);
        contrast(&queries, &passages, self.how.temperature)
    }

    fn status(&self, _: &Lessons, loss: f32) -> String {
        format!("loss {loss:.3}")
    }

    fn examine(&self, settings: &Settings, trainee: &Trainee) -> Result<Option<Examination>> {
        if self.held_out.is_empty() {
            return Ok(None);
        }
        const POOLINGS: [Pooling; 3] = [Pooling::Mean, Pooling::WeightedMean, Pooling::LastToken];
        let least = usize::from(settings.most_passes() > 0);
        let passes = least..=settings.most_passes();
        let ways = POOLINGS.len() + 1 + passes.clone().count();
        let texts = self.passages.len() + self.held_out.len();
        let template = "examination [{bar:30}] {pos}/{len}, {eta} to go";
        let bar = terminal::bar((ways * texts) as u64, template);
        let mut found = Vec::new();
        let model = Base::load(&self.model)?.model()?;
        for pooling in POOLINGS {
            let name = format!("checkpoint, causal, {}", spelled(pooling));
            let how = (Arm::NoPasses, 0);
            found.push(self.found(name, &model, settings, how, pooling, |some| bar.inc(some))?);
        }
        let (name, how) = ("checkpoint, the text read twice".to_string(), (Arm::Twice, 0));
        found.push(self.found(name, &model, settings, how, Pooling::Mean, |some| bar.inc(some))?);
        drop(model);
        let model = trainee.model(&mut settings.rng(settings.steps))?;
        for passes in passes {
            let pooling = self.how.pooling(settings.arm);
            let shown = if least > 0 { format!(", {passes} passes") } else { String::new() };
            let name = format!("trained, {}, {}{shown}", settings.arm.name(), spelled(pooling));
            let how = (settings.arm, passes);
            found.push(self.found(name, &model, settings, how, pooling, |some| bar.inc(some))?);
        }
        bar.finish_and_clear();
        let (queries, passages) = (self.held_out.len(), self.passages.len());
        let examination = Examination { queries, passages, found };
        write!(stdout(), "{}", examination.table())?;
        Ok(Some(examination))
    }
}

/// A pooling as options spell it.
fn spelled(pooling: Pooling) -> String {
    serde_json::to_value(pooling)
        .ok()
        .and_then(|it| it.as_str().map(|it| it.replace('_', "-")))
        .unwrap_or_default()
}

impl Examination {
    /// A Markdown table.
    fn table(&self) -> String {
        let first: &[f64] = self.found.first().map_or(&[], |found| &found.reciprocal);
        let mut table = format!(
            "{} queries among {} passages. MRR ± standard error.\n\n\
             | | MRR | less the first | first | among {PLACES} |\n|---|---|---|---|---|\n",
            self.queries, self.passages
        );
        for Found { name, reciprocal } in &self.found {
            let share = |places: usize| {
                let found = reciprocal.iter().filter(|it| **it >= 1.0 / places as f64).count();
                found as f64 / reciprocal.len().max(1) as f64
            };
            let Estimate { mean, standard_error } = Estimate::of(reciprocal);
            table += &format!(
                "| {name} | {mean:.3} ± {standard_error:.3} | {} | {:.3} | {:.3} |\n",
                Estimate::of_difference(reciprocal, first).signed(),
                share(1),
                share(PLACES)
            );
        }
        table
    }
}

#[cfg(test)]
mod tests {
    use candle_core::{Device, Var};
    use proptest::prelude::*;

    use super::*;

    /// By the definition, number by number.
    fn by_definition(queries: &[Vec<f64>], passages: &[Vec<f64>], temperature: f64) -> f64 {
        let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
        let cosine = |a: &[f64], b: &[f64]| dot(a, b) / (dot(a, a) * dot(b, b)).sqrt();
        let of = |(own, query): (usize, &Vec<f64>)| {
            let scores = passages.iter().map(|it| (cosine(query, it) / temperature).exp());
            -(cosine(query, &passages[own]) / temperature) + scores.sum::<f64>().ln()
        };
        queries.iter().enumerate().map(of).sum::<f64>() / queries.len() as f64
    }

    proptest! {
        /// The loss against its definition, and its gradient against central differences of that.
        #[test]
        fn the_loss_and_its_gradient_are_those_of_the_definition(
            pairs in 1usize..6, values in prop::collection::vec(-2.0f64..2.0, 60),
            temperature in 0.1f64..2.0,
        ) {
            const WIDTH: usize = 5;
            let rows = |values: &[f64]| -> Vec<Vec<f64>> {
                let rows = values.chunks(WIDTH).take(pairs);
                rows.map(|row| row.iter().map(|it| it + 0.01).collect()).collect()
            };
            let (queries, passages) = (rows(&values[..30]), rows(&values[30..]));
            let long = |rows: &[Vec<f64>]| rows.iter().all(|row| row.iter().map(|it| it * it).sum::<f64>() > 0.5);
            prop_assume!(long(&queries) && long(&passages));
            let var = |rows: &[Vec<f64>]| {
                let values: Vec<f32> = rows.concat().into_iter().map(|it| it as f32).collect();
                Var::from_vec(values, (pairs, WIDTH), &Device::Cpu)
            };
            let (q, p) = (var(&queries)?, var(&passages)?);
            let (loss, found) = contrast(&q, &p, temperature)
                .map_err(|error| TestCaseError::fail(error.to_string()))?;
            let expected = by_definition(&queries, &passages, temperature);
            let got = f64::from(loss.to_scalar::<f32>()?);
            prop_assert!((got - expected).abs() < 1e-4, "{got} {expected}");
            prop_assert!((0.0..=1.0).contains(&found) && (pairs > 1 || found == 1.0));

            let gradients = loss.backward()?;
            const STEP: f64 = 1e-5;
            for (which, var) in [(0, &q), (1, &p)] {
                let Some(gradient) = gradients.get(var) else {
                    return Err(TestCaseError::fail("no gradient"));
                };
                let gradient: Vec<Vec<f32>> = gradient.to_vec2()?;
                for row in 0..pairs {
                    for column in 0..WIDTH {
                        let at = |step: f64| {
                            let mut both = [queries.clone(), passages.clone()];
                            both[which][row][column] += step;
                            by_definition(&both[0], &both[1], temperature)
                        };
                        let expected = (at(STEP) - at(-STEP)) / (2.0 * STEP);
                        let got = f64::from(gradient[row][column]);
                        prop_assert!((got - expected).abs() < 1e-3, "{got} {expected}");
                    }
                }
            }
        }
    }
}
