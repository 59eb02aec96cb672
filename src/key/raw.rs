//! A data key wrapped with a 32-byte key of the caller: one FLOE message.

use zeroize::Zeroizing;

use crate::cipher::{SecretKey, decrypt_message, encrypt_message, message_prefix};
use crate::error::Result;

/// The chunk size; segments have 1056 bytes.
const CHUNK_SIZE_BYTES: usize = 1024;
const AAD: &[u8] = b"vmsnap/1/key";

pub(super) fn is_wrapped(wrapped: &[u8]) -> bool {
    wrapped.starts_with(&message_prefix(CHUNK_SIZE_BYTES))
}

pub(super) fn wrap(payload: &[u8], key: &SecretKey) -> Result<Vec<u8>> {
    encrypt_message(key, AAD, CHUNK_SIZE_BYTES, payload)
}

pub(super) fn unwrap(wrapped: &[u8], key: &SecretKey) -> Result<Zeroizing<Vec<u8>>> {
    decrypt_message(key, AAD, CHUNK_SIZE_BYTES, wrapped)
}
