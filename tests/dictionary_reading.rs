//! Reading a dictionary: nothing where nothing is read, `W c + U d` where it is, and the same on every way.

mod common;

use candle_core::quantized::GgmlDType;
use candle_core::{DType, Device, Tensor};
use hybrid_attention::dictionary::{Dictionary, DictionaryAdapter, DictionaryConfig, Entries};
use hybrid_attention::generate::Candidates;
use hybrid_attention::memory::{Memory, Volatile};
use hybrid_attention::model::{
    Batch, ForwardContext, Linear, Pass, SideProjection, SideSignal, Sight, Transformer,
};
use hybrid_attention::refine::Interpolate;
use hybrid_attention::statistics::states;
use hybrid_attention::thought::EncodedBatch;
use hybrid_attention::{
    Adapter, AdapterConfig, AdapterScope, Answer, Config, EmbedConfig, Error, Experts,
    GenerationConfig, HandOff, HybridModel, Prompt, Thinking, Tokenizer, WeightType,
};

use common::gradient::{loss, scalar};
use common::{Result, assert_close, assert_identical, fixture};
use common::{kept, tiny};

const KEPT: [WeightType; 3] = [
    WeightType::Dense(DType::F32),
    WeightType::Dense(DType::BF16),
    WeightType::Quantized(GgmlDType::Q8_0),
];

const SCOPES: [AdapterScope; 3] =
    [AdapterScope::Thinking, AdapterScope::Decoding, AdapterScope::Both];

const LAYERS: [usize; 2] = [0, 2];

/// Of one token, of several, and of both in part.
const WORDS: [(&str, &str); 4] = [
    ("cat", "what sat on the mat and thought about the world"),
    ("hello world", "what the cat thought there"),
    ("world", "the mat and what sat on the mat"),
    ("café", "hello hello hello"),
];

const TEXT: &str = "the cat sat on the mat and thought about hello world, café and the world";
/// A text in which no headword stands.
const OTHER: &str = "the dog sat on the mat and thought about 123 and what sat there, hello";

fn config() -> Config {
    Config {
        vocab_size: 339,
        hidden_size: 32,
        intermediate_size: 64,
        head_dim: 8,
        ..tiny::config()
    }
}

fn tokenizer() -> Result<Tokenizer> {
    let tokenizer = Tokenizer::from_folder(&fixture("tokenizer").join("byte_level"))?;
    Ok(tokenizer.ok_or("no tokenizer")?)
}

fn model(kept: WeightType, seed: u64) -> Result<HybridModel> {
    Ok(HybridModel::new(kept::transformer(&config(), kept, seed)?, Some(tokenizer()?))?)
}

fn dictionary(model: &HybridModel) -> hybrid_attention::Result<Dictionary> {
    let (entries, config) = (Entries::new(WORDS)?, DictionaryConfig::layers(LAYERS));
    Dictionary::compile(model, &entries, &config)
}

fn untrained(dictionary: &Dictionary) -> hybrid_attention::Result<DictionaryAdapter> {
    DictionaryAdapter::new(&config(), dictionary.config(), 4, 7, &Device::Cpu)
}

/// As after training, and no longer in it: what tracks a gradient is computed in another way.
fn trained(dictionary: &Dictionary) -> hybrid_attention::Result<DictionaryAdapter> {
    let adapter = untrained(dictionary)?.trainable()?;
    for (seed, variable) in (20..).zip(adapter.variables()?) {
        let noise = tiny::noise(seed, variable.dims(), 0.4);
        variable.set(&noise.map_err(|error| Error::Candle(candle_core::Error::msg(error)))?)?;
    }
    let folder = tempfile::tempdir().map_err(candle_core::Error::from)?;
    adapter.save(folder.path().join("a"))?;
    DictionaryAdapter::open(folder.path().join("a"), &Device::Cpu)
}

/// The model without a dictionary. Where only one of thinking and decoding reads one, keys and values are handed off
/// layer by layer, which rounds differently: so an adapter that does nothing does too.
fn without(base: &HybridModel, scope: AdapterScope) -> hybrid_attention::Result<HybridModel> {
    let nothing = Adapter::new(&config(), &AdapterConfig::rank(1), 1, &Device::Cpu)?;
    base.with_adapter(&nothing, scope)
}

/// With vectors for rows of no entry.
fn generic(adapter: DictionaryAdapter) -> Result<DictionaryAdapter> {
    LAYERS.iter().try_fold(adapter, |adapter, layer| {
        Ok(adapter.with_generic(*layer, &tiny::noise(50 + *layer as u64, &[32], 1.0)?)?)
    })
}

fn ids(text: &str) -> Result<Vec<u32>> {
    Ok(tokenizer()?.encode(text, true)?)
}

fn bits(answer: &Answer) -> (Vec<u32>, Vec<u32>) {
    (answer.ids.clone(), answer.logprobs.iter().map(|it| it.to_bits()).collect())
}

fn refused<T>(result: hybrid_attention::Result<T>, says: &str) -> Result {
    let error = result.err().ok_or(format!("accepted: {says}"))?;
    assert!(error.to_string().contains(says), "{error} says nothing of {says:?}");
    Ok(())
}

/// All layers over a text of the batch, whose ids it has.
fn run(model: &Transformer, batch: &Batch, sight: Sight) -> Result<Tensor> {
    let ids: Vec<u32> =
        (0..batch.sequences()).flat_map(|it| batch.ids(it).unwrap_or(&[])).copied().collect();
    let pass = Pass::uncached(batch, sight);
    Ok(model.forward(&model.embed_ids(&ids)?, model.all_layers(), pass)?)
}

fn one(ids: &[u32]) -> Result<Batch> {
    Ok(Batch::one(ids.len())?.with_ids(ids)?)
}

/// Ways to think, by name; the last changes no thought.
fn ways() -> [(&'static str, Thinking); 6] {
    let two = || Thinking::new(2).refine(Interpolate::new(0.3));
    [
        ("none", Thinking::none()),
        ("refined", two()),
        ("of a span", two().span(1..3)),
        ("keys and values", two().hand_off(HandOff::KeyValue)),
        ("mixed", two().span(0..2).hand_off(HandOff::Mixed { weight: 0.4 })),
        ("again", two().rethink_every(2)),
    ]
}

fn generation(thinking: &Thinking) -> GenerationConfig {
    GenerationConfig::default().thinking(thinking.clone()).max_tokens(5)
}

// ---- nothing ----

#[test]
fn what_was_not_trained_changes_no_bit() -> Result {
    for kept in KEPT {
        let base = model(kept, 1)?;
        let dictionary = dictionary(&base)?;
        for (scope, adapter) in SCOPES.into_iter().zip([
            untrained(&dictionary)?,
            generic(untrained(&dictionary)?)?,
            untrained(&dictionary)?,
        ]) {
            let reading = base.with_dictionary(&dictionary, &adapter, scope)?;
            let without = without(&base, scope)?;
            for (name, thinking) in ways() {
                let config = generation(&thinking);
                let handed = matches!(name, "keys and values" | "mixed");
                let of = if handed { &without } else { &base };
                let expected = bits(&of.generate(TEXT, &config)?);
                assert_eq!(bits(&reading.generate(TEXT, &config)?), expected, "{kept:?} {name}");
                let thoughts = |of: &HybridModel| Ok::<_, Error>(of.think(TEXT, &config)?.z);
                assert_identical(name, &thoughts(&reading)?, &thoughts(&base)?)?;
            }
            for sight in [Sight::Causal, Sight::Bidirectional] {
                let config = EmbedConfig::default().sight(sight);
                let (got, expected) =
                    (reading.embed(&[TEXT], &config)?, base.embed(&[TEXT], &config)?);
                assert_identical("vectors", &got, &expected)?;
            }
        }
    }
    Ok(())
}

/// Where nothing stands in a headword, nothing is read, whatever was trained.
#[test]
fn a_text_without_headwords_is_what_it_was() -> Result {
    let base = model(KEPT[0], 2)?;
    let dictionary = dictionary(&base)?;
    let adapter = trained(&dictionary)?;
    for scope in SCOPES {
        let reading = base.with_dictionary(&dictionary, &adapter, scope)?;
        let base = without(&base, scope)?;
        for (name, thinking) in ways() {
            // What it says itself may be a headword.
            let config = generation(&thinking).max_tokens(1);
            let expected = bits(&base.generate(OTHER, &config)?);
            assert_eq!(bits(&reading.generate(OTHER, &config)?), expected, "{name}");
            let read =
                reading.generate(TEXT, &config)?.logprobs != base.generate(TEXT, &config)?.logprobs;
            assert!(
                read || (thinking.is_none() && scope == AdapterScope::Thinking),
                "{name} {scope:?}"
            );
        }
    }
    // But a vector for such rows is read by all of them.
    let reading = base.with_dictionary(&dictionary, &generic(trained(&dictionary)?)?, SCOPES[2])?;
    let (got, expected) = (
        states(reading.transformer(), &ids(OTHER)?, 1)?,
        states(base.transformer(), &ids(OTHER)?, 1)?,
    );
    let off = (got - expected)?.abs()?.min(1)?.max_all()?.to_scalar::<f32>()?;
    assert!(off > 0.0, "{off}");
    Ok(())
}

// ---- something ----

/// As with `U = B A` multiplied out, over the vectors themselves, put into a signal by hand.
#[test]
fn gate_and_up_read_w_c_and_u_d() -> Result {
    for kept in KEPT {
        let base = model(kept, 3)?;
        let dictionary = dictionary(&base)?;
        for adapter in [trained(&dictionary)?, generic(trained(&dictionary)?)?] {
            let reading = base.with_dictionary(&dictionary, &adapter, AdapterScope::Both)?;
            let tensor = |layer: usize, half: &str| {
                let name = format!("model.layers.{layer}.mlp.dictionary.{half}");
                adapter.tensors().find(|(it, _)| *it == name).map(|(_, it)| it.detach())
            };
            for sight in [Sight::Causal, Sight::Bidirectional] {
                let ids = ids(TEXT)?;
                let rows = dictionary.find(&ids, sight);
                assert!(rows.iter().flatten().count() > 3, "{rows:?}");
                let (mut by_hand, mut signal) =
                    (base.transformer().with_side(0, None)?, SideSignal::new());
                for layer in LAYERS {
                    let a = tensor(layer, "A").ok_or("no A")?;
                    let u = |half: &str| -> Result<Linear> {
                        Ok(Linear::dense(&tensor(layer, half).ok_or("no B")?.matmul(&a)?)?)
                    };
                    let side = SideProjection { gate: u("gate.B")?, up: u("up.B")? };
                    by_hand = by_hand.with_side(layer, Some(side))?;
                    let none = match tensor(layer, "generic") {
                        Some(generic) => generic.to_vec1::<f32>()?,
                        None => vec![0.0; 32],
                    };
                    let d = rows.iter().map(|entry| match entry {
                        Some(entry) => dictionary.vector(*entry, layer),
                        None => Ok(none.clone()),
                    });
                    let d = d.collect::<hybrid_attention::Result<Vec<_>>>()?;
                    signal = signal.layer(layer, Tensor::new(d, &Device::Cpu)?);
                }
                let batch = one(&ids)?;
                let xs = by_hand.embed_ids(&ids)?;
                let context = ForwardContext::from(Pass::uncached(&batch, sight)).side(&signal);
                let expected = by_hand.forward(&xs, by_hand.all_layers(), context)?;
                let got = run(reading.transformer(), &batch, sight)?;
                assert_close(&format!("{kept:?} {sight:?}"), &got, &expected, 2e-5)?;
            }
        }
    }
    Ok(())
}

/// Other vectors of an entry move the rows that stand in its headword and, causally, what comes after them.
#[test]
fn an_entry_moves_what_sees_it() -> Result {
    let base = model(KEPT[0], 4)?;
    let dictionary = dictionary(&base)?;
    let adapter = trained(&dictionary)?;
    let reading = |of: &Dictionary| base.with_dictionary(of, &adapter, AdapterScope::Both);
    // Those of "cat" and "café" change places.
    let (own, other) = (reading(&dictionary)?, reading(&dictionary.reordered(&[3, 1, 2, 0])?)?);
    let text = ids("the mat and hello world, the cat sat on the mat")?;
    let at = dictionary
        .find(&text, Sight::Causal)
        .iter()
        .position(|it| *it == Some(0))
        .ok_or("no cat")?;
    let changed = |layers: usize, sight: Sight| -> Result<Vec<bool>> {
        let batch = one(&text)?;
        let of = |model: &HybridModel| -> Result<Tensor> {
            let model = model.transformer();
            let pass = Pass::uncached(&batch, sight);
            Ok(model.forward(&model.embed_ids(&text)?, 0..layers, pass)?)
        };
        let off = (of(&own)? - of(&other)?)?.abs()?.max(1)?.to_vec1::<f32>()?;
        Ok(off.into_iter().map(|off| off > 0.0).collect())
    };
    let only: Vec<bool> = (0..text.len()).map(|row| row == at).collect();
    let from: Vec<bool> = (0..text.len()).map(|row| row >= at).collect();
    assert_eq!(changed(1, Sight::Causal)?, only);
    assert_eq!(changed(3, Sight::Causal)?, from);
    assert_eq!(changed(1, Sight::Bidirectional)?, only);
    assert_eq!(changed(3, Sight::Bidirectional)?, vec![true; text.len()]);
    Ok(())
}

/// Central differences of every tensor of an adapter, along its gradient and in random directions.
#[test]
fn gradients_reach_all_of_an_adapter() -> Result {
    const STEP: f64 = 1e-2;
    for kept in KEPT {
        let base = model(kept, 5)?;
        let dictionary = dictionary(&base)?;
        let adapter = generic(trained(&dictionary)?)?.trainable()?;
        let model = base.with_dictionary(&dictionary, &adapter, AdapterScope::Both)?;
        let lengths = [ids(TEXT)?.len(), ids(OTHER)?.len()];
        let batch = Batch::ragged(&lengths)?.with_ids(&[ids(TEXT)?, ids(OTHER)?].concat())?;
        for sight in [Sight::Causal, Sight::Bidirectional] {
            let of = || -> Result<Tensor> { loss(&run(model.transformer(), &batch, sight)?) };
            let gradients = of()?.backward()?;
            let names: Vec<String> = adapter.tensors().map(|(name, _)| name).collect();
            let variables = adapter.variables()?;
            assert_eq!((names.len(), variables.len()), (8, 8));
            for (name, variable) in names.iter().zip(variables) {
                let gradient = gradients.get(&variable).ok_or(format!("{name}: no gradient"))?;
                let norm = scalar(&gradient.sqr()?)?.sqrt();
                assert!(norm > 1e-3, "{name}: {norm}");
                let was = variable.as_detached_tensor().copy()?;
                let random =
                    |seed| tiny::noise(seed, was.dims(), 1.0 / (was.elem_count() as f32).sqrt());
                for direction in [(gradient / norm)?, random(1)?, random(2)?] {
                    let at = |step: f64| -> Result<f64> {
                        variable.set(&(&was + (&direction * step)?)?)?;
                        Ok(f64::from(of()?.to_scalar::<f32>()?))
                    };
                    let slope = (at(STEP)? - at(-STEP)?) / (2.0 * STEP);
                    let expected = scalar(&(gradient * &direction)?)?;
                    let off = (slope - expected).abs() / norm;
                    assert!(
                        off < 0.01,
                        "{name} {kept:?} {sight:?}: slope {slope}, gradient {expected}"
                    );
                }
                variable.set(&was)?;
            }
        }
    }
    Ok(())
}

// ---- on every way ----

/// Token by token over a cache, in pieces, side by side, or whole: the same.
#[test]
fn cached_decoding_is_full_recomputation() -> Result {
    let base = model(KEPT[0], 6)?;
    let dictionary = dictionary(&base)?;
    let adapter = generic(trained(&dictionary)?)?;
    let reading = base.with_dictionary(&dictionary, &adapter, AdapterScope::Decoding)?;
    let (model, ids) = (reading.transformer(), ids(TEXT)?);
    let whole = run(model, &one(&ids)?, Sight::Causal)?;
    for step in [1, 2, 3, 5, 7] {
        let (mut cache, mut at) = (model.new_cache(64)?, 0);
        while at < ids.len() {
            let end = ids.len().min(at + step);
            let batch = one(&ids[at..end])?.following(0, &ids[..at])?;
            let xs = model.embed_ids(&ids[at..end])?;
            let pass =
                Pass::Remembered { batch: &batch, sight: Sight::Causal, caches: vec![&mut cache] };
            let got = model.forward(&xs, model.all_layers(), pass)?;
            let expected = whole.narrow(0, at, end - at)?;
            assert_close(&format!("{at}..{end}"), &got, &expected, 2e-5)?;
            at = end;
        }
    }
    // A packed batch is its sequences one by one, to the last bit.
    let other = self::ids(OTHER)?;
    let others = [ids.repeat(2), [other, ids.clone()].concat(), [&ids[3..], &ids].concat()];
    let lengths: Vec<usize> = others.iter().map(Vec::len).collect();
    let batch = Batch::ragged(&lengths)?.with_ids(&others.concat())?;
    for sight in [Sight::Causal, Sight::Bidirectional] {
        let packed = run(model, &batch, sight)?;
        for (ids, rows) in others.iter().zip(batch.all_rows()) {
            assert!(rows.len() > 16, "as many rows as make products round alike: {}", rows.len());
            let alone = run(model, &one(ids)?, sight)?;
            assert_identical("packed", &packed.narrow(0, rows.start, rows.len())?, &alone)?;
        }
    }
    Ok(())
}

/// The log-probabilities that one causal pass over prompt and answer gives to the answer's tokens.
fn by_one_pass(model: &HybridModel, answer: &Answer) -> Result<Vec<f32>> {
    let all = [answer.prompt_ids.as_slice(), &answer.ids].concat();
    let transformer = model.transformer();
    let logits = transformer.logits(&run(transformer, &one(&all)?, Sight::Causal)?)?;
    let logprobs = candle_nn::ops::log_softmax(&logits, 1)?.to_vec2::<f32>()?;
    let first = answer.prompt_ids.len() - 1;
    Ok(answer.ids.iter().zip(&logprobs[first..]).map(|(id, row)| row[*id as usize]).collect())
}

/// Whatever is generated, in whatever way, is what the model says when it reads all of it at once.
#[test]
fn every_way_to_answer_looks_up_the_same() -> Result {
    for seed in 0..4 {
        let base = model(KEPT[0], 30 + seed)?;
        let dictionary = dictionary(&base)?;
        let reading =
            base.with_dictionary(&dictionary, &trained(&dictionary)?, AdapterScope::Decoding)?;
        let same = |what: &str, answer: &Answer| -> Result {
            let (got, expected) = (answer.logprobs.clone(), by_one_pass(&reading, answer)?);
            for (got, expected) in got.iter().zip(&expected) {
                assert!((got - expected).abs() < 2e-4, "{what}: {got} {expected}");
            }
            Ok(())
        };
        let hot = GenerationConfig::default().temperature(1.0).seed(seed).max_tokens(12);
        let alone = reading.generate(TEXT, &hot)?;
        same("generate", &alone)?;

        // A headword may be begun by the prompt and ended by the answer.
        let starts = [TEXT, "the mat and hello", "caf", OTHER];
        for (index, answer) in reading.generate_many(starts, &hot)? {
            let (answer, expected) = (answer?, reading.generate(starts[index], &hot)?);
            assert_eq!(bits(&answer), bits(&expected));
            same("many", &answer)?;
        }
        let raced =
            reading.generate(TEXT, &hot.clone().candidates(Candidates::samples(3).keep_all()))?;
        same("candidates", &raced)?;
        assert!(alone.ids.starts_with(&raced.candidates[0].ids));

        // What a conversation holds is not run again, and still stands before what is.
        let mut conversation = reading.conversation(256)?;
        for prompt in ["the cat sat on hello", "the cat sat on hello world, and the cat"] {
            let answer = reading.stream_in(&mut conversation, prompt, &hot)?.collect_answer()?;
            same("conversation", &answer)?;
        }
        let nothing = Interpolate::new(0.0);
        for every in [1, 3] {
            for span in [0..3, 1..3] {
                let again =
                    Thinking::new(1).span(span).refine(nothing.clone()).rethink_every(every);
                same("again", &reading.generate(TEXT, &hot.clone().thinking(again))?)?;
            }
        }
        let mixed = Thinking::new(1).span(0..2).hand_off(HandOff::Mixed { weight: 0.0 });
        same("mixed", &reading.generate(TEXT, &hot.clone().thinking(mixed))?)?;

        let mind = Thinking::none().on(reading.thought_model())?;
        let document = mind.read_document(&ids("the cat sat on hello")?, 0, DType::F32)?;
        let prompt = Prompt::default().document(&document).plain(" world and the cat");
        same("document", &reading.generate(prompt, &hot)?)?;
    }
    Ok(())
}

/// What is handed off through caches is what is handed off without any.
#[test]
fn thoughts_are_handed_off_alike_with_and_without_a_cache() -> Result {
    let base = model(KEPT[0], 8)?;
    let dictionary = dictionary(&base)?;
    let ids = ids(TEXT)?;
    for scope in SCOPES {
        let reading = base.with_dictionary(&dictionary, &trained(&dictionary)?, scope)?;
        for (name, thinking) in ways() {
            let mind = thinking.on(reading.thought_model())?;
            let decoder = reading.transformer();
            let batch = Batch::one(ids.len())?.with_context(0, &[2..9, 10..ids.len() - 1])?;
            let text = EncodedBatch::new(decoder, &ids, batch)?;
            let z = mind.encode(&text, Pass::Causal(text.batch()))?;
            let thoughts = mind.think(&text, z, |_, _| ())?;
            let expected = mind.hand_off(&text, &thoughts, Pass::Causal(text.batch()))?;
            let mut cache = decoder.new_cache(64)?;
            mind.encode(&text, Pass::Cached(&mut cache))?;
            let got = mind.hand_off(&text, &thoughts, Pass::Cached(&mut cache))?;
            assert_close(&format!("{name} {scope:?}"), &got, &expected, 2e-5)?;
        }
    }
    Ok(())
}

/// What does not think is left out of a pass, and leaves the others their tokens.
#[test]
fn a_pass_without_its_tail_looks_up_the_same() -> Result {
    let base = model(KEPT[0], 16)?;
    let dictionary = dictionary(&base)?;
    let reading = base.with_dictionary(&dictionary, &trained(&dictionary)?, AdapterScope::Both)?;
    let texts = [ids(TEXT)?, ids(OTHER)?, ids(TEXT)?];
    let lengths: Vec<usize> = texts.iter().map(Vec::len).collect();
    let mut batch = Batch::ragged(&lengths)?;
    for (sequence, segments) in [vec![1..4, 6..12], vec![], vec![0..8]].iter().enumerate() {
        batch = batch.with_context(sequence, segments)?;
    }
    let text = EncodedBatch::new(reading.transformer(), &texts.concat(), batch)?;
    let thinking = Thinking::new(1).refine(Interpolate::new(1.0));
    let mind = thinking.on(reading.thought_model())?;
    let first = text.embeddings().clone();
    let got = mind.think(&text, first.clone(), |_, _| ())?.z;
    let whole = mind.think_once(&first, text.batch())?;
    for row in text.batch().segments().flatten() {
        assert_close(&row.to_string(), &got.narrow(0, row, 1)?, &whole.narrow(0, row, 1)?, 2e-5)?;
    }
    Ok(())
}

/// Thought passes look up where the scope says so, and what is read causally where it says that.
#[test]
fn a_scope_says_where_it_is_read() -> Result {
    let base = model(KEPT[0], 9)?;
    let dictionary = dictionary(&base)?;
    let config = generation(&Thinking::new(1).refine(Interpolate::new(0.5)));
    let plain = generation(&Thinking::none());
    for (scope, thinks, decodes) in
        [(SCOPES[0], true, false), (SCOPES[1], false, true), (SCOPES[2], true, true)]
    {
        let reading = base.with_dictionary(&dictionary, &trained(&dictionary)?, scope)?;
        let z = |of: &HybridModel| {
            Ok::<_, Error>(of.think(TEXT, &config)?.z.flatten_all()?.to_vec1::<f32>()?)
        };
        assert_eq!(z(&reading)? != z(&base)?, thinks);
        let said = |of: &HybridModel| Ok::<_, Error>(bits(&of.generate(TEXT, &plain)?));
        assert_eq!(said(&reading)? != said(&base)?, decodes);
        let vectors = |of: &HybridModel, sight| -> Result<Vec<Vec<f32>>> {
            Ok(of.embed(&[TEXT], &EmbedConfig::default().sight(sight))?.to_vec2()?)
        };
        let differs = |sight| {
            Ok::<_, Box<dyn std::error::Error>>(vectors(&reading, sight)? != vectors(&base, sight)?)
        };
        assert_eq!((differs(Sight::Bidirectional)?, differs(Sight::Causal)?), (thinks, decodes));
    }
    Ok(())
}

#[test]
fn threads_share_a_dictionary() -> Result {
    let base = model(KEPT[0], 10)?;
    let (folder, config) = (tempfile::tempdir()?, DictionaryConfig::layers(LAYERS));
    let path = folder.path().join("d.safetensors");
    let dictionary =
        Dictionary::compile_to(&path, &base, &Entries::new(WORDS)?, &config, |_, _| ())?;
    let reading = base.with_dictionary(&dictionary, &trained(&dictionary)?, AdapterScope::Both)?;
    let config = generation(&Thinking::new(2));
    let expected = bits(&reading.generate(TEXT, &config)?);
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..2)
            .map(|_| {
                let (reading, config) = (reading.clone(), config.clone());
                scope.spawn(move || {
                    (0..5).map(|_| reading.generate(TEXT, &config)).collect::<Vec<_>>()
                })
            })
            .collect();
        for thread in threads {
            for answer in thread.join().map_err(|_| "panicked")? {
                assert_eq!(bits(&answer?), expected);
            }
        }
        Ok(())
    })
}

// ---- what is refused ----

/// Passes by hand have to say which tokens they are of; none is run without what it should read.
#[test]
fn a_pass_without_ids_is_refused() -> Result {
    let base = model(KEPT[0], 11)?;
    let dictionary = dictionary(&base)?;
    let reading = base.with_dictionary(&dictionary, &trained(&dictionary)?, AdapterScope::Both)?;
    let (model, ids) = (reading.transformer(), ids(TEXT)?);
    assert!(model.has_side_source() && !base.transformer().has_side_source());
    let (xs, batch) = (model.embed_ids(&ids)?, Batch::one(ids.len())?);
    let mut cache = model.new_cache(64)?;
    refused(model.forward(&xs, 0..3, Pass::Cached(&mut cache)), "with_ids")?;
    refused(model.forward(&xs, 0..3, Pass::Causal(&batch)), "with_ids")?;
    refused(model.forward(&xs, 2..3, Pass::Bidirectional(&batch)), "with_ids")?;
    assert_eq!(cache.len(), 0);
    let mind = Thinking::new(1).on(reading.thought_model())?;
    refused(mind.think_once(&xs, &batch), "with_ids")?;
    // A layer that reads none needs none.
    let (got, expected) = (
        model.forward(&xs, 1..2, Pass::Causal(&batch))?,
        base.transformer().forward(&xs, 1..2, Pass::Causal(&batch))?,
    );
    assert_identical("1..2", &got, &expected)?;
    // Nor does it take a signal beside its own.
    let (own, signal) =
        (one(&ids)?, SideSignal::new().layer(0, tiny::noise(1, &[ids.len(), 4], 1.0)?));
    let context = ForwardContext::from(Pass::Causal(&own)).side(&signal);
    refused(model.forward(&xs, 0..3, context), "side signal")?;
    refused(batch.clone().with_ids(&ids[1..]), "ids")?;
    refused(batch.following(0, &[1]), "ids")?;
    refused(own.following(1, &[1]), "sequence")
}

/// What a cache holds may end in the middle of a headword.
#[test]
fn a_pass_behind_tokens_that_it_does_not_know_is_refused() -> Result {
    let base = model(KEPT[0], 1)?;
    let dictionary = dictionary(&base)?;
    let reading = base.with_dictionary(&dictionary, &trained(&dictionary)?, AdapterScope::Both)?;
    let (transformer, ids) = (reading.transformer(), ids(TEXT)?);
    let (first, second) = ids.split_at(ids.len() / 2);
    let mut cache = transformer.new_cache(64)?;
    let mut run = |ids: &[u32], batch: Batch| -> hybrid_attention::Result<Tensor> {
        let (sight, caches) = (Sight::Causal, vec![&mut cache]);
        let pass = Pass::Remembered { batch: &batch, sight, caches };
        transformer.forward(&transformer.embed_ids(ids)?, transformer.all_layers(), pass)
    };
    run(first, one(first)?)?;
    refused(run(second, one(second)?), "the ids of the")?;
    refused(run(second, one(second)?.following(0, &first[1..])?), "the ids of the")?;
    run(second, one(second)?.following(0, first)?)?;
    Ok(())
}

#[test]
fn attention_is_laid_open_beside_a_dictionary() -> Result {
    let base = model(KEPT[0], 1)?;
    let dictionary = dictionary(&base)?;
    let reading = base.with_dictionary(&dictionary, &trained(&dictionary)?, AdapterScope::Both)?;
    for sight in [Sight::Causal, Sight::Bidirectional] {
        let before = base.attention_steps(TEXT, sight, 2, 1)?;
        let after = reading.attention_steps(TEXT, sight, 2, 1)?;
        assert_eq!(before.before.dims(), after.before.dims());
        assert!(before.before.to_vec2::<f32>()? != after.before.to_vec2::<f32>()?);
    }
    Ok(())
}

#[test]
fn what_does_not_fit_a_model_is_refused() -> Result {
    let (base, other) = (model(KEPT[0], 12)?, model(KEPT[0], 13)?);
    let dictionary = dictionary(&base)?;
    let adapter = trained(&dictionary)?;
    let both = AdapterScope::Both;
    refused(other.with_dictionary(&dictionary, &adapter, both), "another model")?;
    refused(model(KEPT[2], 12)?.with_dictionary(&dictionary, &adapter, both), "another model")?;
    let reading = base.with_dictionary(&dictionary, &adapter, both)?;
    let thinks = reading.thought_model();
    refused(thinks.with_dictionary(&dictionary, &adapter, both), "side source")?;
    refused(self::dictionary(&reading), "without a dictionary")?;
    // A model in training is not asked whether it is the same.
    other.thought_model().with_dictionary(&dictionary, &adapter, both)?;

    let of = |made: &DictionaryConfig| DictionaryAdapter::new(&config(), made, 4, 1, &Device::Cpu);
    let made = || DictionaryConfig::layers(LAYERS);
    let differently = of(&made().sight(Sight::Causal))?;
    refused(base.with_dictionary(&dictionary, &differently, both), "made")?;
    refused(
        base.with_dictionary(&dictionary, &of(&DictionaryConfig::layers(0..3))?, both),
        "layers",
    )?;
    // Fewer layers are read by themselves, in whatever type vectors are, however long entries may be.
    let fewer = DictionaryConfig::layers([2]).dtype(DType::BF16).max_tokens(9);
    base.with_dictionary(&dictionary, &of(&fewer)?, both)?;
    let wide = Config { intermediate_size: 96, ..config() };
    let adapter_of_wide = DictionaryAdapter::new(&wide, &made(), 4, 1, &Device::Cpu)?;
    let error = base.with_dictionary(&dictionary, &adapter_of_wide, both).err();
    assert!(matches!(error, Some(Error::WeightShape { .. })), "{error:?}");

    let mixture = Config {
        experts: Some(Experts { num_local_experts: 2, num_experts_per_tok: 1 }),
        ..config()
    };
    let error = DictionaryAdapter::new(&mixture, &made(), 4, 1, &Device::Cpu).err();
    assert!(matches!(error, Some(Error::Unsupported { .. })), "{error:?}");
    let mixture = HybridModel::new(tiny::transformer(&mixture, 1)?, Some(tokenizer()?))?;
    let error = self::dictionary(&mixture).err();
    assert!(matches!(error, Some(Error::Unsupported { .. })), "{error:?}");
    let error = mixture.thought_model().with_dictionary(&dictionary, &adapter, both).err();
    assert!(matches!(error, Some(Error::Unsupported { .. })), "{error:?}");

    for rank in [0, 33] {
        let made = DictionaryAdapter::new(&config(), &made(), rank, 1, &Device::Cpu);
        refused(made, "rank")?;
    }
    refused(of(&DictionaryConfig::layers([3])), "layers")?;
    refused(adapter.clone().with_generic(1, &tiny::noise(1, &[32], 1.0)?), "layer")?;
    refused(adapter.with_generic(0, &tiny::noise(1, &[31], 1.0)?), "generic")
}

/// Another engine would decode without what the decoder looks up.
#[test]
fn thoughts_are_no_prompt_for_another_engine_where_decoding_looks_up() -> Result {
    let base = model(KEPT[0], 17)?;
    let dictionary = dictionary(&base)?;
    for (scope, decodes) in SCOPES.into_iter().zip([false, true, true]) {
        let reading = base.with_dictionary(&dictionary, &trained(&dictionary)?, scope)?;
        let thoughts = reading.think(TEXT, &generation(&Thinking::new(1)))?;
        match decodes {
            true => refused(thoughts.prompt_embeddings(), "without a dictionary")?,
            false => assert_identical("z", &thoughts.prompt_embeddings()?, &thoughts.z)?,
        }
    }
    Ok(())
}

/// What a memory keeps of texts would be taken for what another dictionary makes of them.
#[test]
fn memories_refuse_dictionaries() -> Result {
    let base = model(KEPT[0], 14)?;
    let dictionary = dictionary(&base)?;
    for scope in SCOPES {
        let reading = base.with_dictionary(&dictionary, &trained(&dictionary)?, scope)?;
        let error = Memory::over(Volatile::default(), &reading, None).err();
        assert!(matches!(error, Some(Error::Unsupported { .. })), "{error:?}");
    }
    Ok(())
}

#[test]
fn an_adapter_is_read_as_it_was_written() -> Result {
    let base = model(KEPT[0], 15)?;
    let dictionary = dictionary(&base)?;
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("dictionary_adapter.safetensors");
    for adapter in [trained(&dictionary)?, generic(trained(&dictionary)?)?] {
        adapter.save(&path)?;
        let same = DictionaryAdapter::open(&path, &Device::Cpu)?;
        assert_eq!((same.config(), same.variables()?.len()), (adapter.config(), 0));
        for ((name, got), (_, expected)) in same.tensors().zip(adapter.tensors()) {
            assert_identical(&name, got, &expected.detach())?;
        }
        let said = |adapter: &DictionaryAdapter| -> Result<_> {
            let reading = base.with_dictionary(&dictionary, adapter, AdapterScope::Both)?;
            Ok(bits(&reading.generate(TEXT, &generation(&Thinking::new(1)))?))
        };
        assert_eq!(said(&same)?, said(&adapter)?);
    }
    // The same seed gives the same; another gives another.
    let drawn = |seed| -> Result<Vec<f32>> {
        let adapter =
            DictionaryAdapter::new(&config(), dictionary.config(), 4, seed, &Device::Cpu)?;
        let (_, a) = adapter.tensors().next().ok_or("nothing")?;
        Ok(a.flatten_all()?.to_vec1()?)
    };
    assert!(drawn(1)? == drawn(1)? && drawn(1)? != drawn(2)?);

    let whole = std::fs::read(&path)?;
    for length in [0, 5, 40, whole.len() / 2, whole.len() - 1] {
        std::fs::write(&path, &whole[..length])?;
        let error = DictionaryAdapter::open(&path, &Device::Cpu).err();
        assert!(matches!(error, Some(Error::Malformed { .. })), "{length}: {error:?}");
    }
    let tensors = || {
        trained(&dictionary)
            .map(|it| it.tensors().map(|(name, tensor)| (name, tensor.clone())).collect::<Vec<_>>())
    };
    let about = serde_json::to_string(dictionary.config())?;
    let write = |tensors: Vec<(String, Tensor)>, about: Option<&str>| -> Result {
        let about =
            about.map(|about| [("dictionary_adapter".to_string(), about.to_string())].into());
        Ok(safetensors::serialize_to_file(tensors, about, &path)?)
    };
    let opened = || DictionaryAdapter::open(&path, &Device::Cpu);
    write(tensors()?, None)?;
    refused(opened(), "no dictionary_adapter")?;
    write(tensors()?, Some("{}"))?;
    refused(opened(), "layers")?;
    let mut fewer = tensors()?;
    fewer.remove(1);
    write(fewer, Some(&about))?;
    assert!(matches!(opened().err(), Some(Error::MissingWeight { .. })));
    let mut more = tensors()?;
    more.push(("other".to_string(), tiny::noise(1, &[2], 1.0)?));
    write(more, Some(&about))?;
    assert!(matches!(opened().err(), Some(Error::UnusedWeight { .. })));
    let mut bent = tensors()?;
    bent[1].1 = tiny::noise(1, &[64, 5], 1.0)?;
    write(bent, Some(&about))?;
    assert!(matches!(opened().err(), Some(Error::WeightShape { .. })));
    write(tensors()?, Some(&about))?;
    opened()?;
    Ok(())
}
