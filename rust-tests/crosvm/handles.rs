//! Handles of both kinds, converted into each other.

use std::io::{Read, Write};

use vmsnap::crosvm::{AnySnapshot, SnapshotReader, SnapshotWriter};
use vmsnap::{SecretKey, SnapshotOptions};

use crate::place;

#[test]
fn a_key_is_given_by_way_of_the_options() {
    let (_directory, root, _) = place();
    let options = SnapshotOptions::new().key(SecretKey::from([7; 32]));
    let writer = SnapshotWriter::from(in_place(&options, &root));
    writer.raw_fragment_with_chunk_size("mem", 64).unwrap().write_all(&[1; 1000]).unwrap();
    assert!(writer.raw_fragment_with_chunk_size("other", 1).is_err());
    assert!(!format!("{writer:?}").contains("7, 7"));
    assert!(SnapshotReader::new(&root, true).is_err());

    let reader = options.open(&root).unwrap();
    assert_eq!(reader.raw_fragment("mem").unwrap().chunk_size_bytes(), Some(64));
    let mut content = Vec::new();
    SnapshotReader::from(reader).raw_fragment("mem").unwrap().read_to_end(&mut content).unwrap();
    assert_eq!(content, [1; 1000]);
}

#[test]
fn a_dropped_box_of_a_staged_snapshot_is_finished() {
    let (_directory, root, _) = place();
    for options in [SnapshotOptions::new(), SnapshotOptions::new().key(SecretKey::from([7; 32]))] {
        let mut staged = options.create(&root).unwrap();
        let writer = SnapshotWriter::from(staged.writer().clone());
        let devices = writer.add_namespace("devices").unwrap();
        devices.raw_fragment("nic").unwrap().write_all(b"state").unwrap();
        writer.write_fragment("clock", &12).unwrap();
        writer.check_dropped().unwrap();
        staged.commit().unwrap();
        let reader = SnapshotReader::from(options.clone().require_sealed(true).open(&root).unwrap());
        let mut state = String::new();
        reader.namespace("devices").unwrap().raw_fragment("nic").unwrap().read_to_string(&mut state).unwrap();
        assert_eq!(state, "state");
        std::fs::remove_dir_all(&root).unwrap();
    }
}

#[test]
fn handles_and_values_of_one_kind_serialize_as_those_of_the_other() {
    let (_directory, root, _) = place();
    let writer = SnapshotWriter::new(root.clone(), false).unwrap();
    let own: vmsnap::SnapshotWriter = serde_json::from_value(serde_json::to_value(&writer).unwrap()).unwrap();
    own.write_fragment("a", &1).unwrap();
    vmsnap::SnapshotWriter::from(writer).write_fragment("b", &2).unwrap();
    let reader = SnapshotReader::new(&root, false).unwrap();
    let own: vmsnap::SnapshotReader = serde_json::from_value(serde_json::to_value(&reader).unwrap()).unwrap();
    assert_eq!((own.list_fragments().unwrap(), reader.list_fragments().unwrap()), (names(), names()));
    assert_eq!(vmsnap::SnapshotReader::from(reader).read_fragment::<u8>("b").unwrap(), 2);

    let value = AnySnapshot::to_any([1, 2]).unwrap();
    let own = vmsnap::AnySnapshot::from(value.clone());
    let encoded = |value: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = Vec::new();
        value(&mut bytes);
        bytes
    };
    let theirs = encoded(&|bytes| ciborium::into_writer(&value, bytes).unwrap());
    assert_eq!(encoded(&|bytes| ciborium::into_writer(&own, bytes).unwrap()), theirs);
    assert_eq!(AnySnapshot::from(own), value);
}

fn names() -> Vec<String> {
    ["a", "b"].map(str::to_owned).into()
}

/// A snapshot written in place with the real API.
pub(crate) fn in_place(options: &SnapshotOptions, root: &std::path::Path) -> vmsnap::SnapshotWriter {
    options.create_in_place(root).unwrap()
}
