//! A layer of Mixtral 8x7B beside a dense one of the same width, in the same run and taking turns.
//!
//! ```text
//! cargo bench --bench experts
//! ```
//!
//! Attention is left out, but for a head of two numbers, so that what is compared is MLPs. Operations and
//! bytes are those of the experts that run: each of 512 tokens goes through two, and one token reads two.
//! On a machine that others use too, `-- --cpu` counts the time that its processors spend on this, each of
//! them, instead of the time that passes (Linux only).

#![allow(clippy::print_stdout)]

use std::borrow::Cow;
use std::error::Error;
use std::hint::black_box;
use std::sync::Arc;
use std::time::Instant;

use candle_core::quantized::{GgmlDType, QStorage, QTensor};
use candle_core::{DType, Device, Tensor};
use hybrid_attention::model::{Batch, Linear, Pass, Transformer, Weights};
use hybrid_attention::{Config, Experts, WeightType};

use hybrid_attention_benches::{median, of_processors, sorted};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

const LAYER: &str = r#"{
    "model_type": "mistral", "vocab_size": 64, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 2,
    "max_position_embeddings": 32768
}"#;

/// Weights of its MLP, or of one expert.
const OF_MLP: f64 = 3.0 * 4096.0 * 14336.0;

/// Of 8 experts.
const CHOSEN: usize = 2;

/// Turns that each of the two takes, besides one that is not counted.
const TURNS: usize = 5;

const KINDS: [(&str, WeightType); 2] =
    [("bf16", WeightType::Dense(DType::BF16)), ("q4_k", WeightType::Quantized(GgmlDType::Q4K))];

fn main() -> Result<()> {
    let cpu = std::env::args().any(|argument| argument == "--cpu");
    let seconds = |model: &Transformer, xs: &Tensor, repeats| seconds(model, xs, repeats, cpu);
    println!("| weights | tokens | | dense | mixture | ratio | of turns: least, middle, most |");
    println!("|---|---|---|---|---|---|---|");
    for (name, kind) in KINDS {
        let dense = Config::from_json(LAYER)?;
        let experts = Experts { num_local_experts: 8, num_experts_per_tok: CHOSEN };
        let mixture = Config { experts: Some(experts), ..dense.clone() };
        let dense = Transformer::new(&dense, &mut Repeated(kind))?;
        let mixture = Transformer::new(&mixture, &mut Repeated(kind))?;
        let bytes = match kind {
            WeightType::Quantized(it) => it.type_size() as f64 / it.block_size() as f64,
            _ => 2.0,
        };
        for (tokens, repeats, unit, amount) in
            [(512, 1, "GFLOP/s", 512.0 * 2.0 * OF_MLP), (1, 8, "GB/s", bytes * OF_MLP)]
        {
            let (mut best, mut ratios) = ([0f64; 2], Vec::new());
            for turn in 0..=TURNS {
                let xs = Tensor::randn(0f32, 1.0, (tokens, 4096), &Device::Cpu)?;
                let one = amount / seconds(&dense, &xs, repeats)? / 1e9;
                let several = CHOSEN as f64 * amount / seconds(&mixture, &xs, repeats)? / 1e9;
                if turn > 0 {
                    best = [best[0].max(one), best[1].max(several)];
                    ratios.push(several / one);
                }
            }
            let ratios = sorted(ratios);
            println!(
                "| {name} | {tokens} | {unit} | {:.1} | {:.1} | {:.2} | {:.2} {:.2} {:.2} |",
                best[0],
                best[1],
                best[1] / best[0],
                ratios[0],
                median(&ratios),
                ratios[ratios.len() - 1],
            );
        }
    }
    Ok(())
}

/// Of one pass, the mean of some.
fn seconds(model: &Transformer, xs: &Tensor, repeats: u32, cpu: bool) -> Result<f64> {
    let batch = Batch::one(xs.dim(0)?)?;
    let (start, spent) = (Instant::now(), if cpu { of_processors()? } else { 0.0 });
    for _ in 0..repeats {
        black_box(model.forward(xs, 0..1, Pass::Causal(&batch))?);
    }
    let seconds = match cpu {
        true => (of_processors()? - spent) / rayon::current_num_threads() as f64,
        false => start.elapsed().as_secs_f64(),
    };
    Ok(seconds / f64::from(repeats))
}

/// Random rows, the same ones again and again, each matrix in memory of its own: kept in the type of field
/// `0`.
struct Repeated(WeightType);

/// Rows that are drawn; a divisor of those of every matrix that is read much.
const ROWS: usize = 64;

impl Weights for Repeated {
    fn tensor(&mut self, _: &str, shape: &[usize]) -> hybrid_attention::Result<Tensor> {
        Ok(Tensor::randn(0f32, 0.02, shape, &Device::Cpu)?)
    }

    fn linear(&mut self, name: &str, out: usize, input: usize) -> hybrid_attention::Result<Linear> {
        let drawn = if out.is_multiple_of(ROWS) { ROWS } else { out };
        let rows = self.tensor(name, &[drawn, input])?;
        let WeightType::Quantized(blocks) = self.0 else {
            return Linear::dense(&rows.to_dtype(DType::BF16)?.repeat((out / drawn, 1))?);
        };
        if !input.is_multiple_of(blocks.block_size()) {
            return Linear::dense(&rows.repeat((out / drawn, 1))?);
        }
        let bytes = QTensor::quantize(&rows, blocks)?.data()?.repeat(out / drawn);
        let storage = QStorage::from_data(Cow::Owned(bytes), &Device::Cpu, blocks)?;
        Linear::quantized(Arc::new(QTensor::new(storage, (out, input))?))
    }
}
