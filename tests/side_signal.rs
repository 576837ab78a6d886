//! What comes into an MLP beside the residual stream: nothing where there is nothing, and otherwise
//! `[W U] [x ; s]`, with gradients.

mod common;

use std::collections::HashMap;

use candle_core::quantized::GgmlDType;
use candle_core::{DType, Device, Tensor, Var};
use hybrid_attention::model::{
    Batch, ForwardContext, KvCache, Linear, Pass, SideProjection, SideSignal, Sight, Transformer,
};
use hybrid_attention::{Config, Error, WeightType};
use proptest::prelude::*;

use common::gradient::{check, loss};
use common::reference::{Reference, Stream};
use common::{Result, assert_close, assert_identical};
use common::{kept, tiny};

const SIGHTS: [Sight; 2] = [Sight::Causal, Sight::Bidirectional];

const KEPT: [WeightType; 3] = [
    WeightType::Dense(DType::F32),
    WeightType::Dense(DType::BF16),
    WeightType::Quantized(GgmlDType::Q8_0),
];

/// Three layers, whose rows are whole blocks of 32.
fn config(sliding_window: Option<usize>) -> Config {
    let sizes = Config { hidden_size: 32, intermediate_size: 64, head_dim: 8, ..tiny::config() };
    Config { sliding_window, ..sizes }
}

/// Columns for a signal of this width, as two dense weights `(intermediate, width)`.
fn columns(config: &Config, width: usize, seed: u64) -> Result<[Tensor; 2]> {
    let shape = [config.intermediate_size, width];
    let scale = 1.0 / (width.max(1) as f32).sqrt();
    Ok([tiny::noise(seed, &shape, scale)?, tiny::noise(seed + 1, &shape, scale)?])
}

fn projection([gate, up]: &[Tensor; 2]) -> Result<SideProjection> {
    Ok(SideProjection { gate: Linear::dense(gate)?, up: Linear::dense(up)? })
}

fn signal(tokens: usize, width: usize, seed: u64) -> Result<Tensor> {
    match width {
        0 => Ok(Tensor::zeros((tokens, 0), DType::F32, &Device::Cpu)?),
        _ => tiny::noise(seed, &[tokens, width], 1.0),
    }
}

/// The kinds of pass.
#[derive(Clone, Copy, Debug)]
enum Kind {
    Uncached(Sight),
    /// In several pieces, over one cache.
    Cached,
    /// Several sequences over caches that hold something.
    Remembered(Sight),
}

const KINDS: [Kind; 5] = [
    Kind::Uncached(Sight::Causal),
    Kind::Uncached(Sight::Bidirectional),
    Kind::Cached,
    Kind::Remembered(Sight::Causal),
    Kind::Remembered(Sight::Bidirectional),
];

/// A pass of that kind over `xs`, with a signal or without, and what the caches say after one more token.
fn run(
    model: &Transformer,
    kind: Kind,
    xs: &Tensor,
    side: Option<&SideSignal>,
) -> hybrid_attention::Result<Vec<Tensor>> {
    let tokens = xs.dim(0)?;
    let lengths = [tokens / 3, tokens - tokens / 3];
    let batch = match kind {
        Kind::Cached => Batch::one(tokens)?,
        _ => Batch::ragged(&lengths)?,
    };
    let mut caches = Vec::new();
    let past = model.embed_ids(&[3, 1, 4, 1, 5])?;
    for _ in 0..batch.sequences() {
        let mut cache = model.new_cache(2000)?;
        model.forward(&past, model.all_layers(), Pass::Cached(&mut cache))?;
        caches.push(cache);
    }
    let pass = match (kind, caches.as_mut_slice()) {
        (Kind::Uncached(sight), _) => Pass::uncached(&batch, sight),
        (Kind::Cached, [only]) => Pass::Cached(only),
        (Kind::Remembered(sight), several) => {
            Pass::Remembered { batch: &batch, sight, caches: several.iter_mut().collect() }
        }
        (Kind::Cached, _) => return Err(Error::StreamFailed),
    };
    let mut context = ForwardContext::from(pass);
    if let Some(side) = side {
        context = context.side(side);
    }
    let mut all = vec![model.forward(xs, model.all_layers(), context)?];
    for cache in &mut caches {
        let next = model.embed_ids(&[7])?;
        all.push(model.forward(&next, model.all_layers(), Pass::Cached(cache))?);
    }
    Ok(all)
}

// ---- nothing ----

/// Whatever a layer could read: what brings nothing changes no bit.
#[test]
fn what_brings_nothing_changes_nothing() -> Result {
    for (kept, window) in KEPT.into_iter().zip([None, Some(40), Some(7)]) {
        let config = config(window);
        let model = kept::transformer(&config, kept, 1)?;
        let width = 6;
        let zero = Tensor::zeros((config.intermediate_size, width), DType::F32, &Device::Cpu)?;
        let (mut reading, mut deaf) = (model.with_side(0, None)?, model.with_side(0, None)?);
        for layer in [0, 2] {
            let side = projection(&columns(&config, width, layer as u64)?)?;
            reading = reading.with_side(layer, Some(side))?;
            let side = projection(&[zero.clone(), zero.clone()])?;
            deaf = deaf.with_side(layer, Some(side))?;
        }
        let again = reading.with_side(0, None)?.with_side(2, None)?;
        for (kind, tokens) in
            KINDS.into_iter().flat_map(|kind| [5, 40, 1100].map(|tokens| (kind, tokens)))
        {
            let xs = tiny::noise(2, &[tokens, config.hidden_size], 1.0)?;
            let both = |of: &Tensor| SideSignal::new().layer(0, of.clone()).layer(2, of.clone());
            let random = both(&signal(tokens, width, 3)?);
            let none = both(&signal(tokens, 0, 3)?);
            let zeros = both(&signal(tokens, width, 3)?.zeros_like()?);
            let empty = SideSignal::new();
            let expected = run(&model, kind, &xs, None)?;
            for (what, model, side) in [
                ("projections without a signal", &reading, None),
                ("an empty signal", &reading, Some(&empty)),
                ("an empty signal for a model without projections", &model, Some(&empty)),
                ("a signal of width 0", &reading, Some(&none)),
                ("a signal of width 0 for a model without projections", &model, Some(&none)),
                ("projections of zeros", &deaf, Some(&random)),
                ("a signal of zeros", &reading, Some(&zeros)),
                ("projections that were taken away", &again, None),
            ] {
                let got = run(model, kind, &xs, side)?;
                for (got, expected) in got.iter().zip(&expected) {
                    assert_identical(
                        &format!("{what}, {kept:?} {kind:?} {tokens}"),
                        got,
                        expected,
                    )?;
                }
            }
            // And one that brings something does change something.
            let got = run(&reading, kind, &xs, Some(&random))?;
            let off = (&got[0] - &expected[0])?.abs()?.max_all()?.to_scalar::<f32>()?;
            assert!(off > 0.1, "{kept:?} {kind:?} {tokens}: {off}");
        }
    }
    Ok(())
}

// ---- something ----

/// Each row of a sequence through all layers in `f64`, where the MLPs of some read `[x ; s]` by one weight
/// `[W U]`.
fn reference(
    config: &Config,
    weights: &HashMap<String, Tensor>,
    sides: &[(usize, [Tensor; 2], Tensor)],
    xs: &Tensor,
    sees: impl Fn(usize, usize) -> bool,
) -> Result<Tensor> {
    let mut weights = weights.clone();
    let mut signals: HashMap<usize, Stream> = HashMap::new();
    for (layer, [gate, up], signal) in sides {
        for (name, side) in [("gate_proj", gate), ("up_proj", up)] {
            let name = format!("model.layers.{layer}.mlp.{name}.weight");
            let wide = Tensor::cat(&[&weights[&name], side], 1)?; // (intermediate, hidden + width)
            weights.insert(name, wide);
        }
        signals.insert(*layer, signal.to_dtype(DType::F64)?.to_vec2()?);
    }
    let reference = Reference::new(config, &weights)?;
    let mut stream: Stream = xs.to_dtype(DType::F64)?.to_vec2()?;
    let positions: Vec<usize> = (0..stream.len()).collect();
    for layer in 0..config.num_hidden_layers {
        let name = format!("model.layers.{layer}");
        let (keys, values) = reference.keys_and_values(&name, &stream, &positions);
        let through = |(i, x): (usize, &Vec<f64>)| {
            let attended = reference.attend(&name, x, i, (&keys, &values), |j| sees(i, j));
            let x = reference.after_attention(&name, x, &attended.context);
            let side = signals.get(&layer).map_or(&[] as &[f64], |signal| &signal[i]);
            reference.after_mlp(&name, &x, side)
        };
        stream = stream.iter().enumerate().map(through).collect();
    }
    Ok(Tensor::new(stream, &Device::Cpu)?.to_dtype(DType::F32)?)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Any shape of model, any layers and widths, packed or alone, remembered or not.
    #[test]
    fn a_signal_is_a_wider_input(
        config in tiny::shapes(), lengths in prop::collection::vec(1usize..20, 1..4),
        widths in prop::collection::vec(prop::option::of(1usize..9), 3), seed in 0u64..1000,
        sight in prop::sample::select(&SIGHTS), remembered: bool,
    ) {
        let run = || -> Result {
            let weights = tiny::weights(&config, seed)?;
            let mut model = Transformer::new(&config, &mut weights.clone())?;
            let batch = Batch::ragged(&lengths)?;
            let xs = tiny::noise(seed, &[batch.tokens(), config.hidden_size], 1.0)?;
            let (mut sides, mut all) = (Vec::new(), SideSignal::new());
            for (layer, width) in widths.iter().enumerate().take(config.num_hidden_layers) {
                let Some(width) = *width else { continue };
                let columns = columns(&config, width, 10 * seed + layer as u64)?;
                model = model.with_side(layer, Some(projection(&columns)?))?;
                // Laid out the other way round, as a caller may have it.
                let signal = signal(batch.tokens(), width, seed)?.t()?.contiguous()?.t()?;
                all = all.layer(layer, signal.clone());
                assert!(all.get(layer).is_some());
                sides.push((layer, columns, signal));
            }
            let mut caches = Vec::new();
            for length in &lengths {
                caches.push(model.new_cache(*length)?);
            }
            let pass = match remembered {
                true => Pass::Remembered { batch: &batch, sight, caches: caches.iter_mut().collect() },
                false => Pass::uncached(&batch, sight),
            };
            let got = model.forward(&xs, model.all_layers(), ForwardContext::from(pass).side(&all))?;
            for rows in batch.all_rows() {
                let own = |of: &Tensor| of.narrow(0, rows.start, rows.len());
                let sides = sides.iter().map(|(layer, columns, signal)| {
                    Ok((*layer, columns.clone(), own(signal)?))
                });
                let sides = sides.collect::<Result<Vec<_>>>()?;
                let sees = |i: usize, j: usize| {
                    config.sliding_window.is_none_or(|window| i.abs_diff(j) < window)
                        && (j <= i || sight == Sight::Bidirectional)
                };
                let expected = reference(&config, &weights, &sides, &own(&xs)?, sees)?;
                assert_close(&format!("{rows:?}"), &own(&got)?, &expected, 1e-5)?;
            }
            Ok(())
        };
        tiny::holds(run())?;
    }
}

/// A long text, in as many pieces as one likes, reads the rows of the signal that are its own.
#[test]
fn pieces_read_their_own_rows() -> Result {
    for (kept, window) in KEPT.into_iter().zip([None, Some(40), Some(300)]) {
        let config = config(window);
        let columns = columns(&config, 6, 4)?;
        let model =
            kept::transformer(&config, kept, 4)?.with_side(1, Some(projection(&columns)?))?;
        let (tokens, layers) = (1100, model.all_layers());
        let (xs, signal) = (tiny::noise(5, &[tokens, 32], 1.0)?, signal(tokens, 6, 6)?);
        let side = SideSignal::new().layer(1, signal.clone());
        let batch = Batch::one(tokens)?;
        let context = ForwardContext::from(Pass::Causal(&batch)).side(&side);
        let whole = model.forward(&xs, layers.clone(), context)?;
        for pieces in [vec![tokens], vec![300, 700, 99, 1], vec![1, 5, 1094]] {
            let mut cache = model.new_cache(2000)?;
            let mut from = 0;
            for piece in pieces {
                let own = |of: &Tensor| of.narrow(0, from, piece);
                let side = SideSignal::new().layer(1, own(&signal)?);
                let context = ForwardContext::from(Pass::Cached(&mut cache)).side(&side);
                let got = model.forward(&own(&xs)?, layers.clone(), context)?;
                assert_close(&format!("{kept:?} {from} {piece}"), &got, &own(&whole)?, 2e-5)?;
                from += piece;
            }
        }
        // A pass of some layers reads what there is for these.
        let lower =
            model.forward(&xs, 0..1, ForwardContext::from(Pass::Causal(&batch)).side(&side))?;
        let context = ForwardContext::from(Pass::Causal(&batch)).side(&side);
        assert_identical("layers", &model.forward(&lower, 1..3, context)?, &whole)?;
    }
    Ok(())
}

// ---- gradients ----

/// They reach the columns and the signal, in every pass, over weights of any type.
#[test]
fn gradients_reach_the_columns_and_the_signal() -> Result {
    for kept in KEPT {
        let config = config(Some(9));
        let model = kept::transformer(&config, kept, 8)?;
        for (kind, tokens) in
            KINDS.into_iter().flat_map(|kind| [6, 30].map(|tokens| (kind, tokens)))
        {
            let xs = tiny::noise(9, &[tokens, config.hidden_size], 1.0)?;
            let ([gate, up], signal) = (columns(&config, 5, 10)?, signal(tokens, 5, 11)?);
            let ys = |gate: &Tensor, up: &Tensor, signal: &Tensor| -> Result<Tensor> {
                let side = projection(&[gate.clone(), up.clone()])?;
                let model = model.with_side(1, Some(side))?;
                let side = SideSignal::new().layer(1, signal.clone());
                Ok(run(&model, kind, &xs, Some(&side))?.swap_remove(0))
            };
            let name = |what: &str| format!("{what}, {kept:?} {kind:?} {tokens}");
            check(&name("gate"), &gate, |gate| ys(gate, &up, &signal))?;
            check(&name("up"), &up, |up| ys(&gate, up, &signal))?;
            check(&name("signal"), &signal, |signal| ys(&gate, &up, signal))?;
        }
    }
    Ok(())
}

/// Also where a text is so long that it goes in pieces.
#[test]
fn gradients_reach_every_piece_of_a_long_text() -> Result {
    let config = Config { num_hidden_layers: 2, ..config(Some(20)) };
    let model = kept::transformer(&config, KEPT[0], 12)?;
    let tokens = 1100;
    let (xs, signal) = (tiny::noise(13, &[tokens, 32], 1.0)?, signal(tokens, 5, 14)?);
    let [gate, up] = columns(&config, 5, 15)?;
    for kind in [Kind::Uncached(Sight::Causal), Kind::Cached] {
        let ys = |gate: &Tensor, signal: &Tensor| -> Result<Tensor> {
            let model = model.with_side(0, Some(projection(&[gate.clone(), up.clone()])?))?;
            let side = SideSignal::new().layer(0, signal.clone());
            Ok(run(&model, kind, &xs, Some(&side))?.swap_remove(0))
        };
        check("gate", &gate, |gate| ys(gate, &signal))?;
        check("signal", &signal, |signal| ys(&gate, signal))?;
        // No row is left out.
        let var = Var::from_tensor(&signal)?;
        let gradients = loss(&ys(&gate, &var)?)?.backward()?;
        let gradient = gradients.get(&var).ok_or("no gradient")?;
        let least = gradient.abs()?.sum(1)?.min(0)?.to_scalar::<f32>()?;
        assert!(least > 1e-6, "{kind:?}: {least}");
    }
    Ok(())
}

// ---- what does not fit ----

fn refused<T: std::fmt::Debug>(got: hybrid_attention::Result<T>, parameter: &str) -> Result {
    match got {
        Err(Error::Parameter { name, .. }) if name == parameter => Ok(()),
        got => Err(format!("{parameter}: {got:?}").into()),
    }
}

#[test]
fn projections_that_do_not_fit_are_refused() -> Result {
    let config = config(None);
    let model = kept::transformer(&config, KEPT[0], 16)?;
    let fit = columns(&config, 5, 17)?;
    for layer in [3, usize::MAX] {
        refused(model.with_side(layer, Some(projection(&fit)?)), "layer")?;
        refused(model.with_side(layer, None), "layer")?;
    }
    let linear = |out, input| tiny::noise(18, &[out, input], 1.0);
    for [gate, up] in [
        [linear(64, 5)?, linear(64, 4)?],
        [linear(63, 5)?, linear(64, 5)?],
        [linear(63, 5)?, linear(63, 5)?],
        [linear(5, 64)?, linear(5, 64)?],
    ] {
        refused(model.with_side(1, Some(projection(&[gate, up])?)), "side projection")?;
    }
    // What reads something else remembers something else.
    let reading = model.with_side(1, Some(projection(&fit)?))?;
    let xs = model.embed_ids(&[1, 2])?;
    let mut cache = model.new_cache(4)?;
    refused(reading.forward(&xs, 0..3, Pass::Cached(&mut cache)), "cache")?;
    Ok(())
}

/// Before anything is computed or remembered.
#[test]
fn signals_that_do_not_fit_are_refused() -> Result {
    let config = config(None);
    let fit = columns(&config, 5, 19)?;
    let model = kept::transformer(&config, KEPT[0], 19)?.with_side(1, Some(projection(&fit)?))?;
    let with = |layer: usize, signal: Tensor| SideSignal::new().layer(layer, signal);
    for tokens in [4, 600] {
        let xs = tiny::noise(20, &[tokens, config.hidden_size], 1.0)?;
        for (what, side) in [
            ("narrower", with(1, signal(tokens, 4, 1)?)),
            ("wider", with(1, signal(tokens, 6, 1)?)),
            ("a row too few", with(1, signal(tokens - 1, 5, 1)?)),
            ("no row", with(1, signal(0, 5, 1)?)),
            ("a row too many", with(1, signal(tokens + 1, 5, 1)?)),
            ("too few of nothing", with(1, signal(tokens - 1, 0, 1)?)),
            ("flat", with(1, signal(tokens, 5, 1)?.flatten_all()?)),
            ("three dimensions", with(1, signal(tokens, 5, 1)?.unsqueeze(0)?)),
            ("a layer that reads none", with(0, signal(tokens, 5, 1)?)),
            ("a layer above that reads none", with(2, signal(tokens, 5, 1)?)),
        ] {
            for kind in KINDS {
                refused(run(&model, kind, &xs, Some(&side)), "side signal")
                    .map_err(|error| format!("{what}, {kind:?} {tokens}: {error}"))?;
            }
            let mut cache = model.new_cache(1000)?;
            let past = model.embed_ids(&[3, 1, 4])?;
            model.forward(&past, 0..3, Pass::Cached(&mut cache))?;
            let was = (cache.len(), cache.bytes(), cache.pool().used_bytes());
            let context = ForwardContext::from(Pass::Cached(&mut cache)).side(&side);
            refused(model.forward(&xs, 0..3, context), "side signal")?;
            assert_eq!((cache.len(), cache.bytes(), cache.pool().used_bytes()), was, "{what}");
            let mut never: KvCache = model.new_cache(1000)?;
            model.forward(&past, 0..3, Pass::Cached(&mut never))?;
            let next = model.forward(&xs, 0..3, Pass::Cached(&mut cache))?;
            let expected = model.forward(&xs, 0..3, Pass::Cached(&mut never))?;
            assert_identical(what, &next, &expected)?;
        }
        // What there is for layers that do not run is not looked at.
        let batch = Batch::one(tokens)?;
        let side = with(0, signal(3, 2, 1)?).layer(7, signal(1, 1, 1)?);
        let context = ForwardContext::from(Pass::Causal(&batch)).side(&side);
        let got = model.forward(&xs, 1..3, context)?;
        assert_identical("1..3", &got, &model.forward(&xs, 1..3, Pass::Causal(&batch))?)?;
        // Other types than the stream's are an error, whichever.
        for dtype in [DType::F64, DType::BF16, DType::U32, DType::U8] {
            let side = with(1, signal(tokens, 5, 1)?.to_dtype(dtype)?);
            for kind in KINDS {
                assert!(run(&model, kind, &xs, Some(&side)).is_err(), "{dtype:?} {kind:?}");
            }
        }
    }
    Ok(())
}
