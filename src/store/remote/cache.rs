//! Blocks of stored bytes in files on a local disk, so that they are not fetched again.
//!
//! A block is a file. Its name is a digest of the snapshot's manifest, the fragment's path and the block's number, so
//! a block is never out of date. It begins with a header of 32 bytes: a magic number, the length of the data, and a
//! digest of the name and the data. The data of an encrypted snapshot stays encrypted.
//!
//! A file is written beside its place and renamed, and there are no locks: any process may add or remove any block at
//! any time. Nothing depends on the cache. If a file cannot be written, for example because the disk is full, the
//! cache is not written any more.

use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{DirBuilderExt, FileExt};
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use rustix::fs::{self, AtFlags, FileType, Mode, OFlags, Stat};
use rustix::io::Errno;

use crate::buffer;
use crate::error::{Error, Result};
use crate::store::directory::entries;
use crate::store::{CacheOptions, DEFAULT_CACHE_BYTES};
use crate::threads::lock;

const MAGIC: [u8; 8] = *b"vmsnapb1";
const HEADER_BYTES: usize = 32;
const DIGEST_BYTES: usize = 16;

/// The cache takes at most this part of the space that is free without it.
const PART_OF_FREE_SPACE: u64 = 10;

/// If there is no room, at least this part of the cache is removed at once, because that takes a scan of all files.
const PART_REMOVED: u64 = 16;

/// A temporary file of this age belongs to a process that was killed.
const MAX_TEMPORARY_AGE: Duration = Duration::from_secs(3600);

/// `st_blocks` counts in this unit (stat(2)).
const STAT_BLOCK_BYTES: u64 = 512;

/// A directory with blocks.
pub(super) struct BlockCache {
    directory: OwnedFd,
    max_bytes: u64,
    /// Set after a failed write.
    is_full: AtomicBool,
    room: Mutex<Room>,
}

/// The room in the cache, as of the last scan and the writes of this process since then. Others write, too.
#[derive(Default)]
struct Room {
    limit: u64,
    used: u64,
    written: u64,
}

/// The number of blocks in a cache, and the bytes that their files occupy.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct CacheUsage {
    pub(crate) blocks: u64,
    pub(crate) bytes: u64,
}

/// The name of a block in the cache.
#[derive(Clone, Copy)]
pub(super) struct BlockName([u8; 32]);

impl BlockName {
    /// The name of block `number` of the fragment at `path`, in the snapshot whose stored manifest has this digest.
    pub(super) fn new(manifest: &[u8; 32], path: &str, number: u64) -> Self {
        let mut hasher = blake3::Hasher::new_derive_key("vmsnap block cache, name of a block");
        hasher.update(manifest).update(&number.to_le_bytes()).update(path.as_bytes());
        Self(*hasher.finalize().as_bytes())
    }

    fn file(&self) -> String {
        blake3::Hash::from_bytes(self.0).to_hex().to_string()
    }

    fn header(&self, data: &[u8]) -> [u8; HEADER_BYTES] {
        let mut header = [0; HEADER_BYTES];
        header[..8].copy_from_slice(&MAGIC);
        header[8..16].copy_from_slice(&(data.len() as u64).to_le_bytes());
        header[16..].copy_from_slice(&blake3::keyed_hash(&self.0, data).as_bytes()[..DIGEST_BYTES]);
        header
    }
}

impl BlockCache {
    /// Opens the cache, and creates its directory if that does not exist. `None` if it cannot be created: a cache is
    /// not worth an error.
    ///
    /// # Errors
    ///
    /// `InvalidArgument` if other users may write to the directory: they could remove and replace blocks.
    pub(super) fn open(options: &CacheOptions) -> Result<Option<Self>> {
        let path = &options.directory;
        let mut builder = std::fs::DirBuilder::new();
        if builder.recursive(true).mode(0o700).create(path).is_err() && !path.is_dir() {
            return Ok(None);
        }
        let Some(directory) = open_directory(path)? else { return Ok(None) };
        Ok(Some(Self {
            directory,
            max_bytes: options.max_bytes,
            is_full: AtomicBool::new(false),
            room: Mutex::default(),
        }))
    }

    /// The block, if the cache has it. A damaged file is removed.
    pub(super) fn load(&self, name: &BlockName, length: usize) -> Option<Bytes> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
        let file = match fs::openat(&self.directory, name.file(), flags, Mode::empty()) {
            Ok(file) => File::from(file),
            Err(Errno::NOENT) => return None,
            Err(_) => {
                self.remove(name);
                return None;
            }
        };
        let block = read(&file, name, length);
        if block.is_none() {
            self.remove(name);
        }
        block
    }

    /// Keeps a block, if there is room.
    pub(super) fn store(&self, name: &BlockName, data: &[u8]) {
        if self.is_full.load(Ordering::Relaxed) {
            return;
        }
        let needed = (HEADER_BYTES + data.len()) as u64;
        let written =
            self.make_room(needed).and_then(|has_room| if has_room { self.write(name, data) } else { Ok(()) });
        if written.is_err() {
            self.is_full.store(true, Ordering::Relaxed);
        }
    }

    /// Removes a block; returns whether it was there.
    pub(super) fn remove(&self, name: &BlockName) -> bool {
        fs::unlinkat(&self.directory, name.file(), AtFlags::empty()).is_ok()
    }

    fn write(&self, name: &BlockName, data: &[u8]) -> Result<()> {
        let failed = |errno: Errno| Error::io("a block cannot be cached", errno);
        let temporary = entries::temporary_name()?;
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = fs::openat(&self.directory, &temporary, flags, Mode::RUSR | Mode::WUSR).map_err(failed)?;
        let mut file = File::from(file);
        let placed = file
            .write_all(&name.header(data))
            .and_then(|()| file.write_all(data))
            .map_err(|error| Error::io("a block cannot be cached", error))
            .and_then(|()| fs::renameat(&self.directory, &temporary, &self.directory, name.file()).map_err(failed));
        if placed.is_err() {
            let _ = fs::unlinkat(&self.directory, &temporary, AtFlags::empty());
        }
        placed?;
        let occupied = fs::fstat(&file).map_or(data.len() as u64, |stat| occupied(&stat));
        let mut room = lock(&self.room);
        room.used += occupied;
        room.written += occupied;
        Ok(())
    }

    /// Makes room for a block: removes the oldest ones. Returns whether there is room.
    fn make_room(&self, needed: u64) -> Result<bool> {
        let mut room = lock(&self.room);
        let is_known = room.limit > 0 && room.written < room.limit / PART_REMOVED;
        if is_known && room.used + needed <= room.limit {
            return Ok(true);
        }
        let mut blocks = scan(&self.directory)?;
        let mut used = blocks.iter().map(|block| block.bytes).sum();
        let limit = limit(&self.directory, self.max_bytes, used);
        if used + needed > limit {
            blocks.sort_unstable_by_key(|block| block.modified);
            for block in blocks {
                if used + needed <= limit - limit / PART_REMOVED {
                    break;
                }
                // Another process may have removed it.
                let _ = fs::unlinkat(&self.directory, &block.file, AtFlags::empty());
                used -= block.bytes;
            }
        }
        *room = Room { limit, used, written: 0 };
        Ok(used + needed <= limit)
    }
}

/// Reads a block, and checks it.
fn read(file: &File, name: &BlockName, length: usize) -> Option<Bytes> {
    let size = HEADER_BYTES + length;
    let stat = fs::fstat(file).ok()?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile || u64::try_from(stat.st_size) != Ok(size as u64)
    {
        return None;
    }
    let mut bytes = buffer::zeros(size).ok()?;
    file.read_exact_at(&mut bytes, 0).ok()?;
    let (header, data) = bytes.split_at(HEADER_BYTES);
    (header == name.header(data)).then(|| Bytes::from(bytes).slice(HEADER_BYTES..))
}

/// The blocks in the cache at `directory`. Without the directory the cache is empty.
///
/// # Errors
///
/// `Io` if it cannot be read, `InvalidArgument` if other users may write to it.
#[cfg_attr(not(any(test, feature = "python")), allow(dead_code, reason = "the command line shows it"))]
pub(crate) fn usage(directory: &Path) -> Result<CacheUsage> {
    let Some(directory) = open_directory(directory)? else { return Ok(CacheUsage::default()) };
    let blocks = scan(&directory)?;
    Ok(CacheUsage { blocks: blocks.len() as u64, bytes: blocks.iter().map(|block| block.bytes).sum() })
}

/// The most bytes that a cache of the usual size at `directory` may occupy now. If it does not exist, that is the usual
/// size.
///
/// # Errors
///
/// The errors of [`usage`].
#[cfg_attr(not(any(test, feature = "python")), allow(dead_code, reason = "the command line shows it"))]
pub(crate) fn usual_limit(directory: &Path) -> Result<u64> {
    let Some(directory) = open_directory(directory)? else { return Ok(DEFAULT_CACHE_BYTES) };
    let used = scan(&directory)?.iter().map(|block| block.bytes).sum();
    Ok(limit(&directory, DEFAULT_CACHE_BYTES, used))
}

/// The most bytes that the blocks in `directory` may occupy, if they occupy `used` bytes now.
fn limit(directory: &OwnedFd, max_bytes: u64, used: u64) -> u64 {
    let free = fs::fstatvfs(directory).map_or(0, |stat| stat.f_bavail.saturating_mul(stat.f_frsize));
    max_bytes.min(free.saturating_add(used) / PART_OF_FREE_SPACE)
}

/// Removes all blocks from the cache at `directory`, at any time; returns their number and bytes.
///
/// # Errors
///
/// `Io` if a block cannot be removed, `InvalidArgument` if other users may write to the directory.
#[cfg_attr(not(any(test, feature = "python")), allow(dead_code, reason = "the command line empties it"))]
pub(crate) fn empty(directory: &Path) -> Result<CacheUsage> {
    let mut removed = CacheUsage::default();
    let Some(directory) = open_directory(directory)? else { return Ok(removed) };
    for block in scan(&directory)? {
        match fs::unlinkat(&directory, &block.file, AtFlags::empty()) {
            Ok(()) => {
                removed.blocks += 1;
                removed.bytes += block.bytes;
            }
            Err(Errno::NOENT) => {}
            Err(errno) => return Err(Error::io(format!("the cached block {} cannot be removed", block.file), errno)),
        }
    }
    Ok(removed)
}

/// Opens the directory of a cache; `None` if it does not exist or cannot be used.
fn open_directory(path: &Path) -> Result<Option<OwnedFd>> {
    let failed = |errno| Error::io(format!("the cache {} cannot be opened", path.display()), errno);
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = match fs::open(path, flags, Mode::empty()) {
        Ok(directory) => directory,
        Err(Errno::NOENT) => return Ok(None),
        Err(errno) => return Err(failed(errno)),
    };
    let stat = fs::fstat(&directory).map_err(failed)?;
    let is_own = stat.st_uid == rustix::process::geteuid().as_raw();
    if is_own && !Mode::from_raw_mode(stat.st_mode).intersects(Mode::WGRP | Mode::WOTH) {
        return Ok(Some(directory));
    }
    let text = format!(
        "the directory {} cannot be the cache, because other users may write to it: use one of your own with mode 0700",
        path.display()
    );
    Err(Error::invalid_argument(text))
}

/// The file of a block.
struct CachedBlock {
    file: String,
    bytes: u64,
    /// Seconds and nanoseconds since 1970.
    modified: (i64, u64),
}

/// Finds all blocks, and removes the temporary files of killed processes.
fn scan(directory: &OwnedFd) -> Result<Vec<CachedBlock>> {
    let all = entries::entries(directory).map_err(|errno| Error::io("the cache cannot be listed", errno))?;
    let mut blocks = Vec::new();
    for (name, _) in all {
        let Ok(file) = String::from_utf8(name) else { continue };
        let is_block = file.len() == 64 && file.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
        if !is_block && !entries::is_temporary(&file) {
            continue;
        }
        // It may be gone by now.
        let Ok(stat) = fs::statat(directory.as_fd(), &file, AtFlags::SYMLINK_NOFOLLOW) else { continue };
        if is_block {
            blocks.push(CachedBlock { bytes: occupied(&stat), modified: (stat.st_mtime, stat.st_mtime_nsec), file });
        } else if is_old(&stat) {
            let _ = fs::unlinkat(directory, &file, AtFlags::empty());
        }
    }
    Ok(blocks)
}

fn is_old(stat: &Stat) -> bool {
    let modified = UNIX_EPOCH + Duration::from_secs(u64::try_from(stat.st_mtime).unwrap_or(0));
    SystemTime::now().duration_since(modified).is_ok_and(|age| age > MAX_TEMPORARY_AGE)
}

/// The space that a file takes on the disk.
fn occupied(stat: &Stat) -> u64 {
    u64::try_from(stat.st_blocks).unwrap_or(0).saturating_mul(STAT_BLOCK_BYTES)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn open(directory: &Path, max_bytes: u64) -> Result<Option<BlockCache>> {
        BlockCache::open(&CacheOptions { directory: directory.to_owned(), max_bytes })
    }

    fn name(number: u64) -> BlockName {
        BlockName::new(&[1; 32], "mem", number)
    }

    #[test]
    fn a_block_comes_back_only_under_its_name() {
        let folder = tempfile::tempdir().unwrap();
        let cache = open(&folder.path().join("cache"), 1 << 30).unwrap().unwrap();
        cache.store(&name(1), b"block");
        assert_eq!(cache.load(&name(1), 5).unwrap(), &b"block"[..]);
        for other in [name(2), BlockName::new(&[2; 32], "mem", 1), BlockName::new(&[1; 32], "other", 1)] {
            assert!(cache.load(&other, 5).is_none());
            std::fs::hard_link(
                folder.path().join("cache").join(name(1).file()),
                folder.path().join("cache").join(other.file()),
            )
            .unwrap();
            assert!(cache.load(&other, 5).is_none());
            assert!(!cache.remove(&other), "a wrong block is removed");
        }
        assert!(cache.load(&name(1), 4).is_none());
        assert!(cache.load(&name(1), 5).is_none(), "a block of another length is removed");
    }

    #[test]
    fn the_oldest_blocks_make_room() {
        let folder = tempfile::tempdir().unwrap();
        let cache = open(folder.path(), 1 << 20).unwrap().unwrap();
        let foreign = folder.path().join("notes");
        std::fs::write(&foreign, vec![1; 1 << 20]).unwrap();
        for number in 0..40 {
            cache.store(&name(number), &vec![1; 60 << 10]);
            let used = usage(folder.path()).unwrap();
            assert!(used.bytes <= 1 << 20 && used.blocks > 0, "{used:?}");
            // The times of files are as coarse as a tick of the clock.
            let file = File::open(folder.path().join(name(number).file())).unwrap();
            file.set_modified(UNIX_EPOCH + Duration::from_secs(1000 + number)).unwrap();
        }
        let kept: Vec<_> = (0..40).filter(|number| cache.load(&name(*number), 60 << 10).is_some()).collect();
        assert!(kept.len() >= 10 && kept.contains(&39) && !kept.contains(&0), "{kept:?}");
        assert!(kept.windows(2).all(|pair| pair[0] + 1 == pair[1]), "{kept:?}");
        cache.store(&name(100), &vec![1; 2 << 20]);
        assert!(cache.load(&name(100), 2 << 20).is_none(), "it has no room");
        assert!(foreign.exists());
        empty(folder.path()).unwrap();
        assert!(foreign.exists());
    }

    #[test]
    fn a_temporary_file_is_removed_when_it_is_old() {
        let folder = tempfile::tempdir().unwrap();
        let [old, new] = [".vmsnap-0000000000000001", ".vmsnap-0000000000000002"].map(|name| folder.path().join(name));
        File::create(&old).unwrap().set_modified(UNIX_EPOCH).unwrap();
        File::create(&new).unwrap();
        usage(folder.path()).unwrap();
        assert!(!old.exists() && new.exists());
    }

    #[test]
    fn a_directory_to_which_others_may_write_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        for mode in [0o770, 0o702] {
            std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(mode)).unwrap();
            let error = open(folder.path(), 1).err().unwrap();
            assert!(error.is_invalid_argument() && error.to_string().contains("0700"), "{error}");
            assert!(empty(folder.path()).unwrap_err().is_invalid_argument());
        }
        std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        assert!(open(folder.path(), 1).unwrap().is_some());
        // One that cannot be created is not worth an error.
        assert!(open(Path::new("/proc/cache"), 1).unwrap().is_none());
    }

    #[test]
    fn a_failed_write_ends_the_writing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("cache");
        let cache = open(&path, 1 << 30).unwrap().unwrap();
        std::fs::remove_dir(&path).unwrap();
        cache.store(&name(1), b"block");
        assert!(cache.is_full.load(Ordering::Relaxed));
        cache.store(&name(1), b"block");
        assert!(cache.load(&name(1), 5).is_none());
    }
}
