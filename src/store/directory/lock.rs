//! The lock on a snapshot's directory: `flock` on the root.
//!
//! Every open fragment holds it shared, in all processes; sealing, committing and cleaning hold it exclusively. The
//! lock ends with its process, also after a crash. On network file systems it reaches only its own host
//! (`file_system.rs`).

use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use super::entries;
use super::file_system::{self, Locking};
use crate::error::{Error, Kind, Result};
use crate::name::MANIFEST;
use crate::process::OwnerProcess;

/// The longest time for which a running process may lose its lock; in practice microseconds.
const SETTLING: Duration = Duration::from_millis(20);

/// The root of a snapshot, open and locked.
pub(crate) struct LockedRoot {
    folder: OwnedFd,
    owner: OwnerProcess,
}

impl LockedRoot {
    /// Locks the root for a change, together with other processes that change it.
    pub(crate) fn shared(root: &Path) -> Result<Self> {
        let locked = Self::shared_even_sealed(root)?;
        check_unsealed(root, &locked.folder)?;
        Ok(locked)
    }

    /// Locks the root shared, also of a sealed snapshot: for a change of the key's wrapping.
    pub(crate) fn shared_even_sealed(root: &Path) -> Result<Self> {
        let locked = Self { folder: entries::open(root, "")?, owner: OwnerProcess::current() };
        match flock(&locked.folder, FlockOperation::NonBlockingLockShared) {
            Err(Errno::WOULDBLOCK) => {
                let text =
                    format!("the snapshot {} is being sealed or cleaned up at this moment; try again", root.display());
                Err(Error::new(Kind::State, text))
            }
            // Without locks (on some network file systems) the caller is responsible.
            Ok(()) | Err(_) => Ok(locked),
        }
    }

    /// Locks the root exclusively: no other process may write into the snapshot.
    pub(crate) fn exclusive(root: &Path) -> Result<Self> {
        let locked = Self { folder: entries::open(root, "")?, owner: OwnerProcess::current() };
        locked.take_alone(root)?;
        check_unsealed(root, &locked.folder)?;
        Ok(locked)
    }

    /// Turns a shared lock into the exclusive one.
    pub(crate) fn take_alone(&self, root: &Path) -> Result<()> {
        match flock(&self.folder, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) => {
                // The attempt has released the shared lock.
                self.share();
                let text = format!(
                    "the snapshot {} is still being written: finish all its fragments first, in other processes too",
                    root.display()
                );
                Err(Error::new(Kind::State, text))
            }
            Ok(()) | Err(_) => Ok(()),
        }
    }

    /// Turns the exclusive lock into a shared one: others may write again.
    pub(crate) fn share(&self) {
        let _ = flock(&self.folder, FlockOperation::NonBlockingLockShared);
    }

    /// Locks the directory of a new staged snapshot; `None` if `clean` removed it before the lock.
    pub(crate) fn of_new(root: &Path) -> Result<Option<Self>> {
        let folder = match entries::open(root, "") {
            Ok(folder) => folder,
            Err(error) if error.is_not_found() => return Ok(None),
            Err(error) => return Err(error),
        };
        // This waits: `clean` holds the lock only for a moment, to check whether the directory is abandoned.
        let _ = rustix::io::retry_on_intr(|| flock(&folder, FlockOperation::LockShared));
        let locked = Self { folder, owner: OwnerProcess::current() };
        Ok(entries::is_at(&locked.folder, root).then_some(locked))
    }

    /// Locks an abandoned directory exclusively; `None` if a process uses it.
    pub(crate) fn abandoned(root: &Path) -> Result<Option<Self>> {
        let locked = Self { folder: entries::open(root, "")?, owner: OwnerProcess::current() };
        let unknown = |why: &str| {
            let text = format!("cannot tell whether {} is in use: {why}", root.display());
            Error::new(Kind::State, text)
        };
        match file_system::locking(&locked.folder) {
            Ok(Locking::AllWriters) => {}
            Ok(Locking::ThisHost(name)) => {
                return Err(unknown(&format!(
                    "it is on {name}, where a lock does not reach other hosts; when no host writes there, remove \
                     .vmsnap-* by hand"
                )));
            }
            Err(errno) => return Err(unknown(&format!("the type of its file system is unknown ({errno})"))),
        }
        let lock = || flock(&locked.folder, FlockOperation::NonBlockingLockExclusive);
        // Twice, with a pause: a running process does not have its lock for an instant after it made the directory, and
        // after a refused commit.
        let held = lock().and_then(|()| {
            let _ = flock(&locked.folder, FlockOperation::Unlock);
            std::thread::sleep(SETTLING);
            lock()
        });
        match held {
            Ok(()) => Ok(Some(locked)),
            Err(Errno::WOULDBLOCK) => Ok(None),
            Err(errno) => Err(unknown(&format!("its file system has no locks ({errno})"))),
        }
    }

    pub(crate) fn folder(&self) -> &OwnedFd {
        &self.folder
    }
}

impl Drop for LockedRoot {
    /// Unlocks explicitly: if a forked child has a copy of the descriptor, closing ours would not unlock.
    fn drop(&mut self) {
        if self.owner.is_current() {
            let _ = flock(&self.folder, FlockOperation::Unlock);
        }
    }
}

/// Refuses a sealed snapshot, which must not change.
pub(crate) fn check_unsealed(root: &Path, folder: &OwnedFd) -> Result<()> {
    if !entries::exists(folder, MANIFEST)? {
        return Ok(());
    }
    let text = format!(
        "the snapshot {} is already sealed (it has a {MANIFEST}): nothing can be added to it; write a new snapshot",
        root.display()
    );
    Err(Error::new(Kind::Sealed, text))
}
