//! Prefill, decode and thought passes, beside candle-transformers' own llama on the same weights.
//!
//! Random `f32` weights in the shape of SmolLM2-135M, on the CPU:
//!
//! ```text
//! cargo bench --bench forward
//! ```

#![allow(missing_docs, reason = "criterion's macros")]
#![allow(clippy::print_stderr)]

use std::hint::black_box;
use std::time::Duration;

use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::llama;
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use hybrid_attention::model::{Batch, KvCache, Pass, Transformer};
use hybrid_attention::{Config, Result};

use hybrid_attention_benches::{SHAPE, ids, random_weights};

struct Engines {
    ours: Transformer,
    candle: llama::Llama,
    candle_config: llama::Config,
}

impl Engines {
    fn new() -> Result<Self> {
        let config = Config::from_json(SHAPE)?;
        let mut weights = random_weights(&config)?;
        let candle_config = serde_json::from_str::<llama::LlamaConfig>(SHAPE)
            .map_err(candle_core::Error::wrap)?
            .into_config(false);
        let vb = VarBuilder::from_tensors(weights.clone(), DType::F32, &Device::Cpu);
        Ok(Self {
            ours: Transformer::new(&config, &mut weights)?,
            candle: llama::Llama::load(vb, &candle_config)?,
            candle_config,
        })
    }

    fn ours(&self, tokens: &Tensor, cache: &mut KvCache) -> Result<Tensor> {
        let xs = self.ours.embed(tokens)?;
        let h = self.ours.forward(&xs, self.ours.all_layers(), Pass::Cached(cache))?;
        self.ours.logits(&h.narrow(1, h.dim(1)? - 1, 1)?)
    }

    fn our_cache(&self) -> Result<KvCache> {
        self.ours.new_cache(4096)
    }

    fn candle_cache(&self) -> Result<llama::Cache> {
        Ok(llama::Cache::new(true, DType::F32, &self.candle_config, &Device::Cpu)?)
    }
}

fn tokens(count: usize) -> Result<Tensor> {
    Ok(Tensor::new(ids(count), &Device::Cpu)?.unsqueeze(0)?)
}

fn run(c: &mut Criterion) -> Result<()> {
    let engines = Engines::new()?;
    let (ours, candle) = (BenchmarkId::from_parameter("ours"), "candle-transformers");

    for count in [128, 512] {
        let tokens = tokens(count)?;
        let mut group = c.benchmark_group(format!("prefill {count}"));
        group.throughput(Throughput::Elements(count as u64));
        let mut cache = engines.our_cache()?;
        group.bench_function(ours.clone(), |b| {
            b.iter(|| {
                cache.reset();
                black_box(engines.ours(&tokens, &mut cache))
            });
        });
        group.bench_function(candle, |b| {
            b.iter(|| {
                let mut cache = engines.candle_cache()?;
                black_box(engines.candle.forward(&tokens, 0, &mut cache)).map_err(Into::into)
                    as Result<Tensor>
            });
        });
    }

    let mut group = c.benchmark_group("decode after 128");
    group.throughput(Throughput::Elements(1));
    let (prompt, next) = (tokens(128)?, tokens(1)?);
    let mut cache = engines.our_cache()?;
    engines.ours(&prompt, &mut cache)?;
    group.bench_function(ours.clone(), |b| {
        b.iter(|| {
            cache.truncate(128)?;
            black_box(engines.ours(&next, &mut cache))
        });
    });
    let mut cache = engines.candle_cache()?;
    engines.candle.forward(&prompt, 0, &mut cache)?;
    group.bench_function(candle, |b| {
        // Its cache cannot be truncated, so each step starts from a copy of the handles.
        b.iter(|| black_box(engines.candle.forward(&next, 128, &mut cache.clone())));
    });
    group.finish();

    let mut group = c.benchmark_group("thought pass 512");
    group.throughput(Throughput::Elements(512));
    let xs = engines.ours.embed(&tokens(512)?)?;
    let layout = Batch::one(512)?;
    group.bench_function(ours, |b| {
        let pass = || Pass::Bidirectional(&layout);
        b.iter(|| black_box(engines.ours.forward(&xs, engines.ours.all_layers(), pass())));
    });
    group.finish();
    Ok(())
}

fn forward(c: &mut Criterion) {
    if let Err(error) = run(c) {
        eprintln!("error: {error}");
        std::process::exit(1);
    }
}

criterion_group! {
    name = benches;
    config = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_secs(2))
        .measurement_time(Duration::from_secs(10));
    targets = forward
}
criterion_main!(benches);
