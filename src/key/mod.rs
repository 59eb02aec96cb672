//! The data key of a snapshot, and how it is kept in `enc_metadata`.
//!
//! ```text
//! payload.rs   what enc_metadata holds once unwrapped: data key, snapshot id, what a reader must know
//! strict.rs    the CBOR it may be made of
//! raw.rs       wrapped with a 32-byte key of the caller's
//! ```
//!
//! How a file is wrapped shows in its first bytes; the other two wrappings of the format (age, a key service) are
//! recognised here and refused by name.

mod payload;
mod raw;
mod strict;

pub(crate) use payload::KeyPayload;

use crate::cipher::SecretKey;
use crate::error::{Error, Kind, Result};

/// Whatever wraps it, a key takes a few hundred bytes; thousands of age recipients still fit.
pub(crate) const MAX_KEY_METADATA_BYTES: u64 = 1 << 20;

const AGE_PREFIX: &[u8] = b"age-encryption.org/";
/// CBOR tag 55799, "self-described CBOR" (RFC 8949, 3.4.6).
const KEY_SERVICE_PREFIX: &[u8] = &[0xd9, 0xd9, 0xf7];

/// How the data key of an encrypted snapshot is kept in it; [`crate::key_wrapping`] tells.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum KeyWrapping {
    /// With a 32-byte key of the caller's.
    RawKey,
    /// By age: recipients or a passphrase. This version does not open it.
    Age,
    /// By a key service of the caller's. This version does not open it.
    KeyService,
}

/// The contents of `enc_metadata` for `payload`.
pub(crate) fn wrap(payload: &KeyPayload, key: &SecretKey) -> Result<Vec<u8>> {
    raw::wrap(payload, key)
}

/// Unwraps the contents of `enc_metadata`.
pub(crate) fn unwrap(wrapped: &[u8], key: Option<&SecretKey>) -> Result<KeyPayload> {
    let wrapper = match wrapping(wrapped)? {
        KeyWrapping::RawKey => {
            let key = key.ok_or_else(|| {
                Error::new(
                    Kind::KeyUnavailable,
                    "the snapshot is encrypted with a 32-byte key: pass the key it was written with",
                )
            })?;
            return raw::unwrap(wrapped, key);
        }
        KeyWrapping::Age => "age",
        KeyWrapping::KeyService => "a key service",
    };
    Err(Error::new(
        Kind::Unsupported,
        format!("its key is wrapped by {wrapper}, which this version of vmsnap does not open: use a newer one"),
    ))
}

/// How the key in the contents of `enc_metadata` is wrapped, by the first bytes.
pub(crate) fn wrapping(wrapped: &[u8]) -> Result<KeyWrapping> {
    if raw::is_wrapped(wrapped) {
        Ok(KeyWrapping::RawKey)
    } else if wrapped.starts_with(AGE_PREFIX) {
        Ok(KeyWrapping::Age)
    } else if wrapped.starts_with(KEY_SERVICE_PREFIX) {
        Ok(KeyWrapping::KeyService)
    } else {
        Err(Error::corrupt("its contents are no wrapped key of vmsnap's (damaged, or written by another program)"))
    }
}
