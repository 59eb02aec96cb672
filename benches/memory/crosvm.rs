//! What crosvm does, in `vm_memory/src/guest_memory.rs`: the file of the memory tells its data ranges, and one thread writes each
//! with one `write_all` from the populated mapping, or through the frame encoder of `lz4_flex` at its defaults. Back, each hole is
//! given back by `MADV_REMOVE`, and each range read by one `read_exact`.
//!
//! crosvm has `lz4_flex` 0.11.1, which was withdrawn; this is the last of its series.

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

/// Restores what was dumped of `guest` into fresh memory.
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
    assert_eq!(from.read(&mut [0]).unwrap(), 0, "more than was dumped");
}

fn remove(hole: &mut [u8]) {
    if !hole.is_empty() {
        // SAFETY: whole pages of a shared mapping, borrowed alone; they are zeros afterwards.
        unsafe { madvise(hole.as_mut_ptr().cast(), hole.len(), Advice::LinuxRemove).unwrap() };
    }
}
