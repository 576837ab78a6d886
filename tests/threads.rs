//! No bit of any result depends on the number of threads, or on what else runs at the same time.

mod common;

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, Ordering};

use candle_core::quantized::GgmlDType;
use candle_core::{DType, Device, Tensor, Var};
use hybrid_attention::model::{Batch, Pass, Sight, Transformer};
use hybrid_attention::refine::{Interpolate, OutputNudge};
use hybrid_attention::thought::{EncodedBatch, ThoughtModel};
use hybrid_attention::{
    Compute, Config, EmbedConfig, GenerationConfig, HandOff, HybridModel, Pooling, Thinking,
    WeightType,
};
use rayon::{ThreadPool, ThreadPoolBuilder};

use common::Result;
use common::{kept, tiny};

/// As many as divide nothing evenly, and more than there may be processors.
const THREADS: [usize; 4] = [1, 2, 3, 7];

const KEPT: [WeightType; 5] = [
    WeightType::Dense(DType::F32),
    WeightType::Dense(DType::BF16),
    WeightType::Dense(DType::F16),
    WeightType::Quantized(GgmlDType::Q8_0),
    WeightType::Quantized(GgmlDType::Q4_0),
];

/// Wide enough that every part is cut for several threads.
fn config(sliding_window: Option<usize>) -> Config {
    Config {
        vocab_size: 300,
        hidden_size: 96,
        intermediate_size: 224,
        num_hidden_layers: 2,
        num_attention_heads: 6,
        num_key_value_heads: 2,
        head_dim: 16,
        sliding_window,
        ..tiny::config()
    }
}

/// Numbers of a result, bit by bit, by what they are.
type Bits = Vec<(String, Vec<u64>)>;

fn bits(what: impl Into<String>, xs: &Tensor) -> Result<(String, Vec<u64>)> {
    let xs = xs.detach().to_dtype(DType::F32)?.flatten_all()?.to_vec1::<f32>()?;
    Ok((what.into(), xs.into_iter().map(|x| u64::from(x.to_bits())).collect()))
}

fn pool(threads: usize) -> Result<ThreadPool> {
    Ok(ThreadPoolBuilder::new().num_threads(threads).build()?)
}

/// Fails unless work gives the same in pools of any size, outside of any, and beside other work.
fn check(name: &str, work: impl Fn() -> Result<Bits> + Sync) -> Result {
    let work = || work().map_err(|error| error.to_string());
    let expected = work()?;
    let compare = |where_: &str, got: Bits| {
        assert_eq!(got.len(), expected.len());
        for ((what, got), (_, expected)) in got.iter().zip(&expected) {
            assert_eq!(got.len(), expected.len());
            let differing = got.iter().zip(expected).position(|(a, b)| a != b);
            assert_eq!(differing, None, "{name}, {what}, {where_}: of {} numbers", got.len());
        }
    };
    for threads in THREADS {
        compare(&format!("{threads} threads"), pool(threads)?.install(work)?);
    }
    // Two at once in one pool, and two at once without any.
    let shared = pool(3)?;
    let (a, b) = shared.install(|| rayon::join(work, work));
    compare("beside itself", a?);
    compare("beside itself", b?);
    let done = AtomicBool::new(false);
    let (a, b) = std::thread::scope(|scope| {
        // Keeps the threads of all pools busy with small things.
        let noise = scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                rayon::join(std::thread::yield_now, std::hint::spin_loop);
            }
        });
        let other = scope.spawn(work);
        let both = (work(), other.join());
        done.store(true, Ordering::Relaxed);
        drop(noise.join());
        both
    });
    compare("beside another thread", a?);
    compare("in another thread", b.map_err(|_| "a thread")??);
    Ok(())
}

#[test]
fn passes_and_logits() -> Result {
    let exact = KEPT.into_iter().zip([None, Some(50), None, Some(130), None]);
    let exact = exact.map(|(kept, window)| (kept, window, Compute::Exact));
    let fast = [KEPT[1], KEPT[3]].map(|kept| (kept, None, Compute::Fast));
    for (kept, window, compute) in exact.chain(fast) {
        let model = kept::transformer(&config(window), kept, 1)?.with_compute(compute);
        // One token, few, about as many as the threads cut, and many of several texts.
        for lengths in [vec![1], vec![3], vec![9, 1, 5], vec![17], vec![131], vec![40, 333, 1, 70]]
        {
            let batch = Batch::ragged(&lengths)?;
            let ids = tiny::tokens(model.config(), 2, batch.tokens());
            check(&format!("{kept:?} {compute:?} {lengths:?}"), || {
                let xs = model.embed_ids(&ids)?;
                let mut all = Vec::new();
                for sight in [Sight::Causal, Sight::Bidirectional] {
                    let pass = Pass::uncached(&batch, sight);
                    let h = model.forward(&xs, model.all_layers(), pass)?;
                    all.push(bits(format!("{sight:?}"), &h)?);
                    all.push(bits("logits", &model.logits(&h)?)?);
                }
                Ok(all)
            })?;
        }
    }
    Ok(())
}

#[test]
fn caches_and_decoding() -> Result {
    for (kept, dtype) in
        KEPT.into_iter().zip([DType::F32, DType::BF16, DType::F16, DType::F32, DType::F32])
    {
        let model = kept::transformer(&config(Some(200)), kept, 3)?;
        let lengths = [600, 30, 1];
        let batch = Batch::ragged(&lengths)?;
        let ids = tiny::tokens(model.config(), 4, batch.tokens());
        check(&format!("{kept:?} {dtype:?}"), || {
            let pool = model.new_pool(dtype, usize::MAX)?;
            let mut caches = Vec::new();
            for _ in lengths {
                caches.push(pool.new_cache(800)?);
            }
            let xs = model.embed_ids(&ids)?;
            let pass = Pass::Remembered {
                batch: &batch,
                sight: Sight::Causal,
                caches: caches.iter_mut().collect(),
            };
            let mut all = vec![bits("prefill", &model.forward(&xs, model.all_layers(), pass)?)?];
            let step = Batch::dense(3, 1)?;
            for at in 0..3 {
                let xs = model.embed_ids(&tiny::tokens(model.config(), at, 3))?;
                let caches = caches.iter_mut().collect();
                let pass = Pass::Remembered { batch: &step, sight: Sight::Causal, caches };
                all.push(bits(format!("step {at}"), &tiny::logits(&model, &xs, pass)?)?);
            }
            let xs = model.embed_ids(&[5])?;
            all.push(bits("alone", &tiny::logits(&model, &xs, Pass::Cached(&mut caches[0]))?)?);
            Ok(all)
        })?;
    }
    Ok(())
}

#[test]
fn thoughts_and_hand_offs() -> Result {
    for kept in KEPT {
        let model: ThoughtModel = kept::transformer(&config(None), kept, 5)?.into();
        let decoder = model.decoder();
        let batch = Batch::ragged(&[150, 40])?.with_context(0, &[0..60, 60..149])?;
        let ids = tiny::tokens(decoder.config(), 6, batch.tokens());
        for hand_off in [HandOff::Refined, HandOff::KeyValue, HandOff::Mixed { weight: 0.4 }] {
            let thinking = Thinking::new(2).span(0..2).refine(Interpolate::new(0.4));
            let mind = thinking.hand_off(hand_off).on(&model)?;
            check(&format!("{kept:?} {hand_off:?}"), || {
                let text = EncodedBatch::new(decoder, &ids, batch.clone())?;
                let first = mind.encode(&text, Pass::Causal(&batch))?;
                let thoughts = mind.think(&text, first, |_, _| ())?;
                let drift = thoughts.trace.drift().into_iter().map(f64::to_bits).collect();
                let h = mind.hand_off(&text, &thoughts, Pass::Causal(&batch))?;
                Ok(vec![
                    bits("thoughts", &thoughts.z)?,
                    ("drift".to_string(), drift),
                    bits("hand-off", &h)?,
                ])
            })?;
        }
    }
    Ok(())
}

#[test]
fn vectors_of_texts() -> Result {
    let model = HybridModel::tiny(&Device::Cpu)?;
    let texts = [
        "The coin is in the jar. The jar is in the chest.".to_string(),
        "Leo gave everything to Ida.".to_string(),
        "The ball is in the box. The box is in the cart. ".repeat(9),
        "The egg is in the nest.".to_string(),
    ];
    for pooling in [Pooling::Mean, Pooling::LastToken] {
        for thinking in [Thinking::none(), Thinking::new(3).span(1..3)] {
            for sight in [Sight::Causal, Sight::Bidirectional] {
                let config = EmbedConfig::default().pooling(pooling).sight(sight);
                let config = config.thinking(thinking.clone()).batch_tokens(300);
                check(&format!("{config:?}"), || {
                    Ok(vec![bits("vectors", &model.embed(&texts, &config)?)?])
                })?;
            }
        }
    }
    Ok(())
}

#[test]
fn answers() -> Result {
    let model = HybridModel::tiny(&Device::Cpu)?;
    let prompts =
        ["The coin is in the jar. ".repeat(20), "Leo gave everything to Ida.".to_string()];
    let own = GenerationConfig::default().max_tokens(12).eos_ids([]).prompt_logprobs(true);
    let passes = || Thinking::new(2).span(1..3);
    for (name, config) in [
        ("plain", own.clone().thinking(Thinking::none())),
        ("drawn", own.clone().temperature(1.0).seed(3).thinking(Thinking::none())),
        ("thinking", own.clone().thinking(passes())),
        ("re-thinking", own.clone().thinking(passes().rethink_every(5))),
        ("nudged", own.clone().thinking(passes().output_nudge(OutputNudge::new(3)))),
    ] {
        check(name, || {
            let mut all = Vec::new();
            let mut add = |what: &str, answer: hybrid_attention::Answer| {
                let numbers =
                    answer.prompt_logprobs.into_iter().flatten().flatten().chain(answer.logprobs);
                all.push((what.to_string(), answer.ids.into_iter().map(u64::from).collect()));
                all.push((what.to_string(), numbers.map(|it| u64::from(it.to_bits())).collect()));
            };
            for prompt in &prompts {
                add("alone", model.generate(prompt.as_str(), &config)?);
            }
            let mut together: Vec<_> = model.generate_many(&prompts, &config)?.collect();
            together.sort_by_key(|(index, _)| *index);
            for (_, answer) in together {
                add("side by side", answer?);
            }
            Ok(all)
        })?;
    }
    Ok(())
}

/// Of all weights and of the stream, through plain passes, caches and thoughts.
#[test]
fn gradients() -> Result {
    for window in [None, Some(60)] {
        let config = config(window);
        let plain = tiny::weights(&config, 7)?;
        let mut vars = Vec::new();
        for (name, weight) in &plain {
            vars.push((name.clone(), Var::from_tensor(weight)?));
        }
        vars.sort_by(|(a, _), (b, _)| a.cmp(b));
        let mut tracked: HashMap<_, _> =
            vars.iter().map(|(name, var)| (name.clone(), var.as_tensor().clone())).collect();
        let model: ThoughtModel = Transformer::new(&config, &mut tracked)?.into();
        let decoder = model.decoder();
        let lengths = [90, 41, 1];
        let batch = Batch::ragged(&lengths)?.with_context(0, &[0..50, 50..80])?;
        let ids = tiny::tokens(&config, 8, batch.tokens());
        let thinking = Thinking::new(2).span(0..2).refine(Interpolate::new(0.4));
        let mind = thinking.on(&model)?;
        for way in ["causal", "both ways", "remembered", "thinking"] {
            check(&format!("{way} {window:?}"), || {
                let xs = decoder.embed_ids(&ids)?;
                let layers = decoder.all_layers();
                let h = match way {
                    "causal" => decoder.forward(&xs, layers, Pass::Causal(&batch))?,
                    "both ways" => decoder.forward(&xs, layers, Pass::Bidirectional(&batch))?,
                    "remembered" => {
                        let mut caches = Vec::new();
                        for length in lengths {
                            caches.push(decoder.new_cache(length)?);
                        }
                        let caches = caches.iter_mut().collect();
                        let pass = Pass::Remembered { batch: &batch, sight: Sight::Causal, caches };
                        decoder.forward(&xs, layers, pass)?
                    }
                    _ => {
                        let text = EncodedBatch::new(decoder, &ids, batch.clone())?;
                        let first = mind.encode(&text, Pass::Causal(&batch))?;
                        let thoughts = mind.think(&text, first, |_, _| ())?;
                        mind.hand_off(&text, &thoughts, Pass::Causal(&batch))?
                    }
                };
                let logits = decoder.logits(&h)?;
                let loss = (&logits * tiny::noise(9, logits.dims(), 0.1)?)?.sum_all()?;
                let gradients = loss.backward()?;
                let mut all = vec![bits("loss", &loss)?];
                for (name, var) in &vars {
                    all.push(bits(name, gradients.get(var).ok_or("no gradient")?)?);
                }
                Ok(all)
            })?;
        }
    }
    Ok(())
}

/// Of the stream alone, over weights of every type.
#[test]
fn gradients_over_constant_weights() -> Result {
    for kept in KEPT {
        let model = kept::transformer(&config(Some(40)), kept, 10)?;
        for lengths in [vec![5], vec![70, 3, 100]] {
            let batch = Batch::ragged(&lengths)?;
            let xs = tiny::noise(11, &[batch.tokens(), 96], 1.0)?;
            check(&format!("{kept:?} {lengths:?}"), || {
                let var = Var::from_tensor(&xs)?;
                let h = model.forward(&var, model.all_layers(), Pass::Bidirectional(&batch))?;
                let logits = model.logits(&h)?;
                let loss = (&logits * tiny::noise(9, logits.dims(), 0.1)?)?.sum_all()?;
                let gradients = loss.backward()?;
                Ok(vec![
                    bits("logits", &logits)?,
                    bits("gradient", gradients.get(&var).ok_or("none")?)?,
                ])
            })?;
        }
    }
    Ok(())
}
