//! A folder or a GGUF file on disk, opened: its configuration and its weights.
//!
//! ```
//! # use candle_core::{DType, Device};
//! # use hybrid_attention::{load::Checkpoint, model::Weights};
//! # let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/src/tiny");
//! let checkpoint = Checkpoint::open(folder)?;
//! let mut weights = checkpoint.weights(Some(DType::BF16), &Device::Cpu);
//! let shape = [checkpoint.config().vocab_size, checkpoint.config().hidden_size];
//! let embeddings = weights.tensor("model.embed_tokens.weight", &shape)?;
//! // ... and the rest of them, then:
//! assert!(weights.finish().is_err()); // which makes sure that none is left
//! # Ok::<_, hybrid_attention::Error>(())
//! ```

mod block_type;
mod convert;
pub(crate) mod folder;
mod generation_defaults;
mod gguf;
mod names;
pub(crate) mod safetensors;
mod scales;
mod split;
mod weight_type;
mod weights;

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ::safetensors::tensor::Dtype;
use candle_core::quantized::gguf_file::Value;
use candle_core::{DType, Device, Tensor};
use memmap2::{Mmap, MmapMut};

use self::block_type::BlockType;
use self::convert::{Refusal, Source, Stored};
use self::folder::Folder;
pub use self::generation_defaults::GenerationDefaults;
use self::names::{Naming, Rows};
use self::scales::Scales;
use self::split::{Model, Part};
pub use self::weight_type::WeightType;
pub use self::weights::CheckpointWeights;
use crate::config::{Config, Fp8, RopeScaling};
use crate::error::{Error, Result};
use crate::model::{Linear, is_or_is_under};

/// A checkpoint whose headers are read and checked; the weights are mapped, not yet read.
///
/// Three kinds are read: a Hugging Face folder (`config.json` with `model.safetensors` or its
/// shards, saved from the whole model or, without `model.` in its names, from the base class, or within a
/// model that sees images, whose other parts are left out with a warning), Mistral's own (`params.json` with
/// `consolidated.safetensors`), and a GGUF file of version 2 or 3, or any part of a split one
/// (`NAME-00001-of-00003.gguf`), whose other parts are beside it. The experts of a mixture have tensors of
/// their own, or all of a layer are packed in one, of which each is read by itself. Where a folder holds the
/// weights twice, the Hugging Face files are taken.
///
/// Of GGUF's types these are read: `F32`, `F16`, `BF16`, `Q4_0`, `Q4_1`, `Q5_0`, `Q5_1`, `Q8_0`, `Q2_K`, `Q3_K`,
/// `Q4_K`, `Q5_K`, `Q6_K`, `IQ4_NL`, `IQ4_XS` and `MXFP4`. A file with a tensor of another type is refused.
///
/// Matrices in FP8 (`F8_E4M3` with a `weight_scale_inv`, `weight_scale` or `qscale_weight` for all, each row
/// or each block) are widened as they are loaded: `weight · scale`, computed in `f32`, becomes `bf16`
/// unless another type is asked for. Scales for activations are not used; these are never narrowed.
///
/// The files must not be changed while it lives: they are mapped into memory, and where one is cut short
/// or cannot be read any more (a share that is gone, a download that starts anew, an editor that
/// truncates), reading the missing part ends the process with `SIGBUS`, which no program can catch as an
/// error. Put new files in the place of old ones by renaming, as downloaders do, or open with
/// [`Checkpoint::read`], which copies them first.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    config: Config,
    naming: Naming,
    /// Whether the experts of a layer are packed in one tensor.
    packed: bool,
    /// By their names in the file.
    tensors: BTreeMap<String, Entry>,
    gguf_metadata: Option<HashMap<String, Value>>,
    /// Whether, and how, some of the weights are in FP8.
    fp8: Option<Fp8>,
}

/// A file in memory.
#[derive(Debug)]
struct Mapped {
    path: PathBuf,
    bytes: Mmap,
    /// Whether `bytes` map the file itself rather than a copy of it.
    of_file: bool,
    /// Bytes that the file takes on its disk, which may be fewer than it has.
    written: usize,
}

/// Where a tensor is, and its type.
#[derive(Debug)]
struct Entry {
    file: Arc<Mapped>,
    /// A type that holds no weights, here by its name, is an error only if the tensor is used.
    stored: Result<Stored, String>,
    shape: Vec<usize>,
    range: Range<usize>,
}

/// How the values of a tensor stand in its file.
#[derive(Debug, Default)]
struct Layout {
    rows: Rows,
    /// What FP8 is multiplied by.
    scales: Option<Scales>,
}

impl Checkpoint {
    /// Opens a folder or a GGUF file, told apart by content, not by name.
    ///
    /// # Errors
    /// [`Error::Io`] if something cannot be read, [`Error::Malformed`] if it is not what its format
    /// promises or a file is missing, and the errors of [`Config::from_json`] and its siblings.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::open_by(path.as_ref(), Mapped::open)
    }

    /// [`Checkpoint::open`] that reads the files instead of mapping them: what becomes of them
    /// afterwards does not matter, and a file that is cut short meanwhile is an error. It needs memory for
    /// the whole files beside the weights that are made of them, until the checkpoint is dropped, and
    /// takes the time to read them at once.
    ///
    /// # Errors
    /// As [`Checkpoint::open`]; [`Error::Io`] also where there is no memory for a file.
    pub fn read(path: impl AsRef<Path>) -> Result<Self> {
        Self::open_by(path.as_ref(), Mapped::read)
    }

    fn open_by(path: &Path, into_memory: impl Fn(&Path) -> Result<Mapped>) -> Result<Self> {
        let metadata =
            std::fs::metadata(path).map_err(|error| Error::io(path)(or_a_name(path, error)))?;
        if metadata.is_dir() {
            return Self::open_folder(path, into_memory);
        }
        let mut magic = Vec::new();
        // anything else, such as a pipe, might never end
        if metadata.is_file() {
            let file = File::open(path).map_err(Error::io(path))?;
            file.take(gguf::MAGIC.len() as u64).read_to_end(&mut magic).map_err(Error::io(path))?;
        }
        if magic != gguf::MAGIC {
            let message = "neither a folder nor a GGUF file, which starts with GGUF";
            return Err(Error::malformed(path, message));
        }
        Self::open_gguf(path, into_memory)
    }

    /// [`Checkpoint::open`] for a GGUF file in memory, which is copied; for fuzzing.
    #[doc(hidden)]
    pub fn from_gguf_bytes(bytes: &[u8]) -> Result<Self> {
        Self::open_gguf(Path::new("memory"), |_| Mapped::copy(bytes))
    }

    fn open_gguf(path: &Path, into_memory: impl Fn(&Path) -> Result<Mapped>) -> Result<Self> {
        let Model { path, metadata, tensors } = Model::open(path, into_memory)?;
        let mut config = Config::from_gguf(&metadata)?;
        config.tie_word_embeddings = !tensors.contains_key("output.weight");
        if let Some(entry) = tensors.get(FREQUENCY_FACTORS) {
            scale_by_factors(&mut config, entry)?;
        }
        let (naming, gguf_metadata) = (Naming::Gguf, Some(metadata));
        let packed = tensors.keys().any(|name| naming.is_packed(name));
        Ok(Self { path, config, naming, packed, tensors, gguf_metadata, fp8: None })
    }

    fn open_folder(path: &Path, into_memory: impl Fn(&Path) -> Result<Mapped>) -> Result<Self> {
        let path = &folder::snapshot(path)?;
        let folder = Folder::look(path)?;
        let text = read_text(&folder.config)?;
        let config = if folder.is_params {
            Config::from_params_json(&text)
        } else {
            Config::from_json(&text)
        };
        let mut config = config.map_err(|error| match error {
            Error::Malformed { message, .. } => Error::malformed(&folder.config, message),
            other => other,
        })?;
        let fp8 = Fp8::of(&text, folder.is_params)?;

        let mut tensors = BTreeMap::<String, Entry>::new();
        for path in &folder.weights {
            for (name, entry) in header(into_memory(path)?)?.entries {
                if tensors.contains_key(&name) {
                    let message = format!("{name} is in another shard too");
                    return Err(Error::malformed(path, message));
                }
                tensors.insert(name, entry);
            }
        }
        if let Some(index) = &folder.index {
            index.compare(|name| tensors.get(name).map(|entry| entry.file.path.as_path()));
        }
        let mut naming = folder.naming;
        // Saved from the base class (`AutoModel`), names lack the part that it has in the whole model.
        if naming == Naming::HuggingFace
            && tensors.contains_key(&Naming::HuggingFaceBase.spell("model.embed_tokens.weight"))
            && !tensors.keys().any(|name| is_or_is_under(name, "model"))
        {
            naming = Naming::HuggingFaceBase;
        }
        if naming == Naming::HuggingFace
            && let Some(wrapped) = Naming::WRAPPED
                .into_iter()
                .find(|it| tensors.contains_key(&it.spell("model.embed_tokens.weight")))
        {
            naming = wrapped;
            if tensors.contains_key(&naming.spell("lm_head.weight")) {
                // What the files say of models within models is not to be relied on: transformers
                // takes a head of its own, too, where it finds one.
                config.tie_word_embeddings = false;
            }
        }
        if folder.is_params && !tensors.contains_key(&naming.spell("lm_head.weight")) {
            // `params.json` has no settled way to say so: a head that is not there is tied.
            config.tie_word_embeddings = true;
        }
        let packed = tensors.keys().any(|name| naming.is_packed(name));
        Ok(Self { path: path.clone(), config, naming, packed, tensors, gguf_metadata: None, fp8 })
    }

    /// The shape of the model.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// The folder or file that was opened; of a repository in the hub's cache, the snapshot; of a split
    /// GGUF model, its first part.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The path of a GGUF file; of a split model, what it would be if it were one file, `NAME.gguf`.
    pub(crate) fn unsplit_path(&self) -> PathBuf {
        let part =
            self.gguf_metadata.as_ref().and_then(|metadata| Part::of(metadata).ok().flatten());
        match part.and_then(|part| part.stem(&self.path).ok()) {
            Some(stem) => self.path.with_file_name(stem + ".gguf"),
            None => self.path.clone(),
        }
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

    /// The `hybrid.json` beside the weights, in the folder itself or in that of a GGUF file: how the
    /// makers of a checkpoint think with it. Returns its path and its text; `None` if there is none.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn hybrid_json(&self) -> Result<Option<(PathBuf, String)>> {
        let folder = match &self.gguf_metadata {
            Some(_) if self.path.is_file() => self.path.parent(),
            Some(_) => None,
            None => Some(self.path.as_path()),
        };
        let path = folder.map(|folder| folder.join("hybrid.json"));
        let Some(path) = path.filter(|path| path.is_file()) else { return Ok(None) };
        let text = read_text(&path)?;
        Ok(Some((path, text)))
    }

    /// The weights, kept as `kept` says, on `device`. Values are checked: a NaN, an infinity, or a value
    /// that becomes one in the conversion is refused.
    pub fn weights(&self, kept: impl Into<WeightType>, device: &Device) -> CheckpointWeights<'_> {
        CheckpointWeights::new(self, kept.into(), device)
    }
}

/// What a GGUF file divides the frequencies of rotation by, where that is not one number for all.
const FREQUENCY_FACTORS: &str = "rope_freqs.weight";

fn scale_by_factors(config: &mut Config, entry: &Entry) -> Result<()> {
    let shape = [config.head_dim / 2];
    let factors = entry.numbers(FREQUENCY_FACTORS, &shape)?;
    if factors.iter().all(|factor| *factor == 1.0) {
        tracing::warn!(name = FREQUENCY_FACTORS, "rope scaling by 1 in all places: not used");
        return Ok(());
    }
    if config.rope_scaling.is_some() {
        let got = format!("{FREQUENCY_FACTORS} beside rope.scaling.type");
        return Err(Error::unsupported("rope scaling", got));
    }
    config.rope_scaling = Some(RopeScaling::Factors(factors));
    config.validate()
}

/// The tensors of a single safetensors file, under its own names. As with a [`Checkpoint`], the file
/// must not be changed meanwhile.
#[derive(Debug)]
pub(crate) struct TensorFile {
    entries: BTreeMap<String, Entry>,
    metadata: HashMap<String, String>,
}

impl TensorFile {
    pub(crate) fn open(path: &Path) -> Result<Self> {
        header(Mapped::open(path)?)
    }

    /// Names and shapes.
    pub(crate) fn tensors(&self) -> impl Iterator<Item = (&str, &[usize])> {
        self.entries.iter().map(|(name, entry)| (name.as_str(), entry.shape.as_slice()))
    }

    /// What it says of itself, under this name.
    pub(crate) fn metadata(&self, name: &str) -> Option<&str> {
        self.metadata.get(name).map(String::as_str)
    }

    /// A tensor of this shape, in `f32`. Values are checked to be finite.
    pub(crate) fn tensor(&self, name: &str, shape: &[usize], device: &Device) -> Result<Tensor> {
        let Some(entry) = self.entries.get(name) else {
            let place =
                self.entries.values().next().map_or_else(|| "an empty file".into(), Entry::place);
            return Err(Error::MissingWeight { name: name.to_string(), place });
        };
        let as_f32 = |_| DType::F32;
        entry.tensor(name, shape, &Layout::default(), as_f32, device)
    }
}

/// What the system says of a path, and if that is not there but may be the name of a model, who takes names.
fn or_a_name(path: &Path, error: std::io::Error) -> std::io::Error {
    let is_name = path.is_relative() && path.components().count() == 2;
    if error.kind() != ErrorKind::NotFound || !is_name {
        return error;
    }
    let message = format!(
        "{error}; HybridModel::from_pretrained takes the name of a model on the Hugging Face hub"
    );
    std::io::Error::new(ErrorKind::NotFound, message)
}

/// A text of a checkpoint, of at most so many bytes: a file may claim more than were ever written.
pub(crate) fn read_text(path: &Path) -> Result<String> {
    const MOST: u64 = 64 << 20; // the longest, an index of all shards, has some megabytes
    read_text_of(path, MOST)
}

/// A UTF-8 text of at most `most` bytes.
pub(crate) fn read_text_of(path: &Path, most: u64) -> Result<String> {
    let bytes = read_bytes(path, most)?;
    let invalid =
        |_| std::io::Error::new(ErrorKind::InvalidData, "stream did not contain valid UTF-8");
    String::from_utf8(bytes).map_err(invalid).map_err(Error::io(path))
}

/// A file of at most `most` bytes.
pub(crate) fn read_bytes(path: &Path, most: u64) -> Result<Vec<u8>> {
    let too_many =
        || Error::malformed(path, format!("more than {most} bytes, which no such file has"));
    let file = File::open(path).map_err(Error::io(path))?;
    if file.metadata().map_err(Error::io(path))?.len() > most {
        return Err(too_many());
    }
    let mut bytes = Vec::new();
    file.take(most.saturating_add(1)).read_to_end(&mut bytes).map_err(Error::io(path))?;
    if bytes.len() as u64 > most {
        return Err(too_many()); // it has grown, or does not say how long it is
    }
    Ok(bytes)
}

/// Reads the header of a safetensors file.
fn header(file: Mapped) -> Result<TensorFile> {
    let file = Arc::new(file);
    let header = safetensors::parse(&file.bytes).map_err(|it| Error::malformed(&file.path, it))?;
    let entries = header.tensors.into_iter().map(|(name, tensor)| {
        let (shape, range) = (tensor.shape, tensor.range);
        let (file, stored) = (Arc::clone(&file), stored(tensor.dtype));
        (name, Entry { file, stored, shape, range })
    });
    Ok(TensorFile { entries: entries.collect(), metadata: header.metadata })
}

impl Entry {
    /// The tensor called `name` in its file, if it has this shape; in the type that `dtype` gives for
    /// the stored one.
    fn tensor(
        &self,
        name: &str,
        shape: &[usize],
        layout: &Layout,
        dtype: impl FnOnce(Stored) -> DType,
        device: &Device,
    ) -> Result<Tensor> {
        let source = self.source(name, shape, layout)?;
        let dtype = dtype(source.stored);
        let tensor = source.convert(dtype, device);
        let tensor = tensor.map_err(|refusal| self.refused(name, refusal, dtype.as_str()))?;
        self.file.release(&self.span(shape, layout.rows));
        Ok(tensor)
    }

    /// The matrix called `name` in its file, if it has this shape, in blocks of `to`.
    fn linear(
        &self,
        name: &str,
        shape: (usize, usize),
        layout: &Layout,
        to: BlockType,
        device: &Device,
    ) -> Result<Linear> {
        let shape = [shape.0, shape.1];
        let source = self.source(name, &shape, layout)?;
        let refused = |refusal| self.refused(name, refusal, &to.name());
        let linear = match to {
            BlockType::Candle(to) => {
                Linear::quantized(Arc::new(source.blocks(to, device).map_err(refused)?))?
            }
            BlockType::Codebook(to) => Linear::codebook(source.codebook(to).map_err(refused)?),
        };
        self.file.release(&self.span(&shape, layout.rows));
        Ok(linear)
    }

    /// The numbers of the small tensor called `name` in its file, if it has this shape.
    fn numbers(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>> {
        let as_f32 = |_| DType::F32;
        let tensor = self.tensor(name, shape, &Layout::default(), as_f32, &Device::Cpu)?;
        Ok(tensor.flatten_all()?.to_vec1()?)
    }

    fn source<'a>(
        &'a self,
        name: &str,
        shape: &'a [usize],
        layout: &'a Layout,
    ) -> Result<Source<'a>> {
        let (name, place) = (name.to_string(), self.place());
        let expected = layout.rows.stored_shape(shape);
        if self.shape != expected {
            return Err(Error::WeightShape { name, place, expected, got: self.shape.clone() });
        }
        let got = match &self.stored {
            Ok(Stored::F8) if layout.scales.is_none() => "F8_E4M3 without a scale".to_string(),
            Ok(stored) => {
                let (rows, scales) = (layout.rows, layout.scales.as_ref());
                return Ok(Source { bytes: self.bytes(), stored: *stored, shape, rows, scales });
            }
            Err(got) => got.clone(),
        };
        let expected = "F64, F32, F16 or BF16";
        Err(Error::WeightDType { name, place, expected, got })
    }

    /// The error for the tensor called `name`, which was to become a `kept`.
    fn refused(&self, name: &str, refusal: Refusal, kept: &str) -> Error {
        let (name, place) = (name.to_string(), self.place());
        match refusal {
            Refusal::NotFinite { index, got, stored: true } => {
                Error::WeightValue { name, place, index, got }
            }
            Refusal::NotFinite { index, got, stored: false } => {
                let place = format!("{place}, converted to {kept}");
                Error::WeightValue { name, place, index, got }
            }
            Refusal::Other(error) => error,
        }
    }

    /// Where in the file a weight of this shape is, in a tensor that has its rows.
    fn span(&self, shape: &[usize], rows: Rows) -> Range<usize> {
        let Rows::Packed { first, experts, rows } = rows else { return self.range.clone() };
        let row = self.range.len() / (experts * rows).max(1);
        let start = self.range.start + first * row;
        start..start + shape.first().map_or(0, |count| count * row)
    }

    fn bytes(&self) -> &[u8] {
        self.file.bytes.get(self.range.clone()).unwrap_or_default()
    }

    /// The file, as errors name it.
    fn place(&self) -> String {
        self.file.path.display().to_string()
    }
}

impl Mapped {
    fn open(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(Error::io(path))?;
        let bytes = map(&file).map_err(Error::io(path))?;
        let written = written(&file.metadata().map_err(Error::io(path))?);
        Ok(Self { path: path.to_path_buf(), bytes, of_file: true, written })
    }

    /// A copy of a file in memory.
    fn read(path: &Path) -> Result<Self> {
        let mut file = File::open(path).map_err(Error::io(path))?;
        let metadata = file.metadata().map_err(Error::io(path))?;
        let len = usize::try_from(metadata.len()).unwrap_or(usize::MAX);
        let mut map = MmapMut::map_anon(len).map_err(Error::io(path))?;
        file.read_exact(&mut map).map_err(Error::io(path))?;
        let bytes = map.make_read_only().map_err(Error::io(path))?;
        Ok(Self { path: path.to_path_buf(), bytes, of_file: false, written: written(&metadata) })
    }

    /// A mapping, because it starts on a page: parsers and blocks rely on its alignment.
    fn copy(bytes: &[u8]) -> Result<Self> {
        let path = PathBuf::from("memory");
        let mut map = MmapMut::map_anon(bytes.len()).map_err(Error::io(&path))?;
        map.copy_from_slice(bytes);
        let written = map.len();
        let bytes = map.make_read_only().map_err(Error::io(&path))?;
        Ok(Self { path, bytes, of_file: false, written })
    }

    /// Tells the system that `range` will not be read again soon: otherwise the file's pages would count
    /// as this process's memory beside the tensors made from them, and the peak would be the sum.
    fn release(&self, range: &Range<usize>) {
        #[cfg(unix)]
        if self.of_file {
            // Only whole pages within the range, since its neighbours may not have been read yet.
            const PAGE: usize = 1 << 16; // at least the page of any system
            let (start, end) = (range.start.next_multiple_of(PAGE), range.end / PAGE * PAGE);
            if start < end {
                let advice = memmap2::UncheckedAdvice::DontNeed;
                // SAFETY: the mapping is of a file and never written to, so a page that is dropped
                // and read again is read from the file and holds the same bytes.
                let result =
                    unsafe { self.bytes.unchecked_advise_range(advice, start, end - start) };
                if let Err(error) = result {
                    tracing::debug!(%error, "pages of weights were not released");
                }
            }
        }
    }
}

/// Maps a file into memory, which must not be cut short or overwritten as long as the mapping lives. Who calls this
/// has to say so to users.
pub(crate) fn map(file: &File) -> std::io::Result<Mmap> {
    // SAFETY: the mapping is read-only and outlives every slice of it, which borrow from it. What no program can
    // rule out is that another process writes to the file, or truncates it, meanwhile; the documentation of
    // `Checkpoint`, `Memory::keep` and `Dictionary::open` makes preventing that the caller's duty.
    unsafe { Mmap::map(file) }
}

/// Bytes that a file takes on its disk. Where that is not known, or as on some file systems not told, as
/// many as it has.
fn written(metadata: &std::fs::Metadata) -> usize {
    #[cfg(unix)]
    let blocks = std::os::unix::fs::MetadataExt::blocks(metadata).saturating_mul(512);
    #[cfg(not(unix))]
    let blocks = 0;
    let bytes = if blocks == 0 { metadata.len() } else { blocks.min(metadata.len()) };
    usize::try_from(bytes).unwrap_or(usize::MAX)
}

/// The types of safetensors that hold weights; the name of any other.
fn stored(dtype: Dtype) -> Result<Stored, String> {
    match dtype {
        Dtype::F64 => Ok(Stored::F64),
        Dtype::F32 => Ok(Stored::F32),
        Dtype::F16 => Ok(Stored::F16),
        Dtype::BF16 => Ok(Stored::BF16),
        Dtype::F8_E4M3 => Ok(Stored::F8),
        other => Err(other.to_string()),
    }
}
