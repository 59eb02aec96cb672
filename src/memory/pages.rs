//! Pages of this process: populated before they are used, and released.
//!
//! The buffer of a caller may be a mapping: of a file that was truncated, of a file on a full file system, of huge
//! pages that have run out, or with guard pages in it. The use of such a page ends the process with SIGBUS or SIGSEGV.
//! `MADV_POPULATE_READ` and `MADV_POPULATE_WRITE` (Linux 5.14, madvise(2)) return an error instead, and take the page
//! faults of many pages at the cost of a few.

#![allow(unsafe_code, reason = "madvise")]

use std::io;
use std::ops::Range;
use std::sync::OnceLock;

use rustix::io::Errno;
use rustix::mm::{Advice, madvise};

use super::own_mappings::{Backing, is_permitted};
use crate::zeros::{PAGE_BYTES, is_zero};

/// Zeroes a range of a buffer, and releases its pages if possible.
pub(super) fn make_zero(bytes: &mut [u8], backing: Backing) -> io::Result<()> {
    let advice = match backing {
        Backing::Zeros => return Ok(()),
        Backing::Anonymous => Advice::LinuxDontNeed,
        Backing::Shared => Advice::LinuxRemove,
        Backing::Other => return fill_with_zeros(bytes),
    };
    let (head, pages, tail) = whole_pages(bytes);
    for edge in [head, tail] {
        fill_with_zeros(edge)?;
    }
    if pages.is_empty() {
        return Ok(());
    }
    // SAFETY: whole pages of a slice that is borrowed mutably, so that no other code sees them change. In memory with
    // this backing, both kinds of advice leave zeros.
    match unsafe { madvise(pages.as_mut_ptr().cast(), pages.len(), advice) } {
        Ok(()) => Ok(()),
        // The pages are locked, or the file system does not support holes.
        Err(_) => fill_with_zeros(pages),
    }
}

/// The size of a transparent huge page on `x86_64`, and on aarch64 with pages of 4 KiB.
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// Asks for huge pages where a range of a buffer fills them.
pub(super) fn want_huge_pages(buffer: &mut [u8], start: u64, end: u64) {
    let base = buffer.as_ptr().addr();
    let at = |offset: u64| usize::try_from(offset).map_or(usize::MAX, |offset| base.saturating_add(offset));
    let first = at(start).next_multiple_of(HUGE_PAGE_BYTES);
    let end = at(end).min(base + buffer.len()) / HUGE_PAGE_BYTES * HUGE_PAGE_BYTES;
    if first < end {
        let pages = buffer[first - base..end - base].as_mut_ptr();
        // SAFETY: whole pages of a slice that is borrowed mutably. Their size does not change their contents. If the
        // kernel does not support huge pages, they stay as they are.
        let _ = unsafe { madvise(pages.cast(), end - first, Advice::LinuxHugepage) };
    }
}

/// Makes all pages resident that will be written, in half the time of separate page faults.
///
/// # Errors
///
/// If one of the pages cannot be allocated. It must not be used then.
pub(crate) fn populate(bytes: &mut [u8]) -> io::Result<()> {
    advise(bytes.as_ptr_range(), Advice::LinuxPopulateWrite)
}

/// Returns where the first page begins that cannot be allocated, or 0 if all can.
pub(super) fn first_missing(bytes: &[u8]) -> usize {
    let mut at = 0;
    while at < bytes.len() {
        let page = page_after(&bytes[at..]);
        if advise(bytes[at..at + page].as_ptr_range(), Advice::LinuxPopulateWrite).is_err() {
            return at;
        }
        at += page;
    }
    0
}

/// Returns how many bytes from the beginning of a range can be read, at least one.
///
/// # Errors
///
/// The reason why the first byte cannot be read. It must not be used then.
pub(crate) fn readable(bytes: &[u8]) -> io::Result<usize> {
    let Err(error) = advise(bytes.as_ptr_range(), Advice::LinuxPopulateRead) else { return Ok(bytes.len()) };
    // The pages before the first bad one are resident by now, so this costs little more than a check of each.
    let mut good = 0;
    while good < bytes.len() {
        let page = page_after(&bytes[good..]);
        match advise(bytes[good..good + page].as_ptr_range(), Advice::LinuxPopulateRead) {
            Ok(()) => good += page,
            Err(_) if good > 0 => break,
            Err(error) => return Err(error),
        }
    }
    if good == 0 { Err(error) } else { Ok(good) }
}

/// Gives advice for all pages that intersect a range. Succeeds if the kernel does not know the advice.
fn advise(range: Range<*const u8>, advice: Advice) -> io::Result<()> {
    let page = rustix::param::page_size();
    let (first, end) = (range.start.addr() / page * page, range.end.addr());
    if range.is_empty() {
        return Ok(());
    }
    let (start, length) = (range.start.with_addr(first).cast_mut().cast(), end - first);
    loop {
        // SAFETY: both kinds of advice that are given here change no byte, neither in the range nor in the rest of its
        // first and last page.
        match unsafe { madvise(start, length, advice) } {
            Err(Errno::INTR | Errno::AGAIN) => {}
            // Linux before 5.14 does not know the advice. Newer kernels refuse it for memory of a device, which is
            // usable, and for memory that is mapped without the permission.
            Err(Errno::INVAL) if populates() && !is_permitted(first..end, advice == Advice::LinuxPopulateWrite) => {
                return Err(Errno::FAULT.into());
            }
            Ok(()) | Err(Errno::INVAL) => return Ok(()),
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Whether the kernel knows `MADV_POPULATE_READ`. Checked once.
fn populates() -> bool {
    static POPULATES: OnceLock<bool> = OnceLock::new();
    *POPULATES.get_or_init(|| {
        static PAGE: u8 = 0;
        let page = rustix::param::page_size();
        let start = (&raw const PAGE).with_addr((&raw const PAGE).addr() / page * page).cast_mut().cast();
        // SAFETY: a mapped page of this program, which the call does not change.
        unsafe { madvise(start, page, Advice::LinuxPopulateRead) }.is_ok()
    })
}

/// Returns the number of bytes up to the next page, or to the end.
fn page_after(bytes: &[u8]) -> usize {
    let page = rustix::param::page_size();
    (page - bytes.as_ptr().addr() % page).min(bytes.len())
}

/// Zeroes a range, but writes only to pages that are not zero, because the others may not be resident or may belong to
/// a file.
fn fill_with_zeros(bytes: &mut [u8]) -> io::Result<()> {
    let mut rest = bytes;
    while !rest.is_empty() {
        let (batch, later) = rest.split_at_mut(rest.len().min(ZERO_FILL_BATCH_BYTES));
        if readable(batch)? < batch.len() {
            return Err(Errno::FAULT.into());
        }
        let mut pages = batch;
        while !pages.is_empty() {
            let (page, others) = pages.split_at_mut(page_after(pages).min(PAGE_BYTES));
            if !is_zero(page) {
                populate(page)?;
                page.fill(0);
            }
            pages = others;
        }
        rest = later;
    }
    Ok(())
}

/// The bytes that are checked for readability with one call.
const ZERO_FILL_BATCH_BYTES: usize = 1 << 20;

fn whole_pages(bytes: &mut [u8]) -> (&mut [u8], &mut [u8], &mut [u8]) {
    let page = rustix::param::page_size();
    let head = bytes.as_ptr().align_offset(page).min(bytes.len());
    let (head, rest) = bytes.split_at_mut(head);
    let whole = rest.len() / page * page;
    let (pages, tail) = rest.split_at_mut(whole);
    (head, pages, tail)
}

#[cfg(test)]
mod tests {
    use std::ptr;

    use super::*;
    use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap, mmap_anonymous, mprotect, munmap};

    #[test]
    fn whatever_is_behind_a_buffer_it_is_zero_afterwards() {
        let mut heap = vec![1_u8; 1 << 20];
        make_zero(&mut heap[5000..900_000], Backing::Anonymous).unwrap();
        assert!(is_zero(&heap[5000..900_000]));
        assert!(heap[..5000].iter().chain(&heap[900_000..]).all(|byte| *byte == 1));
        for backing in [Backing::Shared, Backing::Other] {
            heap.fill(1);
            // There is no file to punch a hole into, so it is overwritten.
            make_zero(&mut heap[5000..900_000], backing).unwrap();
            assert!(is_zero(&heap[5000..900_000]));
        }
        populate(&mut heap).unwrap();
        assert_eq!(readable(&heap).unwrap(), heap.len());
    }

    #[test]
    fn pages_that_must_not_be_touched_are_found() {
        let page = rustix::param::page_size();
        // SAFETY: new memory that only this test uses.
        let start = unsafe { mmap_anonymous(ptr::null_mut(), 8 * page, ProtFlags::READ, MapFlags::PRIVATE) }.unwrap();
        // SAFETY: the address is within it.
        unsafe { mprotect(start.byte_add(3 * page), page, MprotectFlags::empty()) }.unwrap();
        // SAFETY: mapped until the end of the test.
        let memory = unsafe { std::slice::from_raw_parts(start.cast::<u8>(), 8 * page) };
        assert_eq!(readable(&memory[100..]).unwrap(), 3 * page - 100);
        assert_eq!(readable(&memory[3 * page + 5..]).unwrap_err().raw_os_error(), Some(libc::EFAULT));
        assert_eq!(readable(&memory[4 * page..]).unwrap(), 4 * page);
        // SAFETY: mapped until the end of the test; it is not written to.
        let read_only = unsafe { std::slice::from_raw_parts_mut(start.cast::<u8>(), page) };
        assert!(populate(read_only).is_err());
        // SAFETY: no reference to it is used any more.
        unsafe { munmap(start, 8 * page) }.unwrap();
    }

    #[test]
    fn the_end_of_a_file_that_was_cut_is_found() {
        let page = rustix::param::page_size();
        let file = tempfile::tempfile().unwrap();
        file.set_len(4 * page as u64).unwrap();
        // SAFETY: a new mapping.
        let start =
            unsafe { mmap(ptr::null_mut(), 4 * page, ProtFlags::READ | ProtFlags::WRITE, MapFlags::SHARED, &file, 0) };
        let start = start.unwrap();
        file.set_len(page as u64).unwrap();
        // SAFETY: mapped until the end of the test, and used only where the file has contents.
        let memory = unsafe { std::slice::from_raw_parts_mut(start.cast::<u8>(), 4 * page) };
        assert_eq!(readable(memory).unwrap(), page);
        assert_eq!(populate(&mut memory[page..]).unwrap_err().raw_os_error(), Some(libc::EFAULT));
        assert!(make_zero(&mut memory[page..], Backing::Other).is_err());
        // SAFETY: no reference to it is used any more.
        unsafe { munmap(start, 4 * page) }.unwrap();
    }
}
