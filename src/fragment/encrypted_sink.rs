//! The sink of an encrypted fragment: one FLOE message. `docs/format.md` describes its bytes.

use std::sync::Arc;

use super::background::Background;
use super::batches::batch_bytes;
use super::encryptors::Encryptors;
use super::positioned::{PositionedKind, PositionedWriter};
use crate::buffer;
use crate::cipher::{Encryption, HEADER_TAG_BYTES, SEGMENT_OVERHEAD_BYTES, SecretKey, header_tag, segment_offset};
use crate::error::Result;
use crate::manifest::{Entry, Proof};
use crate::store::bytes::WriteAt;
use crate::threads::Interrupt;

/// A write of at least this size is encrypted directly from the caller's buffer, and returns when all of it is written.
/// A smaller write is copied, and encrypted while the caller prepares the next one.
const MIN_DIRECT_WRITE_BYTES: usize = 4 << 20;

pub(super) struct EncryptedSink {
    object: Arc<dyn WriteAt>,
    encryptors: Arc<Encryptors>,
    background: Background,
    chunk_size_bytes: usize,
    /// Plaintext that is not submitted yet, from the start of chunk `next_index`. A chunk is not the last if more bytes
    /// follow, so at least one byte always stays here.
    gathered: Vec<u8>,
    next_index: u64,
    header_tag: [u8; HEADER_TAG_BYTES],
}

impl EncryptedSink {
    pub(super) fn new(
        object: Arc<dyn WriteAt>,
        key: &SecretKey,
        aad: &[u8],
        chunk_size_bytes: usize,
        threads: usize,
        interrupt: &mut Interrupt<'_>,
    ) -> Result<Self> {
        let (encryption, header) = Encryption::start(key, aad, chunk_size_bytes)?;
        object.write_all_at(&header, 0, interrupt)?;
        let encryptors = Arc::new(Encryptors::new(encryption, threads));
        let header_tag = header_tag(&header);
        let kind = PositionedKind::Encrypted { encryptors: Arc::clone(&encryptors), chunk_size_bytes };
        let background = Background::new(kind, batch_bytes(chunk_size_bytes), threads);
        Ok(Self { object, encryptors, background, chunk_size_bytes, gathered: Vec::new(), next_index: 0, header_tag })
    }

    pub(super) fn written(&self) -> u64 {
        self.next_index * self.chunk_size_bytes as u64 + self.gathered.len() as u64
    }

    /// Gathers a small write if there is room.
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
                // Fill the buffer to a chunk boundary; the rest is encrypted directly.
                data.split_at(self.gathered.len().next_multiple_of(chunk_size_bytes) - self.gathered.len())
            } else {
                data.split_at(batch_bytes(chunk_size_bytes) - self.gathered.len())
            };
            self.append(now)?;
            data = later;
            if !self.gathered.is_empty() {
                let batch = std::mem::replace(&mut self.gathered, self.background.buffer(interrupt)?);
                let first_index = self.advance(batch.len());
                self.background.submit(&self.object, first_index * chunk_size_bytes as u64, batch);
            }
            if data.len() >= MIN_DIRECT_WRITE_BYTES {
                let (body, tail) = self.split_last(data);
                let first_index = self.advance(body.len());
                self.encryptors.encrypt(&*self.object, first_index, body, interrupt)?;
                data = tail;
            }
        }
        self.append(data)
    }

    /// A positioned writer of the fragment from its start on; `None` if something was written already.
    pub(super) fn positioned(&self) -> Option<PositionedWriter> {
        let kind = PositionedKind::Encrypted {
            encryptors: Arc::clone(&self.encryptors),
            chunk_size_bytes: self.chunk_size_bytes,
        };
        (self.written() == 0).then(|| PositionedWriter { object: Arc::clone(&self.object), kind })
    }

    /// Continues after positioned batches that end at `end`.
    pub(super) fn continue_at(&mut self, end: u64) {
        self.next_index = end / self.chunk_size_bytes as u64;
    }

    pub(super) fn finish(&mut self, interrupt: &mut Interrupt<'_>) -> Result<()> {
        let mut gathered = std::mem::take(&mut self.gathered);
        let (body, last) = self.split_last(&gathered);
        let first_index = self.advance(body.len());
        self.encryptors.encrypt(&*self.object, first_index, body, interrupt)?;
        self.background.drain(interrupt)?;
        self.encryptors.encrypt_last(&*self.object, self.next_index, last, interrupt)?;
        let body_bytes = body.len();
        gathered.drain(..body_bytes);
        self.gathered = gathered;
        Ok(())
    }

    /// The manifest entry of the finished fragment.
    pub(super) fn entry(&self) -> Entry {
        let size = self.written();
        Entry {
            size,
            stored_size: segment_offset(self.next_index, self.chunk_size_bytes)
                + (self.gathered.len() + SEGMENT_OVERHEAD_BYTES) as u64,
            proof: Proof::HeaderTag { chunk_size_bytes: self.chunk_size_bytes as u64, tag: self.header_tag },
        }
    }

    /// Splits whole chunks from the last chunk, which has 1 byte to a whole chunk. It is empty only if `data` is empty.
    fn split_last<'a>(&self, data: &'a [u8]) -> (&'a [u8], &'a [u8]) {
        data.split_at(data.len().saturating_sub(1) / self.chunk_size_bytes * self.chunk_size_bytes)
    }

    /// Counts whole chunks as submitted; returns the index of the first.
    fn advance(&mut self, bytes: usize) -> u64 {
        let first_index = self.next_index;
        self.next_index += (bytes / self.chunk_size_bytes) as u64;
        first_index
    }
}
