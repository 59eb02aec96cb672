//! Writes a sealed snapshot as an archive.

use std::fs::File;
use std::io::Write;
use std::path::Path;

use super::sealed::SealedSnapshot;
use crate::durability;
use crate::error::{Error, Result};
use crate::fragment::checked_copy::{Input, Output, copy_checked};
use crate::location::{LocalPath, Location};
use crate::manifest::SealId;
use crate::snapshot::{SnapshotOptions, not_durable};
use crate::store::Store;
use crate::store::archive::assemble::{Frame, clonable};
use crate::store::archive::layout::Layout;
use crate::store::archive::member::{BLOCK_BYTES, END, Member, MemberKind, global_header};
use crate::store::bytes::WriteAt;
use crate::store::directory::{StagedDirectory, entries};
use crate::store::pipe::{self, Pipe};
use crate::stored_file::StoredFile;
use crate::threads::{Interrupt, for_each};

/// Each thread copies a fragment up to this size alone; all threads copy a larger one together.
const MAX_SMALL_FRAGMENT_BYTES: u64 = 4 << 20;

impl SnapshotOptions {
    /// Packs the sealed snapshot at `location` into one new file, an archive: an uncompressed tar file that vmsnap reads
    /// without unpacking it. The file is complete or absent, and nothing is overwritten. Every fragment is checked
    /// while it is copied. Packing a snapshot again gives the same bytes. Returns the snapshot's id and seal digest.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let path = folder.path().join("vm1");
    /// let options = vmsnap::SnapshotOptions::new();
    /// let mut staged = options.create(&path)?;
    /// staged.writer().write_fragment("clock", &12_u64)?;
    /// let id = staged.commit()?;
    /// let archive = folder.path().join("vm1.vmsnap.tar");
    /// assert_eq!(options.pack(&path, &archive)?, id);
    ///
    /// let copy = folder.path().join("copy");
    /// assert_eq!(options.unpack(&archive, &copy)?, id);
    /// assert_eq!(options.open(&copy)?.read_fragment::<u64>("clock")?, 12);
    /// # Ok::<(), vmsnap::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// [`Error::is_not_sealed`] if the snapshot is not sealed, [`Error::is_corrupt`] or [`Error::is_authentication`] if
    /// it differs from its manifest, or contains anything that the manifest does not list, [`Error::is_io`] if something
    /// exists at `archive` or the disk is full, [`Error::is_unsupported_format`] if a path has more than 2^20 bytes, and
    /// the errors of [`SnapshotOptions::open`]. After an error nothing is left behind, with one exception: if only the
    /// last sync fails, the archive is complete and in place, and the error's text says so.
    pub fn pack(&self, location: impl AsRef<Path>, archive: impl AsRef<Path>) -> Result<SealId> {
        self.pack_interruptible(location, archive, &mut || Ok(()))
    }

    /// Packs a snapshot as [`SnapshotOptions::pack`] does, and calls `interrupt` while that takes time.
    pub(crate) fn pack_interruptible(
        &self,
        location: impl AsRef<Path>,
        archive: impl AsRef<Path>,
        interrupt: &mut dyn FnMut() -> Result<()>,
    ) -> Result<SealId> {
        let location = Location::new(location.as_ref())?.local("packing")?;
        let target = Location::new(archive.as_ref())?.local("packing")?;
        let failed = |error: Error| error.context(cannot_pack(&location));
        StagedDirectory::check(&target)?;
        entries::check_new(target.path()).map_err(failed)?;
        refuse_inside(&location, &target)?;
        let packing = Packing::open(self, location.clone(), interrupt).map_err(failed)?;
        let (placed, ()) = StagedDirectory::filled(target.clone(), |staged| {
            let archive = staged.create_archive()?;
            packing.write_file(archive, self.durable, &mut Interrupt::new(interrupt))?;
            staged.place_archive()
        })
        .map_err(failed)?;
        placed.finish_archive(self.durable).map_err(|errno| not_durable(&target, errno))?;
        Ok(packing.sealed.id)
    }

    /// Packs the sealed snapshot at `location` as [`SnapshotOptions::pack`] does, into a stream: a pipe, a socket, a
    /// file. The stream is written in order.
    ///
    /// ```
    /// # let folder = tempfile::tempdir()?;
    /// # let path = folder.path().join("vm1");
    /// let options = vmsnap::SnapshotOptions::new();
    /// let id = options.create(&path)?.commit()?;
    /// let mut stream = Vec::new();
    /// options.pack_to(&path, &mut stream)?;
    /// assert_eq!(options.unpack_from(&mut &stream[..], folder.path().join("copy"))?, id);
    /// # Ok::<(), vmsnap::Error>(())
    /// ```
    ///
    /// # Errors
    ///
    /// The errors of [`SnapshotOptions::pack`], and [`Error::is_io`] if the stream cannot be written. After an error the
    /// stream ends before the end of the archive, so that unpacking it fails.
    pub fn pack_to(&self, location: impl AsRef<Path>, stream: &mut dyn Write) -> Result<SealId> {
        self.pack_to_interruptible(location, stream, &mut || Ok(()))
    }

    /// Packs into a stream as [`SnapshotOptions::pack_to`] does, and calls `interrupt` while that takes time.
    pub(crate) fn pack_to_interruptible(
        &self,
        location: impl AsRef<Path>,
        stream: &mut dyn Write,
        interrupt: &mut dyn FnMut() -> Result<()>,
    ) -> Result<SealId> {
        let location = Location::new(location.as_ref())?.local("packing")?;
        let failed = |error: Error| error.context(cannot_pack(&location));
        let packing = Packing::open(self, location.clone(), interrupt).map_err(failed)?;
        packing.write_stream(stream, &mut Interrupt::new(interrupt)).map_err(failed)?;
        Ok(packing.sealed.id)
    }

    /// Packs into an open file, usually a pipe, which is written in order.
    #[cfg_attr(not(feature = "python"), allow(dead_code, reason = "the Python package packs into open files"))]
    pub(crate) fn pack_to_file(
        &self,
        location: impl AsRef<Path>,
        file: File,
        interrupt: &mut dyn FnMut() -> Result<()>,
    ) -> Result<SealId> {
        self.pack_to_interruptible(location, &mut Pipe::new(file), interrupt)
    }
}

fn cannot_pack(location: &LocalPath) -> String {
    format!("cannot pack the snapshot {location}")
}

/// Refuses an archive that would be in the snapshot itself.
fn refuse_inside(location: &LocalPath, target: &LocalPath) -> Result<()> {
    let real = |path: &Path| std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let parent = real(target.path().parent().unwrap_or(target.path()));
    if parent.starts_with(real(location.path())) {
        let text = format!("{target} is in the snapshot {location}: write the archive to another directory");
        return Err(Error::invalid_argument(text));
    }
    Ok(())
}

/// A sealed snapshot that becomes an archive.
struct Packing {
    sealed: SealedSnapshot,
    layout: Layout,
}

impl Packing {
    fn open(options: &SnapshotOptions, location: LocalPath, interrupt: &mut dyn FnMut() -> Result<()>) -> Result<Self> {
        let sealed = SealedSnapshot::open(options, Store::at_path(location), interrupt)?;
        let key_metadata_bytes = sealed.key_metadata.as_ref().map(|bytes| bytes.len() as u64);
        let layout = Layout::new(&sealed.manifest, key_metadata_bytes, sealed.stored_manifest.len() as u64)?;
        sealed.check_whole(interrupt)?;
        Ok(Self { sealed, layout })
    }

    /// Writes the archive into a new file, at offsets.
    fn write_file(&self, archive: File, durable: bool, interrupt: &mut Interrupt<'_>) -> Result<()> {
        let archive = StoredFile::of_size(archive, self.layout.total_bytes());
        let (key_metadata, manifest) = (self.sealed.key_metadata.as_deref(), &self.sealed.stored_manifest[..]);
        let frame = Frame { layout: &self.layout, key_metadata, manifest };
        frame.write(&archive, interrupt).map_err(|error| error.context("the archive"))?;

        let is_small = |member: &Member<'_>| member.size <= MAX_SMALL_FRAGMENT_BYTES;
        let mut workers = vec![(); self.sealed.threads];
        for_each(&mut workers, self.layout.fragments().filter(is_small), interrupt, |(), member, interrupt| {
            self.copy_to_file(&member, &archive, 1, interrupt)
        })?;
        for member in self.layout.fragments().filter(|member| !is_small(member)) {
            self.copy_to_file(&member, &archive, self.sealed.threads, interrupt)?;
        }
        if durable {
            durability::sync_file(&archive).map_err(|error| error.context("cannot sync the archive"))?;
        }
        interrupt.check_now()
    }

    /// Copies a fragment. If the archive can share its blocks, the shared bytes are checked.
    fn copy_to_file(
        &self,
        member: &Member<'_>,
        archive: &StoredFile,
        threads: usize,
        interrupt: &mut Interrupt<'_>,
    ) -> Result<()> {
        let start = member.data().start;
        self.sealed.with_fragment(member.path, |path, entry, source| {
            let key = self.sealed.data_key();
            let shared = clonable(entry.stored_size);
            if shared.is_empty() || !source.clone_range(shared.clone(), archive, start) {
                let (input, output) = (Input::At(source, 0), Output::At(archive, start));
                return copy_checked(input, output, path, entry, key, threads, interrupt);
            }
            // Less than a block.
            let mut rest = vec![0; usize::try_from(entry.stored_size - shared.end).unwrap_or(0)];
            source.read_exact_at(&mut rest, shared.end, interrupt)?;
            archive.write_all_at(&rest, start + shared.end, interrupt)?;
            copy_checked(Input::At(archive, start), Output::Nowhere, path, entry, key, threads, interrupt)
        })
    }

    /// Writes the archive into a stream, in order.
    fn write_stream(&self, stream: &mut dyn Write, interrupt: &mut Interrupt<'_>) -> Result<()> {
        let key = self.sealed.data_key();
        pipe::write_all(stream, &global_header(), interrupt)?;
        for member in self.layout.members() {
            pipe::write_all(stream, &member.headers(), interrupt)?;
            if self.layout.key_metadata() == Some(member) {
                pipe::write_all(stream, self.sealed.key_metadata.as_deref().unwrap_or_default(), interrupt)?;
            } else if self.layout.manifest() == member {
                pipe::write_all(stream, &self.sealed.stored_manifest, interrupt)?;
            } else if member.kind == MemberKind::File {
                self.sealed.with_fragment(member.path, |path, entry, source| {
                    let (input, output) = (Input::At(source, 0), Output::Stream(stream));
                    copy_checked(input, output, path, entry, key, self.sealed.threads, interrupt)
                })?;
            }
            let padding = usize::try_from(member.end() - member.data().end).unwrap_or(0);
            pipe::write_all(stream, &[0; BLOCK_BYTES][..padding], interrupt)?;
        }
        pipe::write_all(stream, &END, interrupt)?;
        stream.flush().map_err(|error| Error::io("the stream cannot be written", error))
    }
}
