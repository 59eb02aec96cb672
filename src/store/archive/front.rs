//! The beginning of an archive: everything up to the end of the manifest.

use std::io::Read;

use super::layout::Layout;
use super::member::{BLOCK_BYTES, GLOBAL_HEADER_BYTES, Member, MemberKind, global_header, headers_bytes_from};
use crate::buffer;
use crate::error::{Error, Result};
use crate::manifest::{MAX_MANIFEST_BYTES, Manifest};
use crate::name::{KEY_METADATA, MANIFEST, MAX_KEY_METADATA_BYTES};
use crate::store::pipe;
use crate::threads::Interrupt;

/// Every tar file has these bytes at this offset.
const MAGIC: &[u8] = b"ustar";
const MAGIC_OFFSET: usize = 257;

/// `enc_metadata` and the manifest, as they are stored in an archive.
#[derive(Debug)]
pub(crate) struct Front {
    pub(crate) key_metadata: Option<Vec<u8>>,
    pub(crate) manifest: Vec<u8>,
    pub(crate) shape: FrontShape,
    /// Whether the bytes that fill the last blocks are zero. Readers may ignore them; verification and unpacking do not.
    pub(crate) padding_is_zero: bool,
}

/// The sizes from which the places of all other members follow, with the manifest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FrontShape {
    key_metadata_bytes: Option<u64>,
    pub(crate) manifest_bytes: u64,
    /// The time in the headers.
    pub(crate) mtime: u64,
    /// The offset of the first member after the manifest.
    pub(crate) end: u64,
}

/// The error for a file or stream that begins with these bytes and is not an archive. The caller names it.
fn not_an_archive(beginning: &[u8]) -> Error {
    let is_tar = beginning.get(MAGIC_OFFSET..).is_some_and(|bytes| bytes.starts_with(MAGIC));
    if !beginning.is_empty() && global_header().starts_with(beginning) {
        return truncated(beginning.len() as u64);
    }
    Error::corrupt(if beginning.is_empty() {
        "it is empty, so it is not a vmsnap archive"
    } else if is_tar && beginning.starts_with(&global_header()[..BLOCK_BYTES]) {
        "it is not a vmsnap archive of version 1: a later version, or damaged"
    } else if is_tar {
        "it is a tar file of another program, not a vmsnap archive: unpack it with tar"
    } else {
        "it is a file, but not a vmsnap archive"
    })
}

impl Front {
    /// Reads the beginning of a stream.
    ///
    /// # Errors
    ///
    /// `Corrupt` if it is not the beginning of an archive, or too short.
    pub(crate) fn read(stream: &mut dyn Read, interrupt: &mut Interrupt<'_>) -> Result<Self> {
        let mut beginning = [0; GLOBAL_HEADER_BYTES];
        let read = pipe::read_full(stream, &mut beginning, interrupt)?;
        if beginning != global_header() {
            return Err(not_an_archive(&beginning[..read]));
        }
        let mut cursor = Cursor { stream, at: GLOBAL_HEADER_BYTES as u64, padding_is_zero: true, interrupt };
        let (mut name, mut mtime, mut data) = cursor.member()?;
        let mut key_metadata = None;
        if name == KEY_METADATA {
            let key_mtime = mtime;
            key_metadata = Some(data);
            (name, mtime, data) = cursor.member()?;
            if mtime != key_mtime {
                return Err(Error::corrupt(format!("{KEY_METADATA} has another time than {MANIFEST}")));
            }
        }
        if name != MANIFEST {
            return Err(Error::corrupt(format!("{name} is at the place of {MANIFEST}")));
        }
        let shape = FrontShape {
            key_metadata_bytes: key_metadata.as_ref().map(|bytes| bytes.len() as u64),
            manifest_bytes: data.len() as u64,
            mtime,
            end: cursor.at,
        };
        Ok(Self { key_metadata, manifest: data, shape, padding_is_zero: cursor.padding_is_zero })
    }
}

impl FrontShape {
    /// The layout of the archive, if `manifest` is its manifest.
    pub(crate) fn layout(&self, manifest: &Manifest) -> Result<Layout> {
        let layout = Layout::new(manifest, self.key_metadata_bytes, self.manifest_bytes)?;
        if layout.manifest().mtime != self.mtime {
            return Err(Error::corrupt(format!("the time of {MANIFEST} is not the time at which it was created")));
        }
        Ok(layout)
    }
}

/// Reads members in the order of the archive.
struct Cursor<'a, 'b> {
    stream: &'a mut dyn Read,
    at: u64,
    padding_is_zero: bool,
    interrupt: &'a mut Interrupt<'b>,
}

impl Cursor<'_, '_> {
    /// Reads a file at the root of the snapshot: its name, its time and its data.
    fn member(&mut self) -> Result<(&'static str, u64, Vec<u8>)> {
        let start = self.at;
        let mut headers = self.bytes(BLOCK_BYTES)?;
        let first = headers.first_chunk().ok_or_else(|| truncated(start))?;
        let length = headers_bytes_from(start, first)?.ok_or_else(|| truncated(start))?;
        headers.append(&mut self.bytes(length.saturating_sub(BLOCK_BYTES))?);
        let member = Member::parse(start, &headers)?;
        let (name, most) = match member.path {
            KEY_METADATA => (KEY_METADATA, MAX_KEY_METADATA_BYTES),
            MANIFEST => (MANIFEST, MAX_MANIFEST_BYTES),
            other => return Err(Error::corrupt(format!("{other:?} is before {MANIFEST}"))),
        };
        if member.kind != MemberKind::File || member.size > most {
            return Err(Error::corrupt(format!("{name} is {} bytes long; the limit is {most}", member.size)));
        }
        let (size, end, mtime) = (member.size, member.end(), member.mtime);
        let data = self.bytes(usize::try_from(size).unwrap_or(usize::MAX))?;
        let padding = self.bytes(usize::try_from(end - self.at).unwrap_or(usize::MAX))?;
        self.padding_is_zero &= padding.iter().all(|byte| *byte == 0);
        Ok((name, mtime, data))
    }

    /// Reads the next bytes. Memory grows with the bytes that were read, not with the size in a header.
    fn bytes(&mut self, length: usize) -> Result<Vec<u8>> {
        const STEP_BYTES: usize = 1 << 20;
        let mut bytes = Vec::new();
        while bytes.len() < length {
            let done = bytes.len();
            let step = (length - done).min(STEP_BYTES);
            buffer::reserve(&mut bytes, step)?;
            bytes.resize(done + step, 0);
            if pipe::read_full(self.stream, &mut bytes[done..], self.interrupt)? < step {
                return Err(truncated(self.at + done as u64));
            }
        }
        self.at += length as u64;
        Ok(bytes)
    }
}

/// The error for an archive that ends at some place after `at`.
pub(crate) fn truncated(at: u64) -> Error {
    Error::corrupt(format!("it ends soon after byte {at}, before the end of the archive: it is truncated"))
}
