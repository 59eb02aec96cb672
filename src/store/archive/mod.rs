//! A snapshot in one file, an archive: section 7 of `docs/format.md`.
//!
//! ```text
//! assemble.rs  a staged directory becomes an archive
//! member.rs  one member: its headers, written and parsed
//! layout.rs  the places of all members, computed from the manifest
//! front.rs   the beginning of an archive, up to the end of the manifest
//! check.rs   everything between the contents, compared with the layout
//! rekey.rs   other key metadata
//! scan.rs    the members by their headers, for a reader without the key
//! ```

pub(crate) mod assemble;
mod check;
pub(crate) mod front;
pub(crate) mod layout;
pub(crate) mod member;
mod rekey;
mod scan;

use std::fs::File;
use std::io::{self, BufReader, ErrorKind, Read};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use rustix::fs::{FileType, Mode, OFlags};
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::Head;
use crate::error::{Error, Result};
use crate::location::LocalPath;
use crate::manifest::Manifest;
use crate::name::SnapshotPath;
use crate::stored_file::StoredFile;
use crate::threads::Interrupt;
use front::{Front, FrontShape};
use layout::Layout;
use member::{Member, foreign};
use scan::Scan;

/// A snapshot that is an archive. A serialized handle opens the file again when it is needed.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct Archive {
    location: LocalPath,
    #[serde(skip)]
    opened: Arc<OnceLock<Opened>>,
}

/// The open file. Another file may be put in its place meanwhile; a reader stays with this one.
struct Opened {
    file: File,
    size: u64,
    shape: FrontShape,
    /// The places of all fragments: computed by a reader with the manifest, read from the headers by one without.
    layout: OnceLock<Layout>,
    scan: OnceLock<Scan>,
}

impl Archive {
    pub(crate) fn new(location: LocalPath) -> Self {
        Self { location, opened: Arc::default() }
    }

    pub(crate) fn location(&self) -> &LocalPath {
        &self.location
    }

    /// Reads `enc_metadata` and the manifest.
    pub(crate) fn head(&self) -> Result<Head> {
        let front = if let Some(opened) = self.opened.get() {
            self.front(&opened.file)?
        } else {
            let (file, size) = open_regular(self.location.path()).map_err(|error| error.context(self.cannot_open()))?;
            let front = self.front(&file)?;
            let (layout, scan) = (OnceLock::new(), OnceLock::new());
            self.opened.get_or_init(|| Opened { file, size, shape: front.shape, layout, scan });
            front
        };
        Ok(Head { key_metadata: Ok(front.key_metadata), manifest: Ok(Some(front.manifest)) })
    }

    fn front(&self, file: &File) -> Result<Front> {
        let mut cursor = BufReader::with_capacity(64 << 10, Cursor { file, at: 0 });
        Front::read(&mut cursor, &mut Interrupt::new(&mut || Ok(()))).map_err(|error| error.context(self.cannot_open()))
    }

    fn cannot_open(&self) -> String {
        format!("cannot open the snapshot {}", self.location)
    }

    fn opened(&self) -> Result<&Opened> {
        if self.opened.get().is_none() {
            self.head()?;
        }
        self.opened.get().ok_or_else(|| Error::corrupt("it was not opened"))
    }

    /// Removes the file.
    pub(crate) fn remove(&self) -> Result<()> {
        std::fs::remove_file(self.location.path())
            .map_err(|error| Error::io(format!("cannot remove the snapshot {}", self.location), error))
    }

    /// Checks that the file is as long as an archive with this manifest, and computes the places of its members.
    pub(crate) fn settle(&self, manifest: &Manifest) -> Result<()> {
        let opened = self.opened()?;
        let context = |error: Error| error.context(self.cannot_open());
        let layout = opened.layout(manifest).map_err(context)?;
        if layout.total_bytes() != opened.size {
            return Err(context(wrong_length(opened.size, layout.total_bytes())));
        }
        Ok(())
    }

    /// Opens a fragment. Its headers must be the computed ones, or without a manifest, those that a scan accepts.
    pub(crate) fn object(&self, path: &SnapshotPath, manifest: Option<&Manifest>) -> Result<StoredFile> {
        let opened = self.opened()?;
        let place = |error: Error| error.context(format!("{path} of {}", self.location));
        let (start, size) = if let Some(manifest) = manifest {
            if opened.layout.get().is_none() {
                self.settle(manifest)?;
            }
            let member = opened.layout(manifest)?.fragment(path.as_str()).ok_or_else(|| place(absent()))?;
            opened.check_headers(&member).map_err(place)?;
            (member.data().start, member.size)
        } else {
            opened.scan().map_err(place)?.fragment(path.as_str()).ok_or_else(|| place(absent()))?
        };
        let file = opened.file.try_clone().map_err(|error| place(Error::io("cannot be opened", error)))?;
        Ok(StoredFile::of_range(file, start, size))
    }
}

impl Opened {
    fn layout(&self, manifest: &Manifest) -> Result<&Layout> {
        if let Some(layout) = self.layout.get() {
            return Ok(layout);
        }
        let layout = self.shape.layout(manifest)?;
        Ok(self.layout.get_or_init(|| layout))
    }

    fn scan(&self) -> Result<&Scan> {
        if let Some(scan) = self.scan.get() {
            return Ok(scan);
        }
        let scan = Scan::of(&self.file, self.size, &self.shape)?;
        Ok(self.scan.get_or_init(|| scan))
    }

    fn check_headers(&self, member: &Member<'_>) -> Result<()> {
        let expected = member.headers();
        let mut headers = vec![0; expected.len()];
        let read = read_at_most(&self.file, &mut headers, member.start)
            .map_err(|error| Error::io("its headers cannot be read", error))?;
        if read < headers.len() || headers != expected { Err(foreign(member.start)) } else { Ok(()) }
    }
}

/// Opens the file of an archive to read it; returns it and its size. Anything but a regular file is refused.
pub(crate) fn open_regular(path: &Path) -> Result<(File, u64)> {
    // Non-blocking: opening a FIFO would wait for a writer.
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = rustix::fs::open(path, flags, Mode::empty()).map_err(|errno| Error::io("it cannot be opened", errno))?;
    let stat = rustix::fs::fstat(&file).map_err(|errno| Error::io("it cannot be examined", errno))?;
    match FileType::from_raw_mode(stat.st_mode) {
        FileType::RegularFile => {
            let size = u64::try_from(stat.st_size).map_err(|_| Error::corrupt("it has a negative size"))?;
            Ok((file.into(), size))
        }
        FileType::Directory => Err(Error::corrupt("it is a directory, not an archive: open it as it is")),
        _ => Err(Error::invalid_argument("it is not a regular file: pass it as a stream")),
    }
}

/// The error for a file of another length than its manifest implies.
fn wrong_length(size: u64, expected: u64) -> Error {
    let reason = if size < expected { "it is truncated" } else { "something was added to it" };
    Error::corrupt(format!("it is {size} bytes long, but its manifest implies {expected} bytes: {reason}"))
}

fn absent() -> Error {
    Error::io("does not exist", Errno::NOENT)
}

/// Fills `buf` from `offset`; returns the number of bytes, which is less only at the end of the file.
fn read_at_most(file: &File, buf: &mut [u8], offset: u64) -> io::Result<usize> {
    let mut done = 0;
    while done < buf.len() {
        match file.read_at(&mut buf[done..], offset + done as u64) {
            Ok(0) => break,
            Ok(count) => done += count,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}

/// Reads a file in order, without its position, which other processes may share.
struct Cursor<'a> {
    file: &'a File,
    at: u64,
}

impl Read for Cursor<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let count = self.file.read_at(buf, self.at)?;
        self.at += count as u64;
        Ok(count)
    }
}
