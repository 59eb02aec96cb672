//! Syncing files and directories, and file systems that cannot sync them.

use std::fs::File;
use std::os::fd::AsFd;

use rustix::fs::fsync;
use rustix::io::Errno;

use crate::error::{Error, Result};

/// Syncs a file. If that fails, the snapshot is not durable.
pub(crate) fn sync_file(file: &File) -> Result<()> {
    fsync(file).map_err(|errno| {
        let text = if cannot_sync(errno) {
            "its file system cannot sync files; write without syncing (durable=False, --no-durable)"
        } else {
            "it may not have reached the disk"
        };
        Error::io(text, errno)
    })
}

/// Syncs the names in a directory, if its file system can.
///
/// Some cannot (CIFS, vboxsf, old versions of virtiofs and 9p). The files themselves are synced, so this is not an
/// error; `PostgreSQL` (`fsync_fname`) and `SQLite` (`unixSync`) continue in this case, too.
pub(crate) fn sync_directory(directory: impl AsFd) -> std::result::Result<(), Errno> {
    match fsync(directory) {
        Err(errno) if cannot_sync(errno) => Ok(()),
        synced => synced,
    }
}

/// Whether the errno means that the file system does not support the sync, not that the sync failed.
fn cannot_sync(errno: Errno) -> bool {
    matches!(errno, Errno::INVAL | Errno::NOTSUP | Errno::BADF | Errno::NOSYS)
}
