//! The progress of a copy: how many bytes have passed.

use std::sync::atomic::{AtomicU64, Ordering};

use crate::MemoryProgress;
use crate::error::Result;
use crate::store::bytes::WriteAt;
use crate::threads::Interrupt;

/// The stored bytes of a snapshot that have been copied, counted by all threads.
#[derive(Default)]
pub(crate) struct Progress {
    done_bytes: AtomicU64,
    total_bytes: AtomicU64,
}

impl Progress {
    pub(super) fn begin(&self, total_bytes: u64) {
        self.total_bytes.store(total_bytes, Ordering::Relaxed);
    }

    pub(super) fn add(&self, bytes: u64) {
        self.done_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    /// The bytes that were copied so far, and all bytes.
    pub(crate) fn so_far(&self) -> MemoryProgress {
        MemoryProgress {
            done_bytes: self.done_bytes.load(Ordering::Relaxed),
            total_bytes: self.total_bytes.load(Ordering::Relaxed),
        }
    }
}

/// A fragment that is being written, whose bytes are counted.
pub(super) struct Counted<'a> {
    output: &'a dyn WriteAt,
    progress: &'a Progress,
    done: AtomicU64,
}

impl<'a> Counted<'a> {
    pub(super) fn new(output: &'a dyn WriteAt, progress: &'a Progress) -> Self {
        Self { output, progress, done: AtomicU64::new(0) }
    }

    /// Counts the zeros that were not written to a fragment of this size.
    pub(super) fn complete(self, size: u64) {
        self.progress.add(size.saturating_sub(self.done.into_inner()));
    }
}

impl WriteAt for Counted<'_> {
    fn write_runs_at(&self, runs: &[&[u8]], offset: u64, interrupt: &mut Interrupt<'_>) -> Result<()> {
        self.output.write_runs_at(runs, offset, interrupt)?;
        let bytes = runs.iter().map(|run| run.len() as u64).sum();
        self.done.fetch_add(bytes, Ordering::Relaxed);
        self.progress.add(bytes);
        Ok(())
    }

    fn set_uncached(&self, uncached: bool) {
        self.output.set_uncached(uncached);
    }

    fn is_sparse(&self) -> bool {
        self.output.is_sparse()
    }
}
