//! A fragment that is being written to a file.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Mutex;

use rustix::io::Errno;

use super::entries;
use super::lock::LockedRoot;
use super::{Directory, place_of};
use crate::error::{Error, Result};
use crate::name::SnapshotPath;
use crate::store::bytes::{NewObject, WriteAt};
use crate::stored_file::StoredFile;
use crate::threads::{Interrupt, lock};

/// A file that is being written. It holds the shared lock on the snapshot until it is finished, removed or abandoned.
pub(crate) struct NewFile {
    file: StoredFile,
    name: Box<str>,
    namespace: OwnedFd,
    staged: bool,
    lock: Mutex<Option<LockedRoot>>,
}

impl NewFile {
    /// Creates the file of a fragment. The file of a staged snapshot counts as unfinished until it is finished.
    pub(super) fn create(directory: &Directory, path: &SnapshotPath, staged: bool) -> Result<Self> {
        let root = directory.root();
        let failed = |reason: &str, error: io::Error| Error::io(format!("{} {reason}", place_of(path, root)), error);
        let (namespace, name) = path.split();
        let lock = LockedRoot::shared(root)?;
        let opened = lock.folder().try_clone().map_err(|error| failed("cannot be created", error))?;
        let namespace = entries::open_below(opened, root, namespace)?;
        let create = if staged { entries::create_unfinished } else { entries::create_readable };
        let file = create(&namespace, name).map_err(|errno| {
            failed(if errno == Errno::EXIST { "exists already" } else { "cannot be created" }, errno.into())
        })?;
        let (file, lock) = (StoredFile::new(file), Mutex::new(Some(lock)));
        Ok(Self { file, name: name.into(), namespace, staged, lock })
    }

    fn unlock(&self) {
        *lock(&self.lock) = None;
    }
}

impl WriteAt for NewFile {
    fn write_runs_at(&self, runs: &[&[u8]], offset: u64, interrupt: &mut Interrupt<'_>) -> Result<()> {
        self.file.write_runs_at(runs, offset, interrupt)
    }

    fn set_uncached(&self, uncached: bool) {
        self.file.set_uncached(uncached);
    }

    fn is_sparse(&self) -> bool {
        self.file.is_sparse()
    }
}

impl NewObject for NewFile {
    fn finish(&self, _interrupt: &mut Interrupt<'_>) -> Result<()> {
        self.file.drop_rest();
        if self.staged {
            entries::mark_finished(&self.file).map_err(|error| Error::io("cannot be finished", error))?;
        }
        self.unlock();
        Ok(())
    }

    fn discard(&self) -> Result<()> {
        let removed = entries::remove_file(&self.namespace, &self.name, &self.file);
        self.unlock();
        removed.map_err(|error| Error::io("cannot be removed", error))
    }

    fn abandon(&self) {
        if self.staged {
            // The file stays, empty and marked as unfinished, so that the commit fails, also in another process.
            let _ = self.file.set_len(0);
            self.unlock();
        } else {
            // If the file stays, it does not open.
            let _ = self.discard();
        }
    }

    fn unname(&self) -> Result<File> {
        let file = self.file.try_clone().map_err(|error| Error::io("cannot be opened", error))?;
        self.discard().map(|()| file)
    }

    fn stored_size(&self) -> Result<u64> {
        let metadata = self.file.metadata().map_err(|error| Error::io("cannot be examined", error))?;
        Ok(metadata.len())
    }

    fn set_size(&self, size: u64) -> Result<()> {
        self.file.set_len(size).map_err(|error| Error::io("cannot be written", error))
    }
}
