//! Predicates of errors. The Python tests cover the whole table of errors.

use std::io::{Read, Write};

use vmsnap::{Error, SecretKey, SnapshotOptions, SnapshotReader, SnapshotWriter};

use crate::{encrypted, pattern, place};

#[test]
fn what_exists_is_refused_and_kept() {
    let (_directory, root) = place();
    let writer = SnapshotWriter::new(root.clone(), false).unwrap();
    writer.write_fragment("clock", &1).unwrap();
    let before = std::fs::read(root.join("clock")).unwrap();
    for error in [
        SnapshotWriter::new(root.clone(), false).unwrap_err(),
        writer.raw_fragment("clock").unwrap_err(),
        writer.add_namespace("clock").unwrap_err(),
    ] {
        assert!(error.is_io());
        assert_eq!(error.raw_os_error(), Some(17), "{error}"); // EEXIST
    }
    assert_eq!(std::fs::read(root.join("clock")).unwrap(), before);
}

#[test]
fn an_error_survives_the_way_through_io_error() {
    let options = encrypted();
    let (_directory, root) = place();
    let mut fragment = options.create_in_place(&root).unwrap().raw_fragment("mem").unwrap();
    fragment.write_all(&pattern(10_000)).unwrap();
    fragment.finish().unwrap();
    let path = root.join("mem");
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[100] ^= 1;
    std::fs::write(&path, bytes).unwrap();

    let mut reader = options.open(&root).unwrap().raw_fragment("mem").unwrap();
    let mut buf = vec![0xff; 10_000];
    let error = reader.read(&mut buf).unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::InvalidData);
    let error = Error::from(error);
    assert!(error.is_authentication() && error.to_string().contains("fragment \"mem\""), "{error}");
    assert!(reader.read_at(0, &mut buf).unwrap_err().is_authentication());
    assert!(buf.iter().all(|byte| *byte == 0), "the buffer has plaintext after a failed read");
    // Undamaged segments can still be read.
    assert_eq!(reader.read_at(4096, &mut buf[..4096]).unwrap(), 4096);
}

#[test]
fn a_wrong_key_and_a_plain_snapshot_are_told_apart() {
    let (_directory, root) = place();
    encrypted().create_in_place(&root).unwrap();
    assert!(encrypted().open(&root).unwrap_err().is_authentication());
    assert!(SnapshotReader::new(&root, false).unwrap_err().is_key_unavailable());
    let (_directory, root) = place();
    SnapshotOptions::new().create_in_place(&root).unwrap();
    assert!(encrypted().open(&root).unwrap_err().is_not_encrypted());
    assert!(SnapshotReader::new(&root, true).unwrap_err().is_not_encrypted());
}

#[test]
fn sizes_out_of_range_are_invalid_arguments() {
    let (_directory, root) = place();
    let writer = encrypted().create_in_place(&root).unwrap();
    for chunk in [0, 31, vmsnap::MAX_CHUNK_SIZE_BYTES + 1, usize::MAX] {
        assert!(writer.raw_fragment_with_chunk_size("f", chunk).unwrap_err().is_invalid_argument());
    }
    assert!(SecretKey::from_slice(&[0; 33]).unwrap_err().is_invalid_argument());
    assert!(SnapshotOptions::new().threads(0).open(&root).unwrap_err().is_invalid_argument());
    assert!(!root.join("f").exists());
}
