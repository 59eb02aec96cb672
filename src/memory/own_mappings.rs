//! Mappings of this process: those behind a buffer of the caller, and those of files that can be written only through a
//! mapping.

#![allow(unsafe_code, reason = "mmap")]

use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::ptr::{self, NonNull};

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use crate::process;

/// The memory behind a buffer, which decides how its pages become zeros.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Backing {
    /// Private memory without a file: a released page is zero at its next use.
    Anonymous,
    /// Shared memory: a hole can be made in the file behind it.
    Shared,
    /// A released page would have the contents of a file again, or the kind of memory is unknown.
    Other,
    /// The pages are zeros already.
    Zeros,
}

/// The mappings of this process, read once, because there may be tens of thousands of mappings and of buffers.
#[derive(Default)]
pub(super) struct OwnMappings(Vec<OwnMapping>);

#[derive(Debug, PartialEq, Eq)]
struct OwnMapping {
    addresses: Range<usize>,
    readable: bool,
    writable: bool,
    shared: bool,
    file_offset: u64,
    /// Device and inode. Inode 0 means that there is no file.
    file: (u64, u64),
}

impl OwnMappings {
    /// Reads the mappings. If they cannot be read, the list is empty and every buffer counts as unknown.
    pub(super) fn read() -> Self {
        let maps = std::fs::read("/proc/self/maps").unwrap_or_default();
        Self(maps.split(|byte| *byte == b'\n').filter_map(|line| parse(&String::from_utf8_lossy(line))).collect())
    }

    /// Returns the mappings that intersect a buffer.
    fn holding(&self, buffer: &[u8]) -> &[OwnMapping] {
        let Range { start, end } = addresses(buffer);
        let first = self.0.partition_point(|mapping| mapping.addresses.end <= start);
        let last = self.0.partition_point(|mapping| mapping.addresses.start < end);
        self.0.get(first..last).unwrap_or_default()
    }

    /// Returns the memory behind a buffer, or [`Backing::Other`] if there is more than one kind.
    pub(super) fn backing(&self, buffer: &[u8]) -> Backing {
        if !process::advice_is_taken() {
            return Backing::Other;
        }
        let Range { start: mut at, end } = addresses(buffer);
        let mut found = None;
        for mapping in self.holding(buffer) {
            let kind = mapping.backing();
            if mapping.addresses.start > at || found.is_some_and(|found| found != kind) {
                return Backing::Other;
            }
            (found, at) = (Some(kind), mapping.addresses.end);
        }
        found.filter(|_| at >= end).unwrap_or(Backing::Other)
    }

    /// Returns the ranges of files that a buffer shares.
    pub(super) fn of_files(&self, buffer: &[u8]) -> impl Iterator<Item = ((u64, u64), Range<u64>)> {
        let Range { start, end } = addresses(buffer);
        self.holding(buffer).iter().filter(|mapping| mapping.shared).map(move |mapping| {
            let at = |address: usize| mapping.file_offset + (address - mapping.addresses.start) as u64;
            (mapping.file, at(start.max(mapping.addresses.start))..at(end.min(mapping.addresses.end)))
        })
    }
}

fn addresses(buffer: &[u8]) -> Range<usize> {
    let Range { start, end } = buffer.as_ptr_range();
    start.addr()..end.addr()
}

impl OwnMapping {
    fn backing(&self) -> Backing {
        match (self.shared, self.file.1) {
            (true, _) => Backing::Shared,
            (false, 0) => Backing::Anonymous,
            (false, _) => Backing::Other,
        }
    }
}

/// Whether all addresses are mapped with permission to read, or to write. True if that is unknown.
pub(super) fn is_permitted(addresses: Range<usize>, writing: bool) -> bool {
    let OwnMappings(mappings) = OwnMappings::read();
    let mut at = addresses.start;
    for mapping in &mappings {
        if mapping.addresses.contains(&at) && if writing { mapping.writable } else { mapping.readable } {
            at = mapping.addresses.end;
        }
    }
    mappings.is_empty() || at >= addresses.end
}

/// Whether a buffer shares a file of a file system that is full, which is the usual reason why such a page cannot be
/// allocated.
pub(super) fn is_on_full_file_system(buffer: &[u8]) -> bool {
    let mappings = OwnMappings::read();
    let shared = mappings.holding(buffer).iter().filter(|mapping| mapping.shared);
    shared.map(|mapping| &mapping.addresses).any(|Range { start, end }| {
        // Without permission to follow the link, the reason stays unknown.
        rustix::fs::statvfs(format!("/proc/self/map_files/{start:x}-{end:x}"))
            .is_ok_and(|system| system.f_blocks > 0 && system.f_bavail == 0)
    })
}

/// Parses a line of `/proc/PID/maps`; see `proc_pid_maps(5)`.
fn parse(line: &str) -> Option<OwnMapping> {
    let mut words = line.split_ascii_whitespace();
    let (start, end) = words.next()?.split_once('-')?;
    let address = |text| usize::from_str_radix(text, 16).ok();
    let permissions = words.next()?;
    let file_offset = u64::from_str_radix(words.next()?, 16).ok()?;
    let (major, minor) = words.next()?.split_once(':')?;
    let number = |text| u32::from_str_radix(text, 16).ok();
    let device = rustix::fs::makedev(number(major)?, number(minor)?);
    let inode = words.next()?.parse().ok()?;
    Some(OwnMapping {
        addresses: address(start)?..address(end)?,
        readable: permissions.starts_with('r'),
        writable: permissions.contains('w'),
        shared: permissions.ends_with('s'),
        file_offset,
        file: (device, inode),
    })
}

/// A shared mapping of a range of a file, for reading and writing.
#[derive(Debug)]
pub(super) struct Mapping {
    start: NonNull<u8>,
    mapped_bytes: usize,
    /// Offset of the range in the mapping, because files are mapped in whole pages.
    before: usize,
    length: usize,
}

// SAFETY: `self` is the only owner of the memory until it is dropped, like a Vec.
unsafe impl Send for Mapping {}

impl Mapping {
    /// Maps `size` bytes from `offset` on, of a file with pages of `page` bytes.
    pub(super) fn of_file(file: &impl AsFd, offset: u64, size: u64, page: u64) -> io::Result<Self> {
        let too_large = |_| io::Error::from(io::ErrorKind::InvalidInput);
        let first = offset / page * page;
        let before = usize::try_from(offset - first).map_err(too_large)?;
        let length = usize::try_from(size).map_err(too_large)?;
        let mapped_bytes = usize::try_from((offset - first + size).next_multiple_of(page)).map_err(too_large)?;
        if length == 0 {
            return Ok(Self { start: NonNull::dangling(), mapped_bytes: 0, before: 0, length: 0 });
        }
        // A sparse guest needs fewer huge pages than it has addresses, so none are reserved.
        let flags = MapFlags::SHARED | MapFlags::NORESERVE;
        // SAFETY: a new mapping, at an address that the kernel chooses.
        let start =
            unsafe { mmap(ptr::null_mut(), mapped_bytes, ProtFlags::READ | ProtFlags::WRITE, flags, file, first) };
        let start = NonNull::new(start?.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { start, mapped_bytes, before, length })
    }

    /// Returns the range. Before a page of it is used, [`super::pages::populate`] must have succeeded for that page.
    pub(super) fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: `length` bytes of the mapping, which lasts as long as `self`. No other code in this process has its
        // address.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr().add(self.before), self.length) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if self.mapped_bytes > 0 {
            // SAFETY: the mapping that `of_file` made. No borrow of it is left.
            let _ = unsafe { munmap(self.start.as_ptr().cast(), self.mapped_bytes) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustix::fs::makedev;

    #[test]
    fn lines_of_maps_are_understood() {
        let of = |line| parse(line).unwrap();
        let anonymous = of("7f00-7f80 rw-p 00000000 00:00 0 ");
        assert_eq!((&anonymous.addresses, anonymous.backing()), (&(0x7f00..0x7f80), Backing::Anonymous));
        let shared = of("7f00-7f80 rw-s 00001000 00:01 2057 /memfd:ram (deleted)");
        assert_eq!(
            (shared.backing(), shared.file_offset, shared.file),
            (Backing::Shared, 0x1000, (makedev(0, 1), 2057))
        );
        assert_eq!(of("7f00-7f80 rw-p 00000000 fe:00 99 /usr/lib/x").backing(), Backing::Other);
        assert_eq!(parse("7f00-7f80"), None);
    }

    #[test]
    fn a_buffer_on_the_heap_is_anonymous() {
        let heap = vec![1_u8; 1 << 20];
        let mappings = OwnMappings::read();
        assert_eq!(mappings.backing(&heap), Backing::Anonymous);
        assert_eq!(mappings.of_files(&heap).count(), 0);
        assert_eq!(OwnMappings::default().backing(&heap), Backing::Other);
    }

    #[test]
    fn parts_of_a_file_are_mapped() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(16384).unwrap();
        let mut mapping = Mapping::of_file(&file, 5000, 6000, 4096).unwrap();
        assert_eq!(mapping.as_mut_slice().len(), 6000);
        mapping.as_mut_slice()[0] = 7;
        mapping.as_mut_slice()[5999] = 8;
        let mappings = OwnMappings::read();
        let ino = std::os::unix::fs::MetadataExt::ino(&file.metadata().unwrap());
        let found: Vec<_> =
            mappings.of_files(mapping.as_mut_slice()).map(|((_, inode), range)| (inode, range)).collect();
        assert_eq!(found, [(ino, 5000..11000)]);
        let mut bytes = [0; 2];
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut bytes[..1], 5000).unwrap();
        std::os::unix::fs::FileExt::read_exact_at(&file, &mut bytes[1..], 10999).unwrap();
        assert_eq!(bytes, [7, 8]);
    }
}
