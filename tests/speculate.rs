//! Guessing ahead: the answer is the one without guesses, to the last bit, whatever the model, the settings and what
//! becomes of the guesses.

mod common;

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use candle_core::quantized::GgmlDType;
use candle_core::{DType, Device, Tensor};
use hybrid_attention::generate::{Candidates, PromptLookup, Sampler, Speculated};
use hybrid_attention::model::{
    Batch, ForwardContext, KvCache, KvPool, Linear, Pass, Seen, SideProjection, SideSignal,
    SideSource, Sight, Transformer,
};
use hybrid_attention::refine::{Interpolate, OutputNudge};
use hybrid_attention::{
    Cancel, Config, Conversation, Error, GenerationConfig, HandOff, HybridModel, Message, Prompt,
    RopeScaling, Thinking, TokenStream, WeightType,
};
use proptest::prelude::*;

use common::tiny::{self, holds};
use common::{Result, assert_identical, config_of_large_blocks, smollm2};

// ---- one pass is as many ----

/// The logits after each token, in passes of these many tokens.
fn logits(
    model: &Transformer,
    cache: &mut KvCache,
    ids: &[u32],
    lengths: &[usize],
) -> Result<Tensor> {
    let (mut from, mut rows) = (0, Vec::new());
    for length in lengths {
        let xs = model.embed_ids(&ids[from..from + length])?;
        let pass = ForwardContext::from(Pass::Cached(cache)).one_by_one();
        rows.push(model.logits(&model.forward(&xs, model.all_layers(), pass)?)?);
        from += length;
    }
    Ok(Tensor::cat(&rows, 0)?)
}

/// After a prompt, tokens that go one by one in passes of these lengths give the bits of tokens that come alone.
fn check_passes(
    name: &str,
    model: &Transformer,
    dtype: DType,
    prompt: usize,
    lengths: &[usize],
) -> Result {
    let new: usize = lengths.iter().sum();
    let ids = tiny::tokens(model.config(), 3, prompt + new);
    let pool = model.new_pool(dtype, usize::MAX)?;
    let mut cache = pool.new_cache(prompt + new)?;
    let (read, rest) = ids.split_at(prompt);
    if prompt > 0 {
        let xs = model.embed_ids(read)?;
        model.forward(&xs, model.all_layers(), Pass::Cached(&mut cache))?;
    }
    let mut alone = Vec::new();
    let mut stepwise = cache.fork();
    for id in rest {
        let xs = model.embed_ids(&[*id])?;
        alone.push(tiny::logits(model, &xs, Pass::Cached(&mut stepwise))?);
    }
    let together = logits(model, &mut cache, rest, lengths)?;
    assert_identical(name, &together, &Tensor::cat(&alone, 0)?)
}

#[test]
fn any_weights_and_rotations_go_one_by_one() -> Result {
    let lengths = [3, 16, 1, 7, 2];
    for dtype in [DType::F32, DType::BF16, DType::F16] {
        let dynamic = RopeScaling::Dynamic { factor: 4.0, original_max_position_embeddings: 32 };
        for rope_scaling in [None, Some(dynamic)] {
            let config = Config { rope_scaling, ..tiny::config() };
            for prompt in [0, 20, 90, 200] {
                let name = format!("{dtype:?} {prompt} {:?}", config.rope_scaling);
                let model = tiny::transformer(&config, 4)?;
                check_passes(&name, &model, dtype, prompt, &lengths)?;
            }
        }
    }
    let config = config_of_large_blocks()?;
    for kind in [
        WeightType::Dense(DType::BF16),
        WeightType::Dense(DType::F16),
        WeightType::Quantized(GgmlDType::Q8_0),
        WeightType::Quantized(GgmlDType::Q4_1),
        WeightType::Quantized(GgmlDType::Q4K),
        WeightType::Quantized(GgmlDType::Q6K),
    ] {
        let model = kept_as(&config, kind)?;
        check_passes(&format!("{kind:?}"), model.transformer(), DType::F32, 40, &lengths)?;
    }
    Ok(())
}

/// A model of random weights that are kept as this.
fn kept_as(config: &Config, kind: WeightType) -> Result<HybridModel> {
    let folder = tempfile::tempdir()?;
    let weights = tiny::weights(config, 5)?.into_iter().collect();
    common::write_hugging_face(folder.path(), config, &weights)?;
    Ok(HybridModel::from_folder(folder.path(), kind, &Device::Cpu)?)
}

/// Sequences side by side, each with some tokens that go one by one.
#[test]
fn sequences_side_by_side_go_one_by_one() -> Result {
    let config = Config { sliding_window: Some(9), ..tiny::config() };
    let model = tiny::transformer(&config, 2)?;
    let (lengths, pasts) = ([3, 1, 5, 2], [0, 7, 130, 95]);
    let pool = model.new_pool(DType::F32, usize::MAX)?;
    let ids = tiny::tokens(&config, 8, lengths.iter().sum());
    let (mut caches, mut alone, mut from) = (Vec::new(), Vec::new(), 0);
    for (length, past) in lengths.into_iter().zip(pasts) {
        let mut cache = pool.new_cache(200)?;
        if past > 0 {
            let xs = model.embed_ids(&tiny::tokens(&config, past as u64, past))?;
            model.forward(&xs, model.all_layers(), Pass::Cached(&mut cache))?;
        }
        let mut stepwise = cache.fork();
        for id in &ids[from..from + length] {
            let xs = model.embed_ids(&[*id])?;
            alone.push(model.forward(&xs, model.all_layers(), Pass::Cached(&mut stepwise))?);
        }
        caches.push(cache);
        from += length;
    }
    let batch = Batch::ragged(&lengths)?;
    let caches = caches.iter_mut().collect();
    let pass = Pass::Remembered { batch: &batch, sight: Sight::Causal, caches };
    let pass = ForwardContext::from(pass).one_by_one();
    let together = model.forward(&model.embed_ids(&ids)?, model.all_layers(), pass)?;
    assert_identical("side by side", &together, &Tensor::cat(&alone, 0)?)
}

#[test]
fn only_what_continues_causally_goes_one_by_one() -> Result {
    let model = tiny::transformer(&tiny::config(), 1)?;
    let (batch, xs) = (Batch::one(3)?, model.embed_ids(&[1, 2, 3])?);
    let mut cache = model.new_cache(8)?;
    let both_ways =
        Pass::Remembered { batch: &batch, sight: Sight::Bidirectional, caches: vec![&mut cache] };
    for pass in [Pass::Causal(&batch), Pass::Bidirectional(&batch), both_ways] {
        let refused = model.forward(&xs, 0..3, ForwardContext::from(pass).one_by_one());
        assert_eq!(
            refused.map(drop).map_err(|error| error.to_string()),
            Err("parameter pass: expected a causal one over caches, for tokens that go one by one, got another".into())
        );
    }
    assert!(cache.is_empty());
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_tokens_go_one_by_one(
        config in tiny::configs(), prompt in 0usize..120,
        lengths in prop::collection::vec(1usize..=16, 1..5),
        dtype in prop::sample::select(&[DType::F32, DType::BF16, DType::F16][..]),
    ) {
        holds((|| check_passes("any", &tiny::transformer(&config, 6)?, dtype, prompt, &lengths))())?;
    }
}

// ---- an answer is the same ----

/// All that can be seen of an answer while it comes and at its end, but for the time and the guesses.
#[derive(Debug, PartialEq)]
struct Came {
    tokens: Vec<String>,
    end: std::result::Result<String, String>,
}

fn came(mut stream: TokenStream<'_>) -> (Came, Option<Speculated>) {
    let mut tokens = Vec::new();
    for token in &mut stream {
        tokens.push(format!("{token:?}"));
    }
    let speculated = stream.speculated();
    let end = stream.collect_answer().map_err(|error| error.to_string()).map(|mut answer| {
        assert_eq!(answer.speculated, speculated);
        answer.seconds = Default::default();
        answer.speculated = None;
        let passes = answer.traces.iter_mut().flat_map(|trace| &mut trace.passes);
        passes.for_each(|pass| pass.seconds = 0.0);
        format!("{answer:?}")
    });
    (Came { tokens, end }, speculated)
}

fn lookups() -> [PromptLookup; 4] {
    let lookup = PromptLookup::default;
    [
        lookup(),
        lookup().tokens(1),
        lookup().tokens(PromptLookup::MOST_TOKENS).shortest(1).longest(PromptLookup::MOST_LONGEST),
        lookup().tokens(4).shortest(3).longest(3),
    ]
}

/// THE assertion: with guesses is without. Returns how these fared in all.
fn check(
    name: &str,
    model: &HybridModel,
    prompts: &[Prompt],
    config: &GenerationConfig,
) -> Result<Speculated> {
    let mut all = Speculated::default();
    for (index, prompt) in prompts.iter().enumerate() {
        let (expected, without) = came(model.stream(prompt.clone(), config)?);
        assert_eq!(without, None);
        for lookup in lookups() {
            let config = config.clone().speculate(lookup.clone());
            let (got, speculated) = came(model.stream(prompt.clone(), &config)?);
            assert_eq!(got, expected, "{name}: prompt {index}, {lookup:?}");
            let Speculated { drafted, accepted } = speculated.ok_or("nothing was guessed")?;
            assert!(accepted <= drafted && accepted <= expected.tokens.len());
            all = Speculated { drafted: all.drafted + drafted, accepted: all.accepted + accepted };
        }
    }
    Ok(all)
}

/// Fails unless some guesses were right and some were wrong.
fn assert_mixed(name: &str, Speculated { drafted, accepted }: Speculated) {
    assert!(0 < accepted && accepted < drafted, "{name}: {accepted} of {drafted}");
}

/// Texts that the tiny model has words for, which say things again.
fn stories() -> Vec<Prompt> {
    let (things, places) = (["coin", "ball", "ring"], ["jar", "chest", "box", "cart"]);
    let story = |sentences: usize| {
        let sentence =
            |at: usize| format!("The {} is in the {}.", things[at % 3], places[at * at % 4]);
        (0..sentences).map(sentence).collect::<Vec<_>>().join(" ")
    };
    let texts = [1, 4, 9, 30].map(|sentences| Prompt::from(story(sentences)));
    texts.into_iter().chain([Prompt::from([11u32, 150, 12])]).collect()
}

/// Token ids that repeat a phrase, with some slips.
fn phrases(config: &Config, seed: u64, length: usize) -> Prompt {
    let phrase = tiny::tokens(config, seed, 7);
    let slips = tiny::tokens(config, seed + 1, length);
    let ids = (0..length).map(|at| if at % 11 == 10 { slips[at] } else { phrase[at % 7] });
    ids.collect::<Vec<u32>>().into()
}

#[test]
fn every_way_to_draw_and_to_end_is_the_same() -> Result {
    let model = HybridModel::tiny(&Device::Cpu)?;
    let plain = GenerationConfig::default().max_tokens(50).thinking(Thinking::none());
    let endless = plain.clone().eos_ids([]);
    let sampled = endless.clone().temperature(0.7).seed(5);
    let mut all = Vec::new();
    for (name, config) in [
        ("greedy", endless.clone()),
        ("sampled", sampled.clone()),
        ("sampled of few", sampled.clone().top_p(0.8).top_k(9).min_p(0.01)),
        ("penalties", sampled.clone().repetition_penalty(1.02).frequency_penalty(0.02)),
        ("greedy penalties", endless.clone().frequency_penalty(0.3).presence_penalty(-0.5)),
        ("logprobs", endless.clone().top_logprobs(4).prompt_logprobs(true)),
    ] {
        all.push(check(name, &model, &stories(), &config)?);
    }
    assert!(all.iter().all(|fared| fared.accepted > 0), "{all:?}");
    assert!(all.iter().any(|fared| fared.accepted < fared.drafted), "{all:?}");
    for (name, config) in [
        ("its own end", plain.clone()),
        ("its own end, sampled", plain.clone().temperature(1.0).seed(1)),
        ("a stop", endless.clone().stop("jar")),
        ("stops", endless.clone().stop(". The ball").stop("xyz").stop(" is in the chest")),
        ("a stop id", endless.clone().stop_id(44)),
        ("nothing", plain.clone().max_tokens(0).prompt_logprobs(true)),
        ("one", plain.clone().max_tokens(1)),
        ("two", endless.clone().max_tokens(2)),
        ("a full context", endless.clone().max_tokens(usize::MAX).temperature(0.5).seed(3)),
    ] {
        check(name, &model, &stories(), &config)?;
    }
    for tokens in 3..25 {
        check("so many", &model, &stories()[2..3], &endless.clone().max_tokens(tokens))?;
    }
    Ok(())
}

#[test]
fn every_way_to_think_is_the_same() -> Result {
    let model = HybridModel::tiny(&Device::Cpu)?;
    let own = GenerationConfig::default().max_tokens(30).eos_ids([]);
    let passes = || Thinking::new(2).span(1..3).refine(Interpolate::new(0.3));
    check("its own", &model, &stories(), &own)?;
    for (name, thinking) in [
        ("refined", passes()),
        ("key-value", passes().hand_off(HandOff::KeyValue)),
        ("mixed", passes().hand_off(HandOff::Mixed { weight: 0.3 })),
    ] {
        check(name, &model, &stories(), &own.clone().thinking(thinking))?;
    }
    Ok(())
}

/// Where a step is more than one token, or others step too, nothing is guessed, and nothing changes.
#[test]
fn it_is_off_where_it_has_to_be() -> Result {
    let model = HybridModel::tiny(&Device::Cpu)?;
    let own = GenerationConfig::default().max_tokens(20).eos_ids([]).seed(2);
    let passes = || Thinking::new(2).span(1..3);
    for config in [
        own.clone().thinking(passes().rethink_every(4)),
        own.clone().thinking(Thinking::none().output_nudge(OutputNudge::new(2))),
        own.clone().temperature(0.9).candidates(Candidates::samples(3)),
    ] {
        let ahead = config.clone().speculate(PromptLookup::default());
        for prompt in stories() {
            let (expected, _) = came(model.stream(prompt.clone(), &config)?);
            assert_eq!(came(model.stream(prompt, &ahead)?), (expected, None));
        }
    }
    let ahead = own.speculate(PromptLookup::default());
    for (index, answer) in model.generate_many(stories(), &ahead)? {
        let (answer, alone) = (answer?, model.generate(stories()[index].clone(), &ahead)?);
        assert_eq!((answer.ids, answer.logprobs), (alone.ids, alone.logprobs));
        assert!(answer.speculated.is_none() && alone.speculated.is_some());
    }
    Ok(())
}

/// Random models under a window, with caches of any type, up to the end of the context.
#[test]
fn every_cache_is_the_same() -> Result {
    for (sliding_window, dtype) in
        [(None, DType::F32), (Some(5), DType::F32), (Some(110), DType::BF16), (None, DType::F16)]
    {
        let config = Config {
            sliding_window,
            max_position_embeddings: 240,
            vocab_size: 12,
            ..tiny::config()
        };
        let model = tiny::hybrid(&config, 3)?.with_cache_dtype(dtype)?;
        let prompts: Vec<_> = [1, 30, 96, 185, 239, 240]
            .into_iter()
            .zip(0..)
            .map(|(length, seed)| phrases(&config, seed, length))
            .collect();
        let how = GenerationConfig::default().max_tokens(60);
        let greedy = check("greedy", &model, &prompts, &how)?;
        assert_mixed("greedy", greedy);
        let drawn = how.temperature(0.4).seed(2);
        assert_mixed("drawn", check("drawn", &model, &prompts, &drawn)?);
    }
    Ok(())
}

#[test]
fn every_weight_is_the_same() -> Result {
    let config = config_of_large_blocks()?;
    let prompts = [phrases(&config, 1, 40), phrases(&config, 5, 100)];
    for kind in [
        WeightType::Dense(DType::BF16),
        WeightType::Quantized(GgmlDType::Q8_0),
        WeightType::Quantized(GgmlDType::Q4K),
    ] {
        let how = GenerationConfig::default().max_tokens(60);
        check(&format!("{kind:?}"), &kept_as(&config, kind)?, &prompts, &how)?;
    }
    let Some(file) = smollm2() else { return Ok(()) };
    let model = HybridModel::from_gguf(file, None, &Device::Cpu)?;
    let text = "Say this again: The lamp of the harbour was lit at six, and put out at seven.";
    let prompts = [Prompt::chat(&[Message::user(text)])];
    let how = GenerationConfig::default().max_tokens(24);
    let fared = check("SmolLM2", &model, &prompts, &how)?;
    assert!(fared.accepted > 0, "{fared:?}");
    check("SmolLM2, drawn", &model, &prompts, &how.temperature(0.8).top_p(0.9).seed(4))?;
    Ok(())
}

/// Memory for the tokens of an answer, and none for guesses beside them.
#[test]
fn a_tight_budget_changes_nothing() -> Result {
    let config = Config { vocab_size: 12, max_position_embeddings: 400, ..tiny::config() };
    let ample = tiny::hybrid(&config, 7)?;
    let per_block = 2 * config.num_key_value_heads * KvPool::BLOCK * config.head_dim * 4;
    let block = per_block * config.num_hidden_layers;
    let prompts: Vec<_> = (80..96).map(|length| phrases(&config, length as u64, length)).collect();
    let how = GenerationConfig::default().max_tokens(30);
    for blocks in [1, 2] {
        let model = ample.with_cache_budget(blocks * block)?;
        check("tight", &model, &prompts, &how)?;
    }
    // An answer that ends with the block, where a guess would begin the next.
    let how = GenerationConfig::default().max_tokens(40);
    let (mut conversation, prompt) = (ample.conversation(400)?, phrases(&config, 3, 60));
    let whole = ample.stream_in(&mut conversation, prompt.clone(), &how)?.collect_answer()?;
    let model = ample.with_cache_budget(block)?;
    let ahead = how.speculate(PromptLookup::default().tokens(15).shortest(1));
    let mut conversation = model.conversation(400)?;
    let stream = model.stream_in(&mut conversation, prompt, &ahead)?;
    let ids: Vec<u32> = stream.map_while(|token| Some(token.ok()?.id)).collect();
    assert_eq!(ids, whole.ids[..KvPool::BLOCK - 60 + 1]);
    Ok(())
}

/// The token that an answer says at some point is one whose embedding overflows: the same error in the same place.
#[test]
fn numbers_that_overflow_do_so_in_the_same_place() -> Result {
    let config = Config { vocab_size: 30, ..tiny::config() };
    let weights = tiny::weights(&config, 6)?;
    let sound = HybridModel::new(Transformer::new(&config, &mut weights.clone())?, None)?;
    let how = GenerationConfig::default().max_tokens(30);
    let mut failed = 0;
    for seed in 0..8 {
        let prompt = phrases(&config, seed, 40);
        let answer = sound.generate(prompt.clone(), &how)?;
        let read = &answer.prompt_ids;
        let Some(said) = answer.ids.iter().find(|id| !read.contains(id)) else { continue };
        let table = "model.embed_tokens.weight";
        let mut rows: Vec<Vec<f32>> = weights[table].to_vec2()?;
        rows[*said as usize].fill(f32::INFINITY);
        let mut weights = weights.clone();
        weights.insert(table.into(), Tensor::new(rows, &Device::Cpu)?);
        let model = HybridModel::new(Transformer::new(&config, &mut weights)?, None)?;
        failed += usize::from(came(model.stream(prompt.clone(), &how)?).0.end.is_err());
        check("overflow", &model, &[prompt], &how)?;
    }
    assert!(failed > 0);
    Ok(())
}

/// What it is told of the tokens of each pass; it says how often each has occurred.
#[derive(Debug, Default)]
struct Counts {
    passes: AtomicUsize,
    rows: AtomicUsize,
}

impl SideSource for Counts {
    fn signal(&self, texts: &[Seen<'_>], _: Range<usize>) -> hybrid_attention::Result<SideSignal> {
        let of = |(ids, at): (&[u32], usize)| {
            ids[..=at].iter().filter(|id| **id == ids[at]).count() as f32
        };
        let counts = texts.iter().flat_map(|text| text.rows().map(|at| of((text.ids(), at))));
        let counts: Vec<f32> = counts.collect();
        let rows = counts.len();
        self.passes.fetch_add(1, Ordering::Relaxed);
        self.rows.fetch_add(rows, Ordering::Relaxed);
        Ok(SideSignal::new().layer(1, Tensor::from_vec(counts, (rows, 1), &Device::Cpu)?))
    }
}

/// A model that looks something up by tokens is the same; and what the source sees of the passes is what the answer
/// says of them: each guess that was right is a pass less, and each guess a row.
#[test]
fn what_is_looked_up_is_the_same_and_passes_are_as_said() -> Result {
    let config = Config { vocab_size: 12, ..tiny::config() };
    let column = |seed| -> Result<Linear> {
        Ok(Linear::dense(&tiny::noise(seed, &[config.intermediate_size, 1], 0.3)?)?)
    };
    let columns = BTreeMap::from([(1, SideProjection { gate: column(1)?, up: column(2)? })]);
    let counts = Arc::new(Counts::default());
    let counting = tiny::transformer(&config, 9)?
        .with_side_source(Arc::clone(&counts) as Arc<dyn SideSource>, columns)?;
    let model = HybridModel::new(counting, None)?;
    let prompts: Vec<_> = (0..4).map(|seed| phrases(&config, seed, 50)).collect();
    let how = GenerationConfig::default().max_tokens(60);
    assert_mixed("counts", check("counts", &model, &prompts, &how)?);
    let drawn = how.clone().temperature(0.5).seed(8);
    assert_mixed("counts, drawn", check("counts, drawn", &model, &prompts, &drawn)?);
    for (prompt, lookup) in prompts.into_iter().zip(lookups()) {
        let before = [&counts.passes, &counts.rows].map(|it| it.load(Ordering::Relaxed));
        let answer = model.generate(prompt, &how.clone().speculate(lookup))?;
        let passes = counts.passes.load(Ordering::Relaxed) - before[0];
        let rows = counts.rows.load(Ordering::Relaxed) - before[1];
        let Speculated { drafted, accepted } = answer.speculated.ok_or("nothing was guessed")?;
        // The prompt's pass gives the first token, and the last one does not run.
        assert_eq!(passes, answer.ids.len() - accepted);
        assert_eq!(rows, 50 + (passes - 1) + drafted);
    }
    Ok(())
}

#[test]
fn documents_that_were_read_before_are_the_same() -> Result {
    let config = Config { vocab_size: 12, ..tiny::config() };
    let model = tiny::hybrid(&config, 2)?;
    let mind = Thinking::none().on(model.thought_model())?;
    let document = mind.read_document(&tiny::tokens(&config, 1, 30), 0, DType::F32)?;
    let prompt = Prompt::default().document(&document).plain_ids(&tiny::tokens(&config, 1, 9));
    check("documents", &model, &[prompt], &GenerationConfig::default().max_tokens(50))?;
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn any_answer_is_the_same(
        shape in tiny::configs(), (seed, length) in (0u64..100, 1usize..120), max_tokens in 0usize..50,
        temperature in prop_oneof![Just(0.0), 0.1..1.5], draw in any::<u64>(), top_k in 0usize..6,
        penalties in (0.8..1.3, -0.5..0.5), stop_id in prop::option::of(0u32..9),
        (tokens, shortest, more) in (1usize..=15, 1usize..5, 0usize..20),
    ) {
        holds((|| {
            let config = Config { vocab_size: shape.vocab_size.clamp(3, 9), ..shape };
            let model = tiny::hybrid(&config, seed)?;
            let how = GenerationConfig::default().max_tokens(max_tokens).eos_ids([]).top_logprobs(2)
                .temperature(temperature).seed(draw).top_k(top_k)
                .repetition_penalty(penalties.0).presence_penalty(penalties.1);
            let stop_id = stop_id.filter(|id| (*id as usize) < config.vocab_size);
            let how = stop_id.into_iter().fold(how, GenerationConfig::stop_id);
            let prompt = phrases(&config, seed, length);
            let (expected, _) = came(model.stream(prompt.clone(), &how)?);
            let lookup = PromptLookup::default().tokens(tokens).shortest(shortest).longest(shortest + more);
            let (got, _) = came(model.stream(prompt, &how.speculate(lookup))?);
            assert_eq!(got, expected);
            Ok(())
        })())?;
    }
}

// ---- conversations ----

/// What a conversation holds.
fn held(conversation: &Conversation) -> (Vec<u32>, usize, usize) {
    let cache = conversation.cache();
    (conversation.ids().to_vec(), cache.len(), cache.bytes())
}

/// Turn by turn, with answers that are dropped in the middle, a conversation is the same.
#[test]
fn a_conversation_goes_on_as_without() -> Result {
    for sliding_window in [None, Some(40)] {
        let config = Config { vocab_size: 12, sliding_window, ..tiny::config() };
        let model = tiny::hybrid(&config, 5)?;
        let how = GenerationConfig::default().max_tokens(40);
        let ahead = how.clone().speculate(PromptLookup::default().tokens(15));
        for dropped_after in 0..20 {
            let (mut plain, mut quick) = (model.conversation(400)?, model.conversation(400)?);
            let mut text = tiny::tokens(&config, dropped_after as u64, 30);
            for turn in 0..3 {
                let prompt = text.as_slice();
                if turn == 1 {
                    for (conversation, how) in [(&mut plain, &how), (&mut quick, &ahead)] {
                        let stream = model.stream_in(conversation, prompt, how)?;
                        assert_eq!(
                            stream.take(dropped_after).filter(std::result::Result::is_ok).count(),
                            dropped_after
                        );
                    }
                    assert_eq!(plain.ids(), quick.ids());
                    let mut forks = [plain.fork(), quick.fork()];
                    let [a, b] = &mut forks;
                    let other = [prompt, &[3, 4, 5]].concat();
                    let (expected, _) = came(model.stream_in(a, other.as_slice(), &how)?);
                    assert_eq!(came(model.stream_in(b, other, &ahead)?).0, expected);
                    assert_eq!(held(b), held(a));
                }
                let mut stream = model.stream_in(&mut plain, prompt, &how)?;
                let kept = stream.read_prompt()?;
                let (expected, _) = came(stream);
                let mut stream = model.stream_in(&mut quick, prompt, &ahead)?;
                assert_eq!(stream.read_prompt()?, kept);
                let (got, speculated) = came(stream);
                assert_eq!(got, expected, "turn {turn}, {dropped_after}");
                assert!(speculated.is_some());
                assert_eq!(held(&quick), held(&plain), "turn {turn}, {dropped_after}");
                text = [plain.ids(), &tiny::tokens(&config, turn + 70, 5)].concat();
            }
        }
    }
    Ok(())
}

#[test]
fn a_chat_says_the_same() -> Result {
    let Some(file) = smollm2() else { return Ok(()) };
    let model = HybridModel::from_gguf(file, None, &Device::Cpu)?;
    let how = GenerationConfig::default().max_tokens(12);
    let (mut plain, mut quick) = (model.conversation(300)?, model.conversation(300)?);
    for said in ["Say: one, two, three, four, five, six.", "Say it again."] {
        let (expected, _) = came(model.say(&mut plain, said, &how)?);
        let ahead = how.clone().speculate(PromptLookup::default());
        assert_eq!(came(model.say(&mut quick, said, &ahead)?).0, expected);
        assert_eq!(quick.messages(), plain.messages());
        assert_eq!(held(&quick), held(&plain));
    }
    Ok(())
}

/// However far an answer has come, guesses waiting or not, it ends where it is cancelled, and the conversation goes on.
#[test]
fn what_is_cancelled_ends_at_once() -> Result {
    let config = Config { vocab_size: 12, ..tiny::config() };
    let model = tiny::hybrid(&config, 5)?;
    let plain = GenerationConfig::default().max_tokens(40);
    let ahead = plain.clone().speculate(PromptLookup::default());
    let prompt = phrases(&config, 1, 40);
    let whole = model.generate(prompt.clone(), &ahead)?;
    let speculated = whole.speculated.ok_or("nothing was guessed")?;
    assert!(speculated.accepted > 5, "{speculated:?}");
    for after in 1..40 {
        let mut goes_on = Vec::new();
        for how in [&plain, &ahead] {
            let (mut conversation, cancel) = (model.conversation(200)?, Cancel::default());
            let stream = model.stream_in(&mut conversation, prompt.clone(), how)?;
            let mut stream = stream.cancel(cancel.clone());
            let ids: Vec<u32> =
                stream.by_ref().take(after).map(|it| Ok(it?.id)).collect::<Result<_>>()?;
            assert_eq!(ids, whole.ids[..after]);
            cancel.cancel();
            assert!(matches!(stream.next(), Some(Err(Error::Cancelled))), "after {after}");
            assert!(stream.next().is_none());
            drop(stream);
            let (again, _) = came(model.stream_in(&mut conversation, prompt.clone(), how)?);
            goes_on.push((again, held(&conversation)));
        }
        assert_eq!(goes_on[0], goes_on[1], "after {after}");
    }
    let stream = model.stream(prompt, &ahead)?.cancel(Cancel::after(Duration::ZERO));
    assert!(matches!(stream.collect_answer(), Err(Error::Cancelled)));
    Ok(())
}

// ---- in distribution ----

/// `Σ (count - expected)² / expected`, and its degrees of freedom; what is expected less than 5 times is counted together.
fn chi_square(
    counts: &BTreeMap<Vec<u32>, usize>,
    expected: &BTreeMap<Vec<u32>, f64>,
) -> (f64, f64) {
    let count = |text: &Vec<u32>| counts.get(text).copied().unwrap_or(0) as f64;
    let (often, rarely): (Vec<_>, Vec<_>) = expected.iter().partition(|(_, it)| **it >= 5.0);
    let mut cells: Vec<(f64, f64)> =
        often.into_iter().map(|(text, expected)| (count(text), *expected)).collect();
    let rarely = rarely.into_iter().map(|(text, expected)| (count(text), *expected));
    let rarely = rarely.fold((0.0, 0.0), |sum, it| (sum.0 + it.0, sum.1 + it.1));
    cells.extend((rarely.1 > 0.0).then_some(rarely));
    let statistic = cells.iter().map(|(count, expected)| (count - expected).powi(2) / expected);
    (statistic.sum(), cells.len() as f64 - 1.0)
}

/// The probability of every answer of so many tokens, by the sampler's own distributions after whole passes: no cache,
/// no guesses.
fn by_definition(
    model: &Transformer,
    config: &GenerationConfig,
    prompt: &[u32],
    tokens: usize,
) -> Result<BTreeMap<Vec<u32>, f64>> {
    let mut texts = BTreeMap::from([(Vec::new(), 1.0)]);
    for _ in 0..tokens {
        let mut longer = BTreeMap::new();
        for (text, probability) in texts {
            let ids = [prompt, &text].concat();
            let batch = Batch::one(ids.len())?;
            let logits = tiny::logits(model, &model.embed_ids(&ids)?, Pass::Causal(&batch))?;
            let last = logits.narrow(0, ids.len() - 1, 1)?.flatten_all()?.to_vec1::<f32>()?;
            for (id, share) in Sampler::new(config, &ids)?.distribution(&last)? {
                longer.insert([text.as_slice(), &[id]].concat(), probability * share);
            }
        }
        texts = longer;
    }
    Ok(texts)
}

/// Answers that are drawn with guesses are as frequent as they are probable. The statistic of right draws exceeds the bound
/// once in a million tables; draws at another temperature do by far.
#[test]
fn draws_with_guesses_follow_the_distribution() -> Result {
    const DRAWS: usize = 6000;
    const TOKENS: usize = 4;
    let config = Config { vocab_size: 5, ..tiny::config() };
    let model = tiny::hybrid(&config, 12)?;
    let prompt: Vec<u32> = [0u32, 1, 2, 3, 4].repeat(6);
    let how =
        |temperature: f64| GenerationConfig::default().max_tokens(TOKENS).temperature(temperature);
    let lookup = PromptLookup::default().tokens(15).shortest(1);
    let draw = |temperature: f64| -> Result<(BTreeMap<Vec<u32>, usize>, Speculated)> {
        let (mut counts, mut all) = (BTreeMap::new(), Speculated::default());
        for seed in 0..DRAWS as u64 {
            let how = how(temperature).seed(seed).speculate(lookup.clone());
            let answer = model.generate(prompt.as_slice(), &how)?;
            let Speculated { drafted, accepted } = answer.speculated.unwrap_or_default();
            (all.drafted, all.accepted) = (all.drafted + drafted, all.accepted + accepted);
            *counts.entry(answer.ids).or_default() += 1;
        }
        Ok((counts, all))
    };
    let expected = by_definition(model.transformer(), &how(1.0), &prompt, TOKENS)?;
    let sum: f64 = expected.values().sum();
    assert!(expected.len() == 625 && (sum - 1.0).abs() < 1e-9, "{sum}");
    let expected = expected.into_iter().map(|(text, it)| (text, it * DRAWS as f64)).collect();

    let (counts, fared) = draw(1.0)?;
    // Guesses are tried in many of the draws, and many of them are wrong.
    assert!(fared.drafted > DRAWS / 5 && fared.accepted > DRAWS / 30, "{fared:?}");
    assert!(fared.accepted < fared.drafted / 2, "{fared:?}");
    // Wilson & Hilferty (1931): the cube root is nearly normal; 4.75 deviations are met by chance once in 10⁶.
    let bound = |freedom: f64| {
        let spread = 2.0 / (9.0 * freedom);
        freedom * (1.0 - spread + 4.75 * spread.sqrt()).powi(3)
    };
    let (statistic, freedom) = chi_square(&counts, &expected);
    assert!(freedom > 50.0 && statistic < bound(freedom), "{statistic} for {freedom}");
    let (statistic, _) = chi_square(&draw(1.15)?.0, &expected);
    assert!(statistic > bound(freedom), "{statistic} for {freedom}");
    Ok(())
}

// ---- what cannot be ----

#[test]
fn settings_outside_their_range_are_refused() -> Result {
    let model = tiny::hybrid(&tiny::config(), 1)?;
    let lookup = PromptLookup::default;
    for (lookup, message) in [
        (lookup().tokens(0), "tokens: expected 1 to 15, got 0"),
        (lookup().tokens(16), "tokens: expected 1 to 15, got 16"),
        (lookup().tokens(1_000_000_000), "tokens: expected 1 to 15, got 1000000000"),
        (lookup().tokens(usize::MAX), "tokens: expected 1 to 15, got 18446744073709551615"),
        (lookup().longest(0), "longest: expected 1 to 64, got 0"),
        (lookup().longest(65), "longest: expected 1 to 64, got 65"),
        (lookup().longest(usize::MAX), "longest: expected 1 to 64, got 18446744073709551615"),
        (lookup().shortest(0), "shortest: expected 1 to 8, got 0"),
        (lookup().shortest(9), "shortest: expected 1 to 8, got 9"),
        (lookup().shortest(usize::MAX), "shortest: expected 1 to 8, got 18446744073709551615"),
        (lookup().shortest(3).longest(2), "shortest: expected 1 to 2, got 3"),
    ] {
        let config = GenerationConfig::default().speculate(lookup);
        let expected = Err(format!("parameter speculate: {message}"));
        let said = |result: hybrid_attention::Result<()>| result.map_err(|it| it.to_string());
        assert_eq!(said(config.validate()), expected);
        assert_eq!(said(model.stream([1, 2], &config).map(drop)), expected);
        assert_eq!(said(model.generate_many([[1u32, 2]], &config).map(drop)), expected);
    }
    for (tokens, shortest, longest) in [(1, 1, 1), (15, 64, 64), (15, 1, 64)] {
        let lookup = lookup().tokens(tokens).shortest(shortest).longest(longest);
        GenerationConfig::default().speculate(lookup).validate()?;
    }
    Ok(())
}

#[test]
fn settings_are_read_from_json() -> Result {
    let read = |json: &str| serde_json::from_str::<GenerationConfig>(json);
    let config = read(r#"{"speculate": {"tokens": 4}}"#)?;
    assert_eq!(config.speculate, Some(PromptLookup::default().tokens(4)));
    assert_eq!(read(r#"{"speculate": {}}"#)?.speculate, Some(PromptLookup::default()));
    assert_eq!(read(r#"{"speculate": null}"#)?, GenerationConfig::default());
    for json in [
        r#"{"speculate": {"token": 4}}"#,
        r#"{"speculate": {"tokens": -1}}"#,
        r#"{"speculate": 4}"#,
    ] {
        assert!(read(json).is_err(), "{json}");
    }
    // Of an answer, only what was guessed is written.
    let model = tiny::hybrid(&tiny::config(), 1)?;
    let plain = GenerationConfig::default().max_tokens(3);
    let ahead = plain.clone().speculate(PromptLookup::default());
    let of = |config| -> Result<serde_json::Value> {
        Ok(serde_json::to_value(model.generate([1, 2, 1, 2], config)?)?)
    };
    assert!(of(&plain)?.get("speculated").is_none());
    let speculated = &of(&ahead)?["speculated"];
    assert!(speculated["drafted"].is_u64() && speculated["accepted"].is_u64(), "{speculated}");
    Ok(())
}
