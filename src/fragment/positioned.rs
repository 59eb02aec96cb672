//! Positioned writes: several threads write the beginning of a fragment in batches, each at its own offset.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use super::digest::{Digest, SUBTREE_BYTES, Subtree, subtree};
use super::encryptors::{EncryptionWorker, Encryptors};
use super::rope::Rope;
use crate::error::Result;
use crate::store::bytes::WriteAt;
use crate::threads::{Interrupt, lock};

/// Writes batches at their offsets. A batch begins and ends at multiples of [`PositionedWriter::alignment_bytes`], and
/// an ordinary write must follow the last batch.
pub(crate) struct PositionedWriter {
    pub(super) object: Arc<dyn WriteAt>,
    pub(super) kind: PositionedKind,
}

pub(super) enum PositionedKind {
    Plain(Option<Mutex<Collected>>),
    Encrypted { encryptors: Arc<Encryptors>, chunk_size_bytes: usize },
}

/// The digests of batches, which arrive in any order.
#[derive(Default)]
pub(super) struct Collected {
    pub(super) digest: Box<Digest>,
    /// Waiting batches, by the index of their first subtree; at most one for each thread.
    waiting: BTreeMap<u64, Vec<Subtree>>,
}

/// The buffers that one thread needs to write batches.
pub(crate) struct PositionedWorker {
    encryption: Option<EncryptionWorker>,
    /// A buffer for a chunk or subtree that is scattered in memory.
    room: Vec<u8>,
}

impl PositionedWriter {
    /// The length of a batch, and its offset, are multiples of this.
    pub(crate) fn alignment_bytes(&self) -> usize {
        match &self.kind {
            PositionedKind::Plain(None) => 1,
            PositionedKind::Plain(Some(_)) => SUBTREE_BYTES,
            PositionedKind::Encrypted { chunk_size_bytes, .. } => *chunk_size_bytes,
        }
    }

    pub(crate) fn worker(&self) -> PositionedWorker {
        self.kind.worker()
    }

    /// Writes a batch to `offset`, in bytes of plaintext.
    pub(crate) fn write(
        &self,
        worker: &mut PositionedWorker,
        offset: u64,
        batch: &Rope<'_>,
        interrupt: &mut Interrupt<'_>,
    ) -> Result<()> {
        self.kind.write(worker, &*self.object, offset, batch, interrupt)
    }
}

impl PositionedKind {
    pub(super) fn worker(&self) -> PositionedWorker {
        let encryption = match self {
            Self::Plain(_) => None,
            Self::Encrypted { encryptors, .. } => Some(encryptors.worker()),
        };
        PositionedWorker { encryption, room: Vec::new() }
    }

    /// Writes a batch to `offset` of an object, in bytes of plaintext.
    pub(super) fn write(
        &self,
        worker: &mut PositionedWorker,
        object: &dyn WriteAt,
        offset: u64,
        batch: &Rope<'_>,
        interrupt: &mut Interrupt<'_>,
    ) -> Result<()> {
        let PositionedWorker { encryption, room } = worker;
        match (self, encryption) {
            (Self::Encrypted { encryptors, chunk_size_bytes }, Some(worker)) => {
                let first_index = offset / *chunk_size_bytes as u64;
                encryptors.encrypt_rope(worker, object, first_index, batch, room, interrupt)
            }
            (Self::Plain(digest), _) => {
                object.write_runs_at(batch.runs(), offset, interrupt)?;
                if let Some(collected) = digest
                    && batch.len() > 0
                {
                    let first = offset / SUBTREE_BYTES as u64;
                    let mut subtrees = Vec::with_capacity(batch.len() / SUBTREE_BYTES);
                    batch.in_steps(SUBTREE_BYTES, room, |bytes| {
                        subtrees.push(subtree(first + subtrees.len() as u64, bytes));
                        Result::Ok(())
                    })?;
                    lock(collected).add(first, subtrees);
                }
                Ok(())
            }
            (Self::Encrypted { .. }, None) => unreachable!("a worker belongs to the writer that made it"),
        }
    }
}

impl Collected {
    pub(super) fn add(&mut self, first: u64, subtrees: Vec<Subtree>) {
        self.waiting.insert(first, subtrees);
        while let Some(next) = self.waiting.remove(&self.digest.next_subtree()) {
            self.digest.push(next);
        }
    }
}
