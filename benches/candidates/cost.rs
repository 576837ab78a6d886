//! What candidates cost beside one answer: time, and memory of caches.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use candle_core::DType;
use hybrid_attention::generate::Candidates;
use hybrid_attention::load::Checkpoint;
use hybrid_attention::model::{KvPool, Transformer};
use hybrid_attention::{Config, GenerationConfig, HybridModel};
use hybrid_attention_testing::smollm2;

use hybrid_attention_benches::{SHAPE, ids, median, random_weights, sorted, unpack};

use crate::Result;

const PROMPT: usize = 512;
const TOKENS: usize = 64;
const COUNT: usize = 16;
/// Taking turns.
const RUNS: usize = 5;

/// SmolLM2 in `bf16`, or random weights of its shape, which run just as fast.
fn model() -> Result<HybridModel> {
    let folder = tempfile::tempdir()?;
    match smollm2() {
        Some(file) => unpack(&file, folder.path())?,
        None => {
            let weights = random_weights(&Config::from_json(SHAPE)?)?;
            candle_core::safetensors::save(&weights, folder.path().join("model.safetensors"))?;
            std::fs::write(folder.path().join("config.json"), SHAPE)?;
        }
    }
    let checkpoint = Checkpoint::open(folder.path())?;
    let mut weights = checkpoint.weights(DType::BF16, &candle_core::Device::Cpu);
    let model = Transformer::new(checkpoint.config(), &mut weights)?;
    Ok(HybridModel::new(model, None)?)
}

/// Seconds of reading and of writing, and bytes of caches at the end.
struct Cost {
    prefill: f64,
    decode: f64,
    bytes: usize,
}

impl Cost {
    fn whole(&self) -> f64 {
        self.prefill + self.decode
    }
}

/// As many answers side by side, none of which is dropped.
fn cost(model: &HybridModel, pool: &KvPool, count: usize) -> Result<Cost> {
    let config =
        GenerationConfig::default().temperature(1.0).seed(1).eos_ids([]).max_tokens(TOKENS);
    let config = config.candidates(Candidates::samples(count).keep_all());
    let (bytes, of) = (Arc::new(AtomicUsize::new(0)), pool.clone());
    let most = Arc::clone(&bytes);
    let start = Instant::now();
    let mut stream = model.stream(ids(PROMPT), &config)?.score_by(move |_| {
        most.fetch_max(of.used_bytes(), Ordering::Relaxed);
        Ok(0.0)
    })?;
    stream.read_prompt()?;
    let prefill = start.elapsed().as_secs_f64();
    let answer = stream.collect_answer()?;
    let written: usize = answer.candidates.iter().map(|stub| stub.ids.len()).sum();
    if count > 1 && written != count * TOKENS {
        return Err(format!("{written} tokens were written").into());
    }
    let decode = start.elapsed().as_secs_f64() - prefill;
    Ok(Cost { prefill, decode, bytes: bytes.load(Ordering::Relaxed) })
}

pub(crate) fn run() -> Result<()> {
    let model = model()?.with_cache_budget(usize::MAX)?;
    let pool = model.conversation(8)?.cache().pool().clone();
    let (mut one, mut many) = (Vec::new(), Vec::new());
    for run in 0..=RUNS {
        let (a, b) = (cost(&model, &pool, 1)?, cost(&model, &pool, COUNT)?);
        if run > 0 {
            one.push(a);
            many.push(b);
        }
    }
    println!(
        "{TOKENS} tokens after a prompt of {PROMPT}, bf16, {} threads; medians of {RUNS} runs\n",
        rayon::current_num_threads()
    );
    println!("| | one | {COUNT} | ratio (least..most) |\n|---|---|---|---|");
    for (name, of) in [
        ("reading, s", (|it: &Cost| it.prefill) as fn(&Cost) -> f64),
        ("writing, s", |it| it.decode),
        ("both, s", Cost::whole),
    ] {
        let ratios = sorted(many.iter().zip(&one).map(|(many, one)| of(many) / of(one)).collect());
        let middle = |all: &[Cost]| median(&sorted(all.iter().map(of).collect()));
        println!(
            "| {name} | {:.2} | {:.2} | {:.2} ({:.2}..{:.2}) |",
            middle(&one),
            middle(&many),
            median(&ratios),
            ratios[0],
            ratios[ratios.len() - 1],
        );
    }
    let config = model.config();
    let position = 2 * config.num_key_value_heads * config.head_dim * pool.dtype().size_in_bytes();
    let position = position * config.num_hidden_layers;
    let mib = |bytes: usize| bytes as f64 / f64::from(1 << 20);
    let most = many.iter().map(|it| it.bytes).max().unwrap_or(0);
    println!(
        "\nKeys and values of {COUNT}: {:.1} MiB; one prompt and {COUNT} tails, to the position: {:.1} MiB; {COUNT} \
         answers that share nothing: {:.1} MiB",
        mib(most),
        mib(position * (PROMPT + COUNT * TOKENS)),
        mib(position * COUNT * (PROMPT + TOKENS)),
    );
    Ok(())
}
