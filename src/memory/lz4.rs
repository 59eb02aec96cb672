//! Writes and reads an LZ4 frame of independent blocks, block by block.
//!
//! The format is in `lz4_Frame_format.md`, version 1.6.4, of the LZ4 repository: a header, blocks that each follow a
//! word with their stored length, and an end mark. The decoder of crosvm requires that there is a single frame, and
//! that the end mark is the only empty block.

use lz4_flex::block::{CompressTable, compress_into_with_table, get_maximum_output_size};

use crate::error::{Error, Result};

/// Plaintext bytes in a block. The frame format allows these four sizes.
pub(super) const BLOCK_SIZES: [usize; 4] = [64 << 10, 256 << 10, 1 << 20, 4 << 20];

/// Magic number, flags and the checksum of the flags.
pub(super) const HEADER_BYTES: usize = 7;

/// Bytes of the size word before each block.
pub(super) const SIZE_WORD_BYTES: usize = 4;

pub(super) const END_MARK: [u8; SIZE_WORD_BYTES] = [0; SIZE_WORD_BYTES];

const MAGIC: [u8; 4] = [0x04, 0x22, 0x4d, 0x18];

/// Version 1, independent blocks, no checksums, no size, no dictionary.
const FLAGS: u8 = 0b0110_0000;

/// The bit of a size word that says that the block is stored uncompressed.
const RAW: u32 = 1 << 31;

/// Returns the header of a frame with blocks of `block_size`, or `None` if the format does not have that size.
pub(super) fn header(block_size: usize) -> Option<[u8; HEADER_BYTES]> {
    // The last byte is the second byte of the XXH32 of the two bytes before it.
    let (sizes, checksum) = match BLOCK_SIZES.iter().position(|size| *size == block_size)? {
        0 => (0x40, 0x82),
        1 => (0x50, 0xfb),
        2 => (0x60, 0x51),
        _ => (0x70, 0x73),
    };
    let mut header = [0; HEADER_BYTES];
    header[..4].copy_from_slice(&MAGIC);
    header[4..].copy_from_slice(&[FLAGS, sizes, checksum]);
    Some(header)
}

/// Returns the block size in the header of a frame.
pub(super) fn block_size_of(header: [u8; HEADER_BYTES]) -> Result<usize> {
    // Compared as a whole: crosvm and vmsnap write no frames with checksums, sizes, linked blocks or a dictionary.
    BLOCK_SIZES
        .into_iter()
        .find(|size| self::header(*size) == Some(header))
        .ok_or_else(|| Error::corrupt("is not an LZ4 frame of independent blocks without checksums"))
}

/// Returns how many bytes a block may take at most, including its size word.
pub(super) fn most_stored(block_size: usize) -> usize {
    SIZE_WORD_BYTES + get_maximum_output_size(block_size)
}

pub(super) struct Packer(CompressTable);

impl Packer {
    pub(super) fn new() -> Self {
        Self(CompressTable::large())
    }

    /// Writes the size word and the block to `out`, which has [`most_stored`] bytes. Returns the length of the block
    /// alone.
    pub(super) fn pack(&mut self, block: &[u8], out: &mut [u8]) -> Result<usize> {
        let (word, body) = out.split_at_mut(SIZE_WORD_BYTES);
        let packed = compress_into_with_table(block, body, &mut self.0)
            .map_err(|error| Error::corrupt(format!("a block cannot be compressed: {error}")))?;
        let (length, flag) = if packed < block.len() {
            (packed, 0)
        } else {
            body[..block.len()].copy_from_slice(block);
            (block.len(), RAW)
        };
        let length_word = u32::try_from(length).unwrap_or(0);
        word.copy_from_slice(&(length_word | flag).to_le_bytes());
        Ok(length)
    }
}

/// Decodes a size word: the stored length, and whether the block is uncompressed. Returns `None` for the end mark.
pub(super) fn stored_length(word: [u8; SIZE_WORD_BYTES]) -> Option<(usize, bool)> {
    let word = u32::from_le_bytes(word);
    let length = usize::try_from(word & !RAW).unwrap_or(usize::MAX);
    (word != 0).then_some((length, word & RAW != 0))
}

/// Decompresses a stored block into `out`, which must have the length of the plaintext.
pub(super) fn unpack(block: &[u8], raw: bool, out: &mut [u8]) -> Result<()> {
    if raw {
        if block.len() != out.len() {
            return Err(Error::corrupt(format!("an LZ4 block has {} bytes instead of {}", block.len(), out.len())));
        }
        out.copy_from_slice(block);
        return Ok(());
    }
    match decompress(block, out) {
        Some(length) if length == out.len() => Ok(()),
        Some(length) => Err(Error::corrupt(format!("an LZ4 block holds {length} bytes instead of {}", out.len()))),
        None => Err(Error::corrupt("an LZ4 block cannot be decompressed")),
    }
}

/// Decompresses the beginning of a stored block into `out`, which is at most as long as the plaintext. The rest of the
/// block is not checked.
pub(super) fn unpack_beginning(block: &[u8], raw: bool, out: &mut [u8]) -> Result<()> {
    let done = if raw {
        block.get(..out.len()).map(|beginning| {
            out.copy_from_slice(beginning);
            out.len()
        })
    } else {
        decompress_beginning(block, out)
    };
    match done {
        Some(length) if length == out.len() => Ok(()),
        _ => Err(Error::corrupt("an LZ4 block cannot be decompressed")),
    }
}

/// Whether the beginning of a block takes less time to decompress than the whole block.
pub(super) const DECOMPRESSES_BEGINNINGS: bool = cfg!(feature = "c-lz4");

/// Decompresses as much of a block as fits `out`, and returns the length. Returns `None` if the block is damaged.
#[cfg(not(feature = "c-lz4"))]
fn decompress_beginning(block: &[u8], out: &mut [u8]) -> Option<usize> {
    let mut whole = vec![0; BLOCK_SIZES[BLOCK_SIZES.len() - 1]];
    let length = decompress(block, &mut whole)?.min(out.len());
    out[..length].copy_from_slice(&whole[..length]);
    Some(length)
}

/// Decompresses as much of a block as fits `out`, and returns the length. Returns `None` if the block is damaged.
#[cfg(feature = "c-lz4")]
#[allow(unsafe_code, reason = "a C library")]
fn decompress_beginning(block: &[u8], out: &mut [u8]) -> Option<usize> {
    use std::ffi::{c_char, c_int};
    // lz4.h and the library have this function, but `lz4_sys` does not declare it.
    unsafe extern "C" {
        fn LZ4_decompress_safe_partial(
            from: *const c_char,
            to: *mut c_char,
            stored_bytes: c_int,
            wanted_bytes: c_int,
            room_bytes: c_int,
        ) -> c_int;
    }
    if has_zero_offset(block, out.len()) {
        return None;
    }
    let (from, to) = (i32::try_from(block.len()).ok()?, i32::try_from(out.len()).ok()?);
    // SAFETY: it reads at most `from` bytes of `block` and writes at most `to` bytes of `out` for any contents of the
    // block, as LZ4_decompress_safe does.
    let length = unsafe { LZ4_decompress_safe_partial(block.as_ptr().cast(), out.as_mut_ptr().cast(), from, to, to) };
    usize::try_from(length).ok()
}

/// Decompresses a block, and returns the length. Returns `None` if the block is damaged, or longer than `out`.
#[cfg(not(feature = "c-lz4"))]
fn decompress(block: &[u8], out: &mut [u8]) -> Option<usize> {
    lz4_flex::block::decompress_into(block, out).ok()
}

/// Decompresses a block, and returns the length. Returns `None` if the block is damaged, or longer than `out`.
#[cfg(feature = "c-lz4")]
#[allow(unsafe_code, reason = "a C library")]
fn decompress(block: &[u8], out: &mut [u8]) -> Option<usize> {
    if has_zero_offset(block, out.len()) {
        return None;
    }
    let (from, to) = (i32::try_from(block.len()).ok()?, i32::try_from(out.len()).ok()?);
    // SAFETY: it reads at most `from` bytes of `block` and writes at most `to` bytes of `out` for any contents of the
    // block; lz4.h, LZ4_decompress_safe: "protected against malicious data packets".
    let length = unsafe { lz4_sys::LZ4_decompress_safe(block.as_ptr().cast(), out.as_mut_ptr().cast(), from, to) };
    usize::try_from(length).ok()
}

/// The shortest match (`lz4_Block_format.md`, "Match length").
#[cfg(any(feature = "c-lz4", test))]
const MIN_MATCH_BYTES: usize = 4;

/// Whether the first `wanted` bytes of a block have a match at a distance of 0. The format forbids it
/// (`lz4_Block_format.md`, "Offset"), but the C library would copy the previous contents of `out`, which may be data
/// of another caller. The decoder finds any other damage.
#[cfg(any(feature = "c-lz4", test))]
fn has_zero_offset(block: &[u8], wanted: usize) -> bool {
    // A length of 15 continues in bytes of 255, and ends with a smaller byte.
    let more = |at: &mut usize, length: usize| {
        let mut length = length;
        while length >= 15 {
            let byte = *block.get(*at)?;
            *at += 1;
            length += usize::from(byte);
            if byte != u8::MAX {
                break;
            }
        }
        Some(length)
    };
    let (mut at, mut length) = (0, 0);
    let mut sequence = || {
        let token = *block.get(at)?;
        at += 1;
        let literals = more(&mut at, usize::from(token >> 4))?;
        at += literals;
        let offset = block.get(at..at + 2)?;
        at += 2;
        length += literals + more(&mut at, usize::from(token & 15))? + MIN_MATCH_BYTES;
        Some((offset == [0, 0], length < wanted))
    };
    loop {
        match sequence() {
            Some((true, _)) => return true,
            Some((false, true)) => {}
            // Enough was checked, or this was the last sequence, which has no match.
            Some((false, false)) | None => return false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_match_at_no_distance_is_seen() {
        let mut text = b"the same again, ".repeat(300);
        text.extend((0..400_u32).flat_map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()));
        text.extend(b"and the same again, ".repeat(20));
        let mut out = vec![0; most_stored(text.len())];
        let length = Packer::new().pack(&text, &mut out).unwrap();
        let block = &out[SIZE_WORD_BYTES..SIZE_WORD_BYTES + length];
        assert!(!has_zero_offset(block, text.len()));
        // A literal, a match of 4 bytes at the given distance, and 20 literals.
        let of = |offset: u8| [&[0x10, b'a', offset, 0, 0xf0, 5][..], &[7; 20]].concat();
        assert!(!has_zero_offset(&of(1), 25));
        assert!(has_zero_offset(&of(0), 25));
        let mut room = [1; 25];
        unpack(&of(1), false, &mut room).unwrap();
        assert_eq!(room, [&[b'a'; 5][..], &[7; 20]].concat()[..]);
        assert!(unpack(&of(0), false, &mut room).unwrap_err().is_corrupt());
        assert!((0..block.len()).all(|cut| !has_zero_offset(&block[..cut], text.len())));
    }

    #[test]
    fn blocks_come_back_also_where_they_do_not_shrink() {
        let noise: Vec<u8> = (0..70_000_u32).map(|n| n.wrapping_mul(2_654_435_761).to_le_bytes()[3]).collect();
        let (mut packer, same) = (Packer::new(), vec![7; 65_536]);
        for block in [&same[..], &noise[..65_536], &noise[..1], &[0; 5]] {
            let mut out = vec![0; most_stored(block.len())];
            let length = packer.pack(block, &mut out).unwrap();
            let (stored, raw) = stored_length(out[..4].try_into().unwrap()).unwrap();
            assert_eq!(stored, length);
            let mut back = vec![0; block.len()];
            unpack(&out[4..4 + length], raw, &mut back).unwrap();
            assert_eq!(back, block);
            for wanted in [0, 1, block.len() / 2, block.len()] {
                let mut beginning = vec![9; wanted];
                unpack_beginning(&out[4..4 + length], raw, &mut beginning).unwrap();
                assert_eq!(beginning, block[..wanted]);
            }
            let mut other = vec![0; block.len() + 1];
            assert!(unpack_beginning(&out[4..4 + length], raw, &mut other).unwrap_err().is_corrupt());
            assert!(unpack(&out[4..4 + length], raw, &mut other).unwrap_err().is_corrupt());
        }
    }

    #[test]
    fn headers_are_told_apart() {
        for size in BLOCK_SIZES {
            assert_eq!(block_size_of(header(size).unwrap()).unwrap(), size);
        }
        assert!(block_size_of([0; 7]).unwrap_err().is_corrupt());
        assert_eq!(header(65_535), None);
    }
}
