//! One decoding loop, met from every side: `generate`, `stream`, conversations, stops and limits.

use std::collections::HashMap;
use std::error::Error;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::LazyLock;
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

use candle_core::{D, DType, Device, Tensor};
use candle_nn::ops::log_softmax;
use hybrid_attention::model::{Batch, KvPool, Pass, Transformer};
use hybrid_attention::refine::Interpolate;
use hybrid_attention::thought::{EncodedBatch, HandOff};
use hybrid_attention::{
    Answer, Answers, Cancel, Config, Conversation, Error as Failure, GenerationConfig, HybridModel,
    Message, Progress, Prompt, StopReason, Thinking, Token, TokenStream, Tokenizer,
};
use hybrid_attention_testing::tiny::holds;
use proptest::prelude::*;
use proptest::sample::select;
use rand::{Rng, SeedableRng};
use rand_chacha::ChaCha8Rng;

type Result<T = ()> = std::result::Result<T, Box<dyn Error>>;

const VOCAB: u32 = 371;
const BOS: u32 = 1;
/// Short, so that tests can fill it.
const SHORT: usize = 48;
const LONG: usize = 2048;

fn config(context: usize, window: Option<usize>) -> Config {
    Config {
        vocab_size: VOCAB as usize,
        hidden_size: 16,
        intermediate_size: 24,
        num_hidden_layers: 3,
        num_attention_heads: 4,
        num_key_value_heads: 2,
        head_dim: 4,
        rms_norm_eps: 1e-5,
        rope_theta: 10_000.0,
        sliding_window: window,
        max_position_embeddings: context,
        tie_word_embeddings: false,
        rope_scaling: None,
        query_scaling: None,
        experts: None,
        bos_token_id: Some(BOS),
        eos_token_ids: Vec::new(),
    }
}

fn transformer(config: &Config) -> Result<Transformer> {
    let mut rng = ChaCha8Rng::seed_from_u64(1);
    let mut weights = HashMap::new();
    for (name, shape) in config.weights() {
        let count = shape.iter().product();
        let values: Vec<f32> = (0..count).map(|_| rng.random_range(-1.0..1.0)).collect();
        weights.insert(name, Tensor::from_vec(values, shape, &Device::Cpu)?);
    }
    Ok(Transformer::new(config, &mut weights)?)
}

fn tokenizer() -> Result<Tokenizer> {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/tokenizer/llama");
    Ok(Tokenizer::from_folder(folder.as_ref())?.ok_or("no tokenizer")?)
}

/// Without end-of-sequence tokens, so that an answer is as long as it is asked to be.
fn model(context: usize, window: Option<usize>) -> Result<HybridModel> {
    Ok(HybridModel::new(transformer(&config(context, window))?, Some(tokenizer()?))?)
}

static MODEL: LazyLock<Option<HybridModel>> = LazyLock::new(|| model(LONG, None).ok());

fn shared() -> Result<&'static HybridModel> {
    Ok(MODEL.as_ref().ok_or("no model")?)
}

/// Runs on to `max_tokens`.
fn endless() -> GenerationConfig {
    GenerationConfig::default().eos_ids([])
}

/// A long and varied text.
fn free_run() -> GenerationConfig {
    endless().temperature(1.5).seed(8).max_tokens(60)
}

fn error_of<T>(result: hybrid_attention::Result<T>) -> Result<String> {
    Ok(result.err().ok_or("no error")?.to_string())
}

/// Tokens of no meaning, none of them special.
fn some_ids(count: usize) -> Vec<u32> {
    (0..count as u32).map(|i| 3 + (i * i * 31 + i * 7) % (VOCAB - 3)).collect()
}

/// `(seq, vocab)`: the causal log-probabilities after each of `ids`, without a cache.
fn reference(transformer: &Transformer, ids: &[u32]) -> Result<Vec<Vec<f32>>> {
    let batch = Batch::one(ids.len())?;
    let xs = transformer.embed_ids(ids)?;
    let h = transformer.forward(&xs, transformer.all_layers(), Pass::Causal(&batch))?;
    Ok(log_softmax(&transformer.logits(&h)?, D::Minus1)?.to_vec2()?)
}

fn assert_close(a: &[f32], b: &[f32]) {
    assert_eq!(a.len(), b.len());
    for (a, b) in a.iter().zip(b) {
        assert!((a - b).abs() < 5e-5, "{a} {b}");
    }
}

/// Equal but for the time it took, and rounding.
fn assert_same(a: &Answer, b: &Answer) {
    assert_eq!((&a.prompt_ids, &a.ids, &a.text), (&b.prompt_ids, &b.ids, &b.text));
    assert_eq!((a.stop, a.drift()), (b.stop, b.drift()));
    assert_close(&a.logprobs, &b.logprobs);
}

// ---- generate and stream ----

fn settings() -> impl Strategy<Value = GenerationConfig> {
    let sampling = (0.0..2.0f64, 0usize..20, 0.1..=1.0f64, 0.0..0.3f64, 0.8..1.5f64, any::<u64>());
    let stops = (
        prop::collection::vec("[a-e ]{1,2}", 0..2),
        prop::collection::vec(0..VOCAB, 0..8),
        prop::collection::vec(0..VOCAB, 0..8),
    );
    let thinking = (0usize..3, 0.0..=1.0f64, 0usize..4);
    let more = (0usize..20, 0usize..4, any::<bool>(), thinking);
    (sampling, stops, more).prop_map(|(sampling, (texts, ids, eos), more)| {
        let (temperature, top_k, top_p, min_p, repetition, seed) = sampling;
        let (max_tokens, top, prompt_logprobs, (passes, weight, every)) = more;
        let thinking = Thinking::new(passes).span(1..3).refine(Interpolate::new(weight));
        let config = GenerationConfig::default()
            .temperature(temperature)
            .top_k(top_k)
            .top_p(top_p)
            .min_p(min_p)
            .repetition_penalty(repetition)
            .seed(seed)
            .max_tokens(max_tokens)
            .top_logprobs(top)
            .prompt_logprobs(prompt_logprobs)
            .eos_ids(eos)
            .thinking(thinking.rethink_every(every));
        let config = texts.into_iter().fold(config, GenerationConfig::stop);
        ids.into_iter().fold(config, GenerationConfig::stop_id)
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn generate_is_stream_collected(config in settings(), text in "[a-z ]{0,20}") {
        let model = shared().map_err(|error| TestCaseError::fail(error.to_string()))?;
        let answer = model.generate(&text, &config)?;
        let mut stream = model.stream(&text, &config)?;
        let mut tokens = Vec::new();
        for token in &mut stream {
            tokens.push(token?);
        }
        prop_assert!(stream.next().is_none());
        prop_assert_eq!(stream.stop(), Some(answer.stop));
        prop_assert_eq!(stream.prompt_ids(), &answer.prompt_ids);
        prop_assert_eq!(stream.prompt_logprobs(), answer.prompt_logprobs.as_deref());
        prop_assert_eq!(stream.traces().len(), answer.traces.len());
        prop_assert_eq!(tokens.iter().map(|t| t.id).collect::<Vec<_>>(), answer.ids);
        prop_assert_eq!(tokens.iter().map(|t| t.logprob).collect::<Vec<_>>(), answer.logprobs);
        prop_assert_eq!(tokens.iter().map(|t| t.text.as_str()).collect::<String>(), answer.text);
        prop_assert_eq!(
            tokens.into_iter().map(|t| t.top_logprobs).collect::<Vec<_>>(), answer.top_logprobs
        );
    }

    /// With any stop string out of the text, the text ends where that begins.
    #[test]
    fn a_text_ends_before_its_stop_string(from in 0usize..60, length in 1usize..6) {
        let model = shared().map_err(|error| TestCaseError::fail(error.to_string()))?;
        let text = model.generate("the cat", &free_run())?.text;
        let stop: String = text.chars().skip(from).take(length).collect();
        prop_assume!(!stop.is_empty());
        let answer = model.generate("the cat", &free_run().stop(&stop))?;
        prop_assert_eq!(answer.stop, StopReason::StopString);
        prop_assert_eq!(Some(answer.text), text.split(&stop).next().map(str::to_owned));
    }
}

/// Thinking again on the way changes what is said, not how it is told: the stop string ends the same
/// text, and every token has the same log-probabilities.
#[test]
fn stop_strings_and_logprobs_hold_while_thinking_again() -> Result {
    let model = shared()?;
    let thinking = Thinking::new(1).span(1..3).refine(Interpolate::new(0.5)).rethink_every(4);
    let how = free_run().max_tokens(24).top_logprobs(2).thinking(thinking);
    let whole = model.generate("the cat", &how)?;
    assert_eq!(whole.traces.len(), 1 + 23 / 4);
    for (from, _) in whole.text.char_indices() {
        let stop: String = whole.text[from..].chars().take(2).collect();
        let answer = model.generate("the cat", &how.clone().stop(&stop))?;
        assert_eq!(Some(answer.text.as_str()), whole.text.split(&stop).next());
        assert_eq!(answer.stop, StopReason::StopString);
        assert_eq!(answer.ids, whole.ids[..answer.ids.len()]);
        assert_eq!(answer.top_logprobs, whole.top_logprobs[..answer.ids.len()]);
    }
    Ok(())
}

#[test]
fn the_text_is_what_the_tokenizer_makes_of_the_ids() -> Result {
    let model = shared()?;
    let tokenizer = tokenizer()?;
    for seed in 0..20 {
        let answer = model.generate("the cat", &free_run().seed(seed))?;
        let whole = [answer.prompt_ids, answer.ids].concat();
        assert_eq!(format!("the cat{}", answer.text), tokenizer.decode(&whole, true));
    }
    Ok(())
}

#[test]
fn a_stop_string_is_met_across_a_border_between_tokens() -> Result {
    let model = shared()?;
    let tokens: Vec<_> =
        model.stream("the cat", &free_run())?.collect::<hybrid_attention::Result<_>>()?;
    let whole: String = tokens.iter().map(|token| token.text.as_str()).collect();
    let mut crossed = 0;
    for pair in tokens.windows(2) {
        let last = pair[0].text.chars().last();
        let first = pair[1].text.chars().next();
        let (Some(last), Some(first)) = (last, first) else { continue };
        let stop = format!("{last}{first}");
        let answer = model.generate("the cat", &free_run().stop(&stop))?;
        assert_eq!(answer.stop, StopReason::StopString);
        assert_eq!(Some(answer.text.as_str()), whole.split(&stop).next());
        crossed += 1;
    }
    assert!(crossed > 20, "{crossed}");
    Ok(())
}

#[test]
fn an_answer_ends_with_the_first_of_its_end_tokens() -> Result {
    let model = shared()?;
    let free = model.generate("the cat", &free_run())?;
    let text_of =
        |n| Ok::<_, Box<dyn Error>>(model.generate("the cat", &free_run().max_tokens(n))?);
    for (a, b) in [(30, 20), (5, 40), (0, 1), (59, 58)] {
        let (a, b) = (free.ids[a], free.ids[b]);
        let first = free.ids.iter().position(|&id| id == a || id == b).ok_or("neither")?;
        let as_eos = free_run().eos_ids([a, b]);
        let as_stop = free_run().stop_id(a).stop_id(b);
        let as_both = as_eos.clone().stop_id(a).stop_id(b);
        for (config, stop) in
            [(as_eos, StopReason::Eos), (as_stop, StopReason::StopId), (as_both, StopReason::Eos)]
        {
            let answer = model.generate("the cat", &config)?;
            assert_eq!(answer.stop, stop);
            assert_eq!(answer.ids, free.ids[..=first], "the end token is among the ids");
            assert_eq!(answer.text, text_of(first)?.text, "but not in the text");
        }
    }
    Ok(())
}

#[test]
fn the_checkpoints_own_end_tokens_count_unless_others_are_given() -> Result {
    let free = shared()?.generate("the cat", &free_run())?;
    let mut config = config(LONG, None);
    config.eos_token_ids = vec![free.ids[9], free.ids[4]];
    let model = HybridModel::new(transformer(&config)?, Some(tokenizer()?))?;
    assert_eq!(model.eos_ids(), config.eos_token_ids);
    let own = GenerationConfig::default().temperature(1.5).seed(8).max_tokens(60);
    let answer = model.generate("the cat", &own)?;
    assert_eq!(answer.stop, StopReason::Eos);
    assert!(answer.ids.len() <= 5 && free.ids.starts_with(&answer.ids), "{:?}", answer.ids);
    assert_same(&model.generate("the cat", &free_run())?, &free);
    Ok(())
}

#[test]
fn max_tokens_cuts_and_changes_nothing_else() -> Result {
    let model = shared()?;
    let all = model.generate("the cat", &free_run())?;
    for n in [0, 1, 2, 59, 60] {
        let some = model.generate("the cat", &free_run().max_tokens(n))?;
        assert_eq!(some.ids, all.ids[..n]);
        assert_eq!(some.logprobs, all.logprobs[..n]);
        assert_eq!(some.stop, StopReason::MaxTokens);
    }
    Ok(())
}

#[test]
fn the_context_is_filled_to_the_last_position() -> Result {
    let model = model(SHORT, None)?;
    let run = |prompt: usize, max_tokens| {
        let answer = model.generate(some_ids(prompt), &endless().max_tokens(max_tokens))?;
        Ok::<_, hybrid_attention::Error>((answer.ids.len(), answer.stop))
    };
    assert_eq!(run(SHORT, 9)?, (1, StopReason::Context));
    assert_eq!(run(SHORT, 1)?, (1, StopReason::MaxTokens));
    assert_eq!(run(SHORT, 0)?, (0, StopReason::MaxTokens));
    assert_eq!(run(SHORT - 10, usize::MAX)?, (11, StopReason::Context));
    assert_eq!(run(SHORT - 10, 11)?, (11, StopReason::MaxTokens));
    for thinking in [Thinking::none(), Thinking::new(1), Thinking::new(1).span(1..2)] {
        let config = endless().thinking(thinking);
        let error = error_of(model.generate(some_ids(SHORT + 1), &config))?;
        assert_eq!(error, "context full: the model has room for 48 positions, 49 requested");
        assert_eq!(model.generate(some_ids(SHORT), &config)?.stop, StopReason::Context);
    }
    Ok(())
}

/// Also over the borders between chunks of the prompt, and under a window.
#[test]
fn prompt_logprobs_are_those_of_one_causal_pass() -> Result {
    for window in [None, Some(7)] {
        let model = model(LONG, window)?;
        for length in [1, 2, 64, 65, 512, 513, 1100] {
            let ids = some_ids(length);
            let config = endless().max_tokens(2).prompt_logprobs(true);
            let answer = model.generate(ids.as_slice(), &config)?;
            let got = answer.prompt_logprobs.clone().ok_or("no prompt logprobs")?;
            assert_eq!(got.first(), Some(&None), "nothing comes before the first");
            let got: Vec<f32> = got.into_iter().skip(1).flatten().collect();
            let expected = reference(model.transformer(), &ids)?;
            let expected: Vec<f32> =
                expected.iter().zip(&ids[1..]).map(|(row, &id)| row[id as usize]).collect();
            assert_close(&got, &expected);
            let without = model.generate(ids, &config.prompt_logprobs(false))?;
            assert_eq!(without.prompt_logprobs, None);
            assert_same(&without, &answer);
        }
    }
    Ok(())
}

#[test]
fn a_dropped_stream_leaves_the_conversation_of_use() -> Result {
    let model = shared()?;
    let mut conversation = model.conversation(200)?;
    let mut stream = model.stream_in(&mut conversation, "the cat", &free_run())?;
    let first = stream.next().ok_or("ended")??;
    assert_eq!(stream.stop(), None);
    drop(stream);
    let fresh = model.generate("the cat", &free_run())?;
    assert_eq!(first.id, fresh.ids[0]);
    let again = model.stream_in(&mut conversation, "the cat", &free_run())?.collect_answer()?;
    assert_same(&again, &fresh);
    let rest = model.stream("the cat", &free_run())?.take(3).count();
    assert_eq!(rest, 3);
    Ok(())
}

// ---- what is refused ----

#[test]
fn a_prompt_needs_a_token() -> Result {
    let model = shared()?;
    let config = endless().max_tokens(1);
    let empty = "the prompt is empty: at least one token is needed";
    assert_eq!(error_of(model.generate(Vec::new(), &config))?, empty);
    assert_eq!(error_of(model.generate(Prompt::default(), &config))?, empty);
    assert_eq!(error_of(model.think([], &config))?, empty);
    // Text without characters still begins with BOS.
    assert_eq!(model.generate("", &config)?.prompt_ids, [BOS]);
    Ok(())
}

#[test]
fn text_needs_a_tokenizer() -> Result {
    let model = HybridModel::new(transformer(&config(LONG, None))?, None)?;
    let config = endless().max_tokens(2);
    let refusal = |what| {
        format!("no tokenizer in this checkpoint: {what} needs one; hand in token ids instead")
    };
    assert_eq!(error_of(model.generate("the cat", &config))?, refusal("a text prompt"));
    assert_eq!(error_of(model.chat(&[Message::user("hi")], &config))?, refusal("a chat"));
    assert_eq!(error_of(model.generate([1], &config.clone().stop("x")))?, refusal("a stop string"));
    let answer = model.generate([1, 5], &config)?;
    assert_eq!(answer.ids, shared()?.generate([1, 5], &config)?.ids);
    assert_eq!(answer.text, "");
    Ok(())
}

#[test]
fn ids_beyond_the_vocabulary_are_named() -> Result {
    let model = shared()?;
    assert_eq!(
        error_of(model.generate([5, 371, 6], &endless()))?,
        "token id 371 at position 1: expected less than the vocabulary of 371"
    );
    assert_eq!(
        error_of(model.think([u32::MAX], &endless()))?,
        "token id 4294967295 at position 0: expected less than the vocabulary of 371"
    );
    // The position is that in the prompt, also where its beginning is known already.
    let mut conversation = model.conversation(100)?;
    model.stream_in(&mut conversation, [5, 6, 7], &endless())?.read_prompt()?;
    assert_eq!(conversation.ids(), [5, 6, 7]);
    assert_eq!(
        error_of(model.stream_in(&mut conversation, [5, 6, 7, 8, 999], &endless()))?,
        "token id 999 at position 4: expected less than the vocabulary of 371"
    );
    // A stop that could never come is a mistake too.
    assert_eq!(
        error_of(model.generate([5], &endless().stop_id(9999)))?,
        "parameter stop_id: expected less than the vocabulary of 371, got 9999"
    );
    assert_eq!(
        error_of(model.generate([5], &endless().eos_ids([2, u32::MAX])))?,
        "parameter eos_ids: expected less than the vocabulary of 371, got 4294967295"
    );
    Ok(())
}

#[test]
fn refusals_say_which_parameter_and_what_would_do() -> Result {
    let config = endless;
    let thinking = |thinking| endless().thinking(thinking);
    let weight = |weight| thinking(Thinking::new(1).refine(Interpolate::new(weight)));
    let reversed = Range { start: 2, end: 1 };
    for (config, expected) in [
        (config().temperature(-1.0), "parameter temperature: expected at least 0, got -1"),
        (config().temperature(f64::NAN), "parameter temperature: expected at least 0, got NaN"),
        (
            config().temperature(f64::INFINITY),
            "parameter temperature: expected at least 0, got inf",
        ),
        (config().top_p(0.0), "parameter top_p: expected within (0, 1], got 0"),
        (config().top_p(1.5), "parameter top_p: expected within (0, 1], got 1.5"),
        (config().top_p(f64::NAN), "parameter top_p: expected within (0, 1], got NaN"),
        (config().min_p(-0.1), "parameter min_p: expected within [0, 1], got -0.1"),
        (config().min_p(1e9), "parameter min_p: expected within [0, 1], got 1000000000"),
        (config().repetition_penalty(0.0), "parameter repetition_penalty: expected above 0, got 0"),
        (
            config().repetition_penalty(f64::INFINITY),
            "parameter repetition_penalty: expected above 0, got inf",
        ),
        (
            config().frequency_penalty(-2.5),
            "parameter frequency_penalty: expected within [-2, 2], got -2.5",
        ),
        (
            config().presence_penalty(f64::NAN),
            "parameter presence_penalty: expected within [-2, 2], got NaN",
        ),
        (config().stop(""), "parameter stop: expected a text that is not empty, got \"\""),
        (thinking(Thinking::new(1025)), "parameter passes: expected at most 1024, got 1025"),
        (
            thinking(Thinking::new(1).span(1..4)),
            "parameter span: expected a non-empty range within 0..3, got 1..4",
        ),
        (
            thinking(Thinking::new(1).span(2..2)),
            "parameter span: expected a non-empty range within 0..3, got 2..2",
        ),
        (
            thinking(Thinking::new(1).span(reversed)),
            "parameter span: expected a non-empty range within 0..3, got 2..1",
        ),
        (
            weight(-0.5),
            "refinement op 0 (Interpolate): parameter weight: expected a share in [0, 1], got -0.5",
        ),
        (
            weight(f64::NAN),
            "refinement op 0 (Interpolate): parameter weight: expected a share in [0, 1], got NaN",
        ),
    ] {
        assert_eq!(error_of(shared()?.generate([5, 6], &config))?, expected);
    }
    let conversation = |room| error_of(shared()?.conversation(room));
    assert_eq!(conversation(0)?, "parameter capacity: expected at least one position, got 0");
    assert_eq!(
        conversation(2049)?,
        "context full: the model has room for 2048 positions, 2049 requested"
    );
    Ok(())
}

/// Every number, from nothing to nonsense: an answer or a typed refusal.
#[test]
fn no_number_makes_it_panic() -> Result {
    let model = shared()?;
    let base = || endless().max_tokens(3).seed(0);
    let (mut answered, mut refused) = (0, 0);
    let mut run = |config: &GenerationConfig| -> Result {
        match model.generate("the cat", config) {
            Ok(answer) => {
                assert_eq!(answer.ids.len(), 3);
                answered += 1;
            }
            Err(
                Failure::Parameter { .. } | Failure::Refinement { .. } | Failure::NotFinite { .. },
            ) => refused += 1,
            Err(other) => return Err(other.into()),
        }
        Ok(())
    };
    let reals = [
        0.0,
        -0.0,
        1.0,
        -1.0,
        0.5,
        2.0,
        1e9,
        -1e9,
        1e-9,
        f64::MIN_POSITIVE,
        5e-324,
        f64::MAX,
        f64::NAN,
        f64::INFINITY,
        f64::NEG_INFINITY,
    ];
    let set: [fn(GenerationConfig, f64) -> GenerationConfig; 6] = [
        GenerationConfig::temperature,
        GenerationConfig::top_p,
        GenerationConfig::min_p,
        GenerationConfig::repetition_penalty,
        GenerationConfig::frequency_penalty,
        GenerationConfig::presence_penalty,
    ];
    for real in reals {
        for set in set {
            run(&set(base(), real))?;
            run(&set(base().temperature(1.0), real))?;
        }
        run(&base().thinking(Thinking::new(1).refine(Interpolate::new(real))))?;
    }
    for whole in [0, 1, 1_000_000_000, usize::MAX] {
        run(&base().top_k(whole).temperature(1.0))?;
        run(&base().top_logprobs(whole))?;
        if whole != 1 {
            run(&base().thinking(Thinking::new(whole)))?;
        }
        run(&base().thinking(Thinking::new(1).span(0..whole)))?;
        run(&base().thinking(Thinking::new(1).span(whole..usize::MAX)))?;
    }
    assert!(answered > 80 && refused > 80, "{answered} answered, {refused} refused");
    Ok(())
}

// ---- conversations ----

fn turn(
    model: &HybridModel,
    conversation: &mut Conversation,
    prompt: &[u32],
    config: &GenerationConfig,
) -> Result<Answer> {
    let answer = model.stream_in(conversation, prompt, config)?.collect_answer()?;
    let fresh = model.generate(prompt, config)?;
    assert_same(&answer, &fresh);
    let scores = |answer: &Answer| -> Option<Vec<f32>> {
        Some(answer.prompt_logprobs.as_ref()?.iter().copied().flatten().collect())
    };
    match (scores(&answer), scores(&fresh)) {
        (Some(some), Some(fresh)) => assert_close(&some, &fresh),
        (some, fresh) => assert_eq!(some, fresh),
    }
    Ok(answer)
}

#[test]
fn a_conversation_answers_as_a_fresh_start_does() -> Result {
    let model = shared()?;
    let config = free_run().max_tokens(12);
    let mut conversation = model.conversation(400)?;
    let mut prompt = some_ids(20);
    for more in 1..6 {
        let answer = turn(model, &mut conversation, &prompt, &config)?;
        let known = [prompt, answer.ids].concat();
        assert_eq!(conversation.ids(), &known[..known.len() - 1], "the last token has not run");
        prompt = [known, some_ids(more * 7)].concat();
    }
    // Departing early, late, at the first token; the same again; shorter; longer than ever.
    for (keep, new) in [(90, 9), (3, 30), (3, 30), (0, 50), (40, 0), (40, 100)] {
        let prompt = [&prompt[..keep], &some_ids(200)[100 - keep..100 - keep + new]].concat();
        turn(model, &mut conversation, &prompt, &config)?;
    }
    conversation.reset();
    assert!(conversation.ids().is_empty());
    turn(model, &mut conversation, &prompt, &config)?;
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Prompts that share more or less with what came before, thought about or not, with mistakes
    /// in between, with and without a window.
    #[test]
    fn any_conversation_answers_as_a_fresh_start_does(
        window in prop::option::of(1usize..6),
        turns in prop::collection::vec((0usize..60, 0usize..40, 0usize..10), 1..8),
    ) {
        let run = || -> Result {
            let model = model(LONG, window)?;
            let mut conversation = model.conversation(120)?;
            for &(keep, new, kind) in &turns {
                let known = conversation.ids();
                let known = &known[..keep.min(known.len())];
                let prompt = [known, &some_ids(new + keep + 1)[keep..]].concat();
                // Greedy: among random cases, rounding would sooner or later turn a draw.
                let config = endless().max_tokens(6);
                let config = match kind {
                    0 => config.thinking(Thinking::new(2)),
                    1 => config.thinking(Thinking::new(1).span(1..2)),
                    2 => config.prompt_logprobs(true),
                    3 => {
                        let bad = [prompt, vec![VOCAB]].concat();
                        error_of(model.stream_in(&mut conversation, bad, &config))?;
                        continue;
                    }
                    _ => config,
                };
                turn(&model, &mut conversation, &prompt, &config)?;
            }
            Ok(())
        };
        holds(run())?;
    }
}

#[test]
fn thinking_between_plain_turns_leaves_no_trace() -> Result {
    let model = shared()?;
    let plain = free_run().max_tokens(8);
    let thinking = plain.clone().thinking(Thinking::new(2).refine(Interpolate::new(0.4)));
    let mut conversation = model.conversation(300)?;
    let mut prompt = some_ids(10);
    for config in [&plain, &thinking, &plain, &plain, &thinking, &thinking, &plain] {
        let answer = turn(model, &mut conversation, &prompt, config)?;
        prompt = [prompt, answer.ids, some_ids(5)].concat();
    }
    Ok(())
}

/// More tokens than a window's cache holds, then prompts that depart at many places.
#[test]
fn a_rolled_cache_begins_anew_where_it_must() -> Result {
    let model = model(LONG, Some(4))?;
    let config = free_run().max_tokens(5);
    let mut conversation = model.conversation(LONG)?;
    let long = some_ids(1300);
    for keep in [700, 900, 899, 10, 650, 640, 1200, 1190, 100, 0, 1300] {
        turn(&model, &mut conversation, &[&long[..keep], &[9, 8, 7]].concat(), &config)?;
    }
    // Growing a token at a time across the point where it rolls, and where chunks and blocks begin.
    let block = KvPool::BLOCK;
    let borders =
        [(505..530), (1020..1035), (block - 7..block + 9), (9 * block - 7..9 * block + 9)];
    for length in borders.into_iter().flatten() {
        turn(&model, &mut conversation, &long[..length], &config)?;
    }
    Ok(())
}

#[test]
fn a_full_conversation_refuses_and_goes_on() -> Result {
    let model = shared()?;
    let config = endless().max_tokens(4);
    let mut conversation = model.conversation(20)?;
    assert_eq!(conversation.capacity(), 20);
    let before = turn(model, &mut conversation, &some_ids(10), &config)?;
    assert_eq!(
        error_of(model.stream_in(&mut conversation, some_ids(21), &config))?,
        "context full: the conversation has room for 20 positions, 21 requested"
    );
    let after = turn(model, &mut conversation, &some_ids(10), &config)?;
    assert_same(&before, &after);
    let full = model.stream_in(&mut conversation, some_ids(20), &config)?.collect_answer()?;
    assert_eq!((full.ids.len(), full.stop), (1, StopReason::Context));
    let nearly = model.stream_in(&mut conversation, some_ids(18), &config)?.collect_answer()?;
    assert_eq!((nearly.ids.len(), nearly.stop), (3, StopReason::Context));
    Ok(())
}

#[test]
fn a_mistake_in_the_middle_does_no_harm() -> Result {
    let model = shared()?;
    let config = free_run().max_tokens(6);
    let mut conversation = model.conversation(200)?;
    let first = turn(model, &mut conversation, &some_ids(15), &config)?;
    let known = [some_ids(15), first.ids].concat();
    for bad in [vec![VOCAB], vec![], [known.clone(), vec![4, u32::MAX]].concat()] {
        error_of(model.stream_in(&mut conversation, bad, &config))?;
    }
    error_of(model.stream_in(&mut conversation, some_ids(9), &config.clone().top_p(7.0)))?;
    turn(model, &mut conversation, &[known, vec![4, 5]].concat(), &config)?;
    Ok(())
}

#[test]
fn threads_share_a_model() -> Result {
    let model = shared()?;
    let config = free_run().max_tokens(10);
    let talk = |start: usize| -> hybrid_attention::Result<Vec<Vec<u32>>> {
        let mut conversation = model.conversation(200)?;
        let mut prompt = some_ids(start);
        let mut answers = Vec::new();
        for _ in 0..4 {
            let stream = model.stream_in(&mut conversation, prompt.as_slice(), &config)?;
            let answer = stream.collect_answer()?;
            prompt = [prompt, answer.ids.clone(), some_ids(3)].concat();
            answers.push(answer.ids);
        }
        Ok(answers)
    };
    let alone = (talk(10)?, talk(33)?);
    let together = thread::scope(|scope| {
        let (a, b) = (scope.spawn(|| talk(10)), scope.spawn(|| talk(33)));
        (a.join(), b.join())
    });
    let (Ok(a), Ok(b)) = together else { return Err("a thread panicked".into()) };
    assert_eq!((a?, b?), alone);
    Ok(())
}

// ---- progress ----

fn think_reports(done: Range<usize>, total: usize) -> Vec<Progress> {
    done.map(|done| Progress::Think { done, total }).collect()
}

fn prefill_reports(done: &[usize], total: usize) -> Vec<Progress> {
    done.iter().map(|&done| Progress::Prefill { done, total }).collect()
}

#[test]
fn progress_goes_from_thinking_to_reading_and_ends_full() -> Result {
    let model = shared()?;
    let config = endless().max_tokens(3);
    let reports = |stream: TokenStream<'_>| -> Result<Vec<Progress>> {
        let mut seen = Vec::new();
        stream.on_progress(|progress| seen.push(progress)).collect_answer()?;
        Ok(seen)
    };
    let plain = reports(model.stream(some_ids(1100), &config)?)?;
    assert_eq!(plain, prefill_reports(&[0, 512, 1024, 1100], 1100));

    // Thinking again on the way is no work before the first token.
    for every in [0, 1] {
        let thinking = Thinking::new(3).rethink_every(every);
        let thought = reports(model.stream(some_ids(10), &config.clone().thinking(thinking))?)?;
        let expected = [think_reports(0..4, 3), prefill_reports(&[0, 10], 10)].concat();
        assert_eq!(thought, expected);
    }

    let mut conversation = model.conversation(800)?;
    for (count, expected) in [(30, &[0, 30][..]), (30, &[29, 30]), (700, &[30, 542, 700])] {
        let mut seen = Vec::new();
        let stream = model.stream_in(&mut conversation, some_ids(count), &config)?;
        let mut stream = stream.on_progress(|progress| seen.push(progress));
        assert_eq!(stream.read_prompt()?, expected[0]);
        drop(stream);
        assert_eq!(seen, prefill_reports(expected, count));
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Whatever the prompt and the thinking, each report goes on from the one before, and the last comes
    /// before the first token.
    #[test]
    fn progress_is_reported_in_order(
        known in 0usize..600,
        length in 1usize..1300,
        passes in 0usize..4,
        start in 0usize..3,
    ) {
        let run = || -> Result {
            let model = shared()?;
            let mut conversation = model.conversation(1400)?;
            if known > 0 {
                model.stream_in(&mut conversation, some_ids(known), &endless())?.read_prompt()?;
            }
            let thinking = Thinking::new(passes).span(start..3).refine(Interpolate::new(0.5));
            let config = endless().max_tokens(2).thinking(thinking);
            let (reported, reports) = channel();
            let stream = model.stream_in(&mut conversation, some_ids(length), &config)?;
            let mut stream = stream.on_progress(move |progress| {
                let _ = reported.send(progress);
            });
            assert_eq!(reports.try_iter().count(), 0, "nothing has run");
            stream.next().ok_or("ended")??;
            let seen: Vec<Progress> = reports.try_iter().collect();
            stream.collect_answer()?;
            assert_eq!(reports.try_iter().count(), 0, "nothing is reported after the first token");

            let kept = if passes == 0 { known.min(length - 1) } else { 0 };
            let mut done: Vec<usize> = (kept..length).step_by(512).collect();
            done.push(length);
            let mut expected = prefill_reports(&done, length);
            if passes > 0 {
                expected = [think_reports(0..passes + 1, passes), expected].concat();
            }
            assert_eq!(seen, expected);
            Ok(())
        };
        holds(run())?;
    }
}

// ---- streams of their own, and cancelling ----

/// Answers can be made anywhere and at any time: nothing is borrowed.
#[test]
fn a_stream_goes_to_another_thread_and_outlives_its_model() -> Result {
    fn sent<T: Send + 'static>() {}
    fn in_common<T: Send + Sync + 'static>() {}
    sent::<TokenStream<'static>>();
    sent::<Answers>();
    sent::<Conversation>();
    in_common::<HybridModel>();
    in_common::<GenerationConfig>();
    in_common::<Cancel>();
    in_common::<Failure>();

    let expected = shared()?.generate("the cat", &free_run())?;
    let mut stream = {
        let (model, prompt) = (model(LONG, None)?, "the cat".to_string());
        model.stream(prompt, &free_run())?
    };
    let first = stream.next().ok_or("ended")??;
    assert_eq!(first.id, expected.ids[0]);
    let elsewhere = thread::spawn(move || stream.collect_answer());
    assert_same(&elsewhere.join().map_err(|_| "a thread panicked")??, &expected);
    Ok(())
}

/// A model with numbers that overflow as soon as it runs.
fn overflowing() -> Result<HybridModel> {
    let config = config(LONG, None);
    let mut weights = HashMap::new();
    for (name, shape) in config.weights() {
        // The first token overflows what comes after it, but not what comes at once.
        let weight = Tensor::ones(shape, DType::F32, &Device::Cpu)?;
        weights.insert(name.clone(), if name.contains("norm") { (weight * 1e38)? } else { weight });
    }
    Ok(HybridModel::new(Transformer::new(&config, &mut weights)?, None)?)
}

/// Numbers whose squares overflow in a norm would come out of it as zeros, and every token would be as
/// likely as any other.
#[test]
fn numbers_too_large_to_be_squared_are_reported() -> Result {
    let config = config(LONG, None);
    let model = |size: f64| -> Result<HybridModel> {
        let mut weights = HashMap::new();
        for (name, shape) in config.weights() {
            let weight = Tensor::randn(0f32, 1.0, shape, &Device::Cpu)?;
            let large = name.contains("embed_tokens");
            weights.insert(name, if large { (weight * size)? } else { weight });
        }
        Ok(HybridModel::new(Transformer::new(&config, &mut weights)?, None)?)
    };
    let plain = GenerationConfig::default().max_tokens(2);
    model(1e15)?.generate([5, 6], &plain)?;
    let failed = model(1e20)?.generate([5, 6], &plain);
    assert!(matches!(failed, Err(Failure::NotFinite { what: "logits", .. })), "{failed:?}");
    Ok(())
}

#[test]
fn a_stream_is_handed_out_before_the_model_runs() -> Result {
    let model = shared()?;
    let config = free_run().prompt_logprobs(true).thinking(Thinking::new(2));
    let mut conversation = model.conversation(100)?;
    turn(model, &mut conversation, &some_ids(20), &free_run().max_tokens(5))?;
    let known = (conversation.ids().to_vec(), conversation.cache().bytes());
    let (reported, reports) = channel();
    let stream = model.stream_in(&mut conversation, [5, 6, 7], &config)?;
    let stream = stream.on_progress(move |progress| {
        let _ = reported.send(progress);
    });
    assert_eq!(stream.prompt_ids(), [5, 6, 7]);
    assert_eq!((stream.kept(), stream.stop()), (0, None));
    assert!(stream.prompt_logprobs().is_none() && stream.traces().is_empty());
    assert_eq!(stream.seconds(), Default::default());
    drop(stream);
    assert_eq!(reports.try_iter().count(), 0);
    assert_eq!((conversation.ids().to_vec(), conversation.cache().bytes()), known);

    // Reading it happens once.
    let (reported, reports) = channel();
    let mut stream = model.stream([5, 6, 7], &config)?.on_progress(move |progress| {
        let _ = reported.send(progress);
    });
    for count in [5, 0, 0] {
        assert_eq!((stream.read_prompt()?, reports.try_iter().count()), (0, count));
        assert_eq!((stream.traces().len(), stream.stop()), (1, None));
        assert_eq!(stream.prompt_logprobs().map(<[_]>::len), Some(3));
    }
    assert_same(&stream.collect_answer()?, &model.generate([5, 6, 7], &config)?);

    // What fails in the model fails when it runs, and once.
    let broken = overflowing()?;
    for (passes, max_tokens) in [(0, 4), (1, 4), (1, 0)] {
        let config = endless().max_tokens(max_tokens).thinking(Thinking::new(passes));
        let stream = || broken.stream([5, 6], &config);
        let mut failed = stream()?;
        assert!(matches!(failed.next(), Some(Err(Failure::NotFinite { .. }))), "{passes} passes");
        assert!(failed.next().is_none() && failed.stop().is_none());
        assert!(matches!(failed.read_prompt(), Err(Failure::StreamFailed)));
        assert!(matches!(failed.collect_answer(), Err(Failure::StreamFailed)));
        assert!(matches!(stream()?.collect_answer(), Err(Failure::NotFinite { .. })));
        if passes > 0 {
            let mut failed = stream()?;
            assert!(matches!(failed.read_prompt(), Err(Failure::NotFinite { .. })));
            assert!(failed.next().is_none());
        }
    }
    Ok(())
}

/// How reading a prompt is broken off in the midst.
#[derive(Clone, Copy, Debug)]
enum Way {
    /// Another thread raises the flag.
    Flag,
    /// The time is up.
    Deadline,
    /// The caller unwinds out of its own report, so that the stream is dropped.
    Drop,
}

/// Reads `prompt` until `at` is reported, and breaks off there. Gives all that was reported, and how it
/// ended; `None` for a stream that was dropped.
fn broken_off(
    stream: TokenStream<'_>,
    at: Progress,
    way: Way,
) -> Result<(Vec<Progress>, Option<hybrid_attention::Result<usize>>)> {
    let cancel = match way {
        Way::Deadline => Cancel::after(Duration::from_millis(150)),
        Way::Flag | Way::Drop => Cancel::default(),
    };
    let (reported, reports) = channel();
    let (reached, reaches) = channel::<()>();
    let (raised, raises) = channel::<()>();
    let flag = cancel.clone();
    let waits = cancel.clone();
    let read = thread::scope(|scope| {
        scope.spawn(move || {
            if reaches.recv().is_ok() {
                flag.cancel();
                let _ = raised.send(());
            }
        });
        let mut stream = stream.cancel(cancel).on_progress(move |progress| {
            let _ = reported.send(progress);
            match way {
                _ if progress != at => (),
                Way::Flag => {
                    let _ = reached.send(());
                    let _ = raises.recv();
                }
                Way::Deadline => {
                    while !waits.is_cancelled() {
                        thread::sleep(Duration::from_millis(1));
                    }
                }
                Way::Drop => resume_unwind(Box::new(())),
            }
        });
        catch_unwind(AssertUnwindSafe(move || stream.read_prompt())).ok()
    });
    Ok((reports.try_iter().collect(), read))
}

/// In all ways, at every report of a long prompt, thought about or not: what is under way ends there, and
/// the conversation goes on as if nothing had been.
#[test]
fn a_prompt_can_be_broken_off_anywhere() -> Result {
    let model = shared()?;
    let long = some_ids(1100);
    let plain = endless().max_tokens(3);
    let whole = prefill_reports(&[0, 512, 1024, 1100], 1100);
    let mut conversation = model.conversation(1200)?;
    let thinkings = [(0..3, HandOff::Refined), (1..2, HandOff::KeyValue), (1..3, HandOff::Refined)];
    for thinks in [None].into_iter().chain(thinkings.map(Some)) {
        let (config, reports) = match thinks {
            None => (plain.clone(), whole.clone()),
            Some((ref span, hand_off)) => {
                let thinking = Thinking::new(2).span(span.clone()).refine(Interpolate::new(0.5));
                let reports = [think_reports(0..3, 2), whole.clone()].concat();
                (plain.clone().thinking(thinking.hand_off(hand_off)), reports)
            }
        };
        for (index, &at) in reports.iter().enumerate() {
            // Thoughts that go on as they are have no layer to run before the prompt is read.
            let at_once = matches!(thinks, Some((_, HandOff::Refined)))
                && at == Progress::Think { done: 2, total: 2 };
            for way in [Way::Flag, Way::Deadline, Way::Drop] {
                conversation.reset();
                let stream = model.stream_in(&mut conversation, long.as_slice(), &config)?;
                let (seen, read) = broken_off(stream, at, way)?;
                match way {
                    Way::Drop => assert_eq!(seen, reports[..=index]),
                    Way::Flag => assert_eq!(seen, reports[..=index + usize::from(at_once)]),
                    // A slow machine may be out of time before it has come so far.
                    Way::Deadline => assert!(reports.starts_with(&seen) && seen.len() <= index + 2),
                }
                match read {
                    None => assert!(matches!(way, Way::Drop)),
                    Some(Err(Failure::Cancelled)) => (),
                    // All of it had been read.
                    Some(Ok(0)) if index + 1 == reports.len() => (),
                    Some(other) => return Err(format!("{way:?} at {at:?}: {other:?}").into()),
                }
                // What was read causally is there to be gone on with.
                let done = match seen.last() {
                    Some(&Progress::Prefill { done, .. }) if thinks.is_none() => done,
                    _ => 0,
                };
                assert_eq!(conversation.ids(), &long[..done], "{way:?} at {at:?}");
                let mut stream = model.stream_in(&mut conversation, long.as_slice(), &plain)?;
                assert_eq!(stream.read_prompt()?, done.min(long.len() - 1));
                drop(stream);
                turn(model, &mut conversation, &long, &plain)?;
                turn(model, &mut conversation, &long[..600], &config)?;
            }
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    /// Cancelled by another thread, or by time, at any moment of reading or answering: the answer is whole,
    /// or an error says that it was cancelled, and the conversation goes on.
    #[test]
    fn an_answer_is_whole_or_cancelled(
        window in prop::option::of(1usize..200),
        length in 1usize..1200,
        passes in 0usize..3,
        start in 0usize..3,
        hand_off in select(vec![
            HandOff::Refined, HandOff::KeyValue, HandOff::Mixed { weight: 0.4 },
        ]),
        every in 0usize..3,
        after in 0u64..20_000,
        by_flag: bool,
    ) {
        let run = || -> Result {
            let model = model(LONG, window)?;
            let thinking = Thinking::new(passes).span(start..3).refine(Interpolate::new(0.5));
            let thinking = thinking.hand_off(hand_off).rethink_every(every);
            let config = endless().max_tokens(6).thinking(thinking);
            let (known, prompt) = (some_ids(length / 2 + 1), some_ids(length));
            let mut conversation = model.conversation(1300)?;
            turn(&model, &mut conversation, &known, &endless().max_tokens(2))?;

            let time = Duration::from_micros(after);
            let cancel = if by_flag { Cancel::default() } else { Cancel::after(time) };
            let flag = cancel.clone();
            let stream = model.stream_in(&mut conversation, prompt.as_slice(), &config)?;
            let answer = thread::scope(|scope| {
                if by_flag {
                    scope.spawn(move || {
                        thread::sleep(time);
                        flag.cancel();
                    });
                }
                stream.cancel(cancel).collect_answer()
            });
            match answer {
                Ok(answer) => assert_same(&answer, &model.generate(prompt.as_slice(), &config)?),
                Err(Failure::Cancelled) => (),
                Err(other) => return Err(other.into()),
            }
            let kept = conversation.ids().len();
            assert!(kept <= prompt.len() + 5 && conversation.cache().len() <= 1300);
            turn(&model, &mut conversation, &prompt, &endless().max_tokens(3))?;
            turn(&model, &mut conversation, &prompt, &config)?;
            Ok(())
        };
        holds(run())?;
    }
}

/// A thousand passes over a long prompt are cut short by another thread, or by time.
#[test]
fn long_thinking_ends_soon_after_it_is_cancelled() -> Result {
    let model = shared()?;
    let thinking = Thinking::new(1024).refine(Interpolate::new(0.5));
    let config = endless().max_tokens(1).thinking(thinking);
    for by_flag in [true, false] {
        let cancel = match by_flag {
            true => Cancel::default(),
            false => Cancel::after(Duration::from_millis(60)),
        };
        let flag = cancel.clone();
        let (reported, reports) = channel();
        let stream = model.stream(some_ids(1500), &config)?.cancel(cancel);
        let stream = stream.on_progress(move |progress| {
            let _ = reported.send(progress);
        });
        let reader = thread::spawn(move || stream.collect_answer());
        if by_flag {
            reports.recv()?; // it has begun
            flag.cancel();
        }
        let answer = reader.join().map_err(|_| "a thread panicked")?;
        assert!(matches!(answer, Err(Failure::Cancelled)));
        let last = reports.try_iter().last();
        assert!(last != Some(Progress::Think { done: 1024, total: 1024 }), "{last:?}");
    }
    Ok(())
}

#[test]
fn a_cancelled_stream_gives_no_more_tokens() -> Result {
    let model = shared()?;
    let expected = model.generate("the cat", &free_run())?;
    let prompt = expected.prompt_ids.len();
    let mut conversation = model.conversation(200)?;
    let cancel = Cancel::default();
    let stream = model.stream_in(&mut conversation, "the cat", &free_run())?;
    let mut stream = stream.cancel(cancel.clone());
    let some: Vec<Token> = stream.by_ref().take(7).collect::<std::result::Result<_, _>>()?;
    cancel.cancel();
    assert!(matches!(stream.next(), Some(Err(Failure::Cancelled))));
    assert!(stream.next().is_none() && stream.stop().is_none());
    assert!(matches!(stream.collect_answer(), Err(Failure::StreamFailed)));
    assert_eq!(some.iter().map(|token| token.id).collect::<Vec<_>>(), expected.ids[..7]);
    // The seventh was drawn and has not run.
    assert_eq!(conversation.ids().len(), prompt + 6);
    let known = [expected.prompt_ids.clone(), expected.ids[..7].to_vec()].concat();
    assert_eq!(conversation.ids(), &known[..prompt + 6]);
    let mut stream = model.stream_in(&mut conversation, known.as_slice(), &free_run())?;
    assert_eq!(stream.read_prompt()?, prompt + 6);
    drop(stream);
    turn(model, &mut conversation, &known, &free_run())?;

    // One that was cancelled before it began never runs, nor does one whose deadline has passed.
    let past = Cancel::default().by(Instant::now());
    for cancel in [cancel, past, Cancel::after(Duration::ZERO)] {
        let ended = model.stream("the cat", &free_run())?.cancel(cancel).collect_answer();
        assert!(matches!(ended, Err(Failure::Cancelled)));
    }
    let never = Cancel::after(Duration::MAX);
    assert_same(&model.stream("the cat", &free_run())?.cancel(never).collect_answer()?, &expected);
    Ok(())
}

/// Dropped by another thread, before it was read, after that, or in the middle of an answer.
#[test]
fn a_stream_dropped_elsewhere_leaves_the_conversation_of_use() -> Result {
    let model = shared()?;
    let plain = free_run().max_tokens(20);
    let mut conversation = model.conversation(700)?;
    for thinking in [Thinking::none(), Thinking::new(2).rethink_every(2)] {
        let config = plain.clone().thinking(thinking);
        for tokens in [None, Some(0), Some(1), Some(9)] {
            let mut stream = model.stream_in(&mut conversation, some_ids(600), &config)?;
            if let Some(tokens) = tokens {
                stream.read_prompt()?;
                assert_eq!(
                    stream.by_ref().take(tokens).filter(hybrid_attention::Result::is_ok).count(),
                    tokens
                );
            }
            let dropped = thread::scope(|scope| scope.spawn(move || drop(stream)).join());
            dropped.map_err(|_| "a thread panicked")?;
            turn(model, &mut conversation, &some_ids(600), &plain)?;
            turn(model, &mut conversation, &some_ids(500), &config)?;
        }
    }
    Ok(())
}

// ---- prompts in parts ----

#[test]
fn parts_become_the_segments_they_say() -> Result {
    let model = shared()?;
    let (transformer, tokenizer) = (model.transformer(), tokenizer()?);
    let texts = ["the dog", " sat on the mat", " what about", " the cat"];
    let prompt =
        Prompt::default().plain(texts[0]).context(texts[1]).plain(texts[2]).context(texts[3]);
    let ids = tokenizer.encode(&texts.concat(), true)?;
    // A part has the tokens that begin in it, that is where the text of those before them ends.
    let mut stream = tokenizer.decode_stream(&[]);
    let begins = ids.iter().scan(0, |end, &id| {
        let begin = *end;
        *end += stream.push(id).len();
        Some(begin)
    });
    let begins: Vec<usize> = begins.collect();
    let borders: Vec<usize> = (1..=texts.len())
        .map(|parts| texts[..parts].concat().len())
        .map(|end| begins.partition_point(|&begin| begin < end))
        .collect();
    // The last token of all is always plain.
    let segments = [borders[0]..borders[1], borders[2]..borders[3] - 1];

    let batch = Batch::one(ids.len())?.with_context(0, &segments)?;
    let embeddings = transformer.embed_ids(&ids)?;
    for a in [0, 1] {
        let thinking = Thinking::new(2).span(a..3).refine(Interpolate::new(0.5));
        let config = endless().max_tokens(1).thinking(thinking.clone());
        let z = match a {
            0 => embeddings.clone(),
            a => transformer.forward(&embeddings, 0..a, Pass::Causal(&batch))?,
        };
        let mut thought = z.clone();
        for _ in 0..2 {
            let h = transformer.forward(&thought, a..3, Pass::Bidirectional(&batch))?;
            let moved = ((&thought + h)? / 2.0)?;
            let rows: Vec<Tensor> = (0..ids.len())
                .map(|at| match segments.iter().any(|run| run.contains(&at)) {
                    true => moved.narrow(0, at, 1),
                    false => z.narrow(0, at, 1),
                })
                .collect::<candle_core::Result<_>>()?;
            thought = Tensor::cat(&rows, 0)?;
        }
        let got = model.think(prompt.clone(), &config)?;
        assert_eq!(got.z.dims(), thought.dims());
        assert_close(&got.z.flatten_all()?.to_vec1()?, &thought.flatten_all()?.to_vec1()?);
        assert_eq!(got.trace.passes.len(), 2);

        let answer = model.generate(prompt.clone(), &config)?;
        assert_eq!(answer.prompt_ids, ids);
        assert_eq!(answer.drift(), got.trace.drift());
        let h = transformer.forward(&thought, a..3, Pass::Causal(&batch))?;
        let logits = transformer.logits(&h.narrow(0, ids.len() - 1, 1)?)?.flatten_all()?;
        let expected = log_softmax(&logits, D::Minus1)?.to_vec1::<f32>()?;
        assert_close(&answer.logprobs, &[expected[answer.ids[0] as usize]]);
    }
    Ok(())
}

#[test]
fn what_is_plain_is_not_thought_about() -> Result {
    let model = shared()?;
    let thinking = endless().max_tokens(8).thinking(Thinking::new(3));
    let plain = Prompt::default().plain("the cat sat");
    let thought = model.generate(plain.clone(), &thinking)?;
    let not = model.generate(plain, &endless().max_tokens(8))?;
    assert_eq!(thought.drift(), [0.0; 3]);
    assert_eq!((thought.ids, thought.logprobs), (not.ids.clone(), not.logprobs));
    assert_ne!(model.generate("the cat sat", &thinking)?.ids, not.ids, "context is");

    // One context segment is not two: each is seen by itself.
    let together = Prompt::default().context("the cat").plain(" sat").context(" the dog");
    let z = model.think(together, &thinking)?.z;
    let alone = model.think(Prompt::default().context("the cat").plain(" sat"), &thinking)?.z;
    let length = alone.dim(0)?;
    let same: Vec<f32> = z.narrow(0, 0, length)?.flatten_all()?.to_vec1()?;
    assert_close(&same, &alone.flatten_all()?.to_vec1()?);
    Ok(())
}

#[test]
fn a_prompt_begins_with_bos_once() -> Result {
    let model = shared()?;
    let messages = [Message::user("the cat"), Message::assistant("sat"), Message::user("on")];
    let config = endless().max_tokens(1);
    let parts = || Prompt::default().plain("the cat").context("sat").plain("on");
    for prompt in [Prompt::chat(&messages), "the cat".into(), "<s>the cat".into(), parts()] {
        let ids = model.generate(prompt, &config)?.prompt_ids;
        assert_eq!(ids.first(), Some(&BOS));
        assert_eq!(ids.iter().filter(|&&id| id == BOS).count(), 1);
    }
    assert_same(
        &model.chat(&messages, &config)?,
        &model.generate(Prompt::chat(&messages), &config)?,
    );
    let ids = model.chat(&messages, &config)?.prompt_ids;
    assert_eq!(ids, tokenizer()?.encode_chat(&messages, true)?);
    // Ids are taken as they are.
    assert_eq!(model.generate([BOS, BOS, 5], &config)?.prompt_ids, [BOS, BOS, 5]);
    Ok(())
}

#[test]
fn a_prompt_too_long_to_think_about_is_refused_even_without_passes() -> Result {
    let model = shared()?;
    let context = model.config().max_position_embeddings;
    for passes in [0, 1] {
        let config = GenerationConfig::default().thinking(Thinking::new(passes));
        let error = model.think(vec![1; context + 1], &config).err().ok_or("accepted")?;
        let expected = format!(
            "context full: the model has room for {context} positions, {} requested",
            context + 1
        );
        assert_eq!(error.to_string(), expected);
    }
    Ok(())
}

#[test]
fn a_stop_string_that_is_a_control_token_stops_at_it() -> Result {
    let model = shared()?;
    let end = model.tokenizer().and_then(|it| it.token(2)).ok_or("no token 2")?;
    let drawn = |seed| -> Result<Option<_>> {
        let config = endless().max_tokens(100).temperature(5.0).seed(seed);
        let free = model.generate([5, 6], &config)?;
        let at = free.ids.iter().position(|&id| id == 2);
        Ok(at.map(|at| (config, free, at)))
    };
    let found = (0..100).find_map(|seed| drawn(seed).transpose());
    let (config, free, at) = found.ok_or("never drawn")??;
    let stopped = model.generate([5, 6], &config.stop(end))?;
    assert_eq!((stopped.ids, stopped.stop), (free.ids[..=at].to_vec(), StopReason::StopId));
    Ok(())
}

#[test]
fn a_collected_answer_is_whole_or_none() -> Result {
    let model = shared()?;
    let config = endless().max_tokens(6).top_logprobs(2);
    let whole = model.generate([5, 6, 7], &config)?;
    let mut stream = model.stream([5, 6, 7], &config)?;
    let first: Vec<Token> = stream.by_ref().take(2).collect::<std::result::Result<_, _>>()?;
    assert_eq!(first.iter().map(|token| token.id).collect::<Vec<_>>(), whole.ids[..2]);
    assert_same(&stream.collect_answer()?, &whole);

    let broken = overflowing()?;
    let mut stream = broken.stream([5], &endless())?;
    let error = stream.next().ok_or("ended")?.err().ok_or("a token")?;
    assert_eq!(error.to_string(), "logits are not finite at position 1");
    assert!(stream.next().is_none());
    assert_eq!(
        error_of(stream.collect_answer())?,
        "the stream ended with an error before: there is no whole answer"
    );
    Ok(())
}

#[test]
fn another_models_conversation_is_refused() -> Result {
    let (one, other) = (model(100, None)?, model(100, None)?);
    let mut conversation = one.conversation(50)?;
    let config = endless().max_tokens(2);
    let before = turn(&one, &mut conversation, &[5, 6, 7], &config)?;
    assert_eq!(
        error_of(other.stream_in(&mut conversation, [5, 6, 7, 8], &endless()))?,
        "parameter cache: expected one made by this very transformer, got another's"
    );
    assert_eq!(conversation.ids(), [5, 6, 7, before.ids[0]], "and left as it is");
    assert_same(&turn(&one, &mut conversation, &[5, 6, 7], &config)?, &before);
    Ok(())
}

#[test]
fn thinking_alone_checks_and_reports_like_generating() -> Result {
    let model = shared()?;
    assert_eq!(
        error_of(model.think([5, 6], &endless().temperature(-3.0)))?,
        "parameter temperature: expected at least 0, got -3"
    );
    // Step by step, with the verbs that it is made of.
    let config = endless().thinking(Thinking::new(2).refine(Interpolate::new(0.5)));
    let thinking = config.thinking.as_ref().ok_or("no thinking")?;
    let mind = thinking.on(model.thought_model())?;
    let first = 0..1;
    let batch = Batch::one(2)?.with_context(0, std::slice::from_ref(&first))?;
    let text = EncodedBatch::new(model.transformer(), &[5, 6], batch)?;
    let z = mind.encode(&text, Pass::Causal(text.batch()))?;
    let mut seen = Vec::new();
    let thoughts =
        mind.think(&text, z, |done, total| seen.push(Progress::Think { done, total }))?;
    assert_eq!(seen, think_reports(0..3, 2));
    let expected = model.think([5, 6], &config)?;
    assert_eq!(thoughts.z.to_vec2::<f32>()?, expected.z.to_vec2::<f32>()?);
    assert_eq!(thoughts.trace.drift(), expected.trace.drift());
    Ok(())
}

// ---- what is said ----

/// A turn of a conversation is a chat of all its messages; the answer is taken up when it has ended, and
/// only then.
#[test]
fn what_is_said_is_remembered_when_it_was_answered() -> Result {
    let model = shared()?;
    let config = endless().max_tokens(4);
    let thinking = config.clone().thinking(Thinking::new(1).refine(Interpolate::new(0.5)));
    let mut conversation = model.conversation(300)?;
    let mut messages = Vec::new();
    for (text, config) in [("the cat", &config), ("sat on", &thinking), ("the mat", &config)] {
        messages.push(Message::user(text));
        let expected = model.chat(&messages, config)?;
        let answer = model.say(&mut conversation, text, config)?.collect_answer()?;
        assert_same(&answer, &expected);
        messages.push(Message::assistant(answer.text));
        assert_eq!(conversation.messages(), messages);

        // Not read, not finished, cancelled, refused: as if nothing had been said.
        drop(model.say(&mut conversation, "what?", config)?);
        model.say(&mut conversation, "what?", config)?.read_prompt()?;
        let said = model.say(&mut conversation, "what?", config)?.take(3);
        assert_eq!(said.filter(hybrid_attention::Result::is_ok).count(), 3);
        let cancelled =
            model.say(&mut conversation, "what?", config)?.cancel(Cancel::after(Duration::ZERO));
        assert!(matches!(cancelled.collect_answer(), Err(Failure::Cancelled)));
        assert!(model.say(&mut conversation, "what?", &config.clone().top_p(2.0)).is_err());
        assert_eq!(conversation.messages(), messages);
    }

    // Another goes on from here, and this one as before.
    let mut other = conversation.fork();
    model.say(&mut other, "and the dog", &config)?.collect_answer()?;
    assert_eq!(conversation.messages(), messages);
    assert_eq!((other.messages().len(), &other.messages()[..6]), (8, messages.as_slice()));
    conversation.push(Message::system("Be brief."));
    messages.push(Message::system("Be brief."));
    assert_eq!(conversation.messages(), messages);
    conversation.reset();
    assert!(conversation.messages().is_empty() && conversation.cache().bytes() == 0);

    // Without a message there is nobody to answer.
    for empty in [model.chat(&[], &config), model.generate(Prompt::chat(&[]), &config)] {
        assert_eq!(error_of(empty)?, "parameter messages: expected at least one, got none");
    }
    Ok(())
}
