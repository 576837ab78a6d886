//! One JSON object that is about two things.

use std::fmt;
use std::marker::PhantomData;

use serde::de::value::MapAccessDeserializer;
use serde::de::{DeserializeSeed, Error, IntoDeserializer, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use serde_json::Value;

/// The object in `text`, without the value at `key`, as a `T`; and that value.
pub(crate) fn read<'de, T: Deserialize<'de>>(
    text: &'de str,
    key: &'static str,
) -> serde_json::Result<(T, Option<Value>)> {
    let mut json = serde_json::Deserializer::from_str(text);
    let read = (&mut json).deserialize_map(Apart { key, rest: PhantomData })?;
    json.end()?;
    Ok(read)
}

struct Apart<T> {
    key: &'static str,
    rest: PhantomData<T>,
}

impl<'de, T: Deserialize<'de>> Visitor<'de> for Apart<T> {
    type Value = (T, Option<Value>);

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "a JSON object")
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Self::Value, A::Error> {
        let mut apart = None;
        let rest = Rest { map, key: self.key, apart: &mut apart };
        Ok((T::deserialize(MapAccessDeserializer::new(rest))?, apart))
    }
}

/// The object's other members.
struct Rest<'a, A> {
    map: A,
    key: &'static str,
    apart: &'a mut Option<Value>,
}

impl<'de, A: MapAccess<'de>> MapAccess<'de> for Rest<'_, A> {
    type Error = A::Error;

    fn next_key_seed<K: DeserializeSeed<'de>>(
        &mut self,
        seed: K,
    ) -> Result<Option<K::Value>, A::Error> {
        while let Some(key) = self.map.next_key::<String>()? {
            if key != self.key {
                return seed.deserialize(key.into_deserializer()).map(Some);
            }
            if self.apart.replace(self.map.next_value()?).is_some() {
                return Err(A::Error::duplicate_field(self.key));
            }
        }
        Ok(None)
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, A::Error> {
        self.map.next_value_seed(seed)
    }
}
