//! Transfers through open files, and their ends by an interrupt.

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::os::fd::OwnedFd;

use crate::{Error, SecretKey, SnapshotOptions, SnapshotWriter};

fn fill(writer: &SnapshotWriter) {
    writer.write_fragment("clock", &12).unwrap();
    let bytes: Vec<u8> = (0..9_000_000_u32).map(|number| number.to_le_bytes()[1]).collect();
    writer.write_whole("mem", &bytes, &mut || Ok(())).unwrap();
}

fn options() -> [SnapshotOptions; 2] {
    [SnapshotOptions::new(), SnapshotOptions::new().key(SecretKey::generate().unwrap())]
}

#[test]
fn descriptors_of_a_pipe_and_of_a_file_are_enough() {
    for options in options() {
        let directory = tempfile::tempdir().unwrap();
        let [original, piped, copy] = ["vm1", "piped", "copy"].map(|name| directory.path().join(name));
        let mut staged = options.create(&original).unwrap();
        fill(staged.writer());
        let id = staged.commit().unwrap();
        let (reader, writer) = std::io::pipe().unwrap();
        std::thread::scope(|scope| {
            scope.spawn(|| options.pack_to_file(&original, OwnedFd::from(writer).into(), &mut || Ok(())).unwrap());
            assert_eq!(options.unpack_file(OwnedFd::from(reader).into(), &piped, &mut || Ok(())).unwrap(), id);
        });
        let mut file = tempfile::tempfile().unwrap();
        options.pack_to_file(&original, file.try_clone().unwrap(), &mut || Ok(())).unwrap();
        file.seek(SeekFrom::Start(0)).unwrap();
        assert_eq!(options.unpack_file(file, &copy, &mut || Ok(())).unwrap(), id);
    }
}

#[test]
fn an_interrupt_ends_a_transfer_that_waits_and_nothing_is_left() {
    for options in options() {
        let directory = tempfile::tempdir().unwrap();
        let [original, copy] = ["vm1", "copy"].map(|name| directory.path().join(name));
        let mut staged = options.create(&original).unwrap();
        fill(staged.writer());
        staged.commit().unwrap();
        let file_of = |end: OwnedFd| File::from(end);
        // Nobody reads, and nobody writes.
        let (reader, writer) = std::io::pipe().unwrap();
        let stop = &mut || Err(Error::interrupted());
        let full = file_of(writer.try_clone().unwrap().into());
        assert!(options.pack_to_file(&original, full, stop).unwrap_err().is_interrupted());
        // The pipe has the beginning of an archive now, and does not end.
        let error = options.unpack_file(file_of(reader.into()), &copy, stop).unwrap_err();
        assert!(error.is_interrupted(), "{error}");
        drop(writer);
        let archive = directory.path().join("vm1.tar");
        assert!(options.pack_interruptible(&original, &archive, stop).unwrap_err().is_interrupted());
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
    }
}

#[test]
fn a_full_disk_ends_a_transfer_and_nothing_is_left() {
    // A device that is always full stands for the stream.
    let directory = tempfile::tempdir().unwrap();
    let original = directory.path().join("vm1");
    let options = SnapshotOptions::new();
    let mut staged = options.create(&original).unwrap();
    fill(staged.writer());
    staged.commit().unwrap();
    let full = File::options().write(true).open("/dev/full").unwrap();
    let error = options.pack_to_file(&original, full, &mut || Ok(())).unwrap_err();
    assert!(error.raw_os_error() == Some(28) && error.to_string().contains("cannot pack"), "{error}");
}
