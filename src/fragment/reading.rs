//! `FragmentReader`: a fragment being read.

use std::fmt;
use std::io::{self, Read, Seek, SeekFrom};
use std::ops::Range;
use std::sync::Arc;

use super::digest::Digest;
use super::encrypted_source::EncryptedSource;
use super::place::{FragmentPlace, aad};
use super::plain;
use crate::buffer;
use crate::cipher::SecretKey;
use crate::error::{Error, Result};
use crate::manifest::{Entry, Manifest, Proof};
use crate::name::SnapshotPath;
use crate::process::OwnerProcess;
use crate::store::Store;
use crate::store::bytes::ReadAt;
use crate::threads::Interrupt;

/// The size of each read when a whole fragment is read.
const READ_THROUGH_BYTES: usize = 8 << 20;

/// A fragment being read: at any offset with [`FragmentReader::read_at`], or in order with [`Read`] and [`Seek`].
///
/// `read_at` takes `&self`, and many threads may call it at once; a large read uses several threads by itself. A clone
/// reads the same open file and has its own position.
///
/// Opening an encrypted fragment verifies its header and its last segment, and so its length; in an object store, the
/// header and the length in the manifest. Every other segment is verified before any of its bytes are returned. In a process that was forked after the opening, every call fails.
///
/// ```
/// use std::io::{Read, Seek, SeekFrom, Write};
///
/// # let folder = tempfile::tempdir()?;
/// let key = vmsnap::SecretKey::generate()?;
/// let options = vmsnap::SnapshotOptions::new().key(key);
/// let mut fragment = options.create_in_place(folder.path().join("vm1"))?.raw_fragment("sda")?;
/// fragment.write_all(b"the whole disk")?;
/// fragment.finish()?;
///
/// let mut reader = options.open(folder.path().join("vm1"))?.raw_fragment("sda")?;
/// let mut word = [0; 5];
/// assert_eq!(reader.read_at(4, &mut word)?, 5);
/// assert_eq!(&word, b"whole");
/// reader.seek(SeekFrom::End(-4))?;
/// let mut rest = String::new();
/// reader.read_to_string(&mut rest)?;
/// assert_eq!(rest, "disk");
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct FragmentReader {
    file: Arc<OpenFile>,
    position: u64,
    /// Where the last read in order ended.
    read_end: Option<u64>,
    /// The decrypted chunk of the last small read in order; the next read usually continues in it.
    current: Option<(u64, Vec<u8>)>,
}

struct OpenFile {
    object: Arc<dyn ReadAt>,
    /// How the object is decrypted; `None` for a plain fragment.
    encrypted: Option<Box<EncryptedSource>>,
    threads: usize,
    place: FragmentPlace,
    owner: OwnerProcess,
}

impl FragmentReader {
    /// Opens a fragment, which must be the one that the manifest lists, if there is a manifest.
    pub(crate) fn open(
        store: &Store,
        path: &SnapshotPath,
        key: Option<&SecretKey>,
        threads: usize,
        manifest: Option<&Manifest>,
        interrupt: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Self> {
        let place = FragmentPlace::new(store.location(), path);
        let expected = manifest.and_then(|manifest| manifest.fragments.get(path.as_str()));
        let object = store.object(path, manifest).map_err(|error| match expected {
            Some(_) if error.is_not_found() => Error::corrupt("is missing, but the manifest lists it").context(&place),
            _ => error,
        })?;
        Self::of_object(object, place, key, threads, expected, &mut Interrupt::new(interrupt))
    }

    /// Opens a fragment whose stored bytes are `object`; `expected` is its manifest entry.
    pub(crate) fn of_object(
        object: Arc<dyn ReadAt>,
        place: FragmentPlace,
        key: Option<&SecretKey>,
        threads: usize,
        expected: Option<&Entry>,
        interrupt: &mut Interrupt<'_>,
    ) -> Result<Self> {
        let stored_size = object.size();
        if let Some(entry) = expected.filter(|entry| entry.stored_size != stored_size) {
            let text = format!("is {stored_size} bytes long, but the manifest says {} bytes", entry.stored_size);
            return Err(Error::corrupt(text).context(&place));
        }
        let encrypted = match key {
            None => None,
            Some(key) => {
                let source = EncryptedSource::open(&object, key, &aad(&place.path), expected, interrupt)
                    .map_err(|error| error.context(&place))?;
                Some(Box::new(source))
            }
        };
        let file = Arc::new(OpenFile { object, encrypted, threads, place, owner: OwnerProcess::current() });
        Ok(Self { file, position: 0, read_end: None, current: None })
    }

    /// The length of the fragment, in bytes of plaintext.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.file.encrypted.as_ref().map_or_else(|| self.file.object.size(), |source| source.size())
    }

    /// The length of the file.
    #[must_use]
    pub fn stored_size(&self) -> u64 {
        self.file.object.size()
    }

    /// The chunk size: the least that a read decrypts; `None` for a plain fragment.
    #[must_use]
    pub fn chunk_size_bytes(&self) -> Option<usize> {
        self.file.encrypted.as_ref().map(|source| source.chunk_size_bytes())
    }

    /// Whether reads leave no page of the file in the page cache.
    pub(crate) fn set_uncached(&self, uncached: bool) {
        self.file.object.set_uncached(uncached);
    }

    /// Whether a read may take a request to another machine.
    pub(crate) fn is_remote(&self) -> bool {
        self.file.object.is_remote()
    }

    /// Says that a range is read soon, in order.
    pub(crate) fn prefetch(&self, range: Range<u64>) {
        match &self.file.encrypted {
            None => self.file.object.prefetch(range),
            Some(source) => source.prefetch(range),
        }
    }

    /// Drops the pages that uncached reads left in the page cache.
    pub(crate) fn drop_rest(&self) {
        self.file.object.drop_rest();
    }

    /// The manifest entry of an encrypted fragment; `None` for a plain one, which must be read for it.
    pub(crate) fn encrypted_entry(&self) -> Option<Entry> {
        self.file.encrypted.as_ref().map(|source| Entry {
            size: source.size(),
            stored_size: self.stored_size(),
            proof: Proof::HeaderTag { chunk_size_bytes: source.chunk_size_bytes() as u64, tag: source.header_tag() },
        })
    }

    /// Reads from `offset`, in bytes of plaintext, until `buf` is full or the fragment ends; returns the number of
    /// bytes.
    ///
    /// # Errors
    ///
    /// [`Error::is_authentication`] if a segment does not verify; [`Error::is_io`] if the file cannot be read;
    /// [`Error::is_state`] in a forked process. After an error, `buf` is filled with zeros.
    pub fn read_at(&self, offset: u64, buf: &mut [u8]) -> Result<usize> {
        self.read_at_interruptible(offset, buf, &mut || Ok(()))
    }

    /// Reads like [`FragmentReader::read_at`], and calls `interrupt` from time to time, at most every 50 ms. If it
    /// returns an error, the read stops.
    ///
    /// # Errors
    ///
    /// The errors of `read_at` and of `interrupt`.
    pub fn read_at_interruptible(
        &self,
        offset: u64,
        buf: &mut [u8],
        interrupt: &mut dyn FnMut() -> Result<()>,
    ) -> Result<usize> {
        self.read_at_by(self.file.threads, offset, buf, &mut Interrupt::new(interrupt))
    }

    /// Reads like [`FragmentReader::read_at`], only on the calling thread, which may be one of several that share the
    /// work.
    pub(crate) fn read_at_alone(&self, offset: u64, buf: &mut [u8], interrupt: &mut Interrupt<'_>) -> Result<usize> {
        self.read_at_by(1, offset, buf, interrupt)
    }

    /// Returns an error in a forked child, where a lock may be held forever.
    pub(crate) fn check_owner(&self) -> Result<()> {
        self.file.owner.check_fragment().map_err(|error| error.context(&self.file.place))
    }

    fn read_at_by(&self, threads: usize, offset: u64, buf: &mut [u8], interrupt: &mut Interrupt<'_>) -> Result<usize> {
        let file = &*self.file;
        let length = usize::try_from(self.size().saturating_sub(offset)).map_or(buf.len(), |rest| rest.min(buf.len()));
        let wanted = &mut buf[..length];
        let result = file.owner.check_fragment().and_then(|()| match &file.encrypted {
            None => plain::read(&*file.object, offset, wanted, threads, interrupt),
            Some(source) => source.read(offset, wanted, threads, interrupt),
        });
        match result {
            Ok(()) => Ok(length),
            Err(error) => {
                // A failed read returns no plaintext, not even of segments that did verify.
                buf.fill(0);
                Err(error.context(&file.place))
            }
        }
    }

    /// Reads the whole fragment in order through `buffer`, which grows as needed.
    pub(crate) fn read_through(
        &self,
        buffer: &mut Vec<u8>,
        interrupt: &mut dyn FnMut() -> Result<()>,
        mut take: impl FnMut(&[u8]) -> Result<()>,
    ) -> Result<()> {
        let wanted = usize::try_from(self.size()).map_or(READ_THROUGH_BYTES, |size| size.min(READ_THROUGH_BYTES));
        // Whole chunks, because a partial one would be decrypted twice.
        let wanted = self.chunk_size_bytes().map_or(wanted, |chunk| wanted.next_multiple_of(chunk));
        buffer::at_least(buffer, wanted).map_err(|error| error.context(&self.file.place))?;
        let mut offset = 0;
        while offset < self.size() {
            self.prefetch(offset..self.size());
            let read = self.read_at_interruptible(offset, &mut buffer[..wanted], interrupt)?;
            take(&buffer[..read])?;
            offset += read as u64;
            interrupt()?;
        }
        Ok(())
    }

    /// The BLAKE3 of the whole fragment.
    pub(crate) fn blake3(&self, buffer: &mut Vec<u8>, interrupt: &mut dyn FnMut() -> Result<()>) -> Result<[u8; 32]> {
        let mut digest = Digest::default();
        self.read_through(buffer, interrupt, |batch| {
            digest.update_with(batch, self.file.threads, &mut Interrupt::new(&mut || Ok(())), |_, _, _| Ok(()))
        })?;
        Ok(digest.finish())
    }

    /// The rest of the fragment, read in order. Reads call `interrupt` while they take time.
    pub(crate) fn interruptible(self, interrupt: &mut dyn FnMut() -> Result<()>) -> impl Read + use<'_> {
        InterruptibleReader { fragment: self, interrupt }
    }

    /// Reads from the current position until `buf` is full or the fragment ends.
    pub(crate) fn read_interruptible(
        &mut self,
        buf: &mut [u8],
        interrupt: &mut dyn FnMut() -> Result<()>,
    ) -> Result<usize> {
        let start = self.position;
        if self.read_end == Some(start) {
            // Perhaps all of it is read, perhaps not.
            self.prefetch(start..self.size().min(start.saturating_add(READ_THROUGH_BYTES as u64)));
        }
        let result = self.read_on(buf, interrupt);
        self.read_end = Some(self.position);
        if result.is_err() {
            // Undo the whole call. A failed read returns no plaintext, not even of segments that did verify.
            self.position = start;
            buf.fill(0);
        }
        result
    }

    fn read_on(&mut self, buf: &mut [u8], interrupt: &mut dyn FnMut() -> Result<()>) -> Result<usize> {
        let mut done = 0;
        while done < buf.len() && self.position < self.size() {
            let rest = &mut buf[done..];
            let read = match self.chunk_size_bytes() {
                Some(chunk_size_bytes) => self.read_chunks(rest, chunk_size_bytes, interrupt)?,
                None => self.read_at_interruptible(self.position, rest, interrupt)?,
            };
            self.position += read as u64;
            done += read;
        }
        Ok(done)
    }

    /// Reads whole chunks directly into `buf`, or a part of a chunk through the current chunk.
    fn read_chunks(
        &mut self,
        buf: &mut [u8],
        chunk_size_bytes: usize,
        interrupt: &mut dyn FnMut() -> Result<()>,
    ) -> Result<usize> {
        let chunk_size = chunk_size_bytes as u64;
        let start = self.position - self.position % chunk_size;
        let whole = buf.len() - buf.len() % chunk_size_bytes;
        if start == self.position && whole > 0 {
            return self.read_at_interruptible(self.position, &mut buf[..whole], interrupt);
        }
        // In a forked child, bytes from memory are not returned either.
        self.file.owner.check_fragment().map_err(|error| error.context(&self.file.place))?;
        if self.current.as_ref().is_none_or(|(held, _)| *held != start) {
            let mut chunk = self.current.take().map(|(_, chunk)| chunk).unwrap_or_default();
            let length =
                usize::try_from(self.size() - start).map_or(chunk_size_bytes, |rest| rest.min(chunk_size_bytes));
            buffer::fit(&mut chunk, length).map_err(|error| error.context(&self.file.place))?;
            self.read_at_interruptible(start, &mut chunk, interrupt)?;
            self.current = Some((start, chunk));
        }
        let held = self.current.as_ref().map_or(&[][..], |(_, chunk)| chunk);
        let from = usize::try_from(self.position - start).unwrap_or(usize::MAX);
        let length = buf.len().min(held.len() - from);
        buf[..length].copy_from_slice(&held[from..from + length]);
        Ok(length)
    }
}

impl Clone for FragmentReader {
    fn clone(&self) -> Self {
        Self { file: Arc::clone(&self.file), position: self.position, read_end: None, current: None }
    }
}

/// A fragment that is read in order, with calls of an interrupt.
struct InterruptibleReader<'a> {
    fragment: FragmentReader,
    interrupt: &'a mut dyn FnMut() -> Result<()>,
}

impl Read for InterruptibleReader<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        Ok(self.fragment.read_interruptible(buf, self.interrupt)?)
    }
}

impl Read for FragmentReader {
    /// Reads until `buf` is full or the fragment ends.
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        Ok(self.read_interruptible(buf, &mut || Ok(()))?)
    }
}

impl Seek for FragmentReader {
    /// A position beyond the end is allowed; a read there returns 0.
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let target = match to {
            SeekFrom::Start(offset) => Some(offset),
            SeekFrom::Current(delta) => self.position.checked_add_signed(delta),
            SeekFrom::End(delta) => self.size().checked_add_signed(delta),
        };
        self.position = target.ok_or_else(|| {
            Error::invalid_argument(format!("{}: cannot seek to a position before its start", self.file.place))
        })?;
        Ok(self.position)
    }
}

impl fmt::Debug for FragmentReader {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FragmentReader")
            .field("place", &self.file.place.to_string())
            .field("size", &self.size())
            .field("position", &self.position)
            .finish_non_exhaustive()
    }
}
