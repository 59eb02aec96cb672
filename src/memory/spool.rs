//! [`Spool`]: pages of guest memory that arrive in any order, and several times, kept until they are dumped.
//!
//! A page is appended to a scratch file on the file system of the snapshot, and the index remembers where its last copy
//! is. A page of zeros is not stored. The file is encrypted if the snapshot is, and has no name, so it is gone when the
//! spool is dropped or the process ends.
//!
//! A guest that stands still is sent in the order in which `mem` stores it. So the file may be the fragment `mem` itself,
//! as long as the pages come in order. When one does not, the fragment loses its name and is a scratch file from then on.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use rustix::io::Errno;

use super::options::MemoryReport;
use super::page_index::{PageIndex, check_slot};
use super::source::GuestMemorySource;
use super::straight::Straight;
use crate::error::{Error, Kind, Result};
use crate::fragment::scratch::{ScratchReader, ScratchWriter};
use crate::snapshot::SnapshotWriter;
use crate::threads::Interrupt;
use crate::zeros::{PAGE_BYTES, is_zero};

/// Distinguishes the message from every fragment.
const AAD: &[u8] = b"vmsnap/1/spool";

const PAGE: u64 = PAGE_BYTES as u64;

/// Pages between two checks for an interruption.
const PAGES_PER_CHECK: u64 = 256;

/// A spool that one thread fills. After an error it accepts nothing more.
pub(crate) struct Spool {
    /// `None` after an error, so that the space on the disk is free at once.
    file: Option<SpoolFile>,
    areas: Vec<Area>,
    /// The name of the scratch file in errors.
    place: String,
}

/// The file that pages are appended to.
enum SpoolFile {
    Scratch(ScratchWriter),
    /// The fragment `mem`, and whether all pages have come in order.
    Straight(Box<Straight>, bool),
}

/// A complete spool.
pub(crate) enum Spooled {
    /// The pages, which must be dumped.
    Pages(SpooledPages),
    /// The pages came in the order of `mem`, which is written.
    Written(MemoryReport),
}

/// A block of guest memory.
struct Area {
    size: u64,
    index: PageIndex,
}

impl Spool {
    /// Makes an empty spool on the file system of a snapshot that is being written.
    ///
    /// # Errors
    ///
    /// `Io` if the scratch file cannot be created.
    pub(crate) fn new(writer: &SnapshotWriter) -> Result<Self> {
        let place = place_in(writer);
        let scratch = writer.scratch(AAD).map_err(|error| error.context(&place))?;
        Ok(Self::over(SpoolFile::Scratch(scratch), place))
    }

    /// Makes an empty spool that writes `mem`, as long as the pages come in the order of its regions.
    pub(crate) fn straight(straight: Straight) -> Self {
        let place = place_in(straight.writer());
        Self::over(SpoolFile::Straight(Box::new(straight), true), place)
    }

    fn over(file: SpoolFile, place: String) -> Self {
        Self { file: Some(file), areas: Vec::new(), place }
    }

    /// Adds a block of guest memory, all of it zero; its size is a multiple of 4096. Returns its number. It takes no
    /// memory for pages that are not received.
    pub(crate) fn add_area(&mut self, size_bytes: u64) -> usize {
        self.areas.push(Area { size: size_bytes, index: PageIndex::default() });
        self.areas.len() - 1
    }

    /// Replaces a page of an area. Returns whether the page was received before.
    ///
    /// # Errors
    ///
    /// `Io` if the disk is full, `InvalidArgument` if the area does not have the page, and the error of `interrupt`.
    pub(crate) fn put(
        &mut self,
        area: usize,
        page: u64,
        bytes: &[u8; PAGE_BYTES],
        interrupt: &mut Interrupt<'_>,
    ) -> Result<bool> {
        if !self.has(area, page) {
            return Err(Error::invalid_argument(format!("the area {area} of the spool does not have a page {page}")));
        }
        if is_zero(bytes) {
            return Ok(self.put_zero(area, page));
        }
        // It does not come back if this fails.
        let mut file = self.file.take().ok_or_else(failed_before).map_err(|error| self.in_spool(error))?;
        let slot = file.put(area, page, bytes, interrupt);
        let slot = slot.map_err(|error| if file.is_scratch() { self.in_spool(error) } else { error })?;
        self.file = Some(file);
        Ok(self.areas[area].index.set_slot(page, slot))
    }

    /// Replaces a page of an area by zeros. Returns whether the page was received before; false if the area does not
    /// have the page.
    pub(crate) fn put_zero(&mut self, area: usize, page: u64) -> bool {
        let is_repeated = self.has(area, page) && self.areas[area].index.set_zero(page);
        if is_repeated {
            self.keep();
        }
        is_repeated
    }

    /// Keeps the pages until they are dumped, in any order.
    pub(crate) fn keep(&mut self) {
        if let Some(SpoolFile::Straight(_, in_order)) = &mut self.file {
            *in_order = false;
        }
    }

    /// Completes the spool.
    ///
    /// # Errors
    ///
    /// `Io` if the disk is full, and the error of `interrupt`.
    pub(crate) fn finish(mut self, interrupt: &mut Interrupt<'_>) -> Result<Spooled> {
        let file = self.file.take().ok_or_else(failed_before);
        let scratch = match file.map_err(|error| self.in_spool(error))? {
            SpoolFile::Straight(straight, true) => return straight.finish(interrupt).map(Spooled::Written),
            SpoolFile::Straight(mut straight, false) => straight.continue_as_scratch(interrupt)?,
            SpoolFile::Scratch(scratch) => scratch,
        };
        let scratch = scratch.finish(interrupt).map_err(|error| self.in_spool(error))?;
        self.areas.iter_mut().for_each(|area| area.index.settle());
        Ok(Spooled::Pages(SpooledPages { scratch, areas: self.areas, place: self.place }))
    }

    fn has(&self, area: usize, page: u64) -> bool {
        self.areas.get(area).is_some_and(|area| page < area.size / PAGE)
    }

    /// The error with its place, and if there is no space, with how much is needed.
    fn in_spool(&self, error: Error) -> Error {
        let Some(errno @ (libc::ENOSPC | libc::EDQUOT | libc::EFBIG)) = error.raw_os_error() else {
            return error.context(&self.place);
        };
        let bytes = self.areas.iter().fold(0_u64, |sum, area| sum.saturating_add(area.size));
        let text = format!(
            "{} cannot be written: it needs up to {bytes} bytes beside those of the snapshot, and more if pages change \
             meanwhile; free space, or write the snapshot to another file system",
            self.place
        );
        Error::io(text, Errno::from_raw_os_error(errno))
    }
}

impl SpoolFile {
    /// Whether errors do not name the file yet.
    fn is_scratch(&self) -> bool {
        matches!(self, Self::Scratch(_))
    }

    /// Appends a page; returns its slot. A slot is written once.
    fn put(&mut self, area: usize, page: u64, bytes: &[u8; PAGE_BYTES], interrupt: &mut Interrupt<'_>) -> Result<u32> {
        let scratch = match self {
            Self::Scratch(scratch) => scratch,
            Self::Straight(straight, in_order) => {
                if *in_order && let Some(slot) = straight.append(area, page, bytes, interrupt)? {
                    return check_slot(slot);
                }
                let scratch = straight.continue_as_scratch(interrupt)?;
                *self = Self::Scratch(scratch);
                return self.put(area, page, bytes, interrupt);
            }
        };
        let slot = scratch.written() / PAGE;
        if slot.is_multiple_of(PAGES_PER_CHECK) {
            interrupt.check()?;
        }
        let number = check_slot(slot)?;
        scratch.append(bytes, interrupt)?;
        Ok(number)
    }
}

/// The name of the scratch file in errors.
fn place_in(writer: &SnapshotWriter) -> String {
    format!("the temporary copy of guest memory in {}", writer.scratch_directory().display())
}

fn failed_before() -> Error {
    Error::new(Kind::State, "cannot be used, because writing it has failed before")
}

/// The pages of a complete spool, read by any number of threads. The space is free when the last reference is dropped.
pub(crate) struct SpooledPages {
    scratch: ScratchReader,
    areas: Vec<Area>,
    place: String,
}

impl SpooledPages {
    /// Returns a range of bytes of an area as the memory of a guest region. Pages that were not received are zero.
    ///
    /// # Panics
    ///
    /// If there is no such area, or the range is not in it.
    pub(crate) fn source(self: &Arc<Self>, area: usize, range: Range<u64>) -> SpooledMemory {
        assert!(range.start <= range.end && range.end <= self.areas[area].size, "the area does not have the range");
        SpooledMemory { pages: Arc::clone(self), area, range }
    }
}

/// A range of an area of a spool as the source of a dump.
pub(crate) struct SpooledMemory {
    pages: Arc<SpooledPages>,
    area: usize,
    range: Range<u64>,
}

impl SpooledMemory {
    /// Iterates over the data in a range of the region: runs of pages that are stored one after the other. Each has its
    /// range in the region, and its offset in the scratch file.
    fn runs(&self, within: Range<u64>) -> impl Iterator<Item = (Range<u64>, u64)> {
        let start = self.range.start;
        let end = start.saturating_add(within.end).min(self.range.end);
        let within = start.saturating_add(within.start).min(end)..end;
        let mut pages = self.pages.areas[self.area].index.data(within.start / PAGE..end.div_ceil(PAGE)).peekable();
        std::iter::from_fn(move || {
            let (page, slot) = pages.next()?;
            let mut count = 1;
            while pages.next_if_eq(&(page + count, slot + count)).is_some() {
                count += 1;
            }
            let from = (page * PAGE).max(within.start);
            let to = ((page + count) * PAGE).min(within.end);
            Some((from - start..to - start, slot * PAGE + (from - page * PAGE)))
        })
    }
}

impl GuestMemorySource for SpooledMemory {
    fn size(&self) -> u64 {
        self.range.end - self.range.start
    }

    fn data_ranges(&self, within: Range<u64>, found: &mut Vec<Range<u64>>) -> io::Result<()> {
        self.runs(within).for_each(|(run, _)| super::ranges::append(found, run));
        Ok(())
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        // One page and not a run, which may be as long as the region: a dump asks for each of its batches.
        let at = self.range.start.saturating_add(offset);
        let mut pages = self.pages.areas[self.area].index.data(at / PAGE..self.range.end.div_ceil(PAGE));
        let found = pages.next().map(|(page, _)| (page * PAGE).max(at));
        Ok(found.filter(|found| *found < self.range.end).map(|found| found - self.range.start))
    }

    /// Reads each run with one call. Every error is one of vmsnap, so a damaged page never counts as one that cannot be
    /// read.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        let rest = usize::try_from(self.size().saturating_sub(offset)).unwrap_or(usize::MAX);
        let length = rest.min(buf.len());
        let mut done = 0;
        for (run, at) in self.runs(offset..offset.saturating_add(length as u64)) {
            let place = |end: u64| usize::try_from(end - offset).map_or(length, |end| end.min(length));
            let (from, to) = (place(run.start), place(run.end));
            buf[done..from].fill(0);
            if let Err(error) = self.pages.scratch.read_exact_at(&mut buf[from..to], at) {
                buf.fill(0);
                return Err(error.context(&self.pages.place).into());
            }
            done = to;
        }
        buf[done..length].fill(0);
        Ok(length)
    }
}

#[cfg(test)]
mod tests;
