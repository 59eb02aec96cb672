//! Virtual-machine snapshots: encrypted, written in parallel, readable at random.
//!
//! A snapshot is a folder of fragments (byte blobs: guest memory, a disk, a device's state), nested by namespaces. The
//! semantics and the names are those of crosvm's `SnapshotWriter` and `SnapshotReader`; what is encrypted is an open
//! format, [C2SP FLOE](https://c2sp.org/FLOE), described byte by byte in `docs/format.md`.
//!
//! ```
//! use std::io::Write;
//! use vmsnap::{SecretKey, SnapshotOptions};
//!
//! # let folder = tempfile::tempdir()?;
//! # let path = folder.path().join("vm1");
//! let options = SnapshotOptions::new().key(SecretKey::generate()?);
//!
//! let mut staged = options.create(&path)?;
//! staged.writer().write_fragment("clock", &12_u64)?;
//! let mut disk = staged.writer().raw_fragment_with_chunk_size("sda", 64 << 10)?;
//! disk.write_all(&vec![0xa5; 1 << 20])?;
//! disk.finish()?;
//! staged.commit()?;
//!
//! let reader = options.open(&path)?;
//! let mut page = [0; 4096];
//! reader.raw_fragment("sda")?.read_at(0x1000, &mut page)?;
//! assert_eq!(page, [0xa5; 4096]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! Linux only, for now.

#![deny(unsafe_code)]
// Whether and where to print is for the program to decide; clippy.toml forbids the streams themselves.
#![deny(clippy::print_stdout, clippy::print_stderr)]

mod any_snapshot;
mod buffer;
mod cipher;
mod clean;
mod durability;
mod error;
mod fragment;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzzing;
mod inspect;
mod key;
mod key_metadata;
mod manifest;
mod memory;
mod name;
mod open_manifest;
mod options;
mod pool;
mod process;
#[cfg(feature = "python")]
mod python;
mod reader;
mod serialization;
mod staging;
mod strict_cbor;
mod threads;
mod verify;
mod writer;

/// The README's Rust runs as a test.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

pub use any_snapshot::AnySnapshot;
pub use cipher::{
    DEFAULT_CHUNK_SIZE_BYTES, KEY_BYTES, MAX_CHUNK_SIZE_BYTES, MIN_CHUNK_SIZE_BYTES, SecretKey, aead_provider,
};
pub use clean::{Cleaned, clean};
pub use error::{Error, Result};
pub use fragment::{Fragment, FragmentReader};
pub use inspect::{InspectedFragment, Inspection, inspect};
pub use key::{
    Identity, KeyProvider, KeyWrapping, Passphrase, ProviderError, generate_identity, identity_file, recipients_of,
};
pub use key_metadata::rekey;
pub use memory::{
    FileMemory, GuestDestination, GuestMemory, GuestMemorySource, GuestRegion, MemoryOptions, MemoryProgress,
    MemoryReport, ProcessMemory, ProcessRange, StoppedProcess,
};
pub use options::SnapshotOptions;
pub use reader::SnapshotReader;
pub use serialization::Format;
pub use staging::{SealId, StagedSnapshot};
pub use verify::{Problem, ProblemKind, Verification};
pub use writer::SnapshotWriter;
