//! Stored bytes, read and written at offsets: the ciphertext of an encrypted fragment, or a plain fragment itself.

use crate::error::Result;
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

    /// Asks that reads leave no page of the object in the page cache, if it has one.
    fn set_uncached(&self, _uncached: bool) {}

    /// Drops the pages that uncached reads left in the page cache.
    fn drop_rest(&self) {}
}

/// Bytes that are being stored, at any offset and by any thread.
///
/// Ranges never overlap. When the object is finished, they cover it without a gap.
pub(crate) trait WriteAt: Send + Sync {
    /// Writes all of `runs`, one after the other, from `offset` on.
    fn write_runs_at(&self, runs: &[&[u8]], offset: u64, interrupt: &mut Interrupt<'_>) -> Result<()>;

    /// Writes all of `data` to `offset`.
    fn write_all_at(&self, data: &[u8], offset: u64, interrupt: &mut Interrupt<'_>) -> Result<()> {
        if data.is_empty() { Ok(()) } else { self.write_runs_at(&[data], offset, interrupt) }
    }

    /// Asks that writes leave no page of the object in the page cache, if it has one.
    fn set_uncached(&self, _uncached: bool) {}
}

/// A fragment that is being written.
///
/// Until [`NewObject::finish`], the snapshot cannot be committed.
pub(crate) trait NewObject: WriteAt {
    /// Completes the object: from now on a commit accepts it.
    fn finish(&self, interrupt: &mut Interrupt<'_>) -> Result<()>;

    /// Removes the object. It may be called again.
    fn discard(&self) -> Result<()>;

    /// Gives the object up, so that a commit fails.
    fn abandon(&self);

    /// The number of bytes that are stored so far.
    fn stored_size(&self) -> Result<u64>;
}
