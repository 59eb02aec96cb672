//! A data key wrapped by a key service of the caller: KMS, Vault, TPM.

use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::background::in_background;
use crate::error::{Error, Kind, Result};
use crate::strict_cbor;

/// CBOR tag 55799, "self-described CBOR" (RFC 8949, 3.4.6).
pub(super) const PREFIX: &[u8] = &[0xd9, 0xd9, 0xf7];
const FORMAT: &str = "vmsnap-wrapped-key";
const VERSION: u64 = 1;

const MAX_NAME_BYTES: usize = 255;
/// The largest wrapped key; KMS services return some hundred bytes.
const MAX_WRAPPED_BYTES: usize = 64 << 10;

/// An error of a key provider.
pub type ProviderError = Box<dyn std::error::Error + Send + Sync>;

/// A key service of the caller that wraps the data key: only users of the service can open the snapshot.
///
/// The payload is about 130 bytes long and contains the data key. The service must **authenticate**: `unwrap` must fail
/// for any bytes that `wrap` did not return. Each call runs in a thread of its own.
pub trait KeyProvider: Send + Sync {
    /// The name of the service. It is stored in the snapshot, and the reader's provider must have the same name. It is
    /// not a secret.
    fn name(&self) -> &str;

    /// Encrypts `payload`.
    ///
    /// # Errors
    ///
    /// Any error; it becomes the source of an [`Error::is_key_unavailable`].
    fn wrap(&self, payload: &[u8]) -> std::result::Result<Vec<u8>, ProviderError>;

    /// Decrypts bytes that `wrap` returned.
    ///
    /// # Errors
    ///
    /// Any error; it becomes the source of an [`Error::is_key_unavailable`].
    fn unwrap(&self, wrapped: &[u8]) -> std::result::Result<Vec<u8>, ProviderError>;

    /// The time limit of each call.
    fn timeout(&self) -> Duration {
        Duration::from_secs(60)
    }
}

pub(super) type SharedProvider = Arc<dyn KeyProvider>;

#[derive(Serialize, Deserialize)]
struct Envelope {
    format: String,
    version: u64,
    provider: String,
    #[serde(with = "serde_bytes")]
    wrapped: Vec<u8>,
}

pub(super) fn wrap(
    payload: &[u8],
    secret: &[u8],
    provider: &SharedProvider,
    interrupt: &mut dyn FnMut() -> Result<()>,
) -> Result<Vec<u8>> {
    let name = checked_name(provider)?;
    let content = Zeroizing::new(payload.to_vec());
    let wrapped = call(provider, &name, interrupt, move |provider| provider.wrap(&content))?;
    let refused = |reason: &str| Err(Error::new(Kind::KeyUnavailable, format!("the key service {name:?} {reason}")));
    if wrapped.is_empty() {
        return refused("returned an empty wrapped key");
    }
    if wrapped.len() > MAX_WRAPPED_BYTES {
        return refused(&format!(
            "returned a wrapped key of {} bytes; the limit is {MAX_WRAPPED_BYTES}",
            wrapped.len()
        ));
    }
    if wrapped.windows(secret.len()).any(|part| part == secret) {
        return refused("returned the key unwrapped");
    }
    let envelope = Envelope { format: FORMAT.to_owned(), version: VERSION, provider: name, wrapped };
    let mut file = PREFIX.to_vec();
    ciborium::into_writer(&envelope, &mut file)
        .map_err(|error| Error::with_source(Kind::Serialization, "the wrapped key cannot be written", error))?;
    Ok(file)
}

pub(super) fn unwrap(
    file: &[u8],
    provider: &SharedProvider,
    interrupt: &mut dyn FnMut() -> Result<()>,
) -> Result<Zeroizing<Vec<u8>>> {
    let envelope = parse(file)?;
    let name = checked_name(provider)?;
    if envelope.provider != name {
        return Err(Error::new(
            Kind::KeyUnavailable,
            format!("its key is wrapped by the key service {:?}, but {name:?} was passed", envelope.provider),
        ));
    }
    call(provider, &name, interrupt, move |provider| provider.unwrap(&envelope.wrapped)).map(Zeroizing::new)
}

/// The name of the service that a file was wrapped by.
pub(super) fn name_of(file: &[u8]) -> Result<String> {
    parse(file).map(|envelope| envelope.provider)
}

fn parse(file: &[u8]) -> Result<Envelope> {
    let malformed = |error: &dyn std::fmt::Display| Error::corrupt(format!("it is not a wrapped vmsnap key: {error}"));
    let content = file.strip_prefix(PREFIX).unwrap_or_default();
    strict_cbor::check(content).map_err(|error| malformed(&error))?;
    let envelope: Envelope = ciborium::from_reader(content).map_err(|error| malformed(&error))?;
    if envelope.format != FORMAT {
        return Err(malformed(&format_args!("its format is {:?}, not {FORMAT:?}", envelope.format)));
    }
    if envelope.version != VERSION {
        return Err(Error::new(
            Kind::Unsupported,
            format!(
                "its key is wrapped in version {}, which this version of vmsnap does not support; install a newer one",
                envelope.version
            ),
        ));
    }
    Ok(envelope)
}

fn checked_name(provider: &SharedProvider) -> Result<String> {
    let name = provider.name();
    if name.is_empty() || name.len() > MAX_NAME_BYTES || name.chars().any(char::is_control) {
        return Err(Error::invalid_argument(format!(
            "the name of a key service must have 1 to {MAX_NAME_BYTES} bytes and no control characters, not {name:?}"
        )));
    }
    Ok(name.to_owned())
}

fn call(
    provider: &SharedProvider,
    name: &str,
    interrupt: &mut dyn FnMut() -> Result<()>,
    work: impl FnOnce(&dyn KeyProvider) -> std::result::Result<Vec<u8>, ProviderError> + Send + 'static,
) -> Result<Vec<u8>> {
    let timeout = provider.timeout();
    let shared = Arc::clone(provider);
    let unavailable =
        |what: String| format!("the key service {name:?} {what}; check that it is reachable and that you may use it");
    match in_background(Some(timeout), interrupt, move || work(&*shared))? {
        Some(Ok(answer)) => Ok(answer),
        Some(Err(error)) => {
            let text = unavailable(format!("failed: {error}"));
            Err(Error::with_source(Kind::KeyUnavailable, text, error))
        }
        None => Err(Error::new(
            Kind::KeyUnavailable,
            unavailable(format!("did not answer within {} s", timeout.as_secs_f64())),
        )),
    }
}
