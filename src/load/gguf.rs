//! The header of a GGUF file.
//!
//! Why not candle's `Content::read`: it divides by `general.alignment` unchecked, lets a repeated key or
//! tensor overwrite the first, and checks a tensor's place only when reading it.
//!
//! Source: <https://github.com/ggml-org/ggml/blob/master/docs/gguf.md>.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

use candle_core::quantized::GgmlDType;
use candle_core::quantized::gguf_file::Value;

use super::convert::Stored;
use crate::config::integer;
use crate::model::Codebook;

/// What a GGUF file starts with.
pub(super) const MAGIC: &[u8] = b"GGUF";

/// Levels of arrays within arrays; real files have one.
const MAX_DEPTH: usize = 4;

/// Bytes that all metadata may take in memory; the largest vocabularies, with their merges, take a tenth
/// of it. A [`Value`] has many times the room of a byte in the file.
const MAX_METADATA: usize = 512 << 20;

/// Of that, what a file may take whatever its size, and how many times the room it has on the disk: a file
/// may claim more bytes than were ever written.
const METADATA_OF_ANY: usize = 64 << 20;
const METADATA_BY_SIZE: usize = 16;

/// `GGML_MAX_DIMS`
const MAX_DIMS: u32 = 4;

/// The parsed header.
#[derive(Debug)]
pub(super) struct Gguf {
    pub(super) metadata: HashMap<String, Value>,
    pub(super) tensors: BTreeMap<String, GgufTensor>,
}

/// One row of the tensor directory.
#[derive(Debug)]
pub(super) struct GgufTensor {
    /// Row-major: the file's dimensions, slowest first.
    pub(super) shape: Vec<usize>,
    pub(super) stored: Stored,
    /// Where in the file; starts at a multiple of 8.
    pub(super) range: Range<usize>,
}

/// What is wrong with the file.
type Result<T, E = String> = std::result::Result<T, E>;

/// Reads the header of `file`, the whole content of a GGUF file of version 2 or 3, of which `written`
/// bytes are on a disk.
///
/// Of what it returns every tensor lies within `file`, apart from the others, on a multiple of 8,
/// and its rows are whole blocks.
pub(super) fn parse(file: &[u8], written: usize) -> Result<Gguf> {
    let room = written.saturating_mul(METADATA_BY_SIZE).saturating_add(METADATA_OF_ANY);
    let room = room.min(MAX_METADATA);
    let mut reader = Reader { file, position: 0, room, taken: 0 };
    if reader.take(MAGIC.len())? != MAGIC {
        return Err("not a GGUF file: it does not start with GGUF".into());
    }
    match reader.u32()? {
        2 | 3 => {}
        version if (1..=3).contains(&version.swap_bytes()) => {
            return Err("a big-endian GGUF file: only little-endian ones are read".into());
        }
        version => return Err(format!("GGUF version {version}: only 2 and 3 are read")),
    }
    let tensor_count = reader.u64()?;
    let key_count = reader.u64()?;

    let mut metadata = HashMap::new();
    for _ in 0..key_count {
        let key = reader.name("a metadata key")?;
        reader.charge(size_of::<(String, Value)>()).map_err(|what| format!("{key}: {what}"))?;
        let kind = reader.u32()?;
        let value = reader.value(kind, 0).map_err(|what| format!("{key}: {what}"))?;
        if metadata.contains_key(&key) {
            return Err(format!("the key {key} comes twice"));
        }
        metadata.insert(key, value);
    }
    let alignment = alignment(&metadata)?;

    let mut headers = Vec::new();
    for _ in 0..tensor_count {
        headers.push(reader.tensor()?);
    }
    let data = reader
        .position
        .checked_next_multiple_of(alignment)
        .ok_or("the header does not leave room for tensors")?;

    let mut tensors = BTreeMap::new();
    for (name, header) in headers {
        let tensor =
            header.place(data, alignment, file.len()).map_err(|what| format!("{name}: {what}"))?;
        if tensors.contains_key(&name) {
            return Err(format!("the tensor {name} comes twice"));
        }
        tensors.insert(name, tensor);
    }
    refuse_overlap(&tensors)?;
    Ok(Gguf { metadata, tensors })
}

/// `general.alignment`, 32 where it is not given.
///
/// At least 8, so that blocks can be read in place.
fn alignment(metadata: &HashMap<String, Value>) -> Result<usize> {
    let Some(value) = metadata.get("general.alignment") else { return Ok(32) };
    integer(value)
        .and_then(|alignment| usize::try_from(alignment).ok())
        .filter(|alignment| alignment.is_power_of_two() && *alignment >= 8)
        .ok_or_else(|| format!("general.alignment: expected a power of two from 8, got {value:?}"))
}

fn refuse_overlap(tensors: &BTreeMap<String, GgufTensor>) -> Result<()> {
    let mut placed: Vec<_> = tensors.iter().map(|(name, tensor)| (&tensor.range, name)).collect();
    placed.sort_by_key(|(range, _)| range.start);
    for pair in placed.windows(2) {
        if let [(first, a), (second, b)] = pair
            && second.start < first.end
        {
            return Err(format!("the tensors {a} and {b} overlap"));
        }
    }
    Ok(())
}

/// A row of the directory before its place is checked.
struct Header {
    shape: Vec<usize>,
    stored: Stored,
    offset: u64,
}

impl Header {
    /// `data` is where the tensors of a file of `len` bytes begin.
    fn place(self, data: usize, alignment: usize, len: usize) -> Result<GgufTensor> {
        let Self { shape, stored, offset } = self;
        let (block, bytes) = (stored.block_size(), stored.type_size());
        if !shape.last().is_some_and(|row| row.is_multiple_of(block)) {
            let name = stored.name();
            return Err(format!("rows of shape {shape:?} are not whole {name} blocks of {block}"));
        }
        let size = shape.iter().try_fold(1usize, |n, dim| n.checked_mul(*dim));
        let size = size.and_then(|elements| (elements / block).checked_mul(bytes));
        let offset = usize::try_from(offset).ok();
        if offset.is_none_or(|offset| !offset.is_multiple_of(alignment)) {
            return Err(format!("its offset is not a multiple of the alignment of {alignment}"));
        }
        let start = offset.and_then(|offset| data.checked_add(offset));
        start
            .zip(size)
            .and_then(|(start, size)| Some(start..start.checked_add(size)?))
            .filter(|range| range.end <= len)
            .map(|range| GgufTensor { shape: shape.clone(), stored, range })
            .ok_or_else(|| {
                format!("{} {shape:?} reaches beyond the end of the file", stored.name())
            })
    }
}

/// Reads little-endian values off the front of a file.
struct Reader<'a> {
    file: &'a [u8],
    position: usize,
    /// Bytes that metadata may take in memory, and those it takes.
    room: usize,
    taken: usize,
}

impl<'a> Reader<'a> {
    fn take(&mut self, len: usize) -> Result<&'a [u8]> {
        let rest = self.file.get(self.position..).unwrap_or_default();
        let taken = rest.get(..len).ok_or_else(|| {
            let (position, left) = (self.position, rest.len());
            format!("{len} bytes expected at {position}, but the file ends after {left}")
        })?;
        self.position += len;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        let bytes = self.take(N)?;
        Ok(bytes.first_chunk().copied().unwrap_or([0; N]))
    }

    fn u32(&mut self) -> Result<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64> {
        self.array().map(u64::from_le_bytes)
    }

    /// Takes note of bytes of metadata before they are made.
    fn charge(&mut self, bytes: usize) -> Result<()> {
        self.taken = self.taken.saturating_add(bytes);
        if self.taken > self.room {
            let (room, position) = (self.room, self.position);
            return Err(format!(
                "metadata up to {position} would take more than the {room} bytes of memory that a file \
                 of this size may have for it"
            ));
        }
        Ok(())
    }

    /// The bytes of a string.
    fn string(&mut self) -> Result<&'a [u8]> {
        let len = self.u64()?;
        self.take(usize::try_from(len).unwrap_or(usize::MAX))
    }

    /// A string that is a name.
    fn name(&mut self, what: &str) -> Result<String> {
        let position = self.position;
        let bytes = self.string()?;
        self.charge(bytes.len())?;
        String::from_utf8(bytes.to_vec())
            .map_err(|_| format!("{what} at {position} is not valid UTF-8"))
    }

    fn value(&mut self, kind: u32, depth: usize) -> Result<Value> {
        Ok(match kind {
            0 => Value::U8(u8::from_le_bytes(self.array()?)),
            1 => Value::I8(i8::from_le_bytes(self.array()?)),
            2 => Value::U16(u16::from_le_bytes(self.array()?)),
            3 => Value::I16(i16::from_le_bytes(self.array()?)),
            4 => Value::U32(self.u32()?),
            5 => Value::I32(i32::from_le_bytes(self.array()?)),
            6 => Value::F32(f32::from_le_bytes(self.array()?)),
            7 => match self.array()? {
                [0] => Value::Bool(false),
                [1] => Value::Bool(true),
                [other] => return Err(format!("expected a bool of 0 or 1, got {other}")),
            },
            // tokens of real vocabularies are not all UTF-8, and some writers terminate them with zeros
            8 => {
                let bytes = self.string()?;
                self.charge(bytes.len())?;
                let text = String::from_utf8_lossy(bytes);
                // A byte that is no UTF-8 has become three.
                self.charge(text.len() - bytes.len())?;
                Value::String(text.trim_end_matches('\0').to_string())
            }
            9 => self.values(depth)?,
            10 => Value::U64(self.u64()?),
            11 => Value::I64(i64::from_le_bytes(self.array()?)),
            12 => Value::F64(f64::from_le_bytes(self.array()?)),
            other => return Err(format!("unknown type of value {other}")),
        })
    }

    fn values(&mut self, depth: usize) -> Result<Value> {
        if depth == MAX_DEPTH {
            return Err(format!("arrays nested more than {MAX_DEPTH} deep"));
        }
        let kind = self.u32()?;
        let len = self.u64()?;
        // Every value has a byte at least, so a length that the file cannot hold is refused first.
        let len = usize::try_from(len).unwrap_or(usize::MAX);
        let left = self.file.len().saturating_sub(self.position);
        if len > left {
            return Err(format!(
                "an array of {len} elements, but the file ends after {left} bytes"
            ));
        }
        self.charge(len.saturating_mul(size_of::<Value>()))?;
        let mut values = Vec::new();
        values.try_reserve_exact(len).map_err(|error| error.to_string())?;
        for _ in 0..len {
            values.push(self.value(kind, depth + 1)?);
        }
        Ok(Value::Array(values))
    }

    fn tensor(&mut self) -> Result<(String, Header)> {
        let name = self.name("a tensor name")?;
        let header = self.header().map_err(|what| format!("{name}: {what}"))?;
        Ok((name, header))
    }

    fn header(&mut self) -> Result<Header> {
        let dims = self.u32()?;
        if !(1..=MAX_DIMS).contains(&dims) {
            return Err(format!("expected 1 to {MAX_DIMS} dimensions, got {dims}"));
        }
        let mut shape = Vec::new();
        for _ in 0..dims {
            let dim = self.u64()?;
            if !(1..=isize::MAX as u64).contains(&dim) {
                return Err(format!("a dimension of {dim}"));
            }
            shape.push(dim as usize);
        }
        shape.reverse();
        let number = self.u32()?;
        let stored = ggml_type(number).ok_or_else(|| unread_type(number))?;
        Ok(Header { shape, stored, offset: self.u64()? })
    }
}

/// What to say of a type that is not read; the names are those of `ggml.h`, also of types that newer
/// versions have removed.
fn unread_type(number: u32) -> String {
    let name = match number {
        4 => "Q4_2",
        5 => "Q4_3",
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        21 => "IQ3_S",
        22 => "IQ2_S",
        24 => "I8",
        25 => "I16",
        26 => "I32",
        27 => "I64",
        28 => "F64",
        29 => "IQ1_M",
        31 => "Q4_0_4_4",
        32 => "Q4_0_4_8",
        33 => "Q4_0_8_8",
        34 => "TQ1_0",
        35 => "TQ2_0",
        36 => "IQ4_NL_4_4",
        37 => "IQ4_NL_4_8",
        38 => "IQ4_NL_8_8",
        40 => "NVFP4",
        41 => "Q1_0",
        _ => "unknown",
    };
    format!(
        "ggml type {number} ({name}) is not read; these are: F32, F16, BF16, Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, \
         Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, IQ4_NL, IQ4_XS, MXFP4"
    )
}

/// The numbers of `enum ggml_type` that are read.
fn ggml_type(number: u32) -> Option<Stored> {
    let blocks = match number {
        0 => return Some(Stored::F32),
        1 => return Some(Stored::F16),
        30 => return Some(Stored::BF16),
        20 => return Some(Stored::Blocks(Codebook::Iq4Nl.into())),
        23 => return Some(Stored::Blocks(Codebook::Iq4Xs.into())),
        39 => return Some(Stored::Blocks(Codebook::Mxfp4.into())),
        2 => GgmlDType::Q4_0,
        3 => GgmlDType::Q4_1,
        6 => GgmlDType::Q5_0,
        7 => GgmlDType::Q5_1,
        8 => GgmlDType::Q8_0,
        9 => GgmlDType::Q8_1,
        10 => GgmlDType::Q2K,
        11 => GgmlDType::Q3K,
        12 => GgmlDType::Q4K,
        13 => GgmlDType::Q5K,
        14 => GgmlDType::Q6K,
        15 => GgmlDType::Q8K,
        _ => return None,
    };
    Some(Stored::Blocks(blocks.into()))
}
