//! Files, pipes and programs around the measured calls, and a mounted image of XFS.

use std::fs::File;
use std::io::{PipeReader, PipeWriter, Read, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

/// The size of the image of XFS, which takes space only where it is written.
const XFS_BYTES: u64 = 12 * (1 << 30);

/// Removes a file or directory, if it exists.
pub(crate) fn remove(path: &Path) {
    let _ = if path.is_dir() { std::fs::remove_dir_all(path) } else { std::fs::remove_file(path) };
}

/// Runs a program to its end.
pub(crate) fn run(command: &mut Command) {
    assert!(command.status().expect("the program is not installed").success());
}

/// Waits until the file system of `path` has written everything.
pub(crate) fn sync_file_system(path: &Path) {
    rustix::fs::syncfs(File::open(path).unwrap()).unwrap();
}

/// Writes a file into a pipe, as `cat` does.
pub(crate) fn feed(archive: &Path, mut pipe: PipeWriter) {
    let (mut file, mut buffer) = (File::open(archive).unwrap(), vec![0; 64 << 10]);
    loop {
        match file.read(&mut buffer).unwrap() {
            0 => return,
            count => pipe.write_all(&buffer[..count]).unwrap(),
        }
    }
}

/// Reads a pipe to its end.
pub(crate) fn discard(mut pipe: PipeReader) {
    let mut buffer = vec![0; 64 << 10];
    while pipe.read(&mut buffer).unwrap() != 0 {}
}

/// Drops the pages of a file, or of all files in a directory, from the page cache of a disk.
pub(crate) fn drop_pages(path: &Path) {
    if path.is_dir() {
        std::fs::read_dir(path).unwrap().for_each(|entry| drop_pages(&entry.unwrap().path()));
    } else {
        rustix::fs::fadvise(File::open(path).unwrap(), 0, None, rustix::fs::Advice::DontNeed).unwrap();
    }
}

/// An image of XFS, mounted until it is dropped.
pub(crate) struct Xfs {
    image: PathBuf,
    pub(crate) mount: PathBuf,
}

impl Xfs {
    pub(crate) fn mount(directory: &Path) -> Self {
        let xfs = Self { image: directory.join("xfs.img"), mount: directory.join("xfs") };
        File::create(&xfs.image).unwrap().set_len(XFS_BYTES).unwrap();
        std::fs::create_dir(&xfs.mount).unwrap();
        run(Command::new("mkfs.xfs").args(["-q", "-m", "reflink=1"]).arg(&xfs.image));
        run(Command::new("mount").args(["-o", "loop"]).arg(&xfs.image).arg(&xfs.mount));
        xfs
    }
}

impl Drop for Xfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.mount).status();
    }
}
