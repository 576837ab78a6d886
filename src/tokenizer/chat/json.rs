//! The filter `tojson`, as transformers has it.

use std::io;

use minijinja::value::{Kwargs, Rest};
use minijinja::{Error, ErrorKind, Value};
use serde::Serialize;
use serde_json::ser::{CompactFormatter, Formatter, PrettyFormatter};

use super::budget::Budget;

/// JSON as Python's `json.dumps(value, ensure_ascii=False, indent=indent)` writes it. The filter
/// that comes with minijinja escapes what is special in HTML.
pub(super) fn to_json(
    budget: &Budget,
    value: &Value,
    positional: Rest<Value>,
    options: Kwargs,
) -> Result<Value, Error> {
    let ensure_ascii = positional.first().cloned().or(options.get("ensure_ascii")?);
    let indent = positional.get(1).cloned().or(options.get("indent")?).filter(|v| !v.is_none());
    options.assert_all_used()?;
    if positional.len() > 2 || ensure_ascii.is_some_and(|v| v.is_true()) {
        let message = "tojson takes ensure_ascii=false and indent only";
        return Err(Error::new(ErrorKind::InvalidOperation, message));
    }
    // Before serde walks into it.
    budget.look(value)?;
    match indent {
        None => write_json(budget, value, Spaced),
        Some(indent) => {
            // At most what a page is wide, so that a template cannot ask for gigabytes.
            let indent = " ".repeat(usize::try_from(indent)?.min(80));
            write_json(budget, value, PrettyFormatter::with_indent(indent.as_bytes()))
        }
    }
}

fn write_json(budget: &Budget, value: &Value, formatter: impl Formatter) -> Result<Value, Error> {
    let mut json = Metered { budget, json: Vec::new(), refused: None };
    let written =
        value.serialize(&mut serde_json::Serializer::with_formatter(&mut json, formatter));
    if let Some(refused) = json.refused {
        return Err(refused);
    }
    written
        .map_err(|error| Error::new(ErrorKind::BadSerialization, "tojson").with_source(error))?;
    Ok(Value::from(String::from_utf8_lossy(&json.json).into_owned()))
}

/// JSON that is written until it is too long.
struct Metered<'a> {
    budget: &'a Budget,
    json: Vec<u8>,
    refused: Option<Error>,
}

impl io::Write for Metered<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        // One value in pieces: all of it at the first piece above what one may have.
        let whole = self.json.len() + bytes.len();
        let asked = self.budget.make(bytes.len() as u64);
        let asked = asked.and_then(|()| self.budget.fits(whole as u64));
        match asked {
            Ok(()) => {
                self.json.extend_from_slice(bytes);
                Ok(bytes.len())
            }
            Err(refused) => {
                self.refused = Some(refused);
                Err(io::ErrorKind::FileTooLarge.into())
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// JSON on one line with a space after each comma and colon: `{"a": [1, 2]}`.
struct Spaced;

impl Formatter for Spaced {
    fn begin_array_value<W: ?Sized + io::Write>(
        &mut self,
        w: &mut W,
        first: bool,
    ) -> io::Result<()> {
        if first { Ok(()) } else { w.write_all(b", ") }
    }

    fn begin_object_key<W: ?Sized + io::Write>(
        &mut self,
        w: &mut W,
        first: bool,
    ) -> io::Result<()> {
        if first { Ok(()) } else { w.write_all(b", ") }
    }

    fn begin_object_value<W: ?Sized + io::Write>(&mut self, w: &mut W) -> io::Result<()> {
        CompactFormatter.begin_object_value(w)?;
        w.write_all(b" ")
    }
}
