//! What one rendering may take: bytes made, bytes read, and how large and deep one value may be.
//!
//! The fuel of minijinja counts instructions, and one instruction may copy or compare a value of any size.
//! So whatever makes or reads a value asks here first. All of it is counted, none of it is timed: a template
//! that renders on a fast machine renders on a slow one.

use std::fmt::{self, Write};
use std::sync::atomic::{AtomicU64, Ordering};

use minijinja::value::ValueKind;
use minijinja::{Error, ErrorKind, Value};

/// How deep values may be nested. What a chat hands in is nested three deep.
const DEPTH: usize = 64;

/// Bytes that an element of a list counts for, besides its own.
const ELEMENT: u64 = 32;

const MIB: u64 = 1 << 20;

/// A refusal, or an exception that the template raised, in words for the user.
#[derive(Debug)]
pub(super) struct Raised(pub(super) String);

impl fmt::Display for Raised {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Raised {}

/// The error that carries `message` through minijinja.
pub(super) fn raised(message: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, "raised").with_source(Raised(message.into()))
}

/// The budget of one rendering.
#[derive(Debug)]
pub(super) struct Budget {
    /// Bytes of the largest value.
    largest: u64,
    /// Bytes that may still be made.
    made: Left,
    /// Bytes that may still be read.
    read: Left,
}

#[derive(Debug)]
struct Left(AtomicU64);

impl Left {
    fn take(&self, bytes: u64) -> bool {
        let take = |left: u64| left.checked_sub(bytes);
        self.0.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_ok()
    }
}

impl Budget {
    /// For a chat of this many bytes.
    pub(super) fn new(chat: usize) -> Self {
        let chat = chat as u64;
        let room = |floor: u64, times: u64| floor + chat.saturating_mul(times);
        Self {
            largest: room(8 * MIB, 32),
            made: Left(AtomicU64::new(room(48 * MIB, 64))),
            read: Left(AtomicU64::new(room(256 * MIB, 256))),
        }
    }

    /// Whether one value may have so many bytes.
    pub(super) fn fits(&self, bytes: u64) -> Result<(), Error> {
        if bytes <= self.largest {
            return Ok(());
        }
        Err(raised(format!("it makes a value of more than {} bytes", self.largest)))
    }

    /// Asks to make a value of so many bytes.
    pub(super) fn make(&self, bytes: u64) -> Result<(), Error> {
        self.fits(bytes)?;
        if !self.made.take(bytes) {
            return Err(raised("it makes too many bytes on the way"));
        }
        Ok(())
    }

    /// Asks to read so many bytes.
    pub(super) fn read(&self, bytes: u64) -> Result<(), Error> {
        if self.read.take(bytes) {
            return Ok(());
        }
        Err(raised("it reads too many bytes on the way"))
    }

    /// Asks for `count` elements to be made.
    pub(super) fn elements(&self, count: usize) -> Result<(), Error> {
        self.make((count as u64).saturating_mul(ELEMENT))
    }

    /// Reads a text, but not what is in a list.
    pub(super) fn touch(&self, value: &Value) -> Result<(), Error> {
        self.read(value.as_str().map_or(0, |text| text.len() as u64))
    }

    /// Reads all of a value: the bytes that it would have written out, at the least.
    pub(super) fn look(&self, value: &Value) -> Result<u64, Error> {
        let mut bytes = 0;
        self.walk(value, 0, &mut bytes)?;
        Ok(bytes)
    }

    /// Asks to keep a value in another one. What is kept can neither grow nor come to hold itself later: so no
    /// namespace and no loop.
    pub(super) fn keep(&self, value: &Value) -> Result<u64, Error> {
        if mutable(value) {
            return Err(raised("it keeps a namespace or a loop in another value"));
        }
        let mut bytes = 0;
        self.walk(value, 1, &mut bytes)?;
        Ok(bytes)
    }

    fn walk(&self, value: &Value, depth: usize, bytes: &mut u64) -> Result<(), Error> {
        if depth > DEPTH {
            return Err(raised(format!("it nests values more than {DEPTH} deep")));
        }
        if depth > 0 && mutable(value) {
            return Err(raised("it keeps a namespace or a loop in another value"));
        }
        let own = ELEMENT + value.as_bytes().map_or(0, |text| text.len() as u64);
        self.read(own)?;
        *bytes += own;
        self.fits(*bytes)?;
        let Some(object) = value.as_object() else { return Ok(()) };
        let mut parts: Box<dyn Iterator<Item = Value>> = match value.kind() {
            ValueKind::Map => {
                let pairs = object.try_iter_pairs().into_iter().flatten();
                Box::new(pairs.flat_map(|(key, value)| [key, value]))
            }
            ValueKind::Seq | ValueKind::Iterable => {
                Box::new(object.try_iter().into_iter().flatten())
            }
            _ => return Ok(()),
        };
        parts.try_for_each(|part| self.walk(&part, depth + 1, bytes))
    }

    /// `value` as text, written until it is too long.
    pub(super) fn text(&self, arguments: fmt::Arguments<'_>) -> Result<String, Error> {
        let mut text = String::new();
        self.write(&mut text, arguments)?;
        Ok(text)
    }

    /// Writes until it is too long.
    pub(super) fn write(
        &self,
        out: &mut dyn Write,
        arguments: fmt::Arguments<'_>,
    ) -> Result<(), Error> {
        let mut metered = Metered { budget: self, out, written: 0, refused: None };
        let written = metered.write_fmt(arguments);
        match metered.refused {
            Some(refused) => Err(refused),
            None => written.map_err(Error::from),
        }
    }
}

/// Whether it can change, or holds what can.
fn mutable(value: &Value) -> bool {
    // Both types are private to minijinja. A test fails if they are renamed.
    let name = value.as_object().map_or("", |object| object.type_name());
    name.ends_with("::Namespace") || name.ends_with("::Loop")
}

/// A writer that asks before it writes.
struct Metered<'a> {
    budget: &'a Budget,
    out: &'a mut dyn Write,
    written: u64,
    refused: Option<Error>,
}

impl Write for Metered<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        let bytes = text.len() as u64;
        self.written += bytes;
        // The pieces are one value together.
        let asked = self.budget.make(bytes).and_then(|()| self.budget.fits(self.written));
        match asked {
            Ok(()) => self.out.write_str(text),
            Err(refused) => {
                self.refused = Some(refused);
                Err(fmt::Error)
            }
        }
    }
}
