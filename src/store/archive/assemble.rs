//! A staged directory becomes an archive. The commit knows the proofs of all fragments, so their bytes are only moved.
//!
//! The file system moves them where it can. With reflinks, the archive shares the blocks of the fragments. Without
//! them, the file of the largest fragment itself becomes the archive, after room was inserted in front of its bytes.
//! The kernel copies everything else.

use std::ops::Range;
use std::os::fd::OwnedFd;

use rustix::fs::{FallocateFlags, SeekFrom, copy_file_range, fallocate, fstat, seek};
use rustix::io::{Errno, retry_on_intr};

use super::layout::Layout;
use super::member::{LARGE_ALIGNMENT, Member, global_header};
use crate::buffer;
use crate::durability;
use crate::error::{Error, Kind, Result};
use crate::manifest::Manifest;
use crate::name::SnapshotPath;
use crate::process::OwnerProcess;
use crate::store::bytes::{ReadAt, WriteAt};
use crate::store::directory::{StagedDirectory, entries};
use crate::stored_file::StoredFile;
use crate::threads::Interrupt;

/// A smaller fragment is copied at once: to share its blocks takes as long.
const MIN_CLONED_BYTES: u64 = 1 << 20;

/// The file of a smaller fragment does not become the archive.
const MIN_GROWN_BYTES: u64 = 16 << 20;

/// The bytes that the kernel copies between two checks of the interrupt.
const COPY_BYTES: u64 = 16 << 20;

/// The bytes that are copied at a time if the kernel does not copy.
const BUFFER_BYTES: usize = 256 << 10;

/// Everything in an archive but the contents of its fragments.
pub(crate) struct Frame<'a> {
    pub(crate) layout: &'a Layout,
    pub(crate) key_metadata: Option<&'a [u8]>,
    /// The manifest as it is stored.
    pub(crate) manifest: &'a [u8],
}

impl Frame<'_> {
    /// Sets the length of the archive and writes everything but the contents of its fragments. Bytes that are not
    /// written are zero.
    pub(crate) fn write(&self, archive: &StoredFile, interrupt: &mut Interrupt<'_>) -> Result<()> {
        archive.set_len(self.layout.total_bytes()).map_err(|error| Error::io("cannot be written", error))?;
        archive.write_all_at(&global_header(), 0, interrupt)?;
        for member in self.layout.members() {
            interrupt.check()?;
            archive.write_all_at(&member.headers(), member.start, interrupt)?;
        }
        if let (Some(member), Some(bytes)) = (self.layout.key_metadata(), self.key_metadata) {
            archive.write_all_at(bytes, member.data().start, interrupt)?;
        }
        archive.write_all_at(self.manifest, self.layout.manifest().data().start, interrupt)
    }
}

/// The part of a fragment whose blocks an archive can share.
pub(crate) fn clonable(stored_size: u64) -> Range<u64> {
    if stored_size < MIN_CLONED_BYTES { 0..0 } else { 0..stored_size - stored_size % LARGE_ALIGNMENT as u64 }
}

/// Makes one file of a staged directory and renames it to the location of the snapshot. `stored` is the manifest as it
/// is stored. After an error the directory is as it was.
pub(crate) fn publish(
    staged: &StagedDirectory,
    manifest: &Manifest,
    stored: &[u8],
    durable: bool,
    interrupt: &mut Interrupt<'_>,
) -> Result<()> {
    staged.check_free()?;
    let key_metadata = staged.directory().head()?.key_metadata?;
    let layout = Layout::new(manifest, key_metadata.as_ref().map(|bytes| bytes.len() as u64), stored.len() as u64)?;
    let frame = Frame { layout: &layout, key_metadata: key_metadata.as_deref(), manifest: stored };
    let assembly = Assembly { staged, frame, durable };
    let largest = layout.fragments().max_by_key(|member| member.size).filter(|member| member.size >= MIN_GROWN_BYTES);

    let archive = StoredFile::new(staged.create_archive()?);
    if let Some(largest) = largest
        && !assembly.clone_bulk(&archive, &largest)?
        && let Some(grown) = GrownFile::insert_room(staged, &largest)?
    {
        drop(archive);
        staged.remove_archive();
        return assembly
            .complete(&grown.file, Some(largest.path), interrupt)
            .and_then(|()| staged.place_file(&grown.namespace, &grown.name))
            .map_err(|error| grown.undo(error));
    }
    assembly.complete(&archive, None, interrupt)?;
    staged.place_archive()
}

struct Assembly<'a> {
    staged: &'a StagedDirectory,
    frame: Frame<'a>,
    durable: bool,
}

impl Assembly<'_> {
    /// Writes and syncs an archive. The contents of the fragment `present` are in their place.
    fn complete(&self, archive: &StoredFile, present: Option<&str>, interrupt: &mut Interrupt<'_>) -> Result<()> {
        self.frame.write(archive, interrupt).map_err(|error| error.context("the archive"))?;
        for member in self.frame.layout.fragments().filter(|member| present != Some(member.path)) {
            interrupt.check()?;
            let source = self.open(&member)?;
            copy(&source, 0..member.size, archive, member.data().start, interrupt)
                .map_err(|error| error.context(format!("{:?} cannot be moved into the archive", member.path)))?;
        }
        if self.durable {
            durability::sync_file(archive).map_err(|error| error.context("cannot sync the archive"))?;
        }
        interrupt.check_now()
    }

    fn open(&self, member: &Member<'_>) -> Result<StoredFile> {
        self.staged.directory().object(&SnapshotPath::try_from(member.path.to_owned())?)
    }

    /// Tries whether the archive can share the blocks of a fragment.
    fn clone_bulk(&self, archive: &StoredFile, member: &Member<'_>) -> Result<bool> {
        Ok(self.open(member)?.clone_range(clonable(member.size), archive, member.data().start))
    }
}

/// Moves a range of a file to its place in an archive, which begins at `offset`. Holes stay holes. Both begin at
/// multiples of 4,096 if the range is long.
pub(super) fn copy(
    source: &StoredFile,
    range: Range<u64>,
    archive: &StoredFile,
    offset: u64,
    interrupt: &mut Interrupt<'_>,
) -> Result<()> {
    let shared = clonable(range.end - range.start);
    let shared = range.start..range.start + shared.end;
    let mut done = if source.clone_range(shared.clone(), archive, offset) { shared.end } else { range.start };
    while done < range.end {
        done = source.next_data(done);
        if done >= range.end {
            break;
        }
        let hole = match seek(&**source, SeekFrom::Hole(done)) {
            Ok(hole) if hole > done => hole.min(range.end),
            Ok(_) | Err(_) => range.end,
        };
        copy_data(source, done..hole, archive, offset + (done - range.start), interrupt)?;
        done = hole;
    }
    Ok(())
}

/// Copies a range without holes, in the kernel if it can.
fn copy_data(
    source: &StoredFile,
    mut range: Range<u64>,
    archive: &StoredFile,
    mut offset: u64,
    interrupt: &mut Interrupt<'_>,
) -> Result<()> {
    while !range.is_empty() {
        interrupt.check()?;
        let length = usize::try_from((range.end - range.start).min(COPY_BYTES)).unwrap_or(BUFFER_BYTES);
        match copy_file_range(&**source, Some(&mut range.start), &**archive, Some(&mut offset), length) {
            // Some file systems answer so if they cannot copy; a read tells whether the file ends there.
            Ok(0) => break,
            Ok(_) => {}
            Err(Errno::INTR) => interrupt.check_now()?,
            Err(errno @ (Errno::NOSPC | Errno::DQUOT | Errno::FBIG | Errno::IO)) => {
                return Err(Error::io("the file system cannot copy it", errno));
            }
            // The kernel, the file system or a filter of system calls does not have it.
            Err(_) => break,
        }
    }
    let mut buffer = Vec::new();
    while !range.is_empty() {
        interrupt.check()?;
        buffer::at_least(&mut buffer, BUFFER_BYTES)?;
        let length = usize::try_from(range.end - range.start).map_or(BUFFER_BYTES, |left| left.min(BUFFER_BYTES));
        ReadAt::read_exact_at(source, &mut buffer[..length], range.start, interrupt)?;
        archive.write_all_at(&buffer[..length], offset, interrupt)?;
        range.start += length as u64;
        offset += length as u64;
    }
    Ok(())
}

/// The file of a fragment that becomes the archive: room was inserted in front of its bytes.
struct GrownFile {
    file: StoredFile,
    namespace: OwnedFd,
    name: String,
    path: String,
    /// The inserted bytes, and those of the fragment.
    room: u64,
    size: u64,
    owner: OwnerProcess,
}

impl GrownFile {
    /// Inserts room for everything in front of the fragment. Returns `None` if the file system cannot.
    fn insert_room(staged: &StagedDirectory, member: &Member<'_>) -> Result<Option<Self>> {
        let (namespace, name) = member.path.rsplit_once('/').unwrap_or(("", member.path));
        let namespace = entries::open(staged.directory().location().path(), namespace)?;
        let Ok(file) = entries::open_writable(&namespace, name) else { return Ok(None) };
        // A second name would see the change.
        let is_whole =
            || fstat(&file).is_ok_and(|stat| stat.st_nlink == 1 && u64::try_from(stat.st_size) == Ok(member.size));
        let room = member.data().start;
        if !is_whole() {
            return Ok(None);
        }
        if let Err(errno) = retry_on_intr(|| fallocate(&file, FallocateFlags::INSERT_RANGE, 0, room)) {
            if is_whole() {
                return Ok(None);
            }
            // ext4 and XFS lengthen the file before they move its bytes, so some may have been moved.
            let _ = entries::mark_unfinished(&file);
            let failure = std::io::Error::from(errno);
            let text = format!(
                "the file system failed while it moved the bytes of {:?} ({failure}): discard the snapshot and write it \
                 again",
                member.path
            );
            return Err(Error::with_source(Kind::State, text, failure));
        }
        let (name, path) = (name.to_owned(), member.path.to_owned());
        let (file, owner) = (StoredFile::new(file), OwnerProcess::current());
        Ok(Some(Self { file, namespace, name, path, room, size: member.size, owner }))
    }

    /// Makes the file that of the fragment again, after `error`. A forked child leaves it to its parent.
    fn undo(&self, error: Error) -> Error {
        if !self.owner.is_current() {
            return error;
        }
        let collapse = || retry_on_intr(|| fallocate(&*self.file, FallocateFlags::COLLAPSE_RANGE, 0, self.room));
        let undone = self.file.set_len(self.room + self.size).and_then(|()| Ok(collapse()?));
        let Err(failure) = undone else { return error };
        // From now on every commit refuses the fragment.
        let _ = entries::mark_unfinished(&self.file);
        let text = format!(
            "{error}; after that {:?} could not be restored ({failure}): discard the snapshot and write it again",
            self.path
        );
        Error::with_source(Kind::State, text, error)
    }
}

#[cfg(test)]
mod tests;
