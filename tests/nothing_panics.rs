//! Whatever a caller hands in, the answer is a value or an error that says what was wrong.

mod common;

use std::ops::Range;

use candle_core::{DType, Device, Tensor};
use hybrid_attention::model::{Batch, Linear, Mask, Pass, Sight, Transformer};
use hybrid_attention::refine::{Interpolate, Refine, Step};
use hybrid_attention::thought::{EncodedBatch, HandOff};
use hybrid_attention::{
    Config, GenerationConfig, HybridModel, Message, Pooling, Prompt, Thinking, TokenStream,
    Tokenizer,
};
use proptest::prelude::*;

use common::tiny::{self, holds};
use common::{Result, fixture};

fn range(start: usize, end: usize) -> Range<usize> {
    Range { start, end }
}

/// The words of the error that `result` must be.
fn refusal<T>(result: hybrid_attention::Result<T>) -> String {
    result.map(|_| "not an error").map_or_else(|error| error.to_string(), String::from)
}

#[test]
fn refusals_say_what_was_expected_and_what_was_found() -> Result {
    let config = tiny::config(); // 3 layers, 32 tokens, 2048 positions
    let model = tiny::hybrid(&config, 1)?;
    let transformer = model.transformer();
    let (short, dense) = (tiny::embed(transformer, &[1, 2, 3])?, Batch::one(3)?);
    let forward = |xs: &Tensor, layers, layout: &Batch| {
        refusal(transformer.forward(xs, layers, Pass::Causal(layout)))
    };
    let default = GenerationConfig::default;
    let generate = |config: &GenerationConfig| refusal(model.generate([1, 2, 3], config));
    let think = |thinking: Thinking| generate(&default().thinking(thinking));
    let smaller = Config { num_hidden_layers: 2, ..config.clone() };
    let mut smaller = tiny::transformer(&smaller, 1)?.new_cache(8)?;
    let cached = Pass::Cached(&mut smaller);
    let f64s = |name: &str| -> Result<_> {
        let mut weights = tiny::weights(&config, 1)?;
        weights.insert(name.to_owned(), weights[name].to_dtype(DType::F64)?);
        Ok(refusal(Transformer::new(&config, &mut weights)))
    };
    let text = EncodedBatch::new(transformer, &[1, 2, 3], dense.clone())?;
    let thinking = Thinking::passes(1);
    let mind = thinking.on(transformer)?;

    let refusals = [
        (
            forward(&short, range(2, 1), &dense),
            "parameter layers: expected a range within 0..3, got 2..1",
        ),
        (forward(&short, 0..4, &dense), "parameter layers: expected a range within 0..3, got 0..4"),
        (
            forward(&short, 0..3, &Batch::one(4)?),
            "parameter layout: expected the sequence of 4 slots it describes, got 3",
        ),
        (
            forward(&short, 0..3, &Batch::dense(2, 3)?),
            "parameter batch: expected the 2 rows the pass was made for, got 1",
        ),
        (
            forward(&Tensor::zeros((1, 0, 16), DType::F32, &Device::Cpu)?, 0..3, &dense),
            "the prompt is empty: at least one token is needed",
        ),
        (
            refusal(transformer.forward(&short, 0..3, cached)),
            "parameter cache: expected one made by this very transformer, got another's",
        ),
        (
            forward(&Tensor::zeros((1, 3, 17), DType::F32, &Device::Cpu)?, 0..3, &dense),
            "parameter xs: expected a stream (batch, seq, 16), got [1, 3, 17]",
        ),
        (
            refusal(transformer.logits(&Tensor::zeros((0, 3, 16), DType::F32, &Device::Cpu)?)),
            "parameter xs: expected a stream (batch, seq, 16), got [0, 3, 16]",
        ),
        (
            refusal(mind.encode(&text, Pass::Bidirectional(&dense))),
            "parameter pass: expected a causal one to encode with, got a bidirectional one",
        ),
        (
            f64s("model.norm.weight")?,
            "weight model.norm.weight in memory: expected F32, F16 or BF16, got F64",
        ),
        (
            refusal(HybridModel::from_gguf(fixture("window"), None, &Device::Cpu))
                .split_off(fixture("window").display().to_string().len()),
            ": a folder, not a GGUF file: HybridModel::from_folder loads it",
        ),
        (
            refusal(transformer.new_cache(0)),
            "parameter capacity: expected at least one position, got 0",
        ),
        (
            refusal(transformer.new_cache(usize::MAX)),
            "context full: room for 2048 positions, 18446744073709551615 requested",
        ),
        (
            refusal(transformer.embed(&Tensor::new(&[[1u32, 32]], &Device::Cpu)?)),
            "token id 32 at position 1: expected less than the vocabulary of 32",
        ),
        (
            refusal(Batch::one(5)?.with_context(0, &[3..4, 1..2])),
            "parameter segments: expected ascending runs of the row's 5 tokens, got [3..4, 1..2]",
        ),
        (
            refusal(Batch::dense(2, 5)?.with_context(2, &[])),
            "parameter row: expected less than the batch of 2, got 2",
        ),
        (
            refusal(Pooling::Mean.pool(&short, &Batch::one(4)?)),
            "parameter layout: expected 1 rows of 3 slots, got 1 rows of 4",
        ),
        (
            think(Thinking::passes(1_000_000_000)),
            "parameter passes: expected at most 1024, got 1000000000",
        ),
        (
            think(Thinking::passes(1).span(range(2, 1))),
            "parameter span: expected a non-empty range within 0..3, got 2..1",
        ),
        (
            refusal(model.think([1], &default().thinking(Thinking::passes(1).span(5..9)))),
            "parameter span: expected a non-empty range within 0..3, got 5..9",
        ),
        (
            think(Thinking::passes(1).refine(Interpolate::new(f64::NAN))),
            "refinement op 0 (Interpolate): parameter weight: expected a share in [0, 1], got NaN",
        ),
        (
            generate(&default().temperature(f64::INFINITY)),
            "parameter temperature: expected at least 0, got inf",
        ),
        (generate(&default().top_p(0.0)), "parameter top_p: expected within (0, 1], got 0"),
        (generate(&default().min_p(-0.1)), "parameter min_p: expected within [0, 1], got -0.1"),
        (
            generate(&default().repetition_penalty(0.0)),
            "parameter repetition_penalty: expected above 0, got 0",
        ),
        (
            generate(&default().stop("")),
            "parameter stop: expected a text that is not empty, got \"\"",
        ),
        (
            generate(&default().stop("x")),
            "no tokenizer in this checkpoint: a stop string needs one; hand in token ids instead",
        ),
        (
            refusal(model.generate("text", &default())),
            "no tokenizer in this checkpoint: a text prompt needs one; hand in token ids instead",
        ),
        (
            refusal(model.chat(&[Message::user("hello")], &default())),
            "no tokenizer in this checkpoint: a chat needs one; hand in token ids instead",
        ),
        (
            refusal(model.generate([32], &default())),
            "token id 32 at position 0: expected less than the vocabulary of 32",
        ),
        (
            refusal(model.generate(vec![1; 2049], &default())),
            "context full: room for 2048 positions, 2049 requested",
        ),
        (
            refusal(model.generate(Prompt::default(), &default())),
            "the prompt is empty: at least one token is needed",
        ),
        (
            refusal(model.conversation(0)),
            "parameter capacity: expected at least one position, got 0",
        ),
    ];
    for (got, expected) in refusals {
        assert_eq!(got, expected);
    }

    let tokenizer = Tokenizer::from_folder(&fixture("tokenizer/llama"))?;
    let too_many = HybridModel::new(tiny::transformer(&config, 1)?, tokenizer);
    assert_eq!(
        refusal(too_many),
        "tokenizer: expected at most the vocab_size of 32 tokens, got 371"
    );
    Ok(())
}

/// The model may say it reads two billion positions; memory holds fewer.
#[test]
fn a_cache_beyond_memory_is_refused() -> Result {
    let config = Config {
        max_position_embeddings: i32::MAX as usize,
        num_key_value_heads: 64,
        num_attention_heads: 64,
        head_dim: 256,
        ..tiny::config()
    };
    let transformer = tiny::transformer(&config, 1)?;
    let refused = transformer.new_cache(i32::MAX as usize);
    assert_eq!(
        refusal(refused),
        "parameter capacity: expected a cache that fits memory, got 2147483647"
    );
    Ok(())
}

/// Logits that are no numbers are an error, not a token.
#[test]
fn weights_that_overflow_are_an_error() -> Result {
    let mut weights = tiny::weights(&tiny::config(), 1)?;
    let head = Tensor::full(f32::MAX, (32, 16), &Device::Cpu)?;
    weights.insert("lm_head.weight".into(), head);
    let model = HybridModel::new(Transformer::new(&tiny::config(), &mut weights)?, None)?;
    let refused = refusal(model.generate([1, 2], &GenerationConfig::default()));
    assert!(refused.contains("not finite at position"), "{refused}");
    Ok(())
}

/// Returns thoughts of whatever shape it likes.
#[derive(Debug)]
struct Misshapen(Vec<usize>);

impl Refine for Misshapen {
    fn refine(&self, _: &Tensor, _: &Step<'_>) -> hybrid_attention::Result<Tensor> {
        Ok(Tensor::ones(self.0.as_slice(), DType::F32, &Device::Cpu)?)
    }
}

#[test]
fn thoughts_of_another_shape_are_an_error() -> Result {
    let model = tiny::hybrid(&tiny::config(), 1)?;
    let prompts = [Prompt::from([1, 2, 3]), Prompt::from([5])];
    for shape in [vec![], vec![0], vec![1], vec![16], vec![1, 1, 1], vec![2, 3, 16], vec![3, 16]] {
        for prompt in &prompts {
            let thinking = Thinking::passes(1).refine(Misshapen(shape.clone()));
            let config = GenerationConfig::default().max_tokens(2).thinking(thinking);
            let refused = model.generate(prompt.clone(), &config);
            assert!(refused.is_err(), "{shape:?} was taken for thoughts");
        }
    }
    Ok(())
}

/// Small numbers, and those at the edge of their type.
fn numbers() -> impl Strategy<Value = usize> {
    prop_oneof![6 => 0usize..8, 1 => 500usize..530, 1 => Just(usize::MAX - 1), 1 => Just(usize::MAX)]
}

fn shares() -> impl Strategy<Value = f64> {
    prop_oneof![0.0..1.0, any::<f64>(), Just(f64::NAN), Just(f64::INFINITY), Just(-0.0)]
}

/// Every call that takes sizes and ranges, with any.
fn drive(model: &Transformer, xs: [usize; 3], n: [usize; 4], lengths: &[usize]) -> Result {
    let hidden = model.config().hidden_size;
    let shape = (xs[0], xs[1], if xs[2] == 0 { hidden } else { xs[2] });
    let xs = Tensor::ones(shape, DType::F32, &Device::Cpu)?;
    let layouts = [
        Batch::dense(shape.0, shape.1)?,
        Batch::ragged(lengths)?,
        Batch::one(shape.1)?.with_context(0, &[range(n[0], n[1])]).unwrap_or(Batch::dense(0, 0)?),
    ];
    for layout in &layouts {
        let layers = range(n[0], n[1]);
        for layers in [layers, model.all_layers()] {
            let _ = model.forward(&xs, layers.clone(), Pass::Causal(layout));
            let _ = model.forward(&xs, layers.clone(), Pass::Bidirectional(layout));
            let dtype = [DType::F32, DType::BF16, DType::F16, DType::I64][n[0] % 4];
            if let Ok(mut cache) = model.new_pool(dtype, usize::MAX)?.new_cache(n[2]) {
                for _ in 0..3 {
                    let _ = model.forward(&xs, layers.clone(), Pass::Cached(&mut cache));
                    let _ = cache.truncate(n[3]);
                }
            }
        }
        for pooling in [Pooling::Mean, Pooling::WeightedMean, Pooling::LastToken] {
            let _ = pooling.pool(&xs, layout);
        }
        let thinking = Thinking::passes(n[2].min(3)).span(range(n[0], n[1]));
        let thinking = thinking.hand_off(match n[3] % 3 {
            0 => HandOff::Refined,
            1 => HandOff::KeyValue,
            _ => HandOff::Mixed { weight: 0.5 },
        });
        let ids = vec![1; n[1].min(9)];
        let Ok(text) = EncodedBatch::new(model, &ids, layout.clone()) else { continue };
        let Ok(mind) = thinking.on(model) else { continue };
        let _ = mind.encode(&text, Pass::Causal(layout));
        let _ = mind.think_once(&xs, layout);
        let Ok(mut thoughts) = mind.think(&text, text.embeddings().clone(), |_, _| ()) else {
            continue;
        };
        let _ = mind.hand_off(&text, &thoughts, Pass::Causal(layout));
        thoughts.z = xs.clone();
        let _ = mind.hand_off(&text, &thoughts, Pass::Bidirectional(layout));
        let _ = mind.think(&text, xs.clone(), |_, _| ());

        let queries = range(n[0].min(600), n[1].min(600));
        let mask = Mask::new(layout, Sight::Bidirectional, queries, n[2], Some(n[3]));
        let _ = (mask.sees(n[0], n[1]), mask.queries(), mask.keys());
        let _ = mask.keys_of(&range(n[2], n[3]));
        let _ = mask.bias(&range(n[2], n[3]), &range(n[0], n[1]), DType::F32, &Device::Cpu);
    }
    let _ = model.logits(&xs);
    let _ = model.embed(&Tensor::zeros((shape.0, shape.1), DType::U32, &Device::Cpu)?);
    let (out, width) = (n[0].min(9), n[1].min(9));
    for dtype in [DType::BF16, DType::F32, DType::U32] {
        let linear = Linear::dense(&Tensor::zeros((out, width), dtype, &Device::Cpu)?)?;
        let _ = linear.forward(&xs);
        let fitting = Tensor::ones((shape.0, shape.1, width), DType::F32, &Device::Cpu)?;
        let _ = linear.forward(&fitting);
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn no_shape_range_or_capacity_panics(
        window in prop::option::of(1usize..6), tied: bool, batch in 0usize..3, seq in 0usize..12,
        width in 0usize..3, n in prop::array::uniform4(numbers()),
        lengths in prop::collection::vec(0usize..12, 0..4),
    ) {
        let config = Config { sliding_window: window, tie_word_embeddings: tied, ..tiny::config() };
        let run = || drive(&tiny::transformer(&config, 1)?, [batch, seq, width], n, &lengths);
        holds(run())?;
    }

    #[test]
    fn no_setting_panics(
        ids in prop::collection::vec(prop_oneof![8 => 0u32..32, 1 => any::<u32>()], 0..6),
        n in prop::array::uniform4(numbers()), x in prop::array::uniform6(shares()),
        passes in prop_oneof![4 => 0usize..4, 1 => Just(1_000_000_000)], seed: u64,
        context in prop::option::of(32usize..64),
    ) {
        let run = || -> Result {
            let mut config = tiny::config();
            config.max_position_embeddings = context.unwrap_or(2048);
            let model = tiny::hybrid(&config, 1)?;
            let thinking = Thinking::passes(passes);
            let thinking = match seed % 2 {
                0 => thinking.span(range(n[0], n[1])),
                _ => thinking.refine(Interpolate::new(x[0])),
            };
            let how = GenerationConfig::default().thinking(thinking).seed(seed);
            let how = how.max_tokens(n[2].min(5)).top_k(n[3]).top_logprobs(n[0]);
            let how = how.temperature(x[1]).top_p(x[2]).min_p(x[3]).prompt_logprobs(true);
            let how = how.repetition_penalty(x[4]).frequency_penalty(x[5]);
            let _ = model.generate(ids.clone(), &how);
            let _ = model.think(ids.clone(), &how);
            if let Ok(mut conversation) = model.conversation(n[3]) {
                for _ in 0..2 {
                    let stream = model.stream_in(&mut conversation, ids.clone(), &how);
                    let _ = stream.and_then(TokenStream::collect_answer);
                }
            }
            Ok(())
        };
        holds(run())?;
    }

    /// Nor does asking for more tokens than the context has room for.
    #[test]
    fn the_context_ends_an_answer(room in 1usize..6, max_tokens in numbers()) {
        let run = || -> Result {
            let config = Config { max_position_embeddings: 3 + room, ..tiny::config() };
            let how = GenerationConfig::default().max_tokens(max_tokens);
            let answer = tiny::hybrid(&config, 1)?.generate([1, 2, 3], &how)?;
            // The last token is given, not run.
            assert_eq!(answer.ids.len(), max_tokens.min(room + 1));
            Ok(())
        };
        holds(run())?;
    }
}
