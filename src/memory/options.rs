//! Options, progress and result of a dump.

use std::ops::Range;
use std::time::Duration;

use super::source::GuestMemorySource;
use crate::zeros::PAGE_BYTES;

/// The default chunk size. A random read decrypts whole chunks, and larger ones are hardly faster.
const CHUNK_SIZE_BYTES: usize = 16 << 10;

/// The default block size, the smallest that an LZ4 frame allows.
const BLOCK_SIZE_BYTES: usize = 64 << 10;

/// A guest region to dump.
pub struct GuestRegion<'a> {
    pub(super) guest_base: u64,
    pub(super) source: Box<dyn GuestMemorySource + 'a>,
}

impl<'a> GuestRegion<'a> {
    /// Stores all of `source` as the memory at the guest-physical address `guest_base`.
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

/// The shortest gap doubles each time this many ranges were found. The list of ranges of a large and scattered guest
/// then stays at some tens of MiB.
const RANGES_PER_GAP_DOUBLING: usize = 1 << 16;

impl MemoryOptions {
    /// Returns the shortest gap that is left out after so many ranges were found.
    pub(super) fn min_gap(&self, ranges: usize) -> u64 {
        self.min_gap_bytes.saturating_mul(1 << (ranges / RANGES_PER_GAP_DOUBLING).min(20))
    }

    /// Returns the defaults: not compressed, chunks of 16 KiB, zeros left out.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets whether the memory is compressed with LZ4. Off by default.
    #[must_use]
    pub fn compress(mut self, compress: bool) -> Self {
        self.compress = compress;
        self
    }

    /// Sets the number of plaintext bytes in an LZ4 block: 64 KiB (the default), 256 KiB, 1 MiB or 4 MiB.
    #[must_use]
    pub fn block_size_bytes(mut self, block_size_bytes: usize) -> Self {
        self.block_size_bytes = block_size_bytes;
        self
    }

    /// Sets the number of plaintext bytes in a chunk, with the limits of
    /// [`raw_fragment_with_chunk_size`](crate::SnapshotWriter::raw_fragment_with_chunk_size). 16 KiB by default.
    #[must_use]
    pub fn chunk_size_bytes(mut self, chunk_size_bytes: usize) -> Self {
        self.chunk_size_bytes = chunk_size_bytes;
        self
    }

    /// Sets whether pages that were written but contain only zeros are left out, like holes. On by default.
    #[must_use]
    pub fn detect_zeros(mut self, detect_zeros: bool) -> Self {
        self.detect_zeros = detect_zeros;
        self
    }

    /// Sets the shortest gap between data that is left out. Shorter gaps are stored as zeros. 4096 bytes by default.
    #[must_use]
    pub fn min_gap_bytes(mut self, min_gap_bytes: u64) -> Self {
        self.min_gap_bytes = min_gap_bytes;
        self
    }

    /// Sets whether the holes that the source reports are skipped. On by default. If it is off, everything is read, for
    /// file systems whose reports are not reliable.
    #[must_use]
    pub fn sparse(mut self, sparse: bool) -> Self {
        self.sparse = sparse;
        self
    }

    /// Sets whether the stored bytes bypass the page cache. A dump of tens of GiB then does not displace other pages,
    /// and runs at the speed of the disk. Off by default. It does not require alignment, and has no effect where the
    /// page cache is the storage, as on tmpfs. For the file that memory is read from, see
    /// [`FileMemory::uncached`](crate::FileMemory::uncached).
    #[must_use]
    pub fn uncached(mut self, uncached: bool) -> Self {
        self.uncached = uncached;
        self
    }

    /// Sets whether a page that cannot be read is stored as zeros and listed in the report. Off by default: such a page
    /// is an error.
    #[must_use]
    pub fn zero_unreadable(mut self, zero_unreadable: bool) -> Self {
        self.zero_unreadable = zero_unreadable;
        self
    }
}

/// The result of a dump.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct MemoryReport {
    /// Total size of all regions.
    pub logical_bytes: u64,
    /// Total length of all data ranges.
    pub data_bytes: u64,
    /// Total size of the files of the two fragments.
    pub stored_bytes: u64,
    /// Number of data ranges.
    pub ranges: usize,
    /// Guest-physical addresses that could not be read and were stored as zeros.
    pub unreadable: Vec<Range<u64>>,
    /// Duration of the dump.
    pub duration: Duration,
}

/// Progress of a dump or a restore.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemoryProgress {
    /// Bytes of guest memory that are done.
    pub done_bytes: u64,
    /// Bytes of guest memory in total.
    pub total_bytes: u64,
}
