//! A snapshot in an object store: each fragment is an object below one prefix.
//!
//! ```text
//! bucket.rs       the objects of one snapshot, for threads that wait
//! objects.rs      the objects of one snapshot, for tasks of the runtime
//! reading.rs      a snapshot, opened to be read
//! blocks.rs       a fragment, read in blocks
//! pool.rs         the blocks in memory, and the requests for them
//! cache.rs        blocks in files on a local disk
//! upload.rs       an object that is written at any offset, and sent in parts
//! parts.rs        the parts of an object that is being written
//! flights.rs      the parts that are under way at once
//! proof.rs        the metadata that tells which fragment an object is
//! patience.rs     the end of the patience with a store that does not answer
//! claim.rs        the claim on a prefix while a snapshot is written there
//! draft.rs        a snapshot that is written straight into a bucket
//! clean.rs        removes the remains of killed writers
//! runtime.rs      the runtime of the process, and tasks that threads wait for
//! connect.rs      the client of a store, made of a URL, options and the environment
//! settings.rs     options and environment, checked
//! credentials.rs  whether there are credentials, so that nothing waits for a service that is not there
//! transport.rs    HTTP: timeouts, and answers that are checked before they are believed
//! errors.rs       errors of the client as errors of vmsnap
//! ```
//!
//! The client is asynchronous; everything else in vmsnap is not. A thread starts a task in the runtime and waits for it
//! in steps, so that a caller can stop it. Nothing on the side of the runtime may use the thread pool, because all
//! threads of the pool may be waiting.

mod blocks;
mod bucket;
pub(crate) mod cache;
mod claim;
mod clean;
mod connect;
mod credentials;
mod draft;
mod errors;
mod flights;
mod objects;
mod parts;
mod patience;
mod pool;
mod proof;
mod reading;
#[cfg(test)]
mod reading_tests;
pub(crate) mod runtime;
mod settings;
#[cfg(test)]
pub(crate) mod test_server;
#[cfg(test)]
pub(crate) mod test_store;
#[cfg(test)]
mod tests;
mod transport;
mod upload;

pub(crate) use bucket::Bucket;
pub(crate) use claim::{CLAIM, Claim, Taken};
pub(crate) use clean::clean;
pub(crate) use connect::PartStore;
pub(crate) use draft::{SnapshotUpload, exists, occupied, remains};
pub(crate) use flights::Flights;
pub(crate) use objects::{Created, Got, Headed, Listed, Objects, Part, Upload, Version, Wanted};
pub(crate) use patience::patience;
pub(crate) use proof::{has_proof, proof_attributes};
pub(crate) use reading::Remote;
pub(crate) use upload::{UploadedObject, abort_all};
