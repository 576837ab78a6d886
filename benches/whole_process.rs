//! Whole processes side by side: load, prefill 512 tokens, decode 64; ours and candle-transformers'
//! own llama in turn, on the same `f32` safetensors.
//!
//! ```text
//! cargo bench --bench whole_process
//! ```
//!
//! The GGUF file of SmolLM2 (the README fetches it) is unpacked once into a temporary folder that both
//! then load. Prints a table of medians over five pairs, and the ratio of each pair's figures.

#![allow(clippy::print_stdout, clippy::print_stderr)]

use std::error::Error;
use std::path::Path;
use std::process::Command;
use std::time::Instant;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::llama;
use hybrid_attention::{GenerationConfig, HybridModel};
use hybrid_attention_testing::smollm2;
use serde_json::{Value, json};

use hybrid_attention_benches::{ids, median, peak_memory, sorted, unpack};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const PAIRS: usize = 5;
const PROMPT: usize = 512;
const DECODE: usize = 64;
const ENGINES: [&str; 2] = ["ours", "candle-transformers"];
const FIGURES: [(&str, &str); 5] = [
    ("process", "whole process, s"),
    ("load", "load, s"),
    ("prefill", "prefill 512, tokens/s"),
    ("decode", "decode 64, tokens/s"),
    ("memory", "peak memory, MiB"),
];

fn main() -> Result<()> {
    let arguments: Vec<String> = std::env::args().collect();
    if let [_, engine, folder] = arguments.as_slice()
        && ENGINES.contains(&engine.as_str())
    {
        let figures = run(engine, Path::new(folder))?;
        println!("{figures}");
        return Ok(());
    }
    let Some(gguf) = smollm2() else { return Ok(()) };
    let folder = tempfile::tempdir()?;
    unpack(&gguf, folder.path())?;
    compare(&std::env::current_exe()?, folder.path())
}

/// Runs the engines in turn, a first pair uncounted.
fn compare(this: &Path, folder: &Path) -> Result<()> {
    let mut runs: [Vec<Value>; 2] = Default::default();
    for pair in 0..=PAIRS {
        for (engine, runs) in ENGINES.iter().zip(&mut runs) {
            let start = Instant::now();
            let output = Command::new(this).arg(engine).arg(folder).output()?;
            let process = start.elapsed().as_secs_f64();
            if !output.status.success() {
                return Err(String::from_utf8_lossy(&output.stderr).into());
            }
            let mut figures: Value = serde_json::from_slice(&output.stdout)?;
            figures["process"] = json!(process);
            if pair > 0 {
                runs.push(figures);
            }
        }
    }
    let [ours, candle] = runs;
    if ours.first().map(|run| &run["ids"]) != candle.first().map(|run| &run["ids"]) {
        eprintln!("the two engines generated different tokens");
    }
    println!("{:<24}{:>12}{:>22}{:>24}", "median of 5", ENGINES[0], ENGINES[1], "ratio (min..max)");
    for (key, title) in FIGURES {
        let column = |runs: &[Value]| -> Vec<f64> {
            runs.iter().filter_map(|run| run[key].as_f64()).collect()
        };
        let (a, b) = (column(&ours), column(&candle));
        let ratios = sorted(a.iter().zip(&b).map(|(a, b)| a / b).collect());
        let ratio = format!("{:.2} ({:.2}..{:.2})", median(&ratios), ratios[0], ratios[PAIRS - 1]);
        let (a, b) = (median(&sorted(a)), median(&sorted(b)));
        println!("{title:<24}{a:>12.2}{b:>22.2}{ratio:>24}");
    }
    Ok(())
}

fn run(engine: &str, folder: &Path) -> Result<Value> {
    let prompt = ids(PROMPT);
    let mut figures =
        if engine == ENGINES[0] { ours(folder, prompt) } else { candle(folder, prompt) }?;
    figures["memory"] = json!(peak_memory());
    Ok(figures)
}

fn ours(folder: &Path, prompt: Vec<u32>) -> Result<Value> {
    let start = Instant::now();
    let model = HybridModel::from_folder(folder, DType::F32, &Device::Cpu)?;
    let load = start.elapsed().as_secs_f64();
    // The first of the tokens comes from the prefill: one more makes as many steps as below.
    let config = GenerationConfig::default().max_tokens(DECODE + 1).eos_ids([]);
    let answer = model.generate(prompt, &config)?;
    Ok(json!({
        "ids": answer.ids,
        "load": load,
        "prefill": PROMPT as f64 / answer.seconds.prefill,
        "decode": DECODE as f64 / answer.seconds.decode,
    }))
}

fn candle(folder: &Path, prompt: Vec<u32>) -> Result<Value> {
    let start = Instant::now();
    let config = std::fs::read(folder.join("config.json"))?;
    let config = serde_json::from_slice::<llama::LlamaConfig>(&config)?.into_config(false);
    let file = folder.join("model.safetensors");
    // SAFETY: the file was written by this benchmark into a folder of its own.
    let vb = unsafe { VarBuilder::from_mmaped_safetensors(&[file], DType::F32, &Device::Cpu)? };
    let model = llama::Llama::load(vb, &config)?;
    let load = start.elapsed().as_secs_f64();

    let mut cache = llama::Cache::new(true, DType::F32, &config, &Device::Cpu)?;
    let likeliest = |logits: &Tensor| logits.flatten_all()?.argmax(0)?.to_scalar::<u32>();
    let start = Instant::now();
    let tokens = Tensor::new(prompt, &Device::Cpu)?.unsqueeze(0)?;
    let mut id = likeliest(&model.forward(&tokens, 0, &mut cache)?)?;
    let prefill = start.elapsed().as_secs_f64();

    let mut ids = vec![id];
    let start = Instant::now();
    for step in 0..DECODE {
        let token = Tensor::new(&[[id]], &Device::Cpu)?;
        id = likeliest(&model.forward(&token, PROMPT + step, &mut cache)?)?;
        ids.push(id);
    }
    Ok(json!({
        "ids": ids,
        "load": load,
        "prefill": PROMPT as f64 / prefill,
        "decode": DECODE as f64 / start.elapsed().as_secs_f64(),
    }))
}
