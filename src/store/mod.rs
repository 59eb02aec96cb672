//! The place where a snapshot is kept.

pub(crate) mod bytes;
