//! Commits of archives that fail at every moment, by every way to move the bytes.

use std::collections::BTreeMap;
use std::io::Write;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::process::Command;

use rustix::fs::{MemfdFlags, memfd_create};

use super::*;
use crate::reflink;
use crate::{SecretKey, SnapshotOptions, StagedSnapshot};

/// Set in a child: the directory in which it is killed in the middle of a commit.
const PARENT: &str = "VMSNAP_TEST_ASSEMBLE_PARENT";

const LARGE_BYTES: usize = (17 << 20) + 7;

fn fill(staged: &StagedSnapshot) {
    let write = |writer: &crate::SnapshotWriter, name: &str, length: usize| {
        let bytes: Vec<u8> =
            (0..length).map(|index| (index / 3).to_le_bytes()[0] ^ (index >> 11).to_le_bytes()[0]).collect();
        let mut fragment = writer.raw_fragment_with_chunk_size(name, 64 << 10).unwrap();
        fragment.write_all(&bytes).unwrap();
        fragment.finish().unwrap();
    };
    write(staged.writer(), "a", 100);
    write(staged.writer(), "b", 3 << 20);
    let namespace = staged.writer().add_namespace("ram").unwrap();
    write(&namespace, "mem", LARGE_BYTES);
    write(&namespace, "other", 2 << 20);
}

/// Directories on file systems that differ on most machines: one moves the blocks, the other copies.
fn directories() -> Vec<tempfile::TempDir> {
    std::iter::once(tempfile::tempdir()).chain([tempfile::tempdir_in("/dev/shm")]).flatten().collect()
}

fn options() -> [SnapshotOptions; 2] {
    [SnapshotOptions::new(), SnapshotOptions::new().key(SecretKey::generate().unwrap()).durable(false)]
}

/// The files in a staged directory: permissions, number and contents.
fn files(staged: &StagedSnapshot) -> BTreeMap<String, (u32, u64, Vec<u8>)> {
    let root = staged.writer().location();
    let mut found = BTreeMap::new();
    for directory in [root.to_owned(), root.join("ram")] {
        for entry in std::fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_file() {
                let (metadata, contents) = (path.metadata().unwrap(), std::fs::read(&path).unwrap());
                found.insert(path.display().to_string(), (metadata.mode(), metadata.ino(), contents));
            }
        }
    }
    found
}

/// Whether the file system of a directory can insert room in front of the bytes of a file.
fn inserts(directory: &Path) -> bool {
    let file = tempfile::tempfile_in(directory).unwrap();
    file.write_all_at(&[7; 8192], 0).unwrap();
    fallocate(&file, FallocateFlags::INSERT_RANGE, 0, 65_536).is_ok()
}

fn clones(directory: &Path) -> bool {
    let (source, target) = (tempfile::tempfile_in(directory).unwrap(), tempfile::tempfile_in(directory).unwrap());
    source.write_all_at(&[7; 8192], 0).unwrap();
    reflink::clone_range(&source, 0..8192, &target, 0)
}

#[test]
fn an_interrupted_commit_leaves_every_fragment_as_it_was() {
    for directory in directories() {
        for options in options() {
            let path = directory.path().join("vm1.vmsnap.tar");
            let mut staged = options.create(&path).unwrap();
            fill(&staged);
            let before = files(&staged);
            let largest = before.iter().find(|(path, _)| path.ends_with("/mem")).unwrap().1.1;
            // The callback is called at the end in any case, and more often if the commit takes its time.
            let mut failures = 0_u32;
            let id = loop {
                let mut left = failures;
                let committed = staged.commit_interruptible(&mut || {
                    left = left.checked_sub(1).ok_or_else(Error::interrupted)?;
                    Ok(())
                });
                match committed {
                    Ok(id) => break id,
                    Err(error) => assert!(error.is_interrupted(), "{error}"),
                }
                assert!(files(&staged) == before && !path.exists());
                failures += 1;
            };
            assert!(failures > 0);
            let moved = inserts(directory.path()) && !clones(directory.path());
            assert_eq!(path.metadata().unwrap().ino() == largest, moved);
            let copy = directory.path().join("copy");
            assert_eq!(options.unpack(&path, &copy).unwrap(), id);
            std::fs::remove_dir_all(copy).unwrap();
            std::fs::remove_file(path).unwrap();
        }
    }
}

#[test]
fn a_location_that_is_taken_at_the_last_moment_is_not_overwritten() {
    for directory in directories() {
        let path = directory.path().join("vm1.vmsnap.tar");
        let mut staged = SnapshotOptions::new().create(&path).unwrap();
        fill(&staged);
        let before = files(&staged);
        let mut calls = 0;
        let mut take = || {
            calls += 1;
            std::fs::write(&path, b"precious").map_err(Error::from)
        };
        let error = staged.commit_interruptible(&mut take).unwrap_err();
        assert!(error.raw_os_error() == Some(17) && calls > 0, "{error}");
        assert_eq!(std::fs::read(&path).unwrap(), b"precious");
        assert!(files(&staged) == before);
        assert_eq!(staged.commit().unwrap_err().raw_os_error(), Some(17));
        assert!(files(&staged) == before);
        std::fs::remove_file(&path).unwrap();
        let id = staged.commit().unwrap();
        assert_eq!(SnapshotOptions::new().unpack(&path, directory.path().join("copy")).unwrap(), id);
    }
}

#[test]
fn killed_in_the_middle_only_the_hidden_directory_is_left() {
    if let Some(parent) = std::env::var_os(PARENT) {
        let mut staged = SnapshotOptions::new().create(Path::new(&parent).join("vm1.vmsnap.tar")).unwrap();
        fill(&staged);
        // Like SIGKILL, `abort` runs no cleanup.
        let _ = staged.commit_interruptible(&mut || std::process::abort());
        return;
    }
    for directory in directories() {
        let done = Command::new(std::env::current_exe().unwrap())
            .args([
                "--exact",
                "store::archive::assemble::tests::killed_in_the_middle_only_the_hidden_directory_is_left",
            ])
            .env(PARENT, directory.path())
            .output()
            .unwrap();
        assert!(!done.status.success());
        let left: Vec<_> = std::fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap().path()).collect();
        assert!(left.len() == 1 && left[0].is_dir());
        assert_eq!(crate::clean(directory.path()).unwrap().removed, left);
    }
}

#[test]
fn a_fragment_that_cannot_be_restored_is_never_committed() {
    let directory = tempfile::tempdir().unwrap();
    let mut staged = SnapshotOptions::new().create(directory.path().join("vm1.vmsnap.tar")).unwrap();
    fill(&staged);
    let namespace = entries::open(staged.writer().location(), "ram").unwrap();
    let file = StoredFile::new(entries::open_writable(&namespace, "mem").unwrap());
    let (name, path, owner) = ("mem".to_owned(), "ram/mem".to_owned(), OwnerProcess::current());
    // No file system removes 1 byte.
    let grown = GrownFile { file, namespace, name, path, room: 1, size: LARGE_BYTES as u64 - 1, owner };
    let error = grown.undo(Error::corrupt("a failure of the test"));
    let text = error.to_string();
    assert!(error.is_state() && text.starts_with("a failure of the test") && text.contains("\"ram/mem\""), "{text}");
    drop(grown);
    let error = staged.commit().unwrap_err();
    assert!(error.is_state() && error.to_string().contains("never finished"), "{error}");
}

#[test]
fn a_file_with_a_second_name_does_not_become_the_archive() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("vm1.vmsnap.tar");
    let mut staged = SnapshotOptions::new().create(&path).unwrap();
    fill(&staged);
    let other = directory.path().join("other");
    std::fs::hard_link(staged.writer().location().join("ram/mem"), &other).unwrap();
    staged.commit().unwrap();
    assert_eq!(other.metadata().unwrap().len(), LARGE_BYTES as u64);
    SnapshotOptions::new().unpack(&path, directory.path().join("copy")).unwrap();
}

#[test]
fn bytes_are_copied_with_and_without_the_help_of_the_kernel() {
    let member = Member::new("a", crate::store::archive::member::MemberKind::File, (5 << 20) + 9, 0, 1024).unwrap();
    let size = usize::try_from(member.size).unwrap();
    let mut bytes = vec![0; size];
    bytes[..600_000].fill(1);
    bytes[4 << 20..].fill(2);
    let source = tempfile::tempfile().unwrap();
    source.set_len(member.size).unwrap();
    source.write_all_at(&bytes[..600_000], 0).unwrap();
    source.write_all_at(&bytes[4 << 20..], 4 << 20).unwrap();
    let source = StoredFile::of_size(source, member.size);
    // The kernel does not copy from one file system to another.
    let other = memfd_create("archive", MemfdFlags::CLOEXEC).unwrap().into();
    for target in [tempfile::tempfile().unwrap(), other] {
        let target = StoredFile::new(target);
        target.set_len(member.end()).unwrap();
        copy(&source, 0..member.size, &target, member.data().start, &mut Interrupt::new(&mut || Ok(()))).unwrap();
        let mut copied = vec![1; size];
        target.read_exact_at(&mut copied, member.data().start).unwrap();
        assert!(copied == bytes);
        assert!(target.metadata().unwrap().blocks() * 512 < 3 << 20);
    }
    // The source became shorter.
    source.set_len(100).unwrap();
    let target = StoredFile::new(tempfile::tempfile().unwrap());
    let error = copy_data(&source, 0..200, &target, 0, &mut Interrupt::new(&mut || Ok(()))).unwrap_err();
    assert!(error.is_corrupt(), "{error}");
}
