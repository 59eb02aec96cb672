//! A snapshot in one file: packed, unpacked, and created as an archive.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::Path;

use vmsnap::{Error, SealId, SecretKey, SnapshotOptions, StagedSnapshot};

use crate::{encrypted, pattern};

fn both() -> [SnapshotOptions; 2] {
    [SnapshotOptions::new(), encrypted()]
}

/// All entries below a directory: the contents of files, `None` for directories.
fn tree(directory: &Path) -> BTreeMap<String, Option<Vec<u8>>> {
    let mut found = BTreeMap::new();
    let mut pending = vec![directory.to_owned()];
    while let Some(next) = pending.pop() {
        for entry in std::fs::read_dir(next).unwrap() {
            let path = entry.unwrap().path();
            let name = path.strip_prefix(directory).unwrap().to_str().unwrap().to_owned();
            if path.is_dir() {
                found.insert(name, None);
                pending.push(path);
            } else {
                found.insert(name, Some(std::fs::read(&path).unwrap()));
            }
        }
    }
    found
}

fn entries(directory: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn write(staged: &StagedSnapshot, name: &str, bytes: &[u8]) {
    let mut fragment = staged.writer().raw_fragment_with_chunk_size(name, 64 << 10).unwrap();
    fragment.write_all(bytes).unwrap();
    fragment.finish().unwrap();
}

/// Fragments of many sizes, at both sides of every limit of the layout, and namespaces.
fn fill(staged: &StagedSnapshot) {
    for length in [0, 1, 511, 512, 513, 65_535, 65_536, 65_537, 5 << 20] {
        write(staged, &format!("of {length}"), &pattern(length));
    }
    let devices = staged.writer().add_namespace("devices").unwrap();
    for number in 0..100_u32 {
        devices.write_fragment(&format!("device {number}"), &number).unwrap();
    }
    devices.add_namespace("nested").unwrap().write_fragment("\u{e9}t\u{e9}", &"a name that is not ASCII").unwrap();
    staged.writer().add_namespace("empty").unwrap();
    staged.writer().add_namespace(&"n".repeat(200)).unwrap().write_fragment(&"f".repeat(200), &true).unwrap();
}

fn sealed(options: &SnapshotOptions, location: &Path) -> SealId {
    let mut staged = options.create(location).unwrap();
    fill(&staged);
    staged.commit().unwrap()
}

fn small(options: &SnapshotOptions, location: &Path) -> SealId {
    let mut staged = options.create(location).unwrap();
    write(&staged, "b", &pattern(700));
    staged.writer().add_namespace("n").unwrap().write_fragment("c", &1).unwrap();
    staged.commit().unwrap()
}

fn packed(options: &SnapshotOptions, location: &Path) -> Vec<u8> {
    let mut stream = Vec::new();
    options.pack_to(location, &mut stream).unwrap();
    stream
}

#[test]
fn what_was_packed_and_unpacked_is_the_same_snapshot() {
    for options in both() {
        let directory = tempfile::tempdir().unwrap();
        let [original, first, second, copy, streamed] =
            ["vm1", "first.tar", "second", "copy", "streamed"].map(|name| directory.path().join(name));
        let id = sealed(&options, &original);
        assert_eq!(options.pack(&original, &first).unwrap(), id);
        assert_eq!(options.pack(&original, &second).unwrap(), id);
        let bytes = std::fs::read(&first).unwrap();
        assert!(bytes == std::fs::read(&second).unwrap());
        assert!(bytes == packed(&options, &original));
        assert_eq!(std::fs::metadata(&first).unwrap().permissions().mode() & 0o7777, 0o600);

        assert_eq!(options.unpack(&first, &copy).unwrap(), id);
        assert_eq!(options.unpack_from(&mut &bytes[..], &streamed).unwrap(), id);
        let expected = tree(&original);
        assert_eq!(expected.len(), 9 + 100 + 6 + 1 + usize::from(options.open(&copy).unwrap().is_encrypted()));
        assert!(tree(&copy) == expected && tree(&streamed) == expected);
        assert!(options.verify(&copy).unwrap().is_ok());
        assert_eq!(entries(directory.path()), ["copy", "first.tar", "second", "streamed", "vm1"]);
    }
}
