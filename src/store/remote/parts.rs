//! The parts of an object that is being written.

use std::collections::{BTreeMap, BTreeSet};

use super::objects::Part;
use super::runtime::Task;
use crate::buffer;
use crate::error::{Error, Kind, Result};

/// The state of an object: its parts, wherever they are.
pub(super) struct State {
    pub(super) stage: Stage,
    /// The parts that are not full, by their index.
    pub(super) filling: BTreeMap<usize, Filling>,
    /// The parts that were taken to be sent.
    pub(super) taken: BTreeSet<usize>,
    /// The parts that the store has.
    pub(super) sent: BTreeMap<usize, Part>,
    pub(super) tasks: Vec<Task<()>>,
    /// Whether the store may know an upload.
    pub(super) is_begun: bool,
    /// The end of the last byte that was written.
    pub(super) end: u64,
    pub(super) written: u64,
    /// The size, if its owner has set it.
    pub(super) size: Option<u64>,
}

/// How far an object is.
pub(super) enum Stage {
    Writing,
    /// Nothing more is written. When this many parts are there, the object is made of them.
    Finishing {
        parts: usize,
        size: u64,
    },
    /// The request that makes the object is under way.
    Completing,
    Finished,
    /// Until somebody takes the error.
    Failed(Option<Error>),
    Abandoned,
    Discarded,
}

/// A part that is not full.
pub(super) struct Filling {
    pub(super) bytes: Vec<u8>,
    written: usize,
}

impl State {
    /// The state of an object of which nothing was written.
    pub(super) fn new() -> Self {
        Self {
            stage: Stage::Writing,
            filling: BTreeMap::new(),
            taken: BTreeSet::new(),
            sent: BTreeMap::new(),
            tasks: Vec::new(),
            is_begun: false,
            end: 0,
            written: 0,
            size: None,
        }
    }

    pub(super) fn check_writing(&mut self) -> Result<()> {
        match &mut self.stage {
            Stage::Writing => Ok(()),
            Stage::Failed(error) => Err(error.take().unwrap_or_else(failed_before)),
            Stage::Finishing { .. } | Stage::Completing | Stage::Finished => {
                Err(Error::new(Kind::State, "was finished"))
            }
            Stage::Abandoned | Stage::Discarded => Err(Error::new(Kind::State, "was discarded")),
        }
    }

    /// Copies bytes into a part.
    pub(super) fn fill(&mut self, index: usize, within: usize, bytes: &[u8], part_bytes: usize) -> Result<()> {
        let part = self.filling.entry(index).or_insert(Filling { bytes: Vec::new(), written: 0 });
        let end = within + bytes.len();
        if end > part.bytes.len() {
            if end > part.bytes.capacity() {
                // A small object takes little memory, and a part of a large one is moved seldom.
                let more = end.next_power_of_two().min(part_bytes) - part.bytes.len();
                buffer::reserve(&mut part.bytes, more)?;
            }
            part.bytes.resize(end, 0);
        }
        part.bytes[within..end].copy_from_slice(bytes);
        part.written += bytes.len();
        Ok(())
    }

    /// Takes the full parts, unless the object may still fit one.
    pub(super) fn take_full(&mut self, part_bytes: usize) -> Vec<(usize, Vec<u8>)> {
        if self.end <= part_bytes as u64 {
            return Vec::new();
        }
        let full = self.filling.iter().filter(|(_, part)| part.written == part_bytes);
        let full: Vec<_> = full.map(|(index, _)| *index).collect();
        full.into_iter().filter_map(|index| self.take(index)).collect()
    }

    pub(super) fn take(&mut self, index: usize) -> Option<(usize, Vec<u8>)> {
        let part = self.filling.remove(&index)?;
        self.taken.insert(index);
        Some((index, part.bytes))
    }

    /// Releases the memory. The caller drops the tasks when it has released the lock.
    pub(super) fn clear(&mut self) -> Vec<Task<()>> {
        self.filling.clear();
        std::mem::take(&mut self.tasks)
    }

    /// The parts in order, if all are there and nothing more is written.
    pub(super) fn complete(&mut self) -> Option<(Vec<Part>, u64)> {
        let Stage::Finishing { parts, size } = self.stage else { return None };
        if self.sent.len() < parts {
            return None;
        }
        self.stage = Stage::Completing;
        Some((std::mem::take(&mut self.sent).into_values().collect(), size))
    }
}

/// Bytes that were never written are zero.
pub(super) fn padded(mut bytes: Vec<u8>, length: usize) -> Result<Vec<u8>> {
    let more = length.saturating_sub(bytes.len());
    buffer::reserve(&mut bytes, more)?;
    bytes.resize(length, 0);
    Ok(bytes)
}

pub(super) fn failed_before() -> Error {
    Error::new(Kind::State, "was given up after an error")
}
