//! FLOE, the encrypted format. Only this module uses the crate that implements it.
//!
//! Specification: <https://c2sp.org/FLOE>. A message is a header and segments. Each segment is encrypted by itself, so
//! threads can encrypt and decrypt them in any order. There are two AEAD providers, and each reads the other's
//! messages.

use std::fmt;
use std::sync::OnceLock;

use fast_floe::low_level::{
    DecryptionState, EncryptionState, MessageLayout, SegmentLayout, SharedDecryptionContext, SharedEncryptionContext,
    start_decryption_inferred, start_encryption,
};
use fast_floe::{Header, Parameters, Provider};
use serde::de::{SeqAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use zeroize::{Zeroize, ZeroizeOnDrop, Zeroizing};

use crate::buffer;
use crate::error::{Error, Kind, Result};

/// The length of every key, in bytes: AES-256.
pub const KEY_BYTES: usize = 32;
/// The smallest chunk size: the minimum of the crate fast-floe.
pub const MIN_CHUNK_SIZE_BYTES: usize = 32;
/// The largest chunk size: crosvm uses it for guest memory.
pub const MAX_CHUNK_SIZE_BYTES: usize = 64 << 20;
/// The default chunk size, the same as in crosvm: each page of guest memory is one segment.
pub const DEFAULT_CHUNK_SIZE_BYTES: usize = 4096;

/// The length of the header: parameters 10, IV 32, header tag 32.
pub(crate) const HEADER_BYTES: usize = Header::LEN;
pub(crate) const HEADER_TAG_BYTES: usize = 32;
/// The bytes that encryption adds to a chunk: length word 4, nonce 12, tag 16.
pub(crate) const SEGMENT_OVERHEAD_BYTES: usize = 32;

/// The variable that chooses the AEAD provider: `aes-gcm` or `aws-lc`.
const PROVIDER_VARIABLE: &str = "VMSNAP_AEAD";

/// The providers compiled in, by the names users know, fastest first.
const PROVIDERS: &[(&str, Provider)] = &[
    #[cfg(feature = "aws-lc")]
    ("aws-lc", Provider::AWS_LC_RS),
    ("aes-gcm", Provider::RUSTCRYPTO),
];

/// The name of the AEAD provider that this process uses: `aws-lc` or `aes-gcm`.
///
/// It is the fastest one compiled in, unless the environment variable `VMSNAP_AEAD` names another. Each process chooses
/// once.
///
/// # Errors
///
/// [`Error::is_invalid_argument`] if `VMSNAP_AEAD` does not name a provider that was compiled in.
///
/// ```
/// assert!(["aws-lc", "aes-gcm"].contains(&vmsnap::aead_provider()?));
/// # Ok::<(), vmsnap::Error>(())
/// ```
pub fn aead_provider() -> Result<&'static str> {
    let chosen = provider()?;
    Ok(PROVIDERS.iter().find(|(_, provider)| *provider == chosen).map_or("unknown", |(name, _)| name))
}

fn provider() -> Result<Provider> {
    static CHOSEN: OnceLock<std::result::Result<Provider, String>> = OnceLock::new();
    CHOSEN
        .get_or_init(|| match std::env::var_os(PROVIDER_VARIABLE) {
            None => Ok(PROVIDERS[0].1),
            Some(wanted) => {
                PROVIDERS.iter().find(|(name, _)| wanted == *name).map(|(_, provider)| *provider).ok_or_else(|| {
                    let known: Vec<_> = PROVIDERS.iter().map(|(name, _)| *name).collect();
                    format!(
                        "{PROVIDER_VARIABLE}={} is not an AEAD provider of this build; set one of {}, or unset it",
                        wanted.display(),
                        known.join(" and ")
                    )
                })
            }
        })
        .clone()
        .map_err(Error::invalid_argument)
}

/// A secret of 32 bytes: the data key of a snapshot, or the caller's key that wraps it. It is wiped when it is dropped,
/// and `Debug` does not show it.
///
/// It lives on the heap, because a move on the stack leaves a copy behind.
#[derive(Clone, Zeroize, ZeroizeOnDrop)]
pub struct SecretKey(Box<[u8; KEY_BYTES]>);

impl SecretKey {
    /// A new random key, from the operating system.
    ///
    /// # Errors
    ///
    /// An error if the operating system returns no random bytes.
    pub fn generate() -> Result<Self> {
        let mut key = Self(Box::new([0; KEY_BYTES]));
        fill_random(&mut *key.0)?;
        Ok(key)
    }

    /// A key from the caller's bytes.
    ///
    /// # Errors
    ///
    /// [`Error::is_invalid_argument`] if the key is not 32 bytes long.
    pub fn from_slice(bytes: &[u8]) -> Result<Self> {
        let mut key = Self(Box::new([0; KEY_BYTES]));
        if bytes.len() != KEY_BYTES {
            return Err(Error::invalid_argument(format!(
                "a key must be {KEY_BYTES} bytes long, not {}; generate_key() makes one",
                bytes.len()
            )));
        }
        key.0.copy_from_slice(bytes);
        Ok(key)
    }

    /// The secret itself. Store it where only its owner can read it.
    #[must_use]
    pub fn expose(&self) -> &[u8; KEY_BYTES] {
        &self.0
    }

    fn bound(&self, provider: Provider) -> fast_floe::Key {
        fast_floe::Key::from_bytes_with_provider(*self.0, provider)
    }
}

impl From<[u8; KEY_BYTES]> for SecretKey {
    fn from(mut bytes: [u8; KEY_BYTES]) -> Self {
        let key = Self(Box::new(bytes));
        bytes.zeroize();
        key
    }
}

impl Serialize for SecretKey {
    fn serialize<S: Serializer>(&self, serializer: S) -> std::result::Result<S::Ok, S::Error> {
        serializer.serialize_bytes(&*self.0)
    }
}

impl<'de> Deserialize<'de> for SecretKey {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> std::result::Result<Self, D::Error> {
        struct Bytes;

        impl<'de> Visitor<'de> for Bytes {
            type Value = SecretKey;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{KEY_BYTES} bytes")
            }

            fn visit_bytes<E: serde::de::Error>(self, bytes: &[u8]) -> std::result::Result<SecretKey, E> {
                SecretKey::from_slice(bytes).map_err(|_| E::invalid_length(bytes.len(), &self))
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> std::result::Result<SecretKey, A::Error> {
                let mut bytes = Zeroizing::new(Vec::with_capacity(KEY_BYTES));
                while let Some(byte) = items.next_element()? {
                    bytes.push(byte);
                }
                self.visit_bytes(&bytes)
            }
        }

        deserializer.deserialize_bytes(Bytes)
    }
}

/// Overwrites the stack that calls from here have used, because other crates leave copies of keys in it. Call it after
/// such calls, from the function that made them.
#[inline(never)]
#[expect(clippy::large_stack_arrays, reason = "it overwrites the stack")]
pub(crate) fn wipe_stack() {
    // More than such calls need, even in a build without optimisation; it takes a microsecond.
    let zeros = [0_u8; 64 << 10];
    std::hint::black_box(&zeros);
}

impl fmt::Debug for SecretKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SecretKey(…)")
    }
}

/// Fills `bytes` with random bytes of the operating system.
pub(crate) fn fill_random(mut bytes: &mut [u8]) -> Result<()> {
    while !bytes.is_empty() {
        match rustix::rand::getrandom(&mut *bytes, rustix::rand::GetRandomFlags::empty()) {
            Ok(count) => bytes = &mut bytes[count..],
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(Error::io("the operating system returned no random bytes", error)),
        }
    }
    Ok(())
}

/// Checks a chunk size that the caller passed.
pub(crate) fn check_chunk_size(chunk_size_bytes: usize) -> Result<()> {
    if (MIN_CHUNK_SIZE_BYTES..=MAX_CHUNK_SIZE_BYTES).contains(&chunk_size_bytes) {
        return Ok(());
    }
    Err(Error::invalid_argument(format!(
        "chunk_size_bytes must be from {MIN_CHUNK_SIZE_BYTES} to {MAX_CHUNK_SIZE_BYTES} (64 MiB), not \
         {chunk_size_bytes}"
    )))
}

/// The length of a full segment.
pub(crate) fn segment_size(chunk_size_bytes: usize) -> usize {
    chunk_size_bytes + SEGMENT_OVERHEAD_BYTES
}

/// The tag at the end of the header.
pub(crate) fn header_tag(header: &[u8; HEADER_BYTES]) -> [u8; HEADER_TAG_BYTES] {
    let mut tag = [0; HEADER_TAG_BYTES];
    tag.copy_from_slice(&header[HEADER_BYTES - HEADER_TAG_BYTES..]);
    tag
}

/// The offset of segment `index` in the file.
pub(crate) fn segment_offset(index: u64, chunk_size_bytes: usize) -> u64 {
    HEADER_BYTES as u64 + index * segment_size(chunk_size_bytes) as u64
}

/// The stored bytes of a message of at most `size` bytes; `None` if that is not a number.
pub(crate) fn most_stored_bytes(size: u64, chunk_size_bytes: usize) -> Option<u64> {
    let segments = (size / chunk_size_bytes as u64).checked_add(1)?;
    let overhead = segments.checked_mul(SEGMENT_OVERHEAD_BYTES as u64)?.checked_add(HEADER_BYTES as u64)?;
    size.checked_add(overhead)
}

/// Whether a message of `size` bytes is stored in `stored_size` bytes. There may be one more, empty segment at the end.
pub(crate) fn is_stored_size(stored_size: u64, size: u64, chunk_size_bytes: usize) -> bool {
    let Some(overhead) = stored_size.checked_sub(size).and_then(|bytes| bytes.checked_sub(HEADER_BYTES as u64)) else {
        return false;
    };
    let segments = size.div_ceil(chunk_size_bytes as u64).max(1);
    let overhead_of = |segments: u64| segments.checked_mul(SEGMENT_OVERHEAD_BYTES as u64);
    overhead_of(segments) == Some(overhead)
        || (size > 0 && size.is_multiple_of(chunk_size_bytes as u64) && overhead_of(segments + 1) == Some(overhead))
}

/// A message being written: makes an [`Encryptor`] for each thread.
pub(crate) struct Encryption {
    context: SharedEncryptionContext,
    chunk_size_bytes: usize,
}

impl Encryption {
    /// Begins a message with a chunk size that was checked before; also returns its header.
    pub(crate) fn start(key: &SecretKey, aad: &[u8], chunk_size_bytes: usize) -> Result<(Self, [u8; HEADER_BYTES])> {
        Self::start_with(provider()?, key, aad, chunk_size_bytes)
    }

    fn start_with(
        provider: Provider,
        key: &SecretKey,
        aad: &[u8],
        chunk_size_bytes: usize,
    ) -> Result<(Self, [u8; HEADER_BYTES])> {
        let parameters = parameters(chunk_size_bytes)?;
        let started = start_encryption(&key.bound(provider), aad, parameters);
        wipe_stack();
        let (state, header) = started.map_err(provider_failure)?;
        Ok((Self { context: state.into_shared(), chunk_size_bytes }, header.into()))
    }

    pub(crate) fn chunk_size_bytes(&self) -> usize {
        self.chunk_size_bytes
    }

    pub(crate) fn encryptor(&self) -> Encryptor {
        Encryptor { state: Box::new(self.context.fork()), chunk_size_bytes: self.chunk_size_bytes }
    }
}

/// Encrypts segments of one message, each once, in any order. It holds nonces drawn in batches, so it must not be used
/// after a fork.
pub(crate) struct Encryptor {
    state: Box<EncryptionState>,
    chunk_size_bytes: usize,
}

impl Encryptor {
    /// Encrypts the full chunk `index`, which must not be the last, into `out` (chunk + 32 bytes).
    pub(crate) fn encrypt(&mut self, index: u64, chunk: &[u8], out: &mut [u8]) -> Result<()> {
        // The crate needs the layout of the whole message. Its length is unknown, so assume that one more byte follows.
        let layout = self.layout(index, self.chunk_size_bytes, 1)?.segment_for_position(index);
        self.encrypt_segment(layout, chunk, out)
    }

    /// Encrypts the last chunk, `index`, which may be short, into `out` (its length + 32 bytes).
    pub(crate) fn encrypt_last(&mut self, index: u64, chunk: &[u8], out: &mut [u8]) -> Result<()> {
        let layout = self.layout(index, chunk.len(), 0)?.final_segment();
        self.encrypt_segment(Some(layout), chunk, out)
    }

    fn encrypt_segment(&mut self, segment: Option<SegmentLayout>, chunk: &[u8], out: &mut [u8]) -> Result<()> {
        let segment = segment.ok_or_else(too_long)?;
        self.state.encrypt_segment_into(chunk, segment, out).map_err(provider_failure)?;
        Ok(())
    }

    fn layout(&self, index: u64, chunk_bytes: usize, further_bytes: u64) -> Result<MessageLayout> {
        let length = index
            .checked_mul(self.chunk_size_bytes as u64)
            .and_then(|before| before.checked_add(chunk_bytes as u64 + further_bytes))
            .ok_or_else(too_long)?;
        self.state.parameters().plaintext_layout(length).map_err(|_| too_long())
    }
}

/// A message being read, with a verified header: makes a [`Decryptor`] for each thread.
pub(crate) struct Decryption {
    context: SharedDecryptionContext,
    layout: MessageLayout,
}

impl Decryption {
    /// Verifies the header of a message that is stored in `stored_size` bytes. The caller must decrypt the last segment
    /// next, which shows whether the message was truncated or extended.
    pub(crate) fn start(key: &SecretKey, aad: &[u8], header: [u8; HEADER_BYTES], stored_size: u64) -> Result<Self> {
        Self::start_with(provider()?, key, aad, header, stored_size)
    }

    fn start_with(
        provider: Provider,
        key: &SecretKey,
        aad: &[u8],
        header: [u8; HEADER_BYTES],
        stored_size: u64,
    ) -> Result<Self> {
        let header = Header::from(header);
        let parameters = header.unverified_parameters().map_err(|_| not_floe())?;
        let started = start_decryption_inferred(&key.bound(provider), aad, &header);
        wipe_stack();
        let state = started.map_err(|_| not_authentic())?;
        // The header is authentic here, so a length that no message has means truncation.
        let layout = parameters.ciphertext_layout(stored_size).map_err(|_| not_authentic())?;
        Ok(Self { context: state.into_shared(), layout })
    }

    pub(crate) fn decryptor(&self) -> Decryptor {
        Decryptor { state: self.context.fork(), layout: self.layout }
    }

    pub(crate) fn size(&self) -> u64 {
        self.layout.plaintext_length()
    }

    pub(crate) fn chunk_size_bytes(&self) -> usize {
        self.layout.parameters().plaintext_segment_length()
    }

    pub(crate) fn last_index(&self) -> u64 {
        self.layout.segment_count() - 1
    }

    /// The length of the last chunk.
    pub(crate) fn last_chunk_bytes(&self) -> usize {
        self.layout.final_segment().plaintext_length()
    }
}

/// Checks the chunk size that a header declares, before anything is allocated for it.
///
/// # Errors
///
/// [`Error::is_corrupt`] if the header is not a FLOE header, or its segment length is not allowed.
pub(crate) fn check_declared_chunk_size(header: [u8; HEADER_BYTES]) -> Result<()> {
    let parameters = Header::from(header).unverified_parameters().map_err(|_| not_floe())?;
    check_chunk_size(parameters.plaintext_segment_length()).map_err(|_| not_floe())
}

/// Decrypts segments of one message.
pub(crate) struct Decryptor {
    state: DecryptionState,
    layout: MessageLayout,
}

impl Decryptor {
    /// Verifies and decrypts segment `index` into `out`, which must have the length of its plaintext. If the segment
    /// does not verify, `out` is filled with zeros.
    pub(crate) fn decrypt(&mut self, index: u64, segment: &[u8], out: &mut [u8]) -> Result<()> {
        let decrypted = self
            .layout
            .segment_for_position(index)
            .ok_or_else(not_authentic)
            .and_then(|layout| self.state.decrypt_segment_into(segment, layout, out).map_err(|_| not_authentic()));
        match decrypted {
            Ok(written) if written == out.len() => Ok(()),
            Ok(_) => {
                out.fill(0);
                Err(Error::new(Kind::Provider, "a segment is shorter than expected"))
            }
            Err(error) => {
                out.fill(0);
                Err(error)
            }
        }
    }
}

/// Encrypts a whole short message.
pub(crate) fn encrypt_message(key: &SecretKey, aad: &[u8], chunk_size_bytes: usize, message: &[u8]) -> Result<Vec<u8>> {
    let segments = message.len() / chunk_size_bytes + 1;
    buffer::probe(HEADER_BYTES + segments.saturating_mul(segment_size(chunk_size_bytes)))?;
    fast_floe::encrypt(&key.bound(provider()?), aad, parameters(chunk_size_bytes)?, message).map_err(provider_failure)
}

/// Decrypts a whole short message, which must have been encrypted with this chunk size.
pub(crate) fn decrypt_message(
    key: &SecretKey,
    aad: &[u8],
    chunk_size_bytes: usize,
    encrypted: &[u8],
) -> Result<Zeroizing<Vec<u8>>> {
    buffer::probe(encrypted.len())?;
    fast_floe::decrypt_with_parameters(&key.bound(provider()?), aad, parameters(chunk_size_bytes)?, encrypted)
        .map(Zeroizing::new)
        .map_err(|_| not_authentic())
}

/// The first bytes of every message with this chunk size: AEAD 0, KDF 0, segment length, IV length.
pub(crate) fn message_prefix(chunk_size_bytes: usize) -> [u8; 10] {
    let mut prefix = [0; 10];
    let segment_size = u32::try_from(segment_size(chunk_size_bytes)).unwrap_or(u32::MAX);
    prefix[2..6].copy_from_slice(&segment_size.to_be_bytes());
    prefix[9] = 32;
    prefix
}

fn parameters(chunk_size_bytes: usize) -> Result<Parameters> {
    check_chunk_size(chunk_size_bytes)?;
    u32::try_from(segment_size(chunk_size_bytes))
        .ok()
        .and_then(|size| Parameters::with_segment_length(size).ok())
        .ok_or_else(|| Error::new(Kind::Provider, "FLOE does not support segments of this size"))
}

fn not_authentic() -> Error {
    Error::new(
        Kind::Authentication,
        "authentication failed: the key is wrong, or the file is damaged, truncated, renamed or from another snapshot",
    )
}

fn not_floe() -> Error {
    Error::corrupt("not encrypted by vmsnap: it has no FLOE header (is it a plain file in an encrypted snapshot?)")
}

fn too_long() -> Error {
    Error::invalid_argument("the fragment is too long: it can have at most 2^40 chunks; use larger chunks")
}

fn provider_failure(error: fast_floe::Error) -> Error {
    Error::with_source(Kind::Provider, format!("the AEAD provider failed: {error}"), error)
}

#[cfg(test)]
mod tests;
