//! What loading reads and what it holds while it does, and that it leaves other models alone.

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::scope;

use candle_core::quantized::GgmlDType;
use candle_core::{DType, Device, Tensor};
use hybrid_attention::load::{Checkpoint, CheckpointWeights, WeightType};
use hybrid_attention::model::{Linear, Transformer, Weights};
use hybrid_attention::refine::Interpolate;
use hybrid_attention::{Config, Error, GenerationConfig, HybridModel, Message, Thinking};
use serde_json::json;

use common::gguf::GgufFile;
use common::{Result, fixture, tiny, write_gguf, write_hugging_face};

/// Four layers whose largest matrices have four million weights: 147 MB in `bf16`.
fn config() -> Config {
    Config {
        vocab_size: 4096,
        hidden_size: 1024,
        intermediate_size: 4096,
        num_hidden_layers: 4,
        num_attention_heads: 8,
        num_key_value_heads: 8,
        head_dim: 128,
        ..tiny::config()
    }
}

/// Writes a folder of `bf16` zeros, which take no room on the disk. `foreign` more are in a tensor
/// that no model asks for.
fn write_zeros(folder: &Path, config: &Config, foreign: usize) -> Result {
    write_hugging_face(folder, config, &BTreeMap::new())?;
    let others = [("score.weight".to_string(), vec![foreign])];
    let (mut header, mut end) = (serde_json::Map::new(), 0);
    for (name, shape) in config.weights().chain(others) {
        let start = end;
        end += 2 * shape.iter().product::<usize>();
        let entry = json!({"dtype": "BF16", "shape": shape, "data_offsets": [start, end]});
        header.insert(name, entry);
    }
    let header = serde_json::Value::Object(header).to_string();
    let mut file = File::create(folder.join("model.safetensors"))?;
    file.write_all(&(header.len() as u64).to_le_bytes())?;
    file.write_all(header.as_bytes())?;
    Ok(file.set_len((8 + header.len() + end) as u64)?)
}

/// Writes the same as a GGUF model in two parts, with the matrices in `MXFP4`, 17 bytes for 32 of them.
fn write_zeros_gguf(folder: &Path, config: &Config, foreign: usize) -> Result<PathBuf> {
    let mut parts = [GgufFile::of(config)?, GgufFile::default()];
    let (mut ends, others) = ([0, 0], [("score.weight".to_string(), vec![foreign])]);
    let weights: Vec<_> = config.weights().chain(others).collect();
    let count = weights.len() as i32;
    for (index, (name, shape)) in weights.into_iter().enumerate() {
        let (part, elements) = (index % 2, shape.iter().product::<usize>());
        let (kind, bytes) = match shape.len() {
            2 => (39, elements / 32 * 17),
            _ => (0, 4 * elements),
        };
        parts[part].place(&name, &shape, kind, ends[part]);
        ends[part] = (ends[part] + bytes).next_multiple_of(32);
    }
    let path = |no| folder.join(format!("model-0000{no}-of-00002.gguf"));
    for (no, (part, end)) in parts.into_iter().zip(ends).enumerate() {
        let header = part.part(no as u16, 2, count).header();
        let mut file = File::create(path(no + 1))?;
        file.write_all(&header)?;
        file.set_len((header.len() + end) as u64)?;
    }
    Ok(path(1))
}

/// A number of kilobytes, in bytes, of a file that Linux makes of this process.
fn kilobytes(line: &str, key: &str) -> Option<usize> {
    let number = line.strip_prefix(key)?.trim().strip_suffix(" kB")?;
    Some(number.trim().parse::<usize>().ok()? << 10)
}

fn status(key: &str) -> Result<usize> {
    let status = fs::read_to_string("/proc/self/status")?;
    Ok(status.lines().find_map(|line| kilobytes(line, key)).ok_or("no such line")?)
}

/// Bytes of files under `folder` that are mapped into this process, and how many of them are in its
/// memory.
fn mapped(folder: &Path) -> Result<(usize, usize)> {
    let folder = folder.to_str().ok_or("a folder without a name")?;
    let (mut inside, mut size, mut resident) = (false, 0, 0);
    for line in fs::read_to_string("/proc/self/smaps")?.lines() {
        if line.split_whitespace().next().is_some_and(|word| !word.ends_with(':')) {
            inside = line.contains(folder);
        } else if inside {
            size += kilobytes(line, "Size:").unwrap_or(0);
            resident += kilobytes(line, "Rss:").unwrap_or(0);
        }
    }
    Ok((size, resident))
}

#[allow(clippy::print_stderr, reason = "says that it is skipped")]
fn is_linux() -> bool {
    if !cfg!(target_os = "linux") {
        eprintln!("skipped: only Linux says what of a file is in memory");
    }
    cfg!(target_os = "linux")
}

/// What the system may read around a page that is asked for: a large page.
const AROUND: usize = 2 << 20;

/// Hands on what is asked of a checkpoint, and sees to it that nothing is read twice or before.
struct Watched<'a> {
    weights: CheckpointWeights<'a>,
    folder: &'a Path,
    asked: BTreeSet<String>,
}

impl Watched<'_> {
    fn read<T>(
        &mut self,
        name: &str,
        read: impl FnOnce(&mut CheckpointWeights<'_>) -> hybrid_attention::Result<T>,
    ) -> hybrid_attention::Result<T> {
        assert!(self.asked.insert(name.to_string()), "{name} is read twice");
        let resident = || mapped(self.folder).map_or(usize::MAX, |(_, resident)| resident);
        let before = resident();
        let tensor = read(&mut self.weights)?;
        // What was read has been let go of, but for pages at both ends that neighbours share.
        let after = resident();
        assert!(after <= before + 2 * AROUND, "{before} to {after} bytes in memory for {name}");
        Ok(tensor)
    }
}

impl Weights for Watched<'_> {
    fn tensor(&mut self, name: &str, shape: &[usize]) -> hybrid_attention::Result<Tensor> {
        self.read(name, |weights| weights.tensor(name, shape))
    }

    fn linear(&mut self, name: &str, out: usize, input: usize) -> hybrid_attention::Result<Linear> {
        self.read(name, |weights| weights.linear(name, out, input))
    }

    fn embedding(
        &mut self,
        name: &str,
        vocab_size: usize,
        hidden_size: usize,
    ) -> hybrid_attention::Result<Linear> {
        self.read(name, |weights| weights.embedding(name, vocab_size, hidden_size))
    }

    fn contains(&self, name: &str) -> bool {
        self.weights.contains(name)
    }
}

/// 64 GB, a folder or a GGUF model in two parts, of which a model of 147 MB is loaded: opening reads the header, loading each weight once
/// and by itself, and the rest of the file is never read.
#[test]
fn nothing_is_read_before_it_is_needed() -> Result {
    if !is_linux() {
        return Ok(());
    }
    let (config, folder) = (config(), tempfile::tempdir()?);
    write_zeros(folder.path(), &config, 32 << 30)?;
    let gguf = write_zeros_gguf(folder.path(), &config, 16 << 30)?;
    for (path, kept) in [
        (folder.path(), [WeightType::Stored, WeightType::Quantized(GgmlDType::Q8_0)]),
        (&gguf, [WeightType::Stored, WeightType::Quantized(GgmlDType::Q2K)]),
    ] {
        let checkpoint = Checkpoint::open(path)?;
        let (size, resident) = mapped(folder.path())?;
        assert!(size > 64 << 30, "{size} bytes are mapped");
        assert!(resident <= AROUND, "opened with {resident} bytes in memory");

        for kept in kept {
            let weights = checkpoint.weights(kept, &Device::Cpu);
            let mut watched = Watched { weights, folder: folder.path(), asked: BTreeSet::new() };
            Transformer::new(&config, &mut watched)?;
            let expected: BTreeSet<String> = config.weights().map(|(name, _)| name).collect();
            assert_eq!(watched.asked, expected);
            watched.weights.finish()?;
        }
        drop(checkpoint);
        assert_eq!(mapped(folder.path())?, (0, 0));
    }
    Ok(())
}

/// The folder, or the file, that a process of its own is to load, and what to keep it as.
const LOAD: &str = "HYBRID_ATTENTION_TEST_LOAD";

/// At most two weights as they are stored, beside what is made of all: also where they are rounded.
#[test]
#[allow(clippy::print_stdout, reason = "says it to the process that asked")]
fn loading_needs_room_for_the_result_and_two_weights() -> Result {
    if !is_linux() {
        return Ok(());
    }
    if let Ok(what) = std::env::var(LOAD) {
        let (kept, path) = what.split_once(':').ok_or("no path")?;
        let kept = match kept {
            "q8_0" => WeightType::Quantized(GgmlDType::Q8_0),
            "f32" => WeightType::Dense(DType::F32),
            _ => WeightType::Stored,
        };
        let before = status("VmRSS:")?;
        let checkpoint = Checkpoint::open(path)?;
        let mut weights = checkpoint.weights(kept, &Device::Cpu);
        let transformer = Transformer::new(checkpoint.config(), &mut weights)?;
        weights.finish()?;
        let result: usize = transformer.weight_bytes().values().sum();
        println!("\nloaded {result} {}", status("VmHWM:")? - before);
        return Ok(());
    }
    let (config, folder) = (config(), tempfile::tempdir()?);
    write_zeros(folder.path(), &config, 1)?;
    let gguf = folder.path().join("model.gguf");
    let one = Config { num_hidden_layers: 1, ..config };
    let zeros = |(name, shape): (String, Vec<usize>)| {
        Ok((name, Tensor::zeros(shape, DType::F32, &Device::Cpu)?))
    };
    let tensors: BTreeMap<_, _> = one.weights().map(zeros).collect::<Result<_>>()?;
    write_gguf(&gguf, &one, &tensors, GgmlDType::Q8_0)?;

    let parts = write_zeros_gguf(folder.path(), &one, 1)?;

    let bf16 = 2 * 4096 * 1024;
    let q8_0 = 4096 * 1024 / 32 * 34;
    let mxfp4 = 4096 * 1024 / 32 * 17;
    let runs = [("stored", folder.path(), bf16), ("f32", folder.path(), bf16)];
    for (kept, path, weight) in runs.into_iter().chain([
        ("q8_0", folder.path(), bf16),
        ("stored", gguf.as_path(), q8_0),
        ("f32", gguf.as_path(), q8_0),
        ("stored", parts.as_path(), mxfp4),
    ]) {
        let name = "loading_needs_room_for_the_result_and_two_weights";
        let output = Command::new(std::env::current_exe()?)
            .args([name, "--exact", "--nocapture"])
            .env(LOAD, format!("{kept}:{}", path.display()))
            .output()?;
        let output = String::from_utf8(output.stdout)?;
        let numbers = output.lines().find_map(|line| line.strip_prefix("loaded "));
        let (result, peak) = numbers.and_then(|it| it.split_once(' ')).ok_or("did not load")?;
        let (result, peak) = (result.parse::<usize>()?, peak.parse::<usize>()?);
        // Threads, their stacks and what they convert at a time.
        let others = 6 << 20;
        let name = format!("{kept}, {}", path.display());
        assert!(peak > result, "{name}: {peak} bytes for {result}");
        assert!(peak < result + 2 * weight + others, "{name}: {peak} bytes for {result}");
    }
    Ok(())
}

/// One model answers without pause while another is loaded, answers, and is dropped.
#[test]
fn a_second_model_is_loaded_while_one_runs() -> Result {
    let thinking = Thinking::new(2).span(0..2).refine(Interpolate::new(0.3));
    let how = GenerationConfig::default().max_tokens(12).eos_ids([]).thinking(thinking);
    let answer = |model: &HybridModel| -> Result<(Vec<u32>, Vec<f32>)> {
        let answer = model.generate([5u32, 9, 3, 17, 60, 4], &how)?;
        Ok((answer.ids, answer.logprobs))
    };
    let load = |name: &str, kept: WeightType| -> Result<HybridModel> {
        Ok(HybridModel::from_folder(fixture(name), kept, &Device::Cpu)?)
    };
    let running = load("window", WeightType::Stored)?;
    let others = [
        ("head_dim", WeightType::Stored),
        ("tied_sharded", WeightType::Dense(DType::BF16)),
        ("window", WeightType::Quantized(GgmlDType::Q8_0)),
    ];
    let alone = answer(&running)?;
    let others_alone: Vec<_> =
        others.iter().map(|(name, kept)| answer(&load(name, *kept)?)).collect::<Result<_>>()?;

    let done = AtomicBool::new(false);
    scope(|scope| -> Result {
        let runs = scope.spawn(|| -> std::result::Result<usize, String> {
            let mut answers = 0;
            while answers == 0 || !done.load(Ordering::Relaxed) {
                let again = answer(&running).map_err(|error| error.to_string())?;
                assert_eq!(again, alone, "after {answers} answers");
                answers += 1;
            }
            Ok(answers)
        });
        let loads = || -> Result {
            for _ in 0..8 {
                for ((name, kept), alone) in others.iter().zip(&others_alone) {
                    assert_eq!(answer(&load(name, *kept)?)?, *alone, "{name}, {kept:?}");
                }
            }
            Ok(())
        };
        let loaded = loads();
        done.store(true, Ordering::Relaxed);
        let answers = runs.join().map_err(|_| "the running model panicked")??;
        assert!(answers > 1, "{answers} answers beside 24 models");
        loaded
    })
}

/// A GGUF file may come without a chat template, and a file beside it with one.
#[test]
fn a_chat_template_beside_a_gguf_file_is_used() -> Result {
    let source = fixture("no_template.gguf");
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("model.gguf");
    fs::copy(source, &path)?;
    let load = || HybridModel::from_gguf(&path, WeightType::Stored, &Device::Cpu);
    let rendered = |model: &HybridModel| -> Result<String> {
        let tokenizer = model.tokenizer().ok_or("no tokenizer")?;
        Ok(tokenizer.render_chat(&[Message::user("hi")], true)?)
    };
    let bare = load()?;
    let error = rendered(&bare).err().ok_or("rendered")?.to_string();
    assert_eq!(error, "chat template: the checkpoint has none");
    assert_eq!(rendered(&bare.with_chat_template("own")?)?, "own");
    assert!(rendered(&bare).is_err(), "this one stays as it is");
    fs::write(folder.path().join("chat_template.jinja"), "of the folder")?;
    assert_eq!(rendered(&load()?)?, "of the folder");
    fs::write(folder.path().join("model.jinja"), "of the file")?;
    assert_eq!(rendered(&load()?)?, "of the file");
    fs::write(folder.path().join("model.jinja"), b"\xff")?;
    let error = load().err().ok_or("loaded")?.to_string();
    assert!(error.contains("model.jinja: invalid utf-8"), "{error}");

    let mute = HybridModel::from_folder(fixture("window"), DType::F32, &Device::Cpu)?;
    let error = mute.with_chat_template("own").err().ok_or("accepted")?;
    assert!(matches!(error, Error::NoTokenizer { .. }), "{error}");
    Ok(())
}
