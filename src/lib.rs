//! Virtual-machine snapshots with random access, written in parallel, optionally encrypted and compressed.
//!
//! A snapshot is a directory of *fragments* (guest memory, a disk, the state of a device), which nest in *namespaces*.
//! The names and semantics are those that crosvm gives `SnapshotWriter` and `SnapshotReader`. An encrypted fragment is
//! in an open format, [C2SP FLOE](https://c2sp.org/FLOE); `docs/format.md` describes every byte.
//!
//! # Overview
//!
//! Every operation starts with [`SnapshotOptions`]: it holds the key, the number of threads and the format of values.
//!
//! To write:
//!
//! - [`SnapshotOptions::create`] creates a snapshot that is complete or absent. It returns a [`StagedSnapshot`]: write
//!   through its [`writer`](StagedSnapshot::writer), then [`commit`](StagedSnapshot::commit).
//! - [`SnapshotOptions::create_in_place`] creates a snapshot in place, as crosvm does, and returns a [`SnapshotWriter`].
//! - [`SnapshotOptions::append`] adds to a snapshot that is not sealed; [`SnapshotOptions::seal`] seals it.
//! - [`SnapshotWriter::raw_fragment`] returns a [`Fragment`], which is a [`Write`](std::io::Write).
//! - [`SnapshotWriter::write_fragment`] writes a serde value.
//! - [`SnapshotWriter::write_memory`] dumps guest memory from [`GuestRegion`]s: buffers, a [`FileMemory`], a
//!   [`ProcessMemory`], or your own [`GuestMemorySource`].
//!
//! To read:
//!
//! - [`SnapshotOptions::open`] returns a [`SnapshotReader`].
//! - [`SnapshotReader::raw_fragment`] returns a [`FragmentReader`], which reads in order or at any offset.
//! - [`SnapshotReader::read_fragment`] returns a serde value.
//! - [`SnapshotReader::memory`] returns a [`GuestMemory`], which reads by guest-physical address and restores into
//!   [`GuestDestination`]s.
//!
//! QEMU's migration stream, out of which guest memory is taken, and into which it is put back:
//!
//! - [`SnapshotWriter::receive_migration`] returns a [`MigrationStream`], whose memory
//!   [`SnapshotWriter::write_memory`] dumps; the rest of the stream is a fragment. With [`BlockRegion`]s, the memory of a
//!   guest that stands still is written as it comes.
//! - [`SnapshotReader::send_migration`] makes the whole stream again; [`SnapshotReader::migration_front`] returns a
//!   [`MigrationFront`], which tells the RAM blocks.
//!
//! One file instead of a directory, an archive:
//!
//! - [`SnapshotOptions::pack`] and [`SnapshotOptions::unpack`] convert between a directory and an archive;
//!   [`SnapshotOptions::pack_to`] and [`SnapshotOptions::unpack_from`] use a stream.
//! - [`SnapshotOptions::create`] makes an archive if the name ends in `.vmsnap.tar`; see
//!   [`SnapshotOptions::archive`].
//!
//! Keys and maintenance:
//!
//! - A snapshot is encrypted for a [`SecretKey`], a [`Passphrase`] or age [recipients](SnapshotOptions::recipients), or
//!   by a [`KeyProvider`]. [`rekey`] changes that.
//! - [`SnapshotOptions::verify`] reads everything and returns a [`Verification`].
//! - [`inspect`](fn@inspect) looks at a snapshot without its key.
//! - [`clean`] removes the remains of killed processes.
//!
//! # Example
//!
//! ```
//! use std::io::Write;
//! use vmsnap::{GuestRegion, MemoryOptions, SecretKey, SnapshotOptions};
//!
//! # let directory = tempfile::tempdir()?;
//! # let location = directory.path().join("vm1");
//! let options = SnapshotOptions::new().key(SecretKey::generate()?);
//!
//! let mut staged = options.create(&location)?;
//! let writer = staged.writer();
//! writer.write_fragment("clock", &12_u64)?;
//! let ram = vec![0xa5; 1 << 20];
//! writer.write_memory(&[GuestRegion::new(0, &ram)], &MemoryOptions::new().compress(true))?;
//! let mut disk = writer.add_namespace("disks")?.raw_fragment("sda")?;
//! disk.write_all(b"boot sector")?;
//! disk.finish()?;
//! staged.commit()?; // nothing is at the location before this
//!
//! let reader = options.open(&location)?;
//! assert_eq!(reader.read_fragment::<u64>("clock")?, 12);
//! let mut page = [0; 4096];
//! reader.memory()?.read_at(0x1000, &mut page)?; // decrypts and decompresses one block
//! assert_eq!(page, [0xa5; 4096]);
//! assert_eq!(reader.namespace("disks")?.raw_fragment("sda")?.size(), 11);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```
//!
//! # Errors
//!
//! All functions return one [`Error`]. Its predicates ([`Error::is_authentication`], [`Error::is_io`], ...) tell the
//! kinds apart, and its text names the file. An authentication error does not say whether the key is wrong or the data
//! is damaged, because the two cannot be told apart.
//!
//! # Threads and processes
//!
//! A large call uses several threads by itself, by default as many as the process may run on. [`SnapshotWriter`] and
//! [`SnapshotReader`] are small handles: clone them, or serialize them to another process (**with the data key in the
//! clear**). An open fragment belongs to its process; in a forked child all its calls fail.
//!
//! # Features
//!
//! - `aws-lc` (default): the faster AES-GCM; needs a C compiler.
//! - `age` (default): recipients, identities and passphrases.
//! - `c-lz4` (default): the C decoder of LZ4, twice as fast; needs a C compiler.
//! - `object-store`: snapshots in S3, Google Cloud Storage and Azure Blob Storage, at locations such as `s3://bucket/vm1`.
//! - `python`: the extension module of the Python package, of no use to a Rust program.
//!
//! Linux only, for now.

#![deny(unsafe_code)]
// Whether and where to print is for the program to decide; clippy.toml forbids the streams themselves.
#![deny(clippy::print_stdout, clippy::print_stderr)]

// The table of the modules. A module imports from its own row and from the rows below; `docs/design.md` explains each.
//
//     python, crosvm                                the extension module; crosvm's own signatures
//     qemu                                          QEMU's migration stream
//     memory, verify, transfer                      guest memory; verification; whole snapshots as archives
//     snapshot                                      the handles, SnapshotOptions, commit and seal
//     fragment, key, serialization                  contents of fragments; wrapped keys; values
//     store                                         the place where a snapshot is kept
//     manifest, strict_cbor, cipher, name           formats: the manifest, FLOE, names
//     threads, pool, process, buffer, durability, stored_file, reflink, location,
//     zeros, error

mod buffer;
mod cipher;
#[cfg(feature = "crosvm")]
pub mod crosvm;
mod durability;
mod error;
mod fragment;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzzing;
mod key;
mod location;
mod manifest;
mod memory;
mod name;
mod pool;
mod process;
#[cfg(feature = "python")]
mod python;
mod qemu;
mod reflink;
mod serialization;
mod snapshot;
mod store;
mod stored_file;
mod strict_cbor;
mod threads;
mod transfer;
mod verify;
mod zeros;

/// Runs the Rust of the README as a test.
#[cfg(doctest)]
#[doc = include_str!("../README.md")]
struct Readme;

/// Runs the Rust of its page as a test.
#[cfg(all(doctest, feature = "age"))]
#[doc = include_str!("../docs/rust.md")]
struct RustPage;

pub use cipher::{
    DEFAULT_CHUNK_SIZE_BYTES, KEY_BYTES, MAX_CHUNK_SIZE_BYTES, MIN_CHUNK_SIZE_BYTES, SecretKey, aead_provider,
};
pub use error::{Error, Result};
pub use fragment::{Fragment, FragmentReader};
pub use key::{
    Identity, KeyProvider, KeyWrapping, Passphrase, ProviderError, generate_identity, identity_file, recipients_of,
};
pub use manifest::SealId;
pub use memory::{
    FileMemory, GuestDestination, GuestMemory, GuestMemorySource, GuestRegion, MemoryOptions, MemoryProgress,
    MemoryReport, ProcessMemory, ProcessRange, StoppedProcess,
};
pub use qemu::{BlockRegion, MigrationFront, MigrationStream, RamBlock, SentBlock};
pub use serialization::{AnySnapshot, Format};
pub use snapshot::{
    InspectedFragment, Inspection, SnapshotOptions, SnapshotReader, SnapshotWriter, StagedSnapshot, inspect, rekey,
};
pub use store::directory::clean::{Cleaned, clean};
#[cfg(feature = "object-store")]
pub use transfer::Pushed;
pub use verify::{Problem, ProblemKind, Verification};
