//! Where guest memory comes from.

use std::io;
use std::ops::Range;

use super::pages::readable;
#[cfg(feature = "python")]
use super::ranges::bytes_in;
use crate::error::Error;

/// The memory of a guest region, read by several threads at once.
///
/// The memory may change while it is read: what is stored is what one read gave. [`FileMemory`](crate::FileMemory) is a source,
/// so is a range of a [`ProcessMemory`](crate::ProcessMemory), and so is whatever holds bytes: a `Vec<u8>`, a `&[u8]`. Bytes
/// that are borrowed do not change, which is what makes it sound to store them without a copy.
pub trait GuestMemorySource: Sync {
    /// Bytes of the region.
    fn size(&self) -> u64;

    /// All bytes, where they lie in this process and do not change while they are borrowed: those are searched for zeros,
    /// compressed, encrypted and written where they are. Memory that others may write to meanwhile, such as a guest's that
    /// runs, is not borrowed but read, by [`GuestMemorySource::read_at`], into a buffer. None by default.
    fn bytes(&self) -> Option<&[u8]> {
        None
    }

    /// Whether all of a range of [`GuestMemorySource::bytes`] can be touched; where not, it is read by
    /// [`GuestMemorySource::read_at`], which tells what cannot. By default true, as of every reference in Rust. Memory that is a
    /// mapping may have guard pages, or lie beyond the end of a file that was cut: who lends it to strangers looks first.
    fn can_touch(&self, _range: Range<u64>) -> bool {
        true
    }

    /// Adds to `found` the ranges `within` that may hold anything but zeros, in ascending order. By default all of it.
    ///
    /// # Errors
    ///
    /// Those of looking.
    fn data_ranges(&self, within: Range<u64>, found: &mut Vec<Range<u64>>) -> io::Result<()> {
        found.push(within);
        Ok(())
    }

    /// Returns the offset of the first byte from `offset` on that may be other than zero, so that a dump steps over a hole at
    /// once, however long it is. By default `offset` itself; None where only zeros follow.
    ///
    /// # Errors
    ///
    /// Those of looking.
    fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        Ok((offset < self.size()).then_some(offset))
    }

    /// Fills the beginning of `buf` with what is at `offset`, and returns how much that is: at least a byte.
    ///
    /// # Errors
    ///
    /// Why the very first byte cannot be read. One of the kind [`io::ErrorKind::NotFound`] says that the source itself is gone,
    /// and one of the operating system's, but EFAULT, EIO and EHWPOISON, that a call was refused: neither is ever taken for a
    /// page that cannot be read.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize>;
}

/// Whether an error of reading is one of that page alone, so that zeros may stand for it.
pub(super) fn is_of_page(error: &io::Error) -> bool {
    if let Some(errno) = error.raw_os_error() {
        return matches!(errno, libc::EFAULT | libc::EIO | libc::EHWPOISON);
    }
    // An error of ours tells of a call that was refused.
    let ours = error.get_ref().is_some_and(<dyn std::error::Error + Send + Sync>::is::<Error>);
    error.kind() != io::ErrorKind::NotFound && !ours
}

impl<T: AsRef<[u8]> + Sync> GuestMemorySource for T {
    fn size(&self) -> u64 {
        self.as_ref().len() as u64
    }

    fn bytes(&self) -> Option<&[u8]> {
        Some(self.as_ref())
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        let rest = usize::try_from(offset).ok().and_then(|offset| self.as_ref().get(offset..)).unwrap_or_default();
        let length = rest.len().min(buf.len());
        // A mapping may have pages that must not be touched.
        let length = readable(&rest[..length])?;
        buf[..length].copy_from_slice(&rest[..length]);
        Ok(length)
    }
}

/// Bytes in this process that do not change while they are read, though not all of them need be there.
#[cfg(feature = "python")]
pub(crate) struct StableBytes<'a>(pub(crate) &'a [u8]);

#[cfg(feature = "python")]
impl GuestMemorySource for StableBytes<'_> {
    fn size(&self) -> u64 {
        self.0.size()
    }

    fn bytes(&self) -> Option<&[u8]> {
        Some(self.0)
    }

    fn can_touch(&self, range: Range<u64>) -> bool {
        bytes_in(self.0, &range).is_some_and(|part| readable(part).is_ok_and(|length| length == part.len()))
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        self.0.read_at(offset, buf)
    }
}

/// Bytes in this process that others may change while they are read.
#[cfg(feature = "python")]
pub(crate) struct ChangingBytes<'a>(pub(crate) &'a [u8]);

#[cfg(feature = "python")]
impl GuestMemorySource for ChangingBytes<'_> {
    fn size(&self) -> u64 {
        self.0.size()
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        self.0.read_at(offset, buf)
    }
}
