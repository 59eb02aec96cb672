//! The file `vmsnap_manifest` at the root of a sealed snapshot: written last, read first.

use std::fmt;
use std::sync::{Arc, OnceLock};

use serde::{Deserialize, Serialize};

use super::SnapshotOptions;
use crate::cipher::SecretKey;
use crate::error::{Error, Kind, Result};
use crate::key::KeyPayload;
use crate::manifest::Manifest;
use crate::name::MANIFEST;
use crate::store::Store;

/// The manifest of an open snapshot. A serialized handle contains only its digest; the manifest is read again when
/// needed.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct OpenManifest {
    digest: [u8; 32],
    #[serde(skip)]
    manifest: OnceLock<Arc<Manifest>>,
}

impl OpenManifest {
    /// Decodes the manifest of the snapshot at `location`; `None` if nothing is stored and nothing need be.
    pub(crate) fn decode(
        location: &dyn fmt::Display,
        stored: Option<Vec<u8>>,
        payload: Option<&KeyPayload>,
    ) -> Result<Option<Self>> {
        let decoded = decode(location, stored, payload)?;
        Ok(decoded.map(|(manifest, digest)| Self { digest, manifest: OnceLock::from(Arc::new(manifest)) }))
    }

    /// The manifest. A handle from another process reads it from the snapshot.
    pub(crate) fn manifest(&self, store: &Store, data_key: Option<&SecretKey>) -> Result<&Manifest> {
        if let Some(manifest) = self.manifest.get() {
            return Ok(manifest);
        }
        let location = store.location();
        let stored = store.head(&mut || Ok(()))?.manifest?.ok_or_else(|| incomplete(location))?;
        let (manifest, digest) = decode_with(location, &stored, data_key)?;
        if digest != self.digest {
            let text =
                format!("the snapshot {location} was replaced by another one after it was opened; open it again");
            return Err(Error::corrupt(text));
        }
        Ok(self.manifest.get_or_init(|| Arc::new(manifest)))
    }

    pub(crate) fn digest(&self) -> &[u8; 32] {
        &self.digest
    }
}

/// Decodes the manifest of the snapshot at `location`, and its seal digest; `None` if
/// nothing is stored and nothing need be.
pub(crate) fn decode(
    location: &dyn fmt::Display,
    stored: Option<Vec<u8>>,
    payload: Option<&KeyPayload>,
) -> Result<Option<(Manifest, [u8; 32])>> {
    let Some(stored) = stored else {
        return if payload.is_some_and(KeyPayload::is_sealed) { Err(incomplete(location)) } else { Ok(None) };
    };
    decode_sealed(location, &stored, payload).map(Some)
}

/// Decodes the stored manifest of the snapshot at `location`, and its seal digest.
pub(crate) fn decode_sealed(
    location: &dyn fmt::Display,
    stored: &[u8],
    payload: Option<&KeyPayload>,
) -> Result<(Manifest, [u8; 32])> {
    let (manifest, digest) = decode_with(location, stored, payload.map(KeyPayload::data_key))?;
    if payload.is_some_and(|payload| payload.snapshot_id() != manifest.snapshot_id) {
        let text = "its snapshot id differs from the id in the key metadata: it belongs to another snapshot";
        return Err(Error::corrupt(text).context(place(location)));
    }
    Ok((manifest, digest))
}

fn decode_with(
    location: &dyn fmt::Display,
    stored: &[u8],
    data_key: Option<&SecretKey>,
) -> Result<(Manifest, [u8; 32])> {
    Manifest::decode(stored, data_key).map_err(|error| error.context(place(location)))
}

fn place(location: &dyn fmt::Display) -> String {
    format!("{MANIFEST} of {location}")
}

/// The error for a snapshot that must have a manifest and does not have one.
pub(crate) fn incomplete(location: &dyn fmt::Display) -> Error {
    let text = format!(
        "the snapshot {location} is not complete: it has no {MANIFEST}, so it was never committed, or the file was removed; \
         restore the file from a copy"
    );
    Error::corrupt(text)
}

/// The error for a snapshot that is required to be sealed and is not.
pub(crate) fn unsealed(location: &dyn fmt::Display) -> Error {
    let text = format!(
        "the snapshot {location} is not sealed (it has no {MANIFEST}), so nothing shows whether it is complete; `vmsnap seal` \
         or seal() seals it in its present state, if you know that it is complete"
    );
    Error::new(Kind::NotSealed, text)
}

/// Refuses a snapshot with another seal digest than the one that the options expect, if they do.
pub(crate) fn expect(location: &dyn fmt::Display, seal_digest: &[u8; 32], options: &SnapshotOptions) -> Result<()> {
    if options.seal_digest.as_ref().is_some_and(|expected| expected != seal_digest) {
        return Err(another(location));
    }
    Ok(())
}

/// The error for a snapshot with another seal digest than the expected one.
pub(crate) fn another(location: &dyn fmt::Display) -> Error {
    let text = format!(
        "the snapshot {location} is not the expected one: its seal digest differs (it was rolled back, replaced or forged)"
    );
    Error::new(Kind::Authentication, text)
}
