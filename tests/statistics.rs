//! Summaries of sequences against loops over all pairs, keys against what is known to be there or not, and
//! two paths to the next state.

mod common;

use std::collections::BTreeSet;
use std::fs;

use candle_core::{DType, Device, Tensor};
use hybrid_attention::Error;
use hybrid_attention::statistics::{
    Distance, Example, Fingerprint, Key, KeyConfig, Pairs, Running, Summary, Transition,
    TransitionConfig, states,
};
use proptest::prelude::*;
use proptest::sample::select;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::ThreadPoolBuilder;

use common::tiny::{self, holds};
use common::{Result, assert_identical};

type Row = Vec<f64>;

fn numbers(rows: &Tensor) -> Result<Vec<Row>> {
    Ok(rows.to_dtype(DType::F64)?.to_vec2()?)
}

fn middle(w: &Row, x: &Row) -> Row {
    w.iter().zip(x).map(|(w, x)| (w + x) / 2.0).collect()
}

/// All pairs of a kind, but for those chosen by chance.
fn pairs_of(rows: &[Row], pairs: Pairs) -> Vec<(Row, Row)> {
    match pairs {
        Pairs::Level(level) => {
            let mut rows = rows.to_vec();
            for _ in 0..level {
                rows = rows.chunks_exact(2).map(|two| middle(&two[0], &two[1])).collect();
            }
            rows.chunks_exact(2).map(|two| (two[0].clone(), two[1].clone())).collect()
        }
        _ => {
            let before = |at: usize| rows[..at].iter().map(move |w| (w.clone(), rows[at].clone()));
            (0..rows.len()).flat_map(before).collect()
        }
    }
}

/// Mean, variance, standard deviation and median, pair by pair.
fn by_hand(pairs: &[(Row, Row)]) -> [Row; 4] {
    let n = pairs.len() as f64;
    let mean = |of: &dyn Fn(f64, f64) -> f64| -> Row {
        let column = |c: usize| pairs.iter().map(|(w, x)| of(w[c], x[c])).sum::<f64>() / n;
        (0..pairs[0].0.len()).map(column).collect()
    };
    let median = |c: usize| {
        let mut all: Vec<f64> = pairs.iter().map(|(w, x)| (w[c] + x[c]) / 2.0).collect();
        all.sort_by(f64::total_cmp);
        (all[(all.len() - 1) / 2] + all[all.len() / 2]) / 2.0
    };
    [
        mean(&|w, x| (w + x) / 2.0),
        mean(&|w, x| ((w - x) / 2.0).powi(2)),
        mean(&|w, x| ((w - x) / 2.0).abs()),
        (0..pairs[0].0.len()).map(median).collect(),
    ]
}

fn assert_near(what: &str, got: &[f32], expected: &[f64], scale: f64) {
    assert_eq!(got.len(), expected.len(), "{what}");
    for (got, expected) in got.iter().zip(expected) {
        assert!((f64::from(*got) - expected).abs() < 1e-5 * scale, "{what}: {got} {expected}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    /// What is kept as a sequence grows, in whatever portions, is what a loop over all pairs gives: closed
    /// forms included.
    #[test]
    fn a_running_summary_is_a_loop_over_pairs(
        n in 0usize..40, hidden in 1usize..5, level in 0usize..5, full: bool,
        cuts in prop::collection::vec(0usize..40, 3), offset in select(vec![0.0, 3.0, -500.0]), seed: u64,
    ) {
        holds((|| {
            let rows = (tiny::noise(seed, &[n, hidden], 1.0)? + offset)?;
            let pairs = if full { Pairs::Full } else { Pairs::Level(level) };
            let mut running = Running::new(pairs)?;
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(n)).chain([0, n]).collect();
            cuts.sort_unstable();
            for cut in cuts.windows(2) {
                running.add(&rows.narrow(0, cut[0], cut[1] - cut[0])?)?;
            }
            assert_eq!((running.rows(), running.pairs()), (n, pairs));
            let all = pairs_of(&numbers(&rows)?, pairs);
            if all.is_empty() {
                assert!(n < pairs.needs());
                let refused = [running.summary().map(drop), running.median().map(drop)];
                assert!(refused.iter().all(|it| matches!(it, Err(Error::Parameter { name: "tokens", .. }))));
                return Ok(());
            }
            let (got, [mean, variance, sd, median]) = (running.summary()?, by_hand(&all));
            assert_eq!((got.count, got.pairs), (all.len(), pairs));
            let scale = 1.0 + f64::abs(offset);
            assert_near("mean", &got.mean, &mean, scale);
            assert_near("variance", &got.variance, &variance, scale);
            assert_near("sd", &got.sd, &sd, scale);
            assert_near("median", &running.median()?, &median, scale);
            let l1 = sd.iter().sum::<f64>() * 2.0;
            assert!((f64::from(got.l1()) - l1).abs() < 1e-5 * scale * l1.max(1.0));
            assert_eq!(Summary::of(&rows, pairs)?, got);
            Ok(())
        })())?;
    }

    /// Pairs chosen by chance are pairs, no two the same, and the same for the same seed, however the
    /// sequence grew; where there are no more than asked for they are all.
    #[test]
    fn a_sample_is_of_pairs(n in 2usize..30, count in 1usize..60, cut in 0usize..30, seed: u64) {
        holds((|| {
            // Row i is 1 in a channel of its own, so that a pair deviates in two.
            let rows = Tensor::eye(n, DType::F32, &Device::Cpu)?;
            let pairs = Pairs::Scattershot { count, seed };
            let whole = Summary::of(&rows, pairs)?;
            let mut running = Running::new(pairs)?;
            running.add(&rows.narrow(0, 0, cut.min(n))?)?;
            running.add(&rows.narrow(0, cut.min(n), n - cut.min(n))?)?;
            assert_eq!(running.summary()?, whole);
            assert_eq!(running.median()?.len(), n);
            let all = n * (n - 1) / 2;
            assert_eq!(whole.count, count.min(all));
            // Each pair touches two rows, with a deviation of 1/2 and a variance of 1/4.
            let touched = whole.sd.iter().sum::<f32>() * whole.count as f32;
            assert!((touched - whole.count as f32).abs() < 1e-3);
            if count >= all {
                let full = Summary::of(&rows, Pairs::Full)?;
                let all = |of: &Summary| [of.mean.clone(), of.variance.clone(), of.sd.clone()].concat();
                let right: Row = all(&full).into_iter().map(f64::from).collect();
                assert_near("all", &all(&whole), &right, 1.0);
            }
            Ok(())
        })())?;
    }
}

/// Over many seeds each of the pairs is chosen about as often as any other.
#[test]
fn every_pair_is_as_likely() -> Result {
    // One pair of 4 rows: the two channels that deviate name it.
    let rows = Tensor::eye(4, DType::F32, &Device::Cpu)?;
    let mut times = [[0; 4]; 4];
    for seed in 0..3000 {
        let one = Summary::of(&rows, Pairs::Scattershot { count: 1, seed })?;
        let touched: Vec<usize> = (0..4).filter(|row| one.sd[*row] > 0.0).collect();
        times[touched[0]][touched[1]] += 1;
    }
    let mut seen = BTreeSet::new();
    for (w, row) in times.iter().enumerate() {
        for (x, count) in row.iter().enumerate().skip(w + 1) {
            assert!((400..600).contains(count), "{times:?}"); // 500 with a deviation of 20
            seen.insert((w, x));
        }
    }
    assert_eq!(seen.len(), 6);
    Ok(())
}

#[test]
fn what_has_no_pairs_and_what_are_no_rows_is_refused() -> Result {
    let one = Tensor::ones((1, 3), DType::F32, &Device::Cpu)?;
    for (pairs, needs) in [
        (Pairs::Full, "at least 2, for one pair of Full, got 1"),
        (Pairs::Scattershot { count: 5, seed: 0 }, "at least 2, for one pair"),
        (Pairs::Level(0), "at least 2, for one pair of Level(0), got 1"),
        (Pairs::Level(4), "at least 32, for one pair of Level(4), got 1"),
    ] {
        let message = Summary::of(&one, pairs).err().ok_or("accepted")?.to_string();
        assert!(message.contains(needs), "{message}");
    }
    for (pairs, name) in [
        (Pairs::Level(25), "level"),
        (Pairs::Scattershot { count: 0, seed: 0 }, "count"),
        (Pairs::Scattershot { count: usize::MAX, seed: 0 }, "count"),
    ] {
        let refused = Running::new(pairs).map(drop);
        assert!(
            matches!(&refused, Err(Error::Parameter { name: it, .. }) if *it == name),
            "{refused:?}"
        );
    }
    let mut running = Running::new(Pairs::Full)?;
    running.add(&one)?;
    let bad = Tensor::new(&[[0f32, 1.0, 2.0], [0.0, f32::INFINITY, 0.0]], &Device::Cpu)?;
    assert!(matches!(running.add(&bad), Err(Error::NotFinite { what: "states", position: 2 })));
    for wrong in [one.narrow(1, 0, 2)?, one.flatten_all()?.narrow(0, 0, 0)?, one.flatten_all()?] {
        assert!(
            matches!(running.add(&wrong), Err(Error::Parameter { name: "rows", .. })),
            "{wrong}"
        );
    }
    assert_eq!(running.rows(), 1);
    Ok(())
}

#[test]
fn distances_are_their_formulas() -> Result {
    let (a, b) = ([1f32, 2.0, -2.0], [4f32, 2.0, 2.0]);
    assert_eq!(Distance::Mahalanobis(&[9.0, 1.0, 4.0]).between(&a, &b)?, 5f64.sqrt());
    assert_eq!(Distance::Manhattan.between(&a, &b)?, 7.0);
    let cosine = 1.0 - 4.0 / (9f64 * 24.0).sqrt();
    assert!((Distance::Cosine.between(&a, &b)? - cosine).abs() < 1e-12);
    assert_eq!(Distance::Cosine.between(&a, &[0.0; 3])?, 1.0);
    for distance in [Distance::Mahalanobis(&[1.0; 3]), Distance::Manhattan, Distance::Cosine] {
        assert!(distance.between(&a, &a)?.abs() < 1e-12);
        assert_eq!(distance.between(&a, &b)?, distance.between(&b, &a)?);
        assert!(matches!(distance.between(&a, &b[..2]), Err(Error::Parameter { name: "b", .. })));
    }
    for bad in [&[1f32, 1.0][..], &[1.0, 0.0, 1.0], &[1.0, f32::NAN, 1.0], &[1.0, -1.0, 1.0]] {
        let refused = Distance::Mahalanobis(bad).between(&a, &b);
        assert!(matches!(refused, Err(Error::Parameter { name: "variances", .. })));
    }
    Ok(())
}

// ---- keys ----

const HIDDEN: usize = 6;

fn fingerprint(seed: u64) -> Result<Fingerprint> {
    let config = hybrid_attention::Config { hidden_size: HIDDEN, ..tiny::config() };
    Ok(Fingerprint::of(&tiny::transformer(&config, seed)?)?)
}

/// Texts of 16 to 40 rows, each with a mean and a spread of its own.
fn input(seed: u64) -> Result<Tensor> {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    let rows = rng.random_range(16..40);
    let (mean, spread) = (tiny::noise(!seed, &[HIDDEN], 1.0)?, rng.random_range(0.5..2.0f64));
    Ok((tiny::noise(seed, &[rows, HIDDEN], 1.0)? * spread)?.broadcast_add(&mean)?)
}

fn examples(count: u64, output: impl Fn(u64, &Tensor) -> Result<Tensor>) -> Result<Vec<Example>> {
    (0..count)
        .map(|seed| {
            let input = input(seed)?;
            Ok(Example { output: output(seed, &input)?, input })
        })
        .collect()
}

/// Where the output follows from the input a key finds out how, and by which pairs; where it does not, that
/// there is nothing to say.
#[test]
fn a_key_knows_what_it_knows() -> Result {
    let config = KeyConfig { layer: 2, ..KeyConfig::default() };
    let follows = examples(80, |_, input| Ok(((input * 0.5)? + 1.0)?))?;
    let key = Key::fit(&follows, &config, fingerprint(1)?)?;
    assert!(key.mean_r2() > 0.95 && key.variance_r2() > 0.7, "{key:?}");
    assert!(!key.declines() && key.layer() == 2 && config.strengths.contains(&key.strength()));
    for seed in 1000..1010 {
        let input = input(seed)?;
        let output = Summary::of(&((&input * 0.5)? + 1.0)?, Pairs::Full)?;
        let other = Summary::of(&(self::input(seed + 100)? * 2.0)?, Pairs::Full)?;
        let intended = key.intended(&Summary::of(&input, key.pairs())?)?;
        let (near, far) = (intended.deviation(&output)?, intended.deviation(&other)?);
        assert!(near < 3.0 && far > 2.0 * near, "{near} {far}");
        for (part, right) in
            [(&intended.mean, &output.mean), (&intended.variance, &output.variance)]
        {
            for ((value, error), right) in part.values.iter().zip(&part.errors).zip(right) {
                assert!((value - right).abs() < 6.0 * error, "{value} ± {error}, {right}");
            }
        }
    }

    // A level leaves rows out that do not fill its pairs: where the output has the mean of all rows, all
    // pairs say more.
    let levels = examples(80, |seed, input| {
        let mean = input.mean_keepdim(0)?;
        Ok(tiny::noise(seed + 500, &[24, HIDDEN], 0.1)?.broadcast_add(&mean)?)
    })?;
    let config = KeyConfig { pairs: vec![Pairs::Level(3), Pairs::Full], ..config };
    assert_eq!(Key::fit(&levels, &config, fingerprint(1)?)?.pairs(), Pairs::Full);

    let mut declined = 0;
    for seed in 0..8 {
        let unrelated = examples(60, |it, _| input(it + 10_000 * (seed + 1)))?;
        let key =
            Key::fit(&unrelated, &KeyConfig { seed, ..KeyConfig::default() }, fingerprint(1)?)?;
        assert!(key.mean_r2() < 0.1 && key.variance_r2() < 0.1, "{key:?}");
        declined += usize::from(key.declines());
        assert!(!key.insist().declines());
    }
    assert!(declined >= 4, "{declined} of 8");
    Ok(())
}

#[test]
fn a_key_is_the_same_from_any_number_of_threads() -> Result {
    let follows = examples(30, |seed, input| {
        Ok((input + tiny::noise(seed, &[input.dim(0)?, HIDDEN], 1.0)?)?)
    })?;
    let fitted = || -> Result<_> {
        let key = Key::fit(&follows, &KeyConfig::default(), fingerprint(1)?)?;
        let intended = key.intended(&Summary::of(&input(7)?, key.pairs())?)?;
        Ok((key.mean_r2(), key.variance_r2(), intended))
    };
    let fit = || fitted().map_err(|error| error.to_string()); // which can be sent between threads
    let expected = fit()?;
    for threads in [1, 3] {
        let pool = ThreadPoolBuilder::new().num_threads(threads).build()?;
        assert_eq!(pool.install(fit)?, expected);
    }
    Ok(())
}

#[test]
fn a_key_comes_back_from_its_file_for_its_model_alone() -> Result {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("key.safetensors");
    let own = fingerprint(1)?;
    let follows = examples(20, |_, input| Ok((input * 2.0)?))?;
    let pairs = vec![Pairs::Scattershot { count: 50, seed: 3 }];
    let key =
        Key::fit(&follows, &KeyConfig { pairs, layer: 1, ..KeyConfig::default() }, own.clone())?;
    key.save(&path)?;
    let back = Key::load(&path, &own)?;
    let input = Summary::of(&input(99)?, key.pairs())?;
    assert_eq!(back.intended(&input)?, key.intended(&input)?);
    let about = |key: &Key| {
        (key.layer(), key.pairs(), key.strength(), key.mean_r2(), key.variance_r2(), key.declines())
    };
    assert_eq!(about(&back), about(&key));

    let other = Key::load(&path, &fingerprint(2)?).err().ok_or("accepted")?;
    assert!(matches!(&other, Error::Parameter { name: "key", .. }), "{other}");
    let wider = Fingerprint::of(&tiny::transformer(&tiny::config(), 1)?)?;
    let other = Key::load(&path, &wider).err().ok_or("accepted")?.to_string();
    assert!(other.contains("have 6 numbers, and those of this model 16"), "{other}");

    let whole = fs::read(&path)?;
    for cut in [0, 7, 100, whole.len() / 2, whole.len() - 1] {
        fs::write(&path, &whole[..cut])?;
        let refused = Key::load(&path, &own).map(drop);
        assert!(matches!(refused, Err(Error::Malformed { .. })), "{cut}: {refused:?}");
    }
    let tensors = std::collections::HashMap::from([(
        "weights",
        Tensor::ones((2, 2), DType::F32, &Device::Cpu)?,
    )]);
    candle_core::safetensors::save(&tensors, &path)?;
    let refused = Key::load(&path, &own).err().ok_or("accepted")?.to_string();
    assert!(refused.ends_with("not a key: its metadata has none"), "{refused}");
    assert!(matches!(Key::load(folder.path().join("none"), &own), Err(Error::Io { .. })));
    Ok(())
}

#[test]
fn keys_are_fitted_to_what_fits() -> Result {
    let (own, good) = (fingerprint(1)?, examples(20, |_, input| Ok(input.clone()))?);
    let fit = |examples: &[Example], config: KeyConfig| {
        Key::fit(examples, &config, own.clone()).map(drop)
    };
    let with = |change: &dyn Fn(&mut KeyConfig)| {
        let mut config = KeyConfig::default();
        change(&mut config);
        fit(&good, config)
    };
    for (refused, expected) in [
        (with(&|it| it.pairs.clear()), "pairs"),
        (with(&|it| it.strengths.clear()), "strengths"),
        (with(&|it| it.strengths = vec![1.0, 0.0]), "strengths"),
        (with(&|it| it.strengths = vec![f64::NAN]), "strengths"),
        (with(&|it| it.folds = 1), "folds"),
        (with(&|it| it.folds = 11), "examples"),
        (with(&|it| it.pairs = vec![Pairs::Level(99)]), "level"),
        (fit(&good[..9], KeyConfig::default()), "examples"),
        (fit(&[], KeyConfig::default()), "examples"),
    ] {
        assert!(
            matches!(&refused, Err(Error::Parameter { name, .. }) if *name == expected),
            "{refused:?}"
        );
    }
    // An example that is too short for a level, of one token, of another width, or not finite, by its index.
    let replaced = |input: Tensor, output: Tensor| {
        let mut examples = good.clone();
        examples[4] = Example { input, output };
        fit(&examples, KeyConfig::default())
    };
    let rows = |tokens: usize, hidden: usize| tiny::noise(1, &[tokens, hidden], 1.0);
    for refused in [
        replaced(rows(7, HIDDEN)?, rows(8, HIDDEN)?),
        replaced(rows(8, HIDDEN)?, rows(1, HIDDEN)?),
        replaced(rows(8, HIDDEN + 1)?, rows(8, HIDDEN)?),
        replaced((rows(8, HIDDEN)? * f64::NAN)?, rows(8, HIDDEN)?),
    ] {
        assert!(matches!(refused, Err(Error::InText { text: 4, .. })), "{refused:?}");
    }
    let other = Fingerprint::of(&tiny::transformer(&tiny::config(), 1)?)?;
    let refused = Key::fit(&good, &KeyConfig::default(), other).map(drop);
    assert!(matches!(refused, Err(Error::Parameter { name: "examples", .. })), "{refused:?}");

    let config = KeyConfig { pairs: vec![Pairs::Full], ..KeyConfig::default() };
    let key = Key::fit(&good, &config, own.clone())?;
    let of = |rows: &Tensor, pairs| Summary::of(rows, pairs);
    for (summary, name) in [
        (of(&rows(8, HIDDEN)?, Pairs::Level(0))?, "input"),
        (of(&rows(8, 3)?, Pairs::Full)?, "input"),
    ] {
        let refused = key.intended(&summary).map(drop);
        assert!(
            matches!(&refused, Err(Error::Parameter { name: it, .. }) if *it == name),
            "{refused:?}"
        );
    }
    let intended = key.intended(&of(&rows(8, HIDDEN)?, Pairs::Full)?)?;
    for summary in [of(&rows(8, HIDDEN)?, Pairs::Level(0))?, of(&rows(8, 3)?, Pairs::Full)?] {
        assert!(matches!(intended.deviation(&summary), Err(Error::Parameter { .. })));
    }
    Ok(())
}

#[test]
fn states_are_those_that_enter_a_layer() -> Result {
    let model = tiny::transformer(&tiny::config(), 1)?;
    let ids = [3, 1, 4, 1, 5];
    assert_identical("embeddings", &states(&model, &ids, 0)?, &model.embed_ids(&ids)?)?;
    let batch = hybrid_attention::model::Batch::one(5)?;
    let pass = hybrid_attention::model::Pass::Causal(&batch);
    let h = model.forward(&model.embed_ids(&ids)?, 0..2, pass)?;
    assert_identical("layer 2", &states(&model, &ids, 2)?, &h)?;
    assert!(matches!(states(&model, &ids, 4), Err(Error::Parameter { name: "layer", .. })));
    assert!(matches!(states(&model, &[], 0), Err(Error::EmptyPrompt)));
    assert!(matches!(states(&model, &[32], 0), Err(Error::TokenOutOfRange { .. })));
    fingerprint(1)?.check("key", &fingerprint(1)?)?;
    Ok(())
}

// ---- transitions ----

/// A row near the corner of one of `states` states.
fn corner(state: usize, states: usize, rng: &mut ChaCha8Rng) -> Vec<f32> {
    (0..states).map(|at| f32::from(u8::from(at == state)) + rng.random_range(-0.05..0.05)).collect()
}

/// Texts that go from state to state as `next` says, of the text, the step and the state.
fn walks(
    texts: usize,
    length: usize,
    states: usize,
    next: impl Fn(usize, usize, usize, &mut ChaCha8Rng) -> usize,
) -> Result<Vec<Tensor>> {
    let text = |text: usize| {
        let mut rng = ChaCha8Rng::seed_from_u64(text as u64);
        let mut state = rng.random_range(0..states);
        let mut rows = Vec::with_capacity(length);
        for step in 0..length {
            rows.push(corner(state, states, &mut rng));
            state = next(text, step, state, &mut rng);
        }
        Ok(Tensor::new(rows, &Device::Cpu)?)
    };
    (0..texts).map(text).collect()
}

#[test]
fn each_path_wins_where_it_should() -> Result {
    let config = TransitionConfig { states: 5, window: 40, ..TransitionConfig::default() };
    // One chain for all texts: 0.9 to the next state, else anywhere. The past of a text adds nothing.
    let one = walks(24, 60, 5, |_, _, state, rng| {
        if rng.random_bool(0.9) { (state + 1) % 5 } else { rng.random_range(0..5) }
    })?;
    let fitted = Transition::fit(&one, &config)?;
    let figures = fitted.figures();
    assert!(figures.default < figures.generated, "{figures:?}");
    // What the best predictor costs: the entropy of 0.92 and four times 0.02.
    let entropy = -0.92 * 0.92f64.ln() - 4.0 * 0.02 * 0.02f64.ln();
    assert!((figures.default - entropy).abs() < 0.12, "{figures:?} {entropy}");
    assert_eq!(figures.steps, 6 * 59);

    // A cycle of its own for each text, forward or backward by one or two: only its past tells.
    let own = walks(24, 60, 5, |text, _, state, _| (state + 1 + text % 4) % 5)?;
    let fitted = Transition::fit(&own, &config)?;
    let figures = fitted.figures();
    assert!(figures.generated < 0.5 * figures.default, "{figures:?}");
    assert!(figures.gated < 0.6 * figures.default, "{figures:?}");
    let next = fitted.next(&own[3])?;
    let walk = fitted.walk(&own[3])?;
    let best = (0..5).max_by(|a, b| next[*a].total_cmp(&next[*b])).ok_or("no states")?;
    // What came after this state when it was last left.
    let last = walk.len() - 1;
    let again = (0..last).rev().find(|at| walk[*at] == walk[last]).ok_or("never before")?;
    assert_eq!(best, walk[again + 1]);

    // Of both kinds: the gate does better than either path by itself, and no better than knowing.
    let both = walks(48, 60, 5, |text, step, state, rng| match text % 2 {
        0 => (state + 1 + (text / 2) % 4) % 5,
        _ if step % 2 == 0 => (state + 1) % 5,
        _ => rng.random_range(0..5),
    })?;
    let figures = Transition::fit(&both, &config)?.figures();
    assert!(figures.closer <= figures.gated, "{figures:?}");
    assert!(figures.gated <= figures.default.min(figures.generated) + 1e-3, "{figures:?}");
    Ok(())
}

/// The default path is how often each state followed each in half of the texts: here in all, as they are the same.
#[test]
fn the_matrix_counts() -> Result {
    let same = walks(8, 9, 2, |_, step, _, _| usize::from((step + 1) % 3 == 0))?;
    let same: Vec<Tensor> = same.iter().map(|_| same[0].clone()).collect();
    let fitted =
        Transition::fit(&same, &TransitionConfig { states: 2, ..TransitionConfig::default() })?;
    let walk = fitted.walk(&same[0])?;
    let mut counts = [[0f64; 2]; 2];
    walk.windows(2).for_each(|pair| counts[pair[0]][pair[1]] += 4.0);
    let arrivals = [1.0 + counts[0][0] + counts[1][0], 1.0 + counts[0][1] + counts[1][1]];
    for (row, counts) in fitted.matrix().iter().zip(&counts) {
        assert!((row.iter().sum::<f64>() - 1.0).abs() < 1e-12);
        for ((got, count), arrivals_here) in row.iter().zip(counts).zip(&arrivals) {
            let all = arrivals[0] + arrivals[1];
            let right = (count + arrivals_here / all) / (counts[0] + counts[1] + 1.0);
            assert!((got - right).abs() < 1e-12, "{got} {right}");
        }
    }
    // The centres are the means of their rows.
    assert_eq!((fitted.centres().len(), fitted.centres()[0].len()), (2, 2));
    for (state, centre) in fitted.centres().iter().enumerate() {
        let rows = same[0].to_vec2::<f32>()?;
        let own: Vec<_> = rows.iter().zip(&walk).filter(|(_, it)| **it == state).collect();
        for (channel, value) in centre.iter().enumerate() {
            let mean = own.iter().map(|(row, _)| row[channel]).sum::<f32>() / own.len() as f32;
            assert!((mean - value).abs() < 1e-5);
        }
    }
    Ok(())
}

#[test]
fn transitions_are_fitted_to_what_fits_and_the_same_in_any_threads() -> Result {
    let good = walks(8, 20, 4, |_, _, state, rng| (state + rng.random_range(0..2)) % 4)?;
    let config = TransitionConfig { states: 4, ..TransitionConfig::default() };
    let fit = || Transition::fit(&good, &config).map(|it| (it.figures(), it.matrix().to_vec()));
    let expected = fit()?;
    for threads in [1, 3] {
        let pool = ThreadPoolBuilder::new().num_threads(threads).build()?;
        assert_eq!(pool.install(|| fit().map_err(|error| error.to_string()))?, expected);
    }
    for (config, name) in [
        (TransitionConfig { states: 1, ..config.clone() }, "states"),
        (TransitionConfig { states: 5000, ..config.clone() }, "states"),
        (TransitionConfig { window: 0, ..config.clone() }, "window"),
        (TransitionConfig { prior: 0.0, ..config.clone() }, "prior"),
        (TransitionConfig { prior: f64::NAN, ..config.clone() }, "prior"),
    ] {
        let refused = Transition::fit(&good, &config).map(drop);
        assert!(
            matches!(&refused, Err(Error::Parameter { name: it, .. }) if *it == name),
            "{refused:?}"
        );
    }
    let few = Transition::fit(&good[..3], &config).map(drop);
    assert!(matches!(few, Err(Error::Parameter { name: "texts", .. })));
    let equal = vec![Tensor::ones((9, 3), DType::F32, &Device::Cpu)?; 8];
    assert!(matches!(
        Transition::fit(&equal, &config),
        Err(Error::Parameter { name: "states", .. })
    ));
    for bad in [
        good[0].narrow(0, 0, 1)?,
        good[0].narrow(1, 0, 3)?,
        (&good[0] * f64::NAN)?,
        good[0].flatten_all()?,
    ] {
        let mut texts = good.clone();
        texts[2] = bad.clone();
        let refused = Transition::fit(&texts, &config).map(drop);
        assert!(matches!(refused, Err(Error::InText { text: 2, .. })), "{refused:?}");
    }
    let fitted = Transition::fit(&good, &config)?;
    assert!(
        fitted.next(&good[0].narrow(0, 0, 0)?).is_err()
            && fitted.walk(&good[0].narrow(1, 0, 2)?).is_err()
    );
    Ok(())
}
