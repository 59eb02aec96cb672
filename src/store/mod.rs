//! The place where a snapshot is kept.

#[allow(dead_code, reason = "its users follow")]
pub(crate) mod bytes;
