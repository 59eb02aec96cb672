//! Other key metadata in an archive.
//!
//! A write into the file in its place could be torn by a power failure, and the key would be lost. So a new file takes
//! its place. Where the file system can, it shares all blocks behind the manifest with the old one.

use std::os::unix::fs::MetadataExt;

use rustix::fs::{Gid, Mode, Uid, fchmod, fchown};

use super::assemble::copy;
use super::member::{GLOBAL_HEADER_BYTES, Member, MemberKind, global_header};
use super::{Archive, Opened};
use crate::durability;
use crate::error::{Error, Kind, Result};
use crate::location::Location;
use crate::name::{KEY_METADATA, MANIFEST};
use crate::store::bytes::WriteAt;
use crate::store::directory::StagedDirectory;
use crate::stored_file::StoredFile;
use crate::threads::Interrupt;

impl Archive {
    /// Replaces the key metadata: at any moment, also after a crash, the old or the new archive is in place.
    pub(crate) fn replace_key_metadata(&self, wrapped: &[u8], interrupt: &mut dyn FnMut() -> Result<()>) -> Result<()> {
        let context = |error: Error| error.context(format!("cannot replace {KEY_METADATA} of {}", self.location));
        // The file itself is replaced, not a link to it.
        let path = self.location.path().canonicalize().map_err(|error| context(Error::io("cannot be found", error)))?;
        let target = Location::new(&path)?;
        let opened = self.opened()?;
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
        archive.set_len(self.size - old + new).map_err(failed)?;
        archive.write_all_at(&global_header(), 0, interrupt)?;
        for member in [key_metadata, manifest] {
            archive.write_all_at(&member.headers(), member.start, interrupt)?;
        }
        archive.write_all_at(wrapped, key_metadata.data().start, interrupt)?;
        let source = self.file.try_clone().map_err(failed)?;
        copy(&StoredFile::of_size(source, self.size), old..self.size, archive, new, interrupt)?;
        let metadata = self.file.metadata().map_err(failed)?;
        // Only root can give a file away.
        let _ = fchown(&**archive, Some(Uid::from_raw(metadata.uid())), Some(Gid::from_raw(metadata.gid())));
        fchmod(&**archive, Mode::from_raw_mode(metadata.mode() & 0o777)).map_err(|errno| failed(errno.into()))
    }

    fn padded_manifest_bytes(&self) -> u64 {
        self.shape.manifest_bytes.next_multiple_of(super::member::BLOCK_BYTES as u64)
    }
}
