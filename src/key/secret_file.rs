//! Files with secrets: read completely, and refused if other users may read or change them.

use std::fs::{File, Metadata};
use std::io::{ErrorKind, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;

use rustix::event::{PollFd, PollFlags, Timespec, poll as wait_for};
use rustix::fs::{OFlags, StatVfsMountFlags, fstatvfs};
use zeroize::Zeroizing;

use super::identity::is_encrypted;
use crate::error::{Error, Kind, Result};
use crate::threads::INTERRUPT_INTERVAL;

/// The limit of age for identity and recipient files.
const MAX_FILE_BYTES: u64 = 16 << 20;

/// The mode bits that let other users than the owner read or write.
pub(super) const OTHERS: u32 = 0o077;
/// The mode bits that let users outside the group read or write. A file of root may be meant for a group.
pub(super) const STRANGERS: u32 = 0o007;
/// The mode bits that let other users than the owner write.
const OTHERS_WRITE: u32 = 0o022;

/// Reads a file, or a pipe until its other end is closed.
pub(super) fn read(path: &Path, interrupt: &mut dyn FnMut() -> Result<()>) -> Result<Zeroizing<Vec<u8>>> {
    read_opened(path, interrupt).map(|(_, _, content)| content)
}

/// Reads a file with secrets. Its mode must not have the bits `forbidden`, unless the file itself is encrypted.
///
/// The mode of a pipe does not matter. The check is relaxed if the caller cannot change the mode, which is usual for
/// secrets of an orchestrator or a service manager: everybody may read a file on a read-only file system (secrets of
/// Kubernetes, credentials of systemd), and the group may read a file of another owner.
pub(crate) fn read_secret(
    path: &Path,
    forbidden: u32,
    interrupt: &mut dyn FnMut() -> Result<()>,
) -> Result<Zeroizing<Vec<u8>>> {
    let (file, metadata, content) = read_opened(path, interrupt)?;
    let mode = metadata.mode() & 0o7777;
    if metadata.is_file() && mode & forbidden_bits(&file, &metadata, forbidden) != 0 && !is_encrypted(&content) {
        let path = path.display();
        return Err(Error::new(
            Kind::KeyUnavailable,
            format!(
                "other users may read or change it (mode {mode:04o}): chmod 600 '{path}'; if that is not possible, \
                 pass its contents, in a shell as <(cat '{path}')"
            ),
        ));
    }
    Ok(content)
}

fn forbidden_bits(file: &File, metadata: &Metadata, forbidden: u32) -> u32 {
    // Ask for the open file, because its path may lead to another file by now.
    let is_read_only = fstatvfs(file).is_ok_and(|file_system| file_system.f_flag.contains(StatVfsMountFlags::RDONLY));
    if is_read_only {
        forbidden & OTHERS_WRITE
    } else if metadata.uid() != rustix::process::geteuid().as_raw() {
        forbidden & (STRANGERS | OTHERS_WRITE)
    } else {
        forbidden
    }
}

fn read_opened(path: &Path, interrupt: &mut dyn FnMut() -> Result<()>) -> Result<(File, Metadata, Zeroizing<Vec<u8>>)> {
    let failed = |error| Error::io("cannot be read", error);
    // Non-blocking: opening a FIFO without a writer would block forever.
    let flags = (OFlags::NONBLOCK | OFlags::NOCTTY).bits().cast_signed();
    let file = File::options().read(true).custom_flags(flags).open(path).map_err(failed)?;
    let metadata = file.metadata().map_err(failed)?;
    if metadata.is_dir() {
        return Err(Error::io("cannot be read", rustix::io::Errno::ISDIR));
    }
    // One byte more than the file, because a vector that grows leaves copies behind.
    let room = if metadata.is_file() { metadata.len().min(MAX_FILE_BYTES) } else { MAX_FILE_BYTES } + 1;
    let mut content = Zeroizing::new(Vec::with_capacity(usize::try_from(room).unwrap_or_default()));
    let mut limited = (&file).take(room);
    loop {
        match limited.read_to_end(&mut content) {
            Ok(_) => break,
            Err(error) if error.kind() == ErrorKind::WouldBlock => {
                interrupt()?;
                wait(&file).map_err(failed)?;
            }
            Err(error) => return Err(failed(error)),
        }
    }
    if u64::try_from(content.len()).is_ok_and(|length| length > MAX_FILE_BYTES) {
        return Err(Error::invalid_argument(format!(
            "is larger than {MAX_FILE_BYTES} bytes, too large for a file of keys"
        )));
    }
    Ok((file, metadata, content))
}

/// Waits for input, but only for a moment.
fn wait(file: &File) -> std::io::Result<()> {
    let timeout = Timespec { tv_sec: 0, tv_nsec: INTERRUPT_INTERVAL.subsec_nanos().into() };
    match wait_for(&mut [PollFd::new(file, PollFlags::IN)], Some(&timeout)) {
        // After a signal, the caller checks the interrupt next.
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}
