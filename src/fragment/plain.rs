//! Sink and source of a plain fragment, whose stored bytes are its contents.

use std::sync::{Arc, Mutex};

use super::background::Background;
use super::batches::{BATCH_BYTES, Batches};
use super::digest::Digest;
use super::positioned::{PositionedKind, PositionedWriter};
use crate::buffer;
use crate::error::Result;
use crate::manifest::{Entry, Proof};
use crate::store::bytes::{ReadAt, WriteAt};
use crate::threads::{Interrupt, for_each, lock};

/// Smaller writes are gathered, because a system call for a few bytes is slow.
const MAX_GATHERED_BYTES: usize = 64 << 10;

/// The size of one system call, so that an interruption need not wait long.
const SYSCALL_BYTES: usize = 1 << 20;

pub(super) struct PlainSink {
    object: Arc<dyn WriteAt>,
    offset: u64,
    gathered: Vec<u8>,
    /// The digest of the written bytes, if the manifest needs it.
    digest: Option<Box<Digest>>,
    /// Writes and hashes batches, if the caller should not wait for that.
    background: Option<Background>,
    threads: usize,
}

impl PlainSink {
    pub(super) fn new(object: Arc<dyn WriteAt>, digested: bool, threads: usize) -> Self {
        Self { object, offset: 0, gathered: Vec::new(), digest: digested.then(Box::default), background: None, threads }
    }

    pub(super) fn written(&self) -> u64 {
        self.offset + self.gathered.len() as u64
    }

    /// Lets other threads write and hash from now on, until the next flush. Nothing was written yet, or nothing is
    /// hashed.
    pub(super) fn write_behind(&mut self) {
        let kind = PositionedKind::Plain(self.digest.as_ref().map(|_| Mutex::default()));
        self.background = Some(Background::new(kind, BATCH_BYTES, self.threads));
    }

    /// Gathers a small write if there is room.
    pub(super) fn gather(&mut self, data: &[u8]) -> bool {
        let fits = self.gathered.len() + data.len() < MAX_GATHERED_BYTES;
        if fits {
            self.gathered.extend_from_slice(data);
        }
        fits
    }

    /// Writes with one thread, directly from the caller's buffer: the file's inode lock admits only one writer
    /// (measured).
    pub(super) fn write(&mut self, data: &[u8], interrupt: &mut Interrupt<'_>) -> Result<()> {
        if self.background.is_some() {
            return self.submit(data, interrupt);
        }
        if self.gather(data) {
            return Ok(());
        }
        self.flush(interrupt)?;
        if self.gather(data) {
            return Ok(());
        }
        if let Some(digest) = &mut self.digest {
            // While one thread writes, the others hash.
            let (object, offset) = (&*self.object, self.offset);
            digest.update_with(data, self.threads, interrupt, |at, batch, interrupt| {
                object.write_all_at(batch, offset + at as u64, interrupt)
            })?;
            self.offset += data.len() as u64;
            return Ok(());
        }
        for batch in data.chunks(SYSCALL_BYTES) {
            interrupt.check()?;
            self.object.write_all_at(batch, self.offset, interrupt)?;
            self.offset += batch.len() as u64;
        }
        Ok(())
    }

    /// Gathers data, and hands whole batches to the background. The last one is kept, because only a later byte shows
    /// that a subtree is not the whole fragment.
    fn submit(&mut self, mut data: &[u8], interrupt: &mut Interrupt<'_>) -> Result<()> {
        let Some(background) = &self.background else { return Ok(()) };
        while self.gathered.len() + data.len() > background.batch_bytes() {
            let (now, later) = data.split_at(background.batch_bytes() - self.gathered.len());
            buffer::reserve(&mut self.gathered, now.len())?;
            self.gathered.extend_from_slice(now);
            data = later;
            let batch = std::mem::replace(&mut self.gathered, background.buffer(interrupt)?);
            let offset = self.offset;
            self.offset += batch.len() as u64;
            background.submit(&self.object, offset, batch);
        }
        buffer::reserve(&mut self.gathered, data.len())?;
        self.gathered.extend_from_slice(data);
        Ok(())
    }

    /// Hashes nothing from now on, because no manifest will list the bytes.
    pub(super) fn forget_digest(&mut self, interrupt: &mut Interrupt<'_>) -> Result<()> {
        let is_behind = self.background.is_some();
        self.flush(interrupt)?;
        self.digest = None;
        if is_behind {
            self.write_behind();
        }
        Ok(())
    }

    /// A positioned writer of the fragment from its start on; `None` if something was written already.
    pub(super) fn positioned(&self) -> Option<PositionedWriter> {
        let kind = PositionedKind::Plain(self.digest.as_ref().map(|_| Mutex::default()));
        (self.written() == 0).then(|| PositionedWriter { object: Arc::clone(&self.object), kind })
    }

    /// Continues after positioned batches that end at `end`.
    pub(super) fn continue_at(&mut self, positioned: &PositionedWriter, end: u64) {
        self.offset = end;
        self.take_digest(&positioned.kind);
    }

    /// Takes the digest of batches that were written.
    fn take_digest(&mut self, kind: &PositionedKind) {
        if let PositionedKind::Plain(Some(collected)) = kind {
            self.digest = Some(std::mem::take(&mut lock(collected).digest));
        }
    }

    /// The manifest entry of the finished fragment; `None` if nothing was hashed.
    pub(super) fn entry(&mut self) -> Option<Entry> {
        let digest = self.digest.take()?;
        Some(Entry { size: self.offset, stored_size: self.offset, proof: Proof::Blake3(digest.finish()) })
    }

    pub(super) fn flush(&mut self, interrupt: &mut Interrupt<'_>) -> Result<()> {
        if let Some(background) = self.background.take() {
            background.drain(interrupt)?;
            self.take_digest(background.kind());
        }
        self.object.write_all_at(&self.gathered, self.offset, interrupt)?;
        if let Some(digest) = &mut self.digest {
            digest.update(&self.gathered);
        }
        self.offset += self.gathered.len() as u64;
        self.gathered.clear();
        Ok(())
    }
}

/// Fills `buf` from `offset` of a plain fragment; both must be within its size.
pub(super) fn read(
    object: &dyn ReadAt,
    offset: u64,
    buf: &mut [u8],
    threads: usize,
    interrupt: &mut Interrupt<'_>,
) -> Result<()> {
    let batches = Batches::new(offset, buf, BATCH_BYTES);
    let mut workers = vec![(); threads.min(batches.len())];
    for_each(&mut workers, batches, interrupt, |(), (offset, batch), interrupt| {
        object.read_exact_at(batch, offset, interrupt)
    })
}
