//! The page records of guest memory: batches that several threads read, decrypt and decompress, written in order.

use std::io::Write;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex};

use super::format::flag;
use super::front::push_name;
use crate::buffer;
use crate::error::Result;
use crate::memory::{GuestMemory, ReadBuffers};
use crate::store::pipe;
use crate::threads::{Interrupt, for_each, lock};
use crate::zeros::PAGE_BYTES;

const PAGE: u64 = PAGE_BYTES as u64;

/// The part of a block that one thread reads at a time: as many records as a pipe holds.
const BATCH_BYTES: u64 = 1 << 20;

/// A part of a block, and where its bytes are in guest memory.
pub(super) struct Part<'a> {
    /// The name of the block in the stream that is sent.
    pub(super) name: &'a str,
    /// The offset in the block.
    pub(super) offset: u64,
    pub(super) region: usize,
    /// The range in the region.
    pub(super) range: Range<u64>,
    /// Whether pages of zeros are sent.
    pub(super) zeros: bool,
}

impl Part<'_> {
    /// Returns the number of bytes that are sent, without the rest of a page at the border of data.
    pub(super) fn bytes(&self, memory: &GuestMemory) -> u64 {
        if self.zeros {
            return self.range.end - self.range.start;
        }
        memory.data_within(self.region, self.range.clone()).map(|data| data.end - data.start).sum()
    }

    /// Iterates over the batches. Those without a page that is sent are left out.
    fn batches<'b>(&'b self, memory: &'b GuestMemory) -> impl Iterator<Item = Part<'b>> {
        let mut at = self.range.start;
        std::iter::from_fn(move || {
            if !self.zeros {
                let data = memory.data_within(self.region, at..self.range.end).next()?;
                at = data.start - (data.start - self.range.start) % PAGE;
            }
            let range = at..self.range.end.min(at + BATCH_BYTES);
            at = range.end;
            let offset = self.offset + (range.start - self.range.start);
            (!range.is_empty()).then_some(Part { offset, range, ..*self })
        })
    }
}

/// The buffers of one thread.
#[derive(Default)]
struct Worker {
    buffers: ReadBuffers,
    records: Vec<u8>,
}

impl Worker {
    /// Makes the records of a batch. The first one names the block, so that batches do not depend on each other.
    fn fill(&mut self, memory: &GuestMemory, batch: &Part<'_>, interrupt: &mut Interrupt<'_>) -> Result<()> {
        const RECORD_BYTES: usize = 8 + PAGE_BYTES;
        let Self { buffers, records } = self;
        let start = batch.range.start;
        let data: Vec<_> = memory.data_within(batch.region, batch.range.clone()).collect();
        let page_of = |at: u64| usize::try_from((at - start) / PAGE).unwrap_or(usize::MAX);
        let pages = page_of(batch.range.end);
        let mut with_data = vec![false; pages];
        for piece in data.iter().flat_map(|range| pieces(range, start)) {
            with_data[page_of(piece.start)] = true;
        }

        records.clear();
        buffer::reserve(records, pages * RECORD_BYTES + 1 + batch.name.len())?;
        let mut bodies = vec![0; pages];
        for (page, has_data) in with_data.into_iter().enumerate() {
            if !has_data && !batch.zeros {
                continue;
            }
            let address = batch.offset + page as u64 * PAGE;
            let kind = if has_data { flag::PAGE } else { flag::ZERO };
            if records.is_empty() {
                records.extend((address | kind).to_be_bytes());
                push_name(records, batch.name);
            } else {
                records.extend((address | kind | flag::CONTINUE).to_be_bytes());
            }
            bodies[page] = records.len();
            records.resize(records.len() + if has_data { PAGE_BYTES } else { 1 }, 0);
        }

        let Some(first) = data.first().map(|range| range.start) else { return Ok(()) };
        let mut places = Vec::with_capacity(pages);
        let (mut rest, mut taken) = (&mut records[..], 0);
        for piece in data.iter().flat_map(|range| pieces(range, start)) {
            let within = usize::try_from((piece.start - start) % PAGE).unwrap_or(usize::MAX);
            let from = bodies[page_of(piece.start)] + within;
            let to = from + usize::try_from(piece.end - piece.start).unwrap_or(usize::MAX);
            let (now, later) = rest.split_at_mut(to - taken);
            places.push(&mut now[from - taken..]);
            (rest, taken) = (later, to);
        }
        memory.gather(buffers, batch.region, first, &mut places, interrupt)
    }
}

/// Cuts a range at the borders of pages, which are counted from `start`.
fn pieces(range: &Range<u64>, start: u64) -> impl Iterator<Item = Range<u64>> {
    let Range { start: mut at, end } = *range;
    std::iter::from_fn(move || {
        let border = start + ((at - start) / PAGE + 1) * PAGE;
        let piece = at..end.min(border);
        at = piece.end;
        (!piece.is_empty()).then_some(piece)
    })
}

/// Whose turn it is to write.
#[derive(Default)]
struct Turns {
    next: Mutex<usize>,
    changed: Condvar,
}

impl Turns {
    /// Waits for a turn, and does `work`. The lock is free meanwhile, so that those who wait see an interruption.
    fn take(
        &self,
        number: usize,
        interrupt: &mut Interrupt<'_>,
        work: impl FnOnce(&mut Interrupt<'_>) -> Result<()>,
    ) -> Result<()> {
        let mut next = lock(&self.next);
        while *next != number {
            next = interrupt.wait(&self.changed, next, &self.next)?;
        }
        drop(next);
        work(interrupt)?;
        *lock(&self.next) += 1;
        self.changed.notify_all();
        Ok(())
    }
}

/// Writes the records of all parts, with `threads` threads. `done` counts the bytes of guest memory that were written.
/// Returns the number of bytes of the records.
pub(super) fn write_records(
    memory: &GuestMemory,
    parts: &[Part<'_>],
    stream: &Mutex<&mut (dyn Write + Send)>,
    threads: usize,
    done: &AtomicU64,
    interrupt: &mut Interrupt<'_>,
) -> Result<u64> {
    let (turns, written) = (Turns::default(), AtomicU64::new(0));
    let mut workers: Vec<_> = (0..threads).map(|_| Worker::default()).collect();
    let batches = parts.iter().flat_map(|part| part.batches(memory)).enumerate();
    for_each(&mut workers, batches, interrupt, |worker, (number, batch), interrupt| {
        worker.fill(memory, &batch, interrupt)?;
        turns.take(number, interrupt, |interrupt| {
            pipe::write_all(&mut **lock(stream), &worker.records, interrupt)?;
            written.fetch_add(worker.records.len() as u64, Ordering::Relaxed);
            done.fetch_add(batch.bytes(memory), Ordering::Relaxed);
            Ok(())
        })
    })?;
    Ok(written.into_inner())
}
