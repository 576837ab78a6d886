//! What the user sees: errors with all their causes, files that were written, progress.

use std::error::Error;
use std::fs::File;
use std::io::{BufWriter, Write, stderr};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use indicatif::{ProgressBar, ProgressStyle};
use serde::de::DeserializeOwned;

/// Any error: all of them end on the terminal.
pub type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Runs a program's body; an error goes to standard error with all its causes, and the process fails.
pub fn main(body: impl FnOnce() -> Result<()>) -> ExitCode {
    let Err(error) = body() else { return ExitCode::SUCCESS };
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    say(&format!("error: {text}"));
    ExitCode::FAILURE
}

/// Prints a line on standard error, ignoring failures.
pub(crate) fn say(line: &str) {
    let _ = writeln!(stderr(), "{line}");
}

/// A bar on standard error; silent when that is not a terminal. It shows with its first update.
pub(crate) fn bar(length: u64, template: &str) -> ProgressBar {
    let style = ProgressStyle::with_template(template);
    ProgressBar::new(length).with_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()))
}

/// The content of a text file, which must be UTF-8.
pub(crate) fn read_text(path: &Path) -> Result<String> {
    Ok(std::fs::read_to_string(path).map_err(|error| format!("{}: {error}", path.display()))?)
}

/// The records of runs in a folder, in the order of their names; at least one.
pub(crate) fn records(folder: &Path) -> Result<Vec<PathBuf>> {
    let with_path = |error: std::io::Error| format!("{}: {error}", folder.display());
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(with_path)? {
        let path = entry.map_err(with_path)?.path();
        paths.extend(Some(path).filter(|path| path.extension().is_some_and(|it| it == "json")));
    }
    if paths.is_empty() {
        return Err(format!("{}: no records of runs", folder.display()).into());
    }
    paths.sort();
    Ok(paths)
}

/// What is written in a record.
pub(crate) fn read_record<T: DeserializeOwned>(path: &Path) -> Result<T> {
    let record = serde_json::from_str(&read_text(path)?);
    Ok(record.map_err(|error| format!("{}: {error}", path.display()))?)
}

/// Whether the file could be written there: checked before the work on its content.
///
/// # Errors
/// When its folder does not exist.
pub fn check_folder(path: &Path) -> Result<()> {
    let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty());
    match folder.is_none_or(Path::is_dir) {
        true => Ok(()),
        false => Err(format!("{}: its folder does not exist", path.display()).into()),
    }
}

/// Writes a file, and says so.
///
/// # Errors
/// When it cannot be written, and as `content`.
pub fn write(path: &Path, content: impl FnOnce(&mut BufWriter<File>) -> Result<()>) -> Result<()> {
    let with_path = |error: std::io::Error| format!("{}: {error}", path.display());
    let mut file = BufWriter::new(File::create(path).map_err(with_path)?);
    content(&mut file)?;
    file.flush().map_err(with_path)?;
    say(&format!("[wrote {}]", path.display()));
    Ok(())
}
