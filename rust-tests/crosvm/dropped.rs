//! Fragments that are finished when they are dropped, and the errors that cannot be returned then.

use std::io::Write;
use std::panic::AssertUnwindSafe;
use std::path::Path;
use std::process::Command;

use vmsnap::crosvm::{SnapshotReader, SnapshotWriter};
use vmsnap::{SecretKey, SnapshotOptions};

use crate::handles::in_place;
use crate::place;

/// Set in the child process, in which a file can have at most 16 KiB.
const IN_CHILD: &str = "VMSNAP_TEST_FILE_LIMIT";

/// Runs a test in a child process with a limit on file sizes. Returns true in the child. The shell ignores the signal
/// that comes with the error, and the child inherits that.
fn in_limited_process(test: &str) -> bool {
    if std::env::var_os(IN_CHILD).is_some() {
        return true;
    }
    // Some shells count blocks of 512 bytes, others 1 KiB.
    let done = Command::new("sh")
        .args(["-c", "trap '' XFSZ; ulimit -f 16; exec \"$@\"", "sh"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", &format!("dropped::{test}"), "--nocapture"])
        .env(IN_CHILD, "1")
        .output()
        .unwrap();
    let output = String::from_utf8_lossy(&done.stdout);
    assert!(done.status.success() && output.contains("1 passed"), "{output}{}", String::from_utf8_lossy(&done.stderr));
    false
}

fn encrypted() -> SnapshotOptions {
    SnapshotOptions::new().key(SecretKey::from([7; 32]))
}

/// Writes a fragment that fits into memory but not into a file, and drops it.
fn drop_what_does_not_fit(writer: &SnapshotWriter, name: &str) {
    writer.raw_fragment(name).unwrap().write_all(&vec![1; 100_000]).unwrap();
}

fn is_too_large(error: &anyhow::Error) -> bool {
    error.downcast_ref::<std::io::Error>().and_then(std::io::Error::raw_os_error)
        == Some(rustix::io::Errno::FBIG.raw_os_error())
}

#[test]
fn an_error_at_the_drop_is_told_by_every_later_call_of_every_clone() {
    if !in_limited_process("an_error_at_the_drop_is_told_by_every_later_call_of_every_clone") {
        return;
    }
    let (_directory, root, _) = place();
    let writer = SnapshotWriter::from(in_place(&encrypted(), &root));
    let (namespace, clone) = (writer.add_namespace("devices").unwrap(), writer.clone());
    writer.write_fragment("clock", &12).unwrap();
    writer.check_dropped().unwrap();
    drop_what_does_not_fit(&namespace, "nic");
    for writer in [writer, clone, namespace] {
        let errors = [
            writer.check_dropped().unwrap_err(),
            writer.raw_fragment("a").map(|_| ()).unwrap_err(),
            writer.raw_fragment_with_chunk_size("a", 64).map(|_| ()).unwrap_err(),
            writer.write_fragment("a", &1).unwrap_err(),
            writer.add_namespace("a").unwrap_err(),
        ];
        for error in errors {
            let text = error.to_string();
            assert!(text.starts_with("the snapshot is incomplete: ") && text.contains("fragment \"nic\""), "{text}");
            assert!(is_too_large(&error) && error.downcast_ref::<vmsnap::Error>().unwrap().is_state(), "{error:?}");
        }
    }
    // The failed and refused fragments are absent; the earlier one is present.
    let reader = encrypted().open(&root).unwrap();
    assert_eq!(reader.list_fragments().unwrap(), ["clock"]);
    assert!(reader.namespace("devices").unwrap().list_fragments().unwrap().is_empty());
}

#[test]
fn an_error_at_the_drop_fails_the_commit() {
    if !in_limited_process("an_error_at_the_drop_fails_the_commit") {
        return;
    }
    let (_directory, root, _) = place();
    let mut staged = encrypted().create(&root).unwrap();
    drop_what_does_not_fit(&staged.writer().clone().into(), "nic");
    assert!(staged.commit().unwrap_err().to_string().contains("nic"));
    drop(staged);
    assert!(!root.exists());
}

#[test]
fn an_error_of_a_plain_write_is_told_by_the_write() {
    if !in_limited_process("an_error_of_a_plain_write_is_told_by_the_write") {
        return;
    }
    let (_directory, root, _) = place();
    let writer = SnapshotWriter::new(root.clone(), false).unwrap();
    let mut w = writer.raw_fragment("nic").unwrap();
    let error = (0..1000).find_map(|_| w.write_all(&[1; 100]).err()).unwrap();
    assert_eq!(error.kind(), std::io::ErrorKind::FileTooLarge);
    drop(w);
    // The caller has the error, and may go on.
    writer.check_dropped().unwrap();
    writer.raw_fragment("nic").unwrap().write_all(b"smaller").unwrap();
    assert_eq!(std::fs::read(root.join("nic")).unwrap(), b"smaller");
}

#[test]
fn a_plain_write_is_in_the_file_when_it_returns() {
    let (_directory, root, _) = place();
    let mut w = SnapshotWriter::new(root.clone(), false).unwrap().raw_fragment("log").unwrap();
    for (line, written) in [("a\n", "a\n"), ("b\n", "a\nb\n")] {
        w.write_all(line.as_bytes()).unwrap();
        assert_eq!(std::fs::read_to_string(root.join("log")).unwrap(), written);
    }
}

#[test]
fn a_box_dropped_by_a_panic_leaves_nothing() {
    fn fragments(root: &Path, options: &SnapshotOptions) -> Vec<String> {
        SnapshotReader::from(options.open(root).unwrap()).list_fragments().unwrap()
    }
    let (_directory, root, _) = place();
    for options in [SnapshotOptions::new(), encrypted()] {
        let writer = SnapshotWriter::from(in_place(&options, &root));
        let caught = std::panic::catch_unwind(AssertUnwindSafe(|| {
            let mut w = writer.raw_fragment("mem").unwrap();
            w.write_all(&vec![1; 100_000]).unwrap();
            panic!("half-way");
        }));
        assert!(caught.is_err() && fragments(&root, &options).is_empty());
        writer.check_dropped().unwrap();
        writer.raw_fragment("mem").unwrap().write_all(b"whole").unwrap();
        assert_eq!(fragments(&root, &options), ["mem"]);
        std::fs::remove_dir_all(&root).unwrap();
    }
}
