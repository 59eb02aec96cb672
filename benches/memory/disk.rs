//! Measures dumps to a disk and restores from it, around the page cache and through it.
//!
//! The reference writes and reads the same bytes as `dd` with `oflag=direct` and `iflag=direct` does: in aligned calls of
//! 1 MiB, one after the other.

use std::fs::File;
use std::io::{Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use rustix::fs::OFlags;
use rustix::mm::{MapFlags, ProtFlags, mmap, munmap};
use vmsnap::{FileMemory, GuestDestination, GuestRegion, MemoryOptions};

use crate::bench::{Bench, FORMS, Form, seconds};
use crate::guest::{Guest, Mapping, PAGE};

/// Bytes that one call writes or reads.
const CALL_BYTES: usize = 1 << 20;

pub(crate) fn run(bench: &mut Bench, guest: &Guest) {
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let memory = std::mem::replace(&mut bench.directory, directory.path().to_owned());
    "disk".clone_into(&mut bench.title);
    println!("disk: {}, {} MiB of data", directory.path().display(), guest.data_bytes >> 20);
    for form in FORMS {
        for uncached in [true, false] {
            let how = if uncached { "uncached" } else { "through the page cache" };
            let name = format!("dump {} {how}, synced, to dd oflag=direct", form.name());
            let mut left = 0;
            bench.row(
                &name,
                None,
                guest.data_bytes,
                |bench| seconds(|| write_direct(guest, &bench.reference())),
                |bench, threads| {
                    let spent = dump(bench, guest, form, uncached, threads);
                    left = resident(&bench.snapshot().join("mem"));
                    spent
                },
            );
            told(bench, &name, left);
            let name = format!("restore {} {how} into a memfd, to dd iflag=direct", form.name());
            if bench.wants(&name) {
                write_direct(guest, &bench.reference());
                dump(bench, guest, form, true, bench.arguments.threads);
            }
            bench.row(
                &name,
                None,
                guest.data_bytes,
                |bench| seconds(|| read_direct(guest, &bench.reference())),
                |bench, threads| {
                    drop_pages(&bench.snapshot().join("mem"));
                    let spent = restore(bench, guest, form, uncached, threads);
                    left = resident(&bench.snapshot().join("mem"));
                    spent
                },
            );
            told(bench, &name, left);
        }
    }
    bench.directory = memory;
}

fn told(bench: &Bench, name: &str, left: usize) {
    if bench.wants(name) {
        println!("{:<64} {} MiB of mem are left in the page cache", "", left >> 20);
    }
}

fn dump(bench: &Bench, guest: &Guest, form: Form, uncached: bool, threads: usize) -> f64 {
    let _ = std::fs::remove_dir_all(bench.snapshot());
    let options = bench.options(form, threads);
    let how = MemoryOptions::new().compress(form.compress).uncached(uncached);
    seconds(|| {
        let mut staged = options.create(bench.snapshot()).unwrap();
        let regions = [GuestRegion::new(0, FileMemory::new(&guest.file, 0, None).unwrap())];
        staged.writer().write_memory(&regions, &how).unwrap();
        staged.commit().unwrap();
    })
}

fn restore(bench: &Bench, guest: &Guest, form: Form, uncached: bool, threads: usize) -> f64 {
    let fresh = Guest::fresh(guest.bytes);
    let spent = seconds(|| {
        let destination = GuestDestination::file(&fresh.file, None).uncached(uncached);
        bench.stored(form, threads).restore(&mut [destination]).unwrap();
    });
    assert!(guest.is_data(fresh.memory()), "the restored memory differs from the guest");
    spent
}

fn direct(path: &Path, write: bool) -> File {
    let flags = i32::try_from(OFlags::DIRECT.bits()).unwrap();
    File::options().read(!write).write(write).create(write).truncate(write).custom_flags(flags).open(path).unwrap()
}

/// Whole calls of data. The last one of a file is filled up with zeros.
fn write_direct(guest: &Guest, path: &Path) {
    let mut file = direct(path, true);
    let mut buffer = Mapping::private(CALL_BYTES);
    let buffer = buffer.slice_mut();
    let mut filled = 0;
    for mut data in guest.data(CALL_BYTES) {
        while !data.is_empty() {
            let (now, later) = data.split_at((CALL_BYTES - filled).min(data.len()));
            buffer[filled..filled + now.len()].copy_from_slice(now);
            (filled, data) = (filled + now.len(), later);
            if filled == CALL_BYTES {
                file.write_all(buffer).unwrap();
                filled = 0;
            }
        }
    }
    file.write_all(&buffer[..filled.next_multiple_of(PAGE)]).unwrap();
    file.sync_all().unwrap();
}

fn read_direct(guest: &Guest, path: &Path) {
    let mut file = direct(path, false);
    let mut buffer = Mapping::private(CALL_BYTES);
    let mut fresh = Guest::fresh(guest.bytes);
    let mut places = guest.ranges.iter().map(|(start, end)| *start..*end);
    let mut place = 0..0;
    loop {
        let mut data = match file.read(buffer.slice_mut()).unwrap() {
            0 => break,
            count => &buffer.slice()[..count],
        };
        while !data.is_empty() {
            if place.is_empty() {
                match places.next() {
                    Some(next) => place = next,
                    None => return,
                }
            }
            let (now, later) = data.split_at(place.len().min(data.len()));
            fresh.mapping.slice_mut()[place.start..place.start + now.len()].copy_from_slice(now);
            (place.start, data) = (place.start + now.len(), later);
        }
    }
}

/// Drops the pages of a file that is written back from the page cache.
fn drop_pages(path: &Path) {
    rustix::fs::fadvise(File::open(path).unwrap(), 0, None, rustix::fs::Advice::DontNeed).unwrap();
}

/// Returns how many bytes of a file are in the page cache.
fn resident(path: &Path) -> usize {
    let file = File::open(path).unwrap();
    let bytes = usize::try_from(file.metadata().unwrap().len()).unwrap();
    let mut pages = vec![0; bytes.div_ceil(PAGE)];
    // SAFETY: a new mapping at an address that the kernel chooses. Its memory is not used.
    let start = unsafe { mmap(std::ptr::null_mut(), bytes, ProtFlags::READ, MapFlags::SHARED, &file, 0).unwrap() };
    // SAFETY: a byte for each page of the mapping, which is then unmapped.
    unsafe {
        assert_eq!(libc::mincore(start, bytes, pages.as_mut_ptr()), 0);
        munmap(start, bytes).unwrap();
    }
    pages.iter().filter(|page| **page & 1 == 1).count() * PAGE
}
