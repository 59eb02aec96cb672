//! A check for JSON (RFC 8259) that `serde_json` can read and that has no duplicate keys.

use std::borrow::Cow;
use std::collections::HashSet;
use std::fmt;

use serde::de::{DeserializeSeed, Error, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};

use super::malformed::Malformed;

/// Checks that `bytes` are one JSON text that `serde_json` can read: its depth, its numbers in the range of 64-bit
/// floats, no lone surrogates.
pub(super) fn check(bytes: &[u8]) -> Result<(), Malformed> {
    let mut deserializer = serde_json::Deserializer::from_slice(bytes);
    AnyValue.deserialize(&mut deserializer).and_then(|()| deserializer.end()).map_err(|error| {
        let text = error.to_string();
        // The position is returned as an offset instead.
        let reason = text.split(" at line ").next().unwrap_or(&text);
        // serde_json reports the end as the byte before it.
        let offset = if error.is_eof() { bytes.len() } else { offset_of(bytes, error.line(), error.column()) };
        Malformed::new(offset, reason)
    })
}

/// The offset of a position. Lines and columns count from 1, columns in bytes.
fn offset_of(bytes: &[u8], line: usize, column: usize) -> usize {
    let before: usize =
        bytes.split_inclusive(|byte| *byte == b'\n').take(line.saturating_sub(1)).map(<[u8]>::len).sum();
    before + column.saturating_sub(1)
}

/// Reads any value and keeps nothing.
struct AnyValue;

/// A key, copied only if it has escapes.
#[derive(Deserialize, PartialEq, Eq, Hash)]
#[serde(transparent)]
struct Key<'a>(#[serde(borrow)] Cow<'a, str>);

impl<'de> DeserializeSeed<'de> for AnyValue {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for AnyValue {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a value")
    }

    fn visit_unit<E: Error>(self) -> Result<(), E> {
        Ok(())
    }

    fn visit_bool<E: Error>(self, _: bool) -> Result<(), E> {
        Ok(())
    }

    fn visit_i64<E: Error>(self, _: i64) -> Result<(), E> {
        Ok(())
    }

    fn visit_u64<E: Error>(self, _: u64) -> Result<(), E> {
        Ok(())
    }

    fn visit_f64<E: Error>(self, _: f64) -> Result<(), E> {
        Ok(())
    }

    fn visit_str<E: Error>(self, _: &str) -> Result<(), E> {
        Ok(())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<(), A::Error> {
        while access.next_element_seed(AnyValue)?.is_some() {}
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<(), A::Error> {
        let mut keys = HashSet::new();
        while let Some(key) = access.next_key::<Key>()? {
            if !keys.insert(key) {
                // The key is part of the contents, which an error must not show.
                return Err(A::Error::custom("a key of a map comes twice"));
            }
            access.next_value_seed(AnyValue)?;
        }
        Ok(())
    }
}
