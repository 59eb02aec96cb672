//! What is wrong with bytes that are not one value.

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
