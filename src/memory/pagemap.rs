//! The pages that a process has, from `/proc/PID/pagemap` (Documentation/admin-guide/mm/pagemap.rst of the kernel).
//!
//! Linux 6.7 and newer report the ranges of existing pages (`PAGEMAP_SCAN`), which takes no time for untouched memory
//! of any length. On older kernels the entry of each page is read.

#![allow(unsafe_code, reason = "PAGEMAP_SCAN is in no safe crate we have")]

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

/// The size of the entry of a page, and its bits: in memory, swapped out, and a guard (`MADV_GUARD_INSTALL`, since
/// Linux 6.15).
const ENTRY_BYTES: usize = 8;
const PRESENT: u64 = 1 << 63;
const SWAPPED: u64 = 1 << 62;
const GUARD: u64 = 1 << 58;

/// Entries that one read gets at most: 128 MiB of memory.
const MAX_ENTRIES: usize = 1 << 15;

/// Ranges that one call gets at most: as many as a batch of 128 pages can have.
const MAX_REGIONS: usize = 64;

/// The categories `PAGE_IS_PRESENT` and `PAGE_IS_SWAPPED`.
const IS_THERE: u64 = 8 | 16;

/// `struct pm_scan_arg` of linux/fs.h.
#[repr(C)]
#[derive(Default)]
struct Scan {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    regions: u64,
    regions_length: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// `struct page_region`.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

/// The page map of a process.
#[derive(Debug)]
pub(super) struct PageMap {
    /// `None` if the kernel does not offer the map or refuses it. Any page may exist then, and only a read shows it.
    file: Option<File>,
    scans: AtomicBool,
}

impl PageMap {
    /// Opens the page map of a process. `directory` is the directory of the process in `/proc`.
    pub(super) fn open(directory: &Path) -> Self {
        let file = File::open(directory.join("pagemap")).ok();
        // Some sandboxes allow the map to be opened but not to be read.
        let file = file.filter(|file| retry(|| file.read_at(&mut [0; ENTRY_BYTES], 0)).is_ok());
        Self { file, scans: AtomicBool::new(true) }
    }

    /// Whether there is a page map.
    pub(super) fn tells(&self) -> bool {
        self.file.is_some()
    }

    /// Calls `run` for each run of pages in ascending order, with true if the process has them. If the process has
    /// ended, the runs may be wrong.
    pub(super) fn runs(
        &self,
        addresses: Range<u64>,
        mut run: impl FnMut(bool, Range<u64>) -> io::Result<()>,
    ) -> io::Result<()> {
        let (mut there, mut at, mut told) = (Vec::new(), addresses.start, addresses.start);
        while at < addresses.end {
            there.clear();
            at = self.look(at..addresses.end, 0, &mut there)?;
            for held in &there {
                if held.start > told {
                    run(false, told..held.start)?;
                }
                run(true, held.clone())?;
                told = held.end;
            }
        }
        if told < addresses.end { run(false, told..addresses.end) } else { Ok(()) }
    }

    /// Returns the first of the addresses at which the process has a page.
    pub(super) fn next(&self, addresses: Range<u64>) -> io::Result<Option<u64>> {
        let (mut there, mut at) = (Vec::new(), addresses.start);
        while at < addresses.end && there.is_empty() {
            at = self.look(at..addresses.end, 1, &mut there)?;
        }
        Ok(there.first().map(|held| held.start))
    }

    /// Returns how many bytes from the first address on are guard pages, which have no contents.
    pub(super) fn guards(&self, addresses: Range<u64>) -> io::Result<u64> {
        let Some(file) = &self.file else { return Ok(0) };
        let guards = entries(file, &addresses)?.iter().take_while(|entry| **entry & GUARD != 0).count() as u64;
        Ok((page_start(addresses.start) + guards * page_bytes()).clamp(addresses.start, addresses.end)
            - addresses.start)
    }

    /// Adds the ranges of pages that the process has to `there`, with at most `most` pages, or all if `most` is 0.
    /// Returns the address up to which it searched.
    fn look(&self, addresses: Range<u64>, most: u64, there: &mut Vec<Range<u64>>) -> io::Result<u64> {
        let Some(file) = &self.file else {
            there.push(addresses.clone());
            return Ok(addresses.end);
        };
        if self.scans.load(Ordering::Relaxed) {
            match retry(|| scan(file, &addresses, most, there)) {
                Err(error) if error.raw_os_error() != Some(libc::ESRCH) => self.scans.store(false, Ordering::Relaxed),
                looked => return looked,
            }
        }
        let mut at = page_start(addresses.start);
        for entry in entries(file, &addresses)? {
            let page = at.max(addresses.start)..(at + page_bytes()).min(addresses.end);
            at += page_bytes();
            if entry & (PRESENT | SWAPPED) == 0 {
                continue;
            }
            match there.last_mut() {
                Some(last) if last.end == page.start => last.end = page.end,
                _ => there.push(page),
            }
        }
        Ok(at.min(addresses.end))
    }
}

fn page_bytes() -> u64 {
    rustix::param::page_size() as u64
}

fn page_start(address: u64) -> u64 {
    address / page_bytes() * page_bytes()
}

/// Repeats a call that a signal interrupted.
pub(super) fn retry<T>(mut call: impl FnMut() -> io::Result<T>) -> io::Result<T> {
    loop {
        match call() {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            result => return result,
        }
    }
}

/// Reads the entries of the first of the addresses, at least one.
fn entries(file: &File, addresses: &Range<u64>) -> io::Result<Vec<u64>> {
    let first = addresses.start / page_bytes();
    let wanted = addresses.end.div_ceil(page_bytes()) - first;
    let mut bytes = vec![0; usize::try_from(wanted).map_or(MAX_ENTRIES, |count| count.min(MAX_ENTRIES)) * ENTRY_BYTES];
    let length = retry(|| file.read_at(&mut bytes, first * ENTRY_BYTES as u64))?;
    let entries: Vec<_> = bytes[..length].as_chunks().0.iter().map(|entry| u64::from_ne_bytes(*entry)).collect();
    // The map of a process that has ended is empty.
    if entries.is_empty() { Err(io::Error::from_raw_os_error(libc::ESRCH)) } else { Ok(entries) }
}

/// Does the work of [`PageMap::look`] with `PAGEMAP_SCAN`.
fn scan(file: &File, addresses: &Range<u64>, most: u64, there: &mut Vec<Range<u64>>) -> io::Result<u64> {
    let mut regions = [PageRegion::default(); MAX_REGIONS];
    let mut scan = Scan {
        size: size_of::<Scan>() as u64,
        start: page_start(addresses.start),
        end: page_start(addresses.end.saturating_add(page_bytes() - 1)),
        regions: regions.as_mut_ptr().expose_provenance() as u64,
        regions_length: MAX_REGIONS as u64,
        max_pages: most,
        category_anyof_mask: IS_THERE,
        ..Scan::default()
    };
    // SAFETY: the argument has the layout of linux/fs.h. The kernel writes to it, and to at most `regions_length`
    // regions.
    let count = unsafe { libc::ioctl(file.as_raw_fd(), libc::_IOWR::<Scan>(u32::from(b'f'), 16), &raw mut scan) };
    let count = usize::try_from(count).map_err(|_| io::Error::last_os_error())?;
    // The end is checked, because a search must not go backwards.
    if scan.walk_end <= addresses.start {
        return Err(io::ErrorKind::InvalidData.into());
    }
    for region in &regions[..count.min(MAX_REGIONS)] {
        let (start, end) = (region.start.max(addresses.start), region.end.min(addresses.end));
        if start < end {
            there.push(start..end);
        }
    }
    Ok(scan.walk_end.min(addresses.end))
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};

    /// The pages of a run, as numbers in a mapping that begins at `start`.
    fn pages(start: u64, run: &Range<u64>) -> Range<u64> {
        (run.start - start) / page_bytes()..(run.end - start) / page_bytes()
    }

    /// The runs of pages in a mapping of 64 pages.
    fn runs(map: &PageMap, start: u64) -> Vec<(bool, Range<u64>)> {
        let mut runs = Vec::new();
        let add = |held, run: Range<u64>| {
            runs.push((held, pages(start, &run)));
            Ok(())
        };
        map.runs(start..start + 64 * page_bytes(), add).unwrap();
        runs
    }

    /// The next existing page, from each of the 64 pages on.
    fn next(map: &PageMap, start: u64) -> Vec<Option<u64>> {
        let end = start + 64 * page_bytes();
        let next = |page: u64| map.next(start + page * page_bytes()..end).unwrap();
        (0..64).map(|page| next(page).map(|next| (next - start) / page_bytes())).collect()
    }

    #[test]
    fn both_ways_tell_the_same() {
        let page = rustix::param::page_size();
        // SAFETY: a new mapping, which only this test writes to and unmaps.
        let memory = unsafe {
            mmap_anonymous(std::ptr::null_mut(), 64 * page, ProtFlags::READ | ProtFlags::WRITE, MapFlags::PRIVATE)
                .unwrap()
        };
        for touched in [3, 4, 5, 40] {
            // SAFETY: the address is in the mapping.
            unsafe { memory.cast::<u8>().add(touched * page).write(1) };
        }
        let map = PageMap::open(Path::new("/proc/self"));
        let start = memory as u64;
        let scanned = (runs(&map, start), next(&map, start));
        map.scans.store(false, Ordering::Relaxed);
        assert_eq!((runs(&map, start), next(&map, start)), scanned);
        assert_eq!(scanned.0, [(false, 0..3), (true, 3..6), (false, 6..40), (true, 40..41), (false, 41..64)]);
        assert_eq!((scanned.1[0], scanned.1[4], scanned.1[6], scanned.1[41]), (Some(3), Some(4), Some(40), None));
        assert_eq!(map.guards(start..start + 8).unwrap(), 0);
        // Without a page map, any page may exist.
        let none = PageMap { file: None, scans: AtomicBool::new(true) };
        assert_eq!(runs(&none, start), [(true, 0..64)]);
        // SAFETY: the mapping of this test; no pointer into it is left.
        unsafe { munmap(memory, 64 * page).unwrap() };
    }
}
