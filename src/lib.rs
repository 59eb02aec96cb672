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
//! let writer = options.create(&path)?;
//! writer.write_fragment("clock", &12_u64)?;
//! let mut memory = writer.raw_fragment_with_chunk_size("mem", 64 << 10)?;
//! memory.write_all(&vec![0xa5; 1 << 20])?;
//! memory.finish()?;
//!
//! let reader = options.open(&path)?;
//! let mut page = [0; 4096];
//! reader.raw_fragment("mem")?.read_at(0x1000, &mut page)?;
//! assert_eq!(page, [0xa5; 4096]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! Linux only, for now.

#![deny(unsafe_code)]

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
mod key;
mod key_metadata;
mod manifest;
mod memory;
mod name;
mod open_manifest;
mod options;
mod outline;
mod pool;
mod process;
#[cfg(feature = "python")]
mod python;
mod reader;
mod serialization;
mod staging;
mod stored_file;
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
pub use key::{
    Identity, KeyProvider, KeyWrapping, Passphrase, ProviderError, generate_identity, identity_file, recipients_of,
};
pub use key_metadata::{key_wrapping, rekey};
pub use memory::{
    FileMemory, GuestDestination, GuestMemory, GuestMemorySource, GuestRegion, MemoryOptions, MemoryProgress,
    MemoryReport, ProcessMemory, ProcessRange, StoppedProcess,
};
pub use options::SnapshotOptions;
pub use outline::{Outline, OutlinedFragment};
pub use reader::SnapshotReader;
pub use serialization::Format;
pub use staging::{SealId, StagedSnapshot};
pub use verify::{Problem, ProblemKind, Verification};
pub use writer::SnapshotWriter;
