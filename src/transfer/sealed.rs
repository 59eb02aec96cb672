//! A sealed snapshot as the source of a copy.

use std::collections::BTreeSet;

use crate::cipher::SecretKey;
use crate::error::{Error, Result};
use crate::key::KeyPayload;
use crate::manifest::{Entry, Manifest, SealId};
use crate::name::{SnapshotPath, shown};
use crate::snapshot::{SnapshotOptions, key_metadata, open_manifest};
use crate::store::bytes::ReadAt;
use crate::store::{Head, Store, Strange, Survey};
use crate::threads;

/// A sealed snapshot, unlocked. Its manifest lists everything in it.
pub(super) struct SealedSnapshot {
    pub(super) store: Store,
    payload: Option<KeyPayload>,
    pub(super) key_metadata: Option<Vec<u8>>,
    pub(super) stored_manifest: Vec<u8>,
    pub(super) manifest: Manifest,
    pub(super) id: SealId,
    pub(super) threads: usize,
}

impl SealedSnapshot {
    /// Unlocks the snapshot in `store`, and reads its manifest.
    pub(super) fn open(
        options: &SnapshotOptions,
        store: Store,
        interrupt: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Self> {
        let threads = threads::resolve(options.threads)?;
        // Checked for a plain snapshot too, so that a wrong argument is reported at once.
        options.credentials.unwrapper()?;
        let Head { key_metadata, manifest } = store.head(interrupt)?;
        let (key_metadata, stored) = (key_metadata?, manifest?);
        let payload = key_metadata::unlock(store.location(), key_metadata.clone(), options, interrupt)?;
        let Some(stored_manifest) = stored else {
            let is_sealed = payload.as_ref().is_some_and(KeyPayload::is_sealed);
            let is_incomplete = is_sealed || store.is_always_sealed();
            let error = if is_incomplete { open_manifest::incomplete } else { open_manifest::unsealed };
            return Err(error(store.location()));
        };
        let (manifest, seal_digest) =
            open_manifest::decode_sealed(store.location(), &stored_manifest, payload.as_ref())?;
        open_manifest::expect(store.location(), &seal_digest, options)?;
        store.settle(&manifest)?;
        let id = SealId { snapshot_id: manifest.snapshot_id, seal_digest };
        Ok(Self { store, payload, key_metadata, stored_manifest, manifest, id, threads })
    }

    /// Refuses a snapshot with anything that its manifest does not list, which the copy would lose.
    pub(super) fn check_whole(&self, interrupt: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        compare(self.store.survey(Some(&self.manifest), interrupt)?, &self.manifest)
    }

    pub(super) fn data_key(&self) -> Option<&SecretKey> {
        self.payload.as_ref().map(KeyPayload::data_key)
    }

    /// Opens a fragment and copies it. Errors name it.
    pub(super) fn with_fragment<T>(
        &self,
        path: &str,
        copy: impl FnOnce(&SnapshotPath, &Entry, &dyn ReadAt) -> Result<T>,
    ) -> Result<T> {
        let path = SnapshotPath::try_from(path.to_owned())?;
        let place = |error: Error| error.context(format!("{path} of {}", self.store.location()));
        let entry = self.manifest.fragments.get(path.as_str()).ok_or_else(|| Error::corrupt("is not in the manifest"));
        let entry = entry.map_err(place)?;
        let source = self.store.object(&path, Some(&self.manifest)).map_err(|error| match error {
            error if error.is_not_found() => place(Error::corrupt("is missing, but the manifest lists it")),
            error => place(error),
        })?;
        if source.size() != entry.stored_size {
            let text = format!("is {} bytes long, but the manifest says {} bytes", source.size(), entry.stored_size);
            return Err(place(Error::corrupt(text)));
        }
        copy(&path, entry, &*source).map_err(place)
    }
}

/// Refuses a snapshot with anything that its manifest does not list, which would be lost, and one without a namespace
/// that the manifest lists. A fragment that is missing or changed is found when it is copied.
fn compare(survey: Survey, manifest: &Manifest) -> Result<()> {
    let Survey { namespaces, fragments, strange } = survey.strict()?;
    if let Some(Strange { path, .. }) = strange.first() {
        let text = format!(
            "it contains {}, whose name is reserved for vmsnap: if a killed process left it, clean() removes it",
            shown(path)
        );
        return Err(Error::corrupt(text));
    }
    let is_listed = |path: &str| manifest.fragments.contains_key(path) || manifest.namespaces.contains(path);
    let mut stored =
        fragments.iter().map(|fragment| fragment.path.as_str()).chain(namespaces.iter().map(SnapshotPath::as_str));
    if let Some(path) = stored.find(|path| !is_listed(path)) {
        let text = format!(
            "it contains {}, which its manifest does not list, and which the copy would lose: move it elsewhere",
            shown(path)
        );
        return Err(Error::corrupt(text));
    }
    let found: BTreeSet<_> = namespaces.iter().map(SnapshotPath::as_str).collect();
    match manifest.namespaces.iter().find(|path| !found.contains(&***path)) {
        Some(path) => Err(Error::corrupt(format!("its manifest lists the namespace {path:?}, which does not exist"))),
        None => Ok(()),
    }
}
