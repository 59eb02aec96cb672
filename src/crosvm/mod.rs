//! The API of crosvm's crate `snapshot`, signature by signature, over this crate's own.
//!
//! This module helps to move a virtual machine monitor that was written against crosvm's crate to vmsnap in one step.
//! It needs the crate feature `crosvm`. Only the `use` line changes; a monitor that names the crate in paths
//! (`snapshot::SnapshotWriter`) renames the module:
//!
//! ```
//! use std::io::{Read, Write};
//!
//! use anyhow::Context;
//! use vmsnap::crosvm as snapshot; // was: the crate `snapshot`
//!
//! fn save(writer: &snapshot::SnapshotWriter, disk: &[u8]) -> anyhow::Result<()> {
//!     writer.write_fragment("clock", &12_u64)?;
//!     let mut w: Box<dyn Write> = writer.add_namespace("disks")?.raw_fragment("sda")?;
//!     w.write_all(disk).context("failed to write the disk")
//! }
//!
//! # let directory = tempfile::tempdir()?;
//! # let path = directory.path().join("vm1");
//! let writer = snapshot::SnapshotWriter::new(path.clone(), false)?;
//! save(&writer, b"boot sector")?;
//! writer.check_dropped()?; // the one line to add, see below
//!
//! let reader = snapshot::SnapshotReader::new(&path, false)?;
//! let mut disk = String::new();
//! reader.namespace("disks")?.raw_fragment("sda")?.read_to_string(&mut disk)?;
//! assert_eq!(disk, "boot sector");
//! # anyhow::Ok(())
//! ```
//!
//! # When to use this crate's own API
//!
//! In new code, and in code that is changed anyway. [`crate::SnapshotOptions`] makes snapshots that are complete or
//! absent, takes keys, and seals; [`crate::Fragment`] has a `finish` that reports whether everything was written;
//! [`crate::FragmentReader`] reads at any offset, from many threads; the predicates of [`crate::Error`] tell the causes
//! of errors apart. Handles of both kinds convert into each other by `From`, so that a monitor can move one function at
//! a time. As a first step, let the outermost function create the snapshot by [`crate::SnapshotOptions`] and pass
//! `SnapshotWriter::from(writer)` to all others.
//!
//! # How a fragment ends
//!
//! Callers of crosvm drop the `Box<dyn Write>`, and no call finishes it. So dropping finishes it here, and errors show
//! as follows.
//!
//! - A plain fragment hands each write to the operating system before it returns, as crosvm's file does. Nothing that
//!   could fail is left for the drop.
//! - An encrypted fragment is written in the background, and its last bytes (256 KiB, or one chunk if that is larger)
//!   when it is dropped, because the last segment is marked as the last. `flush` does not change that. If the drop
//!   cannot write them, it removes the fragment's file, so that nobody takes a part for the whole, and remembers the
//!   error: every later call that writes through any clone of the [`SnapshotWriter`], in any namespace, fails with it,
//!   and so does [`SnapshotWriter::check_dropped`]. Call that once at the end of a snapshot. In a staged snapshot the
//!   commit fails as well.
//! - After a write that failed, the caller has the error. Dropping the box removes the file.
//! - While a panic unwinds, dropping the box removes the file, because it holds only a part.
//!
//! # Keys
//!
//! crosvm's public source does not have encryption: `encrypt` panics there. Here `SnapshotWriter::new(root, true)`
//! encrypts for the default identity, and `SnapshotReader::new` opens with it. The identity is searched for in
//! `VMSNAP_IDENTITY` (the text), `VMSNAP_IDENTITY_FILE`, `$CREDENTIALS_DIRECTORY/vmsnap-identity` and
//! `$XDG_CONFIG_HOME/vmsnap/identity.txt`. If it is not found, the first writer creates the last of these files: back
//! it up, because snapshots that were encrypted for it cannot be opened without it. For any other key, create or open
//! the snapshot with [`crate::SnapshotOptions`] and convert the handle.
//!
//! A serialized handle holds the data key in the clear, as crosvm's does.
//!
//! # Differences
//!
//! Every call compiles as it does against crosvm's crate. These behave differently:
//!
//! - Names of fragments and namespaces cannot contain `/`, be `..`, or be one of vmsnap's own (`enc_metadata`).
//! - `namespace` of a reader fails if the namespace does not exist; crosvm's fails at the first read in it.
//! - Lists are sorted, and leave out vmsnap's own files. A link or a special file in the snapshot is an error.
//! - `read_fragment` fails if anything follows the value. It reads JSON, as crosvm wrote before March 2025, as well.
//! - An `anyhow::Error` from here downcasts to [`crate::Error`], and where the operating system was the cause to
//!   [`std::io::Error`]. It does not downcast to the errors of `ciborium`.

mod any_snapshot;
mod dropped;
mod reader;
mod writer;

pub use any_snapshot::AnySnapshot;
pub use reader::SnapshotReader;
pub use writer::SnapshotWriter;

use crate::error::Error;

/// Converts an error of vmsnap. Code written for crosvm finds an [`std::io::Error`] in it if the operating system was
/// the cause.
fn into_anyhow(error: Error) -> anyhow::Error {
    match error.raw_os_error() {
        Some(errno) => anyhow::Error::new(std::io::Error::from_raw_os_error(errno)).context(error),
        None => error.into(),
    }
}
