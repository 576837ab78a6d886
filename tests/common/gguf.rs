//! GGUF files, written byte by byte so that anything can be in them.

use candle_core::quantized::gguf_file::Value;
use hybrid_attention::Config;

use super::{GGUF_NAMES, Result, gguf_metadata};

/// A file in its parts, each entry of the header by itself.
#[derive(Clone)]
pub(crate) struct GgufFile {
    pub(crate) start: Vec<u8>,
    pub(crate) keys: Vec<Vec<u8>>,
    pub(crate) tensors: Vec<Vec<u8>>,
    pub(crate) data: Vec<u8>,
}

impl Default for GgufFile {
    fn default() -> Self {
        let start = [&b"GGUF"[..], &3u32.to_le_bytes()].concat();
        Self { start, keys: Vec::new(), tensors: Vec::new(), data: Vec::new() }
    }
}

pub(crate) fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes(), text.as_bytes()].concat()
}

pub(crate) fn key(name: &str, kind: u32, value: &[u8]) -> Vec<u8> {
    [&string(name), &kind.to_le_bytes()[..], value].concat()
}

/// A row of the tensor directory; `dims` fastest first, as in the file.
pub(crate) fn tensor(name: &str, dims: &[u64], kind: u32, offset: u64) -> Vec<u8> {
    let mut row = string(name);
    row.extend((dims.len() as u32).to_le_bytes());
    row.extend(dims.iter().flat_map(|dim| dim.to_le_bytes()));
    row.extend(kind.to_le_bytes());
    row.extend(offset.to_le_bytes());
    row
}

impl GgufFile {
    /// A file with the metadata of `config`, and no tensors.
    pub(crate) fn of(config: &Config) -> Result<Self> {
        let mut file = Self::default();
        for (name, value) in gguf_metadata(config) {
            file.keys.push(match value {
                Value::U32(value) => key(&name, 4, &value.to_le_bytes()),
                Value::F32(value) => key(&name, 6, &value.to_le_bytes()),
                Value::String(value) => key(&name, 8, &string(&value)),
                other => return Err(format!("{name}: {other:?}").into()),
            });
        }
        Ok(file)
    }

    /// Says which part of a model it is, from 0.
    pub(crate) fn part(mut self, no: u16, count: u16, tensors: i32) -> Self {
        self.keys.push(key("split.no", 2, &no.to_le_bytes()));
        self.keys.push(key("split.count", 2, &count.to_le_bytes()));
        self.keys.push(key("split.tensors.count", 5, &tensors.to_le_bytes()));
        self
    }

    /// Adds a tensor by its Hugging Face name; `dims` slowest first.
    pub(crate) fn push(&mut self, name: &str, dims: &[usize], kind: u32, data: &[u8]) {
        self.place(name, dims, kind, self.data.len());
        self.data.extend(data);
        self.data.resize(self.data.len().next_multiple_of(32), 0);
    }

    /// Adds a tensor without its data, which are to be at `offset`.
    pub(crate) fn place(&mut self, name: &str, dims: &[usize], kind: u32, offset: usize) {
        let name =
            GGUF_NAMES.iter().fold(name.to_string(), |name, (ours, file)| name.replace(ours, file));
        let dims: Vec<u64> = dims.iter().rev().map(|dim| *dim as u64).collect();
        self.tensors.push(tensor(&name, &dims, kind, offset as u64));
    }

    /// All that comes before the data.
    pub(crate) fn header(&self) -> Vec<u8> {
        let mut file = self.start.clone();
        file.extend((self.tensors.len() as u64).to_le_bytes());
        file.extend((self.keys.len() as u64).to_le_bytes());
        file.extend(self.keys.concat());
        file.extend(self.tensors.concat());
        file.resize(file.len().next_multiple_of(32), 0);
        file
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        [self.header(), self.data.clone()].concat()
    }
}
