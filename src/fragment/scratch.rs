//! A scratch file: bytes that are appended, and then read back, by one process alone.
//!
//! If it is encrypted, it is one FLOE message, like a fragment, with a key that exists only in this process. A chunk is
//! written once and bound to its index, so a chunk that was changed or moved on the disk does not decrypt.

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use super::encrypted_sink::EncryptedSink;
use super::encrypted_source::EncryptedSource;
use super::plain::PlainSink;
use super::writing::Sink;
use crate::cipher::{DEFAULT_CHUNK_SIZE_BYTES, SecretKey, wipe_stack};
use crate::error::{Error, Kind, Result};
use crate::process::OwnerProcess;
use crate::store::bytes::{ReadAt, WriteAt};
use crate::stored_file::StoredFile;
use crate::threads::Interrupt;

/// A scratch file that is being written. After an error it must be dropped.
pub(crate) struct ScratchWriter {
    sink: Sink,
    /// The file, to be read later.
    file: File,
    key: Option<(SecretKey, &'static [u8])>,
    owner: OwnerProcess,
}

impl ScratchWriter {
    /// Begins with an empty file, open to be written and read. If it is encrypted, each chunk of 4 KiB is a segment.
    pub(crate) fn new(file: File, encrypted: bool, aad: &'static [u8], threads: usize) -> Result<Self> {
        let written = file.try_clone().map_err(|error| Error::io("cannot be opened", error))?;
        let object: Arc<dyn WriteAt> = Arc::new(StoredFile::new(written));
        let key = if encrypted { Some((SecretKey::generate()?, aad)) } else { None };
        let sink = match &key {
            None => Sink::Plain(PlainSink::new(object, false, threads)),
            Some((key, aad)) => {
                let interrupt = &mut || Ok(());
                let interrupt = &mut Interrupt::new(interrupt);
                let sink = EncryptedSink::new(object, key, aad, DEFAULT_CHUNK_SIZE_BYTES, threads, interrupt);
                wipe_stack();
                Sink::Encrypted(sink?)
            }
        };
        Ok(Self { sink, file, key, owner: OwnerProcess::current() })
    }

    /// The number of bytes that were appended.
    pub(crate) fn written(&self) -> u64 {
        match &self.sink {
            Sink::Plain(sink) => sink.written(),
            Sink::Encrypted(sink) => sink.written(),
        }
    }

    pub(crate) fn append(&mut self, data: &[u8], interrupt: &mut Interrupt<'_>) -> Result<()> {
        check_owner(self.owner)?;
        match &mut self.sink {
            Sink::Plain(sink) => sink.write(data, interrupt),
            Sink::Encrypted(sink) => sink.write(data, interrupt),
        }
    }

    /// Writes the rest; from now on the file is only read.
    pub(crate) fn finish(mut self, interrupt: &mut Interrupt<'_>) -> Result<ScratchReader> {
        check_owner(self.owner)?;
        match &mut self.sink {
            Sink::Plain(sink) => sink.flush(interrupt)?,
            Sink::Encrypted(sink) => sink.finish(interrupt)?,
        }
        let size = self.file.metadata().map_err(|error| Error::io("cannot be examined", error))?.len();
        let object: Arc<dyn ReadAt> = Arc::new(StoredFile::of_size(self.file, size));
        let source = match self.key {
            None => Source::Plain(object),
            Some((key, aad)) => {
                let source = EncryptedSource::open(&object, &key, aad, None, interrupt);
                wipe_stack();
                Source::Encrypted(source?)
            }
        };
        Ok(ScratchReader { source, owner: self.owner })
    }
}

/// A scratch file that is complete. Any number of threads read it at once.
pub(crate) struct ScratchReader {
    source: Source,
    owner: OwnerProcess,
}

enum Source {
    Plain(Arc<dyn ReadAt>),
    Encrypted(EncryptedSource),
}

impl ScratchReader {
    /// Fills `buf` from `offset`, on the calling thread. After an error, the caller must wipe `buf`.
    ///
    /// # Errors
    ///
    /// `Authentication` or `Corrupt` if the file was changed after it was written.
    pub(crate) fn read_exact_at(&self, buf: &mut [u8], offset: u64) -> Result<()> {
        check_owner(self.owner)?;
        let never = AtomicBool::new(false);
        let interrupt = &mut Interrupt::of_helper(&never);
        match &self.source {
            Source::Plain(object) => object.read_exact_at(buf, offset, interrupt),
            Source::Encrypted(source) => source.read(offset, buf, 1, interrupt),
        }
    }
}

/// Refuses a scratch file in a forked child, which must not use the cipher's state.
fn check_owner(owner: OwnerProcess) -> Result<()> {
    if owner.is_current() {
        return Ok(());
    }
    let text = "was created before this process was forked; only its own process can use it";
    Err(Error::new(Kind::State, text))
}
