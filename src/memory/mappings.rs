//! The mappings of a live process, and the page faults that only the process itself could serve.

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io::{self, BufRead, BufReader};
use std::ops::Range;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// A mapping, from `/proc/PID/smaps`.
#[derive(Debug)]
pub(super) struct Mapping {
    pub(super) addresses: Range<u64>,
    pub(super) shared: bool,
    pub(super) file_offset: u64,
    /// Device and inode of the mapped file.
    pub(super) identity: (u64, u64),
    name: String,
    /// Whether a missing page may hold something else than zeros or the contents of the file: memory of a device, or a
    /// page that a handler of userfaultfd brings.
    pub(super) opaque: bool,
    /// Whether userfaultfd brings missing pages.
    handled: bool,
}

/// Returns the mappings of a process in ascending order. `directory` is the directory of the process in `/proc`.
pub(super) fn mappings(directory: &Path) -> io::Result<Vec<Mapping>> {
    parse(BufReader::new(fs::File::open(directory.join("smaps"))?))
}

/// Parses `/proc/PID/smaps`; see `proc_pid_smaps(5)`.
fn parse(text: impl BufRead) -> io::Result<Vec<Mapping>> {
    let mut mappings: Vec<Mapping> = Vec::new();
    for line in text.split(b'\n') {
        let line = line?;
        let line = String::from_utf8_lossy(&line);
        if let Some(flags) = line.strip_prefix("VmFlags:") {
            if let Some(last) = mappings.last_mut() {
                let has = |wanted: &[&str]| flags.split_ascii_whitespace().any(|flag| wanted.contains(&flag));
                // Userfaultfd brings missing pages (um) or resolves minor faults (ui).
                last.handled = has(&["um", "ui"]);
                // The flags of several kinds of device memory.
                last.opaque |= last.handled || has(&["io", "pf", "mm"]);
            }
        } else if let Some(mapping) = Mapping::parse(&line) {
            mappings.push(mapping);
        }
    }
    Ok(mappings)
}

impl Mapping {
    /// Parses the first line of a mapping. Returns `None` for any other line.
    fn parse(line: &str) -> Option<Self> {
        let mut words = line.split_ascii_whitespace();
        let (start, end) = words.next()?.split_once('-')?;
        let hex = |text: &str| u64::from_str_radix(text, 16).ok();
        let addresses = hex(start)?..hex(end)?;
        let shared = words.next()?.as_bytes().get(3) == Some(&b's');
        let file_offset = hex(words.next()?)?;
        let device = device(words.next()?, 16)?;
        let inode = words.next()?.parse().ok()?;
        let name = words.next().unwrap_or_default().to_owned();
        // Memory of the kernel (such as vvar), which the page map does not report.
        let opaque = name.starts_with("[v");
        Some(Self { addresses, shared, file_offset, identity: (device, inode), name, opaque, handled: false })
    }

    /// Whether missing pages are zero.
    pub(super) fn is_anonymous(&self) -> bool {
        !self.opaque && !self.shared && (!self.has_file() || self.name.starts_with("/anon_hugepage"))
    }

    pub(super) fn has_file(&self) -> bool {
        self.identity.1 != 0
    }
}

/// Parses a device number, in the form "major:minor".
fn device(text: &str, radix: u32) -> Option<u64> {
    let (major, minor) = text.split_once(':')?;
    let number = |text: &str| u32::from_str_radix(text, radix).ok();
    Some(rustix::fs::makedev(number(major)?, number(minor)?))
}

/// The page faults and files that a process may serve, so that a read of its own mappings may wait for it. While it is
/// stopped, that wait never ends.
#[derive(Debug, Default)]
pub(super) struct Serving {
    /// Whether it has a userfaultfd open.
    faults: bool,
    /// If it has `/dev/fuse` open: the numbers of the mounts that it may serve, and their devices.
    files: Option<(HashSet<u64>, HashSet<u64>)>,
}

impl Serving {
    /// Returns the page faults and files that the process may serve, without a request to it. `directory` is its
    /// directory in `/proc`.
    pub(super) fn of(directory: &Path) -> Self {
        let Ok(entries) = fs::read_dir(directory.join("fd")) else {
            // Unknown, so everything is assumed.
            return Self { faults: true, files: Some(fuse_mounts(directory)) };
        };
        let mut serving = Self::default();
        for name in entries.flatten().filter_map(|entry| fs::read_link(entry.path()).ok()) {
            serving.faults |= name.as_os_str() == "anon_inode:[userfaultfd]";
            if serving.files.is_none() && name.file_name().is_some_and(|name| name == "fuse") {
                serving.files = Some(fuse_mounts(directory));
            }
        }
        serving
    }

    /// Whether a missing page of the mapping may wait for the process itself.
    pub(super) fn brings(&self, mapping: &Mapping) -> bool {
        let on_fuse = |(_, devices): &(_, HashSet<u64>)| mapping.has_file() && devices.contains(&mapping.identity.0);
        (self.faults && mapping.handled) || self.files.as_ref().is_some_and(on_fuse)
    }

    /// Returns the paths of the files that a process has open, by device and inode. Files that it may serve are left
    /// out without a request for their identity.
    pub(super) fn descriptors(&self, directory: &Path) -> HashMap<(u64, u64), PathBuf> {
        let entries = fs::read_dir(directory.join("fd")).into_iter().flatten().flatten();
        let files = entries.filter_map(|entry| {
            if let Some((mounts, _)) = &self.files {
                let information = fs::read_to_string(directory.join("fdinfo").join(entry.file_name())).ok()?;
                let mount = information.lines().find_map(|line| line.strip_prefix("mnt_id:"))?;
                if mounts.contains(&mount.trim().parse().ok()?) {
                    return None;
                }
            }
            let found = fs::metadata(entry.path()).ok()?;
            found.is_file().then(|| ((found.dev(), found.ino()), entry.path()))
        });
        files.collect()
    }
}

/// Returns the FUSE mounts that a process sees, and their devices; see `proc_pid_mountinfo(5)`. A request to the file
/// itself (statfs) would wait for the process that serves it.
fn fuse_mounts(directory: &Path) -> (HashSet<u64>, HashSet<u64>) {
    let text = fs::read(directory.join("mountinfo")).unwrap_or_default();
    let text = String::from_utf8_lossy(&text);
    let mounts = text.lines().filter_map(|line| {
        let (place, kind) = line.split_once(" - ")?;
        let mut words = place.split_ascii_whitespace();
        let number = words.next()?.parse::<u64>().ok()?;
        kind.starts_with("fuse").then(|| Some((number, device(words.nth(1)?, 10)?)))?
    });
    mounts.unzip()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mappings_are_told_apart_by_their_flags() {
        let text = "7f00-7f80 rw-p 00000000 00:00 0 \nSize: 4 kB\nVmFlags: rd wr mr um \n\
                    8000-9000 rw-s 00001000 00:2f 77 /mnt/a file\nVmFlags: rd wr sh \n\
                    9000-a000 rw-s 00000000 00:06 9 /dev/mem\nVmFlags: rd io pf \n";
        let found = parse(text.as_bytes()).unwrap();
        assert_eq!(
            found.iter().map(|each| each.addresses.clone()).collect::<Vec<_>>(),
            [0x7f00..0x7f80, 0x8000..0x9000, 0x9000..0xa000]
        );
        assert_eq!(found.iter().map(|each| each.opaque).collect::<Vec<_>>(), [true, false, true]);
        assert_eq!((found[1].shared, found[1].file_offset), (true, 0x1000));
        let brought = |serving: Serving| found.iter().map(|each| serving.brings(each)).collect::<Vec<_>>();
        assert_eq!(brought(Serving::default()), [false, false, false]);
        assert_eq!(brought(Serving { faults: true, files: None }), [true, false, false]);
        let device = rustix::fs::makedev(0, 0x2f);
        let files = Some((HashSet::new(), HashSet::from([device])));
        assert_eq!(brought(Serving { faults: false, files }), [false, true, false]);
    }

    #[test]
    fn fuse_mounts_are_found_by_their_kind() {
        let directory = tempfile::tempdir().unwrap();
        let text = "36 35 98:0 / /mnt rw shared:1 - ext4 /dev/root rw\n40 35 0:47 / /mnt/f rw - fuse.sshfs x rw\n";
        fs::write(directory.path().join("mountinfo"), text).unwrap();
        let (mounts, devices) = fuse_mounts(directory.path());
        assert_eq!((mounts, devices), (HashSet::from([40]), HashSet::from([rustix::fs::makedev(0, 47)])));
    }
}
