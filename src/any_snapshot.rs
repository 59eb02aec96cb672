//! A serialized value inside another.

use std::collections::BTreeMap;

use ciborium::Value;
use serde::de::DeserializeOwned;
use serde::ser::{Error as _, Serializer};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Kind, Result};

/// A value whose type was erased, serialized half-way: it nests in other values without being encoded twice.
///
/// For traits that must be dyn compatible, such as that of a device that hands out its state. Write and read by way of
/// `AnySnapshot` alike: what is written this way may differ in detail from what the value itself would give.
///
/// ```
/// use vmsnap::AnySnapshot;
///
/// let state = AnySnapshot::to_any(vec![1_u32, 2, 3])?;
/// assert_eq!(AnySnapshot::from_any::<Vec<u32>>(state)?, [1, 2, 3]);
/// # Ok::<(), vmsnap::Error>(())
/// ```
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(transparent)]
pub struct AnySnapshot(Value);

impl AnySnapshot {
    /// Erases the type of a value.
    ///
    /// # Errors
    ///
    /// [`Error::is_serialization`] where the value cannot be serialized.
    pub fn to_any(value: impl Serialize) -> Result<Self> {
        Value::serialized(&value)
            .map(Self)
            .map_err(|error| Error::with_source(Kind::Serialization, "the value cannot be serialized", error))
    }

    /// Gives a value its type back.
    ///
    /// # Errors
    ///
    /// [`Error::is_serialization`] where it is not of that type.
    #[allow(clippy::needless_pass_by_value, reason = "crosvm's signature")]
    pub fn from_any<T: DeserializeOwned>(value: Self) -> Result<T> {
        value
            .0
            .deserialized()
            // What came from JSON has text where a type may want an integer (the keys of a map) or bytes (an address).
            .or_else(|error| serde_json::to_value(&value).and_then(serde_json::from_value).map_err(|_| error))
            .map_err(|error| Error::with_source(Kind::Serialization, "the value is of another type", error))
    }
}

impl Serialize for AnySnapshot {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        Nested(&self.0).serialize(serializer)
    }
}

/// A value, and the way crosvm wrote it: CBOR by way of `ciborium::Value`; JSON by way of `serde_json::Value`, which sorts
/// maps by the text of their keys, and knows no float of 32 bits.
struct Nested<'a>(&'a Value);

impl Serialize for Nested<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        if !serializer.is_human_readable() {
            return self.0.serialize(serializer);
        }
        match self.0 {
            Value::Float(number) => serializer.serialize_f64(*number),
            Value::Array(values) => serializer.collect_seq(values.iter().map(Nested)),
            Value::Map(entries) => {
                let mut sorted = BTreeMap::new();
                for (key, value) in entries {
                    sorted.insert(key_text(key).map_err(S::Error::custom)?, Nested(value));
                }
                serializer.collect_map(sorted)
            }
            // Either would be written, but not read as what it was.
            Value::Integer(number) if i128::from(*number) < i64::MIN.into() => {
                Err(S::Error::custom("JSON cannot hold an integer of more than 64 bits here"))
            }
            Value::Tag(..) => Err(S::Error::custom("JSON cannot hold what CBOR tags, such as a wide integer")),
            other => other.serialize(serializer),
        }
    }
}

fn key_text(key: &Value) -> std::result::Result<String, &'static str> {
    match key {
        Value::Text(text) => Ok(text.clone()),
        Value::Integer(number) => Ok(i128::from(*number).to_string()),
        Value::Bool(truth) => Ok(truth.to_string()),
        _ => Err("a key of a JSON object is text, an integer or a boolean"),
    }
}
