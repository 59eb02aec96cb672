//! A snapshot in one file: packed, unpacked, and created as an archive.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::Path;

use vmsnap::{Error, SealId, SnapshotOptions, StagedSnapshot};

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

#[test]
fn an_archive_passes_through_a_pipe() {
    for options in both() {
        let directory = tempfile::tempdir().unwrap();
        let [original, copy] = ["vm1", "copy"].map(|name| directory.path().join(name));
        let id = sealed(&options, &original);
        let (mut reader, mut writer) = std::io::pipe().unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                assert_eq!(options.pack_to(&original, &mut writer).unwrap(), id);
                drop(writer);
            });
            assert_eq!(options.unpack_from(&mut reader, &copy).unwrap(), id);
        });
        assert!(tree(&copy) == tree(&original));
        // A reader that goes away is an error.
        let (reader, mut writer) = std::io::pipe().unwrap();
        drop(reader);
        let error = options.pack_to(&original, &mut writer).unwrap_err();
        assert!(error.raw_os_error() == Some(32) && error.to_string().contains("cannot pack"), "{error}");
    }
}

#[test]
fn an_empty_snapshot_and_one_with_thousands_of_fragments() {
    for (options, count) in both().into_iter().flat_map(|options| [(options.clone(), 0), (options, 3000)]) {
        let directory = tempfile::tempdir().unwrap();
        let options = options.durable(false);
        let [original, archive, copy] = ["vm1", "vm1.tar", "copy"].map(|name| directory.path().join(name));
        let mut staged = options.create(&original).unwrap();
        for number in 0..count {
            write(&staged, &format!("{number}"), &pattern(number % 700));
        }
        let id = staged.commit().unwrap();
        assert_eq!(options.pack(&original, &archive).unwrap(), id);
        assert!(std::fs::read(&archive).unwrap() == packed(&options, &original));
        assert_eq!(options.unpack(&archive, &copy).unwrap(), id);
        assert!(tree(&copy) == tree(&original));
    }
}

#[test]
fn zeros_of_a_plain_fragment_take_no_space() {
    let directory = tempfile::tempdir().unwrap();
    let options = SnapshotOptions::new();
    let [original, archive, copy, direct] =
        ["vm1", "vm1.tar", "copy", "vm1.vmsnap.tar"].map(|name| directory.path().join(name));
    let mut bytes = vec![0; (32 << 20) + 5];
    bytes[9 << 20..10 << 20].fill(7);
    for location in [&original, &direct] {
        let mut staged = options.create(location).unwrap();
        write(&staged, "disk", &bytes);
        // As a program leaves it that writes the file of a fragment with holes.
        let disk = std::fs::File::options().write(true).open(staged.writer().location().join("disk")).unwrap();
        disk.set_len(0).unwrap();
        disk.set_len(bytes.len() as u64).unwrap();
        disk.write_all_at(&bytes[9 << 20..10 << 20], 9 << 20).unwrap();
        staged.commit().unwrap();
    }
    options.pack(&original, &archive).unwrap();
    options.unpack(&archive, &copy).unwrap();
    for path in [&archive, &copy.join("disk"), &direct] {
        let allocated = std::fs::metadata(path).unwrap().blocks() * 512;
        assert!(allocated < 4 << 20, "{}: {allocated}", path.display());
    }
    assert!(std::fs::read(copy.join("disk")).unwrap() == bytes);
    options.unpack(&direct, directory.path().join("of direct")).unwrap();
}

/// Unpacks bytes that are not an archive; nothing may be left behind.
fn refused(options: &SnapshotOptions, bytes: &[u8], directory: &Path) -> Error {
    let error = options.unpack_from(&mut &bytes[..], directory.join("copy")).unwrap_err();
    assert_eq!(entries(directory), ["vm1"], "{error}");
    assert!(error.to_string().starts_with("cannot unpack the stream"), "{error}");
    error
}

#[test]
fn a_truncated_archive_is_refused_at_every_length() {
    for options in both() {
        let directory = tempfile::tempdir().unwrap();
        let options = options.durable(false);
        small(&options, &directory.path().join("vm1"));
        let bytes = packed(&options, &directory.path().join("vm1"));
        for length in (0..65_000).step_by(97).chain(65_000..bytes.len()) {
            let error = refused(&options, &bytes[..length], directory.path());
            assert!(error.is_corrupt(), "{length}: {error}");
        }
    }
}

#[test]
fn an_archive_with_any_byte_changed_is_refused() {
    for options in both() {
        let directory = tempfile::tempdir().unwrap();
        let options = options.durable(false);
        let id = small(&options, &directory.path().join("vm1"));
        // Nothing but the digest protects the snapshot id in a plain manifest.
        let options = options.expect_seal_digest(id.seal_digest);
        let mut bytes = packed(&options, &directory.path().join("vm1"));
        for offset in (0..2048).chain((2048..65_000).step_by(61)).chain(65_000..bytes.len()) {
            bytes[offset] ^= 1;
            refused(&options, &bytes, directory.path());
            bytes[offset] ^= 1;
        }
        options.unpack_from(&mut &bytes[..], directory.path().join("copy")).unwrap();
    }
}

#[test]
fn what_follows_the_archive_or_is_not_an_archive_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    let [original, copy, damaged] = ["vm1", "copy", "damaged"].map(|name| directory.path().join(name));
    let options = SnapshotOptions::new();
    small(&options, &original);
    let bytes = packed(&options, &original);
    let mut longer = bytes.clone();
    longer.push(0);
    let mut foreign = tar::Builder::new(Vec::new());
    foreign.append_dir_all("vm1", &original).unwrap();
    let foreign = foreign.into_inner().unwrap();
    for (bytes, text) in [
        (&longer[..], "after the end"),
        (&foreign, "another program"),
        (&bytes[..bytes.len() - 1], "truncated"),
        (b"", "empty"),
        (b"#!/bin/sh\n", "not a vmsnap archive"),
    ] {
        let error = refused(&options, bytes, directory.path());
        assert!(error.is_corrupt() && error.to_string().contains(text), "{error}");
        std::fs::write(&damaged, bytes).unwrap();
        let error = options.unpack(&damaged, &copy).unwrap_err();
        let place = format!("cannot unpack {}: ", damaged.display());
        assert!(error.to_string().starts_with(&place) && error.to_string().contains(text), "{error}");
        std::fs::remove_file(&damaged).unwrap();
    }
    let error = options.unpack(&original, &copy).unwrap_err();
    assert!(error.is_corrupt() && error.to_string().contains("is a directory"), "{error}");
    assert_eq!(options.unpack(&damaged, &copy).unwrap_err().raw_os_error(), Some(2));
    assert!(options.unpack("/dev/null", &copy).unwrap_err().is_invalid_argument());
    assert_eq!(options.unpack_from(&mut &bytes[..], &original).unwrap_err().raw_os_error(), Some(17));
    assert_eq!(entries(directory.path()), ["vm1"]);
}

#[test]
fn an_archive_is_unpacked_with_its_key_and_its_digest_only() {
    let directory = tempfile::tempdir().unwrap();
    let [original, copy] = ["vm1", "copy"].map(|name| directory.path().join(name));
    let options = encrypted();
    let id = small(&options, &original);
    let bytes = packed(&options, &original);
    let error = encrypted().unpack_from(&mut &bytes[..], &copy).unwrap_err();
    assert!(error.is_authentication(), "{error}");
    let error = SnapshotOptions::new().identities([]).unpack_from(&mut &bytes[..], &copy).unwrap_err();
    assert!(
        !cfg!(feature = "age") || error.is_key_unavailable() && error.to_string().contains("tar unpacks it"),
        "{error}"
    );
    let error = options.clone().expect_seal_digest([7; 32]).unpack_from(&mut &bytes[..], &copy).unwrap_err();
    assert!(error.is_authentication() && error.to_string().contains("not the expected one"), "{error}");
    let error = options.clone().expect_seal_digest([7; 32]).pack_to(&original, &mut Vec::new()).unwrap_err();
    assert!(error.is_authentication(), "{error}");
    let expecting = options.expect_seal_digest(id.seal_digest).require_sealed(true);
    expecting.unpack_from(&mut &bytes[..], &copy).unwrap();
    let plain = directory.path().join("plain");
    small(&SnapshotOptions::new(), &plain);
    let error = encrypted().pack_to(&plain, &mut Vec::new()).unwrap_err();
    assert!(error.is_not_encrypted(), "{error}");
}

#[test]
fn a_snapshot_that_differs_from_its_manifest_is_not_packed() {
    /// Damages a snapshot.
    type Damage = fn(&Path);
    let damages: [(&str, Damage); 9] = [
        ("\".vmsnap-0123456789abcdef\"", |path| std::fs::create_dir(path.join(".vmsnap-0123456789abcdef")).unwrap()),
        ("\"extra\"", |path| std::fs::write(path.join("extra"), "x").unwrap()),
        ("\"n/extra\"", |path| std::fs::create_dir(path.join("n/extra")).unwrap()),
        ("\"link\"", |path| std::os::unix::fs::symlink("b", path.join("link")).unwrap()),
        ("fragment \"b\" of", |path| std::fs::remove_file(path.join("b")).unwrap()),
        ("fragment \"b\" of", |path| std::fs::write(path.join("b"), "other").unwrap()),
        ("fragment \"b\" of", |path| {
            let file = std::fs::File::options().append(true).open(path.join("b")).unwrap();
            file.write_all_at(b"more", 0).unwrap();
        }),
        ("fragment \"b\" of", |path| {
            let file = std::fs::File::options().write(true).open(path.join("b")).unwrap();
            file.write_all_at(b"changed", 100).unwrap();
        }),
        ("namespace \"n\"", |path| std::fs::remove_dir_all(path.join("n")).unwrap()),
    ];
    for options in both() {
        for (text, damage) in damages {
            let directory = tempfile::tempdir().unwrap();
            let [original, archive] = ["vm1", "vm1.tar"].map(|name| directory.path().join(name));
            small(&options, &original);
            damage(&original);
            for error in [
                options.pack(&original, &archive).unwrap_err(),
                options.pack_to(&original, &mut Vec::new()).unwrap_err(),
            ] {
                let place = format!("cannot pack the snapshot {}: ", original.display());
                assert!(error.to_string().starts_with(&place) && error.to_string().contains(text), "{error}");
            }
            assert_eq!(entries(directory.path()), ["vm1"]);
        }
    }
}

#[test]
fn a_snapshot_that_is_not_sealed_or_a_target_that_exists_is_refused() {
    for options in both() {
        let directory = tempfile::tempdir().unwrap();
        let [original, archive] = ["vm1", "vm1.tar"].map(|name| directory.path().join(name));
        options.create_in_place(&original).unwrap().write_fragment("clock", &12).unwrap();
        let error = options.pack(&original, &archive).unwrap_err();
        assert!(error.is_not_sealed() && error.to_string().contains("vmsnap seal"), "{error}");
        options.seal(&original).unwrap();
        std::fs::write(&archive, "precious").unwrap();
        assert_eq!(options.pack(&original, &archive).unwrap_err().raw_os_error(), Some(17));
        assert_eq!(std::fs::read(&archive).unwrap(), b"precious");
        assert!(options.pack(&original, original.join("vm1.tar")).unwrap_err().is_invalid_argument());
        assert_eq!(options.pack(&original, directory.path().join("absent/a")).unwrap_err().raw_os_error(), Some(2));
        assert_eq!(entries(directory.path()), ["vm1", "vm1.tar"]);
    }
}

#[test]
fn the_name_decides_whether_a_snapshot_becomes_an_archive() {
    let directory = tempfile::tempdir().unwrap();
    let [named, other] = ["vm1.vmsnap.tar", "vm1"].map(|name| directory.path().join(name));
    let plain = SnapshotOptions::new();
    small(&plain, &named);
    small(&plain, &other);
    assert!(named.is_file() && other.is_dir());
    assert_eq!(std::fs::metadata(&named).unwrap().permissions().mode() & 0o7777, 0o600);
    let error = plain.create_in_place(directory.path().join("vm2.vmsnap.tar")).unwrap_err();
    assert!(error.is_invalid_argument() && error.to_string().contains("use create()"), "{error}");
    assert!(plain.clone().archive(true).create_in_place(directory.path().join("vm2")).is_err());
    assert_eq!(plain.create(&named).unwrap_err().raw_os_error(), Some(17));
    assert_eq!(entries(directory.path()), ["vm1", "vm1.vmsnap.tar"]);
    std::fs::remove_file(&named).unwrap();
    std::fs::remove_dir_all(&other).unwrap();
    small(&plain.clone().archive(false), &named);
    small(&plain.archive(true), &other);
    assert!(named.is_dir() && other.is_file());
}

#[test]
fn an_archive_that_a_commit_makes_is_the_one_that_pack_makes() {
    // The file systems of both differ on most machines: one moves the blocks, the other copies.
    for parent in [None, Some("/dev/shm")] {
        let temporary = || parent.map_or_else(tempfile::tempdir, tempfile::tempdir_in);
        for (options, largest) in both().into_iter().flat_map(|options| [(options.clone(), 0), (options, 17 << 20)]) {
            let Ok(directory) = temporary() else { continue };
            let [direct, copy, again] = ["vm1.vmsnap.tar", "copy", "again"].map(|name| directory.path().join(name));
            let mut staged = options.create(&direct).unwrap();
            fill(&staged);
            write(&staged, "memory", &pattern(largest));
            let id = staged.commit().unwrap();
            assert_eq!(entries(directory.path()), ["vm1.vmsnap.tar"]);
            assert!(staged.commit().unwrap_err().is_state());
            assert_eq!(options.unpack(&direct, &copy).unwrap(), id);
            assert!(options.verify(&copy).unwrap().is_ok());
            options.pack(&copy, &again).unwrap();
            assert!(std::fs::read(&direct).unwrap() == std::fs::read(&again).unwrap());
        }
    }
}

#[test]
fn an_independent_reader_of_tar_unpacks_the_same_snapshot() {
    for options in both() {
        let directory = tempfile::tempdir().unwrap();
        let [original, copy] = ["vm1", "copy"].map(|name| directory.path().join(name));
        sealed(&options, &original);
        let bytes = packed(&options, &original);
        std::fs::create_dir(&copy).unwrap();
        tar::Archive::new(&bytes[..]).unpack(&copy).unwrap();
        assert!(tree(&copy) == tree(&original));
    }
}

#[test]
fn a_stream_that_fails_ends_the_call_with_its_error() {
    struct Failing(usize);
    impl Read for Failing {
        fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
            if self.0 == 0 {
                return Err(std::io::Error::from_raw_os_error(5));
            }
            let count = buf.len().min(self.0);
            self.0 -= count;
            buf[..count].fill(b' ');
            Ok(count)
        }
    }
    let directory = tempfile::tempdir().unwrap();
    for readable in [0, 700] {
        let error =
            SnapshotOptions::new().unpack_from(&mut Failing(readable), directory.path().join("copy")).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(5), "{error}");
    }
}

#[test]
fn an_archive_is_sealed_for_a_caller_without_its_key_too() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("vm1.vmsnap.tar");
    sealed(&encrypted(), &path);
    let options = SnapshotOptions::new();
    assert!(options.append(&path).unwrap_err().is_sealed());
    assert!(options.seal(&path).unwrap_err().is_sealed());
    assert!(options.open(&path).unwrap_err().is_key_unavailable());
}
