//! A snapshot as a whole: everything that can be done with one, except for guest memory and verification.
//!
//! ```text
//! options.rs         SnapshotOptions, from which every call starts
//! writer.rs          SnapshotWriter
//! reader.rs          SnapshotReader
//! staged.rs          StagedSnapshot: commit, discard
//! handle_version.rs  the version of serialized handles
//! seal.rs            seals a snapshot that was written in place
//! clean.rs           removes the remains of killed writers, here or in an object store
//! contents.rs        the contents that a manifest lists
//! open_manifest.rs   the manifest of an open snapshot
//! key_metadata.rs    unlocks a snapshot, and rekey
//! inspect.rs         a snapshot without its key
//! remove.rs          removes a snapshot
//! ```

#[cfg(feature = "object-store")]
mod clean;
mod contents;
mod handle_version;
mod inspect;
pub(crate) mod key_metadata;
pub(crate) mod open_manifest;
mod options;
mod reader;
pub(crate) mod remove;
mod seal;
mod staged;
mod writer;

#[cfg(feature = "python")]
pub(crate) use inspect::inspect_interruptible;
pub use inspect::{InspectedFragment, Inspection, inspect};
pub use key_metadata::rekey;
pub use options::SnapshotOptions;
pub use reader::SnapshotReader;
pub(crate) use seal::not_durable;
pub use staged::StagedSnapshot;
pub use writer::SnapshotWriter;
