//! [`FileMemory`]: guest memory in a file, memfd or block device.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock};

use rustix::fs::{self, SeekFrom};
use rustix::io::Errno;

use super::source::GuestMemorySource;
use crate::error::{Error, Result};
use crate::pool::thread_number;
use crate::stored_file::CacheUse;
use crate::threads::lock;

/// Guest memory in a file, memfd or block device, or in a part of one. Holes are not read.
///
/// ```
/// # let directory = tempfile::tempdir()?;
/// # let path = directory.path().join("ram");
/// std::fs::write(&path, [7; 8192])?;
/// let memory = vmsnap::FileMemory::new(std::fs::File::open(&path)?, 4096, None)?;
/// assert_eq!(vmsnap::GuestMemorySource::size(&memory), 4096);
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
#[derive(Debug)]
pub struct FileMemory {
    file: Arc<OpenFile>,
    offset: u64,
    size: u64,
    /// A data range that extends past the range in which it was searched for: tmpfs walks through it page by page to
    /// find its end.
    known: Mutex<Range<u64>>,
}

/// A file opened by vmsnap.
#[derive(Debug)]
pub(super) struct OpenFile {
    file: File,
    cache: CacheUse,
    length: u64,
    /// Whether the file system reports the holes of the file.
    tells_holes: bool,
    /// The same file opened again for several threads, each time with its own position: threads that search for holes
    /// with one open file wait for each other.
    lookers: [OnceLock<File>; 8],
}

impl FileMemory {
    /// Takes `size` bytes of `file` from `offset` on, or everything from there to the end. The position of `file` does
    /// not change.
    ///
    /// [`FileMemory::part`] makes several parts of one file that share a descriptor.
    ///
    /// # Errors
    ///
    /// [`Error::is_invalid_argument`] if the file ends before the range does, if `offset` is at the end and no size is
    /// given, or if the size of the file is unknown. That is so for a directory, FIFO, socket or character device, and
    /// for a file of size 0, because files of `/proc` report that size and yet have contents.
    /// [`Error::is_io`] if the file cannot be examined.
    pub fn new(file: impl AsFd, offset: u64, size: Option<u64>) -> Result<Self> {
        let open = OpenFile::new(&file)?;
        let length = open.length;
        if length == 0 {
            let text = "has a size of 0: it is empty, or does not report its size, like the files of /proc; \
                        use ProcessMemory for the memory of a process";
            return Err(Error::invalid_argument(text).context(name_of(&file)));
        }
        Self::within(Arc::new(open), 0, length).part(offset, size)
    }

    /// Takes a part of this memory: `size` bytes from `offset` on, or everything from there to the end. The part shares
    /// the open file, so one descriptor is enough for any number of regions in a file.
    ///
    /// ```
    /// # let directory = tempfile::tempdir()?;
    /// # let path = directory.path().join("ram");
    /// std::fs::write(&path, [7; 8192])?;
    /// let whole = vmsnap::FileMemory::open(&path, 0, None)?;
    /// let high = whole.part(4096, None)?;
    /// assert_eq!(vmsnap::GuestMemorySource::size(&high), 4096);
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::is_invalid_argument`] if this memory ends before the part does, or if `offset` is at the end and no
    /// size is given.
    pub fn part(&self, offset: u64, size: Option<u64>) -> Result<Self> {
        let rest = self.size.checked_sub(offset);
        let size = match (rest, size) {
            (Some(rest), None) if rest > 0 => rest,
            (Some(rest), Some(size)) if size <= rest => size,
            _ => {
                let wanted = size.map_or(String::new(), |size| format!("{size} bytes from "));
                let text = format!("has {} bytes, too few for {wanted}offset {offset}", self.size);
                return Err(Error::invalid_argument(text).context(name_of(&self.file.file)));
            }
        };
        Ok(Self::within(Arc::clone(&self.file), self.offset + offset, size))
    }

    /// Sets whether reads of this memory and all its parts leave the file out of the page cache. Useful for
    /// files of tens of GiB that are read once. Off by default.
    #[must_use]
    pub fn uncached(self, uncached: bool) -> Self {
        self.file.cache.set_uncached(uncached);
        self
    }

    pub(super) fn within(file: Arc<OpenFile>, offset: u64, size: u64) -> Self {
        Self { file, offset, size, known: Mutex::new(0..0) }
    }

    /// Opens the file at `path` and takes a part of it, as [`FileMemory::new`] does. A FIFO is refused at once, even
    /// without a writer.
    ///
    /// # Errors
    ///
    /// The errors of [`FileMemory::new`], and [`Error::is_io`] if the file cannot be opened.
    pub fn open(path: impl AsRef<Path>, offset: u64, size: Option<u64>) -> Result<Self> {
        let path = path.as_ref();
        let failed = |error: io::Error| Error::io(format!("{} cannot be opened", path.display()), error);
        // Checked before opening: opening a FIFO waits for a writer, and opening a device may have side effects.
        let stat = fs::stat(path).map_err(|errno| failed(errno.into()))?;
        check_kind(fs::FileType::from_raw_mode(stat.st_mode)).map_err(|error| error.context(path.display()))?;
        Self::new(File::open(path).map_err(failed)?, offset, size)
    }
}

/// Returns the path of the file as the kernel knows it, for an error.
fn name_of(file: &impl AsFd) -> String {
    let descriptor = file.as_fd().as_raw_fd();
    std::fs::read_link(format!("/proc/self/fd/{descriptor}"))
        .map_or_else(|_| format!("file descriptor {descriptor}"), |path| path.display().to_string())
}

/// Refuses a kind of file that does not have a size.
fn check_kind(kind: fs::FileType) -> Result<()> {
    let kind = match kind {
        fs::FileType::RegularFile | fs::FileType::BlockDevice => return Ok(()),
        fs::FileType::Directory => "a directory",
        fs::FileType::Fifo => "a FIFO or a pipe",
        fs::FileType::Socket => "a socket",
        fs::FileType::CharacterDevice => "a character device",
        _ => "neither a file nor a device",
    };
    let text = format!("is {kind}: guest memory is read from a file, a memfd or a block device");
    Err(Error::invalid_argument(text))
}

/// Opens the same file again, with a position of its own.
fn reopen(file: &impl AsFd) -> io::Result<File> {
    File::open(format!("/proc/self/fd/{}", file.as_fd().as_raw_fd()))
}

impl Drop for OpenFile {
    fn drop(&mut self) {
        self.cache.drop_rest(&self.file, 0, None);
    }
}

impl OpenFile {
    fn new(file: impl AsFd) -> Result<Self> {
        let failed = |error: io::Error| Error::io("cannot be opened as guest memory", error).context(name_of(&file));
        // Checked before reopening: reopening a FIFO waits for a writer.
        let stat = fs::fstat(&file).map_err(|errno| failed(errno.into()))?;
        check_kind(fs::FileType::from_raw_mode(stat.st_mode)).map_err(|error| error.context(name_of(&file)))?;
        // An open file of its own, because searching for holes moves the position.
        let (own_file, own) = match reopen(&file) {
            Ok(file) => (file, true),
            Err(_) => (file.as_fd().try_clone_to_owned().map_err(failed)?.into(), false),
        };
        Self::of(own_file, own).map_err(failed)?.ok_or_else(|| {
            Error::invalid_argument("the size of a block device is unknown, because it cannot be reopened")
                .context(name_of(&file))
        })
    }

    /// Returns `None` if the file does not have a length. `own` says that no other code moves the position of `file`.
    pub(super) fn of(file: File, own: bool) -> io::Result<Option<Self>> {
        let stat = fs::fstat(&file)?;
        let length = match fs::FileType::from_raw_mode(stat.st_mode) {
            fs::FileType::RegularFile => u64::try_from(stat.st_size).unwrap_or(0),
            fs::FileType::BlockDevice if own => fs::seek(&file, SeekFrom::End(0))?,
            _ => return Ok(None),
        };
        let tells_holes = own
            && match fs::seek(&file, SeekFrom::Data(0)) {
                Ok(_) => true,
                // The file has allocated blocks and yet no data: either the report is wrong, or the space is
                // preallocated.
                Err(Errno::NXIO) => stat.st_blocks == 0,
                Err(_) => false,
            };
        Ok(Some(Self { file, cache: CacheUse::default(), length, tells_holes, lookers: Default::default() }))
    }

    pub(super) fn length(&self) -> u64 {
        self.length
    }

    /// Returns the open file with which this thread searches for holes.
    fn looker(&self) -> &File {
        // A short file is not worth one descriptor for each thread.
        let useful = usize::try_from(self.length >> 20).map_or(self.lookers.len(), |mib| mib.min(self.lookers.len()));
        let number = thread_number() % self.lookers.len();
        if number >= useful {
            return &self.file;
        }
        let own = &self.lookers[number];
        own.get().unwrap_or_else(|| match reopen(&self.file) {
            Ok(file) => own.get_or_init(|| file),
            Err(_) => &self.file,
        })
    }
}

impl FileMemory {
    /// Returns where the next data begins, from an offset in the region on, or `None` if only a hole follows.
    fn data_from(&self, offset: u64) -> io::Result<Option<u64>> {
        if offset >= self.size {
            return Ok(None);
        }
        let found = match fs::seek(self.file.looker(), SeekFrom::Data(self.offset + offset)) {
            // There is no data up to the end.
            Err(Errno::NXIO) => return Ok(None),
            found => found?,
        };
        // Not before the offset, even if the file system says so.
        Ok(Some(found.saturating_sub(self.offset).max(offset)).filter(|start| *start < self.size))
    }

    /// Returns where the data that begins at `start` ends.
    fn hole_after(&self, start: u64) -> io::Result<u64> {
        match fs::seek(self.file.looker(), SeekFrom::Hole(self.offset + start)) {
            // A hole was punched there just now, or the file was truncated. The read finds zeros, or fails.
            Err(Errno::NXIO) => Ok(self.size),
            end => Ok((end?.saturating_sub(self.offset)).clamp(start + 1, self.size)),
        }
    }

    /// Returns where the data around an offset ends, if an earlier search found it.
    fn known_from(&self, offset: u64) -> Option<u64> {
        let known = lock(&self.known);
        known.contains(&offset).then_some(known.end)
    }
}

impl GuestMemorySource for FileMemory {
    fn size(&self) -> u64 {
        self.size
    }

    fn data_ranges(&self, within: Range<u64>, found: &mut Vec<Range<u64>>) -> io::Result<()> {
        if !self.file.tells_holes {
            found.push(within);
            return Ok(());
        }
        let mut at = within.start;
        while at < within.end {
            if let Some(end) = self.known_from(at) {
                found.push(at..end.min(within.end));
                at = end;
                continue;
            }
            // The end of the data is searched for only here, because tmpfs walks through it page by page.
            let Some(start) = self.data_from(at)?.filter(|start| *start < within.end) else { break };
            at = self.hole_after(start)?;
            found.push(start..at.min(within.end));
            if at > within.end {
                *lock(&self.known) = start..at;
            }
        }
        Ok(())
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        if !self.file.tells_holes || self.known_from(offset).is_some() {
            return Ok((offset < self.size).then_some(offset));
        }
        self.data_from(offset)
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> io::Result<usize> {
        let length = usize::try_from(self.size.saturating_sub(offset)).map_or(buf.len(), |rest| rest.min(buf.len()));
        let mut done = 0;
        while done < length {
            let at = self.offset + offset + done as u64;
            match self.file.cache.read(&self.file.file, &mut buf[done..length], at) {
                Ok(0) if done == 0 => {
                    return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "the file was truncated"));
                }
                Ok(0) => break,
                Ok(count) => done += count,
                Err(Errno::INTR) => {}
                Err(errno) if done == 0 => return Err(errno.into()),
                Err(_) => break,
            }
        }
        Ok(done)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Seek, SeekFrom as Position};
    use std::os::unix::fs::FileExt;

    #[test]
    fn holes_of_a_file_are_told_and_its_position_stays() {
        let mut file = tempfile::tempfile().unwrap();
        file.set_len(1 << 20).unwrap();
        file.write_all_at(&[1; 4096], 65_536).unwrap();
        file.seek(Position::Start(17)).unwrap();
        let memory = FileMemory::new(&file, 4096, Some(1 << 19)).unwrap();
        let mut found = Vec::new();
        memory.data_ranges(0..1 << 19, &mut found).unwrap();
        memory.data_ranges(0..63_488, &mut found).unwrap();
        memory.data_ranges(63_488..64_000, &mut found).unwrap();
        memory.data_ranges(65_536..1 << 19, &mut found).unwrap();
        assert_eq!(found, [61_440..65_536, 61_440..63_488, 63_488..64_000]);
        assert_eq!(file.stream_position().unwrap(), 17);
        let mut buf = [9; 8192];
        assert_eq!(memory.read_at(61_440, &mut buf).unwrap(), 8192);
        assert_eq!((buf[0], buf[4096]), (1, 0));
        for (offset, size) in [(1 << 21, None), (1 << 19, Some(1 << 20)), (1 << 20, None)] {
            assert!(FileMemory::new(&file, offset, size).unwrap_err().is_invalid_argument());
        }
    }

    #[test]
    fn parts_of_a_file_share_its_descriptor() {
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&[1, 2, 3, 4], 0).unwrap();
        let whole = FileMemory::new(&file, 1, None).unwrap();
        let parts: Vec<_> = (0..3).map(|offset| whole.part(offset, Some(1)).unwrap()).collect();
        for (part, expected) in parts.iter().zip([2, 3, 4]) {
            let mut byte = [0];
            assert_eq!(part.read_at(0, &mut byte).unwrap(), 1);
            assert_eq!(byte, [expected]);
            assert!(Arc::ptr_eq(&part.file, &whole.file));
        }
        assert_eq!(whole.part(3, Some(0)).unwrap().size(), 0);
        for (offset, size) in [(3, None), (4, Some(0)), (0, Some(4)), (u64::MAX, Some(u64::MAX))] {
            assert!(whole.part(offset, size).unwrap_err().is_invalid_argument());
        }
    }

    #[test]
    fn what_does_not_tell_its_size_is_refused_by_name_and_not_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let fifo = directory.path().join("fifo");
        fs::mknodat(fs::CWD, &fifo, fs::FileType::Fifo, 0o600.into(), 0).unwrap();
        let empty = directory.path().join("empty");
        File::create(&empty).unwrap();
        for (path, why) in [
            (fifo.as_path(), "a FIFO"),
            (directory.path(), "a directory"),
            (Path::new("/dev/zero"), "a character device"),
            (Path::new("/proc/self/maps"), "size of 0"),
            (empty.as_path(), "size of 0"),
        ] {
            let error = FileMemory::open(path, 0, None).unwrap_err();
            assert!(error.is_invalid_argument());
            let text = error.to_string();
            assert!(text.contains(why), "{text}");
            assert!(text.contains(path.file_name().unwrap().to_str().unwrap()), "{text}");
        }
        // Open for reading and writing, because that does not wait.
        let both = std::fs::OpenOptions::new().read(true).write(true).open(&fifo).unwrap();
        assert!(FileMemory::new(&both, 0, None).unwrap_err().to_string().contains("fifo: "));
    }

    #[test]
    fn a_file_cut_meanwhile_is_told() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(8192).unwrap();
        let memory = FileMemory::new(&file, 0, None).unwrap();
        file.set_len(4096).unwrap();
        let mut buf = [9; 8192];
        assert_eq!(memory.read_at(0, &mut buf).unwrap(), 4096);
        assert_eq!(memory.read_at(4096, &mut buf).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
}
