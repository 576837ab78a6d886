//! A repository of the Hugging Face hub, and the cache that `huggingface_hub` makes of it.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::{Result, fixture};

/// The repository that `tests/fixtures/hub/make_hub.py` has made.
pub(crate) struct Golden(pub(crate) Value);

impl Golden {
    pub(crate) fn read() -> Result<Self> {
        Ok(Self(serde_json::from_str(&fs::read_to_string(fixture("hub").join("hub.json"))?)?))
    }

    pub(crate) fn text(&self, name: &str) -> Result<&str> {
        Ok(self.0.get(name).and_then(Value::as_str).ok_or("not in hub.json")?)
    }

    /// Its files with their etags.
    pub(crate) fn files(&self) -> Result<BTreeMap<String, String>> {
        let files = self.0.get("files").and_then(Value::as_object).ok_or("no files")?;
        let etag = |file: &Value| Some(file.get("etag")?.as_str()?.to_string());
        files.iter().map(|(name, file)| Ok((name.clone(), etag(file).ok_or("etag")?))).collect()
    }

    /// What each path in the cache is: `-> target` for a link, the size of a file.
    pub(crate) fn cache(&self) -> Result<BTreeMap<String, String>> {
        let cache = self.0.get("cache").and_then(Value::as_object).ok_or("no cache")?;
        let entry = |value: &Value| match value.as_str() {
            Some(link) => link.to_string(),
            None => value.to_string(),
        };
        Ok(cache.iter().map(|(path, value)| (path.clone(), entry(value))).collect())
    }

    /// The folder of the repository in a cache.
    pub(crate) fn folder(&self, cache: &Path) -> Result<PathBuf> {
        Ok(cache.join(format!("models--{}", self.text("repo")?.replace('/', "--"))))
    }

    /// The snapshot in a cache.
    pub(crate) fn snapshot(&self, cache: &Path) -> Result<PathBuf> {
        Ok(self.folder(cache)?.join("snapshots").join(self.text("commit")?))
    }
}

/// What one of the files contains.
pub(crate) fn content(file: &str) -> Result<Vec<u8>> {
    let beside = fixture("hub").join(file);
    let path = if beside.is_file() { beside } else { fixture("tied_sharded").join(file) };
    Ok(fs::read(path)?)
}

/// The cache as `huggingface_hub` writes it, its links included.
#[cfg(unix)]
pub(crate) fn write_cache(golden: &Golden, cache: &Path) -> Result {
    let mut of_blob = BTreeMap::new();
    for (file, etag) in golden.files()? {
        of_blob.insert(etag, content(&file)?);
    }
    for (path, entry) in golden.cache()? {
        let path = cache.join(path);
        fs::create_dir_all(path.parent().ok_or("no parent")?)?;
        match entry.strip_prefix("-> ") {
            Some(target) => std::os::unix::fs::symlink(target, &path)?,
            None => {
                let etag = path.file_name().and_then(|name| name.to_str()).ok_or("no name")?;
                fs::write(&path, of_blob.get(etag).ok_or("a blob of no file")?)?;
            }
        }
    }
    write_reference(golden, cache, "main")
}

/// Makes `revision` stand for the commit.
pub(crate) fn write_reference(golden: &Golden, cache: &Path, revision: &str) -> Result {
    let path = golden.folder(cache)?.join("refs").join(revision);
    fs::create_dir_all(path.parent().ok_or("no parent")?)?;
    Ok(fs::write(path, golden.text("commit")?)?)
}

/// What a cache looks like, in the words of [`Golden::cache`].
pub(crate) fn describe(cache: &Path) -> Result<BTreeMap<String, String>> {
    fn walk(root: &Path, folder: &Path, found: &mut BTreeMap<String, String>) -> Result {
        for entry in fs::read_dir(folder)? {
            let path = entry?.path();
            let name = path.strip_prefix(root)?.to_string_lossy().replace('\\', "/");
            if let Ok(target) = fs::read_link(&path) {
                found.insert(name, format!("-> {}", target.display()));
            } else if path.is_dir() {
                walk(root, &path, found)?;
            } else {
                found.insert(name, path.metadata()?.len().to_string());
            }
        }
        Ok(())
    }
    let mut found = BTreeMap::new();
    walk(cache, cache, &mut found)?;
    Ok(found)
}
