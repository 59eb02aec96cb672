//! `SnapshotReader::send_migration`: makes a whole migration stream of the fragment with the devices and of guest
//! memory.

use std::io::Write;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};

use super::format::section;
use super::front::Front;
use super::input::{self, Input};
use super::kept::Kept;
use super::output::Output;
use super::passage::{Passage, Take};
use super::records::{Part, write_records};
use crate::error::{Error, Result};
use crate::memory::{GuestMemory, MemoryProgress};
use crate::name::shown;
use crate::snapshot::SnapshotReader;
use crate::store::pipe;
use crate::threads::{self, Interrupt, lock};
use crate::zeros::PAGE_BYTES;

/// A RAM block of the fragment with the devices, whose pages are sent or whose name is changed.
#[derive(Clone, Debug)]
pub struct SentBlock {
    name: String,
    sent_name: String,
    ranges: Vec<SentRange>,
    zeros: bool,
    replaced: bool,
}

/// A part of a block, and where its bytes are in guest memory.
#[derive(Clone, Debug)]
struct SentRange {
    offset: u64,
    guest_base: u64,
    size: u64,
}

impl SentBlock {
    /// Sends the block `name` without pages of guest memory.
    #[must_use]
    pub fn new(name: impl Into<String>) -> Self {
        let name = name.into();
        Self { sent_name: name.clone(), name, ranges: Vec::new(), zeros: false, replaced: false }
    }

    /// Sets the name that the block has in the QEMU that receives the stream. By default the same.
    #[must_use]
    pub fn sent_as(mut self, name: impl Into<String>) -> Self {
        self.sent_name = name.into();
        self
    }

    /// Adds pages: the `size` bytes at `offset` of the block are the guest memory at `guest_base`. Offset and size are
    /// multiples of 4096, and all of the memory is in one region.
    #[must_use]
    pub fn range(mut self, offset: u64, guest_base: u64, size: u64) -> Self {
        self.ranges.push(SentRange { offset, guest_base, size });
        self
    }

    /// Sets whether pages of zeros are sent, for memory that may contain other bytes. Off by default.
    #[must_use]
    pub fn zeros(mut self, zeros: bool) -> Self {
        self.zeros = zeros;
        self
    }

    /// Sets whether pages of the block that are in the fragment are left out, because all of them come from elsewhere:
    /// from guest memory, or from a file. Off by default.
    #[must_use]
    pub fn replaced(mut self, replaced: bool) -> Self {
        self.replaced = replaced;
        self
    }
}

impl SnapshotReader {
    /// Writes a migration stream for QEMU: the stream in `fragment`, with pages of guest memory put into it. It needs no
    /// migration capability: if `x-ignore-shared` was on, it is taken out. Returns the number of bytes. Several threads read, decrypt and decompress; the stream is written in order.
    ///
    /// A block of the fragment that is not in `blocks` keeps its name, and no pages are added to it.
    ///
    /// # Errors
    ///
    /// [`Error::is_invalid_argument`] if `blocks` do not fit the blocks in the fragment, or guest memory.
    /// [`Error::is_corrupt`], [`Error::is_unsupported_format`] or [`Error::is_authentication`] if the fragment or guest
    /// memory is damaged. [`Error::is_io`] if the stream cannot be written: errno EPIPE if QEMU stopped reading.
    pub fn send_migration(&self, stream: &mut (dyn Write + Send), blocks: &[SentBlock], fragment: &str) -> Result<u64> {
        self.send_migration_interruptible(stream, blocks, fragment, None, &mut |_| Ok(()))
    }

    /// Writes a migration stream as [`SnapshotReader::send_migration`] does, with at most `threads` threads, and calls
    /// `progress` at most every 50 ms. An error of `progress` ends the call.
    ///
    /// # Errors
    ///
    /// The errors of [`SnapshotReader::send_migration`], and the error that `progress` returns.
    pub fn send_migration_interruptible(
        &self,
        stream: &mut (dyn Write + Send),
        blocks: &[SentBlock],
        fragment: &str,
        threads: Option<usize>,
        progress: &mut dyn FnMut(MemoryProgress) -> Result<()>,
    ) -> Result<u64> {
        let place = self.place(fragment)?;
        let in_fragment = |error: Error| error.context(&place);
        let threads = match threads {
            None => self.threads(),
            wanted => threads::resolve(wanted)?,
        };
        let memory = blocks.iter().any(|block| !block.ranges.is_empty()).then(|| self.memory()).transpose()?;
        let mut reader = self.raw_fragment(fragment)?;
        let mut go_on = || Ok(());
        let mut input = Input::new(&mut reader, input::BUFFER_BYTES)?;
        let front = Front::read(&mut input, &mut Interrupt::new(&mut go_on)).map_err(in_fragment)?;
        let front = front.without_capabilities();
        let names = names(&front, blocks)?;
        let parts = match &memory {
            Some(memory) => parts(&front, &names, blocks, memory)?,
            None => Vec::new(),
        };

        let total_bytes = memory.iter().flat_map(|memory| parts.iter().map(|part| part.bytes(memory))).sum();
        let done = AtomicU64::new(0);
        let mut report = || progress(MemoryProgress { done_bytes: done.load(Ordering::Relaxed), total_bytes });
        let interrupt = &mut Interrupt::new(&mut report);
        let stream = Mutex::new(stream);
        let mut sink =
            |bytes: &[u8], interrupt: &mut Interrupt<'_>| pipe::write_all(&mut **lock(&stream), bytes, interrupt);
        let output = Output::new(&mut sink, input::BUFFER_BYTES)?;
        let mut passage = Passage::new(input, Kept::begin(output, &front, names, interrupt)?, &front);
        let replaced: Vec<bool> = front
            .blocks
            .iter()
            .map(|block| blocks.iter().any(|sent| sent.replaced && sent.name == block.name))
            .collect();
        let take: &mut Take<'_> = &mut |block, _, _, _| Ok(replaced[block]);
        passage.first_section(take, interrupt).map_err(in_fragment)?;
        let mut sent = 0;
        if let Some(memory) = memory.filter(|_| !parts.is_empty()) {
            // A section of its own: no other one has to be changed. It follows the state that QEMU loads before pages.
            passage.kept.begin_section(section::PART, interrupt)?;
            passage.kept.flush(interrupt)?;
            sent = write_records(&memory, &parts, &stream, threads, &done, interrupt)?;
            passage.kept.end_section(interrupt)?;
            passage.kept.forget_last_block();
        }
        passage.other_sections(take, interrupt).map_err(in_fragment)?;
        passage.rest(interrupt).map_err(in_fragment)?;
        sent += passage.kept.written();
        drop(passage);
        progress(MemoryProgress { done_bytes: total_bytes, total_bytes })?;
        Ok(sent)
    }
}

/// Returns the name that each block is sent with.
fn names<'a>(front: &'a Front, blocks: &'a [SentBlock]) -> Result<Vec<&'a str>> {
    let mut names: Vec<&str> = front.blocks.iter().map(|block| &*block.name).collect();
    for (number, block) in blocks.iter().enumerate() {
        let at = number_of(front, block)?;
        if blocks[..number].iter().any(|other| other.name == block.name) {
            return Err(Error::invalid_argument(format!("the RAM block {} is given twice", shown(&block.name))));
        }
        if !(1..=usize::from(u8::MAX)).contains(&block.sent_name.len()) {
            let text = format!("{} cannot be the name of a RAM block: it has 1 to 255 bytes", shown(&block.sent_name));
            return Err(Error::invalid_argument(text));
        }
        names[at] = &block.sent_name;
    }
    for (number, name) in names.iter().enumerate() {
        if names[..number].contains(name) {
            return Err(Error::invalid_argument(format!("two RAM blocks would be sent as {}", shown(name))));
        }
    }
    Ok(names)
}

fn number_of(front: &Front, block: &SentBlock) -> Result<usize> {
    front.find(&block.name).ok_or_else(|| {
        let text = format!("there is no RAM block {}; the blocks are {}", shown(&block.name), front.names());
        Error::invalid_argument(text)
    })
}

/// Returns the ranges of all blocks, each with its place in guest memory.
fn parts<'a>(front: &Front, names: &[&'a str], blocks: &[SentBlock], memory: &GuestMemory) -> Result<Vec<Part<'a>>> {
    let mut parts = Vec::new();
    for block in blocks {
        let number = number_of(front, block)?;
        for &SentRange { offset, guest_base, size } in &block.ranges {
            let is_aligned = (offset | size).is_multiple_of(PAGE_BYTES as u64);
            let block_size = front.blocks[number].size;
            if !is_aligned || offset.checked_add(size).is_none_or(|end| end > block_size) {
                let text = format!(
                    "{size} bytes at offset {offset} of the RAM block {} are not pages of it: it has {block_size} bytes",
                    shown(&block.name)
                );
                return Err(Error::invalid_argument(text));
            }
            let (region, start) = memory.locate(guest_base, size)?;
            let range = start..start + size;
            parts.push(Part { name: names[number], offset, region, range, zeros: block.zeros });
        }
    }
    Ok(parts)
}
