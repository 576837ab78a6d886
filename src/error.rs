//! The one error type of the crate: every variant says what, where, expected and got.

use std::path::{Path, PathBuf};

/// `Result` with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// What went wrong. Nothing that a user passes in makes the crate panic; it is reported here.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file could not be opened, read or mapped.
    #[error("{}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the operating system said.
        source: std::io::Error,
    },

    /// A file was read but its content is not what its format promises.
    #[error("{}: {message}", path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong with it, and where.
        message: String,
    },

    /// A model of the Hugging Face hub is not on this machine.
    #[error("{model} is neither a file or folder here nor in the cache, {}: {hint}", looked_in.display())]
    NotCached {
        /// The model, as in `org/name`.
        model: String,
        /// The folder that would hold it.
        looked_in: PathBuf,
        /// How to get it.
        hint: String,
    },

    /// The cache holds a part of a model of the Hugging Face hub.
    #[error("{}: the download of {model} is incomplete, {missing} is missing: {hint}", snapshot.display())]
    IncompleteDownload {
        /// The model, as in `org/name`.
        model: String,
        /// The folder that holds the rest.
        snapshot: PathBuf,
        /// A file that it lacks, or what kind of file.
        missing: String,
        /// How to complete it.
        hint: String,
    },

    /// The hub did not answer, or its answers broke off again and again. What has arrived is kept, and the
    /// next download goes on from there.
    #[error("{url}: {message}; what has arrived is kept for the next try")]
    Unreachable {
        /// What was asked for.
        url: String,
        /// What happened at the last try.
        message: String,
    },

    /// The hub does not give out what it was asked for.
    #[error("{url}: {message} (HTTP {status})")]
    Refused {
        /// What was asked for.
        url: String,
        /// 401 and 403 of models that need a token or a permission, 404 of what does not exist.
        status: u16,
        /// What to do about it.
        message: String,
    },

    /// An answer of the hub is not what its protocol promises.
    #[error("{url}: {message}")]
    BadAnswer {
        /// What was asked for.
        url: String,
        /// What is wrong with the answer.
        message: String,
    },

    /// What was downloaded is not what the hub announced. It was thrown away.
    #[error("{url}: expected content with the checksum {expected}, got {got}; it was thrown away")]
    Checksum {
        /// What was asked for.
        url: String,
        /// The checksum announced: SHA-256, or SHA-1 as git counts it.
        expected: String,
        /// The checksum of what came.
        got: String,
    },

    /// A field of a configuration has an impossible value.
    #[error("config field {field}: expected {expected}, got {got}")]
    Config {
        /// The field, spelled as in its file.
        field: String,
        /// What would have been accepted.
        expected: String,
        /// What was found.
        got: String,
    },

    /// The checkpoint asks for something that this crate does not compute.
    #[error("unsupported {what}: {got}")]
    Unsupported {
        /// The kind of thing, e.g. `rope scaling`.
        what: String,
        /// What the checkpoint asks for, e.g. `yarn`.
        got: String,
    },

    /// The model needs a tensor that the checkpoint does not hold.
    #[error("weight {name} is missing from {place}")]
    MissingWeight {
        /// The tensor, spelled as in the checkpoint.
        name: String,
        /// The file, folder or other source that was searched.
        place: String,
    },

    /// A tensor has another shape than the configuration asks for.
    #[error("weight {name} in {place}: expected shape {expected:?}, got {got:?}")]
    WeightShape {
        /// The tensor, spelled as in the checkpoint.
        name: String,
        /// The file it is in.
        place: String,
        /// The shape according to the configuration.
        expected: Vec<usize>,
        /// The shape that is stored.
        got: Vec<usize>,
    },

    /// A tensor is stored in a type that cannot hold a weight.
    #[error("weight {name} in {place}: expected {expected}, got {got}")]
    WeightDType {
        /// The tensor, spelled as in the checkpoint.
        name: String,
        /// The file it is in.
        place: String,
        /// The types that would have been accepted.
        expected: &'static str,
        /// The type that is stored.
        got: String,
    },

    /// A tensor holds a NaN or an infinity.
    #[error("weight {name} in {place}: expected finite values, got {got} at element {index}")]
    WeightValue {
        /// The tensor, spelled as in the checkpoint.
        name: String,
        /// The file it is in.
        place: String,
        /// Row-major index of the first such value.
        index: usize,
        /// The value.
        got: f32,
    },

    /// The checkpoint holds a tensor of the model that the configuration leaves unused.
    #[error("weight {name} in {place} belongs to the model but is not used: {reason}")]
    UnusedWeight {
        /// The tensor, spelled as in the checkpoint.
        name: String,
        /// The file it is in.
        place: String,
        /// Why the configuration leaves it unused.
        reason: String,
    },

    /// The tokenizer failed, or does not fit the model.
    #[error("tokenizer: {message}")]
    Tokenizer {
        /// What is wrong.
        message: String,
    },

    /// The chat template is missing, does not parse, or raised an exception.
    #[error("chat template: {message}")]
    Template {
        /// What is wrong; the template's own words if it raised an exception.
        message: String,
    },

    /// Text was passed in, or asked for, but the checkpoint came without a tokenizer.
    #[error("no tokenizer in this checkpoint: {needed_for} needs one; hand in token ids instead")]
    NoTokenizer {
        /// What needs it.
        needed_for: &'static str,
    },

    /// Scores of tokens were asked for, but the checkpoint came without a vocabulary head.
    #[error(
        "no vocabulary head in this checkpoint (lm_head.weight, or an embedding table that is tied to \
         it): {needed_for} needs one; embedding texts and thinking do not"
    )]
    NoHead {
        /// What needs it.
        needed_for: &'static str,
    },

    /// The store of a memory failed, or is another model's.
    #[error("{place}: {message}")]
    Store {
        /// The file or the host.
        place: String,
        /// What it said.
        message: String,
    },

    /// A parameter is outside its range.
    #[error("parameter {name}: expected {expected}, got {got}")]
    Parameter {
        /// The parameter.
        name: &'static str,
        /// Its range.
        expected: String,
        /// The value passed in.
        got: String,
    },

    /// There is no token to start from.
    #[error("the prompt is empty: at least one token is needed")]
    EmptyPrompt,

    /// A token id is not a row of the embedding table.
    #[error(
        "token id {id} at position {position}: expected less than the vocabulary of {vocab_size}"
    )]
    TokenOutOfRange {
        /// Index into the tokens.
        position: usize,
        /// The id.
        id: u32,
        /// Rows of the embedding table.
        vocab_size: usize,
    },

    /// More positions were asked for than the cache, or the model, has room for.
    #[error("context full: {of} has room for {capacity} positions, {requested} requested")]
    ContextFull {
        /// What is full: `the model`, `the cache` or `the conversation`.
        of: &'static str,
        /// The positions there is room for.
        capacity: usize,
        /// The positions needed.
        requested: usize,
    },

    /// The caches of a pool need more memory than its budget. Nothing was computed.
    #[error(
        "key-value pool full: {requested} bytes more requested, {used} of {budget} bytes are in use"
    )]
    PoolFull {
        /// Bytes that its caches may hold in total.
        budget: usize,
        /// Bytes that they hold.
        used: usize,
        /// Bytes that were needed in addition.
        requested: usize,
    },

    /// The work was cancelled, or its time ran out.
    #[error("cancelled")]
    Cancelled,

    /// The cache of a sliding window was asked to return to keys that it has dropped.
    #[error(
        "cannot truncate the cache to {length}: under the sliding window nothing before position {oldest} is kept; reset it instead"
    )]
    CacheRolled {
        /// The length asked for.
        length: usize,
        /// The oldest position still held.
        oldest: usize,
    },

    /// A forward pass produced a NaN or an infinity.
    #[error("{what} are not finite at position {position}")]
    NotFinite {
        /// What was computed, e.g. `logits`.
        what: &'static str,
        /// For `logits`, the position in the text of the token that they predict; for the `vectors` of
        /// texts, the index of the text; for `thoughts`, the index of the pass; for `embeddings`,
        /// `queries`, `scores` and `states`, the row; for `losses` and `gradients` of a nudge, the sequence in the
        /// batch, or the position where a block of them begins.
        position: usize,
    },

    /// Something is wrong with one of several texts.
    #[error("text {text}: {source}")]
    InText {
        /// Its index, from 0.
        text: usize,
        /// What is wrong.
        source: Box<Error>,
    },

    /// An op of a refinement failed.
    #[error("refinement op {index} ({op}): {source}")]
    Refinement {
        /// The op, by its [`name`](crate::refine::Refine::name).
        op: String,
        /// Its place in the sequence, from 0.
        index: usize,
        /// What went wrong in it.
        source: Box<Error>,
    },

    /// A stream of tokens was asked for its whole answer after it had already ended with an error.
    #[error("the stream ended with an error before: there is no whole answer")]
    StreamFailed,

    /// candle failed: a device, or memory.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
}

impl Error {
    /// Wraps what the operating system said about `path`.
    pub(crate) fn io(path: impl AsRef<Path>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.as_ref().to_path_buf();
        move |source| Self::Io { path, source }
    }

    /// The content of `path` is wrong in the way `message` says.
    pub(crate) fn malformed(path: impl AsRef<Path>, message: impl ToString) -> Self {
        Self::Malformed { path: path.as_ref().to_path_buf(), message: presentable(message) }
    }

    /// A configuration field with an impossible value.
    pub(crate) fn config(
        field: impl Into<String>,
        expected: impl Into<String>,
        got: impl ToString,
    ) -> Self {
        Self::Config { field: field.into(), expected: expected.into(), got: presentable(got) }
    }

    /// Something this crate does not compute.
    pub(crate) fn unsupported(what: impl Into<String>, got: impl ToString) -> Self {
        Self::Unsupported { what: what.into(), got: presentable(got) }
    }

    /// `source` is wrong with the text of this index.
    pub(crate) fn in_text(text: usize, source: Self) -> Self {
        Self::InText { text, source: Box::new(source) }
    }

    /// What the store at `place` said.
    pub(crate) fn store(place: impl ToString, message: impl ToString) -> Self {
        Self::Store { place: presentable(place), message: presentable(message) }
    }

    /// A parameter outside its range.
    pub(crate) fn parameter(
        name: &'static str,
        expected: impl Into<String>,
        got: impl ToString,
    ) -> Self {
        Self::Parameter { name, expected: expected.into(), got: presentable(got) }
    }
}

/// Text that may come from a file, made fit for an error message: of limited length, and without
/// characters that a terminal would take as commands.
fn presentable(text: impl ToString) -> String {
    const LONGEST: usize = 600;
    let text = text.to_string();
    let mut shown = String::new();
    for (count, c) in text.chars().enumerate() {
        if count == LONGEST {
            shown.push('…');
            break;
        }
        if c.is_control() && c != '\n' {
            shown.extend(c.escape_default());
        } else {
            shown.push(c);
        }
    }
    shown
}
