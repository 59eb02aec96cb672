//! Inputs and outputs of the tests: files, slow streams, and some that fail or never have anything.

use std::fs::File;
use std::io::{self, ErrorKind, Read, Write};
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::{Error, Result};
use crate::store::bytes::{ReadAt, WriteAt};
use crate::stored_file::StoredFile;
use crate::threads::Interrupt;

/// Where the fragment begins in a positioned input.
pub(super) const AT: u64 = 1536;

/// A file as an object, which counts the bytes that are read and written.
pub(super) struct Object {
    pub(super) file: StoredFile,
    is_sparse: bool,
    moved: AtomicU64,
}

impl Object {
    pub(super) fn new(file: File) -> Self {
        let size = file.metadata().unwrap().len();
        Self { file: StoredFile::of_size(file, size), is_sparse: true, moved: AtomicU64::new(0) }
    }

    pub(super) fn new_output(is_sparse: bool) -> Self {
        Self { is_sparse, ..Self::new(tempfile::tempfile().unwrap()) }
    }

    /// An object with `stored` at `AT`.
    pub(super) fn holding(stored: &[u8]) -> Self {
        let file = tempfile::tempfile().unwrap();
        file.set_len(AT + stored.len() as u64).unwrap();
        file.write_all_at(stored, AT).unwrap();
        Self::new(file)
    }

    pub(super) fn moved(&self) -> u64 {
        self.moved.load(Ordering::Relaxed)
    }

    pub(super) fn contents(&self, offset: u64, length: usize) -> Vec<u8> {
        self.file.set_len(self.file.metadata().unwrap().len().max(offset + length as u64)).unwrap();
        let mut contents = vec![0; length];
        self.file.read_exact_at(&mut contents, offset).unwrap();
        contents
    }
}

impl ReadAt for Object {
    fn size(&self) -> u64 {
        self.file.size()
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64, interrupt: &mut Interrupt<'_>) -> Result<()> {
        self.moved.fetch_add(buf.len() as u64, Ordering::Relaxed);
        ReadAt::read_exact_at(&self.file, buf, offset, interrupt)
    }

    fn next_data(&self, from: u64) -> u64 {
        self.file.next_data(from)
    }
}

impl WriteAt for Object {
    fn write_runs_at(&self, runs: &[&[u8]], offset: u64, interrupt: &mut Interrupt<'_>) -> Result<()> {
        self.moved.fetch_add(runs.iter().map(|run| run.len() as u64).sum(), Ordering::Relaxed);
        self.file.write_runs_at(runs, offset, interrupt)
    }

    fn is_sparse(&self) -> bool {
        self.is_sparse
    }
}

/// A stream that moves a few bytes at a time, and whose every third call a signal ends.
pub(super) struct Slow<S> {
    pub(super) stream: S,
    calls: usize,
}

impl<S> Slow<S> {
    pub(super) fn new(stream: S) -> Self {
        Self { stream, calls: 0 }
    }

    /// The number of bytes of this call.
    fn next(&mut self, wanted: usize) -> io::Result<usize> {
        self.calls += 1;
        if self.calls.is_multiple_of(3) {
            return Err(ErrorKind::Interrupted.into());
        }
        Ok(wanted.min(if self.calls.is_multiple_of(2) { 10_007 } else { 61_000 }))
    }
}

impl<S: Read> Read for Slow<S> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let count = self.next(buf.len())?;
        self.stream.read(&mut buf[..count])
    }
}

impl<S: Write> Write for Slow<S> {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        let count = self.next(data.len())?;
        self.stream.write(&data[..count])
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}

/// An input and output of which every call fails.
pub(super) struct Failing;

impl WriteAt for Failing {
    fn write_runs_at(&self, _: &[&[u8]], _: u64, _: &mut Interrupt<'_>) -> Result<()> {
        Err(Error::io("cannot be written", io::Error::from_raw_os_error(libc::ENOSPC)))
    }
}

impl Read for Failing {
    fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
        Err(io::Error::from_raw_os_error(libc::EIO))
    }
}

impl Write for Failing {
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        Err(io::Error::from_raw_os_error(libc::EPIPE))
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// An input and output that never has anything. A signal ends each call of a stream.
pub(super) struct Stuck;

fn wait_forever(interrupt: &mut Interrupt<'_>) -> Result<()> {
    loop {
        interrupt.check()?;
        std::thread::yield_now();
    }
}

impl ReadAt for Stuck {
    fn size(&self) -> u64 {
        u64::MAX
    }

    fn read_exact_at(&self, _: &mut [u8], _: u64, interrupt: &mut Interrupt<'_>) -> Result<()> {
        wait_forever(interrupt)
    }
}

impl WriteAt for Stuck {
    fn write_runs_at(&self, _: &[&[u8]], _: u64, interrupt: &mut Interrupt<'_>) -> Result<()> {
        wait_forever(interrupt)
    }
}

impl Read for Stuck {
    fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
        Err(ErrorKind::Interrupted.into())
    }
}

impl Write for Stuck {
    fn write(&mut self, _: &[u8]) -> io::Result<usize> {
        Err(ErrorKind::Interrupted.into())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
