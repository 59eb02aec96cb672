//! A copy of the stored bytes of a fragment, checked against its manifest entry on the way, by all threads.
//!
//! The bytes of the copy are the bytes of the original: the ciphertext of an encrypted fragment stays as it is, and its
//! plaintext is dropped after the check of each segment. Where neither side is a stream, each thread reads, checks and
//! writes a batch while it is in the cache. A stream is read or written in order, by the calling thread alone, a window
//! at a time; meanwhile the others wait.

use std::io::{Read, Write};
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use super::batches::batch_bytes;
use super::digest::{SUBTREE_BYTES, subtree};
use super::place::aad;
use super::positioned::Collected;
use crate::buffer;
use crate::cipher::{
    Decryption, Decryptor, HEADER_BYTES, SEGMENT_OVERHEAD_BYTES, SecretKey, check_declared_chunk_size, header_tag,
    message_prefix, segment_size,
};
use crate::error::{Error, Kind, Result};
use crate::manifest::{Entry, Proof};
use crate::name::SnapshotPath;
use crate::store::bytes::{ReadAt, WriteAt};
use crate::store::pipe;
use crate::threads::{Interrupt, for_each, lock};
use crate::zeros::is_zero;

/// The bytes of a stream that are in memory at a time, for each thread: enough batches that all threads are busy.
const WINDOW_BYTES_PER_THREAD: usize = 2 << 20;

/// The source of a copy.
pub(crate) enum Input<'a> {
    /// An object, and the offset of the fragment in it. Its holes are not read.
    At(&'a dyn ReadAt, u64),
    /// A stream whose next bytes are the fragment. The bytes after them are left unread.
    ///
    /// A call that waits should end with `ErrorKind::Interrupted` after a while, as those of
    /// [`Pipe`](crate::store::pipe::Pipe) do. Then, and after a signal, the interrupt is checked at once and the call is
    /// repeated.
    Stream(&'a mut dyn Read),
}

/// The destination of a copy.
pub(crate) enum Output<'a> {
    /// A new object, and the offset of the fragment in it. If the object is sparse, batches of zeros are not written,
    /// and its owner must set its size.
    At(&'a dyn WriteAt, u64),
    /// A stream, which should not wait too long either.
    Stream(&'a mut dyn Write),
    /// The fragment is only checked.
    Nowhere,
}

/// Copies the stored bytes of a fragment, and checks them against `entry`, which a decoded manifest has for `path`.
///
/// A segment is checked before it is written. The digest of a plain fragment is known only at the end; after an error
/// the caller must discard the output.
///
/// # Errors
///
/// `Corrupt` if the fragment is shorter than the entry says, has another header, or its digest differs;
/// `Authentication` if a segment does not verify; `KeyUnavailable` if the fragment is encrypted and `key` is `None`;
/// the errors of the input, the output and the interrupt. They do not name the fragment; the caller adds its place.
pub(crate) fn copy_checked(
    mut input: Input<'_>,
    mut output: Output<'_>,
    path: &SnapshotPath,
    entry: &Entry,
    key: Option<&SecretKey>,
    threads: usize,
    interrupt: &mut Interrupt<'_>,
) -> Result<()> {
    if let Input::At(source, start) = &input
        && start.checked_add(entry.stored_size).is_none_or(|end| source.size() < end)
    {
        return Err(too_short(entry));
    }
    let check = match (&entry.proof, key) {
        (Proof::Blake3(_), _) => Check::Plain { size: entry.size, collected: Mutex::default() },
        (Proof::HeaderTag { .. }, None) => {
            return Err(Error::new(Kind::KeyUnavailable, "is encrypted, and cannot be checked without the key"));
        }
        (Proof::HeaderTag { chunk_size_bytes, tag }, Some(key)) => {
            let mut header = [0; HEADER_BYTES];
            match &mut input {
                Input::At(source, start) => source.read_exact_at(&mut header, *start, interrupt)?,
                Input::Stream(stream) => read_exact(*stream, &mut header, entry, interrupt)?,
            }
            check_declared_chunk_size(header)?;
            let prefix = usize::try_from(*chunk_size_bytes).map(message_prefix).unwrap_or_default();
            if !header.starts_with(&prefix) || header_tag(&header) != *tag {
                return Err(Error::corrupt("differs from the manifest: it was changed or swapped"));
            }
            let decryption = Decryption::start(key, &aad(path), header, entry.stored_size)?;
            match &mut output {
                Output::At(sink, start) => sink.write_all_at(&header, *start, interrupt)?,
                Output::Stream(stream) => pipe::write_all(*stream, &header, interrupt)?,
                Output::Nowhere => {}
            }
            Check::Encrypted(Box::new(decryption))
        }
    };
    copy_body(&check, check.header_bytes()..entry.stored_size, entry, input, output, threads, interrupt)?;
    check.finish(&entry.proof)
}

/// Copies everything behind the header; `range` is in the stored bytes of the fragment.
fn copy_body(
    check: &Check,
    range: Range<u64>,
    entry: &Entry,
    mut input: Input<'_>,
    mut output: Output<'_>,
    threads: usize,
    interrupt: &mut Interrupt<'_>,
) -> Result<()> {
    let batch_bytes = batch_bytes(check.unit_bytes());
    let length = range.end - range.start;
    let batches = length.div_ceil(batch_bytes as u64);
    let workers = usize::try_from(batches).map_or(threads, |batches| threads.min(batches));
    let mut workers = buffer::collect((0..workers).map(|_| check.worker()))?;

    let source = if let Input::At(source, start) = &input { Some((*source, *start)) } else { None };
    let sink = if let Output::At(sink, start) = &output { Some((*sink, *start)) } else { None };
    let copy_batch = |worker: &mut Worker, offset: u64, batch: &mut [u8], interrupt: &mut Interrupt<'_>| {
        if let Some((source, start)) = source {
            source.prefetch(start + offset..start + range.end);
            read_batch(source, start + offset, batch, interrupt)?;
        }
        check.batch(worker, offset, batch)?;
        match sink {
            Some((sink, start)) if !(sink.is_sparse() && is_zero(batch)) => {
                sink.write_all_at(batch, start + offset, interrupt)
            }
            _ => Ok(()),
        }
    };

    if source.is_some() && !matches!(output, Output::Stream(_)) {
        let offsets = (0..batches).map(|number| range.start + number * batch_bytes as u64);
        return for_each(&mut workers, offsets, interrupt, |worker, offset, interrupt| {
            let mut buffer = std::mem::take(&mut worker.buffer);
            let wanted = at_most(range.end - offset, batch_bytes);
            buffer::at_least(&mut buffer, wanted)?;
            copy_batch(worker, offset, &mut buffer[..wanted], interrupt)?;
            worker.buffer = buffer;
            Ok(())
        });
    }

    let window_bytes = (WINDOW_BYTES_PER_THREAD / batch_bytes).max(1).saturating_mul(threads.max(1) * batch_bytes);
    let mut window = buffer::zeros(at_most(length, window_bytes))?;
    let mut offset = range.start;
    while offset < range.end {
        let wanted = at_most(range.end - offset, window_bytes);
        let window = &mut window[..wanted];
        if let Input::Stream(stream) = &mut input {
            read_exact(*stream, window, entry, interrupt)?;
        }
        let batches = window.chunks_mut(batch_bytes).zip((offset..).step_by(batch_bytes));
        for_each(&mut workers, batches, interrupt, |worker, (batch, offset), interrupt| {
            copy_batch(worker, offset, batch, interrupt)
        })?;
        if let Output::Stream(stream) = &mut output {
            pipe::write_all(*stream, window, interrupt)?;
        }
        offset += wanted as u64;
    }
    Ok(())
}

/// The check of one fragment, shared by all threads.
enum Check {
    Plain { size: u64, collected: Mutex<Collected> },
    Encrypted(Box<Decryption>),
}

/// The state and buffers that one thread needs.
struct Worker {
    buffer: Vec<u8>,
    decryptor: Option<Decryptor>,
    /// Room for a decrypted chunk, which is not used any further.
    chunk: Vec<u8>,
}

impl Check {
    fn header_bytes(&self) -> u64 {
        match self {
            Self::Plain { .. } => 0,
            Self::Encrypted(_) => HEADER_BYTES as u64,
        }
    }

    /// The stored bytes that are checked at a time: a subtree, or a segment.
    fn unit_bytes(&self) -> usize {
        match self {
            Self::Plain { .. } => SUBTREE_BYTES,
            Self::Encrypted(decryption) => segment_size(decryption.chunk_size_bytes()),
        }
    }

    fn worker(&self) -> Worker {
        let decryptor = match self {
            Self::Plain { .. } => None,
            Self::Encrypted(decryption) => Some(decryption.decryptor()),
        };
        Worker { buffer: Vec::new(), decryptor, chunk: Vec::new() }
    }

    /// Checks a batch of whole units, or hashes it; `offset` is in the stored bytes of the fragment.
    fn batch(&self, worker: &mut Worker, offset: u64, batch: &[u8]) -> Result<()> {
        let units = batch.chunks(self.unit_bytes());
        let first = (offset - self.header_bytes()) / self.unit_bytes() as u64;
        match (self, &mut worker.decryptor) {
            // The only subtree is the root of the tree, which is hashed in another way.
            (Self::Plain { size, collected }, _) if *size <= SUBTREE_BYTES as u64 => {
                lock(collected).digest.update(batch);
            }
            (Self::Plain { collected, .. }, _) => {
                let subtrees = buffer::collect(units.zip(first..).map(|(bytes, index)| subtree(index, bytes)))?;
                lock(collected).add(first, subtrees);
            }
            (Self::Encrypted(_), Some(decryptor)) => {
                for (segment, index) in units.zip(first..) {
                    let chunk_bytes = segment.len().saturating_sub(SEGMENT_OVERHEAD_BYTES);
                    buffer::at_least(&mut worker.chunk, chunk_bytes)?;
                    decryptor.decrypt(index, segment, &mut worker.chunk[..chunk_bytes])?;
                }
            }
            (Self::Encrypted(_), None) => unreachable!("a worker belongs to the check that made it"),
        }
        Ok(())
    }

    /// Compares the digest of a plain fragment; each segment of an encrypted one was verified.
    fn finish(self, proof: &Proof) -> Result<()> {
        let Self::Plain { collected, .. } = self else { return Ok(()) };
        let digest = collected.into_inner().unwrap_or_else(PoisonError::into_inner).digest.finish();
        if *proof == Proof::Blake3(digest) {
            return Ok(());
        }
        Err(Error::corrupt("its contents have changed since the snapshot was sealed"))
    }
}

/// Fills `batch` from `offset`, without a read if it is in a hole.
fn read_batch(source: &dyn ReadAt, offset: u64, batch: &mut [u8], interrupt: &mut Interrupt<'_>) -> Result<()> {
    if source.next_data(offset).saturating_sub(offset) >= batch.len() as u64 {
        batch.fill(0);
        return Ok(());
    }
    source.read_exact_at(batch, offset, interrupt)
}

/// Fills `buf` with the next bytes of a stream.
fn read_exact(stream: &mut dyn Read, buf: &mut [u8], entry: &Entry, interrupt: &mut Interrupt<'_>) -> Result<()> {
    if pipe::read_full(stream, buf, interrupt)? == buf.len() { Ok(()) } else { Err(too_short(entry)) }
}

fn too_short(entry: &Entry) -> Error {
    Error::corrupt(format!("ends before its {} bytes", entry.stored_size))
}

/// The smaller of a length in a file and a length in memory.
fn at_most(length: u64, most: usize) -> usize {
    usize::try_from(length).map_or(most, |length| length.min(most))
}

#[cfg(test)]
mod tests;
