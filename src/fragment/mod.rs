//! Fragments: byte strings that are written once, front to back, and read with random access.
//!
//! ```text
//! writing.rs           Fragment (Write): open, failed or finished
//! reading.rs           FragmentReader (Read, Seek, read_at)
//! plain.rs             an unencrypted fragment: the bytes themselves
//! encrypted_sink.rs    an encrypted fragment being written: one FLOE message
//! encryptors.rs        its chunks, encrypted by all threads
//! background.rs        batches of small writes, written while the caller goes on
//! encrypted_source.rs  an encrypted fragment being read, decrypted by all threads
//! positioned.rs        batches that several threads write, each at its own offset
//! checked_copy.rs      stored bytes that are copied and checked on the way
//! batches.rs           a buffer cut into the batches that one thread reads at a time
//! rope.rs              consecutive bytes that are scattered in memory
//! place.rs             the location and path of a fragment, for errors and the cipher
//! digest.rs            BLAKE3 of a plain fragment
//! ledger.rs            the fragments a process wrote into a staged snapshot
//! scratch.rs           a file of this process alone, written and read back
//! ```

mod background;
mod batches;
pub(crate) mod checked_copy;
pub(crate) mod digest;
mod encrypted_sink;
mod encrypted_source;
mod encryptors;
pub(crate) mod ledger;
mod place;
mod plain;
pub(crate) mod positioned;
mod reading;
pub(crate) mod rope;
pub(crate) mod scratch;
mod writing;

pub(crate) use place::FragmentPlace;
pub use reading::FragmentReader;
pub use writing::Fragment;
pub(crate) use writing::Writing;
