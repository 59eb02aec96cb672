//! A file that is read and written at offsets, through the page cache or around it.
//!
//! Tens of GiB that pass through the page cache displace all other pages. Linux 6.14 has `RWF_DONTCACHE` against that
//! (`preadv2(2)`): pages are written back at once and dropped, and buffers do not need the alignment that `O_DIRECT`
//! requires. If the kernel or the file system does not support it, `sync_file_range(2)` and `posix_fadvise(2)` have the
//! same effect.

#![allow(unsafe_code, reason = "sync_file_range is in no safe crate we have; pread64 and pwrite64 of the C library")]

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, IoSlice, IoSliceMut};
use std::num::NonZeroU64;
use std::ops::{Deref, Range};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU8, Ordering};

use rustix::fs::{Advice, SeekFrom, fadvise, seek};
use rustix::io::{Errno, ReadWriteFlags, preadv2, pwritev, pwritev2};

use crate::reflink;
use crate::threads::lock;

/// `RWF_DONTCACHE` of linux/fs.h, which rustix does not have.
const DONT_CACHE: ReadWriteFlags = ReadWriteFlags::from_bits_retain(0x80);

/// Bytes that may wait for write-back before a writer waits for the oldest of them: a disk writes that much in
/// milliseconds.
const MAX_UNWRITTEN_BYTES: u64 = 32 << 20;

/// The most slices that one call accepts (`IOV_MAX` of linux/uio.h).
const IOV_MAX: usize = 1024;

/// A file, with its use of the page cache.
#[derive(Debug)]
pub(crate) struct StoredFile {
    file: File,
    /// Where the object begins in the file.
    start: u64,
    /// The length when it was opened to be read; 0 for a new file.
    size: u64,
    cache: CacheUse,
}

/// How a file uses the page cache.
#[derive(Debug, Default)]
pub(crate) struct CacheUse {
    state: AtomicU8,
    /// Ranges whose write-back was started, without `RWF_DONTCACHE`.
    unwritten: Mutex<VecDeque<Range<u64>>>,
}

/// Through the page cache.
const CACHED: u8 = 0;
/// Around the page cache, with `RWF_DONTCACHE`.
const UNCACHED: u8 = 1;
/// Around the page cache, with advice, because `RWF_DONTCACHE` was refused.
const ADVISED: u8 = 2;

impl CacheUse {
    /// Sets whether pages are kept out of the page cache from now on.
    pub(crate) fn set_uncached(&self, uncached: bool) {
        self.state.store(if uncached { UNCACHED } else { CACHED }, Ordering::Relaxed);
    }

    /// Writes the beginning of `runs` to `offset`, and returns the number of bytes written.
    fn write(&self, file: impl AsFd, runs: &[IoSlice<'_>], offset: u64) -> Result<usize, Errno> {
        if self.state.load(Ordering::Relaxed) == UNCACHED {
            match pwritev2(&file, runs, offset, DONT_CACHE) {
                Err(errno) if is_refusal(errno) => self.state.store(ADVISED, Ordering::Relaxed),
                written => return written,
            }
        }
        let written = match runs {
            [run] => write_run(&file, run, offset)?,
            _ => pwritev(&file, runs, offset)?,
        };
        if self.state.load(Ordering::Relaxed) == ADVISED {
            self.write_back(file, offset..offset + written as u64);
        }
        Ok(written)
    }

    /// Starts the write-back of a range, waits for the oldest ranges, and drops their pages. Errors are ignored,
    /// because all of it is advice.
    fn write_back(&self, file: impl AsFd, range: Range<u64>) {
        start_writing(&file, &range);
        let mut unwritten = lock(&self.unwritten);
        unwritten.push_back(range);
        let mut oldest = Vec::new();
        let mut bytes: u64 = unwritten.iter().map(|range| range.end - range.start).sum();
        while bytes > MAX_UNWRITTEN_BYTES
            && let Some(range) = unwritten.pop_front()
        {
            bytes -= range.end - range.start;
            oldest.push(range);
        }
        drop(unwritten);
        for range in oldest {
            finish_writing(&file, &range);
        }
    }

    /// Drops the pages of a range that are still in the cache, once they are written. Without a size, the range ends
    /// with the file.
    pub(crate) fn drop_rest(&self, file: impl AsFd, start: u64, size: Option<NonZeroU64>) {
        for range in lock(&self.unwritten).drain(..) {
            finish_writing(&file, &range);
        }
        // `RWF_DONTCACHE` leaves a page that another thread uses at that moment.
        if self.state.load(Ordering::Relaxed) != CACHED {
            let _ = fadvise(file, start, size, Advice::DontNeed);
        }
    }

    /// Fills the beginning of `buf` from `offset`, and returns the number of bytes read.
    pub(crate) fn read(&self, file: impl AsFd, buf: &mut [u8], offset: u64) -> Result<usize, Errno> {
        if self.state.load(Ordering::Relaxed) == UNCACHED {
            match preadv2(&file, &mut [IoSliceMut::new(buf)], offset, DONT_CACHE) {
                Err(errno) if is_refusal(errno) => self.state.store(ADVISED, Ordering::Relaxed),
                read => return read,
            }
        }
        let read = read_run(&file, buf, offset)?;
        if self.state.load(Ordering::Relaxed) == ADVISED {
            let _ = fadvise(file, offset, NonZeroU64::new(read as u64), Advice::DontNeed);
        }
        Ok(read)
    }

    /// Writes all of `runs`, one after the other, from `offset` on.
    pub(crate) fn write_runs(&self, file: impl AsFd, runs: &[&[u8]], mut offset: u64) -> io::Result<()> {
        for runs in runs.chunks(IOV_MAX) {
            let mut slices: Vec<_> = runs.iter().map(|run| IoSlice::new(run)).collect();
            let mut left = &mut slices[..];
            while !left.is_empty() {
                match self.write(&file, left, offset) {
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
}

/// Whether an error means that the kernel, the file system or a filter of system calls refused the flag, not the
/// transfer.
fn is_refusal(errno: Errno) -> bool {
    matches!(errno, Errno::OPNOTSUPP | Errno::NOSYS | Errno::PERM | Errno::INVAL)
}

/// One `pwrite64`. It is called through the C library, as std does, so that a preloaded library sees the call.
fn write_run(file: impl AsFd, run: &[u8], offset: u64) -> Result<usize, Errno> {
    let offset = libc::off64_t::try_from(offset).map_err(|_| Errno::INVAL)?;
    // SAFETY: an open file, and so many bytes, which are only read.
    let count = unsafe { libc::pwrite64(file.as_fd().as_raw_fd(), run.as_ptr().cast(), run.len(), offset) };
    usize::try_from(count).map_err(|_| last_errno())
}

/// One `pread64`, called like [`write_run`].
fn read_run(file: impl AsFd, buf: &mut [u8], offset: u64) -> Result<usize, Errno> {
    let offset = libc::off64_t::try_from(offset).map_err(|_| Errno::INVAL)?;
    // SAFETY: an open file, and so many bytes, which the caller lends alone.
    let count = unsafe { libc::pread64(file.as_fd().as_raw_fd(), buf.as_mut_ptr().cast(), buf.len(), offset) };
    usize::try_from(count).map_err(|_| last_errno())
}

fn last_errno() -> Errno {
    Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::IO)
}

/// Starts the write-back of a range.
fn start_writing(file: impl AsFd, range: &Range<u64>) {
    sync_range(file, range, libc::SYNC_FILE_RANGE_WRITE);
}

/// Waits for the write-back of a range, and drops its pages.
fn finish_writing(file: impl AsFd, range: &Range<u64>) {
    let all = libc::SYNC_FILE_RANGE_WAIT_BEFORE | libc::SYNC_FILE_RANGE_WRITE | libc::SYNC_FILE_RANGE_WAIT_AFTER;
    sync_range(&file, range, all);
    let _ = fadvise(file, range.start, NonZeroU64::new(range.end - range.start), Advice::DontNeed);
}

fn sync_range(file: impl AsFd, range: &Range<u64>, flags: libc::c_uint) {
    let bytes = |number: u64| libc::off64_t::try_from(number).unwrap_or(libc::off64_t::MAX);
    let descriptor = file.as_fd().as_raw_fd();
    // SAFETY: the call has an open file and no memory. Its result is ignored, because `fsync` reports a failed write.
    let _ = unsafe { libc::sync_file_range(descriptor, bytes(range.start), bytes(range.end - range.start), flags) };
}

impl StoredFile {
    /// A new, empty file.
    pub(crate) fn new(file: File) -> Self {
        Self::of_size(file, 0)
    }

    /// A file of `size` bytes, to be read.
    pub(crate) fn of_size(file: File, size: u64) -> Self {
        Self::of_range(file, 0, size)
    }

    /// The `size` bytes of a file from `start` on, to be read: they are at the offsets from 0 on.
    pub(crate) fn of_range(file: File, start: u64, size: u64) -> Self {
        Self { file, start, size, cache: CacheUse::default() }
    }

    pub(crate) fn size(&self) -> u64 {
        self.size
    }

    pub(crate) fn set_uncached(&self, uncached: bool) {
        self.cache.set_uncached(uncached);
    }

    /// Writes all of `runs`, one after the other, from `offset` on.
    pub(crate) fn write_runs(&self, runs: &[&[u8]], offset: u64) -> io::Result<()> {
        self.cache.write_runs(&self.file, runs, self.start + offset)
    }

    /// Fills `buf` from `offset`.
    pub(crate) fn read_exact_at(&self, mut buf: &mut [u8], offset: u64) -> io::Result<()> {
        let mut offset = self.start + offset;
        while !buf.is_empty() {
            match self.cache.read(&self.file, buf, offset) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(count) => {
                    buf = &mut buf[count..];
                    offset += count as u64;
                }
                Err(Errno::INTR) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }

    /// Where the next data begins, from `from` on: before that is a hole. A file system that does not know its holes
    /// has data everywhere.
    pub(crate) fn next_data(&self, from: u64) -> u64 {
        match seek(&self.file, SeekFrom::Data(self.start + from)) {
            Ok(found) => (found - self.start).max(from),
            // There is no data up to the end.
            Err(Errno::NXIO) => u64::MAX,
            Err(_) => from,
        }
    }

    /// Makes `target` share the blocks of a range, from `offset` on; returns whether the file system did.
    pub(crate) fn clone_range(&self, range: Range<u64>, target: &File, offset: u64) -> bool {
        reflink::clone_range(&self.file, self.start + range.start..self.start + range.end, target, offset)
    }

    /// Drops the pages that are still in the cache, if the file bypasses it.
    pub(crate) fn drop_rest(&self) {
        self.cache.drop_rest(&self.file, self.start, NonZeroU64::new(self.size));
    }
}

impl Deref for StoredFile {
    type Target = File;

    fn deref(&self) -> &File {
        &self.file
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::{MemfdFlags, memfd_create};

    fn write_and_read(file: &StoredFile) {
        let bytes: Vec<u8> = (0..200_000_u32).map(|n| n.to_le_bytes()[0]).collect();
        file.write_runs(&[&bytes[..3], &bytes[3..70_000]], 5).unwrap();
        file.write_runs(&[&bytes[70_000..]], 70_005).unwrap();
        file.drop_rest();
        assert_eq!(file.metadata().unwrap().len(), 200_005);
        let mut back = vec![0; 200_000];
        file.read_exact_at(&mut back, 5).unwrap();
        assert_eq!(back, bytes);
        assert_eq!(file.read_exact_at(&mut back, 6).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn past_the_cache_the_bytes_are_the_same() {
        for state in [CACHED, UNCACHED, ADVISED] {
            let file = StoredFile::new(tempfile::tempfile().unwrap());
            file.cache.state.store(state, Ordering::Relaxed);
            write_and_read(&file);
        }
    }

    #[test]
    fn data_is_found_after_a_hole() {
        let file = StoredFile::new(memfd_create("stored", MemfdFlags::CLOEXEC).unwrap().into());
        file.write_runs(&[&[7; 10]], 1 << 20).unwrap();
        file.set_len(4 << 20).unwrap();
        assert_eq!(file.next_data(0), 1 << 20);
        assert_eq!(file.next_data((1 << 20) + 3), (1 << 20) + 3);
        assert_eq!(file.next_data(2 << 20), u64::MAX);
        // A pipe does not have holes.
        let (reader, _writer) = io::pipe().unwrap();
        assert_eq!(StoredFile::new(std::os::fd::OwnedFd::from(reader).into()).next_data(5), 5);
    }

    #[test]
    fn a_file_system_that_refuses_the_flag_is_given_advice() {
        // The page cache is the only storage of tmpfs.
        let file = StoredFile::new(memfd_create("stored", MemfdFlags::CLOEXEC).unwrap().into());
        file.set_uncached(true);
        write_and_read(&file);
        assert_eq!(file.cache.state.load(Ordering::Relaxed), ADVISED);
    }

    #[test]
    fn no_more_waits_to_be_written_than_is_allowed() {
        let file = StoredFile::new(tempfile::tempfile().unwrap());
        file.cache.state.store(ADVISED, Ordering::Relaxed);
        let mib = vec![7; 1 << 20];
        for number in 0..40 {
            file.write_runs(&[&mib], number << 20).unwrap();
        }
        let waiting: u64 = lock(&file.cache.unwritten).iter().map(|range| range.end - range.start).sum();
        assert_eq!(waiting, MAX_UNWRITTEN_BYTES);
        file.drop_rest();
        assert!(lock(&file.cache.unwritten).is_empty());
    }
}
