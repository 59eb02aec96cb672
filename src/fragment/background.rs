//! [`Background`]: small writes are gathered into batches, and threads of the pool write them while the caller prepares
//! the next ones.

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use super::positioned::{PositionedKind, PositionedWorker};
use super::rope::Rope;
use crate::buffer;
use crate::error::{Error, Kind, Result};
use crate::pool::{Job, pool};
use crate::process::OwnerProcess;
use crate::store::bytes::WriteAt;
use crate::threads::{Interrupt, lock};

/// The end of the caller. When it is dropped, batches that were not begun are dropped too.
pub(super) struct Background {
    shared: Arc<Shared>,
    owner: OwnerProcess,
}

struct Shared {
    kind: PositionedKind,
    batch_bytes: usize,
    threads: usize,
    queue: Mutex<Queue>,
    /// A batch was done.
    done: Condvar,
    /// Set by the drop of [`Background`], which ends the helpers' waits.
    stopped: AtomicBool,
}

#[derive(Default)]
struct Queue {
    batches: VecDeque<Batch>,
    /// The number of batches that are being written.
    running: usize,
    /// The number of pool threads that take batches.
    helpers: usize,
    /// The number of buffers, with the one that the caller fills.
    buffers: usize,
    idle_buffers: Vec<Vec<u8>>,
    idle_workers: Vec<PositionedWorker>,
    failure: Option<Error>,
}

impl Queue {
    fn take(&mut self) -> Option<Batch> {
        let batch = self.batches.pop_front()?;
        self.running += 1;
        Some(batch)
    }
}

/// Bytes that begin and end at multiples of the alignment of positioned writes, and are not the last ones.
struct Batch {
    /// Not in `Shared`, because a helper that ends late would keep a finished fragment open.
    object: Arc<dyn WriteAt>,
    offset: u64,
    bytes: Vec<u8>,
}

impl Background {
    /// Batches have at most `batch_bytes`.
    pub(super) fn new(kind: PositionedKind, batch_bytes: usize, threads: usize) -> Self {
        let shared = Shared {
            kind,
            batch_bytes,
            threads,
            queue: Mutex::new(Queue { buffers: 1, ..Queue::default() }),
            done: Condvar::new(),
            stopped: AtomicBool::new(false),
        };
        Self { shared: Arc::new(shared), owner: OwnerProcess::current() }
    }

    pub(super) fn kind(&self) -> &PositionedKind {
        &self.shared.kind
    }

    pub(super) fn batch_bytes(&self) -> usize {
        self.shared.batch_bytes
    }

    /// Hands a batch to the other threads. A later call returns its error, [`Background::drain`] at the latest.
    pub(super) fn submit(&self, object: &Arc<dyn WriteAt>, offset: u64, bytes: Vec<u8>) {
        let mut queue = lock(&self.shared.queue);
        queue.batches.push_back(Batch { object: Arc::clone(object), offset, bytes });
        let wanted = queue.helpers + 1 < self.shared.threads;
        queue.helpers += usize::from(wanted);
        drop(queue);
        if wanted && pool().invite(&self.job(), 1) == 0 {
            // No thread can be started: the caller writes the batch when it needs the buffer.
            lock(&self.shared.queue).helpers -= 1;
        }
    }

    fn job(&self) -> Arc<dyn Job> {
        Arc::<Shared>::clone(&self.shared)
    }

    /// Returns an empty buffer for the next batch.
    pub(super) fn buffer(&self, interrupt: &mut Interrupt<'_>) -> Result<Vec<u8>> {
        let mut buffer = self.help_until(interrupt, |queue, threads| {
            let idle = queue.idle_buffers.pop();
            // One buffer is being filled, one waits, and each thread has one.
            if idle.is_none() && queue.buffers < threads + 2 {
                queue.buffers += 1;
                return Some(Vec::new());
            }
            idle
        })?;
        buffer::reserve(&mut buffer, self.shared.batch_bytes)?;
        Ok(buffer)
    }

    /// Waits until all batches are written.
    pub(super) fn drain(&self, interrupt: &mut Interrupt<'_>) -> Result<()> {
        self.help_until(interrupt, |queue, _| (queue.batches.is_empty() && queue.running == 0).then_some(()))
    }

    /// Writes batches on the calling thread, or waits if the queue is empty, until `ready` returns a value.
    fn help_until<R>(
        &self,
        interrupt: &mut Interrupt<'_>,
        mut ready: impl FnMut(&mut Queue, usize) -> Option<R>,
    ) -> Result<R> {
        let Shared { queue: mutex, done, threads, .. } = &*self.shared;
        interrupt.check()?;
        let mut queue = lock(mutex);
        loop {
            if let Some(failure) = queue.failure.take() {
                return Err(failure);
            }
            if let Some(result) = ready(&mut queue, *threads) {
                return Ok(result);
            }
            match queue.take() {
                Some(batch) => {
                    drop(queue);
                    self.shared.write_taken(batch, interrupt);
                    interrupt.check()?;
                    queue = lock(mutex);
                }
                None => queue = interrupt.wait(done, queue, mutex)?,
            }
        }
    }

    /// Drops the batches that were not begun, and waits for the others. Afterwards no thread uses the object.
    fn stop(&self) {
        self.shared.stopped.store(true, Ordering::Relaxed);
        pool().withdraw(&self.job());
        let mut queue = lock(&self.shared.queue);
        queue.batches.clear();
        while queue.running > 0 {
            queue = self.shared.done.wait(queue).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Drop for Background {
    /// A forked child must not lock, and does not have the threads.
    fn drop(&mut self) {
        if self.owner.is_current() {
            self.stop();
        }
    }
}

impl Shared {
    fn write_taken(&self, Batch { object, offset, mut bytes }: Batch, interrupt: &mut Interrupt<'_>) {
        let idle = lock(&self.queue).idle_workers.pop();
        let mut worker = idle.unwrap_or_else(|| self.kind.worker());
        // The caller waits until the batch is counted as done, so count it even after a panic.
        let written = catch_unwind(AssertUnwindSafe(|| {
            let mut rope = Rope::new();
            rope.push(&bytes);
            self.kind.write(&mut worker, &*object, offset, &rope, interrupt)
        }));
        let result = written.unwrap_or_else(|_| Err(Error::new(Kind::Provider, "a thread that writes it panicked")));
        drop(object);
        bytes.clear();
        let mut queue = lock(&self.queue);
        queue.running -= 1;
        queue.idle_workers.push(worker);
        queue.idle_buffers.push(bytes);
        if let Err(error) = result {
            queue.failure.get_or_insert(error);
        }
        drop(queue);
        self.done.notify_all();
    }
}

impl Job for Shared {
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
            self.write_taken(batch, &mut Interrupt::of_helper(&self.stopped));
            if pool().is_wanted() {
                return true;
            }
        }
    }
}
