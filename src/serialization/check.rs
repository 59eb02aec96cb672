//! What bytes of a stranger's must be before another decoder than serde's sees them.
//!
//! serde knows the type it wants, and stops at what is no part of it. A decoder that makes whatever the bytes say is open to
//! more: nesting that overflows the stack, declared lengths that exhaust the memory, tags that build things nobody asked
//! for, keys that collide. So the bytes are looked at first, without making anything of them.

use super::{Format, cbor, json};
#[cfg(feature = "python")]
use crate::error::Error;

/// Levels of containers and tags: `serde_json` reads no more.
pub(super) const MAX_DEPTH: usize = 127;

/// Why bytes are not one value, and where that shows.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Malformed {
    pub(crate) reason: String,
    /// Bytes from the start of the value.
    pub(crate) offset: usize,
}

impl Malformed {
    pub(super) fn new(offset: usize, reason: impl Into<String>) -> Self {
        Self { reason: reason.into(), offset }
    }

    /// As an error of what is at `place`.
    #[cfg(feature = "python")]
    pub(crate) fn at(self, place: &str) -> Error {
        let Self { reason, offset } = self;
        Error::corrupt(format!("{place} does not hold a serialized value: {reason}, at byte {offset}"))
    }

    pub(super) fn too_deep(offset: usize) -> Self {
        Self::new(offset, format!("it is nested deeper than {MAX_DEPTH} levels"))
    }
}

/// Checks that `bytes` are one value, and returns its format, which is found out where none is given.
pub(crate) fn check(bytes: &[u8], format: Option<Format>) -> Result<Format, Malformed> {
    let format = format.unwrap_or_else(|| Format::of(bytes));
    match format {
        Format::Cbor => cbor::check(bytes)?,
        Format::Json => json::check(bytes)?,
    }
    Ok(format)
}
