//! Encryption of chunks by all threads.
//!
//! Segments have a fixed size, so their offsets follow from their indexes. Each thread encrypts chunks into its own
//! buffer, writes the buffer at its offset, and never waits for the others. Batches that were copied from small writes
//! are encrypted in the background; a caller that runs out of buffers works too. A large write is encrypted directly
//! from the caller's memory, while the caller waits.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use super::batches::batch_bytes;
use super::rope::Rope;
use crate::buffer;
use crate::cipher::{Encryption, Encryptor, SEGMENT_OVERHEAD_BYTES, segment_offset, segment_size};
use crate::error::{Error, Kind, Result};
use crate::pool::{Job, pool};
use crate::store::bytes::WriteAt;
use crate::threads::{Interrupt, for_each, lock};

pub(super) struct Encryptors {
    encryption: Encryption,
    chunk_size_bytes: usize,
    threads: usize,
    queue: Mutex<Queue>,
    /// A batch was done.
    done: Condvar,
    /// Set by [`Encryptors::stop`], which ends the helpers' waits.
    stopped: AtomicBool,
}

#[derive(Default)]
struct Queue {
    batches: VecDeque<Batch>,
    /// The number of batches that are being encrypted.
    running: usize,
    /// The number of pool threads that take batches.
    helpers: usize,
    /// The number of buffers, with the one that the caller fills.
    buffers: usize,
    idle_buffers: Vec<Vec<u8>>,
    idle_workers: Vec<EncryptionWorker>,
    failure: Option<Error>,
}

impl Queue {
    fn take(&mut self) -> Option<Batch> {
        let batch = self.batches.pop_front()?;
        self.running += 1;
        Some(batch)
    }
}

/// Whole chunks, none of them the last.
struct Batch {
    /// Not in `Encryptors`, because a helper that ends late would keep a finished fragment open.
    object: Arc<dyn WriteAt>,
    first_index: u64,
    plaintext: Vec<u8>,
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
        Self {
            chunk_size_bytes: encryption.chunk_size_bytes(),
            encryption,
            threads,
            queue: Mutex::new(Queue { buffers: 1, ..Queue::default() }),
            done: Condvar::new(),
            stopped: AtomicBool::new(false),
        }
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
        lock(&self.queue).idle_workers.append(&mut workers);
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

    /// Hands a batch to the other threads. A later call returns its error, [`Encryptors::drain`] at the latest.
    pub(super) fn submit(self: &Arc<Self>, object: &Arc<dyn WriteAt>, first_index: u64, plaintext: Vec<u8>) {
        let mut queue = lock(&self.queue);
        queue.batches.push_back(Batch { object: Arc::clone(object), first_index, plaintext });
        let wanted = queue.helpers + 1 < self.threads;
        queue.helpers += usize::from(wanted);
        drop(queue);
        if wanted && pool().invite(&self.job(), 1) == 0 {
            // No thread can be started: the caller encrypts the batch when it needs the buffer.
            lock(&self.queue).helpers -= 1;
        }
    }

    fn job(self: &Arc<Self>) -> Arc<dyn Job> {
        Arc::<Self>::clone(self)
    }

    /// Returns an empty buffer for the next batch.
    pub(super) fn buffer(&self, interrupt: &mut Interrupt<'_>) -> Result<Vec<u8>> {
        let mut buffer = self.help_until(interrupt, |queue| {
            let idle = queue.idle_buffers.pop();
            // One buffer is being filled, one waits, and each thread has one.
            if idle.is_none() && queue.buffers < self.threads + 2 {
                queue.buffers += 1;
                return Some(Vec::new());
            }
            idle
        })?;
        buffer::reserve(&mut buffer, batch_bytes(self.chunk_size_bytes))?;
        Ok(buffer)
    }

    /// Waits until all batches are written.
    pub(super) fn drain(&self, interrupt: &mut Interrupt<'_>) -> Result<()> {
        self.help_until(interrupt, |queue| (queue.batches.is_empty() && queue.running == 0).then_some(()))
    }

    /// Drops the batches that were not begun, and waits for the others. Afterwards no thread uses the object.
    pub(super) fn stop(self: &Arc<Self>) {
        self.stopped.store(true, Ordering::Relaxed);
        pool().withdraw(&self.job());
        let mut queue = lock(&self.queue);
        queue.batches.clear();
        while queue.running > 0 {
            queue = self.done.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Encrypts batches on the calling thread, or waits if the queue is empty, until `ready` returns a value.
    fn help_until<R>(
        &self,
        interrupt: &mut Interrupt<'_>,
        mut ready: impl FnMut(&mut Queue) -> Option<R>,
    ) -> Result<R> {
        interrupt.check()?;
        let mut queue = lock(&self.queue);
        loop {
            if let Some(failure) = queue.failure.take() {
                return Err(failure);
            }
            if let Some(result) = ready(&mut queue) {
                return Ok(result);
            }
            match queue.take() {
                Some(batch) => {
                    drop(queue);
                    self.encrypt_taken(batch, interrupt);
                    interrupt.check()?;
                    queue = lock(&self.queue);
                }
                None => queue = interrupt.wait(&self.done, queue, &self.queue)?,
            }
        }
    }

    fn encrypt_taken(&self, Batch { object, first_index, mut plaintext }: Batch, interrupt: &mut Interrupt<'_>) {
        let mut worker = self.worker();
        // The caller waits until the batch is counted as done, so count it even after a panic.
        let encrypted = catch_unwind(AssertUnwindSafe(|| {
            self.encrypt_batch(&mut worker, &*object, first_index, &plaintext, interrupt)
        }));
        let result = encrypted.unwrap_or_else(|_| Err(Error::new(Kind::Provider, "an encryption thread panicked")));
        drop(object);
        plaintext.clear();
        let mut queue = lock(&self.queue);
        queue.running -= 1;
        queue.idle_workers.push(worker);
        queue.idle_buffers.push(plaintext);
        if let Err(error) = result {
            queue.failure.get_or_insert(error);
        }
        drop(queue);
        self.done.notify_all();
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
        let idle = lock(&self.queue).idle_workers.pop();
        idle.unwrap_or_else(|| EncryptionWorker { encryptor: self.encryption.encryptor(), segments: Vec::new() })
    }

    fn workers(&self, count: usize) -> Vec<EncryptionWorker> {
        (0..count).map(|_| self.worker()).collect()
    }
}

impl Job for Encryptors {
    /// A helper decrements the count of helpers under the lock under which it saw the queue empty, so that no batch is
    /// missed.
    fn turn(&self) -> bool {
        loop {
            let mut queue = lock(&self.queue);
            let Some(batch) = queue.take() else {
                queue.helpers -= 1;
                return false;
            };
            drop(queue);
            self.encrypt_taken(batch, &mut Interrupt::of_helper(&self.stopped));
            if pool().is_wanted() {
                return true;
            }
        }
    }
}
