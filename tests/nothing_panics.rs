//! Whatever a caller hands in, the answer is a value or an error that says what was wrong.

mod common;

use std::ops::Range;

use candle_core::{DType, Device, Tensor};
use hybrid_attention::model::{
    Attended, Batch, ForwardContext, KvCache, Linear, Mask, Pass, SideProjection, SideSignal,
    Sight, Tap, Transformer, attend,
};
use hybrid_attention::refine::{Interpolate, Refine, Step};
use hybrid_attention::thought::{EncodedBatch, HandOff, ThoughtModel};
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
    let forward = |xs: &Tensor, layers, batch: &Batch| {
        refusal(transformer.forward(xs, layers, Pass::Causal(batch)))
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
    let thinking = Thinking::new(1);
    let mind = thinking.on(model.thought_model())?;
    let thoughts = mind.think(&text, text.embeddings().clone(), |_, _| ())?;
    let (two, mut cache) = (Batch::ragged(&[1, 2])?, transformer.new_cache(8)?);
    let lone = Pass::Remembered { batch: &two, sight: Sight::Causal, caches: vec![&mut cache] };
    let lone = refusal(transformer.forward(&short, 0..3, lone));
    let linear = |out, input| -> Result<Linear> {
        Ok(Linear::dense(&Tensor::zeros((out, input), DType::F32, &Device::Cpu)?)?)
    };
    let side =
        |layer, gate, up| refusal(transformer.with_side(layer, Some(SideProjection { gate, up })));
    let signal = SideSignal::new().layer(1, Tensor::zeros((3, 2), DType::F32, &Device::Cpu)?);
    let signal = ForwardContext::from(Pass::Causal(&dense)).side(&signal);

    let refusals = [
        (
            forward(&short, range(2, 1), &dense),
            "parameter layers: expected a range within 0..3, got 2..1",
        ),
        (forward(&short, 0..4, &dense), "parameter layers: expected a range within 0..3, got 0..4"),
        (
            forward(&short, 0..3, &Batch::one(4)?),
            "parameter batch: expected the 4 tokens of its 1 sequences, got a stream [3, 16]",
        ),
        (
            forward(&short, 0..3, &Batch::dense(2, 3)?),
            "parameter batch: expected the 6 tokens of its 2 sequences, got a stream [3, 16]",
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
            "parameter xs: expected a stream (tokens, 16), got [1, 3, 17]",
        ),
        (
            refusal(transformer.logits(&Tensor::zeros((0, 3, 16), DType::F32, &Device::Cpu)?)),
            "the prompt is empty: at least one token is needed",
        ),
        (
            refusal(transformer.logits(&Tensor::zeros(16, DType::F32, &Device::Cpu)?)),
            "parameter xs: expected a stream (tokens, 16), got [16]",
        ),
        (lone, "parameter caches: expected one for each of 2 sequences, got 1"),
        (
            refusal(transformer.forward(&short, 0..3, signal)),
            "parameter side signal: expected none for a layer without a side projection, got a width of 2",
        ),
        (
            side(1, linear(24, 2)?, linear(24, 3)?),
            "parameter side projection: expected gate and up of one shape (24, width), got (24, 2) and (24, 3)",
        ),
        (side(3, linear(24, 2)?, linear(24, 2)?), "parameter layer: expected less than 3, got 3"),
        (
            refusal(mind.enter_again(&text, &thoughts, &mut transformer.new_cache(8)?, 4)),
            "parameter changed: expected a position within the 3 tokens, got 4",
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
            "context full: the model has room for 2048 positions, 18446744073709551615 requested",
        ),
        (
            refusal(transformer.embed(&Tensor::new(&[[1u32, 32]], &Device::Cpu)?)),
            "token id 32 at position 1: expected less than the vocabulary of 32",
        ),
        (
            refusal(Batch::one(5)?.with_context(0, &[3..4, 1..2])),
            "parameter segments: expected ascending runs of the sequence's 5 tokens, got [3..4, 1..2]",
        ),
        (
            refusal(Batch::dense(2, 5)?.with_context(2, &[])),
            "parameter sequence: expected less than the 2 of the batch, got 2",
        ),
        (
            refusal(Batch::one(5)?.starting_at(0, usize::MAX)),
            "parameter first: expected positions up to 2147483647, got 18446744073709551615",
        ),
        (
            refusal(Batch::ragged(&[5, usize::MAX])),
            "parameter batch: expected at most 2147483647 tokens, and as many sequences, \
             got 5 tokens and 18446744073709551615 more",
        ),
        (
            refusal(Batch::dense(usize::MAX, 0)),
            "parameter batch: expected at most 2147483647 tokens, and as many sequences, \
             got 18446744073709551615 sequences",
        ),
        (
            refusal(EncodedBatch::new(transformer, &[1, 2], Batch::one(3)?)),
            "parameter ids: expected 3 tokens, as in the batch, got 2",
        ),
        (
            refusal(transformer.new_pool(DType::I64, usize::MAX)),
            "parameter cache dtype: expected F32, BF16 or F16, got I64",
        ),
        (
            refusal(Pooling::Mean.pool(&short, &Batch::one(4)?)),
            "parameter batch: expected the 4 tokens of its 1 sequences, got a stream [1, 3, 16]",
        ),
        (
            think(Thinking::new(1_000_000_000)),
            "parameter passes: expected at most 1024, got 1000000000",
        ),
        (
            think(Thinking::new(1).span(range(2, 1))),
            "parameter span: expected a non-empty range within 0..3, got 2..1",
        ),
        (
            refusal(model.think([1], &default().thinking(Thinking::new(1).span(5..9)))),
            "parameter span: expected a non-empty range within 0..3, got 5..9",
        ),
        (
            think(Thinking::new(1).refine(Interpolate::new(f64::NAN))),
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
            "context full: the model has room for 2048 positions, 2049 requested",
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
    let many = HybridModel::new(tiny::transformer(&config, 1)?, tokenizer)?;
    assert_eq!(
        refusal(many.generate("the cat", &default())),
        "token id 315 at position 1: expected less than the vocabulary of 32"
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
    // Every block of it, and every layer, would fit: two mebibytes, and 16 TiB in all layers.
    let config = Config { num_hidden_layers: 128, hidden_size: 2, intermediate_size: 2, ..config };
    let config = Config { head_dim: 2, num_attention_heads: 8, num_key_value_heads: 8, ..config };
    let transformer = tiny::transformer(&config, 1)?;
    assert_eq!(
        refusal(transformer.new_cache(1 << 30)),
        "parameter capacity: expected a cache that fits memory, got 1073741824"
    );
    assert!(transformer.new_cache(1 << 12).is_ok());
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
    let shapes = [
        vec![],
        vec![0],
        vec![1],
        vec![16],
        vec![1, 1, 1],
        vec![2, 3, 16],
        vec![1, 3, 16],
        vec![1, 1, 16],
        vec![2, 16],
        vec![4, 16],
        vec![3, 17],
        vec![16, 3],
        vec![48],
    ];
    for shape in shapes {
        for prompt in &prompts {
            let thinking = Thinking::new(1).refine(Misshapen(shape.clone()));
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

/// Looks at whatever it is told to.
struct Prying([usize; 4]);

impl Tap for Prying {
    fn attention(&mut self, _: usize, attended: &Attended<'_>) -> hybrid_attention::Result<()> {
        let [a, b, c, d] = self.0;
        let _ = (attended.scores(a, b, range(c, d)), attended.weights(b, c, range(a, d)));
        let _ = (attended.keys_and_values(a), attended.mean_weights(b));
        Ok(())
    }
}

fn ones(shape: &[usize]) -> Result<Tensor> {
    Ok(Tensor::ones(shape, DType::F32, &Device::Cpu)?)
}

/// Every call that takes sizes and ranges, with any.
fn drive(model: &ThoughtModel, xs: [usize; 3], n: [usize; 4], lengths: &[usize]) -> Result {
    let decoder = model.decoder();
    let hidden = decoder.config().hidden_size;
    let shape = [xs[0], xs[1], if xs[2] == 0 { hidden } else { xs[2] }];
    let xs = ones(&shape)?;
    let batches = [
        Batch::dense(shape[0], shape[1])?,
        Batch::ragged(lengths)?,
        Batch::one(shape[1])?.with_context(0, &[range(n[0], n[1])]).unwrap_or(Batch::dense(0, 0)?),
        Batch::ragged(lengths)?.starting_at(n[0], n[1]).unwrap_or(Batch::one(0)?),
    ];
    let _ = (Batch::one(n[0]), Batch::dense(n[0], n[1]), Batch::ragged(&n));
    for batch in &batches {
        let fitting = ones(&[batch.tokens(), hidden])?;
        drive_passes(decoder, batch, [&xs, &fitting], n)?;
        drive_thinking(model, batch, [&xs, &fitting], n)?;
        for pooling in [Pooling::Mean, Pooling::WeightedMean, Pooling::LastToken] {
            let _ = (pooling.pool(&xs, batch), pooling.pool(&fitting, batch));
        }
        let _ = (batch.rows(n[0]), batch.context(n[1]), batch.first(n[2]), batch.thinks());
        let _ = (batch.sum(&xs), batch.sum(&fitting), batch.clone().with_context(n[0], &[]));

        for mask in [
            Mask::new(batch, Sight::Bidirectional, Some(n[3]))?,
            Mask::with_past(batch, Sight::Causal, Some(n[2]), &n)?,
            Mask::with_past(batch, Sight::Bidirectional, None, &n[..1])?,
        ] {
            let _ = (mask.sees(n[0], n[1]), mask.keys(n[2]), mask.sequences());
            let dim = n[1].min(9);
            let keys: usize = (0..mask.sequences()).map(|sequence| mask.keys(sequence).len()).sum();
            for keys in [keys, n[3].min(9)] {
                let q = ones(&[n[0].min(6), mask.queries(), dim])?;
                let k = ones(&[n[2].min(3), keys, dim])?;
                let _ = attend(&q, &k, &k, &mask);
            }
        }
    }
    let _ = decoder.logits(&xs);
    let _ = decoder.embed(&Tensor::zeros((shape[0], shape[1]), DType::U32, &Device::Cpu)?);
    let (out, width) = (n[0].min(9), n[1].min(9));
    for dtype in [DType::BF16, DType::F32, DType::U32] {
        let linear = Linear::dense(&Tensor::zeros((out, width), dtype, &Device::Cpu)?)?;
        let _ = linear.forward(&xs);
        let fitting = ones(&[shape[0], shape[1], width])?;
        let _ = linear.forward(&fitting);
        let side = SideProjection { gate: linear.clone(), up: linear };
        let _ = decoder.with_side(n[2], Some(side));
    }
    Ok(())
}

fn drive_passes(
    decoder: &Transformer,
    batch: &Batch,
    streams: [&Tensor; 2],
    n: [usize; 4],
) -> Result {
    let side = SideSignal::new().layer(n[0].min(4), ones(&[n[1].min(40), n[2].min(6)])?);
    let dtype = [DType::F32, DType::BF16, DType::F16, DType::I64][n[0] % 4];
    for layers in [range(n[0], n[1]), decoder.all_layers()] {
        for xs in streams {
            let _ = decoder.forward(xs, layers.clone(), Pass::Causal(batch));
            let _ = decoder.forward(xs, layers.clone(), Pass::Bidirectional(batch));
            let beside = ForwardContext::from(Pass::Causal(batch)).side(&side);
            let _ = decoder.forward(xs, layers.clone(), beside);
            let mut prying = Prying(n);
            let watched = ForwardContext::from(Pass::Bidirectional(batch)).tap(&mut prying);
            let _ = decoder.forward(xs, layers.clone(), watched);
            let Ok(pool) = decoder.new_pool(dtype, n[3].saturating_mul(10_000)) else { continue };
            let Ok(mut cache) = pool.new_cache(n[2]) else { continue };
            for _ in 0..3 {
                let _ = decoder.forward(xs, layers.clone(), Pass::Cached(&mut cache));
                let _ = cache.truncate_layers(range(n[1], n[3]), n[0]);
                let _ = cache.truncate(n[3]);
            }
            let mut forks: Vec<KvCache> = (0..n[3].min(5)).map(|_| cache.fork()).collect();
            for sight in [Sight::Causal, Sight::Bidirectional] {
                let caches = forks.iter_mut().collect();
                let mut prying = Prying(n);
                let pass = Pass::Remembered { batch, sight, caches };
                let watched = ForwardContext::from(pass).tap(&mut prying);
                let _ = decoder.forward(xs, layers.clone(), watched);
            }
        }
    }
    Ok(())
}

fn drive_thinking(
    model: &ThoughtModel,
    batch: &Batch,
    streams: [&Tensor; 2],
    n: [usize; 4],
) -> Result {
    let decoder = model.decoder();
    let thinking = Thinking::new(n[2].min(3)).span(range(n[0], n[1]));
    let thinking = thinking.hand_off(match n[3] % 3 {
        0 => HandOff::Refined,
        1 => HandOff::KeyValue,
        _ => HandOff::Mixed { weight: 0.5 },
    });
    let Ok(mind) = thinking.on(model) else { return Ok(()) };
    for tokens in [batch.tokens(), n[1].min(9)] {
        let Ok(text) = EncodedBatch::new(decoder, &vec![1; tokens], batch.clone()) else {
            continue;
        };
        let _ = mind.encode(&text, Pass::Causal(batch));
        let _ = streams.map(|xs| mind.think_once(xs, batch).ok());
        let Ok(mut thoughts) = mind.think(&text, text.embeddings().clone(), |_, _| ()) else {
            continue;
        };
        for z in [thoughts.z.clone(), streams[0].clone()] {
            thoughts.z = z;
            let _ = mind.hand_off(&text, &thoughts, Pass::Causal(batch));
            let _ = mind.hand_off(&text, &thoughts, Pass::Bidirectional(batch));
            let Ok(mut cache) = decoder.new_cache(n[2]) else { continue };
            let _ = mind.encode(&text, Pass::Cached(&mut cache));
            let _ = mind.hand_off(&text, &thoughts, Pass::Cached(&mut cache));
            let _ = mind.enter_again(&text, &thoughts, &mut cache, n[3]);
            let mut forks: Vec<KvCache> = (0..n[3].min(5)).map(|_| cache.fork()).collect();
            let mut caches: Vec<_> = forks.iter_mut().collect();
            let _ = mind.enter(&text, &thoughts, Some(&mut caches));
        }
        let _ = streams.map(|xs| mind.think(&text, xs.clone(), |_, _| ()).ok());
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
        let run = || drive(&tiny::thought_model(&config, 1)?, [batch, seq, width], n, &lengths);
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
            let thinking = Thinking::new(passes);
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
