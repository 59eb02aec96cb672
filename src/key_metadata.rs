//! The file `enc_metadata` at the root of an encrypted snapshot: writing, inspecting, unwrapping and replacing it.

use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::cipher::wipe_stack;
use crate::error::{Error, Kind, Result};
use crate::fragment::folder;
use crate::fragment::lock::LockedRoot;
use crate::key::{self, KeyPayload, KeyWrapping};
use crate::name::KEY_METADATA;
use crate::options::SnapshotOptions;

/// Returns how the data key of the snapshot at `root` is wrapped, or `None` if it is not encrypted. No key is used.
pub(crate) fn wrapping(root: &Path) -> Result<Option<KeyWrapping>> {
    let wrapped = read(root)?;
    wrapped.map(|wrapped| key::wrapping(&wrapped).map_err(|error| error.context(place(root)))).transpose()
}

/// Unwraps `enc_metadata` of the snapshot at `root`. Returns `None` if the snapshot is not encrypted and need not be.
pub(crate) fn unlock(
    root: &Path,
    options: &SnapshotOptions,
    interrupt: &mut dyn FnMut() -> Result<()>,
) -> Result<Option<KeyPayload>> {
    // Checked for a plain snapshot too, so that a wrong argument is reported at once.
    options.credentials.unwrapper()?;
    match read(root)? {
        Some(wrapped) => {
            let payload = options.credentials.unwrapper()?.unwrap(&wrapped, interrupt);
            wipe_stack();
            payload.map(Some).map_err(|error| error.context(place(root)))
        }
        None if options.is_encrypted() => Err(plain(root)),
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
    let location = &folder::absolute(location.as_ref())?;
    let (unwrapper, wrapper) = (old.credentials.unwrapper()?, new.credentials.wrapper()?);
    let wrapped = read(location)?.ok_or_else(|| {
        let text = format!(
            "the snapshot {} is not encrypted (it has no {KEY_METADATA}), so it has no key to change; \
             copy it into an encrypted snapshot (vmsnap encrypt)",
            location.display()
        );
        Error::new(Kind::NotEncrypted, text)
    })?;
    let context = |error: Error| error.context(place(location));
    let payload = unwrapper.unwrap(&wrapped, interrupt).map_err(context)?;
    let wrapped = wrapper.wrap(&payload, interrupt);
    wipe_stack();
    let wrapped = wrapped.map_err(context)?;
    interrupt()?;
    replace(location, &wrapped, &mut || ())
}

/// Replaces the contents of `enc_metadata`. `between` is called between the steps, for tests.
fn replace(root: &Path, wrapped: &[u8], between: &mut dyn FnMut()) -> Result<()> {
    let locked = LockedRoot::shared_even_sealed(root)?;
    folder::place_file(locked.folder(), KEY_METADATA, wrapped, true, true, between)
        .map_err(|error| error.context(format!("cannot replace {}", place(root))))
}

fn plain(root: &Path) -> Error {
    let text = format!(
        "the snapshot {} is not encrypted (it has no {KEY_METADATA}), but encryption is required or a key was given",
        root.display()
    );
    Error::new(Kind::NotEncrypted, text)
}

pub(crate) fn write(root: &Path, wrapped: &[u8]) -> Result<()> {
    let failed = |error: std::io::Error| Error::io(format!("cannot write {}", place(root)), error);
    let file = folder::create_file(&folder::open(root, "")?, KEY_METADATA).map_err(|errno| failed(errno.into()))?;
    file.write_all_at(wrapped, 0).map_err(failed)
}

/// Returns the contents of `enc_metadata`, or `None` if the file does not exist: the snapshot is plain.
pub(crate) fn read(root: &Path) -> Result<Option<Vec<u8>>> {
    // Anything but a file, such as a link, is an error: the snapshot must not count as plain.
    folder::read_small(&folder::open(root, "")?, KEY_METADATA, key::MAX_KEY_METADATA_BYTES)
        .map_err(|error| error.context(place(root)))
}

fn place(root: &Path) -> String {
    format!("{KEY_METADATA} of {}", root.display())
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::replace;

    /// Set in the child: the snapshot, and the number of steps after which the child aborts.
    const ROOT: &str = "VMSNAP_TEST_REPLACE_ROOT";
    const STEPS: &str = "VMSNAP_TEST_REPLACE_STEPS";

    #[test]
    fn killed_between_any_two_steps_it_is_the_old_or_the_new() {
        if let Some(root) = std::env::var_os(ROOT) {
            let mut left: u32 = std::env::var(STEPS).unwrap().parse().unwrap();
            replace(root.as_ref(), b"new", &mut || {
                // Like SIGKILL, `abort` runs no cleanup.
                left = left.checked_sub(1).unwrap_or_else(|| std::process::abort());
            })
            .unwrap();
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("enc_metadata");
        let mut contents = Vec::new();
        for steps in 0.. {
            std::fs::write(&path, b"old").unwrap();
            let done = Command::new(std::env::current_exe().unwrap())
                .args(["--exact", "key_metadata::tests::killed_between_any_two_steps_it_is_the_old_or_the_new"])
                .env(ROOT, folder.path())
                .env(STEPS, steps.to_string())
                .output()
                .unwrap();
            contents.push(String::from_utf8(std::fs::read(&path).unwrap()).unwrap());
            for entry in std::fs::read_dir(folder.path()).unwrap() {
                let name = entry.unwrap().file_name().into_string().unwrap();
                assert!(name == "enc_metadata" || name.starts_with(".vmsnap-"), "{name}");
            }
            if done.status.success() {
                break;
            }
        }
        assert_eq!(contents, ["old", "old", "old", "new", "new"]);
        // Leftover temporary files do not prevent the next replacement.
        replace(folder.path(), b"newer", &mut || ()).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"newer");
    }
}
