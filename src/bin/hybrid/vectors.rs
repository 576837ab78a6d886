//! Vectors in a file, written as they come, each at its place: a large corpus need not fit in memory.

use std::fs::{self, File};
use std::io::{BufWriter, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use serde_json::json;

use crate::terminal::Result;

/// How the file begins; after that both hold the numbers alone, `f32` row after row, little-endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Format {
    /// With one tensor, `vectors`.
    Safetensors,
    /// NumPy's.
    Npy,
}

impl Format {
    fn of(path: &Path) -> Result<Self> {
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("safetensors") => Ok(Self::Safetensors),
            Some("npy") => Ok(Self::Npy),
            _ => Err(format!(
                "{}: expected a name that ends in .safetensors or .npy",
                path.display()
            )
            .into()),
        }
    }

    /// What comes before the numbers.
    fn header(self, rows: usize, columns: usize) -> Vec<u8> {
        match self {
            Self::Safetensors => {
                let end = rows as u64 * columns as u64 * 4;
                let json = json!({ "vectors": {
                    "dtype": "F32", "shape": [rows, columns], "data_offsets": [0, end],
                } });
                let json = json.to_string();
                let length = json.len().next_multiple_of(8); // so that the numbers are aligned
                let json = format!("{json:length$}");
                [&(json.len() as u64).to_le_bytes(), json.as_bytes()].concat()
            }
            Self::Npy => {
                let shape = format!("({rows}, {columns})");
                let dict =
                    format!("{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}");
                // Magic, version and length are 10 bytes; with a line feed at its end, all of it is a multiple
                // of 64.
                let length = (10 + dict.len() + 1).next_multiple_of(64) - 10;
                let dict = format!("{dict:0$}\n", length - 1);
                let length = u16::try_from(length).unwrap_or(u16::MAX); // of two numbers: below 128
                [b"\x93NUMPY\x01\x00", &length.to_le_bytes()[..], dict.as_bytes()].concat()
            }
        }
    }
}

/// A file of vectors in the making. It has its name once it is complete; until then it is `NAME.part`, which is
/// removed if it never will be.
pub(crate) struct VectorFile {
    path: PathBuf,
    part: PathBuf,
    file: BufWriter<File>,
    header: u64,
    columns: usize,
    /// The row at which the file stands.
    at: usize,
    complete: bool,
}

impl VectorFile {
    /// Whether a file of this name could be written: checked before the work on its content.
    pub(crate) fn check(path: &Path) -> Result<()> {
        Format::of(path)?;
        crate::files::check_folder(path)
    }

    pub(crate) fn new(path: &Path, rows: usize, columns: usize) -> Result<Self> {
        let header = Format::of(path)?.header(rows, columns);
        let mut part = path.as_os_str().to_owned();
        part.push(".part");
        let part = PathBuf::from(part);
        let file = File::create(&part).map_err(|error| format!("{}: {error}", part.display()))?;
        let mut this = Self {
            path: path.to_owned(),
            part,
            file: BufWriter::with_capacity(1 << 20, file),
            header: header.len() as u64,
            columns,
            at: 0,
            complete: false,
        };
        this.named(|this| this.file.write_all(&header))?;
        Ok(this)
    }

    /// Writes one row.
    pub(crate) fn write(&mut self, row: usize, vector: &[f32]) -> Result<()> {
        if vector.len() != self.columns {
            let (expected, got) = (self.columns, vector.len());
            return Err(format!("a vector of {got} numbers, where all have {expected}").into());
        }
        self.named(|this| {
            if row != this.at {
                let bytes = row as u64 * this.columns as u64 * 4;
                this.file.seek(SeekFrom::Start(this.header + bytes))?;
            }
            for value in vector {
                this.file.write_all(&value.to_le_bytes())?;
            }
            this.at = row + 1;
            Ok(())
        })
    }

    /// Gives the file its name, once all rows are written.
    pub(crate) fn finish(mut self) -> Result<()> {
        self.named(|this| {
            this.file.flush()?;
            this.file.get_ref().sync_all()?;
            fs::rename(&this.part, &this.path)
        })?;
        self.complete = true;
        crate::terminal::say(&format!("[wrote {}]", self.path.display()));
        Ok(())
    }

    fn named(&mut self, write: impl FnOnce(&mut Self) -> std::io::Result<()>) -> Result<()> {
        write(self).map_err(|error| format!("{}: {error}", self.path.display()).into())
    }
}

impl Drop for VectorFile {
    fn drop(&mut self) {
        if !self.complete {
            let _ = fs::remove_file(&self.part);
        }
    }
}
