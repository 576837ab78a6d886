//! What embeddings as digits find and cost beside exact search, and what summaries of texts say of each
//! other, on SmolLM2.
//!
//! ```text
//! benches/texts.sh target/texts
//! cargo bench --bench codes [-- search | time | halves | key | transition]
//! ```
//!
//! `search` and `time` need the model alone. All of it takes some minutes, most of them for reading the news
//! of the Lee corpus.

#![allow(clippy::print_stdout)]

use std::collections::HashMap;
use std::hint::black_box;
use std::time::Instant;

use candle_core::{D, DType, Device, Tensor};
use hybrid_attention::HybridModel;
use hybrid_attention::model::{Batch, Linear, Transformer};
use hybrid_attention::refine::{Codes, DigitDistance, Digits, Noise};
use hybrid_attention::statistics::{
    Distance, Example, Fingerprint, Key, KeyConfig, Pairs, Summary, Transition, TransitionConfig,
    states,
};
use hybrid_attention_benches::{median, sorted};
use hybrid_attention_testing::{root, smollm2};

type Result<T = (), E = Box<dyn std::error::Error>> = std::result::Result<T, E>;

/// Rows of the table that are looked for.
const QUERIES: usize = 500;

/// Tokens of a text: half of them for each side.
const TOKENS: usize = 128;

/// A layer in the middle, and the embeddings.
const LAYERS: [usize; 2] = [0, 10];

fn main() -> Result {
    let asked: Vec<String> = std::env::args().skip(1).filter(|it| !it.starts_with('-')).collect();
    let wanted = |name: &str| asked.is_empty() || asked.iter().any(|it| it == name);
    let Some(path) = smollm2() else { return Ok(()) };
    let model = HybridModel::from_gguf(path, DType::F32, &Device::Cpu)?;
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    println!("load before: {}", load.trim());
    let transformer = model.transformer();
    let ids: Vec<u32> = (0..transformer.config().vocab_size as u32).collect();
    let table = Table::new(transformer.embed_ids(&ids)?)?;
    if wanted("search") {
        search(&table)?;
        buckets(&table)?;
    }
    if wanted("time") {
        time(&table)?;
    }
    let texts = std::fs::read_to_string(root().join("target/texts/lee.txt"));
    let (Ok(texts), true) = (texts, ["halves", "key", "transition"].into_iter().any(wanted)) else {
        return Ok(());
    };
    let tokenizer = model.tokenizer().ok_or("no tokenizer")?;
    let mut passages = Vec::new();
    for text in texts.lines() {
        let ids = tokenizer.encode(text, false)?;
        passages.extend(ids.get(..TOKENS).map(<[u32]>::to_vec));
    }
    println!(
        "\n{} texts of the Lee corpus with {TOKENS} tokens or more, cut in two halves",
        passages.len()
    );
    if wanted("halves") {
        halves(transformer, &passages)?;
    }
    if wanted("key") {
        key(transformer, &passages)?;
    }
    if wanted("transition") {
        transition(transformer, &passages)?;
    }
    Ok(())
}

// ---- search ----

/// An embedding table, and what exact search by a matrix product needs of it.
struct Table {
    /// `(rows, hidden)`
    rows: Tensor,
    product: Linear,
    /// Half the squared length of each row.
    halves: Vec<f32>,
    /// Of all coordinates around their means.
    sd: f64,
}

impl Table {
    fn new(rows: Tensor) -> Result<Self> {
        let centred = rows.broadcast_sub(&rows.mean_keepdim(0)?)?;
        let sd = f64::from(centred.sqr()?.mean_all()?.to_scalar::<f32>()?).sqrt();
        let halves = (rows.sqr()?.sum(D::Minus1)? / 2.0)?.to_vec1()?;
        Ok(Self { product: Linear::dense(&rows)?, rows, halves, sd })
    }

    /// The nearest row to each query: the greatest `x·e - e²/2`.
    fn nearest(&self, queries: &Tensor) -> Result<Vec<u32>> {
        let scores = self.product.forward(queries)?.to_vec2::<f32>()?;
        let best = |scores: &Vec<f32>| {
            let mut best = (0, f32::NEG_INFINITY);
            for (row, (score, half)) in (0..).zip(scores.iter().zip(&self.halves)) {
                if score - half > best.1 {
                    best = (row, score - half);
                }
            }
            best.0
        };
        Ok(scores.iter().map(best).collect())
    }

    /// Rows spread over the table, and the same with noise of so many standard deviations.
    fn queries(&self, count: usize, sd: f64) -> Result<(Vec<u32>, Tensor)> {
        let rows = self.rows.dim(0)?;
        let ids: Vec<u32> = (0..count).map(|at| (at * 7919 % rows) as u32).collect();
        let own = self.rows.index_select(&Tensor::new(ids.as_slice(), &Device::Cpu)?, 0)?;
        let noise = Noise::per_coordinate(sd * self.sd).seed(1);
        Ok((ids, noise.on(&own, &Batch::one(count)?, 0)?))
    }
}

fn share(count: usize) -> String {
    format!("{:.1} %", 100.0 * count as f64 / QUERIES as f64)
}

fn search(table: &Table) -> Result {
    let (rows, hidden) = table.rows.dims2()?;
    println!(
        "\nthe nearest of {rows} rows of {hidden}, sd {:.3}: agreement with exact search, {QUERIES} queries\n",
        table.sd
    );
    let decimal = Codes::new(&table.rows, Digits::default())?;
    let other = [Digits::default().base(16), Digits::default().base(4).places(2).factor(4)];
    let [sixteen, two] = other.map(|how| Codes::new(&table.rows, how));
    let (sixteen, two) = (sixteen?, two?);
    println!(
        "| noise, sd | still the original | a decimal digit | its best 32, ranked | Hamming | its best 32 | 16 levels | 2 digits of 4 |\n\
         |---|---|---|---|---|---|---|---|"
    );
    for sd in [0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0] {
        let (ids, queries) = table.queries(QUERIES, sd)?;
        let right = table.nearest(&queries)?;
        let same = |found: &[u32]| found.iter().zip(&right).filter(|(a, b)| a == b).count();
        let first = |codes: &Codes, by: DigitDistance, best: usize| -> Result<usize> {
            let found = codes.scan(&queries, best, by)?;
            let has =
                |(found, right): &(&Vec<(u32, u64)>, &u32)| found.iter().any(|it| it.0 == **right);
            Ok(found.iter().zip(&right).filter(has).count())
        };
        let ranked: Vec<u32> =
            decimal.nearest(&queries, 1)?.concat().iter().map(|near| near.row).collect();
        let (squared, hamming) = (DigitDistance::Squared, DigitDistance::Hamming);
        println!(
            "| {sd} | {} | {} | {} | {} | {} | {} | {} |",
            share(same(&ids)),
            share(first(&decimal, squared, 1)?),
            share(same(&ranked)),
            share(first(&decimal, hamming, 1)?),
            share(first(&decimal, hamming, 32)?),
            share(first(&sixteen, squared, 1)?),
            share(first(&two, squared, 1)?),
        );
    }
    Ok(())
}

/// Rows in buckets by the signs of a few coordinates, each in two tables, as a cuckoo hash has them: how
/// often the right row is in either bucket of a query.
fn buckets(table: &Table) -> Result {
    println!(
        "\nbuckets by signs, two for each row: how often the right row is in them, and rows of a bucket\n"
    );
    println!("| signs | 0.5 sd | 1 sd | 2 sd | rows |\n|---|---|---|---|---|");
    let means = table.rows.mean_keepdim(0)?;
    let centred =
        |rows: &Tensor| -> Result<Vec<Vec<f32>>> { Ok(rows.broadcast_sub(&means)?.to_vec2()?) };
    let all = centred(&table.rows)?;
    let hidden = table.rows.dim(1)?;
    for signs in [8, 16] {
        // Coordinates far from each other.
        let places = |table: usize| (0..signs).map(move |at| (at * 131 + table * 17) % hidden);
        let hash = |row: &Vec<f32>, table: usize| -> usize {
            places(table).fold(0, |hash, at| 2 * hash + usize::from(row[at] > 0.0))
        };
        let mut sizes = vec![0usize; 1 << signs];
        all.iter().for_each(|row| sizes[hash(row, 0)] += 1);
        let squares: usize = sizes.iter().map(|size| size * size).sum();
        let mut line = format!("| {signs} |");
        for sd in [0.5, 1.0, 2.0] {
            let (_, queries) = table.queries(QUERIES, sd)?;
            let right = table.nearest(&queries)?;
            let holds = |(query, right): &(&Vec<f32>, &u32)| {
                (0..2).any(|it| hash(query, it) == hash(&all[**right as usize], it))
            };
            let count = centred(&queries)?.iter().zip(&right).filter(holds).count();
            line += &format!(" {} |", share(count));
        }
        println!("{line} {:.0} |", squares as f64 / all.len() as f64);
    }
    Ok(())
}

fn time(table: &Table) -> Result {
    let began = Instant::now();
    let codes = Codes::new(&table.rows, Digits::default())?;
    let made = began.elapsed().as_secs_f64() * 1e3;
    let bytes = table.rows.elem_count() * table.rows.dtype().size_in_bytes();
    println!(
        "\nms, exact search by matrix product and codes with the best 32 ranked taking turns; making the codes: {made:.0}\n"
    );
    println!(
        "| queries | exact: least | middle | codes: least | middle | times as fast: least | middle |\n|---|---|---|---|---|---|---|"
    );
    for (count, turns) in [(1, 200), (16, 30), (1000, 3)] {
        let (_, queries) = table.queries(count, 1.0)?;
        let (mut exact, mut coded) = (Vec::new(), Vec::new());
        for _ in 0..turns {
            let start = Instant::now();
            black_box(table.nearest(&queries)?);
            exact.push(start.elapsed().as_secs_f64() * 1e3);
            let start = Instant::now();
            black_box(codes.nearest(&queries, 1)?);
            coded.push(start.elapsed().as_secs_f64() * 1e3);
        }
        let (exact, coded) = (sorted(exact), sorted(coded));
        println!(
            "| {count} | {:.2} | {:.2} | {:.2} | {:.2} | {:.1} | {:.1} |",
            exact[0],
            median(&exact),
            coded[0],
            median(&coded),
            exact[0] / coded[0],
            median(&exact) / median(&coded)
        );
    }
    println!(
        "\n{:.1} MB exact, {:.1} MB of digits",
        bytes as f64 / 1e6,
        codes.bytes() as f64 / 1e6
    );
    Ok(())
}

// ---- summaries ----

/// The mean reciprocal rank of each text's second half among all, by their distance from its first.
fn mrr(count: usize, distance: impl Fn(usize, usize) -> Result<f64>) -> Result<f64> {
    let mut sum = 0.0;
    for one in 0..count {
        let own = distance(one, one)?;
        let mut rank = 1;
        for other in (0..count).filter(|other| *other != one) {
            rank += usize::from(distance(one, other)? <= own);
        }
        sum += 1.0 / rank as f64;
    }
    Ok(sum / count as f64)
}

type Statistic = fn(&Summary) -> Vec<f32>;

fn halves(transformer: &Transformer, passages: &[Vec<u32>]) -> Result {
    let count = passages.len();
    println!("\nmatching halves by summaries alone: mean reciprocal rank of the other half\n");
    println!(
        "| layer | pairs | statistic | Mahalanobis | Manhattan | cosine |\n|---|---|---|---|---|---|"
    );
    let kinds = [
        ("full", Pairs::Full),
        ("64 by chance", Pairs::Scattershot { count: 64, seed: 0 }),
        ("level 0", Pairs::Level(0)),
        ("level 1", Pairs::Level(1)),
        ("level 2", Pairs::Level(2)),
        ("level 3", Pairs::Level(3)),
    ];
    for layer in LAYERS {
        let side = |half: usize| -> Result<Vec<Tensor>> {
            let of = |ids: &Vec<u32>| {
                Ok(states(transformer, &ids[half * TOKENS / 2..][..TOKENS / 2], layer)?)
            };
            passages.iter().map(of).collect()
        };
        let sides = [side(0)?, side(1)?];
        for (name, pairs) in kinds {
            let summaries = |half: usize| -> Result<Vec<Summary>> {
                sides[half].iter().map(|rows| Ok(Summary::of(rows, pairs)?)).collect()
            };
            let (first, second) = (summaries(0)?, summaries(1)?);
            let statistics: [(&str, Statistic); 3] = [
                ("mean", |it| it.mean.clone()),
                ("sd", |it| it.sd.clone()),
                ("both", |it| [it.mean.clone(), it.sd.clone()].concat()),
            ];
            for (statistic, of) in statistics {
                let mut rows =
                    [&first, &second].map(|side| side.iter().map(of).collect::<Vec<_>>());
                let variances = variances(&rows.concat());
                let by_spread = mrr(count, |one, other| {
                    Ok(Distance::Mahalanobis(&variances).between(&rows[0][one], &rows[1][other])?)
                })?;
                // Manhattan and cosine of what is divided by its spread, around the mean of all texts.
                let all = rows.concat();
                let mean =
                    |at: usize| all.iter().map(|row| row[at]).sum::<f32>() / all.len() as f32;
                let means: Vec<f32> = (0..variances.len()).map(mean).collect();
                for row in rows.iter_mut().flatten() {
                    for (value, (mean, variance)) in
                        row.iter_mut().zip(means.iter().zip(&variances))
                    {
                        *value = (*value - mean) / variance.sqrt();
                    }
                }
                let [manhattan, cosine] = [Distance::Manhattan, Distance::Cosine].map(|by| {
                    mrr(count, |one, other| Ok(by.between(&rows[0][one], &rows[1][other])?))
                });
                println!(
                    "| {layer} | {name} | {statistic} | {by_spread:.2} | {:.2} | {:.2} |",
                    manhattan?, cosine?
                );
            }
        }
    }
    let chance = (1..=count).map(|rank| 1.0 / rank as f64).sum::<f64>() / count as f64;
    println!("\ntf-idf: {:.2}; chance: {chance:.2}", tf_idf(passages)?);
    Ok(())
}

/// Around their mean, column by column.
fn variances(rows: &[Vec<f32>]) -> Vec<f32> {
    let n = rows.len() as f64;
    let column = |at: usize| rows.iter().map(move |row| f64::from(row[at]));
    let variance = |at: usize| {
        let mean = column(at).sum::<f64>() / n;
        (column(at).map(|it| (it - mean).powi(2)).sum::<f64>() / n).max(1e-20) as f32
    };
    (0..rows[0].len()).map(variance).collect()
}

/// The control: the same by which tokens the halves have in common, rare ones weighing more.
fn tf_idf(passages: &[Vec<u32>]) -> Result<f64> {
    let counts = |ids: &[u32]| {
        let mut counts = HashMap::<u32, f64>::new();
        ids.iter().for_each(|id| *counts.entry(*id).or_default() += 1.0);
        counts
    };
    let half = |which: usize| {
        passages.iter().map(move |ids| counts(&ids[which * TOKENS / 2..][..TOKENS / 2]))
    };
    let mut texts = HashMap::<u32, f64>::new();
    (0..2)
        .flat_map(half)
        .for_each(|it| it.keys().for_each(|id| *texts.entry(*id).or_default() += 1.0));
    let all = 2.0 * passages.len() as f64;
    let weighed = |counts: HashMap<u32, f64>| -> HashMap<u32, f64> {
        let weighed = counts.into_iter().map(|(id, count)| (id, count * (all / texts[&id]).ln()));
        let weighed: HashMap<u32, f64> = weighed.collect();
        let length = weighed.values().map(|it| it * it).sum::<f64>().sqrt();
        weighed.into_iter().map(|(id, it)| (id, it / length)).collect()
    };
    let sides: Vec<Vec<_>> = (0..2).map(|it| half(it).map(weighed).collect()).collect();
    mrr(passages.len(), |one, other| {
        let (a, b) = (&sides[0][one], &sides[1][other]);
        Ok(-a.iter().filter_map(|(id, it)| Some(it * b.get(id)?)).sum::<f64>())
    })
}

fn key(transformer: &Transformer, passages: &[Vec<u32>]) -> Result {
    println!(
        "\na key from the first half to the second, read after it: held-out R² over 5 folds, 3 seeds\n"
    );
    println!(
        "| layer | seed | mean | variance | declines | pairs | strength |\n|---|---|---|---|---|---|---|"
    );
    for layer in LAYERS {
        let mut examples = Vec::new();
        for ids in passages {
            let rows = states(transformer, ids, layer)?;
            let half = |from: usize| rows.narrow(0, from, TOKENS / 2);
            examples.push(Example { input: half(0)?, output: half(TOKENS / 2)? });
        }
        for seed in 0..3 {
            let config = KeyConfig { layer, seed, ..KeyConfig::default() };
            let key = Key::fit(&examples, &config, Fingerprint::of(transformer)?)?;
            println!(
                "| {layer} | {seed} | {:+.3} | {:+.3} | {} | {:?} | {} |",
                key.mean_r2(),
                key.variance_r2(),
                key.declines(),
                key.pairs(),
                key.strength()
            );
        }
    }
    Ok(())
}

fn transition(transformer: &Transformer, passages: &[Vec<u32>]) -> Result {
    println!("\nthe next of 16 states, nats a step of held-out texts\n");
    println!(
        "| layer | prior | default | generated | the closer | by the gate | steps |\n|---|---|---|---|---|---|---|"
    );
    for layer in LAYERS {
        let rows = |ids: &Vec<u32>| Ok(states(transformer, ids, layer)?);
        let texts = passages.iter().map(rows).collect::<Result<Vec<_>>>()?;
        for prior in [1.0, 4.0, 16.0, 64.0] {
            let config = TransitionConfig { prior, ..TransitionConfig::default() };
            let it = Transition::fit(&texts, &config)?.figures();
            println!(
                "| {layer} | {prior} | {:.3} | {:.3} | {:.3} | {:.3} | {} |",
                it.default, it.generated, it.closer, it.gated, it.steps
            );
        }
    }
    Ok(())
}
