//! [`GuestMemorySource`]: the trait of everything that guest memory is read from.

use std::io;
use std::ops::Range;

use super::pages::readable;
#[cfg(feature = "python")]
use super::ranges::bytes_in;
use crate::error::Error;

/// The memory of a guest region, read by several threads at once.
///
/// The memory may change while it is read; the bytes of one read are stored. A [`FileMemory`](crate::FileMemory) is a
/// source, and so are a range of a [`ProcessMemory`](crate::ProcessMemory) and any type that holds bytes, such as
/// `Vec<u8>` or `&[u8]`. Borrowed bytes do not change, so they are stored without a copy.
pub trait GuestMemorySource: Sync {
    /// Returns the size of the region in bytes.
    fn size(&self) -> u64;

    /// Returns all bytes, if they are in this process and do not change while they are borrowed. They are then searched
    /// for zeros, compressed, encrypted and written without a copy. Memory that can change meanwhile, such as that of a
    /// running guest, must return `None`, which is the default: it is read with [`GuestMemorySource::read_at`] into a
    /// buffer.
    fn bytes(&self) -> Option<&[u8]> {
        None
    }

    /// Returns whether a range of [`GuestMemorySource::bytes`] can be used without a fault. If not, it is read with
    /// [`GuestMemorySource::read_at`], which reports the bytes that cannot be read. By default true, as for every Rust
    /// reference. A source over a mapping must check, because a mapping may have guard pages or extend past the end of
    /// a truncated file.
    fn can_touch(&self, _range: Range<u64>) -> bool {
        true
    }

    /// Appends the ranges `within` that may contain anything but zeros to `found`, in ascending order. By default
    /// everything.
    ///
    /// # Errors
    ///
    /// The error of the search.
    fn data_ranges(&self, within: Range<u64>, found: &mut Vec<Range<u64>>) -> io::Result<()> {
        found.push(within);
        Ok(())
    }

    /// Returns the offset of the first byte from `offset` on that may not be zero, or `None` if only zeros follow. A
    /// dump then skips a hole of any length at once. By default `offset` itself.
    ///
    /// # Errors
    ///
    /// The error of the search.
    fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        Ok((offset < self.size()).then_some(offset))
    }

    /// Fills the beginning of `buf` with the bytes at `offset`, and returns their number, which is at least one.
    ///
    /// # Errors
    ///
    /// The reason why the first byte cannot be read. An error of kind [`io::ErrorKind::NotFound`] means that the source
    /// no longer exists. An error of the operating system other than EFAULT, EIO and EHWPOISON means that a call was
    /// refused. Neither is treated as a page that cannot be read.
    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize>;
}

/// Whether a read error is a property of the page alone, so that zeros may replace it.
pub(super) fn is_of_page(error: &io::Error) -> bool {
    if let Some(errno) = error.raw_os_error() {
        return matches!(errno, libc::EFAULT | libc::EIO | libc::EHWPOISON);
    }
    // An `Error` of vmsnap in it reports a refused call.
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
        // A mapping may have pages that must not be used.
        let length = readable(&rest[..length])?;
        buf[..length].copy_from_slice(&rest[..length]);
        Ok(length)
    }
}

/// Bytes in this process that do not change while they are read. Some of their pages may not be readable.
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

/// Bytes in this process that other code may change while they are read.
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
