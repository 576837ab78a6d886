//! What the cache holds of a model.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use super::files::{INDEX, Weights, missing_part};
use super::name::{Name, is_commit};
use super::settings::Hub;
use crate::error::{Error, Result};
use crate::load::folder;

/// What was found.
#[derive(Debug)]
pub(super) enum Found {
    /// All of it: the folder, or the first part of the GGUF model.
    Ready(PathBuf),
    /// A snapshot that lacks this file at least.
    Partly {
        snapshot: PathBuf,
        missing: String,
    },
    None,
}

/// Looks for a model in the cache.
pub(super) fn find(hub: &Hub, name: &Name) -> Result<Found> {
    let folder = hub.folder(name);
    let commit = match folder::commit(&folder, name.revision())? {
        Some(commit) => commit,
        None if is_commit(name.revision()) => name.revision().to_string(),
        None => return Ok(Found::None),
    };
    let snapshot = folder.join("snapshots").join(commit);
    if snapshot.is_dir() { look(snapshot, name) } else { Ok(Found::None) }
}

/// Whether a snapshot holds all that `name` chooses of it.
pub(super) fn look(snapshot: PathBuf, name: &Name) -> Result<Found> {
    let mut names = BTreeSet::new();
    list(&snapshot, "", &mut names)?;
    let weights = Weights::among(&names, name)?;
    let missing = match &weights {
        None => Some(super::wanted(name)),
        Some(Weights::One(_)) => None,
        Some(Weights::Shards) => {
            let shards = folder::shards(&snapshot.join(INDEX))?;
            shards.into_iter().find(|shard| !names.contains(shard))
        }
        Some(Weights::Gguf(parts)) => missing_part(parts),
    };
    let configs = weights.as_ref().map_or(&[][..], Weights::configs);
    let missing = missing.or_else(|| {
        let none = !configs.iter().any(|config| names.contains(*config));
        configs.first().filter(|_| none).map(ToString::to_string)
    });
    Ok(match (missing, weights) {
        (Some(missing), _) => Found::Partly { snapshot, missing },
        (None, Some(Weights::Gguf(parts))) => {
            Found::Ready(parts.first().map_or(snapshot.clone(), |part| snapshot.join(part)))
        }
        (None, _) => Found::Ready(snapshot),
    })
}

/// The files below `folder`, as the hub names them. A link to a file that is not there is none, as while
/// it is being downloaded.
fn list(folder: &Path, below: &str, names: &mut BTreeSet<String>) -> Result<()> {
    for entry in std::fs::read_dir(folder).map_err(Error::io(folder))? {
        let entry = entry.map_err(Error::io(folder))?;
        let Ok(name) = entry.file_name().into_string() else { continue };
        let name = format!("{below}{name}");
        // Not through links: they could lead anywhere, and around in circles.
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            const DEEPEST: usize = 4;
            if name.matches('/').count() < DEEPEST {
                list(&entry.path(), &format!("{name}/"), names)?;
            }
        } else if entry.path().is_file() {
            names.insert(name);
        }
    }
    Ok(())
}
