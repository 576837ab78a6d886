//! What is remembered beside a text.

use std::collections::BTreeMap;
use std::fmt;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::error::{Error, Result};

/// What a text is remembered with: all of it optional.
///
/// ```
/// use hybrid_attention::memory::Note;
///
/// let note = Note::default().tag("project", "harbour").source("minutes of 12 May").time(1_778_544_000_000);
/// # let _ = note;
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Note {
    /// Names with values, to recall by.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub tags: BTreeMap<String, String>,
    /// Where the text is from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub source: Option<String>,
    /// When it was true, in milliseconds since 1970; `None` is when it is remembered.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub time: Option<i64>,
}

impl Note {
    /// With a tag, in the place of one of the same name.
    #[must_use]
    pub fn tag(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.tags.insert(name.into(), value.into());
        self
    }

    /// With a source.
    #[must_use]
    pub fn source(mut self, source: impl Into<String>) -> Self {
        self.source = Some(source.into());
        self
    }

    /// With a time, in milliseconds since 1970.
    #[must_use]
    pub fn time(mut self, milliseconds: i64) -> Self {
        self.time = Some(milliseconds);
        self
    }

    /// Refuses what not every store can keep.
    pub(super) fn validate(&self) -> Result<()> {
        let texts = self.tags.iter().flat_map(|(name, value)| [("tag", name), ("tag", value)]);
        for (name, text) in texts.chain(self.source.as_ref().map(|source| ("source", source))) {
            if text.contains('\0') {
                return Err(Error::parameter(name, "a text without NUL", format!("{text:?}")));
            }
        }
        match self.tags.contains_key("") {
            true => Err(Error::parameter("tag", "a name", "an empty one")),
            false => Ok(()),
        }
    }
}

/// Now, in milliseconds since 1970.
pub(super) fn now() -> i64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH);
    since.ok().and_then(|since| i64::try_from(since.as_millis()).ok()).unwrap_or(0)
}

/// The name of a remembered text: the first half of its SHA-256, so the same text has the same one everywhere.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct NoteId([u8; 16]);

impl NoteId {
    /// The name of this text.
    #[must_use]
    pub fn of(text: &str) -> Self {
        let mut id = [0; 16];
        id.iter_mut().zip(Sha256::digest(text.as_bytes())).for_each(|(id, byte)| *id = byte);
        Self(id)
    }

    /// Its bytes.
    #[must_use]
    pub fn bytes(&self) -> [u8; 16] {
        self.0
    }

    /// The one with these bytes.
    #[must_use]
    pub fn from_bytes(bytes: [u8; 16]) -> Self {
        Self(bytes)
    }
}

impl fmt::Display for NoteId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for NoteId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::str::FromStr for NoteId {
    type Err = Error;

    /// Reads what it is written as, 32 hexadecimal digits.
    fn from_str(text: &str) -> Result<Self> {
        let refused = || Error::parameter("note id", "32 hexadecimal digits", format!("{text:?}"));
        if text.len() != 32 || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(refused());
        }
        u128::from_str_radix(text, 16).map(|id| Self(id.to_be_bytes())).map_err(|_| refused())
    }
}

impl Serialize for NoteId {
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for NoteId {
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        String::deserialize(from)?.parse().map_err(serde::de::Error::custom)
    }
}
