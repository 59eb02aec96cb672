//! The place where a snapshot is kept.

pub(crate) mod bytes;
#[allow(dead_code, reason = "its users follow")]
pub(crate) mod pipe;
