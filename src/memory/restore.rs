//! `GuestMemory::restore`: restores whole guest regions to buffers and files.

use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use super::data::ReadBuffers;
use super::destination::{GuestDestination, OpenFile, Prepared, prepare};
use super::guest_memory::{GuestMemory, ranges_in};
use super::metadata::Region;
use super::options::MemoryProgress;
use super::own_mappings::{Backing, is_on_full_file_system};
use super::pages::{first_missing, make_zero, populate};
use crate::error::{Error, Result};
use crate::stored_file::CacheUse;
use crate::threads::{Interrupt, for_each};

/// The range that one thread restores at a time. Blocks at its borders are decrypted and decompressed twice, which
/// is little of so much data.
const RESTORE_BATCH_BYTES: usize = 4 << 20;

/// In a batch with more holes than this, all pages are released at once.
const MAX_HOLES_PER_BATCH: usize = 32;

impl GuestMemory {
    /// Restores all regions, each to its destination, with all threads.
    ///
    /// # Errors
    ///
    /// [`Error::is_invalid_argument`] if the destinations do not match the regions; nothing was written then. After any
    /// other error ([`Error::is_authentication`], [`Error::is_corrupt`], [`Error::is_io`]) the contents of the
    /// destinations are undefined.
    pub fn restore(&self, destinations: &mut [GuestDestination<'_>]) -> Result<()> {
        self.restore_interruptible(destinations, &mut |_| Ok(()))
    }

    /// Restores all regions as [`GuestMemory::restore`] does, and calls `progress` at most every 50 ms and once at the
    /// end. An error of `progress` ends the restore.
    ///
    /// # Errors
    ///
    /// The errors of [`GuestMemory::restore`], and the error that `progress` returns.
    pub fn restore_interruptible(
        &self,
        destinations: &mut [GuestDestination<'_>],
        progress: &mut dyn FnMut(MemoryProgress) -> Result<()>,
    ) -> Result<()> {
        let chosen =
            self.layout.regions.iter().zip(&*destinations).filter(|(_, destination)| !destination.is_nowhere());
        let total_bytes = chosen.map(|(region, _)| region.size).sum();
        self.data.set_uncached(destinations.iter().any(GuestDestination::is_uncached));
        let mut prepared = prepare(&self.layout.regions, destinations)?;
        let mut batches = Vec::new();
        for (region, destination) in self.layout.regions.iter().zip(&mut prepared) {
            match destination {
                Prepared::Nowhere => {}
                Prepared::Buffer(buffer, backing) => push_batches(&mut batches, region, buffer, *backing),
                Prepared::Mapped(mapping, backing) => {
                    push_batches(&mut batches, region, mapping.as_mut_slice(), *backing);
                }
                Prepared::File(file, offset, cache) => {
                    let to = |start| (region, start, Target::File(file, *offset, cache));
                    batches.extend(batches_with_data(region).map(to));
                }
            }
        }
        let done = AtomicU64::new(0);
        let mut interrupt =
            || progress(MemoryProgress { done_bytes: done.load(Ordering::Relaxed).min(total_bytes), total_bytes });
        let mut workers: Vec<_> = (0..self.threads.min(batches.len())).map(|_| ReadBuffers::default()).collect();
        for_each(
            &mut workers,
            batches.into_iter(),
            &mut Interrupt::new(&mut interrupt),
            |buffers, (region, start, target), interrupt| {
                self.restore_batch(buffers, region, start, target, interrupt)
                    .map_err(|error| error.context(&self.place))?;
                done.fetch_add(RESTORE_BATCH_BYTES as u64, Ordering::Relaxed);
                Ok(())
            },
        )?;
        self.data.drop_rest();
        for each in &prepared {
            if let Prepared::File(file, _, cache) = each {
                cache.drop_rest(file, 0, None);
            }
        }
        progress(MemoryProgress { done_bytes: total_bytes, total_bytes })
    }

    /// Fills `buf` from an offset in a region, with all threads.
    pub(super) fn read_by_all(
        &self,
        region: &Region,
        offset: u64,
        buf: &mut [u8],
        interrupt: &mut dyn FnMut() -> Result<()>,
    ) -> Result<()> {
        let count = buf.len().div_ceil(RESTORE_BATCH_BYTES);
        let starts = (0..count as u64).map(|number| offset + number * RESTORE_BATCH_BYTES as u64);
        let batches: Vec<_> = buf.chunks_mut(RESTORE_BATCH_BYTES).zip(starts).collect();
        let mut workers: Vec<_> = (0..self.threads.min(count)).map(|_| ReadBuffers::default()).collect();
        for_each(
            &mut workers,
            batches.into_iter(),
            &mut Interrupt::new(interrupt),
            |buffers, (buffer, start), interrupt| {
                self.restore_batch(buffers, region, start, Target::Buffer(buffer, Backing::Other), interrupt)
            },
        )
    }

    /// Restores a region from `start` on, up to the end of the target or of the batch.
    fn restore_batch(
        &self,
        buffers: &mut ReadBuffers,
        region: &Region,
        start: u64,
        target: Target<'_>,
        interrupt: &mut Interrupt<'_>,
    ) -> Result<()> {
        let end = match &target {
            Target::Buffer(buffer, _) => start + buffer.len() as u64,
            Target::File(..) => region.size.min(start + RESTORE_BATCH_BYTES as u64),
        };
        let ranges = ranges_in(region, start, end);
        let within = ranges.iter().map(|range| range.start.max(start)..range.end.min(end));
        // The data of a batch is contiguous in the stream.
        let from = ranges.first().map_or(0, |first| first.data + (first.start.max(start) - first.start));
        if !ranges.is_empty() {
            self.data.prefetch(from);
        }
        match target {
            Target::Buffer(buffer, backing) => {
                let failed = |at: u64, place: &[u8], error| not_written(region, at, place, error);
                let base = buffer.as_ptr().addr();
                let mut places = cut(buffer, start, within, ranges.len() > MAX_HOLES_PER_BATCH, |at, hole| {
                    make_zero(hole, backing).map_err(|error| failed(at, hole, error))
                })?;
                self.data.scatter(buffers, from, &mut places, interrupt, |place| {
                    populate(place).map_err(|error| failed(start + (place.as_ptr().addr() - base) as u64, place, error))
                })
            }
            Target::File(file, offset, cache) => {
                let Some(last) = ranges.last() else { return Ok(()) };
                let to = last.data + (last.end.min(end) - last.start);
                let mut within = within;
                let mut current = start..start;
                self.data.read(buffers, from, to, interrupt, |mut data| {
                    while !data.is_empty() {
                        if current.is_empty() {
                            current = within.next().unwrap_or_default();
                        }
                        let left = usize::try_from(current.end - current.start).unwrap_or(usize::MAX);
                        let (now, later) = data.split_at(left.min(data.len()));
                        file.write_all_at(cache, now, offset + current.start)?;
                        current.start += now.len() as u64;
                        data = later;
                    }
                    Ok(())
                })
            }
        }
    }
}

/// Cuts a buffer, which begins at `start` of its region, into the slices of its data ranges. Calls `zero` for each
/// slice between them, or once for the whole buffer if `all` is set.
fn cut(
    buffer: &mut [u8],
    start: u64,
    ranges: impl ExactSizeIterator<Item = Range<u64>>,
    all: bool,
    mut zero: impl FnMut(u64, &mut [u8]) -> Result<()>,
) -> Result<Vec<&mut [u8]>> {
    if all {
        zero(start, buffer)?;
    }
    let mut places = Vec::with_capacity(ranges.len());
    let (mut rest, mut at) = (buffer, start);
    for range in ranges {
        let length = |from: u64, to: u64| usize::try_from(to - from).unwrap_or(usize::MAX);
        let (hole, more) = rest.split_at_mut(length(at, range.start));
        let (place, more) = more.split_at_mut(length(range.start, range.end));
        if !all && !hole.is_empty() {
            zero(at, hole)?;
        }
        places.push(place);
        (rest, at) = (more, range.end);
    }
    if !all && !rest.is_empty() {
        zero(at, rest)?;
    }
    Ok(places)
}

/// The destination of one batch of a region.
enum Target<'a> {
    Buffer(&'a mut [u8], Backing),
    /// The file, which is already zero except for written data, and the offset of the region in it.
    File(&'a OpenFile<'a>, u64, &'a CacheUse),
}

/// Makes the error for memory at an offset of a region that cannot be written. `place` is its destination.
fn not_written(region: &Region, offset: u64, place: &[u8], error: io::Error) -> Error {
    let (text, error) = match error.raw_os_error() {
        // The kernel reports all of these cases as EFAULT.
        Some(libc::EFAULT) if is_on_full_file_system(place) => ("", io::Error::from_raw_os_error(libc::ENOSPC)),
        Some(libc::EFAULT) => (" (the page is write-protected, or cannot be allocated)", error),
        _ => ("", error),
    };
    let address = region.guest_base + offset + first_missing(place) as u64;
    Error::io(format!("guest-physical address {address:#x} cannot be written{text}"), error)
}

fn push_batches<'a>(
    batches: &mut Vec<(&'a Region, u64, Target<'a>)>,
    region: &'a Region,
    buffer: &'a mut [u8],
    backing: Backing,
) {
    let buffers = buffer.chunks_mut(RESTORE_BATCH_BYTES).enumerate();
    batches.extend(
        buffers
            .map(|(number, buffer)| (region, (number * RESTORE_BATCH_BYTES) as u64, Target::Buffer(buffer, backing))),
    );
}

/// Iterates over the offsets in a region at which batches with data begin.
fn batches_with_data(region: &Region) -> impl Iterator<Item = u64> + '_ {
    let mut next = 0;
    region.ranges.iter().flat_map(move |range| {
        let first = (range.start / RESTORE_BATCH_BYTES as u64 * RESTORE_BATCH_BYTES as u64).max(next);
        next = range.end.next_multiple_of(RESTORE_BATCH_BYTES as u64).max(next);
        (first..next).step_by(RESTORE_BATCH_BYTES)
    })
}
