//! What is asked of a dump, and what it tells.

use std::ops::Range;
use std::time::Duration;

use super::source::GuestMemorySource;
use super::zeros::PAGE_BYTES;

/// Bytes that are decrypted together: a random read has to decrypt all of them, and larger ones are hardly faster.
const CHUNK_SIZE_BYTES: usize = 16 << 10;

/// Bytes that are compressed together: the least that a frame of LZ4 has.
const BLOCK_SIZE_BYTES: usize = 64 << 10;

/// A guest region to be stored.
pub struct GuestRegion<'a> {
    pub(super) guest_base: u64,
    pub(super) source: Box<dyn GuestMemorySource + 'a>,
}

impl<'a> GuestRegion<'a> {
    /// All of `source`, at the guest-physical address `guest_base`.
    pub fn new(guest_base: u64, source: impl GuestMemorySource + 'a) -> Self {
        Self { guest_base, source: Box::new(source) }
    }
}

impl std::fmt::Debug for GuestRegion<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GuestRegion")
            .field("guest_base", &self.guest_base)
            .field("size", &self.source.size())
            .finish_non_exhaustive()
    }
}

/// How guest memory is stored.
#[derive(Clone, Debug)]
#[expect(clippy::struct_excessive_bools, reason = "each is a choice of its own")]
pub struct MemoryOptions {
    pub(super) compress: bool,
    pub(super) block_size_bytes: usize,
    pub(super) chunk_size_bytes: usize,
    pub(super) detect_zeros: bool,
    pub(super) min_gap_bytes: u64,
    pub(super) zero_unreadable: bool,
    pub(super) sparse: bool,
    pub(super) uncached: bool,
}

impl Default for MemoryOptions {
    fn default() -> Self {
        Self {
            compress: false,
            block_size_bytes: BLOCK_SIZE_BYTES,
            chunk_size_bytes: CHUNK_SIZE_BYTES,
            detect_zeros: true,
            min_gap_bytes: PAGE_BYTES as u64,
            zero_unreadable: false,
            sparse: true,
            uncached: false,
        }
    }
}

impl MemoryOptions {
    /// Not compressed, in chunks of 16 KiB, without what is zero.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Whether it is compressed with LZ4.
    #[must_use]
    pub fn compress(mut self, compress: bool) -> Self {
        self.compress = compress;
        self
    }

    /// Bytes that are compressed together: 64 KiB (by default), 256 KiB, 1 MiB or 4 MiB.
    #[must_use]
    pub fn block_size_bytes(mut self, block_size_bytes: usize) -> Self {
        self.block_size_bytes = block_size_bytes;
        self
    }

    /// Bytes that are encrypted together, as for [`raw_fragment_with_chunk_size`](crate::SnapshotWriter::raw_fragment_with_chunk_size);
    /// 16 KiB by default.
    #[must_use]
    pub fn chunk_size_bytes(mut self, chunk_size_bytes: usize) -> Self {
        self.chunk_size_bytes = chunk_size_bytes;
        self
    }

    /// Whether pages that were touched and are zero are left out, as holes are; they are by default.
    #[must_use]
    pub fn detect_zeros(mut self, detect_zeros: bool) -> Self {
        self.detect_zeros = detect_zeros;
        self
    }

    /// Shorter gaps between data are stored as zeros; 4096 bytes by default.
    #[must_use]
    pub fn min_gap_bytes(mut self, min_gap_bytes: u64) -> Self {
        self.min_gap_bytes = min_gap_bytes;
        self
    }

    /// Whether holes are taken from what the source says of them; they are by default. Without, all of it is read: for file
    /// systems whose answers are not to be trusted.
    #[must_use]
    pub fn sparse(mut self, sparse: bool) -> Self {
        self.sparse = sparse;
        self
    }

    /// Whether the stored bytes go past the page cache: a dump of tens of GiB then pushes nothing else out of it, and runs at
    /// the speed of the disk. Off by default. It needs no alignment, and does nothing where the page cache is the storage, as on
    /// tmpfs. The file that memory is read from has [`FileMemory::uncached`](crate::FileMemory::uncached).
    #[must_use]
    pub fn uncached(mut self, uncached: bool) -> Self {
        self.uncached = uncached;
        self
    }

    /// Whether pages that cannot be read are taken for zeros, and told in the report, instead of being an error.
    #[must_use]
    pub fn zero_unreadable(mut self, zero_unreadable: bool) -> Self {
        self.zero_unreadable = zero_unreadable;
        self
    }
}

/// How a dump went.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct MemoryReport {
    /// Bytes of all regions.
    pub logical_bytes: u64,
    /// Bytes of all data ranges.
    pub data_bytes: u64,
    /// Bytes of the two fragments' files.
    pub stored_bytes: u64,
    /// Data ranges.
    pub ranges: usize,
    /// Guest-physical addresses of what could not be read and was taken for zeros.
    pub unreadable: Vec<Range<u64>>,
    /// How long it took.
    pub duration: Duration,
}

/// How far a dump or a restore is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryProgress {
    /// Bytes of guest memory that are done.
    pub done_bytes: u64,
    /// Bytes there are.
    pub total_bytes: u64,
}
