//! A fragment being written.

use std::fmt;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use rustix::io::Errno;

use super::encrypted_sink::EncryptedSink;
use super::folder;
use super::ledger::Staging;
use super::lock::LockedRoot;
use super::place::FragmentPlace;
use super::plain::PlainSink;
use super::positioned::PositionedWriter;
use crate::cipher::SecretKey;
use crate::error::{Error, Kind, Result};
use crate::name::SnapshotPath;
use crate::process::OwnerProcess;
use crate::stored_file::StoredFile;
use crate::threads::Interrupt;

/// A fragment being written, front to back, by [`Write`].
///
/// A large write is encrypted and written by several threads, straight from the caller's buffer; small ones are gathered.
/// [`Fragment::finish`] ends it and tells whether all went well. Dropping it ends it as well, as in crosvm, but cannot
/// tell; dropped by a panic, its file is removed. A write that fails poisons the fragment: every later call fails, and its file is removed when it is closed or
/// dropped.
///
/// In a staged snapshot only `finish` ends it: dropped before, it makes the commit fail.
///
/// In a process forked from the one that opened it, every call fails and dropping does nothing.
pub struct Fragment {
    state: State,
    file: Arc<StoredFile>,
    folder: OwnedFd,
    staging: Staging,
    /// Held as long as something can be written.
    lock: Option<LockedRoot>,
    place: FragmentPlace,
    owner: OwnerProcess,
}

enum State {
    Open(Sink),
    Failed,
    Closed,
}

enum Sink {
    Plain(PlainSink),
    Encrypted(EncryptedSink),
}

/// How a fragment is to be written.
pub(crate) struct Writing<'a> {
    pub(crate) key: Option<&'a SecretKey>,
    pub(crate) chunk_size_bytes: usize,
    pub(crate) threads: usize,
    pub(crate) staging: Staging,
}

impl Fragment {
    pub(crate) fn create(root: &Path, path: &SnapshotPath, writing: &Writing<'_>) -> Result<Self> {
        let place = FragmentPlace::new(root, path);
        let (namespace, name) = path.split();
        let lock = LockedRoot::shared(root)?;
        let folder = folder::open_below(
            lock.folder().try_clone().map_err(|error| Error::io(format!("{place} cannot be created"), error))?,
            root,
            namespace,
        )?;
        let created = if writing.staging.is_staged() {
            folder::create_unfinished(&folder, name)
        } else {
            folder::create_file(&folder, name)
        };
        let file = created.map_err(|errno| {
            let reason = if errno == Errno::EXIST { "exists already" } else { "cannot be created" };
            Error::io(format!("{place} {reason}"), errno)
        })?;
        // Failed until it has begun: should that fail, dropping the fragment removes the file.
        let mut fragment = Self {
            state: State::Failed,
            file: Arc::new(StoredFile::new(file)),
            folder,
            staging: writing.staging.clone(),
            lock: Some(lock),
            place,
            owner: OwnerProcess::current(),
        };
        fragment.state = State::Open(fragment.sink(writing).map_err(|error| error.context(&fragment.place))?);
        Ok(fragment)
    }

    fn sink(&self, writing: &Writing<'_>) -> Result<Sink> {
        let file = Arc::clone(&self.file);
        let Writing { key, chunk_size_bytes, threads, .. } = *writing;
        Ok(match key {
            // In another process than that of the staged snapshot nobody would ask for the digest.
            None => Sink::Plain(PlainSink::new(file, writing.staging.ledger().is_some(), threads)),
            Some(key) => Sink::Encrypted(EncryptedSink::new(file, key, &self.place.path, chunk_size_bytes, threads)?),
        })
    }

    /// Plaintext bytes written so far.
    #[must_use]
    pub fn written(&self) -> u64 {
        match &self.state {
            State::Open(Sink::Plain(sink)) => sink.written(),
            State::Open(Sink::Encrypted(sink)) => sink.written(),
            State::Failed | State::Closed => 0,
        }
    }

    /// Takes `data` where that only means to remember it until more comes, and says whether it did.
    #[cfg(feature = "python")]
    pub(crate) fn gather(&mut self, data: &[u8]) -> bool {
        self.owner.is_current()
            && match &mut self.state {
                State::Open(Sink::Plain(sink)) => sink.gather(data),
                State::Open(Sink::Encrypted(sink)) => sink.gather(data),
                State::Failed | State::Closed => false,
            }
    }

    /// Writes all of `data`, and asks `interrupt` from time to time (not more often than every 50 ms) whether to go on.
    ///
    /// # Errors
    ///
    /// What `interrupt` returns, or [`Error::is_io`], for instance when the disk is full; both poison the fragment.
    /// [`Error::is_state`] where it was poisoned before, or in a forked process.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let writer = vmsnap::SnapshotWriter::new(folder.path().join("vm1"), false)?;
    /// let mut fragment = writer.raw_fragment("sda")?;
    /// let deadline = std::time::Instant::now() + std::time::Duration::from_secs(60);
    /// fragment.write_all_interruptible(&[0; 1 << 20], &mut || {
    ///     if std::time::Instant::now() < deadline { Ok(()) } else { Err(vmsnap::Error::interrupted()) }
    /// })?;
    /// fragment.finish()?;
    /// # Ok::<(), vmsnap::Error>(())
    /// ```
    pub fn write_all_interruptible(&mut self, data: &[u8], interrupt: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        let interrupt = &mut Interrupt::new(interrupt);
        self.with_sink(|sink| match sink {
            Sink::Plain(sink) => sink.write(data, interrupt),
            Sink::Encrypted(sink) => sink.write(data, interrupt),
        })
    }

    /// Whether writes leave no page of the file in the page cache.
    pub(crate) fn set_uncached(&self, uncached: bool) {
        self.file.set_uncached(uncached);
    }

    /// Bytes of its file.
    pub(crate) fn stored_size(&self) -> Result<u64> {
        let metadata =
            self.file.metadata().map_err(|error| Error::io("cannot be examined", error).context(&self.place))?;
        Ok(metadata.len())
    }

    /// Lets `work` write batches at their offsets, before anything else is written; it returns where they end. At least a
    /// byte has to be written after them, if there were any.
    pub(crate) fn write_positioned(&mut self, work: impl FnOnce(&PositionedWriter) -> Result<u64>) -> Result<()> {
        self.with_sink(|sink| {
            let positioned = match sink {
                Sink::Plain(sink) => sink.positioned(),
                Sink::Encrypted(sink) => sink.positioned(),
            };
            let positioned = positioned.ok_or_else(|| Error::new(Kind::State, "was begun already"))?;
            let end = work(&positioned)?;
            match sink {
                Sink::Plain(sink) => sink.continue_at(positioned, end),
                Sink::Encrypted(sink) => sink.continue_at(end),
            }
            Ok(())
        })
    }

    /// Ends the fragment: writes what was gathered, and the last segment.
    ///
    /// # Errors
    ///
    /// As for a write. The file is removed then.
    pub fn finish(mut self) -> Result<()> {
        self.finish_interruptible(&mut || Ok(()))
    }

    pub(crate) fn finish_interruptible(&mut self, interrupt: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        let interrupt = &mut Interrupt::new(interrupt);
        let mut entry = None;
        self.with_sink(|sink| {
            match sink {
                Sink::Plain(sink) => {
                    sink.flush()?;
                    entry = sink.entry();
                }
                Sink::Encrypted(sink) => {
                    sink.finish(interrupt)?;
                    entry = Some(sink.entry());
                }
            }
            Ok(())
        })?;
        self.file.drop_rest();
        if self.staging.is_staged() {
            // Failed until it is marked: what is not, no commit accepts.
            self.state = State::Failed;
            folder::mark_finished(&self.file)
                .map_err(|error| Error::io("cannot be finished", error).context(&self.place))?;
            if let (Some(ledger), Some(entry)) = (self.staging.ledger(), entry) {
                ledger.enter(self.place.path.as_str(), entry);
            }
        }
        self.state = State::Closed;
        self.lock = None;
        Ok(())
    }

    /// Gives the fragment up and removes its file.
    ///
    /// # Errors
    ///
    /// [`Error::is_io`] where the file cannot be removed, [`Error::is_state`] in a forked process.
    pub fn discard(mut self) -> Result<()> {
        self.remove()
    }

    /// Removes the file, in whatever state the fragment is.
    pub(crate) fn remove(&mut self) -> Result<()> {
        self.owner.check_fragment().map_err(|error| error.context(&self.place))?;
        self.state = State::Closed;
        if let Some(ledger) = self.staging.ledger() {
            ledger.strike_out(self.place.path.as_str());
        }
        let (_, name) = self.place.path.split();
        let removed = folder::remove_file(&self.folder, name, &self.file)
            .map_err(|error| Error::io(format!("{} cannot be removed", self.place), error));
        self.lock = None;
        removed
    }

    /// Ends a fragment that nobody finished and nobody gave up: it must not be taken for a whole one.
    pub(crate) fn abandon(&mut self) {
        if !self.staging.is_staged() {
            // Nobody is there to be told; what cannot be removed does not open either.
            let _ = self.remove();
        } else if self.owner.is_current() {
            // It stays, empty and marked as unfinished: the commit, be it in another process, is to fail.
            self.state = State::Closed;
            let _ = self.file.set_len(0);
            self.lock = None;
        }
    }

    /// Whether it is one of a staged snapshot.
    #[cfg(feature = "python")]
    pub(crate) fn is_staged(&self) -> bool {
        self.staging.is_staged()
    }

    #[cfg(feature = "python")]
    pub(crate) fn is_closed(&self) -> bool {
        matches!(self.state, State::Closed)
    }

    /// Bytes written so far, or why there can be no more.
    #[cfg(feature = "python")]
    pub(crate) fn position(&mut self) -> Result<u64> {
        self.with_sink(|_| Ok(()))?;
        Ok(self.written())
    }

    /// Poisons the fragment, as a write does that fails for `error`.
    #[cfg(feature = "python")]
    pub(crate) fn fail(&mut self, error: Error) -> Error {
        if matches!(self.state, State::Open(_)) {
            self.state = State::Failed;
            return error.context(&self.place);
        }
        error
    }

    /// Lets `work` use the sink, and poisons the fragment where that fails.
    fn with_sink(&mut self, work: impl FnOnce(&mut Sink) -> Result<()>) -> Result<()> {
        let result = self.owner.check_fragment().and_then(|()| {
            // Failed meanwhile, so that a panic in the middle leaves it so.
            match std::mem::replace(&mut self.state, State::Failed) {
                State::Open(mut sink) => {
                    work(&mut sink)?;
                    self.state = State::Open(sink);
                    Ok(())
                }
                State::Failed => {
                    Err(Error::new(Kind::State, "an earlier write failed; its file will be removed, write it anew"))
                }
                State::Closed => {
                    self.state = State::Closed;
                    Err(Error::new(Kind::State, "is closed"))
                }
            }
        });
        result.map_err(|error| error.context(&self.place))
    }
}

impl Write for Fragment {
    /// Takes all of `data`, always.
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.write_all_interruptible(data, &mut || Ok(()))?;
        Ok(data.len())
    }

    /// Hands what was gathered of a plain fragment to the operating system. An encrypted one cannot: a segment is written
    /// when it is full, and the last one by [`Fragment::finish`].
    fn flush(&mut self) -> io::Result<()> {
        self.with_sink(|sink| match sink {
            Sink::Plain(sink) => sink.flush(),
            Sink::Encrypted(_) => Ok(()),
        })?;
        Ok(())
    }
}

impl Drop for Fragment {
    fn drop(&mut self) {
        if !self.owner.is_current() {
            return;
        }
        // While a panic unwinds, what was written is only a part.
        let complete = match self.state {
            State::Closed => true,
            // A staged snapshot is complete or absent, and nobody said that this is complete.
            State::Open(_) if self.staging.is_staged() => false,
            State::Open(_) => !std::thread::panicking() && self.finish_interruptible(&mut || Ok(())).is_ok(),
            State::Failed => false,
        };
        if !complete {
            self.abandon();
        }
    }
}

impl fmt::Debug for Fragment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let state = match self.state {
            State::Open(_) => "open",
            State::Failed => "failed",
            State::Closed => "closed",
        };
        f.debug_struct("Fragment")
            .field("place", &self.place.to_string())
            .field("state", &state)
            .finish_non_exhaustive()
    }
}
