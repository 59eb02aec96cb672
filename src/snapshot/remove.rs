//! Removing a snapshot.

use std::path::Path;

use super::{SnapshotOptions, key_metadata};
use crate::error::{Error, Result};
use crate::location::Location;
use crate::name::{KEY_METADATA, MANIFEST};
use crate::store::Store;

impl SnapshotOptions {
    /// Removes the snapshot at `location`: a directory, an archive, or a snapshot in an object store. No key is needed.
    ///
    /// A reader finds the whole snapshot or none: a directory gets another name first, and in an object store the
    /// manifest is removed first. A removal in an object store that was interrupted can be repeated.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let path = folder.path().join("vm1");
    /// let options = vmsnap::SnapshotOptions::new();
    /// options.create(&path)?.commit()?;
    /// options.remove(&path)?;
    /// assert!(!path.exists());
    /// # Ok::<(), vmsnap::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::is_io`] if there is no snapshot or something cannot be removed, [`Error::is_invalid_argument`] if a
    /// directory has neither key metadata nor a manifest, so that it may be something else, or if another snapshot is
    /// below a URL, and [`Error::is_corrupt`] if it contains something that a snapshot cannot contain.
    pub fn remove(&self, location: impl AsRef<Path>) -> Result<()> {
        checked(&Store::at(Location::new(location.as_ref())?, &self.remote)?, &mut || Ok(()))
    }
}

/// Removes a snapshot, but nothing else.
pub(crate) fn checked(store: &Store, interrupt: &mut dyn FnMut() -> Result<()>) -> Result<()> {
    if store.is_local() {
        let is_encrypted = key_metadata::wrapping(store, interrupt)?.is_some();
        if !is_encrypted && !store.is_sealed()? {
            let text = format!(
                "{} has neither {KEY_METADATA} nor {MANIFEST}, so it may not be a snapshot: remove it with rm -r",
                store.location()
            );
            return Err(Error::invalid_argument(text));
        }
        let found = store.survey(None, interrupt).and_then(crate::store::Survey::strict);
        found.map_err(|error| error.context(format!("cannot remove {}", store.location())))?;
        interrupt()?;
    }
    store.remove(interrupt)
}
