//! An encrypted fragment being written: one FLOE message, `docs/format.md` has its bytes.

use std::sync::Arc;

use super::batches::batch_bytes;
use super::encryptors::Encryptors;
use super::place::{aad, not_written};
use super::positioned::{PositionedKind, PositionedWriter};
use crate::buffer;
use crate::cipher::{Encryption, HEADER_TAG_BYTES, SEGMENT_OVERHEAD_BYTES, SecretKey, header_tag, segment_offset};
use crate::error::Result;
use crate::manifest::{Entry, Proof};
use crate::name::SnapshotPath;
use crate::process::OwnerProcess;
use crate::stored_file::StoredFile;
use crate::threads::Interrupt;

/// From here on a write is encrypted straight from the caller's buffer, and returns when all of it is written; what is less
/// is copied and encrypted while the caller gets the next.
const MIN_DIRECT_WRITE_BYTES: usize = 4 << 20;

pub(super) struct EncryptedSink {
    file: Arc<StoredFile>,
    encryptors: Arc<Encryptors>,
    chunk_size_bytes: usize,
    /// Plaintext not handed on yet, from the start of chunk `next_index`. Whether a chunk is the last shows only when more
    /// follows, so at least one byte always stays behind here.
    gathered: Vec<u8>,
    next_index: u64,
    header_tag: [u8; HEADER_TAG_BYTES],
    owner: OwnerProcess,
}

impl EncryptedSink {
    pub(super) fn new(
        file: Arc<StoredFile>,
        key: &SecretKey,
        path: &SnapshotPath,
        chunk_size_bytes: usize,
        threads: usize,
    ) -> Result<Self> {
        let (encryption, header) = Encryption::start(key, &aad(path), chunk_size_bytes)?;
        file.write_all_at(&header, 0).map_err(not_written)?;
        let encryptors = Arc::new(Encryptors::new(encryption, threads));
        let header_tag = header_tag(&header);
        Ok(Self {
            file,
            encryptors,
            chunk_size_bytes,
            gathered: Vec::new(),
            next_index: 0,
            header_tag,
            owner: OwnerProcess::current(),
        })
    }

    pub(super) fn written(&self) -> u64 {
        self.next_index * self.chunk_size_bytes as u64 + self.gathered.len() as u64
    }

    /// Takes a small write that there is room for.
    #[cfg(feature = "python")]
    pub(super) fn gather(&mut self, data: &[u8]) -> bool {
        self.fits(data) && self.append(data).is_ok()
    }

    fn fits(&self, data: &[u8]) -> bool {
        self.gathered.len() + data.len() <= batch_bytes(self.chunk_size_bytes)
    }

    fn append(&mut self, data: &[u8]) -> Result<()> {
        buffer::reserve(&mut self.gathered, data.len())?;
        self.gathered.extend_from_slice(data);
        Ok(())
    }

    pub(super) fn write(&mut self, mut data: &[u8], interrupt: &mut Interrupt<'_>) -> Result<()> {
        let chunk_size_bytes = self.chunk_size_bytes;
        while !self.fits(data) {
            let (now, later) = if data.len() >= MIN_DIRECT_WRITE_BYTES {
                // What is gathered ends with a whole chunk, the rest is encrypted where it is.
                data.split_at(self.gathered.len().next_multiple_of(chunk_size_bytes) - self.gathered.len())
            } else {
                data.split_at(batch_bytes(chunk_size_bytes) - self.gathered.len())
            };
            self.append(now)?;
            data = later;
            if !self.gathered.is_empty() {
                let batch = std::mem::replace(&mut self.gathered, self.encryptors.buffer(interrupt)?);
                let first_index = self.advance(batch.len());
                self.encryptors.submit(&self.file, first_index, batch);
            }
            if data.len() >= MIN_DIRECT_WRITE_BYTES {
                let (body, tail) = self.split_last(data);
                let first_index = self.advance(body.len());
                self.encryptors.encrypt(&self.file, first_index, body, interrupt)?;
                data = tail;
            }
        }
        self.append(data)
    }

    /// A positioned writer of the fragment from its start on; `None` where something was written already.
    pub(super) fn positioned(&self) -> Option<PositionedWriter> {
        let kind = PositionedKind::Encrypted {
            encryptors: Arc::clone(&self.encryptors),
            chunk_size_bytes: self.chunk_size_bytes,
        };
        (self.written() == 0).then(|| PositionedWriter { file: Arc::clone(&self.file), kind })
    }

    /// Goes on after positioned batches that end at `end`.
    pub(super) fn continue_at(&mut self, end: u64) {
        self.next_index = end / self.chunk_size_bytes as u64;
    }

    pub(super) fn finish(&mut self, interrupt: &mut Interrupt<'_>) -> Result<()> {
        let mut gathered = std::mem::take(&mut self.gathered);
        let (body, last) = self.split_last(&gathered);
        let first_index = self.advance(body.len());
        self.encryptors.encrypt(&self.file, first_index, body, interrupt)?;
        self.encryptors.drain(interrupt)?;
        self.encryptors.encrypt_last(&self.file, self.next_index, last)?;
        let body_bytes = body.len();
        gathered.drain(..body_bytes);
        self.gathered = gathered;
        Ok(())
    }

    /// What the manifest says of the finished fragment.
    pub(super) fn entry(&self) -> Entry {
        let size = self.written();
        Entry {
            size,
            stored_size: segment_offset(self.next_index, self.chunk_size_bytes)
                + (self.gathered.len() + SEGMENT_OVERHEAD_BYTES) as u64,
            proof: Proof::HeaderTag { chunk_size_bytes: self.chunk_size_bytes as u64, tag: self.header_tag },
        }
    }

    /// Whole chunks, and what is left for the last: 1 byte to a whole chunk, nothing only of nothing.
    fn split_last<'a>(&self, data: &'a [u8]) -> (&'a [u8], &'a [u8]) {
        data.split_at(data.len().saturating_sub(1) / self.chunk_size_bytes * self.chunk_size_bytes)
    }

    /// Counts whole chunks as handed on; returns the index of the first.
    fn advance(&mut self, bytes: usize) -> u64 {
        let first_index = self.next_index;
        self.next_index += (bytes / self.chunk_size_bytes) as u64;
        first_index
    }
}

impl Drop for EncryptedSink {
    /// A forked child must not lock, and has none of the threads.
    fn drop(&mut self) {
        if self.owner.is_current() {
            self.encryptors.stop();
        }
    }
}
