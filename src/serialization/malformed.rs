//! The error for bytes that are not one value.

#[cfg(feature = "python")]
use crate::error::Error;

/// The limit of nested containers and tags, the same as in `serde_json`.
pub(super) const MAX_DEPTH: usize = 127;

/// The reason why bytes are not one value, and the position.
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

    /// The error for the fragment at `place`.
    #[cfg(feature = "python")]
    pub(crate) fn at(self, place: &str) -> Error {
        let Self { reason, offset } = self;
        Error::corrupt(format!("{place} does not contain a serialized value: {reason}, at byte {offset}"))
    }

    pub(super) fn too_deep(offset: usize) -> Self {
        Self::new(offset, format!("it is nested deeper than {MAX_DEPTH} levels"))
    }
}
