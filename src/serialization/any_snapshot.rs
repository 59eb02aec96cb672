//! Serialized values that are nested in other values.

use std::collections::BTreeMap;

use ciborium::Value;
use serde::de::DeserializeOwned;
use serde::ser::{Error as _, Serializer};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Kind, Result};

/// A serialized value without its type. It can be nested in other values without being encoded twice.
///
/// Use it in traits that must be dyn compatible, for instance one for devices that return their state. If a value is
/// written as an `AnySnapshot`, read it as one: the bytes can differ in detail from those of the value itself.
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
    /// Converts a value into an `AnySnapshot`.
    ///
    /// # Errors
    ///
    /// [`Error::is_serialization`] if the value cannot be serialized.
    pub fn to_any(value: impl Serialize) -> Result<Self> {
        Value::serialized(&value)
            .map(Self)
            .map_err(|error| Error::with_source(Kind::Serialization, "the value cannot be serialized", error))
    }

    /// Converts an `AnySnapshot` back into a value of type `T`.
    ///
    /// # Errors
    ///
    /// [`Error::is_serialization`] if the value is not of that type.
    #[allow(clippy::needless_pass_by_value, reason = "crosvm's signature")]
    pub fn from_any<T: DeserializeOwned>(value: Self) -> Result<T> {
        value
            .0
            .deserialized()
            // A value from JSON has text where a type may expect an integer (the keys of a map) or bytes (an address).
            .or_else(|error| serde_json::to_value(&value).and_then(serde_json::from_value).map_err(|_| error))
            .map_err(|error| Error::with_source(Kind::Serialization, "the value is of another type", error))
    }
}

impl Serialize for AnySnapshot {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        Nested(&self.0).serialize(serializer)
    }
}

/// Serializes a value as crosvm does: CBOR through `ciborium::Value`, and JSON through `serde_json::Value`, which sorts
/// maps by the text of their keys and has no 32-bit float.
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
            // `serde_json` would write these two, but a reader would get a value of another type.
            Value::Integer(number) if i128::from(*number) < i64::MIN.into() => {
                Err(S::Error::custom("JSON cannot represent an integer of more than 64 bits here"))
            }
            Value::Tag(..) => Err(S::Error::custom("JSON cannot represent a CBOR tag, such as a wide integer")),
            other => other.serialize(serializer),
        }
    }
}

fn key_text(key: &Value) -> std::result::Result<String, &'static str> {
    match key {
        Value::Text(text) => Ok(text.clone()),
        Value::Integer(number) => Ok(i128::from(*number).to_string()),
        Value::Bool(truth) => Ok(truth.to_string()),
        _ => Err("a key of a JSON object must be text, an integer or a boolean"),
    }
}
