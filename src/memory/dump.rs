//! Writes guest memory to the fragments `mem` and `mem_metadata`, with all threads.
//!
//! Memory is divided into batches. A thread reads the data of a batch into its own buffer and drops the zeros. When it
//! is the turn of its batch, the thread assigns the data its offset in the stream. It then compresses, encrypts and
//! writes its batch while other threads work on theirs.

use std::io;
use std::ops::Range;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Instant;

use super::lz4::{self, Packer};
use super::metadata::{self, BlockIndex, MEMORY, METADATA, Metadata, RegionMetadata};
use super::options::{GuestRegion, MemoryOptions, MemoryProgress, MemoryReport};
use super::ranges::{append, append_near, bytes_in, drop_zeros, find_data, page_end};
use super::reorder::{AnnotatedBatch, BatchBuffer, ReorderBuffer, Rest, Sequencer};
use super::source::{GuestMemorySource, is_of_page};
use crate::buffer;
use crate::error::{Error, Result};
use crate::fragment::positioned::{PositionedWorker, PositionedWriter};
use crate::fragment::rope::Rope;
use crate::snapshot::SnapshotWriter;
use crate::threads::{Interrupt, for_each, lock};

/// The guest memory that one thread reads at a time: it fits the second-level cache, and waiting for turns takes a
/// negligible time.
pub(super) const DUMP_BATCH_BYTES: usize = 512 << 10;

/// Compressed batches that may wait for an earlier one, in addition to two for each thread: noise compresses ten times
/// as fast as text.
const MAX_WAITING_BATCHES: usize = 8;

impl SnapshotWriter {
    /// Writes guest memory to the fragments `mem` and `mem_metadata`, in the format that crosvm reads.
    ///
    /// ```
    /// # let directory = tempfile::tempdir()?;
    /// # let writer = vmsnap::SnapshotWriter::new(directory.path().join("vm1"), false)?;
    /// use vmsnap::{GuestRegion, MemoryOptions};
    ///
    /// let low = vec![7; 65536];
    /// let regions = [GuestRegion::new(0, &low), GuestRegion::new(1 << 32, vec![0; 4096])];
    /// let report = writer.write_memory(&regions, &MemoryOptions::new().compress(true))?;
    /// assert_eq!((report.logical_bytes, report.data_bytes, report.ranges), (69632, 65536, 1));
    /// # Ok::<(), vmsnap::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::is_invalid_argument`] if regions overlap or a size is not allowed. [`Error::is_io`] if one of the
    /// fragments exists, memory cannot be read (the text has its address), or the disk is full. Both fragments are
    /// removed after an error.
    pub fn write_memory(&self, regions: &[GuestRegion<'_>], options: &MemoryOptions) -> Result<MemoryReport> {
        self.write_memory_interruptible(regions, options, &mut |_| Ok(()))
    }

    /// Writes guest memory as [`SnapshotWriter::write_memory`] does, and calls `progress` at most every 50 ms and once
    /// when everything is written. An error of `progress` ends the dump.
    ///
    /// # Errors
    ///
    /// The errors of [`SnapshotWriter::write_memory`], and the error that `progress` returns.
    pub fn write_memory_interruptible(
        &self,
        regions: &[GuestRegion<'_>],
        options: &MemoryOptions,
        progress: &mut dyn FnMut(MemoryProgress) -> Result<()>,
    ) -> Result<MemoryReport> {
        let began = Instant::now();
        metadata::check_apart(regions.iter().map(|region| (region.guest_base, region.source.size())))
            .map_err(Error::invalid_argument)?;
        if lz4::header(options.block_size_bytes).is_none() {
            let text =
                format!("an LZ4 block has 64 KiB, 256 KiB, 1 MiB or 4 MiB, not {} bytes", options.block_size_bytes);
            return Err(Error::invalid_argument(text));
        }
        let logical_bytes = regions.iter().fold(0, |sum: u64, region| sum.saturating_add(region.source.size()));
        // Blocks that do not become smaller have a few bytes more.
        let most_bytes = logical_bytes.saturating_add(logical_bytes / 4096).saturating_add(1 << 20);
        let mut memory = self.raw_fragment_with_size(MEMORY, options.chunk_size_bytes, most_bytes)?;
        memory.set_uncached(options.uncached);
        let mut metadata = self.raw_fragment(METADATA).inspect_err(|_| {
            // The cause is the better error, so a failure to remove the fragment is not reported.
            let _ = memory.remove();
        })?;
        let written = (|| {
            let dump = Dump::new(regions, options);
            let total_bytes = dump.logical_bytes;
            let interrupt =
                &mut || progress(MemoryProgress { done_bytes: dump.done.load(Ordering::Relaxed), total_bytes });
            let mut rest = Vec::new();
            let mut lengths = None;
            memory.write_positioned(|positioned| {
                let stored = dump.run(positioned, self.threads(), &mut Interrupt::new(interrupt))?;
                (rest, lengths) = (stored.rest.carry, stored.block_lengths);
                Ok(stored.rest.offset)
            })?;
            memory.write_all_interruptible(&rest, interrupt)?;
            let mut found = dump.found.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner);
            let document = found.metadata(regions, options, lengths);
            let mut report = found.report(&document);
            metadata.write_all_interruptible(&self.encode(METADATA, &document)?, &mut || Ok(()))?;
            progress(MemoryProgress { done_bytes: total_bytes, total_bytes })?;
            // The short fragment is finished first, so that a failure of the long one is reported as its own.
            metadata.finish_interruptible(&mut || Ok(()))?;
            memory.finish_interruptible(&mut || Ok(()))?;
            report.stored_bytes = memory.stored_size()? + metadata.stored_size()?;
            report.duration = began.elapsed();
            Ok(report)
        })();
        if written.is_err() {
            let _ = memory.remove();
            let _ = metadata.remove();
        }
        written
    }
}

/// The end of the stream, which is not written yet, and the index of the blocks.
struct Stored {
    rest: Rest,
    block_lengths: Option<Vec<u8>>,
}

struct Dump<'a> {
    regions: &'a [GuestRegion<'a>],
    options: &'a MemoryOptions,
    logical_bytes: u64,
    done: AtomicU64,
    ranges: AtomicUsize,
    found: Mutex<Found>,
}

/// The range of guest memory that one thread works on at a time.
struct Batch {
    /// Its number among the batches with data.
    number: usize,
    region: usize,
    /// Offsets in the region.
    range: Range<u64>,
}

#[derive(Default)]
struct Found {
    /// The data ranges of each region, as offsets in it.
    ranges: Vec<Vec<Range<u64>>>,
    unreadable: Vec<Range<u64>>,
}

struct DumpWorker {
    data: BatchBuffer,
    /// The data ranges that the source reports for the batch.
    found: Vec<Range<u64>>,
    /// The data ranges that are stored.
    ranges: Vec<Range<u64>>,
    unreadable: Vec<Range<u64>>,
    /// The data that the previous batch left over.
    head: Vec<u8>,
    /// A block whose bytes are not contiguous.
    room: Vec<u8>,
    /// The compressor, with the buffer for compressed blocks and their lengths. [`ReorderBuffer::put`] takes the buffer
    /// and returns another one.
    packing: Option<(Packer, Option<AnnotatedBatch>)>,
    position_worker: PositionedWorker,
}

/// The order in which batches take their offsets.
struct Stages {
    data: Sequencer,
    /// The compressed stream, if blocks are compressed.
    frame: Option<ReorderBuffer>,
}

/// Returns how many bytes the blocks of a batch take at most, with one block that the previous batch began.
fn most_packed(block_size: usize) -> usize {
    (DUMP_BATCH_BYTES + block_size).div_ceil(block_size) * lz4::most_stored(block_size)
}

impl<'a> Dump<'a> {
    fn new(regions: &'a [GuestRegion<'a>], options: &'a MemoryOptions) -> Self {
        Self {
            regions,
            options,
            logical_bytes: regions.iter().map(|region| region.source.size()).sum(),
            done: AtomicU64::new(0),
            ranges: AtomicUsize::new(0),
            found: Mutex::new(Found { ranges: vec![Vec::new(); regions.len()], unreadable: Vec::new() }),
        }
    }

    fn run(&self, positioned: &PositionedWriter, threads: usize, interrupt: &mut Interrupt<'_>) -> Result<Stored> {
        let block_size = self.options.block_size_bytes;
        let header = lz4::header(block_size).filter(|_| self.options.compress);
        let stages = match header {
            None => Stages { data: Sequencer::new(positioned.alignment_bytes(), &[]), frame: None },
            Some(header) => Stages {
                data: Sequencer::new(block_size, &[]),
                frame: Some(ReorderBuffer::new(
                    positioned.alignment_bytes(),
                    &header,
                    most_packed(block_size),
                    threads * 2 + MAX_WAITING_BATCHES,
                )),
            },
        };
        let most =
            usize::try_from(self.logical_bytes.div_ceil(DUMP_BATCH_BYTES as u64)).map_or(threads, |most| most.max(1));
        let mut workers: Vec<_> =
            (0..threads.min(most)).map(|_| Self::worker(&stages, positioned)).collect::<Result<_>>()?;
        for_each(&mut workers, self.batches(), interrupt, |worker, batch, interrupt| {
            self.batch(&stages, positioned, worker, &batch?, interrupt)
        })?;
        stages.finish(self.options)
    }

    fn worker(stages: &Stages, positioned: &PositionedWriter) -> Result<DumpWorker> {
        let packing =
            stages.frame.as_ref().map(|reordered| Ok::<_, Error>((Packer::new(), reordered.batch()?))).transpose()?;
        Ok(DumpWorker {
            data: stages.data.batch(DUMP_BATCH_BYTES)?,
            found: Vec::new(),
            ranges: Vec::new(),
            unreadable: Vec::new(),
            head: Vec::new(),
            room: Vec::new(),
            packing,
            position_worker: positioned.worker(),
        })
    }

    /// Iterates over the batches with data. A hole of any length takes no time.
    fn batches(&self) -> impl Iterator<Item = Result<Batch>> + Send {
        let (mut region, mut at, mut number) = (0, 0, 0);
        std::iter::from_fn(move || {
            loop {
                let source = &*self.regions.get(region)?.source;
                let size = source.size();
                let next = match if at < size { self.next_data(source, at) } else { Ok(None) } {
                    // A batch begins where it would begin without holes, so that the list of ranges does not depend on
                    // them.
                    Ok(next) => next.map(|next| next.max(at)).filter(|next| *next < size),
                    Err(error) => {
                        let error = Error::io("cannot be searched for holes", error);
                        return Some(Err(self.in_region(region, error)));
                    }
                };
                let Some(next) = next else {
                    self.done.fetch_add(size - at, Ordering::Relaxed);
                    (region, at) = (region + 1, 0);
                    continue;
                };
                let start = next / DUMP_BATCH_BYTES as u64 * DUMP_BATCH_BYTES as u64;
                self.done.fetch_add(start - at, Ordering::Relaxed);
                at = size.min(start + DUMP_BATCH_BYTES as u64);
                number += 1;
                return Some(Ok(Batch { number: number - 1, region, range: start..at }));
            }
        })
    }

    fn next_data(&self, source: &dyn GuestMemorySource, at: u64) -> io::Result<Option<u64>> {
        if self.options.sparse { source.next_data(at) } else { Ok(Some(at)) }
    }

    fn in_region(&self, region: usize, error: Error) -> Error {
        error.context(format!("guest memory of the region at {:#x}", self.regions[region].guest_base))
    }

    fn batch(
        &self,
        stages: &Stages,
        positioned: &PositionedWriter,
        worker: &mut DumpWorker,
        batch: &Batch,
        interrupt: &mut Interrupt<'_>,
    ) -> Result<()> {
        let Batch { number, region, range: Range { start, end } } = *batch;
        worker.data.clear();
        worker.ranges.clear();
        let bytes = self.regions[region].source.bytes();
        let in_place = bytes.is_some_and(|bytes| self.scan(region, start..end, bytes, worker));
        if !in_place {
            self.gather(region, start..end, worker).map_err(|error| self.in_region(region, error))?;
        }
        let DumpWorker { data, ranges, unreadable, head, packing, position_worker, room, .. } = worker;
        self.ranges.fetch_add(ranges.len(), Ordering::Relaxed);
        let found = || lock(&self.found).add(region, ranges, unreadable);
        let mut aligned = Rope::new();
        let offset;
        if let Some(bytes) = bytes.filter(|_| in_place) {
            ranges.iter().filter_map(|range| bytes_in(bytes, range)).for_each(|run| aligned.push(run));
            (offset, aligned) = stages.data.take_in_place(number, &aligned, head, interrupt, found)?;
        } else {
            let (at, taken) = stages.data.take(number, data, interrupt, found)?;
            aligned.push(taken);
            offset = at;
        }
        match (packing, &stages.frame) {
            (Some((packer, buffer)), Some(reordered)) => {
                let (mut packed, mut lengths) = buffer.take().ok_or_else(Error::interrupted)?;
                aligned.in_steps(self.options.block_size_bytes, room, |block| {
                    let length = packer.pack(block, packed.spare())?;
                    packed.grow(lz4::SIZE_WORD_BYTES + length);
                    lengths.extend_from_slice(&u32::try_from(length).unwrap_or(0).to_le_bytes());
                    Result::Ok(())
                })?;
                let write = |offset, aligned: &[u8], interrupt: &mut Interrupt<'_>| {
                    let mut rope = Rope::new();
                    rope.push(aligned);
                    positioned.write(position_worker, offset, &rope, interrupt)
                };
                *buffer = Some(reordered.put(number, (packed, lengths), interrupt, write)?);
            }
            _ => positioned.write(position_worker, offset, &aligned, interrupt)?,
        }
        self.done.fetch_add(end - start, Ordering::Relaxed);
        Ok(())
    }

    /// Finds the data ranges of a batch whose bytes do not change. Returns false if some of the bytes cannot be read in
    /// place.
    fn scan(&self, region: usize, batch: Range<u64>, bytes: &[u8], worker: &mut DumpWorker) -> bool {
        let source = &*self.regions[region].source;
        let min_gap = self.min_gap();
        worker.found.clear();
        if !self.options.sparse || source.data_ranges(batch.clone(), &mut worker.found).is_err() {
            worker.found.clear();
            worker.found.push(batch.clone());
        }
        let mut at = batch.start;
        for data in &worker.found {
            let range = data.start.max(at)..data.end.min(batch.end);
            let Some(run) = bytes_in(bytes, &range) else { continue };
            if !source.can_touch(range.clone()) {
                worker.ranges.clear();
                return false;
            }
            if self.options.detect_zeros {
                find_data(run, range.start, min_gap, &mut worker.ranges);
            } else {
                append_near(&mut worker.ranges, range.clone(), min_gap);
            }
            at = range.end;
        }
        true
    }

    /// Gaps shorter than this are stored as zeros.
    fn min_gap(&self) -> u64 {
        self.options.min_gap(self.ranges.load(Ordering::Relaxed))
    }

    /// Reads the data of a batch into the worker's buffer, without zeros.
    fn gather(&self, region: usize, batch: Range<u64>, worker: &mut DumpWorker) -> Result<()> {
        let source = &*self.regions[region].source;
        let min_gap = self.min_gap();
        let mut found = std::mem::take(&mut worker.found);
        found.clear();
        let looked = if self.options.sparse {
            source.data_ranges(batch.clone(), &mut found)
        } else {
            found.push(batch.clone());
            Ok(())
        };
        looked.map_err(|error| Error::io("cannot be searched for holes", error))?;
        let mut at = batch.start;
        for data in &found {
            // The source is not trusted: no byte is taken twice or from outside the batch.
            let (start, end) = (data.start.max(at), data.end.min(batch.end));
            if start >= end {
                continue;
            }
            if let Some(last) = worker.ranges.last_mut()
                && start - last.end < min_gap
            {
                // A hole too short for the list of ranges. Zeros after it may make it long enough.
                let gap = usize::try_from(start - last.end).unwrap_or(0);
                worker.data.spare()[..gap].fill(0);
                worker.data.grow(gap);
                last.end = start;
            }
            let length = usize::try_from(end - start).unwrap_or(0);
            self.read(region, start, &mut worker.data.spare()[..length], &mut worker.unreadable)?;
            let kept = if self.options.detect_zeros {
                drop_zeros(&mut worker.data.spare()[..length], start, min_gap, &mut worker.ranges)
            } else {
                append(&mut worker.ranges, start..end);
                length
            };
            worker.data.grow(kept);
            at = end;
        }
        worker.found = found;
        Ok(())
    }

    /// Fills `buf` from the source. If the options allow it, a page that cannot be read becomes zeros and is added to
    /// `unreadable`.
    fn read(&self, region: usize, start: u64, buf: &mut [u8], unreadable: &mut Vec<Range<u64>>) -> Result<()> {
        let GuestRegion { guest_base, source } = &self.regions[region];
        let mut done = 0;
        while done < buf.len() {
            let at = start + done as u64;
            let error = match source.read_at(at, &mut buf[done..]) {
                Ok(0) => io::Error::from(io::ErrorKind::UnexpectedEof),
                Ok(count) => {
                    done += count.min(buf.len() - done);
                    continue;
                }
                Err(error) => error,
            };
            let page = page_end(at).min(start + buf.len() as u64);
            if !self.options.zero_unreadable || !is_of_page(&error) {
                let text = format!("guest-physical address {:#x} cannot be read", guest_base + at);
                // An error of vmsnap keeps its kind: a scratch file may be found damaged.
                return Err(match error.downcast::<Error>() {
                    Ok(own) => own.context(text),
                    Err(error) => Error::io(text, error),
                });
            }
            let rest = usize::try_from(page - at).unwrap_or(0);
            buf[done..done + rest].fill(0);
            done += rest;
            append(unreadable, guest_base + at..guest_base + page);
        }
        Ok(())
    }
}

impl Stages {
    /// Returns the end of the stream after the last batch: the last block, and the end mark.
    fn finish(self, options: &MemoryOptions) -> Result<Stored> {
        let data = self.data.rest();
        let Some(reordered) = self.frame else {
            return Ok(Stored { rest: data, block_lengths: None });
        };
        let (mut rest, mut lengths) = reordered.rest();
        if !data.carry.is_empty() {
            let mut packed = buffer::zeros(lz4::most_stored(options.block_size_bytes))?;
            let length = Packer::new().pack(&data.carry, &mut packed)?;
            buffer::reserve(&mut rest.carry, packed.len() + lz4::END_MARK.len())?;
            rest.carry.extend_from_slice(&packed[..lz4::SIZE_WORD_BYTES + length]);
            lengths.extend_from_slice(&u32::try_from(length).unwrap_or(0).to_le_bytes());
        }
        rest.carry.extend_from_slice(&lz4::END_MARK);
        Ok(Stored { rest, block_lengths: Some(lengths) })
    }
}

impl Found {
    /// Adds the ranges of a batch. Batches are added in order.
    fn add(&mut self, region: usize, ranges: &[Range<u64>], unreadable: &mut Vec<Range<u64>>) -> Result<()> {
        buffer::reserve(&mut self.ranges[region], ranges.len())?;
        for range in ranges {
            append(&mut self.ranges[region], range.clone());
        }
        buffer::reserve(&mut self.unreadable, unreadable.len())?;
        for range in unreadable.drain(..) {
            append(&mut self.unreadable, range);
        }
        Ok(())
    }

    /// Moves the ranges into the metadata, because the lists may be long.
    fn metadata(&mut self, regions: &[GuestRegion<'_>], options: &MemoryOptions, lengths: Option<Vec<u8>>) -> Metadata {
        let regions = regions.iter().zip(&mut self.ranges).map(|(region, ranges)| RegionMetadata {
            guest_base: region.guest_base,
            size: region.source.size(),
            data_ranges: std::mem::take(ranges),
        });
        Metadata {
            regions: regions.collect(),
            compressed: options.compress,
            lz4: lengths.map(|block_lengths| BlockIndex { block_size: options.block_size_bytes as u64, block_lengths }),
        }
    }

    fn report(self, metadata: &Metadata) -> MemoryReport {
        MemoryReport { unreadable: self.unreadable, ..metadata.report() }
    }
}
