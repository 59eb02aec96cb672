//! The key metadata of an encrypted snapshot: unwraps and replaces it.

use std::fmt;
use std::path::Path;

use super::{SnapshotOptions, open_manifest};
use crate::cipher::wipe_stack;
use crate::error::{Error, Kind, Result};
use crate::key::{self, KeyPayload, KeyWrapping};
use crate::location::Location;
use crate::name::KEY_METADATA;
use crate::store::{Head, Store};

/// Returns how the data key of a snapshot is wrapped, or `None` if it is not encrypted. No key is used.
pub(crate) fn wrapping(store: &Store, interrupt: &mut dyn FnMut() -> Result<()>) -> Result<Option<KeyWrapping>> {
    let wrapped = store.head(interrupt)?.key_metadata?;
    wrapped.map(|wrapped| key::wrapping(&wrapped).map_err(|error| error.context(place(store.location())))).transpose()
}

/// The files at the root of a snapshot, and its key.
pub(crate) struct Unlocked {
    /// `None` if the snapshot is not encrypted and need not be.
    pub(crate) payload: Option<KeyPayload>,
    /// The stored manifest.
    pub(crate) manifest: Result<Option<Vec<u8>>>,
}

impl Unlocked {
    /// Reads the files at the root, and unwraps the key.
    pub(crate) fn open(
        store: &Store,
        options: &SnapshotOptions,
        interrupt: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Self> {
        // Checked for a plain snapshot too, so that a wrong argument is reported at once.
        options.credentials.unwrapper()?;
        let Head { key_metadata, manifest } = store.head(interrupt)?;
        Ok(Self { payload: unlock(store.location(), key_metadata?, options, interrupt)?, manifest })
    }
}

/// Unwraps the key metadata of the snapshot at `location`. Returns `None` if there is no
/// key metadata and the snapshot need not be encrypted.
pub(crate) fn unlock(
    location: &dyn fmt::Display,
    key_metadata: Option<Vec<u8>>,
    options: &SnapshotOptions,
    interrupt: &mut dyn FnMut() -> Result<()>,
) -> Result<Option<KeyPayload>> {
    match key_metadata {
        Some(wrapped) => {
            let payload = options.credentials.unwrapper()?.unwrap(&wrapped, interrupt);
            wipe_stack();
            payload.map(Some).map_err(|error| error.context(place(location)))
        }
        None if options.is_encrypted() => Err(plain(location)),
        None => Ok(None),
    }
}

/// Replaces the key of the snapshot at `location`: unwraps its data key with `old`, and wraps it with the key of `new`,
/// or for the user's own identity if `new` has only [`SnapshotOptions::encrypt`]. Only `enc_metadata` is replaced, so
/// this takes no longer for a larger snapshot; after a crash it is the old or the new one.
///
/// The previous key no longer opens the snapshot. This does not revoke access: the data key stays the same, so anyone
/// who has opened the snapshot, or kept a copy of `enc_metadata`, can still read its fragments and forge them. To lock
/// somebody out, copy the snapshot into a new one.
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let path = folder.path().join("vm1");
/// let old = vmsnap::SnapshotOptions::new().key(vmsnap::SecretKey::generate()?);
/// old.create_in_place(&path)?.write_fragment("clock", &12_u64)?;
/// let new = vmsnap::SnapshotOptions::new().key(vmsnap::SecretKey::generate()?);
/// vmsnap::rekey(&path, &old, &new)?;
/// assert_eq!(new.open(&path)?.read_fragment::<u64>("clock")?, 12);
/// assert!(old.open(&path).unwrap_err().is_authentication());
/// # Ok::<(), vmsnap::Error>(())
/// ```
///
/// # Errors
///
/// [`Error::is_not_encrypted`] if the snapshot is not encrypted, [`Error::is_invalid_argument`] if `new` has no key,
/// the errors of [`SnapshotOptions::open`] with `old`, and the errors of [`SnapshotOptions::create`] with the key of
/// `new`. After an error the snapshot is unchanged.
pub fn rekey(location: impl AsRef<Path>, old: &SnapshotOptions, new: &SnapshotOptions) -> Result<()> {
    rekey_interruptible(location, old, new, &mut || Ok(()))
}

/// Replaces a snapshot's key as [`rekey`] does, and calls `interrupt` while that takes time.
pub(crate) fn rekey_interruptible(
    location: impl AsRef<Path>,
    old: &SnapshotOptions,
    new: &SnapshotOptions,
    interrupt: &mut dyn FnMut() -> Result<()>,
) -> Result<()> {
    if !new.is_encrypted() {
        return Err(Error::invalid_argument(
            "no new key was given: pass recipients, a key, a passphrase or a key provider",
        ));
    }
    let store = Store::at(Location::new(location.as_ref())?, &old.remote)?;
    let location = store.location();
    let (unwrapper, wrapper) = (old.credentials.unwrapper()?, new.credentials.wrapper()?);
    let Head { key_metadata, manifest } = store.head(interrupt)?;
    let wrapped = key_metadata?.ok_or_else(|| {
        let text = format!(
            "the snapshot {location} is not encrypted (it has no {KEY_METADATA}), so it has no key to change; \
             copy it into an encrypted snapshot (vmsnap encrypt)"
        );
        Error::new(Kind::NotEncrypted, text)
    })?;
    let context = |error: Error| error.context(place(location));
    let payload = unwrapper.unwrap(&wrapped, interrupt).map_err(context)?;
    if let Store::Archive(archive) = &store
        && let Some((manifest, _)) = open_manifest::decode(location, manifest?, Some(&payload))?
    {
        // The whole file is replaced, so it should be whole.
        archive.settle(&manifest)?;
    }
    let wrapped = wrapper.wrap(&payload, interrupt);
    wipe_stack();
    let wrapped = wrapped.map_err(context)?;
    interrupt()?;
    store.replace_key_metadata(&wrapped, interrupt)
}

fn plain(location: &dyn fmt::Display) -> Error {
    let text = format!(
        "the snapshot {location} is not encrypted (it has no {KEY_METADATA}), but encryption is required or a key was \
         given"
    );
    Error::new(Kind::NotEncrypted, text)
}

fn place(location: &dyn fmt::Display) -> String {
    format!("{KEY_METADATA} of {location}")
}
