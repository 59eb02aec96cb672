//! A serialized value inside another one, with crosvm's signatures.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::into_anyhow;

/// A value whose type was erased: [`crate::AnySnapshot`] with crosvm's signatures.
///
/// It is written byte for byte as [`crate::AnySnapshot`] is, and converts into it by `From`.
///
/// ```
/// use vmsnap::crosvm::AnySnapshot;
///
/// trait Suspendable {
///     fn snapshot(&mut self) -> anyhow::Result<AnySnapshot>;
///     fn restore(&mut self, data: AnySnapshot) -> anyhow::Result<()>;
/// }
///
/// struct Timer(u64);
///
/// impl Suspendable for Timer {
///     fn snapshot(&mut self) -> anyhow::Result<AnySnapshot> {
///         AnySnapshot::to_any(self.0)
///     }
///
///     fn restore(&mut self, data: AnySnapshot) -> anyhow::Result<()> {
///         self.0 = AnySnapshot::from_any(data)?;
///         Ok(())
///     }
/// }
///
/// let saved = Timer(7).snapshot()?;
/// let mut timer = Timer(0);
/// timer.restore(saved)?;
/// assert_eq!(timer.0, 7);
/// # anyhow::Ok(())
/// ```
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct AnySnapshot(crate::AnySnapshot);

impl AnySnapshot {
    /// Erases the type of a value.
    ///
    /// # Errors
    ///
    /// If the value cannot be serialized.
    pub fn to_any(x: impl Serialize) -> anyhow::Result<Self> {
        crate::AnySnapshot::to_any(x).map(Self).map_err(into_anyhow)
    }

    /// Gives a value its type back.
    ///
    /// # Errors
    ///
    /// If the value is of another type.
    pub fn from_any<T: DeserializeOwned>(x: Self) -> anyhow::Result<T> {
        crate::AnySnapshot::from_any(x.0).map_err(into_anyhow)
    }
}

impl From<crate::AnySnapshot> for AnySnapshot {
    fn from(value: crate::AnySnapshot) -> Self {
        Self(value)
    }
}

impl From<AnySnapshot> for crate::AnySnapshot {
    fn from(value: AnySnapshot) -> Self {
        value.0
    }
}
