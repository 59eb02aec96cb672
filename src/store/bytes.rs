//! Stored bytes, read and written at offsets: the ciphertext of an encrypted fragment, or a plain fragment itself.

use std::fs::File;
use std::io::ErrorKind;
use std::ops::Range;

use crate::error::{Error, Result};
use crate::stored_file::StoredFile;
use crate::threads::Interrupt;

/// An object that is stored somewhere and is read at any offset, by any thread.
///
/// Errors do not name the object; the caller adds its place.
pub(crate) trait ReadAt: Send + Sync {
    /// The number of stored bytes, which does not change while the object is open.
    fn size(&self) -> u64;

    /// Fills `buf` from `offset`.
    ///
    /// # Errors
    ///
    /// `Corrupt` if the object ends before that: it became shorter while it was read.
    fn read_exact_at(&self, buf: &mut [u8], offset: u64, interrupt: &mut Interrupt<'_>) -> Result<()>;

    /// Where the next data may begin, from `from` on: all bytes before that are zero. A hint that saves reads.
    fn next_data(&self, from: u64) -> u64 {
        from
    }

    /// Says that a range is read soon, in order. A hint, which may have no effect.
    fn prefetch(&self, _range: Range<u64>) {}

    /// Whether a read may take a request to another machine, so that opening should not read more than it must.
    fn is_remote(&self) -> bool {
        false
    }

    /// Drops copies of a range that are kept elsewhere, because the bytes did not verify. Returns whether there were
    /// any, so that another read may return other bytes.
    fn distrust(&self, _range: Range<u64>) -> bool {
        false
    }

    /// Asks that reads leave no page of the object in the page cache, if it has one.
    fn set_uncached(&self, _uncached: bool) {}

    /// Drops the pages that uncached reads left in the page cache.
    fn drop_rest(&self) {}

    /// Makes `target` share the blocks of a range from `offset` on, without a copy. Returns whether the file system did.
    fn clone_range(&self, _range: Range<u64>, _target: &File, _offset: u64) -> bool {
        false
    }
}

/// Bytes that are being stored, at any offset and by any thread.
///
/// Ranges never overlap. When the object is finished, they cover it without a gap, unless it is sparse.
pub(crate) trait WriteAt: Send + Sync {
    /// Writes all of `runs`, one after the other, from `offset` on.
    fn write_runs_at(&self, runs: &[&[u8]], offset: u64, interrupt: &mut Interrupt<'_>) -> Result<()>;

    /// Writes all of `data` to `offset`.
    fn write_all_at(&self, data: &[u8], offset: u64, interrupt: &mut Interrupt<'_>) -> Result<()> {
        if data.is_empty() { Ok(()) } else { self.write_runs_at(&[data], offset, interrupt) }
    }

    /// Asks that writes leave no page of the object in the page cache, if it has one.
    fn set_uncached(&self, _uncached: bool) {}

    /// Whether a range that is never written reads as zeros, so that zeros need not be written. The owner of the object
    /// must then set its size.
    fn is_sparse(&self) -> bool {
        false
    }
}

/// A fragment that is being written. Errors do not name it; the caller adds its place.
pub(crate) trait NewObject: WriteAt {
    /// Completes the object: from now on a commit accepts it.
    fn finish(&self, interrupt: &mut Interrupt<'_>) -> Result<()>;

    /// Removes the object. It may be called again.
    fn discard(&self) -> Result<()>;

    /// Removes the name of the object, and returns its file, to be read. Writes still reach it, and it is gone when
    /// nothing refers to it any more.
    ///
    /// # Errors
    ///
    /// `InvalidArgument` for an object in a store, which has no file.
    fn unname(&self) -> Result<File>;

    /// Gives up an object that was neither finished nor discarded, so that it never counts as complete.
    fn abandon(&self);

    /// The number of bytes that are stored so far.
    fn stored_size(&self) -> Result<u64>;

    /// Sets the number of stored bytes. Bytes that were never written are zero.
    fn set_size(&self, size: u64) -> Result<()>;
}

impl ReadAt for StoredFile {
    fn size(&self) -> u64 {
        Self::size(self)
    }

    fn read_exact_at(&self, buf: &mut [u8], offset: u64, _interrupt: &mut Interrupt<'_>) -> Result<()> {
        // Behind the end of an object in an archive there are other bytes.
        let is_inside = offset.checked_add(buf.len() as u64).is_some_and(|end| end <= self.size());
        let read =
            if is_inside { Self::read_exact_at(self, buf, offset) } else { Err(ErrorKind::UnexpectedEof.into()) };
        read.map_err(|error| match error.kind() {
            ErrorKind::UnexpectedEof => Error::corrupt("became shorter while it was read"),
            _ => Error::io("cannot be read", error),
        })
    }

    fn next_data(&self, from: u64) -> u64 {
        Self::next_data(self, from)
    }

    fn set_uncached(&self, uncached: bool) {
        Self::set_uncached(self, uncached);
    }

    fn drop_rest(&self) {
        Self::drop_rest(self);
    }

    fn clone_range(&self, range: Range<u64>, target: &File, offset: u64) -> bool {
        Self::clone_range(self, range, target, offset)
    }
}

impl WriteAt for StoredFile {
    fn write_runs_at(&self, runs: &[&[u8]], offset: u64, _interrupt: &mut Interrupt<'_>) -> Result<()> {
        self.write_runs(runs, offset).map_err(|error| Error::io("cannot be written", error))
    }

    fn set_uncached(&self, uncached: bool) {
        Self::set_uncached(self, uncached);
    }

    fn is_sparse(&self) -> bool {
        true
    }
}
