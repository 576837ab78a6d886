//! Documents that are read once: what is put into a cache is what reading now would leave there.

mod common;

use std::ops::Range;

use candle_core::{DType, Device, Tensor};
use hybrid_attention::model::{Attended, Batch, ForwardContext, KvCache, Pass, Sight, Tap};
use hybrid_attention::refine::{Interpolate, OutputNudge};
use hybrid_attention::thought::{Document, ThoughtLoop};
use hybrid_attention::{
    Answer, Config, Error, GenerationConfig, HandOff, HybridModel, Prompt, QueryScaling,
    RopeScaling, Thinking,
};
use proptest::prelude::*;

use common::reference::{Reference, Stream};
use common::tiny::{self, holds};
use common::{Result, assert_close};

/// More tokens than products of few rows have, which round otherwise.
const MANY: usize = 17;

fn config(thinking: &Thinking) -> GenerationConfig {
    GenerationConfig::default().thinking(thinking.clone()).max_tokens(4).prompt_logprobs(true)
}

fn mind(model: &HybridModel, thinking: &Thinking) -> Result<ThoughtLoop> {
    Ok(thinking.on(model.thought_model())?)
}

/// A pass both ways over the embeddings, whose keys and values are taken.
fn both_ways() -> Thinking {
    Thinking::new(1).refine(Interpolate::new(0.0)).hand_off(HandOff::KeyValue)
}

fn thinkings() -> Vec<Thinking> {
    let some = |hand_off| Thinking::new(2).refine(Interpolate::new(0.4)).hand_off(hand_off);
    let mixed = HandOff::Mixed { weight: 0.3 };
    let all = [HandOff::Refined, HandOff::KeyValue, mixed].map(some).into_iter();
    all.chain([Thinking::none(), some(HandOff::KeyValue).span(..1), both_ways()]).collect()
}

fn bits(logprobs: &[f32]) -> Vec<u32> {
    logprobs.iter().map(|logprob| logprob.to_bits()).collect()
}

/// The same tokens with the same probabilities, to the last bit; of the prompt's those behind `held`.
fn assert_same(name: &str, got: &Answer, expected: &Answer, held: usize) {
    assert_eq!(got.prompt_ids, expected.prompt_ids, "{name}");
    assert_eq!(got.ids, expected.ids, "{name}");
    assert_eq!(bits(&got.logprobs), bits(&expected.logprobs), "{name}");
    let of = |answer: &Answer| answer.prompt_logprobs.clone().unwrap_or_default();
    let (got, expected) = (of(got), of(expected));
    assert_eq!(got.len(), expected.len());
    assert!(got[..=held].iter().all(Option::is_none), "{name}");
    let behind =
        |all: &[Option<f32>]| all[held + 1..].iter().flatten().copied().collect::<Vec<_>>();
    assert_eq!(behind(&got).len(), got.len() - held - 1, "{name}");
    assert_eq!(bits(&behind(&got)), bits(&behind(&expected)), "{name}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Whatever the model, the hand-off, the type of the cache and how many tokens stand in front.
    #[test]
    fn one_document_is_thinking_about_it_now(
        shape in tiny::configs(), seed in 0u64..1000, lead in 0usize..3, length in MANY..40,
    ) {
        let run = || -> Result {
            let model = tiny::hybrid(&shape, seed)?;
            let ids = tiny::tokens(&shape, seed, lead + length);
            let question = tiny::tokens(&shape, seed + 1, MANY);
            for (dtype, thinking) in [DType::F32, DType::BF16, DType::F16]
                .into_iter()
                .flat_map(|dtype| thinkings().into_iter().map(move |it| (dtype, it)))
            {
                let model = model.with_cache_dtype(dtype)?;
                let now = Prompt::default().plain_ids(&ids[..lead]).context_ids(&ids[lead..]);
                let expected = model.generate(now.plain_ids(&question), &config(&thinking))?;
                let document = mind(&model, &thinking)?.read_document(&ids, lead, dtype)?;
                let once = Prompt::default().document(&document).plain_ids(&question);
                // Thought about already: what the config says of thinking is done.
                for said in [&thinking, &Thinking::none()] {
                    let got = model.generate(once.clone(), &config(said))?;
                    assert_same(&format!("{dtype:?} {thinking:?}"), &got, &expected, ids.len());
                    assert!(got.traces.is_empty());
                }
            }
            Ok(())
        };
        holds(run())?;
    }

    /// Against plain loops, in which each document sees all of itself and nothing else.
    #[test]
    fn several_are_blind_to_each_other_and_the_question_sees_all(
        shape in tiny::shapes(), seed in 0u64..1000, lengths in prop::collection::vec(1usize..9, 1..5),
        causal: bool,
    ) {
        let run = || -> Result {
            let (model, thinking) = match causal {
                true => (tiny::hybrid(&shape, seed)?, Thinking::none()),
                false => (tiny::hybrid(&shape, seed)?, both_ways()),
            };
            let mind = mind(&model, &thinking)?;
            let (mut ids, mut runs, mut prompt) = (Vec::new(), Vec::new(), Prompt::default());
            for (index, length) in lengths.iter().enumerate() {
                let own = tiny::tokens(&shape, seed + index as u64, *length);
                prompt = prompt.document(&mind.read_document(&own, 0, DType::F32)?);
                runs.push(ids.len()..ids.len() + length);
                ids.extend(own);
            }
            let question = tiny::tokens(&shape, seed + 9, 5);
            ids.extend(&question);
            let answer = model.generate(prompt.plain_ids(&question), &config(&thinking).max_tokens(0))?;

            let reference = Reference::new(&shape, &tiny::weights(&shape, seed)?)?;
            let window = shape.sliding_window.unwrap_or(usize::MAX);
            let sees = |i: usize, j: usize| {
                let own = runs.iter().find(|run| run.contains(&i));
                let all = own.is_none_or(|run| run.contains(&j));
                all && i.abs_diff(j) < window && (j <= i || !causal && own.is_some())
            };
            let layer = |xs: Stream, layer| reference.layer(&format!("model.layers.{layer}"), &xs, sees);
            let h = (0..shape.num_hidden_layers).fold(reference.embed(&ids), layer);
            let logprobs = answer.prompt_logprobs.ok_or("none")?;
            for at in ids.len() - question.len() + 1..ids.len() {
                let logits = reference.logits(&h[at - 1]);
                let sum = logits.iter().map(|logit| logit.exp()).sum::<f64>().ln();
                let right = logits[ids[at] as usize] - sum;
                let got = f64::from(logprobs[at].ok_or("none")?);
                assert!((got - right).abs() < 1e-4 * (1.0 + right.abs()), "{at}: {got}, not {right}");
            }
            Ok(())
        };
        holds(run())?;
    }

    /// Keys of every layer: turned ones are those that a pass at the new positions computes, within 1e-4.
    #[test]
    fn moved_keys_are_those_of_a_pass_there(
        shape in tiny::configs(), seed in 0u64..1000, by in 1usize..300, length in 1usize..30, causal: bool,
    ) {
        let run = || -> Result {
            let model = tiny::hybrid(&shape, seed)?;
            let thinking = if causal { Thinking::none() } else { both_ways() };
            let mind = mind(&model, &thinking)?;
            let read = |seed, length| {
                mind.read_document(&tiny::tokens(&shape, seed, length), 0, DType::F32)
            };
            let (before, document) = (read(seed, by)?, read(seed + 1, length)?);
            let transformer = model.transformer();
            let mut cache = transformer.new_cache(by + length)?;
            transformer.place(before.kept(), 0..by, &mut cache)?;
            match transformer.place(document.kept(), 0..length, &mut cache) {
                // Queries at the old positions and at the new ones grow to different lengths.
                Err(Error::Unsupported { .. }) if shape.query_scaling.is_some() => return Ok(()),
                other => other?,
            }
            let mut seen = Seen::default();
            let batch = Batch::one(length)?.starting_at(0, by)?;
            let sight = if causal { Sight::Causal } else { Sight::Bidirectional };
            let pass = ForwardContext::from(Pass::uncached(&batch, sight)).tap(&mut seen);
            let xs = transformer.embed_ids(document.ids())?;
            transformer.forward(&xs, transformer.all_layers(), pass)?;
            let held = cache.keep(by..by + length)?;
            let expected = Tensor::cat(&seen.0, 0)?.flatten_all()?;
            assert_close("keys and values", &floats(held.bytes())?, &expected, 1e-4)
        };
        holds(run())?;
    }
}

/// Keys and values of every layer, `(1, kv_heads, tokens, head_dim)`.
#[derive(Default)]
struct Seen(Vec<Tensor>);

impl Tap for Seen {
    fn attention(&mut self, _: usize, attended: &Attended<'_>) -> hybrid_attention::Result<()> {
        let (keys, values) = attended.keys_and_values(0)?;
        self.0.extend([keys.unsqueeze(0)?, values.unsqueeze(0)?]);
        Ok(())
    }
}

fn floats(bytes: &[u8]) -> Result<Tensor> {
    let values = bytes.chunks_exact(4).map(|it| f32::from_le_bytes([it[0], it[1], it[2], it[3]]));
    Ok(Tensor::new(values.collect::<Vec<_>>(), &Device::Cpu)?)
}

fn documents(model: &HybridModel, thinking: &Thinking, lengths: &[usize]) -> Result<Vec<Document>> {
    let mind = mind(model, thinking)?;
    let read = |(seed, length): (u64, &usize)| {
        // All of them begin with the same token.
        let ids = [vec![1], tiny::tokens(model.config(), seed, *length)].concat();
        Ok(mind.read_document(&ids, 1, DType::F32)?)
    };
    (0..).zip(lengths).map(read).collect()
}

/// What was read in front of all stands there once.
#[test]
fn the_lead_stands_in_front_of_the_first() -> Result {
    let model = tiny::hybrid(&tiny::config(), 1)?;
    let documents = documents(&model, &both_ways(), &[20, 21])?;
    let [a, b] = documents.as_slice() else { return Err("two".into()) };
    let question = tiny::tokens(model.config(), 7, 3);
    let prompt = Prompt::default().document(a).document(b).plain_ids(&question);
    let stream = model.stream(prompt.clone(), &GenerationConfig::default().max_tokens(1))?;
    assert_eq!(stream.prompt_ids(), [a.ids(), &b.ids()[1..], &question].concat());
    let mut stream = stream;
    assert_eq!(stream.read_prompt()?, 42);
    assert_eq!((a.lead(), a.kept().tokens(), a.kept().first()), (1, 21, 0));
    // In front of everything it is part of the first, wherever plain tokens stand between them.
    let between = Prompt::default().document(a).plain_ids(&[5, 6]).document(b).plain_ids(&question);
    let answer = model.generate(between, &GenerationConfig::default().max_tokens(0))?;
    assert_eq!(answer.prompt_ids, [a.ids(), &[5, 6], &b.ids()[1..], &question].concat());
    // Behind something else there is none.
    let behind = Prompt::default().plain_ids(&[5]).document(a).plain_ids(&question);
    let answer = model.generate(behind, &GenerationConfig::default().max_tokens(0))?;
    assert_eq!(answer.prompt_ids, [&[5], &a.ids()[1..], &question].concat());
    Ok(())
}

/// All of the later documents: a prompt of which only the first is context.
#[test]
fn recomputed_whole_is_reading_causally() -> Result {
    for (dtype, window) in [(DType::F32, None), (DType::F32, Some(11)), (DType::BF16, None)] {
        let shape = Config { sliding_window: window, ..tiny::config() };
        let model = tiny::hybrid(&shape, 3)?.with_cache_dtype(dtype)?;
        for thinking in thinkings() {
            let mind = mind(&model, &thinking)?;
            let ids: Vec<_> = (0..2).map(|seed| tiny::tokens(&shape, seed, 19)).collect();
            let read = |ids: &Vec<u32>| mind.read_document(ids, 0, dtype);
            let documents = ids.iter().map(read).collect::<hybrid_attention::Result<Vec<_>>>()?;
            let question = tiny::tokens(&shape, 9, MANY);
            let add = |prompt: Prompt, it: &Document| prompt.document_recomputed(it, usize::MAX);
            let got = documents.iter().fold(Prompt::default(), add).plain_ids(&question);
            let now = Prompt::default().context_ids(&ids[0]).plain_ids(&ids[1]);
            let expected = model.generate(now.plain_ids(&question), &config(&thinking))?;
            let got = model.generate(got, &config(&thinking))?;
            assert_same(&format!("{dtype:?} {window:?} {thinking:?}"), &got, &expected, 19);
        }
    }
    Ok(())
}

/// The end of a document runs over a cache that holds what is before it.
#[test]
fn recomputed_tokens_see_the_documents_before() -> Result {
    let model = tiny::hybrid(&tiny::config(), 4)?;
    let documents = documents(&model, &both_ways(), &[20, 40])?;
    let [a, b] = documents.as_slice() else { return Err("two".into()) };
    let question = tiny::tokens(model.config(), 7, MANY);
    let transformer = model.transformer();
    let mut cache = transformer.new_cache(200)?;
    transformer.place(a.kept(), 0..21, &mut cache)?;
    transformer.place(b.kept(), 1..24, &mut cache)?;
    for ids in [&b.ids()[24..], &question] {
        let xs = transformer.embed_ids(ids)?;
        transformer.forward(&xs, transformer.all_layers(), Pass::Cached(&mut cache))?;
    }
    let held: Vec<u8> = cache.keep(0..cache.len())?.bytes().to_vec();
    let prompt = Prompt::default().document(a).document_recomputed(b, 17).plain_ids(&question);
    let mut conversation = model.conversation(200)?;
    let config = GenerationConfig::default().max_tokens(1);
    let mut stream = model.stream_in(&mut conversation, prompt, &config)?;
    assert_eq!(stream.read_prompt()?, 21 + 23);
    drop(stream);
    assert!(conversation.cache().keep(0..cache.len())?.bytes() == held);
    // None of it is what would be there without.
    let plain = Prompt::default().document(a).document(b).plain_ids(&question);
    let mut stream = model.stream_in(&mut conversation, plain, &config)?;
    assert_eq!(stream.read_prompt()?, 61);
    drop(stream);
    assert!(conversation.cache().keep(0..cache.len())?.bytes() != held);
    Ok(())
}

#[test]
fn a_conversation_takes_no_document_for_plain_tokens() -> Result {
    let model = tiny::hybrid(&tiny::config(), 5)?;
    let documents = documents(&model, &Thinking::none(), &[20])?;
    let question = tiny::tokens(model.config(), 7, MANY);
    let config = config(&Thinking::none()).prompt_logprobs(false);
    let with = Prompt::default().document(&documents[0]).plain_ids(&question);
    let plain = Prompt::default().plain_ids(&question);
    let mut conversation = model.conversation(100)?;
    for prompt in [&with, &plain, &with, &with] {
        let expected = model.generate(prompt.clone(), &config)?;
        let stream = model.stream_in(&mut conversation, prompt.clone(), &config)?;
        let got = stream.collect_answer()?;
        assert_eq!((&got.ids, bits(&got.logprobs)), (&expected.ids, bits(&expected.logprobs)));
        let plain_tokens = if *prompt == with { 0 } else { MANY + got.ids.len() - 1 };
        assert_eq!(conversation.ids().len(), plain_tokens);
    }
    // Side by side with others, and from several threads at once.
    let expected = model.generate(with.clone(), &config)?;
    for (_, answer) in model.generate_many([with.clone(), plain, with.clone()], &config)? {
        let answer = answer?;
        if answer.prompt_ids.len() > MANY {
            assert_eq!(bits(&answer.logprobs), bits(&expected.logprobs));
        }
    }
    std::thread::scope(|scope| {
        let ask = || scope.spawn(|| model.generate(with.clone(), &config).map(|it| it.logprobs));
        let threads = [ask(), ask(), ask()];
        threads.into_iter().try_for_each(|thread| {
            let got = thread.join().map_err(|_| "panicked")??;
            assert_eq!(bits(&got), bits(&expected.logprobs));
            Ok(())
        })
    })
}

/// Kept narrow and held wide they are the rounded numbers; kept wide and held narrow they are rounded.
#[test]
fn types_of_what_is_kept_and_of_a_cache_may_differ() -> Result {
    let model = tiny::hybrid(&tiny::config(), 6)?;
    let (transformer, ids) = (model.transformer(), tiny::tokens(model.config(), 6, 30));
    let mind = mind(&model, &both_ways())?;
    let [wide, narrow] = [DType::F32, DType::BF16].map(|it| mind.read_document(&ids, 0, it));
    let (wide, narrow) = (wide?, narrow?);
    assert_eq!(narrow.kept().bytes().len() * 2, wide.kept().bytes().len());
    assert_ne!(wide, narrow);
    let held = |document: &Document, dtype| -> Result<Vec<u8>> {
        let mut cache = transformer.new_pool(dtype, usize::MAX)?.new_cache(64)?;
        transformer.place(document.kept(), 0..30, &mut cache)?;
        Ok(cache.keep(0..30)?.bytes().to_vec())
    };
    let as_bf16 = |bytes: &[u8]| -> Result<Vec<half::bf16>> {
        Ok(floats(bytes)?.to_dtype(DType::BF16)?.to_vec1()?)
    };
    let narrow_bytes = |bytes: &[u8]| -> Vec<half::bf16> {
        bytes.chunks_exact(2).map(|it| half::bf16::from_le_bytes([it[0], it[1]])).collect()
    };
    assert!(held(&narrow, DType::BF16)? == narrow.kept().bytes());
    assert!(as_bf16(&held(&narrow, DType::F32)?)? == narrow_bytes(narrow.kept().bytes()));
    assert!(narrow_bytes(&held(&wide, DType::BF16)?) == as_bf16(wide.kept().bytes())?);
    Ok(())
}

fn refused<T>(result: hybrid_attention::Result<T>, expected: &str) -> Result {
    let error = result.err().ok_or(format!("accepted: {expected}"))?.to_string();
    assert!(error.contains(expected), "{error:?} says nothing of {expected:?}");
    Ok(())
}

#[test]
fn what_does_not_fit_is_refused_and_changes_nothing() -> Result {
    let model = tiny::hybrid(&tiny::config(), 8)?;
    let documents = documents(&model, &Thinking::none(), &[20, 20])?;
    let (a, transformer) = (&documents[0], model.transformer());
    let config = GenerationConfig::default().max_tokens(1);
    let alone = Prompt::default().document(a);
    refused(model.generate(alone.clone(), &config), "behind its last document")?;
    refused(model.think(alone.clone().plain_ids(&[1]), &config), "without documents")?;
    let thinks = config.clone().thinking(Thinking::new(2));
    refused(model.generate(alone.clone().context_ids(&[1, 2]), &thinks), "plain parts beside")?;
    model.generate(alone.clone().context_ids(&[1, 2]), &config)?; // nothing thinks about it
    let asked = alone.plain_ids(&[1, 2]);
    model.generate(asked.clone(), &thinks)?;
    let again = Thinking::new(2).rethink_every(3);
    let nudged = Thinking::none().output_nudge(OutputNudge::new(1));
    for (thinking, name) in [(&again, "rethink_every"), (&nudged, "output_nudge")] {
        refused(model.generate(asked.clone(), &config.clone().thinking(thinking.clone())), name)?;
        refused(mind(&model, thinking)?.read_document(&[1, 2], 0, DType::F32), name)?;
    }
    let mind = mind(&model, &Thinking::none())?;
    refused(mind.read_document(&[1, 2], 2, DType::F32), "empty")?;
    refused(mind.read_document(&[], 0, DType::F32), "empty")?;
    refused(mind.read_document(&[99], 0, DType::F32), "vocabulary")?;
    refused(mind.read_document(&[1], 0, DType::F64), "cache dtype")?;
    refused(Document::new(&[1], 0, a.kept().clone()), "1 tokens from position 0")?;
    refused(Document::new(a.ids(), 21, a.kept().clone()), "empty")?;

    // Another model, even of the same weights.
    let other = tiny::hybrid(&tiny::config(), 8)?;
    refused(other.generate(asked.clone(), &config), "this very transformer")?;
    let place =
        |tokens: Range<usize>, cache: &mut KvCache| transformer.place(a.kept(), tokens, cache);
    let mut cache = transformer.new_cache(30)?;
    refused(other.transformer().place(a.kept(), 0..2, &mut cache), "this very transformer")?;
    place(0..21, &mut cache)?;
    for (tokens, expected) in [(0..0, "0..0"), (20..22, "20..22"), (0..10, "room for 30")] {
        refused(place(tokens, &mut cache), expected)?;
    }
    refused(cache.keep(3..3), "0..21")?;
    refused(cache.keep(3..22), "0..21")?;
    assert_eq!(cache.len(), 21);
    let tight = transformer.new_pool(DType::F32, 1000)?;
    let mut tight = tight.new_cache(30)?;
    refused(place(0..21, &mut tight), "pool full")?;
    assert!(tight.is_empty());
    // A prompt that is too long as a whole.
    let short = Config { max_position_embeddings: 40, ..tiny::config() };
    let model = tiny::hybrid(&short, 8)?;
    let mind = self::mind(&model, &Thinking::none())?;
    let document = mind.read_document(&tiny::tokens(&short, 1, 30), 0, DType::F32)?;
    let long = Prompt::default().document(&document).document(&document).plain_ids(&[1]);
    refused(model.generate(long, &config), "room for 40")?;
    Ok(())
}

/// Where other positions would have made other numbers than turned keys are.
#[test]
fn what_cannot_be_moved_is_refused() -> Result {
    let dynamic = RopeScaling::Dynamic { factor: 2.0, original_max_position_embeddings: 50 };
    let grows = QueryScaling { beta: 0.1, original_max_position_embeddings: 50 };
    for (shape, expected) in [
        (Config { rope_scaling: Some(dynamic), ..tiny::config() }, "dynamic rope scaling"),
        (Config { query_scaling: Some(grows), ..tiny::config() }, "queries grow"),
    ] {
        let model = tiny::hybrid(&shape, 2)?;
        let documents = documents(&model, &Thinking::none(), &[20, 20, 20])?;
        let all = |documents: &[Document], question| {
            let prompt = documents.iter().fold(Prompt::default(), Prompt::document);
            model.generate(
                prompt.plain_ids(&tiny::tokens(&shape, 9, question)),
                &GenerationConfig::default().max_tokens(1),
            )
        };
        all(&documents[..2], 3)?;
        refused(all(&documents, 3), expected)?;
        // A longer question turns a text of other frequencies; queries of its own may grow.
        match shape.query_scaling {
            None => refused(all(&documents[..1], 40), expected)?,
            Some(_) => drop(all(&documents[..1], 40)?),
        }
    }
    Ok(())
}

/// Text behind a document begins no text of its own.
#[test]
fn text_behind_a_document_has_no_bos() -> Result {
    let model = HybridModel::tiny(&Device::Cpu)?;
    let mind = mind(&model, &Thinking::none())?;
    let tokenizer = model.tokenizer().ok_or("no tokenizer")?;
    let (text, question) = ("Leo gave everything to Ida.", "\nWho has what Leo had?");
    let document = mind.read_document(&tokenizer.encode(text, true)?, 0, DType::F32)?;
    let config = GenerationConfig::default().max_tokens(1);
    let prompt = Prompt::default().document(&document).plain(question);
    let answer = model.generate(prompt, &config)?;
    let (text, question) = (tokenizer.encode(text, true)?, tokenizer.encode(question, false)?);
    assert_eq!(answer.prompt_ids, [text, question].concat());
    Ok(())
}
