//! Guest memory out of a snapshot: all of it into buffers and files, or some of it at random.

use std::fmt;
use std::fs::File;
use std::ops::Range;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{self, FallocateFlags, SeekFrom};
use rustix::io::Errno;

use super::data::{Data, Strip};
use super::dump::MemoryProgress;
use super::layout::{Layout, MEMORY, METADATA, Metadata, Region};
use super::pages::{Backing, make_zero, populate};
use crate::error::{Error, Result};
use crate::reader::SnapshotReader;
use crate::threads::{Poll, for_each};

/// What one thread restores at a time: little of it is decrypted or decompressed twice, by the neighbour too.
const SLICE_BYTES: usize = 4 << 20;

/// Fewer bytes are faulted in as fast.
const POPULATE_BYTES: usize = 16 << 10;

/// Of a slice with more holes, all pages are given back at once.
const MAX_HOLES: usize = 32;

/// Smaller reads are of whoever looks here and there.
const SMALL_BYTES: usize = 256 << 10;

/// The guest memory in a snapshot, vmsnap's or crosvm's.
///
/// It may be read by many threads at once.
///
/// ```
/// # let folder = tempfile::tempdir()?;
/// # let path = folder.path().join("vm1");
/// use vmsnap::{GuestDestination, GuestRegion, MemoryOptions, SnapshotOptions};
///
/// let options = SnapshotOptions::new();
/// let mut ram = vec![0; 1 << 20];
/// ram[0x1000..0x1004].copy_from_slice(b"boot");
/// options.create(&path)?.write_memory(&[GuestRegion::new(0, &ram)], &MemoryOptions::new())?;
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
    layout: Layout,
    data: Data,
    compressed: bool,
    threads: usize,
    place: String,
}

/// Where a guest region is restored to.
pub struct GuestDestination<'a> {
    guest_base: Option<u64>,
    kind: Kind<'a>,
}

enum Kind<'a> {
    Nowhere,
    Buffer(&'a mut [u8]),
    File { file: File, offset: Option<u64> },
}

impl<'a> GuestDestination<'a> {
    /// A buffer of the region's size. Where it is anonymous or shared memory, holes are given back to the system.
    pub fn buffer(buffer: &'a mut [u8]) -> Self {
        Self { guest_base: None, kind: Kind::Buffer(buffer) }
    }

    /// A file or memfd of the region's size, or an empty one, which gets it; or, from `offset` on, a part of one, which is
    /// extended if need be. Holes are punched.
    ///
    /// # Errors
    ///
    /// [`Error::is_io`] where there can be no other descriptor of it.
    pub fn file(file: impl AsFd, offset: Option<u64>) -> Result<Self> {
        let file = file.as_fd().try_clone_to_owned().map_err(|error| Error::io("no descriptor", error))?.into();
        Ok(Self { guest_base: None, kind: Kind::File { file, offset } })
    }

    /// Nowhere: the region is left out.
    #[must_use]
    pub fn nowhere() -> Self {
        Self { guest_base: None, kind: Kind::Nowhere }
    }

    /// The guest-physical address that the region is to have.
    #[must_use]
    pub fn at(mut self, guest_base: u64) -> Self {
        self.guest_base = Some(guest_base);
        self
    }
}

impl fmt::Debug for GuestDestination<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.kind {
            Kind::Nowhere => "nowhere",
            Kind::Buffer(_) => "buffer",
            Kind::File { .. } => "file",
        };
        f.debug_struct("GuestDestination")
            .field("guest_base", &self.guest_base)
            .field("kind", &kind)
            .finish_non_exhaustive()
    }
}

impl SnapshotReader {
    /// The guest memory that [`crate::SnapshotWriter::write_memory`], or crosvm, wrote into this namespace.
    ///
    /// # Errors
    ///
    /// [`Error::is_io`] where there is none, [`Error::is_corrupt`] where its regions and ranges contradict each other or do not
    /// fit the data; [`Error::is_authentication`] where it is not what was written.
    pub fn memory(&self) -> Result<GuestMemory> {
        let metadata = Metadata::read(self)?;
        let layout = metadata.check();
        let layout = layout.map_err(|error| error.context(self.place(METADATA).unwrap_or_default()))?;
        let place = self.place(MEMORY)?;
        let Metadata { compressed, lz4, .. } = metadata;
        let data = Data::open(self.raw_fragment(MEMORY)?, &layout, compressed, lz4);
        let data = data.map_err(|error| error.context(&place))?;
        Ok(GuestMemory { layout, data, compressed, threads: self.threads(), place })
    }
}

impl GuestMemory {
    /// Guest-physical addresses of the regions, in the order in which they are stored.
    #[must_use]
    pub fn regions(&self) -> Vec<Range<u64>> {
        self.layout.regions.iter().map(|region| region.guest_base..region.end()).collect()
    }

    /// The data ranges of a region, in bytes from its start; between them it is zero.
    ///
    /// # Panics
    ///
    /// Where there is no such region.
    #[must_use]
    pub fn data_ranges(&self, region: usize) -> Vec<Range<u64>> {
        self.layout.regions[region].ranges.iter().map(|range| range.start..range.end).collect()
    }

    /// Bytes of all data ranges.
    #[must_use]
    pub fn data_bytes(&self) -> u64 {
        self.layout.data_bytes
    }

    /// Whether it is compressed.
    #[must_use]
    pub fn is_compressed(&self) -> bool {
        self.compressed
    }

    /// Fills `buf` with the memory at a guest-physical address, all of which lies in one region.
    ///
    /// # Errors
    ///
    /// [`Error::is_invalid_argument`] where there is no such memory; [`Error::is_authentication`] and [`Error::is_corrupt`] where
    /// it is not what was written; `buf` is all zeros then.
    pub fn read_at(&self, guest_address: u64, buf: &mut [u8]) -> Result<()> {
        self.read_at_polled(guest_address, buf, &mut || Ok(()))
    }

    pub(crate) fn read_at_polled(
        &self,
        guest_address: u64,
        buf: &mut [u8],
        poll: &mut dyn FnMut() -> Result<()>,
    ) -> Result<()> {
        let (region, offset) = self.find(guest_address, buf.len() as u64)?;
        let result = if buf.len() <= SMALL_BYTES {
            self.read_here_and_there(region, offset, buf)
        } else {
            let count = buf.len().div_ceil(SLICE_BYTES);
            let slices =
                buf.chunks_mut(SLICE_BYTES).zip((0..count as u64).map(|number| offset + number * SLICE_BYTES as u64));
            let slices: Vec<_> = slices.map(|(part, start)| (start, Target::Buffer(part, Backing::Other))).collect();
            let mut workers: Vec<_> = (0..self.threads.min(count)).map(|_| Strip::default()).collect();
            for_each(&mut workers, slices.into_iter(), &mut Poll::new(poll), |strip, (start, target)| {
                self.restore_slice(strip, region, start, target)
            })
        };
        result.map_err(|error| {
            buf.fill(0);
            error.context(&self.place)
        })
    }

    /// Whether there is such memory, before room is made for it.
    #[cfg(feature = "python")]
    pub(crate) fn check_address(&self, guest_address: u64, size: u64) -> Result<()> {
        self.find(guest_address, size).map(drop)
    }

    /// The region of an address, and the offset in it.
    fn find(&self, guest_address: u64, size: u64) -> Result<(&Region, u64)> {
        let region = self.layout.regions.iter().find(|region| {
            guest_address
                .checked_sub(region.guest_base)
                .is_some_and(|offset| offset < region.size || size == 0 && offset == region.size)
        });
        match region {
            Some(region) if region.end() - guest_address >= size => Ok((region, guest_address - region.guest_base)),
            Some(region) => Err(Error::invalid_argument(format!(
                "{size} bytes from guest-physical address {guest_address:#x} go beyond their region, which ends at {:#x}",
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
                let text =
                    format!("no memory at guest-physical address {guest_address:#x}: there is {}", all.join(", "));
                Err(Error::invalid_argument(text))
            }
        }
    }

    fn read_here_and_there(&self, region: &Region, offset: u64, buf: &mut [u8]) -> Result<()> {
        let end = offset + buf.len() as u64;
        buf.fill(0);
        for range in ranges_in(region, offset, end) {
            let (from, to) = (range.start.max(offset), range.end.min(end));
            let place = usize::try_from(from - offset).unwrap_or(usize::MAX)
                ..usize::try_from(to - offset).unwrap_or(usize::MAX);
            self.data.read_small(range.data + (from - range.start), &mut buf[place])?;
        }
        Ok(())
    }

    /// Restores all regions, each to its destination, by all threads.
    ///
    /// # Errors
    ///
    /// [`Error::is_invalid_argument`] where the destinations are not those of the regions; nothing was written then. After any
    /// other error the destinations hold anything: [`Error::is_authentication`], [`Error::is_corrupt`], [`Error::is_io`].
    pub fn restore(&self, destinations: &mut [GuestDestination<'_>]) -> Result<()> {
        self.restore_polled(destinations, &mut |_| Ok(()))
    }

    /// The same, and asks `progress` from time to time (not more often than every 50 ms), and at the end, whether to go on.
    ///
    /// # Errors
    ///
    /// As there, and what `progress` returns.
    pub fn restore_polled(
        &self,
        destinations: &mut [GuestDestination<'_>],
        progress: &mut dyn FnMut(MemoryProgress) -> Result<()>,
    ) -> Result<()> {
        self.check(destinations)?;
        let chosen = self.layout.regions.iter().zip(&*destinations);
        let chosen = chosen.filter(|(_, destination)| !matches!(destination.kind, Kind::Nowhere));
        let total_bytes = chosen.map(|(region, _)| region.size).sum();
        let mut slices = Vec::new();
        for (region, destination) in self.layout.regions.iter().zip(destinations) {
            match &mut destination.kind {
                Kind::Nowhere => {}
                Kind::Buffer(buffer) => {
                    let backing = Backing::of(buffer);
                    for (number, part) in buffer.chunks_mut(SLICE_BYTES).enumerate() {
                        slices.push((region, (number * SLICE_BYTES) as u64, Target::Buffer(part, backing)));
                    }
                }
                Kind::File { file, offset } => {
                    let offset = offset.unwrap_or(0);
                    make_zero_and_long_enough(file, offset, region.size)?;
                    slices.extend(slices_with_data(region).map(|start| (region, start, Target::File(file, offset))));
                }
            }
        }
        let done = AtomicU64::new(0);
        let mut poll =
            || progress(MemoryProgress { done_bytes: done.load(Ordering::Relaxed).min(total_bytes), total_bytes });
        let mut workers: Vec<_> = (0..self.threads.min(slices.len())).map(|_| Strip::default()).collect();
        for_each(&mut workers, slices.into_iter(), &mut Poll::new(&mut poll), |strip, (region, start, target)| {
            self.restore_slice(strip, region, start, target).map_err(|error| error.context(&self.place))?;
            done.fetch_add(SLICE_BYTES as u64, Ordering::Relaxed);
            Ok(())
        })?;
        progress(MemoryProgress { done_bytes: total_bytes, total_bytes })
    }

    /// Everything that can be wrong with destinations, before the first byte is written.
    fn check(&self, destinations: &[GuestDestination<'_>]) -> Result<()> {
        let regions = &self.layout.regions;
        if regions.len() != destinations.len() {
            // In crosvm's words.
            return Err(Error::invalid_argument(format!(
                "snapshot expected {} memory regions but there are {} destinations",
                regions.len(),
                destinations.len()
            )));
        }
        // Device, inode and range of each file.
        let mut taken: Vec<(u64, u64, Range<u64>)> = Vec::new();
        for (number, (region, destination)) in regions.iter().zip(destinations).enumerate() {
            let refuse =
                |text: String| Err(Error::invalid_argument(format!("the destination of region {number} {text}")));
            if let Some(base) = destination.guest_base
                && base != region.guest_base
            {
                return refuse(format!("is at {base:#x}, and the region at {:#x}", region.guest_base));
            }
            match &destination.kind {
                Kind::Buffer(buffer) if buffer.len() as u64 != region.size => {
                    return refuse(format!("has {} bytes, and the region {}", buffer.len(), region.size));
                }
                Kind::Nowhere | Kind::Buffer(_) => {}
                Kind::File { file, offset } => {
                    let (length, kind) = examine(file)?;
                    if kind != fs::FileType::RegularFile && kind != fs::FileType::BlockDevice {
                        return refuse("is no file, memfd or block device".to_owned());
                    }
                    let fits = match offset {
                        None => length == region.size || (length == 0 && kind == fs::FileType::RegularFile),
                        Some(offset) => match offset.checked_add(region.size) {
                            Some(end) => kind == fs::FileType::RegularFile || end <= length,
                            None => false,
                        },
                    };
                    if !fits {
                        return refuse(format!("has {length} bytes, and the region {}", region.size));
                    }
                    if !is_writable(file) {
                        return refuse("is not open for writing".to_owned());
                    }
                    let stat =
                        fs::fstat(file).map_err(|errno| Error::io("the destination cannot be examined", errno))?;
                    let start = offset.unwrap_or(0);
                    let end = start + region.size;
                    if taken.iter().any(|(device, inode, range)| {
                        (*device, *inode) == (stat.st_dev, stat.st_ino) && range.start < end && start < range.end
                    }) {
                        return refuse("is in a part of a file that another region is restored to".to_owned());
                    }
                    taken.push((stat.st_dev, stat.st_ino, start..end));
                }
            }
        }
        Ok(())
    }

    /// What lies from `start` of a region on, as far as the target goes.
    fn restore_slice(&self, strip: &mut Strip, region: &Region, start: u64, mut target: Target<'_>) -> Result<()> {
        let end = match &target {
            Target::Buffer(part, _) => start + part.len() as u64,
            Target::File(..) => region.size.min(start + SLICE_BYTES as u64),
        };
        let ranges = ranges_in(region, start, end);
        if ranges.len() > MAX_HOLES {
            target.zero(start, start..end);
        } else {
            let mut at = start;
            for range in ranges {
                target.zero(start, at..range.start.max(start));
                at = range.end.min(end);
            }
            target.zero(start, at..end);
        }
        let [first, ..] = ranges else { return Ok(()) };
        let last = &ranges[ranges.len() - 1];
        // All data of a slice lies together.
        let from = first.data + (first.start.max(start) - first.start);
        let to = last.data + (last.end.min(end) - last.start);
        let mut ranges = ranges.iter().map(|range| range.start.max(start)..range.end.min(end));
        let mut current = start..start;
        self.data.read(strip, from, to, |mut data| {
            while !data.is_empty() {
                if current.is_empty() {
                    current = ranges.next().unwrap_or_default();
                }
                let left = usize::try_from(current.end - current.start).unwrap_or(usize::MAX);
                let (now, later) = data.split_at(left.min(data.len()));
                target.write(start, current.start, now)?;
                current.start += now.len() as u64;
                data = later;
            }
            Ok(())
        })
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

/// The stored ranges of which something lies between two offsets of a region.
fn ranges_in(region: &Region, start: u64, end: u64) -> &[super::layout::StoredRange] {
    let first = region.ranges.partition_point(|range| range.end <= start);
    let last = region.ranges.partition_point(|range| range.start < end);
    region.ranges.get(first..last).unwrap_or_default()
}

/// Where a slice of a region goes.
enum Target<'a> {
    Buffer(&'a mut [u8], Backing),
    /// The file, which is zero where nothing was written, and where in it the region begins.
    File(&'a File, u64),
}

impl Target<'_> {
    /// Writes data to `at` of the region, of which the slice begins at `start`.
    fn write(&mut self, start: u64, at: u64, data: &[u8]) -> Result<()> {
        match self {
            Self::Buffer(part, _) => {
                let from = usize::try_from(at - start).unwrap_or(usize::MAX);
                let place = &mut part[from..from + data.len()];
                if data.len() >= POPULATE_BYTES {
                    populate(place);
                }
                place.copy_from_slice(data);
                Ok(())
            }
            Self::File(file, offset) => file.write_all_at(data, *offset + at).map_err(not_written),
        }
    }

    /// Makes a part of the region zero, where it is not yet.
    fn zero(&mut self, start: u64, range: Range<u64>) {
        if let Self::Buffer(part, backing) = self {
            let at = |offset: u64| usize::try_from(offset - start).unwrap_or(usize::MAX);
            make_zero(&mut part[at(range.start)..at(range.end)], *backing);
        }
    }
}

fn not_written(error: std::io::Error) -> Error {
    Error::io("the destination cannot be written", error)
}

fn examine(file: &File) -> Result<(u64, fs::FileType)> {
    let failed = |errno| Error::io("the destination cannot be examined", errno);
    let stat = fs::fstat(file).map_err(failed)?;
    let kind = fs::FileType::from_raw_mode(stat.st_mode);
    let length = match kind {
        fs::FileType::BlockDevice => fs::seek(file, SeekFrom::End(0)).map_err(failed)?,
        _ => u64::try_from(stat.st_size).unwrap_or(0),
    };
    Ok((length, kind))
}

fn is_writable(file: &File) -> bool {
    fs::fcntl_getfl(file).is_ok_and(|flags| !(flags & fs::OFlags::RWMODE).is_empty())
}

/// Where slices of a region begin in which there is data.
fn slices_with_data(region: &Region) -> impl Iterator<Item = u64> + '_ {
    let mut next = 0;
    region.ranges.iter().flat_map(move |range| {
        let first = (range.start / SLICE_BYTES as u64 * SLICE_BYTES as u64).max(next);
        next = range.end.next_multiple_of(SLICE_BYTES as u64).max(next);
        (first..next).step_by(SLICE_BYTES)
    })
}

/// Extends a file where it is too short, and makes a hole of the part where the region goes.
fn make_zero_and_long_enough(file: &File, offset: u64, size: u64) -> Result<()> {
    let (length, kind) = examine(file)?;
    if kind == fs::FileType::RegularFile && length < offset + size {
        file.set_len(offset + size).map_err(not_written)?;
    }
    let used = if kind == fs::FileType::RegularFile { length.min(offset + size) } else { offset + size };
    if offset < used { punch(file, offset, used) } else { Ok(()) }
}

/// Makes a part of a file zero, as a hole where that can be.
fn punch(file: &File, mut start: u64, end: u64) -> Result<()> {
    match fs::fallocate(file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, start, end - start) {
        Ok(()) => return Ok(()),
        Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::PERM | Errno::INVAL) => {}
        Err(errno) => return Err(not_written(errno.into())),
    }
    let zeros = vec![0; 64 << 10];
    while start < end {
        let length = usize::try_from(end - start).map_or(zeros.len(), |rest| rest.min(zeros.len()));
        file.write_all_at(&zeros[..length], start).map_err(not_written)?;
        start += length as u64;
    }
    Ok(())
}
