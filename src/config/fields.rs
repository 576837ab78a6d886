//! Typed access to the fields of a JSON object, with errors that name the field.

use serde_json::{Map, Value};

use crate::error::{Error, Result};

/// The fields of one JSON object. Unless said otherwise, `null` counts as absent.
#[derive(Clone, Debug)]
pub(crate) struct Fields(Map<String, Value>);

impl Fields {
    /// Parses `text`, the content of `file`.
    pub(crate) fn parse(text: &str, file: &str) -> Result<Self> {
        match serde_json::from_str(text) {
            Ok(Value::Object(object)) => Ok(Self(object)),
            Ok(other) => Err(Error::malformed(
                file,
                format!("expected a JSON object, got {}", brief(&other)),
            )),
            Err(error) => Err(Error::malformed(file, format!("not JSON: {error}"))),
        }
    }

    /// Whether the key is there at all, even if it is `null`.
    pub(crate) fn contains(&self, field: &str) -> bool {
        self.0.contains_key(field)
    }

    /// All fields, including those that are `null`.
    pub(crate) fn iter(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.0.iter().map(|(name, value)| (name.as_str(), value))
    }

    pub(crate) fn get(&self, field: &str) -> Option<&Value> {
        self.0.get(field).filter(|value| !value.is_null())
    }

    pub(crate) fn size(&self, field: &str) -> Result<Option<usize>> {
        self.typed(field, "a non-negative integer", |value| value.as_u64()?.try_into().ok())
    }

    pub(crate) fn required_size(&self, field: &str) -> Result<usize> {
        self.size(field)?.ok_or_else(|| Error::config(field, "a non-negative integer", "nothing"))
    }

    pub(crate) fn number(&self, field: &str) -> Result<Option<f64>> {
        self.typed(field, "a number", Value::as_f64)
    }

    pub(crate) fn flag(&self, field: &str) -> Result<Option<bool>> {
        self.typed(field, "true or false", Value::as_bool)
    }

    pub(crate) fn text(&self, field: &str) -> Result<Option<&str>> {
        self.typed(field, "a string", Value::as_str)
    }

    pub(crate) fn list(&self, field: &str) -> Result<Option<&Vec<Value>>> {
        self.typed(field, "a list", Value::as_array)
    }

    /// The object called `field`.
    pub(crate) fn object(&self, field: &str) -> Result<Option<Self>> {
        self.typed(field, "an object", |value| Some(Self(value.as_object()?.clone())))
    }

    /// A token id. A number that no token has (-1, as some write for none) is passed over with a warning.
    pub(crate) fn token(&self, field: &str) -> Result<Option<u32>> {
        let id = self.typed(field, "a token id", whole)?;
        Ok(id.and_then(|id| known(field, id)))
    }

    /// One token id, or a list of them; absent is no id. Numbers that no token has are passed over as in
    /// [`Fields::token`].
    pub(crate) fn tokens(&self, field: &str) -> Result<Vec<u32>> {
        let ids = self.typed(field, "a token id or a list of them", |value| match value {
            Value::Array(ids) => ids.iter().map(whole).collect(),
            id => whole(id).map(|id| vec![id]),
        })?;
        Ok(ids.into_iter().flatten().filter_map(|id| known(field, id)).collect())
    }

    /// The names of the fields that hold objects.
    pub(crate) fn nested(&self) -> impl Iterator<Item = &str> {
        self.0.iter().filter(|(_, value)| value.is_object()).map(|(name, _)| name.as_str())
    }

    fn typed<'a, T>(
        &'a self,
        field: &str,
        expected: &str,
        read: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        self.get(field)
            .map(|value| read(value).ok_or_else(|| Error::config(field, expected, brief(value))))
            .transpose()
    }
}

/// A whole number, however it is written. Every `u32` is one of `f64`.
fn whole(value: &Value) -> Option<f64> {
    value.as_f64().filter(|number| number.fract() == 0.0)
}

fn known(field: &str, id: f64) -> Option<u32> {
    let known = (0.0..=f64::from(u32::MAX)).contains(&id);
    if !known {
        tracing::warn!(field, id, "no token has this id: not used");
    }
    known.then_some(id as u32)
}

/// `value` in few enough words for an error message.
pub(crate) fn brief(value: &Value) -> String {
    const ROOM: usize = 60;
    let text = value.to_string();
    match text.char_indices().nth(ROOM) {
        Some((end, _)) => format!("{}…", text.get(..end).unwrap_or_default()),
        None => text,
    }
}
