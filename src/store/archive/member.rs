//! One member of an archive: where it begins, and the bytes of its headers.
//!
//! The headers follow from five values, so a reader never relies on a header: it computes the headers and compares.

use std::borrow::Cow;
use std::ops::Range;
use std::str;

use crate::error::{Error, Kind, Result};
use crate::name::{self, KEY_METADATA, MANIFEST, shown};

/// All headers and all data are filled to whole blocks.
pub(crate) const BLOCK_BYTES: usize = 512;

/// The bytes of [`global_header`].
pub(crate) const GLOBAL_HEADER_BYTES: usize = 2 * BLOCK_BYTES;

/// The zero bytes after the last member.
pub(crate) const END: [u8; 1024] = [0; 1024];
pub(crate) const END_BYTES: u64 = END.len() as u64;

/// A longer path is not stored in an archive, so that a reader without the key can bound the headers it reads. Paths
/// of a directory have no such limit, because vmsnap opens them name by name.
pub(crate) const MAX_PATH_BYTES: usize = 1 << 20;

/// The data of the manifest begin at a multiple of this, which leaves `enc_metadata` room to grow.
const MANIFEST_ALIGNMENT: usize = 65_536;

/// The data of a fragment with as many stored bytes as this begin at a multiple of [`LARGE_ALIGNMENT`].
const LARGE_BYTES: u64 = 65_536;

/// The alignment of large fragments: direct I/O and reflinks require it.
pub(crate) const LARGE_ALIGNMENT: usize = 4096;

/// The longest pax header: a path, and twice the largest alignment.
const MAX_PAX_BYTES: usize = MAX_PATH_BYTES + 2 * MANIFEST_ALIGNMENT;

/// A shorter record `comment` is not written: it would not have room for its length and its keyword.
const MIN_COMMENT_BYTES: usize = 20;

/// The greatest size of a file: offsets of the operating system are signed.
const MAX_ARCHIVE_BYTES: u64 = i64::MAX.unsigned_abs();

/// The least size that does not fit into 11 octal digits.
const FIRST_BINARY_SIZE: u64 = 1 << 33;

/// The greatest time of 11 octal digits.
pub(crate) const MAX_MTIME: u64 = (1 << 33) - 1;

/// The name in the ustar header of a member whose path is in a pax record.
const NAME_IN_PAX: &str = "vmsnap";

/// The bytes of the field for the name in a ustar header.
const NAME_BYTES: usize = 100;

/// The types of headers.
const GLOBAL: u8 = b'g';
const PAX: u8 = b'x';
const FILE: u8 = b'0';
const NAMESPACE: u8 = b'5';

/// The two blocks at the beginning of every archive.
pub(crate) fn global_header() -> [u8; GLOBAL_HEADER_BYTES] {
    let mut blocks = [b' '; GLOBAL_HEADER_BYTES];
    blocks[..BLOCK_BYTES].copy_from_slice(&ustar(GLOBAL, "pax_global_header", BLOCK_BYTES as u64, 0));
    put(&mut blocks, BLOCK_BYTES, b"512 comment=vmsnap archive 1");
    blocks[GLOBAL_HEADER_BYTES - 1] = b'\n';
    blocks
}

/// Whether a member has data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MemberKind {
    /// A fragment, the manifest or `enc_metadata`.
    File,
    Namespace,
}

/// The parts of an archive, in the order of the file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Section {
    KeyMetadata,
    Manifest,
    Namespaces,
    SmallFragments,
    LargeFragments,
}

/// A member of an archive. [`Member::new`] and [`Member::parse`] check that it ends within the limits of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Member<'a> {
    /// The path in the snapshot.
    pub(crate) path: &'a str,
    pub(crate) kind: MemberKind,
    /// The number of bytes of data, 0 for a namespace.
    pub(crate) size: u64,
    /// Unix time.
    pub(crate) mtime: u64,
    /// The offset of its first header.
    pub(crate) start: u64,
}

impl<'a> Member<'a> {
    /// A member that begins at `start`.
    ///
    /// # Errors
    ///
    /// - `Corrupt` if the archive would be longer than a file can be, which only a forged manifest can ask for.
    /// - `Unsupported` if the path has more than [`MAX_PATH_BYTES`].
    pub(crate) fn new(path: &'a str, kind: MemberKind, size: u64, mtime: u64, start: u64) -> Result<Self> {
        if path.len() > MAX_PATH_BYTES {
            let text = format!("the path {} has {} bytes; an archive has paths of at most ", shown(path), path.len());
            return Err(Error::new(Kind::Unsupported, format!("{text}{MAX_PATH_BYTES} bytes: use shorter names")));
        }
        let longest = (2 * BLOCK_BYTES + MAX_PAX_BYTES) as u64;
        let end = start.checked_add(longest).and_then(|data| data.checked_add(size)?.checked_add(BLOCK_BYTES as u64));
        if end.is_none_or(|end| end > MAX_ARCHIVE_BYTES - END_BYTES) {
            let text = format!("{} would end beyond 2^63 - 1, the greatest size of a file", shown(path));
            return Err(Error::corrupt(text));
        }
        Ok(Self { path, kind, size, mtime, start })
    }

    /// The place of the data in the archive.
    pub(crate) fn data(&self) -> Range<u64> {
        let data = self.start + self.headers_bytes() as u64;
        data..data + self.size
    }

    /// The place of the next member: after the data and the zero bytes that fill the last block.
    pub(crate) fn end(&self) -> u64 {
        self.data().end.next_multiple_of(BLOCK_BYTES as u64)
    }

    /// The number of bytes of all headers, which is computed without the headers.
    pub(crate) fn headers_bytes(&self) -> usize {
        BLOCK_BYTES + self.pax_bytes().map_or(0, |bytes| BLOCK_BYTES + bytes)
    }

    /// All headers: the pax header, if there is one, and the ustar header.
    pub(crate) fn headers(&self) -> Vec<u8> {
        let mut headers = Vec::with_capacity(self.headers_bytes());
        let name = self.name();
        let is_in_pax = is_in_pax(&name);
        if let Some(bytes) = self.pax_bytes() {
            headers.extend(ustar(PAX, "vmsnap.pax", bytes as u64, self.mtime));
            if is_in_pax {
                extend_with_record(&mut headers, "path", &name);
            }
            if self.has_binary_size() {
                extend_with_record(&mut headers, "size", &self.size.to_string());
            }
            let end = BLOCK_BYTES + bytes;
            if headers.len() < end {
                headers.extend(format!("{} comment=", end - headers.len()).bytes());
                headers.resize(end - 1, b' ');
                headers.push(b'\n');
            }
        }
        let flag = if self.kind == MemberKind::Namespace { NAMESPACE } else { FILE };
        headers.extend(ustar(flag, if is_in_pax { NAME_IN_PAX } else { &name }, self.size, self.mtime));
        headers
    }

    /// The number of bytes of all pax records, unless the member does not need a pax header.
    fn pax_bytes(&self) -> Option<usize> {
        let needed = self.needed_bytes();
        let alignment = self.alignment();
        let start = usize::try_from(self.start % alignment as u64).unwrap_or(0);
        if needed == 0 && (start + BLOCK_BYTES).is_multiple_of(alignment) {
            return None;
        }
        let least = needed.next_multiple_of(BLOCK_BYTES).max(BLOCK_BYTES);
        let data = start + 2 * BLOCK_BYTES + least;
        let mut bytes = least + (data.next_multiple_of(alignment) - data);
        while bytes != needed && bytes - needed < MIN_COMMENT_BYTES {
            bytes += alignment;
        }
        Some(bytes)
    }

    /// The number of bytes of the pax records without which the member cannot be described.
    fn needed_bytes(&self) -> usize {
        let name = self.name();
        let path = if is_in_pax(&name) { record_bytes("path", name.len()) } else { 0 };
        let size = if self.has_binary_size() { record_bytes("size", digits_of(self.size)) } else { 0 };
        path + size
    }

    fn alignment(&self) -> usize {
        match self.section() {
            Section::KeyMetadata | Section::Namespaces | Section::SmallFragments => BLOCK_BYTES,
            Section::Manifest => MANIFEST_ALIGNMENT,
            Section::LargeFragments => LARGE_ALIGNMENT,
        }
    }

    /// The members of an archive are in ascending order of this value, without two that are equal.
    pub(crate) fn order(&self) -> (Section, &'a str) {
        (self.section(), self.path)
    }

    pub(crate) fn section(&self) -> Section {
        match (self.kind, self.path) {
            (MemberKind::Namespace, _) => Section::Namespaces,
            (MemberKind::File, KEY_METADATA) => Section::KeyMetadata,
            (MemberKind::File, MANIFEST) => Section::Manifest,
            (MemberKind::File, _) if is_large(self.size) => Section::LargeFragments,
            (MemberKind::File, _) => Section::SmallFragments,
        }
    }

    fn has_binary_size(&self) -> bool {
        self.size >= FIRST_BINARY_SIZE
    }

    /// The path as tar programs write it.
    fn name(&self) -> Cow<'a, str> {
        match self.kind {
            MemberKind::File => self.path.into(),
            MemberKind::Namespace => format!("{}/", self.path).into(),
        }
    }

    /// Takes the values from `headers`, of a length that [`headers_bytes_from`] returned, and compares the computed
    /// headers with them.
    ///
    /// # Errors
    ///
    /// `Corrupt` if they are not exactly the headers of a member that begins at `start`, or if a snapshot cannot have
    /// such a path.
    pub(crate) fn parse(start: u64, headers: &'a [u8]) -> Result<Self> {
        Self::values_in(start, headers)
            // The length is compared first, because the computed headers can be longer than those that were read.
            .filter(|member| member.headers_bytes() == headers.len() && member.headers() == headers)
            .ok_or_else(|| foreign(start))
    }

    fn values_in(start: u64, headers: &'a [u8]) -> Option<Self> {
        let (rest, block) = headers.split_last_chunk::<BLOCK_BYTES>()?;
        let name = match rest.get(BLOCK_BYTES..).and_then(path_in) {
            Some(path) => path,
            None => block[..NAME_BYTES].split(|byte| *byte == 0).next()?,
        };
        let name = str::from_utf8(name).ok()?;
        let (path, kind) = match name.strip_suffix('/') {
            Some(path) => (path, MemberKind::Namespace),
            None => (name, MemberKind::File),
        };
        let is_own_file = kind == MemberKind::File && (path == KEY_METADATA || path == MANIFEST);
        if !is_own_file {
            path.split('/').try_for_each(name::check).ok()?;
        }
        let (size, mtime) = (number_in(&block[124..136])?, number_in(&block[136..148])?);
        if kind == MemberKind::Namespace && size != 0 {
            return None;
        }
        Self::new(path, kind, size, mtime, start).ok()
    }
}

/// Whether a fragment with this stored size is among the large ones, which are aligned and come last.
pub(crate) fn is_large(stored_size: u64) -> bool {
    stored_size >= LARGE_BYTES
}

/// Returns the number of bytes of all headers of the member that begins with the block `first`, or `None` if the block
/// consists of zeros, as after the last member. The block itself is not checked.
///
/// # Errors
///
/// `Corrupt` if the headers are longer than those of any member.
pub(crate) fn headers_bytes_from(start: u64, first: &[u8; BLOCK_BYTES]) -> Result<Option<usize>> {
    if first.iter().all(|byte| *byte == 0) {
        return Ok(None);
    }
    if first[156] != PAX {
        return Ok(Some(BLOCK_BYTES));
    }
    number_in(&first[124..136])
        .and_then(|bytes| usize::try_from(bytes).ok())
        .filter(|bytes| *bytes <= MAX_PAX_BYTES && bytes.is_multiple_of(BLOCK_BYTES))
        .map(|bytes| Some(2 * BLOCK_BYTES + bytes))
        .ok_or_else(|| foreign(start))
}

/// The error for headers that are not the computed ones.
pub(crate) fn foreign(start: u64) -> Error {
    let text = format!(
        "the headers at offset {start} are not those of a vmsnap archive: it is damaged, or another program wrote it; \
         unpack it with tar and open the directory"
    );
    Error::corrupt(text)
}

fn ustar(flag: u8, name: &str, size: u64, mtime: u64) -> [u8; BLOCK_BYTES] {
    let mut block = [0; BLOCK_BYTES];
    put(&mut block, 0, name.as_bytes());
    put(&mut block, 100, if flag == NAMESPACE { b"0000700" } else { b"0000600" });
    for number in [108, 116, 329, 337] {
        put(&mut block, number, b"0000000"); // uid, gid, devmajor, devminor
    }
    if size < FIRST_BINARY_SIZE {
        put(&mut block, 124, format!("{size:011o}").as_bytes());
    } else {
        block[124] = 0x80;
        put(&mut block, 128, &size.to_be_bytes());
    }
    put(&mut block, 136, format!("{mtime:011o}").as_bytes());
    put(&mut block, 148, b"        ");
    block[156] = flag;
    put(&mut block, 257, b"ustar\x0000");
    let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
    put(&mut block, 148, format!("{sum:06o}\0").as_bytes());
    block
}

fn put(block: &mut [u8], offset: usize, bytes: &[u8]) {
    block[offset..offset + bytes.len()].copy_from_slice(bytes);
}

/// The number in a field of 12 bytes: octal, or binary from 8 GiB on.
fn number_in(field: &[u8]) -> Option<u64> {
    match field.split_last_chunk() {
        Some(([0x80, 0, 0, 0], number)) => Some(u64::from_be_bytes(*number)),
        _ => u64::from_str_radix(str::from_utf8(field.strip_suffix(b"\0")?).ok()?, 8).ok(),
    }
}

/// Whether the name does not fit the ustar header, or tar programs differ over its encoding there.
fn is_in_pax(name: &str) -> bool {
    name.len() > NAME_BYTES || !name.is_ascii()
}

fn extend_with_record(records: &mut Vec<u8>, keyword: &str, value: &str) {
    let bytes = record_bytes(keyword, value.len());
    records.extend(format!("{bytes} {keyword}={value}\n").bytes());
}

/// The least number of bytes of a record, of which its own digits are a part.
fn record_bytes(keyword: &str, value_bytes: usize) -> usize {
    let rest = keyword.len() + value_bytes + " =\n".len();
    let mut bytes = rest;
    // The sum of `rest` and its own digits grows until it has as many digits as were counted.
    while bytes != rest + digits_of(bytes as u64) {
        bytes = rest + digits_of(bytes as u64);
    }
    bytes
}

fn digits_of(number: u64) -> usize {
    number.to_string().len()
}

/// The value of the record `path`, if the records begin with one.
fn path_in(records: &[u8]) -> Option<&[u8]> {
    let space = records.iter().take(digits_of(MAX_PAX_BYTES as u64) + 1).position(|byte| *byte == b' ')?;
    let bytes: usize = str::from_utf8(&records[..space]).ok()?.parse().ok()?;
    records.get(space..bytes.checked_sub(1)?)?.strip_prefix(b" path=")
}

#[cfg(test)]
mod tests;
