//! `Fragment`: a fragment being written.

use std::fmt;
use std::io::{self, Write};
use std::sync::Arc;

use super::encrypted_sink::EncryptedSink;
use super::ledger::Ledger;
use super::place::{FragmentPlace, aad};
use super::plain::PlainSink;
use super::positioned::PositionedWriter;
use super::scratch::ScratchWriter;
use crate::cipher::{SecretKey, most_stored_bytes};
use crate::error::{Error, Kind, Result};
use crate::name::SnapshotPath;
use crate::process::OwnerProcess;
use crate::store::Draft;
use crate::store::bytes::{NewObject, WriteAt};
use crate::threads::Interrupt;

/// A fragment being written, front to back, with [`Write`].
///
/// Several threads encrypt and write a large write, directly from the caller's buffer; small writes are gathered.
///
/// [`Fragment::finish`] completes the fragment and reports errors. A drop completes it too, as in crosvm, but cannot
/// report an error. In a staged snapshot only `finish` completes it: after a drop, the commit fails.
///
/// A failed write poisons the fragment: every later call fails, and its file is removed when the fragment is closed or
/// dropped. Its file is also removed if a panic drops it.
///
/// In a process that was forked after the opening, every call fails and a drop does nothing.
pub struct Fragment {
    state: State,
    object: Arc<dyn NewObject>,
    /// Whether the snapshot is complete or absent.
    staged: bool,
    ledger: Option<Arc<Ledger>>,
    place: FragmentPlace,
    owner: OwnerProcess,
}

enum State {
    Open(Sink),
    Failed,
    Closed,
}

pub(super) enum Sink {
    Plain(PlainSink),
    Encrypted(EncryptedSink),
}

/// The options for writing a fragment.
pub(crate) struct Writing<'a> {
    pub(crate) key: Option<&'a SecretKey>,
    pub(crate) chunk_size_bytes: usize,
    pub(crate) threads: usize,
    /// The most bytes of contents, if that is known.
    pub(crate) most_bytes: Option<u64>,
    /// Where a commit finds the entry of the fragment; only in the process that staged the snapshot.
    pub(crate) ledger: Option<&'a Arc<Ledger>>,
}

impl Writing<'_> {
    /// The most bytes that are stored.
    fn most_stored_bytes(&self) -> Option<u64> {
        let most_bytes = self.most_bytes?;
        match self.key {
            None => Some(most_bytes),
            Some(_) => most_stored_bytes(most_bytes, self.chunk_size_bytes),
        }
    }
}

impl Fragment {
    pub(crate) fn create(draft: &Draft, path: &SnapshotPath, writing: &Writing<'_>) -> Result<Self> {
        let place = FragmentPlace::new(draft.location(), path);
        // Failed for now: if the sink cannot be made, the drop removes the object.
        let mut fragment = Self {
            state: State::Failed,
            object: draft.create(path, writing.most_stored_bytes())?,
            staged: draft.is_staged(),
            ledger: writing.ledger.cloned(),
            place,
            owner: OwnerProcess::current(),
        };
        fragment.state = State::Open(fragment.sink(writing).map_err(|error| error.context(&fragment.place))?);
        Ok(fragment)
    }

    fn sink(&self, writing: &Writing<'_>) -> Result<Sink> {
        let go_on = &mut || Ok(());
        let object: Arc<dyn WriteAt> = Arc::<dyn NewObject>::clone(&self.object);
        let interrupt = &mut Interrupt::new(go_on);
        let Writing { key, chunk_size_bytes, threads, .. } = *writing;
        Ok(match key {
            // Only the process that staged the snapshot needs the digest.
            None => Sink::Plain(PlainSink::new(object, writing.ledger.is_some(), threads)),
            Some(key) => {
                let aad = aad(&self.place.path);
                Sink::Encrypted(EncryptedSink::new(object, key, &aad, chunk_size_bytes, threads, interrupt)?)
            }
        })
    }

    /// The number of plaintext bytes written so far.
    #[must_use]
    pub fn written(&self) -> u64 {
        match &self.state {
            State::Open(Sink::Plain(sink)) => sink.written(),
            State::Open(Sink::Encrypted(sink)) => sink.written(),
            State::Failed | State::Closed => 0,
        }
    }

    /// Gathers `data` if there is room for it; returns whether there was.
    #[cfg(feature = "python")]
    pub(crate) fn gather(&mut self, data: &[u8]) -> bool {
        self.owner.is_current()
            && match &mut self.state {
                State::Open(Sink::Plain(sink)) => sink.gather(data),
                State::Open(Sink::Encrypted(sink)) => sink.gather(data),
                State::Failed | State::Closed => false,
            }
    }

    /// Writes all of `data`, and calls `interrupt` from time to time, at most every 50 ms. If it returns an error, the
    /// write stops.
    ///
    /// # Errors
    ///
    /// The error of `interrupt`, or [`Error::is_io`], for example if the disk is full; both poison the fragment.
    /// [`Error::is_state`] if the fragment is poisoned, or in a forked process.
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
        self.append(data, &mut Interrupt::new(interrupt))
    }

    pub(crate) fn append(&mut self, data: &[u8], interrupt: &mut Interrupt<'_>) -> Result<()> {
        self.with_sink(|sink| match sink {
            Sink::Plain(sink) => sink.write(data, interrupt),
            Sink::Encrypted(sink) => sink.write(data, interrupt),
        })
    }

    /// Lets other threads do the work of small writes, before anything is written: encrypt, hash and write. An error of
    /// them is returned later.
    pub(crate) fn write_behind(&mut self) {
        // An encrypted fragment always does.
        if let State::Open(Sink::Plain(sink)) = &mut self.state {
            sink.write_behind();
        }
    }

    /// Removes the fragment. Its bytes so far are the beginning of the returned scratch file, which more bytes can be
    /// appended to. `key` is the key of the snapshot.
    pub(crate) fn into_scratch(
        mut self,
        key: Option<&SecretKey>,
        interrupt: &mut Interrupt<'_>,
    ) -> Result<ScratchWriter> {
        let scratch = self.take_as_scratch(key, interrupt);
        if scratch.is_err() {
            // The first error is the reason.
            let _ = self.remove();
        }
        scratch
    }

    fn take_as_scratch(&mut self, key: Option<&SecretKey>, interrupt: &mut Interrupt<'_>) -> Result<ScratchWriter> {
        self.with_sink(|sink| match sink {
            Sink::Plain(sink) => sink.forget_digest(interrupt),
            Sink::Encrypted(_) => Ok(()),
        })?;
        let file = self.object.unname().map_err(|error| error.context(&self.place))?;
        let State::Open(sink) = std::mem::replace(&mut self.state, State::Closed) else {
            return Err(Error::new(Kind::State, "is not open").context(&self.place));
        };
        Ok(ScratchWriter::over(sink, file, key.map(|key| (key.clone(), aad(&self.place.path)))))
    }

    /// Whether writes leave no page of the file in the page cache.
    pub(crate) fn set_uncached(&self, uncached: bool) {
        self.object.set_uncached(uncached);
    }

    /// The number of bytes that are stored so far.
    pub(crate) fn stored_size(&self) -> Result<u64> {
        self.object.stored_size().map_err(|error| error.context(&self.place))
    }

    /// Lets `work` write batches at their offsets, before anything else is written; `work` returns the end of the
    /// batches. If there are any, at least one byte must be written after them.
    pub(crate) fn write_positioned(&mut self, work: impl FnOnce(&PositionedWriter) -> Result<u64>) -> Result<()> {
        self.with_sink(|sink| {
            let positioned = match sink {
                Sink::Plain(sink) => sink.positioned(),
                Sink::Encrypted(sink) => sink.positioned(),
            };
            let positioned = positioned.ok_or_else(|| Error::new(Kind::State, "was already written to"))?;
            let end = work(&positioned)?;
            match sink {
                Sink::Plain(sink) => sink.continue_at(&positioned, end),
                Sink::Encrypted(sink) => sink.continue_at(end),
            }
            Ok(())
        })
    }

    /// Completes the fragment: writes the gathered bytes and the last segment.
    ///
    /// # Errors
    ///
    /// The errors of a write. After an error, the file is removed.
    pub fn finish(mut self) -> Result<()> {
        self.finish_interruptible(&mut || Ok(()))
    }

    pub(crate) fn finish_interruptible(&mut self, interrupt: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        let interrupt = &mut Interrupt::new(interrupt);
        let mut entry = None;
        self.with_sink(|sink| {
            match sink {
                Sink::Plain(sink) => {
                    sink.flush(interrupt)?;
                    entry = sink.entry();
                }
                Sink::Encrypted(sink) => {
                    sink.finish(interrupt)?;
                    entry = Some(sink.entry());
                }
            }
            Ok(())
        })?;
        // Failed until the object is finished: no commit accepts it before that.
        self.state = State::Failed;
        self.object.finish(interrupt).map_err(|error| error.context(&self.place))?;
        if let (Some(ledger), Some(entry)) = (&self.ledger, entry) {
            ledger.enter(self.place.path.as_str(), entry);
        }
        self.state = State::Closed;
        Ok(())
    }

    /// Discards the fragment and removes its file.
    ///
    /// # Errors
    ///
    /// [`Error::is_io`] if the file cannot be removed, [`Error::is_state`] in a forked process.
    pub fn discard(mut self) -> Result<()> {
        self.remove()
    }

    /// Removes the file, in any state of the fragment.
    pub(crate) fn remove(&mut self) -> Result<()> {
        self.owner.check_fragment().map_err(|error| error.context(&self.place))?;
        self.state = State::Closed;
        if let Some(ledger) = &self.ledger {
            ledger.strike_out(self.place.path.as_str());
        }
        self.object.discard().map_err(|error| error.context(&self.place))
    }

    /// Closes a fragment that was neither finished nor discarded, so that it does not count as complete.
    pub(crate) fn abandon(&mut self) {
        if self.owner.is_current() {
            self.state = State::Closed;
            self.object.abandon();
        }
    }

    /// Whether the snapshot is staged.
    #[cfg(feature = "python")]
    pub(crate) fn is_staged(&self) -> bool {
        self.staged
    }

    #[cfg(feature = "python")]
    pub(crate) fn is_closed(&self) -> bool {
        matches!(self.state, State::Closed)
    }

    /// The number of bytes written so far, or an error if the fragment is not open.
    #[cfg(feature = "python")]
    pub(crate) fn position(&mut self) -> Result<u64> {
        self.with_sink(|_| Ok(()))?;
        Ok(self.written())
    }

    /// Poisons the fragment, like a write that fails with `error`.
    #[cfg(feature = "python")]
    pub(crate) fn fail(&mut self, error: Error) -> Error {
        if matches!(self.state, State::Open(_)) {
            self.state = State::Failed;
            return error.context(&self.place);
        }
        error
    }

    /// Lets `work` use the sink, and poisons the fragment if that fails.
    fn with_sink(&mut self, work: impl FnOnce(&mut Sink) -> Result<()>) -> Result<()> {
        let result = self.owner.check_fragment().and_then(|()| {
            // Failed in the meantime, so that a panic leaves it failed.
            match std::mem::replace(&mut self.state, State::Failed) {
                State::Open(mut sink) => {
                    work(&mut sink)?;
                    self.state = State::Open(sink);
                    Ok(())
                }
                State::Failed => Err(Error::new(
                    Kind::State,
                    "an earlier write failed, so its file will be removed; write the fragment again",
                )),
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
    /// Writes all of `data`.
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        self.write_all_interruptible(data, &mut || Ok(()))?;
        Ok(data.len())
    }

    /// Writes the gathered bytes of a plain fragment. For an encrypted fragment it does nothing, because a segment is
    /// written only when it is full, and the last one by [`Fragment::finish`].
    fn flush(&mut self) -> io::Result<()> {
        self.with_sink(|sink| match sink {
            Sink::Plain(sink) => sink.flush(&mut Interrupt::new(&mut || Ok(()))),
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
        // During a panic, the fragment may be incomplete.
        let complete = match self.state {
            State::Closed => true,
            // A staged snapshot is complete or absent, and this fragment was not finished.
            State::Open(_) if self.staged => false,
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
