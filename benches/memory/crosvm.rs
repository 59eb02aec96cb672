//! Dumps and restores in the way of crosvm's `vm_memory/src/guest_memory.rs`, for comparison.
//!
//! The file of the memory reports its data ranges. One thread writes each range with one `write_all` from the populated
//! mapping, or through the frame encoder of `lz4_flex` with its defaults. A restore releases each hole with
//! `MADV_REMOVE`, and reads each range with one `read_exact`.
//!
//! crosvm uses `lz4_flex` 0.11.1, which was withdrawn; this is the last version of that series.

use std::fs::File;
use std::io::{Read, Write};
use std::path::Path;

use lz4_flex_of_crosvm::frame::{FrameDecoder, FrameEncoder};
use rustix::mm::{Advice, madvise};

use crate::guest::{Guest, ranges};

pub(crate) fn dump(guest: &Guest, path: &Path, compress: bool) {
    let mut file = File::create(path).unwrap();
    if compress {
        let mut encoder = FrameEncoder::new(&mut file);
        write_ranges(guest, &mut encoder);
        encoder.finish().unwrap();
    } else {
        write_ranges(guest, &mut file);
    }
}

fn write_ranges(guest: &Guest, to: &mut impl Write) {
    for (start, end) in ranges(&guest.file, guest.bytes) {
        to.write_all(&guest.memory()[start..end]).unwrap();
    }
}

/// Restores the dump of `guest` to fresh memory.
pub(crate) fn restore(guest: &Guest, path: &Path, compress: bool, fresh: &mut Guest) {
    let file = File::open(path).unwrap();
    if compress {
        read_ranges(guest, &mut FrameDecoder::new(file), fresh);
    } else {
        read_ranges(guest, &mut { file }, fresh);
    }
}

fn read_ranges(guest: &Guest, from: &mut impl Read, fresh: &mut Guest) {
    let memory = fresh.mapping.slice_mut();
    let mut at = 0;
    for (start, end) in &guest.ranges {
        remove(&mut memory[at..*start]);
        from.read_exact(&mut memory[*start..*end]).unwrap();
        at = *end;
    }
    remove(&mut memory[at..]);
    assert_eq!(from.read(&mut [0]).unwrap(), 0, "the dump has more bytes than the guest");
}

fn remove(hole: &mut [u8]) {
    if !hole.is_empty() {
        // SAFETY: whole pages of a shared mapping, borrowed mutably. They are zeros afterwards.
        unsafe { madvise(hole.as_mut_ptr().cast(), hole.len(), Advice::LinuxRemove).unwrap() };
    }
}
