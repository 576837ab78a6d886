//! Headwords and what they mean.

use std::collections::HashMap;
use std::path::Path;

use sha2::{Digest, Sha256};

use crate::error::{Error, Result};
use crate::load::read_text_of;

/// Bytes of a file.
const MOST: u64 = 1 << 30;

/// What stands between the definitions of a headword that occurs several times.
const BETWEEN: &str = "; ";

/// Headwords with their definitions, in the order in which they first occur.
///
/// Space around both is left out. A headword that occurs again, spelled in the same way, is the same entry: its
/// definitions are joined in their order, with `; ` between them.
///
/// ```
/// use hybrid_attention::dictionary::Entries;
///
/// let entries = Entries::new([("bank", "where money is"), ("urn", "a vase"), ("bank", "the side of a river")])?;
/// let all: Vec<_> = entries.iter().collect();
/// assert_eq!(all, [("bank", "where money is; the side of a river"), ("urn", "a vase")]);
/// # Ok::<_, hybrid_attention::Error>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entries {
    entries: Vec<Entry>,
    /// The file that they come from; nothing for those made in memory.
    place: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    headword: String,
    definition: String,
    /// Where it first occurs, from 1: the line of its file, or its place among the pairs.
    line: usize,
}

impl Entries {
    /// Of pairs of a headword and its definition.
    ///
    /// # Errors
    /// [`Error::Parameter`] for no entries, and for an empty headword or definition, with its place from 1.
    pub fn new<H: Into<String>, D: Into<String>>(
        pairs: impl IntoIterator<Item = (H, D)>,
    ) -> Result<Self> {
        let pairs =
            pairs.into_iter().map(|(headword, definition)| (headword.into(), definition.into()));
        Self::merged((1..).zip(pairs), None)
    }

    /// Of a UTF-8 file: on each line a headword, a tab and its definition, in which further tabs are spaces. Empty
    /// lines are skipped. At most 1 GiB.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Malformed`], with the line, for one without a tab, an empty headword or definition; and
    /// for no entries.
    pub fn from_tsv(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let text = read_text_of(path, MOST)?;
        let text = text.strip_prefix('\u{feff}').unwrap_or(&text);
        let mut pairs = Vec::new();
        for (line, content) in (1..).zip(text.lines()).filter(|(_, it)| !it.trim().is_empty()) {
            let Some((headword, definition)) = content.split_once('\t') else {
                let message = format!("line {line}: expected a headword, a tab and a definition");
                return Err(Error::malformed(path, message));
            };
            pairs.push((line, (headword.to_string(), definition.replace('\t', " "))));
        }
        Self::merged(pairs, Some(path))
    }

    fn merged(
        pairs: impl IntoIterator<Item = (usize, (String, String))>,
        path: Option<&Path>,
    ) -> Result<Self> {
        let place = path.map(|path| path.display().to_string());
        let mut merged = Self { entries: Vec::new(), place };
        let mut known = HashMap::new();
        for (line, (headword, definition)) in pairs {
            let (headword, definition) = (headword.trim(), definition.trim());
            if headword.is_empty() {
                return Err(merged.wrong(line, "an empty headword"));
            }
            if definition.is_empty() {
                return Err(merged.wrong(line, format!("an empty definition of {headword:?}")));
            }
            let next = merged.entries.len();
            let index = *known.entry(headword.to_string()).or_insert(next);
            match merged.entries.get_mut(index) {
                Some(entry) => entry.definition.extend([BETWEEN, definition]),
                None => {
                    let (headword, definition) = (headword.to_string(), definition.to_string());
                    merged.entries.push(Entry { headword, definition, line });
                }
            }
        }
        match (merged.entries.is_empty(), path) {
            (false, _) => Ok(merged),
            (true, Some(path)) => Err(Error::malformed(path, "no entries")),
            (true, None) => Err(Error::parameter("entries", "at least one", "none")),
        }
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether there are none, which is never.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// Headwords and definitions.
    pub fn iter(&self) -> impl ExactSizeIterator<Item = (&str, &str)> {
        self.entries.iter().map(|entry| (entry.headword.as_str(), entry.definition.as_str()))
    }

    pub(super) fn get(&self, index: usize) -> Option<(&str, &str)> {
        let entry = self.entries.get(index)?;
        Some((&entry.headword, &entry.definition))
    }

    /// What is wrong with the entry of this index, with its line.
    pub(super) fn wrong_at(&self, index: usize, message: impl std::fmt::Display) -> Error {
        let line = self.entries.get(index).map_or(0, |entry| entry.line);
        self.wrong(line, message)
    }

    fn wrong(&self, line: usize, message: impl std::fmt::Display) -> Error {
        match &self.place {
            Some(path) => Error::malformed(path, format!("line {line}: {message}")),
            None => {
                let expected = "headwords with definitions that the model has room for";
                Error::parameter("entries", expected, format!("entry {line}: {message}"))
            }
        }
    }

    /// Of all of them, to know them again.
    pub(super) fn sha256(&self) -> String {
        let mut sum = Sha256::new();
        for text in self.iter().flat_map(|(headword, definition)| [headword, definition]) {
            sum.update((text.len() as u64).to_le_bytes());
            sum.update(text);
        }
        sum.finalize().iter().map(|byte| format!("{byte:02x}")).collect()
    }
}
