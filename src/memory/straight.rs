//! [`Straight`]: the fragment `mem` while the pages of guest memory arrive in the order in which it stores them.

use std::ops::Range;
use std::time::Instant;

use super::dump::DUMP_BATCH_BYTES;
use super::metadata::{self, MEMORY, METADATA, Metadata, RegionMetadata};
use super::options::{MemoryOptions, MemoryReport};
use crate::buffer;
use crate::error::{Error, Kind, Result};
use crate::fragment::Fragment;
use crate::fragment::scratch::ScratchWriter;
use crate::snapshot::SnapshotWriter;
use crate::threads::Interrupt;
use crate::zeros::PAGE_BYTES;

const PAGE: u64 = PAGE_BYTES as u64;

/// A guest region whose memory is a range of an area of a spool.
pub(crate) struct AreaRegion {
    pub(crate) guest_base: u64,
    pub(crate) area: usize,
    pub(crate) range: Range<u64>,
}

/// `mem` and `mem_metadata` as [`SnapshotWriter::write_memory`] writes them with the default options. Dropped before it
/// is finished, it removes the fragment.
pub(crate) struct Straight {
    writer: SnapshotWriter,
    /// `None` when it was finished or became a scratch file.
    memory: Option<Fragment>,
    options: MemoryOptions,
    regions: Vec<AreaRegion>,
    /// The data ranges of each region so far, as offsets in it.
    ranges: Vec<Vec<Range<u64>>>,
    range_count: usize,
    /// The region of the last page.
    current: usize,
    began: Instant,
}

impl Straight {
    /// Creates `mem` with regions in the given order. Returns `None` if they overlap, show a page twice, or do not consist
    /// of whole pages.
    ///
    /// # Errors
    ///
    /// `Io` if the fragment exists or cannot be created.
    pub(crate) fn new(writer: &SnapshotWriter, regions: Vec<AreaRegion>) -> Result<Option<Self>> {
        let is_paged =
            |region: &AreaRegion| region.range.start.is_multiple_of(PAGE) && region.range.end.is_multiple_of(PAGE);
        let sizes =
            regions.iter().map(|region| (region.guest_base, region.range.end.saturating_sub(region.range.start)));
        if regions.is_empty() || !regions.iter().all(is_paged) || metadata::check_apart(sizes).is_err() {
            return Ok(None);
        }
        // A page is written once, but belongs to each region that shows it.
        let mut shown: Vec<_> =
            regions.iter().map(|region| (region.area, region.range.start, region.range.end)).collect();
        shown.sort_unstable();
        if shown.windows(2).any(|pair| pair[0].0 == pair[1].0 && pair[1].1 < pair[0].2) {
            return Ok(None);
        }
        let options = MemoryOptions::new();
        let mut memory = writer.raw_fragment_with_chunk_size(MEMORY, options.chunk_size_bytes)?;
        memory.write_behind();
        Ok(Some(Self {
            writer: writer.clone(),
            memory: Some(memory),
            options,
            ranges: vec![Vec::new(); regions.len()],
            regions,
            range_count: 0,
            current: 0,
            began: Instant::now(),
        }))
    }

    pub(super) fn writer(&self) -> &SnapshotWriter {
        &self.writer
    }

    /// Appends a page that is not zero. Returns its number among the pages in the fragment, or `None` if it does not
    /// come in order; nothing is written then.
    ///
    /// # Errors
    ///
    /// `Io` if the disk is full, and the error of `interrupt`.
    pub(super) fn append(
        &mut self,
        area: usize,
        page: u64,
        bytes: &[u8; PAGE_BYTES],
        interrupt: &mut Interrupt<'_>,
    ) -> Result<Option<u64>> {
        let Some(zeros) = self.place(area, page)? else { return Ok(None) };
        let memory = self.memory.as_mut().ok_or_else(ended)?;
        for _ in 0..zeros {
            memory.append(&[0; PAGE_BYTES], interrupt)?;
        }
        let slot = memory.written() / PAGE;
        memory.append(bytes, interrupt)?;
        Ok(Some(slot))
    }

    /// Adds a page to the data ranges. Returns the number of pages of zeros before it that are stored, or `None` if it
    /// does not come in order.
    fn place(&mut self, area: usize, page: u64) -> Result<Option<u64>> {
        let at = page * PAGE;
        let mut regions = self.regions.iter().enumerate().skip(self.current);
        let found = regions.find(|(_, region)| region.area == area && region.range.contains(&at));
        let Some((number, region)) = found else { return Ok(None) };
        let start = at - region.range.start;
        let ranges = &mut self.ranges[number];
        let zeros = match ranges.last_mut() {
            Some(last) if start < last.end => return Ok(None),
            // As in a dump, a gap that is stored is shorter than a batch.
            Some(last)
                if start - last.end < self.options.min_gap(self.range_count).clamp(1, DUMP_BATCH_BYTES as u64) =>
            {
                let gap = start - last.end;
                last.end = start + PAGE;
                gap / PAGE
            }
            _ => {
                buffer::reserve(ranges, 1)?;
                ranges.push(start..start + PAGE);
                self.range_count += 1;
                0
            }
        };
        self.current = number;
        Ok(Some(zeros))
    }

    /// Removes the fragment, whose pages become the beginning of a scratch file.
    pub(super) fn continue_as_scratch(&mut self, interrupt: &mut Interrupt<'_>) -> Result<ScratchWriter> {
        self.memory.take().ok_or_else(ended)?.into_scratch(self.writer.data_key(), interrupt)
    }

    /// Completes `mem`, and writes `mem_metadata`.
    ///
    /// # Errors
    ///
    /// `Io` if `mem_metadata` exists or the disk is full. Both fragments are removed then.
    pub(super) fn finish(mut self, interrupt: &mut Interrupt<'_>) -> Result<MemoryReport> {
        let mut metadata = self.writer.raw_fragment(METADATA)?;
        let written = self.write_metadata(&mut metadata, interrupt);
        if written.is_err() {
            // The first error is the reason.
            let _ = metadata.remove();
            return written;
        }
        self.memory = None;
        written
    }

    fn write_metadata(&mut self, metadata: &mut Fragment, interrupt: &mut Interrupt<'_>) -> Result<MemoryReport> {
        let memory = self.memory.as_mut().ok_or_else(ended)?;
        let regions = self.regions.iter().zip(&mut self.ranges).map(|(region, ranges)| RegionMetadata {
            guest_base: region.guest_base,
            size: region.range.end - region.range.start,
            data_ranges: std::mem::take(ranges),
        });
        let document = Metadata { regions: regions.collect(), compressed: false, lz4: None };
        metadata.append(&self.writer.encode(METADATA, &document)?, interrupt)?;
        // The short fragment is finished first, so that a failure of the long one is reported as its own.
        metadata.finish_interruptible(&mut || interrupt.check())?;
        memory.finish_interruptible(&mut || interrupt.check())?;
        let stored_bytes = memory.stored_size()? + metadata.stored_size()?;
        Ok(MemoryReport { stored_bytes, duration: self.began.elapsed(), ..document.report() })
    }
}

impl Drop for Straight {
    fn drop(&mut self) {
        if let Some(memory) = self.memory.take() {
            // The first error is the reason.
            let _ = memory.discard();
        }
    }
}

fn ended() -> Error {
    Error::new(Kind::State, "the guest memory cannot be written, because writing it has ended")
}

#[cfg(test)]
mod tests;
