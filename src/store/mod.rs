//! The place where a snapshot is kept.

#[allow(dead_code, reason = "used by the reader of archives, which follows")]
pub(crate) mod archive;
#[allow(dead_code, reason = "its users follow")]
pub(crate) mod bytes;
