//! Guest memory is restored exactly, for any pattern of holes, zeros and data.

use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use proptest::prelude::*;
use serde::Deserialize;
use vmsnap::{
    FileMemory, GuestDestination, GuestMemory, GuestMemorySource, GuestRegion, MemoryOptions, SecretKey,
    SnapshotOptions, SnapshotReader,
};

const PAGE: usize = 4096;

/// A kind of page for each number, in turn.
#[derive(Clone, Copy, Debug)]
enum Page {
    Hole,
    Zero,
    Text,
    Noise,
}

fn noise(seed: usize) -> impl Iterator<Item = u8> {
    let mut state = (seed as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    std::iter::from_fn(move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        Some(state.to_le_bytes()[4])
    })
}

fn memory_of(pages: &[Page], tail: usize) -> (Vec<u8>, File) {
    let file = tempfile::tempfile().unwrap();
    let mut bytes = Vec::new();
    for (number, page) in pages.iter().enumerate() {
        let content: Vec<u8> = match page {
            Page::Hole | Page::Zero => vec![0; PAGE],
            Page::Text => {
                b"a line of text that repeats\n".iter().copied().cycle().skip(number % 28).take(PAGE).collect()
            }
            Page::Noise => noise(number).take(PAGE).collect(),
        };
        if !matches!(page, Page::Hole) {
            file.write_all_at(&content, bytes.len() as u64).unwrap();
        }
        bytes.extend(content);
    }
    bytes.extend(noise(pages.len()).take(tail));
    file.set_len(bytes.len() as u64).unwrap();
    file.write_all_at(&bytes[pages.len() * PAGE..], (pages.len() * PAGE) as u64).unwrap();
    (bytes, file)
}

fn pages() -> impl Strategy<Value = Vec<Page>> {
    let kind = prop_oneof![Just(Page::Hole), Just(Page::Zero), Just(Page::Text), Just(Page::Noise)];
    let run = (kind, prop_oneof![1..3_usize, 1..70_usize]);
    prop::collection::vec(run, 0..12)
        .prop_map(|runs| runs.into_iter().flat_map(|(kind, count)| std::iter::repeat_n(kind, count)).collect())
}

fn check(memory: &GuestMemory, expected: &[&[u8]], bases: &[u64], seed: usize) {
    // Destinations: fresh and used buffers, fresh and used files.
    let mut fresh: Vec<_> = expected.iter().map(|bytes| vec![0; bytes.len()]).collect();
    let mut used: Vec<_> = expected.iter().map(|bytes| vec![0xee; bytes.len()]).collect();
    for buffers in [&mut fresh, &mut used] {
        let mut destinations: Vec<_> =
            buffers.iter_mut().zip(bases).map(|(buffer, base)| GuestDestination::buffer(buffer).at(*base)).collect();
        memory.restore(&mut destinations).unwrap();
        assert!(buffers.iter().zip(expected).all(|(buffer, bytes)| buffer == bytes));
    }
    for filled in [false, true] {
        let files: Vec<_> = expected.iter().map(|_| tempfile::tempfile().unwrap()).collect();
        if filled {
            let fill = |(file, bytes): (&File, &&[u8])| file.write_all_at(&vec![0xee; bytes.len()], 0).unwrap();
            files.iter().zip(expected).for_each(fill);
        }
        let mut destinations: Vec<_> = files.iter().map(|file| GuestDestination::file(file, None)).collect();
        memory.restore(&mut destinations).unwrap();
        for (file, bytes) in files.iter().zip(expected) {
            let mut back = vec![1; bytes.len()];
            assert_eq!(file.metadata().unwrap().len(), bytes.len() as u64);
            file.read_exact_at(&mut back, 0).unwrap();
            assert!(&back == bytes);
        }
    }
    for (number, (bytes, base)) in expected.iter().zip(bases).enumerate() {
        let at = noise(seed + number).map(usize::from).collect_vec(20);
        for (pair, length) in at.windows(2).zip([1, 100, 4096, 5000, 70_000, 600_000].into_iter().cycle()) {
            let start = (pair[0] * 4099 + pair[1]) % (bytes.len() + 1);
            let end = (start + length).min(bytes.len());
            let mut back = vec![0xee; end - start];
            memory.read_at(base + start as u64, &mut back).unwrap();
            assert!(back == bytes[start..end]);
        }
    }
}

trait CollectSome: Iterator + Sized {
    fn collect_vec(self, count: usize) -> Vec<Self::Item> {
        self.take(count).collect()
    }
}

impl<I: Iterator> CollectSome for I {}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn any_memory_comes_back(
        first in pages(), second in pages(), tail in 0..PAGE, detect in any::<bool>(), gap in 0_usize..3, staged in any::<bool>()
    ) {
        let directory = tempfile::tempdir().unwrap();
        let (one, one_file) = memory_of(&first, tail);
        let (other, _) = memory_of(&second, 0);
        let key = SecretKey::generate().unwrap();
        for (kind, (encrypted, compress)) in [(false, false), (false, true), (true, false), (true, true)].into_iter().enumerate() {
            for threads in [1, 3] {
                let options = if encrypted { SnapshotOptions::new().key(key.clone()) } else { SnapshotOptions::new() };
                let options = options.threads(threads);
                let root = directory.path().join(format!("{kind}-{threads}"));
                let regions = [
                    GuestRegion::new(0, FileMemory::new(&one_file, 0, None).unwrap()),
                    GuestRegion::new(1 << 32, &other),
                ];
                let how = MemoryOptions::new()
                    .compress(compress)
                    .detect_zeros(detect)
                    .min_gap_bytes([0, 4096, 65536][gap]);
                let report = if staged {
                    let mut snapshot = options.create(&root).unwrap();
                    let report = snapshot.writer().write_memory(&regions, &how).unwrap();
                    snapshot.commit().unwrap();
                    assert!(options.verify(&root).unwrap().is_ok());
                    report
                } else {
                    options.create_in_place(&root).unwrap().write_memory(&regions, &how).unwrap()
                };
                let memory = options.open(&root).unwrap().memory().unwrap();
                assert_eq!(report.logical_bytes, (one.len() + other.len()) as u64);
                assert_eq!(report.data_bytes, memory.data_bytes());
                assert_eq!(report.ranges, memory.data_ranges(0).len() + memory.data_ranges(1).len());
                let files = ["mem", "mem_metadata"].map(|name| root.join(name).metadata().unwrap().len());
                assert_eq!(report.stored_bytes, files.iter().sum::<u64>());
                check(&memory, &[&one, &other], &[0, 1 << 32], first.len() + kind);
                if !encrypted {
                    let decoded = decode_as_crosvm(&root);
                    assert!(decoded == [one.clone(), other.clone()]);
                }
            }
        }
    }
}

#[derive(Deserialize)]
struct CrosvmMetadata {
    regions: Vec<CrosvmRegion>,
    compressed: bool,
}

#[derive(Deserialize)]
struct CrosvmRegion {
    size: usize,
    data_ranges: Vec<std::ops::Range<usize>>,
}

/// Reads with `ciborium` and the frame decoder of `lz4_flex`, as crosvm does, and without code of vmsnap.
fn decode_as_crosvm(root: &Path) -> Vec<Vec<u8>> {
    let metadata: CrosvmMetadata = ciborium::from_reader(File::open(root.join("mem_metadata")).unwrap()).unwrap();
    let file = File::open(root.join("mem")).unwrap();
    let mut data: Box<dyn Read> =
        if metadata.compressed { Box::new(lz4_flex::frame::FrameDecoder::new(file)) } else { Box::new(file) };
    let mut memory = Vec::new();
    for region in metadata.regions {
        let mut bytes = vec![0; region.size];
        for range in region.data_ranges {
            data.read_exact(&mut bytes[range]).unwrap();
        }
        memory.push(bytes);
    }
    assert_eq!(data.read(&mut [0]).unwrap(), 0, "too many bytes");
    memory
}

fn golden() -> Option<PathBuf> {
    crate::golden::directory()
}

#[test]
fn golden_memory_of_crosvm_comes_back() {
    let Some(golden) = golden() else { return };
    let snapshots = [
        ("crosvm-cbor", "plain", "ram"),
        ("crosvm-cbor", "lz4", "ram"),
        ("crosvm-cbor", "mem-only-lz4-256k-blocks", "ram-b"),
        ("crosvm-json", "plain", "ram"),
        ("crosvm-json", "lz4", "ram"),
    ];
    for (era, name, ram) in snapshots {
        let root = golden.join(era).join(name).join("snapshot");
        let memory = SnapshotReader::new(&root, false).unwrap().memory().unwrap();
        let raw = ["region0-at-0x0-size-262144", "region1-at-0x100000000-size-131072"]
            .map(|region| std::fs::read(golden.join(era).join(format!("{ram}-{region}.raw"))).unwrap());
        check(&memory, &[&raw[0], &raw[1]], &[0, 1 << 32], 1);
    }
}

#[test]
fn wrong_destinations_are_refused_and_nothing_is_written() {
    let directory = tempfile::tempdir().unwrap();
    let options = SnapshotOptions::new();
    let writer = options.create_in_place(directory.path().join("vm1")).unwrap();
    writer.write_memory(&[GuestRegion::new(0x1000, vec![7; 8192])], &MemoryOptions::new()).unwrap();
    let memory = options.open(directory.path().join("vm1")).unwrap().memory().unwrap();
    let file = tempfile::tempfile().unwrap();
    file.set_len(4096).unwrap();
    let read_only = File::open("/dev/zero").unwrap();
    let (mut right, mut long) = (vec![1; 8192], vec![1; 8193]);
    let mut cases = [
        (vec![], "expected 1 memory regions"),
        (vec![GuestDestination::buffer(&mut long)], "has 8193 bytes"),
        (vec![GuestDestination::buffer(&mut right).at(0x2000)], "is at 0x2000"),
        (vec![GuestDestination::file(&file, None)], "has 4096 bytes"),
        (vec![GuestDestination::file(&read_only, None)], "is not a file"),
    ];
    for (destinations, text) in &mut cases {
        let error = memory.restore(destinations).unwrap_err();
        assert!(error.is_invalid_argument() && error.to_string().contains(*text), "{error}");
    }
    drop(cases);
    assert!(right.iter().chain(&long).all(|byte| *byte == 1));
    assert_eq!(file.metadata().unwrap().len(), 4096);
    let at = GuestDestination::file(&file, Some(4096));
    memory.restore(&mut [at]).unwrap();
    assert_eq!(file.metadata().unwrap().len(), 4096 + 8192);
    for (address, size) in [(0, 1), (0x0fff, 2), (0x1000, 8193), (u64::MAX, 1)] {
        assert!(memory.read_at(address, &mut vec![0; size]).unwrap_err().is_invalid_argument());
    }
    memory.read_at(0x3000, &mut []).unwrap();
}

/// Memory with slow reads.
struct Slow;

impl GuestMemorySource for Slow {
    fn size(&self) -> u64 {
        1 << 30
    }

    fn read_at(&self, _offset: u64, buf: &mut [u8]) -> std::io::Result<usize> {
        std::thread::sleep(std::time::Duration::from_millis(20));
        buf.fill(7);
        Ok(buf.len())
    }
}

/// Memory with a page that cannot be read.
struct Broken;

impl GuestMemorySource for Broken {
    fn size(&self) -> u64 {
        8 << 20
    }

    fn read_at(&self, offset: u64, buf: &mut [u8]) -> std::io::Result<usize> {
        const BAD: u64 = 0x30_0000;
        if (BAD..BAD + 4096).contains(&offset) {
            return Err(std::io::Error::from_raw_os_error(14)); // EFAULT
        }
        let length = if offset < BAD { buf.len().min(usize::try_from(BAD - offset).unwrap()) } else { buf.len() };
        buf[..length].fill(7);
        Ok(length)
    }
}

#[test]
fn memory_that_cannot_be_read_is_told_with_its_address() {
    let directory = tempfile::tempdir().unwrap();
    let writer = SnapshotOptions::new().create_in_place(directory.path().join("vm1")).unwrap();
    let regions = [GuestRegion::new(0x1000_0000, Broken)];
    let error = writer.write_memory(&regions, &MemoryOptions::new()).unwrap_err();
    assert!(error.raw_os_error() == Some(14) && error.to_string().contains("0x10300000"), "{error}");
    let report = writer.write_memory(&regions, &MemoryOptions::new().zero_unreadable(true)).unwrap();
    assert_eq!(report.unreadable, std::slice::from_ref(&(0x1030_0000..0x1030_1000)));
    assert_eq!(report.data_bytes, (8 << 20) - 4096);
}

#[test]
fn a_region_of_an_exabyte_takes_no_memory() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path().join("vm1");
    let writer = SnapshotOptions::new().create_in_place(&root).unwrap();
    writer.write_memory(&[GuestRegion::new(0, vec![7; 8192])], &MemoryOptions::new()).unwrap();
    let ranges = [(1_u64 << 41, (1_u64 << 41) + 4096), ((1 << 41) + (9 << 20), (1 << 41) + (9 << 20) + 4096)];
    let ranges: Vec<_> = ranges.iter().map(|(start, end)| serde_json::json!({"start": start, "end": end})).collect();
    let metadata = |size: u64| {
        let region = serde_json::json!({"guest_base": 0, "size": size, "data_ranges": ranges});
        serde_json::json!({"regions": [region], "compressed": false})
    };
    let file = File::create_new(directory.path().join("image")).unwrap();
    for (size, sparse) in [(1_u64 << 60, false), (1 << 42, true)] {
        std::fs::write(root.join("mem_metadata"), metadata(size).to_string()).unwrap();
        let memory = SnapshotReader::new(&root, false).unwrap().memory().unwrap();
        let mut page = [0; 4096];
        memory.read_at((1 << 41) + (9 << 20), &mut page).unwrap();
        assert_eq!(page, [7; 4096]);
        let restored = memory.restore(&mut [GuestDestination::file(&file, None)]);
        // Most file systems cannot hold an exabyte. All file systems in use can hold some terabytes of holes.
        if sparse {
            restored.unwrap();
            let file = File::open(directory.path().join("image")).unwrap();
            file.read_exact_at(&mut page, 1 << 41).unwrap();
            assert_eq!(page, [7; 4096]);
        } else if restored.is_ok() {
            file.set_len(0).unwrap();
        }
    }
}

#[test]
fn regions_that_overlap_are_refused_and_a_cancelled_dump_leaves_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let root = directory.path().join("vm1");
    let writer = SnapshotOptions::new().create_in_place(&root).unwrap();
    let page = vec![7; 4096];
    for bases in [[0, 4095], [0, u64::MAX - 4094]] {
        let error =
            writer.write_memory(&bases.map(|base| GuestRegion::new(base, &page)), &MemoryOptions::new()).unwrap_err();
        assert!(error.is_invalid_argument(), "{error}");
    }
    let regions = [GuestRegion::new(0, Slow)];
    let error = writer
        .write_memory_interruptible(&regions, &MemoryOptions::new().compress(true), &mut |_| {
            Err(vmsnap::Error::interrupted())
        })
        .unwrap_err();
    assert!(error.is_interrupted());
    assert_eq!(std::fs::read_dir(&root).unwrap().count(), 0);
}
