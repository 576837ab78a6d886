//! Scaled rotation and queries that grow with their position, against transformers' own values beyond the
//! length that each model was first trained on, written by `tests/fixtures/make_scaled.py`.

#![allow(clippy::print_stderr, reason = "the largest deviation is worth seeing")]

mod common;

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::path::Path;

use candle_core::quantized::gguf_file::{self, Value};
use candle_core::quantized::{GgmlDType, QTensor};
use candle_core::{DType, Device, Tensor};
use hybrid_attention::load::Checkpoint;
use hybrid_attention::model::{Batch, Pass, Sight, Transformer};
use hybrid_attention::refine::Interpolate;
use hybrid_attention::{
    Config, GenerationConfig, HybridModel, QueryScaling, RopeScaling, Thinking,
};
use tempfile::TempDir;

use common::gradient::check;
use common::{Result, assert_close, fixture, gguf_metadata, interleave, tiny};

const CASES: [&str; 7] =
    ["ministral3", "ministral3_window", "yarn", "yarn_exact", "linear", "llama3", "dynamic"];

/// Of the largest value of the golden tensor.
const TOLERANCE: f32 = 1e-5;

struct Case {
    name: &'static str,
    golden: HashMap<String, Tensor>,
    folder: TempDir,
}

/// The weights that all cases share.
fn weights() -> Result<BTreeMap<String, Tensor>> {
    let weights =
        candle_core::safetensors::load(fixture("scaled/weights.safetensors"), &Device::Cpu)?;
    Ok(weights.into_iter().collect())
}

impl Case {
    fn open(name: &'static str) -> Result<Self> {
        let files = fixture("scaled");
        let folder = tempfile::tempdir()?;
        fs::copy(files.join("weights.safetensors"), folder.path().join("model.safetensors"))?;
        fs::copy(files.join(name).join("config.json"), folder.path().join("config.json"))?;
        let golden = files.join(name).join("golden.safetensors");
        let golden = candle_core::safetensors::load(golden, &Device::Cpu)?;
        Ok(Self { name, golden, folder })
    }

    fn model(&self) -> Result<Transformer> {
        transformer(self.folder.path())
    }

    fn golden(&self, name: &str) -> Result<&Tensor> {
        Ok(self.golden.get(name).ok_or_else(|| format!("no {name} in {}", self.name))?)
    }

    fn ids(&self) -> Result<Vec<u32>> {
        Ok(self.golden("input_ids")?.to_dtype(DType::U32)?.flatten_all()?.to_vec1()?)
    }

    /// Fails unless `ours`, `(tokens, ..)`, is the golden tensor `name`, `(1, tokens, ..)`.
    fn compare(&self, name: &str, ours: &Tensor) -> Result {
        let golden = self.golden(name)?.squeeze(0)?;
        let off = (ours - &golden)?.abs()?.flatten_all()?.max(0)?.to_scalar::<f32>()?;
        eprintln!("{} {name}: off by {off:.1e}", self.name);
        assert_close(&format!("{} {name}", self.name), ours, &golden, TOLERANCE)
    }
}

fn transformer(path: &Path) -> Result<Transformer> {
    let checkpoint = Checkpoint::open(path)?;
    let mut weights = checkpoint.weights(DType::F32, &Device::Cpu);
    let model = Transformer::new(checkpoint.config(), &mut weights)?;
    weights.finish()?;
    Ok(model)
}

/// Logits of all tokens in one pass.
fn logits(model: &Transformer, ids: &[u32], pass: Pass<'_>) -> Result<Tensor> {
    let xs = model.embed_ids(ids)?;
    Ok(model.logits(&model.forward(&xs, model.all_layers(), pass)?)?)
}

/// The same through a cache, so many tokens at a time.
fn in_pieces(model: &Transformer, ids: &[u32], lengths: &[usize]) -> Result<Tensor> {
    let mut cache = model.new_cache(ids.len())?;
    let (mut rest, mut rows) = (ids, Vec::new());
    for &len in lengths.iter().cycle() {
        let (piece, more) = rest.split_at(len.min(rest.len()));
        rows.push(logits(model, piece, Pass::Cached(&mut cache))?);
        rest = more;
        if rest.is_empty() {
            break;
        }
    }
    Ok(Tensor::cat(&rows, 0)?)
}

#[test]
fn logits_and_hidden_states_are_those_of_transformers() -> Result {
    for name in CASES {
        let case = Case::open(name)?;
        let (model, ids) = (case.model()?, case.ids()?);
        let batch = Batch::one(ids.len())?;
        case.compare("causal.logits", &logits(&model, &ids, Pass::Causal(&batch))?)?;
        let xs = model.embed_ids(&ids)?;
        let h = model.forward(&xs, model.all_layers(), Pass::Bidirectional(&batch))?;
        case.compare("bidirectional", &model.norm(&h)?)?;
    }
    Ok(())
}

#[test]
fn a_cache_gives_the_same_in_any_pieces() -> Result {
    for name in CASES {
        let case = Case::open(name)?;
        let (model, ids) = (case.model()?, case.ids()?);
        let start = ids.len() - 12;
        // transformers' own cached decoding: the start at once, then one by one
        let mut steps = vec![start];
        steps.resize(13, 1);
        case.compare("cached.logits", &in_pieces(&model, &ids, &steps)?)?;
        if name == "dynamic" {
            continue; // whose frequencies depend on the length of each pass
        }
        for len in [ids.len(), 5, 1] {
            case.compare("causal.logits", &in_pieces(&model, &ids, &[len])?)?;
        }
    }
    Ok(())
}

/// A prompt longer than the chunks that a pass with a cache runs in.
#[test]
fn a_long_prompt_in_chunks_is_a_long_prompt() -> Result {
    for scaling in scalings(64.0) {
        let mut config = Config { max_position_embeddings: 2048, ..tiny::config() };
        config.rope_scaling = Some(scaling);
        config.query_scaling =
            Some(QueryScaling { beta: 0.3, original_max_position_embeddings: 100 });
        let model = tiny::transformer(&config, 3)?;
        let xs = tiny::noise(4, &[600, config.hidden_size], 1.0)?;
        let whole = model.forward(&xs, model.all_layers(), Pass::Causal(&Batch::one(600)?))?;
        let mut cache = model.new_cache(600)?;
        let chunks = model.forward(&xs, model.all_layers(), Pass::Cached(&mut cache))?;
        assert_close(&format!("{:?}", config.rope_scaling), &chunks, &whole, 1e-5)?;
    }
    Ok(())
}

/// One of each kind, by `factor`, from 32 positions.
fn scalings(factor: f64) -> [RopeScaling; 5] {
    let pairs = tiny::config().head_dim as u16 / 2;
    [
        RopeScaling::Linear { factor },
        RopeScaling::Dynamic { factor, original_max_position_embeddings: 32 },
        RopeScaling::Llama3 {
            factor,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_max_position_embeddings: 32,
        },
        RopeScaling::Yarn {
            factor,
            original_max_position_embeddings: 32,
            beta_fast: 32.0,
            beta_slow: 1.0,
            truncate: true,
            attention_factor: 1.2,
        },
        RopeScaling::Factors((1..=pairs).map(f32::from).collect()),
    ]
}

#[test]
fn a_batch_is_its_rows_each_at_its_position() -> Result {
    for name in CASES {
        let case = Case::open(name)?;
        let (model, ids) = (case.model()?, case.ids()?);
        // 48 from the first position, 20 that end at 57
        let (short, first) = (&ids[..20], 37);
        let packed = [&ids, short].concat();
        let both = Batch::ragged(&[ids.len(), short.len()])?.starting_at(1, first)?;
        let alone = Batch::one(short.len())?.starting_at(0, first)?;
        for sight in [Sight::Causal, Sight::Bidirectional] {
            let both = logits(&model, &packed, Pass::uncached(&both, sight))?;
            let whole = Batch::one(ids.len())?;
            let first = logits(&model, &ids, Pass::uncached(&whole, sight))?;
            let second = logits(&model, short, Pass::uncached(&alone, sight))?;
            assert_close(name, &both, &Tensor::cat(&[first, second], 0)?, TOLERANCE)?;
        }
        // two caches of unequal length go on side by side
        let (mut long, mut brief) = (model.new_cache(60)?, model.new_cache(60)?);
        logits(&model, &ids[..40], Pass::Cached(&mut long))?;
        logits(&model, &ids[..7], Pass::Cached(&mut brief))?;
        let (mut long_fork, mut brief_fork) = (long.fork(), brief.fork());
        let batch = Batch::ragged(&[8, 20])?;
        let new = [&ids[40..], &ids[7..27]].concat();
        let caches = vec![&mut long, &mut brief];
        let side_by_side =
            logits(&model, &new, Pass::Remembered { batch: &batch, sight: Sight::Causal, caches })?;
        let first = logits(&model, &ids[40..], Pass::Cached(&mut long_fork))?;
        let second = logits(&model, &ids[7..27], Pass::Cached(&mut brief_fork))?;
        assert_close(name, &side_by_side, &Tensor::cat(&[first, second], 0)?, TOLERANCE)?;
    }
    Ok(())
}

#[test]
fn greedy_tokens_are_those_of_transformers_in_all_spellings() -> Result {
    for name in CASES {
        let case = Case::open(name)?;
        let Some(greedy) = case.golden.get("greedy_ids") else { continue };
        let greedy: Vec<u32> = greedy.to_dtype(DType::U32)?.flatten_all()?.to_vec1()?;
        let config = GenerationConfig::default().max_tokens(greedy.len()).eos_ids([]);
        let folder = tempfile::tempdir()?;
        let mut paths = vec![case.folder.path().to_path_buf()];
        paths.extend(case.as_gguf(folder.path())?);
        for path in paths {
            let checkpoint = Checkpoint::open(&path)?;
            let cpu = Device::Cpu;
            let model = HybridModel::from_checkpoint(&checkpoint, DType::F32, &cpu, |_, _| ())?;
            let answer = model.generate(case.ids()?.as_slice(), &config)?;
            assert_eq!(answer.ids, greedy, "{}", path.display());
            // a thought pass that changes nothing, with queries scaled in it
            let thinking = Thinking::new(1).refine(Interpolate::new(0.0));
            let answer =
                model.generate(case.ids()?.as_slice(), &config.clone().thinking(thinking))?;
            assert_eq!(answer.ids, greedy, "{} after a thought", path.display());
        }
    }
    Ok(())
}

impl Case {
    /// The same model as llama.cpp keeps it, where it can.
    fn as_gguf(&self, folder: &Path) -> Result<Option<std::path::PathBuf>> {
        let checkpoint = Checkpoint::open(self.folder.path())?;
        let config = checkpoint.config();
        let mut arch = "llama";
        let mut keys = Vec::new();
        let mut factors = None;
        let number = |name: &str, value: f64| (name.to_string(), Value::F32(value as f32));
        let text = |name: &str, value: &str| (name.to_string(), Value::String(value.into()));
        match (self.name, &config.rope_scaling) {
            ("linear", Some(RopeScaling::Linear { factor })) => {
                keys.push(text("rope.scaling.type", "linear"));
                keys.push(number("rope.scaling.factor", *factor));
            }
            ("ministral3" | "yarn", Some(RopeScaling::Yarn { factor, beta_fast, .. })) => {
                keys.push(text("rope.scaling.type", "yarn"));
                keys.push(number("rope.scaling.factor", *factor));
                keys.push(("rope.scaling.original_context_length".into(), Value::U32(16)));
                if self.name == "ministral3" {
                    arch = "mistral3";
                    keys.push(number("rope.scaling.yarn_beta_fast", *beta_fast));
                    keys.push(number("rope.scaling.yarn_beta_slow", 1.0));
                    keys.push(number("rope.scaling.yarn_log_multiplier", 1.0));
                    keys.push(number("attention.temperature_scale", 0.1));
                }
            }
            // what llama.cpp's converter computes from the same four numbers
            ("llama3", _) => {
                let scaled = self.golden("inv_freq")?.to_vec1::<f32>()?;
                let plain = (0..8).map(|pair| 1e4f32.powf(-2.0 * pair as f32 / 16.0));
                let ratios: Vec<f32> =
                    plain.zip(scaled).map(|(plain, scaled)| plain / scaled).collect();
                factors = Some(Tensor::new(ratios, &Device::Cpu)?);
            }
            _ => return Ok(None),
        }
        let mut metadata = gguf_metadata(config);
        metadata.extend(keys.into_iter().map(|(key, value)| (format!("llama.{key}"), value)));
        for (key, value) in &mut metadata {
            *key = key.replace("llama.", &format!("{arch}."));
            if key == "general.architecture" {
                *value = Value::String(arch.into());
            }
        }
        let mut tensors = Vec::new();
        for (name, tensor) in weights()? {
            let rotated = name.contains("q_proj") || name.contains("k_proj");
            let tensor = tensor.to_dtype(DType::F32)?;
            let tensor = if rotated { interleave(&tensor, config.head_dim)? } else { tensor };
            let name = [
                ("model.layers.", "blk."),
                ("self_attn.o_proj", "attn_output"),
                ("self_attn.", "attn_"),
                ("mlp.", "ffn_"),
                ("_proj", ""),
                ("input_layernorm", "attn_norm"),
                ("post_attention_layernorm", "ffn_norm"),
                ("model.embed_tokens", "token_embd"),
                ("model.norm", "output_norm"),
                ("lm_head", "output"),
            ]
            .iter()
            .fold(name, |name, (ours, file)| name.replace(ours, file));
            tensors.push((name, QTensor::quantize(&tensor, GgmlDType::F32)?));
        }
        if let Some(factors) = factors {
            tensors
                .push(("rope_freqs.weight".into(), QTensor::quantize(&factors, GgmlDType::F32)?));
        }
        let path = folder.join("model.gguf");
        let metadata: Vec<_> = metadata.iter().map(|(key, value)| (key.as_str(), value)).collect();
        let tensors: Vec<_> = tensors.iter().map(|(name, it)| (name.as_str(), it)).collect();
        gguf_file::write(&mut fs::File::create(&path)?, &metadata, &tensors)?;
        Ok(Some(path))
    }
}

#[test]
fn gradients_are_those_of_scaled_queries_and_keys() -> Result {
    for scaling in scalings(4.0) {
        let mut config = Config { max_position_embeddings: 128, ..tiny::config() };
        config.rope_scaling = Some(scaling);
        config.query_scaling =
            Some(QueryScaling { beta: 0.5, original_max_position_embeddings: 2 });
        let model = tiny::transformer(&config, 11)?;
        let batch = Batch::ragged(&[6, 3])?.starting_at(1, 60)?;
        let xs = tiny::noise(5, &[batch.tokens(), config.hidden_size], 1.0)?;
        let name = format!("{:?}", config.rope_scaling);
        check(&name, &xs, |xs| tiny::logits(&model, xs, Pass::Causal(&batch)))?;
        check(&name, &xs, |xs| {
            Ok(model.forward(xs, model.all_layers(), Pass::Bidirectional(&batch))?)
        })?;
    }
    Ok(())
}

/// Scaling by these changes nothing, whatever it is called.
#[test]
fn scaling_by_one_is_no_scaling() -> Result {
    let config = Config { max_position_embeddings: 128, ..tiny::config() };
    let batch = Batch::one(60)?;
    let xs = tiny::noise(5, &[60, config.hidden_size], 1.0)?;
    let run = |config: &Config| -> Result<Tensor> {
        let model = tiny::transformer(config, 11)?;
        Ok(model.forward(&xs, model.all_layers(), Pass::Causal(&batch))?)
    };
    let plain = run(&config)?;
    for scaling in scalings(1.0) {
        let scaling = match scaling {
            // beyond it, `theta` grows whatever the factor
            RopeScaling::Dynamic { factor, .. } => {
                RopeScaling::Dynamic { factor, original_max_position_embeddings: 60 }
            }
            RopeScaling::Factors(factors) => RopeScaling::Factors(vec![1.0; factors.len()]),
            RopeScaling::Yarn {
                factor,
                original_max_position_embeddings,
                beta_fast,
                beta_slow,
                truncate,
                ..
            } => RopeScaling::Yarn {
                factor,
                original_max_position_embeddings,
                beta_fast,
                beta_slow,
                truncate,
                attention_factor: 1.0,
            },
            other => other,
        };
        let name = format!("{scaling:?}");
        let scaled = Config { rope_scaling: Some(scaling), ..config.clone() };
        assert_close(&name, &run(&scaled)?, &plain, 1e-5)?;
    }
    let still = QueryScaling { beta: 0.0, original_max_position_embeddings: 1 };
    let scaled = Config { query_scaling: Some(still), ..config };
    common::assert_identical("beta 0", &run(&scaled)?, &plain)
}
