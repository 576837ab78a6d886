//! The cost of thinking, beside that of a plain prefill and a plain decode step in the same run.
//!
//! Random `f32` weights in the shape of SmolLM2-135M, on the CPU:
//!
//! ```text
//! cargo bench --bench thinking
//! ```
//!
//! Prints, as medians of pairs run in turn: the time of one thought pass over a span, refinement
//! included, over the span's share of a plain prefill's layers; the time of a pass over texts of
//! different lengths over that of one over as many of the longest; the time of a decode step of a stream
//! that does not think over the same step by hand; and the peak memory of thinking about 8191 tokens
//! over that of reading them.

#![allow(clippy::print_stdout)]

use std::ops::Range;
use std::process::Command;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use candle_core::Tensor;
use hybrid_attention::generate::Sampler;
use hybrid_attention::model::{Batch, KvCache, Pass, Transformer};
use hybrid_attention::refine::seq;
use hybrid_attention::thought::{EncodedBatch, HandOff, ThoughtModel};
use hybrid_attention::{Config, GenerationConfig, HybridModel, Thinking};

use hybrid_attention_benches::{SHAPE, ids, median, peak_memory, random_weights, sorted};

type Result<T> = std::result::Result<T, Box<dyn std::error::Error>>;

/// Tokens whose peak memory is compared; with the one generated they fill the context.
const LONG: usize = 8191;

const DECODE: usize = 200;

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().collect();
    if let [_, memory, how] = arguments.as_slice()
        && memory == "memory"
    {
        return memory_of(how);
    }
    let model = model()?;
    println!("{:<44}{:>10}{:>10}{:>20}", "", "here, ms", "plain, ms", "ratio (min..max)");
    for (count, pairs) in [(128, 15), (512, 9), (2048, 3)] {
        for span in [0..30, 10..20] {
            pass(model.thought_model(), count, span, pairs)?;
        }
    }
    ragged(model.transformer(), &[512, 64, 64, 64], 5)?;
    gradient(model.thought_model(), 128)?;
    decode(&model)?;
    let plain = peak_of("plain")?;
    for how in ["refined", "key_value", "mixed"] {
        let peak = peak_of(how)?;
        println!(
            "{:<44}{peak:>10.0}{plain:>10.0}{:>10.2}",
            format!("peak MiB, {LONG} tokens, {how}"),
            peak / plain
        );
    }
    Ok(())
}

fn model() -> Result<HybridModel> {
    let config = Config::from_json(SHAPE)?;
    let transformer = Transformer::new(&config, &mut random_weights(&config)?)?;
    Ok(HybridModel::new(transformer, None)?)
}

fn milliseconds<T>(run: impl FnOnce() -> Result<T>) -> Result<f64> {
    let start = Instant::now();
    run()?;
    Ok(start.elapsed().as_secs_f64() * 1e3)
}

/// One line: medians of both, and of the ratio of each pair.
fn line(title: &str, here: Vec<f64>, plain: Vec<f64>) {
    let ratios = sorted(here.iter().zip(&plain).map(|(a, b)| a / b).collect());
    let (low, high) = (ratios[0], ratios[ratios.len() - 1]);
    let ratio = format!("{:.3} ({low:.2}..{high:.2})", median(&ratios));
    let (here, plain) = (median(&sorted(here)), median(&sorted(plain)));
    println!("{title:<44}{here:>10.1}{plain:>10.1}{ratio:>20}");
}

/// One thought pass of `span` over `count` tokens, and the same share of a prefill's layers.
fn pass(model: &ThoughtModel, count: usize, span: Range<usize>, pairs: usize) -> Result<()> {
    let thinking = Thinking::new(1).span(span.clone());
    let (mind, transformer) = (thinking.on(model)?, model.decoder());
    let batch = Batch::one(count)?.with_context(0, std::slice::from_ref(&(0..count - 1)))?;
    let text = EncodedBatch::new(transformer, &ids(count), batch)?;
    let xs = text.embeddings();
    let mut cache = transformer.new_cache(count)?;
    let layers = transformer.all_layers();
    let share = span.len() as f64 / layers.len() as f64;
    let (mut here, mut plain) = (Vec::new(), Vec::new());
    for pair in 0..=pairs {
        let pass = milliseconds(|| Ok(mind.think(&text, xs.clone(), |_, _| ())?))?;
        cache.reset();
        let prefill = milliseconds(|| {
            Ok(transformer.forward(xs, layers.clone(), Pass::Cached(&mut cache))?)
        })?;
        if pair > 0 {
            here.push(pass);
            plain.push(prefill * share);
        }
    }
    line(&format!("one pass, {count} tokens, layers {span:?}"), here, plain);
    Ok(())
}

/// One pass over sequences of different lengths, beside one over as many of the longest: the cost of
/// padding them.
fn ragged(transformer: &Transformer, lengths: &[usize], pairs: usize) -> Result<()> {
    let longest = lengths.iter().copied().max().unwrap_or(0);
    let text = |batch: Batch| EncodedBatch::new(transformer, &ids(batch.tokens()), batch);
    let packed = text(Batch::ragged(lengths)?)?;
    let padded = text(Batch::dense(lengths.len(), longest)?)?;
    let (mut here, mut plain) = (Vec::new(), Vec::new());
    for pair in 0..=pairs {
        let forward = |text: &EncodedBatch| {
            let (xs, layers) = (text.embeddings(), transformer.all_layers());
            milliseconds(|| {
                Ok(transformer.forward(xs, layers, Pass::Bidirectional(text.batch()))?)
            })
        };
        let (packed, padded) = (forward(&packed)?, forward(&padded)?);
        if pair > 0 {
            here.push(packed);
            plain.push(padded);
        }
    }
    line(&format!("sequences of {lengths:?}, padded as plain"), here, plain);
    Ok(())
}

/// What a step of a gradient nudge costs, beside reading the thoughts and scoring every token.
fn gradient(model: &ThoughtModel, count: usize) -> Result<()> {
    let transformer = model.decoder();
    let text = EncodedBatch::new(transformer, &ids(count), Batch::one(count)?)?;
    let (here, plain) = (Arc::new(Mutex::new(Vec::new())), Arc::new(Mutex::new(Vec::new())));
    let (gradients, losses) = (Arc::clone(&here), Arc::clone(&plain));
    let time = seq().add_fn(move |xs, step| {
        let readout = step.readout.ok_or(hybrid_attention::Error::EmptyPrompt)?;
        for pair in 0..=3 {
            let start = Instant::now();
            readout.loss_and_gradient(xs)?;
            let between = Instant::now();
            readout.loss(xs)?;
            if let (Ok(mut gradients), Ok(mut losses), 1..) =
                (gradients.lock(), losses.lock(), pair)
            {
                gradients.push((between - start).as_secs_f64() * 1e3);
                losses.push(between.elapsed().as_secs_f64() * 1e3);
            }
        }
        Ok(xs.clone())
    });
    let thinking = Thinking::new(1).span(0..1).refine(time);
    thinking.on(model)?.think(&text, text.embeddings().clone(), |_, _| ())?;
    let taken =
        |times: &Mutex<Vec<f64>>| times.lock().map(|times| times.clone()).unwrap_or_default();
    line(&format!("one gradient beside one loss, {count} tokens"), taken(&here), taken(&plain));
    Ok(())
}

/// Decode steps of a stream that does not think, and of a loop written by hand, in turn.
fn decode(model: &HybridModel) -> Result<()> {
    let (transformer, prompt) = (model.transformer(), ids(128));
    let config = GenerationConfig::default().max_tokens(DECODE + 1).eos_ids([]);
    let mut stream = model.stream(prompt.as_slice(), &config)?;
    let mut first = stream.next().ok_or("no first token")??.id;

    let mut cache = transformer.new_cache(prompt.len() + DECODE + 1)?;
    let mut sampler = Sampler::new(&config, &prompt)?;
    let tokens = Tensor::new(prompt.as_slice(), transformer.device())?.unsqueeze(0)?;
    step(transformer, &tokens, &mut cache)?;
    let (mut here, mut plain) = (Vec::new(), Vec::new());
    for _ in 0..DECODE {
        here.push(milliseconds(|| Ok(stream.next().ok_or("no token")??))?);
        plain.push(milliseconds(|| {
            let token = Tensor::new(&[[first]], transformer.device())?;
            let logits = step(transformer, &token, &mut cache)?;
            first = sampler.sample(&logits)?;
            // The log-probability of the token, which the stream gives too.
            let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let sum: f64 = logits.iter().map(|&logit| f64::from((logit - max).exp())).sum();
            std::hint::black_box(sum.ln());
            Ok(())
        })?);
    }
    line("decode step, not thinking", here, plain);
    Ok(())
}

fn step(transformer: &Transformer, tokens: &Tensor, cache: &mut KvCache) -> Result<Vec<f32>> {
    let xs = transformer.embed(tokens)?;
    let h = transformer.forward(&xs, transformer.all_layers(), Pass::Cached(cache))?;
    let last = h.narrow(1, h.dim(1)? - 1, 1)?;
    Ok(transformer.logits(&last)?.flatten_all()?.to_vec1()?)
}

/// The peak memory of a separate process, in MiB.
fn peak_of(how: &str) -> Result<f64> {
    let output = Command::new(std::env::current_exe()?).args(["memory", how]).output()?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into());
    }
    Ok(String::from_utf8(output.stdout)?.trim().parse()?)
}

/// Answers a long prompt with one token, and prints the peak memory.
fn memory_of(how: &str) -> Result<()> {
    let thinking = Thinking::new(1);
    let thinking = match how {
        "plain" => Thinking::none(),
        "key_value" => thinking.hand_off(HandOff::KeyValue),
        "mixed" => thinking.hand_off(HandOff::Mixed { weight: 0.5 }),
        _ => thinking,
    };
    let config = GenerationConfig::default().thinking(thinking).max_tokens(1);
    model()?.generate(ids(LONG), &config)?;
    println!("{}", peak_memory());
    Ok(())
}
