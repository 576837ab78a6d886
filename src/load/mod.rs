//! A folder or a GGUF file on disk, opened: its configuration and its weights.
//!
//! ```no_run
//! # use candle_core::{DType, Device};
//! # use hybrid_attention::{load::Checkpoint, model::Weights};
//! let checkpoint = Checkpoint::open("Mistral-7B-v0.3")?;
//! let mut weights = checkpoint.weights(Some(DType::BF16), &Device::Cpu);
//! let shape = [checkpoint.config().vocab_size, checkpoint.config().hidden_size];
//! let embeddings = weights.tensor("model.embed_tokens.weight", &shape)?;
//! // ... and the rest of them, then:
//! weights.finish()?;
//! # Ok::<_, hybrid_attention::Error>(())
//! ```

mod convert;
mod generation_defaults;
mod gguf;
mod names;
mod safetensors;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::File;
use std::io::Read;
use std::ops::Range;
use std::path::{Path, PathBuf};

use ::safetensors::tensor::Dtype;
use candle_core::quantized::GgmlDType;
use candle_core::quantized::gguf_file::Value;
use candle_core::{DType, Device, Tensor};
use memmap2::{Mmap, MmapMut};

use self::convert::{Refusal, Source, Stored};
pub use self::generation_defaults::GenerationDefaults;
use self::gguf::Gguf;
use self::names::Naming;
use self::safetensors::Folder;
use crate::config::Config;
use crate::error::{Error, Result};
use crate::model::Weights;

/// A checkpoint whose headers are read and checked; the weights are mapped, not yet read.
///
/// Three kinds are read: a Hugging Face folder (`config.json` with `model.safetensors` or its
/// shards), Mistral's own (`params.json` with `consolidated.safetensors`), and a GGUF file of
/// version 2 or 3. Where a folder holds the weights twice, the Hugging Face files are taken.
///
/// The files must not be changed while it lives: they are mapped into memory, and one that is cut
/// short ends the process when the missing part is read.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    config: Config,
    naming: Naming,
    files: Vec<Mapped>,
    /// By the names of the file.
    tensors: BTreeMap<String, Entry>,
    gguf_metadata: Option<HashMap<String, Value>>,
}

/// A file in memory.
#[derive(Debug)]
struct Mapped {
    path: PathBuf,
    bytes: Mmap,
}

/// Where a tensor is, and as what.
#[derive(Debug)]
struct Entry {
    /// Index into `files`.
    file: usize,
    /// A type that holds no weights is an error only for a tensor that is used: its name.
    stored: Result<Stored, String>,
    shape: Vec<usize>,
    range: Range<usize>,
}

impl Checkpoint {
    /// Opens a folder or a GGUF file, told apart by what is there, not by the name.
    ///
    /// # Errors
    /// [`Error::Io`] if something cannot be read, [`Error::Malformed`] if it is not what its format
    /// promises or a file is missing, and what [`Config::from_json`] and its kin return.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let metadata = std::fs::metadata(path).map_err(Error::io(path))?;
        if metadata.is_dir() {
            return Self::open_folder(path);
        }
        let mut magic = Vec::new();
        // anything else, a pipe say, might never end
        if metadata.is_file() {
            let file = File::open(path).map_err(Error::io(path))?;
            file.take(gguf::MAGIC.len() as u64).read_to_end(&mut magic).map_err(Error::io(path))?;
        }
        if magic != gguf::MAGIC {
            let message = "neither a folder nor a GGUF file, which starts with GGUF";
            return Err(Error::malformed(path, message));
        }
        Self::open_gguf(Mapped::open(path)?)
    }

    /// [`Checkpoint::open`] for a GGUF file in memory, which is copied; for fuzzing.
    #[doc(hidden)]
    pub fn from_gguf_bytes(bytes: &[u8]) -> Result<Self> {
        Self::open_gguf(Mapped::copy(bytes)?)
    }

    fn open_gguf(file: Mapped) -> Result<Self> {
        let Gguf { metadata, tensors } =
            gguf::parse(&file.bytes).map_err(|message| Error::malformed(&file.path, message))?;
        if let Some(parts) = metadata.get("split.count").and_then(crate::config::integer)
            && parts > 1
        {
            return Err(Error::unsupported("GGUF", format!("a model split into {parts} files")));
        }
        let mut config = Config::from_gguf(&metadata)?;
        config.tie_word_embeddings = !tensors.contains_key("output.weight");
        let tensors = tensors.into_iter().map(|(name, tensor)| {
            let stored = match tensor.dtype {
                GgmlDType::F32 => Stored::F32,
                GgmlDType::F16 => Stored::F16,
                GgmlDType::BF16 => Stored::BF16,
                blocks => Stored::Blocks(blocks),
            };
            let (shape, range) = (tensor.shape, tensor.range);
            (name, Entry { file: 0, stored: Ok(stored), shape, range })
        });
        Ok(Self {
            path: file.path.clone(),
            config,
            naming: Naming::Gguf,
            tensors: tensors.collect(),
            files: vec![file],
            gguf_metadata: Some(metadata),
        })
    }

    fn open_folder(path: &Path) -> Result<Self> {
        let folder = Folder::look(path)?;
        let text = std::fs::read_to_string(&folder.config).map_err(Error::io(&folder.config))?;
        let config = if folder.is_params {
            Config::from_params_json(&text)
        } else {
            Config::from_json(&text)
        };
        let config = config.map_err(|error| match error {
            Error::Malformed { message, .. } => Error::malformed(&folder.config, message),
            other => other,
        })?;

        let mut files = Vec::new();
        let mut tensors = BTreeMap::<String, Entry>::new();
        for path in &folder.weights {
            let mapped = Mapped::open(path)?;
            let malformed = |message: String| Error::malformed(path, message);
            for (name, tensor) in safetensors::parse(&mapped.bytes).map_err(malformed)? {
                if tensors.contains_key(&name) {
                    return Err(malformed(format!("{name} is in another shard too")));
                }
                let (shape, range) = (tensor.shape, tensor.range);
                let stored = stored(tensor.dtype);
                tensors.insert(name, Entry { file: files.len(), stored, shape, range });
            }
            files.push(mapped);
        }
        let checkpoint = Self {
            path: path.to_path_buf(),
            config,
            naming: folder.naming,
            files,
            tensors,
            gguf_metadata: None,
        };
        if let Some(index) = folder.index {
            for (name, shard) in &index.weight_map {
                let entry = checkpoint.tensors.get(name);
                let file = entry.and_then(|entry| checkpoint.files.get(entry.file));
                if file.is_none_or(|file| !file.path.ends_with(shard)) {
                    let message = format!("{name} should be in {shard}, but is not");
                    return Err(Error::malformed(&index.path, message));
                }
            }
        }
        Ok(checkpoint)
    }

    /// The shape of the model.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The folder or file that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The metadata of a GGUF file, which holds its tokenizer; `None` for a folder.
    pub fn gguf_metadata(&self) -> Option<&HashMap<String, Value>> {
        self.gguf_metadata.as_ref()
    }

    /// What `generation_config.json` says; nothing if there is none, or for a GGUF file.
    ///
    /// # Errors
    /// [`Error::Io`] and [`Error::Malformed`], the latter naming file and field.
    pub fn generation_defaults(&self) -> Result<GenerationDefaults> {
        if self.gguf_metadata.is_some() {
            return Ok(GenerationDefaults::default());
        }
        GenerationDefaults::read(&self.path)
    }

    /// The weights, as tensors of `dtype` on `device`.
    ///
    /// `dtype` is f32, f16 or bf16. `None` keeps what is stored, but f64 becomes f32 and so does
    /// everything in a GGUF file. Values are checked: a NaN, an infinity, or a value that becomes
    /// one in `dtype` is refused.
    pub fn weights(&self, dtype: Option<DType>, device: &Device) -> CheckpointWeights<'_> {
        CheckpointWeights {
            checkpoint: self,
            dtype,
            device: device.clone(),
            used: BTreeSet::new(),
            progress: None,
            done: 0,
            total: self.tensors.values().map(|entry| entry.range.len() as u64).sum(),
        }
    }

    /// The bytes of an entry, and the file they are in.
    fn bytes(&self, entry: &Entry) -> (&[u8], &Path) {
        match self.files.get(entry.file) {
            Some(file) => {
                (file.bytes.get(entry.range.clone()).unwrap_or_default(), file.path.as_path())
            }
            None => (&[], self.path.as_path()),
        }
    }
}

/// The weights of a [`Checkpoint`], each read when it is asked for.
pub struct CheckpointWeights<'a> {
    checkpoint: &'a Checkpoint,
    dtype: Option<DType>,
    device: Device,
    /// By the names of the file.
    used: BTreeSet<&'a str>,
    progress: Option<Box<Progress<'a>>>,
    /// Bytes of tensors that were taken, and of all that the files hold.
    done: u64,
    total: u64,
}

type Progress<'a> = dyn FnMut(u64, u64) + 'a;

impl std::fmt::Debug for CheckpointWeights<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("CheckpointWeights")
            .field("path", &self.checkpoint.path)
            .field("dtype", &self.dtype)
            .field("used", &self.used.len())
            .finish_non_exhaustive()
    }
}

impl Weights for CheckpointWeights<'_> {
    fn tensor(&mut self, name: &str, shape: &[usize]) -> Result<Tensor> {
        let Checkpoint { tensors, naming, config, path, .. } = self.checkpoint;
        let spelled = naming.spell(name);
        let Some((spelled, entry)) = tensors.get_key_value(spelled.as_str()) else {
            return Err(Error::MissingWeight { name: spelled, place: path.display().to_string() });
        };
        let (bytes, file) = self.checkpoint.bytes(entry);
        let rows = naming.rows(name, config.head_dim);
        let (name, place) = (spelled.clone(), file.display().to_string());
        if entry.shape != shape {
            let (expected, got) = (shape.to_vec(), entry.shape.clone());
            return Err(Error::WeightShape { name, place, expected, got });
        }
        let stored = match &entry.stored {
            Ok(stored) => *stored,
            Err(got) => {
                let expected = "F64, F32, F16 or BF16";
                return Err(Error::WeightDType { name, place, expected, got: got.clone() });
            }
        };
        let dtype = self.dtype.unwrap_or(match naming {
            Naming::Gguf => DType::F32,
            Naming::HuggingFace | Naming::Mistral => stored.dtype(),
        });
        let source = Source { bytes, stored, shape, rows };
        let tensor = source.convert(dtype, &self.device).map_err(|refusal| match refusal {
            Refusal::NotFinite { index, got, stored: true } => {
                Error::WeightValue { name, place, index, got }
            }
            Refusal::NotFinite { index, got, stored: false } => {
                let place = format!("{place}, converted to {}", dtype.as_str());
                Error::WeightValue { name, place, index, got }
            }
            Refusal::Other(error) => error,
        })?;
        self.used.insert(spelled);
        self.advance(bytes.len());
        Ok(tensor)
    }
}

impl<'a> CheckpointWeights<'a> {
    /// Calls `report(done, total)`, in bytes of the files, after every weight and at the end.
    #[must_use]
    pub fn on_progress(mut self, report: impl FnMut(u64, u64) + 'a) -> Self {
        self.progress = Some(Box::new(report));
        self
    }

    /// Judges the tensors that nothing asked for, once the model has taken what it needs.
    ///
    /// A model that leaves a weight of its checkpoint unused computes something else than the
    /// checkpoint means, so each one that stands among the model's own is an error. Tensors outside
    /// the model, and the rotary frequencies that old versions of `transformers` saved, are logged
    /// as warnings. A copy of the embedding table as the head of a model that ties the two is as
    /// good as none.
    ///
    /// # Errors
    /// [`Error::UnusedWeight`] for the first such weight; [`Error::Unsupported`] for the frequency
    /// factors of RoPE scaling in a GGUF file.
    pub fn finish(mut self) -> Result<()> {
        for (name, entry) in &self.checkpoint.tensors {
            if !self.used.contains(name.as_str()) {
                self.judge(name, entry)?;
            }
        }
        self.advance(usize::MAX);
        Ok(())
    }

    fn judge(&self, name: &str, entry: &Entry) -> Result<()> {
        let Checkpoint { tensors, naming, config, .. } = self.checkpoint;
        let (bytes, file) = self.checkpoint.bytes(entry);
        if *naming == Naming::Gguf && name.starts_with("rope_f") {
            return Err(Error::unsupported("rope scaling", name));
        }
        if name.ends_with(".rotary_emb.inv_freq") || !naming.is_ours(name) {
            tracing::warn!(name, file = %file.display(), "tensor not used");
            return Ok(());
        }
        let reason =
            if let Some(layer) = naming.layer(name).filter(|n| *n >= config.num_hidden_layers) {
                format!("layer {layer} of a model of {} layers", config.num_hidden_layers)
            } else if config.tie_word_embeddings && name == naming.spell("lm_head.weight") {
                let embeddings = tensors.get(&naming.spell("model.embed_tokens.weight"));
                let same = |other: &Entry| {
                    other.stored == entry.stored
                        && other.shape == entry.shape
                        && self.checkpoint.bytes(other).0 == bytes
                };
                if embeddings.is_some_and(same) {
                    return Ok(());
                }
                "the head is tied to the embedding table, which differs".to_string()
            } else {
                "this architecture has no such weight".to_string()
            };
        let (name, place) = (name.to_string(), file.display().to_string());
        Err(Error::UnusedWeight { name, place, reason })
    }

    /// `bytes` more are done, at most all of them.
    fn advance(&mut self, bytes: usize) {
        self.done = self.done.saturating_add(bytes as u64).min(self.total);
        if let Some(report) = &mut self.progress {
            report(self.done, self.total);
        }
    }
}

impl Mapped {
    fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(Error::io(path))?;
        // SAFETY: the mapping is read-only and outlives every slice of it, which borrow from
        // `Mapped`. What no program can rule out is that somebody else writes to the file, or cuts
        // it short, meanwhile; the documentation of `Checkpoint` makes that the caller's promise.
        let bytes = unsafe { Mmap::map(&file) }.map_err(Error::io(path))?;
        Ok(Self { path: path.to_path_buf(), bytes })
    }

    /// A mapping, because it starts on a page: parsers and blocks rely on its alignment.
    fn copy(bytes: &[u8]) -> Result<Self> {
        let path = PathBuf::from("memory");
        let mut map = MmapMut::map_anon(bytes.len()).map_err(Error::io(&path))?;
        map.copy_from_slice(bytes);
        let bytes = map.make_read_only().map_err(Error::io(&path))?;
        Ok(Self { path, bytes })
    }
}

/// The types of safetensors that hold weights; the name of any other.
fn stored(dtype: Dtype) -> Result<Stored, String> {
    match dtype {
        Dtype::F64 => Ok(Stored::F64),
        Dtype::F32 => Ok(Stored::F32),
        Dtype::F16 => Ok(Stored::F16),
        Dtype::BF16 => Ok(Stored::BF16),
        other => Err(other.to_string()),
    }
}
