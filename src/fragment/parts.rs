//! A fragment written in parts, by several threads, each at its own place.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};

use super::digest::{Digest, PIECE_BYTES, Subtree, subtree};
use super::sealing::{self, Sealers};
use super::{STRIP_BYTES, not_written, strip_bytes};
use crate::error::Result;
use crate::threads::lock;

/// Where parts go. A part begins at a multiple of [`Parts::unit_bytes`] and is some of them long, and something must follow the
/// last, by a write as usual.
pub(crate) struct Parts {
    pub(super) file: Arc<File>,
    pub(super) kind: Kind,
}

pub(super) enum Kind {
    Plain(Option<Mutex<Collected>>),
    Sealed { sealers: Arc<Sealers>, chunk_size_bytes: usize },
}

/// Digests of parts, which come in any order.
#[derive(Default)]
pub(super) struct Collected {
    pub(super) digest: Box<Digest>,
    /// By the index of their first piece; as many as there are threads, at most.
    waiting: BTreeMap<u64, Vec<Subtree>>,
}

/// What one thread needs to write parts.
pub(crate) struct PartWorker(Option<sealing::Worker>);

impl Parts {
    /// Bytes of which a part has some number.
    pub(crate) fn unit_bytes(&self) -> usize {
        match &self.kind {
            Kind::Plain(None) => 1,
            Kind::Plain(Some(_)) => PIECE_BYTES,
            Kind::Sealed { chunk_size_bytes, .. } => *chunk_size_bytes,
        }
    }

    pub(crate) fn worker(&self) -> PartWorker {
        match &self.kind {
            Kind::Plain(_) => PartWorker(None),
            Kind::Sealed { sealers, .. } => PartWorker(Some(sealers.worker())),
        }
    }

    /// Writes a part to `offset`, in bytes of plaintext.
    pub(crate) fn write(&self, worker: &mut PartWorker, offset: u64, data: &[u8]) -> Result<()> {
        match (&self.kind, &mut worker.0) {
            (Kind::Sealed { sealers, chunk_size_bytes }, Some(worker)) => {
                let strip_bytes = strip_bytes(*chunk_size_bytes);
                let mut index = offset / *chunk_size_bytes as u64;
                for strip in data.chunks(strip_bytes) {
                    sealers.seal_strip(worker, &self.file, index, strip)?;
                    index += (strip.len() / chunk_size_bytes) as u64;
                }
                Ok(())
            }
            (Kind::Plain(digest), _) => {
                for (number, strip) in data.chunks(STRIP_BYTES).enumerate() {
                    self.file.write_all_at(strip, offset + (number * STRIP_BYTES) as u64).map_err(not_written)?;
                }
                if let Some(collected) = digest
                    && !data.is_empty()
                {
                    let first = offset / PIECE_BYTES as u64;
                    let pieces = data.chunks(PIECE_BYTES).zip(first..);
                    let subtrees = pieces.map(|(piece, index)| subtree(index, piece)).collect();
                    lock(collected).add(first, subtrees);
                }
                Ok(())
            }
            (Kind::Sealed { .. }, None) => unreachable!("a worker is of the parts it writes"),
        }
    }
}

impl Collected {
    fn add(&mut self, first: u64, subtrees: Vec<Subtree>) {
        self.waiting.insert(first, subtrees);
        while let Some(next) = self.waiting.remove(&self.digest.next_piece()) {
            self.digest.push(next);
        }
    }
}
