//! Round trips: lengths around every boundary, writes divided in every way, reads at any offset.

use std::io::{Read, Seek, SeekFrom, Write};

use proptest::prelude::*;
use vmsnap::{Error, SnapshotOptions};

use crate::{encrypted, pattern, place};

#[test]
fn every_length_around_a_boundary_comes_back() {
    for options in [SnapshotOptions::new(), encrypted()] {
        let (_directory, root) = place();
        let writer = options.create_in_place(&root).unwrap();
        for chunk in [32_usize, 4096, 65_536, 1 << 20] {
            // Around the chunk, the batch (256 KiB), and the size of writes that are encrypted directly from the
            // caller's buffer (4 MiB).
            for base in [0, chunk, 2 * chunk, 256 << 10, 4 << 20, (4 << 20) + chunk] {
                for length in [base.saturating_sub(1), base, base + 1] {
                    let name = format!("{chunk}-{base}-{length}");
                    let data = pattern(length);
                    let mut fragment = writer.raw_fragment_with_chunk_size(&name, chunk).unwrap();
                    fragment.write_all(&data).unwrap();
                    assert_eq!(fragment.written(), length as u64);
                    fragment.finish().unwrap();

                    let mut reader = options.open(&root).unwrap().raw_fragment(&name).unwrap();
                    assert_eq!(reader.size(), length as u64);
                    let mut back = Vec::new();
                    reader.read_to_end(&mut back).unwrap();
                    assert!(back == data, "{name}");
                    let segments = length.div_ceil(chunk).max(1) as u64;
                    let stored =
                        if options_encrypt(&reader) { 74 + 32 * segments + length as u64 } else { length as u64 };
                    assert_eq!(reader.stored_size(), stored, "{name}");
                    std::fs::remove_file(root.join(&name)).unwrap();
                }
            }
        }
    }
}

fn options_encrypt(reader: &vmsnap::FragmentReader) -> bool {
    reader.chunk_size_bytes().is_some()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn writes_split_in_any_way_give_the_same_fragment(
        chunk in prop_oneof![32_usize..200, Just(4096), 60_000_usize..300_000],
        writes in prop::collection::vec(prop_oneof![0_usize..300, 3_000_usize..5_000, 100_000_usize..700_000], 0..12),
        encrypt in any::<bool>(),
    ) {
        let options = if encrypt { encrypted() } else { SnapshotOptions::new() };
        let (_directory, root) = place();
        let data = pattern(writes.iter().sum());
        let mut fragment = options.create_in_place(&root).unwrap().raw_fragment_with_chunk_size("f", chunk).unwrap();
        let mut rest = &data[..];
        for length in writes {
            let (now, later) = rest.split_at(length);
            fragment.write_all(now).unwrap();
            rest = later;
        }
        fragment.finish().unwrap();
        let reader = options.open(&root).unwrap().raw_fragment("f").unwrap();
        let mut back = vec![0; data.len() + 1];
        prop_assert_eq!(reader.read_at(0, &mut back).unwrap(), data.len());
        prop_assert!(back[..data.len()] == data);
    }

    #[test]
    fn reads_at_any_place_give_what_was_written(
        chunk in prop_oneof![32_usize..200, Just(4096), 60_000_usize..300_000],
        length in 0_usize..1_500_000,
        reads in prop::collection::vec((0_u64..1_600_000, prop_oneof![0_usize..300, 0_usize..900_000], any::<bool>()), 1..12),
        encrypt in any::<bool>(),
    ) {
        let options = if encrypt { encrypted() } else { SnapshotOptions::new() };
        let (_directory, root) = place();
        let data = pattern(length);
        let mut fragment = options.create_in_place(&root).unwrap().raw_fragment_with_chunk_size("f", chunk).unwrap();
        fragment.write_all(&data).unwrap();
        fragment.finish().unwrap();
        let mut reader = options.open(&root).unwrap().raw_fragment("f").unwrap();
        for (offset, wanted, in_order) in reads {
            let start = data.len().min(usize::try_from(offset).unwrap());
            let expected = &data[start..data.len().min(start + wanted)];
            let mut buf = vec![0xee; wanted];
            let read = if in_order {
                reader.seek(SeekFrom::Start(offset)).unwrap();
                reader.read(&mut buf).unwrap()
            } else {
                reader.read_at(offset, &mut buf).unwrap()
            };
            prop_assert_eq!(read, expected.len());
            prop_assert!(buf[..read] == *expected);
            prop_assert!(buf[read..].iter().all(|byte| *byte == 0xee));
        }
    }
}

#[test]
fn many_threads_read_one_fragment_at_once() {
    let options = encrypted();
    let (_directory, root) = place();
    let data = pattern(3 << 20);
    let mut fragment = options.create_in_place(&root).unwrap().raw_fragment("mem").unwrap();
    fragment.write_all(&data).unwrap();
    fragment.finish().unwrap();
    let reader = options.open(&root).unwrap().raw_fragment("mem").unwrap();
    std::thread::scope(|scope| {
        for thread in 0..8_usize {
            let (reader, data) = (&reader, &data);
            scope.spawn(move || {
                for step in 0..50_usize {
                    let offset = (thread * 77_777 + step * 54_321) % data.len();
                    let mut buf = vec![0; if step % 10 == 0 { 1 << 20 } else { 5000 }];
                    let read = reader.read_at(offset as u64, &mut buf).unwrap();
                    assert!(buf[..read] == data[offset..offset + read]);
                }
            });
        }
    });
}

#[test]
fn a_clone_of_a_reader_has_a_position_of_its_own() {
    let (_directory, root) = place();
    let mut fragment = SnapshotOptions::new().create_in_place(&root).unwrap().raw_fragment("f").unwrap();
    fragment.write_all(b"abcdef").unwrap();
    fragment.finish().unwrap();
    let mut first = vmsnap::SnapshotReader::new(&root, false).unwrap().raw_fragment("f").unwrap();
    first.seek(SeekFrom::Start(2)).unwrap();
    let mut second = first.clone();
    let mut pair = [0; 2];
    first.read_exact(&mut pair).unwrap();
    second.read_exact(&mut pair).unwrap();
    assert_eq!(&pair, b"cd");
    assert!(first.seek(SeekFrom::Current(-5)).is_err());
    assert_eq!(first.stream_position().unwrap(), 4);
}

#[test]
fn dropping_finalizes_and_discarding_removes() {
    for options in [SnapshotOptions::new(), encrypted()] {
        let (_directory, root) = place();
        let writer = options.create_in_place(&root).unwrap();
        writer.raw_fragment("dropped").unwrap().write_all(b"kept").unwrap();
        let mut given_up = writer.raw_fragment("discarded").unwrap();
        given_up.write_all(&pattern(5 << 20)).unwrap();
        given_up.discard().unwrap();
        let reader = options.open(&root).unwrap();
        assert_eq!(reader.list_fragments().unwrap(), ["dropped"]);
        let mut text = String::new();
        reader.raw_fragment("dropped").unwrap().read_to_string(&mut text).unwrap();
        assert_eq!(text, "kept");
    }
}

#[test]
fn a_panic_removes_what_was_half_written() {
    let (_directory, root) = place();
    let writer = encrypted().create_in_place(&root).unwrap();
    let unwound = std::panic::catch_unwind(|| {
        let mut fragment = writer.raw_fragment("half").unwrap();
        fragment.write_all(&pattern(5 << 20)).unwrap();
        panic!("the monitor fails during its dump");
    });
    assert!(unwound.is_err());
    assert!(!root.join("half").exists());
}

#[test]
fn a_panic_in_the_callback_poisons_the_fragment() {
    for options in [SnapshotOptions::new(), encrypted()] {
        let (_directory, root) = place();
        let mut fragment = options.create_in_place(&root).unwrap().raw_fragment("half").unwrap();
        let long = vec![0; 4 << 30];
        let unwound = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            fragment.write_all_interruptible(&long, &mut || panic!("the callback fails"))
        }));
        assert!(unwound.is_err());
        assert!(Error::from(fragment.write_all(b"more").unwrap_err()).is_state());
        assert!(fragment.finish().unwrap_err().is_state());
        assert!(!root.join("half").exists());
    }
}

#[test]
fn a_read_that_fails_leaves_the_position_where_it_was() {
    let options = encrypted();
    let (_directory, root) = place();
    let mut fragment = options.create_in_place(&root).unwrap().raw_fragment("f").unwrap();
    fragment.write_all(&pattern(3 * 4096)).unwrap();
    fragment.finish().unwrap();
    let mut bytes = std::fs::read(root.join("f")).unwrap();
    bytes[74 + 4128 + 100] ^= 1; // in the second segment
    std::fs::write(root.join("f"), bytes).unwrap();
    let mut reader = options.open(&root).unwrap().raw_fragment("f").unwrap();
    reader.seek(SeekFrom::Start(10)).unwrap();
    let mut buf = [0xff; 5000];
    assert!(Error::from(reader.read(&mut buf).unwrap_err()).is_authentication());
    assert!(buf.iter().all(|byte| *byte == 0));
    assert_eq!(reader.stream_position().unwrap(), 10);
}

#[test]
fn a_discarded_fragment_leaves_a_file_that_took_its_place() {
    let (_directory, root) = place();
    let fragment = SnapshotOptions::new().create_in_place(&root).unwrap().raw_fragment("f").unwrap();
    std::fs::remove_file(root.join("f")).unwrap();
    std::fs::write(root.join("f"), b"somebody else's").unwrap();
    fragment.discard().unwrap();
    assert_eq!(std::fs::read(root.join("f")).unwrap(), b"somebody else's");
}

#[test]
fn an_interrupted_write_poisons_the_fragment_and_leaves_no_file() {
    for options in [SnapshotOptions::new(), encrypted(), encrypted().threads(1)] {
        let (_directory, root) = place();
        let mut fragment = options.create_in_place(&root).unwrap().raw_fragment("f").unwrap();
        // The pages are never written, so they take no memory. No machine writes 4 GiB in the 50 ms before the first
        // callback.
        let long = vec![0; 4 << 30];
        let error = fragment.write_all_interruptible(&long, &mut || Err(Error::interrupted())).unwrap_err();
        assert!(error.is_interrupted());
        assert!(fragment.write_all(b"more").unwrap_err().to_string().contains("earlier write failed"));
        assert!(fragment.finish().unwrap_err().is_state());
        assert!(!root.join("f").exists());
    }
}

#[test]
fn an_interrupted_read_leaves_only_zeros() {
    let options = encrypted().threads(1);
    let (_directory, root) = place();
    let mut fragment = options.create_in_place(&root).unwrap().raw_fragment_with_chunk_size("f", 32).unwrap();
    fragment.write_all(&pattern(64 << 20)).unwrap();
    fragment.finish().unwrap();
    let reader = options.open(&root).unwrap().raw_fragment("f").unwrap();
    let mut buf = vec![0xff; 64 << 20];
    // Two million segments take longer than the 50 ms before the first callback.
    let error = reader.read_at_interruptible(0, &mut buf, &mut || Err(Error::interrupted())).unwrap_err();
    assert!(error.is_interrupted());
    assert!(buf.iter().all(|byte| *byte == 0));
}
