//! A serialized value inside another.

use ciborium::Value;
use serde::de::DeserializeOwned;
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
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
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
            .map_err(|error| Error::with_source(Kind::Serialization, "the value is of another type", error))
    }
}
