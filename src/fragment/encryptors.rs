//! Encryption of chunks by all threads.
//!
//! Segments have a fixed size, so their offsets follow from their indexes. Each thread encrypts chunks into its own
//! buffer, writes the buffer at its offset, and never waits for the others. Batches that were copied from small writes
//! are encrypted in the [background](super::background). A large write is encrypted directly from the caller's memory,
//! while the caller waits.

use std::sync::Mutex;

use super::batches::batch_bytes;
use super::rope::Rope;
use crate::buffer;
use crate::cipher::{Encryption, Encryptor, SEGMENT_OVERHEAD_BYTES, segment_offset, segment_size};
use crate::error::Result;
use crate::store::bytes::WriteAt;
use crate::threads::{Interrupt, for_each, lock};

pub(super) struct Encryptors {
    encryption: Encryption,
    chunk_size_bytes: usize,
    threads: usize,
    idle_workers: Mutex<Vec<EncryptionWorker>>,
}

pub(super) struct EncryptionWorker {
    encryptor: Encryptor,
    segments: Vec<u8>,
}

/// Encrypted segments that are written together.
struct EncryptedBatch<'a> {
    worker: &'a mut EncryptionWorker,
    object: &'a dyn WriteAt,
    first_index: u64,
    chunk_size_bytes: usize,
    chunks: usize,
}

impl EncryptedBatch<'_> {
    fn push(&mut self, chunk: &[u8], interrupt: &mut Interrupt<'_>) -> Result<()> {
        let size = segment_size(self.chunk_size_bytes);
        let at = self.chunks * size;
        let segment = &mut self.worker.segments[at..at + size];
        self.worker.encryptor.encrypt(self.first_index + self.chunks as u64, chunk, segment)?;
        self.chunks += 1;
        if (self.chunks + 1) * self.chunk_size_bytes > batch_bytes(self.chunk_size_bytes) {
            self.write(interrupt)
        } else {
            Ok(())
        }
    }

    fn write(&mut self, interrupt: &mut Interrupt<'_>) -> Result<()> {
        let stored = self.chunks * segment_size(self.chunk_size_bytes);
        let offset = segment_offset(self.first_index, self.chunk_size_bytes);
        self.object.write_all_at(&self.worker.segments[..stored], offset, interrupt)?;
        self.first_index += self.chunks as u64;
        self.chunks = 0;
        Ok(())
    }
}

impl Encryptors {
    pub(super) fn new(encryption: Encryption, threads: usize) -> Self {
        Self { chunk_size_bytes: encryption.chunk_size_bytes(), encryption, threads, idle_workers: Mutex::default() }
    }

    /// Encrypts chunks of the caller with all threads; none of them may be the last.
    pub(super) fn encrypt(
        &self,
        object: &dyn WriteAt,
        first_index: u64,
        plaintext: &[u8],
        interrupt: &mut Interrupt<'_>,
    ) -> Result<()> {
        let batch_bytes = batch_bytes(self.chunk_size_bytes);
        let batch_chunks = (batch_bytes / self.chunk_size_bytes) as u64;
        let batches = plaintext.chunks(batch_bytes);
        let mut workers = self.workers(self.threads.min(batches.len()));
        let result = for_each(&mut workers, batches.enumerate(), interrupt, |worker, (number, batch), interrupt| {
            self.encrypt_batch(worker, object, first_index + number as u64 * batch_chunks, batch, interrupt)
        });
        lock(&self.idle_workers).append(&mut workers);
        result
    }

    /// Encrypts and writes the last chunk.
    pub(super) fn encrypt_last(
        &self,
        object: &dyn WriteAt,
        index: u64,
        chunk: &[u8],
        interrupt: &mut Interrupt<'_>,
    ) -> Result<()> {
        let EncryptionWorker { mut encryptor, mut segments } = self.worker();
        buffer::fit(&mut segments, chunk.len() + SEGMENT_OVERHEAD_BYTES)?;
        encryptor.encrypt_last(index, chunk, &mut segments)?;
        object.write_all_at(&segments, segment_offset(index, self.chunk_size_bytes), interrupt)
    }

    /// Encrypts and writes whole chunks; none of them may be the last.
    fn encrypt_batch(
        &self,
        worker: &mut EncryptionWorker,
        object: &dyn WriteAt,
        first_index: u64,
        batch: &[u8],
        interrupt: &mut Interrupt<'_>,
    ) -> Result<()> {
        let mut batch_writer = self.batch(worker, object, first_index)?;
        batch.chunks_exact(self.chunk_size_bytes).try_for_each(|chunk| batch_writer.push(chunk, interrupt))?;
        batch_writer.write(interrupt)
    }

    /// Encrypts and writes chunks that may be scattered in memory; `room` is a buffer for a scattered chunk.
    pub(super) fn encrypt_rope(
        &self,
        worker: &mut EncryptionWorker,
        object: &dyn WriteAt,
        first_index: u64,
        rope: &Rope<'_>,
        room: &mut Vec<u8>,
        interrupt: &mut Interrupt<'_>,
    ) -> Result<()> {
        let mut batch = self.batch(worker, object, first_index)?;
        rope.in_steps(self.chunk_size_bytes, room, |chunk| batch.push(chunk, interrupt))?;
        batch.write(interrupt)
    }

    fn batch<'a>(
        &self,
        worker: &'a mut EncryptionWorker,
        object: &'a dyn WriteAt,
        first_index: u64,
    ) -> Result<EncryptedBatch<'a>> {
        let chunk_size_bytes = self.chunk_size_bytes;
        let stored = batch_bytes(chunk_size_bytes) / chunk_size_bytes * segment_size(chunk_size_bytes);
        buffer::at_least(&mut worker.segments, stored)?;
        Ok(EncryptedBatch { worker, object, first_index, chunk_size_bytes, chunks: 0 })
    }

    pub(super) fn worker(&self) -> EncryptionWorker {
        let idle = lock(&self.idle_workers).pop();
        idle.unwrap_or_else(|| EncryptionWorker { encryptor: self.encryption.encryptor(), segments: Vec::new() })
    }

    fn workers(&self, count: usize) -> Vec<EncryptionWorker> {
        (0..count).map(|_| self.worker()).collect()
    }
}
