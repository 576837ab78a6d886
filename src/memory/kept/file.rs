//! A kept document as a file: safetensors, with a checksum of all that is used of it.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fs::File;
use std::io::ErrorKind;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use candle_core::DType;
use memmap2::Mmap;
use safetensors::tensor::Dtype;
use sha2::{Digest, Sha256};

use crate::adapter::{Values, serialize};
use crate::error::{Error, Result};
use crate::load::map;
use crate::load::safetensors::{Header, parse};
use crate::memory::note::NoteId;
use crate::model::{KeptTokens, Transformer};
use crate::replace::replace;
use crate::thought::Document;

const FORMAT: &str = "1";
/// `u32`, `(tokens)`
const IDS: &str = "ids";
/// `(layers, 2, kv_heads, tokens, head_dim)`, keys before values
const KEPT: &str = "keys_and_values";

/// The file of a note.
pub(super) fn path(folder: &Path, id: NoteId) -> PathBuf {
    folder.join(format!("{id}.safetensors"))
}

/// What a file says beside its tensors.
struct About<'a> {
    note: &'a str,
    /// Under which model and settings it was read.
    claim: &'a str,
    lead: &'a str,
}

impl About<'_> {
    /// Of all that is used of a file.
    fn checksum(&self, dims: &[usize], dtype: DType, ids: &[u8], kept: &[u8]) -> String {
        let Self { note, claim, lead } = self;
        let mut sum = Sha256::new();
        sum.update(format!("{FORMAT} {note} {claim} {lead} {dims:?} {dtype:?}\n"));
        sum.update(ids);
        sum.update(kept);
        hex(&sum.finalize())
    }
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Writes the document of a note, whole or not at all.
pub(super) fn write(folder: &Path, id: NoteId, claim: &str, document: &Document) -> Result<()> {
    let (path, kept) = (path(folder, id), document.kept());
    let ids: Vec<u8> = document.ids().iter().flat_map(|id| id.to_le_bytes()).collect();
    let (note, lead) = (id.to_string(), document.lead().to_string());
    let about = About { note: &note, claim, lead: &lead };
    let checksum = about.checksum(&kept.dims(), kept.dtype(), &ids, kept.bytes());
    let metadata = [
        ("format", FORMAT),
        ("note", about.note),
        ("claim", about.claim),
        ("lead", about.lead),
        ("sha256", &checksum),
    ];
    let metadata = metadata.map(|(key, value)| (key.to_owned(), value.to_owned()));
    let dtype = match kept.dtype() {
        DType::BF16 => Dtype::BF16,
        DType::F16 => Dtype::F16,
        _ => Dtype::F32,
    };
    let of_ids =
        Values { dtype: Dtype::U32, shape: vec![document.ids().len()], bytes: Cow::Owned(ids) };
    let of_kept = Values { dtype, shape: kept.dims().to_vec(), bytes: Cow::Borrowed(kept.bytes()) };
    let tensors = vec![(IDS.to_owned(), of_ids), (KEPT.to_owned(), of_kept)];
    replace(&path, &serialize(tensors, HashMap::from(metadata), &path)?)
}

/// The document of a note, mapped; `None` where there is no file of it. All of the file is read once, to be held to
/// its checksum.
///
/// # Errors
/// [`Error::Io`]; [`Error::Malformed`] for a damaged file; [`Error::Store`] for one that was read by another model
/// or with other settings.
pub(super) fn read(
    folder: &Path,
    id: NoteId,
    claim: &str,
    transformer: &Transformer,
) -> Result<Option<Document>> {
    let path = path(folder, id);
    let file = match File::open(&path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        opened => map(&opened.map_err(Error::io(&path))?).map_err(Error::io(&path))?,
    };
    let wrong = |message: &str| Error::malformed(&path, message);
    let Header { tensors, metadata } = parse(&file).map_err(|it| wrong(&it))?;
    let said = |key: &str| metadata.get(key).map_or("", String::as_str);
    if said("format") != FORMAT {
        return Err(wrong(&format!("format {:?}: {FORMAT} is read", said("format"))));
    }
    let note = id.to_string();
    if said("note") != note {
        return Err(wrong(&format!("the document of note {:?}", said("note"))));
    }
    if said("claim") != claim {
        let message = "it was read by another model or with other settings than its folder says";
        return Err(Error::store(path.display(), message));
    }
    let tensor = |name: &str| {
        let found = tensors.get(name).ok_or_else(|| wrong(&format!("no tensor {name}")))?;
        Ok::<_, Error>((found, file.get(found.range.clone()).unwrap_or_default()))
    };
    let ((of_ids, ids), (of_kept, kept)) = (tensor(IDS)?, tensor(KEPT)?);
    let dtype = match (of_ids.dtype, of_kept.dtype) {
        (Dtype::U32, Dtype::F32) => DType::F32,
        (Dtype::U32, Dtype::BF16) => DType::BF16,
        (Dtype::U32, Dtype::F16) => DType::F16,
        (a, b) => {
            return Err(wrong(&format!("expected U32 and F32, BF16 or F16, got {a:?}, {b:?}")));
        }
    };
    let about = About { note: &note, claim, lead: said("lead") };
    if about.checksum(&of_kept.shape, dtype, ids, kept) != said("sha256") {
        return Err(wrong(
            "it is damaged: its checksum is another; remove it to read the document anew",
        ));
    }
    let (words, _) = ids.as_chunks::<4>();
    let ids: Vec<u32> = words.iter().map(|bytes| u32::from_le_bytes(*bytes)).collect();
    let lead = about.lead.parse().map_err(|_| wrong("no lead"))?;
    let range = of_kept.range.clone();
    let kept = KeptTokens::new(transformer, dtype, ids.len(), Arc::new(Part { file, range }));
    let document = kept.and_then(|kept| Document::new(&ids, lead, kept));
    Ok(Some(document.map_err(|error| wrong(&error.to_string()))?))
}

/// A tensor in its file.
struct Part {
    file: Mmap,
    range: Range<usize>,
}

impl AsRef<[u8]> for Part {
    fn as_ref(&self) -> &[u8] {
        self.file.get(self.range.clone()).unwrap_or_default()
    }
}
