//! Blocks that two files share until one of them changes: a copy without a copy, on btrfs, XFS and others.

#![allow(unsafe_code, reason = "FICLONERANGE is in no safe crate we have")]

use std::fs::File;
use std::ops::Range;
use std::os::fd::AsRawFd;

/// Makes `target` share the blocks of `range` of `source`, from `offset` on. Returns whether the file system did. All
/// three numbers must be multiples of its block size.
pub(crate) fn clone_range(source: &File, range: Range<u64>, target: &File, offset: u64) -> bool {
    // A length of 0 would mean everything up to the end.
    if range.is_empty() {
        return true;
    }
    let arguments = libc::file_clone_range {
        src_fd: source.as_raw_fd().into(),
        src_offset: range.start,
        src_length: range.end - range.start,
        dest_offset: offset,
    };
    // SAFETY: two open files, and a structure that the kernel only reads.
    let result = unsafe { libc::ioctl(target.as_raw_fd(), libc::FICLONERANGE, &raw const arguments) };
    // Every error means the same: the caller copies the bytes, and meets errors of the disk there.
    result == 0
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn a_cloned_range_has_the_bytes_or_nothing_was_changed() {
        let (source, target) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        source.write_all_at(&[7; 8192], 0).unwrap();
        target.set_len(16384).unwrap();
        let cloned = clone_range(&source, 4096..8192, &target, 8192);
        let mut bytes = vec![1; 16384];
        target.read_exact_at(&mut bytes, 0).unwrap();
        let expected = if cloned { 7 } else { 0 };
        assert!(bytes[8192..12288].iter().all(|byte| *byte == expected));
        assert!(bytes[..8192].iter().chain(&bytes[12288..]).all(|byte| *byte == 0));
    }

    #[test]
    fn an_empty_range_is_not_the_whole_file() {
        let (source, target) = (tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap());
        source.write_all_at(&[7; 4096], 0).unwrap();
        assert!(clone_range(&source, 0..0, &target, 0));
        assert_eq!(target.metadata().unwrap().len(), 0);
    }
}
