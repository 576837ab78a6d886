//! A GGUF model, in one file or split into parts, `NAME-00001-of-00003.gguf` and so on: each part is a
//! GGUF file of its own with some of the tensors, and the first holds the metadata of the model.
//!
//! Source: `llama-gguf-split` of llama.cpp.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::quantized::gguf_file::Value;

use super::gguf::{self, Gguf, GgufTensor};
use super::{Entry, Mapped};
use crate::config::integer;
use crate::error::{Error, Result};

/// A model, or for the time being a part of one.
pub(super) struct Model {
    /// Of the only file, or of the first.
    pub(super) path: PathBuf,
    pub(super) metadata: HashMap<String, Value>,
    pub(super) tensors: BTreeMap<String, Entry>,
}

impl Model {
    /// Opens the file at `path` and, if it is a part, all others.
    pub(super) fn open(path: &Path, into_memory: impl Fn(&Path) -> Result<Mapped>) -> Result<Self> {
        let opened = Self::of_file(into_memory(path)?)?;
        let wrong = |message| Error::malformed(path, message);
        let Some(part) = Part::of(&opened.metadata).map_err(wrong)? else { return Ok(opened) };
        let mut opened = Some(opened);
        let mut open = |no| {
            let file = match opened.take_if(|_| no == part.no) {
                Some(opened) => opened,
                None => Self::of_file(into_memory(&part.other(no, path)?)?)?,
            };
            Part { no, ..part }.check(&file)?;
            Ok::<_, Error>(file)
        };
        let mut whole = open(0)?;
        for no in 1..part.count {
            whole.append(open(no)?)?;
        }
        let found = whole.tensors.len();
        match part.tensors {
            Some(tensors) if tensors != found as u64 => Err(wrong(format!(
                "split.tensors.count: expected {tensors} tensors in all parts, got {found}"
            ))),
            _ => Ok(whole),
        }
    }

    fn of_file(file: Mapped) -> Result<Self> {
        let Gguf { metadata, tensors } = gguf::parse(&file.bytes, file.written)
            .map_err(|message| Error::malformed(&file.path, message))?;
        let (path, file) = (file.path.clone(), Arc::new(file));
        let tensors = tensors.into_iter().map(|(name, tensor)| {
            let GgufTensor { shape, stored, range } = tensor;
            (name, Entry { file: Arc::clone(&file), stored: Ok(stored), shape, range })
        });
        Ok(Self { path, metadata, tensors: tensors.collect() })
    }

    /// Adds the tensors of a later part.
    fn append(&mut self, part: Self) -> Result<()> {
        let Self { path, metadata, tensors } = part;
        for (key, value) in &metadata {
            // How a file lies on the disk is its own affair.
            if key.starts_with("split.") || key == "general.alignment" {
                continue;
            }
            match self.metadata.get(key) {
                Some(of_first) if same(of_first, value) => {}
                Some(_) => {
                    let message = format!("a part of another model: {key} is not as in the first");
                    return Err(Error::malformed(path, message));
                }
                None => {
                    let file = path.display();
                    tracing::warn!(key, %file, "metadata that the first part lacks: not used");
                }
            }
        }
        for (name, entry) in tensors {
            if self.tensors.contains_key(&name) {
                return Err(Error::malformed(path, format!("{name} is in another part too")));
            }
            self.tensors.insert(name, entry);
        }
        Ok(())
    }
}

fn same(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Array(a), Value::Array(b)) => {
            a.len() == b.len() && a.iter().zip(b).all(|(a, b)| same(a, b))
        }
        (Value::Array(_), _) | (_, Value::Array(_)) => false,
        (Value::String(a), Value::String(b)) => a == b,
        _ => format!("{a:?}") == format!("{b:?}"), // numbers, with their types
    }
}

/// Which part of a model a file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Part {
    /// From 0; file names count from 1.
    no: u16,
    count: u16,
    /// In all parts together, where that is said.
    tensors: Option<u64>,
}

impl Part {
    /// What the metadata of a file say; `None` of a whole model.
    pub(super) fn of(metadata: &HashMap<String, Value>) -> Result<Option<Self>, String> {
        let number = |key: &str| match metadata.get(key).map(|value| (value, integer(value))) {
            None => Ok(None),
            Some((_, Some(number))) => Ok(Some(number)),
            Some((value, None)) => Err(format!("{key}: expected a whole number, got {value:?}")),
        };
        let Some(count) = number("split.count")?.filter(|count| *count > 1) else {
            return Ok(None);
        };
        let Some(no) = number("split.no")? else {
            return Err(format!("a part of {count}, but split.no does not say which"));
        };
        let tensors = number("split.tensors.count")?;
        match (u16::try_from(no), u16::try_from(count)) {
            (Ok(no), Ok(count)) if no < count => Ok(Some(Self { no, count, tensors })),
            _ => Err(format!("split.no: expected less than {count}, at most 65535, got {no}")),
        }
    }

    /// What the name of its file ends with.
    fn ending(self) -> String {
        format!("-{:05}-of-{:05}.gguf", u32::from(self.no) + 1, self.count)
    }

    /// `NAME`, of this part at `path`.
    pub(super) fn stem(self, path: &Path) -> Result<String> {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        name.strip_suffix(&self.ending()).map(str::to_string).ok_or_else(|| {
            let expected = "by which the others are found";
            let ending = self.ending();
            Error::malformed(path, format!("{self}: expected a name with {ending}, {expected}"))
        })
    }

    /// The path of another part of the model that this one, at `path`, belongs to.
    fn other(self, no: u16, path: &Path) -> Result<PathBuf> {
        let other = Self { no, ..self };
        let name = self.stem(path)? + &other.ending();
        match path.with_file_name(&name) {
            path if path.is_file() => Ok(path),
            _ => Err(Error::malformed(path, format!("{other} is missing: no {name} beside it"))),
        }
    }

    /// Whether `file` is this part.
    fn check(self, file: &Model) -> Result<()> {
        let wrong = |message| Error::malformed(&file.path, message);
        match Self::of(&file.metadata).map_err(wrong)? {
            Some(found) if found == self => Ok(()),
            Some(found) => Err(wrong(format!("expected {self}, got {found}"))),
            None => Err(wrong(format!("expected {self}, got a whole model"))),
        }
    }
}

impl std::fmt::Display for Part {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "part {} of {}", u32::from(self.no) + 1, self.count)?;
        match self.tensors {
            Some(tensors) => write!(f, " of a model of {tensors} tensors"),
            None => Ok(()),
        }
    }
}
