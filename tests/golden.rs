//! Hidden states, logits and greedy tokens against transformers' own, written by
//! `tests/fixtures/make_fixtures.py` and `make_mixtral.py`. `HYBRID_ATTENTION_FIXTURES` may name a folder with more
//! cases from the same script.

#![allow(clippy::print_stderr, reason = "the largest deviation is worth seeing")]

mod common;

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use candle_core::quantized::GgmlDType;
use candle_core::{DType, Device, Tensor};
use hybrid_attention::load::Checkpoint;
use hybrid_attention::model::{Batch, Pass, Transformer};
use hybrid_attention::{GenerationConfig, HybridModel};

use common::{
    Result, experts, fixture, fixture_config, fixture_weights, write_consolidated, write_gguf,
    write_gguf_as_spelled, write_hugging_face,
};

/// Of the largest value of the golden tensor.
const TOLERANCE: f64 = 1e-4;

/// A checkpoint and what transformers makes of it.
struct Case {
    path: PathBuf,
    golden: HashMap<String, Tensor>,
}

/// Every folder with golden values, among the fixtures and where the environment says.
fn cases() -> Result<Vec<Case>> {
    let more = std::env::var_os("HYBRID_ATTENTION_FIXTURES").map(PathBuf::from);
    let mut cases = Vec::new();
    for root in std::iter::once(fixture("")).chain(more) {
        let before = cases.len();
        for entry in fs::read_dir(&root)? {
            let path = entry?.path();
            let file = path.join("golden.safetensors");
            if file.is_file() {
                let golden = candle_core::safetensors::load(file, &Device::Cpu)?;
                cases.push(Case { path, golden });
            }
        }
        assert!(cases.len() > before, "no cases in {}", root.display());
    }
    Ok(cases)
}

impl Case {
    fn name(&self) -> std::borrow::Cow<'_, str> {
        self.path.to_string_lossy()
    }

    fn tensor(&self, name: &str) -> Result<&Tensor> {
        Ok(self.golden.get(name).ok_or_else(|| format!("no {name} in {}", self.name()))?)
    }

    /// `(1, seq)`
    fn input_ids(&self) -> Result<Tensor> {
        Ok(self.tensor("input_ids")?.to_dtype(DType::U32)?)
    }

    fn greedy_ids(&self) -> Result<Vec<u32>> {
        Ok(self.tensor("greedy_ids")?.to_dtype(DType::U32)?.flatten_all()?.to_vec1()?)
    }

    /// Fails unless `ours` is the golden tensor `name`; gives how far it is off.
    fn compare(&self, name: &str, ours: &Tensor) -> Result<f64> {
        self.compare_within(TOLERANCE, name, ours)
    }

    fn compare_within(&self, tolerance: f64, name: &str, ours: &Tensor) -> Result<f64> {
        let golden = self.tensor(name)?;
        assert_eq!(ours.dims(), golden.dims(), "{}: {name}", self.name());
        let largest = |xs: &Tensor| xs.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>();
        let off = f64::from(largest(&(ours - golden)?)? / largest(golden)?);
        assert!(off < tolerance, "{}: {name} is off by {off:.1e}", self.name());
        Ok(off)
    }

    /// The same checkpoint as a Hugging Face folder, as Mistral's own and as GGUF; a mixture also as the
    /// other Hugging Face folder, and as a GGUF file of old.
    fn rewritten(&self, folder: &Path) -> Result<Vec<PathBuf>> {
        let (config, weights) = (fixture_config(&self.name())?, fixture_weights(&self.name())?);
        write_consolidated(folder, &config, &weights)?;
        let gguf = folder.join("model.gguf");
        write_gguf(&gguf, &config, &weights, GgmlDType::F32)?;
        let mut paths = vec![self.path.clone(), folder.to_path_buf(), gguf];
        if config.experts.is_some() {
            let (packed, single) = (folder.join("packed"), folder.join("single"));
            for (folder, weights) in
                [(&packed, &experts::pack(&config, &weights)?), (&single, &weights)]
            {
                fs::create_dir(folder)?;
                write_hugging_face(folder, &config, weights)?;
            }
            let old = folder.join("old.gguf");
            let each = experts::for_gguf(&config, &weights, true)?;
            write_gguf_as_spelled(&old, &config, &each, GgmlDType::F32)?;
            paths.extend([packed, single, old]);
        }
        Ok(paths)
    }
}

fn transformer(path: &Path, windowed: bool) -> Result<Transformer> {
    let checkpoint = Checkpoint::open(path)?;
    let mut config = checkpoint.config().clone();
    if !windowed {
        config.sliding_window = None;
    }
    let mut weights = checkpoint.weights(Some(DType::F32), &Device::Cpu);
    Ok(Transformer::new(&config, &mut weights)?)
}

#[test]
fn hidden_states_and_logits_are_those_of_transformers() -> Result {
    let mut worst = 0f64;
    for case in cases()? {
        let folder = tempfile::tempdir()?;
        for path in case.rewritten(folder.path())? {
            let ids = case.input_ids()?;
            let layout = Batch::one(ids.dim(1)?)?;
            let has_window = case.golden.contains_key("bidirectional.window.hidden.0");
            assert_eq!(has_window, transformer(&path, true)?.config().sliding_window.is_some());
            for (kind, windowed) in
                [("causal", true), ("bidirectional", false), ("bidirectional.window", true)]
            {
                if kind == "bidirectional.window" && !has_window {
                    continue;
                }
                let model = transformer(&path, windowed)?;
                let layers = model.all_layers().end;
                let name = |layer| format!("{kind}.hidden.{layer}");
                let mut xs = model.embed(&ids)?;
                for layer in 0..layers {
                    worst = worst.max(case.compare(&name(layer), &xs)?);
                    let pass = match kind {
                        "causal" => Pass::Causal(&layout),
                        _ => Pass::Bidirectional(&layout),
                    };
                    xs = model.forward(&xs, layer..layer + 1, pass)?;
                }
                worst = worst.max(case.compare(&name(layers), &model.norm(&xs)?)?);
                if kind == "causal" {
                    worst = worst.max(case.compare("causal.logits", &model.logits(&xs)?)?);
                }
            }
        }
    }
    eprintln!("largest deviation from transformers: {worst:.1e} of a tensor's largest value");
    Ok(())
}

#[test]
fn the_cache_gives_the_same_logits_in_any_chunks() -> Result {
    for case in cases()? {
        let ids = case.input_ids()?;
        let seq = ids.dim(1)?;
        let model = transformer(&case.path, true)?;
        for chunk in [seq, 5, 1] {
            let mut cache = model.new_cache(seq)?;
            let mut logits = Vec::new();
            for start in (0..seq).step_by(chunk) {
                let xs = model.embed(&ids.narrow(1, start, chunk.min(seq - start))?)?;
                let h = model.forward(&xs, model.all_layers(), Pass::Cached(&mut cache))?;
                logits.push(model.logits(&h)?);
            }
            case.compare("causal.logits", &Tensor::cat(&logits, 1)?)?;
        }
    }
    Ok(())
}

#[test]
fn greedy_tokens_are_those_of_transformers() -> Result {
    for case in cases()? {
        let folder = tempfile::tempdir()?;
        let (prompt, golden) = (case.input_ids()?.flatten_all()?.to_vec1()?, case.greedy_ids()?);
        let config = GenerationConfig::default().max_tokens(golden.len()).eos_ids([]);
        for path in case.rewritten(folder.path())? {
            let checkpoint = Checkpoint::open(&path)?;
            let cpu = Device::Cpu;
            let model = HybridModel::from_checkpoint(&checkpoint, DType::F32, &cpu, |_, _| ())?;
            let answer = model.generate(prompt.as_slice(), &config)?;
            assert_eq!(answer.ids, golden, "{} through the cache", path.display());
            assert_eq!(uncached(model.transformer(), &prompt, golden.len())?, golden);
        }
    }
    Ok(())
}

/// Each key and value is rounded by at most 2⁻⁸ of it in `bf16`, and 2⁻¹¹ in `f16`. A score is a sum of
/// products, each off by as much of itself; in these models their sizes add up to 15, so that scores, and
/// shares of attention as parts of themselves, may be off by 15 times that, were all errors of one
/// sign. They are of both: half of it is allowed.
#[test]
fn a_narrow_cache_gives_the_logits_up_to_its_rounding() -> Result {
    for (dtype, unit) in [(DType::BF16, 1.0 / 256.0), (DType::F16, 1.0 / 2048.0)] {
        let mut worst = 0f64;
        for case in cases()? {
            let ids = case.input_ids()?;
            let seq = ids.dim(1)?;
            let model = transformer(&case.path, true)?;
            for chunk in [seq, 5, 1] {
                let mut cache = model.new_pool(dtype, usize::MAX)?.new_cache(seq)?;
                let mut logits = Vec::new();
                for start in (0..seq).step_by(chunk) {
                    let xs = model.embed(&ids.narrow(1, start, chunk.min(seq - start))?)?;
                    let h = model.forward(&xs, model.all_layers(), Pass::Cached(&mut cache))?;
                    logits.push(model.logits(&h)?);
                }
                let logits = Tensor::cat(&logits, 1)?;
                let off = case.compare_within(7.5 * unit, "causal.logits", &logits)?;
                worst = worst.max(off);
            }
        }
        eprintln!("{dtype:?}: largest deviation {worst:.1e} of a tensor's largest value");
    }
    Ok(())
}

/// Greedy decoding that runs everything again for every token.
fn uncached(model: &Transformer, prompt: &[u32], count: usize) -> Result<Vec<u32>> {
    let mut ids = prompt.to_vec();
    for _ in 0..count {
        let layout = Batch::one(ids.len())?;
        let xs = model.embed(&Tensor::new(ids.as_slice(), &Device::Cpu)?.unsqueeze(0)?)?;
        let h = model.forward(&xs, model.all_layers(), Pass::Causal(&layout))?;
        let logits = model.logits(&h.narrow(1, ids.len() - 1, 1)?)?;
        ids.push(logits.flatten_all()?.argmax(0)?.to_scalar()?);
    }
    Ok(ids.split_off(prompt.len()))
}
