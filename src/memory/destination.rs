//! Destinations of a restore: buffers and files. All are checked before one of them is changed.

use std::collections::HashMap;
use std::fmt;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::Arc;

use rustix::fs::{self, FallocateFlags, OFlags, SeekFrom};
use rustix::io::Errno;

use super::metadata::Region;
use super::own_mappings::{Backing, Mapping, OwnMappings};
use super::pages::{make_zero, want_huge_pages};
use crate::error::{Error, Result};
use crate::stored_file::CacheUse;

/// The destination of one guest region in a restore: a buffer, a file, or nowhere.
pub struct GuestDestination<'a> {
    guest_base: Option<u64>,
    size: Option<u64>,
    huge_pages: bool,
    uncached: bool,
    keep_allocated: bool,
    kind: DestinationKind<'a>,
}

enum DestinationKind<'a> {
    Nowhere,
    Buffer(&'a mut [u8]),
    File { file: BorrowedFd<'a>, offset: Option<u64> },
}

impl<'a> GuestDestination<'a> {
    /// Restores to a buffer, which must be as long as the region. If it is anonymous or shared memory, holes release
    /// their pages to the system.
    pub fn buffer(buffer: &'a mut [u8]) -> Self {
        Self {
            guest_base: None,
            size: None,
            huge_pages: false,
            uncached: false,
            keep_allocated: false,
            kind: DestinationKind::Buffer(buffer),
        }
    }

    /// Restores to a file or memfd. It must be as long as the region, or empty, and is then extended. With an `offset`
    /// the region goes to that part of the file, which is extended if necessary. Holes of the region are punched into
    /// the file.
    ///
    /// A file that is open with `O_APPEND` or `O_DIRECT` is reopened without that flag. A file on hugetlbfs is written
    /// through a mapping.
    pub fn file(file: &'a (impl AsFd + ?Sized), offset: Option<u64>) -> Self {
        Self {
            guest_base: None,
            size: None,
            huge_pages: false,
            uncached: false,
            keep_allocated: false,
            kind: DestinationKind::File { file: file.as_fd(), offset },
        }
    }

    /// Leaves the region out of the restore.
    #[must_use]
    pub fn nowhere() -> Self {
        Self {
            guest_base: None,
            size: None,
            huge_pages: false,
            uncached: false,
            keep_allocated: false,
            kind: DestinationKind::Nowhere,
        }
    }

    /// Requires the region to be at this guest-physical address.
    #[must_use]
    pub fn at(mut self, guest_base: u64) -> Self {
        self.guest_base = Some(guest_base);
        self
    }

    /// Requires the region to have this many bytes.
    #[must_use]
    pub fn of_size(mut self, size: u64) -> Self {
        self.size = Some(size);
        self
    }

    /// Sets whether anonymous memory gets transparent huge pages wherever 2 MiB of it are all data. They are faster to
    /// fill and to use, but memory is then allocated in pages of 2 MiB. Off by default.
    #[must_use]
    pub fn huge_pages(mut self, huge_pages: bool) -> Self {
        self.huge_pages = huge_pages;
        self
    }

    /// Sets whether the region bypasses the page cache, when it is read from the snapshot and when it is written to a
    /// file. A restore of tens of GiB then does not displace other pages. Off by default.
    #[must_use]
    pub fn uncached(mut self, uncached: bool) -> Self {
        self.uncached = uncached;
        self
    }

    /// Sets whether a file that is allocated completely stays so: zeros are written instead of holes, and only where the
    /// file has other bytes. Without it, a virtual machine monitor that has preallocated the file can run out of memory
    /// later. Off by default. It has no effect on a file that is not open for reading and writing.
    #[must_use]
    pub fn keep_allocated(mut self, keep_allocated: bool) -> Self {
        self.keep_allocated = keep_allocated;
        self
    }

    pub(super) fn is_uncached(&self) -> bool {
        self.uncached
    }

    pub(super) fn is_nowhere(&self) -> bool {
        matches!(self.kind, DestinationKind::Nowhere)
    }
}

impl fmt::Debug for GuestDestination<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.kind {
            DestinationKind::Nowhere => "nowhere",
            DestinationKind::Buffer(_) => "buffer",
            DestinationKind::File { .. } => "file",
        };
        f.debug_struct("GuestDestination")
            .field("guest_base", &self.guest_base)
            .field("kind", &kind)
            .finish_non_exhaustive()
    }
}

/// A destination that has passed all checks.
pub(super) enum Prepared<'a> {
    Nowhere,
    Buffer(&'a mut [u8], Backing),
    File(OpenFile<'a>, u64, CacheUse),
    /// A file that is written through a mapping, with its backing for holes.
    Mapped(Mapping, Backing),
}

/// A file to which positioned writes work: the one of the caller, or the same file reopened without `O_APPEND` and
/// `O_DIRECT`.
#[derive(Clone)]
pub(super) enum OpenFile<'a> {
    Given(BorrowedFd<'a>),
    Reopened(Arc<File>),
}

impl AsFd for OpenFile<'_> {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Given(file) => *file,
            Self::Reopened(file) => file.as_fd(),
        }
    }
}

impl OpenFile<'_> {
    pub(super) fn write_all_at(&self, cache: &CacheUse, data: &[u8], offset: u64) -> Result<()> {
        cache.write_runs(self, &[data], offset).map_err(not_written)
    }
}

fn not_written(error: io::Error) -> Error {
    Error::io("the destination cannot be written", error)
}

/// The properties of a file that decide whether a region can be restored to it.
struct Examined {
    identity: (u64, u64),
    length: u64,
    kind: fs::FileType,
    /// Page size in bytes, for a file on hugetlbfs.
    huge_page: Option<u64>,
    allocated_bytes: u64,
}

impl Examined {
    fn of(file: &impl AsFd) -> Result<Self> {
        let failed = |errno| Error::io("the destination cannot be examined", errno);
        let stat = fs::fstat(file).map_err(failed)?;
        let kind = fs::FileType::from_raw_mode(stat.st_mode);
        let length = match kind {
            fs::FileType::BlockDevice => fs::seek(file, SeekFrom::End(0)).map_err(failed)?,
            _ => u64::try_from(stat.st_size).unwrap_or(0),
        };
        let on_hugetlbfs = kind == fs::FileType::RegularFile
            && fs::fstatfs(file)
                .is_ok_and(|system| u64::try_from(system.f_type).is_ok_and(|kind| kind == HUGETLBFS_MAGIC));
        let huge_page = on_hugetlbfs.then(|| u64::try_from(stat.st_blksize).unwrap_or(1).max(1));
        // The unit of st_blocks is 512 bytes on every file system: stat(2).
        let allocated_bytes = u64::try_from(stat.st_blocks).unwrap_or(0).saturating_mul(512);
        Ok(Self { identity: (stat.st_dev, stat.st_ino), length, kind, huge_page, allocated_bytes })
    }

    /// Returns whether no range of a regular file up to `end` is a hole.
    fn is_allocated(&self, end: u64) -> bool {
        self.is_regular() && self.length >= end && self.allocated_bytes >= self.length
    }

    fn is_regular(&self) -> bool {
        self.kind == fs::FileType::RegularFile
    }
}

/// `HUGETLBFS_MAGIC` of linux/magic.h.
const HUGETLBFS_MAGIC: u64 = 0x9584_58f6;

/// A range of a file to which a region is restored: device and inode, start, end, number of the region.
type Taken = ((u64, u64), u64, u64, usize);

/// Checks all destinations. Only if none is refused, extends the files that are too short, and zeroes the range of each
/// file to which a region is restored.
pub(super) fn prepare<'a>(
    regions: &[Region],
    destinations: &'a mut [GuestDestination<'_>],
) -> Result<Vec<Prepared<'a>>> {
    if regions.len() != destinations.len() {
        // The words of crosvm's own error.
        return Err(Error::invalid_argument(format!(
            "snapshot expected {} memory regions but there are {} destinations",
            regions.len(),
            destinations.len()
        )));
    }
    let mappings =
        destinations.iter().any(|each| matches!(each.kind, DestinationKind::Buffer(_))).then(OwnMappings::read);
    let mappings = mappings.unwrap_or_default();
    let (mut taken, mut reopened, mut prepared) = (Vec::new(), HashMap::new(), Vec::with_capacity(regions.len()));
    let mut files = Vec::new();
    for (number, (region, destination)) in regions.iter().zip(destinations).enumerate() {
        let refuse = |text: String| Error::invalid_argument(format!("the destination of region {number} {text}"));
        if let Some(base) = destination.guest_base.filter(|base| *base != region.guest_base) {
            return Err(refuse(format!("is at {base:#x}, but the region is at {:#x}", region.guest_base)));
        }
        if let Some(size) = destination.size.filter(|size| *size != region.size) {
            return Err(refuse(format!("has {size} bytes, but the region has {}", region.size)));
        }
        prepared.push(match &mut destination.kind {
            DestinationKind::Nowhere => Prepared::Nowhere,
            DestinationKind::Buffer(buffer) => {
                if buffer.len() as u64 != region.size {
                    return Err(refuse(format!("has {} bytes, but the region has {}", buffer.len(), region.size)));
                }
                taken.extend(mappings.of_files(buffer).map(|(file, Range { start, end })| (file, start, end, number)));
                let backing = mappings.backing(buffer);
                if destination.huge_pages && backing == Backing::Anonymous {
                    region.ranges.iter().for_each(|range| want_huge_pages(buffer, range.start, range.end));
                }
                Prepared::Buffer(buffer, backing)
            }
            DestinationKind::File { file, offset } => {
                let examined = check_file(*file, *offset, region.size).map_err(|error| match error {
                    Refused::Text(text) => refuse(text),
                    Refused::Error(error) => error,
                })?;
                let start = offset.unwrap_or(0);
                taken.push((examined.identity, start, start + region.size, number));
                let file = usable(*file, &mut reopened).map_err(refuse)?;
                files.push((number, destination.keep_allocated));
                if let Some(huge_page) = examined.huge_page {
                    // Mapped once before any file is changed: a file on hugetlbfs that cannot be mapped is refused
                    // here.
                    let mapping = Mapping::of_file(&file, start, region.size, huge_page);
                    mapping.map_err(|error| Error::io("the destination on hugetlbfs cannot be mapped", error))?;
                }
                let cache = CacheUse::default();
                cache.set_uncached(destination.uncached);
                Prepared::File(file, start, cache)
            }
        });
    }
    check_apart(taken)?;
    for (number, keep_allocated) in files {
        let Prepared::File(file, offset, _) = &prepared[number] else { continue };
        let (offset, size) = (*offset, regions[number].size);
        let mapped = match allocated_mapping(file, offset, size, keep_allocated)? {
            Some(mapping) => Some((mapping, Backing::Other)),
            None => make_zero_and_long_enough(file, offset, size)?.map(|mapping| (mapping, Backing::Zeros)),
        };
        if let Some((mapping, backing)) = mapped {
            prepared[number] = Prepared::Mapped(mapping, backing);
        }
    }
    Ok(prepared)
}

enum Refused {
    /// The reason, which follows the number of the region in the error.
    Text(String),
    Error(Error),
}

impl From<Error> for Refused {
    fn from(error: Error) -> Self {
        Self::Error(error)
    }
}

fn check_file(file: BorrowedFd<'_>, offset: Option<u64>, size: u64) -> std::result::Result<Examined, Refused> {
    let refuse = |text: String| Err(Refused::Text(text));
    let examined = Examined::of(&file)?;
    let length = examined.length;
    if !examined.is_regular() && examined.kind != fs::FileType::BlockDevice {
        return refuse("is not a file, memfd or block device".to_owned());
    }
    let fits = match offset {
        None => length == size || (length == 0 && examined.is_regular()),
        Some(offset) => match offset.checked_add(size).filter(|end| i64::try_from(*end).is_ok()) {
            Some(end) => examined.is_regular() || end <= length,
            None => false,
        },
    };
    if !fits {
        return refuse(format!("has {length} bytes, but the region has {size}"));
    }
    let end = offset.unwrap_or(0) + size;
    if let Some(page) = examined.huge_page
        && length < end
        && !end.is_multiple_of(page)
    {
        return refuse(format!("would end at {end}, but a file on hugetlbfs consists of whole pages of {page} bytes"));
    }
    let flags = fs::fcntl_getfl(file).unwrap_or(OFlags::empty());
    if (flags & OFlags::RWMODE).is_empty() || flags.contains(OFlags::PATH) {
        return refuse("is not open for writing".to_owned());
    }
    if examined.huge_page.is_some() && !flags.contains(OFlags::RDWR) {
        return refuse("is on hugetlbfs, so it must be open for reading and writing".to_owned());
    }
    Ok(examined)
}

/// Returns the file without the flags that change how a positioned write works: with `O_APPEND` Linux appends
/// (pwrite(2), BUGS), and with `O_DIRECT` it refuses data that is not aligned.
fn usable<'a>(
    file: BorrowedFd<'a>,
    reopened: &mut HashMap<i32, Arc<File>>,
) -> std::result::Result<OpenFile<'a>, String> {
    let flags = fs::fcntl_getfl(file).unwrap_or(OFlags::empty());
    if !flags.intersects(OFlags::APPEND | OFlags::DIRECT) {
        return Ok(OpenFile::Given(file));
    }
    if let Some(file) = reopened.get(&file.as_raw_fd()) {
        return Ok(OpenFile::Reopened(Arc::clone(file)));
    }
    let mode = if flags.contains(OFlags::RDWR) { OFlags::RDWR } else { OFlags::WRONLY };
    let opened = fs::open(format!("/proc/self/fd/{}", file.as_raw_fd()), mode | OFlags::CLOEXEC, fs::Mode::empty());
    let opened = opened.map_err(|errno| {
        let flag = if flags.contains(OFlags::APPEND) { "O_APPEND" } else { "O_DIRECT" };
        format!("is open with {flag}, and cannot be reopened ({errno}): open it without {flag}")
    })?;
    let opened = Arc::new(File::from(opened));
    reopened.insert(file.as_raw_fd(), Arc::clone(&opened));
    Ok(OpenFile::Reopened(opened))
}

fn check_apart(mut taken: Vec<Taken>) -> Result<()> {
    taken.sort_unstable();
    let overlaps = |pair: &&[Taken]| pair[0].0 == pair[1].0 && pair[1].1 < pair[0].2;
    match taken.windows(2).find(overlaps) {
        None => Ok(()),
        Some(pair) => {
            let (one, other) = (pair[0].3.min(pair[1].3), pair[0].3.max(pair[1].3));
            Err(Error::invalid_argument(format!(
                "the destinations of regions {one} and {other} overlap: they share bytes of a file"
            )))
        }
    }
}

/// Maps the range of a file that must stay allocated. Returns `None` for any other file.
fn allocated_mapping(file: &OpenFile<'_>, offset: u64, size: u64, keep_allocated: bool) -> Result<Option<Mapping>> {
    let examined = Examined::of(file)?;
    let flags = fs::fcntl_getfl(file).unwrap_or(OFlags::empty());
    if !keep_allocated || !flags.contains(OFlags::RDWR) || !examined.is_allocated(offset + size) {
        return Ok(None);
    }
    let page = examined.huge_page.unwrap_or(rustix::param::page_size() as u64);
    Mapping::of_file(file, offset, size, page).map(Some).map_err(not_written)
}

/// Extends a file that is too short, and makes the range of the region a hole. Returns a mapping of the range if the
/// file can be written only through one.
fn make_zero_and_long_enough(file: &OpenFile<'_>, offset: u64, size: u64) -> Result<Option<Mapping>> {
    let examined = Examined::of(file)?;
    let end = offset + size;
    if examined.is_regular() && examined.length < end {
        fs::ftruncate(file, end).map_err(|errno| not_written(errno.into()))?;
    }
    let used = if examined.is_regular() { examined.length.min(end) } else { end };
    let Some(page) = examined.huge_page else {
        if offset < used && !punch(file, offset, used)? {
            write_zeros(file, offset, used)?;
        }
        return Ok(None);
    };
    let mut mapping = Mapping::of_file(file, offset, size, page).map_err(not_written)?;
    // Whole pages become holes; the rest at both ends is overwritten with zeros.
    let (first, last) = (offset.next_multiple_of(page), end / page * page);
    let holed = if first < last && punch(file, first, last)? { first - offset..last - offset } else { size..size };
    let part = |at: u64| usize::try_from(at).unwrap_or(usize::MAX);
    let bytes = mapping.as_mut_slice();
    make_zero(&mut bytes[..part(holed.start)], Backing::Other).map_err(not_written)?;
    make_zero(&mut bytes[part(holed.end)..], Backing::Other).map_err(not_written)?;
    Ok(Some(mapping))
}

/// Makes a range of a file a hole. Returns false if the file does not support holes.
fn punch(file: &OpenFile<'_>, start: u64, end: u64) -> Result<bool> {
    match fs::fallocate(file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, start, end - start) {
        Ok(()) => Ok(true),
        Err(Errno::OPNOTSUPP | Errno::NOSYS | Errno::PERM | Errno::INVAL) => Ok(false),
        Err(errno) => Err(not_written(errno.into())),
    }
}

/// Overwrites a range of a file with zeros.
fn write_zeros(file: &OpenFile<'_>, mut start: u64, end: u64) -> Result<()> {
    let zeros = vec![0; 64 << 10];
    while start < end {
        let length = usize::try_from(end - start).map_or(zeros.len(), |rest| rest.min(zeros.len()));
        file.write_all_at(&CacheUse::default(), &zeros[..length], start)?;
        start += length as u64;
    }
    Ok(())
}
