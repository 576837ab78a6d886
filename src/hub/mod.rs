//! Where models lie: on a path, in the cache of the Hugging Face hub, or, with the feature `hub`, on the
//! hub itself.
//!
//! ```text
//! org/name                       the branch main: a folder with safetensors, or the only GGUF in it
//! org/name@v0.3                  a branch, a tag or a commit
//! org/name/NAME.Q4_K_M.gguf      one file of it, with its other parts if it is split
//! org/name:Q4_K_M                the one GGUF file whose name ends so, as llama.cpp's -hf has it
//! ```
//!
//! The cache is the one that `huggingface_hub`, and so transformers and `hf download` share: what one of them
//! has downloaded the others find, and this crate does, too. It lies where [`Hub`] says.
//!
//! ```text
//! models--org--name/refs/main              holds 0123abc
//! models--org--name/snapshots/0123abc/     the files of that commit, links to
//! models--org--name/blobs/                 their contents, each under its checksum
//! ```

#[cfg(feature = "hub")]
mod checksum;
#[cfg(feature = "hub")]
mod client;
#[cfg(feature = "hub")]
mod download;
mod files;
mod name;
mod settings;
mod snapshot;

use std::path::{Path, PathBuf};

use self::name::{Choice, Name};
pub use self::settings::Hub;
use self::snapshot::Found;
use crate::error::{Error, Result};

/// Which model: a path, or the name of a repository on the Hugging Face hub.
///
/// ```
/// use hybrid_attention::hub::{Hub, Pretrained};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let empty = tempfile::tempdir()?;
/// let hub = Hub::from_env().offline(true);
/// # let hub = hub.cache(empty.path());
/// let model = Pretrained::new("mistralai/Mistral-7B-v0.3").revision("main").hub(hub);
/// match model.fetch(|_| ()) {
///     Ok(path) => println!("{}", path.display()), // for HybridModel::open, or Checkpoint::open
///     Err(error) => println!("{error}"), // where it looked, and how to get it
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Pretrained {
    model: String,
    revision: Option<String>,
    file: Option<String>,
    hub: Option<Hub>,
    update: bool,
}

/// How far a download is.
#[derive(Clone, Copy, Debug)]
#[non_exhaustive]
pub struct Fetched<'a> {
    /// The file that is downloaded now, as the repository names it.
    pub file: &'a str,
    /// Bytes of all files that are here, those of earlier tries among them.
    pub done: u64,
    /// Bytes of all files. It grows when the index of the weights has been read.
    pub total: u64,
}

impl From<&str> for Pretrained {
    fn from(model: &str) -> Self {
        Self::new(model)
    }
}

impl From<String> for Pretrained {
    fn from(model: String) -> Self {
        Self::new(model)
    }
}

impl Pretrained {
    /// The model at a path, or of this name on the hub: see the [module](self). What exists as a path is
    /// taken as one, as transformers does.
    #[must_use]
    pub fn new(model: impl Into<String>) -> Self {
        Self { model: model.into(), revision: None, file: None, hub: None, update: false }
    }

    /// The model at this branch, tag or commit, instead of `main` and of what the name says. Paths have no
    /// revisions, so the model is then one of the hub.
    #[must_use]
    pub fn revision(mut self, revision: impl Into<String>) -> Self {
        self.revision = Some(revision.into());
        self
    }

    /// The GGUF file of this name in the repository, with its other parts if it is split. The model is then
    /// one of the hub.
    #[must_use]
    pub fn file(mut self, file: impl Into<String>) -> Self {
        self.file = Some(file.into());
        self
    }

    /// Another hub or cache than [`Hub::from_env`] finds.
    #[must_use]
    pub fn hub(mut self, hub: Hub) -> Self {
        self.hub = Some(hub);
        self
    }

    /// Whether to ask the hub for the present commit of the revision although there is one in the cache
    /// [default: no]. If the hub cannot be reached, a warning says so and the cached one is used; the same
    /// without the feature `hub`.
    #[must_use]
    pub fn update(mut self, update: bool) -> Self {
        self.update = update;
        self
    }

    /// The folder or GGUF file of this model, on this machine: a path as it is; else a complete snapshot
    /// in the cache, without a request; else, with the feature `hub` and unless [`Hub::offline`], a
    /// snapshot that is downloaded now, `progress` being told how far it is.
    ///
    /// Downloaded is what this crate reads: configuration, tokenizer, templates and `safetensors`, or the
    /// GGUF file asked for; never weights in Python's pickles. A connection that breaks is taken up where it
    /// ended, five times in a row, and so is what an earlier process left unfinished. Contents are held to
    /// their checksums before they get their names.
    ///
    /// # Errors
    /// [`Error::Io`] for a path that does not exist; [`Error::Parameter`] for what is neither a path nor a name, or for the name of a repository with
    /// several GGUF files; [`Error::NotCached`] and [`Error::IncompleteDownload`] where nothing may be
    /// downloaded; [`Error::Unreachable`], [`Error::Refused`], [`Error::BadAnswer`] and
    /// [`Error::Checksum`] where that failed; [`Error::Io`] and [`Error::Malformed`] for files of the cache.
    pub fn fetch(&self, progress: impl FnMut(Fetched<'_>)) -> Result<PathBuf> {
        let path = Path::new(&self.model);
        if self.revision.is_none() && self.file.is_none() && path.exists() {
            return Ok(path.to_path_buf());
        }
        let mut name = match Name::parse(&self.model) {
            // What can only be a path is spoken of as one.
            Err(_) if path.is_absolute() || path.starts_with(".") || path.starts_with("..") => {
                if path.exists() {
                    let expected =
                        "a name on the Hugging Face hub where a revision or a file is asked for";
                    return Err(Error::parameter("model", expected, path.display()));
                }
                let message = "No such file or directory, and no name on the Hugging Face hub";
                let source = std::io::Error::new(std::io::ErrorKind::NotFound, message);
                return Err(Error::io(path)(source));
            }
            name => name?,
        };
        if let Some(revision) = &self.revision {
            name = name.at(revision)?;
        }
        if let Some(file) = &self.file {
            name = name.choosing(Choice::file(file)?);
        }
        let hub = self.hub.clone().unwrap_or_else(Hub::from_env);
        let found = snapshot::find(&hub, &name)?;
        if hub.downloads() {
            return match found {
                Found::Ready(path) if !self.update => Ok(path),
                Found::Ready(path) => match download(&hub, &name, progress) {
                    Err(error @ Error::Unreachable { .. }) => {
                        tracing::warn!(model = %name, %error, "not updated: that in the cache is used");
                        Ok(path)
                    }
                    updated => updated,
                },
                Found::Partly { .. } | Found::None => download(&hub, &name, progress),
            };
        }
        match found {
            Found::Ready(path) => {
                if self.update {
                    let hint = hint(&hub, &name);
                    tracing::warn!(model = %name, hint, "not updated: that in the cache is used");
                }
                Ok(path)
            }
            Found::Partly { snapshot, missing } => {
                let (model, hint) = (name.to_string(), hint(&hub, &name));
                Err(Error::IncompleteDownload { model, snapshot, missing, hint })
            }
            Found::None => Err(not_cached(&hub, &name)),
        }
    }
}

#[cfg(feature = "hub")]
use self::download::download;

/// Never called: without the feature, [`Hub::downloads`] is false.
#[cfg(not(feature = "hub"))]
fn download(hub: &Hub, name: &Name, _progress: impl FnMut(Fetched<'_>)) -> Result<PathBuf> {
    Err(not_cached(hub, name))
}

fn not_cached(hub: &Hub, name: &Name) -> Error {
    let (model, looked_in) = (name.to_string(), hub.folder(name));
    Error::NotCached { model, looked_in, hint: hint(hub, name) }
}

/// How to get a model that is not here.
fn hint(hub: &Hub, name: &Name) -> String {
    let mut command = format!("hf download {}", name.repo());
    if let Choice::File(file) = name.choice() {
        command += &format!(" {file}");
    }
    if name.revision() != name::MAIN {
        command += &format!(" --revision {}", name.revision());
    }
    let otherwise = if !cfg!(feature = "hub") {
        "this crate does with the feature hub"
    } else if hub.is_offline() {
        "this program does unless it is told to stay offline, as by HF_HUB_OFFLINE"
    } else {
        "this program does"
    };
    format!("`{command}` fetches it, and so {otherwise}")
}

/// The weights that a name chooses, in words.
fn wanted(name: &Name) -> String {
    match name.choice() {
        Choice::Whole => "its weights".to_string(),
        Choice::File(file) => file.clone(),
        Choice::Tag(tag) => format!("a GGUF file for {tag}"),
    }
}
