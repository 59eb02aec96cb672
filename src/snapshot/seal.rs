//! Seals a snapshot that was written in place.

use std::fmt;
use std::path::Path;

use rustix::io::Errno;

use super::contents::Contents;
use super::key_metadata::Unlocked;
use super::{SnapshotOptions, open_manifest};
use crate::cipher::fill_random;
use crate::error::{Error, Result};
use crate::key::KeyPayload;
use crate::location::Location;
use crate::manifest::SealId;
use crate::store::Store;
use crate::store::directory::Directory;
use crate::threads;

impl SnapshotOptions {
    /// Seals the snapshot at `location`, which was written in place: writes the manifest that lists its fragments and
    /// their digests. From then on vmsnap refuses to change the snapshot, and finds changes that others make. Sealing
    /// reads the whole snapshot. Returns the snapshot's id and seal digest.
    ///
    /// # Errors
    ///
    /// [`Error::is_sealed`] if the snapshot is sealed already, [`Error::is_state`] if a fragment is still being
    /// written, and the errors of [`SnapshotOptions::open`]. After an error the snapshot is unchanged, with one
    /// exception: if only the last sync fails, the snapshot is sealed, and the error's text says so.
    pub fn seal(&self, location: impl AsRef<Path>) -> Result<SealId> {
        self.seal_interruptible(location, &mut || Ok(()))
    }

    pub(crate) fn seal_interruptible(
        &self,
        location: impl AsRef<Path>,
        interrupt: &mut dyn FnMut() -> Result<()>,
    ) -> Result<SealId> {
        let threads = threads::resolve(self.threads)?;
        let store = Store::at_path(Location::new(location.as_ref())?.local("sealing")?);
        let directory = store.directory()?;
        let Unlocked { payload, .. } = Unlocked::open(&store, self, interrupt)?;
        let locked = directory.lock_exclusive()?;
        if payload.as_ref().is_some_and(KeyPayload::is_sealed) {
            return Err(open_manifest::incomplete(store.location()));
        }
        let snapshot_id = payload.as_ref().map_or_else(random_id, |payload| Ok(payload.snapshot_id()))?;
        let data_key = payload.as_ref().map(KeyPayload::data_key);
        let survey = directory.survey(interrupt)?;
        let contents = Contents::of(survey, Some(&store), data_key, None, threads, interrupt)?;
        if self.durable {
            contents.sync(directory, threads, interrupt)?;
        }
        let (manifest, seal_digest) = contents.into_manifest(snapshot_id, data_key.is_some()).encode(data_key)?;
        directory.write_manifest(&locked, &manifest, self.durable)?;
        if self.durable {
            Directory::sync_entry(&locked).map_err(|errno| not_durable(store.location(), errno))?;
        }
        Ok(SealId { snapshot_id, seal_digest })
    }
}

/// The error for a snapshot that is complete and in place, if only the last sync failed.
pub(crate) fn not_durable(location: &dyn fmt::Display, errno: Errno) -> Error {
    let text = format!(
        "the snapshot {location} is complete and in place, but the last sync failed, so it may not survive a power failure"
    );
    Error::io(text, errno)
}

pub(super) fn random_id() -> Result<[u8; 16]> {
    let mut id = [0; 16];
    fill_random(&mut id)?;
    Ok(id)
}
