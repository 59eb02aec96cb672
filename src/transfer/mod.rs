//! A whole snapshot on its way between a directory and an archive. The stored bytes stay the same, and each fragment is
//! checked while it passes.
//!
//! ```text
//! pack.rs    from a snapshot into a new archive, or into a stream
//! unpack.rs  from an archive, or from a stream, into a new directory
//! ```

mod pack;
mod unpack;

#[cfg(test)]
mod tests;
