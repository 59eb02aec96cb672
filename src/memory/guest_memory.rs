//! [`GuestMemory`]: the guest memory of a snapshot, its regions and random access to it.

use std::fmt;
use std::ops::Range;

use super::data::{Data, ReadBuffers};
use super::metadata::{Layout, MEMORY, METADATA, Metadata, Region, StoredRange};
use crate::error::{Error, Result};
use crate::snapshot::SnapshotReader;
use crate::threads::Interrupt;

/// Reads of at most this size go through the cache of blocks, because they come from random access.
const MAX_CACHED_READ_BYTES: usize = 256 << 10;

/// The guest memory of a snapshot that vmsnap or crosvm wrote.
///
/// Many threads may read it at once.
///
/// ```
/// # let directory = tempfile::tempdir()?;
/// # let path = directory.path().join("vm1");
/// use vmsnap::{GuestDestination, GuestRegion, MemoryOptions, SnapshotOptions};
///
/// let options = SnapshotOptions::new();
/// let mut ram = vec![0; 1 << 20];
/// ram[0x1000..0x1004].copy_from_slice(b"boot");
/// options.create_in_place(&path)?.write_memory(&[GuestRegion::new(0, &ram)], &MemoryOptions::new())?;
///
/// let memory = options.open(&path)?.memory()?;
/// let mut word = [0; 4];
/// memory.read_at(0x1000, &mut word)?;
/// assert_eq!(&word, b"boot");
/// assert_eq!(memory.data_ranges(0), [0x1000..0x2000]);
/// let mut back = vec![0; 1 << 20];
/// memory.restore(&mut [GuestDestination::buffer(&mut back)])?;
/// assert_eq!(back, ram);
/// # Ok::<(), vmsnap::Error>(())
/// ```
pub struct GuestMemory {
    pub(super) layout: Layout,
    pub(super) data: Data,
    compressed: bool,
    pub(super) threads: usize,
    pub(super) place: String,
}

impl SnapshotReader {
    /// Returns the guest memory that [`crate::SnapshotWriter::write_memory`] or crosvm wrote to this namespace.
    ///
    /// # Errors
    ///
    /// [`Error::is_io`] if the namespace contains no guest memory. [`Error::is_corrupt`] if its regions and ranges
    /// contradict each other or do not fit the data. [`Error::is_authentication`] if the stored bytes were changed.
    pub fn memory(&self) -> Result<GuestMemory> {
        self.memory_interruptible(&mut || Ok(()))
    }

    /// Returns the guest memory as [`SnapshotReader::memory`] does, and calls `interrupt` while that takes time.
    pub(crate) fn memory_interruptible(&self, interrupt: &mut dyn FnMut() -> Result<()>) -> Result<GuestMemory> {
        // In an object store, both fragments are asked for at once.
        let begun = self.begin(MEMORY);
        let metadata = Metadata::read(self, interrupt).map_err(|error| self.without_memory(error))?;
        let layout = metadata.check();
        let layout = layout.map_err(|error| error.context(self.place(METADATA).unwrap_or_default()))?;
        let place = self.place(MEMORY)?;
        let Metadata { compressed, lz4, .. } = metadata;
        let fragment = self.raw_fragment_interruptible(MEMORY, interrupt)?;
        let data = Data::open(fragment, &layout, compressed, lz4, &mut Interrupt::new(interrupt));
        drop(begun);
        let data = data.map_err(|error| error.context(&place))?;
        Ok(GuestMemory { layout, data, compressed, threads: self.threads(), place })
    }

    /// Returns an error that says that there is no guest memory, if that is the cause of `error`.
    fn without_memory(&self, error: Error) -> Error {
        // If the fragment is listed but missing, the snapshot is damaged.
        let is_listed = || self.list_fragments().is_ok_and(|names| names.iter().any(|name| name == METADATA));
        if !error.is_not_found() || is_listed() {
            return error;
        }
        let place = match self.namespace_path() {
            "" => self.location().display().to_string(),
            namespace => format!("the namespace {namespace:?} of {}", self.location().display()),
        };
        let text = format!("{place} contains no guest memory, because it has no fragment {METADATA:?}");
        Error::io(text, rustix::io::Errno::NOENT)
    }
}

impl GuestMemory {
    /// Returns the guest-physical addresses of the regions, in the order in which they are stored.
    #[must_use]
    pub fn regions(&self) -> Vec<Range<u64>> {
        self.layout.regions.iter().map(|region| region.guest_base..region.end()).collect()
    }

    /// Returns the data ranges of a region, in bytes from its start. Everything between two ranges is zero.
    ///
    /// # Panics
    ///
    /// If `region` is not the number of a region.
    #[must_use]
    pub fn data_ranges(&self, region: usize) -> Vec<Range<u64>> {
        self.layout.regions[region].ranges.iter().map(|range| range.start..range.end).collect()
    }

    /// Returns the total length of all data ranges.
    #[must_use]
    pub fn data_bytes(&self) -> u64 {
        self.layout.data_bytes
    }

    /// Returns whether the memory is compressed.
    #[must_use]
    pub fn is_compressed(&self) -> bool {
        self.compressed
    }

    /// Fills `buf` with the memory at a guest-physical address. All of it must be in one region.
    ///
    /// # Errors
    ///
    /// [`Error::is_invalid_argument`] if the addresses are not in one region. [`Error::is_authentication`] or
    /// [`Error::is_corrupt`] if the stored bytes were changed. `buf` is zeroed then.
    pub fn read_at(&self, guest_address: u64, buf: &mut [u8]) -> Result<()> {
        self.read_at_interruptible(guest_address, buf, &mut || Ok(()))
    }

    pub(crate) fn read_at_interruptible(
        &self,
        guest_address: u64,
        buf: &mut [u8],
        interrupt: &mut dyn FnMut() -> Result<()>,
    ) -> Result<()> {
        let (region, offset) = self.find(guest_address, buf.len() as u64)?;
        let result = if buf.len() <= MAX_CACHED_READ_BYTES {
            self.read_here_and_there(region, offset, buf, &mut Interrupt::new(interrupt))
        } else {
            self.read_by_all(region, offset, buf, interrupt)
        };
        result.map_err(|error| {
            buf.fill(0);
            error.context(&self.place)
        })
    }

    /// Checks that the addresses are in one region, before a buffer is allocated.
    #[cfg(feature = "python")]
    pub(crate) fn check_address(&self, guest_address: u64, size: u64) -> Result<()> {
        self.find(guest_address, size).map(drop)
    }

    /// Returns the region of an address, and the offset in it.
    fn find(&self, guest_address: u64, size: u64) -> Result<(&Region, u64)> {
        self.locate(guest_address, size).map(|(region, offset)| (&self.layout.regions[region], offset))
    }

    /// Returns the number of the region that has all of the addresses, and their offset in it.
    pub(crate) fn locate(&self, guest_address: u64, size: u64) -> Result<(usize, u64)> {
        let region = self.layout.regions.iter().enumerate().find(|(_, region)| {
            guest_address
                .checked_sub(region.guest_base)
                .is_some_and(|offset| offset < region.size || size == 0 && offset == region.size)
        });
        match region {
            Some((number, region)) if region.end() - guest_address >= size => {
                Ok((number, guest_address - region.guest_base))
            }
            Some((_, region)) => Err(Error::invalid_argument(format!(
                "{size} bytes from guest-physical address {guest_address:#x} extend past the end of their region \
                 at {:#x}",
                region.end()
            ))),
            None => {
                let all: Vec<_> = self
                    .layout
                    .regions
                    .iter()
                    .take(8)
                    .map(|r| format!("{:#x} to {:#x}", r.guest_base, r.end()))
                    .collect();
                let text = format!(
                    "no memory at guest-physical address {guest_address:#x}: the regions are {}",
                    all.join(", ")
                );
                Err(Error::invalid_argument(text))
            }
        }
    }

    /// Iterates over the parts of data ranges that are in a range of a region.
    pub(crate) fn data_within(&self, region: usize, within: Range<u64>) -> impl Iterator<Item = Range<u64>> + '_ {
        let ranges = ranges_in(&self.layout.regions[region], within.start, within.end);
        ranges.iter().map(move |range| range.start.max(within.start)..range.end.min(within.end))
    }

    /// Fills the slices of `places` one after the other with the data of a region from `start` on, which is the
    /// beginning of a part of [`GuestMemory::data_within`]; gaps between data ranges are skipped.
    pub(crate) fn gather(
        &self,
        buffers: &mut ReadBuffers,
        region: usize,
        start: u64,
        places: &mut [&mut [u8]],
        interrupt: &mut Interrupt<'_>,
    ) -> Result<()> {
        let Some(range) = ranges_in(&self.layout.regions[region], start, start + 1).first() else { return Ok(()) };
        self.data.prefetch(range.data + (start - range.start));
        let data = self.data.scatter(buffers, range.data + (start - range.start), places, interrupt, |_| Ok(()));
        data.map_err(|error| error.context(&self.place))
    }

    fn read_here_and_there(
        &self,
        region: &Region,
        offset: u64,
        buf: &mut [u8],
        interrupt: &mut Interrupt<'_>,
    ) -> Result<()> {
        let end = offset + buf.len() as u64;
        buf.fill(0);
        for range in ranges_in(region, offset, end) {
            let (from, to) = (range.start.max(offset), range.end.min(end));
            let place = usize::try_from(from - offset).unwrap_or(usize::MAX)
                ..usize::try_from(to - offset).unwrap_or(usize::MAX);
            self.data.read_small(range.data + (from - range.start), &mut buf[place], interrupt)?;
        }
        Ok(())
    }
}

impl fmt::Debug for GuestMemory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GuestMemory")
            .field("place", &self.place)
            .field("regions", &self.regions())
            .field("data_bytes", &self.data_bytes())
            .finish_non_exhaustive()
    }
}

/// Returns the stored ranges of a region that intersect the range between two offsets.
pub(super) fn ranges_in(region: &Region, start: u64, end: u64) -> &[StoredRange] {
    let first = region.ranges.partition_point(|range| range.end <= start);
    let last = region.ranges.partition_point(|range| range.start < end);
    region.ranges.get(first..last).unwrap_or_default()
}
