//! What reaches the disk, and what a file system that cannot promise that is taken to mean.

use std::fs::File;
use std::os::fd::AsFd;

use rustix::fs::fsync;
use rustix::io::Errno;

use crate::error::{Error, Result};

/// Syncs a file. There is no durable snapshot where that fails.
pub(crate) fn sync_file(file: &File) -> Result<()> {
    fsync(file).map_err(|errno| {
        let text = if cannot_sync(errno) {
            "its file system cannot sync files, and can hold only what is written without (durable=False, --no-durable)"
        } else {
            "it may not have reached the disk"
        };
        Error::io(text, errno)
    })
}

/// Syncs the names in a directory, as far as its file system can.
///
/// Some cannot (CIFS, vboxsf, virtiofs and 9p of old), and see to names in their own time. That is no reason to give up what was
/// written and synced itself: `PostgreSQL` (`fsync_fname`) and `SQLite` (`unixSync`) go on as well.
pub(crate) fn sync_directory(directory: impl AsFd) -> std::result::Result<(), Errno> {
    match fsync(directory) {
        Err(errno) if cannot_sync(errno) => Ok(()),
        synced => synced,
    }
}

/// Whether a file system says that it does not know how to sync this, and not that it failed.
fn cannot_sync(errno: Errno) -> bool {
    matches!(errno, Errno::INVAL | Errno::NOTSUP | Errno::BADF | Errno::NOSYS)
}
