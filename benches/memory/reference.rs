//! Writes and reads the data of a guest with the kernel alone and with the C library of LZ4: one thread, not encrypted.

use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;

use lz4::liblz4::BlockChecksum;
use lz4::{BlockMode, BlockSize, ContentChecksum, EncoderBuilder};

use crate::guest::Guest;

const CALL_BYTES: usize = 1 << 20;

/// Writes the data ranges from the mapping with `write(2)`. The ranges are known.
pub(crate) fn write_data(guest: &Guest, path: &Path, sync: bool) {
    let mut file = File::create(path).unwrap();
    guest.data(CALL_BYTES).for_each(|bytes| file.write_all(bytes).unwrap());
    if sync {
        file.sync_all().unwrap();
    }
}

/// Reads the data ranges to memory with `read(2)`.
pub(crate) fn read_data(guest: &Guest, path: &Path, memory: &mut [u8]) {
    let mut file = File::open(path).unwrap();
    for (start, end) in &guest.ranges {
        memory[*start..*end].chunks_mut(CALL_BYTES).for_each(|bytes| file.read_exact(bytes).unwrap());
    }
}

/// Writes a frame like that of vmsnap with the C library: independent blocks of 64 KiB without checksums, at the
/// default level.
pub(crate) fn write_lz4(guest: &Guest, path: &Path) {
    let mut encoder = EncoderBuilder::new()
        .block_size(BlockSize::Max64KB)
        .block_mode(BlockMode::Independent)
        .block_checksum(BlockChecksum::NoBlockChecksum)
        .checksum(ContentChecksum::NoChecksum)
        .build(File::create(path).unwrap())
        .unwrap();
    guest.data(CALL_BYTES).for_each(|bytes| encoder.write_all(bytes).unwrap());
    encoder.finish().1.unwrap();
}
