//! Which files of a folder make up a checkpoint.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use super::names::Naming;
use crate::error::{Error, Result};

/// The files of a folder that make up a checkpoint.
#[derive(Debug)]
pub(super) struct Folder {
    /// `config.json` or `params.json`.
    pub(super) config: PathBuf,
    /// Whether `config` is a `params.json`.
    pub(super) is_params: bool,
    pub(super) naming: Naming,
    pub(super) weights: Vec<PathBuf>,
    /// `model.safetensors.index.json`, if it chose `weights`.
    pub(super) index: Option<Index>,
}

/// Which shard each weight is in.
#[derive(Debug)]
pub(super) struct Index {
    path: PathBuf,
    weight_map: BTreeMap<String, String>,
}

impl Folder {
    /// Finds the weights in `folder`, then the configuration that belongs to them.
    ///
    /// `model.safetensors` is preferred to shards, as in `transformers`, and both to
    /// `consolidated.safetensors`, which holds the same weights again. Each prefers the configuration
    /// published with it, `config.json` or `params.json`, and falls back on the other.
    pub(super) fn look(folder: &Path) -> Result<Self> {
        let file = |name: &str| Some(folder.join(name)).filter(|path| path.is_file());
        let (naming, weights, index) = if let Some(path) = file("model.safetensors") {
            (Naming::HuggingFace, vec![path], None)
        } else if let Some(path) = file("model.safetensors.index.json") {
            let index = Index::read(path)?;
            (Naming::HuggingFace, index.shards(folder)?, Some(index))
        } else if let Some(path) = file("consolidated.safetensors") {
            (Naming::Mistral, vec![path], None)
        } else {
            return Err(no_weights(folder)?);
        };
        let (hugging_face, mistral) = (file("config.json"), file("params.json"));
        let is_params = match naming {
            Naming::Mistral => mistral.is_some(),
            _ => hugging_face.is_none(),
        };
        let config = if is_params { mistral } else { hugging_face };
        let config = config.ok_or_else(|| {
            Error::malformed(folder, "weights, but neither config.json nor params.json beside them")
        })?;
        Ok(Self { config, is_params, naming, weights, index })
    }
}

/// The folder that `folder` stands for: itself, or the snapshot that `refs/main` names, where it is a
/// repository in the cache of the Hugging Face hub (`models--org--name`).
///
/// ```text
/// models--org--name/refs/main              holds 0123abc
/// models--org--name/snapshots/0123abc      holds the checkpoint
/// ```
pub(super) fn snapshot(folder: &Path) -> Result<PathBuf> {
    let snapshots = folder.join("snapshots");
    if !snapshots.is_dir() {
        return Ok(folder.to_path_buf());
    }
    let Some(commit) = commit(folder, "main")? else { return Ok(folder.to_path_buf()) };
    match snapshots.join(&commit) {
        snapshot if snapshot.is_dir() => Ok(snapshot),
        _ => {
            let main = folder.join("refs").join("main");
            Err(Error::malformed(main, format!("there is no snapshot {commit} beside it")))
        }
    }
}

/// The commit that a branch or tag stands for in a repository of the cache; `None` if it holds neither.
pub(crate) fn commit(folder: &Path, revision: &str) -> Result<Option<String>> {
    let path = folder.join("refs").join(revision);
    if !path.is_file() {
        return Ok(None);
    }
    let text = super::read_text(&path)?;
    let commit = text.trim();
    if !is_file_name(commit) {
        return Err(Error::malformed(&path, format!("{commit:?} is not the name of a snapshot")));
    }
    Ok(Some(commit.to_string()))
}

/// The shards that the index at `path` names.
pub(crate) fn shards(path: &Path) -> Result<BTreeSet<String>> {
    Index::read(path.to_path_buf())?.names()
}

/// Whether `name` is a plain name, which cannot reach outside the folder it is looked up in.
fn is_file_name(name: &str) -> bool {
    // a backslash is a separator on Windows only, but folders are shared between systems
    Path::new(name).file_name() == Some(OsStr::new(name)) && !name.contains('\\')
}

impl Index {
    fn read(path: PathBuf) -> Result<Self> {
        #[derive(Deserialize)]
        struct Content {
            weight_map: BTreeMap<String, String>,
        }
        let text = super::read_text(&path)?;
        let content: Content =
            serde_json::from_str(&text).map_err(|error| Error::malformed(&path, error))?;
        Ok(Self { path, weight_map: content.weight_map })
    }

    /// The names of the shards, each once. One that is more than a plain file name is refused.
    fn names(&self) -> Result<BTreeSet<String>> {
        for (weight, shard) in &self.weight_map {
            if !is_file_name(shard) {
                let message = format!("{weight} is in {shard:?}, which is not a file name");
                return Err(Error::malformed(&self.path, message));
            }
        }
        if self.weight_map.is_empty() {
            return Err(Error::malformed(&self.path, "weight_map is empty"));
        }
        Ok(self.weight_map.values().cloned().collect())
    }

    /// The shards.
    fn shards(&self, folder: &Path) -> Result<Vec<PathBuf>> {
        let names = self.names()?;
        if let Some(shard) = names.iter().find(|shard| !folder.join(shard).is_file()) {
            let message = format!("the shard {shard} is not in the folder");
            return Err(Error::malformed(&self.path, message));
        }
        Ok(names.into_iter().map(|shard| folder.join(shard)).collect())
    }

    /// Warns of tensors that are in another file than the index says, or in none: weights are taken where
    /// they are found, and one that is missing is an error if the model needs it.
    pub(super) fn compare<'a>(&self, file_of: impl Fn(&str) -> Option<&'a Path>) {
        for (name, shard) in &self.weight_map {
            if file_of(name).is_none_or(|file| !file.ends_with(shard)) {
                let index = self.path.display();
                tracing::warn!(name, shard, %index, "the index names a tensor that its shard lacks");
            }
        }
    }
}

/// The error for a folder without weights; it depends on what is there instead.
fn no_weights(folder: &Path) -> Result<Error> {
    let mut names = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(Error::io(folder))? {
        let name = entry.map_err(Error::io(folder))?.file_name();
        names.push(name.to_string_lossy().into_owned());
    }
    names.sort_unstable();
    let ending = |endings: &[&str]| {
        names.iter().find(|name| endings.iter().any(|ending| name.ends_with(ending)))
    };
    Ok(Error::malformed(
        folder,
        if let Some(name) = ending(&[".gguf"]) {
            format!("no safetensors in this folder, but {name}: open that file itself")
        } else if let Some(name) = ending(&[".bin", ".pth", ".pt"]) {
            format!("no safetensors in this folder, but {name}: only safetensors and GGUF are read")
        } else {
            "no weights in this folder: looked for model.safetensors, \
             model.safetensors.index.json and consolidated.safetensors"
                .to_string()
        },
    ))
}
