//! The version of serialized handles.

use serde::{Deserialize, Deserializer, Serialize, Serializer, de};

/// The form in which handles are serialized. Changes whenever another version would misread them.
const VERSION: u32 = 2;

/// The first field of a serialized handle, so that two versions of vmsnap in one pool of processes do not misread each
/// other.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct HandleVersion;

impl Serialize for HandleVersion {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        VERSION.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for HandleVersion {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        match u32::deserialize(deserializer)? {
            VERSION => Ok(Self),
            other => Err(de::Error::custom(format_args!(
                "the handle has version {other}, and this vmsnap makes version {VERSION}: use the same vmsnap in all \
                 processes"
            ))),
        }
    }
}
