//! What is generic in texts: directions against what was put in, what is removed and what is left, files, and
//! embeddings without it.

mod common;

use std::fs;

use candle_core::{DType, Device, Tensor};
use hybrid_attention::memory::evaluate::{Generics, Passage, Row};
use hybrid_attention::model::{Batch, Pass, Sight};
use hybrid_attention::refine::{Interpolate, OpConfig, Refine, Remove, Seq, Step, seq};
use hybrid_attention::statistics::{Fingerprint, Generic, Subspace};
use hybrid_attention::{
    Config, EmbedConfig, Error, GenerationConfig, HybridModel, Pooling, Thinking, Tokenizer,
};
use proptest::prelude::*;
use serde_json::{Value, json};

use common::tiny::{self, holds};
use common::{Result, TEXTS, assert_close, assert_identical, fixture};

/// Numbers of a state of [`model`].
const HIDDEN: usize = 16;

fn model(seed: u64) -> Result<HybridModel> {
    let tokenizer = Tokenizer::from_folder(&fixture("tokenizer").join("llama"))?;
    let config = Config { vocab_size: 512, ..tiny::config() };
    Ok(HybridModel::new(tiny::transformer(&config, seed)?, tokenizer)?)
}

/// That of a model of this width.
fn fingerprint(width: usize) -> Result<Fingerprint> {
    let config = Config { hidden_size: width, ..tiny::config() };
    Ok(Fingerprint::of(&tiny::transformer(&config, 1)?)?)
}

fn fit(vectors: &Tensor) -> Result<Generic> {
    Ok(Generic::fit(vectors, None, fingerprint(vectors.dim(1)?)?)?)
}

/// The squared length of all rows.
fn square(rows: &Tensor) -> Result<f64> {
    Ok(rows.to_dtype(DType::F64)?.sqr()?.sum_all()?.to_scalar()?)
}

fn refused<T>(result: hybrid_attention::Result<T>, expected: &str) {
    let error = result.err();
    let is = matches!(&error, Some(Error::Parameter { name, .. }) if *name == expected);
    assert!(is, "{expected}: {error:?}");
}

// ---- directions ----

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// Of rows that are a mean and few directions apart from it, the mean and these come out, whatever their number; all
    /// of them together explain everything and leave nothing.
    #[test]
    fn what_rows_have_in_common_comes_out(
        n in 2usize..40, width in 4usize..24, rank in 1usize..5, offset in -5.0..5.0f64, seed: u64,
    ) {
        holds((|| {
            let (left, right) = (tiny::noise(seed, &[n, rank], 1.0)?, tiny::noise(!seed, &[rank, width], 1.0)?);
            let vectors = (left.matmul(&right)? + offset)?;
            let generic = fit(&vectors)?;
            let found = generic.variances().len();
            assert!(found <= rank.min(n - 1).min(width), "{found}");
            assert_eq!(generic.texts(), n);
            let mean = vectors.mean(0)?;
            assert_close("mean", &Tensor::new(generic.mean(), &Device::Cpu)?, &mean, 1e-5)?;

            // Along each direction, the variance of the rows.
            let centred = vectors.broadcast_sub(&mean)?;
            let all = generic.subspace(found)?;
            let directions = Tensor::new(all.directions(), &Device::Cpu)?;
            let along = centred.matmul(&directions.t()?)?.sqr()?.sum(0)?;
            let variances = (along / (n - 1).max(1) as f64)?;
            let expected = Tensor::new(generic.variances(), &Device::Cpu)?;
            assert_close("variances", &variances, &expected, 1e-4)?;
            let products = directions.matmul(&directions.t()?)?;
            assert_close("right angles", &products, &Tensor::eye(found, DType::F32, &Device::Cpu)?, 1e-5)?;

            let explained = generic.explained(&vectors, &all)?;
            assert!((explained.directions - 1.0).abs() < 1e-5, "{explained:?}");
            let off = 1.0 - square(&centred)? / square(&vectors)?;
            assert!((explained.mean - off).abs() < 1e-4, "{explained:?} {off}");
            let left = generic.remove(found)?.apply(&vectors)?;
            assert!(square(&left)? < 1e-8 * square(&vectors)?);
            Ok(())
        })())?;
    }

    /// What is left is at right angles to what was taken out, and as long as the rest; taking directions out again
    /// changes nothing. Nothing to take out changes no bit.
    #[test]
    fn what_is_removed_is_gone(width in 3usize..20, k in 1usize..8, n in 1usize..9, seed: u64) {
        holds((|| {
            let k = k.min(width);
            let own = Subspace::random(width, k, seed)?;
            let rows = tiny::noise(seed, &[n, width], 2.0)?;
            let mean = tiny::noise(!seed, &[width], 1.0)?;
            let of_directions = Remove::new(None, own.directions())?;
            let with_mean = Remove::new(Some(mean.to_vec1()?), own.directions())?;
            assert_eq!(with_mean.clone().keep_mean(), of_directions);

            let directions = Tensor::new(own.directions(), &Device::Cpu)?;
            let centred = rows.broadcast_sub(&mean)?;
            for (remove, of) in [(&of_directions, &rows), (&with_mean, &centred)] {
                let left = remove.apply(&rows)?;
                assert!(square(&left.matmul(&directions.t()?)?)? < 1e-9 * (1.0 + square(of)?));
                let within = of.matmul(&directions.t()?)?;
                assert!((square(&left)? + square(&within)? - square(of)?).abs() < 1e-4 * square(of)?);
                let again = of_directions.apply(&left)?;
                assert!(square(&(again - left)?)? < 1e-9 * (1.0 + square(of)?));
            }
            let of_mean = Remove::new(Some(mean.to_vec1()?), Vec::new())?;
            assert_identical("mean", &of_mean.apply(&rows)?, &centred)?;
            assert_identical("nothing", &Remove::default().apply(&rows)?, &rows)?;
            // As an op, in any shape.
            let (batch, xs) = (Batch::one(n)?, rows.unsqueeze(0)?);
            let refined = with_mean.refine(&xs, &Step::new(&xs, &xs, &batch))?;
            assert_identical("op", &refined.squeeze(0)?, &with_mean.apply(&rows)?)?;
            Ok(())
        })())?;
    }
}

#[test]
fn subspaces_overlap_as_far_as_they_do() -> Result {
    let axes = |which: &[usize]| -> Result<Generic> {
        // Two rows for each axis, on both sides of the mean.
        let mut rows = Vec::new();
        for (at, axis) in which.iter().enumerate() {
            for side in [-1.0, 1.0] {
                let mut row = vec![1f32; 8];
                row[*axis] += side * (8.0 - at as f32);
                rows.push(row);
            }
        }
        fit(&Tensor::new(rows, &Device::Cpu)?)
    };
    let of = |which: &[usize]| -> Result<Subspace> { Ok(axes(which)?.subspace(which.len())?) };
    for (one, other, expected) in [
        (of(&[0, 1, 2])?, of(&[2, 0, 1])?, 1.0),
        (of(&[0, 1, 2])?, of(&[3, 4, 5])?, 0.0),
        (of(&[0, 1])?, of(&[1, 2])?, 0.5),
        (of(&[0])?, of(&[0, 1, 2])?, 1.0), // within
    ] {
        assert!((one.overlap(&other)? - expected).abs() < 1e-6, "{expected}");
        assert!((other.overlap(&one)? - expected).abs() < 1e-6, "{expected}");
    }
    assert_eq!(axes(&[5, 2])?.variances().len(), 2);

    // By chance they have k / width in common, and hold k / width of anything.
    let (width, k) = (32, 8);
    let overlaps = (0..64).map(|seed| {
        let (one, other) =
            (Subspace::random(width, k, seed)?, Subspace::random(width, k, seed + 1000)?);
        assert_eq!((one.dimensions(), one.width()), (k, width));
        Ok(one.overlap(&other)?)
    });
    let overlaps = overlaps.collect::<Result<Vec<_>>>()?;
    let mean = overlaps.iter().sum::<f64>() / 64.0;
    assert!((mean - 0.25).abs() < 0.02, "{mean}");
    let rows = tiny::noise(1, &[400, width], 1.0)?;
    let generic = fit(&rows)?;
    let explained = generic.explained(&rows, &Subspace::random(width, k, 7)?)?;
    assert!((explained.directions - 0.25).abs() < 0.05, "{explained:?}");
    let first = generic.explained(&rows, &generic.subspace(k)?)?;
    assert!(first.directions > explained.directions, "{first:?}");
    assert_eq!(Subspace::random(9, 9, 3)?, Subspace::random(9, 9, 3)?);
    assert!((Subspace::random(9, 9, 3)?.overlap(&of_all(9)?)? - 1.0).abs() < 1e-9);

    refused(Subspace::random(8, 9, 0), "k");
    refused(Subspace::random(8, 0, 0), "k");
    refused(of(&[0])?.overlap(&Subspace::random(9, 1, 0)?), "other");
    refused(of(&[0])?.overlap(&axes(&[0])?.subspace(0)?), "other");
    refused(generic.explained(&rows, &Subspace::random(8, 1, 0)?), "by");
    refused(
        generic.explained(&tiny::noise(1, &[4, 8], 1.0)?, &Subspace::random(width, 1, 0)?),
        "rows",
    );
    refused(generic.remove_others(&Subspace::random(8, 1, 0)?), "directions");
    Ok(())
}

/// All there is.
fn of_all(width: usize) -> Result<Subspace> {
    Ok(Subspace::random(width, width, 0)?)
}

// ---- of texts ----

#[test]
fn it_is_of_the_states_that_enter_a_layer() -> Result {
    let model = model(1)?;
    let (transformer, tokenizer) = (model.transformer(), model.tokenizer().ok_or("no tokenizer")?);
    for layer in 0..=3 {
        for sight in [Sight::Causal, Sight::Bidirectional] {
            let config = EmbedConfig::default().sight(sight).layer(layer).normalize(false);
            let mut expected = Vec::new();
            for text in TEXTS {
                let ids = tokenizer.encode(text, true)?;
                let (batch, xs) = (Batch::one(ids.len())?, transformer.embed_ids(&ids)?);
                let h = match layer {
                    0 => xs,
                    _ => transformer.forward(&xs, 0..layer, Pass::uncached(&batch, sight))?,
                };
                let pooling = match sight {
                    Sight::Causal => Pooling::WeightedMean,
                    Sight::Bidirectional => Pooling::Mean,
                };
                expected.push(pooling.pool(&h, &batch)?);
            }
            let expected = Tensor::cat(&expected, 0)?;
            let vectors = model.embed(&TEXTS, &config)?;
            assert_close(&format!("layer {layer}, {sight:?}"), &vectors, &expected, 1e-5)?;
            if sight == Sight::Causal {
                let own = Fingerprint::of(transformer)?;
                let generic = Generic::of(&model, &TEXTS, layer)?;
                assert_eq!(generic, Generic::fit(&vectors, layer, own)?);
                assert_eq!(generic.layer(), Some(layer));
            }
        }
    }
    let generic = Generic::of(&model, &TEXTS, None)?;
    let vectors = model.embed(&TEXTS, &EmbedConfig::default().normalize(false))?;
    assert_eq!(generic, Generic::fit(&vectors, None, Fingerprint::of(transformer)?)?);
    refused(Generic::of(&model, &TEXTS, 4), "layer");
    refused(Generic::of(&model, &TEXTS[..1], 2), "texts");
    refused(Generic::of::<&str>(&model, &[], 2), "texts");
    refused(Generic::of(&model, &["the cat", "the cat"], 2), "vectors");
    assert!(matches!(
        Generic::of(&tiny::hybrid(&tiny::config(), 1)?, &TEXTS, 1),
        Err(Error::NoTokenizer { .. })
    ));
    Ok(())
}

#[test]
fn embeddings_without_it_are_removed_from_before_they_are_scaled() -> Result {
    let model = model(1)?;
    for layer in [None, Some(0), Some(2), Some(3)] {
        let generic = Generic::of(&model, &TEXTS, layer)?;
        let config = layer.into_iter().fold(EmbedConfig::default(), EmbedConfig::layer);
        let whole = model.embed(&TEXTS, &config)?;
        // Nothing to take out changes no bit.
        let nothing = generic.remove(0)?.keep_mean();
        assert_eq!(nothing.layer(), layer);
        let same = model.embed(&TEXTS, &EmbedConfig::default().remove(nothing))?;
        assert_identical("nothing removed", &same, &whole)?;
        for remove in [
            generic.remove(0)?,
            generic.remove(2)?,
            generic.remove(2)?.keep_mean(),
            generic.remove_others(&Subspace::random(HIDDEN, 2, 1)?)?,
        ] {
            let raw = model.embed(&TEXTS, &config.clone().normalize(false))?;
            let expected = remove.apply(&raw)?;
            let removed = EmbedConfig::default().remove(remove);
            let got = model.embed(&TEXTS, &removed.clone().normalize(false))?;
            assert_identical("removed", &got, &expected)?;
            let length = expected.sqr()?.sum_keepdim(1)?.sqrt()?;
            let unit = expected.broadcast_div(&length)?;
            assert_close("scaled", &model.embed(&TEXTS, &removed)?, &unit, 1e-5)?;
            // The settings say all of it.
            let written = serde_json::to_string(&removed)?;
            assert_eq!(serde_json::from_str::<EmbedConfig>(&written)?, removed);
        }
        // The mean of what it was made of is gone.
        let config = EmbedConfig::default().remove(generic.remove(0)?).normalize(false);
        let mean = model.embed(&TEXTS, &config)?.mean(0)?;
        assert!(square(&mean)? < 1e-8 * square(&whole)?);
    }
    let plain = serde_json::to_value(EmbedConfig::default())?;
    assert!(plain.get("layer").is_none() && plain.get("remove").is_none(), "{plain}");
    Ok(())
}

#[test]
fn embedding_refuses_what_does_not_fit() -> Result {
    let model = model(1)?;
    let generic = Generic::of(&model, &TEXTS, 2)?;
    let embed = |config: EmbedConfig| model.embed(&TEXTS, &config).map(drop);
    let remove = || EmbedConfig::default().remove(generic.remove(1).unwrap_or_default());
    embed(remove().layer(2))?;
    refused(embed(remove().layer(1)), "remove");
    refused(remove().layer(3).validate(), "remove");
    refused(embed(EmbedConfig::default().remove(Remove::default()).layer(1)), "remove");
    refused(embed(EmbedConfig::default().layer(4)), "layer");
    refused(embed(remove().thinking(Thinking::new(1))), "layer");
    refused(model.embed_document(TEXTS[0], &remove()).map(drop), "layer");
    let wide = Remove::new(Some(vec![0.0; HIDDEN + 1]), Vec::new())?;
    refused(embed(EmbedConfig::default().remove(wide)), "remove");

    // Another model of the same shape, and the same with thinking where all layers run.
    let other = self::model(2)?;
    refused(other.embed(&TEXTS, &remove()).map(drop), "remove");
    let last = Generic::of(&model, &TEXTS, None)?.remove(1)?;
    let thinking = Thinking::new(1).refine(Interpolate::new(0.1));
    embed(EmbedConfig::default().remove(last.clone()).thinking(thinking))?;
    let (vector, _) =
        model.embed_document(TEXTS[0], &EmbedConfig::default().remove(last.clone()))?;
    let alone = model.embed(&TEXTS[..1], &EmbedConfig::default().remove(last))?;
    assert_eq!(vec![vector], alone.to_vec2::<f32>()?);

    // A stranger's file sets neither: nobody could take it back.
    for own in [json!({"layer": 2}), json!({"remove": {"directions": [[1.0, 0.0]]}})] {
        let text = json!({ "embed": own }).to_string();
        let refused = EmbedConfig::from_hybrid_json(&text).err().ok_or("accepted")?.to_string();
        assert!(refused.contains("nothing, as the default of a checkpoint"), "{refused}");
    }
    Ok(())
}

// ---- as an op ----

#[test]
fn an_op_takes_it_out_of_thoughts() -> Result {
    let model = model(1)?;
    let generic = Generic::of(&model, &TEXTS, 2)?;
    let remove = generic.remove(3)?.keep_mean();
    let thinking = Thinking::new(1).span(0..2).refine(seq().add(remove.clone()));
    let config = GenerationConfig::default().thinking(thinking);
    let thoughts = model.think("the cat sat on the mat", &config)?;
    let plain = Thinking::new(1).span(0..2).refine(Interpolate::new(1.0));
    let h = model.think("the cat sat on the mat", &GenerationConfig::default().thinking(plain))?.z;
    let last = h.dim(0)? - 1; // the prompt's last token does not think
    let context = |z: &Tensor| z.narrow(0, 0, last);
    assert_close("thoughts", &context(&thoughts.z)?, &remove.apply(&context(&h)?)?, 1e-5)?;
    let directions = Tensor::new(generic.subspace(3)?.directions(), &Device::Cpu)?;
    let along = context(&thoughts.z)?.matmul(&directions.t()?)?;
    assert!(square(&along)? < 1e-8 * square(&h)?);
    assert_identical(
        "the last",
        &thoughts.z.narrow(0, last, 1)?,
        &thoughts.first.narrow(0, last, 1)?,
    )?;

    let narrow = Remove::new(Some(vec![0.0; 3]), Vec::new())?;
    let thinking = Thinking::new(1).refine(seq().add(narrow));
    let error = model.think("the cat", &GenerationConfig::default().thinking(thinking)).map(drop);
    assert!(
        matches!(&error, Err(Error::Refinement { op, index: 0, .. }) if op == "Remove"),
        "{error:?}"
    );
    Ok(())
}

#[test]
fn an_op_is_spelled_in_json() -> Result {
    let directions = vec![vec![0.6, 0.8], vec![-0.8, 0.6]];
    let spelled = json!([{ "op": "remove", "mean": [0.5, 1.5], "directions": directions }]);
    let remove = Remove::new(Some(vec![0.5, 1.5]), vec![vec![0.6, 0.8], vec![-0.8, 0.6]])?;
    let own: Seq = serde_json::from_value(spelled)?;
    assert_eq!(own, seq().add(remove.clone()));
    let written = serde_json::to_string(&own)?;
    assert_eq!(serde_json::from_str::<Seq>(&written)?, own);
    assert_eq!(json!(seq().add(Remove::default())), json!([{ "op": "remove" }]));
    assert_eq!(remove.to_config(), Some(OpConfig::Remove(remove.clone())));
    let made = Generic::of(&model(1)?, &TEXTS, 2)?.remove(2)?;
    let back: Remove = serde_json::from_str(&serde_json::to_string(&made)?)?;
    assert_eq!(back, made); // to the last bit, its layer and its model

    for (wrong, expected) in [
        (json!({"directions": [[1.0, 0.0], [0.0]]}), "2 numbers in each row"),
        (json!({"mean": [1.0], "directions": [[1.0, 0.0]]}), "1 numbers in each row"),
        (json!({"mean": []}), "numbers in each row"),
        (json!({"directions": [[1.0, 1.0]]}), "1 as the product of rows 0 and 0"),
        (json!({"directions": [[1.0, 0.0], [0.6, 0.8]]}), "0 as the product of rows 0 and 1"),
        (json!({"directions": [[1.0], [1.0]]}), "at most 1 directions"),
        (json!({"direction": []}), "unknown field"),
        (json!({"mean": [1e39]}), "mean"),
    ] {
        let mut op: Value = json!({ "op": "remove" });
        let (Some(all), Some(wrong)) = (op.as_object_mut(), wrong.as_object()) else { continue };
        all.extend(wrong.clone());
        let error = serde_json::from_value::<OpConfig>(op.clone()).err().ok_or("accepted")?;
        assert!(error.to_string().contains(expected), "{op}: {error}");
    }
    for bad in [f32::NAN, f32::INFINITY] {
        refused(Remove::new(Some(vec![bad]), Vec::new()), "directions");
        refused(Remove::new(None, vec![vec![bad]]), "directions");
    }
    let many = Subspace::random(300, Remove::MOST_DIRECTIONS + 1, 0)?.directions();
    refused(Remove::new(None, many), "directions");
    refused(remove.apply(&Tensor::zeros((2, 3), DType::F32, &Device::Cpu)?), "rows");
    Ok(())
}

// ---- vectors and files ----

#[test]
fn it_is_made_of_vectors_that_fit() -> Result {
    let own = fingerprint(6)?;
    let good = tiny::noise(1, &[5, 6], 1.0)?;
    let generic = Generic::fit(&good, 1, own.clone())?;
    assert_eq!((generic.fingerprint(), generic.variances().len()), (&own, 4));
    refused(generic.remove(5), "k");
    refused(generic.subspace(5), "k");
    for wrong in [good.narrow(0, 0, 1)?, good.narrow(0, 0, 0)?, good.narrow(1, 0, 5)?] {
        refused(Generic::fit(&wrong, 1, own.clone()), "rows");
    }
    refused(
        Generic::fit(&Tensor::ones((4, 6), DType::F32, &Device::Cpu)?, 1, own.clone()),
        "vectors",
    );
    for bad in [f64::NAN, f64::INFINITY] {
        let row = (good.narrow(0, 0, 1)? * bad)?;
        let wrong = Tensor::cat(&[&good, &row], 0)?;
        let error = Generic::fit(&wrong, 1, own.clone()).map(drop);
        assert!(matches!(error, Err(Error::NotFinite { position: 5, .. })), "{error:?}");
        let error = generic.explained(&wrong, &generic.subspace(1)?).map(drop);
        assert!(matches!(error, Err(Error::NotFinite { position: 5, .. })), "{error:?}");
    }
    Ok(())
}

#[test]
fn it_comes_back_from_its_file_for_its_model_alone() -> Result {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("generic.safetensors");
    let model = model(1)?;
    let own = Fingerprint::of(model.transformer())?;
    for layer in [None, Some(2)] {
        let generic = Generic::of(&model, &TEXTS, layer)?;
        generic.save(&path)?;
        assert_eq!(Generic::load(&path, &own)?, generic);
    }
    let load = || Generic::load(&path, &own).map(drop);
    refused(Generic::load(&path, &Fingerprint::of(self::model(2)?.transformer())?), "generic");
    refused(Generic::load(&path, &fingerprint(6)?), "generic");

    let whole = fs::read(&path)?;
    for cut in [0, 7, 100, whole.len() / 2, whole.len() - 1] {
        fs::write(&path, &whole[..cut])?;
        let refused = load();
        assert!(matches!(refused, Err(Error::Malformed { .. })), "{cut}: {refused:?}");
    }
    // The file with some bytes of its tensors changed: directions, fingerprint, mean, variances, one after the other.
    let generic = Generic::of(&model, &TEXTS, 2)?;
    let (k, end) = (generic.variances().len(), whole.len());
    let variances = end - 4 * k;
    let mean = variances - 4 * HIDDEN;
    let directions = mean - 4 * HIDDEN - 4 * k * HIDDEN;
    let changed = |at: usize, value: f32| -> Result<hybrid_attention::Result<()>> {
        let mut bytes = whole.clone();
        bytes[at..at + 4].copy_from_slice(&value.to_le_bytes());
        fs::write(&path, bytes)?;
        Ok(load())
    };
    changed(mean, 0.25)??;
    for (at, value, expected) in [
        (mean, f32::NAN, "weight mean"),
        (directions, 2.0, "as the product of rows"),
        (directions, f32::INFINITY, "weight directions"),
        (variances, 0.0, "variances: expected more than 0"),
    ] {
        let error = changed(at, value)?.err().ok_or("accepted")?.to_string();
        assert!(error.contains(expected), "{error}");
    }
    let text = String::from_utf8_lossy(&whole).into_owned();
    assert!(text.contains(r#"\"format\":1"#));
    let format = whole.windows(10).position(|it| it == br#"format\":1"#).ok_or("no format")?;
    let mut bytes = whole.clone();
    bytes[format + 9] = b'9';
    fs::write(&path, bytes)?;
    let error = load().err().ok_or("accepted")?.to_string();
    assert!(error.ends_with("format 9 of a generic: 1 is read"), "{error}");

    let tensors =
        std::collections::HashMap::from([("mean", Tensor::ones(2, DType::F32, &Device::Cpu)?)]);
    candle_core::safetensors::save(&tensors, &path)?;
    let error = load().err().ok_or("accepted")?.to_string();
    assert!(error.ends_with("nothing generic: its metadata says nothing of it"), "{error}");
    let none = folder.path().join("none");
    assert!(matches!(Generic::load(&none, &own), Err(Error::Io { .. })));
    assert!(matches!(generic.save(none.join("below")), Err(Error::Io { .. })));
    Ok(())
}

// ---- what it is worth ----

/// Texts of a few kinds, none like another.
fn passages(model: &HybridModel, count: usize) -> Result<Vec<Passage>> {
    let things = ["clock", "boat", "door", "baker", "harbour", "town", "lantern"];
    let text = |at: usize| {
        let word = |by: usize| things[(at * by + by) % things.len()];
        format!(
            "The {} of the {} stood by the {} in the rain; nobody knew why the {} was there.",
            word(1),
            word(2),
            word(3),
            word(5)
        )
    };
    let cut = (0..count).filter_map(|at| Passage::cut(model, &text(at), 20).transpose());
    let passages = cut.collect::<hybrid_attention::Result<Vec<_>>>()?;
    assert_eq!(passages.len(), count);
    Ok(passages)
}

/// Reciprocal ranks by cosines, and what is taken out of both sides.
fn ranks(
    model: &HybridModel,
    passages: &[Passage],
    layer: Option<usize>,
    remove: &Remove,
) -> Result<Vec<f64>> {
    let config = layer.into_iter().fold(EmbedConfig::default(), EmbedConfig::layer);
    let vectors = |part: fn(&Passage) -> &str| -> Result<Vec<Vec<f32>>> {
        let texts: Vec<&str> = passages.iter().map(part).collect();
        Ok(remove.apply(&model.embed(&texts, &config.clone().normalize(false))?)?.to_vec2()?)
    };
    let (stored, query) = (vectors(|it| &it.stored)?, vectors(|it| &it.query)?);
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(a * b)).sum::<f64>();
    let cosine = |a: &[f32], b: &[f32]| dot(a, b) / (dot(a, a) * dot(b, b)).sqrt();
    let rank = |(own, query): (usize, &Vec<f32>)| {
        let right = cosine(query, &stored[own]);
        1.0 / stored.iter().filter(|it| cosine(query, it) >= right).count() as f64
    };
    Ok(query.iter().enumerate().map(rank).collect())
}

fn mrr(ranks: &[f64]) -> f64 {
    ranks.iter().sum::<f64>() / ranks.len() as f64
}

#[test]
fn what_it_is_worth_is_what_is_found_by_hand() -> Result {
    let model = model(1)?;
    let all = passages(&model, 21)?;
    let (fit, choose, one, other) = (&all[..6], &all[6..11], &all[11..16], &all[16..]);
    let layers = vec![Some(1), Some(3), None];
    let generics = Generics { layers: layers.clone(), counts: vec![1, 3, 6], draws: 2 };
    let count = std::cell::Cell::new(0);
    let tested =
        generics.run(&model, [fit, choose], &[one, other], || count.set(count.get() + 1))?;
    assert_eq!((count.get(), tested.len()), (3 * 4, 2));
    let own = Fingerprint::of(model.transformer())?;
    let of = |passages: &[Passage], layer: Option<usize>| -> Result<(Tensor, Generic)> {
        let texts: Vec<&str> = passages.iter().map(|it| it.stored.as_str()).collect();
        let next = passages.iter().map(|it| it.query.as_str());
        let texts: Vec<&str> = texts.into_iter().chain(next).collect();
        let config = layer.into_iter().fold(EmbedConfig::default(), EmbedConfig::layer);
        let vectors = model.embed(&texts, &config.normalize(false))?;
        let generic = Generic::fit(&vectors, layer, own.clone())?;
        Ok((vectors, generic))
    };
    let mut chosen = Vec::new();
    for (index, layer) in layers.into_iter().enumerate() {
        let (_, generic) = of(fit, layer)?;
        let by_others = [1, 3, 6].map(|k| {
            Ok::<_, Box<dyn std::error::Error>>((
                k,
                mrr(&ranks(&model, choose, layer, &generic.remove(k)?)?),
            ))
        });
        let by_others = by_others.into_iter().collect::<Result<Vec<_>>>()?;
        let best = by_others.iter().map(|(_, mrr)| *mrr).fold(0.0, f64::max);
        for (passages, tested) in [one, other].into_iter().zip(&tested) {
            let at = &tested.layers[index];
            assert_eq!((at.layer, at.most), (layer, 6));
            let of_k = by_others.iter().find(|(k, _)| *k == at.k).ok_or("another k")?;
            assert!((of_k.1 - best).abs() < 1e-9, "{} is not the best of {by_others:?}", at.k);
            chosen.push((at.chosen, best));

            let drawn = [0, 1].map(|seed| -> Result<Vec<f64>> {
                let drawn = Subspace::random(HIDDEN, at.k, seed)?;
                ranks(&model, passages, layer, &generic.remove_others(&drawn)?)
            });
            let [first, second] = drawn;
            let random: Vec<f64> = first?.iter().zip(second?).map(|(a, b)| (a + b) / 2.0).collect();
            let remove = generic.remove(at.k)?;
            let by_hand = [
                (Generics::NOTHING, ranks(&model, passages, layer, &Remove::default())?),
                (Generics::MEAN, ranks(&model, passages, layer, &generic.remove(0)?)?),
                (
                    Generics::DIRECTIONS,
                    ranks(&model, passages, layer, &remove.clone().keep_mean())?,
                ),
                (Generics::BOTH, ranks(&model, passages, layer, &remove)?),
                (Generics::RANDOM, random),
            ];
            assert_eq!(at.rows.len(), by_hand.len());
            for (Row { name, reciprocal_ranks, .. }, (expected, ranks)) in
                at.rows.iter().zip(by_hand)
            {
                assert_eq!((name.as_str(), reciprocal_ranks), (expected, &ranks), "{layer:?}");
            }
            let (vectors, own) = of(passages, layer)?;
            let most = generic.subspace(6)?;
            assert_eq!(at.explained, generic.explained(&vectors, &most)?);
            let by_chance = generic.explained(&vectors, &Subspace::random(HIDDEN, 6, 0)?)?;
            assert_eq!(at.by_chance, by_chance.directions);
            assert_eq!(at.overlap, most.overlap(&own.subspace(6)?)?);
            assert!(at.overlap > 0.0 && at.overlap < 1.0);
        }
    }
    let best = chosen.iter().map(|(_, mrr)| *mrr).fold(0.0, f64::max);
    assert_eq!(chosen.iter().filter(|(chosen, _)| *chosen).count(), 2, "one for each test");
    assert!(chosen.iter().all(|(chosen, mrr)| !chosen || *mrr == best), "{chosen:?}");
    assert_eq!(Generics::new(&model).layers, [Some(1), Some(2), Some(3), None]);

    let run = |generics: &Generics, fit: &[Passage], tests: &[&[Passage]]| {
        generics.run(&model, [fit, choose], tests, || ()).map(drop)
    };
    refused(run(&generics, &all[..1], &[one]), "passages");
    refused(run(&generics, fit, &[one, &all[..1]]), "passages");
    refused(run(&Generics { layers: Vec::new(), ..generics.clone() }, fit, &[one]), "layers");
    refused(run(&Generics { layers: vec![Some(4)], ..generics.clone() }, fit, &[one]), "layer");
    refused(run(&Generics { draws: 0, ..generics.clone() }, fit, &[one]), "draws");
    for counts in [vec![], vec![0, 1]] {
        refused(run(&Generics { counts, ..generics.clone() }, fit, &[one]), "counts");
    }
    refused(run(&Generics { counts: vec![12], ..generics }, fit, &[one]), "counts");
    Ok(())
}
