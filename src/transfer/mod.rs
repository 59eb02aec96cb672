//! A whole snapshot on its way between a directory, an archive and an object store. The stored bytes stay the same, and
//! each fragment is checked while it passes.
//!
//! ```text
//! pack.rs      from a snapshot into a new archive, or into a stream
//! unpack.rs    from an archive, or from a stream, into a new directory
//! push.rs      from a snapshot into an object store
//! pull.rs      from an object store into a new directory or archive
//! sealed.rs    the snapshot that is the source
//! progress.rs  how many bytes have passed
//! ```

mod pack;
#[cfg(feature = "object-store")]
mod progress;
#[cfg(feature = "object-store")]
mod pull;
#[cfg(feature = "object-store")]
mod push;
mod sealed;
mod unpack;

#[cfg(feature = "python")]
pub(crate) use progress::Progress;
#[cfg(feature = "object-store")]
pub use push::Pushed;

#[cfg(test)]
mod tests;
