//! Who uses a snapshot's folder now: `flock` on the root.
//!
//! Every fragment being written holds it shared, in whatever process; sealing, committing and cleaning take it alone. A lock
//! goes with its process, however that ends. On network file systems it does not reach beyond its host (`file_system.rs`).

use std::os::fd::OwnedFd;
use std::path::Path;
use std::time::Duration;

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use super::file_system::{self, Locking};
use super::folder;
use crate::error::{Error, Kind, Result};
use crate::name::MANIFEST;
use crate::process::OwnerProcess;

/// How long a living process may be without its lock; in fact some microseconds.
const SETTLING: Duration = Duration::from_millis(20);

/// The root of a snapshot, open and locked.
pub(crate) struct LockedRoot {
    folder: OwnedFd,
    owner: OwnerProcess,
}

impl LockedRoot {
    /// The root of a snapshot that is to be changed, along with others that do so.
    pub(crate) fn shared(root: &Path) -> Result<Self> {
        let locked = Self::shared_even_sealed(root)?;
        check_unsealed(root, &locked.folder)?;
        Ok(locked)
    }

    /// The same where only the key's wrapping changes, which a sealed snapshot allows.
    pub(crate) fn shared_even_sealed(root: &Path) -> Result<Self> {
        let locked = Self { folder: folder::open(root, "")?, owner: OwnerProcess::current() };
        match flock(&locked.folder, FlockOperation::NonBlockingLockShared) {
            Err(Errno::WOULDBLOCK) => {
                let text = format!("the snapshot {} is just being sealed or cleaned away", root.display());
                Err(Error::new(Kind::State, text))
            }
            // Where the file system has no locks (some network ones) it is for the caller to see to it.
            Ok(()) | Err(_) => Ok(locked),
        }
    }

    /// The root of a snapshot that nobody else may be writing into.
    pub(crate) fn exclusive(root: &Path) -> Result<Self> {
        let locked = Self { folder: folder::open(root, "")?, owner: OwnerProcess::current() };
        locked.take_alone(root)?;
        check_unsealed(root, &locked.folder)?;
        Ok(locked)
    }

    /// Makes a shared lock the only one.
    pub(crate) fn take_alone(&self, root: &Path) -> Result<()> {
        match flock(&self.folder, FlockOperation::NonBlockingLockExclusive) {
            Err(Errno::WOULDBLOCK) => {
                // What was held is lost by the attempt.
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

    /// Lets others write again.
    pub(crate) fn share(&self) {
        let _ = flock(&self.folder, FlockOperation::NonBlockingLockShared);
    }

    /// The root that was just made to be staged in; none where `clean` was faster than the lock.
    pub(crate) fn of_new(root: &Path) -> Result<Option<Self>> {
        let folder = match folder::open(root, "") {
            Ok(folder) => folder,
            Err(error) if error.is_not_found() => return Ok(None),
            Err(error) => return Err(error),
        };
        // Waits: whoever looks whether it is abandoned holds it for a moment only.
        let _ = rustix::io::retry_on_intr(|| flock(&folder, FlockOperation::LockShared));
        let locked = Self { folder, owner: OwnerProcess::current() };
        Ok(folder::is_at(&locked.folder, root).then_some(locked))
    }

    /// A folder that nobody uses; none where somebody does.
    pub(crate) fn abandoned(root: &Path) -> Result<Option<Self>> {
        let locked = Self { folder: folder::open(root, "")?, owner: OwnerProcess::current() };
        let unknown = |why: &str| {
            let text = format!("whether somebody uses {} cannot be known: {why}", root.display());
            Error::new(Kind::State, text)
        };
        match file_system::locking(&locked.folder) {
            Ok(Locking::AllWriters) => {}
            Ok(Locking::ThisHost(name)) => {
                return Err(unknown(&format!(
                    "it lies on {name}, where a lock tells nothing of writers on other hosts; when none of them writes \
                     there, remove .vmsnap-* by hand"
                )));
            }
            Err(errno) => return Err(unknown(&format!("its file system cannot be asked what it is ({errno})"))),
        }
        let lock = || flock(&locked.folder, FlockOperation::NonBlockingLockExclusive);
        // Twice, a while apart: a living process is without its lock for an instant when it has just made the folder, and
        // when a commit was refused.
        let held = lock().and_then(|()| {
            let _ = flock(&locked.folder, FlockOperation::Unlock);
            std::thread::sleep(SETTLING);
            lock()
        });
        match held {
            Ok(()) => Ok(Some(locked)),
            Err(Errno::WOULDBLOCK) => Ok(None),
            Err(errno) => Err(unknown(&format!("no locks there ({errno})"))),
        }
    }

    pub(crate) fn folder(&self) -> &OwnedFd {
        &self.folder
    }
}

impl Drop for LockedRoot {
    /// Said out loud: a forked child may have a copy of the descriptor, and closing ours would not unlock.
    fn drop(&mut self) {
        if self.owner.is_current() {
            let _ = flock(&self.folder, FlockOperation::Unlock);
        }
    }
}

/// Refuses a sealed snapshot, which must not change.
pub(crate) fn check_unsealed(root: &Path, folder: &OwnedFd) -> Result<()> {
    if !folder::exists(folder, MANIFEST)? {
        return Ok(());
    }
    let text = format!(
        "cannot change the snapshot {}: it is sealed (it has a {MANIFEST}); write a new snapshot",
        root.display()
    );
    Err(Error::new(Kind::Sealed, text))
}
