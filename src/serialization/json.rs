//! JSON (RFC 8259) as `serde_json` reads it, with no key twice.

use std::borrow::Cow;
use std::collections::HashSet;
use std::fmt;

use serde::de::{DeserializeSeed, Error, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Deserializer};

use super::malformed::Malformed;

/// Checks that `bytes` are one text that `serde_json` reads: its depth, its numbers within those of 64-bit floats, no lone
/// surrogates.
pub(super) fn check(bytes: &[u8]) -> Result<(), Malformed> {
    let mut deserializer = serde_json::Deserializer::from_slice(bytes);
    Whatever.deserialize(&mut deserializer).and_then(|()| deserializer.end()).map_err(|error| {
        let text = error.to_string();
        // The place follows as an offset.
        let reason = text.split(" at line ").next().unwrap_or(&text);
        // serde_json counts the end as the byte before it.
        let offset = if error.is_eof() { bytes.len() } else { offset_of(bytes, error.line(), error.column()) };
        Malformed::new(offset, reason)
    })
}

/// Lines and columns count from 1, columns in bytes.
fn offset_of(bytes: &[u8], line: usize, column: usize) -> usize {
    let before: usize =
        bytes.split_inclusive(|byte| *byte == b'\n').take(line.saturating_sub(1)).map(<[u8]>::len).sum();
    before + column.saturating_sub(1)
}

/// Any value, of which nothing is kept.
struct Whatever;

/// Copied only where it has escapes.
#[derive(Deserialize, PartialEq, Eq, Hash)]
#[serde(transparent)]
struct Key<'a>(#[serde(borrow)] Cow<'a, str>);

impl<'de> DeserializeSeed<'de> for Whatever {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Whatever {
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
        while access.next_element_seed(Whatever)?.is_some() {}
        Ok(())
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<(), A::Error> {
        let mut keys = HashSet::new();
        while let Some(key) = access.next_key::<Key>()? {
            if !keys.insert(key) {
                // Which one is part of the contents, which no error tells.
                return Err(A::Error::custom("a key of a map comes twice"));
            }
            access.next_value_seed(Whatever)?;
        }
        Ok(())
    }
}
