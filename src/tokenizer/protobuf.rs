//! The wire format of protocol buffers, as far as SentencePiece's `tokenizer.model` uses it.
//!
//! A message is a row of fields: a number that says which field it is and of which kind, then the value. What a
//! value is (text, another message, a float) only the reader knows.

use super::failed;
use crate::error::Result;

/// The value of a field.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Value<'b> {
    /// Integers, booleans and enumerations.
    Varint(u64),
    Fixed32([u8; 4]),
    Fixed64([u8; 8]),
    /// Texts, byte strings and messages.
    Bytes(&'b [u8]),
}

/// The fields of a message, one after the other.
#[derive(Clone, Debug)]
pub(super) struct Fields<'b>(&'b [u8]);

impl<'b> Fields<'b> {
    pub(super) fn of(message: &'b [u8]) -> Self {
        Self(message)
    }

    fn field(&mut self) -> Option<(u64, Value<'b>)> {
        // The kind in the lowest three bits: 0b0001_1010 is field 3 of kind 2.
        let tag = self.varint()?;
        let value = match tag & 7 {
            0 => Value::Varint(self.varint()?),
            1 => Value::Fixed64(self.array()?),
            2 => {
                let length = self.varint()?.try_into().ok()?;
                let (bytes, rest) = self.0.split_at_checked(length)?;
                self.0 = rest;
                Value::Bytes(bytes)
            }
            5 => Value::Fixed32(self.array()?),
            _ => return None,
        };
        Some((tag >> 3, value))
    }

    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (array, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*array)
    }

    /// Seven bits a byte, the lowest first; the eighth says that another byte follows: `[0x96, 0x01]` is 150.
    fn varint(&mut self) -> Option<u64> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let [byte] = self.array()?;
            value |= u64::from(byte & 0x7f) << shift;
            if byte < 0x80 {
                return Some(value);
            }
        }
        None
    }
}

impl<'b> Iterator for Fields<'b> {
    type Item = Result<(u64, Value<'b>)>;

    fn next(&mut self) -> Option<Self::Item> {
        if self.0.is_empty() {
            return None;
        }
        let left = self.0.len();
        let field = self.field().ok_or_else(|| {
            // Nothing that follows can be read.
            self.0 = &[];
            failed(format!("not a protocol buffer {left} bytes before the end of a message"))
        });
        Some(field)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(message: &[u8]) -> Vec<std::result::Result<(u64, Value<'_>), String>> {
        Fields::of(message).map(|field| field.map_err(|error| error.to_string())).collect()
    }

    /// The examples of the format's own documentation.
    #[test]
    fn fields_are_read_as_the_documentation_writes_them() {
        assert_eq!(read(&[0x08, 0x96, 0x01]), [Ok((1, Value::Varint(150)))]);
        assert_eq!(read(b"\x12\x07testing"), [Ok((2, Value::Bytes(b"testing")))]);
        let inner = [0x1a, 0x03, 0x08, 0x96, 0x01];
        assert_eq!(read(&inner), [Ok((3, Value::Bytes(&[0x08, 0x96, 0x01])))]);
        let minus_two = [0x08, 0xfe, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01];
        assert_eq!(read(&minus_two), [Ok((1, Value::Varint((-2i64).cast_unsigned())))]);
        assert_eq!(read(&[0x15, 0, 0, 0x80, 0x3f]), [Ok((2, Value::Fixed32(1f32.to_le_bytes())))]);
        assert_eq!(
            read(&[9, 1, 2, 3, 4, 5, 6, 7, 8]),
            [Ok((1, Value::Fixed64([1, 2, 3, 4, 5, 6, 7, 8])))]
        );
    }

    #[test]
    fn what_ends_early_or_is_of_no_kind_ends_the_message() {
        for message in [
            &[0x08][..],
            &[0x08, 0x96],
            &[0x12, 0x02, 0x61],
            &[0x15, 0, 0, 0],
            &[0x0b],
            &[0x0e],
            &[0x12, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01, 0x61],
            &[0x08, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x01],
        ] {
            let fields = read(message);
            assert!(matches!(fields.as_slice(), [Err(_)]), "{message:x?}: {fields:?}");
        }
    }
}
