//! Embeddings as digits: what is scanned against plain loops, what is found against exact search, and
//! thoughts put in the place of embeddings.

mod common;

use std::cmp::Ordering;

use candle_core::{DType, Device, Tensor};
use hybrid_attention::model::{Batch, Transformer};
use hybrid_attention::refine::{
    Codes, DigitDistance, Digits, Interpolate, Noise, Refine, Step, Substitute, seq,
};
use hybrid_attention::thought::{EncodedBatch, ThoughtModel};
use hybrid_attention::{Error, Thinking};
use proptest::prelude::*;
use rayon::ThreadPoolBuilder;
use serde_json::json;

use common::tiny::{self, holds};
use common::{Result, assert_close, assert_identical};

type Rows = Vec<Vec<f32>>;

/// Rows of all sorts: of one spread, or with columns that are much wider than others.
fn table(rows: usize, hidden: usize, seed: u64) -> Result<Rows> {
    let rows = tiny::noise(seed, &[rows, hidden], 1.0)?.to_vec2::<f32>()?;
    let scale = |column: usize| if seed.is_multiple_of(2) { 1.0 } else { 1.0 + column as f32 };
    let scaled =
        |row: Vec<f32>| (0..).zip(row).map(|(column, x)| x * scale(column) - 0.5).collect();
    Ok(rows.into_iter().map(scaled).collect())
}

fn tensor(rows: &Rows) -> Result<Tensor> {
    Ok(Tensor::new(rows.clone(), &Device::Cpu)?)
}

/// Of every row, the digits of every column, the first digits first.
fn digits(table: &Rows, rows: &Rows, base: usize, places: usize) -> Vec<Vec<usize>> {
    let hidden = table[0].len();
    let column = |column: usize| table.iter().map(move |row| row[column]);
    let mean = |of: usize| (column(of).map(f64::from).sum::<f64>() / table.len() as f64) as f32;
    let means: Vec<f32> = (0..hidden).map(mean).collect();
    let square = |row: &Vec<f32>| {
        row.iter().zip(&means).map(|(x, mean)| f64::from(x - mean).powi(2)).sum::<f64>()
    };
    let sd = (table.iter().map(square).sum::<f64>() / (table.len() * hidden) as f64).sqrt() as f32;
    let levels = base.pow(places as u32);
    let width = if sd > 0.0 { 6.0 * sd / levels as f32 } else { 1.0 };
    let of_row = |row: &Vec<f32>| {
        let part = |(x, mean): (&f32, &f32)| {
            let part = ((x - mean) / width + levels as f32 / 2.0).floor();
            part.clamp(0.0, (levels - 1) as f32) as usize
        };
        let parts: Vec<usize> = row.iter().zip(&means).map(part).collect();
        let place = |place: usize| {
            let below = base.pow((places - 1 - place) as u32);
            parts.iter().map(move |part| part / below % base).collect::<Vec<_>>()
        };
        (0..places).flat_map(place).collect()
    };
    rows.iter().map(of_row).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    /// A scan gives what a plain loop over the digits gives, of equals the first, in one thread or several.
    #[test]
    fn a_scan_is_a_plain_loop_over_digits(
        rows in 1usize..1500, hidden in 1usize..40, queries in 1usize..70, best in 0usize..50,
        (base, places, factor) in (2usize..=16, 1usize..=3, 1usize..=12),
        hamming: bool, threads in 1usize..5, seed: u64,
    ) {
        holds((|| {
            let (table, asked) = (table(rows, hidden, seed)?, table(queries, hidden, !seed)?);
            let how = Digits::default().base(base).places(places).factor(factor);
            let codes = Codes::new(&tensor(&table)?, how)?;
            assert_eq!((codes.rows(), codes.hidden()), (rows, hidden));
            assert_eq!(codes.bytes(), rows.div_ceil(32) * 16 * hidden * places);
            let distance = if hamming { DigitDistance::Hamming } else { DigitDistance::Squared };
            let pool = ThreadPoolBuilder::new().num_threads(threads).build()?;
            let query = tensor(&asked)?;
            let got = pool.install(|| codes.scan(&query, best, distance))?;

            let (own, theirs) =
                (digits(&table, &table, base, places), digits(&table, &asked, base, places));
            for (got, query) in got.iter().zip(&theirs) {
                let apart = |row: &Vec<usize>| {
                    let pairs = row.iter().zip(query).enumerate().map(|(at, (a, b))| {
                        let weight = factor.pow((places - 1 - at / hidden) as u32);
                        match hamming {
                            true => weight * usize::from(a != b),
                            false => weight * weight * a.abs_diff(*b).pow(2),
                        }
                    });
                    pairs.sum::<usize>() as u64
                };
                let mut all: Vec<(u32, u64)> = (0..).zip(own.iter().map(apart)).collect();
                all.sort_by_key(|(row, apart)| (*apart, *row));
                all.truncate(best);
                assert_eq!(got, &all);
            }
            assert_eq!(got.len(), queries);
            Ok(())
        })())?;
    }
}

/// By squared distance, of equals the first.
fn exact(table: &Rows, query: &[f32]) -> Vec<(u32, f64)> {
    let apart = |row: &Vec<f32>| -> f64 {
        row.iter().zip(query).map(|(a, b)| f64::from(b - a).powi(2)).sum()
    };
    let mut all: Vec<(u32, f64)> = (0..).zip(table.iter().map(apart)).collect();
    all.sort_by(|a, b| a.1.partial_cmp(&b.1).unwrap_or(Ordering::Equal));
    all
}

/// Of a table of Gaussian rows, noise up to twice its spread leaves the nearest row what it was, and codes
/// find it; of as many as are ranked, all come in the exact order with the exact distance.
#[test]
fn what_is_near_is_found() -> Result {
    let (rows, hidden) = (3000, 256);
    let origin = Tensor::zeros((rows, hidden), DType::F32, &Device::Cpu)?;
    let table = Noise::per_coordinate(0.1).seed(1).on(&origin, &Batch::one(rows)?, 0)?;
    let codes = Codes::new(&table, Digits::default())?;
    let asked = table.narrow(0, 500, 200)?;
    let table = table.to_vec2::<f32>()?;
    for sd in [0.0, 0.5, 1.0, 1.5, 2.0] {
        let queries = Noise::per_coordinate(0.1 * sd).seed(2).on(&asked, &Batch::one(200)?, 0)?;
        let found = codes.nearest(&queries, 32)?;
        let mut agree = 0;
        for (query, found) in queries.to_vec2::<f32>()?.iter().zip(&found) {
            let right = exact(&table, query);
            agree += usize::from(right[0].0 == found[0].row);
            for pair in found.windows(2) {
                assert!(pair[0].distance <= pair[1].distance);
            }
            for near in found {
                let (_, right) = right.iter().find(|it| it.0 == near.row).ok_or("no such row")?;
                assert!((f64::from(near.distance) - right).abs() <= 1e-5 * right.max(1e-6));
            }
        }
        assert!(agree >= 198, "{agree} of 200 at {sd} sd");
    }
    // A small table is ranked whole.
    let small = self::table(20, 7, 3)?;
    let codes = Codes::new(&tensor(&small)?, Digits::default().base(2))?;
    let asked = self::table(9, 7, 4)?;
    for (query, found) in asked.iter().zip(codes.nearest(&tensor(&asked)?, 30)?) {
        let rows: Vec<u32> = found.iter().map(|near| near.row).collect();
        assert_eq!(rows, exact(&small, query).iter().map(|it| it.0).collect::<Vec<_>>());
    }
    // Leading dimensions are as good, other types are read as they are, and equal rows come in their order.
    let equal = Tensor::ones((40, 3), DType::BF16, &Device::Cpu)?;
    let codes = Codes::new(&equal, Digits::default())?;
    let found = codes.nearest(&equal.narrow(0, 0, 4)?.reshape((2, 2, 3))?, 3)?;
    let rows: Vec<u32> = found.concat().iter().map(|near| near.row).collect();
    assert_eq!(rows, [0, 1, 2].repeat(4));
    assert!(format!("{codes:?}").contains("rows: 40"));
    Ok(())
}

fn refused<T>(result: hybrid_attention::Result<T>) -> Result<String> {
    Ok(result.err().ok_or("accepted")?.to_string())
}

#[test]
fn what_is_no_table_and_no_query_is_refused() -> Result {
    let rows = tensor(&table(5, 4, 1)?)?;
    for (how, expected) in [
        (Digits::default().base(1), "base: expected 2 to 16, got 1"),
        (Digits::default().base(17), "base: expected 2 to 16, got 17"),
        (Digits::default().places(0), "places: expected 1 to 4, got 0"),
        (Digits::default().places(5), "places: expected 1 to 4, got 5"),
        (Digits::default().factor(0), "factor: expected 1 to 100, got 0"),
        (Digits::default().factor(101), "factor: expected 1 to 100, got 101"),
    ] {
        assert!(refused(Codes::new(&rows, how))?.ends_with(expected));
    }
    let new = |table: &Tensor| Codes::new(table, Digits::default());
    assert!(
        refused(new(&rows.flatten_all()?))?.contains("table: expected (rows, hidden), got [20]")
    );
    for shape in [(0, 4), (4, 0)] {
        let none = Tensor::zeros(shape, DType::F32, &Device::Cpu)?;
        assert!(refused(new(&none))?.contains("table: expected at least one row"));
    }
    let bad = Tensor::new(&[[0f32, 1.0], [2.0, f32::NAN]], &Device::Cpu)?;
    assert_eq!(refused(new(&bad))?, "embeddings are not finite at position 1");
    let codes = new(&rows.narrow(1, 0, 2)?)?;
    assert_eq!(refused(codes.nearest(&bad, 1))?, "queries are not finite at position 1");
    assert!(
        refused(codes.scan(&rows, 1, DigitDistance::Squared))?
            .contains("expected rows of 2, got [5, 4]")
    );
    assert_eq!(codes.nearest(&rows.narrow(1, 0, 2)?.narrow(0, 0, 0)?, 1)?, Vec::<Vec<_>>::new());
    assert!(codes.nearest(&rows.narrow(1, 0, 2)?, 0)?.iter().all(Vec::is_empty));
    Ok(())
}

// ---- in the place of thoughts ----

fn rows_of(model: &Transformer) -> Result<Rows> {
    let ids: Vec<u32> = (0..model.config().vocab_size as u32).collect();
    Ok(model.embed_ids(&ids)?.to_vec2()?)
}

/// Each row that thinks goes its share of the way to the nearest row of the table; the others stay.
#[test]
fn thoughts_go_to_the_nearest_embedding() -> Result {
    let model: ThoughtModel = tiny::thought_model(&tiny::config(), 4)?;
    let batch = Batch::ragged(&[6, 5])?.with_context(0, &[1..3, 4..5])?;
    let text = tiny::text(model.decoder(), &batch, 4)?;
    let (table, noise) = (rows_of(model.decoder())?, Noise::relative(0.8).seed(9));
    for share in [0.0, 0.3, 1.0] {
        let refine = seq().add(Interpolate::new(0.0)).add(Substitute::new(share));
        let thinking = Thinking::new(1).noise(noise.clone()).refine(refine);
        let got = thinking.on(&model)?.think(&text, text.embeddings().clone(), |_, _| ())?.z;
        let mut expected = text.embeddings().to_vec2::<f32>()?;
        let noised = noise.on(text.embeddings(), &batch, 0)?.to_vec2::<f32>()?;
        for row in batch.segments().flatten() {
            let nearest = &table[exact(&table, &noised[row])[0].0 as usize];
            let towards = noised[row].iter().zip(nearest);
            expected[row] = towards.map(|(x, e)| x + share as f32 * (e - x)).collect();
        }
        assert_close("thoughts", &got, &tensor(&expected)?, 1e-6)?;
    }
    // A clone has the same codes, and they are of the whole table.
    assert!(std::ptr::eq(model.codes()?, model.clone().codes()?));
    assert_eq!(model.codes()?.rows(), model.decoder().config().vocab_size);
    Ok(())
}

#[test]
fn a_substitute_needs_a_table_a_share_and_numbers() -> Result {
    let (xs, batch) = (tiny::noise(1, &[3, 16], 1.0)?, Batch::one(3)?);
    let step = Step::new(&xs, &xs, &batch);
    let half = Substitute::new(0.5);
    assert!(
        refused(half.refine(&xs, &step))?.contains("step: expected one with a model behind it")
    );
    assert_identical("share 0", &Substitute::new(0.0).refine(&xs, &step)?, &xs)?;
    for bad in [-0.1, 1.1, f64::NAN] {
        let refused =
            [Substitute::new(bad).validate(), Substitute::new(bad).refine(&xs, &step).map(drop)];
        for refused in refused {
            assert!(matches!(refused, Err(Error::Parameter { name: "share", .. })), "{refused:?}");
        }
    }
    let model = tiny::thought_model(&tiny::config(), 4)?;
    let text = EncodedBatch::new(model.decoder(), &[1, 2, 3], batch.clone())?;
    let overflow = seq().add_fn(|xs, _| Ok((xs * f64::INFINITY)?)).add(half.clone());
    let thinking = Thinking::new(1).refine(overflow);
    let refused = thinking.on(&model)?.think(&text, text.embeddings().clone(), |_, _| ());
    let Err(Error::Refinement { index: 1, source, .. }) = refused.map(drop) else {
        return Err("accepted".into());
    };
    assert!(matches!(*source, Error::NotFinite { what: "queries", .. }), "{source:?}");
    let read: Thinking = serde_json::from_value(
        json!({"passes": 1, "refine": [{"op": "substitute", "share": 0.5}]}),
    )?;
    assert_eq!(read, Thinking::new(1).refine(half));
    Ok(())
}
