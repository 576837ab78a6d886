//! An adapter on disk.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use candle_core::{Device, Tensor};
use safetensors::tensor::{Dtype, View};

use super::{Adapter, AdapterConfig, PREFIX, Pair, Wrapped};
use crate::error::{Error, Result};
use crate::load::{TensorFile, read_text};
use crate::replace::replace;

const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";
const THOUGHT: &str = "thought.safetensors";
const GATE: &str = "thought.gate";

impl Adapter {
    /// Reads a folder that PEFT has written, and the `thought.safetensors` beside it with `thought.gate`
    /// (`[hidden]`), if there is one. The tensors may be `f32`, `f16`, `bf16` or `f64` and become `f32`.
    /// The files must not change meanwhile.
    ///
    /// Whether it fits a model is checked when it is applied to one.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Malformed`] for anything that is not such a folder, lacks a file or
    /// violates its format; [`Error::Unsupported`] as for [`AdapterConfig::from_json`], and for tensors
    /// that are not half of a projection's adapter (those of embeddings, biases, whole modules);
    /// [`Error::MissingWeight`] for one half without the other; [`Error::WeightShape`] for another rank
    /// than the configuration says; [`Error::WeightDType`]; [`Error::WeightValue`] for a NaN or an
    /// infinity; [`Error::UnusedWeight`] for a module that is not among `target_modules`.
    pub fn from_folder(path: impl AsRef<Path>, device: &Device) -> Result<Self> {
        let folder = path.as_ref();
        if !fs::metadata(folder).map_err(Error::io(folder))?.is_dir() {
            let message = format!("not a folder of {CONFIG} and {WEIGHTS}");
            return Err(Error::malformed(folder, message));
        }
        let path = part(folder, CONFIG)?;
        let text = read_text(&path)?;
        let config = AdapterConfig::from_json(&text).map_err(|error| match error {
            Error::Malformed { message, .. } => Error::malformed(&path, message),
            Error::Config { field, expected, got } => {
                Error::malformed(&path, format!("{field}: expected {expected}, got {got}"))
            }
            other => other,
        })?;
        let path = part(folder, WEIGHTS)?;
        let (wrapped, pairs) = read_pairs(&path, &config, device)?;
        let gate = folder.join(THOUGHT);
        let thought_gate = if gate.is_file() { Some(read_gate(&gate, device)?) } else { None };
        Ok(Self { config, wrapped, pairs, thought_gate, place: path.display().to_string() })
    }

    /// Writes `adapter_config.json` and `adapter_model.safetensors` as PEFT reads them, and
    /// `thought.safetensors` if there is a gate. The folder is created if it does not exist; files of
    /// these names in it are replaced atomically, so that no partial file is left whatever happens.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn save(&self, folder: impl AsRef<Path>) -> Result<()> {
        let folder = folder.as_ref();
        fs::create_dir_all(folder).map_err(Error::io(folder))?;
        let tensors = self.tensors().map(|(name, tensor)| Ok((name, Values::of(tensor)?)));
        // As PEFT writes it; transformers requires it.
        let metadata = HashMap::from([("format".to_string(), "pt".to_string())]);
        let weights = serialize(tensors.collect::<Result<Vec<_>>>()?, metadata.clone(), folder)?;
        let gate = match &self.thought_gate {
            Some(gate) => {
                Some(serialize(vec![(GATE.to_string(), Values::of(gate)?)], metadata, folder)?)
            }
            None => None,
        };
        replace(&folder.join(WEIGHTS), &weights)?;
        let path = folder.join(THOUGHT);
        match gate {
            Some(gate) => replace(&path, &gate)?,
            // A gate left by an earlier adapter would be taken for this one's.
            None => match fs::remove_file(&path) {
                Err(error) if error.kind() != ErrorKind::NotFound => {
                    return Err(Error::io(&path)(error));
                }
                _ => (),
            },
        }
        // Last: without it a folder is not an adapter.
        replace(&folder.join(CONFIG), self.config.to_json().as_bytes())
    }
}

/// A file of the folder.
fn part(folder: &Path, name: &str) -> Result<PathBuf> {
    let path = folder.join(name);
    if path.is_file() {
        return Ok(path);
    }
    let old = folder.join("adapter_model.bin");
    let message = match name == WEIGHTS && old.is_file() {
        true => {
            format!("no {WEIGHTS} in this folder, but adapter_model.bin: only safetensors is read")
        }
        false => format!("no {name} in this folder"),
    };
    Err(Error::malformed(folder, message))
}

/// Both halves of one module, each with its name in the file.
#[derive(Default)]
struct Halves<'a> {
    a: Option<(&'a str, &'a [usize])>,
    b: Option<(&'a str, &'a [usize])>,
}

fn read_pairs(
    path: &Path,
    config: &AdapterConfig,
    device: &Device,
) -> Result<(Wrapped, BTreeMap<String, Pair>)> {
    let file = TensorFile::open(path)?;
    let place = || path.display().to_string();
    let unsupported =
        |name: &str| Error::unsupported("adapter tensor", format!("{name} in {}", place()));
    let mut wrapped = None;
    let mut modules = BTreeMap::<String, Halves<'_>>::new();
    for (name, shape) in file.tensors() {
        let (how, module, is_a) = parse(name).ok_or_else(|| unsupported(name))?;
        if *wrapped.get_or_insert(how) != how {
            let message = "names of a MistralModel beside those of a MistralForCausalLM";
            return Err(Error::malformed(path, format!("{name}: {message}")));
        }
        let halves = modules.entry(module).or_default();
        let half = if is_a { &mut halves.a } else { &mut halves.b };
        if let Some((other, _)) = half.replace((name, shape)) {
            let message = format!("{name} beside {other}: one adapter is expected");
            return Err(Error::malformed(path, message));
        }
    }
    let Some(wrapped) = wrapped else {
        return Err(Error::malformed(path, "no tensors"));
    };
    let rules = config.rules()?;
    let mut pairs = BTreeMap::new();
    for (module, halves) in modules {
        let missing = |half| {
            let name = wrapped.tensor(&module, half);
            Error::MissingWeight { name, place: place() }
        };
        let (name_a, shape_a) = halves.a.ok_or_else(|| missing("A"))?;
        let (name_b, shape_b) = halves.b.ok_or_else(|| missing("B"))?;
        let inner = wrapped.inner(&module);
        if !rules.targets(inner) {
            let reason = format!("{inner} is none of the modules that {CONFIG} gives an adapter");
            return Err(Error::UnusedWeight { name: name_a.to_string(), place: place(), reason });
        }
        let rank = rules.rank(inner);
        // For a shape that is not a matrix, this is the closest expected one that is known without a
        // model.
        let input = shape_a.last().copied().unwrap_or(0);
        let out = shape_b.first().copied().unwrap_or(0);
        let a = file.tensor(name_a, &[rank, input], device)?;
        let b = file.tensor(name_b, &[out, rank], device)?;
        pairs.insert(module.clone(), Pair { a, b, scale: rules.scale(inner) });
    }
    Ok((wrapped, pairs))
}

/// What was wrapped, the module, and whether this is its `A`:
/// `base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight`, or with the adapter's own name
/// before `weight`.
fn parse(name: &str) -> Option<(Wrapped, String, bool)> {
    let (module, half) = name.strip_prefix(PREFIX)?.rsplit_once(".lora_")?;
    let half = half.strip_suffix(".weight")?;
    let half = match half.split_once('.') {
        Some((half, adapter)) if !adapter.is_empty() && !adapter.contains('.') => half,
        Some(_) => return None,
        None => half,
    };
    let is_a = match half {
        "A" => true,
        "B" => false,
        _ => return None,
    };
    if module.starts_with("layers.") {
        return Some((Wrapped::Base, format!("model.{module}"), is_a));
    }
    let ours = module.starts_with("model.layers.") || module == "lm_head";
    ours.then(|| (Wrapped::CausalLm, module.to_string(), is_a))
}

fn read_gate(path: &Path, device: &Device) -> Result<Tensor> {
    let file = TensorFile::open(path)?;
    let mut shape = None;
    for (name, found) in file.tensors() {
        if name != GATE {
            let reason = format!("beside an adapter only {GATE} is read");
            let place = path.display().to_string();
            return Err(Error::UnusedWeight { name: name.to_string(), place, reason });
        }
        shape = Some(found.last().copied().unwrap_or(0));
    }
    let hidden = shape.ok_or_else(|| Error::malformed(path, "no tensors"))?;
    file.tensor(GATE, &[hidden], device)
}

/// A tensor as it is written: little-endian.
pub(crate) struct Values<'a> {
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    pub(crate) bytes: Cow<'a, [u8]>,
}

impl Values<'_> {
    /// In `f32`.
    pub(crate) fn of(tensor: &Tensor) -> Result<Self> {
        let values = tensor.detach().flatten_all()?.to_vec1::<f32>()?;
        let bytes = values.into_iter().flat_map(f32::to_le_bytes).collect();
        Ok(Self { dtype: Dtype::F32, shape: tensor.dims().to_vec(), bytes })
    }
}

impl View for Values<'_> {
    fn dtype(&self) -> Dtype {
        self.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        Cow::Borrowed(&self.bytes)
    }

    fn data_len(&self) -> usize {
        self.bytes.len()
    }
}

pub(crate) fn serialize(
    tensors: Vec<(String, Values<'_>)>,
    metadata: HashMap<String, String>,
    path: &Path,
) -> Result<Vec<u8>> {
    safetensors::tensor::serialize(tensors, Some(metadata))
        .map_err(|error| Error::malformed(path, error))
}
