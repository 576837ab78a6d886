//! A dictionary as a file: safetensors, with the vectors last, so that they can be written as they are made.
//!
//! ```text
//! fingerprint     (hidden)                     of the model
//! forms           (tokens of all forms)        the tokens of each form, one form after the other
//! form_lengths    (forms)
//! form_entries    (forms)
//! borders         (vocab)                      where words begin and end
//! vectors         (entries, layers, hidden)
//! ```

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{ErrorKind, Read, Seek, SeekFrom, Write};
use std::ops::Range;
use std::path::Path;

use candle_core::DType;
use half::bf16;
use memmap2::Mmap;
use safetensors::tensor::{Dtype, Metadata, TensorInfo};
use serde::{Deserialize, Serialize};

use super::compile::Compiler;
use super::config::DictionaryConfig;
use super::matcher::Matcher;
use crate::error::{Error, Result};
use crate::load::map;
use crate::load::safetensors::{Header, MAX_HEADER, StoredTensor, parse};
use crate::replace::{appended, finish};
use crate::statistics::Fingerprint;

const FORMAT: u32 = 1;
/// The name of the metadata: one, because several would be written in any order.
const ABOUT: &str = "dictionary";

/// What a file says of itself.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct About {
    format: u32,
    config: DictionaryConfig,
    headwords: Vec<String>,
    /// Of headwords and definitions.
    sha256: String,
}

impl About {
    pub(super) fn new(config: DictionaryConfig, headwords: Vec<String>, sha256: String) -> Self {
        Self { format: FORMAT, config, headwords, sha256 }
    }
}

/// A form of a headword.
pub(super) struct Word {
    pub(super) form: Vec<u32>,
    pub(super) entry: u32,
}

/// All of a file that stands before the vectors.
pub(super) struct Head {
    bytes: Vec<u8>,
    entries: usize,
    /// Bytes of the vectors of one entry.
    each: usize,
}

impl Head {
    pub(super) fn new(
        about: &About,
        fingerprint: &Fingerprint,
        words: &[Word],
        borders: &[u32],
        hidden: usize,
    ) -> Result<Self> {
        let (entries, layers) = (about.headwords.len(), about.config.chosen_layers().len());
        let (dtype, size) = match about.config.chosen_dtype() {
            DType::BF16 => (Dtype::BF16, size_of::<bf16>()),
            _ => (Dtype::F32, size_of::<f32>()),
        };
        let too_many = |error| Error::parameter("entries", "as many as a file holds", error);
        let each = layers * hidden * size;
        let lengths: Vec<u32> =
            words.iter().map(|word| u32::try_from(word.form.len()).unwrap_or(u32::MAX)).collect();
        let fingerprint = fingerprint.numbers();
        let numbers =
            |of: &[u32]| -> Vec<u8> { of.iter().flat_map(|it| it.to_le_bytes()).collect() };
        let forms: Vec<u32> = words.iter().flat_map(|word| word.form.iter().copied()).collect();
        let of_words: Vec<u32> = words.iter().map(|word| word.entry).collect();
        let small = [
            ("fingerprint", Dtype::F32, encode(fingerprint, DType::F32)),
            ("forms", Dtype::U32, numbers(&forms)),
            ("form_lengths", Dtype::U32, numbers(&lengths)),
            ("form_entries", Dtype::U32, numbers(&of_words)),
            ("borders", Dtype::U32, numbers(borders)),
        ];
        let (mut tensors, mut data) = (Vec::new(), Vec::new());
        for (name, dtype, bytes) in small {
            let data_offsets = (data.len(), data.len() + bytes.len());
            let shape = vec![bytes.len() / size_of::<u32>()];
            tensors.push((name.to_string(), TensorInfo { dtype, shape, data_offsets }));
            data.extend(bytes);
        }
        let end = each.checked_mul(entries).and_then(|all| all.checked_add(data.len()));
        let end = end.ok_or_else(|| too_many("more bytes than can be counted".to_string()))?;
        let (shape, data_offsets) = (vec![entries, layers, hidden], (data.len(), end));
        tensors.push(("vectors".to_string(), TensorInfo { dtype, shape, data_offsets }));

        let about = serde_json::to_string(about).map_err(|error| too_many(error.to_string()))?;
        let about = HashMap::from([(ABOUT.to_string(), about)]);
        let header = Metadata::new(Some(about), tensors).map_err(|it| too_many(it.to_string()))?;
        let mut header =
            serde_json::to_vec(&header).map_err(|error| too_many(error.to_string()))?;
        if header.len() as u64 > MAX_HEADER - 8 {
            return Err(too_many(format!("headwords that take {} bytes", header.len())));
        }
        header.resize(header.len().next_multiple_of(8), b' ');
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header);
        bytes.extend(data);
        Ok(Self { bytes, entries, each })
    }
}

/// Numbers as a file has them: little-endian.
pub(super) fn encode(numbers: &[f32], dtype: DType) -> Vec<u8> {
    match dtype {
        DType::BF16 => numbers.iter().flat_map(|it| bf16::from_f32(*it).to_le_bytes()).collect(),
        _ => numbers.iter().flat_map(|it| it.to_le_bytes()).collect(),
    }
}

/// Compiles into memory.
pub(super) fn in_memory(compiler: &Compiler<'_>) -> Result<Bytes> {
    let Head { mut bytes, entries, .. } = compiler.head()?;
    let mut done = 0;
    while done < entries {
        let vectors = compiler.next(done)?;
        done += vectors.len();
        vectors.iter().for_each(|it| bytes.extend(it));
    }
    Ok(Bytes::Held(bytes))
}

/// Compiles into a file, `{path}.part` until it is whole. One that is there already and begins alike is gone on with.
pub(super) fn into_file(
    compiler: &Compiler<'_>,
    path: &Path,
    mut progress: impl FnMut(usize, usize),
) -> Result<()> {
    let head = compiler.head()?;
    let part = appended(path, ".part");
    let io = |error| Error::io(&part)(error);
    let options = OpenOptions::new().read(true).write(true).create(true).truncate(false).clone();
    let mut file = options.open(&part).map_err(io)?;
    // A file system may know no locks. Another run may have given the file its name since it was opened.
    let taken = matches!(file.try_lock(), Err(TryLockError::WouldBlock));
    if taken || !is_at(&file, &part).map_err(io)? {
        let expected = "a file that nothing else compiles now";
        return Err(Error::parameter("path", expected, part.display()));
    }
    let mut done = head.done(&mut file).map_err(io)?;
    progress(done, head.entries);
    while done < head.entries {
        let vectors = compiler.next(done)?;
        file.write_all(&vectors.concat()).map_err(io)?;
        done += vectors.len();
        progress(done, head.entries);
    }
    file.sync_all().map_err(io)?;
    finish(&part, path) // while the file is locked
}

/// Whether this is still the file at the path.
fn is_at(file: &File, path: &Path) -> std::io::Result<bool> {
    #[cfg(unix)]
    {
        use std::os::unix::fs::MetadataExt;
        let own = file.metadata()?;
        Ok(fs::metadata(path).is_ok_and(|it| (it.dev(), it.ino()) == (own.dev(), own.ino())))
    }
    #[cfg(not(unix))]
    {
        let _ = file;
        Ok(fs::exists(path)?)
    }
}

impl Head {
    /// How many entries the file of an earlier run has; none if that was another dictionary. Where to go on is where
    /// the file then ends.
    fn done(&self, file: &mut File) -> std::io::Result<usize> {
        let mut found = Vec::new();
        Read::take(&mut *file, self.bytes.len() as u64).read_to_end(&mut found)?;
        let mut done = 0;
        if found == self.bytes {
            let length = usize::try_from(file.metadata()?.len()).unwrap_or(usize::MAX);
            done = (length.saturating_sub(found.len()) / self.each.max(1)).min(self.entries);
        } else {
            file.set_len(0)?;
            file.seek(SeekFrom::Start(0))?;
            file.write_all(&self.bytes)?;
        }
        file.set_len((self.bytes.len() + done * self.each) as u64)?;
        file.seek(SeekFrom::End(0))?;
        Ok(done)
    }
}

/// The whole content of a file.
pub(super) enum Bytes {
    Mapped(Mmap),
    Held(Vec<u8>),
}

impl Bytes {
    pub(super) fn map(path: &Path) -> Result<Self> {
        let file = File::open(path).map_err(|error| match error.kind() {
            ErrorKind::NotFound if fs::exists(appended(path, ".part")).unwrap_or(false) => {
                let message = "only a part of it is there: compile it again, to go on with that";
                Error::malformed(path, message)
            }
            _ => Error::io(path)(error),
        })?;
        Ok(Self::Mapped(map(&file).map_err(Error::io(path))?))
    }

    pub(super) fn get(&self, range: Range<usize>) -> &[u8] {
        self.all().get(range).unwrap_or_default()
    }

    fn all(&self) -> &[u8] {
        match self {
            Self::Mapped(file) => file,
            Self::Held(bytes) => bytes,
        }
    }
}

/// What a file holds.
pub(super) struct Content {
    pub(super) config: DictionaryConfig,
    pub(super) headwords: Vec<String>,
    pub(super) fingerprint: Fingerprint,
    pub(super) matcher: Matcher,
    pub(super) hidden: usize,
    pub(super) vocab_size: usize,
    /// Where the vectors are.
    pub(super) vectors: Range<usize>,
}

impl Content {
    /// Reads all but the vectors, and checks it.
    pub(super) fn read(bytes: &Bytes, place: &str) -> Result<Self> {
        let wrong = |message: String| Error::malformed(place, message);
        let Header { tensors, metadata } = parse(bytes.all()).map_err(wrong)?;
        let about = metadata.get(ABOUT).ok_or_else(|| wrong(format!("no {ABOUT}")))?;
        let about: About =
            serde_json::from_str(about).map_err(|error| wrong(format!("{ABOUT}: {error}")))?;
        if about.format != FORMAT {
            return Err(wrong(format!("format {}: {FORMAT} is read", about.format)));
        }
        let stored = |name: &str, dtypes: &[Dtype]| -> Result<&StoredTensor> {
            let found = tensors.get(name).ok_or_else(|| wrong(format!("no tensor {name}")))?;
            match dtypes.contains(&found.dtype) {
                true => Ok(found),
                false => Err(wrong(format!("{name}: expected {dtypes:?}, got {}", found.dtype))),
            }
        };
        let numbers = |name: &str| -> Result<Vec<u32>> {
            let (words, _) = bytes.get(stored(name, &[Dtype::U32])?.range.clone()).as_chunks::<4>();
            Ok(words.iter().map(|bytes| u32::from_le_bytes(*bytes)).collect())
        };
        let vectors = stored("vectors", &[Dtype::F32, Dtype::BF16])?;
        let config = match vectors.dtype {
            Dtype::BF16 => about.config.dtype(DType::BF16),
            _ => about.config,
        };
        config.validate().map_err(|error| wrong(error.to_string()))?;
        let (entries, layers) = (about.headwords.len(), config.chosen_layers().len());
        let fingerprint = stored("fingerprint", &[Dtype::F32])?;
        let fingerprint = decode(bytes.get(fingerprint.range.clone()), DType::F32);
        let hidden = fingerprint.len();
        if vectors.shape != [entries, layers, hidden] || entries == 0 {
            let expected =
                format!("vectors [{entries}, {layers}, {hidden}], of at least one entry");
            return Err(wrong(format!("expected {expected}, got {:?}", vectors.shape)));
        }
        let (forms, borders) = (numbers("forms")?, numbers("borders")?);
        let (lengths, of_entries) = (numbers("form_lengths")?, numbers("form_entries")?);
        let mut rest = forms.as_slice();
        let mut words = Vec::with_capacity(lengths.len());
        for (length, entry) in lengths.iter().zip(&of_entries) {
            let length = usize::try_from(*length).unwrap_or(usize::MAX);
            let known = usize::try_from(*entry).is_ok_and(|entry| entry < entries);
            match rest.split_at_checked(length).filter(|_| length > 0 && known) {
                Some((form, others)) => {
                    words.push((form, *entry));
                    rest = others;
                }
                None => return Err(wrong("forms that are none of its entries'".to_string())),
            }
        }
        if !rest.is_empty() || lengths.len() != of_entries.len() {
            return Err(wrong("forms of no length".to_string()));
        }
        let vocab_size = borders.len();
        let matcher = Matcher::new(words.into_iter(), borders)?;
        let fingerprint = Fingerprint::from_numbers(fingerprint);
        let (headwords, vectors) = (about.headwords, vectors.range.clone());
        Ok(Self { config, headwords, fingerprint, matcher, hidden, vocab_size, vectors })
    }
}

/// The inverse of [`encode`].
pub(super) fn decode(bytes: &[u8], dtype: DType) -> Vec<f32> {
    match dtype {
        DType::BF16 => {
            let (numbers, _) = bytes.as_chunks::<2>();
            numbers.iter().map(|bytes| bf16::from_le_bytes(*bytes).to_f32()).collect()
        }
        _ => {
            let (numbers, _) = bytes.as_chunks::<4>();
            numbers.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect()
        }
    }
}
