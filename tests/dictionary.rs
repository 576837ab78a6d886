//! Compiling a dictionary: each entry by itself, into a file that is whole or gone on with, and what of a text stands
//! in a headword.

mod common;

use std::cell::RefCell;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::OnceLock;

use candle_core::DType;
use hybrid_attention::dictionary::{Dictionary, DictionaryConfig, Entries, Pooled};
use hybrid_attention::{Config, Error, HybridModel, Pooling, Sight, Tokenizer};
use proptest::prelude::*;

use common::reference::Reference;
use common::{Result, fixture, tiny};

const SIGHTS: [Sight; 2] = [Sight::Causal, Sight::Bidirectional];
const LAYERS: [usize; 2] = [0, 2];

/// Of the words of a tokenizer's fixture.
const WORDS: [(&str, &str); 5] = [
    ("cat", "what sat on the mat"),
    ("hello world", "12"),
    ("world", "the mat and what sat on the mat and thought about the mat and what sat there, 123"),
    ("café", "hello"),
    ("naïve", "東京"),
];

fn tokenizer(name: &str) -> Result<Tokenizer> {
    let tokenizer = Tokenizer::from_folder(&fixture("tokenizer").join(name))?;
    Ok(tokenizer.ok_or("no tokenizer")?)
}

fn config(tokenizer: &Tokenizer) -> Config {
    Config { vocab_size: tokenizer.vocab_size(), max_position_embeddings: 64, ..tiny::config() }
}

fn model(name: &str, seed: u64) -> Result<HybridModel> {
    let tokenizer = tokenizer(name)?;
    let transformer = tiny::transformer(&config(&tokenizer), seed)?;
    Ok(HybridModel::new(transformer, Some(tokenizer))?)
}

fn layers() -> DictionaryConfig {
    DictionaryConfig::layers(LAYERS)
}

fn compile(model: &HybridModel, entries: &[(&str, &str)]) -> hybrid_attention::Result<Dictionary> {
    Dictionary::compile(model, &Entries::new(entries.to_vec())?, &layers())
}

fn refused<T>(result: hybrid_attention::Result<T>, says: &str) -> Result<Error> {
    let error = result.err().ok_or(format!("accepted: {says}"))?;
    assert!(error.to_string().contains(says), "{error} says nothing of {says:?}");
    Ok(error)
}

fn bits(vector: &[f32]) -> Vec<u32> {
    vector.iter().map(|it| it.to_bits()).collect()
}

// ---- vectors ----

/// Whatever an entry is compiled with, and however little that is, its vectors are the same to the last bit.
#[test]
fn an_entry_knows_no_other() -> Result {
    let model = model("byte_level", 1)?;
    for (config, longest) in [
        (layers(), 5),
        (layers().sight(Sight::Causal).pooling(Pooling::LastToken), 5),
        (layers().pooling(Pooling::WeightedMean).pooled(Pooled::Headword).dtype(DType::BF16), 5),
        (layers().template("{headword}{definition}").max_tokens(9), 5),
    ] {
        // Enough of them for several passes.
        let many: Vec<_> = (0..60)
            .flat_map(|at| {
                WORDS.map(|(headword, definition)| (format!("{headword}{at}"), definition))
            })
            .collect();
        let all = Dictionary::compile(&model, &Entries::new(many.clone())?, &config)?;
        assert_eq!((all.len(), all.is_empty(), all.config()), (300, false, &config));
        for index in (0..longest).chain([100, 223, 299]) {
            let (headword, definition) = &many[index];
            let alone = Entries::new([(headword.clone(), *definition)])?;
            let alone = Dictionary::compile(&model, &alone, &config)?;
            assert_eq!(all.headwords()[index], alone.headwords()[0]);
            for layer in LAYERS {
                let (got, expected) = (all.vector(index, layer)?, alone.vector(0, layer)?);
                assert_eq!(bits(&got), bits(&expected), "{headword} {layer}");
            }
        }
    }
    Ok(())
}

/// What the MLP of a layer reads of an entry's tokens, in plain loops over `f64`.
#[test]
fn a_vector_is_what_the_mlp_reads_of_its_tokens() -> Result {
    let model = model("byte_level", 2)?;
    let tokenizer = tokenizer("byte_level")?;
    let reference = Reference::new(&config(&tokenizer), &tiny::weights(&config(&tokenizer), 2)?)?;
    for sight in SIGHTS {
        for (pooled, pooling) in [
            (Pooled::Headword, Pooling::Mean),
            (Pooled::Headword, Pooling::LastToken),
            (Pooled::Entry, Pooling::Mean),
        ] {
            let how = layers().sight(sight).pooled(pooled).pooling(pooling);
            let dictionary = Dictionary::compile(&model, &Entries::new(WORDS)?, &how)?;
            for (index, (headword, definition)) in WORDS.into_iter().enumerate() {
                let ids = tokenizer.encode(&format!("- {headword}: {definition}"), true)?;
                let before = tokenizer.encode("-", true)?.len();
                let until = tokenizer.encode(&format!("- {headword}"), true)?.len();
                let rows = before..if pooled == Pooled::Headword { until } else { ids.len() };
                let mut xs = reference.embed(&ids);
                let positions: Vec<usize> = (0..ids.len()).collect();
                for layer in 0..3 {
                    let name = format!("model.layers.{layer}");
                    let (keys, values) = reference.keys_and_values(&name, &xs, &positions);
                    let sees = |i: usize, j: usize| j <= i || sight == Sight::Bidirectional;
                    let attended = xs.iter().enumerate().map(|(i, x)| {
                        let context =
                            reference.attend(&name, x, i, (&keys, &values), |j| sees(i, j)).context;
                        reference.after_attention(&name, x, &context)
                    });
                    xs = attended.collect();
                    if LAYERS.contains(&layer) {
                        let norm = format!("{name}.post_attention_layernorm.weight");
                        let read: Vec<_> =
                            rows.clone().map(|row| reference.norm(&norm, &xs[row])).collect();
                        let got = dictionary.vector(index, layer)?;
                        for (channel, got) in got.iter().enumerate() {
                            let expected = match pooling {
                                Pooling::LastToken => read[read.len() - 1][channel],
                                _ => {
                                    read.iter().map(|x| x[channel]).sum::<f64>() / read.len() as f64
                                }
                            };
                            let off = (f64::from(*got) - expected).abs();
                            assert!(
                                off < 1e-5,
                                "{headword} {sight:?} {pooled:?}: {got} {expected}"
                            );
                        }
                    }
                    xs = xs.iter().map(|x| reference.after_mlp(&name, x, &[])).collect();
                }
            }
        }
    }
    Ok(())
}

// ---- headwords ----

/// Which words of a text have an entry: those that a token of it is in, with the entry's headword.
fn found(
    dictionary: &Dictionary,
    tokenizer: &Tokenizer,
    text: &str,
    sight: Sight,
) -> Result<Vec<(String, String)>> {
    let ids = tokenizer.encode(text, true)?;
    let mut found: Vec<(String, String)> = Vec::new();
    let mut last = None;
    for (id, entry) in ids.iter().zip(dictionary.find(&ids, sight)) {
        let spelled = tokenizer.decode(&[*id], true).trim().to_string();
        match (entry, last == entry) {
            (Some(_), true) => found.last_mut().ok_or("none")?.0 += &spelled,
            (Some(entry), false) => found.push((spelled, dictionary.headwords()[entry].clone())),
            (None, _) => {}
        }
        last = entry;
    }
    Ok(found)
}

#[test]
fn headwords_are_words_in_texts() -> Result {
    for name in ["byte_level", "sentencepiece", "tekken"] {
        let (model, tokenizer) = match name {
            "sentencepiece" => {
                let bytes = fs::read(fixture("tokenizer/sentencepiece/v3.model"))?;
                let tokenizer = Tokenizer::from_sentencepiece(&bytes)?;
                let transformer = tiny::transformer(&config(&tokenizer), 1)?;
                (HybridModel::new(transformer, Some(tokenizer.clone()))?, tokenizer)
            }
            name => (model(name, 1)?, tokenizer(name)?),
        };
        let dictionary =
            compile(&model, &[("cat", "a"), ("hot dog", "b"), ("dog", "c"), ("Mat", "d")])?;
        for (text, expected) in [
            ("the cat sat", vec!["cat"]),
            ("cat and cat", vec!["cat", "cat"]),
            ("Cat! (cat), cat's \"cat\"\ncat", vec!["cat"; 5]),
            ("cats concat cat1 CAT", vec![]),
            ("a hot dog and a dog", vec!["hot dog", "dog"]),
            ("Hot dog? Hot cat?", vec!["hot dog", "cat"]),
            ("mat and Mat", vec!["Mat"]),
        ] {
            let got = found(&dictionary, &tokenizer, text, Sight::Bidirectional)?;
            let entries: Vec<&str> = got.iter().map(|(_, headword)| headword.as_str()).collect();
            assert_eq!(entries, expected, "{name} {text:?}: {got:?}");
        }
        // Causally, at its last token, and without knowing whether the word goes on.
        let causal = |text: &str| -> Result<Vec<String>> {
            let found = found(&dictionary, &tokenizer, text, Sight::Causal)?;
            Ok(found.into_iter().map(|(_, headword)| headword).collect())
        };
        assert_eq!(causal("a hot dog")?, ["hot dog"], "{name}");
        let ids = tokenizer.encode("a hot dog", true)?;
        let entries = dictionary.find(&ids, Sight::Causal);
        assert_eq!(entries.iter().flatten().count(), 1, "{entries:?}");
        assert_eq!(entries.last(), Some(&Some(1)));
        // What a token knows does not change with what comes after it.
        let ids = tokenizer.encode("the hot dog and cats, cat and a hot", true)?;
        let whole = dictionary.find(&ids, Sight::Causal);
        for end in 0..ids.len() {
            assert_eq!(dictionary.find(&ids[..end], Sight::Causal), whole[..end]);
        }
    }
    Ok(())
}

/// The one that is spelled so, and then the first.
#[test]
fn a_form_of_two_headwords_is_that_of_one() -> Result {
    let (model, tokenizer) = (model("byte_level", 1)?, tokenizer("byte_level")?);
    let dictionary = compile(&model, &[("mat", "a"), ("Mat", "b")])?;
    let found = |text: &str| found(&dictionary, &tokenizer, text, Sight::Bidirectional);
    let first =
        |text: &str| -> Result<String> { Ok(found(text)?.first().ok_or("none")?.1.clone()) };
    assert_eq!((first("a mat")?, first("a Mat")?), ("mat".to_string(), "Mat".to_string()));
    Ok(())
}

// ---- entries ----

#[test]
fn entries_are_read_with_their_lines() -> Result {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("entries.tsv");
    let read = |text: &str| {
        fs::write(&path, text).map_err(candle_core::Error::from)?;
        Entries::from_tsv(&path)
    };
    let entries = read("\u{feff}cat\t a\tb \r\n\n hot dog \tc\ncat\td\n")?;
    assert_eq!(entries, read("cat\ta b\n\nhot dog\tc\ncat\td")?);
    let pairs: Vec<_> = entries.iter().collect();
    assert_eq!(pairs, [("cat", "a b; d"), ("hot dog", "c")]);
    assert_eq!((entries.len(), entries.is_empty()), (2, false));
    for (text, says) in [
        ("", "no entries"),
        ("\n \n", "no entries"),
        ("a\tb\n\nc d\n", "line 3: expected a headword, a tab"),
        ("a\tb\nc\t \n", "line 2: an empty definition of \"c\""),
        ("a\tb\nc\t", "line 2: an empty definition"),
        ("a\tb\n\tc\n", "line 2: an empty headword"),
    ] {
        let error = refused(read(text), says)?;
        assert!(matches!(error, Error::Malformed { .. }), "{error:?}");
    }
    refused(Entries::new([("a", "b"), ("c", "")]), "entry 2: an empty definition")?;
    refused(Entries::new(Vec::<(String, String)>::new()), "at least one")?;
    assert!(matches!(Entries::from_tsv(folder.path().join("none")).err(), Some(Error::Io { .. })));
    fs::write(&path, b"cat\t\xff\n")?;
    assert!(matches!(Entries::from_tsv(&path).err(), Some(Error::Io { .. })));
    Ok(())
}

#[test]
fn what_a_model_has_no_room_for_is_named() -> Result {
    let model = model("byte_level", 1)?;
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("entries.tsv");
    let long = "cat ".repeat(80);
    fs::write(&path, format!("mat\ta\n\n{long}\tb\n"))?;
    let entries = Entries::from_tsv(&path)?;
    let says = "line 3: the headword";
    refused(Dictionary::compile(&model, &entries, &layers()), says)?;
    refused(Dictionary::compile(&model, &entries, &layers().max_tokens(9)), says)?;
    fs::write(&path, format!("mat\ta\ncat\t{long}\n"))?;
    let entries = Entries::from_tsv(&path)?;
    refused(Dictionary::compile(&model, &entries, &layers()), "line 2: 8")?;
    let to = folder.path().join("d.safetensors");
    refused(Dictionary::compile_to(&to, &model, &entries, &layers(), |_, _| ()), "line 2: 8")?;
    assert_eq!(fs::read_dir(folder.path())?.count(), 1, "nothing is left");
    // Cut, it is the entry of what is left.
    let cut = Dictionary::compile(&model, &entries, &layers().max_tokens(6))?;
    let pairs = [("cat", "cat cat cat")];
    assert_eq!(tokenizer("byte_level")?.encode("- cat: cat cat cat", true)?.len(), 6);
    let left = Dictionary::compile(&model, &Entries::new(pairs)?, &layers())?;
    assert_eq!(cut.vector(1, 2)?, left.vector(0, 2)?);
    refused(compile(&model, &[("mat", "a"), ("cat", &long)]), "entry 2: 8")?;
    Ok(())
}

#[test]
fn settings_outside_their_range_are_refused() -> Result {
    let model = model("byte_level", 1)?;
    let entries = Entries::new(WORDS)?;
    for (config, says) in [
        (DictionaryConfig::layers([]), "layers"),
        (DictionaryConfig::layers([1, 3]), "layers"),
        (layers().max_tokens(0), "max_tokens"),
        (layers().template("{headword}"), "template"),
        (layers().template("{definition} {headword}"), "template"),
        (layers().template("{headword} {headword} {definition}"), "template"),
        (layers().dtype(DType::F16), "dtype"),
    ] {
        let error = refused(Dictionary::compile(&model, &entries, &config), says)?;
        assert!(matches!(error, Error::Parameter { .. }), "{error:?}");
    }
    assert_eq!(DictionaryConfig::layers([2, 0, 2]), layers());
    let untokenized = HybridModel::new(tiny::transformer(&tiny::config(), 1)?, None)?;
    let error = Dictionary::compile(&untokenized, &entries, &layers()).err();
    assert!(matches!(error, Some(Error::NoTokenizer { .. })), "{error:?}");
    let dictionary = Dictionary::compile(&model, &entries, &layers())?;
    refused(dictionary.vector(5, 0), "entry")?;
    refused(dictionary.vector(0, 1), "layer")?;
    refused(dictionary.reordered(&[0, 1, 2, 3]), "order")?;
    refused(dictionary.reordered(&[0, 1, 2, 3, 5]), "order")?;
    let other = dictionary.reordered(&[1, 1, 4, 0, 3])?;
    assert_eq!(other.vector(2, 0)?, dictionary.vector(4, 0)?);
    // In another order again, entries have the vectors that those of `other` have.
    let again = other.reordered(&[2, 2, 0, 4, 1])?;
    for (entry, from) in [(0, 4), (2, 1), (3, 3), (4, 1)] {
        assert_eq!(again.vector(entry, 0)?, dictionary.vector(from, 0)?);
    }
    refused(DictionaryConfig::layers(0..usize::MAX).validate(), "at most 4096")?;
    assert_eq!(other.headwords(), dictionary.headwords());
    Ok(())
}

// ---- files ----

fn entries() -> Result<Entries> {
    Ok(Entries::new(
        (0..90).map(|at| (format!("cat{at}"), format!("the {at} that sat on the mat"))),
    )?)
}

fn part(path: &Path) -> std::path::PathBuf {
    path.with_extension("safetensors.part")
}

#[test]
fn a_file_is_the_dictionary_in_memory() -> Result {
    let (model, entries, folder) = (model("byte_level", 1)?, entries()?, tempfile::tempdir()?);
    let path = folder.path().join("d.safetensors");
    for config in [layers(), layers().dtype(DType::BF16)] {
        let held = Dictionary::compile(&model, &entries, &config)?;
        let told = RefCell::new(Vec::new());
        let written = Dictionary::compile_to(&path, &model, &entries, &config, |done, all| {
            told.borrow_mut().push((done, all));
        })?;
        let told = told.into_inner();
        assert_eq!((told.first(), told.last()), (Some(&(0, 90)), Some(&(90, 90))));
        assert!(told.len() > 2 && told.is_sorted(), "{told:?}");
        assert_eq!(fs::read_dir(folder.path())?.count(), 1);
        let opened = Dictionary::open(&path)?;
        let ids = tokenizer("byte_level")?.encode("the cat7 and cat8", true)?;
        for dictionary in [&written, &opened] {
            assert_eq!(dictionary.headwords(), held.headwords());
            assert_eq!(dictionary.config(), held.config());
            assert_eq!(dictionary.find(&ids, SIGHTS[1]), held.find(&ids, SIGHTS[1]));
            for entry in 0..90 {
                assert_eq!(dictionary.vector(entry, 2)?, held.vector(entry, 2)?);
            }
        }
        // The types differ by one rounding.
        let exact = Dictionary::compile(&model, &entries, &layers())?.vector(7, 0)?;
        for (got, exact) in held.vector(7, 0)?.iter().zip(exact) {
            let expected = match config == layers() {
                true => exact,
                false => half::bf16::from_f32(exact).to_f32(),
            };
            assert_eq!(got.to_bits(), expected.to_bits());
        }
        // Anything that reads safetensors reads it.
        let tensors = candle_core::safetensors::load(&path, &candle_core::Device::Cpu)?;
        assert_eq!(tensors["vectors"].dims(), [90, 2, 16]);
        assert_eq!(tensors["borders"].dims(), [342]);
    }
    Ok(())
}

#[test]
fn a_run_that_was_stopped_goes_on() -> Result {
    let (model, entries, folder) = (model("byte_level", 1)?, entries()?, tempfile::tempdir()?);
    let path = folder.path().join("d.safetensors");
    let run = |entries: &Entries| -> Result<(usize, Vec<u8>)> {
        let from = RefCell::new(None);
        Dictionary::compile_to(&path, &model, entries, &layers(), |done, _| {
            from.borrow_mut().get_or_insert(done);
        })?;
        assert!(!part(&path).exists());
        Ok((from.into_inner().ok_or("not told")?, fs::read(&path)?))
    };
    let (from, whole) = run(&entries)?;
    assert_eq!(from, 0);
    let each = 2 * 16 * 4;
    let head = whole.len() - 90 * each;
    for (length, expected) in [
        (0, 0),
        (head / 2, 0),
        (head, 0),
        (head + each - 1, 0),
        (head + each, 1),
        (head + 40 * each + 5, 40),
        (whole.len(), 90),
    ] {
        fs::remove_file(&path)?;
        fs::write(part(&path), &whole[..length])?;
        assert_eq!(run(&entries)?, (expected, whole.clone()), "{length}");
    }
    // Stopped in the middle, whatever that was; what is there meanwhile is no dictionary.
    fs::remove_file(&path)?;
    let stopped = catch_unwind(AssertUnwindSafe(|| {
        Dictionary::compile_to(&path, &model, &entries, &layers(), |done, _| assert!(done == 0))
    }));
    assert!(stopped.is_err() && part(&path).exists() && !path.exists());
    refused(Dictionary::open(&path), "a part of it")?;
    let (from, bytes) = run(&entries)?;
    assert!(from > 0 && from < 90 && bytes == whole, "{from}");
    // Other entries are another dictionary.
    fs::write(part(&path), &whole[..head + 40 * each])?;
    let (from, _) = run(&Entries::new(WORDS)?)?;
    assert_eq!((from, Dictionary::open(&path)?.len()), (0, 5));
    Ok(())
}

#[test]
fn two_runs_do_not_write_one_file() -> Result {
    let (model, folder) = (model("byte_level", 1)?, tempfile::tempdir()?);
    let path = folder.path().join("d.safetensors");
    let run = || Dictionary::compile_to(&path, &model, &Entries::new(WORDS)?, &layers(), |_, _| ());
    let other = fs::File::create(part(&path))?;
    other.lock()?;
    refused(run(), "nothing else compiles")?;
    drop(other);
    assert_eq!(run()?.len(), 5);
    let nowhere = folder.path().join("none").join("d.safetensors");
    let error =
        Dictionary::compile_to(nowhere, &model, &Entries::new(WORDS)?, &layers(), |_, _| ());
    assert!(matches!(error.err(), Some(Error::Io { .. })));
    Ok(())
}

#[test]
fn a_file_that_is_not_whole_is_no_dictionary() -> Result {
    let (model, folder) = (model("byte_level", 1)?, tempfile::tempdir()?);
    let path = folder.path().join("d.safetensors");
    Dictionary::compile_to(&path, &model, &Entries::new(WORDS)?, &layers(), |_, _| ())?;
    let whole = fs::read(&path)?;
    for length in (0..whole.len()).step_by(37).chain([whole.len() - 1]) {
        fs::write(&path, &whole[..length])?;
        let error = Dictionary::open(&path).err().ok_or(format!("opened: {length}"))?;
        assert!(matches!(error, Error::Malformed { .. } | Error::Io { .. }), "{error:?}");
    }
    fs::write(&path, [whole.as_slice(), b"more"].concat())?;
    refused(Dictionary::open(&path), "promises")?;
    candle_core::safetensors::save(&tiny::weights(&tiny::config(), 1)?, &path)?;
    refused(Dictionary::open(&path), "no dictionary")?;
    assert!(matches!(Dictionary::open(folder.path().join("none")).err(), Some(Error::Io { .. })));

    // Text of the header, replaced by as much of another.
    for (from, to, says) in [
        ("format\\\":1", "format\\\":7", "format 7"),
        ("\\\"layers\\\":[0,2]", "\\\"layers\\\":[2,0]", "layers"),
        ("\\\"layers\\\":[0,2]", "\\\"layers\\\":[0]  ", "vectors"),
        ("\\\"cat\\\",", "        ", "vectors"),
        ("vectors\":", "Vectors\":", "no tensor vectors"),
        ("\"dtype\":\"U32\"", "\"dtype\":\"I32\"", "expected"),
        ("\\\"sight\\\"", "\\\"sigth\\\"", "sigth"),
    ] {
        assert_eq!(from.len(), to.len());
        let at = whole.windows(from.len()).position(|it| it == from.as_bytes());
        let at = at.ok_or(format!("no {from}"))?;
        let bent = [&whole[..at], to.as_bytes(), &whole[at + from.len()..]].concat();
        fs::write(&path, bent)?;
        let error = refused(Dictionary::open(&path), says)?;
        assert!(matches!(error, Error::Malformed { .. }), "{error:?}");
    }
    // Vectors of nothing that a model makes.
    let nan = f32::NAN.to_le_bytes();
    let bent = [&whole[..whole.len() - 4], &nan].concat();
    fs::write(&path, bent)?;
    let dictionary = Dictionary::open(&path)?;
    dictionary.vector(4, 0)?;
    let error = dictionary.vector(4, 2).err();
    assert!(matches!(error, Some(Error::NotFinite { position: 4, .. })), "{error:?}");
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Whatever becomes of a file's bytes, it is a dictionary or an error.
    #[test]
    fn no_change_of_a_file_makes_it_panic(changes in prop::collection::vec((0usize..100_000, any::<u8>()), 1..6)) {
        static WHOLE: OnceLock<Vec<u8>> = OnceLock::new();
        let run = || -> Result {
            let folder = tempfile::tempdir()?;
            let path = folder.path().join("d.safetensors");
            let mut bytes = match WHOLE.get() {
                Some(whole) => whole.clone(),
                None => {
                    let (model, entries) = (model("byte_level", 1)?, Entries::new(WORDS)?);
                    Dictionary::compile_to(&path, &model, &entries, &layers(), |_, _| ())?;
                    WHOLE.get_or_init(|| fs::read(&path).unwrap_or_default()).clone()
                }
            };
            for (at, byte) in &changes {
                let at = at % bytes.len();
                bytes[at] = *byte;
            }
            fs::write(&path, bytes)?;
            if let Ok(dictionary) = Dictionary::open(&path) {
                let ids: Vec<u32> = (0..339).collect();
                assert_eq!(dictionary.find(&ids, Sight::Bidirectional).len(), ids.len());
                for entry in 0..dictionary.len() {
                    dictionary.vector(entry, 2).ok();
                }
            }
            Ok(())
        };
        tiny::holds(run())?;
    }
}
