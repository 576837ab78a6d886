//! One table of speeds: this crate and candle-transformers on the same weights, and what the machine can
//! do at most.
//!
//! ```text
//! cargo bench --bench speed
//! ```
//!
//! Without SmolLM2 (the README fetches it), random weights of that shape are used, which run just as
//! fast. `-- --write FOLDER` measures nothing and writes the models that `benches/peers.sh` gives to
//! other engines; `-- --only KIND FOLDER` prints only the speeds of this crate on the model there.

#![allow(clippy::print_stdout, clippy::print_stderr)]

use std::error::Error;
use std::hint::black_box;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::llama;
use hybrid_attention::load::Checkpoint;
use hybrid_attention::model::{Batch, Linear, Mask, Pass, Sight, Transformer, Weights, attend};
use hybrid_attention::{Compute, Config, WeightType};
use hybrid_attention_testing::smollm2;
use pulp::{Arch, Simd, WithSimd};
use rayon::prelude::*;

use hybrid_attention_benches::{SHAPE, ids, random_weights, unpack};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const PROMPTS: [usize; 2] = [512, 2048];
const DECODE: usize = 64;
const SIDE_BY_SIDE: usize = 8;
/// The best of this many runs counts: disturbances only ever make a run slower.
const RUNS: usize = 3;

/// What weights are kept in, and how exactly products are computed.
type Kind = (WeightType, Compute);

const KINDS: [(&str, Kind); 7] = [
    ("f32", (WeightType::Dense(DType::F32), Compute::Exact)),
    ("bf16", (WeightType::Dense(DType::BF16), Compute::Exact)),
    ("bf16 fast", (WeightType::Dense(DType::BF16), Compute::Fast)),
    ("q8_0", (WeightType::Quantized(GgmlDType::Q8_0), Compute::Exact)),
    ("q8_0 fast", (WeightType::Quantized(GgmlDType::Q8_0), Compute::Fast)),
    ("q4_k", (WeightType::Quantized(GgmlDType::Q4K), Compute::Exact)),
    ("q4_k fast", (WeightType::Quantized(GgmlDType::Q4K), Compute::Fast)),
];

/// One block of Mistral 7B.
const BLOCK: &str = r#"{
    "model_type": "mistral", "vocab_size": 64, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 1, "num_attention_heads": 32, "num_key_value_heads": 8,
    "max_position_embeddings": 32768
}"#;

/// Weights in the matrices of that block.
const OF_BLOCK: f64 = 4096.0 * (2.0 * 4096.0 + 2.0 * 1024.0 + 3.0 * 14336.0);

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().collect();
    let smollm2 = smollm2();
    let folder = tempfile::tempdir()?;
    if let Some(at) = arguments.iter().position(|argument| argument == "--write") {
        let (Some(to), Some(from)) = (arguments.get(at + 1), smollm2) else {
            return Err("--write needs a folder to write to, and SmolLM2".into());
        };
        let to = Path::new(to);
        std::fs::create_dir_all(to.join("f32"))?;
        std::fs::copy(&from, to.join("smollm2.gguf"))?;
        return unpack(&from, &to.join("f32"));
    }
    if let Some(at) = arguments.iter().position(|argument| argument == "--only") {
        let kind = arguments.get(at + 1).and_then(|it| KINDS.iter().find(|(name, _)| name == it));
        let (Some((_, kind)), Some(folder)) = (kind, arguments.get(at + 2)) else {
            return Err("--only needs f32, bf16, q8_0 or q4_k, all but f32 also as \"bf16 fast\", and a folder".into());
        };
        let [short, long, decode] = ours(Path::new(folder), *kind)?;
        println!("{short} {long} {decode}");
        return Ok(());
    }
    match &smollm2 {
        Some(file) => unpack(file, folder.path())?,
        None => {
            let weights = random_weights(&Config::from_json(SHAPE)?)?;
            candle_core::safetensors::save(&weights, folder.path().join("model.safetensors"))?;
            std::fs::write(folder.path().join("config.json"), SHAPE)?;
        }
    }

    let (reads, peak) = (bandwidth(), multiply_adds());
    println!("{} threads: reads {reads:.1} GB/s, f32 multiply-adds {peak:.0} GFLOP/s\n", threads());
    println!("SmolLM2-135M, tokens/s\n");
    println!("| engine | weights | prefill 512 | prefill 2048 | decode |\n|---|---|---|---|---|");
    for (name, kind) in KINDS {
        print_row("this crate", name, ours(folder.path(), kind)?);
    }
    print_row("candle-transformers", "f32", candle(folder.path())?);

    println!("\nDecoding sequences of {} tokens in one pass, tokens/s\n", PROMPTS[0]);
    println!("| weights | one | {SIDE_BY_SIDE} | ratio |\n|---|---|---|---|");
    // Fast products are of many rows.
    for (name, kind) in KINDS.into_iter().filter(|(_, (_, compute))| *compute == Compute::Exact) {
        let (one, many) =
            (decoding(folder.path(), kind, 1)?, decoding(folder.path(), kind, SIDE_BY_SIDE)?);
        println!("| {name} | {one:.1} | {many:.1} | {:.2} |", many / one);
    }

    println!("\nOne block of Mistral 7B\n");
    println!("| weights | 512 tokens, GFLOP/s | of peak | one token, GB/s | of reads |");
    println!("|---|---|---|---|---|");
    for (name, kind) in KINDS {
        let (flops, bytes) = block(kind)?;
        println!(
            "| {name} | {flops:.0} | {:.2} | {bytes:.1} | {:.2} |",
            flops / peak,
            bytes / reads
        );
    }

    println!("\nAttention, 32 heads to 8 of 128, f32\n");
    println!("| tokens | sight | GFLOP/s | of peak |\n|---|---|---|---|");
    for tokens in [2048, 8192] {
        for sight in [Sight::Bidirectional, Sight::Causal] {
            let flops = attention(tokens, sight)?;
            println!("| {tokens} | {sight:?} | {flops:.0} | {:.2} |", flops / peak);
        }
    }
    Ok(())
}

fn threads() -> usize {
    rayon::current_num_threads()
}

fn print_row(engine: &str, weights: &str, figures: [f64; 3]) {
    let [short, long, decode] = figures;
    println!("| {engine} | {weights} | {short:.0} | {long:.0} | {decode:.1} |");
}

/// Seconds of the best of some runs, after one that is not counted.
fn best(mut run: impl FnMut() -> Result<()>) -> Result<f64> {
    run()?;
    let mut best = f64::MAX;
    for _ in 0..RUNS {
        let start = Instant::now();
        run()?;
        best = best.min(start.elapsed().as_secs_f64());
    }
    Ok(best)
}

/// Prefill of both prompts and decoding after the first, in tokens a second.
fn ours(folder: &Path, (kind, compute): Kind) -> Result<[f64; 3]> {
    let checkpoint = Checkpoint::open(folder)?;
    let mut weights = checkpoint.weights(kind, &Device::Cpu);
    let model = Transformer::new(checkpoint.config(), &mut weights)?.with_compute(compute);
    weights.finish()?;
    let most = PROMPTS[1] + DECODE;
    let mut cache = model.new_cache(most)?;
    let mut read = |tokens: &[u32], start: usize| -> Result<()> {
        cache.truncate(start)?;
        let xs = model.embed(&Tensor::new(tokens, &Device::Cpu)?.unsqueeze(0)?)?;
        let h = model.forward(&xs, model.all_layers(), Pass::Cached(&mut cache))?;
        black_box(model.logits(&h.narrow(1, tokens.len() - 1, 1)?)?);
        Ok(())
    };
    let [short, long] = PROMPTS.map(ids);
    let long_seconds = best(|| read(&long, 0))?;
    let short_seconds = best(|| read(&short, 0))?;
    let decode = best(|| (0..DECODE).try_for_each(|i| read(&[5 + i as u32], PROMPTS[0] + i)))?;
    Ok([
        PROMPTS[0] as f64 / short_seconds,
        PROMPTS[1] as f64 / long_seconds,
        DECODE as f64 / decode,
    ])
}

/// Tokens a second of `count` sequences that continue side by side from one prompt, whose keys they
/// share.
fn decoding(folder: &Path, (kind, compute): Kind, count: usize) -> Result<f64> {
    let checkpoint = Checkpoint::open(folder)?;
    let model = Transformer::new(checkpoint.config(), &mut checkpoint.weights(kind, &Device::Cpu))?;
    let model = model.with_compute(compute);
    let mut prompt = model.new_cache(PROMPTS[0] + DECODE)?;
    let xs = model.embed_ids(&ids(PROMPTS[0]))?;
    model.forward(&xs, model.all_layers(), Pass::Cached(&mut prompt))?;
    let (batch, xs) = (Batch::dense(count, 1)?, model.embed_ids(&ids(count))?);
    let seconds = best(|| {
        let mut forks: Vec<_> = (0..count).map(|_| prompt.fork()).collect();
        for _ in 0..DECODE {
            let caches = forks.iter_mut().collect();
            let pass = Pass::Remembered { batch: &batch, sight: Sight::Causal, caches };
            let h = model.forward(&xs, model.all_layers(), pass)?;
            black_box(model.logits(&h)?);
        }
        Ok(())
    })?;
    Ok((count * DECODE) as f64 / seconds)
}

fn candle(folder: &Path) -> Result<[f64; 3]> {
    let config = std::fs::read(folder.join("config.json"))?;
    let config = serde_json::from_slice::<llama::LlamaConfig>(&config)?.into_config(false);
    let file = folder.join("model.safetensors");
    // SAFETY: the file was written by this benchmark into a folder of its own.
    let vb = unsafe { VarBuilder::from_mmaped_safetensors(&[file], DType::F32, &Device::Cpu)? };
    let model = llama::Llama::load(vb, &config)?;
    let cache = || llama::Cache::new(true, DType::F32, &config, &Device::Cpu);
    let read = |tokens: &[u32], start: usize, cache: &mut llama::Cache| -> Result<()> {
        let tokens = Tensor::new(tokens, &Device::Cpu)?.unsqueeze(0)?;
        black_box(model.forward(&tokens, start, cache)?);
        Ok(())
    };
    let [short, long] = PROMPTS.map(ids);
    let mut prompts = [0.0; 2];
    for (seconds, prompt) in prompts.iter_mut().zip([&short, &long]) {
        *seconds = best(|| read(prompt, 0, &mut cache()?))?;
    }
    let mut filled = cache()?;
    read(&short, 0, &mut filled)?;
    let mut at = PROMPTS[0];
    let decode = best(|| {
        at += DECODE;
        (0..DECODE).try_for_each(|i| read(&[5 + i as u32], at - DECODE + i, &mut filled))
    })?;
    Ok([PROMPTS[0] as f64 / prompts[0], PROMPTS[1] as f64 / prompts[1], DECODE as f64 / decode])
}

/// Random weights, kept in the type of field `0`.
struct Random(WeightType);

impl Weights for Random {
    fn tensor(&mut self, _: &str, shape: &[usize]) -> hybrid_attention::Result<Tensor> {
        Ok(Tensor::randn(0f32, 0.02, shape, &Device::Cpu)?)
    }

    fn linear(&mut self, name: &str, out: usize, input: usize) -> hybrid_attention::Result<Linear> {
        let weight = self.tensor(name, &[out, input])?;
        match self.0 {
            WeightType::Dense(dtype) => Linear::dense(&weight.to_dtype(dtype)?),
            WeightType::Quantized(blocks) => {
                Linear::quantized(Arc::new(QTensor::quantize(&weight, blocks)?))
            }
            WeightType::Stored => Linear::dense(&weight),
        }
    }
}

/// One block of Mistral 7B: GFLOP/s over 512 tokens, and GB/s of weights read for one.
fn block((kind, compute): Kind) -> Result<(f64, f64)> {
    let model = Transformer::new(&Config::from_json(BLOCK)?, &mut Random(kind))?;
    let model = model.with_compute(compute);
    let run = |tokens: usize| -> Result<f64> {
        let xs = Tensor::randn(0f32, 1.0, (1, tokens, 4096), &Device::Cpu)?;
        let layout = Batch::one(tokens)?;
        best(|| {
            black_box(model.forward(&xs, 0..1, Pass::Causal(&layout))?);
            Ok(())
        })
    };
    let bits = match kind {
        WeightType::Dense(dtype) => dtype.size_in_bytes() as f64,
        WeightType::Quantized(it) => it.type_size() as f64 / it.block_size() as f64,
        WeightType::Stored => 4.0,
    };
    let attention = 2.0 * 2.0 * 512.0 * 512.0 / 2.0 * 4096.0;
    let flops = 2.0 * OF_BLOCK * 512.0 + attention;
    Ok((flops / run(512)? / 1e9, OF_BLOCK * bits / run(1)? / 1e9))
}

/// GFLOP/s of attention by itself; causal counts half.
fn attention(tokens: usize, sight: Sight) -> Result<f64> {
    let random = |heads| Tensor::randn(0f32, 1.0, (heads, tokens, 128), &Device::Cpu);
    let (q, k, v) = (random(32)?, random(8)?, random(8)?);
    let mask = Mask::new(&Batch::one(tokens)?, sight, None)?;
    let seconds = best(|| {
        black_box(attend(&q, &k, &v, &mask)?);
        Ok(())
    })?;
    let share = if sight == Sight::Causal { 0.5 } else { 1.0 };
    Ok(share * 2.0 * 2.0 * (tokens * tokens * 32 * 128) as f64 / seconds / 1e9)
}

/// GB/s of a sum over memory that does not fit in a cache. Each thread reads several runs of it at once,
/// which keeps more loads in flight than one run would.
fn bandwidth() -> f64 {
    const COUNT: usize = 1 << 27; // 512 MiB
    const RUNS_AT_ONCE: usize = 8;
    let numbers = vec![1f32; COUNT];
    let arch = Arch::new();
    let sum_of = |part: &[f32]| {
        let runs: Vec<_> = part.chunks(part.len() / RUNS_AT_ONCE).collect();
        let mut sums = [[0f32; 64]; RUNS_AT_ONCE];
        for at in (0..part.len() / RUNS_AT_ONCE).step_by(64) {
            for (sums, run) in sums.iter_mut().zip(&runs) {
                let run = run.get(at..).and_then(|rest| rest.first_chunk::<64>());
                run.into_iter().for_each(|it| sums.iter_mut().zip(it).for_each(|(s, x)| *s += x));
            }
        }
        sums.as_flattened().iter().sum::<f32>()
    };
    let run = || {
        let parts = numbers.par_chunks(COUNT / threads());
        let sum: f32 = parts.map(|part| arch.dispatch(|| sum_of(part))).sum();
        black_box(sum);
        Ok(())
    };
    (COUNT * size_of::<f32>()) as f64 / best(run).unwrap_or(f64::MAX) / 1e9
}

/// GFLOP/s of multiplications and additions in registers, on all threads.
fn multiply_adds() -> f64 {
    const STEPS: usize = 20_000_000;
    struct Steps;
    impl WithSimd for Steps {
        type Output = (f32, usize);

        #[inline(always)]
        fn with_simd<S: Simd>(self, simd: S) -> (f32, usize) {
            let factor = simd.splat_f32s(black_box(0.999));
            let mut sums = [simd.splat_f32s(black_box(1.0)); 12];
            for _ in 0..STEPS {
                for sum in &mut sums {
                    *sum = simd.mul_add_e_f32s(*sum, factor, factor);
                }
            }
            let sum = sums.into_iter().fold(0.0, |all, sum| all + simd.reduce_sum_f32s(sum));
            (sum, 2 * 12 * S::F32_LANES * STEPS)
        }
    }
    let start = Instant::now();
    let done: Vec<_> =
        (0..threads()).into_par_iter().map(|_| Arch::new().dispatch(Steps)).collect();
    let seconds = start.elapsed().as_secs_f64();
    done.iter().map(|(_, flops)| *flops as f64).sum::<f64>() / seconds / 1e9
}
