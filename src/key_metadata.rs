//! The file `enc_metadata` at the root of an encrypted snapshot: written with it, looked at, and opened.

use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::Path;

use crate::cipher::SecretKey;
use crate::error::{Error, Kind, Result};
use crate::fragment::folder;
use crate::key::{self, KeyWrapping};
use crate::name::KEY_METADATA;
use crate::options::SnapshotOptions;

/// How the data key of the snapshot at `root` is wrapped, none where the snapshot is plain. Nothing is opened with any key.
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let path = folder.path().join("vm1");
/// let options = vmsnap::SnapshotOptions::new().key(vmsnap::SecretKey::generate()?);
/// options.create(&path)?;
/// assert_eq!(vmsnap::key_wrapping(&path)?, Some(vmsnap::KeyWrapping::RawKey));
/// # Ok::<(), vmsnap::Error>(())
/// ```
///
/// # Errors
///
/// [`Error::is_io`] where there is no snapshot, [`Error::is_corrupt`] where `enc_metadata` is there and is no wrapped key.
pub fn key_wrapping(root: impl AsRef<Path>) -> Result<Option<KeyWrapping>> {
    let root = folder::absolute(root.as_ref())?;
    let wrapped = read(&root)?;
    wrapped.map(|wrapped| key::wrapping(&wrapped).map_err(|error| error.context(place(&root)))).transpose()
}

/// The data key of the snapshot at `root`, none where it is plain and may be.
pub(crate) fn unlock(root: &Path, options: &SnapshotOptions) -> Result<Option<SecretKey>> {
    match read(root)? {
        Some(wrapped) => {
            let payload = key::unwrap(&wrapped, options.key.as_ref()).map_err(|error| error.context(place(root)))?;
            Ok(Some(payload.data_key().clone()))
        }
        None if options.encrypt || options.key.is_some() => Err(Error::new(
            Kind::NotEncrypted,
            format!(
                "the snapshot {} is not encrypted, and was required to be (it has no {KEY_METADATA})",
                root.display()
            ),
        )),
        None => Ok(None),
    }
}

pub(crate) fn write(root: &Path, wrapped: &[u8]) -> Result<()> {
    let failed = |error: std::io::Error| Error::io(format!("cannot write {}", place(root)), error);
    let file = folder::create_file(&folder::open(root, "")?, KEY_METADATA).map_err(|errno| failed(errno.into()))?;
    file.write_all_at(wrapped, 0).map_err(failed)
}

/// The contents of `enc_metadata`, or none where the snapshot is plain.
fn read(root: &Path) -> Result<Option<Vec<u8>>> {
    let root_folder = folder::open(root, "")?;
    let place = place(root);
    let (file, size) = match folder::open_file(&root_folder, KEY_METADATA) {
        Ok(opened) => opened,
        Err(error) if error.raw_os_error() == Some(rustix::io::Errno::NOENT.raw_os_error()) => return Ok(None),
        // Whatever else is there, the snapshot does not count as plain.
        Err(error) => return Err(error.context(place)),
    };
    if size > key::MAX_KEY_METADATA_BYTES {
        return Err(Error::corrupt(format!("{place}: {size} bytes are too many for a wrapped key")));
    }
    let mut wrapped = Vec::new();
    file.take(size).read_to_end(&mut wrapped).map_err(|error| Error::io(format!("cannot read {place}"), error))?;
    Ok(Some(wrapped))
}

fn place(root: &Path) -> String {
    format!("{KEY_METADATA} of {}", root.display())
}
