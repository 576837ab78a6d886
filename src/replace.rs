//! Files that are there whole or not at all.

use std::ffi::OsString;
use std::fs;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::process;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::error::{Error, Result};

/// Replaces a file atomically: it is written under another name first.
pub(crate) fn replace(path: &Path, content: &[u8]) -> Result<()> {
    let part = unique(path, "part");
    let write = || {
        let mut file = fs::File::create(&part)?;
        file.write_all(content)?;
        file.sync_all()?; // otherwise a crash might leave the new name without content
        fs::rename(&part, path)
    };
    write().map_err(|error| {
        fs::remove_file(&part).ok();
        Error::io(path)(error)
    })
}

/// Gives a file that was written and synced under another name its own.
pub(crate) fn finish(part: &Path, path: &Path) -> Result<()> {
    fs::rename(part, path).map_err(Error::io(path))
}

/// Makes a file whole, unless there is one, which stays as it is.
pub(crate) fn create(path: &Path, content: &[u8]) -> Result<()> {
    if path.try_exists().map_err(Error::io(path))? {
        return Ok(());
    }
    let made = &unique(path, "new");
    replace(made, content)?;
    // Unlike renaming, this leaves what somebody else has made there since; but not every disk knows links.
    let named = match fs::hard_link(made, path) {
        Err(error) if error.kind() != ErrorKind::AlreadyExists => fs::rename(made, path),
        _ => Ok(()),
    };
    fs::remove_file(made).ok();
    named.map_err(Error::io(path))
}

/// A path beside `path` that no other thread and no other process that runs now is given. One that has ended
/// may have left a file there.
///
/// ```text
/// refs/main -> refs/main.4711-0.part
/// ```
pub(crate) fn unique(path: &Path, ending: &str) -> PathBuf {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    let (process, number) = (process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    appended(path, &format!(".{process}-{number}.{ending}"))
}

/// `path` with `ending` behind its name, other endings left as they are.
pub(crate) fn appended(path: &Path, ending: &str) -> PathBuf {
    let mut path = OsString::from(path);
    path.push(ending);
    path.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_there_first_stays() -> Result<()> {
        let folder = tempfile::tempdir().map_err(Error::io("."))?;
        let path = folder.path().join("file");
        let contents: Vec<_> = (0..8_u8).map(|it| vec![it; 1 << 12]).collect();
        let read = || fs::read(&path).map_err(Error::io(&path));
        let make = |content: &Vec<u8>| create(&path, content).and_then(|()| read());
        let seen = std::thread::scope(|scope| {
            let threads: Vec<_> =
                contents.iter().map(|content| scope.spawn(move || make(content))).collect();
            let seen = threads.into_iter().map(|thread| thread.join().unwrap_or(Ok(Vec::new())));
            seen.collect::<Result<Vec<_>>>()
        })?;
        assert!(seen.iter().all(|it| *it == seen[0]) && contents.contains(&seen[0]));
        create(&path, b"more")?;
        assert_eq!(read()?, seen[0]);
        assert_eq!(fs::read_dir(folder.path()).map_err(Error::io(folder.path()))?.count(), 1);
        Ok(())
    }

    #[test]
    fn many_at_once_leave_the_content_of_one_and_nothing_else() -> Result<()> {
        let folder = tempfile::tempdir().map_err(Error::io("."))?;
        let path = folder.path().join("file");
        let contents: Vec<_> = (0..8_u8).map(|it| vec![it; 1 << 16]).collect();
        let again = |content: &Vec<u8>| (0..50).try_for_each(|_| replace(&path, content));
        std::thread::scope(|scope| {
            let threads: Vec<_> =
                contents.iter().map(|content| scope.spawn(|| again(content))).collect();
            threads.into_iter().try_for_each(|thread| thread.join().unwrap_or(Ok(())))
        })?;
        assert!(contents.contains(&fs::read(&path).map_err(Error::io(&path))?));
        assert_eq!(fs::read_dir(folder.path()).map_err(Error::io(folder.path()))?.count(), 1);
        Ok(())
    }
}
