//! Files that the user names.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use crate::terminal::{Result, say};

/// The content of a text file, which must be UTF-8.
pub(crate) fn read_text(path: &Path) -> Result<String> {
    let bytes = std::fs::read(path).map_err(|error| format!("{}: {error}", path.display()))?;
    let text = String::from_utf8(bytes).map_err(|error| {
        let at = error.utf8_error().valid_up_to();
        format!("{}: not UTF-8 at byte {at}", path.display())
    })?;
    Ok(text)
}

/// Whether the file could be written there: checked before the work on its content.
pub(crate) fn check_folder(path: &Path) -> Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    match folder.is_none_or(Path::is_dir) {
        true => Ok(()),
        false => Err(format!("{}: its folder does not exist", path.display()).into()),
    }
}

/// Writes a file, and says so.
pub(crate) fn write(
    path: &Path,
    content: impl FnOnce(&mut BufWriter<File>) -> Result<()>,
) -> Result<()> {
    let with_path = |error: std::io::Error| format!("{}: {error}", path.display());
    let mut file = BufWriter::new(File::create(path).map_err(with_path)?);
    content(&mut file)?;
    file.flush().map_err(with_path)?;
    say(&format!("[wrote {}]", path.display()));
    Ok(())
}
