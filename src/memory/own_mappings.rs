//! Mappings of this process: what is behind the caller's buffers, and our own of files that cannot be written otherwise.

#![allow(unsafe_code, reason = "mmap")]

use std::io;
use std::ops::Range;
use std::os::fd::AsFd;
use std::ptr::{self, NonNull};

use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};

use crate::process;

/// What becomes of pages of a buffer that are given back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Backing {
    /// Private and of no file: they are zeros when they are next looked at.
    Anonymous,
    /// Shared with others: a hole can be made in what is behind it.
    Shared,
    /// The contents of a file would come back, or it cannot be known.
    Other,
    /// They are zeros already.
    Zeros,
}

/// The mappings of this process, read once: there may be tens of thousands, and as many buffers.
#[derive(Default)]
pub(super) struct OwnMappings(Vec<OwnMapping>);

#[derive(Debug, PartialEq, Eq)]
struct OwnMapping {
    addresses: Range<usize>,
    readable: bool,
    writable: bool,
    shared: bool,
    file_offset: u64,
    /// Device and inode; inode 0 is no file.
    file: (u64, u64),
}

impl OwnMappings {
    /// None where they cannot be read: then nothing is known of any buffer.
    pub(super) fn read() -> Self {
        let maps = std::fs::read("/proc/self/maps").unwrap_or_default();
        Self(maps.split(|byte| *byte == b'\n').filter_map(|line| parse(&String::from_utf8_lossy(line))).collect())
    }

    /// The mappings that hold some of a buffer.
    fn holding(&self, buffer: &[u8]) -> &[OwnMapping] {
        let Range { start, end } = addresses(buffer);
        let first = self.0.partition_point(|mapping| mapping.addresses.end <= start);
        let last = self.0.partition_point(|mapping| mapping.addresses.start < end);
        self.0.get(first..last).unwrap_or_default()
    }

    /// What all of a buffer has behind it.
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

    /// The parts of files that a buffer shares with them.
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

/// Whether all of these addresses are mapped to be read, or to be written; true where it cannot be known.
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

/// Whether a buffer shares a file with a file system that has no room left: that is what a page that cannot be had mostly
/// means there.
pub(super) fn is_on_full_file_system(buffer: &[u8]) -> bool {
    let mappings = OwnMappings::read();
    let shared = mappings.holding(buffer).iter().filter(|mapping| mapping.shared);
    shared.map(|mapping| &mapping.addresses).any(|Range { start, end }| {
        // Whoever may not follow it is not told the reason.
        rustix::fs::statvfs(format!("/proc/self/map_files/{start:x}-{end:x}"))
            .is_ok_and(|system| system.f_blocks > 0 && system.f_bavail == 0)
    })
}

/// A line of `/proc/PID/maps`; `proc_pid_maps(5)`.
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

/// A part of a file, mapped by us: shared, to be read and written.
#[derive(Debug)]
pub(super) struct Mapping {
    start: NonNull<u8>,
    mapped_bytes: usize,
    /// Where in the mapping the part begins: files are mapped by whole pages.
    before: usize,
    length: usize,
}

// SAFETY: memory that is ours alone until it is dropped, as a Vec's is.
unsafe impl Send for Mapping {}

impl Mapping {
    /// Maps `size` bytes from `offset`, of a file whose pages have `page` bytes.
    pub(super) fn of_file(file: &impl AsFd, offset: u64, size: u64, page: u64) -> io::Result<Self> {
        let too_large = |_| io::Error::from(io::ErrorKind::InvalidInput);
        let first = offset / page * page;
        let before = usize::try_from(offset - first).map_err(too_large)?;
        let length = usize::try_from(size).map_err(too_large)?;
        let mapped_bytes = usize::try_from((offset - first + size).next_multiple_of(page)).map_err(too_large)?;
        if length == 0 {
            return Ok(Self { start: NonNull::dangling(), mapped_bytes: 0, before: 0, length: 0 });
        }
        // A sparse guest needs fewer huge pages than it has addresses: none are set aside.
        let flags = MapFlags::SHARED | MapFlags::NORESERVE;
        // SAFETY: a new mapping, at an address of the kernel's choice.
        let start =
            unsafe { mmap(ptr::null_mut(), mapped_bytes, ProtFlags::READ | ProtFlags::WRITE, flags, file, first) };
        let start = NonNull::new(start?.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { start, mapped_bytes, before, length })
    }

    /// The part. Whoever touches it makes sure before, by [`super::pages::populate`], that it can be touched.
    pub(super) fn as_mut_slice(&mut self) -> &mut [u8] {
        // SAFETY: `length` bytes of the mapping, which lasts as long as `self`, and nobody else in this process knows it.
        unsafe { std::slice::from_raw_parts_mut(self.start.as_ptr().add(self.before), self.length) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        if self.mapped_bytes > 0 {
            // SAFETY: the very mapping that `of_file` made, which nobody borrows any more.
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
