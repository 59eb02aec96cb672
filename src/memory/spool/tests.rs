use std::collections::HashMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use proptest::prelude::*;
use rustix::fs::{MemfdFlags, SealFlags, fcntl_add_seals, memfd_create};

use super::*;
use crate::cipher::SecretKey;
use crate::memory::{GuestRegion, MemoryOptions};
use crate::snapshot::SnapshotOptions;

fn writer(folder: &Path, name: &str, key: Option<&SecretKey>) -> SnapshotWriter {
    let mut options = SnapshotOptions::new().threads(3);
    if let Some(key) = key {
        options = options.key(key.clone());
    }
    options.create_in_place(folder.join(name)).unwrap()
}

fn with<R>(work: impl FnOnce(&mut Interrupt<'_>) -> R) -> R {
    let go_on = &mut || Ok(());
    work(&mut Interrupt::new(go_on))
}

/// A page that no other number has.
fn page(number: u64) -> [u8; PAGE_BYTES] {
    let mut page = [0; PAGE_BYTES];
    for (place, bytes) in page.chunks_exact_mut(8).enumerate() {
        let word = (number + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15).rotate_left(u32::try_from(place % 64).unwrap());
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    page
}

fn put(spool: &mut Spool, area: usize, at: u64, bytes: &[u8; PAGE_BYTES]) -> bool {
    with(|interrupt| spool.put(area, at, bytes, interrupt)).unwrap()
}

fn finish(spool: Spool) -> Arc<SpooledPages> {
    match with(|interrupt| spool.finish(interrupt)).unwrap() {
        Spooled::Pages(pages) => Arc::new(pages),
        Spooled::Written(report) => panic!("{report:?}"),
    }
}

fn bytes_of(source: &SpooledMemory) -> Vec<u8> {
    let mut bytes = vec![9; usize::try_from(source.size()).unwrap()];
    if !bytes.is_empty() {
        assert_eq!(source.read_at(0, &mut bytes).unwrap(), bytes.len());
    }
    bytes
}

/// Runs a check with a plain and with an encrypted spool.
fn for_both(check: impl Fn(&mut Spool) -> Box<dyn FnOnce(&Arc<SpooledPages>)>) {
    let folder = tempfile::tempdir().unwrap();
    let key = SecretKey::generate().unwrap();
    for (name, key) in [("plain", None), ("encrypted", Some(&key))] {
        let mut spool = Spool::new(&writer(folder.path(), name, key)).unwrap();
        let then = check(&mut spool);
        then(&finish(spool));
    }
}

#[test]
fn the_last_copy_of_a_page_wins_in_each_area() {
    for_both(|spool| {
        let (low, high) = (spool.add_area(8 * PAGE), spool.add_area(4 * PAGE));
        assert!(!put(spool, low, 5, &page(1)));
        assert!(!put(spool, low, 2, &page(2)));
        assert!(!put(spool, high, 2, &page(3)));
        // Data after data, zeros after data, data after zeros, and a page of zeros that is put as data.
        assert!(put(spool, low, 5, &page(4)));
        assert!(spool.put_zero(low, 2));
        assert!(!spool.put_zero(low, 0));
        assert!(put(spool, low, 0, &page(5)));
        assert!(put(spool, high, 2, &[0; PAGE_BYTES]));
        assert!(!put(spool, high, 3, &page(6)));
        Box::new(move |pages| {
            let mut expected = vec![0; 8 * PAGE_BYTES];
            expected[..PAGE_BYTES].copy_from_slice(&page(5));
            expected[5 * PAGE_BYTES..6 * PAGE_BYTES].copy_from_slice(&page(4));
            let source = pages.source(low, 0..8 * PAGE);
            assert!(bytes_of(&source) == expected);
            let mut found = Vec::new();
            source.data_ranges(0..source.size(), &mut found).unwrap();
            assert_eq!(found, [0..PAGE, 5 * PAGE..6 * PAGE]);
            let next = [0, 1, PAGE, 5 * PAGE + 3, 6 * PAGE].map(|offset| source.next_data(offset).unwrap());
            assert_eq!(next, [Some(0), Some(1), Some(5 * PAGE), Some(5 * PAGE + 3), None]);
            assert!(bytes_of(&pages.source(high, 2 * PAGE..4 * PAGE))[PAGE_BYTES..] == page(6));
        })
    });
}

#[test]
fn an_empty_spool_is_zero() {
    for_both(|spool| {
        let area = spool.add_area(1 << 62);
        Box::new(move |pages| {
            let source = pages.source(area, 0..1 << 62);
            assert_eq!((source.size(), source.next_data(0).unwrap()), (1 << 62, None));
            let mut bytes = [9; 5000];
            assert_eq!(source.read_at((1 << 62) - 5000, &mut bytes).unwrap(), 5000);
            assert_eq!(bytes, [0; 5000]);
            assert_eq!(source.read_at(1 << 62, &mut bytes).unwrap(), 0);
        })
    });
}

#[test]
fn a_page_outside_its_area_is_refused() {
    for_both(|spool| {
        let area = spool.add_area(2 * PAGE);
        for (area, at) in [(area, 2), (area, u64::MAX), (area + 1, 0)] {
            let refused = with(|interrupt| spool.put(area, at, &page(1), interrupt)).unwrap_err();
            assert!(refused.is_invalid_argument());
            assert!(!spool.put_zero(area, at) && !spool.put_zero(area, at));
        }
        put(spool, area, 1, &page(1));
        Box::new(move |pages| assert!(bytes_of(&pages.source(area, PAGE..2 * PAGE)) == page(1)))
    });
}

#[derive(Clone, Debug)]
enum Step {
    Put(usize, u64, u64),
    Zero(usize, u64),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    // Runs of neighbours, as a stream has them, and single pages.
    let one = prop_oneof![
        4 => (0..2_usize, 0..200_u64, any::<u32>(), 1..40_u64).prop_map(|(area, at, seed, run)| {
            (0..run).map(|next| Step::Put(area, (at + next) % 200, u64::from(seed) + next)).collect::<Vec<_>>()
        }),
        1 => (0..2_usize, 0..200_u64).prop_map(|(area, at)| vec![Step::Zero(area, at)]),
    ];
    prop::collection::vec(one, 0..40).prop_map(|runs| runs.concat())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn it_has_what_a_map_of_pages_has(steps in steps(), encrypted: bool, reads in prop::collection::vec((0..819_200_u64, 0..100_000_usize), 8)) {
        let folder = tempfile::tempdir().unwrap();
        let key = SecretKey::generate().unwrap();
        let mut spool = Spool::new(&writer(folder.path(), "vm", encrypted.then_some(&key))).unwrap();
        let areas = [spool.add_area(200 * PAGE), spool.add_area(200 * PAGE)];
        let mut model: [HashMap<u64, Option<u64>>; 2] = Default::default();
        for step in steps {
            let (before, received) = match step {
                Step::Put(area, at, seed) =>
                    (model[area].insert(at, Some(seed)), put(&mut spool, areas[area], at, &page(seed))),
                Step::Zero(area, at) => (model[area].insert(at, None), spool.put_zero(areas[area], at)),
            };
            prop_assert_eq!(before.is_some(), received);
        }
        let pages = finish(spool);
        for (area, model) in areas.into_iter().zip(&model) {
            let mut whole = vec![0; 200 * PAGE_BYTES];
            for (at, seed) in model {
                let at = usize::try_from(*at).unwrap() * PAGE_BYTES;
                seed.inspect(|seed| whole[at..at + PAGE_BYTES].copy_from_slice(&page(*seed)));
            }
            let source = pages.source(area, 0..200 * PAGE);
            prop_assert!(bytes_of(&source) == whole);
            let mut data = vec![0; whole.len()];
            let mut found = Vec::new();
            source.data_ranges(0..source.size(), &mut found).unwrap();
            for range in found {
                let range = usize::try_from(range.start).unwrap()..usize::try_from(range.end).unwrap();
                data[range.clone()].copy_from_slice(&whole[range]);
            }
            prop_assert!(data == whole, "data outside the ranges");
            for (offset, length) in &reads {
                let start = usize::try_from(*offset).unwrap();
                let mut part = vec![9; *length];
                let read = source.read_at(*offset, &mut part).unwrap();
                prop_assert_eq!(read, (*length).min(whole.len() - start));
                prop_assert!(part[..read] == whole[start..start + read]);
                // A region that begins anywhere in the area.
                prop_assert!(bytes_of(&pages.source(area, *offset..200 * PAGE)) == whole[start..]);
            }
        }
    }
}

/// Fills a spool with pages in a scattered order, some of them twice; returns their bytes, too.
fn scattered(spool: &mut Spool, pages: u64) -> Vec<u8> {
    let area = spool.add_area(pages * PAGE);
    let mut bytes = vec![0; usize::try_from(pages).unwrap() * PAGE_BYTES];
    for number in 0..pages * 3 / 2 {
        // Runs of 100 pages, and every fifth run is left out.
        let run = (number / 100).wrapping_mul(7) % pages.div_ceil(100);
        let at = run * 100 + number % 100;
        if run % 5 == 4 || at >= pages {
            continue;
        }
        put(spool, area, at, &page(number));
        let place = usize::try_from(at).unwrap() * PAGE_BYTES;
        bytes[place..place + PAGE_BYTES].copy_from_slice(&page(number));
    }
    bytes
}

#[test]
fn a_dump_of_it_equals_a_dump_of_the_bytes() {
    let key = SecretKey::generate().unwrap();
    for key in [None, Some(&key)] {
        for compress in [false, true] {
            let folder = tempfile::tempdir().unwrap();
            let [direct, spooled] = ["direct", "spooled"].map(|name| writer(folder.path(), name, key));
            let mut spool = Spool::new(&spooled).unwrap();
            let bytes = scattered(&mut spool, 3000);
            let pages = finish(spool);
            let options = MemoryOptions::new().compress(compress);
            let half = 1500 * PAGE;
            let regions = [(0, 0..half), (1 << 32, half..2 * half)]
                .map(|(base, range)| GuestRegion::new(base, pages.source(0, range)));
            let report = spooled.write_memory(&regions, &options).unwrap();
            let (low, high) = bytes.split_at(bytes.len() / 2);
            let regions = [GuestRegion::new(0, low), GuestRegion::new(1 << 32, high)];
            let expected = direct.write_memory(&regions, &options).unwrap();
            assert_eq!((report.data_bytes, report.ranges), (expected.data_bytes, expected.ranges));
            assert!(report.ranges > 1);
            let read = |name: &str, fragment: &str| {
                let mut options = SnapshotOptions::new();
                if let Some(key) = key {
                    options = options.key(key.clone());
                }
                let reader = options.open(folder.path().join(name)).unwrap();
                let mut bytes = Vec::new();
                std::io::Read::read_to_end(&mut reader.raw_fragment(fragment).unwrap(), &mut bytes).unwrap();
                bytes
            };
            for fragment in ["mem", "mem_metadata"] {
                assert!(read("direct", fragment) == read("spooled", fragment), "{fragment}");
            }
        }
    }
}

/// A spool over a file that the test keeps open.
fn open_spool(encrypted: bool) -> (Spool, File) {
    let file = tempfile::tempfile().unwrap();
    let scratch = ScratchWriter::new(file.try_clone().unwrap(), encrypted, AAD, 2).unwrap();
    (Spool::over(SpoolFile::Scratch(scratch), "the temporary copy of guest memory".into()), file)
}

#[test]
fn bytes_that_changed_on_the_disk_are_never_returned() {
    let (mut spool, file) = open_spool(true);
    let area = spool.add_area(200 * PAGE);
    for at in 0..200 {
        put(&mut spool, area, at, &page(at));
    }
    let pages = finish(spool);
    let source = pages.source(area, 0..200 * PAGE);
    let segment = |index: u64| crate::cipher::segment_offset(index, PAGE_BYTES);
    let mut segments = [[0; PAGE_BYTES + 32]; 2];
    file.read_exact_at(&mut segments[0], segment(70)).unwrap();
    file.read_exact_at(&mut segments[1], segment(71)).unwrap();
    let mut flipped = segments[0];
    flipped[100] ^= 1;
    // A flipped bit, another page's segment, and nothing at all.
    for damaged in [flipped, segments[1], [0; PAGE_BYTES + 32]] {
        file.write_all_at(&damaged, segment(70)).unwrap();
        let mut buf = vec![9; 10 * PAGE_BYTES];
        let error = source.read_at(65 * PAGE, &mut buf).unwrap_err();
        assert!(!super::super::source::is_of_page(&error));
        let error = Error::from(error);
        assert!(error.is_authentication());
        assert!(error.to_string().starts_with("the temporary copy of guest memory: "), "{error}");
        assert!(is_zero(&buf));
        // A dump does not take it for a page that cannot be read.
        let folder = tempfile::tempdir().unwrap();
        let regions = [GuestRegion::new(0, pages.source(area, 0..200 * PAGE))];
        let options = MemoryOptions::new().zero_unreadable(true);
        let error = writer(folder.path(), "vm", None).write_memory(&regions, &options).unwrap_err();
        assert!(error.is_authentication(), "{error}");
        // The other pages are sound.
        assert!(bytes_of(&pages.source(area, 71 * PAGE..72 * PAGE)) == page(71));
    }
    file.write_all_at(&segments[0], segment(70)).unwrap();
    assert!(bytes_of(&pages.source(area, 70 * PAGE..71 * PAGE)) == page(70));
    file.set_len(segment(70)).unwrap();
    let error = Error::from(source.read_at(70 * PAGE, &mut [0; 10]).unwrap_err());
    assert!(error.is_authentication(), "{error}");
}

#[test]
fn a_plain_file_that_was_cut_is_an_error() {
    let (mut spool, file) = open_spool(false);
    let area = spool.add_area(PAGE);
    put(&mut spool, area, 0, &page(0));
    let pages = finish(spool);
    file.set_len(10).unwrap();
    let error = pages.source(area, 0..PAGE).read_at(0, &mut [0; 11]).unwrap_err();
    assert!(!super::super::source::is_of_page(&error));
    assert!(Error::from(error).is_corrupt());
}

/// Puts pages until that fails, and returns the error. From then on the spool must refuse everything.
fn failure(mut spool: Spool) -> Error {
    let area = spool.add_area(1 << 30);
    let mut puts = (0..10_000).map(|at| with(|interrupt| spool.put(area, at, &page(at), interrupt)));
    let error = puts.find_map(Result::err).unwrap();
    let again = puts.next().unwrap().unwrap_err();
    assert!(again.is_state(), "{again}");
    drop(puts);
    assert!(with(|interrupt| spool.finish(interrupt)).err().unwrap().is_state());
    error
}

#[test]
fn a_full_disk_is_an_error_that_says_how_much_is_needed() {
    let full = File::options().read(true).write(true).open("/dev/full").unwrap();
    let scratch = ScratchWriter::new(full, false, AAD, 2).unwrap();
    let error = failure(Spool::over(SpoolFile::Scratch(scratch), "the temporary copy of guest memory in vm".into()));
    assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
    let text = error.to_string();
    assert!(text.starts_with("the temporary copy of guest memory in vm cannot be written: "), "{text}");
    assert!(text.contains("needs up to 1073741824 bytes") && text.contains("No space left"), "{text}");
}

#[test]
fn a_write_that_fails_in_the_background_is_an_error() {
    let file = memfd_create("spool", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).unwrap();
    let scratch = ScratchWriter::new(file.try_clone().unwrap().into(), true, AAD, 2).unwrap();
    fcntl_add_seals(&file, SealFlags::GROW).unwrap();
    let error = failure(Spool::over(SpoolFile::Scratch(scratch), "the temporary copy of guest memory".into()));
    assert_eq!(error.raw_os_error(), Some(libc::EPERM));
    assert!(error.to_string().starts_with("the temporary copy of guest memory: cannot be written: "), "{error}");
}

/// The number of files that this process has open below a directory.
fn open_files(folder: &Path) -> usize {
    let descriptors = std::fs::read_dir("/proc/self/fd").unwrap();
    let paths = descriptors.filter_map(|entry| std::fs::read_link(entry.unwrap().path()).ok());
    paths.filter(|path| path.starts_with(folder)).count()
}

#[test]
fn its_file_is_closed_and_so_freed_when_it_is_dropped() {
    for encrypted in [false, true] {
        let folder = tempfile::tempdir().unwrap();
        let key = SecretKey::generate().unwrap();
        let fill = || {
            let name = format!("vm{}", std::fs::read_dir(&folder).unwrap().count());
            let mut spool = Spool::new(&writer(folder.path(), &name, encrypted.then_some(&key))).unwrap();
            scattered(&mut spool, 1000);
            spool
        };
        let unfinished = fill();
        assert!(open_files(folder.path()) > 0);
        drop(unfinished);
        assert_eq!(open_files(folder.path()), 0);
        let mut interrupted = fill();
        let stop = &mut || Err(Error::interrupted());
        let mut interrupt = Interrupt::new(stop);
        while interrupted.put(0, 0, &page(0), &mut interrupt).is_ok() {}
        assert_eq!(open_files(folder.path()), 0);
        let pages = finish(fill());
        let source = pages.source(0, 0..PAGE);
        drop(pages);
        assert_eq!(open_files(folder.path()), 1);
        assert!(source.read_at(0, &mut [0; 10]).is_ok());
        drop(source);
        assert_eq!(open_files(folder.path()), 0);
    }
}

#[test]
fn it_is_not_in_the_snapshot() {
    let folder = tempfile::tempdir().unwrap();
    for encrypted in [false, true] {
        for archive in [false, true] {
            let location = folder.path().join(format!("vm {encrypted} {archive}"));
            let mut options = SnapshotOptions::new().archive(archive);
            if encrypted {
                options = options.key(SecretKey::generate().unwrap());
            }
            let mut staged = options.create(&location).unwrap();
            let mut spool = Spool::new(staged.writer()).unwrap();
            let bytes = scattered(&mut spool, 300);
            let pages = finish(spool);
            let regions = [GuestRegion::new(0, pages.source(0, 0..300 * PAGE))];
            staged.writer().write_memory(&regions, &MemoryOptions::new()).unwrap();
            staged.commit().unwrap();
            let reader = options.open(&location).unwrap();
            assert_eq!(reader.list_fragments().unwrap(), ["mem", "mem_metadata"]);
            // The spool is still usable: a regular file that only this process has.
            assert!(bytes_of(&pages.source(0, 0..300 * PAGE)) == bytes);
        }
    }
}

#[test]
fn an_interruption_ends_it() {
    for encrypted in [false, true] {
        let (mut spool, _file) = open_spool(encrypted);
        let area = spool.add_area(PAGE);
        let stop = &mut || Err(Error::interrupted());
        let mut interrupt = Interrupt::new(stop);
        let error = loop {
            if let Err(error) = spool.put(area, 0, &page(0), &mut interrupt) {
                break error;
            }
        };
        assert!(error.is_interrupted());
    }
}

#[test]
#[allow(unsafe_code, reason = "fork is in no safe crate")]
fn a_forked_process_can_neither_fill_nor_read_it() {
    for encrypted in [false, true] {
        let fill = || {
            let (mut spool, _file) = open_spool(encrypted);
            spool.add_area(2 * PAGE);
            put(&mut spool, 0, 0, &page(0));
            spool
        };
        let (mut filled, finished, source) = (fill(), fill(), finish(fill()).source(0, 0..PAGE));
        // SAFETY: the child only calls functions that refuse to run after a fork, and ends without cleaning up.
        let child = unsafe { libc::fork() };
        if child == 0 {
            let refused = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                let errors = [
                    with(|interrupt| filled.put(0, 1, &page(1), interrupt)).err(),
                    with(|interrupt| finished.finish(interrupt)).err(),
                    source.read_at(0, &mut [0; 10]).err().map(Error::from),
                ];
                errors.iter().flatten().filter(|error| error.is_state()).count() == 3
            }));
            // SAFETY: ends the child.
            unsafe { libc::_exit(i32::from(!refused.unwrap_or(false))) };
        }
        let mut status = -1;
        // SAFETY: the process is a child of this one, and the status is written to a variable.
        assert_eq!(unsafe { libc::waitpid(child, &raw mut status, 0) }, child);
        assert_eq!(status, 0);
        assert!(put(&mut filled, 0, 0, &page(2)));
        assert!(bytes_of(&source) == page(0));
    }
}
