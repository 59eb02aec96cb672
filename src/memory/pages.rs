//! Pages of this process: asked for before they are touched, and given back.
//!
//! A caller's buffer may be a mapping: of a file that was cut meanwhile, on a full file system, of huge pages that there are
//! none of, with guard pages in it. Touching such a page ends the process by SIGBUS or SIGSEGV. `MADV_POPULATE_READ` and
//! `MADV_POPULATE_WRITE` (Linux 5.14, madvise(2)) report an error instead, and fault in many pages at the cost of few.

#![allow(unsafe_code, reason = "madvise")]

use std::io;
use std::ops::Range;
use std::sync::OnceLock;

use rustix::io::Errno;
use rustix::mm::{Advice, madvise};

use super::own_mappings::{Backing, is_permitted};
use super::zeros::{PAGE_BYTES, is_zero};

/// Makes a range of a buffer zero, and gives its pages back where that can be.
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
    // SAFETY: whole pages of a slice that is ours alone, so that nobody else sees them change, in a mapping where, as its
    // backing says, both kinds of advice leave zeros.
    match unsafe { madvise(pages.as_mut_ptr().cast(), pages.len(), advice) } {
        Ok(()) => Ok(()),
        // Locked pages; a file system that makes no holes.
        Err(_) => fill_with_zeros(pages),
    }
}

/// A transparent huge page of `x86_64`, and of aarch64 with pages of 4 KiB.
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// Asks for huge pages where a range of a buffer fills them.
pub(super) fn want_huge_pages(buffer: &mut [u8], start: u64, end: u64) {
    let base = buffer.as_ptr().addr();
    let at = |offset: u64| usize::try_from(offset).map_or(usize::MAX, |offset| base.saturating_add(offset));
    let first = at(start).next_multiple_of(HUGE_PAGE_BYTES);
    let end = at(end).min(base + buffer.len()) / HUGE_PAGE_BYTES * HUGE_PAGE_BYTES;
    if first < end {
        let pages = buffer[first - base..end - base].as_mut_ptr();
        // SAFETY: whole pages of a slice that is ours; how large they are changes none of their bytes. Where the kernel cannot,
        // they stay as they are.
        let _ = unsafe { madvise(pages.cast(), end - first, Advice::LinuxHugepage) };
    }
}

/// Makes pages resident that are going to be written, all at once: half the time of a fault for each.
///
/// # Errors
///
/// Where one of them cannot be had; it must not be touched then.
pub(crate) fn populate(bytes: &mut [u8]) -> io::Result<()> {
    advise(bytes.as_ptr_range(), Advice::LinuxPopulateWrite)
}

/// Where the first page of a range begins that cannot be had; 0 where all can.
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

/// How many bytes from the beginning of a range can be read, at least one.
///
/// # Errors
///
/// Why the first of them cannot be; it must not be touched then.
pub(crate) fn readable(bytes: &[u8]) -> io::Result<usize> {
    let Err(error) = advise(bytes.as_ptr_range(), Advice::LinuxPopulateRead) else { return Ok(bytes.len()) };
    // The pages before the first bad one are there now, so that this costs little more than looking at them.
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

/// Asks for all pages of which a range has some; quiet where the kernel cannot.
fn advise(range: Range<*const u8>, advice: Advice) -> io::Result<()> {
    let page = rustix::param::page_size();
    let (first, end) = (range.start.addr() / page * page, range.end.addr());
    if range.is_empty() {
        return Ok(());
    }
    let (start, length) = (range.start.with_addr(first).cast_mut().cast(), end - first);
    loop {
        // SAFETY: both kinds of advice that are given here change no byte of any page, neither of ours nor of a neighbour's on
        // the same page.
        match unsafe { madvise(start, length, advice) } {
            Err(Errno::INTR | Errno::AGAIN) => {}
            // Linux before 5.14 does not know it; it refuses the memory of a device, which is there, and what is mapped without
            // the permission.
            Err(Errno::INVAL) if populates() && !is_permitted(first..end, advice == Advice::LinuxPopulateWrite) => {
                return Err(Errno::FAULT.into());
            }
            Ok(()) | Err(Errno::INVAL) => return Ok(()),
            Err(errno) => return Err(errno.into()),
        }
    }
}

/// Whether the kernel knows `MADV_POPULATE_READ`. Looked at once.
fn populates() -> bool {
    static POPULATES: OnceLock<bool> = OnceLock::new();
    *POPULATES.get_or_init(|| {
        static PAGE: u8 = 0;
        let page = rustix::param::page_size();
        let start = (&raw const PAGE).with_addr((&raw const PAGE).addr() / page * page).cast_mut().cast();
        // SAFETY: a page of our own that is mapped, of which this changes nothing.
        unsafe { madvise(start, page, Advice::LinuxPopulateRead) }.is_ok()
    })
}

/// Bytes up to the next page, or to the end.
fn page_after(bytes: &[u8]) -> usize {
    let page = rustix::param::page_size();
    (page - bytes.as_ptr().addr() % page).min(bytes.len())
}

/// Writes only to pages that are not zero: the others may not be resident, or be a file's.
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

/// Looked at together.
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
            // Of no file, it cannot be punched: filled then.
            make_zero(&mut heap[5000..900_000], backing).unwrap();
            assert!(is_zero(&heap[5000..900_000]));
        }
        populate(&mut heap).unwrap();
        assert_eq!(readable(&heap).unwrap(), heap.len());
    }

    #[test]
    fn pages_that_must_not_be_touched_are_found() {
        let page = rustix::param::page_size();
        // SAFETY: new memory of this test's alone.
        let start = unsafe { mmap_anonymous(ptr::null_mut(), 8 * page, ProtFlags::READ, MapFlags::PRIVATE) }.unwrap();
        // SAFETY: within it.
        unsafe { mprotect(start.byte_add(3 * page), page, MprotectFlags::empty()) }.unwrap();
        // SAFETY: mapped until the end of the test.
        let memory = unsafe { std::slice::from_raw_parts(start.cast::<u8>(), 8 * page) };
        assert_eq!(readable(&memory[100..]).unwrap(), 3 * page - 100);
        assert_eq!(readable(&memory[3 * page + 5..]).unwrap_err().raw_os_error(), Some(libc::EFAULT));
        assert_eq!(readable(&memory[4 * page..]).unwrap(), 4 * page);
        // SAFETY: as above; it is not written to.
        let read_only = unsafe { std::slice::from_raw_parts_mut(start.cast::<u8>(), page) };
        assert!(populate(read_only).is_err());
        // SAFETY: nobody looks at it any more.
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
        // SAFETY: mapped until the end of the test, and touched only where there is something of the file.
        let memory = unsafe { std::slice::from_raw_parts_mut(start.cast::<u8>(), 4 * page) };
        assert_eq!(readable(memory).unwrap(), page);
        assert_eq!(populate(&mut memory[page..]).unwrap_err().raw_os_error(), Some(libc::EFAULT));
        assert!(make_zero(&mut memory[page..], Backing::Other).is_err());
        // SAFETY: nobody looks at it any more.
        unsafe { munmap(start, 4 * page) }.unwrap();
    }
}
