//! Writes the contents of an archive as a directory.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::Path;

use crate::error::{Error, Result};
use crate::fragment::checked_copy::{Input, Output, copy_checked};
use crate::key::KeyPayload;
use crate::location::{LocalPath, Location};
use crate::manifest::{Manifest, SealId};
use crate::name::SnapshotPath;
use crate::snapshot::{SnapshotOptions, key_metadata, not_durable, open_manifest};
use crate::store::Draft;
use crate::store::archive::front::{Front, truncated};
use crate::store::archive::layout::Layout;
use crate::store::archive::member::{BLOCK_BYTES, END, END_BYTES, MemberKind, foreign};
use crate::store::archive::open_regular;
use crate::store::directory::{StagedDirectory, entries};
use crate::store::pipe::{self, Pipe};
use crate::stored_file::StoredFile;
use crate::threads::{self, Interrupt};

impl SnapshotOptions {
    /// Unpacks an archive into a new directory, which is complete or absent, and has the same seal digest. Every byte of
    /// the archive is checked, for which an encrypted one needs its key. Returns the snapshot's id and seal digest.
    ///
    /// # Errors
    ///
    /// [`Error::is_corrupt`] if `archive` is not an archive, or is damaged or truncated, [`Error::is_authentication`] if
    /// the key is wrong or something encrypted is damaged, [`Error::is_key_unavailable`] if the key is missing,
    /// [`Error::is_io`] if something exists at `location` or the disk is full, and the errors of
    /// [`SnapshotOptions::open`]. After an error nothing is left behind, with one exception: if only the last sync fails,
    /// the snapshot is complete and in place, and the error's text says so.
    pub fn unpack(&self, archive: impl AsRef<Path>, location: impl AsRef<Path>) -> Result<SealId> {
        self.unpack_interruptible(archive, location, &mut || Ok(()))
    }

    /// Unpacks an archive as [`SnapshotOptions::unpack`] does, and calls `interrupt` while that takes time.
    pub(crate) fn unpack_interruptible(
        &self,
        archive: impl AsRef<Path>,
        location: impl AsRef<Path>,
        interrupt: &mut dyn FnMut() -> Result<()>,
    ) -> Result<SealId> {
        let archive = Location::new(archive.as_ref())?.local("unpacking")?;
        let source = open_archive(&archive).map_err(|error| error.context(cannot_unpack(&archive)))?;
        self.unpack_source(source, &archive, location.as_ref(), interrupt)
    }

    /// Unpacks an archive as [`SnapshotOptions::unpack`] does, from a stream: a pipe, a socket, a file. The stream is
    /// read in order, and must end after the archive.
    ///
    /// # Errors
    ///
    /// The errors of [`SnapshotOptions::unpack`], and [`Error::is_io`] if the stream cannot be read.
    pub fn unpack_from(&self, stream: &mut dyn Read, location: impl AsRef<Path>) -> Result<SealId> {
        self.unpack_from_interruptible(stream, location, &mut || Ok(()))
    }

    /// Unpacks a stream as [`SnapshotOptions::unpack_from`] does, and calls `interrupt` while that takes time.
    pub(crate) fn unpack_from_interruptible(
        &self,
        stream: &mut dyn Read,
        location: impl AsRef<Path>,
        interrupt: &mut dyn FnMut() -> Result<()>,
    ) -> Result<SealId> {
        self.unpack_source(Source::Stream(stream), &"the stream", location.as_ref(), interrupt)
    }

    /// Unpacks from an open file, usually a pipe, which is read in order.
    #[cfg_attr(not(feature = "python"), allow(dead_code, reason = "the Python package unpacks open files"))]
    pub(crate) fn unpack_file(
        &self,
        file: File,
        location: impl AsRef<Path>,
        interrupt: &mut dyn FnMut() -> Result<()>,
    ) -> Result<SealId> {
        self.unpack_from_interruptible(&mut Pipe::new(file), location, interrupt)
    }

    fn unpack_source(
        &self,
        source: Source<'_>,
        name: &dyn fmt::Display,
        location: &Path,
        interrupt: &mut dyn FnMut() -> Result<()>,
    ) -> Result<SealId> {
        let location = Location::new(location)?.local("unpacking")?;
        let failed = |error: Error| error.context(cannot_unpack(name));
        StagedDirectory::check(&location)?;
        entries::check_new(location.path()).map_err(failed)?;
        let threads = threads::resolve(self.threads)?;
        // Checked for a plain snapshot too, so that a wrong argument is reported at once.
        self.credentials.unwrapper()?;
        let mut unpacking = Unpacking::open(self, source, name, threads, interrupt).map_err(|error| {
            let why = ", whose fragments are checked with the key (tar unpacks it, and checks nothing)";
            let why = if error.is_key_unavailable() { why } else { "" };
            error.context(format!("{}{why}", cannot_unpack(name)))
        })?;
        let (placed, ()) = StagedDirectory::filled(location.clone(), |staged| {
            unpacking.write(staged, &mut Interrupt::new(interrupt))?;
            let Unpacking { manifest, front, .. } = &unpacking;
            if self.durable {
                let fragments: Vec<_> = manifest.fragments.keys().map(String::as_str).collect();
                let namespaces = manifest.namespaces.iter().map(|path| &**path);
                let interrupt = &mut Interrupt::new(interrupt);
                staged.directory().sync(fragments.into_iter(), namespaces, threads, interrupt)?;
            }
            staged.publish(&front.manifest, self.durable, interrupt)
        })
        .map_err(failed)?;
        if self.durable {
            placed.sync_entry().map_err(|errno| not_durable(&location, errno))?;
        }
        Ok(unpacking.id)
    }
}

fn cannot_unpack(name: &dyn fmt::Display) -> String {
    format!("cannot unpack {name}")
}

fn open_archive(archive: &LocalPath) -> Result<Source<'static>> {
    let (file, size) = open_regular(archive.path())?;
    Ok(Source::File { file: StoredFile::of_size(file, size), position: 0 })
}

/// An archive, read in order. The contents of the fragments of a file are read by all threads.
enum Source<'a> {
    Stream(&'a mut dyn Read),
    File { file: StoredFile, position: u64 },
}

impl Source<'_> {
    /// The input of a fragment, which is next.
    fn fragment(&mut self, size: u64) -> Input<'_> {
        match self {
            Self::Stream(stream) => Input::Stream(*stream),
            Self::File { file, position } => {
                let start = *position;
                *position += size;
                Input::At(file, start)
            }
        }
    }
}

impl Read for Source<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Stream(stream) => stream.read(buf),
            Self::File { file, position } => {
                let read = std::os::unix::fs::FileExt::read_at(&**file, buf, *position)?;
                *position += read as u64;
                Ok(read)
            }
        }
    }
}

/// An archive of which the beginning was read.
struct Unpacking<'a> {
    source: Source<'a>,
    front: Front,
    payload: Option<KeyPayload>,
    manifest: Manifest,
    layout: Layout,
    id: SealId,
    threads: usize,
}

impl<'a> Unpacking<'a> {
    fn open(
        options: &SnapshotOptions,
        mut source: Source<'a>,
        name: &dyn fmt::Display,
        threads: usize,
        interrupt: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Self> {
        let front = Front::read(&mut source, &mut Interrupt::new(interrupt))?;
        if !front.padding_is_zero {
            return Err(Error::corrupt("the padding at the beginning of the archive is not zero"));
        }
        let payload = key_metadata::unlock(name, front.key_metadata.clone(), options, interrupt)?;
        let (manifest, seal_digest) = open_manifest::decode_sealed(name, &front.manifest, payload.as_ref())?;
        open_manifest::expect(name, &seal_digest, options)?;
        let layout = front.shape.layout(&manifest)?;
        // Before anything is written, if the length is known.
        if let Source::File { file, .. } = &source {
            if file.size() < layout.total_bytes() {
                return Err(truncated(file.size()));
            }
            if file.size() > layout.total_bytes() {
                return Err(trailing(layout.total_bytes()));
            }
        }
        let id = SealId { snapshot_id: manifest.snapshot_id, seal_digest };
        Ok(Self { source, front, payload, manifest, layout, id, threads })
    }

    /// Writes everything but the manifest, and reads to the end of the source.
    fn write(&mut self, staged: &StagedDirectory, interrupt: &mut Interrupt<'_>) -> Result<()> {
        let draft = Draft::Staged(staged.directory().clone());
        if let Some(bytes) = &self.front.key_metadata {
            draft.write_key_metadata(bytes)?;
        }
        for member in self.layout.members_after_manifest() {
            let headers = member.headers();
            if !is_next(&mut self.source, &headers, member.start, interrupt)? {
                return Err(foreign(member.start));
            }
            let path = SnapshotPath::try_from(member.path.to_owned())?;
            match member.kind {
                MemberKind::Namespace => draft.add_namespace(&path)?,
                MemberKind::File => self.manifest.fragments.get(member.path).map_or_else(
                    || Err(foreign(member.start)),
                    |entry| {
                        let object = draft.create(&path, None)?;
                        let input = self.source.fragment(member.size);
                        let key = self.payload.as_ref().map(KeyPayload::data_key);
                        copy_checked(input, Output::At(&*object, 0), &path, entry, key, self.threads, interrupt)
                            // Batches of zeros were not written.
                            .and_then(|()| object.set_size(entry.stored_size))
                            .and_then(|()| object.finish(interrupt))
                            .map_err(|error| error.context(&path))
                    },
                )?,
            }
            let padding = usize::try_from(member.end() - member.data().end).unwrap_or(0);
            if !is_next(&mut self.source, &[0; BLOCK_BYTES][..padding], member.data().end, interrupt)? {
                return Err(Error::corrupt(format!("the padding after {path} is not zero")));
            }
        }
        let end = self.layout.total_bytes();
        if !is_next(&mut self.source, &END, end - END_BYTES, interrupt)? {
            return Err(Error::corrupt("the last 1,024 bytes of the archive are not zero"));
        }
        if pipe::read_full(&mut self.source, &mut [0], interrupt)? != 0 {
            return Err(trailing(end));
        }
        Ok(())
    }
}

/// Whether the next bytes of a source, which begin at `offset`, are the expected ones.
fn is_next(source: &mut Source<'_>, expected: &[u8], offset: u64, interrupt: &mut Interrupt<'_>) -> Result<bool> {
    let mut bytes = vec![0; expected.len()];
    let read = pipe::read_full(source, &mut bytes, interrupt)?;
    if read < bytes.len() {
        return Err(truncated(offset + read as u64));
    }
    Ok(bytes == expected)
}

/// The error for an archive that does not end where it should.
fn trailing(end: u64) -> Error {
    Error::corrupt(format!("there are bytes after the end of the archive at {end}: something was appended to it"))
}
