//! A fragment written in parts, by several threads, each at its own place.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, IoSlice};
use std::sync::{Arc, Mutex};

use rustix::io::{Errno, pwritev};

use super::digest::{Digest, PIECE_BYTES, Subtree, subtree};
use super::encryptors::{EncryptionWorker, Encryptors};
use super::not_written;
use super::rope::Rope;
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
    Encrypted { encryptors: Arc<Encryptors>, chunk_size_bytes: usize },
}

/// Digests of parts, which come in any order.
#[derive(Default)]
pub(super) struct Collected {
    pub(super) digest: Box<Digest>,
    /// By the index of their first piece; as many as there are threads, at most.
    waiting: BTreeMap<u64, Vec<Subtree>>,
}

/// What one thread needs to write parts.
pub(crate) struct PartWorker {
    encryption: Option<EncryptionWorker>,
    /// For a unit that does not lie together.
    room: Vec<u8>,
}

impl Parts {
    /// Bytes of which a part has some number.
    pub(crate) fn unit_bytes(&self) -> usize {
        match &self.kind {
            Kind::Plain(None) => 1,
            Kind::Plain(Some(_)) => PIECE_BYTES,
            Kind::Encrypted { chunk_size_bytes, .. } => *chunk_size_bytes,
        }
    }

    pub(crate) fn worker(&self) -> PartWorker {
        let encryption = match &self.kind {
            Kind::Plain(_) => None,
            Kind::Encrypted { encryptors, .. } => Some(encryptors.worker()),
        };
        PartWorker { encryption, room: Vec::new() }
    }

    /// Writes a part to `offset`, in bytes of plaintext.
    pub(crate) fn write(&self, worker: &mut PartWorker, offset: u64, part: &Rope<'_>) -> Result<()> {
        let PartWorker { encryption, room } = worker;
        match (&self.kind, encryption) {
            (Kind::Encrypted { encryptors, chunk_size_bytes }, Some(worker)) => {
                encryptors.encrypt_rope(worker, &self.file, offset / *chunk_size_bytes as u64, part, room)
            }
            (Kind::Plain(digest), _) => {
                write_runs(&self.file, part.runs(), offset).map_err(not_written)?;
                if let Some(collected) = digest
                    && part.len() > 0
                {
                    let first = offset / PIECE_BYTES as u64;
                    let mut subtrees = Vec::with_capacity(part.len() / PIECE_BYTES);
                    part.units(PIECE_BYTES, room, |piece| {
                        subtrees.push(subtree(first + subtrees.len() as u64, piece));
                        Result::Ok(())
                    })?;
                    lock(collected).add(first, subtrees);
                }
                Ok(())
            }
            (Kind::Encrypted { .. }, None) => unreachable!("a worker is of the parts it writes"),
        }
    }
}

/// Writes runs one after the other.
fn write_runs(file: &File, runs: &[&[u8]], mut offset: u64) -> io::Result<()> {
    for runs in runs.chunks(IOV_MAX) {
        let mut slices: Vec<_> = runs.iter().map(|run| IoSlice::new(run)).collect();
        let mut left = &mut slices[..];
        while !left.is_empty() {
            match pwritev(file, left, offset) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => {
                    offset += count as u64;
                    IoSlice::advance_slices(&mut left, count);
                }
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
    }
    Ok(())
}

/// `IOV_MAX` of linux/uio.h: what one call takes.
const IOV_MAX: usize = 1024;

impl Collected {
    fn add(&mut self, first: u64, subtrees: Vec<Subtree>) {
        self.waiting.insert(first, subtrees);
        while let Some(next) = self.waiting.remove(&self.digest.next_piece()) {
            self.digest.push(next);
        }
    }
}
