//! Other key metadata in an archive.
//!
//! A write into the file in its place could be torn by a power failure, and the key would be lost. So a new file takes
//! its place. Where the file system can, it shares all blocks behind the manifest with the old one.

use std::fs::File;
use std::os::unix::fs::MetadataExt;

use rustix::fs::{FlockOperation, Gid, Mode, Uid, XattrFlags, fchmod, fchown, fgetxattr, flock, fsetxattr, fstat};
use rustix::io::Errno;

use super::assemble::copy;
use super::front::truncated;
use super::member::{GLOBAL_HEADER_BYTES, Member, MemberKind, global_header};
use super::{Archive, Opened};
use crate::durability;
use crate::error::{Error, Kind, Result};
use crate::location::LocalPath;
use crate::name::{KEY_METADATA, MANIFEST};
use crate::store::bytes::WriteAt;
use crate::store::directory::StagedDirectory;
use crate::stored_file::StoredFile;
use crate::threads::Interrupt;

/// The access list of a file, in the form of `acl(5)`.
const ACCESS_LIST: &str = "system.posix_acl_access";
/// The most bytes of an attribute of a file (`XATTR_SIZE_MAX` of linux/limits.h).
const MAX_ACCESS_LIST_BYTES: usize = 64 << 10;

impl Archive {
    /// Replaces the key metadata: at any moment, also after a crash, the old or the new archive is in place.
    pub(crate) fn replace_key_metadata(&self, wrapped: &[u8], interrupt: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        let context = |error: Error| error.context(format!("cannot replace {KEY_METADATA} of {}", self.location));
        // The file itself is replaced, not a link to it.
        let path = self.location.path().canonicalize().map_err(|error| context(Error::io("cannot be found", error)))?;
        let target = LocalPath::new(&path)?;
        let opened = self.opened()?;
        // Of two at once, the second finds another file in place. The lock ends with the file.
        if let Err(Errno::WOULDBLOCK) = flock(&opened.file, FlockOperation::NonBlockingLockExclusive) {
            return Err(context(Error::new(
                Kind::State,
                "it is replaced by another process at this moment; try again",
            )));
        }
        let (placed, ()) = StagedDirectory::filled(target, |staged| {
            let archive = StoredFile::new(staged.create_archive()?);
            opened.write_with(wrapped, &archive, &mut Interrupt::new(interrupt))?;
            durability::sync_file(&archive)?;
            let is_there = path.metadata().is_ok_and(|there| {
                opened.file.metadata().is_ok_and(|own| (own.dev(), own.ino()) == (there.dev(), there.ino()))
            });
            if !is_there {
                return Err(Error::new(Kind::State, "another file was put in its place meanwhile; try again"));
            }
            staged.replace_by_archive()
        })
        .map_err(context)?;
        placed.finish_archive(true).map_err(|errno| context(Error::io("its directory cannot be synced", errno)))
    }
}

impl Opened {
    /// Writes the archive with other key metadata, and the owner and mode of this one.
    fn write_with(&self, wrapped: &[u8], archive: &StoredFile, interrupt: &mut Interrupt<'_>) -> Result<()> {
        let failed = |error: std::io::Error| Error::io("cannot be written", error);
        let member = |name, size, start| Member::new(name, MemberKind::File, size, self.shape.mtime, start);
        let key_metadata = member(KEY_METADATA, wrapped.len() as u64, GLOBAL_HEADER_BYTES as u64)?;
        let manifest = member(MANIFEST, self.shape.manifest_bytes, key_metadata.end())?;
        // Every member after it keeps its distance to the manifest, whose alignment is a multiple of every other.
        let (old, new) = (self.shape.end - self.padded_manifest_bytes(), manifest.data().start);
        let rest = self.size.checked_sub(old).ok_or_else(|| truncated(self.size))?;
        archive.set_len(new + rest).map_err(failed)?;
        archive.write_all_at(&global_header(), 0, interrupt)?;
        for member in [key_metadata, manifest] {
            archive.write_all_at(&member.headers(), member.start, interrupt)?;
        }
        archive.write_all_at(wrapped, key_metadata.data().start, interrupt)?;
        let source = self.file.try_clone().map_err(failed)?;
        copy(&StoredFile::of_size(source, self.size), old..self.size, archive, new, interrupt)?;
        keep_access(&self.file, archive).map_err(|errno| failed(errno.into()))
    }

    fn padded_manifest_bytes(&self) -> u64 {
        self.shape.manifest_bytes.next_multiple_of(super::member::BLOCK_BYTES as u64)
    }
}

/// Gives the new file the owner, group, access list and mode of the old one, as far as the process may. Nobody gets
/// access that he did not have.
fn keep_access(old: &File, new: &File) -> std::result::Result<(), Errno> {
    let stat = fstat(old)?;
    // Only root can give a file away, and others only to a group of their own.
    let _ = fchown(new, Some(Uid::from_raw(stat.st_uid)), None);
    let _ = fchown(new, None, Some(Gid::from_raw(stat.st_gid)));
    let mut mode = Mode::from_raw_mode(stat.st_mode & 0o777);
    let mut list = vec![0; MAX_ACCESS_LIST_BYTES];
    let has_kept_list = match fgetxattr(old, ACCESS_LIST, &mut list) {
        Ok(length) => fsetxattr(new, ACCESS_LIST, &list[..length], XattrFlags::empty()).is_ok(),
        // The file does not have a list, or its file system does not have lists.
        Err(Errno::NODATA | Errno::NOTSUP) => true,
        Err(_) => false,
    };
    if fstat(new)?.st_gid != stat.st_gid || !has_kept_list {
        mode -= Mode::RWXG | Mode::RWXO;
    }
    fchmod(new, mode)
}
