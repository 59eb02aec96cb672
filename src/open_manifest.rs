//! The file `vmsnap_manifest` at the root of a sealed snapshot: written last, read first.

use std::path::Path;
use std::sync::{Arc, OnceLock};

use serde::{Deserialize, Serialize};

use crate::cipher::SecretKey;
use crate::error::{Error, Kind, Result};
use crate::fragment::folder;
use crate::key::KeyPayload;
use crate::manifest::{MAX_MANIFEST_BYTES, Manifest};
use crate::name::MANIFEST;

/// The manifest of an open snapshot. A serialized handle contains only its digest; the manifest is read again when
/// needed.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct OpenManifest {
    digest: [u8; 32],
    #[serde(skip)]
    manifest: OnceLock<Arc<Manifest>>,
}

impl OpenManifest {
    /// Reads the manifest of the snapshot at `root`; `None` if the snapshot does not have one and does not need one.
    pub(crate) fn read(root: &Path, payload: Option<&KeyPayload>) -> Result<Option<Self>> {
        let Some((manifest, digest)) = read(root, payload.map(KeyPayload::data_key))? else {
            return if payload.is_some_and(KeyPayload::is_sealed) { Err(incomplete(root)) } else { Ok(None) };
        };
        if payload.is_some_and(|payload| payload.snapshot_id() != manifest.snapshot_id) {
            let text = "its snapshot id differs from the id in the key metadata: it belongs to another snapshot";
            return Err(Error::corrupt(text).context(place(root)));
        }
        Ok(Some(Self { digest, manifest: OnceLock::from(Arc::new(manifest)) }))
    }

    pub(crate) fn manifest(&self, root: &Path, data_key: Option<&SecretKey>) -> Result<&Manifest> {
        if let Some(manifest) = self.manifest.get() {
            return Ok(manifest);
        }
        let (manifest, digest) = read(root, data_key)?.ok_or_else(|| incomplete(root))?;
        if digest != self.digest {
            let text = format!(
                "the snapshot {} was replaced by another one after it was opened; open it again",
                root.display()
            );
            return Err(Error::corrupt(text));
        }
        Ok(self.manifest.get_or_init(|| Arc::new(manifest)))
    }

    pub(crate) fn digest(&self) -> &[u8; 32] {
        &self.digest
    }
}

fn read(root: &Path, data_key: Option<&SecretKey>) -> Result<Option<(Manifest, [u8; 32])>> {
    let context = |error: Error| error.context(place(root));
    folder::read_small(&folder::open(root, "")?, MANIFEST, MAX_MANIFEST_BYTES)
        .map_err(context)?
        .map(|stored| Manifest::decode(&stored, data_key).map_err(context))
        .transpose()
}

fn place(root: &Path) -> String {
    format!("{MANIFEST} of {}", root.display())
}

/// The error for a snapshot that must have a manifest and does not have one.
pub(crate) fn incomplete(root: &Path) -> Error {
    let text = format!(
        "the snapshot {} is not complete: it has no {MANIFEST}, so it was never committed, or the file was removed; \
         restore the file from a copy",
        root.display()
    );
    Error::corrupt(text)
}

/// The error for a snapshot that is required to be sealed and is not.
pub(crate) fn unsealed(root: &Path) -> Error {
    let text = format!(
        "the snapshot {} is not sealed (it has no {MANIFEST}), so nothing shows whether it is complete; `vmsnap seal` \
         or seal() seals it in its present state, if you know that it is complete",
        root.display()
    );
    Error::new(Kind::NotSealed, text)
}

/// The error for a snapshot with another seal digest than the expected one.
pub(crate) fn another(root: &Path) -> Error {
    let text = format!(
        "the snapshot {} is not the expected one: its seal digest differs (it was rolled back, replaced or forged)",
        root.display()
    );
    Error::new(Kind::Authentication, text)
}
