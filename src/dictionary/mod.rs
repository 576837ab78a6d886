//! What words mean, beside the prompt: the entries of a dictionary are read once, each by itself, and rows of a text
//! that stand in a headword bring the vector of its entry into some MLPs.
//!
//! ```text
//! compile    d = pool(norm(stream after attention))     of "- headword: definition", for each chosen layer
//! look up    each row of a pass: the longest headword that it stands in
//! read       gate, up:  W x + U d                       with U = B A of low rank, zero at first
//! ```
//!
//! So the text and its dictionary share no attention, and a token takes the same products whatever the size of the dictionary.
//! `d` is the very tensor that the MLP of that layer reads while the entry runs, pooled over its tokens: there it has
//! the scale of the `x` that it stands beside. [`DictionaryAdapter`] holds `U`, which has to be trained; until then the
//! model is what it was, bit for bit. ([Two hand-offs](HybridModel::with_dictionary) round differently where only one of
//! thinking and decoding reads it.)
//!
//! ```
//! # use candle_core::Device;
//! use hybrid_attention::dictionary::{Dictionary, DictionaryAdapter, DictionaryConfig, Entries};
//! use hybrid_attention::{AdapterScope, GenerationConfig, HybridModel};
//!
//! # fn main() -> hybrid_attention::Result<()> {
//! let model = HybridModel::tiny(&Device::Cpu)?;
//! let entries = Entries::new([("urn", "a vase with a lid"), ("sled", "a wagon without wheels")])?;
//! let config = DictionaryConfig::layers(1..3);
//! let dictionary = Dictionary::compile(&model, &entries, &config)?;
//!
//! let adapter = DictionaryAdapter::new(model.config(), &config, 4, 42, &Device::Cpu)?; // to be trained
//! let reading = model.with_dictionary(&dictionary, &adapter, AdapterScope::Both)?;
//! let config = GenerationConfig::default().max_tokens(2);
//! let prompt = "The urn is in the sled. The sled is in the tent.\nWhere is the urn?\nIn the";
//! assert_eq!(reading.generate(prompt, &config)?.logprobs, model.generate(prompt, &config)?.logprobs);
//! # Ok(())
//! # }
//! ```
//!
//! # Which rows stand in a headword
//!
//! Headwords are found by their tokens, as they are spelled and with a capital first letter, each with a space before
//! it and without one. Where two headwords have a form in common, it is that of the one that is spelled so, then of the
//! first. A match begins and ends where words do: not between two letters or digits. A row has the entry of the longest
//! match that it stands in, of several as long of the first, among those that it *sees* whole: a row of a context
//! segment in a thought pass sees to the end of that segment, any other row no further than itself. So in causal passes a
//! headword of several tokens shows at its last token only, and whether the word goes on after that is not known
//! there. In return nothing that has run must ever be run again: cached decoding is full recomputation.
//!
//! # Where it works
//!
//! Answers, streams, conversations, candidates, many prompts side by side, thinking and thinking again, embeddings and
//! documents that are read once all look up. By hand, every pass needs the [ids](crate::model::Batch::with_ids) of its
//! tokens, which an [`EncodedBatch`](crate::thought::EncodedBatch) has; without them it is an error.
//! [Memories](crate::memory) refuse a model with a dictionary, because what they keep would depend on it.

mod adapter;
mod apply;
mod compile;
mod config;
mod entries;
mod file;
mod forms;
mod matcher;

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use self::compile::Compiler;
use self::file::{Bytes, Content};
use crate::config::Config;
use crate::error::{Error, Result};
use crate::hybrid::HybridModel;
use crate::model::{Seen, Sight, Transformer};
use crate::statistics::Fingerprint;

pub use self::adapter::DictionaryAdapter;
pub use self::config::{DictionaryConfig, Pooled};
pub use self::entries::Entries;

/// The vectors of entries for some layers of a model, and what finds their headwords in texts: see the
/// [module](self). Cheap to clone.
#[derive(Clone)]
pub struct Dictionary {
    inner: Arc<Inner>,
    /// The entry whose vectors each entry has; nothing where these are its own.
    order: Option<Arc<[u32]>>,
}

struct Inner {
    place: String,
    bytes: Bytes,
    content: Content,
}

impl fmt::Debug for Dictionary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Dictionary")
            .field("place", &self.inner.place)
            .field("entries", &self.len())
            .field("config", self.config())
            .field("matcher", &self.inner.content.matcher)
            .finish_non_exhaustive()
    }
}

impl Dictionary {
    /// Reads all entries, and keeps their vectors in memory. To the last bit an entry's are what they would be in a
    /// dictionary of its own.
    ///
    /// # Errors
    /// As [`DictionaryConfig::validate`]; [`Error::Parameter`] for layers that the model does not have, and a model
    /// that has a dictionary; [`Error::Unsupported`] for a mixture of experts; [`Error::NoTokenizer`]. With its line,
    /// [`Error::Malformed`], or [`Error::Parameter`] where there is no file, for an entry of more tokens than the
    /// model's context or [`DictionaryConfig::max_tokens`] and for a headword that the tokenizer has no tokens for.
    pub fn compile(
        model: &HybridModel,
        entries: &Entries,
        config: &DictionaryConfig,
    ) -> Result<Self> {
        let bytes = file::in_memory(&Compiler::new(model, entries, config)?)?;
        Self::of(bytes, "memory".to_string())
    }

    /// The same into one safetensors file, in memory for some entries at a time, and [opened](Self::open). `progress`
    /// is told how many entries are done, and how many there are.
    ///
    /// Until it is whole the file is called `{path}.part`. If that is there from a run that was stopped, of the same
    /// model, entries and settings, this goes on where it ended. A file at `path` is replaced at the end, atomically.
    ///
    /// # Errors
    /// As [`compile`](Self::compile); [`Error::Io`]; [`Error::Parameter`] where another run writes the same file.
    pub fn compile_to(
        path: impl AsRef<Path>,
        model: &HybridModel,
        entries: &Entries,
        config: &DictionaryConfig,
        progress: impl FnMut(usize, usize),
    ) -> Result<Self> {
        file::into_file(&Compiler::new(model, entries, config)?, path.as_ref(), progress)?;
        Self::open(path)
    }

    /// Opens the file of a dictionary. Its vectors stay on the disk, and are read as they are looked up: the file must
    /// not be overwritten or cut short as long as the dictionary is used.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Malformed`] for anything but the whole file of a dictionary.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        Self::of(Bytes::map(path)?, path.display().to_string())
    }

    fn of(bytes: Bytes, place: String) -> Result<Self> {
        let content = Content::read(&bytes, &place)?;
        Ok(Self { inner: Arc::new(Inner { place, bytes, content }), order: None })
    }

    /// How many entries there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.headwords().len()
    }

    /// Whether there are none, which is never.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.headwords().is_empty()
    }

    /// The headwords, in the order of the entries.
    #[must_use]
    pub fn headwords(&self) -> &[String] {
        &self.inner.content.headwords
    }

    /// How its vectors were made.
    #[must_use]
    pub fn config(&self) -> &DictionaryConfig {
        &self.inner.content.config
    }

    /// The vector of an entry for a layer, of `hidden` numbers.
    ///
    /// # Errors
    /// [`Error::Parameter`] for an entry or a layer that it does not have; [`Error::NotFinite`] with the index of the
    /// entry, for numbers that a file cannot have come by.
    pub fn vector(&self, entry: usize, layer: usize) -> Result<Vec<f32>> {
        let place = self.place_of(layer)?;
        match u32::try_from(entry) {
            Ok(known) if entry < self.len() => self.looked_up(known, place),
            _ => Err(Error::parameter("entry", format!("less than {}", self.len()), entry)),
        }
    }

    /// The entry of each token of a text, read in one pass.
    #[must_use]
    pub fn find(&self, ids: &[u32], sight: Sight) -> Vec<Option<usize>> {
        let all = std::iter::once(0..ids.len()).collect::<Vec<_>>();
        let segments: &[_] = if sight == Sight::Bidirectional { &all } else { &[] };
        let entries = self.entries(&Seen::new(ids, 0, segments)).into_iter();
        entries.map(|entry| entry.and_then(|entry| usize::try_from(entry).ok())).collect()
    }

    /// The same dictionary, in which the entry `i` has the vectors of the entry `order[i]`: shuffled, it is the control
    /// that the right one has to beat.
    ///
    /// # Errors
    /// [`Error::Parameter`] unless there is an entry for each.
    pub fn reordered(&self, order: &[u32]) -> Result<Self> {
        let expected = || format!("for each of {} entries one of them", self.len());
        if order.len() != self.len() {
            return Err(Error::parameter("order", expected(), format!("{} entries", order.len())));
        }
        let from = |entry: &u32| match usize::try_from(*entry).ok().filter(|it| *it < self.len()) {
            Some(index) => {
                Ok(self.order.as_ref().and_then(|it| it.get(index).copied()).unwrap_or(*entry))
            }
            None => Err(Error::parameter("order", expected(), entry)),
        };
        let order = order.iter().map(from).collect::<Result<_>>()?;
        Ok(Self { inner: Arc::clone(&self.inner), order: Some(order) })
    }

    fn entries(&self, seen: &Seen<'_>) -> Vec<Option<u32>> {
        self.inner.content.matcher.entries(seen)
    }

    /// Where a layer stands among those that there are vectors for.
    fn place_of(&self, layer: usize) -> Result<usize> {
        let layers = self.config().chosen_layers();
        layers.binary_search(&layer).map_err(|_| {
            Error::parameter("layer", format!("one of {layers:?}, as in the dictionary"), layer)
        })
    }

    /// The vector of an entry for the layer at this place.
    fn looked_up(&self, entry: u32, place: usize) -> Result<Vec<f32>> {
        let entry = usize::try_from(entry).unwrap_or(usize::MAX);
        let from = self.order.as_ref().and_then(|order| order.get(entry));
        let from = from.map_or(entry, |from| usize::try_from(*from).unwrap_or(usize::MAX));
        let Content { config, hidden, vectors, .. } = &self.inner.content;
        let dtype = config.chosen_dtype();
        let each = hidden * dtype.size_in_bytes();
        let start = (from * config.chosen_layers().len() + place) * each + vectors.start;
        let values = file::decode(self.inner.bytes.get(start..start + each), dtype);
        match values.len() == *hidden && values.iter().all(|value| value.is_finite()) {
            true => Ok(values),
            false => Err(Error::NotFinite { what: "vectors", position: from }),
        }
    }

    /// Refuses a model that it was not compiled by.
    fn check_model(&self, reader: &Transformer) -> Result<()> {
        self.check_sizes(reader.config())?;
        Fingerprint::of(reader)?.check("dictionary", &self.inner.content.fingerprint)
    }

    fn check_sizes(&self, model: &Config) -> Result<()> {
        let Content { hidden, vocab_size, .. } = &self.inner.content;
        let (ours, theirs) = ((model.hidden_size, model.vocab_size), (*hidden, *vocab_size));
        if ours == theirs {
            return Ok(());
        }
        let of = |(hidden, vocab)| format!("a width of {hidden} and a vocabulary of {vocab}");
        Err(Error::parameter("dictionary", of(ours), of(theirs)))
    }
}
