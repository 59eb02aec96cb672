//! [`ProcessRange`]: a range of addresses of a live process as guest memory.

use std::io;
use std::ops::Range;
use std::sync::Arc;

use super::file::FileMemory;
use super::process::{Process, unreadable};
use super::source::{GuestMemorySource, is_of_page};
use crate::error::{Error, Result};

/// A range of addresses of a process as guest memory, made by [`ProcessMemory::range`](crate::ProcessMemory::range).
#[derive(Debug)]
pub struct ProcessRange {
    pub(super) process: Arc<Process>,
    pub(super) addresses: Range<u64>,
    /// Covers all addresses, in ascending order.
    pub(super) ranges: Vec<HeldRange>,
}

#[derive(Debug)]
pub(super) struct HeldRange {
    pub(super) addresses: Range<u64>,
    pub(super) holder: PageHolder,
}

/// The owner of the pages in a range, which decides how they are found and read.
#[derive(Debug)]
pub(super) enum PageHolder {
    /// The process alone: missing pages are zero.
    Anonymous,
    /// A file, which other processes may map too.
    Shared(FileMemory),
    /// The process for the pages that it has written, and a file for the others.
    Private(FileMemory),
    /// Unknown: only a read shows the contents.
    Opaque,
    /// The process, which is stopped and would have to bring missing pages itself: they cannot be read.
    Awaited,
    Nowhere,
}

fn awaited() -> io::Error {
    let text = "the page is missing, and the process that must bring it (as handler of its userfaultfd, or as FUSE \
                server) is stopped: let it run during the dump (--no-stop)";
    io::Error::new(io::ErrorKind::WouldBlock, text)
}

impl ProcessRange {
    /// Returns the ranges that intersect a range of offsets, with the intersections as addresses.
    fn held(&self, offsets: Range<u64>) -> impl Iterator<Item = (&HeldRange, Range<u64>)> {
        let (start, end) = (self.addresses.start + offsets.start, self.addresses.start + offsets.end);
        let first = self.ranges.partition_point(|range| range.addresses.end <= start);
        let ranges = self.ranges[first..].iter().take_while(move |range| range.addresses.start < end);
        ranges.map(move |range| (range, range.addresses.start.max(start)..range.addresses.end.min(end)))
    }
}

impl GuestMemorySource for ProcessRange {
    fn size(&self) -> u64 {
        self.addresses.end - self.addresses.start
    }

    fn data_ranges(&self, within: Range<u64>, found: &mut Vec<Range<u64>>) -> io::Result<()> {
        let base = self.addresses.start;
        for (range, addresses) in self.held(within) {
            // Offset of this range in the region, which is added to the offsets that the file reports.
            let first = range.addresses.start - base;
            let of_file = |file: &FileMemory, part: Range<u64>, found: &mut Vec<Range<u64>>| {
                let before = found.len();
                let start = range.addresses.start;
                file.data_ranges(part.start - start..part.end - start, found)?;
                found[before..].iter_mut().for_each(|range| *range = first + range.start..first + range.end);
                io::Result::Ok(())
            };
            match &range.holder {
                PageHolder::Shared(file) => of_file(file, addresses, found)?,
                PageHolder::Anonymous => self.process.runs(addresses, |held, run| {
                    if held {
                        found.push(run.start - base..run.end - base);
                    }
                    Ok(())
                })?,
                PageHolder::Private(file) => self.process.runs(addresses, |held, run| {
                    if held {
                        found.push(run.start - base..run.end - base);
                        return Ok(());
                    }
                    of_file(file, run, found)
                })?,
                PageHolder::Opaque | PageHolder::Awaited | PageHolder::Nowhere => {
                    found.push(addresses.start - base..addresses.end - base);
                }
            }
        }
        Ok(())
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        let base = self.addresses.start;
        for (range, addresses) in self.held(offset.min(self.size())..self.size()) {
            let start = range.addresses.start;
            let of_file = |file: &FileMemory| {
                let next = file.next_data(addresses.start - start)?;
                io::Result::Ok(next.map(|next| start + next))
            };
            let next = match &range.holder {
                PageHolder::Shared(file) => of_file(file)?,
                PageHolder::Anonymous => self.process.next(addresses)?,
                PageHolder::Private(file) => {
                    let of_file = of_file(file)?;
                    // The search ends where the file has data.
                    let own = self.process.next(addresses.start..of_file.unwrap_or(addresses.end))?;
                    own.or(of_file)
                }
                PageHolder::Opaque | PageHolder::Awaited | PageHolder::Nowhere => Some(addresses.start),
            };
            if let Some(next) = next {
                return Ok(Some(next - base));
            }
        }
        Ok(None)
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        let end = self.size().min(offset.saturating_add(buf.len() as u64));
        let Some((range, addresses)) = self.held(offset..end).next() else {
            return Err(io::ErrorKind::UnexpectedEof.into());
        };
        let in_buf = |range: &Range<u64>| usize::try_from(range.end - range.start).unwrap_or(buf.len());
        let start = range.addresses.start;
        // Returns the first run of pages that the process has, or has not.
        let first_run = |addresses: Range<u64>| {
            let mut first = None;
            self.process.runs(addresses, |held, run| {
                first.get_or_insert((held, run));
                Ok(())
            })?;
            first.ok_or_else(|| io::Error::from(io::ErrorKind::UnexpectedEof))
        };
        match &range.holder {
            PageHolder::Anonymous | PageHolder::Opaque => {
                let length = in_buf(&addresses);
                self.process.read(addresses.start, &mut buf[..length])
            }
            PageHolder::Shared(file) => {
                let length = in_buf(&addresses);
                file.read_at(addresses.start - start, &mut buf[..length])
            }
            PageHolder::Nowhere => Err(unreadable()),
            PageHolder::Private(file) => {
                let (held, run) = first_run(addresses)?;
                let length = in_buf(&run);
                if held {
                    self.process.read(run.start, &mut buf[..length])
                } else {
                    file.read_at(run.start - start, &mut buf[..length])
                }
            }
            // Without a page map, it is unknown which pages exist.
            PageHolder::Awaited if !self.process.pages.tells() => Err(awaited()),
            PageHolder::Awaited => {
                let (held, run) = first_run(addresses)?;
                let length = in_buf(&run);
                if held { self.process.read(run.start, &mut buf[..length]) } else { Err(awaited()) }
            }
        }
    }
}

impl ProcessRange {
    /// Fills the beginning of `buf` with the memory at `offset`, up to the first page that cannot be read, and returns
    /// the length. Pages that the process never touched are zeros, and remain untouched.
    ///
    /// # Errors
    ///
    /// [`Error::is_io`] if the process has ended, or the system refuses the read.
    pub fn fill(&self, offset: u64, buf: &mut [u8]) -> Result<usize> {
        let end = self.size().min(offset.saturating_add(buf.len() as u64));
        let most = buf.len();
        let in_buf = |at: u64| usize::try_from(at.saturating_sub(offset)).map_or(most, |at| at.min(most));
        let (mut found, mut done, length) = (Vec::new(), 0, in_buf(end));
        self.data_ranges(offset..end, &mut found).map_err(|error| self.failed(error))?;
        for (start, end) in found.iter().map(|data| (in_buf(data.start), in_buf(data.end))) {
            buf[done..start].fill(0);
            done = start;
            while done < end {
                match self.read_at(offset + done as u64, &mut buf[done..end]) {
                    Ok(count) => done += count,
                    Err(error) if is_of_page(&error) => return Ok(done),
                    Err(error) => return Err(self.failed(error)),
                }
            }
        }
        buf[done..length].fill(0);
        Ok(length)
    }

    /// Returns the first of the offsets at which a page can be read, or the end of `offsets`. Pages that the process
    /// never touched remain untouched.
    ///
    /// # Errors
    ///
    /// The errors of [`ProcessRange::fill`].
    pub fn next_readable(&self, offsets: Range<u64>) -> Result<u64> {
        let base = self.addresses.start;
        for (range, addresses) in self.held(offsets.clone()) {
            match &range.holder {
                PageHolder::Awaited if self.process.pages.tells() => {
                    if let Some(next) = self.process.next(addresses).map_err(|error| self.failed(error))? {
                        return Ok(next - base);
                    }
                }
                PageHolder::Awaited | PageHolder::Nowhere => {}
                _ => {
                    for page in addresses.step_by(rustix::param::page_size()) {
                        if self.fill(page - base, &mut [0])? > 0 {
                            return Ok(page - base);
                        }
                    }
                }
            }
        }
        Ok(offsets.end)
    }

    fn failed(&self, error: io::Error) -> Error {
        match error.downcast() {
            Ok(own) => own,
            Err(error) => Error::io(format!("process {}: its memory cannot be read", self.process.pid), error),
        }
    }
}
