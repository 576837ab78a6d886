//! The header of a safetensors file.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;

use safetensors::tensor::{Dtype, Metadata};

/// The safetensors crate refuses longer headers too.
pub(crate) const MAX_HEADER: u64 = 100_000_000;

/// One entry of a header.
#[derive(Debug)]
pub(crate) struct StoredTensor {
    pub(crate) dtype: Dtype,
    pub(crate) shape: Vec<usize>,
    /// Where in the file.
    pub(crate) range: Range<usize>,
}

/// What a header says.
#[derive(Debug)]
pub(crate) struct Header {
    pub(crate) tensors: BTreeMap<String, StoredTensor>,
    /// Texts under names, whatever they are.
    pub(crate) metadata: HashMap<String, String>,
}

/// Reads the header of `file`, the whole content of a safetensors file.
///
/// The entries cover the file without gaps or overlaps, each with as many bytes as its shape and type
/// need; the safetensors crate checks that. Its `SafeTensors::deserialize` is avoided because it adds
/// the header's own offsets to the length of the header unchecked.
pub(crate) fn parse(file: &[u8]) -> Result<Header, String> {
    let too_short =
        |len: u64| format!("the header should take {len} bytes, but the file has {}", file.len());
    if file.starts_with(b"version https://git-lfs") {
        return Err("a Git LFS pointer, not the file itself: fetch it with git lfs pull".into());
    }
    let (len, rest) = file.split_first_chunk().ok_or_else(|| too_short(8))?;
    let len = u64::from_le_bytes(*len);
    if len > MAX_HEADER {
        return Err(format!("a header of {len} bytes: at most {MAX_HEADER} are read"));
    }
    let (header, data) = rest.split_at_checked(len as usize).ok_or_else(|| too_short(8 + len))?;
    let metadata: Metadata = serde_json::from_slice(header).map_err(|e| format!("header: {e}"))?;
    if metadata.data_len() != data.len() {
        let (promised, found) = (metadata.data_len(), data.len());
        return Err(format!("the header promises {promised} bytes of tensors, found {found}"));
    }
    let offset = file.len() - data.len();
    let tensors = metadata.tensors().into_iter().map(|(name, info)| {
        let (start, end) = info.data_offsets;
        let range = offset + start..offset + end;
        (name, StoredTensor { dtype: info.dtype, shape: info.shape.clone(), range })
    });
    let tensors = tensors.collect();
    Ok(Header { tensors, metadata: metadata.metadata().clone().unwrap_or_default() })
}
