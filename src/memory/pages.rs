//! Pages of this process: made resident, and given back.

#![allow(unsafe_code, reason = "madvise")]

use std::ops::Range;

use rustix::mm::{Advice, madvise};

use super::zeros::{PAGE_BYTES, is_zero};
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
}

impl Backing {
    /// What `/proc/self/maps` says of all of the buffer.
    pub(super) fn of(buffer: &[u8]) -> Self {
        if !process::advice_is_taken() {
            return Self::Other;
        }
        let Ok(maps) = std::fs::read_to_string("/proc/self/maps") else { return Self::Other };
        let wanted = buffer.as_ptr_range();
        let (mut at, end) = (wanted.start as usize, wanted.end as usize);
        let mut kinds = Vec::new();
        for line in maps.lines() {
            let Some((range, kind)) = parse(line) else { continue };
            if range.contains(&at) && at < end {
                kinds.push(kind);
                at = range.end;
            }
        }
        match kinds.split_first() {
            Some((first, rest)) if at >= end && rest.iter().all(|kind| kind == first) => *first,
            _ => Self::Other,
        }
    }
}

/// The addresses of a mapping, and what is behind it; `proc_pid_maps(5)`.
fn parse(line: &str) -> Option<(Range<usize>, Backing)> {
    let mut words = line.split_ascii_whitespace();
    let (start, end) = words.next()?.split_once('-')?;
    let address = |text| usize::from_str_radix(text, 16).ok();
    let shared = words.next()?.ends_with('s');
    let inode = words.nth(2)?;
    let backing = match (shared, inode) {
        (true, _) => Backing::Shared,
        (false, "0") => Backing::Anonymous,
        (false, _) => Backing::Other,
    };
    Some((address(start)?..address(end)?, backing))
}

/// Makes a part of a buffer zero, and gives its pages back where that can be.
pub(super) fn make_zero(part: &mut [u8], backing: Backing) {
    let advice = match backing {
        Backing::Anonymous => Advice::LinuxDontNeed,
        Backing::Shared => Advice::LinuxRemove,
        Backing::Other => return fill_with_zeros(part),
    };
    let (head, pages, tail) = whole_pages(part);
    head.fill(0);
    tail.fill(0);
    if pages.is_empty() {
        return;
    }
    // SAFETY: whole pages of a slice that is ours alone, so that nobody else sees them change, in a mapping where, as its
    // backing says, both kinds of advice leave zeros.
    if unsafe { madvise(pages.as_mut_ptr().cast(), pages.len(), advice) }.is_err() {
        // Locked pages; a file system that makes no holes.
        fill_with_zeros(pages);
    }
}

/// Makes pages resident that are going to be written, all at once: half the time of a fault for each.
pub(super) fn populate(part: &mut [u8]) {
    let (_, pages, _) = whole_pages(part);
    if !pages.is_empty() {
        // SAFETY: whole pages of a slice that is ours; this changes none of their bytes. Where the kernel cannot (before 5.14),
        // each is faulted in when it is written.
        let _ = unsafe { madvise(pages.as_mut_ptr().cast(), pages.len(), Advice::LinuxPopulateWrite) };
    }
}

/// Writes only to pages that are not zero: the others may not be resident, or be a file's.
fn fill_with_zeros(part: &mut [u8]) {
    for page in part.chunks_mut(PAGE_BYTES) {
        if !is_zero(page) {
            page.fill(0);
        }
    }
}

fn whole_pages(part: &mut [u8]) -> (&mut [u8], &mut [u8], &mut [u8]) {
    let page = rustix::param::page_size();
    let head = part.as_ptr().align_offset(page).min(part.len());
    let (head, rest) = part.split_at_mut(head);
    let whole = rest.len() / page * page;
    let (pages, tail) = rest.split_at_mut(whole);
    (head, pages, tail)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn whatever_is_behind_a_buffer_it_is_zero_afterwards() {
        let mut heap = vec![1_u8; 1 << 20];
        assert_eq!(Backing::of(&heap), Backing::Anonymous);
        make_zero(&mut heap[5000..900_000], Backing::Anonymous);
        assert!(is_zero(&heap[5000..900_000]));
        assert!(heap[..5000].iter().chain(&heap[900_000..]).all(|byte| *byte == 1));
        for backing in [Backing::Shared, Backing::Other] {
            heap.fill(1);
            // Of no file, it cannot be punched: filled then.
            make_zero(&mut heap[5000..900_000], backing);
            assert!(is_zero(&heap[5000..900_000]));
        }
        populate(&mut heap);
    }

    #[test]
    fn lines_of_maps_are_understood() {
        let of = |line| parse(line).unwrap();
        assert_eq!(of("7f00-7f80 rw-p 00000000 00:00 0 "), (0x7f00..0x7f80, Backing::Anonymous));
        assert_eq!(of("7f00-7f80 rw-s 00000000 00:01 2057 /memfd:ram (deleted)").1, Backing::Shared);
        assert_eq!(of("7f00-7f80 rw-p 00000000 fe:00 99 /usr/lib/x").1, Backing::Other);
    }
}
