//! Downloads into the cache, laid out as `huggingface_hub` does, so that either finds what the other fetched.

use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use super::checksum::Checksum;
use super::client::{Client, Patience, Remote, Trouble, retry};
use super::files::{INDEX, Weights, is_beside};
use super::name::Name;
use super::settings::Hub;
use super::snapshot::{self, Found};
use super::{Fetched, wanted};
use crate::error::{Error, Result};
use crate::load::folder;
use crate::replace::{appended, replace};

/// Downloads what `name` chooses, and returns where it is. The weights come last, so that a snapshot with
/// all weights has everything else, too.
pub(super) fn download(
    hub: &Hub,
    name: &Name,
    progress: impl FnMut(Fetched<'_>),
) -> Result<PathBuf> {
    let client = Client::new(hub)?;
    let listing = client.list(name)?;
    let Some(weights) = Weights::among(&listing.files, name)? else {
        return Err(nothing_to_read(name, listing.files.iter()));
    };
    let repo = hub.folder(name);
    let locks = hub.cache_folder().join(".locks").join(name.folder());
    let snapshot = repo.join("snapshots").join(&listing.commit);
    for folder in [&locks, &repo.join("blobs"), &snapshot] {
        fs::create_dir_all(folder).map_err(Error::io(folder))?;
    }
    let reference = Reference { repo: &repo, revision: name.revision(), commit: &listing.commit };
    // A revision that is there already stays where it is until the new snapshot is whole.
    if folder::commit(&repo, name.revision())?.is_none() {
        reference.write()?;
    }

    let commit = listing.commit.as_str();
    let mut session =
        Session { client, name, commit, repo: &repo, locks, done: 0, total: 0, progress };
    let beside: Vec<_> = listing.files.iter().filter(|it| is_beside(it, &weights)).collect();
    session.fetch(beside)?;
    match &weights {
        Weights::One(file) => session.fetch([&file.to_string()])?,
        Weights::Gguf(parts) => session.fetch(parts)?,
        Weights::Shards => {
            let shards = folder::shards(&snapshot.join(INDEX))?;
            session.fetch(&shards)?;
        }
    }
    reference.write()?;
    match snapshot::look(snapshot, name)? {
        Found::Ready(path) => Ok(path),
        Found::Partly { missing, .. } => Err(lacks(name, &missing)),
        Found::None => Err(lacks(name, &wanted(name))),
    }
}

/// The error for a repository without weights that this crate reads.
fn nothing_to_read<'a>(name: &Name, mut files: impl Iterator<Item = &'a String>) -> Error {
    let pickled = files.find(|file| [".bin", ".pth", ".pt"].iter().any(|it| file.ends_with(it)));
    match pickled {
        Some(file) => {
            let got = format!("{file}, but neither safetensors nor GGUF in {}", name.repo());
            Error::unsupported("weights", got)
        }
        None => lacks(name, &wanted(name)),
    }
}

fn lacks(name: &Name, missing: &str) -> Error {
    let (url, message) = (name.repo().to_string(), format!("the repository lacks {missing}"));
    Error::BadAnswer { url, message }
}

/// The commit that a revision stands for, in the cache.
struct Reference<'a> {
    repo: &'a Path,
    revision: &'a str,
    commit: &'a str,
}

impl Reference<'_> {
    /// Writes it in one step, unless it is there or the revision is the commit itself.
    fn write(&self) -> Result<()> {
        let known = folder::commit(self.repo, self.revision)?;
        if self.revision == self.commit || known.as_deref() == Some(self.commit) {
            return Ok(());
        }
        let path = self.repo.join("refs").join(self.revision);
        let folder = path.parent().unwrap_or(&path);
        fs::create_dir_all(folder).map_err(Error::io(folder))?;
        replace(&path, self.commit.as_bytes())
    }
}

/// A download of several files of one commit.
struct Session<'a, P> {
    client: Client,
    name: &'a Name,
    commit: &'a str,
    repo: &'a Path,
    locks: PathBuf,
    done: u64,
    total: u64,
    progress: P,
}

impl<P: FnMut(Fetched<'_>)> Session<'_, P> {
    /// Downloads those of these files that are not there.
    fn fetch<'f>(&mut self, files: impl IntoIterator<Item = &'f String>) -> Result<()> {
        let mut remotes = Vec::new();
        for file in files {
            let pointer = self.pointer(file);
            if !pointer.is_file() {
                let head = || self.client.head(self.name, self.commit, file);
                let remote = retry(self.name.repo(), head)?;
                self.total = self.total.saturating_add(remote.size);
                remotes.push((file, pointer, remote));
            }
        }
        for (file, pointer, remote) in remotes {
            let before = self.done;
            let blob = self.blob(file, &remote)?;
            link(&blob, &pointer, file)?;
            self.done = before.saturating_add(remote.size);
            self.report(file, self.done);
        }
        Ok(())
    }

    fn pointer(&self, file: &str) -> PathBuf {
        self.repo.join("snapshots").join(self.commit).join(file)
    }

    fn report(&mut self, file: &str, done: u64) {
        (self.progress)(Fetched { file, done, total: self.total });
    }

    /// The content of a file, downloaded unless it is there. Other processes wait meanwhile.
    fn blob(&mut self, file: &str, remote: &Remote) -> Result<PathBuf> {
        let blob = self.repo.join("blobs").join(&remote.etag);
        let is_whole = || fs::metadata(&blob).is_ok_and(|it| it.len() == remote.size);
        if is_whole() {
            return Ok(blob);
        }
        let path = self.locks.join(format!("{}.lock", remote.etag));
        let lock = File::create(&path).map_err(Error::io(&path))?;
        let locked = match lock.try_lock() {
            Err(TryLockError::WouldBlock) => {
                tracing::warn!(file, lock = %path.display(), "waiting for another process's download");
                lock.lock()
            }
            Err(TryLockError::Error(error)) => Err(error),
            Ok(()) => Ok(()),
        };
        if let Err(error) = locked {
            // As on some network shares. Two at once would spoil the file, which its checksum finds.
            tracing::warn!(%error, lock = %path.display(), "downloading without a lock");
        }
        if !is_whole() {
            if blob.is_file() && !Checksum::new(&remote.etag, remote.size).is_known() {
                let message = "the etag is that of another file, too".to_string();
                return Err(Error::BadAnswer { url: remote.url.clone(), message });
            }
            let partial = appended(&blob, ".incomplete");
            self.content(file, remote, &partial)?;
            fs::rename(&partial, &blob).map_err(Error::io(&blob))?;
        }
        Ok(blob)
    }

    /// Downloads into `partial`, from where it ends on, until it is whole and right.
    fn content(&mut self, file: &str, remote: &Remote, partial: &Path) -> Result<()> {
        let mut writer = Partial::open(partial, remote)?;
        let mut patience = Patience::default();
        let mut remote = remote.clone();
        while writer.len < remote.size {
            let before = writer.len;
            if let Err(trouble) = self.rest(file, &remote, &mut writer) {
                if writer.len > before {
                    patience.renew();
                }
                patience.wait(&remote.url, trouble)?;
                let head = || self.client.head(self.name, self.commit, file);
                let now = retry(&remote.url, head)?;
                if (&now.etag, now.size) != (&remote.etag, remote.size) {
                    let message = "the file changed while it was downloaded".to_string();
                    return Err(Error::BadAnswer { url: remote.url, message });
                }
                remote = now;
            }
        }
        writer.finish(&remote)
    }

    /// One request for what is missing.
    fn rest(&mut self, file: &str, remote: &Remote, writer: &mut Partial) -> Result<(), Trouble> {
        let (continued, mut body) = self.client.content(remote, self.name, writer.len)?;
        if !continued {
            writer.restart(remote)?;
        }
        let mut reader = body.as_reader();
        let mut buffer = vec![0; 1 << 17];
        while writer.len < remote.size {
            let count = reader.read(&mut buffer);
            let count = count.map_err(|error| Trouble::Passing(error.to_string()))?;
            let bytes = buffer.get(..count).unwrap_or_default();
            if bytes.is_empty() {
                let message = format!("it ended after {} of {} bytes", writer.len, remote.size);
                return Err(Trouble::Passing(message));
            }
            let room = usize::try_from(remote.size - writer.len).unwrap_or(usize::MAX);
            if bytes.len() > room {
                let message = format!("it goes on after its {} bytes", remote.size);
                return Err(Error::BadAnswer { url: remote.url.clone(), message }.into());
            }
            writer.add(bytes)?;
            self.report(file, self.done.saturating_add(writer.len));
        }
        Ok(())
    }
}

/// A file that is being downloaded.
struct Partial {
    path: PathBuf,
    file: File,
    len: u64,
    sum: Checksum,
}

impl Partial {
    /// Takes up what is there, unless it is more than there can be.
    fn open(path: &Path, remote: &Remote) -> Result<Self> {
        let file = OpenOptions::new().read(true).append(true).create(true).open(path);
        let file = file.map_err(Error::io(path))?;
        let sum = Checksum::new(&remote.etag, remote.size);
        let mut partial = Self { path: path.to_path_buf(), file, len: 0, sum };
        let there = partial.file.metadata().map_err(Error::io(path))?.len();
        if there > remote.size {
            partial.restart(remote)?;
        } else if there > 0 {
            let mut buffer = vec![0; 1 << 17];
            loop {
                let count = partial.file.read(&mut buffer).map_err(Error::io(path))?;
                let Some(bytes) = buffer.get(..count).filter(|it| !it.is_empty()) else { break };
                partial.sum.update(bytes);
                partial.len += bytes.len() as u64;
            }
        }
        Ok(partial)
    }

    fn restart(&mut self, remote: &Remote) -> Result<()> {
        self.file.set_len(0).map_err(Error::io(&self.path))?;
        self.file.seek(SeekFrom::Start(0)).map_err(Error::io(&self.path))?;
        (self.len, self.sum) = (0, Checksum::new(&remote.etag, remote.size));
        Ok(())
    }

    fn add(&mut self, bytes: &[u8]) -> Result<()> {
        self.file.write_all(bytes).map_err(Error::io(&self.path))?;
        self.sum.update(bytes);
        self.len += bytes.len() as u64;
        Ok(())
    }

    /// Checks the whole, and removes it if it is wrong.
    fn finish(self, remote: &Remote) -> Result<()> {
        self.file.sync_data().map_err(Error::io(&self.path))?;
        if !self.sum.is_known() {
            let (url, etag) = (&remote.url, &remote.etag);
            tracing::warn!(url, etag, "not checked: the etag is no checksum");
        }
        let Some(got) = self.sum.difference() else { return Ok(()) };
        fs::remove_file(&self.path).map_err(Error::io(&self.path))?;
        let (url, expected) = (remote.url.clone(), remote.etag.clone());
        Err(Error::Checksum { url, expected, got })
    }
}

/// Makes `pointer`, which the repository calls `file`, lead to `blob`.
///
/// ```text
/// snapshots/0123abc/config.json             ../../blobs/4567def
/// snapshots/0123abc/1_Pooling/config.json   ../../../blobs/89abcde
/// ```
fn link(blob: &Path, pointer: &Path, file: &str) -> Result<()> {
    let folder = pointer.parent().unwrap_or(pointer);
    fs::create_dir_all(folder).map_err(Error::io(folder))?;
    if pointer.is_file() {
        return Ok(()); // by another process
    }
    if pointer.is_symlink() {
        fs::remove_file(pointer).map_err(Error::io(pointer))?; // its blob is gone
    }
    let up = "../".repeat(file.matches('/').count() + 2);
    let name = blob.file_name().unwrap_or_default();
    let target = Path::new(&up).join("blobs").join(name);
    match symlink(&target, pointer) {
        Ok(()) => Ok(()),
        Err(_) if pointer.is_file() => Ok(()),
        // Where there are no links the file itself takes its place, as with `huggingface_hub`.
        Err(_) => fs::rename(blob, pointer).map_err(Error::io(pointer)),
    }
}

#[cfg(unix)]
use std::os::unix::fs::symlink;
#[cfg(windows)]
use std::os::windows::fs::symlink_file as symlink;

#[cfg(not(any(unix, windows)))]
fn symlink(_target: &Path, _link: &Path) -> std::io::Result<()> {
    Err(std::io::ErrorKind::Unsupported.into())
}
